"""Huawei Cloud CDM (DataArts Migration), API v1.1, on an Apache Sqoop 2 engine.

`cdm/job/all` lists the jobs with the state of their last runs. A job that changed there is asked by
`cdm/job/{name}/status` for its last run, and by `cdm/submissions` for its ten newest ones if others
may have come and gone. Older clusters list no states: there every job is asked in turn.

Follows the API reference (job management, error codes) and the models of the vendor's SDK.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Annotated, NamedTuple, TypeAlias
from urllib.parse import quote

import msgspec
import pydantic

from poller import wire
from poller.errors import Invalid
from poller.known import Known, Memory
from poller.payload import MOST_ROWS, epoch_ms
from poller.runs import TERMINAL, Job, Seen
from poller.simulated.cdm import KINDS, render
from poller.vendors.cdm.rows import (
    JOBS,
    NEVER_RUN,
    NO_SUCH_JOB,
    RUNS,
    WORDS,
    JobRow,
    check,
    fault,
    see,
    whole,
)
from poller.wire import BadRow, Page, Request, Response, Vendor

_Filled: TypeAlias = Annotated[str, pydantic.Field(min_length=1)]


class Options(wire.Options):
    """CDM's own settings.

    Attributes:
        project_id: project of the cluster.
        cluster_id: the cluster that runs the jobs.
        jobs: names of the jobs to follow, each asked on its own; empty: all that are listed.
    """

    project_id: _Filled
    cluster_id: _Filled
    jobs: Annotated[tuple[_Filled, ...], pydantic.Field(strict=False)] = ()


_JOB_TYPES = ("NORMAL_JOB", "BATCH_JOB", "SCENARIO_JOB")
_PAGE_SIZE, _HISTORY_SIZE = 100, 10
_SHARE = 0.4  # of the rate for all jobs, as much for active ones, where each must be asked
_HISTORY_TRIES = 5  # then a run is told without those before it
_DATE_DIGITS = 13  # of a run id made of epoch ms; no count of runs gets there
_HEADERS = (("Accept", "application/json"), ("Content-Type", "application/json"))


class _Mark(NamedTuple):
    """What is noted of a job."""

    scope: str = ""  # the list that it stands in
    newest: str = ""  # id of its newest run told
    tries: int = 0  # to read its history, which may tell more than its last run
    signature: str = ""  # of the row by which it was asked last; empty: ask again
    owed: str = ""  # id of the newest run told before a history that could not be read


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


def start(options: Options, memory: Memory) -> list[Request]:
    """The lists of jobs, or each job that is named in settings."""
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


def settle(options: Options, known: Known) -> Request:
    """The job's history: `status` tells of its last run only."""
    return _history(options, _Asked(known.job, known.scope, settling=known.run_id))


def ask(options: Options, known: Known | None, seen: Seen) -> None:
    """Nothing: the history is read before a run is shown."""


def parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    """Read a page of a list of jobs, or what a job says of its last run or runs.

    Raises:
        VendorError: it is neither, or an error.
    """
    asked: _Listing | _Asked = request.context
    if isinstance(asked, _Asked) and fault(response)[0] in NO_SUCH_JOB:
        return _no_such_job(asked, memory)
    check(response)
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
    news, shown, progress = [], [], {}
    for seen in page.runs:
        known = memory.get(seen.job.id, seen.run_id)
        if known is None or known.vanished or known.fingerprint != seen.fingerprint:
            news.append(seen)
        else:
            shown.append(known)
            if seen.progress is not None:
                progress[known.key] = seen.progress
    return replace(page, runs=news, shown=shown, progress=progress, bad=bad)


def _jobs(options: Options, asked: _Listing, body: bytes, memory: Memory) -> Page:
    page, rows, faulty = JOBS.read(body)
    active = sum(1 for _ in memory.active())
    shown: list[Known] = []
    follow = list(asked.questions)
    marks: dict[str, str] = {}
    for row in rows:
        mark = _mark(memory, row.name)
        known = memory.get(row.name, mark.newest)
        if known is not None and not known.vanished:
            shown.append(known)
        if _is_due(row, mark, known, active, memory):
            question, noted = _about(options, asked.scope, row, mark, memory)
            follow += question
            marks |= noted
    names = asked.names.union(row.name for row in rows)
    if len(names) > MOST_ROWS:
        raise Invalid(f"more than {MOST_ROWS} jobs of type {asked.scope}")
    total, read = whole(page.total), asked.number * (whole(page.page_size) or _PAGE_SIZE)
    if len(names) > len(asked.names) and (total is None or read < total):
        follow = [_list(options, _Listing(asked.scope, asked.number + 1, names, tuple(follow)))]
    elif names:  # marks of jobs that are gone would pile up
        stale = f'["{asked.scope}",'
        marks |= {k: "" for k, v in memory.marks.items() if k not in names and v.startswith(stale)}
    # Not all may be asked in one poll: histories first, the others in an order that favours none.
    follow.sort(key=lambda each: (each.spread, not each.query, _shuffle(each.path, memory.now_ms)))
    bad = [BadRow(*place) for place in faulty]
    return Page(shown=shown, follow=follow, complete=asked.scope, marks=marks, bad=bad)


def _is_due(row: JobRow, mark: _Mark, known: Known | None, active: int, memory: Memory) -> bool:
    """Whether to ask a job: its row changed, is in doubt, or tells nothing and it is its turn."""
    if memory.last_good_ms is None:
        return not mark.signature  # first contact ends when each job was asked once
    if row.signature != mark.signature:
        return True
    watched = known is not None and known.watched
    if (watched and row.ended) or (known is not None and known.vanished):
        return True
    if mark.owed and _turns(memory, 1000 * memory.resync_s, row.name):
        return True
    if row.telling:
        return False
    period_ms = 1000 * (active if watched else len(memory.marks)) / (_SHARE * memory.rate_per_s)
    return _turns(memory, period_ms, row.name)


def _turns(memory: Memory, period_ms: float, name: str) -> bool:
    """Whether a period began for this job since the last good poll; all begin at other times."""
    phase = _shuffle(name)
    before, now = (memory.last_good_ms or 0) / period_ms, memory.now_ms / period_ms
    return (before + phase) // 1 != (now + phase) // 1


def _about(
    options: Options, scope: str, row: JobRow, mark: _Mark, memory: Memory
) -> tuple[list[Request], dict[str, str]]:
    """What to ask of a job that is due, and what to note of it."""
    job = Job(id=row.name, name=row.name, group=row.group_name)
    asked = _Asked(job, scope, row.signature)
    if row.word in NEVER_RUN:
        return [], _noted(memory, asked, "")
    if 0 < mark.tries < _HISTORY_TRIES:
        return [_history(options, asked)], _tried(memory, asked, mark)
    if mark.owed and row.signature == mark.signature:
        return [_history(options, asked)], {}
    spread = not row.telling if mark.signature else row.ended
    return [_status(options, asked, spread=spread)], {}


def _shuffle(text: str, salt: int = 0) -> float:
    """A number from 0 to 1 that looks random, but is always the same."""
    return zlib.crc32(text.encode(), salt % 2**32) / 2**32


def _last_run(options: Options, asked: _Asked, last: Seen, memory: Memory) -> Page:
    mark, notes = _mark(memory, asked.job.id), []
    if _may_have_missed(last, mark, memory):
        if mark.tries < _HISTORY_TRIES:
            question = _history(options, asked._replace(last=last))
            return Page(follow=[question], marks=_tried(memory, asked, mark))
        notes = [f"job {asked.job.id!r}: its history cannot be read, runs may be told late"]
        mark = mark._replace(owed=mark.owed or mark.newest or "0")
    marks = _noted(memory, asked, last.run_id, owed=mark.owed)
    return Page(runs=[last], marks=marks, notes=notes)


def _may_have_missed(last: Seen, mark: _Mark, memory: Memory) -> bool:
    """Whether the history may tell of runs, or of an end, that nothing else has told."""
    if not mark.newest:
        if memory.last_good_ms is None:
            return memory.publish_all
        return (last.queued_ms or 0) > memory.contact_ms
    known = memory.get(last.job.id, mark.newest)
    steps = _number(last) - int(mark.newest)
    return steps > 1 or (steps == 1 and known is not None and known.state not in TERMINAL)


def _caught_up(asked: _Asked, runs: list[Seen], memory: Memory) -> Page:
    """The last run, and before it what else the history tells beyond what was told."""
    mark, since_ms = _mark(memory, asked.job.id), memory.contact_ms
    newest = int(mark.owed or mark.newest or 0)
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


def _noted(
    memory: Memory, asked: _Asked, newest: str, tries: int = 0, owed: str = ""
) -> dict[str, str]:
    """The mark of a job, if it is another than before."""
    text = msgspec.json.encode(_Mark(asked.scope, newest, tries, asked.signature, owed)).decode()
    return {} if memory.marks.get(asked.job.id) == text else {asked.job.id: text}


def _tried(memory: Memory, asked: _Asked, mark: _Mark) -> dict[str, str]:
    """The mark of a job whose history is asked for: until it is read, the job is asked again."""
    asked = asked._replace(signature="")
    return _noted(memory, asked, mark.newest, mark.tries + 1, mark.owed)


def _runs(asked: _Asked, body: bytes, memory: Memory) -> tuple[list[Seen], list[BadRow]]:
    """A job's runs, oldest first, by submission-id; by creation-date if its runs before were."""
    _, rows, faulty = RUNS.read(body)
    runs, bad = [], [BadRow(*place) for place in faulty]
    like = asked.settling or _mark(memory, asked.job.id).newest
    like = like or (asked.last.run_id if asked.last is not None else "")
    dated = len(like) == _DATE_DIGITS if like else not any(whole(r.submission_id) for r in rows)
    for row in rows:
        number = epoch_ms(row.creation_date) if dated else whole(row.submission_id)
        if row.status.strip().lower() in NEVER_RUN:
            continue
        if (row.job_name or asked.job.id) != asked.job.id:
            bad.append(BadRow("$.submissions[*].job-name", f"not {asked.job.id!r}"))
        elif not number:
            field = "creation-date" if dated else "submission-id"
            bad.append(BadRow(f"$.submissions[*].{field}", "missing: the run's id"))
        else:
            runs.append(see(asked.scope, asked.job, str(number), row))
    return sorted(runs, key=_number), bad


def _number(seen: Seen) -> int:
    return int(seen.run_id)


VENDOR = Vendor(
    name="cdm",
    options=Options,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=KINDS,
)
