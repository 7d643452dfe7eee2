"""A vendor that answers with bodies made beforehand, in a process of its own.

Quick enough not to be what is measured: no HTTP library, one write per answer. Where a path has
several bodies, each connection gets them in turn, so that every answer differs from the last.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
import msgspec

from bench.measure import on_servers_cores
from poller.cli.common import loop

_TIMES = "/_times"
BIN_S = 0.1


class Routes(msgspec.Struct):
    """Start of a path → bodies, in turn; the first route that fits answers."""

    bodies: dict[str, list[str]]


@contextmanager
def serving(bodies: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Start such a server; gives its URL."""
    with on_servers_cores():
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.serving"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        routes = Routes({path: list(texts) for path, texts in bodies.items()})
        process.stdin.write(msgspec.json.encode(routes))
        process.stdin.close()
        port = int(process.stdout.readline())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def requests_since(url: str) -> list[int]:
    """How many requests such a server had in each 0.1 s since the last time that it was asked."""
    async with aiohttp.ClientSession() as session, session.get(url + _TIMES) as response:
        return msgspec.json.decode(await response.read(), type=list[int])


class _Server(asyncio.Protocol):
    def __init__(self, routes: Sequence[tuple[bytes, Sequence[bytes]]], times: Counter[int]):
        self._routes = routes
        self._times = times
        self._turns: Counter[bytes] = Counter()
        self._rest = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *requests, self._rest = (self._rest + data).split(b"\r\n\r\n")
        for request in requests:
            target = request[4 : request.index(b" ", 4)]
            self._transport.write(self._answer(target))

    def _answer(self, target: bytes) -> bytes:
        if target == _TIMES.encode():
            first, last = min(self._times, default=0), max(self._times, default=-1)
            counts = [self._times[at] for at in range(first, last + 1)]
            self._times.clear()
            return _packed(msgspec.json.encode(counts))
        self._times[int(time.monotonic() / BIN_S)] += 1
        for start, answers in self._routes:
            if start in target:
                turn = self._turns[start] = self._turns[start] + 1
                return answers[turn % len(answers)]
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def _packed(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


async def _serve() -> None:
    routes = msgspec.json.decode(sys.stdin.buffer.read(), type=Routes)
    packed = [
        (start.encode(), [_packed(body.encode()) for body in bodies])
        for start, bodies in routes.bodies.items()
    ]
    times: Counter[int] = Counter()
    running = asyncio.get_running_loop()
    server = await running.create_server(
        lambda: _Server(packed, times), "127.0.0.1", 0, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    loop(_serve())
