"""Layout of an activation store: numpy, safetensors and the standard library alone (docs/formats.md).

    manifest = read_manifest(Path("acts/gpt2"))                 # SaekitError if this is not a finished store
    tensors = map_tensors(Path("acts/gpt2/tokens.safetensors")) # name -> array on the mapped file

`write_tensors` writes a safetensors file with its own header, so that equal content gives equal bytes; `atomic_write`
gives a file its name only once it is whole. Both serve the feature index as well. bfloat16, which numpy does not know,
travels as uint16 with the tag "BF16".

N tokens in a store · E rows (stored activations) · S sequences · R runs · D model width · n rows of a shard
"""

import fcntl
import hashlib
import json
import math
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from saekit.errors import SaekitError

FORMAT, VERSION = "saekit-activations", 1
MANIFEST, TOKENS, STATISTICS, DOCUMENTS, STATE = (
    "manifest.json",
    "tokens.safetensors",
    "statistics.safetensors",
    "documents.jsonl",
    "state",
)
PAGE = 4096
"""`activations` start at a multiple of this many bytes in their file."""

TAGS = {
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "F32": np.float32,
    "I32": np.int32,
    "U32": np.uint32,
    "BF16": np.uint16,
    "F16": np.float16,
    "I16": np.int16,
    "U16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""safetensors dtype tag -> numpy dtype that holds its bits."""
_TAG_OF = {np.dtype(t): tag for tag, t in TAGS.items() if tag != "BF16"}

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Store dtype -> safetensors tag."""

HISTOGRAM_BINS = 256
HISTOGRAM_EDGES = np.array([2.0 ** (i / 8 - 16) for i in range(HISTOGRAM_BINS + 1)])
"""Bin i of `norm_histogram` counts norms in [edge i, edge i+1); the first and the last take what lies outside."""

_SITE = re.compile(r"[A-Za-z0-9_.]+")


# Bytes


def canonical_json(value) -> bytes:
    """Keys sorted, no white space, UTF-8: the form that fingerprints are taken of. NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pretty_json(value) -> bytes:
    """Indented form for files that people read; key order as given, so equal values give equal bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def fingerprint(manifest: Mapping) -> str:
    """`sha256:…` of the manifest without its own `fingerprint` key."""
    return (
        "sha256:"
        + hashlib.sha256(canonical_json({k: v for k, v in manifest.items() if k != "fingerprint"})).hexdigest()
    )


def sha256_file(path: Path, read: Callable[[int], object] | None = None) -> str:
    """Checksum of a file; `read` is told the bytes of each block."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 23):
            digest.update(block)
            if read is not None:
                read(len(block))
    return digest.hexdigest()


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write `content` (bytes, or a function that writes into the open file) under a temporary name in the same folder,
    flush it to the disk, and rename. After a crash the file is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def take_lock(path: Path, folder: Path, doing: str = "written") -> TextIO:
    """An advisory lock on the file `path`, held until the returned handle is closed or the process ends.

    Raises:
        SaekitError: another process holds it; the line names that process and says that `folder` is being written.
    """
    handle = open(path, "a+")  # noqa: SIM115  (open for as long as the lock)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        handle.close()
        raise SaekitError(f"{folder} is being {doing} by {owner}; wait for it, or stop it") from None
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def sync_folder(path: Path) -> None:
    """Make renames and removals in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Tensors


class Entry(NamedTuple):
    """One tensor of a safetensors file."""

    tag: str
    """F64, I64, F32, BF16 …"""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    end: int


class Joined(NamedTuple):
    """A one-dimensional tensor that is written piece after piece and never held whole."""

    dtype: np.dtype
    length: int
    pieces: Callable[[], Iterable[np.ndarray]]
    """Arrays of that dtype; a function, because a file may be written twice."""


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray | tuple[np.ndarray, str] | Joined], *, align: str | None = None
) -> dict:
    """Write a safetensors file atomically and return `{"bytes": …, "sha256": …}`.

    Args:
        tensors: name -> array, (uint16 array, "BF16"), or `Joined`.
        align: name of the tensor that shall start at a multiple of 4096 bytes; without it data start at a multiple of 8.

    Data stand by falling item size and then in the order of `tensors`, without gaps; the header is compact JSON in the order of the
    data, padded with spaces, with the one metadata key `"saekit": "1"`. Equal tensors in equal order give equal bytes.
    """
    arrays: dict[str, tuple[Joined, str, list[int]]] = {}
    for name, value in tensors.items():
        if isinstance(value, Joined):
            arrays[name] = value, _TAG_OF[value.dtype], [value.length]
            continue
        array, tag = value if isinstance(value, tuple) else (value, _TAG_OF[value.dtype])
        assert array.dtype == TAGS[tag], f"{name}: {array.dtype} cannot carry {tag}"
        arrays[name] = Joined(array.dtype, array.size, lambda array=array: [array]), tag, list(array.shape)
    # sorted() is stable: tensors of one item size keep the order they were given in.
    order = sorted(arrays, key=lambda name: -arrays[name][0].dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"saekit": "1"}}
    offset = aligned = 0
    for name in order:
        joined, tag, shape = arrays[name]
        aligned = offset if name == align else aligned
        end = offset + joined.length * joined.dtype.itemsize
        header[name] = {"dtype": tag, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    unit = PAGE if align else 8
    text += b" " * (-(8 + len(text) + aligned) % unit)
    digest, size = hashlib.sha256(), 0

    def parts() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text))
        yield text
        for name in order:
            joined, written = arrays[name][0], 0
            for piece in joined.pieces():
                assert piece.dtype == joined.dtype, f"{name}: {piece.dtype}, not {joined.dtype}"
                written += piece.size
                yield _bytes_of(piece)
            assert written == joined.length, f"{name}: {written} items, not {joined.length}"

    def write(f: BinaryIO):
        nonlocal size
        for part in parts():
            view = memoryview(part)
            # Pieces of 4 MiB are hashed while they are still in the cache.
            for i in range(0, len(view), 1 << 22):
                piece = view[i : i + (1 << 22)]
                digest.update(piece)
                f.write(piece)
            size += len(view)

    atomic_write(path, write)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bytes_of(array: np.ndarray) -> memoryview:
    assert array.dtype.byteorder in "=|<", "stores are little-endian"
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file, in the order of their data, without reading the data.

    Raises:
        SaekitError: the file is missing or its header is damaged.
    """
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            size = os.fstat(f.fileno()).st_size
            if not 2 <= length <= size - 8:
                raise ValueError("header length")
            header = json.loads(f.read(length))
        entries = {}
        for name, v in header.items():
            if name == "__metadata__":
                continue
            first, last = v["data_offsets"]
            entry = Entry(v["dtype"], tuple(v["shape"]), 8 + length + first, 8 + length + last)
            if entry.tag not in TAGS:
                raise ValueError("dtype")
            if not 8 + length <= entry.start <= entry.end <= size:
                raise ValueError("offsets")
            if math.prod(entry.shape) * np.dtype(TAGS[entry.tag]).itemsize != last - first:
                raise ValueError("shape")
            entries[name] = entry
    except FileNotFoundError:
        raise SaekitError(f"no such file: {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise SaekitError(f"{path} is not a whole safetensors file; restore it or make it again") from None
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """name -> read-only array on the mapped file (BF16 as uint16; `read_header(path)[name].tag` tells it from U16)."""
    entries = read_header(path)
    data = np.memmap(path, mode="r", dtype=np.uint8)
    return {
        # An empty slice at the very end of the file cannot be viewed as a wider type.
        name: (data[e.start : e.end].view(TAGS[e.tag]) if e.end > e.start else np.zeros(0, TAGS[e.tag])).reshape(
            e.shape
        )
        for name, e in entries.items()
    }


def to_float32(array: np.ndarray) -> np.ndarray:
    """Stored values (float16, float32, or bfloat16 as uint16) as float32; exact."""
    if array.dtype == np.uint16:
        bits = array.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return array.astype(np.float32)


# Token table


def token_dtype(vocab_size: int) -> type:
    """U16 where every id fits, else U32."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True, eq=False)
class TokenTable:
    """What the model saw: every position, and which of them have a row.

    A run is a stretch of consecutive tokens of one document inside one sequence. An inserted BOS or separator belongs to
    no document; it is counted to the run before it (the first run, if there is none before it).
    """

    token: np.ndarray
    """(N) uint16 or uint32, ids in the order in which the model saw them, dropped ones included."""
    stored: np.ndarray
    """(N) bool; row r of the store is the r-th true entry."""
    seq_start: np.ndarray
    """(S+1) int64, first token of each sequence, and N."""
    run_start: np.ndarray
    """(R) int64, first token of each run, ascending."""
    run_doc: np.ndarray
    """(R) int64, number of its document."""
    run_position: np.ndarray
    """(R) int64, position of the run's first token in its document."""

    def __post_init__(self):
        assert self.token.dtype in (np.uint16, np.uint32) and self.stored.dtype == np.bool_
        for name in ("seq_start", "run_start", "run_doc", "run_position"):
            assert getattr(self, name).dtype == np.int64, f"{name} is {getattr(self, name).dtype}, not int64"
        assert len(self.token) == len(self.stored) == self.seq_start[-1] and self.seq_start[0] == 0
        assert len(self.run_start) == len(self.run_doc) == len(self.run_position)

    @property
    def n_tokens(self) -> int:
        return len(self.token)

    @property
    def n_sequences(self) -> int:
        return len(self.seq_start) - 1

    def seq_of(self, position):
        """Sequence of each token position (int or array), int64."""
        return np.searchsorted(self.seq_start, position, side="right") - 1

    def position_in_seq(self, position):
        """How many tokens of its sequence come before it; 0 is the first, BOS included."""
        return position - self.seq_start[self.seq_of(position)]

    def doc_of(self, position):
        """Number of the document that each token position belongs to."""
        return self.run_doc[self._run_of(position)]

    def position_in_doc(self, position):
        """How many tokens of its document come before it."""
        run = self._run_of(position)
        return self.run_position[run] + position - self.run_start[run]

    def _run_of(self, position):
        return np.maximum(np.searchsorted(self.run_start, position, side="right") - 1, 0)

    def take(self, sequences: np.ndarray) -> "TokenTable":
        """Some sequences, in the order given, as a table of their own; documents keep their numbers."""
        starts, lengths = self.seq_start[sequences], np.diff(self.seq_start)[sequences]
        seq_start = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(seq_start[-1]) + np.repeat(starts - seq_start[:-1], lengths)
        first, last = (np.searchsorted(self.run_start, x) for x in (starts, starts + lengths))
        before = np.concatenate([[0], np.cumsum(last - first)])
        runs = np.arange(before[-1]) + np.repeat(first - before[:-1], last - first)
        return TokenTable(
            token=self.token[position],
            stored=self.stored[position],
            seq_start=seq_start,
            run_start=self.run_start[runs] + np.repeat(seq_start[:-1] - starts, last - first),
            run_doc=self.run_doc[runs],
            run_position=self.run_position[runs],
        )

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)

    def sequences(self, first: int, last: int) -> "TokenTable":
        """Sequences first to last - 1 as a table of their own; documents keep their numbers."""
        a, b = self.seq_start[first], self.seq_start[last]
        # no run crosses the border of a sequence
        runs = slice(*(np.searchsorted(self.run_start, [a, b])))
        return TokenTable(
            token=self.token[a:b],
            stored=self.stored[a:b],
            seq_start=self.seq_start[first : last + 1] - a,
            run_start=self.run_start[runs] - a,
            run_doc=self.run_doc[runs],
            run_position=self.run_position[runs],
        )


def join_tables(parts: Sequence[TokenTable]) -> dict[str, Joined]:
    """Tensors of the table of several parts, one behind the other, each read when it is written."""
    tokens = np.cumsum([0, *(p.n_tokens for p in parts)])

    def joined(name: str, shift: bool = False, last: bool = True) -> Joined:
        def pieces():
            for i, (part, start) in enumerate(zip(parts, tokens)):
                values = getattr(part, name) + start if shift else getattr(part, name)
                # the end of a part is the start of the next one
                yield values if last or i == len(parts) - 1 else values[:-1]

        length = sum(len(getattr(p, name)) - (not last) for p in parts) + (not last)
        return Joined(getattr(parts[0], name).dtype, length, pieces)

    return {
        "seq_start": joined("seq_start", shift=True, last=False),
        "run_start": joined("run_start", shift=True),
        **{name: joined(name) for name in ("run_doc", "run_position", "token", "stored")},
    }


def tokens_sha256(parts: Iterable[TokenTable]) -> str:
    """Over all ids as little-endian int32: two stores with the same value saw the same tokens."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part.token, dtype="<i4").data)
    return digest.hexdigest()


def read_tokens(path: Path) -> TokenTable:
    """Token table on the mapped `tokens.safetensors`."""
    tensors = map_tensors(path)
    missing = [name for name in TokenTable.__dataclass_fields__ if name not in tensors]
    if missing:
        raise SaekitError(f"{path} has no tensor {missing[0]}; restore it or collect again")
    return TokenTable(**{name: tensors[name] for name in TokenTable.__dataclass_fields__})


# Sums of a shard


class Sums(NamedTuple):
    """What an activation file holds beside its rows; all float64 from the stored, rounded values."""

    sum: np.ndarray
    """(D), rows that are not outliers."""
    sum_squares: np.ndarray
    """(D), the same rows."""
    norm_moments: np.ndarray
    """(4): count, sum of norms, sum of squared norms of the same rows; largest norm of all rows."""
    norm_histogram: np.ndarray
    """(256) int64, all rows."""
    outlier_rows: np.ndarray
    """(m) int32, ascending, counted from the first row of the shard."""


def shard_sums(rows_nD: np.ndarray, norm_limit: float | None) -> Sums:
    """Sums of the rows of one shard at one site; a row is an outlier if its norm exceeds `norm_limit` (None = none is).

    Blocks of fixed size on one thread, so the result depends on neither the number of threads nor the batch size.
    """
    n, d = rows_nD.shape
    total, squares, moments = np.zeros(d), np.zeros(d), np.zeros(4)
    histogram, outliers = np.zeros(HISTOGRAM_BINS, np.int64), []
    # 64k values in float64 stay in the second-level cache.
    block = max(1, 65536 // d)
    for start in range(0, n, block):
        x = to_float32(rows_nD[start : start + block]).astype(np.float64)
        x2 = x * x
        squared = x2.sum(1)
        norms = np.sqrt(squared)
        histogram += norm_histogram(norms)
        moments[3] = max(moments[3], norms.max())
        if norm_limit is not None and moments[3] > norm_limit:
            out = norms > norm_limit
            outliers.append(start + np.flatnonzero(out))
            x, x2, norms, squared = x[~out], x2[~out], norms[~out], squared[~out]
        total += x.sum(0)
        squares += x2.sum(0)
        moments[:3] += len(norms), norms.sum(), squared.sum()
    rows = np.concatenate(outliers) if outliers else np.zeros(0)
    return Sums(total, squares, moments, histogram, rows.astype(np.int32))


def norm_histogram(norms: np.ndarray) -> np.ndarray:
    """(256) int64 counts of norms in eighth-octave bins from 2^-16 to 2^16."""
    bins = np.searchsorted(HISTOGRAM_EDGES, norms, side="right") - 1
    return np.bincount(np.clip(bins, 0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)


def row_norms(rows_nD: np.ndarray) -> np.ndarray:
    """(n) float64 norms of stored rows, in blocks: a wide site in double would take gigabytes."""
    n, d = rows_nD.shape
    norms, block = np.empty(n), max(1, 65536 // d)
    for start in range(0, n, block):
        x = to_float32(rows_nD[start : start + block]).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            norms[start : start + block] = np.sqrt((x * x).sum(1))
    return norms


def histogram_quantile(histogram: np.ndarray, q: float) -> float:
    """Norm below which the share q of the rows lies, interpolated on the logarithm inside its bin (error below 9 %)."""
    cumulative = np.cumsum(histogram)
    target = q * cumulative[-1]
    i = int(np.searchsorted(cumulative, target, side="left"))
    inside = (target - (cumulative[i] - histogram[i])) / max(1, histogram[i])
    return float(2.0 ** ((i + inside) / 8 - 16))


def merge_sums(paths: Iterable[Path]) -> Sums:
    """Sums of several activation files of one site, added in the order given; outlier rows counted through all of them."""
    # Of one item, and so of any width after the first addition.
    total, squares, histogram = np.zeros(1), np.zeros(1), np.zeros(1, np.int64)
    moments, outliers, first_row = np.zeros(4), [], 0
    for path in paths:
        t = map_tensors(path)
        total, squares, histogram = total + t["sum"], squares + t["sum_squares"], histogram + t["norm_histogram"]
        moments[:3] += t["norm_moments"][:3]
        moments[3] = max(moments[3], t["norm_moments"][3])
        outliers.append(t["outlier_rows"].astype(np.int64) + first_row)
        first_row += len(t["activations"])
    return Sums(total, squares, moments, histogram, np.concatenate(outliers))


def mean_and_variance(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D) and population variance (D) of the rows that are not outliers."""
    count = max(1.0, sums.norm_moments[0])
    mean = sums.sum / count
    return mean, np.maximum(sums.sum_squares / count - mean * mean, 0.0)


def statistics_tensors(merged: Mapping[str, Sums]) -> dict[str, np.ndarray]:
    """What `statistics.safetensors` holds."""
    tensors = {}
    for site, sums in merged.items():
        tensors[f"{site}.mean"], tensors[f"{site}.variance"] = mean_and_variance(sums)
    return tensors


def site_summary(sums: Sums) -> dict:
    """The numbers of a site's manifest entry that are counted; outliers are left out of all but the median and the largest."""
    count, total, squares, largest = (float(v) for v in sums.norm_moments)
    mean, variance = mean_and_variance(sums)
    deviation = math.sqrt(variance.sum())
    return {
        "outlier_rows": len(sums.outlier_rows),
        "mean_norm": total / max(1.0, count),
        "rms_norm": math.sqrt(squares / max(1.0, count)),
        "median_norm": histogram_quantile(sums.norm_histogram, 0.5),
        "max_norm": largest,
        "mean_to_deviation": math.sqrt(float(mean @ mean)) / deviation if deviation > 0 else None,
    }


# Manifest


def is_site_name(name: str) -> bool:
    """Site names are folder names, so only letters, digits, `_` and `.` are allowed, and never `..`."""
    return (
        bool(_SITE.fullmatch(name)) and not name.startswith(".") and name not in (STATE, MANIFEST, TOKENS, STATISTICS)
    )


def shard_name(site: str, i: int) -> str:
    return f"{site}/shard-{i:05d}.safetensors"


def human_bytes(n: float) -> str:
    """`6 MiB`, `3.8 GiB`."""
    power = 0
    while n >= 1000 and power < 4:
        n, power = n / 1024, power + 1
    return f"{n:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def read_manifest(folder: Path) -> dict:
    """Manifest of a finished store; its files are not looked at.

    Raises:
        SaekitError: not there, not a store, unfinished, damaged, or of a version that this reader does not know.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise SaekitError(_no_manifest(folder)) from None
    except OSError as error:
        raise SaekitError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    try:
        manifest = json.loads(text)
        line = None
    except json.JSONDecodeError as error:
        line = error.lineno
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
    if line is not None:
        raise SaekitError(f"{path} is not valid JSON (line {line}); restore it or collect again")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SaekitError(f"{path} does not describe an activation store; choose another folder")
    version = manifest.get("format_version")
    if version != VERSION:
        advice = "upgrade saekit" if isinstance(version, int) and version > VERSION else "collect again"
        raise SaekitError(f"{folder} has store format {version}, this saekit reads {VERSION}; {advice}")
    needed = {
        "fingerprint": str, "model": dict, "dtype": str, "sites": dict, "sequences": int, "tokens": int, "rows": int,
        "shards": list, "token_table": dict, "statistics": dict,
    }  # fmt: skip
    for key, kind in needed.items():
        if not isinstance(manifest.get(key), kind):
            raise SaekitError(f"{path} has no valid {key!r}; restore it or collect again")
    if manifest["dtype"] not in DTYPES:
        raise SaekitError(f"{path} names the dtype {manifest['dtype']}; known are bfloat16, float16 and float32")
    if bad := [s for s in manifest["sites"] if not is_site_name(s)]:
        raise SaekitError(
            f"{path} names the site {bad[0]!r}, which cannot be a folder name; restore it or collect again"
        )
    return manifest


def _no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"no such store: {folder}"
    if not (folder / STATE / "plan.json").is_file():
        return f"{folder} is not an activation store (no {MANIFEST}); saekit collect makes one"
    parts = sorted((folder / STATE).glob("tokens-*.json"))
    if not parts or not json.loads(parts[-1].read_bytes())["last"]:
        return f"{folder} is unfinished (its text is not read to the end); run its collect command again"
    done = len(list((folder / STATE).glob("[0-9]*.json")))
    return (
        f"{folder} is unfinished ({done} of {len(parts)} shards); run its collect command again, "
        "or with --finish to use what is there"
    )


def read_plan(folder: Path) -> dict | None:
    """The plan of an unfinished store; None if there is none."""
    path = folder / STATE / "plan.json"
    return json.loads(path.read_bytes()) if path.is_file() else None


def files_of(manifest: Mapping) -> dict[str, dict]:
    """Every file that the manifest answers for: name in the folder -> `{"bytes": …, "sha256": …}`."""
    files = {TOKENS: manifest["token_table"], STATISTICS: manifest["statistics"]}
    if manifest.get("documents"):
        files[DOCUMENTS] = manifest["documents"]
    for shard in manifest["shards"]:
        files |= shard["files"]
    return files


def size_problem(folder: Path, name: str, expected: int) -> str | None:
    """What is wrong with the size of one file, with the remedy; None if nothing is."""
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is missing; {remedy(folder, name)}"
    if size != expected:
        return f"{name} has {size:,} bytes, manifest says {expected:,}; {remedy(folder, name)}"
    return None


def remedy(folder: Path, name: str) -> str:
    """What to do about a damaged file."""
    if name == STATISTICS or "/" in name:
        return f"saekit check {folder} --repair recomputes it"
    return "restore it or collect again"
