"""Training by several processes under torchrun: the SAE of one process but for rounding; one decides, all end together."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

import saekit as sk
from saekit.checkpoint import checkpoints
from saekit.run_folder import claimed

SITE = "blocks.0.hook_resid_post"
# what one process runs; at a step it may send itself a signal
CHILD = """
import os, signal, sys
sys.stdout, sys.stderr = open(said + ".out", "w", buffering=1), open(said + ".err", "w", buffering=1)
os.environ.update(environment)
import torch
# as in the process of the tests
torch.cpu._is_amx_tile_supported = torch.cpu._is_avx512_bf16_supported = lambda: False
from saekit import cli
from saekit.trainer import Trainer
kind, at, rank = signalled
step = Trainer.step
def stepped(self, x):
    if kind and self.step_count == at and os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), getattr(signal, kind))
    return step(self, x)
Trainer.step = stepped
sys.exit(cli.main(words))
"""
WORDS = [
    "--k",
    "4",
    "--d-sae",
    "128",
    "--batch",
    "256",
    "--tokens",
    "20480",
    "--log-every",
    "20",
    "--checkpoint-every",
    "20",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_text):
    out = tmp_path_factory.mktemp("a") / "acts"
    return sk.collect(tiny_model, site=SITE, text=tiny_text, out=out, context=64)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """By one process: 80 steps of topk, and of a variant that selects over the whole batch."""
    out = tmp_path_factory.mktemp("alone")
    for name in ("topk", "mutual_choice"):
        variant = sk.VARIANTS[name](k=4, d_sae=128)
        sk.train(variant, store, out=out / name, batch=256, tokens=20480, log_every=20, checkpoint_every=20)
    return out


class Ended(NamedTuple):
    codes: list[int]
    out: str
    err: str

    @property
    def ours(self) -> list[str]:
        """What saekit said on stderr beside its progress."""
        return [line for line in self.err.splitlines() if line.startswith("saekit: ")]


def run(folder: Path, ranks: int, *words, signalled: tuple[str, int, int] = ("", 0, 0)) -> Ended:
    """The command by so many processes, with what torchrun would tell each of them."""
    # its server has loaded torch once, which takes most of the time of a process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saekit.run", "saekit.cli", "saekit.dry_run", "tyro"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names = {
            "environment": {name: str(value) for name, value in environment.items()},
            "words": [str(word) for word in words],
            "signalled": signalled,
            "said": str(folder / f"rank{rank}"),
        }
        processes.append(context.Process(target=exec, args=(CHILD, names)))
        # Streamlit's tests leave a script as the main module, which a child would run
        with patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
            processes[-1].start()
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "it does not end"
    out, err = ("".join((folder / f"rank{r}.{kind}").read_text() for r in range(ranks)) for kind in ("out", "err"))
    return Ended([process.exitcode or 0 for process in processes], out, err)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_give_the_same_sae_but_for_rounding(store, alone, tmp_path):
    """A sweep: one pass, two processes, one variant whose selection needs both and one whose does not."""
    (tmp_path / "sweep.toml").write_text(
        "[common]\nd_sae = 128\nbatch = 256\ntokens = 20480\nlog_every = 20\ncheckpoint_every = 20\nk = 4\n"
        '[[sae]]\nname = "topk"\nvariant = "topk"\n[[sae]]\nname = "mutual_choice"\nvariant = "mutual-choice"\n'
    )
    ended = run(tmp_path, 2, "train", "sweep", tmp_path / "sweep.toml", store.path, "--out", tmp_path)
    assert ended.codes == [0, 0], ended.err
    # one of them prints
    assert ended.out.count("next:  saekit evaluate") == 1 and ended.out.count("FVU") == 2
    for name in ("topk", "mutual_choice"):
        one, two = sk.SAE.load(alone / name), sk.SAE.load(tmp_path / name)
        # 80 steps of rounding: single features may take another way, the whole does not
        cosine = torch.nn.functional.cosine_similarity(one.W_dec, two.W_dec)
        assert cosine.median() > 0.999 and (cosine > 0.99).float().mean() > 0.9
        fvus = np.array([[line["fvu"] for line in metrics(folder / name)] for folder in (alone, tmp_path)])
        assert np.allclose(fvus[0, 0], fvus[1, 0], rtol=1e-5) and np.allclose(fvus[0], fvus[1], rtol=0.02)
        environment = json.loads((tmp_path / name / "run.json").read_text())["environment"]
        assert environment["ranks"] == 2 and environment["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)
        assert not (tmp_path / name / ".lock").exists()


def test_a_signal_to_one_rank_stops_all_behind_a_checkpoint_and_the_work_goes_on(store, tmp_path):
    words = ["train", "topk", store.path, *WORDS, "--out"]
    assert run(tmp_path, 2, *words, tmp_path / "whole").codes == [0, 0]
    ended = run(tmp_path, 2, *words, tmp_path / "cut", signalled=("SIGTERM", 30, 1))
    assert ended.codes == [143, 143]
    assert ended.ours == ["saekit: stopped after step 31 of 80, saved; the same command continues"]
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "cut")] == [20, 31]
    # another number of processes sums in another order
    ended = run(tmp_path, 1, *words, tmp_path / "cut")
    assert ended.codes == [2] and "was begun with ranks 2, now 1; pass --accept-environment" in ended.err
    assert run(tmp_path, 2, *words, tmp_path / "cut").codes == [0, 0]
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line(store, tmp_path, lost):
    ended = run(
        tmp_path, 2, "train", "topk", store.path, *WORDS, "--out", tmp_path / "sae", signalled=("SIGKILL", 30, lost)
    )
    assert ended.codes[lost] == -signal.SIGKILL and ended.codes[1 - lost] == 2
    assert ended.ours == ["saekit: a process of torchrun was lost; run the same command again"]
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "sae")] == [20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "255"], "--batch 255 is not divisible by 2 ranks; 254 or 256 is"),
        (["--k", "500", "--d-sae", "128"], "k = 500 exceeds d_sae = 128; lower --k or raise --d-sae"),
        (["--k", "5000"], "k = 5000 exceeds d_sae = 1024; lower --k or raise --d-sae"),
        (["--kk", "5"], "topk has no option --kk; did you mean --k"),
        (["--out", "FINISHED"], "FINISHED is a finished run; choose another --out"),
        (["--lr", "1e38", "--batch", "256"], r".* (NaN in|overflowed by) step \d+.*"),
        (["--batch", "256", "--dry-run"], None),
    ],
)
def test_what_is_said_is_said_once(store, alone, tmp_path, words, message):
    words = [word.replace("FINISHED", str(alone / "topk")) for word in words]
    line = ["train", "topk", store.path, "--out", tmp_path / "sae", "--tokens", "5120", "--log-every", "2", *words]
    ended = run(tmp_path, 2, *line)
    if message is None:
        assert ended.codes == [0, 0] and ended.out.count("5 steps measured on cpu") == 1
    else:
        assert ended.codes == [2, 2] and len(ended.ours) == 1, ended.err
        assert re.fullmatch("saekit: " + message.replace("FINISHED", str(alone / "topk")), ended.ours[0])
    assert not checkpoints(tmp_path / "sae")


def test_a_folder_in_use_is_refused_by_all(store, tmp_path):
    with claimed([tmp_path / "sae"]):
        ended = run(tmp_path, 2, "train", "topk", store.path, *WORDS, "--out", tmp_path / "sae")
    assert ended.codes == [2, 2] and len(ended.ours) == 1 and "is being written by process" in ended.ours[0]


def test_a_stream_is_refused(tiny_model, tiny_text, tmp_path):
    line = ["train", "topk", "--stream", tiny_model, "--text", tiny_text, "--site", SITE, "--out", tmp_path / "sae"]
    ended = run(tmp_path, 2, *line)
    assert ended.codes == [2, 2] and ended.ours == [
        "saekit: --stream runs in one process; collect a store for torchrun, or start without torchrun"
    ]
    assert not (tmp_path / "sae").exists()


def test_ctrl_c_at_torchrun(store, tmp_path):
    """It hands the signal to its processes, which save."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saekit"]
    words = [word if word != "20480" else "200000" for word in WORDS]
    line += ["train", "topk", str(store.path), *words, "--epochs", "8", "--out", str(tmp_path / "sae")]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as parent:
        while not checkpoints(tmp_path / "sae") and parent.poll() is None:
            time.sleep(0.02)
        parent.send_signal(signal.SIGINT)
        _, said = parent.communicate(timeout=120)
    (stopped,) = re.findall(r"saekit: stopped after step (\d+) of 781, saved; the same command continues", said)
    assert int(checkpoints(tmp_path / "sae")[-1].name[5:]) == int(stopped)
