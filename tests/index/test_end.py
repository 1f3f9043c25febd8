"""From a model's own activations: the index says what `encode` says, for the store's tokens and for typed text."""

import numpy as np
import pytest
import torch

from saekit.collector import collect
from saekit.errors import SaekitError
from saekit.feature_index import build_index, open_index
from saekit.model import load_model
from saekit.sae import SAE
from saekit.variants import TopK

SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def built(tiny_model, tiny_text, tmp_path_factory):
    """lm, store, SAE with random weights and its index over the first 4,000 tokens."""
    folder = tmp_path_factory.mktemp("built")
    lm = load_model(str(tiny_model), compute="fp32")
    store = collect(
        lm, out=folder / "acts", site=(SITE,), text=(str(tiny_text),), context=64, tokens=6000, dtype="float32"
    )
    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator), dim=1)
    config = {
        "site": SITE,
        "model": store.manifest["model"],
        "context": {"length": 64, "prepend_bos": True, "dropped_ids": [0, 1]},
    }
    SAE(TopK(k=8, d_sae=256), W.clone(), W, torch.zeros(256), torch.zeros(64), config).save(folder / "sae")
    sae = SAE.load(folder / "sae")
    return lm, store, sae, build_index(sae, store, tokens=4000, model=str(tiny_model))


def test_index_equals_encode_at_random_positions(built):
    _, store, sae, idx = built
    assert idx.n_tokens == 4032, "63 whole sequences of 64"
    rows = np.flatnonzero(store.row_positions() < idx.n_tokens)
    rows = np.random.default_rng(0).permutation(rows)[:1000]
    positions = store.row_positions()[rows]
    for row, position in zip(rows, positions, strict=True):
        pairs = sae.encode(store.read(SITE, row, row + 1)).pairs()
        got = dict(zip(*(a.tolist() for a in idx.at(int(position))), strict=True))
        assert set(got) == set(pairs.feature_N.tolist())
        assert np.allclose([got[j] for j in pairs.feature_N.tolist()], pairs.value_N.numpy(), rtol=2**-11)
    assert idx.check() == []


def test_text_and_logits_come_from_the_model(built, tiny_text):
    lm, _, sae, idx = built
    assert idx.has_text and "def add" in idx.text(20, 20, 60)
    assert idx.documents == [] or idx.documents[0]["name"]
    j = int(idx.table(limit=1).features[0])
    W_U_VD, _ = lm.unembedding()
    best = (sae.W_dec[j] @ W_U_VD.T).topk(5)
    assert [t.token for t in idx.feature(j).logits(5).up] == best.indices.tolist()


def test_typed_text_has_the_codes_of_the_store(built):
    lm, _, sae, idx = built
    # the first sequence as text, tokenised again
    ids = idx.file("tokens")["token"][1:40].tolist()
    typed = idx.encode(lm.tokenizer.decode(ids), lm=lm, sae=sae)
    assert (
        typed.tokens.tolist() == [0, *ids]
        and not typed.encoded[0]
        and typed.special[0]
        and len(typed.at(0).features) == 0
    )
    for t in range(1, 40):
        there, here = idx.at(t), typed.at(t)
        assert set(there.features.tolist()) == set(here.features.tolist())
        assert np.allclose(there.values, here.values, rtol=1e-3)
    strongest = typed.strongest(1)
    assert (
        np.abs(typed.codes_of(int(strongest.features[0]))).max()
        == abs(strongest.values[0])
        == np.abs(typed.values).max()
    )
    assert typed.l0.tolist() == [len(typed.at(t).features) for t in range(40)]
    assert np.allclose(typed.error[1:], idx.file("per_token")["error"][1:40], rtol=1e-3)
    with pytest.raises(SaekitError, match="holds no token"):
        idx.encode("", lm=lm, sae=sae)
    with pytest.raises(SaekitError, match="trained on contexts of 64"):
        idx.encode("x " * 200, lm=lm, sae=sae)


def test_without_the_model_the_index_says_what_is_missing(built, tmp_path):
    _, store, sae, idx = built
    sae.save(tmp_path / "copy")
    store.manifest["model"], known = {**store.manifest["model"], "id": str(tmp_path / "gone")}, store.manifest["model"]
    try:
        alone = build_index(tmp_path / "copy", store, tokens=200)
    finally:
        store.manifest["model"] = known
    assert not alone.has_text and not alone.has_logits and alone.text(1, 0, 0).startswith("#")
    assert any("no token text and no logit weights" in w for w in alone.manifest["warnings"])
    # the codes are the same ones
    assert np.array_equal(alone.at(7).features, idx.at(7).features)
    assert len(open_index(tmp_path / "copy").feature(0).html()) > 500
