"""The run around the step: folder, log, resume to the bit, refusals, what is told to others."""

import errno
import importlib.machinery
import json
import re
import shlex
import shutil
import signal
import sys
import types
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import saekit as sk
from saekit import cli
from saekit.checkpoint import checkpoints
from saekit.config import RunOptions
from saekit.dry_run import dry_run
from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.plan import Plan, check_batch
from saekit.progress import Progress
from saekit.ranks import Ranks
from saekit.run_folder import claimed, off_target, state_of, summary
from saekit.store.format import read_header, shard_name
from saekit.tracking import tags_of
from saekit.trainer import Trainer
from saekit.variants import VARIANTS

SITE = "blocks.0.hook_resid_post"


def collected(model, text, out, site: tuple[str, ...] = (SITE,), **options):
    return sk.collect(model, site=site, text=text, out=out, **{"context": 64, **options})


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_text):
    return collected(tiny_model, tiny_text, tmp_path_factory.mktemp("a") / "acts")


@pytest.fixture(scope="module")
def sites(tmp_path_factory, tiny_model, tiny_text):
    """A small store of two sites."""
    return collected(
        tiny_model,
        tiny_text,
        tmp_path_factory.mktemp("s") / "acts",
        (SITE, "blocks.1.hook_resid_post"),
        tokens=4000,
        finish=True,
    )


# 80 steps; the list of dead features is rebuilt at step 64; the last checkpoints are those of steps 60 and 80
OPTIONS = {"batch": 256, "tokens": 256 * 80, "log_every": 10, "checkpoint_every": 20}
VARIANT = sk.TopK(k=4, d_sae=128)
WORDS = ["--k", "4", "--d-sae", "128", "--batch", "256", "--tokens", "20480", "--log-every", "10"]
WORDS += ["--checkpoint-every", "20"]


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("sae.safetensors", "config.json")}


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def edited(folder, **changes):
    """run.json with entries changed; `a__b` is b of a."""
    run = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        place = run
        for part in path:
            place = place[part]
        place[last] = value
    (folder / "run.json").write_text(json.dumps(run))


def refused(capsys, *argv) -> str:
    """The one line of a command that ends with exit code 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("saekit: ") and said.count("\n") == 1, said
    return said.removeprefix("saekit: ").rstrip()


def dies_at(monkeypatch, step: int, method: str = "step"):
    own = getattr(Trainer, method)

    def dies(self, *args):
        if self.step_count == step:
            raise RuntimeError("killed")
        return own(self, *args)

    monkeypatch.setattr(Trainer, method, dies)


# The folder and its log


def test_folder_and_log(store, tmp_path):
    sae = sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    run = json.loads((tmp_path / "sae/run.json").read_text())
    assert run["store"]["fingerprint"] == store.fingerprint
    assert run["computed"]["steps"] == 80 and run["computed"]["micro_batch"] == 256
    # 20,480 tokens / 20
    assert run["computed"]["dead_after"] == 1024 and run["computed"]["lr"] == sae.config["provenance"]["training"]["lr"]
    assert run["environment"]["ranks"] == 1 and run["environments"][0]["from_step"] == 0
    log = metrics(tmp_path / "sae")
    # the first line stands behind the first step: the losses of the initial weights
    assert [line["step"] for line in log] == [1, 10, 20, 30, 40, 50, 60, 70, 80]
    assert [line["tokens"] for line in log] == [256 * line["step"] for line in log]
    keys = ["step", "tokens", "seconds", "loss", "rec", "fvu", "l0", "dead", "lr", "grad_norm", "budget_unspent"]
    keys += ["data_wait", "tokens_per_s"]
    assert [key for key in log[-1] if key != "aux"] == keys
    assert log[-1]["l0"] <= 4.0 and any("aux" in line for line in log)
    assert [folder.name for folder in checkpoints(tmp_path / "sae")] == ["step-00000060", "step-00000080"]
    assert not list(tmp_path.glob("**/*.partial")) and not (tmp_path / "sae/.lock").exists()
    # a checkpoint is a complete SAE, and the saved one loads back to the same codes
    assert sk.SAE.load(checkpoints(tmp_path / "sae")[0]).d_sae == 128
    x = store.read(SITE, 0, 64).float()
    assert torch.equal(sk.SAE.load(tmp_path / "sae").encode(x).dense(), sae.encode(x).dense())
    assert re.fullmatch(
        r"FVU 0\.\d{3}, L0 \d\.\d, \d+ of 128 features silent for 1,024 tokens \(training rows; saekit evaluate .*/sae "
        r"measures held-out ones\)(. L0 is \d+ % below its target of 4)?",
        summary(tmp_path / "sae"),
    )


def test_buffers_stand_behind_the_measures_and_prefixes_are_no_losses(store, tmp_path):
    sk.train(sk.VARIANTS["matryoshka"](k=4, d_sae=128, widths=(32, 128)), store, out=tmp_path / "m", **OPTIONS)
    line = metrics(tmp_path / "m")[-1]
    assert set(tags_of(line)) == {
        *("tokens", "seconds", "loss", "loss/rec", "loss/aux", "fvu", "fvu_32", "l0", "dead", "lr", "grad_norm"),
        *("budget_unspent", "threshold", "data_wait", "tokens_per_s"),
    }


def test_all_checkpoints_can_stay(store, tmp_path):
    sk.train(VARIANT, store, out=tmp_path / "sae", keep="all", **OPTIONS)
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "sae")] == [20, 40, 60, 80]


def test_two_runs_are_equal_to_the_byte_and_another_seed_is_not(store, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sk.train(VARIANT, store, out=tmp_path / name, seed=seed, **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["sae.safetensors"] != files(tmp_path / "c")["sae.safetensors"]


def test_the_end_is_calibrated_on_the_first_rows_of_the_order(store, tmp_path, monkeypatch):
    """Killed between the last checkpoint and the end, a run has only the end to do."""
    variant = sk.VARIANTS["mutual_choice"](k=4, d_sae=128)
    whole = sk.train(variant, store, out=tmp_path / "whole", **OPTIONS)
    # all training rows: there are fewer than 262,144
    rows = len(store.valid_rows([SITE], split="train"))
    assert whole.config["options"] == {"k": 4, "threshold_source": "calibration", "calibration_rows": rows}
    with monkeypatch.context() as m:
        dies_at(m, 80, "finish")
        with pytest.raises(RuntimeError, match="killed"):
            sk.train(variant, store, out=tmp_path / "cut", **OPTIONS)
    assert not (tmp_path / "cut/config.json").exists()
    sk.train(variant, store, out=tmp_path / "cut", **OPTIONS)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


@pytest.mark.parametrize(("batch", "epochs"), [(256, 1), (20_000, 2)])
def test_first_rows_are_those_of_epoch_0_each_once(sites, tmp_path, batch, epochs):
    """Also where an epoch ends inside a batch, or is shorter than one."""
    rows = sites.valid_rows([SITE], split="train")
    batch = min(batch, epochs * len(rows))
    plan = Plan({tmp_path / "x": VARIANT}, sites, RunOptions(site=SITE, batch=batch, epochs=epochs))
    found = torch.cat(list(plan.first_rows(1 << 20)))
    expected = sites.read(SITE, 0, sites.rows).float()[rows]
    assert len(found) == len(rows)
    # each row once: as sets with repetition both are equal
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
    order = next(iter(sites.batches([SITE], batch=min(100, len(rows)), seed=0)))
    first = torch.cat(list(plan.first_rows(100)))
    assert torch.equal(first, order[SITE].float())


# Stopping and going on


@pytest.mark.parametrize("at", [1, 17, 71])
def test_a_killed_run_continues_to_the_same_bytes(store, tmp_path, monkeypatch, at):
    sk.train(VARIANT, store, out=tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as m:
        dies_at(m, at)
        with pytest.raises(RuntimeError, match="killed"):
            sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)
    with pytest.raises(SaekitError, match="unfinished run"):
        sk.SAE.load(tmp_path / "cut")
    # a checkpoint that was being written, of a step that none will be made of again
    (tmp_path / "cut/checkpoints/step-00000033.partial").mkdir(parents=True)
    # these may differ when a run continues
    free = {**OPTIONS, "log_every": 7, "checkpoint_every": 11, "keep": "all"}
    sk.train(VARIANT, store, out=tmp_path / "cut", **free)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    assert not list(tmp_path.glob("**/*.partial"))
    steps = [line["step"] for line in metrics(tmp_path / "cut")]
    assert steps == sorted(set(steps)) and steps[-1] == 80


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_continue(store, tmp_path, monkeypatch, capsys, number, code):
    step = Trainer.step

    def signalled(self, x):
        if self.step_count == 7:
            signal.raise_signal(number)
        return step(self, x)

    monkeypatch.setattr(Trainer, "step", signalled)
    assert cli.main(["train", "topk", str(store.path), "--out", str(tmp_path / "sae"), *WORDS]) == code
    assert capsys.readouterr().err == "saekit: stopped after step 8 of 80, saved; the same command continues\n"
    assert checkpoints(tmp_path / "sae")[-1].name == "step-00000008"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Stop().signal is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(store, tmp_path, monkeypatch, capsys):
    sk.train(VARIANT, store, out=tmp_path / "whole", **OPTIONS)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/config.json").unlink()
    before, last = checkpoints(tmp_path / "cut")
    for folder in (last, before):
        state = folder / "state.safetensors"
        whole = state.read_bytes()
        state.write_bytes(whole[:1000])
        if folder == last:
            monkeypatch.setattr(Progress, "quiet", False)
            sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)
            said = capsys.readouterr().err
            assert f"checkpoint {last} is damaged" in said and "continues after step 60" in said
            assert files(tmp_path / "whole") == files(tmp_path / "cut")
            (tmp_path / "cut/config.json").unlink()
            last.joinpath("state.safetensors").write_bytes(b"")
    # none is left to go on from
    with pytest.raises(SaekitError, match=r"checkpoint .* is damaged"):
        sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)


def test_a_run_continues_with_the_threads_of_its_first_start(store, tmp_path, monkeypatch):
    sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    (tmp_path / "sae/config.json").unlink()
    edited(tmp_path / "sae", environment__threads=3)
    seen, finish, before = [], Trainer.finish, torch.get_num_threads()
    monkeypatch.setattr(Trainer, "finish", lambda self, *a: seen.append(torch.get_num_threads()) or finish(self, *a))
    sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    assert seen == [3] and torch.get_num_threads() == before


def test_another_environment_is_refused_or_recorded(store, tmp_path, capsys):
    argv = ["train", "topk", store.path, "--out", tmp_path / "sae", *WORDS]
    sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    (tmp_path / "sae/config.json").unlink()
    shutil.rmtree(checkpoints(tmp_path / "sae")[-1])
    old = json.loads((tmp_path / "sae/run.json").read_text())["environments"][0] | {"torch": "2.0.0"}
    edited(tmp_path / "sae", environments=[old])
    assert refused(capsys, *argv) == (
        f"{tmp_path}/sae was begun with torch 2.0.0, now {torch.__version__}; pass --accept-environment to go on "
        "without equality to the last bit, or use a new --out"
    )
    assert cli.main([*map(str, argv), "--accept-environment"]) == 0
    run = json.loads((tmp_path / "sae/run.json").read_text())
    assert [(e["from_step"], e["torch"]) for e in run["environments"]] == [(0, "2.0.0"), (60, torch.__version__)]


def test_a_full_disk_keeps_the_last_checkpoint(store, tmp_path, monkeypatch, capsys):
    argv = ["train", "topk", store.path, "--out", tmp_path / "sae", *WORDS]
    sk.train(VARIANT, store, out=tmp_path / "whole", **OPTIONS)
    from saekit import checkpoint

    write, calls = checkpoint.write_tensors, 0

    def full(path, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            path.write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "write_tensors", full)
        line = refused(capsys, *argv)
    assert re.fullmatch(
        rf"{tmp_path}/sae: disk full, 2\d\d KiB wanted, .* free: free .*; the same command then continues after step 40, the "
        r"last checkpoint",
        line,
    )
    assert [int(p.name[5:]) for p in checkpoints(tmp_path / "sae")] == [20, 40]
    assert not list(tmp_path.glob("**/*.partial"))
    assert cli.main(list(map(str, argv))) == 0
    assert files(tmp_path / "whole") == files(tmp_path / "sae")


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(store, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 300 << 10))
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "sae", *WORDS)
    # two checkpoints that stay and one that is being written, 260 KiB each
    assert (
        line
        == f"checkpoints and SAE need 780 KiB, 300 KiB are free at {tmp_path}; free 480 KiB or choose another --out"
    )
    assert not (tmp_path / "sae").exists()


def spoiled(store, folder: Path, row: int):
    """A copy of a store with NaN in a row: damage that only a checksum shows."""
    shutil.copytree(store.path, folder)
    path = folder / shard_name(SITE, 0)
    with open(path, "r+b") as f:
        f.seek(read_header(path)["activations"].start + row * store.row_bytes(SITE))
        f.write(b"\xc0\x7f")  # a quiet NaN in bfloat16
    return folder


def test_numbers_that_are_not_finite_end_the_run_naming_step_and_row(store, tmp_path, capsys):
    row = int(store.valid_rows([SITE], split="train")[1234])
    bad = spoiled(store, tmp_path / "acts", row)
    batches = [b.rows.tolist() for b in store.batches([SITE], batch=256, seed=0)]
    at = next(i for i, rows in enumerate(batches) if row in rows)
    words = [w if w != "20480" else str(256 * len(batches)) for w in WORDS]
    line = refused(capsys, "train", "topk", bad, "--out", tmp_path / "sae", *words)
    assert re.search(rf"became infinite or NaN in step {at + 1}\b", line)
    assert line.endswith(f"; NaN or infinity in row {row:,} of {bad}: run  saekit check {bad}")
    # nothing has been written since
    assert all(int(p.name[5:]) <= at for p in checkpoints(tmp_path / "sae"))
    assert all(entry["step"] <= at for entry in metrics(tmp_path / "sae"))
    assert not (tmp_path / "sae/config.json").exists()
    assert "sha256" in refused(capsys, "check", bad)


def test_an_infinite_step_on_finite_rows_says_so(store, tmp_path, capsys):
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "sae", *WORDS, "--lr", "1e38")
    assert line.endswith(f"; the rows of {store.path} that were read are finite")


def test_l0_off_its_target_is_said():
    assert off_target({"k": 32}, 35.1) is None
    assert off_target({"k": 32}, 24.0) == "L0 is 25 % below its target of 32"
    assert off_target({"l0": 10.0, "l1": None}, 15.0) == "L0 is 50 % above its target of 10"
    # a penalty set by hand aims at nothing
    assert off_target({"l0": 10.0, "l1": 0.1}, 15.0) is None
    assert off_target({"lam": 1.0}, 15.0) is None


# What bad input gets


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("f") / "sae"
    sk.train(VARIANT, store, out=out, **OPTIONS)
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "512", "--d-sae", "256"], "k = 512 exceeds d_sae = 256; lower --k or raise --d-sae"),
        (["--site", "blocks.0.hook_resid_pst"], f"no site blocks.0.hook_resid_pst in ACTS; nearest: {SITE}"),
        (["--site", "zzz"], f"no site zzz in ACTS; it holds {SITE}"),
        (
            ["--tokens", "1G"],
            "run needs 1,000,000,000 rows, the training part of ACTS has 27,718; pass --epochs 36078 or collect more",
        ),
        (
            ["--batch", "1000000"],
            "one step needs --batch 1,000,000 rows, the run has 27,718; lower --batch or collect more",
        ),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0; it must be at least 1"),
        (["--batch", "256", "--micro-batches", "3"], "--batch 256 is not divisible by 3 micro-batches; 255 or 258 is"),
        (["--device", "cuda:7"], "device cuda:7 is not available here; pass --device cpu or auto"),
        (["--l0", "3"], "topk has no option --l0; did you mean --k"),
        (["--epoch", "3"], "topk has no option --epoch; did you mean --epochs"),
        (["--frobnicate"], "topk has no option --frobnicate; saekit train topk --help lists them"),
        (["--keep", "3"], "invalid choice '3' for argument '--keep'. Expected one of ('2', 'all'); .*"),
        (["--k", "many"], "Error parsing --k: .*many.*; saekit train topk --help lists the options"),
    ],
)
def test_refused_before_step_0_and_nothing_is_left(store, tmp_path, capsys, words, message):
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "sae", *words)
    pattern = re.escape(message.replace("ACTS", str(store.path))).replace(r"\.\*", ".*")
    assert re.fullmatch(pattern, line), line
    assert not (tmp_path / "sae").exists()


def test_unknown_variants_and_options_get_the_nearest(store, tmp_path, capsys):
    argv = ["--out", tmp_path / "sae"]
    assert refused(capsys, "train", "topkk", store.path, *argv) == "no variant topkk; nearest: topk"
    line = refused(capsys, "train", "jumprelu", store.path, *argv, "--k", "3")
    assert line == "jumprelu has no option --k; did you mean --l0"


def test_the_site_must_be_named_where_there_are_several(sites, tmp_path, capsys):
    line = refused(capsys, "train", "topk", sites.path, "--out", tmp_path / "sae")
    assert line == f"{sites.path} holds 2 sites: {SITE}, blocks.1.hook_resid_post; pass --site"


def test_an_unfinished_run_of_other_options_or_another_store(store, sites, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "sae")
    (out / "config.json").unlink()
    words = [w if w != "4" else "8" for w in WORDS]
    line = refused(capsys, "train", "topk", store.path, "--out", out, *words)
    assert line == f"{out} was begun with --k 4, now 8; use the first options or a new --out"
    line = refused(capsys, "train", "abs-topk", store.path, "--out", out, *WORDS)
    assert line == f"{out} was begun with variant topk, now abs_topk; use the first options or a new --out"
    edited(out, identity__store="sha256:" + "0" * 64)
    line = refused(capsys, "train", "topk", store.path, "--out", out, *WORDS)
    assert line.startswith(f"{out} was begun with store sha256:00000000..., now {store.fingerprint[:15]}...; use")
    edited(out, format="other")
    assert "run.json cannot be read (format is not saekit-run)" in refused(
        capsys, "train", "topk", store.path, "--out", out, *WORDS
    )


def test_a_checkpoint_of_another_store(store, finished, tiny_model, tmp_path, capsys):
    """run.json belongs to the store asked for, the checkpoints beside it do not."""
    (tmp_path / "t.txt").write_text("def one():\n    return 1\n" * 400)  # some 3,000 rows
    other = collected(tiny_model, tmp_path / "t.txt", tmp_path / "other")
    out = shutil.copytree(finished, tmp_path / "sae")
    (out / "config.json").unlink()
    shutil.rmtree(checkpoints(out)[-1])
    words = ["--k", "4", "--d-sae", "128", "--batch", "256", "--tokens", "20480", "--epochs", "8"]
    assert cli.main(["train", "topk", str(other.path), "--out", str(tmp_path / "mine"), *words]) == 0
    shutil.copy(tmp_path / "mine/run.json", out / "run.json")
    line = refused(capsys, "train", "topk", other.path, "--out", out, *words)
    assert line.startswith(
        f"checkpoint reads store {store.fingerprint[:11]}..., {other.path} is {other.fingerprint[:11]}..."
    )


def test_finished_foreign_and_locked_folders(store, finished, tmp_path, capsys):
    line = refused(capsys, "train", "topk", store.path, "--out", finished, *WORDS)
    assert line == f"{finished} is a finished run; choose another --out"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "foreign", *WORDS)
    assert line == f"{tmp_path}/foreign is not empty and not a run; choose another --out"
    with claimed([tmp_path / "sae"]):
        line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "sae", *WORDS)
    assert re.match(rf"{tmp_path}/sae is being written by process \d+", line)
    assert not (tmp_path / "sae").exists()
    # killed while it wrote run.json, a run has not begun
    (tmp_path / "new").mkdir()
    (tmp_path / "new/run.json.tmp").write_text("{")
    assert state_of(tmp_path / "new") == "new"
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "file" / "sae", *WORDS)
    assert line == f"cannot write to {tmp_path}/file/sae: not a directory"


def test_batches_must_be_divisible():
    check_batch(RunOptions(batch=4096, micro_batches=2), Ranks(size=4))
    for options, size, message in (
        ({"batch": 4096, "micro_batches": 2}, 3, "4096 is not divisible by 3 ranks × 2 micro-batches; 4092 or 4098 is"),
        ({"batch": 100}, 3, "100 is not divisible by 3 ranks; 99 or 102 is"),
        ({"batch": 2, "micro_batches": 3}, 1, "2 is not divisible by 3 micro-batches; 3 is"),
    ):
        with pytest.raises(SaekitError) as error:
            check_batch(RunOptions(**options), Ranks(size=size))
        assert str(error.value) == f"--batch {message}"


def test_micro_batches_are_another_experiment_for_rules_that_look_at_the_batch_alone(store, tmp_path):
    few = {**OPTIONS, "tokens": 256 * 10}
    runs = {}
    for name in ("topk", "mutual_choice"):
        for parts in (1, 2):
            out = tmp_path / f"{name}-{parts}"
            # AuxK is divided by the variance of its own rows, so it is off
            sk.train(VARIANTS[name](k=4, d_sae=128, aux=0.0), store, out=out, micro_batches=parts, **few)
            runs[name, parts] = metrics(out)[-1]["fvu"]
            assert json.loads((out / "run.json").read_text())["computed"]["micro_batch"] == 256 // parts
    assert runs["topk", 1] == pytest.approx(runs["topk", 2], rel=1e-4)
    assert runs["mutual_choice", 1] != pytest.approx(runs["mutual_choice", 2], rel=1e-4)


def test_evaluate_without_the_store_or_with_another_width(store, sites, tmp_path, capsys):
    acts = shutil.copytree(store.path, tmp_path / "acts")
    out = tmp_path / "sae"
    assert cli.main(["train", "topk", str(acts), "--out", str(out), *WORDS]) == 0
    shutil.move(acts, tmp_path / "elsewhere")
    line = refused(capsys, "evaluate", out, "--tiers", "1")
    assert line == f"the store of {out}, {acts}, is not there; pass --store"
    shutil.copytree(sites.path, acts)
    line = refused(capsys, "evaluate", out, "--tiers", "1")
    assert line.startswith(f"{out} was trained on store {store.fingerprint[:15]}..., {acts} is now sha256:")
    line = refused(capsys, "evaluate", out, "--store", sites.path, "--site", "blocks.9.hook_resid_post", "--tiers", "1")
    assert "blocks.9.hook_resid_post" in line
    module, inputs = torch.nn.Sequential(torch.nn.Linear(3, 32)), [torch.randn(16, 3) for _ in range(4)]
    other = sk.collect(module, site="0", inputs=inputs, out=tmp_path / "narrow")
    line = refused(capsys, "evaluate", out, "--store", other.path, "--site", "0", "--force", "--tiers", "1")
    assert line == "SAE expects D = 64, site 0 has 32"
    with pytest.raises(SaekitError, match="this Trainer was made for d_model = 64, the batch has width 32"):
        Trainer(VARIANT, 64).step(torch.zeros(4, 32))


# A variant of one's own


OWN = '''"""A variant of one's own."""
from dataclasses import dataclass
from typing import ClassVar

from saekit.variants import TopK

{more}
@dataclass(frozen=True, kw_only=True)
class Halved(TopK):
    """c = relu(pre) on the k largest pre of each row"""

    name: ClassVar[str] = "{name}"

    share: float = 0.5
    """Nobody uses it."""
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr("saekit.variants.files.VARIANTS", VARIANTS)
    before = dict(VARIANTS)
    path = tmp_path / "my.py"
    path.write_text(OWN.format(name="my_halved", more=""))
    yield path
    VARIANTS.clear()
    VARIANTS.update(before)


def test_a_variant_file_is_known_from_its_name_on(own, store, tmp_path, capsys):
    line = refused(capsys, "train", "my-halved", store.path, "--out", tmp_path / "a")
    assert line.startswith("no variant my-halved; ")
    argv = [str(store.path), "--out", str(tmp_path / "a"), *WORDS, "--share", "0.25"]
    assert cli.main(["train", "my-halved", *argv, "--variant-file", str(own)]) == 0
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert run["variant"]["share"] == 0.25 and run["identity"]["--variant-file"].startswith("sha256:")
    assert sk.SAE.load(tmp_path / "a").config["variant"] == "my_halved"
    # the same file again, in front; a changed one is another experiment
    argv[2] = str(tmp_path / "b")
    assert cli.main(["train", f"--variant-file={own}", "my-halved", *argv]) == 0
    assert files(tmp_path / "a")["sae.safetensors"] == files(tmp_path / "b")["sae.safetensors"]
    (tmp_path / "b/config.json").unlink()
    own.write_text(own.read_text() + "\n")
    line = refused(capsys, "train", "my-halved", *argv, "--variant-file", own)
    assert line.startswith(f"{tmp_path}/b was begun with --variant-file sha256:")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file: FILE"),
        ("x = 1\n", "FILE defines no variant: a class derived from saekit.variants.Variant, with a name"),
        ("import nothing_here\n", "FILE, line 1: ModuleNotFoundError: No module named 'nothing_here'"),
        ("x = 1\ny = (\n", "FILE, line 2: SyntaxError: '(' was never closed (my.py, line 2)"),
        (OWN.format(name="topk", more=""), "FILE: the name topk is taken by saekit.variants.topk; give Halved another"),
    ],
)
def test_variant_files_that_cannot_be_used(own, store, tmp_path, capsys, text, message):
    own.unlink()
    if text is not None:
        own.write_text(text)
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "a", "--variant-file", own)
    assert line == message.replace("FILE", str(own))
    assert VARIANTS["topk"] is sk.TopK


# What a run would take


def test_dry_run_says_what_a_run_takes_and_writes_nothing(store, tmp_path, capsys):
    assert cli.main(["train", "topk", str(store.path), "--out", str(tmp_path / "sae"), *WORDS, "--dry-run"]) == 0
    head, row, rows, time = capsys.readouterr().out.splitlines()
    assert head.split() == ["features", "parameters", "memory", "checkpoint", "on", "disk", "s/step"]
    # 2·128·64 + 128 + 64 = 16,576 parameters of 4 bytes; a copy of the two matrices for gradients, two of all for Adam,
    # 128 counters of 8: 66,304 + 65,536 + 132,608 + 1,024 = 265,472 bytes. A checkpoint: parameters, Adam, counters, SAE:
    # 66,304 + 132,608 + 1,024 + 66,304 = 266,240. On disk: two checkpoints and the SAE: 598,784.
    assert row.split()[:9] == ["sae", "128", "16,576", "195", "KiB", "260", "KiB", "585", "KiB"]
    assert float(row.split()[9]) > 0
    assert rows == f"80 steps of 256 tokens: 20,480 rows needed, the training part of {store.path} has 27,718"
    assert re.fullmatch(r"0\.\d+ s per step, 0\.\d+ s of it waiting for rows \(5 steps measured on cpu\): \d+ s", time)
    assert not (tmp_path / "sae").exists()


def test_dry_run_refuses_what_the_run_would(store, finished, tmp_path):
    with pytest.raises(SaekitError, match="is a finished run"):
        dry_run(VARIANT, store, out=finished, **OPTIONS)
    with pytest.raises(SaekitError, match="not divisible"):
        dry_run(VARIANT, store, out=tmp_path / "sae", batch=256, micro_batches=3)
    # a single step is measured itself
    assert "(1 steps measured on cpu)" in dry_run(VARIANT, store, out=tmp_path / "sae", batch=256, tokens=256)


# TensorBoard and Weights & Biases


def test_tensorboard_has_what_the_log_has(store, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    with monkeypatch.context() as m:
        dies_at(m, 33)
        with pytest.raises(RuntimeError, match="killed"):
            sk.train(VARIANT, store, out=tmp_path / "sae", tensorboard=True, **OPTIONS)
    sk.train(VARIANT, store, out=tmp_path / "sae", tensorboard=True, **OPTIONS)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "sae/tensorboard"))
    events.Reload()
    log = metrics(tmp_path / "sae")
    for key, tag in (("loss", "loss"), ("rec", "loss/rec"), ("fvu", "fvu"), ("dead", "dead")):
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)] == [
            (line["step"], line[key]) for line in log
        ]


def test_wandb_offline(store, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the optional package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sk.train(VARIANT, store, out=tmp_path / "sae", wandb="saekit-test", **OPTIONS)
    (record,) = (tmp_path / "sae/wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert all(word in content for word in (b"loss/rec", b"tokens_per_s", b"checkpoint_every", b"saekit-test"))


def stub(monkeypatch, **attributes):
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_wandb_gets_the_options_and_goes_on_where_it_was(store, tmp_path, monkeypatch):
    got, started = [], []

    class Remote:
        step = 0

        def log(self, values, step):
            got.append((step, values))
            Remote.step = step + 1

        def finish(self):
            got.append("finished")

    stub(monkeypatch, init=lambda **options: started.append(options) or Remote(), Settings=dict)
    with monkeypatch.context() as m:
        dies_at(m, 33)
        with pytest.raises(RuntimeError, match="killed"):
            sk.train(VARIANT, store, out=tmp_path / "sae", wandb="p", **OPTIONS)
    sk.train(VARIANT, store, out=tmp_path / "sae", wandb="p", **OPTIONS)
    first, second = started
    assert first["project"] == "p" and first["name"] == "sae" and first["id"] == second["id"]
    assert first["config"]["batch"] == 256 and first["config"]["variant"]["k"] == 4
    # steps 1 to 30 were sent before the kill, 40 to 80 after it
    assert [entry[0] for entry in got if entry != "finished"] == [1, 10, 20, 30, 40, 50, 60, 70, 80]
    assert got.count("finished") == 2 and got[0][1]["loss/rec"] == got[0][1]["fvu"]


def test_a_failing_tracker_is_said_once_and_stops_nothing(store, tmp_path, monkeypatch, capsys):
    def init(**_):
        raise OSError("no route to host")

    stub(monkeypatch, init=init, Settings=dict)
    monkeypatch.setattr(Progress, "quiet", False)
    monkeypatch.setattr("saekit.tracking.POLL_SECONDS", 0.01)
    sk.train(VARIANT, store, out=tmp_path / "sae", wandb="p", **OPTIONS)
    said = capsys.readouterr().err
    assert said.count(f"wandb of {tmp_path}/sae ends here, the run goes on: OSError: no route to host") == 1
    assert (tmp_path / "sae/config.json").is_file()


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_before_the_first_step(store, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setattr("saekit.tracking.find_spec", lambda name: None)
    words = ["--tensorboard"] if package == "tensorboard" else ["--wandb", "p"]
    line = refused(capsys, "train", "topk", store.path, "--out", tmp_path / "sae", *WORDS, *words)
    assert line == f"--{package} needs a package that is not installed:  pip install {package}"
    assert not (tmp_path / "sae").exists()


def test_locks_are_given_back(tmp_path):
    with ExitStack() as stack:
        stack.enter_context(claimed([tmp_path / "a/x", tmp_path / "a/y"]))
        (tmp_path / "a/y/run.json").write_text("{}")
    # what this call made and left empty is gone
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["y", "run.json"]


# What is documented


def test_the_commands_of_the_training_page_run(store, tmp_path, monkeypatch):
    """Word for word, with a small store in the place of GPT-2's, and options that make the runs short."""
    page = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("bash", "toml", "python")}
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts/gpt2").symlink_to(store.path)
    monkeypatch.chdir(tmp_path)
    (toml,) = blocks["toml"]
    for large, small in (("4096", "128"), ("10_000_000", "2_560"), ("[16, 32, 64]", "[2, 4]")):
        assert large in toml
        toml = toml.replace(large, small)
    Path("sweep.toml").write_text(toml)
    call, variant = blocks["python"]
    Path("my_variant.py").write_text(variant)
    before = dict(VARIANTS)
    lines = [line for block in blocks["bash"] for line in block.splitlines()]
    try:
        for line in lines:
            words = shlex.split(line)
            words = words[words.index("saekit") + 1 :]
            short = [] if "sweep" in words else ["--d-sae", "128", "--tokens", "2560"]
            assert cli.main([*words, *short, "--batch", "256"]) == 0, line
            shutil.rmtree("saes/gpt2-topk", ignore_errors=True)
        assert len(lines) == 5
    finally:
        VARIANTS.clear()
        VARIANTS.update(before)
    assert sorted(p.name for p in Path("saes").iterdir()) == ["jumprelu", "loudest", "topk-k2", "topk-k4"]
    shutil.rmtree("saes")
    assert 'out="saes/")' in call
    names = {"sk": sk, "store": store}
    exec(call.replace('out="saes/")', 'out="saes/", batch=256, tokens=2560)'), names)
    assert [sae.variant.k for sae in names["saes"]] == [16, 32]
