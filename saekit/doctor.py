"""What to paste into a bug report: versions, devices, the kernels chosen and why, disk, and a short self-test.

    report, problems = doctor()
    print(report)

No paths and no names of people or machines. The self-test takes some seconds: every selection against its equation, a short
training run, the bundled language model.
"""

import os
import platform
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from saekit_kernels import (
    BatchCount,
    ColumnCount,
    RowCount,
    RowMass,
    Rule,
    Threshold,
    decode,
    encode_select,
    explain,
    using,
)

from saekit.device import resolve_device
from saekit.progress import Progress
from saekit.store.format import human_bytes


def doctor(device: str = "auto") -> tuple[str, list[str]]:
    """The report, and what the self-test found wrong, a line each.

    Raises SaekitError for a device that is not there.
    """
    chosen = resolve_device(device)
    tests, problems = _self_test(chosen)
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        f"kernels on {chosen.type}": [(c.op, f"{c.path}: {c.reason}") for c in explain(chosen.type)],
        "free disk": _disk(),
        "self-test": tests,
    }
    lines = []
    for title, rows in sections.items():
        width = max(len(name) for name, _ in rows)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows), ""]
    return "\n".join(lines[:-1]), problems


def _versions() -> list[tuple[str, str]]:
    """Of all that saekit declares, the extras last."""
    rows = [("saekit", metadata.version("saekit")), ("python", f"{platform.python_version()}, {platform.platform()}")]
    needed, extras = {"triton"}, defaultdict(list)
    for requirement in metadata.requires("saekit") or ():
        name = re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
        if extra is None:
            needed.add(name)
        elif extra[1] != "test" and name != "saekit":
            extras[name].append(extra[1])
    rows += [(name, _version(name)) for name in sorted(needed)]
    return rows + [(name, f"{_version(name)}  (for {', '.join(extras[name])})") for name in sorted(extras)]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    page = os.sysconf("SC_PAGE_SIZE")
    memory = human_bytes(os.sysconf("SC_PHYS_PAGES") * page)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {memory}"
    rows = [("cpu", cpu)]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{p.name}, capability {p.major}.{p.minor}, {human_bytes(p.total_memory)}"))
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}, no GPU found" if torch.version.cuda else "built without CUDA"
        rows.append(("cuda", f"none: this torch is {built}"))
    return rows


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _disk() -> list[tuple[str, str]]:
    places = {"here": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    return [(name, human_bytes(shutil.disk_usage(path).free)) for name, path in places.items()]


# Self-test


def _self_test(device: torch.device) -> tuple[list[tuple[str, str]], list[str]]:
    rows, problems = [], []
    quiet, Progress.quiet = Progress.quiet, True
    tests: dict[str, Callable[[torch.device], str]] = {
        "selections": _selections,
        "training": _training,
        "language model": _language_model,
    }
    for name, test in tests.items():
        start = time.perf_counter()
        try:
            said = test(device)
        except Exception as error:  # whatever it is belongs into the report
            line = str(error).strip().splitlines() or [""]
            said = f"FAILED: {type(error).__name__}: {line[0]}"
            problems.append(f"{name}: {type(error).__name__}: {line[0]}")
        rows.append((name, f"{said} ({time.perf_counter() - start:.1f} s)"))
    Progress.quiet = quiet
    return rows, problems


def _selections(device: torch.device) -> str:
    """Each rule on the path that this device takes, against its equation on the CPU."""
    B, D, F = 256, 64, 512
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(B, D, generator=generator), torch.randn(F, D, generator=generator)
    b_enc, b_dec = 0.1 * torch.randn(F, generator=generator), 0.1 * torch.randn(D, generator=generator)
    m_F, t_B = torch.full((F,), 4), torch.full((B,), 30.0)
    rules: dict[str, Callable[[torch.device], Rule]] = {
        "row_count": lambda at: RowCount(8),
        "batch_count": lambda at: BatchCount(8 * B),
        "column_count": lambda at: ColumnCount(m_F.to(at)),
        "row_mass": lambda at: RowMass(t_B.to(at)),
        "threshold": lambda at: Threshold(20.0),
    }
    for name, rule in rules.items():
        with using("reference"):
            wanted = encode_select(x, W, b_enc, b_dec, rule=rule(torch.device("cpu")), compute="fp32").codes
        there = [t.to(device) for t in (x, W, b_enc, b_dec)]
        found = encode_select(*there, rule=rule(device), compute="fp32").codes
        for what, a, b in (
            ("codes", found.dense().cpu(), wanted.dense()),
            ("the reconstruction", decode(found, there[1], there[3]).cpu(), decode(wanted, W, b_dec)),
        ):
            error = float((a - b).abs().max() / b.abs().max())
            if not error < 1e-4:
                raise AssertionError(f"{name}: {what} off by {error:.1e} of the largest")
    return f"{len(rules)} rules equal their equations"


def _training(device: torch.device) -> str:
    """A short run on a known truth: it must learn something, twice the same."""
    import saekit as sk
    from saekit.synthetic import preset

    truth = preset("tiny", rows=65_536).draw()
    saes = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(2):
            out = Path(folder) / str(i)
            saes.append(sk.train(sk.TopK(k=4, d_sae=128), truth, out=out, batch=1024, device=str(device)))
    x_BD = truth.sample(truth.rows, 4096).x_BD.to(device)
    fvu = float((x_BD - saes[0](x_BD)).square().sum() / (x_BD - x_BD.mean(0)).square().sum())
    if not fvu < 0.5:
        raise AssertionError(f"FVU {fvu:.2f}; it should be below 0.5")
    same = all(torch.equal(a, b) for a, b in zip(*(s.state_dict().values() for s in saes), strict=True))
    if not same:
        raise AssertionError("two runs with one seed ended in different weights")
    return f"FVU {fvu:.2f}, repeated to the bit"


def _language_model(device: torch.device) -> str:
    from saekit.model import load_model

    lm = load_model("saekit:demo", device=str(device))
    text = "import os\n\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n"
    ids = torch.tensor([lm.tokenizer.encode(text)], device=device)
    with torch.no_grad():
        logits = lm.hf(input_ids=ids).logits.float()
    loss = float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]))
    if not loss < 4:
        raise AssertionError(f"the bundled model loses {loss:.2f} nats per token of plain Python; it should be below 4")
    return f"{loss:.2f} nats per token of plain Python, {lm.compute}"
