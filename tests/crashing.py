"""The daemon with a planted crash or bug: `python -m tests.crashing WORD <arguments of poller>`.

WORD is one of

- `plain`: nothing is planted.
- `STEP:before:N`, `STEP:after:N`: the process kills itself right before or right after the Nth time
  that it takes this durable step (see STEPS).
- `full:FILE`: the journal's disk is full for as long as this file exists.
- `disk:FOLDER`: this folder is a small disk of its own, which this process alone sees; `on_disk`
  gives others a path to it. For who may mount; to be the first word.
- `hasty`: a loop that is late counts as stuck at once.
- `stop:N`: SIGTERM comes while the Nth commit of events is being written.
- a bug of BUGS, for those who want to know whether they would notice it.

Several are joined by `+`. Start it where the project is, so that this checkout's program runs.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from poller import app, liveness, poll
from poller.cli import main
from poller.errors import EventRejected
from poller.events import Recorded
from poller.relay import Relay
from poller.sinks import redis
from poller.sinks.mqtt.link import Link, Message
from poller.sinks.redis import RedisConnection

When = Literal["before", "after"]

SQL_STEPS: Mapping[str, tuple[str, bytes]] = {
    "commit": ("INSERT INTO events", b""),
    "contact": ("INSERT OR REPLACE INTO sources", b'"contact_done":true'),
    "marks": ("INSERT OR REPLACE INTO marks", b""),
    "advance": ("INSERT OR REPLACE INTO cursors", b""),
    "bury": ("INSERT OR REPLACE INTO dead_letters", b""),
    "prune": ("DELETE FROM events", b""),
    "forget": ("DELETE FROM runs", b""),
}
"""The step is the COMMIT of a transaction that changes something by such a statement."""

STEPS = (*SQL_STEPS, "append", "publish", "acknowledge")
"""`append` is Redis' script; `publish` and `acknowledge` are an MQTT message, and its PUBACK."""


class Step:
    """Ends the process at its Nth time, as `kill -9` would."""

    def __init__(self, when: When, number: int) -> None:
        self._when = when
        self._left = number

    def comes(self) -> None:
        """It is about to be taken."""
        self._left -= 1
        self._at("before")

    def came(self) -> None:
        """It has been taken, and nobody knows of it yet."""
        self._at("after")

    def _at(self, when: When) -> None:
        if when == self._when and not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


def at_commits(
    statement: str, value: bytes, end: Callable[[Callable[[str], sqlite3.Cursor]], sqlite3.Cursor]
) -> None:
    """Call `end` to COMMIT what this statement has changed, if this is in one of its values."""

    class Connection(sqlite3.Connection):
        holds = False

        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if sql == "COMMIT" and self.holds:
                self.holds = False
                return end(super().execute)
            return self._look(super().execute, sql, parameters)

        def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
            return self._look(super().executemany, sql, parameters)

        def _look(
            self, run: Callable[..., sqlite3.Cursor], sql: str, parameters: Any
        ) -> sqlite3.Cursor:
            before = self.total_changes
            cursor = run(sql, parameters)
            if sql.startswith(statement) and self.total_changes > before:
                self.holds |= not value or any(value in part for part in map(_bytes, parameters))
            return cursor

    _connect_as(Connection)


def _connect_as(connection: type[sqlite3.Connection]) -> None:
    assert not isinstance(sqlite3.connect, partial), "only one word may be about the journal"
    _replace(sqlite3, "connect", partial(sqlite3.connect, factory=connection))


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""


def watch_commits(statement: str, value: bytes, step: Step) -> None:
    """Take a step at every COMMIT of what this statement has changed."""

    def end(execute: Callable[[str], sqlite3.Cursor]) -> sqlite3.Cursor:
        step.comes()
        cursor = execute("COMMIT")
        step.came()
        return cursor

    at_commits(statement, value, end)


def stop_in_commit(number: int) -> None:
    """Be told to stop while a commit is being written, which goes on for a while."""
    numbers = count(1)

    def end(execute: Callable[[str], sqlite3.Cursor]) -> sqlite3.Cursor:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return execute("COMMIT")

    at_commits(*SQL_STEPS["commit"], end)


def fill_disk(sign: Path) -> None:
    """While this file exists no transaction finds room: SQLite is asked for more than there is."""

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if sql == "COMMIT" and sign.exists():
                super().execute("PRAGMA max_page_count = 1")
                super().execute("CREATE TABLE filler AS SELECT zeroblob(1 << 20)")
            elif sql == "COMMIT":
                super().execute(f"PRAGMA max_page_count = {1 << 30}")
            return super().execute(sql, parameters)

    _connect_as(Connection)


def on_disk(folder: Path, pid: int) -> Path:
    """A folder as this process sees it."""
    return Path(f"/proc/{pid}/root") / folder.relative_to("/")


def mount_disk(folder: Path, words: Sequence[str]) -> NoReturn:
    """Go on as the same process, with a disk of a few megabytes on this folder."""
    mount = 'mount -t tmpfs -o size=8m,mode=700 disk "$0" && exec "$@"'
    again = [sys.executable, "-m", "tests.crashing", "+".join(words), *sys.argv[1:]]
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", mount, str(folder), *again])  # noqa: S606, S607 - no shell sees the arguments as code


def watch_redis(step: Step) -> None:
    """Take a step at every call of the script that appends something."""
    run_as = RedisConnection._run_as

    async def watched(
        self: RedisConnection, command: str, script: str, calls: Sequence[Any]
    ) -> list[Any]:
        if not any(call.entries for call in calls):
            return await run_as(self, command, script, calls)
        step.comes()
        replies = await run_as(self, command, script, calls)
        step.came()
        return replies

    _replace(RedisConnection, "_run_as", watched)


def watch_mqtt(method: str, step: Step) -> None:
    """Take a step whenever a message is put on the line, or its PUBACK has come."""
    original = getattr(Link, method)

    def watched(self: Link, *arguments: Any) -> None:
        is_event = not isinstance(arguments[0], Message) or "/events/" in arguments[0].topic
        if is_event:
            step.comes()
        original(self, *arguments)
        if is_event:
            step.came()

    _replace(Link, method, watched)


def skip_commit() -> None:
    """Every fifth commit of events is not written, and nobody is told."""
    numbers = count(1)
    at_commits(
        *SQL_STEPS["commit"], lambda execute: execute("COMMIT" if next(numbers) % 5 else "ROLLBACK")
    )


def no_cursor_check() -> None:
    """Redis' script appends whatever the cursor says, and only the journal's own cursor counts.

    So what Redis had when the daemon was killed, and the journal did not know, is there twice.
    """
    check = "if offset ~= tonumber(ARGV[2]) then return offset end"
    script = redis._SCRIPT
    assert check in script
    script = script.replace(check, "if tonumber(ARGV[2]) < 0 then return 0 end")
    _replace(redis, "_SCRIPT", script)
    _replace(redis, "_SHA", hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest())

    async def cursors(self: RedisConnection, sources: Sequence[str]) -> None:
        self._seen.update(dict.fromkeys(sources, 0))

    _replace(RedisConnection, "cursors", cursors)


def ack_before_send() -> None:
    """A relay moves its cursor before it has sent: a broker that is away misses the batch."""

    async def send(self: Relay, connection: Any, batch: Sequence[Recorded]) -> None:
        await self._move(batch[-1].offset)
        with suppress(EventRejected):
            await connection.send(batch)

    _replace(Relay, "_send", send)


BUGS: Mapping[str, Callable[[], None]] = {
    "plain": lambda: None,
    "skip-commit": skip_commit,
    "no-cursor-check": no_cursor_check,
    "ack-before-send": ack_before_send,
}


def plant(word: str) -> None:
    """Change the program of this process as the word says."""
    name, _, value = word.partition(":")
    if word in BUGS:
        BUGS[word]()
    elif word == "hasty":
        _replace(liveness, "SILENT_S", 0.1)
    elif name == "full" and value:
        fill_disk(Path(value))
    elif name == "stop" and value.isdecimal():
        stop_in_commit(int(value))
    else:
        _plant_death(name, value)


def _plant_death(name: str, at: str) -> None:
    when, _, number = at.partition(":")
    if name not in STEPS or when not in ("before", "after") or not number.isdecimal():
        sys.exit(f"{name!r} is no word; see {__file__}")
    step = Step(cast("When", when), int(number))
    _replace(app, "_MAINTENANCE_S", 0.2)  # otherwise nothing is pruned within the first minute,
    _replace(poll, "_PRUNE_EVERY_S", 0.2)  # and nothing forgotten within the first hour
    if name in SQL_STEPS:
        watch_commits(*SQL_STEPS[name], step)
    elif name == "append":
        watch_redis(step)
    else:
        watch_mqtt({"publish": "put", "acknowledge": "_on_publish"}[name], step)


def _replace(owner: object, name: str, value: object) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, value)


if __name__ == "__main__":
    words = sys.argv.pop(1).split("+")
    if words[0].startswith("disk:"):
        mount_disk(Path(words[0].removeprefix("disk:")), words[1:] or ["plain"])
    for word in words:
        plant(word)
    main()
