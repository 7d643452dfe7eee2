"""What people read of a journal: page by page, at a cost that does not follow its size."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from poller.errors import JournalError
from poller.events import Draft
from poller.journal import Journal, open_journal, read_journal
from poller.journal.pages import Pages, Place, Wanted, open_pages, page
from poller.known import Commit, Condition, Known
from poller.runs import Job, State

MINUTE_MS = 60_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    async with open_journal(path) as journal:
        yield journal


@pytest.fixture
def pages(journal: Journal) -> Iterator[Pages]:
    with open_pages(journal.path) as pages:
        yield pages


def known(run_id: str, since_ms: int = 7, **fields: Any) -> Known:
    run = Known(job=Job("j"), run_id=run_id, state=State.RUNNING, last_ms=since_ms)
    return msgspec.structs.replace(run, **fields)


def wanted(*sources: str, **fields: Any) -> Wanted:
    return Wanted(sources=sources or ("a", "b"), **fields)


async def walk(pages: Pages, wish: Wanted) -> list[list[str]]:
    """The run ids of every page."""
    found = []
    while True:
        runs, place = await pages.runs(wish)
        found.append([run.run_id for _, run in runs])
        if place is None:
            return found
        wish = msgspec.structs.replace(wish, after=place)


# Runs


async def test_runs_come_the_newest_change_first_whatever_their_source_and_state(
    journal: Journal, pages: Pages
) -> None:
    await journal.commit(
        Commit(source="a", runs=[known("1", 10), known("3", 30, state=State.FAILED)])
    )
    await journal.commit(
        Commit(source="b", runs=[known("2", 20, state=State.QUEUED), known("4", 40)])
    )
    await journal.commit(Commit(source="c", runs=[known("5", 50)]))
    assert await walk(pages, wanted()) == [["4", "3", "2", "1"]]
    assert await walk(pages, wanted(limit=3)) == [["4", "3", "2"], ["1"]]
    assert await walk(pages, wanted(limit=2)) == [["4", "3"], ["2", "1"]]
    assert await walk(pages, wanted("a")) == [["3", "1"]]
    assert await walk(pages, wanted(states=[State.RUNNING])) == [["4", "1"]]
    assert await walk(pages, wanted("b", states=[State.QUEUED, State.FAILED])) == [["2"]]
    assert await walk(pages, wanted("nobody")) == [[]]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_every_run_is_on_one_page_whatever_shares_its_instant(
    journal: Journal, pages: Pages, limit: int
) -> None:
    random = Random(limit)
    everything = set()
    for source in "abc":
        runs = [
            known(
                str(number),
                random.randrange(4),
                job=Job(f"j{number % 3}"),
                state=random.choice(list(State)),
            )
            for number in range(30)
        ]
        everything |= {(source, run.job.id, run.run_id) for run in runs}
        await journal.commit(Commit(source=source, runs=runs))
    found: list[tuple[Place, str]] = []
    wish = wanted("b", "a", "c", limit=limit)
    while True:
        runs_, place = await pages.runs(wish)
        found += [((run.since_ms, source, run.job.id, run.run_id), source) for source, run in runs_]
        if place is None:
            break
        wish = msgspec.structs.replace(wish, after=place)
    places = [place for place, _ in found]
    assert places == sorted(places, reverse=True)
    assert len(places) == len(set(places)) == 90
    assert {place[1:] for place in places} == everything


async def test_pages_are_stable_while_runs_change(journal: Journal, pages: Pages) -> None:
    await journal.commit(Commit(source="a", runs=[known(str(n), n) for n in range(10)]))
    first, place = await pages.runs(wanted("a", limit=4))
    changed = [known("9", 100), known("2", 101, state=State.FAILED), known("new", 102)]
    await journal.commit(Commit(source="a", runs=changed, dropped=[("j", "6")]))
    rest = await walk(pages, wanted("a", limit=4, after=place))
    assert [run.run_id for _, run in first] == ["9", "8", "7", "6"]
    assert rest == [["5", "4", "3", "1"], ["0"]]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"text": "LOAD"}, ["1"]),
        ({"text": "straße"}, ["2"]),
        ({"text": "STRASSE"}, ["2"]),
        ({"text": "ops"}, ["2", "1"]),
        ({"text": "alice"}, ["1"]),
        ({"text": "j2"}, ["2"]),
        ({"text": "%"}, []),
        ({"text": "'"}, []),
        ({"job": "load orders"}, ["1"]),
        ({"job": "j2"}, ["2"]),
        ({"job": "j"}, []),
        ({"job": "j2", "text": "load"}, []),
    ],
)
async def test_runs_are_found_by_what_people_call_them(
    journal: Journal, pages: Pages, fields: dict[str, str], found: list[str]
) -> None:
    runs = [
        known("1", 1, job=Job("j1", "load orders", "ops", "alice")),
        known("2", 2, job=Job("j2", "Straße", "OPS")),
    ]
    await journal.commit(Commit(source="a", runs=runs))
    assert await walk(pages, wanted(**fields)) == [found]


async def test_one_run_is_found_by_its_ids(journal: Journal, pages: Pages) -> None:
    run = known("r|\n\x00", job=Job("a/b\x00😀"))
    await journal.commit(Commit(source="a", runs=[run]))
    assert await pages.run("a", run.job.id, run.run_id) == run
    assert await pages.run("b", run.job.id, run.run_id) is None


# Cost

MANY = 50_000


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal that knows of 50 000 runs, of which the active ones are the oldest."""
    path = tmp_path_factory.mktemp("crowded") / "journal.db"
    asyncio.run(_crowd(path))
    return path


async def _crowd(path: Path) -> None:
    async with open_journal(path) as journal:
        for source in "abcde":
            runs = [
                known(str(n), n, job=Job(f"j{n % 100}", f"job {n % 100}"), state=_state(n))
                for n in range(MANY // 5)
            ]
            await journal.commit(Commit(source=source, runs=runs))


def _state(number: int) -> State:
    if number < 10:
        return State.RUNNING
    return State.FAILED if number % 100 == 0 else State.SUCCEEDED


@contextlib.contextmanager
def counted(path: Path) -> Iterator[tuple[sqlite3.Connection, list[int]]]:
    """A connection, and how many hundreds of SQLite's operations it has done."""
    hundreds = [0]

    def count() -> int:
        hundreds[0] += 1
        return 0

    with contextlib.closing(sqlite3.connect(path)) as db:
        db.set_progress_handler(count, 100)
        yield db, hundreds


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 100),
        ({"states": [State.RUNNING]}, 50),
        ({"states": [State.FAILED]}, 100),
        ({"states": [State.UNKNOWN]}, 0),
        ({"after": (5000, "c", "j50", "5000")}, 100),
        ({"after": (5000, "c", "j50", "5000"), "states": [State.FAILED]}, 100),
    ],
)
def test_a_page_costs_the_same_however_many_runs_are_known(
    crowded: Path, fields: dict[str, Any], size: int
) -> None:
    with counted(crowded) as (db, hundreds):
        found, place = page(db, wanted(*"abcde", **fields))
        assert len(found) == size
        assert (place is None) == (size < 100)
        assert hundreds[0] < 60


def test_a_search_looks_at_so_many_runs_and_then_gives_an_empty_page(crowded: Path) -> None:
    empty, place = 0, None
    with counted(crowded) as (db, hundreds):
        while True:
            before = hundreds[0]
            found, place = page(db, wanted(*"abcde", text="nowhere", after=place))
            assert found == []
            assert hundreds[0] - before < 2000
            if place is None:
                break
            empty += 1
    assert empty == MANY // 5000 - 1


def test_walking_through_all_runs_shows_each_once(crowded: Path) -> None:
    seen = set()
    wish = wanted(*"abcde", limit=500)
    with counted(crowded) as (db, hundreds):
        while True:
            found, place = page(db, wish)
            seen |= {(source, run.run_id) for source, run in found}
            if place is None:
                break
            wish = msgspec.structs.replace(wish, after=place)
        assert hundreds[0] * 100 < MANY * 40
    assert len(seen) == MANY


# Events


def draft(
    sequence: int, kind: str = "job.running", run_id: str = "1", at_ms: int | None = None
) -> Draft:
    at_ms = sequence if at_ms is None else at_ms
    return Draft(sequence, f"dev.poller.{kind}", "j", at_ms, b"%d" % sequence, run_id)


async def fill(journal: Journal, source: str, *drafts: Draft) -> None:
    await journal.commit(Commit(source=source, events=drafts))


async def test_a_runs_events_are_told_from_the_newest_on(journal: Journal, pages: Pages) -> None:
    await fill(journal, "a", draft(1), draft(2, run_id="2"), draft(3), draft(4))
    await fill(journal, "b", draft(5))
    assert await pages.events_of("a", "j", "1", 10) == [b"4", b"3", b"1"]
    assert await pages.events_of("a", "j", "1", 2) == [b"4", b"3"]
    assert await pages.events_of("a", "i", "1", 2) == []
    runs = [("a", "j", "2"), ("a", "j", "3"), ("b", "j", "1")]
    assert await pages.newest(runs) == [b"2", None, b"5"]


async def stream(pages: Pages, limit: int, after: int = 0, **which: Sequence[str]) -> list[int]:
    """The offsets of all events, asked for in small steps."""
    found = []
    while True:
        events, reached = await pages.events(after, limit, **which)
        assert reached >= max([after, *(event.offset for event in events)])
        found += [event.offset for event in events]
        if reached == after:
            return found
        after = reached


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_events_are_told_by_source_and_type(
    journal: Journal, pages: Pages, limit: int
) -> None:
    await fill(journal, "a", draft(1), draft(2, "job.failed"))
    await fill(journal, "b", draft(3, "job.failed"), draft(4, "source.down"))
    failed, down = "dev.poller.job.failed", "dev.poller.source.down"
    assert await stream(pages, limit) == [1, 2, 3, 4]
    assert await stream(pages, limit, after=2) == [3, 4]
    assert await stream(pages, limit, after=9) == []
    assert await stream(pages, limit, types=[failed]) == [2, 3]
    assert await stream(pages, limit, types=[failed, down]) == [2, 3, 4]
    assert await stream(pages, limit, sources=["a"], types=[failed]) == [2]
    assert await stream(pages, limit, sources=["a", "b"]) == [1, 2, 3, 4]


async def test_a_filter_that_fits_nothing_moves_on_in_bounded_steps(
    journal: Journal, pages: Pages
) -> None:
    await fill(journal, "a", *(draft(sequence) for sequence in range(1, 6002)))
    events, reached = await pages.events(0, 10, types=["dev.poller.job.failed"])
    assert (events, reached) == ([], 5001)
    assert await pages.events(reached, 10, types=["dev.poller.job.failed"]) == ([], 6001)
    assert await pages.events(6001, 10, types=["dev.poller.job.failed"]) == ([], 6001)


async def test_what_was_pruned_is_passed_over_at_once(journal: Journal, pages: Pages) -> None:
    await fill(journal, "a", *(draft(sequence) for sequence in range(1, 20_001)))
    while await journal.prune(20_000, 20_000, limit=10_000):
        pass
    events, reached = await pages.events(0, 10)
    assert ([event.offset for event in events], reached) == ([20_000], 20_000)


async def test_offsets_and_ages_are_found(journal: Journal, pages: Pages) -> None:
    assert await pages.offset_at(0) is None
    assert await pages.oldest(0) is None
    await fill(journal, "a", draft(1, at_ms=10), draft(2, at_ms=30), draft(3, at_ms=20))
    assert [await pages.offset_at(at_ms) for at_ms in (5, 11, 31)] == [0, 1, None]
    assert [await pages.oldest(offset) for offset in (0, 1, 3)] == [10, 30, None]


async def test_transitions_and_failures_are_counted_by_time(journal: Journal, pages: Pages) -> None:
    await fill(
        journal,
        "a",
        draft(1, at_ms=MINUTE_MS - 1),
        draft(2, at_ms=MINUTE_MS),
        draft(3, "job.failed", at_ms=2 * MINUTE_MS - 1),
        draft(4, "source.down", at_ms=2 * MINUTE_MS),
        draft(5, "job.failed", at_ms=4 * MINUTE_MS),
    )
    await fill(journal, "b", draft(6, at_ms=MINUTE_MS))
    assert await pages.tally("a", 0, MINUTE_MS) == [(0, 1, 0), (1, 2, 1), (4, 1, 1)]
    assert await pages.tally("a", MINUTE_MS, MINUTE_MS) == [(1, 2, 1), (4, 1, 1)]
    assert await pages.tally("b", MINUTE_MS, MINUTE_MS) == [(1, 1, 0)]
    assert await pages.tally("nobody", 0, MINUTE_MS) == []


# Journals of before

VERSION_1 = """
CREATE TABLE identity (uuid TEXT NOT NULL, version INTEGER NOT NULL);
CREATE TABLE runs (
    source TEXT NOT NULL, job_id TEXT NOT NULL, run_id TEXT NOT NULL,
    state TEXT NOT NULL, changed_ms INTEGER NOT NULL, known BLOB NOT NULL,
    PRIMARY KEY (source, job_id, run_id)) WITHOUT ROWID;
CREATE TABLE events (
    offset INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, sequence INTEGER NOT NULL,
    type TEXT NOT NULL, job_id TEXT NOT NULL, at_ms INTEGER NOT NULL, body BLOB NOT NULL);
CREATE INDEX events_of_source ON events (source, offset, at_ms);
CREATE TABLE sources (
    source TEXT PRIMARY KEY, condition BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE marks (
    source TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (source, name)) WITHOUT ROWID;
CREATE TABLE cursors (sink TEXT PRIMARY KEY, offset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE dead_letters (
    sink TEXT NOT NULL, offset INTEGER NOT NULL, reason TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (sink, offset)) WITHOUT ROWID;
INSERT INTO identity VALUES ('an-identity', 1);
INSERT INTO runs VALUES ('a', 'j', '1', 'running', 99,
    CAST('{"job":{"id":"j"},"run_id":"1","state":"running","last_ms":5}' AS BLOB));
INSERT INTO runs VALUES ('a', 'j', '2', 'running', 9,
    CAST('{"job":{"id":"j"},"run_id":"2","state":"running","changed_ms":9}' AS BLOB));
INSERT INTO events (source, sequence, type, job_id, at_ms, body) VALUES
    ('a', 1, 'dev.poller.job.running', 'j', 5, CAST('{"subject":"1"}' AS BLOB)),
    ('a', 2, 'dev.poller.source.down', '', 6, CAST('{"subject":"a"}' AS BLOB)),
    ('a', 3, 'dev.poller.job.running', 'j', 7, CAST('{"subject":"é/\\u0022"}' AS BLOB));
INSERT INTO cursors VALUES ('redis', 2);
"""


@pytest.fixture
def old(path: Path) -> Path:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(VERSION_1)
    return path


def layout(path: Path) -> dict[str, list[Any]]:
    """Every table's and index's columns."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE sql NOTNULL")]
        return {
            name: db.execute(
                'SELECT name, type, "notnull", pk FROM pragma_table_info(?)'
                " UNION ALL SELECT name, '', 0, 0 FROM pragma_index_info(?)",
                (name, name),
            ).fetchall()
            for name in names
        }


async def test_a_journal_of_version_1_is_brought_up_to_date(old: Path, tmp_path: Path) -> None:
    async with open_journal(old) as journal:
        assert journal.uuid == "an-identity"
        assert journal.last_offset == 3
        assert await journal.cursor("redis") == 2
        assert [event.body for event in await journal.read(2, 9)] == [
            '{"subject":"é/\\u0022"}'.encode()
        ]
        with open_pages(old) as pages:
            assert await walk(pages, wanted("a")) == [["2", "1"]]
            assert len(await pages.events_of("a", "j", "1", 9)) == 1
            assert len(await pages.events_of("a", "j", 'é/"', 9)) == 1
            assert await pages.tally("a", 0, 1) == [(5, 1, 0), (7, 1, 0)]
        await journal.commit(Commit(source="a", condition=Condition(contact_ms=1)))
    async with open_journal(tmp_path / "new.db"):
        pass
    assert layout(old) == layout(tmp_path / "new.db")


async def test_an_old_journal_is_not_changed_by_who_only_reads(old: Path) -> None:
    before = old.read_bytes()
    with pytest.raises(JournalError, match="version 1, this program reads 2; the daemon brings it"):
        async with read_journal(old):
            pass
    with pytest.raises(JournalError, match="version 1"), open_pages(old):
        pass
    assert old.read_bytes() == before


async def test_an_old_journal_that_cannot_be_brought_up_to_date_is_left_as_it_was(
    old: Path,
) -> None:
    with contextlib.closing(sqlite3.connect(old)) as db:
        db.execute("UPDATE events SET body = CAST('torn' AS BLOB) WHERE offset = 3")
        db.commit()
    before = layout(old)
    with pytest.raises(JournalError, match="malformed JSON"):
        async with open_journal(old):
            pass
    assert layout(old) == before
