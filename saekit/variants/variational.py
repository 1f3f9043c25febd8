"""Variational: codes with Gaussian noise and a prior, selected by their mean (arXiv 2509.22994)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from saekit.errors import SaekitError
from saekit.variants.base import Counted, Start, ramp


@dataclass(frozen=True, kw_only=True)
class Variational(Counted):
    """μ = pre (relu(pre) with relu_mu),  σ = s·exp(clamp(ρ, −10, 2)/2),  z = μ + σ⊙ε on the k largest |μ| of each row

    KL_j = ½(μ_j²/s² + σ_j²/s² − 1 − log(σ_j²/s²))
    L = Σ‖x − x̂(z)‖² / (B·V) + β·w(t)·mean_b Σ_j KL_bj + aux · AuxK on μ

    s = prior_std is the size of a typical code, so that nothing else depends on the scale. Inference is always the mean,
    without noise. Noise before selection mostly re-selects: the gap between the k-th and the next value is far below any useful
    σ; hence `sample: after`.
    """

    name: ClassVar[str] = "variational"
    values_at_inference: ClassVar[bool] = False

    sample: Literal["after", "before", "none"] = "after"
    """Noise on the kept codes alone, on all before selection, or none."""
    kl_on: Literal["selected", "all"] = "selected"
    """Which features pay the KL term; `all` trains on dense matrices."""
    variance: Literal["feature", "input", "fixed"] = "feature"
    """ρ learned per feature, per feature and input (doubles the encoder), or log_var_init throughout."""
    log_var_init: float = -6.0
    """Start of ρ, the log of the noise's variance in units of prior_std²."""
    prior_std: float | None = None
    """Standard deviation s of the prior; None = √(V/k)."""
    beta: float | None = None
    """Weight of the KL term; None = 0.2/D."""
    relu_mu: bool = False
    """Means of one sign: the k largest relu(pre)."""

    def __post_init__(self):
        super().__post_init__()
        if self.prior_std is not None and self.prior_std <= 0:
            raise SaekitError(f"prior_std = {self.prior_std}; it must be above 0, or left out")
        if self.beta is not None and self.beta < 0:
            raise SaekitError(f"beta = {self.beta}; it must be 0 or more")

    @property
    def key(self):
        return "relu" if self.relu_mu else "abs"

    @property
    def saved(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return {"feature": ("b_var",), "input": ("W_var", "b_var"), "fixed": ()}[self.variance]

    @property
    def dense(self) -> bool:
        return self.sample == "before" or self.kl_on == "all"

    @property
    def keeps_all(self) -> bool:
        return self.sample == "before"

    def resolved(self, start: Start) -> "Variational":
        s = self.prior_std or (start.total_variance / self.k) ** 0.5
        beta = 0.2 / start.d_model if self.beta is None else self.beta
        return replace(self, prior_std=s, beta=beta)

    def rule(self, at):
        from saekit_kernels import RowCount

        return RowCount(self.k_now(at))

    def inference_rule(self, at):
        from saekit_kernels import RowCount

        return RowCount(self.k)

    def buffers(self, start: Start) -> dict:
        import torch
        from torch.nn import Parameter

        F, D = start.d_sae, start.d_model
        shapes = {"b_var": ((F,), self.log_var_init), "W_var": ((F, D), 0.0)}
        return {name: Parameter(torch.full(*shapes[name])) for name in self.saved}

    def log_var(self, out):
        """ρ at the slots, clamped."""
        if self.variance == "fixed":
            return out.pre.detach() * 0 + min(2.0, max(-10.0, self.log_var_init))
        rho = out.feature(out.parameters["b_var"])
        if self.variance == "input":
            rho = rho + out.dots(out.x_BD - out.parameters["b_dec"], out.parameters["W_var"])
        return rho.clamp(-10, 2)

    def mean(self, out):
        return out.pre.relu() if self.relu_mu else out.pre

    @property
    def own_values(self) -> bool:
        return self.sample != "none"

    @property
    def own_losses(self) -> bool:
        return self.beta != 0

    def values(self, out):
        import torch

        mu = self.mean(out)
        assert self.prior_std is not None, "resolved by the trainer"
        noise = out.draw(mu.shape[1]) * self.prior_std * (self.log_var(out) / 2).exp()
        if self.sample == "after":
            # an empty slot is no code
            return torch.where(mu != 0, mu + noise, 0)
        z = mu + noise
        rank = z.detach().relu() if self.relu_mu else z.detach().abs()
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(
            1, rank.topk(self.k_now(out.moment), dim=1).indices, True
        )
        return torch.where(kept & (rank > 0), z, 0)

    def losses(self, out):
        import torch

        assert self.prior_std is not None and self.beta is not None, "resolved by the trainer"
        s, rho, mu = self.prior_std, self.log_var(out), self.mean(out)
        kl = 0.5 * ((mu / s).square() + rho.exp() - 1 - rho)
        if self.kl_on == "selected":
            kl = out.row_sum(torch.where(out.values.detach() != 0, kl, 0))
        else:
            kl = kl.sum(1)
        return {"kl": self.beta * ramp(out.moment, None, 0.1) * kl.mean()}

    def posterior(self, buffers, square_F):
        import torch

        if self.variance == "input":
            return None
        assert self.prior_std is not None, "kept by inference_options"
        fixed_F = torch.full_like(square_F, self.log_var_init)
        rho_F = (buffers["b_var"].to(square_F) if self.variance == "feature" else fixed_F).clamp(-10, 2)
        kl_F = 0.5 * (square_F / self.prior_std**2 + rho_F.exp() - 1 - rho_F)
        return self.prior_std * (rho_F / 2).exp(), kl_F

    def finish(self, sae, rows) -> dict:
        from saekit.variants.abs_topk import flip_signs

        if self.signed:
            flip_signs(sae, rows)
        return {}

    def inference_options(self) -> dict:
        names = ("k", "relu_mu", "prior_std", "variance", "log_var_init")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "Variational":
        names = ("k", "relu_mu", "prior_std", "variance", "log_var_init")
        return cls(**{name: options[name] for name in names}, d_sae=d_sae)

    def folded(self, buffers: dict, s: float):
        parts = {"b_var": 1.0, "W_var": s}
        assert self.prior_std is not None
        return replace(self, prior_std=self.prior_std / s), {name: buffers[name] * parts[name] for name in self.saved}
