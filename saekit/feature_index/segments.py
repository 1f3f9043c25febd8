"""The first pass of the builder: what fires where, in segments of whole sequences that are written once and kept.

    segment = Segment(folder, 3, lo, hi, before, about)
    encode_store(sae, store, site, [segment], rows=rows)     # update(chunk) …, finish() commits it
    segment = open_segment(folder, 3, hi - lo, F)            # None if it is not whole
    feature, bits = segment.block(0, 1000, exponent)

A segment is a function of its rows alone, so a killed build goes on behind those that are there, and each of several
processes writes its own. Its raw files hold the firings by token and falling magnitude; a third file, written last, says how
many each token has. Magnitudes are float16 times a power of two that is raised where one overflows; the first is the
smallest that holds the first chunk, so bringing all to one exponent later loses nothing that this exponent can hold.

n tokens of a segment · F features · z its firings.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.feature_index.format import bit_width, exponent_of, quantise
from saekit.store.format import map_tensors, write_tensors

SEGMENT_TOKENS = 1 << 17
"""Tokens of a segment, up to the end of the sequence: what a killed build computes again at most."""
EXPONENT_TOKENS = 65_536
"""The value exponent of an index is chosen from so many tokens."""
SEGMENT_SUFFIXES = (".feature", ".value", ".segment")
PER_TOKEN = ("norm_x", "norm_code", "error")


def segment_borders(seq_start: np.ndarray) -> np.ndarray:
    """First position of each segment, and N."""
    N = int(seq_start[-1])
    cuts = np.searchsorted(seq_start, np.arange(SEGMENT_TOKENS, N, SEGMENT_TOKENS))
    return np.unique(np.concatenate([[0], seq_start[cuts], [N]])).astype(np.int64)


def feature_dtype(F: int) -> type:
    return np.uint16 if F <= 1 << 16 else np.uint32


def _paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    feature, value, segment = (folder / f"{number:05d}{suffix}" for suffix in SEGMENT_SUFFIXES)
    return feature, value, segment


class About(NamedTuple):
    """What all segments share."""

    F: int
    seq_start: np.ndarray
    """First position of each sequence, and N."""
    dec_norm_F: np.ndarray
    signed: bool
    variant: str | None
    folder: Path
    """Of the SAE, for messages."""


class Segment:
    """Consumer of the rows at positions lo to hi − 1, in text order; `before` rows of the text come before them."""

    def __init__(self, folder: Path, number: int, lo: int, hi: int, before: int, about: About):
        self.folder, self.number, self.lo, self.hi, self.about = folder, number, lo, hi, about
        self.rows = before
        n = hi - lo
        self._feature, self._value = (open(path, "wb") for path in _paths(folder, number)[:2])  # noqa: SIM115
        self._per_token = {name: np.zeros(n, np.float32) for name in PER_TOKEN}
        self._count = np.zeros(n, np.uint32)
        self._encoded, self._early = np.zeros(n, bool), np.zeros(n, bool)
        self._n = np.zeros(about.F, np.uint32)
        self._exponent: int | None = None
        # (first firing, exponent) of each stretch written with one exponent
        self._runs: list[tuple[int, int]] = []
        self._largest = self._largest_early = 0.0
        self._last = lo - 1
        self._sequence, self._in_sequence = -1, 0

    def update(self, chunk):
        self.add(np.asarray(chunk.positions), chunk.codes, chunk.x_BD, chunk.xhat_BD)

    @torch.no_grad()
    def add(self, positions: np.ndarray, codes, x_BD: torch.Tensor, xhat_BD: torch.Tensor):
        """Raises SaekitError for a code that is not finite, and for a negative one where the variant has none."""
        assert positions[0] > self._last and (np.diff(positions) > 0).all(), "chunks must come in text order"
        assert positions[-1] < self.hi, "a row of another segment"
        self._last = int(positions[-1])
        row, feature, value = _pairs(codes)
        self._check(positions, row, feature, value)
        at, B = positions - self.lo, len(positions)
        sizes = (value * self.about.dec_norm_F[feature]).astype(np.float64) ** 2
        error = x_BD - xhat_BD
        self._encoded[at] = True
        self._per_token["norm_x"][at] = torch.linalg.vector_norm(x_BD, dim=1).cpu().numpy()
        self._per_token["norm_code"][at] = np.sqrt(np.bincount(row, weights=sizes, minlength=B))
        self._per_token["error"][at] = error.square().sum(1).cpu().numpy()
        self._count[at] = np.bincount(row, minlength=B)
        self._n += np.bincount(feature, minlength=self.about.F).astype(np.uint32)
        self._mark_early(positions)
        early = int(np.searchsorted(row, max(0, EXPONENT_TOKENS - self.rows)))
        size = np.abs(value)
        self._largest = max(self._largest, float(size.max(initial=0)))
        self._largest_early = max(self._largest_early, float(size[:early].max(initial=0)))
        self.rows += B
        if len(row):
            self._append(row, feature, value)

    def _check(self, positions, row, feature, value):
        finite = np.isfinite(value)
        if not finite.all():
            bad = int(np.flatnonzero(~finite)[0])
            raise SaekitError(
                f"feature {feature[bad]:,} has the code {value[bad]} at position {positions[row[bad]]:,}; "
                f"saekit check {self.about.folder}"
            )
        if not self.about.signed and value.min(initial=0) < 0:
            bad = int(value.argmin())
            raise SaekitError(
                f"feature {feature[bad]:,} has the code {value[bad]} at position {positions[row[bad]]:,}, and the variant "
                f"{self.about.variant} says that no code is negative; let its property `signed` be True"
            )

    def _mark_early(self, positions: np.ndarray):
        """The first two encoded positions of each sequence."""
        sequence = np.searchsorted(self.about.seq_start, positions, side="right") - 1
        first = np.flatnonzero(np.diff(sequence, prepend=-1))
        begin = np.repeat(first, np.diff(first, append=len(sequence)))
        place = np.arange(len(sequence)) - begin
        place[sequence == self._sequence] += self._in_sequence
        self._early[positions[place < 2] - self.lo] = True
        self._sequence, self._in_sequence = int(sequence[-1]), int(place[-1]) + 1

    def _append(self, row: np.ndarray, feature: np.ndarray, value: np.ndarray):
        """Quantises, sorts inside the tokens by falling magnitude, appends to the raw files."""
        width = bit_width(self.about.F)
        assert bit_width(int(row[-1]) + 1) + 16 + width <= 64
        bits, over = (None, True) if self._exponent is None else quantise(value, self._exponent)
        if over:
            largest = float(np.abs(value).max())
            # [32768, 65536), of which the end rounds to what float16 has not
            self._exponent = exponent_of(largest) - 6
            bits, over = quantise(value, self._exponent)
            if over:
                self._exponent += 1
                bits, _ = quantise(value, self._exponent)
            self._runs.append((self._value.tell() // 2, self._exponent))
        assert bits is not None
        key = row.astype(np.uint64) << np.uint64(16 + width)
        key |= (np.uint16(0x7FFF) - (bits & np.uint16(0x7FFF))).astype(np.uint64) << np.uint64(1 + width)
        key |= feature.astype(np.uint64) << np.uint64(1)
        key |= bits >> np.uint16(15)
        key.sort()
        out = ((key >> np.uint64(1)) & np.uint64((1 << width) - 1)).astype(feature_dtype(self.about.F))
        size = np.uint16(0x7FFF) - ((key >> np.uint64(1 + width)).astype(np.uint16) & np.uint16(0x7FFF))
        self._feature.write(out.data)
        self._value.write((size | (key.astype(np.uint16) & np.uint16(1)) << np.uint16(15)).data)

    def finish(self):
        """Commits the segment: from here on it is not computed again."""
        for file in (self._feature, self._value):
            file.flush()
            os.fsync(file.fileno())
        self.close()
        write_tensors(
            _paths(self.folder, self.number)[2],
            {
                "largest": np.array([self._largest, self._largest_early]),
                "run_first": np.array([first for first, _ in self._runs], np.int64),
                "run_exponent": np.array([exponent for _, exponent in self._runs], np.int64),
                "n": self._n,
                "count": self._count,
                **self._per_token,
                "encoded": self._encoded,
                "early": self._early,
            },
        )

    def close(self):
        self._feature.close()
        self._value.close()


class OpenSegment(NamedTuple):
    """A committed segment, mapped."""

    tensors: dict[str, np.ndarray]
    feature: np.ndarray
    """Of its firings by token, then by falling magnitude (z)."""
    value: np.ndarray
    """Bits of float16 times 2^(exponent of the run) (z)."""

    def block(self, a: int, b: int, exponent: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and value bits of firings a to b − 1, all with one exponent: exact powers of two."""
        bits = np.array(self.value[a:b])
        first = self.tensors["run_first"]
        for i, own in enumerate(self.tensors["run_exponent"].tolist()):
            end = int(first[i + 1]) if i + 1 < len(first) else len(self.value)
            part = bits[max(0, int(first[i]) - a) : max(0, end - a)]
            if len(part) and own != exponent:
                part[:] = quantise(part.view(np.float16).astype(np.float32), exponent - own)[0]
        return self.feature[a:b], bits


def open_segment(folder: Path, number: int, n: int, F: int) -> OpenSegment | None:
    """A committed segment of n tokens; None if it is not there or one of its files is not whole."""
    feature, value, segment = _paths(folder, number)
    if not segment.is_file():
        return None
    tensors = {name: np.asarray(array) for name, array in map_tensors(segment).items()}
    z = int(tensors["count"].sum(dtype=np.int64))
    dtype = np.dtype(feature_dtype(F))
    sizes = [path.stat().st_size if path.is_file() else -1 for path in (feature, value)]
    if sizes != [z * dtype.itemsize, 2 * z] or len(tensors["count"]) != n or len(tensors["n"]) != F:
        return None
    if z == 0:
        return OpenSegment(tensors, np.zeros(0, dtype), np.zeros(0, np.uint16))
    return OpenSegment(tensors, np.memmap(feature, dtype, "r"), np.memmap(value, np.uint16, "r"))


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
