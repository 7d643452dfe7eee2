"""Scale v6, a framework that runs algorithms over files: one feed of whatever changed.

A job is its own run, each of its executions an attempt. The list is filtered and ordered by
`last_modified`, so one question tells all that changed, however many jobs there are; a job's
executions tell of attempts that came and went between two polls.

Follows ngageoint/scale 1b6a3b879ffe (2022-01-09): `scale/job/{views,models,serializers}.py`,
`scale/util/{rest,parse}.py`, `scale/docs/rest/v6/job.rst`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from operator import attrgetter
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from poller.errors import Invalid
from poller.events import rfc3339
from poller.known import Known, Memory
from poller.payload import Table, decode, iso_ms
from poller.runs import TERMINAL, Job, Ms, Problem, Seen, State
from poller.simulated.scale import KINDS, render
from poller.wire import BadRow, Options, Page, Request, Response, Vendor, Words, look_up, refuse

WORDS: Words = {
    "pending": (State.QUEUED, None),
    "queued": (State.QUEUED, None),
    "running": (State.RUNNING, None),
    "blocked": (State.SUSPENDED, "blocked"),
    "completed": (State.SUCCEEDED, None),
    "failed": (State.FAILED, None),
    "canceled": (State.CANCELED, None),
}

MARK = "modified"  # the latest last_modified of the passes that were read to their end, in ms
OVERLAP_MS = 60_000  # last_modified is set before the row is committed: it may show up late
PAGE_SIZE = 1000  # the server gives no more
MOST_PAGES = 10_000
MOST_ATTEMPTS = 1000  # told of a run at once; no job is tried so often between two polls

_ACTIVE = tuple(("status", word) for word in ("PENDING", "BLOCKED", "QUEUED", "RUNNING"))

T = TypeVar("T")
_Id = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Name = Annotated[str, msgspec.Meta(max_length=1024)]


class _Part(msgspec.Struct, gc=False):
    """An object within a row: a job type, node, error, recipe or batch."""

    id: _Id | None = None
    name: _Name | None = None
    version: _Name | None = None
    hostname: _Name | None = None
    title: str | None = None
    description: str | None = None


class _Row(msgspec.Struct, kw_only=True, gc=False):
    """A job, or one of its executions; versions differ in fields, some give bare ids."""

    id: _Id
    status: _Name
    exe_num: _Count | None = None
    num_exes: _Count | None = None
    max_tries: _Count | None = None
    job_type: _Part | _Id | None = None
    node: _Part | _Id | None = None
    error: _Part | _Id | None = None
    recipe: _Part | _Id | None = None
    batch: _Part | _Id | None = None
    created: str | None = None
    queued: str | None = None
    started: str | None = None
    ended: str | None = None
    last_status_change: str | None = None
    last_modified: str | None = None


class _Listing(msgspec.Struct, Generic[T]):
    results: list[T]
    next: str | None = None


_ROWS = Table(_Listing[_Row], _Listing[msgspec.Raw], _Row, attrgetter("results"), "$.results")


class _Pass(msgspec.Struct, frozen=True):
    """How far the feed was read, or, where `started_ms` is None, the list of active jobs."""

    started_ms: Ms | None = None
    page: int = 1


class _History(msgspec.Struct, frozen=True):
    """What was found of the attempts earlier than the one seen."""

    seen: Seen
    earlier: range
    found: dict[int, Seen] = {}
    page: int = 1


def start(options: Options, memory: Memory) -> Sequence[Request]:
    """The feed from the mark on; without a mark first all active jobs, which the feed follows.

    One after the other, so that an older answer about a job is never read after a newer one.
    """
    mark = memory.marks.get(MARK)
    return [_list(_Pass() if mark is None else _Pass(started_ms=int(mark) - OVERLAP_MS))]


def parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    """Read a page of the list, a page of a job's executions, or a job.

    Raises:
        VendorError: it is neither, or an error.
    """
    asked = request.context
    if isinstance(asked, _Pass):
        return _read_list(asked, response, memory)
    if isinstance(asked, _History):
        return _read_history(asked, response)
    if _is_missing(response, "not found."):
        return Page(gone=[(asked, asked)])
    return _read_jobs([decode(response.body, _Row)], memory)


def settle(options: Options, known: Known) -> Request:
    """The details of a job that the feed has not shown for long: purged jobs leave no trace."""
    return Request(path=f"/v6/jobs/{known.run_id}/", by_id=True, context=known.run_id)


def ask(options: Options, known: Known | None, seen: Seen) -> Request | None:
    """The executions, if attempts before the one seen have ends that were not told.

    A job that is tried again never becomes FAILED: it goes from RUNNING to QUEUED, and only its
    execution tells how the attempt ended.
    """
    first = 1
    if known is not None and known.marker is not None:
        first = int(known.marker) + (known.state in TERMINAL)
    latest = seen.ordinal or 0
    earlier = range(max(first, latest - MOST_ATTEMPTS), latest)
    return _executions(_History(seen=seen, earlier=earlier)) if earlier else None


def _list(at: _Pass) -> Request:
    query = _ACTIVE
    if at.started_ms is not None:
        query = (("started", rfc3339(max(1, at.started_ms))), ("order", "last_modified"))
    return Request(path="/v6/jobs/", query=(*query, ("order", "id"), *_paging(at.page)), context=at)


def _executions(at: _History) -> Request:
    path = f"/v6/jobs/{at.seen.run_id}/executions/"
    return Request(path=path, query=_paging(at.page), by_id=True, context=at)


def _paging(page: int) -> tuple[tuple[str, str], ...]:
    if page > MOST_PAGES:
        raise Invalid(f"the list does not end within {MOST_PAGES} pages")
    return (("page", str(page)), ("page_size", str(PAGE_SIZE)))


def _read_list(at: _Pass, response: Response, memory: Memory) -> Page:
    rows: list[_Row] = []
    bad: list[tuple[str, str]] = []
    more = False
    if not _is_missing(response, "invalid page"):  # else the list has become shorter
        listing, rows, bad = _ROWS.read(response.body)
        more = listing.next is not None or len(rows) + len(bad) >= PAGE_SIZE
    page = replace(_read_jobs(rows, memory), bad=[BadRow(*place) for place in bad])
    last_ms = next((ms for row in reversed(rows) if (ms := iso_ms(row.last_modified))), 0)
    # Their clock may be ahead of ours: a mark in the future would hide what comes before it.
    last_ms = min(memory.now_ms, last_ms)
    if more:
        return replace(page, follow=[_list(_further(at, last_ms))])
    if at.started_ms is None:
        return replace(page, follow=[_list(_Pass(started_ms=memory.since_ms))])
    mark = max(int(memory.marks.get(MARK, "0")), at.started_ms, last_ms)
    return replace(page, marks={MARK: str(mark)}, lasting=True)


def _further(at: _Pass, last_ms: Ms) -> _Pass:
    """Go on from the last row's instant: numbered pages shift while rows move to the end.

    Numbers are left for the active jobs, and where one instant has more rows than a page.
    """
    if at.started_ms is not None and last_ms > at.started_ms:
        return _Pass(started_ms=last_ms)
    return _Pass(started_ms=at.started_ms, page=at.page + 1)


def _read_history(at: _History, response: Response) -> Page:
    """At the last page: earlier attempts that have ended, oldest first, and the one seen."""
    refuse(response)
    listing, rows, bad = _ROWS.read(response.body)
    found = at.found | {seen.ordinal or 0: seen for row in rows if (seen := _past(at, row))}
    set_aside = [BadRow(*place) for place in bad]
    lowest = min((row.exe_num or 0 for row in rows), default=0)  # the newest come first
    if listing.next is not None and lowest > at.earlier.start:
        at = msgspec.structs.replace(at, found=found, page=at.page + 1)
        return Page(follow=[_executions(at)], bad=set_aside)
    return Page(runs=[*(found[number] for number in sorted(found)), at.seen], bad=set_aside)


def _past(at: _History, row: _Row) -> Seen | None:
    """An earlier attempt; None if it has no end yet, which an execution calls RUNNING."""
    past = _seen(row, at.seen.run_id, row.exe_num)
    if past.ordinal not in at.earlier or past.state not in TERMINAL:
        return None
    return msgspec.structs.replace(past, job=at.seen.job, past=True)


def _read_jobs(rows: Iterable[_Row], memory: Memory) -> Page:
    runs, shown = [], []
    for row in rows:
        run_id = str(row.id)
        times = (row.queued, row.started, row.ended, row.last_status_change)
        fingerprint = hash((row.status, row.num_exes, *times))
        known = memory.get(run_id, run_id)
        if known is not None and known.fingerprint == fingerprint and not known.vanished:
            shown.append(known)
        else:
            runs.append(_seen(row, run_id, row.num_exes or None, fingerprint))
    return Page(runs=runs, shown=shown)


def _seen(row: _Row, run_id: str, ordinal: int | None, fingerprint: int = 0) -> Seen:
    state, substate, unmapped = look_up(WORDS, row.status)
    job_type, node, error = _part(row.job_type), _part(row.node), _part(row.error)
    message = error.description or error.title or error.name or (error.id and f"error {error.id}")
    changed_ms = iso_ms(row.last_status_change)
    detail = {
        "num_exes": ordinal,
        "max_tries": row.max_tries,
        "node": node.hostname or node.id,
        "job_type_version": job_type.version,
        "recipe": _part(row.recipe).id,
        "batch": _part(row.batch).id,
    }
    return Seen(
        job=Job(id=run_id, name=job_type.name or None),
        run_id=run_id,
        state=state,
        vendor_state=row.status,
        substate=substate,
        marker=None if ordinal is None else str(ordinal),
        ordinal=ordinal,
        queued_ms=iso_ms(row.queued or row.created),
        started_ms=iso_ms(row.started),
        # CANCELED does not set `ended`.
        ended_ms=(iso_ms(row.ended) or changed_ms) if state in TERMINAL else None,
        state_ms=changed_ms if state is State.SUSPENDED else None,
        problem=Problem(error.name or None, message) if message and state is State.FAILED else None,
        detail={name: value for name, value in detail.items() if value is not None},
        unmapped=unmapped,
        fingerprint=fingerprint,
    )


def _part(value: _Part | int | None) -> _Part:
    return value if isinstance(value, _Part) else _Part(id=value)


def _is_missing(response: Response, opening: str) -> bool:
    """Whether Scale itself, not a proxy, says 404 in these words; other refusals are raised."""
    detail = ""
    if response.status in (400, 404):
        with suppress(Invalid):
            detail = str(decode(response.body, dict[str, Any]).get("detail", ""))[:256]
    if response.status == 404 and detail.lower().startswith(opening):
        return True
    if detail:
        raise Invalid(f"HTTP {response.status}: {detail}", response.body)
    refuse(response)
    return False


VENDOR = Vendor(
    name="scale",
    options=Options,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=KINDS,
)
