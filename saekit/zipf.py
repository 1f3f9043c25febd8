"""How often features fire, against their rank: the law, who falls short of it, and what each feature is allotted.

    law = zipf.fit(count_F, tokens)                          # log p_(r) = a − α·log(r + β), or None
    under_F = zipf.under_used(count_F, tokens, law)          # fire at less than a tenth of what their rank promises
    given = zipf.budgets(count_F, tokens, k, fit=law)        # density of each feature, k per token together
    m_F = zipf.whole(given.density_F, rows, phase_F, step)   # whole numbers for one batch, right on average

`count_F` are firings n_j, decayed or not, and `tokens` what they were counted on: p_j = n_j / tokens. Rank 1 fires most;
equal counts are ranked by index, so that features that never fired come last, by index.

That densities follow Zipf's law but for the rarest features, and budgets that follow it, are from Ayonrinde (arXiv
2411.02124), who published no code; the formulas are ours. All of it is float64.

F features · R fitted ranks
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saekit.errors import SaekitError

BETAS = (0, 1, 2, 5, 10, 20, 50, 100, 200)
ALPHA = (0.5, 1.5)
RANKS = 64
UPPER_SHARE = 0.85
# a fit needs this many ranks that have this many firings
MIN_RANKS, MIN_FIRINGS = 16, 10
# the fractions of multiples of the golden ratio fill [0, 1) more evenly than those of any other number
GOLDEN = 0.6180339887

Kind = Literal["zipf", "empirical", "uniform"]


class ZipfFit(NamedTuple):
    """log p_(r) = a − α·log(r + β)"""

    a: float
    alpha: float
    beta: float
    ranks: int
    """How many ranks were fitted."""


class Budgets(NamedTuple):
    """What `budgets` returns."""

    density_F: Tensor
    """float64: tokens each feature may have, as a share of all; they add up to k."""
    kind: Kind
    """The law they follow: `empirical` where `zipf` was asked for and there is no fit."""


def fit(count_F: Tensor, tokens: float) -> ZipfFit | None:
    """The law through 64 geometrically spaced ranks of the upper 85 % of the features that fire.

    For each β of `BETAS` least squares of log p on log(r + β), α clamped to [0.5, 1.5], then the best intercept for that
    α; the β of the least squared error wins, the smaller one if equal. None where fewer than 16 of these ranks have 10
    firings or more.
    """
    # a decayed count never comes down to 0: a feature with less than one firing left does not fire
    count_R = count_F.detach().double().cpu()
    count_R = count_R[count_R >= 1].sort(descending=True).values
    last = int(UPPER_SHARE * len(count_R))
    if last < MIN_RANKS:
        return None
    rank_R = torch.tensor(sorted({round(last ** (i / (RANKS - 1))) for i in range(RANKS)}))
    count_R = count_R[rank_R - 1]
    if int((count_R >= MIN_FIRINGS).sum()) < MIN_RANKS:
        return None
    y_R = (count_R / tokens).log()
    best, least = None, float("inf")
    for beta in BETAS:
        x_R = (rank_R + beta).double().log()
        x, y = x_R.mean(), y_R.mean()
        slope = ((x_R - x) * (y_R - y)).sum() / (x_R - x).square().sum()
        alpha = (-slope).clamp(*ALPHA)
        a = y + alpha * x
        error = (y_R - a + alpha * x_R).square().sum().item()
        if error < least:
            best, least = ZipfFit(a.item(), alpha.item(), float(beta), len(rank_R)), error
    return best


def rank(count_F: Tensor) -> Tensor:
    """int64 (F): 1 for the feature that fires most; equal counts by index."""
    order_F = count_F.sort(descending=True, stable=True).indices
    place_F = torch.arange(1, len(order_F) + 1, device=order_F.device)
    return torch.empty_like(order_F).scatter_(0, order_F, place_F)


def expected(fit: ZipfFit, count_F: Tensor) -> Tensor:
    """p̂_j = exp(a)·(rank_j + β)^−α, float64 (F): the density that a feature's rank promises."""
    return (fit.a - fit.alpha * (rank(count_F) + fit.beta).double().log()).exp()


def under_used(count_F: Tensor, tokens: float, fit: ZipfFit, tau: float = 0.1) -> Tensor:
    """bool (F): p_j < τ·p̂_j, among the features that should have fired 10 times at least.

    With fewer expected firings chance alone leaves many a healthy rare feature without any.
    """
    promised_F = expected(fit, count_F)
    return (count_F.double() / tokens < tau * promised_F) & (promised_F * tokens >= MIN_FIRINGS)


def budgets(
    count_F: Tensor,
    tokens: float,
    k: float,
    kind: Kind = "zipf",
    p_max: float = 0.5,
    fit: ZipfFit | None = None,
) -> Budgets:
    """Density of each feature, in proportion to q_j, scaled to the sum k with none above `p_max`.

    zipf q_j = (rank_j + β)^−α of `fit`, without one empirical instead; empirical q_j = max(p_j, 0.1·k/F); uniform q_j = 1.
    Those above p_max are set to it and the others scaled up, until both hold. Raises SaekitError if k > p_max·F.
    """
    F = len(count_F)
    if k > p_max * F:
        raise SaekitError(
            f"k = {k:g} firings per token cannot be shared by d_sae = {F} features with p_max = {p_max:g}, "
            f"{p_max * F:g} at most; lower --k or raise --d-sae or --p-max"
        )
    if kind == "zipf" and fit is None:
        kind = "empirical"
    if kind == "zipf":
        assert fit is not None
        q_F = (-fit.alpha * (rank(count_F) + fit.beta).double().log()).exp()
    elif kind == "empirical":
        q_F = (count_F.double() / tokens).clamp(min=0.1 * k / F)
    else:
        q_F = torch.ones_like(count_F, dtype=torch.float64)

    full_F = torch.zeros_like(q_F, dtype=torch.bool)
    while True:
        rest = k - p_max * int(full_F.sum())
        scaled_F = q_F * (rest / q_F.masked_fill(full_F, 0).sum())
        over_F = ~full_F & (scaled_F > p_max)
        if not bool(over_F.any()):
            return Budgets(torch.where(full_F, p_max, scaled_F), kind)
        full_F |= over_F


def whole(density_F: Tensor, rows: int, phase_F: Tensor, step: int) -> Tensor:
    """int64 (F): floor(m_j + frac(φ_j + 0.6180339887·step)) with m_j = rows·density_j, at most `rows`.

    Over the steps a feature gets m_j on average without a random generator; phases φ_j drawn once in [0, 1) keep the sum
    of all features near Σ m_j in each step.
    """
    dither_F = (phase_F.double() + GOLDEN * step).frac()
    return (density_F.double() * rows + dither_F).floor().clamp(max=rows).long()
