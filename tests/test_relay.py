"""The relaying loop, between a real journal and a broker in memory, in simulated time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from poller.errors import EventRejected, JournalError, SinkUnavailable
from poller.events import Draft, Recorded
from poller.journal import Journal, open_journal, read_journal
from poller.known import Commit, Condition
from poller.relay import Relay
from poller.telemetry import Metrics

pytestmark = pytest.mark.looptime

NOW_MS = 1_000_000
DAY_S = 86_400.0

Answer = Callable[[Sequence[Recorded]], Awaitable[int]]


class Broker:
    """A broker in memory, and the sink that leads to it.

    Attributes:
        taken: what it has been given, in order, source and sequence.
        batches: how many events came at once; 0 for a sign of life.
        answers: what becomes of the next batches, then it takes everything.
        silent: how often it gives no sign of life.
        refusals: why the next connections fail.
        remembered: offsets by source, if it remembers itself.
        connections: how often somebody connected.
        open: how many are connected now.
        expired: what it has passed over of the last batch.
    """

    name = "memory"

    def __init__(self, *, remembers: bool = False) -> None:
        self.taken: list[tuple[str, int]] = []
        self.batches: list[int] = []
        self.answers: list[Answer] = []
        self.silent = 0
        self.refusals: list[str] = []
        self.remembered: dict[str, int] | None = {} if remembers else None
        self.connections = 0
        self.open = 0
        self.expired: list[Recorded] = []
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Broker]:
        self.connections += 1
        self._tell()
        if self.refusals:
            raise SinkUnavailable(self.refusals.pop(0))
        self.open += 1
        try:
            yield self
        finally:
            self.open -= 1

    async def cursors(self, sources: Sequence[str]) -> Mapping[str, int] | None:
        if self.remembered is None:
            return None
        return {source: self.remembered.get(source, 0) for source in sources}

    async def send(self, batch: Sequence[Recorded]) -> int:
        self.batches.append(len(batch))
        self._tell()
        if not batch and self.silent:
            self.silent -= 1
            raise SinkUnavailable("it does not answer")
        if batch and self.answers:
            return await self.answers.pop(0)(batch)
        return self.take(batch)

    def take(self, events: Sequence[Recorded]) -> int:
        """Take what it does not remember to have."""
        for event in events:
            if self.remembered is not None:
                if event.offset <= self.remembered.get(event.source, 0):
                    continue
                self.remembered[event.source] = event.offset
            self.taken.append((event.source, event.sequence))
        self._tell()
        return len(events)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is true of this broker."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()


def fails(why: str, delivered: int = 0) -> Callable[[Broker], Answer]:
    """Takes the first few, then goes away."""

    def of(broker: Broker) -> Answer:
        async def answer(batch: Sequence[Recorded]) -> int:
            broker.take(batch[:delivered])
            raise SinkUnavailable(why, delivered)

        return answer

    return of


def rejects(why: str, delivered: int = 0) -> Callable[[Broker], Answer]:
    """Takes the first few, and never the next."""

    def of(broker: Broker) -> Answer:
        async def answer(batch: Sequence[Recorded]) -> int:
            broker.take(batch[:delivered])
            raise EventRejected(why, delivered)

        return answer

    return of


class Longest(Random):
    """Always as long as it may be; remembers how long that was."""

    def __init__(self) -> None:
        super().__init__(0)
        self.waits_s: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        self.waits_s.append(b)
        return max(a, b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    async with open_journal(path) as journal:
        yield journal


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def random() -> Longest:
    return Longest()


@pytest.fixture
def relay(broker: Broker, journal: Journal, metrics: Metrics, random: Longest) -> Relay:
    return Relay(broker, journal, metrics, now_ms=lambda: NOW_MS, random=random)


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[asyncio.Task[None]]:
    """The relay runs while the context lasts; its failure is the test's."""
    task = asyncio.create_task(relay.run())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def commit(
    journal: Journal, first: int, last: int = 0, *, source: str = "a", at_ms: int = NOW_MS
) -> None:
    last = last or first
    events = [
        Draft(sequence, "dev.poller.job.running", "j", at_ms, b"{}")
        for sequence in range(first, last + 1)
    ]
    condition = Condition(contact_ms=1, sequence=last)
    await journal.commit(Commit(source=source, events=events, condition=condition))


def sequences(first: int, last: int, source: str = "a") -> list[tuple[str, int]]:
    return [(source, sequence) for sequence in range(first, last + 1)]


def failures(metrics: Metrics) -> float:
    value = metrics.registry.get_sample_value("poller_relay_failures_total", {"sink": "memory"})
    return value or 0.0


# Delivering


async def test_what_the_journal_holds_is_delivered_in_order_and_in_batches(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    await commit(journal, 1, 700)
    await commit(journal, 1, 600, source="b")
    async with running(relay):
        await relay.drained()
    assert broker.taken == sequences(1, 700) + sequences(1, 600, "b")
    assert broker.batches[:3] == [500, 500, 300]
    assert await journal.cursor("memory") == relay.cursor == 1300
    assert broker.connections == 1


async def test_what_is_committed_later_is_delivered_at_once(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    loop = asyncio.get_running_loop()
    async with running(relay):
        for sequence in range(1, 4):
            await commit(journal, sequence)
            began_s = loop.time()
            await relay.drained()
            assert loop.time() - began_s < 0.01
    assert broker.taken == sequences(1, 3)


async def test_the_next_start_goes_on_where_this_one_ended(
    journal: Journal, metrics: Metrics, random: Longest
) -> None:
    for first in (1, 11):
        await commit(journal, first, first + 9)
        broker = Broker()
        relay = Relay(broker, journal, metrics, now_ms=lambda: NOW_MS, random=random)
        async with running(relay):
            await relay.drained()
        assert broker.taken == sequences(first, first + 9)


async def test_the_cursor_is_written_only_behind_what_is_delivered(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    cursors = []

    async def answer(batch: Sequence[Recorded]) -> int:
        cursors.append((await journal.cursor("memory"), relay.cursor))
        return broker.take(batch)

    broker.answers = [answer] * 3
    await commit(journal, 1, 1200)
    async with running(relay):
        await relay.drained()
    assert cursors == [(0, 0), (500, 500), (1000, 1000)]


async def test_a_relay_that_is_cancelled_while_it_sends_says_nothing_of_delivery(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    async def answer(_batch: Sequence[Recorded]) -> int:
        await asyncio.Event().wait()
        return 0

    broker.answers = [answer]
    await commit(journal, 1, 3)
    async with running(relay) as task:
        await broker.until(lambda: bool(broker.batches))
        assert broker.open == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert broker.open == 0
    assert await journal.cursor("memory") == 0


async def test_a_relay_ends_loudly_when_the_cursor_cannot_be_written(
    path: Path, journal: Journal, broker: Broker, metrics: Metrics, random: Longest
) -> None:
    await commit(journal, 1)
    async with read_journal(path) as reader:
        relay = Relay(broker, reader, metrics, now_ms=lambda: NOW_MS, random=random)
        with pytest.raises(JournalError, match="opened for reading only"):
            await relay.run()
    assert broker.open == 0


# When the broker is away


async def test_it_connects_again_with_growing_pauses(
    relay: Relay, journal: Journal, broker: Broker, random: Longest, metrics: Metrics
) -> None:
    broker.refusals = ["away"] * 10
    await commit(journal, 1)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with running(relay):
        await relay.drained()
    assert random.waits_s == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15, 15, 15])
    assert loop.time() - began_s == pytest.approx(sum(random.waits_s), abs=0.01)
    assert broker.taken == sequences(1, 1)
    assert failures(metrics) == 10


async def test_pauses_keep_growing_while_it_connects_but_takes_nothing(
    relay: Relay, journal: Journal, broker: Broker, random: Longest
) -> None:
    broker.answers = [fails("memory full")(broker)] * 5
    await commit(journal, 1)
    with capture_logs() as logs:
        async with running(relay):
            await relay.drained()
    assert random.waits_s == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])
    assert [(log["event"], log.get("message")) for log in logs] == [
        ("relay.failed", "memory full"),
        ("relay.connected", None),
    ]


async def test_pauses_are_short_again_after_it_took_something(
    relay: Relay, journal: Journal, broker: Broker, random: Longest
) -> None:
    async with running(relay):
        for sequence in (1, 2):
            broker.answers = [fails("away")(broker)] * 3
            await commit(journal, sequence)
            await relay.drained()
    assert random.waits_s == pytest.approx([0.2, 0.4, 0.8] * 2)


async def test_what_was_taken_before_it_went_away_is_not_sent_again(
    relay: Relay, journal: Journal, broker: Broker, random: Longest
) -> None:
    broker.answers = [fails("away", delivered)(broker) for delivered in (2, 0, 3)]
    await commit(journal, 1, 10)
    async with running(relay):
        await broker.until(lambda: len(broker.batches) == 2)
        assert await journal.cursor("memory") == relay.cursor == 2
        await relay.drained()
    assert broker.taken == sequences(1, 10)
    assert broker.batches[:4] == [10, 8, 8, 5]
    assert random.waits_s == pytest.approx([0.2, 0.4, 0.2])


async def test_trouble_is_told_once_each_until_it_is_over(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    troubles = ["away", "away", "wrong password", "away"]
    broker.refusals = list(troubles)
    assert relay.trouble == "not connected yet"
    await commit(journal, 1)
    with capture_logs() as logs:
        async with running(relay):
            for connections, trouble in enumerate(troubles, 1):
                await broker.until(lambda: broker.connections == connections)  # noqa: B023 - at once
                assert relay.trouble == trouble
            await relay.drained()
            await broker.until(lambda: broker.batches[-1] == 0)
            assert relay.trouble is None
    assert [(log["event"], log.get("message")) for log in logs] == [
        ("relay.failed", "away"),
        ("relay.failed", "wrong password"),
        ("relay.failed", "away"),
        ("relay.connected", None),
    ]
    assert {log["sink"] for log in logs} == {"memory"}


async def test_a_connection_with_nothing_to_deliver_is_no_trouble(
    relay: Relay, broker: Broker
) -> None:
    async with running(relay):
        await broker.until(lambda: 0 in broker.batches)
        assert relay.trouble is None


async def test_an_idle_connection_is_tried_every_two_seconds(relay: Relay, broker: Broker) -> None:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with running(relay):
        for number in (1, 2, 3):
            await broker.until(lambda: len(broker.batches) == number)  # noqa: B023 - at once
            assert loop.time() - began_s == pytest.approx(2 * number, abs=0.01)
        await asyncio.sleep(0)
        assert relay.alive_s == loop.time()
    assert broker.batches == [0, 0, 0]


async def test_an_idle_connection_that_is_dead_is_noticed_and_opened_again(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    broker.silent = 1
    async with running(relay):
        await broker.until(lambda: broker.connections == 2)
        assert relay.trouble == "it does not answer"
        await commit(journal, 1)
        await relay.drained()
    assert broker.taken == sequences(1, 1)


# Brokers that are slow, or do not answer at all


def takes_only(count: int) -> Callable[[Broker], Answer]:
    """Takes the first few, and is content."""

    def of(broker: Broker) -> Answer:
        async def answer(batch: Sequence[Recorded]) -> int:
            return broker.take(batch[:count])

        return answer

    return of


async def test_a_slow_broker_that_takes_only_a_part_gets_the_rest_next(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    broker.answers = [takes_only(count)(broker) for count in (3, 1, 4)]
    await commit(journal, 1, 10)
    async with running(relay):
        await broker.until(lambda: len(broker.batches) == 2)
        assert await journal.cursor("memory") == relay.cursor == 3
        await relay.drained()
    assert broker.taken == sequences(1, 10)
    assert broker.batches[:4] == [10, 7, 6, 2]


async def test_a_send_that_never_ends_is_complained_of_within_five_seconds_and_then_stuck(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    async def never(_batch: Sequence[Recorded]) -> int:
        await asyncio.Event().wait()
        return 0

    loop = asyncio.get_running_loop()
    async with running(relay):
        await broker.until(lambda: 0 in broker.batches)
        assert relay.due_s > loop.time()
        broker.answers = [never]
        await commit(journal, 1, 3, at_ms=NOW_MS - 1000)
        await broker.until(lambda: 3 in broker.batches)
        await asyncio.sleep(4.6)
        complaint = str(await relay.complaint(DAY_S))
        assert re.fullmatch(
            r"memory: nothing delivered for [5-7] s \(3 events wait, 1 s\)", complaint
        )
        assert await relay.complaint(DAY_S, excused=True) is None
        await asyncio.sleep(300)
        assert relay.due_s < loop.time()


async def test_a_relay_that_waits_for_a_broken_broker_is_not_stuck(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    broker.refusals = ["away"] * 1000
    await commit(journal, 1)
    loop = asyncio.get_running_loop()
    async with running(relay):
        while loop.time() < 3600:
            await asyncio.sleep(1)
            assert relay.due_s > loop.time()
        assert await relay.complaint(DAY_S) == "memory: away (1 events wait, 0 s)"
    assert broker.connections > 100


# Events that can never go


async def test_an_event_that_can_never_go_is_set_aside_and_the_others_go_on(
    relay: Relay, journal: Journal, broker: Broker, random: Longest, metrics: Metrics
) -> None:
    broker.answers = [rejects("too large", 2)(broker), rejects("bad topic")(broker)]
    await commit(journal, 1, 6)
    with capture_logs() as logs:
        async with running(relay):
            await broker.until(lambda: len(broker.batches) == 2)
            assert await journal.cursor("memory") == 3
            await relay.drained()
    assert broker.taken == [("a", 1), ("a", 2), ("a", 5), ("a", 6)]
    assert [(log["event"], log.get("offset"), log.get("reason")) for log in logs] == [
        ("event.rejected", 3, "too large"),
        ("relay.connected", None, None),
        ("event.rejected", 4, "bad topic"),
    ]
    assert random.waits_s == []
    assert broker.connections == 1
    assert failures(metrics) == 2


async def test_the_last_event_may_be_the_one_that_can_never_go(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    broker.answers = [rejects("too large", 2)(broker)]
    await commit(journal, 1, 3)
    async with running(relay):
        await relay.drained()
    assert relay.cursor == 3
    assert broker.taken == sequences(1, 2)


# Brokers that remember


@pytest.fixture
async def remembering(journal: Journal) -> Broker:
    """A broker that remembers; the journal holds a1-a3, b1-b3, a4-a6, and its cursor is at 9."""
    await commit(journal, 1, 3)
    await commit(journal, 1, 3, source="b")
    await commit(journal, 4, 6)
    await journal.advance("memory", 9)
    return Broker(remembers=True)


@pytest.mark.parametrize(
    ("remembered", "sent", "taken"),
    [
        ({}, 9, sequences(1, 3) + sequences(1, 3, "b") + sequences(4, 6)),
        ({"a": 9, "b": 6}, 0, []),
        ({"a": 9}, 6, sequences(1, 3, "b")),
        ({"a": 3, "b": 6}, 3, sequences(4, 6)),
        ({"a": 2, "b": 6}, 7, [("a", 3), *sequences(4, 6)]),
        ({"a": 7, "b": 5}, 4, [("b", 3), ("a", 5), ("a", 6)]),
    ],
    ids=range(6),
)
async def test_what_the_broker_has_lost_is_filled_from_the_journal(
    remembering: Broker,
    journal: Journal,
    metrics: Metrics,
    random: Longest,
    remembered: dict[str, int],
    sent: int,
    taken: list[tuple[str, int]],
) -> None:
    remembering.remembered = dict(remembered)
    relay = Relay(remembering, journal, metrics, now_ms=lambda: NOW_MS, random=random)
    async with running(relay):
        await remembering.until(lambda: remembering.batches[-1:] == [0])
    assert sum(remembering.batches) == sent
    assert remembering.taken == taken
    assert await journal.cursor("memory") == 9


async def test_a_broker_that_knows_more_than_an_older_copy_of_the_journal_gets_nothing(
    remembering: Broker, journal: Journal, metrics: Metrics, random: Longest
) -> None:
    remembering.remembered = {"a": 9, "b": 12}
    relay = Relay(remembering, journal, metrics, now_ms=lambda: NOW_MS, random=random)
    async with running(relay):
        await remembering.until(lambda: remembering.connections == 3)
        assert relay.trouble is not None
        assert "events of b that this journal does not know (12 > 9)" in relay.trouble
    assert remembering.batches == []


async def test_what_is_lost_while_connected_is_filled_after_connecting_again(
    remembering: Broker, journal: Journal, metrics: Metrics, random: Longest
) -> None:
    relay = Relay(remembering, journal, metrics, now_ms=lambda: NOW_MS, random=random)
    async with running(relay):
        await remembering.until(lambda: len(remembering.taken) == 9)
        remembering.remembered = {"a": 3}
        remembering.taken.clear()
        remembering.silent = 1
        await remembering.until(lambda: len(remembering.taken) == 6)
    assert remembering.taken == sequences(1, 3, "b") + sequences(4, 6)


async def test_what_is_committed_while_the_broker_is_asked_is_not_passed_over(
    journal: Journal, metrics: Metrics, random: Longest
) -> None:
    class Slow(Broker):
        async def cursors(self, sources: Sequence[str]) -> Mapping[str, int] | None:
            cursors = await super().cursors(sources)
            if not self.taken:
                await commit(journal, 1, source="new")
            return cursors

    broker = Slow(remembers=True)
    relay = Relay(broker, journal, metrics, now_ms=lambda: NOW_MS, random=random)
    async with running(relay):
        await broker.until(lambda: broker.taken == [("new", 1)])


# How far behind


async def test_the_lag_is_what_is_not_delivered_and_the_age_of_the_oldest(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    assert await relay.lag() == (0, 0.0)
    assert await relay.lag_by_source() == {}
    await commit(journal, 1, 3, at_ms=NOW_MS - 5000)
    await commit(journal, 1, 2, source="b", at_ms=NOW_MS - 1500)
    assert await relay.lag() == (5, 5.0)
    assert await relay.lag_by_source() == {"a": (3, 5.0), "b": (2, 1.5)}
    broker.answers = [fails("away", 3)(broker)]
    async with running(relay):
        await broker.until(lambda: broker.connections == 2)
        assert await relay.lag_by_source() == {"b": (2, 1.5)}
        await relay.drained()
        assert await relay.lag() == (0, 0.0)


async def test_an_event_of_the_future_has_no_age(relay: Relay, journal: Journal) -> None:
    await commit(journal, 1, at_ms=NOW_MS + 5000)
    assert await relay.lag() == (1, 0.0)


async def test_it_is_known_from_the_start_what_a_broker_that_is_away_has_already(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    await commit(journal, 1, 5)
    await journal.advance("memory", 4)
    broker.refusals = ["away"]
    async with running(relay):
        await broker.until(lambda: broker.connections == 1)
        assert await relay.lag() == (1, 0.0)


async def test_with_nothing_to_deliver_it_is_drained_though_the_broker_is_away(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    await commit(journal, 1, 5)
    await journal.advance("memory", 5)
    broker.refusals = ["away"] * 100
    async with running(relay):
        await relay.drained()
    assert broker.taken == []


async def test_it_is_not_drained_before_everything_is_delivered(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    broker.answers = [fails("away", 2)(broker)]
    await commit(journal, 1, 5)
    drained = asyncio.ensure_future(relay.drained())
    async with running(relay):
        await broker.until(lambda: len(broker.batches) == 1)
        assert not drained.done()
        await drained
    assert broker.taken == sequences(1, 5)


async def test_events_older_than_the_journal_keeps_any_are_warned_of_once_and_complained_of(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    await commit(journal, 1, 3, at_ms=NOW_MS - 61_000)
    await commit(journal, 4, 5)
    broker.refusals = ["away"]
    with capture_logs() as logs:
        await relay.look_back(61)
        assert logs == []
        for _ in range(3):
            await relay.look_back(60)
    [log] = logs
    assert log["event"] == "relay.behind_retention"
    assert (log["sink"], log["undelivered"], log["age_s"]) == ("memory", 5, 61)
    complaint = await relay.complaint(60)
    assert complaint == (
        "memory: not connected yet "
        "(5 events wait, 61 s, older than poller.retention: the journal grows)"
    )
    async with running(relay):
        await relay.drained()
        await relay.look_back(60)
        await broker.until(lambda: broker.batches[-1] == 0)
        assert await relay.complaint(60) is None
    with capture_logs() as logs:
        await commit(journal, 6, at_ms=NOW_MS - 90_000)
        await relay.look_back(60)
    assert [log["event"] for log in logs] == ["relay.behind_retention"]


async def test_a_broker_that_catches_up_from_far_behind_is_complained_of_until_it_has(
    relay: Relay, journal: Journal, broker: Broker
) -> None:
    complaints = []

    async def answer(batch: Sequence[Recorded]) -> int:
        await journal.settled()
        complaints.append(await relay.complaint(60, excused=True))
        return broker.take(batch)

    broker.answers = [answer] * 2
    async with running(relay):
        await broker.until(lambda: 0 in broker.batches)
        await commit(journal, 1, 600, at_ms=NOW_MS - 61_000)
        await relay.drained()
        assert await relay.complaint(60) is None
    kept = "older than poller.retention: the journal grows"
    assert complaints == [
        f"memory: behind (600 events wait, 61 s, {kept})",
        f"memory: behind (100 events wait, 61 s, {kept})",
    ]


# Events too old for the broker


def expires(count: int, then: Callable[[Broker], Answer] | None = None) -> Callable[..., Answer]:
    """Passes the first few over, and does `then` with the batch."""

    def of(broker: Broker) -> Answer:
        async def answer(batch: Sequence[Recorded]) -> int:
            broker.expired = list(batch[:count])
            return await then(broker)(batch) if then else broker.take(batch)

        return answer

    return of


def expired(metrics: Metrics, source: str = "a") -> float:
    labels = {"sink": "memory", "source": source}
    value = metrics.registry.get_sample_value("poller_relay_expired_events_total", labels)
    return value or 0.0


async def test_events_that_a_broker_has_passed_over_are_told_and_counted_by_source(
    relay: Relay, journal: Journal, broker: Broker, metrics: Metrics
) -> None:
    await commit(journal, 1, 2)
    await commit(journal, 1, 3, source="b")
    await commit(journal, 3, 9)
    broker.answers = [expires(6)(broker), expires(0)(broker)]
    with capture_logs() as logs:
        async with running(relay):
            await relay.drained()
            await commit(journal, 10)
            await relay.drained()
    assert [
        (log["sink"], log["source"], log["count"])
        for log in logs
        if log["event"] == "events.expired"
    ] == [("memory", "a", 3), ("memory", "b", 3)]
    assert (expired(metrics, "a"), expired(metrics, "b")) == (3, 3)


async def test_what_is_passed_over_again_after_a_failure_is_counted_once(
    relay: Relay, journal: Journal, broker: Broker, metrics: Metrics
) -> None:
    await commit(journal, 1, 9)
    broker.answers = [
        expires(4, fails("away"))(broker),
        expires(5, fails("away"))(broker),
        expires(5, fails("away", 2))(broker),
        expires(5)(broker),
    ]
    async with running(relay):
        await relay.drained()
    assert expired(metrics) == 7  # of the last batch, which begins with the third event, 6 and 7


async def test_what_a_broker_once_had_and_is_too_old_to_be_filled_again_is_no_loss(
    remembering: Broker, journal: Journal, metrics: Metrics, random: Longest
) -> None:
    await commit(journal, 7, 8)
    remembering.answers = [expires(10)(remembering)]
    relay = Relay(remembering, journal, metrics, now_ms=lambda: NOW_MS, random=random)
    async with running(relay):
        await remembering.until(lambda: remembering.batches[-1:] == [0])
    assert remembering.batches[0] == 11
    assert (expired(metrics, "a"), expired(metrics, "b")) == (1, 0)
