"""TopK: the k largest positive pre-activations of each token (Gao et al., arXiv 2406.04093)."""

from dataclasses import dataclass
from typing import ClassVar

from saekit.errors import SaekitError
from saekit.variants.base import Variant


@dataclass(frozen=True, kw_only=True)
class TopK(Variant):
    """c = relu(pre) on the k largest pre of each row,  pre = (x − b_dec) W_encᵀ + b_enc,  x̂ = c W_dec + b_dec

    L = Σ‖x − x̂‖² / (B·V) + aux · AuxK. Training and inference use the same rule. A row with fewer than k positive
    pre-activations has fewer than k codes.
    """

    name: ClassVar[str] = "topk"
    key: ClassVar[str] = "relu"
    signed: ClassVar[bool] = False

    k: int = 32
    """Features kept per token."""
    aux: float = 1 / 32
    """Weight of AuxK, the loss that revives dead features; 0 = off."""
    k_aux: int | None = None
    """Dead features that AuxK keeps per token; None = D // 2, at most as many as are dead."""

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise SaekitError(f"k = {self.k} keeps no feature; pass --k 1 or more")
        if self.d_sae is not None:
            self.check(self.d_sae)

    def check(self, d_sae: int):
        if self.k > d_sae:
            raise SaekitError(f"k = {self.k} exceeds d_sae = {d_sae}; lower --k or raise --d-sae")

    def rule(self, progress: float):
        from saekit_kernels import RowCount

        return RowCount(self.k)

    def inference_options(self) -> dict:
        return {"k": self.k, "relu": True}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "TopK":
        if options.get("relu", True) is not True:
            raise SaekitError("options.relu is false: a topk SAE that keeps negative winners cannot be read yet")
        return cls(k=options["k"], d_sae=d_sae)
