"""The rules of detection, each under its name."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from poller.diff import Observation, diff, vanish
from poller.events import Transition
from poller.known import Known
from poller.runs import ACTIVE, TERMINAL, Job, Problem, Seen, State

CONTACT = 1_000_000
AT = 2_000_000


def seen(state: State | str, **fields: Any) -> Seen:
    state = State(state)
    return Seen(job=Job("j"), run_id="r", state=state, vendor_state=f"V-{state}", **fields)


def later(at_ms: int = AT) -> Observation:
    return Observation(at_ms=at_ms, contact_ms=CONTACT)


def tell(*rows: Seen, at: int = AT) -> tuple[list[Transition], Known]:
    """What a new run's rows tell, each seen a second after the one before."""
    known: Known | None = None
    told: list[Transition] = []
    for number, row in enumerate(rows):
        transitions, known = diff(known, row, later(at + 1000 * number))
        told += transitions
    assert known is not None
    return told, known


def short(transitions: list[Transition]) -> list[tuple[str, int, int, bool]]:
    return [(t.state.value, t.attempt, t.time_ms, t.inferred) for t in transitions]


def states(transitions: list[Transition]) -> list[str]:
    return [t.state.value for t in transitions]


# One per transition


@pytest.mark.parametrize("state", list(State))
def test_a_poll_that_shows_the_same_state_tells_nothing(state: State) -> None:
    _, known = tell(seen(state))
    row = seen(state, progress=0.5, detail={"rows": 1})
    row = msgspec.structs.replace(row, vendor_state="other", substate="overload", queued_ms=AT + 1)
    assert diff(known, row, later(AT + 5)) == ([], known)


@pytest.mark.parametrize("before", list(State))
@pytest.mark.parametrize("after", list(State))
def test_another_state_is_one_event(before: State, after: State) -> None:
    transitions, _ = tell(seen(before), seen(after))
    assert states(transitions) == [before] + [after] * (before != after)


# First contact


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize(
    ("mode", "published"),
    [("active", {*ACTIVE, State.UNKNOWN}), ("all", set(State)), ("none", set())],
)
def test_first_contact_publishes_the_present_state_by_its_mode(
    mode: Any, published: set[State], state: State
) -> None:
    at = Observation(at_ms=AT, first_contact=mode, contact_ms=CONTACT)
    row = seen(state, queued_ms=1, started_ms=2, ended_ms=3 if state in TERMINAL else None)
    transitions, known = diff(None, row, at)
    assert known.state is state
    assert [(t.state, t.snapshot, t.inferred, t.previous) for t in transitions] == [
        (state, True, False, None)
    ] * (state in published)


def test_what_led_to_a_snapshot_is_never_told_later() -> None:
    at = Observation(at_ms=AT, first_contact="none", contact_ms=CONTACT)
    _, known = diff(None, seen("running", queued_ms=1, started_ms=2), at)
    row = seen("succeeded", queued_ms=1, started_ms=2, ended_ms=AT + 9)
    transitions, _ = diff(known, row, later(AT + 10))
    assert short(transitions) == [("succeeded", 1, AT + 9, False)]
    assert transitions[0].previous is not None
    assert transitions[0].previous.state is State.RUNNING


def test_a_run_queued_at_first_contact_may_have_run_since() -> None:
    at = Observation(at_ms=AT, first_contact="active", contact_ms=CONTACT)
    _, known = diff(None, seen("queued", queued_ms=1), at)
    row = seen("succeeded", queued_ms=1, started_ms=AT + 3, ended_ms=AT + 9)
    transitions, _ = diff(known, row, later(AT + 10))
    assert short(transitions) == [
        ("running", 1, AT + 3, True),
        ("succeeded", 1, AT + 9, False),
    ]


def test_a_run_of_unknown_state_at_first_contact_may_have_been_queued_since() -> None:
    at = Observation(at_ms=AT, first_contact="active", contact_ms=CONTACT)
    _, known = diff(None, seen("unknown", unmapped=True), at)
    row = seen("running", queued_ms=AT + 3, started_ms=AT + 5)
    transitions, _ = diff(known, row, later(AT + 10))
    assert short(transitions) == [("queued", 1, AT + 3, True), ("running", 1, AT + 5, False)]


@pytest.mark.parametrize(
    "stamps",
    [
        {"ended_ms": CONTACT},
        {"ended_ms": CONTACT - 1, "started_ms": CONTACT - 5},
        {"started_ms": CONTACT - 5},
    ],
)
def test_a_run_that_ended_before_first_contact_is_no_news_though_a_page_hid_it(
    stamps: dict[str, int],
) -> None:
    transitions, known = tell(seen("failed", **stamps))
    assert transitions == []
    assert known.state is State.FAILED


def test_a_run_that_ended_after_first_contact_is_news() -> None:
    transitions, _ = tell(seen("failed", ended_ms=CONTACT + 1))
    assert short(transitions) == [("failed", 1, CONTACT + 1, False)]


def test_a_finished_run_without_timestamps_is_news() -> None:
    assert states(tell(seen("canceled"))[0]) == ["canceled"]


def test_a_run_past_retention_is_not_told_again() -> None:
    at = Observation(at_ms=AT, contact_ms=0, since_ms=AT - 100)
    assert diff(None, seen("succeeded", ended_ms=AT - 101), at)[0] == []


# Skipped states


@pytest.mark.parametrize(
    ("state", "stamps", "told"),
    [
        ("starting", {"queued_ms": AT - 9}, ["queued", "starting"]),
        ("running", {"queued_ms": AT - 9, "started_ms": AT - 5}, ["queued", "running"]),
        ("running", {"started_ms": AT - 5}, ["running"]),
        ("suspended", {"queued_ms": AT - 9}, ["queued", "suspended"]),
        (
            "suspended",
            {"queued_ms": AT - 9, "started_ms": AT - 5},
            ["queued", "running", "suspended"],
        ),
        ("stopping", {"started_ms": AT - 5}, ["running", "stopping"]),
        (
            "succeeded",
            {"queued_ms": AT - 9, "started_ms": AT - 5, "ended_ms": AT - 1},
            ["queued", "running", "succeeded"],
        ),
        ("failed", {"queued_ms": AT - 9, "ended_ms": AT - 1}, ["queued", "failed"]),
        ("canceled", {"ended_ms": AT - 1}, ["canceled"]),
        ("unknown", {"queued_ms": AT - 9, "started_ms": AT - 5}, ["unknown"]),
        ("queued", {"queued_ms": AT - 9, "started_ms": AT - 5}, ["queued"]),
    ],
)
def test_skipped_states_are_told_first_where_timestamps_prove_them(
    state: str, stamps: dict[str, int], told: list[str]
) -> None:
    transitions, _ = tell(seen(state, **stamps))
    assert states(transitions) == told
    assert [t.inferred for t in transitions] == [True] * (len(told) - 1) + [False]
    for inferred in transitions[:-1]:
        assert (inferred.vendor_state, inferred.substate) == (None, None)


def test_what_was_told_is_not_reconstructed() -> None:
    stamps = {"queued_ms": AT - 9, "started_ms": AT - 5}
    transitions, _ = tell(
        seen("queued", **stamps), seen("running", **stamps), seen("failed", **stamps)
    )
    assert states(transitions) == ["queued", "running", "failed"]


def test_queued_is_not_told_after_a_later_state() -> None:
    transitions, _ = tell(seen("starting"), seen("running", queued_ms=AT - 9))
    assert states(transitions) == ["starting", "running"]


def test_a_run_suspended_before_it_ran_may_have_run_since() -> None:
    transitions, _ = tell(seen("suspended"), seen("succeeded", started_ms=AT + 500))
    assert short(transitions)[1] == ("running", 1, AT + 500, True)


def test_each_previous_names_the_event_before() -> None:
    transitions, _ = tell(seen("succeeded", queued_ms=AT - 9, started_ms=AT - 5, ended_ms=AT))
    assert [t.previous and t.previous.state.value for t in transitions] == [
        None,
        "queued",
        "running",
    ]
    assert transitions[1].previous is not None
    assert transitions[1].previous.vendor_state is None


# Attempts


@pytest.mark.parametrize("end", sorted(TERMINAL))
@pytest.mark.parametrize("again", sorted(ACTIVE))
def test_a_terminal_run_seen_active_again_opens_the_next_attempt(end: State, again: State) -> None:
    transitions, _ = tell(seen("running"), seen(end), seen(again))
    last = transitions[-1]
    assert (last.state, last.attempt) == (again, 2)
    assert last.previous is not None
    assert (last.previous.state, last.previous.attempt) == (end, 1)


def test_a_remembered_run_seen_active_again_opens_the_next_attempt() -> None:
    at = Observation(at_ms=AT, first_contact="active", contact_ms=CONTACT)
    _, known = diff(None, seen("failed", ended_ms=500), at)
    transitions, _ = diff(known, seen("running", started_ms=400), later(AT + 1))
    assert short(transitions) == [("running", 2, AT + 1, False)]
    assert transitions[0].previous is not None
    assert transitions[0].previous.state is State.FAILED


def test_a_changed_marker_closes_an_unfinished_attempt_at_its_own_time() -> None:
    first = seen("running", marker="1", queued_ms=AT - 9, started_ms=AT - 8)
    second = seen("running", marker="2", queued_ms=AT + 100, started_ms=AT + 200)
    transitions, _ = tell(first, second)
    assert short(transitions)[2:] == [
        ("unknown", 1, AT + 100, False),
        ("queued", 2, AT + 100, True),
        ("running", 2, AT + 200, False),
    ]
    assert [t.reason for t in transitions[2:]] == ["superseded", None, None]


def test_a_changed_marker_after_an_end_closes_nothing() -> None:
    transitions, _ = tell(seen("failed", marker="1"), seen("queued", marker="2"))
    assert [(t.state.value, t.attempt) for t in transitions] == [("failed", 1), ("queued", 2)]


def test_a_marker_set_for_the_first_time_is_no_new_attempt() -> None:
    transitions, known = tell(seen("starting"), seen("starting", marker="7"))
    assert states(transitions) == ["starting"]
    assert known.marker == "7"


def test_a_row_without_marker_stays_in_its_attempt() -> None:
    transitions, known = tell(seen("running", marker="7"), seen("canceled"))
    assert [(t.state.value, t.attempt) for t in transitions] == [("running", 1), ("canceled", 1)]
    assert known.marker == "7"


def test_earlier_attempts_are_told_from_the_vendors_history() -> None:
    first = seen("running", marker="1", ordinal=1, started_ms=AT - 8)
    history = [
        seen("failed", marker="1", ordinal=1, ended_ms=AT + 10, past=True,
             problem=Problem("E", "no memory")),
        seen("failed", marker="2", ordinal=2, queued_ms=AT + 20, started_ms=AT + 30,
             ended_ms=AT + 40, past=True),
        seen("queued", marker="3", ordinal=3, queued_ms=AT + 50),
    ]  # fmt: skip
    transitions, _ = tell(first, *history)
    assert short(transitions)[1:] == [
        ("failed", 1, AT + 10, True),
        ("queued", 2, AT + 20, True),
        ("running", 2, AT + 30, True),
        ("failed", 2, AT + 40, True),
        ("queued", 3, AT + 50, False),
    ]
    assert transitions[1].problem == Problem("E", "no memory")
    assert transitions[1].vendor_state == "V-failed"


def test_the_attempt_is_the_larger_of_the_vendors_count_and_ours() -> None:
    transitions, known = tell(seen("queued", marker="4", ordinal=4))
    assert known.attempt == 4
    _, known = tell(seen("canceled"), seen("queued"), seen("queued", marker="1", ordinal=1))
    assert known.attempt == 2
    transitions, known = diff(known, seen("queued", marker="2", ordinal=2), later(AT + 9000))
    assert [(t.state.value, t.attempt) for t in transitions] == [("unknown", 2), ("queued", 3)]


def test_a_run_counted_for_the_first_time_stays_in_its_attempt() -> None:
    transitions, known = tell(seen("queued"), seen("running", marker="1", ordinal=1))
    assert [(t.state.value, t.attempt) for t in transitions] == [("queued", 1), ("running", 1)]
    assert known.marker == "1"


def test_history_missed_before_the_first_count_is_told() -> None:
    transitions, _ = tell(
        seen("queued"),
        seen("failed", marker="1", ordinal=1, ended_ms=AT + 500, past=True),
        seen("running", marker="2", ordinal=2),
    )
    assert [(t.state.value, t.attempt) for t in transitions] == [
        ("queued", 1),
        ("failed", 1),
        ("running", 2),
    ]


def test_an_answer_about_an_earlier_attempt_is_stale() -> None:
    _, known = tell(seen("running", marker="2", ordinal=2))
    assert diff(known, seen("failed", marker="1", ordinal=1), later(AT + 1)) == ([], known)


def test_history_of_an_end_already_told_is_stale() -> None:
    _, known = tell(seen("canceled", marker="1", ordinal=1))
    row = seen("failed", marker="1", ordinal=1, past=True)
    assert diff(known, row, later(AT + 1)) == ([], known)


def test_another_terminal_state_is_one_more_event_of_the_attempt() -> None:
    transitions, _ = tell(
        seen("failed", started_ms=AT - 9, ended_ms=AT), seen("canceled", started_ms=AT + 5)
    )
    assert [(t.state.value, t.attempt) for t in transitions] == [
        ("running", 1),
        ("failed", 1),
        ("canceled", 1),
    ]


def test_unknown_ends_nothing() -> None:
    transitions, _ = tell(seen("running"), seen("unknown", unmapped=True), seen("running"))
    assert [(t.state.value, t.attempt, t.reason) for t in transitions] == [
        ("running", 1, None),
        ("unknown", 1, "unmapped"),
        ("running", 1, None),
    ]


def test_a_run_that_ended_and_became_unknown_opens_the_next_attempt_when_active() -> None:
    transitions, _ = tell(seen("failed"), seen("unknown"), seen("running"))
    assert [(t.state.value, t.attempt) for t in transitions][-1] == ("running", 2)


def test_an_attempt_that_is_unknown_already_is_not_closed_again() -> None:
    transitions, _ = tell(seen("unknown", marker="1"), seen("running", marker="2"))
    assert [(t.state.value, t.attempt) for t in transitions] == [("unknown", 1), ("running", 2)]


def test_old_timestamps_prove_nothing_in_a_resumed_attempt() -> None:
    stamps = {"queued_ms": AT - 9, "started_ms": AT - 5}
    transitions, _ = tell(
        seen("failed", ended_ms=AT - 1, **stamps), seen("succeeded", **stamps), seen("running")
    )
    assert states(transitions)[-1] == "running"
    _, known = tell(seen("failed", ended_ms=AT - 1, **stamps))
    resumed, _ = diff(known, seen("suspended", **stamps), later(AT + 5))
    assert short(resumed) == [("suspended", 2, AT + 5, False)]


# Disappearance


def test_a_vanished_run_is_unknown_and_told_again_when_it_reappears() -> None:
    _, known = tell(seen("running", started_ms=AT - 5))
    gone, known = vanish(known, later(AT + 10))
    assert [(t.state.value, t.reason, t.time_ms) for t in gone] == [
        ("unknown", "vanished", AT + 10)
    ]
    assert not known.watched
    back, known = diff(known, seen("running", started_ms=AT - 5), later(AT + 20))
    assert short(back) == [("running", 1, AT + 20, False)]
    assert known.watched


def test_a_vanished_run_that_reappears_with_an_unknown_word_is_told() -> None:
    _, known = tell(seen("running"))
    _, known = vanish(known, later(AT + 10))
    back, _ = diff(known, seen("unknown", unmapped=True), later(AT + 20))
    assert [t.reason for t in back] == ["unmapped"]


# Provisional runs


def test_a_provisional_id_is_named_in_the_next_event() -> None:
    _, known = tell(seen("running"))
    known = msgspec.structs.replace(known, was="j@5")
    transitions, known = diff(known, seen("succeeded", detail={"rows": 1}), later(AT + 5))
    assert transitions[0].detail == {"rows": 1, "provisional_id": "j@5"}
    assert known.was is None
    gone, _ = vanish(msgspec.structs.replace(known, was="j@5"), later(AT + 9))
    assert gone[0].detail == {"provisional_id": "j@5"}


# Time


@pytest.mark.parametrize(
    ("state", "field"),
    [
        ("queued", "queued_ms"),
        ("running", "started_ms"),
        ("succeeded", "ended_ms"),
        ("failed", "ended_ms"),
        ("canceled", "ended_ms"),
        ("suspended", "state_ms"),
    ],
)
def test_the_time_is_the_vendors_own_of_that_state(state: str, field: str) -> None:
    told, _ = tell(seen(state, **{field: AT - 7}))
    assert (told[-1].time_ms, told[-1].by_vendor) == (AT - 7, True)


@pytest.mark.parametrize("stamp", [None, AT + 1])
def test_the_time_is_the_observation_without_a_timestamp_or_with_one_in_the_future(
    stamp: int | None,
) -> None:
    told, _ = tell(seen("running", started_ms=stamp))
    assert (told[0].time_ms, told[0].by_vendor) == (AT, False)


def test_a_timestamp_before_the_last_event_is_not_believed() -> None:
    transitions, _ = tell(seen("running", started_ms=AT - 5), seen("succeeded", ended_ms=AT - 6))
    assert (transitions[1].time_ms, transitions[1].by_vendor) == (AT + 1000, False)


def test_time_goes_on_though_our_clock_was_set_back() -> None:
    _, known = tell(seen("running"))
    transitions, _ = diff(known, seen("suspended"), later(AT - 500))
    assert transitions[0].time_ms == AT + 1
    closed, _ = vanish(known, later(AT - 500))
    assert closed[0].time_ms == AT
