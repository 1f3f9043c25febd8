"""AbsTopK: the k pre-activations of largest magnitude, sign kept, so that a feature has two ends (arXiv 2510.00404)."""

from dataclasses import dataclass
from typing import ClassVar

from saekit.variants.base import Counted

CALIBRATION_ROWS = 262_144


@dataclass(frozen=True, kw_only=True)
class AbsTopK(Counted):
    """c = pre on the k largest |pre| of each row, no ReLU,  x̂ = c W_dec + b_dec

    One proximal step from zero on ½‖x − b_dec − Σ c_j d_j‖² under ‖c‖₀ ≤ k. L = Σ‖x − x̂‖² / (B·V) + aux · AuxK, which ranks
    |pre| too. (W_enc_j, b_enc_j, d_j) and its negative are the same SAE: at the end each feature whose mean code is negative is
    flipped, exactly.
    """

    name: ClassVar[str] = "abs_topk"

    @property
    def key(self):
        return "abs"

    def rule(self, at):
        from saekit_kernels import RowCount

        return RowCount(self.k_now(at))

    def inference_rule(self, at):
        from saekit_kernels import RowCount

        return RowCount(self.k)

    def finish(self, sae, rows) -> dict:
        flip_signs(sae, rows)
        return {}


def flip_signs(sae, rows):
    """Negates every feature whose mean code over the calibration rows is negative: the same function, in one gauge."""
    import torch

    from saekit.calibration import mean_codes

    sign_F = torch.where(mean_codes(sae.encode, lambda: rows(CALIBRATION_ROWS)) < 0, -1.0, 1.0).to(sae.W_enc)
    for name in ("W_enc", "W_dec", "b_enc"):
        weights = getattr(sae, name).data
        weights.mul_(sign_F if weights.ndim == 1 else sign_F[:, None])
