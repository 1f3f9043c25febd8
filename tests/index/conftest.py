"""A store and an SAE in memory, random codes of every shape, and the index built from them."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from saekit_kernels import Codes

from saekit.feature_index.build import IndexBuilder
from saekit.feature_index.vocabulary import VocabBytes
from saekit.store.format import TokenTable


class MemoryStore:
    """What the builder needs of a store."""

    def __init__(self, table: TokenTable, tokenizer: bool = True, path: Path = Path("nowhere")):
        self.table, self.path, self.fingerprint = table, path, "sha256:store"
        self.manifest = {
            "model": {"id": "tiny", "weights_fingerprint": "sha256:model"},
            "tokenizer": {"fingerprint": "sha256:tokenizer"} if tokenizer else None,
        }

    def valid_rows(self, sites, split="all", outliers="skip"):
        return np.arange(int(self.table.stored.sum()))

    def seq_rows(self):
        return np.concatenate([[0], np.cumsum(self.table.stored)])[self.table.seq_start]


@dataclass
class Made:
    """An index with the truth it was made from: dense codes (N, F), zero where nothing was encoded."""

    index: object
    dense_NF: np.ndarray
    encoded_N: np.ndarray
    token_N: np.ndarray
    seq_N: np.ndarray
    builder: IndexBuilder
    sae: object
    x_ND: np.ndarray
    xhat_ND: np.ndarray


def words(V: int) -> list[bytes]:
    return [b"<s>", *(f" w{i}".encode() for i in range(1, V))]


@pytest.fixture
def make_index(tmp_path):
    """make_index(dense_NF, lengths=..., token_N=..., …) -> Made; unencoded = positions without codes."""

    def make(
        dense_NF,
        *,
        lengths=None,
        token_N=None,
        unencoded=(),
        signed=None,
        chunk=37,
        flat=True,
        pieces=None,
        tokenizer=True,
        folder=None,
        D=6,
        W_dec_FD=None,
        W_enc_FD=None,
        variant="topk",
        n_sequences=None,
        x_ND=None,
        buffers=None,
        sae_variant=None,
        site="blocks.0.hook_resid_post",
        **options,
    ):
        dense_NF = np.asarray(dense_NF, np.float32).copy()
        N, F = dense_NF.shape
        rng = np.random.default_rng(0)
        lengths = [N] if lengths is None else lengths
        assert sum(lengths) == N
        pieces = words(50) if pieces is None else pieces
        token_N = rng.integers(1, len(pieces), N) if token_N is None else np.asarray(token_N)
        encoded_N = np.ones(N, bool)
        encoded_N[list(unencoded)] = False
        dense_NF[~encoded_N] = 0
        seq_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        table = TokenTable(
            token_N.astype(np.uint16), encoded_N, seq_start, seq_start[:-1].copy(),
            np.arange(len(lengths), dtype=np.int64), np.zeros(len(lengths), np.int64),
        )  # fmt: skip
        folder = folder or tmp_path / "sae"
        folder.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(1)
        W_dec_FD = torch.randn(F, D, generator=generator) if W_dec_FD is None else W_dec_FD
        sae = SimpleNamespace(
            W_dec=W_dec_FD,
            W_enc=torch.randn(len(W_dec_FD), D, generator=generator) if W_enc_FD is None else W_enc_FD,
            b_enc=torch.arange(F, dtype=torch.float32),
            b_dec=torch.ones(D),
            site=site,
            config={
                "variant": variant,
                "signed": bool((dense_NF < 0).any()) if signed is None else signed,
                "fingerprint": "sha256:sae",
            },
        )
        if buffers is not None:
            sae.extra, sae.named_buffers = buffers, buffers.items
        if sae_variant is not None:
            sae.variant = sae_variant
        (folder / "config.json").write_text(json.dumps(sae.config))
        store = MemoryStore(table, tokenizer, folder)
        special = np.zeros(len(pieces), bool)
        special[0] = pieces[0] == b"<s>"
        vocab = VocabBytes.of(pieces, special) if tokenizer else None
        builder = IndexBuilder(sae, store, folder, vocab=vocab, n_sequences=n_sequences, **options)
        x_ND = rng.standard_normal((N, D)).astype(np.float32) if x_ND is None else x_ND
        xhat_ND = dense_NF @ W_dec_FD.numpy() + 1
        positions = np.flatnonzero(encoded_N)
        for lo in range(0, len(positions), chunk):
            at = positions[lo : lo + chunk]
            part = torch.from_numpy(dense_NF[at])
            if flat:
                row, feature = part.nonzero(as_tuple=True)
                ptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=len(at)).cumsum(0)])
                codes = Codes.flat(ptr, feature, part[row, feature], F)
            else:
                most = int((part != 0).sum(1).max())
                feature = part.abs().topk(most, dim=1).indices.sort(1).values
                codes = Codes.rowwise(part.gather(1, feature), feature, F)
            builder.update(
                SimpleNamespace(
                    rows=np.arange(lo, lo + len(at)), positions=at, codes=codes,
                    sequences=np.searchsorted(seq_start, at, side="right") - 1,
                    x_BD=torch.from_numpy(x_ND[at]), xhat_BD=torch.from_numpy(xhat_ND[at]),
                )
            )  # fmt: skip
        builder.finish()
        seq_N = np.searchsorted(seq_start, np.arange(N), side="right") - 1
        return Made(builder.index, dense_NF, encoded_N, token_N, seq_N, builder, sae, x_ND, xhat_ND)

    return make


def random_dense(seed: int, N: int, F: int, *, signed: bool, density: float = 0.2) -> np.ndarray:
    """Ragged codes of very different densities; some features dead, one dense, magnitudes over four decades."""
    rng = np.random.default_rng(seed)
    fires = rng.random((N, F)) < density * rng.random(F) ** 3
    fires[:, 0] = False
    fires[:, 1 % F] = rng.random(N) < 0.7
    size = np.exp(rng.normal(0, 1.5, (N, F)))
    if signed:
        size *= np.where(rng.random((N, F)) < rng.random(F), 1, -1)
    return np.where(fires, size, 0).astype(np.float32)


@pytest.fixture(params=["positive", "signed"])
def random_index(request, make_index) -> Made:
    """600 tokens in 9 sequences, 40 features, ragged, positive and signed, some positions not encoded."""
    dense_NF = random_dense(3, 600, 40, signed=request.param == "signed")
    lengths = [100, 3, 97, 100, 100, 1, 99, 50, 50]
    rng = np.random.default_rng(5)
    # few tokens, so that contexts repeat
    return make_index(
        dense_NF, lengths=lengths, token_N=rng.integers(1, 4, 600), unencoded=[0, 100, 203, 300, 301, 599]
    )
