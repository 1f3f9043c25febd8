"""Layout of an activation store, and its check: numpy, safetensors and the standard library alone (docs/formats.md).

    manifest = read_manifest(Path("acts/gpt2"))                 # SaekitError if this is not a finished store
    tensors = map_tensors(Path("acts/gpt2/tokens.safetensors")) # name -> array on the mapped file
    problems = check(Path("acts/gpt2"))                         # [] if all is well

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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from saekit.errors import SaekitError
from saekit.progress import Progress

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


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray | tuple[np.ndarray, str]], *, align: str | None = None
) -> dict:
    """Write a safetensors file atomically and return `{"bytes": …, "sha256": …}`.

    Args:
        tensors: name -> array, or (uint16 array, "BF16").
        align: name of the tensor that shall start at a multiple of 4096 bytes; without it data start at a multiple of 8.

    Data stand by falling item size and then in the order of `tensors`, without gaps; the header is compact JSON in the order of the
    data, padded with spaces, with the one metadata key `"saekit": "1"`. Equal tensors in equal order give equal bytes.
    """
    arrays: dict[str, tuple[np.ndarray, str]] = {}
    for name, value in tensors.items():
        array, tag = value if isinstance(value, tuple) else (value, _TAG_OF[value.dtype])
        assert array.dtype == TAGS[tag], f"{name}: {array.dtype} cannot carry {tag}"
        arrays[name] = (np.ascontiguousarray(array).reshape(array.shape), tag)
    # sorted() is stable: tensors of one item size keep the order they were given in.
    order = sorted(arrays, key=lambda name: -arrays[name][0].itemsize)
    header: dict[str, dict] = {"__metadata__": {"saekit": "1"}}
    offset = aligned = 0
    for name in order:
        array, tag = arrays[name]
        aligned = offset if name == align else aligned
        header[name] = {"dtype": tag, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    unit = PAGE if align else 8
    text += b" " * (-(8 + len(text) + aligned) % unit)
    digest, size = hashlib.sha256(), 0

    def write(f: BinaryIO):
        nonlocal size
        for part in [struct.pack("<Q", len(text)), text, *(_bytes_of(arrays[name][0]) for name in order)]:
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
    return array.reshape(-1).view(np.uint8).data


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
        return (array.astype(np.uint32) << 16).view(np.float32)
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

    def tensors(self) -> dict[str, np.ndarray]:
        """In the order in which they stand in `tokens.safetensors`."""
        return {
            name: getattr(self, name)
            for name in ("seq_start", "run_start", "run_doc", "run_position", "token", "stored")
        }

    def sha256(self) -> str:
        """Over all ids as little-endian int32: two stores with the same value saw the same tokens."""
        return hashlib.sha256(np.ascontiguousarray(self.token, dtype="<i4").data).hexdigest()


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
        norms = np.sqrt(x2.sum(1))
        histogram += norm_histogram(norms)
        moments[3] = max(moments[3], norms.max())
        if norm_limit is not None and moments[3] > norm_limit:
            out = norms > norm_limit
            outliers.append(start + np.flatnonzero(out))
            x, x2, norms = x[~out], x2[~out], norms[~out]
        total += x.sum(0)
        squares += x2.sum(0)
        moments[:3] += len(norms), norms.sum(), x2.sum()
    rows = np.concatenate(outliers) if outliers else np.zeros(0)
    return Sums(total, squares, moments, histogram, rows.astype(np.int32))


def norm_histogram(norms: np.ndarray) -> np.ndarray:
    """(256) int64 counts of norms in eighth-octave bins from 2^-16 to 2^16."""
    bins = np.searchsorted(HISTOGRAM_EDGES, norms, side="right") - 1
    return np.bincount(np.clip(bins, 0, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)


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
    text = folder / STATE / "text.json"
    done = len(list((folder / STATE).glob("[0-9]*.json")))
    progress = (
        f"{done} of {json.loads(text.read_bytes())['shards']} shards" if text.is_file() else "its text is not read yet"
    )
    return f"{folder} is unfinished ({progress}); run its collect command again"


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
        return f"{name} is missing; restore it or collect again"
    if size != expected:
        return f"{name} has {size:,} bytes, manifest says {expected:,}; restore it or collect again"
    return None


# Check


def check(path: str | Path, quick: bool = False) -> list[str]:
    """Problems of a store, one line each, [] if there are none. Needs no model.

    Manifest, sizes and headers; unless `quick` also checksums, token table, finite values, sums, outliers and statistics,
    all computed again from the stored rows.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except SaekitError as error:
        return [str(error)]
    problems = []
    if fingerprint(manifest) != manifest["fingerprint"]:
        problems.append(f"{folder / MANIFEST} was changed (its fingerprint differs); restore it or collect again")
    damaged = set()
    with Progress("check", sum(f["bytes"] for f in files_of(manifest).values()) >> 20, "MiB") as progress:
        for name, record in files_of(manifest).items():
            problem = size_problem(folder, name, record["bytes"])
            if problem is None and not quick and sha256_file(folder / name) != record["sha256"]:
                problem = f"{_human_name(name)} is damaged (sha256 differs); restore it or collect again"
            if problem:
                problems.append(problem)
                damaged.add(name)
            progress.advance(record["bytes"] >> 20)
    # A file that is known to be damaged is not looked into: it would be named twice.
    sites = manifest["sites"]
    for i, shard in enumerate(manifest["shards"]):
        for site in sites:
            name = shard_name(site, i)
            if name not in shard["files"]:
                problems.append(f"{folder / MANIFEST} does not list {name}; restore it or collect again")
                damaged.add(name)
            elif name not in damaged:
                problem = _shard_problem(folder / name, sites[site], shard["rows"], DTYPES[manifest["dtype"]], quick)
                if problem:
                    problems.append(f"{name}: {problem}; restore it or collect again")
                    damaged.add(name)
    if TOKENS not in damaged:
        problems += [f"{TOKENS}: {p}; restore it or collect again" for p in _token_problems(folder, manifest, quick)]
    if STATISTICS not in damaged:
        problems += [
            f"{STATISTICS}: {p}; restore it or collect again"
            for p in _statistics_problems(folder, manifest, damaged, quick)
        ]
    return problems


def _human_name(name: str) -> str:
    site, _, shard = name.partition("/")
    return f"shard {int(shard[6:-12])} of {site}" if shard else name


def _shard_problem(path: Path, site: Mapping, n: int, tag: str, quick: bool) -> str | None:
    d = site["d"]
    expected = {
        "activations": (tag, (n, d)),
        "sum": ("F64", (d,)),
        "sum_squares": ("F64", (d,)),
        "norm_moments": ("F64", (4,)),
        "norm_histogram": ("I64", (HISTOGRAM_BINS,)),
        "outlier_rows": ("I32", None),
    }
    problem = _header_problem(path, expected)
    if problem or quick:
        return problem
    stored = map_tensors(path)
    with np.errstate(invalid="ignore", over="ignore"):
        again = shard_sums(stored["activations"], site["norm_limit"])
    if not np.isfinite(again.norm_moments[3]) or not np.isfinite(again.sum).all():
        return "NaN or infinity among the activations"
    for name, value in again._asdict().items():
        # The last bit of a norm may differ from one processor to another.
        if value.shape != stored[name].shape or not np.allclose(value, stored[name], rtol=1e-9, atol=1e-9):
            return f"{name} does not belong to the activations"
    return None


def _header_problem(path: Path, expected: Mapping[str, tuple[str, tuple | None]]) -> str | None:
    try:
        entries = read_header(path)
    except SaekitError:
        return "not a whole safetensors file"
    if set(entries) != set(expected):
        return f"holds {', '.join(sorted(entries))}, expected {', '.join(sorted(expected))}"
    for name, (tag, shape) in expected.items():
        e = entries[name]
        if e.tag not in tag.split("|") or (len(e.shape) != 1 if shape is None else e.shape != shape):
            return f"{name} is {e.tag} {list(e.shape)}, expected {tag} {list(shape) if shape else '[m]'}"
    return None


def _token_problems(folder: Path, manifest: Mapping, quick: bool) -> list[str]:
    path, N, S = folder / TOKENS, manifest["tokens"], manifest["sequences"]
    expected = {
        "token": ("U16|U32", (N,)),
        "stored": ("BOOL", (N,)),
        "seq_start": ("I64", (S + 1,)),
        **dict.fromkeys(("run_start", "run_doc", "run_position"), ("I64", None)),
    }
    problem = _header_problem(path, expected)
    if problem or quick:
        return [problem] if problem else []
    t = map_tensors(path)
    seq_start, run_start = t["seq_start"], t["run_start"]
    problems = []
    if seq_start[0] != 0 or seq_start[-1] != N or (np.diff(seq_start) <= 0).any():
        return ["seq_start does not cut the tokens into sequences"]
    if (np.diff(run_start) <= 0).any() or not len(run_start) == len(t["run_doc"]) == len(t["run_position"]):
        return ["the runs are not in order"]
    if int(t["stored"].sum()) != manifest["rows"]:
        problems.append(
            f"{int(t['stored'].sum()):,} tokens are marked as stored, the manifest counts {manifest['rows']:,} rows"
        )
    if TokenTable(**t).sha256() != manifest["text"]["tokens_sha256"]:
        problems.append("tokens_sha256 of the manifest differs")
    rows_before = np.concatenate([[0], np.cumsum(t["stored"], dtype=np.int64)])[seq_start]
    end = 0
    for i, shard in enumerate(manifest["shards"]):
        a, b = shard["sequences"]
        if a != end or not a < b <= S:
            problems.append(f"shard {i} holds sequences {a} to {b}, expected them to begin at {end}")
            break
        rows, tokens = int(rows_before[b] - rows_before[a]), int(seq_start[b] - seq_start[a])
        if (rows, tokens) != (shard["rows"], shard["tokens"]):
            problems.append(
                f"shard {i} has {tokens:,} tokens and {rows:,} rows, the manifest says {shard['tokens']:,} and {shard['rows']:,}"
            )
        end = b
    else:
        if end != S:
            problems.append(f"the shards end at sequence {end} of {S}")
    return problems


def _statistics_problems(folder: Path, manifest: Mapping, damaged: set[str], quick: bool) -> list[str]:
    sites = manifest["sites"]
    expected = {f"{site}.{what}": ("F64", (sites[site]["d"],)) for site in sites for what in ("mean", "variance")}
    problem = _header_problem(folder / STATISTICS, expected)
    if problem or quick:
        return [problem] if problem else []
    stored, problems = map_tensors(folder / STATISTICS), []
    for site, entry in sites.items():
        names = [shard_name(site, i) for i in range(len(manifest["shards"]))]
        if damaged.intersection(names):
            continue
        merged = merge_sums(folder / name for name in names)
        mean, variance = mean_and_variance(merged)
        if not np.allclose(mean, stored[f"{site}.mean"], rtol=1e-9, atol=1e-12) or not np.allclose(
            variance, stored[f"{site}.variance"], rtol=1e-9, atol=1e-12
        ):
            problems.append(f"mean and variance of {site} are not those of its shards")
        for key, value in site_summary(merged).items():
            if value != entry[key] and not (value and entry[key] and math.isclose(value, entry[key], rel_tol=1e-9)):
                problems.append(f"the manifest says {key} {entry[key]} of {site}, its shards {value}")
    return problems
