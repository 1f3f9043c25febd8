"""Metrics against a dense float64 reference, and what must hold whatever the SAE."""

import itertools

import numpy as np
import pytest
import torch

import saekit as sk
from saekit.encoding import encode_store
from saekit.errors import SaekitError
from saekit.evaluation.language_model import language_model_metrics, spliced_losses
from saekit.evaluation.metrics import BlockSums
from saekit.evaluation.reconstruction import Reconstruction
from saekit.model import load_model

SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_text):
    return sk.collect(tiny_model, site=SITE, text=tiny_text, out=tmp_path_factory.mktemp("e") / "acts", context=64)


def make_sae(W_enc, W_dec, b_enc, b_dec, k):
    return sk.SAE(
        sk.TopK(k=k, d_sae=len(W_enc)),
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        {
            "site": SITE,
            "variant": "topk",
            "options": {"k": k},
            "d_sae": len(W_enc),
            "d_in": W_enc.shape[1],
            "signed": False,
        },
    )


def random_sae(store, k=4, F=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    D = store.d(SITE)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    mean = torch.from_numpy(store.statistics(SITE).mean_D.copy()).float()
    return make_sae(W.clone(), W, torch.zeros(F), mean, k)


def identity_sae(store):
    """Two features per axis, one for each sign: codes reproduce x exactly."""
    D = store.d(SITE)
    W = torch.cat([torch.eye(D), -torch.eye(D)])
    return make_sae(W.clone(), W, torch.zeros(2 * D), torch.zeros(D), k=D)


def tier1(sae, store, rows):
    sequences = np.unique(np.searchsorted(store.seq_rows(), rows, side="right") - 1)
    consumer = Reconstruction(sae, torch.from_numpy(store.statistics(SITE).mean_D.copy()), sequences)
    encode_store(sae, store, SITE, [consumer], rows=rows)
    return consumer.metrics()


def test_tier1_equals_a_dense_reference(store):
    sae = random_sae(store)
    rows = store.valid_rows([SITE], split="all")[:3000]
    metrics = tier1(sae, store, rows)
    x = store.read(SITE, 0, int(rows[-1]) + 1).double()[torch.from_numpy(rows)]
    pre = (x - sae.b_dec.double()) @ sae.W_enc.double().T
    top = pre.topk(4, 1)
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    y = codes @ sae.W_dec.double() + sae.b_dec.double()
    e, mu = x - y, x.mean(0)
    expected = {
        "fvu": e.square().sum() / (x - mu).square().sum(),
        "mse": e.square().mean(),
        "nmse_token": (e.square().sum(1) / x.square().sum(1)).mean(),
        "cosine": torch.nn.functional.cosine_similarity(x, y).mean(),
        "offset": e.mean(0).norm() / (x - mu).square().sum(1).mean().sqrt(),
        "norm_ratio": y.norm(dim=1).mean() / x.norm(dim=1).mean(),
        "gamma": y.square().sum() / (x * y).sum(),
        "l0": (codes != 0).sum(1).double().mean(),
        "l1": codes.abs().sum(1).mean(),
        "alive": (codes != 0).any(0).double().mean(),
        "dead_at": (~(codes != 0).any(0)).sum(),
    }
    for key, value in expected.items():
        assert metrics[key].value == pytest.approx(float(value), rel=2e-4), key
    assert metrics["fvu"].ci95[0] < metrics["fvu"].value < metrics["fvu"].ci95[1]


def test_the_mean_predictor_has_fvu_1_and_identity_0(store):
    rows = store.valid_rows([SITE], split="all")
    D = store.d(SITE)
    x = store.read(SITE, 0, store.rows).float()[torch.from_numpy(rows)]
    silent = make_sae(torch.zeros(8, D), torch.eye(D)[:8], torch.full((8,), -1.0), x.mean(0), k=2)
    metrics = tier1(silent, store, rows)
    assert metrics["fvu"].value == pytest.approx(1.0, abs=1e-5)
    assert metrics["l0"].value == 0 and metrics["cosine"].value is not None
    assert tier1(identity_sae(store), store, rows)["fvu"].value < 1e-8


def test_batch_size_does_not_matter(store, monkeypatch):
    sae, rows = random_sae(store), store.valid_rows([SITE], split="heldout")
    one = tier1(sae, store, rows)
    monkeypatch.setattr("saekit.encoding.CHUNK_ROWS", 64)
    two = tier1(sae, store, rows)
    assert all(one[k].value == pytest.approx(two[k].value, rel=1e-6) for k in one)


def splice(sae, store, lm, batch=16):
    sequences = np.arange(min(40, store.n_sequences))
    mean = torch.from_numpy(store.statistics(SITE).mean_D.copy())
    return language_model_metrics(spliced_losses(sae, store, lm, SITE, sequences, mean, batch), 0)


@pytest.mark.parametrize("packing", ["join", "isolate", "separate"])
def test_losses_are_those_of_what_the_model_saw(tiny_model, tiny_text, tmp_path, packing):
    """The clean loss, computed one stretch at a time: a sequence, or under `isolate` one document of it."""
    store = sk.collect(
        tiny_model, site=SITE, text=tiny_text, out=tmp_path / "a", context=64, tokens=2000, packing=packing
    )
    lm, table = load_model(str(tiny_model), compute="fp32"), store.table
    metrics = splice(random_sae(store), store, lm)
    losses = []
    for s in range(min(40, store.n_sequences)):
        a, b = int(table.seq_start[s]), int(table.seq_start[s + 1])
        inside = [int(r) for r in table.run_start if a + 1 < r < b] if packing == "isolate" else []
        for c, d in itertools.pairwise([a, *inside, b]):
            ids = torch.from_numpy(table.token[c:d].astype(np.int64))
            logp = lm.logits(ids[None])[0, :-1].log_softmax(-1)
            # BOS and EOS, ids 0 and 1, are no text to predict
            losses += [-logp[t, i].item() for t, i in enumerate(ids[1:].tolist()) if i > 1]
    assert metrics["ce_clean"].n == len(losses)
    assert metrics["ce_clean"].value == pytest.approx(np.mean(losses), rel=1e-5)


def test_identity_recovers_all_of_the_loss(store, tiny_model):
    lm = load_model(str(tiny_model), compute="fp32")
    metrics = splice(identity_sae(store), store, lm)
    assert metrics["ce_added"].value == pytest.approx(0.0, abs=1e-4)
    assert metrics["kl"].value == pytest.approx(0.0, abs=1e-4)
    assert metrics["ce_recovered_zero"].value == pytest.approx(1.0, abs=1e-3)
    assert metrics["top1_agree"].value > 0.999


def test_losses_are_the_models_own(store, tiny_model):
    """CE of the clean run, from Transformers' logits sequence by sequence."""
    from transformers import AutoModelForCausalLM

    lm = load_model(str(tiny_model), compute="fp32")
    metrics = splice(random_sae(store), store, lm)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    table, nats, n = store.table, 0.0, 0
    dropped = torch.tensor(store.manifest["special_tokens"]["dropped_ids"])
    for s in range(40):
        ids = torch.from_numpy(np.asarray(table.token[table.seq_start[s] : table.seq_start[s + 1]]).astype(np.int64))
        with torch.no_grad():
            logp = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        real = ~torch.isin(ids[1:], dropped)
        nats -= logp.gather(1, ids[1:, None])[real].sum().item()
        n += int(real.sum())
    assert metrics["ce_clean"].value == pytest.approx(nats / n, rel=1e-4)
    assert metrics["ce_clean"].n == n
    assert metrics["ce_zero"].value != metrics["ce_clean"].value
    assert metrics["kl"].value > 0


def test_batching_does_not_change_losses(store, tiny_model):
    lm = load_model(str(tiny_model), compute="fp32")
    sae = random_sae(store)
    one, two = splice(sae, store, lm, 16), splice(sae, store, lm, 3)
    assert all(one[k].value == pytest.approx(two[k].value, rel=1e-4) for k in ("ce_clean", "ce_sae", "kl", "ce_mean"))


def test_intervals_cover_the_truth():
    """Simulated ratio with dependent tokens: 95 % intervals hold the true mean in 90 to 98 of 100 repetitions."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(100):
        sequences = np.repeat(np.arange(120), 20)
        level = rng.normal(3.0, 1.0, 120)[sequences]
        blocks = BlockSums(np.arange(120))
        blocks.add(sequences, top=level + rng.normal(0, 0.3, len(sequences)), bottom=np.ones(len(sequences)))
        low, high = blocks.interval(lambda s: s["top"] / s["bottom"], seed)
        held += low <= 3.0 <= high
    assert 88 <= held <= 99


def test_few_blocks_give_no_interval():
    blocks = BlockSums(np.arange(5))
    blocks.add(np.arange(5), top=np.ones(5), bottom=np.ones(5))
    assert blocks.interval(lambda s: s["top"] / s["bottom"], 0) is None


def test_training_rows_are_refused_unless_allowed(store, tmp_path):
    sae = sk.train(sk.TopK(k=4, d_sae=96), store, out=tmp_path / "sae", batch=512, split="all")
    with pytest.raises(SaekitError, match="no row that the SAE was not trained on .*--allow-train-tokens"):
        sk.evaluate(sae, store, tiers=(1,))
    evaluation = sk.evaluate(sae, store, tiers=(1,), allow_train_tokens=True)
    assert any("trained on" in w for w in evaluation.warnings())
    assert evaluation.content["data"]["split"] == "train"


def test_stored_results_of_another_sae_are_refused(store, tmp_path):
    sae = sk.train(sk.TopK(k=4, d_sae=96), store, out=tmp_path / "sae", batch=512)
    sk.evaluate(sae, store, tiers=(1,))
    sae.b_enc += 1
    sae.save(tmp_path / "sae")
    with pytest.raises(SaekitError, match="belongs to another SAE"):
        sk.evaluation.load_evaluation(tmp_path / "sae")


def test_evaluating_again_replaces_what_belonged_to_another_sae_and_keeps_what_did_not_change(store, tmp_path):
    sae = sk.train(sk.TopK(k=4, d_sae=96), store, out=tmp_path / "sae", batch=512)
    sk.evaluate(sae, store)
    before = sk.evaluation.load_evaluation(tmp_path / "sae").content["tiers"]
    sk.evaluate(sae, store, tiers=(1,), tokens=500)
    after = sk.evaluation.load_evaluation(tmp_path / "sae").content["tiers"]
    assert after["2"] == before["2"] and after["1"]["metrics"]["fvu"]["n"] == 500
    sae.b_enc += 1
    sae.save(tmp_path / "sae")
    sk.evaluate(sae, store, tiers=(1,))
    assert set(sk.evaluation.load_evaluation(tmp_path / "sae").content["tiers"]) == {"1"}
