"""Activations of a finished store, computed again: to restore damaged files, and to see that a store is what it says.

    repaired = repair("acts/gpt2")                       # names of the files that were written again
    problems = recompute("acts/gpt2", sequences=64)      # [] if they are the model's own

A shard is a function of the model, its part of the token table and the settings in the manifest, so a repaired file must
have the checksum that the manifest holds. Where it has not, because this is another processor or version, nothing is
changed.
"""

from pathlib import Path

import numpy as np
import torch

from saekit.device import environment_of
from saekit.errors import SaekitError
from saekit.forward import LanguageForward
from saekit.model import load_model
from saekit.progress import Progress
from saekit.provenance import short
from saekit.store import format as layout
from saekit.store.format import STATISTICS, TOKENS, TokenTable
from saekit.store.integrity import find_problems
from saekit.store.writer import TORCH_DTYPES, bits_of, write_shard

CLOSE_SHARE = 0.999
"""Of all values, in another environment, must lie within 2 units in the last place."""


def repair(path: str | Path, model: str | None = None, *, device: str = "auto") -> list[str]:
    """Writes damaged shards and statistics again, bit for bit; returns their names, [] for a sound store.

    `model`: None = the one the manifest names. Raises SaekitError if something is damaged that cannot be computed again
    (manifest, token table), if the model is another one, or if the bytes come out different here.
    """
    folder = Path(path)
    damaged = {problem.file: problem.text for problem in find_problems(folder)}
    for name, text in damaged.items():
        if name != STATISTICS and "/" not in str(name):
            raise SaekitError(f"{text} (--repair needs it)")
    manifest = layout.read_manifest(folder)
    shards = {
        name: (site, i)
        for i in range(len(manifest["shards"]))
        for site in manifest["sites"]
        if (name := layout.shard_name(site, i)) in damaged
    }
    if shards:
        again = _Again(folder, manifest, model, device)
        table = layout.read_tokens(folder / TOKENS)
        with Progress("repair", len(shards), "shards", rate=False) as progress:
            for i in sorted({i for _, i in shards.values()}):
                names = {site: name for name, (site, k) in shards.items() if k == i}
                first, last = manifest["shards"][i]["sequences"]
                rows = again.rows(table, first, last, list(names))
                for site, name in names.items():
                    _restore(folder, name, rows[site], manifest["sites"][site], manifest["shards"][i]["files"][name])
                    progress.advance(1)
    if STATISTICS in damaged:
        merged = {
            site: layout.merge_sums(folder / layout.shard_name(site, i) for i in range(len(manifest["shards"])))
            for site in manifest["sites"]
        }
        record = layout.write_tensors(folder / STATISTICS, layout.statistics_tensors(merged))
        if record != manifest["statistics"]:
            raise SaekitError(f"{STATISTICS} comes out different from the manifest's; collect again")
    return [*shards, *([STATISTICS] if STATISTICS in damaged else [])]


def _restore(folder: Path, name: str, x_nD: torch.Tensor, entry: dict, expected: dict):
    """Under another name first: a file that is not the one it should be replaces nothing."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    trial = path.with_name(path.name + ".again")
    try:
        record = write_shard(trial, x_nD, entry["norm_limit"])
        if record != expected:
            raise SaekitError(
                f"{name} comes out with other bytes here (sha256:{record['sha256'][:4]}..., the manifest has "
                f"sha256:{expected['sha256'][:4]}...); repair it where the store was made, or collect again"
            )
        trial.replace(path)
        layout.sync_folder(path.parent)
    finally:
        trial.unlink(missing_ok=True)


def recompute(
    path: str | Path, sequences: int, model: str | None = None, *, device: str = "auto", seed: int = 0
) -> list[str]:
    """Problems of `sequences` random ones, one line per site: stored rows that are not what the model gives.

    Equal to the bit in the environment of the store, within 2 units in the last place for 99.9 % of the values elsewhere.
    """
    folder = Path(path)
    manifest = layout.read_manifest(folder)
    again = _Again(folder, manifest, model, device)
    table, batch, sites = layout.read_tokens(folder / TOKENS), manifest["batch_sequences"], list(manifest["sites"])
    chosen = np.sort(np.random.default_rng(seed).permutation(table.n_sequences)[:sequences])
    far, total, equal = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0), dict.fromkeys(sites, True)
    with Progress("recompute", len(chosen), "sequences") as progress:
        for i, shard in enumerate(manifest["shards"]):
            a, b = shard["sequences"]
            inside = chosen[(chosen >= a) & (chosen < b)] - a
            part = table.sequences(a, b)
            rows_before = np.concatenate([[0], np.cumsum(part.stored)])[part.seq_start]
            # a sequence is computed in the batch that it was computed in
            for k in np.unique(inside // batch):
                first, last = int(k) * batch, min((int(k) + 1) * batch, part.n_sequences)
                found = again.batch(part, first, last)
                mine = inside[inside // batch == k]
                which = np.concatenate([np.arange(int(rows_before[s]), int(rows_before[s + 1])) for s in mine])
                for site in sites:
                    stored = layout.map_tensors(folder / layout.shard_name(site, i))["activations"][which]
                    now = bits_of(found[site][torch.from_numpy(which - rows_before[first])])
                    equal[site] &= bool(np.array_equal(now, stored))
                    far[site] += int((_steps_apart(now, stored) > 2).sum())
                    total[site] += now.size
                progress.advance(len(mine))
    problems = []
    for site in sites:
        if again.same_environment and not equal[site]:
            problems.append(f"{site}: stored values are not those that the model gives here, in the same environment")
        elif far[site] > (1 - CLOSE_SHARE) * total[site]:
            problems.append(
                f"{site}: {far[site]:,} of {total[site]:,} values differ from the model's by more than 2 units in the last place"
            )
    return problems


def _steps_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many representable numbers lie between; a and b hold a float dtype's bits (bfloat16 as uint16)."""
    kind = {2: (np.uint16, np.int32), 4: (np.uint32, np.int64)}[a.itemsize]

    def ordered(x):
        bits = x.view(kind[0]).astype(kind[1])
        sign = 1 << (8 * x.itemsize - 1)
        # negative numbers count downwards from zero
        return np.where(bits & sign, -(bits & (sign - 1)), bits)

    return np.abs(ordered(a) - ordered(b))


class _Again:
    """The model of a store, in the arithmetic that the store was made with."""

    def __init__(self, folder: Path, manifest: dict, model: str | None, device: str):
        entry = manifest["model"]
        if manifest["text"]["source"] == "inputs":
            raise SaekitError(f"{folder} was collected from a module and its inputs; collect again from Python")
        lm = load_model(
            model or entry["id"],
            device=device,
            compute="fp32" if entry["compute"] == "fp32" else "bf16",
            attention=entry["attention"],
        )
        if lm.weights_fingerprint != entry["weights_fingerprint"]:
            raise SaekitError(
                f"weights fingerprint of {lm.id} is {short(lm.weights_fingerprint)}, {folder} was collected from "
                f"{short(entry['weights_fingerprint'])}; pass --model"
            )
        if lm.compute != entry["compute"]:
            raise SaekitError(
                f"{folder} was collected with {entry['compute']}, here {lm.compute} runs; use such a device"
            )
        self.dtype = TORCH_DTYPES[manifest["dtype"]]
        self.sites = {name: lm.check_site(name) for name in manifest["sites"]}
        self.lm, self.manifest = lm, manifest
        self.forward = LanguageForward(lm, self.sites, manifest)
        environments = [{k: v for k, v in e.items() if k != "shards"} for e in manifest["environments"]]
        self.threads: int | None = environments[0].get("threads")
        now = environment_of(lm.device)
        self.same_environment = environments == [{**now, "threads": self.threads} if self.threads else now]

    def batch(self, table: TokenTable, first: int, last: int) -> dict[str, torch.Tensor]:
        """Rows of one batch of the forward pass in the store dtype, on the threads that the store was made with."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return {name: x_nD.to(self.dtype).cpu() for name, x_nD in self.forward(table, first, last).items()}
        finally:
            torch.set_num_threads(before)

    def rows(self, table: TokenTable, first: int, last: int, sites: list[str]) -> dict[str, torch.Tensor]:
        """Rows of one shard's sequences in the store dtype."""
        part, batch = table.sequences(first, last), self.manifest["batch_sequences"]
        found: dict[str, list[torch.Tensor]] = {site: [] for site in sites}
        for k in range(0, part.n_sequences, batch):
            rows = self.batch(part, k, min(k + batch, part.n_sequences))
            for site in sites:
                found[site].append(rows[site])
        return {site: torch.cat(blocks) for site, blocks in found.items()}
