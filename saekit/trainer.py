"""Trainer: the state of one SAE in training, and one step.

    trainer = Trainer(sk.TopK(k=32, d_sae=24576), d_model=768)
    losses = trainer.step(x_BD)                        # {"rec": …, "aux": …}, tensors on the device

One step:
1. x = s · raw; pre-activations and codes by the variant's rule for training.
2. Idle counters from these codes; every 64 steps, in short runs a hundred times, the list U of dead features.
3. L = Σ‖x − x̂‖² / (B·V) + aux · AuxK + the variant's losses; gradients (saekit/backward.py), then their mean over ranks.
4. The decoder's gradient loses its part along each unit row; clipping, if asked for; Adam; rows back to norm 1.
5. The variant updates its buffers.

B tokens in a batch · D model width · F features · A features that AuxK trains. Training state is in normalised units; `sae()`
folds the scale s into the weights it hands out.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from saekit_kernels import Codes, RowCount, RowMass, Rule, Threshold, Workspace, row_adam_, segment_adam_
from torch import Tensor
from torch.nn import Parameter

from saekit import backward, optim
from saekit.device import resolve_compute, resolve_device
from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.ranks import Ranks
from saekit.sae import SAE
from saekit.step import Moment, Slots, Step
from saekit.variants.base import Start, Variant

REBUILD_EVERY = 64
FIT_ROWS = 4096
# idle counters are compared with this many tokens where the length of the run is unknown or large
DEAD_AFTER = 10_000_000
# more features per token than one in so many, and dense products are faster than sparse ones: one thread, AVX2, ms per
# micro-batch dense and sparse at F/16, F/8, F/4: 144 and 56, 127 and 82, 137 and 135 (D = 192, F = 1,536, B = 2,048)
DENSE_SHARE = 8
# rules that leave the number of codes open
BY_SIZE = (Threshold, RowMass)


@dataclass(frozen=True)
class InputStatistics:
    """What normalisation needs, in raw units, over the training rows."""

    mean_D: Tensor
    """Mean activation."""
    total_variance: float
    """E‖raw − E raw‖²."""
    mean_norm: float | None = None
    """E‖raw‖, for `sqrt_d`."""

    def scale(self, normalise: str) -> float:
        """The factor s of the input."""
        if normalise == "none":
            return 1.0
        if normalise == "unit":
            return 1 / math.sqrt(self.total_variance)
        if normalise == "sqrt_d" and self.mean_norm is None:
            raise SaekitError(
                "normalise = sqrt_d needs the mean norm of an activation; pass mean_norm= with the statistics"
            )
        if normalise == "mean_square":
            return 1 / math.sqrt(self.total_variance + float(self.mean_D.double().square().sum()))
        assert self.mean_norm is not None
        return math.sqrt(len(self.mean_D)) / self.mean_norm


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose): initialisation never shares numbers with anything else."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Trainer:
    """One SAE in training.

    `statistics` = None: the input counts as normalised already (scale 1, mean 0, V = D). `tokens` = None: the length of
    the run is unknown, hence constant learning rate after warm-up and `dead_after` 10 M. The encoder's scale is fitted
    on `fit_rows` (raw units), or on the first batch. With several `ranks` each gives its own rows of the global batch.

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
        micro_batches: int = 1,
        ranks: Ranks | None = None,
    ):
        D, F = d_model, variant.d_sae or 16 * d_model
        variant.check(F)
        if getattr(variant, "k_anneal", 0) and tokens is None:
            raise SaekitError(f"k_anneal = {variant.k_anneal} needs the length of the run; pass tokens=")  # pyright: ignore
        self.d_model, self.d_sae, self.tokens, self.seed = D, F, tokens, seed
        self.device = resolve_device(str(device))
        self.compute, self.compute_reason = resolve_compute(compute, self.device)
        if micro_batches < 1:
            raise SaekitError(f"micro_batches = {micro_batches}; it must be at least 1")
        self.micro_batches, self.ranks = micro_batches, ranks or Ranks()
        self.dead_after = variant.dead_after or (
            DEAD_AFTER if tokens is None else max(1, min(DEAD_AFTER, tokens // 20))
        )

        if statistics is None:
            mean_D, variance, self.scale = torch.zeros(D), float(D), 1.0
        else:
            mean_D, variance = statistics.mean_D.float(), statistics.total_variance
            if not (math.isfinite(variance) and variance > 0):
                raise SaekitError(
                    f"the activations have total variance {variance}; there is nothing to learn from them"
                )
            self.scale = statistics.scale(variant.normalise)
        self.total_variance = variance * self.scale**2
        start = Start(D, F, self.total_variance, seed)
        self.variant = variant = replace(variant, d_sae=F).resolved(start)

        try:
            self.variant.inference_options()
        except TypeError as error:
            raise SaekitError(f"variant {variant.name} could not be saved: {error}") from None

        directions = torch.randn(F, D, generator=generator(seed, "decoder"))
        W_dec = (directions / directions.norm(dim=1, keepdim=True)).to(self.device)
        b_dec = torch.zeros(D) if variant.b_dec == "zero" else mean_D * self.scale
        if variant.b_dec == "geometric_median":
            if fit_rows is None:
                raise SaekitError("b_dec = geometric_median needs rows to take it from; pass fit_rows=")
            b_dec = optim.geometric_median(self.normalised(fit_rows))
        self._parameters = {
            "W_enc": W_dec.clone(),
            "W_dec": W_dec,
            "b_enc": torch.zeros(F, device=self.device),
            "b_dec": b_dec.to(self.device),
        }
        self.buffers: dict[str, Tensor] = {}
        for name, tensor in self.variant.buffers(start).items():
            place = self._parameters if isinstance(tensor, Parameter) else self.buffers
            place[name] = tensor.detach().to(self.device)
        self.moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self._parameters.items()}
        self.averages = {name: torch.zeros_like(p) for name, p in self._parameters.items()} if variant.ema else {}
        self.workspace = Workspace()
        self._accumulating = False
        # of the step in hand: rows of this rank, the first of the micro-batch among them, normals drawn for them
        self._rows, self._first_row = 0, 0
        self._noise: tuple[tuple[int, int], Tensor] | None = None
        self.idle_F = torch.zeros(F, dtype=torch.int64, device=self.device)
        self.aux_ids = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.aux_under = torch.zeros(0, dtype=torch.bool, device=self.device)
        self.hint: Tensor | None = None
        self.l0 = float(F)
        self.step_count, self.rebuild_every = 0, REBUILD_EVERY
        self.steps: int | None = None
        self.lr: float | None = None
        self.bad = torch.full((2,), -1, dtype=torch.int64, device=self.device)
        self.sums: dict[str, Tensor] = {}
        self.logged_steps = 0
        self.fitted = variant.enc_init != "fit"
        if variant.enc_init == "kaiming":
            self.W_enc.mul_(math.sqrt(2 * D / F))
        if fit_rows is not None and not self.fitted:
            self._fit_encoder(fit_rows[:FIT_ROWS], Ranks())

    def parameters(self) -> dict[str, Tensor]:
        """W_enc (F, D), W_dec (F, D), b_enc (F), b_dec (D), and what the variant trains."""
        return self._parameters

    @property
    def W_enc(self) -> Tensor:
        return self._parameters["W_enc"]

    @property
    def W_dec(self) -> Tensor:
        return self._parameters["W_dec"]

    @property
    def b_enc(self) -> Tensor:
        return self._parameters["b_enc"]

    @property
    def b_dec(self) -> Tensor:
        return self._parameters["b_dec"]

    @property
    def gradients_stay_in_blocks(self) -> bool:
        """Whether the gradients of W_enc and W_dec are used up row by row, and never whole in memory."""
        whole = self.micro_batches > 1 or self.ranks.size > 1 or self.variant.clip is not None
        return not (whole or self.variant.dense)

    def nbytes(self) -> dict[str, int]:
        """Bytes held between steps, by kind."""

        def size(tensors) -> int:
            return sum(t.numel() * t.element_size() for t in tensors)

        return {
            "weights": size([*self._parameters.values(), *self.averages.values()]),
            "gradients": 0 if self.gradients_stay_in_blocks else 2 * size([self.W_enc]) * min(2, self.micro_batches),
            "adam": size(t for pair in self.moments.values() for t in pair),
            "buffers": size([*self.buffers.values(), self.idle_F]),
        }

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

    def moment(self, x_BD: Tensor, rows: int) -> Moment:
        return Moment(x_BD, self.b_dec, self.buffers | self._parameters, rows, self.d_sae, self.step_count, self.steps)

    def _rule(self, at: Moment) -> Rule | None:
        """What this micro-batch is selected by; None where the variant chooses by itself."""
        return None if self.variant.select is not None or self.variant.keeps_all else self.variant.rule(at)

    def _is_dense(self, rule: Rule | None) -> bool:
        """Whether a step runs on dense matrices: by option, or because many features fire (as of the step before)."""
        return self.variant.dense or (isinstance(rule, BY_SIZE) and self.l0 * DENSE_SHARE > self.d_sae)

    def _fit_encoder(self, raw_BD: Tensor, ranks: Ranks):
        """Scales W_enc so that the first reconstruction is the best multiple: ⟨x, x̂⟩ / ⟨x̂, x̂⟩, without b_dec."""
        x_BD = self.normalised(raw_BD)
        at = self.moment(x_BD, len(x_BD) * ranks.size)
        select = self.variant.select
        rule = self._rule(at)
        last = None if select is not None else self.variant.inference_rule(at)
        # what is kept of a row in the end, where that is a number
        rule = last if isinstance(last, RowCount) else rule
        if rule is None or (self._is_dense(rule) and not isinstance(rule, RowCount)):
            pre_BF = (x_BD - self.b_dec) @ self.W_enc.T
            codes = pre_BF if self.variant.key == "abs" else pre_BF.relu()
            codes = codes if select is None else select(pre_BF)
            y_BD = codes.times(self.W_dec) if isinstance(codes, Codes) else codes @ self.W_dec
        else:
            y_BD = backward.selected(self, x_BD, rule, ranks, csc=False).codes.times(self.W_dec)
        products = torch.stack([((x_BD - self.b_dec) * y_BD).sum(), (y_BD * y_BD).sum()]).double()
        ranks.sum_([products])
        along, norm = products.tolist()
        if norm > 0:
            self.W_enc.mul_(along / norm)
        self.hint = None
        self.fitted = True

    @torch.no_grad()
    def step(self, x_BD: Tensor) -> dict[str, Tensor]:
        """One step on a batch (B, D) in the store's units; returns the named losses, weighted, as 0-d tensors."""
        if x_BD.shape[0] == 0:
            raise SaekitError("a step needs at least one row")
        if x_BD.shape[0] % self.micro_batches:
            raise SaekitError(f"{x_BD.shape[0]} rows are not divisible by {self.micro_batches} micro-batches")
        if self.lr is None:
            self._begin(x_BD.shape[0] * self.ranks.size)
        if not self.fitted:
            self._fit_encoder(x_BD[:FIT_ROWS], self.ranks)
        x_BD = self.normalised(x_BD)
        rows = len(x_BD) * self.ranks.size
        self._rows, self._first_row = len(x_BD), 0
        named, extra, gradients, bars = {}, {}, {}, []
        firings_F = torch.zeros_like(self.idle_F)
        share = 1 / self.micro_batches
        for i, part_BD in enumerate(x_BD.split(len(x_BD) // self.micro_batches)):
            self._accumulating = i > 0
            at = self.moment(part_BD, len(part_BD) * self.ranks.size)
            rule = self._rule(at)
            if rule is None or self._is_dense(rule):
                found = backward.dense(self, part_BD, at, rule, share)
            else:
                found = backward.sparse(self, part_BD, at, rule, share)
            self._first_row += len(part_BD)
            for total, values in ((named, found.named), (extra, found.extra)):
                for name, value in values.items():
                    total[name] = total.get(name, 0) + value * share
            if not self.gradients_stay_in_blocks or found.gradients.keys() & {"W_dec", "W_enc"}:
                backward.add_up(found, *self._gradient_buffers())
            gradients = found.gradients if i == 0 else {n: gradients[n].add_(g) for n, g in found.gradients.items()}
            firings_F += found.out.firings_F
            if found.out.threshold is not None:
                bars.append(found.out.threshold)

        loss = sum(named.values(), torch.zeros((), device=self.device))
        self.ranks.mean_([*gradients.values(), loss])
        grad_norm, sq_F = self._descend(gradients, found.segments)
        self._notice(loss, grad_norm, sq_F)
        out = found.out
        out.moment, out.firings_F = out.moment._replace(x_BD=x_BD, rows=rows), firings_F
        out.threshold = _mean_of_kept(torch.stack(bars)) if bars else None
        self.variant.after_step(out)
        for name, average in self.averages.items():
            average.lerp_(self._parameters[name], 1 - self.variant.ema)
        l0 = firings_F.sum() / rows
        if isinstance(rule, BY_SIZE):
            self.l0 = float(l0)
        self._add(named, loss=loss, **extra, l0=l0, grad_norm=grad_norm)
        self.step_count += 1
        return named

    def _begin(self, rows: int):
        """What needs the size of a batch."""
        self.steps = None if self.tokens is None else max(1, self.tokens // rows)
        self.lr = optim.learning_rate(self.variant, self.d_model, self.d_sae, self.steps)
        # so rarely that nothing waits for the device, so often that a short run revives what dies
        self.rebuild_every = REBUILD_EVERY if self.steps is None else max(1, min(REBUILD_EVERY, self.steps // 100))
        advice = self.variant.advice(self.d_sae, rows // self.micro_batches)
        dense = f"{self.variant.name} trains on dense matrices of pre-activations" if self.variant.dense else None
        for line in filter(None, (advice, dense)):
            if self.ranks.rank == 0:
                Progress.say(line)

    def _gradient_buffers(self) -> tuple[Tensor, Tensor]:
        """(F, D) for W_dec and W_enc, to be written whole; kept, since fresh ones cost their page faults in every step."""
        kind, shape = "part" if self._accumulating else "sum", (self.d_sae, self.d_model)
        dec, enc = (self.workspace.get(f"gradient {name}, {kind}", shape, self.W_dec) for name in ("W_dec", "W_enc"))
        return dec, enc

    def out(self, slots: Slots, at: Moment, parameters: dict[str, Tensor]) -> Step:
        return Step(slots, at, parameters, self.total_variance, self.dead_after, self._draw, self._mean_over_ranks)

    def _draw(self, n: int) -> Tensor:
        """Normals (B, n) of this micro-batch's rows; row i of this rank is row i·R + r of the global batch."""
        R, r = self.ranks.size, self.ranks.rank
        if self._noise is None or self._noise[0] != (self.step_count, n):
            noise = torch.randn(self._rows * R, n, generator=generator(self.seed, f"noise {self.step_count}"))
            self._noise = (self.step_count, n), noise[r::R].to(self.device)
        return self._noise[1][self._first_row : self._first_row + self._rows // self.micro_batches]

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        mean = value.detach().clone()
        self.ranks.mean_([mean])
        return value + (mean - value.detach())

    def count(self, out: Step, firings_F: Tensor):
        """Counters first, then U, then the losses; a member of U that has fired since is masked at once."""
        self.ranks.sum_([firings_F])
        out.firings_F = firings_F
        self.idle_F += out.moment.rows
        self.idle_F.masked_fill_(firings_F > 0, 0)
        if self.step_count % self.rebuild_every == 0 and not self._accumulating:
            dead_F = self.idle_F >= self.dead_after
            under_F = self.variant.revive(self.buffers, self.dead_after)
            wanted_F = dead_F if under_F is None else dead_F | under_F
            self.aux_ids = wanted_F.nonzero().squeeze(1)
            self.aux_under = torch.zeros_like(dead_F)[self.aux_ids] if under_F is None else under_F[self.aux_ids]

    def _descend(self, gradients: dict[str, Tensor], segments: list[backward.Segment]) -> tuple[Tensor, Tensor]:
        """Projection, clipping, Adam. Returns the norm before clipping and, by feature, the square of its gradients' norm."""
        assert self.lr is not None, "_begin() fixes it before the first update"
        lr = self.lr * optim.lr_scale(self.step_count, self.steps)
        b1, b2 = self.variant.betas
        adam = {"step": self.step_count + 1, "lr": lr, "b1": b1, "b2": b2, "eps": optim.EPS}
        if segments:
            sq_F = torch.empty_like(self.b_enc)
            for segment in segments:
                rows = segment.rows
                m_dec, v_dec, m_enc, v_enc = (t[rows] for name in ("W_dec", "W_enc") for t in self.moments[name])
                sq_F[rows] = segment_adam_(
                    *segment.sums,
                    self.W_dec[rows],
                    self.W_enc[rows],
                    (m_dec, v_dec),
                    (m_enc, v_enc),
                    extra=segment.aux,
                    **adam,
                )
        else:
            g_dec = gradients["W_dec"]
            g_dec.addcmul_(torch.linalg.vecdot(g_dec, self.W_dec)[:, None], self.W_dec, value=-1)
            # row by row: a matrix of 75 MB and its squares do not fit a cache
            sq_F = torch.linalg.vecdot(g_dec, g_dec) + torch.linalg.vecdot(gradients["W_enc"], gradients["W_enc"])
        others = {name: g for name, g in gradients.items() if name not in ("W_dec", "W_enc")}
        grad_norm = torch.stack([sq_F.sum(), *(g.square().sum() for g in others.values())]).sum().sqrt()
        shrink = None
        if self.variant.clip is not None:
            shrink = (self.variant.clip / grad_norm.clamp_min(1e-30)).clamp_max(1.0)
        for name, g in (others if segments else gradients).items():
            w, m, v, g = (t if t.ndim == 2 else t[None] for t in (self._parameters[name], *self.moments[name], g))
            row_adam_(w, m, v, g, unit_norm=name == "W_dec", grad_scale=shrink, **adam)
        return grad_norm, sq_F

    def _notice(self, loss: Tensor, grad_norm: Tensor, sq_F: Tensor):
        """A sticky flag on the device: the first step whose loss or gradient is not finite, and the first feature of it."""
        good, bad_F = torch.isfinite(loss) & torch.isfinite(grad_norm), ~sq_F.isfinite()
        feature = torch.where(bad_F.any(), bad_F.to(torch.int8).argmax(), -1)
        found = torch.stack([torch.full_like(feature, self.step_count), feature])
        self.bad = torch.where((self.bad[0] < 0) & ~good, found, self.bad)

    def _add(self, own: dict[str, Tensor], **values: Tensor):
        if clash := own.keys() & (values.keys() | {"dead", "lr"}):
            raise SaekitError(
                f"{self.variant.name} calls a loss {min(clash)}, which is a key of the log; name it otherwise"
            )
        values |= own
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.logged_steps += 1

    def log(self) -> dict:
        """Means over the steps since the last call and over ranks, with `dead`, `lr` and scalar buffers as they are now.

        Raises SaekitError if a loss, gradient or decoder row is no longer finite.
        """
        self.raise_if_bad()
        names = sorted(self.sums)
        means = [(self.sums[name] / max(1, self.logged_steps)).double() for name in names]
        self.ranks.mean_(means)
        self.sums, self.logged_steps = {}, 0
        return {
            **{name: mean.item() for name, mean in zip(names, means, strict=True)},
            "dead": int((self.idle_F >= self.dead_after).sum()),
            "lr": (self.lr or 0.0) * optim.lr_scale(max(0, self.step_count - 1), self.steps),
            **{name: t.item() for name, t in self.buffers.items() if name in self.variant.logged},
        }

    def raise_if_bad(self):
        step, feature = self.bad.tolist()
        if step >= 0:
            where = f", first in the gradient of feature {feature:,}" if feature >= 0 else ""
            raise SaekitError(
                f"loss or gradient norm became infinite or NaN in step {step + 1:,}{where}; nothing was saved since; "
                "look at the rows of that batch with saekit check, or lower --lr"
            )
        off_F = (torch.linalg.vector_norm(self.W_dec, dim=1) - 1).abs().nan_to_num(torch.inf)
        if float(off_F.max()) > 1e-3:
            raise SaekitError(
                f"the decoder row of feature {int(off_F.argmax()):,} overflowed by step {self.step_count:,}; nothing was saved "
                "since; lower --lr"
            )

    def sae(self, config: dict | None = None) -> SAE:
        """The SAE as it is now, for raw activations: biases and thresholds are divided by the input scale, matrices stay."""
        s, weights = self.scale, {name: p.clone() for name, p in self._parameters.items()}
        if self.averages and self.step_count:
            weights = {name: t / (1 - self.variant.ema**self.step_count) for name, t in self.averages.items()}
            weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True).clamp_min(1e-12)
        variant, extra = self.variant.folded({**self.buffers, **weights}, s)
        matrices = weights["W_enc"], weights["W_dec"]
        extra = {name: t.clone() for name, t in extra.items()}
        return SAE(variant, *matrices, weights["b_enc"] / s, weights["b_dec"] / s, config, extra, variant.provisional)

    def finish(self, config: dict | None, rows: Callable[[int], Iterator[Tensor]]) -> SAE:
        """The final SAE: thresholds calibrated, signs in their gauge. `rows(n)`: about the first n training rows, raw, in chunks."""
        sae = self.sae(config)
        sae.options = {**sae.options, **sae.variant.finish(sae, rows)}
        return sae

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, plain values): all that a later step depends on. The sums of the log are this rank's."""
        tensors = dict(self._parameters)
        for name, (m, v) in self.moments.items():
            tensors[f"adam_m.{name}"], tensors[f"adam_v.{name}"] = m, v
        tensors |= {f"buffer.{name}": t.reshape(-1) for name, t in self.buffers.items()}
        tensors |= {f"average.{name}": t for name, t in self.averages.items()}
        tensors |= {"idle": self.idle_F, "aux_ids": self.aux_ids, "aux_under": self.aux_under.to(torch.uint8)}
        if self.hint is not None:
            # it changes which products are computed anew, and those round otherwise
            tensors["hint"] = self.hint.reshape(-1)
        tensors |= {f"sum.{name}": total.reshape(1) for name, total in self.sums.items()}
        return tensors, {
            "step": self.step_count,
            "steps": self.steps,
            "lr": self.lr,
            "l0": self.l0,
            "logged_steps": self.logged_steps,
            "rebuild_every": self.rebuild_every,
            "fitted": self.fitted,
        }

    def restore(self, tensors: dict[str, Tensor], values: dict):
        for name, p in self._parameters.items():
            p.copy_(tensors[name])
            for moment, kind in zip(self.moments[name], ("m", "v"), strict=True):
                moment.copy_(tensors[f"adam_{kind}.{name}"])
        for name, buffer in self.buffers.items():
            buffer.copy_(tensors[f"buffer.{name}"].view_as(buffer))
        for name, average in self.averages.items():
            average.copy_(tensors[f"average.{name}"])
        self.idle_F.copy_(tensors["idle"])
        self.aux_ids = tensors["aux_ids"].to(self.device)
        self.aux_under = tensors["aux_under"].to(self.device, torch.bool)
        hint = tensors.get("hint")
        self.hint = None if hint is None else hint.to(self.device).view(-1 if len(hint) > 1 else ())
        self.sums = {k[4:]: t[0].to(self.device) for k, t in tensors.items() if k.startswith("sum.")}
        self.step_count, self.steps, self.lr, self.l0 = (values[k] for k in ("step", "steps", "lr", "l0"))
        self.logged_steps, self.fitted, self.rebuild_every = (
            values[k] for k in ("logged_steps", "fitted", "rebuild_every")
        )


def _mean_of_kept(bars: Tensor) -> Tensor:
    """Mean over micro-batches of the smallest kept keys, without those that kept nothing."""
    return bars.sum(0) / (bars > 0).sum(0).clamp_min(1)
