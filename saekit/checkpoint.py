"""Checkpoints: save, find, load. A checkpoint is a complete SAE of its step beside the state that continues the run.

    checkpoints/step-00012000/   config.json  sae.safetensors  state.safetensors  state.json

Each is written to a temporary folder and renamed; only then is an old one deleted.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from saekit.errors import SaekitError
from saekit.store.format import canonical_json, map_tensors, write_tensors
from saekit.trainer import Trainer

KEEP = 2


def save_checkpoint(run: Path, trainer: Trainer, config: dict, state: dict) -> Path:
    """Writes the checkpoint of the trainer's present step; keeps the last two."""
    folder = run / "checkpoints" / f"step-{trainer.step_count:08d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors, values = trainer.state()
    write_tensors(partial / "state.safetensors", {name: t.detach().cpu().numpy() for name, t in tensors.items()})
    (partial / "state.json").write_bytes(canonical_json({"trainer": values, **state}) + b"\n")
    trainer.sae(config).save(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    for old in checkpoints(run)[:-KEEP]:
        shutil.rmtree(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-????????") if (p / "config.json").is_file())


def restore_checkpoint(folder: Path, trainer: Trainer) -> dict:
    """Puts the trainer where it was; returns the rest of the state. SaekitError names a damaged checkpoint."""
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = {k: torch.from_numpy(v.copy()) for k, v in map_tensors(folder / "state.safetensors").items()}
        trainer.restore(tensors, state.pop("trainer"))
    except (OSError, ValueError, KeyError, RuntimeError, SaekitError) as error:
        raise SaekitError(f"checkpoint {folder} is damaged ({error})") from None
    return state
