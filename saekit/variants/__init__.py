"""The autoencoders, by name. No torch is imported here: the command line reads these dataclasses for its help."""

from saekit.variants.base import Variant
from saekit.variants.topk import TopK

VARIANTS: dict[str, type[Variant]] = {cls.name: cls for cls in (TopK,)}

__all__ = ["VARIANTS", "TopK", "Variant"]
