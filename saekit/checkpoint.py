"""Checkpoints: save, find, load. A checkpoint is a complete SAE of its step beside the state that continues the run.

    checkpoints/step-00012000/   config.json  sae.safetensors  state.safetensors  state.json

Each is written to a temporary folder, synced and renamed; only then is an old one deleted.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from saekit.errors import SaekitError
from saekit.store.format import atomic_write, canonical_json, human_bytes, map_tensors, sync_folder, write_tensors
from saekit.trainer import Trainer

KEEP = 2


def save_checkpoint(run: Path, trainer: Trainer, config: dict, state: dict, keep: Literal[2, "all"] = KEEP) -> Path:
    """Writes the checkpoint of the trainer's present step; keeps the last two, or all.

    Raises SaekitError if it cannot be written, such as on a full disk; the checkpoints before it stay as they are.
    """
    folder = run / "checkpoints" / f"step-{trainer.step_count:08d}"
    partial = folder.with_name(folder.name + ".partial")
    tensors, values = trainer.state()
    try:
        for left in folder.parent.glob("*.partial"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        write_tensors(partial / "state.safetensors", {name: t.detach().cpu().numpy() for name, t in tensors.items()})
        atomic_write(partial / "state.json", canonical_json({"trainer": values, **state}) + b"\n")
        trainer.sae(config).save(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise unwritten(run, error, checkpoint_bytes(trainer)) from error
    if keep != "all":
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-????????") if (p / "config.json").is_file())


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def restore_checkpoint(folder: Path, trainer: Trainer) -> dict:
    """Puts the trainer where it was; returns the rest of the state. SaekitError names a damaged checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = {k: torch.from_numpy(v.copy()) for k, v in map_tensors(folder / "state.safetensors").items()}
        trainer.restore(tensors, state.pop("trainer"))
    except (OSError, ValueError, KeyError, RuntimeError, SaekitError) as error:
        raise SaekitError(f"checkpoint {folder} is damaged ({error})") from None
    return state


def checkpoint_bytes(trainer: Trainer) -> int:
    """Size of a checkpoint: the state, and the SAE beside it."""
    return sum(t.nbytes for t in trainer.state()[0].values()) + trainer.nbytes()["weights"]


def unwritten(run: Path, error: OSError, needed: int) -> SaekitError:
    """What to say when `needed` bytes could not be written into the folder of a run."""
    reason = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(run).free
        missing = human_bytes(max(needed - free, needed // 100))
        reason = f"disk full, {human_bytes(needed)} wanted, {human_bytes(free)} free: free {missing}"
    else:
        reason = f"cannot write: {reason}; mend it"
    found = checkpoints(run)
    where = f"after step {step_of(found[-1]):,}, the last checkpoint" if found else "from the beginning"
    return SaekitError(f"{run}: {reason}; the same command then continues {where}")
