"""What follows from an SAE's weights alone: norms and cosines, nearest rows, logit weights, the map.

D model width · F features · V vocabulary · k neighbours.
"""

import numpy as np
import torch
from saekit_kernels import RowCount, encode_select

from saekit.feature_index.format import ABSENT, LOGITS, NEIGHBOURS
from saekit.progress import Progress

NEIGHBOUR_FLOPS = 2e12
"""Above so many (F² · D) neighbours are left out on a CPU."""


def weight_columns(sae) -> tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor]:
    """Columns of features.safetensors read off the weights, and the unit rows of decoder and encoder (F, D) float32."""
    W_enc_FD, W_dec_FD = (w.detach().float() for w in (sae.W_enc, sae.W_dec))
    dec_norm, enc_norm = (torch.linalg.vector_norm(w, dim=1) for w in (W_dec_FD, W_enc_FD))
    dec_FD = W_dec_FD / dec_norm.clamp_min(1e-30)[:, None]
    enc_FD = W_enc_FD / enc_norm.clamp_min(1e-30)[:, None]
    columns = {
        "dec_norm": dec_norm,
        "enc_norm": enc_norm,
        "enc_dec_cos": (dec_FD * enc_FD).sum(1),
        "bias": sae.b_enc.detach().float(),
    }
    for name in ("threshold", "budget"):
        buffer = dict(sae.named_buffers()).get(name) if hasattr(sae, "named_buffers") else None
        if buffer is not None and buffer.numel() == len(W_dec_FD):
            columns[name] = buffer.detach().float().reshape(-1)
    return {name: column.cpu().numpy() for name, column in columns.items()}, dec_FD, enc_FD


def posterior_columns(sae, mean_sq_F: np.ndarray) -> dict[str, np.ndarray]:
    """`std_mean` and `kl_mean` of a variational SAE whose noise is a feature's own; the mean square of the codes says the rest."""
    variant = getattr(sae, "variant", None)
    found = variant.posterior(sae.extra, torch.from_numpy(mean_sq_F).double()) if variant is not None else None
    if found is None:
        return {}
    return {name: t.float().cpu().numpy() for name, t in zip(("std_mean", "kl_mean"), found, strict=True)}


def neighbours(
    dec_FD: torch.Tensor, enc_FD: torch.Tensor, signed: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """From unit rows: the columns of the most similar row, and the tensors of neighbours.safetensors.

    Undefined columns and no tensors for a single feature, and where the product is too large.
    """
    F, D = dec_FD.shape
    on_gpu = dec_FD.device.type != "cpu"
    if F < 2 or not (on_gpu or float(F) ** 2 * D <= NEIGHBOUR_FLOPS):
        undefined = np.full(F, np.nan, np.float32)
        columns = {
            "max_dec_cos": undefined,
            "max_enc_cos": undefined,
            "max_dec_feature": np.full(F, ABSENT, np.uint32),
        }
        return columns, {}
    with Progress("neighbours", 2 * F, "features") as progress:
        dec_feature, dec_cos = nearest_rows(dec_FD, NEIGHBOURS, progress)
        enc_feature, enc_cos = nearest_rows(enc_FD, NEIGHBOURS, progress)
    nearest, cos = most_similar(dec_FD, dec_feature, dec_cos, signed)
    columns = {
        "max_dec_cos": cos,
        "max_enc_cos": most_similar(enc_FD, enc_feature, enc_cos, signed)[1],
        "max_dec_feature": nearest,
    }
    tables = {
        "decoder_feature": dec_feature,
        "encoder_feature": enc_feature,
        "decoder_cos": dec_cos.astype(np.float16),
        "encoder_cos": enc_cos.astype(np.float16),
    }
    return columns, tables


def nearest_rows(W_FD: torch.Tensor, k: int, progress: Progress) -> tuple[np.ndarray, np.ndarray]:
    """The k other rows of largest |cosine| for each unit row, by falling size: features (F, k) uint32, cosines float32."""
    F = len(W_FD)
    features = np.full((F, k), ABSENT, np.uint32)
    cosines = np.zeros((F, k), np.float32)
    zeros = W_FD.new_zeros(F)
    keep = min(k + 1, F)
    rows = max(1, (1 << 25) // F)
    for lo in range(0, F, rows):
        part = W_FD[lo : lo + rows]
        codes = encode_select(part, W_FD, zeros, rule=RowCount(keep), key="abs", compute="fp32").codes
        value, index = codes.values.cpu().numpy().clip(-1, 1), codes.indices.cpu().numpy().astype(np.int64)
        size = np.abs(value)
        # the row itself goes last, and so do empty slots
        own = (index == np.arange(lo, lo + len(part))[:, None]) | (value == 0)
        size[own] = -1
        order = np.lexsort((index, -size), axis=1)[:, : keep - 1]
        there = np.take_along_axis(size, order, 1) > 0
        features[lo : lo + len(part), : keep - 1] = np.where(there, np.take_along_axis(index, order, 1), ABSENT)
        cosines[lo : lo + len(part), : keep - 1] = np.where(there, np.take_along_axis(value, order, 1), 0)
        progress.advance(len(part))
    return features, cosines


def most_similar(
    W_FD: torch.Tensor, features: np.ndarray, cosines: np.ndarray, signed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The most similar other row of each unit row, from its nearest by |cosine|: number (F) uint32, cosine (F) float32.

    By |cosine| for signed codes; by the cosine where codes have one sign, since an opposite row detects nothing then.
    """
    if signed:
        return features[:, 0].copy(), cosines[:, 0].copy()
    there = features != ABSENT
    best = np.where(there, cosines, -2).argmax(1)[:, None]
    feature, cos = np.take_along_axis(features, best, 1)[:, 0], np.take_along_axis(cosines, best, 1)[:, 0]
    # all the nearest are opposite ones: the most similar may be none of them
    rows = np.flatnonzero(there[:, 0] & (cos <= 0))
    for part in np.split(rows, range(256, len(rows), 256)) if len(rows) else ():
        at = torch.from_numpy(part).to(W_FD.device)
        all_cos = (W_FD[at] @ W_FD.T).clamp(-1, 1)
        all_cos[torch.arange(len(at), device=at.device), at] = -2
        value, index = all_cos.max(1)
        cos[part], feature[part] = value.cpu().numpy(), index.cpu().numpy()
    return feature, cos


def logit_weights(W_dec_FD: torch.Tensor, W_U_VD: torch.Tensor) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Strongest up and down tokens of each decoder row: ids and weights (F, 2, 20), and moments over the vocabulary."""
    F, V = len(W_dec_FD), len(W_U_VD)
    k = min(LOGITS, V)
    token = np.full((F, 2, LOGITS), ABSENT, np.uint32)
    weight = np.zeros((F, 2, LOGITS), np.float32)
    moments = {name: np.zeros(F, np.float32) for name in ("logit_std", "logit_skew", "logit_kurtosis")}
    rows = max(1, (1 << 24) // V)
    W_U_VD = W_U_VD.detach().to(W_dec_FD.device, torch.float32)
    with Progress("logits", F, "features") as progress:
        for lo in range(0, F, rows):
            w_BV = W_dec_FD[lo : lo + rows] @ W_U_VD.T
            here = slice(lo, lo + len(w_BV))
            for side, largest in ((0, True), (1, False)):
                best = w_BV.topk(k, dim=1, largest=largest)
                token[here, side, :k], weight[here, side, :k] = best.indices.cpu().numpy(), best.values.cpu().numpy()
            centred = w_BV - w_BV.mean(1, keepdim=True)
            square = centred * centred
            variance = square.mean(1).double()
            moments["logit_std"][here] = variance.sqrt().cpu().numpy()
            skew = (square * centred).mean(1).double() / variance**1.5
            kurtosis = (square * square).mean(1).double() / variance**2 - 3
            moments["logit_skew"][here], moments["logit_kurtosis"][here] = skew.cpu().numpy(), kurtosis.cpu().numpy()
            progress.advance(len(w_BV))
    return token, weight, moments


def principal_plane(W_dec_FD: torch.Tensor) -> np.ndarray:
    """First two principal components of the unit decoder rows (F, 2) float32; each axis points to its larger entry."""
    unit_FD = W_dec_FD / torch.linalg.vector_norm(W_dec_FD, dim=1).clamp_min(1e-30)[:, None]
    centred = unit_FD - unit_FD.mean(0)
    _, axes = torch.linalg.eigh((centred.T @ centred).double().cpu())
    axes = axes[:, -2:].flip(1)
    sign = torch.gather(axes, 0, axes.abs().argmax(0, keepdim=True)).sign()
    return (centred.double().cpu() @ (axes * sign)).float().numpy()
