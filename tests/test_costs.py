"""What a poll costs, counted: no measured time can trip these, and no busy machine."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import redis

from poller.brokers import Broker
from poller.journal import Journal, open_journal
from poller.known import Commit, Known, Memories, Memory
from poller.poll import Plan, Watch
from poller.relay import Relay
from poller.runs import Job, Ms, State
from poller.sinks.redis import CALL_EVENTS, RedisSink
from poller.telemetry import Metrics
from poller.vendors import load
from poller.wire import Page, Request, Response
from tests.daemon import until
from tests.toy import PLAN, Middle, ledger_of

BEGAN_MS = 1_700_000_000_000
JOBS = 40


class Kylin:
    """A Kylin's list of running jobs, which counts.

    Attributes:
        asked: requests that came.
        read: answers that the poller has read, and not only compared.
        stopped: jobs that the list shows as stopped.
    """

    def __init__(self, jobs: int = JOBS) -> None:
        self.asked = 0
        self.read = 0
        self.stopped: set[int] = set()
        self.now_ms = BEGAN_MS
        self._jobs = jobs
        kylin = load("kylin")

        def parse(options: Any, request: Request, response: Response, memory: Memory) -> Page:
            self.read += 1
            return kylin.parse(options, request, response, memory)

        self.plan: Plan = replace(
            PLAN, vendor=replace(kylin, parse=parse), options=kylin.options(), resync_s=3600.0
        )

    async def fetch(self, _: Request) -> Response:
        self.asked += 1
        rows = [self._row(number) for number in range(self._jobs)]
        answer = {"code": "000", "data": {"value": rows, "total_size": len(rows)}}
        return Response(status=200, body=json.dumps(answer).encode())

    def _row(self, number: int) -> dict[str, Any]:
        return {
            "id": f"job-{number}",
            "job_status": "STOPPED" if number in self.stopped else "RUNNING",
            "create_time": BEGAN_MS - 5000,
            "exec_start_time": BEGAN_MS - 4000,
        }

    def now(self) -> Ms:
        # stands all but still: nothing falls due but what is poked
        self.now_ms += 1
        return self.now_ms


class Tally:
    """A journal that counts its commits."""

    def __init__(self, journal: Journal) -> None:
        self.commits = 0
        self._journal = journal

    async def commit(self, commit: Commit) -> None:
        self.commits += 1
        await self._journal.commit(commit)

    async def load(self, source: str) -> Memories:
        return await self._journal.load(source)


class Lookups(dict[Any, Any]):
    """Known runs that count how often one is looked at; looking at all counts each."""

    made = 0

    def get(self, key: Any, default: Any = None) -> Any:
        Lookups.made += 1
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        Lookups.made += 1
        return super().__getitem__(key)

    def __iter__(self) -> Any:
        Lookups.made += len(self)
        return super().__iter__()

    def values(self) -> Any:
        Lookups.made += len(self)
        return super().values()

    def items(self) -> Any:
        Lookups.made += len(self)
        return super().items()


class Polls:
    """A source past first contact, whose polls wait to be poked."""

    def __init__(self, watch: Watch, tally: Tally) -> None:
        self.watch = watch
        self.tally = tally

    async def once(self) -> None:
        """One whole poll, until it sleeps again."""
        loop = asyncio.get_running_loop()
        self.watch.poke.set()
        await until(lambda: not self.watch.poke.is_set(), "the poll begins")
        # asleep it owes its next sign of life after the interval, which is longer than a timeout
        pause_s = (PLAN.timeout_s + PLAN.pace.interval_s) / 2
        await until(lambda: self.watch.due_s > loop.time() + pause_s, "the poll ends")


@asynccontextmanager
async def polled(kylin: Kylin, journal: Journal) -> AsyncIterator[Polls]:
    """Such a source, and some polls behind it."""
    tally = Tally(journal)
    ledger = await ledger_of(cast("Journal", tally), kylin.plan, at_ms=BEGAN_MS)
    watch = Watch(kylin.plan, ledger, kylin.fetch, Metrics(), now_ms=kylin.now, random=Middle())
    task = asyncio.create_task(watch.run())
    polls = Polls(watch, tally)
    try:
        for _ in range(3):
            await polls.once()
        yield polls
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    async with open_journal(tmp_path / "journal.db") as opened:
        yield opened


async def test_an_unchanged_poll_writes_nothing_and_reads_its_answer_at_most_once(
    journal: Journal,
) -> None:
    kylin = Kylin()
    async with polled(kylin, journal) as polls:
        with closing(sqlite3.connect(journal.path)) as other:
            version = other.execute("PRAGMA data_version").fetchone()
            before = kylin.asked, kylin.read, polls.tally.commits
            for _ in range(3):
                await polls.once()
            assert other.execute("PRAGMA data_version").fetchone() == version
        asked, read, commits = before
        assert kylin.asked == asked + 3
        assert (kylin.read, polls.tally.commits) == (read, commits)


async def test_an_answer_is_read_again_when_it_or_what_is_known_has_changed(
    journal: Journal,
) -> None:
    kylin = Kylin()
    async with polled(kylin, journal) as polls:
        read = kylin.read
        kylin.stopped = {7}
        await polls.once()
        assert kylin.read == read + 1
        assert journal.last_offset == JOBS + 1
        index = polls.watch.ledger.index
        stopped = index.runs["job-7"]
        await polls.once()
        await polls.once()
        read = kylin.read
        index.put(msgspec.structs.replace(stopped, state=State.RUNNING, fingerprint=1), BEGAN_MS)
        await polls.once()
        assert kylin.read == read + 1
        assert index.runs["job-7"].state is State.SUSPENDED


async def test_an_answer_that_is_not_read_again_still_shows_its_runs(journal: Journal) -> None:
    kylin = Kylin()
    async with polled(kylin, journal) as polls:
        read, before_ms = kylin.read, kylin.now_ms
        await polls.once()
        assert kylin.read == read
        watched = polls.watch.ledger.index.watched["5"]
        assert len(watched) == JOBS
        assert min(watched.values()) > before_ms


@pytest.mark.parametrize("changes", [1, JOBS])
async def test_the_changes_of_a_page_are_one_commit(changes: int, journal: Journal) -> None:
    kylin = Kylin()
    async with polled(kylin, journal) as polls:
        commits, offset = polls.tally.commits, journal.last_offset
        kylin.stopped = set(range(changes))
        await polls.once()
        assert journal.last_offset - offset == changes
        assert polls.tally.commits == commits + 1


@pytest.mark.parametrize("changes", [0, 1, JOBS])
async def test_the_changes_of_a_page_are_at_most_one_call_of_redis(
    changes: int, journal: Journal, redis_broker: Broker
) -> None:
    assert changes <= CALL_EVENTS
    kylin = Kylin()
    sink = RedisSink(redis_broker.url, journal=journal.uuid)
    random = Middle()
    relay = Relay(sink, journal, Metrics(), now_ms=kylin.now, random=random)
    relaying = asyncio.create_task(relay.run())
    try:
        async with polled(kylin, journal) as polls:
            await relay.drained()
            before = scripts(redis_broker)
            kylin.stopped = set(range(changes))
            await polls.once()
            await relay.drained()
            assert scripts(redis_broker) - before == min(changes, 1)
    finally:
        relaying.cancel()
        await asyncio.wait([relaying])


def scripts(broker: Broker) -> int:
    """How many scripts the server has run."""
    with redis.Redis(port=broker.port) as client:
        stats: Any = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


async def test_a_poll_looks_up_no_more_runs_where_more_are_known(tmp_path: Path) -> None:
    costs = []
    for known in (0, 5000):
        async with open_journal(tmp_path / f"{known}.db") as journal:
            await journal.commit(Commit(source=PLAN.source, runs=[other(n) for n in range(known)]))
            kylin = Kylin()
            async with polled(kylin, journal) as polls:
                index = polls.watch.ledger.index
                assert len(index.runs) == JOBS + known
                index.runs = Lookups(index.runs)
                Lookups.made = 0
                await polls.once()
                unchanged = Lookups.made
                kylin.stopped = {1, 2, 3}
                await polls.once()
                costs.append((unchanged, Lookups.made))
    assert costs[0] == costs[1]
    assert 0 < costs[0][1] < 10 * JOBS


def other(number: int) -> Known:
    """A run that the list does not show."""
    name = f"other-{number}"
    return Known(
        job=Job(name), run_id=name, state=State.RUNNING, scope="5", changed_ms=BEGAN_MS, told=2
    )
