"""A TCP proxy that breaks connections, at once or at a chosen point of the next exchange."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

CUTS = ("reset", "torn request", "lost reply", "torn reply", "half close", "stall")
"""Every way in which it breaks: all connections now, or one at its next request or reply."""
_CHUNK = 65_536


class _Cut(NamedTuple):
    """What is to break, where this is said."""

    kind: str
    for_s: float
    at: bytes


@dataclass(slots=True, eq=False)
class _Pair:
    """A client's connection, and the one to the server behind."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    loses_reply: bool = False

    def reset(self) -> None:
        """End both at once, without a goodbye."""
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with suppress(OSError):
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()


class Proxy:
    """Stands between clients and one server on loopback.

    Attributes:
        port: where clients connect.
        hits: how often it truly broke something, by kind.
        is_open: whether new connections are let through.
    """

    def __init__(self, name: str, server_port: int) -> None:
        self.name = name
        self.port = 0
        self.hits: Counter[str] = Counter()
        self.is_open = True
        self._server_port = server_port
        self._pairs: set[_Pair] = set()
        self._armed: deque[_Cut] = deque()

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Proxy]:
        """Let connections through while the context lasts."""
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0, limit=_CHUNK)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.reset()

    @property
    def links(self) -> int:
        """How many connections there are."""
        return len(self._pairs)

    def cut(self, kind: str, for_s: float, at: bytes = b"") -> None:
        """Break something in this way, where this is said; a stall lasts so long."""
        if kind == "reset":
            self.reset()
        else:
            self._armed.append(_Cut(kind, for_s, at))

    def reset(self) -> None:
        """Break every connection now."""
        self.hits["reset"] += len(self._pairs)
        for pair in self._pairs:
            pair.reset()

    def heal(self) -> None:
        """Break nothing more."""
        self._armed.clear()
        self.is_open = True

    def _takes(self, chunk: bytes, *kinds: str) -> tuple[str, float]:
        """What is to be done to this, if the first thing that is armed is one of these kinds."""
        if self._armed and self._armed[0].kind in kinds and self._armed[0].at in chunk:
            kind, for_s, _ = self._armed.popleft()
            self.hits[kind] += 1
            return kind, for_s
        return "", 0.0

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if not self.is_open:
                raise ConnectionError
            theirs, server = await asyncio.open_connection("127.0.0.1", self._server_port)
        except OSError:
            writer.transport.abort()
            return
        pair = _Pair(writer, server)
        self._pairs.add(pair)
        try:
            with suppress(OSError, ExceptionGroup):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._up(pair, reader))
                    group.create_task(self._down(pair, theirs))
        finally:
            self._pairs.discard(pair)
            pair.client.close()
            pair.server.close()

    async def _up(self, pair: _Pair, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(_CHUNK):
            kind, for_s = self._takes(chunk, "torn request", "lost reply", "stall")
            if kind == "stall":
                await asyncio.sleep(for_s)
            elif kind == "torn request":
                pair.server.write(chunk[: len(chunk) // 2])
                await asyncio.sleep(0.01)
                pair.reset()
            elif kind == "lost reply":
                pair.loses_reply = True
            pair.server.write(chunk)
            await pair.server.drain()
        pair.server.write_eof()

    async def _down(self, pair: _Pair, reader: asyncio.StreamReader) -> None:
        while chunk := await reader.read(_CHUNK):
            if pair.loses_reply:
                pair.reset()
            kind, for_s = self._takes(chunk, "torn reply", "half close")
            if kind == "torn reply":
                pair.client.write(chunk[: len(chunk) // 2])
                await asyncio.sleep(0.01)
                pair.reset()
            elif kind == "half close":
                pair.client.write_eof()
                await asyncio.sleep(for_s)
                pair.reset()
            pair.client.write(chunk)
            await pair.client.drain()
        pair.client.write_eof()
