"""Places inside a module's forward pass: read what passes there, put something else in its place, see who runs at all.

    points = {"mid": Point(block.ln_2, "input"), "out": Point(block, "output")}
    x_BTD = capture(points, lambda: model(ids_BT))["mid"]      # the pass ends at the last point
    with spliced(points["out"], lambda x: 0 * x):
        logits_BTV = model(ids_BT).logits

Plain hooks that live for one pass. All of it works on any torch.nn.Module; what a place means is the caller's knowledge.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saekit.errors import SaekitError


class Point(NamedTuple):
    module: nn.Module
    side: Literal["input", "output"] = "output"
    scale: float = 1.0
    """The value is this times what the module reads or returns."""
    copy: bool = True
    """Whether something later in the pass may write into the tensor; False where it is known that nothing does."""


class Seen(NamedTuple):
    """What one module did in a trial pass."""

    calls: int
    """How often it ran."""
    shape: tuple[int, ...] | None
    """Of what it returned, or of the first in a tuple; None if that is no tensor of floating-point numbers."""
    kind: str
    """Type of what it returned, in words."""


class _Enough(Exception):
    """All points have been read: leave the forward pass."""


def capture(points: Mapping[str, Point], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Values at the points from one call of `run`, which is left at the last of them.

    Raises SaekitError if the pass ends before every point was seen.
    """
    found: dict[str, Tensor] = {}

    def listen(name: str, point: Point) -> RemovableHandle:
        def keep(x: Any):
            if not isinstance(x, Tensor):
                raise SaekitError(f"{name} is a {type(x).__name__}, not a tensor; choose another site")
            found[name] = x if point.scale == 1.0 else x * point.scale
            if len(found) == len(points):
                raise _Enough
            if point.copy and point.scale == 1.0:
                found[name] = x.clone()

        if point.side == "input":
            return point.module.register_forward_pre_hook(lambda _, args, kw: keep(read(args, kw)), with_kwargs=True)
        return point.module.register_forward_hook(lambda _, args, output: keep(first(output)))

    with registered(listen(name, point) for name, point in points.items()):
        try:
            run()
        except _Enough:
            return {name: found[name] for name in points}
    silent = ", ".join(sorted(points.keys() - found.keys()))
    raise SaekitError(f"{silent}: the model did not come past there in a forward pass; choose another site")


@contextmanager
def spliced(point: Point, fn: Callable[[Tensor], Tensor]):
    """While it lasts, x := fn(x) at the point. Where fn returns x itself, nothing changes by a bit."""

    # in place, because a block adds the very tensor that its norm reads to what comes behind
    def before(_, args, kwargs):
        x = read(args, kwargs)
        x.copy_(fn(x.clone()))

    def after(_, args, output):
        x = first(output)
        if point.scale == 1.0:
            new = fn(x).to(x.dtype)
        else:
            y = x * point.scale
            # the change alone is scaled back, so that no change is exactly none
            new = x + (fn(y) - y).to(x.dtype) / point.scale
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if point.side == "input":
        handle = point.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = point.module.register_forward_hook(after)
    with registered([handle]):
        yield


def observe(module: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, Seen]:
    """Which parts of the module run when `run` is called, and what they return."""
    seen: dict[nn.Module, Seen] = {}

    def note(part, _, output):
        x = first(output)
        calls = seen[part].calls + 1 if part in seen else 1
        if not isinstance(x, Tensor):
            seen[part] = Seen(calls, None, f"a {type(x).__name__}")
        elif not x.is_floating_point():
            seen[part] = Seen(calls, None, f"numbers of type {str(x.dtype).removeprefix('torch.')}")
        else:
            seen[part] = Seen(calls, tuple(x.shape), "a tensor")

    with registered(part.register_forward_hook(note) for part in module.modules()):
        run()
    return seen


def unfit(seen: Seen | None, lead: Sequence[int], wanted: Sequence[str]) -> str | None:
    """Why the module cannot be a site, or None.

    Args:
        lead: the sizes of the trial, with which its shape must begin: `(2, 4)` for two sequences of four tokens.
        wanted: the shapes that will do, in letters: `("B T D",)`.
    """
    if seen is None:
        return "does not run in a forward pass"
    if seen.calls > 1:
        return f"runs {seen.calls} times in one forward pass"
    if seen.shape is None:
        return f"returns {seen.kind}"
    letters = [shape.split() for shape in wanted]
    if len(seen.shape) not in map(len, letters) or seen.shape[: len(lead)] != tuple(lead):
        forms = " or ".join(f"({', '.join(axes)})" for axes in letters)
        sizes = ", ".join(f"{letter} = {n}" for letter, n in zip(letters[-1], lead))
        return f"returns shape {seen.shape}, not {forms} with {sizes}"
    return None


def first(output) -> Any:
    """What a module returns, or the first in the tuple."""
    return output[0] if isinstance(output, tuple) else output


def read(args: tuple, kwargs: dict) -> Any:
    """What a module of a transformer reads; None if it is called in another way."""
    return args[0] if args else kwargs.get("hidden_states")


@contextmanager
def registered(handles: Iterable[RemovableHandle]):
    """Registers the handles as the iterable is read and removes them at the end, whatever happens."""
    known = []
    try:
        known.extend(handles)
        yield
    finally:
        for handle in known:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module):
    """Evaluation mode; every part's train flag back as it was afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
