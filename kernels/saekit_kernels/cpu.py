"""The fast path for x86 CPUs: library calls chosen and blocked for the caches, in torch alone.

Times in this file: AMD EPYC (Zen 3, AVX2), torch 2.13 with MKL, one thread, milliseconds of CPU time on a busy machine;
(B, D, F, K) = (4096, 192, 3072, 32) unless said otherwise. They order the alternatives and are no benchmark.

B tokens · D width · F features · K slots per row · G groups of columns
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from saekit_kernels import portable
from saekit_kernels.codes import Codes
from saekit_kernels.portable import build_csc, decode, feature_sums
from saekit_kernels.reference import Csc, Selected
from saekit_kernels.rules import RowCount, Rule

__all__ = [
    "build_csc",
    "decode",
    "decode_residual_value_grad",
    "encode_select",
    "feature_sums",
    "pair_dots",
    "row_adam_",
    "segment_adam_",
    "segment_sum",
    "weight_grads",
]

# private in torch: where it is missing, row_adam_ runs on the portable path
FUSED_ADAM = getattr(torch, "_fused_adam_", None)
BLOCK_BYTES = 4 << 20
GROUP = 8
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}

with warnings.catch_warnings():
    # torch says once per process that CSR tensors are in beta; ours are checked by test
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def encode_select(
    x_BD, W_enc_FD, b_enc_F, b_in_D=None, *, rule: Rule, key="relu", scale_F=None, compute="fp32", workspace=None
) -> Selected:
    """Equivalent to `reference.encode_select` for `RowCount` with key "relu" or "abs" and no scale."""
    assert isinstance(rule, RowCount) and key in ("relu", "abs") and scale_F is None
    encoder = portable.encoder_of(x_BD, W_enc_FD, b_enc_F, b_in_D, compute, workspace)
    return portable.row_count(encoder, rule.k, lambda pre: top_columns(pre, rule.k, key), key, None)


def top_columns(pre: Tensor, k: int, key: str) -> Tensor:
    """k columns per row that hold a largest k, in any order: int64 (rows, k). Exact, by group maxima.

    1. Split the columns into groups of 8, strided, so that the maxima are one vector operation; again while it pays.
    2. Take the k groups with the largest maxima: fewer than k groups have a maximum above the k-th largest of these, so the
       members of the chosen groups hold a largest k.
    3. Those 8k members (and the up to 7 columns left over) are the candidates of the level below.

    AMX machine, two threads, (1024, 24576), k = 32, ms by key: bf16 11 and 17 (abs), fp32 11 and 21, `torch.topk` on whole rows
    of bf16 21. Groups of 4: 12, 28, 14, 54; of 16: 15, 19, 14, 20. Zen 3, fp32: groups of 4 a tenth faster than these.
    """
    levels, top = [], pre
    while top.shape[1] > 2 * GROUP * k and top.shape[1] // GROUP >= k:
        stride = top.shape[1] // GROUP
        groups = top[:, : GROUP * stride].unflatten(1, (GROUP, stride))
        levels.append((top, stride))
        if key == "abs" and top is pre:
            top = torch.maximum(groups.amax(1), groups.amin(1).neg_())
        else:
            top = groups.amax(1)
    column = _largest(top, k, key)
    for level, stride in reversed(levels):
        offset = torch.arange(0, GROUP * stride, stride, device=level.device)
        candidate = (column[:, None, :] + offset[:, None]).flatten(1)
        if level.shape[1] > GROUP * stride:
            rest = torch.arange(GROUP * stride, level.shape[1], device=level.device)
            candidate = torch.cat([candidate, rest.expand(len(level), -1)], dim=1)
        column = candidate.gather(1, _largest(level.gather(1, candidate), k, key))
    # maxima carry a NaN upwards, so the top level and the columns left over show every one
    seen = [top, *(level[:, GROUP * stride :] for level, stride in levels if level.shape[1] > GROUP * stride)]
    if any(bool(part.amax().isnan()) for part in seen if part.numel()):
        bad = torch.stack([part.amax(1).isnan() for part in seen]).any(0)
        column[bad] = portable.top_columns(pre[bad], k, key, None)
    return column


def _largest(value: Tensor, k: int, key: str) -> Tensor:
    """Places of the k largest keys, compared as integers: `topk` takes 4.5 for 128 columns instead of 6.8 on floats.

    Negative values come last in any order, which "relu" does not mind; a NaN of negative sign is found by the caller.
    """
    value = value.abs() if key == "abs" else value.contiguous()
    return value.view(INTEGER[value.dtype]).topk(k, dim=1, sorted=False).indices


def as_csr(codes: Codes, values: Tensor) -> Tensor:
    """The (B, F) matrix of the codes' slots holding `values`, as torch's CSR."""
    row_ptr = codes.row_ptr
    if row_ptr is None:
        slots = codes.values.shape[1]
        row_ptr = torch.arange(0, codes.batch * slots + 1, slots, dtype=torch.int32)
    return torch.sparse_csr_tensor(
        row_ptr, codes.indices.reshape(-1), values.reshape(-1), codes.shape, check_invariants=False
    )


def pair_dots(codes: Codes, x_BD: Tensor, W_FD: Tensor) -> Tensor:
    """Equivalent to `reference.pair_dots`: the sampled dense product, 3.0; `embedding_bag`'s gradient 5.7, gather + bmm 112."""
    if codes.values.numel() == 0:
        return torch.zeros_like(codes.values)
    dots = torch.sparse.sampled_addmm(as_csr(codes, torch.zeros_like(codes.values)), x_BD, W_FD.T, beta=0.0).values()
    return torch.where(codes.values != 0, dots.view_as(codes.values), 0)


def decode_residual_value_grad(codes: Codes, W_dec_FD, b_dec_D, target_BD) -> tuple[Tensor, Tensor, Tensor]:
    """Equivalent to `reference.decode_residual_value_grad`."""
    return portable.decode_residual_value_grad(codes, W_dec_FD, b_dec_D, target_BD, dots=pair_dots)


def blocks(n_features: int, width: int) -> list[slice]:
    """Features in blocks whose rows of a gradient stay in the cache.

    Sums, projection, Adam and norm of both matrices at (2048, 768, 24576, 32), two threads, ms by bytes of a block: Zen 3 with
    32 MB of L3 0.8 MB 58, 1.5 MB 47, 3 MB 45, 6 MB 55, whole gradients 205; Xeon with
    480 MB (AMX) 1.5 MB 84, 3 MB 74, 6 MB 71, 12 MB 83.
    """
    rows = max(16, BLOCK_BYTES // (4 * max(1, width)))
    return [slice(lo, min(lo + rows, n_features)) for lo in range(0, n_features, rows)]


def cuts(ptr: Tensor, parts: list[slice]) -> Iterator[tuple[slice, Tensor]]:
    """(firings of a block, their ptr counted from its first), block by block."""
    ends = ptr[[part.start for part in parts] + [len(ptr) - 1]].tolist()
    for part, (first, last) in zip(parts, pairwise(ends), strict=True):
        yield slice(first, last), ptr[part.start : part.stop + 1] - first


def segment_sum(csc: Csc, coef_N: Tensor, rows_BD: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Equivalent to `reference.segment_sum`; the rows of a feature are added in order.

    (2048, 768, 24576, 32), a 75 MB result: in blocks 9.4, at once 36.8 for the page faults of a fresh matrix.
    """
    token, coef = portable.firings(csc, coef_N)
    out = rows_BD.new_empty(len(csc.ptr) - 1, rows_BD.shape[1]) if out is None else out
    parts = blocks(*out.shape)
    for at, (mine, ptr) in zip(parts, cuts(csc.ptr, parts), strict=True):
        out[at] = portable.bags(ptr, token[mine], coef[mine], rows_BD)
    return out, portable.totals(csc, coef)


def weight_grads(
    csc: Csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out=(None, None)
) -> tuple[Tensor, Tensor, Tensor]:
    """Equivalent to `reference.weight_grads`."""
    return portable.weight_grads(csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out, segment_sum)


def row_adam_(w, m, v, grad, *, step, lr, b1, b2, eps, unit_norm, grad_scale=None) -> None:
    """Equivalent to `reference.row_adam_`, in blocks of rows that stay in the cache, with torch's fused Adam on views.

    (24576, 768): blocks of 512 rows 29, of 256 32, of 2048 41, the whole matrix 126; fused Adam alone 13.
    """
    step = torch.as_tensor(step, dtype=torch.float32)
    rows = max(16, BLOCK_BYTES // (8 * max(1, w.shape[1])))
    for lo in range(0, len(w), rows):
        at = slice(lo, lo + rows)
        g = grad[at] if grad_scale is None else grad[at] * grad_scale
        if unit_norm:
            g = torch.addcmul(g, torch.linalg.vecdot(g, w[at]).unsqueeze(1), w[at], value=-1)
        _adam(w[at], m[at], v[at], g, unit_norm, step, lr, b1, b2, eps)


def _adam(w: Tensor, m: Tensor, v: Tensor, g: Tensor, unit_norm: bool, step: Tensor, lr, b1, b2, eps) -> None:
    assert FUSED_ADAM is not None
    FUSED_ADAM(
        [w], [g], [m], [v], [], [step],
        lr=lr, beta1=b1, beta2=b2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    if unit_norm:
        w.div_(torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min_(1e-12))


def segment_adam_(
    csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc,
    *, extra=None, step, lr, b1, b2, eps,
) -> Tensor:  # fmt: skip
    """Equivalent to `reference.segment_adam_`: no gradient outlives its block."""
    step = torch.as_tensor(step, dtype=torch.float32)
    token, coef_dec, coef_enc = portable.firings(csc, coef_dec_N, coef_enc_N)
    row_sq_F, parts = torch.empty(len(W_dec)), blocks(*W_dec.shape)
    ids, *rows = extra or (token.new_empty(0), None, None)
    # in order, so that the extra rows of a block are neighbours
    ids, order = ids.sort()
    rows = [None if r is None else r[order] for r in rows]
    ends = torch.searchsorted(ids, torch.tensor([part.start for part in parts] + [len(W_dec)])).tolist()
    sides = (
        (coef_dec, residual_BD, W_dec, m_dec, v_dec, rows[0], True),
        (coef_enc, x_BD, W_enc, m_enc, v_enc, rows[1], False),
    )
    # `vecdot` and its kind give the product of a block fresh memory, and its page faults cost more than the product
    product = torch.empty_like(W_dec[parts[0]]) if parts else None
    for at, (mine, ptr), (first, last) in zip(parts, cuts(csc.ptr, parts), pairwise(ends), strict=True):
        sq = []
        for coef, source_BD, w, m, v, more, unit_norm in sides:
            g = portable.bags(ptr, token[mine], coef[mine], source_BD)
            if more is not None and last > first:
                g.index_add_(0, ids[first:last] - at.start, more[first:last])
            if unit_norm:
                along = torch.mul(g, w[at], out=product[: len(g)]).sum(1, keepdim=True)
                g.addcmul_(along, w[at], value=-1)
            sq.append(torch.linalg.vector_norm(g, dim=1).square_())
            _adam(w[at], m[at], v[at], g, unit_norm, step, lr, b1, b2, eps)
        row_sq_F[at] = sq[0] + sq[1]
    return row_sq_F
