"""The forecast: laws of when to poll, what is learned, and what it is good for in the loop."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.diff import Observation, diff
from poller.errors import Unreachable
from poller.forecast import Due, Forecast, ahead, gathered_s
from poller.journal import open_journal
from poller.known import Index
from poller.ledger import Sighting
from poller.runs import Job, Seen, State
from poller.schedule import Pace
from tests.toy import EPOCH_MS, PLAN, MemoryJournal, Server, ledger_of, row, watched

DOWN = Unreachable("no route")
PACE = Pace(interval_s=10, idle_interval_s=60, retry_refused_s=300, max_interval_s=60)

lengths = st.lists(st.floats(0, 1e6), min_size=1, max_size=20)
seconds = st.floats(0, 1e6)
dues = st.lists(
    st.builds(
        lambda changes, opens_s, span_s: Due(changes, opens_s, opens_s + span_s),
        st.floats(0.001, 100),
        st.floats(0, 1000),
        st.just(0.0) | st.floats(0.001, 1000),
    ),
    max_size=6,
)


def waited_s(found: list[Due], until_s: float) -> float:
    """How long changes have waited by then, all together, by the book."""
    total = 0.0
    for due in found:
        end_s = min(until_s, due.closes_s)
        span_s = due.closes_s - due.opens_s
        if until_s <= due.opens_s:
            continue
        share = (end_s - due.opens_s) / span_s if span_s else 1.0
        total += due.changes * share * (until_s - (due.opens_s + end_s) / 2)
    return total


class Jobs:
    """Runs told to a forecast as a ledger would tell them."""

    def __init__(self, forecast: Forecast) -> None:
        self.index = Index()
        self.marks: dict[str, str] = {}
        self._forecast = forecast

    def shows(
        self,
        run: str,
        state: str,
        at_s: float,
        *,
        job: str = "j",
        after_s: float | None = None,
        name: str | None = None,
        started_s: float | None = None,
        ended_s: float | None = None,
    ) -> None:
        """A poll sees a run in a state, and the one before began at `after_s`, or just before."""
        seen = Seen(
            job=Job(job, name=name),
            run_id=run,
            state=State(state),
            vendor_state=state,
            started_ms=None if started_s is None else ms(started_s),
            ended_ms=None if ended_s is None else ms(ended_s),
        )
        known = self.index.runs.get(run if run == job else (job, run))
        transitions, then = diff(known, seen, Observation(at_ms=ms(at_s)))
        self.index.put(then, ms(at_s))
        self.marks |= self._forecast.learn(
            known,
            transitions,
            after_ms=ms(at_s - 1 if after_s is None else after_s),
            at_ms=ms(at_s),
        )

    def ran(self, count: int, *, every_s: float = 1000, lasts_s: float = 300) -> None:
        """So many runs, each like the one before."""
        for number in range(count):
            self.shows(f"r{number}", "running", number * every_s)
            self.shows(f"r{number}", "succeeded", number * every_s + lasts_s)


def ms(second: float) -> int:
    return EPOCH_MS + round(second * 1000)


# What is ahead


@given(lengths, seconds)
def test_what_has_not_ended_ends_once(past_s: list[float], elapsed_s: float) -> None:
    found = list(ahead(past_s, elapsed_s, math.inf, 3.0))
    assert sum(due.changes for due in found) == pytest.approx(3.0)
    assert all(0 <= due.opens_s <= due.closes_s for due in found)


@given(lengths, seconds, st.floats(1, 1000))
def test_a_horizon_leaves_out_what_begins_after_it_and_nothing_else(
    past_s: list[float], elapsed_s: float, horizon_s: float
) -> None:
    near = list(ahead(past_s, elapsed_s, horizon_s))
    everything = list(ahead(past_s, elapsed_s, math.inf))
    assert near == everything[: len(near)]
    assert all(due.opens_s >= horizon_s * (1 - 1e-6) - 1e-6 for due in everything[len(near) :])


def test_the_next_length_falls_into_each_gap_between_the_earlier_ones_alike() -> None:
    found = list(ahead([300, 100, 200], 0, math.inf))
    assert [due.changes for due in found] == [0.25] * 4
    assert [(due.opens_s, due.closes_s) for due in found[1:3]] == [(100, 200), (200, 300)]


def test_what_has_lasted_longer_than_some_earlier_ones_is_no_longer_one_of_them() -> None:
    found = list(ahead([100, 200, 300], 250, math.inf))
    assert [due.changes for due in found] == pytest.approx([1 / 3, 2 / 3])
    assert (found[0].opens_s, found[0].closes_s) == (0, 50)


def test_what_is_overdue_is_less_and_less_likely_to_end_any_moment() -> None:
    (soon,) = ahead([100, 101], 200, 60)
    (late,) = ahead([100, 101], 1000, 60)
    assert soon == Due(1.0, 0.0, 99.0)
    assert late == Due(1.0, 0.0, 899.0)


# When a poll is due


@given(dues, st.floats(0.01, 1000))
def test_a_poll_is_due_when_changes_have_waited_for_what_it_is_worth(
    found: list[Due], worth_s: float
) -> None:
    at_s = gathered_s(found, worth_s)
    if found:
        assert waited_s(found, at_s) == pytest.approx(worth_s, rel=1e-3, abs=1e-3)
    else:
        assert at_s == math.inf


@given(dues, dues, st.floats(0.01, 1000), st.floats(1, 10))
def test_more_that_is_due_and_a_cheaper_poll_never_make_it_later(
    found: list[Due], more: list[Due], worth_s: float, dearer: float
) -> None:
    at_s = gathered_s(found, worth_s)
    assert gathered_s(found + more, worth_s) <= at_s * (1 + 1e-6) + 1e-6
    assert gathered_s(found, worth_s * dearer) >= at_s * (1 - 1e-6) - 1e-6


story = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.integers(0, 3),
        st.sampled_from(["queued", "running", "suspended", "succeeded", "failed", "unknown"]),
        st.floats(0, 3000),
    ),
    max_size=40,
)


@given(story, st.floats(0, 1e6), st.floats(0.1, 600), st.floats(0.1, 600))
@settings(max_examples=60)
def test_no_poll_is_sooner_than_the_interval_or_later_than_the_longest_whatever_was_learned(
    polls: list[tuple[str, int, str, float]], later_s: float, interval_s: float, longest_s: float
) -> None:
    pace = replace(PACE, interval_s=interval_s, max_interval_s=longest_s)
    forecast = Forecast({}, pace)
    jobs, now_s = Jobs(forecast), 0.0
    for job, run, state, passed_s in polls:
        jobs.shows(f"r{run}", state, now_s + passed_s, job=job, after_s=now_s)
        now_s += passed_s
        for at_s in (now_s, now_s + later_s):
            due_s = forecast.due_s(jobs.index, ms(at_s))
            assert interval_s <= due_s <= max(interval_s, longest_s)
    again = Forecast(jobs.marks, pace)
    assert again.due_s(jobs.index, ms(now_s)) == forecast.due_s(jobs.index, ms(now_s))


@pytest.mark.parametrize(
    ("due_s", "expected_s"), [(0.0, 10), (25.0, 25), (1000.0, 60), (math.inf, 60)]
)
def test_a_due_poll_is_kept_between_the_interval_and_the_longest(
    due_s: float, expected_s: float
) -> None:
    class Middle(Random):
        def uniform(self, a: float, b: float) -> float:
            return (a + b) / 2

    for active in (True, False):
        assert PACE.after_good(active=active, random=Middle(), due_s=due_s) == expected_s


# What is learned


def test_while_a_run_is_active_of_which_nothing_is_known_polls_are_an_interval_apart() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    assert forecast.due_s(jobs.index, ms(0)) == 60
    jobs.shows("r", "running", 0)
    assert forecast.due_s(jobs.index, ms(0)) == 10
    assert forecast.due_s(jobs.index, ms(3000)) == 10


def test_a_learned_job_is_polled_rarely_in_the_middle_and_often_when_its_end_is_due() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    jobs.ran(8)
    jobs.shows("r8", "running", 8000)
    waits = {at_s: forecast.due_s(jobs.index, ms(8000 + at_s)) for at_s in (0, 100, 280, 300, 301)}
    assert waits[0] == waits[100] == 60
    assert waits[280] < 30
    assert waits[300] == waits[301] == 10


def test_the_next_start_is_foreseen_too() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    jobs.ran(8)
    assert forecast.due_s(jobs.index, ms(7500)) == 60
    assert forecast.due_s(jobs.index, ms(8000)) == 10


def test_a_new_job_is_expected_to_be_like_the_others_of_its_source() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    jobs.ran(8)
    jobs.shows("x1", "running", 7500, job="x")
    assert forecast.due_s(jobs.index, ms(7600)) > 10


def test_where_every_run_is_a_job_of_its_own_runs_of_one_name_are_alike() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    for number in range(3):
        jobs.shows(f"r{number}", "queued", number, job=f"r{number}", name="build")
    assert {name for name in jobs.marks if "build" in name} == {"forecast:build"}
    jobs.shows("r9", "queued", 9, job="r9")
    assert "forecast:-" in jobs.marks


def test_a_vendor_whose_clock_is_behind_is_learned_by_when_a_poll_could_see_it() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    for number in range(8):
        at_s = number * 1000.0
        jobs.shows(f"r{number}", "running", at_s, started_s=at_s - 100)
        jobs.shows(f"r{number}", "succeeded", at_s + 300, started_s=at_s - 100, ended_s=at_s + 200)
    jobs.shows("r8", "running", 8000, started_s=7900)
    assert forecast.due_s(jobs.index, ms(8200)) == 60
    assert forecast.due_s(jobs.index, ms(8300)) == 10


def test_only_the_last_lengths_count() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    jobs.ran(30)
    before = len(jobs.marks["forecast:j"])
    jobs.ran(30)
    assert len(jobs.marks["forecast:j"]) <= before + 20


def test_of_many_jobs_those_that_ran_last_are_remembered() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    for number in range(520):
        jobs.shows("r", "running", number, job=f"j{number}")
    kept = {name for name, value in jobs.marks.items() if name.startswith("forecast:j") and value}
    assert kept == {f"forecast:j{number}" for number in range(8, 520)}


def test_a_start_that_a_listing_shows_after_a_newer_one_is_no_gap() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    jobs.shows("new", "running", 1000, after_s=0, started_s=900)
    jobs.shows("old", "running", 1000, after_s=0, started_s=300)
    assert '"gaps"' not in jobs.marks["forecast:j"]


def test_nothing_is_learned_of_how_long_a_run_was_seen_that_then_vanished() -> None:
    forecast = Forecast({}, PACE)
    jobs = Jobs(forecast)
    jobs.shows("r", "running", 0)
    jobs.shows("r", "unknown", 500)
    assert '"stays"' not in jobs.marks["forecast:j"]


# In the loop


async def runs(server: Server, count: int) -> list[float]:
    """One job's runs, each of about five minutes; gives when they ended."""
    loop = asyncio.get_running_loop()
    ends = []
    for number in range(count):
        await asyncio.sleep(597 + 2 * (number % 4))
        server.lists(row(f"r{number}", "running", job="j"))
        await asyncio.sleep(303 + 5 * (number % 3))
        server.lists(row(f"r{number}", "succeeded", job="j"))
        ends.append(loop.time())
    await asyncio.sleep(100)
    return ends


def ends_seen_ms(journal: MemoryJournal) -> list[int]:
    return [
        draft.at_ms
        for commit in journal.commits
        for draft in commit.events
        if draft.type.endswith("succeeded")
    ]


@pytest.mark.looptime(start=0)
async def test_a_learned_end_is_seen_sooner_with_fewer_polls() -> None:
    fixed, foreseen = Server(), Server()
    journals = MemoryJournal(), MemoryJournal()
    quick = replace(PACE, interval_s=5)
    slow = replace(PACE, idle_interval_s=20, interval_s=20)
    async with (
        watched(fixed.fetch, journals[0], replace(PLAN, pace=slow)),
        watched(foreseen.fetch, journals[1], replace(PLAN, pace=quick), forecasts=quick),
    ):
        ends, _ = await asyncio.gather(runs(fixed, 12), runs(foreseen, 12))
    late = [
        [
            seen / 1000 - EPOCH_MS / 1000 - end
            for seen, end in zip(ends_seen_ms(each), ends, strict=True)
        ]
        for each in journals
    ]
    learned_s = ends[5]
    polls = [sum(at_s > learned_s for at_s in each.times()) for each in (fixed, foreseen)]
    assert polls[1] < 0.6 * polls[0]
    assert sum(late[1][6:]) < sum(late[0][6:]) / 2
    assert max(late[1][6:]) <= 5


@pytest.mark.looptime(start=0)
async def test_a_row_that_is_held_is_asked_about_after_an_interval() -> None:
    server, journal = Server(), MemoryJournal()
    server.takes_s = 0
    options = PLAN.options.model_copy(update={"asks": True})
    server.lists(row("a", "running"))
    plan = replace(PLAN, pace=PACE, options=options)
    async with watched(server.fetch, journal, plan, forecasts=PACE):
        await asyncio.sleep(12)
        server.answers["/why/a"] = [DOWN, DOWN, {}]
        server.lists(row("a", "failed"))
        await asyncio.sleep(35)
    assert server.times("/why") == [20, 30, 40]


@pytest.mark.looptime(start=0)
async def test_by_a_fixed_schedule_nothing_is_learned() -> None:
    server, journal = Server(), MemoryJournal()
    async with watched(server.fetch, journal):
        await runs(server, 2)
    assert journal.marks == {}


async def test_a_restart_keeps_what_was_learned_and_shows_it_to_no_vendor(tmp_path: Path) -> None:
    waits, path = [], tmp_path / "journal.db"
    async with open_journal(path) as journal:
        ledger = await ledger_of(journal, at_ms=ms(0), forecasts=PACE)
        for number in range(4):
            for state, at_s in (("running", 1000 * number + 1), ("succeeded", 1000 * number + 300)):
                seen = Seen(job=Job("j"), run_id=f"{number}", state=State(state), vendor_state="")
                await ledger.take([seen], Sighting(at_ms=ms(at_s), after_ms=ms(0), contact=False))
    async with open_journal(path) as journal:
        again = await ledger_of(journal, at_ms=ms(3300), forecasts=PACE)
        for each in (ledger, again):
            assert each.marks == {}
            assert each.forecast is not None
            due_s = each.forecast.due_s
            waits.append([due_s(each.index, ms(second)) for second in range(3300, 4100, 10)])
        assert (await ledger_of(journal, at_ms=ms(3300))).marks == {}
    assert waits[0] == waits[1]
    assert {10, 60} <= set(waits[0])
