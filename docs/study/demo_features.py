"""Which features of the demo a programmer recognises: the share of each feature's top firings that fit a description.

    python docs/study/demo_features.py demo/saes/topk          prints the table of the README

1. Rebuild each document from its tokens, with the byte offset of each token.
2. Label bytes by Python's own `tokenize`: comments, docstrings, names after `def`, attributes of `self`, …
3. For each feature, the share of its 50 strongest firings (repeats of a context left out, as in the index) whose token fits
   each description, beside the share of all tokens that fit it. A description gets the feature that fits best; among equals
   the one whose 50 firings are on the most different tokens, since a feature of one token needs no context.
"""

import io
import keyword
import re
import sys
import tokenize
from collections import defaultdict

import numpy as np

import saekit as sk
from saekit.provenance import find_store

TOP = 50


def spans(text: str):
    """(start, end, description) of character ranges of a Python source that fit one."""
    starts = np.cumsum([0, *(len(line) for line in text.splitlines(keepends=True))])

    def at(place):
        return int(starts[place[0] - 1]) + place[1]

    tokens = []
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            if t.type not in (tokenize.NL, tokenize.ENCODING):
                tokens.append(t)  # noqa: PERF401  (what was read before an error stays)
    except (tokenize.TokenError, SyntaxError, IndentationError):
        pass  # a document that was cut: what came before counts
    opened, def_depth, previous, before = [], None, None, None
    line_first = True
    in_import = in_decorator = False
    for i, t in enumerate(tokens):
        start, end = at(t.start), at(t.end)
        following = tokens[i + 1] if i + 1 < len(tokens) else None
        if t.type == tokenize.COMMENT:
            yield start, end, "inside a comment"
            continue
        if t.type == tokenize.STRING:
            alone = line_first and following is not None and following.type == tokenize.NEWLINE
            yield start, end, "inside a docstring" if alone and not opened else "inside a string literal"
        if t.type == tokenize.NUMBER:
            yield start, end, "a hexadecimal number" if t.string[:2].lower() == "0x" else "a decimal number"
        if t.type == tokenize.OP:
            if t.string in "([{":
                opened.append(t.string)
                yield start, end, "an opening bracket"
            elif t.string in ")]}":
                opened = opened[:-1]
                yield start, end, "a closing bracket"
                if def_depth is not None and len(opened) < def_depth:
                    def_depth = None
            elif t.string == ":" and following is not None and following.type == tokenize.NEWLINE:
                yield start, end, "the colon that opens a block"
            elif t.string == "." and previous is not None and previous.string == "self":
                yield start, end, "the dot after `self`"
            elif t.string in ("==", "!=", "<", ">", "<=", ">="):
                yield start, end, "a comparison operator"
            elif t.string == "=" and not opened:
                yield start, end, "the `=` of an assignment"
            elif t.string == "=" and opened:
                yield start, end, "the `=` of a keyword argument or default"
        if line_first and t.type not in (tokenize.INDENT, tokenize.DEDENT):
            in_import = t.string in ("import", "from")
            in_decorator = t.string == "@"
        if t.type == tokenize.NAME:
            last = previous.string if previous is not None else ""
            if in_import:
                yield start, end, "in an import statement"
            if in_decorator:
                yield start, end, "in a decorator"
            if last == "def":
                yield start, end, "the name of a function being defined"
                def_depth = len(opened) + 1
            elif last == "class":
                yield start, end, "the name of a class being defined"
            elif last == "." and before is not None and before.string == "self":
                yield start, end, "an attribute of `self`"
            elif last == "." and not in_import:
                yield start, end, "an attribute of something else than `self`"
            elif def_depth is not None and len(opened) >= def_depth and t.string != "self":
                yield start, end, "a parameter in a function's signature"
            if opened and following is not None and following.string == "=" and last in ("(", ","):
                yield start, end, "the name of a keyword argument or default"
            if re.fullmatch(r"\w*(Error|Exception|Warning)", t.string):
                yield start, end, "the name of an exception"
            if re.fullmatch(r"__\w+__", t.string):
                yield start, end, "a double-underscore name"
            if re.fullmatch(r"[A-Z][A-Z0-9_]{2,}", t.string):
                yield start, end, "a constant in capitals"
            if t.string in ("None", "True", "False"):
                yield start, end, "`None`, `True` or `False`"
            if t.string in ("and", "or", "not", "in", "is"):
                yield start, end, "a word operator (`and`, `or`, `not`, `in`, `is`)"
            if t.string in (
                "isinstance",
                "len",
                "range",
                "getattr",
                "hasattr",
                "str",
                "int",
                "list",
                "dict",
                "type",
                "print",
                "repr",
                "bytes",
                "open",
                "sorted",
                "enumerate",
            ):
                yield start, end, "a built-in function or type"
            if keyword.iskeyword(t.string):
                yield start, end, f"the keyword `{t.string}`"
            if last in (
                "return",
                "raise",
                "import",
                "not",
                "in",
                "for",
                "if",
                "except",
                "is",
                "lambda",
                "yield",
                "del",
            ):
                yield start, end, f"the word after `{last}`"
        if t.type in (tokenize.NEWLINE,):
            line_first = True
            yield start, end, "the end of a statement"
        elif t.type not in (tokenize.INDENT, tokenize.DEDENT):
            line_first = False
        if t.type not in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            before, previous = previous, t
    for match in re.finditer(r"https?://\S+", text):
        yield match.start(), match.end(), "a web address"
    for match in re.finditer(r"(RFC|PEP|issue)[ #]*\d+", text):
        yield match.start(), match.end(), "an RFC, PEP or issue number"
    for match in re.finditer(r"\n[ \t]*\n[ \t]*(?=\S)", text):
        yield match.start(), match.end(), "a blank line"
    for match in re.finditer(r"\d+\.\d+(\.\d+)*", text):
        yield match.start(), match.end(), "digits of a version or decimal fraction"
    for match in re.finditer(r"\n {12,}(?=\S)", text):
        yield match.start(), match.end(), "the indentation of a line nested three levels or more"
    for match in re.finditer(r"\n {4}(?=\S)", text):
        yield match.start(), match.end(), "the indentation of a line nested one level"


def labels(index) -> tuple[list[str], np.ndarray]:
    """(descriptions, table (descriptions, N) of which token fits which): a token fits if its first visible byte does."""
    pieces, owner, start = defaultdict(list), [], []
    length = defaultdict(int)
    vocab = [
        b"" if special else piece
        for piece, special in zip(
            index.pieces(range(index.manifest["V"])), index.file("vocab")["special"], strict=False
        )
    ]
    stored = index.file("tokens")
    # a run goes on to the next one; what stands before the first is a BOS of no document
    ends = np.append(stored["run_start"], index.n_tokens)
    docs = np.repeat(np.append(-1, stored["run_doc"]), np.diff(np.append(0, ends))).tolist()
    for doc, token in zip(docs, stored["token"].tolist(), strict=True):
        raw = vocab[token]
        pieces[doc].append(raw)
        owner.append(doc)
        start.append(length[doc] + (len(raw) - len(raw.lstrip(b" ")) if raw.strip() else 0))
        length[doc] += len(raw)
    owner, start = np.array(owner), np.array(start)
    table: dict[str, np.ndarray] = {}
    for doc, parts in pieces.items():
        raw = b"".join(parts)
        text = raw.decode("utf-8", "replace")
        plain = len(text) == len(raw)
        offsets = None if plain else np.cumsum([0, *(len(c.encode("utf-8", "replace")) for c in text)])
        where = np.flatnonzero(owner == doc)
        for first, last, name in spans(text):
            lo, hi = (first, last) if plain else (offsets[first], offsets[last])
            a, b = np.searchsorted(start[where], [lo, hi])
            table.setdefault(name, np.zeros(len(owner), bool))[where[a:b]] = True
    names = sorted(table)
    return names, np.stack([table[n] for n in names])


def main():
    sae = sk.SAE.load(sys.argv[1])
    find_store(sae, None)
    index = sk.open_index(sys.argv[1])
    names, fits = labels(index)
    base, token = fits.mean(1), index.file("tokens")["token"]
    found = []
    for f in range(len(index)):
        feature = index.feature(f)
        if feature.n < TOP:
            continue
        tops = np.array([e.position for e in feature.top(TOP)])
        if len(tops) < TOP:
            continue
        share = fits[:, tops].mean(1)
        covered = fits[:, np.asarray(feature.positions)].mean(1)
        kinds = len(np.unique(token[tops]))
        found += [(names[d], share[d], kinds, covered[d], base[d], f, feature.n) for d in np.flatnonzero(share >= 0.8)]
    best = {}
    for row in sorted(found, key=lambda r: (-r[1], -r[2], -r[3])):
        best.setdefault(row[0], row)
    print(
        "| feature | what it is | top 50 that fit | different tokens among them | all firings that fit | all tokens that fit |\n"
        + "|---" * 6
        + "|"
    )
    for name, share, kinds, covered, rate, f, n in sorted(best.values(), key=lambda r: (-r[1], r[4])):
        print(f"| {f} | {name} | {share:.0%} | {kinds} | {covered:.0%} of {n:,} | {rate:.1%} |")


if __name__ == "__main__":
    main()
