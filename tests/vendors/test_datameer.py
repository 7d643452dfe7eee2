"""Datameer: documented answers, its traps, and whole lives read from a simulated server."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from random import Random
from typing import Any

import hypothesis
import hypothesis.strategies as st
import msgspec
import pydantic
import pytest

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.known import Index, Known, Memory
from poller.payload import iso_ms
from poller.runs import TERMINAL, Job, Seen, State
from poller.vendors.datameer import (
    ARTIFACTS,
    FIRST,
    HISTORY,
    LAST_START,
    MOST_COUNTERS,
    RUNNING,
    UNREAD,
    VENDOR,
    DatameerOptions,
)
from poller.vendors.datameer.rows import WORDS
from poller.wire import Page, Request, Response
from poller.world import World
from tests.support import Answer, answer, fixture, read, remember, runs, serve

OPTIONS = DatameerOptions()
NOW = 1_600_000_000_000
START = "2020-09-13 12:00:00.0"
START_MS = 1_599_998_400_000
LISTING = Request(path=RUNNING)


def memory(
    index: Index | None = None,
    *,
    now_ms: int = NOW,
    last_good_ms: int | None = NOW - 15_000,
    marks: Mapping[str, str] | None = None,
    publish_all: bool = False,
    rate_per_s: float = 2.0,
) -> Memory:
    """In the middle of life, unless there was no good poll yet: then at first contact."""
    return Memory(
        now_ms=now_ms,
        contact_ms=NOW,
        last_good_ms=last_good_ms,
        publish_all=publish_all,
        rate_per_s=rate_per_s,
        marks={} if marks is None else marks,
        index=Index() if index is None else index,
    )


def first_contact(
    index: Index | None = None,
    *,
    marks: Mapping[str, str] | None = None,
    publish_all: bool = False,
) -> Memory:
    return memory(index, last_good_ms=None, marks=marks, publish_all=publish_all)


def known(
    run_id: str,
    job: str = "17",
    state: State = State.RUNNING,
    *,
    started_ms: int | None = None,
    ended_ms: int | None = None,
) -> Seen:
    return Seen(
        job=Job(id=job),
        run_id=run_id,
        state=state,
        vendor_state=None,
        started_ms=started_ms,
        ended_ms=ended_ms,
    )


def knowing(*rows: Seen) -> Index:
    index = Index()
    for row in rows:
        remember(index, row)
    return index


def parse(
    request: Request, document: object, mind: Memory, options: DatameerOptions = OPTIONS
) -> Page:
    return VENDOR.parse(options, request, answer(json.dumps(document)), mind)


def listed(execution: int | None = None, **fields: object) -> dict[str, object]:
    row: dict[str, object] = {"dapJobConfigurationId": 17, "jobStatus": "RUNNING"}
    named = {} if execution is None else {"jobExecutionId": execution}
    return row | {"startTime": START} | named | fields


def history(job: int = 17) -> Request:
    """The question for a configuration's history, as a sweep begins it."""
    options = DatameerOptions(jobs=(job,))
    return VENDOR.start(options, first_contact())[1]


def details(execution: str = "37", job: str = "17") -> Request:
    request = VENDOR.settle(OPTIONS, remember(Index(), known(execution, job)))
    assert request is not None
    return request


def past(*ids: int, status: str = "COMPLETED") -> list[dict[str, object]]:
    return [{"id": number, "jobStatus": status} for number in ids]


def ids(rows: Sequence[Seen]) -> list[str]:
    return [row.run_id for row in rows]


def paths(requests: Sequence[Request]) -> list[str]:
    return [request.target for request in requests]


def sweep(number: int, start: int = 0) -> str:
    return f"{HISTORY}{number}?start={start}&length=10"


# The table of states


@pytest.mark.parametrize(
    ("word", "state", "substate"),
    [
        ("QUEUED", State.QUEUED, None),
        ("WAITING_FOR_OTHER_JOB", State.QUEUED, "waiting_for_other_job"),
        ("RUNNING", State.RUNNING, None),
        ("ABORTING", State.STOPPING, None),
        ("COMPLETED", State.SUCCEEDED, None),
        ("COMPLETED_WITH_WARNINGS", State.SUCCEEDED, "warnings"),
        ("COMPLETED_WITH_Warnings", State.SUCCEEDED, "warnings"),
        ("ERROR", State.FAILED, None),
        ("CANCELED", State.CANCELED, None),
        ("CANCELLED", State.CANCELED, None),
        (" running\t", State.RUNNING, None),
        ("Error", State.FAILED, None),
    ],
)
def test_every_word_has_its_state_in_list_history_and_details(
    word: str, state: State, substate: str | None
) -> None:
    shown = [
        *parse(LISTING, [listed(37, jobStatus=word)], memory()).runs,
        *parse(history(), past(37, status=word), memory()).runs,
        *parse(details(), {"jobStatus": word}, memory()).runs,
    ]
    assert [(row.state, row.substate, row.vendor_state, row.unmapped) for row in shown] == [
        (state, substate, word, False)
    ] * 3


def test_an_unknown_word_is_an_unmapped_state() -> None:
    for request, document in (
        (LISTING, [listed(37, jobStatus="DREAMING")]),
        (history(), past(37, status="DREAMING")),
        (details(), {"jobStatus": "DREAMING"}),
    ):
        (seen,) = parse(request, document, memory()).runs
        assert (seen.state, seen.vendor_state, seen.unmapped) == (State.UNKNOWN, "DREAMING", True)


@pytest.mark.parametrize("word", ["_NONE", "_none "])
def test_never_run_is_no_run(word: str) -> None:
    assert not parse(LISTING, [listed(37, jobStatus=word)], memory()).runs
    assert not parse(history(), past(37, status=word), memory()).runs
    assert parse(details(), {"jobStatus": word}, memory()) == Page()


# Documented answers


def test_the_documented_list_is_read_whole() -> None:
    page = VENDOR.parse(
        OPTIONS, LISTING, answer(fixture("datameer/v1_list_running.json")), memory()
    )
    started_ms = iso_ms("2011-05-19T22:35:39Z")
    assert [(row.job.id, row.run_id, row.state, row.started_ms) for row in page.runs] == [
        ("17", "37", State.RUNNING, started_ms),
        ("20", "38", State.RUNNING, started_ms),
        ("19", "39", State.RUNNING, started_ms),
        ("18", f"18@{started_ms}", State.RUNNING, started_ms),
    ]
    assert page.complete == ""
    assert [row.progress for row in page.runs] == [0.0] * 4
    assert [row.detail for row in page.runs] == [{"estimate_time": "11 sec"}, {}, {}, {}]
    assert not page.bad


def test_the_documented_history_is_read() -> None:
    page = VENDOR.parse(
        OPTIONS, history(), answer(fixture("datameer/v1_job_history.json")), memory()
    )
    assert ids(page.runs) == ["23", "27", "30"]
    assert {row.state for row in page.runs} == {State.SUCCEEDED}
    assert page.marks == {"17": "30"}


def test_a_volume_report_reads_like_a_history() -> None:
    body = fixture("datameer/v1_volume_report.json")
    page = VENDOR.parse(OPTIONS, history(), answer(body), memory())
    assert ids(page.runs) == ["186", "187"]


@pytest.mark.parametrize(
    ("name", "state", "started", "ended"),
    [
        ("v1_job_details_74", State.SUCCEEDED, "2018-07-18T13:46:38Z", "2018-07-18T13:47:03Z"),
        ("v1_job_details_pre74", State.SUCCEEDED, "2012-07-06T18:19:09Z", "2012-07-06T18:21:07Z"),
        ("v1_job_status_canceled", State.CANCELED, None, None),
        ("v1_job_status_completed", State.SUCCEEDED, None, None),
        ("v1_job_status_error", State.FAILED, None, None),
        ("v1_job_status_running", State.RUNNING, None, None),
        ("v1_job_status_warnings_mixed_case", State.SUCCEEDED, None, None),
        ("v2_status_canceled", State.CANCELED, None, "2018-09-28T18:58:41Z"),
        ("v2_status_completed", State.SUCCEEDED, "2018-09-28T18:44:56Z", "2018-09-28T18:44:58Z"),
        (
            "v2_status_completed_with_warnings",
            State.SUCCEEDED,
            "2018-09-28T10:09:47Z",
            "2018-09-28T10:09:52Z",
        ),
        ("v2_status_queued", State.QUEUED, None, None),
        ("v2_status_running", State.RUNNING, "2018-09-28T18:44:56Z", None),
    ],
)
def test_documented_details_and_statuses_are_read(
    name: str, state: State, started: str | None, ended: str | None
) -> None:
    body = fixture(f"datameer/{name}.json")
    document = json.loads(body)
    execution = str(document.get("id") or document.get("job-execution-id") or 37)
    (seen,) = VENDOR.parse(OPTIONS, details(execution), answer(body), memory()).runs
    assert (seen.job.id, seen.run_id, seen.state) == ("17", execution, state)
    assert (seen.started_ms, seen.ended_ms) == (iso_ms(started), iso_ms(ended))
    assert (seen.substate == "warnings") == ("warnings" in name)


def test_details_carry_counters_and_progress() -> None:
    body = fixture("datameer/v1_job_details_74.json")
    (seen,) = VENDOR.parse(OPTIONS, details(), answer(body), memory()).runs
    assert seen.detail == {
        "success_count": 7,
        "failure_count": 0,
        "counters.IMPORT_RECORDS": 7,
        "counters.IMPORT_PREVIEW_RECORDS": 7,
        "counters.IMPORT_OUTPUT_BYTES": 4167,
        "counters.IMPORT_DROPPED_SPLITS": 0,
        "counters.IMPORT_DROPPED_RECORDS": 0,
    }
    body = fixture("datameer/v2_status_running.json")
    (seen,) = VENDOR.parse(OPTIONS, details("3"), answer(body), memory()).runs
    assert (seen.progress, seen.detail) == (0.0, {"estimate_time": "11s"})


def test_only_some_counters_go_into_the_detail() -> None:
    counters = {f"COUNTER_{number}": number for number in range(MOST_COUNTERS + 1)}
    (seen,) = parse(details(), {"jobStatus": "RUNNING", "counters": counters}, memory()).runs
    assert len(seen.detail) == MOST_COUNTERS


@pytest.mark.parametrize(
    "name",
    [
        "v1_job_status_never_triggered",
        "v1_sequence_trigger_response",
        "v2_root_folder",
        "v2_status_never_run",
        "v2_status_triggered",
        "v2_trigger_response",
    ],
)
def test_an_answer_without_a_status_cannot_tell(name: str) -> None:
    body = fixture(f"datameer/{name}.json")
    execution = str(json.loads(body).get("job-execution-id", 37))
    assert VENDOR.parse(OPTIONS, details(execution), answer(body), memory()) == Page()


@pytest.mark.parametrize("request_", [LISTING, history(), details(), Request(path=ARTIFACTS[0])])
def test_a_failure_told_with_status_200_is_no_answer(request_: Request) -> None:
    body = fixture("datameer/v2_error_failure.json")
    with pytest.raises(Invalid, match="isn't accessible with current permissions"):
        VENDOR.parse(OPTIONS, request_, answer(body), memory())
    with pytest.raises(Invalid, match="the server says: no licence"):
        parse(request_, {"error": "no licence"}, memory())
    with pytest.raises(Invalid, match="the server says: failure"):
        parse(request_, {"status": "FAILURE"}, memory())


def test_a_folder_is_no_artifact() -> None:
    body = fixture("datameer/v2_root_folder.json")
    with pytest.raises(Invalid, match="neither a list nor a row: Object missing required field"):
        VENDOR.parse(OPTIONS, Request(path=ARTIFACTS[0]), answer(body), memory())


# Timestamps


@pytest.mark.parametrize(
    ("text", "zone", "instant"),
    [
        ("2011-05-19 22:35:39.0", "UTC", "2011-05-19T22:35:39Z"),
        ("2011-05-19 22:35:39.123", "UTC", "2011-05-19T22:35:39.123Z"),
        ("2011-05-19 22:35:39.0", "Europe/Berlin", "2011-05-19T20:35:39Z"),
        ("2011-05-19T22:35:39+02:00", "America/New_York", "2011-05-19T20:35:39Z"),
        ("Sep 28, 2018 6:44:56 PM", "UTC", "2018-09-28T18:44:56Z"),
        ("Sep 28, 2018, 6:44:56 PM", "UTC", "2018-09-28T18:44:56Z"),
        ("Sep 28, 2018, 6:44:56\u202fPM", "UTC", "2018-09-28T18:44:56Z"),
        ("Sep 28, 2018, 6:44:56\u00a0PM", "UTC", "2018-09-28T18:44:56Z"),
        ("Jan 1, 2019 12:00:00 AM", "UTC", "2019-01-01T00:00:00Z"),
        ("Jan 1, 2019 12:00:00 PM", "America/New_York", "2019-01-01T17:00:00Z"),
        # Twice there (the earlier is taken), and never there.
        ("Oct 28, 2018 2:30:00 AM", "Europe/Berlin", "2018-10-28T00:30:00Z"),
        ("2019-03-31 02:30:00.0", "Europe/Berlin", "2019-03-31T01:30:00Z"),
        ("28.09.2018 18:44:56", "UTC", None),
        ("", "UTC", None),
        (None, "UTC", None),
    ],
)
def test_local_times_become_instants(text: str | None, zone: str, instant: str | None) -> None:
    options = DatameerOptions(timezone=zone)
    (seen,) = parse(LISTING, [listed(37, startTime=text)], memory(), options).runs
    assert seen.started_ms == iso_ms(instant)
    document = {"jobStatus": "ERROR", "startTime": text, "stopTime": text}
    (seen,) = parse(details(), document, memory(), options).runs
    assert (seen.started_ms, seen.ended_ms) == (iso_ms(instant), iso_ms(instant))


def test_a_stop_time_counts_only_at_the_end() -> None:
    document = {"jobStatus": "ABORTING", "startTime": START, "stopTime": START}
    (seen,) = parse(details(), document, memory()).runs
    assert (seen.started_ms, seen.ended_ms) == (START_MS, None)


@pytest.mark.parametrize(
    ("progress", "share"),
    [(0, 0.0), (37, 0.37), ("55", 0.55), (250, 1.0), (-1, 0.0), ("soon", None), (None, None)],
)
def test_progress_is_a_share(progress: object, share: float | None) -> None:
    (seen,) = parse(LISTING, [listed(37, progress=progress)], memory()).runs
    assert seen.progress == share


# Settings


def test_settings_as_written_in_toml_are_read() -> None:
    given = {"timezone": "Europe/Berlin", "jobs": [17, 20], "sweep_interval": "5m"}
    options = DatameerOptions.model_validate(given)
    assert (options.timezone, options.jobs, options.sweep_interval) == (
        "Europe/Berlin",
        (17, 20),
        300.0,
    )
    assert DatameerOptions.model_validate({}) == OPTIONS
    assert (OPTIONS.timezone, OPTIONS.jobs, OPTIONS.sweep_interval) == ("UTC", (), 60.0)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"timezone": "Mars/Olympus"}, "no such time zone"),
        ({"timezone": "America"}, "no such time zone"),
        ({"timezone": "../passwd"}, "no such time zone"),
        ({"timezone": "x" * 5000}, "no such time zone"),
        ({"timezone": 1}, "valid string"),
        ({"jobs": [0]}, "greater than 0"),
        ({"jobs": ["a"]}, "valid integer"),
        ({"sweep_interval": "often"}, "must be a duration"),
        ({"sweep_interval": "0s"}, "must be longer than nothing"),
        ({"sweep": "60s"}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=problem):
        DatameerOptions.model_validate(given)


# What is asked, and when


def test_first_contact_asks_for_the_list_and_for_all_there_is() -> None:
    requests = VENDOR.start(OPTIONS, first_contact())
    assert paths(requests) == [RUNNING, *ARTIFACTS]
    assert [request.by_id for request in requests] == [False, True, True, True]


def test_configurations_named_in_settings_are_not_discovered() -> None:
    requests = VENDOR.start(DatameerOptions(jobs=(20, 17)), first_contact())
    assert paths(requests) == [RUNNING, sweep(17), sweep(20)]
    assert all(request.spread and request.by_id for request in requests[1:])


def test_artifacts_are_listed_again_once_in_a_resync() -> None:
    marks: dict[str, str] = {}
    asked: list[int] = []
    for at in range(NOW, NOW + 1_800_000, 15_000):
        now = memory(now_ms=at, last_good_ms=at - 15_000, marks=marks)
        for request in VENDOR.start(OPTIONS, now):
            if request.path in ARTIFACTS:
                marks |= parse(request, [], now).marks
                asked.append(at)
    again = [at for at in asked if at != NOW]
    assert again == [at for at in again[::3] for _ in ARTIFACTS]
    assert {later - sooner for sooner, later in pairwise(again[::3])} == {600_000}


def test_an_artifact_list_that_was_not_read_is_asked_for_again() -> None:
    marks = {ARTIFACTS[0]: str(NOW - 15_000), ARTIFACTS[2]: str(NOW - 15_000)}
    assert paths(VENDOR.start(OPTIONS, memory(marks=marks))) == [RUNNING, ARTIFACTS[1]]


@pytest.mark.parametrize(("rate", "every_s"), [(100.0, 60), (0.125, 100)])
def test_every_history_is_swept_once_in_the_interval_and_they_take_turns(
    rate: float, every_s: int
) -> None:
    marks = {str(job): "5" for job in range(1, 11)} | {"name:1": "load", FIRST: "5"}
    turns: dict[str, list[int]] = {}
    for at in range(NOW, NOW + 3 * every_s * 1000, 1000):
        now = memory(now_ms=at, last_good_ms=at - 1000, marks=marks, rate_per_s=rate)
        for request in VENDOR.start(OPTIONS, now):
            if request.path.startswith(HISTORY):
                turns.setdefault(request.path, []).append(at)
    assert len(turns) == 10
    assert {len(times) for times in turns.values()} == {3}
    for times in turns.values():
        gaps = {later - sooner for sooner, later in pairwise(times)}
        assert gaps == {every_s * 1000}
    assert len({times[0] for times in turns.values()}) == 10


@pytest.mark.parametrize("every_s", [1, 10, 60])
def test_each_of_many_histories_is_swept_once_in_every_interval_however_polls_fall(
    every_s: int,
) -> None:
    options = DatameerOptions.model_validate(
        {"jobs": list(range(1, 301)), "sweep_interval": f"{every_s}s"}
    )
    random, at, asked = Random(every_s), NOW, Counter[str]()
    while at < NOW + 6000 * every_s:
        last, at = at, at + random.randint(1, 700 * every_s)
        now = memory(now_ms=at, last_good_ms=last, rate_per_s=1e6)
        asked.update(paths(VENDOR.start(options, now)))
    sweeps = [count for path, count in asked.items() if path.startswith(HISTORY)]
    assert len(sweeps) == 300
    assert set(sweeps) <= {6, 7}


def test_histories_are_not_forgotten_while_polls_fail() -> None:
    marks = {"17": "5", "18": "6"}
    away = memory(last_good_ms=NOW - 3_600_000, marks=marks)
    assert paths(VENDOR.start(OPTIONS, away))[-2:] == [sweep(17), sweep(18)]


# Discovery


def test_discovered_configurations_get_names_and_their_histories_are_read_at_once() -> None:
    documents: dict[str, object] = {
        RUNNING: [listed(37)],
        ARTIFACTS[0]: [{"id": 17, "name": "load", "description": ""}, {"id": 18, "name": None}],
        ARTIFACTS[1]: {"id": 19, "name": "report"},
        ARTIFACTS[2]: [],
    }
    asked: list[str] = []

    def server(request: Request) -> Response:
        asked.append(request.target)
        return answer(json.dumps(documents.get(request.path, past(30))))

    marks: dict[str, str] = {}
    for page in read(VENDOR, OPTIONS, first_contact(), server):
        marks |= page.marks
    assert sorted(asked) == sorted([RUNNING, *ARTIFACTS, sweep(17), sweep(18), sweep(19)])
    assert marks == {
        **dict.fromkeys(ARTIFACTS, str(NOW)),
        "17": "30",
        "18": "30",
        "19": "30",
        "name:17": "load",
        "name:19": "report",
        FIRST: "37",
    }
    (seen,) = parse(LISTING, [listed(37)], memory(marks=marks)).runs
    assert seen.job == Job(id="17", name="load")


@pytest.mark.parametrize("status", [403, 404])
def test_an_artifact_list_that_is_not_for_us_is_let_be_for_a_while(status: int) -> None:
    request = Request(path=ARTIFACTS[0])
    page = VENDOR.parse(OPTIONS, request, answer("", status), first_contact())
    assert page.marks == {ARTIFACTS[0]: str(NOW)}
    assert page.notes == [f"/rest/import-job is not to be read: HTTP {status}"]


def test_a_bad_artifact_is_set_aside() -> None:
    page = parse(
        Request(path=ARTIFACTS[0]),
        [{"id": 17, "name": "x" * 1025}, {"name": "no id"}, {"id": 18, "name": "good"}],
        memory(),
    )
    assert [row.at for row in page.bad] == ["$[0].name", "$[1]"]
    assert page.marks == {ARTIFACTS[0]: str(NOW), "18": UNREAD, "name:18": "good"}


# The list


def test_a_configuration_first_met_in_the_list_has_its_history_read_once() -> None:
    page = parse(LISTING, [listed(37), listed(38)], memory(marks={"18": "3"}))
    assert paths(page.follow) == [sweep(17)]
    assert page.marks == {"17": UNREAD}
    assert not parse(LISTING, [listed(37)], memory(marks=page.marks)).follow


def test_an_unchanged_row_is_shown_and_not_seen() -> None:
    index = knowing(*parse(LISTING, [listed(37, progress=1)], memory()).runs)
    page = parse(LISTING, [listed(37, progress=2, estimateTime="9 sec")], memory(index))
    assert not page.runs
    assert page.shown == list(index.runs.values())
    page = parse(LISTING, [listed(37, jobStatus="ABORTING")], memory(index))
    assert [row.state for row in page.runs] == [State.STOPPING]


def test_a_list_of_one_may_come_without_brackets() -> None:
    page = parse(LISTING, listed(37), memory())
    assert ids(page.runs) == ["37"]
    assert page.complete == ""


def test_nothing_runs() -> None:
    page = parse(LISTING, [], memory())
    assert (page.runs, page.complete, page.marks) == ([], "", {})


@pytest.mark.parametrize("document", [{}, {"message": "maintenance"}, listed(0), None, "x", [[]]])
def test_a_document_that_is_no_list_of_runs_shows_no_empty_list(document: object) -> None:
    if isinstance(document, list):
        assert parse(LISTING, document, memory()).bad
        return
    with pytest.raises(Invalid):
        parse(LISTING, document, memory())


def test_bad_rows_are_set_aside_and_the_others_read() -> None:
    rows = [
        listed(37),
        {"jobStatus": "RUNNING"},
        listed(38, jobStatus=None),
        listed(-1),
        listed(39, jobStatus="x" * 1025),
        "row",
        listed(40, dapJobConfigurationId="17"),
        listed(41),
    ]
    page = parse(LISTING, rows, memory())
    assert ids(page.runs) == ["37", "41"]
    assert [row.at for row in page.bad] == [
        "$[1]",
        "$[2].jobStatus",
        "$[3].jobExecutionId",
        "$[4].jobStatus",
        "$[5]",
        "$[6].dapJobConfigurationId",
    ]
    assert page.complete == ""


# Runs without an execution id


def test_a_run_without_an_id_gets_a_provisional_one() -> None:
    page = parse(LISTING, [listed()], memory())
    assert ids(page.runs) == [f"17@{START_MS}"]
    page = parse(LISTING, [listed(startTime=None, jobStatus="QUEUED")], memory())
    assert ids(page.runs) == ["17@0"]


@pytest.mark.parametrize(
    "before",
    [
        known(f"17@{START_MS}", started_ms=START_MS),
        known("17@0", state=State.QUEUED),
        known("36", started_ms=START_MS),
        known("36", started_ms=START_MS + 999),
    ],
)
def test_a_row_without_an_id_is_the_run_known_to_have_begun_then(before: Seen) -> None:
    page = parse(LISTING, [listed()], memory(knowing(before)))
    assert [(row.run_id, row.was) for row in page.runs] == [(before.run_id, None)]


def test_a_row_without_an_id_that_may_be_a_queued_run_or_the_next_is_left_to_its_details() -> None:
    page = parse(LISTING, [listed()], memory(knowing(known("36", state=State.QUEUED))))
    assert (page.runs, page.shown, page.complete) == ([], [], "")


@pytest.mark.parametrize(
    "before",
    [
        known("36", started_ms=START_MS - 5000),
        known("36", job="18", started_ms=START_MS),
        known("36", started_ms=START_MS, state=State.FAILED),
    ],
)
def test_a_row_without_an_id_is_no_other_run(before: Seen) -> None:
    page = parse(LISTING, [listed()], memory(knowing(before)))
    assert ids(page.runs) == [f"17@{START_MS}"]


def test_a_row_without_an_id_is_not_the_run_that_another_row_names() -> None:
    index = knowing(known("36", state=State.QUEUED))
    rows = [listed(), listed(36, startTime=None, jobStatus="QUEUED")]
    assert ids(parse(LISTING, rows, memory(index)).runs) == [f"17@{START_MS}", "36"]


@pytest.mark.parametrize(
    "before",
    [
        known(f"17@{START_MS}", started_ms=START_MS),
        known(f"17@{START_MS + 500}", started_ms=START_MS + 500),
        known("17@0", state=State.QUEUED),
    ],
)
def test_a_provisional_run_takes_on_its_real_id(before: Seen) -> None:
    (seen,) = parse(LISTING, [listed(37)], memory(knowing(before))).runs
    assert (seen.run_id, seen.was) == ("37", before.run_id)
    document = {"jobStatus": "COMPLETED", "startTime": START}
    (seen,) = parse(details(), document, memory(knowing(before))).runs
    assert (seen.run_id, seen.was) == ("37", before.run_id)


def test_a_run_that_was_given_up_and_is_listed_as_before_is_news() -> None:
    index = Index()
    (seen,) = parse(LISTING, [listed(37)], memory(index)).runs
    run = remember(index, seen)
    index.put(msgspec.structs.replace(run, state=State.UNKNOWN, vanished=True), NOW)
    page = parse(LISTING, [listed(37)], memory(index))
    assert (page.runs, page.shown) == ([seen], [])


def test_a_provisional_run_that_was_given_up_takes_on_its_real_id_all_the_same() -> None:
    index = knowing(known(f"17@{START_MS}", started_ms=START_MS))
    (run,) = index.runs.values()
    vanished = Known(job=run.job, run_id=run.run_id, state=State.UNKNOWN, vanished=True)
    index.put(vanished, NOW)
    (seen,) = parse(LISTING, [listed(37)], memory(index)).runs
    assert (seen.run_id, seen.was) == ("37", run.run_id)


@pytest.mark.parametrize(
    "before",
    [
        known(f"18@{START_MS}", job="18", started_ms=START_MS),
        known(f"17@{START_MS - 1000}", started_ms=START_MS - 1000),
        known("36", started_ms=START_MS),
    ],
)
def test_another_run_is_not_renamed(before: Seen) -> None:
    (seen,) = parse(LISTING, [listed(37)], memory(knowing(before))).runs
    assert (seen.run_id, seen.was) == ("37", None)


def test_a_known_run_is_not_renamed() -> None:
    index = knowing(known("37", started_ms=START_MS), known("17@0", state=State.QUEUED))
    assert [row.was for row in parse(LISTING, [listed(37)], memory(index)).runs] == [None]
    document = {"jobStatus": "RUNNING", "startTime": START}
    assert [row.was for row in parse(details(), document, memory(index)).runs] == [None]


# Histories


def test_only_what_is_above_the_mark_is_news() -> None:
    page = parse(history(), past(31, 30, 29), memory(marks={"17": "29"}))
    assert ids(page.runs) == ["30", "31"]
    assert page.marks == {"17": "31"}
    assert not page.follow


def test_what_is_known_is_no_news_but_for_its_end() -> None:
    index = knowing(
        known("30", state=State.SUCCEEDED),
        known("31", state=State.RUNNING),
        known("32", state=State.RUNNING),
    )
    rows = past(32) + past(31, status="RUNNING") + past(30)
    page = parse(history(), rows, memory(index, marks={"17": "29"}))
    assert [(row.run_id, row.state) for row in page.runs] == [("32", State.SUCCEEDED)]
    assert page.marks == {"17": "32"}


@pytest.mark.parametrize("vanished", [False, True])
def test_the_end_of_a_run_that_nobody_could_tell_of_is_news_below_the_mark(vanished: bool) -> None:
    index = knowing(known("30"), known("31", state=State.FAILED))
    (run,) = index.active()
    index.put(Known(job=run.job, run_id="30", state=State.UNKNOWN, vanished=vanished), NOW)
    page = parse(history(), past(31, 30, 29), memory(index, marks={"17": "31"}))
    assert ids(page.runs) == ["30"]
    assert page.marks == {"17": "31"}


def test_a_history_is_read_back_to_the_mark() -> None:
    everything = list(range(45, 0, -1))
    marks = {"17": "22"}
    asked: list[str] = []

    def server(request: Request) -> Response:
        asked.append(request.target)
        start = int(dict(request.query).get("start", 0))
        rows = [] if request.path == RUNNING else past(*everything[start : start + 10])
        return answer(json.dumps(rows))

    pages = read(VENDOR, DatameerOptions(jobs=(17,)), memory(marks=marks, last_good_ms=1), server)
    assert asked == [RUNNING, sweep(17), sweep(17, 10), sweep(17, 20)]
    assert sorted(ids(runs(pages)), key=int) == [str(number) for number in range(23, 46)]
    assert [page.marks for page in pages] == [{}, {}, {}, {"17": "45"}]


def test_a_history_without_end_is_read_back_only_so_far() -> None:
    everything = list(range(1000, 0, -1))
    marks = {"17": "1"}
    work = [history()]
    pages: list[Page] = []
    while work:
        request = work.pop()
        assert request.target == sweep(17, 10 * len(pages))
        first = 10 * len(pages)
        pages.append(parse(request, past(*everything[first : first + 10]), memory(marks=marks)))
        work += pages[-1].follow
    assert len(pages) == 1 + LAST_START // 10
    assert all((page.marks, page.notes) == ({}, []) for page in pages[:-1])
    assert pages[-1].marks == {"17": "1000"}
    assert pages[-1].notes == [
        "configuration 17 ran more often than is read back; the rest is not told"
    ]


def test_an_empty_history_makes_a_mark_so_that_the_first_run_is_news() -> None:
    page = parse(history(), [], first_contact())
    assert page.marks == {"17": "0"}
    assert ids(parse(history(), past(5), memory(marks=page.marks)).runs) == ["5"]


def test_a_history_that_lost_its_newest_rows_does_not_lower_the_mark() -> None:
    assert parse(history(), past(3), memory(marks={"17": "9"})).marks == {"17": "9"}


def test_first_contact_reads_one_page_and_bounds_what_is_old() -> None:
    page = parse(history(), past(*range(30, 20, -1)), first_contact(marks={"17": UNREAD}))
    assert len(page.runs) == 10
    assert not page.follow
    assert page.marks == {"17": "30", FIRST: "30"}
    page = parse(history(), past(*range(20, 10, -1)), first_contact(marks=page.marks))
    assert page.marks == {"17": "30"}


def test_first_contact_that_tells_all_reads_the_whole_history() -> None:
    page = parse(history(), past(*range(30, 20, -1)), first_contact(publish_all=True))
    assert paths(page.follow) == [sweep(17, 10)]
    page = parse(page.follow[0], past(20), first_contact(publish_all=True, marks=page.marks))
    assert page.marks == {"17": "30"}


@pytest.mark.parametrize(("publish_all", "news"), [(False, ["41"]), (True, ["39", "40", "41"])])
def test_a_history_first_read_later_leaves_out_what_first_contact_would_have_kept_silent(
    publish_all: bool,
    news: list[str],
) -> None:
    later = memory(marks={"17": UNREAD, FIRST: "40"}, publish_all=publish_all)
    page = parse(history(), past(41, 40, 39), later)
    assert ids(page.runs) == news
    assert page.marks == {"17": "41"}


def test_a_deleted_configuration_is_forgotten() -> None:
    index = knowing(known("17@0", state=State.QUEUED), known("36"), known("18@0", job="18"))
    marks = {"17": "30", "name:17": "load", "18": "3"}
    page = VENDOR.parse(OPTIONS, history(), answer("", 404), memory(index, marks=marks))
    assert page == Page(gone=[("17", "17@0")], marks={"17": "", "name:17": ""})


def test_a_bad_history_row_is_set_aside_and_counts_as_one_of_the_page() -> None:
    rows = [*past(40, 39, 38, 37, 36, 35, 34, 33), {"id": 32}, {"id": -1, "jobStatus": "ERROR"}]
    page = parse(history(), rows, memory(marks={"17": "2"}))
    assert [row.at for row in page.bad] == ["$[8]", "$[9].id"]
    assert paths(page.follow) == [sweep(17, 10)]


def test_a_history_of_bad_rows_only_is_read_on() -> None:
    page = parse(history(), [None] * 10, memory(marks={"17": "2"}))
    assert paths(page.follow) == [sweep(17, 10)]
    (request,) = page.follow
    assert parse(request, past(5), memory(marks={"17": "2"})).marks == {"17": "5"}


# A provisional run in the history


def test_what_may_be_a_provisional_run_is_looked_up_before_it_is_told() -> None:
    index = knowing(known(f"17@{START_MS}", started_ms=START_MS))
    marks = {"17": "29"}
    page = parse(history(), past(31, 30, 29), memory(index, marks=marks))
    assert not page.runs
    assert [request.path.rpartition("/")[2] for request in page.follow] == ["30", "31"]
    assert page.marks == {"17": "29"}
    document = {"jobStatus": "COMPLETED", "startTime": START, "stopTime": START}
    (seen,) = parse(page.follow[1], document, memory(index)).runs
    assert (seen.run_id, seen.was) == ("31", f"17@{START_MS}")
    other = {"jobStatus": "COMPLETED", "startTime": "2020-09-13 11:00:00.0"}
    (seen,) = parse(page.follow[0], other, memory(index)).runs
    assert (seen.run_id, seen.was) == ("30", None)


def test_at_first_contact_any_unknown_run_may_be_a_provisional_one() -> None:
    index = knowing(known(f"17@{START_MS}", started_ms=START_MS), known("29"))
    rows = past(31, status="RUNNING") + past(30, 29)
    page = parse(history(), rows, first_contact(index))
    assert ids(page.runs) == ["29"]
    assert [request.path.rpartition("/")[2] for request in page.follow] == ["30", "31"]
    assert page.marks == {"17": "29", FIRST: "31"}


def test_a_provisional_run_that_left_the_list_is_looked_for_in_the_history() -> None:
    index = knowing(known(f"17@{START_MS}", started_ms=START_MS))
    (run,) = index.active()
    request = VENDOR.settle(OPTIONS, run)
    assert request is not None
    assert (request.target, request.by_id, request.spread) == (sweep(17), True, False)
    page = parse(request, past(29), memory(index, marks={"17": "29"}))
    assert page == Page(marks={"17": "29"}, runs=[], follow=[], bad=[], notes=[])


# Details


def test_a_run_that_left_the_list_is_asked_for() -> None:
    assert details("37").target == "/rest/job-execution/job-details/37"
    assert details("37").by_id


def test_an_execution_that_does_not_exist_is_gone() -> None:
    index = knowing(known("37"))
    page = VENDOR.parse(OPTIONS, details("37"), answer("", 404), memory(index))
    assert page == Page(gone=[("17", "37")])


def test_an_execution_that_only_the_history_told_of_is_not_gone() -> None:
    with pytest.raises(Invalid, match="HTTP 404"):
        VENDOR.parse(OPTIONS, details("37"), answer("", 404), memory())


@pytest.mark.parametrize("name", ["id", "jobExecutionId", "job-execution-id"])
def test_an_answer_about_another_execution_is_none(name: str) -> None:
    with pytest.raises(Invalid, match="another execution than 37"):
        parse(details("37"), {name: 38, "jobStatus": "RUNNING"}, memory())


@pytest.mark.parametrize(
    ("seen", "asked"),
    [
        (known("37", state=State.SUCCEEDED), True),
        (known("37", state=State.RUNNING), True),
        (known("37", state=State.QUEUED), False),
        (known("37", state=State.SUCCEEDED, started_ms=1), False),
        (known("37", state=State.CANCELED, ended_ms=1), False),
        (known("17@0", state=State.RUNNING), False),
    ],
)
def test_times_are_asked_for_where_only_the_history_told(
    seen: Seen,
    asked: bool,
) -> None:
    request = VENDOR.ask(OPTIONS, None, seen)
    assert (request is not None) is asked
    assert request is None or request.target == details("37").target


# Errors and hostile bytes


@pytest.mark.parametrize("request_", [LISTING, history(), details(), Request(path=ARTIFACTS[0])])
@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (answer("", 401), Rejected, "HTTP 401"),
        (answer("", 429, retry_after="7"), Limited, "HTTP 429"),
        (answer("", 503, retry_after="7"), Limited, "HTTP 503"),
        (answer("", 500), Unreachable, "HTTP 500"),
        (answer("", 302), Invalid, "HTTP 302"),
        (answer("<html>sign in</html>"), Invalid, "an HTML page instead of JSON"),
        (answer(""), Invalid, "an empty answer"),
        (answer('{"id": 3'), Invalid, "not JSON"),
        (answer('[{"id": 3'), Invalid, "not"),
        (answer('{"id": 3}, {"id": 4}'), Invalid, "not JSON"),
        (answer("3"), Invalid, "not the documented shape"),
    ],
)
def test_no_answer_is_told_as_what_it_is(
    request_: Request, response: Response, error: type[VendorError], message: str
) -> None:
    with pytest.raises(error, match=message):
        VENDOR.parse(OPTIONS, request_, response, memory())


@pytest.mark.parametrize("request_", [LISTING, history(), details()])
def test_a_refusal_is_told_as_one(request_: Request) -> None:
    with pytest.raises(Rejected):
        VENDOR.parse(OPTIONS, request_, answer("", 403), memory())


@pytest.mark.parametrize(
    "fields",
    [
        {"jobStatus": 3},
        {"jobStatus": "RUNNING", "startTime": 3},
        {"jobStatus": "RUNNING", "counters": [1]},
        {"jobStatus": "RUNNING", "successCount": 2**64},
        {"jobStatus": "RUNNING", "counters": {"x" * 1025: 1}},
    ],
)
def test_details_of_another_shape_are_invalid(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="not the documented shape"):
        parse(details(), fields, memory())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
_VALUE = _JSON | st.sampled_from([START, "RUNNING", "_NONE", "Sep 28, 2018 6:44:56 PM", 1, 37])
_OBJECT = st.dictionaries(
    st.sampled_from(
        [
            *("id", "jobStatus", "job-status", "dapJobConfigurationId", "jobExecutionId"),
            *("startTime", "start-time", "stopTime", "estimateTime", "progress", "job-progress"),
            *("counters", "status", "error", "reason", "name"),
        ]
    ),
    _VALUE,
)
_BODY = st.binary(max_size=64) | st.one_of(_JSON, _OBJECT, st.lists(_OBJECT, max_size=3)).map(
    lambda document: json.dumps(document).encode()
)


@pytest.mark.parametrize("request_", [LISTING, history(), details(), Request(path=ARTIFACTS[0])])
@hypothesis.settings(deadline=None)
@hypothesis.given(body=_BODY, status=st.sampled_from([200, 200, 200, 404, 500]))
def test_whatever_comes_is_read_or_told_as_an_error(
    request_: Request, body: bytes, status: int
) -> None:
    index = knowing(known("17@0", state=State.QUEUED), known("37", started_ms=START_MS))
    try:
        page = VENDOR.parse(OPTIONS, request_, answer(body, status), memory(index))
    except VendorError:
        return
    assert all(row.run_id and row.job.id for row in page.runs)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    local=st.datetimes(), zone=st.sampled_from(["UTC", "Asia/Kathmandu", "America/St_Johns"])
)
def test_any_timestamp_is_read(local: datetime, zone: str) -> None:
    options = DatameerOptions(timezone=zone)
    (seen,) = parse(LISTING, [listed(37, startTime=str(local))], memory(), options).runs
    assert seen.started_ms is None or seen.started_ms > 0


# Against the simulated server


class Watch:
    """What a loop would know and tell of a server that it polls, page by page."""

    def __init__(self, server: Answer, options: DatameerOptions) -> None:
        self.server = server
        self.options = options
        self.index = Index()
        self.marks: dict[str, str] = {}
        self.last_good_ms: int | None = None
        self.told: list[tuple[str, State]] = []
        self.real: dict[str, str] = {}

    def poll(self, now_ms: int) -> None:
        mind = memory(
            self.index,
            now_ms=now_ms,
            last_good_ms=self.last_good_ms,
            marks=self.marks,
            rate_per_s=1000.0,
        )
        self._work(list(VENDOR.start(self.options, mind)), mind)
        for run in self.index.unseen("", now_ms):
            request = VENDOR.settle(self.options, run)
            assert request is not None
            self._work([request], mind)
        self.last_good_ms = now_ms

    def _work(self, work: list[Request], mind: Memory) -> None:
        while work:
            request = work.pop(0)
            page = VENDOR.parse(self.options, request, self.server(request), mind)
            assert not page.gone
            self.marks |= {name: value for name, value in page.marks.items() if value}
            for run in page.shown:
                self.index.shown([run], mind.now_ms)
            for seen in page.runs:
                self._take(seen, mind)
            work += page.follow

    def _take(self, seen: Seen, mind: Memory) -> None:
        known = self.index.runs.get((seen.job.id, seen.run_id))
        if known is not None and known.state is seen.state:
            self.index.shown([known], mind.now_ms)
            return
        request = VENDOR.ask(self.options, known, seen)
        if request is not None:
            (seen,) = VENDOR.parse(self.options, request, self.server(request), mind).runs
        if seen.was is not None:
            old = self.index.rename(seen.job.id, seen.was, seen.run_id)
            assert old is not None
            self.real[seen.was] = seen.run_id
            known = old
        if known is None or known.state is not seen.state:
            self.told.append((seen.run_id, seen.state))
        remember(self.index, seen, at_ms=mind.now_ms)


def compare(watch: Watch, world: World, *, whole: bool) -> None:
    """What is known is what the world holds, and is all of it if everything was asked."""
    found = {run.run_id: run for run in watch.index.runs.values()}
    for run in world.runs.values():
        begun_ms, ended_ms = run.now.started_ms, run.now.ended_ms
        if world.seed % 2:  # that server writes no milliseconds
            begun_ms = begun_ms and begun_ms // 1000 * 1000
            ended_ms = ended_ms and ended_ms // 1000 * 1000
        provisional_id = f"{run.definition.number}@{begun_ms}"
        one = found.pop(str(run.number), None) or found.pop(provisional_id, None)
        if one is None:
            assert not whole
            continue
        assert (one.job.id, one.state) == (str(run.definition.number), run.now.state)
        assert (one.started_ms, one.ended_ms) == (begun_ms, ended_ms)
        warned = run.now.state is State.SUCCEEDED and run.now.warnings
        assert (one.substate == "warnings") is warned
    assert not found


@pytest.mark.parametrize("sweep_s", [0.001, 9.0])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_is_what_the_simulated_server_holds(seed: int, sweep_s: float) -> None:
    world = World(kinds=VENDOR.kinds, seed=seed, jobs=7, now_ms=NOW)
    watch = Watch(serve(VENDOR, world), DatameerOptions(sweep_interval=sweep_s))
    for now_ms in range(NOW, NOW + 90_000, 700):
        world.advance(now_ms)
        watch.poll(now_ms)
        compare(watch, world, whole=sweep_s < 0.7)
    world.advance(NOW + 100_000)
    watch.poll(NOW + 100_000)
    compare(watch, world, whole=True)
    assert watch.real, "no run was shown without its id"
    told = [(watch.real.get(run_id, run_id), state) for run_id, state in watch.told]
    assert len(told) == len(set(told))
    assert {state for _, state in told} == {state for state, _ in WORDS.values()}
    assert {name for key, name in watch.marks.items() if key.startswith("name:")} == {
        definition.name for definition in world.definitions
    }


def test_runs_too_short_to_be_listed_are_found_with_their_times() -> None:
    world = World(kinds=VENDOR.kinds, seed=1, jobs=3, now_ms=NOW, pace=0.01)
    watch = Watch(serve(VENDOR, world), DatameerOptions(sweep_interval=60.0))
    for now_ms in range(NOW, NOW + 20_000, 1000):
        world.advance(now_ms)
        watch.poll(now_ms)
    world.advance(NOW + 80_000)
    watch.poll(NOW + 80_000)
    ended = [run for run in watch.index.runs.values() if run.state in TERMINAL]
    assert {int(run.run_id) for run in ended} == {
        run.number for run in world.runs.values() if run.now.terminal
    }
    assert all(run.ended_ms for run in ended)


def test_the_simulated_server_is_read_as_one_poll_reads_it() -> None:
    world = World(kinds=VENDOR.kinds, seed=2, jobs=5, now_ms=NOW)
    world.advance(NOW + 8000)
    pages = read(VENDOR, OPTIONS, first_contact(), serve(VENDOR, world))
    shown = {row.run_id: row for row in runs(pages)}
    assert {run_id for run_id in shown if "@" not in run_id} == {
        str(run.number) for run in world.runs.values()
    }
    assert any(page.complete == "" for page in pages)


def simulated(path: str, **query: str) -> Response:
    world = World(kinds=VENDOR.kinds, jobs=5, now_ms=NOW)
    world.advance(NOW + 120_000)
    return VENDOR.render(world, Request(path=path, query=tuple(query.items())))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/rest/jobs",
        f"{HISTORY}6",
        f"{HISTORY}0",
        f"{HISTORY}x",
        "/rest/job-execution/1",
        "/rest/job-execution/job-details/999999",
        "/rest/job-execution/job-details/\u00b2",
    ],
)
def test_the_simulated_server_does_not_know_everything(path: str) -> None:
    assert simulated(path).status == 404


def test_the_simulated_history_has_pages() -> None:
    newest = json.loads(simulated(f"{HISTORY}1").body)
    numbers = [row["id"] for row in newest]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) > 2
    assert json.loads(simulated(f"{HISTORY}1", start="1", length="1").body) == newest[1]


def rows_of(path: str) -> Iterator[dict[str, Any]]:
    document = json.loads(simulated(path).body)
    yield from document if isinstance(document, list) else [document]


def test_the_simulated_artifacts_are_all_there_is_and_one_comes_without_brackets() -> None:
    assert sorted(row["id"] for path in ARTIFACTS for row in rows_of(path)) == [1, 2, 3, 4, 5]
    assert isinstance(json.loads(simulated(ARTIFACTS[0]).body), dict)
