"""The layout: bytes of the files, what other programs read in them, and what `check` finds."""

import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from saekit import SaekitError
from saekit.store import check, open_store
from saekit.store import format as layout
from saekit.store.format import TokenTable

DOCS = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")


@pytest.fixture
def acts(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "acts"))


# Bytes


def test_the_header_byte_by_byte(tmp_path):
    record = layout.write_tensors(
        tmp_path / "x.safetensors", {"a": np.array([1, 2, 3], np.uint16), "b": np.array([0.5]), "c": np.zeros((2, 0), np.int32)}
    )  # fmt: skip
    # 8-byte types first, then 4, then 2.
    header = (
        b'{"__metadata__":{"saekit":"1"},"b":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},'
        b'"c":{"dtype":"I32","shape":[2,0],"data_offsets":[8,8]},"a":{"dtype":"U16","shape":[3],"data_offsets":[8,14]}}'
    )
    header += b" " * (-(8 + len(header)) % 8)
    expected = struct.pack("<Q", len(header)) + header + struct.pack("<d3H", 0.5, 1, 2, 3)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data == expected
    assert record == {"bytes": len(data), "sha256": layout.sha256_file(tmp_path / "x.safetensors")}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("outliers", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_activations_stand_at_a_page_and_safetensors_reads_them(tmp_path, dtype, outliers):
    from saekit.store.writer import write_shard

    rows = torch.ones(5, 3)
    rows[:outliers] = 100
    path = tmp_path / "shard.safetensors"
    write_shard(path, rows.to(dtype), 50.0)
    entries = layout.read_header(path)
    assert entries["activations"].start % 4096 == 0
    # In the order of the data, without gaps.
    ends = [e.end for e in entries.values()]
    assert [e.start for e in entries.values()][1:] == ends[:-1] and ends[-1] == path.stat().st_size
    loaded = safetensors.torch.load_file(path)
    assert torch.equal(loaded["activations"], rows.to(dtype)) and loaded["outlier_rows"].tolist() == list(
        range(outliers)
    )
    assert loaded["norm_histogram"].sum() == 5
    with safetensors.safe_open(path, "np") as f:
        assert f.metadata() == {"saekit": "1"}


def test_mapped_tensors_cannot_be_written(acts):
    tensors = layout.map_tensors(acts / "a/shard-00000.safetensors")
    with pytest.raises(ValueError, match="read-only"):
        tensors["sum"][0] = 1


@pytest.mark.parametrize("damage", [b"", b"\0" * 7, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 4) + b"{}{}", struct.pack("<Q", 2) + b"[]"])  # fmt: skip
def test_a_damaged_header(tmp_path, damage):
    (tmp_path / "x.safetensors").write_bytes(damage)
    with pytest.raises(SaekitError, match="is not a whole safetensors file"):
        layout.read_header(tmp_path / "x.safetensors")


def test_canonical_json_and_fingerprint():
    assert (
        layout.canonical_json({"b": [1, 2.5, None], "a": {"é": True}}) == '{"a":{"é":true},"b":[1,2.5,null]}'.encode()
    )
    # printf '{"a":1}' | sha256sum
    assert layout.fingerprint({"fingerprint": "x", "a": 1}) == "sha256:015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"  # fmt: skip


def test_human_bytes():
    sizes = {0: "0 bytes", 999: "999 bytes", 6 * 2**20: "6 MiB", 3.8 * 2**30: "3.8 GiB", 2**45: "32 TiB"}
    assert {n: layout.human_bytes(n) for n in sizes} == sizes


def test_the_token_table_by_hand():
    # Two sequences: BOS A0 A1 A2 | BOS A3 EOS B0; runs at A0, A3 and B0.
    table = TokenTable(
        token=np.array([0, 10, 11, 12, 0, 13, 1, 20], np.uint16),
        stored=np.array([0, 1, 1, 1, 0, 1, 0, 1], bool),
        seq_start=np.array([0, 4, 8]),
        run_start=np.array([1, 5, 7]),
        run_doc=np.array([0, 0, 1]),
        run_position=np.array([0, 3, 0]),
    )
    position = np.array([1, 3, 5, 7])
    assert table.doc_of(position).tolist() == [0, 0, 0, 1]
    assert table.position_in_doc(position).tolist() == [0, 2, 3, 0]
    assert table.position_in_seq(np.arange(8)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert table.seq_of(np.arange(8)).tolist() == [0] * 4 + [1] * 4
    assert table.doc_of(np.array([0, 4, 6])).tolist() == [0, 0, 0]
    assert (table.n_tokens, table.n_sequences) == (8, 2)
    # The same ids as U32 saw the same tokens.
    import dataclasses
    import hashlib

    wide = dataclasses.replace(table, token=table.token.astype(np.uint32))
    expected = hashlib.sha256(struct.pack("<8i", 0, 10, 11, 12, 0, 13, 1, 20)).hexdigest()
    assert layout.tokens_sha256([wide]) == layout.tokens_sha256([table]) == expected
    # Cut and joined again it is the same table.
    second = table.sequences(1, 2)
    assert second.seq_start.tolist() == [0, 4] and second.run_start.tolist() == [1, 3]
    assert second.run_doc.tolist() == [0, 1] and second.run_position.tolist() == [3, 0]
    joined = layout.join_tables([table.sequences(0, 1), second])
    for name, tensor in joined.items():
        whole = np.concatenate(list(tensor.pieces()))
        assert whole.tolist() == getattr(table, name).tolist() and len(whole) == tensor.length
    assert layout.tokens_sha256([table.sequences(0, 1), second]) == expected


# Other programs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_documented_reader_reads_every_dtype(write_store, dtype):
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "def read_rows" in block)
    assert (
        "saekit." not in code
        and "torch" not in code
        and len([line for line in code.splitlines() if line.strip()]) <= 30
    )
    names: dict = {}
    exec(code, names)

    def values(rows, d, site):
        return np.sin(np.outer(rows + 1.0, np.arange(d) + 1)).astype(np.float32) * np.where(rows == 5, 50, 1)[:, None]

    folder = write_store(20, {"a": 5}, values=values, limits={"a": 20.0}, dtype=dtype, shard_mb=1e-6)
    store = open_store(folder)
    parts = list(names["read_rows"](folder, "a"))
    assert [first for first, _, _ in parts] == [0, 124, 248, 372, 496]
    x = np.concatenate([x for _, x, _ in parts])
    assert x.dtype == np.float32 and np.array_equal(x, store.read("a", 0, store.rows).float().numpy())
    assert [rows.tolist() for _, _, rows in parts] == [[5], [], [], [], []]
    ids, documents, positions = names["row_tokens"](folder)
    expected = store.tokens(0, store.rows)
    assert np.array_equal(ids, expected.ids) and np.array_equal(documents, expected.documents)
    assert np.array_equal(positions, expected.positions)


# Opening


def edit(folder: Path, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest))


def refusal(folder: Path) -> str:
    with pytest.raises(SaekitError) as error:
        open_store(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_opened(acts, tmp_path):
    assert refusal(tmp_path / "nothing") == f"no such store: {tmp_path / 'nothing'}"
    (tmp_path / "other").mkdir()
    assert refusal(tmp_path / "other").startswith(
        f"{tmp_path / 'other'} is not an activation store (no manifest.json); "
    )
    edit(acts, format_version=3)
    assert refusal(acts) == f"{acts} has store format 3, this saekit reads 1; upgrade saekit"
    edit(acts, format_version=0)
    assert refusal(acts) == f"{acts} has store format 0, this saekit reads 1; collect again"
    edit(acts, format_version=1, dtype="int8")
    assert "names the dtype int8" in refusal(acts)
    edit(acts, dtype="bfloat16", sites={"../../etc": {"d": 6}})
    assert "names the site '../../etc', which cannot be a folder name" in refusal(acts)
    edit(acts, shards=None)
    assert "has no valid 'shards'; restore it or collect again" in refusal(acts)
    edit(acts, format="other")
    assert "does not describe an activation store" in refusal(acts)
    (acts / "manifest.json").write_text('{\n "a": 1,\n "b" 2\n}')
    assert refusal(acts) == f"{acts / 'manifest.json'} is not valid JSON (line 3); restore it or collect again"
    (acts / "manifest.json").write_bytes(b'{\n "a": "\xff"}')
    assert "is not valid JSON (line 2)" in refusal(acts)


def test_unknown_keys_are_ignored(acts):
    edit(acts, colour="blue")
    assert open_store(acts).rows == 620


def test_files_that_are_not_whole(acts):
    path = acts / "a/shard-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:1048])
    name, advice = "a/shard-00002.safetensors", f"saekit check {acts} --repair recomputes it"
    assert refusal(acts) == f"{name} has 1,048 bytes, manifest says {len(data):,}; {advice}"
    assert check(acts, quick=True) == [refusal(acts)]
    path.unlink()
    assert refusal(acts) == f"{name} is missing; {advice}"
    path.write_bytes(data)
    (acts / "tokens.safetensors").unlink()
    assert refusal(acts) == "tokens.safetensors is missing; restore it or collect again"


# Check


def test_a_good_store_has_no_problem(acts):
    assert check(acts) == check(str(acts), quick=True) == []


@pytest.mark.parametrize("name", ["a/shard-00003.safetensors", "b/shard-00000.safetensors", "tokens.safetensors", "statistics.safetensors"])  # fmt: skip
def test_one_flipped_bit_is_found_and_named_once(acts, name):
    data = bytearray((acts / name).read_bytes())
    data[-1] ^= 1
    (acts / name).write_bytes(data)
    named = "shard 3 of a" if "00003" in name else "shard 0 of b" if "/" in name else name
    problems = check(acts)
    assert len(problems) == 1 and problems[0].startswith(f"{named} is damaged (sha256 differs); ")


def test_a_flipped_bit_in_the_manifest_is_found(acts):
    edit(acts, context_length=33)
    assert check(acts) == [
        f"{acts / 'manifest.json'} was changed (its fingerprint differs); restore it or collect again"
    ]
    (acts / "manifest.json").unlink()
    assert check(acts)[0].startswith(f"{acts} is not an activation store")


def rewritten(folder: Path, name: str, change) -> list[str]:
    """Problems after the tensors of a file were changed by a writer that keeps the manifest's checksums true."""
    path = folder / name
    tags = {key: e.tag for key, e in layout.read_header(path).items()}
    tensors = {key: np.array(value) for key, value in layout.map_tensors(path).items()}
    change(tensors)
    record = layout.write_tensors(path, {key: (value, tags.get(key, "F64")) for key, value in tensors.items()})
    manifest = json.loads((folder / "manifest.json").read_text())
    if name == "tokens.safetensors":
        manifest["token_table"] = record
    elif name == "statistics.safetensors":
        manifest["statistics"] = record
    else:
        next(s for s in manifest["shards"] if name in s["files"])["files"][name] = record
    manifest["fingerprint"] = layout.fingerprint(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return check(folder)


def put(name, index, value):
    return lambda tensors: tensors[name].__setitem__(index, value)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("a/shard-00001.safetensors", put("sum", 0, 9.0), "a/shard-00001.safetensors: sum does not belong to the activations"),
        ("a/shard-00000.safetensors", put("outlier_rows", 0, 3), "outlier_rows does not belong to the activations"),
        # 0x7FC0 is a bfloat16 NaN, 0x7F80 infinity.
        ("b/shard-00001.safetensors", put("activations", (2, 1), 0x7FC0), "NaN or infinity among the activations"),
        ("b/shard-00001.safetensors", put("activations", (2, 1), 0x7F80), "NaN or infinity among the activations"),
        ("b/shard-00001.safetensors", lambda t: t.update(activations=t["activations"][:-1]), "activations is BF16 [123, 3], expected BF16 [124, 3]"),
        ("b/shard-00001.safetensors", lambda t: t.pop("norm_histogram"), "holds activations, norm_moments, outlier_rows, sum, sum_squares, expected"),
        ("b/shard-00001.safetensors", lambda t: t.update(extra=np.zeros(1)), "holds activations, extra, "),
        ("tokens.safetensors", put("token", 5, 9), "tokens_sha256 of the manifest differs"),
        ("tokens.safetensors", put("stored", 0, True), "621 tokens are marked as stored, the manifest counts 620 rows"),
        ("tokens.safetensors", put("seq_start", 1, 0), "seq_start does not cut the tokens into sequences"),
        ("tokens.safetensors", put("run_start", 1, 0), "the runs are not in order"),
        ("statistics.safetensors", put("b.variance", 2, 1.0), "mean and variance of b are not those of its shards"),
    ],
)  # fmt: skip
def test_what_checksums_do_not_see(acts, name, change, problem):
    assert any(problem in line for line in rewritten(acts, name, change))


def test_a_moved_row_mark_is_seen_by_shard(acts):
    def move(tensors):
        # Sequences 0-3 are shard 0; position 128 is the BOS of sequence 4.
        tensors["stored"][1], tensors["stored"][128] = False, True

    problems = rewritten(acts, "tokens.safetensors", move)
    assert problems == ["tokens.safetensors: shard 0 has 128 tokens and 123 rows, the manifest says 128 and 124; restore it or collect again", "tokens.safetensors: shard 1 has 128 tokens and 125 rows, the manifest says 128 and 124; restore it or collect again"]  # fmt: skip


def test_a_wrong_number_in_the_manifest(acts):
    manifest = json.loads((acts / "manifest.json").read_text())
    manifest["sites"]["a"]["mean_norm"] *= 1.001
    manifest["fingerprint"] = layout.fingerprint(manifest)
    (acts / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = check(acts)
    assert (
        problem.startswith("statistics.safetensors: the manifest says mean_norm ") and " of a, its shards " in problem
    )
