"""decode, decode_residual_value_grad and pair_dots: values by hand, both forms, every path, every gradient by name."""

import pytest
import torch
from saekit_kernels import Codes, decode, decode_residual_value_grad, pair_dots, using

PATHS = ["reference", "portable", "cpu"]

# row 0: feature 1 → 2, feature 3 → −1     row 1: nothing     row 2: feature 0 → 4
ROWWISE = Codes.rowwise(torch.tensor([[2.0, -1], [0, 0], [4, 0]]), torch.tensor([[1, 3], [0, 1], [0, 2]]), 4)
FLAT = Codes.flat(torch.tensor([0, 3, 3, 4]), torch.tensor([1, 2, 3, 0]), torch.tensor([2.0, 0, -1, 4]), 4)
W = torch.tensor([[1.0, 0], [0, 1], [5, 5], [2, 2]])
B_DEC = torch.tensor([10.0, 20])

both = pytest.mark.parametrize("codes", [ROWWISE, FLAT], ids=["rowwise", "flat"])
every_path = pytest.mark.parametrize("path", PATHS)


@both
@every_path
def test_decode_by_hand(codes, path):
    with using(path):
        # row 0: 2·(0, 1) − 1·(2, 2) = (−2, 0);  row 1: the bias alone;  row 2: 4·(1, 0)
        assert decode(codes, W, B_DEC).tolist() == [[8, 20], [10, 20], [14, 20]]


@both
@every_path
def test_residual_and_value_gradient_by_hand(codes, path):
    target = torch.tensor([[9.0, 22], [10, 20], [14, 19]])
    with using(path):
        sq, residual, dv = decode_residual_value_grad(codes, W, B_DEC, target)
    assert residual.tolist() == [[1, 2], [0, 0], [0, -1]]
    assert sq.tolist() == [5, 0, 1]
    # r·W: (1, 2)·(0, 1) = 2, (1, 2)·(2, 2) = 6, (0, −1)·(1, 0) = 0; empty slots 0
    assert dv.tolist() == ([[2, 6], [0, 0], [0, 0]] if codes is ROWWISE else [2, 0, 6, 0])


@both
@every_path
def test_pair_dots_by_hand(codes, path):
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    with using(path):
        dots = pair_dots(codes, x, W)
    # (1, 2)·(0, 1) = 2, (1, 2)·(2, 2) = 6, (5, 6)·(1, 0) = 5
    assert dots.tolist() == ([[2, 6], [0, 0], [5, 0]] if codes is ROWWISE else [2, 0, 6, 5])


def random_codes(batch, n_features, k, form, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(batch, n_features, generator=generator).argsort(1)[:, :k].sort(1).values
    values = torch.randn(batch, k, generator=generator, dtype=torch.float64)
    # a tenth of the slots is empty
    values = torch.where(torch.rand(batch, k, generator=generator) < 0.1, 0, values).to(dtype)
    if form == "rowwise":
        return Codes.rowwise(values, indices, n_features)
    return Codes.flat(torch.arange(0, batch * k + 1, k), indices.reshape(-1), values.reshape(-1), n_features)


@pytest.mark.parametrize("form", ["rowwise", "flat"])
@pytest.mark.parametrize("path", ["portable", "cpu"])
@pytest.mark.parametrize(
    ("batch", "width", "n_features", "k"), [(64, 3, 5, 5), (50, 33, 70, 7), (17, 192, 1000, 32), (60, 770, 40, 1)]
)
def test_error_is_no_larger_than_that_of_eager_torch(form, path, batch, width, n_features, k):
    codes = random_codes(batch, n_features, k, form)
    W, b, target = torch.randn(n_features, width), torch.randn(width), torch.randn(batch, width)
    truth = decode_residual_value_grad(
        codes.with_values(codes.values.double()), W.double(), b.double(), target.double()
    )
    eager_residual = target - (codes.dense() @ W + b)
    eager_dv = (eager_residual @ W.T)[codes.slot_rows(), codes.indices.reshape(-1).long()].view_as(codes.values)
    eager = (eager_residual.square().sum(1), eager_residual, torch.where(codes.values != 0, eager_dv, 0))
    with using(path):
        got = decode_residual_value_grad(codes, W, b, target)
    for name, value, plain, exact in zip(("sq", "residual", "dv"), got, eager, truth):
        size = exact.square().mean().sqrt()
        error = ((value - exact).square().mean().sqrt() / size).item()
        assert error <= ((plain - exact).square().mean().sqrt() / size).item() * 1.1 + 1e-7, name


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("form", ["rowwise", "flat"])
@every_path
def test_every_gradient_of_decode(form, path):
    codes = random_codes(23, 60, 7, form)
    weight = torch.randn(23, 12)
    values, W, b = leaves(codes.values, torch.randn(60, 12), torch.randn(12))
    with using(path):
        got = torch.autograd.grad((decode(codes.with_values(values), W, b) * weight).sum(), [values, W, b])
    values, W, b = leaves(values, W, b)
    live = codes.with_values(torch.where(codes.values != 0, values, 0))
    want = torch.autograd.grad(((live.dense() @ W + b) * weight).sum(), [values, W, b])
    for name, g, w in zip(("values", "W_dec", "b_dec"), got, want):
        torch.testing.assert_close(g, w, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("form", ["rowwise", "flat"])
@every_path
def test_every_gradient_of_the_squared_error(form, path):
    codes = random_codes(23, 60, 7, form)
    s = torch.rand(23)
    inputs = (codes.values, torch.randn(60, 12), torch.randn(12), torch.randn(23, 12))
    values, W, b, target = leaves(*inputs)
    with using(path):
        out = decode_residual_value_grad(codes.with_values(values), W, b, target)
    assert not out.residual_BD.requires_grad and not out.dv.requires_grad
    got = torch.autograd.grad((out.sq_B * s).sum(), [values, W, b, target])
    values, W, b, target = leaves(*inputs)
    live = codes.with_values(torch.where(codes.values != 0, values, 0))
    sq = (target - live.dense() @ W - b).square().sum(1)
    want = torch.autograd.grad((sq * s).sum(), [values, W, b, target])
    for name, g, w in zip(("values", "W_dec", "b_dec", "target"), got, want):
        torch.testing.assert_close(g, w, msg=lambda m, name=name: f"{name}: {m}")
    # the plain numbers say the same as the graph: dL/dvalue = −2 s dv
    rows = codes.slot_rows().view_as(codes.values)
    torch.testing.assert_close(got[0], -2 * s[rows] * out.dv)


@pytest.mark.parametrize("form", ["rowwise", "flat"])
@every_path
def test_every_gradient_of_pair_dots(form, path):
    codes = random_codes(9, 30, 4, form)
    weight = torch.randn(codes.values.shape)
    x, W = leaves(torch.randn(9, 6), torch.randn(30, 6))
    with using(path):
        got = torch.autograd.grad((pair_dots(codes, x, W) * weight).sum(), [x, W])
    x, W = leaves(x, W)
    dense = x @ W.T
    picked = dense[codes.slot_rows(), codes.indices.reshape(-1).long()].view_as(codes.values)
    want = torch.autograd.grad((torch.where(codes.values != 0, picked, 0) * weight).sum(), [x, W])
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@every_path
def test_expanded_and_transposed_incoming_gradients(path):
    codes = random_codes(8, 20, 3, "rowwise")
    values, W, b = leaves(codes.values, torch.randn(20, 5), torch.randn(5))
    with using(path):
        y = decode(codes.with_values(values), W, b)
        expanded = torch.autograd.grad(y.sum(), [values, W, b], retain_graph=True)
        transposed = torch.autograd.grad(y.T @ torch.eye(8), [values, W, b], torch.ones(8, 5).T)
    for one, other in zip(expanded, transposed):
        torch.testing.assert_close(one, other)
    assert expanded[2].tolist() == [8.0] * 5


def test_gradcheck_in_float64():
    for form in ("rowwise", "flat"):
        codes = random_codes(4, 9, 3, form, torch.float64)
        values, W, b, target = leaves(
            torch.where(codes.values == 0, 0.5, codes.values),
            *(torch.randn(*n, dtype=torch.float64) for n in ((9, 2), (2,), (4, 2))),
        )
        assert torch.autograd.gradcheck(lambda v, W, b, c=codes: decode(c.with_values(v), W, b), (values, W, b))
        assert torch.autograd.gradcheck(
            lambda v, W, b, t, c=codes: decode_residual_value_grad(c.with_values(v), W, b, t)[0], (values, W, b, target)
        )


@every_path
def test_no_rows_and_no_firings(path):
    W, b = torch.ones(4, 5), torch.arange(5.0)
    silent = Codes.flat(torch.tensor([0, 0, 0]), torch.zeros(0), torch.zeros(0), 4)
    with using(path):
        assert torch.equal(decode(silent, W, b), b.expand(2, 5))
        sq, residual, dv = decode_residual_value_grad(silent, W, b, torch.zeros(2, 5))
        assert sq.tolist() == [30, 30] and torch.equal(residual, -b.expand(2, 5)) and dv.shape == (0,)
        empty = Codes.rowwise(torch.zeros(0, 3), torch.zeros(0, 3), 4)
        assert decode(empty, W, b).shape == (0, 5)
        assert decode_residual_value_grad(empty, W, b, torch.zeros(0, 5)).dv.shape == (0, 3)


def test_half_precision_weights_are_accumulated_in_float32():
    codes = random_codes(6, 30, 5, "rowwise")
    W, b = torch.randn(30, 8).bfloat16(), torch.randn(8).bfloat16()
    got = decode(codes, W, b)
    assert got.dtype == torch.float32
    assert torch.equal(got, decode(codes, W.float(), b.float()))


def test_autocast_does_not_reach_inside():
    codes = random_codes(6, 30, 5, "rowwise")
    W, b = torch.randn(30, 8), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decode(codes, W, b)
    assert inside.dtype == torch.float32 and torch.equal(inside, decode(codes, W, b))


def test_refusals():
    with pytest.raises(ValueError, match=r"W_dec has shape \(5, 2\), expected \(4, any\)"):
        decode(ROWWISE, torch.zeros(5, 2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"b_dec has shape \(3,\), expected \(2\)"):
        decode(ROWWISE, W, torch.zeros(3))
    with pytest.raises(ValueError, match=r"target has shape \(2, 2\), expected \(3, 2\)"):
        decode_residual_value_grad(ROWWISE, W, B_DEC, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"x has shape \(3, 3\), expected \(3, 2\)"):
        pair_dots(ROWWISE, torch.zeros(3, 3), W)
