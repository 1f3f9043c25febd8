"""Text and a language model → an activation store.

    store = collect("gpt2", site="blocks.6.hook_resid_post", text="data/*.jsonl", out="acts/gpt2")
    store = collect(module, site="layers.3", inputs=batches, out="acts/vision")     # any torch module

1. Tokenise and pack the text in parts, one per shard; a part fixes what its shard holds.
2. Of the first 65,536 rows find the median norm at each site: a row counts as an outlier above a multiple of it.
3. Run the model over one shard after the other, in fixed batches; keep the rows of ordinary tokens, rounded to the store's
   dtype, in one buffer per site. Threads write the shard that is full while the next one is computed.

An activation file is a function of the model, its shard's tokens and the settings. So a killed run goes on where it was and
ends in the same bytes, and under `torchrun` rank r of R takes the shards r, r + R, … of the same store.

D width of a site · n rows of a shard or a batch
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saekit.config import CollectOptions
from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.progress import Progress
from saekit.ranks import Ranks, joined_ranks
from saekit.source import InputSource, Source, TextSource
from saekit.store import format as layout
from saekit.store.format import human_bytes
from saekit.store.reader import Store, open_store
from saekit.store.writer import TORCH_DTYPES, StoreWriter, bits_of, refuse_foreign

NORM_ROWS = 65_536
"""Kept rows whose median norm fixes the limit of outliers."""
JOURNAL = "journal.jsonl"


def collect(model, *, out: str | Path, inputs: Iterable | Callable[[], Iterable] | None = None, **options) -> Store:
    """Writes the activations of one or several sites of `model` over a text, and opens the store.

    Args:
        model: what `load_model` takes: a hub name, a folder, a .gguf file, `saekit:demo`, or (model, tokenizer). With
            `inputs` any `torch.nn.Module`.
        out: folder of the store. Work that was cut off there goes on; anything else there is refused.
        inputs: batches (tensors, tuples of them for several arguments, or dicts for named ones) to call a module with, in
            something that can be read more than once: a list, a DataLoader without shuffling, or a function that gives an
            iterator. `site` is then a module path such as `layers.3`, an item takes the place of a sequence.
        options: fields of `CollectOptions`; `site` and `text` may be one string.

    Raises:
        SaekitError: for everything a user can cause (model, site, text, settings, disk, values); nothing is left at `out`
            by an error before the first shard, unless work was there before.
        KeyboardInterrupt, Terminated: Ctrl-C and SIGTERM, after the batch in hand; the same call continues.
    """
    for name in ("site", "text"):
        if isinstance(options.get(name), (str, Path)):
            options[name] = (options[name],)
        options[name] = tuple(map(str, options.get(name, ())))
    settings, out = CollectOptions(**options), Path(out)
    _check(settings, inputs is not None)
    refuse_foreign(out)
    first = layout.read_plan(out)
    with joined_ranks() as ranks, Stop() as stop, _threads(first, settings, ranks):
        if inputs is None:
            source: Source = TextSource(model, settings, ranks, first)
        else:
            source = InputSource(model, settings, inputs)
        Progress.say(str(source))
        with _opened(out, source, settings, ranks, stop) as writer:
            if not writer.finished:
                _fill(source, writer, settings, ranks, stop)
                ranks.barrier(lambda: _lost(writer, ranks))
                if ranks.rank == 0:
                    writer.refresh()
                    writer.finish()
        ranks.barrier()
    return open_store(out)


# Before anything is written


def _check(settings: CollectOptions, has_inputs: bool):
    if has_inputs == bool(settings.text):
        raise SaekitError(
            "give either text or inputs"
            if has_inputs
            else "no text named; pass --text, for example --text 'data/*.jsonl' or --text stdlib"
        )
    if settings.dtype not in TORCH_DTYPES:
        raise SaekitError(f"dtype {settings.dtype} is not supported; choose bfloat16, float16 or float32")
    for name, known in (("packing", (None, "join", "isolate", "separate")), ("bos", ("auto", "always", "never"))):
        value = getattr(settings, name)
        if value not in known:
            raise SaekitError(f"--{name} {value} is not known; choose {', '.join(k for k in known if k)}")
    if settings.norm_multiple < 0:
        raise SaekitError(f"--norm-multiple {settings.norm_multiple:g} is negative; pass 0 for none")
    for name in ("batch_sequences", "shard_mb", "threads"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise SaekitError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


@contextmanager
def _threads(first: dict | None, settings: CollectOptions, ranks: Ranks):
    """The threads of a forward pass: as asked for, else as at the first start, else the cores shared by the ranks."""
    before = torch.get_num_threads()
    threads = settings.threads or (first or {}).get("environment", {}).get("threads")
    if threads is None and ranks.size > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks.local_size)
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# The folder and the text


@contextmanager
def _opened(out: Path, source: Source, settings: CollectOptions, ranks: Ranks, stop: Stop) -> Iterator[StoreWriter]:
    """The writer, behind step 1: rank 0 begins or continues the folder and reads the text, the others wait for it."""
    writer = None
    if ranks.rank == 0:
        writer = StoreWriter(out, source.plan, accept_environment=settings.accept_environment)
    try:
        if writer is not None and not writer.finished:
            _begin(source, writer, settings, stop)
        finished = ranks.gather(writer is not None and writer.finished)[0]
        if writer is None:
            if not finished and not (out / layout.STATE / "plan.json").is_file():
                raise SaekitError(
                    f"rank {ranks.rank} does not see {out}/state/plan.json; all ranks need the same folder"
                )
            writer = StoreWriter(
                out, source.plan, owner=False, accept_environment=settings.accept_environment, finished=finished
            )
        yield writer
    finally:
        if writer is not None:
            writer.close()


def _begin(source: Source, writer: StoreWriter, settings: CollectOptions, stop: Stop):
    """Step 1, the disk, and what is there already. An error leaves a folder that was new as it was."""
    try:
        if settings.finish and writer.continued and not _is_short(writer.text_state):
            if not writer.committed:
                raise SaekitError(
                    f"{writer.out} has no whole shard yet; run its collect command again without --finish"
                )
            total = writer.n_shards
            writer.finish()
            Progress.say(f"{writer.out}: closed with what was whole of {total} shards")
            return
        read_text(source, writer, settings, stop)
        _check_disk(writer)
    except SaekitError:
        writer.abandon()
        raise
    if writer.committed:
        Progress.say(f"{writer.out}: {len(writer.committed)} of {writer.n_shards} shards are there, going on")


def _is_short(state: Mapping | None) -> bool:
    """Whether the text ended before the tokens that were asked for."""
    return state is not None and state.get("short", False)


def read_text(source: Source, writer: StoreWriter, settings: CollectOptions, stop: Stop):
    """Step 1: the parts of the token table that are not there yet."""
    if not writer.text_done:
        if writer.text_state is not None and not source.repeatable:
            raise SaekitError(
                f"stdin cannot be read again; delete {writer.out} and start over, or save the text to a file"
            )
        for part in source.parts(writer.shard_sequences, writer.text_state):
            if _is_short(part.state) and not settings.finish:
                raise SaekitError(
                    f"text ended at {part.state['tokens']:,} of {settings.tokens:,} tokens; "
                    "add --finish to close the store with what there is"
                )
            writer.part(part.table, part.state)
            if stop.signal and not writer.text_done:
                stop.leave(f"stopped at token {part.state['tokens']:,} of the text; the same command continues")
    state = writer.text_state
    assert state is not None
    empty = f", {state['empty']:,} empty ones passed over" if state.get("empty") else ""
    Progress.say(
        f"{state['documents']:,} documents{empty}: {state['tokens']:,} tokens in {state['sequences']:,} sequences"
    )


def _check_disk(writer: StoreWriter):
    """Refuses what will not fit, and says what will be written."""
    missing = [i for i in range(writer.n_shards) if i not in writer.committed]
    rows, total = sum(writer.rows(i) for i in missing), writer.text_state or {}
    widths = [s["d"] for s in writer.plan["sites"].values()]
    row_bytes = sum(widths) * TORCH_DTYPES[writer.dtype].itemsize
    # beside the rows of each site a file has its header up to a page, two sums, the histogram
    headers = len(missing) * sum(layout.PAGE + 16 * d + 8 * layout.HISTOGRAM_BINS for d in widths)
    # the parts of the token table stand there already, and once more when they are joined
    needed = rows * row_bytes + headers + sum(writer.table(i).nbytes for i in range(writer.n_shards))
    free = shutil.disk_usage(writer.out).free
    if free < needed * 1.02:
        fit = max(0, int(free / 1.02 / needed * total["tokens"]))
        raise SaekitError(
            f"needs {human_bytes(needed)}, {human_bytes(free)} free at {writer.out}; "
            f"fewer --tokens ({fit:,} fit), fewer sites, or another disk"
        )
    Progress.say(f"{rows:,} rows of {human_bytes(row_bytes)} to write: {human_bytes(needed)}")


def _lost(writer: StoreWriter, ranks: Ranks) -> str:
    """Who is missing at the end: the owner of the first shard that is not there."""
    writer.refresh()
    missing = [i for i in range(writer.n_shards) if i not in writer.committed]
    return f"rank {missing[0] % ranks.size} was lost at shard {missing[0]}" if missing else "a rank was lost"


# Rows


def _fill(source: Source, writer: StoreWriter, settings: CollectOptions, ranks: Ranks, stop: Stop):
    """Computes and writes this rank's shards that are not committed."""
    todo = [i for i in range(ranks.rank, writer.n_shards, ranks.size) if i not in writer.committed]
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        Progress("collect", sum(map(writer.tokens, todo)), "tokens") as progress,
    ):
        shards = _Shards(source.forward, writer, _Handover(pool, writer), progress, stop)
        if writer.norm_limits is None:
            held = _fix_norm_limits(shards, writer, settings, ranks)
            for i, rows in held.items():
                shards.handover.submit(i, rows)
            todo = [i for i in todo if i not in held]
        for i in todo:
            shards.handover.submit(i, shards.compute(i))
        shards.handover.wait()


def _fix_norm_limits(shards: "_Shards", writer: StoreWriter, settings: CollectOptions, ranks: Ranks) -> dict[int, dict]:
    """Step 2, before any shard is written. Returns the rows of at most two shards that were computed for it."""
    held: dict[int, dict[str, Tensor]] = {}
    limits: dict[str, float | None] = dict.fromkeys(writer.sites)
    if settings.norm_multiple:
        starts = np.cumsum([0, *map(writer.rows, range(writer.n_shards))])
        norms = {}
        for i in range(ranks.rank, int(np.searchsorted(starts[:-1], NORM_ROWS)), ranks.size):
            # two shards are what memory has room for; more than two are needed only where shards are of few, wide rows
            norms[i], rows = shards.norms(i, NORM_ROWS - int(starts[i]), keep=len(held) < _Shards.BUFFERS)
            if rows is not None:
                held[i] = rows
        norms = dict(chain.from_iterable(found.items() for found in ranks.gather(norms)))
        for site in writer.sites:
            limit = settings.norm_multiple * float(np.median(np.concatenate([norms[i][site] for i in sorted(norms)])))
            limits[site] = limit if limit > 0 else None
    if ranks.rank == 0:
        writer.fix_norm_limits(limits)
    ranks.barrier()
    if ranks.rank > 0:
        writer.refresh()
    return held


class _Shards:
    """Rows of one shard at a time, in one of two sets of buffers: one is written while the other is filled."""

    BUFFERS = 2

    def __init__(self, forward, writer: StoreWriter, handover: "_Handover", progress: Progress, stop: Stop):
        self.forward, self.writer, self.handover = forward, writer, handover
        self.progress, self.stop = progress, stop
        self.dtype = TORCH_DTYPES[writer.dtype]
        self._buffers: list[dict[str, Tensor]] = []
        self._next = 0
        # copies to the host run beside the forward pass
        self._stream = torch.cuda.Stream(forward.device) if forward.device.type == "cuda" else None

    def compute(self, i: int) -> dict[str, Tensor]:
        """{site: (n, D)} in the store dtype on the CPU; the buffers are used again two shards later.

        Raises SaekitError for a value that is not finite or does not fit the dtype, naming where it stands.
        """
        rows = self._take(self.writer.rows(i))
        done = 0
        for found in self._batches(i):
            n = len(next(iter(found.values())))
            if self._stream is not None:
                self._stream.wait_stream(torch.cuda.current_stream(self.forward.device))
            with torch.cuda.stream(self._stream):
                for name, x_nD in found.items():
                    rows[name][done : done + n].copy_(x_nD, non_blocking=True)
                    if self._stream is not None:
                        x_nD.record_stream(self._stream)
            done += n
        assert done == self.writer.rows(i), f"{done} rows, not {self.writer.rows(i)}"
        if self._stream is not None:
            self._stream.synchronize()
        self._check(i, lambda name: layout.row_norms(bits_of(rows[name])))
        return rows

    def norms(self, i: int, wanted: int, keep: bool) -> tuple[dict[str, np.ndarray], dict[str, Tensor] | None]:
        """Norms of the first `wanted` rows as they are stored, per site; and the rows of the shard if they are to be kept."""
        if keep:
            rows = self.compute(i)
            return {name: layout.row_norms(bits_of(x_nD[:wanted])) for name, x_nD in rows.items()}, rows
        norms: dict[str, list[np.ndarray]] = {name: [] for name in self.writer.sites}
        for found in self._batches(i):
            for name, x_nD in found.items():
                norms[name].append(layout.row_norms(bits_of(x_nD.to(self.dtype).cpu())))
            if sum(map(len, norms[name])) >= wanted:
                break
        found_norms = {name: np.concatenate(blocks) for name, blocks in norms.items()}
        self._check(i, found_norms.__getitem__)
        return {name: values[:wanted] for name, values in found_norms.items()}, None

    def _batches(self, i: int) -> Iterator[dict[str, Tensor]]:
        table, batch = self.writer.table(i), self.writer.plan["batch_sequences"]
        # read once per shard: a look at each batch would stop a GPU
        self._largest = {name: torch.zeros((), device=self.forward.device) for name in self.writer.sites}
        for first in range(0, table.n_sequences, batch):
            if self.stop.signal:
                self.handover.wait()
                self.stop.leave(
                    f"stopped in shard {i} of {self.writer.n_shards}, {len(self.writer.committed)} are written; "
                    "the same command continues"
                )
            last = min(first + batch, table.n_sequences)
            found = self.forward(table, first, last)
            for name, x_nD in found.items():
                if len(x_nD):
                    # either is NaN where a value is
                    low, high = x_nD.aminmax()
                    self._largest[name] = torch.maximum(self._largest[name], torch.maximum(-low, high).float())
            yield found
            self.progress.advance(int(table.seq_start[last] - table.seq_start[first]), self.handover.note)

    def _take(self, n: int) -> dict[str, Tensor]:
        """A set of buffers whose shard is written; `submit` waits for the one before."""
        if len(self._buffers) < self.BUFFERS:
            most = max(map(self.writer.rows, range(self.writer.n_shards)))
            self._buffers.append(
                {
                    name: torch.empty(most, site.d, dtype=self.dtype, pin_memory=self._stream is not None)
                    for name, site in self.forward.sites.items()
                }
            )
            self._next = len(self._buffers) - 1
        buffers = self._buffers[self._next]
        self._next = (self._next + 1) % self.BUFFERS
        return {name: buffer[:n] for name, buffer in buffers.items()}

    def _check(self, i: int, norms: Callable[[str], np.ndarray]):
        for name, value in self._largest.items():
            if not value.item() <= torch.finfo(self.dtype).max:
                raise self._bad_value(i, name, value.item(), norms(name))

    def _bad_value(self, i: int, site: str, largest: float, norms_n: np.ndarray) -> SaekitError:
        if np.isfinite(largest):
            limit = torch.finfo(self.dtype).max
            return SaekitError(
                f"{site} reaches {largest:,.0f}, above {self.writer.dtype}'s {limit:,.0f}; use --dtype bfloat16"
            )
        row = int(np.flatnonzero(~np.isfinite(norms_n))[0])
        what = "NaN" if np.isnan(norms_n[row]) else "infinity"
        table = self.writer.table(i)
        # rows of a shard are its stored positions in order
        position = int(np.flatnonzero(table.stored)[row])
        sequence = int(table.seq_of(position))
        return SaekitError(
            f"{what} at {site}, sequence {i * self.writer.shard_sequences + sequence}, "
            f"position {int(table.position_in_seq(position))}; try --compute fp32 or check the model"
        )


class _Handover:
    """Hands shards to the writing thread, one at a time; waiting for it is counted."""

    def __init__(self, pool: ThreadPoolExecutor, writer: StoreWriter):
        self.pool, self.writer = pool, writer
        self.start = time.monotonic()
        self.waited = 0.0
        """Seconds in which the model stood still for the disk."""
        self.bytes = 0
        self.pending: Future | None = None

    def submit(self, i: int, rows: dict[str, Tensor]):
        self.wait()
        self.pending = self.pool.submit(self._put, i, rows)

    def wait(self):
        """Until the shard that was handed over is committed; its error is raised here."""
        if self.pending is not None:
            start = time.monotonic()
            pending, self.pending = self.pending, None
            pending.result()
            self.waited += time.monotonic() - start

    @property
    def note(self) -> str:
        share = self.waited / max(1e-9, time.monotonic() - self.start)
        return f"{human_bytes(self.bytes)} written, write wait {share:.1%}"

    def _put(self, i: int, rows: dict[str, Tensor]):
        start = time.monotonic()
        self.writer.put(i, rows)
        self.bytes += sum(x.nbytes for x in rows.values())
        seconds = time.monotonic() - self.start
        entry = {"shard": i, "at_seconds": seconds, "write_seconds": time.monotonic() - start, "waited": self.waited}
        with open(self.writer.out / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")


# Afterwards


def report(store: Store) -> str:
    """A few lines per site: norms, outliers, and where the mean lies."""
    lines = []
    for site in store.sites:
        entry = store.manifest["sites"][site]
        names = [store.folder / layout.shard_name(site, i) for i in range(len(store.manifest["shards"]))]
        merged = layout.merge_sums(names)
        low, high = (layout.histogram_quantile(merged.norm_histogram, q) for q in (0.01, 0.99))
        share = entry["outlier_rows"] / store.rows
        lines.append(
            f"{site}: width {entry['d']}, norm {entry['median_norm']:.3g} (median; 98 % between {low:.3g} and {high:.3g}, "
            f"largest {entry['max_norm']:.3g})"
        )
        if entry["norm_limit"] is not None:
            lines.append(f"  {share:.2%} of rows lie above {entry['norm_limit']:.3g} and are marked; readers skip them")
        mean_D, variance_D = layout.mean_and_variance(merged)
        shifted = np.abs(mean_D) / np.sqrt(np.maximum(variance_D, 1e-300))
        top = np.argsort(-shifted)[:5]
        lines.append(
            "  largest means, in deviations: " + ", ".join(f"dimension {d} {shifted[d]:.3g}" for d in top if mean_D[d])
        )
        ratio = entry["mean_to_deviation"]
        if ratio is not None:
            advice = "; train with the input centred (the default)" if ratio > 1 else ""
            lines.append(f"  ‖mean‖ / ‖deviation‖ {ratio:.2f}{advice}")
    return "\n".join(lines)
