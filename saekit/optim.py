"""Learning rate and its schedule, and where the decoder's bias may start; Adam itself is the kernels' `row_adam_`."""

import math

import torch
from torch import Tensor

from saekit.variants.base import Variant

BETAS = (0.9, 0.999)
# gradients of rare features are tiny under a normalised loss; the usual 1e-8 would swallow them
EPS = 6.25e-10
CONSTANT_WARMUP = 1000
DECAY_SHARE = 0.2


def default_lr(d_model: int, d_sae: int, steps: int | None) -> float:
    """2e-4·√(2¹⁴/F)·√(768/D), times √(24,000/steps) for shorter runs, counted as 215 steps at least; never above 0.01.

    The first two factors are the rule of the published trainers, made for 10⁴ to 10⁵ steps at a width around 768: a step of
    Adam moves a unit row by lr·√D. The third, and that it holds over D, come from the sweep in docs/variants.md. With a few
    hundred features the rule asks for rates at which many of them die, hence the last.
    """
    boost = 1.0 if steps is None else max(1.0, math.sqrt(24_000 / max(steps, 215)))
    return min(0.01, 2e-4 * math.sqrt(2**14 / d_sae * 768 / d_model) * boost)


def learning_rate(variant: Variant, d_model: int, d_sae: int, steps: int | None) -> float:
    """The variant's own rate, or its share of the rule's."""
    return variant.lr_share * default_lr(d_model, d_sae, steps) if variant.lr is None else variant.lr


def lr_scale(step: int, steps: int | None) -> float:
    """Factor of the learning rate at `step` (from 0): linear warm-up over min(1,000, 5 %), constant, linear to 0 over
    the last 20 %. Without a known length: warm-up over 1,000 steps, then constant."""
    if steps is None:
        return min(1.0, (step + 1) / CONSTANT_WARMUP)
    warmup = max(1, min(CONSTANT_WARMUP, steps // 20))
    decay = max(1, round(steps * DECAY_SHARE))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def geometric_median(x_BD: Tensor, steps: int = 100) -> Tensor:
    """The point (D) with the smallest sum of distances to the rows, by Weiszfeld's iteration.

    Distances have a floor: at a guess that meets a row the weight of that row would be infinite.
    """
    x = x_BD.double()
    guess_D = x.mean(0)
    floor = 1e-6 * (x - guess_D).norm(dim=1).mean().clamp_min(torch.finfo(torch.float64).tiny)
    for _ in range(steps):
        weight_B = 1 / (x - guess_D).norm(dim=1).clamp_min(floor)
        moved_D = (weight_B[:, None] * x).sum(0) / weight_B.sum()
        done = bool((moved_D - guess_D).norm() <= floor)
        guess_D = moved_D
        if done:
            break
    return guess_D.to(x_BD.dtype)
