"""Three measurements that the design of the Triton kernels leans on; they want a GPU.

    python kernels/benchmarks/micro.py [--only product | gather | segment] [--save] [--results FILE] [--tiny]

product  a matrix product by the library, by Triton with a filter that nothing passes, with one that a selection would set, and
         the whole encode-and-select on both paths: is the fused product worth its slower loop (93 % of the library's rate)?
gather   decode, residual and value gradient by the width of a slice, features drawn uniformly and by Zipf's law: the rate at
         which rows come out of the cache, and which slice is best.
segment  weight gradients with windows and the dense product for busy features, windows alone, and neither, for uniform and for
         Zipf usage: what skew costs (the aim: at most 1.3 × uniform).

`--tiny` runs everything once at toy sizes, with TRITON_INTERPRET=1 without a GPU: it shows that the code runs and times nothing.
"""

import argparse
import datetime
import importlib
from pathlib import Path

import torch
from bench import RESULTS, append, device_name, own_version, spread, versions
from saekit_kernels import Codes, RowCount, Workspace, build_csc, encode_select, using


class Bench:
    def __init__(self, tiny: bool):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tiny, self.rows = tiny, []
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16

    def time(self, op: str, provider: str, shape, usage: str, function, *, flops: float = 0, moved: float = 0) -> None:
        """A row: median of the runs, and the rate that follows from the work."""
        function()
        if self.tiny:
            return print(f"{op} {provider} {usage}: ran")
        import triton.testing

        # L2 is emptied between two runs; p20, median, p80
        p20, median, p80 = triton.testing.do_bench(function, quantiles=[0.2, 0.5, 0.8])
        rate = f"{flops / median / 1e9:.0f} TFLOP/s" if flops else f"{moved / median / 1e6:.0f} GB/s"
        print(f"{op:<10}{provider:<28}{usage:<9}{shape!s:<28}{median:9.3f} ms  {rate}", flush=True)
        B, D, F, K = shape
        self.rows.append(
            {
                "date": datetime.date.today(), "op": f"micro {op}", "provider": provider, "version": own_version(),
                "B": B, "D": D, "F": F, "K": K, "dtype": str(self.dtype).removeprefix("torch."), "usage": usage,
                "device": device_name(self.device), **versions(self.device),
                **dict(zip(("p20_ms", "median_ms", "p80_ms"), spread([p20, median, p80]), strict=True)),
            }
        )  # fmt: skip

    def product(self):
        encode = importlib.import_module("saekit_kernels.triton.encode")
        B, F, K = (64, 512, 4) if self.tiny else (8192, 65_536, 64)
        compute = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        for D in (32,) if self.tiny else (768, 2304, 4096):
            x, W, b = (torch.randn(*n, device=self.device) for n in ((B, D), (F, D), (F,)))
            W /= D**0.5
            narrow = x.to(self.dtype), W.to(self.dtype)
            shape, work = (B, D, F, K), 2.0 * B * D * F
            self.time("product", "library", shape, "normal", lambda pair=narrow: pair[0] @ pair[1].T, flops=work)
            encoder = encode.Encoder(x, W, b, None, compute, Workspace())
            job = encode._Job(encoder, "relu", None, compute, Workspace(), encode.Options())
            lists = job.empty(B, 1024, dtype=torch.float32), job.empty(B, 1024), job.zeros(B)
            bar = torch.distributions.Normal(0.0, 2**0.5).icdf(torch.tensor(1 - 3 * K / F)).to(self.device)
            for name, above in (("filter, nothing passes", bar + 1e9), ("filter, 3k a row pass", bar)):
                floors = job.bar(above.expand(B))

                def filtered(floors=floors, job=job, lists=lists):
                    lists[2].zero_()
                    job.filter(floors, *lists, cap=1024, phase=2)

                # 12 of 16 tiles of columns
                self.time("product", name, shape, "normal", filtered, flops=work * 12 / 16)
            for path in ("portable", "triton"):
                kept = Workspace()

                def whole(path=path, x=x, W=W, b=b, kept=kept):
                    with using(path):
                        encode_select(x, W, b, rule=RowCount(K), compute=compute, workspace=kept)

                self.time("product", f"encode_select {path}", shape, "normal", whole, flops=work)

    def codes(self, B: int, F: int, K: int, usage: str) -> Codes:
        """K features for each of B tokens: the largest of F random numbers, weighted."""
        weight = torch.ones(F) if usage == "uniform" else 1 / (torch.arange(F) + 7.0)
        key = torch.rand(B, F, device=self.device).log_().div_(weight.to(self.device))
        index = key.topk(K, dim=1, sorted=False).indices.sort(dim=1).values
        return Codes.rowwise(torch.rand(B, K, device=self.device) + 0.1, index, F)

    def gather(self):
        decode = importlib.import_module("saekit_kernels.triton.decode")
        B, D, F, K = (8, 48, 64, 4) if self.tiny else (8192, 2304, 65_536, 64)
        W = torch.randn(F, D, device=self.device).to(self.dtype)
        b, target = torch.zeros(D, device=self.device), torch.randn(B, D, device=self.device)
        table, shipped = decode.WHOLE[self.dtype], dict(decode.WHOLE[self.dtype])
        try:
            for usage in ("uniform", "zipf"):
                codes = self.codes(B, F, K, usage)
                for BD, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
                    # 64 slots a row, or the fewest that are shipped
                    table[max(min(shipped), K)] = (BD, warps)
                    self.time(
                        "gather", f"slice {BD}, {warps} warps", (B, D, F, K), usage,
                        lambda codes=codes: decode.decode_residual_value_grad(codes, W, b, target),
                        moved=B * K * D * W.element_size(),
                    )  # fmt: skip
        finally:
            table.update(shipped)

    def segment(self):
        grads = importlib.import_module("saekit_kernels.triton.grads")
        B, D, F, K = (600, 32, 40, 4) if self.tiny else (8192, 2304, 65_536, 64)
        rows = torch.randn(B, D, device=self.device)
        before = grads.WINDOW, grads.LONG
        try:
            for usage in ("uniform", "zipf"):
                codes = self.codes(B, F, K, usage)
                csc, coef = build_csc(codes), torch.randn_like(codes.values)
                for name, window, long in (
                    ("windows, dense busy ones", *before), ("windows", before[0], B), ("plain", 1 << 20, B),
                ):  # fmt: skip
                    grads.WINDOW, grads.LONG = window, long
                    self.time(
                        "segment", name, (B, D, F, K), usage,
                        lambda csc=csc, coef=coef: grads.weight_grads(csc, coef, rows, coef, rows),
                        moved=2 * B * K * D * 4,
                    )  # fmt: skip
        finally:
            grads.WINDOW, grads.LONG = before


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["product", "gather", "segment"])
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("micro: there is no GPU here; --tiny with TRITON_INTERPRET=1 runs without one")
    bench = Bench(args.tiny)
    for name in ("product", "gather", "segment"):
        if args.only in (None, name):
            getattr(bench, name)()
    if args.save and bench.rows:
        append(bench.rows, args.results)


if __name__ == "__main__":
    main()
