"""Times whole training steps: saekit's public `Trainer.step` and its peers', in turn, in one run.

    python kernels/benchmarks/step.py [--shape B,D,F,K …] [--provider NAME …] [--rounds 7] [--aux] [--device cuda] [--save]
    python kernels/benchmarks/step.py table            # Markdown, from the newest rows of results.csv
    python kernels/benchmarks/step.py plot             # docs/images/step.png, from the same rows; needs Chromium

Each provider (peers.py) is a process of its own, since their environments differ; they answer in turn, all others idle, and how
much processor the idle ones used is printed. Where memory does not hold all of them at once they run in groups, saekit in each.
Peers come from PyPI (peers.txt) into ~/.cache/saekit-benchmarks/peers, once; with a GPU the Python at hand must have them.

Before a time counts, the loss of the first step is held to a float64 reference on the same weights and batch, in the provider's
own scale; a ratio is printed only where both it and saekit passed. Peak memory: growth of one process since before its weights.
`--aux`: AuxK is on, with 3 % of features dead for all.

B tokens in a batch · D model width · F features · K kept per token
"""

import argparse
import contextlib
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench import RESULTS, append, device_name, inputs, shape_of, spread, versions
from peers import LABELS, PROVIDERS, from_peers
from torch import Tensor

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PEERS = Path.home() / ".cache" / "saekit-benchmarks" / "peers"
SHAPES = [
    (2048, 768, 24576, 32),
    (2048, 512, 8192, 32),
    (4096, 768, 49152, 64),
    (4096, 576, 9216, 32),
    (512, 128, 1024, 16),
]
GPU_SHAPES = [(4096, 768, 24576, 32), (8192, 2304, 16384, 64), (8192, 2304, 65536, 64), (8192, 2048, 4096, 32)]
QUICK = [(64, 32, 256, 8)]
DEAD_SHARE, BATCHES = 0.03, 3
# largest relative error of a first loss: rounding, and with rounded keys other choices among near-ties
TOLERANCE = {"fp32": 2e-5, "tf32": 5e-3, "bf16": 5e-3}
# of CPU time that idle workers, and other programs, may take from a timed step before a warning is printed
STOLEN, BUSY = 0.005, 0.05
# seconds in which the threads of the one timed before go to sleep
SETTLE = 0.05


def peers_python(wanted: str | None, device: str) -> str:
    """The Python that has the peers; makes their environment where there is none as peers.txt lists it."""
    if wanted or device != "cpu":
        return wanted or sys.executable
    ready, listed = PEERS / "ready", (HERE / "peers.txt").read_text(encoding="utf-8")
    if not (ready.is_file() and ready.read_text(encoding="utf-8") == listed):
        print(f"installing the peers in {PEERS}", flush=True)
        shutil.rmtree(PEERS, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        pip = [PEERS / "bin/python", "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", "-r", HERE / "peers.txt"], check=True)
        # nnsight asks for it and nobody here uses it; beside a CPU build of torch PyPI's cannot be imported, nor then transformers
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)
        ready.write_text(listed, encoding="utf-8")
    return str(PEERS / "bin/python")


class Failed(Exception):
    """A provider could not do what it was asked."""


class Worker:
    """The process of one provider at one precision."""

    def __init__(self, name: str, precision: str, python: str, threads: int, wait: str, log: Path):
        self.name, self.precision, self.log = name, precision, log
        quiet = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
        # compiled before anything is timed; a pool of compilers would count as memory of the step
        quiet |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": str(threads)}
        if wait == "passive":
            quiet |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
        self.process = subprocess.Popen(
            [python, HERE / "peers.py", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(log, "w"),  # noqa: SIM115  (the process keeps it)
            text=True,
            env=os.environ | quiet,
        )

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.precision

    def send(self, do: str, **request) -> None:
        # of a process that has ended, `receive` tells
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict:
        try:
            answer = json.loads(self.process.stdout.readline())
        except (OSError, json.JSONDecodeError):
            last = self.log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise Failed(f"its process ended with {self.process.wait()}: {' '.join(last)}") from None
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def ask(self, do: str, **request) -> dict:
        self.send(do, **request)
        return self.receive()

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def cpu_seconds(self) -> float:
        """Time its threads have run so far."""
        total = 0
        for path in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            try:
                total += int(path.read_text().split()[0])
            except (OSError, ValueError):
                continue
        return total / 1e9


def busy_seconds() -> float | None:
    """Time that all processors have worked, for anyone."""
    try:
        user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def free_bytes(device: str) -> float:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return 8e9


def entries(device: str, names: list[str]) -> list[tuple[str, str]]:
    """(provider, precision): saekit in its default precision and in strict fp32, the others in what they offer."""
    from saekit_kernels import why_not_bf16

    own = ["fp32"] if why_not_bf16(device) else ["bf16", "fp32"]
    theirs = ["fp32"] if device == "cpu" else ["tf32", "bf16"]
    return [(name, p) for name in names for p in (own if name == "saekit" else theirs)]


def groups(keys: list[tuple[str, str]], shape, device: str) -> list[list[tuple[str, str]]]:
    """Splits the providers so that each group fits: all hold weights, gradients and Adam; one at a time holds dense codes too."""
    B, D, F, _ = shape
    own = [key for key in keys if key[0] == "saekit"]
    others = [key for key in keys if key[0] != "saekit"]
    library, step = (0.6e9 if device == "cpu" else 0.7e9), 10 * 4 * B * F
    each = library + 4 * 8 * F * D + BATCHES * 4 * B * D
    room = int((0.9 * free_bytes(device) - step) / each) - len(own)
    if room < 1:
        raise SystemExit(
            f"step: {shape} needs about {(step + each * (len(own) + 1)) / 1e9:.0f} GB, "
            f"{free_bytes(device) / 1e9:.0f} are free; pass a smaller --shape"
        )
    n = max(1, -(-len(others) // room))
    return [own + others[i::n] for i in range(n)]


def decoded(indices: Tensor, values: Tensor, W_FD: Tensor) -> Tensor:
    return torch.nn.functional.embedding_bag(indices, W_FD, mode="sum", per_sample_weights=values)


@torch.no_grad()
def truth(x_BD: Tensor, W_enc_FD: Tensor, W_dec_FD: Tensor, dead_A: Tensor, K: int) -> dict[str, float]:
    """What `Provider.expected` needs, in float64, in pieces of rows. Biases are 0."""
    x_BD, W_enc, W_dec, D = x_BD.double(), W_enc_FD.double(), W_dec_FD.double(), x_BD.shape[1]
    errors, sums = [], {}
    for x in x_BD.split(256):
        pre = x @ W_enc.T
        values, indices = pre.topk(K, dim=1)
        e = x - decoded(indices, values.relu(), W_dec)
        errors.append(e)
        if len(dead_A):
            values, indices = pre[:, dead_A].topk(min(D // 2, len(dead_A)), dim=1)
            for name, v in (("aux", values.relu()), ("aux_signed", values)):
                sums[name] = sums.get(name, 0) + (e - decoded(indices, v, W_dec[dead_A])).square().sum()
    e = torch.cat(errors)
    sums |= {
        "sq": e.square().sum(),
        "spread": (e - e.mean(0)).square().sum(),
        "var": (x_BD - x_BD.mean(0)).square().sum(),
    }
    return {"D": D, "dead": len(dead_A), **{name: float(total) / len(x_BD) for name, total in sums.items()}}


def parity(found: dict[str, float], expected: dict[str, float]) -> float:
    """Largest relative error of the losses; inf where one is missing or no number."""
    worst = 0.0
    for name, value in expected.items():
        off = abs(found.get(name, float("nan")) - value) / max(abs(value), 1e-12)
        worst = max(worst, off if off == off else float("inf"))
    return worst


class Result:
    """What one provider gave at one shape."""

    def __init__(self, worker: Worker):
        self.key, self.worker = worker.key, worker
        self.times: list[float] = []
        self.products: list[float] = []
        self.error = self.peak_mb = float("nan")
        self.info: dict = {}
        self.passed = False
        self.count, self.warm = 1, 0
        """Steps per round, and untimed ones before them."""

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def write_inputs(folder: str, shape, aux: bool, device: str) -> dict[str, float]:
    """Weights and batches for the workers; returns `truth` of the first batch."""
    B, D, F, K = shape
    x, W_dec = inputs(B, D, F, K, device, batches=BATCHES)
    W_enc = W_dec.clone()
    n = round(DEAD_SHARE * F) if aux else 0
    dead = torch.randperm(F, generator=torch.Generator().manual_seed(1))[:n].sort().values.to(device)
    # never among the K largest, yet with pre-activations of both signs
    W_enc[dead] *= 0.05
    arrays = {"x": x.view(BATCHES, B, D), "W_enc": W_enc, "W_dec": W_dec, "dead": dead}
    for name, tensor in arrays.items():
        np.save(f"{folder}/{name}.npy", tensor.cpu().numpy())
    return truth(x[:B], W_enc, W_dec, dead, K)


def prepared(worker: Worker, folder: str, shape, expected: dict[str, float], options) -> Result:
    """Builds the provider, does its first step and holds its loss to the reference; measures memory in the next one."""
    result, kind = Result(worker), PROVIDERS[worker.name]
    result.info = worker.receive()
    worker.ask("make", folder=folder, K=shape[3])
    result.error = parity(worker.ask("first")["losses"], kind.expected(expected))
    result.passed = result.error <= TOLERANCE[worker.precision]
    # the second step may compile or allocate what stays
    worker.ask("steps", warm=0, count=1)
    memory = worker.ask("memory")
    result.peak_mb = memory["peak_mb"]
    ms = worker.ask("steps", warm=1 if memory["ms"] < 1000 else 0, count=1)["ms"]
    # short steps are timed by the quarter of a second, behind some that bring their memory back into the caches
    result.count = max(1, min(200, round(250 / ms)))
    result.warm = max(1, result.count // 4) if ms < 1000 else 0
    return result


def timed(results: list[Result], options) -> None:
    """The rounds, in turn, each beginning with another provider."""
    stolen = whole = 0.0
    began, busy, own = time.monotonic(), busy_seconds(), [r.worker.cpu_seconds() for r in results]
    for i in range(options.rounds):
        turn = i % len(results)
        for result in results[turn:] + results[:turn]:
            time.sleep(SETTLE)
            idle = [r.worker for r in results if r is not result]
            before, start = sum(w.cpu_seconds() for w in idle), time.monotonic()
            result.times.append(result.worker.ask("steps", warm=result.warm, count=result.count)["ms"])
            stolen += sum(w.cpu_seconds() for w in idle) - before
            whole += time.monotonic() - start
            if result.key[0] == "saekit":
                result.products.append(result.worker.ask("product", count=result.count)["ms"])
    share = stolen / whole
    print(f"idle workers used {1000 * stolen:.1f} ms of CPU in {whole:.1f} s of timed steps ({share:.2%})", end="")
    print("  WARNING: idle workers took time from the timed ones" if share > STOLEN else "")
    if busy is not None:
        used = sum(r.worker.cpu_seconds() for r in results) - sum(own)
        others = max(0.0, busy_seconds() - busy - used) / (time.monotonic() - began)
        print(f"other programs used {others:.2f} processors meanwhile", end="")
        print("  WARNING: the machine was not idle, these times are no measurement" if others > BUSY else "")


def print_table(shape, results: list[Result]) -> None:
    B, D, F, _ = shape
    own = {r.key[1]: r for r in results if r.key[0] == "saekit" and r.passed}
    best = min(own.values(), key=lambda r: r.median, default=None)
    print(
        f"{'':<44}{'':<6}{'median ms':>10}{'p20':>9}{'p80':>9}{'ratio':>8}{'peak MB':>9}{'beyond':>8}{'loss off by':>13}"
    )
    for r in results:
        low, middle, high = spread(r.times)
        ratio = f"{middle / best.median:.2f}" if best and r.passed and r is not best else "" if r.passed else "no"
        beyond = 1e6 * r.peak_mb - 4 * 4 * (2 * F * D + F + D)
        print(
            f"{LABELS[r.key[0]]:<44}{r.key[1]:<6}{middle:>10.1f}{low:>9.1f}{high:>9.1f}{ratio:>8}{r.peak_mb:>9.0f}"
            f"{beyond / (4 * B * F):>8.0%}{r.error:>13.1e}" + ("" if r.passed else "  PARITY FAILED"),
        )
    for r in own.values():
        share = statistics.median(r.products) / r.median
        print(
            f"saekit {r.key[1]}: encoder product alone {statistics.median(r.products):.1f} ms, {share:.0%} of the step"
        )
    print(
        "beyond: peak less weights, gradients and Adam's state (16 bytes a parameter), as a share of one (B, F) fp32 matrix"
    )


def measure(shape, options, pythons: Callable[[str], str]) -> tuple[list[dict], bool]:
    """Rows for results.csv, and whether all that ran kept parity."""
    rows, fine = [], True
    op = "step_aux" if options.aux else "step"
    with tempfile.TemporaryDirectory() as folder:
        expected = write_inputs(folder, shape, options.aux, options.device)
        keys = entries(options.device, options.provider)
        for number, group in enumerate(groups(keys, shape, options.device)):
            run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}/{number}"
            print(
                f"\n(B, D, F, K) = {shape}, {op}, {options.threads} threads, load {os.getloadavg()[0]:.2f}", flush=True
            )
            workers, results = [], []
            try:
                for name, precision in group:
                    log = Path(folder) / f"{name}-{precision}.log"
                    workers.append(Worker(name, precision, pythons(name), options.threads, options.wait, log))
                for worker in workers:
                    # imports side by side; all else one by one
                    worker.send("load", threads=options.threads, device=options.device, precision=worker.precision)
                for worker in workers:
                    try:
                        results.append(prepared(worker, folder, shape, expected, options))
                    except Failed as error:
                        print(f"{LABELS[worker.name]} {worker.precision}: left out, {error}", flush=True)
                        fine = False
                        worker.close()
                if results:
                    timed(results, options)
                    print_table(shape, results)
                for result in results:
                    moved = result.worker.ask("moved")
                    if not all(0 < m < 0.5 for m in moved["moved"].values()):
                        print(
                            f"{LABELS[result.key[0]]}: its weights moved by {moved['moved']}: that is no training step"
                        )
                        result.passed = False
            except Failed as error:
                print(f"a provider failed while it was timed, no figure of this group counts: {error}")
                fine, results = False, []
            finally:
                for worker in workers:
                    worker.close()
            print(f"load {os.getloadavg()[0]:.2f} behind", flush=True)
            fine &= all(r.passed for r in results)
            rows += [row(shape, op, run, r, options) for r in results]
    return rows, fine


def row(shape, op: str, run: str, r: Result, options) -> dict:
    low, middle, high = spread(r.times)
    return {
        "date": run[:10],
        "run": run,
        "op": op,
        "provider": r.key[0],
        "version": r.info["version"],
        **dict(zip("BDFK", shape)),
        "dtype": r.key[1],
        "usage": "zipf",
        "device": device_name(options.device),
        "threads": r.info["threads"],
        **versions(options.device),
        "torch": r.info["torch"],
        "median_ms": round(middle, 3),
        "p20_ms": round(low, 3),
        "p80_ms": round(high, 3),
        "peak_mb": round(r.peak_mb, 1),
        "product_ms": round(statistics.median(r.products), 3) if r.products else "",
        "parity": f"{r.error:.1e}" if r.passed else "failed",
    }


def newest(path: Path) -> dict[str, dict[str, dict[tuple, dict[tuple, dict]]]]:
    """op → device → shape → (provider, dtype) → row, its ratio to the best saekit of its own run under `ratio`."""
    with open(path, newline="", encoding="utf-8") as f:
        rows = [r for r in csv.DictReader(f) if r["run"] and r["parity"] not in ("", "failed")]
    own: dict[tuple, float] = {}
    for r in rows:
        if r["provider"] == "saekit":
            at = r["run"], r["op"]
            own[at] = min(own.get(at, float("inf")), float(r["median_ms"]))
    found: dict = {}
    for r in sorted(rows, key=lambda r: r["run"]):
        if (at := (r["run"], r["op"])) in own:
            shape = tuple(int(r[c]) for c in "BDFK")
            r["ratio"] = float(r["median_ms"]) / own[at]
            found.setdefault(r["op"], {}).setdefault(r["device"], {}).setdefault(shape, {})[
                r["provider"], r["dtype"]
            ] = r
    return found


TITLES = {"step": "AuxK off", "step_aux": "AuxK on, 3 % of features dead"}


def table(path: Path) -> str:
    """Markdown. A cell: median ms, how many times saekit's best step of the same run; bold where saekit loses."""
    lines = []
    for op, devices in newest(path).items():
        for device, shapes in devices.items():
            keys = [(n, p) for n in LABELS for p in TOLERANCE if any((n, p) in cells for cells in shapes.values())]
            ordered = sorted(shapes, key=lambda s: (SHAPES + GPU_SHAPES).index(s) if s in SHAPES + GPU_SHAPES else 99)
            any_row = next(iter(shapes[ordered[0]].values()))
            lines.append(
                f"{device}, {any_row['threads']} threads, torch {any_row['torch']}, {TITLES[op]}; ms, ratio to saekit\n"
            )
            lines.append("| (B, D, F, K) | " + " | ".join(f"({', '.join(map(str, s))})" for s in ordered) + " |")
            lines.append("|---|" + "---|" * len(ordered))
            for name, precision in keys:
                cells = [cell(shapes[s].get((name, precision))) for s in ordered]
                lines.append(f"| {LABELS[name]}, {precision} | " + " | ".join(cells) + " |")
            for name, precision in keys:
                if name == "saekit":
                    shares = [shapes[s].get((name, precision)) for s in ordered]
                    shares = [f"{float(r['product_ms']) / float(r['median_ms']):.0%}" if r else "–" for r in shares]
                    lines.append(f"| share of the encoder's product, {precision} | " + " | ".join(shares) + " |")
            lines += ["", "Peak memory of a step, MB\n"]
            lines.append("| (B, D, F, K) | " + " | ".join(f"({', '.join(map(str, s))})" for s in ordered) + " |")
            lines.append("|---|" + "---|" * len(ordered))
            for name, precision in keys:
                held = [shapes[s].get((name, precision)) for s in ordered]
                held = [f"{float(r['peak_mb']):,.0f}" if r else "–" for r in held]
                lines.append(f"| {LABELS[name]}, {precision} | " + " | ".join(held) + " |")
            lines.append("")
    return "\n".join(lines)


def cell(r: dict | None) -> str:
    if r is None:
        return "–"
    ms = float(r["median_ms"])
    shown = f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}"
    if r["ratio"] == 1:
        return f"**{shown}**"
    return f"{shown}, {r['ratio']:.1f}×" if r["ratio"] >= 1 else f"{shown}, **{r['ratio']:.2f}×: saekit loses**"


def plot(path: Path, out: Path) -> None:
    """Bars of ratio by shape, one panel per op and device."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = [(op, device, shapes) for op, devices in newest(path).items() for device, shapes in devices.items()]
    if not panels:
        raise SystemExit(f"step: {path} has no rows of whole steps yet; run  make bench")
    titles = [f"{device}, {TITLES[op]}" for op, device, _ in panels]
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=0.3 / len(panels))
    palette = ["#888888", "#1f77b4", "#6baed6", "#d95f02", "#fdae6b", "#1b9e77", "#66c2a5", "#a6d854", "#7570b3",
               "#9e9ac8", "#bcbddc", "#dadaeb"]  # fmt: skip
    shown = set()
    for i, (_, _, shapes) in enumerate(panels, 1):
        ordered = sorted(shapes, key=lambda s: s[0] * s[1] * s[2])
        for (name, label), colour in zip(LABELS.items(), palette):
            best = {s: min((r["ratio"] for (n, _), r in shapes[s].items() if n == name), default=None) for s in ordered}
            if any(best.values()):
                x = [str(s) for s in ordered]
                bar = go.Bar(
                    name=label,
                    x=x,
                    y=list(best.values()),
                    marker_color=colour,
                    legendgroup=name,
                    showlegend=name not in shown,
                )
                shown.add(name)
                figure.add_trace(bar, row=i, col=1)
        figure.update_yaxes(type="log", title="time ÷ saekit's", dtick="D2", row=i, col=1)
        figure.add_hline(y=1, line_color="black", line_width=1, row=i, col=1)
    figure.update_xaxes(title="(B, D, F, K)", row=len(panels), col=1)
    height = 120 + 380 * len(panels)
    figure.update_layout(
        template="plotly_white", width=1100, height=height, title="One training step, ratio of medians in one run"
    )
    # the folder of the study is no package
    sys.path.append(str(ROOT / "docs" / "study"))
    import picture

    picture.save(figure, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "table", "plot"], default="run")
    parser.add_argument("--shape", action="append", default=[], type=shape_of, help="B,D,F,K; can be given again")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="default: all; saekit always runs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--aux", action="store_true", help="AuxK on, with 3 %% of features dead")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny shape and two rounds: does everything run and keep parity?"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--wait", choices=["passive", "default"], default="passive", help="OpenMP threads between regions"
    )
    parser.add_argument(
        "--python", help="Python that has the peers; default: their own environment, with a GPU this one"
    )
    parser.add_argument("--budget", type=float, help="seconds after which no further shape begins")
    parser.add_argument("--save", action="store_true", help="append rows to results.csv")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another results.csv, to read or to append to")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "step.png", help="of plot")
    options = parser.parse_args()
    if options.what == "table":
        print(table(options.results))
        return 0
    if options.what == "plot":
        plot(options.results, options.out)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("step: there is no GPU here")
    wanted = options.provider
    options.provider = [n for n in PROVIDERS if n == "saekit" or wanted is None or n in wanted]
    if wanted is None and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        print("torch.compile is left out: there is no C++ compiler here")
        options.provider = [n for n in options.provider if not n.endswith("-compiled")]
    shapes = options.shape
    if not shapes:
        shapes = QUICK if options.quick else SHAPES if options.device == "cpu" else GPU_SHAPES
    if options.quick:
        options.rounds = 2
    theirs = peers_python(options.python, options.device) if any(map(from_peers, options.provider)) else ""
    began, fine = time.monotonic(), True
    for i, shape in enumerate(shapes):
        if options.budget and time.monotonic() - began > options.budget:
            print(f"{options.budget:.0f} s are over: {shapes[i:]} not measured")
            break
        rows, passed = measure(shape, options, lambda name: theirs if from_peers(name) else sys.executable)
        fine &= passed
        if options.save:
            append(rows, options.results)
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
