"""The encoder product with a filter in its epilogue: no (B, F) matrix in memory, and an exact selection all the same.

Any set of entries that holds enough keys gives a bar that no lost entry could have reached, so luck decides only how many
candidates survive (`portable` and the specification of the kernels have the lemma).

RowCount, where k is small beside F, in phases over strided tiles of columns, no column computed twice:
1. `product_kernel` stores every 16th tile, a block of rows at a time; its k best start each row's list and give its bar.
2. `filter_kernel` computes three more tiles of each 16 and appends what reaches the bar; the list is cut to its k best, which
   raises the bar.
3. The same with the remaining twelve; `select_lists` writes the codes.
4. Rows whose list overflowed are computed anew, whole: a fixed number of them dense, and the others by `repair_kernel`, which cuts
   the lists as it goes. Both exit at once when there are none. The host never waits.

RowCount where k is large or F small, and RowMass: dense blocks of rows by the library, `select_rows`.
BatchCount, ColumnCount, Threshold: one filter pass with known bars gives one flat list. Its length is read by the host; a list
that was too short is made longer and filled again. Then the exact selection among the survivors.

B tokens · D width · F features · K slots per row · N survivors · C places in a row's list
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from saekit_kernels import portable
from saekit_kernels.codes import Codes
from saekit_kernels.portable import Encoder, Workspace
from saekit_kernels.portable import key_bits as torch_key_bits
from saekit_kernels.reference import Selected
from saekit_kernels.rules import BatchCount, ColumnCount, RowCount, RowMass, Rule, Threshold
from saekit_kernels.triton import select
from saekit_kernels.triton.select import SAMPLE, cut_in_order, zero_upto
from saekit_kernels.triton.shipped import Shipped

REPAIR_ROWS = 128
"""So many overflowed rows are computed dense."""
BUFFER = 34 << 20
"""Bytes of pre-activations in memory at a time, unless one tile of rows is more."""
REPAIR_CAP = 1024
"""Places of a list that `repair_kernel` uses at most: the k best, k ≤ 512, and a tile. It runs seldom, and compiles once."""
GROUP = 8
"""Tiles of rows that follow each other before the next tile of columns: W_enc passes through the cache once for all of them."""

_SAMPLE: tl.constexpr = tl.constexpr(select.SAMPLE)
_GROUP: tl.constexpr = tl.constexpr(GROUP)
_TINY: tl.constexpr = tl.constexpr(select.TINY)
_NEVER: tl.constexpr = tl.constexpr(select.NEVER)

# the interpreter holds bf16 as raw 16-bit integers and multiplies those
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


class Tiles(NamedTuple):
    """Constants of the product: rows, columns and depth of a tile, warps, stages."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


TILES = {"bf16": Tiles(128, 128, 64, 8, 3), "tf32": Tiles(128, 128, 32, 8, 3), "fp32": Tiles(128, 64, 16, 8, 2)}


def repairing(tiles: Tiles) -> Tiles:
    """The tile of `repair_kernel`: half the rows and no pipeline, or it spills. What a sum is does not depend on either."""
    return tiles._replace(BM=max(16, tiles.BM // 2), stages=1)


PRECISION = {"bf16": "ieee", "tf32": "tf32", "fp32": "ieee"}


@triton.jit
def _product(
    x_ptr, W_ptr, b_ptr, row_M, column_N, F, D16,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x[rows] @ W[columns].T + b[columns], fp32; 0 in columns ≥ F. Rows must exist. A sum's order does not depend on the tile."""
    # the launcher pads D and checks the matrices: whole vectors of 16 bytes are loaded even where a caller's width is odd
    D = D16 * 16
    depth_K = tl.arange(0, BK)
    inside_N = column_N < F
    x_ptrs = tl.multiple_of(x_ptr + row_M.to(tl.int64)[:, None] * D + depth_K[None, :], (1, 16))
    W_ptrs = tl.multiple_of(W_ptr + column_N.to(tl.int64)[:, None] * D + depth_K[None, :], (1, 16))
    acc = tl.zeros((BM, BN), tl.float32)
    for lo in range(0, D, BK):
        inside_K = depth_K < D - lo
        x_MK = tl.load(x_ptrs, mask=inside_K[None, :], other=0.0)
        W_NK = tl.load(W_ptrs, mask=inside_N[:, None] & inside_K[None, :], other=0.0)
        if UPCAST:
            x_MK = x_MK.to(tl.float32)
            W_NK = W_NK.to(tl.float32)
        acc = tl.dot(x_MK, tl.trans(W_NK), acc, input_precision=PRECISION)
        x_ptrs += BK
        W_ptrs += BK
    return acc + tl.load(b_ptr + column_N, mask=inside_N, other=0.0)[None, :]


@triton.jit
def _passed(acc, floor, scale_ptr, column_N, F, zero_upto, SCALED: tl.constexpr):
    """The tile with 0 wherever the key does not reach the bar; bars are at least TINY, so nothing that passes is 0.

    `key_bits` without what a bar makes superfluous: NaN of every kind is above all bars but NEVER, small keys are below all.
    """
    ranked = tl.where(acc <= zero_upto, 0.0, acc)
    if SCALED:
        ranked = ranked * tl.load(scale_ptr + column_N, mask=column_N < F, other=0.0)[None, :]
    return tl.where((ranked.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= floor, acc, 0.0)


@triton.jit
def _next_survivor(acc, BN: tl.constexpr):
    """Of each row's first survivor: (acc without it, value, column in the tile).

    The accumulator is all that lives from one round to the next. With an array of keys beside it, both do not fit.
    """
    code_N = BN - 1 - tl.arange(0, BN)
    first_M = tl.max(tl.where(acc != 0, code_N[None, :], -1), 1)
    hit = code_N[None, :] == first_M[:, None]
    value_M = tl.sum(tl.where(hit, acc, 0.0), 1)
    return tl.where(hit, 0.0, acc), value_M, BN - 1 - first_M


@triton.jit
def _append_to_lists(acc, row_M, live_M, first_column, value_ptr, index_ptr, count_ptr, stride, cap, BN: tl.constexpr):
    """Each row's survivors onto its list. The counter keeps counting past `cap`, what would lie there is dropped."""
    n_M = tl.sum((acc != 0).to(tl.int32), 1)
    base_M = tl.atomic_add(count_ptr + row_M, n_M, mask=live_M & (n_M > 0), sem="relaxed")
    line_M = row_M.to(tl.int64) * stride
    for i in range(tl.max(n_M, 0)):
        acc, value_M, column_M = _next_survivor(acc, BN)
        place_M = base_M + i
        stored_M = (i < n_M) & live_M & (place_M < cap)
        tl.store(value_ptr + line_M + place_M, value_M, mask=stored_M)
        tl.store(index_ptr + line_M + place_M, first_column + column_M, mask=stored_M)


@triton.jit(do_not_specialize=["B", "D16", "first_row", "width16"])
def product_kernel(
    x_ptr, W_ptr, b_ptr, out_ptr, bad_ptr, tally_ptr, B, F, D16, first_row, width16,
    BAD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pre-activations, stored dense: every 16th tile of columns of the rows first_row to B − 1; or BAD: all of the first B bad rows."""
    at_M = tl.program_id(1) * BM + tl.arange(0, BM)
    live_M = first_row + at_M < B
    row_M = tl.minimum(first_row + at_M, B - 1)
    tile = tl.program_id(0) * _SAMPLE
    if BAD:
        tile = tl.program_id(0)
        bad = tl.minimum(tl.load(tally_ptr), B)
        if tl.program_id(1) * BM >= bad:
            return
        live_M = at_M < bad
        row_M = tl.load(bad_ptr + at_M, mask=live_M, other=0)
    at_N = tl.program_id(0) * BN + tl.arange(0, BN)
    column_N = tile * BN + tl.arange(0, BN)
    acc = _product(x_ptr, W_ptr, b_ptr, row_M, column_N, F, D16, BM, BN, BK, PRECISION, UPCAST)
    out_ptrs = tl.multiple_of(out_ptr + at_M.to(tl.int64)[:, None] * (width16 * 16) + at_N[None, :], (1, 16))
    tl.store(out_ptrs, acc, mask=live_M[:, None] & (column_N < F)[None, :])


@triton.jit(do_not_specialize=["B", "D16", "cap", "n_tiles", "phase", "floor_stride"])
def filter_kernel(
    x_ptr, W_ptr, b_ptr, scale_ptr, floor_ptr, value_ptr, place_ptr, count_ptr, B, F, D16, stride, cap, n_tiles, phase,
    floor_stride, zero_upto,
    FLAT: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """One tile of the product, filtered. Bars are key bits, at least TINY.

    FLAT: bars by column (stride 0: one bar), survivors go to one list as (row · F + feature, value). Else bars by row, survivors go
    to their row's list as (feature, value). Phase 0: every tile; 1: 4, 8 and 12 of each 16; 2: all but 0, 4, 8 and 12.
    """
    row_tiles = tl.cdiv(B, BM)
    per_group = _GROUP * n_tiles
    group = tl.program_id(0) // per_group
    in_group = tl.minimum(row_tiles - group * _GROUP, _GROUP)
    inside = tl.program_id(0) % per_group
    row_tile = group * _GROUP + inside % in_group
    tile = inside // in_group
    if phase == 1:
        tile = tile // 3 * _SAMPLE + 4 + tile % 3 * 4
    if phase == 2:
        among = tile % 12
        tile = tile // 12 * _SAMPLE + among // 3 * 4 + 1 + among % 3
    if tile * BN >= F:
        return
    row_M = row_tile * BM + tl.arange(0, BM)
    live_M = row_M < B
    # a row that does not exist repeats the last one, and its survivors are not counted
    row_M = tl.minimum(row_M, B - 1)
    column_N = tile * BN + tl.arange(0, BN)
    acc = _product(x_ptr, W_ptr, b_ptr, row_M, column_N, F, D16, BM, BN, BK, PRECISION, UPCAST)
    if FLAT:
        floor_N = tl.load(floor_ptr + column_N * floor_stride, mask=column_N < F, other=_NEVER)
        acc = _passed(acc, floor_N[None, :], scale_ptr, column_N, F, zero_upto, SCALED)
        n_M = tl.where(live_M, tl.sum((acc != 0).to(tl.int32), 1), 0)
        n = tl.sum(n_M, 0)
        if n > 0:
            # one slot counter for all: one atomic per tile, the rows share out what it gives
            base_M = tl.atomic_add(count_ptr, n, sem="relaxed") + tl.cumsum(n_M, 0) - n_M
            place_M = row_M.to(tl.int64) * F + tile * BN
            for i in range(tl.max(n_M, 0)):
                acc, value_M, column_M = _next_survivor(acc, BN)
                slot_M = base_M + i
                stored_M = (i < n_M) & (slot_M < cap)
                tl.store(value_ptr + slot_M, value_M, mask=stored_M)
                tl.store(place_ptr + slot_M, place_M + column_M, mask=stored_M)
    else:
        floor_M = tl.load(floor_ptr + row_M, mask=live_M, other=_NEVER)
        acc = _passed(acc, floor_M[:, None], scale_ptr, column_N, F, zero_upto, SCALED)
        _append_to_lists(acc, row_M, live_M, tile * BN, value_ptr, place_ptr, count_ptr, stride, cap, BN)


@triton.jit(do_not_specialize=["D16", "k", "first_bad"])
def repair_kernel(
    x_ptr, W_ptr, b_ptr, scale_ptr, value_ptr, index_ptr, count_ptr, floor_ptr, bad_ptr, tally_ptr, F, D16, stride, k,
    first_bad, zero_upto,
    CAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of bad rows from `first_bad` on, all columns in order; a list is cut before it could overflow.

    A program for so many rows is slow, and never wrong: it is for batches in which hardly a list had room.
    """
    first = first_bad + tl.program_id(0) * BM
    bad = tl.load(tally_ptr)
    if first >= bad:
        return
    at_M = first + tl.arange(0, BM)
    live_M = at_M < bad
    room = tl.minimum(stride, CAP)
    row_M = tl.load(bad_ptr + at_M, mask=live_M, other=0)
    tl.store(count_ptr + row_M, tl.zeros((BM,), tl.int32), mask=live_M)
    tl.store(floor_ptr + row_M, tl.zeros((BM,), tl.int32) + _TINY, mask=live_M)
    tl.debug_barrier()
    for tile in tl.range(0, tl.cdiv(F, BN), disable_licm=True):
        column_N = tile * BN + tl.arange(0, BN)
        # read anew: masks and addresses of all rows, kept in registers over the whole loop, would spill
        bad = tl.load(tally_ptr)
        live_M = at_M < bad
        row_M = tl.load(bad_ptr + at_M, mask=live_M, other=0)
        acc = _product(x_ptr, W_ptr, b_ptr, row_M, column_N, F, D16, BM, BN, BK, PRECISION, UPCAST)
        floor_M = tl.load(floor_ptr + row_M, mask=live_M, other=_NEVER)
        acc = _passed(acc, floor_M[:, None], scale_ptr, column_N, F, zero_upto, True)
        _append_to_lists(acc, row_M, live_M, tile * BN, value_ptr, index_ptr, count_ptr, stride, room, BN)
        tl.debug_barrier()
        for i in tl.range(0, tl.minimum(BM, bad - first), disable_licm=True):
            row = tl.load(bad_ptr + first + i).to(tl.int64)
            if tl.load(count_ptr + row) > room - BN:
                cut_in_order(
                    value_ptr + row * stride, index_ptr + row * stride, count_ptr + row, floor_ptr + row, scale_ptr, k,
                    zero_upto, CAP,
                )  # fmt: skip
        tl.debug_barrier()


# Launchers


@dataclass
class Kept:
    """What one caller's batches have shown, beside its workspace. It changes the speed of the next call, never a result."""

    cap: int = 0
    """Places in a row's list; 0 = as computed from k."""
    flat: int = 0
    """Survivors of the last flat pass."""
    tally: Tensor | None = None
    """int32 of the last RowCount in phases: bad rows, longest list, entries of all lists."""


_KEPT: WeakKeyDictionary[Workspace, Kept] = WeakKeyDictionary()


@dataclass(frozen=True)
class Options:
    """What a launcher decides; tests force it."""

    tiles: Tiles | None = None
    cap: int | None = None
    """An overflow is declared past so many entries of a list."""
    repair_rows: int = REPAIR_ROWS
    phases: bool | None = None
    buffer: int = BUFFER
    flat: int | None = None
    """Places in the first flat list."""
    chunk: int = select.ROW_CHUNK


def cannot(rule_name: str, key: str, scaled: bool) -> str | None:
    """Why this path does not select by a rule ("row_count", …) and key; None where it does."""
    if key not in ("relu", "abs"):
        return f"the triton path does not rank by key {key!r}"
    return None


def encode_select(
    x_BD, W_enc_FD, b_enc_F, b_in_D=None, *, rule: Rule, key="relu", scale_F=None, compute="fp32", workspace=None,
    options: Options = Options(),
) -> Selected:  # fmt: skip
    """Equivalent to `reference.encode_select`, ties included."""
    assert cannot("", key, scale_F is not None) is None, key
    workspace = workspace or Workspace()
    encoder = Encoder(x_BD, W_enc_FD, b_enc_F, b_in_D, compute, workspace)
    if not x_BD.numel() or not len(W_enc_FD):
        return portable.encode_select(
            x_BD, W_enc_FD, b_enc_F, b_in_D, rule=rule, key=key, scale_F=scale_F, compute=compute, workspace=workspace
        )
    job = _Job(encoder, key, scale_F, compute, workspace, options)
    if isinstance(rule, RowCount):
        return job.row_count(rule.k)
    if isinstance(rule, BatchCount):
        return job.batch_count(rule)
    if isinstance(rule, ColumnCount):
        return job.column_count(rule)
    if isinstance(rule, RowMass):
        return job.row_mass(rule)
    assert isinstance(rule, Threshold)
    return job.threshold(rule)


def tally(workspace: Workspace) -> dict[str, int]:
    """Counters of the workspace's last RowCount in phases. Waits for the device: call it at logging steps.

    More bad rows than are computed dense make the lists longer from the next call on.
    """
    kept = _KEPT.get(workspace)
    if kept is None or kept.tally is None:
        return {}
    bad, most, total = kept.tally.tolist()[:3]
    if bad > REPAIR_ROWS:
        kept.cap = next((places for places in select.LIST_WARPS if places > kept.cap), kept.cap)
    return {"rows_overflowed": bad, "survivors_max": most, "survivors": total}


def _whole_vectors(matrix: Tensor) -> Tensor:
    """The matrix, or a copy with zeros behind its rows, such that each row is a whole number of vectors of 16 bytes."""
    if matrix.shape[1] % 16:
        matrix = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % 16))
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % 16 else matrix


class _Job:
    """One call: its operands as the kernels want them."""

    def __init__(self, encoder: Encoder, key: str, scale_F: Tensor | None, compute: str, workspace, options: Options):
        self.encoder, self.key, self.options = encoder, key, options
        self.x_BD, self.W_FD = _whole_vectors(encoder.x_BD), _whole_vectors(encoder.W_enc_FD)
        self.b_F = encoder.b_enc_F.contiguous()
        # where a factor of 1 costs next to nothing, there is no second set of kernels without it
        self.scaled = scale_F is not None
        self.scale_F = torch.ones_like(self.b_F) if scale_F is None else scale_F.float().contiguous()
        self.workspace, self.kept = workspace, _KEPT.setdefault(workspace, Kept())
        self.tiles = options.tiles or TILES[compute]
        self.compute = compute
        self.constants = self.constants_of(self.tiles)
        self.B, self.D = self.x_BD.shape
        self.F = len(self.W_FD)

    def constants_of(self, tiles: Tiles) -> dict:
        return {
            "PRECISION": PRECISION[self.compute], "UPCAST": INTERPRETED and self.compute == "bf16",
            "BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK, "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def empty(self, *shape: int, dtype=torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x_BD.device)

    def zeros(self, *shape: int, dtype=torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.x_BD.device)

    def filter(self, floor: Tensor, value: Tensor, place: Tensor, count: Tensor, *, cap: int, phase: int = 0) -> None:
        """One pass over the tiles of a phase; without phases the lists are one flat list."""
        tiles = triton.cdiv(self.F, self.tiles.BN)
        if phase:
            tiles = triton.cdiv(tiles, SAMPLE) * (3 if phase == 1 else 12)
        filter_kernel[(triton.cdiv(self.B, self.tiles.BM) * tiles,)](
            self.x_BD, self.W_FD, self.b_F, self.scale_F if self.scaled else None, floor, value, place, count,
            self.B, self.F, self.D // 16, value.shape[-1], cap, tiles, phase, int(len(floor) > 1), zero_upto(self.key),
            FLAT=not phase, SCALED=self.scaled, **self.constants,
        )  # fmt: skip

    # Rows

    def row_count(self, k: int) -> Selected:
        """Row-wise codes."""
        codes = self.empty(self.B, k, dtype=torch.float32), self.empty(self.B, k)
        phases = k <= self.F // 64 and self.F > 8192 and select.capacity(k) is not None
        if phases if self.options.phases is None else self.options.phases:
            self.row_count_in_phases(k, codes)
        else:
            for lo, pre in self.encoder.blocks():
                self.select_rows(pre, first_row=lo, k=k, codes=codes)
        return Selected(Codes.rowwise(*codes, self.F))

    def select_rows(self, pre: Tensor, **what) -> None:
        select.select_rows(pre, self.scale_F, self.key, chunk=self.options.chunk, **what)

    def row_count_in_phases(self, k: int, codes: tuple[Tensor, Tensor]) -> None:
        BM, BN = self.tiles.BM, self.tiles.BN
        repaired = self.options.repair_rows
        self.kept.cap = max(self.kept.cap, select.capacity(k) or 0)
        # a list that is repaired holds one more tile beside the k best
        places = max(self.kept.cap, triton.next_power_of_2(k + BN))
        cap = self.options.cap or self.kept.cap
        assert k < cap <= places, (k, cap)
        lists = self.empty(self.B, places, dtype=torch.float32), self.empty(self.B, places), self.empty(self.B)
        floors, bad = self.empty(self.B), self.empty(self.B)
        tally = self.kept.tally = self.zeros(3)

        def cut_lists(**what):
            select.select_lists(*lists, floors, bad, tally, self.scale_F, self.key, k=k, **what)

        sampled = triton.cdiv(triton.cdiv(self.F, BN), SAMPLE)
        width = sampled * BN
        repair_width = triton.cdiv(self.F, 16) * 16
        rows = max(1, self.options.buffer // (4 * width * BM)) * BM
        buffer = self.workspace.get("pre", (max(min(rows, self.B) * width, repaired * repair_width),), self.b_F)
        for lo in range(0, self.B, rows):
            block = min(rows, self.B - lo)
            pre = buffer[: block * width].view(block, width)
            product_kernel[(sampled, triton.cdiv(block, BM))](
                self.x_BD, self.W_FD, self.b_F, pre, None, None, lo + block, self.F, self.D // 16, lo, width // 16,
                BAD=False, **self.constants,
            )  # fmt: skip
            self.select_rows(pre, first_row=lo, k=k, lists=(*lists, floors), tile=BN)
        self.filter(floors, *lists, cap=cap, phase=1)
        cut_lists(cap=cap)
        self.filter(floors, *lists, cap=cap, phase=2)
        cut_lists(cap=cap, codes=codes)

        pre = buffer[: repaired * repair_width].view(repaired, repair_width)
        product_kernel[(triton.cdiv(self.F, BN), triton.cdiv(repaired, BM))](
            self.x_BD, self.W_FD, self.b_F, pre, bad, tally, repaired, self.F, self.D // 16, 0, repair_width // 16,
            BAD=True, **self.constants,
        )  # fmt: skip
        self.select_rows(pre, k=k, codes=codes, bad=(bad, tally))
        if repaired < self.B:
            tiles = repairing(self.tiles)
            repair_kernel[(triton.cdiv(self.B - repaired, tiles.BM),)](
                self.x_BD, self.W_FD, self.b_F, self.scale_F, *lists, floors, bad, tally, self.F, self.D // 16,
                places, k, repaired, zero_upto(self.key), CAP=REPAIR_CAP, **self.constants_of(tiles),
            )  # fmt: skip
            cut_lists(cap=places, codes=codes, bad_from=repaired)

    def row_mass(self, rule: RowMass) -> Selected:
        """Flat codes: the mass of a sample seldom reaches the target, so each row's bar comes from the whole row, block by block."""
        floors, t_B = self.empty(self.B), rule.t_B.to(self.b_F).contiguous()
        empty = self.empty(0, dtype=torch.float32)
        places, values = [empty.long()], [empty]
        for lo, pre in self.encoder.blocks():
            self.select_rows(pre, first_row=lo, mass=(t_B, floors))
            bits = torch_key_bits(pre, self.key, self.scale_F)
            place = (bits >= floors[lo : lo + len(pre), None]).view(-1).nonzero().squeeze(1)
            place = place[_nearest_mass(place, bits.view(-1)[place], t_B[lo : lo + len(pre)], self.F)]
            places.append(place + lo * self.F)
            values.append(pre.view(-1)[place])
        return Selected(portable.flat_codes(torch.cat(places), torch.cat(values), self.B, self.F))

    # Flat

    def survivors(self, floor: Tensor, most: int | None = None) -> tuple[Tensor, Tensor, Tensor] | int:
        """Every entry that reaches its bar, in row order: place = row · F + feature (int64), value, key bits.

        One number where more than `most` survive: how many.
        """
        cap = self.options.flat or max(1 << 16, self.kept.flat + self.kept.flat // 4)
        while True:
            value, place = self.empty(cap, dtype=torch.float32), self.empty(cap, dtype=torch.int64)
            count = self.zeros(1)
            self.filter(floor, value, place, count, cap=cap)
            n = int(count)
            if n < 0:
                raise ValueError(f"more than {2**31 - 1:,} entries pass the bar; use fewer rows, or a higher bar")
            if most is not None and n > most:
                return n
            if n <= cap:
                break
            cap = n
        self.kept.flat = n
        # slots were handed out in the order of arrival: sorting forgets it
        place, order = place[:n].sort()
        value = value[:n][order]
        return place, value, torch_key_bits(value, self.key, self.scale_F[place % self.F])

    def bar(self, above: Tensor) -> Tensor:
        """Key bits that only keys above a bar reach, and NaN: int32, at least TINY."""
        clean = above.float().clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf).contiguous()
        return (clean.view(torch.int32) + 1).clamp_(min=select.TINY)

    def threshold(self, rule: Threshold) -> Selected:
        """Flat codes of every key strictly above the bar."""
        theta = torch.as_tensor(rule.theta, dtype=torch.float32, device=self.x_BD.device) - rule.margin
        place, value, _ = self.survivors(self.bar(theta.reshape(-1)))
        return Selected(portable.flat_codes(place, value, self.B, self.F))

    def batch_count(self, rule: BatchCount) -> Selected:
        """The m best of the batch among the survivors of a bar that is lowered until m survive."""
        m = min(rule.m, self.B * self.F)
        for bar, hinted in self.batch_bars(rule):
            # a hint far too low would let half the matrix through
            found = self.survivors(self.bar(bar.reshape(1)), most=2 * m + (1 << 16) if hinted else None)
            if not isinstance(found, int) and (len(found[0]) >= m or float(bar) <= 0):
                break
        assert not isinstance(found, int), "the last bar is 0, and has no limit"
        return portable.keep_batch(*found, m, self.B, self.F)

    def batch_bars(self, rule: BatchCount) -> Iterator[tuple[Tensor, bool]]:
        """Bars to try: the hint (the second entry says so); should it be too low or too high, two of a sample; 0."""
        if rule.hint is not None:
            bar = next(portable.batch_bars(self.encoder, rule, self.key, self.scale_F))
            if float(bar) > 0:
                yield bar, True
        if rule.m == 0:
            yield self.zeros(dtype=torch.float32) + torch.inf, False
        for bar in portable.batch_bars(self.encoder, BatchCount(rule.m), self.key, self.scale_F):
            yield bar, False

    def column_count(self, rule: ColumnCount) -> Selected:
        """The m_j best of column j among the survivors of its bar; columns left short are computed anew, a few at a time."""
        m_F = rule.m_F.to(device=self.x_BD.device, dtype=torch.int64).clamp(min=0)
        place, value, bits = self.empty(0, dtype=torch.int64), self.empty(0, dtype=torch.float32), self.empty(0)
        short_F = m_F > 0
        bar_F = self.zeros(self.F, dtype=torch.float32)
        if rule.hint_F is not None:
            bar_F = rule.hint_F.float().clamp(min=0)
            # a column that may keep nothing needs no survivors
            floor_F = torch.where(short_F, self.bar(bar_F), select.NEVER)
            # far too low a hint would let half the matrix through: then every column is computed anew
            found = self.survivors(floor_F, most=8 * int(m_F.clamp(max=self.B).sum()) + (1 << 20))
            if not isinstance(found, int):
                place, value, bits = found
                short_F &= (torch.bincount(place % self.F, minlength=self.F) < m_F) & (bar_F != 0)
        if bool(short_F.any()):
            other = ~short_F[place % self.F]
            parts = [(place[other], value[other], bits[other]), *self.columns(short_F.nonzero().squeeze(1), m_F)]
            place, value, bits = (torch.cat(part) for part in zip(*parts))
            place, order = place.sort()
            value, bits, bar_F = value[order], bits[order], bar_F.masked_fill(short_F, 0.0)
        return portable.keep_columns(place, value, bits, m_F, bar_F, self.B)

    def columns(self, feature_A: Tensor, m_F: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Survivors of whole columns: keys down to the 4 m-th, which is the next hint, and all that equal it."""
        for feature in feature_A.split(max(1, self.options.buffer // (4 * self.B))):
            pre_BA = self.encoder.columns(feature)
            bits_BA = torch_key_bits(pre_BA, self.key, self.scale_F[feature])
            last_A = (4 * m_F[feature]).clamp(max=self.B) - 1
            sorted_BA = bits_BA.sort(dim=0, descending=True).values
            floor_A = sorted_BA.gather(0, last_A[None]).clamp_(min=1)
            row, at = (bits_BA >= floor_A).nonzero(as_tuple=True)
            yield row * self.F + feature[at], pre_BA[row, at], bits_BA[row, at]


def _nearest_mass(place: Tensor, bits: Tensor, t_B: Tensor, n_features: int) -> Tensor:
    """bool (N): of candidates in row order that cover each row's first crossing of t, the prefix whose norm is nearest to t."""
    rows, device = len(t_B), place.device
    row = place.div(n_features, rounding_mode="floor")
    order = torch.sort((row << 31) | (select.NEVER - bits.long()), stable=True).indices
    start_B1 = torch.searchsorted(row, torch.arange(rows + 1, device=device))
    rank = torch.arange(len(row), device=device) - start_B1[row]
    longest = int(start_B1.diff().amax()) if len(row) else 0
    if not longest:
        return torch.zeros_like(bits, dtype=torch.bool)
    key = torch.zeros(rows, longest, dtype=torch.float64, device=device)
    key[row, rank] = bits[order].view(torch.float32).double()
    n, _ = portable.nearest(key.square().cumsum(1), start_B1.diff()[:, None], t_B)
    kept = torch.zeros_like(bits, dtype=torch.bool)
    kept[order] = rank < n.squeeze(1)[row]
    return kept


def _shipped() -> Iterator[Shipped]:
    floats, ints = ("b_ptr", "scale_ptr", "value_ptr"), ("floor_ptr", "count_ptr", "bad_ptr", "tally_ptr", "index_ptr")
    known = {
        **dict.fromkeys((*floats, "out_ptr"), "*fp32"),
        **dict.fromkeys(ints, "*i32"),
        "zero_upto": "fp32",
    }
    ragged = ("B", "D16", "cap", "n_tiles", "phase", "floor_stride", "first_row", "width16", "k", "first_bad")
    for compute, tiles in TILES.items():
        matrix = "*bf16" if compute == "bf16" else "*fp32"
        for kernel, own in (
            (product_kernel, {"bad_ptr": None, "tally_ptr": None, "BAD": False}),
            (product_kernel, {"BAD": True}),
            (filter_kernel, {"scale_ptr": None, "FLAT": False, "SCALED": False}),
            (filter_kernel, {"FLAT": False, "SCALED": True}),
            (filter_kernel, {"scale_ptr": None, "FLAT": True, "SCALED": False}),
            (filter_kernel, {"FLAT": True, "SCALED": True}),
            (repair_kernel, {"CAP": REPAIR_CAP}),
        ):
            flat = own.get("FLAT", False)
            types = {**known, "x_ptr": matrix, "W_ptr": matrix, "place_ptr": "*i64" if flat else "*i32"}
            used = repairing(tiles) if kernel is repair_kernel else tiles
            own = {**own, "PRECISION": PRECISION[compute], "UPCAST": False, "BM": used.BM, "BN": used.BN, "BK": used.BK}
            names = [n for n in kernel.arg_names if n not in own]
            yield Shipped(
                kernel, {n: types.get(n, "i32") for n in names}, own, used.warps, used.stages, gemm=compute != "fp32",
                ragged=(*ragged, "stride") if flat else ragged,
            )  # fmt: skip


SHIPPED = list(_shipped())
