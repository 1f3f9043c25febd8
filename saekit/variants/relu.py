"""ReLU with an L1 penalty: the first SAEs of language models (arXiv 2309.08600)."""

from dataclasses import dataclass
from typing import ClassVar

from saekit.variants.base import Penalised


@dataclass(frozen=True, kw_only=True)
class ReLU(Penalised):
    """c = relu(pre),  L = Σ‖x − x̂‖² / (B·V) + λ·w(t) · mean_b Σ_j c_bj ‖d_j‖ / √V,  ‖d_j‖ = 1

    The penalty shrinks every code. λ is found by a controller that aims at `l0` features per token, or is `l1`.
    """

    name: ClassVar[str] = "relu"
    # FVU 0.135 instead of 0.145, and no feature falls silent for it (docs/variants.md)
    lr_share: ClassVar[float] = 2.0

    def rule(self, at):
        from saekit_kernels import Threshold

        return Threshold(0.0)

    def losses(self, out):
        l1 = out.row_sum(out.values).mean() / out.total_variance**0.5
        return {"l1": self.penalty(out) * l1}
