"""Tier 4: how much of a known truth an SAE has found.

    truth = preset("tiny").draw()
    sae = sk.train(sk.TopK(k=4, d_sae=128), truth, out="saes/synthetic")
    found = recovery(sae, truth)
    print(found)                                # each score beside that of random directions
    found.scores.coverage

1. Rows that no run of this truth reads: those beyond the truth's own.
2. S_AT: cosines of the features that fire with the truths. Codes that can be negative: |cosine|, and a firing counts only if
   the signs agree. Codes that cannot: the signed cosine, and each half of a bidirectional truth is a truth of its own.
3. The one-to-one matching of largest total (Kuhn 1955); a pair with S ≤ 0 is none.
4. A second pass counts joint firings of the matched pairs, and of all pairs with S ≥ 0.9.
5. The same for as many random unit directions, encoder = decoder, with as many codes per row: the floor.

It scores a recipe on data that is made up. B rows · D width · G features of the generator · T truths · F features of the
SAE · A features that fire · P pairs
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from saekit_kernels import Codes, RowCount, encode_select
from torch import Tensor

from saekit.errors import SaekitError
from saekit.evaluation.metrics import Metric
from saekit.evaluation.report import number
from saekit.sae import SAE
from saekit.synthetic import CHUNK, Truth
from saekit.trainer import generator

ROWS_AT_ONCE = 2 * CHUNK
SIMILAR, FAITHFUL, SPURIOUS = 0.9, 0.8, 0.5

Encode = Callable[[Tensor, Codes], Codes]
"""Codes (B, F) of rows x_BD, whose true features are h (B, G)."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found; 1 is best unless said otherwise, None = undefined."""

    coverage: float
    """Share of the truths with a feature of S ≥ 0.9 whose firings have F1 ≥ 0.8 against theirs."""
    coverage_q: float
    """The same, each truth weighted by its frequency."""
    coverage_by_decile: tuple[float, ...]
    """The same in tenths of the truths, rarest first."""
    mcc: float
    """Sum of S over the matched pairs / number of truths."""
    gt_to_sae: float
    """Mean over truths of the largest S."""
    sae_to_gt: float | None
    """Mean over features that fire of the largest S."""
    unique: float | None
    """Number of truths that are nearest to some feature / features that fire."""
    f1_matched: float
    """F1 of "the feature fires" against "the truth fires", mean over all truths, 0 where unmatched."""
    sign_agree: float | None
    """Share of the joint firings of matched pairs with the sign of the truth; signed codes only."""
    spurious: float | None
    """Share of the features that fire whose largest S is below 0.5; 0 is best."""
    absorbed: float | None
    """Where a parent and its child are on, both matched: share of rows on which the child's feature fires and the parent's does
    not; 0 is best."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Scores of one SAE against one truth."""

    scores: Scores
    floor: Scores
    """Those of random directions."""
    l0: float
    """Features that fire on a row, mean."""
    true_l0: float
    """True features that fire on a row, mean."""
    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − μ‖²."""
    noise_fvu: float
    """FVU of a reconstruction that knows the features exactly."""
    gamma: float | None
    """Σ‖x̂‖² / Σ x·x̂; 1 = no shrinkage."""
    alive: int
    """Features that fire on some row."""
    features: int
    """F."""
    truths: int
    """T, those that fire on some row."""
    silent_truths: int
    """Truths that fire on no row; they are left out."""
    rows: int
    """Rows evaluated."""
    signed: bool
    """Whether codes can be negative."""

    def metrics(self) -> dict[str, Metric]:
        """Every number by its key, scores beside the floor."""
        deciles = " ".join(f"{v:.1f}" for v in self.scores.coverage_by_decile)
        missing = f"{self.silent_truths:,} truths fired on no row and are left out" if self.silent_truths else ""
        notes = {"coverage": "; ".join(p for p in (f"tenths, rarest first: {deciles}", missing) if p)}
        if not self.signed:
            notes["sign_agree"] = "of signed codes only"
        found = {}
        for key in Scores.__dataclass_fields__:
            value = getattr(self.scores, key)
            if key == "coverage_by_decile":
                continue
            unit = "cosine" if key in ("mcc", "gt_to_sae", "sae_to_gt") else "F1" if key == "f1_matched" else "share"
            better = "lower" if key in ("spurious", "absorbed") else "higher"
            floor = getattr(self.floor, key)
            baselines = {} if floor is None else {"random": floor}
            found[key] = Metric(
                value, unit, better, self.rows, f"{key}/1", baselines=baselines, note=notes.get(key, "")
            )
        return found | {
            "l0": Metric(self.l0, "features/token", "none", self.rows, "l0/1", baselines={"truth": self.true_l0}),
            "fvu": Metric(
                self.fvu, "ratio", "lower", self.rows, "fvu/1", baselines={"mean": 1.0, "noise": self.noise_fvu}
            ),
            "gamma": Metric(self.gamma, "ratio", "none", self.rows, "gamma/1", note="1 = no shrinkage"),
            "alive": Metric(
                self.alive / self.features,
                "share",
                "higher",
                self.rows,
                "alive/1",
                note=f"of {self.features:,} features",
            ),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.features:,} features against {self.truths:,} truths on {self.rows:,} new rows",
            f"{'':<11} {'value':>7}",
        ]
        for key, m in self.metrics().items():
            value = "–" if m.value is None else number(m.value)
            beside = ", ".join(f"{name} {number(v)}" for name, v in m.baselines.items())
            lines.append(f"{key:<11} {value:>7}  {'; '.join(p for p in (beside, m.note) if p)}"[:100].rstrip())
        return "\n".join(lines)


@torch.no_grad()
def recovery(sae: SAE, truth: Truth, *, rows: int = 200_000, encode: Encode | None = None) -> Recovery:
    """Scores of an SAE on `rows` new rows of a truth.

    Args:
        encode: where codes come from, instead of `sae.encode`; such as an oracle's.

    Raises:
        SaekitError: the SAE has another width than the truth, or there are too few rows to measure on.
    """
    D, F, G = truth.options.width, sae.d_sae, truth.options.features
    if sae.d_in != D:
        raise SaekitError(f"SAE expects D = {sae.d_in}, the truth has {D} dimensions; train on this truth")
    if rows < 2:
        raise SaekitError(f"rows = {rows} have no variance to explain; pass 2 or more, 200,000 for scores to rely on")
    signed, W_dec = sae.variant.signed, sae.W_dec.float()
    new = NewRows(truth, rows, W_dec.device)

    use_F, errors = torch.zeros(F, dtype=torch.int64), _Errors(truth, W_dec.device)
    positive_G, negative_G = torch.zeros(2, G, dtype=torch.int64)
    encode = encode or (lambda x_BD, h: sae.encode(x_BD))
    for x_BD, h, codes in new.coded(encode):
        use_F += _firings(codes)
        positive_G += _firings(h.keep(h.values > 0))
        negative_G += _firings(h.keep(h.values < 0))
        errors.add(x_BD, h, sae.decode(codes))
    truths = Truths.of(truth, positive_G, negative_G, signed)
    if not len(truths.feature_T):
        raise SaekitError(f"no true feature fires on any of {rows:,} rows; pass more rows")
    l0 = float(use_F.sum()) / rows

    random_FD = torch.randn(F, D, generator=generator(truth.options.seed, "synthetic floor")).to(W_dec.device)
    random_FD /= random_FD.norm(dim=1, keepdim=True)
    rule, mean_D = RowCount(min(F, max(1, round(l0)))), errors.mean_D().float()

    def nearest(x_BD: Tensor, h: Codes) -> Codes:
        zeros_F = random_FD.new_zeros(F)
        return encode_select(x_BD, random_FD, zeros_F, mean_D, rule=rule, key=sae.variant.key, compute="fp32").codes

    random_use_F = sum((_firings(codes) for _, _, codes in new.coded(nearest)), torch.zeros(F, dtype=torch.int64))
    return Recovery(
        scores=_score(truths, W_dec, use_F, new, encode, signed),
        floor=_score(truths, random_FD, random_use_F, new, nearest, signed),
        l0=l0,
        true_l0=float((positive_G + negative_G).sum()) / rows,
        fvu=errors.fvu(),
        noise_fvu=errors.noise_fvu(),
        gamma=errors.gamma(),
        alive=int((use_F > 0).sum()),
        features=F,
        truths=len(truths.feature_T),
        silent_truths=truths.silent,
        rows=rows,
        signed=signed,
    )


@dataclass(frozen=True)
class NewRows:
    """Rows behind those of the truth's epoch, the same in every pass."""

    truth: Truth
    rows: int
    device: torch.device

    def coded(self, encode: Encode) -> Iterator[tuple[Tensor, Codes, Codes]]:
        """(x_BD, h, codes) of some rows at a time."""
        first = self.truth.n_sequences * CHUNK
        for done in range(0, self.rows, ROWS_AT_ONCE):
            x_BD, h = self.truth.sample(first + done, min(ROWS_AT_ONCE, self.rows - done))
            x_BD, h = x_BD.to(self.device), h.to(self.device)
            yield x_BD, h, encode(x_BD, h)


class Truths(NamedTuple):
    """What features are compared with: the generator's features, or halves of them."""

    feature_T: Tensor
    """int64, feature of the generator."""
    side_T: Tensor
    """int8, 1, or -1 for the half where the strength is negative."""
    g_TD: Tensor
    """Unit directions in which the half is positive."""
    count_T: Tensor
    """int64, rows on which it is on."""
    parent_T: Tensor
    """int64, parent of the feature, -1 for most."""
    halves: bool
    silent: int
    """Truths that are on nowhere; they are not in the list."""

    @classmethod
    def of(cls, truth: Truth, positive_G: Tensor, negative_G: Tensor, signed: bool) -> "Truths":
        G = len(positive_G)
        feature, side, count = torch.arange(G), torch.ones(G, dtype=torch.int8), positive_G
        if signed:
            count = positive_G + negative_G
        else:
            both = truth.bidirectional_G.nonzero().squeeze(1)
            feature, count = torch.cat([feature, both]), torch.cat([count, negative_G[both]])
            side = torch.cat([side, -torch.ones_like(side[both])])
        on = count > 0
        feature, side, count = feature[on], side[on], count[on]
        g_TD = truth.g_GD[feature] * side[:, None]
        return cls(feature, side, g_TD, count, torch.from_numpy(truth.parent_G)[feature], not signed, int((~on).sum()))

    def signs(self, h: Codes) -> Tensor:
        """(T, B) int8: sign of the strength along `g_TD`, 0 where the truth is off."""
        signs_TB = _signs(h)[self.feature_T.to(h.device)] * self.side_T.to(h.device)[:, None]
        return signs_TB.clamp_min_(0) if self.halves else signs_TB


def _score(truths: Truths, W_dec_FD: Tensor, use_F: Tensor, new: NewRows, encode: Encode, signed: bool) -> Scores:
    # late: only this needs it, and it takes a moment
    from scipy.optimize import linear_sum_assignment

    T, alive_A = len(truths.feature_T), use_F.nonzero().squeeze(1)
    rows_AD = W_dec_FD.cpu()[alive_A]
    cos_AT = (rows_AD / rows_AD.norm(dim=1, keepdim=True).clamp_min(1e-30)) @ truths.g_TD.T
    S_AT = cos_AT.abs() if signed else cos_AT
    a, t = (torch.from_numpy(v) for v in linear_sum_assignment(S_AT.clamp_min(0).numpy(), maximize=True))
    a, t = a[S_AT[a, t] > 0], t[S_AT[a, t] > 0]
    near_a, near_t = (S_AT >= SIMILAR).nonzero(as_tuple=True)
    pair_a, pair_t = torch.cat([a, near_a]), torch.cat([t, near_t])
    match_T = torch.full((T,), -1)
    match_T[t] = alive_A[a]
    counts = _count(truths, alive_A[pair_a], pair_t, cos_AT[pair_a, pair_t].sign(), match_T, new, encode)

    f1_P = 2 * counts.hit_P.double() / (truths.count_T[pair_t] + use_F[alive_A[pair_a]])
    covered_T = torch.zeros(T, dtype=torch.float64)
    covered_T[near_t[f1_P[len(t) :] >= FAITHFUL]] = 1
    rarest_first = covered_T[truths.count_T.argsort(stable=True)].numpy()
    some = len(alive_A) > 0
    nearest_A = S_AT.max(1).values if some else torch.zeros(0)
    joint, hit = int(counts.joint_P[: len(t)].sum()), int(counts.hit_P[: len(t)].sum())
    return Scores(
        coverage=float(covered_T.mean()),
        coverage_q=float(covered_T @ truths.count_T.double() / truths.count_T.sum()),
        coverage_by_decile=tuple(float(part.mean()) for part in np.array_split(rarest_first, min(10, T))),
        mcc=float(S_AT[a, t].sum()) / T,
        gt_to_sae=float(S_AT.max(0).values.mean()) if some else 0.0,
        sae_to_gt=float(nearest_A.mean()) if some else None,
        unique=len(S_AT.argmax(1).unique()) / len(alive_A) if some else None,
        f1_matched=float(f1_P[: len(t)].sum()) / T,
        sign_agree=hit / joint if signed and joint else None,
        spurious=float((nearest_A < SPURIOUS).float().mean()) if some else None,
        absorbed=counts.absorbed / counts.with_child if counts.with_child else None,
    )


class Counts(NamedTuple):
    """Over all rows."""

    joint_P: Tensor
    """int64: rows on which feature and truth of a pair fire."""
    hit_P: Tensor
    """int64: those on which the signs agree."""
    with_child: int
    """(row, parent, child), parent and child on, both matched."""
    absorbed: int
    """Of these, the child's feature fires and the parent's does not."""


def _count(
    truths: Truths, feature_P: Tensor, truth_P: Tensor, sign_P: Tensor, match_T: Tensor, new: NewRows, encode: Encode
) -> Counts:
    children = (truths.parent_T >= 0).nonzero().squeeze(1)
    child, parent = (truths.parent_T[children, None] == truths.feature_T).nonzero(as_tuple=True)
    child = children[child]
    both = (match_T[child] >= 0) & (match_T[parent] >= 0)
    child, parent = child[both].to(new.device), parent[both].to(new.device)
    feature_P, truth_P, match_T = (v.to(new.device) for v in (feature_P, truth_P, match_T))
    sign_P1 = sign_P.to(new.device, torch.int8)[:, None]
    joint_P, hit_P = torch.zeros(2, len(feature_P), dtype=torch.int64, device=new.device)
    with_child = absorbed = 0
    for _, h, codes in new.coded(encode):
        truth_TB, code_FB = truths.signs(h), _signs(codes)
        agree_PB = truth_TB[truth_P] * code_FB[feature_P] * sign_P1
        joint_P += (agree_PB != 0).sum(1)
        hit_P += (agree_PB > 0).sum(1)
        on = (truth_TB[parent] != 0) & (truth_TB[child] != 0)
        gone = (code_FB[match_T[child]] != 0) & (code_FB[match_T[parent]] == 0)
        with_child += int(on.sum())
        absorbed += int((on & gone).sum())
    return Counts(joint_P.cpu(), hit_P.cpu(), with_child, absorbed)


class _Errors:
    """Sums for FVU, its floor, and γ, in float64."""

    def __init__(self, truth: Truth, device: torch.device):
        self._g_GD, self._bias_D = truth.g_GD.to(device), truth.bias_D.to(device)
        self._rows = self._square = self._error = self._noise = self._length = self._dot = 0.0
        self._sum_D = torch.zeros(truth.options.width, dtype=torch.float64, device=device)

    def add(self, x_BD: Tensor, h: Codes, y_BD: Tensor):
        x, y, made = x_BD.double(), y_BD.double(), (h.times(self._g_GD) + self._bias_D).double()
        self._rows += len(x)
        self._sum_D += x.sum(0)
        self._square += float(x.square().sum())
        self._error += float((x - y).square().sum())
        self._noise += float((x - made).square().sum())
        self._length += float(y.square().sum())
        self._dot += float((x * y).sum())

    def mean_D(self) -> Tensor:
        return self._sum_D / self._rows

    def _spread(self) -> float:
        return self._square - self._rows * float(self.mean_D().square().sum())

    def fvu(self) -> float:
        return self._error / self._spread()

    def noise_fvu(self) -> float:
        return self._noise / self._spread()

    def gamma(self) -> float | None:
        return self._length / self._dot if self._dot else None


def _firings(codes: Codes) -> Tensor:
    """(F) int64 on the CPU: rows on which each feature fires."""
    return torch.bincount(codes.pairs().feature_N, minlength=codes.n_features).cpu()


def _signs(codes: Codes) -> Tensor:
    """(F, B) int8: -1, 0 or 1."""
    row_N, feature_N, value_N = codes.pairs()
    signs_FB = torch.zeros(codes.n_features, codes.batch, dtype=torch.int8, device=codes.device)
    signs_FB[feature_N, row_N] = value_N.sign().to(torch.int8)
    return signs_FB
