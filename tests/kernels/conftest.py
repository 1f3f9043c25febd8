"""For every kernel test: memory that nobody wrote shows, one thread, one seed.

torch fills fresh tensors with NaN (integers: the largest one). The products here are tiny: on a busy machine a second thread
costs a wait for the scheduler in every one of them, and 200 training steps took a minute.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def nan_in_fresh_memory_one_thread_one_seed():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)
