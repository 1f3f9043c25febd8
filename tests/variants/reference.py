"""The ten losses as their formulas say, on dense float64 matrices: what tests compare a step of the Trainer with.

    ref = reference.step(variant, parameters, x_BD, total_variance=V, step=64, steps=1000)
    ref.named["rec"], ref.gradients["W_enc"], ref.codes_BF

Nothing here is shared with what it checks: selection sorts, gradients are autograd's, the two slopes of JumpReLU are written
out. `x_BD` is normalised. B tokens · D width · F features · A features that AuxK trains
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    named: dict[str, Tensor]
    """Losses by name, weighted."""
    gradients: dict[str, Tensor]
    """What Adam gets: mean over micro-batches, W_dec's rows without their part along the row, clipped."""
    codes_BF: Tensor
    """Codes of training."""
    fvu: Tensor
    """Error of the last prefix."""
    grad_norm: float
    """Before clipping."""


def first(key_N: Tensor, n: int) -> Tensor:
    """bool: the n largest keys of a vector, none of them 0; equal ones by place."""
    order = key_N.sort(descending=True, stable=True).indices[:n]
    return torch.zeros_like(key_N, dtype=torch.bool).index_fill(0, order, True) & (key_N > 0)


def row_count(key_BF: Tensor, k: int) -> Tensor:
    return torch.stack([first(key_F, k) for key_F in key_BF])


def batch_count(key_BF: Tensor, m: int) -> Tensor:
    return first(key_BF.flatten(), m).view_as(key_BF)


def column_count(key_BF: Tensor, m_F: Tensor) -> Tensor:
    return torch.stack([first(key_B, int(m)) for key_B, m in zip(key_BF.T, m_F, strict=True)], dim=1)


def row_mass(key_BF: Tensor, t_B: Tensor) -> Tensor:
    """Sorts a row, tries every n from 1 to the number of positive keys, takes the first that is nearest."""
    kept = torch.zeros_like(key_BF, dtype=torch.bool)
    for row, key_F, t in zip(kept, key_BF, t_B.tolist(), strict=True):
        ordered = key_F.sort(descending=True, stable=True)
        positive = int((key_F > 0).sum())
        norms = [math.sqrt(math.fsum(v * v for v in ordered.values[:n].tolist())) for n in range(1, positive + 1)]
        if norms:
            row[ordered.indices[: min(range(positive), key=lambda i: abs(norms[i] - t)) + 1]] = True
    return kept


class _JumpCode(torch.autograd.Function):
    """c = pre·[pre > θ],  ∂c/∂θ = −(θ/ε)·R,  ∂c/∂pre = [pre > θ]"""

    @staticmethod
    def forward(ctx, pre_BF, theta_F, epsilon):
        ctx.save_for_backward(pre_BF, theta_F)
        ctx.epsilon = epsilon
        return pre_BF * (pre_BF > theta_F)

    @staticmethod
    def backward(ctx, g):
        pre_BF, theta_F = ctx.saved_tensors
        R = window(pre_BF, theta_F, ctx.epsilon)
        return g * (pre_BF > theta_F), (g * -(theta_F / ctx.epsilon) * R).sum(0), None


class _JumpCount(torch.autograd.Function):
    """H = [pre > θ],  ∂H/∂θ = −(1/ε)·R,  nothing to pre"""

    @staticmethod
    def forward(ctx, pre_BF, theta_F, epsilon):
        ctx.save_for_backward(pre_BF, theta_F)
        ctx.epsilon = epsilon
        return (pre_BF > theta_F).to(pre_BF.dtype)

    @staticmethod
    def backward(ctx, g):
        pre_BF, theta_F = ctx.saved_tensors
        return None, (g * -window(pre_BF, theta_F, ctx.epsilon) / ctx.epsilon).sum(0), None


def window(pre_BF: Tensor, theta_F: Tensor, epsilon: float) -> Tensor:
    """R = [|pre − θ| < ε/2]·[pre > 0]"""
    return (((pre_BF - theta_F) / epsilon).abs() < 0.5).double() * (pre_BF > 0)


def k_at(variant, D: int, F: int, progress: float) -> int:
    """Linear from D, or from F where that is less, to k over the first k_anneal of the steps."""
    left = max(0.0, 1 - progress / variant.k_anneal) if variant.k_anneal else 0.0
    return max(variant.k, round(variant.k + (min(D, F) - variant.k) * left))


def kl(mu: Tensor, sigma: Tensor, s: float) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, s²))"""
    return 0.5 * (mu**2 / s**2 + sigma**2 / s**2 - 1 - (sigma**2 / s**2).log())


def ramp(step: int, steps: int, most: int, share: float) -> float:
    return min(1.0, (step + 1) / max(1.0, min(most, share * steps)))


def micro_batch(
    variant,
    p: dict[str, Tensor],
    x: Tensor,
    *,
    V: float,
    step: int,
    steps: int,
    buffers,
    noise,
    slots,
    ids,
    under,
    without,
) -> Reference:
    """Losses of one micro-batch, as graphs on `p`."""
    (B, D), F = x.shape, len(p["W_enc"])
    centred = x - p["b_dec"]
    pre = centred @ p["W_enc"].T + p["b_enc"]
    key = pre.detach().abs() if variant.key == "abs" else pre.detach().clamp(min=0)
    named: dict[str, Tensor] = {}
    bounds = [F]
    k = k_at(variant, D, F, step / steps) if hasattr(variant, "k") else 0

    if variant.name in ("topk", "abs_topk"):
        codes = pre * row_count(key, k)
        if getattr(variant, "multi_k", 0):
            wide = pre * row_count(key, min(4 * k, F))
            error = x - wide @ p["W_dec"] - p["b_dec"]
            named["multi_k"] = variant.multi_k * error.square().sum() / (B * V)
    elif variant.name in ("mutual_choice", "matryoshka"):
        codes = pre * batch_count(key, k * B)
        if variant.name == "matryoshka":
            bounds = list(variant.widths or (F // 16, F // 8, F // 4, F // 2, F))
    elif variant.name == "feature_choice":
        if step < math.ceil(variant.switch * steps):
            codes = pre * batch_count(key, k * B)
        else:
            m_F = (buffers["budget"] * B + (buffers["phase"] + 0.6180339887 * step) % 1).floor()
            codes = pre * column_count(key, m_F)
    elif variant.name == "variational":
        s = variant.prior_std or math.sqrt(V / variant.k)
        mu = pre.relu() if variant.relu_mu else pre
        rho = {
            "fixed": lambda: torch.full_like(pre, variant.log_var_init),
            "feature": lambda: p["b_var"].expand_as(pre),
            "input": lambda: centred @ p["W_var"].T + p["b_var"],
        }[variant.variance]().clamp(-10, 2)
        sigma = s * (rho / 2).exp()
        if variant.sample == "before":
            z = mu + sigma * noise(F).double()
            z_key = z.detach().abs() if variant.key == "abs" else z.detach().clamp(min=0)
            codes = z * row_count(z_key, k)
        else:
            kept = row_count(key, k)
            codes = mu * kept
            if variant.sample == "after":
                codes = codes + sigma * placed(noise, kept, slots)
        pays = codes.detach() != 0 if variant.kl_on == "selected" else torch.ones_like(codes, dtype=torch.bool)
        beta = 0.2 / D if variant.beta is None else variant.beta
        if beta:
            w = ramp(step, steps, 10**9, 0.1)
            named["kl"] = beta * w * (kl(mu, sigma, s) * pays).sum() / B
    elif variant.name == "top_afa":
        codes = pre * row_mass(key, centred.detach().norm(dim=1))
        target_B = (x if variant.afa_target == "input" else centred).norm(dim=1)
        if variant.norm:
            named["norm"] = variant.norm * D * (norm_of(codes) - target_B).square().mean() / V
    elif variant.name == "relu":
        codes = pre.relu()
        penalty = variant.l1 * ramp(step, steps, 5000, 0.1)
        named["l1"] = penalty * codes.sum() / B / math.sqrt(V)
    elif variant.name == "jumprelu":
        epsilon = variant.bandwidth * math.sqrt(V)
        codes = _JumpCode.apply(pre, p["threshold"], epsilon)
        l0 = _JumpCount.apply(pre, p["threshold"], epsilon).sum() / B
        if variant.l0_loss == "linear":
            named["sparsity"] = variant.l1 * ramp(step, steps, 5000, 0.1) * l0 / variant.l0
        else:
            named["sparsity"] = variant.l1 * ramp(step, steps, 2000, 0.1) * (l0 / variant.l0 - 1).square()
    else:
        assert variant.name == "gated"
        pi = centred @ p["W_enc"].T
        gate = (pi + p["b_enc"]).relu()
        codes = (pi + p["b_enc"] > 0) * (p["r_mag"].exp() * pi + p["b_mag"]).relu()
        error = x - gate @ p["W_dec"].detach() - p["b_dec"].detach()
        named["l1"] = variant.l1 * ramp(step, steps, 5000, 0.1) * gate.sum() / B / math.sqrt(V)
        named["gate"] = error.square().sum() / (B * V)

    errors = [x - codes[:, :n] @ p["W_dec"][:n] - p["b_dec"] for n in bounds]
    recs = [error.square().sum() / (B * V) for error in errors]
    named["rec"] = torch.stack(recs).mean()
    if len(ids) and getattr(variant, "aux", 0):
        off = torch.zeros(F, dtype=torch.bool)
        off[ids] = (codes.detach()[:, ids] != 0).any(0)
        off[under] = False
        a_key = key[:, ids] * ~off[ids]
        a = pre[:, ids] * row_count(a_key, min(variant.k_aux or D // 2, len(ids)))
        e = errors[-1].detach()
        named["aux"] = variant.aux * (e - a @ p["W_dec"][ids]).square().sum() / (e - e.mean(0)).square().sum()
    for name in without:
        named.pop(name, None)
    return Reference(named, {}, codes.detach(), recs[-1].detach(), 0.0)


def placed(noise, kept_BF: Tensor, slots_BK: Tensor | None) -> Tensor:
    """Normals of the kept places: those of the slots, or one for each feature."""
    if slots_BK is None:
        return noise(kept_BF.shape[1]).double() * kept_BF
    at_slots = noise(slots_BK.shape[1]).double()
    return torch.zeros_like(kept_BF, dtype=torch.float64).scatter(1, slots_BK.long(), at_slots) * kept_BF


def norm_of(codes: Tensor) -> Tensor:
    """‖c‖ of each row, with slope 0 at 0."""
    sq_B = codes.square().sum(1)
    return torch.where(sq_B > 0, sq_B.clamp(min=1e-300).sqrt(), 0)


def step(
    variant,
    parameters: dict[str, Tensor],
    x_BD: Tensor,
    *,
    total_variance: float,
    step: int,
    steps: int,
    micro_batches: int = 1,
    buffers: dict[str, Tensor] | None = None,
    noise=None,
    slots: Tensor | None = None,
    ids: Tensor | None = None,
    under: Tensor | None = None,
    without: tuple[str, ...] = (),
) -> Reference:
    """One step. `noise(n)`: the normals (B, n) that it draws, for each of `slots` (B, K, features) or, where these are None, for each
    feature. `ids`: the list U, `under` those of it that are trained although
    they fire. `without`: losses to leave out."""
    p = {name: t.detach().double().clone().requires_grad_() for name, t in parameters.items()}
    nobody = torch.zeros(0, dtype=torch.int64)
    named: dict[str, Tensor] = {}
    codes, fvu, lo = [], torch.zeros(()), 0
    for part in x_BD.double().split(len(x_BD) // micro_batches):
        rows = slice(lo, lo + len(part))
        lo += len(part)
        found = micro_batch(
            variant,
            p,
            part,
            V=total_variance,
            step=step,
            steps=steps,
            buffers=buffers or {},
            noise=None if noise is None else lambda n, rows=rows: noise(n)[rows],
            slots=None if slots is None else slots[rows],
            ids=nobody if ids is None else ids,
            under=nobody if under is None else under,
            without=without,
        )
        for name, loss in found.named.items():
            named[name] = named.get(name, torch.zeros(())) + loss / micro_batches
        codes.append(found.codes_BF)
        fvu = fvu + found.fvu / micro_batches
    found_grads = torch.autograd.grad(sum(named.values(), torch.zeros(())), list(p.values()), allow_unused=True)
    gradients = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(p.items(), found_grads, strict=True)}
    W = p["W_dec"].detach()
    gradients["W_dec"] = gradients["W_dec"] - (gradients["W_dec"] * W).sum(1, keepdim=True) * W
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    if variant.clip is not None:
        gradients = {n: g * min(1.0, variant.clip / norm) for n, g in gradients.items()}
    return Reference({n: loss.detach() for n, loss in named.items()}, gradients, torch.cat(codes), fvu, norm)
