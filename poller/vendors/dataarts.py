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

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import msgspec
import pydantic
from msgspec.structs import replace

from poller import wire
from poller.errors import Invalid, Limited, Rejected, Unreachable
from poller.events import rfc3339
from poller.known import Known, Memory
from poller.payload import Table, decode, epoch_ms
from poller.runs import TERMINAL, Job, Ms, Problem, Seen, State
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
_REFUSED = ("DLF.6888", "APIG.0301", "APIG.0302", "APIG.0303", "APIG.0307")
_THROTTLED, _BROKEN = "APIG.0308", "APIG.0201"

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
_Query: TypeAlias = tuple[tuple[str, str], ...]
_Window: TypeAlias = tuple[Ms, Ms]
"""First and last plan time."""
_Next: TypeAlias = tuple[list[Request], dict[str, str]]
"""What to ask and what to note."""


class _Row(msgspec.Struct, rename="camel", kw_only=True):
    """What is told of a run; which fields, differs between the pages and their editions."""

    status: _Text | None = None
    plan_time: _Stamp = None
    submit_time: _Stamp = None
    start_time: _Stamp = None
    starttime: _Stamp = None
    end_time: _Stamp = None
    force_success: bool | None = None
    ignore_success: bool | None = None
    owner: _Text | None = None
    path: _Text | None = None
    instance_type: int | _Text | None = None
    error_message: str | None = None

    @property
    def started_ms(self) -> Ms | None:
        return epoch_ms(self.start_time) or epoch_ms(self.starttime)

    @property
    def state(self) -> State:
        return look_up(WORDS, self.status or "").state

    @property
    def fingerprint(self) -> int:
        times = (self.submit_time, self.start_time, self.starttime, self.end_time)
        return hash((self.status, self.force_success, self.ignore_success, *times))


class _Job(_Row, kw_only=True):
    """A job of the list; the status of a batch job is its scheduler's and tells nothing of runs."""

    name: _Name
    status: _Name
    last_instance_status: _Text | None = None
    last_instance_end_time: _Stamp = None

    @property
    def ids(self) -> tuple[str, str]:
        return self.name, self.name


class _Instance(_Row, kw_only=True):
    """A batch instance of the list; in the vendor's older SDK its id is `instancesId`."""

    job_name: _Name
    status: _Name
    instance_id: _Id | None = None
    instances_id: _Id | None = None

    def __post_init__(self) -> None:
        if self.instance_id is None and self.instances_id is None:
            raise ValueError("Object missing required field `instanceId`")

    @property
    def ids(self) -> tuple[str, str]:
        return self.job_name, str(self.instance_id or self.instances_id)


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
    def called(self) -> str:
        return self.name or self.node_name or ""

    @property
    def failed(self) -> bool:
        return look_up(WORDS, self.word).state is State.FAILED


class _Jobs(msgspec.Struct, Generic[R]):
    total: int
    jobs: list[R]


class _Instances(msgspec.Struct, Generic[R]):
    total: int
    instances: list[R]


class _Run(_Row, Generic[R], kw_only=True):
    """A run's own page."""

    nodes: list[R] | None = None


_Raw = msgspec.Raw
_JOBS = Table(_Jobs[_Job], _Jobs[_Raw], _Job, lambda page: page.jobs, "$.jobs")
_INSTANCES = Table(
    _Instances[_Instance], _Instances[_Raw], _Instance, lambda page: page.instances, "$.instances"
)
_RUN = Table(_Run[_Node], _Run[_Raw], _Node, lambda page: page.nodes or [], "$.nodes")


class _Asked(msgspec.Struct, frozen=True):
    """Asks for a page of jobs, or of the instances planned in a window."""

    scope: str
    windows: tuple[_Window, ...] = ()  # the first is being asked for
    whole: bool = False  # they are the whole week
    job: str = ""  # of this job only
    last: str = ""  # what the list of jobs says of its last instance
    offset: int = 0
    read: frozenset[object] = frozenset()  # rows of the pages before
    instances: tuple[_Instance, ...] = ()  # that this poll has shown


def _start(options: Options, memory: Memory) -> list[Request]:
    lists = []
    if _REAL_TIME in options.kinds:
        lists.append(_Asked(_REAL_TIME))
    if _BATCH in options.kinds:
        lists.append(_sweep(memory))
    return [_get_list(options, asked) for asked in lists]


def _sweep(memory: Memory) -> _Asked:
    """The whole week if that is due, since nothing else shows what was restarted long after."""
    week, swept_ms = _week(memory), int(memory.marks.get("swept", 0))
    if memory.last_good_ms is None or memory.now_ms - swept_ms >= 1000 * memory.resync_s:
        return _Asked(_BATCH, _pieces([week]), whole=True)
    recent = (memory.last_good_ms - _MARGIN, week[1])
    windows = _merged([recent, *_windows(memory.marks.get("unfinished", ""))])
    return _Asked(
        _BATCH, _pieces((max(low, week[0]), high) for low, high in windows if high >= week[0])
    )


def _week(memory: Memory) -> _Window:
    return max(0, memory.now_ms - _REACH), memory.now_ms + _MARGIN


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


def _get(options: Options, asked: object, *path: str, query: _Query = (), by_id: bool) -> Request:
    headers = [("Accept", "application/json")]
    if options.workspace is not None:
        headers.append(("workspace", options.workspace))
    parts = [quote(part, safe="") for part in (options.project_id, "jobs", *path)]
    return Request(
        path=f"/v1/{'/'.join(parts)}",
        query=query,
        headers=tuple(headers),
        by_id=by_id,
        context=asked,
    )


def _get_list(options: Options, asked: _Asked) -> Request:
    limit = _INSTANCES_LIMIT if asked.windows else _JOBS_LIMIT
    page = (("offset", str(asked.offset)), ("limit", str(limit)))
    if not asked.windows:
        query: _Query = (("jobType", asked.scope.upper()), *page)
        return _get(options, asked, query=query, by_id=False)
    named = (("jobName", asked.job), ("preciseQuery", "true")) if asked.job else ()
    low, high = asked.windows[0]
    query = (*named, ("minPlanTime", str(low)), ("maxPlanTime", str(high)), *page)
    return _get(options, asked, "instances", "detail", query=query, by_id=asked.job != "")


def _get_run(options: Options, run: Known | Seen) -> Request:
    if run.scope == _REAL_TIME:
        return _get(options, run, run.run_id, "status", by_id=True)
    return _get(options, run, run.job.id, "instances", run.run_id, by_id=True)


def _ask(options: Options, known: Known | None, seen: Seen) -> Request | None:
    """The condition of the nodes, for any news of a stream and for a failed instance."""
    is_row = seen.fingerprint != 0
    if is_row and (seen.scope == _REAL_TIME or seen.state is State.FAILED):
        return _get_run(options, seen)
    return None


def _parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    asked = request.context
    if not isinstance(asked, _Asked):
        return _parse_run(options, asked, response, memory)
    if asked.windows:
        return _parse_instances(options, asked, response, memory)
    return _parse_jobs(options, asked, response, memory)


def _parse_jobs(options: Options, asked: _Asked, response: Response, memory: Memory) -> Page:
    page, rows, bad = _read(_JOBS, response)
    read = _read_so_far(asked, rows, bad)
    follow = []
    if len(asked.read) < len(read) < page.total:
        follow = [_get_list(options, replace(asked, offset=asked.offset + 1, read=read))]
    if asked.scope == _BATCH:
        questions, marks = _moved(options, rows, asked.instances, memory)
        return Page(follow=follow + questions, marks=marks, bad=bad)
    runs, shown = _told(options, _REAL_TIME, rows, memory)
    complete = _REAL_TIME if len(read) >= page.total else None
    return Page(runs=runs, shown=shown, follow=follow, complete=complete, bad=bad)


def _read_so_far(
    asked: _Asked, rows: Iterable[_Job | _Instance], bad: Iterable[BadRow]
) -> frozenset[object]:
    """Rows of this page and those before; it does not grow where a vendor repeats itself."""
    return asked.read.union((row.ids for row in rows), ((asked.offset, row.at) for row in bad))


def _moved(
    options: Options, rows: Iterable[_Job], instances: Iterable[_Instance], memory: Memory
) -> _Next:
    """Questions to jobs whose last instance moved, unless this poll has shown that instance."""
    lasts = {row.name: _last(row.last_instance_status, row.last_instance_end_time) for row in rows}
    moved = {k: v for k, v in lasts.items() if memory.marks.get(f"last:{k}", "") != v}
    shown = {(row.job_name, _last(row.status, row.end_time)) for row in instances if moved}
    questions, marks = [], {}
    for name, last in moved.items():
        if memory.last_good_ms is None or not last or (name, last) in shown:
            marks[f"last:{name}"] = last
        else:
            asked = _Asked(_BATCH, _pieces([_week(memory)]), job=name, last=last)
            questions.append(_get_list(options, asked))
    return questions, marks


def _last(word: str | None, end_time: _Stamp) -> str:
    return f"{(word or '').strip().lower()} {epoch_ms(end_time) or ''}".strip()


def _parse_instances(options: Options, asked: _Asked, response: Response, memory: Memory) -> Page:
    page, rows, bad = _read(_INSTANCES, response)
    read = _read_so_far(asked, rows, bad)
    hidden, fresh = page.total - len(read), len(read) - len(asked.read)
    (low, high), *later = asked.windows
    if hidden > 0 and asked.offset == 0 and fresh >= _INSTANCES_LIMIT and low < high:
        # Narrower windows leave no doubt of what was read, as pages with a vague `offset` would.
        middle = (low + high) // 2
        halves = replace(asked, windows=((middle + 1, high), (low, middle), *later))
        return Page(follow=[_get_list(options, halves)])
    runs, shown = _told(options, _BATCH, rows, memory)
    asked = replace(asked, instances=(*asked.instances, *rows))
    marks: dict[str, str] = {}
    notes = []
    if hidden > 0 and fresh:
        follow = [_get_list(options, replace(asked, offset=asked.offset + 1, read=read))]
    else:
        asked = replace(asked, windows=tuple(later), offset=0, read=frozenset())
        follow, marks = _after_window(options, asked, memory)
        if hidden > 0:
            notes = [f"{hidden} instances planned since {rfc3339(low)} are counted but not shown"]
    return Page(runs=runs, shown=shown, follow=follow, marks=marks, bad=bad, notes=notes)


def _after_window(options: Options, asked: _Asked, memory: Memory) -> _Next:
    """The next window; after the last one what to note, and the list of jobs."""
    if asked.windows:
        return [_get_list(options, asked)], {}
    if asked.job:
        noted = _windows(memory.marks.get("unfinished", ""))
        return [], {f"last:{asked.job}": asked.last, **_unfinished(asked.instances, noted)}
    marks = {"swept": str(memory.now_ms)} if asked.whole else {}
    jobs = _Asked(_BATCH, instances=asked.instances)
    return [_get_list(options, jobs)], marks | _unfinished(asked.instances, [])


def _unfinished(rows: Iterable[_Row], noted: Iterable[_Window]) -> dict[str, str]:
    """Notes the plan times of unfinished instances, beside those noted before."""
    plans = (epoch_ms(row.plan_time) for row in rows if row.state not in TERMINAL)
    windows = _merged([*noted, *((plan, plan) for plan in plans if plan)])
    return {"unfinished": " ".join(f"{low}-{high}" for low, high in windows)}


def _told(
    options: Options, scope: str, rows: Iterable[_Job | _Instance], memory: Memory
) -> tuple[list[Seen], list[Known]]:
    """Rows told apart into news and what is as it was."""
    runs, shown = [], []
    for row in rows:
        job_id, run_id = row.ids
        known, fingerprint = memory.get(job_id, run_id), row.fingerprint
        if known is not None and known.fingerprint == fingerprint and not known.vanished:
            shown.append(known)
            continue
        job = Job(id=job_id, name=job_id, group=row.path, owner=row.owner)
        seen = _seen(options, scope, job, run_id, row, known)
        if known is not None or not _is_nothing(seen, row, memory):
            runs.append(replace(seen, fingerprint=fingerprint))
    return runs, shown


def _is_nothing(seen: Seen, row: _Row, memory: Memory) -> bool:
    """Whether a job never ran, or an instance ended past retention."""
    if seen.scope == _REAL_TIME:
        return row.state is State.CANCELED and seen.started_ms is None
    last_ms = seen.ended_ms or epoch_ms(row.plan_time) or memory.now_ms
    return row.state in TERMINAL and last_ms < memory.since_ms


def _parse_run(options: Options, run: Known | Seen, response: Response, memory: Memory) -> Page:
    """Reads the page of a known run, or of a row that is about to be told."""
    row = run if isinstance(run, Seen) else None
    code, _ = _fault(response)
    if code in (_NO_JOB, _NO_INSTANCE):
        return Page(runs=[row]) if row else Page(gone=[(run.job.id, run.run_id)])
    if code:
        _refuse(response)
    page, nodes, bad = _read(_RUN, response)
    page = replace(page, status=page.status or (row and row.vendor_state))
    if not page.status:  # it is optional: the answer cannot tell
        return Page(bad=bad)
    known = memory.get(run.job.id, run.run_id)
    newer = _with_nodes(_seen(options, run.scope, run.job, run.run_id, page, known), nodes)
    if row is not None:
        return Page(runs=_joined(row, newer), bad=bad)
    noted = _windows(memory.marks.get("unfinished", ""))
    return Page(runs=[newer], marks=_unfinished([page], noted), bad=bad)


def _joined(row: Seen, newer: Seen) -> list[Seen]:
    """The row with what its own page adds; both if it has moved on in between."""
    if newer.state is not row.state:
        return [row, newer]
    names = ("marker", "ordinal", "queued_ms", "started_ms", "ended_ms", "fingerprint")
    kept = {name: getattr(row, name) or getattr(newer, name) for name in names}
    return [replace(newer, **kept, detail={**row.detail, **newer.detail})]


def _seen(
    options: Options, scope: str, job: Job, run_id: str, row: _Row, known: Known | None
) -> Seen:
    """Leaves out `executeTime`: documented in milliseconds, it comes in minutes."""
    state, substate, unmapped = look_up(WORDS, row.status or "")
    streams = scope == _REAL_TIME
    if state is State.SUCCEEDED and (row.force_success or row.ignore_success):
        substate = "forced" if row.force_success else "failure_ignored"
    if state is State.CANCELED and streams:
        state = State(options.stopped)
    started_ms, ended_ms = row.started_ms, epoch_ms(row.end_time)
    if state is State.STARTING and known is not None and (started_ms or 0) <= (known.last_ms or 0):
        started_ms = None  # it may still be that of the attempt before
    if state not in TERMINAL or (ended_ms or 0) < (started_ms or 0):
        ended_ms = None
    plan_ms, why = epoch_ms(row.plan_time), row.error_message
    detail = {"instance_type": row.instance_type, "plan_time": plan_ms and rfc3339(plan_ms)}
    return Seen(
        job=job,
        run_id=run_id,
        state=state,
        vendor_state=row.status,
        substate=substate,
        marker=str(started_ms) if streams and started_ms else None,
        ordinal=None if streams or state not in TERMINAL else _restarted(known, started_ms),
        queued_ms=epoch_ms(row.submit_time),
        started_ms=started_ms,
        ended_ms=ended_ms,
        problem=Problem(None, why) if why and state is State.FAILED else None,
        detail={name: value for name, value in detail.items() if value is not None},
        scope=scope,
        unmapped=unmapped,
    )


def _restarted(known: Known | None, started_ms: Ms | None) -> int | None:
    """The next attempt's number, if an instance that had ended started after that end."""
    if known is None or not known.ended_ms or (started_ms or 0) <= known.ended_ms:
        return None
    return known.attempt + 1


def _with_nodes(seen: Seen, nodes: Iterable[_Node]) -> Seen:
    """Adds the condition of the nodes, the failed ones first, and why they failed."""
    nodes = sorted(nodes, key=lambda node: not node.failed)[:_MOST_NODES]
    detail = {**seen.detail, **{f"node.{node.called}": node.word or None for node in nodes}}
    if seen.state is not State.FAILED:
        return replace(seen, detail=detail)
    whys = [seen.problem.message] if seen.problem else []
    whys += [
        f"node {node.called}: {node.error_message or node.word}" for node in nodes if node.failed
    ]
    log_path = next((node.log_path for node in nodes if node.log_path), None)
    if log_path:
        detail["log_path"] = log_path
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
    if code in _REFUSED:
        raise Rejected(told)
    if code == _THROTTLED:
        raise Limited(told, wire.retry_after_s(response))
    if code == _BROKEN:
        raise Unreachable(told)
    if code and response.status < 500 and response.status not in (401, 403, 429):
        raise Invalid(told, response.body)
    wire.refuse(response)


def _fault(response: Response) -> tuple[str, str]:
    """An error's code and a sentence; "" for what is no error of this vendor."""
    try:
        error = decode(response.body, dict[str, Any])
    except Invalid:
        error = {}
    code = str(error.get("error_code", "")).replace("APIGW.", "APIG.")
    return code, f"{code}: {str(error.get('error_msg', ''))[:256]}"


def _render(world: World, request: Request) -> Response:
    try:
        return _answer(world, request.path, dict(request.query))
    except ValueError:
        return _render_fault(_BAD_PARAMETER, "The request parameter is invalid.")


def _answer(world: World, path: str, query: dict[str, str]) -> Response:
    defined = {job.name: job.kind.name for job in world.definitions}
    match [unquote(part) for part in path.split("/")]:
        case ["", "v1", _, "jobs"]:
            return _render_jobs(world, query)
        case ["", "v1", _, "jobs", "instances", "detail"]:
            return _render_instances(world, query)
        case ["", "v1", _, "jobs", name, "status"] if defined.get(name) == _REAL_TIME:
            return _render_status(world, name)
        case ["", "v1", _, "jobs", name, "instances", number] if defined.get(name) == _BATCH:
            return _render_details(world, name, number)
        case ["", "v1", _, "jobs", _, "status"] | ["", "v1", _, "jobs", _, "instances", _]:
            return _render_fault(_NO_JOB, "The job does not exists.")
        case _:
            return _render_fault("APIG.0101", "The API does not exist.", 404)


def _render_jobs(world: World, query: dict[str, str]) -> Response:
    kind, part = query.get("jobType", "BATCH").lower(), query.get("jobName", "")
    last = {run.definition.number: run for run in world.of(kind)}
    jobs = [job for job in world.definitions if job.kind.name == kind and part in job.name]
    shown = [_job(job, last.get(job.number)) for job in _page_of(jobs, query, _JOBS_LIMIT)]
    return _json({"total": len(jobs), "jobs": shown})


def _render_instances(world: World, query: dict[str, str]) -> Response:
    """Newest plan first; without bounds what was planned since midnight."""
    low = int(query.get("minPlanTime", world.now_ms - world.now_ms % _DAY))
    high = int(query.get("maxPlanTime", world.now_ms))
    if high - low > _REACH:
        raise ValueError("too long a window")
    part, exact = query.get("jobName", ""), "preciseQuery" in query
    runs = [
        run
        for run in reversed(world.of(_BATCH))
        if low <= run.created_ms <= high and part in run.definition.name
        if not exact or part == run.definition.name
    ]
    shown = [_instance(run) for run in _page_of(runs, query, _INSTANCES_LIMIT)]
    return _json({"total": len(runs), "instances": shown})


def _page_of(rows: Sequence[R], query: dict[str, str], most: int) -> Sequence[R]:
    """One page; `offset` counts pages."""
    offset, limit = int(query.get("offset", 0)), int(query.get("limit", 10))
    if offset < 0 or not 1 <= limit <= most:
        raise ValueError("no such page")
    return rows[offset * limit : (offset + 1) * limit]


def _job(job: Definition, last: SimRun | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": job.name, "jobType": job.kind.name.upper(), "owner": job.owner}
    row["path"] = f"/{job.group}"
    if job.kind.name == _REAL_TIME:
        return row | (_times(last, "startTime") if last else {"status": "STOPPED"})
    row["status"] = "SCHEDULING"
    if last is not None:
        row["lastInstanceStatus"] = _word(last)
        row["lastInstanceEndTime"] = last.now.ended_ms
    return row


def _word(run: SimRun) -> str:
    now, kind = run.now, run.definition.kind.name
    if now.warnings and now.state is State.RUNNING:
        return "OVERLOAD" if kind == _REAL_TIME else "running-exception"
    return _SAID[kind][now.state]


def _times(run: SimRun, start: str) -> dict[str, Any]:
    """State and times; what is not set is left out."""
    row = {"status": _word(run), start: run.now.started_ms, "endTime": run.now.ended_ms}
    return {name: value for name, value in row.items() if value is not None}


def _instance(run: SimRun) -> dict[str, Any]:
    name = run.definition.name
    return {
        "jobName": name,
        "jobInstanceName": name,
        "instanceId": run.number,
        "instanceType": 0,
        "planTime": run.created_ms,
        "submitTime": run.now.queued_ms,
        "executeTime": run.now.length_ms / _MINUTE,
        "forceSuccess": run.now.warnings and run.now.state is State.SUCCEEDED,
        "ignoreSuccess": False,
        "version": 1,
        **_times(run, "startTime"),
    }


def _render_status(world: World, name: str) -> Response:
    run = next((run for run in world.of(_REAL_TIME) if run.definition.name == name), None)
    told = _times(run, "starttime") if run else {"status": "STOPPED"}
    source = {"name": "source", "LastInstanceStatus": "success", "jobInstanceId": 0}
    sink = {"name": "sink", "status": told["status"], "logPath": f"obs://dlf-log/{name}/sink.log"}
    return _json({"name": name, "nodes": [source, sink], **told})


def _render_details(world: World, name: str, number: str) -> Response:
    runs = [
        run for run in world.of(_BATCH) if (run.definition.name, str(run.number)) == (name, number)
    ]
    if not runs:
        return _render_fault(_NO_INSTANCE, "Job instance does not exist.")
    row = _instance(runs[0])
    del row["submitTime"]
    node = {"nodeName": "load", "status": row["status"], "errorMessage": runs[0].now.problem}
    node["logPath"] = f"obs://dlf-log/{name}/load.job"
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
