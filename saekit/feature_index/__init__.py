"""Every firing of every feature, on disk: built in one pass, read in microseconds, drawn the same everywhere.

    index = saekit.open_index("saes/x")
    index.feature(123)                 # draws itself in a notebook
    print(index.feature(123))          # in a terminal

Each file imports only from those above it:

    format.py                               names, sizes and stored values both sides agree on
    labels.py                               what people write about features
    render.py                               what the reader returns, as HTML or text
    vocabulary.py, geometry.py, tables.py   what the builder writes: bytes of tokens, weights, everything per feature
    feature.py, table.py                    one feature; many as rows
    search.py, encoded.py                   finding features; those of a text that was typed
    per_token.py, aims.py                   the SAE as a whole: norms, features per token; what it was trained for
    reader.py                               `open_index` and `FeatureIndex`
    segments.py                             the first pass: what fires where, in stretches of text that are kept
    build.py                                `IndexBuilder`, a consumer of `encode_store`, and `build_index`
"""

from importlib import import_module

_HOME = {
    "Feature": "feature",
    "FeatureIndex": "reader",
    "open_index": "reader",
    "Labels": "labels",
    "IndexBuilder": "build",
    "build_index": "build",
    "VocabBytes": "vocabulary",
    "vocab_bytes": "vocabulary",
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
