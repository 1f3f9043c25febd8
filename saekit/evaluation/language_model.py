"""Tier 2: what the language model loses when the reconstruction is put in the place of the activation.

Four runs per batch of held-out sequences: clean, with x̂ at the site, with 0, with the training mean. Positions that carry
no SAE (dropped special tokens, padding) keep the clean activation in all runs. Losses are nats per predicted token from
log-probabilities in float32 of the model's own head, at positions whose target is real text.

B sequences · T positions · V vocabulary.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evaluation.metrics import BlockSums, Metric
from saekit.forward import cut_at_documents
from saekit.model import LanguageModel
from saekit.progress import Progress
from saekit.sae import SAE
from saekit.store import Store

# undefined below: a ratio over almost nothing
MIN_GAP = 0.05
IDENTITY_TOLERANCE = 1e-3


@torch.no_grad()
def spliced_losses(
    sae: SAE, store: Store, lm: LanguageModel, site: str, sequences: np.ndarray, mean_D: Tensor, batch: int = 16
) -> BlockSums:
    """Per-token sums of the four losses, KL(clean ‖ spliced) and agreement, over `sequences` of the store.

    Raises SaekitError if putting x in its own place, or x̂ + (x − x̂), changes the logits: then nothing measured here
    would mean anything.
    """
    table = store.table
    mean_D = mean_D.to(lm.device, torch.float32)
    blocks = BlockSums(sequences)
    special = torch.tensor(sorted(store.manifest["special_tokens"]["dropped_ids"]), device=lm.device)
    checked = False
    starts, ends = table.seq_start[sequences], table.seq_start[sequences + 1]
    if store.manifest["text"]["packing"] == "isolate":
        starts, ends = cut_at_documents(table, sequences, int(store.manifest["special_tokens"]["prepend_bos"]))
    budget = batch * store.manifest["context_length"]
    with Progress("splice", int((ends - starts).sum()), "tokens") as progress:
        for part in _chunks(ends - starts, budget):
            ids_BT, keep_BT, real_BT = _batch(table, starts[part], ends[part], lm)

            def put(value, keep=keep_BT):
                def replace(x):
                    return torch.where(keep[..., None], value(x.float()).to(x.dtype), x)

                return replace

            def reconstruct(x, keep=keep_BT):
                y = x.clone()
                y[keep] = sae(x[keep].to(sae.W_enc.device)).to(x.device)
                return y

            runs = {
                "sae": put(reconstruct),
                "zero": put(torch.zeros_like),
                "mean": put(lambda x: mean_D.expand_as(x)),
            }
            clean = lm.replace(ids_BT, site, lambda x: x)[:, :-1].float().log_softmax(-1)
            if not checked:
                _self_test(lm, ids_BT, site, put, reconstruct, clean)
                checked = True
            target = ids_BT[:, 1:]
            counted = real_BT[:, 1:] & ~torch.isin(target, special)
            where = np.repeat(table.seq_of(starts[part]), counted.sum(1).cpu().numpy())
            values = {"tokens": np.ones(len(where)), "clean": _nll(clean, target, counted)}
            for name, run in runs.items():
                spliced = lm.replace(ids_BT, site, run)[:, :-1].float().log_softmax(-1)
                values[name] = _nll(spliced, target, counted)
                if name != "mean":
                    divergence = (clean.exp() * (clean - spliced)).sum(-1)
                    values[f"kl_{name}"] = divergence[counted].double().cpu().numpy()
                if name == "sae":
                    values["agree"] = (clean.argmax(-1) == spliced.argmax(-1))[counted].double().cpu().numpy()
                del spliced
            blocks.add(where, **values)
            progress.advance(int((ends - starts)[part].sum()))
    return blocks


def _chunks(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Numbers of the stretches that go through the model together: at most `budget` positions with padding, longest first.
    One token predicts nothing."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 1]
    first = 0
    while first < len(order):
        count = max(1, budget // int(lengths[order[first]]))
        yield np.sort(order[first : first + count])
        first += count


def _batch(table, starts: np.ndarray, ends: np.ndarray, lm: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (B, T), positions that carry an activation, positions that are no padding; right padded with the last id."""
    T = int((ends - starts).max())
    index = np.minimum(starts[:, None] + np.arange(T), ends[:, None] - 1)
    real = np.arange(T) < (ends - starts)[:, None]
    ids = torch.from_numpy(np.asarray(table.token)[index].astype(np.int64)).to(lm.device)
    keep = torch.from_numpy(np.asarray(table.stored)[index].astype(bool) & real).to(lm.device)
    return ids, keep, torch.from_numpy(real).to(lm.device)


def _nll(logp_BTV: Tensor, target_BT: Tensor, counted_BT: Tensor) -> np.ndarray:
    return -logp_BTV.gather(-1, target_BT[..., None])[..., 0][counted_BT].double().cpu().numpy()


def _self_test(lm, ids_BT, site, put, reconstruct, clean):
    plain = lm.logits(ids_BT)[:, :-1].float().log_softmax(-1)
    whole = (
        lm.replace(ids_BT, site, put(lambda x: reconstruct(x) + (x - reconstruct(x))))[:, :-1].float().log_softmax(-1)
    )
    for name, other in (("the activation itself", clean), ("reconstruction plus error", whole)):
        worst = (plain - other).abs().max().item()
        if not worst <= IDENTITY_TOLERANCE:
            raise SaekitError(
                f"putting {name} at {site} changes log-probabilities by {worst:.2g}; the model does not read this site "
                "as it was captured, so no loss can be measured there"
            )


def language_model_metrics(blocks: BlockSums, seed: int) -> dict[str, Metric]:
    """The table of tier 2: the losses themselves first, ratios with their parts."""
    n = int(blocks.total("tokens"))

    def mean(name):
        return blocks.ratio(name, "tokens"), blocks.interval(lambda s: s[name] / s["tokens"], seed)

    def metric(pair, unit, better, formula, note=""):
        return Metric(pair[0], unit, better, n, f"{formula}/1", ci95=pair[1], note=note)

    def recovered(ablation):
        gap = mean(ablation)[0] - mean("clean")[0]
        formula = f"ce_recovered_{ablation}"
        if gap < MIN_GAP:
            note = f"undefined: the ablation costs {gap:.3f} nats, under {MIN_GAP}"
            return Metric(None, "ratio", "higher", n, f"{formula}/1", note=note)

        def ratio(s):
            return (s[ablation] - s["sae"]) / (s[ablation] - s["clean"])

        value = float(ratio({k: v.sum() for k, v in blocks.sums.items()}))
        return metric((value, blocks.interval(ratio, seed)), "ratio", "higher", formula)

    added = mean("sae")[0] - mean("clean")[0], blocks.interval(lambda s: (s["sae"] - s["clean"]) / s["tokens"], seed)
    nats = "nats/token"
    return {
        "ce_added": metric(added, nats, "lower", "ce_added"),
        "kl": metric(mean("kl_sae"), nats, "lower", "kl", note="KL(clean ‖ spliced)"),
        "ce_recovered_zero": recovered("zero"),
        "ce_recovered_mean": recovered("mean"),
        "top1_agree": metric(mean("agree"), "share", "higher", "top1_agree"),
        "ce_clean": metric(mean("clean"), nats, "none", "ce_clean"),
        "ce_sae": metric(mean("sae"), nats, "lower", "ce_sae"),
        "ce_zero": metric(mean("zero"), nats, "none", "ce_zero"),
        "ce_mean": metric(mean("mean"), nats, "none", "ce_mean"),
        "kl_zero": metric(mean("kl_zero"), nats, "none", "kl_zero"),
    }
