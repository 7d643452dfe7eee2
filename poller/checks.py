"""`poller check`: lists once at every source, connects to every sink; writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from poller.errors import Invalid, Limited, Rejected, SinkUnavailable, Unreachable, VendorError
from poller.fetch import Fetch
from poller.known import Memory
from poller.runs import Ms
from poller.sinks import Sink
from poller.wire import Options, Page, Request, Vendor, read

_RETENTION_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of checking one source or sink: what is wrong and what to do, if anything."""

    place: str
    ok: bool
    what: str
    advice: str = ""


async def check_source(
    place: str, vendor: Vendor, options: Options, ask: Fetch, now_ms: Callable[[], Ms]
) -> Finding:
    """Ask a source's first listings once."""
    at_ms = now_ms()
    memory = Memory(now_ms=at_ms, contact_ms=at_ms, since_ms=at_ms - _RETENTION_MS)
    requests = [request for request in vendor.start(options, memory) if not request.by_id]

    async def first(request: Request) -> Page:
        page = read(vendor, options, request, await ask(request), memory)
        again = [follow for follow in page.follow if follow.path == request.path and not page.runs]
        return await first(again[0]) if again and again[0].headers != request.headers else page

    try:
        pages = await asyncio.gather(*(first(request) for request in requests))
    except VendorError as error:
        return Finding(place=place, ok=False, what=str(error), advice=_advice(place, error))
    rows = sum(len(page.runs) for page in pages)
    bad = [row for page in pages for row in page.bad]
    if bad:
        what = f"{len(bad)} rows cannot be read, e.g. {bad[0].at}: {bad[0].why}"
        return Finding(place=place, ok=False, what=what, advice="the others would be published")
    return Finding(place=place, ok=True, what=f"answers; {rows} runs on the first page")


async def check_sink(place: str, sink: Sink) -> Finding:
    """Connect to a sink, and leave again."""
    try:
        async with sink.connect() as connection:
            await connection.send([])
    except SinkUnavailable as error:
        return Finding(place=place, ok=False, what=str(error))
    return Finding(place=place, ok=True, what="connects")


def _advice(place: str, error: VendorError) -> str:
    match error:
        case Rejected():
            return f"check {place}.auth, and that the user may list jobs"
        case Limited():
            return f"wait, then lower {place}.rate or raise {place}.interval"
        case Invalid():
            return f"check {place}.url: it must lead to the API, not to a page for people"
        case Unreachable():
            return f"check {place}.url and that the server is up and reachable from here"
        case _:
            return ""
