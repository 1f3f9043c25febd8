"""Options of collect, train, evaluate and index: each dataclass is the command line, its help, and what is recorded.

No torch here: `saekit --help` reads this file.
"""

from dataclasses import dataclass
from typing import Literal

from saekit.errors import SaekitError

Compute = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    site: tuple[str, ...]
    """TransformerLens hook names, such as blocks.6.hook_resid_post; all come from one forward pass."""
    text: tuple[str, ...]
    """Files, folders, globs (.txt .md .py .jsonl) or `stdlib`, the running Python's own source."""
    tokens: int | None = None
    """Stop after this many tokens; None = the whole text."""
    context: int = 256
    """Tokens the model sees at once."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the stored activations."""
    packing: Literal["join"] = "join"
    """Documents are joined with the separator and cut into full sequences."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Put BOS at the start of each sequence; auto = if the tokenizer defines one."""
    keep_special: bool = False
    """Store the rows of BOS, EOS and PAD as well."""
    drop_ids: tuple[int, ...] = ()
    """Further token ids whose rows are not stored."""
    text_field: str = "text"
    """Field of a .jsonl record that holds the text."""
    norm_multiple: float = 10.0
    """Rows with a norm above this multiple of the median are marked as outliers and skipped by readers; 0 = off."""
    batch_sequences: int = 32
    """Sequences per forward pass."""
    shard_mb: int = 256
    """Size of a shard of the widest site, in MiB."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto = a GPU if there is one."""
    compute: Compute = "auto"
    """Arithmetic of the forward pass; auto = bf16 where the device has matrix units for it."""

    def __post_init__(self):
        if not self.site:
            raise SaekitError("no site named; pass --site, for example --site blocks.6.hook_resid_post")
        if self.context < 2:
            raise SaekitError(f"--context {self.context} leaves no room for text; pass at least 2")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    site: str | None = None
    """Site of the store to train on; must be named if the store holds several."""
    epochs: int = 1
    """How often the rows of the store may be read."""
    tokens: int | None = None
    """Rows to train on; None = epochs × rows."""
    batch: int = 4096
    """Tokens per step."""
    split: Literal["train", "all"] = "train"
    """`all` reads the held-out rows too, and the provenance says so."""
    seed: int = 0
    """Initialisation and order of the rows each draw from (seed, purpose)."""
    ram: str = "4GiB"
    """Sites that fit are shuffled uniformly, larger ones in blocks."""
    outliers: Literal["skip", "keep"] = "skip"
    """Rows that the store marks for their norm."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto = a GPU if there is one."""
    compute: Compute = "auto"
    """Arithmetic of the encoder product in training; auto = bf16 where the device has matrix units for it."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None = steps / 20, at least 200."""

    def __post_init__(self):
        for name in ("epochs", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise SaekitError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    store: str | None = None
    """Activation store; None = the one the SAE was trained on."""
    model: str | None = None
    """Language model for tier 2; None = the one the store was collected from."""
    site: str | None = None
    """Site of the store; None = the SAE's own."""
    tiers: tuple[int, ...] = (1, 2)
    """1 = one pass over held-out activations, 2 = the language model with the reconstruction in place."""
    tokens: int = 1_000_000
    """Held-out tokens of tier 1, at most."""
    lm_tokens: int = 100_000
    """Held-out tokens of tier 2, at most."""
    allow_train_tokens: bool = False
    """Evaluate on rows the SAE was trained on, and stamp every number."""
    force: bool = False
    """Evaluate although the SAE was trained on another model than the store's."""
    seed: int = 0
    """For the bootstrap intervals."""
    device: str = "auto"
    """cpu, cuda …; auto = a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    store: str | None = None
    """Activation store; None = the one the SAE was trained on."""
    site: str | None = None
    """Site of the store; None = the SAE's own."""
    model: str | None = None
    """Language model for logit weights; None = the one the store was collected from, left out if it is not at hand."""
    tokens: int | None = None
    """Index the first so many tokens of the store; None = all."""
    force: bool = False
    """Index although the SAE was trained on another model than the store's."""
    seed: int = 0
    """For the samples."""
    device: str = "auto"
    """cpu, cuda …; auto = a GPU if there is one."""
