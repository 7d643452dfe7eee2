"""Laws of the whole chain: what is published of any history, however it is polled, is true.

A simulated world is watched through each vendor's own API by the real loop, in simulated time,
with faults, restarts and crashes. Then the published account is held against the world's own.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from random import Random
from typing import Any, Literal

import looptime
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from poller import vendors
from poller.asking import Asker, Plan
from poller.errors import Unreachable
from poller.events import JobData, JobEvent
from poller.known import Commit
from poller.ledger import Ledger
from poller.payload import iso_ms
from poller.runs import Ms, State
from poller.schedule import Pace
from poller.telemetry import Metrics
from poller.visit import Visitor
from poller.wire import Request, Response, Vendor
from poller.world import Kind, SimRun, World
from tests import toy
from tests.accounts import Account, Stay, Truth, flaws, untold_ends
from tests.toy import EPOCH_MS, MemoryJournal, ToyOptions, now_ms, watched

SHORT = settings(
    derandomize=True,
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # to shrink a history takes minutes
)
EVERY = partial(looptime.new_event_loop, noop_cycles=1)

OPTIONS: dict[str, dict[str, Any]] = {
    "cdm": {"project_id": "p", "cluster_id": "c"},
    "dataarts": {"project_id": "p"},
    "datameer": {"sweep_interval": "2s"},
    "kylin": {},
    "scale": {},
}


# A vendor without peculiarities: a list of what is active, and every run by its id.


def _rows(world: World, request: Request) -> Response:
    _, kind, name, *_ = request.path.split("/")
    if kind == "list":
        return _json(*map(_row, world.active()))
    run = world.runs.get(int(name))
    return Response(status=404) if run is None else _json(_row(run, problem=kind == "why"))


def _row(run: SimRun, *, problem: bool = False) -> toy.Row:
    now = run.now
    row = toy.row(str(run.number), now.state, marker=str(now.queued_ms), queued_ms=now.queued_ms)
    row |= {"started_ms": now.started_ms, "ended_ms": now.ended_ms}
    return row | ({"why": now.problem} if problem else {})


def _json(*rows: toy.Row) -> Response:
    return Response(status=200, body=msgspec.json.encode({"rows": rows}))


PLAIN = replace(
    toy.VENDOR, render=_rows, kinds=(Kind(reopens=True, vanishes=True), Kind(vanishes=True))
)


def vendor_of(name: str) -> tuple[Vendor, Any]:
    """A vendor and its options, by name; `plain` is the one above."""
    if name == "plain":
        return PLAIN, ToyOptions(asks=True)
    vendor = vendors.load(name)
    return vendor, vendor.options.model_validate(OPTIONS[name])


# What happens to a source while it is watched


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong with a share of the requests for a while."""

    from_s: float
    for_s: float
    kind: Literal["lost", "500", "429", "401", "html", "torn"]
    share: float
    by_id: bool


@dataclass(frozen=True, slots=True)
class Script:
    """A history of a source and of its watching, to be played again and again alike."""

    seed: int
    interval_s: float
    steps: tuple[tuple[str, float], ...]
    faults: tuple[Fault, ...]


def seconds(least: float, most: float) -> st.SearchStrategy[float]:
    """Times of whole milliseconds."""
    return st.integers(int(least * 1000), int(most * 1000)).map(lambda ms: ms / 1000)


def scripts(steps: tuple[str, ...], by_id: tuple[bool, ...]) -> st.SearchStrategy[Script]:
    """Scripts of these steps, with faults of listings, or of questions by id too."""
    faults = st.builds(
        Fault,
        seconds(0, 60),
        seconds(0.5, 15),
        st.sampled_from(("lost", "500", "429", "401", "html", "torn")),
        st.sampled_from((1.0, 0.3)),
        st.sampled_from(by_id),
    )
    stages = st.tuples(st.sampled_from(steps), seconds(0.2, 15))
    return st.builds(
        Script,
        st.integers(0, 10_000),
        seconds(0.4, 4),
        st.lists(stages, min_size=3, max_size=8).map(tuple),
        st.lists(faults, max_size=3).map(tuple),
    )


ANY = scripts(("go", "poke", "restart", "crash"), (False, True))
CALM = scripts(("go", "poke"), (False,))
"""The daemon runs through, and no question by id goes wrong."""


class MortalJournal(MemoryJournal):
    """What is committed after its death is lost, as after a kill -9; a new daemon revives it."""

    dies_in: int | None = None

    async def commit(self, commit: Commit) -> None:
        if self.dies_in is not None:
            self.dies_in -= 1
            if self.dies_in < 0:
                return
        await super().commit(commit)


@dataclass(slots=True)
class Play:
    """A script being played at a vendor's."""

    vendor: Vendor
    options: Any
    script: Script
    world: World
    journal: MortalJournal = field(default_factory=MortalJournal)
    ledger: Ledger | None = None
    lasts: bool = True
    contact_ms: float = inf
    good_ms: list[Ms] = field(default_factory=list)
    runs: dict[int, SimRun] = field(default_factory=dict)
    chance: Random = field(default_factory=lambda: Random(1))

    async def fetch(self, request: Request) -> Response:
        """The vendor's answer, or what goes wrong instead."""
        at_ms = now_ms()
        self._note(at_ms)
        if self.lasts:
            self.world.advance(at_ms)
            self.runs |= self.world.runs
        answer = self.vendor.render(self.world, request)
        second = (at_ms - EPOCH_MS) / 1000
        for fault in self.script.faults if self.lasts else ():
            hit = fault.from_s <= second < fault.from_s + fault.for_s
            if hit and fault.by_id >= request.by_id and self.chance.random() < fault.share:
                return _spoiled(fault.kind, answer)
        return answer

    async def run(self) -> None:
        """Play it to the end; then the world stands still, and what is left is found out."""
        pace = Pace(
            interval_s=self.script.interval_s,
            idle_interval_s=self.script.interval_s,
            retry_refused_s=5.0,
        )
        plan = Plan(
            source="s",
            vendor=self.vendor,
            options=self.options,
            pace=pace,
            concurrency=8,
            rate_per_s=50.0,
            resync_s=5.0,
            vanish_after=3,
            timeout_s=10.0,
        )
        steps = iter(self.script.steps)
        while self.lasts:
            await self._watch(plan, steps)

    async def _watch(self, plan: Plan, steps: Iterator[tuple[str, float]]) -> None:
        """Watch until the next restart, or to the end."""
        random = Random(self.script.seed)
        async with watched(self.fetch, self.journal, plan, random=random) as watch:
            self.ledger = watch.ledger
            for step, for_s in steps:
                if step == "crash":
                    self.journal.dies_in = self.chance.randrange(12)
                await asyncio.sleep(for_s)
                if step == "poke":
                    watch.poke.set()
                elif step != "go":
                    break
            else:
                self.lasts = False
                for _ in range(10):
                    watch.poke.set()
                    await asyncio.sleep(1.1)
        self.journal.dies_in = self.ledger = None
        await asyncio.sleep(self.chance.uniform(0, 5))

    def _note(self, at_ms: Ms) -> None:
        """Note the last good poll, and by when first contact was over."""
        condition = self.ledger.condition if self.ledger else None
        if condition and condition.contact_done and self.journal.dies_in is None:
            self.contact_ms = min(self.contact_ms, at_ms)
            self.good_ms.append(condition.last_good_ms or 0)


def _spoiled(kind: str, answer: Response) -> Response:
    match kind:
        case "lost":
            raise Unreachable("no whole answer")
        case "429":
            return Response(status=429, headers={"retry-after": "2"})
        case "html":
            return Response(status=200, body=b"<html><h1>Please log in</h1></html>")
        case "torn":
            return Response(status=200, body=answer.body[: len(answer.body) // 2])
        case _:
            return Response(status=int(kind))


def play(name: str, script: Script) -> Play:
    """Play a script at a vendor's, in simulated time."""
    vendor, options = vendor_of(name)
    world = World(kinds=vendor.kinds, seed=script.seed, jobs=6, now_ms=EPOCH_MS - 30_000, pace=0.5)
    world.advance(EPOCH_MS)
    played = Play(vendor, options, script, world)
    with asyncio.Runner(loop_factory=EVERY) as runner:
        runner.run(played.run())
    return played


# The published account against the true one


def truth_of(name: str, played: Play) -> Truth:
    return Truth(
        vendor=name,
        world=played.world,
        runs=played.runs,
        contact_ms=played.contact_ms,
        history=name != "plain",
        given_up=any(fault.by_id for fault in played.script.faults),
    )


def check_bounds(accounts: dict[int, Account], stays: dict[int, list[Stay]]) -> None:
    """What was seen to happen did so between the two polls that an event names."""
    for number, account in accounts.items():
        for data in (event.data for event in account):
            after_ms, at_ms = iso_ms(data.observed_after), iso_ms(data.observed_at) or 0
            if after_ms is not None and not data.inferred and data.state is not State.UNKNOWN:
                assert any(
                    stay.state is data.state and after_ms <= stay.from_ms <= at_ms
                    for stay in stays[number]
                ), (data, stays[number])


@pytest.mark.parametrize("name", ["plain", *vendors.BUILT_IN])
@SHORT
@given(script=ANY)
def test_what_is_published_is_a_true_account(name: str, script: Script) -> None:
    played = play(name, script)
    assert not list(flaws(played.journal.events(), truth_of(name, played)))


@pytest.mark.parametrize("name", ["plain", *vendors.BUILT_IN])
@SHORT
@given(script=CALM)
def test_every_end_that_a_good_poll_could_see_is_told_and_only_what_was_deleted_vanishes(
    name: str, script: Script
) -> None:
    played = play(name, script)
    truth = truth_of(name, played)
    accounts, stays = truth.accounts(played.journal.events()), truth.stays()
    for number, account in accounts.items():
        vanished = any(event.data.reason == "vanished" for event in account)
        assert not vanished or stays[number][-1].state is None
    if name in ("dataarts", "kylin", "scale"):  # the others' lists do not show everything
        assert not list(untold_ends(accounts, truth, played.good_ms, all_told=name == "scale"))
        check_bounds(accounts, stays)


# A restart is a diff


async def polled(
    name: str, seed: int, pauses_s: list[float], restarts: frozenset[int]
) -> dict[str, list[JobData]]:
    """What polls with these pauses between them tell of each run, with restarts before some."""
    vendor, options = vendor_of(name)
    world = World(kinds=vendor.kinds, seed=seed, jobs=6, now_ms=EPOCH_MS - 30_000, pace=0.5)
    plan = replace(toy.PLAN, vendor=vendor, options=options, rate_per_s=1e6)
    journal = MemoryJournal()

    async def fetch(request: Request) -> Response:
        world.advance(now_ms())
        return vendor.render(world, request)

    watching: tuple[Ledger, Visitor] | None = None
    for number, pause_s in enumerate(pauses_s):
        if watching is None or number in restarts:
            ledger = await toy.ledger_of(journal, plan)
            watching = ledger, Visitor(plan, ledger, Asker(plan, fetch, now_ms), Metrics(), now_ms)
        ledger, visitor = watching
        await visitor.poll()
        await ledger.save()
        await asyncio.sleep(pause_s)
    told: dict[str, list[JobData]] = defaultdict(list)
    for event in journal.events():
        assert isinstance(event, JobEvent)
        told[event.subject].append(event.data)
    return told


@pytest.mark.parametrize("name", ["plain", *vendors.BUILT_IN])
@SHORT
@given(
    seed=st.integers(0, 10_000),
    pauses_s=st.lists(seconds(0.3, 6), min_size=4, max_size=12),
    data=st.data(),
)
def test_a_restart_at_any_point_changes_nothing(
    name: str, seed: int, pauses_s: list[float], data: st.DataObject
) -> None:
    points = st.frozensets(st.integers(1, len(pauses_s) - 1), min_size=1)
    restarts = data.draw(points, label="restarts before polls")
    with asyncio.Runner(loop_factory=EVERY) as runner:
        through = runner.run(polled(name, seed, pauses_s, frozenset()))
    with asyncio.Runner(loop_factory=EVERY) as runner:
        assert runner.run(polled(name, seed, pauses_s, restarts)) == through
