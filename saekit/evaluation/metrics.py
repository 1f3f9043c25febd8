"""A number with its name, unit, sample and interval; bootstrap over blocks of sequences.

Tokens of one text are dependent, so sequences are grouped in order into at most 512 blocks, sums are kept per block, and
resampled blocks give the interval of a ratio of sums.
"""

from dataclasses import dataclass, field

import numpy as np

MAX_BLOCKS = 512
MIN_BLOCKS = 20
RESAMPLES = 1000


@dataclass
class Metric:
    value: float | None
    """None where undefined; `note` then says why."""
    unit: str
    better: str
    """lower, higher, or none where there is no better."""
    n: int
    """Tokens it rests on."""
    formula: str
    """Identifier with a version; two numbers with different identifiers are never compared."""
    ci95: tuple[float, float] | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def to_dict(self) -> dict:
        rounded = {k: tidy(v) for k, v in self.baselines.items()}
        return {
            "value": tidy(self.value),
            "unit": self.unit,
            "better": self.better,
            "ci95": None if self.ci95 is None else [tidy(v) for v in self.ci95],
            "n": self.n,
            "formula": self.formula,
            "baselines": rounded,
            "note": self.note,
        }


def tidy(value: float | None) -> float | None:
    """Seven significant digits; never NaN or infinity."""
    if value is None or not np.isfinite(value):
        return None
    return float(f"{float(value):.7g}")


class BlockSums:
    """Sums per block of sequences, for any number of named quantities, in float64."""

    def __init__(self, sequences: np.ndarray):
        """`sequences`: the distinct sequence numbers that will be seen, ascending."""
        self.sequences = sequences
        self.n_blocks = min(MAX_BLOCKS, len(sequences))
        self.sums: dict[str, np.ndarray] = {}

    def add(self, sequences: np.ndarray, **values: np.ndarray):
        """Adds per-token `values` (n) of tokens in `sequences` (n)."""
        order = np.searchsorted(self.sequences, sequences)
        blocks = order * self.n_blocks // len(self.sequences)
        for name, value in values.items():
            total = self.sums.setdefault(name, np.zeros(self.n_blocks))
            total += np.bincount(blocks, weights=np.asarray(value, np.float64), minlength=self.n_blocks)

    def total(self, name: str) -> float:
        return float(self.sums[name].sum())

    def ratio(self, top: str, bottom: str) -> float:
        return self.total(top) / self.total(bottom)

    def interval(self, statistic, seed: int) -> tuple[float, float] | None:
        """2.5–97.5 % of `statistic(sums)`, where `sums` maps names to arrays (RESAMPLES); None under 20 blocks."""
        if self.n_blocks < MIN_BLOCKS:
            return None
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(self.n_blocks, np.full(self.n_blocks, 1 / self.n_blocks), RESAMPLES).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = statistic({name: counts @ sums for name, sums in self.sums.items()})
        values = values[np.isfinite(values)]
        if not len(values):
            return None
        low, high = np.quantile(values, [0.025, 0.975])
        return float(low), float(high)
