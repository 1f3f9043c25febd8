"""Text sources → documents.

    text = Text(["data/*.jsonl", "notes.txt", "hf:wikitext,wikitext-2-raw-v1", "stdlib"])     # looked up at once
    for document in text.documents(): …                                                       # read on the way

1. A source is a file, a folder of files, a glob, a data set of the Hugging Face hub (`hf:…`), standard input (`-`), or
   `stdlib`.
2. A document is a file (.txt .md .py), a line of .jsonl or .jsonl.zst, a row of .parquet or of a data set, or a line of
   standard input; .txt may be cut into documents as well. Lines and rows count from 1.
3. With `ids_field` a record holds token ids in place of text; sources of other kinds are refused then.
"""

import glob
import hashlib
import importlib
import itertools
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saekit.config import ReadingOptions
from saekit.errors import SaekitError

TEST_FOLDERS = {"test", "tests", "idle_test"}
TEXTS = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.zst", ".parquet")
PACKAGES = {".jsonl.zst": "zstandard", ".parquet": "pyarrow"}
BYTE_ORDER_MARK = "\ufeff".encode()

# rows that are taken from a table at once, and bytes of a compressed file: repetitive text may be a thousand times as long
ROWS = 256
CHUNK = 1 << 12


@dataclass(frozen=True, eq=False)
class Document:
    name: str
    text: str = ""
    ids: np.ndarray | None = None
    """int64 token ids in place of text."""
    where: str = ""
    """Place for errors, such as `ids.parquet row 812`; given with ids alone."""

    @property
    def held_out(self) -> bool:
        """One name in ten, the same ones on every machine: sha256 of the name is 0 modulo 10."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10 == 0


@dataclass(frozen=True)
class _Source:
    read: Callable[[], Iterator[Document]]
    bytes: int | None
    revision: str | None = None


class Text:
    """Documents of all sources, in their order; inside a folder in byte order of the relative path.

    Text is UTF-8 as it stands, without a byte-order mark at the start of a file. Empty documents come too.

    Raises:
        SaekitError: a source is missing or of no known kind, or the package that reads it is; on the way for bytes,
            lines and rows that cannot be read.
    """

    def __init__(self, sources: Sequence[str], options: ReadingOptions | None = None):
        self.options = options or ReadingOptions()
        self.bad_lines = 0
        """Lines and rows passed over under `skip_bad_lines`, so far."""
        self.name = " ".join(sources)
        self.repeatable = "-" not in sources
        """Whether the text can be read more than once: standard input cannot."""
        self._stdin_read = False
        if list(sources).count("-") > 1:
            raise SaekitError("- is named twice; standard input can be read once")
        self._sources = [self._resolve(source) for source in sources]
        sizes, revisions = [s.bytes for s in self._sources], [s.revision for s in self._sources]
        self.bytes = None if None in sizes else sum(size for size in sizes if size is not None)
        """Size of all files; None where it is unknown or says little of the text's length: data sets, standard input,
        compressed files, token ids."""
        self.revision = revisions if any(revisions) and len(revisions) > 1 else (revisions or [None])[0]
        """Commit of a data set, Python's version for `stdlib`; a list if there are several sources and any has one."""

    def documents(self) -> Iterator[Document]:
        """From the start, each time."""
        self.bad_lines = 0
        for source in self._sources:
            yield from source.read()

    # Sources

    def _resolve(self, source: str) -> _Source:
        of_ids = self.options.ids_field is not None
        if of_ids and source in ("-", "stdlib"):
            raise SaekitError(f"{source} holds text, not token ids; --ids-field reads {' '.join(RECORDS)} and hf:NAME")
        if source == "stdlib":
            size = sum(path.stat().st_size for path, _ in _stdlib_paths(tests=False))
            return _Source(stdlib_documents, size, platform.python_version())
        if source == "-":
            return _Source(self._read_stdin, None)
        if source.startswith("hf:"):
            dataset, revision = _dataset(source)
            return _Source(lambda: self._read_dataset(dataset, source), None, revision)
        files = self._files(source)
        kinds = {_extension(path) for path, _ in files}
        for kind in sorted(kinds & set(PACKAGES)):
            _need(PACKAGES[kind], kind)
        size = None
        if not of_ids and not kinds & set(PACKAGES):
            try:
                size = sum(path.stat().st_size for path, _ in files)
            except OSError as error:
                raise _cannot_read(error.filename, error) from error
        return _Source(lambda: (document for path, name in files for document in self._read_file(path, name)), size)

    def _files(self, source: str) -> list[tuple[Path, str]]:
        """Files of a source with the names their documents get."""
        path = Path(source).expanduser()
        if path.is_dir():
            return self._walk(path, source)
        if path.exists():
            if _extension(path) not in self._kinds:
                raise SaekitError(
                    f"cannot read {source}: known are {' '.join(TEXTS + RECORDS)}, folders and globs of them, hf:NAME, - "
                    "and stdlib"
                    if _extension(path) not in TEXTS
                    else f"{source} holds text, not token ids; --ids-field reads {' '.join(RECORDS)} and hf:NAME"
                )
            return [(path, path.name)]
        if glob.has_magic(source):
            matches = sorted(glob.glob(str(path), recursive=True), key=os.fsencode)
            # `**` matches a folder and what lies in it: the files alone are taken there
            if matches:
                taken = [match for match in matches if "**" not in source or Path(match).is_file()]
                return [pair for match in taken for pair in self._files(match)]
        raise SaekitError(f"no such file: {source}")

    @property
    def _kinds(self) -> tuple[str, ...]:
        return RECORDS if self.options.ids_field is not None else TEXTS + RECORDS

    def _walk(self, folder: Path, source: str) -> list[tuple[Path, str]]:
        """Files of known kinds below a folder. A link to a folder inside is passed over: its files come under their own
        name."""
        files, root = [], folder.resolve()
        for parent, folders, names in os.walk(folder):
            for entry in [*folders, *names]:
                path = Path(parent, entry)
                if entry in names and _extension(path) not in self._kinds:
                    continue
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise SaekitError(f"{path} is a link out of {source}; name its target as a source of its own")
                if entry in names:
                    files.append((path, path.relative_to(folder).as_posix()))
        return sorted(files, key=lambda pair: os.fsencode(pair[1]))

    # Files

    def _read_file(self, path: Path, name: str) -> Iterator[Document]:
        kind = _extension(path)
        try:
            if kind == ".parquet":
                yield from self._read_parquet(path, name)
            elif kind == ".jsonl.zst":
                yield from self._read_json(_zst_lines(path), str(path), name)
            else:
                # bytes, because reading as text would turn CR LF into LF; they break at LF alone, not at the separators
                # that JSON strings may hold
                with open(path, "rb") as lines:
                    if kind == ".jsonl":
                        yield from self._read_json(lines, str(path), name)
                    else:
                        cut = self.options.split_documents or "none" if kind == ".txt" else "none"
                        yield from self._read_text(lines, cut, str(path), name)
        except OSError as error:
            raise _cannot_read(path, error) from error

    def _read_stdin(self) -> Iterator[Document]:
        if self._stdin_read:
            raise SaekitError("stdin cannot be read again; save the text to a file")
        if sys.stdin is None:
            raise SaekitError("stdin is closed; pipe the text into the command, or name a file")
        self._stdin_read = True
        yield from self._read_text(sys.stdin.buffer, self.options.split_documents or "line", "stdin", "stdin")

    def _read_text(self, lines: Iterable[bytes], cut: str, place: str, name: str) -> Iterator[Document]:
        for number, offset, piece in _pieces(lines, cut):
            yield Document(name if cut == "none" else f"{name}:{number}", self._decode(piece, place, offset))

    def _read_json(self, lines: Iterable[bytes], place: str, name: str) -> Iterator[Document]:
        """One document per line; blank lines are passed over."""
        for number, offset, line in _pieces(lines, "line"):
            where = f"{place} line {number}"
            try:
                text = self._decode(line, where, offset)
                if text.strip():
                    yield self._document(_parse(text, where), f"{name}:{number}", where)
            except SaekitError as error:
                self._bad(error)

    def _document(self, record, name: str, where: str) -> Document:
        """Document of one JSON value."""
        field, of_ids = self._field
        if not isinstance(record, dict):
            raise SaekitError(f'{where}: a JSON {_kind(record)}, not an object with a field "{field}"')
        if field not in record:
            raise self._no_field(record, where)
        value = record[field]
        if of_ids:
            if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 1 << 63 for i in value):
                raise _no_ids(field, where)
            return Document(name, ids=np.array(value, np.int64), where=where)
        if not isinstance(value, str):
            raise SaekitError(f'{where}: field "{field}" holds a {_kind(value)}, not text')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SaekitError(f"{where}: character {error.start} is half of a surrogate pair; mend the line") from error
        return Document(name, value)

    # Tables

    def _read_parquet(self, path: Path, name: str) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        field, row = self._field[0], 1
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if field not in file.schema_arrow.names:
                    first = next(file.iter_batches(batch_size=1), None)
                    raise self._no_field(
                        first.to_pylist()[0] if first else dict.fromkeys(file.schema_arrow.names), str(path)
                    )
                for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
                    yield from self._read_column(batch.column(0), row, str(path), name)
                    row += batch.num_rows
        except pyarrow.ArrowException as error:
            raise SaekitError(f"cannot read {path}: {_first_line(error)}") from error

    def _read_dataset(self, dataset, source: str) -> Iterator[Document]:
        field, row = self._field[0], 1
        for table in _tables(dataset, source):
            if field not in table.column_names:
                raise self._no_field(table.slice(0, 1).to_pylist()[0], source)
            for chunk in table.column(field).chunks:
                yield from self._read_column(chunk, row, source, source)
                row += len(chunk)

    def _read_column(self, column, row: int, place: str, name: str) -> Iterator[Document]:
        """Documents of an Arrow array whose first value stands in row number `row`."""
        import pyarrow

        field, of_ids = self._field
        kind = column.type
        inner = getattr(kind, "value_type", None)
        if of_ids:
            wanted, fits = pyarrow.large_list(pyarrow.int64()), inner is not None and pyarrow.types.is_integer(inner)
        else:
            texts = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
            wanted, fits = pyarrow.large_binary(), str(inner or kind) in texts and not pyarrow.types.is_nested(kind)
        if not fits and not pyarrow.types.is_null(kind):
            raise SaekitError(f'{place}: field "{field}" holds {kind}, not {"token ids" if of_ids else "text"}')
        try:
            column = column.cast(wanted)
        except pyarrow.ArrowInvalid as error:
            raise _no_ids(field, f"{place} rows {row} to {row + len(column) - 1}") from error
        if of_ids:
            # a missing id is no id, as a negative one is none
            flat, offsets = column.values.fill_null(-1).to_numpy(zero_copy_only=False), column.offsets.to_numpy()
            values = [flat[a:b] for a, b in itertools.pairwise(offsets)]
        else:
            values = column.to_pylist()
        missing = column.is_null().to_numpy(zero_copy_only=False)
        for number, (value, is_missing) in enumerate(zip(values, missing), row):
            where = f"{place} row {number}"
            try:
                if is_missing:
                    raise SaekitError(f'{where}: field "{field}" is null; fill it, or pass --skip-bad-lines')
                if of_ids:
                    if len(value) and value.min() < 0:
                        raise _no_ids(field, where)
                    yield Document(f"{name}:{number}", ids=value, where=where)
                else:
                    yield Document(f"{name}:{number}", self._decode(value, where))
            except SaekitError as error:
                self._bad(error)

    # Values

    @property
    def _field(self) -> tuple[str, bool]:
        """Field of a record that is read, and whether it holds token ids."""
        ids = self.options.ids_field
        return (self.options.text_field, False) if ids is None else (ids, True)

    def _decode(self, data: bytes, where: str, offset: int = 0) -> str:
        try:
            return data.decode(errors=self.options.encoding_errors)
        except UnicodeDecodeError as error:
            raise SaekitError(
                f"{where}: byte {offset + error.start} is not UTF-8; re-encode it or pass --encoding-errors replace"
            ) from error

    def _bad(self, error: SaekitError):
        if not self.options.skip_bad_lines:
            raise error
        self.bad_lines += 1

    def _no_field(self, record: dict[str, Any], where: str) -> SaekitError:
        """Names the fields there are, and advises the longest of the right kind."""
        field, of_ids = self._field
        candidates = [key for key, value in record.items() if isinstance(value, list if of_ids else str)]
        option = "--ids-field" if of_ids else "--text-field"
        advice = f"; pass {option} {max(candidates, key=lambda key: len(record[key]))}" if candidates else ""
        return SaekitError(f'{where}: no field "{field}"; fields are {", ".join(record) or "none"}{advice}')


def _extension(path: Path) -> str:
    suffixes = "".join(path.suffixes[-2:]).lower()
    return suffixes if suffixes == ".jsonl.zst" else path.suffix.lower()


def _need(package: str, kind: str):
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise SaekitError(f"reading {kind} needs {package}: pip install 'saekit[text]'") from error


def _cannot_read(path: str | Path, error: OSError) -> SaekitError:
    return SaekitError(f"cannot read {path}: {(error.strerror or str(error)).lower()}")


def _no_ids(field: str, where: str) -> SaekitError:
    return SaekitError(f'{where}: field "{field}" holds no list of token ids, which are whole numbers from 0')


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parse(line: str, where: str):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SaekitError(f"{where}: not valid JSON ({error}); mend the line or pass --skip-bad-lines") from error


def _kind(value) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names[type(value)]


# Lines


def _pieces(lines: Iterable[bytes], cut: str) -> Iterator[tuple[int, int, bytes]]:
    """Pieces of a text, each with the number of its first line and the place of its first byte.

    `line`: each line; `blank-line`: what stands between lines of white space; both without the line end behind them.
    `none`: everything. A byte-order mark at the start of the text is in no piece.
    """
    if cut == "none":
        lines = [b"".join(lines)]
    offset, piece, first = 0, [], (1, 0)
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            line, offset = line.removeprefix(BYTE_ORDER_MARK), len(BYTE_ORDER_MARK)
        if cut == "none":
            yield number, offset, line
        elif cut == "line":
            yield number, offset, _without_end(line)
        elif line.strip():
            first = first if piece else (number, offset)
            piece.append(line)
        elif piece:
            yield *first, _without_end(b"".join(piece))
            piece = []
        offset += len(line)
    if piece:
        yield *first, _without_end(b"".join(piece))


def _without_end(line: bytes) -> bytes:
    """Without the LF or CR LF behind it; what ends a file without LF is no line end."""
    return line[:-1].removesuffix(b"\r") if line.endswith(b"\n") else line


def _zst_lines(path: Path) -> Iterator[bytes]:
    """Lines of a Zstandard file, with their line ends. The library's own reader takes a file that breaks off for whole."""
    import zstandard

    decompressor, frame, line = zstandard.ZstdDecompressor(max_window_size=1 << 31), None, []
    try:
        with open(path, "rb") as file:
            while data := file.read(CHUNK):
                while data:
                    frame = frame or decompressor.decompressobj()
                    first, *others = frame.decompress(data).split(b"\n")
                    line.append(first)
                    for piece in others:
                        yield b"".join(line) + b"\n"
                        line = [piece]
                    data, frame = frame.unused_data, None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise SaekitError(f"cannot read {path}: {_first_line(error)}") from error
    if frame is not None:
        raise SaekitError(f"cannot read {path}: it breaks off inside the compressed data; copy or download it again")
    if last := b"".join(line):
        yield last


# Data sets


def _dataset(source: str) -> tuple[Any, str | None]:
    """Streamed data set `hf:NAME[@REVISION][,CONFIG][:SPLIT]` and its commit; None for a local folder."""
    _need("datasets", "hf:")
    import datasets
    import datasets.config

    match = re.fullmatch(r"hf:([^@,:]+)(?:@([^,:]+))?(?:,([^:]+))?(?::(.+))?", source)
    if match is None:
        raise SaekitError(f"cannot read {source}: a data set is hf:NAME, hf:NAME,CONFIG or hf:NAME,CONFIG:SPLIT")
    name, revision, config, split = match.groups()
    path = Path(name).expanduser()
    local, commit = path.is_dir(), None
    if not local and name.startswith((".", "/", "~")):
        raise SaekitError(f"no such folder: {name}")
    offline = datasets.config.HF_HUB_OFFLINE
    if not local and not offline:
        commit = _commit(source, name, revision)
    try:
        builder = datasets.load_dataset_builder(str(path) if local else name, config, revision=commit)
        if not local:
            # the library falls back to its cache, which may hold another commit
            if commit is not None and builder.hash != commit:
                raise SaekitError(f"{source}: commit {commit} cannot be loaded from the hub; try again")
            commit = builder.hash if re.fullmatch("[0-9a-f]{40}", builder.hash or "") else None
        if offline and revision is not None and commit != revision:
            raise SaekitError(f"{source} is not in the local cache and HF_HUB_OFFLINE is set; unset it")
        dataset: Any = builder.as_streaming_dataset(split=split or "train")
        return dataset.with_format("arrow"), commit
    except SaekitError:
        raise
    except ConnectionError as error:
        if offline:
            raise SaekitError(f"{source} is not in the local cache and HF_HUB_OFFLINE is set; unset it") from error
        raise SaekitError(f"{source}: the hub cannot be reached ({_first_line(error)}); try again") from error
    except Exception as error:
        raise SaekitError(f"cannot open {source}: {' '.join(str(error).splitlines()[:2])}") from error


def _commit(source: str, name: str, revision: str | None) -> str:
    """Commit that a revision of a data set on the hub stands for now; the newest without one."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
    except errors.RevisionNotFoundError as error:
        raise SaekitError(f"{source}: {name} has no revision {revision}; name a branch, tag or commit") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise SaekitError(
            f"{source}: the hub has no data set {name}, or it is private; check the name, or run  hf auth login"
        ) from error
    # whatever the network raises; the libraries below change
    except Exception as error:
        raise SaekitError(f"{source}: the hub cannot be reached ({_first_line(error)}); try again") from error
    assert commit is not None
    return commit


def _tables(dataset, source: str) -> Iterator[Any]:
    """Arrow tables of a data set; whatever its files or the network raise becomes one line."""
    tables, rows = iter(dataset.iter(batch_size=ROWS)), 0
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            raise SaekitError(f"cannot read {source} behind row {rows}: {_first_line(error)}; try again") from error
        if table is None:
            return
        rows += table.num_rows
        yield table


# The standard library


def stdlib_documents(tests: bool = False) -> Iterator[Document]:
    """Source files of the running interpreter's standard library, in byte order of the path, without repeats.

    Test folders, which Debian and container images lack, are left out unless `tests`.
    """
    seen = set()
    for path, name in _stdlib_paths(tests):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(name, text)


def _stdlib_paths(tests: bool) -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = sorted((p.relative_to(root).as_posix().encode(), p) for p in root.rglob("*.py"))
    paths = []
    for name, path in found:
        parts = name.decode().split("/")
        if "site-packages" in parts or "dist-packages" in parts or (not tests and TEST_FOLDERS & set(parts[:-1])):
            continue
        paths.append((path, name.decode()))
    return paths
