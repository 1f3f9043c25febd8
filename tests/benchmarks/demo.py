"""How long a new user waits: `saekit --help` beside `import torch`, and the whole demo with its peak memory.

python tests/benchmarks/demo.py [--skip-demo]
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 7


def seconds(*argv: str) -> float:
    start = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - start


def main():
    python = sys.executable
    helps, torches = [], []
    for _ in range(ROUNDS):  # interleaved: the machine's mood hits both
        helps.append(seconds(python, "-m", "saekit", "--help"))
        torches.append(seconds(python, "-c", "import torch"))
    h, t = statistics.median(helps), statistics.median(torches)
    print(f"saekit --help {h:.3f} s, import torch {t:.3f} s: {h / t:.2f} of it (median of {ROUNDS})")
    if "--skip-demo" in sys.argv:
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        wall = seconds(python, "-m", "saekit", "demo", "--no-browser", "--out", str(out))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        metrics = json.loads((out / "saes/topk/evaluation.json").read_text())["tiers"]
        fvu, alive = metrics["1"]["metrics"]["fvu"]["value"], metrics["1"]["metrics"]["alive"]["value"]
        print(f"saekit demo --no-browser: {wall:.0f} s, peak {peak:.2f} GiB, FVU {fvu:.3f}, {1 - alive:.1%} silent")


if __name__ == "__main__":
    main()
