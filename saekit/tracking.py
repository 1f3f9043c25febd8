"""TensorBoard and Weights & Biases, as readers of metrics.jsonl beside the training loop.

    with followed([out], tensorboard=True, wandb="my-project"):
        ...                               # the loop writes metrics.jsonl, a thread passes its lines on

Both are optional packages. Nothing that happens to them stops a run: a failure is said once.
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.run_folder import METRICS, read_run

POLL_SECONDS = 2.0
# at the end; what is sent later than this waits for `wandb sync`
PATIENCE_SECONDS = 60.0


class Sink(Protocol):
    def write(self, line: dict) -> None:
        """One line of metrics.jsonl."""
        ...

    def close(self) -> None: ...


def require_packages(*, tensorboard: bool, wandb: str | None):
    """SaekitError for a package that is asked for and missing."""
    for asked, package in ((tensorboard, "tensorboard"), (wandb is not None, "wandb")):
        if asked and find_spec(package) is None:
            raise SaekitError(f"--{package} needs a package that is not installed:  pip install {package}")


@contextmanager
def followed(folders: Sequence[Path], *, tensorboard: bool, wandb: str | None) -> Iterator[None]:
    """While it lasts, lines that are added to the folders' metrics.jsonl are passed on, those that are there first."""
    openers: list[tuple[str, Callable[[Path], Sink]]] = []
    if tensorboard:
        openers.append(("TensorBoard", TensorBoard))
    if wandb is not None:
        openers.append(("wandb", lambda folder: Wandb(folder, wandb)))
    if not openers:
        yield
        return
    done = threading.Event()
    tails = [_Tail(name, opener, folder) for name, opener in openers for folder in folders]
    thread = threading.Thread(target=_follow, args=(tails, done), name="saekit-tracking", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PATIENCE_SECONDS)
        if thread.is_alive():
            Progress.say(f"tracking has not ended after {PATIENCE_SECONDS:.0f} s and is left behind")


def _follow(tails: list["_Tail"], done: threading.Event):
    while not done.wait(POLL_SECONDS):
        for tail in tails:
            tail.read()
    for tail in tails:
        tail.read()
        tail.close()


class _Tail:
    """One sink of one folder, opened when there is a first line for it."""

    def __init__(self, name: str, opener: Callable[[Path], Sink], folder: Path):
        self.name, self.opener, self.folder = name, opener, folder
        self.sink: Sink | None = None
        self.place, self.broken = 0, False

    def read(self):
        metrics = self.folder / METRICS
        if self.broken or not metrics.is_file():
            return
        with self._contained(), open(metrics, "rb") as f:
            f.seek(self.place)
            whole, newline, _ = f.read().rpartition(b"\n")
            self.place += len(whole) + len(newline)
            for line in whole.splitlines():
                self.sink = self.sink or self.opener(self.folder)
                self.sink.write(json.loads(line))

    def close(self):
        if self.sink is not None and not self.broken:
            with self._contained():
                self.sink.close()

    @contextmanager
    def _contained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.broken = True
            Progress.say(f"{self.name} of {self.folder} ends here, the run goes on: {type(error).__name__}: {error}")


def tags_of(line: dict) -> dict[str, float]:
    """`loss`, `loss/rec`, `loss/aux` …; the other keys as they are. The parts of the loss stand between `loss` and `fvu`."""
    keys = list(line)
    parts = keys[keys.index("loss") + 1 : keys.index("fvu")]
    return {f"loss/{key}" if key in parts else key: value for key, value in line.items() if key != "step"}


class TensorBoard:
    """DIR/tensorboard, written anew from the first line whenever a run starts: metrics.jsonl may have been cut back."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, line: dict):
        for tag, value in tags_of(line).items():
            self.writer.add_scalar(tag, value, line["step"])

    def close(self):
        self.writer.close()


class Wandb:
    """One run of Weights & Biases; a run that continues goes on there. WANDB_MODE=offline writes DIR/wandb alone."""

    def __init__(self, folder: Path, project: str):
        import wandb

        run = read_run(folder)
        self.run = wandb.init(
            project=project,
            name=folder.name,
            id=run["run_id"],
            dir=str(folder),
            config={"variant": run["variant"], **run["options"]},
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", disable_git=True, login_timeout=1),
        )
        self.sent = self.run.step

    def write(self, line: dict):
        # what the server has, it takes no second time
        if line["step"] >= self.sent:
            self.run.log(tags_of(line), step=line["step"])

    def close(self):
        self.run.finish()
