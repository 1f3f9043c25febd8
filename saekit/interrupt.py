"""Ctrl-C and SIGTERM between two steps of long work, never inside one.

with Stop() as stop:
    for step in steps:
        ...
        if stop.signal:
            stop.leave("stopped after step 12; the same command continues")
"""

import os
import signal


class Stop:
    """Lets the step in hand finish; a second signal ends the process at once."""

    def __init__(self):
        self.signal: int | None = None
        self.previous: dict = {}

    def __enter__(self) -> "Stop":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        except ValueError:
            pass  # not the main thread: signals are somebody else's
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number

    def leave(self, message: str):
        """KeyboardInterrupt for Ctrl-C, Terminated for SIGTERM, with the message."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise Terminated(message)


class Cancelled(KeyboardInterrupt):
    """What the watcher of work in another thread raises to end it (progress.py), as Ctrl-C does in the main one."""


class Terminated(SystemExit):
    """SIGTERM after the saving: exit code 143, with what the command line says."""

    def __init__(self, message: str):
        super().__init__(143)
        self.message = message
