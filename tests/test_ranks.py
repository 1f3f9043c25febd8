"""Collection by several processes under torchrun: the store is the one that a single process writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from saekit.collector import _lost, _opened
from saekit.config import CollectOptions
from saekit.errors import SaekitError
from saekit.ranks import Ranks

CHILD = """
import sys
from saekit import cli
sys.exit(cli.main(sys.argv[1:]))
"""
SITES = ["blocks.0.hook_resid_post", "blocks.1.mlp.hook_post"]


def command(model, text, out, ranks: int, *more) -> list[str]:
    arguments = ["collect", str(model), "--site", *SITES, "--text", str(text), "--out", str(out), "--context", "32"]
    arguments += ["--batch-sequences", "8", "--shard-mb", "1", "--compute", "fp32", "--threads", "1", *more]
    script = Path(out).parent / "child.py"
    script.write_text(CHILD)
    if ranks == 1:
        return [sys.executable, str(script), *arguments]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *(str(script), *arguments),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "journal.jsonl"
    }


def run(line, **options):
    return subprocess.run(line, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def big_text(tiny_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks") / "text.jsonl"
    path.write_text(tiny_text.read_text() * 4)
    return path


@pytest.fixture(scope="module")
def alone(tiny_model, big_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "alone"
    result = run(command(tiny_model, big_text, out, 1))
    assert result.returncode == 0, result.stderr
    return out


def test_two_ranks_write_the_same_store(tiny_model, big_text, alone, tmp_path):
    result = run(command(tiny_model, big_text, tmp_path / "acts", 2))
    assert result.returncode == 0, result.stderr
    assert files(tmp_path / "acts") == files(alone)
    # one of them reports
    assert result.stdout.count("next:  saekit train") == 1
    assert len((tmp_path / "acts" / "journal.jsonl").read_text().splitlines()) >= 4


def test_more_ranks_than_shards(tiny_model, tiny_text, tmp_path):
    """One shard for three ranks: two have nothing to do."""
    one = run(command(tiny_model, tiny_text, tmp_path / "one", 1, "--tokens", "3000"))
    three = run(command(tiny_model, tiny_text, tmp_path / "three", 3, "--tokens", "3000"))
    assert one.returncode == three.returncode == 0, three.stderr
    assert files(tmp_path / "three") == files(tmp_path / "one")


def test_an_error_of_one_rank_ends_all(tiny_model, tmp_path):
    result = run(command(tiny_model, tmp_path / "gone.txt", tmp_path / "acts", 2))
    assert result.returncode != 0 and f"no such file: {tmp_path}/gone.txt" in result.stderr
    assert not (tmp_path / "acts").exists()


def test_a_folder_that_a_rank_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda self, value, *_: [False] * self.size)
    settings = CollectOptions(site=("a",), text=("stdlib",))
    message = f"rank 3 does not see {tmp_path}/acts/state/plan.json; all ranks need the same folder"
    with (
        pytest.raises(SaekitError, match=message),
        _opened(tmp_path / "acts", Mock(plan={}), settings, Ranks(rank=3, size=4), Mock(signal=None)),
    ):
        pass
    assert not (tmp_path / "acts").exists()


def test_a_rank_that_never_comes_is_named(monkeypatch):
    """Shards 0, 2, 4 are there and 1 is: the first that is missing is 3, and of two ranks the second has it."""

    def closed(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_gather_object", closed)
    writer = Mock(n_shards=6, committed={0, 1, 2, 4})
    ranks = Ranks(rank=0, size=2)
    with pytest.raises(SaekitError, match="^rank 1 was lost at shard 3; run the same command again$"):
        ranks.barrier(lambda: _lost(writer, ranks))


def shard_files(out: Path) -> int:
    return len(list((out / "state").glob("[0-9]*.json"))) if (out / "state").exists() else 0


@pytest.mark.parametrize("after", [1, 2])
def test_a_lost_rank_stops_the_others_and_the_work_goes_on(tiny_model, big_text, alone, tmp_path, after):
    """One worker is killed while shards are written; then two ranks, or one, continue to the same bytes."""
    out = tmp_path / "acts"
    with subprocess.Popen(
        command(tiny_model, big_text, out, 2), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as parent:
        while shard_files(out) < 2 and parent.poll() is None:
            time.sleep(0.02)
        children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
        workers = [pid for pid in children if b"child.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if workers:
            os.kill(workers[-1], signal.SIGKILL)
        _, said = parent.communicate(timeout=120)
    if not (out / "manifest.json").exists():
        assert parent.returncode != 0 and "Signal 9 (SIGKILL)" in said
    result = run(command(tiny_model, big_text, out, after))
    assert result.returncode == 0 or (out / "manifest.json").exists(), result.stderr
    assert files(out) == files(alone)


@pytest.mark.long
def test_killed_at_any_moment(tiny_model, big_text, alone, tmp_path):
    """The whole group, twenty times, at random moments of reading, computing, writing and joining; then once to the end."""
    out, random, killed, rounds = tmp_path / "acts", np.random.default_rng(0), 0, 0
    start = time.monotonic()
    assert run(command(tiny_model, big_text, tmp_path / "whole", 2)).returncode == 0
    seconds = time.monotonic() - start
    while killed < 20:
        rounds += 1
        assert rounds < 100
        with subprocess.Popen(
            command(tiny_model, big_text, out, 2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as parent:
            time.sleep(random.uniform(0.3 * seconds, seconds))
            running = parent.poll() is None
            if running:
                os.killpg(parent.pid, signal.SIGKILL)
        killed += running
        subprocess.run(["pkill", "-9", "-f", str(out)], check=False)
        if (out / "manifest.json").exists() and not (out / "state").exists():
            assert files(out) == files(alone)
            subprocess.run(["rm", "-rf", str(out)], check=True)
    result = run(command(tiny_model, big_text, out, 2))
    assert result.returncode == 0, result.stderr
    assert files(out) == files(alone)
