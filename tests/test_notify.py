"""systemd's protocol, against a real datagram socket."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from poller.notify import notify, watchdog_s
from tests.daemon import running, settings, until


@pytest.mark.parametrize("path", ["notify.sock", "@poller-test-notify"])
def test_a_state_reaches_the_supervisor(path: str, tmp_path: Path) -> None:
    address = path if path.startswith("@") else str(tmp_path / path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(address.replace("@", "\0"))
        notify("READY=1", {"NOTIFY_SOCKET": address})
        assert supervisor.recv(100) == b"READY=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_without_a_supervisor_nothing_happens(environ: dict[str, str]) -> None:
    notify("READY=1", environ)


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_the_watchdogs_period(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_s(environ) == seconds


async def test_the_daemon_says_that_it_is_ready_alive_and_stopping(tmp_path: Path) -> None:
    path = str(tmp_path / "notify.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(path)
        supervisor.setblocking(False)
        config = settings(tmp_path, {"s": ("scale", "http://127.0.0.1:1")})
        env = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "500000"}
        said: list[bytes] = []

        def heard(word: bytes) -> bool:
            try:
                said.append(supervisor.recv(100))
            except BlockingIOError:
                return False
            return said[-1] == word

        async with running(config, env) as daemon:
            await until(lambda: heard(b"READY=1"), "READY=1")
            await until(lambda: heard(b"WATCHDOG=1"), "WATCHDOG=1")
            assert await daemon.end(signal.SIGTERM) == 0
            await until(lambda: heard(b"STOPPING=1"), "STOPPING=1")
