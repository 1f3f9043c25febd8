"""What a run would take: memory, disk, rows, and time as measured on a few steps. Nothing is written.

print(dry_run(sk.TopK(k=32), store, out="saes/gpt2-topk"))
"""

import dataclasses
import tempfile
import time
import warnings
from pathlib import Path

import torch

from saekit.agreement import built, decided
from saekit.checkpoint import checkpoint_bytes
from saekit.config import RunOptions, StreamOptions
from saekit.plan import Learner, Plan
from saekit.progress import duration
from saekit.run import Several, opened
from saekit.run_folder import state_of
from saekit.store.format import human_bytes
from saekit.store.rows import PARTS, RowSource
from saekit.variants import Variant

STEPS = 5


def dry_run(
    variant: Variant | Several,
    store: RowSource | str | Path | None = None,
    *,
    out: str | Path,
    stream: StreamOptions | None = None,
    model=None,
    **options,
) -> str:
    """A table of what `train` with the same arguments would take, per SAE and in all. Raises what `train` would refuse.

    A stream is read in windows of about one batch: the time of a step then has its share of the language model in it.
    """
    settings = RunOptions(**options)
    streamed = store is None and (stream is not None or model is not None)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # of small windows, which are meant here
        warnings.simplefilter("ignore")
        if streamed:
            rows = (STEPS + 1) * settings.batch
            options = {**options, "statistics_rows": min(settings.statistics_rows or rows, rows)}
        scratched = Path(scratch) if streamed else None
        with opened(variant, store, Path(out), RunOptions(**options), stream, model, scratched) as run:
            if streamed:
                window = settings.batch * run.plan.source.row_bytes(run.plan.site)
                run.plan.options = dataclasses.replace(run.plan.options, ram=str(window))
            else:
                decided(run.ranks, run.begin)
            jobs = [job for job in run.plan.jobs if state_of(job.out) != "finished"]
            learners = [built(run.ranks, lambda job=job: run.plan.learner(job)) for job in jobs]
            return _table(run.plan, learners, *_measure(run.plan, learners)) if learners else "every SAE is finished"


def _measure(plan: Plan, learners: list[Learner]) -> tuple[list[float], float, int]:
    """Seconds per step of each Trainer, seconds of reading, and how many steps these are means of."""

    def now() -> float:
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        return time.monotonic()

    batches = plan.batches(device=plan.device, rank=plan.ranks.rank, ranks=plan.ranks.size)
    seconds, reading, steps, before = [0.0] * len(learners), 0.0, 0, now()
    for number, batch in zip(range(min(STEPS + 1, plan.steps)), batches):
        waited = now() - before
        for i, learner in enumerate(learners):
            before = now()
            learner.trainer.step(batch[plan.site])
            # buffers are made in the first step, which counts only where there is no other
            if number or plan.steps == 1:
                seconds[i] += now() - before
        if number or plan.steps == 1:
            reading, steps = reading + waited, steps + 1
        before = now()
    return [s / steps for s in seconds], reading / steps, steps


def _table(plan: Plan, learners: list[Learner], seconds: list[float], reading: float, measured: int) -> str:
    lines: list[tuple[str, ...]] = [("", "features", "parameters", "memory", "checkpoint", "on disk", "s/step")]
    total = [0, 0, 0, 0]
    for learner, s in zip(learners, seconds):
        held, size = sum(learner.trainer.nbytes().values()), checkpoint_bytes(learner.trainer)
        disk = plan.kept * size + learner.trainer.nbytes()["weights"]
        total = [a + b for a, b in zip(total, (learner.parameters, held, size, disk))]
        lines.append(
            (
                learner.job.out.name,
                f"{learner.trainer.d_sae:,}",
                f"{learner.parameters:,}",
                *map(human_bytes, (held, size, disk)),
                f"{s:.4f}",
            )
        )
    if len(learners) > 1:
        lines.append(("all", "", f"{total[0]:,}", *map(human_bytes, total[1:]), f"{sum(seconds):.4f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]
    step, o = sum(seconds) + reading, plan.options
    times = f" × {o.epochs} epochs" if o.epochs > 1 else ""
    return "\n".join(
        [
            *table,
            f"{plan.steps:,} steps of {o.batch:,} tokens: {plan.steps * o.batch:,} rows needed, {PARTS[o.split]} of "
            f"{plan.source.path} has {plan.rows:,}{times}",
            f"{step:.4f} s per step, {reading:.4f} s of it waiting for rows ({measured} steps measured on {plan.device}): "
            f"{duration(step * plan.steps)}",
        ]
    )
