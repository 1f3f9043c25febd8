"""Every Triton kernel, with every set of constants that a launcher passes, compiled ahead of time. No GPU is needed.

What must hold: no spilled registers, shared memory within the device's limit, matrix instructions in matrix products, 128-bit
loads in gathers. Registers, shared memory and the number of instructions behind the last matrix instruction are kept in
`kernels/saekit_kernels/triton/compiled.csv`, so that a change of them shows in review; after a change that is meant:

    SAEKIT_REFRESH_COMPILED=1 python -m pytest -m "long or not long" tests/kernels/test_compile_gate.py
"""

import csv
import dataclasses
import fcntl
import functools
import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import saekit_kernels

triton = pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile with")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the kernels by functions of its own", allow_module_level=True)

GPUTarget = pytest.importorskip("triton.backends.compiler").GPUTarget
ASTSource = pytest.importorskip("triton.compiler").ASTSource

PACKAGE = Path(saekit_kernels.__file__).parent / "triton"
TABLE = PACKAGE / "compiled.csv"
MODULES = ("encode", "select", "decode", "grads", "row_adam")
REFRESH = os.environ.get("SAEKIT_REFRESH_COMPILED") == "1"
HOW = 'if that is meant:  SAEKIT_REFRESH_COMPILED=1 python -m pytest -m "long or not long" tests/kernels/test_compile_gate.py'
TOLERANCE = 0.1

# name → device, bytes of shared memory that a block may have, what the instructions of matrix products look like.
# "unaligned" promises nothing about pointers and sizes: the launch with an odd width.
SM_80 = (GPUTarget("cuda", 80, 32), 163 << 10, "mma.sync", r"\bHMMA")
SM_90 = (GPUTarget("cuda", 90, 32), 227 << 10, "wgmma", r"\bHGMMA")
GFX942 = (GPUTarget("hip", "gfx942", 64), 64 << 10, "v_mfma", r"\bv_mfma")
TARGETS = {"sm_80": SM_80, "sm_90": SM_90, "gfx942": GFX942, "sm_90 unaligned": SM_90}


class Row(NamedTuple):
    """One line of the table."""

    kernel: str
    target: str
    triton: str
    """Version that compiled it; registers are compared with the same version alone."""
    registers: int
    """Per thread."""
    spill: int
    """Bytes of stack (NVIDIA), spilled registers (AMD)."""
    shared: int
    """Bytes."""
    tail: int | None
    """Instructions behind the last matrix instruction, None where there is no matrix product."""


@functools.cache
def shipped() -> dict:
    """Name in the table → Shipped. Constants do not tell float32 from bfloat16 matrices, so the name says it."""
    found = {}
    for module in MODULES:
        for s in getattr(importlib.import_module(f"saekit_kernels.triton.{module}"), "SHIPPED", ()):
            narrow = sorted({t[1:] for t in s.types.values() if t in ("*bf16", "*fp16")})
            name = " ".join([f"{module}.{s.name}", *narrow])
            assert name not in found, f"{name} is shipped twice"
            found[name] = s
    return found


@functools.cache
def table() -> dict[tuple[str, str], Row]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return read(file)


def read(file) -> dict[tuple[str, str], Row]:
    rows = (
        Row(r["kernel"], r["target"], r["triton"], *(int(r[n]) for n in ("registers", "spill", "shared")), int(r["tail"]) if r["tail"] else None)
        for r in csv.DictReader(file)
    )  # fmt: skip
    return {row[:2]: row for row in rows}


def write(change) -> None:
    """Changes the table; several processes may do so at once."""
    TABLE.touch()
    with TABLE.open("r+", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = read(file)
        change(rows)
        file.seek(0)
        file.truncate()
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(Row._fields)
        lines.writerows(rows[key] for key in sorted(rows))


def compile_for(s, target, *, aligned: bool, **more):
    """What a launch would compile, with the promises of divisibility by 16 that it makes."""
    names = s.kernel.arg_names
    assert set(names) == {*s.types, *s.constants}, f"{s.name}: its parameters are {names}"
    promised = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if promises(s, n)} if aligned else {}
    source = ASTSource(s.kernel, {n: s.types.get(n, "constexpr") for n in names}, s.constants, promised)
    # a launch has fusion of products and sums as well: the default, which newer versions want to be told
    options = {"num_warps": s.num_warps, "num_stages": s.num_stages, "enable_fp_fusion": True, **more}
    return triton.compile(source, target=target, options=options)


def promises(s, name: str) -> bool:
    kind = s.types.get(name, "fp32")
    return (kind.startswith("*") or not kind.startswith(("fp", "bf"))) and name not in s.ragged


def tool(name: str, *arguments: str, binary: bytes, folder: Path) -> str:
    """Output of a program that comes with Triton."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments, path], capture_output=True, text=True, check=True).stdout


def measure(compiled, gemm: bool, instruction: str, folder: Path) -> tuple[int, int, int | None]:
    """Registers, spills, and the instructions behind the last matrix instruction."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def count(what):
            return int(re.search(rf"\.{what}:\s*(\d+)", text)[1])

        registers, spill = count("vgpr_count"), count("vgpr_spill_count") + count("sgpr_spill_count")
        lines = [line for line in text[: text.index(".amdgpu_metadata")].splitlines() if re.match(r"\s+[a-z]\w+", line)]
    else:
        usage = tool("cuobjdump", "-res-usage", binary=compiled.asm["cubin"], folder=folder)
        registers, spill = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        sass = tool("cuobjdump", "-sass", binary=compiled.asm["cubin"], folder=folder) if gemm else ""
        lines = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    if not gemm:
        return registers, spill, None
    last = max((i for i, line in enumerate(lines) if re.search(instruction, line)), default=None)
    return registers, spill, None if last is None else len(lines) - 1 - last


@pytest.mark.parametrize("module", MODULES)
def test_the_module_lists_what_it_ships(module):
    loaded = importlib.import_module(f"saekit_kernels.triton.{module}")
    listed = {s.kernel.__name__ for s in loaded.SHIPPED}
    calls = re.findall(r"(\w+)\[[^\]]*\]\(", (PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    launched = {name for name in calls if isinstance(getattr(loaded, name, None), triton.JITFunction)}
    assert launched and launched <= listed, f"launched, but not in SHIPPED: {launched - listed}"


def cases():
    """Every set of constants for every target; the first set of each kernel at once, the others in the long run."""
    seen = set()
    for name, s in shipped().items():
        first = s.kernel.__name__ not in seen
        seen.add(s.kernel.__name__)
        for target in TARGETS:
            at_once = first and "unaligned" not in target
            yield pytest.param(name, target, id=f"{name}-{target}", marks=() if at_once else pytest.mark.long)


@pytest.mark.parametrize(("name", "target"), list(cases()))
def test_it_compiles_as_promised(name, target, tmp_path):
    s, (device, shared_limit, marker, instruction) = shipped()[name], TARGETS[target]
    compiled = compile_for(s, device, aligned="unaligned" not in target)
    registers, spill, tail = measure(compiled, s.gemm, instruction, tmp_path)
    code = compiled.asm["amdgcn" if device.backend == "hip" else "ptx"]
    row = Row(name, target, triton.__version__, registers, spill, compiled.metadata.shared, tail)

    assert spill == 0, f"{name} for {target} spills {spill} with {registers} registers"
    assert row.shared <= shared_limit, f"{name} for {target} needs {row.shared} bytes of shared memory"
    if s.gemm:
        assert marker in code and tail is not None, f"{name} for {target} multiplies without {marker}"
    if s.gather and target == "sm_90":
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", code), f"{name} for {target} has no 128-bit load"

    if REFRESH:
        write(lambda rows: rows.__setitem__((name, target), row))
        return
    before = table().get((name, target))
    assert before is not None, f"{TABLE.name} has no line for {name}, {target};  {HOW}"
    if before.triton == triton.__version__:
        assert abs(registers - before.registers) <= TOLERANCE * before.registers, (
            f"{name} for {target} takes {registers} registers, {TABLE.name} says {before.registers};  {HOW}"
        )


def test_the_table_has_no_line_too_many():
    def stale(rows):
        return [key for key in rows if key[0] not in shipped() or key[1] not in TARGETS]

    if REFRESH:
        write(lambda rows: [rows.pop(key) for key in stale(rows)])
        return
    assert not stale(table()), f"{TABLE.name} has lines for what is not shipped;  {HOW}"


def test_a_spill_is_seen(tmp_path):
    """A kernel that is not given the registers it needs: 32 of them, or those of the eighth part of a compute unit."""
    from saekit_kernels.triton.decode import SHIPPED

    s = dataclasses.replace(SHIPPED[1], num_warps=1)
    for device, option in ((SM_90[0], {"maxnreg": 32}), (GFX942[0], {"waves_per_eu": 8})):
        _, spill, _ = measure(compile_for(s, device, aligned=True, **option), False, "", tmp_path)
        assert spill > 0, device
