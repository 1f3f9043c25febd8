"""Times the ops and the whole step on one device, beside plain PyTorch doing the same work, in turn.

    python kernels/benchmarks/bench.py [--op NAME] [--device cuda] [--shape B,D,F,K …] [--rounds 7] [--save]

Inputs: activations made of a trained-like dictionary whose features fire with Zipf frequencies, plus noise; nothing is zero
or uniform. Each figure is the median of the rounds, own and plain interleaved; `--save` appends rows to results.csv.
Plain: dense autograd with `torch.topk`, fused Adam, projection and unit norm; parity of the loss is checked first.

B tokens · D width · F features · K kept per token
"""

import argparse
import csv
import datetime
import math
import statistics
import time
from pathlib import Path

import torch
from saekit_kernels import (
    RowCount,
    Workspace,
    build_csc,
    decode,
    decode_residual_value_grad,
    encode_select,
    explain,
    row_adam_,
    segment_weight_grads,
)

SHAPES = [(4096, 192, 3072, 32), (2048, 768, 24576, 32)]
ADAM = {"lr": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 6.25e-10}


def inputs(B: int, D: int, F: int, K: int, device: str):
    """x_BD and a dictionary it is made of: feature r fires with probability ∝ 1/(r + 7), K of them per token on average."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    p = 1 / (torch.randperm(F, generator=g) + 7.0)
    p = (p * K / p.sum()).clamp(max=0.5)
    codes = (torch.rand(B, F, generator=g) < p) * torch.empty(B, F).exponential_(1.0, generator=g)
    x = codes @ W + 0.05 * torch.randn(B, D, generator=g)
    return (x / x.square().sum(1).mean().sqrt()).to(device), W.to(device)


class Own:
    """The step on sparse codes."""

    def __init__(self, x, W, K):
        self.x, self.rule = x, RowCount(K)
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = (
            W.clone(),
            W.clone(),
            W.new_zeros(len(W)),
            W.new_zeros(W.shape[1]),
        )
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (self.W_enc, self.W_dec)]
        self.out, self.workspace, self.t = (torch.empty_like(W), torch.empty_like(W)), Workspace(), 0

    def encode(self, csc=True):
        return encode_select(
            self.x,
            self.W_enc,
            self.b_enc,
            self.b_dec,
            rule=self.rule,
            compute="fp32",
            csc=csc,
            workspace=self.workspace,
        )

    def gradients(self, encoded, decoded):
        s = 1 / len(self.x)
        return segment_weight_grads(
            encoded.csc,
            -2 * s * encoded.codes.values,
            decoded.residual_BD,
            -2 * s * decoded.dv,
            self.x - self.b_dec,
            out=self.out,
        )

    def update(self, gradients):
        self.t += 1
        for w, (m, v), g, unit in zip(
            (self.W_enc, self.W_dec), self.moments, (gradients.W_enc_FD, gradients.W_dec_FD), (False, True), strict=True
        ):
            row_adam_(w, m, v, g, step=self.t, unit_norm=unit, **ADAM)

    def step(self) -> float:
        encoded = self.encode()
        decoded = decode_residual_value_grad(encoded.codes, self.W_dec, self.b_dec, self.x)
        self.update(self.gradients(encoded, decoded))
        return decoded.sq_B.mean().item()


class Plain:
    """The same step by dense autograd."""

    def __init__(self, x, W, K):
        self.x, self.K = x, K
        self.W_enc, self.W_dec = W.clone().requires_grad_(), W.clone().requires_grad_()
        self.b_enc, self.b_dec = W.new_zeros(len(W)), W.new_zeros(W.shape[1])
        self.adam = torch.optim.Adam([self.W_enc, self.W_dec], lr=ADAM["lr"], eps=ADAM["eps"], fused=True)

    def codes(self):
        pre = torch.addmm(self.b_enc, self.x - self.b_dec, self.W_enc.T)
        top = pre.topk(self.K, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())

    def step(self) -> float:
        with torch.enable_grad():
            loss = (self.x - self.codes() @ self.W_dec - self.b_dec).square().sum(1).mean()
        self.adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec
            self.adam.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        return loss.item()


def pieces(own: Own, plain: Plain) -> dict:
    """op → (own, plain or None), each a function without arguments."""
    encoded = own.encode()
    decoded = decode_residual_value_grad(encoded.codes, own.W_dec, own.b_dec, own.x)
    gradients = own.gradients(encoded, decoded)
    dense = encoded.codes.dense()
    return {
        "encode_select": (lambda: own.encode(csc=False), plain.codes),
        "build_csc": (lambda: build_csc(encoded.codes), None),
        "decode": (lambda: decode(encoded.codes, own.W_dec, own.b_dec), lambda: dense @ own.W_dec + own.b_dec),
        "decode_residual_value_grad": (
            lambda: decode_residual_value_grad(encoded.codes, own.W_dec, own.b_dec, own.x),
            None,
        ),
        "segment_weight_grads": (
            lambda: own.gradients(encoded, decoded),
            lambda: (dense.T @ decoded.residual_BD, dense.T @ own.x),
        ),
        "row_adam_": (lambda: own.update(gradients), None),
        "step": (own.step, plain.step),
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("bench: there is no GPU here")
    for line in explain(args.device):
        print(f"{line.op}: {line.path} ({line.reason})")
    rows = []
    for shape in [tuple(map(int, s.split(","))) for s in args.shape] or SHAPES:
        x, W = inputs(*shape, args.device)
        losses = Own(x, W, shape[3]).step(), Plain(x, W, shape[3]).step()
        if not math.isclose(*losses, rel_tol=1e-4):
            raise SystemExit(f"bench: losses differ, {losses[0]:.6g} and {losses[1]:.6g}: no ratio is printed")
        print(f"\n(B, D, F, K) = {shape}, loss {losses[0]:.5f} on both roads")
        for op, pair in pieces(Own(x, W, shape[3]), Plain(x, W, shape[3])).items():
            if args.op not in (None, op):
                continue
            times = [[milliseconds(f, args.device) if f else math.nan for f in pair] for _ in range(args.rounds + 1)][
                1:
            ]
            own, plain = (statistics.median(t) for t in zip(*times, strict=True))
            ratio = f"{plain:9.1f} ms plain, {plain / own:4.1f} times" if pair[1] else ""
            print(f"{op:<27}{own:9.1f} ms  {ratio}", flush=True)
            spread = sorted(t[0] for t in times)
            rows.append(
                [
                    datetime.date.today(),
                    op,
                    *shape,
                    "float32",
                    "zipf",
                    args.device,
                    torch.get_num_threads(),
                    torch.__version__,
                    round(own, 3),
                    round(spread[0], 3),
                    round(spread[-1], 3),
                    round(plain, 3) if pair[1] else "",
                ]
            )
    if args.save:
        path = Path(__file__).with_name("results.csv")
        new = not path.is_file()
        with open(path, "a", newline="") as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(
                    [
                        "date",
                        "op",
                        "B",
                        "D",
                        "F",
                        "K",
                        "dtype",
                        "usage",
                        "device",
                        "threads",
                        "torch",
                        "median_ms",
                        "min_ms",
                        "max_ms",
                        "plain_ms",
                    ]
                )
            writer.writerows(rows)


if __name__ == "__main__":
    main()
