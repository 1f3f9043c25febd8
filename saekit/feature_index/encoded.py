"""Codes at one position, and those of a text: of one that was typed, which is the one place of the reader that runs the
language model, or of a passage of the index.

    text = idx.encode("The cat sat")
    text.at(2), text.codes_of(123), text.strongest(20)
    idx.passage(idx.document_positions(3))

T tokens · D model width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saekit.errors import SaekitError
from saekit.feature_index.format import FLAGS

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex


class Firings(NamedTuple):
    features: np.ndarray
    """Feature numbers, by falling magnitude (int64)."""
    values: np.ndarray
    """Their codes (float32)."""


@dataclass(frozen=True)
class EncodedText:
    """Codes of a text. T tokens; rows of firings lie between `start[t]` and `start[t + 1]`."""

    tokens: np.ndarray
    pieces: tuple[bytes, ...]
    special: np.ndarray
    encoded: np.ndarray
    start: np.ndarray
    features: np.ndarray
    """By falling magnitude inside a token (int64)."""
    values: np.ndarray
    norm_x: np.ndarray
    error: np.ndarray
    """‖x − x̂‖² of each token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, t: int) -> Firings:
        """What fires on token t."""
        a, b = self.start[t], self.start[t + 1]
        return Firings(self.features[a:b], self.values[a:b])

    def codes_of(self, feature: int) -> np.ndarray:
        """Code of one feature on each token, 0 where it is silent (T) float32."""
        codes = np.zeros(len(self), np.float32)
        hits = np.flatnonzero(self.features == feature)
        codes[np.searchsorted(self.start, hits, side="right") - 1] = self.values[hits]
        return codes

    @property
    def l0(self) -> np.ndarray:
        """Features that fire on each token (T)."""
        return np.diff(self.start)

    @property
    def error_share(self) -> np.ndarray:
        """‖x − x̂‖² / ‖x‖² of each token, 0 where no code was computed (T) float32."""
        share = self.error / np.maximum(self.norm_x.astype(np.float32) ** 2, 1e-30)
        return np.where(self.encoded, share, 0).astype(np.float32)

    def strongest(self, limit: int = 20, *, hide_dense: "FeatureIndex | None" = None) -> Firings:
        """Features by their largest magnitude anywhere in the text, with that code."""
        order = np.lexsort((self.features, -np.abs(self.values)))
        features, first = np.unique(self.features[order], return_index=True)
        values = self.values[order][first]
        keep = np.ones(len(features), bool)
        if hide_dense is not None:
            keep = hide_dense.column("flags")[features] & FLAGS["dense"] == 0
        features, values = features[keep], values[keep]
        best = np.lexsort((features, -np.abs(values)))[:limit]
        return Firings(features[best], values[best])


def stored_text(index: "FeatureIndex", positions: np.ndarray) -> EncodedText:
    """Codes of a passage of the index, at the given positions in their order. Needs `by_token`, and no model."""
    positions = np.asarray(positions, np.int64)
    if not len(positions):
        raise SaekitError("the passage holds no token")
    if positions.min() < 0 or positions.max() >= index.n_tokens:
        raise SaekitError(f"a position does not exist; this index has 0 to {index.n_tokens - 1:,}")
    if not index.has_by_token:
        raise SaekitError(f"an index without by_token; run  saekit index {index.path.parent}")
    tokens, table, per_token = index.file("tokens"), index.file("by_token"), index.file("per_token")
    begin, count = table["start"][positions], table["start"][positions + 1] - table["start"][positions]
    ids, special = tokens["token"][positions].astype(np.int64), index.file("vocab")["special"]
    return EncodedText(
        tokens=ids,
        pieces=index.pieces(ids),
        special=special[np.minimum(ids, len(special) - 1)],
        encoded=tokens["encoded"][positions],
        start=np.concatenate([[0], np.cumsum(count)]),
        features=gather(table["feature"], begin, count).astype(np.int64),
        values=gather(table["value"], begin, count).astype(np.float32) * np.float32(index.scale),
        norm_x=per_token["norm_x"][positions],
        error=per_token["error"][positions],
    )


def gather(array: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """array[begin[i] : begin[i] + length[i]] for all i, joined."""
    place = np.repeat(begin - (np.cumsum(length) - length), length)
    place += np.arange(len(place))
    return np.take(array, place)


def encode_text(index: "FeatureIndex", text: str, *, sae=None, lm=None) -> EncodedText:
    """Codes of a text: the one call that needs the language model, loaded from the index's model entry if not given.

    `sae` and `lm` are objects of saekit.sae.SAE and saekit.model.LanguageModel. Raises SaekitError for an empty text and
    for one longer than the model's context as stored in config.json.
    """
    import torch

    from saekit.model import load_model
    from saekit.sae import SAE

    sae = sae or SAE.load(index.path.parent)
    lm = lm or load_model(index.manifest["model"]["id"])
    special = lm.tokenizer_entry()
    if special is None:
        raise SaekitError(f"{lm.id} has no tokenizer, so a text cannot be read")
    context = sae.config.get("context") or {}
    ids = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise SaekitError("the text holds no token; type something")
    if context.get("prepend_bos") and special["bos"] not in (None, ids[0]):
        ids = [special["bos"], *ids]
        if not lm.causal and special["eos"] is not None:
            # an encoder's text stands between [CLS] and [SEP]
            ids.append(special["eos"])
    limit = context.get("length")
    if limit and len(ids) > limit:
        raise SaekitError(f"the text has {len(ids):,} tokens, the SAE was trained on contexts of {limit:,}; shorten it")
    with torch.no_grad():
        x_TD = lm.capture(torch.tensor([ids]), [index.site])[index.site][0].float().to(sae.W_enc.device)
        codes = sae.encode(x_TD)
        error_T = (x_TD - sae.decode(codes)).square().sum(1)
        row_N, feature_N, value_N = (t.cpu().numpy() for t in codes.pairs())
    encoded = ~np.isin(ids, context.get("dropped_ids") or [])
    keep = encoded[row_N]
    row_N, feature_N, value_N = row_N[keep], feature_N[keep].astype(np.int64), value_N[keep]
    order = np.lexsort((feature_N, -np.abs(value_N), row_N))
    marked = index.file("vocab")["special"]
    tokens = np.array(ids, np.int64)
    return EncodedText(
        tokens=tokens,
        pieces=index.pieces(ids),
        special=marked[np.minimum(tokens, len(marked) - 1)],
        encoded=encoded,
        start=np.concatenate([[0], np.cumsum(np.bincount(row_N, minlength=len(ids)))]),
        features=feature_N[order],
        values=value_N[order],
        norm_x=x_TD.norm(dim=1).cpu().numpy(),
        error=error_T.cpu().numpy(),
    )
