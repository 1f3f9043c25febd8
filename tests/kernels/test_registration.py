"""The ops as torch sees them: opcheck, compile, and what the package imports."""

import ast
import sys
from pathlib import Path

import pytest
import saekit_kernels
import torch
from saekit_kernels import (
    BatchCount,
    Codes,
    RowCount,
    Threshold,
    aux_decode,
    build_csc,
    decode_residual_value_grad,
    encode_select,
    ops,
)


def sample():
    generator = torch.Generator().manual_seed(0)
    x, W, W_dec = (torch.randn(n, 6, generator=generator) for n in (5, 20, 20))
    return x, W, torch.zeros(20), W_dec, torch.zeros(6)


def slots(flat):
    x, W, b, *_ = sample()
    codes = encode_select(x, W, b, rule=Threshold(1.0) if flat else RowCount(3)).codes
    return codes.values, codes.indices, codes.row_ptr


def leaf(t):
    return t.clone().requires_grad_()


ENCODE = {
    "row_count": ("row_count", 3, None, 0.0, None),
    "batch_count": ("batch_count", 9, None, 0.0, torch.tensor(0.5)),
    "column_count": ("column_count", 0, torch.ones(20, dtype=torch.int64), 0.0, None),
    "row_mass": ("row_mass", 0, torch.ones(5), 0.0, None),
    "threshold": ("threshold", 0, torch.tensor(0.5), 0.1, None),
}


# the input bias makes autograd's own check of a traced backward take seconds, so one rule has it
@pytest.mark.parametrize("rule", ENCODE)
def test_opcheck_encode_select(rule):
    x, W, b, _, b_in = sample()
    bias = leaf(b_in) if rule == "row_count" else None
    torch.library.opcheck(ops._encode_op, (leaf(x), leaf(W), leaf(b), bias, *ENCODE[rule], "relu", None, "fp32"))


@pytest.mark.parametrize("flat", [False, True])
def test_opcheck_decoders(flat):
    x, _, _, W_dec, b_dec = sample()
    values, indices, row_ptr = slots(flat)
    torch.library.opcheck(ops._decode_op, (leaf(values), indices, row_ptr, leaf(W_dec), leaf(b_dec)))
    torch.library.opcheck(ops._residual_op, (leaf(values), indices, row_ptr, leaf(W_dec), leaf(b_dec), leaf(x)))
    torch.library.opcheck(ops._dots_op, (values, indices, row_ptr, leaf(x), leaf(W_dec)))
    torch.library.opcheck(ops._csc_op, (values, indices, row_ptr, 20))


def test_opcheck_gradients_and_optimizer():
    x, W, *_ = sample()
    values, indices, row_ptr = slots(True)
    csc = build_csc(Codes(values, indices, row_ptr, 20))
    torch.library.opcheck(ops._segment_op, (*csc, values, x))
    torch.library.opcheck(ops._weight_grads_op, (*csc, values, x, values, x))
    state = [W.clone(), torch.zeros_like(W), torch.zeros_like(W), torch.ones_like(W)]
    torch.library.opcheck(ops._adam_op, (*state, torch.tensor(1.0), 1e-3, 0.9, 0.99, 1e-8, True, None))
    matrices = [W.clone(), W.clone(), *(torch.zeros_like(W) for _ in range(4))]
    for extra in ((None, None, None), (torch.tensor([3, 1]), torch.ones(2, W.shape[1]), torch.ones(2, W.shape[1]))):
        sums = (*csc, values, x, values, x)
        torch.library.opcheck(
            ops._segment_adam_op, (*sums, *matrices, *extra, torch.tensor(1.0), 1e-3, 0.9, 0.99, 1e-8)
        )


@pytest.mark.parametrize("rule", [RowCount(3), BatchCount(9), Threshold(0.5)], ids=lambda r: type(r).__name__)
def test_compiles_as_one_graph(rule):
    x, W, b, W_dec, b_dec = sample()

    def loss(x, W, b, W_dec, b_dec):
        codes = encode_select(x, W, b, b_dec, rule=rule).codes
        aux = aux_decode(x, b_dec, torch.tensor([1, 4]), W, b, W_dec, k_aux=1)
        return decode_residual_value_grad(codes, W_dec, b_dec, x).sq_B.sum() + aux.square().sum()

    eager = [leaf(t) for t in (W, b, W_dec, b_dec)]
    traced = [leaf(t) for t in (W, b, W_dec, b_dec)]
    want = torch.autograd.grad(loss(x, *eager), eager)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, *traced), traced)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


def test_imports_torch_alone():
    folder = Path(saekit_kernels.__file__).parent
    names = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "saekit_kernels"}


def test_every_public_name_has_a_docstring():
    for name in saekit_kernels.__all__:
        thing = getattr(saekit_kernels, name)
        assert name in ("COUNTERS", "Rule") or thing.__doc__, name


def test_the_readme_runs():
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    names = {}
    exec(readme.split("```python\n")[1].split("```")[0], names)
    assert names["error"].sq_B.shape == (64,)
    # and it names every rule and op
    assert all(f"`{rule.__name__}(" in readme for rule in (RowCount, BatchCount, Threshold))
