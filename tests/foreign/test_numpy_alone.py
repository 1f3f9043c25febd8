"""The lines of docs/formats.md read a store of every dtype where nothing but numpy and safetensors is installed."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import saekit as sk

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
SITE = "blocks.0.hook_resid_post"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stores(environment, tiny_model, tiny_text, tmp_path, dtype):
    python = environment("numpy_alone")
    code = next(
        c
        for c in re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        if "def read_rows" in c
    )
    store = sk.collect(
        str(tiny_model),
        site=SITE,
        text=str(tiny_text),
        out=tmp_path / "acts",
        context=32,
        tokens=3000,
        dtype=dtype,
        shard_mb=1,
    )
    script = tmp_path / "read.py"
    script.write_text(
        code
        + f"""
try:
    import torch
except ImportError:
    torch = None
assert torch is None
rows = np.concatenate([x for _, x, _ in read_rows("acts", "{SITE}")])
ids, documents, positions = row_tokens("acts")
np.savez("read.npz", rows=rows, ids=ids, documents=documents, positions=positions)
"""
    )
    subprocess.run([python, script], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "read.npz")
    assert np.array_equal(found["rows"], store.read(SITE, 0, store.rows).float().numpy())
    expected = store.tokens(0, store.rows)
    for name in ("ids", "documents", "positions"):
        assert np.array_equal(found[name], getattr(expected, name))
