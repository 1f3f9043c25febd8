"""Weight gradients by feature, without atomics, and the same with Adam in one kernel.

    csc = build_csc(codes)
    gW_dec_FD, gW_enc_FD, gb_enc_F = weight_grads(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD)
    row_sq_F = segment_adam_(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc,
                             step=t, lr=1e-3, b1=0.9, b2=0.999, eps=1e-8)

A feature's gradient is a sum over its segment of the pair list. Segments differ by three orders of magnitude, so no program
adds up a long one alone:

1. The pair list is cut into windows of WINDOW pairs. A window that lies within one segment is a work item: its sum goes into
   row j of a buffer of partial sums.
2. The program of feature f adds, in this order: the pairs before its first whole window, the windows' sums, the pairs behind
   the last one; at most WINDOW − 1 pairs at either end (a segment without a whole window has at most 2 · WINDOW − 2).
3. A segment longer than LONG pairs, if it is among the HEAVY longest (ties: the first feature), skips both. Its coefficients
   are scattered into a row of a (HEAVY, B) matrix, and one dense product makes these features' gradients.

The dense product multiplies every row of the batch, so a NaN in one of them reaches all heavy features; the loss is NaN then.
The sums of windows take N · D / 16 bytes for the time of the call.

No step of this needs a number on the host. The grid of windows is N / WINDOW, whole or not; a segment has at most B pairs, so
B ≤ LONG says beforehand that there is nothing for 3; and where B is larger the product always has HEAVY rows, those that no
feature needs being zeros. (Waiting for the longest segment would stall the queue of kernels once per step.)

B tokens · D width · F features · N slots in the batch · H heavy features · J windows · A features of AuxK
CH pairs at a time · BD width of a slice, or of a whole row padded to a power of two
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels.portable import _tf32
from saekit_kernels.reference import Csc
from saekit_kernels.triton.row_adam import (
    NUMBERS,
    adam,
    betas,
    check_in_place,
    of_norm_1,
    row_adam_,
    step_factors,
    whole_block,
    without_component,
)
from saekit_kernels.triton.shipped import Shipped

# simulated (spec 4.5, 8): Zipf usage, B = 512, F = 16384, K = 32: the busiest 256 features hold 40 % of all pairs
WINDOW, LONG, HEAVY = 128, 512, 256
# A slice of the width: (CH, BD, warps). Warps share columns alone, so that a thread adds the CH rows in its own registers.
SLICE = (4, 256, 2)
# Whole rows: BD → (CH, warps). Compiled: CH = 4 at 4096 spills 8 bytes on sm_80 in Triton 3.6, CH = 8 anywhere on sm_90 in 3.9.
WHOLE = {256: (4, 2), 512: (4, 4), 1024: (4, 8), 2048: (4, 16), 4096: (2, 16)}
SUM_BLOCK, SCATTER_BLOCK = 128, 1024


@triton.jit
def _add_pairs(
    g_dec, g_enc, total, lo, end, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr, column, D,
    TWO: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """Adds coef · row of the pairs lo to end − 1, CH at a time, and the encoder's coefficients; without TWO: one matrix."""
    for p in range(lo, end, CH):
        at = p + tl.arange(0, CH)
        inside = at < end
        pair = tl.load(pair_ptr + at, mask=inside, other=0)
        token = tl.load(token_ptr + at, mask=inside, other=0).to(tl.int64)
        place = token[:, None] * D + column[None, :]
        mask = inside[:, None] & (column < D)[None, :]
        coef_enc = tl.load(coef_enc_ptr + pair, mask=inside, other=0.0)
        x = tl.load(x_ptr + place, mask=mask, other=0.0)
        if TWO:
            coef_dec = tl.load(coef_dec_ptr + pair, mask=inside, other=0.0)
            residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
            g_dec += tl.sum(coef_dec[:, None] * residual, 0)
        g_enc += tl.sum(coef_enc[:, None] * x, 0)
        total += tl.sum(coef_enc, 0)
    return g_dec, g_enc, total


@triton.jit
def _segment(
    g_dec, g_enc, f, ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
    heavy_ptr, heavy_dec_ptr, heavy_enc_ptr, heavy_total_ptr, part_dec_ptr, part_enc_ptr, part_total_ptr, column, D,
    TWO: tl.constexpr, WINDOW: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """Adds the whole segment of feature f to two rows; returns them and the sum of the encoder's coefficients."""
    first, end = tl.load(ptr_ptr + f), tl.load(ptr_ptr + f + 1)
    h = tl.load(heavy_ptr + f).to(tl.int64)
    # a heavy feature's row is there already: nothing is left of its segment
    end = tl.where(h >= 0, first, end)
    # (the interpreter takes no mask that was a scalar once)
    there = column < tl.where(h >= 0, D, 0)
    if TWO:
        g_dec += tl.load(heavy_dec_ptr + h * D + column, mask=there, other=0.0)
    g_enc += tl.load(heavy_enc_ptr + h * D + column, mask=there, other=0.0)
    total = tl.load(heavy_total_ptr + h, mask=h >= 0, other=0.0)

    first_window, last_window = (first + WINDOW - 1) // WINDOW, end // WINDOW
    split = first_window < last_window
    head = tl.where(split, first_window * WINDOW, end)
    tail = tl.where(split, last_window * WINDOW, end)
    g_dec, g_enc, total = _add_pairs(
        g_dec, g_enc, total, first, head, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
        column, D, TWO, CH,
    )  # fmt: skip
    place = first_window.to(tl.int64) * D + column
    for j in range(first_window, last_window):
        if TWO:
            g_dec += tl.load(part_dec_ptr + place, mask=column < D, other=0.0)
        g_enc += tl.load(part_enc_ptr + place, mask=column < D, other=0.0)
        total += tl.load(part_total_ptr + j)
        place += D
    return _add_pairs(
        g_dec, g_enc, total, tail, end, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
        column, D, TWO, CH,
    )  # fmt: skip


@triton.jit
def _windows(
    ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr, heavy_ptr, feature_ptr,
    part_dec_ptr, part_enc_ptr, part_total_ptr, D,
    TWO: tl.constexpr, WINDOW: tl.constexpr, CH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of the pairs of window j, if they all belong to the feature of its first one and it is not heavy."""
    j, s = tl.program_id(0), tl.program_id(1)
    lo = j * WINDOW
    f = tl.load(feature_ptr + j)
    if (tl.load(ptr_ptr + f + 1) >= lo + WINDOW) & (tl.load(heavy_ptr + f) < 0):
        column = s * BD + tl.arange(0, BD)
        zeros = tl.zeros((BD,), tl.float32)
        g_dec, g_enc, total = _add_pairs(
            zeros, zeros, tl.full((), 0.0, tl.float32), lo, lo + WINDOW, pair_ptr, token_ptr,
            coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr, column, D, TWO, CH,
        )  # fmt: skip
        place = j.to(tl.int64) * D + column
        if TWO:
            tl.store(part_dec_ptr + place, g_dec, mask=column < D)
        tl.store(part_enc_ptr + place, g_enc, mask=column < D)
        tl.store(part_total_ptr + j, total, mask=s == 0)


@triton.jit
def _sums(
    ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
    heavy_ptr, heavy_dec_ptr, heavy_enc_ptr, heavy_total_ptr, part_dec_ptr, part_enc_ptr, part_total_ptr,
    out_dec_ptr, out_enc_ptr, total_ptr, D,
    TWO: tl.constexpr, WINDOW: tl.constexpr, CH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One slice of feature f's row of both gradients; slices are the slow axis, so that B · BD elements of x stay in L2."""
    f, s = tl.program_id(0), tl.program_id(1)
    column = s * BD + tl.arange(0, BD)
    zeros = tl.zeros((BD,), tl.float32)
    g_dec, g_enc, total = _segment(
        zeros, zeros, f, ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
        heavy_ptr, heavy_dec_ptr, heavy_enc_ptr, heavy_total_ptr, part_dec_ptr, part_enc_ptr, part_total_ptr, column, D,
        TWO, WINDOW, CH,
    )  # fmt: skip
    place = f.to(tl.int64) * D + column
    if TWO:
        tl.store(out_dec_ptr + place, g_dec, mask=column < D)
    tl.store(out_enc_ptr + place, g_enc, mask=column < D)
    tl.store(total_ptr + f, total, mask=s == 0)


@triton.jit
def _segment_adam(
    ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
    heavy_ptr, heavy_dec_ptr, heavy_enc_ptr, heavy_total_ptr, part_dec_ptr, part_enc_ptr, part_total_ptr,
    extra_ptr, extra_dec_ptr, extra_enc_ptr,
    W_dec_ptr, W_enc_ptr, m_dec_ptr, v_dec_ptr, m_enc_ptr, v_enc_ptr, factors_ptr, row_sq_ptr, D,
    b1, b2, rest1, rest2, eps,
    WINDOW: tl.constexpr, CH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Both gradients of feature f in registers, then Adam on both rows."""
    f = tl.program_id(0)
    column = tl.arange(0, BD)
    mask = column < D
    a = tl.load(extra_ptr + f).to(tl.int64)
    there = column < tl.where(a >= 0, D, 0)
    g_dec = tl.load(extra_dec_ptr + a * D + column, mask=there, other=0.0)
    g_enc = tl.load(extra_enc_ptr + a * D + column, mask=there, other=0.0)
    g_dec, g_enc, _ = _segment(
        g_dec, g_enc, f, ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, residual_ptr, coef_enc_ptr, x_ptr,
        heavy_ptr, heavy_dec_ptr, heavy_enc_ptr, heavy_total_ptr, part_dec_ptr, part_enc_ptr, part_total_ptr, column, D,
        True, WINDOW, CH,
    )  # fmt: skip
    rate, correction = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    place = f.to(tl.int64) * D + column
    w = tl.load(W_dec_ptr + place, mask=mask, other=0.0)
    g_dec = without_component(g_dec, w)
    tl.store(row_sq_ptr + f, tl.sum(g_dec * g_dec + g_enc * g_enc, 0))
    m = tl.load(m_dec_ptr + place, mask=mask, other=0.0)
    v = tl.load(v_dec_ptr + place, mask=mask, other=1.0)
    w, m, v = adam(g_dec, w, m, v, rate, correction, b1, b2, rest1, rest2, eps)
    tl.store(W_dec_ptr + place, of_norm_1(w), mask=mask)
    tl.store(m_dec_ptr + place, m, mask=mask)
    tl.store(v_dec_ptr + place, v, mask=mask)
    w = tl.load(W_enc_ptr + place, mask=mask, other=0.0)
    m = tl.load(m_enc_ptr + place, mask=mask, other=0.0)
    v = tl.load(v_enc_ptr + place, mask=mask, other=1.0)
    w, m, v = adam(g_enc, w, m, v, rate, correction, b1, b2, rest1, rest2, eps)
    tl.store(W_enc_ptr + place, w, mask=mask)
    tl.store(m_enc_ptr + place, m, mask=mask)
    tl.store(v_enc_ptr + place, v, mask=mask)


@triton.jit
def _scatter(
    ptr_ptr, pair_ptr, token_ptr, coef_dec_ptr, coef_enc_ptr, feature_ptr, dec_ptr, enc_ptr, LONG, B,
    TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Coefficients of the h-th longest segment at their tokens; a feature fires once per row, so no two meet."""
    h = tl.program_id(0)
    f = tl.load(feature_ptr + h)
    first, end = tl.load(ptr_ptr + f), tl.load(ptr_ptr + f + 1)
    at = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(end - first > LONG, end, first)
    pair = tl.load(pair_ptr + at, mask=mask, other=0)
    place = h.to(tl.int64) * B + tl.load(token_ptr + at, mask=mask, other=0)
    if TWO:
        tl.store(dec_ptr + place, tl.load(coef_dec_ptr + pair, mask=mask, other=0.0), mask=mask)
    tl.store(enc_ptr + place, tl.load(coef_enc_ptr + pair, mask=mask, other=0.0), mask=mask)


@triton.jit
def _coef_sums(ptr_ptr, pair_ptr, coef_ptr, total_ptr, BLOCK: tl.constexpr):
    f = tl.program_id(0)
    first, end = tl.load(ptr_ptr + f), tl.load(ptr_ptr + f + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(first, end, BLOCK):
        at = p + tl.arange(0, BLOCK)
        pair = tl.load(pair_ptr + at, mask=at < end, other=0)
        total += tl.load(coef_ptr + pair, mask=at < end, other=0.0)
    tl.store(total_ptr + f, tl.sum(total, 0))


def segment_sum(csc: Csc, coef_N: Tensor, rows_BD: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Equivalent to `reference.segment_sum`."""
    _, sums_FD, total_F = _weight_grads(csc, None, None, coef_N, rows_BD, (None, out))
    return sums_FD, total_F


def weight_grads(
    csc: Csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Equivalent to two `reference.segment_sum`, in one pass over the pair list; the third is Σ coef_enc by feature."""
    return _weight_grads(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out or (None, None))


def feature_sums(csc: Csc, coef_N: Tensor) -> Tensor:
    """Σ coef over each feature's firings, (F)."""
    F = len(csc.ptr) - 1
    total_F = csc.ptr.new_empty(F, dtype=torch.float32)
    if F:
        _coef_sums[(F,)](*csc[:2], _numbers(coef_N), total_F, BLOCK=SUM_BLOCK, num_warps=1)
    return total_F


def segment_adam_(
    csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc, *, extra=None, **adam
) -> Tensor:
    """Equivalent to `reference.segment_adam_`; no gradient in memory up to a width of 4096."""
    F, D = W_dec.shape
    BD = whole_block(D)
    if BD not in WHOLE:
        return _wide_segment_adam_(
            csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc, extra, adam
        )
    matrices = (W_dec, W_enc, m_dec, v_dec, m_enc, v_enc)
    check_in_place(*matrices)
    row_sq_F = W_dec.new_empty(F)
    if not F:
        return row_sq_F
    pairs = _Pairs(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD)
    extra_F = torch.full((F,), -1, dtype=torch.int32, device=W_dec.device)
    extra_dec = extra_enc = W_dec  # never read while the map says −1
    if extra is not None and len(extra[0]):
        ids, extra_dec, extra_enc = extra[0].long(), *(_numbers(rows, flat=False) for rows in extra[1:3])
        extra_F[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    b1, b2 = adam["b1"], adam["b2"]
    factors = step_factors(adam["step"], adam["lr"], b1, b2, None, W_dec.device)
    CH, warps = WHOLE[BD]
    _segment_adam[(F,)](
        *pairs.arguments, *pairs.heavy, *pairs.parts, extra_F, extra_dec, extra_enc, *matrices, factors, row_sq_F, D,
        *betas(b1, b2, adam["eps"]), WINDOW=WINDOW, CH=CH, BD=BD, num_warps=warps,
    )  # fmt: skip
    return row_sq_F


def _wide_segment_adam_(
    csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc, extra, adam
) -> Tensor:
    """Rows that do not fit registers: both gradients in memory, then Adam."""
    g_dec, g_enc, _ = weight_grads(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD)
    if extra is not None:
        g_dec[extra[0]] += extra[1]
        g_enc[extra[0]] += extra[2]
    g_dec.addcmul_(torch.linalg.vecdot(g_dec, W_dec).unsqueeze(1), W_dec, value=-1)
    row_adam_(W_dec, m_dec, v_dec, g_dec, unit_norm=True, **adam)
    row_adam_(W_enc, m_enc, v_enc, g_enc, unit_norm=False, **adam)
    return torch.linalg.vecdot(g_dec, g_dec) + torch.linalg.vecdot(g_enc, g_enc)


class _Pairs:
    """Arguments that the kernels share: the pair list, the rows of heavy features, the sums of whole windows.

    Without a decoder (coef_dec_N None) the encoder's tensors stand in its place and are not read.
    """

    def __init__(self, csc: Csc, coef_dec_N, residual_BD, coef_enc_N, x_BD):
        two = coef_dec_N is not None
        coef_enc_N, x_BD = _numbers(coef_enc_N), _numbers(x_BD, flat=False)
        coef_dec_N, residual_BD = (
            (_numbers(coef_dec_N), _numbers(residual_BD, flat=False)) if two else (coef_enc_N, x_BD)
        )
        self.arguments = (csc.ptr, csc.pair_N, csc.token_N, coef_dec_N, residual_BD, coef_enc_N, x_BD)
        (B, D), F, N = x_BD.shape, len(csc.ptr) - 1, len(csc.pair_N)
        device = x_BD.device

        heavy_F = torch.full((F,), -1, dtype=torch.int32, device=device)
        self.heavy = (heavy_F, x_BD, x_BD, x_BD)
        H = min(HEAVY, F)
        if B > LONG and N:
            length_F = csc.ptr.diff().long()
            # the longest first; of equal ones the first feature
            rank_F = length_F * F + torch.arange(F - 1, -1, -1, device=device)
            feature_H = rank_F.topk(H).indices
            longer_H = length_F[feature_H] > LONG
            number_H = torch.arange(H, dtype=torch.int32, device=device)
            heavy_F[feature_H] = torch.where(longer_H, number_H, -1)
            coefs = torch.zeros(1 + two, H, B, device=device)
            _scatter[(H, triton.cdiv(B, SCATTER_BLOCK))](
                csc.ptr, csc.pair_N, csc.token_N, coef_dec_N, coef_enc_N, feature_H, coefs[0], coefs[-1], LONG, B,
                TWO=two, BLOCK=SCATTER_BLOCK, num_warps=4,
            )  # fmt: skip
            with _tf32(False):
                heavy_enc_HD = coefs[-1] @ x_BD
                heavy_dec_HD = coefs[0] @ residual_BD if two else heavy_enc_HD
            self.heavy = (heavy_F, heavy_dec_HD, heavy_enc_HD, coefs[-1].sum(1))

        J = N // WINDOW
        # no buffer is read unless a window is whole
        part_JD = x_BD.new_empty(1 + two, J, D)
        self.parts = (part_JD[0], part_JD[-1], x_BD.new_empty(J))
        if J and F:
            start_J = torch.arange(0, J * WINDOW, WINDOW, dtype=torch.int32, device=device)
            feature_J = torch.searchsorted(csc.ptr, start_J, right=True, out_int32=True).sub_(1).clamp_(max=F - 1)
            CH, BD, warps = SLICE
            _windows[(J, triton.cdiv(D, BD))](
                *self.arguments, heavy_F, feature_J, *self.parts, D,
                TWO=two, WINDOW=WINDOW, CH=CH, BD=BD, num_warps=warps,
            )  # fmt: skip


def _weight_grads(csc: Csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients, or the encoder's twice where there is no decoder, and the sums of coef_enc."""
    two = coef_dec_N is not None
    pairs = _Pairs(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD)
    F, D = len(csc.ptr) - 1, x_BD.shape[1]
    out_enc = x_BD.new_empty(F, D, dtype=torch.float32) if out[1] is None else out[1]
    out_dec = out[0] if out[0] is not None else torch.empty_like(out_enc) if two else out_enc
    check_in_place(out_dec, out_enc)
    total_F = out_enc.new_empty(F)
    if F:
        CH, BD, warps = SLICE
        _sums[(F, triton.cdiv(D, BD))](
            *pairs.arguments, *pairs.heavy, *pairs.parts, out_dec, out_enc, total_F, D,
            TWO=two, WINDOW=WINDOW, CH=CH, BD=BD, num_warps=warps,
        )  # fmt: skip
    return out_dec, out_enc, total_F


def _numbers(t: Tensor, *, flat: bool = True) -> Tensor:
    """float32 and contiguous: coefficients as a list, rows as a matrix."""
    t = t.detach().to(torch.float32)
    return t.reshape(-1).contiguous() if flat else t.contiguous()


def _shipped() -> list[Shipped]:
    def floats(*names: str) -> dict[str, str]:
        return {f"{n}_ptr": "*fp32" for n in names}

    lists = {"ptr_ptr": "*i32", "pair_ptr": "*i32", "token_ptr": "*i32"}
    pairs = {**lists, **floats("coef_dec", "residual", "coef_enc", "x"), "heavy_ptr": "*i32"}
    parts = floats("part_dec", "part_enc", "part_total")
    heavy = floats("heavy_dec", "heavy_enc", "heavy_total")
    CH, BD, warps = SLICE
    shipped = []
    for two in (True, False):
        constants = {"TWO": two, "WINDOW": WINDOW, "CH": CH, "BD": BD}
        types = {**pairs, "feature_ptr": "*i32", **parts, "D": "i32"}
        shipped.append(Shipped(_windows, types, constants, warps, gather=True))
        types = {**pairs, **heavy, **parts, **floats("out_dec", "out_enc", "total"), "D": "i32"}
        shipped.append(Shipped(_sums, types, constants, warps, gather=True))
        types = {
            **lists, **floats("coef_dec", "coef_enc"), "feature_ptr": "*i64", **floats("dec", "enc"),
            "LONG": "i32", "B": "i32",
        }  # fmt: skip
        shipped.append(Shipped(_scatter, types, {"TWO": two, "BLOCK": SCATTER_BLOCK}, 4, ragged=("B",)))
    for BD, (CH, warps) in WHOLE.items():
        types = {
            **pairs, **heavy, **parts, "extra_ptr": "*i32", **floats("extra_dec", "extra_enc"),
            **floats("W_dec", "W_enc", "m_dec", "v_dec", "m_enc", "v_enc", "factors", "row_sq"), "D": "i32", **NUMBERS,
        }  # fmt: skip
        constants = {"WINDOW": WINDOW, "CH": CH, "BD": BD}
        shipped.append(Shipped(_segment_adam, types, constants, warps, gather=True))
    types = {"ptr_ptr": "*i32", "pair_ptr": "*i32", **floats("coef", "total")}
    return [*shipped, Shipped(_coef_sums, types, {"BLOCK": SUM_BLOCK}, 1)]


SHIPPED = _shipped()
