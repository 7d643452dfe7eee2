"""A full disk: the daemon waits for room, says so, and loses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from random import Random

import pytest

from poller import app
from poller import settings as settings_file
from poller.brokers import Broker
from poller.journal import open_journal
from poller.vendors import load
from tests.crashing import fill_disk, on_disk
from tests.daemon import Daemon, get, running, settings, until
from tests.delivered import Place, place

NO_ROOM = "there is no room on its disk (database or disk is full)"


class Limited:
    """A disk whose journal gets no more pages while a file is there."""

    def __init__(self, folder: Path) -> None:
        self.word = f"full:{folder}/full"
        self._sign = folder / "full"

    @contextmanager
    def of(self, _pid: int) -> Iterator[Limited]:
        yield self

    def fill(self) -> None:
        self._sign.touch()

    def free(self) -> None:
        self._sign.unlink()


class Mounted:
    """A file system in memory that only the daemon sees; its journal is left behind."""

    def __init__(self, folder: Path) -> None:
        self.word = f"disk:{folder}"
        self._folder = folder
        self._seen = folder

    @contextmanager
    def of(self, pid: int) -> Iterator[Mounted]:
        """Hold it beyond the end of this process."""
        handle = os.open(on_disk(self._folder, pid), os.O_DIRECTORY)
        self._seen = Path(f"/proc/self/fd/{handle}")
        try:
            yield self
            shutil.copy(self._seen / "journal.db", self._folder)
        finally:
            os.close(handle)

    def fill(self) -> None:
        with suppress(OSError), (self._seen / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        (self._seen / "filler").unlink()


def may_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "disk", "/mnt"]
    try:
        return not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return False


@pytest.fixture
async def scale(tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        yield await place(stack, tmp_path, redis_broker, mqtt_broker)


async def reasons(daemon: Daemon) -> list[str]:
    """Why it is not ready."""
    found: list[str] = json.loads((await get(f"{await daemon.url()}/readyz"))[1])["reasons"]
    return found


async def is_ready(daemon: Daemon) -> bool:
    return not await reasons(daemon)


@pytest.mark.parametrize("kind", [Limited, Mounted] if may_mount() else [Limited])
async def test_a_full_disk_is_told_once_and_waited_out(
    scale: Place, kind: type[Limited | Mounted], tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    scale.journal = folder / "journal.db"
    disk = kind(folder)
    env = {"POLLER_POLLER__JOURNAL": str(scale.journal)}
    async with running(scale.config, env, planted=disk.word) as daemon:
        await until(lambda: len(scale.received) > 5, "events")
        with disk.of(daemon.process.pid):
            disk.fill()
            stalled = await daemon.said("journal.stalled")
            told = f"{scale.journal}: {NO_ROOM}: make room, and it goes on by itself"
            assert stalled["message"] == told
            assert await reasons(daemon) == [f"journal: {told}"]
            disk.free()
            await daemon.said("journal.recovered")
            await scale.told_by(daemon)
            await until(lambda: is_ready(daemon), "ready again")
            assert await daemon.end() == 0, daemon.text
        said = [line["event"] for line in daemon.lines if line["event"].startswith("journal.")]
        assert said == ["journal.stalled", "journal.recovered"]
    await scale.is_in_order()


async def test_who_waits_for_room_is_not_stuck(scale: Place, tmp_path: Path) -> None:
    disk = Limited(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify.sock"))
        supervisor.setblocking(False)
        env = {
            "NOTIFY_SOCKET": str(tmp_path / "notify.sock"),
            "WATCHDOG_USEC": "300000",
            "POLLER_DEFAULTS__TIMEOUT": "1s",
        }
        async with running(scale.config, env, planted=f"hasty+{disk.word}") as daemon:
            await until(lambda: len(scale.received) > 5, "events")
            disk.fill()
            stalled = await daemon.said("journal.stalled")
            heard(supervisor)
            signs = 0

            def lives_on() -> bool:
                nonlocal signs
                signs += heard(supervisor)
                return signs >= 20

            await until(lives_on, "signs of life for 2 s, when a poll is 1 s late")
            assert await reasons(daemon) == [f"journal: {stalled['message']}"]
            disk.free()
            await daemon.said("journal.recovered")


def heard(supervisor: socket.socket) -> int:
    """How many signs of life have come since the last look."""
    signs = 0
    with suppress(BlockingIOError):
        while supervisor.recv(100):
            signs += 1
    return signs


async def test_a_stop_waits_for_no_room_and_the_next_start_tells_what_was_not_written(
    scale: Place, tmp_path: Path
) -> None:
    disk = Limited(tmp_path)
    async with running(scale.config, planted=disk.word) as daemon:
        await until(lambda: len(scale.received) > 5, "events")
        disk.fill()
        await daemon.said("journal.stalled")
        assert await daemon.end() == 1
    said = [line for line in daemon.text.splitlines() if not line.startswith("{")]
    lost = "what is not written is found again after the next start"
    assert said == [f"{scale.journal}: {NO_ROOM}; {lost}"]
    disk.free()
    async with running(scale.config) as daemon:
        await scale.told_by(daemon)
        assert await daemon.end() == 0, daemon.text
    await scale.is_in_order()


async def test_a_relay_that_waits_for_the_journal_is_not_called_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "connect", sqlite3.connect)
    fill_disk(tmp_path / "full")
    disk = Limited(tmp_path)
    vendor = load("scale")
    file = settings(tmp_path, {"s": ("scale", "http://x")}, redis="redis://x")
    loaded = settings_file.load(file, {"scale": vendor.options}, {})
    async with open_journal(tmp_path / "journal.db") as journal:
        daemon = app.Daemon(loaded, {"scale": vendor}, journal, Random(1))
        (relay,) = daemon.relays
        relay.trouble, relay.alive_s = None, asyncio.get_running_loop().time() - 60
        assert await daemon.troubles() == ["redis: nothing delivered for 60 s (0 events wait, 0 s)"]
        disk.fill()
        moving = asyncio.ensure_future(journal.advance("redis", 1))

        async def waits() -> bool:
            return any(NO_ROOM in trouble for trouble in await daemon.troubles())

        await until(waits, "the journal waits")
        (only,) = await daemon.troubles()
        assert only.startswith("journal: ")
        disk.free()
        await moving
