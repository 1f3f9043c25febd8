"""The order of rows: a bijection, the same everywhere, and as good a shuffle as a random one."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.store.order import PIECE, Intervals, Order, Permutation, RowSet, heldout_sequences, key, splitmix

DOCS = (Path(__file__).resolve().parents[2] / "docs/formats.md").read_text(encoding="utf-8")


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 99))
def test_a_permutation_takes_each_place_once(n, seed, epoch):
    assert np.array_equal(np.sort(Permutation(n, seed, epoch, 0)(np.arange(n))), np.arange(n))


def test_two_neighbours_land_anywhere():
    # Over 5,000 keys the images of 20 and 21, each in one of six tenfolds of 60: 36 cells. The chi-square statistic has mean
    # 35 and standard deviation √70 = 8.4. A cell of equal tenfolds is expected 10·9 times in 60·59, another 10·10 times.
    images = np.array([Permutation(60, seed, 1, 0)(np.array([20, 21])) for seed in range(5000)])
    counts = np.zeros((6, 6))
    np.add.at(counts, (images[:, 0] // 10, images[:, 1] // 10), 1)
    expected = 5000 * np.where(np.eye(6), 90, 100) / (60 * 59)
    assert ((counts - expected) ** 2 / expected).sum() < 35 + 4 * 8.4


def test_the_documented_definition_and_its_vectors():
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "def permutation" in block)
    written: dict = {}
    exec(code, written)
    for words, value in [
        ((0, 0, 0), 0x238275BC38FCBE91),
        ((1, 2, 3), 0xD0734750FDE362B3),
        ((-1, 0, 0), 0xFC042709560421DA),
    ]:
        assert f"`key({', '.join(map(str, words))})` | `{value:#x}`" in DOCS
        assert key(*words) == written["key"](*words) == value
    # The published first output of splitmix64 with seed 0.
    assert splitmix(0) == 0xE220A8397B1DCDAF
    vectors = re.findall(r"^\| (\d+) \| (\d+ \d+ \d+) \| ([\d ]+) \|$", DOCS, re.MULTILINE)
    assert len(vectors) == 7
    for n, words, images in vectors:
        n, words, images = int(n), tuple(map(int, words.split())), list(map(int, images.split()))
        assert Permutation(n, *words)(np.arange(len(images))).tolist() == images
        assert [written["permutation"](n, words, x) for x in range(len(images))] == images


def test_the_documented_example_of_both_modes():
    valid = RowSet(np.array([0, 12]), np.array([9, 20]))
    example = {name: list(map(int, rows.split())) for name, rows in re.findall(r"^\| (uniform|blocks)[^|]*\| ([\d ]+) \|$", DOCS, re.MULTILINE)}  # fmt: skip
    assert Order(valid, seed=0).rows(0, 17).tolist() == example["uniform"]
    assert Order(valid, seed=0, block_rows=3, window_blocks=3).rows(0, 17).tolist() == example["blocks"]
    # By hand: 17 valid rows are 6 blocks, the last of 2; their places are 3 2 5 | 0 4 1, two windows of 8 and 9 rows. So the
    # first window holds valid indices 9-11, 6-8, 15-16, that is rows 12-14, 6-8, 18-19, and the second the others.
    assert sorted(example["blocks"][:8]) == [6, 7, 8, 12, 13, 14, 18, 19]


def test_the_order_is_the_documented_one_beyond_a_piece():
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "def permutation" in block)
    written: dict = {}
    exec(code, written)
    n = 3 * PIECE
    order = Order(RowSet(np.array([7]), np.array([7 + n])), seed=5)
    rows = order.rows(0, 2 * n)
    assert len(rows) == 2 * n
    for p in (0, PIECE - 1, PIECE, 2 * PIECE + 1, n - 1, n, n + PIECE):
        # Position p is position p mod n of epoch p // n; rows begin at 7.
        assert rows[p] == 7 + written["permutation"](n, (5, p // n, 0), p % n)
        assert order.rows(p, p + 1).tolist() == [rows[p]]


def test_intervals_by_hand():
    # Interval 0 holds 3 and 4, 1 nothing, 2 holds 5, 3 holds 6 to 99, 4 nothing.
    found = Intervals(np.array([3, 5, 5, 6, 100, 100]))(np.array([3, 4, 5, 6, 7, 50, 99]))
    assert found.tolist() == [0, 0, 2, 3, 3, 3, 3]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 30, 1000, 10**6]), min_size=1, max_size=60), start=st.integers(0, 10**12)
)
def test_intervals_are_those_of_a_search(lengths, start):
    borders = start + np.concatenate([[0], np.cumsum(lengths)])
    if borders[-1] > borders[0]:
        x = np.random.default_rng(0).integers(borders[0], borders[-1], 300)
        x[0], x[1] = borders[0], borders[-1] - 1
        assert np.array_equal(Intervals(borders)(x), np.searchsorted(borders, x, side="right") - 1)


def test_heldout_sequences_by_hand():
    assert np.flatnonzero(heldout_sequences(1)).tolist() == []
    assert np.flatnonzero(heldout_sequences(2)).tolist() == [1]
    assert np.flatnonzero(heldout_sequences(39)).tolist() == [38]
    # 639 // 20 = 31 sequences at the end; from 640 on the run 608 … 639, and again 640 later.
    assert np.flatnonzero(heldout_sequences(639)).tolist() == list(range(608, 639))
    assert np.flatnonzero(heldout_sequences(640)).tolist() == list(range(608, 640))
    assert np.flatnonzero(heldout_sequences(1300)).tolist() == [*range(608, 640), *range(1248, 1280)]


def test_a_row_set_by_hand():
    # Sequences hold rows 0-2, 3, none, 4-8; the first, third and fourth are chosen; rows 0, 2, 3 and 6 are taken out.
    rows = RowSet.of(np.array([0, 3, 4, 4, 9]), np.array([True, False, True, True]), np.array([0, 2, 3, 6]))
    assert rows.all().tolist() == [1, 4, 5, 7, 8] and len(rows) == 5
    assert rows.at(np.array([4, 0])).tolist() == [8, 1]
    assert rows.below(np.array([0, 1, 2, 4, 6, 7, 9])).tolist() == [0, 0, 1, 1, 3, 3, 5]
    assert rows.holds(np.array([0, 1, 3, 6, 8, 9])).tolist() == [False, True, False, False, True, False]
    empty = RowSet.of(np.array([0, 3]), np.array([False]), np.array([1]))
    assert len(empty) == 0 and empty.all().tolist() == []


def block_starts(valid: RowSet) -> np.ndarray:
    return np.unique(valid.below(np.arange(0, 60 * 31 + 1, 31)))


VALID = RowSet.of(np.arange(0, 60 * 31 + 1, 31), np.arange(60) % 7 != 3, np.array([0, 5, 6, 700, 1859]))
SHAPES = {
    "uniform": {},
    "one window": {"block_rows": 7, "window_blocks": 10_000},
    "windows": {"block_rows": 7, "window_blocks": 40},
    "one block a window": {"block_rows": 100, "window_blocks": 1},
    "sequences": {"block_starts": block_starts(VALID), "window_blocks": 9},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_once_per_epoch_and_any_stretch_on_its_own(shape):
    order = Order(VALID, seed=3, **SHAPES[shape])
    n = len(VALID)
    whole = order.rows(0, 3 * n)
    for epoch in range(3):
        assert np.array_equal(np.sort(whole[epoch * n : (epoch + 1) * n]), VALID.all())
    assert not np.array_equal(whole[:n], whole[n : 2 * n])
    assert not np.array_equal(whole[:n], Order(VALID, seed=4, **SHAPES[shape]).rows(0, n))
    fresh = Order(VALID, seed=3, **SHAPES[shape])
    for lo in (0, 1, n - 3, n, 2 * n - 70):
        assert np.array_equal(fresh.rows(lo, lo + 141), whole[lo : lo + 141])


def test_uniform_mode_is_one_window():
    order = Order(RowSet(np.array([2, 8]), np.array([5, 10])), seed=0)
    assert [v.tolist() for v in order.window_extent(3, 0)] == [[2], [9]]
    assert (order.n_windows, order.window_of(3, 4), order.window_end(3, 0)) == (1, 0, 5)


def test_windows_hold_whole_blocks():
    order = Order(VALID, seed=3, **SHAPES["windows"])
    begins = order._window_rows(0)
    for w in range(order.n_windows):
        rows = order.rows(begins[w], begins[w + 1])
        blocks, counts = np.unique(VALID.below(rows) // 7, return_counts=True)
        assert (counts[blocks < order.n_blocks - 1] == 7).all()
        first, last = order.window_extent(0, w)
        assert np.array_equal(np.sort(np.concatenate([np.arange(a, b + 1) for a, b in zip(VALID.below(first), VALID.below(last))])), np.sort(VALID.below(rows)))  # fmt: skip
