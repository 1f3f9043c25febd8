"""Tiny trainers of every variant, the dense reference beside them, and the step between the two."""

import importlib.util
from pathlib import Path

import pytest
import torch


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"variants_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference():
    """tests/variants/reference.py"""
    return _module("reference")


@pytest.fixture(autouse=True)
def one_thread():
    """The products are tiny: a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
