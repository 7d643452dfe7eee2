"""The journal: the daemon's durable memory. Known runs and ordered events, written together.

No SQL leaves this folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec

from poller.errors import JournalError
from poller.events import Recorded
from poller.journal.schema import look, prepare
from poller.known import Commit, Condition, Known, Memories, thrifty
from poller.runs import Ms
from poller.sqlite import Reader, Writer, locked, reading, writing

T = TypeVar("T")

_SELECT = "SELECT offset, source, sequence, type, job_id, at_ms, body FROM events"


class Journal:
    """An open journal; made by `open_journal` and `read_journal` only.

    Attributes:
        path: the file.
        uuid: identity of this journal; another file is another journal.
        last_offset: of the newest committed event, 0 if there is none.
        threads: name → who waits for a thread of it.
    """

    def __init__(self, path: Path, writer: Writer | None, reader: Reader) -> None:
        self.path = path
        self.threads = {"journal reader": reader.waiting}
        if writer is not None:
            self.threads["journal writer"] = writer.waiting
        self._writer = writer
        self._query = reader.rows
        self._grown = asyncio.Event()
        rows = reader.rows_now(
            "SELECT uuid, (SELECT coalesce(max(offset), 0) FROM events) FROM identity"
        )
        self.uuid: str = rows[0][0]
        self.last_offset: int = rows[0][1]

    async def commit(self, commit: Commit) -> None:
        """Write this durably; returns once it is on disk, and wakes whoever waits in `grown`.

        A cancelled caller undoes nothing: it is written, and they are woken.

        Raises:
            JournalError: nothing of it was written.
        """
        written = self._run(partial(_write, commit=commit))
        written.add_done_callback(self._written)
        await asyncio.shield(written)

    def _written(self, written: asyncio.Future[int | None]) -> None:
        last = None if written.exception() else written.result()
        if last is not None:
            self.last_offset = max(self.last_offset, last)
            self._grown.set()
            self._grown = asyncio.Event()

    async def settled(self) -> None:
        """Wait until all that was committed before is on disk, and `last_offset` says so.

        Raises:
            JournalError: the journal does not write.
        """
        await self._run(lambda _: None)

    async def grown(self, offset: int) -> None:
        """Wait until this process has committed an event after this offset."""
        while self.last_offset <= offset:
            await self._grown.wait()

    async def load(self, source: str) -> Memories:
        """Everything known of a source, after all that was committed before."""
        return await self._run(partial(_load, source=source))

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
        rows = await self._query("SELECT source, max(offset) FROM events GROUP BY source")
        return dict(rows)

    async def next_offset(self, source: str, after: int) -> int | None:
        """The offset of a source's first event after this one."""
        rows = await self._query(
            "SELECT min(offset) FROM events WHERE source = ? AND offset > ?", [source, after]
        )
        offset: int | None = rows[0][0]
        return offset

    async def count_by_source(self, after: int) -> dict[str, tuple[int, Ms]]:
        """Per source, how many events stand after an offset, and when the oldest was observed."""
        rows = await self._query(
            "SELECT source, count(*), min(at_ms) FROM events WHERE offset > ? GROUP BY source",
            [after],
        )
        return {source: (count, at_ms) for source, count, at_ms in rows}

    async def offset_at(self, at_ms: Ms) -> int:
        """The offset after which the events stand that were observed since then."""
        rows = await self._query(
            "SELECT min(offset) FROM events INDEXED BY events_of_source WHERE at_ms >= ?", [at_ms]
        )
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

        await self._run(work)

    async def bury(self, sink: str, event: Recorded, reason: str) -> None:
        """Set aside an event that can never be delivered to a sink."""
        row = (sink, event.offset, reason, event.body)

        def work(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO dead_letters VALUES (?, ?, ?, ?)", row)

        await self._run(work)

    async def prune(self, before_ms: Ms, delivered: int, *, limit: int = 500) -> int:
        """Delete a few of the oldest events, if observed before a time and delivered everywhere.

        What was set aside of them goes too. Returns how many events were deleted; fewer than
        `limit` means that there are no more.
        """

        def work(db: sqlite3.Connection) -> int:
            deleted = db.execute(
                "DELETE FROM events WHERE offset IN (SELECT offset FROM"
                " (SELECT offset, at_ms FROM events WHERE offset <= ? ORDER BY offset LIMIT ?)"
                " WHERE at_ms < ?)",
                (delivered, limit, before_ms),
            ).rowcount
            db.execute("DELETE FROM dead_letters WHERE offset NOT IN (SELECT offset FROM events)")
            return deleted

        return await self._run(work)

    def check(self) -> None:
        """Whether the journal still writes.

        Raises:
            JournalError: it does not, or it waits for room on its disk; with the reason.
        """
        if self._writer is not None:
            self._writer.check()

    def hurry(self) -> None:
        """The end is near: what cannot be written since the disk is full fails, and waits no more.

        Until then it waits, and so does everybody who has something to be written.
        """
        if self._writer is not None:
            self._writer.hurry()

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        if self._writer is None:
            raise JournalError(f"{self.path}: opened for reading only")
        return self._writer.run(work)


@contextlib.asynccontextmanager
async def open_journal(path: Path) -> AsyncIterator[Journal]:
    """Open the journal for writing, making it and its folder if need be; only its owner may read.

    Raises:
        JournalError: it cannot be opened, is no journal, is of a newer version, or is in use.
    """
    with (
        locked(path),
        writing(path, partial(prepare, path=path)) as writer,
        reading(path, partial(look, path=path)) as reader,
    ):
        yield Journal(path, writer, reader)


@contextlib.asynccontextmanager
async def read_journal(path: Path) -> AsyncIterator[Journal]:
    """Open a journal to read it while a daemon may be writing it.

    Raises:
        JournalError: there is none, or it cannot be read.
    """
    with reading(path, partial(look, path=path)) as reader:
        yield Journal(path, None, reader)


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
            (source, run.job.id, run.run_id, run.state, run.since_ms, _kept(run))
            for run in commit.runs
        ],
    )
    db.executemany(
        "INSERT INTO events (source, sequence, type, job_id, at_ms, body, run_id)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(source, e.sequence, e.type, e.job_id, e.at_ms, e.body, e.run_id) for e in commit.events],
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
        runs=[thrifty(_KNOWN.decode(row[0])) for row in runs],
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
