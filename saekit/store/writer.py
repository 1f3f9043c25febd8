"""Writes an activation store: every file whole or absent, the manifest last, and after a crash the same bytes.

    with StoreWriter(Path("acts/gpt2"), plan) as writer:
        for table, state in parts(..., sequences=writer.shard_sequences, state=writer.text_state):
            writer.part(table, state)
        for i in range(writer.n_shards):
            if i not in writer.committed:
                writer.put(i, {site: rows_nD for site in ...}, norm_limits)
        writer.finish()

1. `state/plan.json` comes first and holds every setting that fixes a byte; a folder begun with another plan is refused.
2. Per shard its part of the token table, `state/tokens-00012.safetensors`, then `state/tokens-00012.json`, which commits it and
   says where the text stands. The part fixes what the shard holds.
3. Per shard the files of all sites, then `state/00012.json`, which commits them.
4. The parts joined into `tokens.safetensors`, `statistics.safetensors`, `manifest.json`, and `state/` goes.

Several processes may write shards of one store: the first of them makes the plan and the parts and finishes, the others
open with `owner=False` and put shards.

n rows of a shard · D width of a site
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.store import format as layout
from saekit.store.format import MANIFEST, STATE, STATISTICS, TOKENS, TokenTable

WRITERS = 2
"""Sites of a shard that are summed, hashed and written at once."""
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Where the command line calls a setting by another name than the manifest does.
_OPTIONS = {
    "model.id": "MODEL",
    "context_length": "--context",
    "special_tokens.prepend_bos": "--bos",
    "special_tokens.dropped_ids": "--drop-ids",
    "text.source": "--text",
    "sites": "--site",
}


def refuse_foreign(out: Path) -> None:
    """SaekitError if `out` is neither absent, empty nor an unfinished store."""
    if out.exists() and not out.is_dir():
        raise SaekitError(f"{out} is a file; choose another --out")
    if not out.exists() or (out / STATE / "plan.json").is_file():
        return
    if (out / MANIFEST).is_file():
        rows = layout.read_manifest(out)["rows"]
        raise SaekitError(f"{out} is a finished store ({rows:,} rows); choose another --out")
    # Killed before its plan was written, a writer leaves `state/` alone behind.
    if any(p.name != STATE for p in out.iterdir()):
        raise SaekitError(f"{out} is not empty and not a store; choose another --out")


def refuse_other_plan(out: Path, first: Mapping, now: Mapping) -> None:
    """SaekitError with the first setting in which the plan that `out` was begun with differs from the one now."""
    found = _first_difference(first, now)
    if found is None:
        return
    field, was, is_now = found
    if field == "model.weights_fingerprint":
        raise SaekitError(
            f"weights fingerprint is {_short(is_now)}, {out} was begun with {_short(was)}; choose another --out"
        )
    if field == "tokenizer.fingerprint":
        raise SaekitError(
            f"tokenizer fingerprint differs from the one {out} was begun with ({_short(was)}); choose another --out"
        )
    if field.startswith("environment."):
        name = field.removeprefix("environment.")
        raise SaekitError(
            f"{out} was begun with {name} {was}, this is {is_now}: bytes may differ; pass --accept-environment to go on"
        )
    option = _OPTIONS.get(field) or "--" + field.rsplit(".", 1)[-1].replace("_", "-")
    raise SaekitError(f"{out} was begun with {option} {was}, now {is_now}; use the first settings or a new --out")


class StoreWriter:
    """The writing end of a store.

    Args:
        out: folder of the store; made if it does not exist.
        plan: all settings that decide a byte, in the manifest's words (docs/formats.md): `model`, `tokenizer`, `text`,
            `context_length`, `batch_sequences`, `special_tokens`, `dtype`, `sites` = {site: {"d": …, "norm_multiple": …}}, and two
            that the manifest does not hold under these names: `environment` = {"torch": …, "device": …}, and
            `settings` = {"shard_mb": 256, …}, whatever else must be equal when the work continues.
        owner: False for the second and later of several processes: the plan must be there, and nothing but shards is written.
        finished: nothing is left to do for this process; the first one found a finished store.
        accept_environment: go on although the environment is another one; the manifest then says which shards came from which.

    Raises:
        SaekitError: `out` is a finished store, a foreign folder, was begun with another plan, is being written by another
            process, or cannot be written to. The folder is left as it was.
    """

    def __init__(
        self,
        out: str | Path,
        plan: Mapping,
        *,
        owner: bool = True,
        accept_environment: bool = False,
        finished: bool = False,
    ):
        self.out, self.state, self.owner = Path(out), Path(out) / STATE, owner
        # Through JSON, so that tuples and lists compare as they will after a restart.
        self.plan: dict = json.loads(json.dumps(plan, allow_nan=False))
        self.environment: dict = self.plan["environment"]
        self.dtype: str = self.plan["dtype"]
        if self.dtype not in layout.DTYPES:
            raise SaekitError(f"dtype {self.dtype} is not supported; choose bfloat16, float16 or float32")
        self.sites = tuple(self.plan["sites"])
        for site in self.sites:
            if not layout.is_site_name(site):
                raise SaekitError(f"site {site!r} cannot be a folder name; letters, digits, _ and . are allowed")
        self.continued = False
        """Whether the folder held work of the same plan before."""
        self.finished = finished
        """Whether the manifest is there already: only `state/` was left, and is gone now."""
        self.committed: set[int] = set()
        self.norm_limits: dict[str, float | None] | None = None
        """Fixed by the first `put`; a restart finds them here."""
        self._parts: list[dict] = []
        self._records: dict[int, dict] = {}
        self._lock = None
        self._accept_environment = accept_environment
        self._made = owner and not self.out.exists()
        if owner:
            refuse_foreign(self.out)
        if finished:
            return
        with self._writing():
            if owner:
                self.state.mkdir(parents=True, exist_ok=True)
                self._lock = layout.take_lock(self.state / "lock", self.out)
            try:
                self._begin_or_continue()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """Let go of the lock; what was committed stays. Harmless when repeated."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def abandon(self) -> None:
        """Undo the beginning: for an error before the first shard, in a folder that held nothing before."""
        if not self.continued:
            shutil.rmtree(self.state, ignore_errors=True)
            if self._made:
                self.out.rmdir()
        self.close()

    # What the folder is

    def _begin_or_continue(self) -> None:
        path = self.state / "plan.json"
        if self.owner and not path.is_file():
            layout.atomic_write(path, layout.pretty_json(self.plan))
            return
        first = json.loads(path.read_bytes())
        environment = first.get("environment", {}) if self._accept_environment else self.environment
        refuse_other_plan(self.out, first, {**self.plan, "environment": environment})
        # Equal but for the order of its keys; the first order is the one that a manifest without interruption has.
        self.plan, self.sites, self.continued = first, tuple(first["sites"]), True
        if self.owner and (self.out / MANIFEST).is_file():
            self.remove_state()
            self.finished = True
            return
        self.refresh()
        if self.owner:
            self._remove_uncommitted()

    def refresh(self) -> None:
        """Read again what is committed, by this process or another."""
        while (path := self._part_path(len(self._parts), "json")).is_file():
            self._parts.append(json.loads(path.read_bytes()))
        for i in range(self.n_shards):
            record = self.state / f"{i:05d}.json"
            if i not in self._records and record.is_file():
                self._records[i] = json.loads(record.read_bytes())
        self.committed = {i for i, record in self._records.items() if self._whole(record)}
        if (self.state / "norm_limits.json").is_file():
            self.norm_limits = json.loads((self.state / "norm_limits.json").read_bytes())

    def _whole(self, record: dict) -> bool:
        paths = {self.out / name: file["bytes"] for name, file in record["files"].items()}
        return all(p.is_file() and p.stat().st_size == size for p, size in paths.items())

    def _remove_uncommitted(self) -> None:
        keep = {self.out / name for i in self.committed for name in self._records[i]["files"]}
        for site in self.sites:
            for path in (self.out / site).glob("shard-*"):
                if path not in keep:
                    path.unlink()
        for i in self._records.keys() - self.committed:
            (self.state / f"{i:05d}.json").unlink()
            del self._records[i]
        for path in [*self.out.glob("*.tmp"), *self.state.glob("*.tmp")]:
            path.unlink()

    # Step 1

    @property
    def shard_sequences(self) -> int:
        """Sequences of a shard: whole batches of the forward pass, about `shard_mb` MiB at the widest site."""
        row_bytes = max(s["d"] for s in self.plan["sites"].values()) * TORCH_DTYPES[self.dtype].itemsize
        batch = self.plan["batch_sequences"]
        batch_bytes = row_bytes * self.plan["context_length"] * batch
        return max(1, round(self.plan["settings"]["shard_mb"] * 2**20 / batch_bytes)) * batch

    @property
    def text_state(self) -> dict | None:
        """What the reader of the text said behind the last part; None before the first."""
        return self._parts[-1] if self._parts else None

    @property
    def text_done(self) -> bool:
        return bool(self._parts) and self._parts[-1]["last"]

    def part(self, table: TokenTable, state: Mapping) -> None:
        """Commit the next part of the token table: the sequences of one shard, counted from 0; documents are counted from
        the start of the text. `state` is JSON: `documents`, `bytes`, `sequences`, `tokens` and `rows` so far, `last`,
        and what the reader of the text needs to go on."""
        assert not self.text_done, "the text has ended"
        assert table.n_sequences == self.shard_sequences or state["last"], f"{table.n_sequences} sequences in a part"
        i = len(self._parts)
        with self._writing():
            tensors = {name: getattr(table, name) for name in TokenTable.__dataclass_fields__}
            layout.write_tensors(self._part_path(i, "safetensors"), tensors)
            record = json.loads(json.dumps(dict(state)))
            layout.atomic_write(self._part_path(i, "json"), layout.pretty_json(record))
        self._parts.append(record)

    def _part_path(self, i: int, extension: str) -> Path:
        return self.state / f"tokens-{i:05d}.{extension}"

    def table(self, i: int) -> TokenTable:
        """Part i of the token table, on the mapped file."""
        return layout.read_tokens(self._part_path(i, "safetensors"))

    @property
    def n_shards(self) -> int:
        """As many as there are parts so far."""
        return len(self._parts)

    def _before(self, i: int, what: str) -> int:
        return self._parts[i - 1][what] if i else 0

    def rows(self, i: int) -> int:
        """Rows that shard i has at each site."""
        return self._parts[i]["rows"] - self._before(i, "rows")

    def tokens(self, i: int) -> int:
        """Positions of shard i, those without a row included."""
        return self._parts[i]["tokens"] - self._before(i, "tokens")

    # Step 2

    def fix_norm_limits(self, limits: Mapping[str, float | None]) -> None:
        """Write down, once, the norm above which a row is an outlier at each site; None = off."""
        assert self.norm_limits is None and set(limits) == set(self.sites)
        self.norm_limits = {site: None if limit is None else float(limit) for site, limit in limits.items()}
        with self._writing():
            layout.atomic_write(self.state / "norm_limits.json", layout.pretty_json(self.norm_limits))

    def put(self, i: int, rows: Mapping[str, torch.Tensor]) -> None:
        """Write and commit shard i; rows: site -> (n, D) in the store dtype, n = `self.rows(i)`, in text order, all finite."""
        assert i not in self.committed and set(rows) == set(self.sites) and self.norm_limits is not None
        for site, x_nD in rows.items():
            shape = (self.rows(i), self.plan["sites"][site]["d"])
            assert x_nD.shape == shape and x_nD.dtype == TORCH_DTYPES[self.dtype], f"{site}: {x_nD.shape}, not {shape}"
        limits = self.norm_limits

        def write(site: str) -> tuple[str, dict]:
            (self.out / site).mkdir(exist_ok=True)
            name = layout.shard_name(site, i)
            return name, write_shard(self.out / name, rows[site], limits[site])

        with self._writing(i), ThreadPoolExecutor(WRITERS, thread_name_prefix="shard") as pool:
            files = dict(pool.map(write, self.sites))
            record = {
                "sequences": [self._before(i, "sequences"), self._parts[i]["sequences"]],
                "tokens": self.tokens(i),
                "rows": self.rows(i),
                "files": files,
                "environment": self.environment,
            }
            layout.atomic_write(self.state / f"{i:05d}.json", layout.pretty_json(record))
        self._records[i] = record
        self.committed.add(i)

    # The end

    def join_text(self, count: int) -> tuple[dict, dict]:
        """Writes `tokens.safetensors` from the first parts. Returns the manifest's `text` and `token_table`."""
        tables = [self.table(i) for i in range(count)]
        record = layout.write_tensors(self.out / TOKENS, layout.join_tables(tables))
        text = {key: self._parts[count - 1][key] for key in ("documents", "bytes")}
        return {**self.plan["text"], **text, "tokens_sha256": layout.tokens_sha256(tables)}, record

    def finish(self) -> Path:
        """Join what was committed, write the manifest, remove `state/`; returns the folder, now a finished store.

        Shards behind the first one that is not committed are left out and removed: `--finish`.
        """
        count = next((i for i in range(self.n_shards) if i not in self.committed), self.n_shards)
        assert count > 0, "no shard is whole"
        with self._writing():
            for i in range(count, self.n_shards):
                for site in self.sites:
                    (self.out / layout.shard_name(site, i)).unlink(missing_ok=True)
            records = [dict(self._records[i]) for i in range(count)]
            text, token_table = self.join_text(count)
            merged = {
                site: layout.merge_sums(self.out / layout.shard_name(site, i) for i in range(count))
                for site in self.sites
            }
            statistics = layout.write_tensors(self.out / STATISTICS, layout.statistics_tensors(merged))
            environments = _ranges([record.pop("environment") for record in records])
            manifest = self._manifest(records, merged)
            manifest |= {
                "text": text,
                "token_table": token_table,
                "statistics": statistics,
                "documents": None,
                "environments": environments,
            }
            manifest["fingerprint"] = layout.fingerprint(manifest)
            layout.atomic_write(self.out / MANIFEST, layout.pretty_json(manifest))
            self.remove_state()
        self.close()
        self.finished = True
        return self.out

    def remove_state(self) -> None:
        """The plan goes last: killed on the way, the same command finds a finished store and removes the rest."""
        for path in self.state.iterdir():
            if path.name != "plan.json":
                path.unlink()
        (self.state / "plan.json").unlink()
        self.state.rmdir()
        layout.sync_folder(self.out)

    def _manifest(self, records: list[dict], merged: Mapping[str, layout.Sums]) -> dict:
        """In the order in which people read it; what `finish` adds has its place here."""
        assert self.norm_limits is not None
        plan, sites = self.plan, {}
        for site in self.sites:
            entry = dict(plan["sites"][site])
            multiple = entry.pop("norm_multiple")
            limits = {"norm_limit": self.norm_limits[site], "norm_multiple": multiple}
            sites[site] = {**entry, **limits, **layout.site_summary(merged[site])}
        return {
            "format": layout.FORMAT,
            "format_version": layout.VERSION,
            "fingerprint": "",
            **{key: plan[key] for key in ("model", "tokenizer", "text", "context_length", "batch_sequences")},
            "special_tokens": plan["special_tokens"],
            "dtype": self.dtype,
            "sites": sites,
            "sequences": records[-1]["sequences"][1],
            "tokens": sum(r["tokens"] for r in records),
            "rows": sum(r["rows"] for r in records),
            "shards": records,
        }

    @contextmanager
    def _writing(self, shard: int | None = None):
        """Errors of the file system as one line."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                if shard is None:
                    raise SaekitError(
                        f"disk full at {self.out}; free some space and run the same command again"
                    ) from error
                row_bytes = sum(s["d"] for s in self.plan["sites"].values()) * TORCH_DTYPES[self.dtype].itemsize
                missing = sum(self.rows(i) for i in range(self.n_shards) if i not in self.committed) * row_bytes
                raise SaekitError(
                    f"disk full at shard {shard} of {self.n_shards}; "
                    f"free {layout.human_bytes(missing)} and run the same command again"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO):
                raise SaekitError(f"cannot write to {self.out}: {os.strerror(error.errno).lower()}") from error
            raise


def _ranges(environments: list[dict]) -> list[dict]:
    """`{"shards": [first, last + 1], …}` for each stretch of equal environments."""
    found: list[dict] = []
    for i, environment in enumerate(environments):
        if found and {k: v for k, v in found[-1].items() if k != "shards"} == environment:
            found[-1]["shards"][1] = i + 1
        else:
            found.append({"shards": [i, i + 1], **environment})
    return found


def write_shard(path: Path, x_nD: torch.Tensor, norm_limit: float | None) -> dict:
    """One activation file: rows (n, D) in a store dtype, their sums and outliers. Returns `{"bytes": …, "sha256": …}`."""
    array = bits_of(x_nD.detach().contiguous())
    sums = layout.shard_sums(array, norm_limit)
    assert math.isfinite(float(sums.norm_moments[3])), f"{path}: the collector lets no NaN or infinity through"
    tag = "BF16" if x_nD.dtype == torch.bfloat16 else "F16" if x_nD.dtype == torch.float16 else "F32"
    # Among the 4-byte tensors of a float32 store the rows come first, so that they keep their alignment.
    tensors = {"activations": (array, tag), **sums._asdict()}
    return layout.write_tensors(path, tensors, align="activations")


def bits_of(x_nD: torch.Tensor) -> np.ndarray:
    """Rows as numpy holds them: it has no bfloat16, whose bits travel as uint16."""
    return (x_nD.view(torch.uint16) if x_nD.dtype == torch.bfloat16 else x_nD).numpy()


def _first_difference(first, now, field: str = "") -> tuple[str, object, object] | None:
    """Name and both values of the first setting that differs, depth first."""
    if isinstance(first, dict) and isinstance(now, dict) and not (field == "sites" and first.keys() != now.keys()):
        for key in [*first, *(k for k in now if k not in first)]:
            found = _first_difference(first.get(key), now.get(key), f"{field}.{key}" if field else key)
            if found:
                return found
        return None
    return None if first == now else (field, _plain(first), _plain(now))


def _plain(value) -> str:
    if isinstance(value, dict | list):
        return " ".join(map(str, value)) or "nothing"
    return "nothing" if value is None else str(value)


def _short(value) -> str:
    """`sha256:51b2...`"""
    return f"{value[:11]}..." if isinstance(value, str) and value.startswith("sha256:") else str(value)
