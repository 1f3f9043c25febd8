"""From text to a store: rows are the model's own, a killed run ends in the same bytes, what cannot work is refused first."""

import errno
import io
import itertools
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

import saekit as sk
import saekit.collector
import saekit.source
from saekit.collector import collect
from saekit.errors import SaekitError
from saekit.interrupt import Terminated
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
    monkeypatch.setattr(lm, "capture", lambda ids, *rest: batches.append(len(ids)) or capture(ids, *rest))
    # the text is not read again either: all parts of the table are there
    monkeypatch.setattr(saekit.source, "parts", None)
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


def test_memory_does_not_grow_with_the_store(tiny_model, tiny_text, tmp_path):
    """Ten times the tokens in a process of its own: the parts of the table lie on the disk, and two shards in memory."""
    text = tmp_path / "text.jsonl"
    text.write_text(tiny_text.read_text() * 14)
    code = (
        "import resource, sys; from saekit.collector import collect; "
        "collect(sys.argv[1], text=sys.argv[2], out=sys.argv[3], site='blocks.0.hook_resid_post', context=32, shard_mb=1, "
        "compute='fp32', tokens=int(sys.argv[4])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(tokens: int) -> int:
        line = [sys.executable, "-c", code, str(tiny_model), str(text), str(tmp_path / str(tokens)), str(tokens)]
        return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) << 10

    small, large = peak(40_000), peak(400_000)
    # 400,000 rows are 51 MB, their tokens 2 MB
    assert large - small < 24 << 20, f"{small >> 20} MiB, then {large >> 20} MiB"


# Closed before the end


def test_text_that_ends_before_the_tokens_asked_for(lm, tiny_text, tmp_path):
    """All of the text, and never a token twice; without --finish nothing is left behind."""
    options = {**SETTINGS, "site": SITES[0], "tokens": None}
    whole = collect(lm, text=str(tiny_text), out=tmp_path / "whole", **options)
    asked = {**options, "tokens": whole.n_tokens + 1}
    message = refused(lm, text=str(tiny_text), out=tmp_path / "a", **asked)
    assert message == (
        f"text ended at {whole.n_tokens:,} of {whole.n_tokens + 1:,} tokens; add --finish to close the store with what there is"
    )
    collect(lm, text=str(tiny_text), out=tmp_path / "a", finish=True, **asked)
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_an_unfinished_run_is_closed_with_its_whole_shards(acts, lm, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 3000)
    capture, done, out = lm.capture, 0, tmp_path / "a"

    def interrupted(*args):
        nonlocal done
        done += 1
        if done > 18:
            raise KeyboardInterrupt
        return capture(*args)

    lm.causal  # noqa: B018
    with monkeypatch.context() as m:
        m.setattr(lm, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    with pytest.raises(
        SaekitError, match=r"is unfinished \(2 of 3 shards\); run its .*, or with --finish to use what is there"
    ):
        open_store(out)
    with monkeypatch.context() as m:
        m.setattr(lm, "capture", None)
        store = collect(lm, text=str(tiny_text), out=out, finish=True, **SETTINGS)
    assert check(out) == [] and len(store.manifest["shards"]) == 2 and store.n_sequences == 256
    whole = open_store(acts)
    assert np.array_equal(store.table.token, whole.table.token[: store.n_tokens])
    assert torch.equal(store.read(SITES[0], 0, store.rows), whole.read(SITES[0], 0, store.rows))
    # documents are those that have a token in what is there
    assert store.manifest["text"]["documents"] == store.table.run_doc[-1] + 1 < whole.manifest["text"]["documents"]


def test_nothing_to_close_yet(lm, tiny_text, tmp_path, monkeypatch):
    out = tmp_path / "a"
    with monkeypatch.context() as m:
        m.setattr(saekit.collector, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    message = refused(lm, text=str(tiny_text), out=out, finish=True, **SETTINGS)
    assert message == f"{out} has no whole shard yet; run its collect command again without --finish"


# Packing


def alone(lm, ids: np.ndarray, site: str = SITES[0]) -> torch.Tensor:
    return lm.capture(torch.from_numpy(ids.astype(np.int64))[None], [site])[site][0]


def test_isolated_documents_are_as_if_alone(lm, tiny_text, tmp_path):
    """Every row of a piece (a document's tokens in one sequence, BOS and separator with them) is the piece's own."""
    exact = {**SETTINGS, "site": SITES[0], "tokens": 900, "dtype": "float32"}
    store = collect(lm, text=str(tiny_text), out=tmp_path / "a", packing="isolate", **exact)
    join = collect(lm, text=str(tiny_text), out=tmp_path / "j", packing="join", **exact)
    assert store.manifest["text"]["packing"] == "isolate" and not store.manifest["text"]["attention_across_documents"]
    assert store.manifest["text"]["tokens_sha256"] == join.manifest["text"]["tokens_sha256"]
    table, expected = store.table, []
    for s in range(store.n_sequences):
        begin, end = int(table.seq_start[s]), int(table.seq_start[s + 1])
        # the first run of a sequence begins behind its BOS, which it sees
        cuts = [begin, *(int(r) for r in table.run_start if begin + 1 < r < end), end]
        for a, b in itertools.pairwise(cuts):
            expected.append(alone(lm, table.token[a:b])[torch.from_numpy(table.stored[a:b].copy())])
    rows = store.read(SITES[0], 0, store.rows)
    assert (rows - torch.cat(expected)).abs().max() <= 1e-5 * rows.abs().max()
    # and joined ones are not
    assert (rows - join.read(SITES[0], 0, join.rows)).abs().max() > 0.1 * rows.abs().max()


def test_separate_documents(lm, tiny_text, tmp_path):
    store = collect(
        lm,
        text=str(tiny_text),
        out=tmp_path / "a",
        packing="separate",
        **{**SETTINGS, "site": SITES[0], "tokens": 900, "dtype": "float32"},
    )
    table = store.table
    assert check(tmp_path / "a") == [] and len(set(np.diff(table.seq_start))) > 1
    expected = []
    for a, b in itertools.pairwise(table.seq_start):
        # BOS in front counts to the document before
        assert len(set(table.doc_of(np.arange(a + 1, b)))) == 1 and table.token[a] == 0
        expected.append(alone(lm, table.token[a:b])[torch.from_numpy(table.stored[a:b].copy())])
    rows = store.read(SITES[0], 0, store.rows)
    assert (rows - torch.cat(expected)).abs().max() <= 1e-5 * rows.abs().max()


@pytest.mark.parametrize("packing", ["join", "isolate", "separate"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_hold_in_every_packing(family, packing, tiny_model, tmp_path):
    """One layer, a window of 8: a change of token 5 reaches rows 5 to 12 and none behind (field case 1)."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "sliding_window": 8,
    }
    if family == "mistral":
        hf = tf.MistralForCausalLM(tf.MistralConfig(**sizes))
    else:
        hf = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes, head_dim=16, layer_types=["sliding_attention"]))
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim == 2:
                p.mul_(4.0)
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_model)
    options = {
        "site": SITES[0],
        "context": 64,
        "packing": packing,
        "bos": "never",
        "dtype": "float32",
        "compute": "fp32",
    }
    rows = {}
    # letters that merge with nothing, so that one letter is one token
    for name, letter in (("before", "q"), ("after", "z")):
        text = tmp_path / f"{name}.txt"
        text.write_text("qxjw"[0:4] + "v" + letter + "wxqj" * 14)
        store = collect((hf, tokenizer), text=str(text), out=tmp_path / name, **options)
        assert store.n_tokens == 62
        rows[name] = store.read(SITES[0], 0, 62)
    changed = (rows["before"] != rows["after"]).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(5, 13))
    ids = torch.from_numpy(store.table.token.astype(np.int64))[None]
    reference = hf(ids, output_hidden_states=True).hidden_states
    # behind the last layer Transformers has applied the final norm
    base = hf.model.norm(rows["after"][None])
    assert torch.allclose(base, reference[1], atol=1e-4)


# Encoders


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random BERT in Hugging Face format with a word-piece tokenizer: [CLS] 2, [SEP] 3, [PAD] 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz():'.,_0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=128, **sizes))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def test_an_encoder(bert, tmp_path):
    """Field case 9: a document per sequence between [CLS] and [SEP], padding without rows; every token sees every other."""
    lines = ["def add ( a , b )", "x", "return " * 40]
    options = {
        "site": ("blocks.1.hook_resid_post", "encoder.layer.0.attention.output"),
        "context": 32,
        "dtype": "float32",
    }
    rows = {}
    for name, last in (("before", "x"), ("after", "z")):
        text = tmp_path / f"{name}.txt"
        text.write_text("\n".join([*lines, f"a b c {last}"]))
        store = collect(
            str(bert), text=str(text), out=tmp_path / name, split_documents="line", compute="fp32", **options
        )
        rows[name] = store.read(options["site"][0], 0, store.rows)
    m, table = store.manifest, store.table
    assert m["text"]["packing"] == "separate" and not m["text"]["attention_across_documents"]
    assert (m["tokenizer"]["bos"], m["tokenizer"]["eos"]) == (2, 3) and m["special_tokens"]["dropped_ids"] == [0, 2, 3]
    begins, ends = table.seq_start[:-1], table.seq_start[1:]
    assert (table.token[begins] == 2).all() and (table.token[ends - 1] == 3).all()
    # "return" is six word pieces: 240 of them in pieces of 30 between [CLS] and [SEP]
    assert np.diff(table.seq_start).tolist() == [table.seq_start[1], 3, *[32] * 8, 6]
    # a sequence alone is what it is among longer ones
    hf, expected = tf.BertModel.from_pretrained(bert, add_pooling_layer=False), []
    for a, b in zip(begins, ends):
        ids = torch.from_numpy(table.token[a:b].astype(np.int64))[None]
        hidden = hf.eval()(ids, output_hidden_states=True).hidden_states[2][0]
        expected.append(hidden[torch.from_numpy(table.stored[a:b].copy())])
    assert torch.allclose(rows["after"], torch.cat(expected), atol=1e-5)
    # the changed last token of the last document reaches its first, and no other document
    changed = (rows["before"] != rows["after"]).any(1)
    assert changed.nonzero().flatten().tolist() == list(range(store.rows - 4, store.rows))
    message = refused(str(bert), text=str(text), out=tmp_path / "c", packing="isolate", compute="fp32", **options)
    assert message == "--packing isolate is for causal models; an encoder takes --packing separate"


def test_the_flow_on_an_encoder(bert, tmp_path):
    """Tier 1, the index and a prompt work; what needs a next-token loss is refused, never a number."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def f{i} ( a , b ) : return a . b{i}" for i in range(300)))
    acts = collect(
        str(bert),
        site="blocks.1.hook_resid_post",
        text=str(text),
        out=tmp_path / "acts",
        split_documents="line",
        context=32,
    )
    sae = sk.train(sk.TopK(k=4, d_sae=128), acts, out=tmp_path / "sae", batch=512)
    assert 0 < sk.evaluate(sae, acts, tiers=(1,)).content["tiers"]["1"]["metrics"]["fvu"]["value"] < 1
    with pytest.raises(SaekitError, match=r"attention of .* is not causal: it has no next-token loss; pass --tiers 1"):
        sk.evaluate(sae, acts, tiers=(1, 2))
    index = sk.build_index(sae, acts)
    assert len(index) == 128 and "raises" not in index.feature(0).text("top", color=False)
    encoded = index.encode("def f1 ( a )")
    # [CLS] d ##e ##f f ##1 ( a ) [SEP]
    assert encoded.tokens[0] == 2 and encoded.tokens[-1] == 3 and len(encoded.tokens) == 10
    assert encoded.encoded.tolist() == [False, *[True] * 8, False]


# Ids instead of text


def test_token_ids(lm, tiny_model, tmp_path):
    """Field case 15: a model without tokenizer files, ids from .jsonl."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*"))
    documents = [[5, 6, 7], list(range(10, 60)), [9]]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    options = {"site": SITES[0], "context": 32, "compute": "fp32", "dtype": "float32"}
    message = refused(str(folder), text=str(path), out=tmp_path / "a", **options)
    assert (
        message == f"{folder} has no tokenizer, so text cannot be read; pass --tokenizer, or token ids with --ids-field"
    )
    store = collect(str(folder), text=str(path), out=tmp_path / "a", ids_field="input_ids", drop_ids=(9,), **options)
    assert store.table.token.tolist() == [5, 6, 7, *range(10, 60), 9] and store.rows == 53
    assert store.manifest["tokenizer"] is None and store.manifest["model"]["vocab_size"] == 300
    assert store.manifest["text"]["bytes"] is None and check(tmp_path / "a") == []
    assert torch.allclose(store.read(SITES[0], 0, 32), alone(lm, store.table.token[:32]), atol=1e-5)
    path.write_text(json.dumps({"input_ids": [5, 300]}) + "\n")
    message = refused(str(folder), text=str(path), out=tmp_path / "b", ids_field="input_ids", **options)
    assert message == f"{path} line 1: id 300; the model embeds 0 to 299"
    # with a tokenizer beside the model there is a separator, and the special ids have no row
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))
    store = collect(str(tiny_model), text=str(path), out=tmp_path / "c", ids_field="input_ids", **options)
    assert store.table.token.tolist() == [5, 6, 7, 1, *range(10, 60), 1, 9] and store.rows == 54


# Signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_batch_finish(acts, lm, tiny_text, tmp_path, monkeypatch, number, code):
    """At the tenth batch, in the second shard: the first is whole, the second leaves nothing, and the message says so."""
    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 3000)
    collect(lm, text=str(tiny_text), out=tmp_path / "whole", **SETTINGS)
    capture, done, out = lm.capture, 0, tmp_path / "a"

    def signalled(*args):
        nonlocal done
        done += 1
        if done == 10:
            signal.raise_signal(number)
        return capture(*args)

    with monkeypatch.context() as m:
        m.setattr(lm, "capture", signalled)
        with pytest.raises((KeyboardInterrupt, Terminated)) as stop:
            collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    said = stop.value.message if isinstance(stop.value, Terminated) else str(stop.value)
    assert said == "stopped in shard 1 of 3, 1 are written; the same command continues"
    assert getattr(stop.value, "code", 130) == code and done == 10
    assert sorted(p.name for p in (out / SITES[0]).iterdir()) == ["shard-00000.safetensors"]
    collect(lm, text=str(tiny_text), out=out, **SETTINGS)
    assert files(out) == files(tmp_path / "whole")


def test_the_sample_of_norms_is_larger_than_two_shards(lm, tiny_text, tmp_path, monkeypatch):
    """Shards of one batch (496 rows): of the seven in a sample of 3,000 rows, two are kept and five computed again."""
    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 3000)
    batches, capture = [], lm.capture
    monkeypatch.setattr(lm, "capture", lambda ids, *rest: batches.append(len(ids)) or capture(ids, *rest))
    monkeypatch.setattr(StoreWriter, "shard_sequences", 16)
    store = collect(lm, text=str(tiny_text), out=tmp_path / "a", **{**SETTINGS, "site": SITES[0]})
    assert len(batches) == 20 + 5 and len(store.manifest["shards"]) == 20
    norms = store.read(SITES[0], 0, 3000).double().norm(dim=1)
    assert store.manifest["sites"][SITES[0]]["norm_limit"] == pytest.approx(10 * np.median(norms.numpy()), rel=1e-12)


# Standard input


@pytest.fixture
def piped(monkeypatch):
    """`piped(text)` puts text into standard input."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_standard_input(lm, tiny_text, tmp_path, piped):
    """A line is a document; the store is that of the same lines in a .jsonl file but for what it is called."""
    lines = [json.loads(line)["text"].replace("\n", " ") for line in tiny_text.read_text().splitlines()]
    piped("\n".join(lines))
    options = {**SETTINGS, "site": SITES[0], "tokens": 900}
    store = collect(lm, text="-", out=tmp_path / "a", **options)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    same = collect(lm, text=str(tmp_path / "lines.jsonl"), out=tmp_path / "b", **options)
    assert store.manifest["text"]["tokens_sha256"] == same.manifest["text"]["tokens_sha256"]
    assert store.manifest["text"]["source"] == "-"


def test_standard_input_interrupted(lm, tmp_path, piped, monkeypatch):
    """While it is read there is no going on; once it is read the same command continues."""
    monkeypatch.setattr(StoreWriter, "shard_sequences", 16)
    text, out, part = "a b c d e f g h\n" * 400, tmp_path / "a", StoreWriter.part
    options = {**SETTINGS, "site": SITES[0], "tokens": None}

    def interrupted(self, *args):
        part(self, *args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as m:
        m.setattr(StoreWriter, "part", interrupted)
        piped(text)
        with pytest.raises(KeyboardInterrupt, match=r"stopped at token \d+ of the text; the same command continues"):
            collect(lm, text="-", out=out, **options)
    piped(text)
    message = refused(lm, text="-", out=out, **options)
    assert message == f"stdin cannot be read again; delete {out} and start over, or save the text to a file"
    shutil.rmtree(out)
    with monkeypatch.context() as m:
        m.setattr(saekit.collector, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        piped(text)
        with pytest.raises(KeyboardInterrupt):
            collect(lm, text="-", out=out, **options)
    piped("")
    assert collect(lm, text="-", out=out, **options).rows > 3000


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(line, capture_output=True).returncode:
        pytest.skip(
            "mounting is not allowed here; the patched write of test_committed_shards_are_not_computed_again stands for it"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(acts, lm, tiny_text, small_disk, monkeypatch):
    """Something else takes the space after the check: committed shards stay, and the same command completes the store."""
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(saekit.collector, "NORM_ROWS", 3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    (small_disk / "other").write_bytes(bytes(2 << 20))
    out, options = small_disk / "acts", {**SETTINGS, "site": SITES[:1], "tokens": None}
    with pytest.raises(SaekitError, match=r"disk full at shard \d of \d; free .* and run the same command again"):
        collect(lm, text=str(tiny_text), out=out, **options)
    with pytest.raises(SaekitError, match="is unfinished"):
        open_store(out)
    (small_disk / "other").unlink()
    store = collect(lm, text=str(tiny_text), out=out, **options)
    assert check(out) == [] and len(store.manifest["shards"]) > 1


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
    assert message(tokens=10**9).endswith("of 1,000,000,000 tokens; add --finish to close the store with what there is")
    assert message(packing="tight") == "--packing tight is not known; choose join, isolate, separate"
    assert message(threads=0) == "--threads is 0; it must be at least 1"
    assert message(inputs=[1]) == "give either text or inputs"
    assert message(model="./ckpt").startswith("cannot load model ./ckpt: no such folder")
    assert not out.exists()


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

    def capture_(ids, *rest):
        nonlocal seen
        found = capture(ids, *rest)
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
