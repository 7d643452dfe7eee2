"""One file, one writing thread, one reading thread."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from poller.errors import JournalError
from poller.sqlite import DiskFull, Reader, Writer, locked, reading, translated, writing
from tests.crashing import fill_disk
from tests.daemon import until


def create(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE IF NOT EXISTS notes (note TEXT UNIQUE)")


def keep(_db: sqlite3.Connection) -> None:
    """Look at nothing."""


def note(text: str) -> Callable[[sqlite3.Connection], str]:
    def work(db: sqlite3.Connection) -> str:
        db.execute("INSERT INTO notes VALUES (?)", [text])
        return text

    return work


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def writer(path: Path) -> Iterator[Writer]:
    path.touch()
    with writing(path, create) as writer:
        yield writer


def notes(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [row[0] for row in db.execute("SELECT note FROM notes ORDER BY rowid")]


@contextlib.contextmanager
def held(writer: Writer) -> Iterator[None]:
    """The writing thread is busy while the context lasts, so that work gathers."""
    begun, go_on = threading.Event(), threading.Event()

    def work(_db: sqlite3.Connection) -> None:
        begun.set()
        go_on.wait(30)

    writer.run(work)
    assert begun.wait(30)
    try:
        yield
    finally:
        go_on.set()


# Writing


async def test_what_was_acknowledged_is_on_disk_in_the_order_asked(
    writer: Writer, path: Path
) -> None:
    texts = [f"note {number}" for number in range(20)]
    assert await asyncio.gather(*(writer.run(note(text)) for text in texts)) == texts
    assert notes(path) == texts


async def test_what_waits_together_shares_a_transaction(path: Path) -> None:
    statements: list[str] = []

    def traced(db: sqlite3.Connection) -> None:
        create(db)
        db.set_trace_callback(statements.append)

    path.touch()
    with writing(path, traced) as writer:
        with held(writer):
            waiting = [writer.run(note(f"{number}")) for number in range(300)]
        await asyncio.gather(*waiting)
    # one for the work that held it up, then 256 together, then the rest
    assert statements.count("BEGIN IMMEDIATE") == 3
    assert statements.count("COMMIT") == 3
    assert len(notes(path)) == 300


async def test_every_transaction_is_synced(path: Path) -> None:
    path.touch()
    with writing(path, create) as writer:
        mode = await writer.run(lambda db: db.execute("PRAGMA journal_mode").fetchone()[0])
        level = await writer.run(lambda db: db.execute("PRAGMA synchronous").fetchone()[0])
    assert (mode, level) == ("wal", 2)


async def test_what_waited_is_written_before_the_end(path: Path) -> None:
    path.touch()
    with writing(path, create) as writer, held(writer):
        waiting = [writer.run(note(f"{number}")) for number in range(300)]
    await asyncio.gather(*waiting)
    assert len(notes(path)) == 300


async def test_a_caller_that_gives_up_undoes_nothing(writer: Writer, path: Path) -> None:
    with held(writer):
        written = writer.run(note("a"))
        written.cancel()
    await writer.run(note("b"))
    assert notes(path) == ["a", "b"]


async def test_the_writer_is_due_since_the_oldest_question_that_waits(writer: Writer) -> None:
    loop = asyncio.get_running_loop()
    assert writer.waiting.due_s == math.inf
    with held(writer):
        since_s = writer.waiting.due_s
        assert since_s <= loop.time()
        later = writer.run(note("a"))
        assert writer.waiting.due_s == since_s
    await later
    assert writer.waiting.due_s == math.inf


def test_a_loop_that_has_ended_undoes_nothing(path: Path) -> None:
    path.touch()
    with writing(path, create) as writer, contextlib.ExitStack() as stack:

        async def ask() -> None:
            stack.enter_context(held(writer))
            writer.run(note("a"))

        asyncio.run(ask())
    assert notes(path) == ["a"]


async def test_a_transaction_that_fails_is_undone_whole_and_no_other_is_written_after_it(
    writer: Writer, path: Path
) -> None:
    """What follows may build on what is not there: events would be missing among the others."""
    await writer.run(note("a"))
    with held(writer):
        waiting = [writer.run(note("b")), writer.run(note("a"))]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    told = f"{path}: UNIQUE constraint failed: notes.note"
    assert [(type(result), str(result)) for result in results] == [(JournalError, told)] * 2
    with pytest.raises(JournalError, match="UNIQUE"):
        writer.check()
    with pytest.raises(JournalError, match="UNIQUE"):
        await writer.run(note("c"))
    assert notes(path) == ["a"]


async def test_a_bug_reaches_whoever_waits_and_nothing_is_written_after_it(
    writer: Writer, path: Path
) -> None:
    def buggy(db: sqlite3.Connection) -> None:
        note("a")(db)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await writer.run(buggy)
    with pytest.raises(JournalError, match="ZeroDivisionError"):
        writer.check()
    with pytest.raises(JournalError, match="ZeroDivisionError"):
        await writer.run(note("b"))
    assert notes(path) == []


def test_a_new_writer_has_failed_at_nothing(writer: Writer) -> None:
    writer.check()


# A full disk


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file exists, the disk of what is opened from now on is full."""
    monkeypatch.setattr(sqlite3, "connect", sqlite3.connect)
    fill_disk(tmp_path / "full")
    return tmp_path / "full"


def counted(text: str, tries: list[str]) -> Callable[[sqlite3.Connection], str]:
    def work(db: sqlite3.Connection) -> str:
        tries.append(text)
        return note(text)(db)

    return work


NO_ROOM = "there is no room on its disk (database or disk is full)"


async def test_a_full_disk_is_told_once_and_waited_out_and_nothing_is_lost(
    full: Path, writer: Writer, path: Path
) -> None:
    await writer.run(note("a"))
    tries: list[str] = []
    with capture_logs() as logs:
        full.touch()
        waiting = [writer.run(counted("b", tries)), writer.run(note("c"))]
        await until(lambda: len(tries) >= 3, "three tries")
        waiting.append(writer.run(note("d")))
        with pytest.raises(JournalError) as caught:
            writer.check()
        assert str(caught.value) == f"{path}: {NO_ROOM}: make room, and it goes on by itself"
        assert not any(one.done() for one in waiting)
        assert notes(path) == ["a"]
        full.unlink()
        assert await asyncio.gather(*waiting) == ["b", "c", "d"]
        await writer.run(note("e"))
    writer.check()
    assert notes(path) == ["a", "b", "c", "d", "e"]
    assert logs == [
        {"event": "journal.stalled", "log_level": "error", "message": str(caught.value)},
        {"event": "journal.recovered", "log_level": "info", "path": str(path)},
    ]


async def test_what_is_known_can_be_read_while_the_disk_is_full(
    full: Path, writer: Writer, path: Path
) -> None:
    await writer.run(note("a"))
    tries: list[str] = []
    full.touch()
    waiting = writer.run(counted("b", tries))
    await until(lambda: bool(tries), "a try")
    with reading(path, keep) as reader:
        assert await reader.rows("SELECT note FROM notes") == [("a",)]
    assert not waiting.done()
    full.unlink()
    assert await waiting == "b"


async def test_who_is_in_a_hurry_waits_for_no_room_and_nothing_is_written_any_more(
    full: Path, writer: Writer, path: Path
) -> None:
    tries: list[str] = []
    full.touch()
    waiting = [writer.run(counted("a", tries))]
    await until(lambda: bool(tries), "a try")
    waiting.append(writer.run(note("b")))
    writer.hurry()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    told = f"{path}: {NO_ROOM}; what is not written is found again after the next start"
    assert [(type(result), str(result)) for result in results] == [(JournalError, told)] * 2
    full.unlink()
    with pytest.raises(JournalError, match="no room"):
        await writer.run(note("c"))
    with pytest.raises(JournalError, match="no room"):
        writer.check()
    assert notes(path) == []


async def test_who_is_in_a_hurry_tries_once_more(full: Path, writer: Writer, path: Path) -> None:
    tries: list[str] = []
    full.touch()
    waiting = writer.run(counted("a", tries))
    await until(lambda: bool(tries), "a try")
    full.unlink()
    writer.hurry()
    assert await waiting == "a"
    await writer.run(note("b"))
    assert notes(path) == ["a", "b"]


async def test_closing_does_not_wait_for_room(full: Path, path: Path) -> None:
    tries: list[str] = []
    path.touch()
    with writing(path, create) as writer:
        full.touch()
        waiting = writer.run(counted("a", tries))
        await until(lambda: bool(tries), "a try")
    with pytest.raises(JournalError, match="no room"):
        await waiting
    assert notes(path) == []


def failed(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("it failed")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (failed(sqlite3.SQLITE_FULL), DiskFull),
        (failed(sqlite3.SQLITE_IOERR_WRITE), JournalError),  # there is room, so it is the disk
        (failed(sqlite3.SQLITE_IOERR_SHMSIZE), JournalError),
        (failed(sqlite3.SQLITE_IOERR_FSYNC), JournalError),
        (failed(sqlite3.SQLITE_CORRUPT), JournalError),
        (sqlite3.ProgrammingError("it failed"), JournalError),
        (OSError(errno.ENOSPC, "it failed"), DiskFull),
        (OSError(errno.EDQUOT, "it failed"), DiskFull),
        (OSError(errno.EROFS, "it failed"), JournalError),
    ],
)
def test_only_what_room_would_cure_is_waited_for(
    error: Exception, kind: type[Exception], path: Path
) -> None:
    with pytest.raises(JournalError) as caught, translated(path):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{path}: ")
    assert "it failed" in str(caught.value)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EFBIG, DiskFull),
        (errno.EIO, JournalError),
    ],
)
@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE])
def test_a_failed_write_is_waited_for_if_nothing_else_can_be_written_there_either(
    code: int, number: int, kind: type[Exception], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise OSError(number, "it failed")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(JournalError) as caught, translated(path):
        raise failed(code)
    assert type(caught.value) is kind


# Reading


async def test_what_is_committed_can_be_read_while_writing_goes_on(
    writer: Writer, path: Path
) -> None:
    await writer.run(note("a"))
    with reading(path, keep) as reader, held(writer):
        writer.run(note("b"))
        assert await reader.rows("SELECT note FROM notes") == [("a",)]
        assert reader.rows_now("SELECT note FROM notes WHERE note = ?", ["b"]) == []


async def test_reading_goes_on_while_every_other_thread_is_stuck(
    writer: Writer, path: Path
) -> None:
    loop, go_on = asyncio.get_running_loop(), threading.Event()
    stuck = [loop.run_in_executor(None, go_on.wait, 30) for _ in range(100)]
    try:
        with reading(path, keep) as reader:
            async with asyncio.timeout(10):
                assert await reader.rows("SELECT 1") == [(1,)]
    finally:
        go_on.set()
        await asyncio.gather(*stuck)


async def test_a_reader_that_is_given_up_does_not_spoil_the_next_query(
    writer: Writer, path: Path
) -> None:
    await writer.run(note("a"))
    with reading(path, keep) as reader:
        asking = [asyncio.ensure_future(reader.rows("SELECT 1")) for _ in range(20)]
        await asyncio.sleep(0)
        for one in asking:
            one.cancel()
        assert await reader.rows("SELECT note FROM notes") == [("a",)]


async def test_a_reader_writes_nothing(writer: Writer, path: Path) -> None:
    with reading(path, keep) as reader:
        with pytest.raises(JournalError, match="readonly"):
            await reader.rows("DELETE FROM notes")
        with pytest.raises(JournalError, match="no such table: letters"):
            await reader.rows("SELECT * FROM letters")


def test_a_file_that_is_not_there_is_told_in_a_sentence(path: Path) -> None:
    with pytest.raises(JournalError) as caught, reading(path, keep):
        pass
    assert str(caught.value) == (
        f"{path}: no journal there; has the daemon run with these settings?"
    )
    assert not path.exists()


def refuse(_db: sqlite3.Connection) -> None:
    raise JournalError("not this one")


@pytest.mark.parametrize("opened", [reading, writing])
def test_what_is_refused_on_opening_is_closed_again(
    opened: Callable[
        [Path, Callable[[sqlite3.Connection], None]],
        contextlib.AbstractContextManager[Reader | Writer],
    ],
    path: Path,
) -> None:
    path.touch()
    with pytest.raises(JournalError, match="not this one"), opened(path, refuse):
        pass
    assert [file.name for file in path.parent.iterdir()] == ["journal.db"]


@pytest.mark.parametrize("opened", [reading, writing])
def test_a_file_that_is_no_database_is_refused_by_name(
    opened: Callable[
        [Path, Callable[[sqlite3.Connection], object]],
        contextlib.AbstractContextManager[Reader | Writer],
    ],
    path: Path,
) -> None:
    path.write_bytes(b"this is no database" * 1000)
    with (
        pytest.raises(JournalError) as caught,
        opened(path, lambda db: db.execute("SELECT * FROM sqlite_schema").fetchall()),
    ):
        pass
    assert str(caught.value) == f"{path}: file is not a database"


# The lock


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_only_its_owner_may_read_a_journal(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = tmp_path / "deep" / "down" / "journal.db"
        with locked(path), writing(path, create) as writer:
            await writer.run(note("a"))
            modes = {file.name: mode(file) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(
        ["journal.db", "journal.db-wal", "journal.db-shm", "journal.db.lock"], 0o600
    )
    assert mode(path.parent) == 0o700
    assert mode(path.parent.parent) == 0o700


def test_a_folder_that_was_there_stays_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with locked(tmp_path / "journal.db"):
        assert mode(tmp_path) == 0o755


def test_a_second_daemon_is_refused_and_may_start_when_the_first_has_ended(path: Path) -> None:
    with locked(path):
        with pytest.raises(JournalError) as caught, locked(path):
            pass
        assert str(caught.value) == (
            f"{path}: another daemon is using this journal; stop it, or set poller.journal"
        )
    with locked(path):
        pass


def test_a_journal_that_cannot_be_made_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "journal.db"
    with pytest.raises(JournalError) as caught, locked(path):
        pass
    assert str(caught.value).startswith(f"{path}: ")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux lists open files")
def test_no_file_and_no_thread_is_left_behind(path: Path) -> None:
    files, threads = open_files(), threading.active_count()
    with locked(path), writing(path, create), reading(path, keep) as reader:
        asyncio.run(reader.rows("SELECT 1"))
        assert open_files() > files
        assert threading.active_count() == threads + 2
        with pytest.raises(JournalError), locked(path):
            pass
    assert (open_files(), threading.active_count()) == (files, threads)
