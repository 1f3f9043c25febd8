"""What every variant has: the options of one SAE's training, and the hooks that a variant may fill.

    @dataclass(frozen=True, kw_only=True)
    class Cubed(Counted):                                     # 15 lines are a variant
        name: ClassVar[str] = "cubed"
        …
        def rule(self, at):
            return RowCount(self.k_now(at))

A variant is its frozen dataclass, options and mathematics in one file. It names its selection rule for training and for
inference; only if it must, it fills `values`, `losses`, `after_step`, `buffers`. Reconstruction loss, AuxK, dead-feature
counting, optimiser and schedule are the trainer's. The hooks see a `Moment` or a `Step` (saekit/step.py). No torch at the
top of these files: the command line reads them for its help.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from saekit.errors import SaekitError

if TYPE_CHECKING:
    from saekit_kernels.rules import Rule
    from torch import Tensor

    from saekit.sae import SAE
    from saekit.step import Moment, Step


class Start(NamedTuple):
    """What the buffers of a variant begin from."""

    d_model: int
    d_sae: int
    total_variance: float
    """V, of the normalised input."""
    seed: int


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Common options. Subclasses set `name`, `key` and `signed`, and define `rule` and `inference_options`."""

    name: ClassVar[str]
    """Key in VARIANTS; `abs_topk` is typed abs-topk on the command line."""
    lr_share: ClassVar[float] = 1.0
    """Of the common rule for the learning rate."""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    """Adam's."""
    saved: ClassVar[tuple[str, ...]] = ()
    """Buffers that inference needs; they go into `sae.safetensors`."""
    logged: ClassVar[tuple[str, ...]] = ()
    """Scalar buffers that stand in metrics.jsonl."""
    provisional: ClassVar[dict] = {}
    """What joins the options of config.json until `finish`."""

    d_sae: int | None = None
    """Number of features F; None = 16 × the width of the site."""
    lr: float | None = None
    """Learning rate; None = the rule of docs/variants.md, from the width, F and the number of steps."""
    normalise: Literal["unit", "mean_square", "sqrt_d", "none"] = "unit"
    """Input scale, folded into the saved weights: `unit` makes the variance of an activation 1, `mean_square` its mean square,
    `sqrt_d` its mean norm √D."""
    enc_init: Literal["fit", "tied", "kaiming"] = "fit"
    """Start of the encoder: the decoder's rows times the scale of the best first reconstruction, 1, or √(2D/F)."""
    b_dec: Literal["mean", "geometric_median", "zero"] = "mean"
    """Start of the decoder's bias."""
    dead_after: int | None = None
    """Tokens without a firing after which a feature counts as dead; None = min(10 M, tokens / 20)."""
    clip: float | None = None
    """Global gradient norm; None = no clipping."""
    ema: float = 0.0
    """Decay of an average of the weights, which is what is saved then; 0 = off, 0.999 is usual."""

    def __post_init__(self):
        if self.d_sae is not None and self.d_sae < 1:
            raise SaekitError(f"d_sae = {self.d_sae} is no number of features; pass at least 1")
        if not 0 <= self.ema < 1:
            raise SaekitError(f"ema = {self.ema} is no decay; pass 0 (off) or a number below 1, such as 0.999")
        for name in ("lr", "dead_after", "clip"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise SaekitError(f"{name} = {value}; it must be above 0, or left out")

    @property
    def key(self) -> Literal["relu", "abs"]:
        """What selection ranks: max(pre, 0) or |pre|."""
        return "relu"

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.key == "abs"

    def rule(self, at: "Moment") -> "Rule":
        """Selection rule of training."""
        raise TypeError(f"{type(self).__name__} names no rule")

    def inference_rule(self, at: "Moment") -> "Rule":
        """Selection rule of inference; never depends on the rest of the batch."""
        return self.rule(at)

    select: ClassVar[Callable | None] = None
    """`select(pre_BF) -> (B, F)`, differentiable: codes of a variant whose selection is no rule. It trains on dense matrices."""

    def values(self, out: "Step") -> "Tensor":
        """Codes at the slots, where these are not the pre-activations."""
        return out.pre

    values_at_inference: ClassVar[bool] = True
    """Whether `values`, where a variant has its own, holds at inference too."""

    @property
    def own_values(self) -> bool:
        """Whether codes differ from the kept pre-activations."""
        return type(self).values is not Variant.values

    @property
    def own_losses(self) -> bool:
        """Whether there are further losses."""
        return type(self).losses is not Variant.losses

    def losses(self, out: "Step") -> "dict[str, Tensor]":
        """Further losses by name, weighted; means over the tokens of the micro-batch."""
        return {}

    def after_step(self, out: "Step"):
        """Updates buffers after the optimiser's step, outside any graph."""

    def buffers(self, start: Start) -> "dict[str, Tensor]":
        """State between steps, by name; an nn.Parameter among it is trained. All of it is saved with a checkpoint."""
        return {}

    def revive(self, buffers: "Mapping[str, Tensor]", dead_after: int) -> "Tensor | None":
        """bool (F): features that AuxK trains although they are not dead."""
        return None

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        """Numbers of leading features that must reconstruct by themselves; ends in F."""
        return (d_sae,)

    @property
    def dense(self) -> bool:
        """Whether training needs all pre-activations of a batch at once."""
        return self.select is not None

    @property
    def keeps_all(self) -> bool:
        """Whether `values` chooses by itself, from all pre-activations of a batch."""
        return False

    def posterior(self, buffers: "Mapping[str, Tensor]", square_F: "Tensor") -> "tuple[Tensor, Tensor] | None":
        """Standard deviation of each feature's code and mean KL of a firing, (F) both, from the mean square of its codes where it
        fires; None where codes have no noise, or noise that depends on the input."""
        return None

    def finish(self, sae: "SAE", rows: "Callable[[int], Iterator[Tensor]]") -> dict:
        """Last work on the final SAE, in the model's units; `rows(n)` gives training rows in chunks. Returns what joins the
        options of config.json."""
        return {}

    def inference_options(self) -> dict:
        """What `config.json` keeps under `options`: what inference needs."""
        raise TypeError(f"{type(self).__name__} does not define inference_options")

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "Variant":
        """The variant that a saved SAE needs; training options are back at their defaults."""
        raise TypeError(f"{cls.__name__} cannot be read from options")

    def resolved(self, start: Start) -> "Variant":
        """The variant with what it computes from the data in place of None."""
        return self

    def folded(self, buffers: "dict[str, Tensor]", s: float) -> "tuple[Variant, dict[str, Tensor]]":
        """The variant and its saved buffers for input that is not multiplied by s: thresholds and biases are divided by it."""
        return self, {name: buffers[name] / s for name in self.saved}

    def saved_shapes(self, d_sae: int, d_model: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the saved buffers."""
        return {
            name: tuple(t.shape)
            for name, t in self.buffers(Start(d_model, d_sae, 1.0, 0)).items()
            if name in self.saved
        }

    def check(self, d_sae: int):
        """Refuses combinations that need the number of features."""

    def advice(self, d_sae: int, rows: int) -> str | None:
        """What to say before the first step about a selection batch of `rows`."""
        return None


@dataclass(frozen=True, kw_only=True)
class Revived(Variant):
    """A variant with AuxK."""

    aux: float = 1 / 32
    """Weight of AuxK, the loss that revives dead features; 0 = off."""
    k_aux: int | None = None
    """Dead features that AuxK keeps per token; None = D // 2, at most as many as are dead."""

    def __post_init__(self):
        super().__post_init__()
        if self.aux < 0:
            raise SaekitError(f"aux = {self.aux} would reward errors; pass 0 or more")
        if self.k_aux is not None and self.k_aux < 1:
            raise SaekitError(f"k_aux = {self.k_aux} keeps no feature; pass 1 or more, or --aux 0")


@dataclass(frozen=True, kw_only=True)
class Counted(Revived):
    """A variant whose sparsity is set by k."""

    k: int = 32
    """Features kept per token."""
    k_anneal: float = 0.0
    """Share of the steps over which k falls linearly from D to its value; 0 = off, 0.1 is usual."""

    def __post_init__(self):
        super().__post_init__()
        if self.k < 1:
            raise SaekitError(f"k = {self.k} keeps no feature; pass --k 1 or more")
        if not 0 <= self.k_anneal < 1:
            raise SaekitError(f"k_anneal = {self.k_anneal} is no share of the steps; pass 0 (off) to below 1")
        if self.d_sae is not None:
            self.check(self.d_sae)

    def check(self, d_sae: int):
        if self.k > d_sae:
            raise SaekitError(f"k = {self.k} exceeds d_sae = {d_sae}; lower --k or raise --d-sae")

    def k_now(self, at: "Moment") -> int:
        """k at this step."""
        if not self.k_anneal:
            return self.k
        left = max(0.0, 1 - at.progress / self.k_anneal)
        return max(self.k, round(self.k + (min(at.x_BD.shape[1], at.features) - self.k) * left))

    def inference_options(self) -> dict:
        return {"k": self.k}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int):
        return cls(k=options["k"], d_sae=d_sae)


RATE, RATE_STEPS, START, FREEZE = 0.01, 16, 0.03, 0.95


@dataclass(frozen=True, kw_only=True)
class Penalised(Variant):
    """A variant whose sparsity is set by a penalty λ, which a controller moves until L0 is `l0`.

    After the warm-up of the penalty λ ← λ · exp(rate · clip(log(fast² / (slow · l0)), −1, 1)), where fast and slow are averages of
    L0 with decay 0.9 and 0.98: fast² / slow is where L0 is going. The rate is 0.01 per step, 16 / steps in a short run; λ rests for
    the last 5 % of the steps.
    """

    logged: ClassVar[tuple[str, ...]] = ("lambda",)

    l0: float = 32.0
    """Features per token to aim at."""
    l1: float | None = None
    """Weight λ of the penalty, set by hand; None = the controller finds it."""

    def __post_init__(self):
        super().__post_init__()
        if self.l0 <= 0:
            raise SaekitError(f"l0 = {self.l0} keeps no feature; pass --l0 above 0")
        if self.l1 is not None and self.l1 < 0:
            raise SaekitError(f"l1 = {self.l1} would reward firing; pass 0 or more, or leave it out")

    def inference_options(self) -> dict:
        return {}

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int):
        return cls(d_sae=d_sae)

    def buffers(self, start: Start) -> "dict[str, Tensor]":
        import torch

        weight = torch.tensor(START if self.l1 is None else float(self.l1))
        l0 = torch.tensor(float(self.l0))
        return {"lambda": weight, "l0_fast": l0, "l0_slow": l0.clone()}

    def penalty(self, out: "Step") -> "Tensor":
        """λ · w, w the linear warm-up over min(5,000 steps, 10 %)."""
        return out.buffers["lambda"] * ramp(out.moment, 5000, 0.1)

    def after_step(self, out: "Step"):
        at, fast, slow = out.moment, out.buffers["l0_fast"], out.buffers["l0_slow"]
        l0 = out.firings_F.sum() / at.rows
        for mean, decay in ((fast, 0.9), (slow, 0.98)):
            mean.copy_(decay * mean + (1 - decay) * l0 if at.step else l0)
        if self.l1 is None and ramp(at, 5000, 0.1) >= 1 and at.progress < FREEZE:
            rate = RATE if at.steps is None else max(0.01, RATE_STEPS / at.steps)
            ahead = (fast.clamp(min=1e-3).square() / slow.clamp(min=1e-3) / self.l0).log()
            out.buffers["lambda"].mul_((rate * ahead.clamp(-1, 1)).exp())


def ramp(at: "Moment", most: int | None, share: float) -> float:
    """Linear warm-up from 1/n to 1 over n = min(most, share · steps) steps; over `most`, or 5,000, where the length is unknown."""
    if at.steps is None:
        over = 5000 if most is None else most
    else:
        over = share * at.steps if most is None else min(most, share * at.steps)
    return min(1.0, (at.step + 1) / max(1.0, over))
