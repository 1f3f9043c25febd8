"""One pass of an SAE over a store: chunks of rows, codes and reconstructions to any number of consumers.

    encode_store(sae, store, site, [Reconstruction(…), IndexBuilder(…)])

Tier 1 of evaluate and the index builder are consumers: each has `update(chunk)` and `finish()`. Rows that the store marks
as outliers carry no code. n rows in a chunk · D model width · F features.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from saekit_kernels import Codes

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.sae import SAE
from saekit.store import Store

CHUNK_ROWS = 8192
CHUNK_CODES = 1 << 22
"""Where many features fire a chunk has fewer rows, so that it holds about so many codes at most."""


@dataclass(frozen=True)
class Chunk:
    rows: np.ndarray
    """Row numbers in the store, ascending (n) int64."""
    positions: np.ndarray
    """Token positions of these rows (n) int64."""
    sequences: np.ndarray
    """Sequence of each row (n) int64."""
    heldout: np.ndarray
    """Whether the row belongs to a held-out sequence (n) bool."""
    x_BD: torch.Tensor
    """Activations in the model's units (n, D) float32."""
    codes: Codes
    """Codes of the inference rule, in the model's units (n, F)."""
    xhat_BD: torch.Tensor
    """Reconstructions (n, D) float32."""


class Consumer(Protocol):
    def update(self, chunk: Chunk) -> None: ...

    def finish(self) -> None: ...


@torch.no_grad()
def encode_store(
    sae: SAE,
    store: Store,
    site: str,
    consumers: list[Consumer],
    *,
    rows: np.ndarray | None = None,
    name: str = "encode",
    progress: Progress | None = None,
):
    """Runs `sae` over `rows` of a site (ascending row numbers; None = all that are no outliers), in text order.

    `progress` is advanced where it is given, else there is one of this `name`.

    Raises SaekitError if the SAE's width is not the site's.
    """
    if sae.d_in != store.d(site):
        raise SaekitError(f"SAE expects D = {sae.d_in}, site {site} has {store.d(site)}")
    if rows is None:
        rows = store.valid_rows([site], split="all")
    positions, seq_rows = store.row_positions(), store.seq_rows()
    heldout = np.zeros(store.n_sequences, bool)
    heldout[store.heldout_sequences()] = True
    device = sae.W_enc.device
    start, size = 0, min(CHUNK_ROWS, max(1, CHUNK_CODES // sae.d_sae))
    with nullcontext(progress) if progress else Progress(name, len(rows), "tokens") as progress:
        while start < len(rows):
            part = rows[start : start + size]
            lo, hi = int(part[0]), int(part[-1]) + 1
            block = store.read(site, lo, hi)
            if hi - lo != len(part):
                block = block[torch.from_numpy(part - lo)]
            x_BD = block.to(device, torch.float32)
            codes = sae.encode(x_BD)
            sequences = np.searchsorted(seq_rows, part, side="right") - 1
            chunk = Chunk(part, positions[part], sequences, heldout[sequences], x_BD, codes, sae.decode(codes))
            for consumer in consumers:
                consumer.update(chunk)
            progress.advance(len(part))
            start += len(part)
            size = min(CHUNK_ROWS, max(1, CHUNK_CODES * len(part) // max(1, codes.values.numel())))
    for consumer in consumers:
        consumer.finish()
