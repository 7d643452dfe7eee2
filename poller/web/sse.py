"""Events as they are committed, as server-sent events: `id` is the offset in the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from poller.events import Recorded
from poller.journal import Journal
from poller.journal.pages import Pages
from poller.runs import Ms
from poller.web.parameters import Parameters
from poller.web.problems import RequestProblem

_BATCH = 64
_HEARTBEAT_S = 15.0
_STALLED_S = 60.0
"""A client that takes nothing for so long is let go; it can resume."""
_GATHER_S = 0.05
"""Events that are committed so close together are sent together."""
_MOST_STREAMS = 100


class Wish(msgspec.Struct, frozen=True):
    """What one client wants: events behind an offset, of these sources and types or of any."""

    after: int
    sources: Sequence[str]
    types: Sequence[str]


class Streams:
    """All open streams; each reads the journal at its client's speed and keeps nothing."""

    def __init__(self, journal: Journal, pages: Pages, now_ms: Callable[[], Ms]) -> None:
        self._journal = journal
        self._pages = pages
        self._now_ms = now_ms
        self._open = 0
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def end(self, _app: web.Application) -> None:
        """Let every stream end where it is."""
        self._ending.set_result(None)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Send events until the client goes or the daemon ends."""
        wish = await self._wish(request)
        if self._open >= _MOST_STREAMS:
            detail = f"{_MOST_STREAMS} streams are open already"
            raise RequestProblem(503, detail, {"Retry-After": "10"})
        response = web.StreamResponse(headers={"X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        response.charset = "utf-8"
        self._open += 1
        try:
            await response.prepare(request)
            await self._send(response, wish)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._open -= 1
        return response

    async def _wish(self, request: web.Request) -> Wish:
        given = Parameters(request.query, ("source", "type", "since"))
        sources, types, since_ms = given.sources(), given.types(), given.since(self._now_ms())
        last, text = self._journal.last_offset, request.headers.get("Last-Event-ID", "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 19):
            given.problems.append("Last-Event-ID: must be an id of this stream, a whole number")
        given.check()
        if text:
            # One that is still to come is of another journal: nothing of this one was seen.
            after = int(text) if int(text) <= last else 0
        elif since_ms is not None:
            first = await self._pages.offset_at(since_ms)
            after = last if first is None else first
        else:
            after = last
        return Wish(after, sources, types)

    async def _send(self, response: web.StreamResponse, wish: Wish) -> None:
        loop = asyncio.get_running_loop()
        offset = wish.after
        await _write(response, b"retry: 1000\n: resumes with Last-Event-ID\n\n")
        beat_s = loop.time() + _HEARTBEAT_S
        while not self._ending.done():
            events, reached = await self._pages.events(
                offset, _BATCH, sources=wish.sources, types=wish.types
            )
            if events:
                await _write(response, b"".join(map(_framed, events)))
            elif reached == offset:
                await self._more(offset, beat_s)
            offset = reached
            if events:
                beat_s = loop.time() + _HEARTBEAT_S
            elif loop.time() >= beat_s:
                await _write(response, b": alive\nid: %d\n\n" % offset)
                beat_s = loop.time() + _HEARTBEAT_S

    async def _more(self, offset: int, until_s: float) -> None:
        """Wait for the next commit, for the time of a heartbeat, or for the end."""
        grown = asyncio.ensure_future(self._journal.grown(offset))
        try:
            left_s = max(0.0, until_s - asyncio.get_running_loop().time())
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait({grown, self._ending}, timeout=left_s, return_when=first)
            if grown.done():
                await asyncio.wait({self._ending}, timeout=_GATHER_S)
        finally:
            grown.cancel()


def _framed(event: Recorded) -> bytes:
    return b"id: %d\ndata: %b\n\n" % (event.offset, event.body)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(_STALLED_S):
        await response.write(data)
