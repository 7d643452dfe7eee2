"""P10: polls per hour at the same detection latency, forecast against fixed and idle intervals.

`python -m bench.p10` replays invented days of several shapes in simulated time, through the
product's own detection and forecast; nothing is measured with a clock, so a run repeats exactly.
Three days are counted, after three of learning. By its side stand a fixed interval of 15 s, and one
of 60 s while nothing is active. The forecast's longest interval is two minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from poller.diff import Observation, diff
from poller.forecast import Forecast
from poller.known import Index
from poller.runs import Job, Seen, State
from poller.schedule import Pace

DAY_S = 86_400
DAYS = 6
LEARNING_S = 3 * DAY_S
INTERVAL_S = 15.0
EPOCH_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Life:
    """One run: when it is queued, starts and ends, in seconds from the beginning."""

    job: str
    run: str
    queued_s: float
    started_s: float
    ended_s: float

    def seen(self, now_s: float) -> Seen:
        """The row that a listing shows at a time."""
        state, ended_ms, started_ms = State.QUEUED, None, None
        if now_s >= self.started_s:
            state, started_ms = State.RUNNING, _ms(self.started_s)
        if now_s >= self.ended_s:
            state, ended_ms = State.SUCCEEDED, _ms(self.ended_s)
        return Seen(
            job=Job(self.job),
            run_id=self.run,
            state=state,
            vendor_state=state,
            queued_ms=_ms(self.queued_s),
            started_ms=started_ms,
            ended_ms=ended_ms,
        )


Shape: TypeAlias = Callable[[Random], Iterator[Life]]


def nightly(random: Random) -> Iterator[Life]:
    """40 jobs, each once a night between one and five, and much alike every night."""
    jobs = [(random.uniform(1, 5) * 3600, random.uniform(120, 2400)) for _ in range(40)]
    for day in range(DAYS):
        for job, (at_s, length_s) in enumerate(jobs):
            queued_s = day * DAY_S + at_s + random.gauss(0, 20)
            wait_s, lasts_s = random.uniform(5, 20), length_s * random.gauss(1, 0.05)
            yield _life(job, day, queued_s, wait_s, lasts_s)


def heavy(random: Random) -> Iterator[Life]:
    """6 jobs, started whenever somebody wants; most are done in minutes, a few take hours."""
    for job in range(6):
        at_s, count = 0.0, 0
        while (at_s := at_s + random.expovariate(1 / 3600)) < DAYS * DAY_S:
            lasts_s = random.lognormvariate(math.log(240), 1.4)
            yield _life(job, count, at_s, random.uniform(5, 20), lasts_s)
            at_s, count = at_s + lasts_s, count + 1


def bursts(random: Random) -> Iterator[Life]:
    """Now and then 30 runs of 5 jobs within five minutes, and nothing for hours."""
    at_s, count = 0.0, 0
    while (at_s := at_s + random.uniform(2, 6) * 3600) < DAYS * DAY_S:
        for _ in range(30):
            job, count = random.randrange(5), count + 1
            lasts_s = 200 * (job + 1) * random.gauss(1, 0.15)
            yield _life(job, count, at_s + random.uniform(0, 300), random.uniform(5, 60), lasts_s)


def drift(random: Random) -> Iterator[Life]:
    """10 jobs every hour, each day 8 % longer and five minutes later than the day before."""
    for job in range(10):
        at_s, length_s = random.uniform(0, 3600), random.uniform(200, 1500)
        for count in range(DAYS * 24):
            queued_s = at_s + count * (3600 + 300 / 24) + random.gauss(0, 10)
            lasts_s = length_s * 1.08 ** (count / 24) * random.gauss(1, 0.03)
            yield _life(job, count, queued_s, random.uniform(5, 20), lasts_s)


def memoryless(random: Random) -> Iterator[Life]:
    """5 jobs whose starts and ends nobody can foresee: nothing is to be won."""
    for job in range(5):
        at_s, count = 0.0, 0
        while (at_s := at_s + random.expovariate(1 / 900)) < DAYS * DAY_S:
            lasts_s = random.expovariate(1 / 600)
            yield _life(job, count, at_s, random.expovariate(1 / 30), lasts_s)
            at_s, count = at_s + lasts_s, count + 1


SHAPES: tuple[Shape, ...] = (nightly, heavy, bursts, drift, memoryless)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a way of polling costs and gives, after the days of learning.

    Attributes:
        per_h: polls per hour.
        waits_s: how long each change waited to be seen, sorted.
        ends_s: the same of ends only.
    """

    per_h: float
    waits_s: list[float]
    ends_s: list[float]

    @property
    def p95_s(self) -> float:
        """95 % of all changes were seen within this."""
        return _at(self.waits_s, 0.95)


def replay(lives: list[Life], pace: Pace, *, forecasts: bool = False) -> Outcome:
    """Poll through all days."""
    changes = sorted(
        (at_s, number, at_s == life.ended_s)
        for number, life in enumerate(lives)
        for at_s in (life.queued_s, life.started_s, life.ended_s)
    )
    index, random = Index(), Random(1)
    forecast = Forecast({}, pace) if forecasts else None
    now_s, last_s, place, polls = 0.0, 0.0, 0, 0
    waits_s: list[float] = []
    ends_s: list[float] = []
    while now_s < DAYS * DAY_S:
        first = place
        while place < len(changes) and changes[place][0] <= now_s:
            place += 1
        for number in {changes[each][1] for each in range(first, place)}:
            known = index.runs.get((lives[number].job, lives[number].run))
            transitions, then = diff(
                known, lives[number].seen(now_s), Observation(at_ms=_ms(now_s))
            )
            index.put(then, _ms(now_s))
            if forecast:
                forecast.learn(known, transitions, after_ms=_ms(last_s), at_ms=_ms(now_s))
        if now_s >= LEARNING_S:
            polls += 1
            waits_s += [now_s - at_s for at_s, _, _ in changes[first:place]]
            ends_s += [now_s - at_s for at_s, _, ended in changes[first:place] if ended]
        last_s = now_s
        due_s = forecast.due_s(index, _ms(now_s)) if forecast else None
        active = any(index.watched.values())
        now_s += pace.after_good(active=active, random=random, due_s=due_s)
    hours = (DAYS * DAY_S - LEARNING_S) / 3600
    return Outcome(polls / hours, sorted(waits_s), sorted(ends_s))


def report(shape: Shape) -> str:
    """What the forecast saves, and what it gives, on days of one shape."""
    lives = list(shape(Random(3)))
    fixed = replay(lives, _pace(INTERVAL_S))
    idle = replay(lives, _pace(INTERVAL_S, idle_interval_s=60.0))
    as_soon, soon_s = _as_soon_as(lives, fixed)
    as_often, often_s = _as_often_as(lives, fixed, soon_s * as_soon.per_h / fixed.per_h)
    fewer, sooner = as_soon.per_h / fixed.per_h, as_often.p95_s / fixed.p95_s
    return "\n".join(
        [
            f"{shape.__name__}: {shape.__doc__}",
            _line("fixed, 15 s", fixed),
            _line("idle 60 s", idle),
            _line(f"forecast, {soon_s:.1f} s", as_soon) + f"  polls x {fewer:.2f} at no later p95",
            _line(f"forecast, {often_s:.1f} s", as_often)
            + f"  p95 x {sooner:.2f} with no more polls",
        ]
    )


def _as_soon_as(lives: list[Life], fixed: Outcome) -> tuple[Outcome, float]:
    """The forecast that sees 95 % of changes no later, at the longest interval tried."""
    interval_s = 14.5
    while True:
        found = replay(lives, _pace(interval_s), forecasts=True)
        if found.p95_s <= fixed.p95_s:
            return found, interval_s
        interval_s -= 0.25


def _as_often_as(lives: list[Life], fixed: Outcome, interval_s: float) -> tuple[Outcome, float]:
    """The forecast that polls no more often, at about the shortest interval that allows it."""
    while True:
        found = replay(lives, _pace(interval_s), forecasts=True)
        if found.per_h <= fixed.per_h:
            return found, interval_s
        interval_s *= max(1.01, found.per_h / fixed.per_h)


def _pace(interval_s: float, idle_interval_s: float = 0.0) -> Pace:
    return Pace(
        interval_s=interval_s,
        idle_interval_s=idle_interval_s,
        retry_refused_s=300.0,
        max_interval_s=120.0,
    )


def _line(name: str, found: Outcome) -> str:
    ends_s = _at(found.ends_s, 0.95)
    return (
        f"  {name:17} {found.per_h:6.1f}/h  p50 {_at(found.waits_s, 0.5):4.1f} s"
        f"  p95 {found.p95_s:4.1f} s  max {found.waits_s[-1]:5.1f} s  p95 of ends {ends_s:4.1f} s"
    )


def _life(job: int, count: int, queued_s: float, wait_s: float, lasts_s: float) -> Life:
    started_s = queued_s + wait_s
    return Life(f"job {job}", f"run {count}", queued_s, started_s, started_s + max(1.0, lasts_s))


def _ms(second: float) -> int:
    return EPOCH_MS + round(second * 1000)


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    for each in SHAPES:
        print(report(each), flush=True)
