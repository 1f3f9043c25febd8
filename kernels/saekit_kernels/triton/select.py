"""The k best of a short list of candidates per row, and the k best of a dense row: exact, ties to the smallest feature.

    select_lists   lists (value, feature) in arbitrary order → the list compacted to its k best, or codes
    select_rows    rows of pre-activations → the start of a list, codes, or a bar that holds a mass

1. Keys become integers that order like them (`key_bits`): 0 for a key of 0, NaN above +inf.
2. The k-th largest key is found bit by bit from the top: the largest t such that at least k keys are ≥ t. With a mass for a
   target the keys' squares are added instead of counted.
3. Kept are all keys > t, and of those equal to t the smallest features until k are full.
4. Codes are written in feature order. The p empty slots of a row with n < K winners name the p smallest free features. A winner
   of rank r and feature f has min(p, f − r) of them before it, and an empty slot stands at the place of its own feature's number:
   below it there is no gap. So slot i is first written as (0, i), then the winners go over it.

B rows · F features · K slots per row · CAP places in a candidate list
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels.triton.shipped import Shipped

TINY = 0x00800000
"""Bits of the smallest normal number: smaller keys count as 0."""
NEVER = 0x7FFFFFFF
"""A bar above every key, NaN included."""

_TINY: tl.constexpr = tl.constexpr(TINY)
_NEVER: tl.constexpr = tl.constexpr(NEVER)
_INF: tl.constexpr = tl.constexpr(0x7F800000)
_NAN: tl.constexpr = tl.constexpr(0x7FC00000)

# what the kernels count, in one int32 tensor
BAD, MOST, TOTAL = 0, 1, 2
"""Rows whose list overflowed; the longest list; all list entries of the last pass."""
_MOST: tl.constexpr = tl.constexpr(MOST)
_TOTAL: tl.constexpr = tl.constexpr(TOTAL)

LIST_WARPS = {256: 4, 512: 4, 1024: 4, 2048: 8, 4096: 8}
"""Capacity of a list → warps: four at 4096 would spill."""
ROW_CHUNK, ROW_WARPS = 2048, 8


@triton.jit
def key_bits(value, scale, ABS: tl.constexpr, SCALED: tl.constexpr):
    """`portable.key_bits` of "relu" or "abs": int32 in the order of the keys."""
    ranked = value
    if not ABS:
        # "not at most 0" lets NaN through
        ranked = tl.where(value <= 0, 0.0, value)
    if SCALED:
        # a scale of +inf must not make a key out of 0
        ranked = tl.where(value == 0, 0.0, ranked * scale)
    bits = ranked.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits > _INF, _NAN, bits)
    return tl.where(bits < _TINY, 0, bits)


@triton.jit
def best_of_list(
    value_ptr, index_ptr, count, scale_ptr, k, span, ABS: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr
):
    """(value, index, kept, t) of the first `count` entries of a list: `kept` marks the k best, t is the k-th key or 0.

    span: a power of two, at least F.
    """
    slot = tl.arange(0, CAP)
    live = slot < count
    value = tl.load(value_ptr + slot, mask=live, other=0.0)
    index = tl.load(index_ptr + slot, mask=live, other=0)
    scale = value
    if SCALED:
        scale = tl.load(scale_ptr + index, mask=live, other=0.0)
    bits = key_bits(value, scale, ABS, SCALED)
    t = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        enough = tl.sum((bits >= t + step).to(tl.int32), 0) >= k
        t = tl.where(enough, t + step, t)
        step = step >> 1
    equal = (bits == t) & (t > 0)
    need = k - tl.sum((bits > t).to(tl.int32), 0)
    # the same descent on the index, from its far end, only where a tie has to be broken
    backward = span - 1 - index
    u = tl.full((), 0, tl.int32)
    if tl.sum(equal.to(tl.int32), 0) > need:
        step = tl.full((), 0, tl.int32) + (span >> 1)
        while step > 0:
            enough = tl.sum((equal & (backward >= u + step)).to(tl.int32), 0) >= need
            u = tl.where(enough, u + step, u)
            step = step >> 1
    kept = (bits > t) | (equal & (backward >= u))
    return value, index, kept, t


@triton.jit
def compact(
    value_ptr, index_ptr, count_ptr, floor_ptr, scale_ptr, k, span, ABS: tl.constexpr, SCALED: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Leaves a list its k best, and writes the bar that the rest of the row has to reach."""
    value, index, kept, t = best_of_list(value_ptr, index_ptr, tl.load(count_ptr), scale_ptr, k, span, ABS, SCALED, CAP)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    # every thread has its part of the list in registers before one of them writes over it
    tl.debug_barrier()
    tl.store(value_ptr + place, value, mask=kept)
    tl.store(index_ptr + place, index, mask=kept)
    tl.store(count_ptr, tl.sum(kept.to(tl.int32), 0))
    tl.store(floor_ptr, tl.maximum(t, _TINY))


@triton.jit
def select_lists_kernel(
    value_ptr, index_ptr, count_ptr, floor_ptr, scale_ptr, out_value_ptr, out_index_ptr, bad_ptr, tally_ptr,
    stride, cap, k, span, first_bad,
    ABS: tl.constexpr, SCALED: tl.constexpr, FINAL: tl.constexpr, LISTED: tl.constexpr, CAP: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """One row. FINAL: its codes; else its list compacted. LISTED: the row is the one at `first_bad + program` of the bad rows.

    A list that has overflowed is left alone and, by FINAL, put on the list of bad rows: what got in depended on timing.
    """
    row = tl.program_id(0)
    if LISTED:
        if first_bad + row >= tl.load(tally_ptr):
            return
        row = tl.load(bad_ptr + first_bad + row)
    row = row.to(tl.int64)
    count = tl.load(count_ptr + row)
    value_ptr += row * stride
    index_ptr += row * stride
    if count > cap:
        if FINAL:
            at = tl.atomic_add(tally_ptr, 1, sem="relaxed")
            tl.store(bad_ptr + at, row.to(tl.int32))
            tl.atomic_max(tally_ptr + _MOST, count, sem="relaxed")
        else:
            tl.store(floor_ptr + row, _NEVER)
        return
    if not FINAL:
        compact(value_ptr, index_ptr, count_ptr + row, floor_ptr + row, scale_ptr, k, span, ABS, SCALED, CAP)
    if FINAL:
        if not LISTED:
            tl.atomic_max(tally_ptr + _MOST, count, sem="relaxed")
            tl.atomic_add(tally_ptr + _TOTAL, count, sem="relaxed")
        out_value_ptr += row * k
        out_index_ptr += row * k
        value, index, kept, _ = best_of_list(value_ptr, index_ptr, count, scale_ptr, k, span, ABS, SCALED, CAP)
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out_value_ptr + place, value, mask=kept)
        tl.store(out_index_ptr + place, index, mask=kept)
        n = tl.sum(kept.to(tl.int32), 0)
        tl.debug_barrier()
        # the rank of each winner by counting: a sort of so few costs more
        mine = tl.arange(0, KP)
        value_K = tl.load(out_value_ptr + mine, mask=mine < n, other=0.0)
        index_K = tl.load(out_index_ptr + mine, mask=mine < n, other=0)
        rank_K = tl.zeros((KP,), tl.int32)
        for j in range(0, KP, 16):
            other = j + tl.arange(0, 16)
            index_J = tl.load(out_index_ptr + other, mask=other < n, other=_NEVER)
            rank_K += tl.sum((index_J[None, :] < index_K[:, None]).to(tl.int32), 1)
        tl.debug_barrier()
        if n < k:
            tl.store(out_value_ptr + mine, tl.zeros((KP,), tl.float32), mask=mine < k)
            tl.store(out_index_ptr + mine, mine, mask=mine < k)
            tl.debug_barrier()
        place_K = rank_K + tl.minimum(k - n, index_K - rank_K)
        tl.store(out_value_ptr + place_K, value_K, mask=mine < n)
        tl.store(out_index_ptr + place_K, index_K, mask=mine < n)


@triton.jit
def _chunk(pre_ptr, scale_ptr, lo, width, F, ABS: tl.constexpr, SCALED: tl.constexpr, TILE: tl.constexpr,
           EVERY: tl.constexpr, CH: tl.constexpr):  # fmt: skip
    """(value, feature, key bits) of CH columns of a dense row that holds every EVERY-th tile of TILE features."""
    column = lo + tl.arange(0, CH)
    feature = column
    if EVERY > 1:
        feature = column // TILE * (TILE * EVERY) + column % TILE
    live = (column < width) & (feature < F)
    value = tl.load(pre_ptr + column, mask=live, other=0.0)
    scale = value
    if SCALED:
        scale = tl.load(scale_ptr + feature, mask=live, other=0.0)
    return value, feature, key_bits(value, scale, ABS, SCALED)


@triton.jit
def select_rows_kernel(
    pre_ptr, scale_ptr, target_ptr, bad_ptr, tally_ptr, out_value_ptr, out_index_ptr, count_ptr, floor_ptr,
    first_row, width, stride, F, k,
    ABS: tl.constexpr, SCALED: tl.constexpr, LISTED: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr,
    EVERY: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """One dense row of `width` columns.

    OUT "codes": k slots, in feature order. OUT "list": the k best start the row's list of `stride` places. OUT "mass": the bar
    alone, as high as it can be while the keys at or above it have squares that add up to target².
    LISTED: the row is the one at this program's number of the bad rows.
    """
    program = tl.program_id(0)
    row = first_row + program
    if LISTED:
        if program >= tl.load(tally_ptr):
            return
        row = tl.load(bad_ptr + program)
    row = row.to(tl.int64)
    pre_ptr += program.to(tl.int64) * width

    # two bits at a time: one pass over the row counts for three bars
    t = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << 29, tl.int32)
    if OUT == "mass":
        # rounding of the sum, and of what is summed, must not raise the bar; a target of 0 still asks for one key
        target = tl.load(target_ptr + row)
        target = tl.maximum(target * target * 1.00001, 1e-37)
    for _ in range(16):
        if OUT == "mass":
            mass1 = tl.zeros((CH,), tl.float32)
            mass2 = tl.zeros((CH,), tl.float32)
            mass3 = tl.zeros((CH,), tl.float32)
            for lo in range(0, width, CH):
                _v, _f, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, ABS, SCALED, TILE, EVERY, CH)
                # larger keys would overflow where float64 does not, and count as less: the bar may only be too low
                key = tl.minimum(bits, 0x5A0E1BCA).to(tl.float32, bitcast=True)
                weight = tl.where(bits >= _INF, float("inf"), key * key)
                mass1 += tl.where(bits >= t + step, weight, 0.0)
                mass2 += tl.where(bits >= t + 2 * step, weight, 0.0)
                mass3 += tl.where(bits >= t + 3 * step, weight, 0.0)
            digit = (tl.sum(mass1, 0) >= target).to(tl.int32) + (tl.sum(mass2, 0) >= target).to(tl.int32)
            digit += (tl.sum(mass3, 0) >= target).to(tl.int32)
        else:
            n1 = tl.zeros((CH,), tl.int32)
            n2 = tl.zeros((CH,), tl.int32)
            n3 = tl.zeros((CH,), tl.int32)
            for lo in range(0, width, CH):
                _v, _f, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, ABS, SCALED, TILE, EVERY, CH)
                n1 += (bits >= t + step).to(tl.int32)
                n2 += (bits >= t + 2 * step).to(tl.int32)
                n3 += (bits >= t + 3 * step).to(tl.int32)
            digit = (tl.sum(n1, 0) >= k).to(tl.int32) + (tl.sum(n2, 0) >= k).to(tl.int32)
            digit += (tl.sum(n3, 0) >= k).to(tl.int32)
        t += digit * step
        # the bits are 30 and 29, … 2 and 1, at last 0 alone; then bars 2 and 3 are known to hold too little
        step = tl.maximum(step >> 2, 1)

    if OUT == "mass":
        tl.store(floor_ptr + row, tl.maximum(t, _TINY))
    if OUT != "mass":
        above_C = tl.zeros((CH,), tl.int32)
        for lo in range(0, width, CH):
            _v, _f, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, ABS, SCALED, TILE, EVERY, CH)
            above_C += (bits > t).to(tl.int32)
        above = tl.sum(above_C, 0)
        n = tl.where(t > 0, k, above)
        out_value_ptr += row * stride
        out_index_ptr += row * stride
        if OUT == "codes":
            if n < k:
                for lo in range(0, k, CH):
                    slot = lo + tl.arange(0, CH)
                    tl.store(out_value_ptr + slot, tl.zeros((CH,), tl.float32), mask=slot < k)
                    tl.store(out_index_ptr + slot, slot, mask=slot < k)
                tl.debug_barrier()
        # columns ascend, so the first of the equal ones are the smallest features
        need = n - above
        written = tl.full((), 0, tl.int32)
        equals = tl.full((), 0, tl.int32)
        for lo in range(0, width, CH):
            value, feature, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, ABS, SCALED, TILE, EVERY, CH)
            equal = (bits == t) & (t > 0)
            kept = (bits > t) | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= need))
            rank = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            if OUT == "codes":
                rank += tl.minimum(k - n, feature - rank)
            tl.store(out_value_ptr + rank, value, mask=kept)
            tl.store(out_index_ptr + rank, feature, mask=kept)
            equals += tl.sum(equal.to(tl.int32), 0)
            written += tl.sum(kept.to(tl.int32), 0)
        if OUT == "list":
            tl.store(count_ptr + row, n)
            tl.store(floor_ptr + row, tl.maximum(t, _TINY))


# Launchers


def capacity(k: int) -> int | None:
    """Places in a row's list: 8 k rounded up to a power of two, at least 256; None where no shipped list is so long."""
    places = max(256, triton.next_power_of_2(8 * k))
    return places if places in LIST_WARPS else None


def select_lists(
    value_BC: Tensor, index_BC: Tensor, count_B: Tensor, floor_B: Tensor, tally: Tensor, bad_B: Tensor, *, k: int,
    n_features: int, absolute: bool, scale_F: Tensor | None, cap: int | None = None, out: tuple[Tensor, Tensor] | None = None,
    listed_from: int | None = None,
) -> None:  # fmt: skip
    """Every list (C places a row, count_B used) cut to its k best, or with `out` = (values, indices) of (B, K) the codes.

    A list longer than `cap` is left out: with `out` its row is put on `bad_B` and counted in tally[BAD], else its bar becomes
    one that nothing passes. listed_from: only the bad rows from this one on.
    """
    rows, places = value_BC.shape
    programs = rows - (listed_from or 0)
    if programs <= 0:
        return
    out_value, out_index = out or (value_BC, index_BC)
    # a list of fewer places than the smallest that is shipped is read with a mask
    CAP = max(min(LIST_WARPS), triton.next_power_of_2(places))
    select_lists_kernel[(programs,)](
        value_BC, index_BC, count_B, floor_B, value_BC if scale_F is None else scale_F, out_value, out_index, bad_B, tally,
        places, places if cap is None else cap, k, triton.next_power_of_2(n_features), listed_from or 0,
        ABS=absolute, SCALED=scale_F is not None, FINAL=out is not None, LISTED=listed_from is not None, CAP=CAP,
        KP=max(16, triton.next_power_of_2(k)) if out is not None else 16, num_warps=LIST_WARPS[CAP],
    )  # fmt: skip


def select_rows(
    pre_RC: Tensor, *, n_features: int, absolute: bool, scale_F: Tensor | None, first_row: int = 0, k: int = 0,
    codes: tuple[Tensor, Tensor] | None = None, lists: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    mass: tuple[Tensor, Tensor] | None = None, bad: tuple[Tensor, Tensor] | None = None, tile: int = 1, every: int = 1,
    chunk: int = ROW_CHUNK,
) -> None:  # fmt: skip
    """The best of dense rows that start at row `first_row` of the batch, or at the start of `bad` = (rows, tally).

    codes: (values, indices) of (B, K) to write. lists: (values, indices, counts, bars) of lists to begin with the k best.
    mass: (target_B, bars) – the bar of each row whose keys hold the target. Columns are every `every`-th tile of `tile` features.
    """
    kind, first, second = ("codes", *codes) if codes else ("list", *lists[:2]) if lists else ("mass", pre_RC, pre_RC)
    count, floor = lists[2:] if lists else (pre_RC, mass[1] if mass else pre_RC)
    bad_rows, tally = bad or (pre_RC, pre_RC)
    if not len(pre_RC):
        return
    select_rows_kernel[(len(pre_RC),)](
        pre_RC, pre_RC if scale_F is None else scale_F, mass[0] if mass else pre_RC, bad_rows, tally, first, second, count,
        floor, first_row, pre_RC.shape[1], first.shape[1], n_features, k,
        ABS=absolute, SCALED=scale_F is not None, LISTED=bad is not None, OUT=kind, TILE=tile, EVERY=every, CH=chunk,
        num_warps=ROW_WARPS,
    )  # fmt: skip
