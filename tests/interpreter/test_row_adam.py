"""row_adam_ as a Triton kernel: against the reference in float64, against torch.optim.Adam over several steps, to the bit."""

import pytest
import torch
from saekit_kernels import reference
from saekit_kernels.triton import row_adam as kernels

ADAM = {"lr": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-6}
# one column, ragged, a block that fits, more than one slice; 5000: a row of norm 1 that is too wide for registers
WIDTHS = [1, 33, 256, 1030, 5000]


def state(F, D, unit_norm):
    w = torch.randn(F, D)
    if unit_norm:
        w = w / w.norm(dim=1, keepdim=True)
    grad = torch.randn(F, D)
    grad[1] = 0
    return w, torch.randn(F, D) * 0.1, torch.rand(F, D) * 0.1, grad


def hold(name, got, eager, truth):
    """The rule: RMS-relative error at most 1.1 × that of eager torch in float32 + 1e-7."""
    size = truth.square().mean().sqrt()
    error, allowed = (((t.double() - truth).square().mean().sqrt() / size).item() for t in (got, eager))
    assert error <= 1.1 * allowed + 1e-7, (name, error, allowed)


def run(function, tensors, dtype=torch.float32, **options):
    w, m, v, grad = (t.to(dtype, copy=True) for t in tensors)
    function(w, m, v, grad, **ADAM, **options)
    assert torch.equal(grad, tensors[3].to(dtype)), "the gradient is only read"
    return w, m, v


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("grad_scale", [None, 0.3])
def test_error_is_no_larger_than_that_of_eager_torch(unit_norm, D, grad_scale):
    tensors = state(3, D, unit_norm)
    options = {"step": 3, "unit_norm": unit_norm, "grad_scale": grad_scale}
    truth = run(reference.row_adam_, tensors, torch.float64, **options)
    eager = run(reference.row_adam_, tensors, **options)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    got = run(kernels.row_adam_, tensors, **{**options, "grad_scale": scale})
    for name, *three in zip("wmv", got, eager, truth):
        hold(name, *three)
    if unit_norm:
        torch.testing.assert_close(got[0].norm(dim=1), torch.ones(3))
    # numbers or tensors, any run: the same bits
    again = run(kernels.row_adam_, tensors, **{**options, "step": torch.tensor(3.0)})
    assert all(map(torch.equal, got, again))


@pytest.mark.parametrize("D", [7, 300])
def test_without_unit_norm_it_is_torch_adam(D):
    w = torch.randn(4, D)
    m, v = torch.zeros(4, D), torch.zeros(4, D)
    leaves = [torch.nn.Parameter(w.to(dtype, copy=True)) for dtype in (torch.float64, torch.float32)]
    adams = [torch.optim.Adam([leaf], lr=0.01, betas=(0.9, 0.99), eps=1e-6) for leaf in leaves]
    for step in range(1, 5):
        grad = torch.randn(4, D)
        kernels.row_adam_(w, m, v, grad, step=step, unit_norm=False, **ADAM)
        for leaf, adam in zip(leaves, adams):
            leaf.grad = grad.to(leaf.dtype)
            adam.step()
    hold("w", w, leaves[1].detach(), leaves[0].detach())
    for name, mine, key in (("m", m, "exp_avg"), ("v", v, "exp_avg_sq")):
        hold(name, mine, *(adam.state[leaf][key] for leaf, adam in zip(leaves[::-1], adams[::-1])))


def test_by_hand():
    # unit row (0.6, 0.8), g = (1, 0): g·w = 0.6, projected (0.64, −0.48); first step, so m̂ = g, √v̂ = |g|: w moves against the
    # signs by lr, to (0.5, 0.9)
    w, m, v = torch.tensor([[0.6, 0.8]]), torch.zeros(1, 2), torch.zeros(1, 2)
    grad = torch.tensor([[1.0, 0.0]])
    kernels.row_adam_(w, m, v, grad, step=1, lr=0.1, b1=0.5, b2=0.75, eps=0.0, unit_norm=True)
    torch.testing.assert_close(w, torch.tensor([[0.5, 0.9]]) / 1.06**0.5)
    torch.testing.assert_close(m, torch.tensor([[0.32, -0.24]]))
    torch.testing.assert_close(v, torch.tensor([[0.64**2 / 4, 0.48**2 / 4]]))


@pytest.mark.parametrize("D", [5, 4100])
def test_a_row_of_zeros_stays_finite_and_a_nan_stays_in_its_row(D):
    w, m, v, grad = (torch.zeros(4, D) for _ in range(4))
    w[1:, 0] = 1
    grad[2, 3] = m[3, 2] = torch.nan
    kernels.row_adam_(w, m, v, grad, step=1, unit_norm=True, **ADAM)
    assert not w[0].any(), "0 / max(0, 1e-12)"
    assert w[1].tolist() == [1] + [0] * (D - 1)
    assert w[2].isnan().all() and w[3].isnan().all()


def test_no_rows():
    kernels.row_adam_(*(torch.zeros(0, 4) for _ in range(4)), step=1, unit_norm=True, **ADAM)


def test_strides_are_refused_where_a_matrix_is_written():
    w, m, v, grad = (torch.zeros(3, 4) for _ in range(4))
    with pytest.raises(ValueError, match=r"with strides \(1, 3\): the Triton path writes contiguous float32 matrices"):
        kernels.row_adam_(w, torch.zeros(4, 3).T, v, grad, step=1, unit_norm=True, **ADAM)
    kernels.row_adam_(w, m, v, torch.zeros(1, 4).expand(3, 4), step=1, unit_norm=True, **ADAM)
