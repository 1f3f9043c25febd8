"""Encode and select by Triton kernels, interpreted, against the reference: same features, same values, ties included.

Inputs are small integers or pass through exactly, so that every pre-activation is exact. Tiles are tiny: an interpreted program
costs a tenth of a second whatever it computes.
"""

import math

import pytest
import torch
from saekit_kernels import BatchCount, ColumnCount, RowCount, RowMass, Threshold, Workspace, reference

pytest.importorskip("triton")
from saekit_kernels.triton import encode
from saekit_kernels.triton.encode import Options, Tiles

NAN, INF = float("nan"), float("inf")
TILES = Tiles(16, 32, 16, 4, 2)
SMALL = {"tiles": TILES, "chunk": 512, "repair_rows": 4}
DENSE, PHASES = Options(**SMALL, phases=False), Options(**SMALL, phases=True)


def run(x, W, b, rule, options=PHASES, **more):
    return encode.encode_select(x, W, b, more.pop("b_in", None), rule=rule, options=options, **more)


def assert_same(got, want):
    for name in ("values", "indices"):
        torch.testing.assert_close(
            getattr(got.codes, name), getattr(want.codes, name), rtol=0, atol=0, equal_nan=True, msg=name
        )
    if want.codes.row_ptr is not None:
        assert torch.equal(got.codes.row_ptr, want.codes.row_ptr)
    if want.threshold is not None:
        torch.testing.assert_close(got.threshold, want.threshold, rtol=0, atol=0, equal_nan=True)


def check(x, W, b, rule, options=PHASES, **more):
    got = run(x, W, b, rule, options, **more)
    named = {n: more[n] for n in ("key", "scale_F") if n in more}
    assert_same(got, reference.encode_select(x, W, b, more.get("b_in"), rule=rule, **named))
    return got


def integers(batch, n_features, width=8, distinct=True, seed=0):
    """Exact dot products; `distinct` makes those of a row differ in the bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (batch, width), generator=generator).float()
    W = torch.randint(-3, 4, (n_features, width), generator=generator).float()
    return x, W, torch.arange(n_features) * 2.0**-15 if distinct else torch.zeros(n_features)


# Rows


@pytest.mark.parametrize(
    ("batch", "n_features", "width", "k", "key"),
    [
        (1, 20, 5, 1, "relu"),
        (17, 331, 37, 7, "abs"),
        (2, 520, 16, 32, "relu"),
    ],
)
def test_ragged_shapes(batch, n_features, width, k, key):
    x, W, b = integers(batch, n_features, width)
    check(x, W, b, RowCount(k), key=key)


@pytest.mark.parametrize("k", [1, 7, 300])
def test_dense_pass(k):
    # one row per program: a chunk holds the row, or two chunks do
    x, W, b = integers(3, 300, 5, distinct=False)
    check(x, W, b, RowCount(k), Options(**{**SMALL, "chunk": 256}, phases=False))


def kinds(n):
    """Rows of every kind, for an encoder that passes them through."""
    columns = torch.arange(float(n))
    scattered = columns * 7919 % n - n / 2
    return torch.stack(
        [
            scattered,
            torch.round(scattered / 16) / 4,
            torch.ones(n),
            -1 - columns,
            torch.where(columns % 100 == 3, columns, -1.0),
            torch.where(columns % 2 == 0, 0.0, -0.0),
            n - columns,
            torch.where(columns // 20 == 4, 100 + columns % 3, columns % 5),
        ]
    )


@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("options", [DENSE, PHASES], ids=["dense", "phases"])
def test_rows_of_every_kind(options, key):
    pre = kinds(340)
    check(torch.eye(len(pre)), pre.T.contiguous(), torch.zeros(340), RowCount(7), options, key=key)


@pytest.mark.parametrize("options", [DENSE, PHASES], ids=["dense", "phases"])
def test_nan_and_infinities(options):
    # an outer product, where they stay in their own column; 32 to 63 is not in the sample, 140 is in phase 1
    value = torch.linspace(-1, 1, 200)
    value[[7, 40, 150]] = torch.tensor([INF, -INF, 1e-40])
    value[199], value[140] = NAN, math.copysign(NAN, -1.0)
    for key in ("relu", "abs"):
        check(torch.tensor([[1.0], [2.0]]), value[:, None], torch.zeros(200), RowCount(5), options, key=key)


@pytest.mark.parametrize(("cap", "repair_rows"), [(8, 4), (8, 2), (30, 4)])
def test_overflowed_lists_are_repaired(cap, repair_rows):
    """As many bad rows as are computed dense, more of them than that, and some rows of all."""
    x, W, b = integers(4, 400, 8, distinct=repair_rows == 4)
    if cap == 30:
        # all positive keys equal: the sample's bar holds nothing back
        x[1] = 0
        b = b + 1
    workspace = Workspace()
    check(
        x,
        W,
        b,
        RowCount(7),
        Options(**{**SMALL, "repair_rows": repair_rows}, phases=True, cap=cap),
        workspace=workspace,
    )
    tally = encode.tally(workspace)
    assert tally["rows_overflowed"] == 4 if cap == 8 else 1 <= tally["rows_overflowed"] < 4
    assert tally["survivors_max"] > cap


def test_keys_that_grow_from_feature_to_feature():
    """Each tile fills the lists of rows that are repaired; they are cut at every tile, or for the last time when they hold the best."""
    growing = torch.arange(1.0, 401)
    pre = torch.stack([growing, torch.where(growing <= 256, growing, 0.5)]).repeat(2, 1)
    options = Options(**{**SMALL, "repair_rows": 1}, phases=True, cap=8)
    check(torch.eye(4), pre.T.contiguous(), torch.zeros(400), RowCount(7), options)


def test_a_smaller_feature_outside_the_sample_wins_the_tie():
    # 512 to 543 are sampled after 0 to 31; 128 to 159 come in phase 1, 32 to 63 in phase 2
    pre = torch.full((1, 560), -1.0)
    pre[0, 513:530] = pre[0, 130:136] = pre[0, 40:44] = 5
    got = check(torch.ones(1, 1), pre.T.contiguous(), torch.zeros(560), RowCount(7))
    assert got.codes.indices.tolist() == [[40, 41, 42, 43, 130, 131, 132]]


def test_tally_counts_and_makes_lists_longer():
    workspace = Workspace()
    assert encode.tally(workspace) == {}
    x, W, b = integers(2, 200)
    check(x, W, b, RowCount(3), workspace=workspace)
    tally = encode.tally(workspace)
    assert tally["rows_overflowed"] == 0 and 3 <= tally["survivors_max"] <= tally["survivors"]
    kept = encode._KEPT[workspace]
    assert kept.cap == 256
    kept.tally[0] = 129
    encode.tally(workspace)
    assert kept.cap == 512


def test_a_row_alone_is_encoded_as_in_the_batch_and_runs_repeat_to_the_bit():
    # row 16 stands in a tile of its own; whole numbers, for numpy rounds a sum by its place in the tile
    x, W, b = integers(17, 70, 20, distinct=False)
    together, alone = run(x, W, b, RowCount(5)).codes, run(x[16:], W, b, RowCount(5)).codes
    assert torch.equal(alone.values, together.values[16:]) and torch.equal(alone.indices, together.indices[16:])
    x, W, b = torch.randn(2, 20), torch.randn(70, 20), torch.randn(70)
    once, again = run(x, W, b, RowCount(5)).codes, run(x, W, b, RowCount(5)).codes
    assert torch.equal(once.values, again.values) and torch.equal(once.indices, again.indices)


def test_bf16_operands_b_in_and_scale():
    x, W, b = integers(3, 200)
    scale = torch.arange(200) % 7 / 4.0
    for compute in ("fp32", "bf16"):
        check(x, W, b, RowCount(6), compute=compute, b_in=torch.arange(8.0) - 3, scale_F=scale, key="abs")
    check(x, W, b, RowCount(6), DENSE, scale_F=scale)
    check(x, W, b, Threshold(4.0), scale_F=scale)
    check(x, W, b, BatchCount(40, 5.0), scale_F=scale)


def test_what_it_does_not_do():
    assert encode.cannot("row_count", "raw", False)
    assert all(encode.cannot(rule, key, True) is None for rule in ("row_count", "threshold") for key in ("relu", "abs"))


# Flat rules


@pytest.mark.parametrize("key", ["relu", "abs"])
def test_threshold(key):
    x, W, b = integers(5, 150, distinct=False)
    theta_F = torch.arange(150.0) % 9
    for theta, margin in ((5.0, 0.0), (theta_F, 2.0), (torch.tensor(3.0), 10.0)):
        check(x, W, b, Threshold(theta, margin), key=key)


def test_a_flat_list_grows_and_forgets_the_order_of_arrival():
    x, W, b = integers(17, 100)
    check(x, W, b, Threshold(2.0), Options(**SMALL, flat=3))


@pytest.mark.parametrize("m", [0, 37, 5 * 150])
def test_batch_count_with_every_hint(m):
    # ties within rows and between them
    x, W, b = integers(5, 150, distinct=False)
    want = reference.encode_select(x, W, b, rule=BatchCount(m))
    for hint in (None, want.hint, want.threshold, 1e9, 1e-3, NAN) if m == 37 else (None, 5.0):
        got = check(x, W, b, BatchCount(m, hint))
        assert got.hint == want.hint


def test_column_count_with_every_hint():
    x, W, b = integers(20, 150, distinct=False)
    m_F = torch.arange(150) % 4
    first = check(x, W, b, ColumnCount(m_F))
    assert first.hint.any()
    for hint in (first.hint, first.threshold, torch.full((150,), 1e9), torch.full((150,), NAN), torch.zeros(150)):
        got = check(x, W, b, ColumnCount(m_F, hint))
        assert (got.hint <= torch.where(got.hint > 0, first.threshold, INF)).all(), (
            "a bar above the threshold loses pairs"
        )


def test_a_column_far_below_its_budget_or_a_hint_far_too_low(monkeypatch):
    x, W, b = integers(20, 60, distinct=False)
    # so low that whole columns are computed instead
    monkeypatch.setattr(
        encode._Job, "survivors", lambda job, floor, most=None, of=encode._Job.survivors: of(job, floor, most and 10)
    )
    check(x, W, b, ColumnCount(torch.full((60,), 2), torch.full((60,), 1e-3)))
    check(x, W, b, ColumnCount(torch.full((60,), 30), torch.full((60,), 1e-3)))
    check(x, W, b, BatchCount(50, 1e-3))


def test_row_mass():
    x, W, b = integers(6, 150, distinct=False)
    for t in (torch.linspace(0, 60, 6), torch.tensor([INF, 0.1, 1e9, 15.0, 30.0, 1e-30])):
        check(x, W, b, RowMass(t))
    check(x, W, b, RowMass(torch.full((6,), 40.0)), key="abs")
    # norms 4 and 5: 4.5 is as near to one as to the other, and the fewer are kept
    got = check(torch.ones(1, 1), torch.tensor([[3.0], [4], [-1]]), torch.zeros(3), RowMass(torch.tensor([4.5])))
    assert got.codes.indices.tolist() == [1]


@pytest.mark.parametrize(
    "rule",
    [BatchCount(3), BatchCount(2, 0.5), ColumnCount(torch.full((40,), 2)), RowMass(torch.ones(2)), Threshold(1e9)],
)
def test_flat_rules_keep_nan(rule):
    value = torch.arange(40.0)
    value[33] = math.copysign(NAN, -1.0)
    got = run(torch.ones(2, 1), value[:, None], torch.zeros(40), rule)
    assert got.codes.values.isnan().sum() == 2


@pytest.mark.parametrize("rule", [RowCount(2), BatchCount(3), RowMass(torch.ones(0)), Threshold(0.5)])
def test_empty_batch(rule):
    out = run(torch.zeros(0, 4), torch.ones(8, 4), torch.zeros(8), rule)
    assert out.codes.shape == (0, 8)
