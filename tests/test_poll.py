"""The polling loop, in exact simulated time, over a small vendor in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import structlog

from poller.asking import Asker, Plan
from poller.errors import Invalid, JournalError, Limited, Rejected, Unreachable, VendorError
from poller.events import JobEvent, SourceEvent, rfc3339
from poller.journal import Journal, open_journal
from poller.known import Commit, Index, Known, Memory
from poller.runs import Job, State
from poller.schedule import Pace
from poller.telemetry import Metrics
from poller.wire import Request, Response
from tests.toy import (
    EPOCH_MS,
    PLAN,
    MemoryJournal,
    Row,
    Server,
    ToyOptions,
    now_ms,
    row,
    watched,
    why,
)

pytestmark = pytest.mark.looptime(start=0)

DOWN = Unreachable("no route")


def plan(options: ToyOptions | None = None, **changes: Any) -> Plan:
    return replace(PLAN, options=options or ToyOptions(), **changes)


def at(second: float) -> str:
    """The wall clock's time at a second of the loop's, as events carry it."""
    return rfc3339(EPOCH_MS + round(second * 1000))


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def journal() -> MemoryJournal:
    return MemoryJournal()


# When polls happen


async def test_polls_are_an_interval_apart_from_start_to_start(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.takes_s = 3
    async with watched(server.fetch, journal):
        await asyncio.sleep(35)
    assert server.times() == [0, 10, 20, 30]


async def test_an_idle_source_is_polled_at_the_idle_interval(
    server: Server, journal: MemoryJournal
) -> None:
    pace = Pace(interval_s=10, idle_interval_s=60, retry_refused_s=300)
    server.lists(row("a", "running"))
    async with watched(server.fetch, journal, plan(pace=pace)):
        await asyncio.sleep(15)
        server.lists(row("a", "succeeded"))
        await asyncio.sleep(70)
        server.lists(row("b", "queued"))
        await asyncio.sleep(75)
    assert server.times() == [0, 10, 20, 80, 140, 150]


async def test_the_interval_varies_by_ten_per_cent(server: Server, journal: MemoryJournal) -> None:
    async with watched(server.fetch, journal, random=Random(7)):
        await asyncio.sleep(2000)
    gaps = [after - before for before, after in pairwise(server.times())]
    assert all(9 - 1e-5 <= gap <= 11 + 1e-5 for gap in gaps)
    assert min(gaps) < 9.2
    assert max(gaps) > 10.8


async def test_a_poll_longer_than_the_interval_is_followed_by_the_next_at_once(
    server: Server, journal: MemoryJournal
) -> None:
    server.takes_s = 25
    async with watched(server.fetch, journal):
        await asyncio.sleep(60)
    assert server.times() == [0, 25, 50]


async def test_a_poke_polls_at_once(server: Server, journal: MemoryJournal) -> None:
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(3)
        watch.poke.set()
        await asyncio.sleep(12)
    assert server.times() == [0, 3, 13]


@pytest.mark.parametrize("error", [Unreachable("x"), Invalid("x", b"<html>"), Limited("x")])
async def test_failed_polls_back_off_and_a_good_one_ends_it(
    error: VendorError, server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = [error, error, error, {}]
    async with watched(server.fetch, journal):
        await asyncio.sleep(101)
    # From the end of one to the start of the next: 10 + half of 10, 30, 60 (the cap).
    assert server.times() == [0, 15, 40, 80, 90, 100]


async def test_refused_credentials_are_tried_again_ever_later_and_at_once_when_poked(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = Rejected("no")
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(9000)
        watch.poke.set()
        await asyncio.sleep(3000)
    assert server.times() == pytest.approx([0, 315, 945, 2205, 4725, 8505, 9000])


async def test_only_refusals_count_towards_the_wait_after_a_refusal(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = [*[DOWN] * 9, Rejected("no")]
    async with watched(server.fetch, journal):
        await asyncio.sleep(1500)
    times = server.times()
    assert times[10] - times[9] == pytest.approx(315)
    assert times[11] - times[10] == pytest.approx(630)


async def test_a_good_poll_ends_the_growth_of_the_wait_after_refusals(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = [Rejected("no"), Rejected("no"), {}, Rejected("no")]
    async with watched(server.fetch, journal):
        await asyncio.sleep(1500)
    assert server.times() == pytest.approx([0, 315, 945, 955, 1270])


async def test_the_next_sign_of_life_is_never_overdue(
    server: Server, journal: MemoryJournal
) -> None:
    slow = Pace(interval_s=600, idle_interval_s=600, retry_refused_s=300)
    options = ToyOptions(lists=("a", "b", "c", "d"), spread=True, sweeps=3)
    server.takes_s = 4
    loop = asyncio.get_running_loop()
    async with watched(server.fetch, journal, plan(options, pace=slow, concurrency=1)) as watch:
        while loop.time() < 3000:
            await asyncio.sleep(1)
            assert watch.due_s >= loop.time()
            assert watch.due_s <= loop.time() + 660
    assert server.times("/list/d") == [450, 1050, 1650, 2250, 2850]


async def test_what_is_due_after_a_poke_is_the_next_answer(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = Rejected("no")
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(1)
        assert watch.due_s == pytest.approx(315)
        server.takes_s = 5
        watch.poke.set()
        await asyncio.sleep(1)
        assert watch.due_s == 1 + PLAN.timeout_s


async def test_half_an_answer_is_a_sign_of_life(server: Server, journal: MemoryJournal) -> None:
    server.takes_s = 12
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(4)
        assert watch.due_s == PLAN.timeout_s
        watch.alive()
        assert watch.due_s == 4 + PLAN.timeout_s


async def test_thousands_of_vanished_runs_written_down_slowly_are_signs_of_life(
    server: Server, journal: MemoryJournal
) -> None:
    class Slow(MemoryJournal):
        async def commit(self, commit: Commit) -> None:
            if any(run.state is State.UNKNOWN for run in commit.runs):
                await asyncio.sleep(1)
            await super().commit(commit)

    server.lists(*(row(f"r{number}", "running") for number in range(40)))
    loop = asyncio.get_running_loop()
    slow = Slow()
    async with watched(server.fetch, slow, plan(ToyOptions(settles=False), vanish_after=1)) as w:
        await asyncio.sleep(5)
        server.lists()
        while len(slow.told()) < 80:
            await asyncio.sleep(0.5)
            assert w.due_s >= loop.time()
    assert loop.time() >= 10 + 40


async def test_only_who_was_refused_is_asked_at_once_after_a_reload(
    server: Server, journal: MemoryJournal
) -> None:
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(3)
        watch.retry_refused()
        await asyncio.sleep(9)
        server.answers["/list/"] = [Rejected("no"), {}]
        await asyncio.sleep(9)
        assert server.times() == [0, 10, 20]
        watch.retry_refused()
        await asyncio.sleep(2)
        watch.retry_refused()
        await asyncio.sleep(2)
    assert server.times() == [0, 10, 20, 21]


# Retry-After


@pytest.mark.parametrize(
    ("headers", "next_s"),
    [
        ({"retry-after": "120"}, 120),
        ({"retry-after": "1"}, 15),
        ({"retry-after": formatdate(EPOCH_MS / 1000 + 90, usegmt=True)}, 90),
        (
            {
                "retry-after": formatdate(EPOCH_MS / 1000 + 4000, usegmt=True),
                "date": formatdate(EPOCH_MS / 1000 + 3900, usegmt=True),
            },
            100,
        ),
        ({"retry-after": "soon"}, 15),
        ({}, 15),
    ],
)
async def test_a_listing_is_asked_again_no_sooner_than_retry_after(
    headers: dict[str, str], next_s: float, server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = [Response(status=429, headers=headers), {}]
    async with watched(server.fetch, journal):
        await asyncio.sleep(next_s + 1)
    assert server.times() == [0, next_s]


async def test_the_longest_of_several_retry_afters_holds(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(lists=("a", "b", "c"))
    server.takes_s = 1
    for name, delay in (("b", "30"), ("c", "400")):
        answer = Response(status=503, headers={"retry-after": delay})
        server.answers[f"/list/{name}"] = [answer, {}]
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(500)
    assert server.times()[:4] == [0, 1, 1, 402]


async def test_retry_after_holds_back_what_was_about_to_be_asked(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(lists=("a", "b"))
    server.answers["/list/a"] = [Response(status=429, headers={"retry-after": "60"}), {}]
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(59)
    assert server.paths() == ["/list/a"]


async def test_retry_after_to_a_question_by_id_holds_the_whole_source(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(*(row(f"r{n}", "running") for n in range(6)))
    async with watched(server.fetch, journal, plan(rate_per_s=1, concurrency=3)):
        await asyncio.sleep(5)
        server.lists()
        server.answers["/run/r0"] = Response(status=429, headers={"retry-after": "70"})
        for number in range(1, 6):
            server.answers[f"/run/r{number}"] = {"rows": [row(f"r{number}", "succeeded")]}
        await asyncio.sleep(74)
        assert server.times("/list") == [0, 10]
        assert len(server.paths("/run")) == 2  # as many as were sent before it was answered
        assert journal.told()[6:] == [("r1", "succeeded")]
        await asyncio.sleep(21)
    assert server.times("/list")[2] == 80
    # What was held back is asked then, and the refused one has not been given up.
    assert {state for run, state in journal.told() if run == "r0"} == {"running"}
    assert ("r5", "succeeded") in journal.told()


async def test_a_poke_does_not_undercut_retry_after(server: Server, journal: MemoryJournal) -> None:
    server.answers["/list/"] = [Response(status=429, headers={"retry-after": "100"}), {}]
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(5)
        watch.poke.set()
        await asyncio.sleep(100)
    assert server.times() == [0, 100]


async def test_a_throttled_question_by_id_delays_no_poll_and_is_the_last_of_its_poll(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/sweep/0"] = Limited("slowly")
    async with watched(server.fetch, journal, plan(ToyOptions(sweeps=5))):
        await asyncio.sleep(15)
    assert server.times("/list") == [0, 10]
    assert server.paths("/sweep") == ["/sweep/0"] * 2


# The budget of requests


async def test_requests_keep_to_the_rate_after_a_burst(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(lists=tuple("abcdefgh"))
    async with watched(server.fetch, journal, plan(options, rate_per_s=0.5, concurrency=3)):
        await asyncio.sleep(10)
    assert server.times()[:8] == [0, 0, 0, 2, 4, 6, 8, 10]


async def test_the_first_question_goes_alone_so_that_a_wrong_password_is_sent_once(
    server: Server, journal: MemoryJournal
) -> None:
    server.takes_s = 1
    options = ToyOptions(lists=("a", "b", "c"), sweeps=4)
    for name in "abc":
        server.answers[f"/list/{name}"] = [Rejected("locked"), {}]
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(300)
        assert server.paths() == ["/list/a"]
        assert journal.told() == [("", "down")]


async def test_listings_to_be_spread_fill_the_interval_evenly(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(lists=("a", "b", "c", "d"), spread=True)
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(19)
    assert server.times() == [0, 2.5, 5, 7.5, 10, 12.5, 15, 17.5]


async def test_questions_by_id_to_be_spread_fill_the_interval_evenly(
    server: Server, journal: MemoryJournal
) -> None:
    async with watched(server.fetch, journal, plan(ToyOptions(sweeps=5))):
        await asyncio.sleep(9)
    assert server.asked == [(0, "/list/")] + [(2.0 * n, f"/sweep/{n}") for n in range(5)]


async def test_no_poll_asks_more_questions_by_id_than_the_rate_gives_in_an_interval(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(*(row(f"r{n}", "running") for n in range(35)))
    async with watched(server.fetch, journal, plan(rate_per_s=1, concurrency=2)):
        await asyncio.sleep(9)
        server.lists()
        for number in range(35):
            server.answers[f"/run/r{number}"] = {"rows": [row(f"r{number}", "succeeded")]}
        counts = []
        for _ in range(6):
            await asyncio.sleep(10)
            counts.append(len(server.paths("/run")))
    assert counts[-1] == 35
    assert all(after - before <= 10 for before, after in pairwise([0, *counts]))
    assert len(server.times("/list")) >= 5
    assert journal.told()[35:] == [(f"r{n}", "succeeded") for n in range(35)]


async def test_the_questions_of_held_rows_keep_to_the_budget_too(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(asks=True)
    server.lists(*(row(f"r{n}", "running") for n in range(25)))
    async with watched(server.fetch, journal, plan(options, rate_per_s=1, concurrency=2)):
        await asyncio.sleep(9)
        server.lists(*(row(f"r{n}", "failed") for n in range(25)))
        for number in range(25):
            server.answers[f"/why/r{number}"] = why(f"r{number}", "disk full")
        await asyncio.sleep(10.5)
        assert len(server.times("/why")) == 10
        await asyncio.sleep(5)
        assert len(server.times("/list")) == 3
        await asyncio.sleep(35)
    assert journal.told()[25:] == [(f"r{n}", "failed") for n in range(25)]


async def test_pages_that_lead_on_for_ever_are_a_failed_poll(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(follow=["/list/"])
    async with watched(server.fetch, journal, plan(rate_per_s=1e9), down_after=1):
        await asyncio.sleep(5)
    assert len(server.paths()) == 20_000
    assert [e.data.reason for e in journal.events() if isinstance(e, SourceEvent)] == ["invalid"]


async def test_more_jobs_than_any_vendor_has_are_a_failed_poll(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), marks={"m": "1"})
    async with watched(server.fetch, journal, plan(), down_after=1) as watch:
        await asyncio.sleep(5)
        server.lists(marks={f"m{number}": "1" for number in range(200_000)})
        await asyncio.sleep(10)
        assert watch.ledger.marks == {"m": "1"}
    down = journal.events()[-1]
    assert isinstance(down, SourceEvent)
    assert down.data.message == "more than 200000 jobs of one source to take note of"


async def test_more_runs_than_can_be_remembered_are_refused(server: Server) -> None:
    index = Index()
    others: Any = range(1_999_998)  # keys that are made at once, and are no run's
    known = Known(job=Job("1"), run_id="1", state=State.RUNNING)
    index.runs = {"1": known} | dict.fromkeys(others, known)
    memory = Memory(now_ms=EPOCH_MS, contact_ms=EPOCH_MS, index=index)
    asker, request = Asker(PLAN, server.fetch, now_ms), Request(path="/list/")
    server.lists(row("1", "running"), row("new", "running"))
    assert len((await asker.ask(request, memory)).runs) == 2
    server.lists(row("new", "running"), row("newer", "running"))
    with pytest.raises(Invalid, match=r"more than 2000000 runs .*; lower poller\.retention"):
        await asker.ask(request, memory)


async def test_more_questions_than_can_ever_be_asked_are_a_failed_poll(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(questions=["/why/a"] * 200_001)
    async with watched(server.fetch, journal, plan(), down_after=1):
        await asyncio.sleep(5)
    [down] = journal.events()
    assert isinstance(down, SourceEvent)
    assert down.data.message == "more than 200000 questions by id in one poll"


async def test_rows_beyond_those_that_can_be_held_are_told_as_they_are(
    server: Server, journal: MemoryJournal
) -> None:
    names = [f"r{number}" for number in range(10_001)]
    server.lists(*(row(name, "running") for name in names))
    async with watched(server.fetch, journal, plan(ToyOptions(asks=True), rate_per_s=0.1)):
        await asyncio.sleep(5)
        server.lists(*(row(name, "failed") for name in names))
        await asyncio.sleep(5.5)
        assert journal.told()[10_001:] == [("r10000", "failed")]


# A poll fault is never a job fault


@pytest.mark.parametrize(
    "fault",
    [
        Unreachable("timeout"),
        Rejected("no"),
        Limited("slowly"),
        Limited("slowly", 5.0),
        Invalid("html"),
        Response(status=500),
        Response(status=404),
        Response(status=401),
        Response(status=429),
        Response(status=200, body=b"<html>log in</html>"),
        Response(status=200, body=b'{"rows": [{"id": "a"'),
    ],
)
async def test_a_poll_fault_changes_no_run(
    fault: VendorError | Response, server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), row("b", "queued"))
    good = server.answers["/list/"]
    assert isinstance(good, dict)
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
        server.answers["/list/"] = fault
        await asyncio.sleep(4000)
        server.answers["/list/"] = good
        await asyncio.sleep(4000)
    assert [(run, state) for run, state in journal.told() if run] == [
        ("a", "running"),
        ("b", "queued"),
    ]
    assert not server.paths("/run")


async def test_a_listing_half_read_loses_nobody_and_what_was_read_is_told(
    server: Server, journal: MemoryJournal
) -> None:
    first, second = row("a", "running"), row("b", "running")
    server.lists(first, follow=["/list//2"])
    server.answers["/list//2"] = {"rows": [second]}
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
        server.lists(row("a", "succeeded"), follow=["/list//2"])
        server.answers["/list//2"] = DOWN
        await asyncio.sleep(200)
        assert journal.told()[2:] == [("a", "succeeded"), ("", "down")]
        assert not server.paths("/run")
        server.answers["/list//2"] = {"rows": [second]}
        await asyncio.sleep(200)
    assert journal.told()[4:] == [("", "up")]
    assert not server.paths("/run")


async def test_where_one_of_several_listings_fails_only_the_others_can_miss_runs(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(lists=("x", "y"))
    server.lists(row("a", "running"), name="x")
    server.lists(row("b", "running"), name="y")
    server.answers["/run/b"] = {"rows": [row("b", "succeeded")]}
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(5)
        server.answers["/list/x"] = DOWN
        server.lists(name="y")
        await asyncio.sleep(25)
    assert journal.told()[2:] == [("b", "succeeded")]
    assert server.paths("/run") == ["/run/b"]


async def test_failed_polls_do_not_count_against_a_missing_run(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(lists=("x", "y"))
    server.lists(row("b", "running"), name="y")
    server.answers["/run/b"] = DOWN
    async with watched(server.fetch, journal, plan(options), down_after=99):
        await asyncio.sleep(5)
        server.answers["/list/x"] = DOWN
        server.lists(name="y")
        await asyncio.sleep(400)
    assert len(server.paths("/run")) > 3
    assert journal.told() == [("b", "running")]


async def test_where_all_listings_fail_nothing_is_asked_by_id(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    async with watched(server.fetch, journal, plan(ToyOptions(sweeps=1), resync_s=1)):
        await asyncio.sleep(5)
        server.asked.clear()
        server.answers["/list/"] = DOWN
        await asyncio.sleep(100)
    assert set(server.paths()) == {"/list/"}


async def test_a_bug_in_a_vendor_is_a_failed_poll_that_is_logged_whole(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "never heard of"))
    with structlog.testing.capture_logs() as logs:
        async with watched(server.fetch, journal):
            await asyncio.sleep(5)
    assert journal.told() == []
    assert [(log["event"], log["log_level"]) for log in logs] == [
        ("parse.bug", "error"),
        ("poll.failed", "warning"),
    ]


async def test_bad_rows_are_counted_and_logged_and_the_rest_goes_on(
    server: Server, journal: MemoryJournal
) -> None:
    metrics = Metrics()
    server.lists(*({"id": "x"} for _ in range(7)), row("a", "running"), notes=["it is late"])
    with structlog.testing.capture_logs() as logs:
        async with watched(server.fetch, journal, metrics=metrics):
            await asyncio.sleep(5)
    assert journal.told() == [("a", "running")]
    counted = metrics.registry.get_sample_value("poller_invalid_records_total", {"source": "s"})
    assert counted == 7
    bad = [log["at"] for log in logs if log["event"] == "row.invalid"]
    assert bad == [f"$.rows[{number}]" for number in range(5)]
    assert [log["note"] for log in logs if log["event"] == "vendor.note"] == ["it is late"]


# The condition of a source


async def test_a_source_is_down_after_so_many_failed_polls_in_a_row_and_up_at_the_first_good_one(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = [{}, DOWN, DOWN, {}, DOWN, DOWN, DOWN, DOWN, {}]
    with structlog.testing.capture_logs() as logs:
        async with watched(server.fetch, journal):
            await asyncio.sleep(500)
    down, up = (event for event in journal.events() if isinstance(event, SourceEvent))
    failed = server.times()[4]
    assert (down.type, down.time, down.sequence) == (
        "dev.poller.source.down",
        at(server.times()[6]),
        f"{1:020}",
    )
    assert (down.data.since, down.data.reason, down.data.message) == (
        at(failed),
        "unreachable",
        "no route",
    )
    assert (up.type, up.data.since, up.data.reason) == (
        "dev.poller.source.up",
        at(server.times()[8]),
        None,
    )
    assert [log["event"] for log in logs] == [
        "poll.failed",
        "poll.failed",
        "source.down",
        "source.up",
    ]


@pytest.mark.parametrize(
    ("error", "polls"),
    [(Rejected("no"), 1), (Limited("slowly"), 3), (Invalid("html"), 3), (DOWN, 3)],
)
async def test_refused_credentials_are_down_at_once_and_throttled_polls_count(
    error: VendorError, polls: int, server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = error
    async with watched(server.fetch, journal) as watch:
        for number in range(1, 5):
            await asyncio.sleep(0.1)
            assert len(server.paths()) == number
            assert len(journal.told()) == (number >= polls)
            watch.poke.set()
    reasons = [event.data.reason for event in journal.events() if isinstance(event, SourceEvent)]
    assert reasons == [error.reason]


async def test_refused_is_the_reason_though_another_listing_failed_otherwise(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers |= {"/list/a": DOWN, "/list/b": Limited("slowly"), "/list/c": Rejected("no")}
    options = ToyOptions(lists=("a", "b", "c"))
    server.takes_s = 1
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(5)
    reasons = [event.data.reason for event in journal.events() if isinstance(event, SourceEvent)]
    assert reasons == ["rejected"]


async def test_the_condition_survives_a_restart(server: Server, journal: MemoryJournal) -> None:
    server.answers["/list/"] = [{}, DOWN]
    async with watched(server.fetch, journal):
        await asyncio.sleep(30)  # two have failed
    async with watched(server.fetch, journal):
        await asyncio.sleep(1)
        assert journal.told() == [("", "down")]
    async with watched(server.fetch, journal):
        await asyncio.sleep(100)
    server.answers["/list/"] = {}
    async with watched(server.fetch, journal):
        await asyncio.sleep(1)
        assert journal.told() == [("", "down"), ("", "up")]
    async with watched(server.fetch, journal):
        await asyncio.sleep(1)
    assert journal.told() == [("", "down"), ("", "up")]


async def test_one_good_poll_before_a_restart_ends_the_row_of_failed_ones(
    server: Server, journal: MemoryJournal
) -> None:
    server.answers["/list/"] = [{}, DOWN, DOWN, {}, DOWN, DOWN, {}]
    async with watched(server.fetch, journal):
        await asyncio.sleep(50.5)
    assert len(server.paths()) == 4
    async with watched(server.fetch, journal):
        await asyncio.sleep(100)
    assert journal.told() == []


# First contact


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("active", [("a", "running")]),
        ("all", [("a", "running"), ("b", "failed")]),
        ("none", []),
    ],
)
async def test_first_contact_publishes_by_its_mode_and_later_everything_is_news(
    mode: Any, told: list[tuple[str, str]], server: Server, journal: MemoryJournal
) -> None:
    rows = [row("a", "running", started_ms=1), row("b", "failed", ended_ms=2)]
    server.lists(*rows)
    async with watched(server.fetch, journal, first_contact=mode):
        await asyncio.sleep(5)
        assert journal.told() == told
        assert all(
            isinstance(event, JobEvent)
            and event.data.snapshot
            and event.data.observed_after is None
            and event.data.previous is None
            for event in journal.events()
        )
        server.lists(*rows, row("c", "succeeded", ended_ms=EPOCH_MS + 8000))
        await asyncio.sleep(10)
    assert journal.told() == [*told, ("c", "succeeded")]
    assert journal.of("c")[0].data.observed_after == at(0)
    assert not journal.of("c")[0].data.snapshot


async def test_first_contact_lasts_until_one_complete_listing_was_read(
    server: Server, journal: MemoryJournal
) -> None:
    old = row("old", "failed", ended_ms=EPOCH_MS - 9)
    server.lists(row("a", "running"), follow=["/list//2"])
    server.answers["/list//2"] = [DOWN, {"rows": [row("b", "running"), old]}]
    async with watched(server.fetch, journal):
        await asyncio.sleep(17)
        server.lists(row("a", "running"), row("c", "queued"), row("b", "succeeded"))
        await asyncio.sleep(10)
    assert [
        (event.subject, event.data.state, event.data.snapshot, event.data.observed_after)
        for event in journal.events()
        if isinstance(event, JobEvent)
    ] == [
        ("a", "running", True, None),
        ("b", "running", True, None),
        ("c", "queued", False, at(15)),
        ("b", "succeeded", False, at(15)),
    ]


async def test_first_contact_goes_on_after_a_restart_that_interrupted_it(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), follow=["/list//2"])
    server.answers["/list//2"] = DOWN
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
    server.answers["/list//2"] = {"rows": [row("b", "failed", ended_ms=EPOCH_MS + 1)]}
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
    assert journal.told() == [("a", "running")]


async def test_first_contact_lasts_until_the_questions_that_the_listing_called_for_were_put(
    server: Server, journal: MemoryJournal
) -> None:
    names = [f"r{number}" for number in range(12)]
    server.lists(questions=[f"/run/{name}" for name in names])
    for name in names:
        server.answers[f"/run/{name}"] = {"rows": [row(name, "running")]}
    async with watched(
        server.fetch, journal, plan(ToyOptions(feed=True), rate_per_s=0.5, concurrency=5)
    ):
        await asyncio.sleep(5)
        assert len(journal.told()) == 5
        server.lists(questions=[f"/run/{name}" for name in names[5:]])
        await asyncio.sleep(12)
        server.lists(questions=[f"/run/{name}" for name in names[10:]])
        await asyncio.sleep(30)
        server.lists(*(row(name, "running") for name in [*names, "new"]))
        await asyncio.sleep(20)
    jobs = [event for event in journal.events() if isinstance(event, JobEvent)]
    assert [event.subject for event in jobs if event.data.snapshot] == names
    assert [event.subject for event in jobs if not event.data.snapshot] == ["new"]


async def test_at_first_contact_nothing_is_told_of_what_led_to_it(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "failed"))
    server.answers["/why/a"] = {
        "rows": [
            row("a", "failed", marker="1", ordinal=1, past=True),
            row("a", "failed", marker="2", ordinal=2, why="disk full"),
        ]
    }
    options = ToyOptions(asks=True)
    async with watched(server.fetch, journal, plan(options), first_contact="all"):
        await asyncio.sleep(5)
    (event,) = journal.events()
    assert isinstance(event, JobEvent)
    assert event.data.error is not None
    assert (event.data.run.attempt, event.data.error.message) == (2, "disk full")
    assert (event.data.snapshot, event.data.inferred) == (True, False)


# Disappearance


async def test_a_run_that_left_a_complete_listing_is_asked_for_and_its_end_is_told(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), row("b", "running"))
    async with watched(server.fetch, journal):
        await asyncio.sleep(15)
        server.lists(row("b", "running"))
        server.answers["/run/a"] = {"rows": [row("a", "succeeded", ended_ms=EPOCH_MS + 18_000)]}
        await asyncio.sleep(15)
    assert server.paths("/run") == ["/run/a"]
    end = journal.of("a")[-1]
    assert (end.data.state, end.time, end.data.time_source) == ("succeeded", at(18), "vendor")
    assert (end.data.observed_after, end.data.observed_at) == (at(10), at(20))


@pytest.mark.parametrize(
    "gone", [Response(status=404), {"gone": ["a"]}], ids=["not found", "said to be gone"]
)
async def test_a_run_that_the_vendor_says_does_not_exist_has_vanished_at_once(
    gone: Any, server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    async with watched(server.fetch, journal):
        await asyncio.sleep(15)
        server.lists()
        server.answers["/run/a"] = gone
        await asyncio.sleep(15)
    assert server.paths("/run") == ["/run/a"]
    end = journal.of("a")[-1]
    assert (end.data.state, end.data.reason, end.time) == ("unknown", "vanished", at(20))
    assert (end.data.observed_after, end.data.observed_at) == (at(10), at(20))


@pytest.mark.parametrize(
    ("answer", "settles"),
    [
        (DOWN, True),
        (Invalid("?"), True),
        (Limited("slowly"), True),
        (Rejected("not yours"), True),
        ({}, True),
        ({}, False),
    ],
    ids=["unreachable", "invalid", "limited", "rejected", "no answer", "no way to ask"],
)
async def test_a_missing_run_that_nobody_can_tell_of_has_vanished_after_so_many_good_polls(
    answer: Any, settles: bool, server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    options = ToyOptions(settles=settles)
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(15)
        server.lists()
        server.answers["/run/a"] = answer
        await asyncio.sleep(56)
    assert server.times("/list") == [0, 10, 20, 30, 40, 50, 60, 70]  # it delays no poll
    assert server.times("/run") == [20, 30, 40] * settles
    assert journal.told() == [("a", "running"), ("a", "unknown")]
    end = journal.of("a")[-1]
    assert (end.data.observed_after, end.data.observed_at) == (at(30), at(40))


async def test_a_missing_run_that_can_be_told_of_in_time_has_not_vanished(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/run/a"] = [DOWN, DOWN, {"rows": [row("a", "failed")]}]
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
        server.lists()
        await asyncio.sleep(60)
    assert journal.told() == [("a", "running"), ("a", "failed")]
    end = journal.of("a")[-1]
    assert (end.data.observed_after, end.data.observed_at) == (at(20), at(30))


async def test_only_misses_in_a_row_count(server: Server, journal: MemoryJournal) -> None:
    there: Row = {"rows": [row("a", "running")]}
    away: Row = {}
    server.answers["/list/"] = [there, away, away, there, away, away, there, away, away, away, {}]
    server.answers["/run/a"] = DOWN
    async with watched(server.fetch, journal):
        await asyncio.sleep(85)
        assert journal.told() == [("a", "running")]
        await asyncio.sleep(10)
    assert journal.told() == [("a", "running"), ("a", "unknown")]


async def test_a_vanished_run_that_reappears_is_told_again(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
        server.lists()
        await asyncio.sleep(10)
        server.lists(row("a", "running"))
        await asyncio.sleep(10)
    assert journal.told() == [("a", "running"), ("a", "unknown"), ("a", "running")]
    assert journal.of("a")[-1].data.run.attempt == 1


async def test_a_run_whose_row_cannot_be_read_is_asked_for_by_id(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/run/a"] = {"rows": [row("a", "running")]}
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
        server.lists({"id": "a"})
        await asyncio.sleep(60)
    assert journal.told() == [("a", "running")]
    assert server.times("/run") == [10, 20, 30, 40, 50, 60]


async def test_questions_that_an_answer_by_id_calls_for_are_put_in_the_same_poll(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/run/a"] = {"questions": ["/history/a"]}
    server.answers["/history/a"] = {"rows": [row("a", "failed")]}
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
        server.lists()
        await asyncio.sleep(10)
    assert journal.told() == [("a", "running"), ("a", "failed")]
    assert server.asked[-1] == (10, "/history/a")


async def test_a_clock_that_was_set_back_hides_no_disappearance(
    server: Server, journal: MemoryJournal
) -> None:
    behind_ms = 0

    def clock() -> int:
        return now_ms() - behind_ms

    server.lists(row("a", "running"), row("b", "running"), row("c", "running"))
    async with watched(server.fetch, journal, now_ms=clock):
        await asyncio.sleep(15)
        behind_ms = 3_600_000
        server.lists(row("b", "running"))
        await asyncio.sleep(10)
        assert journal.told()[3:] == [("a", "unknown"), ("c", "unknown")]
        server.lists()
        await asyncio.sleep(10)
    assert journal.told()[5:] == [("b", "unknown")]
    times = [event.time for event in journal.of("a")]
    assert times == sorted(times)


# A feed of changes


async def test_a_run_that_a_feed_has_not_shown_for_long_is_asked_for(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(feed=True)
    server.answers["/list/"] = [{"rows": [row("a", "running"), row("b", "queued")]}, {}]
    server.answers["/run/a"] = {"rows": [row("a", "running")]}
    async with watched(server.fetch, journal, plan(options, resync_s=100)):
        await asyncio.sleep(95)
        assert server.paths("/run") == []
        await asyncio.sleep(10)
        assert server.paths("/run") == []
        await asyncio.sleep(10)
        assert server.asked[-2:] == [(110, "/run/a"), (110, "/run/b")]
        assert journal.told()[2:] == [("b", "unknown")]
        await asyncio.sleep(200)
    assert server.times("/run/a") == [110, 220]
    assert server.times("/run/b") == [110]


# Rows that are held until a question was answered

ASKS = ToyOptions(asks=True)


async def fails(server: Server) -> None:
    """Let a run fail between the polls at 10 and 20 s."""
    await asyncio.sleep(15)
    server.lists(row("a", "failed", ended_ms=EPOCH_MS + 17_000))


async def test_a_held_row_is_told_with_what_was_asked(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = why("a", "disk full", ended_ms=EPOCH_MS + 17_000)
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(30)
    assert server.times("/why") == [20]
    end = journal.of("a")[-1]
    assert end.data.error is not None
    assert (end.time, end.data.error.message) == (at(17), "disk full")
    assert (end.data.observed_after, end.data.observed_at) == (at(10), at(20))


async def test_a_held_row_is_told_as_it_is_where_the_answer_is_about_others(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running", marker="1", ordinal=1))
    server.answers["/why/a"] = {"rows": [row("a", "failed", marker="1", ordinal=1, past=True)]}
    async with watched(server.fetch, journal, plan(ASKS)):
        await asyncio.sleep(5)
        server.lists(row("a", "failed", marker="2", ordinal=2))
        await asyncio.sleep(10)
    assert [(e.data.state, e.data.run.attempt, e.data.inferred) for e in journal.of("a")] == [
        ("running", 1, False),
        ("failed", 1, True),
        ("failed", 2, False),
    ]


async def test_the_question_of_a_held_row_may_lead_on(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = {"questions": ["/why/a/2"]}
    server.answers["/why/a/2"] = why("a", "disk full")
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(10)
    assert server.asked[-2:] == [(20, "/why/a"), (20, "/why/a/2")]
    assert journal.told() == [("a", "running"), ("a", "failed")]


async def test_the_question_of_a_held_row_is_put_again_and_no_poll_is_delayed(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = [DOWN, Invalid("?"), why("a", "disk full")]
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(20)
        assert journal.told() == [("a", "running")]
        await asyncio.sleep(30)
    assert server.times("/list") == [0, 10, 20, 30, 40, 50, 60]
    assert server.times("/why") == [20, 30, 40]
    end = journal.of("a")[-1]
    assert (end.time, end.data.error and end.data.error.message) == (at(40), "disk full")
    # It is what the listing showed first at 20 s, so it happened after 10 s.
    assert (end.data.observed_after, end.data.observed_at) == (at(10), at(40))


async def test_a_held_row_is_told_as_it_is_when_its_question_is_given_up(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = DOWN
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(60)
    assert server.times("/why") == [20, 30, 40]
    assert journal.told() == [("a", "running"), ("a", "failed")]
    assert journal.of("a")[-1].time == at(17)
    assert journal.of("a")[-1].data.error is None


async def test_the_question_of_a_held_row_is_put_once_a_poll_however_long_the_poll_goes_on(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = DOWN
    server.answers |= {f"/sweep/{n}": {"questions": [f"/sweep/{n + 1}"]} for n in range(4)}
    async with watched(server.fetch, journal, plan(ToyOptions(asks=True, sweeps=1))):
        await fails(server)
        await asyncio.sleep(10)
    assert server.times("/why") == [20]
    assert server.times("/sweep/4") == [0, 10, 20]
    assert journal.told() == [("a", "running")]


async def test_a_held_row_whose_question_was_not_sent_is_not_given_up(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), row("b", "running"))
    server.answers["/why/a"] = [Limited("slowly")]
    server.answers["/why/b"] = why("b", "disk full")
    one_by_one = plan(ASKS, rate_per_s=2, concurrency=2)
    async with watched(server.fetch, journal, one_by_one):
        await asyncio.sleep(5)
        server.lists(row("a", "failed"), row("b", "failed"))
        await asyncio.sleep(30)
    assert server.times("/list") == [0, 10, 20, 30]
    assert len(server.paths("/why/a")) == 3
    assert journal.told()[2:] == [("b", "failed"), ("a", "failed")]
    assert journal.of("b")[-1].data.error is not None


async def test_a_held_row_that_is_overtaken_is_told_as_it_is_in_its_turn(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = DOWN
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(10)
        server.lists(row("a", "running"))
        await asyncio.sleep(10)
    assert [(e.data.state, e.data.run.attempt, e.time) for e in journal.of("a")] == [
        ("running", 1, at(0)),
        ("failed", 1, at(17)),
        ("running", 2, at(30)),
    ]
    assert server.times("/why") == [20]


async def test_a_held_row_that_is_overtaken_while_its_question_is_on_the_way_is_told_once(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = {"rows": [row("a", "failed", why="disk full")]}
    server.answers["/sweep/0"] = [{}, {}, {"rows": [row("a", "running")]}, {}]
    options = ToyOptions(asks=True, sweeps=1)
    delays = {"/why/a": 2.0, "/sweep/0": 1.0}

    async def fetch(request: Any) -> Response:
        await asyncio.sleep(delays.get(request.path, 0))
        return await server.fetch(request)

    async with watched(fetch, journal, plan(options)):
        await fails(server)
        await asyncio.sleep(10)
    assert journal.told() == [("a", "running"), ("a", "failed"), ("a", "running")]


async def test_a_held_row_that_needs_no_question_any_more_is_told_at_once(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = DOWN
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(10)
        server.lists(row("a", "failed", why="disk full"))
        await asyncio.sleep(30)
    assert server.times("/why") == [20]
    assert journal.told() == [("a", "running"), ("a", "failed")]
    assert journal.of("a")[-1].data.error is not None


async def test_a_held_row_is_not_asked_for_as_missing(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/why/a"] = [DOWN, DOWN, why("a", "disk full")]
    async with watched(server.fetch, journal, plan(ASKS)):
        await fails(server)
        await asyncio.sleep(10)
        server.lists()
        await asyncio.sleep(30)
    assert server.paths("/run") == []
    assert journal.told() == [("a", "running"), ("a", "failed")]


async def test_an_end_told_by_id_may_be_held_too_and_is_then_no_miss(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    server.answers["/run/a"] = [DOWN, DOWN, {"rows": [row("a", "failed")]}]
    server.answers["/why/a"] = [DOWN, DOWN, why("a", "disk full")]
    async with watched(server.fetch, journal, plan(ASKS)):
        await asyncio.sleep(5)
        server.lists()
        await asyncio.sleep(60)
    assert server.times("/run") == [10, 20, 30]
    assert server.times("/why") == [30, 40, 50]
    assert journal.told() == [("a", "running"), ("a", "failed")]
    assert journal.of("a")[-1].data.error is not None


async def test_a_held_row_keeps_the_source_from_idling(
    server: Server, journal: MemoryJournal
) -> None:
    pace = Pace(interval_s=10, idle_interval_s=1000, retry_refused_s=300)
    server.answers["/list/"] = [{}, {"rows": [row("a", "failed")]}]
    server.answers["/why/a"] = DOWN
    async with watched(server.fetch, journal, plan(ASKS, pace=pace)) as watch:
        await asyncio.sleep(1)
        watch.poke.set()
        await asyncio.sleep(100)
    assert server.times("/list") == [0, 1, 11, 21]
    assert journal.told() == [("a", "failed")]


# Marks


async def test_marks_are_given_back_at_once_and_saved_after_a_poll_in_which_all_was_answered(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), marks={"upto": "1", "x": "y"})
    server.answers["/why/a"] = [DOWN, DOWN, why("a", "disk full")]
    async with watched(server.fetch, journal, plan(ASKS)) as watch:
        await asyncio.sleep(5)
        assert journal.marks == {"upto": "1", "x": "y"}
        server.lists(row("a", "failed"), marks={"upto": "2", "x": ""})
        await asyncio.sleep(20)
        assert watch.ledger.marks == {"upto": "2"}
        assert journal.marks == {"upto": "1", "x": "y"}
        await asyncio.sleep(10)
        assert journal.marks == {"upto": "2"}


async def test_marks_of_a_failed_poll_are_not_saved(server: Server, journal: MemoryJournal) -> None:
    server.lists(marks={"upto": "1"}, follow=["/list//2"])
    server.answers["/list//2"] = [DOWN, {}]
    async with watched(server.fetch, journal):
        await asyncio.sleep(10)
        assert journal.marks == {}
        await asyncio.sleep(10)
        assert journal.marks == {"upto": "1"}


async def test_marks_are_not_saved_while_questions_are_left_over(
    server: Server, journal: MemoryJournal
) -> None:
    questions = [f"/run/r{number}" for number in range(9)]
    server.lists(questions=questions, marks={"upto": "1"})
    async with watched(server.fetch, journal, plan(rate_per_s=0.1, concurrency=8)):
        await asyncio.sleep(9)
        assert journal.marks == {}
        server.lists(marks={"upto": "2"})
        await asyncio.sleep(60)
        assert journal.marks == {"upto": "2"}


async def test_a_stop_saves_no_marks_of_rows_that_are_still_held(
    server: Server, journal: MemoryJournal
) -> None:
    options = ToyOptions(asks=True, feed=True)
    server.lists(row("a", "running"), marks={"upto": "1"})
    server.answers["/why/a"] = DOWN
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(5)
        server.lists(row("a", "failed"), marks={"upto": "2"})
        await asyncio.sleep(10)
    assert journal.marks == {"upto": "1"}
    server.answers["/why/a"] = why("a", "disk full")
    async with watched(server.fetch, journal, plan(options)):
        await asyncio.sleep(5)
    assert journal.told() == [("a", "running"), ("a", "failed")]
    assert journal.marks == {"upto": "2"}


async def test_a_vendor_learns_whether_the_poll_before_read_all(
    server: Server, journal: MemoryJournal
) -> None:
    told: list[tuple[bool, int | None]] = []
    start = PLAN.vendor.start

    def noting(options: Any, memory: Any) -> Any:
        told.append((memory.whole, memory.last_good_ms))
        return start(options, memory)

    server.answers["/list/"] = [{}, {}, DOWN, {}, {}]
    vendor = replace(PLAN.vendor, start=noting)
    async with watched(server.fetch, journal, plan(vendor=vendor)):
        await asyncio.sleep(56)
    assert told == [
        (False, None),
        (True, EPOCH_MS),
        (True, EPOCH_MS + 10_000),
        (False, EPOCH_MS + 10_000),
        (True, EPOCH_MS + 35_000),
        (True, EPOCH_MS + 45_000),
    ]


# A restart is a diff


async def test_a_restart_repeats_nothing_and_tells_what_happened_meanwhile(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"), row("b", "running"), row("c", "queued"), row("d", "running"))
    async with watched(server.fetch, journal):
        await asyncio.sleep(15)
    server.lists(row("a", "running"), row("b", "failed"), row("e", "queued"))
    server.answers["/run/c"] = {"rows": [row("c", "canceled")]}
    await asyncio.sleep(100)
    async with watched(server.fetch, journal):
        await asyncio.sleep(15)
    assert journal.told()[4:] == [
        ("b", "failed"),
        ("e", "queued"),
        ("c", "canceled"),
        ("d", "unknown"),
    ]
    assert {event.data.observed_after for event in journal.of("b")[1:]} == {at(10)}
    sequences = [int(event.sequence) for event in journal.events()]
    assert sequences == list(range(1, 9))


async def test_a_restart_notices_at_once_what_has_gone_meanwhile(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "running"))
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
    server.lists()
    async with watched(server.fetch, journal):
        await asyncio.sleep(0.001)
    assert server.times() == [0, 5, 5]
    assert journal.told() == [("a", "running"), ("a", "unknown")]


async def saved(journal: Journal) -> AsyncIterator[dict[str, str]]:
    """The marks that the journal holds, looked at again and again."""
    while True:
        yield (await journal.load("s")).marks


@pytest.mark.looptime(False)
async def test_a_restart_reads_the_real_journal(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    fast = plan(pace=Pace(interval_s=0.01, idle_interval_s=0.01, retry_refused_s=300))
    server.lists(row("a", "running", queued_ms=5, marker="7"), marks={"upto": "1"})
    async with open_journal(path) as journal, watched(server.fetch, journal, fast):
        await journal.grown(0)
        await anext(marks async for marks in saved(journal) if marks)
    server.lists(row("a", "succeeded", queued_ms=5, marker="7"), row("b", "queued"))
    async with open_journal(path) as journal, watched(server.fetch, journal, fast) as watch:
        assert watch.ledger.marks == {"upto": "1"}
        await journal.grown(2)
        events = [json.loads(event.body) for event in await journal.read(0, 100)]
    assert [(event["subject"], event["data"]["state"]) for event in events] == [
        ("a", "running"),
        ("a", "succeeded"),
        ("b", "queued"),
    ]
    assert [event["sequence"] for event in events] == [f"{n:020}" for n in (1, 2, 3)]


async def test_a_clean_stop_remembers_the_last_good_poll(
    server: Server, journal: MemoryJournal
) -> None:
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
    fast = plan(pace=Pace(interval_s=1, idle_interval_s=1, retry_refused_s=300))
    async with watched(server.fetch, journal, fast):
        await asyncio.sleep(7.5)
    server.lists(row("a", "queued"))
    async with watched(server.fetch, journal):
        await asyncio.sleep(5)
    assert journal.of("a")[0].data.observed_after == at(12)


async def test_a_journal_that_cannot_be_written_ends_the_loop(server: Server) -> None:
    class Full(MemoryJournal):
        async def commit(self, commit: Any) -> None:
            raise JournalError(f"disk full: {commit.source}")

    with pytest.RaisesGroup(JournalError, allow_unwrapped=True, flatten_subgroups=True):
        async with watched(server.fetch, Full()):
            server.lists(row("a", "running"))
            await asyncio.sleep(50)
    assert len(server.paths()) == 1


# Retention


async def test_finished_runs_are_forgotten_after_their_retention(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("a", "succeeded"), row("b", "running"))
    async with watched(server.fetch, journal, retention_s=5000) as watch:
        await asyncio.sleep(5)
        server.lists(row("b", "running"))
        await asyncio.sleep(3600)
        assert set(watch.ledger.index.runs) == {"a", "b"}
        await asyncio.sleep(3600)
        assert set(watch.ledger.index.runs) == {"b"}
    assert [run.run_id for run in (await journal.load("s")).runs] == ["b"]


async def test_a_forgotten_run_that_is_still_shown_is_no_news(
    server: Server, journal: MemoryJournal
) -> None:
    # The vendor's clock is 20 min ahead, so that the run's end seems younger than our knowledge.
    server.lists(row("b", "running"))
    async with watched(server.fetch, journal, retention_s=3000):
        await asyncio.sleep(15)
        ended = row("a", "succeeded", ended_ms=EPOCH_MS + 1_215_000)
        server.lists(ended, row("b", "running"))
        await asyncio.sleep(10 * 3600)
    assert journal.told() == [("b", "running"), ("a", "succeeded")]


# Provisional runs


async def test_a_provisional_run_becomes_the_real_one(
    server: Server, journal: MemoryJournal
) -> None:
    server.lists(row("j@5", "running", job="j"))
    async with watched(server.fetch, journal) as watch:
        await asyncio.sleep(5)
        server.lists(row("77", "running", job="j", was="j@5"))
        await asyncio.sleep(10)
        server.lists(row("77", "succeeded", job="j"))
        await asyncio.sleep(10)
        assert list(watch.ledger.index.runs) == [("j", "77")]
    first, last = (event for event in journal.events() if isinstance(event, JobEvent))
    assert (first.subject, last.subject) == ("j@5", "77")
    assert last.data.detail == {"provisional_id": "j@5"}
    assert last.data.previous is not None
    assert last.data.previous.state == "running"
    assert [run.run_id for run in (await journal.load("s")).runs] == ["77"]
