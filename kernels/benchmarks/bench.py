"""Times each op on one device, beside plain PyTorch doing the same work, in turn. Whole steps and peers: step.py.

    python kernels/benchmarks/bench.py [--op NAME] [--device cuda] [--shape B,D,F,K …] [--rounds 7] [--save]

Inputs: activations made of a trained-like dictionary whose features fire with Zipf frequencies, plus noise; nothing is zero
or uniform. Each figure is the median of the rounds, own and plain interleaved; `--save` appends rows to results.csv.
Before a time counts, the codes' reconstruction error is held to the one of plain PyTorch.

B tokens · D width · F features · K kept per token
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import math
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from saekit_kernels import (
    RowCount,
    Workspace,
    aux_decode,
    build_csc,
    decode,
    decode_residual_value_grad,
    encode_select,
    explain,
    row_adam_,
    segment_adam_,
    segment_weight_grads,
    why_not_bf16,
)

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = [
    "date",
    "run",
    "op",
    "provider",
    "version",
    "B",
    "D",
    "F",
    "K",
    "dtype",
    "usage",
    "device",
    "driver",
    "threads",
    "torch",
    "triton",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "min_ms",
    "max_ms",
    "plain_ms",
    "product_ms",
    "peak_mb",
    "parity",
]
SHAPES = [(4096, 192, 3072, 32), (2048, 768, 24576, 32)]
ADAM = {"lr": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 6.25e-10}
DEAD_SHARE = 0.03


def inputs(B: int, D: int, F: int, K: int, device: str, batches: int = 1):
    """x (batches · B, D) and a dictionary (F, D) it is made of: feature r fires with probability ∝ 1/(r + 7), K of them per
    token on average, with exponential values."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    p = 1 / (torch.randperm(F, generator=g) + 7.0)
    p = (p * K / p.sum()).clamp(max=0.5)
    x = 0.05 * torch.randn(batches * B, D, generator=g)
    for rows in x.split(256):
        token, feature = (torch.rand(len(rows), F, generator=g) < p).nonzero(as_tuple=True)
        values = torch.empty(len(token)).exponential_(1.0, generator=g)
        first = torch.searchsorted(token, torch.arange(len(rows)))
        rows += torch.nn.functional.embedding_bag(feature, W, first, mode="sum", per_sample_weights=values)
    return (x / x.square().sum(1).mean().sqrt()).to(device), W.to(device)


def shape_of(text: str) -> tuple[int, int, int, int]:
    """ "B,D,F,K" as numbers; argparse makes a line of the error."""
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.strip().isdigit() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; pass four numbers B,D,F,K such as 2048,768,24576,32")
    B, D, F, K = map(int, numbers)
    if K > F:
        raise argparse.ArgumentTypeError(f"{text!r}: K = {K} features of F = {F} cannot be kept; lower K")
    return B, D, F, K


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        name = " ".join(lines[next(k for k in lines if k.startswith("model name"))].split())
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions(device: str) -> dict[str, str]:
    """Of torch, Triton, and on a GPU its driver."""
    found = {"torch": torch.__version__, "triton": "", "driver": ""}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    if device != "cpu":
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=20)
            found["driver"] = result.stdout.strip().split("\n")[0]
        except OSError:
            pass
    return found


def own_version() -> str:
    try:
        return importlib.metadata.version("saekit")
    except importlib.metadata.PackageNotFoundError:
        return ""


def spread(times: list[float]) -> tuple[float, float, float]:
    """p20, median, p80."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return tenths[1], statistics.median(times), tenths[7]


def append(rows: list[dict], path: Path) -> None:
    """Appends rows; a file whose header lacks a column gets it, empty in the rows that are there."""
    old, columns = [], COLUMNS
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            old, known = list(reader), list(reader.fieldnames or [])
        if known == COLUMNS:
            with open(path, "a", newline="", encoding="utf-8") as f:
                csv.DictWriter(f, COLUMNS, lineterminator="\n").writerows(rows)
            return
        columns = COLUMNS + [name for name in known if name not in COLUMNS]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(old + rows)


class Own:
    """The ops of a step, on the weights and the batch of `inputs`."""

    def __init__(self, x, W, K, compute):
        self.x, self.rule, self.compute = x, RowCount(K), compute
        self.W_enc, self.W_dec = W.clone(), W.clone()
        self.b_enc, self.b_dec = W.new_zeros(len(W)), W.new_zeros(W.shape[1])
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (self.W_dec, self.W_enc)]
        self.out, self.workspace, self.t = (torch.empty_like(W), torch.empty_like(W)), Workspace(), 0

    def encode(self, csc=True):
        return encode_select(
            self.x,
            self.W_enc,
            self.b_enc,
            self.b_dec,
            rule=self.rule,
            compute=self.compute,
            csc=csc,
            workspace=self.workspace,
        )

    def coefficients(self, encoded, decoded):
        s = 1 / len(self.x)
        coef_dec, coef_enc = -2 * s * encoded.codes.values, -2 * s * decoded.dv
        return encoded.csc, coef_dec, decoded.residual_BD, coef_enc, self.x - self.b_dec

    def update(self, gradients):
        self.t += 1
        for w, (m, v), g, unit in zip(
            (self.W_dec, self.W_enc), self.moments, (gradients.W_dec_FD, gradients.W_enc_FD), (True, False), strict=True
        ):
            row_adam_(w, m, v, g, step=self.t, unit_norm=unit, **ADAM)

    def gradients_and_update(self, coefficients):
        self.t += 1
        segment_adam_(*coefficients, self.W_dec, self.W_enc, *self.moments, step=self.t, **ADAM)


class Plain:
    """The same pieces in plain PyTorch."""

    def __init__(self, x, W, K):
        self.x, self.K = x, K
        self.W_enc, self.W_dec = W.clone(), W.clone()
        self.b_enc, self.b_dec = W.new_zeros(len(W)), W.new_zeros(W.shape[1])
        self.adam = torch.optim.Adam([self.W_enc, self.W_dec], lr=ADAM["lr"], eps=ADAM["eps"], fused=True)

    def codes(self):
        pre = torch.addmm(self.b_enc, self.x - self.b_dec, self.W_enc.T)
        top = pre.topk(self.K, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())

    def update(self, g_dec, g_enc):
        """Projection, fused Adam, unit norm."""
        self.W_enc.grad, self.W_dec.grad = g_enc, g_dec - (g_dec * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.adam.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def aux(self, dead):
        pre = self.x @ self.W_enc[dead].T
        top = pre.topk(min(self.x.shape[1] // 2, len(dead)), dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ self.W_dec[dead]


def pieces(own: Own, plain: Plain) -> dict:
    """op → (own, plain or None), each a function without arguments."""
    encoded = own.encode()
    decoded = decode_residual_value_grad(encoded.codes, own.W_dec, own.b_dec, own.x)
    coefficients = own.coefficients(encoded, decoded)
    gradients = segment_weight_grads(*coefficients, out=own.out)
    dense = encoded.codes.dense()
    dead = torch.arange(0, len(own.W_enc), round(1 / DEAD_SHARE), device=own.x.device)
    rows = own.W_enc[dead], own.b_enc[dead], own.W_dec[dead]
    k_aux = min(own.x.shape[1] // 2, len(dead))

    def plain_gradients():
        return dense.T @ decoded.residual_BD, dense.T @ own.x

    return {
        "encode_select": (lambda: own.encode(csc=False), plain.codes),
        "build_csc": (lambda: build_csc(encoded.codes), None),
        "decode": (lambda: decode(encoded.codes, own.W_dec, own.b_dec), lambda: dense @ own.W_dec + own.b_dec),
        "decode_residual_value_grad": (
            lambda: decode_residual_value_grad(encoded.codes, own.W_dec, own.b_dec, own.x),
            None,
        ),
        "segment_weight_grads": (lambda: segment_weight_grads(*coefficients, out=own.out), plain_gradients),
        "row_adam_": (
            lambda: own.update(gradients),
            lambda: plain.update(gradients.W_dec_FD, gradients.W_enc_FD),
        ),
        "segment_adam_": (lambda: own.gradients_and_update(coefficients), lambda: plain.update(*plain_gradients())),
        "aux_decode": (
            lambda: aux_decode(own.x, own.b_dec, None, *rows, k_aux=k_aux, key="relu"),
            lambda: plain.aux(dead),
        ),
    }


def milliseconds(function, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", action="append", default=[], type=shape_of, help="B,D,F,K; can be given again")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("bench: there is no GPU here")
    if args.compute == "bf16" and (reason := why_not_bf16(args.device)):
        raise SystemExit(f"bench: --compute bf16: {reason}")
    for line in explain(args.device):
        print(f"{line.op}: {line.path} ({line.reason})")
    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    for shape in args.shape or SHAPES:
        x, W = inputs(*shape, args.device)
        own, plain, rows = Own(x, W, shape[3], args.compute), Plain(x, W, shape[3]), []
        theirs = float((x - plain.codes() @ W).square().sum(1).mean())
        mine = float(decode_residual_value_grad(own.encode().codes, W, own.b_dec, x).sq_B.mean())
        off = abs(mine / theirs - 1)
        if not off < (1e-4 if args.compute == "fp32" else 5e-3):
            raise SystemExit(f"bench: errors differ, {mine:.6g} and {theirs:.6g}: no ratio is printed")
        print(f"\n(B, D, F, K) = {shape}, error {theirs:.5f} on both roads, load {os.getloadavg()[0]:.2f}")
        for op, pair in pieces(own, plain).items():
            if args.op not in (None, op):
                continue
            times = [[milliseconds(f, args.device) if f else math.nan for f in pair] for _ in range(args.rounds + 1)]
            mine_ms, plain_ms = zip(*times[1:], strict=True)
            low, middle, high = spread(mine_ms)
            plain_ms = statistics.median(plain_ms)
            ratio = f"{plain_ms:9.1f} ms plain, {plain_ms / middle:4.1f} times" if pair[1] else ""
            print(f"{op:<27}{middle:9.2f} ms  {ratio}", flush=True)
            rows.append(
                {
                    "date": run[:10],
                    "run": run,
                    "op": op,
                    "provider": "saekit",
                    "version": own_version(),
                    **dict(zip("BDFK", shape)),
                    "dtype": args.compute,
                    "usage": "zipf",
                    "device": device_name(args.device),
                    "threads": torch.get_num_threads(),
                    **versions(args.device),
                    "median_ms": round(middle, 3),
                    "p20_ms": round(low, 3),
                    "p80_ms": round(high, 3),
                    "plain_ms": round(plain_ms, 3) if pair[1] else "",
                    "parity": f"{off:.1e}",
                }
            )
        if args.save:
            append(rows, args.results)
        print(f"load {os.getloadavg()[0]:.2f} behind")


if __name__ == "__main__":
    main()
