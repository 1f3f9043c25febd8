"""What is resolved before the first step of training: the rows, the steps, the SAEs, and what is recorded of them.

    plan = Plan({out: TopK(k=32)}, source, RunOptions(batch=4096))     # SaekitError for what does not go together
    plan.steps, plan.rows
    learner = plan.learner(plan.jobs[0])                               # a Trainer, with the statistics of the rows

D model width · n rows of a chunk
"""

import dataclasses
import difflib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from saekit_kernels import explain
from torch import Tensor

import saekit
from saekit.checkpoint import checkpoint_bytes, checkpoints
from saekit.config import RunOptions, StreamOptions
from saekit.device import resolve_device
from saekit.errors import SaekitError
from saekit.optim import learning_rate
from saekit.provenance import only_site
from saekit.ranks import Ranks
from saekit.run_folder import environment_of, identity_of
from saekit.store import Store, open_store
from saekit.store.batches import Batches
from saekit.store.format import human_bytes
from saekit.store.rows import PARTS, RowSource
from saekit.trainer import FIT_ROWS, InputStatistics, Trainer
from saekit.variants import Variant


def open_source(
    store: RowSource | str | Path | None,
    stream: StreamOptions | None,
    out: Path,
    options: RunOptions,
    model=None,
    ranks: Ranks | None = None,
) -> RowSource:
    """What a run reads: a store, or a stream that begins or goes on in `out/stream`."""
    if isinstance(store, RowSource):
        return store
    model = model or (stream.stream if stream else None)
    if model is None:
        if stream is not None and stream.text:
            raise SaekitError("--text goes with --stream MODEL; without a store to read, name the model")
        if store is None:
            raise SaekitError("no store named; give one, or --stream MODEL with --site and --text")
        return open_store(store)
    if store is not None:
        raise SaekitError(f"give a store ({store}) or --stream, not both")
    if options.site is None:
        raise SaekitError("no site named; pass --site, for example --site blocks.6.hook_resid_post")
    if ranks is not None and ranks.size > 1:
        raise SaekitError("--stream runs in one process; collect a store for torchrun, or start without torchrun")
    from saekit.stream import open_stream

    assert stream is not None
    made = not out.exists()
    try:
        return open_stream(
            model, stream, site=options.site, out=out, statistics_rows=options.statistics_rows, device=options.device
        )
    except SaekitError:
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        raise


class Job(NamedTuple):
    """One SAE that is asked for."""

    out: Path
    variant: Variant
    """With `d_sae` filled in."""


@dataclasses.dataclass
class Learner:
    """One SAE in training."""

    job: Job
    trainer: Trainer
    seconds: float = 0.0
    """Of training, before this start."""
    sound: int = 0
    """Step at which it was last known to be finite."""

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.parameters().values())


class Plan:
    """What was resolved before the first step. Raises SaekitError for what does not go together."""

    def __init__(
        self, variants: Mapping[Path, Variant], source: RowSource, options: RunOptions, ranks: Ranks | None = None
    ):
        self.source, self.options, self.ranks = source, options, ranks or Ranks()
        ranks = self.ranks
        self.device = resolve_device(options.device)
        if self.device.type == "cuda" and self.device.index is None and ranks.size > 1:
            self.device = torch.device("cuda", ranks.local)
            torch.cuda.set_device(self.device)
        self.site = find_site(source, options.site)
        D = source.d(self.site)
        self.jobs = [Job(out, dataclasses.replace(v, d_sae=v.d_sae or 16 * D)) for out, v in variants.items()]
        for job in self.jobs:
            assert job.variant.d_sae is not None
            job.variant.check(job.variant.d_sae)
        check_batch(options, ranks)
        self.rows = len(source.row_set([self.site], options.split, options.outliers))
        self.rows_wanted = options.epochs * self.rows if options.tokens is None else options.tokens
        if self.rows_wanted > options.epochs * self.rows:
            raise SaekitError(
                f"run needs {self.rows_wanted:,} rows, {PARTS[options.split]} of {source.path} has {self.rows:,}; "
                + (
                    f"pass --epochs {-(-self.rows_wanted // self.rows)} or collect more"
                    if self.rows
                    else "collect more"
                )
            )
        self.steps = self.rows_wanted // options.batch
        if self.steps < 1:
            raise SaekitError(
                f"one step needs --batch {options.batch:,} rows, the run has {self.rows_wanted:,}; "
                "lower --batch or collect more"
            )
        self.checkpoint_every = options.checkpoint_every or max(200, self.steps // 20)
        self.environment = environment_of(self.device, ranks)

    def identity(self, job: Job) -> dict:
        return identity_of(job.variant, self.options, self.source.fingerprint)

    def batches(self, state: dict | None = None, **options) -> Batches:
        """The run's batches, from where `state` stands; whole ones, unless `options` say rank and ranks."""
        o = self.options
        return self.source.batches(
            [self.site],
            batch=o.batch,
            seed=o.seed,
            split=o.split,
            ram=o.ram,
            block=o.block,
            outliers=o.outliers,
            state=state,
            **{"epochs": o.epochs, **options},
        )

    def first_rows(self, count: int) -> Iterator[Tensor]:
        """The first rows of epoch 0's order, `count` or all there are, raw: (n, D) float32 at a time. They come from a reader of
        their own, so that training's place in the data does not move."""
        left = min(count, self.rows)
        # one epoch more, as an epoch may end inside a batch
        for batch in self.batches(epochs=self.options.epochs + 1):
            yield batch[self.site][:left].float()
            left -= min(left, self.options.batch)
            if not left:
                return

    @cached_property
    def statistics(self) -> InputStatistics:
        found = self.source.statistics(self.site, self.options.statistics_rows)
        return InputStatistics(torch.from_numpy(found.mean_D.copy()), found.total_variance, found.mean_norm)

    @cached_property
    def fit_rows(self) -> Tensor:
        return torch.cat(list(self.first_rows(FIT_ROWS)))

    def learner(self, job: Job) -> Learner:
        trainer = Trainer(
            job.variant,
            self.source.d(self.site),
            statistics=self.statistics,
            tokens=self.steps * self.options.batch,
            fit_rows=self.fit_rows,
            seed=self.options.seed,
            device=self.device,
            compute=self.options.compute,
            micro_batches=self.options.micro_batches,
            ranks=self.ranks,
        )
        return Learner(job, trainer)

    def disk_bytes(self, learner: Learner) -> int:
        """Bytes that a run needs beyond what its checkpoints take now: those that stay, and one that is being written."""
        return (self.kept - min(self.kept, len(checkpoints(learner.job.out))) + 1) * checkpoint_bytes(learner.trainer)

    @property
    def kept(self) -> int:
        """Checkpoints at the end."""
        made = -(-self.steps // self.checkpoint_every)
        return made if self.options.keep == "all" else min(made, self.options.keep)

    def run_json(self, learner: Learner, threads: int) -> dict:
        job, trainer, path = learner.job, learner.trainer, self.source.path
        return {
            "format": "saekit-run",
            "format_version": 1,
            "saekit_version": saekit.__version__,
            "run_id": uuid.uuid4().hex[:12],
            "identity": self.identity(job),
            "options": dataclasses.asdict(self.options),
            "variant": {"name": job.variant.name, **dataclasses.asdict(job.variant)},
            "computed": {
                "site": self.site,
                "steps": self.steps,
                "d_model": trainer.d_model,
                "micro_batch": self.options.batch // self.options.micro_batches,
                "lr": learning_rate(trainer.variant, trainer.d_model, trainer.d_sae, self.steps),
                "dead_after": trainer.dead_after,
                "input_scale": trainer.scale,
                "checkpoint_every": self.checkpoint_every,
                "compute": trainer.compute,
                "compute_reason": trainer.compute_reason,
            },
            "store": {
                "path": str(path),
                "absolute": str(Path(path).resolve()),
                "fingerprint": self.source.fingerprint,
                "streamed": not isinstance(self.source, Store),
            },
            "environment": {**self.environment, "threads": threads},
            "environments": [{"from_step": 0, **self.environment}],
            "kernels": {c.op: f"{c.path}: {c.reason}" for c in explain(trainer.device.type)},
        }

    def config(self, learner: Learner) -> dict:
        """The parts of config.json that the run knows: where the SAE belongs and where it comes from."""
        manifest, trainer = self.source.manifest, learner.trainer
        model, special = manifest["model"], manifest["special_tokens"]
        tokenizer = manifest.get("tokenizer")
        return {
            "site": self.site,
            "model": {k: model.get(k) for k in ("id", "revision", "weights_fingerprint", "processing")},
            "tokenizer": {"fingerprint": tokenizer["fingerprint"]} if tokenizer else None,
            "context": {
                "length": manifest["context_length"],
                "prepend_bos": special["prepend_bos"],
                "dropped_ids": special["dropped_ids"],
            },
            "provenance": {
                "created_by": f"saekit {saekit.__version__}",
                "store": self.source.fingerprint,
                "rows_seen": trainer.step_count * self.options.batch,
                "split": self.options.split,
                "seed": self.options.seed,
                "training": {
                    **{k: v for k, v in dataclasses.asdict(trainer.variant).items() if k != "d_sae"},
                    "lr": trainer.lr,
                    "batch": self.options.batch,
                    "micro_batches": self.options.micro_batches,
                    "steps": self.steps,
                    "dead_after": trainer.dead_after,
                    "input_scale": trainer.scale,
                    "compute": trainer.compute,
                },
                "converted_from": None,
                "lost": [],
            },
        }


def find_site(source: RowSource, site: str | None) -> str:
    """The site asked for, or the only one."""
    if site is None:
        return only_site(source)
    if site not in source.sites:
        close = difflib.get_close_matches(site, source.sites, 1)
        raise SaekitError(
            f"no site {site} in {source.path}; "
            + (f"nearest: {close[0]}" if close else f"it holds {', '.join(source.sites)}")
        )
    return site


def check_batch(options: RunOptions, ranks: Ranks):
    """Means of uneven means are not the mean: every part of a batch has as many rows."""
    parts = ranks.size * options.micro_batches
    below = options.batch // parts * parts
    if below == options.batch:
        return
    made_of = " × ".join(
        f"{n} {name}" for n, name in ((ranks.size, "ranks"), (options.micro_batches, "micro-batches")) if n > 1
    )
    nearest = f"{below} or {below + parts}" if below else f"{parts}"
    raise SaekitError(f"--batch {options.batch} is not divisible by {made_of}; {nearest} is")


def check_disk(folder: Path, needed: int):
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    if free < needed:
        raise SaekitError(
            f"checkpoints and SAE need {human_bytes(needed)}, {human_bytes(free)} are free at {folder}; "
            f"free {human_bytes(needed - free)} or choose another --out"
        )
