"""When the next change is due: learned from how earlier runs of the same jobs went. Pure.

How long a run stays in a state, and how long after one start of a job the next comes, is foretold
from the last few times: the next length falls into each gap between the earlier lengths with the
same chance, whatever their distribution. So learning is keeping a few numbers.

A poll is worth so many seconds of changes waiting unseen. It is due once as many are expected to
have gathered since the last one: soon where an end is due, and late in the middle of long runs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from poller.events import Transition
from poller.known import Index, Known
from poller.runs import Ms, State
from poller.schedule import JITTER, Pace

MARK = "forecast"
"""What the names of its marks begin with; no vendor's do."""

_KEPT = 16
_JOBS = 512
_RUNS = 64
"""So many active runs are looked at for one poll; they stand for the others."""
_MEMORY_S = 86_400.0
_FIRST_SPAN_S = 3600.0
_LATE = 0.05
"""So many of all changes may have waited for longer than the interval."""
_WORTHS = (0.1, 10.0)
_WORTH_STEP = 0.1


class Due(NamedTuple):
    """Changes to come: how many are expected, spread evenly over a time from now on, in seconds."""

    changes: float
    opens_s: float
    closes_s: float


class Habits(msgspec.Struct, omit_defaults=True):
    """How the runs of one job have gone: the last few lengths in seconds, the newest last.

    Attributes:
        stays: by state, how long runs stayed in it.
        gaps: from one start to the next.
        started_ms: when the newest run began.
    """

    stays: dict[State, list[float]] = {}
    gaps: list[float] = []
    started_ms: Ms = 0

    def started(self, at_ms: Ms) -> None:
        """A run began then."""
        if self.started_ms and at_ms >= self.started_ms:
            _keep(self.gaps, at_ms - self.started_ms)
        self.started_ms = max(self.started_ms, at_ms)

    def left(self, state: State, after_ms: Ms) -> None:
        """A run left a state after so long."""
        _keep(self.stays.setdefault(state, []), after_ms)


class Tempo(msgspec.Struct):
    """How often a source changes, and what a poll is worth.

    Attributes:
        changes: seen in `span_s` up to `at_ms`; both fade away within days.
        worth: of a poll, where what gathers from poll to poll at a fixed interval is 1 on average.
    """

    changes: float = 0.0
    span_s: float = _FIRST_SPAN_S
    at_ms: Ms = 0
    worth: float = 0.5

    def count(self, changes: int, at_ms: Ms, late: float) -> None:
        """So many changes were seen, such a share of them late.

        Polls become dearer while few are late and cheaper otherwise, so that in the long run
        one in twenty is, however good or bad the forecast.
        """
        worth = self.worth * math.exp(_WORTH_STEP * changes * (_LATE - late))
        self.worth = min(max(worth, _WORTHS[0]), _WORTHS[1])
        kept = self._kept(at_ms)
        self.span_s = _MEMORY_S - (_MEMORY_S - self.span_s) * kept
        self.changes = self.changes * kept + changes
        self.at_ms = max(self.at_ms, at_ms)

    def per_second(self, now_ms: Ms) -> float:
        """Changes per second on average, never quite none."""
        kept = self._kept(now_ms)
        return (self.changes * kept + 1) / (_MEMORY_S - (_MEMORY_S - self.span_s) * kept)

    def _kept(self, now_ms: Ms) -> float:
        passed_ms = now_ms - self.at_ms if self.at_ms else 0
        return math.exp(-max(0, passed_ms) / 1000 / _MEMORY_S)


class Forecast:
    """What was learned of one source's jobs.

    Args:
        marks: what `learn` has given before.
        pace: the shortest interval and the longest.
    """

    def __init__(self, marks: Mapping[str, str], pace: Pace) -> None:
        self._interval_s = pace.interval_s
        self._longest_s = max(pace.interval_s, pace.max_interval_s)
        self._tempo = msgspec.json.decode(marks.get(MARK, "{}"), type=Tempo)
        jobs = [
            (name.removeprefix(f"{MARK}:"), msgspec.json.decode(value, type=Habits))
            for name, value in marks.items()
            if name.startswith(f"{MARK}:")
        ]
        self._jobs = dict(sorted(jobs, key=lambda job: job[1].started_ms))
        self._all = self._jobs.pop("", Habits())

    def learn(
        self,
        known: Known | None,
        transitions: Sequence[Transition],
        *,
        after_ms: Ms | None,
        at_ms: Ms,
    ) -> dict[str, str]:
        """Learn from what a run has done; gives the marks by which it is remembered.

        Args:
            known: what was known of the run.
            transitions: what it has done since.
            after_ms: they were not seen by the poll that began then; None at first contact.
            at_ms: they were seen then. A vendor's clock that is ahead or behind, or a vendor that
                shows a change late, is told by both: what counts is when a poll can see it.
        """
        if not transitions:
            return {}
        kind = _kind(transitions[0].job.id, transitions[0])
        habits = self._jobs.pop(kind, None) or Habits()
        self._jobs[kind] = habits
        since = None if known is None else (known.state, known.attempt, known.last_ms)
        for transition in transitions:
            seen_ms = min(max(transition.time_ms, after_ms or 0), at_ms)
            if since is None or since[1] != transition.attempt:
                habits.started(seen_ms)
            elif since[2] is not None and transition.state is not State.UNKNOWN:
                for each in (habits, self._all):
                    each.left(since[0], max(0, seen_ms - since[2]))
            since = (transition.state, transition.attempt, transition.time_ms)
        self._tempo.count(len(transitions), at_ms, self._late(after_ms, at_ms))
        marks = {MARK: _text(self._tempo), f"{MARK}:": _text(self._all)}
        if len(self._jobs) > _JOBS:
            oldest = next(iter(self._jobs))
            del self._jobs[oldest]
            marks[f"{MARK}:{oldest}"] = ""
        return marks | {f"{MARK}:{kind}": _text(habits)}

    def due_s(self, index: Index, now_ms: Ms) -> float:
        """Seconds from a poll to the next: from the interval to the longest one.

        Args:
            index: what is known after the poll.
            now_ms: when the poll began.
        """
        active = list(islice(index.active(), _RUNS))
        weight = sum(map(len, index.watched.values())) / max(1, len(active))
        dues: list[Due] = []
        for run in active:
            stays = self._stays(run)
            if not stays:
                return self._interval_s
            since_ms = now_ms if run.last_ms is None else run.last_ms
            dues += ahead(stays, (now_ms - since_ms) / 1000, self._longest_s, weight)
        for habits in self._jobs.values():
            if habits.gaps:
                elapsed_s = (now_ms - habits.started_ms) / 1000
                dues += ahead(habits.gaps, elapsed_s, self._longest_s)
        fixed_s = self._tempo.per_second(now_ms) * self._interval_s**2 / 2
        due_s = gathered_s(dues, self._tempo.worth * fixed_s)
        return min(self._longest_s, max(self._interval_s, due_s))

    def _late(self, after_ms: Ms | None, at_ms: Ms) -> float:
        """Which share of what was seen has probably waited for longer than the interval."""
        gap_s = 0.0 if after_ms is None else (at_ms - after_ms) / 1000
        if not (1 + JITTER) * self._interval_s < gap_s <= 2 * self._longest_s:
            return 0.0  # in time but for jitter; or nobody could poll
        return 1 - self._interval_s / gap_s

    def _stays(self, run: Known) -> Sequence[float]:
        habits = self._jobs.get(_kind(run.job.id, run), self._all)
        return habits.stays.get(run.state) or self._all.stays.get(run.state) or ()


def ahead(
    lengths: Sequence[float], elapsed_s: float, horizon_s: float, weight: float = 1.0
) -> Iterator[Due]:
    """When what has lasted so long will end, if it ends within the horizon.

    Args:
        lengths: how long it has lasted earlier, at least one.
        elapsed_s: how long it has lasted now.
        horizon_s: what ends later than this from now on is left out.
        weight: how many changes it stands for.
    """
    elapsed_s = max(0.0, elapsed_s)
    least_s, most_s, count = min(lengths), max(lengths), len(lengths)
    margin_s = max((most_s - least_s) * (0.5 + 2 / count), most_s / count**2, 1.0)
    if elapsed_s + horizon_s <= least_s - margin_s:
        return
    if elapsed_s >= most_s + margin_s:
        yield Due(weight, 0.0, elapsed_s - most_s)  # as overdue as it is now, and again
        return
    edges = [max(0.0, least_s - margin_s), *sorted(lengths), most_s + margin_s]
    first = bisect_right(edges, elapsed_s) - 1
    gone = 0.0
    if first >= 0:
        gone = first + (elapsed_s - edges[first]) / (edges[first + 1] - edges[first])
    each = weight / (len(edges) - 1 - gone)
    for opens_s, closes_s in zip(edges[max(0, first) :], edges[max(0, first) + 1 :], strict=False):
        if opens_s >= elapsed_s + horizon_s:
            return
        part = 1.0
        if opens_s < elapsed_s:
            part = (closes_s - elapsed_s) / (closes_s - opens_s)
        yield Due(each * part, max(0.0, opens_s - elapsed_s), closes_s - elapsed_s)


def gathered_s(dues: Iterable[Due], worth_s: float) -> float:
    """When changes will have waited so long, all together, as is to be expected; inf if never."""
    steps: list[tuple[float, float, float]] = []  # when, changes at once, changes per second
    for due in dues:
        span_s = due.closes_s - due.opens_s
        if span_s <= 0:
            steps.append((due.opens_s, due.changes, 0.0))
        else:
            steps.append((due.opens_s, 0.0, due.changes / span_s))
            steps.append((due.closes_s, 0.0, -due.changes / span_s))
    now_s = waiting = per_s = waited_s = 0.0
    for at_s, changes, change_per_s in sorted(steps):
        if now_s + _until_s(worth_s - waited_s, waiting, per_s) <= at_s:
            break
        span_s = at_s - now_s
        waited_s += waiting * span_s + per_s * span_s**2 / 2
        waiting += per_s * span_s + changes
        per_s = max(0.0, per_s + change_per_s)
        now_s = at_s
    return now_s + _until_s(worth_s - waited_s, waiting, per_s)


def _until_s(left_s: float, waiting: float, per_s: float) -> float:
    """How long it takes until `left_s` has gathered while so many wait and so many come."""
    pull = waiting + math.sqrt(waiting**2 + 2 * per_s * left_s)
    return 2 * left_s / pull if pull else math.inf


def _kind(job_id: str, run: Known | Transition) -> str:
    """What runs are alike: those of one job, or of one name where every run is a job of its own."""
    return job_id if job_id != run.run_id else run.job.name or run.job.group or "-"


def _keep(lengths: list[float], length_ms: Ms) -> None:
    lengths.append(length_ms / 1000)
    del lengths[:-_KEPT]


def _text(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()
