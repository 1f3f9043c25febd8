"""What the processes of torchrun decide together: refusals, signals.

    finished = decided(ranks, lambda: look(folder))     # the first process looks, all know

A refusal is said once: the first process raises it, the others leave with exit code 2.
"""

import signal
from collections.abc import Callable
from typing import TypeVar

import torch

from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.ranks import Ranks

T = TypeVar("T")


def decided(ranks: Ranks, decide: Callable[[], T]) -> T:
    """What the first process decides or does; its refusal ends the others too."""
    value, refusal = None, None
    if ranks.rank == 0:
        try:
            value = decide()
        except SaekitError as error:
            refusal = error
    value, refused = ranks.gather((value, refusal is not None))[0]
    if refusal is not None:
        raise refusal
    if refused:
        raise SystemExit(2)
    return value  # type: ignore[return-value]


def built(ranks: Ranks, make: Callable[[], T]) -> T:
    """`make()` on every process, on the first one first: what it refuses ends the others before they try."""
    made: list[T] = []
    decided(ranks, lambda: made.append(make()))
    return made[0] if made else make()


def refuse(ranks: Ranks, message: str):
    """SaekitError from the first process; the others leave without a word, so that the line is said once."""
    raise SaekitError(message) if ranks.rank == 0 else SystemExit(2)


def agreed(ranks: Ranks, received: int | None) -> int | None:
    """The signal that any process has received."""
    if ranks.size == 1:
        return received
    known = (signal.SIGINT, signal.SIGTERM)
    mask = torch.tensor([received == number for number in known])
    ranks.any_(mask)
    return next((number for number, seen in zip(known, mask.tolist()) if seen), None)


def leave(ranks: Ranks, stop: Stop, message: str):
    if ranks.rank:
        raise SystemExit(128 + (stop.signal or 0))
    stop.leave(message)
