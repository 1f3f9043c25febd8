"""Signed codes: (W_enc_j, b_enc_j, d_j) and its negative are one feature. Which of the two is held changes nothing that is
measured; the gauge is chosen once, at the end."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import saekit as sk
from saekit.encoding import Chunk
from saekit.evaluation.reconstruction import Reconstruction
from saekit.trainer import Trainer
from saekit.variants import VARIANTS

D, F, B = 16, 64, 64
K: dict[str, Any] = {"k": 4, "d_sae": F, "dead_after": 500}
SIGNED = {
    "abs_topk": sk.AbsTopK(**K),
    "variational": sk.Variational(**K, sample="none"),
    "variational all": sk.Variational(**K, sample="none", kl_on="all"),
    "variational input": sk.Variational(**K, sample="none", variance="input"),
    "variational fixed": sk.Variational(**K, sample="none", variance="fixed"),
}
TRUTH = torch.randn(20, D, generator=torch.Generator().manual_seed(7))


def test_who_is_signed():
    signed = {name for name, cls in VARIANTS.items() if cls().signed}
    assert signed == {"abs_topk", "variational"}
    assert not sk.Variational(relu_mu=True).signed
    assert {v.name for v in SIGNED.values()} == signed


def rows(step: int, n: int = B) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    on = (torch.rand(n, 20, generator=g) < 0.1) * (2.0 * torch.randint(0, 2, (n, 20), generator=g) - 1)
    return on @ TRUTH + 0.05 * torch.randn(n, D, generator=g)


def signs() -> torch.Tensor:
    return 2.0 * torch.randint(0, 2, (F,), generator=torch.Generator().manual_seed(3)) - 1


def flip(parameters, sign_F: torch.Tensor):
    parameters["W_enc"].mul_(sign_F[:, None])
    parameters["W_dec"].mul_(sign_F[:, None])
    parameters["b_enc"].mul_(sign_F)


@pytest.mark.parametrize("name", SIGNED)
def test_flipped_features_train_alike_to_the_bit(name):
    """Losses and L0 of every step, dead features, AuxK; after 70 steps the weights are those of the other run, flipped."""
    sign_F = signs()
    runs = []
    for flipped in (False, True):
        trainer = Trainer(SIGNED[name], D, tokens=B * 80, fit_rows=rows(999, 256))
        if flipped:
            flip(trainer.parameters(), sign_F)
        logs = []
        for step in range(70):
            trainer.step(rows(step))
            logs.append(trainer.log())
        runs.append((trainer, logs))
    (one, logs), (two, flipped_logs) = runs
    assert logs == flipped_logs and any(log.get("aux", 0) > 0 for log in logs)
    flip(two.parameters(), sign_F)
    for n, p in one.parameters().items():
        assert torch.equal(p, two.parameters()[n]), n
    assert torch.equal(one.idle_F, two.idle_F)


def trained(variant) -> Trainer:
    trainer = Trainer(variant, D, tokens=B * 80, fit_rows=rows(999, 256))
    for step in range(70):
        trainer.step(rows(step))
    return trainer


def metrics(sae, x_BD: torch.Tensor) -> dict:
    codes = sae.encode(x_BD)
    n = len(x_BD)
    sequences = np.arange(n) // 16
    consumer = Reconstruction(sae, x_BD.mean(0), np.unique(sequences))
    consumer.update(Chunk(np.arange(n), np.arange(n) % 16, sequences, np.ones(n, bool), x_BD, codes, sae.decode(codes)))
    return {key: (m.value, m.ci95, m.note) for key, m in consumer.metrics().items()}


@pytest.mark.parametrize("name", SIGNED)
def test_flipped_features_measure_alike(name):
    sae = trained(SIGNED[name]).sae()
    other = copy.deepcopy(sae)
    flip({n: p.data for n, p in other.named_parameters()}, signs())
    x_BD = rows(500, 512)
    one, two = sae.encode(x_BD), other.encode(x_BD)
    assert torch.equal(one.indices, two.indices) and torch.equal(one.values.abs(), two.values.abs())
    assert torch.equal(one.dense() * signs(), two.dense()) and not torch.equal(one.values, two.values)
    assert torch.equal(sae(x_BD), other(x_BD))
    assert (one.values < 0).any() and (two.values < 0).any()
    assert metrics(sae, x_BD) == metrics(other, x_BD)


@pytest.mark.parametrize("name", SIGNED)
def test_a_feature_that_fires_on_its_negative_side_alone_is_alive(name):
    """k = 1, two axes; every token lies on −e_0 or −e_1: both features live, no negative code is clipped. Signs do not cancel:
    +1 and −1 in one batch are two firings."""
    variant = sk.VARIANTS[SIGNED[name].name]
    more: dict[str, Any] = {"sample": "none"} if variant is sk.Variational else {}
    trainer = Trainer(variant(k=1, d_sae=3, dead_after=64, enc_init="tied", lr=1e-6, **more), 3)
    trainer.W_dec.copy_(torch.eye(3)), trainer.W_enc.copy_(torch.eye(3))
    x = torch.zeros(32, 3)
    x[:16, 0], x[16:, 1] = -1.0, -1.0
    x[0, 0] = 15.0
    for _ in range(3):
        trainer.step(x)
        assert trainer.idle_F[:2].tolist() == [0, 0]
    log = trainer.log()
    assert log["dead"] == 1 and log["l0"] == 1.0
    sae = trainer.sae()
    alone = sae.encode(x[1:])
    assert (alone.values < 0).all()
    assert metrics(sae, x[1:])["alive"][0] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["abs_topk", "variational", "abs_topk ema"])
def test_the_mean_code_of_every_feature_is_0_or_more_in_the_end(name):
    """Same codes but for signs, same reconstruction; features that were right are left as they were, and once is enough."""
    variant = sk.AbsTopK(**K, ema=0.9) if name == "abs_topk ema" else SIGNED[name]
    trainer = trained(variant)
    before = trainer.sae()
    kept = rows(700, 2048)
    asked = []

    def some(n):
        asked.append(n)
        return iter(kept.split(300))

    sae = trainer.finish(None, some)
    assert asked == [262_144]
    mean_F = before.encode(kept).dense().double().mean(0)
    assert (mean_F < 0).sum() > 5 and (mean_F > 0).sum() > 5
    after_F = sae.encode(kept).dense().double().mean(0)
    assert (after_F >= 0).all() and torch.equal(after_F, mean_F.abs())
    assert torch.equal(sae(kept), before(kept))
    sign_F = torch.where(mean_F < 0, -1.0, 1.0)
    for n in ("W_enc", "W_dec", "b_enc"):
        want = getattr(before, n) * (sign_F if n == "b_enc" else sign_F[:, None])
        assert torch.equal(getattr(sae, n), want), n
    again = {n: t.clone() for n, t in sae.state_dict().items()}
    sae.variant.finish(sae, some)
    assert all(torch.equal(t, again[n]) for n, t in sae.state_dict().items())
    # training may go on: its own weights are as they were
    assert torch.equal(trainer.sae().W_dec, before.W_dec)


def test_features_of_one_sign_are_left_alone():
    trainer = trained(sk.Variational(**K, relu_mu=True))
    sae, before = trainer.finish(None, lambda n: iter([rows(700, 512)])), trainer.sae()
    assert torch.equal(sae.W_dec, before.W_dec) and (sae.encode(rows(701)).values >= 0).all()
