"""Every op in plain torch, literally as its equation says: the definition of right, in any float dtype.

It materialises whatever the equation names and breaks ties by the rule (key descending, then row, then feature). The fast
paths have the same functions with the same arguments; tests compare them with these.

B tokens · D width · F features · K slots per row · N slots in the batch · A dead features
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saekit_kernels.codes import Codes
from saekit_kernels.rules import BatchCount, ColumnCount, RowCount, RowMass, Rule, Threshold


class Selected(NamedTuple):
    """What a path's `encode_select` returns."""

    codes: Codes
    threshold: Tensor | None = None
    """Smallest kept key: scalar for BatchCount, (F) for ColumnCount, 0 where nothing was kept; else None."""
    hint: Tensor | None = None
    """What to pass as the rule's hint next time; None where the rule takes none."""


class Csc(NamedTuple):
    """The firings of a batch by feature: slots pair_N[ptr[f]:ptr[f+1]] belong to feature f, rows ascending."""

    ptr: Tensor
    """(F + 1) int32; ptr[F] is the number of firings."""
    pair_N: Tensor
    """(N) int32: slot numbers; empty slots stand behind ptr[F]."""
    token_N: Tensor
    """(N) int32: row of each."""


class WeightGrads(NamedTuple):
    """What `segment_weight_grads` returns."""

    W_dec_FD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    row_sq_F: Tensor
    """Squared norm of row f of both matrices together, as stored (for clipping by the global norm)."""


def preactivations(x_BD, W_enc_FD, b_enc_F, b_in_D=None) -> Tensor:
    """(x − b_in) W_encᵀ + b_enc, (B, F)."""
    centred = x_BD if b_in_D is None else x_BD - b_in_D
    return centred @ W_enc_FD.T + b_enc_F


def keys(pre: Tensor, key: str, scale_F: Tensor | None = None) -> Tensor:
    """What selection ranks. relu: max(v, 0) · scale; abs: |v| · scale; raw: v. Subnormal keys count as 0."""
    if key == "raw":
        ranked = pre
    else:
        ranked = pre.abs() if key == "abs" else pre.clamp(min=0)
        if scale_F is not None:
            ranked = ranked * scale_F
    return torch.where(ranked.abs() < torch.finfo(ranked.dtype).tiny, 0, ranked)


def ranks(key_BF: Tensor) -> Tensor:
    """Integers in the order of the keys: NaN above +inf, and every key of 0 at the bottom, never to be selected."""
    key_BF = key_BF if key_BF.dtype in (torch.float32, torch.float64) else key_BF.float()
    integer = torch.int64 if key_BF.dtype == torch.float64 else torch.int32
    top, bottom = torch.iinfo(integer).max, torch.iinfo(integer).min
    bits = key_BF.contiguous().view(integer)
    # the bits of a non-negative float order like integers; those of a negative one the other way round
    order = torch.where(bits < 0, bits ^ top, bits)
    order = torch.where(key_BF == 0, bottom, order)
    return torch.where(key_BF.isnan(), top, order)


def encode_select(x_BD, W_enc_FD, b_enc_F, b_in_D=None, *, rule: Rule, key="relu", scale_F=None) -> Selected:
    """Pre-activations, keys, then the rule. `saekit_kernels.encode_select` without its gradients."""
    return select(preactivations(x_BD, W_enc_FD, b_enc_F, b_in_D), rule, key, scale_F)


def select(pre_BF: Tensor, rule: Rule, key: str = "relu", scale_F: Tensor | None = None) -> Selected:
    """Codes of the pre-activations by a rule; the value of a kept entry is its pre-activation."""
    if pre_BF.dtype not in (torch.float32, torch.float64):
        pre_BF = pre_BF.float()
    key_BF = keys(pre_BF, key, scale_F)
    rank_BF = ranks(key_BF)
    allowed_BF = rank_BF > torch.iinfo(rank_BF.dtype).min
    n_features = pre_BF.shape[1]

    if isinstance(rule, RowCount):
        first_BK = torch.sort(rank_BF, dim=1, descending=True, stable=True).indices[:, : rule.k]
        index_BK = first_BK.sort(dim=1).values
        value_BK = torch.where(allowed_BF.gather(1, index_BK), pre_BF.gather(1, index_BK), 0)
        return Selected(Codes.rowwise(value_BK, index_BK, n_features))

    if isinstance(rule, BatchCount):
        first = torch.sort(rank_BF.reshape(-1), descending=True, stable=True).indices[: rule.m]
        kept_BF = torch.zeros_like(allowed_BF).view(-1).index_fill_(0, first, True).view_as(allowed_BF) & allowed_BF
        threshold = _smallest(key_BF, kept_BF).amin() if kept_BF.any() else key_BF.new_zeros(())
        return Selected(_flat(pre_BF, kept_BF), threshold, batch_hint(threshold))

    if isinstance(rule, ColumnCount):
        order = torch.sort(rank_BF, dim=0, descending=True, stable=True).indices
        place_BF = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order))[:, None].to(order).expand_as(order)
        )
        kept_BF = (place_BF < rule.m_F.to(place_BF)) & allowed_BF
        smallest_F = _smallest(key_BF, kept_BF).amin(0)
        threshold_F = torch.where(kept_BF.any(0), smallest_F, 0)
        return Selected(_flat(pre_BF, kept_BF), threshold_F, torch.zeros_like(threshold_F))

    if isinstance(rule, RowMass):
        order_BF = torch.sort(rank_BF, dim=1, descending=True, stable=True).indices
        sorted_BF = key_BF.gather(1, order_BF)
        norm_BF = sorted_BF.double().square().cumsum(1).sqrt()
        distance_BF = (norm_BF - rule.t_B.to(norm_BF)[:, None]).abs().masked_fill(sorted_BF == 0, torch.inf)
        column_F = torch.arange(n_features, device=pre_BF.device)
        nearest_B1 = torch.where(distance_BF == distance_BF.amin(1, keepdim=True), column_F, n_features).amin(
            1, keepdim=True
        )
        # a row that never reaches t keeps every positive key
        nearest_B1 = torch.where(norm_BF[:, -1:] < rule.t_B.to(norm_BF)[:, None], n_features, nearest_B1)
        # a NaN key stands first and poisons every distance of its row: keep that one, so that it is seen
        nearest_B1 = torch.where(distance_BF.isnan().any(1, keepdim=True), 0, nearest_B1)
        kept_BF = torch.zeros_like(allowed_BF).scatter_(1, order_BF, column_F <= nearest_B1) & allowed_BF
        return Selected(_flat(pre_BF, kept_BF))

    assert isinstance(rule, Threshold)
    bar = torch.as_tensor(rule.theta, dtype=key_BF.dtype, device=key_BF.device) - rule.margin
    kept_BF = ((key_BF > bar.clamp(min=0)) | key_BF.isnan()) & allowed_BF
    return Selected(_flat(pre_BF, kept_BF))


def batch_hint(threshold: Tensor) -> Tensor:
    """Where the next batch's filter starts: 5 % below the last threshold (simulated: 1.10 × the pairs asked for survive)."""
    return threshold * 0.95


def _flat(pre_BF: Tensor, kept_BF: Tensor) -> Codes:
    row_ptr = torch.zeros(len(pre_BF) + 1, dtype=torch.int32, device=pre_BF.device)
    row_ptr[1:] = kept_BF.sum(1).cumsum(0)
    return Codes.flat(row_ptr, kept_BF.nonzero()[:, 1], pre_BF[kept_BF], pre_BF.shape[1])


def _smallest(key_BF: Tensor, kept_BF: Tensor) -> Tensor:
    return torch.where(kept_BF, key_BF, torch.inf)


def decode(codes: Codes, W_dec_FD: Tensor, b_dec_D: Tensor) -> Tensor:
    """y = codes @ W_dec + b_dec."""
    return codes.dense() @ W_dec_FD + b_dec_D


def decode_residual_value_grad(codes: Codes, W_dec_FD, b_dec_D, target_BD) -> tuple[Tensor, Tensor, Tensor]:
    """r = target − y; returns Σ_d r², r, and r · W_dec[feature] at every slot (0 at empty ones)."""
    residual_BD = target_BD - decode(codes, W_dec_FD, b_dec_D)
    return residual_BD.square().sum(1), residual_BD, pair_dots(codes, residual_BD, W_dec_FD)


def pair_dots(codes: Codes, x_BD: Tensor, W_FD: Tensor) -> Tensor:
    """x_t · W_f at every slot, shaped like the codes' values; 0 at empty ones."""
    dots = (x_BD @ W_FD.T)[codes.slot_rows(), codes.indices.reshape(-1).long()].view_as(codes.values)
    return torch.where(codes.values != 0, dots, 0)


def build_csc(codes: Codes) -> Csc:
    """Stable argsort of (value ≠ 0 ? feature : F)."""
    feature_N = torch.where(codes.values != 0, codes.indices, codes.n_features).reshape(-1)
    pair_N = torch.argsort(feature_N, stable=True)
    ptr = torch.searchsorted(
        feature_N[pair_N].contiguous(), torch.arange(codes.n_features + 1, device=codes.device).int()
    )
    return Csc(ptr.int(), pair_N.int(), codes.slot_rows()[pair_N].int())


def segment_sum(csc: Csc, coef_N: Tensor, rows_BD: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Σ coef · rows[token] and Σ coef over each feature's firings: (F, D) and (F)."""
    n_features = len(csc.ptr) - 1
    live = csc.pair_N[: csc.ptr[-1]].long()
    token = csc.token_N[: csc.ptr[-1]].long()
    feature = torch.repeat_interleave(torch.arange(n_features, device=live.device), csc.ptr.diff().long())
    coef = coef_N.reshape(-1)[live]
    sums_FD = rows_BD.new_zeros(n_features, rows_BD.shape[1]).index_add_(0, feature, coef[:, None] * rows_BD[token])
    sums_FD = sums_FD if out is None else out.copy_(sums_FD)
    return sums_FD, coef.new_zeros(n_features).index_add_(0, feature, coef)


def weight_grads(
    csc: Csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, out=(None, None)
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ coef_dec · residual[token], Σ coef_enc · x[token] and Σ coef_enc over each feature's firings."""
    W_dec_FD, _ = segment_sum(csc, coef_dec_N, residual_BD, out[0])
    return (W_dec_FD, *segment_sum(csc, coef_enc_N, x_BD, out[1]))


def feature_sums(csc: Csc, coef_N: Tensor) -> Tensor:
    """Σ coef over each feature's firings."""
    return segment_sum(csc, coef_N, coef_N.new_zeros(int(csc.token_N.max()) + 1 if len(csc.token_N) else 1, 1))[1]


def row_adam_(w, m, v, grad, *, step, lr, b1, b2, eps, unit_norm, grad_scale=None) -> None:
    """One step of Adam on the rows of w, in place. The equations stand in `saekit_kernels.row_adam_`."""
    step = float(step)
    grad = grad if grad_scale is None else grad * grad_scale
    if unit_norm:
        grad = grad - (grad * w).sum(1, keepdim=True) * w
    m.mul_(b1).add_(grad * (1 - b1))
    v.mul_(b2).add_(grad.square() * (1 - b2))
    w.sub_(lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps))
    if unit_norm:
        w.div_(w.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12))


def segment_adam_(
    csc, coef_dec_N, residual_BD, coef_enc_N, x_BD, W_dec, W_enc, m_dec, v_dec, m_enc, v_enc, *, extra=None, **adam
) -> Tensor:
    """Both weight gradients, `extra` = (ids, rows of W_dec, rows of W_enc) added, and Adam on both matrices, in place.

    Returns the squared norm of row f of both gradients together, the decoder's without its part along W_dec.
    """
    g_dec, _ = segment_sum(csc, coef_dec_N, residual_BD)
    g_enc, _ = segment_sum(csc, coef_enc_N, x_BD)
    if extra is not None:
        ids, rows_dec, rows_enc = extra
        g_dec[ids] += rows_dec
        g_enc[ids] += rows_enc
    g_dec -= (g_dec * W_dec).sum(1, keepdim=True) * W_dec
    row_adam_(W_dec, m_dec, v_dec, g_dec, unit_norm=True, **adam)
    row_adam_(W_enc, m_enc, v_enc, g_enc, unit_norm=False, **adam)
    return g_dec.square().sum(1) + g_enc.square().sum(1)
