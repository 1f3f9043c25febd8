"""From text to a store: rows are the model's own, a killed run ends in the same bytes, what cannot work is refused first."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf

import saekit.collector
from saekit.collector import collect
from saekit.errors import SaekitError
from saekit.model import load_model
from saekit.store import check, open_store
from saekit.store.writer import StoreWriter

SITES = ("blocks.0.hook_resid_post", "blocks.1.mlp.hook_post", "blocks.0.attn.hook_z")
# 16 sequences of 32 tokens to a batch; the widest site has 128 · 2 bytes a row, so a shard of 1 MiB holds 8 batches
SETTINGS = {"site": SITES, "context": 32, "batch_sequences": 16, "shard_mb": 1, "compute": "fp32", "tokens": 10_000}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lm(tiny_model):
    return load_model(str(tiny_model), compute="fp32")


@pytest.fixture(scope="module")
def acts(lm, tiny_text, tmp_path_factory):
    """A store of three sites and several shards, its last sequence short."""
    out = tmp_path_factory.mktemp("collect") / "acts"
    collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "journal.jsonl"
    }


def refused(*args, out: Path, **options) -> str:
    """Message of the refusal; the folder is as it was."""
    before = files(out) if out.exists() else None
    with pytest.raises(SaekitError) as error:
        collect(*args, out=out, **options)
    assert (files(out) if out.exists() else None) == before
    assert "\n" not in str(error.value)
    return str(error.value)


# Rows


def test_rows_are_the_models_own(acts, lm):
    """Each row, recomputed one sequence at a time, rounded to bfloat16."""
    store = open_store(acts)
    assert check(acts) == []
    assert store.n_tokens == 10_000 and store.n_sequences == 313
    assert len(store.manifest["shards"]) == 3
    table, expected = store.table, {site: [] for site in SITES}
    for s in range(store.n_sequences):
        a, b = table.seq_start[s], table.seq_start[s + 1]
        ids = torch.from_numpy(table.token[a:b].astype(np.int64))[None]
        for site, x in lm.capture(ids, SITES).items():
            expected[site].append(x[0][torch.from_numpy(table.stored[a:b].copy())])
    for site in SITES:
        x, y = torch.cat(expected[site]), store.read(site, 0, store.rows)
        assert y.dtype == torch.bfloat16 and y.shape == x.shape == (store.rows, store.d(site))
        # half a unit of 8 bits, and the rounding of another batch size
        assert ((y.float() - x).abs() <= 2**-8 * x.abs() + 1e-4).all()


def test_exact_mode(lm, tiny_text, tmp_path):
    store = collect(lm, text=str(tiny_text), out=tmp_path / "a", **{**SETTINGS, "tokens": 700, "dtype": "float32"})
    ids = torch.from_numpy(store.table.token[:32].astype(np.int64))[None]
    x = lm.capture(ids, SITES)[SITES[0]][0]
    assert torch.allclose(store.read(SITES[0], 0, 31), x[1:], atol=1e-5)


def test_special_tokens_have_no_row(acts):
    store = open_store(acts)
    token, stored = store.table.token, store.table.stored
    assert store.manifest["special_tokens"] == {"prepend_bos": True, "separator": "eos", "dropped_ids": [0, 1]}
    assert np.array_equal(stored, (token != 0) & (token != 1))
    assert (token[store.table.seq_start[:-1]] == 0).all() and (token == 1).any()
    # document and position are unique for the rows
    at = np.flatnonzero(stored)
    pairs = np.stack([store.table.doc_of(at), store.table.position_in_doc(at)])
    assert np.unique(pairs, axis=1).shape[1] == store.rows


def test_manifest(acts, lm, tiny_text):
    m = open_store(acts).manifest
    assert m["model"] == lm.manifest_entry() and m["tokenizer"] == lm.tokenizer_entry()
    assert m["context_length"] == 32 and m["batch_sequences"] == 16 and m["dtype"] == "bfloat16"
    assert {k: m["text"][k] for k in ("source", "revision", "packing", "attention_across_documents")} == {
        "source": str(tiny_text),
        "revision": None,
        "packing": "join",
        "attention_across_documents": True,
    }
    assert m["sites"]["blocks.0.attn.hook_z"]["heads"] == 4 and m["sites"]["blocks.0.attn.hook_z"]["d_head"] == 16
    (environment,) = m["environments"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == 1 and environment["device"] == "cpu"
    # the documents that were used: those whose text is in the table
    lines = tiny_text.read_text().splitlines()[: m["text"]["documents"]]
    assert m["text"]["bytes"] == sum(len(json.loads(line)["text"].encode()) for line in lines)


def test_norm_limit_is_ten_times_the_median(acts, lm, tiny_text, tmp_path):
    """All 10,000 positions lie within the first 65,536 rows, so the median is that of the whole store."""
    store = open_store(acts)
    for site in SITES:
        norms = store.read(site, 0, store.rows).double().norm(dim=1)
        assert store.manifest["sites"][site]["norm_limit"] == pytest.approx(10 * np.median(norms.numpy()), rel=1e-12)
    options = {**SETTINGS, "site": SITES[0], "tokens": 700}
    off = collect(lm, text=str(tiny_text), out=tmp_path / "off", norm_multiple=0, **options)
    assert off.manifest["sites"][SITES[0]]["norm_limit"] is None
    near = collect(lm, text=str(tiny_text), out=tmp_path / "near", norm_multiple=1, **options)
    norms = near.read(SITES[0], 0, near.rows).double().norm(dim=1).numpy()
    # above the median lies just under one half
    assert near.outliers([SITES[0]]).tolist() == np.flatnonzero(norms > np.median(norms)).tolist()


def test_limits_wait_for_enough_rows(lm, tiny_text, tmp_path, monkeypatch):
    """With a sample of 5,000 rows the first shard (4,000) is held back, and the limit counts 5,000 rows of the first two."""
    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 5000)
    store = collect(lm, text=str(tiny_text), out=tmp_path / "a", **SETTINGS)
    assert store.manifest["shards"][0]["rows"] < 5000
    norms = store.read(SITES[0], 0, 5000).double().norm(dim=1)
    assert store.manifest["sites"][SITES[0]]["norm_limit"] == pytest.approx(10 * np.median(norms.numpy()), rel=1e-12)


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_tokenizer_without_bos(tiny_model, tiny_text, tmp_path, bos):
    """Field case 13: the first token of each document has a row; rows are the tokens but for the separators."""
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_model, bos_token=None)
    assert tokenizer.bos_token_id is None
    hf = tf.AutoModelForCausalLM.from_pretrained(tiny_model)
    options = {**SETTINGS, "site": SITES[0], "tokens": 900}
    store = collect((hf, tokenizer), text=str(tiny_text), out=tmp_path / "a", bos=bos, **options)
    assert store.manifest["tokenizer"]["bos"] is None and not store.manifest["special_tokens"]["prepend_bos"]
    separators = (store.table.token == 1).sum()
    assert store.rows == 900 - separators and separators > 0
    starts = store.table.run_start[store.table.run_position == 0]
    assert store.table.stored[starts].all()


def test_an_object_is_left_as_it_was(tiny_model, tiny_text, tmp_path):
    hf = tf.AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").train()
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_model)
    options = {**SETTINGS, "site": SITES[0], "tokens": 700}
    store = collect((hf, tokenizer), text=str(tiny_text), out=tmp_path / "a", **options)
    assert hf.training and hf.config._attn_implementation == "eager"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())
    assert store.manifest["model"]["attention"] == "sdpa"


# Cut off and continued


def test_two_runs_give_equal_bytes(acts, lm, tiny_text, tmp_path):
    collect(lm, text=str(tiny_text), out=tmp_path / "b", **SETTINGS)
    assert files(tmp_path / "b") == files(acts)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("calls", [0, 5, 9, 17])
def test_cut_off_anywhere_and_continued(acts, lm, tiny_text, tmp_path, monkeypatch, calls, early):
    """Interrupted in the first, the second or the last shard, the shards before written already or held back."""
    out, capture, done = tmp_path / "b", lm.capture, 0

    def interrupted(*args, **kwargs):
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return capture(*args, **kwargs)

    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 3000 if early else 65_536)
    if early:
        # limits of a smaller sample: compare with a store made with the same
        collect(lm, text=str(tiny_text), out=tmp_path / "whole", **SETTINGS)
    lm.causal  # noqa: B018  (tried once per model, by a pass of its own)
    monkeypatch.setattr(lm, "capture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    monkeypatch.setattr(lm, "capture", capture)
    assert not (out / "manifest.json").exists()
    collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    assert files(out) == files(tmp_path / "whole" if early else acts)


def test_committed_shards_are_not_computed_again(acts, lm, tiny_text, tmp_path, monkeypatch):
    """Disk full at shard 1; then the same command computes shards 1 and 2 alone."""
    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 3000)
    put, out = StoreWriter.put, tmp_path / "b"

    def full(self, i, *args):
        if i == 1:
            with self._writing(i):
                raise OSError(errno.ENOSPC, "No space left on device")
        put(self, i, *args)

    monkeypatch.setattr(StoreWriter, "put", full)
    with pytest.raises(SaekitError, match="disk full at shard 1 of 3; free .* and run the same command again"):
        collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    monkeypatch.setattr(StoreWriter, "put", put)
    first = (out / SITES[0] / "shard-00000.safetensors").stat().st_mtime_ns
    batches = []
    capture = lm.capture
    monkeypatch.setattr(lm, "capture", lambda ids, sites: batches.append(len(ids)) or capture(ids, sites))
    # the text is not read again either: the table of tokens is there
    monkeypatch.setattr(saekit.collector, "documents", None)
    collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    # 313 sequences less the 128 of shard 0
    assert sum(batches) == 313 - 128
    assert (out / SITES[0] / "shard-00000.safetensors").stat().st_mtime_ns == first
    assert check(out) == []


CHILD = """
import sys
from saekit.collector import collect
print("go", flush=True)
collect(sys.argv[1], text=sys.argv[2], out=sys.argv[3], site="blocks.0.hook_resid_post", context=32, batch_sequences=8,
        shard_mb=1, compute="fp32")
"""


@pytest.mark.long
def test_killed_at_any_moment(tiny_model, tiny_text, tmp_path):
    """SIGKILL while it tokenises, computes, writes or joins; the store ends in the bytes of a run that nobody killed."""
    text = tmp_path / "text.jsonl"
    text.write_text(tiny_text.read_text() * 6)
    args, random = [sys.executable, "-c", CHILD, str(tiny_model), str(text)], np.random.default_rng(0)
    start = time.monotonic()
    with subprocess.Popen([*args, str(tmp_path / "whole")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        child.stdout.readline()
        begun = time.monotonic()
    assert child.returncode == 0 and begun > start
    seconds, killed = time.monotonic() - begun, 0
    for trial in range(20):
        with subprocess.Popen([*args, str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            child.stdout.readline()
            time.sleep(random.uniform(0, seconds))
            child.kill()
        killed += child.returncode == -signal.SIGKILL
        if (tmp_path / "b" / "manifest.json").exists() and not (tmp_path / "b" / "state").exists():
            assert files(tmp_path / "b") == files(tmp_path / "whole"), f"trial {trial}"
            shutil.rmtree(tmp_path / "b")
    assert killed >= 10
    subprocess.run([*args, str(tmp_path / "b")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    assert files(tmp_path / "b") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    "changed, message",
    [
        (
            {"dtype": "float32"},
            "{out} was begun with --dtype bfloat16, now float32; use the first settings or a new --out",
        ),
        ({"context": 16}, "{out} was begun with --context 32, now 16; use the first settings or a new --out"),
        ({"tokens": 9000}, "{out} was begun with --tokens 10000, now 9000; use the first settings or a new --out"),
        ({"norm_multiple": 5.0}, "{out} was begun with "),
        ({"site": SITES[:1]}, "{out} was begun with "),
    ],
)
def test_continued_with_other_settings(lm, tiny_text, tmp_path, monkeypatch, changed, message):
    out = tmp_path / "b"
    with monkeypatch.context() as m:
        m.setattr(saekit.collector, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    assert refused(lm, text=str(tiny_text), out=out, **{**SETTINGS, **changed}).startswith(message.format(out=out))


def test_continued_with_another_model_or_tokenizer(lm, tiny_model, tiny_text, tmp_path, monkeypatch):
    out = tmp_path / "b"
    with monkeypatch.context() as m:
        m.setattr(saekit.collector, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(str(tiny_model), text=str(tiny_text), out=out, **SETTINGS)
    other = tmp_path / "tuned"
    shutil.copytree(tiny_model, other)
    tuned = tf.AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        tuned.model.norm.weight[0] += 1
    tuned.save_pretrained(other)
    shutil.move(tiny_model, tmp_path / "first")
    try:
        shutil.move(other, tiny_model)
        message = refused(str(tiny_model), text=str(tiny_text), out=out, **SETTINGS)
        assert message.startswith("weights fingerprint is sha256:") and f"{out} was begun with sha256:" in message
    finally:
        shutil.rmtree(tiny_model)
        shutil.move(tmp_path / "first", tiny_model)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_model)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].pop()
    (tmp_path / "t.json").write_text(json.dumps(state))
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "t.json"), bos_token="<|bos|>", eos_token="<|eos|>"
    )
    hf = tf.AutoModelForCausalLM.from_pretrained(tiny_model)
    message = refused((hf, tokenizer), text=str(tiny_text), out=out, **SETTINGS)
    assert message.startswith(f"tokenizer fingerprint differs from the one {out} was begun with (sha256:")


# What cannot work


def test_bad_input_leaves_no_folder(lm, tiny_text, tmp_path):
    out, site, text = tmp_path / "acts", SITES[0], str(tiny_text)
    (tmp_path / "empty.txt").write_text("\n")

    def message(model=lm, **changed):
        options = {"site": site, "text": text, "context": 32, "compute": "fp32", **changed}
        return refused(model, out=out, **options)

    assert message(text=str(tmp_path / "gone.txt")) == f"no such file: {tmp_path}/gone.txt"
    empty = str(tmp_path / "empty.txt")
    assert message(text=empty) == f"{empty} holds no text (0 non-empty documents); give another source"
    assert message(text=()).startswith("no text named")
    assert message(site=()).startswith("no site named")
    assert message(site="blocks.0.hook_resid_pst").startswith("no site blocks.0.hook_resid_pst; nearest: ")
    assert message(site="blocks.2.hook_resid_post") == "blocks.2.hook_resid_post: the model has 2 layers (0 to 1)"
    assert message(dtype="int8") == "dtype int8 is not supported; choose bfloat16, float16 or float32"
    assert message(context=4096) == "--context 4096 exceeds the model's 128 positions"
    assert message(context=1).startswith("--context 1 leaves no room for text")
    assert message(batch_sequences=0) == "--batch-sequences is 0; it must be at least 1"
    assert (
        message(drop_ids=tuple(range(300))) == "nothing to store: every token of a sequence is special; raise --context"
    )
    assert message(tokens=10**9).startswith("text ended at ")
    assert message(tokens=10**9).endswith(" or less, or give more text")
    assert message(model="./ckpt").startswith("cannot load model ./ckpt: no such folder")
    assert not out.exists()


def test_a_model_whose_attention_looks_ahead(tiny_text, tiny_model, tmp_path):
    config = tf.BertConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = (tf.BertLMHeadModel(config), tf.AutoTokenizer.from_pretrained(tiny_model))
    message = refused(model, site="blocks.0.hook_resid_post", text=str(tiny_text), context=32, out=tmp_path / "a")
    assert message.startswith("attention is not causal in BertLMHeadModel") and not (tmp_path / "a").exists()


def test_folders_that_are_something_else(acts, lm, tiny_text, tmp_path):
    assert refused(lm, text=str(tiny_text), out=acts, **SETTINGS).endswith("rows); choose another --out")
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(lm, text=str(tiny_text), out=tmp_path, **SETTINGS).endswith(
        "not empty and not a store; choose another --out"
    )
    (tmp_path / "new").mkdir()
    collect(lm, text=str(tiny_text), out=tmp_path / "new", **{**SETTINGS, "tokens": 200})


def test_too_little_disk(lm, tiny_text, tmp_path, monkeypatch):
    """10,000 positions take 9,6xx rows of 512 bytes (64 + 128 + 64 values of 2 bytes), about 4.7 MiB."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 << 20))
    message = refused(lm, text=str(tiny_text), out=tmp_path / "a", **SETTINGS)
    assert message.startswith("needs 4.7") and f"2 MiB free at {tmp_path}/a; fewer --tokens (" in message
    fit = int(message.partition("(")[2].partition(" fit")[0].replace(",", ""))
    assert 4000 < fit < 4400 and not (tmp_path / "a").exists()


def poisoned(lm, monkeypatch, sequence, position, value):
    """capture with one value of SITES[0] set, counting sequences over the batches."""
    capture, seen = lm.capture, 0

    def capture_(ids, sites):
        nonlocal seen
        found = capture(ids, sites)
        if seen <= sequence < seen + len(ids):
            found[SITES[0]][sequence - seen, position, 7] = value
        seen += len(ids)
        return found

    lm.causal  # noqa: B018
    monkeypatch.setattr(lm, "capture", capture_)


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (
            float("nan"),
            "bfloat16",
            f"NaN at {SITES[0]}, sequence 201, position 3; try --compute fp32 or check the model",
        ),
        (
            float("inf"),
            "float32",
            f"infinity at {SITES[0]}, sequence 201, position 3; try --compute fp32 or check the model",
        ),
        (-71233.0, "float16", f"{SITES[0]} reaches 71,233, above float16's 65,504; use --dtype bfloat16"),
    ],
)
def test_values_that_cannot_be_stored(lm, tiny_text, tmp_path, monkeypatch, value, dtype, message):
    """The folder of a shard that fails is left for the same command, which would fail again: nothing of it is committed."""
    poisoned(lm, monkeypatch, 201, 3, value)
    with pytest.raises(SaekitError) as error:
        collect(lm, text=str(tiny_text), out=tmp_path / "a", dtype=dtype, **SETTINGS)
    assert str(error.value) == message
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_values_without_a_row_may_be_anything(lm, tiny_text, tmp_path, monkeypatch):
    """BOS has no row; its norm is often beyond float16."""
    poisoned(lm, monkeypatch, 5, 0, 1e6)
    store = collect(lm, text=str(tiny_text), out=tmp_path / "a", dtype="float16", **{**SETTINGS, "tokens": 700})
    assert store.read(SITES[0], 0, store.rows).isfinite().all()


def test_out_of_memory_names_the_option(lm, tiny_text, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee documentation")

    lm.causal  # noqa: B018
    monkeypatch.setattr(lm, "capture", fail)
    with pytest.raises(SaekitError, match="^batch of 16 sequences does not fit; try --batch-sequences 8$"):
        collect(lm, text=str(tiny_text), out=tmp_path / "a", **SETTINGS)


def test_no_permission(lm, tiny_text, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    message = refused(lm, text=str(tiny_text), out=tmp_path / "a", **SETTINGS)
    assert message == f"cannot write to {tmp_path}/a: permission denied" and not (tmp_path / "a").exists()
