"""What activations are collected from: a language model and text, or any module and batches to call it with.

    source = TextSource("gpt2", settings)
    source.plan                            # every setting that fixes a byte, in the manifest's words
    for part in source.parts(sequences=512, state=None): ...      # the token table, in parts
    rows = source.forward(part.table, 0, 32)

A source writes nothing. The collector makes a store of it, a stream trains from it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from saekit.config import CollectOptions
from saekit.device import environment_of
from saekit.errors import SaekitError
from saekit.forward import LanguageForward, ModuleForward
from saekit.model import LanguageModel, Site, load_model
from saekit.module import PlainModule
from saekit.packing import Packing, Part, parts, plan_packing
from saekit.progress import Progress
from saekit.ranks import Ranks
from saekit.store import format as layout
from saekit.store.format import TokenTable
from saekit.text import Text

BATCH_SEQUENCES = 32


class Source(Protocol):
    """What a store is collected from: its plan, the parts of its token table, and the pass that gives rows."""

    plan: dict

    @property
    def repeatable(self) -> bool:
        """Whether the text can be read from the start again."""
        ...

    @property
    def forward(self) -> LanguageForward | ModuleForward: ...

    def parts(self, sequences: int, state: Mapping | None) -> Iterator[Part]: ...


class TextSource:
    """A language model or encoder, and text."""

    def __init__(self, model, settings: CollectOptions, ranks: Ranks, first: dict | None):
        self.settings = settings
        # a text that is missing is said before a model is loaded
        self.text = Text(settings.text, settings)
        device = settings.device
        if ranks.size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{ranks.local}"
        lm = self.lm = load_model(
            model,
            device=device,
            compute=settings.compute,
            tokenizer=settings.tokenizer,
            attention=settings.attention,
        )
        if lm.tokenizer is None and settings.ids_field is None:
            raise SaekitError(
                f"{lm.id} has no tokenizer, so text cannot be read; pass --tokenizer, or token ids with --ids-field"
            )
        if lm.max_context is not None and settings.context > lm.max_context:
            raise SaekitError(f"--context {settings.context} exceeds the model's {lm.max_context} positions")
        sites = {name: lm.check_site(name) for name in settings.site}
        mode = settings.packing or ("join" if lm.causal else "separate")
        if mode == "isolate" and not lm.causal:
            raise SaekitError("--packing isolate is for causal models; an encoder takes --packing separate")
        self.packing = plan_packing(
            lm.tokenizer,
            context=settings.context,
            packing=mode,
            bos=settings.bos,
            keep_special=settings.keep_special,
            drop_ids=settings.drop_ids,
            vocab_size=lm.vocab_size,
            encoder=not lm.causal,
            ids=settings.ids_field is not None,
            name=settings.tokenizer or lm.id,
        )
        batch = settings.batch_sequences or (first or {}).get("batch_sequences")
        if batch is None:
            batch = min(ranks.gather(_fitting_batch(lm, sites, settings)))
        self.plan = _text_plan(lm, settings, sites, self.packing, self.text, batch)
        self.forward = LanguageForward(lm, sites, self.plan)

    def __str__(self) -> str:
        return str(self.lm)

    @property
    def repeatable(self) -> bool:
        return self.text.repeatable

    def parts(self, sequences: int, state: Mapping | None) -> Iterator[Part]:
        return parts(
            self.text.documents(),
            self.lm.tokenizer,
            self.packing,
            vocab_size=self.lm.vocab_size,
            sequences=sequences,
            tokens=self.settings.tokens,
            source=self.text.name,
            size=self.text.bytes,
            state=state,
        )


def _fitting_batch(lm: LanguageModel, sites: Mapping[str, Site], settings: CollectOptions) -> int:
    """32 sequences, halved on a GPU until a pass of full ones fits; chosen before the plan is written."""
    batch = BATCH_SEQUENCES
    while lm.device.type == "cuda" and batch > 1:
        try:
            lm.capture(torch.zeros(batch, settings.context, dtype=torch.long, device=lm.device), list(sites))
            break
        except torch.OutOfMemoryError:
            batch //= 2
            torch.cuda.empty_cache()
            Progress.say(f"a batch does not fit; trying --batch-sequences {batch}")
    return batch


def _text_plan(
    lm: LanguageModel, settings: CollectOptions, sites: Mapping[str, Site], packing: Packing, text: Text, batch: int
) -> dict:
    """Every setting that fixes a byte, in the manifest's words."""
    reading = {"encoding_errors": "replace"} if settings.encoding_errors == "replace" else {}
    reading |= {"skip_bad_lines": True} if settings.skip_bad_lines else {}
    tokenizer = lm.tokenizer_entry()
    model = lm.manifest_entry()
    return {
        "model": model if tokenizer else {**model, "vocab_size": lm.vocab_size},
        "tokenizer": tokenizer,
        "text": {
            "source": settings.text[0] if len(settings.text) == 1 else list(settings.text),
            "revision": text.revision,
            "packing": packing.mode,
            "attention_across_documents": packing.mode == "join",
            **reading,
        },
        "context_length": settings.context,
        "batch_sequences": batch,
        "special_tokens": {
            "prepend_bos": packing.bos is not None,
            "separator": None if packing.separator is None and packing.closing is None else "eos",
            "dropped_ids": list(packing.dropped),
        },
        "dtype": settings.dtype,
        "sites": {name: _site_entry(site, settings.norm_multiple) for name, site in sites.items()},
        "environment": environment_of(lm.device),
        "settings": {
            "tokens": settings.tokens,
            "text_field": settings.text_field,
            "ids_field": settings.ids_field,
            "split_documents": settings.split_documents,
            "shard_mb": settings.shard_mb,
        },
    }


def _site_entry(site: Site, norm_multiple: float) -> dict:
    heads = {} if site.heads is None else {"heads": site.heads, "d_head": site.d_head}
    return {"d": site.d, **heads, "norm_multiple": float(norm_multiple) if norm_multiple else None}


class InputSource:
    """Any module, and batches to call it with; an item has the place of a sequence."""

    repeatable = True

    def __init__(self, module, settings: CollectOptions, inputs: Iterable | Callable[[], Iterable]):
        if not isinstance(module, torch.nn.Module):
            raise SaekitError(
                f"inputs go with a torch.nn.Module, not {type(module).__name__}; for a model's name give text"
            )
        if callable(inputs):
            self.inputs: Callable[[], Iterable] = inputs
        elif iter(inputs) is inputs:
            raise SaekitError(
                "inputs can be read only once; give a list, a DataLoader, or a function that gives an iterator"
            )
        else:
            self.inputs = lambda: inputs
        self.module = PlainModule(module)
        sizes = [self.module.size(batch) for batch in self.inputs()]
        if not sum(sizes):
            raise SaekitError("inputs hold no item; give at least one batch")
        if len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]:
            raise SaekitError(
                f"batches of inputs have {', '.join(map(str, sorted(set(sizes))))} items; all but the last must have as many"
            )
        self.items = sum(sizes)
        batch = next(iter(self.inputs()))
        sites = {name: self.module.check_site(name, batch) for name in settings.site}
        positions = {
            name: x.shape[1] if x.ndim == 3 else 1 for name, x in self.module.capture(batch, list(sites)).items()
        }
        self.positions = positions[settings.site[0]]
        if len(set(positions.values())) > 1:
            raise SaekitError(
                "sites have different numbers of positions per item ("
                + ", ".join(f"{name} {n}" for name, n in positions.items())
                + "); collect them into stores of their own"
            )
        self.plan = {
            "model": {**self.module.manifest_entry(), "vocab_size": self.items},
            "tokenizer": None,
            "text": {"source": "inputs", "revision": None, "packing": "separate", "attention_across_documents": False},
            "context_length": self.positions,
            "batch_sequences": sizes[0],
            "special_tokens": {"prepend_bos": False, "separator": None, "dropped_ids": []},
            "dtype": settings.dtype,
            "sites": {name: _site_entry(site, settings.norm_multiple) for name, site in sites.items()},
            "environment": environment_of(self.module.device),
            "settings": {"shard_mb": settings.shard_mb},
        }
        self.forward = ModuleForward(self.module, sites, self.inputs)

    def __str__(self) -> str:
        return f"{self.plan['model']['id']} on {self.module.device}: {self.items:,} items of {self.positions} positions"

    def parts(self, sequences: int, state: Mapping | None) -> Iterator[Part]:
        """The item's number in place of every token; an item is a document of its own."""
        T, done = self.positions, state["sequences"] if state else 0
        while done < self.items:
            S = min(sequences, self.items - done)
            items = np.arange(done, done + S)
            table = TokenTable(
                token=np.repeat(items, T).astype(layout.token_dtype(self.items)),
                stored=np.ones(S * T, bool),
                seq_start=np.arange(S + 1) * T,
                run_start=np.arange(S) * T,
                run_doc=items,
                run_position=np.zeros(S, np.int64),
            )
            done += S
            counts = {"documents": done, "sequences": done, "tokens": done * T, "rows": done * T}
            yield Part(table, {**counts, "bytes": None, "last": done == self.items})
