"""`saekit doctor`: a report that can be pasted anywhere, and a self-test that can fail."""

import getpass
import os
import re
from pathlib import Path

import pytest
import saekit_kernels
import torch

from saekit import cli
from saekit import doctor as module


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    text, problems = module.doctor("cpu")
    assert not problems
    return text


def test_what_it_says(report):
    sections = [line for line in report.splitlines() if line and not line.startswith(" ")]
    assert sections == ["versions", "devices", "kernels on cpu", "free disk", "self-test"]
    assert re.search(
        rf"^  torch +{re.escape(torch.__version__)}$|^  torch +{torch.__version__.split('+')[0]}", report, re.MULTILINE
    )
    assert re.search(r"^  gguf +\S+ .*\(for gguf, study\)$", report, re.MULTILINE)
    assert re.search(r"^  encode_select row_count +cpu: \w", report, re.MULTILINE)
    assert re.search(r"^  selections +5 rules equal their equations", report, re.MULTILINE)
    assert "repeated to the bit" in report


def test_no_paths_and_no_names(report):
    assert str(Path.home()) not in report and os.uname().nodename not in report and str(Path.cwd()) not in report
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", report)


def test_a_wrong_kernel_is_found(monkeypatch, capsys):
    def off_by_one(*args, **options):
        out = saekit_kernels.encode_select(*args, **options)
        return (
            out._replace(codes=out.codes.with_values(out.codes.values * 1.001))
            if calls.append(0) or len(calls) % 2 == 0
            else out
        )

    calls = []
    monkeypatch.setattr(module, "encode_select", off_by_one)
    monkeypatch.setattr(module, "_training", lambda device: "left out")
    monkeypatch.setattr(module, "_language_model", lambda device: "left out")
    assert cli.main(["doctor", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert "FAILED: AssertionError: row_count: codes off by 1.0e-03 of the largest" in said.out
    assert said.err.startswith("saekit: self-test failed: selections: ") and said.err.count("\n") == 1


def test_a_device_that_is_not_there(capsys):
    assert cli.main(["doctor", "--device", "cuda:77"]) == 2
    assert "cuda:77 is not available here" in capsys.readouterr().err
