"""P5: events from detection to an MQTT subscriber, as fast as they go."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiomqtt

from bench.events import drafts, seen
from bench.measure import Cost, Report, costing, interleaved, median, on_servers_cores
from bench.product import ledger_of, plan_of, relaying
from bench.subscribing import Subscriber, subscriber
from poller.app import now_ms
from poller.brokers import mosquitto
from poller.journal import Journal, open_journal
from poller.relay import Relay
from poller.runs import State
from poller.sinks.mqtt import MqttSink
from poller.telemetry import Metrics

EVENTS = 4_000
IN_FLIGHT = 50
PAGE = 100


async def measure(folder: Path) -> Report:
    """Pages of 100 changes each, taken as fast as the journal takes them; jobs change in turn.

    The product also publishes the job's retained state, a second message for every event.
    """
    with on_servers_cores():
        broker = mosquitto(folder)
        broker.start()
    try:
        with subscriber("mqtt", broker.port) as reader:
            async with open_journal(folder / "journal.db") as journal:
                sink = MqttSink(broker.url, instance="bench", version="0", since="")
                async with relaying(sink, journal) as relay, _link(broker.port) as link:
                    detect = await _detecting(journal)

                    async def product() -> Cost:
                        return await _product(relay, detect, reader)

                    pairs = await interleaved(lambda: _bare(link, reader), product)
    finally:
        broker.stop()
    goal = "≥ 0.8 × aiomqtt, 50 in flight"
    return Report(
        results=[
            pairs.result(
                "P5",
                "events, detection → MQTT subscriber, by the clock",
                "events/s",
                lambda cost: cost.per_s,
                goal,
                lambda _, ratio: ratio >= 0.8,
            ),
            pairs.result(
                "P5", "the same per second of CPU", "events/s", lambda cost: cost.per_core_s
            ),
        ],
        facts={"mqtt_per_core_s": median(pairs.product, lambda cost: cost.per_core_s)},
    )


def _link(port: int) -> aiomqtt.Client:
    nodelay = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)
    link = aiomqtt.Client("127.0.0.1", port, socket_options=nodelay, max_inflight_messages=0)
    link.pending_calls_threshold = IN_FLIGHT  # it would log more than ten
    return link


async def _bare(link: aiomqtt.Client, reader: Subscriber) -> Cost:
    """One message for each event, QoS 1, 50 of them in flight."""
    waiting = iter(drafts("source-0", 0, EVENTS))

    async def publish() -> None:
        for draft in waiting:
            await link.publish(f"jobs/source-0/{draft.job_id}/events/running", draft.body, qos=1)

    with costing(EVENTS) as cost:
        await asyncio.gather(*(publish() for _ in range(IN_FLIGHT)))
        await reader.got(EVENTS)
    return cost


async def _product(relay: Relay, detect: Callable[[], Awaitable[None]], reader: Subscriber) -> Cost:
    with costing(EVENTS) as cost:
        await detect()
        await relay.drained()
        await reader.got(EVENTS)
    return cost


async def _detecting(journal: Journal) -> Callable[[], Awaitable[None]]:
    """Lets every job change its state once, page by page."""
    plan = plan_of("kylin", "source-0", {})
    ledger = await ledger_of(journal, plan, Metrics())
    await ledger.good(now_ms(), now_ms(), contact_done=True)
    states = [State.RUNNING, State.SUSPENDED]

    async def detect() -> None:
        state = states[0]
        states.reverse()
        for first in range(0, EVENTS, PAGE):
            rows = [seen(number, state) for number in range(first, first + PAGE)]
            await ledger.take(rows, ledger.sighting(now_ms()))

    return detect
