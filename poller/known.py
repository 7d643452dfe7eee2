"""What is known of a source and its runs: in memory as an index, in the journal by commits."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from sys import intern
from typing import TypeAlias

import msgspec
from msgspec.structs import force_setattr

from poller.errors import Reason
from poller.events import Draft
from poller.runs import TERMINAL, Job, Ms, State

Key: TypeAlias = str | tuple[str, str]
"""Job id and run id; the id alone where both are the same."""


def key_of(job_id: str, run_id: str) -> Key:
    """The index key of a run: (job id, run id), or the one string where they are equal."""
    return run_id if job_id == run_id else (job_id, run_id)


class Known(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """The present attempt of one run, as far as it was told.

    Attributes:
        attempt: 1, 2, … within the run id.
        told: bits of what this attempt's events have told, or first contact took for granted;
            see `diff`.
        floor_ms: time of the last event of the attempt before; older timestamps prove nothing.
        last_ms: time of the last event, or of what was remembered silently.
        changed_ms: when the last change was observed; retention counts from here.
        vanished: the vendor does not show it any more, and it is not asked for.
        was: its provisional id, until an event has named it.
        fingerprint: of the row that showed it last; not kept over a restart.
    """

    job: Job
    run_id: str
    state: State
    vendor_state: str | None = None
    substate: str | None = None
    scope: str = ""
    attempt: int = 1
    marker: str | None = None
    told: int = 0
    floor_ms: Ms | None = None
    last_ms: Ms | None = None
    changed_ms: Ms = 0
    queued_ms: Ms | None = None
    started_ms: Ms | None = None
    ended_ms: Ms | None = None
    vanished: bool = False
    was: str | None = None
    fingerprint: int = 0

    @property
    def key(self) -> Key:
        """Its place in the index."""
        return key_of(self.job.id, self.run_id)

    @property
    def since_ms(self) -> Ms:
        """Since when it is in this state, as it was told."""
        return self.changed_ms if self.last_ms is None else self.last_ms

    @property
    def watched(self) -> bool:
        """Whether its next state is waited for."""
        return self.state not in TERMINAL and not self.vanished


class Index:
    """All known runs of one source, and since when each watched one was not shown.

    `watched[scope]` maps keys to the time that the run was last shown, oldest first, so that what
    a listing left out stands in front, and finding it costs as much as there is to find.

    Attributes:
        changes: grows whenever what is known changes, or a mark: who has looked can tell whether
            to look again.
    """

    def __init__(self, runs: Iterable[Known] = (), *, at_ms: Ms = 0) -> None:
        self.changes = 0
        self.runs: dict[Key, Known] = {}
        self.watched: dict[str, dict[Key, Ms]] = {}
        for run in runs:
            self.put(run, at_ms)

    def put(self, run: Known, at_ms: Ms) -> None:
        """Keep this as what is known of the run, shown at that time."""
        self.changes += 1
        key = run.key
        old = self.runs.get(key)
        if old is not None and old.scope != run.scope:
            self.watched.get(old.scope, {}).pop(key, None)
        self.runs[key] = run
        scope = self.watched.setdefault(run.scope, {})
        scope.pop(key, None)
        if run.watched:
            scope[key] = at_ms

    def shown(self, runs: Iterable[Known], at_ms: Ms) -> None:
        """The vendor has shown these runs, unchanged; those that are not watched do not matter."""
        for run in runs:
            scope, key = self.watched.get(run.scope), key_of(run.job.id, run.run_id)
            if scope is not None and scope.pop(key, None) is not None:
                scope[key] = at_ms

    def rename(self, job_id: str, old_run_id: str, new_run_id: str) -> Known | None:
        """Give a provisional run its real id, which shows it; None if there is no such run."""
        self.changes += 1
        old_key = key_of(job_id, old_run_id)
        run = self.runs.pop(old_key, None)
        if run is None:
            return None
        scope = self.watched.get(run.scope, {})
        scope.pop(old_key, None)
        run = msgspec.structs.replace(run, run_id=new_run_id, was=old_run_id)
        self.put(run, next(reversed(scope.values()), 0))
        return run

    def drop(self, key: Key) -> None:
        """Forget a run that retention has ended."""
        self.changes += 1
        run = self.runs.pop(key, None)
        if run is not None:
            self.watched.get(run.scope, {}).pop(key, None)

    def unseen(self, scope: str, before_ms: Ms) -> list[Known]:
        """Watched runs of a scope that were not shown since then, the longest unseen first."""
        found = []
        for key, at_ms in self.watched.get(scope, {}).items():
            if at_ms >= before_ms:
                break
            found.append(self.runs[key])
        return found

    def active(self) -> Iterator[Known]:
        """Every watched run."""
        for scope in self.watched.values():
            for key in scope:
                yield self.runs[key]


class Durations:
    """How long runs of a job take: of each job, the few that ended last and succeeded."""

    def __init__(self, runs: Iterable[Known] = ()) -> None:
        self._ended: dict[Hashable, list[tuple[Ms, Ms]]] = {}
        for run in runs:
            self.note(run)

    def note(self, run: Known) -> None:
        """Remember how long a run took, if it succeeded and its times are known."""
        key = _alike(run)
        if key is None or run.state is not State.SUCCEEDED:
            return
        if run.started_ms is None or run.ended_ms is None:
            return
        ended = self._ended.pop(key, [])
        insort(ended, (run.ended_ms, max(0, run.ended_ms - run.started_ms)))
        self._ended[key] = ended[-_REMEMBERED_RUNS:]
        if len(self._ended) > _REMEMBERED_JOBS:
            del self._ended[next(iter(self._ended))]

    def usual_ms(self, run: Known) -> Ms | None:
        """How long a run like this usually takes: the median, None if too few have ended."""
        ended = self._ended.get(_alike(run), ())
        if len(ended) < _ENOUGH_RUNS:
            return None
        return int(median(took_ms for _, took_ms in ended))


def _alike(run: Known) -> Hashable:
    """What runs of the same work share: the job, or for jobs that run but once, what they do."""
    job = run.job
    if job.id != run.run_id:
        return job.id
    return None if job.name is None else (job.group, job.name)


_REMEMBERED_RUNS = 9
_REMEMBERED_JOBS = 10_000
_ENOUGH_RUNS = 3


def thrifty(run: Known) -> Known:
    """The same run, its texts kept once for all runs that have equal ones.

    Of a million runs these texts are a third of the memory.
    """
    job = run.job
    if run.run_id == job.id:
        force_setattr(run, "run_id", job.id)
    for of, names in ((job, ("name", "group", "owner")), (run, ("vendor_state", "scope"))):
        for name in names:
            text = getattr(of, name)
            if text is not None:
                force_setattr(of, name, intern(text))
    return run


class Condition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How it stands with a source, kept over a restart.

    Attributes:
        contact_ms: when first contact began.
        contact_done: one complete listing was read.
        last_good_ms: when the last good poll began.
        up: None until the first poll was good or the source was called down.
        since_ms: since when it is up or down.
        failures: failed polls in a row.
        reason: why the last poll failed, None if it was good; likewise message, as a sentence.
        sequence: of its last event.
    """

    contact_ms: Ms
    contact_done: bool = False
    last_good_ms: Ms | None = None
    up: bool | None = None
    since_ms: Ms = 0
    failures: int = 0
    reason: Reason | None = None
    message: str | None = None
    sequence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What one page changes, written as a whole or not at all.

    `dropped` holds (job id, run id) of runs to forget; an empty value in `marks` removes a mark.
    """

    source: str
    runs: Sequence[Known] = ()
    dropped: Sequence[tuple[str, str]] = ()
    events: Sequence[Draft] = ()
    condition: Condition | None = None
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memories:
    """What the journal holds of one source."""

    runs: list[Known]
    condition: Condition | None
    marks: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a vendor may look at while it asks and reads: a read-only view of one source.

    Attributes:
        now_ms: when this poll began.
        contact_ms: when first contact with the source began.
        last_good_ms: when the last good poll began; None until first contact is complete.
        since_ms: what ended before is past retention and of no interest.
        whole: the poll before read all that it set out to read; False after a failure and after
            a start, when a vendor must not stop early at what looks unchanged.
        publish_all: first contact publishes finished runs too.
        resync_s: how often to look again at what a feed of changes does not show.
        rate_per_s: requests that the source may be asked for, on average.
        marks: the vendor's own notes from pages before (watermarks, names), by its own keys.
        index: what is known; use `get` and `active`.
    """

    now_ms: Ms
    contact_ms: Ms
    last_good_ms: Ms | None = None
    since_ms: Ms = 0
    whole: bool = False
    publish_all: bool = False
    resync_s: float = 600.0
    rate_per_s: float = 2.0
    marks: Mapping[str, str] = field(default_factory=dict)
    index: Index = field(default_factory=Index)

    def get(self, job_id: str, run_id: str) -> Known | None:
        """What is known of this run, or None."""
        return self.index.runs.get(key_of(job_id, run_id))

    def active(self) -> Iterator[Known]:
        """Every run whose next state is waited for."""
        return self.index.active()
