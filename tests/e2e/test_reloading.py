"""SIGHUP changes what it is told to change, and leaves the rest alone."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from poller.brokers import Broker
from tests.daemon import Daemon, get, now_ms, running, settings, simulated, stream, until
from tests.delivered import ended, in_order, untold


@pytest.fixture
def redis_url(redis_broker: Broker) -> str:
    return f"{redis_broker.url}/0"


class Server:
    """A Scale without jobs that counts who comes.

    Attributes:
        status: of every answer.
        requests: how many there were.
        connections: address of everybody who ever connected and asked.
    """

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.requests = 0
        self.connections: set[object] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        self.requests += 1
        self.connections.add(request.transport and request.transport.get_extra_info("peername"))
        body: dict[str, Any] = {"count": 0, "next": None, "previous": None, "results": []}
        return web.json_response(body, status=self.status)


async def polls(daemon: Daemon, source: str) -> float:
    lines = (await get(f"{await daemon.url()}/metrics"))[1].splitlines()
    name = f'poller_polls_total{{source="{source}"}} '
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


async def polled(daemon: Daemon, source: str, more: int = 1) -> None:
    """Wait until so many more polls of a source have begun."""
    enough = await polls(daemon, source) + more

    async def begun() -> bool:
        return await polls(daemon, source) >= enough

    await until(begun, f"{more} polls of {source}")


def reloads(daemon: Daemon) -> list[list[str]]:
    """What each reload until now has changed."""
    lines = [line for line in daemon.lines if line["event"] == "poller.reloaded"]
    return [sorted(line["changed"]) for line in lines]


async def reload(daemon: Daemon) -> list[str]:
    """Send SIGHUP; gives what it has changed."""
    before = len(reloads(daemon))
    daemon.process.send_signal(signal.SIGHUP)
    await until(lambda: len(reloads(daemon)) > before, "poller.reloaded")
    return reloads(daemon)[before]


def table(name: str, url: str, *keys: str) -> str:
    return "\n".join([f'[sources.{name}]\nvendor = "scale"\nurl = "{url}"', *keys])


async def test_only_what_has_changed_is_polled_anew_and_only_who_was_refused_at_once(
    tmp_path: Path,
) -> None:
    steady, sleepy, refused, other = Server(), Server(), Server(401), Server()
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(s.serving()) for s in (steady, sleepy, refused)]
        rest = await stack.enter_async_context(other.serving())
        untouched = [
            table("steady", urls[0], "concurrency = 1"),
            table("sleepy", urls[1], 'interval = "1h"'),
            table("refused", urls[2]),
        ]

        def configure(*changing: str) -> Path:
            return settings(tmp_path, {}, extra="\n\n".join([*untouched, *changing]))

        config = configure(table("changed", rest), table("removed", rest))
        daemon = await stack.enter_async_context(running(config))
        for source in ("steady", "changed", "removed"):
            await polled(daemon, source, 3)
        await until(lambda: min(sleepy.requests, refused.requests) > 0, "everybody is asked")
        asked = sleepy.requests

        configure(table("changed", rest, "vanish_after = 7"), table("added", rest))
        assert await reload(daemon) == ["changed", "removed"]
        for source in ("steady", "changed", "added"):
            await polled(daemon, source, 3)
        await until(lambda: refused.requests == 2, "refused once more")
        assert len(steady.connections) == 1
        assert sleepy.requests == asked
        metrics = (await get(f"{await daemon.url()}/metrics"))[1]
        assert 'source="removed"' not in metrics
        assert await daemon.end() == 0, daemon.text
    assert (sleepy.requests, refused.requests) == (asked, 2)


async def test_a_source_that_was_away_for_a_while_goes_on_from_its_journal(
    tmp_path: Path, redis_url: str
) -> None:
    async with AsyncExitStack() as stack:
        _, world, url = await simulated(stack, "scale", jobs=3, pace=0.15)
        other = await stack.enter_async_context(Server().serving())
        extra = table("other", other)
        with_it, without = {"s": ("scale", url)}, dict[str, tuple[str, str]]()
        config = settings(tmp_path, with_it, redis=redis_url, extra=extra)
        daemon = await stack.enter_async_context(running(config))
        await polled(daemon, "s", 4)
        began_ms = now_ms()
        settings(tmp_path, without, redis=redis_url, extra=extra)
        assert await reload(daemon) == ["s"]
        told = await stream(redis_url, "s")
        left_ms = now_ms()

        def gone_on() -> bool:
            world.advance(now_ms())
            return ended(world, left_ms) >= 3

        await until(gone_on, "runs that end meanwhile")
        assert await stream(redis_url, "s") == told
        settings(tmp_path, with_it, redis=redis_url, extra=extra)
        assert await reload(daemon) == []
        until_ms = now_ms()
        missing = ["not looked yet"]

        async def caught_up() -> bool:
            events = await stream(redis_url, "s")
            missing[:] = untold(world, events, began_ms, until_ms)
            return not missing

        await until(caught_up, missing)
        assert await daemon.end() == 0, daemon.text
    events = await stream(redis_url, "s")
    in_order(events)
    assert not any(event["data"]["snapshot"] for event in events[len(told) :])


async def test_of_reloads_in_quick_succession_the_last_one_counts(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(Server().serving())
        config = settings(tmp_path, {"first": ("scale", url)})
        daemon = await stack.enter_async_context(running(config))
        await polled(daemon, "first")
        for name in ("second", "third", "first", "fourth"):
            settings(tmp_path, {name: ("scale", url)})
            daemon.process.send_signal(signal.SIGHUP)
        await polled(daemon, "fourth", 3)
        metrics = (await get(f"{await daemon.url()}/metrics"))[1]
        for name in ("first", "second", "third"):
            assert f'source="{name}"' not in metrics
        assert await daemon.end() == 0, daemon.text


async def test_defaults_reach_the_sources_and_other_tables_are_said_to_need_a_restart(
    tmp_path: Path, redis_url: str
) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(Server().serving())
        source = {"a": ("scale", url), "b": ("scale", url)}
        config = settings(tmp_path, source, redis=redis_url)
        env = {"SECRET": "planted-secret-4711"}
        daemon = await stack.enter_async_context(running(config, env))
        await polled(daemon, "a")
        assert await reload(daemon) == []
        assert not any(line["event"] == "settings.restart_needed" for line in daemon.lines)

        text = settings(
            tmp_path, source, redis=redis_url, mqtt="mqtt://127.0.0.1:1", defaults="down_after = 9"
        ).read_text(encoding="utf-8")
        text = text.replace('drain = "5s"', 'drain = "6s"')
        text = text.replace("[redis]", '[redis]\npassword = "env:SECRET"')
        config.write_text(text, encoding="utf-8")
        assert await reload(daemon) == ["a", "b"]
        told = await daemon.said("settings.restart_needed")
        assert told["keys"] == ["poller.drain", "redis.password", "mqtt"]
        await polled(daemon, "a", 2)
        assert await daemon.end() == 0
        assert "planted-secret-4711" not in daemon.text


async def test_a_ca_bundle_that_holds_none_is_refused_and_the_daemon_goes_on(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(Server().serving())
        config = settings(tmp_path, {"s": ("scale", url)})
        daemon = await stack.enter_async_context(running(config))
        await polled(daemon, "s")
        (tmp_path / "ca.pem").write_text("no certificate")
        settings(tmp_path, {"s": ("scale", url)}, defaults=f'verify_tls = "{tmp_path}/ca.pem"')
        daemon.process.send_signal(signal.SIGHUP)
        assert "verify_tls" in str(await daemon.said("settings.rejected"))
        await polled(daemon, "s", 3)
        assert await daemon.end() == 0, daemon.text
