"""Activations whose features are known: sparse sums of drawn directions, the ground truth that recovery is measured against.

    truth = preset("small", seed=1).draw()
    print(truth.drawn)                                          # what was drawn, not what was asked for
    x_BD, h = truth.sample(0, 4096)                             # the same rows whenever they are asked for
    sae = sk.train(sk.TopK(k=8), truth, out="saes/synthetic")   # it is a source of rows like a store

Features i = 1 … G:
1. Directions g_i, unit, random; some steps of descent on Σ_{i≠j} (g_i·g_j)⁴ spread them.
2. Frequencies q_i ∝ 1/(i + β), summing to the mean L0, β the smallest that keeps q_1 ≤ q_max; shuffled over the features.
3. Firing: u = A ε + √(1−ρ) η with ε, η normal and rows of A of norm √ρ; feature i fires where u_i > Φ⁻¹(1 − q_i). ρ is the
   correlation of u at its largest, not that of the firings.
4. Families: a child fires only where its parent does, with probability q_child / q_parent of its own (at most 0.9); of
   siblings that exclude each other one of those that would fire is kept.
5. Strength h_i = max(0.05, m_i + 0.25 m_i N(0, 1)), m_i lognormal(0, 0.25); bidirectional features get a random sign.
6. x = Σ_i h_i g_i + bias + noise.

Rows come in chunks with a generator each, keyed by (seed, number of the chunk): any range is produced alone, to the bit.

B rows of a chunk · D width · G features · R rank of A · N firings of a chunk
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from saekit_kernels import Codes
from torch import Tensor

from saekit.errors import SaekitError
from saekit.store.batches import Batches
from saekit.store.format import TokenTable, canonical_json
from saekit.store.rows import STATISTICS_ROWS, RowSource, Statistics, Window, statistics_of
from saekit.trainer import generator

GENERATOR = "saekit-synthetic 1"
"""Part of every fingerprint; another number where the same options would give other rows."""
SITE = "synthetic"
CHUNK = 1024
"""Rows of one generator; also a sequence, so that whole chunks are held out."""
WINDOW_ROWS = 1 << 15
"""Rows that are mixed at once in training. They are independent: more would change nothing."""
STATISTICS_DEFAULT = 1 << 17
DRAWN_ROWS = 1 << 16
"""Rows over which frequencies are counted."""
OWN_AT_MOST = 0.9
SPREAD_STEP = 0.1
"""Radians that the fastest direction turns in the first step; later steps are shorter, down to 0."""


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Options of a ground truth; `draw()` draws it."""

    features: int = 512
    """G, the number of true features."""
    width: int = 128
    """D, the number of dimensions."""
    l0: float = 8.0
    """Mean number of features that fire on a row, before families take some away."""
    q_max: float = 0.4
    """Frequency of the most frequent feature, at most."""
    rho: float = 0.15
    """How far common causes decide the firings: 0 = independent, below 1."""
    rank: int = 8
    """Number of common causes."""
    parents: int = 0
    """Features that have children; drawn from the more frequent half."""
    children: int = 3
    """Children of each parent; drawn from the less frequent half."""
    exclusive: bool = False
    """At most one of the children of a parent fires on a row."""
    bidirectional: float = 0.0
    """Share of the features whose strength has a random sign."""
    noise: float = 0.05
    """Standard deviation of the noise in each dimension."""
    bias: float = 1.0
    """Norm of the constant that is added to every row, in a random direction."""
    spread: int = 0
    """Steps that move the directions apart."""
    seed: int = 0
    """Everything is drawn from (seed, purpose); no purpose is one of the trainer's."""
    rows: int = 4_000_000
    """Rows of one epoch, held-out ones included. `sample` gives rows beyond them too."""

    def __post_init__(self):
        for name, least in (("features", 1), ("width", 1), ("rank", 1), ("rows", 1), ("spread", 0), ("parents", 0)):
            if getattr(self, name) < least:
                raise SaekitError(f"{name} = {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.q_max < 1:
            raise SaekitError(f"q_max = {self.q_max} is no frequency; pass a number above 0 and below 1")
        if not 0 < self.l0 <= self.features * self.q_max:
            raise SaekitError(
                f"l0 = {self.l0} cannot be reached by {self.features} features that fire on at most {self.q_max} of the rows; "
                "lower l0, or raise features or q_max"
            )
        if not 0 <= self.rho < 1:
            raise SaekitError(f"rho = {self.rho} is no correlation; pass 0 or more, below 1")
        if not 0 <= self.bidirectional <= 1:
            raise SaekitError(f"bidirectional = {self.bidirectional} is no share; pass a number from 0 to 1")
        if self.parents and (self.children < 1 or self.parents * max(1, self.children) > self.features // 2):
            raise SaekitError(
                f"parents = {self.parents} with children = {self.children} each do not fit; the children, at least 1 each, "
                f"are drawn from half of {self.features} features"
            )
        if self.noise < 0 or self.bias < 0:
            raise SaekitError(f"noise = {self.noise}, bias = {self.bias}; neither can be below 0")

    def draw(self) -> "Truth":
        """The directions, frequencies, families and strengths; rows come from its `sample`."""
        return Truth(self)


PRESETS = {
    "tiny": Synthetic(features=64, width=32, l0=4.0, parents=4, spread=10, rows=2_000_000),
    "small": Synthetic(features=512, width=128, l0=8.0, parents=32, spread=10),
    "large": Synthetic(features=16_384, width=768, l0=32.0, parents=1024, rows=50_000_000),
}
"""tiny learns in seconds, small in minutes, large wants a GPU."""


def preset(name: str, **changes) -> Synthetic:
    """Options of that name, with `changes`. Raises SaekitError for an unknown name."""
    if name not in PRESETS:
        raise SaekitError(f"no preset {name!r}; choose {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


class Sample(NamedTuple):
    """Some rows and what they are made of."""

    x_BD: Tensor
    """(B, D) float32."""
    h: Codes
    """(B, G) flat: strengths of the features that fire."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a draw came out as."""

    l0: float
    """Mean number of features that fire on a row."""
    q_min: float
    """Frequency of the rarest feature."""
    q_max: float
    """Frequency of the most frequent one."""
    max_cos: float
    """Largest |cosine| of two directions."""
    noise_fvu: float
    """Share of the variance that is noise: FVU of a reconstruction that knows the features exactly."""

    def __str__(self) -> str:
        return (
            f"L0 {self.l0:.2f}, features fire on {self.q_min:.2g} to {self.q_max:.2g} of the rows, largest |cos| {self.max_cos:.2f}, "
            f"noise is {100 * self.noise_fvu:.2g} % of the variance"
        )


class Truth(RowSource):
    """A ground truth, and the rows made from it; made by `Synthetic.draw`."""

    def __init__(self, options: Synthetic):
        self.options = options
        G, D = options.features, options.width
        digest = sha256(canonical_json({"generator": GENERATOR, **dataclasses.asdict(options)}))
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        self.path = f"synthetic data ({G:,} features in {D} dimensions, seed {options.seed})"
        self.sites, self.rows, self.n_tokens, self.dtype = (SITE,), options.rows, options.rows, torch.float32
        self.n_sequences = -(-options.rows // CHUNK)
        self.manifest = {
            "model": {
                "id": "synthetic",
                "revision": None,
                "weights_fingerprint": self.fingerprint,
                "processing": "raw",
                "layers": None,
            },
            "tokenizer": None,
            "context_length": CHUNK,
            "special_tokens": {"prepend_bos": False, "dropped_ids": []},
            "dtype": "float32",
            "sites": {SITE: {"d": D}},
        }

        self.g_GD = spread(_unit(self._normal("directions", G, D)), options.spread)
        """(G, D) unit directions."""
        order_G = torch.randperm(G, generator=self._generator("order")).numpy()
        self.asked_q_G = np.empty(G)
        """(G) float64: frequencies of step 2; children that exclude each other, or are as frequent as their parent, fire less."""
        self.asked_q_G[order_G] = frequencies(G, options.l0, options.q_max)
        self.parent_G = self._families(order_G)
        """(G) int64: parent of each feature, -1 for most."""
        self.magnitude_G = torch.exp(0.25 * self._normal("magnitudes", G))
        """(G) m_i, the mean strength."""
        self.bidirectional_G = torch.zeros(G, dtype=torch.bool)
        """(G) whether the sign of the strength is random."""
        both = torch.randperm(G, generator=self._generator("signs"))[: round(options.bidirectional * G)]
        self.bidirectional_G[both] = True
        self.bias_D = options.bias * _unit(self._normal("bias", 1, D))[0]
        """(D)."""

        child_G = self.parent_G >= 0
        own_G = np.where(
            child_G, np.minimum(OWN_AT_MOST, self.asked_q_G / self.asked_q_G[self.parent_G]), self.asked_q_G
        )
        loadings_GR = math.sqrt(options.rho) * _unit(self._normal("loadings", G, options.rank))
        # u > t is η > (t − A ε) / √(1−ρ)
        rest = math.sqrt(1 - options.rho)
        self._limit_G = (torch.special.ndtri(1 - torch.from_numpy(own_G)) / rest).float()
        self._loadings_RG = (-loadings_GR / rest).T.contiguous()
        # of a pair's place in the (B, G) matrix: the way to its parent's, 0 for who has none
        self._to_parent_G = np.where(child_G, self.parent_G - np.arange(G), 0)
        # of torch's seeds 32 bits count: consecutive ones are never the same
        self._rows_seed = self._generator("rows").initial_seed()

    def __repr__(self) -> str:
        return f"<Truth: {self.path}>"

    def sample(self, start: int, n: int) -> Sample:
        """Rows start to start + n - 1; a function of the options and of their numbers alone."""
        assert start >= 0 and n >= 1
        parts = []
        for chunk in range(start // CHUNK, -(-(start + n) // CHUNK)):
            lo, hi = max(0, start - chunk * CHUNK), min(CHUNK, start + n - chunk * CHUNK)
            x_BD, h = self._chunk(chunk)
            parts.append(Sample(x_BD[lo:hi], h.rows(lo, hi)) if hi - lo < CHUNK else Sample(x_BD, h))
        if len(parts) == 1:
            return parts[0]
        return Sample(torch.cat([part.x_BD for part in parts]), Codes.concatenate([part.h for part in parts]))

    @cached_property
    def q_G(self) -> np.ndarray:
        """(G) float64: share of the first 65,536 rows on which each feature fires."""
        count_G = np.zeros(self.options.features, np.int64)
        for start in range(0, DRAWN_ROWS, CHUNK):
            count_G += np.bincount(self._chunk(start // CHUNK).h.indices.numpy(), minlength=len(count_G))
        return count_G / DRAWN_ROWS

    @cached_property
    def drawn(self) -> Drawn:
        """What was drawn, rather than asked for."""
        noise = self.options.width * self.options.noise**2
        return Drawn(
            l0=float(self.q_G.sum()),
            q_min=float(self.q_G.min()),
            q_max=float(self.q_G.max()),
            max_cos=max((float(cos.abs().max()) for _, cos in _cosines(self.g_GD)), default=0.0),
            noise_fvu=noise / self.statistics(SITE).total_variance,
        )

    def read_table(self) -> TokenTable:
        """One token of id 0 for each row; a chunk is a sequence and a document."""
        starts = self.seq_rows()
        return TokenTable(
            token=np.zeros(self.rows, np.uint16),
            stored=np.ones(self.rows, np.bool_),
            seq_start=starts,
            run_start=starts[:-1],
            run_doc=np.arange(self.n_sequences),
            run_position=np.zeros(self.n_sequences, np.int64),
        )

    def seq_rows(self) -> np.ndarray:
        return np.minimum(np.arange(self.n_sequences + 1) * CHUNK, self.rows)

    def outliers(self, sites: str | Sequence[str]) -> np.ndarray:
        """None: what is drawn is meant."""
        self._require(sites)
        return np.zeros(0, np.int64)

    def statistics(self, site: str, rows: int | None = None) -> Statistics:
        """Of the first rows in text order; None = 131,072."""
        self._require(site)
        count = min(STATISTICS_DEFAULT if rows is None else rows, self.rows)
        starts = range(0, count, STATISTICS_ROWS)
        return statistics_of((self.sample(lo, min(STATISTICS_ROWS, count - lo)).x_BD for lo in starts), None)

    def batches(self, sites: str | Sequence[str], *, batch: int, **options) -> Batches:
        """As a store gives them with `block="sequence"`, in windows of 32,768 rows whatever `ram` allows."""
        ram = max(batch, WINDOW_ROWS) * self.row_bytes(SITE)
        with warnings.catch_warnings():
            # rows next to each other have nothing in common here
            warnings.filterwarnings("ignore", message="a window of")
            return super().batches(sites, batch=batch, **{**options, "block": "sequence", "ram": ram})

    def windows(self, sites: Sequence[str]) -> "TruthWindows":
        return TruthWindows(self)

    def _chunk(self, number: int) -> Sample:
        rng = torch.Generator().manual_seed(self._rows_seed + number)
        G, o = self.options.features, self.options
        common_BR = torch.randn(CHUNK, o.rank, generator=rng)
        own_BG = torch.empty(CHUNK, G).normal_(generator=rng)
        fires = (own_BG > torch.addmm(self._limit_G, common_BR, self._loadings_RG)).numpy().reshape(-1)
        place_N = np.flatnonzero(fires)
        feature_N = place_N % G
        if o.parents:
            place_N = place_N[fires[place_N + self._to_parent_G[feature_N]]]
            if o.exclusive:
                place_N = self._one_sibling(place_N, rng)
            feature_N = place_N % G
        features = torch.from_numpy(feature_N)
        per_row = np.bincount(place_N // G, minlength=CHUNK)
        row_ptr = torch.from_numpy(np.concatenate([[0], np.cumsum(per_row)]))

        strength_N = 1 + 0.25 * torch.randn(len(features), generator=rng)
        strength_N = (strength_N * self.magnitude_G[features]).clamp_min_(0.05)
        if o.bidirectional:
            negative = torch.rand(len(features), generator=rng) < 0.5
            strength_N = torch.where(negative & self.bidirectional_G[features], -strength_N, strength_N)
        h = Codes.flat(row_ptr, features, strength_N, G)
        x_BD = h.times(self.g_GD) + self.bias_D
        if o.noise:
            x_BD.add_(torch.empty_like(x_BD).normal_(generator=rng), alpha=o.noise)
        return Sample(x_BD, h)

    def _one_sibling(self, place_N: np.ndarray, rng: torch.Generator) -> np.ndarray:
        """The places left when of the children of one parent in one row a random one stays."""
        G = self.options.features
        parent_N = self.parent_G[place_N % G]
        children = np.flatnonzero(parent_N >= 0)
        family = place_N[children] // G * G + parent_N[children]
        lot = torch.rand(len(children), generator=rng).numpy()
        order = np.lexsort((lot, family))
        first = np.diff(family[order], prepend=-1) != 0
        keep = parent_N < 0
        keep[children[order[first]]] = True
        return place_N[keep]

    def _families(self, order_G: np.ndarray) -> np.ndarray:
        """(G) parents; `order_G` is the features from the most frequent to the rarest."""
        parent_G, o = np.full(len(order_G), -1), self.options
        rng, half = self._generator("families"), (len(order_G) + 1) // 2
        frequent = torch.randperm(half, generator=rng).numpy()[: o.parents]
        rare = half + torch.randperm(len(order_G) - half, generator=rng).numpy()[: o.parents * o.children]
        if o.parents:
            parent_G[order_G[rare]] = np.repeat(order_G[frequent], o.children)
        return parent_G

    def _generator(self, purpose: str) -> torch.Generator:
        return generator(self.options.seed, f"synthetic {purpose}")

    def _normal(self, purpose: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator(purpose))


class TruthWindows:
    """What `Batches` reads from: the chunks of one window, while a thread makes those of the next."""

    def __init__(self, truth: Truth):
        self._truth = truth
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="saekit-synthetic")
        self._made: dict[tuple[int, int], Future[Tensor]] = {}
        self._first = np.zeros(0, np.int64)
        self._values = torch.empty(0)

    def prepare(self, window: Window, following: Window | None) -> None:
        made = self._made.pop(window[:2], None) or self._maker.submit(self._make, window.first)
        self._first, self._values = window.first, made.result()
        if following is not None:
            self._made[following[:2]] = self._maker.submit(self._make, following.first)

    def gather(self, site: str, rows: np.ndarray) -> Tensor:
        chunk = np.searchsorted(self._first, rows, side="right") - 1
        return self._values.index_select(0, torch.from_numpy(chunk * CHUNK + rows - self._first[chunk]))

    def close(self) -> None:
        self._maker.shutdown(wait=False, cancel_futures=True)

    def _make(self, first: np.ndarray) -> Tensor:
        """The chunks that begin with these rows, one behind the other."""
        return torch.cat([self._truth._chunk(row // CHUNK).x_BD for row in first.tolist()])


def frequencies(n: int, l0: float, q_max: float) -> np.ndarray:
    """(n) float64, descending: c / (i + β), i = 1 … n, with sum l0 and β ≥ 0 the smallest that keeps the first ≤ q_max."""
    i = np.arange(1, n + 1)

    def q(beta: float) -> np.ndarray:
        return l0 / (1 / (i + beta)).sum() / (i + beta)

    if q(0.0)[0] <= q_max:
        return q(0.0)
    low, high = 0.0, 1.0
    # q(β)[0] falls towards l0 / n, which may be q_max itself
    while q(high)[0] > q_max and high < 1e9:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if q(middle)[0] > q_max else (low, middle)
    return q(high)


def spread(g_GD: Tensor, steps: int) -> Tensor:
    """Unit directions after `steps` steps of descent on Σ_{i≠j} (g_i·g_j)⁴."""
    for step in range(steps):
        slope_GD = torch.empty_like(g_GD)
        for lo, cos in _cosines(g_GD):
            slope_GD[lo : lo + len(cos)] = cos**3 @ g_GD
        slope_GD -= (slope_GD * g_GD).sum(1, keepdim=True) * g_GD
        fastest = slope_GD.norm(dim=1).max().clamp_min(1e-30)
        g_GD = _unit(g_GD - SPREAD_STEP * (1 - step / steps) / fastest * slope_GD)
    return g_GD


def _cosines(g_GD: Tensor):
    """(first row, cosines of some rows with all, 0 with themselves), for all rows."""
    for lo in range(0, len(g_GD), 1024):
        cos = g_GD[lo : lo + 1024] @ g_GD.T
        cos.diagonal(lo).zero_()
        yield lo, cos


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
