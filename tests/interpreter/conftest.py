"""Kernels in Triton's interpreter, a process of its own: `make test-interpreter` sets TRITON_INTERPRET=1 before anything is imported."""

import pytest


@pytest.fixture(autouse=True)
def exact(nan_in_fresh_memory_one_thread_one_seed):
    pass
