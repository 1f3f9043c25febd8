"""Labels: revisions, conflicts, many writers, and a file that cannot be written."""

import sqlite3
import threading

import pytest

from saekit.errors import SaekitError
from saekit.feature_index.labels import Labels


@pytest.fixture
def labels(tmp_path) -> Labels:
    return Labels(tmp_path / "labels.sqlite")


def test_nothing_is_written_by_reading(labels):
    assert labels.get(3).revision == 0 and labels.all() == {} and labels.search("x") == [] and labels.history(1) == []
    assert not labels.path.exists()


def test_fields_are_kept_and_revisions_counted(labels):
    assert labels.save(7, label="  closing bracket ", author="ann").revision == 1
    entry = labels.save(7, tags=["syntax", " syntax", "", "code"], bookmarked=True)
    assert (entry.label, entry.tags, entry.bookmarked, entry.revision) == (
        "closing bracket",
        ("syntax", "code"),
        True,
        2,
    )
    labels.save(7, notes="fires inside calls")
    assert labels.get(7) == labels.history(7)[0] and labels.get(7).bookmarked
    assert [e.revision for e in labels.history(7)] == [3, 2, 1] and labels.history(7)[2].author == "ann"
    assert labels.journal == "wal"
    # another process sees it
    assert Labels(labels.path).get(7).label == "closing bracket"


def test_saving_over_a_newer_revision_shows_both(labels):
    seen = labels.save(1, label="first").revision
    labels.save(1, label="theirs", expected=seen)
    with pytest.raises(SaekitError, match='feature 1 was saved meanwhile: there it says "theirs", here "mine"'):
        labels.save(1, label="mine", expected=seen)
    assert labels.get(1).label == "theirs" and len(labels.history(1)) == 2


def test_search_by_beginnings_of_words(labels):
    labels.save(1, label="opening quote", notes="and the bracket")
    labels.save(2, label="bracket", tags=["quotes"])
    labels.save(3, label="naïve Bayes")
    assert [e.feature for e in labels.search("quot")] == [1, 2], "a label counts more than a tag"
    assert [e.feature for e in labels.search("bracket quote")] == [2, 1]
    assert [e.feature for e in labels.search("NAIVE")] == [3]
    # what looks like query syntax is text
    assert labels.search('" OR *') == [] and labels.search("label:x") == []
    labels.save(2, label="", tags=[])
    assert [e.feature for e in labels.search("bracket")] == [1]


def test_600_revisions_from_three_connections(labels):
    errors = []

    def write(author: str):
        own = Labels(labels.path)
        try:
            for i in range(200):
                own.save(i % 10, label=f"{author} {i}", author=author)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    history = [e for j in range(10) for e in labels.history(j)]
    assert len(history) == 600 and len({e.label for e in history}) == 600
    assert all(labels.get(j).revision == 60 for j in range(10))


def test_one_object_from_many_threads(labels):
    labels.save(0, label="x")
    results = []
    threads = [threading.Thread(target=lambda i=i: results.append(labels.save(i, label=str(i)))) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 8 and set(labels.all()) == set(range(8))


def test_read_only(labels):
    labels.save(1, label="x")
    closed = Labels(labels.path, read_only="opened for another host")
    assert closed.get(1).label == "x"
    with pytest.raises(SaekitError, match=r"is not open for writing: opened for another host"):
        closed.save(1, label="y")


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(SaekitError, match="cannot be written: unable to open database file; reading goes on"):
        Labels(tmp_path / "nowhere" / "labels.sqlite").save(1, label="x")
    (tmp_path / "labels.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 40)
    with pytest.raises(SaekitError, match="cannot be read: file is not a database"):
        Labels(tmp_path / "labels.sqlite").get(1)


def test_locked_database_is_one_line(labels, monkeypatch):
    labels.save(1, label="x")
    labels._local.writer.execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(labels.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(SaekitError, match="database is locked; reading goes on"):
        labels.save(1, label="y")
    assert labels.get(1).label == "x"
    other.execute("ROLLBACK")
    assert labels.save(1, label="y").revision == 2


def test_export_and_import(labels, tmp_path):
    labels.save(5, label="café ✓", tags=["a"], notes="two\nlines", bookmarked=True)
    labels.save(2, label="b")
    text = labels.export_jsonl()
    other = Labels(tmp_path / "other.sqlite")
    assert other.import_jsonl(text) == 2
    for a, b in zip(labels.all().values(), other.all().values(), strict=True):
        assert (a.feature, a.label, a.tags, a.notes, a.bookmarked) == (
            b.feature,
            b.label,
            b.tags,
            b.notes,
            b.bookmarked,
        )
    with pytest.raises(SaekitError, match="line 2 is no exported label"):
        other.import_jsonl('{"feature": 1}\n{"label": "x"}\n')
