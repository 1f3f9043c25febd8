"""Matryoshka: prefixes of the features that reconstruct by themselves (arXiv 2503.17547)."""

from dataclasses import dataclass
from typing import ClassVar

from saekit.errors import SaekitError
from saekit.variants.mutual_choice import BatchChoice


@dataclass(frozen=True, kw_only=True)
class Matryoshka(BatchChoice):
    """L = (1/G) Σ_g ‖x − (b_dec + Σ_{j<n_g} c_j d_j)‖² / (B·V) + aux · AuxK on the error of all,  n_1 < … < n_G = F

    The codes are those of one selection: relu(pre) on the k·B largest of the batch; inference c = pre·[pre > θ]. The order of
    the features carries meaning: early ones serve every prefix.
    """

    name: ClassVar[str] = "matryoshka"

    widths: tuple[int, ...] | None = None
    """Numbers of features n_1 < … < n_G = F; None = 1/16, 1/8, 1/4, 1/2 and all of F."""

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        if self.widths is not None:
            return self.widths
        return tuple(sorted({max(1, d_sae // part) for part in (16, 8, 4, 2, 1)}))

    def check(self, d_sae: int):
        super().check(d_sae)
        widths = self.prefixes(d_sae)
        if list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != d_sae:
            raise SaekitError(f"widths = {widths} must ascend from at least 1 and end in d_sae = {d_sae}")

    def inference_options(self) -> dict:
        return {"k": self.k, "widths": list(self.prefixes(self.d_sae or 0))}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "Matryoshka":
        return cls(k=options["k"], widths=tuple(options["widths"]), d_sae=d_sae)
