"""Apache Kylin: the job list of Kylin 5 and that of Kylin 4, which share a path and little else.

A job is its own run, and the list holds finished ones too: a feed, what changed last comes first.
A poll reads until it meets finished jobs that it knows; now and then it sweeps the past week.
As either server ignores the other's parameters, both are asked in one question, and the answer
tells them apart.

Follows pfzhan/kylin kylin5 a8db75afa04a (2024-09-23): JobController, NBasicController,
JobInfoService, JobFilterUtil, ExecutableResponse; apache/kylin v4.0.5-release: JobController,
JobService, JobInfoConverter; and kylin.apache.org/docs/restapi/job_api.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Generic, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec
import pydantic
from msgspec.structs import replace

from poller import wire
from poller.errors import Invalid, Rejected, Unreachable, VendorError
from poller.known import Known, Memory
from poller.payload import Table, decode, epoch_ms
from poller.runs import TERMINAL, Job, Problem, Scalar, Seen, State
from poller.wire import BadRow, Page, Request, Response, Vendor, Words, look_up, refuse
from poller.world import Kind, SimRun, World


class Options(wire.Options):
    """Kylin's own settings.

    Attributes:
        projects: whose jobs to follow, one list each; empty: all projects' jobs in one list.
    """

    projects: tuple[str, ...] = pydantic.Field(default=(), strict=False)


WORDS: Words = {
    "new": (State.QUEUED, None),
    "pending": (State.QUEUED, None),
    "ready": (State.QUEUED, None),
    "starting": (State.STARTING, None),
    "running": (State.RUNNING, None),
    "stopped": (State.SUSPENDED, None),
    "paused": (State.SUSPENDED, None),
    "stopping": (State.STOPPING, None),
    "finished": (State.SUCCEEDED, None),
    "succeed": (State.SUCCEEDED, None),
    "warning": (State.SUCCEEDED, "warnings"),
    "skip": (State.SUCCEEDED, "skipped"),
    "error": (State.FAILED, None),
    "launching_error": (State.FAILED, None),
    "discarded": (State.CANCELED, None),
    "suicidal": (State.CANCELED, "killed_by_system"),
}

PAGE_SIZE = 200
_MOST_PAGES = 1000
_DAY, _WEEK, _MONTH, _ALL = 0, 1, 2, 4
"""What Kylin 5 takes for time_filter."""
_HEADERS = (
    ("Accept", "application/vnd.apache.kylin-v4-public+json, application/json;q=0.5"),
    ("Accept-Language", "en"),
)
_KE = re.compile(r"KE-\d{9}")
_REFUSED = ("KE-010003", "KE-010024")
"""Families of codes: missing, wrong or locked credentials; no access."""
_TRANSIENT = ("KE-000000001", "KE-010019002", "KE-010021006")
"""An unexpected exception; the database or the directory of users out of reach."""
_DENIED = re.compile(r"access (is )?denied|\b(user|account)\b.*\blocked", re.IGNORECASE)

T = TypeVar("T")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Stamp: TypeAlias = int | float | str | None


class _Step(msgspec.Struct):
    """A step of a job; only Kylin 5 says why it failed, and only when asked for the details."""

    name: str | None = None
    step_status: str | None = None
    info: dict[str, str] | None = None
    failed_step_name: str | None = None
    failed_code: str | None = None
    failed_reason: str | None = None
    failed_msg: str | None = None


class _Steps(msgspec.Struct):
    """The steps, where they come wrapped."""

    steps: list[_Step] = []


class _Row(msgspec.Struct, kw_only=True):
    """A job as Kylin 5 shows it; times are epoch ms, 0 where they are not set."""

    version: ClassVar[str] = "5"
    full: ClassVar[float] = 1.0

    id: _Id
    job_status: _Text
    scheduler_state: _Text | None = None
    job_name: _Text | None = None
    project: _Text | None = None
    submitter: _Text | None = None
    target_subject: _Text | None = None
    tag: Any = None
    progress: float | str | None = msgspec.field(default=None, name="step_ratio")
    create_time: _Stamp = None
    exec_start_time: _Stamp = None
    exec_end_time: _Stamp = None
    steps: list[_Step] | None = None


class _Row4(_Row, kw_only=True):
    """A job as Kylin 4 shows it: some names differ, it has no create_time, but its steps."""

    version: ClassVar[str] = "4"
    full: ClassVar[float] = 100.0

    id: _Id = msgspec.field(name="uuid")
    job_name: _Text | None = msgspec.field(default=None, name="name")
    project: _Text | None = msgspec.field(default=None, name="projectName")
    target_subject: _Text | None = msgspec.field(default=None, name="related_cube")
    progress: float | str | None = msgspec.field(default=None, name="progress")


class _Envelope(msgspec.Struct, Generic[T]):
    code: str
    data: T | None = None
    msg: str | None = None
    error_code: str | None = None


class _List(msgspec.Struct, Generic[T]):
    value: list[T]
    total_size: int


_LIST = Table(
    _Envelope[_List[_Row]],
    _Envelope[_List[msgspec.Raw]],
    _Row,
    lambda answer: answer.data.value if answer.data else [],
    "$.data.value",
)
_LIST4 = Table(list[_Row4], list[msgspec.Raw], _Row4, list, "$")


class _Asked(msgspec.Struct, frozen=True):
    """A page of a project's list; a `whole` list is read to its end, its first page `again`."""

    project: str
    window: int
    whole: bool
    page: int = 0
    again: bool = False


def start(options: Options, memory: Memory) -> Sequence[Request]:
    """The first page of each list: what changed since the last good poll, a week for a sweep."""
    window = _ALL
    if memory.last_good_ms is not None:
        hours = (memory.now_ms - memory.last_good_ms) / 3_600_000
        reach = ((20, _DAY), (6 * 24, _WEEK), (27 * 24, _MONTH))
        window = next((window for limit, window in reach if hours < limit), _ALL)
    requests = []
    for project in options.projects or ("",):
        swept_s = (memory.now_ms - int(memory.marks.get(f"swept:{project}", 0))) / 1000
        if not 0 <= swept_s < memory.resync_s:
            requests.append(_question(_Asked(project, max(window, _WEEK), whole=True)))
        else:
            requests.append(_question(_Asked(project, window, whole=not memory.whole)))
    return requests


def _question(asked: _Asked) -> Request:
    query = [
        ("time_filter", str(asked.window)),
        ("page_offset", str(asked.page)),  # counts pages
        ("page_size", str(PAGE_SIZE)),
        ("sort_by", "last_modified"),
        ("reverse", "true"),
        # Kylin 4 counts the windows from 1, and looks at when a job was created, too: one wider.
        ("timeFilter", str(min(asked.window + 2, 5))),
        ("offset", str(asked.page * PAGE_SIZE)),  # counts rows
        ("limit", str(PAGE_SIZE)),
        ("jobSearchMode", "ALL"),
    ]
    if asked.project:
        query += [("project", asked.project), ("projectName", asked.project)]
    return Request(path="/api/jobs", query=tuple(query), headers=_HEADERS, context=asked)


def parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    """Read a page of a list, one job that was asked for, or the steps of a failed one."""
    asked = request.context
    if isinstance(asked, _Asked):
        return _read_list(asked, response, memory)
    if isinstance(asked, Known):
        return _read_job(asked, response)
    _refuse(response)
    steps = _data(decode(response.body, _Envelope[list[_Step] | _Steps]))
    return Page(runs=[_blamed(asked, steps.steps if isinstance(steps, _Steps) else steps)])


def _read_list(asked: _Asked, response: Response, memory: Memory) -> Page:
    """Read on until finished jobs come that were known, or to the end of a list read whole."""
    rows, bad, more = _rows(response, asked.page)
    project = asked.project.lower()
    if project and any((row.project or project).lower() != project for row in rows):
        # Kylin 4 then lists those of all.
        raise Invalid(f"there is no project {asked.project!r}")
    runs, shown, caught_up = _sift(rows, memory)
    follow, marks, notes = [], {}, []
    if more and asked.page + 1 >= _MOST_PAGES:
        more, notes = False, [f"jobs behind the {_MOST_PAGES}th page were not read"]
    if more and (asked.whole or not caught_up) and not asked.again:
        follow = [_question(replace(asked, page=asked.page + 1))]
    elif asked.page:
        # What changed while the list was read has moved to its front.
        follow = [_question(replace(asked, page=0, again=True))]
    elif asked.whole and asked.window >= _WEEK:
        marks = {f"swept:{asked.project}": str(memory.now_ms)}
    return Page(runs=runs, shown=shown, follow=follow, marks=marks, bad=bad, notes=notes)


def _rows(response: Response, page: int = 0) -> tuple[Sequence[_Row], list[BadRow], bool]:
    """Good rows, bad ones, and whether there are more behind them."""
    _refuse(response)
    rows: Sequence[_Row]
    if response.body[:64].lstrip().startswith(b"["):
        _, rows, bad = _LIST4.read(response.body)
        more = len(rows) + len(bad) >= PAGE_SIZE
    else:
        answer, rows, bad = _LIST.read(response.body)
        more = (page + 1) * PAGE_SIZE < _data(answer).total_size and bool(rows or bad)
    return rows, [BadRow(*place) for place in bad], more


def _sift(rows: Sequence[_Row], memory: Memory) -> tuple[list[Seen], list[Known], bool]:
    """Changed runs, unchanged ones, and whether finished ones are among those that come last.

    Behind a finished job that has not changed, nothing has. An unfinished one proves nothing: it
    comes to the front with each of its steps.
    """
    runs, shown, caught_up = [], [], False
    for row in rows:
        known, fingerprint = memory.get(row.id, row.id), _fingerprint(row)
        if known is not None and known.fingerprint == fingerprint and not known.vanished:
            shown.append(known)
            caught_up = caught_up or known.state in TERMINAL
            continue
        caught_up = False
        runs.append(_seen(row, fingerprint))
    return runs, shown, caught_up


def _read_job(known: Known, response: Response) -> Page:
    """The job, or that there is none: Kylin 4's empty answer, Kylin 5's list without it."""
    rows: Sequence[_Row]
    bad: list[BadRow] = []
    if known.scope == "4":
        if response.status in (406, 500):
            # It has become a Kylin 5, or something went wrong: one error for everything.
            return Page()
        _refuse(response)
        none = not response.body.strip()
        rows = [] if none else [decode(response.body, _Row4)]
    else:
        rows, bad, more = _rows(response)
        none = not more and not bad
    runs = [_seen(row, _fingerprint(row)) for row in rows if row.id == known.run_id]
    gone = [(known.job.id, known.run_id)] if none and not runs else []
    return Page(runs=runs, gone=gone, bad=bad)


def settle(options: Options, known: Known) -> Request:
    """The job by its id, from the Kylin that showed it last; 5 has no better way than a search."""
    if known.scope == "4":
        path, query = f"/api/jobs/{quote(known.run_id, safe='')}", []
    else:
        path, query = "/api/jobs", [("time_filter", str(_ALL)), ("key", known.run_id)]
        query += [("page_offset", "0"), ("page_size", str(PAGE_SIZE))]
    return Request(path=path, query=tuple(query), headers=_HEADERS, by_id=True, context=known)


def ask(options: Options, known: Known | None, seen: Seen) -> Request | None:
    """The steps of a failed job, which tell why; Kylin 4's list has shown them already."""
    if seen.state is not State.FAILED or seen.scope == "4" or not seen.job.group:
        return None
    path = f"/api/jobs/{quote(seen.run_id, safe='')}/detail"
    query = (("project", seen.job.group),)
    return Request(path=path, query=query, headers=_HEADERS, by_id=True, context=seen)


def _fingerprint(row: _Row) -> int:
    times = (row.create_time, row.exec_start_time, row.exec_end_time)
    return hash((row.job_status, row.scheduler_state, times))


def _seen(row: _Row, fingerprint: int) -> Seen:
    state, substate, unmapped = look_up(WORDS, row.job_status)
    finer = look_up(WORDS, row.scheduler_state or "")
    queued_ms, started_ms = epoch_ms(row.create_time), epoch_ms(row.exec_start_time)
    # Set whenever it stops running, if only to wait; with the start, if discarded before that.
    stopped_ms = epoch_ms(row.exec_end_time)
    if state is State.CANCELED and started_ms == stopped_ms:
        started_ms = None
    done = row.progress
    detail = {"target_subject": row.target_subject, "tag": row.tag}
    seen = Seen(
        job=Job(id=row.id, name=row.job_name, group=row.project, owner=row.submitter),
        run_id=row.id,
        state=state,
        vendor_state=row.job_status,
        substate=finer.substate if finer.state is state and finer.substate else substate,
        marker=None if queued_ms is None else str(queued_ms),
        queued_ms=queued_ms,
        started_ms=started_ms,
        ended_ms=stopped_ms if state in TERMINAL else None,
        progress=done / row.full if isinstance(done, float) and 0 <= done <= row.full else None,
        detail=_scalars(detail),
        scope=row.version,
        unmapped=unmapped,
        fingerprint=fingerprint,
    )
    return _blamed(seen, row.steps or ()) if state is State.FAILED else seen


def _blamed(seen: Seen, steps: Sequence[_Step]) -> Seen:
    """The same run with the step that failed, and why: first lines only, no stack traces."""
    failed = (step for step in steps if look_up(WORDS, step.step_status or "")[0] is State.FAILED)
    step = next(failed, None)
    if step is None:
        return seen
    info, name = step.info or {}, step.failed_step_name or step.name
    reasons = [_first_line(text) for text in (step.failed_reason, step.failed_msg) if text]
    message = "; ".join(dict.fromkeys(reasons)) or f"step {name} failed"
    code = _KE.search(step.failed_code or "")
    found = {
        "step": name,
        "node": info.get("node_info"),
        "yarn_application": info.get("yarn_application_id"),
        "yarn_url": info.get("yarn_application_tracking_url"),
    }
    problem = Problem(code[0] if code else step.failed_code, message)
    return replace(seen, problem=problem, detail=seen.detail | _scalars(found))


def _scalars(found: dict[str, Any]) -> dict[str, Scalar]:
    return {name: text[:1024] for name, text in found.items() if text and isinstance(text, str)}


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _data(answer: _Envelope[T]) -> T:
    if answer.code != "000":
        raise _error(200, answer)
    if answer.data is None:
        raise Invalid("an envelope without data")
    return answer.data


def _refuse(response: Response) -> None:
    """Raise what a status other than 200 means; business errors are 500, locked users 400."""
    fault = None
    if response.status in (400, 401, 403, 500):
        with suppress(Invalid):
            fault = decode(response.body, _Envelope[Any])
    if fault is not None:
        raise _error(response.status, fault)
    refuse(response)


def _error(status: int, fault: _Envelope[Any]) -> VendorError:
    """What an error's envelope means, by the code that is somewhere in it."""
    text = f"{fault.error_code or ''} {fault.msg or ''}"
    found = _KE.search(text)
    code = found[0] if found else ""
    message = f"HTTP {status}: {_first_line(text)[:300]}"
    if status in (401, 403) or code.startswith(_REFUSED) or _DENIED.search(text):
        return Rejected(message)
    if code in _TRANSIENT or (status == 500 and not code):
        return Unreachable(message)
    return Invalid(message)


_SHOWN = {
    State.QUEUED: ("PENDING", "READY"),
    State.RUNNING: ("RUNNING", "RUNNING"),
    State.SUSPENDED: ("STOPPED", "PAUSED"),
    State.SUCCEEDED: ("FINISHED", "SUCCEED"),
    State.FAILED: ("ERROR", "ERROR"),
    State.CANCELED: ("DISCARDED", "DISCARDED"),
}
_DAYS = (1, 7, 31, 366, 36_500)
_DEFAULTS = {"page_offset": "0", "page_size": "10", "offset": "0", "limit": "30"}


def render(world: World, request: Request) -> Response:
    """Answer as Kylin 5; as Kylin 4 what only that knows: `timeFilter` alone, a job by its path."""
    query, segments = dict(request.query), request.path.split("/")
    if segments == ["", "api", "jobs"]:
        return _render_list(world, query, old="time_filter" not in query and "timeFilter" in query)
    if segments[:3] != ["", "api", "jobs"] or segments[4:] not in ([], ["detail"]):
        return _json({"status": 404, "error": "Not Found", "path": request.path}, 404)
    found = next((run for run in world.runs.values() if run.uuid == segments[3]), None)
    if len(segments) == 4:
        return _json(_render_row(world, found, old=True)) if found else Response(status=200)
    if query.get("project", "") not in _groups(world):
        return _render_error(500, "KE-010001201", f'Can\'t find project "{query.get("project")}".')
    if found is None:
        return _render_error(500, "KE-010032219", f'Can\'t find job "{segments[3]}".')
    return _json(_Envelope("000", _render_steps(found), ""))


def _render_list(world: World, query: dict[str, str], *, old: bool) -> Response:
    names = ["time_filter", "page_offset", "page_size", "project"]
    if old:
        names = ["timeFilter", "offset", "limit", "projectName"]
    *numbers, project = ((_DEFAULTS | query).get(name, "") for name in names)
    if not all(number.isdecimal() for number in numbers):
        return _render_error(400, "KE-010000003", f"Invalid Parameter: {', '.join(names)}")
    if project not in ("", *_groups(world)):
        if not old:
            return _render_error(500, "KE-010001201", f'Can\'t find project "{project}".')
        project = ""
    window, first, size = map(int, numbers)
    since_ms = world.now_ms - 86_400_000 * _DAYS[min(max(window - old, 0), 4)]
    runs = [
        run
        for run in sorted(world.runs.values(), key=lambda run: (-run.now.changed_ms, run.number))
        if run.now.changed_ms >= since_ms
        and project in ("", run.definition.group)
        and query.get("key", "") in run.uuid
    ]
    first = first if old else first * size
    rows = [_render_row(world, run, old=old) for run in runs[first : first + size]]
    return _json(rows if old else _Envelope("000", _List(rows, len(runs)), ""))


def _groups(world: World) -> set[str]:
    return {definition.group for definition in world.definitions}


def _render_row(world: World, run: SimRun, *, old: bool) -> _Row:
    row, now, what = _Row4 if old else _Row, run.now, run.definition
    ended_ms = now.changed_ms if now.state is State.SUSPENDED else now.ended_ms or 0
    return row(
        id=run.uuid,
        job_status=_SHOWN[now.state][0],
        scheduler_state=None if old else _SHOWN[now.state][1],
        job_name=f"{what.name} - BUILD" if old else "INDEX_BUILD",
        project=what.group,
        submitter=what.owner,
        target_subject=what.name,
        progress=row.full * run.progress(world.now_ms),
        create_time=None if old else now.queued_ms,
        exec_start_time=now.started_ms or (ended_ms if now.state is State.CANCELED else 0),
        exec_end_time=ended_ms,
        steps=_render_steps(run) if old else [],
    )


def _render_steps(run: SimRun) -> list[_Step]:
    word, problem = _SHOWN[run.now.state][0], run.now.problem
    steps = [
        _Step("Detect Resource", "FINISHED" if run.now.started_ms else word),
        _Step("Load Data To Index", word, {"node_info": "10.1.2.3:7070"}),
    ]
    if problem is not None:
        steps[1].failed_step_name = "Build indexes by layer"
        steps[1].failed_code = "KE-030001000(Job building error):"
        steps[1].failed_reason = f"Building job exception: {problem}"
    return steps


def _render_error(status: int, code: str, text: str) -> Response:
    return _json(_Envelope("999", None, f"{code}: {text}", code), status)


def _json(value: object, status: int = 200) -> Response:
    headers = {"content-type": "application/json;charset=UTF-8"}
    return Response(status=status, headers=headers, body=msgspec.json.encode(value))


VENDOR = Vendor(
    name="kylin",
    options=Options,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=(Kind(states=frozenset(_SHOWN), reopens=True),),
)
