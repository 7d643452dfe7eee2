"""The index of known runs: what stands where, and what it costs to find it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.known import Durations, Index, Known, Memory, key_of
from poller.runs import TERMINAL, Job, State


def run_of(run_id: str, state: State = State.RUNNING, *, job_id: str = "j", **fields: Any) -> Known:
    return Known(job=Job(job_id), run_id=run_id, state=state, **fields)


def ids(runs: list[Known]) -> list[str]:
    return [run.run_id for run in runs]


def unseen(index: Index, before_ms: int, scope: str = "") -> list[str]:
    return ids(index.unseen(scope, before_ms))


class Counted(int):
    """A time that counts how often times like it are compared."""

    compared = 0

    def __ge__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) >= other


# Keys


def test_a_key_is_one_text_where_job_and_run_are_the_same() -> None:
    assert key_of("a", "a") == "a"
    assert key_of("a", "b") == ("a", "b")
    assert run_of("b", job_id="a").key == ("a", "b")


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("vanished", [False, True])
def test_a_run_is_watched_until_it_has_ended_or_vanished(state: State, vanished: bool) -> None:
    watched = run_of("r", state, vanished=vanished).watched
    assert watched is (state not in TERMINAL and not vanished)


# The index


def test_runs_are_found_by_their_keys() -> None:
    runs = [run_of("a"), run_of("b", State.FAILED), run_of("c", job_id="c")]
    index = Index(runs, at_ms=7)
    assert list(index.runs) == [("j", "a"), ("j", "b"), "c"]
    assert list(index.active()) == [runs[0], runs[2]]
    assert index.watched == {"": {("j", "a"): 7, "c": 7}}


def test_what_was_not_shown_for_longest_stands_in_front() -> None:
    index = Index([run_of(name) for name in "abcd"], at_ms=1)
    index.shown([index.runs["j", "b"]], 2)
    index.put(run_of("a", State.SUSPENDED), 3)
    assert unseen(index, 2) == ["c", "d"]
    assert unseen(index, 3) == ["c", "d", "b"]
    assert unseen(index, 4) == ["c", "d", "b", "a"]
    assert unseen(index, 1) == []


def test_a_run_that_ended_or_vanished_is_missed_no_more() -> None:
    index = Index([run_of("a"), run_of("b"), run_of("c")], at_ms=1)
    index.put(run_of("a", State.SUCCEEDED), 2)
    index.put(run_of("b", State.UNKNOWN, vanished=True), 2)
    index.shown([index.runs["j", "a"]], 3)
    assert unseen(index, 9) == ["c"]
    assert set(index.runs) == {("j", "a"), ("j", "b"), ("j", "c")}


def test_a_run_that_is_back_is_watched_again() -> None:
    index = Index([run_of("a", State.FAILED)], at_ms=1)
    assert list(index.active()) == []
    index.put(run_of("a"), 2)
    assert unseen(index, 3) == ["a"]


def test_a_run_that_has_changed_listings_is_missed_in_the_new_one_only() -> None:
    index = Index([run_of("a", scope="batch"), run_of("b", scope="batch")], at_ms=1)
    index.put(run_of("a", scope="real_time"), 2)
    assert unseen(index, 9, "batch") == ["b"]
    assert unseen(index, 9, "real_time") == ["a"]
    assert unseen(index, 9, "nowhere") == []


def test_a_run_that_no_listing_holds_is_not_shown() -> None:
    index = Index()
    index.shown([run_of("a")], 5)
    assert unseen(index, 9) == []
    index.put(run_of("b"), 1)
    index.shown([run_of("a")], 5)
    assert unseen(index, 9) == ["b"]


def test_what_retention_has_ended_is_forgotten() -> None:
    index = Index([run_of("a"), run_of("b")], at_ms=1)
    index.drop(("j", "a"))
    index.drop(("j", "never known"))
    assert list(index.runs) == [("j", "b")]
    assert unseen(index, 9) == ["b"]


# Provisional runs


def test_a_provisional_run_becomes_the_real_one() -> None:
    index = Index([run_of("17@5", told=3), run_of("other")], at_ms=1)
    real = index.rename("j", "17@5", "900")
    assert real == run_of("900", told=3, was="17@5")
    assert set(index.runs) == {("j", "900"), ("j", "other")}
    assert index.rename("j", "17@5", "900") is None


def test_the_row_that_names_a_provisional_run_shows_it() -> None:
    index = Index([run_of("17@5")], at_ms=1)
    index.put(run_of("b"), 4)
    index.rename("j", "17@5", "900")
    index.put(run_of("c"), 6)
    assert unseen(index, 4) == []
    assert unseen(index, 5) == ["b", "900"]


@pytest.mark.parametrize("state", [State.RUNNING, State.SUCCEEDED])
def test_a_provisional_run_may_be_alone_or_ended(state: State) -> None:
    index = Index([run_of("17@5", state)], at_ms=1)
    index.rename("j", "17@5", "900")
    assert index.runs["j", "900"].state is state
    assert unseen(index, 9) == ["900"] * (state is State.RUNNING)


# Laws and cost

NAMES = st.sampled_from("abcde")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "end", "shown", "drop", "rename"]),
        NAMES,
        st.sampled_from(["", "x"]),
        st.integers(0, 3),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_happens_every_watched_run_stands_once_and_oldest_first(
    steps: list[tuple[str, str, str, int]],
) -> None:
    index = Index()
    now_ms = 0
    for what, name, scope, later_ms in steps:
        now_ms += later_ms
        match what:
            case "put":
                index.put(run_of(name, scope=scope), now_ms)
            case "end":
                index.put(run_of(name, State.FAILED, scope=scope), now_ms)
            case "shown":
                index.shown([index.runs.get(("j", name), run_of(name))], now_ms)
            case "drop":
                index.drop(("j", name))
            case "rename" if ("j", name.upper()) not in index.runs:
                index.rename("j", name, name.upper())
            case _:
                pass
    watched = [key for scope in index.watched.values() for key in scope]
    assert sorted(watched) == sorted(key for key, run in index.runs.items() if run.watched)
    assert all(index.runs[key].scope == name for name, s in index.watched.items() for key in s)
    assert all(list(scope.values()) == sorted(scope.values()) for scope in index.watched.values())
    assert all(run.key == key for key, run in index.runs.items())


def test_finding_what_is_missing_costs_what_is_missing() -> None:
    index = Index([run_of(f"{number}") for number in range(1000)], at_ms=Counted(1))
    for number in range(997):
        index.shown([index.runs["j", f"{number}"]], Counted(2))
    Counted.compared = 0
    assert unseen(index, 2) == ["997", "998", "999"]
    assert Counted.compared == 4


# The view of a vendor


def test_a_memory_shows_what_the_index_holds() -> None:
    run, ended = run_of("a"), run_of("b", State.FAILED)
    memory = Memory(now_ms=5, contact_ms=1, index=Index([run, ended], at_ms=1))
    assert memory.get("j", "a") is run
    assert memory.get("j", "z") is None
    assert list(memory.active()) == [run]


def test_what_is_known_of_a_run_survives_json() -> None:
    run = run_of("a", told=7, marker="2", was="x@1", floor_ms=3, changed_ms=9)
    assert msgspec.json.decode(msgspec.json.encode(run), type=Known) == run


# How long runs take


def finished(number: int, took_ms: int, **fields: Any) -> Known:
    run = Known(job=Job("j"), run_id=str(number), state=State.SUCCEEDED)
    times = {"started_ms": number * 1000, "ended_ms": number * 1000 + took_ms}
    return msgspec.structs.replace(run, **(times | fields))


ANY = Known(job=Job("j"), run_id="x", state=State.RUNNING)


def test_the_usual_duration_is_the_median_of_the_nine_that_ended_last() -> None:
    runs = [finished(number, 10 * number) for number in range(1, 21)]
    for order in (runs, runs[::-1]):
        assert Durations(order).usual_ms(ANY) == 160


@pytest.mark.parametrize(
    "fields",
    [
        {"state": State.FAILED},
        {"state": State.RUNNING},
        {"started_ms": None},
        {"ended_ms": None},
        {"job": Job("other")},
    ],
)
def test_only_runs_of_the_job_that_succeeded_tell_how_long_it_takes(fields: dict[str, Any]) -> None:
    durations = Durations([finished(number, 10) for number in range(1, 3)])
    durations.note(finished(3, 30, **fields))
    assert durations.usual_ms(ANY) is None
    durations.note(finished(4, 20))
    assert durations.usual_ms(ANY) == 10


def test_jobs_that_run_once_are_alike_if_they_have_the_same_name_and_group() -> None:
    runs = [
        finished(number, took_ms, job=Job(str(number), name, group))
        for number, took_ms, name, group in [
            (1, 10, "build", "a"),
            (2, 20, "build", "a"),
            (3, 30, "build", "a"),
            (4, 99, "build", "b"),
            (5, 99, None, "a"),
        ]
    ]
    durations = Durations(runs)
    assert durations.usual_ms(finished(9, 0, job=Job("9", "build", "a"))) == 20
    assert durations.usual_ms(finished(9, 0, job=Job("9", "build", "b"))) is None
    assert durations.usual_ms(finished(9, 0, job=Job("9", None, "a"))) is None


def test_a_clock_that_runs_backwards_makes_no_negative_duration() -> None:
    assert Durations([finished(number, -500) for number in (1, 2, 3)]).usual_ms(ANY) == 0


def test_of_very_many_jobs_those_that_have_not_run_for_long_are_forgotten() -> None:
    durations = Durations(finished(number, 10) for number in (1, 2, 3))
    for number in range(10_000):
        durations.note(finished(number, 10, job=Job(f"other {number}")))
    assert durations.usual_ms(ANY) is None


def test_a_run_is_in_its_state_since_it_was_told_so() -> None:
    run = Known(job=Job("j"), run_id="1", state=State.RUNNING, changed_ms=7)
    assert run.since_ms == 7
    assert msgspec.structs.replace(run, last_ms=5).since_ms == 5
