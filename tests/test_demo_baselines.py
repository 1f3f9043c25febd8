"""The 5-gram opponent of the bundled model, by hand on a tiny stream."""

import math

import numpy as np
import pytest

from saekit.demo.baselines import kneser_ney_nats


def test_bigram_by_hand():
    # train a b a b a c (a=1 b=2 c=3): bigrams ab×2 ba×2 ac×1; one type once, two types twice: discount 1/(1+4) = 0.2
    # unigram continuation counts: a 1 (after b), b 1, c 1 (after a): all once, discount 3/3 = 1, so p1 = uniform 1/4096
    # p(b|a) = (2 - 0.2)/3 + 0.2·2/3 · 1/4096;  the first token a has p1 = 1/4096
    train, held = np.array([1, 2, 1, 2, 1, 3]), np.array([1, 2])
    expected = (math.log(4096) - math.log(1.8 / 3 + 0.4 / 3 / 4096)) / 2
    assert kneser_ney_nats(train, held, order=2) == pytest.approx(expected)


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 6, 500)
    history = [int(t) for t in train[:4]]
    # the probability of each continuation, from the difference of two totals
    base = kneser_ney_nats(train, np.array(history), order=3) * 4
    total = sum(math.exp(base - kneser_ney_nats(train, np.array([*history, w]), order=3) * 5) for w in range(4096))
    assert total == pytest.approx(1.0, abs=1e-6)
