"""Which weights and which tokenizer: one sha256 each, the same after saving and loading, another after any change.

weights_fingerprint(model)        # "sha256:51b2…"
tokenizer_fingerprint(tokenizer)  # "sha256:9a4d…"
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


def weights_fingerprint(module: nn.Module) -> str:
    """`sha256:…` over lines `name dtype shape sha256(bytes)` of all parameters and persistent buffers, sorted by name."""

    def line(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest = hashlib.sha256(raw.numpy().data).hexdigest()
        return f"{name} {str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))} {digest}\n"

    # a module may put other things than tensors into its state
    tensors = sorted((name, x) for name, x in module.state_dict().items() if isinstance(x, Tensor))
    # hashing lets go of the interpreter: threads read several tensors at once
    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(line, tensors))
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
