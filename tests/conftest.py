"""Real brokers on loopback ports, started once, and what tests need to use them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import aiomqtt
import pytest
import redis

from poller import brokers
from poller.brokers import Broker
from poller.errors import PollerError
from poller.events import Recorded

# Before Python 3.12 looptime would make a loop for the first test without one, and leave it open.
asyncio.set_event_loop(None)


@pytest.fixture(scope="session")
def redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = brokers.redis_server(tmp_path_factory.mktemp("redis"), appendonly=True)
    yield from _running(broker)


@pytest.fixture
def redis_broker(redis_session: Broker) -> Broker:
    """A Redis or Valkey that holds nothing yet; it may be killed and restarted."""
    _revive(redis_session)
    with redis.Redis(port=redis_session.port) as client:
        client.flushall()
    return redis_session


@pytest.fixture(scope="session")
def make_mosquitto() -> Callable[..., Broker]:
    """Makes a mosquitto, not yet started; no other broker speaks MQTT 5 or has its settings."""
    try:
        brokers.mosquitto_program()
    except PollerError as error:
        pytest.skip(f"only mosquitto will do: {error}")
    return brokers.mosquitto


@pytest.fixture(scope="session")
def mosquitto_session(
    tmp_path_factory: pytest.TempPathFactory, make_mosquitto: Callable[..., Broker]
) -> Iterator[Broker]:
    yield from _running(make_mosquitto(tmp_path_factory.mktemp("mosquitto")))


@pytest.fixture(scope="session")
def amqtt_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    yield from _running(brokers.amqtt(tmp_path_factory.mktemp("amqtt")))


@pytest.fixture(scope="session")
def mqtt_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    yield from _running(brokers.mqtt_broker(tmp_path_factory.mktemp("mqtt")))


@pytest.fixture
def mqtt_broker(mqtt_session: Broker) -> Broker:
    """Whichever MQTT broker there is; retained messages of other tests stay in it."""
    return _revive(mqtt_session)


@pytest.fixture
def mosquitto(mosquitto_session: Broker) -> Broker:
    """A broker that speaks MQTT 5; retained messages of other tests stay in it."""
    return _revive(mosquitto_session)


@pytest.fixture
def amqtt(amqtt_session: Broker) -> Broker:
    """A broker that speaks MQTT 3.1.1 only; retained messages of other tests stay in it."""
    return _revive(amqtt_session)


Recorder = Callable[..., Recorded]


@pytest.fixture
def recorded() -> Recorder:
    """Makes an event as it stands in the journal, observed now."""

    def make(offset: int, source: str = "s", **changes: Any) -> Recorded:
        fields: dict[str, Any] = {
            "offset": offset,
            "source": source,
            "sequence": offset,
            "type": "dev.poller.job.running",
            "job_id": f"job-{offset}",
            "at_ms": time.time_ns() // 1_000_000,
            "body": b'{"id": "%s-%d"}' % (source.encode(), offset),
        }
        return Recorded(**(fields | changes))

    return make


class Inbox:
    """What a subscriber has got."""

    def __init__(self) -> None:
        self.messages: list[aiomqtt.Message] = []
        self._arrived = asyncio.Condition()

    async def put(self, message: aiomqtt.Message) -> None:
        async with self._arrived:
            self.messages.append(message)
            self._arrived.notify_all()

    async def until(self, enough: Callable[[list[aiomqtt.Message]], bool]) -> None:
        """Wait for what is expected; fail after a while."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: enough(self.messages))

    def bodies(self, topic: str = "") -> list[bytes]:
        """Payloads of the topics that hold this text, as they came."""
        return [bytes(message.payload) for message in self.messages if topic in str(message.topic)]


Listen = Callable[..., AbstractAsyncContextManager[Inbox]]


@pytest.fixture
def listen() -> Listen:
    """Subscribes to a topic filter at a broker, which may end meanwhile."""

    @asynccontextmanager
    async def listening(broker: Broker, topic: str, **options: Any) -> AsyncIterator[Inbox]:
        inbox = Inbox()
        is_5 = broker.name == "mosquitto"
        version = aiomqtt.ProtocolVersion.V5 if is_5 else aiomqtt.ProtocolVersion.V311
        client = aiomqtt.Client("127.0.0.1", broker.port, protocol=version, timeout=2, **options)

        async def take() -> None:
            with suppress(aiomqtt.MqttError):
                async for message in client.messages:
                    await inbox.put(message)

        with suppress(aiomqtt.MqttError):
            async with client:
                await client.subscribe(topic, qos=1)
                task = asyncio.create_task(take())
                try:
                    yield inbox
                finally:
                    task.cancel()
                    await asyncio.wait([task])

    return listening


def _running(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def _revive(broker: Broker) -> Broker:
    if broker.pid is None:
        broker.start()
    return broker
