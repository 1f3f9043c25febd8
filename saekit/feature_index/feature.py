"""One feature of an index: its numbers, examples, tokens, neighbours and label.

    f = idx.feature(123)
    f.density, f.top(20), f.quantiles(), f.near_misses(16), f.tokens(16), f.neighbours("together", 20)
    f.label = "opening quotes"

What the questions answer with, from `Example` to `Neighbour`, comes first; `Feature` holds an index and a number and reads
nothing before it is asked. n firings · E encoded tokens · S sequences.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saekit.errors import SaekitError
from saekit.feature_index import render
from saekit.feature_index.format import ABSENT, FLAGS, PER_SLICE, SLICES, spread
from saekit.feature_index.labels import Entry

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

ZOOMS = {"stacked": (5, 5), "snippet": (24, 8), "full": None}
SIGNS = {"+": 0, "pos": 0, "-": 1, "neg": 1}
# firings counted for what fires together, and joint ones it takes
TOGETHER_POSITIONS = 20_000
TOGETHER_LEAST = 5
FEW = 10
"""A feature that fires less often shows every firing and no quantiles."""


class Histogram(NamedTuple):
    edges: np.ndarray
    """65 bin edges: [−m, m] for signed codes, else [0, m], m = largest magnitude."""
    counts: np.ndarray
    """Firings per bin (64)."""


class TokenCount(NamedTuple):
    token: int
    text: str
    count: int
    """Firings on this token."""
    share: float
    """Of the feature's firings."""
    precision: float
    """Share of this token's encoded occurrences on which the feature fires."""
    f1: float
    """Of "fires iff the token is this one"; recall is `share`."""


class LogitToken(NamedTuple):
    token: int
    text: str
    weight: float
    """Decoder row times unembedding, before a soft cap."""


class Logits(NamedTuple):
    up: list[LogitToken]
    down: list[LogitToken]
    note: str
    """What the numbers leave out, such as a soft cap; empty if nothing."""


class Neighbour(NamedTuple):
    feature: int
    value: float
    """Cosine, or normalised pointwise mutual information for `together`."""
    count: int
    """Tokens on which both fire; 0 for cosines."""
    label: str
    agree: float | None = None
    """Share of the tokens on which both fire that give them codes of one sign; None for codes that are never negative, and where
    fewer than five such tokens were seen."""


@dataclass(frozen=True)
class Example:
    """A firing (or a near miss) in its text. `tokens`, `positions`, `codes`, `encoded` and `pieces` have equal length."""

    tokens: np.ndarray
    """Token ids (int64)."""
    positions: np.ndarray
    """Token positions in the index (int64)."""
    codes: np.ndarray
    """Codes of the feature, 0 where it is silent (float32)."""
    encoded: np.ndarray
    """False where no code was computed (bool)."""
    pieces: tuple[bytes, ...]
    """Raw bytes of each token."""
    special: np.ndarray
    """Special tokens (bool)."""
    centre: int
    """Index of the firing in the arrays."""
    doc: int
    sequence: int
    at_start: bool
    """The window begins where the sequence begins."""
    at_end: bool
    """The window ends where the sequence ends."""
    rank: int | None = None
    """Place among the feature's firings of its sign, 1 = strongest, where known."""
    document: str = ""
    """Name of the document, where known."""
    std: np.ndarray | None = None
    """Standard deviation of each code, 0 where silent (float32); None where codes have none."""

    @property
    def value(self) -> float:
        return float(self.codes[self.centre])

    @property
    def position(self) -> int:
        """Token position of the firing."""
        return int(self.positions[self.centre])

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class Slice:
    """Examples from one of the slices of equal count, strongest first."""

    low: float
    """Smallest magnitude in the slice."""
    high: float
    """Largest magnitude in the slice."""
    count: int
    sign: str
    examples: list[Example]


class Feature:
    """One feature of an index: numbers, examples, neighbours, label. Nothing is read before it is asked for."""

    def __init__(self, index: "FeatureIndex", number: int):
        self.index, self.number = index, number

    def __repr__(self) -> str:
        return f"Feature({self.number}, {self.index.name!r})"

    def column(self, name: str) -> Any:
        """This feature's entry of a column of the index."""
        return self.index.column(name)[self.number].item()

    # numbers

    @property
    def n(self) -> int:
        """Number of tokens it fires on."""
        return self.column("n")

    @property
    def signed(self) -> bool:
        return self.index.signed

    @property
    def density(self) -> float:
        """Share of encoded tokens it fires on."""
        return self.n / max(1, self.index.n_encoded)

    @property
    def density_interval(self) -> tuple[float, float]:
        """95 % interval of the density, tokens of one sequence not independent; (0, 3/E) for a dead feature."""
        E, S = max(1, self.index.n_encoded), max(1, self.index.n_sequences)
        if self.n == 0:
            return 0.0, min(1.0, 3 / E)
        half = 1.96 * math.sqrt(max(0.0, self.column("seq_sq") - self.n**2 / S)) / E
        return max(0.0, self.density - half), min(1.0, self.density + half)

    @property
    def flags(self) -> tuple[str, ...]:
        value = self.column("flags")
        return tuple(name for name, bit in FLAGS.items() if value & bit)

    @property
    def max(self) -> float:
        """Largest magnitude."""
        return max(self.column("max_pos"), -self.column("max_neg"))

    @property
    def positions(self) -> np.ndarray:
        """Positions it fires on, increasing (n) uint32, memory-mapped; of a capped feature those that are kept."""
        return self.index.firings(self.number)[0]

    @property
    def values(self) -> np.ndarray:
        """Codes at `positions` (n) float32."""
        return self.index.firings(self.number)[1].astype(np.float32) * np.float32(self.index.scale)

    @property
    def histogram(self) -> Histogram:
        """64 equal bins over [−m, m] for signed codes, else (0, m], m = largest magnitude."""
        m = self.max
        counts = self.index.file("examples")["histogram"][self.number].astype(np.int64)
        return Histogram(np.linspace(-m if self.signed else 0.0, m, 65), counts)

    @property
    def std(self) -> float | None:
        """Standard deviation of the posterior around each code; None where codes have none."""
        return self.column("std_mean") if self.index.has_std else None

    @property
    def uncertain(self) -> float:
        """Share of the firings whose magnitude is below the standard deviation, so that their sign is not sure."""
        return float((np.abs(self.values) < self.std).mean()) if self.std is not None and self.n else math.nan

    # examples

    def _example(self, position: int, zoom: str, rank: int | None = None) -> Example:
        if zoom not in ZOOMS:
            raise SaekitError(f"no zoom {zoom}; known are {', '.join(ZOOMS)}")
        before, after = ZOOMS[zoom] or (None, None)
        return self.index.window(position, before, after, feature=self.number, rank=rank)

    @property
    def capped(self) -> bool:
        """Whether only a sample of its firings is kept; counts, moments, quantiles, histogram and tokens are of all."""
        return self.index.is_capped(self.number)

    def _sign(self, sign: str) -> int:
        if sign not in SIGNS:
            raise SaekitError(f"no sign {sign}; known are + and -")
        return SIGNS[sign]

    def _row(self, sign: str) -> int | None:
        """Row of a sign in the tables, None where the sign does not exist."""
        row = self._sign(sign)
        return row if row == 0 or self.signed else None

    def top(self, k: int = 20, sign: str = "+", *, zoom: str = "snippet") -> list[Example]:
        """The strongest examples of a sign, one per sequence and per 8-token context, at most 64.

        All of them, repeats too, for a feature that fires fewer than ten times.
        """
        row = self._row(sign)
        if row is None:
            return []
        if self.n < FEW:
            fired, stored = self.index.firings(self.number)
            order = _by_strength(stored, row)[:k]
            return [self._example(p, zoom, rank) for rank, p in enumerate(fired[order].tolist(), 1)]
        table = self.index.file("examples")
        pairs = zip(table["top_position"][self.number, row, :k].tolist(), table["top_value"][self.number, row, :k])
        found = []
        for rank, (position, value) in enumerate(pairs, 1):
            if position != ABSENT:
                found.append(self._example(position, zoom, rank))
                # of a capped feature the firing itself may not be among those that are kept
                found[-1].codes[found[-1].centre] = np.float32(value) * np.float32(self.index.scale)
        return found

    def quantiles(self, bins: int = 10, per_bin: int = 4, sign: str = "+", *, zoom: str = "snippet") -> list[Slice]:
        """Examples from `bins` slices of equal count, strongest slice first; fewer slices if it fires less often.

        Ten slices with up to eight examples are stored; any other number, and those of a capped feature, are drawn from the
        firings the same way.
        """
        row = self._row(sign)
        if row is None:
            return []
        fired, stored = self.index.firings(self.number)
        # counted from the strongest down: magnitude bits of float16 sort as integers, and counting beats sorting
        bits = stored.view(np.uint16)
        bits = bits[(bits < 0x8000) == (row == 0)] & 0x7FFF
        down = np.cumsum(np.bincount(bits, minlength=0x7C00)[::-1])
        is_stored = bins == SLICES and per_bin <= PER_SLICE and not self.capped
        order = None if is_stored else _by_strength(stored, row)
        slices = []
        for i in range(bins):
            a, b = i * len(bits) // bins, (i + 1) * len(bits) // bins
            if a == b:
                continue
            if order is None:
                sample = self.index.file("examples")["sample_position"][self.number, row, i]
                sample = sample[sample != ABSENT]
                sample = sample[np.arange(min(per_bin, len(sample))) * max(per_bin, len(sample)) // per_bin]
            else:
                sample = fired[order[a + spread(b - a, per_bin, self.number * 64 + row * 32 + i)]]
            size = (0x7C00 - 1 - np.searchsorted(down, [b - 1, a], side="right")).astype(np.uint16).view(np.float16)
            low, high = (size.astype(np.float32) * np.float32(self.index.scale)).tolist()
            slices.append(Slice(low, high, b - a, "+-"[row], [self._example(p, zoom) for p in sample.tolist()]))
        return slices

    def random(self, k: int = 20, seed: int = 0, *, sign: str = "both", zoom: str = "snippet") -> list[Example]:
        """Firings drawn evenly over the text, in text order; the same for the same seed."""
        fired, stored = self.index.firings(self.number)
        if sign != "both":
            keep = np.flatnonzero(stored > 0 if self._sign(sign) == 0 else stored < 0)
            fired = fired[keep]
        chosen = spread(len(fired), k, (seed << 32) + self.number)
        return [self._example(p, zoom) for p in fired[chosen].tolist()]

    def near_misses(self, k: int = 16, *, zoom: str = "snippet") -> list[Example]:
        """Its three commonest tokens where it is silent, sequences where it fires elsewhere first.

        Empty for a dead feature, for one that is dense (its silence says little), and for one that is capped (a firing that is
        not kept would look like silence).
        """
        if self.n == 0 or "dense" in self.flags or self.capped:
            return []
        table, examples = self.index.file("tokens"), self.index.file("examples")
        fired = self.positions
        common = [t for t in examples["token_id"][self.number, :3].tolist() if t != ABSENT]
        silent = []
        for token in common:
            at = self.index.positions_of(token)
            where = np.searchsorted(fired, at)
            hit = fired[np.minimum(where, len(fired) - 1)] == at
            silent.append(at[~hit & table["encoded"][at]])
        at = np.sort(np.concatenate(silent)) if silent else np.zeros(0, np.uint32)
        # searched from the side of the sequences, which are few
        starts = table["seq_start"].astype(np.uint32)
        own = np.diff(np.searchsorted(fired, starts)) > 0
        shared = np.repeat(own, np.diff(np.searchsorted(at, starts)))
        first = at[shared]
        chosen = first[spread(len(first), k, self.number)]
        rest = at[~shared]
        chosen = np.concatenate([chosen, rest[spread(len(rest), k - len(chosen), self.number)]])
        return [self._example(p, zoom) for p in chosen.tolist()]

    # tables

    def tokens(self, k: int = 16) -> list[TokenCount]:
        """The tokens it fires on most often (at most 16), with precision and recall."""
        examples, out = self.index.file("examples"), []
        pairs = zip(
            examples["token_id"][self.number, :k].tolist(),
            examples["token_fires"][self.number, :k].tolist(),
            strict=True,
        )
        for token, count in pairs:
            if token == ABSENT:
                break
            occurrences = max(1, self.index.occurrences(token))
            f1 = 2 * count / (self.n + occurrences)
            out.append(TokenCount(token, self.index.token_text(token), count, count / self.n, count / occurrences, f1))
        return out

    def logits(self, k: int = 20) -> Logits | None:
        """Strongest up and down tokens of the decoder row (at most 20), None where the index has no logit weights."""
        if not self.index.has_logits:
            return None
        table = self.index.file("logits")

        def side(i: int) -> list[LogitToken]:
            pairs = zip(
                table["token"][self.number, i, :k].tolist(), table["weight"][self.number, i, :k].tolist(), strict=True
            )
            return [LogitToken(t, self.index.token_text(t), w) for t, w in pairs if t != ABSENT]

        note = (self.index.manifest["build"].get("logits") or {}).get("note", "")
        return Logits(up=side(0), down=side(1), note=note)

    def neighbours(self, kind: str = "decoder", k: int = 20) -> list[Neighbour]:
        """Nearest features by `decoder` or `encoder` cosine (at most 20, signed, by size), or what fires `together`.

        Empty where the index lacks what is needed. For signed codes each says how often the two signs agree: an opposite row
        with opposite codes is the same feature.
        """
        if kind not in ("decoder", "encoder", "together"):
            raise SaekitError(f"no neighbours {kind}; known are decoder, encoder, together")
        if kind == "together":
            rows = self._together(k)
        elif self.index.has_neighbours:
            table = self.index.file("neighbours")
            features, cos = table[f"{kind}_feature"][self.number, :k], table[f"{kind}_cos"][self.number, :k]
            rows = [(f, c, 0) for f, c in zip(features.tolist(), cos.tolist(), strict=True) if f != ABSENT]
        else:
            rows = []
        agree = self._agreement([f for f, _, _ in rows])
        return [Neighbour(f, v, c, self.index.labels.get(f).label, a) for (f, v, c), a in zip(rows, agree, strict=True)]

    def _agreement(self, others: list[int]) -> list[float | None]:
        """How often the sign of each other feature is this one's, at a sample of its positions."""
        if not self.signed or self.n == 0:
            return [None] * len(others)
        fired, stored = self.index.firings(self.number)
        seen = spread(len(fired), TOGETHER_POSITIONS, self.number)
        at, negative, shares = fired[seen], stored[seen] < 0, []
        for other in others:
            positions, values = self.index.firings(other)
            where = np.searchsorted(positions, at)
            both = np.flatnonzero(where < len(positions))
            both = both[positions[where[both]] == at[both]]
            same = (values[where[both]] < 0) == negative[both]
            shares.append(float(same.mean()) if len(same) >= TOGETHER_LEAST else None)
        return shares

    def _together(self, k: int) -> list[tuple[int, float, int]]:
        """By normalised pointwise mutual information, at least 5 joint firings seen; (feature, NPMI, joint firings)."""
        if self.n == 0 or not self.index.has_by_token:
            return []
        positions = self.positions
        seen = positions[spread(len(positions), TOGETHER_POSITIONS, self.number)]
        counts = self.index.counts_at(seen)
        counts[self.number] = 0
        others = np.flatnonzero(counts >= TOGETHER_LEAST)
        if len(others) == 0:
            return []
        E = self.index.n_encoded
        joint = counts[others] / len(seen) * self.density
        lift = joint / (self.density * self.index.column("n")[others] / E)
        # a pair that fires on every token carries no information: NPMI 0 by its limit
        surprise = -np.log(joint)
        npmi = np.divide(np.log(lift), surprise, out=np.zeros_like(lift), where=surprise > 1e-12)
        order = np.lexsort((others, -npmi))[:k]
        scale = self.n / len(seen)
        return [(int(others[i]), float(npmi[i]), round(float(counts[others[i]]) * scale)) for i in order]

    # words

    @property
    def entry(self) -> Entry:
        """Label, tags, notes and bookmark with author, time and revision."""
        return self.index.labels.get(self.number)

    @property
    def label(self) -> str:
        return self.entry.label

    @label.setter
    def label(self, text: str):
        self.index.labels.save(self.number, label=text)

    @property
    def notes(self) -> str:
        return self.entry.notes

    @notes.setter
    def notes(self, text: str):
        self.index.labels.save(self.number, notes=text)

    @property
    def tags(self) -> tuple[str, ...]:
        return self.entry.tags

    @tags.setter
    def tags(self, tags: Sequence[str]):
        self.index.labels.save(self.number, tags=list(tags))

    @property
    def bookmarked(self) -> bool:
        return self.entry.bookmarked

    @bookmarked.setter
    def bookmarked(self, value: bool):
        self.index.labels.save(self.number, bookmarked=value)

    # shown

    def html(self, view: str = "top", zoom: str = "snippet", sign: str = "both", scale: str = "own") -> str:
        """The feature as one HTML fragment with its style; the same bytes in notebook, export and browser."""
        return render.feature_html(self, view=view, zoom=zoom, sign=sign, scale=scale)

    def _repr_html_(self) -> str:
        return self.html()

    def text(self, view: str = "top", *, color: bool = False) -> str:
        """The feature for a terminal, with ANSI colours if asked."""
        return render.feature_text(self, ansi=color, view=view)

    def __str__(self) -> str:
        return self.text()

    def to_dict(self) -> dict:
        """Numbers, label, token table, logit weights, neighbours and top examples as plain Python objects."""
        signs = "+-" if self.signed else "+"
        logits = self.logits()
        return {
            "sae": self.index.name,
            "site": self.index.site,
            "feature": self.number,
            "label": self.label,
            "tags": list(self.tags),
            "notes": self.notes,
            "density": self.density,
            "density_interval": list(self.density_interval),
            "flags": list(self.flags),
            "columns": {name: column[self.number].item() for name, column in self.index.file("features").items()},
            "histogram": {"edges": self.histogram.edges.tolist(), "counts": self.histogram.counts.tolist()},
            "tokens": [t._asdict() for t in self.tokens()],
            "logits": None if logits is None else {"up": [t._asdict() for t in logits.up], "down": [t._asdict() for t in logits.down], "note": logits.note},
            "neighbours": {kind: [x._asdict() for x in self.neighbours(kind)] for kind in ("decoder", "encoder", "together")},
            "top": {s: [_plain(e) for e in self.top(20, s)] for s in signs},
        }  # fmt: skip


def _plain(example: Example) -> dict:
    out = asdict(example)
    out["pieces"] = [p.decode("utf-8", errors="backslashreplace") for p in example.pieces]
    return {
        **{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in out.items()},
        "value": example.value,
        "text": example.text,
    }


def _by_strength(stored: np.ndarray, row: int) -> np.ndarray:
    """Indices of the codes of one sign (row 0 positive, 1 negative) by falling magnitude, ties by position."""
    mine = np.flatnonzero(stored > 0 if row == 0 else stored < 0)
    # magnitude bits of float16 sort as integers
    bits = (stored[mine].view(np.uint16) & 0x7FFF).astype(np.int32)
    return mine[np.argsort(-bits, kind="stable")]
