"""What eight SAEs cost in one pass over a stream, beside eight passes.

    python tests/benchmarks/sweep.py [--model saekit:demo | smollm2] [--tokens 32768] [--rounds 3]

In turn: one SAE trained on activations that the model computes on the way, and eight of them in one pass. With t = the time
inside the steps of an SAE and c = all the rest of a run, eight in one pass should cost (c + 8t)/(8c + 8t) of eight passes; both
are printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import saekit as sk
from saekit.config import StreamOptions
from saekit.model import load_model
from saekit.progress import Progress
from saekit.trainer import Trainer

sys.path.append(str(Path(__file__).parents[2] / "docs" / "study"))
from fetch import fetch_smollm2  # the study's folder is no package

BATCH = 2048
SITES = {"saekit:demo": "blocks.2.hook_resid_post", "smollm2": "blocks.15.hook_resid_post"}


def seconds(lm, site: str, tokens: int, d_sae: int, ks) -> tuple[float, float]:
    """Wall-clock of a run with one SAE per k, and what of it was spent in their steps."""
    step, spent = Trainer.step, []

    def timed(trainer, x_BD):
        start = time.perf_counter()
        named = step(trainer, x_BD)
        spent.append(time.perf_counter() - start)
        return named

    Trainer.step = timed
    with tempfile.TemporaryDirectory() as folder:
        variants = [sk.TopK(k=k, d_sae=d_sae) for k in ks]
        start = time.perf_counter()
        sk.train(
            variants,
            out=folder,
            stream=StreamOptions(text=("stdlib",)),
            model=lm,
            site=site,
            tokens=tokens,
            batch=BATCH,
            statistics_rows=4096,
            ram="32MiB",
        )
        whole = time.perf_counter() - start
    Trainer.step = step
    return whole, sum(spent)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SITES), default="saekit:demo")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    Progress.quiet = True
    demo = args.model == "saekit:demo"
    lm = load_model(args.model if demo else str(fetch_smollm2()))
    tokens, d_sae = args.tokens or (262_144 if demo else 16_384), 1536 if demo else 2304
    rounds = []
    for _ in range(args.rounds):
        (one, t), (eight, _) = (seconds(lm, SITES[args.model], tokens, d_sae, ks) for ks in ([32], range(16, 48, 4)))
        rounds.append((eight / (8 * one), (one + 7 * t) / (8 * one), one, eight))
        print(f"one {one:.1f} s, of it in steps {t:.1f} s; eight {eight:.1f} s", flush=True)
    share, predicted, *_ = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(
        f"{args.model}: eight SAEs of {d_sae:,} features in one pass over {tokens:,} tokens take {share:.0%} of eight passes "
        f"({min(r[0] for r in rounds):.0%} to {max(r[0] for r in rounds):.0%}); (c + 8t)/(8c + 8t) = {predicted:.0%}"
    )


if __name__ == "__main__":
    main()
