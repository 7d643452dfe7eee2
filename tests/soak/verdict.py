"""What stands in Redis, and what a subscriber got, against what truly happened."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import msgspec
from redis.asyncio import Redis

from poller.events import JobEvent, SourceEvent, decode
from poller.runs import Ms
from tests.accounts import Flaw, Truth, flaws, untold_ends
from tests.soak.faults import MOST_STEP_MS
from tests.soak.stage import Site, Stage


class Verdict(msgspec.Struct, frozen=True):
    """What was found.

    Attributes:
        transitions: how many there truly were.
        events: how many stand in Redis.
        messages: how many a subscriber got of them by MQTT.
        repeats: how many of those it had got before, with the same id.
        flaws: all that is wrong.
    """

    transitions: int
    events: int
    messages: int
    repeats: int
    flaws: list[Flaw]

    @property
    def counts(self) -> Counter[str]:
        """How many flaws there are of each kind."""
        return Counter(flaw.kind for flaw in self.flaws)


async def judge(stage: Stage) -> Verdict:
    """Compare it all, as it stands now."""
    found: list[Flaw] = []
    events = messages = repeats = 0
    for name, site in stage.sites.items():
        stream = await _stream(stage, name)
        got = _received(stage, name)
        ids = [decode(body).id for _, body in got]
        events += len(stream)
        messages += len(got)
        repeats += len(ids) - len(set(ids))
        found += _of_redis(stream, site, stage.contact_ms)
        found += _of_mqtt(stream, got)
    transitions = sum(
        step.at_ms > stage.contact_ms
        for site in stage.sites.values()
        for step in site.world.account
    )
    return Verdict(transitions, events, messages, repeats, found)


async def _stream(stage: Stage, source: str) -> list[bytes]:
    async with Redis.from_url(stage.redis.url) as client:
        entries: Any = await client.xrange(f"poller:{{{source}}}:events")
    return [fields[b"event"] for _, fields in entries]


def _received(stage: Stage, source: str) -> list[tuple[str, bytes]]:
    """The events of a source that came by MQTT; the retained states repeat them."""
    return [
        (topic, body)
        for topic, body in stage.subscriber.received
        if topic.startswith(f"jobs/{source}/")
        and ("/events/" in topic or topic.endswith("/status"))
    ]


def _of_redis(stream: Sequence[bytes], site: Site, contact_ms: Ms) -> Iterator[Flaw]:
    truth = Truth(
        vendor=site.name,
        world=site.world,
        runs=site.world.ever,
        contact_ms=contact_ms,
        slack_ms=2 * MOST_STEP_MS,
    )
    events = [decode(body) for body in stream]
    found = list(flaws(events, truth))
    if site.name == "scale":
        found += untold_ends(truth.accounts(events), truth, [], all_told=True)
    for flaw in found:
        yield flaw._replace(what=f"{site.name}: {flaw.what}")


def _of_mqtt(stream: Sequence[bytes], got: Sequence[tuple[str, bytes]]) -> Iterator[Flaw]:
    """At least once, in order, the same bytes, under the right topic."""
    first: dict[str, tuple[JobEvent | SourceEvent, bytes]] = {}
    copies: dict[str, set[bytes]] = defaultdict(set)
    for topic, body in got:
        event = decode(body)
        copies[event.id].add(body)
        first.setdefault(event.id, (event, body))
        if topic != _topic(event):
            yield Flaw("untrue", f"MQTT: {topic} has {event}")
    for event, body in ((decode(body), body) for body in stream):
        if event.id not in first:
            yield Flaw("lost", f"MQTT: {event}")
        elif copies[event.id] != {body}:
            yield Flaw("untrue", f"MQTT: other bytes: {event}")
    for event_id in first.keys() - {decode(body).id for body in stream}:
        yield Flaw("lost", f"Redis: {first[event_id][0]}")
    for before, after in pairwise(event for event, _ in first.values()):
        if after.sequence <= before.sequence:
            yield Flaw("out of order", f"MQTT: {after} after {before}")


def _topic(event: JobEvent | SourceEvent) -> str:
    if isinstance(event, SourceEvent):
        return f"jobs/{event.data.source}/status"
    return f"jobs/{event.data.source}/{event.data.job.id}/events/{event.data.state}"
