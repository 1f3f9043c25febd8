"""Progress that is watched instead of printed, and work that is ended from there."""

import threading

import numpy as np
import pytest

from saekit.feature_index.matching import match
from saekit.interrupt import Cancelled
from saekit.progress import Progress, watched


def test_the_watcher_is_told_and_nothing_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "quiet", False)
    seen = []
    with (
        watched(lambda p: seen.append((p.name, p.done, p.total, p.unit, p.left is None))),
        Progress("pieces", 4, "of it") as p,
    ):
        p.advance(1)
        p.advance(3)
    assert seen == [("pieces", 0, 4, "of it", True), ("pieces", 1, 4, "of it", False), ("pieces", 4, 4, "of it", False)]
    assert p.left == 0 and capsys.readouterr().err == ""
    with Progress("pieces", 4, "of it") as p:
        p.advance(4)
    assert "pieces" in capsys.readouterr().err


def test_time_left_by_hand(monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("saekit.progress.time.monotonic", lambda: next(clock))
    p = Progress("pieces", 40, "of it")
    p.done = 10
    # 10 in 30 s, so 30 more in 90 s
    assert p.left == pytest.approx(90)
    assert Progress.left.fget(type("P", (), {"total": 0, "done": 5})()) is None


class Rows:
    """As far as matching reads an index."""

    name, signed = "rows", False

    def decoder(self):
        return np.eye(40, 64, dtype=np.float32)


def test_work_ends_where_the_watcher_says_so(monkeypatch):
    """Between two blocks, with every Progress closed, and only in the thread that is watched."""
    monkeypatch.setattr("saekit.feature_index.matching.BLOCK", 40 * 4)
    done, elsewhere = [], []

    def note(p):
        done.append(p.done)
        if p.done == 12:
            raise Cancelled("cancelled")

    with pytest.raises(KeyboardInterrupt, match="cancelled"), watched(note):
        thread = threading.Thread(target=lambda: elsewhere.append(match(Rows(), Rows())))
        thread.start()
        thread.join()
        match(Rows(), Rows())
    assert done == [0, 4, 8, 12] and len(elsewhere) == 1
    match(Rows(), Rows())
