"""Datameer 2 to 11: one list of what runs, and histories for runs too short to be seen in it.

The list may show a run before its execution id. It has a provisional id then, and takes on the
real one as soon as an answer shows an execution of its configuration with the same start.

Follows "REST API Job Commands" of Datameer's documentation (v1 as of 7.0, v2 as of 7.2.5).
Timestamps carry no zone; status words, spellings and what is left out vary with the version.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import orjson
import pydantic

from poller.errors import Invalid
from poller.known import Known, Memory
from poller.payload import Table, decode, instant_ms
from poller.runs import TERMINAL, Job, Ms, Seen, State
from poller.settings import Seconds
from poller.wire import BadRow, Options, Page, Request, Response, Vendor, Words, look_up, refuse
from poller.world import Kind, SimRun, World


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


WORDS: Words = {
    "queued": (State.QUEUED, None),
    "waiting_for_other_job": (State.QUEUED, "waiting_for_other_job"),
    "running": (State.RUNNING, None),
    "aborting": (State.STOPPING, None),
    "completed": (State.SUCCEEDED, None),
    "completed_with_warnings": (State.SUCCEEDED, "warnings"),
    "error": (State.FAILED, None),
    "canceled": (State.CANCELED, None),
    "cancelled": (State.CANCELED, None),
}
NEVER_RUN = "_none"

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

R = TypeVar("R")
_Id = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Amount = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | float | _Text | None


class _Active(msgspec.Struct, gc=False):
    job: _Id = msgspec.field(name="dapJobConfigurationId")
    status: _Text = msgspec.field(name="jobStatus")
    execution: _Id | None = msgspec.field(name="jobExecutionId", default=None)
    began: _Text | None = msgspec.field(name="startTime", default=None)
    estimate: _Amount = msgspec.field(name="estimateTime", default=None)
    progress: _Amount = None


class _Past(msgspec.Struct, gc=False):
    id: _Id
    status: _Text = msgspec.field(name="jobStatus")


class _Artifact(msgspec.Struct, gc=False):
    id: _Id
    name: _Text | None = None


class _Execution(msgspec.Struct, rename="camel"):
    """Details in v1, and the status of a job in v1 or, its names in camel case, v2."""

    job_status: _Text = NEVER_RUN
    id: _Id | None = None
    job_execution_id: _Id | None = None
    start_time: _Text | None = None
    stop_time: _Text | None = None
    estimate_time: _Amount = None
    progress: _Amount = None
    job_progress: _Amount = None
    success_count: _Amount = None
    failure_count: _Amount = None
    counters: dict[_Text, _Amount] | None = None


_ACTIVE = Table(list[_Active], list[msgspec.Raw], _Active, lambda rows: rows, "$")
_PAST = Table(list[_Past], list[msgspec.Raw], _Past, lambda rows: rows, "$")
_NAMED = Table(list[_Artifact], list[msgspec.Raw], _Artifact, lambda rows: rows, "$")


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
    for place, job in enumerate(jobs):
        if _due(memory.now_ms, memory.last_good_ms, every_s, place / len(jobs)):
            requests.append(_history_of(_Sweep(str(job))))
    return requests


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
    rows, bad = _rows(response, _ACTIVE)
    named = {(str(row.job), str(row.execution)) for row in rows}
    found = [_active(options, row, named, memory) for row in rows if _has_run(row.status)]
    runs = [run for run in found if isinstance(run, Seen)]
    fresh = {str(row.job): UNREAD for row in rows if str(row.job) not in memory.marks}
    return Page(
        runs=runs,
        shown=[run for run in found if isinstance(run, Known)],
        follow=[_history_of(_Sweep(job)) for job in fresh],
        complete="",
        marks=_first((row.execution or 0 for row in rows), memory) | fresh,
        bad=bad,
    )


def _active(
    options: DatameerOptions, row: _Active, named: set[tuple[str, str]], memory: Memory
) -> Seen | Known:
    """A row as seen, or as known if unchanged; `named` are the runs that rows have ids for."""
    job, run_id = str(row.job), str(row.execution)
    fingerprint = hash((row.status, row.began))
    known = memory.get(job, run_id)
    if known is not None and known.fingerprint == fingerprint:
        return known
    began_ms, was = _instant(row.began, options.timezone), None
    if row.execution is None:
        others = (run for run in _watched(memory, job) if (job, run.run_id) not in named)
        same = _same(others, began_ms)
        run_id = same.run_id if same else f"{job}@{began_ms or 0}"
    elif known is None:
        was = _was(memory, job, began_ms)
    return msgspec.structs.replace(
        _seen(memory, job, run_id, row.status),
        started_ms=began_ms,
        progress=_share(row.progress),
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
    read = {path: str(memory.now_ms)}
    if response.status in (403, 404):
        return Page(marks=read, notes=[f"{path} is not to be read: HTTP {response.status}"])
    rows, bad = _rows(response, _NAMED)
    names = {f"name:{row.id}": row.name for row in rows if row.name}
    fresh = {str(row.id): UNREAD for row in rows if str(row.id) not in memory.marks}
    follow = [_history_of(_Sweep(job)) for job in fresh]
    return Page(follow=follow, marks=read | names | fresh, bad=bad)


def _history(asked: _Sweep, response: Response, memory: Memory) -> Page:
    job, first_contact = asked.job, memory.last_good_ms is None
    if response.status == 404:
        gone = [(job, run.run_id) for run in _watched(memory, job) if _provisional(run)]
        return Page(gone=gone, marks={job: "", f"name:{job}": ""})
    rows, bad = _rows(response, _PAST)
    rows.sort(key=lambda row: row.id)
    last = _dealt_with(job, memory)
    news = [row for row in rows if _is_news(job, row, last, memory)]
    # Any of them may be a run that has a provisional id; what had ended before first contact
    # is not. They are asked for again, and the mark stays below, until they are known.
    unsure = news if news and any(map(_provisional, _watched(memory, job))) else []
    unsure = [row for row in unsure if not (first_contact and _has_ended(row.status))]
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


def _is_news(job: str, row: _Past, last: int, memory: Memory) -> bool:
    """Whether a row tells something new: a run above `last`, or the end of one known as active."""
    known = memory.get(job, str(row.id))
    if known is None:
        return row.id > last and _has_run(row.status)
    return known.state not in TERMINAL and _has_ended(row.status)


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
    refuse(response)
    row = _execution(response.body)
    if not {row.id, row.job_execution_id} <= {None, int(run_id)}:
        # A job's status is that of its latest execution.
        raise Invalid(f"another execution than {run_id}", response.body)
    if not _has_run(row.job_status):
        return Page()
    began_ms = _instant(row.start_time, options.timezone)
    ended_ms = _instant(row.stop_time, options.timezone)
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
        ended_ms=ended_ms if _has_ended(row.job_status) else None,
        progress=_share(row.progress if row.job_progress is None else row.job_progress),
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


def _has_run(word: str) -> bool:
    return word.strip().lower() != NEVER_RUN


def _has_ended(word: str) -> bool:
    return look_up(WORDS, word).state in TERMINAL


def _rows(response: Response, table: Table[Any, R]) -> tuple[list[R], list[BadRow]]:
    """Good and bad rows; a list of one may come as that one, without its brackets."""
    refuse(response)
    body = response.body.strip()
    alone = body.startswith(b"{")
    if alone:
        _document(body)
    _, rows, bad = table.read(b"[%b]" % body if alone else body)
    if alone and bad:
        raise Invalid(f"neither a list nor a row: {bad[0][1]}", body)
    return rows, [BadRow(*row) for row in bad]


def _document(body: bytes) -> dict[str, Any]:
    """An object that is no error; v2 and proxies tell errors with status 200."""
    document = decode(body, dict[str, Any])
    error = document.get("error")
    if str(document.get("status")).strip().lower() == "failure":
        error = document.get("reason") or "failure"
    if error:
        raise Invalid(f"the server says: {str(error)[:256]}", body)
    return document


def _execution(body: bytes) -> _Execution:
    fields = {
        re.sub("-(.)", lambda found: found[1].upper(), name): value
        for name, value in _document(body).items()
    }
    try:
        return msgspec.convert(fields, _Execution)
    except msgspec.ValidationError as error:
        raise Invalid(f"not the documented shape: {error}", body) from error


def _instant(text: str | None, timezone: str) -> Ms | None:
    """A server-local `2011-05-19 22:35:39.0` or `Sep 28, 2018 6:44:56 PM`; None if neither.

    Newer Java writes the latter with one more comma and a narrow no-break space before PM.
    """
    plain, zone = " ".join((text or "").replace(",", " ").split()), ZoneInfo(timezone)
    with suppress(ValueError):
        at = datetime.datetime.fromisoformat(plain)
        return instant_ms(at if at.tzinfo else at.replace(tzinfo=zone))
    with suppress(ValueError):
        at = datetime.datetime.strptime(plain, "%b %d %Y %I:%M:%S %p").replace(tzinfo=zone)
        return instant_ms(at)
    return None


def _share(percent: _Amount) -> float | None:
    """Per cent as 0 to 1."""
    with suppress(ValueError):
        return None if percent is None else min(1.0, max(0.0, float(percent) / 100))
    return None


UNNAMED_MS = 300
"""For how long the simulated list shows a running execution without its id."""


def render(world: World, request: Request) -> Response:
    """Datameer's answer; with an odd seed a newer Datameer, which writes times the American way."""
    folder, _, number = request.path.rpartition("/")
    asked = int(number) if number.isascii() and number.isdigit() else 0
    if request.path == RUNNING:
        return _answer([_as_active(world, run) for run in world.active()])
    if request.path in ARTIFACTS:
        kind = ARTIFACTS.index(request.path)
        artifacts = [each for each in world.definitions if each.number % len(ARTIFACTS) == kind]
        return _answer(
            [{"id": each.number, "name": each.name, "description": ""} for each in artifacts]
        )
    if folder + "/" == DETAILS and asked in world.runs:
        return _answer(_as_details(world, world.runs[asked]))
    if folder + "/" == HISTORY and 0 < asked <= len(world.definitions):
        runs = [run for run in world.runs.values() if run.definition.number == asked]
        query = dict(request.query)
        first = int(query.get("start", 0))
        page = runs[::-1][first : first + int(query.get("length", PAGE_LENGTH))]
        return _answer([{"id": run.number, "jobStatus": _word(run)} for run in page])
    return Response(status=404, headers={"content-type": "text/html"}, body=b"<html></html>")


def _answer(document: object) -> Response:
    if isinstance(document, list) and len(document) == 1:
        document = document[0]
    headers = {"content-type": "application/json"}
    return Response(status=200, headers=headers, body=orjson.dumps(document))


def _as_active(world: World, run: SimRun) -> dict[str, Any]:
    row = {
        "dapJobConfigurationId": run.definition.number,
        "jobStatus": _word(run),
        "progress": int(100 * run.progress(world.now_ms)),
    }
    begun_ms = run.now.started_ms
    if begun_ms is None or world.now_ms - begun_ms >= UNNAMED_MS:
        row["jobExecutionId"] = run.number
    if begun_ms is not None:
        row |= {"startTime": _clock(world, begun_ms), "estimateTime": "11 sec"}
    return row


def _as_details(world: World, run: SimRun) -> dict[str, Any]:
    attempt, records = run.now, int(1000 * run.progress(world.now_ms))
    times = {"startTime": attempt.started_ms, "stopTime": attempt.ended_ms}
    return {
        **{name: _clock(world, at_ms) for name, at_ms in times.items() if at_ms is not None},
        "jobStatus": _word(run),
        "jobConfigurationId": run.definition.number,
        "file": {"id": run.definition.number + 2, "uuid": run.uuid},
        "successCount": records,
        "failureCount": int(run.now.state is State.FAILED),
        "counters": {"IMPORT_RECORDS": records, "IMPORT_DROPPED_RECORDS": int(attempt.warnings)},
    }


def _word(run: SimRun) -> str:
    if run.now.state is State.SUCCEEDED and run.now.warnings:
        return "COMPLETED_WITH_Warnings"
    return next(word for word, (state, _) in WORDS.items() if state is run.now.state).upper()


def _clock(world: World, at_ms: Ms) -> str:
    at = datetime.datetime.fromtimestamp(at_ms // 1000, datetime.UTC)
    if world.seed % 2:
        hour = at.hour % 12 or 12
        return f"{at:%b} {at.day}, {at.year}, {hour}:{at:%M:%S}\u202f{at:%p}"
    fraction = f"{at_ms % 1000:03}".rstrip("0") or "0"
    return f"{at:%Y-%m-%d %H:%M:%S}.{fraction}"


VENDOR = Vendor(
    name="datameer",
    options=DatameerOptions,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=(Kind(states=frozenset(state for state, _ in WORDS.values())),),
)
