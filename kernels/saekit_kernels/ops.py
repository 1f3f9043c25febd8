"""The public doors: which path runs, registration with torch, gradients.

    out = encode_select(x_BD, W_enc, b_enc, b_dec, rule=RowCount(32))
    sq_B, residual_BD, dv = decode_residual_value_grad(out.codes, W_dec, b_dec, x_BD)

Every door can be differentiated and compiled. Inside `torch.no_grad()` the same doors are the fast road of a training step
that handles its gradients itself:

    out   = encode_select(x_BD, W_enc, b_enc, b_dec, rule=RowCount(32), csc=True, workspace=kept)
    sq_B, residual_BD, dv = decode_residual_value_grad(out.codes, W_dec, b_dec, x_BD)
    s     = 1 / (B * V)                                             # dL/dsq_B
    grads = segment_weight_grads(out.csc, -2 * s * out.codes.values, residual_BD, -2 * s * dv, x_BD - b_dec, out=buffers)
    row_adam_(W_dec, m, v, grads.W_dec_FD, step=t, lr=lr, b1=0.9, b2=0.999, eps=1e-8, unit_norm=True)

`segment_adam_` is the last two for both matrices, with no gradient in memory.

B tokens · D width · F features · K slots per row · N slots in the batch · A dead features
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saekit_kernels import cpu, portable, reference
from saekit_kernels.codes import Codes
from saekit_kernels.portable import Workspace
from saekit_kernels.reference import Csc, WeightGrads
from saekit_kernels.rules import KEYS, BatchCount, ColumnCount, RowCount, RowMass, Rule, Threshold

COMPUTE = ("fp32", "bf16", "tf32")
COUNTERS = ("rows_short", "budget_unspent", "nan_rows")


class EncodeOut(NamedTuple):
    """What `encode_select` returns."""

    codes: Codes
    """Row-wise for `RowCount`, else flat; float32. Differentiable in the values."""
    csc: Csc | None
    """The firings by feature, if asked for."""
    threshold: Tensor | None
    """`BatchCount`: smallest kept key (); `ColumnCount`: (F); 0 where nothing was kept. None for the other rules."""
    hint: Tensor | None
    """What to pass to the rule next time; None for the rules that take none."""
    counters: Tensor
    """int64 (3): rows with fewer than k firings, pairs short of the budget (batch and column rules), rows with a NaN."""


class ExtraRows(NamedTuple):
    """Gradients of a few features that `segment_weight_grads` adds to its own (AuxK's)."""

    ids_A: Tensor
    """int64: feature of each row, none twice."""
    W_dec_AD: Tensor
    W_enc_AD: Tensor
    b_enc_A: Tensor


class DecodeOut(NamedTuple):
    """What `decode_residual_value_grad` returns."""

    sq_B: Tensor
    """Squared error of each row, Σ_d r²: the differentiable output."""
    residual_BD: Tensor
    """r = target − y, detached."""
    dv: Tensor
    """r · W_dec[feature] at every slot, shaped like the codes' values, detached. dL/dvalue = −2 · dL/dsq · dv."""


class Choice(NamedTuple):
    """One line of `explain`."""

    op: str
    path: str
    reason: str


_PATHS = ("cpu", "triton", "portable", "reference")
_RULES = {
    RowCount: "row_count",
    BatchCount: "batch_count",
    ColumnCount: "column_count",
    RowMass: "row_mass",
    Threshold: "threshold",
}
_forced: ContextVar[str | None] = ContextVar("saekit_kernels_path", default=None)

_CPU_REASONS = {
    "encode_select": "blocks of rows, selection by group maxima: a third of the time of topk on whole rows",
    "decode": "embedding_bag: half the time of the CSR product",
    "decode_residual_value_grad": "embedding_bag, then the sampled dense product: half the time of embedding_bag's gradient",
    "pair_dots": "sampled dense product: half the time of embedding_bag's gradient",
    "build_csc": "one stable argsort",
    "segment_sum": "embedding_bag on blocks of features that stay in the cache",
    "row_adam_": "fused Adam on blocks of rows that stay in the cache",
    "segment_adam_": "sums, projection, fused Adam and norm on blocks that stay in the cache: no gradient in memory",
}


@contextlib.contextmanager
def using(path: str) -> Iterator[None]:
    """Run every op inside the block on one path: "reference", "portable", "cpu" or "triton".

    An op that this path cannot run raises ValueError.
    """
    if path not in _PATHS:
        raise ValueError(f"there is no path {path!r}; the paths are {', '.join(_PATHS)}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.lru_cache(maxsize=256)
def _choose(forced: str | None, op: str, device: str, dtype: torch.dtype, rule: str, key: str, scaled: bool) -> Choice:
    """The path of an op. It never depends on B: a row is encoded alike alone and in a batch."""
    if dtype == torch.float64:
        cannot = dict.fromkeys(("portable", "cpu", "triton"), "float64 runs on the reference path alone")
    else:
        cannot = {}
        why = _why_not_triton(device, forced == "triton")
        if why is None and op == "encode_select":
            why = _module("triton").cannot(rule, key, scaled)
        if why is not None:
            cannot["triton"] = why
        if device != "cpu":
            cannot["cpu"] = f"the tensors are on {device}"
        elif op == "encode_select" and (rule != "row_count" or key == "raw" or scaled):
            what = rule if rule != "row_count" else f"key {key!r}" if key == "raw" else "scale_F"
            cannot["cpu"] = f"the cpu path does not select by {what}"
        elif op in ("row_adam_", "segment_adam_") and cpu.FUSED_ADAM is None:
            cannot["cpu"] = "this torch has no _fused_adam_"
    if forced is not None:
        if forced in cannot:
            raise ValueError(f"{op} cannot run on the {forced} path that was asked for: {cannot[forced]}")
        return Choice(op, forced, "asked for")
    for path in _PATHS:
        if path not in cannot:
            reason = _CPU_REASONS[op] if path == "cpu" else cannot["cpu" if device == "cpu" else "triton"]
            return Choice(op, path, reason)
    raise AssertionError(op)


@functools.cache
def _module(path: str):
    """The module of a path; Triton's is imported where it is wanted."""
    return importlib.import_module(f"saekit_kernels.{path}")


def _why_not_triton(device: str, asked_for: bool) -> str | None:
    """Why the Triton path does not run on a device type; None if it does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted and asked_for else "Triton's kernels run on a GPU"
    return None if asked_for else 'Triton\'s kernels have not run on a GPU yet: using("triton") asks for them'


def _path(op: str, like: Tensor, rule: str = "row_count", key: str = "relu", scaled: bool = False):
    """The module that runs an op on tensors like this one."""
    return _module(_choose(_forced.get(), op, like.device.type, like.dtype, rule, key, scaled).path)


def explain(device: str = "cpu") -> list[Choice]:
    """Which path each op takes for float32 tensors on a device, and why; the last line is the encoder product's default."""
    lines = []
    for rule in _RULES.values():
        choice = _choose(_forced.get(), "encode_select", device, torch.float32, rule, "relu", False)
        lines.append(choice._replace(op=f"encode_select {rule}"))
    lines += [
        _choose(_forced.get(), op, device, torch.float32, "row_count", "relu", False)
        for op in _CPU_REASONS
        if op != "encode_select"
    ]
    why = why_not_bf16(device)
    return [
        *lines,
        Choice("encoder product", "fp32" if why else "bf16", why or "this device multiplies bf16 in hardware"),
    ]


@torch.compiler.assume_constant_result
def why_not_bf16(device: str) -> str | None:
    """Why the encoder product cannot run in bf16 on a device type; None if it can."""
    if device == "cpu":
        if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
            return None
        return "this CPU has neither AMX nor AVX512-BF16, where bf16 products are far slower than fp32"
    if device == "cuda":
        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "this GPU has no bf16 units"
    return f"bf16 products are not tested on {device}"


def _resolve_compute(compute: str | None, x: Tensor) -> str:
    if compute is None:
        return "fp32" if x.dtype == torch.float64 or why_not_bf16(x.device.type) else "bf16"
    if compute not in COMPUTE:
        raise ValueError(f"compute={compute!r}: it is one of {', '.join(COMPUTE)}")
    if compute == "bf16" and (why := why_not_bf16(x.device.type)):
        raise ValueError(f'compute="bf16" cannot run: {why}; use compute="fp32"')
    if compute == "tf32" and x.device.type != "cuda":
        raise ValueError(
            f'compute="tf32" cannot run on {x.device.type}: it is a mode of NVIDIA GPUs; use compute="fp32"'
        )
    if compute != "fp32" and x.dtype == torch.float64:
        raise ValueError(f'compute="{compute}" with float64 tensors: float64 is computed as it is, leave compute out')
    return compute


def _alike(*tensors: Tensor | None) -> list[Any]:
    """The tensors in float64 if one of them is, else in float32."""
    dtype = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t if t is None else t.to(dtype) for t in tensors]


def _no_autocast(like: Tensor):
    """`compute` alone decides about precision: autocast would reach into the products of an op."""
    return torch.autocast(like.device.type, enabled=False)


def _check_matrix(name: str, t: Tensor, *shape: int | None) -> None:
    if t.ndim != len(shape) or any(want is not None and have != want for have, want in zip(t.shape, shape)):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected ({wanted})")


# The custom ops take tensors and numbers only, so that torch can trace them; the public doors below build and unpack `Codes`.


@torch.library.custom_op("saekit_kernels::encode_select", mutates_args=())
def _encode_op(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_in: Tensor | None, rule: str, count: int, limit: Tensor | None, margin: float,
    hint: Tensor | None, key: str, scale: Tensor | None, compute: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _encode(x, W_enc, b_enc, b_in, _unflatten(rule, count, limit, margin, hint), key, scale, compute, None)


def _unflatten(rule: str, count: int, limit: Tensor | None, margin: float, hint: Tensor | None) -> Rule:
    if rule == "row_count":
        return RowCount(count)
    if rule == "batch_count":
        return BatchCount(count, hint)
    assert limit is not None
    if rule == "column_count":
        return ColumnCount(limit, hint)
    return RowMass(limit) if rule == "row_mass" else Threshold(limit, margin)


def _flatten(rule: Rule, like: Tensor) -> tuple[str, int, Tensor | None, float, Tensor | None]:
    name = _RULES[type(rule)]
    if isinstance(rule, RowCount):
        return name, rule.k, None, 0.0, None
    if isinstance(rule, BatchCount):
        hint = rule.hint
        return (
            name,
            rule.m,
            None,
            0.0,
            None if hint is None else torch.as_tensor(hint, dtype=torch.float32, device=like.device),
        )
    if isinstance(rule, ColumnCount):
        return name, 0, rule.m_F, 0.0, rule.hint_F
    if isinstance(rule, RowMass):
        return name, 0, rule.t_B, 0.0, None
    return (
        name,
        0,
        torch.as_tensor(rule.theta, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device),
        rule.margin,
        None,
    )


def _encode(x: Tensor, W_enc, b_enc, b_in, rule: Rule, key, scale, compute, workspace):
    x, W_enc, b_enc, b_in, scale = _alike(x, W_enc, b_enc, b_in, scale)
    path = _path("encode_select", x, _RULES[type(rule)], key, scale is not None)
    extra = {} if path is reference else {"compute": compute, "workspace": workspace}
    with torch.no_grad(), _no_autocast(x):
        codes, threshold, hint = path.encode_select(x, W_enc, b_enc, b_in, rule=rule, key=key, scale_F=scale, **extra)
    none = x.new_empty(0)
    row_ptr = torch.empty(0, dtype=torch.int32, device=x.device) if codes.row_ptr is None else codes.row_ptr
    threshold, hint = none if threshold is None else threshold, none.clone() if hint is None else hint
    return codes.values, codes.indices, row_ptr, threshold, hint, _counters(codes, rule)


def _counters(codes: Codes, rule: Rule) -> Tensor:
    values, device = codes.values, codes.device
    nothing = torch.zeros((), dtype=torch.int64, device=device)
    short, nan_rows = nothing, nothing
    if isinstance(rule, RowCount):
        short = (values == 0).any(1).sum()
        nan_rows = values.amax(1).isnan().sum()
    else:
        nan = torch.zeros(codes.batch + 1, dtype=torch.bool, device=device)
        nan.index_fill_(0, torch.where(values.isnan(), codes.slot_rows(), codes.batch), True)
        nan_rows = nan[:-1].sum()
    unspent = nothing
    if isinstance(rule, BatchCount):
        unspent = nothing + (rule.m - values.numel())
    elif isinstance(rule, ColumnCount):
        unspent = rule.m_F.to(device).clamp(0, codes.batch).sum().long() - values.numel()
    return torch.stack([short, unspent, nan_rows])


@_encode_op.register_fake
def _(x, W_enc, b_enc, b_in, rule, count, limit, margin, hint, key, scale, compute):
    dtype = torch.float64 if torch.float64 in (x.dtype, W_enc.dtype, b_enc.dtype) else torch.float32
    rowwise = rule == "row_count"
    shape = (x.shape[0], count) if rowwise else (torch.library.get_ctx().new_dynamic_size(),)
    values = x.new_empty(shape, dtype=dtype)
    bar = {"batch_count": (), "column_count": (W_enc.shape[0],)}.get(rule, (0,))
    return (
        values,
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(0 if rowwise else x.shape[0] + 1, dtype=torch.int32),
        x.new_empty(bar, dtype=dtype),
        x.new_empty(bar, dtype=dtype),
        x.new_empty(len(COUNTERS), dtype=torch.int64),
    )


def _encode_context(ctx, inputs, output):
    x, W_enc, b_enc, b_in, *_ = inputs
    values, indices, row_ptr, threshold, hint, counters = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(indices, row_ptr, threshold, hint, counters)
    ctx.save_for_backward(x, W_enc, b_in, values, indices, row_ptr)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, W_enc, b_enc, b_in)]


def _encode_backward(ctx, g_values, *_):
    """dW_enc[f] = Σ g (x − b_in), db_enc[f] = Σ g, db_in = −db_enc @ W_enc, dx_t = Σ g W_enc[f]; nothing at empty slots."""
    if g_values is None:
        return (None,) * 12
    x, W_enc, b_in, values, indices, row_ptr = ctx.saved_tensors
    dx = dW_enc = db_enc = db_in = None
    needs_x, needs_W, needs_b, needs_in = ctx.needs_input_grad[:4]
    x, W_enc, b_in = _alike(x, W_enc, b_in)
    row_ptr = row_ptr if row_ptr.numel() else None
    g = torch.where(values != 0, g_values, 0).to(x.dtype)
    if needs_W or needs_b or needs_in:
        csc = _csc_op(g, indices, row_ptr, W_enc.shape[0])
        dW_enc, db_enc = _segment_op(*csc, g, x if b_in is None else x - b_in)
        if needs_in:
            db_in = -(db_enc @ W_enc)
    if needs_x:
        dx = _decode_op(g, indices, row_ptr, W_enc, W_enc.new_zeros(W_enc.shape[1]))
    grads = (dx, dW_enc if needs_W else None, db_enc if needs_b else None, db_in)
    return (*(None if t is None else t.to(d) for t, d in zip(grads, ctx.dtypes)), *(None,) * 8)


_encode_op.register_autograd(_encode_backward, setup_context=_encode_context)


def encode_select(
    x_BD: Tensor,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    b_in_D: Tensor | None = None,
    *,
    rule: Rule,
    key: str = "relu",
    scale_F: Tensor | None = None,
    compute: str | None = None,
    csc: bool = False,
    workspace: Workspace | None = None,
) -> EncodeOut:
    """The kept entries of pre = (x − b_in) W_encᵀ + b_enc.

    Selection ranks a key: "relu" max(pre, 0), "abs" |pre|, "raw" pre itself (`RowCount` alone), times `scale_F` ≥ 0 where
    given. Values are the pre-activations. A key of 0 is never kept, so a slot is empty exactly when its value is 0; NaN
    ranks above +inf. Equal keys: reference and portable keep the first feature (row_count: as `torch.topk` does).

    compute: "fp32", "bf16" or "tf32" for the encoder product; None is bf16 where the device has units for it, else fp32.
    Pass "fp32" whenever codes are measured or shown. workspace: keeps the pre-activation buffer between calls; only where
    no graph is recorded. Gradients reach W_enc, b_enc, b_in and x through the kept values, nothing flows through the choice.

    Equivalent to `reference.encode_select`. Raises ValueError for shapes, rules and `compute` that cannot be.
    """
    _check_matrix("x", x_BD, None, None)
    _check_matrix("W_enc", W_enc_FD, None, x_BD.shape[1])
    n_features = W_enc_FD.shape[0]
    _check_matrix("b_enc", b_enc_F, n_features)
    if b_in_D is not None:
        _check_matrix("b_in", b_in_D, x_BD.shape[1])
    if scale_F is not None:
        _check_matrix("scale_F", scale_F, n_features)
    if key not in KEYS:
        raise ValueError(f"key={key!r}: it is one of {', '.join(KEYS)}")
    if key == "raw" and (not isinstance(rule, RowCount) or scale_F is not None):
        raise ValueError(f'key="raw" goes with RowCount and no scale_F, got {type(rule).__name__}')
    if isinstance(rule, RowCount) and rule.k > n_features:
        raise ValueError(f"RowCount(k={rule.k}) of {n_features} features: k may be at most {n_features}")
    if isinstance(rule, ColumnCount):
        _check_matrix("ColumnCount.m_F", rule.m_F, n_features)
        if rule.hint_F is not None:
            _check_matrix("ColumnCount.hint_F", rule.hint_F, n_features)
    if isinstance(rule, RowMass):
        _check_matrix("RowMass.t_B", rule.t_B, x_BD.shape[0])
    if isinstance(rule, Threshold) and isinstance(rule.theta, Tensor) and rule.theta.ndim:
        _check_matrix("Threshold.theta", rule.theta, n_features)
    compute = _resolve_compute(compute, x_BD)

    if workspace is None:
        out = _encode_op(x_BD, W_enc_FD, b_enc_F, b_in_D, *_flatten(rule, x_BD), key, scale_F, compute)
    else:
        _check_no_graph("workspace", x_BD, W_enc_FD, b_enc_F, b_in_D)
        out = _encode(x_BD, W_enc_FD, b_enc_F, b_in_D, rule, key, scale_F, compute, workspace)
    values, indices, row_ptr, threshold, hint, counters = out
    codes = Codes(values, indices, None if isinstance(rule, RowCount) else row_ptr, n_features)
    barred = isinstance(rule, BatchCount | ColumnCount)
    return EncodeOut(
        codes, build_csc(codes) if csc else None, threshold if barred else None, hint if barred else None, counters
    )


def _check_no_graph(option: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{option} was given where a graph is recorded; leave it out, or call inside torch.no_grad()")


@torch.library.custom_op("saekit_kernels::decode", mutates_args=())
def _decode_op(values: Tensor, indices: Tensor, row_ptr: Tensor | None, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    values, W_dec, b_dec = (t.detach() for t in _alike(values, W_dec, b_dec))
    with _no_autocast(values):
        return _path("decode", values).decode(Codes(values, indices, row_ptr, W_dec.shape[0]), W_dec, b_dec)


@_decode_op.register_fake
def _(values, indices, row_ptr, W_dec, b_dec):
    batch = values.shape[0] if row_ptr is None else row_ptr.shape[0] - 1
    dtype = torch.float64 if torch.float64 in (values.dtype, W_dec.dtype, b_dec.dtype) else torch.float32
    return values.new_empty(batch, W_dec.shape[1], dtype=dtype)


def _decode_context(ctx, inputs, output):
    values, indices, row_ptr, W_dec, b_dec = inputs
    ctx.save_for_backward(values, indices, row_ptr, W_dec)
    ctx.dtypes = values.dtype, W_dec.dtype, b_dec.dtype


def _decode_backward(ctx, dy):
    """dvalues = dy · W_dec[feature], dW_dec[f] = Σ value · dy, db_dec = Σ dy."""
    values, indices, row_ptr, W_dec = ctx.saved_tensors
    needs_values, _, _, needs_W, needs_b = ctx.needs_input_grad
    dy = dy.contiguous()
    dvalues = _dots_op(values, indices, row_ptr, dy, W_dec) if needs_values else None
    dW_dec = _segment_op(*_csc_op(values, indices, row_ptr, W_dec.shape[0]), values, dy)[0] if needs_W else None
    grads = (dvalues, dW_dec, dy.sum(0) if needs_b else None)
    dvalues, dW_dec, db_dec = (None if t is None else t.to(d) for t, d in zip(grads, ctx.dtypes))
    return dvalues, None, None, dW_dec, db_dec


_decode_op.register_autograd(_decode_backward, setup_context=_decode_context)


def decode(codes: Codes, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """y_t = b_dec + Σ value · W_dec[feature], (B, D) float32. Differentiable in the values, W_dec and b_dec.

    Equivalent to `reference.decode`. Raises ValueError when the shapes do not fit.
    """
    _check_matrix("W_dec", W_dec_FD, codes.n_features, None)
    _check_matrix("b_dec", b_dec_D, W_dec_FD.shape[1])
    return _decode_op(codes.values, codes.indices, codes.row_ptr, W_dec_FD, b_dec_D)


@torch.library.custom_op("saekit_kernels::decode_residual_value_grad", mutates_args=())
def _residual_op(
    values: Tensor, indices: Tensor, row_ptr: Tensor | None, W_dec: Tensor, b_dec: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    values, W_dec, b_dec, target = (t.detach() for t in _alike(values, W_dec, b_dec, target))
    codes = Codes(values, indices, row_ptr, W_dec.shape[0])
    with _no_autocast(values):
        return _path("decode_residual_value_grad", values).decode_residual_value_grad(codes, W_dec, b_dec, target)


@_residual_op.register_fake
def _(values, indices, row_ptr, W_dec, b_dec, target):
    wide = torch.float64 in (values.dtype, W_dec.dtype, b_dec.dtype, target.dtype)
    dtype = torch.float64 if wide else torch.float32
    return (
        target.new_empty(target.shape[0], dtype=dtype),
        target.new_empty(target.shape, dtype=dtype),
        values.new_empty(values.shape, dtype=dtype),
    )


def _residual_context(ctx, inputs, output):
    values, indices, row_ptr, W_dec, b_dec, target = inputs
    _, residual, dv = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(residual, dv)
    ctx.save_for_backward(values, indices, row_ptr, residual, dv)
    ctx.n_features = W_dec.shape[0]
    ctx.dtypes = values.dtype, W_dec.dtype, b_dec.dtype, target.dtype


def _residual_backward(ctx, s, *_):
    """With s = dL/dsq: dvalues = −2 s dv, dW_dec[f] = −Σ 2 s value r, db_dec = −Σ 2 s r, dtarget = 2 s r."""
    if s is None:
        return (None,) * 6
    values, indices, row_ptr, residual, dv = ctx.saved_tensors
    needs_values, _, _, needs_W, needs_b, needs_target = ctx.needs_input_grad
    dy = residual * (-2 * s)[:, None]
    dvalues = dW_dec = db_dec = dtarget = None
    if needs_values:
        if row_ptr is None:
            dvalues = dv * (-2 * s)[:, None]
        else:
            dvalues = dv * (-2 * s).repeat_interleave(row_ptr.diff().long(), output_size=dv.shape[0])
    if needs_W:
        dW_dec = _segment_op(*_csc_op(values, indices, row_ptr, ctx.n_features), values, dy)[0]
    if needs_b:
        db_dec = dy.sum(0)
    if needs_target:
        dtarget = -dy
    grads = (dvalues, dW_dec, db_dec, dtarget)
    dvalues, dW_dec, db_dec, dtarget = (None if t is None else t.to(d) for t, d in zip(grads, ctx.dtypes))
    return dvalues, None, None, dW_dec, db_dec, dtarget


_residual_op.register_autograd(_residual_backward, setup_context=_residual_context)


def decode_residual_value_grad(codes: Codes, W_dec_FD: Tensor, b_dec_D: Tensor, target_BD: Tensor) -> DecodeOut:
    """Squared error of each row, the residual r = target − decode(codes), and dv = r · W_dec[feature] at every slot.

    Differentiable through `sq_B` in the values, W_dec, b_dec and the target; a weight per row covers means, FVU and masks.
    Equivalent to `reference.decode_residual_value_grad`. Raises ValueError when the shapes do not fit.
    """
    _check_matrix("W_dec", W_dec_FD, codes.n_features, None)
    _check_matrix("b_dec", b_dec_D, W_dec_FD.shape[1])
    _check_matrix("target", target_BD, codes.batch, W_dec_FD.shape[1])
    return DecodeOut(*_residual_op(codes.values, codes.indices, codes.row_ptr, W_dec_FD, b_dec_D, target_BD))


@torch.library.custom_op("saekit_kernels::pair_dots", mutates_args=())
def _dots_op(values: Tensor, indices: Tensor, row_ptr: Tensor | None, x: Tensor, W: Tensor) -> Tensor:
    values, x, W = (t.detach() for t in _alike(values, x, W))
    with _no_autocast(values):
        return _path("pair_dots", values).pair_dots(Codes(values, indices, row_ptr, W.shape[0]), x, W)


@_dots_op.register_fake
def _(values, indices, row_ptr, x, W):
    wide = torch.float64 in (values.dtype, x.dtype, W.dtype)
    return values.new_empty(values.shape, dtype=torch.float64 if wide else torch.float32)


def _dots_context(ctx, inputs, output):
    values, indices, row_ptr, x, W = inputs
    ctx.save_for_backward(values, indices, row_ptr, x, W)


def _dots_backward(ctx, g):
    """dx_t = Σ g W[f], dW[f] = Σ g x; the values only say which slots are empty."""
    values, indices, row_ptr, x, W = ctx.saved_tensors
    g = torch.where(values != 0, g, 0)
    dx = dW = None
    if ctx.needs_input_grad[3]:
        dx = _decode_op(g, indices, row_ptr, W, W.new_zeros(W.shape[1])).to(x.dtype)
    if ctx.needs_input_grad[4]:
        dW = _segment_op(*_csc_op(g, indices, row_ptr, W.shape[0]), g, x)[0].to(W.dtype)
    return None, None, None, dx, dW


_dots_op.register_autograd(_dots_backward, setup_context=_dots_context)


def pair_dots(codes: Codes, x_BD: Tensor, W_FD: Tensor) -> Tensor:
    """x_t · W_f at every slot, shaped like the codes' values, 0 at empty ones. Differentiable in x and W.

    Equivalent to `reference.pair_dots`. Raises ValueError when the shapes do not fit.
    """
    _check_matrix("W", W_FD, codes.n_features, None)
    _check_matrix("x", x_BD, codes.batch, W_FD.shape[1])
    return _dots_op(codes.values, codes.indices, codes.row_ptr, x_BD, W_FD)


@torch.library.custom_op("saekit_kernels::build_csc", mutates_args=())
def _csc_op(values: Tensor, indices: Tensor, row_ptr: Tensor | None, n_features: int) -> tuple[Tensor, Tensor, Tensor]:
    return _path("build_csc", values).build_csc(Codes(values.detach(), indices, row_ptr, n_features))


@_csc_op.register_fake
def _(values, indices, row_ptr, n_features):
    def integers(n):
        return values.new_empty(n, dtype=torch.int32)

    return integers(n_features + 1), integers(values.numel()), integers(values.numel())


def build_csc(codes: Codes, n_features: int | None = None) -> Csc:
    """The firings of a batch sorted by feature, rows ascending within one. Not differentiable.

    Equivalent to `reference.build_csc`. Raises ValueError when `n_features` is not the codes' own.
    """
    if n_features not in (None, codes.n_features):
        raise ValueError(f"build_csc for {n_features} features of codes that have {codes.n_features}")
    return Csc(*_csc_op(codes.values, codes.indices, codes.row_ptr, codes.n_features))


@torch.library.custom_op("saekit_kernels::segment_sum", mutates_args=())
def _segment_op(ptr: Tensor, pair: Tensor, token: Tensor, coef: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    coef, rows = (t.detach() for t in _alike(coef, rows))
    with _no_autocast(rows):
        return _path("segment_sum", rows).segment_sum(Csc(ptr, pair, token), coef, rows.contiguous())


@_segment_op.register_fake
def _(ptr, pair, token, coef, rows):
    dtype = torch.float64 if torch.float64 in (coef.dtype, rows.dtype) else torch.float32
    n_features = ptr.shape[0] - 1
    return rows.new_empty(n_features, rows.shape[1], dtype=dtype), rows.new_empty(n_features, dtype=dtype)


@torch.library.custom_op("saekit_kernels::weight_grads", mutates_args=())
def _weight_grads_op(
    ptr: Tensor, pair: Tensor, token: Tensor, coef_dec: Tensor, residual: Tensor, coef_enc: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _weight_grads(Csc(ptr, pair, token), coef_dec, residual, coef_enc, x, (None, None))


@_weight_grads_op.register_fake
def _(ptr, pair, token, coef_dec, residual, coef_enc, x):
    dtype = (
        torch.float64 if torch.float64 in (coef_dec.dtype, residual.dtype, coef_enc.dtype, x.dtype) else torch.float32
    )
    matrix = (ptr.shape[0] - 1, x.shape[1])
    return x.new_empty(matrix, dtype=dtype), x.new_empty(matrix, dtype=dtype), x.new_empty(matrix[0], dtype=dtype)


def _weight_grads(csc: Csc, coef_dec, residual, coef_enc, x, out) -> tuple[Tensor, Tensor, Tensor]:
    coef_dec, residual, coef_enc, x = (t.detach() for t in _alike(coef_dec, residual, coef_enc, x))
    with _no_autocast(x):
        path = _path("segment_sum", x)
        return path.weight_grads(csc, coef_dec, residual.contiguous(), coef_enc, x.contiguous(), out)


def segment_weight_grads(
    csc: Csc,
    coef_dec_N: Tensor,
    residual_BD: Tensor,
    coef_enc_N: Tensor,
    x_BD: Tensor,
    *,
    project_onto: Tensor | None = None,
    extra: ExtraRows | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> WeightGrads:
    """gW_dec[f] = Σ coef_dec · residual[token], gW_enc[f] = Σ coef_enc · x[token], gb_enc[f] = Σ coef_enc over f's firings.

    Coefficients are shaped like the codes' values (or flat, in slot order); for the squared error of
    `decode_residual_value_grad` with weights s they are −2 · s · value and −2 · s · dv, and x is x − b_in. `extra` is added;
    then, with `project_onto` = W_dec, each row of gW_dec loses its component along that (unit) row. `out` are the two (F, D)
    buffers to write. Rows of features that did not fire are 0. Not differentiable: this is a backward.

    Equivalent to `reference.weight_grads`. Raises ValueError when the shapes do not fit.
    """
    n_features, (batch, width) = len(csc.ptr) - 1, x_BD.shape
    _check_matrix("residual", residual_BD, batch, width)
    for name, coef in (("coef_dec", coef_dec_N), ("coef_enc", coef_enc_N)):
        if coef.numel() != len(csc.pair_N):
            raise ValueError(f"{name} has {coef.numel()} entries for {len(csc.pair_N)} slots")
    for buffer in out or ():
        _check_matrix("out", buffer, n_features, width)
    with torch.no_grad():
        if out is None:
            W_dec_FD, W_enc_FD, b_enc_F = _weight_grads_op(*csc, coef_dec_N, residual_BD, coef_enc_N, x_BD)
        else:
            W_dec_FD, W_enc_FD, b_enc_F = _weight_grads(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out)
        if extra is not None:
            for whole, rows in ((W_dec_FD, extra.W_dec_AD), (W_enc_FD, extra.W_enc_AD), (b_enc_F, extra.b_enc_A)):
                whole[extra.ids_A.long()] += rows
        if project_onto is not None:
            along_F = torch.linalg.vecdot(W_dec_FD, project_onto)
            W_dec_FD.addcmul_(along_F[:, None], project_onto, value=-1)
        row_sq_F = torch.linalg.vecdot(W_dec_FD, W_dec_FD) + torch.linalg.vecdot(W_enc_FD, W_enc_FD)
    return WeightGrads(W_dec_FD, W_enc_FD, b_enc_F, row_sq_F)


@torch.library.custom_op("saekit_kernels::row_adam_", mutates_args=("w", "m", "v"))
def _adam_op(
    w: Tensor, m: Tensor, v: Tensor, grad: Tensor, step: Tensor, lr: float, b1: float, b2: float, eps: float,
    unit_norm: bool, grad_scale: Tensor | None,
) -> None:  # fmt: skip
    _path("row_adam_", w).row_adam_(
        w, m, v, grad, step=step, lr=lr, b1=b1, b2=b2, eps=eps, unit_norm=unit_norm, grad_scale=grad_scale
    )


def row_adam_(
    w: Tensor,
    m: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    step: int | Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    unit_norm: bool,
    grad_scale: Tensor | float | None = None,
) -> None:
    """One step of Adam on every row of w (F, D), in place; `step` counts from 1. Rows without a gradient decay and move too.

    g ← grad · grad_scale;  g ← g − (g·w) w, if unit_norm;  m ← b1 m + (1−b1) g;  v ← b2 v + (1−b2) g²;
    w ← w − lr · (m / (1−b1ᵗ)) / (√(v / (1−b2ᵗ)) + eps);  w ← w / max(‖w‖, 1e-12), if unit_norm.

    Without unit_norm this is `torch.optim.Adam`. `grad` is only read. Raises ValueError unless all four have one shape (F, D)
    and w's dtype.
    """
    _check_matrix("w", w, None, None)
    for name, t in (("m", m), ("v", v), ("grad", grad)):
        _check_matrix(name, t, *w.shape)
        if t.dtype != w.dtype:
            raise ValueError(f"{name} is {t.dtype}, w is {w.dtype}")
    scale = None if grad_scale is None else torch.as_tensor(grad_scale, dtype=w.dtype, device=w.device)
    with torch.no_grad():
        _adam_op(w, m, v, grad, torch.as_tensor(step, dtype=torch.float32), lr, b1, b2, eps, unit_norm, scale)


@torch.library.custom_op(
    "saekit_kernels::segment_adam_", mutates_args=("W_dec", "W_enc", "m_dec", "v_dec", "m_enc", "v_enc")
)
def _segment_adam_op(
    ptr: Tensor, pair: Tensor, token: Tensor, coef_dec: Tensor, residual: Tensor, coef_enc: Tensor, x: Tensor,
    W_dec: Tensor, W_enc: Tensor, m_dec: Tensor, v_dec: Tensor, m_enc: Tensor, v_enc: Tensor,
    ids: Tensor | None, rows_dec: Tensor | None, rows_enc: Tensor | None,
    step: Tensor, lr: float, b1: float, b2: float, eps: float,
) -> Tensor:  # fmt: skip
    coef_dec, residual, coef_enc, x = (t.detach() for t in _alike(coef_dec, residual, coef_enc, x))
    extra = None if ids is None else (ids.long(), rows_dec, rows_enc)
    with _no_autocast(x):
        return _path("segment_adam_", W_dec).segment_adam_(
            Csc(ptr, pair, token), coef_dec, residual.contiguous(), coef_enc, x.contiguous(),
            W_dec, W_enc, m_dec, v_dec, m_enc, v_enc, extra=extra, step=step, lr=lr, b1=b1, b2=b2, eps=eps,
        )  # fmt: skip


@_segment_adam_op.register_fake
def _(ptr, pair, token, coef_dec, residual, coef_enc, x, W_dec, *_):
    return W_dec.new_empty(W_dec.shape[0])


def segment_adam_(
    csc: Csc,
    coef_dec_N: Tensor,
    residual_BD: Tensor,
    coef_enc_N: Tensor,
    x_BD: Tensor,
    W_dec_FD: Tensor,
    W_enc_FD: Tensor,
    dec: tuple[Tensor, Tensor],
    enc: tuple[Tensor, Tensor],
    *,
    step: int | Tensor,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    extra: ExtraRows | None = None,
) -> Tensor:
    """`segment_weight_grads` with projection, then `row_adam_` on both matrices, in place, and no gradient in memory.

    `dec` and `enc` are Adam's (m, v) of W_dec, whose rows end with norm 1, and of W_enc. Rows without a firing decay and move
    too. Returns (F): the squared norm of row f of both gradients together, the decoder's without its part along W_dec.
    For one device, without clipping, accumulation, or any other gradient on the two matrices: the gradient is never whole.

    Equivalent to `reference.segment_adam_`. Raises ValueError when the shapes do not fit.
    """
    n_features, (batch, width) = len(csc.ptr) - 1, x_BD.shape
    _check_matrix("residual", residual_BD, batch, width)
    for name, coef in (("coef_dec", coef_dec_N), ("coef_enc", coef_enc_N)):
        if coef.numel() != len(csc.pair_N):
            raise ValueError(f"{name} has {coef.numel()} entries for {len(csc.pair_N)} slots")
    for name, t in zip(("W_dec", "W_enc", "m", "v", "m", "v"), (W_dec_FD, W_enc_FD, *dec, *enc), strict=True):
        _check_matrix(name, t, n_features, width)
    more = (None, None, None) if extra is None else (extra.ids_A, extra.W_dec_AD, extra.W_enc_AD)
    with torch.no_grad():
        return _segment_adam_op(
            *csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec_FD, W_enc_FD, *dec, *enc, *more,
            torch.as_tensor(step, dtype=torch.float32), lr, b1, b2, eps,
        )  # fmt: skip


def feature_sums(csc: Csc, coef_N: Tensor) -> Tensor:
    """Σ coef over each feature's firings, in order, (F): the encoder bias's gradient. Coefficients are in slot order."""
    if coef_N.numel() != len(csc.pair_N):
        raise ValueError(f"coef has {coef_N.numel()} entries for {len(csc.pair_N)} slots")
    with torch.no_grad():
        return _path("segment_sum", coef_N).feature_sums(csc, coef_N)


@torch.library.custom_op("saekit_kernels::largest_columns", mutates_args=())
def _largest_op(pre: Tensor, k: int, key: str) -> Tensor:
    """k columns per row that hold a largest k of the keys, as `RowCount` takes them: int64 (rows, k)."""
    path = _path("encode_select", pre, "row_count", key)
    if path is reference:
        return reference.select(pre, RowCount(k), key).codes.indices.long()
    return cpu.top_columns(pre, k, key) if path is cpu else portable.top_columns(pre, k, key, None)


@_largest_op.register_fake
def _(pre, k, key):
    return pre.new_empty(pre.shape[0], k, dtype=torch.int64)


def aux_decode(
    x_BD: Tensor,
    b_in_D: Tensor | None,
    dead_ids_A: Tensor | None,
    W_enc_FD: Tensor,
    b_enc_F: Tensor,
    W_dec_FD: Tensor,
    *,
    k_aux: int,
    key: str = "relu",
    off_A: Tensor | None = None,
) -> Tensor:
    """AuxK's reconstruction by the k_aux largest dead features of each row, without b_dec: (B, D).

    pre = (x − b_in) W_enc[dead]ᵀ + b_enc[dead];  y = kept(pre) @ W_dec[dead], both dense products on A rows. `dead_ids_A`
    None: the matrices are the A rows already (the training step's compact copies). `off_A` (bool): members that have fired
    since the list was built, key 0. Differentiable in x, b_in, W_enc, b_enc and W_dec: the gradient reaches the encoder.
    Raises ValueError when the shapes do not fit or k_aux < 1.
    """
    if k_aux < 1:
        raise ValueError(f"k_aux={k_aux}: it must be at least 1")
    if key not in ("relu", "abs"):
        raise ValueError(f'key={key!r}: AuxK ranks by "relu" or "abs"')
    _check_matrix("x", x_BD, None, None)
    if dead_ids_A is not None:
        dead = dead_ids_A.long()
        W_enc_FD, b_enc_F, W_dec_FD = W_enc_FD[dead], b_enc_F[dead], W_dec_FD[dead]
    n_dead = W_enc_FD.shape[0]
    _check_matrix("W_enc", W_enc_FD, n_dead, x_BD.shape[1])
    _check_matrix("W_dec", W_dec_FD, n_dead, None)
    if off_A is not None:
        _check_matrix("off_A", off_A, n_dead)
    x_BD, b_in_D, W_enc_FD, b_enc_F, W_dec_FD = _alike(x_BD, b_in_D, W_enc_FD, b_enc_F, W_dec_FD)
    with _no_autocast(x_BD):
        pre_BA = torch.addmm(b_enc_F, x_BD if b_in_D is None else x_BD - b_in_D, W_enc_FD.T)
        ranked_BA = pre_BA.detach()
        if off_A is not None:
            ranked_BA = ranked_BA.masked_fill(off_A, 0)
        if k_aux >= n_dead:
            return torch.where(reference.keys(ranked_BA, key) != 0, pre_BA, 0) @ W_dec_FD
        column = _largest_op(ranked_BA, k_aux, key)
        live = reference.keys(ranked_BA.gather(1, column), key) != 0
        kept_BA = torch.zeros_like(pre_BA).scatter(1, column, torch.where(live, pre_BA.gather(1, column), 0))
        return kept_BA @ W_dec_FD
