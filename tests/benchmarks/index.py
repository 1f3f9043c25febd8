"""What a feature index costs, and what reading it costs.

    python tests/benchmarks/index.py [--tokens 1000000] [--rounds 1] [--bounded 10000000] [--peer] [--keep]

1. Activations (D = 768) of a dictionary of 24,576 directions with Zipf usage, beside the tokens of real text, as a store; an SAE
   with that dictionary, k = 32. In turn: the store encoded in fp32 and nothing else; the same with the index built from it,
   neighbours and logit weights included.
2. From that index, files in the page cache: the data of a feature's page and its HTML, for features drawn evenly and for the 50
   densest; filter and sort.
3. Filter and sort of an index of 131,072 features.
4. With `--peer` SAEDashboard from PyPI in an environment of its own (tests/benchmarks/dashboard.txt): the same SAE, 256 features on
   65,536 tokens of a one-layer model, as fast as its model can be.
5. Memory of the builder over ten times as many tokens, codes drawn rather than encoded (their number and usage the same).

`--keep` leaves the first index under ~/.cache/saekit-benchmarks/index, for browser.py.

N tokens · D width · F features · K codes per token
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from environments import CACHE, python_of
from saekit_kernels import Codes, decode

import saekit as sk
from saekit.config import CollectOptions
from saekit.encoding import Chunk, encode_store
from saekit.feature_index.build import IndexBuilder
from saekit.feature_index.reader import FeatureIndex, open_index
from saekit.feature_index.vocabulary import VocabBytes, vocab_bytes
from saekit.model import load_model
from saekit.progress import Progress
from saekit.ranks import Ranks
from saekit.sae import SAE
from saekit.source import TextSource
from saekit.store import Store, StoreWriter, open_store
from saekit.store.format import TokenTable, join_tables

KEPT = CACHE / "index"
SITE, CONTEXT, D, F, K = "blocks.6.hook_resid_post", 256, 768, 24_576, 32
NOISE = 0.05
PAGE_COLUMNS = (
    "bookmarked", "feature", "label", "density", "n", "bar", "top_text", "top_token_share", "token_entropy", "energy",
    "max_dec_cos", "flags_text",
)  # fmt: skip
"""Those of page Features, but for logit weights, which codes that are drawn have none of."""


# What is indexed


def usage(features: int, k: int) -> torch.Tensor:
    """Share of tokens on which each feature fires (F): ∝ 1/(rank + 7), k in sum, at most a half, in no order."""
    p = 1 / (torch.randperm(features, generator=torch.Generator().manual_seed(1)) + 7.0)
    return (p * k / p.sum()).clamp(max=0.5)


def dictionary(features: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(features, d, generator=generator), dim=1)


def make_sae(folder: Path, features: int, d: int) -> SAE:
    W = dictionary(features, d)
    sae = SAE(sk.TopK(k=K), W.clone(), W, torch.zeros(features), torch.zeros(d), config={"site": SITE})
    sae.save(folder)
    return sae


def text_source(tokens: int) -> TextSource:
    settings = CollectOptions(site=("blocks.1.hook_resid_post",), text=("stdlib",), tokens=tokens, context=CONTEXT)
    return TextSource("saekit:demo", settings, Ranks(), None)


def make_store(out: Path, tokens: int) -> Store:
    """Rows made of the dictionary, K of its directions on average, beside the tokens of real text."""
    source, W, p = text_source(tokens), dictionary(F, D), usage(F, K)
    plan = {**source.plan, "sites": {SITE: {"d": D, "norm_multiple": None}}}
    generator = torch.Generator().manual_seed(2)
    with StoreWriter(out, plan) as writer:
        writer.fix_norm_limits({SITE: None})
        for i, part in enumerate(source.parts(writer.shard_sequences, None)):
            writer.part(part.table, part.state)
            x_ED = NOISE * torch.randn(writer.rows(i), D, generator=generator)
            for rows in x_ED.split(4096):
                token, feature, value = firings(p, len(rows), generator)
                first = torch.searchsorted(token, torch.arange(len(rows)))
                rows += torch.nn.functional.embedding_bag(feature, W, first, mode="sum", per_sample_weights=value)
            writer.put(i, {SITE: x_ED.bfloat16()})
        writer.finish()
    return open_store(out)


def firings(p: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token, feature and magnitude of what fires on n tokens, by token; each feature independently with its share."""
    counts = torch.binomial(torch.full_like(p, n), p, generator=generator).long()
    feature = torch.repeat_interleave(torch.arange(len(p)), counts)
    token = torch.randint(n, (len(feature),), generator=generator)
    key = torch.unique(token * len(p) + feature)
    value = 0.3 + torch.empty(len(key)).exponential_(1.0, generator=generator)
    return key // len(p), key % len(p), value


# 1. Building


def build(sae: SAE, store: Store, lm) -> float:
    """Seconds from the first row to the finished index."""
    shutil.rmtree(sae.path / "index", ignore_errors=True)
    vocab = vocab_bytes(lm.tokenizer, lm.vocab_size)
    W_U_VD = torch.randn(lm.vocab_size, D, generator=torch.Generator().manual_seed(3))
    start = time.perf_counter()
    builder = IndexBuilder(sae, store, sae.path, site=SITE, vocab=vocab, unembedding=(W_U_VD, ""))
    encode_store(sae, store, SITE, [builder], rows=builder.rows())
    return time.perf_counter() - start


@torch.no_grad()
def encode_only(sae: SAE, store: Store) -> float:
    start = time.perf_counter()
    for lo in range(0, store.rows, 8192):
        sae.encode(store.read(SITE, lo, min(lo + 8192, store.rows)).float())
    return time.perf_counter() - start


# 2. Reading


def milliseconds(calls) -> np.ndarray:
    found = []
    for call in calls:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return np.array(found) * 1e3


def page_data(index: FeatureIndex, j: int):
    """Everything that the page of a feature asks of the index: 144 examples, tokens, neighbours, logit weights."""
    f = index.feature(j)
    f.top(64, sign="both" if index.signed else "+")
    f.quantiles(10, 8)
    f.near_misses(16)
    f.tokens(16)
    f.logits(20)
    for kind in ("decoder", "encoder", "together"):
        f.neighbours(kind, 20)


def read(index: FeatureIndex):
    n = index.column("n")
    alive = np.flatnonzero(n)
    drawn = np.random.default_rng(0).choice(alive, 300, replace=False)
    densest = np.argsort(-n)[:50]
    for j in drawn[:20]:
        page_data(index, int(j))
    for name, features in (("drawn evenly", drawn), ("the 50 densest", densest)):
        data = milliseconds(lambda j=j: page_data(open_again(index), int(j)) for j in features)
        html = milliseconds(lambda j=j: index.feature(int(j)).html() for j in features)
        size = max(len(index.feature(int(j)).html().encode()) for j in features[:50])
        print(
            f"page data, {name}: p50 {np.quantile(data, 0.5):.1f} ms, p95 {np.quantile(data, 0.95):.1f}; "
            f"HTML p50 {np.quantile(html, 0.5):.1f} ms, p95 {np.quantile(html, 0.95):.1f}, at most {size:,} bytes"
        )


def open_again(index: FeatureIndex) -> FeatureIndex:
    """The same maps without what a feature's view may have kept."""
    again = FeatureIndex(index.path, index.manifest)
    again._files = index._files
    return again


def table(index: FeatureIndex, name: str):
    sorts = ("-energy", "-density", "token_f1", "token_entropy", "max_dec_cos", "-q95")
    times = milliseconds(
        lambda s=s: index.table(sort=s, density=(1e-5, 0.1), alive=True, columns=PAGE_COLUMNS).to_pandas()
        for s in sorts
    )
    print(
        f"{name}: filter and sort, all rows, {len(PAGE_COLUMNS)} columns: median {np.median(times):.0f} ms, largest {times.max():.0f}"
    )


# 3 and 5. Codes that are drawn


class DrawnStore:
    """What the builder needs of a store: real tokens over and over, no rows on disk."""

    def __init__(self, tokens: int, folder: Path):
        parts = [part.table for part in text_source(min(tokens, 1_000_000)).parts(1 << 30, None)]
        joined = {name: np.concatenate(list(j.pieces())) for name, j in join_tables(parts).items()}
        once = TokenTable(**joined)
        S, N = tokens // CONTEXT, tokens // CONTEXT * CONTEXT
        start = np.arange(S + 1, dtype=np.int64) * CONTEXT
        self.table = TokenTable(
            token=np.resize(once.token, N),
            stored=np.ones(N, bool),
            seq_start=start,
            run_start=start[:-1],
            run_doc=np.arange(S),
            run_position=np.zeros(S, np.int64),
        )
        self.path, self.fingerprint = folder, "sha256:drawn"
        self.manifest = {"model": None, "tokenizer": {"fingerprint": "sha256:drawn"}}


def drawn_chunks(tokens: int, W_FD: torch.Tensor, p: torch.Tensor) -> Iterator[Chunk]:
    generator = torch.Generator().manual_seed(4)
    for lo in range(0, tokens, 8192):
        n = min(8192, tokens - lo)
        token, feature, value = firings(p, n, generator)
        row_ptr = torch.searchsorted(token, torch.arange(n + 1))
        codes = Codes.flat(row_ptr, feature, value, len(p))
        xhat = decode(codes, W_FD, torch.zeros(W_FD.shape[1]))
        x = xhat + NOISE * torch.randn(xhat.shape, generator=generator)
        positions = np.arange(lo, lo + n)
        yield Chunk(positions, positions, positions // CONTEXT, np.zeros(n, bool), x, codes, xhat)


class Peak:
    """Largest anonymous memory of this process above what it had at the start, in GiB; files that are mapped do not count."""

    def __enter__(self):
        self.base = self.most = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    @property
    def gib(self) -> float:
        return (self.most - self.base) / 2**20

    def _watch(self):
        while not self._stop.wait(0.05):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


@torch.no_grad()
def drawn_index(folder: Path, tokens: int, features: int, d: int) -> tuple[FeatureIndex, float, float]:
    """An index of codes that are drawn; its seconds, and the memory it took."""
    sae, p = make_sae(folder, features, d), usage(features, K)
    store = DrawnStore(tokens, folder)
    vocab = VocabBytes.of([f" w{i}".encode() for i in range(1 << 13)])
    tokens = len(store.table.token)
    with Peak() as peak:
        start = time.perf_counter()
        builder = IndexBuilder(sae, store, folder, site=SITE, vocab=vocab)
        for chunk in drawn_chunks(tokens, sae.W_dec, p):
            builder.update(chunk)
        builder.finish()
        seconds = time.perf_counter() - start
    assert builder.index is not None
    return builder.index, seconds, peak.gib


def drawn(tokens: int):
    with tempfile.TemporaryDirectory() as folder:
        index, seconds, gib = drawn_index(Path(folder), tokens, F, 64)
        print(
            f"{tokens:,} tokens, {index.manifest['Z']:,} codes drawn: at most {gib:.2f} GiB more than before, {seconds:.0f} s"
        )


# 4. SAEDashboard

PEER = """
import json, sys, time, torch
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
weights, features, tokens, context, k, vocabulary, threads = sys.argv[1], *map(int, sys.argv[2:8])
torch.set_num_threads(threads)
w = load_file(weights)
F, D = w["W_dec"].shape
# of unit rows, so nothing is rescaled; without it the runner refuses a TopK
sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=k, device="cpu", rescale_acts_by_decoder_norm=True))
with torch.no_grad():
    for name, t in {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}.items():
        getattr(sae, name).copy_(t)
model = HookedTransformer(HookedTransformerConfig(
    n_layers=1, d_model=D, n_ctx=context, d_head=64, act_fn="gelu", d_vocab=vocabulary, device="cpu", seed=0
))
ids = torch.randint(vocabulary, (tokens // context, context), generator=torch.Generator().manual_seed(0))
config = SaeVisConfig(
    hook_point="blocks.0.hook_resid_post", features=list(range(features)), minibatch_size_features=64,
    minibatch_size_tokens=64,
)
start = time.perf_counter()
data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=ids)
assert len(data.feature_data_dict) == features
print(json.dumps(time.perf_counter() - start))
"""
PEER_FEATURES, PEER_TOKENS = 256, 65_536


def dashboard(weights: Path, vocabulary: int) -> float:
    """Seconds of SAEDashboard for the data of 256 features on 65,536 tokens."""
    python = python_of("dashboard", without=("torchaudio", "torchvision"))
    sizes = (PEER_FEATURES, PEER_TOKENS, CONTEXT, K, vocabulary, torch.get_num_threads())
    line = [python, "-c", PEER, weights, *map(str, sizes)]
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bounded", type=int, default=10_000_000, help="tokens of the last step; 0 leaves it out")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--drawn", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    Progress.quiet = True
    if options.drawn:
        return drawn(options.drawn)
    with tempfile.TemporaryDirectory() as scratch:
        folder = KEPT if options.keep else Path(scratch)
        shutil.rmtree(folder / "saes", ignore_errors=True)
        shutil.rmtree(folder / "acts", ignore_errors=True)
        lm, store, sae = (
            load_model("saekit:demo"),
            make_store(folder / "acts", options.tokens),
            make_sae(folder / "saes" / "large", F, D),
        )
        pairs = [(encode_only(sae, store), build(sae, store, lm)) for _ in range(options.rounds)]
        ratio = statistics.median(b / e for e, b in pairs)
        index = open_index(sae.path)
        print(
            f"{store.rows:,} tokens, D = {D}, F = {F:,}, {index.manifest['Z']:,} codes, {torch.get_num_threads()} threads: encoding in fp32 "
            f"{statistics.median(e for e, _ in pairs):.0f} s, with the index {statistics.median(b for _, b in pairs):.0f} s: "
            f"{ratio:.2f} times (median of {options.rounds})"
        )
        read(index)
        table(index, f"{F:,} features")
        wide, _, _ = drawn_index(folder / "saes" / "wide", 200_000, 131_072, 64)
        table(wide, "131,072 features")
        if options.peer:
            seconds = dashboard(sae.path / "sae.safetensors", lm.vocab_size)
            ours = statistics.median(b for _, b in pairs)
            share = PEER_FEATURES / F * PEER_TOKENS / store.rows
            print(
                f"SAEDashboard, {PEER_FEATURES} features, {PEER_TOKENS:,} tokens: {seconds:.0f} s; all features and tokens at that "
                f"rate {seconds / share / 3600:.0f} h, {seconds / share / ours:,.0f} times as long"
            )
    # each in a process of its own: memory that was freed before would hide what is taken
    for tokens in (options.bounded // 10, options.bounded) if options.bounded else ():
        subprocess.run([sys.executable, __file__, "--drawn", str(tokens)], check=True)


if __name__ == "__main__":
    main()
