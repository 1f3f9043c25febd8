"""The law of densities against rank, the features that fall short of it, and budgets by it."""

import math

import pytest
import torch

from saekit import zipf
from saekit.errors import SaekitError
from saekit.zipf import ZipfFit


def law(F, alpha, beta, k=32):
    """Densities (r + β)^−α that add up to k."""
    q_F = (torch.arange(1, F + 1).double() + beta) ** -alpha
    return q_F / q_F.sum() * k


@pytest.mark.parametrize("alpha", [0.6, 0.8, 1.0, 1.2, 1.4])
@pytest.mark.parametrize("beta", [0, 2, 20, 100])
def test_a_known_law_is_recovered_from_poisson_counts(alpha, beta):
    draw = torch.Generator().manual_seed(0)
    F, tokens = 4096, 2e6
    p_F = law(F, alpha, beta)
    order_F = torch.randperm(F, generator=draw)
    count_F = torch.poisson(p_F * tokens, generator=draw)[order_F]
    found = zipf.fit(count_F, tokens)
    assert found is not None and found.ranks > 50
    assert abs(found.alpha - alpha) < 0.05 and found.beta == beta
    # the features' own densities come back, tail included, which was not fitted
    assert (zipf.expected(found, count_F) / p_F[order_F]).log().abs().quantile(0.95) < 0.1
    # and the same counts give the same law to the last bit
    assert zipf.fit(count_F.clone(), tokens) == found


def test_a_beta_beside_the_grid_costs_little():
    draw = torch.Generator().manual_seed(1)
    count_F = torch.poisson(law(16384, 1.0, 7.4) * 1e6, generator=draw)
    found = zipf.fit(count_F, 1e6)
    assert found is not None and found.beta in (5, 10) and abs(found.alpha - 1) < 0.05


@pytest.mark.parametrize("alpha, clamped", [(2.5, 1.5), (0.2, 0.5)])
def test_alpha_is_clamped_and_the_intercept_fits_the_clamped_one(alpha, clamped):
    count_F = law(100, alpha, 0, k=1) * 1e9
    found = zipf.fit(count_F, 1e9)
    assert found is not None and found.alpha == clamped
    # least squares of y = a − α·x with α given: a = mean(y + α·x)
    last = 85  # of 100
    ranks = sorted({round(last ** (i / 63)) for i in range(64)})
    y = [math.log(count_F[r - 1] / 1e9) for r in ranks]
    x = [math.log(r + found.beta) for r in ranks]
    assert found.a == pytest.approx(sum(b + clamped * a for a, b in zip(x, y)) / len(ranks), rel=1e-12)
    assert found.ranks == len(ranks)


def test_a_fit_needs_sixteen_ranks_with_ten_firings():
    # 85 % of 19 features are 16; geometric spacing takes each of so few
    count_F = torch.arange(28, 9, -1).double()
    assert count_F[15] == 13 and len(count_F) == 19
    found = zipf.fit(count_F, 1000)
    assert found is not None and found.ranks == 16
    assert zipf.fit(count_F[:18], 1000) is None  # 85 % of 18 are 15
    count_F[15:] = 9
    assert zipf.fit(count_F, 1000) is None  # 15 with ten or more
    assert zipf.fit(torch.zeros(1000), 1000) is None


def test_features_that_stopped_firing_do_not_bend_the_law():
    # their counts decay for ever and never reach 0
    draw = torch.Generator().manual_seed(2)
    count_F = torch.poisson(law(4096, 1.0, 5) * 1e6, generator=draw)
    count_F[torch.randperm(4096, generator=draw)[:1600]] *= math.exp(-20)
    found = zipf.fit(count_F, 1e6)
    assert found is not None and abs(found.alpha - 1) < 0.05


def test_ranks_and_expected_densities_by_hand():
    count_F = torch.tensor([0.0, 5.0, 5.0, 0.0, 7.0])
    # 7 first, the two fives by index, then the two that never fired by index
    assert zipf.rank(count_F).tolist() == [4, 2, 3, 5, 1]
    # 0.6 / (rank + 1): ranks 4, 2, 3, 5, 1
    expected_F = zipf.expected(ZipfFit(math.log(0.6), 1.0, 1.0, 16), count_F)
    torch.testing.assert_close(expected_F, torch.tensor([0.12, 0.2, 0.15, 0.1, 0.3]).double(), rtol=1e-6, atol=0)
    assert expected_F.dtype == torch.float64


def test_a_feature_at_one_percent_of_its_rank_is_under_used_one_at_half_is_not():
    draw = torch.Generator().manual_seed(3)
    F, tokens = 1024, 1e6
    p_F = law(F, 1.0, 5)
    # the last ranks by count, whatever the index: rank 1023 at half of its density, 1024 at a hundredth
    half, hundredth = 700, 20
    density_F = torch.empty(F).double()
    density_F[half], density_F[hundredth] = 0.5 * p_F[1022], 0.01 * p_F[1023]
    others = torch.ones(F, dtype=torch.bool)
    others[[half, hundredth]] = False
    density_F[others] = p_F[:1022]
    count_F = torch.poisson(density_F * tokens, generator=draw)
    found = zipf.fit(count_F, tokens)
    assert found is not None
    assert zipf.under_used(count_F, tokens, found).nonzero().tolist() == [[hundredth]]
    # a wider net takes both
    assert set(zipf.under_used(count_F, tokens, found, tau=0.9).nonzero().squeeze(1).tolist()) >= {half, hundredth}
    # never fired: under-used as well
    count_F[hundredth] = 0
    assert zipf.under_used(count_F, tokens, found)[hundredth]
    # promised fewer than 10 firings: chance may leave it without any
    assert zipf.expected(found, count_F)[hundredth] * 1000 == pytest.approx(4, abs=2)
    assert not zipf.under_used(count_F / 1000, tokens / 1000, found).any()


# Budgets of a batch of 4,096 rows at α = 1: m_1 = k·B / ((1 + β)·Σ 1/(r + β)), and the sum is about
# log((F + β + ½) / (β + ½)): 131,072 / 10.28 = 12,749 for β = 0 (H_F = log F + 0.577); / (8.4 · 7.638) = 2,043 for 7.4.
# The others follow: m_r = m_1·(1 + β) / (r + β), for example 2,043 · 8.4 / 8,199 = 2.1 at the median.
@pytest.mark.parametrize(
    "F, beta, p_max, m_1, above, median, last, below",
    [
        (16384, 0.0, 4.0, 12749, 3, 1.6, 0.8, 3636),  # pure Zipf: more rows than there are
        (16384, 7.4, 0.5, 2048, 0, 2.1, 1.05, 0),
        (32768, 6.6, 0.5, 2048, 0, 0.95, 0.5, 17243),
    ],
)
def test_budgets_by_zipf(F, beta, p_max, m_1, above, median, last, below):
    B, k = 4096, 32
    count_F = torch.arange(F, 0, -1).double()
    given = zipf.budgets(count_F, 1e6, k, "zipf", p_max, ZipfFit(0.0, 1.0, beta, 64))
    m_F = B * given.density_F
    assert given.kind == "zipf" and given.density_F.dtype == torch.float64
    assert m_F.sum().item() == pytest.approx(k * B, rel=1e-12) and bool((given.density_F <= p_max).all())
    assert m_F[0].item() == pytest.approx(m_1, rel=0.005)
    assert int((m_F > B).sum()) == above
    assert m_F.median().item() == pytest.approx(median, abs=0.05)
    assert m_F[-1].item() == pytest.approx(last, abs=0.05)
    assert abs(int((m_F < 1).sum()) - below) <= 0.005 * F
    assert bool((m_F.diff() < 0)[10:].all())


def test_budgets_are_clipped_and_the_others_scaled_until_both_hold():
    # p = .8, .1, .1 and 0 lifted to 0.1·k/F = .025, together 1.025: .78 is above .5, so the others share .5 of .225
    given = zipf.budgets(torch.tensor([80.0, 10, 10, 0]), 100, 1, "empirical")
    want_F = torch.tensor([0.5, 0.05 / 0.225, 0.05 / 0.225, 0.0125 / 0.225], dtype=torch.float64)
    torch.testing.assert_close(given.density_F, want_F, rtol=1e-12, atol=0)
    # k = 2, p = .8, .3, .05, .05: twice too much for the first (1.33), then for the second (1.5·.3/.4 > .5), then .5 each
    given = zipf.budgets(torch.tensor([80.0, 30, 5, 5]), 100, 2, "empirical")
    torch.testing.assert_close(given.density_F, torch.full((4,), 0.5).double(), rtol=1e-12, atol=0)
    # k = 1.2, the same p: the first (.8) is clipped, .7 over .4 gives .525, clipped too, the others share the last .2
    given = zipf.budgets(torch.tensor([80.0, 30, 5, 5]), 100, 1.2, "empirical")
    torch.testing.assert_close(
        given.density_F, torch.tensor([0.5, 0.5, 0.1, 0.1], dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", ["zipf", "empirical", "uniform"])
def test_every_kind_spends_k_and_leaves_no_feature_out(kind):
    count_F = torch.poisson(law(500, 1.3, 0) * 2000, generator=torch.Generator().manual_seed(4))
    count_F[200:260] = 0
    given = zipf.budgets(count_F, 2000, 32, kind, 0.4, ZipfFit(0.0, 1.2, 1.0, 60))
    assert given.kind == kind
    assert given.density_F.sum().item() == pytest.approx(32, rel=1e-12)
    assert given.density_F.min() > 0 and given.density_F.max() <= 0.4
    silent_F = given.density_F[200:260]
    if kind == "zipf":
        # after all others, by index
        assert silent_F.max() < given.density_F[count_F > 0].min() and bool((silent_F.diff() < 0).all())
    if kind == "uniform":
        assert bool((given.density_F == given.density_F[0]).all())


def test_zipf_without_a_fit_is_empirical_and_says_so():
    count_F = torch.tensor([9.0, 3, 1, 0])
    given = zipf.budgets(count_F, 10, 1, "zipf")
    assert given.kind == "empirical"
    assert torch.equal(given.density_F, zipf.budgets(count_F, 10, 1, "empirical").density_F)


def test_budgets_that_cannot_be():
    count_F = torch.arange(8.0)
    with pytest.raises(SaekitError, match="k = 5 .* d_sae = 8 .* p_max = 0.5, 4 at most; lower --k"):
        zipf.budgets(count_F, 100, 5)
    # just possible: everybody fires on half of the rows
    assert zipf.budgets(count_F, 100, 4).density_F.tolist() == [0.5] * 8


def test_whole_budgets_by_hand():
    # m = 4 · .575 = 2.3; dither 0, .618, .236, .854, .472: only the fourth carries it over
    density_F, phase_F = torch.tensor([0.575]).double(), torch.zeros(1)
    assert [int(zipf.whole(density_F, 4, phase_F, t)) for t in range(5)] == [2, 2, 2, 3, 2]
    # phase .75 and t = 0: 3.05
    assert int(zipf.whole(density_F, 4, torch.tensor([0.75]), 0)) == 3
    # 4 + (1 − 2⁻⁵³) is 5 in floating point; there are 4 rows
    almost_F = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert zipf.whole(torch.ones(1), 4, almost_F, 0).tolist() == [4]


def test_whole_budgets_add_up_in_each_step_and_are_right_on_average():
    F, B, k, steps = 4096, 1024, 16, 987
    count_F = torch.arange(F, 0, -1).double()
    density_F = zipf.budgets(count_F, 1e6, k, "zipf", 0.5, ZipfFit(0.0, 1.0, 5.0, 64)).density_F
    phase_F = torch.rand(F, generator=torch.Generator().manual_seed(5))
    sum_F, off = torch.zeros(F, dtype=torch.int64), []
    for step in range(steps):
        m_F = zipf.whole(density_F, B, phase_F, step)
        assert m_F.dtype == torch.int64 and m_F.min() >= 0 and m_F.max() <= B
        off.append(int(m_F.sum()) - k * B)
        sum_F += m_F
    assert max(map(abs, off)) <= 3 * math.sqrt(F)
    # each of its own, within a few tokens of the whole run
    assert (sum_F - steps * B * density_F).abs().max() < 5
    assert abs(sum(off)) / steps < 0.5
