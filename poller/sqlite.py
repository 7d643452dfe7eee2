"""One SQLite file. One thread writes it: what waits together shares a transaction and an fsync.

Another reads it: neither a long write nor a stuck name server, of which the loop's own threads
may be full, holds reading up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import math
import os
import queue
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from poller.errors import JournalError

log = structlog.get_logger()

T = TypeVar("T")

_TOGETHER: Final = 256
"""At most so many steps in one transaction."""
_RETRY_S: Final = 1.0
"""How often a full disk is tried again."""
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # EFBIG: by ulimit
_PERHAPS_NO_ROOM: Final = frozenset(
    {
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_SHMOPEN,
        sqlite3.SQLITE_IOERR_SHMSIZE,
    }
)
_PROBE_BYTES: Final = 65_536


class DiskFull(JournalError):
    """There is no room, or the quota is used up: nothing was written, and may be, later."""


class Waiting:
    """Who waits for a thread: its signs of life."""

    def __init__(self) -> None:
        self._since_s: dict[asyncio.Future[Any], float] = {}

    def add(self, answer: asyncio.Future[Any]) -> None:
        """Somebody waits for this answer from now on."""
        self._since_s[answer] = asyncio.get_running_loop().time()
        answer.add_done_callback(self._since_s.pop)

    @property
    def due_s(self) -> float:
        """Since when the oldest question waits, by the loop's clock; infinity if there is none."""
        return next(iter(self._since_s.values()), math.inf)


class Writer:
    """The thread that writes: takes what has gathered, writes it in one transaction, answers.

    While the disk is full it waits for room, and all who have asked for something wait with it.
    After any other failure it writes nothing more: what follows may build on what is not there.

    Attributes:
        waiting: who waits for it.
    """

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self._path = path
        self._db = db
        self._steps: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
        self._failed: str | None = None
        self._stalled: str | None = None
        self._hurried = threading.Event()
        self.waiting = Waiting()
        self._thread = threading.Thread(target=self._serve, name="journal", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[sqlite3.Connection], T]) -> asyncio.Future[T]:
        """Do this inside the next transaction; gives its result once that is on disk.

        Cancelling does not undo it. The future fails, with a JournalError unless `work` has a bug,
        if nothing of the transaction was written.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self.waiting.add(done)
        self._steps.put(_Step(work, loop, done))
        return done

    def check(self) -> None:
        """Whether all transactions were written.

        Raises:
            JournalError: one was not, or not yet, with the reason.
        """
        trouble = self._failed or self._stalled
        if trouble:
            raise JournalError(trouble)

    def hurry(self) -> None:
        """From now on a full disk is a failure, if it still is full, and not waited for."""
        self._hurried.set()

    def close(self) -> None:
        """Write what has been asked for, without waiting for room, and end the thread."""
        self.hurry()
        self._steps.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while (step := self._steps.get()) is not None:
            steps = [step]
            while not self._steps.empty() and len(steps) < _TOGETHER:
                following = self._steps.get()
                if following is None:
                    self._steps.put(None)
                    break
                steps.append(following)
            self._together(steps)

    def _together(self, steps: list[_Step]) -> None:
        try:
            if self._failed:
                raise JournalError(self._failed)
            results = self._written(steps)
        except Exception as error:  # noqa: BLE001 - a bug, too, must end whoever waits, not the thread
            self._failed = str(error) or repr(error)
            for step in steps:
                step.answer(error=error)
        else:
            for step, result in zip(steps, results, strict=True):
                step.answer(result=result)

    def _written(self, steps: list[_Step]) -> list[Any]:
        """Write them in one transaction, as soon as there is room; gives their results."""
        while True:
            try:
                results = self._transaction(steps)
            except DiskFull as error:
                if self._hurried.is_set():
                    raise JournalError(
                        f"{error}; what is not written is found again after the next start"
                    ) from error
                self._stall(f"{error}: make room, and it goes on by itself")
            else:
                self._recover()
                return results
            self._hurried.wait(_RETRY_S)

    def _transaction(self, steps: list[_Step]) -> list[Any]:
        with translated(self._path):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                results = [step.work(self._db) for step in steps]
                self._db.execute("COMMIT")
            except Exception:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            return results

    def _stall(self, trouble: str) -> None:
        if self._stalled is None:
            log.error("journal.stalled", message=trouble)
        self._stalled = trouble

    def _recover(self) -> None:
        if self._stalled is not None:
            log.info("journal.recovered", path=str(self._path))
        self._stalled = None


@dataclass(frozen=True, slots=True)
class _Step:
    work: Callable[[sqlite3.Connection], Any]
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]

    def answer(self, *, result: object = None, error: Exception | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: object, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(result)
        else:
            self.done.set_exception(error)


class Reader:
    """A connection that only reads, and its thread.

    Attributes:
        waiting: who waits for it.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self.waiting = Waiting()
        self._path = path
        self._db = db
        self._thread = thread

    async def rows(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        """All rows of a query.

        Raises:
            JournalError: it cannot be read.
        """
        return await self.run(lambda db: db.execute(sql, values).fetchall())

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do this in the reading thread; gives its result.

        Raises:
            JournalError: it cannot be read.
        """
        loop = asyncio.get_running_loop()
        answer = loop.run_in_executor(self._thread, self._now, work)
        self.waiting.add(answer)
        return await answer

    def rows_now(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        """The same, for who can wait; not while others read."""
        return self._now(lambda db: db.execute(sql, values).fetchall())

    def _now(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with translated(self._path):
            return work(self._db)


@contextlib.contextmanager
def writing(path: Path, prepare: Callable[[sqlite3.Connection], None]) -> Iterator[Writer]:
    """Open a file for writing, durably: write-ahead log, an fsync for every transaction.

    Raises:
        JournalError: it cannot be opened or prepared.
    """
    with contextlib.ExitStack() as stack:
        with translated(path):
            db = stack.enter_context(contextlib.closing(_connect(path, "rw")))
            prepare(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        writer = Writer(path, db)
        stack.callback(writer.close)
        yield writer


@contextlib.contextmanager
def reading(path: Path, look: Callable[[sqlite3.Connection], object]) -> Iterator[Reader]:
    """Open a file for reading, also while another process writes it; `look` may refuse it.

    Raises:
        JournalError: there is none, or it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        with translated(path):
            if not path.exists():
                raise JournalError(
                    f"{path}: no journal there; has the daemon run with these settings?"
                )
            db = stack.enter_context(contextlib.closing(_connect(path, "ro")))
            look(db)
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="journal-reader"))
        yield Reader(path, db, thread)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the file if need be and hold it against a second daemon, which would repeat every event.

    Raises:
        JournalError: it cannot be made, or is held already.
    """
    with contextlib.ExitStack() as stack:
        with translated(path):
            _make_folders(path)
            handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JournalError(
                    f"{path}: another daemon is using this journal; stop it, or set poller.journal"
                ) from error
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        yield


def _make_folders(path: Path) -> None:
    """Make the folders of a file, each for its owner only; `parents=True` is not so strict."""
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's and the system's errors into JournalError or DiskFull, naming the file."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if _says_full(path, error):
            raise DiskFull(f"{path}: there is no room on its disk ({error})") from error
        name = getattr(error, "sqlite_errorname", "")
        said = f"{error} ({name})" if name.startswith("SQLITE_IOERR") else error
        raise JournalError(f"{path}: {said}") from error


def _says_full(path: Path, error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    if code in _PERHAPS_NO_ROOM:
        return not _has_room(path)
    return code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in _NO_ROOM


def _has_room(path: Path) -> bool:
    """Whether a file beside this one can be written; SQLite does not tell why it could not."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as error:
        return error.errno not in _NO_ROOM
    return True


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=5.0,
    )
