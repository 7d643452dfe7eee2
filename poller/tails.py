"""Events as a subscriber reads them: from the Redis streams, or from the journal."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from poller.events import Event, decode
from poller.journal import Journal
from poller.runs import Ms
from poller.sinks.redis import RedisSink, stream_key

_LOOK_S = 0.3
_BATCH = 500


async def from_journal(
    journal: Journal, *, since_ms: Ms | None, last: int, until: asyncio.Event | None
) -> AsyncIterator[tuple[bytes, Event]]:
    """Bytes and event, oldest first: those since a time, or the last few; then those to come.

    Those to come until `until` is set; without it there are none.
    """
    await journal.refresh()
    if since_ms is None:
        offset = max(0, journal.last_offset - last)
    else:
        offset = await journal.offset_at(since_ms)
    while True:
        batch = await journal.read(offset, _BATCH)
        for event in batch:
            offset = event.offset
            yield event.body, decode(event.body)
        if not batch and await _enough(until):
            return


async def from_redis(
    sink: RedisSink,
    sources: Sequence[str],
    *,
    since_ms: Ms | None,
    last: int,
    until: asyncio.Event | None,
) -> AsyncIterator[tuple[bytes, Event]]:
    """The same from the streams of some sources, or of all that Redis knows if none are named.

    Raises:
        SinkUnavailable: Redis cannot be reached.
    """
    async with sink.client() as client:
        ids: dict[str, str] = {}
        skip_all_but = last if since_ms is None else None
        while True:
            names = sources or sorted(_text(name) for name in await client.smembers(_SOURCES))
            new = [await _read(client, ids, name, since_ms, last) for name in names]
            events = list(heapq.merge(*new))
            if skip_all_but is not None:
                events = events[len(events) - min(skip_all_but, len(events)) :]
                skip_all_but = None
            for _, body in events:
                yield body, decode(body)
            if await _enough(until):
                return


async def _enough(until: asyncio.Event | None) -> bool:
    """Whether to end; else after a while, when it is time to look again."""
    if until is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_S):
                await until.wait()
    return until is None or until.is_set()


_SOURCES = "poller:sources"


async def _read(
    client: Any, ids: dict[str, str], source: str, since_ms: Ms | None, last: int
) -> list[tuple[str, bytes]]:
    """New entries of one stream: (time of the event, its bytes)."""
    key = stream_key(source)
    if source in ids:
        entries = await client.xrange(key, min=f"({ids[source]}", count=_BATCH)
    elif since_ms is not None:
        entries = await client.xrange(key, min=str(since_ms))
    else:
        entries = list(reversed(await client.xrevrange(key, count=max(1, last))))
    if entries:
        ids[source] = _text(entries[-1][0])
    return [(_text(entry), fields[b"event"]) for entry, fields in entries]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
