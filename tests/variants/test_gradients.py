"""What one step hands to Adam, against dense float64 autograd, for every variant and option that changes the mathematics.

Every case runs at step 64 of 1,000 (the list of dead features is rebuilt there; penalties are 65 % warm), on sparse codes and
on dense matrices, in one and in two micro-batches, with and without dead features. B = 96, D = 16, F = 64.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch

from saekit import backward
from saekit.step import DenseSlots
from saekit.trainer import InputStatistics, Trainer, generator
from saekit.variants import (
    VARIANTS,
    AbsTopK,
    FeatureChoice,
    Gated,
    JumpReLU,
    Matryoshka,
    MutualChoice,
    ReLU,
    Revived,
    TopAFA,
    TopK,
    Variational,
)

B, D, F, STEP, STEPS = 96, 16, 64, 64, 1000
K: dict[str, Any] = {"k": 5, "d_sae": F, "dead_after": 10_000}
P: dict[str, Any] = {"l0": 6.0, "l1": 0.3, "d_sae": F, "dead_after": 10_000}
PHASE_2: dict[str, Any] = {**K, "switch": 0.05}

CASES = {
    "topk": TopK(**K),
    "topk multi_k": TopK(**K, multi_k=1 / 8),
    "topk multi_k of all": TopK(**{**K, "k": 17}, multi_k=1 / 8),
    "topk k_anneal": TopK(**K, k_anneal=0.1),
    "topk clip": TopK(**K, clip=1e-3),
    "topk ema": TopK(**K, ema=0.9),
    "topk k_aux": TopK(**K, k_aux=2, aux=1.0),
    "topk mean_square": TopK(**K, normalise="mean_square"),
    "topk sqrt_d": TopK(**K, normalise="sqrt_d"),
    "topk none": TopK(**K, normalise="none"),
    "abs_topk": AbsTopK(**K),
    "abs_topk k_anneal": AbsTopK(**K, k_anneal=0.1),
    "mutual_choice": MutualChoice(**K),
    "mutual_choice dead": MutualChoice(**K, aux_on="dead"),
    "mutual_choice k_anneal": MutualChoice(**K, k_anneal=0.1),
    "feature_choice phase 1": FeatureChoice(**K, switch=0.5),
    "feature_choice phase 2": FeatureChoice(**PHASE_2),
    "variational after": Variational(**K),
    "variational before": Variational(**K, sample="before"),
    "variational none": Variational(**K, sample="none"),
    "variational all": Variational(**K, kl_on="all"),
    "variational all before": Variational(**K, kl_on="all", sample="before"),
    "variational all none": Variational(**K, kl_on="all", sample="none"),
    "variational input": Variational(**K, variance="input"),
    "variational input all": Variational(**K, variance="input", kl_on="all"),
    "variational input before": Variational(**K, variance="input", sample="before"),
    "variational fixed": Variational(**K, variance="fixed", log_var_init=-2.0),
    "variational fixed clamped": Variational(**K, variance="fixed", log_var_init=-12.0),
    "variational no beta": Variational(**K, beta=0.0),
    "variational beta and prior": Variational(**K, beta=0.3, prior_std=0.7),
    "variational relu_mu": Variational(**K, relu_mu=True),
    "variational relu_mu all": Variational(**K, relu_mu=True, kl_on="all"),
    "variational relu_mu none": Variational(**K, relu_mu=True, sample="none"),
    "variational relu_mu before": Variational(**K, relu_mu=True, sample="before"),
    "variational k_anneal": Variational(**K, k_anneal=0.1),
    "top_afa": TopAFA(d_sae=F, dead_after=10_000),
    "top_afa input": TopAFA(d_sae=F, dead_after=10_000, afa_target="input"),
    "top_afa no norm": TopAFA(d_sae=F, dead_after=10_000, norm=0.0),
    "relu": ReLU(**P),
    "relu clip": ReLU(**P, clip=1e-3),
    "jumprelu": JumpReLU(**P, bandwidth=0.2, theta=0.15),
    "jumprelu target": JumpReLU(**P, bandwidth=0.2, theta=0.15, l0_loss="target"),
    # the window reaches below 0, where nothing is kept and nothing learns
    "jumprelu at 0": JumpReLU(**P, bandwidth=0.2, theta=0.05),
    "gated": Gated(**P),
    # V is about 144 here, and 1 in the other cases
    "variational none, raw": Variational(**K, sample="none", normalise="none"),
    "variational raw": Variational(**K, normalise="none"),
    "top_afa raw": TopAFA(d_sae=F, dead_after=10_000, normalise="none"),
    "relu raw": ReLU(**P, normalise="none"),
    "jumprelu raw": JumpReLU(**P, bandwidth=0.2, theta=0.15, normalise="none"),
    "gated raw": Gated(**P, normalise="none"),
    "matryoshka raw": Matryoshka(**K, normalise="none"),
    "matryoshka": Matryoshka(**K),
    "matryoshka 3": Matryoshka(**K, widths=(7, 30, F)),
    "matryoshka 1": Matryoshka(**K, widths=(F,)),
    "matryoshka k_anneal": Matryoshka(**K, k_anneal=0.1),
}


def test_every_variant_is_among_the_cases():
    assert {v.name for v in CASES.values()} == set(VARIANTS)


def made(variant, *, micro_batches=1) -> tuple[Trainer, torch.Tensor]:
    """A trainer at step 64 whose parameters have all moved off their start, and a batch in raw units."""
    g = torch.Generator().manual_seed(3)
    raw_BD = 3 * torch.randn(B, D, generator=g) + 1
    centre_D = raw_BD.mean(0)
    statistics = InputStatistics(
        centre_D, (raw_BD - centre_D).square().sum(1).mean().item(), raw_BD.norm(dim=1).mean().item()
    )
    trainer = Trainer(variant, D, statistics=statistics, tokens=B * STEPS, fit_rows=raw_BD, micro_batches=micro_batches)
    trainer._begin(B)
    trainer.step_count, trainer.rebuild_every = STEP, 64
    for name, p in trainer.parameters().items():
        size = {"W_enc": 0.1, "W_dec": 0.0, "W_var": 1.0, "b_var": 1.0, "threshold": 0.0, "r_mag": 0.3}.get(name, 0.03)
        unit = trainer.total_variance**0.5 if name in ("b_enc", "b_dec", "b_mag") else 1.0
        p.add_(size * unit * torch.randn(p.shape, generator=g))
    if "threshold" in trainer.parameters():
        trainer.parameters()["threshold"].mul_(0.5 + torch.rand(F, generator=g))
    if "budget" in trainer.buffers:
        budget_F = torch.rand(F, generator=g, dtype=torch.float64)
        trainer.buffers["budget"].copy_(budget_F / budget_F.sum() * 5)
    return trainer, raw_BD


def expected(reference, trainer: Trainer, raw_BD, **more):
    return reference.step(
        trainer.variant,
        trainer.parameters(),
        trainer.normalised(raw_BD),
        total_variance=trainer.total_variance,
        step=trainer.step_count,
        steps=STEPS,
        micro_batches=trainer.micro_batches,
        buffers=trainer.buffers,
        noise=lambda n: torch.randn(B, n, generator=generator(trainer.seed, f"noise {trainer.step_count}")),
        **more,
    )


def slots_of(trainer: Trainer, raw_BD) -> torch.Tensor | None:
    """Which feature each slot of a sparse step has: the noise of a step belongs to slots."""
    if trainer.variant.name != "variational":
        return None
    x_BD = trainer.normalised(raw_BD)
    return backward.selected(
        trainer, x_BD, trainer.variant.rule(trainer.moment(x_BD, B)), trainer.ranks, csc=False
    ).codes.indices


def silence(reference, trainer: Trainer, raw_BD) -> torch.Tensor:
    """Makes some features weak until they do not fire, though they would on some rows, and calls them dead."""
    weak = torch.tensor([3, 11, 17, 25, 40, 41, 55, 63])
    for name in ("W_enc", "b_enc"):
        trainer.parameters()[name][weak] *= 0.1
    if "budget" in trainer.buffers:
        trainer.buffers["budget"][weak] = -1.0
    fired_F = (expected(reference, trainer, raw_BD).codes_BF != 0).any(0)
    dead = weak[~fired_F[weak]]
    assert len(dead) >= 2
    trainer.idle_F[dead] = 20_000
    return dead


def agree(named, got, ref):
    assert named.keys() == ref.named.keys()
    for name, loss in ref.named.items():
        assert named[name].item() == pytest.approx(loss.item(), rel=2e-5), name
    assert got.keys() == ref.gradients.keys()
    for name, g in ref.gradients.items():
        error = (got[name].double() - g).norm()
        assert error <= 2e-5 * g.norm(), (name, (error / g.norm()).item())


MATRIX = [
    pytest.param(
        *(name, road, with_dead),
        id=f"{name}, {road}, {'some dead' if with_dead else 'all live'}",
    )
    for name, variant in CASES.items()
    for road in ("sparse", "dense")
    if road == "dense" or not variant.dense
    for with_dead in (False, True)
    if not with_dead or isinstance(variant, Revived)
]


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("name", "road", "with_dead"), MATRIX)
def test_gradients_and_losses_equal_dense_autograd(
    name, road, with_dead, micro_batches, reference, captured_step, monkeypatch
):
    trainer, raw_BD = made(CASES[name], micro_batches=micro_batches)
    dead = silence(reference, trainer, raw_BD) if with_dead else None
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: road == "dense")
    ref = expected(reference, trainer, raw_BD, ids=dead, slots=slots_of(trainer, raw_BD) if road == "sparse" else None)
    named, got = captured_step(trainer, raw_BD)
    if dead is not None:
        assert trainer.aux_ids.tolist() == dead.tolist()
        assert named["aux"] > 0
    agree(named, got, ref)
    log = trainer.log()
    assert log["grad_norm"] == pytest.approx(ref.grad_norm, rel=2e-5)
    assert log["l0"] == pytest.approx((ref.codes_BF != 0).sum(1).double().mean().item(), rel=1e-6)
    assert log["fvu"] == pytest.approx(ref.fvu.item(), rel=2e-5)
    assert log["loss"] == pytest.approx(sum(v.item() for v in ref.named.values()), rel=2e-5)


@pytest.mark.parametrize(("name", "road"), [p.values[:2] for p in MATRIX if not p.values[2]])
def test_gradients_where_few_are_positive(name, road, reference, captured_step, monkeypatch):
    """Rows with fewer than k positive pre-activations, some with none: what is missing is no code and has no gradient."""
    trainer, raw_BD = made(CASES[name])
    trainer.b_enc.sub_(2.2 * (trainer.normalised(raw_BD) @ trainer.W_enc.T).std())
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: road == "dense")
    ref = expected(reference, trainer, raw_BD, slots=slots_of(trainer, raw_BD) if road == "sparse" else None)
    l0_B = (ref.codes_BF != 0).sum(1)
    # noise before selection is on features of mean 0 as well
    if trainer.variant.key == "relu" and not name.endswith("before"):
        assert l0_B.min() == 0 and 0 < l0_B.double().mean() < 5
    named, got = captured_step(trainer, raw_BD)
    agree(named, got, ref)
    if isinstance(trainer.variant, TopK | MutualChoice | Matryoshka) or name == "variational relu_mu":
        k_now = reference.k_at(trainer.variant, D, F, STEP / STEPS)
        budget = 4 * k_now if getattr(trainer.variant, "multi_k", 0) else k_now
        assert trainer.log()["budget_unspent"] > 0.3 or budget > F


REVIVED = [name for name, v in CASES.items() if isinstance(v, Revived)]


@pytest.mark.parametrize("name", REVIVED)
def test_auxk_reaches_no_live_feature(name, reference, captured_step):
    """To the bit: what live features get is what they get with aux = 0; b_dec moves, through the dead features' pre."""
    grads = {}
    for aux in (0.0, 1.0):
        variant = dataclasses.replace(CASES[name], aux=aux, clip=None)
        trainer, raw_BD = made(variant)
        dead = silence(reference, trainer, raw_BD)
        grads[aux] = captured_step(trainer, raw_BD)[1]
    live = torch.ones(F, dtype=torch.bool).index_fill(0, dead, False)
    for parameter, g in grads[0.0].items():
        if parameter == "b_dec":
            assert not torch.equal(g, grads[1.0][parameter])
        else:
            assert torch.equal(g[live], grads[1.0][parameter][live]), parameter
    for parameter in ("W_enc", "W_dec", "b_enc"):
        assert (grads[0.0][parameter][dead] == 0).all() or "all" in name or "multi_k" in name, parameter
        assert grads[1.0][parameter][dead].norm() > 0, parameter


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice phase 1", "feature_choice phase 2"])
@pytest.mark.parametrize("road", ["sparse", "dense"])
def test_under_used_features_are_trained_although_they_fire(name, road, reference, captured_step, monkeypatch):
    """Of the list, 5 and 6 are under-used and fire: they stay. 7 was dead when the list was made and fires now: it goes."""
    trainer, raw_BD = made(CASES[name])
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: road == "dense")
    dead = silence(reference, trainer, raw_BD)
    trainer.step_count = STEP + 1
    if "budget" in trainer.buffers:
        trainer.buffers["budget"][[5, 6, 7]] = 0.2
    fired_F = (expected(reference, trainer, raw_BD).codes_BF != 0).any(0)
    assert fired_F[[5, 6, 7]].all()
    trainer.idle_F[7] = 20_000
    trainer.aux_ids = torch.cat([dead, torch.tensor([5, 6, 7])]).sort().values
    trainer.aux_under = torch.isin(trainer.aux_ids, torch.tensor([5, 6]))
    ref = expected(reference, trainer, raw_BD, ids=trainer.aux_ids, under=torch.tensor([5, 6]))
    agree(*captured_step(trainer, raw_BD), ref)


@pytest.mark.parametrize("name", [name for name, v in CASES.items() if isinstance(v, Revived) and v.clip is None])
def test_a_row_that_is_reconstructed_perfectly_gives_no_nan(name, captured_step):
    """Input b_dec alone: e = 0, the denominator of AuxK is 0, norms are 0."""
    trainer, _ = made(CASES[name])
    trainer.b_enc.zero_()
    trainer.idle_F[:3] = 20_000
    raw_BD = (trainer.b_dec / trainer.scale).repeat(B, 1)
    named, got = captured_step(trainer, raw_BD)
    assert all(torch.isfinite(v) for v in named.values()), named
    assert all(g.isfinite().all() for g in got.values())


@pytest.mark.parametrize("road", ["sparse", "dense"])
@pytest.mark.parametrize("l0_loss", ["linear", "target"])
def test_jumprelu_learns_from_both_halves_of_its_window(road, l0_loss, captured_step, monkeypatch):
    """One feature, θ = ½, ε = ¼, so that the window is (⅜, ⅝); x̂ = c, V = 1, λ = 3, l0 = 2, no warm-up left.

    x           ¼      7/16    ½      9/16    ¾       1
    code        0      0       0      9/16    ¾       1
    e           ¼      7/16    ½      0       0       0
    in window   no     yes     yes    yes     no      no

    L_rec: ∂L/∂c = −2e/6, ∂c/∂θ = −(θ/ε) = −2, so Σ = (4/6)·(7/16 + ½) = 5/8; L0 = 3/6, ∂L0/∂θ = −(1/ε)·3/6 = −2.
    linear: 3·(−2)/2 = −3.   target: 3·2·(L0/2 − 1)·(−2)/2 = 9/2.
    """
    variant = JumpReLU(d_sae=1, l0=2.0, l1=3.0, bandwidth=0.25, theta=0.5, l0_loss=l0_loss, b_dec="zero")
    trainer = Trainer(variant, 1, tokens=6 * 100, fit_rows=torch.ones(4, 1))
    trainer.step_count = 50
    trainer.W_enc.fill_(1.0), trainer.W_dec.fill_(1.0)
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: road == "dense")
    named, got = captured_step(trainer, torch.tensor([[1 / 4], [7 / 16], [1 / 2], [9 / 16], [3 / 4], [1.0]]))
    assert named["sparsity"].item() == pytest.approx(3 * 0.5 / 2 if l0_loss == "linear" else 3 * (0.5 / 2 - 1) ** 2)
    assert got["threshold"].item() == pytest.approx(5 / 8 + (-3.0 if l0_loss == "linear" else 4.5))
    # a code is moved by what is kept alone, whose e is 0
    assert got["W_enc"].item() == got["b_enc"].item() == 0.0


def test_jumprelu_keeps_its_thresholds_above_0():
    """θ near 0 and steps of 0.05: errors below θ ask for more codes, and half of the steps would end below 0."""
    variant = JumpReLU(d_sae=F, l0=6.0, l1=0.0, bandwidth=0.3, theta=0.02, lr=0.05)
    g = torch.Generator().manual_seed(1)
    trainer = Trainer(variant, D, tokens=B * 50)
    for _ in range(3):
        trainer.step(torch.randn(B, D, generator=g))
    theta_F = trainer.parameters()["threshold"]
    assert (theta_F >= 0).all() and (theta_F == 0).any() and (theta_F > 0).any()


@pytest.mark.parametrize("road", ["sparse", "dense"])
def test_gated_stops_gradients(road, reference, captured_step, monkeypatch):
    """With λ = 0 what is left is L_rec and the gate's own reconstruction. W_dec, r_mag and b_mag learn from L_rec alone, b_enc
    from the other alone; b_dec is stopped as a bias there, but not inside π."""
    trainer, raw_BD = made(dataclasses.replace(CASES["gated"], l1=0.0))
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: road == "dense")
    rec = expected(reference, trainer, raw_BD, without=("gate",)).gradients
    gate = expected(reference, trainer, raw_BD, without=("rec",)).gradients
    assert rec["b_enc"].abs().max() == 0.0 and gate["W_dec"].abs().max() == 0.0
    _, got = captured_step(trainer, raw_BD)
    for name in ("W_dec", "r_mag", "b_mag"):
        torch.testing.assert_close(got[name].double(), rec[name], rtol=1e-4, atol=2e-5 * rec[name].abs().max().item())
    torch.testing.assert_close(
        got["b_enc"].double(), gate["b_enc"], rtol=1e-4, atol=2e-5 * gate["b_enc"].abs().max().item()
    )
    # through π: −Σ_j (∂L/∂pre_j) W_enc_j, and b_enc's gradient is the part of ∂L_gate/∂pre
    through_pi = -(gate["b_enc"] @ trainer.W_enc.double())
    torch.testing.assert_close(gate["b_dec"], through_pi)


def test_gated_magnitude_below_0_is_no_firing():
    """Gate open, magnitude −1: x = 1, π = 1, exp(0)·1 − 2 < 0."""
    trainer = Trainer(Gated(d_sae=1, b_dec="zero", enc_init="tied", l1=0.0), 1, tokens=400)
    trainer.W_enc.fill_(1.0), trainer.W_dec.fill_(1.0)
    trainer.parameters()["b_mag"].fill_(-2.0)
    codes = trainer.sae().encode(torch.ones(4, 1))
    assert codes.l0().tolist() == [0, 0, 0, 0]
    trainer.step(torch.ones(4, 1))
    assert trainer.log()["l0"] == 0.0 and trainer.idle_F.tolist() == [4]


@pytest.mark.parametrize("road", ["sparse", "dense"])
def test_matryoshka_feature_sums_the_prefixes_that_hold_it(road, reference, captured_step, monkeypatch):
    """∂L/∂d_j = −(2 / (G·B·V)) Σ_b c_bj Σ_{g: n_g > j} e_gb, with e_g = x − b_dec − Σ_{i < n_g} c_i d_i, less its radial part."""
    widths = (7, 30, F)
    trainer, raw_BD = made(CASES["matryoshka 3"])
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: road == "dense")
    c = expected(reference, trainer, raw_BD).codes_BF
    x, W, b = trainer.normalised(raw_BD).double(), trainer.W_dec.double(), trainer.b_dec.double()
    errors = [x - b - c[:, :n] @ W[:n] for n in widths]
    want = torch.stack([c[:, j] @ sum(e for e, n in zip(errors, widths, strict=True) if n > j) for j in range(F)])
    want *= -2 / (3 * B * trainer.total_variance)
    want -= (want * W).sum(1, keepdim=True) * W
    _, got = captured_step(trainer, raw_BD)
    assert (got["W_dec"].double() - want).norm() < 1e-5 * want.norm()
    log = trainer.log()
    for e, key in zip(errors, ("fvu_7", "fvu_30", "fvu"), strict=True):
        assert log[key] == pytest.approx((e.square().sum() / (B * trainer.total_variance)).item(), rel=1e-5)


@pytest.mark.parametrize("kl_on", ["selected", "all"])
@pytest.mark.parametrize("sample", ["after", "before", "none"])
def test_kl_moves_the_means_of_features_that_pay(kl_on, sample):
    """∂KL/∂μ = μ/s² where the feature pays, else 0; with weight β and a mean over tokens."""
    variant = Variational(d_sae=4, k=2, beta=0.5, prior_std=2.0, kl_on=kl_on, sample=sample)
    trainer = Trainer(variant, 3, tokens=None)
    pre_BF = torch.tensor([[3.0, -5, 1, 0.5], [2, 2, -1, 4]], requires_grad=True)
    kept_BF = torch.tensor([[True, True, False, False], [True, False, False, True]])
    at = trainer.moment(torch.zeros(2, 3), 2)._replace(step=99, steps=100)
    out = trainer.out(DenseSlots(pre_BF, kept_BF), at, trainer.parameters())
    out.values = torch.where(kept_BF, pre_BF.detach(), 0)
    (slope,) = torch.autograd.grad(variant.losses(out)["kl"], [pre_BF])
    pays = kept_BF if kl_on == "selected" else torch.ones_like(kept_BF)
    torch.testing.assert_close(slope, torch.where(pays, 0.5 / 2 * pre_BF.detach() / 4, 0))


def test_kl_is_the_divergence_of_noisy_codes_from_the_prior():
    """KL(N(μ, σ²) ‖ N(0, s²)) = E log q(z)/p(z), z = μ + σ ε: the closed form of losses() against 400,000 draws."""
    s, mu, rho = 2.0, torch.tensor([1.5, -3.0, 0.1]), torch.tensor([-6.0, 0.5, -1.0])
    variant = Variational(d_sae=3, k=3, beta=1.0, prior_std=s, kl_on="all")
    trainer = Trainer(variant, 3)
    trainer.parameters()["b_var"].copy_(rho)
    at = trainer.moment(torch.zeros(1, 3), 1)._replace(step=99, steps=100)
    out = trainer.out(DenseSlots(mu[None], torch.ones(1, 3, dtype=torch.bool)), at, trainer.parameters())
    out.values = mu[None]
    got = variant.losses(out)["kl"].item()
    q = torch.distributions.Normal(mu.double(), s * (rho.double() / 2).exp())
    p = torch.distributions.Normal(torch.zeros(3, dtype=torch.float64), s)
    assert got == pytest.approx(torch.distributions.kl_divergence(q, p).sum().item(), rel=1e-6)
    z = q.mean + q.stddev * torch.randn(400_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = (q.log_prob(z) - p.log_prob(z)).sum(1)
    assert got == pytest.approx(draws.mean().item(), abs=4 * draws.std().item() / math.sqrt(len(draws)))


def test_noise_after_selection_changes_no_firing():
    """Two sampled passes of one batch: other codes, the same features, and noise on kept codes alone."""
    trainer, raw_BD = made(CASES["variational after"])
    x_BD = trainer.normalised(raw_BD)
    seen = []
    for step in (64, 65):
        trainer.step_count = step
        trainer._rows = B
        at = trainer.moment(x_BD, B)
        seen.append(backward.sparse(trainer, x_BD, at, trainer._rule(at), 1.0).out)
    one, two = ((out.slots.codes.indices, out.values) for out in seen)
    assert torch.equal(one[0], two[0])
    assert (one[1] != two[1]).all() and (one[1] != 0).all() and (two[1] != 0).all()


@pytest.mark.parametrize("width", [1, D])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_steps_without_a_known_length(name, width):
    """Trainer(tokens=None): every variant takes steps; a width of 1 and a batch of 1 are no special case."""
    variant = VARIANTS[name](**({"k": 1} if "k" in VARIANTS[name].__dataclass_fields__ else {}), d_sae=2 * width)
    trainer = Trainer(variant, width)
    for rows in (1, 1, 1):
        named = trainer.step(torch.ones(rows, width))
    assert all(torch.isfinite(v) for v in named.values())
