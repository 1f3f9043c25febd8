"""Trainer: the state of one SAE in training, and one step.

    trainer = Trainer(sk.TopK(k=32, d_sae=24576), d_model=768)
    losses = trainer.step(x_BD)                        # {"rec": …, "aux": …}, tensors on the device

One step:
1. x = s · raw; pre-activations and codes by the variant's rule for training.
2. Idle counters from these codes; every 64 steps the list U of dead features.
3. L = Σ‖x − x̂‖² / (B·V) + aux · AuxK.
4. Gradients on sparse codes: no (B, F) matrix of codes exists, and no autograd graph except AuxK's on the dead rows.
5. The decoder's gradient loses its part along each unit row; clipping, if asked for; Adam; rows back to norm 1.

B tokens in a batch · D model width · F features · K kept per token · A dead features. Training state is in normalised
units; `sae()` folds the scale s into the weights it hands out.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from saekit_kernels import (
    ExtraRows,
    Workspace,
    aux_decode,
    decode_residual_value_grad,
    encode_select,
    row_adam_,
    segment_weight_grads,
)
from torch import Tensor

from saekit import losses, optim
from saekit.device import resolve_compute, resolve_device
from saekit.errors import SaekitError
from saekit.sae import SAE
from saekit.variants import Variant

REBUILD_EVERY = 64
FIT_ROWS = 4096
# idle counters are compared with this many tokens where the length of the run is unknown or large
DEAD_AFTER = 10_000_000


@dataclass(frozen=True)
class InputStatistics:
    """What normalisation needs, in raw units, over the training rows."""

    mean_D: Tensor
    """Mean activation."""
    total_variance: float
    """E‖raw − E raw‖²."""


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose): initialisation never shares numbers with anything else."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Trainer:
    """One SAE in training.

    `statistics` = None: the input counts as normalised already (scale 1, mean 0, V = D). `tokens` = None: the length of
    the run is unknown, hence constant learning rate after warm-up and `dead_after` 10 M. The encoder's scale is fitted
    on `fit_rows` (raw units), or on the first batch.

    Raises SaekitError for options that do not go together (k above d_sae) or an input of another width.
    """

    def __init__(
        self,
        variant: Variant,
        d_model: int,
        *,
        statistics: InputStatistics | None = None,
        tokens: int | None = None,
        fit_rows: Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        compute: str = "auto",
    ):
        D, F = d_model, variant.d_sae or 16 * d_model
        variant.check(F)
        self.variant, self.d_model, self.d_sae, self.tokens, self.seed = variant, D, F, tokens, seed
        self.device = resolve_device(str(device))
        self.compute, self.compute_reason = resolve_compute(compute, self.device)
        self.dead_after = variant.dead_after or (
            DEAD_AFTER if tokens is None else max(1, min(DEAD_AFTER, tokens // 20))
        )

        mean_D = torch.zeros(D) if statistics is None else statistics.mean_D.float()
        variance = float(D) if statistics is None else statistics.total_variance
        if not (math.isfinite(variance) and variance > 0):
            raise SaekitError(f"the activations have total variance {variance}; there is nothing to learn from them")
        self.scale = 1 / math.sqrt(variance) if statistics is not None and variant.normalise == "unit" else 1.0
        self.total_variance = variance * self.scale**2

        directions = torch.randn(F, D, generator=generator(seed, "decoder"))
        self.W_dec = (directions / directions.norm(dim=1, keepdim=True)).to(self.device)
        self.W_enc = self.W_dec.clone()
        self.b_enc = torch.zeros(F, device=self.device)
        self.b_dec = (mean_D * self.scale if variant.b_dec == "mean" else torch.zeros(D)).to(self.device)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters().items()}
        # kept for the life of the run: fresh buffers of this size cost their page faults in every step
        self.workspace = Workspace()
        self.gradients = (torch.empty_like(self.W_dec), torch.empty_like(self.W_enc))
        self.idle_F = torch.zeros(F, dtype=torch.int64, device=self.device)
        self.dead_ids = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.step_count = 0
        self.steps: int | None = None
        self.lr: float | None = None
        self.bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.sums: dict[str, Tensor] = {}
        self.logged_steps = 0
        self.fitted = variant.enc_init != "fit"
        if variant.enc_init == "kaiming":
            self.W_enc *= math.sqrt(2 * D / F)
        if fit_rows is not None and not self.fitted:
            self._fit_encoder(fit_rows)

    def parameters(self) -> dict[str, Tensor]:
        return {"W_enc": self.W_enc, "W_dec": self.W_dec, "b_enc": self.b_enc, "b_dec": self.b_dec}

    def normalised(self, raw_BD: Tensor) -> Tensor:
        if raw_BD.ndim != 2 or raw_BD.shape[1] != self.d_model:
            raise SaekitError(
                f"this Trainer was made for d_model = {self.d_model}, the batch has "
                + (
                    f"width {raw_BD.shape[1]}"
                    if raw_BD.ndim == 2
                    else f"shape {tuple(raw_BD.shape)}; flatten it to (tokens, D)"
                )
            )
        x_BD = raw_BD.to(self.device, torch.float32)
        return x_BD * self.scale if self.scale != 1.0 else x_BD

    def _select(self, x_BD: Tensor, *, csc: bool):
        progress = self.step_count / self.steps if self.steps else 0.0
        return encode_select(
            x_BD,
            self.W_enc,
            self.b_enc,
            self.b_dec,
            rule=self.variant.rule(progress),
            key=self.variant.key,
            compute=self.compute,
            csc=csc,
            workspace=self.workspace,
        )

    def _fit_encoder(self, raw_BD: Tensor):
        """Scales W_enc so that the first reconstruction is the best multiple: ⟨x, x̂⟩ / ⟨x̂, x̂⟩, without b_dec."""
        x_BD = self.normalised(raw_BD[:FIT_ROWS])
        y_BD = self._select(x_BD, csc=False).codes.times(self.W_dec)
        norm = (y_BD * y_BD).sum().item()
        if norm > 0:
            self.W_enc *= ((x_BD - self.b_dec) * y_BD).sum().item() / norm
        self.fitted = True

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> dict[str, Tensor]:
        """One step on a batch (B, D) in the store's units; returns the named losses, weighted, as 0-d tensors."""
        if not self.fitted:
            self._fit_encoder(x_BD)
        x_BD = self.normalised(x_BD)
        B = x_BD.shape[0]
        if self.lr is None:
            self.steps = None if self.tokens is None else max(1, self.tokens // B)
            self.lr = self.variant.lr if self.variant.lr is not None else optim.default_lr(self.d_sae, self.steps)

        selected = self._select(x_BD, csc=True)
        codes, csc = selected.codes, selected.csc
        self._count_idle(codes.fired_F(), B)

        sq_B, residual_BD, dv_N = decode_residual_value_grad(codes, self.W_dec, self.b_dec, x_BD)
        named = {"rec": losses.reconstruction(sq_B, self.total_variance)}
        # dL/d‖e_b‖² is the same number for every token
        slope = -2.0 / (B * self.total_variance)
        coef_enc_N = dv_N * slope
        coef_dec_N = codes.values * slope
        g_b_dec = residual_BD.sum(0) * slope

        extra = None
        weight = getattr(self.variant, "aux", 0.0)
        if weight and len(self.dead_ids):
            named["aux"], extra = self._aux(x_BD, residual_BD, weight)

        gW_dec, gW_enc, gb_enc, row_sq_F = segment_weight_grads(
            csc,
            coef_dec_N,
            residual_BD,
            coef_enc_N,
            x_BD - self.b_dec,
            extra=extra,
            project_onto=self.W_dec,
            out=self.gradients,
        )
        # through x − b_dec, for AuxK's pre-activations too: their bias gradients are in gb_enc
        g_b_dec -= gb_enc @ self.W_enc
        sq_norm = row_sq_F.sum() + gb_enc.square().sum() + g_b_dec.square().sum()
        grad_norm = sq_norm.sqrt()
        if self.variant.clip is not None:
            shrink = (self.variant.clip / grad_norm.clamp_min(1e-30)).clamp_max(1.0)
            for g in (gW_dec, gW_enc, gb_enc, g_b_dec):
                g *= shrink
        self._adam({"W_enc": gW_enc, "W_dec": gW_dec, "b_enc": gb_enc, "b_dec": g_b_dec})

        loss = sum(named.values())
        good = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.bad = torch.where((self.bad < 0) & ~good, torch.full_like(self.bad, self.step_count), self.bad)
        l0 = codes.l0().sum() / B
        self._add(
            loss=loss,
            **named,
            fvu=named["rec"],
            l0=l0,
            grad_norm=grad_norm,
            budget_unspent=1 - l0 / getattr(self.variant, "k", math.inf),
        )
        self.step_count += 1
        return named

    def _count_idle(self, fired_F: Tensor, B: int):
        """Counters first, then U, then the losses; a member of U that has fired since is masked at once."""
        self.idle_F += B
        self.idle_F.masked_fill_(fired_F, 0)
        if self.step_count % REBUILD_EVERY == 0:
            self.dead_ids = (self.idle_F >= self.dead_after).nonzero().squeeze(1)

    def _aux(self, x_BD: Tensor, residual_BD: Tensor, weight: float):
        """AuxK on copies of the dead rows: its loss, and its gradients on these rows."""
        ids = self.dead_ids
        W_enc, W_dec, b_enc = (p[ids].requires_grad_() for p in (self.W_enc, self.W_dec, self.b_enc))
        k_aux = min(getattr(self.variant, "k_aux", None) or self.d_model // 2, len(ids))
        with torch.enable_grad():
            y_BD = aux_decode(
                x_BD,
                self.b_dec,
                None,
                W_enc,
                b_enc,
                W_dec,
                k_aux=k_aux,
                key=self.variant.key,
                off_A=self.idle_F[ids] < self.dead_after,
            )
            loss = weight * losses.auxk(residual_BD, y_BD)
        g_enc, g_dec, g_bias = torch.autograd.grad(loss, (W_enc, W_dec, b_enc))
        return loss.detach(), ExtraRows(ids, g_dec, g_enc, g_bias)

    def _adam(self, gradients: dict[str, Tensor]):
        assert self.lr is not None, "step() fixes it before the first update"
        lr = self.lr * optim.lr_scale(self.step_count, self.steps)
        for name, w in self.parameters().items():
            m, v = self.moments[name]
            if w.ndim == 1:
                w, m, v, g = w[None], m[None], v[None], gradients[name][None]
            else:
                g = gradients[name]
            row_adam_(
                w,
                m,
                v,
                g,
                step=self.step_count + 1,
                lr=lr,
                b1=optim.BETAS[0],
                b2=optim.BETAS[1],
                eps=optim.EPS,
                unit_norm=name == "W_dec",
            )

    def _add(self, **values: Tensor):
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.logged_steps += 1

    def log(self) -> dict:
        """Means over the steps since the last call, with `dead` and `lr` as they are now.

        Raises SaekitError if a loss or gradient has become infinite or NaN since the last call.
        """
        self.raise_if_bad()
        values = {name: (total / max(1, self.logged_steps)).item() for name, total in self.sums.items()}
        self.sums, self.logged_steps = {}, 0
        return {
            **values,
            "dead": int((self.idle_F >= self.dead_after).sum()),
            "lr": (self.lr or 0.0) * optim.lr_scale(max(0, self.step_count - 1), self.steps),
        }

    def raise_if_bad(self):
        step = self.bad.item()
        if step >= 0:
            raise SaekitError(
                f"loss or gradient norm became infinite or NaN at step {step}; nothing was saved since; "
                "look at the rows of that batch with saekit check, or lower --lr"
            )

    def sae(self, config: dict | None = None) -> SAE:
        """The SAE as it is now, for raw activations: biases are divided by the input scale, matrices stay."""
        s = self.scale
        return SAE(self.variant, self.W_enc.clone(), self.W_dec.clone(), self.b_enc / s, self.b_dec / s, config)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain values): all that a later step depends on."""
        tensors = dict(self.parameters())
        for name, (m, v) in self.moments.items():
            tensors[f"adam_m.{name}"], tensors[f"adam_v.{name}"] = m, v
        tensors |= {"idle": self.idle_F, "dead_ids": self.dead_ids}
        tensors |= {f"sum.{name}": total.reshape(1) for name, total in self.sums.items()}
        return tensors, {
            "step": self.step_count,
            "steps": self.steps,
            "lr": self.lr,
            "logged_steps": self.logged_steps,
            "fitted": self.fitted,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict):
        for name, p in self.parameters().items():
            p.copy_(tensors[name])
            for moment, kind in zip(self.moments[name], ("m", "v"), strict=True):
                moment.copy_(tensors[f"adam_{kind}.{name}"])
        self.idle_F.copy_(tensors["idle"])
        self.dead_ids = tensors["dead_ids"].to(self.device)
        self.sums = {k[4:]: t[0].to(self.device) for k, t in tensors.items() if k.startswith("sum.")}
        self.step_count, self.steps, self.lr = values["step"], values["steps"], values["lr"]
        self.logged_steps, self.fitted = values["logged_steps"], values["fitted"]
