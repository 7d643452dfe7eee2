"""What every sink keeps, against real brokers: order, resends, crashes, cancels, clear words."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
import redis.asyncio

from poller import brokers
from poller.brokers import Broker
from poller.errors import SinkUnavailable
from poller.events import Recorded
from poller.sinks import Connection, Sink
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink, stream_key

Consume = Callable[..., Awaitable[list[bytes]]]

SOURCES = ("alpha", "beta", "gamma")


@dataclass
class Case:
    """One sink and its broker.

    Attributes:
        sink: makes the sink for a port; the broker's own by default.
        consumer: subscribes; its value waits for so many different events, and so many with
            repeats, and gives those that came.
        repeats: whether a resend may arrive twice.
        midway: after how many bytes of answers about half of the events are delivered.
    """

    broker: Broker
    sink: Callable[..., Sink]
    consumer: Callable[[], AbstractAsyncContextManager[Consume]]
    repeats: bool
    midway: int


@pytest.fixture(params=["redis", "mosquitto", "amqtt"])
def case(request: pytest.FixtureRequest, listen: Any) -> Case:
    if request.param == "redis":
        return redis_case(request.getfixturevalue("redis_broker"))
    return mqtt_case(request.getfixturevalue(request.param), listen)


def redis_case(broker: Broker) -> Case:
    @asynccontextmanager
    async def consumer() -> AsyncIterator[Consume]:
        async def consume(_: int) -> list[bytes]:
            async with redis.asyncio.Redis(port=broker.port) as client:
                streams: list[Any] = [await client.xrange(stream_key(name)) for name in SOURCES]
            return [fields[b"event"] for stream in streams for _, fields in stream]

        yield consume

    def sink(port: int | None = None, **options: Any) -> Sink:
        url = f"redis://127.0.0.1:{port or broker.port}"
        return RedisSink(url, journal="journal-1", **({"timeout_s": 30} | options))

    return Case(broker, sink, consumer, repeats=False, midway=70)


def mqtt_case(broker: Broker, listen: Any) -> Case:
    prefix = f"test-{uuid4()}"

    @asynccontextmanager
    async def consumer() -> AsyncIterator[Consume]:
        async with listen(broker, f"{prefix}/+/+/events/+") as inbox:

            async def consume(different: int, repeats: int = 0) -> list[bytes]:
                await inbox.until(
                    lambda messages: (
                        len(messages) >= different + repeats
                        and len({message.payload for message in messages}) >= different
                    )
                )
                bodies: list[bytes] = inbox.bodies()
                return bodies

            yield consume

    def sink(port: int | None = None, **options: Any) -> Sink:
        url = f"mqtt://127.0.0.1:{port or broker.port}"
        about = {"instance": prefix, "version": "1.0", "since": "now", "topic_prefix": prefix}
        if broker.name == "amqtt":
            about["protocol"] = "3.1.1"
        return MqttSink(url, **(about | {"timeout_s": 30} | options))

    return Case(broker, sink, consumer, repeats=True, midway=2000)


@pytest.fixture
def batch(recorded: Any) -> list[Recorded]:
    """Events of several sources, in turn, more than a window or a call holds."""
    return [
        recorded(offset, SOURCES[offset % 3], job_id=f"j{offset % 7}") for offset in range(1, 901)
    ]


def of_each_source(bodies: list[bytes], batch: list[Recorded]) -> list[list[bytes]]:
    """The bodies by source, each at its first appearance."""
    sources = {event.body: event.source for event in batch}
    first = list(dict.fromkeys(bodies))
    return [[body for body in first if sources[body] == source] for source in SOURCES]


def in_order(batch: list[Recorded]) -> list[list[bytes]]:
    return of_each_source([event.body for event in batch], batch)


async def test_events_arrive_in_the_order_of_their_source(
    case: Case, batch: list[Recorded]
) -> None:
    async with case.consumer() as consume, case.sink().connect() as connection:
        await send_all(connection, batch[:500])
        await send_all(connection, batch[500:])
        bodies = await consume(900)
    assert len(bodies) == 900
    assert of_each_source(bodies, batch) == in_order(batch)


async def test_a_batch_sent_again_brings_nothing_new(case: Case, batch: list[Recorded]) -> None:
    async with case.consumer() as consume, case.sink().connect() as connection:
        await send_all(connection, batch)
        await send_all(connection, batch)
        bodies = await consume(900, repeats=900) if case.repeats else await consume(900)
    assert len(bodies) == (1800 if case.repeats else 900)
    assert of_each_source(bodies, batch) == in_order(batch)


async def test_a_second_connection_goes_on_where_the_first_ended(
    case: Case, batch: list[Recorded]
) -> None:
    async with case.consumer() as consume:
        for part in (batch[:450], batch[450:]):
            async with case.sink().connect() as connection:
                await connection.cursors(SOURCES)
                await send_all(connection, part)
        bodies = await consume(900)
    assert len(bodies) == 900
    assert of_each_source(bodies, batch) == in_order(batch)


async def test_an_empty_batch_is_a_sign_of_life(case: Case) -> None:
    async with case.sink().connect() as connection:
        assert await connection.send([]) == 0
        case.broker.kill()
        with pytest.raises(SinkUnavailable):
            await sign_of_death(connection)


async def test_a_broker_that_dies_between_two_sends_is_noticed_at_once_and_loses_nothing(
    case: Case, batch: list[Recorded]
) -> None:
    sink = case.sink()
    async with case.consumer() as consume:
        async with sink.connect() as connection:
            await send_all(connection, batch[:300])
            before = await consume(300)
            case.broker.kill()
            async with asyncio.timeout(10):
                with pytest.raises(SinkUnavailable) as failure:
                    await connection.send(batch[300:])
        assert failure.value.delivered == 0
    case.broker.restart()
    async with case.consumer() as consume:
        async with sink.connect() as connection:
            await send_all(connection, batch[300:])
        bodies = await consume(600)
    assert of_each_source(before + bodies, batch) == in_order(batch)


async def test_a_broker_that_freezes_and_dies_while_it_is_sent_to_loses_nothing(
    case: Case, batch: list[Recorded]
) -> None:
    sink = case.sink()
    async with sink.connect() as connection:
        assert case.broker.pid is not None
        os.kill(case.broker.pid, signal.SIGSTOP)
        sending = asyncio.create_task(connection.send(batch))
        await asyncio.sleep(0)
        case.broker.kill()
        async with asyncio.timeout(10):
            with pytest.raises(SinkUnavailable) as failure:
                await sending
        assert failure.value.delivered == 0
    case.broker.restart()
    async with case.consumer() as consume:
        async with sink.connect() as connection:
            await send_all(connection, batch)
        bodies = await consume(900)
    assert of_each_source(bodies, batch) == in_order(batch)


@pytest.mark.parametrize("count", [0, 10])
async def test_a_broker_that_only_freezes_is_given_up_after_the_timeout(
    case: Case, batch: list[Recorded], count: int
) -> None:
    async with case.sink(timeout_s=0.3).connect() as connection:
        assert case.broker.pid is not None
        os.kill(case.broker.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                with pytest.raises(SinkUnavailable, match=r"answer|acknowledge"):
                    await connection.send(batch[:count])
        finally:
            os.kill(case.broker.pid, signal.SIGCONT)


async def test_leaving_a_broker_that_is_frozen_comes_to_an_end(
    case: Case, batch: list[Recorded]
) -> None:
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(case.sink(timeout_s=0.3).connect())
        await send_all(connection, batch[:10])
        assert case.broker.pid is not None
        os.kill(case.broker.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                await stack.aclose()
        finally:
            os.kill(case.broker.pid, signal.SIGCONT)


async def test_what_is_delivered_is_counted_where_a_connection_breaks_midway(
    case: Case, batch: list[Recorded]
) -> None:
    async with case.consumer() as consume:
        async with breaking(case.broker.port) as proxy:
            delivered = await send_until_it_breaks(case.sink(proxy.port), batch, proxy, case.midway)
        assert 0 < delivered < 900
        async with case.sink().connect() as connection:
            await send_all(connection, batch[delivered:])
        bodies = await consume(900)
    assert of_each_source(bodies, batch) == in_order(batch)
    if not case.repeats:
        assert len(bodies) == 900


async def test_a_send_that_is_cancelled_can_be_repeated(case: Case, batch: list[Recorded]) -> None:
    sink = case.sink()
    async with case.consumer() as consume:
        async with sink.connect() as connection:
            sending = asyncio.create_task(connection.send(batch))
            await asyncio.sleep(0)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
        async with sink.connect() as connection:
            await send_all(connection, batch)
        bodies = await consume(900)
    assert of_each_source(bodies, batch) == in_order(batch)
    if not case.repeats:
        assert len(bodies) == 900


async def test_connecting_can_be_cancelled(case: Case) -> None:
    async with silent() as port:
        connecting = asyncio.create_task(connect(case.sink(port)))
        await asyncio.sleep(0)
        connecting.cancel()
        async with asyncio.timeout(10):
            with pytest.raises(asyncio.CancelledError):
                await connecting


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "does not answer"),
        (b"", "closed"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no Redis|is it an MQTT broker"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "is no Redis|is it an MQTT broker"),
    ],
    ids=["silent", "closing", "http", "ssh"],
)
async def test_what_is_no_broker_is_called_so(
    case: Case, answer: bytes | None, sentence: str
) -> None:
    async with silent(answer) as port:
        with pytest.raises(SinkUnavailable, match=sentence) as failure:
            await connect(case.sink(port, timeout_s=0.3))
    assert f"127.0.0.1:{port}: " in str(failure.value)


async def test_a_port_where_nothing_listens_is_called_so(case: Case) -> None:
    with pytest.raises(SinkUnavailable, match="nothing listens there"):
        await connect(case.sink(brokers.free_port()))


async def send_all(connection: Connection, batch: list[Recorded]) -> None:
    """Send as the relay does: what a slow broker is not given at once is sent next."""
    while batch:
        sent = await connection.send(batch)
        assert 0 < sent <= len(batch)
        assert not connection.expired
        batch = batch[sent:]


async def send_until_it_breaks(sink: Sink, batch: list[Recorded], proxy: Proxy, after: int) -> int:
    """Send in parts; how much was delivered for sure."""
    delivered = 0
    async with asyncio.timeout(10):
        try:
            async with sink.connect() as connection:
                proxy.left = after
                while delivered < len(batch):
                    delivered += await connection.send(batch[delivered : delivered + 100])
        except SinkUnavailable as error:
            delivered += error.delivered
    return delivered


async def sign_of_death(connection: Connection) -> None:
    async with asyncio.timeout(10):
        while True:
            await connection.send([])
            await asyncio.sleep(0)


async def connect(sink: Sink) -> None:
    async with sink.connect():
        pass


@asynccontextmanager
async def silent(answer: bytes | None = None) -> AsyncIterator[int]:
    """A server that says nothing, or says something and closes."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            if answer is None:
                await asyncio.Event().wait()
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    async with serving(serve) as port:
        yield port


@dataclass
class Proxy:
    """A way to a broker that breaks when it has given back so many more bytes."""

    port: int = 0
    left: int = 1 << 40

    async def give(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while self.left and (data := await reader.read(min(self.left, 65536))):
                data = data[: self.left]
                self.left -= len(data)
                writer.write(data)
                await writer.drain()


@asynccontextmanager
async def breaking(target: int) -> AsyncIterator[Proxy]:
    proxy = Proxy()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, down = await asyncio.open_connection("127.0.0.1", target)
        taking = asyncio.create_task(Proxy().give(reader, down))
        await proxy.give(up, writer)
        taking.cancel()
        await asyncio.wait([taking])
        for end in (down, writer):
            end.transport.abort()

    async with serving(serve) as proxy.port:
        yield proxy


@asynccontextmanager
async def serving(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server on a loopback port, and an end of what it serves."""
    tasks: set[asyncio.Task[None]] = set()

    async def kept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(kept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
