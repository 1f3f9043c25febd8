"""The second pass of the builder: every table that needs the codes in feature order.

A block of whole features at a time. One sort by strength gives examples, samples and quantiles, one by token the token
statistics; moments and histograms need no sort.

G signs (2 for signed codes, else 1) · F features · n firings of each feature in a block.
"""

from typing import TYPE_CHECKING

import numpy as np

from saekit.feature_index.format import (
    ABSENT,
    BINS,
    FLAGS,
    PER_SLICE,
    QUANTILES,
    SLICES,
    TOKENS,
    TOP,
    bit_width,
    splitmix,
)
from saekit.progress import Progress

if TYPE_CHECKING:
    from saekit.feature_index.build import IndexBuilder

BLOCK_FIRINGS = 1 << 22
BLOCK_FEATURES = 1 << 14
TOP_CANDIDATES = 256
"""Strongest firings among which the top examples are found."""
CONTEXT = 8
"""Two examples repeat each other if so many tokens up to the firing are the same."""


class Tables:
    """The second pass: columns and example tables from the codes in feature order, a block of features at a time.

    What is not defined is NaN: everything of a dead feature but its counts, skew and kurtosis of equal codes. Moments,
    `mean` to `kurtosis`, are over the firings; kurtosis is the excess over a normal distribution's 3.
    """

    def __init__(self, builder: "IndexBuilder", position: np.ndarray, value: np.ndarray, l0: np.ndarray):
        b = self.b = builder
        F, G = b.F, 2 if b.signed else 1
        self.G, self.position, self.value, self.l0 = G, position, value, l0
        self.scale = 2.0**b.value_exponent
        self.sequence = b.scratch("sequence", np.uint32, b.N)
        self.sequence[:] = np.repeat(np.arange(b.S, dtype=np.uint32), np.diff(b.seq_start))
        self.occurrences = np.bincount(b.token[b.encoded], minlength=len(b.vocab))
        self.columns: dict[str, np.ndarray] = {"n": b.n}
        for name in ("n_pos", "n_neg", "n_seq", "seq_sq"):
            self.columns[name] = np.zeros(F, np.int64)
        for name in (
            "mean", "mean_abs", "mean_sq", "skew", "kurtosis", *(f"q{q:02d}" for q in QUANTILES), "crowd", "start_share",
            "token_entropy", "top_token_share", "token_f1",
        ):  # fmt: skip
            self.columns[name] = np.full(F, np.nan, np.float32)
        self.columns["max_pos"], self.columns["max_neg"] = np.zeros(F, np.float32), np.zeros(F, np.float32)
        self.columns["top_token"] = np.full(F, ABSENT, np.uint32)
        self.columns["kept"] = np.minimum(1, (b.cap or b.N) / np.maximum(1, b.n)).astype(np.float32)
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
        with Progress("tables", self.b.Z, "codes") as progress:
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
        n = self.b.n[lo:hi]
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
        self.energy[rows] = square * self.b.dec_norm_F[rows].astype(np.float64) ** 2
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
        c["start_share"][rows] = total(self.b.early[position].astype(np.float64)) / n

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
        keep = _first_of_each(group, rank, self.context_hash(position), 64 - 8 - bit_width(len(take)))
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
        token_bits = bit_width(len(self.b.vocab))
        wide = np.uint32 if bit_width(F) + token_bits <= 32 else np.uint64
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
        count_bits = bit_width(int(counts.max()) + 1)
        assert bit_width(F) + count_bits + token_bits <= 64
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


def flag_bits(c: dict[str, np.ndarray], n_encoded: int, signed: bool) -> np.ndarray:
    """The `flags` column (F) uint16 from the other columns."""
    n = c["n"]
    with np.errstate(invalid="ignore"):
        rules = {
            "dead": n == 0,
            "dense": n > 0.1 * n_encoded,
            "near-duplicate": (np.abs(c["max_dec_cos"]) if signed else c["max_dec_cos"]) > 0.9,
            "one-sided": (n > 0) & ((c["n_pos"] == 0) | (c["n_neg"] == 0)) & signed,
            "capped": c["kept"] < 1,
            "start-of-sequence": c["start_share"] > 0.5,
        }
    flags = np.zeros(len(n), np.uint16)
    for name, rule in rules.items():
        flags[rule] |= FLAGS[name]
    return flags
