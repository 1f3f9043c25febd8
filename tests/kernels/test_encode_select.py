"""Selection: the worked example, the edge cases, and every fast path against the reference.

Inputs are small integers, so that every pre-activation is exact and paths may be compared to the bit. All of it runs with the
encoder product in fp32 and in bf16, whether or not this machine has units for that; what needs fp32 says so.
"""

import math

import pytest
import torch
from saekit_kernels import (
    COUNTERS,
    BatchCount,
    ColumnCount,
    RowCount,
    RowMass,
    Threshold,
    Workspace,
    cpu,
    encode_select,
    explain,
    portable,
    reference,
    using,
)

PATHS = ["reference", "portable", "cpu"]
FLAT_PATHS = ["reference", "portable"]
NAN, INF = float("nan"), float("inf")
PRE = torch.tensor([[3.0, -5, 1, 0.5], [2, 2, -1, 4]])
fp32_alone = pytest.mark.parametrize("compute", ["fp32"], indirect=True)
bf16_alone = pytest.mark.parametrize("compute", ["bf16"], indirect=True)


@pytest.fixture(autouse=True, params=["fp32", "bf16"])
def compute(request):
    """The default of `encode_select`."""
    if request.param == "bf16":
        request.getfixturevalue("bf16_by_default")
    return request.param


def encode_pre(pre_BF, path, rule, key="relu", **options):
    """Codes of given pre-activations: the identity is the encoder, so finite values pass through exactly."""
    with using(path):
        return encode_select(
            pre_BF, torch.eye(pre_BF.shape[1]), torch.zeros(pre_BF.shape[1]), rule=rule, key=key, **options
        )


def encode_outer(scale_B, value_F, path, rule, key="relu"):
    """Codes of the outer product scale_B × value_F, where infinities and NaN stay in their own row and column."""
    with using(path):
        return encode_select(scale_B[:, None], value_F[:, None], torch.zeros(len(value_F)), rule=rule, key=key)


def as_dicts(codes):
    pairs = codes.pairs()
    rows = [{} for _ in range(codes.batch)]
    for row, feature, value in zip(pairs.row_N.tolist(), pairs.feature_N.tolist(), pairs.value_N.tolist()):
        rows[row][feature] = value
    return rows


def assert_well_formed(codes):
    """Real distinct features, ascending within each row."""
    indices = codes.indices.long()
    if codes.row_ptr is None:
        assert (indices.diff(dim=1) > 0).all()
    else:
        same_row = codes.slot_rows().diff() == 0
        assert (indices.diff()[same_row] > 0).all()
        assert (codes.values != 0).all()
    assert ((indices >= 0) & (indices < codes.n_features)).all()


def assert_same_row_values(got, want):
    """Equal keys may be resolved otherwise: the same multiset of |values| per row (and of values where keys are signed once)."""
    torch.testing.assert_close(
        got.dense().abs().sort(dim=1).values, want.dense().abs().sort(dim=1).values, rtol=0, atol=0, equal_nan=True
    )
    assert got.l0().tolist() == want.l0().tolist()


def integers(batch, n_features, width=8, seed=0, low=-3, high=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high, (batch, width), generator=generator).float()
    W = torch.randint(low, high, (n_features, width), generator=generator).float()
    b = torch.randint(-2, 3, (n_features,), generator=generator).float()
    return x, W, b


# The worked example of the specification of selection; where keys tie, a fast row path may take either feature.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("key", "row_0", "row_1"),
    [
        ("relu", {0: 3, 2: 1}, [{3: 4, 0: 2}, {3: 4, 1: 2}]),
        ("abs", {1: -5, 0: 3}, [{3: 4, 0: 2}, {3: 4, 1: 2}]),
    ],
)
def test_row_count_example(path, key, row_0, row_1):
    got = as_dicts(encode_pre(PRE, path, RowCount(2), key).codes)
    assert got[0] == row_0
    assert got[1] in row_1
    if path == "reference":
        assert got[1] == row_1[0]


@pytest.mark.parametrize("path", FLAT_PATHS)
def test_flat_rules_example(path):
    def kept(rule):
        return as_dicts(encode_pre(PRE, path, rule).codes)

    assert kept(BatchCount(2)) == [{0: 3}, {3: 4}]
    assert kept(BatchCount(4)) == [{0: 3}, {3: 4, 0: 2, 1: 2}]
    # three of the four largest: of the equal 2, 2 the first by row, then by feature
    assert kept(BatchCount(3)) == [{0: 3}, {3: 4, 0: 2}]
    assert kept(ColumnCount(torch.ones(4, dtype=torch.int64))) == [{0: 3, 2: 1}, {1: 2, 3: 4}]
    # norms of row 1: 4, 4.47, 4.90; 4.5 is nearest to 4.47
    assert kept(RowMass(torch.tensor([3.0, 4.5]))) == [{0: 3}, {3: 4, 0: 2}]
    assert kept(Threshold(1.0)) == [{0: 3}, {0: 2, 1: 2, 3: 4}]


@pytest.mark.parametrize("path", FLAT_PATHS)
def test_thresholds_and_hints_returned(path):
    out = encode_pre(PRE, path, BatchCount(3))
    assert out.threshold.item() == 2 and out.hint.item() == pytest.approx(1.9)
    out = encode_pre(PRE, path, ColumnCount(torch.tensor([1, 0, 2, 1])))
    # column 1 may keep none; column 2 has one positive key of the two it may keep
    assert out.threshold.tolist() == [3, 0, 1, 4]
    assert encode_pre(PRE, path, Threshold(1.0)).threshold is None
    assert encode_pre(PRE, path, RowCount(1)).hint is None


# Row count


SHAPES = [
    (1, 1, 1),
    (1, 5, 5),
    (7, 130, 7),
    (5, 257, 1),
    (33, 1000, 32),
    (3, 3072, 32),
    (2, 4099, 100),
    (4, 64, 64),
    (9, 771, 2),
]


@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("batch", "n_features", "k"), SHAPES)
def test_row_count_against_reference(path, key, batch, n_features, k):
    x, W, b = integers(batch, n_features)
    want = reference.encode_select(x, W, b, rule=RowCount(k), key=key).codes
    with using(path):
        got = encode_select(x, W, b, rule=RowCount(k), key=key).codes
    assert got.values.shape == got.indices.shape == (batch, k)
    assert_well_formed(got)
    assert_same_row_values(got, want)
    # every kept value is the pre-activation of the feature it names
    kept = got.dense() != 0
    assert torch.equal(got.dense()[kept], (x @ W.T + b)[kept])


@fp32_alone
@pytest.mark.parametrize("path", PATHS)
def test_index_sets_where_no_keys_tie(path):
    # b_enc_j = j · 2⁻¹⁵ makes the keys of a row distinct, and all sums are exact
    x, W, _ = integers(6, 3000)
    b = torch.arange(3000) * 2.0**-15
    want = reference.encode_select(x, W, b, rule=RowCount(32)).codes
    with using(path):
        got = encode_select(x, W, b, rule=RowCount(32)).codes
    assert torch.equal(got.indices, want.indices) and torch.equal(got.values, want.values)


ROWS = {
    "all equal": torch.ones(400),
    "all negative": -torch.arange(1.0, 257).repeat_interleave(2)[:400],
    "three positives": torch.cat([torch.tensor([5.0, 1, 3]), -torch.ones(397)]),
    "quantised": (torch.arange(400.0) * 7919 % 13 - 6) / 4,
    "zeros of both signs": torch.tensor([0.0, -0.0] * 200),
    "infinities": torch.cat([torch.tensor([INF, -INF, 2.0]), torch.zeros(397)]),
    "subnormal": torch.cat([torch.tensor([1e-40, 1.0, 1e-39]), torch.zeros(397)]),
}


@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_every_kind(row, path, key):
    value = ROWS[row]
    got = encode_outer(torch.tensor([1.0, 2.0]), value, path, RowCount(7), key).codes
    want = reference.encode_select(
        torch.tensor([[1.0], [2.0]]), value[:, None], torch.zeros(400), rule=RowCount(7), key=key
    ).codes
    assert_well_formed(got)
    assert_same_row_values(got, want)
    live = value if key == "relu" else value.abs()
    assert got.l0()[0] == min(7, int((live >= torch.finfo(torch.float32).tiny).sum()))


@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("column", [0, 5, 400, 401])
@pytest.mark.parametrize("path", PATHS)
def test_nan_outranks_everything_whatever_its_sign(path, column, sign, key):
    # 402 features: two columns stand outside the groups of four
    value = torch.linspace(-1, 1, 402)
    value[7] = INF
    value[column] = math.copysign(NAN, sign)
    out = encode_outer(torch.ones(2), value, path, RowCount(3), key)
    for row in range(2):
        kept = out.codes.values[row]
        assert kept.isnan().sum() == 1 and kept.isinf().sum() == 1
        assert out.codes.indices[row][kept.isnan()].item() == column
    assert out.counters.tolist() == [0, 0, 2]


@pytest.mark.parametrize("path", PATHS)
def test_a_nan_row_leaves_the_others_alone(path):
    x, W, b = integers(5, 600)
    with using(path):
        want = encode_select(x, W, b, rule=RowCount(9)).codes
        x[2, 3] = NAN
        got = encode_select(x, W, b, rule=RowCount(9)).codes
    others = [0, 1, 3, 4]
    assert torch.equal(got.values[others], want.values[others])
    assert torch.equal(got.indices[others], want.indices[others])
    assert got.values[2].isnan().all()


@pytest.mark.parametrize("path", ["reference", "portable"])
def test_raw_key_ranks_negative_values(path):
    pre = torch.tensor([[-3.0, -1, 0, 2], [-1, -2, -3, -4]])
    # the zero of row 0 is never kept
    got = as_dicts(encode_pre(pre, path, RowCount(3), "raw").codes)
    assert got == [{3: 2, 1: -1, 0: -3}, {0: -1, 1: -2, 2: -3}]


@pytest.mark.parametrize("path", ["reference", "portable"])
def test_scale_changes_the_ranking_and_not_the_value(path):
    scale = torch.tensor([1.0, 1, 10, 0])
    # keys of row 0: 3, 0, 10, 0; of row 1: 2, 2, 0, 0
    got = as_dicts(encode_pre(PRE, path, RowCount(1), scale_F=scale).codes)
    assert got[0] == {2: 1} and list(got[1].values()) == [2]
    assert as_dicts(encode_pre(PRE, path, BatchCount(2), scale_F=scale).codes) == [{0: 3, 2: 1}, {}]
    assert as_dicts(encode_pre(PRE, path, Threshold(4.0), scale_F=scale).codes) == [{2: 1}, {}]


# Flat rules


@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("m", [0, 1, 37, 500, 20 * 300])
def test_batch_count_against_reference(m, key):
    x, W, b = integers(20, 300)
    want = reference.encode_select(x, W, b, rule=BatchCount(m), key=key)
    for hint in (None, 0.0, want.hint, want.threshold, 1e9, INF, NAN, -1.0):
        with using("portable"):
            got = encode_select(x, W, b, rule=BatchCount(m, hint), key=key)
        assert torch.equal(got.codes.dense(), want.codes.dense()), hint
        assert got.threshold == want.threshold
        assert_well_formed(got.codes)
    assert got.counters[COUNTERS.index("budget_unspent")] == m - len(want.codes.values)


@pytest.mark.parametrize("key", ["relu", "abs"])
def test_column_count_against_reference(key):
    x, W, b = integers(40, 150)
    m_F = torch.arange(150) % 6
    want = reference.encode_select(x, W, b, rule=ColumnCount(m_F), key=key)
    with using("portable"):
        first = encode_select(x, W, b, rule=ColumnCount(m_F), key=key)
    assert first.hint.any(), "a column with more than 4 m firings leaves a bar"
    for hint in (None, first.hint, first.hint * 0.5, want.threshold, torch.full((150,), 1e9), torch.full((150,), NAN)):
        with using("portable"):
            got = encode_select(x, W, b, rule=ColumnCount(m_F, hint), key=key)
        assert torch.equal(got.codes.dense(), want.codes.dense())
        assert torch.equal(got.threshold, want.threshold)
        assert_well_formed(got.codes)
        assert (got.hint <= torch.where(got.hint > 0, want.threshold, INF)).all(), (
            "a bar above the threshold would lose pairs"
        )
    assert got.counters[1] == m_F.sum() - len(want.codes.values)


def test_row_mass_against_reference():
    x, W, b = integers(30, 200)
    for t in (
        x.norm(dim=1),
        torch.zeros(30),
        torch.full((30,), INF),
        torch.full((30,), 0.1),
        torch.linspace(0, 200, 30),
    ):
        want = reference.encode_select(x, W, b, rule=RowMass(t)).codes
        with using("portable"):
            got = encode_select(x, W, b, rule=RowMass(t)).codes
        assert torch.equal(got.dense(), want.dense())
        assert_well_formed(got)


@fp32_alone
@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("first", [0.0, 3.0, 1e9], ids=["too few", "about right", "all"])
def test_row_mass_whatever_its_guess_is(key, first, monkeypatch):
    """The first row alone says how many keys are looked at: rows that need more, ties, rows without a positive key, a NaN."""
    monkeypatch.setattr(portable, "ROW_MASS_SAMPLE", 1)
    g = torch.Generator().manual_seed(0)
    pre = torch.randn(40, 300, generator=g)
    pre[10:20] = (pre[10:20] * 4).round() / 4
    pre[20] = -pre[20].abs()
    pre[21] = 1.0
    pre[22:25] = torch.where(torch.arange(300) < 5, pre[22:25].abs() + 1, -1)
    pre[25, 7] = float("nan")
    pre[26, 7] = INF
    t = torch.linspace(0, 14, 40)
    t[0] = first
    calls = []
    whole = portable._nearest_prefix
    monkeypatch.setattr(portable, "_nearest_prefix", lambda bits, t_B: calls.append(len(bits)) or whole(bits, t_B))
    got = encode_pre(pre, "portable", RowMass(t), key=key)
    want = encode_pre(pre, "reference", RowMass(t), key=key)
    assert torch.equal(got.codes.indices, want.codes.indices) and torch.equal(got.codes.row_ptr, want.codes.row_ptr)
    torch.testing.assert_close(got.codes.values, want.codes.values, rtol=0, atol=0, equal_nan=True)
    # the first row, then those that it does not decide: some, or all where too many keys would be looked at
    assert calls[0] == 1 and (calls[1:] == [40]) == (first == 1e9) and len(calls) == 2
    assert first == 1e9 or 0 < calls[1] < 40


@pytest.mark.parametrize("path", FLAT_PATHS)
def test_row_mass_takes_the_fewer_on_a_tie_and_at_least_one(path):
    pre = torch.tensor([[4.0, 3, 0, -1]])
    # norms 4, 5; 4.5 is as near to one as to the other; a row that never reaches t keeps every positive key
    for t, kept in ((4.5, {0: 4}), (4.6, {0: 4, 1: 3}), (0.0, {0: 4}), (100.0, {0: 4, 1: 3})):
        assert as_dicts(encode_pre(pre, path, RowMass(torch.tensor([t]))).codes) == [kept]
    assert as_dicts(encode_pre(-pre.abs(), path, RowMass(torch.tensor([1.0]))).codes) == [{}]


@pytest.mark.parametrize("path", FLAT_PATHS)
@pytest.mark.parametrize("key", ["relu", "abs"])
def test_threshold(path, key):
    x, W, b = integers(20, 300)
    pre = x @ W.T + b
    ranked = pre.abs() if key == "abs" else pre.clamp(min=0)
    theta_F = torch.arange(300.0) % 9
    for theta, margin in (
        (0.0, 0.0),
        (5.0, 0.0),
        (theta_F, 0.0),
        (theta_F, 2.0),
        (torch.tensor(3.0), 10.0),
        (INF, 0.0),
    ):
        with using(path):
            got = encode_select(x, W, b, rule=Threshold(theta, margin), key=key).codes
        # strictly above: the integers that equal the bar stay out
        bar = (torch.as_tensor(theta) - margin).clamp(min=0)
        assert torch.equal(got.dense(), torch.where(ranked > bar, pre, 0))
        assert_well_formed(got)


@pytest.mark.parametrize("path", FLAT_PATHS)
@pytest.mark.parametrize(
    "rule", [BatchCount(3), ColumnCount(torch.full((8,), 2)), RowMass(torch.ones(1)), Threshold(1e9), Threshold(INF)]
)
def test_flat_rules_keep_nan(path, rule):
    for sign in (1.0, -1.0):
        value = torch.arange(8.0)
        value[2] = math.copysign(NAN, sign)
        out = encode_outer(torch.ones(1), value, path, rule)
        assert out.codes.values.isnan().sum() == 1 and out.counters[2] == 1


@pytest.mark.parametrize("path", FLAT_PATHS)
def test_a_threshold_that_is_nan_keeps_nothing(path):
    assert as_dicts(encode_pre(PRE, path, Threshold(NAN)).codes) == [{}, {}]


# Every rule


@pytest.mark.parametrize("path", PATHS)
def test_everything_kept_is_relu_or_identity(path):
    x, W, b = integers(6, 50)
    pre = x @ W.T + b
    with using(path):
        assert torch.equal(encode_select(x, W, b, rule=RowCount(50)).codes.dense(), pre.relu())
        assert torch.equal(encode_select(x, W, b, rule=RowCount(50), key="abs").codes.dense(), pre)
    if path != "cpu":
        with using(path):
            assert torch.equal(encode_select(x, W, b, rule=BatchCount(300)).codes.dense(), pre.relu())
            assert torch.equal(encode_select(x, W, b, rule=BatchCount(300), key="abs").codes.dense(), pre)
            everything = ColumnCount(torch.full((50,), 6))
            assert torch.equal(encode_select(x, W, b, rule=everything).codes.dense(), pre.relu())


RULES = {
    "row_count": lambda batch, n: RowCount(2),
    "batch_count": lambda batch, n: BatchCount(3),
    "column_count": lambda batch, n: ColumnCount(torch.ones(n, dtype=torch.int32)),
    "row_mass": lambda batch, n: RowMass(torch.ones(batch)),
    "threshold": lambda batch, n: Threshold(0.5),
}


@pytest.mark.parametrize("name", RULES)
def test_empty_batch(name):
    out = encode_select(torch.zeros(0, 4), torch.ones(8, 4), torch.zeros(8), rule=RULES[name](0, 8), csc=True)
    assert out.codes.shape == (0, 8) and out.codes.l0().shape == (0,) and not out.codes.fired_F().any()
    assert out.csc.ptr.tolist() == [0] * 9


@pytest.mark.parametrize("name", RULES)
def test_input_bias_is_subtracted(name):
    x, W, b = integers(5, 40)
    b_in = torch.arange(8.0) - 3
    rule = RULES[name](5, 40)
    want = reference.select((x - b_in) @ W.T + b, rule).codes
    assert_same_row_values(encode_select(x, W, b, b_in, rule=rule).codes, want)


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, "row_count") for path in PATHS]
    + [(path, name) for path in FLAT_PATHS for name in ("threshold", "row_mass")],
)
def test_a_row_is_encoded_alike_alone_and_in_any_batch(path, name):
    x, W, b = integers(12, 900)
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    t = x.norm(dim=1)
    for key in ("relu", "abs") if name == "row_count" else ("relu",):

        def encode(rows, t, key=key):
            rule = {"row_count": RowCount(32), "threshold": Threshold(4.0), "row_mass": RowMass(t)}[name]
            with using(path):
                return encode_select(rows, W, b, rule=rule, key=key).codes.dense()

        together = encode(x, t)
        assert torch.equal(encode(x[permutation], t[permutation]), together[permutation])
        for i in range(12):
            assert torch.equal(encode(x[i : i + 1], t[i : i + 1])[0], together[i])


def test_blocks_of_rows_and_a_kept_buffer_change_nothing(monkeypatch, compute):
    x, W, b = integers(1000, 64, seed=3)
    small = Workspace()
    whole = encode_select(x, W, b, rule=RowCount(5)).codes
    for name in RULES:
        rule = RULES[name](1000, 64)
        want = encode_select(x, W, b, rule=rule)

        def small_blocks(*args, of=portable.encoder_of):
            encoder = of(*args)
            encoder.rows = 37
            return encoder

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(portable, "encoder_of", small_blocks)
            got = encode_select(x, W, b, rule=rule, workspace=small)
        assert torch.equal(got.codes.values, want.codes.values) and torch.equal(got.codes.indices, want.codes.indices)
    # in bf16 also the operands, 32 columns wide
    assert small.nbytes == (37 * 64 * 4 if compute == "fp32" else 2 * (37 * 64 + (1000 + 64) * 32))
    # what was returned before does not lie in the buffer
    with torch.no_grad():
        kept = encode_select(x, W, b, rule=RowCount(5), workspace=small).codes
        encode_select(-x, W, b, rule=RowCount(5), workspace=small)
    assert torch.equal(kept.values, whole.values)


def test_same_bits_in_repeated_runs_and_with_one_or_two_threads():
    x, W, b = torch.randn(64, 48), torch.randn(1200, 48), torch.randn(1200)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(encode_select(x, W, b, rule=RowCount(32)).codes)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].values, other.values) and torch.equal(results[0].indices, other.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    x, W, b = integers(5, 300)
    got = encode_select(x.to(dtype), W, b, rule=RowCount(7), compute="fp32").codes
    assert got.values.dtype == torch.float32
    assert torch.equal(got.values, encode_select(x, W, b, rule=RowCount(7), compute="fp32").codes.values)


def test_large_k_and_odd_widths():
    for n_features, k in ((1025, 128), (8191, 100), (4096, 512), (70, 3)):
        pre = torch.randn(3, n_features, generator=torch.Generator().manual_seed(n_features))
        for key in ("relu", "abs"):
            ranked = pre.abs() if key == "abs" else pre
            column = cpu.top_columns(pre, k, key)
            assert all(len(set(row.tolist())) == k for row in column)
            want = ranked.topk(k, dim=1).values
            assert torch.equal(ranked.gather(1, column).sort(dim=1, descending=True).values, want)


# Products in bf16


@bf16_alone
@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("cpu", RowCount(32)),
        ("portable", RowCount(32)),
        ("portable", BatchCount(1234)),
        ("portable", ColumnCount(torch.arange(900) % 7)),
        ("portable", RowMass(torch.linspace(10, 50, 120))),
        ("portable", Threshold(7.77)),
        ("portable", Threshold(torch.linspace(0, 9, 900), margin=0.3)),
    ],
    ids=lambda case: case if isinstance(case, str) else type(case).__name__,
)
def test_bf16_selects_exactly_among_its_rounded_pre_activations(path, rule, key):
    """Real numbers this time: keys are rounded to bf16, bars and masses are not."""
    x, W, b = torch.randn(120, 40), torch.randn(900, 40), torch.randn(900)
    with torch.no_grad(), using(path):
        # all of them, from a product of the same shape
        pre = next(portable.encoder_of(x, W, b, None, "bf16", None).blocks())[1].float()
        torch.testing.assert_close(pre, x @ W.T + b, rtol=2e-2, atol=2e-1)
        got = encode_select(x, W, b, rule=rule, key=key)
    want = reference.encode_select(pre, torch.eye(900), torch.zeros(900), rule=rule, key=key)
    assert got.codes.values.dtype == torch.float32 and got.codes.values.numel()
    assert_same_row_values(got.codes, want.codes)
    if not isinstance(rule, RowCount):
        assert torch.equal(got.codes.indices, want.codes.indices)
    if got.threshold is not None:
        torch.testing.assert_close(got.threshold, want.threshold, rtol=0, atol=0)


@bf16_alone
@pytest.mark.parametrize("b", [1e-3, 3.14159, -1000.1, INF, -INF])
def test_bf16_keeps_an_encoder_bias_to_sixteen_bits(b):
    x, W = torch.zeros(3, 5), torch.ones(70, 5)
    encoder = portable.encoder_of(x, W, torch.full((70,), b), None, "bf16", None)
    narrow = encoder.columns(torch.tensor([3]))
    assert narrow.unique().tolist() == [torch.tensor(b).bfloat16().item()]
    operand = encoder.W_enc_FD[:, 5:7].double().sum(1)
    assert operand.unique().tolist() == [pytest.approx(b, rel=2.0**-16)]


# What a user can get wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": RowCount(5)}, "k may be at most 4"),
        ({"key": "signed"}, "key='signed': it is one of relu, abs, raw"),
        ({"key": "raw", "rule": BatchCount(2)}, "goes with RowCount"),
        ({"compute": "fp8"}, "it is one of fp32, bf16, tf32"),
        ({"compute": "tf32"}, "a mode of NVIDIA GPUs"),
        ({"rule": ColumnCount(torch.ones(3))}, r"m_F has shape \(3,\), expected \(4\)"),
        ({"rule": RowMass(torch.ones(3))}, r"t_B has shape \(3,\), expected \(2\)"),
        ({"rule": Threshold(torch.ones(3))}, "theta has shape"),
        ({"b_in_D": torch.zeros(3)}, "b_in has shape"),
        ({"scale_F": torch.zeros(3)}, "scale_F has shape"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        encode_select(PRE, torch.eye(4), torch.zeros(4), **{"rule": RowCount(2), **change})


def test_refusals_of_rules_and_shapes():
    with pytest.raises(ValueError, match="k must be at least 1"):
        RowCount(0)
    with pytest.raises(ValueError, match="must not be negative"):
        BatchCount(-1)
    with pytest.raises(ValueError, match="margin must be 0 or more"):
        Threshold(0.0, margin=-1.0)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4\), expected \(any, any\)"):
        encode_select(torch.zeros(2, 3, 4), torch.eye(4), torch.zeros(4), rule=RowCount(1))
    with pytest.raises(ValueError, match=r"W_enc has shape \(4, 4\), expected \(any, 5\)"):
        encode_select(torch.zeros(2, 5), torch.eye(4), torch.zeros(4), rule=RowCount(1))


@fp32_alone
def test_bf16_is_refused_with_the_reason_where_the_cpu_has_no_units():
    with pytest.raises(ValueError, match=r'compute="bf16" cannot run: this CPU has neither AMX nor AVX512-BF16'):
        encode_select(PRE, torch.eye(4), torch.zeros(4), rule=RowCount(2), compute="bf16")


def test_a_workspace_is_refused_where_a_graph_is_recorded():
    W = torch.eye(4, requires_grad=True)
    with pytest.raises(ValueError, match="workspace was given where a graph is recorded"):
        encode_select(PRE, W, torch.zeros(4), rule=RowCount(2), workspace=Workspace())


def test_forced_paths_and_explain():
    with pytest.raises(ValueError, match="there is no path 'gpu'"), using("gpu"):
        pass
    with pytest.raises(
        ValueError, match="cannot run on the cpu path that was asked for: the cpu path does not select by batch"
    ):
        encode_pre(PRE, "cpu", BatchCount(2))
    with pytest.raises(ValueError, match="float64 runs on the reference path alone"), using("portable"):
        encode_select(PRE.double(), torch.eye(4).double(), torch.zeros(4).double(), rule=RowCount(2))
    lines = {line.op: line for line in explain()}
    assert lines["encode_select row_count"].path == "cpu"
    assert lines["encode_select batch_count"].path == "portable"
    assert all(line.reason for line in lines.values())
    assert {line.path for line in explain("cuda") if line.op != "encoder product"} == {"portable"}
    with using("reference"):
        assert {line.path for line in explain()} - {"fp32", "bf16"} == {"reference"}
