"""Losses and gradients of one micro-batch, on sparse codes or on dense matrices.

    found = sparse(trainer, x_BD, at, rule, share)    # no (B, F) matrix of codes, no autograd but for what a variant adds
    found = dense(trainer, x_BD, at, rule, share)     # autograd on (B, F); where many features fire, or the selection is no rule

Both give the gradients of the same loss: `share` · (reconstruction + AuxK + the variant's losses), `share` = 1 / micro-batches.

B tokens of this rank's micro-batch · D width · F features · N slots · A features that AuxK trains
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from saekit_kernels import (
    BatchCount,
    Codes,
    ColumnCount,
    Csc,
    ExtraRows,
    RowCount,
    Rule,
    Threshold,
    aux_decode,
    build_csc,
    decode_residual_value_grad,
    feature_sums,
    pair_dots,
    segment_weight_grads,
)
from torch import Tensor

from saekit import losses
from saekit.ranks import Ranks
from saekit.selection import encode_select_over
from saekit.step import DenseSlots, Moment, SparseSlots, Step

if TYPE_CHECKING:
    from saekit.trainer import Trainer


@dataclass
class Found:
    """What a micro-batch gives."""

    named: dict[str, Tensor]
    """Losses by name, weighted, not yet times `share`."""
    gradients: dict[str, Tensor]
    """By parameter, times `share`; before the decoder's projection. W_dec and W_enc may be missing: see `segments`."""
    out: Step
    extra: dict[str, Tensor]
    """Further numbers for the log."""
    segments: list["Segment"] = field(default_factory=list)
    """What is to be added to the gradients of W_dec and W_enc, not summed yet; one after the other they hold every feature."""


@dataclass
class Segment:
    """Gradients of the rows first to last − 1 of both matrices as sums over firings, and those of the features that AuxK trains."""

    first: int
    last: int
    csc: Csc
    coef_dec_N: Tensor
    residual_BD: Tensor
    coef_enc_N: Tensor
    centred_BD: Tensor
    aux: ExtraRows | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def sums(self) -> tuple[Csc, Tensor, Tensor, Tensor, Tensor]:
        """What `segment_weight_grads` and `segment_adam_` begin with."""
        return self.csc, self.coef_dec_N, self.residual_BD, self.coef_enc_N, self.centred_BD


def add_up(found: Found, W_dec_FD: Tensor, W_enc_FD: Tensor) -> None:
    """Writes the gradients of both matrices into these two buffers, whole, and empties `segments`."""
    for segment in found.segments:
        segment_weight_grads(*segment.sums, extra=segment.aux, out=(W_dec_FD[segment.rows], W_enc_FD[segment.rows]))
    for name, whole in (("W_dec", W_dec_FD), ("W_enc", W_enc_FD)) if found.segments else ():
        if name in found.gradients:
            whole += found.gradients[name]
        found.gradients[name] = whole
    found.segments = []


def selected(trainer: "Trainer", x_BD: Tensor, rule: Rule, ranks: Ranks, *, csc: bool):
    """What a rule keeps of the selection batch, this rank's rows, with the hint that the last call gave."""
    if isinstance(rule, BatchCount):
        rule = dataclasses.replace(rule, hint=trainer.hint)
    elif isinstance(rule, ColumnCount):
        hint_F = trainer.hint if trainer.hint is not None and trainer.hint.ndim else None
        rule = dataclasses.replace(rule, hint_F=hint_F)
    p = trainer.parameters()
    found = encode_select_over(
        ranks,
        x_BD,
        p["W_enc"],
        p["b_enc"],
        p["b_dec"],
        rule=rule,
        key=trainer.variant.key,
        compute=trainer.compute,
        workspace=trainer.workspace,
        csc=csc,
    )
    trainer.hint = found.hint
    return found


def unspent(rule, found) -> dict[str, Tensor]:
    """Share of the selection's budget that found no key above 0."""
    if isinstance(rule, RowCount):
        slots = found.codes.values
        return {"budget_unspent": (slots == 0).sum() / slots.numel()}
    budget = rule.m if isinstance(rule, BatchCount) else rule.m_F.sum() if isinstance(rule, ColumnCount) else 0
    return {"budget_unspent": found.counters[1] / budget} if isinstance(rule, BatchCount | ColumnCount) else {}


def leaves(trainer: "Trainer") -> dict[str, Tensor]:
    """The parameters as the variant's losses see them: the same memory, in a graph of their own."""
    return {name: p.detach().requires_grad_() for name, p in trainer.parameters().items()}


@torch.no_grad()
def sparse(trainer: "Trainer", x_BD: Tensor, at: Moment, rule: Rule, share: float) -> Found:
    variant, V = trainer.variant, trainer.total_variance
    p, B = trainer.parameters(), len(x_BD)
    found = selected(trainer, x_BD, rule, trainer.ranks, csc=True)
    kept, csc = found.codes, found.csc
    assert csc is not None

    own = trainer.variant.own_values or trainer.variant.own_losses
    pre = kept.values.detach().requires_grad_() if own else kept.values
    graph = leaves(trainer) if own else p
    out = trainer.out(SparseSlots(kept, pre, csc), at, graph)
    out.threshold = found.threshold
    with torch.enable_grad():
        out.values = variant.values(out) if variant.own_values else pre
    codes = kept.with_values(out.values.detach())
    # without values of their own, slots and firings are the same
    firings_F = csc.ptr.diff().long() if not trainer.variant.own_values else build_csc(codes).ptr.diff().long()
    trainer.count(out, firings_F)

    slope = -2.0 * share / (B * V)
    parts, residual_BD, named, extra = _reconstructed(trainer, codes, kept, csc, x_BD)
    extra |= unspent(rule, found)
    g_pre = parts[0].dv * slope
    if len(parts) > 1:
        g_pre = torch.empty_like(codes.values)
        for part in parts:
            g_pre[part.slots] = part.dv * slope

    leaf_grads: dict[str, Tensor] = {}
    if own:
        with torch.enable_grad():
            more = variant.losses(out) if variant.own_losses else {}
            total = sum((loss * share for loss in more.values()), torch.zeros((), device=x_BD.device))
        ends = [(out.values, g_pre), (total, torch.ones_like(total))]
        ends = [(end, g) for end, g in ends if end.requires_grad]
        found_grads = torch.autograd.grad(
            [end for end, _ in ends], [pre, *graph.values()], [g for _, g in ends], allow_unused=True
        )
        g_pre = torch.zeros_like(pre) if found_grads[0] is None else found_grads[0]
        leaf_grads = {n: g for n, g in zip(graph, found_grads[1:], strict=True) if g is not None}
        named |= {name: loss.detach() for name, loss in more.items()}

    gradients = dict(leaf_grads)
    centred_BD = x_BD - p["b_dec"]
    aux = _aux(trainer, x_BD, residual_BD, share, named)
    segments, sums = [], []
    for part in parts:
        slots = slice(None) if part.slots is None else part.slots
        coef_dec, coef_enc = codes.values[slots] * slope, g_pre[slots]
        mine = None if aux is None else _between(aux, part.first, part.last)
        segments.append(
            Segment(part.first, part.last, part.csc, coef_dec, part.residual_BD, coef_enc, centred_BD, mine)
        )
        sums.append(feature_sums(part.csc, coef_enc))
    g_b_enc = torch.cat(sums)
    _add(gradients, "b_enc", g_b_enc)
    # the second term goes through x − b_dec
    _add(gradients, "b_dec", parts[0].residual_BD.sum(0) * slope - g_b_enc @ p["W_enc"])
    if aux is not None:
        gradients["b_enc"][aux.ids_A] += aux.b_enc_A
        gradients["b_dec"] -= aux.b_enc_A @ p["W_enc"][aux.ids_A]
    for name in p.keys() - gradients.keys() - {"W_dec", "W_enc"}:
        gradients[name] = torch.zeros_like(p[name])
    return Found(named, gradients, out, extra, segments)


def _add(gradients: dict[str, Tensor], name: str, g: Tensor):
    gradients[name] = gradients[name] + g if name in gradients else g


def _between(aux: ExtraRows, first: int, last: int) -> ExtraRows:
    """The rows of some features, which count from `first`."""
    mine = ((aux.ids_A >= first) & (aux.ids_A < last)).nonzero().squeeze(1)
    return ExtraRows(aux.ids_A[mine] - first, aux.W_dec_AD[mine], aux.W_enc_AD[mine], aux.b_enc_A[mine])


@dataclass
class _Part:
    """Features first to last − 1, which all see one sum of residuals."""

    first: int
    last: int
    slots: Tensor | None
    """Their slots among all; None = every slot."""
    csc: Csc
    residual_BD: Tensor
    """The sum over the prefixes that hold these features, divided by the number of prefixes."""
    dv: Tensor
    """residual · W_dec[feature] at these slots."""


def _reconstructed(trainer: "Trainer", codes: Codes, kept: Codes, csc, x_BD: Tensor):
    """(parts, residual of the whole, {"rec"}, numbers for the log)."""
    p, V = trainer.parameters(), trainer.total_variance
    bounds = trainer.variant.prefixes(trainer.d_sae)
    if len(bounds) == 1:
        sq_B, residual_BD, dv = decode_residual_value_grad(codes, p["W_dec"], p["b_dec"], x_BD)
        if trainer.variant.own_values:
            # a kept slot may hold no code and still have a slope
            dv = pair_dots(kept, residual_BD, p["W_dec"])
        rec = losses.reconstruction(sq_B, V)
        return [_Part(0, trainer.d_sae, None, csc, residual_BD, dv)], residual_BD, {"rec": rec}, {"fvu": rec}

    assert not codes.is_rowwise and not trainer.variant.own_values, (
        "prefixes go with flat codes that are pre-activations"
    )
    pieces, residuals, sq = [], [], []
    target, b_dec = x_BD, p["b_dec"]
    for first, last in zip((0, *bounds), bounds):
        slots, piece = _features(codes, first, last)
        sq_B, target, _ = decode_residual_value_grad(piece, p["W_dec"][first:last], b_dec, target)
        b_dec = torch.zeros_like(b_dec)
        pieces.append((first, last, slots, piece))
        residuals.append(target)
        sq.append(losses.reconstruction(sq_B, V))
    parts, total = [], torch.zeros_like(x_BD)
    for (first, last, slots, piece), residual in zip(reversed(pieces), reversed(residuals)):
        total = total + residual / len(bounds)
        dv = pair_dots(piece, total, p["W_dec"][first:last])
        parts.append(_Part(first, last, slots, build_csc(piece), total, dv))
    extra = {"fvu": sq[-1], **{f"fvu_{n}": rec for n, rec in zip(bounds[:-1], sq)}}
    return parts[::-1], residuals[-1], {"rec": torch.stack(sq).mean()}, extra


def _features(codes: Codes, first: int, last: int) -> tuple[Tensor, Codes]:
    """Slots whose feature lies in a range, and codes of these features alone."""
    assert codes.row_ptr is not None
    slots = ((codes.indices >= first) & (codes.indices < last)).nonzero().squeeze(1)
    row_ptr = torch.searchsorted(slots, codes.row_ptr.long())
    return slots, Codes.flat(row_ptr, codes.indices[slots] - first, codes.values[slots], last - first)


def dense(trainer: "Trainer", x_BD: Tensor, at: Moment, rule: Rule | None, share: float) -> Found:
    variant, V = trainer.variant, trainer.total_variance
    with torch.enable_grad():
        graph = leaves(trainer)
        pre_BF = torch.addmm(graph["b_enc"], x_BD - graph["b_dec"], graph["W_enc"].T)
        extra: dict[str, Tensor] = {}
        if rule is None:
            out = trainer.out(DenseSlots(pre_BF, torch.ones_like(pre_BF, dtype=torch.bool)), at, graph)
            values = variant.values(out) if variant.select is None else variant.select(pre_BF)
            out.values = values.dense() if isinstance(values, Codes) else values
        else:
            mask_BF, out_threshold, extra = _mask(trainer, x_BD, pre_BF.detach(), rule)
            out = trainer.out(DenseSlots(pre_BF, mask_BF), at, graph)
            out.threshold = out_threshold
            out.values = torch.where(mask_BF, variant.values(out) if variant.own_values else pre_BF, 0)
        trainer.count(out, (out.values.detach() != 0).sum(0))

        recs, residual_BD = [], x_BD - graph["b_dec"]
        bounds = variant.prefixes(trainer.d_sae)
        for first, last in zip((0, *bounds), bounds):
            residual_BD = residual_BD - out.values[:, first:last] @ graph["W_dec"][first:last]
            recs.append(losses.reconstruction(residual_BD.square().sum(1), V))
        named = {"rec": torch.stack(recs).mean(), **(variant.losses(out) if variant.own_losses else {})}
        total = sum(named.values(), torch.zeros((), device=x_BD.device)) * share
    grads = torch.autograd.grad(total, list(graph.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(graph.items(), grads, strict=True)
    }
    extra |= {"fvu": recs[-1].detach(), **{f"fvu_{n}": r.detach() for n, r in zip(bounds[:-1], recs)}}
    named = {name: loss.detach() for name, loss in named.items()}
    if (aux := _aux(trainer, x_BD, residual_BD.detach(), share, named)) is not None:
        for name, rows in (("W_dec", aux.W_dec_AD), ("W_enc", aux.W_enc_AD), ("b_enc", aux.b_enc_A)):
            gradients[name][aux.ids_A] += rows
        gradients["b_dec"] -= aux.b_enc_A @ trainer.parameters()["W_enc"][aux.ids_A]
    return Found(named, gradients, out, extra)


def _mask(trainer: "Trainer", x_BD: Tensor, pre_BF: Tensor, rule: Rule):
    """Which pre-activations the rule keeps (B, F), its smallest kept key, numbers for the log."""
    if isinstance(rule, Threshold):
        key_BF = pre_BF.abs() if trainer.variant.key == "abs" else pre_BF
        bar = torch.as_tensor(rule.theta, dtype=pre_BF.dtype, device=pre_BF.device) - rule.margin
        return torch.le(key_BF, bar.clamp(min=0)).logical_not_(), None, {}
    found = selected(trainer, x_BD, rule, trainer.ranks, csc=False)
    return found.codes.dense() != 0, found.threshold, unspent(rule, found)


def _aux(trainer: "Trainer", x_BD, residual_BD, share: float, named: dict) -> ExtraRows | None:
    """AuxK on copies of the rows it trains: its loss, and their gradients. It reaches b_dec through x − b_dec."""
    ids, weight = trainer.aux_ids, getattr(trainer.variant, "aux", 0.0)
    if not weight or not len(ids):
        return None
    p = trainer.parameters()
    W_enc, W_dec, b_enc = (p[name][ids].requires_grad_() for name in ("W_enc", "W_dec", "b_enc"))
    k_aux = min(getattr(trainer.variant, "k_aux", None) or trainer.d_model // 2, len(ids))
    off_A = (trainer.idle_F[ids] < trainer.dead_after) & ~trainer.aux_under
    with torch.enable_grad():
        y_BD = aux_decode(
            x_BD, p["b_dec"], None, W_enc, b_enc, W_dec, k_aux=k_aux, key=trainer.variant.key, off_A=off_A
        )
        loss = weight * losses.auxk(residual_BD, y_BD, trainer.ranks)
        part = loss * share
    named["aux"] = loss.detach()
    W_dec_AD, W_enc_AD, b_enc_A = torch.autograd.grad(part, (W_dec, W_enc, b_enc))
    return ExtraRows(ids, W_dec_AD, W_enc_AD, b_enc_A)
