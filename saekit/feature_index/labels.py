"""What people write about features: label, tags, notes, bookmark. One SQLite file beside `index/`, never inside it.

    labels = Labels("saes/x/labels.sqlite")
    labels.save(123, label="closing bracket of a call", tags=["syntax"])
    labels.get(123).label

Every save is one revision and none is ever overwritten. Connections are per thread; reading never creates the file.
"""

import json
import sqlite3
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from saekit.errors import SaekitError

SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
  feature INTEGER PRIMARY KEY, label TEXT NOT NULL, tags TEXT NOT NULL, notes TEXT NOT NULL,
  bookmarked INTEGER NOT NULL, author TEXT NOT NULL, time TEXT NOT NULL, revision INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS history (
  feature INTEGER NOT NULL, label TEXT NOT NULL, tags TEXT NOT NULL, notes TEXT NOT NULL,
  bookmarked INTEGER NOT NULL, author TEXT NOT NULL, time TEXT NOT NULL, revision INTEGER NOT NULL,
  PRIMARY KEY (feature, revision));
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 (label, tags, notes);
"""
COLUMNS = "feature, label, tags, notes, bookmarked, author, time, revision"


@dataclass(frozen=True)
class Entry:
    """What is known about one feature; revision 0 = nothing has been written yet."""

    feature: int
    label: str = ""
    tags: tuple[str, ...] = ()
    notes: str = ""
    bookmarked: bool = False
    author: str = ""
    time: str = ""
    """UTC, ISO 8601."""
    revision: int = 0


def _entry(row: tuple) -> Entry:
    feature, label, tags, notes, bookmarked, author, time, revision = row
    return Entry(feature, label, tuple(json.loads(tags)), notes, bool(bookmarked), author, time, revision)


class Labels:
    """The labels of one SAE. `read_only` holds the reason why saving is refused, or None."""

    def __init__(self, path: str | Path, *, read_only: str | None = None):
        self.path = Path(path)
        self.read_only = read_only
        self.journal: str | None = None
        """`wal`, or the journal that the file system allowed instead; None before the first save."""
        self._local = threading.local()

    def get(self, feature: int) -> Entry:
        """The entry of a feature, empty (revision 0) if there is none."""
        rows = self._read(f"SELECT {COLUMNS} FROM entry WHERE feature = ?", (int(feature),))
        return _entry(rows[0]) if rows else Entry(int(feature))

    def all(self) -> dict[int, Entry]:
        """Every entry, by feature number."""
        return {row[0]: _entry(row) for row in self._read(f"SELECT {COLUMNS} FROM entry ORDER BY feature", ())}

    def history(self, feature: int) -> list[Entry]:
        """Every revision of a feature, newest first."""
        query = f"SELECT {COLUMNS} FROM history WHERE feature = ? ORDER BY revision DESC"
        return [_entry(row) for row in self._read(query, (int(feature),))]

    def search(self, text: str) -> list[Entry]:
        """Entries in which every word of `text` begins a word of label, tags or notes; best first."""
        words = " ".join('"' + word.replace('"', '""') + '"*' for word in text.split())
        if not words:
            return []
        columns = ", ".join(f"entry.{name}" for name in COLUMNS.split(", "))
        query = (
            f"SELECT {columns} FROM words JOIN entry ON entry.feature = words.rowid "
            "WHERE words MATCH ? ORDER BY bm25(words, 4, 2, 1), entry.feature"
        )
        return [_entry(row) for row in self._read(query, (words,))]

    def save(
        self,
        feature: int,
        *,
        label: str | None = None,
        tags: list[str] | tuple[str, ...] | None = None,
        notes: str | None = None,
        bookmarked: bool | None = None,
        author: str = "",
        expected: int | None = None,
    ) -> Entry:
        """Writes a new revision; a field left at None keeps its value. Returns the entry as it now stands.

        `expected` is the revision the writer had before their eyes. Raises SaekitError with both texts if somebody saved
        meanwhile, and with the reason if the file cannot be written.
        """
        if self.read_only:
            raise SaekitError(f"{self.path} is not open for writing: {self.read_only}")
        try:
            connection = self._writer()
            connection.execute("BEGIN IMMEDIATE")
            try:
                entry = self._save(connection, int(feature), label, tags, notes, bookmarked, author, expected)
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise SaekitError(f"{self.path} cannot be written: {error}; reading goes on") from None
        return entry

    def _save(self, connection, feature, label, tags, notes, bookmarked, author, expected) -> Entry:
        row = connection.execute(f"SELECT {COLUMNS} FROM entry WHERE feature = ?", (feature,)).fetchone()
        old = _entry(row) if row else Entry(feature)
        new = Entry(
            feature,
            old.label if label is None else label.strip(),
            old.tags if tags is None else tuple(dict.fromkeys(t.strip() for t in tags if t.strip())),
            old.notes if notes is None else notes,
            old.bookmarked if bookmarked is None else bool(bookmarked),
            author,
            datetime.now(UTC).isoformat(timespec="seconds"),
            old.revision + 1,
        )
        if expected is not None and expected != old.revision:
            theirs, yours = (old.label, new.label) if old.label != new.label else (old.notes, new.notes)
            raise SaekitError(
                f'feature {feature:,} was saved meanwhile: there it says "{theirs}", here "{yours}"; '
                "read it again, then save"
            )
        values = (
            feature, new.label, json.dumps(new.tags, ensure_ascii=False), new.notes, new.bookmarked,
            new.author, new.time, new.revision,
        )  # fmt: skip
        connection.execute(f"INSERT OR REPLACE INTO entry ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?)", values)
        connection.execute(f"INSERT INTO history ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?)", values)
        connection.execute("DELETE FROM words WHERE rowid = ?", (feature,))
        connection.execute(
            "INSERT INTO words (rowid, label, tags, notes) VALUES (?,?,?,?)",
            (feature, new.label, " ".join(new.tags), new.notes),
        )
        return new

    def export_jsonl(self) -> str:
        """All entries as JSON lines, without times' order mattering: by feature number."""
        return "".join(json.dumps(vars(e), ensure_ascii=False) + "\n" for e in self.all().values())

    def import_jsonl(self, text: str) -> int:
        """Saves each line of an export as a new revision; returns how many. Raises SaekitError with the line number."""
        count = 0
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                fields = {k: entry[k] for k in ("label", "tags", "notes", "bookmarked", "author") if k in entry}
                feature = int(entry["feature"])
            except (ValueError, KeyError, TypeError):
                raise SaekitError(f"line {number} is no exported label; each line needs at least a feature") from None
            self.save(feature, **fields)
            count += 1
        return count

    def _writer(self) -> sqlite3.Connection:
        connection = getattr(self._local, "writer", None)
        if connection is None:
            # isolation_level None: transactions are ours; check_same_thread stays on, each thread has its own
            connection = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            self.journal = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            connection.execute("PRAGMA busy_timeout=10000")
            connection.executescript(SCHEMA)
            self._local.writer = connection
        return connection

    def _read(self, query: str, values: tuple) -> list[tuple]:
        writer = getattr(self._local, "writer", None)
        if writer is None and not self.path.is_file():
            return []
        try:
            connection = writer or self._reader()
            return connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise SaekitError(f"{self.path} cannot be read: {error}; restore it or move it away") from None

    def _reader(self) -> sqlite3.Connection:
        connection = getattr(self._local, "reader", None)
        if connection is None:
            uri = self.path.resolve().as_uri()
            connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=10, isolation_level=None)
            try:
                connection.execute("SELECT 1 FROM entry LIMIT 1")
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    # another thread has created the file and is about to create the tables
                    connection.close()
                    connection = self._writer() if not self.read_only else sqlite3.connect(":memory:")
                    connection.executescript(SCHEMA)
                else:
                    # a folder that cannot be written has no room for the files WAL wants beside the database
                    connection.close()
                    connection = sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
            self._local.reader = connection
        return connection
