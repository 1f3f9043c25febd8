"""The one line that long work rewrites on stderr.

    with Progress("collect", total=1_000_000, unit="tokens") as progress:
        progress.advance(4096, "write wait 0.1 %")

On a terminal the line is rewritten at most ten times a second; elsewhere a line is printed every 30 seconds and one at
the end. `Progress.quiet = True` silences all of them (tests, libraries).

    with watched(lambda progress: ...):              # told at each step, in place of the line; what it raises ends the work
        evaluate("saes/topk")
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

WIDTH = 24

_watcher: ContextVar["Callable[[Progress], None] | None"] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: "Callable[[Progress], None]") -> Iterator[None]:
    """Work of this thread tells `watcher` how far it is: when a stretch of it begins, and after each step. What the watcher
    raises, such as `Cancelled`, comes out between two steps."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `1 h 01 min`."""
    s = int(seconds + 0.5)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    return f"{s // 3600} h {s % 3600 // 60:02d} min"


class Progress:
    quiet = False

    def __init__(self, name: str, total: int, unit: str, *, rate: bool = True):
        self.name, self.total, self.unit, self.rate = name, total, unit, rate
        self.done, self.note = 0, ""
        self.start = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.watcher = _watcher.get()

    @classmethod
    def say(cls, line: str):
        """One line on stderr that stays, such as the device chosen and why."""
        if not cls.quiet:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        if self.watcher is not None:
            self.watcher(self)
        return self

    def __exit__(self, kind, *_):
        if not self.quiet and self.watcher is None:
            self._show(final=True, failed=kind is not None)

    def advance(self, n: int, note: str = ""):
        self.done += n
        self.note = note or self.note
        if self.watcher is not None:
            self.watcher(self)
            return
        now = time.monotonic()
        if not self.quiet and now - self.shown >= (0.1 if self.terminal else 30.0):
            self.shown = now
            self._show()

    @property
    def left(self) -> float | None:
        """Seconds to go at the speed so far; None where nothing is done or the total is not known."""
        if not self.total or not self.done:
            return None
        return (time.monotonic() - self.start) * max(0.0, self.total / self.done - 1)

    def _show(self, final: bool = False, failed: bool = False):
        seconds = time.monotonic() - self.start
        share = min(1.0, self.done / self.total) if self.total else 0.0
        filled = round(share * WIDTH)
        # a total of 0 is one that is not known
        whole = f" of {self.total:,}" if self.total else ""
        parts = [f"{self.name:<10} {'█' * filled}{'░' * (WIDTH - filled)} {self.done:,}{whole} {self.unit}"]
        if self.note:
            parts.append(self.note)
        if self.rate and seconds > 0:
            parts.append(f"{self.done / seconds:,.0f} {self.unit}/s")
        if failed:
            parts.append(f"stopped after {duration(seconds)}")
        elif final:
            parts.append(f"in {duration(seconds)}")
        elif self.left:
            parts.append(f"{duration(self.left)} left")
        line = " · ".join(parts)
        if not self.terminal:
            print(line, file=sys.stderr, flush=True)
            return
        columns = shutil.get_terminal_size((100, 24)).columns
        print(f"\r\x1b[2K{line[: columns - 1]}", end="\n" if final else "", file=sys.stderr, flush=True)
