"""The k best of a short list of candidates, and the k best of a dense row: exact, ties to the smallest feature.

    select_lists   lists of (value, feature) in any order → each cut to its k best, or codes
    select_rows    rows of pre-activations → codes, the start of a list, or the bar above which a mass lies

1. Keys become integers that order like them (`key_bits`): 0 for a key of 0, NaN above +inf.
2. The k-th largest key is found from its top bit down: the largest t such that at least k keys are ≥ t. Where a mass is the
   target, squares of keys are added instead of counting them.
3. Kept are all keys > t, and of those equal to t the smallest features until there are k.
4. Codes stand in feature order; of a row with n < k winners the k − n empty slots name the smallest free features. A winner of
   rank r and feature f has min(k − n, f − r) of them before it, and up to the last empty slot every number is taken: so slot i
   is first written as feature i, value 0, and the winners go over it.

B rows · F features · K slots per row · C places in a candidate list
"""

import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels.portable import NAN_BITS
from saekit_kernels.triton.shipped import Shipped

TINY = 0x00800000
"""Bits of the smallest normal number: smaller keys count as 0."""
NEVER = 0x7FFFFFFF
"""A bar above every key, NaN included."""
SAMPLE = 16
"""A sample holds every 16th tile of columns."""

_TINY: tl.constexpr = tl.constexpr(TINY)
_NEVER: tl.constexpr = tl.constexpr(NEVER)
_SAMPLE: tl.constexpr = tl.constexpr(SAMPLE)
_NAN: tl.constexpr = tl.constexpr(NAN_BITS)
_INF: tl.constexpr = tl.constexpr(0x7F800000)

# the tally of a call, int32: rows whose list overflowed, the longest list, entries of all lists
BAD, MOST, TOTAL = 0, 1, 2
_MOST: tl.constexpr = tl.constexpr(MOST)
_TOTAL: tl.constexpr = tl.constexpr(TOTAL)

LIST_WARPS = {256: 4, 512: 4, 1024: 4, 4096: 8}
"""Places in a list → warps that hold one in registers. A list has eight places for each slot."""
ROW_CHUNK, ROW_WARPS = 2048, 8


def zero_upto(key: str) -> float:
    """What `key_bits` takes for a key: values at most this have key 0. No value is at most NaN."""
    return {"relu": 0.0, "abs": float("nan")}[key]


@triton.jit
def key_bits(value, scale, zero_upto):
    """`portable.key_bits`: int32 in the order of the keys. An argument tells "relu" from "abs": no second compilation."""
    ranked = tl.where(value <= zero_upto, 0.0, value) * scale
    bits = ranked.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits > _INF, _NAN, bits)
    return tl.where(bits < _TINY, 0, bits)


@triton.jit
def _kth(bits, k):
    """The k-th largest of key bits, 0 where fewer are positive."""
    t = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        enough = tl.sum((bits >= t + step).to(tl.int32), 0) >= k
        t = tl.where(enough, t + step, t)
        step = step >> 1
    return t


@triton.jit
def best_of_list(value_ptr, index_ptr, count, scale_ptr, k, span, zero_upto, CAP: tl.constexpr):
    """(value, index, kept, t) of the first `count` entries of a list: `kept` marks the k best, t is the k-th key or 0.

    span: a power of two, at least F.
    """
    slot = tl.arange(0, CAP)
    live = slot < count
    value = tl.load(value_ptr + slot, mask=live, other=0.0)
    index = tl.load(index_ptr + slot, mask=live, other=0)
    bits = key_bits(value, tl.load(scale_ptr + index, mask=live, other=0.0), zero_upto)
    t = _kth(bits, k)
    equal = (bits == t) & (bits > 0)
    need = k - tl.sum((bits > t).to(tl.int32), 0)
    # the same descent on the feature, from the far end, only where a tie has to be broken
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
def cut_in_order(value_ptr, index_ptr, count_ptr, floor_ptr, scale_ptr, k, zero_upto, CAP: tl.constexpr):
    """Leaves a list in feature order its k best, still in order, and writes the bar for larger features: they lose every tie."""
    slot = tl.arange(0, CAP)
    live = slot < tl.load(count_ptr)
    value = tl.load(value_ptr + slot, mask=live, other=0.0)
    index = tl.load(index_ptr + slot, mask=live, other=0)
    bits = key_bits(value, tl.load(scale_ptr + index, mask=live, other=0.0), zero_upto)
    t = _kth(bits, k)
    equal = (bits == t) & (bits > 0)
    need = k - tl.sum((bits > t).to(tl.int32), 0)
    kept = (bits > t) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= need))
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    # every thread has read its part of the list before one of them writes over it
    tl.debug_barrier()
    tl.store(value_ptr + place, value, mask=kept)
    tl.store(index_ptr + place, index, mask=kept)
    tl.store(count_ptr, tl.sum(kept.to(tl.int32), 0))
    tl.store(floor_ptr, tl.maximum(t + 1, _TINY))


@triton.jit(do_not_specialize=["cap", "k", "span", "first_bad"])
def select_lists_kernel(
    value_ptr, index_ptr, count_ptr, floor_ptr, scale_ptr, out_value_ptr, out_index_ptr, bad_ptr, tally_ptr,
    stride, cap, k, span, first_bad, zero_upto, FINAL: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One row. FINAL: its codes; else its list is cut. With first_bad ≥ 0 the row is the bad one of that number + program.

    A list that has overflowed is left alone, and FINAL puts its row among the bad ones: what got in depended on timing.
    """
    row = tl.program_id(0).to(tl.int64)
    if first_bad >= 0:
        if first_bad + row >= tl.load(tally_ptr):
            return
        row = tl.load(bad_ptr + first_bad + row).to(tl.int64)
    count = tl.load(count_ptr + row)
    value_ptr += row * stride
    index_ptr += row * stride
    if FINAL:
        if first_bad < 0:
            tl.atomic_max(tally_ptr + _MOST, count, sem="relaxed")
            tl.atomic_add(tally_ptr + _TOTAL, count, sem="relaxed")
        if count > cap:
            at = tl.atomic_add(tally_ptr, 1, sem="relaxed")
            tl.store(bad_ptr + at, row.to(tl.int32))
            return
        out_value_ptr += row * k
        out_index_ptr += row * k
        value, index, kept, _t = best_of_list(value_ptr, index_ptr, count, scale_ptr, k, span, zero_upto, CAP)
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out_value_ptr + place, value, mask=kept)
        tl.store(out_index_ptr + place, index, mask=kept)
        n = tl.sum(kept.to(tl.int32), 0)
        tl.debug_barrier()
        # the rank of each winner by counting: so few need no sort
        mine = tl.arange(0, CAP // 8)
        value_K = tl.load(out_value_ptr + mine, mask=mine < n, other=0.0)
        index_K = tl.load(out_index_ptr + mine, mask=mine < n, other=0)
        rank_K = tl.zeros((CAP // 8,), tl.int32)
        for lo in range(0, n, 16):
            other = lo + tl.arange(0, 16)
            index_J = tl.load(out_index_ptr + other, mask=other < n, other=_NEVER)
            rank_K += tl.sum((index_J[None, :] < index_K[:, None]).to(tl.int32), 1)
        tl.debug_barrier()
        if n < k:
            tl.store(out_value_ptr + mine, tl.zeros((CAP // 8,), tl.float32), mask=mine < k)
            tl.store(out_index_ptr + mine, mine, mask=mine < k)
            tl.debug_barrier()
        place_K = rank_K + tl.minimum(k - n, index_K - rank_K)
        tl.store(out_value_ptr + place_K, value_K, mask=mine < n)
        tl.store(out_index_ptr + place_K, index_K, mask=mine < n)
    else:
        if count > cap:
            tl.store(floor_ptr + row, _NEVER)
            return
        value, index, kept, t = best_of_list(value_ptr, index_ptr, count, scale_ptr, k, span, zero_upto, CAP)
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        # every thread has read its part of the list before one of them writes over it
        tl.debug_barrier()
        tl.store(value_ptr + place, value, mask=kept)
        tl.store(index_ptr + place, index, mask=kept)
        tl.store(count_ptr + row, tl.sum(kept.to(tl.int32), 0))
        # not above: a smaller feature may come later
        tl.store(floor_ptr + row, tl.maximum(t, _TINY))


@triton.jit
def _chunk(pre_ptr, scale_ptr, lo, width, F, tile_bits, zero_upto, SAMPLED: tl.constexpr, CH: tl.constexpr):
    """(value, feature, key bits) of CH columns of a dense row. SAMPLED: it holds every 16th tile of 2^tile_bits features."""
    column = lo + tl.arange(0, CH)
    feature = column
    if SAMPLED:
        feature = ((column >> tile_bits) * _SAMPLE << tile_bits) + (column & ((1 << tile_bits) - 1))
    live = (column < width) & (feature < F)
    value = tl.load(pre_ptr + column, mask=live, other=0.0)
    return value, feature, key_bits(value, tl.load(scale_ptr + feature, mask=live, other=0.0), zero_upto)


@triton.jit
def _weight(bits):
    """The key's square, where it is too large or small for that something less: a bar may be too low, never too high."""
    key = tl.minimum(bits, 0x5A0E1BCA).to(tl.float32, bitcast=True)  # 1e16
    return tl.where(bits >= _INF, float("inf"), key * key)


@triton.jit(do_not_specialize=["first_row", "tile_bits", "k"])
def select_rows_kernel(
    pre_ptr, scale_ptr, target_ptr, bad_ptr, tally_ptr, out_value_ptr, out_index_ptr, count_ptr, floor_ptr,
    first_row, width, stride, F, tile_bits, k, zero_upto, OUT: tl.constexpr, CH: tl.constexpr,
):  # fmt: skip
    """One dense row of `width` columns.

    OUT "codes": k slots in feature order. With first_row < 0 the row is the bad one of this program's number. OUT "list": a
    sample, whose k best begin the row's list. OUT "mass": only the highest bar whose keys' squares add up to target².
    """
    program = tl.program_id(0)
    row = (first_row + program).to(tl.int64)
    # two ifs: the outer one is decided at compilation, where the pointers may be None
    if OUT == "codes":  # noqa: SIM102
        if first_row < 0:
            if program >= tl.load(tally_ptr):
                return
            row = tl.load(bad_ptr + program).to(tl.int64)
    pre_ptr += program.to(tl.int64) * width

    # two bits at a time: one pass over the row tries three bars
    t = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << 29, tl.int32)
    if OUT == "mass":
        # rounding must not raise the bar; a target of 0 still asks for one key
        target = tl.load(target_ptr + row)
        target = tl.maximum(target * target * 1.00001, 1e-37)
        for _ in range(16):
            mass1 = tl.zeros((CH,), tl.float32)
            mass2 = tl.zeros((CH,), tl.float32)
            mass3 = tl.zeros((CH,), tl.float32)
            for lo in range(0, width, CH):
                _v, _f, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, tile_bits, zero_upto, False, CH)
                weight = _weight(bits)
                mass1 += tl.where(bits >= t + step, weight, 0.0)
                mass2 += tl.where(bits >= t + 2 * step, weight, 0.0)
                mass3 += tl.where(bits >= t + 3 * step, weight, 0.0)
            digit = (tl.sum(mass1, 0) >= target).to(tl.int32) + (tl.sum(mass2, 0) >= target).to(tl.int32)
            t += (digit + (tl.sum(mass3, 0) >= target).to(tl.int32)) * step
            # the pairs of bits are 30 and 29, … 2 and 1, at last bit 0 with two bars that are known to hold too little
            step = tl.maximum(step >> 2, 1)
        tl.store(floor_ptr + row, tl.maximum(t, _TINY))
    else:
        for _ in range(16):
            n1 = tl.zeros((CH,), tl.int32)
            n2 = tl.zeros((CH,), tl.int32)
            n3 = tl.zeros((CH,), tl.int32)
            for lo in range(0, width, CH):
                _v, _f, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, tile_bits, zero_upto, OUT == "list", CH)
                n1 += (bits >= t + step).to(tl.int32)
                n2 += (bits >= t + 2 * step).to(tl.int32)
                n3 += (bits >= t + 3 * step).to(tl.int32)
            digit = (tl.sum(n1, 0) >= k).to(tl.int32) + (tl.sum(n2, 0) >= k).to(tl.int32)
            t += (digit + (tl.sum(n3, 0) >= k).to(tl.int32)) * step
            step = tl.maximum(step >> 2, 1)
        above_C = tl.zeros((CH,), tl.int32)
        for lo in range(0, width, CH):
            _v, _f, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, tile_bits, zero_upto, OUT == "list", CH)
            above_C += (bits > t).to(tl.int32)
        above = tl.sum(above_C, 0)
        n = tl.where(t > 0, k, above)
        out_value_ptr += row * stride
        out_index_ptr += row * stride
        if OUT == "codes":  # noqa: SIM102
            if n < k:
                for lo in range(0, k, CH):
                    slot = lo + tl.arange(0, CH)
                    tl.store(out_value_ptr + slot, tl.zeros((CH,), tl.float32), mask=slot < k)
                    tl.store(out_index_ptr + slot, slot, mask=slot < k)
                tl.debug_barrier()
        # columns ascend, so the first of the equal ones are the smallest features
        written = tl.full((), 0, tl.int32)
        equals = tl.full((), 0, tl.int32)
        for lo in range(0, width, CH):
            value, feature, bits = _chunk(pre_ptr, scale_ptr, lo, width, F, tile_bits, zero_upto, OUT == "list", CH)
            equal = (bits == t) & (bits > 0)
            kept = (bits > t) | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= n - above))
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
    """Places in a row's list: at least 8 k; None where no list is so long."""
    return next((places for places in LIST_WARPS if places >= 8 * k), None)


def select_lists(
    value_BC: Tensor, index_BC: Tensor, count_B: Tensor, floor_B: Tensor, bad_B: Tensor, tally: Tensor, scale_F: Tensor,
    key: str, *, k: int, cap: int, codes: tuple[Tensor, Tensor] | None = None, bad_from: int | None = None,
) -> None:  # fmt: skip
    """Cuts every list to its k best and raises its bar, or writes codes = (values, indices) of (B, K).

    A list of more than `cap` entries is left out: its bar becomes one that nothing reaches; with `codes` its row goes to
    `bad_B`, and tally[BAD] counts it. bad_from: only the rows of `bad_B` from this one on.
    """
    (rows, places), features = value_BC.shape, len(scale_F)
    programs = rows - (bad_from or 0)
    CAP = next(c for c in LIST_WARPS if c >= max(places, 8 * k))
    select_lists_kernel[(programs,)](
        value_BC, index_BC, count_B, floor_B, scale_F, *(codes or (None, None)), bad_B, tally,
        places, cap, k, triton.next_power_of_2(features), -1 if bad_from is None else bad_from, zero_upto(key),
        FINAL=codes is not None, CAP=CAP, num_warps=LIST_WARPS[CAP],
    )  # fmt: skip


def select_rows(
    pre_RC: Tensor, scale_F: Tensor, key: str, *, first_row: int = -1, k: int = 0,
    codes: tuple[Tensor, Tensor] | None = None, bad: tuple[Tensor, Tensor] | None = None,
    lists: tuple[Tensor, Tensor, Tensor, Tensor] | None = None, tile: int = 1,
    mass: tuple[Tensor, Tensor] | None = None, chunk: int = ROW_CHUNK,
) -> None:  # fmt: skip
    """The best of dense rows, which are the batch's from `first_row` on, or the first of bad = (rows, tally).

    One of: codes = (values, indices) of (B, K) to write; lists = (values, indices, counts, bars) to begin, where the columns are
    every 16th tile of `tile` features; mass = (targets, bars), the bars to write.
    """
    out = "codes" if codes else "list" if lists else "mass"
    value, index = codes or (lists[:2] if lists else (None, None))
    count, floor = lists[2:] if lists else (None, mass[1] if mass else None)
    # the kernel that writes codes has the branch for bad rows in any case
    bad = bad or (index, index)
    select_rows_kernel[(len(pre_RC),)](
        pre_RC, scale_F, mass[0] if mass else None, *(bad if codes else (None, None)), value, index, count, floor,
        first_row, pre_RC.shape[1], 0 if value is None else value.shape[1], len(scale_F), tile.bit_length() - 1, k,
        zero_upto(key), OUT=out, CH=chunk, num_warps=ROW_WARPS,
    )  # fmt: skip


_LISTS = {
    **dict.fromkeys(("index_ptr", "count_ptr", "floor_ptr", "bad_ptr", "tally_ptr"), "*i32"),
    **dict.fromkeys(("value_ptr", "scale_ptr"), "*fp32"),
    **dict.fromkeys(("stride", "cap", "k", "span", "first_bad"), "i32"),
    "zero_upto": "fp32",
}
_CODES = {"out_value_ptr": "*fp32", "out_index_ptr": "*i32"}
_ROWS = {
    "pre_ptr": "*fp32",
    "scale_ptr": "*fp32",
    **dict.fromkeys(("first_row", "width", "stride", "F", "tile_bits", "k"), "i32"),
    "zero_upto": "fp32",
}
_BAD = {"bad_ptr": "*i32", "tally_ptr": "*i32"}
_BEGUN = {"count_ptr": "*i32", "floor_ptr": "*i32"}


def _rows(out: str, pointers: dict[str, str], ragged: tuple[str, ...]) -> Shipped:
    every = ("target_ptr", *_BAD, *_CODES, *_BEGUN)
    absent = {n: None for n in every if n not in pointers}
    return Shipped(
        select_rows_kernel,
        {**_ROWS, **pointers},
        {**absent, "OUT": out, "CH": ROW_CHUNK},
        ROW_WARPS,
        ragged=("first_row", "tile_bits", "k", *ragged),
    )


SHIPPED = [
    *(
        Shipped(
            select_lists_kernel,
            {**_LISTS, **(_CODES if final else {})},
            {**({} if final else dict.fromkeys(_CODES)), "FINAL": final, "CAP": CAP},
            warps,
            ragged=("cap", "k", "span", "first_bad"),
        )
        for final in (False, True)
        for CAP, warps in LIST_WARPS.items()
    ),
    # rows of k codes need not begin at a multiple of 16
    _rows("codes", {**_CODES, **_BAD}, ("stride",)),
    _rows("list", {**_CODES, **_BEGUN}, ()),
    _rows("mass", {"target_ptr": "*fp32", "floor_ptr": "*i32"}, ("stride",)),
]
