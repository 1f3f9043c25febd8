"""Writes an activation store: every file whole or absent, the manifest last, and after a crash the same bytes.

    with StoreWriter(Path("acts/gpt2"), plan) as writer:
        if writer.table is None:
            writer.tokens(table, text={"documents": 652, "bytes": 11274318})
        for i, sequences in enumerate(writer.shards):
            if i not in writer.committed:
                writer.put(i, {site: rows_nD for site in ...}, norm_limits)
        writer.finish()

1. `state/plan.json` comes first and holds every setting that fixes a byte; a folder begun with another plan is refused.
2. `tokens.safetensors`, then `state/text.json`, which commits it. The table fixes which sequences each shard holds.
3. Per shard the files of all sites, then `state/00012.json`, which commits them.
4. `statistics.safetensors`, `manifest.json`, and `state/` goes.

n rows of a shard · D width of a site
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from saekit.errors import SaekitError
from saekit.store import format as layout
from saekit.store.format import DOCUMENTS, MANIFEST, STATE, STATISTICS, TOKENS, TokenTable

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


class StoreWriter:
    """The writing end of a store, for one process.

    Args:
        out: folder of the store; made if it does not exist.
        plan: all settings that decide a byte, in the manifest's words (docs/formats.md): `model`, `tokenizer`, `text`,
            `context_length`, `batch_sequences`, `special_tokens`, `dtype`, `sites` = {site: {"d": …, "norm_multiple": …}}, and two
            that the manifest does not hold under these names: `environment` = {"torch": …, "device": …}, and
            `settings` = {"shard_mb": 256, …}, whatever else must be equal when the work continues.

    Raises:
        SaekitError: `out` is a finished store, a foreign folder, was begun with another plan, is being written by another
            process, or cannot be written to. The folder is left as it was.
    """

    def __init__(self, out: str | Path, plan: Mapping):
        self.out, self.state = Path(out), Path(out) / STATE
        # Through JSON, so that tuples and lists compare as they will after a restart.
        self.plan: dict = json.loads(json.dumps(plan, allow_nan=False))
        self.dtype: str = self.plan["dtype"]
        if self.dtype not in layout.DTYPES:
            raise SaekitError(f"dtype {self.dtype} is not supported; choose bfloat16, float16 or float32")
        self.sites = tuple(self.plan["sites"])
        for site in self.sites:
            if not layout.is_site_name(site):
                raise SaekitError(f"site {site!r} cannot be a folder name; letters, digits, _ and . are allowed")
        self.continued = False
        """Whether the folder held work of the same plan before."""
        self.table: TokenTable | None = None
        self.shards: list[range] = []
        """Sequences of each shard; empty before the token table is there."""
        self.committed: set[int] = set()
        self.norm_limits: dict[str, float | None] | None = None
        """Fixed by the first `put`; a restart finds them here."""
        self._text: dict = {}
        self._records: dict[int, dict] = {}
        self._lock = None
        self._refuse_foreign()
        with self._writing():
            self.state.mkdir(parents=True, exist_ok=True)
            self._take_lock()
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

    # What the folder is

    def _refuse_foreign(self) -> None:
        out = self.out
        if out.exists() and not out.is_dir():
            raise SaekitError(f"{out} is a file; choose another --out")
        if not out.exists() or (self.state / "plan.json").is_file():
            return
        if (out / MANIFEST).is_file():
            rows = layout.read_manifest(out)["rows"]
            raise SaekitError(f"{out} is a finished store ({rows:,} rows); choose another --out")
        # Killed before its plan was written, a writer leaves `state/` alone behind.
        if any(p.name != STATE for p in out.iterdir()):
            raise SaekitError(f"{out} is not empty and not a store; choose another --out")

    def _take_lock(self) -> None:
        self._lock = layout.take_lock(self.state / "lock", self.out)

    def _begin_or_continue(self) -> None:
        path = self.state / "plan.json"
        if not path.is_file():
            layout.atomic_write(path, layout.pretty_json(self.plan))
            return
        first = json.loads(path.read_bytes())
        self._refuse_other_plan(first)
        # Equal but for the order of its keys; the first order is the one that a manifest without interruption has.
        self.plan, self.sites, self.continued = first, tuple(first["sites"]), True
        # Killed between the manifest and the removal of state/: write the same manifest again.
        (self.out / MANIFEST).unlink(missing_ok=True)
        if (self.state / "text.json").is_file():
            self._text = json.loads((self.state / "text.json").read_bytes())
            self._set_table(layout.read_tokens(self.out / TOKENS))
            for i in range(len(self.shards)):
                record = self.state / f"{i:05d}.json"
                if record.is_file():
                    self._records[i] = json.loads(record.read_bytes())
            self.committed = {i for i, record in self._records.items() if self._whole(record)}
        if (self.state / "norm_limits.json").is_file():
            self.norm_limits = json.loads((self.state / "norm_limits.json").read_bytes())
        self._remove_uncommitted()

    def _refuse_other_plan(self, first: dict) -> None:
        found = _first_difference(first, self.plan)
        if found is None:
            return
        field, was, now = found
        out = self.out
        if field == "model.weights_fingerprint":
            raise SaekitError(
                f"weights fingerprint is {_short(now)}, {out} was begun with {_short(was)}; choose another --out"
            )
        if field == "tokenizer.fingerprint":
            raise SaekitError(
                f"tokenizer fingerprint differs from the one {out} was begun with ({_short(was)}); choose another --out"
            )
        if field.startswith("environment."):
            name = field.removeprefix("environment.")
            raise SaekitError(
                f"{out} was begun with {name} {was}, this is {now}: bytes may differ; "
                "go on where it was begun, or choose another --out"
            )
        option = _OPTIONS.get(field) or "--" + field.rsplit(".", 1)[-1].replace("_", "-")
        raise SaekitError(f"{out} was begun with {option} {was}, now {now}; use the first settings or a new --out")

    def _whole(self, record: dict) -> bool:
        paths = {self.out / name: file["bytes"] for name, file in record["files"].items()}
        return all(p.is_file() and p.stat().st_size == size for p, size in paths.items())

    def _remove_uncommitted(self) -> None:
        keep = {self.out / name for i in self.committed for name in self._records[i]["files"]}
        for site in self.sites:
            for path in (self.out / site).glob("shard-*"):
                if path not in keep:
                    path.unlink()
        for path in [*self.out.glob("*.tmp"), *self.state.glob("*.tmp")]:
            path.unlink()

    # Step 1

    def tokens(self, table: TokenTable, text: Mapping | None = None) -> None:
        """Commit the token table; once. `text` is what reading the text told, added to the manifest's `text`: the numbers
        of `documents` and of `bytes`."""
        assert self.table is None, "the token table is written once"
        with self._writing():
            record = layout.write_tensors(self.out / TOKENS, table.tensors())
            self._text = {
                "text": {**(text or {}), "tokens_sha256": table.sha256()},
                "token_table": record,
                "shards": len(self._shards_of(table)),
            }
            layout.atomic_write(self.state / "text.json", layout.pretty_json(self._text))
        self._set_table(layout.read_tokens(self.out / TOKENS))

    def _set_table(self, table: TokenTable) -> None:
        self.table, self.shards = table, self._shards_of(table)
        stored_before = np.concatenate([[0], np.cumsum(table.stored, dtype=np.int64)])
        self._seq_rows = stored_before[table.seq_start]

    def _shards_of(self, table: TokenTable) -> list[range]:
        """Whole batches of the forward pass, and about `shard_mb` MiB at the widest site."""
        row_bytes = max(s["d"] for s in self.plan["sites"].values()) * TORCH_DTYPES[self.dtype].itemsize
        sequence_bytes = row_bytes * self.plan["context_length"]
        batch = self.plan["batch_sequences"]
        batches = max(1, round(self.plan["settings"]["shard_mb"] * 2**20 / (sequence_bytes * batch)))
        step = batches * batch
        return [range(i, min(i + step, table.n_sequences)) for i in range(0, table.n_sequences, step)]

    def rows(self, i: int) -> int:
        """Rows that shard i has at each site."""
        return int(self._seq_rows[self.shards[i].stop] - self._seq_rows[self.shards[i].start])

    # Step 2

    def put(self, i: int, rows: Mapping[str, torch.Tensor], norm_limits: Mapping[str, float | None]) -> None:
        """Write and commit shard i.

        Args:
            rows: site -> (n, D) in the store dtype, n = `self.rows(i)`, in text order; all of them finite.
            norm_limits: site -> norm above which a row is an outlier, None = off; the same at every call.
        """
        assert self.table is not None and i not in self.committed and set(rows) == set(norm_limits) == set(self.sites)
        limits = {site: None if limit is None else float(limit) for site, limit in norm_limits.items()}
        files = {}
        with self._writing(i):
            if self.norm_limits is None:
                layout.atomic_write(self.state / "norm_limits.json", layout.pretty_json(limits))
                self.norm_limits = limits
            assert self.norm_limits == limits, "norm limits are fixed before the first shard"
            for site in self.sites:
                x_nD = rows[site]
                d = self.plan["sites"][site]["d"]
                assert x_nD.shape == (self.rows(i), d) and x_nD.dtype == TORCH_DTYPES[self.dtype], (
                    f"{site}: {x_nD.shape}"
                )
                name = layout.shard_name(site, i)
                (self.out / site).mkdir(exist_ok=True)
                files[name] = write_shard(self.out / name, x_nD, limits[site])
            a, b = self.shards[i].start, self.shards[i].stop
            record = {
                "sequences": [a, b],
                "tokens": int(self.table.seq_start[b] - self.table.seq_start[a]),
                "rows": self.rows(i),
                "files": files,
            }
            layout.atomic_write(self.state / f"{i:05d}.json", layout.pretty_json(record))
        self._records[i] = record
        self.committed.add(i)

    # The end

    def finish(self) -> Path:
        """Join what was committed, write the manifest, remove `state/`; returns the folder, now a finished store."""
        assert self.table is not None and len(self.committed) == len(self.shards) > 0
        with self._writing():
            records = [self._records[i] for i in range(len(self.shards))]
            merged = {
                site: layout.merge_sums(self.out / layout.shard_name(site, i) for i in range(len(records)))
                for site in self.sites
            }
            statistics = {}
            for site in self.sites:
                statistics[f"{site}.mean"], statistics[f"{site}.variance"] = layout.mean_and_variance(merged[site])
            statistics_record = layout.write_tensors(self.out / STATISTICS, statistics)
            manifest = self._manifest(records, statistics_record, merged)
            manifest["fingerprint"] = layout.fingerprint(manifest)
            layout.atomic_write(self.out / MANIFEST, layout.pretty_json(manifest))
            shutil.rmtree(self.state)
            layout.sync_folder(self.out)
        self.close()
        return self.out

    def _manifest(self, records: list[dict], statistics: dict, merged: Mapping[str, layout.Sums]) -> dict:
        assert self.table is not None and self.norm_limits is not None
        plan, sites = self.plan, {}
        for site in self.sites:
            entry = dict(plan["sites"][site])
            multiple = entry.pop("norm_multiple")
            limits = {"norm_limit": self.norm_limits[site], "norm_multiple": multiple}
            sites[site] = {**entry, **limits, **layout.site_summary(merged[site])}
        documents = self.out / DOCUMENTS
        return {
            "format": layout.FORMAT,
            "format_version": layout.VERSION,
            "fingerprint": "",
            "model": plan["model"],
            "tokenizer": plan["tokenizer"],
            "text": {**plan["text"], **self._text["text"]},
            "context_length": plan["context_length"],
            "batch_sequences": plan["batch_sequences"],
            "special_tokens": plan["special_tokens"],
            "dtype": self.dtype,
            "sites": sites,
            "sequences": self.table.n_sequences,
            "tokens": self.table.n_tokens,
            "rows": sum(r["rows"] for r in records),
            "shards": records,
            "token_table": self._text["token_table"],
            "statistics": statistics,
            "documents": (
                {"bytes": documents.stat().st_size, "sha256": layout.sha256_file(documents)}
                if documents.is_file()
                else None
            ),
            "environments": [{"shards": [0, len(records)], **plan["environment"]}],
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
                missing = sum(self.rows(i) for i in range(len(self.shards)) if i not in self.committed) * row_bytes
                raise SaekitError(
                    f"disk full at shard {shard} of {len(self.shards)}; "
                    f"free {layout.human_bytes(missing)} and run the same command again"
                ) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO):
                raise SaekitError(f"cannot write to {self.out}: {os.strerror(error.errno).lower()}") from error
            raise


def write_shard(path: Path, x_nD: torch.Tensor, norm_limit: float | None) -> dict:
    """One activation file: rows (n, D) in a store dtype, their sums and outliers. Returns `{"bytes": …, "sha256": …}`."""
    x_nD = x_nD.detach().contiguous()
    # numpy has no bfloat16; its bits travel as uint16.
    array = x_nD.view(torch.uint16).numpy() if x_nD.dtype == torch.bfloat16 else x_nD.numpy()
    sums = layout.shard_sums(array, norm_limit)
    assert math.isfinite(float(sums.norm_moments[3])), f"{path}: the collector lets no NaN or infinity through"
    tag = "BF16" if x_nD.dtype == torch.bfloat16 else "F16" if x_nD.dtype == torch.float16 else "F32"
    # Among the 4-byte tensors of a float32 store the rows come first, so that they keep their alignment.
    tensors = {"activations": (array, tag), **sums._asdict()}
    return layout.write_tensors(path, tensors, align="activations")


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
