"""A damaged store is restored bit for bit from the model, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf

from saekit import cli
from saekit.collector import collect
from saekit.errors import SaekitError
from saekit.recompute import recompute, repair
from saekit.store import format as layout
from saekit.store import open_store

SITES = ("blocks.0.hook_resid_post", "blocks.1.mlp.hook_post")


@pytest.fixture(scope="module")
def pristine(tiny_model, tiny_text, tmp_path_factory):
    """Three shards of two sites, made on one thread."""
    out = tmp_path_factory.mktemp("recompute") / "acts"
    options = {"context": 32, "batch_sequences": 16, "shard_mb": 1, "compute": "fp32", "tokens": 10_000, "threads": 1}
    collect(str(tiny_model), site=SITES, text=str(tiny_text), out=out, **options)
    return out


@pytest.fixture
def acts(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "acts")
    return tmp_path / "acts"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_come_back(acts, pristine, damage, capsys):
    names = [layout.shard_name(SITES[0], 1), layout.shard_name(SITES[1], 2)]
    for name in names:
        DAMAGES[damage](acts / name)
    assert cli.main(["check", str(acts)]) == 2
    assert f"saekit check {acts} --repair recomputes it" in capsys.readouterr().err
    assert cli.main(["check", str(acts), "--repair"]) == 0
    assert capsys.readouterr().out == f"{names[0]} is restored\n{names[1]} is restored\n{acts}: store is sound\n"
    assert content(acts) == content(pristine)


def test_statistics_come_back_without_the_model(acts, pristine, monkeypatch):
    monkeypatch.setattr("saekit.recompute.load_model", None)
    flip(acts / "statistics.safetensors")
    assert repair(acts) == ["statistics.safetensors"] and content(acts) == content(pristine)
    assert repair(acts) == []


def test_what_cannot_be_computed_again(acts):
    flip(acts / "tokens.safetensors")
    (acts / layout.shard_name(SITES[0], 0)).unlink()
    before = content(acts)
    with pytest.raises(
        SaekitError, match=r"tokens.safetensors is damaged \(sha256 differs\); restore it or collect again"
    ):
        repair(acts)
    assert content(acts) == before


def test_another_model_repairs_nothing(acts, tiny_model, tmp_path):
    tuned = tf.AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        tuned.model.norm.weight[0] += 1
    tuned.save_pretrained(tmp_path / "tuned")
    flip(acts / layout.shard_name(SITES[0], 0))
    before = content(acts)
    with pytest.raises(
        SaekitError,
        match=r"weights fingerprint of .*tuned is sha256:.*, .*acts was collected from sha256:.*; pass --model",
    ):
        repair(acts, str(tmp_path / "tuned"))
    assert content(acts) == before


def test_other_bytes_replace_nothing(acts):
    """The manifest's checksum decides, whatever the reason for the difference."""
    manifest = json.loads((acts / "manifest.json").read_text())
    name = layout.shard_name(SITES[0], 0)
    manifest["shards"][0]["files"][name]["sha256"] = "0" * 64
    manifest["fingerprint"] = layout.fingerprint(manifest)
    (acts / "manifest.json").write_text(json.dumps(manifest))
    before = content(acts)
    with pytest.raises(
        SaekitError,
        match=r"shard-00000.safetensors comes out with other bytes here .* repair it where the store was made",
    ):
        repair(acts)
    assert content(acts) == before


def test_recomputed_sequences(acts, monkeypatch, capsys):
    """All 313 sequences; then one value of one row is changed and every checksum made to fit."""
    assert recompute(acts, 313) == []
    assert cli.main(["check", str(acts), "--recompute", "20"]) == 0
    path = acts / layout.shard_name(SITES[0], 2)
    store = open_store(acts)
    first = int(store.shard_rows[2])
    rows = store.read(SITES[0], first, store.rows).clone()
    rows[3, 5] += rows[3].abs().max()
    limit = store.manifest["sites"][SITES[0]]["norm_limit"]
    del store
    from saekit.store.writer import write_shard

    write_shard(path, rows, limit)
    (problem,) = recompute(acts, 313)
    assert problem == f"{SITES[0]}: stored values are not those that the model gives here, in the same environment"
    # in another environment one value of many thousands is no sign of damage, a whole shard is
    manifest = json.loads((acts / "manifest.json").read_text())
    manifest["environments"][0]["torch"] = "2.0.0"
    (acts / "manifest.json").write_text(json.dumps(manifest))
    assert recompute(acts, 313) == []
    write_shard(path, rows * 1.02, limit)
    (problem,) = recompute(acts, 313)
    assert problem.startswith(f"{SITES[0]}: ") and problem.endswith(
        "differ from the model's by more than 2 units in the last place"
    )


def test_steps_between_numbers():
    """bfloat16 has 8 bits of precision: 1 and 1 + 2⁻⁷ are neighbours; from the smallest negative to the smallest positive are 2 steps."""
    import numpy as np

    from saekit.recompute import _steps_apart
    from saekit.store.writer import bits_of

    a = torch.tensor([1.0, 1.0, 0.0, -1.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0 + 2**-7, 1.0, -0.0, -1.0 - 2**-6], dtype=torch.bfloat16)
    assert _steps_apart(bits_of(a), bits_of(b)).tolist() == [1, 0, 0, 2]
    tiny = np.array([1, 0x8001], np.uint16)
    assert _steps_apart(tiny[:1], tiny[1:]).tolist() == [2]
    assert _steps_apart(
        np.array([1.0], np.float32), np.array([np.nextafter(np.float32(1), np.float32(2))])
    ).tolist() == [1]


def test_only_stores_are_repaired(tmp_path, capsys):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "run.json").write_text("{}")
    assert cli.main(["check", str(tmp_path / "sae"), "--repair"]) == 2
