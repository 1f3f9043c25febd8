"""The feature index, read: memory-mapped arrays, one lazy view per feature.

    idx = open_index("saes/x")               # the SAE folder or its index/; maps nothing until asked
    f = idx.feature(123)
    f.density, f.top(20), f.near_misses(16), f.tokens(16), f.neighbours("together", 20)
    idx.table(sort="-energy", density=(1e-5, 1e-2), alive=True)
    idx.search("quote"); idx.search(regex=r"\\d+"); idx.search(like=123)

Opening and the arrays stand here; feature.py answers for one feature, table.py and search.py for many, encoded.py for a
text that was typed, per_token.py and aims.py for the SAE as a whole.

N token positions, E of them encoded · S sequences · F features · D width · Z non-zero codes. A feature fires where its
code is not 0; its magnitude is the absolute code. Everything here is safe to share between threads.
"""

import difflib
import functools
import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np

from saekit.errors import SaekitError
from saekit.feature_index import aims, per_token, render, search
from saekit.feature_index.encoded import EncodedText, Firings, encode_text, gather, stored_text
from saekit.feature_index.feature import Example, Feature
from saekit.feature_index.format import ABSENT, DIRECT, FLAGS, FORMAT, FORMAT_VERSION
from saekit.feature_index.labels import Labels
from saekit.feature_index.matching import Matching, match
from saekit.feature_index.search import Hit
from saekit.feature_index.table import DEFAULT_COLUMNS, FeatureTable
from saekit.progress import Progress
from saekit.store.format import map_tensors, sha256_file

DENSITIES = {"density": "n", "density_pos": "n_pos", "density_neg": "n_neg"}
"""Columns that are a count of firings over the encoded tokens."""


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
    def has_std(self) -> bool:
        """Whether codes have a standard deviation (variational), the same at every firing of a feature."""
        return "std_mean" in self.file("features")

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

    def feature(self, number: int) -> Feature:
        """A lazy view of one feature; SaekitError with the valid range if there is no such number."""
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or not 0 <= number < len(self):
            shown = f"{number:,}" if isinstance(number, int | np.integer) else repr(number)
            raise SaekitError(f"feature {shown} does not exist; this SAE has 0 to {len(self) - 1:,}")
        return Feature(self, int(number))

    def __getitem__(self, number: int) -> Feature:
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
        """One column of features.safetensors [F], or one of `density`, `density_pos`, `density_neg`, `feature`, and
        `budget_share` where features have budgets.

        Raises SaekitError with the nearest names.
        """
        columns = self.file("features")
        if name in DENSITIES:
            return columns[DENSITIES[name]] / max(1, self.n_encoded)
        if name == "feature":
            return np.arange(len(self))
        if name == "budget_share" and self.has_budgets:
            return aims.budget_share(self)
        if name not in columns:
            known = ["feature", *DENSITIES, *columns]
            near = difflib.get_close_matches(name, known, 3) or sorted(known)
            raise SaekitError(f"the index has no column {name}; nearest: {', '.join(near)}")
        return columns[name]

    @property
    def features_per_token(self) -> np.ndarray:
        """Number of features that fire at each position [N]; 0 where nothing was encoded."""
        return self.file("per_token")["l0"]

    @functools.cached_property
    def l0_counts(self) -> np.ndarray:
        """Encoded tokens on which 0, 1, 2, … features fire (int64)."""
        return per_token.l0_counts(self)

    @functools.cached_property
    def adaptive(self) -> bool:
        """Whether tokens differ in how many features fire: a rule per row that now and then finds too few does not count."""
        total = np.cumsum(self.l0_counts)
        low, high = np.searchsorted(total, (0.05 * total[-1], 0.95 * total[-1]))
        return bool(low < high)

    @functools.cached_property
    def has_budgets(self) -> bool:
        """Whether features were given budgets (feature_choice)."""
        return aims.has_budgets(self)

    # the SAE as a whole

    def norms(self, most: int = per_token.DRAWN) -> per_token.Norms:
        """‖x‖ and ‖f‖ of at most so many tokens, drawn evenly: the ZF plot."""
        return per_token.norms(self, most)

    def crowd(self, k: int = 6) -> per_token.Crowd:
        """How many features fire on a token; the k tokens with the most and the fewest; the error beside it."""
        return per_token.crowd(self, k)

    def kth_values(self, k: int) -> per_token.KthValues:
        """The k-th largest magnitude of a token: what a rule per row would have cut at. Needs `by_token`."""
        return per_token.kth_values(self, k)

    def snippets(self, positions: np.ndarray, before: int = 6, after: int = 2) -> list[tuple[bytes, bytes, bytes]]:
        """Text before, at and after many positions; `window` says more about one."""
        return per_token.snippets(self, positions, before, after)

    def aim(self) -> aims.Aim | None:
        """Features per token, trained for and found; None where nothing but the found number is known."""
        return aims.aim(self)

    def law(self) -> aims.RankLaw:
        """Density against rank, the Zipf–Mandelbrot law through it, and the budgets where there are any."""
        return aims.law(self)

    # text

    @functools.cached_property
    def vocabulary(self) -> list[bytes]:
        """Raw bytes of every token id, as `pieces` gives them."""
        vocab = self.file("vocab")
        blob, start = vocab["bytes"].tobytes(), vocab["start"].tolist()
        if not self.has_text:
            return [f"#{i}".encode() for i in range(len(start) - 1)]
        return [blob[a:b] if b > a else f"id {i}, no token".encode() for i, (a, b) in enumerate(pairwise(start))]

    def pieces(self, tokens: Iterable[int]) -> tuple[bytes, ...]:
        """Raw bytes of token ids; `id 311, no token` and `#17` where there are none."""
        table = self.vocabulary
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

    @functools.cached_property
    def n_documents(self) -> int:
        """Documents are numbered below this; 0 where none is recorded."""
        return int(self.file("tokens")["run_doc"].max(initial=-1)) + 1

    def document_positions(self, number: int) -> np.ndarray:
        """Positions of the tokens of a document, increasing (int64); empty for one that was not indexed."""
        if not 0 <= number < self.n_documents:
            raise SaekitError(f"document {number:,} does not exist; this index has 0 to {self.n_documents - 1:,}")
        table = self.file("tokens")
        runs = np.flatnonzero(table["run_doc"] == number)
        ends = np.append(table["run_start"][1:], self.n_tokens)
        return np.concatenate([np.arange(table["run_start"][r], ends[r]) for r in runs] or [np.zeros(0, np.int64)])

    def token_named(self, text: str) -> int:
        """Id of the token that is this text, else of the one with a space before it; `#17` is token 17. SaekitError if there
        is none."""
        table = self.vocabulary
        number = text[1:] if text[:1] == "#" and text[1:].isascii() and text[1:].isdigit() else ""
        if number and len(number) < 12 and int(number) < len(table):
            return int(number)
        for piece in (text.encode(), b" " + text.encode()):
            if self.has_text and piece in table:
                return table.index(piece)
        raise SaekitError(f"{text!r} is no single token of this vocabulary")

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
        position = int(position)
        table = self.file("tokens")
        starts = table["seq_start"]
        sequence = int(np.searchsorted(starts, position, side="right")) - 1
        first, last = int(starts[sequence]), int(starts[sequence + 1])
        lo = first if before is None else max(first, position - before)
        hi = last if after is None or before is None else min(last, position + after + 1)
        tokens = table["token"][lo:hi].astype(np.int64)
        codes, std = np.zeros(hi - lo, np.float32), None
        if feature is not None:
            fired, values = self.firings(feature)
            # needles must have the column's dtype, or searchsorted converts the whole column
            a, b = np.searchsorted(fired, np.array([lo, min(hi, ABSENT)], np.uint32))
            codes[fired[a:b].astype(np.int64) - lo] = values[a:b].astype(np.float32) * np.float32(self.scale)
            if self.has_by_token and self.is_capped(feature):
                table_by = self.file("by_token")
                begin = int(table_by["start"][lo])
                here = slice(begin, int(table_by["start"][hi]))
                found = np.flatnonzero(table_by["feature"][here] == feature)
                at = np.searchsorted(table_by["start"][lo : hi + 1], begin + found, side="right") - 1
                codes[at] = table_by["value"][here][found].astype(np.float32) * np.float32(self.scale)
            if self.has_std:
                std = np.where(codes != 0, np.float32(self.column("std_mean")[feature]), np.float32(0))
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
            std=std,
        )

    def text(self, position: int, before: int = 24, after: int = 8) -> str:
        """The text around a position, never across a sequence border."""
        return self.window(position, before, after).text

    # firings

    def firings(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions (uint32) and stored values (float16) of a feature, both mapped; of a capped one those that are kept."""
        codes = self.file("codes")
        a, b = codes["start"][feature], codes["start"][feature + 1]
        return codes["position"][a:b], codes["value"][a:b]

    def is_capped(self, feature: int) -> bool:
        """Whether only a sample of its firings is kept."""
        return bool(self.column("flags")[feature] & FLAGS["capped"])

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
        """How often each feature fires on the given positions [F] int64.

        Fast with `by_token`, a full scan without; that scan sees a sample of a capped feature and scales its count up.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if self.has_by_token:
            table = self.file("by_token")
            counts = np.zeros(len(self), np.int64)
            # parts that stay in the cache, in memory that is used again, and are long beside one count per feature
            for part in np.array_split(positions, max(1, len(positions) // max(4096, len(self) // 8))):
                begin, end = table["start"][part], table["start"][part + 1]
                counts += np.bincount(gather(table["feature"], begin, end - begin), minlength=len(self))
            return counts
        wanted = np.zeros(self.n_tokens, bool)
        wanted[positions] = True
        codes = self.file("codes")
        counts = np.zeros(len(self), np.int64)
        for lo in range(0, len(codes["position"]), 1 << 22):
            hits = np.flatnonzero(wanted[codes["position"][lo : lo + (1 << 22)]]) + lo
            counts += np.bincount(np.searchsorted(codes["start"], hits, side="right") - 1, minlength=len(self))
        return np.rint(counts / self.column("kept")).astype(np.int64)

    @functools.lru_cache(maxsize=4096)  # noqa: B019  readers live as long as the process
    def occurrences(self, token: int) -> int:
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
        return search.features_at(self, positions, limit, where, text)

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
    ) -> FeatureTable:
        """Rows of features that pass all conditions.

        `sort` is a column, falling with a leading minus; ties and undefined values by feature number, last. A range keyword
        is any column with (lowest, highest), both inclusive, None = open: `density=(1e-5, 1e-2)`. `flag` and `without`
        take the names dead, dense, near-duplicate, one-sided, capped, start-of-sequence, and under-budget where features have
        budgets: they fire less than half of theirs.
        """
        keep = np.ones(len(self), bool)
        if alive is not None:
            keep &= (self.column("n") != 0) == alive
        for names, wanted in ((flag, True), (without, False)):
            for name in [names] if isinstance(names, str) else names:
                keep &= self.flagged(name) == wanted
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

    def flagged(self, name: str) -> np.ndarray:
        """Which features carry a flag [F] bool."""
        if name == "under-budget" and self.has_budgets:
            return self.column("budget_share") < aims.HALF
        if name not in FLAGS:
            known = ", ".join([*FLAGS, *(["under-budget"] if self.has_budgets else [])])
            raise SaekitError(f"no flag {name}; known are {known}")
        return self.column("flags") & FLAGS[name] != 0

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
            return search.by_text(self, text, limit)
        return search.by_direction(self, vector, like, limit)

    def find_text(self, text: str, limit: int = 200_000) -> np.ndarray:
        """Positions of the token in which each occurrence of `text` ends (int64), inside one sequence, at most `limit`."""
        return search.find_text(self, text, limit)

    @functools.cached_property
    def corpus(self) -> tuple[bytes, np.ndarray]:
        """The first ten million tokens as bytes, and the offset of each token in them."""
        tokens = self.file("tokens")["token"][:10_000_000].astype(np.int64)
        table = self.vocabulary
        lengths = np.fromiter(map(len, table), np.int64, len(table))
        blob = b"".join(map(table.__getitem__, tokens.tolist()))
        return blob, np.concatenate([[0], np.cumsum(lengths[tokens])])[:-1]

    def tokens_matching(self, regex: str) -> list[int]:
        """Ids of tokens whose text matches (`re.search`), in a child process that gets two seconds.

        Raises SaekitError for an expression that is not valid or takes longer.
        """
        vocab = self.file("vocab")
        filled = np.flatnonzero(np.diff(vocab["start"]) > 0) if self.has_text else np.arange(len(vocab["start"]) - 1)
        texts = [self.vocabulary[i].decode("utf-8", errors="replace") for i in filled]
        return filled[search.matching(regex, texts)].tolist()

    def decoder(self) -> np.ndarray:
        """Decoder rows of the SAE [F, D], mapped; SaekitError where its weights do not stand beside the index."""
        path = self.path.parent / "sae.safetensors"
        if not path.is_file():
            raise SaekitError(f"{path} is missing; searching by direction needs the SAE's weights beside its index")
        return map_tensors(path)["W_dec"]

    def compute_cosines(self, feature: int) -> np.ndarray:
        """Cosine of a feature's decoder row with every decoder row [F] float32; reads the SAE's weights."""
        W_dec_FD = self.decoder()
        norms = self.column("dec_norm")
        return (W_dec_FD @ W_dec_FD[feature]) / np.maximum(1e-30, norms * norms[feature])

    def encode(self, text: str, *, sae=None, lm=None) -> EncodedText:
        """Codes of a text: the one call that needs the language model, loaded from the index's model entry if not given.

        `sae` and `lm` are objects of saekit.sae.SAE and saekit.model.LanguageModel. Raises SaekitError for an empty text and
        for one longer than the model's context as stored in config.json.
        """
        return encode_text(self, text, sae=sae, lm=lm)

    def passage(self, positions: np.ndarray) -> EncodedText:
        """Codes of a passage of the index, such as a sequence or a document. Needs `by_token`, and no model."""
        return stored_text(self, positions)

    def effects_on(self, W_U_D: np.ndarray) -> np.ndarray:
        """What a code of 1 of each feature adds to the logit of one token [F] float32: decoder row times the token's row of
        `LanguageModel.unembedding`, so before the final norm's division and a soft cap.

        SaekitError for a site that does not write into the residual stream directly.
        """
        W_dec_FD = self.decoder()
        if not str(self.site).endswith(DIRECT) or W_dec_FD.shape[1] != len(W_U_D):
            raise SaekitError(
                f"no direct effect on a logit: {self.site} does not write into the residual stream directly"
            )
        return W_dec_FD @ np.asarray(W_U_D, np.float32)

    def compare(self, other: "FeatureIndex") -> Matching:
        """Which features of this SAE are which of another of the same width, by their decoder rows."""
        return match(self, other)

    def check(self) -> list[str]:
        """Problems found by reading everything: sha256 of each file, order and counts of the codes; empty if all is well."""
        problems = []
        files = self.manifest["files"]
        with Progress("check", sum(entry["bytes"] for entry in files.values()) >> 20, "MiB") as progress:
            for name, entry in files.items():
                if sha256_file(self.path / name, lambda count: progress.advance(count >> 20)) != entry["sha256"]:
                    problems.append(
                        f"{self.path / name} is damaged (sha256 differs); rebuild:  saekit index {self.path.parent}"
                    )
        if problems:
            return problems
        codes, n = self.file("codes"), self.column("n")
        cap = self.manifest["build"].get("cap")
        if not np.array_equal(np.diff(codes["start"]), n if cap is None else np.minimum(n, cap)):
            problems.append(f"{self.path}/codes.safetensors: start does not agree with column n")
        for lo in range(0, len(codes["position"]) - 1, 1 << 22):
            part = codes["position"][lo : lo + (1 << 22) + 1]
            falls = np.flatnonzero(part[1:] <= part[:-1]) + lo + 1
            if not np.isin(falls, codes["start"]).all():
                problems.append(f"{self.path}/codes.safetensors: positions of a feature do not increase")
                break
        if any((codes["value"][lo : lo + (1 << 22)] == 0).any() for lo in range(0, len(codes["value"]), 1 << 22)):
            problems.append(f"{self.path}/codes.safetensors holds codes that are 0")
        negative = sum(
            int((codes["value"][lo : lo + (1 << 22)] < 0).sum()) for lo in range(0, len(codes["value"]), 1 << 22)
        )
        n_neg = int(self.column("n_neg").sum())
        whole = len(codes["position"]) == self.manifest["Z"]
        if (negative != n_neg if whole else negative > n_neg) or not np.array_equal(
            self.column("n_pos") + self.column("n_neg"), n
        ):
            problems.append(f"{self.path}/codes.safetensors: signs do not agree with columns n_pos and n_neg")
        if negative and not self.signed:
            problems.append(
                f"{self.path}/codes.safetensors holds negative codes, the manifest says that there are none"
            )
        l0 = self.file("per_token")["l0"]
        # the largest number that it can hold stands for all above it too
        if l0.max(initial=0) < np.iinfo(l0.dtype).max and int(l0.sum(dtype=np.int64)) != self.manifest["Z"]:
            problems.append(f"{self.path}/per_token.safetensors: l0 does not sum to Z")
        return problems
