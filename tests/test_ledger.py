"""The ledger: what is taken is told and written in one step, and reads back the same."""

from __future__ import annotations

from typing import Any

import jsonschema
import msgspec
import pytest
import structlog

from poller.errors import Rejected, Unreachable
from poller.events import JobEvent, schema
from poller.known import Known
from poller.ledger import Ledger, Sighting
from poller.runs import Job, Problem, Seen, State
from poller.telemetry import Metrics
from tests.toy import MemoryJournal, ledger_of

T0 = 1_700_000_000_000
HOUR_MS = 3_600_000


def seen(run_id: str, state: str, **fields: Any) -> Seen:
    return Seen(job=Job("j"), run_id=run_id, state=State(state), vendor_state=state, **fields)


def later(ms: int, *, after_ms: int | None = T0) -> Sighting:
    return Sighting(at_ms=T0 + ms, after_ms=after_ms, contact=False)


@pytest.fixture
def journal() -> MemoryJournal:
    return MemoryJournal()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


async def opened(
    journal: MemoryJournal, metrics: Metrics | None = None, *, at_ms: int = T0, **more: Any
) -> Ledger:
    return await ledger_of(journal, metrics=metrics, at_ms=at_ms, retention_s=3600.0, **more)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"poller_{name}", {"source": "s", **labels})


async def test_a_page_is_one_commit_of_runs_events_and_condition(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running", started_ms=T0), seen("2", "queued")], later(9))
    (commit,) = journal.commits
    assert [run.run_id for run in commit.runs] == ["1", "2"]
    assert [event.sequence for event in commit.events] == [1, 2]
    assert commit.condition is not None
    assert commit.condition.sequence == 2


async def test_rows_that_change_nothing_write_nothing(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running")], later(9))
    await ledger.take([seen("1", "running", progress=0.5, fingerprint=77)], later(10))
    await ledger.take([], later(11))
    assert len(journal.commits) == 1
    assert ledger.index.runs["j", "1"].fingerprint == 77


async def test_a_row_that_only_sets_the_marker_is_written_and_tells_nothing(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running")], later(9))
    await ledger.take([seen("1", "running", marker="7")], later(10))
    assert journal.told() == [("1", "running")]
    assert [run.marker for run in (await journal.load("s")).runs] == ["7"]


async def test_several_rows_of_one_run_are_taken_in_their_order(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    rows = [
        seen("1", "failed", marker="1", ordinal=1, ended_ms=T0 + 3, past=True),
        seen("1", "queued", marker="2", ordinal=2, queued_ms=T0 + 4),
    ]
    await ledger.take(rows, later(9))
    told = [(e.data.state, e.data.run.attempt, e.data.inferred) for e in journal.of("1")]
    assert told == [("failed", 1, True), ("queued", 2, False)]
    assert [run.state for run in (await journal.load("s")).runs] == [State.QUEUED]


async def test_what_the_journal_holds_reads_back_as_what_is_known(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    rows = [
        seen("1", "failed", queued_ms=T0 - 9, problem=Problem("E", "no"), detail={"rows": 3}),
        seen("2", "suspended", substate="blocked", scope="x", marker="3", ordinal=3),
    ]
    await ledger.take(rows, later(9))
    await ledger.good(T0, T0 + 9, contact_done=True)
    ledger.note({"upto": "5"})
    await ledger.save_marks()
    again = await opened(journal, at_ms=T0 + HOUR_MS)
    assert again.index.runs == ledger.index.runs
    assert again.condition == ledger.condition
    assert again.marks == {"upto": "5"}
    assert [run.run_id for run in again.index.active()] == ["2"]
    # A poll that begins now has not shown it; a feed has not been silent about it for long.
    assert [run.run_id for run in again.index.unseen("x", T0 + HOUR_MS)] == ["2"]
    assert again.index.unseen("x", T0 + HOUR_MS - 1) == []


async def test_every_event_validates_against_the_printed_schema(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    rows = [seen("1", "running", started_ms=T0 + 1, detail={"x": None, "y": True, "z": 1.5})]
    await ledger.take(rows, later(9, after_ms=None))
    await ledger.vanished(ledger.index.runs["j", "1"], later(10))
    await ledger.failed(Rejected("no"), T0 + 11)
    await ledger.good(T0 + 12, T0 + 13, contact_done=True)
    validator = jsonschema.Draft202012Validator(schema())
    for event in journal.events():
        validator.validate(msgspec.to_builtins(event))
    assert journal.told() == [("1", "running"), ("1", "unknown"), ("", "down"), ("", "up")]


async def test_a_provisional_run_is_replaced_by_the_real_one_in_one_commit(
    journal: MemoryJournal, metrics: Metrics
) -> None:
    ledger = await opened(journal, metrics)
    await ledger.take([seen("@5", "running")], later(9))
    await ledger.take([seen("77", "running", was="@5")], later(10))
    commit = journal.commits[-1]
    assert (list(commit.dropped), [run.run_id for run in commit.runs]) == ([("j", "@5")], ["77"])
    assert not commit.events
    await ledger.take([seen("77", "failed", was="@5")], later(11))
    assert [event.data.detail for event in journal.of("77")] == [{"provisional_id": "@5"}]
    ledger.count_states()
    assert value(metrics, "runs", state="running") == 0
    assert value(metrics, "runs", state="failed") == 1


async def test_a_provisional_run_that_was_known_by_its_real_id_already_is_dropped(
    journal: MemoryJournal, metrics: Metrics
) -> None:
    ledger = await opened(journal, metrics)
    await ledger.take([seen("@5", "running"), seen("77", "running")], later(9))
    await ledger.take([seen("77", "running", was="@5")], later(10))
    assert list(ledger.index.runs) == [("j", "77")]
    assert [run.run_id for run in (await journal.load("s")).runs] == ["77"]
    assert journal.told() == [("@5", "running"), ("77", "running")]
    ledger.count_states()
    assert value(metrics, "runs", state="running") == 1


async def test_a_run_whose_provisional_id_nobody_has_heard_of_is_a_new_one(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("77", "running", was="@5")], later(9))
    (event,) = journal.of("77")
    assert (event.data.previous, event.data.detail) == (None, {})
    assert not journal.commits[-1].dropped


async def test_known_runs_are_counted_by_state(journal: MemoryJournal, metrics: Metrics) -> None:
    ledger = await opened(journal, metrics)
    rows = [seen("1", "running"), seen("2", "running"), seen("3", "queued")]
    await ledger.take(rows, later(9))
    await ledger.take([seen("1", "succeeded")], later(10))
    await ledger.vanished(ledger.index.runs["j", "3"], later(11))
    for each in (ledger, await opened(journal, metrics)):
        each.count_states()
        counts = {state: value(metrics, "runs", state=state) for state in State}
        assert {state: count for state, count in counts.items() if count} == {
            "running": 1,
            "succeeded": 1,
            "unknown": 1,
        }


async def test_events_and_how_late_they_can_be_are_counted(
    journal: MemoryJournal, metrics: Metrics
) -> None:
    ledger = await opened(journal, metrics)
    await ledger.take([seen("1", "running")], later(0, after_ms=None))
    await ledger.take([seen("1", "succeeded")], later(2500))
    assert value(metrics, "events_total", type="dev.poller.job.succeeded") == 1
    assert value(metrics, "detection_bound_seconds_sum") == 2.5
    assert value(metrics, "detection_bound_seconds_count") == 1


async def test_an_unknown_word_is_warned_of_once(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    with structlog.testing.capture_logs() as logs:
        rows = [seen(str(n), "unknown", unmapped=True) for n in range(3)]
        await ledger.take(rows, later(9))
        for number in range(150):
            row = msgspec.structs.replace(rows[0], vendor_state=f"WORD-{number}")
            await ledger.take([row], later(10))
    assert [log["word"] for log in logs[:2]] == ["unknown", "WORD-0"]
    assert len(logs) == 100
    assert {log["log_level"] for log in logs} == {"warning"}
    first = journal.events()[0]
    assert isinstance(first, JobEvent)
    assert first.data.reason == "unmapped"


async def test_marks_are_taken_at_once_and_written_when_saved(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    ledger.note({"a": "1", "b": "2", "never": ""})
    memory = ledger.memory(T0, whole=False, resync_s=600, rate_per_s=2)
    assert memory.marks == {"a": "1", "b": "2"}
    assert not journal.commits
    await ledger.save()
    assert not journal.marks
    await ledger.save_marks()
    assert journal.marks == {"a": "1", "b": "2"}
    ledger.note({"a": "", "b": "2"})
    await ledger.save_marks()
    await ledger.save_marks()
    assert journal.marks == {"b": "2"}
    assert len(journal.commits) == 2


@pytest.mark.parametrize(
    ("mode", "publish_all"), [("active", False), ("none", False), ("all", True)]
)
async def test_a_vendor_is_shown_the_source_as_it_stands(
    mode: Any, publish_all: bool, journal: MemoryJournal
) -> None:
    ledger = await opened(journal, first_contact=mode)
    await ledger.good(T0 + 5, T0 + 6, contact_done=False)
    memory = ledger.memory(T0 + 2 * HOUR_MS, whole=True, resync_s=600, rate_per_s=2)
    assert (memory.contact_ms, memory.last_good_ms) == (T0, None)
    assert (memory.since_ms, memory.whole) == (T0 + HOUR_MS, True)
    assert memory.publish_all is publish_all
    assert ledger.sighting(T0 + 7) == Sighting(at_ms=T0 + 7, after_ms=None, contact=True)
    await ledger.good(T0 + 8, T0 + 9, contact_done=True)
    memory = ledger.memory(T0 + 9, whole=True, resync_s=600, rate_per_s=2)
    assert memory.last_good_ms == T0 + 8
    assert ledger.sighting(T0 + 9) == Sighting(at_ms=T0 + 9, after_ms=T0 + 8, contact=False)


async def test_first_contact_began_when_the_journal_first_heard_of_the_source(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    await ledger.failed(Unreachable("x"), T0 + 1)
    again = await opened(journal, at_ms=T0 + HOUR_MS)
    assert again.condition.contact_ms == T0


async def test_good_polls_that_change_nothing_share_a_write(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    for ms in range(0, 60_000, 1000):
        await ledger.good(T0 + ms, T0 + ms, contact_done=True)
    assert len(journal.commits) == 6
    await ledger.save()
    await ledger.save()
    assert len(journal.commits) == 7
    assert (await opened(journal)).condition.last_good_ms == T0 + 59_000


async def test_the_end_of_a_row_of_failed_polls_is_written_at_once(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.good(T0, T0, contact_done=True)
    await ledger.failed(Unreachable("x"), T0 + 1)
    assert (await opened(journal)).condition.failures == 1
    await ledger.good(T0 + 2, T0 + 2, contact_done=True)
    assert (await opened(journal)).condition.failures == 0


async def test_since_when_a_source_is_down_and_up(journal: MemoryJournal, metrics: Metrics) -> None:
    ledger = await opened(journal, metrics)
    await ledger.good(T0, T0 + 1, contact_done=True)
    assert (ledger.condition.up, ledger.condition.since_ms) == (True, T0 + 1)
    await ledger.good(T0 + 10, T0 + 11, contact_done=True)
    assert ledger.condition.since_ms == T0 + 1
    assert value(metrics, "source_up") == 1
    assert value(metrics, "source_last_success_timestamp_seconds") == (T0 + 10) / 1000
    for ms in (20, 30, 40, 50):
        await ledger.failed(Unreachable("x"), T0 + ms)
    assert (ledger.condition.up, ledger.condition.since_ms) == (False, T0 + 20)
    assert value(metrics, "source_up") == 0
    assert value(metrics, "poll_failures_total", reason="unreachable") == 4
    await ledger.good(T0 + 60, T0 + 61, contact_done=True)
    assert (ledger.condition.up, ledger.condition.since_ms) == (True, T0 + 61)
    assert ledger.condition.failures == 0


async def test_the_message_of_a_source_event_is_cut(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.failed(Rejected("n" * 100_000), T0)
    (event,) = journal.events()
    assert not isinstance(event, JobEvent)
    assert event.data.message == "n" * 1024


async def test_finished_runs_are_forgotten_in_small_steps(
    journal: MemoryJournal, metrics: Metrics
) -> None:
    ledger = await opened(journal, metrics)
    old = [seen(str(n), "succeeded") for n in range(1100)]
    await ledger.take([*old, seen("active", "running")], later(0))
    await ledger.take([seen("young", "failed")], later(10))
    before = len(journal.commits)
    await ledger.prune(T0 + HOUR_MS + 5)
    assert [len(commit.dropped) for commit in journal.commits[before:]] == [500, 500, 100]
    assert {run.run_id for run in ledger.index.runs.values()} == {"active", "young"}
    assert {run.run_id for run in (await journal.load("s")).runs} == {"active", "young"}
    ledger.count_states()
    assert value(metrics, "runs", state="succeeded") == 0


@pytest.mark.parametrize(
    ("stamps", "kept"),
    [
        ({}, False),
        ({"ended_ms": T0 + 50}, True),
        ({"ended_ms": T0 - 50, "started_ms": T0 + 50}, False),
        ({"started_ms": T0 + 50}, True),
        ({"queued_ms": T0 + 50}, True),
    ],
)
async def test_a_run_is_kept_until_it_is_old_by_its_own_timestamps_too(
    stamps: dict[str, int], kept: bool, journal: MemoryJournal
) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "succeeded", **stamps)], later(0))
    await ledger.prune(T0 + HOUR_MS + 5)
    assert (("j", "1") in ledger.index.runs) is kept


async def test_what_was_shown_before_the_clock_was_set_back_is_old(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running")], later(0))
    await ledger.take([seen("2", "running")], later(500))
    ledger.set_back(T0 + 100)

    def unseen() -> list[Known]:
        return ledger.index.unseen("", T0 + 100)

    assert [run.run_id for run in unseen()] == ["1", "2"]
    ledger.shown([ledger.index.runs["j", "1"]], T0 + 100)
    assert [run.run_id for run in unseen()] == ["2"]


# What people look at


async def test_why_polls_fail_is_kept_over_a_restart_until_one_is_good(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    await ledger.failed(Unreachable("x:1: nothing listens there"), T0)
    again = (await opened(journal)).condition
    assert (again.reason, again.message) == ("unreachable", "x:1: nothing listens there")
    await ledger.good(T0 + 1, T0 + 2, contact_done=True)
    again = (await opened(journal)).condition
    assert (again.reason, again.message) == (None, None)


async def test_an_events_run_is_written_beside_it(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running"), seen("2", "queued")], later(1))
    await ledger.failed(Rejected("no"), T0 + 2)
    drafts = [draft for commit in journal.commits for draft in commit.events]
    assert [(draft.job_id, draft.run_id) for draft in drafts] == [("j", "1"), ("j", "2"), ("", "")]


async def test_progress_is_that_of_the_last_answer_while_the_run_is_watched(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running", progress=0.1), seen("2", "running")], later(1))
    await ledger.take([seen("3", "succeeded", progress=1.0)], later(1))
    assert ledger.progress == {("j", "1"): (0.1, T0 + 1)}
    shown = list(ledger.index.runs.values())
    ledger.shown(shown, T0 + 2, {("j", "1"): 0.4, ("j", "2"): 0.2, ("j", "3"): 1.0, "nobody": 0.5})
    assert ledger.progress == {("j", "1"): (0.4, T0 + 2), ("j", "2"): (0.2, T0 + 2)}
    await ledger.take([seen("1", "failed", progress=0.5)], later(3))
    await ledger.vanished(ledger.index.runs["j", "2"], later(3))
    assert ledger.progress == {}


async def test_a_run_that_gets_its_real_id_begins_with_the_progress_shown_then(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("j@1", "running", progress=0.1)], later(1))
    await ledger.take([seen("7", "running", was="j@1", progress=0.2)], later(2))
    assert ledger.progress == {("j", "7"): (0.2, T0 + 2)}


async def test_how_long_runs_usually_take_is_learnt_and_known_after_a_restart(
    journal: MemoryJournal,
) -> None:
    ledger = await opened(journal)
    for number, took_ms in enumerate((100, 300, 200)):
        assert ledger.usual_ms(Known(job=Job("j"), run_id="x", state=State.RUNNING)) is None
        stamps = {"started_ms": T0, "ended_ms": T0 + took_ms}
        await ledger.take([seen(str(number), "succeeded", **stamps)], later(number))
    for known_by in (ledger, await opened(journal)):
        assert known_by.usual_ms(Known(job=Job("j"), run_id="x", state=State.RUNNING)) == 200


async def test_runs_are_counted_by_state(journal: MemoryJournal) -> None:
    ledger = await opened(journal)
    await ledger.take([seen("1", "running"), seen("2", "running"), seen("3", "failed")], later(0))
    await ledger.take([seen("1", "succeeded")], later(1))
    counts = {state: count for state, count in ledger.states.items() if count}
    assert counts == {State.RUNNING: 1, State.FAILED: 1, State.SUCCEEDED: 1}
