"""A broker is away for long: the journal keeps what it misses, and it gets all of it in order."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from poller.brokers import Broker, free_port
from poller.events import Draft, Recorded
from poller.journal import Journal, open_journal
from poller.known import Commit, Condition
from poller.relay import Relay
from poller.sinks import Connection, Sink
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink, stream_key
from poller.telemetry import Metrics
from tests.daemon import get, now_ms, running, settings, simulated, stream, until


class Measured:
    """A sink that measures what it is given.

    Attributes:
        events: in the largest batch.
        bytes: in the largest batch.
    """

    def __init__(self, sink: Sink) -> None:
        self.name = sink.name
        self.events = self.bytes = 0
        self._sink = sink

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Connection]:
        async with self._sink.connect() as self._connection:
            yield self

    @property
    def expired(self) -> Sequence[Recorded]:
        return self._connection.expired

    async def cursors(self, sources: Sequence[str]) -> Mapping[str, int] | None:
        return await self._connection.cursors(sources)

    async def send(self, batch: Sequence[Recorded]) -> int:
        self.events = max(self.events, len(batch))
        self.bytes = max(self.bytes, sum(len(event.body) for event in batch))
        return await self._connection.send(batch)


class Source:
    """A source whose events are numbers."""

    def __init__(self, journal: Journal, name: str) -> None:
        self.told = 0
        self._journal = journal
        self._name = name

    async def tell(self, count: int, *, size: int = 0, at_ms: int | None = None) -> None:
        """Commit so many events, of about this size."""
        first, self.told = self.told + 1, self.told + count
        at_ms = now_ms() if at_ms is None else at_ms
        events = [
            Draft(n, "dev.poller.job.running", f"j{n % 9}", at_ms, b"%d %s" % (n, b"x" * size))
            for n in range(first, self.told + 1)
        ]
        condition = Condition(contact_ms=1, sequence=self.told)
        await self._journal.commit(Commit(source=self._name, events=events, condition=condition))


@asynccontextmanager
async def relaying(sink: Sink, journal: Journal, metrics: Metrics) -> AsyncIterator[Relay]:
    relay = Relay(sink, journal, metrics, now_ms=now_ms, random=Random(1))
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.result() is None


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with open_journal(tmp_path / "journal.db") as journal:
        yield journal


def numbers(bodies: Sequence[bytes]) -> list[int]:
    return [int(body.split()[0]) for body in bodies]


async def fill(journal: Journal, count: int) -> tuple[Source, Source]:
    """Two sources tell so many events each, the last few large ones."""
    one, other = Source(journal, "one"), Source(journal, "other")
    for _ in range(10):
        await one.tell(count // 10 - 20)
        await other.tell(count // 10 - 20)
    for source in (one, other):
        await source.tell(200, size=40_000)
    return one, other


async def go_on(sources: Sequence[Source], until_drained: Callable[[], bool]) -> None:
    """Tell further events, a few at a time, as long as old ones are delivered, and a while more."""
    for _ in range(50):
        for source in sources:
            await source.tell(10)
        if until_drained():
            return
        await asyncio.sleep(0)


async def drained(relay: Relay) -> None:
    async with asyncio.timeout(60):
        await relay.drained()


async def test_redis_gets_what_it_missed_in_order_once_and_what_is_told_meanwhile(
    journal: Journal, redis_broker: Broker
) -> None:
    sink = Measured(RedisSink(redis_broker.url, journal=journal.uuid))
    redis_broker.kill()
    async with relaying(sink, journal, Metrics()) as relay:
        one, other = await fill(journal, 10_000)
        assert one.told + other.told == 20_000
        assert (await relay.lag())[0] == 20_000
        assert "20000 events wait" in str(await relay.complaint(86_400))
        await asyncio.to_thread(redis_broker.restart)
        await go_on((one, other), lambda: relay.cursor > 20_000)
        await drained(relay)
    assert sink.events <= 500
    assert sink.bytes <= 4 << 20
    async with Redis.from_url(redis_broker.url) as client:
        for name, source in (("one", one), ("other", other)):
            entries: Any = await client.xrange(stream_key(name))
            bodies = [fields[b"event"] for _, fields in entries]
            assert numbers(bodies) == list(range(1, source.told + 1))


async def test_mqtt_gets_what_it_missed_in_order_and_what_is_told_meanwhile(
    journal: Journal, mqtt_broker: Broker, listen: Any
) -> None:
    prefix = f"test-{uuid4()}"
    async with gate(mqtt_broker.port) as (port, opened):
        about: dict[str, Any] = {
            "instance": prefix,
            "version": "1",
            "since": "",
            "topic_prefix": prefix,
        }
        sink = Measured(MqttSink(f"mqtt://127.0.0.1:{port}", **about))
        async with (
            listen(mqtt_broker, f"{prefix}/+/+/events/+") as inbox,
            relaying(sink, journal, Metrics()) as relay,
        ):
            one, other = Source(journal, "one"), Source(journal, "other")
            for source in (one, other):
                await source.tell(1_500)
            await until(lambda: relay.trouble != "not connected yet", "a broker that is away")
            opened.set()
            await go_on((one, other), lambda: relay.cursor > 3_000)
            await drained(relay)
            await inbox.until(lambda messages: len(messages) >= one.told + other.told)
        for name, source in (("one", one), ("other", other)):
            bodies = inbox.bodies(f"{prefix}/{name}/")
            assert numbers(list(dict.fromkeys(bodies))) == list(range(1, source.told + 1))
    assert sink.events <= 500


@asynccontextmanager
async def gate(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A way to a broker that is closed at first."""
    opened = asyncio.Event()

    async def give(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not opened.is_set():
            writer.close()
            return
        answers, questions = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(give(reader, questions), give(answers, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], opened


async def test_what_got_too_old_for_redis_raises_an_alarm_once(
    journal: Journal, redis_broker: Broker
) -> None:
    metrics, source = Metrics(), Source(journal, "s")
    await source.tell(700, at_ms=now_ms() - 3_700_000)
    await source.tell(300)
    sink = RedisSink(redis_broker.url, journal=journal.uuid, retention_s=3600)
    with capture_logs() as logs:
        for _ in range(2):
            async with relaying(sink, journal, metrics) as relay:
                await drained(relay)
                assert relay.cursor == 1000
    assert [(log["sink"], log["source"], log["count"]) for log in logs if "count" in log] == [
        ("redis", "s", 500),
        ("redis", "s", 200),
    ]
    labels = {"sink": "redis", "source": "s"}
    name = "poller_relay_expired_events_total"
    assert metrics.registry.get_sample_value(name, labels) == 700
    async with Redis.from_url(redis_broker.url) as client:
        assert await client.xlen(stream_key("s")) == 300


async def test_the_journal_keeps_what_a_broker_misses_and_only_as_long_as_it_is_configured(
    tmp_path: Path, redis_broker: Broker
) -> None:
    dead, alive = f"redis://127.0.0.1:{free_port()}", f"{redis_broker.url}/0"
    path = tmp_path / "journal.db"
    env = {"POLLER_POLLER__RETENTION": "1s", "POLLER_POLLER__DRAIN": "100ms"}
    quick = "set:poller.app:_MAINTENANCE_S=0.2"
    async with AsyncExitStack() as stack:
        _, _, url = await simulated(stack, "scale", jobs=3, pace=0.15)
        source = {"s": ("scale", url)}

        def first_and_count() -> tuple[int, int]:
            with closing(sqlite3.connect(path)) as db:
                found = db.execute("SELECT coalesce(min(sequence), 0), count(*) FROM events")
                first, count = found.fetchone()
            return first, count

        config = settings(tmp_path, source, redis=dead)
        async with running(config, env, hampered=quick) as daemon:
            base = await daemon.url()
            told = await daemon.said("relay.behind_retention")
            assert told["sink"] == "redis"
            assert told["undelivered"] > 0

            async def complained() -> bool:
                status, body = await get(f"{base}/readyz")
                return status == 503 and "older than poller.retention" in body

            await until(complained, "503 with the reason")
            await until(lambda: first_and_count()[1] > told["undelivered"], "more events")
            assert await daemon.end() == 0, daemon.text
            warnings = [line["event"] for line in daemon.lines]
            assert warnings.count("relay.behind_retention") == 1
        first, kept = first_and_count()
        assert first == 1

        settings(tmp_path, source)
        async with running(config, env, hampered=quick) as daemon:
            await until(lambda: first_and_count()[0] > kept, "the journal forgets")
            assert json.loads((await get(f"{await daemon.url()}/readyz"))[1])["ready"]
            assert await daemon.end() == 0, daemon.text
        first, _ = first_and_count()

        settings(tmp_path, source, redis=alive)
        async with running(config, hampered=quick) as daemon:
            await until(lambda: stream_begins(alive), "what the journal still has")
            assert await daemon.end() == 0, daemon.text
    assert int((await stream(alive, "s"))[0]["sequence"]) == first


async def stream_begins(redis: str) -> bool:
    return bool(await stream(redis, "s"))
