"""What the hooks of a variant see of a step.

`Moment`  before selection: the input, the buffers, how far the run is
`Slots`   the kept pre-activations of a batch, sparse or dense behind one interface
`Step`    after selection: slots, codes, residual, parameters as leaves of a graph

    def losses(self, out):                                   # in a variant
        return {"l1": weight * out.row_sum(out.values.abs()).mean()}

A slot holds one (token, feature). Sparse slots are shaped like the values of `Codes`; dense ones are (B, F) with a mask.
Every method works on both and can be differentiated. B tokens · D width · F features · N slots
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from saekit_kernels import Codes, Csc, decode, pair_dots
from torch import Tensor


class Moment(NamedTuple):
    """What a selection rule may depend on."""

    x_BD: Tensor
    """Input rows, normalised in training, raw at inference."""
    b_dec_D: Tensor
    buffers: Mapping[str, Tensor]
    """The variant's own."""
    rows: int
    """Of the selection batch: one micro-batch over all ranks."""
    features: int
    """F."""
    step: int = 0
    """Steps done."""
    steps: int | None = None
    """Of the run; None where its length is unknown, and at inference."""

    @property
    def progress(self) -> float:
        """Steps done / steps, 0 where the length is unknown."""
        return self.step / self.steps if self.steps else 0.0


class Slots(Protocol):
    """Kept pre-activations."""

    pre: Tensor
    """At every slot; what the hooks differentiate."""

    def feature(self, t_F: Tensor) -> Tensor:
        """Each slot's entry of a vector over features."""
        ...

    def row_sum(self, t: Tensor) -> Tensor:
        """Sum over the slots of each token, (B)."""
        ...

    def dots(self, x_BD: Tensor, W_FD: Tensor) -> Tensor:
        """x of the slot's token · W of its feature."""
        ...

    def decode(self, values: Tensor, W_FD: Tensor, b_D: Tensor) -> Tensor:
        """values @ W + b, (B, D)."""
        ...


class SparseSlots:
    """Slots of `Codes`. `csc`: the same slots by feature, needed where `feature` is differentiated."""

    def __init__(self, codes: Codes, pre: Tensor | None = None, csc: Csc | None = None):
        self.codes, self.csc = codes, csc
        self.pre = codes.values if pre is None else pre

    def feature(self, t_F: Tensor) -> Tensor:
        return _OfFeature.apply(t_F, self.codes.indices, self.csc)

    def row_sum(self, t: Tensor) -> Tensor:
        return t.sum(1) if self.codes.is_rowwise else _RowSum.apply(t, self.codes.row_ptr)

    def dots(self, x_BD: Tensor, W_FD: Tensor) -> Tensor:
        return pair_dots(self.codes, x_BD, W_FD)

    def decode(self, values: Tensor, W_FD: Tensor, b_D: Tensor) -> Tensor:
        return decode(self.codes.with_values(values), W_FD, b_D)


class DenseSlots:
    """Every pre-activation (B, F); `mask` says which are kept."""

    def __init__(self, pre_BF: Tensor, mask_BF: Tensor):
        self.pre, self.mask = pre_BF, mask_BF

    def feature(self, t_F: Tensor) -> Tensor:
        return t_F

    def row_sum(self, t: Tensor) -> Tensor:
        return torch.where(self.mask, t, 0).sum(1)

    def dots(self, x_BD: Tensor, W_FD: Tensor) -> Tensor:
        return x_BD @ W_FD.T

    def decode(self, values: Tensor, W_FD: Tensor, b_D: Tensor) -> Tensor:
        return torch.addmm(b_D, torch.where(self.mask, values, 0), W_FD)


class _OfFeature(torch.autograd.Function):
    """t_F[feature of the slot]. Its gradient adds the slots of a feature in a fixed order: indexing's own uses atomics."""

    @staticmethod
    def forward(ctx, t_F, indices, csc):
        ctx.csc = csc
        return t_F.index_select(0, indices.reshape(-1)).view(indices.shape)

    @staticmethod
    def backward(ctx, *grads):
        csc = ctx.csc
        assert csc is not None, "slots without their order by feature cannot be differentiated"
        ordered = grads[0].reshape(-1).index_select(0, csc.pair_N[: int(csc.ptr[-1])])
        return torch.segment_reduce(ordered, "sum", offsets=csc.ptr.long(), initial=0.0), None, None


class _RowSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, row_ptr):
        ctx.save_for_backward(row_ptr)
        ctx.slots = t.numel()
        return torch.segment_reduce(t, "sum", offsets=row_ptr.long(), initial=0.0)

    @staticmethod
    def backward(ctx, *grads):
        (row_ptr,) = ctx.saved_tensors
        return torch.repeat_interleave(grads[0], row_ptr.diff().long(), output_size=ctx.slots), None


@dataclass
class Step:
    """One micro-batch after selection, for `values`, `losses` and `after_step`. Parameters are leaves: what a loss reaches,
    it trains. `W_dec` too, hence `.detach()` where a loss must not move it."""

    slots: Slots
    moment: Moment
    parameters: Mapping[str, Tensor]
    """W_enc, W_dec, b_enc, b_dec and the variant's trained buffers."""
    total_variance: float
    """V, of the normalised input."""
    dead_after: int
    """Tokens after which a silent feature counts as dead."""
    draw: Callable[[int], Tensor]
    """`draw(n)`: standard normals (B, n) that depend on (seed, step, row of the global batch) alone."""
    mean_over_ranks: Callable[[Tensor], Tensor]
    """The mean of a number over all ranks, whose gradient is this rank's own."""
    values: Tensor = field(init=False)
    """Code at every slot; set after `values`."""
    firings_F: Tensor = field(init=False)
    """int64: on how many tokens of the selection batch each feature fires; set before `after_step`."""
    threshold: Tensor | None = None
    """Smallest kept key of the selection batch: () or (F), 0 where nothing was kept."""

    @property
    def x_BD(self) -> Tensor:
        return self.moment.x_BD

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self.moment.buffers

    @property
    def pre(self) -> Tensor:
        return self.slots.pre

    def feature(self, t_F: Tensor) -> Tensor:
        return self.slots.feature(t_F)

    def row_sum(self, t: Tensor) -> Tensor:
        return self.slots.row_sum(t)

    def dots(self, x_BD: Tensor, W_FD: Tensor) -> Tensor:
        return self.slots.dots(x_BD, W_FD)

    def decode(self, values: Tensor, W_FD: Tensor, b_D: Tensor) -> Tensor:
        return self.slots.decode(values, W_FD, b_D)


def inference_step(slots: Slots, at: Moment, parameters: Mapping[str, Tensor]) -> Step:
    """What `values` sees at inference: there is no noise, no loss and no other rank."""

    def no_noise(n: int) -> Tensor:
        raise TypeError("inference draws no noise")

    return Step(slots, at, parameters, 1.0, 0, no_noise, lambda value: value)
