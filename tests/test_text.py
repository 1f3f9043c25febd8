"""From sources to documents."""

import io
import json
import os
import platform
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from saekit import text as text_module
from saekit.config import ReadingOptions
from saekit.errors import SaekitError
from saekit.text import Document, Text, stdlib_documents

MARK = "\ufeff".encode()


def read(*sources, **options):
    return [(d.name, d.text) for d in Text([str(s) for s in sources], ReadingOptions(**options)).documents()]


def read_ids(*sources, **options):
    text = Text([str(s) for s in sources], ReadingOptions(ids_field="input_ids", **options))
    return [(d.name, d.ids.tolist(), d.where) for d in text.documents()]


def refused(source, **options) -> str:
    with pytest.raises(SaekitError) as error:
        read(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Files


def test_marks_and_line_ends(tmp_path):
    """Field case 14: a byte-order mark at the start of a file is none of its text; CR LF inside a document is."""
    (tmp_path / "a.txt").write_bytes(MARK + "one\r\ntwo é".encode())
    (tmp_path / "b.jsonl").write_bytes(MARK + b'{"text": "first"}\r\n\r\n{"text": "x\\r\\ny", "id": 2}')
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


def test_texts_cut_by_line(tmp_path):
    """No line end belongs to a document, LF or CR LF; a line without one is a line; an empty line is an empty document."""
    (tmp_path / "a.txt").write_bytes(MARK + b"one\r\n\ntwo \r x\nthree")
    lines = [("a.txt:1", "one"), ("a.txt:2", ""), ("a.txt:3", "two \r x"), ("a.txt:4", "three")]
    assert read(tmp_path / "a.txt", split_documents="line") == lines
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo \r x\nthree\n")
    assert read(tmp_path / "a.txt", split_documents="line") == lines


def test_texts_cut_by_blank_lines(tmp_path):
    """Line ends inside a document are text; a line of white space is blank; a document's number is its first line's."""
    (tmp_path / "a.txt").write_bytes(MARK + b"\n \r\none\r\n  two\n\t\n\nthree\r\n")
    assert read(tmp_path / "a.txt", split_documents="blank-line") == [("a.txt:3", "one\r\n  two"), ("a.txt:7", "three")]


def test_only_txt_is_cut(tmp_path):
    for name in ("a.txt", "b.md", "c.py"):
        (tmp_path / name).write_text("x\ny\n")
    names = ["a.txt:1", "a.txt:2", "b.md", "c.py"]
    assert [name for name, _ in read(tmp_path, split_documents="line")] == names
    assert read(tmp_path / "a.txt", split_documents="none") == [("a.txt", "x\ny\n")]


def test_encoding_errors(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + b"ab\ncd\xe9\n")
    # the mark has three bytes, then a b LF c d
    for cut in (None, "line", "blank-line"):
        assert refused(tmp_path / "a.txt", split_documents=cut) == (
            f"{tmp_path}/a.txt: byte 8 is not UTF-8; re-encode it or pass --encoding-errors replace"
        )
    assert read(tmp_path / "a.txt", encoding_errors="replace") == [("a.txt", "ab\ncd\ufffd\n")]
    lines = [("a.txt:1", "ab"), ("a.txt:2", "cd\ufffd")]
    assert read(tmp_path / "a.txt", encoding_errors="replace", split_documents="line") == lines
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xe9"}')
    assert read(tmp_path / "b.jsonl", encoding_errors="replace") == [("b.jsonl:1", "\ufffd")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("gone.txt", None, "no such file: {}"),
        ("gone*.txt", None, "no such file: {}"),
        (
            "data.docx",
            b"",
            "cannot read {}: known are .txt .md .py .jsonl .jsonl.zst .parquet, folders and globs of them, hf:NAME, - and "
            "stdlib",
        ),
        ("notes.txt", b"abc\n\xff", "{}: byte 4 is not UTF-8; re-encode it or pass --encoding-errors replace"),
        (
            "p.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            "{} line 2: byte 24 is not UTF-8; re-encode it or pass --encoding-errors replace",
        ),
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
            "{} line 1: not valid JSON (Expecting value: line 1 column 10 (char 9)); mend the line or pass "
            "--skip-bad-lines",
        ),
        ("p.jsonl", b'{"text": "\\ud800x"}', "{} line 1: character 0 is half of a surrogate pair; mend the line"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refused(path) == message.replace("{}", str(path), 1)


def test_bad_lines_can_be_passed_over(tmp_path):
    lines = [b'{"text": "a"}', b"{", b'{"text": 7}', b'{"body": "x"}', b'{"text": "\xff"}', b"", b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    text = Text([str(tmp_path / "a.jsonl")], ReadingOptions(skip_bad_lines=True))
    # once more: counted from the start again; the blank line is not a bad one
    for _ in range(2):
        assert [(d.name, d.text) for d in text.documents()] == [("a.jsonl:1", "a"), ("a.jsonl:7", "b")]
        assert text.bad_lines == 4


def test_a_source_is_missed_before_any_is_read(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(SaekitError, match="no such file"):
        Text([str(tmp_path / "bad.txt"), "gone.txt"])


def test_a_dangling_link_is_said(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "a.txt")
    assert refused(tmp_path) == f"cannot read {tmp_path}/a.txt: no such file or directory"


def test_what_a_text_says_of_itself(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.jsonl").write_text('{"text": "d"}')
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")
    both = Text([a, b])
    assert (both.bytes, both.revision, both.repeatable, both.name) == (16, None, True, f"{a} {b}")
    assert [d.text for _ in range(2) for d in both.documents()] == ["abc", "d"] * 2
    assert Text(["stdlib"]).revision == platform.python_version()
    assert Text([a, "stdlib"]).revision == [None, platform.python_version()]
    assert Text([a, "-"]).bytes is None and not Text([a, "-"]).repeatable


# Standard input


def feed(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_standard_input(monkeypatch):
    for cut, documents in (
        (None, [("stdin:1", "a"), ("stdin:2", "b"), ("stdin:3", ""), ("stdin:4", "c")]),
        ("blank-line", [("stdin:1", "a\r\nb"), ("stdin:4", "c")]),
        ("none", [("stdin", "a\r\nb\n\nc\n")]),
    ):
        feed(monkeypatch, MARK + b"a\r\nb\n\nc\n")
        assert read("-", split_documents=cut) == documents


def test_standard_input_is_read_once(monkeypatch):
    feed(monkeypatch, b"a\n")
    text = Text(["-"])
    assert [d.text for d in text.documents()] == ["a"]
    with pytest.raises(SaekitError, match="stdin cannot be read again; save the text to a file"):
        next(text.documents())
    feed(monkeypatch, b"\xff")
    assert refused("-") == "stdin: byte 0 is not UTF-8; re-encode it or pass --encoding-errors replace"
    with pytest.raises(SaekitError, match="- is named twice; standard input can be read once"):
        Text(["-", "-"])
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-") == "stdin is closed; pipe the text into the command, or name a file"


# Compressed lines


def compress(path, *pieces: bytes):
    import zstandard

    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(piece) for piece in pieces))


def test_compressed_lines(tmp_path):
    """Several frames one behind the other, a border in mid-line, an empty frame, lines longer than a piece that is read."""
    long = os.urandom(300_000).hex()
    lines = MARK + json.dumps({"text": long}).encode() + b'\r\n\n{"text": "b"}\n{"text": "c"}'
    (tmp_path / "plain.jsonl").write_bytes(lines)
    compress(tmp_path / "a.jsonl.zst", lines[:400_000], b"", lines[400_000:])
    plain = [(name.replace("plain.jsonl", "a.jsonl.zst"), text) for name, text in read(tmp_path / "plain.jsonl")]
    assert read(tmp_path / "a.jsonl.zst") == plain and [n for n, _ in plain] == [
        "a.jsonl.zst:1", "a.jsonl.zst:3", "a.jsonl.zst:4",
    ]  # fmt: skip
    assert Text([str(tmp_path / "a.jsonl.zst")]).bytes is None


def test_compressed_lines_are_streamed(tmp_path):
    """200 MB of text, of which a line is held."""
    import tracemalloc

    import zstandard

    line = json.dumps({"text": "".join(f"{i} " for i in range(4000))}).encode() + b"\n"
    with open(tmp_path / "a.jsonl.zst", "wb") as file, zstandard.ZstdCompressor(level=1).stream_writer(file) as writer:
        for i in range(10_000):
            writer.write(line.replace(b"17", b"%d" % i, 1))
    tracemalloc.start()
    n = sum(1 for _ in Text([str(tmp_path / "a.jsonl.zst")]).documents())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 10_000 and peak < 64 << 20


def test_damaged_compressed_lines(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    compress(path, b'{"text": "a"}\n' * 50_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert refused(path) == f"cannot read {path}: it breaks off inside the compressed data; copy or download it again"
    path.write_bytes(whole + b"no frame")
    assert refused(path).startswith(f"cannot read {path}: zstd")
    compress(path, b'{"text": "a"}\n{"text": ')
    assert refused(path).startswith(f"{path} line 2: not valid JSON")


@pytest.mark.parametrize(
    "name, package", [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("hf:./folder", "datasets")]
)
def test_a_missing_package_is_said_at_once(tmp_path, monkeypatch, name, package):
    """Alone, and in a folder."""
    monkeypatch.setitem(sys.modules, package, None)
    kind = "hf:" if name.startswith("hf:") else name[1:]
    for source in [name] if kind == "hf:" else [str(tmp_path / name), str(tmp_path)]:
        (tmp_path / "a.jsonl.zst" if kind == "hf:" else tmp_path / name).write_bytes(b"")
        with pytest.raises(SaekitError) as error:
            Text([source])
        assert str(error.value) == f"reading {kind} needs {package}: pip install 'saekit[text]'"


# Parquet


def write_parquet(path, columns, **options):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def test_parquet(tmp_path):
    """Rows count from 1, through all row groups and batches of rows."""
    texts = [f"text {i} é" for i in range(700)]
    write_parquet(tmp_path / "a.parquet", {"text": texts, "n": list(range(700))}, row_group_size=300)
    assert read(tmp_path / "a.parquet") == [(f"a.parquet:{i}", t) for i, t in enumerate(texts, 1)]
    assert Text([str(tmp_path / "a.parquet")]).bytes is None
    write_parquet(tmp_path / "empty.parquet", {"text": []})
    assert read(tmp_path / "empty.parquet") == []


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary"])
def test_kinds_of_text_in_parquet(tmp_path, kind):
    import pyarrow

    column = pyarrow.array(["a", "é", ""])
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    write_parquet(tmp_path / "a.parquet", {"body": column})
    assert [t for _, t in read(tmp_path / "a.parquet", text_field="body")] == ["a", "é", ""]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"id": [1], "title": ["t"], "body": ["long"]}, 'no field "text"; fields are id, title, body; pass --text-field body'),
        ({"id": [1]}, 'no field "text"; fields are id'),
        ({"text": [1.5]}, 'field "text" holds double, not text'),
        ({"text": [["a"]]}, 'field "text" holds list<element: string>, not text'),
    ],
)  # fmt: skip
def test_columns_that_are_no_text(tmp_path, columns, message):
    path = tmp_path / "a.parquet"
    write_parquet(path, columns)
    assert refused(path) == f"{path}: {message}" and refused(path, skip_bad_lines=True) == f"{path}: {message}"


def test_bad_rows(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, {"text": ["a", None, "b"]})
    assert refused(path) == f'{path} row 2: field "text" is null; fill it, or pass --skip-bad-lines'
    text = Text([str(path)], ReadingOptions(skip_bad_lines=True))
    assert [d.name for d in text.documents()] == ["a.parquet:1", "a.parquet:3"] and text.bad_lines == 1
    write_parquet(path, {"text": [b"a", b"b\xff"]})
    assert refused(path) == f"{path} row 2: byte 1 is not UTF-8; re-encode it or pass --encoding-errors replace"
    assert [t for _, t in read(path, encoding_errors="replace")] == ["a", "b\ufffd"]


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"no such thing")
    assert refused(path).startswith(f"cannot read {path}: Parquet magic bytes not found")
    write_parquet(path, {"text": ["abc" * 9999]}, compression="zstd")
    data = bytearray(path.read_bytes())
    data[30:60] = bytes(30)
    path.write_bytes(data)
    assert refused(path).startswith(f"cannot read {path}: ")


# Token ids


def test_ids_of_json_lines(tmp_path):
    """Field case 15: lists of any length; an id that the model does not embed is for the packing to find, with `where`."""
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2, 300], "text": "x"}\n\n{"input_ids": []}\n')
    path = f"{tmp_path}/a.jsonl"
    assert read_ids(path) == [("a.jsonl:1", [1, 2, 300], f"{path} line 1"), ("a.jsonl:3", [], f"{path} line 3")]
    assert Text([path], ReadingOptions(ids_field="input_ids")).bytes is None


@pytest.mark.parametrize("kind", ["uint16", "int32", "int64", "fixed", "view"])
def test_ids_of_parquet(tmp_path, kind):
    import pyarrow

    rows = [[i, 2 * i] for i in range(600)]
    wanted = {
        "fixed": lambda: pyarrow.list_(pyarrow.int16(), 2),
        "view": lambda: pyarrow.list_view(pyarrow.int32()),
    }.get(kind, lambda: pyarrow.list_(getattr(pyarrow, kind)()))()
    write_parquet(tmp_path / "a.parquet", {"input_ids": pyarrow.array(rows, wanted)}, row_group_size=500)
    path = f"{tmp_path}/a.parquet"
    documents = list(Text([path], ReadingOptions(ids_field="input_ids")).documents())
    assert [d.ids.tolist() for d in documents] == rows and {d.ids.dtype for d in documents} == {np.dtype(np.int64)}
    assert (documents[599].name, documents[599].where) == ("a.parquet:600", f"{path} row 600")


def test_ids_of_various_lengths(tmp_path):
    rows = [list(range(n % 7)) for n in range(700)]
    write_parquet(tmp_path / "a.parquet", {"input_ids": rows})
    assert [ids for _, ids, _ in read_ids(tmp_path / "a.parquet")] == rows


@pytest.mark.parametrize(
    "value", ["7", "[1, -1]", "[1.0]", "[true]", '["a"]', "null", "[null]", "[[1]]", f"[{1 << 63}]"]
)
def test_what_is_no_list_of_ids(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"input_ids": [1]}}\n{{"input_ids": {value}}}\n')
    with pytest.raises(SaekitError) as error:
        read_ids(path)
    assert str(error.value) == (
        f'{path} line 2: field "input_ids" holds no list of token ids, which are whole numbers from 0'
    )


def test_columns_and_rows_without_ids(tmp_path):
    import pyarrow

    path = tmp_path / "a.parquet"

    def message(**columns):
        write_parquet(path, columns)
        with pytest.raises(SaekitError) as error:
            read_ids(path)
        return str(error.value)

    no_list = 'field "input_ids" holds no list of token ids, which are whole numbers from 0'
    assert message(input_ids=["a"]) == f'{path}: field "input_ids" holds string, not token ids'
    assert message(input_ids=[[1.0]]) == f'{path}: field "input_ids" holds list<element: double>, not token ids'
    assert message(input_ids=[[1], [2, -3]]) == f"{path} row 2: {no_list}"
    assert message(input_ids=[[1], [2, None]]) == f"{path} row 2: {no_list}"
    assert (
        message(input_ids=[[1], None]) == f'{path} row 2: field "input_ids" is null; fill it, or pass --skip-bad-lines'
    )
    assert (
        message(input_ids=pyarrow.array([[1], [2**64 - 1]], pyarrow.list_(pyarrow.uint64())))
        == f"{path} rows 1 to 2: {no_list}"
    )
    assert message(text=["a"], ids=[[1, 2]], short=[[1]]) == (
        f'{path}: no field "input_ids"; fields are text, ids, short; pass --ids-field ids'
    )


def test_ids_come_from_records_alone(tmp_path):
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1]}')
    assert [name for name, _, _ in read_ids(tmp_path)] == ["a.jsonl:1"]
    for source in (str(tmp_path / "README.md"), "-", "stdlib"):
        with pytest.raises(SaekitError) as error:
            read_ids(source)
        assert str(error.value) == (
            f"{source} holds text, not token ids; --ids-field reads .jsonl .jsonl.zst .parquet and hf:NAME"
        )


# Data sets


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    """bar/ in the form of the hub: 300 rows of training text in two files, one of test."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bar" / "data").mkdir(parents=True)
    for name, rows in (
        ("train-00000-of-00002", range(200)),
        ("train-00001-of-00002", range(200, 300)),
        ("test-00000-of-00001", [7]),
    ):
        lines = [json.dumps({"text": f"d{i}", "input_ids": [i, 1]}) for i in rows]
        (tmp_path / "bar" / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "bar"


def test_a_local_data_set(dataset_folder):
    assert read("hf:./bar") == [(f"hf:./bar:{i + 1}", f"d{i}") for i in range(300)]
    assert read("hf:./bar:test") == [("hf:./bar:test:1", "d7")]
    assert read(f"hf:{dataset_folder},default:test")[0][1] == "d7"
    assert read_ids("hf:./bar")[299] == ("hf:./bar:300", [299, 1], "hf:./bar row 300")
    text = Text(["hf:./bar"])
    assert (text.bytes, text.revision, text.repeatable) == (None, None, True)
    assert [len(list(text.documents())) for _ in range(2)] == [300, 300]


def test_a_saved_data_set(dataset_folder):
    import datasets

    both = datasets.DatasetDict({s: datasets.Dataset.from_dict({"text": [s, "x"]}) for s in ("train", "test")})
    both.save_to_disk("both")
    both["test"].save_to_disk("one")
    assert [t for _, t in read("hf:./both:test")] == ["test", "x"]
    assert [t for _, t in read("hf:./one")] == ["test", "x"]


def test_bad_data_sets(dataset_folder):
    assert refused("hf:./gone") == "no such folder: ./gone"
    assert refused("hf:./bar:dev") == "cannot open hf:./bar:dev: Bad split: dev. Available splits: ['train', 'test']"
    assert refused("hf:./bar,big").startswith("cannot open hf:./bar,big: BuilderConfig 'big' not found. Available:")
    assert refused("hf:") == "cannot read hf:: a data set is hf:NAME, hf:NAME,CONFIG or hf:NAME,CONFIG:SPLIT"
    assert refused("hf:./bar", text_field="body") == (
        'hf:./bar: no field "body"; fields are text, input_ids; pass --text-field text'
    )
    (dataset_folder / "data" / "train-00001-of-00002.jsonl").write_text("{")
    # rows come in hundreds at once, over the border of the files
    assert refused("hf:./bar").startswith("cannot read hf:./bar behind row 0: JSON parse error: ")


def test_a_data_set_that_is_not_in_the_cache(dataset_folder):
    """HF_HUB_OFFLINE is set in all tests."""
    message = "hf:foo/bar is not in the local cache and HF_HUB_OFFLINE is set; unset it"
    assert refused("hf:foo/bar") == message


def test_a_data_set_in_the_cache(dataset_folder, tmp_path):
    """The library's cache of a data set of the hub: its folder is named after the commit."""
    import datasets

    commit = "0123456789abcdef0123456789abcdef01234567"
    datasets.load_dataset("./bar", cache_dir=str(tmp_path / "filled"))
    (made,) = (tmp_path / "filled" / "bar" / "default" / "0.0.0").glob("[0-9a-f]*[0-9a-f]")
    cached = tmp_path / "cache" / "foo___bar" / "default" / "0.0.0" / commit
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    text = Text(["hf:foo/bar:test"])
    assert [d.text for d in text.documents()] == ["d7"] and text.revision == commit
    assert len(read(f"hf:foo/bar@{commit}")) == 300
    assert refused("hf:foo/bar@fedcba").endswith("is not in the local cache and HF_HUB_OFFLINE is set; unset it")
    assert refused("hf:foo/bar,big").startswith("cannot open hf:foo/bar,big: ")


def test_a_data_set_of_the_hub(dataset_folder, monkeypatch):
    """A revision becomes a commit first, and that commit is what is read."""
    import datasets
    import datasets.config

    asked, load = [], datasets.load_dataset_builder
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def commit(source, name, revision):
        asked.append((source, name, revision))
        return "0123456789abcdef0123456789abcdef01234567"

    def builder(name, config, revision):
        asked.append((name, config, revision))
        made = load("./bar")
        made.hash = "f" * 40 if config == "other" else revision
        return made

    monkeypatch.setattr(text_module, "_commit", commit)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    text = Text(["hf:foo/bar@v1,default:test"])
    assert text.revision == "0123456789abcdef0123456789abcdef01234567"
    assert asked == [("hf:foo/bar@v1,default:test", "foo/bar", "v1"), ("foo/bar", "default", text.revision)]
    assert [d.text for d in text.documents()] == ["d7"]
    # the library took another commit out of its cache
    assert refused("hf:foo/bar,other").endswith(
        "commit 0123456789abcdef0123456789abcdef01234567 cannot be loaded from the hub; try again"
    )


def test_what_the_hub_answers(dataset_folder, monkeypatch):
    import datasets.config
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    response = SimpleNamespace(headers={}, request=None)
    no_hub = "the hub has no data set foo/bar, or it is private; check the name, or run  hf auth login"
    for error, message in (
        (errors.RepositoryNotFoundError("gone", response=response), no_hub),
        (errors.HFValidationError("bad name"), no_hub),
        (
            errors.RevisionNotFoundError("gone", response=response),
            "foo/bar has no revision v9; name a branch, tag or commit",
        ),
        (OSError("no route\nto host"), "the hub cannot be reached (no route); try again"),
    ):

        def answer(self, name, revision, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", answer)
        assert refused("hf:foo/bar@v9") == f"hf:foo/bar@v9: {message}"


# The standard library


def test_the_standard_library():
    names = [d.name for d, _ in zip(stdlib_documents(), range(40))]
    assert names == sorted(names, key=str.encode) and "abc.py" in names
    assert not any("/test/" in f"/{name}" for name in names)
    assert [d.name for d, _ in zip(Text(["stdlib"]).documents(), range(40))] == names


def test_held_out_is_a_function_of_the_name():
    """printf NAME | sha256sum, as a decimal number: the last digit is 0 for ast.py, 4 for abc.py, 5 for enum.py."""
    assert Document("ast.py", "").held_out
    assert not Document("abc.py", "").held_out and not Document("enum.py", "").held_out
