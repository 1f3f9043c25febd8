"""Shuffled batches of a row source: a position that resumes to the bit, and threads that read ahead.

    for batch in store.batches([site], batch=4096, seed=0):
        x_BD = batch[site]                      # store dtype, on the reader's device; batch.rows are the rows' numbers

1. The order is evaluated for many batches at once.
2. At the border of a window the next one is prepared.
3. Rows are gathered by threads ahead of the consumer and copied to its device.

B rows in a batch · D width of a site
"""

import re
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.store.format import human_bytes
from saekit.store.order import Order, RowSet
from saekit.store.rows import PARTS, Outliers, RowSource, Split, Window

AHEAD = 3
"""Batches being read while the consumer holds one."""
THREADS = 2
ORDERED = 1 << 16
"""Rows, about, whose order one task evaluates: many batches, so that threads seldom hand over to one another."""
BLOCK_BYTES = 1 << 16
"""A block is at least this long in each site's file: random reads of 64 KiB cost a disk little more than sequential ones."""
WINDOW_BATCH_MULTIPLE = 4
"""Blocks in a window, in batches: with only one block per row of a batch, batch means vary twice as much as random ones."""


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
    """Shuffled batches of one or more sites. Iterating goes on where `state()` stands; made by `RowSource.batches`."""

    def __init__(
        self,
        source: RowSource,
        sites: tuple[str, ...],
        *,
        batch: int,
        seed: int,
        epochs: int,
        split: Split,
        ram: str | int,
        outliers: Outliers,
        block: str | int,
        state: Mapping | None,
        device: torch.device,
        rank: int,
        ranks: int,
    ):
        self.source, self.sites, self.batch, self.seed, self.epochs = source, sites, batch, seed, epochs
        self.split, self.outliers, self.device, self.rank, self.ranks = split, outliers, device, rank, ranks
        assert batch >= 1 and epochs >= 1 and 0 <= rank < ranks
        ram = parse_bytes(ram)
        block = block if block in ("auto", "sequence") else parse_bytes(block)
        self._row_bytes = sum(source.row_bytes(site) for site in sites)
        self.mode = "blocks" if block == "sequence" or source.rows * self._row_bytes > ram else "uniform"
        self._check_ram(ram)
        valid = source.row_set(sites, split, outliers)
        self.rows_per_epoch = len(valid)
        self.n_batches = epochs * len(valid) // batch
        if self.n_batches == 0:
            self.require(batch)
        self.block: int | str | None = None
        self.window_blocks: int | None = None
        self.order = Order(valid, seed=seed) if self.mode == "uniform" else self._in_blocks(valid, ram, block)
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
        return 1.0 if self.window_blocks is None or self.order.n_windows == 1 else 1 + self.batch / self.window_blocks

    def summary(self) -> str:
        """One line: rows, mode, how well it is shuffled, what stays unread."""
        text = f"{self.rows_per_epoch:,} rows per epoch, "
        if self.window_blocks is None:
            text += "uniformly shuffled"
        else:
            size = self.window_blocks * self.rows_per_epoch / self.order.n_blocks * self._row_bytes
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
                f"run needs {rows:,} rows, {PARTS[self.split]} of {self.source.path} has {self.rows_per_epoch:,}; "
                + (f"pass --epochs {epochs} or collect more" if self.rows_per_epoch else "collect more")
            )

    def state(self) -> dict:
        """Where the reader stands: JSON of constant size. `RowSource.batches(…, state=…)` gives the following batches."""
        return {**self._parameters(), "batches_done": self.done}

    def _parameters(self) -> dict:
        return {
            "format_version": 1,
            "store": self.source.fingerprint,
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
        if state.get("store") != self.source.fingerprint:
            raise SaekitError(
                f"checkpoint reads store {str(state.get('store'))[:11]}..., {self.source.path} is {self.source.fingerprint[:11]}...; "
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
        source = self.source
        if self.batch * self._row_bytes > ram:
            widths = " + ".join(str(source.d(site)) for site in self.sites)
            raise SaekitError(
                f"--ram {human_bytes(ram).replace(' ', '')} cannot hold one batch of {self.batch} x {widths} "
                f"{str(source.dtype).removeprefix('torch.')} ({human_bytes(self.batch * self._row_bytes)}); raise --ram or lower --batch"
            )
        needed, free = source.rows * self._row_bytes, available_memory()
        if self.mode == "uniform" and free is not None and needed > free:
            raise SaekitError(
                f"these sites take {human_bytes(needed)}, {human_bytes(free)} are free; "
                "a smaller --ram works and gives another order of rows"
            )

    def _in_blocks(self, valid: RowSet, ram: int, block: str | int) -> Order:
        starts = None
        if block == "sequence":
            self.block = "sequence"
            starts = np.unique(valid.below(self.source.seq_rows()))
            n_blocks, largest = len(starts) - 1, int(np.diff(starts).max())
        else:
            narrowest = min(self.source.row_bytes(site) for site in self.sites)
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

    def __iter__(self) -> Iterator[Batch]:
        reading = _Reading(self)
        try:
            while self.done < self.n_batches:
                started = time.perf_counter()
                tensors, rows = reading.next()
                self.done += 1
                yield Batch(tensors, rows, time.perf_counter() - started)
        finally:
            reading.close()


class _Reading:
    """One pass over the batches, from where they stand: what threads do while the consumer works."""

    def __init__(self, batches: Batches):
        self.sites, self.batch, self.n_batches = batches.sites, batches.batch, batches.n_batches
        self.rank, self.ranks, self.order, self.device = batches.rank, batches.ranks, batches.order, batches.device
        self._n_windows = batches.epochs * batches.order.n_windows
        self._windows = batches.source.windows(batches.sites)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="saekit-read")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._pending: deque[Future] = deque()
        self._submitted = batches.done
        self._following: Window | None = None
        self._window_end = self._submitted * self.batch
        """Position, counted through all epochs, behind the window that is prepared."""
        self._per_task = max(1, ORDERED // self.batch)
        """Batches whose order one task evaluates."""
        self._ordered: dict[int, Future] = {}
        """Number of the task -> the rows of its batches, one behind the other."""

    def next(self) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Tensors and rows of the next batch."""
        # What was taken out last is replaced at once, so that AHEAD batches are read while the consumer works on one.
        while self._submitted < self.n_batches and len(self._pending) < AHEAD:
            self._submit(self._submitted)
            self._submitted += 1
        tensors, rows, copied = self._pending.popleft().result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for x_BD in tensors.values():
                x_BD.record_stream(current)
        return tensors, rows

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._windows.close()

    def _submit(self, k: int) -> None:
        """Begin batch k. Pieces of it that lie in windows before its last one are gathered here and now."""
        at, end, pieces = k * self.batch, (k + 1) * self.batch, []
        ordered = self._order_task(k // self._per_task)
        while self._window_end < end:
            if at < self._window_end:
                pieces.append(self._gather(self._rows(k, ordered, at, self._window_end)))
                at = self._window_end
            self._enter(at)
        self._pending.append(self._pool.submit(self._read, k, ordered, at, pieces))
        if k % self._per_task == 0 and k + self._per_task < self.n_batches:
            self._order_task(k // self._per_task + 1)

    def _enter(self, position: int) -> None:
        """Prepare the window that begins at a position, or holds it if it is the first."""
        wait(self._pending)
        epoch, inside = divmod(position, self.order.epoch_rows)
        w = self.order.window_of(epoch, inside)
        number = epoch * self.order.n_windows + w
        window = self._following or self._window(number)
        self._following = self._window(number + 1) if number + 1 < self._n_windows else None
        self._windows.prepare(window, self._following)
        self._window_end = epoch * self.order.epoch_rows + self.order.window_end(epoch, w)

    def _window(self, number: int) -> Window:
        epoch, w = divmod(number, self.order.n_windows)
        return Window(epoch, w, *self.order.window_extent(epoch, w))

    def _order_task(self, i: int) -> Future:
        if i not in self._ordered:
            first, last = i * self._per_task, min((i + 1) * self._per_task, self.n_batches)
            self._ordered.pop(i - 2, None)
            self._ordered[i] = self._pool.submit(self.order.rows, first * self.batch, last * self.batch)
        return self._ordered[i]

    def _rows(self, k: int, ordered: Future, lo: int, hi: int) -> np.ndarray:
        """This rank's rows of batch k at positions lo to hi - 1."""
        first = k // self._per_task * self._per_task * self.batch
        # Of the positions of the batch, this rank has rank, rank + ranks, …: the first of them that is not below lo.
        lo += (k * self.batch + self.rank - lo) % self.ranks
        return ordered.result()[lo - first : hi - first : self.ranks]

    def _gather(self, rows: np.ndarray) -> dict[str, torch.Tensor]:
        return {site: self._windows.gather(site, rows) for site in self.sites}

    def _read(self, k: int, ordered: Future, at: int, pieces: list[dict[str, torch.Tensor]]):
        tensors = self._gather(self._rows(k, ordered, at, (k + 1) * self.batch))
        if pieces:
            pieces.append(tensors)
            tensors = {site: torch.cat([piece[site] for piece in pieces]) for site in self.sites}
        rows = self._rows(k, ordered, k * self.batch, (k + 1) * self.batch)
        if self._stream is None:
            return {site: x.to(self.device) for site, x in tensors.items()}, rows, None
        with torch.cuda.stream(self._stream):
            pinned = {site: x.pin_memory() if x.device.type == "cpu" else x for site, x in tensors.items()}
            tensors = {site: x.to(self.device, non_blocking=True) for site, x in pinned.items()}
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return tensors, rows, copied


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
