"""The folder of a run: whose it is, what was asked for, what may continue.

    saes/gpt2-topk/   run.json       options, computed values, the store, the environment; written first
                      metrics.jsonl  while training
                      checkpoints/   (saekit/checkpoint.py)
                      sae.safetensors, config.json   at the end; without config.json the run is unfinished

An advisory lock keeps a second writer out.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch

import saekit
from saekit.checkpoint import unwritten
from saekit.config import RunOptions
from saekit.errors import SaekitError
from saekit.provenance import short
from saekit.ranks import Ranks
from saekit.sae import CONFIG
from saekit.store.format import atomic_write, canonical_json, pretty_json, take_lock
from saekit.variants import Variant
from saekit.variants.files import variant_file

RUN, METRICS, LOCK = "run.json", "metrics.jsonl", ".lock"
# what a run that was killed may leave before it has its run.json
BEFORE = (LOCK, f"{RUN}.tmp", "stream")
# what cannot change the result may differ when a run continues
FREE_OPTIONS = ("log_every", "checkpoint_every", "keep", "accept_environment", "tensorboard", "wandb")

State = Literal["new", "unfinished", "finished"]


# Whose folder it is


def state_of(out: Path) -> State:
    """SaekitError if the folder is neither empty nor a run."""
    if (out / CONFIG).is_file():
        return "finished"
    if (out / RUN).is_file():
        return "unfinished"
    if out.exists() and (not out.is_dir() or any(p.name not in BEFORE for p in out.iterdir())):
        raise SaekitError(f"{out} is not empty and not a run; choose another --out")
    return "new"


@contextmanager
def claimed(folders: Sequence[Path]) -> Iterator[None]:
    """Advisory locks on the folders of runs, held to the end; a folder that this call made and left empty is removed."""
    with ExitStack() as stack:
        for out in folders:
            stack.enter_context(_claimed(out))
        yield


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    made = [p for p in (out, out.parent) if not p.exists()]
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
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()


# What was asked for


def identity_of(variant: Variant, options: RunOptions, store: str) -> dict:
    """Everything asked for that decides the result, flat, so that a refusal can name one field."""
    run = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE_OPTIONS}
    own = {f"--{k.replace('_', '-')}": v for k, v in {**run, **dataclasses.asdict(variant)}.items()}
    file = variant_file(type(variant))
    source = {"--variant-file": f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"} if file else {}
    return json.loads(canonical_json({"variant": variant.name, **own, **source, "store": store}))


def environment_of(device: torch.device, ranks: Ranks) -> dict:
    """What may change the last bits of the result."""
    environment = {"saekit": saekit.__version__, "torch": torch.__version__, "machine": platform.machine()}
    if device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(device)
    else:
        environment |= {"device": device.type, "capability": torch.backends.cpu.get_cpu_capability()}
    return {**environment, "ranks": ranks.size}


def read_run(out: Path) -> dict:
    """`run.json`. SaekitError if it cannot be read."""
    try:
        run = json.loads((out / RUN).read_text(encoding="utf-8"))
        if run["format"] != "saekit-run":
            raise ValueError("format is not saekit-run")
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaekitError(f"{out / RUN} cannot be read ({error}); restore it or choose another --out") from None


def write_run(out: Path, run: dict):
    atomic_write(out / RUN, pretty_json(run))


def refuse_other(out: Path, run: dict, identity: dict, finished: bool = False):
    """SaekitError naming the first option in which the run in `out` differs from what is asked for now."""
    was = run["identity"]
    for key in {**identity, **was}:
        if was.get(key) != identity.get(key):
            before, now = (_said(values.get(key)) for values in (was, identity))
            done, remedy = ("trained", "another name") if finished else ("begun", "the first options")
            raise SaekitError(f"{out} was {done} with {key} {before}, now {now}; use {remedy} or a new --out")


def refuse_environment(out: Path, run: dict, environment: dict):
    """SaekitError naming the first part of the environment that is not the one `out` was written in last."""
    was = run["environments"][-1]
    for key in environment:
        if was.get(key) != environment[key]:
            raise SaekitError(
                f"{out} was begun with {key} {was.get(key)}, now {environment[key]}; pass --accept-environment to go on "
                "without equality to the last bit, or use a new --out"
            )


def note_environment(out: Path, run: dict, environment: dict, step: int):
    """Records that the steps behind `step` are made in `environment`, where that is another one than before."""
    # steps that an earlier start made after its last checkpoint are made again
    kept = [entry for entry in run["environments"] if entry["from_step"] < step]
    if not kept or {k: v for k, v in kept[-1].items() if k != "from_step"} != environment:
        kept.append({"from_step": step, **environment})
    if kept != run["environments"]:
        write_run(out, {**run, "environments": kept})


def _said(value) -> str:
    if isinstance(value, str) and value.startswith("sha256:"):
        return short(value)
    return "left out" if value is None else str(value)


# The log


def append(out: Path, line: dict):
    """A line of metrics.jsonl. SaekitError if it cannot be written."""
    text = json.dumps(line, allow_nan=False) + "\n"
    try:
        with open(out / METRICS, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise unwritten(out, error, len(text)) from error


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


def summary(out: Path) -> str:
    """One sentence about a finished run, from the last line of metrics.jsonl; a second one if L0 is not what was asked for."""
    last, run = json.loads((out / METRICS).read_text(encoding="utf-8").splitlines()[-1]), read_run(out)
    text = (
        f"FVU {last['fvu']:.3f}, L0 {last['l0']:.1f}, {last['dead']:,} of {run['variant']['d_sae']:,} features silent for "
        f"{run['computed']['dead_after']:,} tokens (training rows; saekit evaluate {out} measures held-out ones)"
    )
    missed = off_target(run["variant"], last["l0"])
    return f"{text}. {missed}" if missed else text


def off_target(variant: dict, l0: float) -> str | None:
    """A sentence if L0 is more than 10 % off what the options of a variant aim at."""
    # a penalty set by hand aims at nothing
    target = variant.get("k", variant.get("l0") if variant.get("l1") is None else None)
    if target is None or abs(l0 - target) <= 0.1 * target:
        return None
    direction = "above" if l0 > target else "below"
    return f"L0 is {100 * abs(l0 / target - 1):.0f} % {direction} its target of {target:g}"
