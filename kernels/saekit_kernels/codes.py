"""Sparse rows: what an encoder keeps of a batch.

    codes = Codes.rowwise(values_BK, indices_BK, n_features)       # the same number of slots in every row
    codes = Codes.flat(row_ptr, indices_N, values_N, n_features)   # as many as each row has

A **slot** holds one (feature, value); its number is its place in `values.reshape(-1)`. A slot of value 0 is empty: it does
not fire, adds nothing and gets no gradient. A feature fires iff its code is not 0; codes may be negative.

B rows (tokens) · F features · K slots per row · N slots in all · D width of what is decoded to
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F_nn
from torch import Tensor


class Pairs(NamedTuple):
    """The firings of a batch, in row order, features ascending within a row."""

    row_N: Tensor
    """int64: row of the batch."""
    feature_N: Tensor
    """int64: feature index."""
    value_N: Tensor
    """Code, never 0."""


@dataclass(frozen=True, eq=False)
class Codes:
    """Sparse (B, F) matrix of codes, row-wise or flat. Indices ascend within a row and occur once in it."""

    values: Tensor
    """(B, K) row-wise, (N) flat; float32, or float64 from the reference. 0 = empty slot."""
    indices: Tensor
    """Same shape, int32: feature of each slot. An empty slot names a real feature that no other slot of its row names."""
    row_ptr: Tensor | None
    """(B + 1) int32 for flat codes: row b holds slots row_ptr[b] to row_ptr[b + 1]. None for row-wise codes."""
    n_features: int
    """F."""

    @classmethod
    def rowwise(cls, values_BK: Tensor, indices_BK: Tensor, n_features: int) -> "Codes":
        """Codes with K slots in each row. Raises ValueError when the two shapes differ or are not (B, K)."""
        if values_BK.ndim != 2 or values_BK.shape != indices_BK.shape:
            raise ValueError(
                f"row-wise codes need values and indices of one shape (B, K), got {tuple(values_BK.shape)} "
                f"and {tuple(indices_BK.shape)}"
            )
        return cls(values_BK, indices_BK.to(torch.int32), None, n_features)

    @classmethod
    def flat(cls, row_ptr: Tensor, indices_N: Tensor, values_N: Tensor, n_features: int) -> "Codes":
        """Codes with as many slots as each row has. Raises ValueError when the shapes do not fit."""
        if values_N.ndim != 1 or values_N.shape != indices_N.shape or row_ptr.ndim != 1 or row_ptr.numel() < 1:
            raise ValueError(
                f"flat codes need values (N), indices (N) and row_ptr (B + 1), got {tuple(values_N.shape)}, "
                f"{tuple(indices_N.shape)} and {tuple(row_ptr.shape)}"
            )
        return cls(values_N, indices_N.to(torch.int32), row_ptr.to(torch.int32), n_features)

    @classmethod
    def of_dense(cls, dense_BF: Tensor) -> "Codes":
        """Flat codes of the entries of a (B, F) matrix that are not 0."""
        row, feature = dense_BF.nonzero(as_tuple=True)
        row_ptr = torch.zeros(len(dense_BF) + 1, dtype=torch.int32, device=dense_BF.device)
        torch.cumsum(torch.bincount(row, minlength=len(dense_BF)), 0, dtype=torch.int32, out=row_ptr[1:])
        return cls.flat(row_ptr, feature, dense_BF[row, feature], dense_BF.shape[1])

    @classmethod
    def concatenate(cls, parts: list["Codes"]) -> "Codes":
        """The rows of all parts, in order. Raises ValueError unless they have one F and one form (row-wise: one K)."""
        forms = {(p.n_features, p.values.shape[1] if p.row_ptr is None else "flat") for p in parts}
        if len(forms) != 1:
            raise ValueError(f"codes to concatenate need one (F, K) or all flat, got {sorted(forms, key=str)}")
        values, indices = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
        if parts[0].row_ptr is None:
            return cls(values, indices, None, parts[0].n_features)
        counts = torch.cat([p.row_ptr.diff() for p in parts if p.row_ptr is not None])
        row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=values.device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=row_ptr[1:])
        return cls(values, indices, row_ptr, parts[0].n_features)

    @property
    def batch(self) -> int:
        """B, the number of rows."""
        return self.values.shape[0] if self.row_ptr is None else self.row_ptr.numel() - 1

    @property
    def shape(self) -> tuple[int, int]:
        """(B, F)."""
        return self.batch, self.n_features

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def is_rowwise(self) -> bool:
        """True for (B, K) slots, False for flat ones."""
        return self.row_ptr is None

    def with_values(self, values: Tensor) -> "Codes":
        """The same slots holding other values (same shape as `values`)."""
        assert values.shape == self.values.shape, (values.shape, self.values.shape)
        return replace(self, values=values)

    def scaled(self, s: float | Tensor) -> "Codes":
        """Every code times `s`."""
        return self.with_values(self.values * s)

    def keep(self, mask: Tensor) -> "Codes":
        """Codes in which every slot whose mask is False is empty. `mask` is bool, shaped like `values` or (N)."""
        return self.with_values(torch.where(mask.view_as(self.values), self.values, 0))

    def to(self, device: torch.device | str) -> "Codes":
        """The same codes on another device."""
        row_ptr = None if self.row_ptr is None else self.row_ptr.to(device)
        return Codes(self.values.to(device), self.indices.to(device), row_ptr, self.n_features)

    def detach(self) -> "Codes":
        """The same codes outside any graph."""
        return self.with_values(self.values.detach())

    def slot_rows(self) -> Tensor:
        """(N) int64: row of each slot, in slot order."""
        if self.row_ptr is None:
            return torch.arange(self.batch, device=self.device).repeat_interleave(self.values.shape[1])
        return torch.repeat_interleave(
            torch.arange(self.batch, device=self.device), self.row_ptr.diff().long(), output_size=self.values.numel()
        )

    def rows(self, lo: int, hi: int) -> "Codes":
        """Rows lo to hi − 1 as codes of their own (views, nothing is copied but row_ptr)."""
        if self.row_ptr is None:
            return Codes(self.values[lo:hi], self.indices[lo:hi], None, self.n_features)
        row_ptr = self.row_ptr[lo : hi + 1]
        first, last = int(row_ptr[0]), int(row_ptr[-1])
        return Codes(self.values[first:last], self.indices[first:last], row_ptr - first, self.n_features)

    def times(self, W_FD: Tensor) -> Tensor:
        """codes @ W, (B, D): the sum of value · W[feature] over each row's slots. Differentiable in values and W."""
        if W_FD.ndim != 2 or W_FD.shape[0] != self.n_features:
            raise ValueError(f"codes of {self.n_features} features times a matrix of shape {tuple(W_FD.shape)}")
        values = self.values.to(W_FD.dtype)
        if values.numel() == 0:
            return W_FD.new_zeros(self.batch, W_FD.shape[1])
        if self.row_ptr is None:
            return F_nn.embedding_bag(self.indices, W_FD, per_sample_weights=values, mode="sum")
        return F_nn.embedding_bag(
            self.indices, W_FD, self.row_ptr, per_sample_weights=values, mode="sum", include_last_offset=True
        )

    def fired_F(self) -> Tensor:
        """bool (F): the features that fire on at least one row."""
        # one column more than there are features takes the empty slots, so that no mask has to be compacted
        index = torch.where(self.values != 0, self.indices, self.n_features).reshape(-1).long()
        fired = torch.zeros(self.n_features + 1, dtype=torch.bool, device=self.device)
        return fired.index_fill_(0, index, True)[:-1]

    def l0(self) -> Tensor:
        """int64 (B): how many features fire on each row."""
        if self.row_ptr is None:
            return (self.values != 0).sum(1)
        running = torch.zeros(self.values.numel() + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(self.values != 0, 0, out=running[1:])
        return running[self.row_ptr.long()].diff()

    def dense(self) -> Tensor:
        """The (B, F) matrix. Differentiable in the values."""
        if self.row_ptr is None:
            zeros = self.values.new_zeros(self.batch, self.n_features)
            return zeros.scatter(1, self.indices.long(), self.values)
        place = self.slot_rows() * self.n_features + self.indices
        return self.values.new_zeros(self.batch * self.n_features).scatter(0, place, self.values).view(self.shape)

    def pairs(self) -> Pairs:
        """Every firing as (row, feature, value): row order, features ascending within a row, empty slots left out."""
        value = self.values.reshape(-1)
        live = value.nonzero().squeeze(1)
        return Pairs(self.slot_rows()[live], self.indices.reshape(-1)[live].long(), value[live])
