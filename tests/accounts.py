"""The published account of a simulated world, held against its true one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf
from typing import Literal, NamedTuple

from poller.events import JobData, JobEvent, Previous, SourceEvent
from poller.payload import iso_ms
from poller.runs import TERMINAL, Ms, State
from poller.world import SimRun, Step, World

Account = list[JobEvent]


class Flaw(NamedTuple):
    """Something wrong with what was published, and where."""

    kind: Literal["lost", "repeated", "out of order", "untrue", "falsely ended"]
    what: str


@dataclass(frozen=True, slots=True)
class Stay:
    """A run was in a state (None: deleted) from a time on until another."""

    attempt: int
    state: State | None
    from_ms: Ms
    until_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What truly was, and how well the vendor tells it.

    Attributes:
        runs: every run that ever was, also those deleted since, by number.
        contact_ms: by when first contact was over.
        history: the vendor tells of a run that has ended.
        given_up: questions by id went wrong, so that a run may have been given up.
        slack_ms: by how much the daemon's clock may have been wrong.
    """

    vendor: str
    world: World
    runs: Mapping[int, SimRun]
    contact_ms: float
    history: bool = True
    given_up: bool = False
    slack_ms: Ms = 0

    @property
    def counted(self) -> bool:
        """Whether the vendor counts attempts."""
        return self.vendor == "scale"

    @property
    def marked(self) -> bool:
        """Whether it tells attempts apart."""
        return self.vendor in ("plain", "kylin", "scale")

    @property
    def grain_ms(self) -> Ms:
        """Of its timestamps."""
        return 1000 if self.vendor == "datameer" else 1

    def stays(self) -> dict[int, list[Stay]]:
        """Run's number → its true account, in order."""
        steps: dict[int, list[Step]] = defaultdict(list)
        for step in self.world.account:
            steps[step.number].append(step)
        return {
            number: [
                Stay(step.attempt, step.state, step.at_ms, after)
                for step, after in zip(own, [*(step.at_ms for step in own[1:]), inf], strict=True)
            ]
            for number, own in steps.items()
        }

    def accounts(self, events: Iterable[JobEvent | SourceEvent]) -> dict[int, Account]:
        """Run's number → what was published of it, also before its real id was known.

        Raises:
            KeyError: of a run that never was.
        """
        numbers: dict[str, int] = {}
        for run in self.runs.values():
            numbers |= {str(run.number): run.number, run.uuid: run.number}
            if run.definition.kind.stream:
                numbers[run.definition.name] = run.number
            numbers[f"{run.definition.number}@{(run.now.started_ms or 0) // 1000}"] = run.number
        accounts: dict[int, Account] = defaultdict(list)
        for event in events:
            if isinstance(event, JobEvent):
                job, at, began_ms = event.subject.partition("@")
                run_id = f"{job}@{int(began_ms) // 1000}" if at else job
                accounts[numbers[run_id]].append(event)
        return accounts


def flaws(events: Sequence[JobEvent | SourceEvent], truth: Truth) -> Iterator[Flaw]:
    """All that is wrong with the events of one source."""
    accounts, stays = truth.accounts(events), truth.stays()
    yield from _sequence(events)
    for number, account in accounts.items():
        yield from _legal(account, truth)
        for event in account:
            yield from _true(event, stays[number], truth)
    yield from _present(accounts, stays, truth)


def _sequence(events: Sequence[JobEvent | SourceEvent]) -> Iterator[Flaw]:
    numbers = [int(event.sequence) for event in events]
    for missing in sorted(set(range(1, max(numbers, default=0) + 1)) - set(numbers)):
        yield Flaw("lost", f"sequence {missing}")
    for before, after in pairwise(numbers):
        if after < before:
            yield Flaw("out of order", f"sequence {after} after {before}")
    seen: set[str] = set()
    for event in events:
        if event.id in seen:
            yield Flaw("repeated", f"{event.id} of {event.subject}")
        seen.add(event.id)
    ups = [event.data.up for event in events if isinstance(event, SourceEvent)]
    if ups != [bool(number % 2) for number in range(len(ups))]:
        yield Flaw("out of order", f"the source is up: {ups}")


def _legal(account: Account, truth: Truth) -> Iterator[Flaw]:
    """Each event of a run follows from the one before."""
    first = account[0].data.previous
    if first is not None and first.state not in TERMINAL:
        yield Flaw("lost", f"{first} was never told: {account[0]}")
    for before, event in pairwise(account):
        yield from _follows(before, event, truth)
    for _, attempt in groupby(account, key=lambda event: event.data.run.attempt):
        states = [event.data.state for event in attempt if event.data.state is not State.UNKNOWN]
        ended = [state in TERMINAL for state in states]
        if ended != sorted(ended) or (truth.marked and State.QUEUED in states[1:]):
            yield Flaw("out of order", f"{account[0].subject}: {states}")


def _follows(before: JobEvent, event: JobEvent, truth: Truth) -> Iterator[Flaw]:
    was, data = before.data, event.data
    step = data.run.attempt - was.run.attempt
    if event.time < before.time:
        yield Flaw("out of order", f"time: {before} {event}")
    if data.previous != Previous(was.state, was.vendor_state, was.run.attempt):
        yield Flaw("lost", f"something between {before} and {event}")
    if data.snapshot:
        yield Flaw("untrue", f"not new: {event}")
    if step == 0 and data.state is was.state:
        yield Flaw("repeated", f"{before} {event}")
    if step < 0 or (step > 1 and not truth.counted):
        yield Flaw("out of order", f"attempts: {before} {event}")


def _true(event: JobEvent, stays: list[Stay], truth: Truth) -> Iterator[Flaw]:
    """What an event says was so."""
    data, time_ms, slack_ms = event.data, iso_ms(event.time), truth.slack_ms
    until_ms, from_ms = iso_ms(data.observed_at), iso_ms(data.observed_after)
    if until_ms is None or time_ms is None or time_ms > until_ms + slack_ms:
        yield Flaw("untrue", f"later than it was seen: {event}")
        return
    if data.snapshot is not (data.observed_after is None and data.previous is None):
        yield Flaw("untrue", f"snapshot: {event}")
    if data.state is State.UNKNOWN:
        yield from _unknown(data, stays)
        return
    own = [stay for stay in stays if stay.state is data.state]
    if truth.counted:
        own = [stay for stay in own if stay.attempt == data.run.attempt]
    own = [stay for stay in own if stay.from_ms <= until_ms + slack_ms]
    if not data.inferred:
        own = [stay for stay in own if stay.until_ms >= (from_ms or 0) - slack_ms]
    if not own:
        yield Flaw("falsely ended" if data.terminal else "untrue", f"{event} {stays}")
    grains = {stay.from_ms // truth.grain_ms for stay in stays if stay.state is data.state}
    if data.time_source == "vendor" and time_ms // truth.grain_ms not in grains:
        yield Flaw("untrue", f"at another time: {event} {stays}")


def _unknown(data: JobData, stays: list[Stay]) -> Iterator[Flaw]:
    superseded = data.reason == "superseded" and len({stay.attempt for stay in stays}) > 1
    if data.vendor_state is not None or not (superseded or data.reason == "vanished"):
        yield Flaw("untrue", f"{data} {stays}")


def _present(
    accounts: Mapping[int, Account], stays: Mapping[int, list[Stay]], truth: Truth
) -> Iterator[Flaw]:
    """In the end, what was published last of a run is what is, or was when it was removed."""
    told_of_ends = truth.history and not truth.given_up
    for number, run in truth.runs.items():
        account, last = accounts.get(number, []), stays[number][-1].state
        state = account[-1].data.state if account else None
        known = f"{run} {account[-2:]}"
        if last is None:
            if state not in {*TERMINAL, State.UNKNOWN, None}:
                yield Flaw("lost", f"it is deleted: {known}")
        elif account and (truth.history or state not in TERMINAL):
            if state is not last and not (state is State.UNKNOWN and truth.given_up):
                yield Flaw("falsely ended" if state in TERMINAL else "lost", known)
        elif told_of_ends and not (last in TERMINAL and run.now.changed_ms <= truth.contact_ms):
            yield Flaw("lost", known)


def untold_ends(
    accounts: Mapping[int, Account], truth: Truth, good_ms: Sequence[Ms], *, all_told: bool
) -> Iterator[Flaw]:
    """Ends that good polls, begun at these times, could see; `all_told`: the vendor keeps them."""
    for number, own in truth.stays().items():
        account = accounts.get(number, [])
        for stay in own:
            if stay.state not in TERMINAL or stay.from_ms <= truth.contact_ms:
                continue
            seen = [ms for ms in good_ms if stay.from_ms <= ms < stay.until_ms - 500]
            lasting = all_told and number in truth.world.runs
            if (seen or lasting) and not any(_tells(event, stay, truth) for event in account):
                yield Flaw("lost", f"{stay} of {own}: {account}")


def _tells(event: JobEvent, stay: Stay, truth: Truth) -> bool:
    if event.data.state is not stay.state:
        return False
    if truth.counted and event.data.run.attempt != stay.attempt:
        return False
    # A wrong clock may put it at its observation, which an outage may have delayed for long.
    return iso_ms(event.time) == stay.from_ms or truth.slack_ms > 0
