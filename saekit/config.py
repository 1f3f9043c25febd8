"""Options of collect, train, evaluate and index: each dataclass is the command line, its help, and what is recorded.

No torch here: `saekit --help` reads this file.
"""

from dataclasses import dataclass
from typing import Literal

from saekit.errors import SaekitError

Compute = Literal["auto", "bf16", "fp32"]
SteerMode = Literal["add", "set", "ablate", "project"]
DOSED: tuple[SteerMode, ...] = ("add", "set")
"""The modes of steering that take doses."""
LARGEST_SEED = 2**53 - 1
"""A number above may be another one in a browser, whose numbers are float64."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How text becomes documents."""

    text_field: str = "text"
    """Field of a .jsonl, .parquet or data set record that holds the text."""
    ids_field: str | None = None
    """Field that holds token ids instead, taken as they are; the tokenizer is optional then."""
    split_documents: Literal["none", "line", "blank-line"] | None = None
    """Cut .txt files and stdin into documents; None = a file is one document, a line of stdin is one."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """`replace` reads bytes that are not UTF-8 as U+FFFD."""
    skip_bad_lines: bool = False
    """Pass over lines of .jsonl and rows of tables that cannot be read, and count them."""


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(ReadingOptions):
    """What a language model is shown, and what is kept of it."""

    text: tuple[str, ...] = ()
    """Files, folders, globs (.txt .md .py .jsonl .jsonl.zst .parquet), hf:NAME[,CONFIG][:SPLIT], - for stdin, or
    `stdlib`, the running Python's own source."""
    context: int = 256
    """Tokens the model sees at once."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the activations that are kept."""
    packing: Literal["join", "isolate", "separate"] | None = None
    """join = documents one behind the other, cut into full sequences, attention crosses their borders; isolate = as join,
    but no document sees another; separate = one document per sequence. None = join, separate for an encoder."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Put BOS at the start of each sequence; auto = if the tokenizer defines one."""
    keep_special: bool = False
    """Keep the rows of BOS, EOS and PAD as well."""
    drop_ids: tuple[int, ...] = ()
    """Further token ids whose rows are not kept."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None = the model's own."""
    norm_multiple: float = 10.0
    """Rows with a norm above this multiple of the median are outliers, which readers skip; 0 = off."""
    batch_sequences: int | None = None
    """Sequences per forward pass; None = 32, halved on a GPU until they fit."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """auto = sdpa, eager for a model that lacks it."""

    def __post_init__(self):
        if self.context < 2:
            raise SaekitError(f"--context {self.context} leaves no room for text; pass at least 2")


@dataclass(frozen=True, kw_only=True)
class CollectOptions(SequenceOptions):
    site: tuple[str, ...]
    """TransformerLens hook names, such as blocks.6.hook_resid_post, or module paths; all come from one forward pass."""
    tokens: int | None = None
    """Stop after this many tokens; None = the whole text."""
    shard_mb: int = 256
    """Size of a shard of the widest site, in MiB."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto = a GPU if there is one."""
    compute: Compute = "auto"
    """Arithmetic of the forward pass; auto = bf16 where the device has matrix units for it."""
    threads: int | None = None
    """Of a forward pass on a CPU; None = all cores, shared by the processes of torchrun. A run that continues keeps them."""
    finish: bool = False
    """Close the store with what there is: all of a text that ends before --tokens, or the whole shards of an unfinished run."""
    accept_environment: bool = False
    """Go on although torch, transformers or the device are not those the store was begun with."""

    def __post_init__(self):
        super().__post_init__()
        if not self.site:
            raise SaekitError("no site named; pass --site, for example --site blocks.6.hook_resid_post")


@dataclass(frozen=True, kw_only=True)
class StreamOptions(SequenceOptions):
    stream: str | None = None
    """Language model to train from without a store: its activations are computed while the SAE learns."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    site: str | None = None
    """Site of the store to train on; must be named if the store holds several."""
    epochs: int = 1
    """How often the rows of the store may be read."""
    tokens: int | None = None
    """Rows to train on; None = epochs × rows."""
    batch: int = 4096
    """Tokens per step, over all ranks."""
    micro_batches: int = 1
    """Parts in which a batch is computed, to save memory. Selection looks at one part: another number is another experiment."""
    split: Literal["train", "all"] = "train"
    """`all` reads the held-out rows too, and the provenance says so."""
    seed: int = 0
    """Initialisation and order of the rows each draw from (seed, purpose)."""
    ram: str = "4GiB"
    """Sites that fit are shuffled uniformly, larger ones in blocks."""
    block: str = "auto"
    """What stays together when a store is shuffled in blocks: auto = 64 KiB, a size such as 1MiB, or `sequence`."""
    outliers: Literal["skip", "keep"] = "skip"
    """Rows that the store marks for their norm."""
    statistics_rows: int | None = None
    """Input mean and scale from so many rows in text order; None = those of the whole store, of a stream 262,144."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto = a GPU if there is one."""
    compute: Compute = "auto"
    """Arithmetic of the encoder product in training; auto = bf16 where the device has matrix units for it."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; None = steps / 20, at least 200."""
    keep: Literal[2, "all"] = 2
    """Checkpoints that stay: the last two, or all."""
    accept_environment: bool = False
    """Go on although saekit, torch, the device or the number of ranks are not those the run was begun with."""
    tensorboard: bool = False
    """Write metrics.jsonl to tensorboard/ as well; needs the package tensorboard."""
    wandb: str | None = None
    """Send metrics.jsonl to this project of Weights & Biases; needs the package wandb."""

    def __post_init__(self):
        for name in ("epochs", "tokens", "batch", "micro_batches", "statistics_rows", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaekitError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


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
    cap: int | None = None
    """Keep an even sample of so many firings of features that have more; counts and tables stay exact. None = keep all."""
    by_token: bool | None = None
    """Also write what fires on each token, never capped: page Prompt and what fires together need it. None = if it stays below 8 GiB."""
    ram: str | None = None
    """Memory for sorting, such as 512MiB; None = a quarter of what is free, at most 1 GiB."""
    force: bool = False
    """Index although the SAE was trained on another model than the store's."""
    seed: int = 0
    """For the samples."""
    device: str = "auto"
    """cpu, cuda …; auto = a GPU if there is one."""
