"""The processes that `torchrun` started for one command, or this one alone.

    with joined_ranks() as ranks:                 # reads torchrun's environment; nothing to do for a single process
        mine = range(ranks.rank, n_shards, ranks.size)
        everything = ranks.gather(mine_done)      # list over ranks, on every rank
        ranks.barrier()

Only small Python objects travel, over gloo, on any device.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from saekit.errors import SaekitError
from saekit.progress import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1
    local: int = 0
    """Number of this process on its machine, which is the number of its GPU."""
    local_size: int = 1
    """Processes on this machine, which share its cores."""

    def barrier(self, lost: Callable[[], str] = lambda: "a process of torchrun was lost") -> None:
        """Until every process is here. Raises SaekitError with what `lost` says if one never comes."""
        self.gather(None, lost)

    def gather(self, value: T, lost: Callable[[], str] = lambda: "a process of torchrun was lost") -> list[T]:
        """What every process gave, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise SaekitError(f"{lost()}; run the same command again") from error
        return values


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """This process among those of `torchrun`; all but the first keep quiet about their progress."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
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
