"""What Datameer's answers hold: words, running jobs, histories, details, artifacts and errors."""

from __future__ import annotations

import datetime
import re
from contextlib import suppress
from typing import Annotated, Any, TypeVar
from zoneinfo import ZoneInfo

import msgspec

from poller.errors import Invalid
from poller.payload import Table, decode, instant_ms
from poller.runs import TERMINAL, Ms, State
from poller.wire import BadRow, Response, Words, look_up, refuse

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
_NEVER_RUN = "_none"

R = TypeVar("R")
_Id = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Amount = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | float | _Text | None


class Active(msgspec.Struct, gc=False):
    """A row of the list of what runs."""

    job: _Id = msgspec.field(name="dapJobConfigurationId")
    status: _Text = msgspec.field(name="jobStatus")
    execution: _Id | None = msgspec.field(name="jobExecutionId", default=None)
    began: _Text | None = msgspec.field(name="startTime", default=None)
    estimate: _Amount = msgspec.field(name="estimateTime", default=None)
    progress: _Amount = None


class Past(msgspec.Struct, gc=False):
    """An execution in a history."""

    id: _Id
    status: _Text = msgspec.field(name="jobStatus")


class _Artifact(msgspec.Struct, gc=False):
    id: _Id
    name: _Text | None = None


class Execution(msgspec.Struct, rename="camel"):
    """Details in v1, and the status of a job in v1 or, its names in camel case, v2."""

    job_status: _Text = _NEVER_RUN
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


ACTIVE = Table(list[Active], list[msgspec.Raw], Active, lambda rows: rows, "$")
PAST = Table(list[Past], list[msgspec.Raw], Past, lambda rows: rows, "$")
NAMED = Table(list[_Artifact], list[msgspec.Raw], _Artifact, lambda rows: rows, "$")


def read(table: Table[Any, R], response: Response) -> tuple[list[R], list[BadRow]]:
    """Good and bad rows; a list of one may come as that one, without its brackets.

    Raises:
        VendorError: it is no list of such rows, or an error.
    """
    refuse(response)
    body = response.body.strip()
    alone = body.startswith(b"{")
    if alone:
        _document(body)
    _, rows, bad = table.read(b"[%b]" % body if alone else body)
    if alone and bad:
        raise Invalid(f"neither a list nor a row: {bad[0][1]}", body)
    return rows, [BadRow(*row) for row in bad]


def read_execution(response: Response) -> Execution:
    """One execution.

    Raises:
        VendorError: it is none, or an error.
    """
    refuse(response)
    fields = {
        re.sub("-(.)", lambda found: found[1].upper(), name): value
        for name, value in _document(response.body).items()
    }
    try:
        return msgspec.convert(fields, Execution)
    except msgspec.ValidationError as error:
        raise Invalid(f"not the documented shape: {error}", response.body) from error


def _document(body: bytes) -> dict[str, Any]:
    """An object that is no error; v2 and proxies tell errors with status 200."""
    document = decode(body, dict[str, Any])
    error = document.get("error")
    if str(document.get("status")).strip().lower() == "failure":
        error = document.get("reason") or "failure"
    if error:
        raise Invalid(f"the server says: {str(error)[:256]}", body)
    return document


def has_run(word: str) -> bool:
    """Whether there is an execution that this word is about."""
    return word.strip().lower() != _NEVER_RUN


def has_ended(word: str) -> bool:
    """Whether it is the word for an end."""
    return look_up(WORDS, word).state in TERMINAL


def instant(text: str | None, timezone: str) -> Ms | None:
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


def share(percent: _Amount) -> float | None:
    """Per cent as 0 to 1."""
    with suppress(ValueError):
        return None if percent is None else min(1.0, max(0.0, float(percent) / 100))
    return None
