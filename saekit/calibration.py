"""Thresholds of the finished SAE, exact for the rows they are taken from.

    encoder = Encoder.of(sae)
    theta, n_rows = batch_threshold(encoder, rows, k, guess)                   # one for all features, k per row on average
    n = rows_for_columns(density_F)
    theta_F, n_rows = column_thresholds(encoder, rows, density_F, guess_F)     # one per feature, its own share of the rows
    mean_F = mean_codes(sae.encode, rows)                                      # for the sign of signed features

A threshold is a rank: R of N rows' pre-activations are to lie above it, and it stands midway between the R-th and the
(R+1)-th largest positive one. Nothing of size (N, F) is ever held:

1. Collect the pre-activations above a bar, 0.8 × the guess. Whenever more come than ranks can need, with a quarter to
   spare, drop the smallest and raise the bar to the last one kept.
2. N is known now, and with it R. Where at least R + 1 were collected, or the bar was 0, the answer is among them.
3. Else the guess or the first rows misled: again, for these columns alone, from a bar of 0, which rises as soon as R + 1
   are held. This cannot fail, so there are two passes at most, and what was guessed costs time, never exactness.

Every row set is cut into the same pieces however it comes in chunks, so the same rows give the same bits.

n rows in a chunk · N rows in all · D width · F features · G ranked groups: one, or one per feature · P collected
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from saekit_kernels import Codes, Threshold, Workspace, encode_select
from torch import Tensor

from saekit.errors import SaekitError

if TYPE_CHECKING:
    from saekit.sae import SAE

Rows = Callable[[], Iterator[Tensor]]
"""Chunks (n, D) float32 of raw rows; the same rows in the same order each time it is called."""

# a bar of 0 lets half of a piece through: 4 M pre-activations
PIECE_ELEMENTS = 1 << 23
MEAN_ROWS = 1024
# so many may be held above what is needed before they are sorted
SLACK = 1 << 18
# non-negative float32 have bits from 0 to this, in the order of their values
TOP_BITS = 0x7FFFFFFF


class Encoder(NamedTuple):
    """pre = (x − b_dec) W_encᵀ + b_enc"""

    W_enc_FD: Tensor
    b_enc_F: Tensor
    b_dec_D: Tensor

    @classmethod
    def of(cls, sae: "SAE") -> "Encoder":
        """The encoder of an SAE: the tensors themselves."""
        return cls(sae.W_enc, sae.b_enc, sae.b_dec)


class BatchThreshold(NamedTuple):
    """What `batch_threshold` returns."""

    theta: float
    """A float32 value; 0 if fewer than k·N + 1 pre-activations are positive."""
    n_rows: int
    """N."""


class ColumnThresholds(NamedTuple):
    """What `column_thresholds` returns."""

    theta_F: Tensor
    """float32, on the encoder's device; 0 where a column has fewer than R_j + 1 positive pre-activations."""
    n_rows: int
    """N."""


def batch_threshold(encoder: Encoder, rows: Rows, k: int, guess: float) -> BatchThreshold:
    """θ midway between the (k·N)-th and the (k·N + 1)-th largest positive pre-activation of all rows and features.

    `pre > θ` then holds for exactly k·N pairs. Equal values on both sides of the boundary are θ themselves and all left
    out, so that there are fewer. `guess`, the running threshold of training, is where to begin; 0 if there is none.
    Holds about 1.5·k·N numbers of 4 bytes, twice that while it sorts.

    Raises SaekitError for a guess or pre-activations that are not finite.
    """
    theta_G, n_rows = _thresholds(encoder, rows, torch.tensor([float(k)]), torch.tensor([guess]))
    return BatchThreshold(theta_G.item(), n_rows)


def column_thresholds(encoder: Encoder, rows: Rows, density_F: Tensor, guess_F: Tensor) -> ColumnThresholds:
    """θ_j midway between ranks R_j and R_j + 1 of column j's positive pre-activations, R_j = max(1, round(N·density_j)).

    `pre > θ_j` then holds for exactly R_j rows; ties as in `batch_threshold`. The second pass multiplies by some rows of
    W_enc only, which may round the last bit otherwise than the product of all. Holds about 1.5·Σ R_j numbers of 8 bytes,
    twice that while it sorts.

    Raises SaekitError for a guess or pre-activations that are not finite.
    """
    theta_G, n_rows = _thresholds(encoder, rows, density_F, guess_F)
    return ColumnThresholds(theta_G.to(encoder.W_enc_FD.device), n_rows)


def rows_for_columns(density_F: Tensor, start: int = 262_144, most: int = 4_000_000) -> int:
    """Rows for `column_thresholds`: `start`, or as many as give the median feature R_j ≥ 20, at most `most`."""
    return max(start, min(most, int(np.ceil(20 / density_F.double().median().item()))))


@torch.no_grad()
def mean_codes(encode: Callable[[Tensor], Codes], rows: Rows) -> Tensor:
    """Mean code of each feature over all rows, those where it does not fire included: float64 (F), on the CPU.

    `encode` gets at most 1,024 rows at a time, on the device they come from. Raises SaekitError for codes that are not finite.
    """
    sum_F, n_rows = torch.zeros(()), 0
    for x_BD in _pieces(rows, MEAN_ROWS):
        codes = encode(x_BD)
        values_P = codes.values.reshape(-1).cpu().double()
        _check_finite(values_P)
        # on the CPU one after the other: atomic additions of a GPU come in any order
        sum_F = sum_F + torch.bincount(codes.indices.reshape(-1).cpu(), values_P, codes.n_features)
        n_rows += len(x_BD)
    assert n_rows, "no rows to take a mean of"
    return sum_F / n_rows


@torch.no_grad()
def _thresholds(encoder: Encoder, rows: Rows, density_G: Tensor, guess_G: Tensor) -> tuple[Tensor, int]:
    """(θ of each group: float32 on the CPU, N); one group of all features, or one per feature."""
    density_G, guess_G = density_G.detach().double().cpu(), guess_G.detach().float().cpu()
    if not bool(guess_G.isfinite().all()):
        raise SaekitError(
            "the running threshold of training is NaN or infinite, so there is nothing to calibrate; lower --lr"
        )

    def enough(n: int) -> Tensor:
        """Of n of the rows: a quarter above the mean, and chance."""
        share_G = n * density_G
        return (1.25 * share_G + 8 * share_G.sqrt() + 16).ceil().long()

    found = _Largest(0.8 * guess_G.clamp(min=0))
    n_rows = _collect(encoder, rows, found, enough)
    rank_G = (n_rows * density_G).round().clamp(min=1).long()
    theta_G, short_G = found.midway(rank_G)
    if bool(short_G.any()):
        if len(density_G) > 1:
            at = short_G.to(encoder.W_enc_FD.device)
            encoder = encoder._replace(W_enc_FD=encoder.W_enc_FD[at], b_enc_F=encoder.b_enc_F[at])
        found = _Largest(torch.zeros(int(short_G.sum())))
        again = _collect(encoder, rows, found, lambda n: rank_G[short_G] + 1)
        assert again == n_rows, f"{n_rows} rows, then {again}: calibration needs the same ones twice"
        theta_G[short_G] = found.midway(rank_G[short_G]).theta_G
    return theta_G, n_rows


class _Midway(NamedTuple):
    theta_G: Tensor
    """float32."""
    short_G: Tensor
    """bool: the groups whose θ lies below the bar, so that it is not known."""


class _Largest:
    """The largest positive values of each group in a stream. What was dropped is at most `bar_G`, what is held at least.

    One number per value, whose order is (group, value descending): the bits of the value counted down from the top, and
    the group above them if there are several.
    """

    def __init__(self, bar_G: Tensor):
        self.bar_G = bar_G
        self.several = len(bar_G) > 1
        self.held = np.empty(0, np.int64 if self.several else np.int32)
        self.start = np.zeros(len(bar_G) + 1, np.int64)
        self.new: list[np.ndarray] = []
        self.count = 0

    def add(self, codes: Codes):
        """Takes in codes that are all above the bars."""
        value_P = codes.values.cpu()
        _check_finite(value_P)
        order_P = TOP_BITS - value_P.view(torch.int32)
        if self.several:
            order_P = (codes.indices.cpu().long() << 32) | order_P
        self.new.append(order_P.numpy())
        self.count += len(value_P)

    def keep(self, most_G: Tensor):
        """Drops all but the `most_G` largest of each group, and raises the bars of the groups that have as many."""
        self._sort()
        kept = np.minimum(np.diff(self.start), most_G.numpy())
        last_G = self._at(most_G - 1)
        self.held = np.concatenate([self.held[lo : lo + n] for lo, n in zip(self.start[:-1], kept)])
        self.start = np.concatenate([[0], np.cumsum(kept)])
        self.count = len(self.held)
        self.bar_G = torch.maximum(self.bar_G, last_G)

    def midway(self, rank_G: Tensor) -> _Midway:
        """The threshold that leaves `rank_G` values of each group above it."""
        self._sort()
        upper_G, lower_G = self._at(rank_G - 1), self._at(rank_G)
        theta_G = ((upper_G.double() + lower_G.double()) / 2).float()
        # next to each other, and rounded upwards: nothing lies between them
        theta_G = torch.where(theta_G >= upper_G, lower_G, theta_G)
        few_G = torch.from_numpy(np.diff(self.start)) <= rank_G
        return _Midway(theta_G.masked_fill(few_G, 0), few_G & (self.bar_G > 0))

    def _sort(self):
        if self.new:
            self.held = np.concatenate([self.held, *self.new])
            self.new = []
            self.held.sort()
            groups = np.arange(1, len(self.bar_G), dtype=np.int64) << 32
            self.start = np.concatenate([[0], np.searchsorted(self.held, groups), [len(self.held)]])

    def _at(self, rank_G: Tensor) -> Tensor:
        """The value at a rank of each group, 0 for the largest; 0 where the group has too few."""
        at = self.start[:-1] + rank_G.numpy()
        inside = at < self.start[1:]
        bits = np.zeros(len(at), np.int32)
        bits[inside] = TOP_BITS - (self.held[at[inside]] & TOP_BITS)
        return torch.from_numpy(bits).view(torch.float32)


def _collect(encoder: Encoder, rows: Rows, found: _Largest, most: Callable[[int], Tensor]) -> int:
    """Gives every pre-activation above the bars to `found`, which need not keep more than `most(n)` of n rows; returns N."""
    F, D = encoder.W_enc_FD.shape
    device, workspace, n = encoder.W_enc_FD.device, Workspace(), 0
    for x_BD in _pieces(rows, max(1, PIECE_ELEMENTS // max(F, D))):
        theta = found.bar_G.to(device) if found.several else found.bar_G[0]
        out = encode_select(
            x_BD.to(device),
            encoder.W_enc_FD,
            encoder.b_enc_F,
            encoder.b_dec_D,
            rule=Threshold(theta),
            compute="fp32",
            workspace=workspace,
        )
        found.add(out.codes)
        n += len(x_BD)
        most_G = most(n)
        if found.count > 1.2 * int(most_G.sum()) + SLACK:
            found.keep(most_G)
    assert n, "no rows to calibrate on"
    return n


def _pieces(rows: Rows, size: int) -> Iterator[Tensor]:
    """The rows `size` at a time, the last piece smaller. Each piece is overwritten by the next."""
    piece_BD, n = torch.empty(0), 0
    for chunk_BD in rows():
        if not len(piece_BD):
            piece_BD = chunk_BD.new_empty(size, chunk_BD.shape[1])
        while len(chunk_BD):
            part_BD = chunk_BD[: size - n]
            # copied at once: whoever reads the rows may use their memory again
            piece_BD[n : n + len(part_BD)] = part_BD
            n, chunk_BD = n + len(part_BD), chunk_BD[len(part_BD) :]
            if n == size:
                yield piece_BD
                n = 0
    if n:
        yield piece_BD[:n]


def _check_finite(value_P: Tensor):
    if not bool(value_P.isfinite().all()):
        raise SaekitError(
            "rows of the training split give codes that are NaN or infinite; look for the rows with saekit check"
        )
