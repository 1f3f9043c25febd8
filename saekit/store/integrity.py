"""Whether a store is what its manifest says; numpy, safetensors and the standard library alone.

problems = check("acts/gpt2")                    # one line each, [] if all is well
find_problems("acts/gpt2", quick=True)           # with the file that each lies in; sizes and headers only
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.store.format import (
    DTYPES,
    HISTOGRAM_BINS,
    MANIFEST,
    STATISTICS,
    TOKENS,
    TokenTable,
    files_of,
    fingerprint,
    map_tensors,
    mean_and_variance,
    merge_sums,
    read_header,
    read_manifest,
    remedy,
    sha256_file,
    shard_name,
    shard_sums,
    site_summary,
    size_problem,
    tokens_sha256,
)


class Problem(NamedTuple):
    text: str
    """One line: the fact, the place, what to do."""
    file: str | None
    """The damaged file, if the fault is in one: its name inside the folder."""


def check(path: str | Path, quick: bool = False) -> list[str]:
    """Problems of a store, one line each, [] if there are none. Needs no model.

    Manifest, sizes and headers; unless `quick` also checksums, token table, finite values, sums, outliers and statistics,
    all computed again from the stored rows.
    """
    return [problem.text for problem in find_problems(path, quick)]


def find_problems(path: str | Path, quick: bool = False) -> list[Problem]:
    """What `check` finds, with the file that each problem lies in."""
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except SaekitError as error:
        return [Problem(str(error), MANIFEST)]
    problems: list[Problem] = []
    damaged = set()

    def found(text: str, name: str):
        problems.append(Problem(text, name))
        damaged.add(name)

    if fingerprint(manifest) != manifest["fingerprint"]:
        found(f"{folder / MANIFEST} was changed (its fingerprint differs); restore it or collect again", MANIFEST)
    with Progress("check", sum(f["bytes"] for f in files_of(manifest).values()) >> 20, "MiB") as progress:

        def read(count: int):
            progress.advance(count >> 20)

        for name, record in files_of(manifest).items():
            problem = size_problem(folder, name, record["bytes"])
            if problem is None and not quick and sha256_file(folder / name, read) != record["sha256"]:
                problem = f"{_human_name(name)} is damaged (sha256 differs); {remedy(folder, name)}"
            if problem:
                found(problem, name)
    # A file that is known to be damaged is not looked into: it would be named twice.
    sites = manifest["sites"]
    with Progress("values", len(sites) * manifest["rows"], "rows") as progress:
        for i, shard in enumerate(manifest["shards"]):
            for site in sites:
                name = shard_name(site, i)
                if name not in shard["files"]:
                    found(f"{folder / MANIFEST} does not list {name}; restore it or collect again", MANIFEST)
                    damaged.add(name)
                elif name not in damaged:
                    tag = DTYPES[manifest["dtype"]]
                    problem = _shard_problem(folder / name, sites[site], shard["rows"], tag, quick)
                    if problem:
                        found(f"{name}: {problem}; {remedy(folder, name)}", name)
                progress.advance(shard["rows"])
    if TOKENS not in damaged:
        for problem in _token_problems(folder, manifest, quick):
            found(f"{TOKENS}: {problem}; {remedy(folder, TOKENS)}", TOKENS)
    if STATISTICS not in damaged:
        for problem in _statistics_problems(folder, manifest, damaged, quick):
            found(f"{STATISTICS}: {problem}; {remedy(folder, STATISTICS)}", STATISTICS)
    return problems


def _human_name(name: str) -> str:
    site, _, shard = name.partition("/")
    return f"shard {int(shard[6:-12])} of {site}" if shard else name


def _shard_problem(path: Path, site: Mapping, n: int, tag: str, quick: bool) -> str | None:
    d = site["d"]
    expected = {
        "activations": (tag, (n, d)),
        "sum": ("F64", (d,)),
        "sum_squares": ("F64", (d,)),
        "norm_moments": ("F64", (4,)),
        "norm_histogram": ("I64", (HISTOGRAM_BINS,)),
        "outlier_rows": ("I32", None),
    }
    problem = _header_problem(path, expected)
    if problem or quick:
        return problem
    stored = map_tensors(path)
    with np.errstate(invalid="ignore", over="ignore"):
        again = shard_sums(stored["activations"], site["norm_limit"])
    if not np.isfinite(again.norm_moments[3]) or not np.isfinite(again.sum).all():
        return "NaN or infinity among the activations"
    for name, value in again._asdict().items():
        # The last bit of a norm may differ from one processor to another.
        if value.shape != stored[name].shape or not np.allclose(value, stored[name], rtol=1e-9, atol=1e-9):
            return f"{name} does not belong to the activations"
    return None


def _header_problem(path: Path, expected: Mapping[str, tuple[str, tuple | None]]) -> str | None:
    try:
        entries = read_header(path)
    except SaekitError:
        return "not a whole safetensors file"
    if set(entries) != set(expected):
        return f"holds {', '.join(sorted(entries))}, expected {', '.join(sorted(expected))}"
    for name, (tag, shape) in expected.items():
        e = entries[name]
        if e.tag not in tag.split("|") or (len(e.shape) != 1 if shape is None else e.shape != shape):
            return f"{name} is {e.tag} {list(e.shape)}, expected {tag} {list(shape) if shape else '[m]'}"
    return None


def _token_problems(folder: Path, manifest: Mapping, quick: bool) -> list[str]:
    path, N, S = folder / TOKENS, manifest["tokens"], manifest["sequences"]
    expected = {
        "token": ("U16|U32", (N,)),
        "stored": ("BOOL", (N,)),
        "seq_start": ("I64", (S + 1,)),
        **dict.fromkeys(("run_start", "run_doc", "run_position"), ("I64", None)),
    }
    problem = _header_problem(path, expected)
    if problem or quick:
        return [problem] if problem else []
    t = map_tensors(path)
    seq_start, run_start = t["seq_start"], t["run_start"]
    problems = []
    if seq_start[0] != 0 or seq_start[-1] != N or (np.diff(seq_start) <= 0).any():
        return ["seq_start does not cut the tokens into sequences"]
    if (np.diff(run_start) <= 0).any() or not len(run_start) == len(t["run_doc"]) == len(t["run_position"]):
        return ["the runs are not in order"]
    if int(t["stored"].sum()) != manifest["rows"]:
        problems.append(
            f"{int(t['stored'].sum()):,} tokens are marked as stored, the manifest counts {manifest['rows']:,} rows"
        )
    if tokens_sha256([TokenTable(**t)]) != manifest["text"]["tokens_sha256"]:
        problems.append("tokens_sha256 of the manifest differs")
    rows_before = np.concatenate([[0], np.cumsum(t["stored"], dtype=np.int64)])[seq_start]
    end = 0
    for i, shard in enumerate(manifest["shards"]):
        a, b = shard["sequences"]
        if a != end or not a < b <= S:
            problems.append(f"shard {i} holds sequences {a} to {b}, expected them to begin at {end}")
            break
        rows, tokens = int(rows_before[b] - rows_before[a]), int(seq_start[b] - seq_start[a])
        if (rows, tokens) != (shard["rows"], shard["tokens"]):
            problems.append(
                f"shard {i} has {tokens:,} tokens and {rows:,} rows, the manifest says {shard['tokens']:,} and {shard['rows']:,}"
            )
        end = b
    else:
        if end != S:
            problems.append(f"the shards end at sequence {end} of {S}")
    return problems


def _statistics_problems(folder: Path, manifest: Mapping, damaged: set[str], quick: bool) -> list[str]:
    sites = manifest["sites"]
    expected = {f"{site}.{what}": ("F64", (sites[site]["d"],)) for site in sites for what in ("mean", "variance")}
    problem = _header_problem(folder / STATISTICS, expected)
    if problem or quick:
        return [problem] if problem else []
    stored, problems = map_tensors(folder / STATISTICS), []
    for site, entry in sites.items():
        names = [shard_name(site, i) for i in range(len(manifest["shards"]))]
        if damaged.intersection(names):
            continue
        merged = merge_sums(folder / name for name in names)
        mean, variance = mean_and_variance(merged)
        if not np.allclose(mean, stored[f"{site}.mean"], rtol=1e-9, atol=1e-12) or not np.allclose(
            variance, stored[f"{site}.variance"], rtol=1e-9, atol=1e-12
        ):
            problems.append(f"mean and variance of {site} are not those of its shards")
        for key, value in site_summary(merged).items():
            if value != entry[key] and not (value and entry[key] and math.isclose(value, entry[key], rel_tol=1e-9)):
                problems.append(f"the manifest says {key} {entry[key]} of {site}, its shards {value}")
    return problems
