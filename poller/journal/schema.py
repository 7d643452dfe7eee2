"""The tables of a journal, and how one of an earlier version is brought up to date."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from poller.errors import JournalError

VERSION = 2

_TABLES = (
    "CREATE TABLE identity (uuid TEXT NOT NULL, version INTEGER NOT NULL)",
    "CREATE TABLE runs ("
    " source TEXT NOT NULL, job_id TEXT NOT NULL, run_id TEXT NOT NULL,"
    " state TEXT NOT NULL, since_ms INTEGER NOT NULL, known BLOB NOT NULL,"
    " PRIMARY KEY (source, job_id, run_id)) WITHOUT ROWID",
    "CREATE TABLE events ("
    " offset INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, sequence INTEGER NOT NULL,"
    " type TEXT NOT NULL, job_id TEXT NOT NULL, at_ms INTEGER NOT NULL, body BLOB NOT NULL,"
    " run_id TEXT NOT NULL DEFAULT '')",
    "CREATE TABLE sources (source TEXT PRIMARY KEY, condition BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE marks ("
    " source TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,"
    " PRIMARY KEY (source, name)) WITHOUT ROWID",
    "CREATE TABLE cursors (sink TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE dead_letters ("
    " sink TEXT NOT NULL, offset INTEGER NOT NULL, reason TEXT NOT NULL, body BLOB NOT NULL,"
    " PRIMARY KEY (sink, offset)) WITHOUT ROWID",
)
_INDEXES = (
    "CREATE INDEX runs_by_state ON runs (source, state, since_ms, job_id, run_id)",
    "CREATE INDEX events_of_source ON events (source, offset, at_ms, type)",
    "CREATE INDEX events_of_run ON events (source, job_id, run_id)",
)
_STEPS: Mapping[int, Sequence[str]] = {
    1: (
        "ALTER TABLE runs RENAME COLUMN changed_ms TO since_ms",
        "UPDATE runs SET"
        " since_ms = coalesce(json_extract(CAST(known AS TEXT), '$.last_ms'), since_ms)",
        "ALTER TABLE events ADD COLUMN run_id TEXT NOT NULL DEFAULT ''",
        "UPDATE events SET run_id = json_extract(CAST(body AS TEXT), '$.subject')"
        " WHERE job_id <> ''",
        "DROP INDEX events_of_source",
        *_INDEXES,
    ),
}
"""What makes a journal of a version one of the next."""


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make a new file a journal, and an old journal one of today; refuse what is none.

    Raises:
        JournalError: it is no journal, or of a newer version; it is left as it is.
    """
    if not _tables(db):
        identity = (str(uuid.uuid4()), VERSION)
        _at_once(db, [*_TABLES, *_INDEXES], "INSERT INTO identity VALUES (?, ?)", identity)
    while (version := _version(db, path)) in _STEPS:
        _at_once(db, _STEPS[version], "UPDATE identity SET version = ?", (version + 1,))
    look(db, path)


def _at_once(
    db: sqlite3.Connection, statements: Sequence[str], last: str, values: Sequence[object]
) -> None:
    db.execute("BEGIN IMMEDIATE")
    for statement in statements:
        db.execute(statement)
    db.execute(last, values)
    db.execute("COMMIT")


def look(db: sqlite3.Connection, path: Path) -> None:
    """Refuse what is no journal of today.

    Raises:
        JournalError: so it is.
    """
    version = _version(db, path)
    if version != VERSION:
        advice = "; the daemon brings it up to date when it starts" if version in _STEPS else ""
        raise JournalError(
            f"{path}: the journal has version {version}, this program reads {VERSION}{advice}"
        )


def _version(db: sqlite3.Connection, path: Path) -> int:
    if "identity" not in _tables(db):
        raise JournalError(f"{path}: this is no journal")
    version: int = db.execute("SELECT version FROM identity").fetchone()[0]
    return version


def _tables(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
