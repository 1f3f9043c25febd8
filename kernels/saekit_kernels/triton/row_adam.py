"""Adam by rows, in place, with projection of the gradient and unit norm where asked.

    row_adam_(w, m, v, grad, step=t, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8, unit_norm=True)

A row that must keep its norm is one program, whole in registers up to 4096 columns, in three passes above. Without
`unit_norm` every slice of a row is a program of its own. What depends on the step is computed on the device, so that a graph
can be captured and replayed.

F rows · D width · BD width of a slice, or of a whole row padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels.triton.shipped import Shipped

# Whole rows: BD → warps, four floats per thread where the row has enough of them, so that loads have 128 bits
WHOLE = {256: 2, 512: 4, 1024: 8, 2048: 8, 4096: 16}
SLICE, SLICE_WARPS = 1024, 8
WIDE, WIDE_WARPS = 4096, 16


@triton.jit
def adam(g, w, m, v, rate, correction, b1, b2, rest1, rest2, eps):
    """w, m and v after a step; rate = lr / (1 − b1ᵗ), correction = 1 / (1 − b2ᵗ), rest = 1 − b.

    Columns behind the last one are loaded as v = 1, the rest as 0: with eps = 0 they would divide 0 by 0.
    """
    m = b1 * m + rest1 * g
    v = b2 * v + rest2 * g * g
    w -= rate * m / (tl.sqrt(v * correction) + eps)
    return w, m, v


@triton.jit
def without_component(g, w):
    """g without its part along a row w of norm 1."""
    return g - tl.sum(g * w, 0) * w


@triton.jit
def norm_of(square):
    """Of the sum of squares, at least 1e-12; NaN stays NaN, so that it spoils the whole row as it does elsewhere."""
    return tl.maximum(tl.sqrt(square), 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def of_norm_1(w):
    return w / norm_of(tl.sum(w * w, 0))


@triton.jit
def _adam(
    w_ptr, m_ptr, v_ptr, grad_ptr, factors_ptr, D, b1, b2, rest1, rest2, eps, UNIT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    place = tl.program_id(0).to(tl.int64) * D + column
    mask = column < D
    w = tl.load(w_ptr + place, mask=mask, other=0.0)
    m = tl.load(m_ptr + place, mask=mask, other=0.0)
    v = tl.load(v_ptr + place, mask=mask, other=1.0)
    g = tl.load(grad_ptr + place, mask=mask, other=0.0) * tl.load(factors_ptr + 2)
    if UNIT:
        g = without_component(g, w)
    w, m, v = adam(g, w, m, v, tl.load(factors_ptr), tl.load(factors_ptr + 1), b1, b2, rest1, rest2, eps)
    if UNIT:
        w = of_norm_1(w)
    tl.store(w_ptr + place, w, mask=mask)
    tl.store(m_ptr + place, m, mask=mask)
    tl.store(v_ptr + place, v, mask=mask)


@triton.jit
def _adam_wide(w_ptr, m_ptr, v_ptr, grad_ptr, factors_ptr, D, b1, b2, rest1, rest2, eps, BD: tl.constexpr):
    """A row of norm 1 that is too wide for registers: its inner product with the gradient, the step, the norm."""
    row = tl.program_id(0).to(tl.int64) * D
    rate, correction, scale = tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
    along = tl.zeros((BD,), tl.float32)
    for lo in range(0, D, BD):
        column = lo + tl.arange(0, BD)
        w = tl.load(w_ptr + row + column, mask=column < D, other=0.0)
        along += tl.load(grad_ptr + row + column, mask=column < D, other=0.0) * scale * w
    component = tl.sum(along, 0)
    square = tl.zeros((BD,), tl.float32)
    for lo in range(0, D, BD):
        column = lo + tl.arange(0, BD)
        mask = column < D
        place = row + column
        w = tl.load(w_ptr + place, mask=mask, other=0.0)
        m = tl.load(m_ptr + place, mask=mask, other=0.0)
        v = tl.load(v_ptr + place, mask=mask, other=1.0)
        g = tl.load(grad_ptr + place, mask=mask, other=0.0) * scale - component * w
        w, m, v = adam(g, w, m, v, rate, correction, b1, b2, rest1, rest2, eps)
        square += w * w
        tl.store(w_ptr + place, w, mask=mask)
        tl.store(m_ptr + place, m, mask=mask)
        tl.store(v_ptr + place, v, mask=mask)
    norm = norm_of(tl.sum(square, 0))
    # the last loop may read what another thread has written
    tl.debug_barrier()
    for lo in range(0, D, BD):
        column = lo + tl.arange(0, BD)
        w = tl.load(w_ptr + row + column, mask=column < D, other=0.0)
        tl.store(w_ptr + row + column, w / norm, mask=column < D)


def step_factors(step, lr, b1: float, b2: float, scale, device: torch.device) -> Tensor:
    """(3) float32 on the device: lr / (1 − b1ᵗ), 1 / (1 − b2ᵗ), scale. `step`, `lr` and `scale` may be device tensors."""

    def there(number) -> Tensor:
        # a number is filled in, not copied: a copy cannot be captured
        if isinstance(number, Tensor) and number.device.type == device.type:
            return number.detach().to(torch.float64).reshape(())
        return torch.full((), float(number), dtype=torch.float64, device=device)

    t = there(step)
    factors = (there(lr) / (1 - b1**t), 1 / (1 - b2**t), there(1.0 if scale is None else scale))
    return torch.stack(factors).to(torch.float32)


def betas(b1: float, b2: float, eps: float) -> tuple[float, float, float, float, float]:
    """What the kernels take: b1, b2, 1 − b1, 1 − b2, eps."""
    return float(b1), float(b2), 1.0 - b1, 1.0 - b2, float(eps)


def check_in_place(*matrices: Tensor) -> None:
    """Raises ValueError for what a kernel could not write as rows of D floats."""
    for t in matrices:
        if t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(
                f"a {t.dtype} matrix with strides {t.stride()}: the Triton path writes contiguous float32 matrices; "
                "call .contiguous() on it first"
            )


def whole_block(D: int) -> int:
    """Block of a row that is whole in registers."""
    return max(min(WHOLE), triton.next_power_of_2(D))


def row_adam_(w, m, v, grad, *, step, lr, b1, b2, eps, unit_norm, grad_scale=None) -> None:
    """Equivalent to `reference.row_adam_`."""
    F, D = w.shape
    check_in_place(w, m, v)
    if not w.numel():
        return
    factors = step_factors(step, lr, b1, b2, grad_scale, w.device)
    arguments = (w, m, v, grad.contiguous(), factors, D, *betas(b1, b2, eps))
    if not unit_norm:
        grid = (F, triton.cdiv(D, SLICE))
        _adam[grid](*arguments, UNIT=False, BD=SLICE, num_warps=SLICE_WARPS)
    elif (BD := whole_block(D)) in WHOLE:
        _adam[(F, 1)](*arguments, UNIT=True, BD=BD, num_warps=WHOLE[BD])
    else:
        _adam_wide[(F,)](*arguments, BD=WIDE, num_warps=WIDE_WARPS)


NUMBERS = dict.fromkeys(("b1", "b2", "rest1", "rest2", "eps"), "fp32")
_TYPES = {**dict.fromkeys(("w_ptr", "m_ptr", "v_ptr", "grad_ptr", "factors_ptr"), "*fp32"), "D": "i32", **NUMBERS}
SHIPPED = [
    *(Shipped(_adam, _TYPES, {"UNIT": True, "BD": BD}, warps, gather=True) for BD, warps in WHOLE.items()),
    Shipped(_adam, _TYPES, {"UNIT": False, "BD": SLICE}, SLICE_WARPS, gather=True),
    Shipped(_adam_wide, _TYPES, {"BD": WIDE}, WIDE_WARPS, gather=True),
]
