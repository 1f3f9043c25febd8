"""Thresholds from rows against a dense sort in float64, whatever was guessed and however the rows come."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from saekit_kernels import RowCount, Threshold, encode_select

from saekit import calibration
from saekit.calibration import Encoder, batch_threshold, column_thresholds, mean_codes, rows_for_columns
from saekit.errors import SaekitError

N, D, F = 3000, 8, 48


def exact_encoder(seed=0, shift=0.0):
    """Multiples of 1/64: with rows that are multiples of 1/256 every product and sum is exact in float32."""
    draw = torch.Generator().manual_seed(seed)
    W_enc_FD = torch.randint(-64, 65, (F, D), generator=draw) / 64
    b_enc_F = torch.randint(-32, 33, (F,), generator=draw) / 64 - shift
    return Encoder(W_enc_FD, b_enc_F, torch.randint(-32, 33, (D,), generator=draw) / 64)


def exact_rows(seed=1, n=N):
    return torch.randint(-512, 513, (n, D), generator=torch.Generator().manual_seed(seed)) / 256


def dense(encoder, x_BD):
    return (x_BD.double() - encoder.b_dec_D.double()) @ encoder.W_enc_FD.double().T + encoder.b_enc_F.double()


def midway(values, rank):
    """Between the rank-th and the next positive value, 0 if there is no next one."""
    positive = values[values > 0].sort(descending=True).values
    return 0.0 if len(positive) <= rank else ((positive[rank - 1] + positive[rank]) / 2).item()


class Rows:
    """Chunks of a matrix that share one buffer, as a reader's may; counts how often they are asked for."""

    def __init__(self, x_BD, chunk=700):
        self.x_BD, self.chunk, self.passes = x_BD, chunk, 0

    def __call__(self):
        self.passes += 1
        buffer = torch.empty(self.chunk, self.x_BD.shape[1])
        for part in self.x_BD.split(self.chunk):
            buffer[: len(part)] = part
            yield buffer[: len(part)]
            buffer.fill_(torch.nan)


@pytest.fixture(params=["roomy", "tight"])
def memory(request, monkeypatch):
    """Tight: small pieces, and what is held is sorted and cut down all the time."""
    if request.param == "tight":
        monkeypatch.setattr(calibration, "PIECE_ELEMENTS", 64 * F)
        monkeypatch.setattr(calibration, "SLACK", 0)


@pytest.fixture
def calls(monkeypatch):
    """Bars (smallest, largest) that are asked of the encoder, and how many pairs come."""
    seen = []

    def spied(*args, rule, **options):
        out = encode_select(*args, rule=rule, **options)
        bar = torch.as_tensor(rule.theta)
        seen.append((bar.min().item(), bar.max().item(), out.codes.values.numel()))
        return out

    monkeypatch.setattr(calibration, "encode_select", spied)
    return seen


GUESSES = {"right": 1.0, "below": 0.2, "far below": 1e-20, "zero": 0.0, "above": 1.5, "10 × above": 10.0}


@pytest.mark.parametrize("guess", GUESSES)
def test_batch_threshold_equals_a_dense_sort(guess, memory):
    encoder, x_BD, k = exact_encoder(), exact_rows(), 6
    pre_BF = dense(encoder, x_BD)
    want = midway(pre_BF, k * N)
    assert bool((pre_BF != want).all())
    rows = Rows(x_BD)
    theta, n_rows = batch_threshold(encoder, rows, k, GUESSES[guess] * want)
    assert theta == want and n_rows == N
    assert int((pre_BF > theta).sum()) == k * N
    # a second pass only where the guess hid what was looked for
    assert rows.passes == (2 if "above" in guess else 1)


@pytest.mark.parametrize("guess", [*GUESSES, "mixed"])
def test_column_thresholds_equal_a_dense_sort(guess, memory):
    encoder, x_BD = exact_encoder(), exact_rows()
    pre_BF = dense(encoder, x_BD)
    # from half of the rows down to less than one
    density_F = 0.5 * 0.8 ** torch.arange(F).double()
    rank_F = [max(1, round(N * density)) for density in density_F.tolist()]
    assert rank_F[0] == 1500 and rank_F[-1] == 1
    want_F = torch.tensor([midway(pre_BF[:, j], rank) for j, rank in enumerate(rank_F)])
    assert bool((want_F[3:] > 0).all())
    if guess == "mixed":
        factor_F = torch.tensor(list(GUESSES.values())).repeat(F)[:F]
    else:
        factor_F = torch.full((F,), GUESSES[guess])
    theta_F, n_rows = column_thresholds(encoder, Rows(x_BD), density_F, factor_F * want_F)
    assert theta_F.dtype == torch.float32 and n_rows == N
    torch.testing.assert_close(theta_F, want_F, rtol=0, atol=0)
    kept_F = (pre_BF > theta_F).sum(0)
    for j, rank in enumerate(rank_F):
        assert kept_F[j] == (rank if want_F[j] > 0 else (pre_BF[:, j] > 0).sum()), j


def test_one_short_column_and_one_feature():
    encoder, x_BD = exact_encoder(), exact_rows()
    pre_BF = dense(encoder, x_BD)
    want_F = torch.tensor([midway(pre_BF[:, j], 30) for j in range(F)])
    guess_F = want_F.clone()
    guess_F[17] = 100.0
    rows = Rows(x_BD)
    assert torch.equal(column_thresholds(encoder, rows, torch.full((F,), 0.01), guess_F).theta_F, want_F)
    assert rows.passes == 2
    alone = Encoder(encoder.W_enc_FD[17:18], encoder.b_enc_F[17:18], encoder.b_dec_D)
    theta_F, _ = column_thresholds(alone, Rows(x_BD), torch.tensor([0.01]), torch.tensor([100.0]))
    assert torch.equal(theta_F, want_F[17:18])


def test_first_rows_that_mislead(memory):
    # the largest come first, or last: neither their bar nor their number fits the rest
    encoder, k = exact_encoder(), 3
    for descending in (False, True):
        x_BD = exact_rows()
        x_BD = x_BD[x_BD.norm(dim=1).argsort(descending=descending)]
        want = midway(dense(encoder, x_BD), k * N)
        assert batch_threshold(encoder, Rows(x_BD), k, 0.0).theta == want
        want_F = torch.tensor([midway(column, 60) for column in dense(encoder, x_BD).T])
        found = column_thresholds(encoder, Rows(x_BD), torch.full((F,), 0.02), torch.zeros(F))
        assert torch.equal(found.theta_F, want_F)


def test_ties_across_the_boundary_are_left_out_together():
    # one feature, pre = x: 3, 2, 2, 2, 1, −1
    encoder = Encoder(torch.ones(1, 1), torch.zeros(1), torch.zeros(1))
    x_BD = torch.tensor([[2.0], [3], [-1], [2], [1], [2]])
    half = torch.tensor([0.5])
    # R = 3 of 6: the third and the fourth are both 2
    assert batch_threshold(encoder, Rows(x_BD), 1, 0.0).theta == 0.0  # 6 wanted, 5 positive
    assert column_thresholds(encoder, Rows(x_BD), half, torch.zeros(1)).theta_F.tolist() == [2.0]
    # R = 4: between 2 and 1; R = 1: between 3 and 2; R = 5: all that are positive
    for density, want in ((4 / 6, 1.5), (1 / 6, 2.5), (5 / 6, 0.0), (0.0, 2.5)):
        theta_F = column_thresholds(encoder, Rows(x_BD), torch.tensor([density]), torch.tensor([2.0])).theta_F
        assert theta_F.tolist() == [want], density


def test_many_ties(memory):
    # integers: a few dozen different values in all, hence ties everywhere
    draw = torch.Generator().manual_seed(5)
    encoder = Encoder(torch.randint(-2, 3, (F, D), generator=draw).float(), torch.zeros(F), torch.zeros(D))
    x_BD = torch.randint(-2, 3, (N, D), generator=draw).float()
    pre_BF = dense(encoder, x_BD)
    for k in (1, 4, 9):
        for guess in (0.0, 5.0, 50.0):
            assert batch_threshold(encoder, Rows(x_BD), k, guess).theta == midway(pre_BF, k * N)
    want_F = torch.tensor([midway(column, 90) for column in pre_BF.T])
    for guess in (0.0, 5.0, 50.0):
        found = column_thresholds(encoder, Rows(x_BD), torch.full((F,), 0.03), torch.full((F,), guess))
        assert torch.equal(found.theta_F, want_F)


def test_neighbouring_floats_are_told_apart():
    # 1 + 2ε and 1 + ε: their middle rounds to the upper one; 1 + ε and 1: to the lower one
    encoder, eps = Encoder(torch.ones(1, 1), torch.zeros(1), torch.zeros(1)), 2.0**-23
    for lower in (1 + eps, 1.0):
        x_BD = torch.tensor([[lower], [lower + eps], [0.5], [0.25]])
        theta_F, _ = column_thresholds(encoder, Rows(x_BD), torch.tensor([0.25]), torch.tensor([1.0]))
        assert theta_F.tolist() == [lower]
        assert int((x_BD[:, 0] > theta_F).sum()) == 1


@pytest.mark.parametrize("guess", [0.0, 1.0])
def test_too_few_positives_give_zero(guess, memory):
    encoder, x_BD = exact_encoder(shift=6.0), exact_rows()
    pre_BF = dense(encoder, x_BD)
    positive = int((pre_BF > 0).sum())
    assert 0 < positive < N
    assert batch_threshold(encoder, Rows(x_BD), 1, guess) == (0.0, N)
    # R = 30: some columns have as many
    theta_F, _ = column_thresholds(encoder, Rows(x_BD), torch.full((F,), 0.01), torch.full((F,), guess))
    assert torch.equal(theta_F, torch.tensor([midway(column, 30) for column in pre_BF.T]))
    assert 0 < int((theta_F == 0).sum()) < F
    # exactly as many positives as ranks: all of them are kept, and nothing lies below
    exact = Encoder(torch.ones(1, 1), torch.zeros(1), torch.zeros(1))
    assert batch_threshold(exact, Rows(torch.tensor([[1.0], [2.0]])), 1, guess).theta == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    encoder, x_BD = exact_encoder(), exact_rows(n=50)
    density_F, guess_F = torch.full((F,), 0.1), torch.ones(F)
    with pytest.raises(SaekitError, match="running threshold of training is NaN or infinite"):
        batch_threshold(encoder, Rows(x_BD), 2, bad)
    guess_F[3] = bad
    with pytest.raises(SaekitError, match="running threshold of training is NaN or infinite"):
        column_thresholds(encoder, Rows(x_BD), density_F, guess_F)
    x_BD[31, 2] = bad
    with pytest.raises(SaekitError, match="rows of the training split .* saekit check"):
        batch_threshold(encoder, Rows(x_BD), 2, 1.0)
    with pytest.raises(SaekitError, match="rows of the training split .* saekit check"):
        column_thresholds(encoder, Rows(x_BD), density_F, torch.zeros(F))


def real_encoder(seed=0):
    draw = torch.Generator().manual_seed(seed)
    W_enc_FD = torch.randn(160, 24, generator=draw) * torch.logspace(0, -0.5, 160)[:, None] / 24**0.5
    return Encoder(W_enc_FD, -0.3 * torch.rand(160, generator=draw), 0.3 * torch.randn(24, generator=draw))


def real_rows(seed, n):
    return 1.5 * torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_chunks_change_no_bit(monkeypatch):
    monkeypatch.setattr(calibration, "PIECE_ELEMENTS", 160 * 96)
    monkeypatch.setattr(calibration, "SLACK", 0)
    encoder, x_BD = real_encoder(), real_rows(2, 1000)
    density_F = torch.linspace(0.2, 0.001, 160)
    guess_F = torch.linspace(0, 2, 160)

    def found(chunk):
        theta_F, n_rows = column_thresholds(encoder, Rows(x_BD, chunk), density_F, guess_F)
        mean_F = mean_codes(lambda x: encode(encoder, x, RowCount(4), key="abs"), Rows(x_BD, chunk))
        return batch_threshold(encoder, Rows(x_BD, chunk), 6, 0.4), theta_F, n_rows, mean_F

    whole = found(1000)
    for chunk in (1, 7, 96, 333, 5000):
        other = found(chunk)
        assert other[0] == whole[0] and other[2] == whole[2] == 1000
        assert torch.equal(other[1], whole[1]) and torch.equal(other[3], whole[3])


def encode(encoder, x_BD, rule, **options):
    return encode_select(x_BD, *encoder, rule=rule, compute="fp32", **options).codes


def test_l0_is_k_on_the_calibration_rows_and_near_it_on_fresh_ones():
    encoder, k = real_encoder(), 12
    sae: Any = SimpleNamespace(W_enc=encoder.W_enc_FD, b_enc=encoder.b_enc_F, b_dec=encoder.b_dec_D)
    assert all(a is b for a, b in zip(Encoder.of(sae), encoder))
    x_BD, fresh_BD = real_rows(2, 20_000), real_rows(3, 20_000)
    theta, n_rows = batch_threshold(encoder, Rows(x_BD, 4096), k, 0.7)
    assert n_rows == 20_000
    assert encode(encoder, x_BD, Threshold(theta)).values.numel() == k * n_rows
    assert encode(encoder, fresh_BD, Threshold(theta)).l0().double().mean() == pytest.approx(k, rel=0.02)
    density_F = torch.linspace(0.1, 0.05, 160)
    assert density_F.sum() == pytest.approx(12)
    theta_F, _ = column_thresholds(encoder, Rows(x_BD, 4096), density_F, torch.full((160,), 0.7))
    codes = encode(encoder, x_BD, Threshold(theta_F))
    rank_F = (20_000 * density_F.double()).round().long()
    assert torch.equal(torch.bincount(codes.indices, minlength=160), rank_F)
    assert encode(encoder, fresh_BD, Threshold(theta_F)).l0().double().mean() == pytest.approx(k, rel=0.02)


def test_what_is_held_stays_near_what_is_needed(monkeypatch):
    """Also from a guess of 0, which lets half of a piece through, or from one that needs a second pass."""
    piece = 64
    monkeypatch.setattr(calibration, "PIECE_ELEMENTS", piece * F)
    monkeypatch.setattr(calibration, "SLACK", 0)
    held, add = [], calibration._Largest.add

    def spied(self, codes):
        add(self, codes)
        held.append(self.count)

    monkeypatch.setattr(calibration._Largest, "add", spied)
    encoder, x_BD, k = exact_encoder(), exact_rows(n=20_000), 2
    theta = midway(dense(encoder, x_BD), k * 20_000)
    for guess in (theta, 0.0, 10 * theta):
        batch_threshold(encoder, Rows(x_BD), k, guess)
        column_thresholds(encoder, Rows(x_BD), torch.full((F,), k / F), torch.full((F,), guess))
        # 1.5·k·N, in the columns 1.2·(8·√R + 16) each for chance, and one piece; N·F/2 are positive
        assert max(held) < 1.5 * k * 20_000 + 1.2 * F * (8 * math.sqrt(k * 20_000 / F) + 16) + piece * F
        held.clear()


def test_a_bar_of_zero_is_left_at_once(monkeypatch, calls):
    monkeypatch.setattr(calibration, "PIECE_ELEMENTS", 64 * F)
    monkeypatch.setattr(calibration, "SLACK", 0)
    encoder, x_BD, k = exact_encoder(), exact_rows(n=20_000), 2
    pieces = math.ceil(20_000 / 64)
    theta = midway(dense(encoder, x_BD), k * 20_000)
    # the first piece without a guess; never with one
    batch_threshold(encoder, Rows(x_BD), k, 0.0)
    assert len(calls) == pieces and [bar for bar, _, _ in calls].count(0) == 1
    calls.clear()
    batch_threshold(encoder, Rows(x_BD), k, theta)
    assert len(calls) == pieces and calls[0][0] == pytest.approx(0.8 * theta, rel=1e-6)
    # the second pass: until R + 1 are held, a tenth of the rows where R is a tenth of the positive pairs
    calls.clear()
    batch_threshold(encoder, Rows(x_BD), k, 10 * theta)
    assert len(calls) == 2 * pieces and [bar for bar, _, _ in calls].count(0) < 0.15 * pieces


def test_mean_codes_against_dense():
    encoder, x_BD = real_encoder(), real_rows(4, 2500)
    for rule, key in ((RowCount(7), "abs"), (Threshold(0.5), "abs"), (Threshold(0.5), "relu")):
        mean_F = mean_codes(lambda x, rule=rule, key=key: encode(encoder, x, rule, key=key), Rows(x_BD))
        assert mean_F.dtype == torch.float64
        torch.testing.assert_close(
            mean_F, encode(encoder, x_BD, rule, key=key).dense().double().mean(0), rtol=0, atol=1e-6
        )
        assert bool((mean_F < -0.01).any()) == (key == "abs")
    x_BD[7] = torch.nan
    with pytest.raises(SaekitError, match="NaN or infinite"):
        mean_codes(lambda x: encode(encoder, x, RowCount(7), key="abs"), Rows(x_BD))


def test_rows_for_columns_by_hand():
    density_F = torch.tensor([0.5, 0.001, 1e-4])
    # 20 / 0.001 = 20,000 rows would do
    assert rows_for_columns(density_F) == 262_144
    assert rows_for_columns(density_F, start=1000) == pytest.approx(20_000, abs=1)
    # 20 / 1e-5 = 2,000,000; 20 / 1e-6 is too many
    assert rows_for_columns(density_F * 0.01) == pytest.approx(2_000_000, abs=1)
    assert rows_for_columns(density_F * 0.001) == 4_000_000
    n = rows_for_columns(density_F * 0.0123, start=1)
    assert round(n * 0.001 * 0.0123) == 20
