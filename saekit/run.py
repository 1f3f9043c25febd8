"""The one training loop: a store or a stream, a list of Trainers, schedule, checkpoints, log.

    sae = sk.train(sk.TopK(k=32), store, out="saes/gpt2-topk")

The folder: `run.json` first (options, computed values, the store), `metrics.jsonl` while training, `checkpoints/`, and at
the end `sae.safetensors` and `config.json`. Without `config.json` the run is unfinished, and the same call continues it
from the last checkpoint, with the same result to the bit.
"""

import dataclasses
import json
import platform
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from saekit_kernels import explain

import saekit
from saekit.checkpoint import checkpoints, restore_checkpoint, save_checkpoint
from saekit.config import RunOptions, StreamOptions
from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.progress import Progress
from saekit.provenance import only_site
from saekit.sae import CONFIG, SAE
from saekit.store import Store, open_store
from saekit.store.format import atomic_write, pretty_json, take_lock
from saekit.store.rows import RowSource
from saekit.trainer import FIT_ROWS, InputStatistics, Trainer
from saekit.variants import Variant

# what cannot change the result may differ when a run continues
FREE_OPTIONS = ("log_every", "checkpoint_every")


def train(
    variant: Variant,
    store: RowSource | str | Path | None = None,
    *,
    out: str | Path,
    stream: StreamOptions | None = None,
    model=None,
    **options,
) -> SAE:
    """Trains one SAE on a store and returns it; `options` are those of RunOptions.

    With `stream` (text and how it is read) and `model` (what `load_model` takes; None = `stream.stream`) activations are
    computed on the way, in the order of a store read by whole sequences, and nothing but the SAE is written.

    `out` absent or empty: a run begins; an unfinished run of the same options and store: it continues. Anything else is
    refused with a SaekitError, before the first step.
    """
    options, out = RunOptions(**options), Path(out)
    return Run(variant, open_source(store, stream, out, options, model), out, options).train()


def open_source(
    store: RowSource | str | Path | None, stream: StreamOptions | None, out: Path, options: RunOptions, model=None
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
    if out.exists():
        refuse_foreign_run(out)
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


class Run:
    """One run: what was resolved before step 0, and the loop."""

    def __init__(self, variant: Variant, store: RowSource, out: Path, options: RunOptions):
        self.store, self.out, self.options = store, out, options
        self.site = only_site(store) if options.site is None else options.site
        D = store.d(self.site)
        F = variant.d_sae or 16 * D
        variant.check(F)
        self.d_sae = F
        self.variant = dataclasses.replace(variant, d_sae=F)
        rows = len(store.valid_rows([self.site], split=options.split, outliers=options.outliers))
        wanted = options.tokens if options.tokens is not None else options.epochs * rows
        if wanted > options.epochs * rows:
            epochs = -(-wanted // max(1, rows))
            raise SaekitError(
                f"run needs {wanted:,} rows, the {'training part' if options.split == 'train' else 'whole'} of {store.path} "
                f"has {rows:,}; pass --epochs {epochs} or collect more"
            )
        self.steps = wanted // options.batch
        if self.steps < 1:
            raise SaekitError(
                f"one step needs --batch {options.batch:,} rows, the run has {wanted:,}; lower --batch or collect more"
            )
        statistics = store.statistics(self.site, options.statistics_rows)
        self.statistics = InputStatistics(torch.from_numpy(statistics.mean_D.copy()), statistics.total_variance)
        self.checkpoint_every = options.checkpoint_every or max(200, self.steps // 20)

    def plan(self) -> str:
        """What will be done, said before it starts."""
        D, F = self.store.d(self.site), self.d_sae
        parameters = 2 * F * D + F + D
        return (
            f"{self.variant.name} on {self.site}: {F:,} features of width {D}, {parameters:,} parameters "
            f"({parameters * 16 / 2**20:,.0f} MiB with gradients and Adam) · {self.steps:,} steps of {self.options.batch:,} tokens"
        )

    def summary(self) -> str:
        """One sentence at the end, from the last line of metrics.jsonl."""
        last = json.loads((self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        dead_after = json.loads((self.out / "run.json").read_text(encoding="utf-8"))["computed"]["dead_after"]
        return (
            f"FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}, {last['dead']:,} of {self.variant.d_sae:,} features silent for "
            f"{dead_after:,} tokens (training rows; saekit evaluate {self.out} measures held-out ones)"
        )

    def train(self) -> SAE:
        with claimed(self.out):
            if self._begin():
                # another number of threads sums in another order: the first start decides
                first = json.loads((self.out / "run.json").read_text(encoding="utf-8"))
                torch.set_num_threads(first["environment"]["threads"])
            Progress.say(self.plan())
            trainer = Trainer(
                self.variant,
                self.store.d(self.site),
                statistics=self.statistics,
                tokens=self.steps * self.options.batch,
                fit_rows=self._fit_rows() if self.variant.enc_init == "fit" else None,
                seed=self.options.seed,
                device=self.options.device,
                compute=self.options.compute,
            )
            select = next(c for c in explain(trainer.device.type) if c.op.startswith("encode_select"))
            Progress.say(
                f"device {trainer.device} · {trainer.compute} ({trainer.compute_reason}) · kernels: {select.path} ({select.reason})"
            )
            self._write_run_json(trainer)
            return self._loop(trainer)

    def _begin(self) -> bool:
        """Whether an unfinished run continues; refuses a folder that is something else."""
        refuse_foreign_run(self.out)
        path = self.out / "run.json"
        if not path.is_file():
            return False
        first = json.loads(path.read_text())
        now = self._identity()
        for key in now:
            was = first["identity"].get(key)
            if was != now[key]:
                raise SaekitError(
                    f"{self.out} was begun with {key} {was}, now {now[key]}; use the first options or a new --out"
                )
        return True

    def _identity(self) -> dict:
        """Everything that decides the result, flat, so that a refusal can name one field."""
        run = {k: v for k, v in dataclasses.asdict(self.options).items() if k not in FREE_OPTIONS}
        own = dataclasses.asdict(self.variant)
        environment = {"torch": torch.__version__, "machine": platform.machine()}
        if not torch.cuda.is_available():
            environment["capability"] = torch.backends.cpu.get_cpu_capability()
        options = {f"--{k.replace('_', '-')}": v for k, v in {**run, **own}.items()}
        return {"variant": self.variant.name, **options, "store": self.store.fingerprint, **environment}

    def _write_run_json(self, trainer: Trainer):
        path = self.out / "run.json"
        if path.is_file():
            return
        run = {
            "format": "saekit-run",
            "format_version": 1,
            "saekit_version": saekit.__version__,
            "identity": self._identity(),
            "options": dataclasses.asdict(self.options),
            "variant": {"name": self.variant.name, **dataclasses.asdict(self.variant)},
            "computed": {
                "site": self.site,
                "steps": self.steps,
                "d_model": trainer.d_model,
                "dead_after": trainer.dead_after,
                "input_scale": trainer.scale,
                "checkpoint_every": self.checkpoint_every,
            },
            "store": {
                "path": str(self.store.path),
                "absolute": str(Path(self.store.path).resolve()),
                "fingerprint": self.store.fingerprint,
                "streamed": not isinstance(self.store, Store),
            },
            "environment": {
                "device": str(trainer.device),
                "compute": trainer.compute,
                "compute_reason": trainer.compute_reason,
                "threads": torch.get_num_threads(),
                "kernels": {c.op: f"{c.path}: {c.reason}" for c in explain(trainer.device.type)},
            },
        }
        atomic_write(path, pretty_json(run))

    def _fit_rows(self) -> torch.Tensor:
        """The first rows of epoch 0, read by a reader of their own: training's place in the data does not move."""
        rows = []
        for batch in self._batches():
            rows.append(batch[self.site].float())
            if sum(map(len, rows)) >= FIT_ROWS:
                break
        return torch.cat(rows)

    def _batches(self, state: dict | None = None):
        o = self.options
        return self.store.batches(
            [self.site],
            batch=o.batch,
            seed=o.seed,
            epochs=o.epochs,
            split=o.split,
            ram=o.ram,
            block=o.block,
            outliers=o.outliers,
            state=state,
        )

    def _loop(self, trainer: Trainer) -> SAE:
        options = self.options
        state = self._restore(trainer)
        seconds_before = state["seconds"]
        metrics = self.out / "metrics.jsonl"
        cut_back(metrics, trainer.step_count)
        batches = self._batches(state["reader"])
        start, waited, waited_at_log, time_at_log = time.monotonic(), 0.0, 0.0, time.monotonic()
        tokens_at_log = trainer.step_count * options.batch

        def checkpoint():
            trainer.raise_if_bad()
            state = {"reader": batches.state(), "seconds": seconds_before + time.monotonic() - start}
            save_checkpoint(self.out, trainer, self._config(trainer), state)

        with (
            Progress("train", self.steps * options.batch, "tokens") as progress,
            open(metrics, "a", encoding="utf-8") as log,
            Stop() as stop,
        ):
            progress.done = trainer.step_count * options.batch
            stream = iter(batches)
            while trainer.step_count < self.steps:
                batch = next(stream)
                waited += batch.wait
                trainer.step(batch[self.site])
                done = trainer.step_count
                if done == 1 or done % options.log_every == 0 or done == self.steps:
                    now = time.monotonic()
                    values = trainer.log()
                    line = {
                        "step": done,
                        "tokens": done * options.batch,
                        "seconds": round(seconds_before + now - start, 3),
                        **values,
                        "data_wait": round((waited - waited_at_log) / max(1e-9, now - time_at_log), 5),
                        "tokens_per_s": round((done * options.batch - tokens_at_log) / max(1e-9, now - time_at_log), 1),
                    }
                    log.write(json.dumps(line, allow_nan=False) + "\n")
                    log.flush()
                    waited_at_log, time_at_log, tokens_at_log = waited, now, done * options.batch
                    note = (
                        f"loss {values['loss']:.3f} · FVU {values['fvu']:.3f} · L0 {values['l0']:.1f} · dead {values['dead']:,} "
                        f"({trainer.dead_after / 1e6:.2g} M tokens) · data wait {100 * line['data_wait']:.1f} %"
                    )
                else:
                    note = ""
                progress.advance(options.batch, note)
                if done == self.steps or done % self.checkpoint_every == 0 or stop.signal:
                    checkpoint()
                if stop.signal and done < self.steps:
                    stop.leave(f"stopped after step {done:,} of {self.steps:,}, saved; the same command continues")

        sae = trainer.sae(self._config(trainer))
        sae.save(self.out)
        return sae

    def _restore(self, trainer: Trainer) -> dict:
        """Puts the trainer where the last whole checkpoint left it; a damaged one is named and the one before it used."""
        problem = None
        for folder in reversed(checkpoints(self.out)):
            try:
                state = restore_checkpoint(folder, trainer)
            except SaekitError as error:
                problem = error
                Progress.say(str(error))
                continue
            Progress.say(f"continues after step {trainer.step_count:,}")
            return state
        if problem is not None:
            raise problem
        return {"reader": None, "seconds": 0.0}

    def _config(self, trainer: Trainer) -> dict:
        """The parts of config.json that the run knows: where the SAE belongs and where it comes from."""
        manifest = self.store.manifest
        model = manifest["model"]
        tokenizer = manifest.get("tokenizer")
        special = manifest["special_tokens"]
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
                "store": self.store.fingerprint,
                "rows_seen": trainer.step_count * self.options.batch,
                "split": self.options.split,
                "seed": self.options.seed,
                "training": {
                    **{k: v for k, v in dataclasses.asdict(self.variant).items() if k != "d_sae"},
                    "lr": trainer.lr,
                    "batch": self.options.batch,
                    "steps": self.steps,
                    "dead_after": trainer.dead_after,
                    "normalise": self.variant.normalise,
                    "input_scale": trainer.scale,
                    "compute": trainer.compute,
                },
                "converted_from": None,
                "lost": [],
            },
        }


def cut_back(metrics: Path, step: int):
    """Drops the lines of metrics.jsonl after `step`, and a torn last line."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line + "\n")
    atomic_write(metrics, "".join(kept).encode())


LOCK = ".lock"


def refuse_foreign_run(out: Path):
    """SaekitError if the folder is neither empty nor an unfinished run."""
    if (out / CONFIG).is_file():
        raise SaekitError(f"{out} is a finished run; choose another --out")
    if not (out / "run.json").is_file() and any(p.name not in (LOCK, "stream") for p in out.iterdir()):
        raise SaekitError(f"{out} is not empty and not a run; choose another --out")


@contextmanager
def claimed(out: Path):
    """An advisory lock on the run's folder, held to the end; a folder that this call made and left empty is removed."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = take_lock(out / LOCK, out)
    except OSError as error:
        raise SaekitError(f"cannot write to {out}: {error.strerror.lower() if error.strerror else error}") from None
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        handle.close()
        if made and not any(out.iterdir()):
            out.rmdir()
