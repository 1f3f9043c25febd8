"""Selection among candidates and in dense rows, interpreted: k best, ties to the smallest feature, codes in feature order."""

import pytest
import torch
from saekit_kernels import RowCount, RowMass, reference

pytest.importorskip("triton")
from saekit_kernels.triton import select

NAN, INF = float("nan"), float("inf")


def lists(rows, places=64):
    """Candidate lists of [(feature, value), …] rows, in the order given; behind them stands what must not be read."""
    value, index = torch.full((len(rows), places), 1e9), torch.full((len(rows), places), 10**6, dtype=torch.int32)
    for i, row in enumerate(rows):
        for j, (feature, v) in enumerate(row[:places]):
            index[i, j], value[i, j] = feature, v
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return value, index, count


def select_lists(rows, k, n_features, key="relu", scale_F=None, codes=True, cap=64, **more):
    value, index, count = lists(rows)
    floor, bad = torch.full((len(rows),), -7, dtype=torch.int32), torch.full((len(rows),), -7, dtype=torch.int32)
    tally = torch.zeros(3, dtype=torch.int32)
    out = torch.empty(len(rows), k), torch.empty(len(rows), k, dtype=torch.int32)
    scale_F = torch.ones(n_features) if scale_F is None else scale_F
    select.select_lists(
        value, index, count, floor, bad, tally, scale_F, key, k=k, cap=cap, codes=out if codes else None, **more
    )
    return (*out, tally, bad) if codes else (value, index, count, floor)


ROWS = [
    # of three equal keys the two smallest features, wherever they stand
    [(90, 2.0), (5, 3.0), (70, 2.0), (12, 2.0), (3, 1.0)],
    # fewer than k, and the smallest free features 1 and 3 between them
    [(2, 1.0), (0, 4.0)],
    # nothing
    [],
    # NaN above +inf, whatever its sign
    [(60, INF), (61, NAN), (1, 7.0), (62, -NAN), (0, 8.0)],
    # what the key 0 of "relu" is not for: four free features are named
    [(4, -5.0), (0, -0.0), (1, 1e-40)],
]


def test_codes_from_lists():
    value, index, tally, _ = select_lists(ROWS, 4, 100)
    assert index.tolist() == [[5, 12, 70, 90], [0, 1, 2, 3], [0, 1, 2, 3], [0, 60, 61, 62], [0, 1, 2, 3]]
    assert value[:3].tolist() == [[3, 2, 2, 2], [4, 0, 1, 0], [0, 0, 0, 0]]
    assert value[3, :2].tolist() == [8, INF] and value[3, 2:].isnan().all()
    assert value[4].tolist() == [0, 0, 0, 0]
    assert tally.tolist() == [0, 5, 15]
    value, index, _, _ = select_lists(ROWS, 3, 100)
    assert index[0].tolist() == [5, 12, 70] and value[0].tolist() == [3, 2, 2]
    # abs: −5 is the largest
    value, index, _, _ = select_lists(ROWS, 2, 100, key="abs")
    assert index[4].tolist() == [0, 4] and value[4].tolist() == [0, -5]


def test_scale_ranks_and_leaves_the_value():
    scale = torch.ones(100)
    scale[3], scale[5] = 10, 0
    value, index, _, _ = select_lists(ROWS[:1], 2, 100, scale_F=scale)
    assert index.tolist() == [[3, 12]] and value.tolist() == [[1, 2]]


def test_lists_are_cut_and_their_bars_rise():
    value, index, count, floor = select_lists(ROWS, 3, 100, codes=False)
    assert count.tolist() == [3, 2, 0, 3, 0]
    assert sorted(zip(index[0, :3].tolist(), value[0, :3].tolist())) == [(5, 3), (12, 2), (70, 2)]
    # the bar is the third key, or any normal number
    assert floor[0].view(torch.float32) == 2 and floor[1:3].tolist() == [select.TINY] * 2
    assert floor[3].view(torch.float32) == INF


def test_overflowed_lists_are_left_alone():
    value, index, tally, bad = select_lists(ROWS, 2, 100, cap=4)
    assert tally.tolist() == [2, 5, 15] and sorted(bad.tolist()) == [-7, -7, -7, 0, 3]
    assert index[[0, 3]].eq(torch.iinfo(torch.int32).max).all() and value[[0, 3]].isnan().all()
    value, index, count, floor = select_lists(ROWS, 2, 100, codes=False, cap=4)
    assert count.tolist() == [5, 2, 0, 5, 0] and floor[[0, 3]].tolist() == [select.NEVER] * 2
    assert torch.equal(index[0], lists(ROWS)[1][0])


def test_random_lists_of_many_ties():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 30):
        pre = torch.zeros(2, 500)
        rows = []
        for row in pre:
            feature = torch.randperm(500, generator=generator)[:60]
            row[feature] = torch.randint(-2, 6, (60,), generator=generator) / 4.0
            rows.append(list(zip(feature.tolist(), row[feature].tolist())))
        want = reference.select(pre, RowCount(k)).codes
        value, index, _, _ = select_lists(rows, k, 500)
        assert torch.equal(value, want.values) and torch.equal(index, want.indices)


@pytest.mark.parametrize("key", ["relu", "abs"])
def test_dense_rows(key):
    pre = torch.stack([torch.randn(90), -torch.ones(90), torch.arange(90.0) * 7 % 13 - 6])
    pre[0, 80] = NAN
    for k in (5, 90):
        out = torch.empty(4, k), torch.empty(4, k, dtype=torch.int32)
        # two chunks
        select.select_rows(pre, torch.ones(90), key, first_row=0, k=k, codes=out, chunk=64)
        want = reference.select(pre, RowCount(k), key).codes
        assert torch.equal(out[1][:3], want.indices)
        torch.testing.assert_close(out[0][:3], want.values, rtol=0, atol=0, equal_nan=True)
        # nothing is written behind the last row
        assert out[0][3].isnan().all()


def test_a_bar_that_holds_a_mass():
    pre = torch.tensor([[1.0, 4, 2, 2], [1, 4, 2, 2], [1, 4, 2, 2], [1, NAN, 2, 2], [1, 1e20, 2, 2], [0, 0, -1, 0]])
    # squares 16, 4, 4, 1, together 25: 4.4² = 19.36 needs one 2, and both have that key. A key of 1e20 counts as 1e16
    target = torch.tensor([4.4, 0.0, 6.0, 2.0, 1e17, 1.0])
    floor = torch.full((6,), -7, dtype=torch.int32)
    select.select_rows(pre, torch.ones(4), "relu", first_row=0, mass=(target, floor), chunk=16)
    bar = floor.view(torch.float32)
    assert bar[:2].tolist() == [2, 4]
    assert floor[[2, 4, 5]].tolist() == [select.TINY] * 3 and bar[3].isnan()
    kept = reference.select(pre[:4], RowMass(target[:4])).codes.dense()
    assert ((kept == 0) | (pre[:4] >= bar[:4, None]) | kept.isnan()).all()


def test_capacities():
    assert [select.capacity(k) for k in (1, 32, 33, 128, 129, 512, 513)] == [256, 256, 512, 1024, 4096, 4096, None]
