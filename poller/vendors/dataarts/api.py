"""How DataArts is asked and answers: questions, the list of jobs, and errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec
import pydantic
from msgspec.structs import replace

from poller import wire
from poller.errors import Invalid, Limited, Rejected, Unreachable
from poller.payload import MOST_ROWS, Table, decode
from poller.vendors.dataarts.rows import JOBS, InstanceRow, JobRow
from poller.wire import BadRow, Request, Response

NO_JOB, NO_INSTANCE = "DLF.0100", "DLF.0137"
_REFUSED = ("DLF.6888", "APIG.0301", "APIG.0302", "APIG.0303", "APIG.0307")
_THROTTLED, _BROKEN = "APIG.0308", "APIG.0201"

_PAGE_SIZE = 100

E = TypeVar("E")
R = TypeVar("R")
Query: TypeAlias = tuple[tuple[str, str], ...]


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


class JobList(msgspec.Struct, frozen=True):
    """Asks for a page of the jobs of one sort.

    Attributes:
        offset: number of the page, from 0.
        read: rows of the pages before.
        instances: of batch jobs, those that this poll has shown.
    """

    sort: str
    offset: int = 0
    read: frozenset[object] = frozenset()
    instances: tuple[InstanceRow, ...] = ()


def get(options: Options, asked: object, *path: str, query: Query = (), by_id: bool) -> Request:
    """A question about jobs of the project and workspace."""
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


def ask_jobs(options: Options, asked: JobList) -> Request:
    """That page of jobs."""
    page = (("offset", str(asked.offset)), ("limit", str(_PAGE_SIZE)))
    return get(options, asked, query=(("jobType", asked.sort.upper()), *page), by_id=False)


def read_jobs(
    options: Options, asked: JobList, response: Response
) -> tuple[list[JobRow], list[BadRow], list[Request], bool]:
    """Good rows, bad ones, the next page if there is one, and whether all jobs were listed.

    Raises:
        VendorError: it is no page of jobs.
    """
    page, rows, bad = read(JOBS, response)
    so_far = read_so_far(asked.read, asked.offset, rows, bad)
    follow = []
    if len(asked.read) < len(so_far) < page.total:
        follow = [ask_jobs(options, replace(asked, offset=asked.offset + 1, read=so_far))]
    return rows, bad, follow, len(so_far) >= page.total


def read_so_far(
    before: frozenset[object],
    offset: int,
    rows: Iterable[JobRow | InstanceRow],
    bad: Iterable[BadRow],
) -> frozenset[object]:
    """Rows of this page and those before; it does not grow where a vendor repeats itself.

    Raises:
        Invalid: they are too many.
    """
    so_far = before.union((row.ids for row in rows), ((offset, row.at) for row in bad))
    if len(so_far) > MOST_ROWS:
        raise Invalid(f"more than {MOST_ROWS} rows in one list")
    return so_far


def read(table: Table[E, R], response: Response) -> tuple[E, list[R], list[BadRow]]:
    """The document, its good rows and its bad ones.

    Raises:
        VendorError: it is not as documented, or an error.
    """
    if response.status != 200:
        refuse(response)
    try:
        document, rows, bad = table.read(response.body)
    except Invalid:
        refuse(response)  # an error that says 200
        raise
    return document, rows, [BadRow(*fault) for fault in bad]


def refuse(response: Response) -> None:
    """Raise what an error means, by its code, else by its status; returns for none."""
    code, told = fault(response)
    if code in _REFUSED:
        raise Rejected(told)
    if code == _THROTTLED:
        raise Limited(told, wire.retry_after_s(response))
    if code == _BROKEN:
        raise Unreachable(told)
    if code and response.status < 500 and response.status not in (401, 403, 429):
        raise Invalid(told, response.body)
    wire.refuse(response)


def fault(response: Response) -> tuple[str, str]:
    """An error's code and a sentence; "" for what is no error of this vendor."""
    try:
        error = decode(response.body, dict[str, Any])
    except Invalid:
        error = {}
    code = str(error.get("error_code", "")).replace("APIGW.", "APIG.")
    return code, f"{code}: {str(error.get('error_msg', ''))[:256]}"
