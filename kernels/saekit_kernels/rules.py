"""The five selection rules: what `encode_select` may keep. Plain data; each path reads them in its own way.

`count` fields are numbers, fields ending in a dimension are tensors. `hint` is what the last call returned: it changes
the speed of the next call and never what is kept, at most the last bit of a value in a column that is computed anew.
"""

import math
from dataclasses import dataclass

from torch import Tensor

KEYS = ("relu", "abs", "raw")


@dataclass(frozen=True)
class RowCount:
    """The `k` largest keys of each row."""

    k: int

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"RowCount(k={self.k}): k must be at least 1")


@dataclass(frozen=True, eq=False)
class BatchCount:
    """The `m` largest keys of the whole batch."""

    m: int
    hint: Tensor | float | None = None

    def __post_init__(self):
        if self.m < 0:
            raise ValueError(f"BatchCount(m={self.m}): m must not be negative")


@dataclass(frozen=True, eq=False)
class ColumnCount:
    """The `m_F[j]` largest keys of each column j."""

    m_F: Tensor
    hint_F: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowMass:
    """Per row, the largest keys until their Euclidean norm is nearest to `t_B[b]`; at least one, the fewer on a tie."""

    t_B: Tensor


@dataclass(frozen=True, eq=False)
class Threshold:
    """Every key strictly above max(theta − margin, 0); `theta` is a number, a scalar tensor, or one value per feature."""

    theta: Tensor | float
    margin: float = 0.0

    def __post_init__(self):
        if math.isnan(self.margin) or self.margin < 0:
            raise ValueError(f"Threshold(margin={self.margin}): margin must be 0 or more")


Rule = RowCount | BatchCount | ColumnCount | RowMass | Threshold
