"""The stream of a real daemon, which is killed and started again under its clients."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp

from tests.daemon import Daemon, Event, get, running, settings, simulated, until


async def read(url: str, last_id: str, count: int) -> tuple[list[Event], str]:
    """So many events from behind an id on, and the id of the last."""
    events: list[Event] = []
    headers = {"Last-Event-ID": last_id} if last_id else {}
    async with (
        asyncio.timeout(30),
        aiohttp.ClientSession() as client,
        client.get(f"{url}/api/v1/events?since=1d", headers=headers) as response,
    ):
        async for line in response.content:
            if line.startswith(b"id: "):
                last_id = line[4:].decode().strip()
            elif line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
                if len(events) == count:
                    break
    return events, last_id


async def written(daemon: Daemon) -> int:
    """The offset of the newest event."""
    status = json.loads((await get(f"{await daemon.url()}/api/v1/sources"))[1])
    offset: int = status["offset"]
    return offset


async def test_a_client_that_resumes_misses_nothing_over_restarts_and_gets_nothing_twice(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as stack:
        sources = {n: (n, (await simulated(stack, n, pace=0.2))[2]) for n in ("scale", "kylin")}
        config = settings(tmp_path, sources)
        events: list[Event] = []
        last_id = ""
        for ending in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
            async with running(config) as daemon:
                url = await daemon.url()
                more, last_id = await read(url, last_id, 7)
                events += more
                offset = int(last_id)

                async def grown(daemon: Daemon = daemon, offset: int = offset) -> bool:
                    return await written(daemon) > offset

                await until(grown, "events that this client has not read")
                await daemon.end(ending)
        async with running(config) as daemon:
            rest = await written(daemon) - int(last_id)
            assert rest > 0
            more, last_id = await read(await daemon.url(), last_id, rest)
            events += more
        assert len({event["id"] for event in events}) == len(events) == int(last_id)
        for source in sources:
            own = [event for event in events if event["data"]["source"] == source]
            assert [int(event["sequence"]) for event in own] == [*range(1, len(own) + 1)]


async def test_an_open_stream_ends_when_the_daemon_does(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        url = (await simulated(stack, "scale"))[2]
        daemon = await stack.enter_async_context(
            running(settings(tmp_path, {"scale": ("scale", url)}))
        )
        client = await stack.enter_async_context(aiohttp.ClientSession())
        response = await client.get(f"{await daemon.url()}/api/v1/events?type=unknown")
        assert response.status == 200
        assert await daemon.end() == 0
        assert (await response.read()).endswith(b"\n\n")


async def test_the_api_tells_how_the_daemon_does(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        faults: dict[str, float] = {}
        urls = {n: (n, (await simulated(stack, n, faults=faults))[2]) for n in ("scale", "cdm")}
        daemon = await stack.enter_async_context(running(settings(tmp_path, urls)))
        base = await daemon.url()

        async def condition() -> dict[str, str]:
            status = json.loads((await get(f"{base}/api/v1/sources"))[1])
            return {source["source"]: source["condition"] for source in status["sources"]}

        async def everywhere(word: str) -> bool:
            return set((await condition()).values()) == {word}

        await until(lambda: everywhere("up"), "every source is up")
        faults["500"] = 1.0
        await until(lambda: everywhere("down"), "every source is down")
        status = json.loads((await get(f"{base}/api/v1/sources"))[1])
        assert status["instance"] == "test"
        assert {source["reason"] for source in status["sources"]} == {"unreachable"}
        assert all(source["latency"]["polls"] > 3 for source in status["sources"])
        page = json.loads((await get(f"{base}/api/v1/runs?source=scale"))[1])
        known = next(one for one in status["sources"] if one["source"] == "scale")["runs"]
        assert len(page["runs"]) == sum(known.values()) > 0
        code, body = await get(f"{base}/")
        assert (code, body[:15]) == (200, "<!doctype html>")
