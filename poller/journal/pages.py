"""What people read of a journal, page by page: each step's work is bounded, however much is known.

It has a connection and a thread of its own, so that nobody who looks holds up a relay.
"""

from __future__ import annotations

import heapq
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import msgspec

from poller.events import JOB_TYPE, Recorded
from poller.journal.schema import look
from poller.known import Known
from poller.runs import Ms, State
from poller.sqlite import Reader, reading

Place: TypeAlias = tuple[Ms, str, str, str]
"""Of a run in the order of pages: since when it is in its state, source, job id, run id."""

_FIRST: Place = (1 << 62, "", "", "")
_LOOKED_AT = 5000
"""At most so many runs, or events, are looked at for one page."""
_FAILED = JOB_TYPE + State.FAILED


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs, and how many of them.

    Attributes:
        sources: names of sources; no others are looked at.
        states: any of these.
        job: a job's id or name, or None for any.
        text: what ids, names, group and owner are searched for, in whatever case.
        after: the place to go on from, None to begin.
        limit: at most so many.
    """

    sources: Sequence[str]
    states: Sequence[State] = tuple(State)
    job: str | None = None
    text: str = ""
    after: Place | None = None
    limit: int = 100


class Pages:
    """Reads a journal for people; made by `open_pages` only."""

    def __init__(self, reader: Reader) -> None:
        self._run = reader.run

    async def runs(self, wanted: Wanted) -> tuple[list[tuple[str, Known]], Place | None]:
        """Source and run of a page, the newest change first, and where the next page begins.

        A page may hold less than its limit, or nothing, and yet not be the last.
        """
        return await self._run(partial(page, wanted=wanted))

    async def run(self, source: str, job_id: str, run_id: str) -> Known | None:
        """What is known of a run."""
        sql = "SELECT known FROM runs WHERE source = ? AND job_id = ? AND run_id = ?"
        row = await self._run(lambda db: db.execute(sql, (source, job_id, run_id)).fetchone())
        return None if row is None else _KNOWN.decode(row[0])

    async def newest(self, runs: Sequence[tuple[str, str, str]]) -> list[bytes | None]:
        """The newest event's bytes of each run, given by source, job id and run id."""
        sql = f"{_OF_RUN} LIMIT 1"

        def work(db: sqlite3.Connection) -> list[bytes | None]:
            rows = [db.execute(sql, run).fetchone() for run in runs]
            return [None if row is None else row[0] for row in rows]

        return await self._run(work)

    async def events_of(self, source: str, job_id: str, run_id: str, limit: int) -> list[bytes]:
        """The newest events' bytes of a run, the newest first."""
        values = (source, job_id, run_id, limit)
        rows = await self._run(lambda db: db.execute(f"{_OF_RUN} LIMIT ?", values).fetchall())
        return [row[0] for row in rows]

    async def events(
        self, after: int, limit: int, *, sources: Sequence[str] = (), types: Sequence[str] = ()
    ) -> tuple[list[Recorded], int]:
        """The next events after an offset, in order, and the offset up to which these are all.

        Those of some sources and types, or of any if none are named. It is never behind `after`,
        and stays there only if the journal has nothing after it.
        """
        return await self._run(
            partial(_events, after=after, limit=limit, sources=sources, types=types)
        )

    async def offset_at(self, at_ms: Ms) -> int | None:
        """The offset after which the events stand that were observed since then; None: no such."""
        sql = "SELECT min(offset) - 1 FROM events INDEXED BY events_of_source WHERE at_ms >= ?"
        row = await self._run(lambda db: db.execute(sql, (at_ms,)).fetchone())
        offset: int | None = row[0]
        return offset

    async def oldest(self, after: int) -> Ms | None:
        """When the first event after an offset was observed."""
        sql = "SELECT at_ms FROM events WHERE offset > ? ORDER BY offset LIMIT 1"
        row = await self._run(lambda db: db.execute(sql, (after,)).fetchone())
        return None if row is None else row[0]

    async def tally(self, source: str, since_ms: Ms, slot_ms: Ms) -> list[tuple[int, int, int]]:
        """Slot, transitions and failures in it, of a source since a time; empty slots are left out.

        A slot's number is its beginning divided by `slot_ms`.
        """
        return await self._run(partial(_tally, source=source, since_ms=since_ms, slot_ms=slot_ms))


@contextmanager
def open_pages(path: Path) -> Iterator[Pages]:
    """Open a journal to page through it, also while it is written.

    Raises:
        JournalError: there is none, or it cannot be read.
    """
    with reading(path, partial(look, path=path)) as reader:
        yield Pages(reader)


def page(db: sqlite3.Connection, wanted: Wanted) -> tuple[list[tuple[str, Known]], Place | None]:
    """See `Pages.runs`: the ordered runs of each source and state, merged as far as needed."""
    after = wanted.after or _FIRST
    branches = [
        _branch(db, source, state, after) for source in wanted.sources for state in wanted.states
    ]
    fits = _filter(wanted)
    found: list[tuple[str, Known]] = []
    place = None
    merged = heapq.merge(*branches, key=_place, reverse=True)
    for number, row in enumerate(islice(merged, _LOOKED_AT + 1)):
        if len(found) == wanted.limit or number == _LOOKED_AT:
            return found, place
        place, run = _place(row), _KNOWN.decode(row[4])
        if fits(run):
            found.append((row[1], run))
    return found, None


_Row: TypeAlias = tuple[Ms, str, str, str, bytes]


def _branch(db: sqlite3.Connection, source: str, state: State, after: Place) -> Iterator[_Row]:
    """The runs of a source in a state behind a place, read one by one."""
    before_ms, named, job_id, run_id = after
    if source < named:  # ties with the place come later
        before_ms, job_id, run_id = before_ms + 1, "", ""
    elif source > named:  # and have been already
        job_id, run_id = "", ""
    return db.execute(
        "SELECT since_ms, source, job_id, run_id, known FROM runs"
        " WHERE source = ? AND state = ? AND (since_ms, job_id, run_id) < (?, ?, ?)"
        " ORDER BY since_ms DESC, job_id DESC, run_id DESC",
        (source, state, before_ms, job_id, run_id),
    )


def _place(row: _Row) -> Place:
    return row[:4]


def _filter(wanted: Wanted) -> Callable[[Known], bool]:
    text, job = wanted.text.casefold(), wanted.job

    def fits(run: Known) -> bool:
        its = run.job
        if job is not None and job not in (its.id, its.name):
            return False
        words = (its.id, its.name, its.group, its.owner, run.run_id)
        return not text or any(word is not None and text in word.casefold() for word in words)

    return fits


def _events(
    db: sqlite3.Connection,
    *,
    after: int,
    limit: int,
    sources: Sequence[str],
    types: Sequence[str],
) -> tuple[list[Recorded], int]:
    first, last = db.execute(
        "SELECT min(offset), (SELECT max(offset) FROM events) FROM events WHERE offset > ?",
        (after,),
    ).fetchone()
    if first is None:
        return [], after
    upto = min(last, first + _LOOKED_AT)
    rows = db.execute(
        "SELECT offset, source, sequence, type, job_id, at_ms, body FROM events"
        " WHERE offset BETWEEN :first AND :upto"
        " AND (:sources IS NULL OR source IN (SELECT value FROM json_each(:sources)))"
        " AND (:types IS NULL OR type IN (SELECT value FROM json_each(:types)))"
        " ORDER BY offset LIMIT :limit",
        {
            "first": first,
            "upto": upto,
            "sources": msgspec.json.encode(sources).decode() if sources else None,
            "types": msgspec.json.encode(types).decode() if types else None,
            "limit": limit,
        },
    ).fetchall()
    events = [Recorded(*row) for row in rows]
    return events, events[-1].offset if len(events) == limit else upto


def _tally(
    db: sqlite3.Connection, *, source: str, since_ms: Ms, slot_ms: Ms
) -> list[tuple[int, int, int]]:
    before = db.execute(
        "SELECT offset FROM events INDEXED BY events_of_source WHERE source = ? AND at_ms < ?"
        " ORDER BY offset DESC LIMIT 1",
        (source, since_ms),
    ).fetchone()
    return db.execute(
        "SELECT at_ms / ?, count(*), sum(type = ?) FROM events INDEXED BY events_of_source"
        " WHERE source = ? AND offset > ? AND type GLOB ? GROUP BY 1 ORDER BY 1",
        (slot_ms, _FAILED, source, before[0] if before else 0, f"{JOB_TYPE}*"),
    ).fetchall()


_OF_RUN = (
    "SELECT body FROM events WHERE source = ? AND job_id = ? AND run_id = ? ORDER BY offset DESC"
)
_KNOWN = msgspec.json.Decoder(Known)
