"""How much of a forward pass is left when its activations are written, beside SAELens' cache runner.

    python tests/benchmarks/collect.py [--model saekit:demo | smollm2] [--tokens 300000] [--rounds 3] [--peer]

In turn, on the same sequences of 256 tokens in the same batches, in fp32 or what the device has: (a) the bare pass, stopped
behind the same block, output thrown away; (b) `collect` from the first shard to the manifest, the text read beforehand.
`--peer` adds (c) SAELens from PyPI in an environment of its own (tests/benchmarks/saelens.txt), which is made once under
~/.cache/saekit-benchmarks. Also printed: size of the store beside its payload, peak memory at a tenth of the tokens and at
all of them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from saekit import collector
from saekit.config import CollectOptions
from saekit.model import load_model
from saekit.progress import Progress
from saekit.store import open_store
from saekit.store.writer import TORCH_DTYPES

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "docs" / "study"))
from environments import python_of  # noqa: E402
from fetch import fetch_smollm2  # noqa: E402  (the study's folder is no package)

CONTEXT, BATCH = 256, 32
MODELS = {"saekit:demo": ("saekit:demo", 1), "smollm2": (None, 15)}


class Bare:
    """The blocks up to the site alone: nothing behind it exists."""

    def __init__(self, name: str, layer: int):
        self.lm = load_model(name)
        decoder = self.lm.hf.get_decoder()
        decoder.layers = decoder.layers[: layer + 1]
        decoder.norm = torch.nn.Identity()
        decoder.config.num_hidden_layers = layer + 1
        self.decoder = decoder

    @torch.no_grad()
    def __call__(self, ids_SC: torch.Tensor) -> float:
        start = time.perf_counter()
        for first in range(0, len(ids_SC), BATCH):
            self.decoder(input_ids=ids_SC[first : first + BATCH], use_cache=False)
        return len(ids_SC) * CONTEXT / (time.perf_counter() - start)


def collected(name: str, site: str, tokens: int, out: Path) -> float:
    """Tokens per second of all that follows the reading of the text."""
    began = 0.0
    begin = collector._begin

    def timed(*args):
        nonlocal began
        begin(*args)
        began = time.perf_counter()

    collector._begin = timed
    try:
        collector.collect(
            name, site=site, text="stdlib", out=out, tokens=tokens, context=CONTEXT, batch_sequences=BATCH
        )
    finally:
        collector._begin = begin
    return tokens / (time.perf_counter() - began)


PEER = """
import json, sys, time
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
import numpy as np, torch
model, ids, hook, d, out, dtype = sys.argv[1:7]
ids = np.load(ids)
torch.set_num_threads(int(sys.argv[7]))
dataset = Dataset.from_dict({"input_ids": ids.tolist()})
config = CacheActivationsRunnerConfig(
    dataset_path="local", model_name=model, model_class_name="AutoModelForCausalLM", model_batch_size=int(sys.argv[8]),
    hook_name=hook, d_in=int(d), training_tokens=ids.size, context_size=ids.shape[1], new_cached_activations_path=out,
    shuffle=False, dtype=dtype, device="cpu", buffer_size_gb=0.25, prepend_bos=False, streaming=False,
    model_from_pretrained_kwargs={"dtype": "float32"},
)
runner = CacheActivationsRunner(config, override_dataset=dataset)
start = time.perf_counter()
runner.run()
print(json.dumps({"tokens_per_s": ids.size / (time.perf_counter() - start)}))
"""


def peer(folder: Path, ids: np.ndarray, layer: int, d: int, dtype: str) -> float:
    """SAELens on the same sequences, model, site and threads; its own model loading left out."""
    with tempfile.TemporaryDirectory() as scratch:
        np.save(f"{scratch}/ids.npy", ids)
        arguments = [
            folder,
            f"{scratch}/ids.npy",
            f"model.layers.{layer}",
            d,
            f"{scratch}/out",
            dtype,
            torch.get_num_threads(),
            BATCH,
        ]
        line = [python_of("saelens"), "-c", PEER, *map(str, arguments)]
        result = subprocess.run(line, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.splitlines()[-1])["tokens_per_s"]


def peak(name: str, site: str, tokens: int) -> float:
    """GiB that a process of its own holds at most."""
    with tempfile.TemporaryDirectory() as scratch:
        code = (
            "import resource, sys; from saekit.collector import collect; "
            f"collect({name!r}, site={site!r}, text='stdlib', out=sys.argv[1], tokens={tokens}, shard_mb=4); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
        )
        return float(
            subprocess.run(
                [sys.executable, "-c", code, f"{scratch}/acts"], check=True, capture_output=True, text=True
            ).stdout
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="saekit:demo")
    parser.add_argument("--tokens", type=int, default=None, help="default: about 30 s a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    options = parser.parse_args()
    Progress.quiet = True
    name, layer = MODELS[options.model]
    name = name or str(fetch_smollm2())
    site = f"blocks.{layer}.hook_resid_post"
    tokens = options.tokens or {"saekit:demo": 1_800_000, "smollm2": 24_576}[options.model]
    assert CollectOptions(site=(site,), text=("stdlib",)).dtype == "bfloat16"
    bare = Bare(name, layer)
    pairs, peers = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(options.rounds + 1):
            out = Path(scratch) / f"acts{i}"
            ours = collected(name, site, tokens, out)
            table = open_store(out).table
            full = table.token[: table.n_tokens // CONTEXT * CONTEXT].astype(np.int64).reshape(-1, CONTEXT)
            alone = bare(torch.from_numpy(full))
            # the first round warms both up
            if i:
                pairs.append((ours, alone))
                if options.peer:
                    folder = Path(name) if options.model == "smollm2" else HERE.parents[1] / "saekit/demo/model"
                    peers.append(peer(folder, full, layer, bare.lm.d_model, "float32"))
                print(
                    f"round {i}: collect {ours:,.0f} tokens/s, bare pass {alone:,.0f}, ratio {ours / alone:.3f}",
                    *peers[-1:],
                )
        store = open_store(out)
        payload = store.rows * sum(store.d(s) * TORCH_DTYPES[store.manifest["dtype"]].itemsize for s in store.sites)
        payload += 3 * store.n_tokens
        size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    ratio = statistics.median(o / a for o, a in pairs)
    print(
        f"{options.model} {site}, {bare.lm.compute}, {torch.get_num_threads()} threads: collect "
        f"{statistics.median(o for o, _ in pairs):,.0f} tokens/s, bare pass {statistics.median(a for _, a in pairs):,.0f}: "
        f"{ratio:.1%} (median of {options.rounds})"
    )
    if peers:
        print(
            f"SAELens {statistics.median(peers):,.0f} tokens/s: collect is {statistics.median(o for o, _ in pairs) / statistics.median(peers):.2f} times as fast"
        )
    print(f"store {size:,} bytes, payload {payload:,}: {size / payload - 1:+.2%}")
    if options.model == "saekit:demo":
        small, large = peak(name, site, tokens // 10), peak(name, site, tokens)
        print(f"peak memory {small:.2f} GiB for {tokens // 10:,} tokens, {large:.2f} GiB for {tokens:,}")
    print(f"(peak of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB)")


if __name__ == "__main__":
    main()
