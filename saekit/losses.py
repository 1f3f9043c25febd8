"""Losses as pure functions. B tokens in a batch · D model width.

All are on one scale: V is the total variance of an activation over the training rows, so that `reconstruction` reads as
the fraction of variance unexplained.
"""

from torch import Tensor

from saekit.ranks import Ranks


def reconstruction(sq_B: Tensor, total_variance: float) -> Tensor:
    """Σ_b ‖x_b − x̂_b‖² / (B·V), from the squared errors of the tokens."""
    return sq_B.sum() / (sq_B.shape[0] * total_variance)


def auxk(residual_BD: Tensor, y_aux_BD: Tensor, ranks: Ranks | None = None) -> Tensor:
    """mean_b ‖e_b − ê_b‖² / mean_b ‖e_b − mean(e)‖², 0 where the denominator is 0 (arXiv 2406.04093, appendix A.2).

    `residual_BD` is the target e = x − x̂ and carries no gradient; `y_aux_BD` is ê, the reconstruction of e by dead
    features alone, without b_dec. With several ranks the denominator is that of all their rows, and the mean of the ranks'
    losses is the loss.
    """
    e = residual_BD.detach()
    mean_D = e.mean(0)
    if ranks is not None:
        ranks.mean_([mean_D])
    spread = (e - mean_D).square().sum()
    if ranks is not None:
        ranks.mean_([spread])
    loss = (e - y_aux_BD).square().sum() / spread.clamp_min(1e-30)
    return loss * (spread > 0)
