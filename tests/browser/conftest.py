"""SAE folders to browse: real Python text, a random model, and codes that follow rules one can read off the text.

T tokens · F features · D width · V vocabulary · N firings
"""

import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from driving import CHROMIUM

SITE = "blocks.0.hook_resid_post"
CONTEXT = 128
WIDTH = 64
VOCABULARY = 1200


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """Folder of a random Llama whose tokenizer was trained on the text that is indexed: words, not bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([d.text for d in documents(150_000)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT, bos_token_id=0,
            eos_token_id=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def documents(characters: int):
    """Files of the standard library, together at least so many characters."""
    from saekit.text import stdlib_documents

    total = 0
    for document in stdlib_documents():
        if 2000 < len(document.text) < 40_000:
            yield document
            total += len(document.text)
            if total >= characters:
                return


def rules(text: str) -> dict[str, np.ndarray]:
    """Per character: whether a rule of Python text holds there."""
    n = len(text)
    out = {}

    def spans(name: str, pattern: str, flags=0):
        mark = np.zeros(n, bool)
        for match in re.finditer(pattern, text, flags):
            mark[match.start() : match.end()] = True
        out[name] = mark

    spans("comment", r"#[^\n]*")
    spans("docstring", r'"""[\s\S]*?"""')
    spans("string", r"'[^'\n]*'")
    spans("name being defined", r"(?<=def )\w+|(?<=class )\w+")
    spans("attribute of self", r"(?<=self\.)\w+")
    spans("import line", r"^(from|import) [^\n]*", re.M)
    spans("number", r"\b\d+\b")
    spans("capitals", r"\b[A-Z][A-Z_]+\b")
    spans("decorator", r"^\s*@[^\n]*", re.M)
    spans("exception", r"\b\w*Error\b")
    spans("indent of eight", r"^ {8}(?! )", re.M)
    spans("keyword argument", r"\w+(?==[^=])")
    spans("comparison", r"==|!=|<=|>=| < | > | is | in ")
    spans("return", r"return [^\n]*")
    return out


def make_sae(
    folder,
    language_model,
    *,
    tokens: int = 12_000,
    n_features: int = 256,
    signed: bool = False,
    by_token=None,
    logits=True,
    variant=None,
    extra=None,
    options=None,
):
    """An SAE folder with config.json, sae.safetensors and index/. Features 0 to 13 follow `rules` in order, 14 is dense,
    15 and 16 are near-duplicates, 17 fires on sequence starts, 18 fires once, 19 is dead; then one per common token, then
    rare random ones, and dead ones at the end. Signed: odd codes of feature 2 are negative, feature 4 is negative only."""
    import torch
    from saekit_kernels import Codes
    from transformers import AutoTokenizer

    from saekit.encoding import Chunk
    from saekit.feature_index import IndexBuilder, vocab_bytes
    from saekit.model import load_model
    from saekit.sae import SAE
    from saekit.store import TokenTable
    from saekit.variants import VARIANTS

    rng = np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    ids, marks, doc_of, begins = [], [], [], []
    for d, document in enumerate(documents(tokens * 4)):
        coded = tokenizer(document.text, return_offsets_mapping=True, add_special_tokens=False)
        found = np.stack(list(rules(document.text).values()))
        where = np.minimum([a for a, _ in coded["offset_mapping"]], found.shape[1] - 1)
        begins.append(sum(map(len, ids)))
        ids.append(np.array(coded["input_ids"]))
        marks.append(found[:, where])
        doc_of.append(d)
    token = np.concatenate(ids)[:tokens]
    rule_RT = np.concatenate(marks, 1)[:, :tokens]
    T = len(token)
    token[::CONTEXT] = tokenizer.bos_token_id

    fires = np.zeros((n_features, T), bool)
    fires[: len(rule_RT)] = rule_RT
    R = len(rule_RT)
    fires[R] = rng.random(T) < 0.4
    fires[R + 1] = np.isin(token, np.bincount(token).argsort()[-40:-34])
    fires[R + 2] = fires[R + 1] & (rng.random(T) < 0.97)
    fires[R + 3, 1::CONTEXT] = True
    fires[R + 4, 37 * CONTEXT + 60] = True
    common = np.bincount(token[token != tokenizer.bos_token_id]).argsort()[::-1]
    first, last = R + 6, n_features - 20
    half = first + (last - first) // 2
    for j, t in zip(range(first, half), common, strict=False):
        fires[j] = (token == t) & (rng.random(T) < 0.9)
    for j in range(half, last):
        fires[j] = rng.random(T) < 10 ** rng.uniform(-3.5, -2.3)
        fires[j, 5 + CONTEXT * (j % 40)] = True
    stored = token != tokenizer.bos_token_id
    fires[:, ~stored] = False
    codes_FT = fires * rng.gamma(2.5, 1.2, fires.shape).astype(np.float32)
    if signed:
        codes_FT[2] *= np.where(rng.random(T) < 0.5, -1, 1)
        codes_FT[4] *= -1

    lm = load_model(str(language_model), compute="fp32")
    W_U_VD, note = lm.unembedding()
    after = np.append(token[1:], token[0])
    towards = torch.stack(
        [W_U_VD[torch.from_numpy(after[f])].mean(0) if f.any() else torch.zeros(WIDTH) for f in fires]
    )
    towards -= W_U_VD[torch.from_numpy(after)].mean(0)
    W_dec_FD = torch.nn.functional.normalize(towards + 0.02 * torch.from_numpy(rng.normal(size=(n_features, WIDTH))).float() * towards.norm(dim=1).mean(), dim=1)  # fmt: skip
    W_dec_FD[R + 2] = torch.nn.functional.normalize(W_dec_FD[R + 1] + 0.01 * W_dec_FD[R], dim=0)
    variant = variant or VARIANTS["abs_topk" if signed else "topk"](k=8, d_sae=n_features)
    model = lm.manifest_entry()
    config = {
        "site": SITE,
        "model": model,
        "context": {"length": CONTEXT, "prepend_bos": True, "dropped_ids": [0]},
    }
    sae = SAE(variant, W_dec_FD.clone(), W_dec_FD, torch.zeros(n_features), torch.zeros(WIDTH), config, extra, options)
    sae.save(folder)

    bounds = np.append(np.arange(0, T, CONTEXT), T).astype(np.int64)
    begins = np.array([b for b in begins if b < T], np.int64)
    run_start = np.unique(np.concatenate([begins, bounds[:-1]]))
    run_doc = np.searchsorted(begins, run_start, side="right") - 1
    table = TokenTable(
        token.astype(np.uint16), stored, bounds, run_start, run_doc.astype(np.int64), run_start - begins[run_doc]
    )
    (folder.parent / "store").mkdir(exist_ok=True)
    names = [{"name": d.name, "source": "stdlib", "licence": "PSF-2.0"} for d in documents(tokens * 4)]
    (folder.parent / "store" / "documents.jsonl").write_text("".join(json.dumps(n) + "\n" for n in names))
    position = np.flatnonzero(stored)
    store = SimpleNamespace(
        table=table,
        path=folder.parent / "store",
        fingerprint="sha256:" + "5" * 64,
        manifest={"model": model, "tokenizer": {"fingerprint": "sha256:" + "7" * 64}},
        valid_rows=lambda sites, split="all", outliers="skip": np.arange(len(position)),
        seq_rows=lambda: np.searchsorted(position, bounds),
    )
    builder = IndexBuilder(
        sae,
        store,
        folder,
        vocab=vocab_bytes(tokenizer, VOCABULARY),
        unembedding=(W_U_VD, note) if logits else None,
        by_token=by_token,
    )
    row, feature = np.nonzero(codes_FT.T[position])
    value = codes_FT.T[position][row, feature]
    codes = Codes.flat(
        torch.from_numpy(np.searchsorted(row, np.arange(len(position) + 1))),
        torch.from_numpy(feature),
        torch.from_numpy(value),
        n_features,
    )
    xhat_TD = codes.times(W_dec_FD)
    noise = 0.3 * torch.from_numpy(rng.normal(size=xhat_TD.shape)).float()
    sequences = np.searchsorted(bounds, position, side="right") - 1
    builder.update(
        Chunk(np.arange(len(position)), position, sequences, sequences % 20 == 19, xhat_TD + noise, codes, xhat_TD)
    )
    builder.finish()
    return folder


@pytest.fixture(scope="session")
def saes(tmp_path_factory, language_model):
    """A folder with two SAEs: `plain`, and `signed` without by_token and logits."""
    root = tmp_path_factory.mktemp("saes")
    make_sae(root / "plain", language_model)
    make_sae(root / "signed", language_model, tokens=6_000, signed=True, by_token=False, logits=False)
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory, language_model):
    """An SAE that was trained and indexed on a store beside it, without an evaluation."""
    import saekit as sk

    root = tmp_path_factory.mktemp("trained")
    (root / "text.txt").write_text("\n".join(d.text for d in documents(60_000)), encoding="utf-8")
    store = sk.collect(
        str(language_model), site=SITE, text=str(root / "text.txt"), out=root / "acts", context=CONTEXT, compute="fp32"
    )
    sae = sk.train(sk.VARIANTS["topk"](k=8, d_sae=256), store, out=root / "sae", epochs=1, batch=512)
    sk.build_index(sae, store)
    return root / "sae"


@pytest.fixture(scope="session")
def variants(tmp_path_factory, language_model):
    """One SAE per panel of a variant, trained for k = 8: `mutual`, `budgets`, `noisy`."""
    import torch

    from saekit.variants import FeatureChoice, MutualChoice, Variational

    root, F = tmp_path_factory.mktemp("variants"), 256
    calibrated = {"threshold_source": "calibration", "calibration_rows": 4096}
    extra = {"threshold": torch.tensor(0.01)}
    make_sae(root / "mutual", language_model, tokens=6_000, variant=MutualChoice(k=8), extra=extra, options=calibrated)
    # budgets of a fifth of the tokens for the first four, of a hundredth of them for the rest
    budget_F = torch.full((F,), 0.01)
    budget_F[:4] = 0.2
    extra = {"threshold": torch.linspace(0.01, 0.1, F), "budget": budget_F}
    make_sae(
        root / "budgets", language_model, tokens=6_000, variant=FeatureChoice(k=8), extra=extra, options=calibrated
    )
    # σ = 2·e^(ρ/2): 2 for feature 0, e^−2 · 2 for the others; codes are drawn from a gamma distribution of mean 3
    rho_F = torch.full((F,), -4.0)
    rho_F[0] = 0
    make_sae(root / "noisy", language_model, tokens=6_000, signed=True, variant=Variational(k=8, prior_std=2.0), extra={"b_var": rho_F})  # fmt: skip
    return root


@pytest.fixture(scope="session")
def chromium():
    """One context for all tests, so that Streamlit's scripts are fetched once; each page is a session of its own."""
    if CHROMIUM is None:
        assert "SAEKIT_REQUIRE_BROWSER" not in os.environ, "no Chromium here, and this run must have one"
        pytest.skip("no Chromium at /usr/bin/chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_context()
        browser.close()
