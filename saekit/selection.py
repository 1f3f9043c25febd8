"""Selection in a batch that is spread over processes: who keeps what is decided for the whole.

    out = encode_select_over(ranks, x_BD, W_enc_FD, b_enc_F, b_dec_D, rule=rule, key="relu", compute="fp32", workspace=kept)

Row i of rank r is row i·R + r of the global batch. Rules that look at one row need nobody else. `BatchCount` and
`ColumnCount` keep the first m of each group, which is the whole batch or a column, in the order (key descending, row of the
global batch, feature):

1. Each rank names candidates: what lies above the hint; for a batch without a hint, its own first m.
2. The candidates' keys are joined and sorted. Where fewer than m lie above the hint, step 1 is done again without it.
3. The m-th key of a group is its bar: pairs above it stay, pairs below it go.
4. Where more pairs equal the bar than there is room for, the places of these are joined too, and the first ones stay.

A key travels as a *word*, which ascends while the key descends: 4 bytes, for columns 8 with the feature in front.

B tokens of this rank · D width · F features · A some of them · R ranks · G groups, 1 or F · N pairs of this rank · M of all
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from saekit_kernels import (
    BatchCount,
    Codes,
    ColumnCount,
    EncodeOut,
    Rule,
    Threshold,
    Workspace,
    build_csc,
    encode_select,
)
from saekit_kernels.portable import flat_codes, key_bits
from saekit_kernels.reference import batch_hint
from torch import Tensor

from saekit.ranks import Ranks

# keys have bits from 0 to this
TOP_BITS = 0x7FFFFFFF
# words and places in a column begin with its feature, shifted by this
SHIFT = 32
# the word of a group that keeps nothing; below every other
NONE = -1


def encode_select_over(
    ranks: Ranks,
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None,
    *,
    rule: Rule,
    key: str,
    compute: str | None,
    workspace: Workspace | None,
    csc: bool = False,
) -> EncodeOut:
    """This rank's rows of `saekit_kernels.encode_select` on the global batch; for a single process that very call.

    `m` and `m_F` count the global batch. Threshold, hint and counters are the global ones, equal on all ranks. All ranks
    call it together, with the same rule, in float32.

    Raises ValueError as `encode_select` does, and SaekitError if a process was lost.
    """
    if ranks.size > 1 and isinstance(rule, BatchCount | ColumnCount):
        batch = _Batch(ranks, x_BD, W_enc_FD, b_enc_F, b_in_D, key, compute, workspace)
        if isinstance(rule, BatchCount):
            pairs, threshold, hint = _batch_count(batch, rule)
        else:
            pairs, threshold, hint = _column_count(batch, rule)
        n_features = len(W_enc_FD)
        codes = flat_codes(pairs.row_N * n_features + pairs.feature_N, pairs.value_N, len(x_BD), n_features)
        return EncodeOut(codes, build_csc(codes) if csc else None, threshold, hint, _counters(ranks, codes, rule))
    out = encode_select(
        x_BD, W_enc_FD, b_enc_F, b_in_D, rule=rule, key=key, compute=compute, csc=csc, workspace=workspace
    )
    ranks.sum_([out.counters])
    return out


class _Pairs(NamedTuple):
    """Candidates of this rank, in row order."""

    row_N: Tensor
    """int64: row of this rank."""
    feature_N: Tensor
    """int64"""
    value_N: Tensor
    word_N: Tensor
    """int32 for the batch, int64 for columns."""

    def where(self, mask_N: Tensor) -> "_Pairs":
        return _Pairs(*(t[mask_N] for t in self))


@dataclass(frozen=True, eq=False)
class _Batch:
    """The global batch as this rank has it."""

    ranks: Ranks
    x_BD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    b_in_D: Tensor | None
    key: str
    compute: str | None
    workspace: Workspace | None

    def pairs(self, rule: Rule, feature_A: Tensor | None = None) -> _Pairs:
        """What this rank keeps by a rule, of all features or of a few."""
        W, b = self.W_enc_FD, self.b_enc_F
        if feature_A is not None:
            W, b = W[feature_A], b[feature_A]
        codes = encode_select(
            self.x_BD, W, b, self.b_in_D, rule=rule, key=self.key, compute=self.compute, workspace=self.workspace
        ).codes
        assert codes.values.dtype == torch.float32, "a word has room for the bits of a float32"
        feature_N = codes.indices.long() if feature_A is None else feature_A[codes.indices.long()]
        word_N = TOP_BITS - key_bits(codes.values.detach(), self.key)
        return _Pairs(codes.slot_rows(), feature_N, codes.values, word_N)

    def global_row(self, pairs: _Pairs) -> Tensor:
        return pairs.row_N * self.ranks.size + self.ranks.rank


class _Order:
    """Words sorted by group, then key descending, to be looked up by their rank in the group."""

    def __init__(self, word_M: Tensor, groups: int):
        sorted_M = word_M.sort().values.long()
        edges = torch.searchsorted(sorted_M, torch.arange(groups + 1, device=word_M.device) << SHIFT)
        self.word_M, self.first_G, self.count_G = sorted_M, edges[:-1], edges.diff()
        self.word_or_none = torch.cat([sorted_M, sorted_M.new_tensor([NONE])])

    def at(self, rank_G: Tensor) -> Tensor:
        """The word at a rank (0 = largest key), NONE where there is none."""
        inside = (rank_G >= 0) & (rank_G < self.count_G)
        return self.word_or_none[torch.where(inside, self.first_G + rank_G, len(self.word_M))]

    def last(self, m_G: Tensor) -> Tensor:
        """The word of the m-th pair, or of the last one where there are fewer."""
        return self.at(torch.minimum(m_G, self.count_G) - 1)

    def before(self, word_G: Tensor) -> Tensor:
        """How many pairs of the group have a larger key."""
        return torch.searchsorted(self.word_M, word_G) - self.first_G


def _key_of(word_G: Tensor) -> Tensor:
    """float32, 0 for NONE."""
    bits = TOP_BITS - (word_G & ((1 << SHIFT) - 1))
    return torch.where(word_G == NONE, 0, bits).int().view(torch.float32)


def _stays(ranks: Ranks, order: _Order, m_G: Tensor, group_N: Tensor, word_N: Tensor, place_N: Tensor) -> Tensor:
    """bool (N): the pairs among the first m of their group; equal keys go by place, which begins with the group."""
    last_G = order.last(m_G)
    stays_N = word_N <= last_G[group_N]
    # the pair behind the last one is as large
    tied_G = (order.at(m_G) == last_G) & (last_G != NONE)
    if bool(tied_G.any()):
        edge_N = tied_G[group_N] & (word_N == last_G[group_N])
        place_M = ranks.joined(place_N[edge_N]).sort().values
        first_G = torch.searchsorted(place_M, torch.arange(len(m_G), device=m_G.device) << SHIFT)
        final_G = place_M[torch.where(tied_G, first_G + m_G - order.before(last_G) - 1, 0)]
        stays_N[edge_N] = place_N[edge_N] <= final_G[group_N[edge_N]]
    return stays_N


def _batch_count(batch: _Batch, rule: BatchCount) -> tuple[_Pairs, Tensor, Tensor]:
    """(pairs that stay, threshold, hint)"""
    # m above the hint on all ranks together are enough, and no rank has more than m that count
    attempts = [BatchCount(rule.m)] if rule.hint is None else [Threshold(rule.hint), BatchCount(rule.m)]
    for attempt in attempts:
        pairs = batch.pairs(attempt)
        order = _Order(batch.ranks.joined(pairs.word_N), 1)
        if len(order.word_M) >= rule.m:
            break
    m_1 = torch.tensor([rule.m], device=batch.x_BD.device)
    place_N = batch.global_row(pairs) * len(batch.W_enc_FD) + pairs.feature_N
    stays_N = _stays(batch.ranks, order, m_1, torch.zeros_like(pairs.row_N), pairs.word_N, place_N)
    threshold = _key_of(order.last(m_1))[0]
    return pairs.where(stays_N), threshold, batch_hint(threshold)


def _column_count(batch: _Batch, rule: ColumnCount) -> tuple[_Pairs, Tensor, Tensor]:
    """(pairs that stay, threshold_F, hint_F)"""
    m_F = rule.m_F.to(batch.x_BD.device, torch.int64)
    bar_F = torch.zeros(len(m_F), device=m_F.device)
    if rule.hint_F is not None:
        # a hint that is no number excludes nothing
        bar_F = rule.hint_F.to(bar_F).clamp(min=0).nan_to_num(0.0, torch.inf)

    def candidates(bar: Tensor | float, feature_A: Tensor | None = None) -> _Pairs:
        """Above the bar, and in its column among this rank's first 4·m (the next hint can need these) or their equals."""
        pairs = batch.pairs(Threshold(bar), feature_A)
        pairs = pairs._replace(word_N=(pairs.feature_N << SHIFT) | pairs.word_N.long())
        return pairs.where(pairs.word_N <= _Order(pairs.word_N, len(m_F)).last(4 * m_F)[pairs.feature_N])

    pairs = candidates(torch.where(m_F > 0, bar_F, torch.inf))
    order = _Order(batch.ranks.joined(pairs.word_N), len(m_F))
    short_F = (order.count_G < m_F) & (bar_F > 0)
    if bool(short_F.any()):
        anew = candidates(0.0, short_F.nonzero().squeeze(1))
        other_M = order.word_M[~short_F[order.word_M >> SHIFT]]
        order = _Order(torch.cat([other_M, batch.ranks.joined(anew.word_N)]), len(m_F))
        other = pairs.where(~short_F[pairs.feature_N])
        both = _Pairs(*(torch.cat(two) for two in zip(other, anew)))
        pairs = both.where((both.row_N * len(m_F) + both.feature_N).argsort())
        bar_F = bar_F.masked_fill(short_F, 0.0)

    place_N = (pairs.feature_N << SHIFT) | batch.global_row(pairs)
    stays_N = _stays(batch.ranks, order, m_F, pairs.feature_N, pairs.word_N, place_N)
    # the hint lets four times the budget through; a column that has fewer keeps the bar it had
    hint_F = torch.where(order.count_G >= 4 * m_F, _key_of(order.at(4 * m_F - 1)), bar_F).nan_to_num(0.0, 0.0)
    return pairs.where(stays_N), _key_of(order.last(m_F)), hint_F


def _counters(ranks: Ranks, codes: Codes, rule: BatchCount | ColumnCount) -> Tensor:
    """`EncodeOut.counters` of the global batch."""
    nan_B = torch.zeros(codes.batch, dtype=torch.bool, device=codes.device)
    nan_B[codes.slot_rows()[codes.values.isnan()]] = True
    totals = torch.tensor([0, codes.values.numel(), codes.batch], device=codes.device)
    totals[0] = nan_B.sum()
    ranks.sum_([totals])
    nan_rows, n_kept, n_rows = totals
    if isinstance(rule, BatchCount):
        budget = rule.m
    else:
        # a column has no more pairs than the batch has rows
        budget = rule.m_F.to(codes.device).clamp(min=0).clamp(max=n_rows).sum().long()
    return torch.stack([torch.zeros_like(n_kept), budget - n_kept, nan_rows])
