"""Reads an activation store: mapped files, shuffled batches, a position that resumes to the bit.

    store = open_store("acts/gpt2")
    store.read(site, 0, 4096)                                   # text order, a view where it can be
    for batch in store.batches([site], batch=4096, seed=0):
        x_BD = batch[site]                                      # store dtype; batch.rows are the store rows

A reader never writes into the store, and converts no value.

B rows in a batch · D width of a site · N tokens · E rows · S sequences · n rows of a shard
"""

import ctypes
import math
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.store import format as layout
from saekit.store.format import STATISTICS, TOKENS, TokenTable, human_bytes
from saekit.store.order import Order, RowSet, heldout_sequences
from saekit.store.writer import TORCH_DTYPES

AHEAD = 3
"""Batches being read while the consumer holds one."""
THREADS = 2
BLOCK_BYTES = 1 << 16
"""A block is at least this long in each site's file: random reads of 64 KiB cost a disk little more than sequential ones."""
WINDOW_BATCH_MULTIPLE = 4
"""Blocks in a window, in batches: with only one block per row of a batch, batch means vary twice as much as random ones."""

Split = Literal["train", "heldout", "all"]
Outliers = Literal["skip", "keep"]
_PARTS = {"train": "the training part", "heldout": "the held-out part", "all": "the whole"}


class Statistics(NamedTuple):
    """Of one site, over all rows that are not outliers, from the stored values."""

    mean_D: np.ndarray
    """(D) float64."""
    variance_D: np.ndarray
    """(D) float64, population variance."""
    mean_norm: float
    rms_norm: float
    total_variance: float
    """Sum of variance_D: the mean squared distance from the mean."""


class RowTokens(NamedTuple):
    """What stands behind a stretch of rows; all (n)."""

    ids: np.ndarray
    """Token ids, uint16 or uint32."""
    documents: np.ndarray
    """Document numbers, int64."""
    positions: np.ndarray
    """Positions in the document, int64."""


class Context(NamedTuple):
    """The tokens around one row, inside its sequence."""

    ids: np.ndarray
    index: int
    """Where in `ids` the row's own token stands."""


def open_store(path: str | Path) -> "Store":
    """The finished store in a folder. Checks the manifest and the size of every file, no checksum.

    Raises:
        SaekitError: no store, an unfinished or damaged one, a format version of another time, a file missing or truncated.
    """
    return Store(path)


class Store:
    """A finished activation store; see the module's first lines for its use."""

    def __init__(self, path: str | Path):
        self.path = path
        """As it was given."""
        self.folder = Path(path)
        self.manifest = layout.read_manifest(self.folder)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.sites: tuple[str, ...] = tuple(self.manifest["sites"])
        self.rows: int = self.manifest["rows"]
        self.n_sequences: int = self.manifest["sequences"]
        self.n_tokens: int = self.manifest["tokens"]
        self.dtype: torch.dtype = TORCH_DTYPES[self.manifest["dtype"]]
        self.shard_rows = np.concatenate([[0], np.cumsum([s["rows"] for s in self.manifest["shards"]], dtype=np.int64)])
        """First row of each shard, and E."""
        for name, record in layout.files_of(self.manifest).items():
            if problem := layout.size_problem(self.folder, name, record["bytes"]):
                raise SaekitError(problem)
        self._files: dict[str, SiteFiles] = {}

    def __repr__(self) -> str:
        return f"<Store {self.path}: {self.rows:,} rows of {self.n_tokens:,} tokens, {', '.join(self.sites)}>"

    def d(self, site: str) -> int:
        """Width of a site."""
        self._require([site])
        return self.manifest["sites"][site]["d"]

    # Tokens and sequences

    @cached_property
    def table(self) -> TokenTable:
        return layout.read_tokens(self.folder / TOKENS)

    @cached_property
    def _row_positions(self) -> np.ndarray:
        return np.flatnonzero(self.table.stored)

    def row_positions(self) -> np.ndarray:
        """(E) int64: token position of each row."""
        return self._row_positions

    @cached_property
    def _seq_rows(self) -> np.ndarray:
        counts = np.add.reduceat(self.table.stored, self.table.seq_start[:-1], dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def seq_rows(self) -> np.ndarray:
        """(S+1) int64: first row of each sequence, and E."""
        return self._seq_rows

    def heldout_sequences(self) -> np.ndarray:
        """Numbers of the held-out sequences, ascending int64."""
        return np.flatnonzero(heldout_sequences(self.n_sequences))

    def tokens(self, lo: int, hi: int) -> RowTokens:
        """Ids, documents and positions of rows lo to hi - 1."""
        assert 0 <= lo <= hi <= self.rows
        first, last = np.searchsorted(self.seq_rows(), [lo, hi], side="right") - 1
        start, stop = self.table.seq_start[first], self.table.seq_start[min(last + 1, self.n_sequences)]
        # Only the sequences in question are looked at: a store may hold billions of tokens.
        inside = start + np.flatnonzero(self.table.stored[start:stop])
        positions = inside[lo - self.seq_rows()[first] :][: hi - lo]
        return RowTokens(
            self.table.token[positions], self.table.doc_of(positions), self.table.position_in_doc(positions)
        )

    def context(self, row: int, before: int, after: int) -> Context:
        """Tokens around a row: at most `before` and `after` of them, dropped ones included, none of another sequence."""
        assert 0 <= row < self.rows
        sequence = int(np.searchsorted(self.seq_rows(), row, side="right")) - 1
        start, stop = (int(v) for v in self.table.seq_start[sequence : sequence + 2])
        position = start + int(np.flatnonzero(self.table.stored[start:stop])[row - self.seq_rows()[sequence]])
        first = max(start, position - before)
        return Context(self.table.token[first : min(stop, position + after + 1)], position - first)

    # Rows

    def statistics(self, site: str) -> Statistics:
        """Mean, variance and norms of a site; outliers are left out."""
        self._require([site])
        tensors = layout.map_tensors(self.folder / STATISTICS)
        mean_D, variance_D = np.array(tensors[f"{site}.mean"]), np.array(tensors[f"{site}.variance"])
        entry = self.manifest["sites"][site]
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
        """Row numbers that are outliers at any of the sites, ascending int64."""
        sites = self._require(sites)
        found = [rows for site in sites for rows in self._outliers_of(site)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def valid_rows(self, sites: str | Sequence[str], split: Split = "train", outliers: Outliers = "skip") -> np.ndarray:
        """Row numbers that a reader of these sites is given, ascending int64."""
        return self.row_set(sites, split, outliers).all()

    def row_set(self, sites: str | Sequence[str], split: Split = "train", outliers: Outliers = "skip") -> RowSet:
        """`valid_rows` as intervals, which is small for any store."""
        sites = self._require(sites)
        if split not in _PARTS:
            raise SaekitError(f"split {split!r} is unknown; choose train, heldout or all")
        if outliers not in ("skip", "keep"):
            raise SaekitError(f"outliers {outliers!r} is unknown; choose skip or keep")
        heldout = heldout_sequences(self.n_sequences)
        chosen = {"train": ~heldout, "heldout": heldout, "all": np.ones_like(heldout)}[split]
        without = self.outliers(sites) if outliers == "skip" else np.zeros(0, np.int64)
        return RowSet.of(self.seq_rows(), chosen, without)

    def batches(
        self,
        sites: str | Sequence[str],
        *,
        batch: int,
        seed: int = 0,
        epochs: int = 1,
        split: Split = "train",
        ram: str | int = "4GiB",
        outliers: Outliers = "skip",
        block: str | int = "auto",
        state: Mapping | None = None,
        device: str | torch.device = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> "Batches":
        """Shuffled batches; each valid row comes exactly once per epoch.

        Args:
            batch: B, rows in every batch (over all ranks); batches run across the borders of epochs.
            ram: sites that fit are shuffled uniformly, larger ones in blocks, a window of at most this size at a time.
            block: "auto" = 64 KiB in blocks mode, a size such as "1MiB", or "sequence" = blocks mode with whole sequences.
            state: what `Batches.state()` gave; the batches after it follow.
            rank, ranks: this process takes rows rank, rank + ranks, … of each batch.

        Raises:
            SaekitError: a site that the store does not hold, fewer rows than one batch, too little memory, or a state that
                belongs to another store or to other parameters.
        """
        return Batches(
            self,
            self._require(sites),
            batch=batch,
            seed=seed,
            epochs=epochs,
            split=split,
            ram=parse_bytes(ram),
            outliers=outliers,
            block=block if block in ("auto", "sequence") else parse_bytes(block),
            state=state,
            device=torch.device(device),
            rank=rank,
            ranks=ranks,
        )

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

    def _require(self, sites: str | Sequence[str]) -> tuple[str, ...]:
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        assert sites, "no site asked for"
        for site in sites:
            if site not in self.sites:
                raise SaekitError(f"{self.path} holds {' and '.join(self.sites)}, not {site}")
        return sites


class SiteFiles:
    """All shards of one site, mapped into memory, and rows copied out of them in any order."""

    def __init__(self, paths: list[Path], d: int, dtype: torch.dtype, shard_rows: np.ndarray):
        self.paths, self.d, self.dtype, self.shard_rows = paths, d, dtype, shard_rows
        self.row_bytes = d * dtype.itemsize
        self.shards: list[torch.Tensor] = []
        """(n, D) views."""
        starts = []
        for path, n in zip(paths, np.diff(shard_rows)):
            entry = layout.read_header(path).get("activations")
            if entry is None or entry.tag != layout.DTYPES[str(dtype).removeprefix("torch.")] or entry.shape != (n, d):
                raise SaekitError(
                    f"{path} does not hold {n:,} rows of {d} {str(dtype).removeprefix('torch.')}; restore it or collect again"
                )
            # torch keeps no file open behind a mapping, as numpy and mmap do: a store may have more files than a process
            # may hold open. Private, so that nobody can write into the store.
            data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
            self.shards.append(data[entry.start : entry.end].view(dtype).view(int(n), d))
            starts.append(data.data_ptr() + entry.start)
        # One array over the whole range of addresses, from the first mapping to the last: its item k is the row that begins
        # k strides behind the first. So a batch from a thousand shards is one call; what lies between is never touched.
        base = min(starts)
        stride = math.gcd(self.row_bytes, *(start - base for start in starts))
        self._first = (np.array(starts, np.int64) - base) // stride
        self._step = self.row_bytes // stride
        self._addresses = np.array(starts, np.int64)
        items = max((int(f) + int(n) * self._step for f, n in zip(self._first, np.diff(shard_rows))), default=0)
        self._items = np.asarray(_Span(base, items, stride, self.row_bytes))

    def gather(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), D) in the order of `rows` (int64 row numbers of the store); one pass over the data, without the GIL."""
        shard = np.searchsorted(self.shard_rows, rows, side="right") - 1
        items = self._items[self._first[shard] + (rows - self.shard_rows[shard]) * self._step]
        return torch.from_numpy(items.view(np.uint8)).view(self.dtype).view(len(rows), self.d)

    def outliers(self) -> list[np.ndarray]:
        """Per shard the rows that are outliers, counted from its first, int64."""
        return [layout.map_tensors(path)["outlier_rows"].astype(np.int64) for path in self.paths]

    def will_need(self, first: np.ndarray, last: np.ndarray) -> None:
        """Have the kernel begin to read rows first[i] to last[i] from the disk."""
        for shard in range(len(self.shards)):
            lo, hi = self.shard_rows[shard], self.shard_rows[shard + 1]
            for a, b in zip(*_clip(first, last, lo, hi)):
                start = int(self._addresses[shard] + (a - lo) * self.row_bytes)
                _will_need(start, int((b - a + 1) * self.row_bytes))


def _clip(first: np.ndarray, last: np.ndarray, lo: int, hi: int) -> tuple[np.ndarray, np.ndarray]:
    touched = (last >= lo) & (first < hi)
    return np.maximum(first[touched], lo), np.minimum(last[touched], hi - 1)


class _Span:
    """An address range as numpy sees it: `items` items of `size` bytes each, `stride` bytes apart, overlapping."""

    def __init__(self, base: int, items: int, stride: int, size: int):
        self.__array_interface__ = {
            "data": (base, True),
            "shape": (items,),
            "strides": (stride,),
            "typestr": f"|V{size}",
            "version": 3,
        }


_libc = ctypes.CDLL(None) if os.name == "posix" else None
_MADV_WILLNEED = 3


def _will_need(start: int, length: int) -> None:
    """A hint; what the kernel answers makes no difference to what is read."""
    if _libc is not None:
        page = start % layout.PAGE
        _libc.madvise(ctypes.c_void_p(start - page), ctypes.c_size_t(length + page), _MADV_WILLNEED)


class Batch(Mapping):
    """One batch: site -> x_BD in the store dtype, on the reader's device. All sites have the same rows."""

    def __init__(self, tensors: dict[str, torch.Tensor], rows: np.ndarray, wait: float):
        self._tensors = tensors
        self.rows = rows
        """(B) int64, store rows."""
        self.wait = wait
        """Seconds that the consumer waited for it."""

    def __getitem__(self, site: str) -> torch.Tensor:
        return self._tensors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Batches:
    """Shuffled batches of one or more sites. Iterating goes on where `state()` stands; made by `Store.batches`."""

    def __init__(
        self,
        store: Store,
        sites: tuple[str, ...],
        *,
        batch: int,
        seed: int,
        epochs: int,
        split: Split,
        ram: int,
        outliers: Outliers,
        block: str | int,
        state: Mapping | None,
        device: torch.device,
        rank: int,
        ranks: int,
    ):
        self.store, self.sites, self.batch, self.seed, self.epochs = store, sites, batch, seed, epochs
        self.split, self.outliers, self.device, self.rank, self.ranks = split, outliers, device, rank, ranks
        assert batch >= 1 and epochs >= 1 and 0 <= rank < ranks
        self._row_bytes = sum(store.files(site).row_bytes for site in sites)
        self.mode = "blocks" if block == "sequence" or store.rows * self._row_bytes > ram else "uniform"
        self._check_ram(ram)
        valid = store.row_set(sites, split, outliers)
        self.rows_per_epoch = len(valid)
        self.n_batches = epochs * len(valid) // batch
        if self.n_batches == 0:
            self.require(batch)
        self.block: int | str | None = None
        self.window_blocks: int | None = None
        self._order = self._uniform(valid) if self.mode == "uniform" else self._in_blocks(valid, ram, block)
        self.done = 0
        if state is not None:
            self._restore(state)

    def __len__(self) -> int:
        return self.n_batches

    @property
    def unread(self) -> int:
        """Rows at the very end that are less than a batch."""
        return self.epochs * self.rows_per_epoch - self.n_batches * self.batch

    @property
    def variance_ratio(self) -> float:
        """About how much more batch means of a slowly varying quantity vary than those of random batches."""
        return 1.0 if self.window_blocks is None or self._order.n_windows == 1 else 1 + self.batch / self.window_blocks

    def summary(self) -> str:
        """One line: rows, mode, how well it is shuffled, what stays unread."""
        text = f"{self.rows_per_epoch:,} rows per epoch, "
        if self.window_blocks is None:
            text += "uniformly shuffled"
        else:
            size = self.window_blocks * self.rows_per_epoch / self._order.n_blocks * self._row_bytes
            text += (
                f"shuffled in windows of {self.window_blocks:,} blocks ({human_bytes(size)}); "
                f"batch means vary {self.variance_ratio:.2f} times as much as those of random batches"
            )
        return text + (f"; the last {self.unread:,} rows are less than a batch and stay unread" if self.unread else "")

    def require(self, rows: int) -> None:
        """SaekitError if `rows` are more than all epochs have."""
        if rows > self.epochs * self.rows_per_epoch:
            epochs = -(-rows // max(1, self.rows_per_epoch))
            raise SaekitError(
                f"run needs {rows:,} rows, {_PARTS[self.split]} of {self.store.path} has {self.rows_per_epoch:,}; "
                + (f"pass --epochs {epochs} or collect more" if self.rows_per_epoch else "collect more")
            )

    def state(self) -> dict:
        """Where the reader stands: JSON of constant size. `Store.batches(…, state=…)` gives the following batches."""
        return {**self._parameters(), "batches_done": self.done}

    def _parameters(self) -> dict:
        return {
            "format_version": 1,
            "store": self.store.fingerprint,
            "sites": list(self.sites),
            "seed": self.seed,
            "batch": self.batch,
            "mode": self.mode,
            "block": self.block,
            "window_blocks": self.window_blocks,
            "split": self.split,
            "outliers": self.outliers,
        }

    def _restore(self, state: Mapping) -> None:
        if state.get("store") != self.store.fingerprint:
            raise SaekitError(
                f"checkpoint reads store {str(state.get('store'))[:11]}..., {self.store.path} is {self.store.fingerprint[:11]}...; "
                "give the store it was made with"
            )
        for name, value in self._parameters().items():
            if state.get(name) != value:
                raise SaekitError(
                    f"checkpoint reads with {name.replace('_', ' ')} {state.get(name)}, now {value}; use the first settings"
                )
        self.done = state["batches_done"]
        if self.done > self.n_batches:
            raise SaekitError(
                f"checkpoint has read {self.done:,} batches, --epochs {self.epochs} are {self.n_batches:,}; use the first settings"
            )

    # Setting up

    def _check_ram(self, ram: int) -> None:
        store = self.store
        if self.batch * self._row_bytes > ram:
            widths = " + ".join(str(store.d(site)) for site in self.sites)
            raise SaekitError(
                f"--ram {human_bytes(ram).replace(' ', '')} cannot hold one batch of {self.batch} x {widths} "
                f"{store.manifest['dtype']} ({human_bytes(self.batch * self._row_bytes)}); raise --ram or lower --batch"
            )
        needed, free = store.rows * self._row_bytes, available_memory()
        if self.mode == "uniform" and free is not None and needed > free:
            raise SaekitError(
                f"these sites take {human_bytes(needed)}, {human_bytes(free)} are free; "
                "a smaller --ram works and gives another order of rows"
            )

    def _uniform(self, valid: RowSet) -> Order:
        return Order(valid, seed=self.seed)

    def _in_blocks(self, valid: RowSet, ram: int, block: str | int) -> Order:
        starts = None
        if block == "sequence":
            self.block = "sequence"
            starts = np.unique(valid.below(self.store.seq_rows()))
            n_blocks, largest = len(starts) - 1, int(np.diff(starts).max())
        else:
            narrowest = min(self.store.files(site).row_bytes for site in self.sites)
            block_bytes = block if isinstance(block, int) else BLOCK_BYTES
            self.block = largest = -(-block_bytes // narrowest)
            n_blocks = -(-len(valid) // largest)
        fitting = max(1, ram // (largest * self._row_bytes))
        wanted = WINDOW_BATCH_MULTIPLE * self.batch
        # Windows of equal size: a last one of a few blocks would be hardly shuffled.
        windows = max(1, n_blocks // wanted, -(-n_blocks // fitting))
        self.window_blocks = -(-n_blocks // windows)
        if windows > 1 and self.window_blocks < wanted:
            warnings.warn(
                f"a window of {self.window_blocks:,} blocks is less than {wanted:,} (4 x batch): batch means will vary about "
                f"{1 + self.batch / self.window_blocks:.2f} times as much as those of random batches; raise --ram",
                stacklevel=4,
            )
        if starts is not None:
            return Order(valid, seed=self.seed, block_starts=starts, window_blocks=self.window_blocks)
        return Order(valid, seed=self.seed, block_rows=largest, window_blocks=self.window_blocks)

    # Reading

    def __iter__(self) -> Iterator[Batch]:
        pending: deque = deque()
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="saekit-read")
        fetcher = ThreadPoolExecutor(1, thread_name_prefix="saekit-fetch")
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        submitted, window = self.done, None
        if self.mode == "uniform":
            fetcher.submit(self._fetch_all)
        try:
            while self.done < self.n_batches:
                started = time.perf_counter()
                while submitted < self.n_batches and len(pending) < AHEAD:
                    if self.mode == "blocks" and (now := self._window(submitted)) != window:
                        fetcher.submit(self._fetch, now, window is None)
                        window = now
                    pending.append(pool.submit(self._read, submitted, stream))
                    submitted += 1
                tensors, rows, copied = pending.popleft().result()
                # Its place is taken at once, so that AHEAD batches are read while the consumer works on this one.
                if copied is not None:
                    current = torch.cuda.current_stream(self.device)
                    current.wait_event(copied)
                    for x_BD in tensors.values():
                        x_BD.record_stream(current)
                self.done += 1
                yield Batch(tensors, rows, time.perf_counter() - started)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            fetcher.shutdown(wait=False, cancel_futures=True)

    def _read(self, k: int, stream) -> tuple[dict[str, torch.Tensor], np.ndarray, "torch.cuda.Event | None"]:
        rows = self._order.rows(k * self.batch, (k + 1) * self.batch)[self.rank :: self.ranks]
        tensors = {site: self.store.files(site).gather(rows) for site in self.sites}
        if stream is None:
            return {site: x.to(self.device) for site, x in tensors.items()}, rows, None
        with torch.cuda.stream(stream):
            tensors = {site: x.pin_memory().to(self.device, non_blocking=True) for site, x in tensors.items()}
            copied = torch.cuda.Event()
            copied.record(stream)
        return tensors, rows, copied

    # Hints: the kernel reads from the disk what will be wanted, while the consumer works. What is mapped are clean pages of
    # the page cache, which it takes back when memory is short, so nothing is ever released here.

    def _window(self, k: int) -> tuple[int, int]:
        epoch, position = divmod(k * self.batch, self.rows_per_epoch)
        return epoch, self._order.window_of(epoch, position)

    def _fetch_all(self) -> None:
        for site in self.sites:
            self.store.files(site).will_need(np.array([0]), np.array([self.store.rows - 1]))

    def _fetch_window(self, epoch: int, w: int) -> None:
        for site in self.sites:
            self.store.files(site).will_need(*self._order.window_extent(epoch, w))

    def _fetch(self, window: tuple[int, int], first: bool) -> None:
        """The window after this one, and this one too if nothing was fetched before."""
        epoch, w = window
        if first:
            self._fetch_window(epoch, w)
        if w + 1 < self._order.n_windows:
            self._fetch_window(epoch, w + 1)
        elif epoch + 1 < self.epochs:
            self._fetch_window(epoch + 1, 0)


# Sizes


def parse_bytes(text: str | int) -> int:
    """`4GiB`, `512 MiB`, `1.5GB`, `4096` in bytes. Binary units end in iB, decimal ones in B."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B?)?\s*", text, re.IGNORECASE)
    if not found:
        raise SaekitError(f"{text!r} is not a size; write for example 512MiB or 4GiB")
    number, prefix, binary = found.groups()
    power = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def available_memory() -> int | None:
    """Bytes that can be used without swapping, page cache included, in this container; None where it cannot be told."""
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) for line in f if line.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached files count as used in a group but are given up when memory is asked for.
            used = (
                int((group / "memory.current").read_text()) - int(statistics["file"]) + int(statistics.get("shmem", 0))
            )
            free = min(free, int(limit) - used)
    except (OSError, KeyError, ValueError):
        pass
    return free
