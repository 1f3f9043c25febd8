"""The sweep behind the demo's options: k, learning rate and number of features on the bundled model's store.

    python docs/study/demo_sweep.py [--acts demo/acts] [--out study]

One seed. Each row: held-out FVU and L0, silent features over all rows of the held-out part, CE recovered, seconds. Finished
rows are kept, so that the same command continues.
"""

import argparse
import json
import time
from pathlib import Path

import saekit as sk
from saekit.demo.flow import LM_TOKENS, MODEL, SITE, TEXT, TOKENS

ARMS = [
    *({"k": k} for k in (8, 16, 32, 64)),
    *({"k": 32, "lr": lr} for lr in (5e-4, 1e-3, 2e-3, 8e-3)),
    *({"k": 32, "d_sae": d} for d in (768, 1536, 6144)),
    {"k": 32, "aux": 0.0},
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acts", type=Path, default=Path("demo/acts"))
    parser.add_argument("--out", type=Path, default=Path("study"))
    args = parser.parse_args()
    if not (args.acts / "manifest.json").is_file():
        sk.collect(MODEL, site=SITE, text=TEXT, tokens=TOKENS, out=args.acts)
    store = sk.open_store(args.acts)
    rows = []
    for arm in ARMS:
        name = "-".join(f"{k}{v:g}" for k, v in arm.items())
        folder = args.out / name
        if not (folder / "evaluation.json").is_file():
            start = time.monotonic()
            sae = sk.SAE.load(folder) if (folder / "config.json").is_file() else None
            sae = sae or sk.train(sk.TopK(**arm), store, out=folder)
            sk.evaluate(sae, store, lm_tokens=LM_TOKENS)
            (folder / "seconds").write_text(f"{time.monotonic() - start:.0f}")
        m = {k: v["value"] for k, v in sk.evaluation.load_evaluation(folder).metrics().items()}
        lr = json.loads((folder / "config.json").read_text())["provenance"]["training"]["lr"]
        rows.append(
            f"| {arm['k']} | {arm.get('d_sae', 16 * store.d(SITE)):,} | {lr:.2g}{'' if arm.get('aux', 1) else ', no AuxK'} | "
            f"{m['fvu']:.3f} | {m['l0']:.1f} | {1 - m['alive']:.1%} | {m['dense_10']:.1%} | {m['ce_recovered_zero']:.3f} | "
            f"{m['ce_recovered_mean']:.3f} |"
        )
        print(rows[-1], flush=True)
    head = (
        "| k | F | learning rate | FVU | L0 | silent | over 10 % of tokens | CE recovered, zeros | mean |\n|"
        + "---|" * 9
    )
    (args.out / "table.md").write_text("\n".join([head, *rows]) + "\n")


if __name__ == "__main__":
    main()
