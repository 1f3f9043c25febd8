"""Long work beside the pages: a worker thread, at most one per SAE, whose result is a file in the SAE folder.

    jobs.panel(path, jobs.Task("check", "Check every file", f"saekit check {path}", work))
    jobs.result(path, "check")                    # what the last finished one left; None if there is none

1. The thread holds `jobs/.lock` in the SAE folder: neither another tab nor another server works on that SAE meanwhile.
2. It is told how far it is by the progress of the library itself (saekit/progress.py), which is also where it is stopped.
3. What `work` returns is written to `jobs/KIND.json` at the end, so a reload, or another server, finds it.

A panel shows the command line of its work whether or not a job runs.
"""

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import streamlit as st

from saekit.errors import SaekitError
from saekit.interrupt import Cancelled
from saekit.progress import Progress, duration, watched
from saekit.store.format import atomic_write, pretty_json, take_lock
from saekit_browser import state

FOLDER, LOCK = "jobs", ".lock"
LARGE = 2 * 10**10
"""Multiplications that a page does not do while somebody waits."""

log = logging.getLogger("saekit_browser")


@dataclass(frozen=True)
class Task:
    """What a button starts."""

    kind: str
    """Name of the result."""
    label: str
    """On the button."""
    command: str
    """Lines that do the same in a terminal."""
    work: Callable[[], dict]
    """Runs in the thread, without Streamlit; returns what JSON can hold."""


@dataclass(eq=False)
class Job:
    """One run of a task."""

    task: Task
    path: Path
    progress: Progress | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    problem: str | None = None
    """Why there is no result, in one line."""

    def note(self, progress: Progress):
        self.progress = progress
        if self.cancelled.is_set():
            raise Cancelled("cancelled")

    def run(self, lock: TextIO):
        begin = time.monotonic()
        try:
            with watched(self.note):
                found = self.task.work()
            self.keep(found, time.monotonic() - begin)
        except Cancelled:
            self.problem = f"{self.task.label}: cancelled after {duration(time.monotonic() - begin)}."
        except (SaekitError, OSError) as error:
            self.problem = str(error)
        except Exception:
            number = secrets.token_hex(2)
            log.exception("error %s", number)
            self.problem = f"{self.task.label} failed; error {number} in the output of saekit browse says why."
        finally:
            lock.close()
            self.ended.set()

    def keep(self, found: dict, seconds: float):
        record = {
            "command": self.task.command,
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "seconds": round(seconds, 1),
            "stamp": state.stamp(self.path),
        }
        atomic_write(place(self.path, self.task.kind), pretty_json({**record, **found}))


@st.cache_resource(show_spinner=False)
def _last() -> dict[Path, Job]:
    """The job that runs on each SAE, or ran last; the same for all visitors."""
    return {}


def current(path: Path) -> Job | None:
    """The job that runs on an SAE, or ran last since the server started."""
    return _last().get(path.resolve())


def running(path: Path) -> bool:
    job = current(path)
    return job is not None and not job.ended.is_set()


def place(path: Path, kind: str, ending: str = ".json") -> Path:
    return path / FOLDER / (kind + ending)


def result(path: Path, kind: str) -> dict | None:
    """What the last finished job of that kind left in an SAE folder; None if there is none, or it cannot be read."""
    try:
        return json.loads(place(path, kind).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def start(path: Path, task: Task) -> Job:
    """SaekitError if another job runs on this SAE, in this process or another, or its folder cannot be written to."""
    path = path.resolve()
    try:
        (path / FOLDER).mkdir(exist_ok=True)
        lock = take_lock(path / FOLDER / LOCK, path, "worked on")
    except OSError as error:
        raise SaekitError(
            f"cannot write to {path / FOLDER} ({error.strerror}); run the command in a terminal"
        ) from None
    job = _last()[path] = Job(task, path)
    threading.Thread(target=job.run, args=(lock,), name=f"{task.kind} {path.name}", daemon=True).start()
    return job


def panel(path: Path, task: Task, *, refused: str | None = None):
    """Button, or progress with time left and a button that cancels; the command line. `refused`: why it cannot start."""
    every = 1.0 if running(path) else None
    st.fragment(_panel, run_every=every, key="job")(path, task, refused, every is not None)


@state.shown
def _panel(path: Path, task: Task, refused: str | None, was_running: bool):
    job = current(path)
    if job is not None and not job.ended.is_set():
        _progress(job)
    elif was_running:
        # the page shows the result, and is not asked again each second
        st.rerun()
    else:
        if st.button(task.label, icon=":material/play_arrow:", disabled=refused is not None, key=f"start-{task.kind}"):
            start(path, task)
            st.rerun()
        if refused is not None:
            st.caption(state.literal(refused))
        if job is not None and job.problem is not None:
            st.warning(state.literal(job.problem), icon=":material/error:")
    st.code(task.command, language="shell", wrap_lines=True)


def _progress(job: Job):
    p = job.progress
    share, parts = 0.0, [job.task.label]
    if p is not None:
        share = min(1.0, p.done / p.total) if p.total else 0.0
        parts.append(f"{p.name} {p.done:,}" + (f" of {p.total:,}" if p.total else "") + f" {p.unit}")
        if p.left is not None:
            parts.append(f"{duration(p.left)} left")
    if job.cancelled.is_set():
        parts.append("stopping after this step")
    st.progress(share, text=state.literal(" · ".join(parts)))
    if st.button("Cancel", icon=":material/close:", disabled=job.cancelled.is_set(), key="cancel-job"):
        job.cancelled.set()
        st.rerun(scope="fragment")


def when(found: dict) -> str:
    """`on 2026-12-01 09:30 UTC, in 12 s`."""
    return f"on {found['date']} UTC, in {duration(found['seconds'])}"
