"""Training without a store: the rows of a store in the same order, computed when they are wanted."""

import json
import signal

import numpy as np
import pytest
import torch

import saekit as sk
from saekit import cli
from saekit.collector import collect
from saekit.config import StreamOptions
from saekit.errors import SaekitError
from saekit.forward import LanguageForward
from saekit.interrupt import Terminated
from saekit.store.format import TokenTable
from saekit.stream import _replace, open_stream
from saekit.trainer import Trainer

SITE = "blocks.0.hook_resid_post"
SHARED = {"context": 32, "dtype": "float32", "batch_sequences": 16}
RUN = {"site": SITE, "batch": 64, "ram": "256KiB", "log_every": 5, "checkpoint_every": 20, "device": "cpu"}


@pytest.fixture(scope="module")
def store(tiny_model, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("stream") / "acts"
    return collect(str(tiny_model), site=SITE, text=str(tiny_text), out=out, compute="fp32", threads=1, **SHARED)


@pytest.fixture
def stream(tiny_model, tiny_text, tmp_path):
    options = StreamOptions(text=(str(tiny_text),), **SHARED)
    return open_stream(str(tiny_model), options, site=SITE, out=tmp_path / "run", statistics_rows=5000)


def read(source, **options):
    rows, values = [], []
    for batch in source.batches([SITE], **{"batch": 64, "ram": "256KiB", "block": "sequence", **options}):
        rows.append(batch.rows.copy())
        values.append(batch[SITE])
    return np.concatenate(rows), torch.cat(values)


@pytest.mark.filterwarnings("ignore:a window of")
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_and_order_are_those_of_a_store(store, stream, split):
    """256 KiB windows of 33 sequences (31 rows of 256 bytes each), two epochs."""
    assert store.outliers([SITE]).size == 0
    rows, values = read(stream, split=split, epochs=2)
    expected_rows, expected = read(store, split=split, epochs=2)
    assert np.array_equal(rows, expected_rows) and len(rows) > 500
    # the batches of the forward pass are others
    assert torch.allclose(values, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:a window of")
def test_statistics_are_those_of_the_first_rows(store, stream):
    """Text order and batches are those of the store, so they are equal to the bit."""
    a, b = stream.statistics(SITE), store.statistics(SITE, 5000)
    assert np.array_equal(a.mean_D, b.mean_D) and np.array_equal(a.variance_D, b.variance_D) and a[2:] == b[2:]
    assert stream.manifest["site"]["norm_limit"] == store.manifest["sites"][SITE]["norm_limit"]
    assert stream.manifest["text"] == store.manifest["text"]
    x = store.read(SITE, 0, 5000).double()
    assert np.allclose(a.mean_D, x.mean(0).numpy(), rtol=1e-9) and a.mean_norm == pytest.approx(
        x.norm(dim=1).mean().item()
    )


@pytest.mark.filterwarnings("ignore:a window of")
def test_a_window_is_computed_once(stream, monkeypatch):
    """Two readers that begin with the same window, and a state in its middle."""
    passes, run = [], LanguageForward._pass

    def counted(self, *args):
        passes.append(1)
        return run(self, *args)

    monkeypatch.setattr(LanguageForward, "_pass", counted)
    first = stream.batches([SITE], batch=64, ram="256KiB")
    next(iter(first))
    # 256 KiB are room for 33 sequences of 31 rows of 256 bytes: batches of 16, 16 and at most 1
    assert 2 <= len(passes) <= 3
    before = len(passes)
    next(iter(stream.batches([SITE], batch=64, ram="256KiB")))
    assert len(passes) == before
    state = first.state()
    assert len(json.dumps(state)) < 1024
    rest = [b.rows for b in stream.batches([SITE], batch=64, ram="256KiB", state=state)]
    whole = [b.rows for b in stream.batches([SITE], batch=64, ram="256KiB")]
    assert np.array_equal(np.concatenate(rest), np.concatenate(whole[1:]))


def test_outliers_give_their_place_to_the_row_before():
    values = torch.arange(6.0)[:, None].repeat(1, 2)
    _replace(values, np.array([True, False, True, True, False, False]))
    # row 0 has none before it: the first good one, row 1; rows 2 and 3 take row 1
    assert values[:, 0].tolist() == [1, 1, 1, 1, 4, 5]
    alone = torch.ones(2, 2)
    _replace(alone, np.array([True, True]))
    assert alone.tolist() == [[1, 1], [1, 1]]


def test_some_sequences_of_a_table():
    # BOS A0 A1 | BOS A2 | BOS B0 B1: runs at A0, A2 and B0.
    table = TokenTable(
        token=np.array([0, 10, 11, 0, 12, 0, 20, 21], np.uint16),
        stored=np.array([0, 1, 1, 0, 1, 0, 1, 1], bool),
        seq_start=np.array([0, 3, 5, 8]),
        run_start=np.array([1, 4, 6]),
        run_doc=np.array([0, 0, 1]),
        run_position=np.array([0, 2, 0]),
    )
    some = table.take(np.array([2, 1]))
    assert some.token.tolist() == [0, 20, 21, 0, 12] and some.seq_start.tolist() == [0, 3, 5]
    assert (
        some.run_start.tolist() == [1, 4] and some.run_doc.tolist() == [1, 0] and some.run_position.tolist() == [0, 2]
    )


@pytest.mark.filterwarnings("ignore:a window of")
def test_training_from_a_stream_and_from_the_store(store, tiny_model, tiny_text, tmp_path):
    """The same statistics, rows and order: the same SAE but for the rounding of the forward pass."""
    stream = StreamOptions(stream=str(tiny_model), text=(str(tiny_text),), **SHARED)
    options = {**RUN, "statistics_rows": 5000, "block": "sequence"}
    a = sk.train(sk.TopK(k=8, d_sae=256), stream=stream, out=tmp_path / "a", **options)
    b = sk.train(sk.TopK(k=8, d_sae=256), store, out=tmp_path / "b", **options)
    loss_a, loss_b = (
        [json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "ab"
    )
    assert len(loss_a) > 10 and np.allclose(loss_a, loss_b, rtol=1e-2)
    assert torch.allclose(a.W_dec, b.W_dec, atol=0.05)
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert (
        run["store"]["streamed"]
        and a.config["model"]["weights_fingerprint"] == store.manifest["model"]["weights_fingerprint"]
    )
    with pytest.raises(
        SaekitError, match="was trained from a stream, of which no store is left; collect one and pass --store"
    ):
        sk.evaluate(tmp_path / "a", tiers=(1,))
    assert sk.evaluate(tmp_path / "a", store, tiers=(1,), allow_train_tokens=True)


@pytest.mark.filterwarnings("ignore:a window of")
def test_a_stopped_run_goes_on(tiny_model, tiny_text, tmp_path, monkeypatch):
    """SIGTERM in the middle of a window; the finished SAE is that of an undisturbed run, to the bit."""

    def run(name):
        stream = StreamOptions(stream=str(tiny_model), text=(str(tiny_text),), **SHARED)
        return sk.train(sk.TopK(k=8, d_sae=256), stream=stream, out=tmp_path / name, **RUN, tokens=6400)

    run("whole")
    step, steps = Trainer.step, 0

    def signalled(self, x):
        nonlocal steps
        steps += 1
        if steps == 47:
            signal.raise_signal(signal.SIGTERM)
        return step(self, x)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "step", signalled)
        with pytest.raises(Terminated):
            run("cut")
    run("cut")
    assert (tmp_path / "cut" / "sae.safetensors").read_bytes() == (tmp_path / "whole" / "sae.safetensors").read_bytes()


def test_what_cannot_work(store, tiny_model, tiny_text, tmp_path, capsys):
    def refused(*argv) -> str:
        assert cli.main(["train", "topk", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error.removeprefix("saekit: ").rstrip()

    out, text = tmp_path / "run", str(tiny_text)
    assert refused("--out", out) == "no store named; give one, or --stream MODEL with --site and --text"
    assert refused("--out", out, "--text", text).startswith("--text goes with --stream MODEL")
    line = ("--stream", tiny_model, "--text", text, "--context", 32)
    assert refused("--out", out, *line).startswith("no site named; pass --site")
    assert (
        refused(store.path, "--out", out, *line, "--site", SITE) == f"give a store ({store.path}) or --stream, not both"
    )
    assert refused("--out", out, "--stream", tiny_model, "--site", SITE).startswith("no text named; pass --text")
    assert refused("--out", out, *line, "--site", "blocks.0.hook_resid_pst").startswith(
        "no site blocks.0.hook_resid_pst"
    )
    (tmp_path / "empty.txt").write_text("\n")
    empty = ("--stream", tiny_model, "--text", tmp_path / "empty.txt", "--site", SITE, "--context", 32)
    assert "holds no text" in refused("--out", out, *empty)
    assert not out.exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    assert refused("--out", tmp_path / "notes", *line, "--site", SITE).endswith(
        "is not empty and not a run; choose another --out"
    )


def test_begun_with_other_settings(stream, tiny_model, tiny_text, tmp_path):
    options = StreamOptions(stream=str(tiny_model), text=(str(tiny_text),), **{**SHARED, "context": 16})
    with pytest.raises(
        SaekitError, match=r"was begun with --context 32, now 16; use the first settings or a new --out"
    ):
        open_stream(str(tiny_model), options, site=SITE, out=tmp_path / "run", statistics_rows=5000)
    with pytest.raises(SaekitError, match=r"was begun with --statistics-rows 5000, now 6000"):
        open_stream(
            str(tiny_model),
            StreamOptions(text=(str(tiny_text),), **SHARED),
            site=SITE,
            out=tmp_path / "run",
            statistics_rows=6000,
        )
