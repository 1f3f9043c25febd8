"""saekit: sparse autoencoders from text to browser.

    import saekit as sk

    store = sk.collect("gpt2", site="blocks.6.hook_resid_post", text="data/*.jsonl", out="acts/gpt2")
    sae   = sk.train(sk.TopK(k=32), store, out="saes/gpt2-topk")
    print(sk.evaluate(sae, store))
    index = sk.build_index(sae, store)
    index.feature(123)                # draws itself in a notebook

Names are imported when they are first used, so that `import saekit` is instant and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "AbsTopK": "saekit.variants",
    "FeatureChoice": "saekit.variants",
    "Gated": "saekit.variants",
    "JumpReLU": "saekit.variants",
    "Matryoshka": "saekit.variants",
    "MutualChoice": "saekit.variants",
    "ReLU": "saekit.variants",
    "SAE": "saekit.sae",
    "SaekitError": "saekit.errors",
    "StreamOptions": "saekit.config",
    "Synthetic": "saekit.synthetic",
    "TopAFA": "saekit.variants",
    "TopK": "saekit.variants",
    "Trainer": "saekit.trainer",
    "VARIANTS": "saekit.variants",
    "Variational": "saekit.variants",
    "ablate_at": "saekit.steering",
    "build_index": "saekit.feature_index",
    "collect": "saekit.collector",
    "evaluate": "saekit.evaluation",
    "load_model": "saekit.model",
    "open_index": "saekit.feature_index",
    "open_store": "saekit.store",
    "steer": "saekit.steering",
    "train": "saekit.run",
}
__all__ = [
    "SAE",
    "VARIANTS",
    "AbsTopK",
    "FeatureChoice",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "MutualChoice",
    "ReLU",
    "SaekitError",
    "StreamOptions",
    "Synthetic",
    "TopAFA",
    "TopK",
    "Trainer",
    "Variational",
    "__version__",
    "ablate_at",
    "build_index",
    "collect",
    "evaluate",
    "load_model",
    "open_index",
    "open_store",
    "steer",
    "train",
]

if TYPE_CHECKING:
    from saekit.collector import collect
    from saekit.config import StreamOptions
    from saekit.errors import SaekitError
    from saekit.evaluation import evaluate
    from saekit.feature_index import build_index, open_index
    from saekit.model import load_model
    from saekit.run import train
    from saekit.sae import SAE
    from saekit.steering import ablate_at, steer
    from saekit.store import open_store
    from saekit.synthetic import Synthetic
    from saekit.trainer import Trainer
    from saekit.variants import (
        VARIANTS,
        AbsTopK,
        FeatureChoice,
        Gated,
        JumpReLU,
        Matryoshka,
        MutualChoice,
        ReLU,
        TopAFA,
        TopK,
        Variational,
    )


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'saekit' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
