"""Documents → sequences of token ids, in parts of the token table.

    packing = plan_packing(tokenizer, context=256, vocab_size=4096, name="./ckpt")
    for part in parts(Text(["stdlib"]).documents(), tokenizer, packing, vocab_size=4096, sequences=512):
        part.table                    # TokenTable: what the model sees, and which positions get a row
        part.state                    # JSON; parts(…, state=part.state) goes on behind this part

1. The ids of the documents form a stream. `join` and `isolate` put the separator between two documents and cut the
   stream every `room` tokens, whatever stands there; `separate` cuts it at each document as well, and has no separator.
2. A sequence is a piece of the stream in its frame: BOS in front if there is one, for encoders a closing id behind.
   The last sequence may be shorter; nothing is lost or repeated.
3. A part is so many sequences. Neither its size nor where reading began changes a sequence: a part fixes what is
   behind it by the number of documents that are done and the place inside the last one.
4. Special ids get no row, wherever they stand.

N positions the model sees · S sequences · R runs (stretches of one document in one sequence) · M tokens of the stream ·
K documents
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.store.format import TokenTable, token_dtype
from saekit.text import Document

# what the tokenizer's threads get at once: enough for all of them, little enough to stop soon after the last token needed
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 19

NO_LIMIT = 1 << 62

Mode = Literal["join", "isolate", "separate"]


@dataclass(frozen=True, kw_only=True)
class Packing:
    context: int
    """Tokens of a sequence, BOS included."""
    mode: Mode = "join"
    """join = sequences are full, attention crosses document borders; isolate = the same sequences, but no document sees
    another; separate = one document per sequence, long ones cut."""
    bos: int | None = None
    """Id at the start of each sequence; None = none."""
    separator: int | None = None
    """Id between two documents; None = none."""
    closing: int | None = None
    """Id at the end of each sequence; None = none."""
    dropped: tuple[int, ...] = ()
    """Ids whose positions get no row."""

    @property
    def frame(self) -> int:
        """Tokens that are put around the text of a sequence."""
        return (self.bos is not None) + (self.closing is not None)

    @property
    def room(self) -> int:
        """Tokens of text in a full sequence."""
        return self.context - self.frame

    def text_in(self, positions: int) -> int:
        """Tokens of text in so many positions; a sequence without text is not begun."""
        full, rest = divmod(positions, self.context)
        return full * self.room + max(0, rest - self.frame)

    def pieces(self, text):
        """Sequences that so many consecutive tokens of text fill, the last perhaps in part (int or array)."""
        return -(-text // self.room)

    def positions(self, text):
        """Positions that they take."""
        return text + self.pieces(text) * self.frame


def plan_packing(
    tokenizer,
    *,
    context: int,
    packing: Mode = "join",
    bos: str = "auto",
    keep_special: bool = False,
    drop_ids: Sequence[int] = (),
    vocab_size: int,
    encoder: bool = False,
    ids: bool = False,
    name: str,
) -> Packing:
    """Which special tokens are put in and which get no row, from the options of `saekit collect`.

    Args:
        tokenizer: None = no special tokens are known, only `drop_ids` get no row.
        encoder: the model is an encoder: in `separate` each sequence ends with the separator, as in its training.
        ids: documents are token ids, taken as they are: `bos="auto"` means none then.
        name: of the model, for errors.

    Raises:
        SaekitError: `bos="always"` without a BOS, an id that the model does not embed, a context without room for text.
    """
    special = {"BOS": None, "separator": None, "PAD": None} if tokenizer is None else _special_ids(tokenizer)
    if bos == "always" and special["BOS"] is None:
        whose = f"{name} has no tokenizer and so" if tokenizer is None else f"the tokenizer of {name} defines"
        raise SaekitError(f"{whose} no BOS; use --bos auto")
    if outside := [i for i in drop_ids if not 0 <= i < vocab_size]:
        raise SaekitError(f"--drop-ids {outside[0]}: the model embeds 0 to {vocab_size - 1}")
    dropped = set() if keep_special else {i for i in special.values() if i is not None}
    separate, as_they_are = packing == "separate", ids and bos != "always"
    plan = Packing(
        context=context,
        mode=packing,
        bos=None if bos == "never" or as_they_are else special["BOS"],
        separator=None if separate else special["separator"],
        closing=special["separator"] if separate and encoder and not as_they_are else None,
        # padding may have an id behind the last row of the embedding: no text holds it
        dropped=tuple(sorted(i for i in dropped | set(drop_ids) if i < vocab_size)),
    )
    for what, i in (("BOS", plan.bos), ("separator", plan.separator), ("separator", plan.closing)):
        if i is not None and i >= vocab_size:
            raise SaekitError(
                f"the tokenizer of {name} has the {what} {i}; the model embeds 0 to {vocab_size - 1}; pass --tokenizer"
            )
    if plan.room < 1:
        raise SaekitError(f"--context {context} leaves no room for text; pass at least {plan.frame + 1}")
    return plan


def _special_ids(tokenizer) -> dict[str, int | None]:
    """None where the tokenizer defines none; BERT's have [CLS] and [SEP] in place of BOS and EOS."""

    def first_of(*names: str) -> int | None:
        found = (getattr(tokenizer, f"{name}_token_id", None) for name in names)
        return next((i for i in found if i is not None), None)

    return {"BOS": first_of("bos", "cls"), "separator": first_of("eos", "sep"), "PAD": first_of("pad")}


class Part(NamedTuple):
    table: TokenTable
    """Its sequences alone; documents are counted from the start of the text."""
    state: dict
    """How far the text is read, in plain JSON of constant size:

    documents: those with a token in the parts so far; bytes: UTF-8 bytes of these, None for token ids;
    empty: documents without a token that came before the last of them, at the end of the text all;
    sequences, tokens, rows: so far, tokens with BOS and separators, rows = stored positions;
    inside: tokens of the last document in the parts so far, with the separator behind it where that is in them;
    crc32: of the documents up to the last, so that a text that has changed is noticed;
    last: no part follows; short: the text ended before `tokens`.
    """


def parts(
    documents: Iterable[Document],
    tokenizer,
    packing: Packing,
    *,
    vocab_size: int,
    sequences: int,
    tokens: int | None = None,
    source: str = "the text",
    size: int | None = None,
    state: Mapping | None = None,
) -> Iterator[Part]:
    """Parts of `sequences` sequences; the last one ends with the text, or with `tokens` positions.

    Args:
        tokenizer: for documents of text; None for those that are token ids.
        tokens: BOS and separators count; a few less come out where the rest holds no text. None = the whole text.
        source: names the text in errors.
        size: bytes of the text, for the progress line; None = unknown.
        state: of an earlier part; the same documents, from the start again, give exactly the parts behind it.

    Raises:
        SaekitError: no text, an id that the model does not embed, no position with a row in the whole text, `tokens`
            without room for text, or another text than the one that `state` comes from.
    """
    if state is not None and state["last"]:
        return
    if tokens is not None and packing.text_in(tokens) < 1:
        raise SaekitError(f"--tokens {tokens} leaves no room for text; pass more")
    stream = _Stream(packing, vocab_size, tokens, source)
    documents = iter(documents)
    if state is not None:
        last = stream.go_on(documents, state)
        documents = itertools.chain([last], documents)
    in_tokens = tokens is not None or size is None
    with Progress("tokenise", (tokens if in_tokens else size) or 0, "tokens" if in_tokens else "bytes") as progress:
        for batch in _tokenised(documents, tokenizer, stream.crc):
            stream.add(batch)
            progress.advance((stream.positions if in_tokens else stream.bytes) - progress.done)
            # one sequence more than the part has: what follows may be nothing, and then this part is the last
            while stream.waiting > sequences:
                yield stream.take(sequences, last=False)
            if stream.full:
                break
        if not stream.waiting:
            raise SaekitError(
                f"{source} holds no text (0 non-empty documents); give another source"
                if state is None
                else _changed(source)
            )
        yield stream.take(stream.waiting, last=True)


class _Stream:
    """The documents' tokens one behind the other, from the first that is in no part on.

    Places in the stream are counted from where reading began. Of the documents of earlier parts the last is kept: its
    rest, or the separator behind it, may stand at the front.
    """

    def __init__(self, packing: Packing, vocab_size: int, tokens: int | None, source: str):
        self.packing, self.tokens, self.source = packing, tokens, source
        self.vocab_size, self.dtype = vocab_size, token_dtype(vocab_size)
        self.gap = int(packing.separator is not None)
        self.dropped_V = np.zeros(vocab_size, bool)
        self.dropped_V[list(packing.dropped)] = True
        self.texts: list[np.ndarray] = []
        # rows: first place, tokens, and so far, with this document: bytes, empty documents before it, crc32
        self.documents: list[np.ndarray] = [np.zeros((5, 0), np.int64)]
        self.number = 0
        """Of the first document that is kept."""
        self.begin = self.end = 0
        """Of the tokens that wait."""
        self.waiting = 0
        """Sequences, the last of which may be cut short by the end of what was added."""
        self.limit = NO_LIMIT if tokens is None or packing.mode == "separate" else packing.text_in(tokens)
        self.full = False
        """Whether the limit is reached."""
        self.begun = False
        self.positions = self.bytes = self.empty = 0
        """Of all that was added, in earlier runs as well."""
        self.crc = 0
        """Of the documents that were passed over."""
        self.done = {"sequences": 0, "tokens": 0, "rows": 0}
        """In the parts so far."""

    def go_on(self, documents: Iterator[Document], state: Mapping) -> Document:
        """Passes over the documents that are done, puts everything where `state` says, and returns the last one, which is
        to be added next: its first `inside` tokens fall in front of the stream and out of it."""
        last = None
        for last in itertools.islice(documents, state["documents"] + state["empty"]):
            before, self.crc = self.crc, zlib.crc32(_content(last), self.crc)
        if last is None or self.crc != state["crc32"]:
            raise SaekitError(_changed(self.source))
        self.crc = before
        inside = state["inside"]
        self.done = {name: state[name] for name in self.done}
        self.number, self.empty = state["documents"] - 1, state["empty"]
        self.bytes = 0 if state["bytes"] is None else state["bytes"] - len(_content(last))
        self.end = -inside
        if self.packing.mode == "separate":
            # as a whole it is added again, and so are the sequences of it that are done
            self.waiting = -self.packing.pieces(inside)
            self.positions = state["tokens"] - self.packing.positions(inside)
        else:
            self.limit -= state["sequences"] * self.packing.room
        return last

    def add(self, batch: "_Batch") -> None:
        packing, some_K = self.packing, batch.length_K > 0
        empty_K = self.empty + np.cumsum(~some_K)
        bytes_K = self.bytes + np.cumsum(batch.bytes_K * some_K)
        self.empty, self.bytes = int(empty_K[-1]), int(bytes_K[-1])
        if not some_K.any():
            return
        length_K = batch.length_K[some_K]
        last_K = self.end + self.gap * self.begun + np.cumsum(length_K + self.gap) - self.gap
        first_K = last_K - length_K
        if packing.mode == "separate" and self.tokens is not None:
            taken_K = self.positions + np.cumsum(packing.positions(length_K))
            over = np.searchsorted(taken_K, self.tokens)
            if over < len(taken_K):
                before = self.positions if over == 0 else taken_K[over - 1]
                self.limit = int(first_K[over] + packing.text_in(int(self.tokens - before)))
        end = min(int(last_K[-1]), self.limit)
        inside = int(np.searchsorted(first_K, end))
        first_K, last_K = first_K[:inside], np.minimum(last_K[:inside], end)
        length_K = last_K - first_K
        ids_M = batch.ids_M[: length_K.sum()]
        self._check(ids_M, batch)
        if self.gap:
            text_M = np.full(end - self.end, packing.separator, self.dtype)
            text_M[np.arange(len(ids_M)) + np.repeat(last_K - self.end - np.cumsum(length_K), length_K)] = ids_M
        else:
            text_M = ids_M.astype(self.dtype)
        self.texts.append(text_M[max(0, self.begin - self.end) :])
        counted = (values[some_K][:inside] for values in (bytes_K, empty_K, batch.crc_K))
        self.documents.append(np.stack([first_K, length_K, *counted]))
        self.end, self.full, self.begun = end, end == self.limit, True
        if packing.mode == "separate":
            self.waiting += int(packing.pieces(length_K).sum())
            self.positions += int(packing.positions(length_K).sum())
        else:
            # 0 while the end lies in front of the stream: reading goes on behind that document
            waiting = max(0, end - self.begin)
            self.waiting, self.positions = packing.pieces(waiting), self.done["tokens"] + packing.positions(waiting)

    def _check(self, ids_M: np.ndarray, batch: "_Batch"):
        if not len(ids_M) or 0 <= ids_M.min() <= ids_M.max() < self.vocab_size:
            return
        m = np.flatnonzero((ids_M < 0) | (ids_M >= self.vocab_size))[0]
        where = batch.where[np.searchsorted(np.cumsum(batch.length_K), m, side="right")]
        if where:
            raise SaekitError(f"{where}: id {ids_M[m]}; the model embeds 0 to {self.vocab_size - 1}")
        raise SaekitError(
            f"{self.source}: the tokenizer gives id {ids_M[m]}; the model embeds 0 to {self.vocab_size - 1}"
        )

    def take(self, sequences: int, last: bool) -> Part:
        """The next so many of the sequences that wait; all of them if they are the `last` ones."""
        text_M, documents = np.concatenate(self.texts), np.concatenate(self.documents, axis=1)
        first_K, length_K, bytes_K, empty_K, crc_K = documents
        start_S = self._starts(first_K, length_K)
        end = self.end if last else int(start_S[sequences])
        size = end - self.begin
        K = int(np.searchsorted(first_K, end))
        table = self._table(
            text_M[:size], start_S[:sequences] - self.begin, first_K[:K] - self.begin, length_K[:K], self.number
        )
        self.done["sequences"] += sequences
        self.done["tokens"] += table.n_tokens
        self.done["rows"] += int(table.stored.sum())
        if last and not self.done["rows"]:
            raise SaekitError("nothing to store: every token of a sequence is special; raise --context")
        state = {
            "documents": self.number + K,
            # a document with a token has bytes, unless it came as ids
            "bytes": int(bytes_K[K - 1]) or None,
            "empty": self.empty if last and not self.full else int(empty_K[K - 1]),
            **self.done,
            "inside": end - int(first_K[K - 1]),
            "crc32": int(crc_K[K - 1]),
            "last": last,
            "short": last and self.tokens is not None and not self.full,
        }
        self.texts, self.documents = [text_M[size:]], [documents[:, K - 1 :]]
        self.number, self.begin = self.number + K - 1, end
        self.waiting -= sequences
        return Part(table, state)

    def _starts(self, first_K: np.ndarray, length_K: np.ndarray) -> np.ndarray:
        """Where the sequences that wait start in the stream."""
        room = self.packing.room
        if self.packing.mode != "separate":
            return np.arange(self.begin, self.end, room)
        pieces_K = self.packing.pieces(length_K)
        piece_S = np.arange(pieces_K.sum()) - np.repeat(np.cumsum(pieces_K) - pieces_K, pieces_K)
        start_S = np.repeat(first_K, pieces_K) + piece_S * room
        return start_S[start_S >= self.begin]

    def _table(
        self, text_M: np.ndarray, start_S: np.ndarray, first_K: np.ndarray, length_K: np.ndarray, number: int
    ) -> TokenTable:
        """The text in sequences that start at `start_S`; document k starts at first_K[k], which may lie in front of it."""
        packing, bos = self.packing, int(self.packing.bos is not None)
        seq_start = np.zeros(len(start_S) + 1, np.int64)
        np.cumsum(np.diff(start_S, append=len(text_M)) + packing.frame, out=seq_start[1:])
        token, text_N = np.empty(seq_start[-1], self.dtype), np.ones(seq_start[-1], bool)
        for id, place_S in ((packing.bos, seq_start[:-1]), (packing.closing, seq_start[1:] - 1)):
            if id is not None:
                token[place_S], text_N[place_S] = id, False
        token[text_N] = text_M
        # a run starts with each document, and with each sequence that starts inside one
        document_S = np.searchsorted(first_K, start_S, side="right") - 1
        inside_S = start_S < (first_K + length_K)[document_S]
        run_R = np.union1d(first_K[first_K >= 0], start_S[inside_S])
        document_R = np.searchsorted(first_K, run_R, side="right") - 1
        sequence_R = np.searchsorted(start_S, run_R, side="right") - 1
        return TokenTable(
            token=token,
            stored=~self.dropped_V[token],
            seq_start=seq_start,
            run_start=run_R + sequence_R * packing.frame + bos,
            run_doc=document_R + number,
            run_position=run_R - first_K[document_R],
        )


# Tokens


class _Batch(NamedTuple):
    ids_M: np.ndarray
    """int64, the documents' ids one behind the other."""
    length_K: np.ndarray
    """int64, tokens of each document."""
    bytes_K: np.ndarray
    """int64, UTF-8 bytes; 0 for token ids."""
    crc_K: np.ndarray
    """int64, crc32 of all documents up to this one."""
    where: list[str]
    """Places for errors."""


def _tokenised(documents: Iterable[Document], tokenizer, crc: int) -> Iterator[_Batch]:
    """No special tokens added, nothing cut, no warning of length."""
    encode = None if tokenizer is None else _encoder(tokenizer)
    for batch in _batches(documents):
        contents = [_content(document) for document in batch]
        if batch[0].ids is None:
            assert encode is not None, "text needs a tokenizer"
            # white space alone is no text
            ids = encode([document.text if document.text.strip() else "" for document in batch])
            length_K = np.array([len(i) for i in ids])
            ids_M = np.fromiter(itertools.chain.from_iterable(ids), np.int64, length_K.sum())
        else:
            ids = [cast(np.ndarray, document.ids) for document in batch]
            length_K, ids_M = np.array([len(i) for i in ids]), np.concatenate(ids)
        crcs = list(itertools.accumulate(contents, lambda crc, content: zlib.crc32(content, crc), initial=crc))[1:]
        crc = crcs[-1]
        sizes = [len(content) if document.ids is None else 0 for document, content in zip(batch, contents)]
        yield _Batch(ids_M, length_K, np.array(sizes), np.array(crcs), [document.where for document in batch])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text if document.ids is None else document.ids)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _content(document: Document) -> bytes:
    return document.text.encode() if document.ids is None else document.ids.tobytes()


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


def _changed(source: str) -> str:
    return f"{source} is not as it was when it was first read; restore it, or start over in another folder"
