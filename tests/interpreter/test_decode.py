"""decode, decode_residual_value_grad and pair_dots as Triton kernels: error against float64, both forms, ragged shapes, NaN."""

import pytest
import torch
from saekit_kernels import Codes, reference
from saekit_kernels import triton as kernels

FORMS = ["rowwise", "flat", "ragged rows"]
# B, D, F, K: one slot, one feature; fewer features than slots in a block; widths of one slice, a slice and a bit, three slices;
# every block of slots that is held whole, and rows that are longer
SHAPES = [
    (1, 1, 1, 1), (7, 3, 5, 5), (5, 33, 70, 7), (6, 129, 40, 1), (4, 128, 90, 33), (3, 300, 120, 100), (3, 70, 210, 200),
    (6, 20, 270, 260),
]  # fmt: skip


def make_codes(B, F, K, form, seed=0):
    """A tenth of the slots is empty, and so is the last row. "ragged rows" have 0 to 2K slots."""
    generator = torch.Generator().manual_seed(seed)
    counts = [K] * B
    if form == "ragged rows":
        counts = torch.randint(0, min(F, 2 * K) + 1, (B,), generator=generator).tolist()
    order = torch.rand(B, F, generator=generator).argsort(1)
    indices = torch.cat([row[:n].sort().values for row, n in zip(order, counts)])
    values = torch.randn(len(indices), generator=generator)
    values[torch.rand(len(indices), generator=generator) < 0.1] = 0
    if B > 1:
        values[len(indices) - counts[-1] :] = 0
    if form == "rowwise":
        return Codes.rowwise(values.view(B, K), indices.view(B, K), F)
    return Codes.flat(torch.tensor([0, *counts]).cumsum(0), indices, values, F)


def wide(codes):
    return codes.with_values(codes.values.double())


def unused_rows_are_nan(W, codes):
    """W with NaN in every row that no live slot names."""
    return W.masked_fill(~codes.fired_F()[:, None], torch.nan)


def hold(name, got, eager, truth):
    """The rule: RMS-relative error at most 1.1 × that of eager torch in float32 + 1e-7."""
    assert got.shape == truth.shape and got.dtype == torch.float32, name
    if not truth.numel():
        return
    size = truth.square().mean().sqrt().clamp_min(1e-30)
    error, allowed = (((t.double() - truth).square().mean().sqrt() / size).item() for t in (got, eager))
    assert error <= 1.1 * allowed + 1e-7, (name, error, allowed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("B", "D", "F", "K"), SHAPES)
def test_error_is_no_larger_than_that_of_eager_torch(form, B, D, F, K):
    codes = make_codes(B, F, K, form)
    W, b, target = torch.randn(F, D), torch.randn(D), torch.randn(B, D)
    planted = unused_rows_are_nan(W, codes)
    exact = (W.double(), b.double(), target.double())

    y = kernels.decode(codes, planted, b)
    hold("y", y, reference.decode(codes, W, b), reference.decode(wide(codes), *exact[:2]))

    got = kernels.decode_residual_value_grad(codes, planted, b, target)
    eager = reference.decode_residual_value_grad(codes, W, b, target)
    truth = reference.decode_residual_value_grad(wide(codes), *exact)
    for name, *three in zip(("sq", "residual", "dv"), got, eager, truth):
        hold(name, *three)
    assert (got[2][codes.values == 0] == 0).all(), "empty slots get exactly 0"

    dots = kernels.pair_dots(codes, target, planted)
    hold("dots", dots, reference.pair_dots(codes, target, W), reference.pair_dots(wide(codes), exact[2], exact[0]))
    assert (dots[codes.values == 0] == 0).all()

    for again, first in zip((*kernels.decode_residual_value_grad(codes, planted, b, target), y), (*got, y)):
        assert torch.equal(again, first), "runs repeat to the bit"


def test_by_hand():
    # row 0: feature 1 → 2, feature 3 → −1;  row 1: nothing;  row 2: feature 0 → 4
    codes = Codes.rowwise(torch.tensor([[2.0, -1], [0, 0], [4, 0]]), torch.tensor([[1, 3], [0, 1], [0, 2]]), 4)
    W = torch.tensor([[1.0, 0], [0, 1], [5, 5], [2, 2]])
    b = torch.tensor([10.0, 20])
    # row 0: 2·(0, 1) − 1·(2, 2) = (−2, 0);  row 1: the bias alone;  row 2: 4·(1, 0)
    assert kernels.decode(codes, W, b).tolist() == [[8, 20], [10, 20], [14, 20]]
    sq, residual, dv = kernels.decode_residual_value_grad(codes, W, b, torch.tensor([[9.0, 22], [10, 20], [14, 19]]))
    assert residual.tolist() == [[1, 2], [0, 0], [0, -1]] and sq.tolist() == [5, 0, 1]
    # (1, 2)·(0, 1) = 2, (1, 2)·(2, 2) = 6, (0, −1)·(1, 0) = 0
    assert dv.tolist() == [[2, 6], [0, 0], [0, 0]]
    # (1, 2)·(0, 1) = 2, (1, 2)·(2, 2) = 6, (5, 6)·(1, 0) = 5
    dots = kernels.pair_dots(codes, torch.tensor([[1.0, 2], [3, 4], [5, 6]]), W)
    assert dots.tolist() == [[2, 6], [0, 0], [5, 0]]


@pytest.mark.parametrize("form", ["rowwise", "flat"])
def test_a_row_alone_gives_the_bits_it_gives_in_a_batch(form):
    codes = make_codes(5, 70, 40, form)
    W, b, target = torch.randn(70, 150), torch.randn(150), torch.randn(5, 150)
    sq, residual, dv = kernels.decode_residual_value_grad(codes, W, b, target)
    for row in range(5):
        alone = kernels.decode_residual_value_grad(codes.rows(row, row + 1), W, b, target[row : row + 1])
        assert torch.equal(alone[0], sq[row : row + 1]) and torch.equal(alone[1], residual[row : row + 1])
        assert torch.equal(alone[2].flatten(), dv.view(5, -1)[row])


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_stays_in_its_row_and_out_of_empty_slots(form):
    codes = make_codes(4, 30, 6, form)
    values = codes.values.clone()
    first = torch.nonzero(codes.slot_rows() == 1)[:2, 0]
    values.view(-1)[first] = torch.tensor([torch.nan, 0.0])
    codes = codes.with_values(values)
    W, b, target = torch.randn(30, 9), torch.randn(9), torch.randn(4, 9)
    sq, residual, dv = kernels.decode_residual_value_grad(codes, unused_rows_are_nan(W, codes), b, target)
    others = torch.tensor([0, 2, 3])
    assert residual[1].isnan().all() and sq[1].isnan()
    assert residual[others].isfinite().all() and sq[others].isfinite().all()
    live = codes.values.view(-1) != 0
    in_row = codes.slot_rows() == 1
    assert dv.view(-1)[in_row & live].isnan().all()
    assert (dv.view(-1)[~live] == 0).all() and dv.view(-1)[~in_row].isfinite().all()


@pytest.mark.parametrize("form", ["rowwise", "flat"])
@pytest.mark.parametrize("K", [5, 260])
def test_bfloat16_rows_are_added_in_float32(form, K):
    codes = make_codes(3, 270, K, form)
    W, b, target = torch.randn(270, 270).bfloat16(), torch.randn(270), torch.randn(3, 270)
    got = kernels.decode_residual_value_grad(codes, unused_rows_are_nan(W, codes), b, target)
    eager = reference.decode_residual_value_grad(codes, W.float(), b, target)
    truth = reference.decode_residual_value_grad(wide(codes), W.double(), b.double(), target.double())
    for name, *three in zip(("sq", "residual", "dv"), got, eager, truth):
        hold(name, *three)
    hold("y", kernels.decode(codes, W, b), reference.decode(codes, W.float(), b), target.double() - truth[1])


def test_no_rows_and_no_firings():
    W, b = torch.full((4, 5), torch.nan), torch.arange(5.0)
    silent = Codes.flat(torch.tensor([0, 0, 0]), torch.zeros(0), torch.zeros(0), 4)
    assert torch.equal(kernels.decode(silent, W, b), b.expand(2, 5))
    sq, residual, dv = kernels.decode_residual_value_grad(silent, W, b, torch.zeros(2, 5))
    assert sq.tolist() == [30, 30] and torch.equal(residual, -b.expand(2, 5)) and dv.shape == (0,)
    assert kernels.pair_dots(silent, torch.ones(2, 5), W).shape == (0,)
    empty = Codes.rowwise(torch.zeros(0, 3), torch.zeros(0, 3), 4)
    assert kernels.decode(empty, W, b).shape == (0, 5)
    sq, residual, dv = kernels.decode_residual_value_grad(empty, W, b, torch.zeros(0, 5))
    assert sq.shape == (0,) and residual.shape == (0, 5) and dv.shape == (0, 3)
    no_slots = Codes.rowwise(torch.zeros(2, 0), torch.zeros(2, 0), 4)
    assert torch.equal(kernels.decode(no_slots, W, b), b.expand(2, 5))


def test_strides_do_not_matter():
    codes = make_codes(4, 20, 3, "rowwise")
    W, b, target = torch.randn(9, 20).T, torch.randn(1).expand(9), torch.randn(9, 4).T
    got = kernels.decode_residual_value_grad(codes, W, b, target)
    for one, other in zip(got, reference.decode_residual_value_grad(codes, W, b, target)):
        torch.testing.assert_close(one, other)


def test_other_types_are_refused():
    codes = make_codes(2, 5, 2, "rowwise")
    with pytest.raises(ValueError, match=r"torch.float16: the Triton kernels gather rows of float32 or bfloat16"):
        kernels.decode(codes, torch.zeros(5, 3, dtype=torch.float16), torch.zeros(3))
