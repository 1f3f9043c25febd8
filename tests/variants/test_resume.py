"""200 steps are the same to the bit when they are run again, and when a fresh Trainer takes over in the middle."""

from typing import Any

import pytest
import torch

import saekit as sk
from saekit.trainer import InputStatistics, Trainer
from saekit.variants import VARIANTS

D, F, B, STEPS = 8, 32, 32, 200
K: dict[str, Any] = {"k": 3, "d_sae": F, "dead_after": 600}
CASES = {
    "topk": sk.TopK(**K),
    "topk in two": sk.TopK(**K),
    "topk multi_k, k_anneal, clip, ema": sk.TopK(**K, multi_k=1 / 8, k_anneal=0.7, clip=0.05, ema=0.99),
    "abs_topk in two": sk.AbsTopK(**K),
    "abs_topk ema": sk.AbsTopK(**K, ema=0.99),
    "mutual_choice": sk.MutualChoice(**K),
    "mutual_choice dead in two": sk.MutualChoice(**K, aux_on="dead"),
    # the switch is at step 120, fresh trainers take over at 100 and 150
    "feature_choice": sk.FeatureChoice(**K),
    "feature_choice empirical in two": sk.FeatureChoice(**K, budget="empirical"),
    "variational in two": sk.Variational(**K),
    "variational before": sk.Variational(**K, sample="before"),
    "variational all": sk.Variational(**K, kl_on="all"),
    "variational input, ema": sk.Variational(**K, variance="input", ema=0.99),
    "top_afa": sk.TopAFA(d_sae=F, dead_after=600),
    "top_afa in two": sk.TopAFA(d_sae=F, dead_after=600),
    "relu": sk.ReLU(d_sae=F, l0=3.0, dead_after=600),
    "relu sparse in the end, in two": sk.ReLU(d_sae=F, l1=0.4, lr=0.036),
    "jumprelu in two": sk.JumpReLU(d_sae=F, l0=3.0),
    "jumprelu target, ema": sk.JumpReLU(d_sae=F, l0=3.0, l0_loss="target", ema=0.99),
    "gated": sk.Gated(d_sae=F, l0=3.0),
    "gated in two": sk.Gated(d_sae=F, l0=3.0),
    "matryoshka": sk.Matryoshka(**K),
    "matryoshka in two": sk.Matryoshka(**K),
}
TRUTH = torch.randn(24, D, generator=torch.Generator().manual_seed(7))


def test_every_variant_is_among_the_cases():
    assert {v.name for v in CASES.values()} == set(VARIANTS)


def batch(step: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 + step)
    on = (torch.rand(B, 24, generator=g) < 0.1) * (torch.rand(B, 24, generator=g) + 0.5)
    return 11 * (on @ TRUTH + 0.05 * torch.randn(B, D, generator=g)) + 3


ROWS = torch.cat([batch(-1 - i) for i in range(16)])
STATISTICS = InputStatistics(ROWS.mean(0), (ROWS - ROWS.mean(0)).square().sum(1).mean().item())


def fresh(variant, micro_batches: int, seed: int = 0, length: int | None = STEPS) -> Trainer:
    tokens = None if length is None else B * length
    return Trainer(
        variant, D, statistics=STATISTICS, tokens=tokens, fit_rows=ROWS, seed=seed, micro_batches=micro_batches
    )


def run(trainer: Trainer, until: int, logs: list) -> Trainer:
    while trainer.step_count < until:
        trainer.step(batch(trainer.step_count))
        # every 30 steps, so that sums are under way where a fresh trainer takes over
        if trainer.step_count % 30 == 0:
            logs.append(trainer.log())
    return trainer


def handed_over(trainer: Trainer, micro_batches: int, length: int | None = STEPS) -> Trainer:
    """A fresh trainer in its state; nothing of the old one is shared."""
    tensors, values = trainer.state()
    new = fresh(trainer.variant, micro_batches, length=length)
    new.restore({name: t.clone() for name, t in tensors.items()}, dict(values))
    return new


def assert_same(one: Trainer, two: Trainer):
    (a, plain_a), (b, plain_b) = one.state(), two.state()
    assert plain_a == plain_b and a.keys() == b.keys()
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ
    x = batch(5000)
    assert torch.equal(one.sae().encode(x).dense(), two.sae().encode(x).dense())
    assert torch.equal(one.sae()(x), two.sae()(x))


@pytest.mark.parametrize("name", CASES)
def test_the_same_after_a_fresh_start_in_the_middle(name):
    """Twice: at steps 100 and 150. The same again without one is less than this."""
    variant, micro_batches = CASES[name], 2 if name.endswith("in two") else 1
    logs: dict[str, list] = {"one": [], "resumed": []}
    one = run(fresh(variant, micro_batches), STEPS, logs["one"])
    resumed = run(fresh(variant, micro_batches), 100, logs["resumed"])
    for until in (150, STEPS):
        resumed = run(handed_over(resumed, micro_batches), until, logs["resumed"])
    assert_same(one, resumed)
    assert logs["one"] == logs["resumed"] and len(logs["one"]) == 6
    # what makes it hard was there: members of the list, a number of codes that changes roads
    if name in ("topk", "mutual_choice", "matryoshka", "abs_topk in two"):
        assert any("aux" in log and log["aux"] > 0 for log in logs["one"])
    if name == "relu sparse in the end, in two":
        assert 0 < one.l0 < F / 8


@pytest.mark.parametrize("name", ["topk", "feature_choice", "relu", "jumprelu target, ema", "variational input, ema"])
def test_a_run_of_unknown_length_resumes_as_well(name):
    logs: list = []
    one = run(fresh(CASES[name], 1, length=None), 80, logs)
    half = run(fresh(CASES[name], 1, length=None), 40, logs)
    assert_same(one, run(handed_over(half, 1, length=None), 80, logs))


@pytest.mark.parametrize("name", ["topk", "variational in two"])
def test_another_seed_is_another_run(name):
    one, two = (run(fresh(CASES[name], 1, seed=seed), 3, []) for seed in (0, 1))
    assert not torch.equal(one.W_dec, two.W_dec)


def test_noise_is_of_the_step_and_the_row(reference):
    """The same normals for a row whatever the micro-batches; others for each step and for each seed."""
    found = {}
    for seed, micro_batches in ((0, 1), (0, 2), (1, 1)):
        trainer = fresh(CASES["variational in two"], micro_batches, seed=seed)
        parts = []
        for step in (3, 4):
            trainer.step_count, trainer._rows = step, B
            for first in range(0, B, B // micro_batches):
                trainer._first_row = first
                parts.append(trainer._draw(3))
        found[seed, micro_batches] = torch.cat(parts)
    assert torch.equal(found[0, 1], found[0, 2]) and found[0, 1].shape == (2 * B, 3)
    assert not torch.equal(found[0, 1][:B], found[0, 1][B:]) and not torch.equal(found[0, 1], found[1, 1])
    assert abs(found[0, 1].mean()) < 0.3 and abs(found[0, 1].std() - 1) < 0.2


def test_the_switch_of_feature_choice_is_written_once():
    """Budgets are uniform up to step 119, frozen from the end of that step on; columns choose from step 120 on."""
    trainer = fresh(CASES["feature_choice"], 1)
    run(trainer, 119, [])
    assert torch.equal(trainer.buffers["budget"], torch.full((F,), 3 / F, dtype=torch.float64))
    assert not trainer.variant.chooses(trainer.moment(batch(0), B))
    run(trainer, 120, [])
    budget_F = trainer.buffers["budget"].clone()
    assert budget_F.sum().item() == pytest.approx(3.0) and budget_F.max() <= 0.5 and budget_F.unique().numel() > 5
    assert trainer.variant.chooses(trainer.moment(batch(0), B))
    run(trainer, STEPS, [])
    assert torch.equal(trainer.buffers["budget"], budget_F)
