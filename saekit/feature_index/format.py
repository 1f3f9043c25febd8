"""What builder and reader of the feature index agree on: names, sizes, stored values, the hash behind all samples.

Numpy and the standard library alone.
"""

import numpy as np

FORMAT, FORMAT_VERSION = "saekit-index", 1
ABSENT = 0xFFFFFFFF
"""Stands where a table has no token, position or feature."""
FLAGS = {"dead": 1, "dense": 2, "near-duplicate": 4, "one-sided": 8, "capped": 16, "start-of-sequence": 32}
TOP = 64
"""Strongest examples kept of each feature and sign."""
SLICES, PER_SLICE = 10, 8
"""Slices of equal count that are stored, and examples in each."""
BINS = 64
"""Of the histogram."""
TOKENS = 16
"""Commonest tokens kept of each feature."""
LOGITS, NEIGHBOURS = 20, 20
"""Tokens kept at each end of the logit weights, and nearest features of each kind."""
DIRECT = ("hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Sites that add straight into the residual stream, where a decoder row times the unembedding means something."""
QUANTILES = (5, 25, 50, 75, 95, 99)
"""Per cent; columns q05 to q99."""
COLUMNS = (
    "n", "n_pos", "n_neg", "n_seq", "seq_sq", "mean", "mean_abs", "mean_sq", "skew", "kurtosis", "max_pos", "max_neg",
    "q05", "q25", "q50", "q75", "q95", "q99", "energy", "crowd", "start_share", "token_entropy", "top_token",
    "top_token_share", "token_f1", "dec_norm", "enc_norm", "enc_dec_cos", "max_dec_cos", "max_dec_feature", "max_enc_cos",
    "bias", "threshold", "budget", "logit_std", "logit_skew", "logit_kurtosis", "std_mean", "kl_mean",
    "kept", "flags",
)  # fmt: skip
"""Of features.safetensors, in this order; an index holds those that are defined for it."""


def splitmix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 (Steele et al. 2014): the fixed hash behind all samples of the index."""
    with np.errstate(over="ignore"):
        x = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def spread(count: int, k: int, key: int) -> np.ndarray:
    """k distinct numbers below `count`, one drawn from each of k equal parts with an offset hashed from `key`; all if k ≥ count."""
    if k >= count:
        return np.arange(count, dtype=np.int64)
    offset = (splitmix(np.arange(k, dtype=np.uint64) + np.uint64(key * 1000003 % 2**63)) >> np.uint64(40)).astype(
        np.int64
    )
    return ((np.arange(k, dtype=np.int64) << 24) + offset) * count // (k << 24)


def kept_of(n: int, cap: int, lo: int, hi: int, key: int) -> np.ndarray:
    """Entries lo to hi − 1 of an even sample of `cap` of n numbers, ascending (int64): one drawn from each of `cap` equal
    parts, with an offset hashed from `key` and the part."""
    i = np.arange(lo, hi, dtype=np.int64)
    first = i * n // cap
    offset = splitmix(splitmix(np.array([key], np.uint64)) ^ i.astype(np.uint64)) >> np.uint64(1)
    return first + offset.astype(np.int64) % ((i + 1) * n // cap - first)


def quantise(value: np.ndarray, exponent: int) -> tuple[np.ndarray, bool]:
    """Bits (uint16) of float16(value / 2^exponent), and whether any overflowed. What would round to zero keeps its sign as
    the smallest subnormal, so that the set of firings stays exact."""
    with np.errstate(over="ignore"):
        # two exact factors, for 2^-exponent alone may lie outside float32; np.ldexp takes thirty times as long
        half = -exponent // 2
        bits = (
            (value * np.float32(2.0**half) * np.float32(2.0 ** (-exponent - half))).astype(np.float16).view(np.uint16)
        )
    size = bits & np.uint16(0x7FFF)
    return np.where(size == 0, bits | np.uint16(1), bits), bool((size >= 0x7C00).any())


def exponent_of(largest: float) -> int:
    """The exponent e that puts largest / 2^e in [512, 1024)."""
    return int(np.frexp(largest)[1]) - 10 if largest > 0 else 0


def bit_width(count: int) -> int:
    """Bits that number 0 to count − 1."""
    return max(1, int(count - 1).bit_length()) if count > 1 else 1
