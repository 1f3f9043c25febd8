"""Rows of a token table at some sites, in text order or shuffled: what a store and a stream have in common.

`RowSource`  the token table, which rows there are and in which order they come
`Windows`    where the values come from: mapped files in one, a model's forward pass in the other

D width of a site · N tokens · E rows · S sequences · n rows of a shard
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.store import format as layout
from saekit.store.format import TokenTable
from saekit.store.order import RowSet, heldout_sequences
from saekit.store.writer import bits_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from saekit.store.batches import Batches

STATISTICS_ROWS = 1 << 14
"""Rows that go into the sums of a site at once; equal pieces give equal bits."""

Split = Literal["train", "heldout", "all"]
Outliers = Literal["skip", "keep"]
PARTS = {"train": "the training part", "heldout": "the held-out part", "all": "the whole"}


class Statistics(NamedTuple):
    """Of one site, over rows that are not outliers, from the values in the store's dtype."""

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


class Window(NamedTuple):
    """A stretch of the order of one epoch, and the blocks of rows that it mixes."""

    epoch: int
    number: int
    first: np.ndarray
    """(blocks) int64, first row of each block, ascending."""
    last: np.ndarray
    """(blocks) int64, last row of each block. Rows between that take no part, such as outliers, are never gathered."""


class Windows(Protocol):
    """Where `Batches` gets values from. Window follows window; a batch that crosses a border is gathered in pieces."""

    def prepare(self, window: Window, following: Window | None) -> None:
        """Rows of `window` are gathered from now on, of any other no more: no call of `gather` is running or will ask for
        them. `following` comes after it, if anything does."""
        ...

    def gather(self, site: str, rows: np.ndarray) -> torch.Tensor:
        """New tensor (len(rows), D) in the order of `rows`, in the store dtype. Several threads call at once."""
        ...

    def close(self) -> None:
        """The consumer has left, or has all; calls of `gather` that are under way may still be running."""
        ...


class RowSource(ABC):
    """Rows of a token table at some sites, in text order or shuffled: what a store and a stream have in common."""

    path: str | Path
    """What messages call it."""
    fingerprint: str
    """A reader's state belongs to the source of this fingerprint alone."""
    manifest: dict
    """Model, tokenizer, text and sites, in the words of a store's manifest."""
    sites: tuple[str, ...]
    rows: int
    n_sequences: int
    n_tokens: int
    dtype: torch.dtype

    def d(self, site: str) -> int:
        """Width of a site."""
        self._require([site])
        return self.manifest["sites"][site]["d"]

    @abstractmethod
    def read_table(self) -> TokenTable:
        """The token table; asked for once."""

    @abstractmethod
    def outliers(self, sites: str | Sequence[str]) -> np.ndarray:
        """Row numbers that are outliers at any of the sites, ascending int64."""

    @abstractmethod
    def statistics(self, site: str, rows: int | None = None) -> Statistics:
        """Mean, variance and norms of a site; outliers are left out.

        Args:
            rows: take the first so many rows in text order, or all if they are fewer; None = all there are.
        """

    @abstractmethod
    def windows(self, sites: Sequence[str]) -> Windows:
        """Values of the sites for one pass over batches."""

    # Tokens and sequences

    @cached_property
    def table(self) -> TokenTable:
        return self.read_table()

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

    # Which rows, in which order

    def valid_rows(self, sites: str | Sequence[str], split: Split = "train", outliers: Outliers = "skip") -> np.ndarray:
        """Row numbers that a reader of these sites is given, ascending int64."""
        return self.row_set(sites, split, outliers).all()

    def row_set(self, sites: str | Sequence[str], split: Split = "train", outliers: Outliers = "skip") -> RowSet:
        """`valid_rows` as intervals, which is small for any store."""
        sites = self._require(sites)
        if split not in PARTS:
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
        # late: batches are read from a row source
        from saekit.store.batches import Batches

        return Batches(
            self,
            self._require(sites),
            batch=batch,
            seed=seed,
            epochs=epochs,
            split=split,
            ram=ram,
            outliers=outliers,
            block=block,
            state=state,
            device=torch.device(device),
            rank=rank,
            ranks=ranks,
        )

    def row_bytes(self, site: str) -> int:
        """Bytes of one row of a site."""
        return self.d(site) * self.dtype.itemsize

    def _require(self, sites: str | Sequence[str]) -> tuple[str, ...]:
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        assert sites, "no site asked for"
        for site in sites:
            if site not in self.sites:
                raise SaekitError(f"{self.path} holds {' and '.join(self.sites)}, not {site}")
        return sites


def statistics_of(chunks: Iterable[torch.Tensor], norm_limit: float | None) -> Statistics:
    """Statistics of rows (n, D) in a store dtype; those with a norm above `norm_limit` are left out.

    Sums are in float64, one chunk after the other: chunks of `STATISTICS_ROWS` rows give equal bits wherever they come from.
    """
    merged, rows = layout.Sums(np.zeros(1), np.zeros(1), np.zeros(4), np.zeros(0), np.zeros(0)), 0
    for x_nD in chunks:
        sums = layout.shard_sums(bits_of(x_nD), norm_limit)
        # Histogram, largest norm and outlier rows are no part of the statistics.
        merged = merged._replace(
            sum=merged.sum + sums.sum,
            sum_squares=merged.sum_squares + sums.sum_squares,
            norm_moments=merged.norm_moments + sums.norm_moments,
        )
        rows += len(x_nD)
    count, total, squares, _ = (float(v) for v in merged.norm_moments)
    if count == 0:
        raise SaekitError(f"no statistics: of {rows:,} rows all are outliers; take more rows")
    mean_D, variance_D = layout.mean_and_variance(merged)
    return Statistics(mean_D, variance_D, total / count, math.sqrt(squares / count), float(variance_D.sum()))
