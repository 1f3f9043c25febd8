"""The demo as a stranger runs it: one command, no network, honest numbers, and a second call that does nothing again."""

import re
import subprocess
import sys

import pytest

import saekit as sk
from saekit import cli
from saekit.demo import flow
from saekit.evaluation import load_evaluation

pytestmark = pytest.mark.demo


def test_every_stage_shows_a_bar_and_the_end_says_what_next(demo):
    log = demo.log
    for stage in ("collect", "train", "index", "evaluate", "splice"):
        assert re.search(rf"^{stage} +█+ ", log, re.MULTILINE), stage
    for command in ("saekit collect saekit:demo", "saekit train topk", "saekit index", "saekit evaluate"):
        assert f"$ {command}" in log
    health = r"FVU 0\.\d+ ± 0\.\d+, L0 [\d.]+, [\d.]+ % of [\d,]+ features silent over [\d.,]+( M)? tokens; CE [\d.]+ → [\d.]+ nats with the SAE in place, [\d.]+ with zeros, [\d.]+ with the mean, [\d.]+ % and [\d.]+ % recovered\."
    assert re.search(health, log)
    assert "Next:  saekit browse" in log


def test_what_the_demo_promises(demo):
    evaluation = load_evaluation(demo.folder / "saes/topk")
    assert evaluation.value("fvu") <= 0.20
    assert 1 - evaluation.value("alive") <= 0.10
    assert evaluation.value("ce_recovered_zero") >= 0.90
    assert evaluation.value("ce_recovered_mean") > 0
    assert not [w for w in evaluation.warnings() if "intervals are wide" not in w]


def test_a_second_call_finds_everything_done(demo, capsys):
    before = {p: p.stat().st_mtime_ns for p in demo.folder.rglob("*") if p.is_file()}
    assert cli.main(["demo", "--no-browser", "--out", str(demo.folder)]) == 0
    assert capsys.readouterr().out.count("(finished before)") == 4
    assert {p: p.stat().st_mtime_ns for p in demo.folder.rglob("*") if p.is_file()} == before


def test_everything_is_sound(demo, capsys):
    for part in ("acts", "saes/topk", "saes/topk/index"):
        assert cli.main(["check", str(demo.folder / part)]) == 0, capsys.readouterr().err


def test_index_and_encode_agree_at_random_positions(demo):
    """At 200 positions: the same features, but for pairs at the row's bar, and values within float16."""
    import numpy as np

    sae, index = sk.SAE.load(demo.folder / "saes/topk"), sk.open_index(demo.folder / "saes/topk")
    store = sk.open_store(demo.folder / "acts")
    positions = store.row_positions()
    rows = np.random.default_rng(0).choice(np.searchsorted(positions, index.n_tokens), 200, replace=False)
    for row in rows:
        codes = sae.encode(store.read(flow.SITE, int(row), int(row) + 1).float()).dense()[0].numpy()
        found = index.at(int(positions[row]))
        there = dict(zip(found[0].tolist(), found[1].tolist(), strict=True))
        expected = {int(j): float(codes[j]) for j in np.flatnonzero(codes)}
        bar = min(expected.values())
        for j in set(there) | set(expected):
            if j in there and j in expected:
                assert there[j] == pytest.approx(expected[j], rel=2**-10)
            else:
                assert abs(there.get(j, 0) + expected.get(j, 0) - bar) <= 1e-3 * bar


def test_the_flow_is_the_same_with_sockets_blocked_from_the_start(tmp_path):
    """The run behind the `demo` fixture blocks sockets too; here the import and the help are looked at alone."""
    code = "import socket\ndef no(*a, **k): raise RuntimeError('network')\nsocket.socket.connect = no\nimport saekit.cli as c\nraise SystemExit(c.main(['demo', '--help']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
