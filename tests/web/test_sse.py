"""The stream of events: in journal order, resumed without a gap, at the client's speed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import pytest

from poller import web
from poller.events import Recorded
from poller.journal import Journal
from poller.journal.pages import Pages
from poller.runs import State
from tests.served import NOW_MS, Patient, Served, known, serving


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, Patient()) as here:
        yield here


class Stream:
    """A client of the stream, field by field, as a browser reads it."""

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        self.last_id = ""
        self.comments: list[str] = []
        self._lines = lines

    async def next(self) -> dict[str, Any]:
        """The next event; ids without data count, too."""
        data = ""
        async for raw in self._lines:
            field, _, value = raw.decode().rstrip("\n").partition(":")
            value = value.removeprefix(" ")
            match field:
                case "id":
                    self.last_id = value
                case "data":
                    data += value
                case "" if value:
                    self.comments.append(value)
                case "" if data:
                    event: dict[str, Any] = msgspec.json.decode(data)
                    return event
        raise EOFError

    async def runs(self, count: int) -> list[str]:
        """The runs of the next events."""
        return [(await self.next())["subject"] for _ in range(count)]


@asynccontextmanager
async def streaming(here: Served, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        asyncio.timeout(60),
        here.client.get(f"{here.url}/api/v1/events{query}", headers=fields) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        stream = Stream(aiter(response.content))
        yield stream


async def test_events_come_as_they_are_committed_in_journal_order(here: Served) -> None:
    await here.tell(known("before"))
    async with streaming(here) as stream:
        await here.tell(known("1"), known("2", State.FAILED))
        await here.tell(known("3"), source="b")
        first = await stream.next()
        assert first["data"]["run"]["id"] == "1"
        assert first["type"] == "dev.poller.job.running"
        assert stream.last_id == "2"
        assert await stream.runs(2) == ["2", "3"]
        assert stream.last_id == "4"


async def test_the_data_is_the_journals_bytes(here: Served) -> None:
    await here.tell(known("😀\n\u2028"))
    [recorded] = await here.journal.read(0, 1)
    async with streaming(here, "?since=1h") as stream:
        assert await stream.next() == msgspec.json.decode(recorded.body)


@pytest.mark.parametrize(
    ("query", "runs"),
    [
        ("?source=b", ["3", "4"]),
        ("?source=a&source=b", ["1", "2", "3", "4"]),
        ("?type=failed", ["2", "4"]),
        ("?type=job.failed&source=b", ["4"]),
        ("?type=dev.poller.job.failed&type=running", ["1", "2", "3", "4"]),
        ("?since=90s", ["3", "4"]),
        ("?since=2027-01-15T07:58:30Z", ["3", "4"]),
        ("?since=2027-01-15T08:58:30%2B01:00", ["3", "4"]),
        ("?since=2027-01-15T08:58:30+01:00", ["3", "4"]),
    ],
)
async def test_a_stream_is_filtered(here: Served, query: str, runs: list[str]) -> None:
    """What does not fit would come before the last one."""
    await here.tell(known("1"), at_ms=NOW_MS - 120_000)
    await here.tell(known("2", State.FAILED), at_ms=NOW_MS - 120_000)
    await here.tell(known("3"), source="b", at_ms=NOW_MS - 60_000)
    await here.tell(known("4", State.FAILED), source="b", at_ms=NOW_MS - 60_000)
    await here.tell(known("end", State.FAILED), source="b", at_ms=NOW_MS)
    query = query if "since" in query else f"{query}&since=1h"
    async with streaming(here, query) as stream:
        assert await stream.runs(len(runs) + 1) == [*runs, "end"]


async def test_since_a_time_after_all_events_gives_what_comes_next(here: Served) -> None:
    await here.tell(known("1"), at_ms=NOW_MS - 120_000)
    async with streaming(here, "?since=1s") as stream:
        await here.tell(known("2"))
        assert await stream.runs(1) == ["2"]


async def test_a_stream_resumes_behind_the_last_event_that_was_received(here: Served) -> None:
    await here.tell(*(known(str(number)) for number in range(300)))
    async with streaming(here, "?since=1h") as stream:
        await stream.runs(100)
        last_id = stream.last_id
    await here.tell(known("new"))
    async with streaming(here, "?since=1h", Last_Event_ID=last_id) as stream:
        assert await stream.runs(201) == [*map(str, range(100, 300)), "new"]


async def test_an_id_of_another_journal_begins_at_the_beginning(here: Served) -> None:
    await here.tell(known("1"))
    async with streaming(here, Last_Event_ID="4711") as stream:
        assert await stream.runs(1) == ["1"]


@pytest.mark.parametrize("last_id", ["x", "-1", "1.5", "9" * 30, "\u0661"])
async def test_an_id_that_is_none_is_refused(here: Served, last_id: str) -> None:
    problem = await here.get("/api/v1/events", status=400, **{"Last-Event-ID": last_id})
    assert problem["detail"] == "Last-Event-ID: must be an id of this stream, a whole number"


class Endless:
    """A journal that has more than anybody can read, or nothing that fits; it needs no thread."""

    def __init__(self, *, body_bytes: int) -> None:
        self.last_offset = 7
        self.asked = 0
        self._body = b"{%s}" % (b" " * body_bytes) if body_bytes else b""

    async def grown(self, _offset: int) -> None:
        await asyncio.Event().wait()

    async def events(self, after: int, limit: int, **_: Any) -> tuple[list[Recorded], int]:
        self.asked += 1
        if not self._body:
            return [], max(after, 4711)
        offsets = range(after + 1, after + limit + 1)
        events = [Recorded(offset, "a", offset, "t", "j", 0, self._body) for offset in offsets]
        return events, after + limit


@asynccontextmanager
async def endless(body_bytes: int = 0) -> AsyncIterator[tuple[Endless, str]]:
    journal = Endless(body_bytes=body_bytes)
    served = web.serve(
        "127.0.0.1:0",
        None,
        Patient(),
        journal=cast("Journal", journal),
        pages=cast("Pages", journal),
        now_ms=lambda: NOW_MS,
    )
    async with served as url:
        yield journal, url


@pytest.mark.looptime
async def test_a_filtered_stream_moves_its_id_on_at_every_heartbeat() -> None:
    loop = asyncio.get_running_loop()
    async with (
        endless() as (_, url),
        aiohttp.ClientSession() as client,
        client.get(f"{url}/api/v1/events?type=failed") as response,
    ):
        await response.content.readuntil(b"\n\n")
        for beat in (15, 30, 45):
            assert await response.content.readuntil(b"\n\n") == b": alive\nid: 4711\n\n"
            assert loop.time() == pytest.approx(beat, abs=0.5)


@pytest.mark.looptime
async def test_a_client_that_reads_nothing_fills_no_memory_and_is_let_go_after_a_minute() -> None:
    loop = asyncio.get_running_loop()
    async with endless(body_bytes=10_000) as (journal, url):
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as lazy:
            lazy.setblocking(False)
            await loop.sock_sendall(lazy, b"GET /api/v1/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            for _ in range(1000):
                await asyncio.sleep(0)
            full = journal.asked
            for _ in range(1000):
                await asyncio.sleep(0)
            assert 0 < journal.asked == full < 100
            await asyncio.sleep(59)
            assert journal.asked == full
            await asyncio.sleep(2)
            while await loop.sock_recv(lazy, 1 << 20):
                assert journal.asked == full


async def test_too_many_streams_are_refused_and_a_closed_one_makes_room(here: Served) -> None:
    url = f"{here.url}/api/v1/events"
    streams = [await here.client.get(url) for _ in range(100)]
    async with here.client.get(url) as refused:
        assert refused.status == 503
        assert refused.headers["Retry-After"] == "10"
    streams.pop().close()
    async with asyncio.timeout(20):
        while (again := await here.client.get(url)).status != 200:
            again.close()
    for stream in (*streams, again):
        stream.close()


@pytest.mark.looptime
async def test_streams_end_with_the_server_at_once_and_whole(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as client:
        async with serving(tmp_path, Patient()) as here:
            await here.tell(known("1"))
            response = await client.get(f"{here.url}/api/v1/events?since=1h")
            assert response.status == 200
            ending_s = asyncio.get_running_loop().time()
        assert (await response.read()).endswith(b"\n\n")
        assert asyncio.get_running_loop().time() == ending_s
