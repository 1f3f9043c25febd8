"""`evaluate`: which rows, which model, which tiers; each tier is stored as soon as it is done."""

import time

import numpy as np
import torch

from saekit.config import EvaluateOptions
from saekit.device import resolve_device
from saekit.encoding import encode_store
from saekit.errors import SaekitError
from saekit.evaluation.language_model import language_model_metrics, spliced_losses
from saekit.evaluation.metrics import Metric
from saekit.evaluation.reconstruction import Reconstruction
from saekit.evaluation.report import Evaluation, new_evaluation
from saekit.provenance import find_model, find_site, find_store
from saekit.sae import SAE
from saekit.store.format import write_tensors

FEW_TOKENS = 100_000


def evaluate(sae, store=None, **options) -> Evaluation:
    """Measures an SAE (or its folder) on the held-out sequences of a store; `options` are those of EvaluateOptions.

    An SAE that has a folder gets `evaluation.json` there, each tier as soon as it is done. Raises SaekitError if the SAE
    does not belong to the store, or if no held-out rows are there (unless `allow_train_tokens`).
    """
    options = EvaluateOptions(**options)
    if not isinstance(sae, SAE):
        sae = SAE.load(sae, str(resolve_device(options.device)))
    store = find_store(sae, store if store is not None else options.store, force=options.force)
    site = find_site(sae, store, options.site)
    unknown = set(options.tiers) - {1, 2}
    if unknown:
        raise SaekitError(f"no tier {min(unknown)}; there are 1 (held-out activations) and 2 (language model)")
    rows, split = _rows(sae, store, site, options)
    lm = find_model(store, options.model, device=options.device, force=options.force) if 2 in options.tiers else None
    if lm is not None and not lm.causal:
        raise SaekitError(f"attention of {lm.id} is not causal: it has no next-token loss; pass --tiers 1")

    seq_rows = store.seq_rows()
    sequences = np.unique(np.searchsorted(seq_rows, rows, side="right") - 1)
    data = {
        "store": store.fingerprint,
        "model": store.manifest["model"]["id"],
        "site": site,
        "split": split,
        "tokens": len(rows),
        "sequences": len(sequences),
        "skipped": store.n_sequences - len(sequences),
    }
    evaluation = new_evaluation(sae.config, data, "fp32", torch.__version__)
    device = str(sae.W_enc.device)
    mean_D = torch.from_numpy(store.statistics(site).mean_D.copy())

    def keep(tier: str, metrics: dict[str, Metric], warnings: list[str], arrays: dict, start: float):
        if split == "train":
            warnings = ["measured on rows the SAE was trained on", *warnings]
        evaluation.content["tiers"][tier] = {
            "device": device,
            "seed": options.seed,
            "metrics": {k: m.to_dict() for k, m in metrics.items()},
            "arrays": arrays,
            "warnings": warnings,
        }
        if sae.path:
            evaluation.save(sae.path, {tier: round(time.monotonic() - start, 2)})

    if 1 in options.tiers:
        start = time.monotonic()
        tier1 = Reconstruction(sae, mean_D, sequences, options.seed)
        encode_store(sae, store, site, [tier1], rows=rows, name="evaluate")
        metrics = tier1.metrics()
        warnings = [*_count_in_index(sae, metrics), *_warnings_1(sae, metrics, len(rows))]
        keep("1", metrics, warnings, _save_density(sae, tier1), start)
    if lm is not None:
        start = time.monotonic()
        few = _first_tokens(store, sequences, options.lm_tokens)
        metrics = language_model_metrics(spliced_losses(sae, store, lm, site, few, mean_D), options.seed)
        warnings = []
        if (metrics["ce_recovered_zero"].value or 0) < 0:
            warnings.append("recovered < 0: the model does worse with the reconstruction than with zeros")
        keep("2", metrics, warnings, {}, start)
    return evaluation


def _rows(sae: SAE, store, site: str, options: EvaluateOptions) -> tuple[np.ndarray, str]:
    """Held-out rows of the store, all of them if the SAE never saw it; at most `tokens`."""
    provenance = sae.config.get("provenance") or {}
    own = provenance.get("store") == store.fingerprint
    trained_on_all = own and provenance.get("split") == "all"
    rows, split = store.valid_rows([site], split="heldout" if own else "all"), "heldout"
    if not len(rows) or trained_on_all:
        if not options.allow_train_tokens:
            why = "its run read the held-out rows too" if trained_on_all else "it is a single sequence"
            raise SaekitError(
                f"{store.path} has no row that the SAE was not trained on ({why}); pass another --store, or --allow-train-tokens"
            )
        rows, split = store.valid_rows([site], split="all"), "train"
    return rows[: options.tokens], split


def _first_tokens(store, sequences: np.ndarray, tokens: int) -> np.ndarray:
    """The first of `sequences` that hold `tokens` tokens together, at least one."""
    lengths = np.diff(store.table.seq_start)[sequences]
    return sequences[: max(1, int(np.searchsorted(np.cumsum(lengths), tokens, side="right")))]


def _count_in_index(sae: SAE, metrics: dict[str, Metric]) -> list[str]:
    """Silent features are counted over all tokens of the index where there is one: density needs no held-out text. Returns
    warnings: an index that cannot be used counts nothing."""
    from saekit.feature_index import open_index

    if sae.path is None or not (sae.path / "index" / "manifest.json").is_file():
        return []
    try:
        index = open_index(sae.path)
    except SaekitError as error:
        return [f"silent features are those of the held-out tokens: {error}"]
    n = int(index.manifest["E"])
    silent = int((np.asarray(index.column("n")) == 0).sum())
    F = sae.d_sae
    metrics["alive"] = Metric(
        1 - silent / F, "share", "higher", n, "alive/1", note=f"of {F:,} features, in the {n:,} tokens of the index"
    )
    metrics["dead_at"] = Metric(
        float(silent),
        "features",
        "lower",
        n,
        "dead_at/1",
        note=f"without a firing in the {n:,} tokens of the index; density below {3 / n:.1g} (95 %)",
    )
    return []


def _warnings_1(sae: SAE, metrics: dict[str, Metric], n: int) -> list[str]:
    found = []
    fvu = metrics["fvu"].value
    if fvu is not None and fvu >= 1:
        found.append(f"FVU {fvu:.2f} is worse than predicting the mean: wrong site or scaling?")
    (name, target, tolerance), l0 = _target(sae), metrics["l0"].value
    if target and l0 is not None and abs(l0 / target - 1) > tolerance:
        found.append(
            f"L0 {l0:.1f} is {abs(l0 / target - 1):.0%} {'below' if l0 < target else 'above'} {name} = {target:g}"
        )
    if sae.config["options"].get("threshold_source") == "running average":
        found.append("thresholds are running averages of training, not calibrated: L0 may be off")
    if n < FEW_TOKENS:
        found.append(f"measured on {n:,} tokens; under {FEW_TOKENS:,} the intervals are wide")
    return found


def _target(sae: SAE) -> tuple[str, float | None, float]:
    """What L0 was to be, by its name, and the share it may be off; None where nothing was aimed at."""
    if k := sae.config["options"].get("k"):
        return "k", k, 0.05
    trained = (sae.config.get("provenance") or {}).get("training") or {}
    # a penalty whose weight was set by hand aims at nothing
    return "l0", trained.get("l0") if trained.get("l1") is None else None, 0.1


def _save_density(sae: SAE, tier1: Reconstruction) -> dict:
    if sae.path is None:
        return {}
    edges, counts = tier1.density_histogram()
    (sae.path / "evaluation").mkdir(exist_ok=True)
    tensors = {"edges": edges, "counts": counts.astype(np.int64), "n": tier1.firings, "n_neg": tier1.negative}
    write_tensors(sae.path / "evaluation" / "density.safetensors", tensors)
    return {"density_hist": "evaluation/density.safetensors"}
