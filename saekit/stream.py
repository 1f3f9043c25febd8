"""Activations computed while an SAE learns: the rows of a store that is never written.

    stream = open_stream("gpt2", StreamOptions(text=("data/*.jsonl",)), site="blocks.6.hook_resid_post", out=Path("saes/x"))
    for batch in stream.batches([site], batch=4096): ...

1. The text is tokenised and packed as for a store; the table of tokens stands in the run's folder, under `stream/`.
2. A pass over the first 262,144 rows in text order gives mean, scale and the limit of outliers.
3. Order and batches are those of a store that is read with `block="sequence"`: a window of whole sequences is computed by
   the model when its first row is wanted, and kept until the next one. A run that continues computes one window again.

Which rows are outliers is known only when they are computed, so they cannot be left out of the order: the row before
takes the place of one.

D width of a site · n rows of a window
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from saekit.collector import NORM_ROWS, read_text
from saekit.config import CollectOptions, SequenceOptions, StreamOptions
from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.progress import Progress
from saekit.ranks import Ranks
from saekit.source import TextSource
from saekit.store import format as layout
from saekit.store.batches import Batches
from saekit.store.format import STATISTICS, TOKENS, TokenTable
from saekit.store.rows import STATISTICS_ROWS, RowSource, Statistics, Window, statistics_of
from saekit.store.writer import TORCH_DTYPES, StoreWriter, bits_of, refuse_other_plan

MANIFEST = "stream.json"
FORMAT, VERSION = "saekit-stream", 1
SAMPLE_ROWS = 262_144


def open_stream(
    model, options: StreamOptions, *, site: str, out: Path, statistics_rows: int | None = None, device: str = "auto"
) -> "Stream":
    """Reads the text and takes the statistics, or finds both in `out/stream`.

    Raises SaekitError for everything a user can cause, and for a folder that was begun with other settings.
    """
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(SequenceOptions)}
    settings = CollectOptions(site=(site,), device=device, **shared)
    if not settings.text:
        raise SaekitError("no text named; pass --text, for example --text 'data/*.jsonl' or --text stdlib")
    folder, rows = out / "stream", statistics_rows or SAMPLE_ROWS
    made = (folder / MANIFEST).is_file()
    source = TextSource(model, settings, Ranks(), layout.read_plan(folder))
    Progress.say(str(source))
    plan = {**source.plan, "settings": {**source.plan["settings"], "statistics_rows": rows}}
    if made:
        refuse_other_plan(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["plan"], plan)
    else:
        with Stop() as stop, StoreWriter(folder, plan) as writer:
            try:
                read_text(source, writer, settings, stop)
            except SaekitError:
                writer.abandon()
                raise
            _begin(source, writer, site, rows)
    return Stream(folder, source)


def _begin(source: TextSource, writer: StoreWriter, site: str, rows: int):
    """Token table, statistics and manifest, in this order; then the parts go."""
    state, folder = writer.text_state, writer.out
    assert state is not None
    text, token_table = writer.join_text(writer.n_shards)
    table, multiple = layout.read_tokens(folder / TOKENS), writer.plan["sites"][site]["norm_multiple"]
    blocks = _blocks(source, table, site, min(max(rows, NORM_ROWS), state["rows"]), TORCH_DTYPES[writer.dtype])
    # the limit is that of a store: its rows wait for it
    first = []
    while sum(map(len, first)) < NORM_ROWS and (block := next(blocks, None)) is not None:
        first.append(block)
    norms = np.concatenate([layout.row_norms(bits_of(x_nD)) for x_nD in first])[:NORM_ROWS]
    limit = multiple * float(np.median(norms)) if multiple else None
    found = statistics_of(_first_rows(itertools.chain(first, blocks), rows), limit or None)
    tensors = {f"{site}.mean": found.mean_D, f"{site}.variance": found.variance_D}
    manifest = {
        "format": FORMAT,
        "format_version": VERSION,
        "fingerprint": "",
        "plan": writer.plan,
        "text": text,
        "sequences": state["sequences"],
        "tokens": state["tokens"],
        "rows": state["rows"],
        "site": {"norm_limit": limit or None, "mean_norm": found.mean_norm, "rms_norm": found.rms_norm},
        "token_table": token_table,
        "statistics": layout.write_tensors(folder / STATISTICS, tensors),
    }
    manifest["fingerprint"] = layout.fingerprint(manifest)
    layout.atomic_write(folder / MANIFEST, layout.pretty_json(manifest))
    writer.remove_state()


def _first_rows(blocks: Iterable[torch.Tensor], rows: int) -> Iterator[torch.Tensor]:
    for x_nD in blocks:
        if rows > 0:
            yield x_nD[:rows]
        rows -= len(x_nD)


def _blocks(source: TextSource, table: TokenTable, site: str, rows: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The first rows in text order in the dtype, `STATISTICS_ROWS` at a time; the batches are those of a store."""
    batch, held, done = source.forward.batch, [], 0
    with Progress("statistics", rows, "rows") as progress:
        for first in range(0, table.n_sequences, batch):
            x_nD = source.forward(table, first, min(first + batch, table.n_sequences))[site].to(dtype).cpu()
            x_nD = x_nD[: rows - done - sum(map(len, held))]
            progress.advance(len(x_nD))
            held.append(x_nD)
            while (there := sum(map(len, held))) >= STATISTICS_ROWS:
                whole = torch.cat(held)
                yield whole[:STATISTICS_ROWS]
                held, done = [whole[STATISTICS_ROWS:]], done + STATISTICS_ROWS
            if done + there == rows:
                break
        if sum(map(len, held)):
            yield torch.cat(held)


class Stream(RowSource):
    """Rows of one site, computed a window at a time; see the module's first lines."""

    def __init__(self, folder: Path, source: TextSource):
        self.path = self.folder = folder
        self.source = source
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.manifest = {**record["plan"], **record}
        """With the names of a store's manifest."""
        self.fingerprint = record["fingerprint"]
        self.sites = tuple(self.manifest["sites"])
        self.rows, self.n_tokens = record["rows"], record["tokens"]
        self.n_sequences = record["sequences"]
        self.dtype = TORCH_DTYPES[self.manifest["dtype"]]
        self._window: tuple[tuple[int, int], StreamWindow] | None = None

    def __repr__(self) -> str:
        return f"<Stream {self.path}: {self.rows:,} rows of {self.n_tokens:,} tokens, {', '.join(self.sites)}>"

    def read_table(self) -> TokenTable:
        return layout.read_tokens(self.folder / TOKENS)

    def outliers(self, sites: str | Sequence[str]) -> np.ndarray:
        """None that could be left out beforehand; see the module's first lines."""
        return np.zeros(0, np.int64)

    def statistics(self, site: str, rows: int | None = None) -> Statistics:
        """Of the first rows in text order, as many as were taken at the beginning."""
        taken = self.manifest["settings"]["statistics_rows"]
        if rows is not None and rows != taken:
            raise SaekitError(
                f"{self.path} was begun with --statistics-rows {taken}, now {rows}; use the first settings"
            )
        tensors, entry = layout.map_tensors(self.folder / STATISTICS), self.manifest["site"]
        mean_D, variance_D = np.array(tensors[f"{site}.mean"]), np.array(tensors[f"{site}.variance"])
        return Statistics(mean_D, variance_D, entry["mean_norm"], entry["rms_norm"], float(variance_D.sum()))

    def batches(self, sites: str | Sequence[str], **options) -> Batches:
        """As a store gives them with `block="sequence"`; nothing else is possible."""
        return super().batches(sites, **{**options, "block": "sequence"})

    def windows(self, sites: Sequence[str]) -> "StreamWindows":
        return StreamWindows(self)

    def window(self, window: Window) -> "StreamWindow":
        """Computed, unless it is the one that was computed last: a second reader often begins with the same."""
        key = (window.epoch, window.number)
        if self._window is None or self._window[0] != key:
            self._window = None
            self._window = key, StreamWindow(self, window)
        return self._window[1]


class StreamWindow:
    """Activations of whole sequences, on the CPU in the dtype of the stream."""

    def __init__(self, stream: Stream, window: Window):
        sequences = np.unique(np.searchsorted(stream.seq_rows(), window.first, side="right") - 1)
        self._first = stream.seq_rows()[sequences]
        """First row of each sequence."""
        self._before = np.concatenate([[0], np.cumsum(stream.seq_rows()[sequences + 1] - self._first)])
        table, forward = stream.table.take(sequences), stream.source.forward
        self._values = {
            site: torch.empty(int(self._before[-1]), stream.d(site), dtype=stream.dtype) for site in stream.sites
        }
        done = 0
        with Progress("compute", table.n_tokens, "tokens") as progress:
            for first in range(0, table.n_sequences, forward.batch):
                last = min(first + forward.batch, table.n_sequences)
                found = forward(table, first, last)
                n = len(found[stream.sites[0]])
                for site, x_nD in found.items():
                    self._values[site][done : done + n].copy_(x_nD)
                done += n
                progress.advance(int(table.seq_start[last] - table.seq_start[first]))
        assert done == self._before[-1]
        limit = stream.manifest["site"]["norm_limit"]
        for site, values in self._values.items():
            norms = layout.row_norms(bits_of(values))
            if not np.isfinite(norms).all():
                raise SaekitError(f"NaN or infinity at {site}; check the model, or pass --dtype bfloat16 or float32")
            _replace(values, norms > limit if limit else np.zeros(done, bool))

    def gather(self, site: str, rows: np.ndarray) -> torch.Tensor:
        sequence = np.searchsorted(self._first, rows, side="right") - 1
        at = self._before[sequence] + rows - self._first[sequence]
        return self._values[site].index_select(0, torch.from_numpy(at))


def _replace(values: torch.Tensor, outlier_n: np.ndarray):
    """In place of an outlier the last row before it that is none, or the first one behind."""
    if outlier_n.any() and not outlier_n.all():
        good = np.flatnonzero(~outlier_n)
        bad = np.flatnonzero(outlier_n)
        source = good[np.maximum(np.searchsorted(good, bad) - 1, 0)]
        values[torch.from_numpy(bad)] = values[torch.from_numpy(source)]


class StreamWindows:
    """What `Batches` reads from: one window at a time, computed when it is entered."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self._window: StreamWindow | None = None

    def prepare(self, window: Window, following: Window | None) -> None:
        # the old one goes first: memory has room for one
        self._window = None
        self._window = self._stream.window(window)

    def gather(self, site: str, rows: np.ndarray) -> torch.Tensor:
        assert self._window is not None
        return self._window.gather(site, rows)

    def close(self) -> None:
        self._window = None
