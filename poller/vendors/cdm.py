"""Huawei Cloud CDM (DataArts Migration), API v1.1, on an Apache Sqoop 2 engine.

`cdm/job/all` lists the jobs with the state of their last runs. A job that changed there is asked by
`cdm/job/{name}/status` for its last run, and by `cdm/submissions` for its ten newest ones if others
may have come and gone. Older clusters list no states: there every job is asked in turn.

Follows the API reference (job management, error codes) and the models of the vendor's SDK.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Annotated, Any, Generic, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import msgspec
import pydantic

from poller import wire
from poller.errors import Invalid, Rejected, Unreachable
from poller.known import Known, Memory
from poller.payload import Table, decode, epoch_ms, text_of
from poller.runs import TERMINAL, Job, Problem, Scalar, Seen, State
from poller.wire import BadRow, Page, Request, Response, Vendor, Words, look_up, refuse
from poller.world import Definition, Kind, SimRun, World

Filled: TypeAlias = Annotated[str, pydantic.Field(min_length=1)]


class Options(wire.Options):
    """CDM's own settings.

    Attributes:
        project_id: project of the cluster.
        cluster_id: the cluster that runs the jobs.
        jobs: names of the jobs to follow, each asked on its own; empty: all that are listed.
    """

    project_id: Filled
    cluster_id: Filled
    jobs: Annotated[tuple[Filled, ...], pydantic.Field(strict=False)] = ()


WORDS: Words = {
    "pending": (State.QUEUED, None),
    "booting": (State.STARTING, None),
    "running": (State.RUNNING, None),
    "succeeded": (State.SUCCEEDED, None),
    "failed": (State.FAILED, None),
    "failure_on_submit": (State.FAILED, "never_started"),
    "stopped": (State.CANCELED, None),
    "unknown": (State.UNKNOWN, None),
}
_NEVER_RUN = ("new", "never_executed")  # no run; its creation-date is made up by the question

_NO_SUCH_JOB = ("cdm.0054", "cdm.0100")
_INTERNAL = ("cdm.0000", "cdm.0036")
_REFUSED = ("cdm.0032", "apig.0301", "apig.0302", "apig.0303", "apig.0307")
_THROTTLED = "apig.0308"

_JOB_TYPES = ("NORMAL_JOB", "BATCH_JOB", "SCENARIO_JOB")
_PAGE_SIZE, _HISTORY_SIZE = 100, 10
_SHARE = 0.4  # of the rate for all jobs, as much for active ones, where each must be asked
_HISTORY_TRIES = 5  # then a run is told without those before it
_DATE_DIGITS = 13  # of a run id made of epoch ms; no count of runs gets there
_HEADERS = (("Accept", "application/json"), ("Content-Type", "application/json"))
_COUNTERS = "org.apache.sqoop.submission.counter.SqoopCounters"
_COUNTED = tuple(
    f"{what}_{how}" for what in ("ROWS", "BYTES", "FILES") for how in ("READ", "WRITTEN")
)

R = TypeVar("R")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Number: TypeAlias = int | float | Annotated[str, msgspec.Meta(max_length=64)] | None


class _Job(msgspec.Struct):
    """A job of the list; its `*-config-values` are left alone, they may hold passwords."""

    name: _Name
    status: _Text | None = None
    external_id: _Text | None = None
    execute_create_date: _Number = None
    execute_start_date: _Number = None
    execute_update_date: _Number = None
    group_name: _Text | None = None

    @property
    def word(self) -> str:
        return (self.status or "").strip().lower()

    @property
    def ended(self) -> bool:
        return look_up(WORDS, self.word).state in TERMINAL

    @property
    def began(self) -> tuple[_Number, ...]:
        return (self.external_id, self.execute_create_date, self.execute_start_date)

    @property
    def telling(self) -> bool:
        """Whether no run can come and go without changing the signature."""
        return self.word != "" and any(self.began)

    @property
    def signature(self) -> str:
        """What changes only with the last run and its state."""
        return f"{self.word} {self.began} {self.ended and self.execute_update_date}"


class _Run(msgspec.Struct, rename="kebab"):
    """A run, which the vendor calls a submission."""

    status: _Name
    job_name: _Text | None = None
    submission_id: _Number = None
    creation_date: _Number = None
    creation_user: _Text | None = None
    execute_date: _Number = None
    last_update_date: _Number = None
    external_id: _Text | None = None
    progress: _Number = None
    error_summary: Any = None
    error_details: Any = None
    counters: Any = None
    write_rows: Any = msgspec.field(default=None, name="write_rows")
    update_rows: Any = msgspec.field(default=None, name="update_rows")
    delete_rows: Any = msgspec.field(default=None, name="delete_rows")


class _Jobs(msgspec.Struct, Generic[R]):
    jobs: list[R]
    total: Any = None
    page_size: Any = None


class _Runs(msgspec.Struct, Generic[R]):
    submissions: list[R]


_JOBS = Table(_Jobs[_Job], _Jobs[msgspec.Raw], _Job, lambda page: page.jobs, "$.jobs")
_RUNS = Table(_Runs[_Run], _Runs[msgspec.Raw], _Run, lambda page: page.submissions, "$.submissions")


class _Mark(NamedTuple):
    """What is noted of a job."""

    scope: str = ""  # the list that it stands in
    newest: str = ""  # id of its newest run told
    tries: int = 0  # to read its history, which may tell more than its last run
    signature: str = ""  # of the row by which it was asked last; empty: ask again


class _Listing(NamedTuple):
    """Asks for a page of a list."""

    scope: str
    number: int = 1
    names: frozenset[str] = frozenset()  # on the pages before
    questions: tuple[Request, ...] = ()  # that these call for


class _Asked(NamedTuple):
    """Asks a job for its last run or its history."""

    job: Job
    scope: str = ""
    signature: str = ""
    settling: str = ""  # id of the only run of interest
    last: Seen | None = None  # the last run, for the history


def _start(options: Options, memory: Memory) -> list[Request]:
    if not options.jobs:
        return [_list(options, _Listing(scope)) for scope in _JOB_TYPES]
    jobs = [Job(id=name, name=name) for name in dict.fromkeys(options.jobs)]
    return [_status(options, _Asked(job), spread=len(jobs) > 4) for job in jobs]


def _get(options: Options, path: str, asked: object, *query: tuple[str, str]) -> Request:
    project, cluster = quote(options.project_id, safe=""), quote(options.cluster_id, safe="")
    path = f"/v1.1/{project}/clusters/{cluster}/cdm/{path}"
    return Request(path=path, query=query, headers=_HEADERS, context=asked)


def _list(options: Options, asked: _Listing) -> Request:
    page = (("page_no", str(asked.number)), ("page_size", str(_PAGE_SIZE)))
    return _get(options, "job/all", asked, ("jobType", asked.scope), *page)


def _status(options: Options, asked: _Asked, *, spread: bool = False) -> Request:
    request = _get(options, f"job/{quote(asked.job.id, safe='')}/status", asked)
    by_id = asked.scope != ""  # else it stands for the list
    return msgspec.structs.replace(request, by_id=by_id, spread=spread)


def _history(options: Options, asked: _Asked) -> Request:
    request = _get(options, "submissions", asked, ("jname", asked.job.id))
    return msgspec.structs.replace(request, by_id=True)


def _settle(options: Options, known: Known) -> Request:
    return _history(options, _Asked(known.job, known.scope, settling=known.run_id))


def _ask(options: Options, known: Known | None, seen: Seen) -> None:
    """Nothing: the history is read before a run is shown."""


def _parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    asked: _Listing | _Asked = request.context
    if isinstance(asked, _Asked) and _fault(response)[0] in _NO_SUCH_JOB:
        return _no_such_job(asked, memory)
    _check(response)
    if isinstance(asked, _Listing):
        return _jobs(options, asked, response.body, memory)
    runs, bad = _runs(asked, response.body, memory)
    if asked.settling:
        page = Page(runs=[seen for seen in runs if seen.run_id == asked.settling])
    elif request.query:  # only the history has one
        page = _caught_up(asked, runs, memory)
    elif runs:
        page = _last_run(options, asked, runs[-1], memory)
    else:
        page = Page(marks={} if bad else _noted(memory, asked, ""))
    news, shown = [], []
    for seen in page.runs:
        known = memory.get(seen.job.id, seen.run_id)
        if known is None or known.vanished or known.fingerprint != seen.fingerprint:
            news.append(seen)
        else:
            shown.append(known)
    return replace(page, runs=news, shown=shown, bad=bad)


def _jobs(options: Options, asked: _Listing, body: bytes, memory: Memory) -> Page:
    page, rows, faulty = _JOBS.read(body)
    active = sum(1 for _ in memory.active())
    shown: list[Known] = []
    follow = list(asked.questions)
    marks: dict[str, str] = {}
    for row in rows:
        mark = _mark(memory, row.name)
        known = memory.get(row.name, mark.newest)
        if known is not None and not known.vanished:
            shown.append(known)
        if not _is_due(row, mark, known, active, memory):
            continue
        job = Job(id=row.name, name=row.name, group=row.group_name)
        about = _Asked(job, asked.scope, row.signature)
        if row.word in _NEVER_RUN:
            marks |= _noted(memory, about, "")
        elif 0 < mark.tries < _HISTORY_TRIES:
            marks |= _noted(memory, about._replace(signature=""), mark.newest, mark.tries + 1)
            follow.append(_history(options, about))
        else:
            spread = not row.telling if mark.signature else row.ended
            follow.append(_status(options, about, spread=spread))
    names = asked.names.union(row.name for row in rows)
    total, read = _whole(page.total), asked.number * (_whole(page.page_size) or _PAGE_SIZE)
    if len(names) > len(asked.names) and (total is None or read < total):
        follow = [_list(options, _Listing(asked.scope, asked.number + 1, names, tuple(follow)))]
    elif names:  # marks of jobs that are gone would pile up
        stale = f'["{asked.scope}",'
        marks |= {k: "" for k, v in memory.marks.items() if k not in names and v.startswith(stale)}
    # Not all may be asked in one poll: histories first, the others in an order that favours none.
    follow.sort(key=lambda each: (each.spread, not each.query, _shuffle(each.path, memory.now_ms)))
    bad = [BadRow(*fault) for fault in faulty]
    return Page(shown=shown, follow=follow, complete=asked.scope, marks=marks, bad=bad)


def _is_due(row: _Job, mark: _Mark, known: Known | None, active: int, memory: Memory) -> bool:
    """Whether to ask a job: its row changed, is in doubt, or tells nothing and it is its turn."""
    if memory.last_good_ms is None:
        return not mark.signature  # first contact ends when each job was asked once
    if row.signature != mark.signature:
        return True
    watched = known is not None and known.watched
    if (watched and row.ended) or (known is not None and known.vanished):
        return True
    if row.telling:
        return False
    period_ms = 1000 * (active if watched else len(memory.marks)) / (_SHARE * memory.rate_per_s)
    phase = _shuffle(row.name)
    before, now = memory.last_good_ms / period_ms, memory.now_ms / period_ms
    return (before + phase) // 1 != (now + phase) // 1


def _shuffle(text: str, salt: int = 0) -> float:
    """A number from 0 to 1 that looks random, but is always the same."""
    return zlib.crc32(text.encode(), salt % 2**32) / 2**32


def _last_run(options: Options, asked: _Asked, last: Seen, memory: Memory) -> Page:
    mark, notes = _mark(memory, asked.job.id), []
    if _may_have_missed(last, mark, memory):
        if mark.tries < _HISTORY_TRIES:
            marks = _noted(memory, asked._replace(signature=""), mark.newest, mark.tries + 1)
            return Page(follow=[_history(options, asked._replace(last=last))], marks=marks)
        notes = [f"job {asked.job.id!r}: no history to be had, runs may have been missed"]
    return Page(runs=[last], marks=_noted(memory, asked, last.run_id), notes=notes)


def _may_have_missed(last: Seen, mark: _Mark, memory: Memory) -> bool:
    """Whether the history may tell of runs, or of an end, that nothing else has told."""
    if not mark.newest:
        if memory.last_good_ms is None:
            return memory.publish_all
        return (last.queued_ms or 0) > memory.last_good_ms
    known = memory.get(last.job.id, mark.newest)
    steps = _number(last) - int(mark.newest)
    return steps > 1 or (steps == 1 and known is not None and known.state not in TERMINAL)


def _caught_up(asked: _Asked, runs: list[Seen], memory: Memory) -> Page:
    """The last run, and before it what else the history tells beyond what was told."""
    newest, since_ms = int(_mark(memory, asked.job.id).newest or 0), memory.last_good_ms or 0
    notes = []
    if newest and len(runs) >= _HISTORY_SIZE and _number(runs[0]) > newest:
        notes = [f"job {asked.job.id!r}: its history is too short, runs may have been missed"]
    if asked.last is not None and all(seen.run_id != asked.last.run_id for seen in runs):
        runs = sorted([*runs, asked.last], key=_number)
    told = [
        seen
        for seen in runs
        if (_number(seen) > newest if newest else (seen.queued_ms or memory.now_ms) > since_ms)
        or memory.get(seen.job.id, seen.run_id) is not None
    ]
    if not told or _number(told[-1]) <= newest:
        return Page(runs=told)  # it lags behind what made us ask
    return Page(runs=told, marks=_noted(memory, asked, told[-1].run_id), notes=notes)


def _no_such_job(asked: _Asked, memory: Memory) -> Page:
    name, runs = asked.job.id, [asked.last] if asked.last else []
    told = {seen.run_id for seen in runs}
    left = [run.run_id for run in memory.active() if run.job.id == name]
    gone = [(name, run_id) for run_id in left if run_id not in told]
    marks = {name: ""} if asked.scope else _noted(memory, asked._replace(signature="none"), "")
    notes = [f"there is no job {name!r}"] if marks and not asked.scope else []
    return Page(runs=runs, gone=gone, marks=marks, notes=notes)


def _mark(memory: Memory, name: str) -> _Mark:
    text = memory.marks.get(name)
    return msgspec.json.decode(text, type=_Mark) if text else _Mark()


def _noted(memory: Memory, asked: _Asked, newest: str, tries: int = 0) -> dict[str, str]:
    """The mark of a job, if it is another than before."""
    text = msgspec.json.encode(_Mark(asked.scope, newest, tries, asked.signature)).decode()
    return {} if memory.marks.get(asked.job.id) == text else {asked.job.id: text}


def _runs(asked: _Asked, body: bytes, memory: Memory) -> tuple[list[Seen], list[BadRow]]:
    """A job's runs, oldest first, by submission-id; by creation-date if its runs before were."""
    _, rows, faulty = _RUNS.read(body)
    runs, bad = [], [BadRow(*fault) for fault in faulty]
    like = asked.settling or _mark(memory, asked.job.id).newest
    like = like or (asked.last.run_id if asked.last is not None else "")
    dated = len(like) == _DATE_DIGITS or not (like or any(_whole(r.submission_id) for r in rows))
    for row in rows:
        number = epoch_ms(row.creation_date) if dated else _whole(row.submission_id)
        if row.status.strip().lower() in _NEVER_RUN:
            continue
        if (row.job_name or asked.job.id) != asked.job.id:
            bad.append(BadRow("$.submissions[*].job-name", f"not {asked.job.id!r}"))
        elif not number:
            field = "creation-date" if dated else "submission-id"
            bad.append(BadRow(f"$.submissions[*].{field}", "missing: the run's id"))
        else:
            runs.append(_seen(asked, row, str(number)))
    return sorted(runs, key=_number), bad


def _seen(asked: _Asked, row: _Run, run_id: str) -> Seen:
    state, substate, unmapped = look_up(WORDS, row.status)
    queued_ms = epoch_ms(row.creation_date)
    started_ms = epoch_ms(row.execute_date) if substate != "never_started" else None
    ended_ms = epoch_ms(row.last_update_date) if state in TERMINAL else None
    percent = row.progress if isinstance(row.progress, int | float) else -1
    why = text_of(row.error_summary) or text_of(row.error_details)
    return Seen(
        job=msgspec.structs.replace(asked.job, owner=row.creation_user or asked.job.owner),
        run_id=run_id,
        state=state,
        vendor_state=row.status,
        substate=substate,
        queued_ms=queued_ms,
        started_ms=started_ms,
        ended_ms=ended_ms,
        progress=min(percent, 100) / 100 if percent >= 0 else None,
        problem=Problem(None, why) if why and state is State.FAILED else None,
        detail=_detail(row),
        scope=asked.scope,
        unmapped=unmapped,
        fingerprint=hash((row.status, queued_ms, started_ms, ended_ms, why)),
    )


def _detail(row: _Run) -> dict[str, Scalar]:
    counters = row.counters.get(_COUNTERS) if isinstance(row.counters, dict) else None
    counted = counters if isinstance(counters, dict) else {}
    detail: dict[str, Scalar] = {name.lower(): _whole(counted.get(name)) for name in _COUNTED}
    for name in ("write_rows", "update_rows", "delete_rows"):
        detail[name] = _whole(getattr(row, name)) or None
    detail["external_id"] = row.external_id or None
    return {name: value for name, value in detail.items() if value is not None}


def _number(seen: Seen) -> int:
    return int(seen.run_id)


def _whole(value: object) -> int | None:
    """A number, or digits in a text; None for a negative one, which means not applicable."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 2**63 else None


def _fault(response: Response) -> tuple[str, str]:
    """An error's code (in lower case, as the gateway's prefix in one spelling) and a sentence."""
    if response.status == 200:
        return "", ""
    try:
        error = decode(response.body, dict[str, Any])
    except Invalid:
        error = {}
    code = text_of(error.get("errCode")) or text_of(error.get("error_code")) or ""
    said = text_of(error.get("externalMessage")) or text_of(error.get("error_msg")) or ""
    return code.strip().lower().replace("apigw.", "apig."), f"{code}: {said[:256]}"


def _check(response: Response) -> None:
    """Raise what an error means: by its code, else by its status."""
    code, told = _fault(response)
    if code in _REFUSED:
        raise Rejected(told)
    if code in _INTERNAL:
        raise Unreachable(told)
    if code == _THROTTLED:
        response = msgspec.structs.replace(response, status=429)
    elif code and response.status < 500 and response.status not in (401, 403, 429):
        raise Invalid(told, response.body)
    refuse(response)


_SAID = {state: word.upper() for word, (state, substate) in WORDS.items() if substate is None}


def _render(world: World, request: Request) -> Response:
    query = dict(request.query)
    match [unquote(part) for part in request.path.split("/")]:
        case ["", "v1.1", _, "clusters", _, "cdm", "job", "all"]:
            return _render_jobs(world, query)
        case ["", "v1.1", _, "clusters", _, "cdm", "job", name, *asked] if asked in (
            [],
            ["status"],
        ):
            pass
        case ["", "v1.1", _, "clusters", _, "cdm", *asked] if asked == ["submissions"]:
            name = query.get("jname", "")
        case _:
            return _json({"error_code": "APIG.0101", "error_msg": "The API does not exist"}, 404)
    found = [definition for definition in world.definitions if definition.name == name]
    if not found:
        missing = f"Job[{name}] doesn't exist."
        return _json({"errCode": "Cdm.0100", "externalMessage": missing}, 400)
    runs = [run for run in reversed(world.runs.values()) if run.definition is found[0]]
    if not asked:
        jobs = [_render_job(world, found[0], runs[0] if runs else None)]
        return _json({"total": 0, "jobs": jobs, "page_no": 1, "page_size": 10})
    rows = [_render_run(world, run) for run in runs[:_HISTORY_SIZE]]
    if asked == ["submissions"]:
        return _json({"submissions": rows, "total": len(runs), "page_no": 1, "page_size": 10})
    never = {"job-name": name, "status": "NEVER_EXECUTED", "creation-date": world.now_ms}
    return _json({"submissions": rows[:1] or [never]})


def _render_jobs(world: World, query: dict[str, str]) -> Response:
    kind = query.get("jobType", _JOB_TYPES[0])
    number, size = int(query.get("page_no", "1")), int(query.get("page_size", "10"))
    last = {run.definition.number: run for run in world.runs.values()}
    jobs = [definition for definition in world.definitions if definition.kind.name == kind]
    part = jobs[(number - 1) * size : number * size]
    rows = [_render_job(world, definition, last.get(definition.number)) for definition in part]
    return _json({"total": len(jobs), "jobs": rows, "page_no": number, "page_size": size})


def _render_job(world: World, definition: Definition, last: SimRun | None) -> dict[str, Any]:
    password = {"name": "toJobConfig.password", "value": "a-password"}
    row: dict[str, Any] = {
        "name": definition.name,
        "job_type": definition.kind.name,
        "group_name": definition.group,
        "to-config-values": {"configs": [{"name": "toJobConfig", "inputs": [password]}]},
        "driver-config-values": {"configs": [{"name": "jarConfig", "inputs": {}}]},
        "status": _SAID[last.now.state] if last is not None else "NEW",
    }
    if last is not None:
        row["execute_create_date"] = last.now.queued_ms
        row["execute_update_date"] = last.now.ended_ms or world.now_ms
    if last is not None and last.now.started_ms is not None:
        row["execute_start_date"] = last.now.started_ms
        row["external_id"] = f"job_local_{last.number:04}"
    return row


def _render_run(world: World, run: SimRun) -> dict[str, Any]:
    now, percent = run.now, 100 * run.progress(world.now_ms)
    row: dict[str, Any] = {
        "job-name": run.definition.name,
        "submission-id": run.number,
        "status": _SAID[now.state],
        "creation-user": run.definition.owner,
        "creation-date": str(now.queued_ms) if run.number % 2 else now.queued_ms,
        "last-update-date": now.changed_ms,
        "last-udpate-user": run.definition.owner,  # the vendor's spelling
        "isStopingIncrement": "",
        "progress": -1 if now.state is State.FAILED else percent,
    }
    if now.started_ms is not None:
        row |= {"execute-date": now.started_ms, "external-id": f"job_local_{run.number:04}"}
    if now.problem is not None:
        row |= {"error-summary": now.problem, "error-details": f"{now.problem}\n\tat Task.run"}
    if now.state is State.SUCCEEDED:
        counted = dict.fromkeys(_COUNTED, -1) | dict.fromkeys(_COUNTED[:2], 10 * run.number)
        row["counters"] = {_COUNTERS: counted}
    return row


def _json(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"content-type": "application/json"}
    return Response(status=status, headers=headers, body=msgspec.json.encode(content))


_STATES = frozenset(_SAID) - {State.UNKNOWN}

VENDOR = Vendor(
    name="cdm",
    options=Options,
    words=WORDS,
    start=_start,
    parse=_parse,
    settle=_settle,
    ask=_ask,
    render=_render,
    kinds=tuple(Kind(name=name, states=_STATES) for name in _JOB_TYPES[:2]),
)
