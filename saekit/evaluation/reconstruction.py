"""Tier 1: reconstruction, sparsity and usage of features, from one pass over held-out activations.

1. Per token: ‖x − x̂‖², ‖x − μ0‖², norms, number of features that fire, Σ|a_j|‖d_j‖.
2. Sums about the store's mean μ0, corrected at the end to the mean μ of the evaluated tokens:
   Σ‖x − μ‖² = Σ‖x − μ0‖² − T‖μ − μ0‖².
3. A feature fires iff its code is not 0; codes of either sign count, and are counted apart too.

T tokens · D model width · F features.
"""

import numpy as np
import torch

from saekit.encoding import Chunk
from saekit.evaluation.metrics import BlockSums, Metric
from saekit.sae import SAE

DENSITY_EDGES = np.linspace(-7, 0, 61)
# a feature is two-sided if each sign has so many firings, and such a share of them
SIDE_FIRINGS, SIDE_SHARE = 64, 0.05


class Reconstruction:
    """A consumer of encoding chunks; `metrics()` after the pass."""

    def __init__(self, sae: SAE, mean_D: torch.Tensor, sequences: np.ndarray, seed: int = 0):
        self.sae, self.seed = sae, seed
        self.mean_D = mean_D.to(sae.W_enc.device, torch.float32)
        self.blocks = BlockSums(sequences)
        D, F = sae.d_in, sae.d_sae
        self.tokens = 0
        self.firings = np.zeros(F, np.int64)
        self.negative = np.zeros(F, np.int64)
        self.energy = np.zeros(F)
        self.l0_counts = np.zeros(F + 1, np.int64)
        self.sum_D = np.zeros(D)
        self.error_D = np.zeros(D)
        self.gram_DD = torch.zeros(D, D, dtype=torch.float64)
        self.dec_norm_F = sae.W_dec.norm(dim=1)

    def update(self, chunk: Chunk):
        x, y = chunk.x_BD, chunk.xhat_BD
        centred, error = x - self.mean_D, x - y
        l0 = chunk.codes.l0().cpu().numpy()
        x_norm, y_norm = x.norm(dim=1), y.norm(dim=1)
        dot = (x * y).sum(1)
        cosine = torch.where(y_norm > 0, dot / (x_norm * y_norm).clamp_min(1e-30), torch.zeros_like(dot))
        row, feature, value = (t.cpu().numpy() for t in chunk.codes.pairs())
        strength = np.abs(value) * self.dec_norm_F.cpu().numpy()[feature]
        self.blocks.add(
            chunk.sequences,
            tokens=np.ones(len(l0)),
            error=_np(error.square().sum(1)),
            spread=_np(centred.square().sum(1)),
            ratio=_np(error.square().sum(1) / x.square().sum(1).clamp_min(1e-30)),
            cosine=_np(cosine),
            x_norm=_np(x_norm),
            y_norm=_np(y_norm),
            y_sq=_np(y_norm.square()),
            dot=_np(dot),
            l0=l0,
            l0_sq=l0.astype(np.float64) ** 2,
            l1=np.bincount(row, weights=strength, minlength=len(l0)),
        )
        self.tokens += len(l0)
        self.firings += np.bincount(feature, minlength=len(self.firings))
        self.negative += np.bincount(feature[value < 0], minlength=len(self.firings))
        self.energy += np.bincount(feature, weights=strength**2, minlength=len(self.energy))
        self.l0_counts += np.bincount(l0, minlength=len(self.l0_counts))
        self.sum_D += _np(centred.double().sum(0))
        self.error_D += _np(error.double().sum(0))
        self.gram_DD += (centred.T @ centred).double().cpu()

    def finish(self):
        """Nothing is held back."""

    def metrics(self) -> dict[str, Metric]:
        b, T, F = self.blocks, self.tokens, self.sae.d_sae
        shift = float(self.sum_D @ self.sum_D) / T
        spread = b.total("spread") - shift

        def about_mean(s):  # the mean moves by little between resamples; its shift is scaled with the tokens
            return s["spread"] - shift * s["tokens"] / T

        def per_token(name):
            return b.total(name) / T, b.interval(lambda s: s[name] / s["tokens"], self.seed)

        def metric(pair, unit, better, formula, **more):
            return Metric(pair[0], unit, better, T, f"{formula}/1", ci95=pair[1], **more)

        fvu = b.total("error") / spread, b.interval(lambda s: s["error"] / about_mean(s), self.seed)
        l0 = per_token("l0")
        alive = float((self.firings > 0).mean())
        density = self.firings / T
        quantiles = np.searchsorted(np.cumsum(self.l0_counts) / T, [0.05, 0.5, 0.95])
        cov = self.gram_DD.numpy() - np.outer(self.sum_D, self.sum_D) / T
        top = np.sort(np.linalg.eigvalsh(cov))[::-1][: max(0, round(l0[0]))].sum()
        energy = self.energy.sum() or 1.0
        D = self.sae.d_in
        metrics = {
            "fvu": metric(fvu, "ratio", "lower", "fvu", baselines={"mean": 1.0, "pca_l0": max(0.0, 1 - top / spread)}),
            "l0": metric(
                l0,
                "features/token",
                "none",
                "l0",
                note=f"5/50/95 %: {quantiles[0]}/{quantiles[1]}/{quantiles[2]}, sd {max(0.0, b.total('l0_sq') / T - l0[0] ** 2) ** 0.5:.2f}",
            ),
            "alive": metric((alive, None), "share", "higher", "alive", note=f"of {F:,} features, in {T:,} tokens"),
            "dead_at": metric(
                (float((self.firings == 0).sum()), None),
                "features",
                "lower",
                "dead_at",
                note=f"without a firing in {T:,} tokens; density below {3 / T:.1g} (95 %)",
            ),
            "dense_1": metric(
                (float((density > 0.01).mean()), None),
                "share",
                "none",
                "dense",
                note=f"fire on over 1 % of tokens; they hold {self.energy[density > 0.01].sum() / energy:.0%} of the energy",
            ),
            "dense_10": metric(
                (float((density > 0.1).mean()), None),
                "share",
                "lower",
                "dense",
                note=f"fire on over 10 % of tokens; they hold {self.energy[density > 0.1].sum() / energy:.0%} of the energy",
            ),
            "mse": metric((b.total("error") / (T * D), None), "activation²", "lower", "mse"),
            "nmse_token": metric(per_token("ratio"), "ratio", "lower", "nmse_token"),
            "cosine": metric(per_token("cosine"), "–", "higher", "cosine"),
            "offset": metric(
                (float(np.linalg.norm(self.error_D / T)) / (spread / T) ** 0.5, None), "ratio", "lower", "offset"
            ),
            "norm_ratio": metric(
                (b.ratio("y_norm", "x_norm"), None), "ratio", "none", "norm_ratio", note="1 = no shrinkage"
            ),
            "gamma": metric((b.ratio("y_sq", "dot"), None), "ratio", "none", "gamma", note="1 = no shrinkage"),
            "l1": metric(per_token("l1"), "activation", "none", "l1"),
        }
        if self.sae.variant.signed:
            metrics["two_sided"] = self.two_sided()
        return metrics

    def two_sided(self) -> Metric:
        """Share of the features that fire, with both signs often enough. Flipping a feature changes nothing."""
        n, rarer = self.firings, np.minimum(self.negative, self.firings - self.negative)
        both = (n > 0) & (rarer >= np.maximum(SIDE_FIRINGS, SIDE_SHARE * n))
        alive = int((n > 0).sum())
        note = f"of {alive:,} that fire; {rarer.sum() / max(1, n.sum()):.1%} of firings have the rarer sign of their feature"
        value = float(both.sum() / alive) if alive else None
        return Metric(value, "share", "none", self.tokens, "two_sided/1", note=note if alive else "nothing fires")

    def density_histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """(edges of log10 density (61), counts (60)) over features that fired."""
        alive = self.firings[self.firings > 0] / self.tokens
        counts, _ = np.histogram(np.log10(np.clip(alive, 1e-7, 1)), bins=DENSITY_EDGES)
        return DENSITY_EDGES, counts


def _np(t: torch.Tensor) -> np.ndarray:
    return t.double().cpu().numpy()
