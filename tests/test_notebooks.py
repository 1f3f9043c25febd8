"""Notebooks run from the first cell to the last, with fewer tokens so that it takes seconds."""

import json
from pathlib import Path

import pytest

from saekit.variants import VARIANTS

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def no_variant_stays():
    """A notebook may load variants of its own."""
    before = dict(VARIANTS)
    yield
    VARIANTS.clear()
    VARIANTS.update(before)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = source.replace("tokens=100_000", "tokens=20_000").replace("batch=2048", "batch=512")
            exec(compile(source, f"{path.name}", "exec"), names)
    assert "_repr_html_" in dir(names["index"].feature(0))
    assert "<" in names["index"].feature(0)._repr_html_()
    assert names["index"].manifest["variant"] == names["sae"].variant.name


def test_there_are_notebooks():
    assert NOTEBOOKS
