"""The first pass in segments: one exponent in the end, builds that are killed, builds by several processes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from saekit_kernels import Codes

import saekit as sk
from saekit.errors import SaekitError
from saekit.feature_index import open_index, segments
from saekit.feature_index.format import exponent_of, quantise
from saekit.feature_index.segments import About, Segment, open_segment, segment_borders

SITE = "blocks.1.hook_resid_post"


# One segment


def rows_of(dense_BF: np.ndarray) -> Codes:
    part = torch.from_numpy(dense_BF)
    row, feature = part.nonzero(as_tuple=True)
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=len(part)).cumsum(0)])
    return Codes.flat(ptr, feature, part[row, feature], part.shape[1])


def test_borders_are_those_of_sequences(monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_TOKENS", 10)
    # 10 and 20 lie inside sequences, which stay whole; 30 is a border; the long one is a segment of its own
    assert segment_borders(np.array([0, 4, 12, 18, 25, 30, 64, 65])).tolist() == [0, 12, 25, 30, 64, 65]
    assert segment_borders(np.array([0, 3])).tolist() == [0, 3] and segment_borders(np.array([0])).tolist() == [0]


@pytest.mark.parametrize("largest", [1.0, 50.0, 63.99, 64.5, 3e4, 1e30])
def test_one_exponent_loses_nothing_that_it_can_hold(tmp_path, largest):
    """Stretches with exponents of their own, brought to a common one: as if they had been rounded once."""
    rng = np.random.default_rng(0)
    dense_NF = (
        (np.exp(rng.normal(-3, 4, (500, 7))) * rng.choice([-1, 0, 1], (500, 7))).clip(-0.9, 0.9).astype(np.float32)
    )
    # what comes first decides the exponent of the first stretch only
    dense_NF[:100] *= np.float32(1e-6)
    dense_NF[300, 3] = largest
    about = About(7, np.array([0, 500]), np.ones(7), True, None, tmp_path)
    segment = Segment(tmp_path, 0, 0, 500, 0, about)
    for lo in range(0, 500, 50):
        x_BD = torch.zeros(50, 2)
        segment.add(np.arange(lo, lo + 50), rows_of(dense_NF[lo : lo + 50]), x_BD, x_BD)
    assert open_segment(tmp_path, 0, 500, 7) is None
    segment.finish()
    found = open_segment(tmp_path, 0, 500, 7)
    assert found is not None and len(found.tensors["run_first"]) > 2
    assert found.tensors["largest"].tolist() == [np.float32(largest)] * 2
    exponent = exponent_of(0.9)
    if quantise(np.array([largest], np.float32), exponent)[1]:
        exponent = exponent_of(largest)
    feature, bits = found.block(0, len(found.value), exponent)
    row = np.repeat(np.arange(500), found.tensors["count"])
    assert np.array_equal(np.bincount(row * 7 + feature, minlength=3500).reshape(500, 7), dense_NF != 0)
    once, over = quantise(dense_NF[row, feature], exponent)
    normal = (once & 0x7FFF) >= 0x0400
    assert not over and np.array_equal(bits[normal], once[normal]) and normal.any()
    assert np.abs((bits & 0x7FFF).astype(int) - (once & 0x7FFF)).max() <= 1 and (bits & 0x7FFF).all()
    # a part of it is the same part of the whole
    for a, b in ((0, 0), (3, 4), (17, 400), (len(bits) - 5, len(bits))):
        assert np.array_equal(found.block(a, b, exponent)[1], bits[a:b])


@pytest.mark.parametrize("damage", ["feature", "value", "segment", "another length"])
def test_a_segment_that_is_not_whole_is_not_there(tmp_path, damage):
    about = About(3, np.array([0, 4]), np.ones(3), False, None, tmp_path)
    segment = Segment(tmp_path, 5, 0, 4, 0, about)
    segment.add(np.arange(4), rows_of(np.ones((4, 3), np.float32)), torch.zeros(4, 2), torch.zeros(4, 2))
    segment.finish()
    assert open_segment(tmp_path, 5, 4, 3) is not None
    if damage == "segment":
        (tmp_path / "00005.segment").unlink()
    elif damage != "another length":
        os.truncate(tmp_path / f"00005.{damage}", 4)
    assert open_segment(tmp_path, 5, 5 if damage == "another length" else 4, 3) is None


# Builds that are killed


CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from saekit import cli
from saekit.feature_index import build, segments, tables
segments.SEGMENT_TOKENS = build.SEGMENT_TOKENS = 1000
place, count = os.environ.get("PLACE", "nowhere:0").split(":")
homes = {"Segment": segments.Segment, "IndexBuilder": build.IndexBuilder, "Tables": tables.Tables}
home, _, name = place.partition(".")
if home in homes:
    whole, calls = getattr(homes[home], name), [0]
    def killed(*given, **named):
        calls[0] += 1
        if calls[0] == int(count):
            os.kill(os.getpid(), int(os.environ.get("SIGNAL", "9")))
        return whole(*given, **named)
    setattr(homes[home], name, killed)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_text, tmp_path_factory):
    """A store of 8,000 tokens and an SAE on it: eight segments of about 1,000 tokens in CHILD."""
    folder = tmp_path_factory.mktemp("segments")
    store = sk.collect(
        str(tiny_model), site=SITE, text=str(tiny_text), out=folder / "acts", context=32, tokens=8000, compute="fp32"
    )
    sk.train(sk.variants.AbsTopK(k=8, d_sae=64), store, out=folder / "sae", tokens=4000, batch=500, compute="fp32")
    (folder / "child.py").write_text(CHILD)
    return folder


def child(trained: Path, sae: Path, *more, ranks: int = 1, **environment) -> subprocess.CompletedProcess:
    line = ["index", str(sae), "--store", str(trained / "acts"), "--device", "cpu", *more]
    program = [sys.executable]
    if ranks > 1:
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*program, str(trained / "child.py"), *line], capture_output=True, text=True, timeout=300, env=env
    )


def files(sae: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((sae / "index").iterdir())}


@pytest.fixture(scope="module")
def whole(trained):
    sae = Path(shutil.copytree(trained / "sae", trained / "whole" / "sae"))
    result = child(trained, sae)
    assert result.returncode == 0, result.stderr
    return files(sae)


@pytest.fixture
def sae(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained / "sae", tmp_path / "sae"))


def committed(sae: Path) -> int:
    return len(list((sae / "index.partial").glob("*.segment")))


@pytest.mark.parametrize(
    ("place", "segments_there"),
    [
        ("Segment.add:1", 0),
        ("Segment.finish:4", 3),
        ("IndexBuilder._gather:1", 8),
        ("IndexBuilder._write_by_token:1", 8),
        ("Tables.block:1", 8),
        ("IndexBuilder._write_manifest:1", 8),
        ("IndexBuilder._publish:1", 8),
    ],
)
def test_killed_and_going_on(trained, whole, sae, place, segments_there):
    result = child(trained, sae, PLACE=place)
    assert result.returncode == -signal.SIGKILL
    assert committed(sae) == segments_there
    with pytest.raises(SaekitError, match="has no index yet \\(an unfinished build is there\\)"):
        open_index(sae)
    # what is committed is not computed again
    stamps = {p: p.stat().st_mtime_ns for p in (sae / "index.partial").glob("*.segment")}
    result = child(trained, sae, PLACE="IndexBuilder._publish:1")
    assert result.returncode == -signal.SIGKILL
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    assert (f"{segments_there} of 8 segments are there, going on" in result.stderr) == (segments_there > 0)
    result = child(trained, sae)
    assert result.returncode == 0 and "8 of 8 segments are there, going on" in result.stderr
    assert files(sae) == whole and not (sae / "index.partial").exists()


def test_killed_beside_an_older_index(trained, whole, sae):
    """Between the renames, and after them."""
    assert child(trained, sae, "--tokens", "500").returncode == 0
    older = files(sae)
    assert child(trained, sae, PLACE="Tables.block:1").returncode == -signal.SIGKILL
    assert files(sae) == older and open_index(sae).n_tokens < 1000
    (sae / "index").rename(sae / "index.old")
    assert child(trained, sae, PLACE="Tables.block:1").returncode == -signal.SIGKILL
    assert files(sae) == older
    assert child(trained, sae).returncode == 0 and files(sae) == whole
    assert sorted(p.name for p in sae.iterdir() if p.name.startswith("index")) == ["index"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_go_on(trained, whole, sae, number, code):
    result = child(trained, sae, PLACE="Segment.add:3", SIGNAL=str(int(number)))
    assert result.returncode == code
    assert "saekit: stopped, 2 of 8 segments are encoded; the same command continues" in result.stderr
    assert child(trained, sae).returncode == 0 and files(sae) == whole


def test_ctrl_c_while_sorting(trained, whole, sae):
    result = child(trained, sae, PLACE="Tables.block:1", SIGNAL=str(int(signal.SIGINT)))
    assert result.returncode == 130
    assert "saekit: stopped after encoding; the same command continues" in result.stderr
    assert child(trained, sae).returncode == 0 and files(sae) == whole


def test_what_is_made_of_the_codes_may_change(trained, whole, sae):
    """A cap and a seed fix no byte of a segment; how much is encoded does."""
    assert child(trained, sae, "--seed", "3", "--cap", "200", PLACE="Tables.block:1").returncode == -signal.SIGKILL
    result = child(trained, sae)
    assert "8 of 8 segments are there, going on" in result.stderr and files(sae) == whole
    shutil.rmtree(sae / "index")
    assert child(trained, sae, "--tokens", "3000", PLACE="Segment.finish:2").returncode == -signal.SIGKILL
    result = child(trained, sae)
    sequences = open_index(sae).n_sequences
    assert f"the unfinished index there has another sequences (94, now {sequences}); starting over" in result.stderr
    assert "going on" not in result.stderr and files(sae) == whole


@pytest.mark.long
def test_killed_at_any_moment(trained, whole, sae):
    random, killed, rounds = np.random.default_rng(0), 0, 0
    start = time.monotonic()
    assert child(trained, sae).returncode == 0
    seconds = time.monotonic() - start
    shutil.rmtree(sae / "index")
    line = [sys.executable, str(trained / "child.py"), "index", str(sae), "--store", str(trained / "acts")]
    while killed < 20:
        rounds += 1
        assert rounds < 200
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(random.uniform(0.5 * seconds, seconds))
            killed += process.poll() is None
            process.kill()
        if (sae / "index").exists():
            assert files(sae) == whole
            shutil.rmtree(sae / "index")
    assert child(trained, sae).returncode == 0 and files(sae) == whole


# Several processes


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_same_index(trained, whole, sae, ranks):
    result = child(trained, sae, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert files(sae) == whole
    assert result.stdout.count("next:  saekit browse") == 1


@pytest.mark.parametrize("after", [1, 2])
def test_a_lost_rank_ends_the_others_and_the_work_goes_on(trained, whole, sae, after):
    result = child(trained, sae, ranks=2, PLACE="Segment.finish:3")
    assert result.returncode != 0 and "Signal 9 (SIGKILL)" in result.stderr
    there = committed(sae)
    assert not (sae / "index").exists() and 0 < there < 8
    result = child(trained, sae, ranks=after)
    assert result.returncode == 0 and f"{there} of 8 segments are there, going on" in result.stderr
    assert files(sae) == whole


def test_an_error_of_the_first_rank_is_said_once(trained, sae):
    result = child(trained, sae, "--cap", "3", ranks=2)
    assert result.returncode != 0
    assert result.stderr.count("saekit: a cap of 3 firings leaves too little to look at; pass 100 or more") == 1
