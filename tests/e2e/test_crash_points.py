"""Death right before and right after every durable step, and what the next start makes of it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from poller.brokers import Broker
from tests.daemon import now_ms, running, until
from tests.delivered import Place, in_order, place

UNFIT = "load\ufffe"
"""A job's name that no MQTT broker takes in a topic."""


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def scale(
    stack: AsyncExitStack, tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> Place:
    return await place(stack, tmp_path, redis_broker, mqtt_broker)


@pytest.fixture
async def cdm(
    stack: AsyncExitStack, tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> Place:
    return await place(stack, tmp_path, redis_broker, mqtt_broker, "cdm")


async def survived(
    place: Place, step: str, number: int, *, forgetful: bool = False, **env: str
) -> None:
    """Let daemons die before and after the Nth time of a step, then one tell all that is left.

    The one that dies after it goes on from where the one that died before it has left off.
    If they are forgetful, what ended while none of them ran may be past retention.
    """
    env = {"POLLER_DEFAULTS__INTERVAL": "100ms"} | env
    for when in ("before", "after"):
        async with running(place.config, env, planted=f"{step}:{when}:{number}") as daemon:
            await until(lambda: daemon.process.returncode is not None, f"death {when} it")
            assert daemon.process.returncode == -signal.SIGKILL, (when, daemon.text)
    async with running(place.config, env) as daemon:
        await daemon.said("poller.started")
        await place.told_by(daemon, since_ms=now_ms() if forgetful else None)
        assert await daemon.end() == 0, daemon.text


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
    await survived(scale, step, number)
    await scale.is_in_order()


async def test_death_while_redis_trims_leaves_the_newest_events_without_a_gap(
    scale: Place,
) -> None:
    await survived(scale, "append", 5, POLLER_REDIS__MAX_EVENTS="7")
    kept = scale.kept()
    in_order(kept)
    assert len(kept) > 7
    assert await scale.stream() == kept[-7:]
    await scale.has_received(kept)


@pytest.mark.parametrize("step", ["prune", "forget"])
async def test_death_while_the_journal_forgets_tells_nothing_again(scale: Place, step: str) -> None:
    await survived(scale, step, 1, forgetful=True, POLLER_POLLER__RETENTION="2s")
    events = await scale.stream()
    in_order(events)
    kept = {event["id"]: event for event in scale.kept()}
    assert kept == {event["id"]: event for event in events if event["id"] in kept}
    await scale.has_received(events)


async def test_death_while_an_event_is_set_aside_sets_it_aside_once(cdm: Place) -> None:
    cdm.world.definitions[0] = msgspec.structs.replace(cdm.world.definitions[0], name=UNFIT)
    await survived(cdm, "bury", 2)
    events = await cdm.stream()
    in_order(events)
    assert cdm.kept() == events
    assert cdm.buried() == [event for event in events if event["data"]["job"]["id"] == UNFIT]
    await cdm.has_received([event for event in events if event["data"]["job"]["id"] != UNFIT])


async def test_what_is_being_written_when_the_stop_comes_is_delivered_before_the_end(
    scale: Place,
) -> None:
    async with running(scale.config, planted="stop:6") as daemon:
        assert await daemon.process.wait() == 0, daemon.text
    events = await scale.stream()
    assert scale.kept() == events
    await until(lambda: scale.received == events, "the same over MQTT")
