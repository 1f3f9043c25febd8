"""Many SAEs in one pass: each is the one it would be alone, whatever was cut off, added or broken."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import saekit as sk
from saekit import cli
from saekit.checkpoint import checkpoints, save_checkpoint
from saekit.config import StreamOptions
from saekit.dry_run import dry_run
from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.run import together
from saekit.store.batches import Batches
from saekit.sweep import named, read_sweep
from saekit.trainer import Trainer
from saekit.variants import VARIANTS

SITE = "blocks.0.hook_resid_post"
COMMON = """
[common]
d_sae = 128
batch = 256
tokens = 20_480
log_every = 20
checkpoint_every = 20
"""
# 80 steps; mutual_choice looks at whole batches, jumprelu has parameters and buffers of its own
FILE = (
    COMMON
    + """
[[sae]]
name = "plain"
variant = "topk"
k = [4, 8]

[[sae]]
variant = "mutual-choice"
k = 4

[[sae]]
variant = "jumprelu"
l0 = 8
lr = 0.001
"""
)
NAMES = ["plain-k4", "plain-k8", "mutual-choice", "jumprelu"]
ALONE = ["--d-sae", "128", "--batch", "256", "--tokens", "20480", "--log-every", "20", "--checkpoint-every", "20"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_text):
    """In float32, where a batch is handed on without a copy."""
    out = tmp_path_factory.mktemp("a") / "acts"
    return sk.collect(tiny_model, site=SITE, text=tiny_text, out=out, context=64, dtype="float32")


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each SAE of the file is by itself."""
    out = tmp_path_factory.mktemp("alone")
    for name, words in (
        ("plain-k4", ["topk", "--k", "4"]),
        ("plain-k8", ["topk", "--k", "8"]),
        ("mutual-choice", ["mutual-choice", "--k", "4"]),
        ("jumprelu", ["jumprelu", "--l0", "8", "--lr", "0.001"]),
    ):
        assert cli.main(["train", words[0], str(store.path), "--out", str(out / name), *words[1:], *ALONE]) == 0
    return {name: files(out / name) for name in NAMES}


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("sae.safetensors", "config.json")}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def line_of(file, store, out) -> list[str]:
    return ["train", "sweep", str(file), str(store.path), "--out", str(out)]


def refused(capsys, argv) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("saekit: ") and said.count("\n") == 1, said
    return said.removeprefix("saekit: ").rstrip()


# One pass


def test_each_is_the_one_it_would_be_alone(store, alone, tmp_path, capsys, monkeypatch):
    batches, read = [], Batches.__iter__
    monkeypatch.setattr(Batches, "__iter__", lambda self: batches.append(self) or read(self))
    assert cli.main(line_of(written(tmp_path, FILE), store, tmp_path / "saes")) == 0
    assert {name: files(tmp_path / "saes" / name) for name in NAMES} == alone
    # one reader for all of them; the others read the first rows, for the fit and for mutual_choice's calibration
    assert len([one for one in batches if one.done == 80]) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [*NAMES, "next"]
    # 80 steps are too few for jumprelu to come from all features to 8, and it says so
    l0 = json.loads((tmp_path / "saes/jumprelu/metrics.jsonl").read_text().splitlines()[-1])["l0"]
    assert l0 > 8.8 and said[3].endswith(f". L0 is {100 * (l0 / 8 - 1):.0f} % above its target of 8")
    assert all(steps(tmp_path / "saes" / name) == [1, 20, 40, 60, 80] for name in NAMES)
    assert sorted(p.name for p in (tmp_path / "saes").iterdir()) == sorted(NAMES)


def test_from_python_a_list_gives_a_list(store, alone, tmp_path):
    variants = [sk.TopK(k=4, d_sae=128), sk.TopK(k=8, d_sae=128)]
    options = {"batch": 256, "tokens": 20_480, "log_every": 20, "checkpoint_every": 20}
    saes = sk.train(variants, store, out=tmp_path, **options)
    assert [sae.variant.k for sae in saes] == [4, 8]
    assert files(tmp_path / "topk-k4") == alone["plain-k4"] and files(tmp_path / "topk-k8") == alone["plain-k8"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    # what is finished is left alone, and a dict gives names of one's own
    again = sk.train({"topk-k8": variants[1], "mine": variants[0]}, store, out=tmp_path, **options)
    assert files(tmp_path / "mine") == alone["plain-k4"] and torch.equal(again[0].W_dec, saes[1].W_dec)
    assert {p: t for p, t in before.items() if p != tmp_path} == {
        p: p.stat().st_mtime_ns for p in before if p != tmp_path
    }


def test_a_dry_run_has_a_line_for_each_and_one_for_all(store, tmp_path, capsys):
    argv = [*line_of(written(tmp_path, FILE), store, tmp_path / "saes"), "--dry-run"]
    assert cli.main(argv) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:6]] == [*NAMES, "all"]
    # 16,576 parameters each, and 128 thresholds of jumprelu
    assert [line[2 if line[0] != "all" else 1] for line in lines[1:6]] == [*["16,576"] * 3, "16,704", "66,432"]
    assert float(lines[5][-1]) == pytest.approx(sum(float(line[-1]) for line in lines[1:5]), abs=3e-4)
    assert not (tmp_path / "saes").exists()


@pytest.mark.filterwarnings("ignore:a window of")
def test_a_stream_feeds_all_of_them_at_once(tiny_model, tiny_text, tmp_path, monkeypatch, capsys):
    from saekit.stream import StreamWindow

    shared = {"context": 32, "dtype": "float32", "batch_sequences": 16}
    run = {"site": SITE, "batch": 64, "ram": "256KiB", "tokens": 6400, "device": "cpu"}
    variants = [sk.TopK(k=4, d_sae=128), sk.TopK(k=8, d_sae=128)]
    stream = StreamOptions(stream=str(tiny_model), text=(str(tiny_text),), **shared)
    table = dry_run(variants, stream=stream, out=tmp_path / "both", **run)
    assert "100 steps of 64 tokens: 6,400 rows needed" in table and not (tmp_path / "both").exists()
    computed, make = [], StreamWindow.__init__

    def counted(self, *args):
        computed.append(1)
        make(self, *args)

    monkeypatch.setattr(StreamWindow, "__init__", counted)
    one = sk.train(variants[0], stream=stream, out=tmp_path / "one", **run)
    alone, computed[:] = len(computed), []
    both = sk.train(variants, stream=stream, out=tmp_path / "both", **run)
    assert len(computed) == alone > 3
    assert torch.equal(both[0].W_dec, one.W_dec) and (tmp_path / "both/stream").is_dir()
    # the same from a file: the model and its text stand in [common], or on the command line
    text = f'[common]\nd_sae = 128\ncontext = 32\ntext = "{tiny_text}"\ndtype = "float32"\nbatch_sequences = 16\nsite = "{SITE}"\n'
    text += 'batch = 64\nram = "256KiB"\ntokens = 6400\ndevice = "cpu"\n[[sae]]\nvariant = "topk"\nk = 4\n'
    argv = [
        "train",
        "sweep",
        str(written(tmp_path, text)),
        "--stream",
        str(tiny_model),
        "--out",
        str(tmp_path / "file"),
    ]
    assert cli.main(argv) == 0
    assert torch.equal(sk.SAE.load(tmp_path / "file/topk").W_dec, one.W_dec)
    assert "saekit evaluate" in capsys.readouterr().out


# What was cut off, added or broken


@pytest.mark.parametrize("saved", [1, 5, 6, 10])
def test_killed_between_two_checkpoints_all_end_in_the_same_bytes(store, alone, tmp_path, monkeypatch, saved):
    """Of the four checkpoints of a step some are written: 1 of step 20, 1 of step 40, 2 of step 40, 2 of step 60."""
    out, count = tmp_path / "saes", 0

    def dies(*args):
        nonlocal count
        if count == saved:
            raise RuntimeError("killed")
        count += 1
        return save_checkpoint(*args)

    with monkeypatch.context() as m:
        m.setattr("saekit.run.save_checkpoint", dies)
        with pytest.raises(RuntimeError, match="killed"):
            cli.main(line_of(written(tmp_path, FILE), store, out))
    done = [len(checkpoints(out / name)) for name in NAMES]
    assert sum(done) == {1: 1, 5: 5, 6: 6, 10: 8}[saved]
    assert cli.main(line_of(tmp_path / "sweep.toml", store, out)) == 0
    assert {name: files(out / name) for name in NAMES} == alone
    assert all(steps(out / name) == [1, 20, 40, 60, 80] for name in NAMES)


def test_the_step_that_most_have_goes_first(tmp_path):
    def made(name, *at):
        for step in at:
            folder = tmp_path / name / "checkpoints" / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        return tmp_path / name

    a, b, c, d = made("a", 20, 40), made("b", 20, 40), made("c", 20), tmp_path / "d"
    assert together([a, b, c, d], {}) == ([a, b, c], 20)
    assert together([a, b, d], {}) == ([a, b], 40)
    assert together([c, d], {}) == ([c], 20) and together([d], {}) == ([d], None)
    # one whose checkpoint is damaged has the one before it
    last = a / "checkpoints/step-00000040"
    assert together([a, b], {last: "damaged"}) == ([a, b], 20)
    with pytest.raises(SaekitError, match="c is damaged"):
        together([c], {c / "checkpoints/step-00000020": "c is damaged"})


def test_a_damaged_checkpoint_of_one_takes_all_to_the_step_before(store, alone, tmp_path, monkeypatch, capsys):
    out = tmp_path / "saes"
    assert cli.main(line_of(written(tmp_path, FILE), store, out)) == 0
    for name in NAMES:
        (out / name / "config.json").unlink()
    broken = checkpoints(out / "plain-k8")[-1]
    (broken / "state.safetensors").write_bytes(b"")
    monkeypatch.setattr(Progress, "quiet", False)
    assert cli.main(line_of(tmp_path / "sweep.toml", store, out)) == 0
    said = capsys.readouterr().err
    assert f"checkpoint {broken} is damaged" in said and "continues after step 60" in said
    assert {name: files(out / name) for name in NAMES} == alone


def test_an_added_entry_is_trained_once_the_rest_is_finished(store, alone, tmp_path, monkeypatch):
    """The rest was killed at step 50, with a checkpoint at 40; the new one begins after it, in a pass of its own."""
    step, out = Trainer.step, tmp_path / "saes"

    def dies(self, x):
        if self.step_count == 50:
            raise RuntimeError("killed")
        return step(self, x)

    first = FILE[: FILE.index('[[sae]]\nvariant = "mutual-choice"')]
    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", dies)
        with pytest.raises(RuntimeError, match="killed"):
            cli.main(line_of(written(tmp_path, first), store, out))
    order = []

    def noted(self, *args):
        order.append((self.variant.name, self.step_count))
        return step(self, *args)

    monkeypatch.setattr(Trainer, "step", noted)
    assert cli.main(line_of(written(tmp_path, FILE), store, out)) == 0
    assert order[0] == ("topk", 40) and order[80] == ("mutual_choice", 0)
    assert {name: files(out / name) for name in NAMES} == alone


def test_a_changed_entry_is_refused_by_name(store, tmp_path, capsys):
    out = tmp_path / "saes"
    text = COMMON.replace("20_480", "2_560") + '[[sae]]\nname = "a"\nvariant = "topk"\nk = 4\n'
    assert cli.main(line_of(written(tmp_path, text), store, out)) == 0
    line = refused(capsys, line_of(written(tmp_path, text + "aux = 0\n"), store, out))
    assert line == f"{out}/a was trained with --aux 0.03125, now 0.0; use another name or a new --out"
    (out / "a/config.json").unlink()
    line = refused(capsys, line_of(tmp_path / "sweep.toml", store, out))
    assert line == f"{out}/a was begun with --aux 0.03125, now 0.0; use the first options or a new --out"
    # and so is what the whole pass shares, before anything is done for an entry that is new
    text += '[[sae]]\nname = "b"\nvariant = "topk"\nk = 8\n'
    line = refused(capsys, line_of(written(tmp_path, text.replace("256\n", "128\n")), store, out))
    assert line == f"{out}/a was begun with --batch 256, now 128; use the first options or a new --out"
    assert not (out / "b").exists()


def test_one_that_is_not_finite_ends_there_and_the_others_go_on(store, alone, tmp_path, capsys):
    out = tmp_path / "saes"
    text = FILE + '[[sae]]\nname = "wild"\nvariant = "topk"\nk = 4\nlr = 1e38\n'
    line = refused(capsys, line_of(written(tmp_path, text), store, out))
    assert line.startswith(f"1 of 5 SAEs ended early: {out}/wild: ") and re.search(
        r"(NaN in|overflowed by) step [12]\b", line
    )
    assert {name: files(out / name) for name in NAMES} == alone
    assert not (out / "wild/config.json").exists() and not checkpoints(out / "wild")
    # the same command finds the same
    assert refused(capsys, line_of(tmp_path / "sweep.toml", store, out)) == line


def test_folders_that_are_something_else(store, tmp_path, capsys):
    file, out = written(tmp_path, FILE), tmp_path / "saes"
    (out / "jumprelu").mkdir(parents=True)
    (out / "jumprelu/notes.txt").write_text("mine")
    line = refused(capsys, line_of(file, store, out))
    assert line == f"{out}/jumprelu is not empty and not a run; choose another --out"
    assert [p.name for p in out.iterdir()] == ["jumprelu"]
    shutil.rmtree(out / "jumprelu")
    (out / "run.json").write_text("{}")
    line = refused(capsys, line_of(file, store, out))
    assert line == f"{out} is a run, not a folder for several; choose another --out"


# The file


def test_lists_are_expanded_and_give_the_product(tmp_path):
    text = """
    [common]
    batch = 512
    lr = 1
    text = "a.txt"
    [[sae]]
    variant = "topk"
    k = [16, 32]
    lr = [0.1, 1]
    [[sae]]
    name = "m"
    variant = "matryoshka"
    d_sae = 64
    widths = [[16, 64], [32, 64]]
    [[sae]]
    name = "n"
    variant = "matryoshka"
    d_sae = 64
    widths = [8, 64]
    normalise = ["unit", "none"]
    """
    sweep = read_sweep(written(tmp_path, text))
    names = ["topk-lr0.1-k16", "topk-lr0.1-k32", "topk-lr1.0-k16", "topk-lr1.0-k32"]
    names += ["m-widths16x64", "m-widths32x64", "n-normalise-unit", "n-normalise-none"]
    # the first field turns slowest, in the order of the help
    assert list(sweep.variants) == names
    assert sweep.variants["topk-lr0.1-k32"] == sk.TopK(k=32, lr=0.1)
    assert sweep.variants["m-widths32x64"] == VARIANTS["matryoshka"](d_sae=64, widths=(32, 64), lr=1.0)
    assert sweep.options == {"batch": 512} and sweep.stream == {"text": ("a.txt",)}
    # as on the command line, whole numbers become numbers where the option takes one
    assert type(sweep.variants["m-widths16x64"].lr) is float


def test_names_in_python_tell_what_differs():
    assert list(named([sk.TopK(k=16), sk.TopK(k=32)])) == ["topk-k16", "topk-k32"]
    assert list(named([sk.TopK(), VARIANTS["abs_topk"]()])) == ["topk", "abs-topk"]
    two = [sk.TopK(d_sae=64, k=4), sk.TopK(normalise="none", k=4)]
    assert list(named(two)) == ["topk-d-sae64-normalise-unit", "topk-d-sae-none-normalise-none"]
    with pytest.raises(SaekitError, match="two SAEs are called topk: their options are equal"):
        named([sk.TopK(), sk.TopK()])
    with pytest.raises(SaekitError, match="no SAE named"):
        named([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE has no [[sae]]; write one for each SAE, with its variant"),
        (
            '[[sae]]\nvariant = "topk"\n[[sae]]\nvariant = "relu"\n[[sae]]\nk = 3\n',
            "FILE: [[sae]] 3 has no variant; there are ",
        ),
        ('[[sae]]\nvariant = "topkk"\n', "FILE: [[sae]] 1: no variant topkk; nearest: topk"),
        (
            '[[sae]]\nvariant = "topk"\nk = [32]\n[[sae]]\nvariant = "topk"\nk = [32]\n',
            "FILE: two SAEs are called topk-k32; give their entries different names",
        ),
        (
            '[[sae]]\nvariant = "relu"\n[[sae]]\nvariant = "topk"\ntokens = 5\n',
            "FILE: [[sae]] 2: tokens belongs to [common]",
        ),
        ('[[sae]]\nvariant = "topk"\ncontext = 5\n', "FILE: [[sae]] 1: context belongs to [common]"),
        ('[[sae]]\nvariant = "jumprelu"\nk = 3\n', "FILE: [[sae]] 1: jumprelu has no option k; did you mean l0"),
        (
            '[common]\nbatches = 3\n[[sae]]\nvariant = "topk"\n',
            "FILE: [common]: this sweep has no option batches; did you mean batch",
        ),
        (
            '[common]\nl0 = 3\n[[sae]]\nvariant = "topk"\n',
            "FILE: [common]: this sweep has no option l0; did you mean k",
        ),
        ('[common]\nbatch = 0\n[[sae]]\nvariant = "topk"\n', "--batch is 0; it must be at least 1"),
        (
            '[common]\nbatch = 1.5\n[[sae]]\nvariant = "topk"\n',
            "FILE: [common]: batch = 1.5 does not fit; it takes a whole number",
        ),
        (
            '[[sae]]\nvariant = "topk"\nk = "many"\n',
            "FILE: [[sae]] 1: k = 'many' does not fit; it takes a whole number",
        ),
        (
            '[[sae]]\nvariant = "topk"\nk = [4, true]\n',
            "FILE: [[sae]] 1: k = True does not fit; it takes a whole number",
        ),
        ('[[sae]]\nvariant = "topk"\nk = []\n', "FILE: [[sae]] 1: k = [] names no value"),
        (
            '[[sae]]\nvariant = "topk"\nnormalise = "unity"\n',
            "FILE: [[sae]] 1: normalise = 'unity' does not fit; it takes unit, mean_square, sqrt_d, none",
        ),
        (
            '[[sae]]\nvariant = "matryoshka"\nwidths = ["a"]\n',
            "FILE: [[sae]] 1: widths = ['a'] does not fit; it takes a list of whole numbers",
        ),
        ('[[sae]]\nvariant = "topk"\nk = 0\n', "FILE: [[sae]] 1: k = 0 keeps no feature; pass --k 1 or more"),
        (
            '[[sae]]\nname = "a/b"\nvariant = "topk"\n',
            "FILE: [[sae]] 1: 'a/b' cannot be the name of a folder; use letters, digits, - and _, but not stream",
        ),
        ("k = 3\n", "FILE: k stands outside [common] and [[sae]]; move it into one of them"),
        ('[sae]\nvariant = "topk"\n', "FILE: write [common] once and [[sae]] for each SAE"),
        ("[[sae]\n", "FILE is not valid TOML ("),
        (
            '[common]\nbatch = 30\nmicro_batches = 4\n[[sae]]\nvariant = "topk"\n',
            "--batch 30 is not divisible by 4 micro-batches; 28 or 32 is",
        ),
        (
            '[common]\nd_sae = 16\n[[sae]]\nvariant = "topk"\n',
            "FILE: [[sae]] 1: k = 32 exceeds d_sae = 16; lower --k or raise --d-sae",
        ),
    ],
)
def test_what_does_not_fit_in_a_file(store, tmp_path, capsys, text, message):
    file = written(tmp_path, text)
    line = refused(capsys, line_of(file, store, tmp_path / "saes"))
    assert line.startswith(message.replace("FILE", str(file)))
    assert not (tmp_path / "saes").exists()


def test_no_file(store, tmp_path, capsys):
    assert (
        refused(capsys, line_of(tmp_path / "none.toml", store, tmp_path / "x")) == f"no such file: {tmp_path}/none.toml"
    )
    assert refused(capsys, ["train", "sweep", str(store.path), "--out", "x"]).startswith("no sweep file named")
    line = refused(capsys, [*line_of(written(tmp_path, FILE), store, tmp_path / "x"), "--k", "3"])
    assert line == "sweep has no option --k; saekit train sweep --help lists them"
    # what is typed goes before [common]
    argv = [*line_of(tmp_path / "sweep.toml", store, tmp_path / "x"), "--tokens", "2560"]
    assert cli.main(argv) == 0 and steps(tmp_path / "x/jumprelu") == [1, 10]


@pytest.mark.long
def test_killed_at_any_moment(store, tmp_path):
    """SIGKILL at random moments of beginning, training, saving and ending, until ten have struck; then once to the end."""
    random, out, killed, rounds = np.random.default_rng(0), tmp_path / "saes", 0, 0
    line = [sys.executable, "-m", "saekit", *line_of(written(tmp_path, FILE), store, out)]
    start = time.monotonic()
    subprocess.run([*line[:-1], str(tmp_path / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - start
    # processes of their own choose the arithmetic of this machine
    whole = {name: files(tmp_path / "whole" / name) for name in NAMES}
    while killed < 10:
        rounds += 1
        assert rounds < 60
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(random.uniform(0.5 * seconds, seconds))
            killed += process.poll() is None
            process.kill()
        if all((out / name / "config.json").exists() for name in NAMES):
            assert {name: files(out / name) for name in NAMES} == whole
            shutil.rmtree(out)
    subprocess.run(line, check=True, capture_output=True)
    assert {name: files(out / name) for name in NAMES} == whole
    assert not list(out.glob("**/*.partial")) and not list(out.glob("**/*.tmp"))
