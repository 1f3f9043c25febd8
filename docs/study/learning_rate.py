"""Which learning rate is best at which length, width and k: the sweep behind `optim.default_lr`.

    python docs/study/learning_rate.py synthetic | saekit:demo | smollm2        [--only 600]
    python docs/study/learning_rate.py table

An arm is (variant, F, k, steps); its rates are a grid around the rule, and all of them see one pass over the data,
in the order of the trainer's own default options. Measured on held-out rows: FVU, L0, features silent there, features on more
than a tenth of the rows; on synthetic truth also what is recovered. A row per rate goes to docs/study/learning_rate.jsonl at
once, and arms that stand there are not run again. One seed.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from fetch import CACHE, fetch_english, fetch_smollm2

import saekit as sk
from saekit import optim, synthetic
from saekit.evaluation.recovery import recovery
from saekit.trainer import FIT_ROWS, InputStatistics, Trainer
from saekit.variants import VARIANTS

RESULTS = Path(__file__).with_suffix(".jsonl")
BATCH, HELDOUT, CALIBRATION = 4096, 65_536, 65_536
# (variant, F, k, steps): factors of the rule
ARMS = {
    "synthetic": [
        *(("topk", 1024, 8, steps, 2048) for steps in (300, 1000, 3000, 10_000)),
        *(("topk", F, 8, 1000, 2048) for F in (512, 4096)),
        *((name, 1024, 8, 1000, 2048) for name in ("abs_topk", "mutual_choice")),
    ],
    "saekit:demo": [
        *(("topk", 3072, 32, steps, BATCH) for steps in (180, 730, 2900)),
        *(("topk", F, 32, 730, BATCH) for F in (768, 12_288)),
        *(("topk", 3072, k, 730, BATCH) for k in (16, 64)),
        *((name, 3072, 32, 730, BATCH) for name in VARIANTS if name != "topk"),
        ("gated", 1536, 32, 730, BATCH),
    ],
    "smollm2": [
        *(("topk", 9216, 32, steps, BATCH) for steps in (150, 600, 2400)),
        *(("topk", 2304, 32, steps, BATCH) for steps in (150, 600, 2400)),
    ],
}
FACTORS = (0.5, 1, 2)


def source(name: str):
    """What the arms read: synthetic rows, or a store that is collected once."""
    if name == "synthetic":
        return synthetic.preset("small", rows=4_194_304).draw()
    out = CACHE / name.split(":")[-1] / "acts"
    if not (out / "manifest.json").is_file():
        if name == "smollm2":
            site, text = "blocks.15.hook_resid_post", str(fetch_english())
            sk.collect(str(fetch_smollm2()), site=site, text=text, tokens=2_750_000, out=out)
        else:
            sk.collect(name, site="blocks.2.hook_resid_post", text="stdlib", tokens=3_150_000, out=out)
    return sk.open_store(out)


def heldout(store, site: str, rows: int):
    """Held-out rows in text order, in pieces; rows of a synthetic truth that lie beyond its own."""
    if isinstance(store, synthetic.Truth):
        yield from (store.sample(store.rows + lo, 8192).x_BD for lo in range(0, rows, 8192))
        return
    wanted = store.valid_rows([site], split="heldout")[:rows]
    for lo in range(0, len(wanted), 8192):
        part = wanted[lo : lo + 8192]
        block = store.read(site, int(part[0]), int(part[-1]) + 1)
        yield block[torch.from_numpy(part - part[0])].float()


def run_arm(store, name: str, arm: tuple, factors) -> list[dict]:
    variant, F, k, steps, batch = arm
    site = store.sites[0]
    found = store.statistics(site)
    statistics = InputStatistics(torch.from_numpy(found.mean_D.copy()), found.total_variance, found.mean_norm)
    rows = len(store.valid_rows([site], split="train"))
    options = {"batch": batch, "seed": 0}
    first = torch.cat(
        [b[site].float() for _, b in zip(range(-(-FIT_ROWS // batch)), store.batches([site], epochs=1, **options))]
    )
    cls = VARIANTS[variant]
    own = {"k": k} if "k" in cls.__dataclass_fields__ else {"l0": k} if "l0" in cls.__dataclass_fields__ else {}
    rule = optim.default_lr(store.d(site), F, steps)
    trainers = [
        Trainer(
            cls(d_sae=F, lr=rule * factor, **own),
            store.d(site),
            statistics=statistics,
            tokens=steps * batch,
            fit_rows=first,
        )
        for factor in factors
    ]
    start = time.monotonic()
    for _, read in zip(range(steps), store.batches([site], epochs=-(-steps * batch // rows), **options)):
        for trainer in trainers:
            trainer.step(read[site])
    seconds = (time.monotonic() - start) / steps / len(trainers)

    def training_rows(n: int):
        for i, read in enumerate(store.batches([site], epochs=1, **options)):
            if i * batch >= min(n, CALIBRATION):
                return
            yield read[site].float()

    records = []
    for factor, trainer in zip(factors, trainers, strict=True):
        trainer.log()
        sae = trainer.finish(None, training_rows)
        error, l0, n, fired_F, xs = 0.0, 0, 0, torch.zeros(F, dtype=torch.int64), []
        for x_BD in heldout(store, site, HELDOUT):
            codes = sae.encode(x_BD)
            error += (x_BD - sae.decode(codes)).square().sum().item()
            fired_F += torch.bincount(codes.pairs().feature_N, minlength=F)
            l0, n = l0 + int(codes.l0().sum()), n + len(x_BD)
            xs.append(x_BD)
        x_ND = torch.cat(xs)
        record = {
            "source": name,
            "variant": variant,
            "D": store.d(site),
            "F": F,
            "k": k,
            "steps": steps,
            "batch": batch,
            "lr": rule * factor,
            "compute": trainer.compute,
            "fvu": error / (x_ND - x_ND.mean(0)).square().sum().item(),
            "l0": l0 / n,
            "silent": (fired_F == 0).double().mean().item(),
            "dense_10": (fired_F > 0.1 * n).double().mean().item(),
            "rows": n,
            "seconds_per_step": round(seconds, 4),
        }
        if name == "synthetic":
            scores = recovery(sae, store, rows=50_000).scores
            record |= {"mcc": scores.mcc, "coverage": scores.coverage}
        records.append(record)
    return records


def table():
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    keys = ("source", "variant", "F", "k", "steps")
    print(
        "| data | variant | F | k | steps | rate | × rule | FVU | × best | L0 | silent | over 10 % of rows | mcc |\n|"
        + "---|" * 13
    )
    for arm in dict.fromkeys(tuple(r[key] for key in keys) for r in records):
        rows = sorted((r for r in records if tuple(r[key] for key in keys) == arm), key=lambda r: r["lr"])
        best = min(r["fvu"] for r in rows)
        for r in rows:
            print(
                f"| {r['source']} | {r['variant']} | {r['F']:,} | {r['k']} | {r['steps']:,} | {r['lr']:.2g} | "
                f"{r['lr'] / optim.default_lr(r['D'], r['F'], r['steps']):.2f} | "
                f"{r['fvu']:.4f} | {r['fvu'] / best:.3f} | {r['l0']:.1f} | {r['silent']:.1%} | {r['dense_10']:.2%} | "
                + (f"{r['mcc']:.3f} |" if "mcc" in r else "|")
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*ARMS, "table"])
    parser.add_argument("--only", default="", help="arms whose text holds this, such as 'topk, 9216, 32, 600'")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS)
    args = parser.parse_args()
    if args.what == "table":
        return table()
    done = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    store = source(args.what)
    for arm in ARMS[args.what]:
        if args.only not in str(arm)[1:-1].replace("'", ""):
            continue
        key = (args.what, *arm)
        same = [r for r in done if tuple(r[k] for k in ("source", "variant", "F", "k", "steps", "batch")) == key]
        rule = optim.default_lr(store.d(store.sites[0]), *(arm[i] for i in (1, 3)))
        factors = [f for f in args.factors if not any(abs(r["lr"] / (f * rule) - 1) < 0.05 for r in same)]
        if not factors:
            continue
        for record in run_arm(store, args.what, arm, factors):
            with open(RESULTS, "a") as out:
                out.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
