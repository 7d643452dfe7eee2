"""Datameer 2 to 11: one list of what runs, and histories for runs too short to be seen in it.

The list may show a run before its execution id. It has a provisional id then, and takes on the
real one as soon as an answer shows an execution of its configuration with the same start.

Follows "REST API Job Commands" of Datameer's documentation (v1 as of 7.0, v2 as of 7.2.5).
Timestamps carry no zone; status words, spellings and what is left out vary with the version.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated
from zoneinfo import ZoneInfo

import msgspec
import pydantic

from poller.errors import Invalid
from poller.known import Known, Memory, key_of
from poller.runs import TERMINAL, Job, Ms, Seen, State
from poller.settings import Seconds
from poller.simulated.datameer import KINDS, render
from poller.vendors.datameer.rows import (
    ACTIVE,
    NAMED,
    PAST,
    WORDS,
    Active,
    Past,
    has_ended,
    has_run,
    instant,
    read,
    read_execution,
    share,
)
from poller.wire import Options, Page, Request, Response, Vendor, look_up


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError("no such time zone; names are such as Europe/Berlin") from error
    return name


class DatameerOptions(Options):
    """Datameer's own settings.

    Attributes:
        timezone: IANA name of the zone in which the server writes its timestamps.
        jobs: ids of the configurations whose histories are swept; none: all that turn up.
        sweep_interval: every history is read once in this time, in so far as the rate allows.
    """

    timezone: Annotated[str, pydantic.AfterValidator(_zone)] = "UTC"
    jobs: tuple[pydantic.PositiveInt, ...] = pydantic.Field(default=(), strict=False)
    sweep_interval: Seconds = 60.0


RUNNING = "/rest/jobs/list-running"
HISTORY = "/rest/job-configuration/job-history/"
DETAILS = "/rest/job-execution/job-details/"
ARTIFACTS = ("/rest/import-job", "/rest/workbook", "/rest/export-job")
PAGE_LENGTH = 10
LAST_START = 490
"""Where the last page of a history begins that is read."""
MOST_COUNTERS = 12

# The mark "17" is the newest execution dealt with of configuration 17, "name:17" its name, and
# "/rest/workbook" when the workbooks were listed last.
UNREAD = "?"
"""A configuration's mark until its history was read."""
FIRST = "first"
"""Mark: the highest execution id shown at first contact."""


class _Sweep(msgspec.Struct, frozen=True):
    """Asks for a page of a configuration's history; `newest` is on its way to be the mark."""

    job: str
    start: int = 0
    newest: int = 0


class _Look(msgspec.Struct, frozen=True):
    """Asks for an execution of a configuration."""

    job: str
    execution: str


def start(options: DatameerOptions, memory: Memory) -> list[Request]:
    """What runs now; once in a resync the artifacts; the histories whose turn it is."""
    requests = [Request(path=RUNNING)]
    if not options.jobs:
        for path in ARTIFACTS:
            read_ms = int(memory.marks[path]) if path in memory.marks else None
            if _due(memory.now_ms, read_ms, memory.resync_s):
                requests.append(Request(path=path, by_id=True))
    jobs = sorted(options.jobs or [int(key) for key in memory.marks if key.isdigit()])
    every_s = max(options.sweep_interval, len(jobs) / (0.8 * memory.rate_per_s))
    turns = _turns(len(jobs), memory.now_ms, memory.last_good_ms, every_s)
    due = (
        place
        for place in turns
        if _due(memory.now_ms, memory.last_good_ms, every_s, place / len(jobs))
    )
    requests.extend(_history_of(_Sweep(str(jobs[place]))) for place in due)
    return requests


def _turns(count: int, now_ms: Ms, last_ms: Ms | None, every_s: float) -> Iterable[int]:
    """The places among which those are that are due: of many, few have their turn in one poll."""
    if last_ms is None or not 0 <= now_ms - last_ms < 500 * every_s:
        return range(count)
    first, last = (int(at_ms / 1000 / every_s % 1 * count) for at_ms in (last_ms, now_ms))
    if last < first:
        last += count
    return sorted({place % count for place in range(first - 1, last + 2)}) if count else ()


def _due(now_ms: Ms, last_ms: Ms | None, every_s: float, phase: float = 0.0) -> bool:
    """Whether a period, put off by this share of it, began since the last time."""
    if last_ms is None:
        return True
    now, last = (at / 1000 / every_s - phase for at in (now_ms, last_ms))
    return now // 1 != last // 1


def _history_of(asked: _Sweep, *, spread: bool = True) -> Request:
    query = (("start", str(asked.start)), ("length", str(PAGE_LENGTH)))
    path = HISTORY + asked.job
    return Request(path=path, query=query, by_id=True, spread=spread, context=asked)


def _details_of(job: str, execution: str) -> Request:
    return Request(path=DETAILS + execution, by_id=True, context=_Look(job, execution))


def settle(options: DatameerOptions, known: Known) -> Request:
    """The run's details; for a provisional run the history, where it must be found first."""
    if _provisional(known):
        return _history_of(_Sweep(known.job.id), spread=False)
    return _details_of(known.job.id, known.run_id)


def ask(options: DatameerOptions, known: Known | None, seen: Seen) -> Request | None:
    """The details, for the times, where only the history told of a run."""
    timed = seen.started_ms is not None or seen.ended_ms is not None
    if timed or _provisional(seen) or seen.state is State.QUEUED:
        return None
    return _details_of(seen.job.id, seen.run_id)


def parse(options: DatameerOptions, request: Request, response: Response, memory: Memory) -> Page:
    """Read any answer.

    Raises:
        VendorError: it is not as documented, or an error, which may come with status 200.
    """
    match request.context:
        case _Sweep() as asked:
            return _history(asked, response, memory)
        case _Look() as asked:
            return _details(options, asked, response, memory)
        case _ if request.path == RUNNING:
            return _listing(options, response, memory)
        case _:
            return _discovery(request.path, response, memory)


def _listing(options: DatameerOptions, response: Response, memory: Memory) -> Page:
    rows, bad = read(ACTIVE, response)
    named = {(str(row.job), str(row.execution)) for row in rows}
    found = [_active(options, row, named, memory) for row in rows if has_run(row.status)]
    runs = [run for run in found if isinstance(run, Seen)]
    shares = {key_of(str(row.job), str(row.execution)): share(row.progress) for row in rows}
    fresh = {str(row.job): UNREAD for row in rows if str(row.job) not in memory.marks}
    return Page(
        runs=runs,
        shown=[run for run in found if isinstance(run, Known)],
        progress={key: done for key, done in shares.items() if done is not None},
        follow=[_history_of(_Sweep(job)) for job in fresh],
        complete="",
        marks=_first((row.execution or 0 for row in rows), memory) | fresh,
        bad=bad,
        lasting=True,
    )


def _active(
    options: DatameerOptions, row: Active, named: set[tuple[str, str]], memory: Memory
) -> Seen | Known | None:
    """A row as seen, or as known if unchanged; `named` are the runs that rows have ids for.

    None where a row without id may be of a run that was queued, or of the next one: that run then
    counts as missing, so that its details are asked for, which tell.
    """
    job, run_id = str(row.job), str(row.execution)
    fingerprint = hash((row.status, row.began))
    known = memory.get(job, run_id)
    if known is not None and known.fingerprint == fingerprint and not known.vanished:
        return known
    began_ms, was = instant(row.began, options.timezone), None
    if row.execution is None:
        others = (run for run in _watched(memory, job) if (job, run.run_id) not in named)
        same = _same(others, began_ms)
        if same and began_ms is not None and same.started_ms is None and not _provisional(same):
            return None
        run_id = same.run_id if same else f"{job}@{began_ms or 0}"
    elif known is None:
        was = _was(memory, job, began_ms)
    return msgspec.structs.replace(
        _seen(memory, job, run_id, row.status),
        started_ms=began_ms,
        progress=share(row.progress),
        detail={} if row.estimate is None else {"estimate_time": row.estimate},
        was=was,
        fingerprint=fingerprint,
    )


def _watched(memory: Memory, job: str) -> Iterable[Known]:
    return (run for run in memory.active() if run.job.id == job)


def _provisional(run: Known | Seen) -> bool:
    return "@" in run.run_id


def _same(runs: Iterable[Known], began_ms: Ms | None) -> Known | None:
    """Which run began in that second (some formats cut to it), else one not known to have begun."""
    unbegun = None
    for run in runs:
        if run.started_ms is None:
            unbegun = unbegun or run
        elif began_ms is not None and run.started_ms // 1000 == began_ms // 1000:
            return run
    return unbegun


def _was(memory: Memory, job: str, began_ms: Ms | None) -> str | None:
    """The provisional id of an execution not known yet, also if it was given up meanwhile."""
    run = memory.get(job, f"{job}@{began_ms}") or _same(
        filter(_provisional, _watched(memory, job)), began_ms
    )
    return run.run_id if run else None


def _discovery(path: str, response: Response, memory: Memory) -> Page:
    marks = {path: str(memory.now_ms)}
    if response.status in (403, 404):
        return Page(marks=marks, notes=[f"{path} is not to be read: HTTP {response.status}"])
    rows, bad = read(NAMED, response)
    marks |= {f"name:{row.id}": row.name for row in rows if row.name}
    fresh = {str(row.id): UNREAD for row in rows if str(row.id) not in memory.marks}
    follow = [_history_of(_Sweep(job)) for job in fresh]
    return Page(follow=follow, marks=marks | fresh, bad=bad)


def _history(asked: _Sweep, response: Response, memory: Memory) -> Page:
    job, first_contact = asked.job, memory.last_good_ms is None
    if response.status == 404:
        gone = [(job, run.run_id) for run in _watched(memory, job) if _provisional(run)]
        return Page(gone=gone, marks={job: "", f"name:{job}": ""})
    rows, bad = read(PAST, response)
    rows.sort(key=lambda row: row.id)
    last = _dealt_with(job, memory)
    news = [row for row in rows if _is_news(job, row, last, memory)]
    # Any unknown one may be a run that has a provisional id. They are asked for again, and the
    # mark stays below, until they are known.
    unnamed = any(map(_provisional, _watched(memory, job)))
    unsure = [row for row in news if unnamed and memory.get(job, str(row.id)) is None]
    runs = [_seen(memory, job, str(row.id), row.status) for row in news if row not in unsure]
    follow = [_details_of(job, str(row.id)) for row in unsure]
    newest = asked.newest or max((row.id for row in rows), default=0)
    newest = min([newest, *(row.id - 1 for row in unsure)])
    marks, notes = _first((row.id for row in rows), memory), []
    full = len(rows) + len(bad) >= PAGE_LENGTH and not (rows and rows[0].id <= last)
    if full and asked.start < LAST_START and (memory.publish_all or not first_contact):
        follow.append(_history_of(_Sweep(job, asked.start + PAGE_LENGTH, newest)))
    else:
        marks[job] = str(max(newest, last))
        if full and asked.start >= LAST_START:
            notes = [f"configuration {job} ran more often than is read back; the rest is not told"]
    return Page(runs=runs, follow=follow, marks=marks, bad=bad, notes=notes)


def _dealt_with(job: str, memory: Memory) -> int:
    """The newest execution of a configuration up to which none is news."""
    mark = memory.marks.get(job, UNREAD)
    if mark != UNREAD:
        return int(mark)
    if memory.last_good_ms is None or memory.publish_all:
        return 0
    return int(memory.marks.get(FIRST, "0"))


def _is_news(job: str, row: Past, last: int, memory: Memory) -> bool:
    """Whether a row tells something new: a run above `last`, or the end of one known as active."""
    known = memory.get(job, str(row.id))
    if known is None:
        return row.id > last and has_run(row.status)
    return known.state not in TERMINAL and has_ended(row.status)


def _first(executions: Iterable[int], memory: Memory) -> dict[str, str]:
    """The mark that bounds what had been executed when first contact was made."""
    before = int(memory.marks.get(FIRST, "0"))
    highest = max(executions, default=0)
    return {FIRST: str(highest)} if memory.last_good_ms is None and highest > before else {}


def _details(options: DatameerOptions, asked: _Look, response: Response, memory: Memory) -> Page:
    job, run_id = asked.job, asked.execution
    known = memory.get(job, run_id)
    if response.status == 404 and known is not None:
        return Page(gone=[(job, run_id)])
    row = read_execution(response)
    if not {row.id, row.job_execution_id} <= {None, int(run_id)}:
        # A job's status is that of its latest execution.
        raise Invalid(f"another execution than {run_id}", response.body)
    if not has_run(row.job_status):
        return Page()
    began_ms = instant(row.start_time, options.timezone)
    ended_ms = instant(row.stop_time, options.timezone)
    counters = list((row.counters or {}).items())[:MOST_COUNTERS]
    detail = {
        "estimate_time": row.estimate_time,
        "success_count": row.success_count,
        "failure_count": row.failure_count,
        **{f"counters.{name}": count for name, count in counters},
    }
    seen = msgspec.structs.replace(
        _seen(memory, job, run_id, row.job_status),
        started_ms=began_ms,
        ended_ms=ended_ms if has_ended(row.job_status) else None,
        progress=share(row.progress if row.job_progress is None else row.job_progress),
        detail={name: value for name, value in detail.items() if value is not None},
        was=_was(memory, job, began_ms) if known is None else None,
    )
    return Page(runs=[seen])


def _seen(memory: Memory, job: str, run_id: str, word: str) -> Seen:
    state, substate, unmapped = look_up(WORDS, word)
    return Seen(
        job=Job(id=job, name=memory.marks.get(f"name:{job}")),
        run_id=run_id,
        state=state,
        vendor_state=word,
        substate=substate,
        unmapped=unmapped,
    )


VENDOR = Vendor(
    name="datameer",
    options=DatameerOptions,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=KINDS,
)
