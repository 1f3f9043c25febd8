"""Reading: every row once, the same batches after a restart, as well shuffled as promised, and refusals."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SaekitError
from saekit.store import StoreWriter, open_store
from saekit.store.batches import available_memory, parse_bytes
from saekit.store.order import heldout_sequences
from saekit.store.rows import RowSource

# The rows of `numbered` take 93,000 · (64 + 16) bytes = 7.1 MiB, site `a` alone 5.7 MiB: 1 MiB forces blocks mode.
MODES = {"uniform": {}, "blocks": {"ram": "1MiB", "block": 256}, "sequences": {"ram": "1MiB", "block": "sequence"}}


@pytest.fixture(scope="module")
def store(numbered):
    return open_store(numbered)


def epoch_of(store, sites="a", **options):
    return np.concatenate([batch.rows for batch in store.batches(sites, **options)])


def test_the_fields(store, numbered):
    assert (store.rows, store.n_sequences, store.n_tokens, store.sites) == (93_000, 3000, 96_000, ("a", "b"))
    assert store.d("a") == 16 and store.dtype == torch.float32 and store.path == numbered
    assert store.fingerprint == store.manifest["fingerprint"]
    # Token 0 of each sequence has no row: row 31 is the first of sequence 1, at position 33.
    assert store.row_positions()[[0, 30, 31]].tolist() == [1, 31, 33]
    assert store.seq_rows()[[0, 1, 3000]].tolist() == [0, 31, 93_000]
    # 3,000 sequences are four full periods of 640, with the runs 608 … 639, 1248 …, 1888 …, 2528 ….
    assert store.heldout_sequences().tolist() == [s + i for s in (608, 1248, 1888, 2528) for i in range(32)]


def test_tokens_and_context(store):
    # Row 49 is the last of document 0 (50 text tokens), in sequence 1: 31 rows are in sequence 0, so its position is
    # 32 + 1 + 18 = 51. Row 50 begins document 1.
    found = store.tokens(48, 52)
    assert found.documents.tolist() == [0, 0, 1, 1] and found.positions.tolist() == [48, 49, 0, 1]
    assert found.ids.tolist() == [p % 251 + 2 for p in (50, 51, 52, 53)]
    assert store.table.position_in_seq(np.array([0, 31, 32, 51])).tolist() == [0, 31, 0, 19]
    assert store.tokens(0, 93_000).ids.tolist() == store.table.token[store.table.stored].tolist()
    assert store.tokens(5, 5).ids.size == 0 and store.tokens(93_000, 93_000).ids.size == 0
    # Row 31 is position 33: one token (BOS) before it in its sequence; row 61, position 63, is the sequence's last.
    around = store.context(31, before=5, after=2)
    assert around.ids.tolist() == [0, 33 % 251 + 2, 34 % 251 + 2, 35 % 251 + 2] and around.index == 1
    around = store.context(61, before=2, after=5)
    assert around.ids.tolist() == [61 % 251 + 2, 62 % 251 + 2, 63 % 251 + 2] and around.index == 2


def test_read_is_in_text_order_and_a_view_inside_a_shard(store):
    # 80 sequences of 31 rows make a shard of 2,480.
    for lo, hi in [(0, 10), (2470, 2490), (0, 93_000), (92_999, 93_000), (2480, 2480), (93_000, 93_000), (100, 5100)]:
        assert store.read("a", lo, hi)[:, 0].tolist() == list(range(lo, hi))
    first, again = store.read("a", 5, 10), store.read("a", 0, 10)
    assert first.data_ptr() == again.data_ptr() + 5 * 64
    # Private: what is written to a view reaches neither the file nor another reader.
    first[0, 0] = -1.0
    assert open_store(store.path).read("a", 5, 6)[0, 0] == 5
    first[0, 0] = 5.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_of_every_dtype(write_store, dtype):
    def values(rows, d, site):
        return np.sin(np.outer(rows + 1.0, np.arange(d) + site + 1)).astype(np.float32)

    # d = 3: rows of 6 (12) bytes, whose places are no multiple of anything convenient; d = 515: 1,030 (2,060) bytes, which
    # are read another way.
    widths = {"a": 3, "b": 515}
    folder = write_store(40, widths, values=values, dtype=dtype, shard_mb=0.1)
    store = open_store(folder)
    assert len(store.manifest["shards"]) > 3
    for s, (site, d) in enumerate(widths.items()):
        expected = torch.from_numpy(values(np.arange(store.rows), d, s)).to(store.dtype)
        assert torch.equal(store.read(site, 0, store.rows), expected)
        for rows in ([7, 0, store.rows - 1, 500, 7], [], np.random.default_rng(0).permutation(store.rows)):
            rows = np.array(rows, np.int64)
            assert torch.equal(store.files(site).gather(rows), expected[rows])
    for batch in store.batches(["a", "b"], batch=100, split="all"):
        assert batch["a"].dtype == store.dtype and list(batch) == ["a", "b"] and batch.wait >= 0
        for s, (site, d) in enumerate(widths.items()):
            assert torch.equal(batch[site], torch.from_numpy(values(batch.rows, d, s)).to(store.dtype))


def test_rows_that_begin_anywhere(write_store):
    # Another program's store: the header of one shard is 14 bytes longer, so its rows begin at no multiple of 4096, nor of
    # 12 bytes behind the other shards' rows.
    folder = write_store(12, {"a": 3}, shard_mb=1e-6)
    path, manifest = folder / "a/shard-00001.safetensors", folder / "manifest.json"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 14).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 14 + data[8 + length :])
    changed = json.loads(manifest.read_text())
    changed["shards"][1]["files"]["a/shard-00001.safetensors"]["bytes"] += 14
    manifest.write_text(json.dumps(changed))
    store = open_store(folder)
    rows = np.random.default_rng(0).permutation(store.rows)
    assert store.files("a").gather(rows)[:, 0].tolist() == rows.tolist()
    assert store.read("a", 0, store.rows)[:, 0].tolist() == list(range(store.rows))


def test_a_shard_without_rows(tmp_path, plan_of, table_of, text_into):
    whole = table_of(12)
    stored = whole.stored.copy()
    # Shards of four sequences; the first and the last keep nothing.
    stored[: 4 * 32] = stored[8 * 32 :] = False
    with StoreWriter(tmp_path / "acts", plan_of({"a": 4}, shard_mb=1e-6)) as writer:
        text_into(writer, replace(whole, stored=stored))
        assert [writer.rows(i) for i in range(3)] == [0, 124, 0]
        writer.fix_norm_limits({"a": 1.0})
        for i in range(3):
            writer.put(i, {"a": torch.full((writer.rows(i), 4), float(i))})
        writer.finish()
    store = open_store(tmp_path / "acts")
    assert store.read("a", 0, 124).sum() == 124 * 4 and store.read("a", 124, 124).shape == (0, 4)
    assert next(iter(store.batches("a", batch=5, split="all", outliers="keep")))["a"].tolist() == [[1.0] * 4] * 5
    assert store.outliers("a").tolist() == list(range(124))


@pytest.mark.parametrize("mode", MODES)
def test_each_valid_row_once_and_aligned_sites(store, mode):
    batches = store.batches(["a", "b"], batch=93, epochs=2, seed=5, **MODES[mode])
    assert batches.mode == ("uniform" if mode == "uniform" else "blocks")
    # 4 · 32 of 3,000 sequences are held out: 2,872 · 31 = 89,032 rows; 2 · 89,032 = 1,914 · 93 + 62.
    assert (batches.rows_per_epoch, batches.n_batches, len(batches), batches.unread) == (89_032, 1914, 1914, 62)
    seen = []
    for batch in batches:
        assert batch["a"].shape == (93, 16)
        assert batch["a"][:, 0].tolist() == batch.rows.tolist()
        assert batch["b"][:, 0].tolist() == (batch.rows + 0.25).tolist()
        seen.append(batch.rows)
    seen = np.concatenate(seen)
    train = np.flatnonzero(np.repeat(~heldout_sequences(3000), 31))
    assert np.array_equal(np.sort(seen[:89_032]), train)
    assert len(np.unique(seen[89_032:])) == 89_032 - 62
    assert np.array_equal(store.valid_rows("a"), train)
    if mode == "uniform":
        # Alone, a site comes in the same order. (In blocks mode the sites decide the length of a block.)
        assert np.array_equal(epoch_of(store, "b", batch=93, seed=5), seen[: 957 * 93])


def test_the_splits_share_no_row_and_cover_all(store):
    train, heldout, both = (np.sort(epoch_of(store, batch=1, split=s)) if s == "heldout" else store.valid_rows("a", split=s) for s in ("train", "heldout", "all"))  # fmt: skip
    assert len(heldout) == 128 * 31
    assert np.array_equal(np.sort(np.concatenate([train, heldout])), both)
    assert np.array_equal(both, np.arange(93_000))


@pytest.mark.parametrize("mode", MODES)
def test_the_shuffle_is_as_good_as_promised(store, mode):
    """store.md 6.4: one epoch, 1,455 batches of 64; blocks mode has windows of 4 · 64 blocks or more."""
    B, L = 64, 31
    batches = store.batches("a", batch=B, split="all", **MODES[mode])
    order = np.concatenate([batch.rows for batch in batches])
    E = len(order)
    b = E if mode == "uniform" else batches.order.n_blocks
    if mode != "uniform":
        assert batches.order.n_windows >= 5 and batches.window_blocks >= 4 * B
    assert abs(np.corrcoef(np.arange(E), order)[0, 1]) <= 4 / np.sqrt(b)

    shard = np.searchsorted(store.shard_rows, order, side="right") - 1
    means = shard.reshape(-1, B).mean(1)
    # Simple random batches: variance / B, with the correction for drawing without replacement.
    ratio = means.var() / (shard.var() / B * (E - B) / (E - 1))
    assert 0.85 <= ratio <= 1.15 if mode == "uniform" else ratio <= 1.5

    sequence = np.sort((order // L).reshape(-1, B), 1)
    same = (sequence[:, 1:] == sequence[:, :-1]).sum(1)
    # Pairs of one sequence: a run of k equal numbers has k(k-1)/2 of them; runs are counted by their repeats of each distance.
    pairs = sum((sequence[:, k:] == sequence[:, :-k]).sum(1) for k in range(1, B))
    others = 2 * pairs / B
    if mode == "uniform":
        expected = (B - 1) * (L - 1) / (E - 1)
        assert abs(others.mean() - expected) <= 4 * others.std() / np.sqrt(len(others))
    else:
        assert others.mean() <= 1
    assert same.max() < B - 1

    assert np.array_equal(order, epoch_of(store, batch=B, split="all", **MODES[mode]))
    assert not np.array_equal(order, epoch_of(store, batch=B, split="all", seed=1, **MODES[mode]))
    two = epoch_of(store, batch=B, split="all", epochs=2, **MODES[mode])
    assert np.array_equal(order, two[:E]) and not np.array_equal(order, two[E : 2 * E])


@pytest.mark.filterwarnings("ignore:a window of")
@pytest.mark.parametrize("mode", MODES)
def test_a_restored_state_continues_to_the_bit(store, mode):
    options = {"batch": 2000, "seed": 9, "epochs": 3, **MODES[mode]}
    whole = list(store.batches("a", **options))
    # 3 · 89,032 rows: 133 batches; the epochs end inside batches 44 and 89.
    for stop in (0, 1, 44, 45, 89, 132, 133):
        batches = store.batches("a", **options)
        stream = iter(batches)
        for _ in range(stop):
            next(stream)
        state = json.loads(json.dumps(batches.state()))
        assert state["batches_done"] == stop and len(json.dumps(state)) < 1024
        stream.close()
        # The reader itself goes on as well, after its first consumer has left.
        for reader in (store.batches("a", state=state, **options), batches):
            following = list(islice(reader, 3))
            assert len(following) == min(3, 133 - stop)
            for batch, expected in zip(following, whole[stop:]):
                assert np.array_equal(batch.rows, expected.rows) and torch.equal(batch["a"], expected["a"])
    state = {**state, "batches_done": 100}
    assert len(list(store.batches("a", state=state, **options))) == 33


def test_ranks_share_the_global_batches(store):
    whole = list(store.batches("a", batch=6000, seed=2))
    for rank in range(3):
        for part, batch in zip(store.batches("a", batch=6000, seed=2, rank=rank, ranks=3), whole):
            assert np.array_equal(part.rows, batch.rows[rank::3]) and torch.equal(part["a"], batch["a"][rank::3])


def test_outliers_are_skipped_for_all_sites_together(write_store):
    def values(rows, d, site):
        # Norms are 1, but for rows 10 and 700 at site a, and 11 at site b.
        x = np.zeros((len(rows), d), np.float32)
        x[:, 0] = np.where(np.isin(rows, [11] if site else [10, 700]), 100, 1)
        return x

    store = open_store(write_store(30, {"a": 4, "b": 4}, values=values, limits={"a": 10.0, "b": 10.0}, shard_mb=0.004))
    assert len(store.manifest["shards"]) > 2
    assert store.outliers("a").tolist() == [10, 700] and store.outliers(["a", "b"]).tolist() == [10, 11, 700]
    everything = set(range(30 * 31))
    for sites, out in (("a", {10, 700}), (["b"], {11}), (["a", "b"], {10, 11, 700})):
        assert set(epoch_of(store, sites, batch=1, split="all").tolist()) == everything - out
        assert set(store.valid_rows(sites, "all").tolist()) == everything - out
    assert set(epoch_of(store, batch=1, split="all", outliers="keep").tolist()) == everything


def test_statistics(write_store):
    def values(rows, d, site):
        # Rows alternate between (3, 4) and (-3, 4); every 31st is (300, 400) and left out.
        x = np.tile(np.array([3.0, 4.0], np.float32), (len(rows), 1))
        x[rows % 2 == 1, 0] = -3
        x[rows % 31 == 0] = 300, 400
        return x

    store = open_store(write_store(62, {"a": 2}, values=values, limits={"a": 50.0}, dtype="bfloat16"))
    found = store.statistics("a")
    # Of 62 · 31 = 1,922 rows 62 are out, 31 even and 31 odd ones: 930 rows of either sign remain.
    assert found.mean_D.tolist() == [0.0, 4.0] and found.variance_D.tolist() == [9.0, 0.0]
    assert found.mean_norm == found.rms_norm == 5.0 and found.total_variance == 9.0
    # The first two rows: row 0 is out. The first 62: 0 and 31 are out, 30 of either sign remain.
    assert store.statistics("a", rows=2).mean_D.tolist() == [-3.0, 4.0]
    for rows in (62, 10**9):
        again = store.statistics("a", rows)
        assert again.mean_D.tolist() == [0.0, 4.0] and again.variance_D.tolist() == [9.0, 0.0]
        assert again.mean_norm == again.rms_norm == 5.0 and again.total_variance == 9.0
    for rows in (0, 1):
        with pytest.raises(SaekitError, match=f"of {rows} rows all are outliers; take more rows"):
            store.statistics("a", rows)
    entry = store.manifest["sites"]["a"]
    assert entry["outlier_rows"] == 62 and entry["max_norm"] == 500.0
    assert entry["mean_to_deviation"] == pytest.approx(4 / 3)
    # 5 lies in the bin from 2^2.25 = 4.76 to 2^2.375 = 5.19, and so does the estimate of the median.
    assert 4.75 < entry["median_norm"] < 5.19


def test_statistics_of_many_chunks(store):
    # Rows 0 to n - 1 hold their number: mean (n - 1) / 2, variance (n² - 1) / 12. 40,000 rows lie in 17 shards.
    found = store.statistics("a", rows=40_000)
    assert found.mean_D[0] == 19_999.5 and found.mean_D[1] == 1.0
    assert found.variance_D[0] == pytest.approx((40_000**2 - 1) / 12, rel=1e-12) and found.variance_D[1] == 0.0


class Streamed(RowSource):
    """A source that holds the rows of one window, and is strict about what it is asked for."""

    def __init__(self, store):
        self.store, self.path, self.fingerprint = store, "stream", store.fingerprint
        self.sites, self.rows, self.dtype = store.sites, store.rows, store.dtype
        self.n_sequences, self.n_tokens = store.n_sequences, store.n_tokens
        self.seen, self.gathering, self.lock, self.closed = [], 0, threading.Lock(), False

    def d(self, site):
        return self.store.d(site)

    def read_table(self):
        return self.store.read_table()

    def outliers(self, sites):
        return self.store.outliers(sites)

    def statistics(self, site, rows=None):
        return self.store.statistics(site, rows)

    def windows(self, sites):
        return self

    def prepare(self, window, following):
        assert self.gathering == 0
        if self.seen:
            assert self.following == (window.epoch, window.number)
        self.following = None if following is None else (following.epoch, following.number)
        self.seen.append((window.epoch, window.number))
        assert (window.first[1:] > window.last[:-1]).all()
        self.held = np.concatenate([np.arange(a, b + 1) for a, b in zip(window.first, window.last)])

    def gather(self, site, rows):
        with self.lock:
            self.gathering += 1
        place = np.searchsorted(self.held, rows)
        assert np.array_equal(self.held[place], rows)
        x_nD = self.store.files(site).gather(rows)
        with self.lock:
            self.gathering -= 1
        return x_nD

    def close(self):
        self.closed = True


@pytest.mark.filterwarnings("ignore:a window of")
@pytest.mark.parametrize("batch", [100, 7000, 44_000])
def test_a_source_of_one_window_at_a_time_gives_the_same_batches(store, batch):
    # Windows hold at most 1 MiB / 80 bytes a row = 13,107 rows: batches cross one border or several, and an epoch's.
    options = {"batch": batch, "seed": 4, "epochs": 2, "ram": "1MiB" if batch < 10_000 else "4MiB", "block": "sequence"}
    whole, source = list(store.batches(["a", "b"], **options)), Streamed(store)
    batches = source.batches(["a", "b"], **options)
    for batch_read, expected in zip(batches, whole, strict=True):
        assert np.array_equal(batch_read.rows, expected.rows)
        assert all(torch.equal(batch_read[site], expected[site]) for site in ("a", "b"))
    assert source.seen == [(e, w) for e in range(2) for w in range(batches.order.n_windows)] and source.closed
    assert batches.order.n_windows > 1
    state = {**batches.state(), "batches_done": len(whole) // 2}
    for rank in range(3):
        part = next(iter(Streamed(store).batches(["a", "b"], **options, state=state, rank=rank, ranks=3)))
        expected = whole[len(whole) // 2]
        assert np.array_equal(part.rows, expected.rows[rank::3]) and torch.equal(part["b"], expected["b"][rank::3])


def test_what_is_asked_for_ahead(store, monkeypatch):
    asked = []

    class Kernel:
        def madvise(self, start, length, advice):
            asked.append((start, start + length, advice))

    files = store.files("a")
    monkeypatch.setattr("saekit.store.reader._libc", Kernel())
    # Blocks as a window gives them, ascending and apart: the second crosses three borders of shards of 2,480 rows.
    files.will_need(np.array([5, 2470, 9000, 92_999]), np.array([9, 7500, 9001, 92_999]))
    assert all(start % 4096 == 0 and advice == 3 for start, _, advice in asked)

    address = np.concatenate([x_nD.data_ptr() + 64 * np.arange(len(x_nD)) for x_nD in files.shards])
    covered = np.any([(start <= address) & (address + 64 <= end) for start, end, _ in asked], axis=0)
    wanted = np.zeros(93_000, bool)
    wanted[5:10] = wanted[2470:7501] = wanted[9000:9002] = wanted[92_999] = True
    assert covered[wanted].all()
    # Beginnings are rounded down to a page of 64 rows.
    assert covered.sum() <= wanted.sum() + 64 * len(asked) and len(asked) <= 7
    # Of many stretches none is asked for if a sample is in memory, as these are: the file was just written.
    apart = np.arange(0, 90_000, 200)
    for there in (False, True):
        asked.clear()
        if not there:
            monkeypatch.delattr(os, "RWF_NOWAIT")
        files.will_need(apart, apart + 1)
        assert len(asked) == (0 if there else len(apart))
        monkeypatch.undo()
        monkeypatch.setattr("saekit.store.reader._libc", Kernel())


def test_a_small_window_warns_and_says_how_much(store):
    # 1 MiB holds 4,096 blocks of 4 rows; a batch of 4,096 asks for windows of 16,384.
    with pytest.warns(UserWarning, match=r"a window of 3,710 blocks is less than 16,384 .* about 2\.10 times"):
        batches = store.batches("a", batch=4096, ram="1MiB", block=256)
    assert batches.window_blocks == 3710 and "2.10 times" in batches.summary()
    assert "\n" not in batches.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "c"}, "numbered holds a and b, not c"),
        ({"ram": "4KiB"}, "--ram 4KiB cannot hold one batch of 100 x 16 float32 (6.25 KiB)"),
        (
            {"sites": ["a", "b"], "batch": 10**5, "ram": "1MiB"},
            "--ram 1MiB cannot hold one batch of 100000 x 16 + 4 float32 (7.63 MiB)",
        ),
        (
            {"batch": 10**5, "ram": "1GiB"},
            "run needs 100,000 rows, the training part of {path} has 89,032; pass --epochs 2 or collect more",
        ),
        ({"split": "test"}, "split 'test' is unknown; choose train, heldout or all"),
        ({"outliers": "drop"}, "outliers 'drop' is unknown"),
        ({"ram": "much"}, "'much' is not a size; write for example 512MiB or 4GiB"),
    ],
)
def test_refusals(store, options, message):
    with pytest.raises(SaekitError) as error:
        store.batches(**{"sites": "a", "batch": 100, **options})
    assert message.format(path=store.path) in str(error.value) and "\n" not in str(error.value)


def test_more_rows_than_there_are(store):
    store.batches("a", batch=100, epochs=3).require(267_096)
    with pytest.raises(
        SaekitError, match=r"run needs 267,097 rows, the training part .* has 89,032; pass --epochs 4 or"
    ):
        store.batches("a", batch=100, epochs=3).require(267_097)


@pytest.mark.filterwarnings("ignore:a window of")
def test_memory_that_is_not_there(store, monkeypatch):
    assert available_memory() is None or available_memory() > 2**20
    monkeypatch.setattr("saekit.store.batches.available_memory", lambda: 3 * 2**20)
    with pytest.raises(SaekitError, match=r"these sites take 5\.68 MiB, 3 MiB are free; a smaller --ram works"):
        store.batches("a", batch=100)
    store.batches("a", batch=100, ram="1MiB")


@pytest.mark.filterwarnings("ignore:a window of")
def test_a_state_that_does_not_fit(store, write_store):
    state = store.batches("a", batch=100).state()
    for name, value in {"batch": 200, "seed": 1, "split": "all"}.items():
        with pytest.raises(SaekitError, match=f"checkpoint reads with {name} .*, now {value}; use the first settings"):
            store.batches("a", **{"batch": 100, name: value}, state=state)
    with pytest.raises(SaekitError, match="checkpoint reads with mode uniform, now blocks"):
        store.batches("a", batch=100, ram="1MiB", state=state)
    with pytest.raises(SaekitError, match="checkpoint has read 891 batches, --epochs 1 are 890"):
        store.batches("a", batch=100, state={**state, "batches_done": 891})
    other = open_store(write_store(100, {"a": 16}))
    with pytest.raises(SaekitError) as error:
        other.batches("a", batch=100, state=state)
    first, now = store.fingerprint[:11], other.fingerprint[:11]
    assert f"checkpoint reads store {first}..., {other.path} is {now}..." in str(error.value)


def test_a_stopped_consumer_leaves_no_thread(store):
    stream = iter(store.batches("a", batch=100))
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread.name.startswith("saekit"):
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_a_thousand_shards_open_in_a_second(numbered, tmp_path):
    # 1,000 names for the file of shard 1; the token table is that of fewer rows, and is not looked at.
    manifest = json.loads((numbered / "manifest.json").read_text())
    (tmp_path / "a").mkdir()
    for name in ("tokens.safetensors", "statistics.safetensors"):
        os.link(numbered / name, tmp_path / name)
    shard, shards = manifest["shards"][1], []
    for i in range(1000):
        name = f"a/shard-{i:05d}.safetensors"
        os.link(numbered / "a/shard-00001.safetensors", tmp_path / name)
        shards.append({**shard, "files": {name: shard["files"]["a/shard-00001.safetensors"]}})
    manifest |= {"shards": shards, "rows": 1000 * shard["rows"], "sites": {"a": manifest["sites"]["a"]}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    start = time.perf_counter()
    store = open_store(tmp_path)
    rows = np.array([0, store.rows - 1])
    # Shard 1 holds rows 2,480 to 4,959.
    assert store.files("a").gather(rows)[:, 0].tolist() == [2480, 4959]
    assert time.perf_counter() - start < 1


def test_a_view_outlives_the_store_and_the_mapping_goes_with_it(numbered):
    def mapped():
        return Path("/proc/self/maps").read_text().count(str(numbered / "a"))

    before, store = mapped(), open_store(numbered)
    view = store.read("a", 10, 12)
    assert mapped() == before + 38
    del store
    gc.collect()
    assert view[:, 0].tolist() == [10, 11]
    del view
    gc.collect()
    assert mapped() == before


def test_no_file_stays_open(numbered):

    before = len(os.listdir("/proc/self/fd"))
    store = open_store(numbered)
    store.read("a", 0, 93_000)
    store.read("b", 0, 93_000)
    # 76 shards are mapped; only the token table may be open.
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_sizes():
    expected = {
        "4GiB": 2**32,
        "512 MiB": 2**29,
        "1.5GB": 1_500_000_000,
        "4096": 4096,
        "2k": 2000,
        "1TiB": 2**40,
        "7 bytes": None,
    }
    for text, value in expected.items():
        if value is None:
            with pytest.raises(SaekitError):
                parse_bytes(text)
        else:
            assert parse_bytes(text) == value


def test_the_format_needs_no_torch():
    code = "import saekit.store.format, saekit.store.order, sys; assert not {'torch', 'streamlit'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_comes_back_when_nothing_uses_it():
    """As long as any view of a tensor lives its memory is its own; then the next batch of that size has it."""
    from saekit.store.reader import Buffers

    buffers = Buffers()
    first = buffers.take(1024)
    address = first.ctypes.data
    view = torch.from_numpy(first).view(torch.float32).view(16, 16)[3:5]
    del first
    second = torch.from_numpy(buffers.take(1024))
    assert second.data_ptr() != address
    view.fill_(7.0)
    second.zero_()
    assert (view == 7.0).all()
    del view
    third = torch.from_numpy(buffers.take(1024))
    assert third.data_ptr() == address
    # pieces of other sizes neither take nor leave a whole batch's memory
    assert len(buffers.take(64)) == 64


def test_batches_that_are_kept_keep_their_values(store):
    kept = [(batch["a"], batch.rows.copy()) for batch in store.batches(["a"], batch=500)]
    assert len(kept) > 100
    for x, rows in kept:
        assert np.array_equal(x[:, 0].numpy(), rows.astype(np.float32))
