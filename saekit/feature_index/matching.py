"""Which features of one SAE are which of another, by their decoder rows.

    found = match(open_index("saes/seed-0"), open_index("saes/seed-1"))
    found.matched, found.split, found.only_first

F features of the first SAE · G of the second · D model width
"""

from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.store.format import map_tensors, write_tensors

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

MATCHED, RELATED = 0.7, 0.5
# entries of a block of similarities
BLOCK = 1 << 25


@dataclass(frozen=True, eq=False)
class Matching:
    """Features of two SAEs by the similarity S of their decoder rows: the cosine, of signed codes its size.

    A pair is matched where each is the other's nearest and S ≥ 0.7. A feature is split where two or more of the other SAE
    have it as their nearest with S ≥ 0.5, merged where that is so the other way round, alone where its largest S is below 0.5.
    """

    nearest_F: np.ndarray
    """Of each feature of the first: the most similar of the second (int64)."""
    similarity_F: np.ndarray
    nearest_G: np.ndarray
    """Of each feature of the second: the most similar of the first (int64)."""
    similarity_G: np.ndarray

    @property
    def matched(self) -> np.ndarray:
        """(P, 2) int64, by falling S."""
        first = np.arange(len(self.nearest_F))
        mutual = self.nearest_G[self.nearest_F] == first
        keep = np.flatnonzero(mutual & (self.similarity_F >= MATCHED))
        keep = keep[np.argsort(-self.similarity_F[keep], kind="stable")]
        return np.stack([keep, self.nearest_F[keep]], 1)

    @property
    def split(self) -> dict[int, list[int]]:
        """Feature of the first → those of the second that have it as their nearest."""
        return _families(self.nearest_G, self.similarity_G)

    @property
    def merged(self) -> dict[int, list[int]]:
        """Feature of the second → those of the first that have it as their nearest."""
        return _families(self.nearest_F, self.similarity_F)

    @property
    def only_first(self) -> np.ndarray:
        """Features of the first that nothing in the second resembles, least similar first."""
        return _alone(self.similarity_F)

    @property
    def only_second(self) -> np.ndarray:
        """Features of the second that nothing in the first resembles, least similar first."""
        return _alone(self.similarity_G)

    def save(self, path: Path):
        """One safetensors file, without the SAEs' names."""
        write_tensors(path, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Matching":
        return cls(**map_tensors(path))

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return {
            "matched": [[i, j, float(self.similarity_F[i])] for i, j in self.matched.tolist()],
            "split": self.split,
            "merged": self.merged,
            "only_first": self.only_first.tolist(),
            "only_second": self.only_second.tolist(),
        }

    def summary(self) -> str:
        """One line."""
        F, G = len(self.nearest_F), len(self.nearest_G)
        return (
            f"{len(self.matched):,} pairs (S ≥ {MATCHED}) of {F:,} and {G:,} features; {len(self.split):,} split, "
            f"{len(self.merged):,} merged; {len(self.only_first):,} and {len(self.only_second):,} without a relative "
            f"(S < {RELATED}); mean of the nearest {self.similarity_F.mean():.3f} and {self.similarity_G.mean():.3f}"
        )


def _families(nearest: np.ndarray, similarity: np.ndarray) -> dict[int, list[int]]:
    near = np.flatnonzero(similarity >= RELATED)
    families: dict[int, list[int]] = defaultdict(list)
    for child in near[np.argsort(-similarity[near], kind="stable")].tolist():
        families[int(nearest[child])].append(child)
    large = {parent: children for parent, children in families.items() if len(children) > 1}
    return dict(sorted(large.items(), key=lambda item: (-len(item[1]), item[0])))


def _alone(similarity: np.ndarray) -> np.ndarray:
    found = np.flatnonzero(similarity < RELATED)
    return found[np.argsort(similarity[found], kind="stable")]


def match(first: "FeatureIndex", second: "FeatureIndex") -> Matching:
    """Features of two SAEs of one width, by their decoder rows. Raises SaekitError for SAEs of different widths."""
    A_FD, B_GD = _unit(first.decoder()), _unit(second.decoder())
    if A_FD.shape[1] != B_GD.shape[1]:
        raise SaekitError(
            f"{first.name} has D = {A_FD.shape[1]}, {second.name} has {B_GD.shape[1]}; only SAEs of one width can be compared"
        )
    signed = first.signed or second.signed
    best_F, best_G = np.full(len(A_FD), -np.inf, np.float32), np.full(len(B_GD), -np.inf, np.float32)
    near_F, near_G = np.zeros(len(A_FD), np.int64), np.zeros(len(B_GD), np.int64)
    rows = max(1, BLOCK // max(1, len(B_GD)))
    with Progress("match", len(A_FD), "features") as progress:
        for lo in range(0, len(A_FD), rows):
            S = A_FD[lo : lo + rows] @ B_GD.T
            S = np.abs(S) if signed else S
            near_F[lo : lo + rows] = S.argmax(1)
            best_F[lo : lo + rows] = S.max(1)
            column = S.argmax(0)
            value = S[column, np.arange(len(B_GD))]
            better = value > best_G
            near_G[better], best_G[better] = column[better] + lo, value[better]
            progress.advance(len(S))
    return Matching(near_F, best_F.clip(max=1), near_G, best_G.clip(max=1))


def _unit(W_FD: np.ndarray) -> np.ndarray:
    W_FD = np.asarray(W_FD, np.float32)
    return W_FD / np.linalg.norm(W_FD, axis=1, keepdims=True).clip(min=1e-30)


def agreement(first: "FeatureIndex", second: "FeatureIndex", i: int, j: int) -> float | None:
    """Pearson correlation of the codes of feature i of one and j of another, over the tokens that both indexes hold; None
    where they are of different tokens, where one of the two features is constant, or where one is capped."""
    if not same_tokens(first, second):
        return None
    n = first.n_encoded
    a, b = first.feature(i), second.feature(j)
    if a.capped or b.capped:
        return None
    x, y = a.values.astype(np.float64), b.values.astype(np.float64)
    _, at_a, at_b = np.intersect1d(a.positions, b.positions, assume_unique=True, return_indices=True)
    covariance = x[at_a] @ y[at_b] / n - x.sum() / n * (y.sum() / n)
    spread = ((x @ x) / n - (x.sum() / n) ** 2) * ((y @ y) / n - (y.sum() / n) ** 2)
    return float(covariance / np.sqrt(spread)) if spread > 0 else None


def same_tokens(first: "FeatureIndex", second: "FeatureIndex") -> bool:
    """Whether two indexes were made on the same tokens of the same store."""
    return first.manifest["fingerprints"]["store"] == second.manifest["fingerprints"]["store"]
