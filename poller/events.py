"""CloudEvents: what subscribers receive, its identity, its encoding and its JSON Schema."""

from __future__ import annotations

import datetime
import uuid
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from poller.errors import Reason
from poller.runs import TERMINAL, Job, Ms, Problem, Scalar, State

JOB_SCHEMA = "urn:poller:schema:job-event:1"
SOURCE_SCHEMA = "urn:poller:schema:source-event:1"
JOB_TYPE = "dev.poller.job."
SOURCE_TYPE = "dev.poller.source."

TYPES = (*(JOB_TYPE + state for state in State), SOURCE_TYPE + "down", SOURCE_TYPE + "up")
"""Every type that an event can have."""

MAX_EVENT_BYTES = 65_535
MAX_MESSAGE_BYTES = 4096
MAX_DETAIL_BYTES = 1024
_BRIEF_BYTES = 256

Instant: TypeAlias = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]
"""RFC 3339, UTC, milliseconds: `2019-12-31T04:00:22.219Z`."""

Sequence: TypeAlias = Annotated[str, Meta(pattern=r"^\d{20}$")]

JobType: TypeAlias = Annotated[str, Meta(pattern=rf"^dev\.poller\.job\.({'|'.join(State)})$")]


class Recorded(msgspec.Struct, frozen=True, gc=False):
    """One event as it stands in the journal.

    Attributes:
        offset: place in the journal over all sources; ascends, with gaps.
        source: name of the source.
        sequence: place among the source's events, contiguous from 1.
        type: the CloudEvent's type.
        job_id: "" for events of a source.
        at_ms: when it was observed.
        body: the CloudEvent as JSON; every sink gets these bytes.
    """

    offset: int
    source: str
    sequence: int
    type: str
    job_id: str
    at_ms: Ms
    body: bytes


class Draft(msgspec.Struct, frozen=True, gc=False):
    """An event on its way into the journal: all of `Recorded` but its offset and source.

    Attributes:
        run_id: the run that it is about, "" for events of a source.
    """

    sequence: int
    type: str
    job_id: str
    at_ms: Ms
    body: bytes
    run_id: str = ""


class Previous(msgspec.Struct, frozen=True, gc=False):
    """What was known of the run before."""

    state: State
    vendor_state: str | None
    attempt: int


class RunFacts(msgspec.Struct, frozen=True):
    """The run and the attempt, with the vendor's timestamps."""

    id: str
    attempt: Annotated[int, Meta(ge=1)]
    queued_at: Instant | None
    started_at: Instant | None
    ended_at: Instant | None
    progress: Annotated[float, Meta(ge=0, le=1)] | None


class JobData(msgspec.Struct, frozen=True):
    """One transition of one attempt."""

    vendor: str
    source: str
    job: Job
    run: RunFacts
    state: State
    substate: str | None
    vendor_state: str | None
    terminal: bool
    previous: Previous | None
    reason: Literal["vanished", "superseded", "unmapped"] | None
    snapshot: bool
    inferred: bool
    time_source: Literal["vendor", "observed"]
    observed_after: Instant | None
    observed_at: Instant
    error: Problem | None
    detail: dict[str, Scalar]


class SourceData(msgspec.Struct, frozen=True):
    """A source has become blind, or sees again."""

    vendor: str
    source: str
    up: bool
    since: Instant
    reason: Reason | None
    message: str | None


class JobEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A transition as a CloudEvent 1.0."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: JobType
    subject: str
    time: Instant
    datacontenttype: Literal["application/json"] = "application/json"
    dataschema: Literal["urn:poller:schema:job-event:1"] = "urn:poller:schema:job-event:1"
    sequence: Sequence
    partitionkey: str
    data: JobData


class SourceEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A source's condition as a CloudEvent 1.0."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: Literal["dev.poller.source.down", "dev.poller.source.up"]
    subject: str
    time: Instant
    datacontenttype: Literal["application/json"] = "application/json"
    dataschema: Literal["urn:poller:schema:source-event:1"] = "urn:poller:schema:source-event:1"
    sequence: Sequence
    partitionkey: str
    data: SourceData


Event: TypeAlias = JobEvent | SourceEvent


class _Head(msgspec.Struct, frozen=True):
    dataschema: str


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One change of one attempt, as detection tells it: an event before it has a place and bytes.

    Attributes:
        time_ms: when it happened; from the vendor if `by_vendor`, else when it was observed.
        reason: why the state is `unknown`, or None.
        snapshot: first contact; the run was in this state before anybody looked.
        inferred: not seen, but proved by timestamps or told by the vendor's history.
    """

    job: Job
    run_id: str
    attempt: int
    state: State
    substate: str | None = None
    vendor_state: str | None = None
    time_ms: Ms
    by_vendor: bool
    previous: Previous | None
    reason: Literal["vanished", "superseded", "unmapped"] | None = None
    snapshot: bool = False
    inferred: bool = False
    queued_ms: Ms | None = None
    started_ms: Ms | None = None
    ended_ms: Ms | None = None
    progress: float | None = None
    problem: Problem | None = None
    detail: dict[str, Scalar] = {}


def rfc3339(ms: Ms) -> str:
    """An instant as events carry it: UTC, `Z`, milliseconds."""
    second = datetime.datetime.fromtimestamp(ms // 1000, datetime.UTC)
    return f"{second:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def identity(source: str, job: str, run: str, *, attempt: int, state: str, time: str) -> str:
    """The event's id: the same for the same transition, also when told again after a crash."""
    text = "|".join((source, job, run, str(attempt), state, time))
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:poller:{text}"))


def job_event(
    transition: Transition,
    *,
    source: str,
    vendor: str,
    sequence: int,
    observed_after_ms: Ms | None,
    observed_at_ms: Ms,
) -> JobEvent:
    """The CloudEvent of a transition."""
    job, state, time = transition.job, transition.state, rfc3339(transition.time_ms)
    data = JobData(
        vendor=vendor,
        source=source,
        job=job,
        run=RunFacts(
            id=transition.run_id,
            attempt=transition.attempt,
            queued_at=_optional(transition.queued_ms),
            started_at=_optional(transition.started_ms),
            ended_at=_optional(transition.ended_ms),
            progress=transition.progress,
        ),
        state=state,
        substate=transition.substate,
        vendor_state=transition.vendor_state,
        terminal=state in TERMINAL,
        previous=transition.previous,
        reason=transition.reason,
        snapshot=transition.snapshot,
        inferred=transition.inferred,
        time_source="vendor" if transition.by_vendor else "observed",
        observed_after=_optional(observed_after_ms),
        observed_at=rfc3339(observed_at_ms),
        error=_cut_problem(transition.problem, MAX_MESSAGE_BYTES),
        detail=transition.detail,
    )
    return JobEvent(
        id=identity(
            source, job.id, transition.run_id, attempt=transition.attempt, state=state, time=time
        ),
        source=f"/sources/{source}",
        type=JOB_TYPE + state,
        subject=transition.run_id,
        time=time,
        sequence=f"{sequence:020d}",
        partitionkey=f"{source}/{job.id}",
        data=data,
    )


def source_event(data: SourceData, *, sequence: int, at_ms: Ms) -> SourceEvent:
    """The CloudEvent of a source's condition."""
    state = "up" if data.up else "down"
    time = rfc3339(at_ms)
    return SourceEvent(
        id=identity(data.source, "", "", attempt=0, state=state, time=time),
        source=f"/sources/{data.source}",
        type="dev.poller.source.up" if data.up else "dev.poller.source.down",
        subject=data.source,
        time=time,
        sequence=f"{sequence:020d}",
        partitionkey=data.source,
        data=data,
    )


def encode(event: JobEvent | SourceEvent) -> bytes:
    """The event's bytes, below 64 KiB for ids of up to 1024 characters.

    What does not fit is left out or cut: first long details, then every detail and every text
    that identifies nothing.
    """
    body = _ENCODER.encode(event)
    if len(body) <= MAX_EVENT_BYTES or isinstance(event, SourceEvent):
        return body
    data = event.data
    small = {name: value for name, value in data.detail.items() if _is_small(value)}
    lean = msgspec.structs.replace(data, detail=small)
    body = _ENCODER.encode(msgspec.structs.replace(event, data=lean))
    if len(body) <= MAX_EVENT_BYTES:
        return body
    return _ENCODER.encode(msgspec.structs.replace(event, data=_bare(data)))


def decode(body: bytes) -> Event:
    """An event out of its bytes.

    Raises:
        msgspec.ValidationError: they are no event of ours.
    """
    if _HEAD_DECODER.decode(body).dataschema == SOURCE_SCHEMA:
        return _SOURCE_DECODER.decode(body)
    return _JOB_DECODER.decode(body)


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of everything that appears on the bus.

    Every key that it names is always there; others may be added one day.
    """
    one_of, definitions = msgspec.json.schema_components(
        (JobEvent, SourceEvent), ref_template="#/$defs/{name}"
    )
    for definition in definitions.values():
        if "properties" in definition:
            definition["required"] = list(definition["properties"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:poller:schema:event:1",
        "title": "Events of poller",
        "oneOf": list(one_of),
        "$defs": definitions,
    }


def cut(text: str, max_bytes: int) -> str:
    """The start of a text, at most that many bytes in UTF-8, never half a character."""
    if len(text) * 4 <= max_bytes:
        return text
    return text.encode("utf-8", "replace")[:max_bytes].decode("utf-8", "ignore")


def _cut_problem(problem: Problem | None, max_bytes: int) -> Problem | None:
    if problem is None:
        return None
    return Problem(_brief(problem.code), cut(problem.message, max_bytes))


def _brief(text: str | None) -> str | None:
    return None if text is None else cut(text, _BRIEF_BYTES)


def _bare(data: JobData) -> JobData:
    """The same transition with nothing long but its ids; half a URL leads nowhere, so it goes."""
    job, previous = data.job, data.previous
    if previous is not None:
        brief = _brief(previous.vendor_state)
        previous = msgspec.structs.replace(previous, vendor_state=brief)
    return msgspec.structs.replace(
        data,
        job=Job(job.id, _brief(job.name), _brief(job.group), _brief(job.owner)),
        vendor_state=_brief(data.vendor_state),
        previous=previous,
        error=_cut_problem(data.error, _BRIEF_BYTES),
        detail={name: data.detail[name] for name in data.detail if name == "provisional_id"},
    )


def _is_small(value: Scalar) -> bool:
    return not isinstance(value, str) or len(value.encode("utf-8", "replace")) <= MAX_DETAIL_BYTES


def _optional(ms: Ms | None) -> str | None:
    return None if ms is None else rfc3339(ms)


_ENCODER = msgspec.json.Encoder()
_JOB_DECODER = msgspec.json.Decoder(JobEvent)
_HEAD_DECODER = msgspec.json.Decoder(_Head)
_SOURCE_DECODER = msgspec.json.Decoder(SourceEvent)
