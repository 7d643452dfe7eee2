"""What hangs or dies in the daemon shows, and systemd hears of it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import pytest
from aiohttp import web
from structlog.testing import capture_logs

from poller import app, poll, relay
from poller.brokers import Broker
from poller.journal import open_journal
from poller.settings import reading
from poller.vendors import load
from tests.daemon import Daemon, get, running, settings, simulated, until
from tests.hampered import hamper

QUICK = (
    "set:poller.liveness:SILENT_S=1,set:poller.app:_LOOK_S=0.3,"
    "set:poller.app:_STEP_S=0.5,set:poller.relay:_STEP_S=0.5"
)
"""What takes seconds in earnest."""
TICKS = "poller_loop_lag_seconds_count"


class Supervisor:
    """What systemd hears."""

    def __init__(self, path: Path) -> None:
        self.env = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def heard(self) -> list[bytes]:
        """What was said since the last time."""
        words = []
        while True:
            try:
                words.append(self._socket.recv(100))
            except BlockingIOError:
                return words

    async def hears(self, word: bytes) -> list[bytes]:
        """Wait for a word; gives all that was said until then."""
        words: list[bytes] = []

        def heard() -> bool:
            words.extend(self.heard())
            return word in words

        await until(heard, word)
        return words

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path / "notify.sock")
    yield supervisor
    supervisor.close()


async def reasons(daemon: Daemon) -> list[str]:
    """Why it says that it is not ready."""
    status, body = await get(f"{await daemon.url()}/readyz")
    told: list[str] = json.loads(body)["reasons"]
    assert (status == 200) is (told == [])
    return told


async def metric(daemon: Daemon, name: str) -> float:
    lines = (await get(f"{await daemon.url()}/metrics"))[1].splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def logged(daemon: Daemon, event: str) -> list[str]:
    return sorted(line["loop"] for line in daemon.lines if line["event"] == event)


HANGS = {
    "loops": (
        "hang:poller.fetch:_Line.exchange,hang:poller.sinks.redis:RedisConnection.send,"
        "hang:poller.journal:Journal.prune,hang:poller.app:Daemon._stop",
        {"maintenance", "poll[s]", "relay[redis]", "reload"},
    ),
    "writing": ("block:poller.sqlite:Writer._together@8", {"journal writer", "poll[s]"}),
    "reading": ("block:poller.sqlite:Reader._now@8", {"journal reader"}),
}


@pytest.mark.parametrize(("hang", "stuck"), HANGS.values(), ids=HANGS)
async def test_what_hangs_shows_and_the_watchdog_is_fed_only_while_all_goes_on(
    hang: str, stuck: set[str], tmp_path: Path, redis_broker: Broker, supervisor: Supervisor
) -> None:
    (tmp_path / "held").touch()
    async with AsyncExitStack() as stack:
        _, _, url = await simulated(stack, "scale")
        redis, quick = f"{redis_broker.url}/0", "timeout = '500ms'"
        config = settings(tmp_path, {"s": ("scale", url)}, redis=redis, defaults=quick)
        env = {**supervisor.env, "HELD": str(tmp_path / "held")}
        hampered = running(config, env, hampered=f"{QUICK},{hang}")
        daemon = await stack.enter_async_context(hampered)
        await supervisor.hears(b"READY=1")
        if "reload" in stuck:
            settings(tmp_path, {"other": ("scale", url)}, redis=redis, defaults=quick)
            daemon.process.send_signal(signal.SIGHUP)

        async def shown() -> bool:
            told = await reasons(daemon)
            return all(any(f"{name}: the loop is stuck" in one for one in told) for name in stuck)

        await until(shown, "503 with every reason")
        await until(lambda: stuck <= {*logged(daemon, "loop.stuck")}, "loop.stuck in the log")
        assert await metric(daemon, "poller_stuck_loops") >= len(stuck)
        supervisor.heard()
        ticks = await metric(daemon, TICKS)

        async def ticked() -> bool:
            return await metric(daemon, TICKS) > ticks + 5

        await until(ticked, "that what feeds the watchdog goes on")
        assert supervisor.heard() == []

        (tmp_path / "held").unlink()
        await until(
            lambda: logged(daemon, "loop.recovered") == logged(daemon, "loop.stuck"),
            "loop.recovered in the log",
        )
        await supervisor.hears(b"WATCHDOG=1")
        assert await metric(daemon, "poller_stuck_loops") == 0
        assert await daemon.end() == 0, daemon.text
        assert (await supervisor.hears(b"STOPPING=1")).count(b"READY=1") == 0
        assert len(logged(daemon, "loop.stuck")) == len({*logged(daemon, "loop.stuck")})


async def test_a_vendor_that_answers_slowly_step_by_step_is_not_stuck(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    """Every redirect, like a sign-in, is an exchange of its own, with a timeout of its own."""

    async def answer(request: web.Request) -> web.Response:
        await asyncio.sleep(0.5)
        hop = int(request.query.get("hop", "0"))
        if hop < 5:
            raise web.HTTPFound(request.url.update_query(hop=hop + 1))
        return web.json_response({"count": 0, "next": None, "previous": None, "results": []})

    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(served(answer))
        config = settings(tmp_path, {"s": ("scale", url)}, defaults="timeout = '1s'")
        hampered = running(config, supervisor.env, hampered=QUICK)
        daemon = await stack.enter_async_context(hampered)

        async def good() -> bool:
            return await metric(daemon, 'poller_source_up{source="s"}') == 1

        await until(good, "a good poll")
        assert logged(daemon, "loop.stuck") == []
        assert await daemon.end() == 0, daemon.text


@asynccontextmanager
async def served(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """A server on loopback that answers everything like this."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_an_event_loop_that_does_not_turn_starves_the_watchdog(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    config = settings(tmp_path, {"s": ("scale", "http://127.0.0.1:1")})
    env = {**supervisor.env, "HELD": str(tmp_path / "held")}
    async with running(config, env, hampered="block:poller.asking:Asker.begin@2") as daemon:
        base = await daemon.url()
        (tmp_path / "held").touch()

        async def dead() -> bool:
            try:
                async with asyncio.timeout(0.5):
                    await get(f"{base}/healthz")
            except TimeoutError:
                return True
            return False

        await until(dead, "no answer")
        supervisor.heard()
        assert await dead()
        assert supervisor.heard() == []
        (tmp_path / "held").unlink()
        await supervisor.hears(b"WATCHDOG=1")
        assert await daemon.end() == 0, daemon.text


LOOPS = {
    "poll[s]": (poll.Watch, "run"),
    "relay[redis]": (relay.Relay, "run"),
    "maintenance": (app.Daemon, "_maintain"),
    "loop lag": (app.Daemon, "_feel"),
    "reload": (app.Daemon, "_reload"),
}


@pytest.mark.parametrize("name", LOOPS)
async def test_a_loop_that_ends_by_itself_ends_everything_and_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, function = LOOPS[name]
    monkeypatch.setattr(owner, function, getattr(owner, function))  # to have it back afterwards
    hamper(f"end:{owner.__module__}:{owner.__name__}.{function}")
    vendors = {"scale": load("scale")}
    dead = "127.0.0.1:1"
    file = settings(tmp_path, {"s": ("scale", f"http://{dead}")}, redis=f"redis://{dead}")
    loaded = reading.load(file, {"scale": vendors["scale"].options}, {})
    async with open_journal(tmp_path / "journal.db") as journal:
        daemon = app.Daemon(loaded, vendors, journal, Random(1))
        with capture_logs() as logs, pytest.raises(ExceptionGroup) as failure:
            await asyncio.wait_for(daemon.run(app.Signals()), 20)
    assert failure.group_contains(RuntimeError, match=re.escape(f"{name} has ended"))
    assert [log["loop"] for log in logs if log["event"] == "loop.ended"] == [name]


async def test_a_daemon_that_ends_because_a_loop_did_says_exit_code_1(tmp_path: Path) -> None:
    config = settings(tmp_path, {"s": ("scale", "http://127.0.0.1:1")})
    async with running(config, hampered="end:poller.poll:Watch.run") as daemon:
        await until(lambda: daemon.process.returncode is not None, "the end")
        assert await daemon.end() == 1
    assert "RuntimeError: poll[s] has ended" in daemon.text
