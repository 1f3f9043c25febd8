"""The variants compared: every one on the bundled model and on synthetic truth, three seeds, one pass over the data per seed.

    make study                          python docs/study/variants.py [--seeds 0 1 2] [--only demo|synthetic] [--variants topk …]

Finished SAEs, evaluations and recoveries are kept under study/, so that the same command continues after a kill. The tables and
the plot of docs/variants.md come from what is there: mean over seeds, with the smallest and largest.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import picture

import saekit as sk
from saekit import synthetic
from saekit.evaluation.recovery import recovery
from saekit.store.format import atomic_write

MODEL, SITE, TEXT, TOKENS = "saekit:demo", "blocks.2.hook_resid_post", "stdlib", 3_150_000
D_SAE, KS = 1536, (16, 32, 64)
IMAGE = Path(__file__).parents[1] / "images" / "variants.png"


def demo_arms() -> list[sk.variants.Variant]:
    """Three k for the main three, L0 32 for the others."""
    main = [cls(d_sae=D_SAE, k=k) for cls in (sk.TopK, sk.AbsTopK, sk.MutualChoice) for k in KS]
    counted = [cls(d_sae=D_SAE, k=32) for cls in (sk.FeatureChoice, sk.Variational, sk.Matryoshka)]
    penalised = [cls(d_sae=D_SAE, l0=32) for cls in (sk.ReLU, sk.JumpReLU, sk.Gated)]
    return [*main, *counted, sk.TopAFA(d_sae=D_SAE), *penalised]


def synthetic_arms() -> list[sk.variants.Variant]:
    """The true number of features per token, twice as many features as truths; of two also as many as truths."""
    counted = (sk.TopK, sk.AbsTopK, sk.MutualChoice, sk.FeatureChoice, sk.Variational, sk.Matryoshka)
    penalised = (sk.ReLU, sk.JumpReLU, sk.Gated)
    return [
        *(cls(d_sae=1024, k=8) for cls in counted),
        *(cls(d_sae=512, k=8) for cls in (sk.TopK, sk.AbsTopK)),
        *(cls(d_sae=1024, l0=8) for cls in penalised),
        sk.TopAFA(d_sae=1024),
    ]


def demo(out: Path, seeds, chosen) -> dict[str, list[dict]]:
    acts = out / "acts"
    if not (acts / "manifest.json").is_file():
        sk.collect(MODEL, site=SITE, text=TEXT, tokens=TOKENS, out=acts)
    store, found = sk.open_store(acts), defaultdict(list)
    for seed in seeds:
        folder = out / f"seed-{seed}"
        for sae in sk.train(chosen(demo_arms()), store, out=folder, seed=seed, checkpoint_every=100):
            assert sae.path is not None
            if not (sae.path / "evaluation.json").is_file():
                sk.evaluate(sae, store, lm_tokens=50_000)
            metrics = {k: m["value"] for k, m in sk.evaluation.load_evaluation(sae.path).metrics().items()}
            found[sae.path.name].append(metrics)
    return found


def truths(out: Path, seeds, chosen) -> dict[str, list[dict]]:
    found = defaultdict(list)
    for signed in (0.0, 1.0):
        for seed in seeds:
            truth = synthetic.preset("small", rows=4_194_304, bidirectional=signed, seed=seed).draw()
            folder = out / f"{'signed' if signed else 'plain'}-{seed}"
            for sae in sk.train(chosen(synthetic_arms()), truth, out=folder, seed=seed, checkpoint_every=200):
                assert sae.path is not None
                kept = sae.path / "recovery.json"
                if not kept.is_file():
                    atomic_write(
                        kept, json.dumps({k: m.value for k, m in recovery(sae, truth).metrics().items()}).encode()
                    )
                found[f"{'signed' if signed else 'plain'} {sae.path.name}"].append(json.loads(kept.read_text()))
    return found


def spread(values: list[float], form: str) -> str:
    mean = format(sum(values) / len(values), form)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def demo_table(found: dict[str, list[dict]]) -> str:
    head = "| SAE | seeds | L0 | FVU | CE recovered, zeros | mean | silent | over 10 % of tokens |"
    lines = [head, "|" + "---|" * 8]
    for name, runs in found.items():
        columns = (("l0", ".1f"), ("fvu", ".4f"), ("ce_recovered_zero", ".3f"), ("ce_recovered_mean", ".3f"))
        cells = [spread([run[key] for run in runs], form) for key, form in columns]
        cells += [spread([1 - run["alive"] for run in runs], ".1%"), spread([run["dense_10"] for run in runs], ".2%")]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def truth_table(found: dict[str, list[dict]]) -> str:
    columns = ("l0", "fvu", "mcc", "gt_to_sae", "coverage", "f1_matched")
    lines = ["| truth and SAE | seeds | " + " | ".join(columns) + " | silent |", "|" + "---|" * (len(columns) + 3)]
    for name, runs in found.items():
        cells = [spread([run[key] for run in runs], ".1f" if key == "l0" else ".3f") for key in columns]
        lines.append(
            f"| {name} | {len(runs)} | " + " | ".join([*cells, spread([1 - r["alive"] for r in runs], ".1%")]) + " |"
        )
    return "\n".join(lines)


def plot(found: dict[str, list[dict]], path: Path):
    """L0 against FVU, both logarithmic; a line where a variant has several k, bars from the smallest to the largest seed."""
    import plotly.graph_objects as go

    groups = defaultdict(list)
    for name, runs in found.items():
        l0, fvu = ([run[key] for run in runs] for key in ("l0", "fvu"))
        groups[re.sub(r"-k\d+$", "", name)].append((sum(l0) / len(l0), sum(fvu) / len(fvu), min(fvu), max(fvu)))
    figure = go.Figure()
    palette = [
        "#0072B2",
        "#E69F00",
        "#009E73",
        "#CC79A7",
        "#56B4E9",
        "#D55E00",
        "#000000",
        "#999999",
        "#8C6D31",
        "#6B4C9A",
    ]
    for (name, points), colour in zip(groups.items(), palette):
        x, y, low, high = zip(*sorted(points))
        bars = {"array": [b - a for a, b in zip(y, high)], "arrayminus": [a - b for a, b in zip(y, low)]}
        figure.add_scatter(
            x=x, y=y, name=name, mode="lines+markers", line_color=colour, error_y={"type": "data", **bars}
        )
    figure.update_xaxes(type="log", title="L0 on held-out text", dtick=math.log10(2))
    figure.update_yaxes(type="log", title="FVU on held-out text")
    figure.update_layout(template="plotly_white", width=900, height=560, title=f"Bundled model, {D_SAE:,} features")
    picture.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["demo", "synthetic"])
    parser.add_argument("--variants", nargs="+", choices=sk.VARIANTS, help="of the arms those of these variants alone")
    parser.add_argument("--out", type=Path, default=Path("study"))
    args = parser.parse_args()

    def chosen(arms: list) -> list:
        return [arm for arm in arms if args.variants is None or arm.name in args.variants]

    tables = []
    if args.only != "synthetic":
        found = demo(args.out / "demo", args.seeds, chosen)
        tables.append(demo_table(found))
        plot(found, IMAGE)
    if args.only != "demo":
        tables.append(truth_table(truths(args.out / "synthetic", args.seeds, chosen)))
    text = "\n\n".join(tables)
    atomic_write(args.out / "variants.md", text.encode() + b"\n")
    print(text)


if __name__ == "__main__":
    main()
