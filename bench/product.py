"""The product's own objects, put together as `app` does, with polls that follow at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from random import Random
from typing import Any

from bench.measure import Cost, costing
from poller import fetch
from poller.app import now_ms
from poller.fetch import Endpoint, Fetch
from poller.journal import Journal
from poller.ledger import Ledger, open_ledger
from poller.poll import Plan, Watch
from poller.relay import Relay
from poller.schedule import Pace
from poller.settings import NoAuth
from poller.sinks import Sink
from poller.telemetry import Metrics
from poller.vendors import load
from poller.wire import Request, Response

RETENTION_S = 30 * 86_400.0


class Gate:
    """Lets so many questions of all sources through, and knows when all wait here again."""

    def __init__(self, sources: int) -> None:
        self._sources = sources
        self._left = 0
        self._waiting = 0
        self._open = asyncio.Event()
        self._idle = asyncio.Event()

    def guard(self, ask: Fetch) -> Fetch:
        """The same way to ask, behind this gate."""

        async def guarded(request: Request) -> Response:
            if self._left <= 0:
                await self._wait()
            self._left -= 1
            return await ask(request)

        return guarded

    async def _wait(self) -> None:
        self._waiting += 1
        if self._waiting == self._sources:
            self._idle.set()
        while self._left <= 0:
            self._open.clear()
            await self._open.wait()
        self._waiting -= 1

    async def idle(self) -> None:
        """Wait until every source waits."""
        await self._idle.wait()

    async def let(self, requests: int) -> None:
        """Let so many through; returns when every source waits for the next."""
        self._left = requests
        self._idle.clear()
        self._open.set()
        await self._idle.wait()


class Polling:
    """Sources that poll without a pause, as many requests at a time as there are sources."""

    def __init__(self, gate: Gate, ledgers: Sequence[Ledger], relays: Sequence[Relay]) -> None:
        self.ledgers = ledgers
        self._gate = gate
        self._relays = relays

    async def cost(self, polls: int) -> Cost:
        """What so many polls take, with the delivery of what they find."""
        with costing(polls) as cost:
            await self.let(polls)
        return cost

    async def let(self, polls: int) -> None:
        """Let so many polls happen."""
        await self._gate.let(polls)
        for relay in self._relays:
            await relay.drained()


@asynccontextmanager
async def polling(
    journal: Journal,
    vendor: str,
    url: str,
    *,
    sources: int,
    options: dict[str, Any] | None = None,
    sink: Sink | None = None,
    name: str = "source",
) -> AsyncIterator[Polling]:
    """Sources of one vendor; leaving ends them.

    All have made first contact and are read a few times when this is entered.
    """
    metrics = Metrics()
    gate = Gate(sources)
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(_cancelled())
        relays = [relay_to(sink, journal, metrics)] if sink else []
        tasks += [asyncio.create_task(relay.run()) for relay in relays]
        ledgers = []
        for number in range(sources):
            plan = plan_of(vendor, f"{name}-{number}", options or {})
            ledger = await ledger_of(journal, plan, metrics)
            ask = await stack.enter_async_context(asking(url, plan, metrics))
            watch = Watch(plan, ledger, gate.guard(ask), metrics, now_ms=now_ms, random=Random(1))
            tasks.append(asyncio.create_task(watch.run()))
            ledgers.append(ledger)
        await gate.idle()
        polls = Polling(gate, ledgers, relays)
        await polls.let(20 * sources)
        yield polls


def asking(url: str, plan: Plan, metrics: Metrics) -> Any:
    """The way to a source, counted as `app` counts."""
    by_code = cache(lambda code: metrics.requests.labels(plan.source, code))
    endpoint = Endpoint(url=url, auth=NoAuth(), concurrency=plan.concurrency)
    return fetch.connect(
        endpoint,
        counted=lambda code: by_code(code).inc(),
        now_ms=now_ms,
    )


def plan_of(vendor: str, source: str, options: dict[str, Any], **changes: Any) -> Plan:
    """A source whose polls follow each other without a pause."""
    loaded = load(vendor)
    fields: dict[str, Any] = {
        "pace": Pace(interval_s=0.0, idle_interval_s=0.0, retry_refused_s=300.0),
        "concurrency": 1,
        "rate_per_s": 1e9,
        "resync_s": 3600.0,
        "vanish_after": 3,
        "timeout_s": 30.0,
    }
    return Plan(
        source=source, vendor=loaded, options=loaded.options(**options), **(fields | changes)
    )


async def ledger_of(journal: Journal, plan: Plan, metrics: Metrics) -> Ledger:
    """The ledger that a start finds in the journal."""
    return await open_ledger(
        journal,
        metrics,
        source=plan.source,
        vendor=plan.vendor.name,
        first_contact="active",
        down_after=3,
        retention_s=RETENTION_S,
        now_ms=now_ms(),
    )


def relay_to(sink: Sink, journal: Journal, metrics: Metrics | None = None) -> Relay:
    """What takes the journal's events to a sink."""
    return Relay(sink, journal, metrics or Metrics(), now_ms=now_ms, random=Random(1))


@asynccontextmanager
async def relaying(sink: Sink, journal: Journal) -> AsyncIterator[Relay]:
    """The same, at work."""
    async with _cancelled() as tasks:
        relay = relay_to(sink, journal)
        tasks.append(asyncio.create_task(relay.run()))
        yield relay


@asynccontextmanager
async def _cancelled() -> AsyncIterator[list[asyncio.Task[None]]]:
    """Tasks that end with this context, and whose errors come out of it."""
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def until(done: Callable[[], bool], within_s: float) -> None:
    """Wait for something that tells nobody when it comes about.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + within_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(0.01)
