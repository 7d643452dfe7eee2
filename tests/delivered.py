"""Whether what subscribers got is what the simulated world did, in the order promised."""

from __future__ import annotations

import jsonschema

from poller.events import schema
from poller.runs import TERMINAL
from poller.world import World
from tests.daemon import Event

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
