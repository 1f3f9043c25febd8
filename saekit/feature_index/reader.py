"""The feature index, read: memory-mapped arrays, one lazy view per feature.

    idx = open_index("saes/x")               # the SAE folder or its index/; maps nothing until asked
    f = idx.feature(123)
    f.density, f.top(20), f.near_misses(16), f.tokens(16), f.neighbours("together", 20)
    idx.table(sort="-energy", density=(1e-5, 1e-2), alive=True)
    idx.search("quote"); idx.search(regex=r"\\d+"); idx.search(like=123)

N token positions, E of them encoded · S sequences · F features · D width · Z non-zero codes · V vocabulary · G signs
(2 for signed codes, else 1). A feature fires where its code is not 0; its magnitude is the absolute code. Everything here
is safe to share between threads.
"""

import csv
import difflib
import functools
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saekit.errors import SaekitError
from saekit.feature_index import render
from saekit.feature_index.labels import Entry, Labels
from saekit.store.format import map_tensors

FORMAT, FORMAT_VERSION = "saekit-index", 1
ABSENT = 0xFFFFFFFF
FLAGS = {"dead": 1, "dense": 2, "near-duplicate": 4, "one-sided": 8, "capped": 16, "start-of-sequence": 32}
VIEWS = ("top", "quantiles", "random", "near")
ZOOMS = {"stacked": (5, 5), "snippet": (24, 8), "full": None}
SIGNS = {"+": 0, "pos": 0, "-": 1, "neg": 1}
# firings counted for what fires together, positions kept of a common token, and seconds given to a regular expression
TOGETHER_POSITIONS = 20_000
TOGETHER_LEAST = 5
SLICES, PER_SLICE = 10, 8
"""Slices of equal count that are stored, and examples in each."""
FEW = 10
"""A feature that fires less often shows every firing and no quantiles."""
REGEX_SECONDS = 2.0


class Firings(NamedTuple):
    features: np.ndarray
    """Feature numbers, by falling magnitude (int64)."""
    values: np.ndarray
    """Their codes (float32)."""


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


class Hit(NamedTuple):
    feature: int
    where: str
    """`label`, `token`, `text`, `regex` or `decoder`."""
    text: str
    """What was found."""
    score: float
    """F1 of "fires iff found here", cosine for `decoder`, 1 for a label."""
    precision: float
    recall: float


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

    @property
    def value(self) -> float:
        return float(self.codes[self.centre])

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


@dataclass(frozen=True)
class EncodedText:
    """Codes of a text that was typed. T tokens; rows of firings lie between `start[t]` and `start[t + 1]`."""

    tokens: np.ndarray
    pieces: tuple[bytes, ...]
    special: np.ndarray
    encoded: np.ndarray
    start: np.ndarray
    features: np.ndarray
    """By falling magnitude inside a token (int64)."""
    values: np.ndarray
    norm_x: np.ndarray
    error: np.ndarray
    """‖x − x̂‖² of each token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, t: int) -> Firings:
        """What fires on token t."""
        a, b = self.start[t], self.start[t + 1]
        return Firings(self.features[a:b], self.values[a:b])

    def codes_of(self, feature: int) -> np.ndarray:
        """Code of one feature on each token, 0 where it is silent (T) float32."""
        codes = np.zeros(len(self), np.float32)
        hits = np.flatnonzero(self.features == feature)
        codes[np.searchsorted(self.start, hits, side="right") - 1] = self.values[hits]
        return codes

    @property
    def l0(self) -> np.ndarray:
        """Features that fire on each token (T)."""
        return np.diff(self.start)

    def strongest(self, limit: int = 20, *, hide_dense: "FeatureIndex | None" = None) -> Firings:
        """Features by their largest magnitude anywhere in the text, with that code."""
        order = np.lexsort((self.features, -np.abs(self.values)))
        features, first = np.unique(self.features[order], return_index=True)
        values = self.values[order][first]
        keep = np.ones(len(features), bool)
        if hide_dense is not None:
            keep = hide_dense.column("flags")[features] & FLAGS["dense"] == 0
        features, values = features[keep], values[keep]
        best = np.lexsort((features, -np.abs(values)))[:limit]
        return Firings(features[best], values[best])


def splitmix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 (Steele et al. 2014): the fixed hash behind all samples of the index."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def spread(count: int, k: int, key: int) -> np.ndarray:
    """k distinct numbers below `count`, one drawn from each of k equal parts with an offset hashed from `key`; all if k ≥ count."""
    if k >= count:
        return np.arange(count, dtype=np.int64)
    offset = (splitmix(np.arange(k, dtype=np.uint64) + np.uint64(key * 1000003 % 2**63)) >> np.uint64(40)).astype(
        np.int64
    )
    return ((np.arange(k, dtype=np.int64) << 24) + offset) * count // (k << 24)


def open_index(path: str | Path) -> "FeatureIndex":
    """The feature index of an SAE folder, or that `index/` folder itself.

    Raises SaekitError, in one line with the command that helps, for a folder without a finished index, an unknown format
    version, a file whose size is not the manifest's, and an index that belongs to another SAE.
    """
    path = Path(path)
    folder = path if path.name == "index" and not (path / "config.json").is_file() else path / "index"
    sae = folder.parent
    rebuild = f"saekit index {sae}"
    if not sae.is_dir():
        raise SaekitError(f"no such SAE folder: {sae}")
    if not (folder / "manifest.json").is_file():
        begun = " (an unfinished build is there)" if (sae / "index.partial").is_dir() or folder.is_dir() else ""
        raise SaekitError(f"{sae} has no index yet{begun}: run  {rebuild}")
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaekitError(f"{folder}/manifest.json is not valid JSON ({error}); rebuild:  {rebuild}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SaekitError(f"{folder}/manifest.json is not an index: it does not say {FORMAT}; rebuild:  {rebuild}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise SaekitError(
            f"{folder}/manifest.json has index format {manifest.get('format_version')}, this saekit reads "
            f"{FORMAT_VERSION}; upgrade saekit, or rebuild:  {rebuild}"
        )
    for name, entry in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise SaekitError(f"{file} is missing; rebuild:  {rebuild}")
        if file.stat().st_size != entry["bytes"]:
            raise SaekitError(
                f"{file} has {file.stat().st_size:,} bytes, the manifest says {entry['bytes']:,}; rebuild:  {rebuild}"
            )
    config = sae / "config.json"
    if config.is_file():
        own = json.loads(config.read_text(encoding="utf-8")).get("fingerprint")
        if own != manifest["fingerprints"]["sae"]:
            raise SaekitError(
                f"{folder}/manifest.json belongs to SAE {str(manifest['fingerprints']['sae'])[:15]}..., the folder holds "
                f"{str(own)[:15]}...; rebuild:  {rebuild}"
            )
    return FeatureIndex(folder, manifest)


class FeatureIndex:
    """An opened index. `manifest`, `path` (the index folder), `signed`, `n_tokens` (N), `len(idx)` (F)."""

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest = path, manifest
        self.signed: bool = manifest["signed"]
        self.n_tokens: int = manifest["N"]
        self.n_encoded: int = manifest["E"]
        self.n_sequences: int = manifest["S"]
        self.scale = 2.0 ** manifest["value_exponent"]
        self.has_by_token = "by_token.safetensors" in manifest["files"]
        self.has_logits = "logits.safetensors" in manifest["files"]
        self.has_neighbours = "neighbours.safetensors" in manifest["files"]
        self.has_map = "map.safetensors" in manifest["files"]
        self.labels = Labels(path.parent / "labels.sqlite")
        self._files: dict[str, dict[str, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.manifest["F"]

    @functools.cached_property
    def has_text(self) -> bool:
        """Whether tokens can be shown as text; else they are numbers such as `#17`."""
        return self.manifest["fingerprints"]["tokenizer"] is not None and self.file("vocab")["bytes"].size > 0

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"FeatureIndex({str(self.path)!r}, {m['F']:,} features, {m['E']:,} tokens, {m['Z']:,} codes, "
            f"{'signed' if self.signed else 'non-negative'})"
        )

    @property
    def name(self) -> str:
        """Folder name of the SAE."""
        return self.path.parent.resolve().name

    @property
    def site(self) -> str:
        return self.manifest["site"]

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest: two indexes with the same one are the same bytes."""
        return "sha256:" + sha256((self.path / "manifest.json").read_bytes()).hexdigest()

    def feature(self, number: int) -> "Feature":
        """A lazy view of one feature; SaekitError with the valid range if there is no such number."""
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not 0 <= number < len(self):
            shown = f"{number:,}" if isinstance(number, int | np.integer) else repr(number)
            raise SaekitError(f"feature {shown} does not exist; this SAE has 0 to {len(self) - 1:,}")
        return Feature(self, int(number))

    def __getitem__(self, number: int) -> "Feature":
        return self.feature(number)

    def file(self, name: str) -> dict[str, np.ndarray]:
        """The memory-mapped tensors of one file, such as `codes`; SaekitError if the index was built without it."""
        if name not in self._files:
            if f"{name}.safetensors" not in self.manifest["files"]:
                raise SaekitError(
                    f"{self.path.parent} has an index without {name}; rebuild:  saekit index {self.path.parent}"
                )
            tensors = map_tensors(self.path / f"{name}.safetensors")
            # a plain array over the mapping: slicing np.memmap itself costs ten times as much
            self._files[name] = {key: np.asarray(value) for key, value in tensors.items()}
        return self._files[name]

    def column(self, name: str) -> np.ndarray:
        """One column of features.safetensors [F], or one of `density`, `feature`.

        Raises SaekitError with the nearest names.
        """
        columns = self.file("features")
        if name == "density":
            return columns["n"] / max(1, self.n_encoded)
        if name == "feature":
            return np.arange(len(self))
        if name not in columns:
            known = ["feature", "density", *columns]
            near = difflib.get_close_matches(name, known, 3) or sorted(known)
            raise SaekitError(f"the index has no column {name}; nearest: {', '.join(near)}")
        return columns[name]

    @property
    def features_per_token(self) -> np.ndarray:
        """Number of features that fire at each position [N]; 0 where nothing was encoded."""
        return self.file("per_token")["l0"]

    # text

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        vocab = self.file("vocab")
        blob, start = vocab["bytes"].tobytes(), vocab["start"].tolist()
        if not self.has_text:
            return [f"#{i}".encode() for i in range(len(start) - 1)]
        return [blob[a:b] if b > a else f"id {i}, no token".encode() for i, (a, b) in enumerate(pairwise(start))]

    def pieces(self, tokens: Iterable[int]) -> tuple[bytes, ...]:
        """Raw bytes of token ids; `id 311, no token` and `#17` where there are none."""
        table = self._pieces
        return tuple(table[t] if t < len(table) else f"id {t}, no token".encode() for t in map(int, tokens))

    def token_text(self, token: int) -> str:
        """A token as it is shown: escapes for what is not text, marks for lone white space."""
        return render.visible(self.pieces([token])[0])

    @functools.cached_property
    def documents(self) -> list[dict]:
        """`documents.jsonl` of the store: name, source, licence per document; empty where the store has none."""
        path = self.path / "documents.jsonl"
        if "documents.jsonl" not in self.manifest["files"]:
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]

    def document_of(self, position: int) -> tuple[int, str]:
        """Number and name of the document at a position; (-1, "") where none is recorded."""
        table = self.file("tokens")
        run = int(np.searchsorted(table["run_start"], position, side="right")) - 1
        if run < 0:
            return -1, ""
        doc = int(table["run_doc"][run])
        name = self.documents[doc].get("name", "") if 0 <= doc < len(self.documents) else ""
        return doc, name

    def window(
        self, position: int, before: int | None = 24, after: int | None = 8, *, feature: int | None = None, rank: int | None = None
    ) -> Example:  # fmt: skip
        """The tokens around a position, never across a sequence border; before=None means the whole sequence."""
        if not 0 <= position < self.n_tokens:
            raise SaekitError(f"position {position:,} does not exist; this index has 0 to {self.n_tokens - 1:,}")
        positions, values = (None, None) if feature is None else self._firings(feature)
        return self._window(int(position), before, after, positions, values, rank)

    def _window(self, position, before, after, fired, values, rank) -> Example:
        table = self.file("tokens")
        starts = table["seq_start"]
        sequence = int(np.searchsorted(starts, position, side="right")) - 1
        first, last = int(starts[sequence]), int(starts[sequence + 1])
        lo = first if before is None else max(first, position - before)
        hi = last if after is None or before is None else min(last, position + after + 1)
        tokens = table["token"][lo:hi].astype(np.int64)
        codes = np.zeros(hi - lo, np.float32)
        if fired is not None:
            # needles must have the column's dtype, or searchsorted converts the whole column
            a, b = np.searchsorted(fired, np.array([lo, min(hi, ABSENT)], np.uint32))
            codes[fired[a:b].astype(np.int64) - lo] = values[a:b].astype(np.float32) * np.float32(self.scale)
        doc, document = self.document_of(position)
        special = self.file("vocab")["special"]
        return Example(
            tokens=tokens,
            positions=np.arange(lo, hi),
            codes=codes,
            encoded=table["encoded"][lo:hi],
            pieces=self.pieces(tokens),
            special=special[np.minimum(tokens, len(special) - 1)],
            centre=position - lo,
            doc=doc,
            sequence=sequence,
            at_start=lo == first,
            at_end=hi == last,
            rank=rank,
            document=document,
        )

    def text(self, position: int, before: int = 24, after: int = 8) -> str:
        """The text around a position, never across a sequence border."""
        return self.window(position, before, after).text

    # firings

    def _firings(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (uint32) and stored values (float16) of a feature, both mapped."""
        codes = self.file("codes")
        a, b = codes["start"][feature], codes["start"][feature + 1]
        return codes["position"][a:b], codes["value"][a:b]

    def at(self, position: int) -> Firings:
        """What fires at a position, by falling magnitude. Needs `by_token`."""
        if not 0 <= position < self.n_tokens:
            raise SaekitError(f"position {position:,} does not exist; this index has 0 to {self.n_tokens - 1:,}")
        table = self.file("by_token")
        a, b = table["start"][position], table["start"][position + 1]
        return Firings(
            table["feature"][a:b].astype(np.int64), table["value"][a:b].astype(np.float32) * np.float32(self.scale)
        )

    def counts_at(self, positions: np.ndarray) -> np.ndarray:
        """How often each feature fires on the given positions [F] int64. Fast with `by_token`, a full scan without."""
        positions = np.asarray(positions, dtype=np.int64)
        if self.has_by_token:
            table = self.file("by_token")
            counts = np.zeros(len(self), np.int64)
            for part in np.array_split(positions, max(1, len(positions) // 500_000)):
                begin, end = table["start"][part], table["start"][part + 1]
                counts += np.bincount(_gather(table["feature"], begin, end - begin), minlength=len(self))
            return counts
        wanted = np.zeros(self.n_tokens, bool)
        wanted[positions] = True
        codes = self.file("codes")
        counts = np.zeros(len(self), np.int64)
        for lo in range(0, len(codes["position"]), 1 << 22):
            hits = np.flatnonzero(wanted[codes["position"][lo : lo + (1 << 22)]]) + lo
            counts += np.bincount(np.searchsorted(codes["start"], hits, side="right") - 1, minlength=len(self))
        return counts

    @functools.lru_cache(maxsize=4096)  # noqa: B019  readers live as long as the process
    def _occurrences(self, token: int) -> int:
        """Encoded positions that hold a token."""
        return int(self.file("tokens")["encoded"][self.positions_of(token)].sum())

    def positions_of(self, token: int) -> np.ndarray:
        """All positions of a token id, increasing (uint32)."""
        table = self.file("token_index")
        if not 0 <= token < len(table["start"]) - 1:
            return np.zeros(0, np.uint32)
        return table["position"][table["start"][token] : table["start"][token + 1]]

    def features_on(self, tokens: Iterable[int], limit: int = 50, *, where: str = "token", text: str = "") -> list[Hit]:
        """Features that fire on any of the given token ids, by F1."""
        parts = [self.positions_of(int(t)) for t in tokens]
        positions = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
        return self._hits(positions, limit, where, text)

    def _hits(self, positions: np.ndarray, limit: int, where: str, text: str) -> list[Hit]:
        positions = positions.astype(np.int64)
        positions = positions[self.file("tokens")["encoded"][positions]]
        if len(positions) == 0:
            return []
        counts = self.counts_at(positions)
        f1 = 2 * counts / np.maximum(1, self.column("n") + len(positions))
        order = np.lexsort((np.arange(len(self)), -f1))[:limit]
        n = self.column("n")
        return [
            Hit(int(j), where, text, float(f1[j]), float(counts[j] / n[j]), float(counts[j] / len(positions)))
            for j in order
            if counts[j]
        ]

    # finding features

    def table(
        self,
        sort: str = "-energy",
        *,
        alive: bool | None = None,
        flag: str | Sequence[str] = (),
        without: str | Sequence[str] = (),
        labelled: bool | None = None,
        columns: Sequence[str] | None = None,
        limit: int | None = None,
        **ranges: tuple[float | None, float | None],
    ) -> "FeatureTable":
        """Rows of features that pass all conditions.

        `sort` is a column, falling with a leading minus; ties and undefined values by feature number, last. A range keyword
        is any column with (lowest, highest), both inclusive, None = open: `density=(1e-5, 1e-2)`. `flag` and `without`
        take the names dead, dense, near-duplicate, one-sided, capped, start-of-sequence.
        """
        keep = np.ones(len(self), bool)
        if alive is not None:
            keep &= (self.column("n") != 0) == alive
        for names, wanted in ((flag, True), (without, False)):
            for name in [names] if isinstance(names, str) else names:
                if name not in FLAGS:
                    raise SaekitError(f"no flag {name}; known are {', '.join(FLAGS)}")
                keep &= (self.column("flags") & FLAGS[name] != 0) == wanted
        for name, bounds in ranges.items():
            values = self.column(name)
            low, high = bounds
            if low is not None:
                keep &= values >= low
            if high is not None:
                keep &= values <= high
        entries = self.labels.all()
        if labelled is not None:
            known = np.zeros(len(self), bool)
            known[[j for j, e in entries.items() if e.label and j < len(self)]] = True
            keep &= known == labelled
        rows = np.flatnonzero(keep)
        name = sort.lstrip("-+")
        key = self.column(name)[rows].astype(np.float64)
        undefined = np.isnan(key)
        rows = rows[np.lexsort((rows, np.where(undefined, 0, -key if sort.startswith("-") else key), undefined))]
        return FeatureTable(self, rows[:limit], tuple(columns or DEFAULT_COLUMNS), entries)

    def search(
        self,
        text: str | None = None,
        *,
        regex: str | None = None,
        vector: np.ndarray | None = None,
        like: int | None = None,
        limit: int = 50,
    ) -> list[Hit]:
        """Features found by one of four questions; each hit says where it was found.

        `text`: labels and notes, then the exact token, then the text of the corpus. `regex`: token strings, given two
        seconds. `vector` (D) or `like` (a feature number): cosine with the decoder rows, by size.
        """
        given = [v is not None for v in (text, regex, vector, like)]
        if sum(given) != 1:
            raise SaekitError("search takes exactly one of text, regex=, vector= and like=")
        if regex is not None:
            return self.features_on(self.tokens_matching(regex), limit, where="regex", text=regex)
        if text is not None:
            return self._search_text(text, limit)
        W_dec_FD = self._decoder()
        if like is not None:
            vector = W_dec_FD[self.feature(like).number]
        v_D = np.asarray(vector, np.float32).reshape(-1)
        if len(v_D) != W_dec_FD.shape[1]:
            raise SaekitError(f"the vector has {len(v_D)} entries, decoder rows have {W_dec_FD.shape[1]}")
        cos_F = (W_dec_FD @ v_D) / np.maximum(1e-30, self.column("dec_norm") * np.linalg.norm(v_D))
        if like is not None:
            cos_F[like] = 0
        order = np.lexsort((np.arange(len(self)), -np.abs(cos_F)))[:limit]
        name = f"like {like:,}" if like is not None else "vector"
        return [Hit(int(j), "decoder", name, float(cos_F[j]), math.nan, math.nan) for j in order]

    def _search_text(self, text: str, limit: int) -> list[Hit]:
        hits = [Hit(e.feature, "label", e.label or e.notes, 1.0, math.nan, math.nan) for e in self.labels.search(text)]
        hits = [h for h in hits if h.feature < len(self)]
        needle = text.encode("utf-8")
        if needle:
            stripped = needle.strip() or needle
            same = [i for i, piece in enumerate(self._pieces) if piece == needle or piece.strip() == stripped]
            hits += self.features_on(same, limit, where="token", text=text)
            hits += self._hits(self.find_text(text), limit, "text", text)
        seen, unique = set(), []
        for hit in hits:
            if hit.feature not in seen:
                seen.add(hit.feature)
                unique.append(hit)
        return unique[:limit]

    def find_text(self, text: str, limit: int = 200_000) -> np.ndarray:
        """Positions of the token in which each occurrence of `text` ends (int64), inside one sequence, at most `limit`."""
        needle = text.encode("utf-8")
        blob, offsets = self._corpus
        ends, at = [], blob.find(needle) if needle else -1
        while at >= 0 and len(ends) < limit:
            ends.append(at + len(needle) - 1)
            at = blob.find(needle, at + 1)
        ends = np.array(ends, np.int64)
        last = np.searchsorted(offsets, ends, side="right") - 1
        first = np.searchsorted(offsets, ends - len(needle) + 1, side="right") - 1
        starts = self.file("tokens")["seq_start"]
        inside = np.searchsorted(starts, first, side="right") == np.searchsorted(starts, last, side="right")
        return np.unique(last[inside])

    @functools.cached_property
    def _corpus(self) -> tuple[bytes, np.ndarray]:
        """The first ten million tokens as bytes, and the offset of each token in them."""
        tokens = self.file("tokens")["token"][:10_000_000].astype(np.int64)
        table = self._pieces
        lengths = np.fromiter(map(len, table), np.int64, len(table))
        blob = b"".join(map(table.__getitem__, tokens.tolist()))
        return blob, np.concatenate([[0], np.cumsum(lengths[tokens])])[:-1]

    def tokens_matching(self, regex: str) -> list[int]:
        """Ids of tokens whose text matches (`re.search`), in a child process that gets two seconds.

        Raises SaekitError for an expression that is not valid or takes longer.
        """
        program = (
            "import json,re,sys\n"
            "q=json.load(sys.stdin)\n"
            "try: p=re.compile(q['regex'])\n"
            "except re.error as e: json.dump({'error':str(e)},sys.stdout)\n"
            "else: json.dump({'ids':[i for i,t in enumerate(q['tokens']) if p.search(t)]},sys.stdout)\n"
        )
        vocab = self.file("vocab")
        filled = np.flatnonzero(np.diff(vocab["start"]) > 0) if self.has_text else np.arange(len(vocab["start"]) - 1)
        texts = [self._pieces[i].decode("utf-8", errors="replace") for i in filled]
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", program],
                input=json.dumps({"regex": regex, "tokens": texts}),
                capture_output=True,
                text=True,
                timeout=REGEX_SECONDS,
                env={k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")},
            )
        except subprocess.TimeoutExpired:
            raise SaekitError(
                f"/{regex}/ takes longer than {REGEX_SECONDS:.0f} s on the vocabulary; simplify it"
            ) from None
        answer = json.loads(done.stdout or '{"error": "it could not be run"}')
        if "error" in answer:
            raise SaekitError(f"/{regex}/ is not a regular expression: {answer['error']}")
        return [int(filled[i]) for i in answer["ids"]]

    def _decoder(self) -> np.ndarray:
        path = self.path.parent / "sae.safetensors"
        if not path.is_file():
            raise SaekitError(f"{path} is missing; searching by direction needs the SAE's weights beside its index")
        return map_tensors(path)["W_dec"]

    def compute_cosines(self, feature: int) -> np.ndarray:
        """Cosine of a feature's decoder row with every decoder row [F] float32; reads the SAE's weights."""
        W_dec_FD = self._decoder()
        norms = self.column("dec_norm")
        return (W_dec_FD @ W_dec_FD[feature]) / np.maximum(1e-30, norms * norms[feature])

    def encode(self, text: str, *, sae=None, lm=None) -> EncodedText:
        """Codes of a text: the one call that needs the language model, loaded from the index's model entry if not given.

        `sae` and `lm` are objects of saekit.sae.SAE and saekit.model.LanguageModel. Raises SaekitError for an empty text and
        for one longer than the model's context as stored in config.json.
        """
        import torch

        from saekit.model import load_model
        from saekit.sae import SAE

        sae = sae or SAE.load(self.path.parent)
        lm = lm or load_model(self.manifest["model"]["id"])
        context = sae.config.get("context") or {}
        ids = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise SaekitError("the text holds no token; type something")
        if context.get("prepend_bos") and lm.tokenizer.bos_token_id is not None and ids[0] != lm.tokenizer.bos_token_id:
            ids = [lm.tokenizer.bos_token_id, *ids]
        limit = context.get("length")
        if limit and len(ids) > limit:
            raise SaekitError(
                f"the text has {len(ids):,} tokens, the SAE was trained on contexts of {limit:,}; shorten it"
            )
        with torch.no_grad():
            x_TD = lm.capture(torch.tensor([ids]), [self.site])[self.site][0].float().to(sae.W_enc.device)
            codes = sae.encode(x_TD)
            error_T = (x_TD - sae.decode(codes)).square().sum(1)
            row_N, feature_N, value_N = (t.cpu().numpy() for t in codes.pairs())
        encoded = ~np.isin(ids, context.get("dropped_ids") or [])
        keep = encoded[row_N]
        row_N, feature_N, value_N = row_N[keep], feature_N[keep].astype(np.int64), value_N[keep]
        order = np.lexsort((feature_N, -np.abs(value_N), row_N))
        special = self.file("vocab")["special"]
        tokens = np.array(ids, np.int64)
        return EncodedText(
            tokens=tokens,
            pieces=self.pieces(ids),
            special=special[np.minimum(tokens, len(special) - 1)],
            encoded=encoded,
            start=np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=len(ids)))]),
            features=feature_N[order],
            values=value_N[order],
            norm_x=x_TD.norm(dim=1).cpu().numpy(),
            error=error_T.cpu().numpy(),
        )

    def check(self) -> list[str]:
        """Problems found by reading everything: sha256 of each file, order and counts of the codes; empty if all is well."""
        problems = []
        for name, entry in self.manifest["files"].items():
            digest = sha256()
            with open(self.path / name, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            if digest.hexdigest() != entry["sha256"]:
                problems.append(
                    f"{self.path / name} is damaged (sha256 differs); rebuild:  saekit index {self.path.parent}"
                )
        if problems:
            return problems
        codes, n = self.file("codes"), self.column("n")
        if not np.array_equal(np.diff(codes["start"]), n):
            problems.append(f"{self.path}/codes.safetensors: start does not agree with column n")
        for lo in range(0, len(codes["position"]) - 1, 1 << 22):
            part = codes["position"][lo : lo + (1 << 22) + 1]
            falls = np.flatnonzero(part[1:] <= part[:-1]) + lo + 1
            if not np.isin(falls, codes["start"]).all():
                problems.append(f"{self.path}/codes.safetensors: positions of a feature do not increase")
                break
        if any((codes["value"][lo : lo + (1 << 22)] == 0).any() for lo in range(0, len(codes["value"]), 1 << 22)):
            problems.append(f"{self.path}/codes.safetensors holds codes that are 0")
        if int(self.file("per_token")["l0"].sum(dtype=np.int64)) != self.manifest["Z"]:
            problems.append(f"{self.path}/per_token.safetensors: l0 does not sum to Z")
        return problems


def _by_strength(stored: np.ndarray, row: int) -> np.ndarray:
    """Indices of the codes of one sign (row 0 positive, 1 negative) by falling magnitude, ties by position."""
    mine = np.flatnonzero(stored > 0 if row == 0 else stored < 0)
    # magnitude bits of float16 sort as integers
    bits = (stored[mine].view(np.uint16) & 0x7FFF).astype(np.int32)
    return mine[np.argsort(-bits, kind="stable")]


def _gather(array: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """array[begin[i] : begin[i] + length[i]] for all i, joined."""
    total = int(length.sum())
    shift = np.repeat(begin - (np.cumsum(length) - length), length)
    return array[np.arange(total) + shift]


DEFAULT_COLUMNS = (
    "feature", "label", "density", "n", "top_text", "top_token_share", "token_entropy", "energy", "max_dec_cos",
)  # fmt: skip


class FeatureTable:
    """Feature numbers in order, with columns on demand. Iterating gives dicts; `features` is the plain array."""

    def __init__(self, index: FeatureIndex, features: np.ndarray, columns: tuple[str, ...], entries: dict[int, Entry]):
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
            return [", ".join(k for k, bit in FLAGS.items() if f & bit) for f in index.column("flags")[rows].tolist()]
        if name == "top_text":
            return ["" if t == ABSENT else index.token_text(t) for t in index.column("top_token")[rows].tolist()]
        if name in ("up", "down"):
            tokens = index.file("logits")["token"][rows, int(name == "down"), 0]
            return ["" if t == ABSENT else index.token_text(t) for t in tokens.tolist()]
        if name == "bar":
            bins = index.file("examples")["histogram"][rows].reshape(len(rows), 16, 4).sum(2, dtype=np.int64)
            return bins / np.maximum(1, bins.max(1, keepdims=True))
        return index.column(name)[rows]

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

    def __repr__(self) -> str:
        return f"FeatureTable({len(self):,} features, columns {', '.join(self.names)})"


class Feature:
    """One feature of an index: numbers, examples, neighbours, label. Nothing is read before it is asked for."""

    def __init__(self, index: FeatureIndex, number: int):
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
        """Positions it fires on, increasing (n) uint32, memory-mapped."""
        return self.index._firings(self.number)[0]

    @property
    def values(self) -> np.ndarray:
        """Codes at `positions` (n) float32."""
        return self.index._firings(self.number)[1].astype(np.float32) * np.float32(self.index.scale)

    @property
    def histogram(self) -> Histogram:
        """64 equal bins over [−m, m] for signed codes, else (0, m], m = largest magnitude."""
        m = self.max
        counts = self.index.file("examples")["histogram"][self.number].astype(np.int64)
        return Histogram(np.linspace(-m if self.signed else 0.0, m, 65), counts)

    # examples

    def _example(self, position: int, zoom: str, rank: int | None = None) -> Example:
        if zoom not in ZOOMS:
            raise SaekitError(f"no zoom {zoom}; known are {', '.join(ZOOMS)}")
        before, after = ZOOMS[zoom] or (None, None)
        fired, values = self.index._firings(self.number)
        return self.index._window(int(position), before, after, fired, values, rank)

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
            fired, stored = self.index._firings(self.number)
            order = _by_strength(stored, row)[:k]
            return [self._example(p, zoom, rank) for rank, p in enumerate(fired[order].tolist(), 1)]
        positions = self.index.file("examples")["top_position"][self.number, row][:k]
        return [self._example(p, zoom, rank) for rank, p in enumerate(positions.tolist(), 1) if p != ABSENT]

    def quantiles(self, bins: int = 10, per_bin: int = 4, sign: str = "+", *, zoom: str = "snippet") -> list[Slice]:
        """Examples from `bins` slices of equal count, strongest slice first; fewer slices if it fires less often.

        Ten slices with up to eight examples are stored; any other number is drawn from the firings the same way.
        """
        row = self._row(sign)
        if row is None:
            return []
        fired, stored = self.index._firings(self.number)
        # counted from the strongest down: magnitude bits of float16 sort as integers, and counting beats sorting
        bits = stored.view(np.uint16)
        bits = bits[(bits < 0x8000) == (row == 0)] & 0x7FFF
        down = np.cumsum(np.bincount(bits, minlength=0x7C00)[::-1])
        is_stored = bins == SLICES and per_bin <= PER_SLICE
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
        fired, stored = self.index._firings(self.number)
        if sign != "both":
            keep = np.flatnonzero(stored > 0 if self._sign(sign) == 0 else stored < 0)
            fired = fired[keep]
        chosen = spread(len(fired), k, (seed << 32) + self.number)
        return [self._example(p, zoom) for p in fired[chosen].tolist()]

    def near_misses(self, k: int = 16, *, zoom: str = "snippet") -> list[Example]:
        """Its three commonest tokens where it is silent, sequences where it fires elsewhere first.

        Empty for a dead feature, and for one that is dense (its silence says little).
        """
        if self.n == 0 or "dense" in self.flags:
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
        starts = table["seq_start"]
        own = np.unique(np.searchsorted(starts, fired.astype(np.int64), side="right"))
        sequence = np.searchsorted(starts, at.astype(np.int64), side="right")
        shared = np.isin(sequence, own)
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
            occurrences = max(1, self.index._occurrences(token))
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

        Empty where the index lacks what is needed.
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
        return [Neighbour(f, v, count, self.index.labels.get(f).label) for f, v, count in rows]

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
        scale = len(positions) / len(seen)
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
