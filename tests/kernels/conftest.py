"""For every kernel test: memory that nobody wrote shows. torch fills fresh tensors with NaN (integers: the largest one)."""

import pytest
import torch


@pytest.fixture(autouse=True)
def uninitialised_memory_shows():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
