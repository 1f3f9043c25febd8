"""Mutual Choice: the k·B largest pre-activations of the whole batch (arXiv 2411.02124; BatchTopK's selection, 2412.06410)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saekit.variants.base import Counted, Start

CALIBRATION_ROWS = 262_144
LEAST_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class BatchChoice(Counted):
    """c = relu(pre) on the k·B largest of the batch in training; c = pre·[pre > θ] at inference, row by row.

    `threshold` θ is a running average of the smallest kept value until it is calibrated on training rows at the end.
    """

    saved: ClassVar[tuple[str, ...]] = ("threshold",)
    logged: ClassVar[tuple[str, ...]] = ("threshold",)
    provisional: ClassVar[dict] = {"threshold_source": "running average", "calibration_rows": 0}

    def rule(self, at):
        from saekit_kernels import BatchCount

        return BatchCount(min(self.k_now(at) * at.rows, at.features * at.rows))

    def inference_rule(self, at):
        from saekit_kernels import Threshold

        return Threshold(at.buffers["threshold"])

    def buffers(self, start: Start) -> dict:
        import torch

        return {"threshold": torch.zeros(())}

    def after_step(self, out):
        average_(out.buffers["threshold"], out.threshold)

    def finish(self, sae, rows) -> dict:
        from saekit import calibration

        theta, n = calibration.batch_threshold(
            calibration.Encoder.of(sae), lambda: rows(CALIBRATION_ROWS), self.k, float(sae.extra["threshold"].max())
        )
        sae.extra["threshold"].fill_(theta)
        return {"threshold_source": "calibration", "calibration_rows": n}

    def advice(self, d_sae: int, rows: int) -> str | None:
        if rows < LEAST_ROWS:
            return f"{self.name} chooses among the tokens of one selection batch, here {rows:,}; take {LEAST_ROWS:,} or more"
        return None


@dataclass(frozen=True, kw_only=True)
class MutualChoice(BatchChoice):
    """c = relu(pre) on the k·B largest pre of the batch,  x̂ = c W_dec + b_dec;  inference: c = pre·[pre > θ]

    topk fixes the count per token, feature_choice per feature, mutual_choice only the total: a token may have no feature,
    another hundreds. L = Σ‖x − x̂‖² / (B·V) + aux · aux_zipf_loss: AuxK on the dead features and on those that fire less than a
    tenth of what their rank in Zipf's law lets expect (saekit/zipf.py; our reconstruction, no public code exists).
    """

    name: ClassVar[str] = "mutual_choice"

    aux_on: Literal["zipf", "dead"] = "zipf"
    """Features that AuxK trains: the dead and the under-used, or the dead alone."""

    def buffers(self, start: Start) -> dict:
        import torch

        return {
            **super().buffers(start),
            "count": torch.zeros(start.d_sae, dtype=torch.float64),
            "count_tokens": torch.zeros((), dtype=torch.float64),
        }

    def after_step(self, out):
        import math

        super().after_step(out)
        # a firing counts for about `dead_after` tokens
        decay = math.exp(-out.moment.rows / out.dead_after)
        out.buffers["count"].mul_(decay).add_(out.firings_F)
        out.buffers["count_tokens"].mul_(decay).add_(out.moment.rows)

    def revive(self, buffers, dead_after: int):
        from saekit import zipf

        tokens = float(buffers["count_tokens"])
        if self.aux_on == "dead" or tokens < dead_after / 2:
            return None
        law = zipf.fit(buffers["count"], tokens)
        return None if law is None else zipf.under_used(buffers["count"], tokens, law)


def average_(mean, value):
    """mean ← 0.99 mean + 0.01 value where value > 0; the first value replaces a mean of 0."""
    import torch

    mean.copy_(torch.where(value > 0, torch.where(mean > 0, 0.99 * mean + 0.01 * value, value), mean))
