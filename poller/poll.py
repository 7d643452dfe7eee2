"""The polling loop of one source: a poll, a sleep, for ever; and what a failed poll means."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

import structlog

from poller.asking import Asker, Plan
from poller.errors import Invalid, Rejected, VendorError
from poller.fetch import Fetch
from poller.ledger import Ledger
from poller.runs import Ms
from poller.telemetry import Metrics
from poller.visit import Visitor

__all__ = ["Plan", "Watch"]

log = structlog.get_logger()

_PRUNE_EVERY_S = 3600.0
_POLLS_REMEMBERED = 20


class Watch:
    """One source under watch.

    Attributes:
        ledger: what is known of it.
        poke: set it to poll at once; never before the vendor's Retry-After.
        began_ms: when the last poll began.
        next_ms: when the next poll is due; None while one is under way.
        took_s: how long the last polls took.
    """

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        fetch: Fetch,
        metrics: Metrics,
        *,
        now_ms: Callable[[], Ms],
        random: Random,
    ) -> None:
        self.ledger = ledger
        self.poke = asyncio.Event()
        self.began_ms: Ms | None = None
        self.next_ms: Ms | None = None
        self.took_s: deque[float] = deque(maxlen=_POLLS_REMEMBERED)
        self._plan = plan
        self._asker = Asker(plan, fetch, now_ms)
        self._visitor = Visitor(plan, ledger, self._asker, metrics, now_ms)
        self._polls = metrics.polls.labels(plan.source)
        self._duration = metrics.poll_duration.labels(plan.source)
        self._now_ms = now_ms
        self._random = random
        self._refusals = 0
        self._pruned_s: float | None = None

    @property
    def due_s(self) -> float:
        """When the next sign of life is due, by the loop's clock."""
        return self._asker.due_s

    @property
    def budget_used(self) -> float:
        """Which share of the source's rate was used in about the last minute."""
        return self._asker.budget_used

    def alive(self) -> None:
        """Something was heard from the vendor, if only half of an answer to a question."""
        self._asker.alive()

    def retry_refused(self) -> None:
        """Poll at once if credentials were refused, which else waits long."""
        if self._refusals:
            self.poke.set()

    async def run(self) -> None:
        """Poll for ever.

        Raises:
            JournalError: what was found could not be written; also as an ExceptionGroup.
        """
        try:
            while True:
                await self._sleep(await self._step())
        finally:
            await self.ledger.save()

    async def _step(self) -> float:
        """One poll, whatever comes of it; gives the seconds until the next."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        self.began_ms = began_ms = self._now_ms()
        self.next_ms = None
        self._polls.inc()
        try:
            await self._visitor.poll()
        except VendorError as error:
            wait_s = await self._fail(error)
        else:
            self._refusals = 0
            wait_s = self._after_good(began_ms)
            wait_s -= loop.time() - began_s
            await self._prune(loop.time())
        self.took_s.append(loop.time() - began_s)
        self._duration.observe(self.took_s[-1])
        return max(wait_s, 0.0)

    def _after_good(self, began_ms: Ms) -> float:
        """Seconds from the start of a good poll to the next."""
        pace, forecast = self._plan.pace, self.ledger.forecast
        due_s = None
        if forecast is not None:
            due_s = 0.0 if self._visitor.holds else forecast.due_s(self.ledger.index, began_ms)
        return pace.after_good(active=self._visitor.expects, random=self._random, due_s=due_s)

    async def _fail(self, error: VendorError) -> float:
        """Take note of a failed poll; gives the seconds until the next."""
        if not self.ledger.condition.failures:
            body: dict[str, Any] = {"body": error.body} if isinstance(error, Invalid) else {}
            log.warning(
                "poll.failed",
                source=self._plan.source,
                reason=error.reason,
                message=str(error),
                **body,
            )
        await self.ledger.failed(error, self._now_ms())
        failures = self.ledger.condition.failures
        if isinstance(error, Rejected):
            failures = self._refusals = self._refusals + 1
        return self._plan.pace.after_failed(error, failures, self._random)

    async def _sleep(self, wait_s: float) -> None:
        """Wait, at least as long as the vendor has asked; a poke ends the rest."""
        loop = asyncio.get_running_loop()
        now_s, quiet_until_s = loop.time(), self._asker.quiet_until_s
        self._asker.due_s = max(now_s + wait_s, quiet_until_s)
        self.next_ms = self._now_ms() + round((self._asker.due_s - now_s) * 1000)
        due = loop.call_at(self._asker.due_s, self.poke.set)
        try:
            await self.poke.wait()
        finally:
            due.cancel()
        if quiet_until_s > (now_s := loop.time()):
            await asyncio.sleep(quiet_until_s - now_s)
        self.poke.clear()

    async def _prune(self, now_s: float) -> None:
        if self._pruned_s is None or now_s - self._pruned_s >= _PRUNE_EVERY_S:
            self._pruned_s = now_s
            await self.ledger.prune(self._now_ms())
