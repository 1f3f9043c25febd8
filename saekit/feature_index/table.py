"""Many features at once, as rows with columns on demand.

    table = idx.table(sort="-energy", density=(1e-5, 1e-2), alive=True)
    table.features, table["density"], table.to_csv()

`FeatureIndex.table` chooses and sorts the rows; this is what it returns.
"""

import csv
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from saekit.feature_index import render
from saekit.feature_index.format import ABSENT, FLAGS
from saekit.feature_index.labels import Entry

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

DEFAULT_COLUMNS = (
    "feature", "label", "density", "n", "top_text", "top_token_share", "token_entropy", "energy", "max_dec_cos",
)  # fmt: skip


class FeatureTable:
    """Feature numbers in order, with columns on demand. Iterating gives dicts; `features` is the plain array."""

    def __init__(
        self, index: "FeatureIndex", features: np.ndarray, columns: tuple[str, ...], entries: dict[int, Entry]
    ):
        self.index, self.features, self.names, self._entries = index, features, columns, entries

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self):
        columns = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.to_dict().items()}
        for i in range(len(self)):
            yield {name: column[i] for name, column in columns.items()}

    def column(self, name: str) -> np.ndarray | list:
        """A column for these rows. Beside the index's own: feature, density, label, bookmarked, flags_text, top_text, up,
        down (strongest logit token) and bar (16-bin histogram, tallest bin = 1)."""
        index, rows = self.index, self.features
        if name == "label":
            return [self._entries[j].label if j in self._entries else "" for j in rows.tolist()]
        if name == "bookmarked":
            return [j in self._entries and self._entries[j].bookmarked for j in rows.tolist()]
        if name == "flags_text":
            return _each(index.column("flags")[rows], lambda f: ", ".join(k for k, bit in FLAGS.items() if f & bit))
        if name == "top_text":
            return _each(index.column("top_token")[rows], self._text)
        if name in ("up", "down"):
            return _each(index.file("logits")["token"][rows, int(name == "down"), 0], self._text)
        if name == "bar":
            bins = index.file("examples")["histogram"][rows].reshape(len(rows), 16, 4).sum(2, dtype=np.int64)
            return bins / np.maximum(1, bins.max(1, keepdims=True))
        return index.column(name)[rows]

    def _text(self, token: int) -> str:
        return "" if token == ABSENT else self.index.token_text(token)

    def __getitem__(self, name: str) -> np.ndarray | list:
        return self.column(name)

    def to_dict(self) -> dict[str, np.ndarray | list]:
        return {name: self.column(name) for name in self.names}

    def to_pandas(self):
        """A pandas DataFrame; pandas must be installed."""
        import pandas

        return pandas.DataFrame({k: list(v) if getattr(v, "ndim", 1) > 1 else v for k, v in self.to_dict().items()})

    def to_csv(self) -> str:
        """CSV text; cells of text that a spreadsheet would run as a formula get a leading apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.names)
        for row in self:
            writer.writerow(
                "'" + v if isinstance(v, str) and v[:1] in ("=", "+", "-", "@") else v for v in row.values()
            )
        return out.getvalue()

    def _repr_html_(self) -> str:
        return render.rows_html(self.names, [self.column(name) for name in self.names], len(self))

    def __repr__(self) -> str:
        return f"FeatureTable({len(self):,} features, columns {', '.join(self.names)})"


def _each(values: np.ndarray, say: Callable[[int], str]) -> list[str]:
    """What `say` makes of every value; asked once for equal ones, of which a long table has many."""
    different, place = np.unique(values, return_inverse=True)
    said = [say(value) for value in different.tolist()]
    return [said[i] for i in place.tolist()]
