"""How it stands with a source, put together from its loop and its ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from poller import settings
from poller.errors import Rejected, Unreachable
from poller.runs import State
from poller.settings import Source
from poller.status import source_status
from poller.vendors import load
from tests.toy import MemoryJournal, Server, row, watched

pytestmark = pytest.mark.looptime


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "settings.toml"
    path.write_text('[sources.s]\nvendor = "scale"\nurl = "http://x"\n', encoding="utf-8")
    return settings.load(path, {"scale": load("scale").options}, {}).sources["s"]


async def test_a_source_that_nobody_has_polled_yet_is_new(source: Source) -> None:
    status = source_status(source, None, None)
    assert (status.source, status.vendor, status.condition) == ("s", "scale", "new")
    assert (status.polling, status.last_poll, status.next_poll) == (False, None, None)
    assert (status.latency, status.budget_used) == (None, 0)
    assert set(status.runs.values()) == {0}
    assert (status.interval_s, status.idle_interval_s, status.rate_per_s) == (15, 60, 2)


async def test_a_source_that_answers_is_up(source: Source) -> None:
    server = Server(takes_s=1)
    server.lists(row("1", "running"), row("2", "failed"))
    async with watched(server.fetch, MemoryJournal()) as watch:
        await asyncio.sleep(0.5)
        first = source_status(source, watch.ledger, watch)
        assert (first.condition, first.since, first.polling) == ("new", None, True)
        assert (first.last_poll, first.next_poll) == ("2023-11-14T22:13:20.000Z", None)
        await asyncio.sleep(1)
        status = source_status(source, watch.ledger, watch)
        assert (status.condition, status.since) == ("up", "2023-11-14T22:13:21.000Z")
        assert (status.polling, status.contacted, status.failures) == (False, True, 0)
        assert status.last_good == "2023-11-14T22:13:20.000Z"
        assert status.next_poll == "2023-11-14T22:13:30.000Z"
        assert (status.runs[State.RUNNING], status.runs[State.FAILED]) == (1, 1)
        assert 0 < status.budget_used < 0.001
        server.takes_s = 3
        await asyncio.sleep(20)
        latency = source_status(source, watch.ledger, watch).latency
        assert latency is not None
        assert (latency.last_s, latency.median_s, latency.longest_s) == (3, 2, 3)
        assert latency.polls == 2
        await asyncio.sleep(1000)
        latency = source_status(source, watch.ledger, watch).latency
        assert latency is not None
        assert latency.polls == 20


async def test_a_source_that_fails_tells_why_and_since_when(source: Source) -> None:
    server = Server()
    server.lists()
    async with watched(server.fetch, MemoryJournal()) as watch:
        await asyncio.sleep(5)
        server.answers["/list/"] = Unreachable("x:1: nothing listens there")
        await asyncio.sleep(6)
        failing = source_status(source, watch.ledger, watch)
        assert (failing.condition, failing.failures) == ("failing", 1)
        assert failing.since == "2023-11-14T22:13:30.000Z"
        assert (failing.reason, failing.message) == ("unreachable", "x:1: nothing listens there")
        server.answers["/list/"] = Rejected("HTTP 401")
        watch.poke.set()
        await asyncio.sleep(1)
        down = source_status(source, watch.ledger, watch)
        assert (down.condition, down.reason) == ("down", "rejected")
        assert down.since == failing.since
        server.lists()
        watch.poke.set()
        await asyncio.sleep(1)
        up = source_status(source, watch.ledger, watch)
        assert (up.condition, up.reason, up.message, up.failures) == ("up", None, None, 0)
