"""The processes that `torchrun` started for one command, or this one alone.

    with joined_ranks() as ranks:                 # reads torchrun's environment; nothing to do for a single process
        mine = range(ranks.rank, n_shards, ranks.size)
        everything = ranks.gather(mine_done)      # list over ranks, on every rank
        ranks.barrier()
        ranks.mean_(gradients)                    # lists of tensors, in place, the same bits on every rank

Every rank makes the same calls in the same order. Python objects and CPU tensors travel over gloo, CUDA tensors over NCCL.

N entries of a vector on this rank · M on all ranks together
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from saekit.errors import SaekitError
from saekit.progress import Progress

T = TypeVar("T")

SUMMED = (torch.float32, torch.float64, torch.int64)
# smaller tensors are copied into one buffer, so that they share a call
PACKED_BYTES = 1 << 18


def _someone() -> str:
    return "a process of torchrun was lost"


@contextmanager
def _all_there(lost: Callable[[], str] = _someone) -> Iterator[None]:
    """One line for what a collective raises when a process is gone.

    Closed connections, timeouts and NCCL's errors are all RuntimeErrors (`torch.distributed.DistError` is one).
    """
    try:
        yield
    except RuntimeError as error:
        raise SaekitError(f"{lost()}; run the same command again") from error


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of this process on its machine, which is the number of its GPU."""
    local_size: int = 1
    """Processes on this machine, which share its cores."""

    def barrier(self, lost: Callable[[], str] = _someone) -> None:
        """Until every process is here. Raises SaekitError with what `lost` says if one never comes."""
        self.gather(None, lost)

    def gather(self, value: T, lost: Callable[[], str] = _someone) -> list[T]:
        """What every process gave, by rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        with _all_there(lost):
            dist.all_gather_object(values, value)
        return values

    def mean_(self, tensors: list[Tensor]) -> None:
        """Averages floating-point tensors over ranks, in place: sum / size. Raises SaekitError if a process was lost."""
        assert all(t.is_floating_point() for t in tensors)
        if self.size == 1:
            return
        self.sum_(tensors)
        with torch.no_grad():
            for t in tensors:
                t.div_(self.size)

    @torch.no_grad()
    def sum_(self, tensors: list[Tensor]) -> None:
        """Adds float32, float64 or int64 tensors up over ranks, in place. Raises SaekitError if a process was lost.

        Large tensors are reduced where they lie; the others share one call per dtype.
        """
        assert all(t.dtype in SUMMED for t in tensors), [t.dtype for t in tensors]
        if self.size == 1:
            return
        packs: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in tensors:
            if t.nbytes >= PACKED_BYTES and t.is_contiguous():
                _reduce_(t, dist.ReduceOp.SUM)
            else:
                packs.setdefault((t.dtype, t.device), []).append(t)
        for pack in packs.values():
            flat = torch.cat([t.reshape(-1) for t in pack])
            _reduce_(flat, dist.ReduceOp.SUM)
            for t, part in zip(pack, flat.split([t.numel() for t in pack])):
                t.copy_(part.view(t.shape))

    def any_(self, mask: Tensor) -> None:
        """Logical or of a bool tensor over ranks, in place. Raises SaekitError if a process was lost."""
        assert mask.dtype == torch.bool, mask.dtype
        if self.size == 1:
            return
        byte = mask.to(torch.uint8)
        _reduce_(byte, dist.ReduceOp.MAX)
        mask.copy_(byte)

    def joined(self, t_N: Tensor) -> Tensor:
        """The vectors of all ranks one behind the other, by rank; each has its own length. (M)

        Raises SaekitError if a process was lost.
        """
        assert t_N.ndim == 1
        if self.size == 1:
            return t_N
        counts = torch.cat(self._each(torch.tensor([len(t_N)], device=t_N.device))).tolist()
        longest = max(counts)
        if longest == 0:
            return t_N
        padded = torch.nn.functional.pad(t_N, (0, longest - len(t_N)))
        return torch.cat([part[:n] for part, n in zip(self._each(padded), counts)])

    def _each(self, t: Tensor) -> list[Tensor]:
        """The tensor of every rank, all of one shape."""
        parts = [torch.empty_like(t) for _ in range(self.size)]
        with _all_there():
            dist.all_gather(parts, t)
        return parts


def _reduce_(t: Tensor, op) -> None:
    if t.numel():
        with _all_there():
            dist.all_reduce(t, op)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process among those of `torchrun`; all but the first keep quiet about their progress."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    ours = not dist.is_initialized()
    if ours:
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
    quiet, Progress.quiet = Progress.quiet, Progress.quiet or dist.get_rank() > 0
    try:
        local, local_size = (
            int(os.environ.get(f"LOCAL_{name}", d)) for name, d in (("RANK", "0"), ("WORLD_SIZE", "1"))
        )
        yield Ranks(dist.get_rank(), size, local, local_size)
    finally:
        Progress.quiet = quiet
        if ours:
            dist.destroy_process_group()
