"""The relaying loop of one sink: journal → sink → cursor, in order, for ever."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from random import Random

import structlog

from poller.errors import EventRejected, SinkUnavailable
from poller.events import Recorded
from poller.journal import Journal
from poller.liveness import SILENT_S
from poller.runs import Ms
from poller.sinks import Connection, Sink
from poller.telemetry import Metrics

log = structlog.get_logger()

_BATCH = 500
_BACKOFF_CAP_S = 15.0
_PING_S = 2.0
"""An idle connection is tried so often: a dead broker shows in `/readyz` within 5 s."""
_STEP_S = 300.0
"""No step takes longer, however broken or slow the broker: every sink has its timeouts."""


class Relay:
    """What takes the journal's events to one sink.

    Attributes:
        cursor: everything up to this offset is delivered, as far as we know.
        trouble: why nothing is delivered at present, or None.
        alive_s: when the broker last answered, by the loop's clock.
        due_s: when the present step must have come to an end, by the loop's clock.
    """

    def __init__(
        self,
        sink: Sink,
        journal: Journal,
        metrics: Metrics,
        *,
        now_ms: Callable[[], Ms],
        random: Random,
    ) -> None:
        self.name = sink.name
        self.cursor = 0
        self.trouble: str | None = "not connected yet"
        self.alive_s = 0.0
        self.due_s = math.inf
        self._behind = False
        self._reached = 0
        self._expired: dict[str, int] = {}
        self._failures = 0
        self._moved = asyncio.Event()
        self._sink = sink
        self._journal = journal
        self._metrics = metrics
        self._now_ms = now_ms
        self._random = random
        metrics.relay_failures.labels(self.name)  # 0, so that the first failure is an increase

    async def run(self) -> None:
        """Deliver for ever; reconnects by itself.

        Raises:
            JournalError: the cursor could not be written.
        """
        self._at(await self._journal.cursor(self.name))
        while True:
            self._step()
            try:
                async with self._sink.connect() as connection:
                    self._at(await self._resume(connection))
                    await self._deliver(connection)
            except SinkUnavailable as error:
                self._failed(str(error))
            cap_s = min(_BACKOFF_CAP_S, 0.1 * 2.0 ** min(self._failures, 16))
            await asyncio.sleep(self._random.uniform(0.05, cap_s))

    async def drained(self) -> None:
        """Wait until all that the journal holds is delivered."""
        while self.cursor < self._journal.last_offset:
            await self._moved.wait()

    async def lag(self) -> tuple[int, float]:
        """How many events are not delivered yet, and the age of the oldest in seconds."""
        lags = (await self.lag_by_source()).values()
        return sum(count for count, _ in lags), max((age_s for _, age_s in lags), default=0.0)

    async def lag_by_source(self) -> Mapping[str, tuple[int, float]]:
        """The same for each source that lags."""
        if self.cursor >= self._journal.last_offset:
            return {}
        lags = await self._journal.count_by_source(self.cursor)
        now_ms = self._now_ms()
        return {
            source: (count, max(0.0, (now_ms - oldest_ms) / 1000))
            for source, (count, oldest_ms) in lags.items()
        }

    async def complaint(self, retention_s: float, *, excused: bool = False) -> str | None:
        """Why the sink does not get its events as it should, in a sentence; None if it does.

        Args:
            retention_s: how long the journal keeps what is delivered.
            excused: if nothing goes on, it is for other reasons.
        """
        trouble = self.trouble
        silent_s = asyncio.get_running_loop().time() - self.alive_s
        if trouble is None and silent_s > SILENT_S and not excused:
            trouble = f"nothing delivered for {silent_s:.0f} s"
        count, age_s = await self.lag()
        behind = age_s > retention_s
        if trouble is None and not behind:
            return None
        kept = ", older than poller.retention: the journal grows" if behind else ""
        return f"{self.name}: {trouble or 'behind'} ({count} events wait, {age_s:.0f} s{kept})"

    async def look_back(self, retention_s: float) -> None:
        """Warn, once, if undelivered events keep the journal from forgetting what it should."""
        count, age_s = await self.lag()
        behind = age_s > retention_s
        if behind and not self._behind:
            log.warning(
                "relay.behind_retention", sink=self.name, undelivered=count, age_s=round(age_s)
            )
        self._behind = behind

    async def _resume(self, connection: Connection) -> int:
        """The offset to go on from: what the broker remembers, else what the journal does."""
        # Taken first: what is committed while we ask must not be passed over.
        cursor = newest = self._journal.last_offset
        last_offsets = await self._journal.last_offsets()
        remembered = await connection.cursors(list(last_offsets))
        if remembered is None:
            return await self._journal.cursor(self.name)
        for source, last in last_offsets.items():
            delivered = remembered.get(source, 0)
            if delivered > max(newest, last):
                raise SinkUnavailable(
                    f"it has events of {source} that this journal does not know ({delivered} >"
                    f" {newest}): an older copy of the journal? See restoring in docs/operations.md"
                )
            if delivered < last:
                first = await self._journal.next_offset(source, delivered)
                cursor = cursor if first is None else min(cursor, first - 1)
        return cursor

    async def _deliver(self, connection: Connection) -> None:
        while True:
            self._step()
            batch = await self._journal.read(self.cursor, _BATCH)
            if batch:
                await self._send(connection, batch)
            self._recovered()
            if not batch:
                await self._wait(connection)

    async def _send(self, connection: Connection, batch: Sequence[Recorded]) -> None:
        """Hand over a batch, or its start; the cursor moves behind what is delivered or buried."""
        try:
            delivered = await self._hand_over(connection, batch)
        except EventRejected as error:
            event, reason = batch[error.delivered], str(error)
            await self._journal.bury(self.name, event, reason)
            log.warning("event.rejected", sink=self.name, offset=event.offset, reason=reason)
            self._metrics.relay_failures.labels(self.name).inc()
            await self._move(event.offset)
        except SinkUnavailable as error:
            if error.delivered:
                self._failures = 0
                await self._move(batch[error.delivered - 1].offset)
            raise
        else:
            await self._move(batch[delivered - 1].offset)

    async def _hand_over(self, connection: Connection, batch: Sequence[Recorded]) -> int:
        try:
            return await connection.send(batch)
        finally:
            self._count_expired(connection.expired)

    def _count_expired(self, events: Sequence[Recorded]) -> None:
        """Tell of events that a sink has passed over: once, and not of those it once had."""
        lost = [
            event
            for event in events
            if event.offset > max(self._reached, self._expired.get(event.source, 0))
        ]
        for source, count in Counter(event.source for event in lost).items():
            log.warning("events.expired", sink=self.name, source=source, count=count)
            self._metrics.relay_expired.labels(self.name, source).inc(count)
        self._expired.update((event.source, event.offset) for event in lost)

    async def _move(self, offset: int) -> None:
        await self._journal.advance(self.name, offset)
        self._at(offset)

    def _at(self, offset: int) -> None:
        self.cursor = offset
        self._reached = max(self._reached, offset)
        self.alive_s = asyncio.get_running_loop().time()
        self._moved.set()
        self._moved = asyncio.Event()

    async def _wait(self, connection: Connection) -> None:
        """Wait for the next event; the broker is asked for a sign of life meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PING_S):
                await self._journal.grown(self.cursor)
                return
        await connection.send([])
        self.alive_s = asyncio.get_running_loop().time()

    def _step(self) -> None:
        self.due_s = asyncio.get_running_loop().time() + _STEP_S

    def _failed(self, trouble: str) -> None:
        self._failures += 1
        self._metrics.relay_failures.labels(self.name).inc()
        if self.trouble != trouble:
            log.warning("relay.failed", sink=self.name, message=trouble)
        self.trouble = trouble

    def _recovered(self) -> None:
        if self.trouble is not None:
            log.info("relay.connected", sink=self.name)
        self.trouble = None
        self._failures = 0
