"""What the API answers, as types: its JSON and its OpenAPI schemas are both made of these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from poller.errors import Reason
from poller.events import Instant, JobEvent, RunFacts, rfc3339
from poller.known import Known
from poller.runs import TERMINAL, Job, Ms, Problem, State
from poller.telemetry import Metrics

SLOT_S = 900
SLOTS = 96
"""A day in quarters of an hour."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """How long the last polls took, in seconds.

    Attributes:
        polls: how many these are, at most 20.
    """

    last_s: float
    median_s: float
    longest_s: float
    polls: int


class SourceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with a source.

    Attributes:
        condition: `new` before the first good poll; `failing` while polls fail but it is not given
            up yet; `down` when it is: its runs are not seen any more.
        since: since when; null while new.
        reason: why the last poll failed, null if it was good; likewise message.
        failures: failed polls in a row.
        contacted: first contact is over: one complete listing was read.
        polling: a poll is under way.
        last_poll: when the last poll began.
        last_good: when the last good poll began.
        next_poll: when the next one is due; null while one is under way.
        budget_used: share of `rate_per_s` that was used in about the last minute.
        runs: how many known runs are in each state.
    """

    source: str
    vendor: str
    condition: Literal["new", "up", "failing", "down"]
    since: Instant | None
    reason: Reason | None
    message: str | None
    failures: int
    contacted: bool
    polling: bool
    last_poll: Instant | None
    last_good: Instant | None
    next_poll: Instant | None
    latency: Latency | None
    interval_s: float
    idle_interval_s: float
    rate_per_s: float
    budget_used: float
    runs: dict[State, int]


class SinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a sink is behind.

    Attributes:
        trouble: why nothing is delivered at present, or null.
        lag_events: how many events are not delivered yet.
        lag_s: age of the oldest of them, in seconds.
    """

    sink: str
    trouble: str | None
    lag_events: int
    lag_s: float


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon, its sources and its sinks.

    Attributes:
        offset: of the newest event: what `id` of `/api/v1/events` counts.
        journal: why the journal does not write, or null.
    """

    now: Instant
    instance: str
    version: str
    offset: int
    journal: str | None
    sources: list[SourceStatus]
    sinks: list[SinkStatus]


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run: its present attempt.

    Attributes:
        since: since when it is in this state.
        watched: its next state is waited for; false once it has ended or vanished.
        error: why it failed, if an event has told.
        usual_s: how long runs of this job take: the median of the last few that succeeded.
    """

    source: str
    job: Job
    run: RunFacts
    state: State
    substate: str | None
    vendor_state: str | None
    since: Instant
    watched: bool
    terminal: bool
    error: Problem | None
    usual_s: float | None


class RunPage(msgspec.Struct, frozen=True, kw_only=True):
    """Runs, the newest change first.

    Attributes:
        next: the cursor of the next page; null on the last. A page may be short, or empty, and
            yet not be the last.
    """

    runs: list[RunStatus]
    next: str | None


class RunDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A run and its events, the oldest first.

    Attributes:
        more: there are older events.
    """

    run: RunStatus
    events: list[JobEvent]
    more: bool


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """What was observed in a quarter of an hour that begins `at`."""

    at: Instant
    transitions: int
    failures: int


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Transitions and failures over the last day, the oldest slot first."""

    slot_s: int
    slots: list[Slot]


class ProblemDetails(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a request, after RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Sink(msgspec.Struct, frozen=True):
    """A sink, why it does not deliver if so, and the offset up to which it has everything."""

    name: str
    trouble: str | None
    cursor: int


class Facts(Protocol):
    """What the daemon says of itself."""

    instance: str
    metrics: Metrics

    async def troubles(self) -> list[str]:
        """Why it is not ready, a sentence each; empty if it is."""

    async def refresh_metrics(self) -> None:
        """Bring the metrics up to date that are only read now and then."""

    def source_status(self) -> list[SourceStatus]:
        """How it stands with every configured source."""

    def sinks(self) -> Sequence[Sink]:
        """Every configured sink."""

    def usual_ms(self, source: str, run: Known) -> Ms | None:
        """How long a run like this usually takes, if that is known."""

    def progress(self, source: str, run: Known) -> float | None:
        """How far a run is, from 0 to 1, if one of the last polls has shown it."""


def run_status(source: str, run: Known, told: bytes | None, facts: Facts) -> RunStatus:
    """What is known of a run, what its newest event tells, and what the daemon has in mind."""
    newest = None if told is None else _TOLD.decode(told).data
    if newest is not None and newest.state is not run.state:
        newest = None
    usual_ms, progress = facts.usual_ms(source, run), facts.progress(source, run)
    if newest is not None and not run.watched:
        progress = newest.run.progress
    return RunStatus(
        source=source,
        job=run.job,
        run=RunFacts(
            id=run.run_id,
            attempt=run.attempt,
            queued_at=instant(run.queued_ms),
            started_at=instant(run.started_ms),
            ended_at=instant(run.ended_ms),
            progress=progress,
        ),
        state=run.state,
        substate=run.substate,
        vendor_state=run.vendor_state,
        since=rfc3339(run.since_ms),
        watched=run.watched,
        terminal=run.state in TERMINAL,
        error=newest.error if newest else None,
        usual_s=None if usual_ms is None else usual_ms / 1000,
    )


def instant(ms: Ms | None) -> str | None:
    """An instant as RFC 3339, or None."""
    return None if ms is None else rfc3339(ms)


class _ToldRun(msgspec.Struct, frozen=True):
    progress: float | None


class _ToldData(msgspec.Struct, frozen=True):
    run: _ToldRun
    state: State
    error: Problem | None


class _Told(msgspec.Struct, frozen=True):
    """Of an event, what tells more than is known of the run."""

    data: _ToldData


_TOLD = msgspec.json.Decoder(_Told)
