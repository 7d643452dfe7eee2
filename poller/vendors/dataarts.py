"""Huawei DataArts Factory (DLF, DGC), API v1: real-time jobs, and the instances of batch jobs.

A real-time job is its own run; a new start time is a new attempt. The list of jobs shows the state
of them all, `/status` the condition of a job's nodes.

Batch instances are listed by the times they were planned for. A poll asks for what is planned about
now and for the times of the unfinished; now and then for the whole past week. The list of batch
jobs betrays other instances that moved (backfilled, started again): then that job is asked.

Follows opentelekomcloud-docs/data-arts-studio (job development APIs, error codes) and the models
of the vendor's SDK, huaweicloudsdkdgc 3.1.219.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import msgspec
import pydantic
from msgspec.structs import replace

from poller import wire
from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.events import rfc3339
from poller.known import Known, Memory
from poller.payload import Table, decode, epoch_ms
from poller.runs import TERMINAL, Job, Ms, Problem, Scalar, Seen, State
from poller.wire import BadRow, Page, Request, Response, Vendor, Words, look_up
from poller.world import Definition, Kind, SimRun, World


class Options(wire.Options):
    """DataArts' own settings.

    Attributes:
        workspace: id of the workspace; None: the project's default one, if it has one.
        kinds: the sorts of jobs to follow.
        stopped: what a stopped real-time job counts as; a stream has no success of its own.
    """

    project_id: str = pydantic.Field(min_length=1)
    workspace: str | None = pydantic.Field(default=None, min_length=1)
    kinds: tuple[Literal["real_time", "batch"], ...] = pydantic.Field(
        default=("real_time", "batch"), min_length=1, strict=False
    )
    stopped: Literal["canceled", "succeeded"] = "canceled"


WORDS: Words = {
    # real-time jobs and their nodes
    "starting": (State.STARTING, None),
    "init": (State.STARTING, None),
    "normal": (State.RUNNING, None),
    "overload": (State.RUNNING, "overload"),
    "disable": (State.SUSPENDED, None),
    "stopping": (State.STOPPING, None),
    "exception": (State.FAILED, None),
    "abnormal": (State.FAILED, None),
    "stopped": (State.CANCELED, None),
    # both
    "pause": (State.SUSPENDED, None),
    # batch instances and their nodes
    "waiting": (State.QUEUED, None),
    "waiting-confirm": (State.QUEUED, None),
    "running": (State.RUNNING, None),
    "running-exception": (State.RUNNING, "exception"),
    "freeze": (State.SUSPENDED, None),
    "success": (State.SUCCEEDED, None),
    "forcesuccess": (State.SUCCEEDED, "forced"),
    "ignoresuccess": (State.SUCCEEDED, "failure_ignored"),
    "fail": (State.FAILED, None),
    "manual-stop": (State.CANCELED, None),
    "skip-by-depend": (State.CANCELED, "skipped"),
}

_NO_JOB, _NO_INSTANCE, _BAD_PARAMETER = "DLF.0100", "DLF.0137", "DLF.3051"
_REFUSALS: dict[str, type[VendorError]] = {
    "DLF.6888": Rejected,
    "APIG.0201": Unreachable,
    "APIG.0301": Rejected,
    "APIG.0302": Rejected,
    "APIG.0303": Rejected,
    "APIG.0307": Rejected,
    "APIG.0308": Limited,
}

_REAL_TIME, _BATCH = "real_time", "batch"
_JOBS_LIMIT, _INSTANCES_LIMIT, _MOST_NODES = 100, 1000, 20
_MINUTE, _DAY = 60_000, 86_400_000
_REACH = 7 * _DAY
"""How far back plan times may be asked for."""
_SPAN = 3 * _DAY
"""The longest window; editions of the documentation differ, this is the least."""
_MARGIN = 10 * _MINUTE
"""How far to look back behind the last good poll, and ahead of this one."""
_GAP = 360 * _MINUTE
"""Plan times nearer to each other than this are asked for together."""

R = TypeVar("R")
E = TypeVar("E")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Id = Annotated[int, msgspec.Meta(ge=1)] | _Name
_Stamp: TypeAlias = int | float | str | None
_Window: TypeAlias = tuple[Ms, Ms]
"""First and last plan time."""


class _Times(msgspec.Struct, rename="camel"):
    start_time: _Stamp = None
    starttime: _Stamp = None
    end_time: _Stamp = None

    @property
    def started_ms(self) -> Ms | None:
        return epoch_ms(self.start_time) or epoch_ms(self.starttime)


class _Job(_Times, kw_only=True):
    """A job of the list; the status of a batch job is its scheduler's and tells nothing of runs."""

    name: _Name
    status: _Name
    owner: _Text | None = None
    path: _Text | None = None
    last_instance_status: _Text | None = None
    last_instance_end_time: _Stamp = None


class _Execution(_Times, kw_only=True):
    """What the list of instances and an instance's own page both tell."""

    status: _Name
    plan_time: _Stamp = None
    submit_time: _Stamp = None
    force_success: bool | None = None
    ignore_success: bool | None = None
    instance_type: int | _Text | None = None
    version: int | _Text | None = None
    error_message: str | None = None

    @property
    def ended(self) -> bool:
        return look_up(WORDS, self.status).state in TERMINAL


class _Instance(_Execution, kw_only=True):
    """A batch instance of the list; in the vendor's older SDK its id is `instancesId`."""

    job_name: _Name
    instance_id: _Id | None = None
    instances_id: _Id | None = None

    def __post_init__(self) -> None:
        if self.instance_id is None and self.instances_id is None:
            raise ValueError("Object missing required field `instanceId`")

    @property
    def run_id(self) -> str:
        return str(self.instances_id if self.instance_id is None else self.instance_id)


class _Node(msgspec.Struct, rename="camel"):
    """A node; one without a state of its own tells that of its last instance."""

    name: _Text | None = None
    node_name: _Text | None = None
    status: _Text | None = None
    last_instance_status: _Text | None = None
    last_instance_status_: _Text | None = msgspec.field(default=None, name="LastInstanceStatus")
    log_path: _Text | None = None
    error_message: str | None = None

    @property
    def word(self) -> str:
        return self.status or self.last_instance_status or self.last_instance_status_ or ""

    @property
    def failed(self) -> bool:
        return look_up(WORDS, self.word).state is State.FAILED


class _Jobs(msgspec.Struct, Generic[R]):
    total: int
    jobs: list[R]


class _Instances(msgspec.Struct, Generic[R]):
    total: int
    instances: list[R]


class _Status(_Times, Generic[R], kw_only=True):
    """The page of a real-time job."""

    name: _Name
    status: _Name | None = None
    nodes: list[R] | None = None


class _Details(_Execution, Generic[R], kw_only=True):
    """The page of a batch instance."""

    nodes: list[R] | None = None


_Raw = msgspec.Raw
_JOBS = Table(_Jobs[_Job], _Jobs[_Raw], _Job, lambda page: page.jobs, "$.jobs")
_INSTANCES = Table(
    _Instances[_Instance], _Instances[_Raw], _Instance, lambda page: page.instances, "$.instances"
)
_STATUS = Table(_Status[_Node], _Status[_Raw], _Node, lambda page: page.nodes or [], "$.nodes")
_DETAILS = Table(_Details[_Node], _Details[_Raw], _Node, lambda page: page.nodes or [], "$.nodes")


class _Listing(msgspec.Struct, frozen=True):
    """Asks for a page of a list of jobs."""

    scope: str
    offset: int = 0
    read: frozenset[str] = frozenset()  # rows of the pages before
    instances: tuple[_Instance, ...] = ()  # that this poll has shown


class _Sweep(msgspec.Struct, frozen=True):
    """Asks for the instances of one window after the other."""

    windows: tuple[_Window, ...]  # the first one is being asked for
    whole: bool = False  # they are the whole week
    job: str = ""  # of this job only
    last: str = ""  # what the list says of its last instance
    offset: int = 0
    read: frozenset[str] = frozenset()  # rows of the pages before, of this window
    instances: tuple[_Instance, ...] = ()  # of all pages before


def _start(options: Options, memory: Memory) -> list[Request]:
    lists = []
    if _REAL_TIME in options.kinds:
        lists.append(_get_jobs(options, _Listing(_REAL_TIME)))
    if _BATCH in options.kinds:
        lists.append(_get_instances(options, _sweep(memory)))
    return lists


def _sweep(memory: Memory) -> _Sweep:
    """The whole week if that is due, since nothing else shows what was restarted long after."""
    week, swept_ms = _week(memory), int(memory.marks.get("swept", 0))
    if memory.last_good_ms is None or memory.now_ms - swept_ms >= 1000 * memory.resync_s:
        return _Sweep(_pieces([week]), whole=True)
    recent = (memory.last_good_ms - _MARGIN, week[1])
    windows = _merged([recent, *_windows(memory.marks.get("unfinished", ""))])
    return _Sweep(_pieces((max(low, week[0]), high) for low, high in windows if high >= week[0]))


def _week(memory: Memory) -> _Window:
    return memory.now_ms - _REACH, memory.now_ms + _MARGIN


def _windows(mark: str) -> list[_Window]:
    return [(int(low), int(high)) for low, high in (part.split("-") for part in mark.split())]


def _merged(windows: Iterable[_Window]) -> list[_Window]:
    merged: list[_Window] = []
    for low, high in sorted(windows):
        if merged and low - merged[-1][1] <= _GAP:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _pieces(windows: Iterable[_Window]) -> tuple[_Window, ...]:
    """The same in pieces that the vendor takes, newest first."""
    pieces: list[_Window] = []
    for low, high in windows:
        pieces += [(at, min(high, at + _SPAN - 1)) for at in range(low, high + 1, _SPAN)]
    return tuple(reversed(pieces))


def _get(options: Options, context: Any, *path: str, by_id: bool = False, **query: str) -> Request:
    """A question below `/jobs`; what its query is made of is named as the vendor names it."""
    headers = [("Accept", "application/json")]
    if options.workspace is not None:
        headers.append(("workspace", options.workspace))
    parts = (quote(part, safe="") for part in (options.project_id, "jobs", *path))
    return Request(
        path=f"/v1/{'/'.join(parts)}",
        query=tuple(query.items()),
        headers=tuple(headers),
        by_id=by_id,
        context=context,
    )


def _get_jobs(options: Options, asked: _Listing) -> Request:
    page = {"offset": str(asked.offset), "limit": str(_JOBS_LIMIT)}
    return _get(options, asked, jobType=asked.scope.upper(), **page)


def _get_instances(options: Options, asked: _Sweep) -> Request:
    low, high = asked.windows[0]
    query = {"jobName": asked.job, "preciseQuery": "true"} if asked.job else {}
    query |= {"minPlanTime": str(low), "maxPlanTime": str(high)}
    query |= {"offset": str(asked.offset), "limit": str(_INSTANCES_LIMIT)}
    return _get(options, asked, "instances", "detail", by_id=asked.job != "", **query)


def _get_run(options: Options, run: Known | Seen) -> Request:
    path = (
        (run.run_id, "status") if run.scope == _REAL_TIME else (run.job.id, "instances", run.run_id)
    )
    return _get(options, run, *path, by_id=True)


def _ask(options: Options, known: Known | None, seen: Seen) -> Request | None:
    """The nodes' condition, for any news of a stream and for a failed instance."""
    is_row = seen.fingerprint != 0
    if is_row and (seen.scope == _REAL_TIME or seen.state is State.FAILED):
        return _get_run(options, seen)
    return None


def _parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    asked = request.context
    if isinstance(asked, _Listing):
        return _parse_jobs(options, asked, response, memory)
    if isinstance(asked, _Sweep):
        return _parse_instances(options, asked, response, memory)
    return _parse_run(options, asked, response, memory)


def _parse_jobs(options: Options, asked: _Listing, response: Response, memory: Memory) -> Page:
    page, rows, bad = _read(_JOBS, response)
    read = asked.read.union((row.name for row in rows), _places(bad, asked.offset))
    follow = []
    if len(asked.read) < len(read) < page.total:  # the vendor does not repeat itself
        more = replace(asked, offset=asked.offset + 1, read=read)
        follow = [_get_jobs(options, more)]
    if asked.scope == _BATCH:
        questions, marks = _moved(options, rows, asked.instances, memory)
        return Page(follow=[*follow, *questions], marks=marks, bad=bad)
    runs, shown = _streams(options, rows, memory)
    complete = _REAL_TIME if len(read) >= page.total else None
    return Page(runs=runs, shown=shown, follow=follow, complete=complete, bad=bad)


def _places(bad: Iterable[BadRow], offset: int) -> Iterable[str]:
    return (f"{offset} {row.at}" for row in bad)


def _streams(
    options: Options, rows: Iterable[_Job], memory: Memory
) -> tuple[list[Seen], list[Known]]:
    """Rows told apart into news and what is as it was; a job that never ran is neither."""
    runs, shown = [], []
    for row in rows:
        known = memory.get(row.name, row.name)
        fingerprint = hash((row.status, row.start_time, row.starttime, row.end_time))
        if known is not None and known.fingerprint == fingerprint and not known.vanished:
            shown.append(known)
            continue
        job = Job(id=row.name, name=row.name, group=row.path, owner=row.owner)
        seen = _stream(options, job, row.status, row, known)
        never_ran = seen.started_ms is None and seen.state is State(options.stopped)
        if known is not None or not never_ran:
            runs.append(replace(seen, fingerprint=fingerprint))
    return runs, shown


def _moved(
    options: Options, rows: Iterable[_Job], instances: Sequence[_Instance], memory: Memory
) -> tuple[list[Request], dict[str, str]]:
    """Questions to the jobs whose last instance moved, unless this poll has shown that instance."""
    lasts = {row.name: _last(row.last_instance_status, row.last_instance_end_time) for row in rows}
    moved = {k: v for k, v in lasts.items() if memory.marks.get(f"last:{k}", "") != v}
    swept = {(row.job_name, _last(row.status, row.end_time)) for row in instances if moved}
    questions, marks = [], {}
    for name, last in moved.items():
        if memory.last_good_ms is None or not last or (name, last) in swept:
            marks[f"last:{name}"] = last
        else:
            week = _pieces([_week(memory)])
            questions.append(_get_instances(options, _Sweep(week, job=name, last=last)))
    return questions, marks


def _last(word: str | None, end_time: _Stamp) -> str:
    return f"{(word or '').strip().lower()} {epoch_ms(end_time) or ''}".strip()


def _parse_instances(options: Options, asked: _Sweep, response: Response, memory: Memory) -> Page:
    page, rows, bad = _read(_INSTANCES, response)
    (low, high), *later = asked.windows
    here = frozenset((*(row.run_id for row in rows), *_places(bad, asked.offset)))
    read = asked.read | here
    hidden = page.total > len(read)
    if hidden and low < high and asked.offset == 0 and len(here) >= _INSTANCES_LIMIT:
        # Narrower windows leave no doubt of what is read; whether `offset` counts pages does.
        middle = (low + high) // 2
        halves = replace(asked, windows=((middle + 1, high), (low, middle), *later))
        return Page(follow=[_get_instances(options, halves)])
    asked = replace(asked, instances=(*asked.instances, *rows))
    runs, shown = _executions(rows, memory)
    notes: list[str] = []
    if hidden and len(read) > len(asked.read):
        follow = [_get_instances(options, replace(asked, offset=asked.offset + 1, read=read))]
        return Page(runs=runs, shown=shown, follow=follow, bad=bad)
    if hidden:
        notes = [f"{len(read)} of {page.total} instances planned since {rfc3339(low)} are shown"]
    follow, marks = _next_window(options, replace(asked, windows=tuple(later)), memory)
    return Page(runs=runs, shown=shown, follow=follow, marks=marks, bad=bad, notes=notes)


def _executions(rows: Iterable[_Instance], memory: Memory) -> tuple[list[Seen], list[Known]]:
    """Rows told apart into news and what is as it was; what is past retention is neither."""
    runs, shown = [], []
    for row in rows:
        known = memory.get(row.job_name, row.run_id)
        times = (row.submit_time, row.start_time, row.end_time)
        fingerprint = hash((row.status, *times, row.force_success, row.ignore_success))
        if known is not None and known.fingerprint == fingerprint and not known.vanished:
            shown.append(known)
            continue
        last_ms = epoch_ms(row.end_time) or epoch_ms(row.plan_time) or memory.now_ms
        if known is not None or not row.ended or last_ms >= memory.since_ms:
            job = Job(id=row.job_name, name=row.job_name)
            runs.append(replace(_execution(job, row.run_id, row), fingerprint=fingerprint))
    return runs, shown


def _next_window(
    options: Options, asked: _Sweep, memory: Memory
) -> tuple[list[Request], dict[str, str]]:
    """What to ask next, and after the last window what to note."""
    if asked.windows:
        return [_get_instances(options, replace(asked, offset=0, read=frozenset()))], {}
    if asked.job:
        return [], {f"last:{asked.job}": asked.last, **_unfinished(asked.instances, memory)}
    marks = {"swept": str(memory.now_ms)} if asked.whole else {}
    jobs = _Listing(_BATCH, instances=asked.instances)
    return [_get_jobs(options, jobs)], marks | _unfinished(asked.instances)


def _unfinished(rows: Iterable[_Execution], memory: Memory | None = None) -> dict[str, str]:
    """Notes the plan times of unfinished instances, beside those that the memory has noted."""
    noted = _windows(memory.marks.get("unfinished", "")) if memory else []
    plans = (epoch_ms(row.plan_time) for row in rows if not row.ended)
    windows = _merged([*noted, *((plan, plan) for plan in plans if plan)])
    return {"unfinished": " ".join(f"{low}-{high}" for low, high in windows)}


def _parse_run(options: Options, run: Known | Seen, response: Response, memory: Memory) -> Page:
    """Reads the page of one run: of a known one, or of a row that is about to be told."""
    row = run if isinstance(run, Seen) else None
    if response.status != 200 and _fault(response)[0] in (_NO_JOB, _NO_INSTANCE):
        return Page(runs=[row]) if row else Page(gone=[(run.job.id, run.run_id)])
    marks: dict[str, str] = {}
    if run.scope == _REAL_TIME:
        status, nodes, bad = _read(_STATUS, response)
        word = status.status or (row and row.vendor_state)
        if not word:  # an optional field: it cannot tell
            return Page(bad=bad)
        newer = _stream(options, run.job, word, status, memory.get(run.job.id, run.run_id))
    else:
        details, nodes, bad = _read(_DETAILS, response)
        newer = _execution(run.job, run.run_id, details)
        marks = _unfinished([details], memory)
    newer = _with_nodes(newer, nodes)
    return Page(runs=_joined(row, newer) if row else [newer], marks=marks, bad=bad)


def _joined(row: Seen, newer: Seen) -> list[Seen]:
    """The row with what its own page adds; both if it has moved on in between."""
    if newer.state is not row.state:
        return [row, newer]
    both = replace(
        newer,
        marker=newer.marker or row.marker,
        queued_ms=newer.queued_ms or row.queued_ms,
        started_ms=newer.started_ms or row.started_ms,
        ended_ms=newer.ended_ms or row.ended_ms,
        problem=newer.problem or row.problem,
        detail={**row.detail, **newer.detail},
        fingerprint=row.fingerprint,
    )
    return [both]


def _stream(options: Options, job: Job, word: str, row: _Times, known: Known | None) -> Seen:
    state, substate, unmapped = look_up(WORDS, word)
    started_ms, ended_ms = row.started_ms, epoch_ms(row.end_time)
    if state is State.STARTING and known is not None and (started_ms or 0) <= (known.last_ms or 0):
        started_ms = None  # it may still be that of the attempt before
    if state not in TERMINAL or (ended_ms or 0) < (started_ms or 0):
        ended_ms = None
    return Seen(
        job=job,
        run_id=job.id,
        state=State(options.stopped) if state is State.CANCELED else state,
        vendor_state=word,
        substate=substate,
        marker=str(started_ms) if started_ms else None,
        started_ms=started_ms,
        ended_ms=ended_ms,
        scope=_REAL_TIME,
        unmapped=unmapped,
    )


def _execution(job: Job, run_id: str, row: _Execution) -> Seen:
    """Leaves out `executeTime`: documented in milliseconds, it comes in minutes."""
    state, substate, unmapped = look_up(WORDS, row.status)
    if state is State.SUCCEEDED and (row.force_success or row.ignore_success):
        substate = "forced" if row.force_success else "failure_ignored"
    plan_ms, why = epoch_ms(row.plan_time), row.error_message
    detail: dict[str, Scalar] = {
        "instance_type": row.instance_type,
        "plan_time": rfc3339(plan_ms) if plan_ms else None,
        "version": row.version,
    }
    return Seen(
        job=job,
        run_id=run_id,
        state=state,
        vendor_state=row.status,
        substate=substate,
        queued_ms=epoch_ms(row.submit_time),
        started_ms=row.started_ms,
        ended_ms=epoch_ms(row.end_time) if state in TERMINAL else None,
        problem=Problem(None, why) if why and state is State.FAILED else None,
        detail={name: value for name, value in detail.items() if value is not None},
        scope=_BATCH,
        unmapped=unmapped,
    )


def _with_nodes(seen: Seen, nodes: Iterable[_Node]) -> Seen:
    """Adds the condition of the nodes, the failed ones first, and why they failed."""
    listed = sorted(nodes, key=lambda node: not node.failed)[:_MOST_NODES]
    names = [node.name or node.node_name for node in listed]
    detail = dict(seen.detail)
    detail |= {f"node.{name}": node.word or None for name, node in zip(names, listed, strict=True)}
    if seen.state is not State.FAILED:
        return replace(seen, detail=detail)
    logs = [node.log_path for node in listed if node.log_path]
    detail |= {"log_path": path for path in logs[:1]}
    whys = [seen.problem.message] if seen.problem else []
    for name, node in zip(names, listed, strict=True):
        if node.failed:
            whys.append(f"node {name}: {node.error_message or node.word}")
    return replace(seen, detail=detail, problem=Problem(None, "; ".join(whys)) if whys else None)


def _read(table: Table[E, R], response: Response) -> tuple[E, list[R], list[BadRow]]:
    if response.status != 200:
        _refuse(response)
    try:
        document, rows, bad = table.read(response.body)
    except Invalid:
        _refuse(response)  # an error that says 200
        raise
    return document, rows, [BadRow(*fault) for fault in bad]


def _refuse(response: Response) -> None:
    """Raise what an error means: by its code, else by its status."""
    code, told = _fault(response)
    refusal = _REFUSALS.get(code.replace("APIGW.", "APIG."))
    if refusal is Limited:
        raise Limited(told, wire.retry_after_s(response))
    if refusal is not None:
        raise refusal(told)
    if code and response.status < 500 and response.status not in (401, 403, 429):
        raise Invalid(told, response.body)
    wire.refuse(response)


def _fault(response: Response) -> tuple[str, str]:
    """An error's code and a sentence; "" for what is no error of this vendor."""
    try:
        error = decode(response.body, dict[str, Any])
    except Invalid:
        error = {}
    code = str(error.get("error_code", ""))
    return code, f"{code}: {str(error.get('error_msg', ''))[:256]}"


def _render(world: World, request: Request) -> Response:
    query = dict(request.query)
    match [unquote(part) for part in request.path.split("/")]:
        case ["", "v1", _, "jobs"]:
            return _render_jobs(world, query)
        case ["", "v1", _, "jobs", "instances", "detail"]:
            return _render_instances(world, query)
        case ["", "v1", _, "jobs", name, "status"]:
            return _render_status(world, name)
        case ["", "v1", _, "jobs", name, "instances", number]:
            return _render_details(world, name, number)
    return _render_fault("APIG.0101", "The API does not exist.", 404)


def _render_jobs(world: World, query: dict[str, str]) -> Response:
    kind = query.get("jobType", "BATCH").lower()
    last = {run.definition.number: run for run in world.of(kind)}
    named = query.get("jobName", "")
    jobs = [job for job in world.definitions if job.kind.name == kind and named in job.name]
    return _render_page(
        query, "jobs", _JOBS_LIMIT, jobs, lambda job: _render_job(job, last.get(job.number))
    )


def _render_instances(world: World, query: dict[str, str]) -> Response:
    low = int(query.get("minPlanTime", world.now_ms - world.now_ms % _DAY))
    high = int(query.get("maxPlanTime", world.now_ms))
    if high - low > _REACH:
        return _render_fault(_BAD_PARAMETER, "The request parameter is invalid.")
    runs = [run for run in reversed(world.of(_BATCH)) if low <= run.created_ms <= high]
    if "jobName" in query:
        exact, named = query.get("preciseQuery") == "true", query["jobName"]
        names = {job.name for job in world.definitions if named in job.name}
        names = {named} if exact else names
        runs = [run for run in runs if run.definition.name in names]
    return _render_page(query, "instances", _INSTANCES_LIMIT, runs, _render_instance)


def _render_page(
    query: dict[str, str],
    key: str,
    most: int,
    items: Sequence[Any],
    show: Callable[[Any], dict[str, Any]],
) -> Response:
    offset, limit = int(query.get("offset", 0)), int(query.get("limit", 10))
    if offset < 0 or not 1 <= limit <= most:
        return _render_fault(_BAD_PARAMETER, "The request parameter is invalid.")
    part = items[offset * limit : (offset + 1) * limit]
    return _json({"total": len(items), key: [show(item) for item in part]})


def _render_job(job: Definition, last: SimRun | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": job.name, "jobType": job.kind.name.upper(), "owner": job.owner}
    row |= {"path": f"/{job.group}", "priority": 0, "singleNodeJobFlag": False}
    if job.kind.name == _REAL_TIME:
        return row | _stream_status(last, "startTime")
    row["status"] = "SCHEDULING"
    if last is not None:
        row["lastInstanceStatus"] = _SAID[_BATCH][last.now.state]
        row["lastInstanceEndTime"] = last.now.ended_ms
    return row


def _stream_status(run: SimRun | None, start: str) -> dict[str, Any]:
    """What is told of a stream; the name of its start time differs between the two endpoints."""
    if run is None:
        return {"status": "STOPPED"}
    now = run.now
    overload = now.warnings and now.state is State.RUNNING
    shown = {"status": "OVERLOAD" if overload else _SAID[_REAL_TIME][now.state]}
    times = {start: now.started_ms, "endTime": now.ended_ms, "lastUpdateTime": now.changed_ms}
    return shown | {name: ms for name, ms in times.items() if ms is not None}


def _render_status(world: World, name: str) -> Response:
    job = next((job for job in world.definitions if job.name == name), None)
    if job is None or job.kind.name != _REAL_TIME:
        return _render_fault(_NO_JOB, "The job does not exists.")
    status = _stream_status(world.latest(job), "starttime")
    source = {"name": "source", "LastInstanceStatus": "success", "jobInstanceId": 0, "speed": 0}
    sink = {"name": "sink", "status": status["status"], "type": "MRS Flink"}
    if sink["status"] == "EXCEPTION":
        sink["logPath"] = f"obs://dlf-log/{name}/sink.log"
    return _json({"name": name, "nodes": [source, sink], **status})


def _render_instance(run: SimRun) -> dict[str, Any]:
    now, name = run.now, run.definition.name
    exception = now.warnings and now.state is State.RUNNING
    row = {
        "jobName": name,
        "jobInstanceName": name,
        "jobId": run.definition.number,
        "instanceId": run.number,
        "instanceType": 0,
        "status": "running-exception" if exception else _SAID[_BATCH][now.state],
        "forceSuccess": now.warnings and now.state is State.SUCCEEDED,
        "ignoreSuccess": False,
        "planTime": run.created_ms,
        "submitTime": now.queued_ms,
        "startTime": now.started_ms,
        "endTime": now.ended_ms,
        "executeTime": now.length_ms / _MINUTE,
        "version": 1,
    }
    return {name: value for name, value in row.items() if value is not None}


def _render_details(world: World, name: str, number: str) -> Response:
    if name not in (job.name for job in world.definitions):
        return _render_fault(_NO_JOB, "The job does not exists.")
    runs = (run for run in world.of(_BATCH) if run.definition.name == name)
    run = next((run for run in runs if str(run.number) == number), None)
    if run is None:
        return _render_fault(_NO_INSTANCE, "Job instance does not exist.")
    row = _render_instance(run)
    del row["submitTime"]
    node = {"nodeName": "load", "status": row["status"], "type": "DWS SQL", "retryTimes": 0}
    if run.now.problem is not None:
        node |= {"errorMessage": run.now.problem, "logPath": f"obs://dlf-log/{name}/load.job"}
    return _json({**row, "total": 1, "nodes": [node]})


def _render_fault(code: str, message: str, status: int = 400) -> Response:
    return _json({"error_code": code, "error_msg": message}, status)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"content-type": "application/json"}
    return Response(status=status, headers=headers, body=msgspec.json.encode(content))


_LIVES = {
    _REAL_TIME: ("STARTING", "NORMAL", "PAUSE", "STOPPING", "EXCEPTION", "STOPPED"),
    _BATCH: ("waiting", "running", "pause", "success", "fail", "manual-stop"),
}
_SAID = {kind: {WORDS[w.lower()][0]: w for w in words} for kind, words in _LIVES.items()}

VENDOR = Vendor(
    name="dataarts",
    options=Options,
    words=WORDS,
    start=_start,
    parse=_parse,
    settle=_get_run,
    ask=_ask,
    render=_render,
    kinds=(
        Kind(name=_REAL_TIME, states=frozenset(_SAID[_REAL_TIME]), stream=True),
        Kind(name=_BATCH, states=frozenset(_SAID[_BATCH]), reopens=True),
    ),
)
