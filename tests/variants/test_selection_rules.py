"""Who is kept, worked out by hand, through the variants: in training, at inference, and on both roads of a step.

    pre = [[3, -5,  1, 0.5],
           [2,  2, -1, 4  ]]

The encoder is the identity, so that the input is pre. Rows that stand for themselves:
K = 2 relu: {0: 3, 2: 1}, {3: 4, and one of the two 2s}; abs: {1: -5, 0: 3}, the same.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from saekit_kernels import Codes

import saekit as sk
from saekit import backward
from saekit.errors import SaekitError
from saekit.trainer import Trainer
from saekit.variants import VARIANTS, Revived

PRE = torch.tensor([[3, -5, 1, 0.5], [2, 2, -1, 4]])
ROW_RULES = ("topk", "abs_topk", "variational", "top_afa", "relu", "jumprelu", "gated")


def identity(variant, F: int = 4, **more) -> Trainer:
    """pre = x: W_enc = W_dec = 1, no biases."""
    trainer = Trainer(variant, F, **more)
    trainer.W_enc.copy_(torch.eye(F)), trainer.W_dec.copy_(torch.eye(F))
    trainer.b_enc.zero_(), trainer.b_dec.zero_()
    trainer.fitted = True
    return trainer


def in_training(trainer: Trainer, x_BD: torch.Tensor) -> Codes:
    """The codes of the next step."""
    x_BD = trainer.normalised(x_BD)
    rule = trainer.variant.rule(trainer.moment(x_BD, len(x_BD)))
    return backward.selected(trainer, x_BD, rule, trainer.ranks, csc=False).codes


def on_dense(trainer: Trainer, x_BD: torch.Tensor) -> torch.Tensor:
    """The codes (B, F) of the next step on dense matrices."""
    x_BD = trainer.normalised(x_BD)
    trainer._rows = len(x_BD)
    at = trainer.moment(x_BD, len(x_BD))
    out = backward.dense(trainer, x_BD, at, trainer._rule(at), 1.0).out
    return out.values.detach()


def rows(codes: Codes | torch.Tensor) -> list[dict[int, float]]:
    dense = codes.dense() if isinstance(codes, Codes) else codes
    return [{j: row[j].item() for j in row.nonzero().squeeze(1).tolist()} for row in dense]


def same(got: list[dict[int, float]], want: list[dict[int, float]]):
    """`want` up to which of two equal values of a row was taken."""
    assert [sorted(r.values()) for r in got] == [sorted(r.values()) for r in want]
    for g, w, pre_F in zip(got, want, PRE.tolist()):
        assert all(pre_F[j] == value for j, value in g.items())
        assert {j for j in g if pre_F.count(pre_F[j]) == 1} == {j for j in w if pre_F.count(pre_F[j]) == 1}


RELU_2 = [{0: 3, 2: 1}, {3: 4, 0: 2}]
ABS_2 = [{1: -5, 0: 3}, {3: 4, 0: 2}]
RELU_ALL = [{0: 3, 2: 1, 3: 0.5}, {0: 2, 1: 2, 3: 4}]
ABS_ALL = [{0: 3, 1: -5, 2: 1, 3: 0.5}, {0: 2, 1: 2, 2: -1, 3: 4}]
BY_HAND: dict[str, tuple[Any, list]] = {
    "topk 2": (sk.TopK(k=2, d_sae=4), RELU_2),
    "topk 1": (sk.TopK(k=1, d_sae=4), [{0: 3}, {3: 4}]),
    "topk F": (sk.TopK(k=4, d_sae=4), RELU_ALL),
    "abs_topk 2": (sk.AbsTopK(k=2, d_sae=4), ABS_2),
    "abs_topk 1": (sk.AbsTopK(k=1, d_sae=4), [{1: -5}, {3: 4}]),
    "abs_topk F": (sk.AbsTopK(k=4, d_sae=4), ABS_ALL),
    "variational 2": (sk.Variational(k=2, d_sae=4, sample="none"), ABS_2),
    "variational relu_mu 2": (sk.Variational(k=2, d_sae=4, sample="none", relu_mu=True), RELU_2),
    "variational relu_mu F": (sk.Variational(k=4, d_sae=4, sample="none", relu_mu=True), RELU_ALL),
    # M = k·B = 2, 4, 8
    "mutual_choice 1": (sk.MutualChoice(k=1, d_sae=4), [{0: 3}, {3: 4}]),
    "mutual_choice 2": (sk.MutualChoice(k=2, d_sae=4), [{0: 3}, {3: 4, 0: 2, 1: 2}]),
    "mutual_choice F": (sk.MutualChoice(k=4, d_sae=4), RELU_ALL),
    "matryoshka 1": (sk.Matryoshka(k=1, d_sae=4), [{0: 3}, {3: 4}]),
    "matryoshka 2": (sk.Matryoshka(k=2, d_sae=4), [{0: 3}, {3: 4, 0: 2, 1: 2}]),
    # m_j = B·k/F = 1 each, the rest of the batch's 4 goes with 4 columns
    "feature_choice 2": (sk.FeatureChoice(k=2, d_sae=4, switch=0.0), [{0: 3, 2: 1}, {1: 2, 3: 4}]),
    "relu": (sk.ReLU(d_sae=4), RELU_ALL),
    "gated": (sk.Gated(d_sae=4), RELU_ALL),
    "jumprelu": (sk.JumpReLU(d_sae=4, theta=0.5, bandwidth=0.25), [{0: 3}, {0: 2, 1: 2, 3: 4}]),
}


@pytest.mark.parametrize("road", ["sparse", "dense"])
@pytest.mark.parametrize("name", BY_HAND)
def test_worked_out_by_hand_in_training(name, road):
    variant, want = BY_HAND[name]
    trainer = identity(variant, tokens=200)
    trainer.steps = 100
    if name == "jumprelu":
        # V = D = 4, so θ = ½·√4 = 1 and the margin is ⅛·√4: 1 is in the window, and no code
        kept = in_training(trainer, PRE)
        assert rows(kept) == [{0: 3, 2: 1}, {0: 2, 1: 2, 3: 4}]
        got = rows(on_dense(trainer, PRE))
    else:
        got = rows(in_training(trainer, PRE)) if road == "sparse" else rows(on_dense(trainer, PRE))
    same(got, want)


@pytest.mark.parametrize("name", [n for n in BY_HAND if not n.startswith(("mutual", "matryoshka", "feature"))])
def test_worked_out_by_hand_at_inference(name):
    """Row rules are those of training."""
    variant, want = BY_HAND[name]
    same(rows(identity(variant).sae().encode(PRE)), want)


@pytest.mark.parametrize("name", ["mutual_choice", "matryoshka", "feature_choice", "jumprelu"])
def test_inference_keeps_what_is_above_the_threshold(name):
    """Strictly above θ = 1: the 1 of row 0 is not. Per feature, θ = (3, 2, 0, 0): 3 and one 2 are not."""
    k: dict[str, Any] = {"k": 2} if name != "jumprelu" else {}
    sae = identity(VARIANTS[name](d_sae=4, **k)).sae()
    sae.threshold.fill_(1.0)
    assert rows(sae.encode(PRE)) == [{0: 3}, {0: 2, 1: 2, 3: 4}]
    if sae.threshold.ndim:
        sae.threshold.copy_(torch.tensor([3.0, 2, 0, 0]))
        assert rows(sae.encode(PRE)) == [{2: 1, 3: 0.5}, {3: 4}]
    # θ = 0: every positive one; θ above all: none
    sae.threshold.fill_(0.0)
    assert rows(sae.encode(PRE)) == RELU_ALL
    sae.threshold.fill_(4.0)
    assert rows(sae.encode(PRE)) == [{}, {}]


# x = (3 for row 0, 4.5 for row 1 in norm); pre is PRE: features read coordinates 0 and 1 alone
MASS_X = torch.tensor([[1, 0, 2, 2, 0], [0, 1, 4, 1.5, 1]])


def mass_trainer(**more) -> Trainer:
    trainer = Trainer(sk.TopAFA(d_sae=4, normalise="none", b_dec="zero"), 5, **more)
    trainer.W_enc.zero_()
    trainer.W_enc[:, :2] = PRE.T
    return trainer


@pytest.mark.parametrize("where", ["training", "dense", "inference"])
def test_row_mass_by_hand(where):
    """t = 3, 4.5: norms of row 0 are 3, √10 …; of row 1 4, √20 = 4.47, √24 = 4.90, and 4.47 is nearest."""
    assert MASS_X.norm(dim=1).tolist() == [3.0, 4.5]
    trainer = mass_trainer()
    codes = {
        "training": lambda: in_training(trainer, MASS_X),
        "dense": lambda: on_dense(trainer, MASS_X),
        "inference": lambda: trainer.sae().encode(MASS_X),
    }[where]()
    same(rows(codes), [{0: 3}, {3: 4, 0: 2}])


def test_row_mass_edges():
    """Never reached: every positive one. Halfway between two norms: the fewer. t = 0: still one. No positive: none."""
    trainer = Trainer(sk.TopAFA(d_sae=3, normalise="none", b_dec="zero"), 4)
    trainer.W_enc.zero_()
    trainer.b_enc.copy_(torch.tensor([3.0, 4.0, -1.0]))
    sae = trainer.sae()
    # norms 4 and 5
    t = torch.zeros(5, 4)
    t[:, 0] = torch.tensor([100, 4.5, 0.0, 4.5001, 4.4999])
    assert [sorted(r) for r in rows(sae.encode(t))] == [[0, 1], [1], [1], [0, 1], [1]]
    sae.b_enc.data.copy_(torch.tensor([-3.0, 0.0, -1.0]))
    assert rows(sae.encode(t)) == [{}] * 5
    torch.testing.assert_close(sae(t), torch.zeros(5, 4))


def adversarial() -> torch.Tensor:
    """Rows (B, F) of pre-activations: random, all equal, one huge, tiny, all negative, steps of two."""
    g = torch.Generator().manual_seed(4)
    F = 48
    huge = torch.rand(F, generator=g)
    huge[7] = 1e6
    return torch.cat(
        [
            torch.randn(40, F, generator=g),
            torch.ones(1, F),
            torch.full((1, F), -1.0),
            huge[None],
            1e-12 * torch.rand(1, F, generator=g),
            torch.tensor([1.0, 2.0]).repeat(F // 2)[None],
            torch.zeros(1, F),
        ]
    )


def test_row_mass_equals_a_sort_in_float64(reference):
    pre_BF = adversarial()
    B, F = pre_BF.shape
    g = torch.Generator().manual_seed(5)
    t_B = pre_BF.clamp(min=0).norm(dim=1) * torch.rand(B, generator=g) * 1.2 + 1e-13
    # row b reads coordinate b, which is 1; one more coordinate gives it the norm t, where t is 1 or more
    x = torch.zeros(B, B + 1)
    x[torch.arange(B), torch.arange(B)] = 1.0
    x[:, B] = (t_B.double().square() - 1).clamp(min=0).sqrt().float()
    trainer = Trainer(sk.TopAFA(d_sae=F, normalise="none", b_dec="zero"), B + 1)
    trainer.W_enc.zero_()
    trainer.W_enc[:, :B] = pre_BF.T
    want = reference.row_mass(pre_BF.double().clamp(min=0), x.norm(dim=1))
    got = trainer.sae().encode(x).dense()
    ties = torch.tensor([len(set(row[row > 0].tolist())) < int((row > 0).sum()) for row in pre_BF])
    assert torch.equal((got != 0)[~ties], want[~ties])
    assert torch.equal((got != 0).sum(1), want.sum(1))
    assert torch.equal(got[~ties], torch.where(want, pre_BF, 0)[~ties])


def test_row_mass_does_not_depend_on_the_scale_of_the_input():
    """`normalise: none`, raw and biases times 2²⁰: the same sets."""
    g = torch.Generator().manual_seed(6)
    trainer = Trainer(sk.TopAFA(d_sae=64, normalise="none"), 16)
    trainer.b_enc.copy_(0.3 * torch.randn(64, generator=g)), trainer.b_dec.copy_(torch.randn(16, generator=g))
    x = torch.randn(50, 16, generator=g) + 1
    sae = trainer.sae()
    small = sae.encode(x).dense()
    sae.b_enc.data.mul_(2**20), sae.b_dec.data.mul_(2**20)
    assert torch.equal(sae.encode(x * 2**20).dense(), small * 2**20) and small.count_nonzero() > 0


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_all_negative_rows_have_no_code(name):
    """x̂ is b_dec then; with keys |pre| the codes are there, and negative. Nothing fires, nothing is NaN, a step passes."""
    k: dict[str, Any] = {"k": 2} if "k" in VARIANTS[name].__dataclass_fields__ else {}
    trainer = identity(VARIANTS[name](d_sae=4, **k, lr=1e-3), tokens=200)
    x = -torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])
    sae = trainer.sae()
    codes = sae.encode(x)
    if sae.variant.signed:
        assert rows(codes) == [{2: -3, 3: -4}, {0: -4, 1: -3}]
    else:
        assert codes.l0().tolist() == [0, 0]
        assert torch.equal(sae(x), sae.b_dec.expand(2, 4))
    trainer.step(x)
    log = trainer.log()
    assert log["l0"] == (2 if sae.variant.signed else 0) and math.isfinite(log["loss"])
    assert all(p.isfinite().all() for p in trainer.parameters().values())


def test_a_batch_without_its_budget_keeps_what_there_is():
    """2 rows with 3 positives each, M = 8: 6 kept, a quarter of the budget is not spent."""
    trainer = identity(sk.MutualChoice(k=4, d_sae=4), tokens=200)
    trainer.step(PRE)
    log = trainer.log()
    assert log["l0"] == 3.0 and log["budget_unspent"] == 0.25


@pytest.mark.parametrize("name", ["mutual_choice", "matryoshka", "feature_choice"])
def test_training_l0_is_k_exactly_where_enough_are_positive(name):
    g = torch.Generator().manual_seed(2)
    trainer = Trainer(VARIANTS[name](k=5, d_sae=64), 16, tokens=96 * 100)
    for _ in range(30):
        trainer.step(torch.randn(96, 16, generator=g))
        log = trainer.log()
        assert log["l0"] == 5.0 and log["budget_unspent"] == 0.0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_selection_batch_is_the_micro_batch(micro_batches):
    """Row 0 has the four largest of all; in batches of one row each row has its own two."""
    x = torch.tensor([[9.0, 8, 7, 6], [4, 3, 2, 1]])
    trainer = identity(sk.MutualChoice(k=2, d_sae=4), tokens=200, micro_batches=micro_batches)
    trainer.step(x)
    assert (trainer.idle_F == 0).tolist() == ([True] * 4 if micro_batches == 1 else [True, True, False, False])


@pytest.mark.parametrize("name", ["mutual_choice", "matryoshka", "feature_choice"])
def test_the_running_threshold_averages_the_smallest_kept_value(name):
    """The first value as it is, then 0.99 θ + 0.01 · value; a batch in which nothing is positive is skipped."""
    more: dict[str, Any] = {"switch": 0.0, "k": 2} if name == "feature_choice" else {"k": 1}
    trainer = identity(VARIANTS[name](d_sae=4, lr=1e-9, **more), tokens=800)
    x = torch.tensor([[3.0, 2, 1, 0.5], [0.25, 0.5, 1, 4]])
    seen = []
    for scale in (1.0, 2.0, -1.0):
        trainer.step(scale * x)
        seen.append(trainer.buffers["threshold"].clone())
    # k·B = 2: the smaller of 3 and 4; each column has m_j = 1, its larger one
    first = torch.tensor([3.0, 2, 1, 4]) if name == "feature_choice" else torch.tensor(3.0)
    torch.testing.assert_close(seen[0], first)
    torch.testing.assert_close(seen[1], 0.99 * first + 0.01 * 2 * first)
    assert torch.equal(seen[2], seen[1])


@pytest.mark.parametrize("name", ["mutual_choice", "matryoshka", "feature_choice"])
def test_a_micro_batch_that_keeps_nothing_does_not_lower_the_running_threshold(name):
    more: dict[str, Any] = {"switch": 0.0, "k": 2} if name == "feature_choice" else {"k": 1}
    trainer = identity(VARIANTS[name](d_sae=4, lr=1e-9, **more), tokens=800, micro_batches=2)
    trainer.step(torch.tensor([[3.0, 2, 1, 0.5], [-1, -1, -1, -1]]))
    # one row of each part: M = 1; m_j is 0 or 1, and what a column never kept stays 0
    theta = trainer.buffers["threshold"]
    assert (theta[theta > 0] == torch.tensor([3.0, 2, 1, 0.5])[theta > 0] if theta.ndim else theta == 3.0).all()


def test_feature_choice_without_a_length_stays_in_its_first_phase():
    """60 % of an unknown number of steps never come: the k·B largest of the batch, one threshold for all features."""
    trainer = Trainer(sk.FeatureChoice(k=2, d_sae=64), 16)
    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        trainer.step(torch.randn(64, 16, generator=g))
    assert trainer.log()["l0"] == 2.0
    theta_F = trainer.buffers["threshold"]
    assert theta_F[0] > 0 and (theta_F == theta_F[0]).all()


def test_budgets_of_column_choice_hold_on_average_and_nearly_in_each_step():
    """|Σ_j m_j(t) − k·B| ≤ 3·√F at every step, and the mean over the steps is k·B; m_j(t) is within 1 of m_j."""
    F, B, k = 512, 256, 6
    trainer = Trainer(sk.FeatureChoice(k=k, d_sae=F, switch=0.0), 4, tokens=B * 4000)
    trainer._begin(B)
    g = torch.Generator().manual_seed(0)
    q_F = torch.rand(F, generator=g, dtype=torch.float64).square()
    q_F *= k / q_F.sum()
    trainer.buffers["budget"].copy_(q_F)
    sums, total_F = [], torch.zeros(F)
    for step in range(2000):
        trainer.step_count = step
        m_F = trainer.variant.rule(trainer.moment(torch.zeros(0, 4), B)).m_F
        assert ((m_F - q_F * B).abs() < 1).all()
        sums.append(int(m_F.sum()))
        total_F += m_F
    assert max(abs(s - k * B) for s in sums) <= 3 * math.sqrt(F)
    assert sum(sums) / len(sums) == pytest.approx(k * B, abs=0.5)
    torch.testing.assert_close(total_F.double() / 2000, q_F * B, rtol=0, atol=0.005)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_k_and_f_at_their_bounds(name):
    """k = 1 and k = F train; k above F and below 1 are refused when the variant is made."""
    cls = VARIANTS[name]
    if "k" not in cls.__dataclass_fields__:
        trainer = identity(cls(d_sae=4), tokens=200)
        assert all(v.isfinite() for v in trainer.step(PRE).values())
        return
    highest = 2 if name == "feature_choice" else 4
    for k in (1, highest):
        trainer = identity(cls(k=k, d_sae=4), tokens=200)
        assert all(v.isfinite() for v in trainer.step(PRE).values())
    with pytest.raises(SaekitError, match="k = 5 exceeds"):
        cls(k=5, d_sae=4)
    with pytest.raises(SaekitError, match="k = 0 keeps no feature"):
        cls(k=0, d_sae=4)


@pytest.mark.parametrize("name", [n for n, cls in VARIANTS.items() if "k_anneal" in cls.__dataclass_fields__])
def test_k_anneals_from_the_width_or_from_all_features(name):
    """100 steps, k = 2 from step 40 on: from D = 6 through 4 at step 20, from F = 8 through 5 where D is 8 or 16."""
    for D, first, middle in ((6, 6, 4), (8, 8, 5), (16, 8, 5)):
        g = torch.Generator().manual_seed(0)
        trainer = Trainer(VARIANTS[name](k=2, d_sae=8, k_anneal=0.4), D, tokens=800)
        trainer._begin(8)
        x_BD = torch.randn(8, D, generator=g)
        for step, k in ((0, first), (20, middle), (40, 2), (99, 2)):
            trainer.step_count = step
            if name == "feature_choice" and step == 99:
                continue
            at = trainer.moment(x_BD, 8)
            assert trainer.variant.k_now(at) == k
            codes = in_training(trainer, x_BD)
            assert codes.values.numel() <= k * 8


@pytest.mark.parametrize("sample", ["after", "before"])
def test_noise_makes_no_code_of_the_wrong_sign_before_selection(sample):
    """relu_mu: a code of `before` is one of the k largest relu(z). `after` adds noise to what was kept, whatever its sign."""
    g = torch.Generator().manual_seed(1)
    trainer = identity(
        sk.Variational(k=32, d_sae=32, relu_mu=True, sample=sample, variance="fixed", log_var_init=2.0), 32, tokens=6400
    )
    codes = on_dense(trainer, torch.randn(64, 32, generator=g))
    assert bool((codes < 0).any()) == (sample == "after")


def after_steps(variant, steps: int = 70, micro_batches: int = 1, D: int = 16, log: bool = True):
    """State of a trainer after some steps, features dying on the way: 64 steps are one list of them."""
    g = torch.Generator().manual_seed(9)
    trainer = Trainer(variant, D, tokens=64 * steps, seed=3, micro_batches=micro_batches)
    truth = torch.randn(20, D, generator=g)
    for _ in range(steps):
        on = (torch.rand(64, 20, generator=g) < 0.1).float()
        trainer.step(on @ truth + 0.05 * torch.randn(64, D, generator=g))
    return trainer


def same_to_the_bit(one: Trainer, two: Trainer):
    for name, p in one.parameters().items():
        assert torch.equal(p, two.parameters()[name]), name
    assert torch.equal(one.idle_F, two.idle_F) and torch.equal(one.aux_ids, two.aux_ids)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("relu_mu", [False, True])
def test_variational_without_noise_and_kl_is_abs_topk_or_topk(relu_mu, micro_batches):
    common: dict[str, Any] = {"k": 4, "d_sae": 64, "dead_after": 500}
    plain = after_steps((sk.TopK if relu_mu else sk.AbsTopK)(**common), micro_batches=micro_batches)
    for variance in ("fixed", "feature", "input"):
        v = sk.Variational(**common, sample="none", beta=0.0, relu_mu=relu_mu, variance=variance)
        same_to_the_bit(plain, after_steps(v, micro_batches=micro_batches))
    assert len(plain.aux_ids) > 0


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_matryoshka_with_one_width_is_mutual_choice_on_the_dead(micro_batches):
    common: dict[str, Any] = {"k": 4, "d_sae": 64, "dead_after": 500}
    one = after_steps(sk.Matryoshka(**common, widths=(64,)), micro_batches=micro_batches)
    two = after_steps(sk.MutualChoice(**common, aux_on="dead"), micro_batches=micro_batches)
    same_to_the_bit(one, two)
    assert torch.equal(one.buffers["threshold"], two.buffers["threshold"]) and len(one.aux_ids) > 0


def test_feature_choice_is_mutual_choice_until_its_switch():
    common: dict[str, Any] = {"k": 4, "d_sae": 64, "dead_after": 500, "lr": 1e-3}
    one, two = (after_steps(v(**common), steps=66) for v in (sk.FeatureChoice, sk.MutualChoice))
    assert not torch.equal(one.W_dec, two.W_dec)
    one, two = (after_steps(v, steps=66) for v in (sk.FeatureChoice(**common, switch=0.99), sk.MutualChoice(**common)))
    same_to_the_bit(one, two)


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if "aux" in c.__dataclass_fields__])
def test_with_no_dead_feature_aux_changes_nothing_to_the_bit(name):
    k: dict[str, Any] = {"k": 4} if name != "top_afa" else {}
    one, two = (after_steps(VARIANTS[name](d_sae=64, aux=aux, dead_after=10**6, **k)) for aux in (1 / 32, 0.0))
    same_to_the_bit(one, two)
    assert len(one.aux_ids) == 0


@pytest.mark.parametrize("dense", [False, True])
def test_top_afa_without_weight_has_no_norm_term(dense, monkeypatch):
    class NoTerm(sk.TopAFA):
        own_losses = False

        def losses(self, out):
            raise AssertionError("asked for its losses")

    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: dense)
    one, two = (after_steps(v(d_sae=64, norm=0.0, dead_after=500)) for v in (sk.TopAFA, NoTerm))
    same_to_the_bit(one, two)
    assert "norm" not in one.log()


@dataclass(frozen=True, kw_only=True)
class Chosen(Revived):
    """A selection that is none of the rules: ReLU, by `select`."""

    name: ClassVar[str] = "chosen"
    lr_share: ClassVar[float] = sk.ReLU.lr_share

    def select(self, pre_BF):
        return pre_BF.relu()

    def inference_options(self) -> dict:
        return {}


@pytest.mark.parametrize("enc_init", ["fit", "tied"])
def test_a_selection_that_is_no_rule_trains_on_dense_matrices(enc_init, monkeypatch):
    """To the bit what relu does there without a penalty; AuxK and the SAE know it too."""
    monkeypatch.setattr(Trainer, "_is_dense", lambda self, at: True)
    one, two = (
        after_steps(v) for v in (Chosen(d_sae=64, enc_init=enc_init), sk.ReLU(d_sae=64, enc_init=enc_init, l1=0.0))
    )
    for name, p in one.parameters().items():
        assert torch.equal(p, two.parameters()[name]), name
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.sae().encode(x).dense(), two.sae().encode(x).dense())
    assert torch.equal(one.sae().encode(x[:1]).dense()[0] != 0, one.sae().encode(x).dense()[0] != 0)
    trainer = Trainer(Chosen(d_sae=64, enc_init=enc_init, dead_after=10), 16, tokens=6400)
    trainer.b_enc[:2] = -100.0
    trainer.step(x)
    assert trainer.aux_ids.tolist() == [0, 1]


@pytest.mark.parametrize("cls", [sk.TopK, sk.MutualChoice, sk.Matryoshka])
def test_keeping_all_is_relu(cls):
    """k = F: codes equal to the bit in training (small integers, so that every product is exact), and at inference for topk."""
    g = torch.Generator().manual_seed(8)
    x = torch.randint(-4, 5, (32, 8), generator=g).float()
    W = torch.randint(-3, 4, (24, 8), generator=g).float()
    found = []
    for variant in (sk.ReLU(d_sae=24), cls(k=24, d_sae=24)):
        trainer = Trainer(variant, 8, tokens=3200)
        trainer.W_enc.copy_(W)
        found.append(in_training(trainer, x).dense())
        if cls is sk.TopK:
            found.append(trainer.sae().encode(x).dense())
    assert found[0].count_nonzero() > 200
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_the_encoder_starts_at_the_scale_of_the_codes_of_training():
    """`fit` looks at the codes that the first step will have: where all features pay for KL, or noise comes before selection,
    these are the k largest all the same."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(256, 16, generator=g)
    plain = Trainer(sk.Variational(k=4, d_sae=64), 16, fit_rows=x)
    centred, codes = x - plain.b_dec, plain.sae().encode(x)
    y = codes.times(plain.W_dec)
    assert ((centred * y).sum() / y.square().sum()).item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("variant", "like"),
    [
        (sk.Variational(k=4, d_sae=64, kl_on="all"), sk.Variational(k=4, d_sae=64)),
        (sk.Variational(k=4, d_sae=64, sample="before"), sk.Variational(k=4, d_sae=64)),
        (sk.TopK(k=4, d_sae=64, multi_k=1 / 8), sk.TopK(k=4, d_sae=64)),
    ],
    ids=["kl_on all", "sample before", "multi_k"],
)
def test_options_of_a_loss_do_not_move_the_start(variant, like):
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    one, two = (Trainer(v, 16, fit_rows=x) for v in (variant, like))
    torch.testing.assert_close(one.W_enc, two.W_enc)


def test_golden_selection_is_what_the_reference_says(reference):
    """The tests' own sorting, on the same example."""
    relu, both = PRE.clamp(min=0), PRE.abs()
    assert rows(PRE * reference.row_count(relu, 2)) == RELU_2
    assert rows(PRE * reference.row_count(both, 2)) == ABS_2
    assert rows(PRE * reference.batch_count(relu, 2)) == [{0: 3}, {3: 4}]
    assert rows(PRE * reference.batch_count(relu, 4)) == [{0: 3}, {3: 4, 0: 2, 1: 2}]
    assert rows(PRE * reference.column_count(relu, torch.ones(4))) == [{0: 3, 2: 1}, {1: 2, 3: 4}]
    assert rows(PRE * reference.row_mass(relu, torch.tensor([3, 4.5]))) == [{0: 3}, {3: 4, 0: 2}]
