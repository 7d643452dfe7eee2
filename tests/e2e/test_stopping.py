"""SIGTERM at any moment: it ends in time, and the next start goes on as if nothing had been."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from poller.brokers import Broker, free_port
from poller.world import World
from tests.daemon import Daemon, get, now_ms, running, settings, simulated, stream, until
from tests.delivered import ended, in_order, untold

ENDS_WITHIN_S = 5.0 + 15.0
"""`drain`, and a margin for a slow machine."""


@dataclass(kw_only=True)
class Place:
    """A simulated vendor and what a daemon needs to poll it.

    Attributes:
        faults: of the vendor, from now on.
        config: the settings file; the source is called `s`.
        since_ms: from when on everything must be told: first contact was over by then.
    """

    world: World
    faults: dict[str, float]
    folder: Path
    url: str
    redis: str
    config: Path = field(init=False)
    since_ms: int | None = None

    def configure(self, defaults: str = "") -> None:
        """Write the settings."""
        source = {"s": ("scale", self.url)}
        self.config = settings(self.folder, source, redis=self.redis, defaults=defaults)

    async def contacted(self, daemon: Daemon, more_than: int = 3) -> None:
        """Wait until first contact is over: some polls, the last of them good."""

        async def polled() -> bool:
            up = await metric(daemon, 'poller_source_up{source="s"}')
            return up == 1 and await polls(daemon) > more_than

        await until(polled, "first contact")
        self.since_ms = self.since_ms or now_ms()


@pytest.fixture
async def place(tmp_path: Path, redis_broker: Broker) -> AsyncIterator[Place]:
    faults: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        _, world, url = await simulated(stack, "scale", jobs=3, pace=0.15, faults=faults)
        redis = f"{redis_broker.url}/0"
        place = Place(world=world, faults=faults, folder=tmp_path, url=url, redis=redis)
        place.configure()
        yield place


async def metric(daemon: Daemon, name: str) -> float:
    lines = (await get(f"{await daemon.url()}/metrics"))[1].splitlines()
    values = [float(line.split()[1]) for line in lines if line.startswith(f"{name} ")]
    return values[0] if values else 0.0


async def polls(daemon: Daemon) -> float:
    return await metric(daemon, 'poller_polls_total{source="s"}')


# How each moment is reached


async def by_itself(place: Place, daemon: Daemon) -> None:
    """What hampers the daemon sends the signal."""


async def told(place: Place, daemon: Daemon) -> None:
    await place.contacted(daemon)
    daemon.process.send_signal(signal.SIGTERM)


async def vendor_hangs(place: Place, daemon: Daemon) -> None:
    await place.contacted(daemon)
    place.faults["hang"] = 1.0
    begun = await polls(daemon)

    async def another() -> bool:
        return await polls(daemon) > begun

    await until(another, "a poll that hangs")
    daemon.process.send_signal(signal.SIGTERM)


async def sleeps(place: Place, daemon: Daemon) -> None:
    await place.contacted(daemon, more_than=0)
    daemon.process.send_signal(signal.SIGINT)


async def silenced(place: Place, daemon: Daemon) -> None:
    assert (await daemon.said("poll.failed"))["reason"] == "limited"
    daemon.process.send_signal(signal.SIGTERM)


async def brokers_dead(place: Place, daemon: Daemon) -> None:
    await place.contacted(daemon)
    await daemon.said("relay.failed")
    daemon.process.send_signal(signal.SIGTERM)
    assert (await daemon.said("poller.not_drained"))["undelivered"]["redis"] > 0


async def drains(place: Place, daemon: Daemon) -> None:
    await place.contacted(daemon)
    daemon.process.send_signal(signal.SIGTERM)
    await daemon.said("poller.stopping")
    daemon.process.send_signal(signal.SIGTERM)
    assert (await daemon.said("poller.not_drained"))["undelivered"]["redis"] > 0


async def reloads(place: Place, daemon: Daemon) -> None:
    await place.contacted(daemon)
    place.configure("vanish_after = 7")
    daemon.process.send_signal(signal.SIGHUP)


@asynccontextmanager
async def busy() -> AsyncIterator[str]:
    """A vendor that wants to be left alone for an hour."""

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "3600"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", refuse)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When the signal comes.

    Attributes:
        reach: waits for it, and sends the signal if nothing else does.
        hampered: for `tests.hampered`.
        env: for the daemon that is stopped.
        ends: what it logs last.
    """

    reach: Callable[[Place, Daemon], Awaitable[None]] = by_itself
    hampered: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    ends: str = "poller.drained"


DEAD_PORT = free_port()
DEAD = {"POLLER_REDIS__URL": f"redis://127.0.0.1:{DEAD_PORT}"}
NEVER = {"POLLER_DEFAULTS__TIMEOUT": "1h"}
BEFORE_CONTACT = {
    "opening the journal": Moment(hampered="sigterm:poller.app:open_journal"),
    "beginning to listen": Moment(hampered="sigterm:poller.web:serve"),
    "being ready": Moment(hampered="sigterm:poller.app:notify"),
    "the first request": Moment(hampered="sigterm:poller.fetch:_Line.exchange", env=NEVER),
    "the first commit": Moment(hampered="sigterm:poller.journal:Journal.commit"),
    "Retry-After": Moment(reach=silenced),
    "the first delivery": Moment(hampered="sigterm:poller.sinks.redis:RedisConnection.send"),
}
AFTER_CONTACT = {
    "polling": Moment(reach=told),
    "a vendor that hangs": Moment(reach=vendor_hangs, env=NEVER),
    "sleep": Moment(
        reach=sleeps,
        env={"POLLER_DEFAULTS__INTERVAL": "1h", "POLLER_DEFAULTS__IDLE_INTERVAL": "1h"},
    ),
    "a reload": Moment(reach=reloads, hampered="sigterm:poller.ledger:Ledger.save"),
    "backoff from dead brokers": Moment(
        reach=brokers_dead, env=DEAD | {"POLLER_POLLER__DRAIN": "500ms"}, ends="poller.not_drained"
    ),
    "draining, and another signal": Moment(
        reach=drains, env=DEAD | {"POLLER_POLLER__DRAIN": "1h"}, ends="poller.not_drained"
    ),
}


@pytest.mark.parametrize(
    "moments", [BEFORE_CONTACT, AFTER_CONTACT], ids=["before_first_contact", "after_first_contact"]
)
async def test_signals_to_stop_end_it_in_time_and_the_streams_are_whole(
    moments: Mapping[str, Moment], place: Place
) -> None:
    for name, moment in moments.items():
        await stopped(place, name, moment)
    async with running(place.config) as daemon:
        await place.contacted(daemon)
        since_ms = place.since_ms or 0
        await until(lambda: ended(place.world, since_ms) >= 3, "runs that end")
        seen_until_ms = now_ms()
        missing = ["not looked yet"]

        async def caught_up() -> bool:
            events = await stream(place.redis, "s")
            missing[:] = untold(place.world, events, since_ms, seen_until_ms)
            return not missing

        await until(caught_up, missing)
        assert await daemon.end() == 0, daemon.text
    in_order(await stream(place.redis, "s"))


async def stopped(place: Place, name: str, moment: Moment) -> None:
    """Start a daemon and stop it at this moment."""
    async with AsyncExitStack() as stack:
        env = dict(moment.env)
        if moment.reach is silenced:
            env["POLLER_SOURCES__S__URL"] = await stack.enter_async_context(busy())
        if name == "the first request":
            place.faults["hang"] = 1.0
        hampered = running(place.config, env, hampered=moment.hampered or None)
        daemon = await stack.enter_async_context(hampered)
        await moment.reach(place, daemon)
        await until(lambda: daemon.process.returncode is not None, f"end at {name}", ENDS_WITHIN_S)
        assert await daemon.end() == 0, (name, daemon.text)
    assert "Traceback" not in daemon.text, name
    logged = [line["event"] for line in daemon.lines]
    assert logged[-1] == moment.ends, name
    assert logged.count("poller.stopping") == 1, name
    place.faults.clear()


async def test_what_does_not_end_is_left_behind_and_loses_nothing(place: Place) -> None:
    (place.folder / "held").touch()
    source, mqtt = {"s": ("scale", place.url)}, f"mqtt://127.0.0.1:{DEAD_PORT}"
    config = settings(place.folder, source, mqtt=mqtt)
    hampered = "set:poller.cli.daemon:_FAREWELL_S=0.3,block:socket:create_connection"
    env = {"HELD": str(place.folder / "held"), "POLLER_POLLER__DRAIN": "100ms"}
    async with running(config, env, hampered=hampered) as daemon:
        await place.contacted(daemon)
        daemon.process.send_signal(signal.SIGTERM)
        told = (await daemon.said("poller.not_drained"))["undelivered"]["mqtt"]
        await daemon.said("poller.gave_up")
        assert await daemon.end() == 0, daemon.text
    place.configure()
    async with running(place.config) as daemon:
        await place.contacted(daemon)
        assert await daemon.end() == 0, daemon.text
    events = await stream(place.redis, "s")
    in_order(events)
    assert len(events) >= told > 0
