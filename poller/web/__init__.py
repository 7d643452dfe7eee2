"""The HTTP side: the board, its API and its stream of events, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import orjson
from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from poller.errors import PollerError
from poller.journal import Journal
from poller.journal.pages import Pages
from poller.runs import Ms
from poller.web import hosts, openapi, page, problems
from poller.web.answers import Facts
from poller.web.api import Api
from poller.web.problems import Handler
from poller.web.sse import Streams

_READY_S = 4.0


@asynccontextmanager
async def serve(
    listen: str,
    token: str | None,
    facts: Facts,
    *,
    journal: Journal,
    pages: Pages,
    now_ms: Callable[[], Ms],
) -> AsyncIterator[str]:
    """Serve while the context lasts; gives the URL.

    Args:
        listen: `host:port`; port 0 takes a free one.
        token: what every path but `/healthz` wants as bearer token, if anything.
        facts: what the daemon says of itself.
        journal: tells when there are new events.
        pages: what is read of it, apart from the relays.
        now_ms: the wall clock.

    Raises:
        PollerError: the address cannot be listened on.
    """
    api, streams = Api(facts, journal, pages, now_ms), Streams(journal, pages, now_ms)
    host, _, port = listen.rpartition(":")
    guard = _guard(token) if token else hosts.only_own(host)
    app = web.Application(middlewares=[problems.told, guard])
    app.on_response_prepare.append(_harden)
    app.on_shutdown.append(streams.end)
    app.router.add_get("/", page.board)
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz(facts))
    app.router.add_get("/metrics", _metrics(facts))
    app.router.add_get("/openapi.json", openapi.serve)
    app.router.add_get("/api/v1/sources", api.sources)
    app.router.add_get("/api/v1/runs", api.runs)
    app.router.add_get("/api/v1/runs/{ids:(?s:.*)}", api.run)
    app.router.add_get("/api/v1/stats", api.stats)
    app.router.add_get("/api/v1/events", streams.stream, allow_head=False)
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=1.0, handler_cancellation=True
    )
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
        scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        right = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected)
        if request.path == "/healthz" or (right and scheme.lower() == "bearer"):
            return await handler(request)
        if request.path == "/" and request.method in (hdrs.METH_GET, hdrs.METH_HEAD):
            response = page.answer(401)
        else:
            response = problems.problem(401, "the token is missing or wrong")
        response.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
        return response

    return guard


async def _harden(_request: web.Request, response: web.StreamResponse) -> None:
    """Let browsers keep nothing, guess no types, and show no answer within another site."""
    fields = response.headers
    fields.setdefault(hdrs.CACHE_CONTROL, "no-store")
    fields.setdefault("Content-Security-Policy", page.NOTHING)
    fields.setdefault("Cross-Origin-Resource-Policy", "same-origin")
    fields.setdefault("Referrer-Policy", "no-referrer")
    fields.setdefault("X-Content-Type-Options", "nosniff")


async def _healthz(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


def _readyz(facts: Facts) -> Handler:
    async def readyz(_request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_READY_S):
                troubles = await facts.troubles()
        except TimeoutError:
            troubles = [f"the daemon has not told within {_READY_S:.0f} s how it is"]
        except PollerError as error:
            troubles = [str(error)]
        body = orjson.dumps({"ready": not troubles, "reasons": troubles})
        status = 503 if troubles else 200
        return web.Response(status=status, body=body, content_type="application/json")

    return readyz


def _metrics(facts: Facts) -> Handler:
    async def metrics(_request: web.Request) -> web.Response:
        await facts.refresh_metrics()
        body = generate_latest(facts.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return metrics
