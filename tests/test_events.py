"""What subscribers receive, against the contract."""

from __future__ import annotations

import uuid
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from poller.errors import Reason
from poller.events import (
    Event,
    JobEvent,
    Previous,
    SourceData,
    SourceEvent,
    Transition,
    cut,
    decode,
    encode,
    identity,
    job_event,
    rfc3339,
    schema,
    source_event,
)
from poller.runs import TERMINAL, Job, Problem, Scalar, State

VALIDATOR = Draft202012Validator(schema(), format_checker=Draft202012Validator.FORMAT_CHECKER)

RUN = "232bf69f-6cdf-4dcc-a3aa-b6ca7651e98c"
ENDED = 1_577_764_822_219  # 2019-12-31T04:00:22.219Z
FINISHED = Transition(
    job=Job(RUN, "INDEX_BUILD", "test", "ADMIN"),
    run_id=RUN,
    attempt=1,
    state=State.SUCCEEDED,
    vendor_state="FINISHED",
    time_ms=ENDED,
    by_vendor=True,
    previous=Previous(State.RUNNING, "RUNNING", 1),
    queued_ms=ENDED - 3000,
    started_ms=ENDED - 2000,
    ended_ms=ENDED,
    progress=1.0,
)


def event_of(transition: Transition = FINISHED, **changes: Any) -> JobEvent:
    return job_event(
        msgspec.structs.replace(transition, **changes),
        source="kylin-prod",
        vendor="kylin",
        sequence=42,
        observed_after_ms=ENDED - 1,
        observed_at_ms=ENDED + 999,
    )


def condition_event(*, up: bool, reason: Reason | None = None) -> SourceEvent:
    data = SourceData(
        vendor="kylin",
        source="kylin-prod",
        up=up,
        since=rfc3339(ENDED - 60_000),
        reason=reason,
        message="no answer within 10 s" if reason else None,
    )
    return source_event(data, sequence=43, at_ms=ENDED)


# The event of the contract


def test_a_transition_is_the_event_that_the_contract_shows() -> None:
    assert msgspec.json.decode(encode(event_of())) == {
        "specversion": "1.0",
        "id": str(
            uuid.uuid5(
                uuid.NAMESPACE_URL,
                f"urn:poller:kylin-prod|{RUN}|{RUN}|1|succeeded|2019-12-31T04:00:22.219Z",
            )
        ),
        "source": "/sources/kylin-prod",
        "type": "dev.poller.job.succeeded",
        "subject": RUN,
        "time": "2019-12-31T04:00:22.219Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:poller:schema:job-event:1",
        "sequence": "00000000000000000042",
        "partitionkey": f"kylin-prod/{RUN}",
        "data": {
            "vendor": "kylin",
            "source": "kylin-prod",
            "job": {
                "id": RUN,
                "name": "INDEX_BUILD",
                "group": "test",
                "owner": "ADMIN",
                "url": None,
            },
            "run": {
                "id": RUN,
                "attempt": 1,
                "queued_at": "2019-12-31T04:00:19.219Z",
                "started_at": "2019-12-31T04:00:20.219Z",
                "ended_at": "2019-12-31T04:00:22.219Z",
                "progress": 1.0,
            },
            "state": "succeeded",
            "substate": None,
            "vendor_state": "FINISHED",
            "terminal": True,
            "previous": {"state": "running", "vendor_state": "RUNNING", "attempt": 1},
            "reason": None,
            "snapshot": False,
            "inferred": False,
            "time_source": "vendor",
            "observed_after": "2019-12-31T04:00:22.218Z",
            "observed_at": "2019-12-31T04:00:23.218Z",
            "error": None,
            "detail": {},
        },
    }


def test_a_source_event_is_about_the_source() -> None:
    assert msgspec.json.decode(encode(condition_event(up=False, reason="unreachable"))) == {
        "specversion": "1.0",
        "id": str(
            uuid.uuid5(
                uuid.NAMESPACE_URL,
                "urn:poller:kylin-prod|||0|down|2019-12-31T04:00:22.219Z",
            )
        ),
        "source": "/sources/kylin-prod",
        "type": "dev.poller.source.down",
        "subject": "kylin-prod",
        "time": "2019-12-31T04:00:22.219Z",
        "datacontenttype": "application/json",
        "dataschema": "urn:poller:schema:source-event:1",
        "sequence": "00000000000000000043",
        "partitionkey": "kylin-prod",
        "data": {
            "vendor": "kylin",
            "source": "kylin-prod",
            "up": False,
            "since": "2019-12-31T03:59:22.219Z",
            "reason": "unreachable",
            "message": "no answer within 10 s",
        },
    }


def test_an_id_is_what_anybody_can_compute_from_the_event() -> None:
    # uuidgen --sha1 --namespace @url --name 'urn:poller:s|j|r|2|failed|2024-04-29T08:00:00.000Z'
    assert (
        identity("s", "j", "r", attempt=2, state="failed", time="2024-04-29T08:00:00.000Z")
        == "9cbcfb82-06b6-53ef-9438-ac4efd3014dd"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"job": Job("other")},
        {"run_id": "other"},
        {"attempt": 2},
        {"state": State.FAILED},
        {"time_ms": ENDED - 1},
    ],
)
def test_another_transition_has_another_id(changes: dict[str, Any]) -> None:
    assert event_of(**changes).id != event_of().id


def test_the_same_transition_told_again_has_the_same_id() -> None:
    again = job_event(
        msgspec.structs.replace(FINISHED, vendor_state="DONE", detail={"rows": 7}, inferred=True),
        source="kylin-prod",
        vendor="kylin",
        sequence=77,
        observed_after_ms=None,
        observed_at_ms=ENDED + 77_777,
    )
    assert again.id == event_of().id


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (1, "1970-01-01T00:00:00.001Z"),
        (999, "1970-01-01T00:00:00.999Z"),
        (1000, "1970-01-01T00:00:01.000Z"),
        (1_577_764_822_219, "2019-12-31T04:00:22.219Z"),
        (951_782_400_000, "2000-02-29T00:00:00.000Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_times_are_utc_to_the_millisecond(ms: int, text: str) -> None:
    assert rfc3339(ms) == text


def test_a_time_that_was_only_observed_says_so() -> None:
    data = event_of(by_vendor=False).data
    assert data.time_source == "observed"


def test_without_a_poll_before_nothing_bounds_the_observation_from_below() -> None:
    event = job_event(
        FINISHED,
        source="s",
        vendor="v",
        sequence=1,
        observed_after_ms=None,
        observed_at_ms=ENDED,
    )
    assert event.data.observed_after is None


# The schema


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"snapshot": True, "previous": None, "by_vendor": False},
        {"inferred": True, "vendor_state": None},
        {"substate": "warnings", "progress": None, "ended_ms": None},
        {"problem": Problem("KE-1", "no such table")},
        {"problem": Problem(None, "")},
        {"detail": {"rows": 1, "share": 0.5, "node": "n1", "ok": True, "none": None}},
        {"reason": "vanished"},
        {"reason": "superseded"},
        {"reason": "unmapped"},
    ],
)
def test_every_kind_of_job_event_fits_the_printed_schema(
    state: State, changes: dict[str, Any]
) -> None:
    event = event_of(**{"state": state, **changes})
    VALIDATOR.validate(msgspec.json.decode(encode(event)))
    assert event.type == f"dev.poller.job.{state}"
    assert event.data.terminal is (state in TERMINAL)


@pytest.mark.parametrize(
    ("up", "reason"),
    [
        (True, None),
        (False, "unreachable"),
        (False, "rejected"),
        (False, "invalid"),
        (False, "limited"),
    ],
)
def test_every_kind_of_source_event_fits_the_printed_schema(
    up: bool, reason: Reason | None
) -> None:
    event = condition_event(up=up, reason=reason)
    VALIDATOR.validate(msgspec.json.decode(encode(event)))
    assert event.type == f"dev.poller.source.{'up' if up else 'down'}"


def paths(value: Any, *path: str) -> list[tuple[str, ...]]:
    """The path of every key in a document, but those of `detail`."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found.append((*path, key))
        found += paths(inner, *path, key) if key != "detail" else []
    return found


def document(event: Event) -> dict[str, Any]:
    loaded: dict[str, Any] = msgspec.json.decode(encode(event))
    return loaded


JOB_DOCUMENT = document(event_of(problem=Problem("KE-1", "no such table")))
SOURCE_DOCUMENT = document(condition_event(up=False, reason="limited"))


@pytest.mark.parametrize(
    ("whole", "path"),
    [
        pytest.param(whole, path, id=f"{whole['subject']}-{'.'.join(path)}")
        for whole in (JOB_DOCUMENT, SOURCE_DOCUMENT)
        for path in paths(whole)
    ],
)
def test_an_event_that_lacks_a_key_does_not_fit_the_schema(
    whole: dict[str, Any], path: tuple[str, ...]
) -> None:
    broken = msgspec.json.decode(msgspec.json.encode(whole))
    place = broken
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ValidationError):
        VALIDATOR.validate(broken)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("specversion", "0.3"),
        ("type", "dev.poller.job.exploded"),
        ("type", "dev.poller.source.down"),
        ("time", "2019-12-31T04:00:22Z"),
        ("time", "2019-12-31T04:00:22.219+00:00"),
        ("sequence", "42"),
        ("sequence", 7),
        ("dataschema", "urn:poller:schema:job-event:2"),
        ("data.state", "exploded"),
        ("data.run.attempt", 0),
        ("data.run.progress", 1.5),
        ("data.run.ended_at", 1_577_764_822_219),
        ("data.job.id", 17),
        ("data.detail", {"nested": {}}),
        ("data.time_source", "guessed"),
        ("data.error", "a text"),
        ("data.reason", "boredom"),
        ("data.previous", {"state": "running"}),
    ],
)
def test_an_event_with_a_wrong_value_does_not_fit_the_schema(path: str, value: Any) -> None:
    broken = msgspec.json.decode(msgspec.json.encode(JOB_DOCUMENT))
    *way, last = path.split(".")
    place = broken
    for key in way:
        place = place[key]
    place[last] = value
    with pytest.raises(ValidationError):
        VALIDATOR.validate(broken)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(schema())


# Sizes

KINDS = ["ascii", "control", "emoji", "quotes"]
LONG_IDS = ["i" * 1024, "\x00" * 1024, "😀" * 1024, '"\\' * 512]


def huge(job_id: str, run_id: str, text: str, detail: dict[str, Scalar]) -> JobEvent:
    return event_of(
        job=Job(job_id, text, text, text, text),
        run_id=run_id,
        vendor_state=text,
        previous=Previous(State.RUNNING, text, 1),
        problem=Problem(text, text),
        detail=detail,
    )


@pytest.mark.parametrize("job_id", LONG_IDS, ids=KINDS)
@pytest.mark.parametrize("run_id", LONG_IDS, ids=KINDS)
@pytest.mark.parametrize(
    "text",
    ["a text", "m" * 100_000, "\x1f" * 100_000],
    ids=["short", "long", "control characters"],
)
@pytest.mark.parametrize(
    "detail",
    [
        {"provisional_id": "\x00" * 1024, "host": "h" * 1_000_000},
        {"provisional_id": "\x00" * 1024, **{f"n{n}": "\x00" * 1024 for n in range(1000)}},
    ],
    ids=["long", "many"],
)
def test_the_largest_event_stays_below_64_kib_and_keeps_its_ids(
    job_id: str, run_id: str, text: str, detail: dict[str, Scalar]
) -> None:
    body = encode(huge(job_id, run_id, text, detail))
    assert len(body) < 64 * 1024
    event = decode(body)
    assert isinstance(event, JobEvent)
    assert (event.data.job.id, event.data.run.id) == (job_id, run_id)
    assert (event.subject, event.partitionkey) == (run_id, f"kylin-prod/{job_id}")
    assert event.data.detail["provisional_id"] == "\x00" * 1024
    VALIDATOR.validate(msgspec.json.decode(body))


def test_an_error_of_a_megabyte_is_cut_in_an_event_without_a_past() -> None:
    event = event_of(
        job=Job("j", "n" * 100_000), previous=None, problem=Problem(None, "\x00" * 1_000_000)
    )
    told = decode(encode(event))
    assert isinstance(told, JobEvent)
    assert told.data.previous is None
    assert told.data.job == Job("j", "n" * 256)
    assert told.data.error == Problem(None, "\x00" * 256)


def test_long_details_give_way_before_anything_else() -> None:
    event = event_of(
        problem=Problem("c", "m" * 4096),
        job=Job("j", "n" * 1000),
        detail={"log": "l" * 70_000, "edge": "e" * 1024, "rows": 7},
    )
    told = decode(encode(event))
    assert told == event_of(
        problem=Problem("c", "m" * 4096),
        job=Job("j", "n" * 1000),
        detail={"edge": "e" * 1024, "rows": 7},
    )


def test_what_fits_is_left_alone() -> None:
    event = event_of(job=Job("j", "n" * 10_000, url="u" * 10_000), detail={"log": "l" * 30_000})
    assert decode(encode(event)) == event


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("short", "short"),
        ("m" * 4096, "m" * 4096),
        ("m" * 4097, "m" * 4096),
        ("m" * 4095 + "é", "m" * 4095),
        ("m" * 4094 + "é", "m" * 4094 + "é"),
        ("😀" * 1024, "😀" * 1024),
        ("😀" * 1025, "😀" * 1024),
        ("mm" + "😀" * 1024, "mm" + "😀" * 1023),
    ],
    ids=range(8),
)
def test_an_error_message_is_cut_to_4_kib_between_characters(message: str, told: str) -> None:
    problem = event_of(problem=Problem("c" * 300, message)).data.error
    assert problem == Problem("c" * 256, told)


@given(st.text(), st.integers(0, 60))
def test_a_cut_text_is_the_longest_start_that_fits(text: str, max_bytes: int) -> None:
    start = cut(text, max_bytes)
    assert text.startswith(start)
    assert len(start.encode()) <= max_bytes
    if start != text:
        assert len(text[: len(start) + 1].encode()) > max_bytes


# Back again


@pytest.mark.parametrize(
    "event",
    [
        event_of(),
        event_of(problem=Problem("KE-1", "no such table"), detail={"rows": 1, "share": 0.5}),
        event_of(run_id="urn:poller:schema:source-event:1"),
        condition_event(up=True),
        condition_event(up=False, reason="rejected"),
    ],
    ids=["job", "failed job", "job that looks like a source", "up", "down"],
)
def test_an_event_comes_back_out_of_its_bytes(event: Event) -> None:
    assert decode(encode(event)) == event


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b'{"dataschema": "urn:poller:schema:job-event:1"}', b"\xff"],
)
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(body)
