"""top-AFA: as many features per token as its norm asks for (arXiv 2503.24277)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saekit.errors import SaekitError
from saekit.variants.base import Revived


@dataclass(frozen=True, kw_only=True)
class TopAFA(Revived):
    """n_b = argmin_{n ≥ 1} | √C_n − t_b |,  C_n = Σ of the n largest relu(pre)²,  t_b = ‖x_b − b_dec‖;  c = relu(pre) on those n

    L = Σ‖x − x̂‖² / (B·V) + aux · AuxK + norm · D · mean_b (‖c_b‖ − t_b)² / V. How many features fire is an outcome, and the
    start decides much of it: with `kaiming` almost all positive ones are needed, with `tied` about a hundredth.
    """

    name: ClassVar[str] = "top_afa"

    enc_init: Literal["fit", "tied", "kaiming"] = "tied"
    """Start of the encoder: the decoder's rows times 1, the scale of the best first reconstruction, or √(2D/F)."""
    norm: float = 1 / 32
    """Weight λ of the norm term; 0 = off."""
    afa_target: Literal["centred", "input"] = "centred"
    """What the norm term compares ‖c‖ with: ‖x − b_dec‖, as selection does, or ‖x‖, as the published code does."""

    def __post_init__(self):
        super().__post_init__()
        if self.norm < 0:
            raise SaekitError(f"norm = {self.norm} would reward a wrong norm; pass 0 or more")

    def rule(self, at):
        from saekit_kernels import RowMass

        return RowMass((at.x_BD - at.b_dec_D).norm(dim=1))

    @property
    def own_losses(self) -> bool:
        return self.norm > 0

    def losses(self, out):
        import torch

        x_BD = out.x_BD if self.afa_target == "input" else out.x_BD - out.parameters["b_dec"]
        sq_B = out.row_sum(out.values.square())
        # the root has no slope at 0
        norm_B = torch.where(sq_B > 0, torch.where(sq_B > 0, sq_B, 1).sqrt(), 0)
        off = (norm_B - x_BD.norm(dim=1)).square().mean()
        return {"norm": self.norm * x_BD.shape[1] / out.total_variance * off}

    def inference_options(self) -> dict:
        return {}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "TopAFA":
        return cls(d_sae=d_sae)
