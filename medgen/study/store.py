"""Answers and log-ins of a served study: one SQLite file that holds every acknowledged answer, whatever is killed and when.

Write-ahead log, synchronous=FULL, one writer: a call that returned has been written through to the disk, one that raised changed nothing.
Rows are only ever added (the file itself refuses anything else); a changed answer is a new version, and the last one counts.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from medgen.study.responses import Pack

SCHEMA = 1
OURS = 0x6D647374  # "mdst", SQLite's application_id
KEPT = ("session", "position", "task", "answer", "confidence", "ms", "viewer_version", "timestamp")
TABLES = (
    "CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE logins (reader TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE, created TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE answers (
        reader TEXT NOT NULL, item TEXT NOT NULL, question TEXT NOT NULL, version INTEGER NOT NULL, nonce TEXT NOT NULL,
        session TEXT NOT NULL, position INTEGER NOT NULL, task TEXT NOT NULL, answer TEXT NOT NULL, confidence TEXT NOT NULL,
        ms INTEGER NOT NULL, viewer_version TEXT NOT NULL, timestamp TEXT NOT NULL, received TEXT NOT NULL,
        PRIMARY KEY (reader, item, question, version), UNIQUE (reader, item, question, nonce)) WITHOUT ROWID""",
    "CREATE TRIGGER answers_are_not_changed BEFORE UPDATE ON answers BEGIN SELECT RAISE(ABORT, 'answers are never changed'); END",
    "CREATE TRIGGER answers_are_not_deleted BEFORE DELETE ON answers BEGIN SELECT RAISE(ABORT, 'answers are never deleted'); END",
)
LAST = "version = (SELECT MAX(version) FROM answers b WHERE (b.reader, b.item, b.question) = (a.reader, a.item, a.question))"


class StoreError(ValueError):
    """A file that is not this study's answers."""


class Locked(ValueError):
    """An answer that may no longer be changed, or a nonce that was used for another answer."""


@dataclass(frozen=True)
class Given:
    """One answer to store: `row` has the columns `KEPT` as text; `locked`: given before the reveal, so the first one stands."""

    reader: str
    item: str
    question: str
    nonce: str
    row: Mapping[str, str]
    locked: bool


class Store:
    """The answers of one pack. Safe for threads; a second process (a new token, a backup) may open the same file beside it."""

    def __init__(self, path: Path, pack: Pack) -> None:
        """Open or create. Raises `StoreError` if the file is something else, of another version, or of another pack."""
        self.path = Path(path)
        self._lock = threading.Lock()
        os.close(
            os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        )  # answers are of people: nobody else on the machine reads them
        self._database = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            self._open(pack)
        except sqlite3.DatabaseError as error:
            self.close()
            raise StoreError(f"{path} cannot be used as a study's database ({error}); name another file") from None
        except StoreError:
            self.close()
            raise

    def _open(self, pack: Pack) -> None:
        db = self._database
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        (ours,) = db.execute("PRAGMA application_id").fetchone()
        if tables and ours != OURS:
            raise StoreError(f"{self.path} is a database of something else; name another file")
        (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{self.path} lies on a disk without write-ahead logging (a network folder?): use a local one")
        db.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            self._create(pack)
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version != SCHEMA:
                raise StoreError(f"{self.path} has schema {version}, this medgen {SCHEMA}: use the medgen that began the study")
            self._check_pack(pack)
        (health,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if health != "ok":
            raise StoreError(f"{self.path} is damaged ({health}); restore a copy")

    def _create(self, pack: Pack) -> None:
        if self._database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() != (0,):
            return
        for statement in TABLES:
            self._database.execute(statement)
        self._database.execute(f"PRAGMA application_id={OURS}")
        self._database.execute(f"PRAGMA user_version={SCHEMA}")
        self._database.executemany("INSERT INTO study VALUES (?, ?)", identity(pack).items())

    def _check_pack(self, pack: Pack) -> None:
        found, own = dict(self._database.execute("SELECT name, value FROM study")), identity(pack)
        if found != own:
            same = found.get("pack_sha256") == own["pack_sha256"]
            why = " (the same cases in another page or order)" if same else ""
            raise StoreError(
                f"{self.path} holds answers to another pack: study {found.get('study_id')!r}, pack {found.get('pack_sha256', '')[:12]}…, "
                f"files {found.get('files_sha256', '')[:12]}…; {pack.folder} is study {pack.study_id!r}, pack {pack.sha256[:12]}…, "
                f"files {own['files_sha256'][:12]}…{why}. Name another --database, or serve the pack that was begun"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")  # returns when the log is on the disk
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def add(self, given: Sequence[Given]) -> int:
        """Store all of them or none; how many were new. Repeats (same nonce) and locked answers given again alike change nothing.

        Raises `Locked` where an answer given before the reveal would change, or a nonce comes back with another answer.
        """
        received = now()
        with self._transaction() as db:
            return sum(self._add_one(db, one, received) for one in given)

    def _add_one(self, db: sqlite3.Connection, one: Given, received: str) -> bool:
        place = (one.reader, one.item, one.question)
        content = (one.row["answer"], one.row["confidence"])
        where = "FROM answers WHERE reader = ? AND item = ? AND question = ?"
        known = db.execute(f"SELECT answer, confidence {where} AND nonce = ?", (*place, one.nonce)).fetchone()
        if known is not None:
            if known != content:
                raise Locked(f"nonce {one.nonce!r} was used for another answer to {one.question!r} of item {one.item}")
            return False
        last = db.execute(f"SELECT answer, confidence, version {where} ORDER BY version DESC LIMIT 1", place).fetchone()
        if last is not None and one.locked:
            if last[:2] != content:
                raise Locked(f"{one.question!r} of item {one.item} was answered before the reveal and can no longer be changed")
            return False
        values = (*place, 1 if last is None else last[2] + 1, one.nonce, *(one.row[name] for name in KEPT), received)
        db.execute(f"INSERT INTO answers VALUES ({', '.join('?' * len(values))})", values)
        return True

    def rows(self, reader: str | None = None) -> list[dict[str, str]]:
        """Every question's last answer (of one reader), by reader and position; `received` is the server's time of it."""
        names = ("reader", "item", "question", *KEPT, "received")
        chosen, values = ("", ()) if reader is None else ("reader = ? AND ", (reader,))
        query = f"SELECT {', '.join(names)} FROM answers a WHERE {chosen}{LAST} ORDER BY reader, position, received, question"
        with self._lock:
            found = self._database.execute(query, values).fetchall()
        return [dict(zip(names, map(str, row), strict=True)) for row in found]

    def answered(self, reader: str, item: str) -> set[str]:
        """The questions of an item that a reader has answered."""
        with self._lock:
            found = self._database.execute("SELECT question FROM answers WHERE reader = ? AND item = ?", (reader, item))
            return {question for (question,) in found}

    def versions(self) -> list[tuple[str, str, str, int, str]]:
        """The whole history: (reader, item, question, version, answer)."""
        with self._lock:
            return self._database.execute("SELECT reader, item, question, version, answer FROM answers").fetchall()

    def names(self) -> set[str]:
        """Who has a token."""
        with self._lock:
            return {name for (name,) in self._database.execute("SELECT reader FROM logins")}

    def set_tokens(self, tokens: Mapping[str, str]) -> None:
        """Give everyone named a token, in place of an older one; only its SHA-256 is kept."""
        rows = [(name, _digest(token), now()) for name, token in tokens.items()]
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO logins VALUES (?, ?, ?)", rows)

    def holder(self, token: str) -> str | None:
        """Whose token it is. Tokens are 256 random bits, so a plain hash of them cannot be searched, nor its look-up be timed."""
        with self._lock:
            found = self._database.execute("SELECT reader FROM logins WHERE token_sha256 = ?", (_digest(token),)).fetchone()
        return None if found is None else str(found[0])

    def close(self) -> None:
        """Folds the log into the file, if no other process has it open."""
        with self._lock:
            self._database.close()


def identity(pack: Pack) -> dict[str, str]:
    """What ties a database to a pack: its study, its cases, and all its files (page and orders as well)."""
    files = hashlib.sha256((pack.folder / "SHA256SUMS").read_bytes()).hexdigest()
    return {"study_id": pack.study_id, "pack_sha256": pack.sha256, "files_sha256": files}


def now() -> str:
    """Universal time to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
