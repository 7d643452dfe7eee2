"""What Kylin's answers hold: words, jobs of Kylin 5 and of Kylin 4, their steps, and errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Generic, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from poller import wire
from poller.errors import Invalid, Rejected, Unreachable, VendorError
from poller.payload import Table, decode, epoch_ms
from poller.runs import TERMINAL, Job, Problem, Scalar, Seen, State
from poller.wire import Response, Words, look_up

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

_KE = re.compile(r"KE-\d{9}")
_REFUSED = ("KE-010003", "KE-010024")
"""Families of codes: missing, wrong or locked credentials; no access."""
_TRANSIENT = ("KE-000000001", "KE-010019002", "KE-010021006")
"""An unexpected exception; the database or the directory of users out of reach."""
_DENIED = re.compile(r"access (is )?denied|\b(user|account)\b.*\blocked", re.IGNORECASE)

_LONGEST = 4096  # of an error that is looked at: `_DENIED` takes the square of it

T = TypeVar("T")
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
_Stamp: TypeAlias = int | float | str | None


class Step(msgspec.Struct):
    """A step of a job; only Kylin 5 says why it failed, and only when asked for the details."""

    name: str | None = None
    step_status: str | None = None
    info: dict[str, str] | None = None
    failed_step_name: str | None = None
    failed_code: str | None = None
    failed_reason: str | None = None
    failed_msg: str | None = None


class Steps(msgspec.Struct):
    """The steps, where they come wrapped."""

    steps: list[Step] = []


class Row(msgspec.Struct, kw_only=True):
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
    steps: list[Step] | None = None

    @property
    def share(self) -> float | None:
        """How far it is, from 0 to 1."""
        done = self.progress
        return done / self.full if isinstance(done, float) and 0 <= done <= self.full else None

    @property
    def fingerprint(self) -> int:
        """Of state and times; progress and the like change all the time."""
        times = (self.create_time, self.exec_start_time, self.exec_end_time)
        return hash((self.job_status, self.scheduler_state, times))


class Row4(Row, kw_only=True):
    """A job as Kylin 4 shows it: some names differ, it has no create_time, but its steps."""

    version: ClassVar[str] = "4"
    full: ClassVar[float] = 100.0

    id: _Id = msgspec.field(name="uuid")
    job_name: _Text | None = msgspec.field(default=None, name="name")
    project: _Text | None = msgspec.field(default=None, name="projectName")
    target_subject: _Text | None = msgspec.field(default=None, name="related_cube")
    progress: float | str | None = msgspec.field(default=None, name="progress")


class Envelope(msgspec.Struct, Generic[T]):
    """What Kylin 5 wraps its answers in, and both of them most of their errors."""

    code: str
    data: T | None = None
    msg: str | None = None
    error_code: str | None = None


class _List(msgspec.Struct, Generic[T]):
    value: list[T]
    total_size: int


LIST = Table(
    Envelope[_List[Row]],
    Envelope[_List[msgspec.Raw]],
    Row,
    lambda answer: answer.data.value if answer.data else [],
    "$.data.value",
)
LIST4 = Table(list[Row4], list[msgspec.Raw], Row4, list, "$")


def see(row: Row) -> Seen:
    """What a row shows of a job, which is its own run."""
    state, substate, unmapped = look_up(WORDS, row.job_status)
    finer = look_up(WORDS, row.scheduler_state or "")
    queued_ms, started_ms = epoch_ms(row.create_time), epoch_ms(row.exec_start_time)
    # Set whenever it stops running, if only to wait; with the start, if discarded before that.
    stopped_ms = epoch_ms(row.exec_end_time)
    if state is State.CANCELED and started_ms == stopped_ms:
        started_ms = None
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
        progress=row.share,
        detail=_scalars(detail),
        scope=row.version,
        unmapped=unmapped,
        fingerprint=row.fingerprint,
    )
    return blamed(seen, row.steps or ()) if state is State.FAILED else seen


def blamed(seen: Seen, steps: Sequence[Step]) -> Seen:
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


def unwrap(answer: Envelope[T]) -> T:
    """The data in an envelope.

    Raises:
        VendorError: there is none, or an error.
    """
    if answer.code != "000":
        raise _error(200, answer)
    if answer.data is None:
        raise Invalid("an envelope without data")
    return answer.data


def refuse(response: Response) -> None:
    """Raise what a status other than 200 means; business errors are 500, locked users 400."""
    fault = None
    if response.status in (400, 401, 403, 500):
        with suppress(Invalid):
            fault = decode(response.body, Envelope[Any])
    if fault is not None:
        raise _error(response.status, fault)
    wire.refuse(response)


def _error(status: int, fault: Envelope[Any]) -> VendorError:
    """What an error's envelope means, by the code that is somewhere in it."""
    text = f"{fault.error_code or ''} {fault.msg or ''}"[:_LONGEST]
    found = _KE.search(text)
    code = found[0] if found else ""
    message = f"HTTP {status}: {_first_line(text)[:300]}"
    if status in (401, 403) or code.startswith(_REFUSED) or _DENIED.search(text):
        return Rejected(message)
    if code in _TRANSIENT or (status == 500 and not code):
        return Unreachable(message)
    return Invalid(message)
