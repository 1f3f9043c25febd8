"""A small store, written by the writer, in the shape that a test needs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saekit.store.format import TokenTable
from saekit.store.writer import TORCH_DTYPES, StoreWriter


def table(sequences: int, context: int = 32, doc_tokens: int = 50) -> TokenTable:
    """BOS (id 0, no row) and then text; documents of `doc_tokens` tokens each, so that they cross the sequences."""
    token = np.arange(sequences * context) % 251 + 2
    token[::context] = 0
    text = np.flatnonzero(token)
    number = np.arange(len(text))
    # A run begins with a document, and behind each BOS.
    begins = np.flatnonzero((number % doc_tokens == 0) | (number % (context - 1) == 0))
    return TokenTable(
        token=token.astype(np.uint16),
        stored=token != 0,
        seq_start=np.arange(sequences + 1) * context,
        run_start=text[begins],
        run_doc=number[begins] // doc_tokens,
        run_position=number[begins] % doc_tokens,
    )


def plan(widths: dict[str, int], *, dtype="float32", context=32, shard_mb=0.125, batch_sequences=4, **changes) -> dict:
    return {
        "model": {"id": "m", "revision": None, "weights_fingerprint": "sha256:51b2aaaa", "layers": 2},
        "tokenizer": {"id": "m", "fingerprint": "sha256:9a4dbbbb", "vocab_size": 300},
        "text": {"source": "stdlib", "revision": None, "packing": "join", "attention_across_documents": True},
        "context_length": context,
        "batch_sequences": batch_sequences,
        "special_tokens": {"prepend_bos": True, "separator": "eos", "dropped_ids": [0]},
        "dtype": dtype,
        "sites": {site: {"d": d, "norm_multiple": 10.0} for site, d in widths.items()},
        "environment": {"torch": "2.13.0", "device": "cpu"},
        "settings": {"shard_mb": shard_mb},
        **changes,
    }


def own_number(rows: np.ndarray, d: int, shift: int) -> np.ndarray:
    """(n, d) float32: the row's number, plus the number of its site, and ones."""
    x = np.ones((len(rows), d), np.float32)
    x[:, 0] = rows + shift * 0.25
    return x


def put_text(writer: StoreWriter, whole: TokenTable, documents=7, n_bytes=1234):
    """Commits the parts of a table that are not there yet."""
    done = writer.text_state["sequences"] if writer.text_state else 0
    while done < whole.n_sequences:
        end = min(done + writer.shard_sequences, whole.n_sequences)
        position = int(whole.seq_start[end])
        state = {
            "documents": documents,
            "bytes": n_bytes,
            "sequences": end,
            "tokens": position,
            "rows": int(whole.stored[:position].sum()),
            "last": end == whole.n_sequences,
        }
        writer.part(whole.sequences(done, end), state)
        done = end


def write(out: Path, sequences: int, widths: dict[str, int], values=own_number, limits=None, **options) -> Path:
    """A finished store whose rows come from `values(row numbers, d, number of the site)`."""
    settings = plan(widths, **options)
    with StoreWriter(out, settings) as writer:
        if writer.finished:
            return out
        put_text(writer, table(sequences, settings["context_length"]))
        if writer.norm_limits is None:
            writer.fix_norm_limits({site: (limits or {}).get(site) for site in widths})
        first = 0
        for i in range(writer.n_shards):
            rows = np.arange(first, first + writer.rows(i))
            first += len(rows)
            if i not in writer.committed:
                dtype = TORCH_DTYPES[settings["dtype"]]
                writer.put(
                    i,
                    {
                        site: torch.from_numpy(values(rows, d, s)).to(dtype)
                        for s, (site, d) in enumerate(widths.items())
                    },
                )
        return writer.finish()


@pytest.fixture
def write_store(tmp_path):
    """`write_store(sequences, {site: d}, …)` -> folder of a new store."""
    return lambda sequences, widths, name="acts", **options: write(tmp_path / name, sequences, widths, **options)


@pytest.fixture(scope="session")
def numbered(tmp_path_factory) -> Path:
    """3,000 sequences of 31 rows and 38 shards; each row holds its own number at sites `a` (d = 16) and `b` (d = 4)."""
    return write(tmp_path_factory.mktemp("store") / "numbered", 3000, {"a": 16, "b": 4}, shard_mb=80 * 32 * 64 / 2**20)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """A bfloat16 store of 20 sequences in five shards, sites `a` (d = 6, row 77 an outlier) and `b` (d = 3). Not to be changed."""

    def values(rows, d, site):
        x = np.cos(np.outer(rows + 1.0, np.arange(d) + 1 + site)).astype(np.float32)
        x[rows == 77] *= 100
        return x

    out, limits = tmp_path_factory.mktemp("store") / "pristine", {"a": 20.0, "b": None}
    return write(out, 20, {"a": 6, "b": 3}, values, limits, shard_mb=1e-6, dtype="bfloat16")


@pytest.fixture
def plan_of():
    return plan


@pytest.fixture
def table_of():
    return table


@pytest.fixture
def text_into():
    return put_text
