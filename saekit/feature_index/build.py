"""The feature index, built: a consumer of `encode_store` that writes `SAE/index/` (format version 1).

    builder = IndexBuilder(sae, store, "saes/x", vocab=vocab_bytes(tokenizer, V), unembedding=lm.unembedding())
    encode_store(sae, store, site, [builder], rows=builder.rows())    # update(chunk) …, finish()

1. The text is encoded in segments; each is committed whole to `index.partial/`, its firings by token and falling magnitude
   (segments.py).
2. They are read once per bucket of features that fits the memory budget; each firing becomes one uint64
   (feature | position | 16 value bits), one plain sort per bucket puts them by feature, then by position.
3. A second pass over these codes, in blocks of features, makes every table: one sort by strength for examples, samples and
   quantiles, one by token for the token statistics.
4. Everything stands in `index.partial/index/` until the manifest is written, last; then that folder becomes `index/`.

The same command goes on behind the last segment of a build that was killed, and ends in the same bytes. Under `torchrun`
the segments are shared out; what follows them is the first process's work.

Values are float16 times 2^value_exponent. The third step is tables.py; what the weights alone say is geometry.py.

N token positions, E of them encoded · S sequences · F features · D width · Z non-zero codes · V vocabulary.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import saekit
from saekit.errors import SaekitError
from saekit.feature_index.format import (
    ABSENT,
    BINS,
    COLUMNS,
    DIRECT,
    FORMAT,
    FORMAT_VERSION,
    PER_SLICE,
    SLICES,
    TOKENS,
    TOP,
    bit_width,
    exponent_of,
    kept_of,
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
from saekit.feature_index.segments import (
    PER_TOKEN,
    SEGMENT_SUFFIXES,
    SEGMENT_TOKENS,
    About,
    OpenSegment,
    Segment,
    feature_dtype,
    open_segment,
    segment_borders,
)
from saekit.feature_index.tables import BLOCK_FIRINGS, Tables, flag_bits
from saekit.feature_index.vocabulary import VocabBytes, vocab_bytes
from saekit.interrupt import Stop
from saekit.progress import Progress
from saekit.store.batches import parse_bytes
from saekit.store.format import (
    Joined,
    atomic_write,
    canonical_json,
    pretty_json,
    sha256_file,
    sync_folder,
    take_lock,
    write_tensors,
)

if TYPE_CHECKING:
    from saekit.config import IndexOptions
    from saekit.ranks import Ranks

BY_TOKEN_BYTES = 8 << 30
RAM = 1 << 30
LEAST_CAP = 100
"""Firings that samples of ten slices and twenty examples are drawn from."""


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
        cap: firings kept in `codes` of a feature that has more, an even sample; all tables stay exact. None = all.
        seed: of the samples.
        plan: what the codes depend on, as JSON; a build of the same plan that was cut off there goes on. None = start over.
        rank: of several processes that build together, of which the first is 0 and writes everything but segments.

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
        cap: int | None = None,
        seed: int = 0,
        plan: dict | None = None,
        rank: int = 0,
    ):
        if cap is not None and cap < LEAST_CAP:
            raise SaekitError(f"a cap of {cap:,} firings leaves too little to look at; pass {LEAST_CAP} or more")
        self.sae, self.store, self.site = sae, store, site or sae.site
        self.F, self.D = sae.W_dec.shape
        self.seed, self.by_token, self.cap, self.unembedding = seed, by_token, cap, unembedding
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
        self.out = self.partial / "index"
        self._lock = None
        if rank == 0:
            self._begin(plan)
        elif self._plan() != plan:
            raise SaekitError(f"rank {rank} does not see {self.partial}/plan.json; all ranks need the same folder")
        self.borders = segment_borders(self.seq_start)
        self.n = np.zeros(self.F, np.int64)
        self.Z = 0
        self.dec_norm_F = torch.linalg.vector_norm(sae.W_dec.detach().float(), dim=1).cpu().numpy()
        self._about = About(
            self.F, self.seq_start, self.dec_norm_F, self.signed, sae.config.get("variant"), self.folder
        )
        self._open: Segment | None = None

    def rows(self, outliers: str = "skip") -> np.ndarray:
        """Row numbers of the store that belong to the indexed sequences, ascending."""
        rows = self.store.valid_rows([self.site], split="all", outliers=outliers)
        return rows[rows < self.store.seq_rows()[self.S]]

    def _plan(self) -> dict | None:
        path = self.partial / "plan.json"
        return json.loads(path.read_bytes()) if path.is_file() else None

    def _begin(self, plan: dict | None):
        index, old = self.folder / "index", self.folder / "index.old"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir(exist_ok=True)
        self._lock = take_lock(self.partial / "lock", self.folder, "indexed")
        if old.is_dir() and not index.is_dir():
            # killed between the two renames of _publish: the older index is the only whole one
            old.rename(index)
        was = self._plan()
        goes_on = plan is not None and was == plan
        if plan and was and not goes_on:
            key = next(key for key in {**plan, **was} if plan.get(key) != was.get(key))
            Progress.say(
                f"{self.folder}: the unfinished index there has another {key} ({was.get(key)}, now {plan.get(key)}); starting over"
            )
        shutil.rmtree(self.out, ignore_errors=True)
        for path in self.partial.iterdir():
            kept = path.name == "plan.json" or path.suffix in SEGMENT_SUFFIXES
            if path.name != "lock" and not (goes_on and kept):
                path.unlink()
        self.out.mkdir()
        if plan is not None and not goes_on:
            atomic_write(self.partial / "plan.json", pretty_json(plan))

    def close(self):
        """Lets go of the folder; what is committed stays."""
        if self._open is not None:
            self._open.close()
        if self._lock is not None:
            self._lock.close()

    def scratch(self, name: str, dtype, size: int) -> np.ndarray:
        """A zeroed array on a file of its own, so that the system may write it out when memory is short."""
        if size == 0:
            return np.zeros(0, dtype)
        return np.memmap(self.partial / f"{name}.scratch", dtype, "w+", shape=(size,))

    # first pass

    def update(self, chunk):
        """Takes rows in text order, and commits segments as they are passed; rows beyond the indexed sequences are left out."""
        positions = np.asarray(chunk.positions)
        ends = np.searchsorted(positions, self.borders)
        for i, (a, b) in enumerate(pairwise(ends.tolist())):
            if a == b:
                continue
            if self._open is None or self._open.number != i:
                before = self._finish_open()
                self._open = self.segment(i, before)
            self._open.add(positions[a:b], chunk.codes.rows(a, b), chunk.x_BD[a:b], chunk.xhat_BD[a:b])

    def _finish_open(self) -> int:
        """Commits the segment in hand; returns the rows up to its end."""
        if self._open is None:
            return 0
        self._open.finish()
        return self._open.rows

    def segment(self, number: int, before: int) -> Segment:
        """A consumer of the rows of one segment, which `before` rows of the text precede."""
        lo, hi = self.borders[number : number + 2].tolist()
        return Segment(self.partial, number, lo, hi, before, self._about)

    def missing(self) -> list[int]:
        """Numbers of the segments that are not committed."""
        lengths = np.diff(self.borders).tolist()
        return [i for i, n in enumerate(lengths) if open_segment(self.partial, i, n, self.F) is None]

    # everything after it

    @torch.no_grad()
    def finish(self):
        """Writes every file, the manifest last, and gives the folder its name."""
        self._finish_open()
        for i in self.missing():
            self.segment(i, self.N).finish()
        self._gather()
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

    def _gather(self):
        """Counts and per-token arrays of all segments, and the exponent."""
        self._segments: list[OpenSegment] = []
        self._start = self.scratch("start", np.int64, self.N + 1)
        self.encoded = self.scratch("encoded", np.bool_, self.N)
        self.early = self.scratch("early", np.bool_, self.N)
        self._per_token = {name: self.scratch(name, np.float32, self.N) for name in PER_TOKEN}
        # first firing of each segment
        self._first: list[int] = []
        largest = np.zeros(2)
        for i, (lo, hi) in enumerate(pairwise(self.borders.tolist())):
            segment = open_segment(self.partial, i, hi - lo, self.F)
            assert segment is not None, i
            found = segment.tensors
            self._segments.append(segment)
            self._first.append(self.Z)
            self._start[lo + 1 : hi + 1] = np.cumsum(found["count"], dtype=np.int64) + self.Z
            self.Z += len(segment.value)
            self.n += found["n"]
            self.encoded[lo:hi], self.early[lo:hi] = found["encoded"], found["early"]
            for name in PER_TOKEN:
                self._per_token[name][lo:hi] = found[name]
            largest = np.maximum(largest, found["largest"])
        assert int(self._start[-1]) == self.Z == self.n.sum()
        # that of the first tokens, or of all where that overflows
        self.value_exponent = exponent_of(largest[1])
        if quantise(largest[:1].astype(np.float32), self.value_exponent)[1]:
            self.value_exponent = exponent_of(largest[0])

    def _write(self, name: str, tensors: Mapping[str, np.ndarray | Joined]):
        # the widest tensor comes first in the file; aligning it pads the header to a multiple of 64 bytes
        first = max(tensors, key=lambda k: tensors[k].dtype.itemsize)
        file = f"{name}.safetensors"
        self.files[file] = write_tensors(self.out / file, tensors, align=first)

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
        dtype = np.dtype(feature_dtype(self.F))
        size = 8 * (self.N + 1) + self.Z * (dtype.itemsize + 2)
        self.by_token = size < BY_TOKEN_BYTES if self.by_token is None else self.by_token
        if not self.by_token:
            return

        def values() -> Iterator[np.ndarray]:
            for segment in self._segments:
                z = len(segment.value)
                for a in range(0, z, BLOCK_FIRINGS):
                    yield segment.block(a, min(a + BLOCK_FIRINGS, z), self.value_exponent)[1].view(np.float16)

        self._write(
            "by_token",
            {
                "start": self._start,
                "feature": Joined(dtype, self.Z, lambda: (segment.feature for segment in self._segments)),
                "value": Joined(np.dtype(np.float16), self.Z, values),
            },
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
        # token ranges of about one block of firings each, none across segments
        cuts = np.searchsorted(self._start, np.arange(0, self.Z, BLOCK_FIRINGS), side="right") - 1
        cuts = np.unique(np.concatenate([cuts, self.borders]))
        for lo, hi in buckets:
            keys = np.empty(int(self.n[lo:hi].sum()), np.uint64)
            filled = 0
            for p0, p1 in pairwise(cuts):
                a, b = int(self._start[p0]), int(self._start[p1])
                i = int(np.searchsorted(self.borders, p0, side="right")) - 1
                feature, bits = self._segments[i].block(a - self._first[i], b - self._first[i], self.value_exponent)
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
        kept = self.n if self.cap is None else np.minimum(self.n, self.cap)
        self._write(
            "codes",
            {
                "start": np.concatenate([[0], np.cumsum(kept)]).astype(np.int64),
                "position": Joined(position.dtype, int(kept.sum()), lambda: self._kept(position)),
                "value": Joined(np.dtype(np.float16), int(kept.sum()), lambda: self._kept(value.view(np.float16))),
            },
        )
        return position, value

    def _kept(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """What `codes` keeps of an array in the order of features, in pieces."""
        cap, done = self.cap or self.N, 0
        capped = np.flatnonzero(self.n > cap).tolist()
        for j in capped:
            a, b = self.code_start[j : j + 2].tolist()
            yield array[done:a]
            for lo in range(0, cap, BLOCK_FIRINGS):
                key = (self.seed << 32) + j
                yield array[a + kept_of(b - a, cap, lo, min(lo + BLOCK_FIRINGS, cap), key)]
            done = b
        yield array[done:]

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
            target = self.out / "documents.jsonl"
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
                "cap": self.cap,
                "compute": "fp32",
                "logits": logits,
                "map": {"method": "pca", "seed": None} if "map.safetensors" in self.files else None,
            },
            "warnings": self.warnings,
        }
        atomic_write(self.out / "manifest.json", pretty_json(manifest))

    def _publish(self):
        """Sets an older index aside, renames, and removes what is left over."""
        index, old = self.folder / "index", self.folder / "index.old"
        if old.exists():
            shutil.rmtree(old)
        if index.exists():
            index.rename(old)
        self.out.rename(index)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.partial)
        self.close()


def build_index(sae, store=None, **options) -> FeatureIndex:
    """Index `sae` (an SAE with a folder, or that folder) over `store`; options as in IndexOptions.

    Without a store the one the SAE was trained on is taken. The language model serves token text and logit weights; where
    none was asked for and the store's own is not at hand, the index goes without them and its manifest says so. What a build
    that was cut off has encoded is kept.

    Raises:
        SaekitError: the SAE, store or model do not belong together, or a process of torchrun was lost.
        KeyboardInterrupt, Terminated: Ctrl-C and SIGTERM; the same call continues.
    """
    from saekit.agreement import built, decided
    from saekit.config import IndexOptions
    from saekit.ranks import joined_ranks

    o = IndexOptions(**options)
    with joined_ranks() as ranks:
        builder, before = None, torch.get_num_threads()
        try:
            made = builder = built(ranks, lambda: _prepared(sae, store, o, ranks))
            _encode(made, decided(ranks, made.missing), ranks)
            decided(ranks, lambda: _finish(made))
        finally:
            torch.set_num_threads(before)
            if builder is not None:
                builder.close()
        return open_index(made.folder)


def _prepared(sae, store, o: "IndexOptions", ranks: "Ranks") -> IndexBuilder:
    """The builder, behind the checks, with the threads that its plan names."""
    from saekit.device import environment_of, resolve_device
    from saekit.provenance import find_site, find_store
    from saekit.sae import SAE

    if not isinstance(sae, SAE):
        device = resolve_device(o.device)
        several = device.type == "cuda" and device.index is None and ranks.size > 1
        sae = SAE.load(sae, f"cuda:{ranks.local}" if several else str(device))
    if sae.path is None:
        raise SaekitError("the SAE has no folder for its index yet; save it first: sae.save(folder)")
    store = find_store(sae, store or o.store, force=o.force)
    site = find_site(sae, store, o.site)
    n_sequences = store.table.n_sequences
    if o.tokens is not None:
        n_sequences = min(n_sequences, max(1, int(np.searchsorted(store.table.seq_start, o.tokens))))
    # another number of threads sums in another order: the first start decides
    first = sae.path / "index.partial" / "plan.json"
    threads = json.loads(first.read_bytes())["environment"].get("threads") if first.is_file() else None
    if threads is None and ranks.size > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks.local_size)
    torch.set_num_threads(threads or torch.get_num_threads())
    environment = environment_of(sae.W_enc.device)
    del environment["transformers"]
    plan = {
        "saekit_version": saekit.__version__,
        "sae": sae.config.get("fingerprint"),
        "store": store.fingerprint,
        "site": site,
        "sequences": n_sequences,
        "segment_tokens": SEGMENT_TOKENS,
        "environment": environment,
    }
    # what needs the language model is written by the first process
    vocab, unembedding, reasons = _of_model(store, o) if ranks.rank == 0 else (None, None, [])
    builder = IndexBuilder(
        sae,
        store,
        sae.path,
        site=site,
        n_sequences=n_sequences,
        vocab=vocab,
        unembedding=unembedding,
        by_token=o.by_token,
        ram=None if o.ram is None else parse_bytes(o.ram),
        cap=o.cap,
        seed=o.seed,
        plan=plan,
        rank=ranks.rank,
    )
    builder.warnings += reasons
    return builder


def _of_model(store, o: "IndexOptions") -> tuple[VocabBytes | None, tuple[torch.Tensor, str] | None, list[str]]:
    """Bytes of the tokens, unembedding, and why one of them is missing."""
    from saekit.provenance import find_model

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
    return vocab, unembedding, reasons


def _encode(builder: IndexBuilder, todo: list[int], ranks: "Ranks"):
    """Every rank its share of the segments that are missing."""
    from saekit.agreement import leave
    from saekit.encoding import encode_store

    store, rows = builder.store, builder.rows()
    sequences = np.searchsorted(builder.seq_start, builder.borders)
    first = np.searchsorted(rows, store.seq_rows()[sequences]).tolist()
    if len(todo) < len(first) - 1:
        Progress.say(f"{builder.folder}: {len(first) - 1 - len(todo)} of {len(first) - 1} segments are there, going on")
    mine = todo[ranks.rank :: ranks.size]

    def lost() -> str:
        gone = builder.missing()
        return f"rank {todo.index(gone[0]) % ranks.size} was lost at segment {gone[0]}" if gone else "a rank was lost"

    with Stop() as stop, Progress("index", sum(first[i + 1] - first[i] for i in mine), "tokens") as progress:

        class Pause:
            """Lets a signal end the work between two chunks."""

            def update(self, chunk):
                if stop.signal:
                    left = len(builder.missing())
                    done = f"{len(first) - 1 - left} of {len(first) - 1} segments are encoded"
                    leave(ranks, stop, f"stopped, {done}; the same command continues")

            def finish(self):
                pass

        for i in mine:
            part = rows[first[i] : first[i + 1]]
            segment = builder.segment(i, first[i])
            try:
                encode_store(
                    builder.sae,
                    store,
                    builder.site,
                    [segment, Pause()],
                    rows=part,
                    progress=progress,
                )
            finally:
                segment.close()
    ranks.barrier(lost)


def _finish(builder: IndexBuilder):
    try:
        builder.finish()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped after encoding; the same command continues") from None
