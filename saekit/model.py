"""A language model as the toolkit sees it: load, name a site, read what passes there, put something else in its place.

    lm = load_model("gpt2")
    x_BTD = lm.capture(ids_BT, ["blocks.6.hook_resid_post"])["blocks.6.hook_resid_post"]
    logits_BTV = lm.replace(ids_BT, "blocks.6.hook_resid_post", lambda x_BTD: 0 * x_BTD)

Nothing else in the toolkit knows a transformer's inside. Sites carry TransformerLens' hook names and mean the same
quantity in every architecture: what is added to the residual stream, after any norm or multiplier that stands behind it.
Values are those of the raw weights. The model is a plain Transformers model with plain hooks that live for one pass.

B sequences · T positions · D width of a site · V vocabulary.
"""

import copy
import difflib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from saekit_kernels import why_not_bf16
from torch import Tensor, nn

from saekit.device import resolve_device
from saekit.errors import SaekitError

DEMO = Path(__file__).parent / "demo" / "model"
# on a CPU, layers up to this width run faster in native bf16 than under autocast, whose casts they cannot hide
SMALL_WIDTH = 1024

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
    """TransformerLens hook name."""
    d: int
    """Width of an activation."""
    layer: int
    """Block it lies in; -1 = before all blocks."""
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


class _Point(NamedTuple):
    module: nn.Module
    side: Literal["input", "output"]
    scale: float


class _Enough(Exception):
    """All sites have been read: leave the forward pass."""


def load_model(
    name: "str | Path | LanguageModel | tuple[Any, Any] | Any", *, device: str = "auto", compute: str = "auto"
) -> "LanguageModel":
    """A hub name, a local folder in Hugging Face format, a `.gguf` file, `saekit:demo`, or (model, tokenizer).

    A model object of the caller's is left as it is found: moved, cast or reconfigured never, except for what `capture`
    and `replace` put back. `compute="fp32"` on a half-precision object works on a copy.
    Raises SaekitError if it cannot be loaded, if a weight is missing in it, or if the device lacks what is asked for.
    """
    if isinstance(name, LanguageModel):
        return name
    if isinstance(name, (str, Path)):
        return _load(str(name), device, compute)
    hf, tokenizer = name if isinstance(name, tuple) else (name, None)
    identity = getattr(hf, "name_or_path", "") or type(hf).__name__
    return LanguageModel(hf, tokenizer, id=identity, compute=compute, owned=False)


class LanguageModel:
    """A Transformers model, its tokenizer, and the hooks between them and the toolkit.

    Threads may share one: passes wait for each other.
    """

    def __init__(self, hf, tokenizer, *, id: str, compute: str = "auto", owned: bool = False):
        self.id = id
        self.hf = hf
        self.tokenizer = tokenizer
        self.config = hf.config.get_text_config()
        self.device: torch.device = hf.get_input_embeddings().weight.device
        self.weights_fingerprint: str = weights_fingerprint(hf)
        """sha256 over names, dtypes, shapes and bytes of all weights as loaded, before any cast."""
        self.architecture: str = type(hf).__name__
        self.n_layers: int = self.config.num_hidden_layers
        self.d_model: int = self.config.hidden_size
        self.vocab_size: int = hf.get_input_embeddings().weight.shape[0]
        """Rows of the embedding; a tokenizer may use fewer."""
        self.max_context: int | None = getattr(self.config, "max_position_embeddings", None)
        self.attention: str = "sdpa" if getattr(hf, "_supports_sdpa", False) else "eager"
        self._lock = threading.RLock()
        self.compute: Literal["fp32", "bf16", "bf16-autocast"] = self._choose_compute(compute, owned)
        decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else None
        self._decoder = hf.base_model if decoder is None else decoder
        self._blocks = self._find_blocks()
        self._layout = LAYOUTS.get(self.config.model_type)
        if self._layout and getattr(self.config, "use_parallel_residual", False):
            self._layout = Layout(**{**self._layout.__dict__, "parallel": True})
        # tokens added later than the model's embedding may never occur; text that holds one is refused then
        if tokenizer is not None and tokenizer.vocab_size > self.vocab_size:
            raise SaekitError(
                f"tokenizer has {tokenizer.vocab_size:,} ids but the model {id} embeds {self.vocab_size:,}; "
                "give the tokenizer that belongs to the model"
            )

    def __str__(self) -> str:
        return (
            f"{self.id}: {self.architecture}, {self.n_layers} layers × {self.d_model}, "
            f"{self.compute}, {self.attention} attention, {self.device}"
        )

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

    def _find_blocks(self) -> nn.ModuleList:
        lists = {
            path: module
            for path, module in self._decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layers
        }
        if not lists:
            raise SaekitError(
                f"{self.architecture} has no list of {self.n_layers} blocks; saekit cannot name its sites"
            )
        return lists[min(lists, key=lambda path: path.count("."))]

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
        """The `tokenizer` of a store's manifest; None without one."""
        t = self.tokenizer
        if t is None:
            return None
        return {
            "id": self.id,
            "fingerprint": tokenizer_fingerprint(t),
            "vocab_size": min(len(t), self.vocab_size),
            "bos": t.bos_token_id,
            "eos": t.eos_token_id,
            "pad": t.pad_token_id,
        }

    # Sites

    def sites(self) -> list[str]:
        """Every name that can be captured and replaced, in the order of the forward pass."""
        names = [EMBED] if self._absent(EMBED) is None else []
        kinds = [kind for kind in IN_BLOCK if self._absent(kind) is None]
        return names + [f"blocks.{i}.{kind}" for i in range(self.n_layers) for kind in kinds]

    def check_site(self, name: str) -> Site:
        """The site of that name; SaekitError with the nearest names if there is none."""
        return self._site(name)[0]

    def _site(self, name: str) -> tuple[Site, _Point]:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        layer, kind = (int(match[1]), match[2]) if match else (-1, name)
        known = kind in IN_BLOCK if match else kind == EMBED
        if match and layer >= self.n_layers:
            raise SaekitError(f"{name}: the model has {self.n_layers} layers (0 to {self.n_layers - 1})")
        if not known:
            raise SaekitError(f"no site {name}; nearest: {', '.join(self._nearest(name))}")
        absent = self._absent(kind)
        if absent:
            raise SaekitError(f"{name} {absent}; use {' or '.join(k for k in self._kinds_nearest(kind))}")
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

    def _kinds_nearest(self, kind: str) -> list[str]:
        kinds = [k for k in IN_BLOCK if self._absent(k) is None]
        return [k for k in ("hook_resid_pre", "hook_resid_post") if k in kinds] or kinds

    def _nearest(self, name: str) -> list[str]:
        names = self.sites()
        match = re.match(r"blocks\.(\d+)\.", name)
        if match:
            names = [n for n in names if n.startswith(match[0])]
        return difflib.get_close_matches(name, names, n=3, cutoff=0.0)

    def _locate(self, name: str, layer: int, kind: str) -> tuple[Site, _Point]:
        layout, config, D = self._layout, self.config, self.d_model
        block = self._blocks[layer]
        if kind in ("hook_resid_pre", "hook_resid_post"):
            return Site(name, D, layer), _Point(block, "input" if kind == "hook_resid_pre" else "output", 1.0)
        assert layout is not None, kind
        if kind == EMBED:
            scale = getattr(config, layout.embed_scale) if layout.embed_scale else 1.0
            module = self._decoder.get_submodule(layout.embed)
            return Site(name, D, -1), _Point(module, "output", scale)
        if kind == "hook_resid_mid":
            return Site(name, D, layer), _Point(block.get_submodule(layout.mid), "input", 1.0)
        if kind in ("hook_attn_out", "hook_mlp_out"):
            scale = getattr(config, layout.block_scale) if layout.block_scale else 1.0
            path = layout.attn_out if kind == "hook_attn_out" else layout.mlp_out
            return Site(name, D, layer), _Point(block.get_submodule(path), "output", scale)
        if kind == "attn.hook_z":
            module, heads = block.get_submodule(layout.z), config.num_attention_heads
            d = _reads(module)
            return Site(name, d, layer, heads, d // heads), _Point(module, "input", 1.0)
        assert kind == "mlp.hook_post", kind
        module = block.get_submodule(layout.post)
        return Site(name, _reads(module), layer), _Point(module, "input", 1.0)

    @cached_property
    def _stream_is_plain(self) -> bool:
        """Whether each block reads exactly the (B, T, D) tensor that the one before it returned.

        Tried on four tokens, for architectures that have no layout of their own.
        """
        reads: dict[int, Tensor] = {}
        returns: dict[int, Tensor] = {}
        ids_BT = torch.arange(4, device=self.device)[None] % self.vocab_size

        def listen(i, block):
            def before(_, args, kwargs):
                reads[i] = _first(args, kwargs).clone()

            def after(_, args, output):
                returns[i] = _tensor(output).clone()

            return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]

        with self._running(), _hooks(h for i, block in enumerate(self._blocks) for h in listen(i, block)):
            self._decoder(input_ids=ids_BT, use_cache=False)
        layers = range(self.n_layers)
        return (
            all(i in reads and i in returns for i in layers)
            and all(x.shape == (1, 4, self.d_model) for x in [*reads.values(), *returns.values()])
            and all(torch.equal(returns[i], reads[i + 1]) for i in layers[:-1])
        )

    @cached_property
    def causal(self) -> bool:
        """Whether a token leaves everything before it as it was, tried by changing the last of eight tokens."""
        ids_BT = torch.arange(8, device=self.device).repeat(2, 1) % self.vocab_size
        ids_BT[1, -1] = (ids_BT[1, -1] + 1) % self.vocab_size
        last = f"blocks.{self.n_layers - 1}.hook_resid_post"
        x_BTD = self.capture(ids_BT, [last])[last].float()
        # equal tokens in two rows of a batch may differ by rounding; a token that is read makes a larger difference
        tolerance = 1e-5 if self.compute == "fp32" else 1e-2
        return bool((x_BTD[0, :-1] - x_BTD[1, :-1]).abs().max() <= tolerance * x_BTD[:, :-1].abs().max())

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
        found: dict[str, Tensor] = {}

        def hook(name, point):
            def keep(x):
                found[name] = x if point.scale == 1.0 else x * point.scale
                if len(found) == len(points):
                    raise _Enough

            return _listen(point, keep)

        with self._running(), _hooks(hook(name, point) for name, point in points.items()):
            try:
                self._decoder(input_ids=ids_BT.to(self.device), attention_mask=attention_mask, use_cache=False)
            except _Enough:
                return {name: found[name] for name in sites}
        silent = sorted(points.keys() - found.keys())
        raise SaekitError(
            f"{', '.join(silent)}: the model did not come past there in a forward pass; choose another site"
        )

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
        with self._running(), _hooks([_splice(point, fn)]):
            return self._head(ids_BT, attention_mask)

    def _head(self, ids_BT: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.hf.get_output_embeddings() is None:
            raise SaekitError(f"{self.architecture} has no language-model head; give a causal language model")
        return self.hf(input_ids=ids_BT.to(self.device), attention_mask=attention_mask, use_cache=False).logits

    @contextmanager
    def _running(self):
        """Evaluation mode, the recorded attention and arithmetic, no chatter; everything back as it was afterwards."""
        from transformers.utils import logging

        with self._lock, ExitStack() as stack:
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()
            stack.callback(logging.set_verbosity, verbosity)
            training = [m for m in self.hf.modules() if m.training]
            if training:
                self.hf.eval()
                stack.callback(lambda: [setattr(m, "training", True) for m in training])
            attention = self.config._attn_implementation
            if attention != self.attention:
                self.hf.set_attn_implementation(self.attention)
                stack.callback(self.hf.set_attn_implementation, attention)
            effective = self.config._attn_implementation
            assert effective == self.attention, f"attention is {effective}, not {self.attention}"
            if self.compute == "bf16-autocast":
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield

    @torch.no_grad()
    def unembedding(self) -> Unembedding:
        """W_U with the final norm's gain folded in, centred over the vocabulary, in float32.

        A norm that subtracts the mean over D is folded in as well. Raises SaekitError without a head, or for an
        architecture whose final norm is not known.
        """
        head = self.hf.get_output_embeddings()
        if head is None or self._layout is None:
            raise SaekitError(f"the unembedding of {self.architecture} is not known; logit weights are left out")
        norm = self._decoder.get_submodule(self._layout.norm)
        W_U_VD = head.weight.float() * (norm.weight.float() + self._layout.norm_offset)
        if isinstance(norm, nn.LayerNorm):
            W_U_VD = W_U_VD - W_U_VD.mean(1, keepdim=True)
        W_U_VD = W_U_VD - W_U_VD.mean(0)
        W_U_VD = W_U_VD / getattr(self.config, "logits_scaling", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return Unembedding(W_U_VD, f"before the model's soft cap of the logits at ±{cap:g}" if cap else "")


# Loading


def _load(name: str, device: str, compute: str) -> LanguageModel:
    import transformers
    from transformers.utils import logging

    if name == "saekit:demo":
        folder, gguf = DEMO, None
        if not (folder / "config.json").is_file():
            raise SaekitError(
                "saekit:demo is not part of this installation; install saekit again or name another model"
            )
    else:
        folder, gguf = _where(name)
    target = resolve_device(device)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **({"gguf_file": gguf} if gguf else {})
        )
        hf, info = loaded
        tokenizer = _load_tokenizer(folder, gguf)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise SaekitError(f"cannot load model {name}: {_why(error, folder)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"])
    if missing:
        raise SaekitError(
            f"cannot load model {name}: {len(missing)} weights are missing in it, {missing[0]} among them; "
            f"they would be random (loaded as {type(hf).__name__})"
        )
    return LanguageModel(hf.to(target), tokenizer, id=name, compute=compute, owned=True)


def _where(name: str) -> tuple[str | Path, str | None]:
    """Folder or hub name, and the .gguf file in it if that is what to read."""
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise SaekitError(f"cannot load model {name}: no such file")
        _need_gguf(name)
        return path.parent, path.name
    if path.is_dir():
        if (path / "config.json").is_file():
            return path, None
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            _need_gguf(name)
            return path, files[0].name
        raise SaekitError(f"cannot load model {name}: no config.json there")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SaekitError(f"cannot load model {name}: no such folder; give a folder, a .gguf file or a hub name")
    return name, None


def _need_gguf(name: str):
    from importlib.util import find_spec

    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise SaekitError(f"reading {name} needs gguf and accelerate: pip install 'saekit[gguf]'")


def _load_tokenizer(folder: str | Path, gguf: str | None):
    """The model's tokenizer; None for a folder that holds none."""
    import transformers

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    if isinstance(folder, Path) and gguf is None and not any((folder / f).is_file() for f in files):
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))


def _cast(hf: nn.Module, dtype: torch.dtype):
    """Weights and persistent buffers; buffers computed from the configuration, such as rotary angles, stay exact."""
    kept = {name for name, _ in hf.named_parameters()} | hf.state_dict(keep_vars=True).keys()
    for name, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
        if name in kept and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _why(error: BaseException, folder: str | Path) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(folder, Path) or not isinstance(error, OSError):
        return _one_line(error)
    if HF_HUB_OFFLINE:
        return "no such folder, and it is not in the local cache while HF_HUB_OFFLINE is set"
    return f"no such folder, and the hub says: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# Fingerprints


def weights_fingerprint(hf: nn.Module) -> str:
    """`sha256:…` over lines `name dtype shape sha256(bytes)` of all parameters and persistent buffers, sorted by name."""

    def line(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(raw.numpy().data).hexdigest()
        return f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))} {digest}\n"

    # hashing lets go of the interpreter: two threads read two tensors
    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(line, sorted(hf.state_dict().items())))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer) -> str:
    """`sha256:…` of the serialised tokenizer, without its padding and truncation settings, and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None
    else:
        state = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
        state["merges"] = [list(pair) for pair in getattr(tokenizer, "bpe_ranks", {})]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([state, special], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Hooks


@contextmanager
def _hooks(handles):
    """Registers the handles as the iterable is read and removes them at the end, whatever happens."""
    registered = []
    try:
        registered.extend(handles)
        yield
    finally:
        for handle in registered:
            handle.remove()


def _reads(module: nn.Module) -> int:
    """Width of what a projection reads; Transformers' Conv1D keeps its weight transposed."""
    return module.in_features if isinstance(module, nn.Linear) else module.get_parameter("weight").shape[0]


def _tensor(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _listen(point: _Point, keep: Callable[[Tensor], None]):
    if point.side == "input":
        return point.module.register_forward_pre_hook(lambda _, args, kw: keep(_first(args, kw)), with_kwargs=True)
    return point.module.register_forward_hook(lambda _, args, output: keep(_tensor(output)))


def _splice(point: _Point, fn: Callable[[Tensor], Tensor]):
    if point.side == "input":
        # in place, because a block adds the very tensor that its norm reads to what comes behind
        def before(_, args, kwargs):
            x = _first(args, kwargs)
            x.copy_(fn(x.clone()))

        return point.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_, args, output):
        x = _tensor(output)
        if point.scale == 1.0:
            new = fn(x).to(x.dtype)
        else:
            y = x * point.scale
            # the change alone is scaled back, so that no change is exactly none
            new = x + (fn(y) - y).to(x.dtype) / point.scale
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return point.module.register_forward_hook(after)
