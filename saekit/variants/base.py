"""What every variant has: the options of one SAE's training, and the hooks that a variant may fill.

A variant is its frozen dataclass, options and mathematics in one file. It names its selection rule for training and for
inference; reconstruction loss, AuxK, dead-feature counting, optimiser and schedule are the trainer's.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saekit.errors import SaekitError


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Common options. Subclasses set `name`, `key` and `signed`, and define `rule` and `inference_options`."""

    name: ClassVar[str]
    """Key in VARIANTS; `abs_topk` is typed abs-topk on the command line."""
    key: ClassVar[str]
    """What selection ranks: `relu` or `abs` of the pre-activation."""
    signed: ClassVar[bool]
    """Whether codes can be negative."""

    d_sae: int | None = None
    """Number of features F; None = 16 × the width of the site."""
    lr: float | None = None
    """Learning rate; None = 2e-4·√(2¹⁴/F)·min(8, max(1, √(32,000/steps)))."""
    normalise: Literal["unit", "none"] = "unit"
    """Input scale: `unit` makes the variance of an activation 1; folded into the saved weights."""
    enc_init: Literal["fit", "tied", "kaiming"] = "fit"
    """Start of the encoder: the decoder's rows times the scale of the best first reconstruction, 1, or √(2D/F)."""
    b_dec: Literal["mean", "zero"] = "mean"
    """Start of the decoder's bias."""
    dead_after: int | None = None
    """Tokens without a firing after which a feature counts as dead; None = min(10 M, tokens / 20)."""
    clip: float | None = None
    """Global gradient norm; None = no clipping."""

    def __post_init__(self):
        if self.d_sae is not None and self.d_sae < 1:
            raise SaekitError(f"d_sae = {self.d_sae} is no number of features; pass at least 1")

    def rule(self, progress: float):
        """Selection rule of training at `progress` (steps done / steps, 0 to 1)."""
        raise TypeError(f"{type(self).__name__} names no rule")

    def inference_rule(self):
        """Selection rule of inference; never depends on the rest of the batch."""
        return self.rule(1.0)

    def inference_options(self) -> dict:
        """What `config.json` keeps under `options`: what inference needs."""
        raise TypeError(f"{type(self).__name__} names no inference options")

    @classmethod
    def from_inference_options(cls, options: dict, d_sae: int) -> "Variant":
        """The variant that a saved SAE needs; training options are back at their defaults."""
        raise TypeError(f"{cls.__name__} cannot be read from options")

    def check(self, d_sae: int):
        """Refuses combinations that need the number of features."""
