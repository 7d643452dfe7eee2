"""Simulated vendors: `render` over a living world, served on loopback, with faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import NoReturn

from aiohttp import web

from poller.errors import PollerError
from poller.runs import Ms
from poller.wire import Request, Response, Vendor
from poller.world import World

FAULTS: Mapping[str, str] = {
    "500": "an internal error as HTML",
    "503": "unavailable for a while, with Retry-After: 1",
    "429": "too many requests, with Retry-After: 1",
    "401": "credentials refused",
    "html": "a login page with status 200",
    "torn": "JSON that ends in the middle",
    "empty": "an empty body with status 200",
    "hang": "no answer at all",
    "drop": "the connection closes in the middle of the body",
}
_HTML = b"<!DOCTYPE html><html><body><h1>Please log in</h1></body></html>"


def parse_faults(text: str) -> dict[str, float]:
    """Read `503=0.1,torn=0.05` into the probability of each fault.

    Raises:
        PollerError: it is not written like this; the message says how.
    """
    faults: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, share = part.strip().partition("=")
        try:
            faults[name] = float(share or "0.1")
        except ValueError:
            _refuse(part)
        if name not in FAULTS or not 0 <= faults[name] <= 1:
            _refuse(part)
    if sum(faults.values()) > 1:
        raise PollerError("--faults: the probabilities add up to more than 1")
    return faults


def _refuse(part: str) -> NoReturn:
    raise PollerError(
        f"--faults: {part!r} is not NAME=PROBABILITY with NAME one of {', '.join(FAULTS)}"
    )


@asynccontextmanager
async def serve(
    vendor: Vendor,
    world: World,
    *,
    port: int = 0,
    faults: Mapping[str, float] | None = None,
    seed: int = 0,
    now_ms: Callable[[], Ms],
) -> AsyncIterator[str]:
    """Serve one vendor's API on loopback while the context lasts; gives its base URL.

    The world is moved to the present before every answer, so it needs no task of its own.

    Raises:
        PollerError: the port is taken.
    """
    trouble = _Trouble({} if faults is None else faults, Random(seed))  # noqa: S311 - faults that can be replayed

    async def answer(incoming: web.Request) -> web.StreamResponse:
        world.advance(now_ms())
        request = Request(
            method=incoming.method,
            path=incoming.rel_url.raw_path,
            query=tuple(incoming.query.items()),
            headers=tuple((name.lower(), value) for name, value in incoming.headers.items()),
            body=await incoming.read(),
        )
        return await trouble.send(incoming, vendor.render(world, request))

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=0.1,
        handler_cancellation=True,  # nobody waits any more for an answer that hangs
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
        except OSError as error:
            why = str(error.strerror).rpartition(": ")[2]
            raise PollerError(f"port {port} cannot be used: {why}") from error
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class _Trouble:
    """Sends answers, or what goes wrong instead."""

    def __init__(self, faults: Mapping[str, float], random: Random) -> None:
        self._faults = faults
        self._random = random

    async def send(self, incoming: web.Request, response: Response) -> web.StreamResponse:
        """The answer, or a fault in its place."""
        fault = self._draw()
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault == "drop":
            return await self._drop(incoming, response)
        spoiled = _spoil(fault, response)
        return web.Response(
            status=spoiled.status,
            body=spoiled.body,
            headers={k: v for k, v in spoiled.headers.items() if k != "content-length"},
        )

    def _draw(self) -> str | None:
        chance = self._random.random()
        for name, share in self._faults.items():
            chance -= share
            if chance < 0:
                return name
        return None

    async def _drop(self, incoming: web.Request, response: Response) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Length": str(len(response.body) + 1)})
        with suppress(ConnectionResetError):  # the client has gone first
            await stream.prepare(incoming)
            await stream.write(response.body[: len(response.body) // 2])
        if incoming.transport is not None:
            incoming.transport.abort()
        return stream


def _spoil(fault: str | None, response: Response) -> Response:
    html = {"content-type": "text/html"}
    json = {"content-type": "application/json"}
    match fault:
        case None:
            return response
        case "html":
            return Response(status=200, headers=html, body=_HTML)
        case "torn":
            return Response(status=200, headers=json, body=response.body[: len(response.body) // 2])
        case "empty":
            return Response(status=200, headers=json)
        case "503" | "429":
            return Response(status=int(fault), headers={"retry-after": "1"}, body=b"")
        case _:
            return Response(status=int(fault), headers=html, body=b"<h1>Server Error</h1>")
