"""Text and a language model → an activation store.

    store = collect("gpt2", site="blocks.6.hook_resid_post", text="data/*.jsonl", out="acts/gpt2")

1. Tokenise and pack the text: the table of tokens fixes what each shard holds.
2. Run the model over one shard after the other, in fixed batches; keep the rows of ordinary tokens, rounded to the store's
   dtype, in one buffer per site. A thread writes the shard that is full while the next one is computed.
3. After the first 65,536 rows fix the norm above which a row counts as an outlier; no shard is written before.

An activation file is a function of the model, its shard's tokens and the settings, so a killed run goes on where it was
and ends in the same bytes.

B sequences in a batch · T positions · D width of a site · n rows of a shard
"""

import json
import platform
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saekit.config import CollectOptions
from saekit.errors import SaekitError
from saekit.model import LanguageModel, Site, load_model
from saekit.progress import Progress
from saekit.store.format import TokenTable, human_bytes
from saekit.store.reader import Store, open_store
from saekit.store.writer import TORCH_DTYPES, StoreWriter
from saekit.text import Packed, Packing, documents, pack, plan_packing, source_bytes

NORM_ROWS = 65_536
"""Kept rows whose median norm fixes the limit of outliers."""
JOURNAL = "journal.jsonl"


def collect(model, *, out: str | Path, **options) -> Store:
    """Writes the activations of one or several sites of `model` over a text, and opens the store.

    Args:
        model: what `load_model` takes: a hub name, a folder, a .gguf file, `saekit:demo`, or (model, tokenizer).
        out: folder of the store. Work that was cut off there goes on; anything else there is refused.
        options: fields of `CollectOptions`; `site` and `text` may be one string.

    Raises:
        SaekitError: for everything a user can cause (model, site, text, settings, disk, values); nothing is made at `out`
            before model and text are known to be good.
    """
    for name in ("site", "text"):
        if isinstance(options.get(name), (str, Path)):
            options[name] = (options[name],)
        options[name] = tuple(map(str, options.get(name, ())))
    settings, out = CollectOptions(**options), Path(out)
    _check(settings)
    lm = load_model(model, device=settings.device, compute=settings.compute)
    sites = {name: lm.check_site(name) for name in settings.site}
    packing = _check_model(lm, settings)
    plan = _plan(lm, settings, sites, packing)
    Progress.say(str(lm))
    with ExitStack() as stack:
        writer = None
        # a folder with something in it is refused or continued before any time goes into the text
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            writer = stack.enter_context(StoreWriter(out, plan))
        packed = None
        if writer is None or writer.table is None:
            packed = _tokenise(lm, settings, packing)
            _check_disk(out, packed.table, plan)
        if writer is None:
            writer = stack.enter_context(StoreWriter(out, plan))
        if packed is not None:
            writer.tokens(packed.table, text={"documents": packed.documents, "bytes": packed.bytes})
        if writer.committed:
            Progress.say(f"{out}: {len(writer.committed)} of {len(writer.shards)} shards are there, going on")
        _fill(lm, writer, sites, settings)
        writer.finish()
    return open_store(out)


# Before anything is written


def _check(settings: CollectOptions):
    if not settings.text:
        raise SaekitError("no text named; pass --text, for example --text 'data/*.jsonl' or --text stdlib")
    if settings.dtype not in TORCH_DTYPES:
        raise SaekitError(f"dtype {settings.dtype} is not supported; choose bfloat16, float16 or float32")
    if settings.packing != "join":
        raise SaekitError(f"packing {settings.packing} is not known; choose join")
    if settings.bos not in ("auto", "always", "never"):
        raise SaekitError(f"--bos {settings.bos} is not known; choose auto, always or never")
    if settings.norm_multiple < 0:
        raise SaekitError(f"--norm-multiple {settings.norm_multiple:g} is negative; pass 0 for none")
    for name in ("batch_sequences", "shard_mb"):
        if getattr(settings, name) < 1:
            raise SaekitError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be at least 1")


def _check_model(lm: LanguageModel, settings: CollectOptions) -> Packing:
    if lm.tokenizer is None:
        raise SaekitError(
            f"{lm.id} has no tokenizer, so text cannot be read; put the tokenizer's files beside the model"
        )
    if lm.max_context is not None and settings.context > lm.max_context:
        raise SaekitError(f"--context {settings.context} exceeds the model's {lm.max_context} positions")
    packing = plan_packing(
        lm.tokenizer,
        context=settings.context,
        bos=settings.bos,
        keep_special=settings.keep_special,
        drop_ids=settings.drop_ids,
        vocab_size=lm.vocab_size,
        name=lm.id,
    )
    if not lm.causal:
        raise SaekitError(
            f"attention is not causal in {lm.architecture}: joined documents would read each other; "
            "give a causal language model"
        )
    return packing


def _plan(lm: LanguageModel, settings: CollectOptions, sites: dict[str, Site], packing: Packing) -> dict:
    """Every setting that fixes a byte, in the manifest's words."""
    environment = {"torch": torch.__version__, "transformers": _version("transformers"), "device": "cpu"}
    if lm.device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(lm.device)
    elif lm.device.type == "cpu":
        environment |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    else:
        environment["device"] = lm.device.type
    return {
        "model": lm.manifest_entry(),
        "tokenizer": lm.tokenizer_entry(),
        "text": {
            "source": settings.text[0] if len(settings.text) == 1 else list(settings.text),
            "revision": platform.python_version() if "stdlib" in settings.text else None,
            "packing": settings.packing,
            "attention_across_documents": True,
        },
        "context_length": settings.context,
        "batch_sequences": settings.batch_sequences,
        "special_tokens": {
            "prepend_bos": packing.bos is not None,
            "separator": None if packing.separator is None else "eos",
            "dropped_ids": list(packing.dropped),
        },
        "dtype": settings.dtype,
        "sites": {name: _site_entry(site, settings.norm_multiple) for name, site in sites.items()},
        "environment": environment,
        "settings": {"tokens": settings.tokens, "text_field": settings.text_field, "shard_mb": settings.shard_mb},
    }


def _site_entry(site: Site, norm_multiple: float) -> dict:
    heads = {} if site.heads is None else {"heads": site.heads, "d_head": site.d_head}
    return {"d": site.d, **heads, "norm_multiple": float(norm_multiple) if norm_multiple else None}


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _tokenise(lm: LanguageModel, settings: CollectOptions, packing: Packing) -> Packed:
    packed = pack(
        documents(settings.text, settings.text_field),
        lm.tokenizer,
        packing,
        vocab_size=lm.vocab_size,
        tokens=settings.tokens,
        source=" ".join(settings.text),
        size=source_bytes(settings.text),
    )
    empty = f", {packed.empty:,} empty ones passed over" if packed.empty else ""
    Progress.say(
        f"{packed.documents:,} documents{empty}: {packed.table.n_tokens:,} tokens in {packed.table.n_sequences:,} sequences"
    )
    return packed


def _check_disk(out: Path, table: TokenTable, plan: dict):
    """Refuses what will not fit, and says what will be written."""
    rows = int(table.stored.sum())
    row_bytes = sum(s["d"] for s in plan["sites"].values()) * TORCH_DTYPES[plan["dtype"]].itemsize
    # the token table stands there twice while it is written
    needed = rows * row_bytes + 2 * sum(t.nbytes for t in table.tensors().values())
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed * 1.02:
        fit = max(0, int(free / 1.02 / needed * table.n_tokens))
        raise SaekitError(
            f"needs {human_bytes(needed)}, {human_bytes(free)} free at {out}; "
            f"fewer --tokens ({fit:,} fit), fewer sites, or another disk"
        )
    Progress.say(f"{rows:,} rows of {human_bytes(row_bytes)} to write: {human_bytes(needed)}")


# Rows


def _fill(lm: LanguageModel, writer: StoreWriter, sites: dict[str, Site], settings: CollectOptions):
    """Computes and writes every shard that is not committed."""
    todo = [i for i in range(len(writer.shards)) if i not in writer.committed]
    table = writer.table
    assert table is not None
    starts = [int(table.seq_start[r.start]) for r in writer.shards] + [table.n_tokens]
    limits = writer.norm_limits
    held: list[tuple[int, dict[str, Tensor]]] = []
    with (
        ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        Progress("collect", sum(starts[i + 1] - starts[i] for i in todo), "tokens") as progress,
    ):
        handover = _Handover(pool, writer)
        for i in todo:
            held.append((i, _shard(lm, writer, i, sites, settings, progress, handover)))
            if limits is None and (sum(writer.rows(j) for j, _ in held) >= NORM_ROWS or i == todo[-1]):
                limits = _norm_limits([rows for _, rows in held], settings.norm_multiple)
            if limits is not None:
                while held:
                    handover.submit(*held.pop(0), limits)
        handover.wait()


class _Handover:
    """Hands shards to the writing thread, one at a time; waiting for it is counted."""

    def __init__(self, pool: ThreadPoolExecutor, writer: StoreWriter):
        self.pool, self.writer = pool, writer
        self.start = time.monotonic()
        self.waited = 0.0
        """Seconds in which the model stood still for the disk."""
        self.bytes = 0
        self.pending: Future | None = None

    def submit(self, i: int, rows: dict[str, Tensor], limits: dict[str, float | None]):
        self.wait()
        self.pending = self.pool.submit(self._put, i, rows, limits)

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

    def _put(self, i: int, rows: dict[str, Tensor], limits: dict[str, float | None]):
        start = time.monotonic()
        self.writer.put(i, rows, limits)
        self.bytes += sum(x.nbytes for x in rows.values())
        seconds = time.monotonic() - self.start
        entry = {"shard": i, "at_seconds": seconds, "write_seconds": time.monotonic() - start, "waited": self.waited}
        with open(self.writer.out / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(entry) + "\n")


@torch.no_grad()
def _shard(
    lm: LanguageModel,
    writer: StoreWriter,
    i: int,
    sites: dict[str, Site],
    settings: CollectOptions,
    progress: Progress,
    handover: _Handover,
) -> dict[str, Tensor]:
    """Rows of shard i, {site: (n, D)} in the store dtype on the CPU.

    Raises SaekitError for a value that is not finite or does not fit the dtype, naming where it stands.
    """
    table, sequences, n = writer.table, writer.shards[i], writer.rows(i)
    assert table is not None
    dtype = TORCH_DTYPES[settings.dtype]
    rows = {name: torch.empty(n, site.d, dtype=dtype) for name, site in sites.items()}
    # read once per shard: a look at each batch would stop a GPU
    largest = {name: torch.zeros((), device=lm.device) for name in sites}
    done = 0
    for first in range(sequences.start, sequences.stop, settings.batch_sequences):
        last = min(first + settings.batch_sequences, sequences.stop)
        ids_BT, kept_n = _batch(table, first, last)
        kept_n = torch.from_numpy(kept_n).to(lm.device)
        try:
            found = lm.capture(ids_BT.to(lm.device), list(sites))
        except torch.OutOfMemoryError as error:
            raise SaekitError(
                f"batch of {settings.batch_sequences} sequences does not fit; "
                f"try --batch-sequences {max(1, settings.batch_sequences // 2)}"
            ) from error
        for name, x_BTD in found.items():
            x_nD = x_BTD.reshape(-1, sites[name].d).index_select(0, kept_n)
            if len(x_nD):
                largest[name] = torch.maximum(largest[name], x_nD.abs().amax().float())
            rows[name][done : done + len(x_nD)].copy_(x_nD)
        done += len(kept_n)
        progress.advance(int(table.seq_start[last] - table.seq_start[first]), handover.note)
    assert done == n, f"{done} rows, not {n}"
    for name, value in largest.items():
        if not value.item() <= torch.finfo(dtype).max:
            raise _bad_value(name, rows[name], value.item(), table, sequences.start, settings)
    return rows


def _batch(table: TokenTable, first: int, last: int) -> tuple[Tensor, np.ndarray]:
    """Ids (B, T) of sequences first to last, and which of the B·T positions have a row, ascending.

    Shorter sequences repeat their last id; what stands behind a token does not change it.
    """
    start_B, end_B = table.seq_start[first:last], table.seq_start[first + 1 : last + 1]
    T = int((end_B - start_B).max())
    index_BT = start_B[:, None] + np.arange(T)
    real_BT = index_BT < end_B[:, None]
    index_BT = np.minimum(index_BT, end_B[:, None] - 1)
    kept = np.flatnonzero(table.stored[index_BT] & real_BT)
    return torch.from_numpy(table.token[index_BT].astype(np.int64)), kept


def _bad_value(
    site: str, x_nD: Tensor, largest: float, table: TokenTable, first_sequence: int, settings: CollectOptions
) -> SaekitError:
    if np.isfinite(largest):
        limit = torch.finfo(TORCH_DTYPES[settings.dtype]).max
        return SaekitError(
            f"{site} reaches {largest:,.0f}, above {settings.dtype}'s {limit:,.0f}; use --dtype bfloat16"
        )
    row = int((~x_nD.isfinite()).any(1).nonzero()[0])
    what = "NaN" if x_nD[row].isnan().any() else "infinity"
    start = int(table.seq_start[first_sequence])
    # rows of a shard are its stored positions in order
    position = start + int(np.flatnonzero(table.stored[start:])[row])
    sequence = int(table.seq_of(position))
    return SaekitError(
        f"{what} at {site}, sequence {sequence}, position {int(table.position_in_seq(position))}; "
        f"try --compute fp32 or check the model"
    )


def _norm_limits(shards: list[dict[str, Tensor]], multiple: float) -> dict[str, float | None]:
    """multiple × the median norm of the first 65,536 rows, as stored; None where there is no limit."""
    limits: dict[str, float | None] = {}
    for site in shards[0]:
        norms, missing = [], NORM_ROWS
        for shard in shards:
            # blocks, because a wide site in double would take gigabytes
            norms += [x_nD.double().square().sum(1).sqrt() for x_nD in shard[site][:missing].split(4096)]
            missing = max(0, missing - len(shard[site]))
        median = float(np.median(torch.cat(norms).numpy()))
        limits[site] = multiple * median if multiple * median > 0 else None
    return limits
