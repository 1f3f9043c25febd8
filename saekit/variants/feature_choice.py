"""Feature Choice: each feature chooses its tokens, as many as its budget under Zipf's law (arXiv 2411.02124).

The formulas and constants are our reconstruction: no public code exists.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from saekit.errors import SaekitError
from saekit.variants.base import Start
from saekit.variants.mutual_choice import CALIBRATION_ROWS, MutualChoice


@dataclass(frozen=True, kw_only=True)
class FeatureChoice(MutualChoice):
    """c = relu(pre) on the m_j(t) largest pre of each column j,  Σ_j m_j = k·B;  inference: c_j = pre_j·[pre_j > θ_j]

    1. The first 60 % of the steps are mutual_choice.
    2. At the switch each feature gets a budget from its rank in the density law, m_j = B·q_j, q_r ∝ (r + β)^−α, at most p_max·B.
    3. From then on m_j(t) = floor(m_j + frac(φ_j + 0.618…·t)): whole numbers whose mean is m_j.

    `budget` holds m_j / B, so that it is a density; θ_j is calibrated from it on training rows.
    """

    name: ClassVar[str] = "feature_choice"
    saved: ClassVar[tuple[str, ...]] = ("threshold", "budget")
    logged: ClassVar[tuple[str, ...]] = ()

    budget: Literal["zipf", "empirical", "uniform"] = "zipf"
    """Law of the budgets: fitted to the densities, the densities themselves, or equal."""
    p_max: float = 0.5
    """Largest share of the tokens that a feature may choose."""
    switch: float = 0.6
    """Share of the steps that are mutual_choice."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.p_max <= 1:
            raise SaekitError(f"p_max = {self.p_max} is no share of the tokens; pass above 0, at most 1")
        if not 0 <= self.switch < 1:
            raise SaekitError(f"switch = {self.switch} is no share of the steps; pass 0 to below 1")

    def check(self, d_sae: int):
        super().check(d_sae)
        if self.k > self.p_max * d_sae:
            raise SaekitError(
                f"k = {self.k} exceeds p_max · d_sae = {self.p_max:g} · {d_sae}; lower --k, raise --p-max or --d-sae"
            )

    def chooses(self, at) -> bool:
        """Whether features choose at this step."""
        return at.steps is not None and at.step >= math.ceil(self.switch * at.steps)

    def rule(self, at):
        from saekit_kernels import ColumnCount

        from saekit import zipf

        if not self.chooses(at):
            return super().rule(at)
        return ColumnCount(zipf.whole(at.buffers["budget"], at.rows, at.buffers["phase"], at.step))

    def buffers(self, start: Start) -> dict:
        import torch

        from saekit.trainer import generator

        F = start.d_sae
        phase_F = torch.rand(F, generator=generator(start.seed, "budget phase"), dtype=torch.float64)
        uniform_F = torch.full((F,), self.k / F, dtype=torch.float64)
        return {**super().buffers(start), "threshold": torch.zeros(F), "budget": uniform_F, "phase": phase_F}

    def after_step(self, out):
        super().after_step(out)
        at = out.moment
        if at.steps is not None and at.step + 1 == math.ceil(self.switch * at.steps):
            from saekit import zipf
            from saekit.progress import Progress

            count, tokens = out.buffers["count"], float(out.buffers["count_tokens"])
            law = zipf.fit(count, tokens)
            budgets = zipf.budgets(count, tokens, self.k, self.budget, self.p_max, law)
            out.buffers["budget"].copy_(budgets.density_F)
            if budgets.kind != self.budget:
                Progress.say(
                    f"feature_choice: too few features fire for a fit of Zipf's law; budgets are {budgets.kind}"
                )

    def finish(self, sae, rows) -> dict:
        from saekit import calibration

        budget_F = sae.extra["budget"]
        if self.budget != "uniform" and bool((budget_F == budget_F[0]).all()):
            # features never chose: one threshold for all, as in mutual_choice
            return super().finish(sae, rows)
        wanted = calibration.rows_for_columns(budget_F, CALIBRATION_ROWS)
        theta_F, n = calibration.column_thresholds(
            calibration.Encoder.of(sae), lambda: rows(wanted), budget_F, sae.extra["threshold"]
        )
        sae.extra["threshold"].copy_(theta_F)
        return {"threshold_source": "calibration", "calibration_rows": n}

    def folded(self, buffers: dict, s: float):
        return self, {"threshold": buffers["threshold"] / s, "budget": buffers["budget"]}

    def advice(self, d_sae: int, rows: int) -> str | None:
        least = math.ceil(2 * d_sae / self.k)
        if rows < least:
            return (
                f"feature_choice gives {d_sae:,} features {self.k * rows:,} tokens to share; with a selection batch of "
                f"{least:,} rows or more (now {rows:,}) each could have two"
            )
        return super().advice(d_sae, rows)
