"""What CDM's answers hold: words, jobs, runs and errors."""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import msgspec

from poller.errors import Invalid, Rejected, Unreachable
from poller.payload import Table, decode, epoch_ms, text_of
from poller.runs import TERMINAL, Job, Problem, Scalar, Seen, State
from poller.wire import Response, Words, look_up, refuse

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
NEVER_RUN = ("new", "never_executed")  # no run; its creation-date is made up by the question

NO_SUCH_JOB = ("cdm.0054", "cdm.0100")
_INTERNAL = ("cdm.0000", "cdm.0036")
_REFUSED = ("cdm.0032", "apig.0301", "apig.0302", "apig.0303", "apig.0307")
_THROTTLED = "apig.0308"

_COUNTERS = "org.apache.sqoop.submission.counter.SqoopCounters"
_COUNTED = tuple(
    f"{what}_{how}" for what in ("ROWS", "BYTES", "FILES") for how in ("READ", "WRITTEN")
)

R = TypeVar("R")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Short: TypeAlias = Annotated[str, msgspec.Meta(max_length=64)]
_Number: TypeAlias = int | float | _Short | None
_Date: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | float | _Short | None
"""It is noted of each job, so that it must not have thousands of digits."""


class JobRow(msgspec.Struct):
    """A job of the list; its `*-config-values` are left alone, they may hold passwords."""

    name: _Name
    status: _Text | None = None
    external_id: _Text | None = None
    execute_create_date: _Date = None
    execute_start_date: _Date = None
    execute_update_date: _Date = None
    group_name: _Text | None = None

    @property
    def word(self) -> str:
        """The state of its last run; empty on clusters that list none."""
        return (self.status or "").strip().lower()

    @property
    def ended(self) -> bool:
        """Whether its last run has ended."""
        return look_up(WORDS, self.word).state in TERMINAL

    @property
    def telling(self) -> bool:
        """Whether no run can come and go without changing the signature."""
        return self.word != "" and any(self._began)

    @property
    def signature(self) -> str:
        """What changes only with the last run and its state."""
        return f"{self.word} {self._began} {self.ended and self.execute_update_date}"

    @property
    def _began(self) -> tuple[_Date, ...]:
        return (self.external_id, self.execute_create_date, self.execute_start_date)


class RunRow(msgspec.Struct, rename="kebab"):
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


JOBS = Table(_Jobs[JobRow], _Jobs[msgspec.Raw], JobRow, lambda page: page.jobs, "$.jobs")
RUNS = Table(
    _Runs[RunRow], _Runs[msgspec.Raw], RunRow, lambda page: page.submissions, "$.submissions"
)


def see(scope: str, job: Job, run_id: str, row: RunRow) -> Seen:
    """What a row shows of a run."""
    state, substate, unmapped = look_up(WORDS, row.status)
    queued_ms = epoch_ms(row.creation_date)
    started_ms = epoch_ms(row.execute_date) if substate != "never_started" else None
    ended_ms = epoch_ms(row.last_update_date) if state in TERMINAL else None
    percent = row.progress if isinstance(row.progress, int | float) else -1
    why = text_of(row.error_summary) or text_of(row.error_details)
    return Seen(
        job=msgspec.structs.replace(job, owner=row.creation_user or job.owner),
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
        scope=scope,
        unmapped=unmapped,
        fingerprint=hash((row.status, queued_ms, started_ms, ended_ms, why)),
    )


def _detail(row: RunRow) -> dict[str, Scalar]:
    counters = row.counters.get(_COUNTERS) if isinstance(row.counters, dict) else None
    counted = counters if isinstance(counters, dict) else {}
    detail: dict[str, Scalar] = {name.lower(): whole(counted.get(name)) for name in _COUNTED}
    for name in ("write_rows", "update_rows", "delete_rows"):
        detail[name] = whole(getattr(row, name)) or None
    detail["external_id"] = row.external_id or None
    return {name: value for name, value in detail.items() if value is not None}


def whole(value: object) -> int | None:
    """A number, or digits in a text; None for a negative one, which means not applicable."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < 2**63 else None


def fault(response: Response) -> tuple[str, str]:
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


def check(response: Response) -> None:
    """Raise what an error means: by its code, else by its status."""
    code, told = fault(response)
    if code in _REFUSED:
        raise Rejected(told)
    if code in _INTERNAL:
        raise Unreachable(told)
    if code == _THROTTLED:
        response = msgspec.structs.replace(response, status=429)
    elif code and response.status < 500 and response.status not in (401, 403, 429):
        raise Invalid(told, response.body)
    refuse(response)
