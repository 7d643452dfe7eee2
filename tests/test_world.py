"""A world of fake jobs that lives as real ones do."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import pairwise

import pytest

from poller.runs import ACTIVE, TERMINAL, State
from poller.vendors import BUILT_IN, load
from poller.world import Kind, SimRun, Step, World

BEGAN_MS = 1_000_000
SPAN_MS = 1_800_000
EVERY = Kind(reopens=True, vanishes=True)

LEGAL = {
    State.QUEUED: {State.STARTING, State.RUNNING, State.CANCELED, State.FAILED},
    State.STARTING: {State.RUNNING},
    State.RUNNING: {State.SUSPENDED, State.STOPPING, *TERMINAL},
    State.SUSPENDED: {State.RUNNING},
    State.STOPPING: {State.CANCELED, State.FAILED},
    State.SUCCEEDED: set(),
    State.FAILED: set(),
    State.CANCELED: set(),
}
"""What may follow within one attempt; stepping over what a kind cannot show leads further on."""

KINDS = [
    pytest.param(kind, id=f"{name} {kind.name}") for name in BUILT_IN for kind in load(name).kinds
]


def world_of(*kinds: Kind, seed: int = 1, jobs: int = 10, keep_ms: int = 60_000) -> World:
    return World(kinds=kinds, seed=seed, jobs=jobs, now_ms=BEGAN_MS, keep_ms=keep_ms)


@functools.cache
def lived(*kinds: Kind, seed: int = 1, jobs: int = 10) -> World:
    """A world after half an hour; not to be changed, since several tests look at it."""
    world = world_of(*kinds, seed=seed, jobs=jobs)
    world.advance(BEGAN_MS + SPAN_MS)
    return world


def by_attempt(account: Iterable[Step]) -> dict[tuple[int, int], list[State | None]]:
    lives: dict[tuple[int, int], list[State | None]] = {}
    for step in account:
        lives.setdefault((step.number, step.attempt), []).append(step.state)
    return lives


def started(world: World) -> SimRun:
    return world.start(world.definitions[0])


# Seeds and time


def test_the_same_seed_lives_the_same_life_and_another_seed_another() -> None:
    world = lived(EVERY)
    again = world_of(EVERY)
    again.advance(BEGAN_MS + SPAN_MS)
    assert again.account == world.account
    assert [run.uuid for run in again.runs.values()] == [run.uuid for run in world.runs.values()]
    assert lived(EVERY, seed=2).account != world.account


def test_it_does_not_matter_how_often_one_looks() -> None:
    world = world_of(EVERY)
    for at_ms in range(BEGAN_MS, BEGAN_MS + SPAN_MS, 777):
        world.advance(at_ms)
    world.advance(BEGAN_MS + SPAN_MS)
    assert world.account == lived(EVERY).account


def test_time_never_runs_backwards() -> None:
    world = world_of(EVERY)
    world.advance(BEGAN_MS + 60_000)
    world.advance(5)
    assert world.now_ms == BEGAN_MS + 60_000
    account = lived(EVERY).account
    assert all(before.at_ms <= after.at_ms for before, after in pairwise(account))


def test_a_slower_pace_lives_the_same_life_more_slowly() -> None:
    fast = World(kinds=(EVERY,), jobs=5)
    slow = World(kinds=(EVERY,), jobs=5, pace=10.0)
    fast.advance(60_000)
    slow.advance(600_000)
    assert len(slow.account) == pytest.approx(len(fast.account), rel=0.05)
    assert slow.account[0].at_ms == pytest.approx(10 * fast.account[0].at_ms, rel=0.01)


# Lives


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_that_a_vendor_can_show_comes_about(kind: Kind) -> None:
    shown = {step.state for step in lived(kind).account} - {None}
    # a stream never succeeds by itself
    assert shown == kind.states - ({State.SUCCEEDED} if kind.stream else set())


@pytest.mark.parametrize("kind", [*KINDS, pytest.param(EVERY, id="every state")])
def test_states_follow_each_other_as_in_life(kind: Kind) -> None:
    ways = by_attempt(lived(kind).account)
    assert len(ways) > 50
    for states in ways.values():
        for before, after in pairwise(states):
            assert before is not None
            assert after in LEGAL[before] | ({None} if kind.vanishes else set()), states


@pytest.mark.parametrize("kind", KINDS)
def test_every_transition_is_one(kind: Kind) -> None:
    for states in by_attempt(lived(kind).account).values():
        assert all(before is not after for before, after in pairwise(states))


def test_attempts_are_numbered_one_after_the_other() -> None:
    attempts: dict[int, list[int]] = {}
    for number, attempt in by_attempt(lived(EVERY).account):
        attempts.setdefault(number, []).append(attempt)
    assert max(map(len, attempts.values())) > 2
    assert all(numbers == [*range(1, len(numbers) + 1)] for numbers in attempts.values())


@pytest.mark.parametrize("kind", [Kind(reopens=True), Kind()], ids=["reopens", "does not"])
def test_only_what_failed_is_reopened_and_only_where_that_is_usual(kind: Kind) -> None:
    ways = by_attempt(lived(kind).account)
    before = {ways[number, attempt - 1][-1] for number, attempt in ways if attempt > 1}
    assert before == ({State.FAILED} if kind.reopens else set())


def test_a_stream_is_one_run_of_a_job_that_never_succeeds() -> None:
    world = lived(Kind(stream=True), jobs=6)
    assert sorted(run.definition.number for run in world.runs.values()) == [1, 2, 3, 4, 5, 6]
    assert min(len(run.attempts) for run in world.runs.values()) > 2
    assert State.SUCCEEDED not in {step.state for step in world.account}


def test_active_runs_are_deleted_only_where_that_is_usual() -> None:
    account = lived(Kind(vanishes=True)).account
    assert any(step.state is None for step in account)
    assert not any(step.state is None for step in lived(Kind()).account)


@pytest.mark.parametrize("kind", [*KINDS, pytest.param(EVERY, id="every state")])
def test_a_world_never_dies_out(kind: Kind) -> None:
    account = lived(kind).account
    lately = [step.number for step in account if step.at_ms > BEGAN_MS + SPAN_MS - 120_000]
    assert len(set(lately)) >= 10


def test_finished_runs_are_kept_for_a_while() -> None:
    world = lived(Kind())
    ended = [run.now.changed_ms for run in world.runs.values() if run.now.terminal]
    assert world.now_ms - 60_000 <= min(ended) < world.now_ms - 50_000
    assert len(world.runs) < len({step.number for step in world.account})


def test_instants_are_those_of_the_transitions() -> None:
    world = lived(EVERY)
    account = {(s.number, s.attempt, s.state): s.at_ms for s in world.account}
    assert any(run.now.problem for run in world.runs.values())
    for run in world.runs.values():
        for attempt in run.attempts:
            key = (run.number, attempt.number)
            assert attempt.queued_ms == account[*key, State.QUEUED]
            assert attempt.changed_ms == account[*key, attempt.state]
            assert attempt.ended_ms == (attempt.changed_ms if attempt.terminal else None)
            assert (attempt.problem is not None) == (attempt.state is State.FAILED)
            if attempt.started_ms is not None:
                assert attempt.queued_ms <= attempt.started_ms <= attempt.changed_ms


# Looking and steering


def test_definitions_are_dealt_out_to_the_kinds_in_turn() -> None:
    batch, stream = Kind(name="batch"), Kind(name="stream", stream=True)
    world = lived(batch, stream, jobs=4)
    assert [definition.kind.name for definition in world.definitions] == [
        "stream",
        "batch",
        "stream",
        "batch",
    ]
    names = {run.definition.kind.name for run in world.of("stream")}
    assert names == {"stream"}
    assert len(world.of("stream")) + len(world.of("batch")) == len(world.runs)
    assert len({definition.name for definition in world.definitions}) == 4


def test_active_runs_are_those_that_have_not_ended_oldest_first() -> None:
    world = lived(EVERY)
    active = world.active()
    assert active
    assert [run.number for run in active] == sorted(
        run.number for run in world.runs.values() if run.now.state in ACTIVE
    )


def test_the_latest_run_of_a_definition_is_its_newest() -> None:
    world = World(kinds=(Kind(),), jobs=2)
    first, second = world.definitions
    assert world.latest(first) is None
    world.start(first)
    newest = world.start(first)
    world.start(second)
    assert world.latest(first) is newest


def test_a_test_may_move_a_run_by_hand() -> None:
    world = World(kinds=(Kind(),), jobs=1, now_ms=100)
    run = started(world)
    world.now_ms = 200
    world.move(run, State.RUNNING)
    world.now_ms = 300
    world.move(run, State.FAILED, "out of memory")
    assert (run.now.queued_ms, run.now.started_ms, run.now.ended_ms) == (100, 200, 300)
    assert run.now.problem == "out of memory"
    world.reopen(run)
    assert (run.now.number, run.now.state, run.now.ended_ms) == (2, State.QUEUED, None)
    world.delete(run)
    assert world.runs == {}
    assert [(step.at_ms, step.attempt, step.state) for step in world.account] == [
        (100, 1, State.QUEUED),
        (200, 1, State.RUNNING),
        (300, 1, State.FAILED),
        (300, 2, State.QUEUED),
        (300, 2, None),
    ]


def test_nothing_happens_to_a_run_that_is_gone() -> None:
    world = World(kinds=(Kind(),), jobs=1)
    world.delete(started(world))
    world.advance(50)
    assert [step.state for step in world.account] == [State.QUEUED, None]
    world.advance(60_000)
    assert {step.number for step in world.account} >= {1, 2}


def test_a_stream_that_is_started_again_opens_its_next_attempt() -> None:
    world = World(kinds=(Kind(stream=True),), jobs=1)
    run = started(world)
    assert started(world) is run
    assert [attempt.number for attempt in run.attempts] == [1, 2]


def test_progress_grows_from_nothing_to_all() -> None:
    world = World(kinds=(Kind(),), jobs=1)
    run = started(world)
    assert run.progress(10_000) == 0
    world.move(run, State.RUNNING)
    run.now.length_ms = 1000
    assert [run.progress(at_ms) for at_ms in (0, 500, 5000)] == [0, 0.5, 0.99]
    world.now_ms = 800
    world.move(run, State.FAILED)
    assert run.progress(5000) == 0.8
    world.move(run, State.SUCCEEDED)
    assert run.progress(5000) == 1
