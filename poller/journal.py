"""The journal: the daemon's durable memory. Known runs and ordered events, written together.

Reading has a connection of its own, so that a long read never holds up a write. No SQL leaves
this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from poller.errors import JournalError
from poller.events import Recorded
from poller.known import Known
from poller.runs import Ms
from poller.sqlite import Writer, locked, reading, translated, writing

T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (uuid TEXT NOT NULL, version INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    source TEXT NOT NULL, job_id TEXT NOT NULL, run_id TEXT NOT NULL,
    state TEXT NOT NULL, changed_ms INTEGER NOT NULL, known BLOB NOT NULL,
    PRIMARY KEY (source, job_id, run_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    offset INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, sequence INTEGER NOT NULL,
    type TEXT NOT NULL, job_id TEXT NOT NULL, at_ms INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_source ON events (source, offset);
CREATE TABLE IF NOT EXISTS sources (
    source TEXT PRIMARY KEY, condition BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS marks (
    source TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (source, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS cursors (sink TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead_letters (
    sink TEXT NOT NULL, offset INTEGER NOT NULL, reason TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (sink, offset)) WITHOUT ROWID;
"""
_VERSION = 1
_SELECT = "SELECT offset, source, sequence, type, job_id, at_ms, body FROM events"


class Condition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How it stands with a source, kept over a restart.

    Attributes:
        contact_ms: when first contact began.
        contact_done: one complete listing was read.
        last_good_ms: when the last good poll began.
        up: None until the first poll was good or the source was called down.
        since_ms: since when it is up or down.
        failures: failed polls in a row.
        sequence: of its last event.
    """

    contact_ms: Ms
    contact_done: bool = False
    last_good_ms: Ms | None = None
    up: bool | None = None
    since_ms: Ms = 0
    failures: int = 0
    sequence: int = 0


class Draft(msgspec.Struct, frozen=True, gc=False):
    """An event on its way into the journal: all of `Recorded` but its offset and source."""

    sequence: int
    type: str
    job_id: str
    at_ms: Ms
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What one page changes, written as a whole or not at all.

    `dropped` holds (job id, run id) of runs to forget; an empty value in `marks` removes a mark.
    """

    source: str
    runs: Sequence[Known] = ()
    dropped: Sequence[tuple[str, str]] = ()
    events: Sequence[Draft] = ()
    condition: Condition | None = None
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memories:
    """What the journal holds of one source."""

    runs: list[Known]
    condition: Condition | None
    marks: dict[str, str]


class Journal:
    """An open journal; made by `open_journal` and `read_journal` only.

    Attributes:
        path: the file.
        uuid: identity of this journal; another file is another journal.
        last_offset: of the newest committed event, 0 if there is none.
    """

    def __init__(self, path: Path, writer: Writer | None, reader: sqlite3.Connection) -> None:
        self.path = path
        self._writer = writer
        self._reader = reader
        self._reading = threading.Lock()
        self._grown = asyncio.Event()
        with translated(path):
            row = reader.execute(
                "SELECT uuid, (SELECT coalesce(max(offset), 0) FROM events) FROM identity"
            ).fetchone()
        self.uuid: str = row[0]
        self.last_offset: int = row[1]

    async def commit(self, commit: Commit) -> None:
        """Write this durably; returns once it is on disk, and wakes whoever waits in `grown`.

        Raises:
            JournalError: nothing of it was written.
        """

        def work(db: sqlite3.Connection) -> int | None:
            return _write(db, commit)

        last = await self._write(work)
        if last is not None:
            self.last_offset = max(self.last_offset, last)
            self._grown.set()
            self._grown = asyncio.Event()

    async def grown(self, offset: int) -> None:
        """Wait until there is an event after this offset."""
        while self.last_offset <= offset:
            await self._grown.wait()

    async def load(self, source: str) -> Memories:
        """Everything known of a source, after all that was committed before."""

        def work(db: sqlite3.Connection) -> Memories:
            return _load(db, source)

        return await self._write(work)

    async def runs(self, source: str) -> list[Known]:
        """What is known of a source's runs, without the fingerprints."""
        rows = await self._query("SELECT known FROM runs WHERE source = ?", [source])
        return [_KNOWN.decode(row[0]) for row in rows]

    async def condition(self, source: str) -> Condition | None:
        """How it stands with a source, as last committed."""
        rows = await self._query("SELECT condition FROM sources WHERE source = ?", [source])
        return _CONDITION.decode(rows[0][0]) if rows else None

    async def sources(self) -> list[str]:
        """Every source that the journal knows, sorted."""
        return [row[0] for row in await self._query("SELECT source FROM sources ORDER BY source")]

    async def read(
        self, after: int, limit: int, *, source: str | None = None, max_bytes: int = 4 << 20
    ) -> list[Recorded]:
        """The next events after an offset, in journal order: at most `limit`, about `max_bytes`."""
        where, of_source = ("AND source = ?", [source]) if source else ("", [])
        rows = await self._query(
            f"{_SELECT} WHERE offset > ? {where} ORDER BY offset LIMIT ?",
            [after, *of_source, limit],
        )
        return _within([Recorded(*row) for row in rows], max_bytes)

    async def refresh(self) -> int:
        """Look at what another process has committed; gives `last_offset`."""
        rows = await self._query("SELECT coalesce(max(offset), 0) FROM events")
        self.last_offset = max(self.last_offset, rows[0][0])
        return self.last_offset

    async def last_offsets(self) -> dict[str, int]:
        """Per source, the offset of its newest event."""
        rows = await self._query(
            "SELECT source, (SELECT max(offset) FROM events e WHERE e.source = s.source)"
            " FROM sources s"
        )
        return {source: offset for source, offset in rows if offset is not None}

    async def next_offset(self, source: str, after: int) -> int | None:
        """The offset of a source's first event after this one."""
        rows = await self._query(
            "SELECT min(offset) FROM events WHERE source = ? AND offset > ?", [source, after]
        )
        offset: int | None = rows[0][0]
        return offset

    async def next_ms(self, after: int) -> Ms | None:
        """When the first event after this offset was observed; None if there is none."""
        rows = await self._query(
            "SELECT at_ms FROM events WHERE offset > ? ORDER BY offset LIMIT 1", [after]
        )
        return rows[0][0] if rows else None

    async def count(self, after: int) -> int:
        """How many events stand after an offset, at most 1,000,000."""
        rows = await self._query(
            "SELECT count(*) FROM (SELECT 1 FROM events WHERE offset > ? LIMIT 1000000)", [after]
        )
        counted: int = rows[0][0]
        return counted

    async def count_by_source(self, after: int) -> dict[str, tuple[int, Ms]]:
        """Per source, how many events stand after an offset, and when the first was observed."""
        rows = await self._query(
            "SELECT source, count(*), min(at_ms) FROM events WHERE offset > ? GROUP BY source",
            [after],
        )
        return {source: (count, at_ms) for source, count, at_ms in rows}

    async def offset_at(self, at_ms: Ms) -> int:
        """The offset after which the events stand that were observed since then."""
        rows = await self._query("SELECT min(offset) FROM events WHERE at_ms >= ?", [at_ms])
        first: int | None = rows[0][0]
        return self.last_offset if first is None else first - 1

    async def offset_of(self, source: str, sequence: int) -> int | None:
        """The offset of an event given by source and sequence, or of the next one kept."""
        rows = await self._query(
            "SELECT min(offset) FROM events WHERE source = ? AND sequence >= ?", [source, sequence]
        )
        offset: int | None = rows[0][0]
        return offset

    async def cursor(self, sink: str) -> int:
        """The offset up to which a sink has everything, 0 at first."""
        rows = await self._query("SELECT offset FROM cursors WHERE sink = ?", [sink])
        return rows[0][0] if rows else 0

    async def advance(self, sink: str, offset: int) -> None:
        """Move a sink's cursor."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO cursors VALUES (?, ?)", (sink, offset))

        await self._write(work)

    async def bury(self, sink: str, event: Recorded, reason: str) -> None:
        """Set aside an event that can never be delivered to a sink."""
        row = (sink, event.offset, reason, event.body)

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO dead_letters VALUES (?, ?, ?, ?)", row)

        await self._write(work)

    async def prune(self, before_ms: Ms, delivered: int, *, limit: int = 500) -> int:
        """Delete a few of the oldest events, if observed before a time and delivered everywhere.

        Returns how many were deleted; fewer than `limit` means that there are no more.
        """

        def work(db: sqlite3.Connection) -> int:
            return db.execute(
                "DELETE FROM events WHERE offset IN (SELECT offset FROM"
                " (SELECT offset, at_ms FROM events WHERE offset <= ? ORDER BY offset LIMIT ?)"
                " WHERE at_ms < ?)",
                (delivered, limit, before_ms),
            ).rowcount

        return await self._write(work)

    def check(self) -> None:
        """Whether the journal still writes.

        Raises:
            JournalError: it does not, with the reason.
        """
        if self._writer is not None:
            self._writer.check()

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._writer is None:
            raise JournalError(f"{self.path}: opened for reading only")
        return await self._writer.run(work)

    async def _query(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        def run() -> list[Any]:
            with self._reading, translated(self.path):
                return self._reader.execute(sql, values).fetchall()

        return await asyncio.to_thread(run)


@contextlib.asynccontextmanager
async def open_journal(path: Path) -> AsyncIterator[Journal]:
    """Open the journal for writing, making it and its folder if need be; only its owner may read.

    Raises:
        JournalError: it cannot be opened, is no journal, is of a newer version, or is in use.
    """
    with locked(path), writing(path, _prepare) as writer, reading(path) as reader:
        yield Journal(path, writer, reader)


@contextlib.asynccontextmanager
async def read_journal(path: Path) -> AsyncIterator[Journal]:
    """Open a journal to read it while a daemon may be writing it.

    Raises:
        JournalError: there is none, or it cannot be read.
    """
    with reading(path) as reader:
        yield Journal(path, None, reader)


def _prepare(db: sqlite3.Connection) -> None:
    db.executescript(_SCHEMA)
    if db.execute("SELECT count(*) FROM identity").fetchone()[0] == 0:
        db.execute("INSERT INTO identity VALUES (?, ?)", (str(uuid.uuid4()), _VERSION))
    version = db.execute("SELECT version FROM identity").fetchone()[0]
    if version != _VERSION:
        raise JournalError(f"the journal has version {version}, this program reads {_VERSION}")


def _write(db: sqlite3.Connection, commit: Commit) -> int | None:
    """Write one commit inside a transaction; the offset of its last event, if it has any."""
    source = commit.source
    if commit.dropped:
        db.executemany(
            "DELETE FROM runs WHERE source = ? AND job_id = ? AND run_id = ?",
            [(source, *key) for key in commit.dropped],
        )
    db.executemany(
        "INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?)",
        [
            (source, run.job.id, run.run_id, run.state, run.changed_ms, _kept(run))
            for run in commit.runs
        ],
    )
    db.executemany(
        "INSERT INTO events (source, sequence, type, job_id, at_ms, body)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        [(source, e.sequence, e.type, e.job_id, e.at_ms, e.body) for e in commit.events],
    )
    if commit.condition is not None:
        condition = msgspec.json.encode(commit.condition)
        db.execute("INSERT OR REPLACE INTO sources VALUES (?, ?)", (source, condition))
    _write_marks(db, source, commit.marks)
    if not commit.events:
        return None
    last: int = db.execute("SELECT max(offset) FROM events").fetchone()[0]
    return last


def _write_marks(db: sqlite3.Connection, source: str, marks: Mapping[str, str]) -> None:
    for name, value in marks.items():
        if value:
            db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?, ?)", (source, name, value))
        else:
            db.execute("DELETE FROM marks WHERE source = ? AND name = ?", (source, name))


def _load(db: sqlite3.Connection, source: str) -> Memories:
    runs = db.execute("SELECT known FROM runs WHERE source = ?", (source,))
    condition = db.execute("SELECT condition FROM sources WHERE source = ?", (source,)).fetchone()
    marks = db.execute("SELECT name, value FROM marks WHERE source = ?", (source,))
    return Memories(
        runs=[_KNOWN.decode(row[0]) for row in runs],
        condition=_CONDITION.decode(condition[0]) if condition else None,
        marks=dict(marks.fetchall()),
    )


def _within(events: list[Recorded], max_bytes: int) -> list[Recorded]:
    """The start of a batch that keeps below a size, at least one event."""
    total = 0
    for number, event in enumerate(events):
        total += len(event.body)
        if total > max_bytes and number:
            return events[:number]
    return events


def _kept(run: Known) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(run, fingerprint=0))


_KNOWN = msgspec.json.Decoder(Known)
_CONDITION = msgspec.json.Decoder(Condition)
