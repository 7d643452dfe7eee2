"""A world of living fake jobs: seeded, moved by the time it is told, alike for every vendor.

A vendor's `render` shows it through that vendor's API. The world also keeps the true account of
every transition.
"""

from __future__ import annotations

import heapq
import random
import uuid
from dataclasses import dataclass, field

import msgspec

from poller.runs import ACTIVE, TERMINAL, Ms, State


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """How a sort of job lives at a vendor.

    Attributes:
        name: for vendors with several sorts, e.g. `batch`.
        states: those that the vendor can show, `running` and `failed` among them; the others are
            stepped over.
        reopens: a finished run may be started again under the same id.
        stream: one run per job that never succeeds by itself.
        vanishes: an active run may be deleted.
    """

    name: str = ""
    states: frozenset[State] = frozenset(State) - {State.UNKNOWN}
    reopens: bool = False
    stream: bool = False
    vanishes: bool = False


class Definition(msgspec.Struct, frozen=True):
    """Something that can be run: its number (from 1), name, group and owner."""

    number: int
    name: str
    group: str
    owner: str
    kind: Kind


class Step(msgspec.Struct, frozen=True):
    """One true transition: when, which run and attempt, into which state (None: deleted)."""

    at_ms: Ms
    number: int
    attempt: int
    state: State | None


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt of a run, with the instants at which things happened."""

    number: int
    state: State
    queued_ms: Ms
    started_ms: Ms | None = None
    ended_ms: Ms | None = None
    changed_ms: Ms = 0
    problem: str | None = None
    warnings: bool = False
    length_ms: Ms = 1

    @property
    def terminal(self) -> bool:
        """Whether this attempt has ended."""
        return self.state in TERMINAL


@dataclass(slots=True, kw_only=True)
class SimRun:
    """One run: its number ascends through the world; its attempts, oldest first."""

    number: int
    uuid: str
    definition: Definition
    created_ms: Ms
    attempts: list[Attempt]

    @property
    def now(self) -> Attempt:
        """The present attempt."""
        return self.attempts[-1]

    def progress(self, at_ms: Ms) -> float:
        """Share of the present attempt that is done, 0 to 1."""
        attempt = self.now
        if attempt.started_ms is None:
            return 0.0
        if attempt.state is State.SUCCEEDED:
            return 1.0
        done = ((attempt.ended_ms or at_ms) - attempt.started_ms) / attempt.length_ms
        return min(0.99, max(0.0, done))


@dataclass(slots=True, kw_only=True)
class World:
    """Living fake jobs.

    Args:
        kinds: the sorts of jobs, dealt out in turn.
        seed: the same seed and the same times give the same lives.
        jobs: how many definitions there are.
        now_ms: when the world begins; `advance` moves it on.
        pace: 1.0 means runs of some seconds; 10.0 makes everything ten times slower.
        keep_ms: how long finished runs are kept.
    """

    kinds: tuple[Kind, ...]
    seed: int = 0
    jobs: int = 5
    now_ms: Ms = 0
    pace: float = 1.0
    keep_ms: Ms = 3_600_000
    definitions: list[Definition] = field(default_factory=list)
    runs: dict[int, SimRun] = field(default_factory=dict)
    account: list[Step] = field(default_factory=list)
    _random: random.Random = field(init=False)
    _due: list[tuple[Ms, int, int, State | None]] = field(default_factory=list)
    _counter: int = 0
    _tick: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311 - a seeded life, no secret
        for number in range(1, self.jobs + 1):
            kind = self.kinds[number % len(self.kinds)]
            name = f"{self._random.choice(_VERBS)}_{self._random.choice(_NOUNS)}_{number}"
            group, owner = self._random.choice(_GROUPS), self._random.choice(_OWNERS)
            definition = Definition(number, name, group, owner, kind)
            self.definitions.append(definition)
            self._later(self._wait(0.1, 6), -number, State.QUEUED)

    def advance(self, now_ms: Ms) -> None:
        """Let everything happen that is due until then; time never runs backwards."""
        while self._due and self._due[0][0] <= now_ms:
            at_ms, _, number, state = heapq.heappop(self._due)
            self.now_ms = max(self.now_ms, at_ms)
            self._step(number, state)
        self.now_ms = max(self.now_ms, now_ms)

    def start(self, definition: Definition) -> SimRun:
        """Start a run of this definition now (for a stream: the next attempt of its only one)."""
        run = self._of(definition) if definition.kind.stream else None
        if run is not None:
            self.reopen(run)
            return run
        self._counter += 1
        identity = uuid.UUID(int=self._random.getrandbits(128), version=4)
        run = SimRun(
            number=self._counter,
            uuid=str(identity),
            definition=definition,
            created_ms=self.now_ms,
            attempts=[],
        )
        self.runs[run.number] = run
        self._open(run)
        return run

    def reopen(self, run: SimRun) -> None:
        """Start the next attempt of a run."""
        self._open(run)

    def move(self, run: SimRun, state: State, problem: str | None = None) -> None:
        """Put the present attempt into a state now, and write that down."""
        attempt = run.now
        attempt.state, attempt.changed_ms = state, self.now_ms
        if state is State.RUNNING and attempt.started_ms is None:
            attempt.started_ms = self.now_ms
        attempt.ended_ms = self.now_ms if state in TERMINAL else None
        attempt.problem = problem if state is State.FAILED else None
        self.account.append(Step(self.now_ms, run.number, attempt.number, state))

    def delete(self, run: SimRun) -> None:
        """Remove a run without a trace."""
        del self.runs[run.number]
        if not run.now.terminal:
            self.account.append(Step(self.now_ms, run.number, run.now.number, None))

    def of(self, kind: str) -> list[SimRun]:
        """Runs of a kind, oldest first."""
        return [run for run in self.runs.values() if run.definition.kind.name == kind]

    def active(self) -> list[SimRun]:
        """Runs that have not ended, oldest first."""
        return [run for run in self.runs.values() if run.now.state in ACTIVE]

    def latest(self, definition: Definition) -> SimRun | None:
        """The newest run of a definition."""
        return self._of(definition)

    def _of(self, definition: Definition) -> SimRun | None:
        runs = (run for run in reversed(self.runs.values()) if run.definition is definition)
        return next(runs, None)

    def _open(self, run: SimRun) -> None:
        kind = run.definition.kind
        number = len(run.attempts) + 1
        first = next(
            state for state in (State.QUEUED, State.STARTING, State.RUNNING) if state in kind.states
        )
        attempt = Attempt(
            number=number, state=first, queued_ms=self.now_ms, length_ms=self._wait(1, 15)
        )
        attempt.warnings = self._random.random() < 0.1
        run.attempts.append(attempt)
        self.move(run, first)
        self._plan(run)

    def _later(self, after_ms: Ms, number: int, state: State | None) -> None:
        self._tick += 1
        heapq.heappush(self._due, (self.now_ms + after_ms, self._tick, number, state))

    def _wait(self, low_s: float, high_s: float) -> Ms:
        return max(1, int(1000 * self.pace * self._random.uniform(low_s, high_s)))

    def _step(self, number: int, state: State | None) -> None:
        if number < 0:
            self.start(self.definitions[-number - 1])
            return
        run = self.runs.get(number)
        if run is None:
            return
        if state is None:
            if not run.now.terminal:
                self._later(self._wait(0.5, 10), -run.definition.number, State.QUEUED)
            self.delete(run)
        elif state is State.QUEUED:
            self.reopen(run)
        else:
            problem = self._random.choice(_PROBLEMS)
            if state is not run.now.state:
                self.move(run, state, problem)
            self._plan(run)

    def _plan(self, run: SimRun) -> None:
        """Decide what happens next to a run that has just changed, and when."""
        kind, state, chance = run.definition.kind, run.now.state, self._random.random()
        if state in TERMINAL:
            self._after_the_end(run, chance)
            return
        if kind.vanishes and chance > 0.98:
            self._later(self._wait(0.2, 3), run.number, None)
            return
        after = {
            State.QUEUED: [(0.05, State.CANCELED), (1.0, State.STARTING)],
            State.STARTING: [(1.0, State.RUNNING)],
            State.RUNNING: [
                (0.10, State.SUSPENDED),
                (0.20, State.STOPPING),
                (0.40, State.FAILED),
                (1.0, State.RUNNING if kind.stream else State.SUCCEEDED),
            ],
            State.SUSPENDED: [(1.0, State.RUNNING)],
            State.STOPPING: [(1.0, State.CANCELED)],
        }[state]
        target = next(target for bound, target in after if chance <= bound)
        target = _within(target, kind)
        wait = run.now.length_ms if state is State.RUNNING else self._wait(0.1, 3)
        self._later(wait, run.number, target)

    def _after_the_end(self, run: SimRun, chance: float) -> None:
        kind = run.definition.kind
        if kind.stream or (kind.reopens and run.now.state is State.FAILED and chance < 0.5):
            self._later(self._wait(0.5, 5), run.number, State.QUEUED)
            return
        self._later(self._wait(0.5, 10), -run.definition.number, State.QUEUED)
        self._later(self.keep_ms, run.number, None)


def _within(state: State, kind: Kind) -> State:
    """The nearest later state that this kind can show."""
    following = {
        State.STARTING: State.RUNNING,
        State.SUSPENDED: State.SUCCEEDED,
        State.STOPPING: State.CANCELED,
        State.CANCELED: State.FAILED,
        State.SUCCEEDED: State.CANCELED,
    }
    while state not in kind.states:
        state = following[state]
    return state


_VERBS = ("load", "clean", "merge", "export", "index", "train", "report", "archive")
_NOUNS = ("orders", "clicks", "tiles", "invoices", "sensors", "stock", "scenes", "ledger")
_GROUPS = ("sales", "imagery", "finance")
_OWNERS = ("etl", "analyst", "operations")
_PROBLEMS = (
    "out of memory in task 3",
    "source table not found",
    "connection to the target was lost",
)
