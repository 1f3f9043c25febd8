"""What the tokens of an index say about its SAE: norms, how many features fire, the error beside it.

    idx.norms().ratio                          # ‖f‖ / ‖x‖, mean of 20,000 tokens
    idx.crowd().most[0]                        # the token on which most features fire, in its text
    idx.kth_values(32)                         # what the 32nd largest code of a token is

All from per_token.safetensors, the last from by_token.safetensors too. n tokens drawn · F features.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saekit.feature_index.feature import Example
from saekit.feature_index.format import splitmix, spread

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

DRAWN = 20_000
"""Points of the ZF plot."""
BANDS = (0.25, 0.5, 1.0)
"""δ of its bands: ‖x‖² within (1 ± δ)‖f‖²."""
COUNTED = 200_000
"""Tokens behind the quantiles of the error."""
GROUPS = 24
"""Groups of equal count, by features per token."""
CANDIDATES = 4096
BLOCK = 1 << 22


class Norms(NamedTuple):
    """‖x‖ and ‖f‖ of tokens drawn evenly, f = (a_1‖d_1‖, …, a_F‖d_F‖, ‖b_dec‖). Tokens where either is 0 are left out."""

    positions: np.ndarray
    """Token positions, increasing (n) int64."""
    x: np.ndarray
    """‖x‖ (n) float32."""
    code: np.ndarray
    """‖f‖ (n) float32."""
    inside: dict[float, float]
    """Share of the tokens inside the band of each δ."""
    under: float
    """Share with ‖f‖ < ‖x‖."""
    ratio: float
    """Mean of ‖f‖ / ‖x‖."""
    median: float
    """Its median."""
    eps_lbo: float
    """Median of |‖x‖² − ‖f‖²| / ((F − 1)‖f‖²)."""
    undefined: int
    """Drawn tokens that were left out."""
    constant: bool
    """Whether all ‖x‖ are equal, as where inputs are normalised per token."""


class ErrorGroup(NamedTuple):
    """Tokens on which `low` to `high` features fire, and quartiles of their ‖x − x̂‖² / ‖x‖²."""

    low: int
    high: int
    tokens: int
    q25: float
    median: float
    q75: float


@dataclass(frozen=True)
class Counted:
    """A token in its text, with the number of features that fire on each token there."""

    example: Example
    features: np.ndarray
    """(tokens of the example) int64."""


class Crowd(NamedTuple):
    """How many features fire on a token."""

    counts: np.ndarray
    """Encoded tokens with 0, 1, 2, … features (int64)."""
    mean: float
    most: list[Counted]
    """Tokens with the most features, one per sequence."""
    fewest: list[Counted]
    error: list[ErrorGroup]
    """By rising number of features."""


class KthValues(NamedTuple):
    """The k-th largest magnitude of tokens on which k features fire or more."""

    values: np.ndarray
    """(n) float32."""
    short: float
    """Share of the tokens on which fewer than k fire."""


def drawn(index: "FeatureIndex", most: int) -> np.ndarray:
    """Encoded ones among at most so many positions drawn evenly over the text, increasing (int64)."""
    positions = spread(index.n_tokens, most, 0)
    return positions[index.file("tokens")["encoded"][positions]]


def l0_counts(index: "FeatureIndex") -> np.ndarray:
    """Encoded tokens on which 0, 1, 2, … features fire (int64)."""
    l0, encoded = index.features_per_token, index.file("tokens")["encoded"]
    counts = np.zeros(1 + np.iinfo(l0.dtype).max, np.int64)
    for lo in range(0, len(l0), BLOCK):
        here = slice(lo, lo + BLOCK)
        counts += np.bincount(l0[here][encoded[here]], minlength=len(counts))
    return counts[: 1 + int(np.flatnonzero(counts).max(initial=0))]


def norms(index: "FeatureIndex", most: int = DRAWN) -> Norms:
    positions, table = drawn(index, most), index.file("per_token")
    x = table["norm_x"][positions]
    code = np.hypot(table["norm_code"][positions], np.float32(index.manifest["bias_norm"]))
    known = (x > 0) & (code > 0)
    undefined = int((~known).sum())
    positions, x, code = positions[known], x[known], code[known]
    if not len(x):
        none = float("nan")
        return Norms(positions, x, code, dict.fromkeys(BANDS, none), none, none, none, none, undefined, False)
    ratio = code.astype(np.float64) / x
    off = np.abs(ratio**-2 - 1)
    return Norms(
        positions=positions,
        x=x,
        code=code,
        inside={delta: float((off <= delta).mean()) for delta in BANDS},
        under=float((ratio < 1).mean()),
        ratio=float(ratio.mean()),
        median=float(np.median(ratio)),
        eps_lbo=float(np.median(off)) / max(1, len(index) - 1),
        undefined=undefined,
        constant=len(x) > 1 and float(x.max() - x.min()) <= 1e-3 * float(x.mean()),
    )


def crowd(index: "FeatureIndex", k: int = 6) -> Crowd:
    counts = index.l0_counts
    return Crowd(
        counts=counts,
        mean=float(counts @ np.arange(len(counts)) / max(1, counts.sum())),
        most=_ends(index, np.arange(len(counts))[::-1], k),
        fewest=_ends(index, np.arange(len(counts)), k),
        error=_error_groups(index),
    )


def _ends(index: "FeatureIndex", order: np.ndarray, k: int) -> list[Counted]:
    """k tokens whose number of features comes first in `order`, at most one per sequence; equals in no order of the text."""
    l0, table = index.features_per_token, index.file("tokens")
    total = np.cumsum(index.l0_counts[order])
    if total[-1] == 0:
        return []
    # few tokens come before number `cut`; of those that share it, as many as may be, some are drawn
    cut = order[min(len(order) - 1, int(np.searchsorted(total, CANDIDATES)))]
    before = np.flatnonzero((l0 > cut if order[0] > order[-1] else l0 < cut) & table["encoded"])
    same = np.flatnonzero((l0 == cut) & table["encoded"])
    positions = np.concatenate([before, same[spread(len(same), CANDIDATES, 0)]])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    positions = positions[np.lexsort((splitmix(positions.astype(np.uint64)), place[l0[positions]]))]
    sequence = np.searchsorted(table["seq_start"], positions, side="right")
    first = np.sort(np.unique(sequence, return_index=True)[1])[:k]
    out = []
    for position in positions[first].tolist():
        example = index.window(position)
        out.append(Counted(example, l0[example.positions].astype(np.int64)))
    return out


def _error_groups(index: "FeatureIndex") -> list[ErrorGroup]:
    positions, table = drawn(index, COUNTED), index.file("per_token")
    square = table["norm_x"][positions].astype(np.float64) ** 2
    positions, square = positions[square > 0], square[square > 0]
    l0, error = table["l0"][positions].astype(np.int64), table["error"][positions] / square
    if not len(l0):
        return []
    # a number of features is in one group alone: groups are of equal count only as nearly as that lets them be
    cuts = np.unique(np.quantile(l0, np.linspace(0, 1, GROUPS + 1)[1:-1], method="lower"))
    group = np.searchsorted(cuts, l0, side="right")
    out = []
    for g in np.unique(group).tolist():
        mine = group == g
        q25, median, q75 = np.quantile(error[mine], (0.25, 0.5, 0.75)).tolist()
        out.append(ErrorGroup(int(l0[mine].min()), int(l0[mine].max()), int(mine.sum()), q25, median, q75))
    return out


def kth_values(index: "FeatureIndex", k: int, most: int = COUNTED) -> KthValues:
    positions, table = drawn(index, most), index.file("by_token")
    begin, end = table["start"][positions], table["start"][positions + 1]
    enough = end - begin >= k
    at = begin[enough] + k - 1
    values = np.abs(table["value"][at].astype(np.float32)) * np.float32(index.scale)
    return KthValues(values, 1 - float(enough.mean()) if len(positions) else float("nan"))


def snippets(
    index: "FeatureIndex", positions: np.ndarray, before: int = 6, after: int = 2
) -> list[tuple[bytes, bytes, bytes]]:
    """Text before, at and after many positions as bytes, never across a sequence border; `window` for a few."""
    table, words = index.file("tokens"), index.vocabulary
    starts, token = table["seq_start"], table["token"]
    sequence = np.searchsorted(starts, positions, side="right") - 1
    first, last = starts[sequence], starts[sequence + 1]
    lo, hi = np.maximum(first, positions - before).tolist(), np.minimum(last, positions + after + 1).tolist()
    out = []
    for a, at, b in zip(lo, positions.tolist(), hi, strict=True):
        texts = [words[t] for t in token[a:b].tolist()]
        out.append((b"".join(texts[: at - a]), texts[at - a], b"".join(texts[at - a + 1 :])))
    return out
