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

from collections.abc import Sequence
from urllib.parse import quote

import msgspec
import pydantic
from msgspec.structs import replace

from poller import wire
from poller.errors import Invalid
from poller.known import Known, Memory
from poller.payload import decode
from poller.runs import TERMINAL, Seen, State
from poller.simulated.kylin import KINDS, render
from poller.vendors.kylin.rows import (
    LIST,
    LIST4,
    WORDS,
    Envelope,
    Row,
    Row4,
    Step,
    Steps,
    blamed,
    refuse,
    see,
    unwrap,
)
from poller.wire import BadRow, Page, Request, Response, Vendor


class Options(wire.Options):
    """Kylin's own settings.

    Attributes:
        projects: whose jobs to follow, one list each; empty: all projects' jobs in one list.
    """

    projects: tuple[str, ...] = pydantic.Field(default=(), strict=False)


PAGE_SIZE = 200
_MOST_PAGES = 1000
_DAY, _WEEK, _MONTH, _ALL = 0, 1, 2, 4
"""What Kylin 5 takes for time_filter."""
_HEADERS = (
    ("Accept", "application/vnd.apache.kylin-v4-public+json, application/json;q=0.5"),
    ("Accept-Language", "en"),
)


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
    """Read a page of a list, one job that was asked for, or the steps of a failed one.

    Raises:
        VendorError: it is none of these, or an error.
    """
    asked = request.context
    if isinstance(asked, _Asked):
        return _read_list(asked, response, memory)
    if isinstance(asked, Known):
        return _read_job(asked, response)
    refuse(response)
    steps = unwrap(decode(response.body, Envelope[list[Step] | Steps]))
    return Page(runs=[blamed(asked, steps.steps if isinstance(steps, Steps) else steps)])


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
    return Page(
        runs=runs,
        shown=shown,
        progress={row.id: share for row in rows if (share := row.share) is not None},
        follow=follow,
        marks=marks,
        bad=bad,
        notes=notes,
        lasting=True,
    )


def _rows(response: Response, page: int = 0) -> tuple[Sequence[Row], list[BadRow], bool]:
    """Good rows, bad ones, and whether there are more behind them."""
    refuse(response)
    rows: Sequence[Row]
    if response.body[:64].lstrip().startswith(b"["):
        _, rows, bad = LIST4.read(response.body)
        more = len(rows) + len(bad) >= PAGE_SIZE
    else:
        answer, rows, bad = LIST.read(response.body)
        more = (page + 1) * PAGE_SIZE < unwrap(answer).total_size and bool(rows or bad)
    return rows, [BadRow(*place) for place in bad], more


def _sift(rows: Sequence[Row], memory: Memory) -> tuple[list[Seen], list[Known], bool]:
    """Changed runs, unchanged ones, and whether finished ones are among those that come last.

    Behind a finished job that has not changed, nothing has. An unfinished one proves nothing: it
    comes to the front with each of its steps.
    """
    runs, shown, caught_up = [], [], False
    for row in rows:
        known = memory.get(row.id, row.id)
        if known is not None and known.fingerprint == row.fingerprint and not known.vanished:
            shown.append(known)
            caught_up = caught_up or known.state in TERMINAL
        else:
            runs.append(see(row))
            caught_up = False
    return runs, shown, caught_up


def _read_job(known: Known, response: Response) -> Page:
    """The job, or that there is none: Kylin 4's empty answer, Kylin 5's list without it."""
    rows: Sequence[Row]
    bad: list[BadRow] = []
    if known.scope == "4":
        if response.status in (406, 500):
            # It has become a Kylin 5, or something went wrong: one error for everything.
            return Page()
        refuse(response)
        none = not response.body.strip()
        rows = [] if none else [decode(response.body, Row4)]
    else:
        rows, bad, more = _rows(response)
        none = not more and not bad
    runs = [see(row) for row in rows if row.id == known.run_id]
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


VENDOR = Vendor(
    name="kylin",
    options=Options,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=KINDS,
)
