"""Weight gradients by feature and the step that needs no gradient in memory, as Triton kernels, against float64."""

import pytest
import torch
from saekit_kernels import Codes, reference
from saekit_kernels.portable import build_csc
from saekit_kernels.triton import grads as kernels
from saekit_kernels.triton.row_adam import row_adam_

ADAM = {"step": 3, "lr": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-6}


def make_codes(B, F, counts, seed=0, always=None):
    """Row b fires on counts[b] features, the low ones far more often (Zipf), and on `always`; an eighth of the slots is empty.

    Row 1 has no firing, and feature F − 1 has none.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = 1 / torch.arange(1, F + 1).double()
    weight[-1] = 0
    if always is not None:
        weight[always] = 1e9
    indices, values = [], []
    for b in range(B):
        chosen = torch.multinomial(weight, counts[b], generator=generator).sort().values if counts[b] else []
        indices.append(torch.as_tensor(chosen, dtype=torch.int64))
        value = torch.randn(counts[b], generator=generator)
        empty = torch.rand(counts[b], generator=generator) < 0.125
        if always is not None:
            empty &= indices[-1] != always
        value[empty] = 0
        values.append(torch.zeros(counts[b]) if b == 1 and always is None else value)
    if len(set(counts)) == 1:
        return Codes.rowwise(torch.stack(values), torch.stack(indices), F)
    return Codes.flat(torch.tensor([0, *counts]).cumsum(0), torch.cat(indices), torch.cat(values), F)


def ragged(B, F):
    return torch.randint(0, min(F - 1, 9), (B,), generator=torch.Generator().manual_seed(1)).tolist()


# name → codes, D.  A feature of "skew" fires on every row: a whole window, a head and a tail; two windows and no end
CASES = {
    "one slot": (lambda: make_codes(3, 2, [1] * 3), 1),
    "rowwise": (lambda: make_codes(17, 23, [7] * 17), 5),
    "flat": (lambda: make_codes(20, 31, ragged(20, 31)), 33),
    "two slices": (lambda: make_codes(9, 12, [3] * 9), 300),
    "skew": (lambda: make_codes(270, 6, [2] * 270, always=2), 6),
    "skew, flat": (lambda: make_codes(256, 5, [1 + n % 2 for n in ragged(256, 5)], always=0), 20),
}
case = pytest.mark.parametrize("name", CASES)


def hold(name, got, eager, truth):
    """The rule: RMS-relative error at most 1.1 × that of eager torch in float32 + two of its roundings, which are how far the
    order of eager's own sums differs between processors."""
    assert got.shape == truth.shape and got.dtype == torch.float32, name
    size = truth.square().mean().sqrt().clamp_min(1e-30)
    error, allowed = (((t.double() - truth).square().mean().sqrt() / size).item() for t in (got, eager))
    assert error <= 1.1 * allowed + 2 * torch.finfo(torch.float32).eps, (name, error, allowed)


def pairs(name):
    """Csc and what is summed over it. Rows without a firing are NaN, and so are coefficients of empty slots."""
    make, D = CASES[name]
    codes = make()
    coefs = [torch.randn(codes.values.shape).masked_fill(codes.values == 0, torch.nan) for _ in range(2)]
    silent = codes.l0() == 0
    rows = [torch.randn(codes.batch, D).masked_fill(silent[:, None], torch.nan) for _ in range(2)]
    return build_csc(codes), coefs[0], rows[0], coefs[1], rows[1]


def doubled(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def heavy_features(monkeypatch, rows, longer_than):
    """The dense product of the busiest features for tiny batches, too."""
    monkeypatch.setattr(kernels, "HEAVY", rows)
    monkeypatch.setattr(kernels, "LONG", longer_than)


def test_the_cases_are_what_they_say():
    for name, (make, _) in CASES.items():
        codes = make()
        fired = codes.fired_F()
        assert not fired[-1], "a feature is silent"
        longest = build_csc(codes).ptr.diff().max()
        assert (longest == codes.batch) == name.startswith("skew"), name
        assert name.startswith("skew") or (codes.l0() == 0).any(), "a row is silent"
        assert codes.is_rowwise != ("flat" in name)


@case
@pytest.mark.parametrize("heavy", [False, True])
def test_error_of_the_gradients(name, heavy, monkeypatch):
    if heavy:
        heavy_features(monkeypatch, 3, 2)
    csc, coef_dec, residual, coef_enc, x = pairs(name)
    if heavy:
        # a dense product multiplies every row of the batch, and 0 · NaN is NaN
        residual, x = (t.nan_to_num(nan=7.0) for t in (residual, x))
    eager = (*reference.segment_sum(csc, coef_enc, x), reference.segment_sum(csc, coef_dec, residual)[0])
    truth = (
        *reference.segment_sum(csc, coef_enc.double(), x.double()),
        reference.segment_sum(csc, coef_dec.double(), residual.double())[0],
    )
    out = tuple(torch.full_like(eager[0], torch.nan) for _ in range(2))
    buffer = torch.full_like(eager[0], torch.nan)
    one, total_of_one = kernels.segment_sum(csc, coef_enc, x, out=buffer)
    assert one is buffer
    g_dec, g_enc, total = kernels.weight_grads(csc, coef_dec, residual, coef_enc, x, out=out)
    assert g_dec is out[0] and g_enc is out[1]
    hold("W_enc alone", one, eager[0], truth[0])
    hold("W_enc", g_enc, eager[0], truth[0])
    hold("W_dec", g_dec, eager[2], truth[2])
    for kind in (total, total_of_one, kernels.feature_sums(csc, coef_enc)):
        hold("b_enc", kind, eager[1], truth[1])
    silent = csc.ptr.diff() == 0
    assert not g_dec[silent].any() and not g_enc[silent].any() and not total[silent].any()
    for again, first in zip(
        kernels.weight_grads(csc, coef_dec, residual, coef_enc, x), (g_dec, g_enc, total), strict=True
    ):
        assert torch.equal(again, first), "runs repeat to the bit"


def test_gradients_by_hand():
    # row 0: features 1 and 3;  row 1: nothing;  row 2: feature 1
    codes = Codes.rowwise(torch.tensor([[2.0, -1], [0, 0], [4, 0]]), torch.tensor([[1, 3], [0, 1], [1, 2]]), 4)
    residual, x = torch.tensor([[1.0, 2], [100, 100], [3, 4]]), torch.tensor([[5.0, 6], [100, 100], [7, 8]])
    coef_dec, coef_enc = torch.tensor([[2.0, 3], [50, 50], [10, 50]]), torch.tensor([[1.0, -1], [50, 50], [2, 50]])
    g_dec, g_enc, total = kernels.weight_grads(build_csc(codes), coef_dec, residual, coef_enc, x)
    # feature 1: 2·(1, 2) + 10·(3, 4);  feature 3: 3·(1, 2)
    assert g_dec.tolist() == [[0, 0], [32, 44], [0, 0], [3, 6]]
    # feature 1: 1·(5, 6) + 2·(7, 8);  feature 3: −(5, 6)
    assert g_enc.tolist() == [[0, 0], [19, 22], [0, 0], [-5, -6]]
    assert total.tolist() == [0, 3, 0, -1]


def test_no_firings():
    silent = Codes.flat(torch.tensor([0, 0, 0]), torch.zeros(0), torch.zeros(0), 4)
    none, rows = torch.zeros(0), torch.full((2, 3), torch.nan)
    g_dec, g_enc, total = kernels.weight_grads(build_csc(silent), none, rows, none, rows)
    assert g_dec.shape == g_enc.shape == (4, 3)
    assert (
        not g_dec.any()
        and not g_enc.any()
        and not total.any()
        and not kernels.feature_sums(build_csc(silent), none).any()
    )


def matrices(F, D):
    """W_dec (rows of norm 1), W_enc, m_dec, v_dec, m_enc, v_enc."""
    W_dec = torch.randn(F, D)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return W_dec, torch.randn(F, D), *(t * 0.1 for _ in range(2) for t in (torch.randn(F, D), torch.rand(F, D)))


def aux_rows(F, D):
    """Two features of AuxK in no order, the last one (silent) among them."""
    return torch.tensor([F - 1, 0]), torch.randn(2, D), torch.randn(2, D)


def step(function, given, whole, extra, dtype=torch.float32, **options):
    """The six matrices after a step, and the squared norms."""
    whole = [t.to(dtype, copy=True) for t in whole]
    csc, *rest = given
    if extra is not None:
        extra = (extra[0], *(t.to(dtype) for t in extra[1:]))
    row_sq = function(csc, *(t.to(dtype) for t in rest), *whole, extra=extra, **{**ADAM, **options})
    return [*whole, row_sq]


OUTPUTS = ("W_dec", "W_enc", "m_dec", "v_dec", "m_enc", "v_enc", "row_sq")


@case
@pytest.mark.parametrize(("with_extra", "heavy"), [(False, False), (True, False), (True, True)])
def test_error_of_the_fused_step(name, with_extra, heavy, monkeypatch):
    given = pairs(name)
    if heavy:
        heavy_features(monkeypatch, 3, 2)
        given = [t.nan_to_num(nan=7.0) if i in (2, 4) else t for i, t in enumerate(given)]
    F, D = len(given[0].ptr) - 1, given[4].shape[1]
    whole, extra = matrices(F, D), aux_rows(F, D) if with_extra else None
    truth = step(reference.segment_adam_, given, whole, extra, torch.float64)
    eager = step(reference.segment_adam_, given, whole, extra)
    got = step(kernels.segment_adam_, given, whole, extra)
    for what, *three in zip(OUTPUTS, got, eager, truth, strict=True):
        hold(what, *three)
    assert (got[1][-1] != whole[1][-1]).any() and (got[2][-1] != whole[2][-1]).any(), "silent rows decay and move"
    again = step(kernels.segment_adam_, given, whole, extra, step=torch.tensor(3.0))
    assert all(map(torch.equal, got, again)), "runs repeat to the bit"


@pytest.mark.parametrize("D", [6, 4100])
def test_fused_step_is_gradients_projection_and_adam(D):
    codes = make_codes(5, 4, [2] * 5)
    csc, coefs = build_csc(codes), [torch.randn(5, 2) for _ in range(2)]
    rows = [torch.randn(5, D) for _ in range(2)]
    whole, extra = matrices(4, D), aux_rows(4, D)
    by_parts = [t.clone() for t in whole]
    g_dec, g_enc, _ = kernels.weight_grads(csc, coefs[0], rows[0], coefs[1], rows[1])
    for g, more in ((g_dec, extra[1]), (g_enc, extra[2])):
        g[extra[0]] += more
    row_adam_(by_parts[0], *by_parts[2:4], g_dec, unit_norm=True, **ADAM)
    row_adam_(by_parts[1], *by_parts[4:6], g_enc, unit_norm=False, **ADAM)
    g_dec -= (g_dec * whole[0]).sum(1, keepdim=True) * whole[0]
    got = step(kernels.segment_adam_, (csc, coefs[0], rows[0], coefs[1], rows[1]), whole, extra)
    for name, mine, other in zip(OUTPUTS, got, [*by_parts, g_dec.square().sum(1) + g_enc.square().sum(1)], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(got[0].norm(dim=1), torch.ones(4))


def test_several_fused_steps_follow_the_reference():
    whole = [t.double() for t in matrices(9, 7)]
    mine = [t.float() for t in whole]
    eager = [t.float() for t in whole]
    for number in range(1, 5):
        codes = make_codes(12, 9, [3] * 12, seed=number)
        given = (build_csc(codes), *(t for _ in range(2) for t in (torch.randn(12, 3), torch.randn(12, 7))))
        options = {**ADAM, "step": number}
        reference.segment_adam_(given[0], *doubled(given[1:]), *whole, **options)
        reference.segment_adam_(*given, *eager, **options)
        kernels.segment_adam_(*given, *mine, **options)
    for name, *three in zip(OUTPUTS, mine, eager, whole):
        hold(name, *three)


def test_a_nan_stays_with_the_features_of_its_row():
    codes = Codes.rowwise(torch.ones(3, 2), torch.tensor([[0, 1], [1, 2], [3, 4]]), 5)
    rows = torch.ones(3, 4)
    rows[1, 2] = torch.nan
    csc, ones = build_csc(codes), torch.ones(3, 2)
    g_dec, _, _ = kernels.weight_grads(csc, ones, rows, ones, torch.ones(3, 4))
    assert g_dec.isnan().any(1).tolist() == [False, True, True, False, False]
    got = step(kernels.segment_adam_, (csc, ones, rows, ones, torch.ones(3, 4)), matrices(5, 4), None)
    assert got[0].isnan().any(1).tolist() == [False, True, True, False, False]
    assert got[6].isnan().tolist() == [False, True, True, False, False]
    assert not got[1].isnan().any()
