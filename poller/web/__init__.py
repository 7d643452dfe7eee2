"""The HTTP side: health and metrics."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from poller.errors import PollerError
from poller.telemetry import Metrics
from poller.web import hosts

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_READY_S = 4.0


class Health(Protocol):
    """What the daemon says of itself."""

    metrics: Metrics

    async def troubles(self) -> list[str]:
        """Why it is not ready, a sentence each; empty if it is."""

    async def refresh_metrics(self) -> None:
        """Bring the metrics up to date that are only read now and then."""


@asynccontextmanager
async def serve(listen: str, token: str | None, health: Health) -> AsyncIterator[str]:
    """Serve while the context lasts; gives the URL.

    Args:
        listen: `host:port`; port 0 takes a free one.
        token: what every path but `/healthz` wants as bearer token, if anything.
        health: what is served.

    Raises:
        PollerError: the address cannot be listened on.
    """
    host, _, port = listen.rpartition(":")
    app = web.Application(middlewares=[_guard(token) if token else hosts.only_own(host)])
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz(health))
    app.router.add_get("/metrics", _metrics(health))
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host.strip("[]") or None, int(port))
        try:
            await site.start()
        except OSError as error:
            why = str(error.strerror).rpartition(": ")[2]
            raise PollerError(f"http.listen: cannot listen on {listen}: {why}") from error
        address = runner.addresses[0]
        yield f"http://{host or 'localhost'}:{address[1]}"
    finally:
        await runner.cleanup()


def _guard(token: str) -> Middleware:
    expected = token.encode()

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        right = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected)
        if request.path != "/healthz" and not (right and scheme.lower() == "bearer"):
            return web.Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return guard


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _readyz(health: Health) -> Handler:
    async def readyz(_request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_READY_S):
                troubles = await health.troubles()
        except TimeoutError:
            troubles = [f"the daemon has not told within {_READY_S:.0f} s how it is"]
        except PollerError as error:
            troubles = [str(error)]
        body = orjson.dumps({"ready": not troubles, "reasons": troubles})
        status = 503 if troubles else 200
        return web.Response(status=status, body=body, content_type="application/json")

    return readyz


def _metrics(health: Health) -> Handler:
    async def metrics(_request: web.Request) -> web.Response:
        await health.refresh_metrics()
        body = generate_latest(health.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return metrics
