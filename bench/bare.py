"""The floors that several rows share: the least that anybody's code would do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp

from bench.measure import Cost, costing


@asynccontextmanager
async def getting(
    url: str, in_flight: int, read: Callable[[bytes], object] = len
) -> AsyncIterator[Callable[[int], Awaitable[Cost]]]:
    """GET and read, over and over, so many at a time; each body is given to `read`."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=in_flight), cookie_jar=aiohttp.DummyCookieJar()
    ) as session:

        async def get(times: int) -> None:
            for _ in range(times):
                async with session.get(url) as response:
                    read(await response.read())

        async def cost(requests: int) -> Cost:
            with costing(requests) as cost:
                await asyncio.gather(*(get(requests // in_flight) for _ in range(in_flight)))
            cost.operations = requests // in_flight * in_flight
            return cost

        yield cost
