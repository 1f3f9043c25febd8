"""The feature index, built: a consumer of `encode_store` that writes `SAE/index/` (format version 1).

    builder = IndexBuilder(sae, store, "saes/x", vocab=vocab_bytes(tokenizer, V), unembedding=lm.unembedding())
    encode_store(sae, store, site, [builder], rows=builder.rows())    # update(chunk) …, finish()

1. Each chunk's firings are sorted inside their token by falling magnitude and appended to two raw files; counts per
   feature and per token grow beside them.
2. Those files are read once per bucket of features that fits the memory budget; each firing becomes one uint64
   (feature | position | 16 value bits), one plain sort per bucket puts them by feature, then by position.
3. A second pass over these codes, in blocks of features, makes every table: one sort by strength for examples, samples and
   quantiles, one by token for the token statistics.
4. Everything stands in `index.partial/` until the manifest is written, last; then the folder gets its name.

Values are float16 times 2^value_exponent. N token positions, E of them encoded · S sequences · F features · D width · Z
non-zero codes · V vocabulary · G signs · n firings of a block.
"""

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from saekit_kernels import RowCount, encode_select

import saekit
from saekit.errors import SaekitError
from saekit.feature_index.reader import (
    ABSENT,
    FLAGS,
    FORMAT,
    FORMAT_VERSION,
    PER_SLICE,
    SLICES,
    FeatureIndex,
    open_index,
    splitmix,
)
from saekit.progress import Progress
from saekit.store.format import (
    atomic_write,
    canonical_json,
    pretty_json,
    sha256_file,
    sync_folder,
    write_tensors,
)

EXPONENT_TOKENS = 65_536
"""The value exponent is chosen from so many tokens."""
BLOCK_FIRINGS = 1 << 22
BLOCK_FEATURES = 1 << 14
TOP_CANDIDATES, TOP = 256, 64
BINS = 64
TOKENS = 16
LOGITS, NEIGHBOURS = 20, 20
CONTEXT = 8
"""Two examples repeat each other if so many tokens up to the firing are the same."""
BY_TOKEN_BYTES = 8 << 30
NEIGHBOUR_FLOPS = 2e12
RAM = 1 << 30
QUANTILES = (5, 25, 50, 75, 95, 99)
# sites that add straight into the residual stream, where a decoder row times the unembedding means something
DIRECT = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True, eq=False)
class VocabBytes:
    """Raw bytes of each token id: those of id i are blob[start[i] : start[i + 1]]; none where there is no such token."""

    start: np.ndarray
    """(V + 1) int64."""
    blob: np.ndarray
    """uint8."""
    special: np.ndarray
    """(V) bool."""

    @classmethod
    def of(cls, pieces: list[bytes], special: np.ndarray | None = None) -> "VocabBytes":
        start = np.concatenate([[0], np.cumsum([len(p) for p in pieces], dtype=np.int64)]).astype(np.int64)
        blob = np.frombuffer(b"".join(pieces), np.uint8)
        return cls(start, blob, np.zeros(len(pieces), bool) if special is None else special)

    def __len__(self) -> int:
        return len(self.special)

    def padded(self, V: int) -> "VocabBytes":
        """The same with at least V ids; added ones have no bytes."""
        more = max(0, V - len(self))
        return VocabBytes(
            np.concatenate([self.start, np.full(more, self.start[-1])]),
            self.blob,
            np.concatenate([self.special, np.zeros(more, bool)]),
        )


def vocab_bytes(tokenizer, V: int = 0) -> VocabBytes:
    """Raw bytes of every token of a Hugging Face tokenizer, at least V ids.

    Byte-level vocabularies are mapped back to bytes; in vocabularies of the sentencepiece kind `<0x0A>` is that byte and
    `▁` is a space; `##` of WordPiece is dropped. Added tokens stand for their own text.
    """
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: str(getattr(t, "content", t)) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    special_ids = set(tokenizer.all_special_ids)
    kind = _vocabulary_kind(tokenizer, by_id, added)
    V = max(V, max([*by_id, *added, -1]) + 1)
    pieces, special = [], np.zeros(V, bool)
    for i in range(V):
        special[i] = i in special_ids
        if i in added:
            pieces.append(added[i].encode("utf-8"))
        elif i in by_id:
            pieces.append(_piece(by_id[i], kind))
        else:
            pieces.append(b"")
    return VocabBytes.of(pieces, special)


def _vocabulary_kind(tokenizer, by_id: dict[int, str], added: dict[int, str]) -> str:
    """`byte-level`, `sentencepiece`, `wordpiece` or `text`: read from the tokenizer's decoder, else from the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        decoder = json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
        for mark, kind in (("ByteLevel", "byte-level"), ("WordPiece", "wordpiece")):
            if f'"{mark}"' in decoder:
                return kind
        if any(f'"{mark}"' in decoder for mark in ("Metaspace", "ByteFallback")) or "\\u2581" in decoder:
            return "sentencepiece"
    plain = [t for i, t in by_id.items() if i not in added]
    if any("▁" in t for t in plain) or "<0x0A>" in plain:
        return "sentencepiece"
    if plain and any("Ġ" in t for t in plain) and all(c in _BYTE_OF for t in plain for c in t):
        return "byte-level"
    return "text"


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}


_BYTE_OF = _byte_alphabet()


def _piece(token: str, kind: str) -> bytes:
    if kind == "byte-level":
        # a character outside the alphabet can only come from a token that was added by hand
        return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode("utf-8") for c in token)
    if kind == "sentencepiece":
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode("utf-8")
    if kind == "wordpiece":
        return (token[2:] if token.startswith("##") else token).encode("utf-8")
    return token.encode("utf-8")


def quantise(value: np.ndarray, exponent: int) -> tuple[np.ndarray, bool]:
    """Bits (uint16) of float16(value / 2^exponent), and whether any overflowed. What would round to zero keeps its sign as
    the smallest subnormal, so that the set of firings stays exact."""
    with np.errstate(over="ignore"):
        # two exact factors, for 2^-exponent alone may lie outside float32; np.ldexp takes thirty times as long
        half = -exponent // 2
        bits = (
            (value * np.float32(2.0**half) * np.float32(2.0 ** (-exponent - half))).astype(np.float16).view(np.uint16)
        )
    size = bits & np.uint16(0x7FFF)
    return np.where(size == 0, bits | np.uint16(1), bits), bool((size >= 0x7C00).any())


def exponent_of(largest: float) -> int:
    """The exponent e that puts largest / 2^e in [512, 1024)."""
    return int(np.frexp(largest)[1]) - 10 if largest > 0 else 0


def _bits(count: int) -> int:
    """Bits that number 0 to count − 1."""
    return max(1, int(count - 1).bit_length()) if count > 1 else 1


def _pairs(codes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row (int64), feature (int32) and value (float32) of each firing, in row order.

    As `Codes.pairs`, in numpy: five times as fast on a CPU that is busy with something else (8,192 rows of 32 codes).
    """
    value = codes.values.detach().float().reshape(-1).cpu().numpy()
    live = np.flatnonzero(value)
    if codes.row_ptr is None:
        row = live // codes.values.shape[1]
    else:
        row = np.repeat(np.arange(codes.batch), np.diff(codes.row_ptr.cpu().numpy()))[live]
    return row, codes.indices.reshape(-1).cpu().numpy()[live], value[live]


class IndexBuilder:
    """Consumer of chunks in text order; `finish()` leaves `folder/index/` and sets `index`.

    Args:
        sae: has W_enc, W_dec (F, D), b_enc, b_dec, config.
        store: an opened activation store.
        folder: the SAE folder, in which `index/` is made.
        site: site of the store the codes come from; None = the SAE's own.
        n_sequences: only the first so many sequences are indexed; None = all.
        vocab: bytes of each token id, None for a store without a tokenizer.
        unembedding: (W_U_VD float32, note): logit weights; None leaves them out.
        by_token: what fires on each token, on disk; None = if it stays below 8 GiB.
        ram: bytes one bucket may take; None = a quarter of what is free, at most 1 GiB.
        seed: of the samples.

    Raises SaekitError if another process builds there, or a token position does not fit 32 bits.
    """

    def __init__(
        self,
        sae,
        store,
        folder: str | Path,
        *,
        site: str | None = None,
        n_sequences: int | None = None,
        vocab: VocabBytes | None = None,
        unembedding: tuple[torch.Tensor, str] | None = None,
        by_token: bool | None = None,
        ram: int | None = None,
        seed: int = 0,
    ):
        self.sae, self.store, self.site = sae, store, site or sae.site
        self.F, self.D = sae.W_dec.shape
        self.seed, self.by_token, self.unembedding = seed, by_token, unembedding
        table = store.table
        self.S = table.n_sequences if n_sequences is None else min(n_sequences, table.n_sequences)
        self.seq_start = np.array(table.seq_start[: self.S + 1])
        self.N = int(self.seq_start[-1])
        if self.N >= ABSENT:
            raise SaekitError(
                f"{self.N:,} tokens do not fit one index (2³² positions); pass --tokens to take a part of the store"
            )
        self.token = table.token[: self.N]
        V = max(int(self.token.max(initial=0)) + 1, 0 if unembedding is None else len(unembedding[0]))
        self.vocab = (vocab or VocabBytes.of([])).padded(V)
        if ram is None:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            ram = max(64 << 20, min(RAM, free // 4))
        self.ram = ram
        self.signed = bool(sae.config.get("signed", False))
        self.index: FeatureIndex | None = None
        self.files: dict[str, dict] = {}
        self.warnings: list[str] = []

        self.folder = Path(folder)
        self.partial = self.folder / "index.partial"
        self._begin()
        feature_dtype = np.uint16 if self.F <= 1 << 16 else np.uint32
        self._out_feature = open(self.partial / "feature.part", "wb")  # noqa: SIM115  open across calls
        self._out_value = open(self.partial / "value.part", "wb")  # noqa: SIM115
        self._feature_dtype = feature_dtype
        self._start = self._scratch("start", np.int64, self.N + 1)
        self._encoded = self._scratch("encoded", np.bool_, self.N)
        self._early = self._scratch("early", np.bool_, self.N)
        self._per_token = {name: self._scratch(name, np.float32, self.N) for name in ("norm_x", "norm_code", "error")}
        self._n = np.zeros(self.F, np.int64)
        self._Z = 0
        self._seen = 0
        self._exponent: int | None = None
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # (first firing, exponent) of each stretch written with one exponent
        self._runs: list[tuple[int, int]] = []
        self._largest = self._largest_early = 0.0
        self._last_position = -1
        self._sequence, self._in_sequence = -1, 0
        self._dec_norm_F = torch.linalg.vector_norm(sae.W_dec.detach().float(), dim=1).cpu().numpy()

    def rows(self, outliers: str = "skip") -> np.ndarray:
        """Row numbers of the store that belong to the indexed sequences, ascending."""
        rows = self.store.valid_rows([self.site], split="all", outliers=outliers)
        return rows[rows < self.store.seq_rows()[self.S]]

    def _begin(self):
        index, old = self.folder / "index", self.folder / "index.old"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self._lock = open(self.partial / "lock", "w")  # noqa: SIM115  held until finish
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SaekitError(f"{self.folder} is being indexed by another process; wait for it, or stop it") from None
        if old.is_dir() and not index.is_dir():
            # killed between the two renames of _publish: the older index is the only whole one
            old.rename(index)
        for path in self.partial.iterdir():
            if path.name != "lock":
                path.unlink()

    def _scratch(self, name: str, dtype, size: int) -> np.ndarray:
        """A zeroed array on a file of its own, so that the system may write it out when memory is short."""
        if size == 0:
            return np.zeros(0, dtype)
        return np.memmap(self.partial / f"{name}.scratch", dtype, "w+", shape=(size,))

    # first pass

    @torch.no_grad()
    def update(self, chunk):
        """Takes rows in text order; those beyond the indexed sequences are left out."""
        take = int(np.searchsorted(chunk.positions, self.N))
        if take == 0:
            return
        positions = np.asarray(chunk.positions[:take])
        assert positions[0] > self._last_position and (np.diff(positions) > 0).all(), "chunks must come in text order"
        self._last_position = int(positions[-1])
        codes = chunk.codes if take == len(chunk.positions) else chunk.codes.rows(0, take)
        row, feature, value = _pairs(codes)
        sizes = (value * self._dec_norm_F[feature]).astype(np.float64) ** 2
        norm_code = np.sqrt(np.bincount(row, weights=sizes, minlength=take))
        x, error = chunk.x_BD[:take], chunk.x_BD[:take] - chunk.xhat_BD[:take]
        finite = np.isfinite(value)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise SaekitError(
                f"feature {feature[bad]:,} has the code {value[bad]} at position {positions[row[bad]]:,}; saekit check {self.folder}"
            )
        self._encoded[positions] = True
        self._per_token["norm_x"][positions] = torch.linalg.vector_norm(x, dim=1).cpu().numpy()
        self._per_token["norm_code"][positions] = norm_code
        self._per_token["error"][positions] = error.square().sum(1).cpu().numpy()
        self._start[positions + 1] = np.bincount(row, minlength=take)
        self._n += np.bincount(feature, minlength=self.F)
        self._Z += len(row)
        self._mark_early(positions)
        early = int(np.searchsorted(row, max(0, EXPONENT_TOKENS - self._seen)))
        size = np.abs(value)
        self._largest = max(self._largest, float(size.max(initial=0)))
        self._largest_early = max(self._largest_early, float(size[:early].max(initial=0)))
        self._seen += take
        self._pending.append((row, feature, value))
        if self._seen >= EXPONENT_TOKENS:
            self._flush()

    def _mark_early(self, positions: np.ndarray):
        """The first two encoded positions of each sequence."""
        sequence = np.searchsorted(self.seq_start, positions, side="right") - 1
        first = np.flatnonzero(np.diff(sequence, prepend=-1))
        begin = np.repeat(first, np.diff(first, append=len(sequence)))
        place = np.arange(len(sequence)) - begin
        place[sequence == self._sequence] += self._in_sequence
        self._early[positions[place < 2]] = True
        self._sequence, self._in_sequence = int(sequence[-1]), int(place[-1]) + 1

    def _flush(self):
        """Quantises what waits, sorts it inside its tokens by falling magnitude, appends it to the raw files."""
        if self._exponent is None:
            self._exponent = exponent_of(self._largest_early)
            self._runs.append((0, self._exponent))
        width = _bits(self.F)
        for row, feature, value in self._pending:
            bits, over = quantise(value, self._exponent)
            if over:
                self._exponent = exponent_of(float(np.abs(value).max()))
                self._runs.append((self._out_value.tell() // 2, self._exponent))
                bits, _ = quantise(value, self._exponent)
            assert _bits(int(row[-1]) + 1 if len(row) else 1) + 16 + width <= 64
            key = row.astype(np.uint64) << np.uint64(16 + width)
            key |= (np.uint16(0x7FFF) - (bits & np.uint16(0x7FFF))).astype(np.uint64) << np.uint64(1 + width)
            key |= feature.astype(np.uint64) << np.uint64(1)
            key |= bits >> np.uint16(15)
            key.sort()
            out = ((key >> np.uint64(1)) & np.uint64((1 << width) - 1)).astype(self._feature_dtype)
            size = np.uint16(0x7FFF) - ((key >> np.uint64(1 + width)).astype(np.uint16) & np.uint16(0x7FFF))
            self._out_feature.write(out.data)
            self._out_value.write((size | (key.astype(np.uint16) & np.uint16(1)) << np.uint16(15)).data)
        self._pending.clear()

    # everything after it

    @torch.no_grad()
    def finish(self):
        """Writes every file, the manifest last, and gives the folder its name."""
        self._flush()
        self._out_feature.close()
        self._out_value.close()
        np.cumsum(self._start, out=self._start)
        assert int(self._start[-1]) == self._Z
        self._feature = self._mapped("feature.part", self._feature_dtype, self._Z)
        self._value = self._mapped("value.part", np.uint16, self._Z, writable=True)
        self._rescale()
        self.E = int(self._encoded.sum())
        l0 = np.minimum(np.diff(self._start), 65_535).astype(np.uint16)
        encoded_l0 = l0[self._encoded]
        self.ragged = bool(len(encoded_l0) and encoded_l0.min() != encoded_l0.max())
        with Progress("codes", self._Z, "codes") as progress:
            self._write_tokens()
            self._write("per_token", {**self._per_token, "l0": l0})
            self._write_by_token()
            position, value = self._write_codes(progress)
        tables = Tables(self, position, value, l0)
        tables.run()
        columns, examples = tables.columns, tables.examples
        columns |= self._geometry()
        columns |= self._write_logits()
        columns["flags"] = self._flags(columns)
        self._write("features", {name: columns[name] for name in COLUMNS if name in columns})
        self._write("examples", examples)
        self._write_map()
        self._write_documents()
        self._write_manifest()
        self._publish()
        self.index = open_index(self.folder)

    def _mapped(self, name: str, dtype, size: int, writable: bool = False) -> np.ndarray:
        if size == 0:
            return np.zeros(0, dtype)
        return np.memmap(self.partial / name, dtype, "r+" if writable else "r", shape=(size,))

    def _write(self, name: str, tensors: dict[str, np.ndarray]):
        # the widest tensor comes first in the file; aligning it pads the header to a multiple of 64 bytes
        first = max(tensors, key=lambda k: tensors[k].itemsize)
        file = f"{name}.safetensors"
        self.files[file] = write_tensors(self.partial / file, tensors, align=first)

    def _rescale(self):
        """Brings stretches written with a smaller exponent to the last one, exact powers of two."""
        final = self._runs[0][1] if len(self._runs) == 1 else exponent_of(self._largest)
        ends = [first for first, _ in self._runs[1:]] + [self._Z]
        for (first, exponent), end in zip(self._runs, ends, strict=True):
            for lo in range(first, end if exponent != final else first, BLOCK_FIRINGS):
                part = self._value[lo : min(lo + BLOCK_FIRINGS, end)]
                part[:] = quantise(part.view(np.float16).astype(np.float32), final - exponent)[0]
        self.value_exponent = final

    def _write_tokens(self):
        table = self.store.table
        runs = int(np.searchsorted(table.run_start, self.N))
        self._write(
            "tokens",
            {
                "seq_start": self.seq_start,
                "run_start": np.array(table.run_start[:runs]),
                "run_doc": np.array(table.run_doc[:runs]),
                "run_position": np.array(table.run_position[:runs]),
                "token": np.asarray(self.token),
                "encoded": self._encoded,
            },
        )
        self._write("vocab", {"start": self.vocab.start, "bytes": self.vocab.blob, "special": self.vocab.special})
        counts = np.bincount(self.token, minlength=len(self.vocab))
        position = np.argsort(self.token, kind="stable").astype(np.uint32)
        self._write(
            "token_index", {"start": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), "position": position}
        )

    def _write_by_token(self):
        size = 8 * (self.N + 1) + self._Z * (self._feature.itemsize + 2)
        self.by_token = size < BY_TOKEN_BYTES if self.by_token is None else self.by_token
        if self.by_token:
            self._write(
                "by_token", {"start": self._start, "feature": self._feature, "value": self._value.view(np.float16)}
            )

    def _buckets(self, position_bits: int) -> list[tuple[int, int]]:
        """Feature ranges whose firings fit the budget, each at least one feature."""
        ends = np.concatenate([[0], np.cumsum(self._n)])
        buckets, lo = [], 0
        while lo < self.F:
            hi = int(np.searchsorted(ends, ends[lo] + self.ram // 8, side="right")) - 1
            hi = min(max(hi, lo + 1), lo + (1 << (48 - position_bits)), self.F)
            buckets.append((lo, hi))
            lo = hi
        return buckets

    def _write_codes(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """codes.safetensors; returns positions and value bits in its order."""
        position_bits = _bits(self.N)
        position = self._scratch("position", np.uint32, self._Z)
        value = self._scratch("codes", np.uint16, self._Z)
        shift = np.uint64(16 + position_bits)
        done = 0
        buckets = self._buckets(position_bits)
        # token ranges of about one block of firings each
        cuts = np.searchsorted(self._start, np.arange(0, self._Z, BLOCK_FIRINGS), side="right") - 1
        cuts = np.unique(np.concatenate([cuts, [self.N]]))
        for lo, hi in buckets:
            keys = np.empty(int(self._n[lo:hi].sum()), np.uint64)
            filled = 0
            for p0, p1 in pairwise(cuts):
                a, b = int(self._start[p0]), int(self._start[p1])
                feature, bits = self._feature[a:b], self._value[a:b]
                at = np.repeat(np.arange(p0, p1, dtype=np.uint32), np.diff(self._start[p0 : p1 + 1]))
                if len(buckets) > 1:
                    mine = np.flatnonzero((feature >= lo) & (feature < hi))
                    feature, bits, at = feature[mine], bits[mine], at[mine]
                part = keys[filled : filled + len(feature)]
                np.left_shift(feature.astype(np.uint64) - np.uint64(lo), shift, out=part)
                part |= at.astype(np.uint64) << np.uint64(16)
                part |= bits
                filled += len(feature)
            assert filled == len(keys)
            # the firings of a single feature arrive in order of position already
            if hi - lo > 1:
                keys.sort()
            for i in range(0, len(keys), BLOCK_FIRINGS):
                part = keys[i : i + BLOCK_FIRINGS + 1] >> np.uint64(16)
                twice = np.flatnonzero(part[1:] <= part[:-1])
                if len(twice):
                    key = int(part[twice[0] + 1])
                    raise AssertionError(
                        f"the encoder gave feature {lo + (key >> position_bits)} twice at position {key & ((1 << position_bits) - 1)}"
                    )
                part = part[:BLOCK_FIRINGS]
                position[done : done + len(part)] = part & np.uint64((1 << position_bits) - 1)
                value[done : done + len(part)] = keys[i : i + BLOCK_FIRINGS].astype(np.uint16)
                done += len(part)
                progress.advance(len(part))
        self.code_start = np.concatenate([[0], np.cumsum(self._n)]).astype(np.int64)
        self._write("codes", {"start": self.code_start, "position": position, "value": value.view(np.float16)})
        return position, value

    # geometry

    def _geometry(self) -> dict[str, np.ndarray]:
        """Norms and cosines of the rows; writes neighbours.safetensors where the product is small enough."""
        W_enc_FD, W_dec_FD = (w.detach().float() for w in (self.sae.W_enc, self.sae.W_dec))
        dec_norm, enc_norm = (torch.linalg.vector_norm(w, dim=1) for w in (W_dec_FD, W_enc_FD))
        dec_FD = W_dec_FD / dec_norm.clamp_min(1e-30)[:, None]
        enc_FD = W_enc_FD / enc_norm.clamp_min(1e-30)[:, None]
        columns = {
            "dec_norm": dec_norm,
            "enc_norm": enc_norm,
            "enc_dec_cos": (dec_FD * enc_FD).sum(1),
            "bias": self.sae.b_enc.detach().float(),
        }
        for name in ("threshold", "budget"):
            buffer = dict(self.sae.named_buffers()).get(name) if hasattr(self.sae, "named_buffers") else None
            if buffer is not None and buffer.numel() == self.F:
                columns[name] = buffer.detach().float().reshape(-1)
        columns = {name: column.cpu().numpy() for name, column in columns.items()}
        on_gpu = W_dec_FD.device.type != "cpu"
        if self.F > 1 and (on_gpu or float(self.F) ** 2 * self.D <= NEIGHBOUR_FLOPS):
            with Progress("neighbours", 2 * self.F, "features") as progress:
                dec_feature, dec_cos = nearest_rows(dec_FD, NEIGHBOURS, progress)
                enc_feature, enc_cos = nearest_rows(enc_FD, NEIGHBOURS, progress)
            self._write(
                "neighbours",
                {
                    "decoder_feature": dec_feature,
                    "encoder_feature": enc_feature,
                    "decoder_cos": dec_cos.astype(np.float16),
                    "encoder_cos": enc_cos.astype(np.float16),
                },
            )
            columns["max_dec_cos"], columns["max_dec_feature"] = dec_cos[:, 0].copy(), dec_feature[:, 0].copy()
            columns["max_enc_cos"] = enc_cos[:, 0].copy()
        else:
            columns["max_dec_cos"] = columns["max_enc_cos"] = np.full(self.F, np.nan, np.float32)
            columns["max_dec_feature"] = np.full(self.F, ABSENT, np.uint32)
        return columns

    def _write_logits(self) -> dict[str, np.ndarray]:
        if self.unembedding is None:
            return {}
        W_U_VD, self.logit_note = self.unembedding
        if not str(self.site).endswith(DIRECT) or W_U_VD.shape[1] != self.D:
            self.warnings.append(f"no logit weights: {self.site} does not write into the residual stream directly")
            return {}
        token, weight, moments = logit_weights(self.sae.W_dec.detach().float(), W_U_VD)
        self._write("logits", {"token": token, "weight": weight})
        return moments

    def _flags(self, c: dict[str, np.ndarray]) -> np.ndarray:
        n = c["n"]
        with np.errstate(invalid="ignore"):
            rules = {
                "dead": n == 0,
                "dense": n > 0.1 * self.E,
                "near-duplicate": np.abs(c["max_dec_cos"]) > 0.9,
                "one-sided": (n > 0) & ((c["n_pos"] == 0) | (c["n_neg"] == 0)) & self.signed,
                "capped": c["kept"] < 1,
                "start-of-sequence": c["start_share"] > 0.5,
            }
        flags = np.zeros(self.F, np.uint16)
        for name, rule in rules.items():
            flags[rule] |= FLAGS[name]
        return flags

    def _write_map(self):
        if self.D < 2:
            return
        self._write("map", {"xy": principal_plane(self.sae.W_dec.detach().float())})

    def _write_documents(self):
        source = Path(self.store.path) / "documents.jsonl"
        if source.is_file():
            target = self.partial / "documents.jsonl"
            atomic_write(target, source.read_bytes())
            self.files[target.name] = {"bytes": target.stat().st_size, "sha256": sha256_file(target)}

    def _write_manifest(self):
        store, config = self.store.manifest, self.sae.config
        tokenizer, model = store.get("tokenizer"), store.get("model") or {}
        blob = sha256(self.vocab.blob.tobytes())
        blob.update(self.vocab.start.tobytes())
        dead = int((self._n == 0).sum())
        if dead:
            self.warnings.append(f"{dead:,} of {self.F:,} features did not fire on {self.E:,} tokens")
        if self.E < 100_000:
            self.warnings.append(
                f"{self.E:,} tokens are few: densities below {3 / max(1, self.E):.0e} cannot be told from 0"
            )
        logits = {"note": self.logit_note} if "logits.safetensors" in self.files else None
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "saekit_version": saekit.__version__,
            "variant": config.get("variant"),
            "site": self.site,
            "model": store.get("model"),
            "N": self.N,
            "E": self.E,
            "S": self.S,
            "F": self.F,
            "D": self.D,
            "Z": self._Z,
            "V": len(self.vocab),
            "signed": self.signed,
            "ragged": self.ragged,
            "value_exponent": self.value_exponent,
            "bias_norm": float(torch.linalg.vector_norm(self.sae.b_dec.detach().double())),
            "special_token_ids": np.flatnonzero(self.vocab.special).tolist(),
            "fingerprints": {
                "sae": config.get("fingerprint"),
                "store": "sha256:" + sha256(canonical_json([self.store.fingerprint, [0, self.S]])).hexdigest(),
                "tokenizer": tokenizer["fingerprint"] if tokenizer else None,
                "vocabulary": "sha256:" + blob.hexdigest(),
                "model": model.get("weights_fingerprint"),
            },
            "files": dict(sorted(self.files.items())),
            "build": {
                "seed": self.seed,
                "top": TOP,
                "slices": [SLICES, PER_SLICE],
                "bins": BINS,
                "tokens": TOKENS,
                "by_token": self.by_token,
                "cap": None,
                "compute": "fp32",
                "logits": logits,
                "map": {"method": "pca", "seed": None} if "map.safetensors" in self.files else None,
            },
            "warnings": self.warnings,
        }
        atomic_write(self.partial / "manifest.json", pretty_json(manifest))

    def _publish(self):
        """Sets an older index aside, renames, and removes what is left over."""
        for path in self.partial.iterdir():
            if path.suffix in (".part", ".scratch"):
                path.unlink()
        (self.partial / "lock").unlink()
        index, old = self.folder / "index", self.folder / "index.old"
        if old.exists():
            shutil.rmtree(old)
        if index.exists():
            index.rename(old)
        self.partial.rename(index)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self._lock.close()


def build_index(sae, store=None, **options) -> FeatureIndex:
    """Index `sae` (an SAE with a folder, or that folder) over `store`; options as in IndexOptions.

    Without a store the one the SAE was trained on is taken. The language model serves token text and logit weights; where
    none was asked for and the store's own is not at hand, the index goes without them and its manifest says so.
    Raises SaekitError if the SAE, store or model do not belong together.
    """
    from saekit.config import IndexOptions
    from saekit.encoding import encode_store
    from saekit.provenance import find_model, find_site, find_store
    from saekit.sae import SAE

    o = IndexOptions(**options)
    sae = sae if isinstance(sae, SAE) else SAE.load(sae)
    if sae.path is None:
        raise SaekitError("the SAE has no folder for its index yet; save it first: sae.save(folder)")
    store = find_store(sae, store or o.store, force=o.force)
    site = find_site(sae, store, o.site)
    vocab = unembedding = None
    reasons = []
    try:
        lm = find_model(store, o.model, device=o.device, force=o.force)
    except SaekitError as error:
        if o.model is not None:
            raise
        reasons.append(f"no token text and no logit weights: {error}")
    else:
        try:
            unembedding = lm.unembedding()
        except SaekitError as error:
            reasons.append(f"no logit weights: {error}")
        if lm.tokenizer is not None:
            vocab = vocab_bytes(lm.tokenizer, lm.vocab_size)
    n_sequences = None
    if o.tokens is not None:
        n_sequences = max(1, int(np.searchsorted(store.table.seq_start, o.tokens)))
    builder = IndexBuilder(
        sae, store, sae.path, site=site, n_sequences=n_sequences, vocab=vocab, unembedding=unembedding, seed=o.seed
    )
    builder.warnings += reasons
    encode_store(sae, store, site, [builder], rows=builder.rows(), name="index")
    assert builder.index is not None
    return builder.index


COLUMNS = (
    "n", "n_pos", "n_neg", "n_seq", "seq_sq", "mean", "mean_abs", "mean_sq", "skew", "kurtosis", "max_pos", "max_neg",
    "q05", "q25", "q50", "q75", "q95", "q99", "energy", "crowd", "start_share", "token_entropy", "top_token",
    "top_token_share", "token_f1", "dec_norm", "enc_norm", "enc_dec_cos", "max_dec_cos", "max_dec_feature", "max_enc_cos",
    "bias", "threshold", "budget", "logit_std", "logit_skew", "logit_kurtosis", "kept", "flags",
)  # fmt: skip


class Tables:
    """The second pass: columns and example tables from the codes in feature order, a block of features at a time.

    What is not defined is NaN: everything of a dead feature but its counts, skew and kurtosis of equal codes. Moments,
    `mean` to `kurtosis`, are over the firings; kurtosis is the excess over a normal distribution's 3.
    """

    def __init__(self, builder: IndexBuilder, position: np.ndarray, value: np.ndarray, l0: np.ndarray):
        b = self.b = builder
        F, G = b.F, 2 if b.signed else 1
        self.G, self.position, self.value, self.l0 = G, position, value, l0
        self.scale = 2.0**b.value_exponent
        self.sequence = b._scratch("sequence", np.uint32, b.N)
        self.sequence[:] = np.repeat(np.arange(b.S, dtype=np.uint32), np.diff(b.seq_start))
        self.occurrences = np.bincount(b.token[b._encoded], minlength=len(b.vocab))
        self.columns: dict[str, np.ndarray] = {"n": b._n}
        for name in ("n_pos", "n_neg", "n_seq", "seq_sq"):
            self.columns[name] = np.zeros(F, np.int64)
        for name in (
            "mean", "mean_abs", "mean_sq", "skew", "kurtosis", *(f"q{q:02d}" for q in QUANTILES), "crowd", "start_share",
            "token_entropy", "top_token_share", "token_f1",
        ):  # fmt: skip
            self.columns[name] = np.full(F, np.nan, np.float32)
        self.columns["max_pos"], self.columns["max_neg"] = np.zeros(F, np.float32), np.zeros(F, np.float32)
        self.columns["top_token"] = np.full(F, ABSENT, np.uint32)
        self.columns["kept"] = np.ones(F, np.float32)
        self.energy = np.zeros(F)
        self.examples = {
            "top_position": np.full((F, G, TOP), ABSENT, np.uint32),
            "top_value": np.zeros((F, G, TOP), np.float16),
            "sample_position": np.full((F, G, SLICES, PER_SLICE), ABSENT, np.uint32),
            "sample_value": np.zeros((F, G, SLICES, PER_SLICE), np.float16),
            "histogram": np.zeros((F, BINS), np.uint32),
            "token_id": np.full((F, TOKENS), ABSENT, np.uint32),
            "token_fires": np.zeros((F, TOKENS), np.uint32),
        }

    def run(self):
        start = self.b.code_start
        lo = 0
        with Progress("tables", self.b._Z, "codes") as progress:
            while lo < self.b.F:
                hi = int(np.searchsorted(start, start[lo] + BLOCK_FIRINGS, side="right")) - 1
                hi = min(max(hi, lo + 1), lo + BLOCK_FEATURES, self.b.F)
                if start[hi] > start[lo]:
                    self.block(lo, hi)
                progress.advance(int(start[hi] - start[lo]))
                lo = hi
        total = self.energy.sum()
        self.columns["energy"] = (self.energy / total if total else self.energy).astype(np.float32)

    def block(self, lo: int, hi: int):
        """Fills the rows lo to hi − 1 of every table."""
        a, b = int(self.b.code_start[lo]), int(self.b.code_start[hi])
        position, bits = np.asarray(self.position[a:b]), np.asarray(self.value[a:b])
        n = self.b._n[lo:hi]
        local = np.repeat(np.arange(hi - lo, dtype=np.uint32), n)
        alive = np.flatnonzero(n)
        starts = (self.b.code_start[lo:hi] - a)[alive]
        self.moments(lo + alive, n[alive], starts, bits, position)
        self.sequences(lo, hi, local, position)
        n_pos, keys = self.strength(lo, hi, n, local, position, bits)
        self.quantiles(lo + alive, n[alive], starts, local, bits, keys)
        self.histogram(lo, hi, n, local, bits)
        self.tops(lo, hi, n, n_pos, keys)
        self.samples(lo, hi, n, n_pos, keys)
        self.tokens(lo, hi, n, local, position)

    def moments(self, rows, n, starts, bits, position):
        v = bits.view(np.float16).astype(np.float64)
        v *= self.scale
        total = lambda x: np.add.reduceat(x, starts)  # noqa: E731
        c = self.columns
        mean = total(v) / n
        c["mean"][rows] = mean
        c["mean_abs"][rows] = total(np.abs(v)) / n
        square = total(v * v)
        c["mean_sq"][rows] = square / n
        self.energy[rows] = square * self.b._dec_norm_F[rows].astype(np.float64) ** 2
        c["max_pos"][rows] = np.maximum(np.maximum.reduceat(v, starts), 0)
        c["max_neg"][rows] = np.minimum(np.minimum.reduceat(v, starts), 0)
        v -= np.repeat(mean, n)
        power = v * v
        variance = total(power) / n
        power *= v
        third = total(power) / n
        power *= v
        fourth = total(power) / n
        # float16 codes that are all equal leave a variance of rounding errors only
        spread = variance > 1e-12 * c["mean_sq"][rows]
        with np.errstate(invalid="ignore", divide="ignore"):
            c["skew"][rows] = np.where(spread, third / variance**1.5, np.nan)
            c["kurtosis"][rows] = np.where(spread, fourth / variance**2 - 3, np.nan)
        c["crowd"][rows] = total(self.l0[position].astype(np.float64)) / n
        c["start_share"][rows] = total(self.b._early[position].astype(np.float64)) / n

    def sequences(self, lo, hi, local, position):
        sequence = self.sequence[position]
        first = np.flatnonzero(_changes(local) | _changes(sequence))
        counts = np.diff(first, append=len(local))
        self.columns["n_seq"][lo:hi] = np.bincount(local[first], minlength=hi - lo)
        self.columns["seq_sq"][lo:hi] = np.bincount(
            local[first], weights=counts.astype(np.float64) ** 2, minlength=hi - lo
        )

    def strength(self, lo, hi, n, local, position, bits):
        """Keys (feature | sign | inverted magnitude | position), sorted: each feature's firings by sign, then strength."""
        n_neg = np.bincount(local[bits >= 0x8000], minlength=hi - lo)
        assert self.b.signed or not n_neg.any(), "negative codes in an index of non-negative ones"
        self.columns["n_pos"][lo:hi], self.columns["n_neg"][lo:hi] = n - n_neg, n_neg
        keys = local.astype(np.uint64) << np.uint64(48)
        keys |= (bits ^ np.uint16(0x7FFF)).astype(np.uint64) << np.uint64(32)
        keys |= position
        keys.sort()
        return n - n_neg, keys

    def quantiles(self, rows, n, starts, local, bits, keys):
        """Of the magnitude, with linear interpolation between ranks."""
        if self.b.signed:
            merged = local << np.uint32(15) | (bits & np.uint16(0x7FFF))
            merged.sort()
            size = (merged & np.uint32(0x7FFF)).astype(np.uint16).view(np.float16)
        else:
            size = _size_of(keys).view(np.float16)
        for q in QUANTILES:
            # exact in integers: rank (n − 1)·q/100 from the smallest
            whole, rest = np.divmod((n - 1) * q, 100)
            upper = np.minimum(whole + 1, n - 1)
            at = (starts + whole, starts + upper) if self.b.signed else (starts + n - 1 - whole, starts + n - 1 - upper)
            below, above = (size[i].astype(np.float64) for i in at)
            self.columns[f"q{q:02d}"][rows] = (below + (above - below) * rest / 100) * self.scale

    def histogram(self, lo, hi, n, local, bits):
        v = bits.view(np.float16).astype(np.float64)
        m = np.maximum(self.columns["max_pos"][lo:hi], -self.columns["max_neg"][lo:hi]).astype(np.float64) / self.scale
        largest = np.repeat(m, n)
        if self.b.signed:
            v += largest
            v *= BINS / 2
            v /= largest
            place = np.minimum(v.astype(np.int64), BINS - 1)
        else:
            v *= BINS
            v /= largest
            place = np.ceil(v, out=v).astype(np.int64) - 1
        place += local.astype(np.int64) * BINS
        self.examples["histogram"][lo:hi] = np.bincount(place, minlength=(hi - lo) * BINS).reshape(-1, BINS)

    def _groups(self, n, n_pos):
        """Start and count of each (feature, sign) in the sorted keys, (features, G)."""
        begin = np.cumsum(n) - n
        if self.G == 1:
            return begin[:, None], n[:, None]
        return np.stack([begin, begin + n_pos], 1), np.stack([n_pos, n - n_pos], 1)

    def tops(self, lo, hi, n, n_pos, keys):
        begin, count = self._groups(n, n_pos)
        take = np.minimum(count, TOP_CANDIDATES).reshape(-1)
        group = np.repeat(np.arange(len(take)), take)
        rank = np.arange(len(group)) - np.repeat(np.cumsum(take) - take, take)
        key = keys[np.repeat(begin.reshape(-1), take) + rank]
        position = (key & np.uint64(0xFFFFFFFF)).astype(np.int64)
        keep = _first_of_each(group, rank, self.sequence[position].astype(np.uint64), 32)
        group, rank, key, position = group[keep], rank[keep], key[keep], position[keep]
        keep = _first_of_each(group, rank, self.context_hash(position), 64 - 8 - _bits(len(take)))
        group, key, position = group[keep], key[keep], position[keep]
        first = np.searchsorted(group, np.arange(len(take)))
        place = np.arange(len(group)) - first[group]
        keep = place < TOP
        row, side, place = lo + group[keep] // self.G, group[keep] % self.G, place[keep]
        self.examples["top_position"][row, side, place] = position[keep]
        self.examples["top_value"][row, side, place] = _value_of(key[keep])

    def context_hash(self, position: np.ndarray) -> np.ndarray:
        """uint64 hash of the up to eight tokens that end at each position, inside its sequence."""
        depth = position - self.b.seq_start[self.sequence[position]]
        h = np.zeros(len(position), np.uint64)
        for k in range(CONTEXT):
            token = self.b.token[np.maximum(position - k, 0)].astype(np.uint64) + np.uint64(1)
            h = splitmix(h ^ np.where(depth >= k, token, np.uint64(0)))
        return h

    def samples(self, lo, hi, n, n_pos, keys):
        """Eight evenly spaced ranks with one offset in each of ten slices of equal count, strongest slice first."""
        begin, count = self._groups(n, n_pos)
        feature = np.arange(lo, hi, dtype=np.uint64)[:, None, None]
        sign = np.arange(self.G, dtype=np.uint64)[None, :, None]
        slices = np.arange(SLICES, dtype=np.uint64)
        seed = splitmix(np.array([self.b.seed], np.uint64))
        offset = (
            splitmix(seed ^ splitmix(feature * np.uint64(32) + sign * np.uint64(16) + slices)) >> np.uint64(40)
        ).astype(np.int64)
        i = np.arange(SLICES)
        first, last = i * count[..., None] // SLICES, (i + 1) * count[..., None] // SLICES
        m = (last - first)[..., None]
        j = np.arange(PER_SLICE)
        rank = np.where(m > PER_SLICE, ((j << 24) + offset[..., None]) * m // (PER_SLICE << 24), j)
        there = j < m
        key = keys[np.where(there, begin[..., None, None] + first[..., None] + rank, 0)]
        self.examples["sample_position"][lo:hi] = np.where(there, key & np.uint64(0xFFFFFFFF), np.uint64(ABSENT))
        self.examples["sample_value"][lo:hi] = np.where(there, _value_of(key), np.float16(0))

    def tokens(self, lo, hi, n, local, position):
        c, F = self.columns, hi - lo
        token_bits = _bits(len(self.b.vocab))
        wide = np.uint32 if _bits(F) + token_bits <= 32 else np.uint64
        keys = local.astype(wide) << wide(token_bits)
        keys |= self.b.token[position].astype(wide)
        keys.sort()
        first = np.flatnonzero(_changes(keys))
        counts = np.diff(first, append=len(keys))
        feature = (keys[first] >> wide(token_bits)).astype(np.int64)
        token = (keys[first] & wide((1 << token_bits) - 1)).astype(np.int64)
        alive = np.flatnonzero(n)
        begin = np.searchsorted(feature, alive)
        mine = n[alive]
        spread = np.add.reduceat(counts * np.log2(counts), begin)
        c["token_entropy"][lo + alive] = np.maximum(0, np.log2(mine) - spread / mine)
        c["token_f1"][lo + alive] = np.maximum.reduceat(2 * counts / (n[feature] + self.occurrences[token]), begin)
        count_bits = _bits(int(counts.max()) + 1)
        assert _bits(F) + count_bits + token_bits <= 64
        order = feature.astype(np.uint64) << np.uint64(count_bits + token_bits)
        order |= ((1 << count_bits) - 1 - counts).astype(np.uint64) << np.uint64(token_bits)
        order |= token.astype(np.uint64)
        order.sort()
        place = np.arange(len(order)) - np.repeat(begin, np.diff(begin, append=len(order)))
        keep = place < TOKENS
        order, row, place = order[keep], lo + feature[keep], place[keep]
        self.examples["token_id"][row, place] = order & np.uint64((1 << token_bits) - 1)
        self.examples["token_fires"][row, place] = (
            (1 << count_bits)
            - 1
            - ((order >> np.uint64(token_bits)) & np.uint64((1 << count_bits) - 1)).astype(np.int64)
        )
        c["top_token"][lo + alive] = self.examples["token_id"][lo + alive, 0]
        c["top_token_share"][lo + alive] = self.examples["token_fires"][lo + alive, 0] / mine


def _changes(x: np.ndarray) -> np.ndarray:
    """True where an entry differs from the one before it, and at the first."""
    out = np.empty(len(x), bool)
    out[:1] = True
    np.not_equal(x[1:], x[:-1], out=out[1:])
    return out


def _size_of(keys: np.ndarray) -> np.ndarray:
    """Magnitude bits (uint16) of strength keys."""
    return np.uint16(0x7FFF) - ((keys >> np.uint64(32)).astype(np.uint16) & np.uint16(0x7FFF))


def _value_of(keys: np.ndarray) -> np.ndarray:
    """Signed float16 value of strength keys."""
    return ((keys >> np.uint64(32)).astype(np.uint16) ^ np.uint16(0x7FFF)).view(np.float16)


def _first_of_each(group: np.ndarray, rank: np.ndarray, what: np.ndarray, bits: int) -> np.ndarray:
    """Mask of entries that are the best rank of their (group, what); `what` is cut to its lowest `bits` bits.

    `group` ascends, `rank` ascends inside a group and stays below 256.
    """
    if len(group) == 0:
        return np.zeros(0, bool)
    key = group.astype(np.uint64) << np.uint64(bits + 8)
    key |= (what & np.uint64((1 << bits) - 1)) << np.uint64(8)
    key |= rank.astype(np.uint64)
    key.sort()
    best = key[_changes(key >> np.uint64(8))]
    # back to the entry: its (group, rank) is unique and ascends
    own = (group << 8) + rank
    found = ((best >> np.uint64(bits + 8)) << np.uint64(8) | (best & np.uint64(0xFF))).astype(np.int64)
    keep = np.zeros(len(group), bool)
    keep[np.searchsorted(own, found)] = True
    return keep


def nearest_rows(W_FD: torch.Tensor, k: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The k other rows of largest |cosine| for each unit row, by falling size: features (F, k) uint32, cosines float32."""
    F = len(W_FD)
    features = np.full((F, k), ABSENT, np.uint32)
    cosines = np.zeros((F, k), np.float32)
    zeros = W_FD.new_zeros(F)
    keep = min(k + 1, F)
    rows = max(1, (1 << 25) // F)
    for lo in range(0, F, rows):
        part = W_FD[lo : lo + rows]
        codes = encode_select(part, W_FD, zeros, rule=RowCount(keep), key="abs", compute="fp32").codes
        value, index = codes.values.cpu().numpy().clip(-1, 1), codes.indices.cpu().numpy().astype(np.int64)
        size = np.abs(value)
        # the row itself goes last, and so do empty slots
        own = (index == np.arange(lo, lo + len(part))[:, None]) | (value == 0)
        size[own] = -1
        order = np.lexsort((index, -size), axis=1)[:, : keep - 1]
        there = np.take_along_axis(size, order, 1) > 0
        features[lo : lo + len(part), : keep - 1] = np.where(there, np.take_along_axis(index, order, 1), ABSENT)
        cosines[lo : lo + len(part), : keep - 1] = np.where(there, np.take_along_axis(value, order, 1), 0)
        progress.advance(len(part))
    return features, cosines


def logit_weights(W_dec_FD: torch.Tensor, W_U_VD: torch.Tensor) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Strongest up and down tokens of each decoder row: ids and weights (F, 2, 20), and moments over the vocabulary."""
    F, V = len(W_dec_FD), len(W_U_VD)
    k = min(LOGITS, V)
    token = np.full((F, 2, LOGITS), ABSENT, np.uint32)
    weight = np.zeros((F, 2, LOGITS), np.float32)
    moments = {name: np.zeros(F, np.float32) for name in ("logit_std", "logit_skew", "logit_kurtosis")}
    rows = max(1, (1 << 24) // V)
    W_U_VD = W_U_VD.detach().to(W_dec_FD.device, torch.float32)
    with Progress("logits", F, "features") as progress:
        for lo in range(0, F, rows):
            w_BV = W_dec_FD[lo : lo + rows] @ W_U_VD.T
            here = slice(lo, lo + len(w_BV))
            for side, largest in ((0, True), (1, False)):
                best = w_BV.topk(k, dim=1, largest=largest)
                token[here, side, :k], weight[here, side, :k] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            centred = w_BV - w_BV.mean(1, keepdim=True)
            square = centred * centred
            variance = square.mean(1).double()
            moments["logit_std"][here] = variance.sqrt().cpu().numpy()
            skew = (square * centred).mean(1).double() / variance**1.5
            kurtosis = (square * square).mean(1).double() / variance**2 - 3
            moments["logit_skew"][here], moments["logit_kurtosis"][here] = skew.cpu().numpy(), kurtosis.cpu().numpy()
            progress.advance(len(w_BV))
    return token, weight, moments


def principal_plane(W_dec_FD: torch.Tensor) -> np.ndarray:
    """First two principal components of the unit decoder rows (F, 2) float32; each axis points to its larger entry."""
    unit_FD = W_dec_FD / torch.linalg.vector_norm(W_dec_FD, dim=1).clamp_min(1e-30)[:, None]
    centred = unit_FD - unit_FD.mean(0)
    _, axes = torch.linalg.eigh((centred.T @ centred).double().cpu())
    axes = axes[:, -2:].flip(1)
    sign = torch.gather(axes, 0, axes.abs().argmax(0, keepdim=True)).sign()
    return (centred.double().cpu() @ (axes * sign)).float().numpy()
