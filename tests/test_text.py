"""From sources to documents, and from documents to a table of tokens; expected tables are worked out by hand."""

import os

import numpy as np
import pytest

from saekit.errors import SaekitError
from saekit.text import Document, Packing, documents, pack, plan_packing, stdlib_documents


class Letters:
    """A slow tokenizer: a = 10, b = 11, …; BOS 0, EOS 1."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, None

    def encode(self, text, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return [ord(c) - ord("a") + 10 for c in text.replace(" ", "")]


def packed(texts, tokens=None, vocab_size=40, **packing):
    return pack(
        [Document(f"{i}", t) for i, t in enumerate(texts)],
        Letters(),
        Packing(**packing),
        vocab_size=vocab_size,
        tokens=tokens,
    )


def table_of(texts, **options):
    t = packed(texts, **options).table
    return {name: getattr(t, name).tolist() for name in t.__dataclass_fields__}


# Packing


def test_join_by_hand():
    """Stream a b c | d e f g h with 1 between, in sequences of BOS and three:
    [0 a b c] [0 1 d e] [0 f g h]; the separator belongs to no document and stands in no run of the second sequence."""
    assert table_of(["abc", "defgh"], context=4, bos=0, separator=1, dropped=(0, 1)) == {
        "token": [0, 10, 11, 12, 0, 1, 13, 14, 0, 15, 16, 17],
        "stored": [False, True, True, True, False, False, True, True, False, True, True, True],
        "seq_start": [0, 4, 8, 12],
        "run_start": [1, 6, 9],
        "run_doc": [0, 1, 1],
        "run_position": [0, 0, 2],
    }


def test_positions_follow_for_every_token():
    t = packed(["abc", "defgh"], context=4, bos=0, separator=1, dropped=(0, 1)).table
    rows = np.flatnonzero(t.stored)
    assert t.doc_of(rows).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert t.position_in_doc(rows).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert t.position_in_seq(rows).tolist() == [1, 2, 3, 2, 3, 1, 2, 3]


def test_without_bos_and_separator_nothing_is_dropped():
    """Field case 13: the first token of each document has a row, and all tokens have."""
    assert table_of(["abc", "de"], context=4) == {
        "token": [10, 11, 12, 13, 14],
        "stored": [True] * 5,
        "seq_start": [0, 4, 5],
        # d begins in the first sequence, e starts the second inside document 1
        "run_start": [0, 3, 4],
        "run_doc": [0, 1, 1],
        "run_position": [0, 0, 1],
    }


def test_a_last_sequence_may_be_short_and_nothing_is_lost():
    t = packed(["abcdefg"], context=4, bos=0, dropped=(0,)).table
    assert t.token.tolist() == [0, 10, 11, 12, 0, 13, 14, 15, 0, 16]
    assert t.seq_start.tolist() == [0, 4, 8, 10]


def test_documents_of_one_token():
    t = packed(["a", "b", "c"], context=3, separator=1, dropped=(1,)).table
    # [a 1 b] [1 c]
    assert t.token.tolist() == [10, 1, 11, 1, 12]
    assert t.run_start.tolist() == [0, 2, 4] and t.run_doc.tolist() == [0, 1, 2]


def test_special_ids_have_no_row_wherever_they_stand():
    """A tokenizer may give BOS in mid-sequence; `}` = 38 is dropped by wish."""
    t = packed(["a}b"], context=8, bos=0, dropped=(0, 38)).table
    assert t.token.tolist() == [0, 10, 38, 11] and t.stored.tolist() == [False, True, False, True]


def test_token_dtype_follows_the_embedding():
    assert packed(["ab"], context=8, vocab_size=65_536).table.token.dtype == np.uint16
    assert packed(["ab"], context=8, vocab_size=65_537).table.token.dtype == np.uint32


@pytest.mark.parametrize("tokens", range(2, 13))
def test_tokens_is_the_number_of_positions(tokens):
    whole = packed(["abc", "defgh"], context=4, bos=0, separator=1, dropped=(0, 1)).table.token.tolist()
    t = packed(["abc", "defgh"], tokens=tokens, context=4, bos=0, separator=1, dropped=(0, 1)).table
    # a sequence of BOS alone would say nothing: 5 and 9 positions become 4 and 8
    assert t.token.tolist() == whole[: tokens - (tokens % 4 == 1)]


def test_documents_and_bytes_are_those_that_were_used():
    all_of_it = packed(["abc", "", "  \n", "de"], context=4)
    assert (all_of_it.documents, all_of_it.bytes, all_of_it.empty) == (2, 5, 2)
    first = packed(["abc", "de"], tokens=3, context=4)
    assert (first.documents, first.bytes) == (1, 3)


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "the text holds no text (0 non-empty documents); give another source"),
        (["", " \n"], {}, "the text holds no text (0 non-empty documents); give another source"),
        # BOS and seven letters would be two sequences of four and one of two: ten positions
        (
            ["abcdefg"],
            {"tokens": 5000, "bos": 0},
            "text ended at 10 of 5,000 tokens; pass --tokens 10 or less, or give more text",
        ),
        (["abc"], {"tokens": 1, "bos": 0}, "--tokens 1 leaves no room for text; pass more"),
        (["aaa"], {"dropped": (10,)}, "nothing to store: every token of a sequence is special; raise --context"),
        (["a~"], {}, "the text: the tokenizer gives id 39; the model embeds 0 to 38"),
    ],
)
def test_refusals(texts, options, message):
    with pytest.raises(SaekitError) as error:
        packed(texts, vocab_size=39, context=4, **options)
    assert str(error.value) == message


def test_which_specials():
    def plan(tokenizer=Letters, **options):
        return plan_packing(tokenizer, context=8, vocab_size=40, name="./ckpt", **options)

    assert plan() == Packing(context=8, bos=0, separator=1, dropped=(0, 1))
    assert plan(bos="never") == Packing(context=8, bos=None, separator=1, dropped=(0, 1))
    assert plan(keep_special=True) == Packing(context=8, bos=0, separator=1, dropped=())
    assert plan(keep_special=True, drop_ids=(7,)) == Packing(context=8, bos=0, separator=1, dropped=(7,))
    assert plan(drop_ids=(7, 1)).dropped == (0, 1, 7)

    class NoBos(Letters):
        bos_token_id = None

    assert plan(NoBos) == Packing(context=8, bos=None, separator=1, dropped=(1,))
    with pytest.raises(SaekitError, match="the tokenizer of ./ckpt defines no BOS; use --bos auto"):
        plan(NoBos, bos="always")
    with pytest.raises(SaekitError, match="--drop-ids 40: the model embeds 0 to 39"):
        plan(drop_ids=(40,))


# A fast tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_long_documents_are_neither_cut_nor_warned_about(tokenizer, caplog, capfd, recwarn):
    """Field case 14: ten times the tokenizer's maximal length, and its settings stay as the caller left them."""
    tokenizer.model_max_length = 50
    tokenizer.backend_tokenizer.enable_truncation(20)
    text = "x y " * 500
    t = pack([Document("long", text)], tokenizer, Packing(context=16), vocab_size=300).table
    assert tokenizer.decode(t.token.tolist()) == text
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 20
    tokenizer.backend_tokenizer.no_truncation()
    assert not caplog.records and not recwarn.list and "".join(capfd.readouterr()) == ""


def test_batches_of_documents_change_nothing(tokenizer):
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(600)]
    t = pack([Document("", x) for x in texts], tokenizer, Packing(context=32, separator=1), vocab_size=300).table
    joined = [
        id for i, x in enumerate(texts) for id in ([1] if i else []) + tokenizer(x, add_special_tokens=False).input_ids
    ]
    assert t.token.tolist() == joined
    assert len(np.unique(t.run_doc)) == 600


# Sources


def read(*sources, **options):
    return [(d.name, d.text) for d in documents(map(str, sources), **options)]


def test_marks_and_line_ends(tmp_path):
    """Field case 14: a byte-order mark at the start of a file is none of its text; CR LF inside a document is."""
    mark = "\ufeff".encode()
    (tmp_path / "a.txt").write_bytes(mark + "one\r\ntwo é".encode())
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "first"}\r\n\r\n{"text": "x\\r\\ny", "id": 2}')
    assert read(tmp_path / "a.txt") == [("a.txt", "one\r\ntwo é")]
    assert read(tmp_path / "b.jsonl") == [("b.jsonl:1", "first"), ("b.jsonl:3", "x\r\ny")]


def test_json_lines_break_at_line_feeds_alone(tmp_path):
    # U+2028 is a line separator to Python's splitlines and an ordinary character of a JSON string
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == [("a.jsonl:1", "a\u2028b\u0085c")]


def test_folders_are_walked_in_byte_order_of_the_path(tmp_path):
    for name in ("b/x.py", "B.txt", "a.md", "b.txt", "b/a.jsonl", "é.txt", "skip.pdf", "b/LICENSE"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "j"}' if name.endswith("jsonl") else name, encoding="utf-8")
    # "b.txt" before "b/…": 0x2E comes before 0x2F
    names = ["B.txt", "a.md", "b.txt", "b/a.jsonl:1", "b/x.py", "é.txt"]
    assert [name for name, _ in read(tmp_path)] == names


def test_links_out_of_a_folder_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").write_text("secret")
    (tmp_path / "in" / "a.txt").write_text("a")
    os.symlink(tmp_path / "in" / "a.txt", tmp_path / "in" / "b.txt")
    assert read(tmp_path / "in") == [("a.txt", "a"), ("b.txt", "a")]
    os.symlink(tmp_path / "out.txt", tmp_path / "in" / "c.txt")
    with pytest.raises(SaekitError, match=r"in/c.txt is a link out of .*/in; name its target as a source of its own"):
        read(tmp_path / "in")


def test_globs(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [n for n, _ in read(tmp_path / "*.txt")] == ["a.txt", "b.txt"]
    assert [n for n, _ in read(tmp_path / "**" / "*.txt")] == ["a.txt", "b.txt", "e.txt"]
    assert [n for n, _ in read(tmp_path / "[ab].txt", tmp_path / "c.md")] == ["a.txt", "b.txt", "c.md"]


def test_several_sources_keep_their_order(tmp_path):
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    assert [t for _, t in read(tmp_path / "z.txt", tmp_path / "a.jsonl", text_field="body")] == ["z", "a"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.txt", None, "no such file: {}"),
        ("gone*.txt", None, "no such file: {}"),
        ("data.docx", b"", "cannot read {}: known are .txt .md .py .jsonl, folders and globs of them, and stdlib"),
        ("notes.txt", b"abc\n\xff", "{}: byte 4 is not UTF-8; re-encode it"),
        ("p.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "{} line 2: byte 24 is not UTF-8; re-encode it"),
        (
            "p.jsonl",
            b'{"text": "a"}\n\n{"id": 1, "body": "b", "lang": "x"}',
            '{} line 3: no field "text"; fields are id, body, lang; pass --text-field body',
        ),
        ("p.jsonl", b'{"id": 1}', '{} line 1: no field "text"; fields are id'),
        ("p.jsonl", b'{"text": 7}', '{} line 1: field "text" holds a number, not text'),
        ("p.jsonl", b"[1]", '{} line 1: a JSON list, not an object with a field "text"'),
        (
            "p.jsonl",
            b'{"text": ',
            "{} line 1: not valid JSON (Expecting value: line 1 column 10 (char 9)); mend the line or take it out",
        ),
        ("p.jsonl", b'{"text": "\\ud800x"}', "{} line 1: character 0 is half of a surrogate pair; mend the line"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SaekitError) as error:
        read(path)
    text = str(error.value)
    assert text == message.replace("{}", str(path), 1) and "\n" not in text


def test_a_source_is_missed_before_any_is_read(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(SaekitError, match="no such file"):
        documents([str(tmp_path / "bad.txt"), "gone.txt"])


def test_the_standard_library():
    names = [d.name for d, _ in zip(stdlib_documents(), range(40))]
    assert names == sorted(names, key=str.encode) and "abc.py" in names
    assert not any("/test/" in f"/{name}" for name in names)
    assert [d.name for d, _ in zip(documents(["stdlib"]), range(40))] == names


def test_held_out_is_a_function_of_the_name():
    """printf NAME | sha256sum, as a decimal number: the last digit is 0 for ast.py, 4 for abc.py, 5 for enum.py."""
    assert Document("ast.py", "").held_out
    assert not Document("abc.py", "").held_out and not Document("enum.py", "").held_out
