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

Values are float16 times 2^value_exponent. The third step is tables.py; what the weights alone say is geometry.py.

N token positions, E of them encoded · S sequences · F features · D width · Z non-zero codes · V vocabulary.
"""

import os
import shutil
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

import saekit
from saekit.errors import SaekitError
from saekit.feature_index.format import (
    ABSENT,
    BINS,
    COLUMNS,
    FORMAT,
    FORMAT_VERSION,
    PER_SLICE,
    SLICES,
    TOKENS,
    TOP,
    bit_width,
    exponent_of,
    quantise,
)
from saekit.feature_index.geometry import (
    logit_weights,
    neighbours,
    posterior_columns,
    principal_plane,
    weight_columns,
)
from saekit.feature_index.reader import FeatureIndex, open_index
from saekit.feature_index.tables import BLOCK_FIRINGS, Tables, flag_bits
from saekit.feature_index.vocabulary import VocabBytes, vocab_bytes
from saekit.progress import Progress
from saekit.store.format import (
    atomic_write,
    canonical_json,
    pretty_json,
    sha256_file,
    sync_folder,
    take_lock,
    write_tensors,
)

EXPONENT_TOKENS = 65_536
"""The value exponent is chosen from so many tokens."""
PENDING_CODES = 1 << 24
"""Codes that may wait for it; where many features fire these are fewer tokens."""
BY_TOKEN_BYTES = 8 << 30
RAM = 1 << 30
# sites that add straight into the residual stream, where a decoder row times the unembedding means something
DIRECT = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


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
        signed = sae.config.get("signed")
        self.signed = bool(sae.variant.signed if signed is None else signed)
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
        self._start = self.scratch("start", np.int64, self.N + 1)
        self.encoded = self.scratch("encoded", np.bool_, self.N)
        self.early = self.scratch("early", np.bool_, self.N)
        self._per_token = {name: self.scratch(name, np.float32, self.N) for name in ("norm_x", "norm_code", "error")}
        self.n = np.zeros(self.F, np.int64)
        self.Z = 0
        self._seen = 0
        self._exponent: int | None = None
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # (first firing, exponent) of each stretch written with one exponent
        self._runs: list[tuple[int, int]] = []
        self._largest = self._largest_early = 0.0
        self._last_position = -1
        self._sequence, self._in_sequence = -1, 0
        self.dec_norm_F = torch.linalg.vector_norm(sae.W_dec.detach().float(), dim=1).cpu().numpy()

    def rows(self, outliers: str = "skip") -> np.ndarray:
        """Row numbers of the store that belong to the indexed sequences, ascending."""
        rows = self.store.valid_rows([self.site], split="all", outliers=outliers)
        return rows[rows < self.store.seq_rows()[self.S]]

    def _begin(self):
        index, old = self.folder / "index", self.folder / "index.old"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self._lock = take_lock(self.partial / "lock", self.folder, "indexed")
        if old.is_dir() and not index.is_dir():
            # killed between the two renames of _publish: the older index is the only whole one
            old.rename(index)
        for path in self.partial.iterdir():
            if path.name != "lock":
                path.unlink()

    def scratch(self, name: str, dtype, size: int) -> np.ndarray:
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
        sizes = (value * self.dec_norm_F[feature]).astype(np.float64) ** 2
        norm_code = np.sqrt(np.bincount(row, weights=sizes, minlength=take))
        x, error = chunk.x_BD[:take], chunk.x_BD[:take] - chunk.xhat_BD[:take]
        finite = np.isfinite(value)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise SaekitError(
                f"feature {feature[bad]:,} has the code {value[bad]} at position {positions[row[bad]]:,}; saekit check {self.folder}"
            )
        if not self.signed and value.min(initial=0) < 0:
            bad = int(value.argmin())
            raise SaekitError(
                f"feature {feature[bad]:,} has the code {value[bad]} at position {positions[row[bad]]:,}, and the variant "
                f"{self.sae.config.get('variant')} says that no code is negative; let its property `signed` be True"
            )
        self.encoded[positions] = True
        self._per_token["norm_x"][positions] = torch.linalg.vector_norm(x, dim=1).cpu().numpy()
        self._per_token["norm_code"][positions] = norm_code
        self._per_token["error"][positions] = error.square().sum(1).cpu().numpy()
        self._start[positions + 1] = np.bincount(row, minlength=take)
        self.n += np.bincount(feature, minlength=self.F)
        self.Z += len(row)
        self._mark_early(positions)
        early = int(np.searchsorted(row, max(0, EXPONENT_TOKENS - self._seen)))
        size = np.abs(value)
        self._largest = max(self._largest, float(size.max(initial=0)))
        self._largest_early = max(self._largest_early, float(size[:early].max(initial=0)))
        self._seen += take
        self._pending.append((row, feature, value))
        if self._seen >= EXPONENT_TOKENS or sum(len(value) for _, _, value in self._pending) >= PENDING_CODES:
            self._flush()

    def _mark_early(self, positions: np.ndarray):
        """The first two encoded positions of each sequence."""
        sequence = np.searchsorted(self.seq_start, positions, side="right") - 1
        first = np.flatnonzero(np.diff(sequence, prepend=-1))
        begin = np.repeat(first, np.diff(first, append=len(sequence)))
        place = np.arange(len(sequence)) - begin
        place[sequence == self._sequence] += self._in_sequence
        self.early[positions[place < 2]] = True
        self._sequence, self._in_sequence = int(sequence[-1]), int(place[-1]) + 1

    def _flush(self):
        """Quantises what waits, sorts it inside its tokens by falling magnitude, appends it to the raw files."""
        if self._exponent is None:
            self._exponent = exponent_of(self._largest_early)
            self._runs.append((0, self._exponent))
        width = bit_width(self.F)
        for row, feature, value in self._pending:
            bits, over = quantise(value, self._exponent)
            if over:
                self._exponent = exponent_of(float(np.abs(value).max()))
                self._runs.append((self._out_value.tell() // 2, self._exponent))
                bits, _ = quantise(value, self._exponent)
            assert bit_width(int(row[-1]) + 1 if len(row) else 1) + 16 + width <= 64
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
        assert int(self._start[-1]) == self.Z
        self._feature = self._mapped("feature.part", self._feature_dtype, self.Z)
        self._value = self._mapped("value.part", np.uint16, self.Z, writable=True)
        self._rescale()
        self.E = int(self.encoded.sum())
        l0 = np.minimum(np.diff(self._start), 65_535).astype(np.uint16)
        encoded_l0 = l0[self.encoded]
        self.ragged = bool(len(encoded_l0) and encoded_l0.min() != encoded_l0.max())
        with Progress("codes", self.Z, "codes") as progress:
            self._write_tokens()
            self._write("per_token", {**self._per_token, "l0": l0})
            self._write_by_token()
            position, value = self._write_codes(progress)
        tables = Tables(self, position, value, l0)
        tables.run()
        columns, examples = tables.columns, tables.examples
        columns |= self._geometry()
        columns |= posterior_columns(self.sae, columns["mean_sq"])
        columns |= self._write_logits()
        columns["flags"] = flag_bits(columns, self.E, self.signed)
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
        """Brings stretches written with another exponent to the one of the first tokens, or of all where that overflows: exact
        powers of two."""
        final = exponent_of(self._largest_early)
        if quantise(np.array([self._largest], np.float32), final)[1]:
            final = exponent_of(self._largest)
        ends = [first for first, _ in self._runs[1:]] + [self.Z]
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
                "encoded": self.encoded,
            },
        )
        self._write("vocab", {"start": self.vocab.start, "bytes": self.vocab.blob, "special": self.vocab.special})
        counts = np.bincount(self.token, minlength=len(self.vocab))
        position = np.argsort(self.token, kind="stable").astype(np.uint32)
        self._write(
            "token_index", {"start": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), "position": position}
        )

    def _write_by_token(self):
        size = 8 * (self.N + 1) + self.Z * (self._feature.itemsize + 2)
        self.by_token = size < BY_TOKEN_BYTES if self.by_token is None else self.by_token
        if self.by_token:
            self._write(
                "by_token", {"start": self._start, "feature": self._feature, "value": self._value.view(np.float16)}
            )

    def _buckets(self, position_bits: int) -> list[tuple[int, int]]:
        """Feature ranges whose firings fit the budget, each at least one feature."""
        ends = np.concatenate([[0], np.cumsum(self.n)])
        buckets, lo = [], 0
        while lo < self.F:
            hi = int(np.searchsorted(ends, ends[lo] + self.ram // 8, side="right")) - 1
            hi = min(max(hi, lo + 1), lo + (1 << (48 - position_bits)), self.F)
            buckets.append((lo, hi))
            lo = hi
        return buckets

    def _write_codes(self, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
        """codes.safetensors; returns positions and value bits in its order."""
        position_bits = bit_width(self.N)
        position = self.scratch("position", np.uint32, self.Z)
        value = self.scratch("codes", np.uint16, self.Z)
        shift = np.uint64(16 + position_bits)
        done = 0
        buckets = self._buckets(position_bits)
        # token ranges of about one block of firings each
        cuts = np.searchsorted(self._start, np.arange(0, self.Z, BLOCK_FIRINGS), side="right") - 1
        cuts = np.unique(np.concatenate([cuts, [self.N]]))
        for lo, hi in buckets:
            keys = np.empty(int(self.n[lo:hi].sum()), np.uint64)
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
        self.code_start = np.concatenate([[0], np.cumsum(self.n)]).astype(np.int64)
        self._write("codes", {"start": self.code_start, "position": position, "value": value.view(np.float16)})
        return position, value

    # geometry

    def _geometry(self) -> dict[str, np.ndarray]:
        """Norms and cosines of the rows; writes neighbours.safetensors where the product is small enough."""
        columns, dec_FD, enc_FD = weight_columns(self.sae)
        largest, tables = neighbours(dec_FD, enc_FD, self.signed)
        if tables:
            self._write("neighbours", tables)
        return columns | largest

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
        dead = int((self.n == 0).sum())
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
            "Z": self.Z,
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
    from saekit.device import resolve_device
    from saekit.encoding import encode_store
    from saekit.provenance import find_model, find_site, find_store
    from saekit.sae import SAE

    o = IndexOptions(**options)
    sae = sae if isinstance(sae, SAE) else SAE.load(sae, str(resolve_device(o.device)))
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
