"""Which row comes when: a pure function of the store, the seed and the epoch, computed where it is needed.

    order = Order(RowSet.of(seq_rows, sequences, outliers), seed=0, block_rows=43, window_blocks=16384)
    order.rows(0, 4096)                     # store rows of the first batch; any stretch can be asked for at any time

Nothing is drawn from a random generator: a keyed bijection of [0, n) takes the place of a shuffle, so there is no state
but the position, and torch and numpy versions do not matter. docs/formats.md holds the definition and test vectors.

Uniform mode is one bijection over all valid rows. Blocks mode is for stores that do not fit into memory:
1. Valid rows are cut into blocks of consecutive rows.
2. Blocks are permuted over the whole store; level 0 of the key.
3. The permuted blocks are cut into windows; the rows of window w are permuted, level w + 1 of the key.

Positions are evaluated in pieces whose arrays stay in the processor's second-level cache.

V valid rows · n size of a permuted range
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ROUNDS = 8
HELDOUT_RUN, HELDOUT_PERIOD = 32, 20
PIECE = 1 << 14
"""Positions evaluated at once. Per row, on an EPYC: 60 ns in pieces of 4,096, where calls into numpy cost as much as the
work, 30 ns at 16,384, 53 ns at 65,536, where nothing stays in the cache."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_32 = np.uint64(32)


def splitmix(x: int) -> int:
    """One step of splitmix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well mixed bits out."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(*words: int) -> int:
    """64-bit key of a few integers: k = 0, then k = splitmix(k ^ word) for each."""
    k = 0
    for word in words:
        k = splitmix(k ^ (word & _MASK))
    return k


class Permutation:
    """Keyed bijection of [0, n): a Feistel network over a rectangle a × b that just holds n, with cycle walking.

    x = l·b + r with l < a and r < b, a = ceil(√n), b = ceil(n / a). Round i of 8 adds to l (even i) or r (odd i) a hash of
    the other, modulo a or b; with m, c = round keys 2i and 2i + 1, all modulo 2^64,

        u = other·(m | 1) + c;   u = (u ^ u >> 32)·0x9E3779B97F4A7C15;   hash = (u >> 32)·size >> 32

    and round key j = splitmix(key ^ splitmix(j)). A result of n or more (fewer than one in √n) is put in again.

    A round's hash has as many values as `other`, about √n, so they are computed beforehand: a round is then a lookup and an
    addition, half the time. The tables take 64·√n bytes.
    """

    # Where two neighbours land is uniform from four rounds on (n = 60, 20,000 keys); four more are for what pairs do not show.
    # Among the 120 orders of five items eight rounds still prefer some by 15 %, which no store is small enough to notice.

    def __init__(self, n: int, *words: int):
        assert n >= 1
        self.n = n
        self.a = math.isqrt(n - 1) + 1
        self.b = -(-n // self.a)
        k = key(*words)
        keys = [splitmix(k ^ splitmix(j)) for j in range(2 * ROUNDS)]
        # Round i changes `side`, of size sizes[i % 2], by a hash of the other half.
        self._sizes = (self.a, self.b)
        self._hashes = [
            _hashes(self._sizes[1 - i % 2], self._sizes[i % 2], keys[2 * i] | 1, keys[2 * i + 1]) for i in range(ROUNDS)
        ]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Images of integers in [0, n), int64, in the shape of `x`."""
        y = self._once(np.asarray(x, np.int64))
        while (outside := np.flatnonzero(y >= self.n)).size:
            y[outside] = self._once(y[outside])
        return y

    def _once(self, x: np.ndarray) -> np.ndarray:
        left = x // self.b
        halves, hashed = [left, x - left * self.b], np.empty_like(left)
        for i, table in enumerate(self._hashes):
            half, other = halves[i % 2], halves[1 - i % 2]
            # Every index is in range; "clip" is the mode that writes into `out` without a copy.
            np.take(table, other, out=hashed, mode="clip")
            half += hashed
            # half - size, as an unsigned number, is huge where half < size, so the minimum is half modulo size.
            np.subtract(half, self._sizes[i % 2], out=hashed)
            np.minimum(half.view(np.uint64), hashed.view(np.uint64), out=half.view(np.uint64))
        halves[0] *= self.b
        halves[0] += halves[1]
        return halves[0]


def _hashes(others: int, size: int, m: int, c: int) -> np.ndarray:
    """(others) int64: the hash of 0, 1, 2 …, below `size`."""
    u = np.arange(others, dtype=np.uint64) * np.uint64(m) + np.uint64(c)
    u ^= u >> _32
    u = (u * np.uint64(_GOLDEN) >> _32) * np.uint64(size) >> _32
    return u.astype(np.int64)


def heldout_sequences(n: int) -> np.ndarray:
    """(n) bool: which of n sequences are held out: every twentieth run of 32, so that few documents are cut; of fewer than
    640 sequences the last twentieth, at least one, and none of a single one."""
    s = np.arange(n)
    if n >= HELDOUT_RUN * HELDOUT_PERIOD:
        return s // HELDOUT_RUN % HELDOUT_PERIOD == HELDOUT_PERIOD - 1
    count = 0 if n < 2 else max(1, n // HELDOUT_PERIOD)
    return s >= n - count


class Intervals:
    """Which interval a number lies in: `searchsorted(borders, x, "right") - 1` for borders[0] <= x < borders[-1].

    A table over equal cells, about four per interval, holds the interval in which each cell begins; only numbers of a cell
    that lie behind its first border are searched for. A third of the search's time, where neighbours in `x` are far apart.
    """

    def __init__(self, borders: np.ndarray):
        self.borders, self._first = borders, int(borders[0])
        span = int(borders[-1]) - self._first
        self._shift = max(0, (span // (4 * len(borders))).bit_length())
        begins = self._first + (np.arange((span >> self._shift) + 1) << self._shift)
        self._cells = np.searchsorted(borders, begins, side="right") - 1
        self._ends = np.append(borders[1:], np.iinfo(np.int64).max)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """int64, in the shape of `x`."""
        found = self._cells[x - self._first >> self._shift]
        behind = np.flatnonzero(x >= self._ends[found])
        if behind.size:
            found[behind] = np.searchsorted(self.borders, x[behind], side="right") - 1
        return found


class RowSet:
    """An ascending set of row numbers, held as intervals: what is left out is little, the rows may be billions."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray):
        keep = ends > starts
        self.starts, self.ends = starts[keep], ends[keep]
        self.before = np.concatenate([[0], np.cumsum(self.ends - self.starts)])
        """How many rows of the set come before each interval; the last entry is their number."""
        self._interval = Intervals(self.before)
        self._shifts = self.starts - self.before[:-1]

    @classmethod
    def of(cls, seq_rows: np.ndarray, chosen: np.ndarray, without: np.ndarray) -> "RowSet":
        """Rows of the sequences where `chosen` (S) bool is true, less the ascending row numbers `without`.

        `seq_rows` (S+1) int64 holds the first row of each sequence, and E.
        """
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
        starts, ends = seq_rows[edges[::2]], seq_rows[edges[1::2]]
        whole = cls(starts, ends)
        out = without[whole.holds(without)]
        # Taking a row out of an interval ends one there and starts one behind it; sorted, starts and ends pair up again.
        return cls(np.sort(np.concatenate([whole.starts, out + 1])), np.sort(np.concatenate([whole.ends, out])))

    def __len__(self) -> int:
        return int(self.before[-1])

    def at(self, index: np.ndarray) -> np.ndarray:
        """Row numbers of the index-th members, int64."""
        return index + self._shifts[self._interval(index)]

    def below(self, row: np.ndarray) -> np.ndarray:
        """How many members are smaller than each row number."""
        interval = np.searchsorted(self.starts, row, side="right") - 1
        inside = np.minimum(row, self.ends[interval]) - self.starts[interval]
        return np.where(interval >= 0, self.before[interval] + inside, 0)

    def holds(self, row: np.ndarray) -> np.ndarray:
        """Whether each row number is a member."""
        interval = np.searchsorted(self.starts, row, side="right") - 1
        return (interval >= 0) & (row < self.ends[interval]) if len(self.starts) else np.zeros(len(row), bool)

    def all(self) -> np.ndarray:
        return self.at(np.arange(len(self)))


class Order:
    """The order of rows over all epochs; position p is row p mod V of epoch p // V.

    Args:
        valid: rows that take part.
        seed: any integer.
        block_rows: consecutive valid rows per block, None = uniform mode.
        block_starts: instead of it, ascending valid indices where blocks begin, and V (whole sequences).
        window_blocks: blocks per window, at most; windows are equal but for one block.
    """

    def __init__(
        self,
        valid: RowSet,
        *,
        seed: int,
        block_rows: int | None = None,
        block_starts: np.ndarray | None = None,
        window_blocks: int = 1,
    ):
        self.valid, self.seed, self.epoch_rows = valid, seed, len(valid)
        self.block_rows, self.block_starts = block_rows, block_starts
        self.uniform = block_rows is None and block_starts is None
        if self.uniform:
            self.n_blocks = self.n_windows = 1
        else:
            self.n_blocks = len(block_starts) - 1 if block_starts is not None else -(-len(valid) // (block_rows or 1))
            self.n_windows = -(-self.n_blocks // window_blocks)
        # Bounded, and per instance: an epoch needs one entry, a window of 32,768 blocks a megabyte.
        self._whole = lru_cache(2)(self._whole)
        self._window_rows = lru_cache(2)(self._window_rows)
        self._window = lru_cache(3)(self._window)

    def rows(self, lo: int, hi: int) -> np.ndarray:
        """Store rows at positions lo to hi - 1, int64; the stretch may cross windows and epochs."""
        # numpy's integers would overflow in the arithmetic of the key.
        position, hi = int(lo), int(hi)
        rows = np.empty(hi - position, np.int64)
        while position < hi:
            epoch, start = divmod(position, self.epoch_rows)
            w = self.window_of(epoch, start)
            stop = min(start + hi - position, start + PIECE, self.window_end(epoch, w))
            if self.uniform:
                index = self._whole(epoch)(np.arange(start, stop))
            else:
                index = self._in_window(epoch, w, start, stop)
            rows[position - lo :][: stop - start] = self.valid.at(index)
            position += stop - start
        return rows

    def window_of(self, epoch: int, position: int) -> int:
        """Window that holds a position of an epoch; uniform mode has one."""
        return int(np.searchsorted(self._window_rows(epoch), position, side="right")) - 1

    def window_end(self, epoch: int, w: int) -> int:
        """Position in the epoch behind the last one of a window."""
        return int(self._window_rows(epoch)[w + 1])

    def window_extent(self, epoch: int, w: int) -> tuple[np.ndarray, np.ndarray]:
        """First and last store row of each block of a window, ascending: what is wanted before the window is read."""
        if self.uniform:
            return self.valid.at(np.array([0])), self.valid.at(np.array([self.epoch_rows - 1]))
        starts, lengths = self._extent(np.sort(self._blocks_of(epoch, w)))
        return self.valid.at(starts), self.valid.at(starts + lengths - 1)

    def _whole(self, epoch: int) -> Permutation:
        return Permutation(self.epoch_rows if self.uniform else self.n_blocks, self.seed, epoch, 0)

    def _blocks_of(self, epoch: int, w: int) -> np.ndarray:
        first, last = (v * self.n_blocks // self.n_windows for v in (w, w + 1))
        return self._whole(epoch)(np.arange(first, last))

    def _extent(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First valid index and length of each block."""
        if self.block_starts is not None:
            return self.block_starts[blocks], self.block_starts[blocks + 1] - self.block_starts[blocks]
        assert self.block_rows is not None
        starts = blocks * self.block_rows
        return starts, np.minimum(self.block_rows, self.epoch_rows - starts)

    def _window_rows(self, epoch: int) -> np.ndarray:
        """(windows + 1) position in the epoch where each window begins, and V."""
        if self.uniform:
            return np.array([0, self.epoch_rows])
        rows = [int(self._extent(self._blocks_of(epoch, w))[1].sum()) for w in range(self.n_windows)]
        return np.concatenate([[0], np.cumsum(rows)])

    def _window(self, epoch: int, w: int) -> "_Window":
        starts, lengths = self._extent(self._blocks_of(epoch, w))
        before = np.concatenate([[0], np.cumsum(lengths)])
        intervals = Intervals(before) if self.block_rows is None else None
        return _Window(before, starts - before[:-1], intervals, Permutation(int(before[-1]), self.seed, epoch, w + 1))

    def _in_window(self, epoch: int, w: int, start: int, stop: int) -> np.ndarray:
        """Valid indices at positions start to stop - 1 of an epoch, all inside window w."""
        window = self._window(epoch, w)
        first = int(self._window_rows(epoch)[w])
        flat = window.permutation(np.arange(start - first, stop - first))
        if window.intervals is not None:
            place = window.intervals(flat)
        else:
            # All blocks but one are equally long, so the division is right or one too low.
            place = flat // self.block_rows
            place += flat >= window.before[place + 1]
        return flat + window.shifts[place]


class _Window(NamedTuple):
    """The blocks of a window, one behind the other in the order of their places."""

    before: np.ndarray
    """Rows of the window that come before each block, and their number."""
    shifts: np.ndarray
    """Per block, valid index less place in the window of any of its rows."""
    intervals: Intervals | None
    """Finds the block of a place where blocks differ in length."""
    permutation: Permutation
