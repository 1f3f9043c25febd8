"""A language model or encoder as the toolkit sees it: name a site, read what passes there, put something else there.

    lm = load_model("gpt2")
    x_BTD = lm.capture(ids_BT, ["blocks.6.hook_resid_post"])["blocks.6.hook_resid_post"]
    logits_BTV = lm.replace(ids_BT, "blocks.6.hook_resid_post", lambda x_BTD: 0 * x_BTD)

Nothing else in the toolkit knows a transformer's inside. A site is one of two things:

1. A hook name of TransformerLens. It means the same quantity in every architecture: what is added to the residual stream,
   after any norm or multiplier that stands behind it. Where a name has no such meaning it is refused.
2. Otherwise a module path such as `encoder.layer.1.attention.output`: what that module of this model returns.

Values are those of the raw weights. The model is a plain Transformers model with plain hooks that live for one pass.

B sequences · T positions · D width of a site · V vocabulary.
"""

import copy
import difflib
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from saekit_kernels import why_not_bf16
from torch import Tensor, nn

from saekit import hooks
from saekit.device import keep_freed_memory, resolve_device
from saekit.errors import SaekitError
from saekit.fingerprints import tokenizer_fingerprint, weights_fingerprint
from saekit.hooks import Point, Seen
from saekit.loading import load, load_tokenizer, one_line

# on a CPU, layers up to this width run faster in native bf16 than under autocast, whose casts they cannot hide
SMALL_WIDTH = 1024

TRIAL = (2, 4)
"""Sequences and tokens of the pass that tries what a module does; more than one sequence shows who leaves out B."""

EMBED = "hook_embed"
IN_BLOCK = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where an architecture computes what: module paths inside the decoder (embed, norm) or inside a block."""

    embed: str
    """Its output is what the tokens add to the residual stream."""
    norm: str
    """The final norm."""
    attn_out: str
    """Its output is what attention adds to the residual stream."""
    mlp_out: str
    """Its output is what the MLP adds."""
    mid: str
    """Reads the residual stream between the two, where the block has such a place."""
    z: str
    """Attention's output projection: reads the heads' results side by side."""
    post: str
    """The MLP's last projection: reads the neurons."""
    parallel: bool = False
    """Attention and MLP read the same residual stream."""
    embed_scale: str | None = None
    """Configuration entry that multiplies the embedding behind the module."""
    block_scale: str | None = None
    """Configuration entry that multiplies what a block adds behind the module."""
    norm_offset: float = 0.0
    """The final norm multiplies by this plus its weight."""


_LLAMA = Layout(
    embed="embed_tokens",
    norm="norm",
    attn_out="self_attn",
    mlp_out="mlp",
    mid="post_attention_layernorm",
    z="self_attn.o_proj",
    post="mlp.down_proj",
)


def _llama(**changes) -> Layout:
    return Layout(**{**_LLAMA.__dict__, **changes})


# each entry is proven in tests/test_model.py against Transformers' own values
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _llama(norm_offset=1.0),
    "gemma2": _llama(
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        mid="pre_feedforward_layernorm",
        norm_offset=1.0,
    ),
    "gemma3_text": _llama(
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        mid="pre_feedforward_layernorm",
        norm_offset=1.0,
    ),
    "olmo2": _llama(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", mid="mlp"),
    "granite": _llama(embed_scale="embedding_multiplier", block_scale="residual_multiplier"),
    "phi": _llama(norm="final_layernorm", z="self_attn.dense", post="mlp.fc2", parallel=True),
    "gpt2": Layout(
        embed="wte", norm="ln_f", attn_out="attn", mlp_out="mlp", mid="ln_2", z="attn.c_proj", post="mlp.c_proj"
    ),
    "gpt_neox": Layout(
        embed="embed_in",
        norm="final_layer_norm",
        attn_out="attention",
        mlp_out="mlp",
        mid="post_attention_layernorm",
        z="attention.dense",
        post="mlp.dense_4h_to_h",
    ),
    # its attention and MLP modules return their result with the residual stream already added
    "bloom": Layout(
        embed="word_embeddings_layernorm",
        norm="ln_f",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        mid="post_attention_layernorm",
        z="self_attention.dense",
        post="mlp.dense_4h_to_h",
    ),
}


@dataclass(frozen=True)
class Site:
    name: str
    """TransformerLens hook name, or module path."""
    d: int
    """Width of an activation."""
    layer: int
    """Block it lies in; -1 = in none."""
    heads: int | None = None
    """Of attn.hook_z, whose rows are the heads side by side."""
    d_head: int | None = None
    """Width of one of them."""


class Unembedding(NamedTuple):
    W_U_VD: Tensor
    """float32; `W_U_VD @ d` = what a small step along d of the last residual stream adds to the logits, up to the
    norm's division and a constant over the vocabulary."""
    note: str
    """What the product leaves out, in words; empty if nothing."""


def load_model(
    name: "str | Path | LanguageModel | tuple[Any, Any] | Any",
    *,
    device: str = "auto",
    compute: str = "auto",
    tokenizer: str | None = None,
    attention: str = "auto",
) -> "LanguageModel":
    """A hub name, a local folder in Hugging Face format, a `.gguf` file, `saekit:demo`, or (model, tokenizer).

    A model object of the caller's is left as it is found: moved, cast or reconfigured never, except for what `capture`
    and `replace` put back. `compute="fp32"` on a half-precision object works on a copy. A LanguageModel is returned as it
    is, and refused if something else is asked of it.

    Args:
        tokenizer: folder or hub name; None = the model's own.
        attention: `sdpa`, `eager`, or `auto`, which is sdpa where the model has it.

    Raises SaekitError if it cannot be loaded, if a weight is missing in it, or if device or model lack what is asked for.
    """
    if isinstance(name, LanguageModel):
        _refuse_another(name, compute, attention, tokenizer)
        return name
    if isinstance(name, (str, Path)):
        hf, own = load(str(name), device=resolve_device(device), attention=attention, tokenizer=tokenizer)
        identity, owned = str(name), True
    else:
        hf, own = name if isinstance(name, tuple) else (name, None)
        own = load_tokenizer(tokenizer) if tokenizer else own
        identity, owned = getattr(hf, "name_or_path", "") or type(hf).__name__, False
    return LanguageModel(
        hf, own, id=identity, compute=compute, attention=attention, owned=owned, tokenizer_id=tokenizer
    )


def _refuse_another(lm: "LanguageModel", compute: str, attention: str, tokenizer: str | None):
    """SaekitError if the loaded model is not what is asked for."""
    is_now = {"compute": lm.compute.removesuffix("-autocast"), "attention": lm.attention, "tokenizer": lm.tokenizer_id}
    for (what, found), asked in zip(is_now.items(), (compute, attention, tokenizer or "auto")):
        if asked not in ("auto", found):
            raise SaekitError(f"{lm.id} was loaded with {what} {found}; give load_model {what}={asked!r} instead")


class LanguageModel:
    """A Transformers model, its tokenizer, and the hooks between them and the toolkit.

    Threads may share one: passes wait for each other.
    """

    def __init__(
        self,
        hf,
        tokenizer,
        *,
        id: str,
        compute: str = "auto",
        attention: str = "auto",
        owned: bool = False,
        tokenizer_id: str | None = None,
    ):
        self.id = id
        self.hf = hf
        self.tokenizer = tokenizer
        self.tokenizer_id: str = tokenizer_id or id
        self.architecture: str = type(hf).__name__
        self._must_read_ids()
        self.config = hf.config.get_text_config()
        self.device: torch.device = hf.get_input_embeddings().weight.device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.weights_fingerprint: str = weights_fingerprint(hf)
        """sha256 over names, dtypes, shapes and bytes of all weights as loaded, before any cast."""
        self.n_layers: int = self.config.num_hidden_layers
        self.d_model: int = self.config.hidden_size
        self.vocab_size: int = hf.get_input_embeddings().weight.shape[0]
        """Rows of the embedding; a tokenizer may use fewer."""
        # tokens added later than the model's embedding may never occur; text that holds one is refused then
        if tokenizer is not None and tokenizer.vocab_size > self.vocab_size:
            raise SaekitError(
                f"tokenizer has {tokenizer.vocab_size:,} ids but the model {id} embeds {self.vocab_size:,}; "
                "to give the one that belongs to it pass --tokenizer"
            )
        self._lock = threading.RLock()
        self.compute: Literal["fp32", "bf16", "bf16-autocast"] = self._choose_compute(compute, owned)
        self._decoder = self.hf.get_decoder() if hasattr(self.hf, "get_decoder") else self.hf.base_model
        self.max_context: int | None = self._count_positions()
        self._blocks = self._find_blocks()
        self._layout = LAYOUTS.get(self.config.model_type) if self._blocks else None
        if self._layout and getattr(self.config, "use_parallel_residual", False):
            self._layout = Layout(**{**self._layout.__dict__, "parallel": True})
        self.attention: Literal["sdpa", "eager"] = self._choose_attention(attention)
        """Of every pass."""
        # whether that attention is the one that runs is read back now, not after the text has been read
        with self._running():
            pass

    def __str__(self) -> str:
        return (
            f"{self.id}: {self.architecture}, {self.n_layers} layers × {self.d_model}, "
            f"{self.compute}, {self.attention} attention, {self.device}"
        )

    def _must_read_ids(self):
        """Token ids alone must be enough for a pass."""
        if not hasattr(self.hf, "get_input_embeddings"):
            raise SaekitError(
                f"{self.architecture} is no Transformers model; give one, or collect from it as a module, with inputs="
            )
        reads = getattr(self.hf, "main_input_name", "input_ids")
        if reads != "input_ids":
            raise SaekitError(
                f"{self.architecture} reads {reads}, not token ids; collect from it as a module, with inputs="
            )
        if self.hf.config.is_encoder_decoder and self.hf.get_decoder() is not self.hf:
            raise SaekitError(
                f"{self.architecture} is an encoder-decoder; give its encoder: (model.get_encoder(), tokenizer)"
            )

    def _choose_attention(self, asked: str) -> Literal["sdpa", "eager"]:
        has_sdpa = getattr(self.hf, "_supports_sdpa", False)
        if asked not in ("auto", "sdpa", "eager"):
            raise SaekitError(f"attention {asked} is not known; choose auto, sdpa or eager")
        if asked == "sdpa" and not has_sdpa:
            raise SaekitError(f"--attention sdpa: {self.architecture} has none; use --attention eager")
        return "eager" if asked == "eager" or not has_sdpa else "sdpa"

    def _choose_compute(self, asked: str, owned: bool) -> Literal["fp32", "bf16", "bf16-autocast"]:
        """Casts where the model is ours to cast; device and sizes decide, never a timing."""
        stored = next(p.dtype for p in self.hf.parameters() if p.is_floating_point())
        reason = why_not_bf16(self.device.type)
        if asked not in ("auto", "bf16", "fp32"):
            raise SaekitError(f"compute {asked} is not known; choose auto, bf16 or fp32")
        if asked == "bf16" and reason:
            raise SaekitError(f"--compute bf16: {reason}; use --compute fp32")
        if asked == "fp32" or reason:
            if stored != torch.float32:
                if not owned:
                    self.hf = copy.deepcopy(self.hf)
                _cast(self.hf, torch.float32)
            return "fp32"
        if stored == torch.bfloat16:
            return "bf16"
        if owned and self.device.type == "cpu" and self.d_model <= SMALL_WIDTH:
            _cast(self.hf, torch.bfloat16)
            return "bf16"
        return "bf16-autocast"

    def _count_positions(self) -> int | None:
        """Longest sequence, or None for any length."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if not positions or positions < 1:
            return None
        for path, module in self._decoder.named_modules():
            padding = getattr(module, "padding_idx", None)
            # in RoBERTa and its kin the first token's position is the one behind the padding id
            if path.endswith("position_embeddings") and padding is not None:
                return positions - padding - 1
        return positions

    def _find_blocks(self) -> Sequence[nn.Module]:
        """One block per layer; none where a layer is no module of its own, or the same one as another."""
        lists = {
            path: module
            for path, module in self._decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == len(set(module)) == self.n_layers
        }
        return list(lists[min(lists, key=lambda path: path.count("."))]) if lists else []

    # What the store records

    def manifest_entry(self) -> dict:
        """The `model` of a store's manifest."""
        return {
            "id": self.id,
            "revision": getattr(self.hf.config, "_commit_hash", None),
            "weights_fingerprint": self.weights_fingerprint,
            "architecture": self.architecture,
            "layers": self.n_layers,
            "d_model": self.d_model,
            "processing": "raw",
            "compute": self.compute,
            "attention": self.attention,
        }

    def tokenizer_entry(self) -> dict | None:
        """The `tokenizer` of a store's manifest; None without one. [CLS] counts as BOS and [SEP] as EOS."""
        t = self.tokenizer
        if t is None:
            return None
        cls, sep = getattr(t, "cls_token_id", None), getattr(t, "sep_token_id", None)
        return {
            "id": self.tokenizer_id,
            "fingerprint": tokenizer_fingerprint(t),
            "vocab_size": min(len(t), self.vocab_size),
            "bos": cls if t.bos_token_id is None else t.bos_token_id,
            "eos": sep if t.eos_token_id is None else t.eos_token_id,
            "pad": t.pad_token_id,
        }

    # Sites

    def sites(self) -> list[str]:
        """Every hook name that can be captured and replaced, in the order of the forward pass."""
        names = [EMBED] if self._absent(EMBED) is None else []
        kinds = [kind for kind in IN_BLOCK if self._absent(kind) is None]
        return names + [f"blocks.{i}.{kind}" for i in range(self.n_layers) for kind in kinds]

    def check_site(self, name: str) -> Site:
        """The site of that name; SaekitError with the nearest names if there is none."""
        return self._site(name)[0]

    def _site(self, name: str) -> tuple[Site, Point]:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        layer, kind = (int(match[1]), match[2]) if match else (-1, name)
        if kind not in (IN_BLOCK if match else (EMBED,)):
            return self._at_path(name)
        if layer >= self.n_layers:
            raise SaekitError(f"{name}: the model has {self.n_layers} layers (0 to {self.n_layers - 1})")
        absent = self._absent(kind)
        if absent:
            instead = [k for k in ("hook_resid_pre", "hook_resid_post") if self._absent(k) is None]
            if self._layout is None:
                instead.append("a module path")
            raise SaekitError(f"{name} {absent}; use {' or '.join(instead)}")
        return self._locate(name, layer, kind)

    def _absent(self, kind: str) -> str | None:
        """Why no block has a site of that kind, or None."""
        family = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel").removesuffix("Model")
        layout = self._layout
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return None if layout or self._stream_is_plain else f"is not one tensor in {family}"
        if layout is None:
            return f"is not known for {family} ({self.config.model_type})"
        if kind == "hook_resid_mid" and layout.parallel:
            return f"does not exist in a parallel-attention model ({family})"
        if self.config.model_type == "bloom" and kind != EMBED:
            if self.config.apply_residual_connection_post_layernorm:
                return f"has no single meaning in a {family} that normalises its residual stream"
            if self.config.pretraining_tp > 1 and self.config.slow_but_exact:
                return f"is computed in slices by this {family} (slow_but_exact)"
        return None

    def _at_path(self, name: str) -> tuple[Site, Point]:
        """The site at a module path, counted from the model as it was loaded or from its base model."""
        module = _submodule(self.hf, name)
        if module is None:
            module = _submodule(self.hf.base_model, name)
        if module is None:
            raise SaekitError(f"no site {name}; nearest: {', '.join(self._nearest(name)) or 'none'}")
        seen = self._seen.get(module)
        reason = hooks.unfit(seen, TRIAL, ("B T D",))
        if reason:
            raise SaekitError(f"{name} {reason}; nearest: {', '.join(self._nearest(name)) or 'none'}")
        assert seen is not None and seen.shape is not None, name
        return Site(name, seen.shape[-1], self._inside.get(module, -1)), Point(module)

    def _nearest(self, name: str) -> list[str]:
        """Up to three names of sites; for a name inside a block of TransformerLens, those of this block."""
        names = self.sites()
        for root in dict.fromkeys((self.hf.base_model, self.hf)):
            names += [p for p, m in root.named_modules() if p and not hooks.unfit(self._seen.get(m), TRIAL, ("B T D",))]
        match = re.match(r"blocks\.(\d+)\.", name)
        same = [n for n in names if n.startswith(match[0])] if match else []
        return difflib.get_close_matches(name, same or names, n=3, cutoff=0.0)

    @cached_property
    def _seen(self) -> dict[nn.Module, Seen]:
        """What every module does in one pass over TRIAL tokens."""
        return self._try(lambda: hooks.observe(self.hf, lambda: self.hf(**self._arguments(self._ids(*TRIAL)))))

    @cached_property
    def _inside(self) -> dict[nn.Module, int]:
        """Modules that the decoder runs without the head -> block that it lies in, or -1."""
        blocks = {module: i for i, block in enumerate(self._blocks) for module in block.modules()}
        return {module: blocks.get(module, -1) for module in self._decoder.modules()}

    def _locate(self, name: str, layer: int, kind: str) -> tuple[Site, Point]:
        layout, config, D = self._layout, self.config, self.d_model
        block = self._blocks[layer]
        if kind in ("hook_resid_pre", "hook_resid_post"):
            side = "input" if kind == "hook_resid_pre" else "output"
            return Site(name, D, layer), Point(block, side, copy=layout is None)
        assert layout is not None, kind
        if kind == EMBED:
            scale = getattr(config, layout.embed_scale) if layout.embed_scale else 1.0
            module = self._decoder.get_submodule(layout.embed)
            return Site(name, D, -1), Point(module, "output", scale, copy=False)
        if kind == "hook_resid_mid":
            return Site(name, D, layer), Point(block.get_submodule(layout.mid), "input", copy=False)
        if kind in ("hook_attn_out", "hook_mlp_out"):
            scale = getattr(config, layout.block_scale) if layout.block_scale else 1.0
            path = layout.attn_out if kind == "hook_attn_out" else layout.mlp_out
            return Site(name, D, layer), Point(block.get_submodule(path), "output", scale, copy=False)
        if kind == "attn.hook_z":
            module, heads = block.get_submodule(layout.z), config.num_attention_heads
            d = _reads(module)
            return Site(name, d, layer, heads, d // heads), Point(module, "input", copy=False)
        assert kind == "mlp.hook_post", kind
        module = block.get_submodule(layout.post)
        return Site(name, _reads(module), layer), Point(module, "input", copy=False)

    @cached_property
    def _stream_is_plain(self) -> bool:
        """Whether each block runs once and reads exactly the (B, T, D) tensor that the one before it returned.

        Tried for architectures that have no layout of their own.
        """
        reads: list[list[Tensor]] = [[] for _ in self._blocks]
        returns: list[list[Tensor]] = [[] for _ in self._blocks]

        def listen(i, block):
            def note(into: list[Tensor], x):
                if isinstance(x, Tensor):
                    # a later block may write into it
                    into.append(x.clone())

            return [
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: note(reads[i], hooks.read(args, kwargs)), with_kwargs=True
                ),
                block.register_forward_hook(lambda _, args, output: note(returns[i], hooks.first(output))),
            ]

        def run():
            with hooks.registered(h for i, block in enumerate(self._blocks) for h in listen(i, block)):
                self._decoder(**self._arguments(self._ids(*TRIAL)))

        self._try(run)
        if not self._blocks or any(len(x) != 1 for x in reads + returns):
            return False
        return all(x.shape == (*TRIAL, self.d_model) for (x,) in reads + returns) and all(
            torch.equal(x, y) for (x,), (y,) in zip(returns[:-1], reads[1:])
        )

    @cached_property
    def causal(self) -> bool:
        """Whether a token leaves everything before it as it was, tried by changing the last of eight tokens."""
        ids_T = self._ids(1, 9)[0]
        ids_BT = torch.stack([ids_T[:8], torch.cat([ids_T[:7], ids_T[8:]])])
        x_BTD = self._try(lambda: self._decoder(**self._arguments(ids_BT)))[0].float()
        # equal tokens in two rows of a batch may differ by rounding; a token that is read makes a larger difference
        tolerance = 1e-5 if self.compute == "fp32" else 1e-2
        return bool((x_BTD[0, :-1] - x_BTD[1, :-1]).abs().max() <= tolerance * x_BTD[:, :-1].abs().max())

    def _ids(self, B: int, T: int) -> Tensor:
        """Token ids to try things with; no padding, which some models leave out of attention unasked."""
        padding = getattr(self.config, "pad_token_id", None)
        some = [i for i in range(min(self.vocab_size, B * T + 1)) if i != padding]
        return torch.tensor([some[i % len(some)] for i in range(B * T)], device=self.device).reshape(B, T)

    @torch.no_grad()
    def _try(self, run: Callable[[], Any]) -> Any:
        """The result of a trial pass. Raises SaekitError if the model cannot do it from token ids alone."""
        try:
            with self._running():
                return run()
        except (TypeError, ValueError, AttributeError) as error:
            raise SaekitError(
                f"{self.architecture} does not run on token ids alone ({type(error).__name__}: {one_line(error)}); "
                "give another model"
            ) from error

    # Passes

    @torch.no_grad()
    def capture(
        self, ids_BT: Int[Tensor, "B T"], sites: Sequence[str], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Activations at the sites, each (B, T, D) in the model's dtype, from one forward pass.

        The pass ends at the last of them: no later layer runs, nor the unembedding.
        Raises SaekitError for a name that is no site of this model.
        """
        points = {name: self._site(name)[1] for name in sites}
        model = self._decoder if all(point.module in self._inside for point in points.values()) else self.hf
        with self._running():
            return hooks.capture(points, lambda: model(**self._arguments(ids_BT, attention_mask)))

    @torch.no_grad()
    def logits(self, ids_BT: Int[Tensor, "B T"], attention_mask: Tensor | None = None) -> Float[Tensor, "B T V"]:
        """What the model's own head says, soft cap and bias included."""
        with self._running():
            return self._head(ids_BT, attention_mask)

    @torch.no_grad()
    def replace(
        self,
        ids_BT: Int[Tensor, "B T"],
        site: str,
        fn: Callable[[Tensor], Tensor],
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits with x := fn(x) at the site; fn maps (B, T, D) in the model's dtype to the same shape.

        Where fn returns x itself, the logits are those of `logits` to the bit.
        """
        point = self._site(site)[1]
        with self._running(), hooks.spliced(point, fn):
            return self._head(ids_BT, attention_mask)

    @torch.no_grad()
    def write(
        self,
        ids_BT: Int[Tensor, "B T"],
        n: int,
        choose: Callable[[Tensor], Tensor],
        *,
        site: str,
        change: Callable[[Tensor, Tensor], Tensor],
        cache: bool = True,
    ) -> Int[Tensor, "B T+n"]:
        """The sequences with n more tokens each: `choose` takes logits (B, V) and names the next one of every row.

        In every pass x := change(x, ids) at the site, x (B, t, D) of the t tokens that the pass reads. `cache`: a pass reads
        the new token alone, and keys and values of those before are kept. Raises SaekitError where the model keeps none.
        """
        self._must_have_head()
        # the name of what is kept has changed in Transformers, of the argument and of the result
        forward = inspect.signature(self.hf.forward).parameters
        name = "cache" if "cache" in forward else "past_key_values"
        point, ids_BT, kept = self._site(site)[1], ids_BT.to(self.device), None
        with self._running():
            for _ in range(n):
                new_Bt = ids_BT if kept is None else ids_BT[:, -1:]
                with hooks.spliced(point, lambda x, new_Bt=new_Bt: change(x, new_Bt)):
                    out = self.hf(input_ids=new_Bt, use_cache=cache, **({name: kept} if cache else {}))
                if cache:
                    kept = getattr(out, name, None)
                    if kept is None:
                        raise SaekitError(f"{self.architecture} keeps no keys and values; pass --no-cache")
                ids_BT = torch.cat([ids_BT, choose(out.logits[:, -1].float())[:, None].to(ids_BT)], dim=1)
        return ids_BT

    def _head(self, ids_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
        self._must_have_head()
        return self.hf(**self._arguments(ids_BT, attention_mask)).logits

    def _must_have_head(self):
        if self.hf.get_output_embeddings() is None:
            raise SaekitError(f"{self.architecture} has no language-model head; give a causal language model")

    def _arguments(self, ids_BT: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return {"input_ids": ids_BT.to(self.device), "attention_mask": mask, "use_cache": False}

    @contextmanager
    def _running(self):
        """Evaluation mode, the recorded attention and arithmetic, no chatter; everything back as it was afterwards."""
        from transformers.utils import logging

        with self._lock, ExitStack() as stack:
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
            stack.callback(logging.set_verbosity, verbosity)
            stack.enter_context(hooks.evaluating(self.hf))
            if self._decoder.config._attn_implementation != self.attention:
                config = self.hf.config
                parts = {key: getattr(config, key) for key in config.sub_configs}
                found = {key: part._attn_implementation for key, part in {"": config, **parts}.items() if part}
                self.hf.set_attn_implementation(self.attention)
                stack.callback(self.hf.set_attn_implementation, found)
            effective = self._decoder.config._attn_implementation
            if effective != self.attention:
                raise SaekitError(
                    f"attention of {self.architecture} is {effective} and cannot be changed to {self.attention}; "
                    f"pass --attention {effective}, or load the model with attn_implementation={self.attention!r}"
                )
            if self.compute == "bf16-autocast":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield

    @torch.no_grad()
    def unembedding(self, tokens: Sequence[int] | None = None) -> Unembedding:
        """W_U with the final norm's gain folded in, centred over the vocabulary, in float32; of `tokens` these rows alone,
        without the memory of the others.

        A norm that subtracts the mean over D is folded in as well. Raises SaekitError without a head, or for an
        architecture whose final norm is not known.
        """
        head = self.hf.get_output_embeddings()
        if head is None or self._layout is None:
            raise SaekitError(f"the unembedding of {self.architecture} is not known; logit weights are left out")
        norm = self._decoder.get_submodule(self._layout.norm)
        gain_D = norm.weight.float() + self._layout.norm_offset

        def through_norm(W_VD: Tensor) -> Tensor:
            W_VD = W_VD * gain_D
            return W_VD - W_VD.mean(1, keepdim=True) if isinstance(norm, nn.LayerNorm) else W_VD

        if tokens is None:
            W_U_VD = through_norm(head.weight.float())
            W_U_VD = W_U_VD - W_U_VD.mean(0)
        else:
            mean_D = head.weight.mean(0, keepdim=True, dtype=torch.float32)
            W_U_VD = through_norm(head.weight[list(tokens)].float()) - through_norm(mean_D)
        W_U_VD = W_U_VD / getattr(self.config, "logits_scaling", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return Unembedding(W_U_VD, f"before the model's soft cap of the logits at ±{cap:g}" if cap else "")


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if path else None
    except AttributeError:
        return None


def _cast(hf: nn.Module, dtype: torch.dtype):
    """Weights and persistent buffers; buffers computed from the configuration, such as rotary angles, stay exact."""
    kept = {name for name, _ in hf.named_parameters()} | hf.state_dict(keep_vars=True).keys()
    for name, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
        if name in kept and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _reads(module: nn.Module) -> int:
    """Width of what a projection reads; Transformers' Conv1D keeps its weight transposed."""
    return module.in_features if isinstance(module, nn.Linear) else module.get_parameter("weight").shape[0]
