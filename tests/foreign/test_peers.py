"""The peers of the training step still run as PyPI has them, and each keeps the loss of the reference."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEP = Path(__file__).parents[2] / "kernels" / "benchmarks" / "step.py"
PEERS = [
    "sae-lens",
    "sae-lens-fused",
    "dictionary-learning",
    "dictionary-learning-fused",
    "sparsify",
    "sparsify-adam",
    "sparsify-fused",
    "dense",
    "bag",
]


@pytest.mark.parametrize("aux", [False, True], ids=["aux off", "aux on"])
def test_parity_at_a_tiny_shape(aux, tmp_path):
    if not os.environ.get("SAEKIT_FOREIGN"):
        pytest.skip("needs PyPI; `make test-foreign` runs it")
    names = ["sae-lens", "dictionary-learning", "sparsify", "dense"] if aux else list(PEERS)
    if not aux and shutil.which("g++"):
        names.append("dense-compiled")
    line = [sys.executable, STEP, "--quick", "--save", "--results", tmp_path / "results.csv", "--threads", "1"]
    line += [word for name in names for word in ("--provider", name)] + ["--aux"] * aux
    found = subprocess.run(line, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {r["provider"] for r in rows} == {"saekit", *names}
    assert all(float(r["parity"]) < 1e-5 and float(r["median_ms"]) > 0 for r in rows if r["dtype"] == "fp32")
    assert all(r["version"] for r in rows)
    table = [sys.executable, STEP, "table", "--results", tmp_path / "results.csv"]
    shown = subprocess.run(table, capture_output=True, text=True, check=True).stdout
    assert "(64, 32, 256, 8)" in shown and "SAELens" in shown
