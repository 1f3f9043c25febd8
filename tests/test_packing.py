"""From documents to parts of the token table; expected tables are worked out by hand."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.errors import SaekitError
from saekit.packing import Packing, Part, parts, plan_packing
from saekit.store.format import TokenTable
from saekit.text import Document

EVERYTHING = 1 << 40


class Letters:
    """A slow tokenizer: a = 10, b = 11, …; BOS 0, EOS 1. Counts what it is given."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, None
    encoded = 0

    def encode(self, text, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        self.encoded += bool(text)
        return [ord(c) - ord("a") + 10 for c in text.replace(" ", "")]


def read(
    texts, *, sequences=EVERYTHING, tokens=None, vocab_size=40, state=None, tokenizer=None, **packing
) -> list[Part]:
    documents = [t if isinstance(t, Document) else Document(f"{i}", t) for i, t in enumerate(texts)]
    return list(
        parts(
            documents,
            tokenizer or Letters(),
            Packing(**packing),
            vocab_size=vocab_size,
            sequences=sequences,
            tokens=tokens,
            state=state,
        )
    )


def packed(texts, **options) -> Part:
    (part,) = read(texts, **options)
    return part


def lists(table: TokenTable) -> dict[str, list]:
    return {name: getattr(table, name).tolist() for name in table.__dataclass_fields__}


# One part, by hand


def test_join_by_hand():
    """Stream a b c | d e f g h with 1 between, in sequences of BOS and three:
    [0 a b c] [0 1 d e] [0 f g h]; the separator belongs to no document and stands in no run of the second sequence."""
    part = packed(["abc", "defgh"], context=4, bos=0, separator=1, dropped=(0, 1))
    assert lists(part.table) == {
        "token": [0, 10, 11, 12, 0, 1, 13, 14, 0, 15, 16, 17],
        "stored": [False, True, True, True, False, False, True, True, False, True, True, True],
        "seq_start": [0, 4, 8, 12],
        "run_start": [1, 6, 9],
        "run_doc": [0, 1, 1],
        "run_position": [0, 0, 2],
    }
    # 12 positions less three BOS and a separator; all five tokens of the last document are there
    counts = {"documents": 2, "bytes": 8, "empty": 0, "sequences": 3, "tokens": 12, "rows": 8, "inside": 5}
    assert {name: part.state[name] for name in counts} == counts and part.state["last"] and not part.state["short"]


def test_isolate_has_the_table_of_join():
    texts, options = ["abc", "defgh"], {"context": 4, "bos": 0, "separator": 1, "dropped": (0, 1)}
    a, b = packed(texts, mode="isolate", **options), packed(texts, **options)
    assert lists(a.table) == lists(b.table) and a.state == b.state


def test_separate_by_hand():
    """Room for three beside BOS: abcd gives [0 a b c] [0 d], ef gives [0 e f], ghi just fills [0 g h i]."""
    part = packed(["abcd", "", "ef", "ghi"], mode="separate", context=4, bos=0, dropped=(0,))
    assert lists(part.table) == {
        "token": [0, 10, 11, 12, 0, 13, 0, 14, 15, 0, 16, 17, 18],
        "stored": [False, True, True, True, False, True, False, True, True, False, True, True, True],
        "seq_start": [0, 4, 6, 9, 13],
        "run_start": [1, 5, 7, 10],
        "run_doc": [0, 0, 1, 2],
        "run_position": [0, 3, 0, 0],
    }
    assert (part.state["documents"], part.state["empty"], part.state["sequences"]) == (3, 1, 4)


def test_separate_for_an_encoder():
    """[CLS] = 0 in front and [SEP] = 1 behind leave room for two: [0 a b 1] [0 c 1] [0 d 1]."""
    table = packed(["abc", "d"], mode="separate", context=4, bos=0, closing=1, dropped=(0, 1)).table
    assert lists(table) == {
        "token": [0, 10, 11, 1, 0, 12, 1, 0, 13, 1],
        "stored": [False, True, True, False, False, True, False, False, True, False],
        "seq_start": [0, 4, 7, 10],
        "run_start": [1, 5, 8],
        "run_doc": [0, 0, 1],
        "run_position": [0, 2, 0],
    }


def test_positions_follow_for_every_token():
    t = packed(["abc", "defgh"], context=4, bos=0, separator=1, dropped=(0, 1)).table
    rows = np.flatnonzero(t.stored)
    assert t.doc_of(rows).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert t.position_in_doc(rows).tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert t.position_in_seq(rows).tolist() == [1, 2, 3, 2, 3, 1, 2, 3]


def test_without_bos_and_separator_nothing_is_dropped():
    """Field case 13: the first token of each document has a row, and all tokens have."""
    assert lists(packed(["abc", "de"], context=4).table) == {
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


def test_token_ids_are_taken_as_they_are():
    documents = [Document("", ids=np.array(ids, np.int64)) for ids in ([7, 0, 39], [], [3])]
    part = packed(documents, context=4)
    assert part.table.token.tolist() == [7, 0, 39, 3] and part.table.run_doc.tolist() == [0, 1]
    assert (part.state["documents"], part.state["bytes"], part.state["empty"]) == (2, None, 1)


def test_bytes_are_those_of_utf_8():
    class One(Letters):
        def encode(self, text, add_special_tokens, verbose):
            return [10]

    # é takes two bytes, 漢 three
    assert packed(["é漢", "a"], tokenizer=One(), context=4).state["bytes"] == 6


# --tokens


@pytest.mark.parametrize("tokens", range(2, 13))
def test_tokens_is_the_number_of_positions(tokens):
    options = {"context": 4, "bos": 0, "separator": 1, "dropped": (0, 1)}
    whole = packed(["abc", "defgh"], **options).table.token.tolist()
    part = packed(["abc", "defgh"], tokens=tokens, **options)
    # a sequence of BOS alone would say nothing: 5 and 9 positions become 4 and 8
    assert part.table.token.tolist() == whole[: tokens - (tokens % 4 == 1)]
    assert part.state["last"] and not part.state["short"]


# [0 a b 1] [0 c 1] [0 d 1]: what is cut keeps its frame, and a frame without text is not begun
@pytest.mark.parametrize(
    "tokens, text",
    [
        (3, "0a1"), (4, "0ab1"), (5, "0ab1"), (6, "0ab1"), (7, "0ab10c1"), (8, "0ab10c1"), (9, "0ab10c1"),
        (10, "0ab10c10d1"),
    ],
)  # fmt: skip
def test_tokens_in_separate(tokens, text):
    part = packed(["abc", "d"], tokens=tokens, mode="separate", context=4, bos=0, closing=1)
    assert part.table.token.tolist() == [int(c) if c in "01" else ord(c) - 87 for c in text]
    assert not part.state["short"] and part.state["documents"] == 1 + ("d" in text)


@pytest.mark.parametrize("mode", ["join", "separate"])
def test_a_text_that_ends_before_tokens_is_short(mode):
    """BOS and seven letters are two sequences of four and one of two: ten positions."""
    options = {"context": 4, "bos": 0, "mode": mode}
    part = packed(["abcdefg"], tokens=11, **options)
    assert part.state["tokens"] == 10 and part.state["short"] and part.state["last"]
    assert not packed(["abcdefg"], tokens=10, **options).state["short"]
    assert not packed(["abcdefg"], **options).state["short"]


def test_documents_and_bytes_are_those_that_were_used():
    def counts(texts, **options):
        state = packed(texts, context=4, **options).state
        return state["documents"], state["bytes"], state["empty"]

    assert counts(["abc", "", "  \n", "de", ""]) == (2, 5, 3)
    # what comes behind the last token needed is not looked at, whatever the tokenizer was given with it
    assert counts(["", "abc", "", "de"], tokens=3) == (1, 3, 1)
    # the second document has its first token here, and counts with all its bytes
    assert counts(["abc", "", "de"], tokens=4) == (2, 5, 1)


# Parts


def test_parts_by_hand():
    """The sequences of test_join_by_hand, two and one; the second part counts its places from 0, documents from the start."""
    a, b = read(["abc", "defgh"], sequences=2, context=4, bos=0, separator=1, dropped=(0, 1))
    assert a.table.token.tolist() == [0, 10, 11, 12, 0, 1, 13, 14] and a.table.run_start.tolist() == [1, 6]
    assert lists(b.table) == {
        "token": [0, 15, 16, 17],
        "stored": [False, True, True, True],
        "seq_start": [0, 4],
        "run_start": [1],
        "run_doc": [1],
        "run_position": [2],
    }
    counts = {"documents": 2, "bytes": 8, "sequences": 2, "tokens": 8, "rows": 5, "inside": 2, "last": False}
    assert {name: a.state[name] for name in counts} == counts
    assert b.state == packed(["abc", "defgh"], context=4, bos=0, separator=1, dropped=(0, 1)).state


def test_a_part_that_ends_with_the_text_is_the_last():
    # six letters fill the two sequences; the empty documents behind them make no further part
    a, b = read(["abcdef", "", " "], sequences=1, context=3)
    assert not a.state["last"] and b.state["last"] and (a.state["empty"], b.state["empty"]) == (0, 2)


texts = st.lists(st.text("abcdefgh ", max_size=9) | st.text("abc", min_size=30, max_size=40), max_size=12)
packings = st.sampled_from(
    [
        {"context": 4, "bos": 0, "separator": 1, "dropped": (0, 1)},
        {"context": 2, "bos": 0, "separator": 1},
        {"context": 3, "separator": 1, "dropped": (1, 10)},
        {"context": 5},
        {"context": 1},
        {"mode": "separate", "context": 4, "bos": 0, "closing": 1, "dropped": (0, 1)},
        {"mode": "separate", "context": 3, "bos": 0},
        {"mode": "separate", "context": 5},
    ]
)


@settings(deadline=None, max_examples=80)
@given(texts, packings, st.integers(1, 7), st.none() | st.integers(4, 60))
def test_parts_of_any_size_are_pieces_of_one(texts, packing, sequences, tokens):
    options = {"tokens": tokens, **packing}
    if not any(t.strip() for t in texts):
        with pytest.raises(SaekitError, match="holds no text"):
            read(texts, **options)
        return
    try:
        whole = packed(texts, **options)
    except SaekitError as error:
        assert "nothing to store" in str(error)
        return
    got = read(texts, sequences=sequences, **options)
    first = 0
    for part in got:
        S = part.table.n_sequences
        assert lists(part.table) == lists(whole.table.sequences(first, first + S))
        first += S
        assert sequences == S or part.state["last"]
        assert part.state["sequences"] == first
        assert part.state["tokens"] == whole.table.seq_start[first]
        assert part.state["rows"] == whole.table.stored[: part.state["tokens"]].sum()
        assert part.state["documents"] == whole.table.run_doc[whole.table.run_start < part.state["tokens"]].max() + 1
    assert first == whole.table.n_sequences and got[-1].state == whole.state
    # behind every part reading goes on as if it had never stopped
    for i, part in enumerate(got):
        state = json.loads(json.dumps(part.state))
        again = read(texts, sequences=sequences, state=state, **options)
        assert [(lists(p.table), p.state) for p in again] == [(lists(p.table), p.state) for p in got[i + 1 :]]


@settings(deadline=None, max_examples=50)
@given(texts, st.sampled_from(["join", "separate"]))
def test_every_token_of_every_document_is_there_once(texts, mode):
    """Read back document by document through the runs."""
    wanted = [Letters().encode(t, False, False) for t in texts if t.strip()]
    if not wanted:
        return
    separator = 1 if mode == "join" else None
    t = packed(texts, context=5, bos=0, separator=separator, dropped=(0, 1), mode=mode).table
    rows = np.flatnonzero(t.stored)
    documents, places = t.doc_of(rows), t.position_in_doc(rows)
    for k, ids in enumerate(wanted):
        assert t.token[rows[documents == k]].tolist() == ids
        assert places[documents == k].tolist() == list(range(len(ids)))


def test_what_is_done_is_not_tokenised_again():
    texts = ["abcd"] * 1000
    state = read(texts, sequences=999, context=4)[0].state
    tokenizer = Letters()
    read(texts, sequences=999, context=4, state=state, tokenizer=tokenizer)
    # document 999, the last of those done, and the one behind it
    assert state["documents"] == 999 and tokenizer.encoded == 2


def test_a_state_has_constant_size():
    states = [p.state for p in read(["abcdefg" * 30] * 300, sequences=100, context=4, bos=0)]
    assert len(states) > 100 and max(len(json.dumps(s)) for s in states) < 256


@pytest.mark.parametrize("texts", [["abcd", "Xfgh"], ["abce", "efgh"], ["abcd"], []])
def test_a_text_that_changed_is_noticed(texts):
    state = read(["abcd", "efgh"], sequences=1, context=6)[0].state
    with pytest.raises(SaekitError) as error:
        read([t.replace("X", "e") + "e" * ("X" in t) for t in texts], sequences=1, context=6, state=state)
    assert str(error.value) == (
        "the text is not as it was when it was first read; restore it, or start over in another folder"
    )


def test_a_text_that_lost_its_end_is_noticed():
    state = read(["abcd", "efgh"], sequences=1, context=4)[0].state
    with pytest.raises(SaekitError, match="the text is not as it was"):
        read(["abcd"], sequences=1, context=4, state=state)


def test_memory_is_a_part_and_a_batch():
    """30 million tokens in documents of a million, 60 MB as uint16 and more than three times that on the way."""
    ids = np.arange(1 << 20) % 300
    tracemalloc.start()
    got = 0
    for part in parts(
        (Document("", ids=ids) for _ in range(30)), None, Packing(context=256), vocab_size=300, sequences=256
    ):
        got += part.table.n_tokens
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got == 30 << 20 and peak < 80 << 20


def test_a_million_documents_of_one_token():
    one = Document("", ids=np.array([5]))
    options = {"vocab_size": 300, "sequences": 2000, "tokens": None}
    got = list(parts((one for _ in range(1_000_000)), None, Packing(context=256, separator=1), **options))
    # 1,000,000 tokens and 999,999 separators, 512,000 in a part
    assert [p.table.n_tokens for p in got] == [512_000, 512_000, 512_000, 463_999]
    assert got[-1].state["documents"] == 1_000_000 and got[-1].table.run_doc[-1] == 999_999


# Refusals


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "the text holds no text (0 non-empty documents); give another source"),
        (["", " \n"], {}, "the text holds no text (0 non-empty documents); give another source"),
        (["abc"], {"tokens": 1, "bos": 0}, "--tokens 1 leaves no room for text; pass more"),
        (["aaa"], {"dropped": (10,)}, "nothing to store: every token of a sequence is special; raise --context"),
        (["a~"], {}, "the text: the tokenizer gives id 39; the model embeds 0 to 38"),
        (
            [
                Document("", ids=np.array([1, 38]), where="i.jsonl line 1"),
                Document("", ids=np.array([], np.int64), where="i.jsonl line 2"),
                Document("", ids=np.array([5, 39]), where="i.jsonl line 3"),
            ],
            {},
            "i.jsonl line 3: id 39; the model embeds 0 to 38",
        ),
    ],
)
def test_refusals(texts, options, message):
    with pytest.raises(SaekitError) as error:
        read(texts, vocab_size=39, context=4, **options)
    assert str(error.value) == message


def test_an_id_beyond_the_last_token_needed_is_no_error():
    assert packed(["a~"], tokens=1, vocab_size=39, context=4).table.token.tolist() == [10]


def test_nothing_to_store_is_said_of_the_whole_text_alone():
    """a has no row: the first part has none, and that is no error."""
    a, b = read(["aaab"], sequences=1, context=3, dropped=(10,))
    assert a.state["rows"] == 0 and b.state["rows"] == 1


# Special tokens


def plan(tokenizer=Letters, context=8, **options):
    return plan_packing(tokenizer, context=context, vocab_size=40, name="./ckpt", **options)


def test_which_specials():
    assert plan() == Packing(context=8, bos=0, separator=1, dropped=(0, 1))
    assert plan(packing="isolate") == Packing(context=8, mode="isolate", bos=0, separator=1, dropped=(0, 1))
    assert plan(packing="separate") == Packing(context=8, mode="separate", bos=0, dropped=(0, 1))
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


def test_specials_of_an_encoder():
    class Bert:
        bos_token_id = eos_token_id = None
        cls_token_id, sep_token_id, pad_token_id = 2, 3, 0

    framed = Packing(context=8, mode="separate", bos=2, closing=3, dropped=(0, 2, 3))
    assert plan(Bert, packing="separate", encoder=True) == framed
    assert plan(Bert, encoder=True) == Packing(context=8, bos=2, separator=3, dropped=(0, 2, 3))
    # ids have their frame already
    as_they_are = Packing(context=8, mode="separate", dropped=(0, 2, 3))
    assert plan(Bert, packing="separate", encoder=True, ids=True) == as_they_are
    assert plan(Bert, packing="separate", encoder=True, ids=True, bos="always") == framed
    with pytest.raises(SaekitError, match="--context 2 leaves no room for text; pass at least 3"):
        plan(Bert, context=2, packing="separate", encoder=True)


def test_specials_of_ids():
    assert plan(ids=True) == Packing(context=8, separator=1, dropped=(0, 1))
    assert plan(ids=True, bos="always") == Packing(context=8, bos=0, separator=1, dropped=(0, 1))
    assert plan(None, ids=True) == Packing(context=8)
    assert plan(None, ids=True, drop_ids=(5,)) == Packing(context=8, dropped=(5,))
    with pytest.raises(SaekitError, match="./ckpt has no tokenizer and so no BOS; use --bos auto"):
        plan(None, ids=True, bos="always")


def test_specials_behind_the_embedding():
    class Padded(Letters):
        pad_token_id = 40

    # no text holds it
    assert plan(Padded).dropped == (0, 1)

    class Foreign(Letters):
        bos_token_id = 50

    with pytest.raises(
        SaekitError, match="the tokenizer of ./ckpt has the BOS 50; the model embeds 0 to 39; pass --tokenizer"
    ):
        plan(Foreign)


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
    t = packed([text], tokenizer=tokenizer, context=16, vocab_size=300).table
    assert tokenizer.decode(t.token.tolist()) == text
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 20
    tokenizer.backend_tokenizer.no_truncation()
    assert not caplog.records and not recwarn.list and "".join(capfd.readouterr()) == ""


def test_batches_of_documents_change_nothing(tokenizer):
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(600)]
    t = packed(texts, tokenizer=tokenizer, context=32, separator=1, vocab_size=300).table
    joined = [
        id for i, x in enumerate(texts) for id in ([1] if i else []) + tokenizer(x, add_special_tokens=False).input_ids
    ]
    assert t.token.tolist() == joined
    assert len(np.unique(t.run_doc)) == 600
