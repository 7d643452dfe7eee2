"""Death right before and right after every durable step, and what the next start makes of it."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from poller.brokers import Broker
from poller.payload import iso_ms
from poller.world import World
from tests.daemon import Event, now_ms, running, settings, simulated, stream, subscribed, until
from tests.delivered import ended, in_order, received_in_order, untold

UNFIT = "load\ufffe"
"""A job's name that no MQTT broker takes in a topic."""


@dataclass(slots=True)
class Place:
    """A source, both brokers and a journal, for one daemon after the other."""

    world: World
    source: str
    config: Path
    journal: Path
    redis: str
    messages: list[tuple[str, Event]]

    async def outlives(
        self, step: str, number: int, *, forgetful: bool = False, **env: str
    ) -> None:
        """Let daemons die before and after the Nth time of a step, then one tell all that is left.

        The one that dies after it goes on from where the one that died before it has left off.
        If they are forgetful, what ended while none of them ran may be past retention.
        """
        env = {"POLLER_DEFAULTS__INTERVAL": "100ms"} | env
        for when in ("before", "after"):
            async with running(self.config, env, planted=f"{step}:{when}:{number}") as daemon:
                await until(lambda: daemon.process.returncode is not None, f"death {when} it")
                assert daemon.process.returncode == -signal.SIGKILL, (when, daemon.text)
        async with running(self.config, env) as daemon:
            await daemon.said("poller.started")
            started_ms = now_ms()
            await until(lambda: ended(self.world, started_ms) >= 3, daemon.lines)
            seen_until_ms = now_ms()
            missing = ["not looked yet"]

            async def caught_up() -> bool:
                told = sorted(self.received + await self.stream(), key=lambda e: e["sequence"])
                since_ms = started_ms if forgetful else contact_over_ms(told)
                missing[:] = untold(self.world, told, since_ms, seen_until_ms)
                return not missing

            await until(caught_up, missing)
            assert await daemon.end() == 0, daemon.text

    @property
    def received(self) -> list[Event]:
        """What an MQTT subscriber, there all the time, has got."""
        return [event for _, event in self.messages]

    async def stream(self) -> list[Event]:
        """What Redis has."""
        return await stream(self.redis, self.source)

    def kept(self) -> list[Event]:
        """What the journal has."""
        return [json.loads(body) for (body,) in self._rows("SELECT body FROM events")]

    def buried(self) -> list[Event]:
        """What the journal has set aside."""
        return [json.loads(body) for (body,) in self._rows("SELECT body FROM dead_letters")]

    def _rows(self, query: str) -> list[tuple[bytes]]:
        with closing(sqlite3.connect(self.journal)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return db.execute(f"{query} ORDER BY offset").fetchall()


def contact_over_ms(events: list[Event]) -> int:
    """A time from which on every end is news: a good poll had been made before."""
    data = (event["data"] for event in events)
    observed = (it["observed_at"] for it in data if it["observed_after"] is not None)
    return iso_ms(next(observed, None)) or now_ms()


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def place(
    stack: AsyncExitStack, folder: Path, redis: Broker, mqtt: Broker, source: str
) -> Place:
    _, world, url = await simulated(stack, source, seed=5, jobs=6, pace=0.05)
    messages = await stack.enter_async_context(subscribed(mqtt.url, f"jobs/{source}/+/events/#"))
    config = settings(
        folder,
        {source: (source, url)},
        redis=f"{redis.url}/0",
        mqtt=mqtt.url,
        protocol="3.1.1" if mqtt.name == "amqtt" else "auto",
    )
    return Place(world, source, config, folder / "journal.db", f"{redis.url}/0", messages)


@pytest.fixture
async def scale(
    stack: AsyncExitStack, tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> Place:
    return await place(stack, tmp_path, redis_broker, mqtt_broker, "scale")


@pytest.fixture
async def cdm(
    stack: AsyncExitStack, tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> Place:
    return await place(stack, tmp_path, redis_broker, mqtt_broker, "cdm")


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("commit", 1),
        ("commit", 4),
        ("contact", 1),
        ("marks", 1),
        ("append", 1),
        ("append", 4),
        ("advance", 3),
        ("publish", 2),
        ("acknowledge", 5),
    ],
)
async def test_death_at_a_durable_step_loses_nothing_and_repeats_nothing(
    scale: Place, step: str, number: int
) -> None:
    await scale.outlives(step, number)
    events = await scale.stream()
    in_order(events)
    assert scale.kept() == events
    await until(lambda: events[-1] in scale.received, "the last event over MQTT")
    received_in_order(scale.received, events)


async def test_death_while_redis_trims_leaves_the_newest_events_without_a_gap(scale: Place) -> None:
    await scale.outlives("append", 5, POLLER_REDIS__MAX_EVENTS="7")
    kept = scale.kept()
    in_order(kept)
    assert len(kept) > 7
    assert await scale.stream() == kept[-7:]
    await until(lambda: kept[-1] in scale.received, "the last event over MQTT")
    received_in_order(scale.received, kept)


@pytest.mark.parametrize("step", ["prune", "forget"])
async def test_death_while_the_journal_forgets_tells_nothing_again(scale: Place, step: str) -> None:
    await scale.outlives(step, 1, forgetful=True, POLLER_POLLER__RETENTION="2s")
    events = await scale.stream()
    in_order(events)
    kept = {event["id"]: event for event in scale.kept()}
    assert kept == {event["id"]: event for event in events if event["id"] in kept}
    await until(lambda: events[-1] in scale.received, "the last event over MQTT")
    received_in_order(scale.received, events)


async def test_death_while_an_event_is_set_aside_sets_it_aside_once(cdm: Place) -> None:
    cdm.world.definitions[0] = msgspec.structs.replace(cdm.world.definitions[0], name=UNFIT)
    await cdm.outlives("bury", 2)
    events = await cdm.stream()
    in_order(events)
    assert cdm.kept() == events
    unfit = [event for event in events if event["data"]["job"]["id"] == UNFIT]
    fit = [event for event in events if event["data"]["job"]["id"] != UNFIT]
    assert cdm.buried() == unfit
    await until(lambda: fit[-1] in cdm.received, "the last event over MQTT")
    received_in_order(cdm.received, fit)


async def test_what_is_being_written_when_the_stop_comes_is_delivered_before_the_end(
    scale: Place,
) -> None:
    async with running(scale.config, planted="stop:6") as daemon:
        assert await daemon.process.wait() == 0, daemon.text
    events = await scale.stream()
    assert scale.kept() == events
    await until(lambda: scale.received == events, "the same over MQTT")
