"""What the bundled language model is compared with, on the same held-out text: `xz -9` and a 5-gram model with backoff.

    python -m saekit.demo.baselines saekit/demo/model

The 5-gram counts the same tokens of the same training text: interpolated Kneser–Ney (Chen and Goodman 1999), one discount
n1 / (n1 + 2·n2) per order, over a uniform distribution at the bottom.
"""

import lzma
import math
import sys

import numpy as np

BITS = 12  # 4,096 tokens; five of them fit into 60 bits


def kneser_ney_nats(train: np.ndarray, held: np.ndarray, order: int = 5) -> float:
    """Mean −log p of the tokens of `held`, each given the up to `order` − 1 tokens before it in `held`."""
    train, held = train.astype(np.int64), held.astype(np.int64)
    p = np.full(len(held), 1.0 / 2**BITS)
    grams: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    grams[order] = np.unique(_windows(train, order), return_counts=True)
    for n in range(order - 1, 0, -1):  # lower orders count in how many contexts a gram was seen, not how often
        grams[n] = np.unique(grams[n + 1][0] & ((1 << BITS * n) - 1), return_counts=True)
    for n in range(1, order + 1):
        codes, counts = grams[n]
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / (ones + 2 * twos) if ones else 0.5
        contexts, first = np.unique(codes >> BITS, return_index=True)
        total = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(codes)))
        asked = _windows(held, n)
        where = np.searchsorted(codes, asked).clip(max=len(codes) - 1)
        count = np.where(codes[where] == asked, counts[where], 0)
        context = np.searchsorted(contexts, asked >> BITS).clip(max=len(contexts) - 1)
        known = contexts[context] == asked >> BITS
        mass = np.where(known, total[context], 1)
        higher = np.maximum(count - discount, 0) / mass + discount * kinds[context] / mass * p[n - 1 :]
        p[n - 1 :] = np.where(known, higher, p[n - 1 :])
    return float(-np.log(p).mean())


def _windows(stream: np.ndarray, n: int) -> np.ndarray:
    code = np.zeros(len(stream) - n + 1, np.int64)
    for i in range(n):
        code = (code << BITS) | stream[i : len(stream) - n + 1 + i]
    return code


def main():
    from transformers import PreTrainedTokenizerFast

    from saekit.demo.train_lm import joined
    from saekit.text import stdlib_documents

    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    train = [d.text for d in stdlib_documents(tests=True) if not d.held_out]
    held = [d.text for d in stdlib_documents() if d.held_out]
    raw, before = "".join(held).encode(), "".join(train).encode()
    held_ids = joined(tokenizer, held)
    nats = kneser_ney_nats(joined(tokenizer, train), held_ids)
    print(f"5-gram: {nats:.4f} nats per token, {nats * len(held_ids) / math.log(2) / len(raw):.4f} bits per byte")
    size = {
        name: len(lzma.compress(data, preset=9))
        for name, data in (("held", raw), ("train", before), ("both", before + raw))
    }
    print(
        f"xz -9: {8 * size['held'] / len(raw):.4f} bits per byte alone, "
        f"{8 * (size['both'] - size['train']) / len(raw):.4f} after the training text"
    )


if __name__ == "__main__":
    main()
