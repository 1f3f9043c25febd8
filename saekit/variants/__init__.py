"""The autoencoders, by name. No torch is imported here: the command line reads these dataclasses for its help."""

from saekit.variants.abs_topk import AbsTopK
from saekit.variants.base import Counted, Penalised, Revived, Variant
from saekit.variants.feature_choice import FeatureChoice
from saekit.variants.gated import Gated
from saekit.variants.jumprelu import JumpReLU
from saekit.variants.matryoshka import Matryoshka
from saekit.variants.mutual_choice import MutualChoice
from saekit.variants.relu import ReLU
from saekit.variants.top_afa import TopAFA
from saekit.variants.topk import TopK
from saekit.variants.variational import Variational

VARIANTS: dict[str, type[Variant]] = {
    cls.name: cls
    for cls in (
        *(TopK, AbsTopK, MutualChoice, FeatureChoice, Variational, TopAFA),
        *(ReLU, JumpReLU, Gated, Matryoshka),
    )
}

__all__ = [
    "VARIANTS",
    "AbsTopK",
    "Counted",
    "FeatureChoice",
    "Gated",
    "JumpReLU",
    "Matryoshka",
    "MutualChoice",
    "Penalised",
    "ReLU",
    "Revived",
    "TopAFA",
    "TopK",
    "Variant",
    "Variational",
]
