"""Finding features: by text, by a regular expression over the vocabulary, by a direction in the model.

    idx.search("quote"); idx.search(regex=r"\\d+"); idx.search(like=123); idx.search(vector=v_D)

D width · F features.
"""

import json
import math
import os
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from saekit.errors import SaekitError

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

REGEX_SECONDS = 2.0
"""Given to a regular expression on the whole vocabulary."""


class Hit(NamedTuple):
    feature: int
    where: str
    """`label`, `token`, `text`, `regex` or `decoder`."""
    text: str
    """What was found."""
    score: float
    """F1 of "fires iff found here", cosine for `decoder`, 1 for a label."""
    precision: float
    recall: float


def features_at(index: "FeatureIndex", positions: np.ndarray, limit: int, where: str, text: str) -> list[Hit]:
    """Features that fire on any of the positions, by F1; `where` and `text` go into the hits."""
    positions = positions.astype(np.int64)
    positions = positions[index.file("tokens")["encoded"][positions]]
    if len(positions) == 0:
        return []
    counts = index.counts_at(positions)
    f1 = 2 * counts / np.maximum(1, index.column("n") + len(positions))
    order = np.lexsort((np.arange(len(index)), -f1))[:limit]
    n = index.column("n")
    return [
        Hit(int(j), where, text, float(f1[j]), float(counts[j] / n[j]), float(counts[j] / len(positions)))
        for j in order
        if counts[j]
    ]


def by_text(index: "FeatureIndex", text: str, limit: int) -> list[Hit]:
    """Features whose label or notes hold the text, then those that fire on it as a token, then where the corpus holds it."""
    hits = [Hit(e.feature, "label", e.label or e.notes, 1.0, math.nan, math.nan) for e in index.labels.search(text)]
    hits = [h for h in hits if h.feature < len(index)]
    needle = text.encode("utf-8")
    if needle:
        stripped = needle.strip() or needle
        same = [i for i, piece in enumerate(index.vocabulary) if piece == needle or piece.strip() == stripped]
        hits += index.features_on(same, limit, where="token", text=text)
        hits += features_at(index, index.find_text(text), limit, "text", text)
    seen, unique = set(), []
    for hit in hits:
        if hit.feature not in seen:
            seen.add(hit.feature)
            unique.append(hit)
    return unique[:limit]


def by_direction(index: "FeatureIndex", vector: np.ndarray | None, like: int | None, limit: int) -> list[Hit]:
    """Features by the size of their decoder row's cosine with `vector` (D), or with the row of feature `like` but itself."""
    W_dec_FD = index.decoder()
    if like is not None:
        vector = W_dec_FD[index.feature(like).number]
    v_D = np.asarray(vector, np.float32).reshape(-1)
    if len(v_D) != W_dec_FD.shape[1]:
        raise SaekitError(f"the vector has {len(v_D)} entries, decoder rows have {W_dec_FD.shape[1]}")
    cos_F = (W_dec_FD @ v_D) / np.maximum(1e-30, index.column("dec_norm") * np.linalg.norm(v_D))
    if like is not None:
        cos_F[like] = 0
    order = np.lexsort((np.arange(len(index)), -np.abs(cos_F)))[:limit]
    name = f"like {like:,}" if like is not None else "vector"
    return [Hit(int(j), "decoder", name, float(cos_F[j]), math.nan, math.nan) for j in order]


def find_text(index: "FeatureIndex", text: str, limit: int = 200_000) -> np.ndarray:
    """Positions of the token in which each occurrence of `text` ends (int64), inside one sequence, at most `limit`."""
    needle = text.encode("utf-8")
    blob, offsets = index.corpus
    ends, at = [], blob.find(needle) if needle else -1
    while at >= 0 and len(ends) < limit:
        ends.append(at + len(needle) - 1)
        at = blob.find(needle, at + 1)
    ends = np.array(ends, np.int64)
    last = np.searchsorted(offsets, ends, side="right") - 1
    first = np.searchsorted(offsets, ends - len(needle) + 1, side="right") - 1
    starts = index.file("tokens")["seq_start"]
    inside = np.searchsorted(starts, first, side="right") == np.searchsorted(starts, last, side="right")
    return np.unique(last[inside])


def matching(regex: str, texts: list[str]) -> list[int]:
    """Indices of the texts that match (`re.search`), in a child process that gets two seconds.

    Raises SaekitError for an expression that is not valid or takes longer.
    """
    program = (
        "import json,re,sys\n"
        "q=json.load(sys.stdin)\n"
        "try: p=re.compile(q['regex'])\n"
        "except re.error as e: json.dump({'error':str(e)},sys.stdout)\n"
        "else: json.dump({'ids':[i for i,t in enumerate(q['texts']) if p.search(t)]},sys.stdout)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program],
            input=json.dumps({"regex": regex, "texts": texts}),
            capture_output=True,
            text=True,
            timeout=REGEX_SECONDS,
            env={k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT")},
        )
    except subprocess.TimeoutExpired:
        raise SaekitError(f"/{regex}/ takes longer than {REGEX_SECONDS:.0f} s on the vocabulary; simplify it") from None
    answer = json.loads(done.stdout or '{"error": "it could not be run"}')
    if "error" in answer:
        raise SaekitError(f"/{regex}/ is not a regular expression: {answer['error']}")
    return answer["ids"]
