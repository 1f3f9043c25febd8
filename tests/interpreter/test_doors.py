"""The Triton path through the public doors, on a GPU where there is one (`make bench-gpu`), else in the interpreter.

Truth is the reference in float64. Inputs of the selections are integers whose products are exact, so that sets compare exactly.
"""

import pytest
import torch
from saekit_kernels import (
    BatchCount,
    Codes,
    ColumnCount,
    ExtraRows,
    RowCount,
    RowMass,
    Threshold,
    build_csc,
    decode,
    decode_residual_value_grad,
    encode_select,
    explain,
    feature_sums,
    pair_dots,
    row_adam_,
    segment_adam_,
    segment_weight_grads,
    using,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# (B, D, F, K); the first fits the interpreter's patience, the others need a device. F > 8192 selects in phases
SHAPES = [(37, 40, 150, 5)] + [
    (300, 96, 1000, 7),
    (1000, 768, 12_288, 32),
    (517, 100, 9000, 20),
    (2048, 2304, 16_384, 64),
] * GPU
ADAM = {"step": 3, "lr": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-6}


def integers(*shape, span, generator):
    return torch.randint(-span, span + 1, shape, generator=generator).float()


def rules(B, F, K):
    return {
        "row_count": RowCount(K),
        "batch_count": BatchCount(B * K),
        "column_count": ColumnCount((torch.arange(F) % (2 * K)).to(DEVICE)),
        "row_mass": RowMass(torch.linspace(0, 40, B).to(DEVICE)),
        "threshold": Threshold(5.5),
    }


@pytest.mark.parametrize("key", ["relu", "abs"])
@pytest.mark.parametrize("rule", rules(1, 1, 1))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selections_are_those_of_the_reference(shape, rule, key):
    B, D, F, K = shape
    g = torch.Generator().manual_seed(0)
    x, W = integers(B, D, span=2, generator=g).to(DEVICE), integers(F, D, span=1, generator=g).to(DEVICE)
    b = (torch.arange(F) * 2.0**-15).to(DEVICE)
    chosen = rules(B, F, K)[rule]
    with using("triton"):
        got = encode_select(x, W, b, rule=chosen, key=key, compute="fp32")
        again = encode_select(x, W, b, rule=chosen, key=key, compute="fp32")
    with using("reference"):
        want = encode_select(x, W, b, rule=chosen, key=key).codes
    live = got.codes.values != 0
    assert torch.equal(got.codes.indices[live], want.indices[want.values != 0])
    assert torch.equal(got.codes.values[live], want.values[want.values != 0])
    assert torch.equal(got.codes.values, again.codes.values) and torch.equal(got.codes.indices, again.codes.indices)


def case(shape, flat: bool):
    """Codes with Zipf usage, empty slots and silent features, and everything a step needs, float64 on the CPU."""
    B, D, F, K = shape
    g = torch.Generator().manual_seed(1)
    weight = 1 / (torch.randperm(F, generator=g) + 3.0)
    weight[: F // 3] = 0
    index = torch.multinomial(weight.expand(B, F), K, generator=g).sort(dim=1).values
    value = torch.randn(B, K, generator=g, dtype=torch.float64)
    value[torch.rand(B, K, generator=g) < 0.2] = 0
    codes = Codes.rowwise(value, index, F)
    if flat:
        codes = Codes.of_dense(codes.dense())
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g, dtype=torch.float64), dim=1)
    more = [
        torch.randn(*n, generator=g, dtype=torch.float64)
        for n in ((D,), (B, D), codes.values.shape, codes.values.shape)
    ]
    return codes, W, *more


def narrow(t):
    return t.to(DEVICE, torch.float32) if t.is_floating_point() else t.to(DEVICE)


def close(got, want, eager, what: str):
    """No further from float64 than eager float32 is, by the rule of the kernels' tests."""
    scale = want.square().mean().sqrt().clamp_min(1e-30)
    error, own = (((t.double().cpu() - want).square().mean().sqrt() / scale).item() for t in (got, eager))
    assert error <= 1.1 * own + 1e-7, f"{what}: {error:.2e}, eager float32 {own:.2e}"


def both(function, *tensors):
    """(Triton in float32, reference in float64, reference in float32), as tuples."""
    found = []
    for path, how in (("triton", narrow), ("reference", lambda t: t.clone()), ("reference", narrow)):
        given = [
            Codes(how(t.values), how(t.indices), None if t.row_ptr is None else how(t.row_ptr), t.n_features)
            if isinstance(t, Codes)
            else how(t)
            for t in tensors
        ]
        with using(path), torch.no_grad():
            out = function(*given)
        found.append(out if isinstance(out, tuple) else (out,))
    return zip(*found, strict=True)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathers_gradients_and_adam(shape, flat):
    codes, W, b, target, coef_dec, coef_enc = case(shape, flat)
    for i, three in enumerate(both(decode, codes, W, b)):
        close(*three, f"decode {i}")
    for i, three in enumerate(both(decode_residual_value_grad, codes, W, b, target)):
        close(*three, f"residual {i}")
    for three in both(pair_dots, codes, target, W):
        close(*three, "pair_dots")

    def gradients(codes, W, target, coef_dec, coef_enc):
        csc = build_csc(codes)
        grads = segment_weight_grads(csc, coef_dec, target, coef_enc, 2 * target, project_onto=W)
        return (*grads[:3], feature_sums(csc, coef_enc))

    for i, three in enumerate(both(gradients, codes, W, target, coef_dec, coef_enc)):
        close(*three, f"gradients {i}")

    def step(codes, W, target, coef_dec, coef_enc, ids):
        W_dec, W_enc = W.clone(), 0.7 * W
        m_dec, v_dec, m_enc, v_enc = 0.1 * W, W.square(), -0.1 * W, W.square()
        extra = ExtraRows(ids, W[: len(ids)], 2 * W[: len(ids)], W[: len(ids), 0])
        sq = segment_adam_(
            build_csc(codes), coef_dec, target, coef_enc, 2 * target, W_dec, W_enc, (m_dec, v_dec), (m_enc, v_enc),
            extra=extra, **ADAM,
        )  # fmt: skip
        return sq, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc

    for i, three in enumerate(both(step, codes, W, target, coef_dec, coef_enc, torch.tensor([3, 0, 7]))):
        close(*three, f"step {i}")

    def adam(w, grad):
        w, m, v = w.clone(), 0.1 * w, w.square()
        row_adam_(w, m, v, grad, unit_norm=True, **ADAM)
        return w, m, v

    for i, three in enumerate(both(adam, W, W.flip(0))):
        close(*three, f"adam {i}")


def test_it_must_be_asked_for():
    assert not any(choice.path == "triton" for choice in explain(DEVICE))
    with using("triton"):
        assert {choice.path for choice in explain(DEVICE) if choice.op != "encoder product"} == {"triton"}
    with using("triton"), pytest.raises(ValueError, match="float64 runs on the reference path alone"):
        decode(*case(SHAPES[0], False)[:3])
    with using("triton"), pytest.raises(ValueError, match="does not rank by key 'raw'"):
        encode_select(*(torch.ones(n, device=DEVICE) for n in ((2, 3), (4, 3), (4,))), rule=RowCount(1), key="raw")
