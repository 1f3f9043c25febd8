"""TopK: the k largest positive pre-activations of each token (Gao et al., arXiv 2406.04093)."""

from dataclasses import dataclass
from typing import ClassVar

from saekit.errors import SaekitError
from saekit.variants.base import Counted


@dataclass(frozen=True, kw_only=True)
class TopK(Counted):
    """c = relu(pre) on the k largest pre of each row,  pre = (x − b_dec) W_encᵀ + b_enc,  x̂ = c W_dec + b_dec

    L = Σ‖x − x̂‖² / (B·V) + aux · AuxK. Training and inference use the same rule. A row with fewer than k positive
    pre-activations has fewer than k codes. Multi-TopK adds multi_k · FVU of the reconstruction by the 4k largest.
    """

    name: ClassVar[str] = "topk"
    values_at_inference: ClassVar[bool] = False

    multi_k: float = 0.0
    """Weight of Multi-TopK, the error of the 4k largest codes; 0 = off, 1/8 is usual."""

    def rule(self, at):
        from saekit_kernels import RowCount

        k = self.k_now(at)
        return RowCount(min(4 * k, at.features) if self.multi_k else k)

    def inference_rule(self, at):
        from saekit_kernels import RowCount

        return RowCount(self.k)

    @property
    def own_values(self) -> bool:
        return self.multi_k > 0

    own_losses = own_values

    def values(self, out):
        import torch

        place = out.pre.detach().topk(self.k_now(out.moment), dim=1).indices
        return torch.where(torch.zeros_like(out.pre, dtype=torch.bool).scatter_(1, place, True), out.pre, 0)

    def losses(self, out):
        error = out.x_BD - out.decode(out.pre, out.parameters["W_dec"], out.parameters["b_dec"])
        return {"multi_k": self.multi_k * error.square().sum() / (len(error) * out.total_variance)}

    def inference_options(self) -> dict:
        return {"k": self.k, "relu": True}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "TopK":
        if options.get("relu", True) is not True:
            raise SaekitError("options.relu is false: a topk SAE that keeps negative winners cannot be read yet")
        return cls(k=options["k"], d_sae=d_sae)
