"""The one training loop: a store or a stream, a list of Trainers, schedule, checkpoints, log.

    sae  = sk.train(sk.TopK(k=32), store, out="saes/gpt2-topk")
    saes = sk.train([sk.TopK(k=16), sk.TopK(k=32)], store, out="saes/")     # one pass over the rows feeds both

1. Everything that can be refused is refused before the first step; one process of torchrun decides, the others follow.
2. SAEs that are begun and have a checkpoint of the same step go on together; what is new begins when they are done.
3. Each batch goes to every Trainer of the pass; log lines and checkpoints are each SAE's own.
4. At the end of a pass: calibration on the first rows of the order, folding, `sae.safetensors`, `config.json`.

So each SAE is the one that it would be alone, to the byte, and the same call continues whatever was cut off.

B tokens in a batch · D model width · F features
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, overload

import torch
from saekit_kernels import explain

from saekit.agreement import agreed, built, decided, leave, refuse
from saekit.checkpoint import checkpoints, restore_checkpoint, save_checkpoint, step_of, unwritten
from saekit.config import RunOptions, StreamOptions
from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.plan import Job, Learner, Plan, check_disk, open_source
from saekit.progress import Progress
from saekit.ranks import joined_ranks
from saekit.run_folder import (
    METRICS,
    RUN,
    append,
    claimed,
    cut_back,
    note_environment,
    read_run,
    refuse_environment,
    refuse_other,
    state_of,
    write_run,
)
from saekit.sae import SAE
from saekit.store import Store
from saekit.store.format import human_bytes
from saekit.store.rows import RowSource
from saekit.sweep import check_name, named
from saekit.tracking import followed, require_packages
from saekit.trainer import Trainer
from saekit.variants import Variant

T = TypeVar("T")
MEASURES = ("fvu", "l0", "dead", "lr", "grad_norm", "budget_unspent")
"""Keys of metrics.jsonl that every variant has, beside the loss and its parts."""
Several = Sequence[Variant] | Mapping[str, Variant]


@overload
def train(
    variant: Variant,
    store: RowSource | str | Path | None = None,
    *,
    out: str | Path,
    stream: StreamOptions | None = None,
    model=None,
    **options,
) -> SAE: ...


@overload
def train(
    variant: Several,
    store: RowSource | str | Path | None = None,
    *,
    out: str | Path,
    stream: StreamOptions | None = None,
    model=None,
    **options,
) -> list[SAE]: ...


def train(variant, store=None, *, out, stream=None, model=None, **options):
    """Trains one SAE on a store and returns it, or several in one pass and returns a list.

    Args:
        variant: One variant; or a list, whose folders in `out` are named after the variant and the fields that differ
            (`topk-k16`); or a dict of name → variant.
        store: A store or its folder. With `stream` (text and how it is read) and `model` (what `load_model` takes; None =
            `stream.stream`) activations are computed on the way, in the order of a store read by whole sequences, and
            nothing but the SAE is written.
        out: Folder of the SAE, or of several. Absent or empty: a run begins; an unfinished run of the same options, store and
            environment: it continues. Of several, those that are finished are left alone.
        options: Those of RunOptions.

    Raises:
        SaekitError: before the first step, for what cannot work; later for a loss that is not finite (of several SAEs the
            others are finished first), a full disk, a lost process.
        KeyboardInterrupt, Terminated: Ctrl-C and SIGTERM, after the step in hand and a checkpoint.
    """
    with opened(variant, store, Path(out), RunOptions(**options), stream, model) as run:
        saes = run.train()
    return saes[0] if isinstance(variant, Variant) else saes


@contextmanager
def opened(
    variant: Variant | Several,
    store: RowSource | str | Path | None,
    out: Path,
    options: RunOptions,
    stream: StreamOptions | None = None,
    model=None,
    scratch: Path | None = None,
) -> Iterator["Run"]:
    """The run of these arguments, among the processes of torchrun. What a stream keeps goes to `scratch`, None = `out`."""
    with joined_ranks() as ranks:

        def resolve() -> Plan:
            variants = folders_of(variant, out)
            require_packages(tensorboard=options.tensorboard, wandb=options.wandb)
            return Plan(variants, open_source(store, stream, scratch or out, options, model, ranks), options, ranks)

        yield Run(built(ranks, resolve))


def folders_of(variant: Variant | Several, out: Path) -> dict[Path, Variant]:
    """The SAEs by their folders. Refuses folders that hold something else, or a finished run where it is the only one."""
    if isinstance(variant, Variant):
        if state_of(out) == "finished":
            raise SaekitError(f"{out} is a finished run; choose another --out")
        return {out: variant}
    if (out / RUN).is_file():
        raise SaekitError(f"{out} is a run, not a folder for several; choose another --out")
    names = variant if isinstance(variant, Mapping) else named(variant)
    for name in names:
        check_name(name)
        state_of(out / name)
    return {out / name: one for name, one in names.items()}


class Run:
    """Passes over the rows until every SAE of a plan is finished."""

    def __init__(self, plan: Plan):
        self.plan, self.options, self.ranks = plan, plan.options, plan.ranks
        self.saes: dict[Path, SAE] = {}
        """Finished by this process."""
        self.failed: dict[Path, str] = {}
        """Why an SAE ended early."""

    def train(self) -> list[SAE]:
        plan, ranks = self.plan, self.ranks
        with ExitStack() as locks:
            finished, threads = decided(ranks, lambda: self.begin(locks))
            pending = []
            for job, done in zip(plan.jobs, finished):
                if done:
                    Progress.say(f"{job.out} is finished")
                else:
                    pending.append(job)
            with _threads(threads):
                while pending:
                    learners, reader = self._next_pass(pending)
                    done = [learner.job for learner in learners]
                    pending = [job for job in pending if job not in done]
                    self._pass(learners, reader, threads)
            if self.failed:
                said = "; ".join(f"{out}: {why}" for out, why in self.failed.items())
                refuse(ranks, f"{len(self.failed)} of {len(plan.jobs)} SAEs ended early: {said}")
            ranks.barrier()
        return [self.saes.get(job.out) or SAE.load(job.out, str(plan.device)) for job in plan.jobs]

    def begin(self, locks: ExitStack | None = None) -> tuple[list[bool], int]:
        """Which SAEs are finished, and the threads of a process; refuses a folder that is something else, or is in use."""
        if locks is not None:
            locks.enter_context(claimed([job.out for job in self.plan.jobs if state_of(job.out) != "finished"]))
        finished, threads = [], None
        for job in self.plan.jobs:
            state = state_of(job.out)
            if state != "new":
                run = read_run(job.out)
                refuse_other(job.out, run, self.plan.identity(job), state == "finished")
                if state == "unfinished" and not self.options.accept_environment:
                    refuse_environment(job.out, run, self.plan.environment)
                # another number of threads sums in another order: the first start decides
                threads = threads or run["environment"]["threads"]
            finished.append(state == "finished")
        if threads is None and self.ranks.size > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // self.ranks.local_size)
        return finished, threads or torch.get_num_threads()

    def _next_pass(self, pending: list[Job]) -> tuple[list[Learner], dict | None]:
        """What learns next, restored to a step of which each has a checkpoint, and the reader's state there.

        Those that have no checkpoint wait until the others are finished. A damaged checkpoint is named, and one before it used.
        """
        made: dict[Path, Learner] = {}
        damaged: dict[Path, str] = {}
        while True:
            group, step = decided(self.ranks, lambda: together([job.out for job in pending], damaged))
            for job in pending:
                if job.out in group and job.out not in made:
                    made[job.out] = built(self.ranks, lambda job=job: self.plan.learner(job))
            learners = [made[out] for out in group]
            if step is None:
                return learners, None
            state = {}
            for learner in learners:
                folder = next(p for p in checkpoints(learner.job.out) if step_of(p) == step)
                problem = None
                try:
                    state = restore_checkpoint(folder, learner.trainer)
                    learner.seconds, learner.sound = state["seconds"], step
                except SaekitError as error:
                    problem = str(error)
                if problem := next(filter(None, self.ranks.gather(problem)), None):
                    Progress.say(problem)
                    damaged[folder] = problem
                    break
            else:
                Progress.say(f"continues after step {step:,}")
                return learners, state["reader"]

    def _pass(self, learners: list[Learner], reader: dict | None, threads: int):
        """The steps that are left for these, then what ends each of them."""
        self._say(learners)
        decided(self.ranks, lambda: self._write_runs(learners, threads))
        with ExitStack() as stack:
            if self.ranks.rank == 0:
                folders = [learner.job.out for learner in learners]
                stack.enter_context(followed(folders, tensorboard=self.options.tensorboard, wandb=self.options.wandb))
            self._loop(learners, reader)
            for learner in learners:
                decided(self.ranks, lambda learner=learner: self._finish(learner))

    def _say(self, learners: list[Learner]):
        """What will be done, before it starts."""
        plan = self.plan
        for learner in learners:
            job, trainer = learner.job, learner.trainer
            bytes_of = trainer.nbytes()
            name = f"{job.out.name}: " if len(plan.jobs) > 1 else ""
            Progress.say(
                f"{name}{job.variant.name} on {plan.site}: {trainer.d_sae:,} features of width {trainer.d_model}, "
                f"{learner.parameters:,} parameters ({human_bytes(sum(bytes_of.values()))} with {'gradients and Adam' if bytes_of['gradients'] else 'Adam'})"
            )
        unread = plan.rows_wanted - plan.steps * self.options.batch
        Progress.say(
            f"{plan.steps:,} steps of {self.options.batch:,} tokens"
            + (f"; the last {unread:,} rows are less than a batch and stay unread" if unread else "")
        )
        trainer = learners[0].trainer
        select = next(c for c in explain(trainer.device.type) if c.op.startswith("encode_select"))
        Progress.say(
            f"device {trainer.device} · {trainer.compute} ({trainer.compute_reason}) · kernels: {select.path} ({select.reason})"
        )

    # By the first process alone

    def _write_runs(self, learners: list[Learner], threads: int):
        """Room on the disk, run.json, and a log that ends where the Trainer stands."""
        plan = self.plan
        check_disk(learners[0].job.out.parent, sum(plan.disk_bytes(learner) for learner in learners))
        for learner in learners:
            out, step = learner.job.out, learner.trainer.step_count
            if state_of(out) == "new":
                write_run(out, plan.run_json(learner, threads))
            note_environment(out, read_run(out), plan.environment, step)
            cut_back(out / METRICS, step)

    def _finish(self, learner: Learner):
        out = learner.job.out
        sae = learner.trainer.finish(self.plan.config(learner), self.plan.first_rows)
        try:
            sae.save(out)
        except OSError as error:
            raise unwritten(out, error, learner.trainer.nbytes()["weights"]) from error
        self.saes[out] = sae

    # The loop

    def _loop(self, learners: list[Learner], reader: dict | None):
        """Steps to the end for all of `learners`; one whose numbers are no longer finite is taken out of the list."""
        plan, o, ranks = self.plan, self.options, self.ranks
        step = learners[0].trainer.step_count
        batches = plan.batches(reader, device=plan.device, rank=ranks.rank, ranks=ranks.size)
        clock = Clock(step * o.batch)
        # tokens of this start: speed and time left are its own
        with Progress("train", (plan.steps - step) * o.batch, "tokens") as progress, Stop() as stop:
            stream = iter(batches)
            while step < plan.steps and learners:
                batch = next(stream)
                clock.waited += batch.wait
                for learner in learners:
                    learner.trainer.step(batch[plan.site])
                step += 1
                note = ""
                if step == 1 or step % o.log_every == 0 or step == plan.steps:
                    note = self._log(learners, step, clock)
                progress.advance(o.batch, note)
                stop.signal = agreed(ranks, stop.signal)
                if step == plan.steps or step % plan.checkpoint_every == 0 or stop.signal:
                    self._checkpoint(learners, step, batches.state(), clock)
                if stop.signal:
                    leave(
                        ranks, stop, f"stopped after step {step:,} of {plan.steps:,}, saved; the same command continues"
                    )

    def _log(self, learners: list[Learner], step: int, clock: "Clock") -> str:
        """One line of each SAE's metrics.jsonl; returns what the progress line says."""
        found, speed = self._of_sound(learners, step, Trainer.log), clock.lap(step * self.options.batch)
        for learner, values in found:
            line = {
                "step": step,
                "tokens": step * self.options.batch,
                "seconds": round(learner.seconds + clock.seconds(), 3),
                **in_order(values, learner.trainer.variant.logged, speed),
            }
            if self.ranks.rank == 0:
                append(learner.job.out, line)
        wait = f"data wait {100 * speed['data_wait']:.1f} %"
        at = f"step {step:,} of {self.plan.steps:,}"
        if len(found) == 1:
            ((learner, v),) = found
            return (
                f"{at} · loss {v['loss']:.3f} · FVU {v['fvu']:.3f} · L0 {v['l0']:.1f} · dead {v['dead']:,} "
                f"({learner.trainer.dead_after / 1e6:.2g} M tokens) · {wait}"
            )
        fvus = [values["fvu"] for _, values in found]
        return f"{at} · {len(found)} SAEs · FVU {min(fvus):.3f} to {max(fvus):.3f} · {wait}" if fvus else at

    def _checkpoint(self, learners: list[Learner], step: int, reader: dict, clock: "Clock"):
        for learner, _ in self._of_sound(learners, step, Trainer.raise_if_bad):
            state = {"reader": reader, "seconds": learner.seconds + clock.seconds()}

            def save(learner=learner, state=state):
                config = self.plan.config(learner)
                save_checkpoint(learner.job.out, learner.trainer, config, state, self.options.keep)

            decided(self.ranks, save)

    def _of_sound(self, learners: list[Learner], step: int, ask: Callable[[Trainer], T]) -> list[tuple[Learner, T]]:
        """What `ask` gives for each. One that has become non-finite is taken out of `learners`; alone, it ends the run."""
        answers = []
        for learner in list(learners):
            try:
                answers.append((learner, ask(learner.trainer)))
                learner.sound = step
            except SaekitError as error:
                # a lost process raises as well, and once more here
                self.ranks.barrier()
                message = f"{error}{self._suspects(learner.sound, step)}"
                if len(self.plan.jobs) == 1:
                    refuse(self.ranks, message)
                Progress.say(f"{learner.job.out} ends here: {message}")
                self.failed[learner.job.out] = message
                learners.remove(learner)
        return answers

    def _suspects(self, first: int, last: int) -> str:
        """Which rows of steps first + 1 to last are not finite, for the end of a message."""
        source, site = self.plan.source, self.plan.site
        if not isinstance(source, Store):
            return ""
        batches = self.plan.batches()
        batches.done = first
        for batch, _ in zip(batches, range(first, last)):
            bad = batch.rows[~batch[site].isfinite().all(1).numpy()]
            if len(bad):
                rows = ", ".join(f"{row:,}" for row in sorted(bad.tolist())[:4])
                return f"; NaN or infinity in row {rows} of {source.path}: run  saekit check {source.path}"
        return f"; the rows of {source.path} that were read are finite"


def in_order(values: dict, buffers: Sequence[str], speed: dict) -> dict:
    """Values of a log line: the loss and behind it its parts, then measures, speed, and the variant's buffers."""
    measures = [*MEASURES, *(key for key in values if key.startswith("fvu_")), *buffers]
    parts = {key: value for key, value in values.items() if key not in ("loss", *measures)}
    return {"loss": values["loss"], **parts, **{key: values[key] for key in measures if key in values}, **speed}


class Clock:
    """Seconds since the start; waiting and speed since the last line of the log."""

    def __init__(self, tokens: int):
        self.start = time.monotonic()
        self.waited = 0.0
        """Seconds spent waiting for rows."""
        self._last = (self.start, 0.0, tokens)

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def lap(self, tokens: int) -> dict[str, float]:
        (then, waited, before), now = self._last, time.monotonic()
        self._last = (now, self.waited, tokens)
        passed = max(1e-9, now - then)
        return {
            "data_wait": round((self.waited - waited) / passed, 5),
            "tokens_per_s": round((tokens - before) / passed, 1),
        }


def together(folders: list[Path], damaged: Mapping[Path, str]) -> tuple[list[Path], int | None]:
    """Which runs go on together, and from which step: the step of which most have a checkpoint, the latest of these steps. None
    has one: all begin, and the step is None. SaekitError if all checkpoints of a run are damaged."""
    steps = {}
    for out in folders:
        found = checkpoints(out)
        steps[out] = {step_of(folder) for folder in found if folder not in damaged}
        if found and not steps[out]:
            raise SaekitError(damaged[found[0]])
    every = {step for found in steps.values() for step in found}
    if not every:
        return folders, None
    step = max(every, key=lambda step: (sum(step in found for found in steps.values()), step))
    return [out for out in folders if step in steps[out]], step


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
