"""The relaying loop of one sink: journal → sink → cursor, in order, for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from random import Random

import structlog

from poller.errors import EventRejected, SinkUnavailable
from poller.events import Recorded
from poller.journal import Journal
from poller.runs import Ms
from poller.sinks import Connection, Sink
from poller.telemetry import Metrics

log = structlog.get_logger()

_BATCH = 500
_BACKOFF_CAP_S = 15.0
_PING_S = 2.0
"""An idle connection is tried so often: a dead broker shows in `/readyz` within 5 s."""


class Relay:
    """What takes the journal's events to one sink.

    Attributes:
        cursor: everything up to this offset is delivered, as far as we know.
        trouble: why nothing is delivered at present, or None.
        alive_s: when the broker last answered, by the loop's clock.
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
        self._failures = 0
        self._moved = asyncio.Event()
        self._sink = sink
        self._journal = journal
        self._metrics = metrics
        self._now_ms = now_ms
        self._random = random

    async def run(self) -> None:
        """Deliver for ever; reconnects by itself.

        Raises:
            JournalError: the cursor could not be written.
        """
        self._at(await self._journal.cursor(self.name))
        while True:
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
            batch = await self._journal.read(self.cursor, _BATCH)
            if batch:
                await self._send(connection, batch)
            self._recovered()
            if not batch:
                await self._wait(connection)

    async def _send(self, connection: Connection, batch: Sequence[Recorded]) -> None:
        """Hand over a batch, or its start; the cursor moves behind what is delivered or buried."""
        try:
            await connection.send(batch)
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
            await self._move(batch[-1].offset)

    async def _move(self, offset: int) -> None:
        await self._journal.advance(self.name, offset)
        self._at(offset)

    def _at(self, offset: int) -> None:
        self.cursor = offset
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
