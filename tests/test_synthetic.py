"""Synthetic truths: what is drawn, rows as a source of training, and the measuring stick of recovery."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from saekit_kernels import Codes

import saekit as sk
from saekit.errors import SaekitError
from saekit.evaluation.recovery import Scores, recovery
from saekit.synthetic import CHUNK, SITE, WINDOW_ROWS, Synthetic, frequencies, preset
from saekit.trainer import InputStatistics, Trainer
from saekit.variants import AbsTopK, TopK

# a number of everything: families, excluded siblings, signs
FULL = Synthetic(
    features=48,
    width=24,
    l0=4.0,
    parents=4,
    children=3,
    exclusive=True,
    bidirectional=0.5,
    spread=5,
    seed=3,
    rows=50_000,
)
HALVES = dataclasses.replace(FULL, bidirectional=1.0, noise=0.0)


@pytest.fixture(scope="module")
def tiny():
    return preset("tiny", rows=60_000).draw()


def firings(truth, rows=20_000):
    """(rows, G) strengths."""
    return truth.sample(0, rows).h.dense()


# What is drawn


def test_any_range_of_rows_is_produced_again_to_the_bit():
    whole, again = FULL.draw().sample(0, 4000), FULL.draw()
    pieces = [again.sample(lo, n) for lo, n in ((2100, 1900), (700, 1400), (0, 700))][::-1]
    assert torch.equal(whole.x_BD, torch.cat([piece.x_BD for piece in pieces]))
    h = Codes.concatenate([piece.h for piece in pieces])
    assert torch.equal(whole.h.indices, h.indices) and torch.equal(whole.h.values, h.values)
    assert whole.h.row_ptr is not None and torch.equal(whole.h.row_ptr, h.row_ptr)
    other = dataclasses.replace(FULL, seed=4).draw()
    assert not torch.equal(whole.x_BD, other.sample(0, 4000).x_BD) and not torch.equal(again.g_GD, other.g_GD)
    assert len(whole.x_BD.unique(dim=0)) == 4000


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    truth, found = preset("small").draw(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(truth.sample(0, 2 * CHUNK).x_BD)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_rows_are_sums_of_directions_bias_and_noise():
    truth = dataclasses.replace(FULL, noise=0.0).draw()
    x_BD, h = truth.sample(0, 3000)
    made = h.dense().double() @ truth.g_GD.double() + truth.bias_D
    torch.testing.assert_close(x_BD.double(), made, atol=1e-5, rtol=0)
    torch.testing.assert_close(truth.bias_D.norm(), torch.tensor(1.0))
    # the noise comes last: the same strengths, and what remains has its standard deviation, ± 1 % on 72,000 values
    noisy = FULL.draw().sample(0, 3000)
    assert torch.equal(noisy.h.dense(), h.dense())
    assert (noisy.x_BD - x_BD).std().item() == pytest.approx(FULL.noise, rel=0.02)


def test_frequencies_by_hand():
    # 1/i sums to 11/6, so c = 0.3
    assert frequencies(3, 0.55, 0.4) == pytest.approx([0.3, 0.15, 0.1])
    # the first is held at 0.5, 0.4 is left for the second: (2 + β) / (1 + β) = 5/4, β = 3
    assert frequencies(2, 0.9, 0.5) == pytest.approx([0.5, 0.4])
    assert frequencies(4, 2.0, 0.5) == pytest.approx([0.5] * 4, rel=1e-6)


def test_features_fire_as_often_as_asked_whatever_the_correlation(tiny):
    asked = frequencies(64, 4.0, 0.4)
    for rho in (0.0, 0.5):
        truth = preset("tiny", rho=rho, parents=0).draw()
        assert sorted(truth.asked_q_G) == pytest.approx(sorted(asked))
        error = np.abs(truth.q_G - truth.asked_q_G) / np.sqrt(asked.min() / 65536)
        assert (np.abs(truth.q_G - truth.asked_q_G) < 5 * np.sqrt(truth.asked_q_G / 65536)).all(), error.max()
    # the order is not that of the features
    assert (np.diff(truth.asked_q_G) > 0).any() and (np.diff(truth.asked_q_G) < 0).any()
    assert tiny.drawn.l0 == pytest.approx(4.0, rel=0.05) and tiny.drawn.q_max == pytest.approx(0.4, rel=0.02)


def test_common_causes_let_features_fire_together():
    # two features at q = 1/2 whose u have correlation ±1/2: both fire on 1/4 ± asin(1/2) / 2π = 1/4 ± 1/12 of the rows
    truth = Synthetic(features=2, width=4, l0=1.0, q_max=0.5, rho=0.5, rank=1).draw()
    together = (firings(truth, 65_536) != 0).all(1).double().mean().item()
    assert abs(together - 0.25) == pytest.approx(1 / 12, abs=0.01)
    independent = dataclasses.replace(truth.options, rho=0.0).draw()
    assert (firings(independent, 65_536) != 0).all(1).double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_a_child_fires_only_with_its_parent_and_as_often_as_asked():
    truth = Synthetic(features=64, width=32, l0=6.0, parents=8, rho=0.0).draw()
    children = np.flatnonzero(truth.parent_G >= 0)
    parents = truth.parent_G[children]
    assert len(children) == 24 and (np.bincount(parents)[np.unique(parents)] == 3).all()
    assert not set(children) & set(parents)
    fires = firings(truth, 65_536) != 0
    assert not (fires[:, children] & ~fires[:, parents]).any()
    own = np.minimum(0.9, truth.asked_q_G[children] / truth.asked_q_G[parents])
    expected = own * truth.asked_q_G[parents]
    assert (np.abs(truth.q_G[children] - expected) < 5 * np.sqrt(expected / 65_536)).all()
    together = torch.stack([fires[:, children[parents == p]].sum(1) for p in np.unique(parents)])
    assert together.max() >= 2

    exclusive = dataclasses.replace(truth.options, exclusive=True).draw()
    alone = firings(exclusive, 65_536) != 0
    together_alone = torch.stack([alone[:, children[parents == p]].sum(1) for p in np.unique(parents)])
    # someone stays, one at most, and nobody else is touched
    assert torch.equal(together_alone, together.clamp_max(1))
    assert not (alone & ~fires).any()
    others = np.setdiff1d(np.arange(64), children)
    assert torch.equal(alone[:, others], fires[:, others])


def test_strengths_and_signs():
    truth = FULL.draw()
    h = firings(truth, 40_000)
    one_sided = h[:, ~truth.bidirectional_G]
    assert truth.bidirectional_G.sum() == 24 and (one_sided >= 0).all()
    assert h[h != 0].abs().min() >= 0.05
    both = h[:, truth.bidirectional_G]
    assert ((both > 0).sum() / (both != 0).sum()).item() == pytest.approx(0.5, abs=0.01)
    # mean m_i, standard deviation m_i / 4; the floor of 0.05 moves neither by a thousandth
    often = int(truth.q_G.argmax())
    values = h[:, often][h[:, often] != 0].abs()
    assert values.mean() / truth.magnitude_G[often] == pytest.approx(1.0, abs=0.02)
    assert values.std() / truth.magnitude_G[often] == pytest.approx(0.25, abs=0.02)


def test_spreading_moves_directions_apart(tiny):
    apart = preset("tiny").draw()
    near = preset("tiny", spread=0).draw()
    for truth in (apart, near):
        cos = (truth.g_GD.double() @ truth.g_GD.double().T).abs().fill_diagonal_(0)
        assert truth.drawn.max_cos == pytest.approx(cos.max().item(), abs=1e-6)
        torch.testing.assert_close(truth.g_GD.norm(dim=1), torch.ones(64))
    assert apart.drawn.max_cos < 0.6 * near.drawn.max_cos
    assert f"largest |cos| {tiny.drawn.max_cos:.2f}" in str(tiny.drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows = 0; it must be at least 1"),
        ({"q_max": 1.0}, "q_max = 1.0 is no frequency"),
        ({"l0": 300.0}, "l0 = 300.0 cannot be reached by 512 features that fire on at most 0.4"),
        ({"rho": 1.0}, "rho = 1.0 is no correlation"),
        ({"bidirectional": 1.5}, "bidirectional = 1.5 is no share"),
        ({"parents": 100}, "parents = 100 with children = 3 each do not fit"),
        ({"noise": -1.0}, "noise = -1.0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(SaekitError, match=message):
        Synthetic(**options)
    with pytest.raises(SaekitError, match="no preset 'huge'; choose tiny, small, large"):
        preset("huge")


# As a source of rows


def test_every_training_row_comes_once_per_epoch_and_is_what_sample_gives(tiny):
    # 59 chunks of 1,024, of which the last twentieth, 2, are held out; windows of 32,768 rows, batches run across their borders
    valid = tiny.valid_rows(SITE)
    heldout = tiny.valid_rows(SITE, split="heldout")
    assert np.array_equal(np.concatenate([valid, heldout]), np.arange(60_000)) and len(heldout) == 60_000 - 57 * 1024
    x_BD = tiny.sample(0, 60_000).x_BD
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = tiny.batches([SITE], batch=1000, epochs=2, seed=1)
    assert batches.order.n_windows == 2 and WINDOW_ROWS < len(valid) < 2 * WINDOW_ROWS
    rows = []
    for batch in batches:
        assert torch.equal(batch[SITE], x_BD[torch.from_numpy(batch.rows)])
        rows.append(batch.rows)
    seen = np.concatenate(rows)
    assert np.array_equal(np.sort(seen[: len(valid)]), valid)
    assert not np.array_equal(seen[:10_000], seen[len(valid) :][:10_000])
    assert not np.array_equal(seen[:1000], next(iter(tiny.batches([SITE], batch=1000, seed=2))).rows)


def test_batches_continue_where_they_stood_and_ranks_share_them(tiny):
    options = {"batch": 1000, "epochs": 1, "seed": 1}
    whole = [batch[SITE] for batch in tiny.batches([SITE], **options)]
    batches = tiny.batches([SITE], **options)
    reading = iter(batches)
    for _ in range(31):
        next(reading)
    state = batches.state()
    reading.close()
    rest = [batch[SITE] for batch in preset("tiny", rows=60_000).draw().batches([SITE], state=state, **options)]
    assert len(rest) == len(whole) - 31 and all(torch.equal(a, b) for a, b in zip(rest, whole[31:], strict=True))
    parts = [next(iter(tiny.batches([SITE], rank=r, ranks=2, **options)))[SITE] for r in (0, 1)]
    assert torch.equal(parts[0], whole[0][::2]) and torch.equal(parts[1], whole[0][1::2])
    with pytest.raises(SaekitError, match="checkpoint reads store"):
        preset("tiny", rows=60_000, seed=1).draw().batches([SITE], state=state, **options)


def test_statistics_and_table(tiny):
    x_BD = tiny.sample(0, 20_000).x_BD.double().numpy()
    found = tiny.statistics(SITE, 20_000)
    assert found.mean_D == pytest.approx(x_BD.mean(0), abs=1e-9)
    assert found.total_variance == pytest.approx(x_BD.var(0).sum(), rel=1e-9)
    # of all rows: E x = bias + Σ q_i m_i g_i
    expected = tiny.bias_D + (torch.from_numpy(tiny.q_G).float() * tiny.magnitude_G) @ tiny.g_GD
    assert tiny.statistics(SITE).mean_D == pytest.approx(expected.numpy(), abs=0.02)
    assert tiny.d(SITE) == 32 and tiny.table.n_sequences == 59
    assert np.array_equal(tiny.tokens(1023, 1026).documents, [0, 1, 1])
    with pytest.raises(SaekitError, match=r"64 features in 32 dimensions, seed 0.* holds synthetic, not blocks.0"):
        tiny.statistics("blocks.0")


def test_fingerprint_is_that_of_the_options():
    assert FULL.draw().fingerprint == FULL.draw().fingerprint
    assert FULL.draw().fingerprint != HALVES.draw().fingerprint


# The measuring stick


def oracle(truth, directions_FD=None, *, variant=TopK):
    """An SAE with these decoder rows, the truth's if none are given; it needs codes from elsewhere."""
    W_FD = (truth.g_GD if directions_FD is None else directions_FD).clone()
    return sk.SAE(variant(k=1, d_sae=len(W_FD)), W_FD.clone(), W_FD, torch.zeros(len(W_FD)), truth.bias_D.clone())


def dense_codes(of_h):
    """An `encode` from a function of the dense strengths (B, G)."""
    return lambda x_BD, h: Codes.of_dense(of_h(h.dense()))


def perfect(scores: Scores, *, signed=False):
    for key, value in dataclasses.asdict(scores).items():
        if key == "coverage_by_decile":
            assert value == (1.0,) * 10
        else:
            expected = 0.0 if key in ("spurious", "absorbed") else 1.0 if key != "sign_agree" or signed else None
            assert value == (None if expected is None else pytest.approx(expected, abs=1e-5)), key


ROWS = 30_000


@pytest.mark.parametrize("kind", ["plain", "permuted", "signed", "flipped"])
def test_an_oracle_scores_one_everywhere(kind):
    signed = kind in ("signed", "flipped")
    truth = dataclasses.replace(FULL, bidirectional=0.5 if signed else 0.0).draw()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)) if kind == "permuted" else torch.arange(48)
    flip_F = torch.ones(48)
    if kind == "flipped":
        flip_F[::3] = -1
    sae = oracle(truth, truth.g_GD[order] * flip_F[:, None], variant=AbsTopK if signed else TopK)
    found = recovery(sae, truth, rows=ROWS, encode=dense_codes(lambda h: h[:, order] * flip_F))
    perfect(found.scores, signed=signed)
    assert found.l0 == found.true_l0 and found.alive == found.truths == 48 and found.silent_truths == 0
    # only the noise is left
    assert found.fvu == pytest.approx(found.noise_fvu, rel=1e-4)
    assert found.noise_fvu == pytest.approx(truth.drawn.noise_fvu, rel=0.05)
    text = str(found)
    assert text.startswith("48 features against 48 truths on 30,000 new rows") and "random" in text
    assert max(map(len, text.splitlines())) <= 100


def test_copies_of_one_truth_cover_one(tiny):
    sae = oracle(tiny, tiny.g_GD[:1].repeat(64, 1))
    found = recovery(sae, tiny, rows=ROWS, encode=dense_codes(lambda h: h[:, :1].repeat(1, 64))).scores
    assert found.coverage == 1 / 64 and found.unique == 1 / 64
    assert found.sae_to_gt == pytest.approx(1.0) and found.spurious == 0
    # one feature is matched to the truth, the others to what the truth resembles
    cos = (tiny.g_GD[0] @ tiny.g_GD.T).clamp_min(0)
    assert found.mcc == pytest.approx(cos.mean().item(), abs=1e-5)
    assert found.gt_to_sae == pytest.approx((tiny.g_GD[0] @ tiny.g_GD.T).mean().item(), abs=1e-5)


def test_a_flipped_oracle_of_non_negative_codes_finds_nothing(tiny):
    found = recovery(oracle(tiny, -tiny.g_GD), tiny, rows=ROWS, encode=lambda x_BD, h: h).scores
    assert found.coverage == 0 and found.f1_matched < 0.3 and found.mcc < 0.3


def test_halves_of_a_bidirectional_truth_are_truths_for_non_negative_codes():
    truth = HALVES.draw()
    both = recovery(
        oracle(truth, torch.cat([truth.g_GD, -truth.g_GD])),
        truth,
        rows=ROWS,
        encode=dense_codes(lambda h: torch.cat([h.clamp_min(0), (-h).clamp_min(0)], 1)),
    )
    perfect(both.scores)
    assert both.truths == 96 and both.fvu < 1e-9
    half = recovery(oracle(truth), truth, rows=ROWS, encode=dense_codes(lambda h: h.clamp_min(0))).scores
    assert half.coverage == 0.5 and half.f1_matched == 0.5 and half.sae_to_gt == pytest.approx(1.0)


def test_f1_by_hand(tiny):
    # every other row is missed: precision 1, recall n_even / n
    def encode(x_BD, h):
        kept = h.dense()
        kept[1::2] = 0
        return Codes.of_dense(kept)

    h = tiny.sample(tiny.n_sequences * CHUNK, ROWS).h.dense() != 0
    even, n = h[::2].sum(0).double(), h.sum(0).double()
    found = recovery(oracle(tiny), tiny, rows=ROWS, encode=encode).scores
    assert found.f1_matched == pytest.approx((2 * even / (even + n)).mean().item(), rel=1e-9)
    assert found.coverage == 0 and found.mcc == pytest.approx(1.0)


def test_signs_must_agree_for_signed_codes():
    truth = HALVES.draw()
    found = recovery(oracle(truth, variant=AbsTopK), truth, rows=ROWS, encode=dense_codes(torch.abs)).scores
    h = truth.sample(truth.n_sequences * CHUNK, ROWS).h.dense()
    right = (h > 0).sum(0).double() / (h != 0).sum(0)
    assert found.f1_matched == pytest.approx(right.mean().item(), rel=1e-9)
    assert found.sign_agree == pytest.approx(((h > 0).sum() / (h != 0).sum()).item(), rel=1e-6)
    assert found.coverage == 0 and found.mcc == pytest.approx(1.0)


def test_absorption_is_counted_where_parent_and_child_are_on(tiny):
    children = np.flatnonzero(tiny.parent_G >= 0)
    parents = tiny.parent_G[children]

    def absorbing(h):
        kept = h.clone()
        kept[:, parents[0]] *= h[:, children[0]] == 0
        return kept

    h = tiny.sample(tiny.n_sequences * CHUNK, ROWS).h.dense() != 0
    siblings = children[parents == parents[0]]
    gone = (h[:, siblings] & h[:, children[:1]]).sum().item()
    found = recovery(oracle(tiny), tiny, rows=ROWS, encode=dense_codes(absorbing)).scores
    assert found.absorbed == pytest.approx(gone / h[:, children].sum().item(), rel=1e-9)
    assert found.coverage >= 63 / 64


def test_an_untrained_sae_scores_at_the_floor():
    # truth and initialisation have one seed, and a generator each
    truth = Synthetic(features=128, width=40, l0=6.0, rows=50_000, seed=0).draw()
    statistics = truth.statistics(SITE)
    mean_D = torch.from_numpy(statistics.mean_D)
    for variant, floors in ((TopK, (0.40, 0.39)), (AbsTopK, (0.44, 0.43))):
        trainer = Trainer(
            variant(k=6, d_sae=160),
            d_model=40,
            statistics=InputStatistics(mean_D, statistics.total_variance),
            fit_rows=truth.sample(0, 4096).x_BD,
            seed=0,
        )
        found = recovery(trainer.sae(), truth, rows=ROWS)
        # means over 40 matrices drawn elsewhere
        assert (found.floor.gt_to_sae, found.floor.mcc) == pytest.approx(floors, abs=0.02)
        for key in ("mcc", "gt_to_sae", "sae_to_gt", "f1_matched"):
            assert getattr(found.scores, key) == pytest.approx(getattr(found.floor, key), abs=0.03), key
        assert found.scores.coverage == found.floor.coverage == 0


@pytest.mark.parametrize("variant", [TopK, AbsTopK])
def test_scores_against_a_dense_reference(variant):
    truth = dataclasses.replace(FULL, rows=CHUNK).draw()
    rng = torch.Generator().manual_seed(5)
    near_GD = truth.g_GD + 0.06 * torch.randn(48, 24, generator=rng)
    W_FD = torch.cat([near_GD, -near_GD[:10], torch.randn(12, 24, generator=rng)])
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    sae = sk.SAE(variant(k=4, d_sae=70), 0.9 * W_FD, W_FD, torch.zeros(70), truth.bias_D.clone())
    found = recovery(sae, truth, rows=3000)
    x_BD, h = truth.sample(CHUNK, 3000)
    expected = reference(sae, truth, x_BD.double(), h.dense().double(), variant is AbsTopK)
    got = {key: getattr(found.scores, key) for key in expected}
    assert got == pytest.approx(expected, rel=1e-5)
    assert 0 < got["coverage"] < 1 and 0 < got["absorbed"] < 1 and 0 < got["spurious"] < 1
    codes = sae.encode(x_BD.float())
    error = (x_BD - sae.decode(codes)).square().sum() / (x_BD - x_BD.mean(0)).square().sum()
    assert found.fvu == pytest.approx(error.item(), rel=1e-5)


def reference(sae, truth, x_BD, h_BG, signed) -> dict:
    """The definitions, one pair at a time."""
    from scipy.optimize import linear_sum_assignment

    codes = sae.encode(x_BD.float()).dense().double().numpy()
    W, g, h = sae.W_dec.double().numpy(), truth.g_GD.double().numpy(), h_BG.numpy()
    sides = [(i, 1.0) for i in range(len(g))]
    if not signed:
        sides += [(i, -1.0) for i in range(len(g)) if truth.bidirectional_G[i]]
    strength = [h[:, i] * s if signed else np.maximum(h[:, i] * s, 0) for i, s in sides]
    kept = [n for n, v in enumerate(strength) if v.any()]
    sides, strength = [sides[n] for n in kept], [strength[n] for n in kept]
    alive = [j for j in range(len(W)) if codes[:, j].any()]
    cos = np.array([[W[j] @ (s * g[i]) for i, s in sides] for j in alive])
    S = np.abs(cos) if signed else cos

    def f1(a, t):
        hit = np.sign(codes[:, alive[a]]) * np.sign(strength[t]) * np.sign(cos[a, t]) > 0
        return 2 * hit.sum() / ((codes[:, alive[a]] != 0).sum() + (strength[t] != 0).sum())

    matched = {t: a for a, t in zip(*linear_sum_assignment(-np.maximum(S, 0)), strict=True) if S[a, t] > 0}
    T, A = len(sides), len(alive)
    covered = [any(S[a, t] >= 0.9 and f1(a, t) >= 0.8 for a in range(A)) for t in range(T)]
    q = np.array([(v != 0).sum() for v in strength])
    on = absorbed = joint = agree = 0
    for t, a in matched.items():
        product = np.sign(codes[:, alive[a]]) * np.sign(strength[t]) * np.sign(cos[a, t])
        joint, agree = joint + (product != 0).sum(), agree + (product > 0).sum()
        for p, b in matched.items():
            if truth.parent_G[sides[t][0]] == sides[p][0]:
                both = (strength[t] != 0) & (strength[p] != 0)
                on += both.sum()
                absorbed += (both & (codes[:, alive[a]] != 0) & (codes[:, alive[b]] == 0)).sum()
    values = {
        "coverage": np.mean(covered),
        "coverage_q": (covered * q).sum() / q.sum(),
        "mcc": sum(S[a, t] for t, a in matched.items()) / T,
        "gt_to_sae": S.max(0).mean(),
        "sae_to_gt": S.max(1).mean(),
        "unique": len(set(S.argmax(1))) / A,
        "f1_matched": sum(f1(a, t) for t, a in matched.items()) / T,
        "spurious": (S.max(1) < 0.5).mean(),
        "absorbed": absorbed / on,
    }
    return {**values, "sign_agree": agree / joint} if signed else values


def test_signed_scores_do_not_change_when_features_are_flipped():
    truth = FULL.draw()
    W_FD = torch.cat([truth.g_GD, torch.randn(16, 24, generator=torch.Generator().manual_seed(1))])
    W_FD /= W_FD.norm(dim=1, keepdim=True)
    sae = sk.SAE(AbsTopK(k=4, d_sae=64), W_FD, W_FD.clone(), torch.zeros(64), truth.bias_D.clone())
    flip_F = 1 - 2 * (torch.arange(64) % 2).float()
    other = sk.SAE(sae.variant, W_FD * flip_F[:, None], W_FD * flip_F[:, None], torch.zeros(64), truth.bias_D.clone())
    assert recovery(sae, truth, rows=5000).scores == recovery(other, truth, rows=5000).scores


def test_nothing_fires_and_other_widths(tiny):
    silent = recovery(oracle(tiny), tiny, rows=2000, encode=dense_codes(torch.zeros_like))
    assert (silent.scores.mcc, silent.scores.gt_to_sae, silent.scores.coverage, silent.l0) == (0, 0, 0, 0)
    assert silent.scores.sae_to_gt is None and silent.scores.unique is None and silent.gamma is not None
    values = [m.to_dict()["value"] for m in silent.metrics().values()]
    assert all(v is None or math.isfinite(v) for v in values) and "–" in str(silent)
    with pytest.raises(SaekitError, match="SAE expects D = 24, the truth has 32 dimensions"):
        recovery(oracle(FULL.draw()), tiny)
    with pytest.raises(SaekitError, match="rows = 1 have no variance"):
        recovery(oracle(tiny), tiny, rows=1)


# Training on it


def test_training_finds_the_truth(tmp_path):
    truth = preset("tiny", rows=300_000).draw()
    sae = sk.train(TopK(k=4, d_sae=96), truth, out=tmp_path / "sae", batch=512, tokens=512 * 500)
    found = recovery(sae, truth, rows=ROWS)
    assert found.scores.mcc > found.floor.mcc + 0.3
    assert found.scores.f1_matched > found.floor.f1_matched + 0.2
    assert found.scores.coverage > 0.05 and found.fvu < 0.3


def test_a_cut_run_continues_to_the_same_bytes(tmp_path, monkeypatch):
    # 60,000 rows are two windows
    options = {"batch": 1000, "tokens": 50_000, "checkpoint_every": 20}
    step = Trainer.step

    def dies(self, x_BD):
        if self.step_count == 37:
            raise RuntimeError("killed")
        return step(self, x_BD)

    def train(name):
        sk.train(TopK(k=4, d_sae=96), preset("tiny", rows=60_000).draw(), out=tmp_path / name, **options)

    train("whole")
    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train("cut")
    monkeypatch.setattr(Trainer, "step", step)
    train("cut")
    for name in ("sae.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
