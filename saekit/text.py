"""Text sources → documents → sequences of token ids.

    for document in documents(["data/*.jsonl", "notes.txt", "stdlib"]): …
    packed = pack(documents(["stdlib"]), tokenizer, Packing(context=256, bos=0, separator=1, dropped=(0, 1)), vocab_size=4096)
    packed.table                      # TokenTable: what the model sees, and which positions get a row

1. A source is a file (.txt .md .py .jsonl), a folder of them, a glob, or `stdlib`; a document is a file or a line of .jsonl.
2. `join`: the documents' ids stand one behind the other with the separator in between; this stream is cut into sequences
   of `context` tokens, BOS first if there is one. The last sequence may be shorter; nothing is lost or repeated.
3. Special ids get no row, wherever they stand.

N positions the model sees · S sequences · R runs (stretches of one document in one sequence) · M tokens of the stream
"""

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.store.format import TokenTable, token_dtype

TEST_FOLDERS = {"test", "tests", "idle_test"}
EXTENSIONS = (".txt", ".md", ".py", ".jsonl")
KNOWN = ".txt .md .py .jsonl, folders and globs of them, and stdlib"
BYTE_ORDER_MARK = "\ufeff"

# what the tokenizer's threads get at once: enough for all of them, little enough to stop soon after the last token needed
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 19


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """One name in ten, the same ones on every machine: sha256 of the name is 0 modulo 10."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10 == 0


# Sources


def documents(sources: Iterable[str], text_field: str = "text") -> Iterator[Document]:
    """Documents of all sources, in their order; inside a folder in byte order of the relative path.

    Text is strict UTF-8 as it stands, without a byte-order mark at the start of a file. Empty documents come too.
    Raises SaekitError for a source that is missing or of no known kind (at once), and for bytes or lines that cannot be
    read (on the way).
    """
    found = [_resolve(source) for source in sources]

    def read() -> Iterator[Document]:
        for source in found:
            if source is None:
                yield from stdlib_documents()
            else:
                for path, name in source:
                    yield from (
                        _read_lines(path, name, text_field) if _extension(path) == ".jsonl" else _read_file(path, name)
                    )

    return read()


def source_bytes(sources: Iterable[str]) -> int:
    """Size of all files of the sources; what `stdlib` passes over is counted too."""
    paths = []
    for found in map(_resolve, sources):
        paths += [path for path, _ in (found if found is not None else _stdlib_paths(tests=False))]
    return sum(path.stat().st_size for path in paths)


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


def _resolve(source: str) -> list[tuple[Path, str]] | None:
    """Files of a source with the names their documents get; None for `stdlib`."""
    if source == "stdlib":
        return None
    path = Path(source).expanduser()
    if path.is_dir():
        return _walk(path, source)
    if path.exists():
        if _extension(path) not in EXTENSIONS:
            raise SaekitError(f"cannot read {source}: known are {KNOWN}")
        return [(path, path.name)]
    if glob.has_magic(source):
        matches = sorted(glob.glob(str(path), recursive=True), key=os.fsencode)
        # `**` matches a folder and what lies in it: the files alone are taken there
        files = [
            pair for match in matches if "**" not in source or Path(match).is_file() for pair in _resolve(match) or []
        ]
        if matches:
            return files
    raise SaekitError(f"no such file: {source}")


def _walk(folder: Path, source: str) -> list[tuple[Path, str]]:
    """Files of known kinds below a folder. A link to a folder inside is passed over: its files come under their own name."""
    files, root = [], folder.resolve()
    for parent, folders, names in os.walk(folder):
        for entry in [*folders, *names]:
            path = Path(parent, entry)
            if entry in names and _extension(path) not in EXTENSIONS:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise SaekitError(f"{path} is a link out of {source}; name its target as a source of its own")
            if entry in names:
                files.append((path, path.relative_to(folder).as_posix()))
    return sorted(files, key=lambda pair: os.fsencode(pair[1]))


def _extension(path: Path) -> str:
    return path.suffix.lower()


def _read_file(path: Path, name: str) -> Iterator[Document]:
    try:
        # bytes, because reading as text would turn CR LF into LF
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SaekitError(f"{path}: byte {error.start} is not UTF-8; re-encode it") from error
    except OSError as error:
        raise SaekitError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    yield Document(name, text.removeprefix(BYTE_ORDER_MARK))


def _read_lines(path: Path, name: str, field: str) -> Iterator[Document]:
    """One document per line of a .jsonl file; blank lines are passed over."""
    try:
        with open(path, "rb") as lines:
            offset = 0
            # a file opened in binary mode breaks at LF alone, not at the separators that JSON strings may hold
            for number, line in enumerate(lines, 1):
                where = f"{path} line {number}"
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise SaekitError(f"{where}: byte {offset + error.start} is not UTF-8; re-encode it") from error
                offset += len(line)
                if number == 1:
                    text = text.removeprefix(BYTE_ORDER_MARK)
                if text.strip():
                    yield Document(f"{name}:{number}", _field(text, field, where))
    except OSError as error:
        raise SaekitError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SaekitError(f"{where}: not valid JSON ({error}); mend the line or take it out") from error
    if not isinstance(record, dict):
        raise SaekitError(f"{where}: a JSON {_kind(record)}, not an object with a field {json.dumps(field)}")
    if field not in record:
        texts = [key for key, value in record.items() if isinstance(value, str)]
        advice = f"; pass --text-field {max(texts, key=lambda key: len(record[key]))}" if texts else ""
        raise SaekitError(f"{where}: no field {json.dumps(field)}; fields are {', '.join(record) or 'none'}{advice}")
    text = record[field]
    if not isinstance(text, str):
        raise SaekitError(f"{where}: field {json.dumps(field)} holds a {_kind(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SaekitError(f"{where}: character {error.start} is half of a surrogate pair; mend the line") from error
    return text


def _kind(value) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names[type(value)]


# Sequences


@dataclass(frozen=True, kw_only=True)
class Packing:
    context: int
    """Tokens of a sequence, BOS included."""
    bos: int | None = None
    """Id at the start of each sequence; None = none."""
    separator: int | None = None
    """Id between two documents; None = none."""
    dropped: tuple[int, ...] = ()
    """Ids whose positions get no row."""


@dataclass(frozen=True)
class Packed:
    table: TokenTable
    documents: int
    """Documents that gave at least one token."""
    bytes: int
    """UTF-8 bytes of these documents."""
    empty: int
    """Documents without text, passed over."""


def pack(
    texts: Iterable[Document],
    tokenizer,
    packing: Packing,
    *,
    vocab_size: int,
    tokens: int | None = None,
    source: str = "the text",
    size: int = 0,
) -> Packed:
    """Joins and cuts the documents; `tokens` positions if given (BOS and separators count), else all of the text.

    `source` names them in errors; `size` is the bytes of the sources, for the progress line.

    Raises SaekitError if there is no text, if it ends before `tokens`, if no position gets a row, or if an id lies outside
    the embedding of `vocab_size` rows.
    """
    room = packing.context - (packing.bos is not None)
    needed = None
    if tokens is not None:
        full, rest = divmod(tokens, packing.context)
        needed = full * room + max(0, rest - (packing.bos is not None))
        if needed < 1:
            raise SaekitError(f"--tokens {tokens} leaves no room for text; pass more")
    stream: list[np.ndarray] = []
    first: list[int] = []
    last: list[int] = []
    sizes: list[int] = []
    length, empty = 0, 0
    with Progress("tokenise", needed or size, "tokens" if needed else "bytes") as progress:
        for ids, n_bytes in _tokenised(texts, tokenizer):
            if not len(ids):
                empty += 1
                continue
            if needed is not None and length >= needed:
                break
            if length and packing.separator is not None:
                stream.append(np.array([packing.separator], np.int32))
                length += 1
            first.append(length)
            stream.append(ids)
            length += len(ids)
            last.append(length)
            sizes.append(n_bytes)
            progress.advance(min(len(ids), needed - progress.done) if needed else n_bytes)
    if not first:
        raise SaekitError(f"{source} holds no text (0 non-empty documents); give another source")
    if needed is not None:
        if length < needed:
            have = length + (-(-length // room) if packing.bos is not None else 0)
            raise SaekitError(
                f"text ended at {have:,} of {tokens:,} tokens; pass --tokens {have} or less, or give more text"
            )
        length = needed
    stream_M = np.concatenate(stream)[:length]
    if not 0 <= stream_M.min() <= stream_M.max() < vocab_size:
        raise SaekitError(f"{source}: the tokenizer gives id {stream_M.max()}; the model embeds 0 to {vocab_size - 1}")
    inside = sum(a < length for a in first)
    first_K, last_K = np.array(first[:inside], np.int64), np.minimum(np.array(last[:inside], np.int64), length)
    table = _cut(stream_M, first_K, last_K, packing, vocab_size)
    if not table.stored.any():
        raise SaekitError("nothing to store: every token of a sequence is special; raise --context")
    return Packed(table, inside, sum(sizes[:inside]), empty)


def _cut(
    stream_M: np.ndarray, first_K: np.ndarray, last_K: np.ndarray, packing: Packing, vocab_size: int
) -> TokenTable:
    """The stream in sequences; document k is stream positions first_K[k] to last_K[k]."""
    M, bos = len(stream_M), int(packing.bos is not None)
    room = packing.context - bos
    S = -(-M // room)
    token = np.empty(M + S * bos, token_dtype(vocab_size))
    seq_start = np.minimum(np.arange(S + 1, dtype=np.int64) * packing.context, len(token))
    text_N = np.ones(len(token), bool)
    if bos:
        text_N[seq_start[:-1]] = False
        token[seq_start[:-1]] = packing.bos
    token[text_N] = stream_M
    # a run starts with each document, and with each sequence that starts inside one
    cuts = np.arange(S, dtype=np.int64) * room
    document = np.searchsorted(first_K, cuts, side="right") - 1
    runs = np.union1d(first_K, cuts[cuts < last_K[document]])
    run_doc = np.searchsorted(first_K, runs, side="right") - 1
    dropped_V = np.zeros(vocab_size, bool)
    dropped_V[list(packing.dropped)] = True
    return TokenTable(
        token=token,
        stored=~dropped_V[token],
        seq_start=seq_start,
        run_start=runs // room * packing.context + bos + runs % room,
        run_doc=run_doc.astype(np.int64),
        run_position=runs - first_K[run_doc],
    )


def _tokenised(texts: Iterable[Document], tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Ids (int32) and UTF-8 bytes of each document; no special tokens added, nothing cut, no warning of length."""
    encode = _encoder(tokenizer)
    for batch in _batches(texts):
        for ids, text in zip(encode(batch), batch):
            yield np.array(ids, np.int32), len(text.encode())


def _batches(texts: Iterable[Document]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for document in texts:
        # white space alone is no text
        batch.append(document.text if document.text.strip() else "")
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoder(tokenizer):
    """Function from a list of texts to their ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return lambda batch: [tokenizer.encode(text, add_special_tokens=False, verbose=False) for text in batch]
    # a copy: padding and truncation are settings of the tokenizer, and the caller's stay as they are
    own = type(backend).from_str(backend.to_str())
    own.no_padding()
    own.no_truncation()
    return lambda batch: [encoding.ids for encoding in own.encode_batch_fast(batch, add_special_tokens=False)]


def special_ids(tokenizer) -> dict[str, int | None]:
    """`bos`, `eos` and `pad` of a tokenizer, None where it defines none."""
    return {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}


def plan_packing(
    tokenizer,
    *,
    context: int,
    bos: str = "auto",
    keep_special: bool = False,
    drop_ids: Sequence[int] = (),
    vocab_size: int,
    name: str,
) -> Packing:
    """Which special tokens are put in and which get no row, from the options of `saekit collect`.

    Raises SaekitError for `bos="always"` without a BOS, and for a dropped id that the model does not embed.
    """
    ids = special_ids(tokenizer)
    if bos == "always" and ids["bos"] is None:
        raise SaekitError(f"the tokenizer of {name} defines no BOS; use --bos auto")
    outside = [i for i in drop_ids if not 0 <= i < vocab_size]
    if outside:
        raise SaekitError(f"--drop-ids {outside[0]}: the model embeds 0 to {vocab_size - 1}")
    special = set() if keep_special else {i for i in ids.values() if i is not None}
    return Packing(
        context=context,
        bos=None if bos == "never" else ids["bos"],
        separator=ids["eos"],
        dropped=tuple(sorted(special | set(drop_ids))),
    )
