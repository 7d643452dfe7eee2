"""Instances of batch jobs, listed by the times that they were planned for.

A poll asks for what is planned about now and for the times of the unfinished; now and then for the
whole past week. The list of batch jobs betrays other instances that moved (backfilled, started
again): then that job is asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from poller.errors import Invalid
from poller.events import rfc3339
from poller.known import Known, Memory
from poller.payload import epoch_ms
from poller.runs import TERMINAL, Job, Ms, Seen, State
from poller.vendors.dataarts import api, rows
from poller.vendors.dataarts.api import JobList, Options, Query
from poller.vendors.dataarts.rows import InstanceRow, JobRow, Row, Stamp
from poller.wire import Page, Request, Response

SORT = "batch"

_PAGE_SIZE = 1000
_MOST_INSTANCES = 500_000
_MINUTE, _DAY = 60_000, 86_400_000
_REACH = 7 * _DAY
"""How far back plan times may be asked for."""
_SPAN = 3 * _DAY
"""The longest window; editions of the documentation differ, this is the least."""
_MARGIN = 10 * _MINUTE
"""How far to look back behind the last good poll, and ahead of this one."""
_GAP = 360 * _MINUTE
"""Plan times nearer to each other than this are asked for together."""

_Window: TypeAlias = tuple[Ms, Ms]
"""First and last plan time."""
_Next: TypeAlias = tuple[list[Request], dict[str, str]]
"""What to ask and what to note."""


class InstanceList(msgspec.Struct, frozen=True):
    """Asks for a page of the instances planned in the first of these windows.

    Attributes:
        whole: the windows are the whole week.
        job: asks for those of this job only.
        last: what the list of jobs says of its last instance.
        offset: number of the page, from 0.
        read: rows of the pages before.
        instances: those that this poll has shown.
    """

    windows: tuple[_Window, ...]
    whole: bool = False
    job: str = ""
    last: str = ""
    offset: int = 0
    read: frozenset[object] = frozenset()
    instances: tuple[InstanceRow, ...] = ()


def sweep(options: Options, memory: Memory) -> Request:
    """The whole week if that is due, since nothing else shows what was restarted long after."""
    week, swept_ms = _week(memory), int(memory.marks.get("swept", 0))
    since_s = (memory.now_ms - swept_ms) / 1000  # less than nothing: our clock was set back
    if memory.last_good_ms is None or not 0 <= since_s < memory.resync_s:
        return _ask(options, InstanceList(_pieces([week]), whole=True))
    recent = (min(memory.last_good_ms, memory.now_ms) - _MARGIN, week[1])
    windows = _within(week, _merged([recent, *_unfinished(memory)]))
    return _ask(options, InstanceList(_pieces(windows)))


def _week(memory: Memory) -> _Window:
    return max(0, memory.now_ms - _REACH), memory.now_ms + _MARGIN


def _merged(windows: Iterable[_Window]) -> list[_Window]:
    merged: list[_Window] = []
    for low, high in sorted(windows):
        if merged and low - merged[-1][1] <= _GAP:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _within(week: _Window, windows: Iterable[_Window]) -> list[_Window]:
    """What may be asked for of these windows."""
    first, last = week
    cut = ((max(low, first), min(high, last)) for low, high in windows)
    return [(low, high) for low, high in cut if low <= high]


def _pieces(windows: Iterable[_Window]) -> tuple[_Window, ...]:
    """The same in pieces that the vendor takes, newest first."""
    pieces: list[_Window] = []
    for low, high in windows:
        pieces += [(at, min(high, at + _SPAN - 1)) for at in range(low, high + 1, _SPAN)]
    return tuple(reversed(pieces))


def _ask(options: Options, asked: InstanceList) -> Request:
    low, high = asked.windows[0]
    query: Query = (("jobName", asked.job), ("preciseQuery", "true")) if asked.job else ()
    query += (("minPlanTime", str(low)), ("maxPlanTime", str(high)))
    query += (("offset", str(asked.offset)), ("limit", str(_PAGE_SIZE)))
    return api.get(options, asked, "instances", "detail", query=query, by_id=asked.job != "")


def read_instances(
    options: Options, asked: InstanceList, response: Response, memory: Memory
) -> Page:
    """Read a page of instances.

    Raises:
        VendorError: it is no page of instances.
    """
    page, instances, bad = api.read(rows.INSTANCES, response)
    read = api.read_so_far(asked.read, asked.offset, instances, bad)
    hidden, fresh = page.total - len(read), len(read) - len(asked.read)
    (low, high), *later = asked.windows
    if hidden > 0 and asked.offset == 0 and fresh >= _PAGE_SIZE and low < high:
        # Narrower windows leave no doubt of what was read, as pages with a vague `offset` would.
        middle = (low + high) // 2
        halves = replace(asked, windows=((middle + 1, high), (low, middle), *later))
        return Page(follow=[_ask(options, halves)])
    news, shown = rows.sift(instances, memory)
    seen = [
        see(rows.job_of(row), row.ids[1], row, known)
        for row, known in news
        if known is not None or not _is_past_retention(row, memory)
    ]
    asked = replace(asked, instances=(*asked.instances, *instances))
    if len(asked.instances) > _MOST_INSTANCES:
        raise Invalid(f"more than {_MOST_INSTANCES} instances within a week")
    marks: dict[str, str] = {}
    notes = []
    if hidden > 0 and fresh:
        follow = [_ask(options, replace(asked, offset=asked.offset + 1, read=read))]
    else:
        asked = replace(asked, windows=tuple(later), offset=0, read=frozenset())
        follow, marks = _after_window(options, asked, memory)
        if hidden > 0:
            notes = [f"{hidden} instances planned since {rfc3339(low)} are counted but not shown"]
    return Page(runs=seen, shown=shown, follow=follow, marks=marks, bad=bad, notes=notes)


def _after_window(options: Options, asked: InstanceList, memory: Memory) -> _Next:
    """The next window; after the last one what to note, and the list of jobs."""
    if asked.windows:
        return [_ask(options, asked)], {}
    if asked.job:
        return [], {f"last:{asked.job}": asked.last, **note_unfinished(asked.instances, memory)}
    marks = {"swept": str(memory.now_ms)} if asked.whole else {}
    jobs = JobList(SORT, instances=asked.instances)
    return [api.ask_jobs(options, jobs)], marks | _noted(asked.instances, memory)


def _is_past_retention(row: InstanceRow, memory: Memory) -> bool:
    last_ms = row.ended_ms or epoch_ms(row.plan_time) or memory.now_ms
    return row.state in TERMINAL and last_ms < memory.since_ms


def note_unfinished(instances: Iterable[Row], memory: Memory) -> dict[str, str]:
    """The mark of the plan times of unfinished instances, these beside those noted before."""
    return _noted(instances, memory, _unfinished(memory))


def _noted(
    instances: Iterable[Row], memory: Memory, before: Iterable[_Window] = ()
) -> dict[str, str]:
    plans = (epoch_ms(row.plan_time) for row in instances if row.state not in TERMINAL)
    unfinished = [*before, *((plan, plan) for plan in plans if plan)]
    windows = _merged(_within(_week(memory), unfinished))
    return {"unfinished": " ".join(f"{low}-{high}" for low, high in windows)}


def _unfinished(memory: Memory) -> list[_Window]:
    parts = (part.split("-") for part in memory.marks.get("unfinished", "").split())
    return [(int(low), int(high)) for low, high in parts]


def read_jobs(options: Options, asked: JobList, response: Response, memory: Memory) -> Page:
    """Read a page of the list of jobs.

    Raises:
        VendorError: it is no page of jobs.
    """
    jobs, bad, follow, _ = api.read_jobs(options, asked, response)
    questions, marks = _moved(options, jobs, asked.instances, memory)
    return Page(follow=follow + questions, marks=marks, bad=bad)


def _moved(
    options: Options, jobs: Iterable[JobRow], instances: Iterable[InstanceRow], memory: Memory
) -> _Next:
    """Questions to jobs whose last instance moved, unless this poll has shown that instance."""
    lasts = {job.name: _last(job.last_instance_status, job.last_instance_end_time) for job in jobs}
    moved = {k: v for k, v in lasts.items() if memory.marks.get(f"last:{k}", "") != v}
    shown = {(row.job_name, _last(row.status, row.end_time)) for row in instances if moved}
    questions, marks = [], {}
    for name, last in moved.items():
        if memory.last_good_ms is None or not last or (name, last) in shown:
            marks[f"last:{name}"] = last
        else:
            asked = InstanceList(_pieces([_week(memory)]), job=name, last=last)
            questions.append(_ask(options, asked))
    return questions, marks


def _last(word: str | None, end_time: Stamp) -> str:
    return f"{(word or '').strip().lower()} {epoch_ms(end_time) or ''}".strip()


def see(job: Job, run_id: str, row: Row, known: Known | None) -> Seen:
    """What a row, or the instance's own page, shows of an instance."""
    seen = rows.see(SORT, job, run_id, row, known)
    if seen.state is State.SUCCEEDED and (row.force_success or row.ignore_success):
        seen = replace(seen, substate="forced" if row.force_success else "failure_ignored")
    if seen.state in TERMINAL:
        seen = replace(seen, ordinal=_restarted(known, seen.started_ms))
    return seen


def _restarted(known: Known | None, started_ms: Ms | None) -> int | None:
    """The next attempt's number, if an instance that had ended started after that end."""
    if known is None or not known.ended_ms or (started_ms or 0) <= known.ended_ms:
        return None
    return known.attempt + 1
