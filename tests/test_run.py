"""The run around the step: folder, log, resume to the bit, refusals."""

import json
import signal

import pytest
import torch

import saekit as sk
from saekit.checkpoint import checkpoints
from saekit.errors import SaekitError
from saekit.interrupt import Stop
from saekit.run import Run
from saekit.trainer import Trainer


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_text):
    return sk.collect(
        tiny_model,
        site="blocks.0.hook_resid_post",
        text=tiny_text,
        out=tmp_path_factory.mktemp("a") / "acts",
        context=64,
    )


OPTIONS = {"batch": 256, "epochs": 4, "log_every": 10, "checkpoint_every": 15}
VARIANT = sk.TopK(k=4, d_sae=128)


def files(folder):
    return {name: (folder / name).read_bytes() for name in ("sae.safetensors", "config.json")}


def test_folder_and_log(store, tmp_path):
    sae = sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    run = json.loads((tmp_path / "sae/run.json").read_text())
    assert run["store"]["fingerprint"] == store.fingerprint
    steps = run["computed"]["steps"]
    assert steps == 4 * len(store.valid_rows(store.sites, split="train")) // 256
    log = [json.loads(line) for line in open(tmp_path / "sae/metrics.jsonl")]
    assert [line["step"] for line in log] == [1, *range(10, steps, 10), steps][: len(log)]
    expected = {
        "step",
        "tokens",
        "seconds",
        "loss",
        "rec",
        "fvu",
        "l0",
        "dead",
        "lr",
        "grad_norm",
        "budget_unspent",
        "data_wait",
        "tokens_per_s",
    }
    assert expected <= set(log[-1])
    assert log[-1]["l0"] <= 4.0
    assert len(checkpoints(tmp_path / "sae")) == 2
    assert not list(tmp_path.glob("**/*.partial")) and not (tmp_path / "sae/.lock").exists()
    # a checkpoint is a complete SAE, and the saved one loads back to the same codes
    assert sk.SAE.load(checkpoints(tmp_path / "sae")[0]).d_sae == 128
    x = store.read(store.sites[0], 0, 64).float()
    assert torch.equal(sk.SAE.load(tmp_path / "sae").encode(x).dense(), sae.encode(x).dense())


def test_two_runs_are_equal_to_the_byte_and_another_seed_is_not(store, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sk.train(VARIANT, store, out=tmp_path / name, seed=seed, **OPTIONS)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")["sae.safetensors"] != files(tmp_path / "c")["sae.safetensors"]


@pytest.mark.parametrize("at", [1, 17, 31])
def test_a_killed_run_continues_to_the_same_bytes(store, tmp_path, monkeypatch, at):
    sk.train(VARIANT, store, out=tmp_path / "whole", **OPTIONS)
    step = Trainer.step

    def dies(self, x):
        if self.step_count == at:
            raise RuntimeError("killed")
        return step(self, x)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(SaekitError, match="unfinished run"):
        sk.SAE.load(tmp_path / "cut")
    sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    steps = [json.loads(line)["step"] for line in open(tmp_path / "cut/metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_ctrl_c_saves_and_says_how_to_continue(store, tmp_path, monkeypatch):
    step = Trainer.step

    def interrupted(self, x):
        if self.step_count == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self, x)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 8 .* the same command continues"):
        sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    assert checkpoints(tmp_path / "sae")[-1].name == "step-00000008"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Stop().signal is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "blocks.0.hook_resid_pst"}, "holds blocks.0.hook_resid_post, not blocks.0.hook_resid_pst"),
        ({"tokens": 10**9}, "run needs 1,000,000,000 rows, the training part of"),
        ({"batch": 10**7}, "lower --batch or collect more"),
        ({"batch": 0}, "--batch is 0"),
        ({"device": "cuda:7"}, "device cuda:7 is not available here"),
    ],
)
def test_refused_before_step_0_and_nothing_is_left(store, tmp_path, options, message):
    with pytest.raises(SaekitError, match=message):
        sk.train(VARIANT, store, out=tmp_path / "sae", **options)
    assert not (tmp_path / "sae").exists()


def test_foreign_finished_and_changed_folders_are_refused(store, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(SaekitError, match="is not empty and not a run; choose another --out"):
        sk.train(VARIANT, store, out=tmp_path / "foreign")
    sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    with pytest.raises(SaekitError, match="is a finished run; choose another --out"):
        sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    (tmp_path / "sae/config.json").unlink()
    with pytest.raises(SaekitError, match="was begun with --k 4, now 8; use the first options or a new --out"):
        sk.train(sk.TopK(k=8, d_sae=128), store, out=tmp_path / "sae", **OPTIONS)


def test_a_second_writer_is_refused(store, tmp_path):
    from saekit.run import claimed

    with claimed(tmp_path / "sae"), pytest.raises(SaekitError, match="is being written by process"):
        sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)


def test_plan_says_what_will_be_done(store, tmp_path):
    plan = Run(VARIANT, store, tmp_path / "sae", sk.config.RunOptions(**OPTIONS)).plan()
    # 2·128·64 + 128 + 64 = 16,576 parameters
    assert "128 features of width 64, 16,576 parameters" in plan


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(store, tmp_path, monkeypatch, capsys):
    from saekit.progress import Progress

    sk.train(VARIANT, store, out=tmp_path / "whole", **OPTIONS)
    sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)
    (tmp_path / "cut/config.json").unlink()
    last = checkpoints(tmp_path / "cut")[-1]
    state = last / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    monkeypatch.setattr(Progress, "quiet", False)
    sk.train(VARIANT, store, out=tmp_path / "cut", **OPTIONS)
    said = capsys.readouterr().err
    assert f"checkpoint {last} is damaged" in said and "continues after step" in said
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_a_run_continues_with_the_threads_of_its_first_start(store, tmp_path, monkeypatch):
    sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
    (tmp_path / "sae/config.json").unlink()
    run = json.loads((tmp_path / "sae/run.json").read_text())
    run["environment"]["threads"] = 3
    (tmp_path / "sae/run.json").write_text(json.dumps(run))
    before = torch.get_num_threads()
    try:
        sk.train(VARIANT, store, out=tmp_path / "sae", **OPTIONS)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert run["environment"]["kernels"]["encode_select row_count"].startswith(("cpu: ", "portable: "))
