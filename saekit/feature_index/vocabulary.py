"""The bytes behind each token id, for tokenizers of every kind.

    vocab = vocab_bytes(tokenizer, V)
    vocab.blob[vocab.start[i] : vocab.start[i + 1]]     # raw bytes of token id i

V token ids.
"""

import json
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class VocabBytes:
    """Raw bytes of each token id: those of id i are blob[start[i] : start[i + 1]]; none where there is no such token."""

    start: np.ndarray
    """(V + 1) int64."""
    blob: np.ndarray
    """uint8."""
    special: np.ndarray
    """(V) bool."""

    @classmethod
    def of(cls, pieces: list[bytes], special: np.ndarray | None = None) -> "VocabBytes":
        start = np.concatenate([[0], np.cumsum([len(p) for p in pieces], dtype=np.int64)]).astype(np.int64)
        blob = np.frombuffer(b"".join(pieces), np.uint8)
        return cls(start, blob, np.zeros(len(pieces), bool) if special is None else special)

    def __len__(self) -> int:
        return len(self.special)

    def padded(self, V: int) -> "VocabBytes":
        """The same with at least V ids; added ones have no bytes."""
        more = max(0, V - len(self))
        return VocabBytes(
            np.concatenate([self.start, np.full(more, self.start[-1])]),
            self.blob,
            np.concatenate([self.special, np.zeros(more, bool)]),
        )


def vocab_bytes(tokenizer, V: int = 0) -> VocabBytes:
    """Raw bytes of every token of a Hugging Face tokenizer, at least V ids.

    Byte-level vocabularies are mapped back to bytes; in vocabularies of the sentencepiece kind `<0x0A>` is that byte and
    `▁` is a space; `##` of WordPiece is dropped. Added tokens stand for their own text.
    """
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: str(getattr(t, "content", t)) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    special_ids = set(tokenizer.all_special_ids)
    kind = _vocabulary_kind(tokenizer, by_id, added)
    V = max(V, max([*by_id, *added, -1]) + 1)
    pieces, special = [], np.zeros(V, bool)
    for i in range(V):
        special[i] = i in special_ids
        if i in added:
            pieces.append(added[i].encode("utf-8"))
        elif i in by_id:
            pieces.append(_piece(by_id[i], kind))
        else:
            pieces.append(b"")
    return VocabBytes.of(pieces, special)


def _vocabulary_kind(tokenizer, by_id: dict[int, str], added: dict[int, str]) -> str:
    """`byte-level`, `sentencepiece`, `wordpiece` or `text`: read from the tokenizer's decoder, else from the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        decoder = json.dumps([state.get("decoder"), state.get("pre_tokenizer")])
        for mark, kind in (("ByteLevel", "byte-level"), ("WordPiece", "wordpiece")):
            if f'"{mark}"' in decoder:
                return kind
        if any(f'"{mark}"' in decoder for mark in ("Metaspace", "ByteFallback")) or "\\u2581" in decoder:
            return "sentencepiece"
    plain = [t for i, t in by_id.items() if i not in added]
    if any("▁" in t for t in plain) or "<0x0A>" in plain:
        return "sentencepiece"
    if plain and any("Ġ" in t for t in plain) and all(c in _BYTE_OF for t in plain for c in t):
        return "byte-level"
    return "text"


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}


_BYTE_OF = _byte_alphabet()


def _piece(token: str, kind: str) -> bytes:
    if kind == "byte-level":
        # a character outside the alphabet can only come from a token that was added by hand
        return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode("utf-8") for c in token)
    if kind == "sentencepiece":
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode("utf-8")
    if kind == "wordpiece":
        return (token[2:] if token.startswith("##") else token).encode("utf-8")
    return token.encode("utf-8")
