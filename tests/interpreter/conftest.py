"""Kernels in Triton's interpreter, a process of its own: `make test-interpreter` sets TRITON_INTERPRET=1 before anything is
imported. With a GPU and without that flag, test_doors.py alone runs, on the device."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_[!d]*.py", "test_decode.py"] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def exact(nan_in_fresh_memory_one_thread_one_seed):
    pass
