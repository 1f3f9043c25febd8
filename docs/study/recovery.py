"""Claims about known truth, at settings under which they can hold: small batches, so that rare features are met often enough.

    python docs/study/recovery.py [--seed 0] [--out study/recovery]

512 truths in 128 dimensions, 8 on at a time, 4 M rows as 8,192 steps of 512, rate 0.0014: without families ("plain", "signed"), and
with 32 parents of three children ("families"). All SAEs of a truth learn in one pass; the same command continues after a kill.
"""

import argparse
from pathlib import Path

from scipy.optimize import linear_sum_assignment

import saekit as sk
from saekit import synthetic
from saekit.evaluation.recovery import SIMILAR, recovery
from saekit.sae import SAE
from saekit.synthetic import Truth

ROWS, BATCH, RATE = 4_194_304, 512, 0.0014
TRUTHS = {"plain": {"parents": 0}, "signed": {"parents": 0, "bidirectional": 1.0}, "families": {}}
SHOWN = ("l0", "fvu", "mcc", "coverage", "alive")


def arms() -> list:
    return [v(d_sae=F, k=8, lr=RATE) for v in (sk.TopK, sk.AbsTopK) for F in (512, 1024)]


def found(sae: SAE, truth: Truth) -> float:
    """Share of the truths whose partner in the best one-to-one matching lies within a cosine of 0.9."""
    S = (sae.W_dec @ truth.g_GD.T).detach()
    S = S.abs() if sae.variant.signed else S
    i, j = linear_sum_assignment(-S.numpy())
    return float((S[i, j] >= SIMILAR).sum() / len(truth.g_GD))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("study/recovery"))
    args = parser.parse_args()
    print("| truth | SAE | found (cosine ≥ 0.9) | " + " | ".join(SHOWN) + " |\n|" + "---|" * (len(SHOWN) + 3))
    for name, changes in TRUTHS.items():
        truth = synthetic.preset("small", rows=ROWS, seed=args.seed, **changes).draw()
        for sae in sk.train(arms(), truth, out=args.out / f"{name}-{args.seed}", seed=args.seed, batch=BATCH):
            assert sae.path is not None
            metrics = recovery(sae, truth).metrics()
            cells = [f"{metrics[key].value:.3f}" for key in SHOWN]
            print(f"| {name} | {sae.path.name} | {found(sae, truth):.1%} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
