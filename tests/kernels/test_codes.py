"""Codes: both forms of the same small matrix, worked out by hand."""

import pytest
import torch
from saekit_kernels import Codes

# row 0: feature 1 → 2, feature 3 → −1     row 1: nothing     row 2: feature 0 → 4
DENSE = torch.tensor([[0.0, 2, 0, -1], [0, 0, 0, 0], [4, 0, 0, 0]])
ROWWISE = Codes.rowwise(torch.tensor([[2.0, -1], [0, 0], [4, 0]]), torch.tensor([[1, 3], [0, 1], [0, 2]]), 4)
FLAT = Codes.flat(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 0]), torch.tensor([2.0, -1, 4]), 4)
# a dropped pair leaves an empty slot behind
FLAT_WITH_EMPTY = Codes.flat(torch.tensor([0, 3, 3, 4]), torch.tensor([1, 2, 3, 0]), torch.tensor([2.0, 0, -1, 4]), 4)

both = pytest.mark.parametrize(
    "codes", [ROWWISE, FLAT, FLAT_WITH_EMPTY], ids=["rowwise", "flat", "flat with an empty slot"]
)


@both
def test_dense_shape_and_types(codes):
    assert torch.equal(codes.dense(), DENSE)
    assert codes.batch == 3 and codes.n_features == 4 and codes.shape == (3, 4)
    assert codes.indices.dtype == torch.int32


@both
def test_firing_counts_what_is_not_zero(codes):
    # a negative code fires, an empty slot does not
    assert codes.fired_F().tolist() == [True, True, False, True]
    assert codes.l0().tolist() == [2, 0, 1]


@both
def test_times(codes):
    W = torch.tensor([[1.0, 0], [0, 1], [5, 5], [2, 2]])
    # row 0: 2·(0, 1) − 1·(2, 2);  row 2: 4·(1, 0)
    assert codes.times(W).tolist() == [[-2, 0], [0, 0], [4, 0]]


@both
def test_times_is_differentiable_in_both(codes):
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    values = codes.values.double().requires_grad_()
    weight = torch.randn(3, 3, dtype=torch.float64)
    got = torch.autograd.grad((codes.with_values(values).times(W) * weight).sum(), [values, W])
    want_W = DENSE.double().T @ weight
    want_values = (weight @ W.T)[codes.slot_rows(), codes.indices.reshape(-1).long()].view_as(values)
    torch.testing.assert_close(got[0], want_values)
    torch.testing.assert_close(got[1], want_W)


@both
def test_pairs(codes):
    pairs = codes.pairs()
    assert pairs.row_N.tolist() == [0, 0, 2]
    assert pairs.feature_N.tolist() == [1, 3, 0]
    assert pairs.value_N.tolist() == [2, -1, 4]


@both
def test_keep_scaled_rows(codes):
    positive = codes.keep(codes.values > 0)
    assert torch.equal(positive.dense(), DENSE.clamp(min=0))
    assert positive.fired_F().tolist() == [True, True, False, False]
    assert torch.equal(codes.scaled(-2.0).dense(), DENSE * -2)
    assert torch.equal(codes.rows(1, 3).dense(), DENSE[1:])
    assert codes.rows(1, 1).batch == 0
    assert codes.to("cpu").detach().l0().tolist() == [2, 0, 1]


@both
def test_concatenate(codes):
    twice = Codes.concatenate([codes, codes.rows(0, 2), codes.rows(1, 1)])
    assert torch.equal(twice.dense(), torch.cat([DENSE, DENSE[:2]]))
    assert twice.l0().tolist() == [2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="one \\(F, K\\) or all flat"):
        Codes.concatenate([ROWWISE, FLAT])


def test_no_rows_and_no_firings():
    for codes in (
        Codes.rowwise(torch.zeros(0, 2), torch.zeros(0, 2), 4),
        Codes.flat(torch.tensor([0]), torch.zeros(0), torch.zeros(0), 4),
    ):
        assert codes.batch == 0 and codes.times(torch.ones(4, 5)).shape == (0, 5)
        assert codes.dense().shape == (0, 4) and not codes.fired_F().any() and codes.l0().shape == (0,)
    silent = Codes.flat(torch.tensor([0, 0, 0]), torch.zeros(0), torch.zeros(0), 4)
    assert silent.times(torch.ones(4, 5)).abs().sum() == 0 and silent.l0().tolist() == [0, 0]
    assert len(silent.pairs().row_N) == 0


def test_a_nan_code_fires():
    codes = Codes.rowwise(torch.tensor([[float("nan"), 0]]), torch.tensor([[2, 3]]), 4)
    assert codes.fired_F().tolist() == [False, False, True, False] and codes.l0().tolist() == [1]


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 2\)"):
        Codes.rowwise(torch.zeros(2, 3), torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="flat codes need"):
        Codes.flat(torch.tensor([0, 2]), torch.zeros(2), torch.zeros(3), 4)
    with pytest.raises(ValueError, match=r"4 features times a matrix of shape \(5, 2\)"):
        ROWWISE.times(torch.zeros(5, 2))
