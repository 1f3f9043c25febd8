"""What an SAE was trained to do, beside what it does on the text of its index: features per token, budgets, ranks.

    idx.aim().warning                          # "… 14 % more than it was trained for …", or ""
    idx.law().under                            # features that fire less than half of their budget

F features · R ranks.
"""

import json
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from saekit.store.format import map_tensors

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

TOLERANCE = {"calibration": 0.02, "running average": 0.02, "penalty": 0.1}
"""By what set it: how far L0 may lie from what was asked for, relative."""
RANKS = 400
HALF = 0.5
"""Of its budget: below, a feature is under it."""

How = Literal["calibration", "running average", "penalty"]


class Aim(NamedTuple):
    """Features per token, asked for and found."""

    wanted: float
    """k, or the l0 that a penalty aimed at."""
    found: float
    """Mean L0 of the index."""
    how: How
    """What was to bring it about."""
    rows: int
    """Training rows that the thresholds were calibrated on; 0 if they were not."""
    threshold: float | None
    """θ where one stands for all features."""

    @property
    def off(self) -> float:
        """(found − wanted) / wanted"""
        return self.found / self.wanted - 1

    @property
    def warning(self) -> str:
        """Empty inside the tolerance."""
        if abs(self.off) <= TOLERANCE[self.how]:
            return ""
        more = "more" if self.off > 0 else "less"
        return (
            f"{self.found:.1f} features fire per token, {100 * abs(self.off):.0f} % {more} than the {self.wanted:g} it was "
            f"trained for: compare this SAE with others of L0 {self.found:.0f}"
        )

    def __str__(self) -> str:
        by = {
            "calibration": f"calibrated on {self.rows:,} training rows",
            "running average": "a running average of training, not calibrated",
        }
        asked = (
            f"k = {self.wanted:g}" if self.how != "penalty" else f"L0 = {self.wanted:g}, by the weight of its penalty"
        )
        line = f"Trained for {asked}; in this index {self.found:.1f} features fire per token ({100 * self.off:+.1f} %)."
        if self.how != "penalty":
            theta = "One threshold per feature" if self.threshold is None else f"Threshold θ = {self.threshold:.3g}"
            line += f" {theta}, {by[self.how]}."
        return line.replace("(-", "(−")


class RankLaw(NamedTuple):
    """Density against rank, at geometrically spaced ranks; each column is ranked by itself, 1 = largest."""

    rank: np.ndarray
    """(R) int64, from 1 to F."""
    density: np.ndarray
    """Share of tokens (R); NaN beyond the features that fire."""
    fitted: np.ndarray | None
    """exp(a − α·log(rank + β)) (R); None where too few features fire for a fit."""
    law: tuple[float, float, float] | None
    """a, α, β of the fit."""
    budget: np.ndarray | None
    """What each feature was meant to have (R); None where no budgets are kept."""
    under: int
    """Features that fire less than half of their budget."""


def aim(index: "FeatureIndex") -> Aim | None:
    """None where the count per token is fixed, was never asked for, or the SAE's config.json is gone."""
    path = index.path.parent / "config.json"
    if not path.is_file() or index.n_encoded == 0:
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    options = config.get("options") or {}
    training = (config.get("provenance") or {}).get("training") or {}
    found = index.manifest["Z"] / index.n_encoded
    if (source := options.get("threshold_source")) in TOLERANCE and options.get("k"):
        return Aim(options["k"], found, source, options.get("calibration_rows") or 0, _threshold(index))
    # a weight set by hand aims at no count, unless the loss itself does
    if training.get("l0") and (training.get("l1") is None or training.get("l0_loss") == "target"):
        return Aim(training["l0"], found, "penalty", 0, None)
    return None


def _threshold(index: "FeatureIndex") -> float | None:
    path = index.path.parent / "sae.safetensors"
    tensor = map_tensors(path).get("threshold") if path.is_file() else None
    return float(np.asarray(tensor).reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def has_budgets(index: "FeatureIndex") -> bool:
    """Whether features were given budgets. Equal ones with equal thresholds are the start of a run that never came so far."""
    columns = index.file("features")
    return "budget" in columns and not (
        np.ptp(columns["budget"]) == 0 and "threshold" in columns and np.ptp(columns["threshold"]) == 0
    )


def budget_share(index: "FeatureIndex") -> np.ndarray:
    """Density / budget (F) float64."""
    budget = index.column("budget").astype(np.float64)
    return np.divide(index.column("density"), budget, out=np.full(len(budget), np.nan), where=budget > 0)


def law(index: "FeatureIndex") -> RankLaw:
    import torch

    from saekit import zipf

    F, n = len(index), index.column("n")
    rank = np.unique(np.geomspace(1, F, min(RANKS, F)).round().astype(np.int64))
    density = -np.sort(-index.column("density"))[rank - 1]
    fit = zipf.fit(torch.from_numpy(n.astype(np.float64)), max(1, index.n_encoded))
    budget, under = None, 0
    if has_budgets(index):
        budget = -np.sort(-index.column("budget").astype(np.float64))[rank - 1]
        under = int((budget_share(index) < HALF).sum())
    return RankLaw(
        rank=rank,
        density=np.where(density > 0, density, np.nan),
        fitted=None if fit is None else np.exp(fit.a - fit.alpha * np.log(rank + fit.beta)),
        law=None if fit is None else (fit.a, fit.alpha, fit.beta),
        budget=budget,
        under=under,
    )
