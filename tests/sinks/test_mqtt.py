"""MQTT: the topics of the contract, what the broker refuses, and every way to a broker."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiomqtt
import pytest
import trustme

from poller import brokers
from poller.brokers import Broker
from poller.errors import EventRejected, SettingsError, SinkUnavailable
from poller.events import Recorded
from poller.sinks.mqtt import WINDOW, MqttSink, encoded
from poller.sinks.mqtt.link import Message
from tests.guarded import mosquitto_user

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def prefix() -> str:
    """The topics of one test; retained messages of others stay in the broker."""
    return f"test-{uuid4()}"


def sink_of(broker: Broker, prefix: str, **options: Any) -> MqttSink:
    about: dict[str, Any] = {"instance": prefix, "version": "1.0", "since": "2026-01-01T00:00:00Z"}
    return MqttSink(**({"url": broker.url} | about | {"topic_prefix": prefix} | options))


async def deliver(sink: MqttSink, events: Sequence[Recorded]) -> None:
    async with sink.connect() as connection:
        sent = 0
        while sent < len(events):
            sent += await connection.send(events[sent:])


async def refused(sink: MqttSink, events: Sequence[Recorded] = ()) -> str:
    with pytest.raises(SinkUnavailable) as failure:
        await deliver(sink, events)
    return str(failure.value)


def running(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


EACH_VERSION = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@EACH_VERSION
async def test_a_job_has_its_events_and_its_retained_state(
    mosquitto: Broker, prefix: str, protocol: str, recorded: Any, listen: Any
) -> None:
    events = [
        recorded(1, "kylin", job_id="a", type="dev.poller.job.running"),
        recorded(2, "kylin", job_id="b", type="dev.poller.job.queued"),
        recorded(3, "kylin", job_id="a", type="dev.poller.job.failed"),
    ]
    async with listen(mosquitto, f"{prefix}/kylin/#") as inbox:
        await deliver(sink_of(mosquitto, prefix, protocol=protocol), events)
        await inbox.until(lambda messages: len(messages) == 5)
    assert [(str(message.topic), message.payload) for message in inbox.messages] == [
        (f"{prefix}/kylin/a/events/running", events[0].body),
        (f"{prefix}/kylin/b/events/queued", events[1].body),
        (f"{prefix}/kylin/b/state", events[1].body),
        (f"{prefix}/kylin/a/events/failed", events[2].body),
        (f"{prefix}/kylin/a/state", events[2].body),
    ]
    async with listen(mosquitto, f"{prefix}/kylin/#") as later:
        await later.until(lambda messages: len(messages) == 2)
    assert {(str(message.topic), message.payload) for message in later.messages} == {
        (f"{prefix}/kylin/a/state", events[2].body),
        (f"{prefix}/kylin/b/state", events[1].body),
    }
    assert all(message.retain for message in later.messages)


@EACH_VERSION
async def test_a_source_has_its_retained_status(
    mosquitto: Broker, prefix: str, protocol: str, recorded: Any, listen: Any
) -> None:
    events = [
        recorded(1, "kylin", job_id="", type="dev.poller.source.down"),
        recorded(2, "kylin", job_id="", type="dev.poller.source.up"),
    ]
    async with listen(mosquitto, f"{prefix}/+/status") as inbox:
        await deliver(sink_of(mosquitto, prefix, protocol=protocol), events)
        await inbox.until(lambda messages: len(messages) == 2)
    assert inbox.bodies() == [event.body for event in events]
    async with listen(mosquitto, f"{prefix}/+/status") as later:
        await later.until(lambda messages: len(messages) == 1)
    assert later.messages[0].retain
    assert later.messages[0].payload == events[1].body


async def test_messages_of_mqtt_5_say_what_they_are_and_when_they_expire(
    mosquitto: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    async with listen(mosquitto, f"{prefix}/s/#") as inbox:
        await deliver(sink_of(mosquitto, prefix, state_expiry_s=3600), [recorded(1, job_id="a")])
        await inbox.until(lambda messages: len(messages) == 2)
    news, state = (message.properties for message in inbox.messages)
    for properties in (news, state):
        assert properties.ContentType == "application/cloudevents+json; charset=utf-8"
        assert properties.PayloadFormatIndicator == 1
    assert not hasattr(news, "MessageExpiryInterval")
    assert 3590 <= state.MessageExpiryInterval <= 3600
    assert all(message.qos == 1 for message in inbox.messages)


@EACH_VERSION
async def test_a_poller_is_online_until_it_says_goodbye(
    mosquitto: Broker, prefix: str, protocol: str, listen: Any
) -> None:
    async with listen(mosquitto, f"{prefix}/_poller/#") as inbox:
        async with sink_of(mosquitto, prefix, protocol=protocol).connect():
            await inbox.until(lambda messages: len(messages) == 1)
        await inbox.until(lambda messages: len(messages) == 2)
    assert [json.loads(body) for body in inbox.bodies(f"{prefix}/_poller/{prefix}")] == [
        {"online": True, "version": "1.0", "since": "2026-01-01T00:00:00Z"},
        {"online": False},
    ]
    async with listen(mosquitto, f"{prefix}/_poller/#") as later:
        await later.until(lambda messages: len(messages) == 1)
    assert later.messages[0].retain
    assert json.loads(later.bodies()[0]) == {"online": False}


async def test_a_visitor_tells_nobody_and_ends_no_daemons_connection(
    mosquitto: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    async with listen(mosquitto, f"{prefix}/#") as inbox:
        async with sink_of(mosquitto, prefix).connect() as daemon:
            await deliver(sink_of(mosquitto, prefix, instance=None), [recorded(1)])
            await daemon.send([recorded(2)])
        await inbox.until(lambda messages: len(messages) == 6)
    assert [json.loads(body)["online"] for body in inbox.bodies("_poller")] == [True, False]


@EACH_VERSION
async def test_a_poller_that_vanishes_is_offline_by_its_last_will(
    mosquitto: Broker, prefix: str, protocol: str, listen: Any
) -> None:
    program = (
        "import asyncio, os, signal\n"
        "from poller.sinks.mqtt import MqttSink\n"
        "async def main():\n"
        f"    sink = MqttSink({mosquitto.url!r}, instance={prefix!r}, version='1', since='',\n"
        f"        topic_prefix={prefix!r}, protocol={protocol!r})\n"
        "    async with sink.connect():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    async with listen(mosquitto, f"{prefix}/_poller/#") as inbox:
        vanishing = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
        assert await vanishing.wait() == -signal.SIGKILL
        await inbox.until(lambda messages: len(messages) == 2)
    assert [json.loads(body)["online"] for body in inbox.bodies()] == [True, False]


@pytest.mark.parametrize(
    ("job_id", "level"),
    [
        ("232bf69f-6cdf", "232bf69f-6cdf"),
        ("a/b", "a%2Fb"),
        ("+#%", "%2B%23%25"),
        ("a b.c:d~é日🚀$", "a b.c:d~é日🚀$"),
        ("\x00\x1f\x7f", "%00%1F%7F"),
        ("\x80\x9f\xa0", "%C2%80%C2%9F\xa0"),
        ("%2F", "%252F"),
        ("", ""),
    ],
)
async def test_a_job_id_is_one_level_of_a_topic(
    job_id: str, level: str, mosquitto: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    assert encoded(job_id) == level
    async with listen(mosquitto, f"{prefix}/s/+/state") as inbox:
        await deliver(sink_of(mosquitto, prefix), [recorded(1, job_id=job_id)])
        await inbox.until(lambda messages: len(messages) == 1)
    assert str(inbox.messages[0].topic) == f"{prefix}/s/{level}/state"


@pytest.mark.parametrize(
    ("job_id", "reason"),
    [
        ("x" * 65_600, "the job id is too long for a topic"),
        ("/" * 21_900, "the job id is too long for a topic"),
        ("a\uffff", "characters that MQTT brokers refuse"),
        ("\ufdd0b", "characters that MQTT brokers refuse"),
        ("\U0010fffe", "characters that MQTT brokers refuse"),
        ("\ud800", "characters that MQTT brokers refuse"),
    ],
    ids=["long", "long-encoded", "ffff", "fdd0", "10fffe", "surrogate"],
)
async def test_an_event_with_an_impossible_topic_is_rejected_after_those_before_it(
    job_id: str, reason: str, mosquitto: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    batch = [recorded(1, job_id="a"), recorded(2, job_id=job_id), recorded(3, job_id="a")]
    async with (
        listen(mosquitto, f"{prefix}/s/a/#") as inbox,
        sink_of(mosquitto, prefix).connect() as connection,
    ):
        with pytest.raises(EventRejected, match=reason) as failure:
            await connection.send(batch)
        assert failure.value.delivered == 1
        assert await connection.send(batch[2:]) == 1
        await inbox.until(lambda messages: len(messages) == 4)
    assert inbox.bodies("/state") == [batch[0].body, batch[2].body]


async def test_the_longest_possible_topic_is_published(
    mosquitto: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    job_id = "x" * (65_535 - len(f"{prefix}/s//events/dev.poller.job.running"))
    async with listen(mosquitto, f"{prefix}/s/+/state") as inbox:
        await deliver(sink_of(mosquitto, prefix), [recorded(1, job_id=job_id)])
        await inbox.until(lambda messages: len(messages) == 1)


async def test_a_broker_without_mqtt_5_is_spoken_to_in_3_1_1(
    amqtt: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    sink = sink_of(amqtt, prefix, timeout_s=1.0)
    async with listen(amqtt, f"{prefix}/s/+/events/+") as inbox:
        for offset in (1, 2):
            async with asyncio.timeout(5 if offset == 1 else 0.9):
                await deliver(sink, [recorded(offset)])
        await inbox.until(lambda messages: len(messages) == 2)


async def test_a_broker_without_mqtt_5_is_refused_where_it_is_asked_for(
    amqtt: Broker, prefix: str
) -> None:
    assert "does not answer" in await refused(sink_of(amqtt, prefix, protocol="5", timeout_s=0.3))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"\x20\x03\x00\x84\x00", "it does not speak this version of MQTT: see mqtt.protocol"),
        (b"\x20\x02\x00\x01", "it does not speak this version of MQTT: see mqtt.protocol"),
        (b"\x20\x03\x00\x86\x00", "it refuses mqtt.username or mqtt.password"),
        (b"\x20\x03\x00\x88\x00", r"it refuses the connection \(\[code:136\] Server unavailable"),
    ],
)
async def test_a_refusal_to_connect_is_explained(answer: bytes, sentence: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        sink = MqttSink(url, instance="i", version="1", since="", protocol="5")
        with pytest.raises(SinkUnavailable, match=sentence):
            await deliver(sink, [])


UNASKED = {
    "no utf-8 in a topic": b"\x30\x05\x00\x02\xff\xff\x00",
    "topic longer than its packet": b"\x30\x04\x00\x09ab",
    "acknowledgement of nothing": b"\x40\x02\xff\xff",
    "half an acknowledgement": b"\x40\x01\x00",
    "reason that is none": b"\x40\x03\x00\x01\xff",
    "subscription": b"\x90\x04\x00\x01\x00\x00",
    "packet that is none": b"\x00\x00",
    "packet without end": b"\x30\xff\xff\xff\x7f" + b"a" * 100_000,
    "length without end": b"\x30\xff\xff\xff\xff\xff",
    "goodbye": b"\xe0\x01\xff",
}


@pytest.mark.parametrize("unasked", UNASKED.values(), ids=UNASKED)
@pytest.mark.parametrize("greeting", [b"\x20\x03\x00\x00\x00", b""], ids=["greeted", "silent"])
async def test_a_broker_that_sends_what_nobody_asked_for_is_unavailable(
    unasked: bytes, greeting: bytes, recorded: Any
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(greeting + unasked)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        sink = MqttSink(url, instance="i", version="1", since="", protocol="5", timeout_s=0.3)
        with pytest.raises(SinkUnavailable, match=r"^MQTT broker at 127\.0\.0\.1:"):
            await deliver(sink, [recorded(1)])


@pytest.fixture
def start(tmp_path: Path, make_mosquitto: Callable[..., Broker]) -> Iterator[Callable[..., Broker]]:
    """Starts a mosquitto with these lines of configuration."""
    started: list[Broker] = []

    def start(*config: str) -> Broker:
        broker = make_mosquitto(tmp_path, config=("allow_anonymous true", *config))
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.stop()


@pytest.fixture
def guarded(tmp_path: Path, make_mosquitto: Callable[..., Broker]) -> Iterator[Broker]:
    """A mosquitto with the files of deploy/."""
    users = mosquitto_user("poller", "change-me") + mosquitto_user("subscriber", "change-me-too")
    (tmp_path / "passwords").write_text(users)
    (tmp_path / "mosquitto.acl").write_text((DEPLOY / "mosquitto.acl").read_text())
    for file in (tmp_path / "passwords", tmp_path / "mosquitto.acl"):
        file.chmod(0o600)
    text = (DEPLOY / "mosquitto.conf").read_text().replace("listener 1883\n", "")
    text = text.replace("set_tcp_nodelay true\n", "").replace("max_queued_messages 100000\n", "")
    for there in ("/mosquitto/config", "/mosquitto/data"):
        text = text.replace(there, str(tmp_path))
    yield from running(make_mosquitto(tmp_path, config=text.splitlines()))


POLLER: dict[str, Any] = {"username": "poller", "password": "change-me"}
SUBSCRIBER: dict[str, Any] = {"username": "subscriber", "password": "change-me-too"}


async def test_the_deployed_broker_lets_the_poller_write_and_the_subscriber_read(
    guarded: Broker, recorded: Any, listen: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 101)]
    async with listen(guarded, "jobs/+/+/events/+", **SUBSCRIBER) as inbox:
        await deliver(sink_of(guarded, "jobs", **POLLER), events)
        await inbox.until(lambda messages: len(messages) == 100)
    assert inbox.bodies() == [event.body for event in events]


async def test_the_deployed_broker_refuses_other_topics_and_says_which_file_allows_them(
    guarded: Broker,
) -> None:
    assert "what deploy/mosquitto.acl lists" in await refused(sink_of(guarded, "other", **POLLER))


@pytest.mark.parametrize(
    ("user", "topic", "heard"),
    [
        (SUBSCRIBER, "#", [b"state", b"event"]),
        (SUBSCRIBER, "$SYS/#", []),
        (POLLER, "#", []),
        (POLLER, "jobs/s/#", []),
        (POLLER, "$SYS/#", []),
    ],
)
async def test_the_deployed_poller_reads_nothing_and_the_subscriber_writes_nothing(
    guarded: Broker, user: dict[str, Any], topic: str, heard: list[bytes]
) -> None:
    def client(user: dict[str, Any]) -> aiomqtt.Client:
        return aiomqtt.Client("127.0.0.1", guarded.port, **user)

    async with client(POLLER) as poller, client(SUBSCRIBER) as subscriber, client(user) as reader:
        await poller.publish("jobs/s/j/state", b"state", qos=1, retain=True)
        await subscriber.publish("jobs/s/j/state", b"forged", qos=1, retain=True)
        await reader.subscribe(topic, qos=1)
        await subscriber.publish("jobs/s/j/events/failed", b"forged", qos=1)
        await poller.publish("jobs/s/j/events/failed", b"event", qos=1)
        await reader.subscribe("none")  # its acknowledgement comes after all that was published
        found = [bytes((await anext(reader.messages)).payload) for _ in heard]
        assert (found, len(reader.messages)) == (heard, 0)


async def test_a_topic_that_the_user_may_not_write_stops_the_relay_there(
    guarded: Broker, tmp_path: Path, recorded: Any, listen: Any
) -> None:
    rules = "user poller\ntopic write jobs/_poller/#\ntopic write jobs/a/#\n"
    (tmp_path / "mosquitto.acl").write_text(f"{rules}user subscriber\ntopic read jobs/#\n")
    guarded.restart()
    batch = [recorded(offset, "b" if offset == 3 else "a") for offset in range(1, 1001)]
    async with (
        listen(guarded, "jobs/+/+/events/+", **SUBSCRIBER) as inbox,
        sink_of(guarded, "jobs", **POLLER).connect() as connection,
    ):
        with pytest.raises(SinkUnavailable, match=r"deploy/mosquitto\.acl") as failure:
            await connection.send(batch)
        await inbox.until(lambda messages: len(messages) >= 2)
    assert failure.value.delivered == 2
    assert inbox.bodies()[:2] == [batch[0].body, batch[1].body]
    assert len(inbox.messages) < 999


@EACH_VERSION
@pytest.mark.parametrize("password", ["wrong-secret", None])
async def test_a_wrong_or_missing_password_is_called_so_and_not_shown(
    guarded: Broker, password: str | None, protocol: str
) -> None:
    user = {} if password is None else {"username": "poller", "password": password}
    answer = await refused(sink_of(guarded, "jobs", protocol=protocol, **user))
    assert "deploy/mosquitto.acl" in answer or "it refuses mqtt.username" in answer
    assert "wrong-secret" not in answer


async def test_no_more_messages_are_in_flight_than_the_broker_allows(
    start: Callable[..., Broker], prefix: str, recorded: Any
) -> None:
    sink = sink_of(start("max_inflight_messages 3"), prefix)
    flying = []
    async with sink.connect() as connection:
        link = connection._link
        put = link.put

        def counted(message: Any) -> None:
            put(message)
            flying.append(len(link.unacknowledged))

        link.put = counted  # type: ignore[method-assign]  # a look inside
        await connection.send([recorded(offset) for offset in range(1, 51)])
    assert max(flying) == 3
    assert WINDOW > 3


async def test_a_slow_broker_is_given_no_more_than_it_takes_in_a_while(
    mosquitto: Broker, prefix: str, recorded: Any, listen: Any
) -> None:
    batch = [recorded(offset, job_id=f"j{offset % 7}") for offset in range(1, 501)]
    at_once = asyncio.Event()
    async with (
        slowly(mosquitto.port, at_once) as url,
        listen(mosquitto, f"{prefix}/+/+/events/+") as inbox,
        sink_of(mosquitto, prefix, url=url).connect() as connection,
    ):
        first = await connection.send(batch)
        assert 0 < first < 500
        expected = [event.body for event in batch]
        await inbox.until(lambda messages: len(messages) >= first)
        assert inbox.bodies() == expected[:first]
        at_once.set()
        sent = first
        while sent < 500:
            sent += await connection.send(batch[sent:])
        await inbox.until(lambda messages: len(messages) == 500)
        assert inbox.bodies() == expected


@asynccontextmanager
async def slowly(port: int, at_once: asyncio.Event) -> AsyncIterator[str]:
    """A way to a broker on which every answer takes a while, until it need not."""

    async def give(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait_s: float = 0
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if not at_once.is_set():
                    await asyncio.sleep(wait_s)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, questions = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(give(reader, questions), give(answers, writer, 0.2))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_an_event_larger_than_the_broker_takes_is_rejected_and_the_others_go_on(
    start: Callable[..., Broker], prefix: str, recorded: Any, listen: Any
) -> None:
    broker = start("max_packet_size 1000")
    batch = [recorded(1), recorded(2, body=b"x" * 1000), recorded(3)]
    async with (
        listen(broker, f"{prefix}/+/+/events/+") as inbox,
        sink_of(broker, prefix).connect() as connection,
    ):
        with pytest.raises(EventRejected, match="larger than the broker takes") as failure:
            await connection.send(batch)
        assert failure.value.delivered == 1
        await connection.send(batch[2:])
        await inbox.until(lambda messages: len(messages) == 2)


async def test_an_event_over_which_the_broker_hangs_up_is_found_and_rejected(
    start: Callable[..., Broker], prefix: str, recorded: Any, listen: Any
) -> None:
    """Mosquitto's own limit is not announced, and answered in a way that ends the connection."""
    broker = start("message_size_limit 1000")
    batch = [recorded(offset) for offset in range(1, 21)]
    batch[7] = recorded(8, body=b"x" * 1001)
    sink = sink_of(broker, prefix)
    async with listen(broker, f"{prefix}/+/+/events/+") as inbox:
        with pytest.raises(SinkUnavailable, match="Protocol error") as first:
            await deliver(sink, batch)
        rest = batch[first.value.delivered :]
        with pytest.raises(EventRejected) as second:
            await deliver(sink, rest)
        assert rest[second.value.delivered] is batch[7]
        await deliver(sink, rest[second.value.delivered + 1 :])
        expected = {event.body for event in batch} - {batch[7].body}
        await inbox.until(lambda messages: {message.payload for message in messages} >= expected)


async def test_a_refused_greeting_is_no_rejected_event(
    start: Callable[..., Broker], recorded: Any
) -> None:
    deep = "/".join("x" * 300)
    sink = sink_of(start(), deep, instance="i")
    for _ in range(2):
        assert "MQTT broker at 127.0.0.1" in await refused(sink, [recorded(1)])


async def test_a_broker_without_retained_messages_is_called_so(
    start: Callable[..., Broker], prefix: str
) -> None:
    broker = start("retain_available false")
    assert "Retain not supported" in await refused(sink_of(broker, prefix))


async def test_a_second_poller_of_the_same_name_is_called_so(recorded: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"\x20\x03\x00\x00\x00")
        await reader.readuntil(b'"online":true')
        writer.write(b"\x40\x02\x00\x01")
        await reader.readuntil(b'"id"')
        writer.write(b"\xe0\x01\x8e")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"mqtt://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        sink = MqttSink(url, instance="i", version="1", since="")
        with pytest.raises(SinkUnavailable, match=r"have the same poller\.instance"):
            await deliver(sink, [recorded(1)])


async def test_two_pollers_of_the_same_name_end_each_others_connection(
    mosquitto: Broker, prefix: str, recorded: Any
) -> None:
    async with sink_of(mosquitto, prefix).connect() as first:
        async with sink_of(mosquitto, prefix).connect():
            pass
        with pytest.raises(SinkUnavailable, match=r"ended the connection|took over"):
            await first.send([recorded(1)])


async def test_a_broker_that_shuts_down_is_noticed_while_messages_are_in_flight(
    mosquitto: Broker, prefix: str, recorded: Any
) -> None:
    async with sink_of(mosquitto, prefix, timeout_s=30).connect() as connection:
        assert mosquitto.pid is not None
        os.kill(mosquitto.pid, signal.SIGSTOP)
        sending = asyncio.create_task(connection.send([recorded(n) for n in range(1, 1001)]))
        await asyncio.sleep(0)
        os.kill(mosquitto.pid, signal.SIGTERM)
        os.kill(mosquitto.pid, signal.SIGCONT)
        async with asyncio.timeout(10):
            with pytest.raises(SinkUnavailable, match="it ended the connection"):
                await sending


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


Secure = Callable[..., Broker]


@pytest.fixture
def secure(
    authority: trustme.CA, tmp_path: Path, start: Callable[..., Broker]
) -> Callable[..., Broker]:
    """Starts a mosquitto with a certificate; its port is the one with TLS."""

    def start_secure(identity: str = "127.0.0.1", **dates: Any) -> Broker:
        certificate = authority.issue_cert(identity, **dates)
        certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        tls_port = brokers.free_port()
        files = (f"certfile {tmp_path}/cert.pem", f"keyfile {tmp_path}/key.pem")
        broker = start(f"listener {tls_port} 127.0.0.1", *files)
        broker.port = tls_port
        return broker

    return start_secure


def tls_sink(broker: Broker, **options: Any) -> MqttSink:
    url = broker.url.replace("mqtt://", "mqtts://")
    return MqttSink(url, instance="i", version="1", since="", **options)


async def test_tls_with_a_trusted_certificate(
    secure: Secure, tmp_path: Path, recorded: Any
) -> None:
    broker = secure()
    events = [recorded(offset) for offset in range(1, 301)]
    await deliver(tls_sink(broker, verify_tls=tmp_path / "ca.pem"), events)
    await deliver(tls_sink(broker, verify_tls=False), events)


EXPIRED = {
    "not_before": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    "not_after": datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC),
}


@pytest.mark.parametrize(
    ("trusted", "issued", "detail"),
    [
        (False, {}, "self.signed certificate|unable to get local issuer"),
        (True, {"identity": "other.example"}, "IP address mismatch"),
        (True, EXPIRED, "certificate has expired"),
    ],
)
async def test_tls_with_a_bad_certificate_is_refused(
    trusted: bool, issued: dict[str, Any], detail: str, secure: Secure, tmp_path: Path
) -> None:
    sink = tls_sink(secure(**issued), verify_tls=tmp_path / "ca.pem" if trusted else True)
    with pytest.raises(SinkUnavailable, match=rf"certificate is not accepted.*({detail})"):
        await deliver(sink, [])


async def test_tls_where_none_is_spoken_is_called_so(mosquitto: Broker) -> None:
    assert "TLS" in await refused(tls_sink(mosquitto, timeout_s=0.5))


async def test_no_tls_where_it_is_wanted_is_called_so(secure: Secure, prefix: str) -> None:
    broker = secure()
    assert "is TLS (mqtts://) wanted or not?" in await refused(sink_of(broker, prefix))


def test_a_ca_bundle_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"^mqtt\.verify_tls: .*ca\.pem: no CA certificate"):
        MqttSink("mqtts://h", instance="i", version="", since="", verify_tls=tmp_path / "ca.pem")


@pytest.mark.parametrize("url", ["redis://h", "mqtt://", "h:1883"])
def test_an_address_that_is_none_is_a_wrong_setting(url: str) -> None:
    with pytest.raises(SettingsError, match=r"mqtt\.url: must be mqtt://host:port"):
        MqttSink(url, instance="i", version="", since="")


async def test_a_host_name_that_cannot_be_is_called_so(prefix: str) -> None:
    about: dict[str, Any] = {"instance": "i", "version": "", "since": ""}
    assert "host name is not found" in await refused(MqttSink("mqtt://nowhere.invalid", **about))
    assert "MQTT broker at" in await refused(MqttSink(f"mqtt://{'x' * 70}.example", **about))


async def test_a_link_that_is_closed_takes_no_messages(mosquitto: Broker, prefix: str) -> None:
    async with sink_of(mosquitto, prefix).connect() as connection:
        link = connection._link
    with pytest.raises(aiomqtt.MqttError):
        link.put(Message(0, "t", b""))


async def test_nothing_is_logged_and_no_task_is_left(
    mosquitto: Broker, prefix: str, recorded: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = asyncio.all_tasks()
    sink = sink_of(mosquitto, prefix, timeout_s=1.0)
    await deliver(sink, [recorded(offset) for offset in range(1, 101)])
    async with sink.connect() as connection:
        mosquitto.kill()
        with pytest.raises(SinkUnavailable):
            await connection.send([recorded(1)])
    await refused(sink)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
    assert caplog.records == []
