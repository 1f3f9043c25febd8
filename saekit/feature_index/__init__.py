"""Every firing of every feature, on disk: built in one pass, read in microseconds, drawn the same everywhere.

    index = saekit.open_index("saes/x")
    index.feature(123)                 # draws itself in a notebook
    print(index.feature(123))          # in a terminal

build.py is a consumer of `encode_store`, reader.py is `FeatureIndex`, render.py turns what the reader returns into HTML
or text, labels.py keeps what people write about features.
"""

from saekit.feature_index.build import IndexBuilder, VocabBytes, vocab_bytes
from saekit.feature_index.labels import Labels
from saekit.feature_index.reader import Feature, FeatureIndex, open_index

__all__ = ["Feature", "FeatureIndex", "IndexBuilder", "Labels", "VocabBytes", "open_index", "vocab_bytes"]
