"""Whether what subscribers got is what the simulated world did, in the order promised."""

from __future__ import annotations

import json
import sqlite3
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import jsonschema

from poller.brokers import Broker
from poller.events import schema
from poller.payload import iso_ms
from poller.runs import TERMINAL
from poller.world import World
from tests.daemon import (
    Daemon,
    Event,
    now_ms,
    settings,
    simulated,
    stream,
    subscribed,
    until,
)

VALIDATOR = jsonschema.Draft202012Validator(schema())


def in_order(events: list[Event]) -> None:
    """A source's events: valid, contiguous, unique, and legal for each run."""
    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    assert len({event["id"] for event in events}) == len(events)
    runs: dict[tuple[str, str], Event] = {}
    for event in events:
        VALIDATOR.validate(event)
        data = event["data"]
        if "run" not in data:
            continue
        key = (data["job"]["id"], data["detail"].get("provisional_id") or data["run"]["id"])
        before = runs.pop(key, None)
        if before is not None:
            assert event["time"] >= before["time"]
            was = before["data"]
            same = (was["state"], was["run"]["attempt"]) == (data["state"], data["run"]["attempt"])
            assert not same, (before, event)
            assert data["run"]["attempt"] >= was["run"]["attempt"]
            assert data["previous"]["state"] == was["state"]
        runs[data["job"]["id"], data["run"]["id"]] = event


def untold(world: World, events: list[Event], since_ms: int, until_ms: int) -> list[str]:
    """Runs that truly ended in that time, and whose newest event says otherwise."""
    newest = {event["data"]["run"]["id"]: event for event in events if "run" in event["data"]}
    missing = []
    for run in world.runs.values():
        if not run.now.terminal or not since_ms < run.now.changed_ms < until_ms:
            continue
        ids = (run.uuid, str(run.number), run.definition.name)
        event = next((newest[i] for i in ids if i in newest), None)
        if event is None or event["data"]["state"] != run.now.state:
            missing.append(f"{run.number} {run.definition.name} {run.now}: {event}")
    return missing


def ended(world: World, since_ms: int) -> int:
    """How many attempts truly ended after a time."""
    return sum(step.state in TERMINAL and step.at_ms > since_ms for step in world.account)


def received_in_order(received: list[Event], events: list[Event]) -> None:
    """A subscriber got these events in their order, repeats only of what it had, unchanged."""
    had: dict[str, Event] = {}
    for event in received:
        assert had.setdefault(event["id"], event) == event
    assert list(had.values()) == events


def contact_over_ms(events: list[Event]) -> int:
    """A time from which on every end is news: a good poll had been made before."""
    data = (event["data"] for event in events)
    observed = (it["observed_at"] for it in data if it["observed_after"] is not None)
    return iso_ms(next(observed, None)) or now_ms()


@dataclass(slots=True)
class Place:
    """A living source, both brokers and a journal, for one daemon after the other.

    Attributes:
        redis: the URL.
        messages: what an MQTT subscriber, there all the time, has got of the events.
    """

    world: World
    source: str
    config: Path
    journal: Path
    redis: str
    messages: list[tuple[str, Event]]

    async def told_by(self, daemon: Daemon, since_ms: int | None = None) -> None:
        """Wait until three more runs have ended, and every end since first contact was told."""
        began_ms = now_ms()
        await until(lambda: ended(self.world, began_ms) >= 3, daemon.lines)
        seen_until_ms = now_ms()
        missing = ["not looked yet"]

        async def caught_up() -> bool:
            told = sorted(self.received + await self.stream(), key=lambda e: e["sequence"])
            from_ms = contact_over_ms(told) if since_ms is None else since_ms
            missing[:] = untold(self.world, told, from_ms, seen_until_ms)
            return not missing

        await until(caught_up, missing)

    async def is_in_order(self) -> None:
        """Check that the journal, Redis and the subscriber have the same, once and in order."""
        events = await self.stream()
        in_order(events)
        assert self.kept() == events
        await self.has_received(events)

    async def has_received(self, events: list[Event]) -> None:
        """Check that the subscriber gets these to the last, in order."""
        await until(lambda: events[-1] in self.received, events[-1])
        received_in_order(self.received, events)

    @property
    def received(self) -> list[Event]:
        """What the subscriber has got, repeats included."""
        return [event for _, event in self.messages]

    async def stream(self) -> list[Event]:
        """What Redis has."""
        return await stream(self.redis, self.source)

    def kept(self) -> list[Event]:
        """What the journal has."""
        return self._bodies("events")

    def buried(self) -> list[Event]:
        """What the journal has set aside."""
        return self._bodies("dead_letters")

    def _bodies(self, table: str) -> list[Event]:
        with closing(sqlite3.connect(self.journal)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            rows = db.execute(f"SELECT body FROM {table} ORDER BY offset")  # noqa: S608 - ours
            return [json.loads(body) for (body,) in rows]


async def place(
    stack: AsyncExitStack,
    folder: Path,
    redis: Broker,
    mqtt: Broker,
    source: str = "scale",
) -> Place:
    """A source whose jobs live fast, and brokers to tell of it."""
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
