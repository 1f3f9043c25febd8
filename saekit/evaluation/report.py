"""`evaluation.json`: what was measured, how it is stored, printed, and said in one sentence."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import saekit
from saekit.errors import SaekitError
from saekit.store.format import atomic_write, pretty_json

FORMAT, FORMAT_VERSION = "saekit-evaluation", 1
FILE = "evaluation.json"
HEADLINE = ("fvu", "l0", "alive", "ce_added", "kl", "ce_recovered_zero", "ce_recovered_mean")


@dataclass
class Evaluation:
    """The content of `evaluation.json`; prints itself as a sentence and a table."""

    content: dict

    def value(self, key: str) -> float | None:
        """A metric by its key, from whichever tier holds it; None if it was not measured or is undefined."""
        entry = self.metrics().get(key)
        return entry["value"] if entry else None

    def metrics(self) -> dict[str, dict]:
        return {
            k: m for tier in sorted(self.content["tiers"]) for k, m in self.content["tiers"][tier]["metrics"].items()
        }

    def warnings(self) -> list[str]:
        return [w for tier in sorted(self.content["tiers"]) for w in self.content["tiers"][tier]["warnings"]]

    def health(self) -> str:
        """One honest sentence: FVU, L0, silent features, and the losses themselves."""
        m, parts = self.metrics(), []
        if "fvu" in m:
            ci = m["fvu"]["ci95"]
            spread = f" ± {(ci[1] - ci[0]) / 2:.3f}" if ci else ""
            F = self.content["sae"]["F"]
            silent = 1 - m["alive"]["value"]
            parts.append(
                f"FVU {m['fvu']['value']:.3f}{spread}, L0 {m['l0']['value']:.1f}, {percent(silent)} of {F:,} features silent "
                f"over {millions(m['alive']['n'])} tokens"
            )
        if "ce_clean" in m:
            zero, mean = m["ce_recovered_zero"]["value"], m["ce_recovered_mean"]["value"]
            recovered = (
                f", {percent(zero)} and {percent(mean)} recovered" if zero is not None and mean is not None else ""
            )
            parts.append(
                f"CE {m['ce_clean']['value']:.2f} → {m['ce_sae']['value']:.2f} nats with the SAE in place, "
                f"{m['ce_zero']['value']:.2f} with zeros, {m['ce_mean']['value']:.2f} with the mean{recovered}"
            )
        return "; ".join(parts)

    def table(self) -> str:
        """metric, value ± half interval, baselines, unit; headline metrics first; at most 100 columns."""
        metrics = self.metrics()
        order = [k for k in HEADLINE if k in metrics] + [k for k in metrics if k not in HEADLINE]
        rows = [("metric", "value", "± 95 %", "unit", "")]
        for key in order:
            m = metrics[key]
            value = "–" if m["value"] is None else number(m["value"])
            half = "" if not m["ci95"] else number((m["ci95"][1] - m["ci95"][0]) / 2)
            beside = ", ".join(f"{k} {number(v)}" for k, v in m["baselines"].items())
            rows.append((key, value, half, m["unit"], "; ".join(p for p in (beside, m["note"]) if p)))
        widths = [max(len(r[i]) for r in rows) for i in range(4)]
        lines = [
            f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:<{widths[3]}}  {r[4]}"[:100].rstrip()
            for r in rows
        ]
        return "\n".join([lines[0], "─" * min(100, max(map(len, lines))), *lines[1:]])

    def __str__(self) -> str:
        warnings = "".join(f"\nwarning: {w}" for w in self.warnings())
        return f"{self.health()}\n\n{self.table()}{warnings}"

    def save(self, folder: Path, seconds: dict[str, float]):
        """Writes `evaluation.json`, keeping tiers of the same SAE on the same data that were not computed now; results of
        another SAE are replaced. Appends to the history."""
        path = folder / FILE
        old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if _belongs(old) == _belongs(self.content):
            self.content["tiers"] = dict(sorted({**old["tiers"], **self.content["tiers"]}.items()))
        atomic_write(path, pretty_json(self.content))
        line = {
            "date": time.strftime("%Y-%m-%d"),
            "seconds": seconds,
            "tiers": sorted(seconds),
            "metrics": {k: m["value"] for k, m in self.metrics().items()},
        }
        with open(folder / "evaluation.history.jsonl", "a", encoding="utf-8") as history:
            history.write(json.dumps(line, ensure_ascii=False) + "\n")


def load_evaluation(folder: str | Path) -> Evaluation:
    """The stored evaluation of an SAE folder; SaekitError if there is none, it is newer, or belongs to another SAE."""
    folder = Path(folder)
    path = folder / FILE
    if not path.is_file():
        raise SaekitError(f"{folder} has no evaluation yet: run  saekit evaluate {folder}")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT or content.get("format_version") != FORMAT_VERSION:
        raise SaekitError(
            f"{path} has evaluation format {content.get('format_version')}, this saekit reads {FORMAT_VERSION}"
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content["sae"]["fingerprint"] != config["fingerprint"]:
        raise SaekitError(f"{path} belongs to another SAE; run  saekit evaluate {folder}")
    return Evaluation(content)


def _belongs(content: dict) -> tuple:
    """What two evaluations must share for their tiers to stand in one file; each metric says its own number of tokens."""
    data = content.get("data", {})
    return (
        content.get("format_version"),
        content.get("sae", {}).get("fingerprint"),
        *(data.get(key) for key in ("store", "model", "site", "split")),
    )


def new_evaluation(config: dict, data: dict, compute: str, torch_version: str) -> Evaluation:
    sae = {
        "fingerprint": config.get("fingerprint"),
        "variant": config["variant"],
        "F": config["d_sae"],
        "D": config["d_in"],
        "k": config["options"].get("k"),
        "signed": config["signed"],
        "seed": (config.get("provenance") or {}).get("seed"),
    }
    return Evaluation(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "saekit_version": saekit.__version__,
            "sae": sae,
            "data": data,
            "tiers": {},
            "environment": {"torch": torch_version, "compute": compute},
        }
    )


def percent(share: float) -> str:
    """`97 %`, `99.4 %`, `0.3 %`: one decimal where a whole number would round to 0 or 100."""
    p = 100 * share
    return f"{p:.1f} %" if 0 < p < 2 or 98 < p < 100 else f"{p:.0f} %"


def millions(n: int) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n:,}"


def number(v: float) -> str:
    if v == 0 or 1e-3 <= abs(v) < 1e5:
        return f"{v:,.0f}" if abs(v) >= 1000 or (v == int(v) and abs(v) >= 10) else f"{v:.4g}"
    return f"{v:.2e}"
