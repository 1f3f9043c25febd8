"""What shuffling costs: rows per second of the reader in both modes, beside a copy of the same rows in text order.

python tests/benchmarks/store.py [--gib 2.25] [--rounds 7]

1. A store of random bfloat16 rows at D = 768 and one at D = 192, in a temporary folder, read once: all of it is in the page
   cache from then on.
2. Each round opens the store anew for every way of reading, one way behind the other, so that the machine's mood hits all.
3. Sequential is the same number of batches, in text order, by as many threads, as many batches ahead: rows copied out of the
   mapped files, which all ratios are of, and for comparison read from the files by the operating system.

B rows in a batch · D width of a site
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from saekit.store import Store, StoreWriter, TokenTable, open_store
from saekit.store.batches import AHEAD, THREADS
from saekit.store.reader import Buffers

SITE, CONTEXT, B = "blocks.0.hook_resid_post", 256, 4096
RAM = {"uniform": "1TiB", "blocks": "1.5GiB"}
"""The second is less than the store: windows of about 1.1 GiB, as large as they are without a limit at this batch."""


def make_store(out: Path, d: int, gib: float) -> Store:
    """A store of random bfloat16 rows (E, D) of about `gib` GiB, in shards of the usual size; every token has a row."""
    sequences = round(gib * 2**30 / (2 * d * CONTEXT))
    plan = {
        "model": {"id": "random", "revision": None, "weights_fingerprint": "sha256:0"},
        "tokenizer": None,
        "text": {"source": "random", "revision": None, "packing": "join", "attention_across_documents": True},
        "context_length": CONTEXT,
        "batch_sequences": 32,
        "special_tokens": {"prepend_bos": False, "separator": None, "dropped_ids": []},
        "dtype": "bfloat16",
        "sites": {SITE: {"d": d, "norm_multiple": None}},
        "environment": {"torch": torch.__version__, "device": "cpu"},
        "settings": {"shard_mb": 256},
    }
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(out, plan) as writer:
        writer.fix_norm_limits({SITE: None})
        for i, first in enumerate(range(0, sequences, writer.shard_sequences)):
            end = min(first + writer.shard_sequences, sequences)
            counts = {"sequences": end, "tokens": end * CONTEXT, "rows": end * CONTEXT}
            state = {"documents": end, "bytes": None, **counts, "last": end == sequences}
            writer.part(_table(end - first, first), state)
            x_ED = torch.randn(writer.rows(i), d, generator=generator)
            writer.put(i, {SITE: x_ED.bfloat16()})
        writer.finish()
    return open_store(out)


def _table(sequences: int, first: int) -> TokenTable:
    """Each sequence is a document of its own."""
    start = np.arange(sequences + 1) * CONTEXT
    return TokenTable(
        token=np.zeros(sequences * CONTEXT, np.uint16),
        stored=np.ones(sequences * CONTEXT, bool),
        seq_start=start,
        run_start=start[:-1],
        run_doc=first + np.arange(sequences),
        run_position=np.zeros(sequences, np.int64),
    )


def sequential(store: Store) -> Iterator[torch.Tensor]:
    """Rows copied out of the mapped files into new tensors, as `torch.clone` does."""
    return in_text_order(store, lambda lo: store.read(SITE, lo, lo + B).clone())


def sequential_again(store: Store) -> Iterator[torch.Tensor]:
    """The same into memory that is used again, as the shuffled reader does: nothing but the copy is left."""
    buffers, size = Buffers(), B * store.row_bytes(SITE)

    def read(lo: int) -> torch.Tensor:
        x_BD = torch.from_numpy(buffers.take(size)).view(store.dtype).view(B, store.d(SITE))
        return x_BD.copy_(store.read(SITE, lo, lo + B))

    return in_text_order(store, read)


def from_files(store: Store) -> Iterator[torch.Tensor]:
    """As many bytes read from the first shard's file, over and over; where they lie makes no difference to the speed."""
    path, size = store.files(SITE).paths[0], B * store.row_bytes(SITE)
    places = path.stat().st_size // size
    with open(path, "rb") as file:

        def read(lo: int) -> torch.Tensor:
            x_BD = torch.empty(B, store.d(SITE), dtype=store.dtype)
            read = os.preadv(file.fileno(), [x_BD.view(torch.uint8).numpy().data], lo // B % places * size)
            assert read == size
            return x_BD

        yield from in_text_order(store, read)


def in_text_order(store: Store, read: Callable[[int], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Batches by the reader's number of threads, as many ahead."""
    pending: deque = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for lo in range(0, store.rows - B + 1, B):
            pending.append(pool.submit(read, lo))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def shuffled(store: Store, ram: str) -> Iterator[torch.Tensor]:
    for batch in store.batches([SITE], batch=B, split="all", ram=ram):
        yield batch[SITE]


WAYS: dict[str, Callable[[Store], Iterator[torch.Tensor]]] = {
    "sequential": sequential,
    "sequential, same memory": sequential_again,
    "from files": from_files,
    "uniform": lambda store: shuffled(store, RAM["uniform"]),
    "blocks": lambda store: shuffled(store, RAM["blocks"]),
}


def rows_per_second(store: Store, way: str) -> float:
    """Over one epoch, from the call to the last batch; each batch is dropped at once."""
    start, n = time.perf_counter(), 0
    for x_BD in WAYS[way](store):
        n += len(x_BD)
    return n / (time.perf_counter() - start)


def measure(path: Path, rounds: int) -> dict[str, list[float]]:
    """Rows per second of every way of reading, one entry per round."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in ("sequential", "from files"):
        rows_per_second(open_store(path), way)
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(rows_per_second(open_store(path), way))
    return found


def report(d: int, found: dict[str, list[float]]) -> None:
    for way, speeds in found.items():
        ratios = sorted(a / b for a, b in zip(speeds, found["sequential"]))
        print(
            f"D = {d}, {d * 2:,} bytes a row, {way}: {statistics.median(speeds) / 1e6:.2f} M rows/s, "
            f"{statistics.median(ratios):.0%} of sequential ({ratios[0]:.0%} to {ratios[-1]:.0%} in {len(ratios)} rounds)"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.25, help="size of each store")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for d in (768, 192):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "acts"
            make_store(path, d, options.gib)
            report(d, measure(path, options.rounds))


if __name__ == "__main__":
    main()
