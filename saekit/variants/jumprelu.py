"""JumpReLU: a learned threshold per feature, trained through its jump (Rajamanoharan et al., arXiv 2407.14435)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saekit.errors import SaekitError
from saekit.variants.base import Penalised, Start, ramp


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Penalised):
    """c = pre·[pre > θ_j],  L = Σ‖x − x̂‖² / (B·V) + λ·w(t)·L0/l0,  L0 = mean_b Σ_j H(pre_bj − θ_j)

    Slopes of the jump, with R(u) = [|u| < ½]·[pre > 0], u = (pre − θ)/ε:

        ∂c/∂θ = −(θ/ε)·R(u)        ∂H/∂θ = −(1/ε)·R(u)        ∂c/∂pre = [pre > θ]

    u is taken from pre, not from the code: features just below θ are half of the window. θ starts at 0.001 and ε is 0.001, in
    units of √V; it is kept at 0 or above after each step.
    """

    name: ClassVar[str] = "jumprelu"
    # at the common rule half of the features fell silent for good: 0.162 FVU instead of 0.123 (docs/variants.md)
    lr_share: ClassVar[float] = 0.5
    betas: ClassVar[tuple[float, float]] = (0.0, 0.999)
    values_at_inference: ClassVar[bool] = False
    saved: ClassVar[tuple[str, ...]] = ("threshold",)

    l0_loss: Literal["linear", "target"] = "linear"
    """λ · L0/l0, or (L0/l0 − 1)² with λ = 1 unless `l1` sets it."""
    bandwidth: float = 1e-3
    """Width ε of the window in which the threshold learns, in units of √V."""
    theta: float = 1e-3
    """Start of the thresholds, in units of √V."""

    def __post_init__(self):
        super().__post_init__()
        if self.bandwidth <= 0:
            raise SaekitError(f"bandwidth = {self.bandwidth}; it must be above 0")
        if self.theta < 0:
            raise SaekitError(f"theta = {self.theta}; it must be 0 or more")

    def rule(self, at):
        from saekit_kernels import Threshold

        return Threshold(at.buffers["threshold"].detach(), margin=float(at.buffers["epsilon"]) / 2)

    def inference_rule(self, at):
        from saekit_kernels import Threshold

        return Threshold(at.buffers["threshold"])

    def buffers(self, start: Start) -> dict:
        import torch
        from torch.nn import Parameter

        unit = start.total_variance**0.5
        return {
            **super().buffers(start),
            "threshold": Parameter(torch.full((start.d_sae,), self.theta * unit)),
            "epsilon": torch.tensor(self.bandwidth * unit, dtype=torch.float64),
        }

    def values(self, out):
        theta, slope = self._window(out)
        return out.pre * (out.pre > theta) - theta.detach() * slope * (theta - theta.detach())

    def losses(self, out):
        theta, slope = self._window(out)
        jump = (out.pre > theta).to(slope.dtype) - slope * (theta - theta.detach())
        l0 = out.mean_over_ranks(out.row_sum(jump).mean())
        if self.l0_loss == "linear":
            return {"sparsity": self.penalty(out) * l0 / self.l0}
        weight = (1.0 if self.l1 is None else self.l1) * ramp(out.moment, 2000, 0.1)
        return {"sparsity": weight * (l0 / self.l0 - 1).square()}

    def _window(self, out):
        """θ at the slots, and R(u)/ε."""
        theta, width = out.feature(out.parameters["threshold"]), float(out.buffers["epsilon"])
        inside = ((out.pre - theta).abs() < width / 2) & (out.pre > 0)
        return theta, inside.to(out.pre.dtype) / width

    def after_step(self, out):
        super().after_step(out)
        out.parameters["threshold"].clamp_(min=0)
