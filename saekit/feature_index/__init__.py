"""Every firing of every feature, on disk: built in one pass, read in microseconds, drawn the same everywhere.

    index = saekit.open_index("saes/x")
    index.feature(123)                 # draws itself in a notebook
    print(index.feature(123))          # in a terminal

build.py is a consumer of `encode_store`, reader.py is `FeatureIndex`, render.py turns what the reader returns into HTML
or text, labels.py keeps what people write about features.
"""

from importlib import import_module

_HOME = {
    "Feature": "reader",
    "FeatureIndex": "reader",
    "open_index": "reader",
    "Labels": "labels",
    "IndexBuilder": "build",
    "build_index": "build",
    "VocabBytes": "build",
    "vocab_bytes": "build",
}
__all__ = [
    "Feature",
    "FeatureIndex",
    "IndexBuilder",
    "Labels",
    "VocabBytes",
    "build_index",
    "open_index",
    "vocab_bytes",
]


def __getattr__(name: str):
    # Late, because reading an index needs no torch and building one does.
    if name in _HOME:
        return getattr(import_module(f"saekit.feature_index.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
