"""Writing: the same bytes after any interruption, and refusals that leave the folder as it was."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SaekitError
from saekit.store import StoreWriter, check, open_store
from saekit.store import format as layout

WIDTHS = {"a": 4, "b": 3}


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def small(write_store):
    """`small(name, …)`: 20 sequences in five shards at two sites."""
    return lambda name="acts", **options: write_store(20, WIDTHS, name=name, shard_mb=1e-6, **options)


def test_the_folder(small):
    folder = small()
    assert sorted(content(folder)) == sorted(
        ["manifest.json", "statistics.safetensors", "tokens.safetensors"]
        + [f"{site}/shard-{i:05d}.safetensors" for site in WIDTHS for i in range(5)]
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest)[:4] == ["format", "format_version", "fingerprint", "model"]
    assert manifest["rows"] == 20 * 31 and manifest["tokens"] == 640 and manifest["sequences"] == 20
    assert [s["sequences"] for s in manifest["shards"]] == [[0, 4], [4, 8], [8, 12], [12, 16], [16, 20]]
    assert {s["rows"] for s in manifest["shards"]} == {124} and {s["tokens"] for s in manifest["shards"]} == {128}
    assert manifest["text"]["documents"] == 7 and manifest["text"]["packing"] == "join"
    assert manifest["environments"] == [{"shards": [0, 5], "torch": "2.13.0", "device": "cpu"}]
    assert manifest["documents"] is None and "settings" not in manifest
    assert list(manifest["sites"]["a"]) == ["d", "norm_limit", "norm_multiple", "outlier_rows", "mean_norm", "rms_norm", "median_norm", "max_norm", "mean_to_deviation"]  # fmt: skip


def test_shards_are_whole_batches_of_about_the_size_asked_for(tmp_path, plan_of, table_of, text_into):
    # A sequence takes 32 · 16 · 4 = 2,048 bytes at the widest site, a batch of four 8 KiB: 0.05 MiB are 6.4 batches.
    with StoreWriter(tmp_path / "acts", plan_of({"a": 16, "b": 4}, shard_mb=0.05)) as writer:
        assert writer.shard_sequences == 24 and not writer.text_done
        text_into(writer, table_of(50))
        assert writer.n_shards == 3 and writer.text_done
        assert [writer.rows(i) for i in range(3)] == [24 * 31, 24 * 31, 62]
        assert [writer.tokens(i) for i in range(3)] == [24 * 32, 24 * 32, 64]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and the test lets nothing clean up after it."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_any_rename_and_continued_gives_the_same_bytes(small, monkeypatch, tmp_path, moment):
    expected = content(small("whole"))
    replace, calls = os.replace, 0
    # One rename each for the plan, 5 · 2 parts and records, norm limits, 5 · (2 + 1) shard files and records, token table,
    # statistics, manifest.
    last = 1 + 10 + 1 + 15 + 3 - 1
    for kill_at in range(last + 1):
        calls = 0

        def interrupted(source, target, kill_at=kill_at):
            nonlocal calls
            if calls == kill_at:
                if moment == "after":
                    replace(source, target)
                # A process that is killed leaves its temporary file behind.
                else:
                    shutil.copy(source, f"{source}.kept.tmp")
                raise Killed
            calls += 1
            replace(source, target)

        name = f"{moment}-{kill_at}"
        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(Killed):
            small(name)
        monkeypatch.setattr(os, "replace", replace)
        assert (tmp_path / name / "manifest.json").is_file() == (kill_at == last and moment == "after")
        if (kill_at, moment) != (last, "after"):
            state = "is not an activation store" if (kill_at, moment) == (0, "before") else "is unfinished"
            with pytest.raises(SaekitError, match=state):
                open_store(tmp_path / name)
        assert content(small(name)) == expected, f"killed at rename {kill_at}"


def test_killed_while_state_is_removed(small, monkeypatch, tmp_path):
    """The manifest is there: the same command removes the rest and computes nothing."""
    expected, unlink = content(small("whole")), Path.unlink
    # 5 · 2 parts, 5 records, norm limits and lock; then the plan
    for removed in range(18):
        calls = 0

        def interrupted(path, removed=removed, **options):
            nonlocal calls
            if path.parent.name == "state":
                calls += 1
                if calls > removed:
                    raise Killed
            unlink(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted)
            with pytest.raises(Killed):
                small(f"killed{removed}")
        open_store(tmp_path / f"killed{removed}")
        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "put", None)
            small(f"killed{removed}")
        assert content(tmp_path / f"killed{removed}") == expected


def test_a_really_killed_process(tmp_path, plan_of, table_of):
    """SIGKILL in the middle of the third shard: two are committed, the lock is free, a restart sees the norm limits."""
    code = """
import os, signal, sys, json, torch
sys.path.insert(0, sys.argv[1])
from conftest import plan, put_text, table
from saekit.store import StoreWriter
writer = StoreWriter(sys.argv[2], plan({"a": 4}, shard_mb=1e-6))
put_text(writer, table(20))
writer.fix_norm_limits({"a": 7.5})
rename = os.replace
def kill(source, target):
    if "shard-00002" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = kill
for i in range(5):
    writer.put(i, {"a": torch.ones(writer.rows(i), 4)})
"""
    out = tmp_path / "acts"
    result = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(out)], check=False)
    assert result.returncode == -9
    with pytest.raises(SaekitError) as error:
        open_store(out)
    assert str(error.value).startswith(f"{out} is unfinished (2 of 5 shards); run its collect command again")
    assert list(out.rglob("*.tmp"))
    with StoreWriter(out, plan_of({"a": 4}, shard_mb=1e-6)) as writer:
        assert writer.continued and writer.committed == {0, 1} and writer.norm_limits == {"a": 7.5}
        assert writer.n_shards == 5 and writer.table(4).n_sequences == 4
        assert not list(out.rglob("*.tmp"))


def test_a_truncated_committed_shard_is_written_again(small, plan_of, monkeypatch, tmp_path):
    expected = content(small("whole"))
    finish = StoreWriter.finish
    monkeypatch.setattr(StoreWriter, "finish", lambda self: self.out)
    folder = small("acts")
    with open(folder / "b/shard-00003.safetensors", "r+b") as f:
        f.truncate(100)
    monkeypatch.setattr(StoreWriter, "finish", finish)
    assert content(small("acts")) == expected


# Refusals


def changed(plan: dict, path: str, value) -> dict:
    plan = json.loads(json.dumps(plan))
    *parents, last = path.split("/")
    node = plan
    for key in parents:
        node = node[key]
    node[last] = value
    return plan


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("dtype", "bfloat16", "{out} was begun with --dtype float32, now bfloat16; use the first settings or a new --out"),
        ("context_length", 64, "{out} was begun with --context 32, now 64; "),
        ("special_tokens/dropped_ids", [0, 5], "{out} was begun with --drop-ids 0, now 0 5; "),
        ("text/source", "x.txt", "{out} was begun with --text stdlib, now x.txt; "),
        ("sites", {"a": {"d": 4, "norm_multiple": 10.0}}, "{out} was begun with --site a b, now a; "),
        ("sites/a/norm_multiple", None, "{out} was begun with --norm-multiple 10.0, now nothing; "),
        ("settings/shard_mb", 1, "{out} was begun with --shard-mb 1e-06, now 1; "),
        ("model/weights_fingerprint", "sha256:88e0ffff", "weights fingerprint is sha256:88e0..., {out} was begun with sha256:51b2..."),
        ("tokenizer/fingerprint", "sha256:0000", "tokenizer fingerprint differs from the one {out} was begun with (sha256:9a4d...)"),
        ("environment/torch", "2.14.0", "{out} was begun with torch 2.13.0, this is 2.14.0: bytes may differ; pass --accept-environment to go on"),
    ],
)  # fmt: skip
def test_other_settings(tmp_path, plan_of, path, value, message):
    out, plan = tmp_path / "acts", plan_of(WIDTHS, shard_mb=1e-6)
    StoreWriter(out, plan).close()
    before = content(out)
    with pytest.raises(SaekitError) as error:
        StoreWriter(out, changed(plan, path, value))
    assert str(error.value).startswith(message.format(out=out)) and "\n" not in str(error.value)
    assert {**content(out), "state/lock": b""} == {**before, "state/lock": b""}


def test_another_environment_is_accepted_and_recorded(tmp_path, plan_of, table_of, text_into):
    """Shards 0 and 1 from one environment, 2 from another, 3 and 4 from the first again."""
    out, plan = tmp_path / "acts", plan_of({"a": 4}, shard_mb=1e-6)
    other = changed(plan, "environment/torch", "2.14.0")

    def put(plan, shards, **options):
        with StoreWriter(out, plan, **options) as writer:
            text_into(writer, table_of(20))
            if writer.norm_limits is None:
                writer.fix_norm_limits({"a": None})
            for i in shards:
                writer.put(i, {"a": torch.ones(writer.rows(i), 4)})
            if len(writer.committed) == 5:
                writer.finish()

    put(plan, [0, 1])
    with pytest.raises(SaekitError, match="pass --accept-environment to go on"):
        put(other, [2])
    put(other, [2], accept_environment=True)
    put(plan, [3, 4])
    assert open_store(out).manifest["environments"] == [
        {"shards": [0, 2], "torch": "2.13.0", "device": "cpu"},
        {"shards": [2, 3], "torch": "2.14.0", "device": "cpu"},
        {"shards": [3, 5], "torch": "2.13.0", "device": "cpu"},
    ]


def test_closed_with_what_there_is(tmp_path, plan_of, table_of, text_into, write_store):
    """Shards 0, 1 and 3 are whole: the store is that of the first eight sequences."""
    out, plan = tmp_path / "acts", plan_of(WIDTHS, shard_mb=1e-6)
    with StoreWriter(out, plan) as writer:
        text_into(writer, table_of(20))
        writer.fix_norm_limits(dict.fromkeys(WIDTHS))
        for i in (0, 1, 3):
            rows = np.arange(124 * i, 124 * (i + 1))
            values = {"a": np.ones((124, 4), np.float32), "b": np.ones((124, 3), np.float32)}
            for s, x in enumerate(values.values()):
                x[:, 0] = rows + s * 0.25
            writer.put(i, {site: torch.from_numpy(x) for site, x in values.items()})
        writer.finish()
    assert content(out) == content(write_store(8, WIDTHS, name="eight", shard_mb=1e-6))
    assert check(out) == []


def test_several_processes_of_one_store(tmp_path, plan_of, table_of, text_into, small):
    """The second puts its shards beside the first, which finds them and finishes."""
    out, plan = tmp_path / "acts", plan_of(WIDTHS, shard_mb=1e-6)

    def values(i):
        rows = np.arange(124 * i, 124 * (i + 1))
        tensors = {site: np.ones((124, d), np.float32) for site, d in WIDTHS.items()}
        for s, x in enumerate(tensors.values()):
            x[:, 0] = rows + s * 0.25
        return {site: torch.from_numpy(x) for site, x in tensors.items()}

    with StoreWriter(out, plan) as first:
        text_into(first, table_of(20))
        first.fix_norm_limits(dict.fromkeys(WIDTHS))
        second = StoreWriter(out, plan, owner=False)
        for i in (1, 3):
            second.put(i, values(i))
        for i in (0, 2, 4):
            first.put(i, values(i))
        assert first.committed == {0, 2, 4}
        first.refresh()
        first.finish()
    assert content(out) == content(small("alone"))


def test_a_beginning_undone(tmp_path, plan_of, table_of, text_into):
    writer = StoreWriter(tmp_path / "acts", plan_of(WIDTHS))
    text_into(writer, table_of(4))
    writer.abandon()
    assert not (tmp_path / "acts").exists()
    (tmp_path / "empty").mkdir()
    StoreWriter(tmp_path / "empty", plan_of(WIDTHS)).abandon()
    assert not list((tmp_path / "empty").iterdir())
    # what was there before stays
    StoreWriter(tmp_path / "acts", plan_of(WIDTHS)).close()
    StoreWriter(tmp_path / "acts", plan_of(WIDTHS)).abandon()
    assert (tmp_path / "acts" / "state" / "plan.json").is_file()


def test_sites_in_another_order_are_the_same_plan(tmp_path, plan_of):
    StoreWriter(tmp_path / "acts", plan_of({"a": 4, "b": 3})).close()
    with StoreWriter(tmp_path / "acts", plan_of({"b": 3, "a": 4})) as writer:
        assert writer.continued and writer.sites == ("a", "b")


def test_other_folders(small, tmp_path, plan_of):
    folder = small()
    before = content(folder)
    with pytest.raises(SaekitError, match=r"acts is a finished store \(620 rows\); choose another --out"):
        StoreWriter(folder, plan_of(WIDTHS))
    assert content(folder) == before
    foreign = tmp_path / "foreign"
    (foreign / "state").mkdir(parents=True)
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(SaekitError, match="foreign is not empty and not a store; choose another --out"):
        StoreWriter(foreign, plan_of(WIDTHS))
    assert content(foreign) == {"thesis.tex": b"x"}
    with pytest.raises(SaekitError, match=r"thesis\.tex is a file; choose another --out"):
        StoreWriter(foreign / "thesis.tex", plan_of(WIDTHS))
    (tmp_path / "empty").mkdir()
    StoreWriter(tmp_path / "empty", plan_of(WIDTHS)).close()


def test_a_second_writer(tmp_path, plan_of):
    with (
        StoreWriter(tmp_path / "acts", plan_of(WIDTHS)),
        pytest.raises(SaekitError, match=rf"acts is being written by process {os.getpid()} on \S+; wait"),
    ):
        StoreWriter(tmp_path / "acts", plan_of(WIDTHS))
    StoreWriter(tmp_path / "acts", plan_of(WIDTHS)).close()


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "é", ".hidden", "state"])
def test_site_names_that_are_no_folder_names(tmp_path, plan_of, name):
    with pytest.raises(SaekitError, match="cannot be a folder name"):
        StoreWriter(tmp_path / "acts", plan_of({name: 4}))
    assert not (tmp_path / "acts").exists()


def test_a_wrong_dtype(tmp_path, plan_of):
    with pytest.raises(SaekitError, match="dtype int8 is not supported; choose bfloat16, float16 or float32"):
        StoreWriter(tmp_path / "acts", plan_of(WIDTHS, dtype="int8"))


def test_no_permission(tmp_path, plan_of, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SaekitError, match=r"cannot write to .*acts: permission denied"):
        StoreWriter(tmp_path / "acts", plan_of(WIDTHS))


def test_a_full_disk(small, tmp_path, monkeypatch):
    expected = content(small("whole"))

    def full(descriptor, fsync=os.fsync):
        if "shard-00003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        # Two shards of 124 rows of (4 + 3) float32 are missing: 6,944 bytes.
        with pytest.raises(
            SaekitError, match=r"disk full at shard 3 of 5; free 6\.78 KiB and run the same command again"
        ):
            small("acts")
    assert not list((tmp_path / "acts").rglob("*.tmp"))
    assert content(small("acts")) == expected


# Numbers


def test_sums_by_hand(tmp_path):
    from saekit.store.writer import write_shard

    # Norms 5, 0, 50, 5; 50 is beyond 49. 2^2.25 = 4.757 ≤ 5: bin (2.25 + 16) · 8 = 146; 2^5.625 = 49.35 ≤ 50: bin 173.
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0], [-4.0, 3.0]], dtype=torch.bfloat16)
    write_shard(tmp_path / "x.safetensors", rows, 49.0)
    t = layout.map_tensors(tmp_path / "x.safetensors")
    assert t["sum"].tolist() == [-1, 7] and t["sum_squares"].tolist() == [25, 25]
    assert t["norm_moments"].tolist() == [3, 10, 50, 50]
    assert t["outlier_rows"].tolist() == [2] and t["outlier_rows"].dtype == np.int32
    assert {int(i): int(t["norm_histogram"][i]) for i in np.flatnonzero(t["norm_histogram"])} == {0: 1, 146: 2, 173: 1}
    # A norm of exactly the limit is no outlier; without a limit there is none.
    assert layout.shard_sums(rows.view(torch.uint16).numpy(), 50.0).outlier_rows.tolist() == []
    assert layout.shard_sums(rows.view(torch.uint16).numpy(), None).norm_moments.tolist() == [4, 60, 2550, 50]


def test_histogram_bins():
    # 2^-16 begins bin 0, 1 = 2^0 bin 128, 2^15.875 the last bin 255; what lies outside goes to the ends.
    norms = np.array([0.0, 2.0**-20, 2.0**-16, 1.0, 2.0, 2.0**15.875, 2.0**16, 1e30])
    assert {int(i): int(n) for i, n in enumerate(layout.norm_histogram(norms)) if n} == {0: 3, 128: 1, 136: 1, 255: 3}
    counts = np.zeros(256, np.int64)
    counts[[100, 128]] = 10, 10
    assert 2 ** (100 / 8 - 16) < layout.histogram_quantile(counts, 0.25) < 2 ** (101 / 8 - 16)
    assert 1 < layout.histogram_quantile(counts, 0.75) < 2 ** (1 / 8)


def test_rows_must_be_finite(tmp_path):
    from saekit.store.writer import write_shard

    with pytest.raises(AssertionError):
        write_shard(tmp_path / "x.safetensors", torch.tensor([[1.0, float("inf")]]), None)
    assert not list(tmp_path.iterdir())
