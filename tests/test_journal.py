"""The journal: what is acknowledged is there, and nothing is ever half there."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import sqlite3
import subprocess
import sys
import textwrap
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from poller.errors import JournalError
from poller.events import Draft, Recorded
from poller.journal import Journal, open_journal, read_journal
from poller.known import Commit, Condition, Known, Memories
from poller.runs import Job, State
from tests.crashing import fill_disk
from tests.daemon import until

DAY_MS = 86_400_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "poller" / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    async with open_journal(path) as journal:
        yield journal


def known(run_id: str, **fields: Any) -> Known:
    job = Job("j", "a job", "a group", None, "http://x/")
    run = Known(job=job, run_id=run_id, state=State.RUNNING, changed_ms=7)
    return msgspec.structs.replace(run, **fields)


def draft(sequence: int, *, at_ms: int = 0, size: int = 2) -> Draft:
    body = b"%0*d" % (size, sequence)
    return Draft(sequence, "dev.poller.job.running", "j", at_ms or sequence * 1000, body)


def commit_of(first: int, last: int = 0, *, source: str = "a", **fields: Any) -> Commit:
    """A commit of events by sequence, with the condition that goes with them."""
    last = last or first
    events = [draft(sequence, **fields) for sequence in range(first, last + 1)]
    return Commit(source=source, events=events, condition=Condition(contact_ms=1, sequence=last))


async def fill(journal: Journal, *commits: Commit) -> None:
    for commit in commits:
        await journal.commit(commit)


def places(events: list[Recorded]) -> list[tuple[int, str, int]]:
    return [(event.offset, event.source, event.sequence) for event in events]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


# Commits


async def test_an_empty_journal_holds_nothing(journal: Journal) -> None:
    assert journal.last_offset == 0
    assert await journal.load("a") == Memories(runs=[], condition=None, marks={})
    assert await journal.read(0, 10) == []
    assert await journal.runs("a") == []
    assert await journal.condition("a") is None
    assert await journal.sources() == []
    assert await journal.last_offsets() == {}
    assert await journal.cursor("redis") == 0
    journal.check()


async def test_a_commit_is_there_as_a_whole(journal: Journal) -> None:
    condition = Condition(contact_ms=5, contact_done=True, last_good_ms=6, up=False, sequence=2)
    runs = [known("1"), known("2", state=State.FAILED)]
    commit = Commit(
        source="a",
        runs=runs,
        events=[draft(1), draft(2)],
        condition=condition,
        marks={"since": "9"},
    )
    await journal.commit(commit)
    assert journal.last_offset == 2
    assert await journal.load("a") == Memories(runs=runs, condition=condition, marks={"since": "9"})
    assert await journal.runs("a") == runs
    assert await journal.condition("a") == condition
    assert await journal.sources() == ["a"]
    assert await journal.read(0, 10) == [
        Recorded(1, "a", 1, "dev.poller.job.running", "j", 1000, b"01"),
        Recorded(2, "a", 2, "dev.poller.job.running", "j", 2000, b"02"),
    ]


async def test_everything_known_of_a_run_is_kept_but_its_fingerprint(journal: Journal) -> None:
    run = Known(
        job=Job("j\x00/😀", "n", "g", "o", "u"),
        run_id="r|\n",
        state=State.UNKNOWN,
        vendor_state="WEIRD",
        substate="overload",
        scope="batch",
        attempt=3,
        marker="17",
        told=21,
        floor_ms=1,
        last_ms=2,
        changed_ms=3,
        queued_ms=4,
        started_ms=5,
        ended_ms=6,
        vanished=True,
        was="j@1",
        fingerprint=77,
    )
    await journal.commit(Commit(source="a", runs=[run]))
    kept = msgspec.structs.replace(run, fingerprint=0)
    assert await journal.runs("a") == [kept]
    assert (await journal.load("a")).runs == [kept]


async def test_a_later_commit_replaces_drops_and_leaves_the_rest(journal: Journal) -> None:
    await fill(
        journal,
        Commit(source="a", runs=[known("1"), known("2"), known("3")], marks={"x": "1", "y": "2"}),
        Commit(source="b", runs=[known("1")], marks={"x": "9"}),
        Commit(
            source="a",
            runs=[known("3", attempt=2)],
            dropped=[("j", "1"), ("j", "never known")],
            marks={"x": "", "y": "3", "z": ""},
        ),
    )
    memories = await journal.load("a")
    assert memories.runs == [known("2"), known("3", attempt=2)]
    assert memories.marks == {"y": "3"}
    assert await journal.load("b") == Memories(runs=[known("1")], condition=None, marks={"x": "9"})


async def test_a_run_may_be_dropped_and_kept_under_its_real_name_at_once(journal: Journal) -> None:
    await journal.commit(Commit(source="a", runs=[known("17@5")]))
    renamed = known("900", was="17@5")
    await journal.commit(Commit(source="a", runs=[renamed], dropped=[("j", "17@5")]))
    assert await journal.runs("a") == [renamed]


async def test_commits_are_written_in_the_order_in_which_they_were_asked(
    journal: Journal,
) -> None:
    commits = [commit_of(sequence, source="ab"[sequence % 2]) for sequence in range(1, 101)]
    await asyncio.gather(*map(journal.commit, commits))
    assert journal.last_offset == 100
    assert places(await journal.read(0, 1000)) == [
        (sequence, "ab"[sequence % 2], sequence) for sequence in range(1, 101)
    ]


async def test_many_waiting_commits_cost_few_syncs(journal: Journal, path: Path) -> None:
    """Every transaction ends with one frame of the log that says how large the file is then."""
    await asyncio.gather(*(journal.commit(commit_of(sequence)) for sequence in range(1, 201)))
    log = path.with_name("journal.db-wal").read_bytes()
    frame_bytes = 24 + int.from_bytes(log[8:12], "big")
    frames = [log[start : start + 8] for start in range(32, len(log), frame_bytes)]
    transactions = sum(frame[4:8] != bytes(4) for frame in frames)
    assert transactions < 50


async def test_what_is_loaded_includes_all_that_was_asked_before(journal: Journal) -> None:
    commits = [journal.commit(Commit(source="a", runs=[known(f"{n}")])) for n in range(50)]
    waiting = [asyncio.ensure_future(commit) for commit in commits]
    await asyncio.sleep(0)
    assert len((await journal.load("a")).runs) == 50
    await asyncio.gather(*waiting)


async def test_a_cancelled_commit_is_written_all_the_same_and_wakes_who_waits(
    journal: Journal,
) -> None:
    async with asyncio.timeout(20):
        waiting = asyncio.ensure_future(journal.grown(0))
        committing = asyncio.ensure_future(journal.commit(commit_of(1)))
        await asyncio.sleep(0)
        committing.cancel()
        await waiting
    assert committing.cancelled()
    assert journal.last_offset == 1
    assert places(await journal.read(0, 10)) == [(1, "a", 1)]


async def test_a_cancelled_commit_can_be_waited_for(journal: Journal) -> None:
    committing = [asyncio.ensure_future(journal.commit(commit_of(n))) for n in range(1, 400)]
    await asyncio.sleep(0)
    for one in committing:
        one.cancel()
    await journal.settled()
    assert journal.last_offset == 399


async def test_grown_waits_for_an_event_after_the_offset(journal: Journal) -> None:
    await journal.commit(commit_of(1))
    await journal.grown(0)
    first = asyncio.ensure_future(journal.grown(1))
    second = asyncio.ensure_future(journal.grown(2))
    await journal.commit(Commit(source="a", runs=[known("1")]))
    await asyncio.sleep(0)
    assert not first.done()
    await journal.commit(commit_of(2))
    async with asyncio.timeout(20):
        await first
    assert not second.done()
    await journal.commit(commit_of(3, 5))
    async with asyncio.timeout(20):
        await second


# Over restarts


async def test_everything_is_there_after_a_restart(path: Path) -> None:
    async with open_journal(path) as journal:
        identity = journal.uuid
        await journal.commit(commit_of(1, 3))
        await journal.commit(Commit(source="a", runs=[known("1")], marks={"m": "1"}))
        await journal.advance("redis", 2)
    async with open_journal(path) as journal:
        assert journal.uuid == identity
        assert journal.last_offset == 3
        assert await journal.cursor("redis") == 2
        assert (await journal.load("a")).marks == {"m": "1"}
        await journal.commit(commit_of(4))
        assert places(await journal.read(3, 10)) == [(4, "a", 4)]


async def test_another_file_is_another_journal(tmp_path: Path) -> None:
    identities = set()
    for name in ("a.db", "b.db"):
        async with open_journal(tmp_path / name) as journal:
            identities.add(uuid.UUID(journal.uuid))
    assert len(identities) == 2


async def test_an_offset_is_never_given_twice(path: Path) -> None:
    async with open_journal(path) as journal:
        await journal.commit(commit_of(1, 3))
        await journal.prune(DAY_MS, 3)
    async with open_journal(path) as journal:
        await journal.commit(commit_of(4))
        assert places(await journal.read(0, 10)) == [(4, "a", 4)]


WRITES = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path
    from poller.events import Draft
    from poller.journal import open_journal
    from poller.known import Commit, Condition, Known
    from poller.runs import Job, State

    async def write(journal, source):
        for sequence in range(1, 1_000_000, 2):
            run = Known(job=Job("j"), run_id=f"{sequence}", state=State.RUNNING)
            events = [Draft(n, "t", "j", n, b"x" * 2000) for n in (sequence, sequence + 1)]
            await journal.commit(
                Commit(
                    source=source,
                    runs=[run],
                    events=events,
                    condition=Condition(contact_ms=1, sequence=sequence + 1),
                    marks={"last": f"{sequence + 1}"},
                )
            )
            print(source, sequence + 1, flush=True)

    async def main():
        async with open_journal(Path(sys.argv[1])) as journal:
            await asyncio.gather(*(write(journal, source) for source in "abc"))

    asyncio.run(main())
    """
)


def killed(path: Path, lines: int) -> dict[str, int]:
    """Start the writing process, kill it after so many lines; what it said was written."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, path], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        said += child.stdout.read().splitlines(keepends=True)
    words = [line.split() for line in said if line.endswith("\n")]
    return {source: int(sequence) for source, sequence in words}


@pytest.mark.parametrize("lines", [1, 40, 400])
async def test_what_was_acknowledged_is_there_after_a_kill(path: Path, lines: int) -> None:
    acknowledged = killed(path, lines)
    assert acknowledged
    async with open_journal(path) as journal:
        events = await journal.read(0, 1_000_000, max_bytes=1 << 30)
        assert [event.offset for event in events] == [*range(1, len(events) + 1)]
        for source, told in acknowledged.items():
            sequences = [event.sequence for event in events if event.source == source]
            memories = await journal.load(source)
            last = len(sequences)
            assert sequences == [*range(1, last + 1)]
            assert last >= told
            assert {int(run.run_id) for run in memories.runs} == {*range(1, last + 1, 2)}
            assert memories.condition == Condition(contact_ms=1, sequence=last)
            assert memories.marks == {"last": f"{last}"}


# What is refused


async def test_a_second_daemon_on_the_same_journal_is_refused(path: Path) -> None:
    async with open_journal(path):
        with pytest.raises(JournalError, match="another daemon is using this journal"):
            async with open_journal(path):
                pass


def test_a_second_process_is_refused(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITES, path], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline()
        second = subprocess.run(
            [sys.executable, "-c", WRITES, path], capture_output=True, text=True, check=False
        )
        first.kill()
    assert second.stdout == ""
    assert f"JournalError: {path}: another daemon is using this journal" in second.stderr


async def test_a_journal_of_a_newer_version_is_refused_and_left_alone(path: Path) -> None:
    async with open_journal(path):
        pass
    with opened(path) as db:
        db.execute("UPDATE identity SET version = 3")
        db.execute("DROP TABLE marks")
    for open_ in (open_journal, read_journal):
        with pytest.raises(JournalError) as caught:
            async with open_(path):
                pass
        assert str(caught.value) == f"{path}: the journal has version 3, this program reads 2"
    with opened(path) as db:
        assert not db.execute("SELECT * FROM sqlite_schema WHERE name = 'marks'").fetchall()


async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"precious" * 10_000)
    for open_ in (open_journal, read_journal):
        with pytest.raises(JournalError) as caught:
            async with open_(path):
                pass
        assert str(caught.value) == f"{path}: file is not a database"
    assert path.read_bytes() == b"precious" * 10_000


async def test_the_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with opened(path) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    for open_ in (open_journal, read_journal):
        with pytest.raises(JournalError) as caught:
            async with open_(path):
                pass
        assert str(caught.value) == f"{path}: this is no journal"
    assert path.read_bytes() == before


async def test_a_journal_that_is_not_there_is_not_made_by_reading(path: Path) -> None:
    with pytest.raises(JournalError, match="no journal there; has the daemon run"):
        async with read_journal(path):
            pass
    assert not path.parent.exists()


async def test_an_empty_file_becomes_a_journal(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with pytest.raises(JournalError, match="this is no journal"):
        async with read_journal(path):
            pass
    async with open_journal(path) as journal:
        await journal.commit(commit_of(1))


# When it cannot be written


@contextlib.contextmanager
def unable_to_grow(path: Path) -> Iterator[None]:
    """No file of this process can grow beyond what the journal's log has now, and a little.

    If that is much, others can still be written: the disk is not full.
    """
    log = path.with_name(path.name + "-wal")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 10_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_what_cannot_be_written_is_told_and_nothing_is_written_after_it(
    path: Path,
) -> None:
    async with open_journal(path) as journal:
        await journal.commit(commit_of(1, size=200_000))
        waiting = asyncio.ensure_future(journal.grown(1))
        with unable_to_grow(path), pytest.raises(JournalError, match=f"^{path}: disk I/O error"):
            await journal.commit(commit_of(2, 3, size=50_000))
        for later in (journal.commit(commit_of(4)), journal.advance("redis", 1)):
            with pytest.raises(JournalError, match=f"^{path}: disk I/O error"):
                await later
        with pytest.raises(JournalError, match=f"^{path}: disk I/O error"):
            journal.check()
        assert not waiting.done()
        waiting.cancel()
        assert journal.last_offset == 1
        assert places(await journal.read(0, 10)) == [(1, "a", 1)]
        assert await journal.condition("a") == Condition(contact_ms=1, sequence=1)
    async with open_journal(path) as journal:
        journal.check()
        assert places(await journal.read(0, 10)) == [(1, "a", 1)]
        await journal.commit(commit_of(2))
        assert places(await journal.read(1, 10)) == [(2, "a", 2)]


async def test_while_the_disk_is_full_commits_and_cursors_wait_and_wake_nobody(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", sqlite3.connect)
    full = tmp_path / "full"
    fill_disk(full)
    async with open_journal(path) as journal:
        await journal.commit(commit_of(1))
        grown = asyncio.ensure_future(journal.grown(1))
        full.touch()
        given_up = asyncio.ensure_future(journal.commit(commit_of(2)))
        waiting = [
            asyncio.ensure_future(journal.commit(commit_of(3))),
            asyncio.ensure_future(journal.advance("redis", 1)),
        ]
        await until(lambda: stalled(journal), "the journal stalls")
        given_up.cancel()
        assert places(await journal.read(0, 10)) == [(1, "a", 1)]
        assert await journal.cursor("redis") == 0
        assert not any(one.done() for one in [grown, *waiting])
        full.unlink()
        await asyncio.gather(grown, *waiting)
        journal.check()
        assert places(await journal.read(0, 10)) == [(1, "a", 1), (2, "a", 2), (3, "a", 3)]
        assert await journal.cursor("redis") == 1
        journal.hurry()
        await journal.commit(commit_of(4))
    assert given_up.cancelled()


def stalled(journal: Journal) -> bool:
    try:
        journal.check()
    except JournalError:
        return True
    return False


# Reading


async def test_a_reader_sees_what_a_daemon_commits_meanwhile(journal: Journal, path: Path) -> None:
    await journal.commit(commit_of(1))
    async with read_journal(path) as reader:
        assert (reader.uuid, reader.last_offset) == (journal.uuid, 1)
        await journal.commit(commit_of(2))
        assert reader.last_offset == 1
        assert await reader.refresh() == 2
        assert reader.last_offset == 2
        assert places(await reader.read(1, 10)) == [(2, "a", 2)]
        reader.check()


async def test_a_reader_writes_nothing(journal: Journal, path: Path) -> None:
    async with read_journal(path) as reader:
        for writing in (
            reader.commit(commit_of(1)),
            reader.load("a"),
            reader.advance("redis", 1),
            reader.prune(1, 1),
        ):
            with pytest.raises(JournalError, match="opened for reading only"):
                await writing
    assert await journal.read(0, 10) == []


async def test_refreshing_forgets_nothing(journal: Journal) -> None:
    await journal.commit(commit_of(1, 2))
    await journal.prune(DAY_MS, 2)
    assert await journal.refresh() == 2


@pytest.fixture
async def mixed(journal: Journal) -> Journal:
    """Offsets 1 to 6: a1 a2 b1 a3 b2 b3, each of 10 bytes, observed at 1000, 2000, 1000, …"""
    await fill(
        journal,
        commit_of(1, 2, size=10),
        commit_of(1, source="b", size=10),
        commit_of(3, size=10),
        commit_of(2, 3, source="b", size=10),
    )
    return journal


@pytest.mark.parametrize(
    ("after", "limit", "source", "max_bytes", "offsets"),
    [
        (0, 100, None, 1000, [1, 2, 3, 4, 5, 6]),
        (2, 100, None, 1000, [3, 4, 5, 6]),
        (6, 100, None, 1000, []),
        (99, 100, None, 1000, []),
        (0, 2, None, 1000, [1, 2]),
        (0, 100, None, 35, [1, 2, 3]),
        (0, 100, None, 30, [1, 2, 3]),
        (3, 100, None, 5, [4]),
        (3, 100, None, 0, [4]),
        (0, 100, "a", 1000, [1, 2, 4]),
        (1, 100, "b", 1000, [3, 5, 6]),
        (0, 2, "b", 1000, [3, 5]),
        (0, 100, "b", 15, [3]),
        (0, 100, "nobody", 1000, []),
    ],
)
async def test_events_are_read_in_order_by_count_size_and_source(
    mixed: Journal, after: int, limit: int, source: str | None, max_bytes: int, offsets: list[int]
) -> None:
    events = await mixed.read(after, limit, source=source, max_bytes=max_bytes)
    assert [event.offset for event in events] == offsets


async def test_offsets_are_told_by_source(mixed: Journal) -> None:
    assert await mixed.sources() == ["a", "b"]
    assert await mixed.last_offsets() == {"a": 4, "b": 6}
    assert [await mixed.next_offset("b", after) for after in (0, 3, 5, 6)] == [3, 5, 6, None]
    assert await mixed.next_offset("nobody", 0) is None


async def test_events_of_a_source_that_has_no_condition_yet_are_found_too(
    journal: Journal,
) -> None:
    await journal.commit(Commit(source="a", events=[draft(1)]))
    assert await journal.last_offsets() == {"a": 1}


async def test_offsets_are_found_by_sequence(mixed: Journal) -> None:
    assert [await mixed.offset_of("a", sequence) for sequence in (1, 3, 4)] == [1, 4, None]
    await mixed.prune(1500, 6, limit=2)
    assert await mixed.offset_of("a", 1) == 2


async def test_offsets_are_found_by_time(journal: Journal) -> None:
    assert await journal.offset_at(0) == 0
    await fill(journal, *(commit_of(n, at_ms=at_ms) for n, at_ms in ((1, 10), (2, 30), (3, 20))))
    assert [await journal.offset_at(at_ms) for at_ms in (5, 10, 11, 30, 31)] == [0, 0, 1, 1, 3]


async def test_what_stands_after_an_offset_is_counted_by_source(mixed: Journal) -> None:
    assert await mixed.count_by_source(0) == {"a": (3, 1000), "b": (3, 1000)}
    assert await mixed.count_by_source(2) == {"a": (1, 3000), "b": (3, 1000)}
    assert await mixed.count_by_source(4) == {"b": (2, 2000)}
    assert await mixed.count_by_source(6) == {}


# Sinks


async def test_every_sink_has_a_cursor_of_its_own(journal: Journal) -> None:
    await journal.advance("redis", 5)
    await journal.advance("mqtt", 2)
    await journal.advance("redis", 7)
    assert [await journal.cursor(sink) for sink in ("redis", "mqtt", "webhook")] == [7, 2, 0]


def buried(path: Path) -> list[tuple[str, int, str, bytes]]:
    with opened(path) as db:
        return db.execute("SELECT * FROM dead_letters ORDER BY offset").fetchall()


async def test_an_event_that_cannot_go_is_set_aside_with_the_reason(
    mixed: Journal, path: Path
) -> None:
    events = await mixed.read(0, 2)
    await mixed.bury("mqtt", events[1], "too large")
    await mixed.bury("mqtt", events[1], "still too large")
    await mixed.bury("redis", events[0], "no")
    assert buried(path) == [
        ("redis", 1, "no", b"0000000001"),
        ("mqtt", 2, "still too large", b"0000000002"),
    ]
    assert len(await mixed.read(0, 10)) == 6


# Retention


@pytest.mark.parametrize(
    ("before_ms", "delivered", "limit", "left"),
    [
        (DAY_MS, 6, 500, []),
        (DAY_MS, 4, 500, [5, 6]),
        (DAY_MS, 0, 500, [1, 2, 3, 4, 5, 6]),
        (DAY_MS, 6, 2, [3, 4, 5, 6]),
        (1000, 6, 500, [1, 2, 3, 4, 5, 6]),
        (1001, 6, 500, [2, 4, 5, 6]),
        (2001, 6, 500, [4, 6]),
        (2001, 4, 2, [3, 4, 5, 6]),
    ],
)
async def test_only_old_events_that_every_sink_has_are_pruned(
    mixed: Journal, before_ms: int, delivered: int, limit: int, left: list[int]
) -> None:
    count = await mixed.prune(before_ms, delivered, limit=limit)
    assert [event.offset for event in await mixed.read(0, 10)] == left
    assert count == 6 - len(left)


async def test_pruning_goes_in_small_steps_until_there_is_no_more(journal: Journal) -> None:
    await journal.commit(commit_of(1, 1200))
    counts = [await journal.prune(DAY_MS, 1200) for _ in range(4)]
    assert counts == [500, 500, 200, 0]


async def test_what_was_set_aside_is_pruned_with_its_event(mixed: Journal, path: Path) -> None:
    events = await mixed.read(0, 10)
    for event in (events[0], events[5]):
        await mixed.bury("mqtt", event, "no")
    await mixed.prune(DAY_MS, 3)
    assert [row[1] for row in buried(path)] == [6]
    await mixed.prune(DAY_MS, 6)
    assert buried(path) == []
