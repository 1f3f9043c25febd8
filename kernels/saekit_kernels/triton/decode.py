"""Gathers of decoder rows: decode, residual with the gradient of the values, dots at kept pairs.

    y_BD = decode(codes, W_dec_FD, b_dec_D)
    sq_B, residual_BD, dv = decode_residual_value_grad(codes, W_dec_FD, b_dec_D, target_BD)
    dots = pair_dots(codes, x_BD, W_FD)

A program takes one row of the batch and one slice of the width; the slices are the slow axis of the grid, so that a slice of
the decoder, F · BD elements, stays in L2 while the whole batch reads it. What is summed over the width leaves one partial sum
per slice, and `_add_slices` adds them in order. The sum over slots is a tree of fixed shape within a chunk of slots, chunk
after chunk: the same bits in every run and for a row alone. Matrices are float32 or bfloat16, all sums float32.

B tokens · D width · F features · K slots per row · N slots in the batch · KP slots per chunk · BD width of a slice · S slices
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels.codes import Codes
from saekit_kernels.triton.shipped import Shipped

# Whole rows up to the largest KP are held in registers, 64 floats per thread: KP → (BD, warps). A slice of a row is 512 bytes
# where that fits.
WHOLE = {
    torch.float32: {32: (128, 4), 64: (128, 4), 128: (128, 8), 256: (64, 8)},
    torch.bfloat16: {32: (256, 4), 64: (256, 8), 128: (128, 8), 256: (64, 8)},
}
# Chunks of slots, for flat codes and longer rows: (KP, BD, warps)
CHUNKS = {torch.float32: (32, 128, 4), torch.bfloat16: (16, 256, 4)}
ADD_BLOCK, ADD_WARPS = 512, 4


@triton.jit
def _slots(row_ptr, t, K):
    """First slot of a row and the one behind its last. K = 0: flat codes."""
    if K > 0:
        first = t * K
        end = first + K
    else:
        first = tl.load(row_ptr + t)
        end = tl.load(row_ptr + t + 1)
    return first, end


@triton.jit
def _gather(values_ptr, indices_ptr, W_ptr, slot, end, column, D):
    """Values of some slots and their rows of W; an empty slot gives zeros, and its row is not read."""
    inside = slot < end
    value = tl.load(values_ptr + slot, mask=inside, other=0.0)
    index = tl.load(indices_ptr + slot, mask=inside, other=0).to(tl.int64)
    live = value != 0
    mask = live[:, None] & (column < D)[None, :]
    rows = tl.load(W_ptr + index[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
    return value, live, rows


@triton.jit
def _sum_of_row(values_ptr, indices_ptr, W_ptr, first, end, column, D, KP: tl.constexpr, BD: tl.constexpr):
    """Σ value · W[index] over a row's slots."""
    total = tl.zeros((BD,), tl.float32)
    for lo in range(first, end, KP):
        slot = lo + tl.arange(0, KP)
        value, _, rows = _gather(values_ptr, indices_ptr, W_ptr, slot, end, column, D)
        total += tl.sum(value[:, None] * rows, 0)
    return total


@triton.jit
def _dots_of_row(values_ptr, indices_ptr, W_ptr, out_ptr, x, first, end, column, D, KP: tl.constexpr):
    """Writes x · W[index] at a row's slots, 0 at empty ones."""
    for lo in range(first, end, KP):
        slot = lo + tl.arange(0, KP)
        _, live, rows = _gather(values_ptr, indices_ptr, W_ptr, slot, end, column, D)
        # an infinite x times the zeros of an empty slot is NaN
        tl.store(out_ptr + slot, tl.where(live, tl.sum(rows * x[None, :], 1), 0.0), mask=slot < end)


@triton.jit
def _decode(values_ptr, indices_ptr, row_ptr, W_ptr, b_ptr, y_ptr, K, D, KP: tl.constexpr, BD: tl.constexpr):
    t = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    first, end = _slots(row_ptr, t, K)
    total = _sum_of_row(values_ptr, indices_ptr, W_ptr, first, end, column, D, KP, BD)
    b = tl.load(b_ptr + column, mask=column < D, other=0.0)
    tl.store(y_ptr + t.to(tl.int64) * D + column, b + total, mask=column < D)


@triton.jit
def _residual_whole(
    values_ptr, indices_ptr, W_ptr, b_ptr, target_ptr, residual_ptr, sq_ptr, dv_ptr, B, K, D,
    KP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A row of up to KP slots: each kept row of W is read once and stays in registers."""
    t, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = s * BD + tl.arange(0, BD)
    place = t.to(tl.int64) * D + column
    slot = t * K + tl.arange(0, KP)
    value, live, rows = _gather(values_ptr, indices_ptr, W_ptr, slot, (t + 1) * K, column, D)
    target = tl.load(target_ptr + place, mask=column < D, other=0.0)
    b = tl.load(b_ptr + column, mask=column < D, other=0.0)
    r = target - (b + tl.sum(value[:, None] * rows, 0))
    tl.store(residual_ptr + place, r, mask=column < D)
    tl.store(sq_ptr + s * B + t, tl.sum(r * r, 0))
    dv = tl.where(live, tl.sum(rows * r[None, :], 1), 0.0)
    tl.store(dv_ptr + s * B * K + slot, dv, mask=slot < (t + 1) * K)


@triton.jit
def _residual_chunks(
    values_ptr, indices_ptr, row_ptr, W_ptr, b_ptr, target_ptr, residual_ptr, sq_ptr, dv_ptr, B, N, K, D,
    KP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A row of any length: its rows of W are read twice, the second time from L2."""
    t, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = s * BD + tl.arange(0, BD)
    place = t.to(tl.int64) * D + column
    first, end = _slots(row_ptr, t, K)
    total = _sum_of_row(values_ptr, indices_ptr, W_ptr, first, end, column, D, KP, BD)
    target = tl.load(target_ptr + place, mask=column < D, other=0.0)
    b = tl.load(b_ptr + column, mask=column < D, other=0.0)
    r = target - (b + total)
    tl.store(residual_ptr + place, r, mask=column < D)
    tl.store(sq_ptr + s * B + t, tl.sum(r * r, 0))
    _dots_of_row(values_ptr, indices_ptr, W_ptr, dv_ptr + s * N, r, first, end, column, D, KP)


@triton.jit
def _dots(
    values_ptr, indices_ptr, row_ptr, x_ptr, W_ptr, dots_ptr, N, K, D, KP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    t, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = s * BD + tl.arange(0, BD)
    first, end = _slots(row_ptr, t, K)
    x = tl.load(x_ptr + t.to(tl.int64) * D + column, mask=column < D, other=0.0)
    _dots_of_row(values_ptr, indices_ptr, W_ptr, dots_ptr + s * N, x, first, end, column, D, KP)


@triton.jit
def _add_slices(part_N_ptr, part_B_ptr, out_N_ptr, out_B_ptr, N, B, S, BLOCK: tl.constexpr):
    """Adds the S partial sums of N + B numbers in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_N, in_B = at < N, (at >= N) & (at < N + B)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(S):
        total += tl.load(part_N_ptr + at, mask=in_N, other=0.0) + tl.load(part_B_ptr + at - N, mask=in_B, other=0.0)
        part_N_ptr += N
        part_B_ptr += B
    tl.store(out_N_ptr + at, total, mask=in_N)
    tl.store(out_B_ptr + at - N, total, mask=in_B)


def decode(codes: Codes, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """Equivalent to `reference.decode`."""
    values, indices, row_ptr, K = _slot_tensors(codes)
    W_FD = _matrix(W_dec_FD)
    B, D = codes.batch, W_FD.shape[1]
    KP, BD, warps = CHUNKS[W_FD.dtype]
    y_BD = values.new_empty(B, D)
    if B:
        grid = (B, triton.cdiv(D, BD))
        _decode[grid](values, indices, row_ptr, W_FD, _floats(b_dec_D), y_BD, K, D, KP=KP, BD=BD, num_warps=warps)
    return y_BD


def decode_residual_value_grad(codes: Codes, W_dec_FD, b_dec_D, target_BD) -> tuple[Tensor, Tensor, Tensor]:
    """Equivalent to `reference.decode_residual_value_grad`."""
    values, indices, row_ptr, K = _slot_tensors(codes)
    W_FD, b_D, target_BD = _matrix(W_dec_FD), _floats(b_dec_D), _floats(target_BD)
    (B, D), N = target_BD.shape, values.numel()
    residual_BD, sq_B, dv_N = torch.empty_like(target_BD), values.new_empty(B), torch.empty_like(values)
    if not B:
        return sq_B, residual_BD, dv_N
    whole = WHOLE[W_FD.dtype]
    KP = max(min(whole), triton.next_power_of_2(K))
    held = K > 0 and KP in whole
    KP, BD, warps = (KP, *whole[KP]) if held else CHUNKS[W_FD.dtype]
    S = triton.cdiv(D, BD)
    sq_SB, dv_SN = _partial(sq_B, S), _partial(dv_N, S)
    if held:
        _residual_whole[(B, S)](
            values, indices, W_FD, b_D, target_BD, residual_BD, sq_SB, dv_SN, B, K, D, KP=KP, BD=BD, num_warps=warps
        )
    else:
        _residual_chunks[(B, S)](
            values, indices, row_ptr, W_FD, b_D, target_BD, residual_BD, sq_SB, dv_SN, B, N, K, D,
            KP=KP, BD=BD, num_warps=warps,
        )  # fmt: skip
    if S > 1:
        _add(dv_SN, sq_SB, dv_N, sq_B, N, B, S)
    return sq_B, residual_BD, dv_N


def pair_dots(codes: Codes, x_BD: Tensor, W_FD: Tensor) -> Tensor:
    """Equivalent to `reference.pair_dots`."""
    values, indices, row_ptr, K = _slot_tensors(codes)
    W_FD, x_BD = _matrix(W_FD), _floats(x_BD)
    (B, D), N = x_BD.shape, values.numel()
    KP, BD, warps = CHUNKS[W_FD.dtype]
    S = triton.cdiv(D, BD)
    dots_N = torch.empty_like(values)
    if N:
        dots_SN = _partial(dots_N, S)
        _dots[(B, S)](values, indices, row_ptr, x_BD, W_FD, dots_SN, N, K, D, KP=KP, BD=BD, num_warps=warps)
        if S > 1:
            _add(dots_SN, dots_SN, dots_N, dots_N, N, 0, S)
    return dots_N


def _slot_tensors(codes: Codes) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values, indices, row_ptr and K. Flat codes have K = 0; row-wise codes have any pointer for row_ptr."""
    values, indices, row_ptr = _floats(codes.values), codes.indices.contiguous(), codes.row_ptr
    if row_ptr is not None:
        return values, indices, row_ptr.contiguous(), 0
    if K := values.shape[1]:
        return values, indices, indices, K
    return values, indices, indices.new_zeros(codes.batch + 1), 0


def _floats(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


def _matrix(W_FD: Tensor) -> Tensor:
    """Raises ValueError for a type whose kernels are not shipped."""
    if W_FD.dtype not in CHUNKS:
        raise ValueError(f"a matrix of {W_FD.dtype}: the Triton kernels gather rows of float32 or bfloat16")
    return W_FD.contiguous()


def _partial(whole: Tensor, S: int) -> Tensor:
    """Room for S partial sums of a tensor; for one slice the tensor itself."""
    return whole if S == 1 else whole.new_empty(S, whole.numel())


def _add(part_N: Tensor, part_B: Tensor, out_N: Tensor, out_B: Tensor, N: int, B: int, S: int) -> None:
    grid = (triton.cdiv(N + B, ADD_BLOCK),)
    _add_slices[grid](part_N, part_B, out_N, out_B, N, B, S, BLOCK=ADD_BLOCK, num_warps=ADD_WARPS)


def _shipped() -> list[Shipped]:
    shipped = []
    for dtype, name in ((torch.float32, "*fp32"), (torch.bfloat16, "*bf16")):
        codes = {"values_ptr": "*fp32", "indices_ptr": "*i32"}
        rows = {"row_ptr": "*i32"}
        out = dict.fromkeys(("b_ptr", "target_ptr", "residual_ptr", "sq_ptr", "dv_ptr"), "*fp32")
        for KP, (BD, warps) in WHOLE[dtype].items():
            types = {**codes, "W_ptr": name, **out, "B": "i32", "K": "i32", "D": "i32"}
            shipped.append(Shipped(_residual_whole, types, {"KP": KP, "BD": BD}, warps, gather=True, ragged=("K",)))
        KP, BD, warps = CHUNKS[dtype]
        constants = {"KP": KP, "BD": BD}
        types = {**codes, **rows, "W_ptr": name, **out, "B": "i32", "N": "i32", "K": "i32", "D": "i32"}
        shipped.append(Shipped(_residual_chunks, types, constants, warps, gather=True, ragged=("N", "K")))
        types = {**codes, **rows, "W_ptr": name, "b_ptr": "*fp32", "y_ptr": "*fp32", "K": "i32", "D": "i32"}
        shipped.append(Shipped(_decode, types, constants, warps, gather=True, ragged=("K",)))
        types = {
            **codes,
            **rows,
            "x_ptr": "*fp32",
            "W_ptr": name,
            "dots_ptr": "*fp32",
            "N": "i32",
            "K": "i32",
            "D": "i32",
        }
        shipped.append(Shipped(_dots, types, constants, warps, gather=True, ragged=("N", "K")))
    types = dict.fromkeys(("part_N_ptr", "part_B_ptr", "out_N_ptr", "out_B_ptr"), "*fp32")
    types |= {"N": "i32", "B": "i32", "S": "i32"}
    return [*shipped, Shipped(_add_slices, types, {"BLOCK": ADD_BLOCK}, ADD_WARPS, ragged=("N", "B", "S"))]


SHIPPED = _shipped()
