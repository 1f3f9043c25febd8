"""Reads an activation store: mapped files, rows copied out of them in any order.

    store = open_store("acts/gpt2")
    store.read(site, 0, 4096)                                   # text order, a view where it can be
    for batch in store.batches([site], batch=4096, seed=0):
        x_BD = batch[site]                                      # store dtype; batch.rows are the store rows

A reader never writes into the store, and converts no value.

D width of a site · E rows · n rows of a shard
"""

import ctypes
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.store import format as layout
from saekit.store.format import STATISTICS, TOKENS, TokenTable, human_bytes
from saekit.store.order import Intervals
from saekit.store.rows import STATISTICS_ROWS, RowSource, Statistics, Window, statistics_of
from saekit.store.writer import TORCH_DTYPES

TOUCHED_AHEAD = 512
"""Rows whose first bytes are fetched before the rows are copied; all of them fit into the second-level cache."""
BUFFERS = 8
"""Batches' memories that are kept for the next ones."""
SAMPLED = 64
"""Stretches that are looked at before many are asked for."""
HUGE = 1 << 21
"""Bytes of a large page."""


def open_store(path: str | Path) -> "Store":
    """The finished store in a folder. Checks the manifest and the size of every file, no checksum.

    Raises:
        SaekitError: no store, an unfinished or damaged one, a format version of another time, a file missing or truncated.
    """
    return Store(path)


class Store(RowSource):
    """A finished activation store; see the module's first lines for its use."""

    def __init__(self, path: str | Path):
        self.path = path
        self.folder = Path(path)
        self.manifest = layout.read_manifest(self.folder)
        self.fingerprint = self.manifest["fingerprint"]
        self.sites = tuple(self.manifest["sites"])
        self.rows = self.manifest["rows"]
        self.n_sequences = self.manifest["sequences"]
        self.n_tokens = self.manifest["tokens"]
        self.dtype = TORCH_DTYPES[self.manifest["dtype"]]
        self.shard_rows = np.concatenate([[0], np.cumsum([s["rows"] for s in self.manifest["shards"]], dtype=np.int64)])
        """First row of each shard, and E."""
        for name, record in layout.files_of(self.manifest).items():
            if problem := layout.size_problem(self.folder, name, record["bytes"]):
                raise SaekitError(problem)
        self._files: dict[str, SiteFiles] = {}

    def __repr__(self) -> str:
        return f"<Store {self.path}: {self.rows:,} rows of {self.n_tokens:,} tokens, {', '.join(self.sites)}>"

    def read_table(self) -> TokenTable:
        return layout.read_tokens(self.folder / TOKENS)

    def statistics(self, site: str, rows: int | None = None) -> Statistics:
        self._require([site])
        entry = self.manifest["sites"][site]
        if rows is not None:
            count = min(rows, self.rows)
            starts = range(0, count, STATISTICS_ROWS)
            chunks = (self.read(site, lo, min(lo + STATISTICS_ROWS, count)) for lo in starts)
            return statistics_of(chunks, entry["norm_limit"])
        tensors = layout.map_tensors(self.folder / STATISTICS)
        mean_D, variance_D = np.array(tensors[f"{site}.mean"]), np.array(tensors[f"{site}.variance"])
        return Statistics(mean_D, variance_D, entry["mean_norm"], entry["rms_norm"], float(variance_D.sum()))

    def read(self, site: str, lo: int, hi: int) -> torch.Tensor:
        """Rows lo to hi - 1 in text order, (hi - lo, D) in the store dtype: a view inside one shard, else one copy.

        The view shares memory with the mapped file, privately: writing to it changes neither the file nor the store.
        """
        assert 0 <= lo <= hi <= self.rows, f"rows {lo} to {hi} of {self.rows}"
        files = self.files(site)
        first = int(np.searchsorted(self.shard_rows, lo, side="right")) - 1
        parts = []
        for i in range(min(first, len(files.shards) - 1), len(files.shards)):
            start = int(self.shard_rows[i])
            parts.append(files.shards[i][max(lo - start, 0) : hi - start])
            if hi <= self.shard_rows[i + 1]:
                break
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def outliers(self, sites: str | Sequence[str]) -> np.ndarray:
        sites = self._require(sites)
        found = [rows for site in sites for rows in self._outliers_of(site)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def windows(self, sites: Sequence[str]) -> "StoreWindows":
        return StoreWindows({site: self.files(site) for site in sites})

    def files(self, site: str) -> "SiteFiles":
        """The mapped shards of a site."""
        self._require([site])
        if site not in self._files:
            names = [layout.shard_name(site, i) for i in range(len(self.manifest["shards"]))]
            self._files[site] = SiteFiles(
                [self.folder / name for name in names], self.d(site), self.dtype, self.shard_rows
            )
        return self._files[site]

    def _outliers_of(self, site: str) -> list[np.ndarray]:
        if self.manifest["sites"][site]["outlier_rows"] == 0:
            return []
        return [rows + start for rows, start in zip(self.files(site).outliers(), self.shard_rows)]


class SiteFiles:
    """All shards of one site, mapped into memory, and rows copied out of them in any order."""

    def __init__(self, paths: list[Path], d: int, dtype: torch.dtype, shard_rows: np.ndarray):
        self.paths, self.d, self.dtype, self.shard_rows = paths, d, dtype, shard_rows
        self.row_bytes = d * dtype.itemsize
        sizes, starts = [], []
        for path, n in zip(paths, np.diff(shard_rows)):
            entry = layout.read_header(path).get("activations")
            if entry is None or entry.tag != layout.DTYPES[str(dtype).removeprefix("torch.")] or entry.shape != (n, d):
                raise SaekitError(
                    f"{path} does not hold {n:,} rows of {d} {str(dtype).removeprefix('torch.')}; restore it or collect again"
                )
            sizes.append(path.stat().st_size)
            starts.append(entry.start)
        self._buffers = Buffers()
        offsets, length = _places(sizes, starts, self.row_bytes)
        self._bytes = np.asarray(_Mapping(paths, sizes, offsets, length))
        begins = np.array(offsets) + starts
        """Where the rows of each shard begin in `_bytes`."""
        self.shards: list[torch.Tensor] = [
            torch.from_numpy(self._bytes[a : a + n * self.row_bytes]).view(dtype).view(n, d)
            for a, n in zip(begins.tolist(), np.diff(shard_rows).tolist())
        ]
        """(n, D) views."""
        # Rows of all shards are items of one array: a batch from a thousand shards is one call. An item is a whole row where
        # `activations` start at multiples of 4096, which a store need not keep to, and else a fraction of one.
        size = math.gcd(self.row_bytes, *begins.tolist())
        self._words = self._bytes.view(np.int64)
        self._items = self._bytes[: length // size * size].view(f"V{size}")
        self._per_row = self.row_bytes // size
        # First item of a row = row · items per row + what is the same for all rows of its shard.
        self._offsets = begins // size - shard_rows[:-1] * self._per_row
        self._shard = Intervals(shard_rows)
        self._address, self._begins, self._starts = self._bytes.__array_interface__["data"][0], begins, starts

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), D) in the order of `rows` (int64 row numbers of the store); one pass over the data, without the GIL."""
        if not len(rows):
            return torch.empty(0, self.d, dtype=self.dtype)
        items = rows * self._per_row + self._offsets[self._shard(rows)]
        memory = self._buffers.take(len(rows) * self.row_bytes)
        out = memory.view(self._items.dtype).reshape(len(rows), self._per_row)
        # A row that is in no cache costs a wait for its first bytes; the processor then fetches the others by itself. Touching
        # the first bytes of many rows lets these waits overlap. Rows of 1.5 KB: 155 instead of 203 ns with two threads (EPYC,
        # 4 KiB pages; 170 with 256 or 1,024 rows at once, 400 with 64, where the threads wait for each other); rows of 384
        # bytes gain nothing.
        wide = self.row_bytes >= 1024
        group = TOUCHED_AHEAD if wide else max(1, len(rows))
        for lo in range(0, len(rows), group):
            first = items[lo : lo + group]
            # Every index is in range; "clip" is the mode that needs no check and writes into `out` without a copy.
            if wide:
                self._words.take(first * self._items.itemsize // 8, mode="clip")
            self._items.take(first[:, None] + np.arange(self._per_row), mode="clip", out=out[lo : lo + group])
        return torch.from_numpy(memory).view(self.dtype).view(len(rows), self.d)

    def outliers(self) -> list[np.ndarray]:
        """Per shard the rows that are outliers, counted from its first, int64."""
        return [layout.map_tensors(path)["outlier_rows"].astype(np.int64) for path in self.paths]

    def will_need(self, first: np.ndarray, last: np.ndarray) -> None:
        """Have the kernel begin to read rows first[i] to last[i], ascending, from the disk."""
        inner = self.shard_rows[1:-1]
        block = np.searchsorted(first, inner, side="left") - 1
        cuts = np.unique(inner[(block >= 0) & (inner <= last[block])])
        # A cut ends one stretch and begins the next; sorted, beginnings and ends pair up again.
        first, last = np.sort(np.append(first, cuts)), np.sort(np.append(last, cuts - 1))
        shard = self._shard(first)
        starts = self._begins[shard] + (first - self.shard_rows[shard]) * self.row_bytes
        ends = starts + (last - first + 1) * self.row_bytes
        starts -= starts % layout.PAGE
        # For what is in memory already a call costs a seventh of the reading of a block. So stretches that touch are asked for
        # together, and none of many if a sample of them is there.
        apart = np.flatnonzero(starts[1:] > ends[:-1])
        if len(apart) > 4 * SAMPLED and all(self._in_memory(row) for row in first[:: len(first) // SAMPLED].tolist()):
            return
        for start, end in zip(starts[np.append(0, apart + 1)].tolist(), ends[np.append(apart, -1)].tolist()):
            # A hint; what the kernel answers makes no difference to what is read.
            _libc.madvise(self._address + start, end - start, _MADV_WILLNEED)

    def _in_memory(self, row: int) -> bool:
        """Whether the first byte of a row can be read without waiting; False where the system cannot tell."""
        i = int(np.searchsorted(self.shard_rows, row, side="right")) - 1
        place = self._starts[i] + (row - int(self.shard_rows[i])) * self.row_bytes
        file = os.open(self.paths[i], os.O_RDONLY)
        try:
            return os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):
            return False
        finally:
            os.close(file)


class Buffers:
    """Memory for batches, given again once nothing uses the one before. Several threads take at once.

    Fresh from the system 6 MiB cost 40 to 380 ns per row of 1.5 KB in page faults, more than copying the row.
    """

    def __init__(self):
        self._free: deque[np.ndarray] = deque()
        self._size = 0

    def take(self, size: int) -> np.ndarray:
        """(size) uint8, uninitialised. It comes back when this very array is gone: a tensor over it keeps it."""
        self._size = max(self._size, size)
        try:
            memory = self._free.pop() if size == self._size else np.empty(size, np.uint8)
        except IndexError:
            memory = np.empty(size, np.uint8)
        if len(memory) != size:
            memory = np.empty(size, np.uint8)
        array = memory[:]
        weakref.finalize(array, self._back, memory).atexit = False
        return array

    def _back(self, memory: np.ndarray) -> None:
        if len(memory) == self._size and len(self._free) < BUFFERS:
            self._free.append(memory)


def _places(sizes: list[int], starts: list[int], row_bytes: int) -> tuple[list[int], int]:
    """Where to map files of these sizes, whose rows begin at `starts`, one behind the other: offsets, and their whole length.

    Offsets are multiples of 2 MiB, where the kernel can map large pages, and such that rows begin at multiples of
    `row_bytes`: offset = HUGE·k with HUGE·k + start = 0 modulo row_bytes. Only addresses lie between, no memory.
    """
    common = math.gcd(HUGE, row_bytes)
    cycle = row_bytes // common
    inverse = pow(HUGE // common, -1, cycle)
    offsets, k = [], 0
    for size, start in zip(sizes, starts):
        k += (-start // common * inverse - k) % cycle
        offsets.append(k * HUGE)
        k += -(-size // HUGE)
    return offsets, k * HUGE


class _Mapping:
    """Files in one range of addresses, as numpy sees it. Private: nobody can write into the store. No file stays open, as
    with `numpy.memmap` and `mmap`: a store may have more files than a process may hold open."""

    def __init__(self, paths: list[Path], sizes: list[int], offsets: list[int], length: int):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _map(None, length + HUGE, _PROT_NONE, flags, -1)
        weakref.finalize(self, _libc.munmap, reserved, length + HUGE)
        base = -(-reserved // HUGE) * HUGE
        for path, size, offset in zip(paths, sizes, offsets):
            file = os.open(path, os.O_RDONLY)
            try:
                flags = mmap.MAP_PRIVATE | _MAP_FIXED
                _map(base + offset, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file)
            finally:
                os.close(file)
        self.__array_interface__ = {"data": (base, False), "shape": (length,), "typestr": "|u1", "version": 3}


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_WILLNEED = 3
_MAP_FIXED = 0x10
_PROT_NONE = 0


def _map(address: int | None, length: int, protection: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, length, protection, flags, file, 0)
    if found == ctypes.c_void_p(-1).value:
        error = os.strerror(ctypes.get_errno()).lower()
        raise SaekitError(
            f"cannot map {human_bytes(length)} of a store: {error}; raise the limit of address space (ulimit -v)"
        )
    return found


class StoreWindows:
    """Rows of the mapped files. The kernel reads from the disk what will be wanted, while the consumer works: this window
    and the following one. What is mapped are clean pages of the page cache, which it takes back when memory is short, so
    nothing is ever released here."""

    def __init__(self, files: Mapping[str, SiteFiles]):
        self._files = files
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="saekit-fetch")
        self._fetched = (-1, -1)
        """Epoch and number of the last window that was asked for."""

    def prepare(self, window: Window, following: Window | None) -> None:
        for wanted in (window, following):
            if wanted is not None and wanted[:2] > self._fetched:
                self._fetched = wanted[:2]
                self._fetcher.submit(self._fetch, wanted)

    def gather(self, site: str, rows: np.ndarray) -> torch.Tensor:
        return self._files[site].gather(rows)

    def close(self) -> None:
        self._fetcher.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, window: Window) -> None:
        for files in self._files.values():
            files.will_need(window.first, window.last)
