from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.known import Index, Known, Memory
from poller.runs import TERMINAL, Job, Problem, Seen, State
from poller.vendors.kylin import PAGE_SIZE, VENDOR, Options
from poller.vendors.kylin.rows import WORDS
from poller.wire import Page, Request, Response
from poller.world import Attempt, World
from tests.support import Answer, answer, fixture, read, remember, runs, serve

NOW = 1_600_000_000_000
HOUR = 3_600_000
DAY = 24 * HOUR
ALL = Options()
LATER = Memory(now_ms=NOW, contact_ms=NOW - DAY, last_good_ms=NOW - 60_000, whole=True)
JUST_SWEPT = {"swept:": str(NOW - 60_000)}


def row(job_id: str = "job-1", /, **fields: object) -> dict[str, Any]:
    return {
        "id": job_id,
        "job_status": "RUNNING",
        "project": "ssb",
        "create_time": NOW - 9,
    } | fields


def row4(job_id: str = "job-1", /, **fields: object) -> dict[str, Any]:
    return {"uuid": job_id, "job_status": "RUNNING", "projectName": "ssb"} | fields


def listing(*rows: object, total: int | None = None) -> Response:
    data = {"value": rows, "total_size": len(rows) if total is None else total}
    return answer(json.dumps({"code": "000", "data": data, "msg": ""}))


def array(*rows: object) -> Response:
    return answer(json.dumps(rows))


def fault(status: int, msg: str, error_code: str | None = None) -> Response:
    body = {"code": "999", "data": None, "msg": msg, "stacktrace": "at org.apache.kylin.Secret"}
    return answer(json.dumps(body | {"error_code": error_code}), status)


def parse(request: Request, response: Response, memory: Memory = LATER) -> Page:
    return VENDOR.parse(ALL, request, response, memory)


def question(memory: Memory = LATER, options: Options = ALL) -> Request:
    [request] = VENDOR.start(options, memory)
    return request


def one(response: Response) -> Seen:
    [seen] = parse(question(), response).runs
    return seen


def known(job_id: str = "job-1", scope: str = "5") -> Known:
    return Known(job=Job(job_id), run_id=job_id, state=State.RUNNING, scope=scope)


def asked_page(request: Request) -> tuple[str, str]:
    query = dict(request.query)
    return query["page_offset"], query["offset"]


def index_of(*responses: Response) -> Index:
    index = Index()
    for response in responses:
        for seen in parse(question(), response).runs:
            remember(index, seen)
    return index


# Settings


def test_projects_are_a_list_of_names() -> None:
    assert Options.model_validate({"projects": ["a", "b"]}).projects == ("a", "b")
    assert Options.model_validate({}).projects == ()


@pytest.mark.parametrize("wrong", ["ssb", [1], 5])
def test_projects_that_are_no_list_of_names_are_refused(wrong: object) -> None:
    with pytest.raises(pydantic.ValidationError):
        Options.model_validate({"projects": wrong})


# States

STATES = [
    ("NEW", State.QUEUED, None),
    ("PENDING", State.QUEUED, None),
    ("READY", State.QUEUED, None),
    ("RUNNING", State.RUNNING, None),
    ("STOPPED", State.SUSPENDED, None),
    ("PAUSED", State.SUSPENDED, None),
    ("ERROR", State.FAILED, None),
    ("FINISHED", State.SUCCEEDED, None),
    ("SUCCEED", State.SUCCEEDED, None),
    ("DISCARDED", State.CANCELED, None),
    ("SUICIDAL", State.CANCELED, "killed_by_system"),
    ("STARTING", State.STARTING, None),
    ("STOPPING", State.STOPPING, None),
    ("LAUNCHING_ERROR", State.FAILED, None),
    ("SKIP", State.SUCCEEDED, "skipped"),
    ("WARNING", State.SUCCEEDED, "warnings"),
    (" finished\n", State.SUCCEEDED, None),
    ("Launching_Error", State.FAILED, None),
]


@pytest.mark.parametrize(("word", "state", "substate"), STATES)
def test_every_word_has_its_state(word: str, state: State, substate: str | None) -> None:
    for response in (listing(row(job_status=word)), array(row4(job_status=word))):
        seen = one(response)
        assert (seen.state, seen.substate, seen.vendor_state) == (state, substate, word)
        assert not seen.unmapped


def test_the_table_of_states_has_no_word_that_is_not_tested() -> None:
    assert set(WORDS) == {word.strip().lower() for word, _, _ in STATES}


def test_a_word_that_is_not_in_the_table_is_unknown_and_says_so() -> None:
    seen = one(listing(row(job_status="HIBERNATING")))
    assert (seen.state, seen.vendor_state, seen.unmapped) == (State.UNKNOWN, "HIBERNATING", True)


@pytest.mark.parametrize(
    ("status", "scheduler", "state", "substate"),
    [
        ("DISCARDED", "SUICIDAL", State.CANCELED, "killed_by_system"),
        ("DISCARDED", "DISCARDED", State.CANCELED, None),
        ("WARNING", "SUCCEED", State.SUCCEEDED, "warnings"),
        ("PENDING", "READY", State.QUEUED, None),
        ("RUNNING", "SUICIDAL", State.RUNNING, None),
        ("STOPPED", "PAUSED", State.SUSPENDED, None),
        ("FINISHED", "whatever", State.SUCCEEDED, None),
    ],
)
def test_the_scheduler_state_only_refines_the_state(
    status: str, scheduler: str, state: State, substate: str | None
) -> None:
    seen = one(listing(row(job_status=status, scheduler_state=scheduler)))
    assert (seen.state, seen.substate, seen.vendor_state) == (state, substate, status)
    assert not seen.unmapped


# Documented samples


def test_the_documented_list_of_kylin_5_is_read() -> None:
    page = parse(question(), answer(fixture("kylin/k5_doc_job_api_1.json")))
    [seen] = page.runs
    assert msgspec.structs.replace(seen, fingerprint=0) == Seen(
        job=Job("232bf69f-6cdf-4dcc-a3aa-b6ca7651e98c", "INDEX_BUILD", "test", "ADMIN"),
        run_id="232bf69f-6cdf-4dcc-a3aa-b6ca7651e98c",
        state=State.SUCCEEDED,
        vendor_state="FINISHED",
        marker="1577764730069",
        queued_ms=1577764730069,
        started_ms=1577764731199,
        ended_ms=1577764822219,
        progress=1.0,
        detail={"target_subject": "AUTO_MODEL_KYLIN_ACCOUNT_1", "tag": "mark"},
        scope="5",
    )
    assert not page.bad


def test_the_documented_list_of_kylin_4_is_read() -> None:
    page = parse(question(), answer(fixture("kylin/k3k4_doc_job_list.json")))
    [seen] = page.runs
    assert msgspec.structs.replace(seen, fingerprint=0) == Seen(
        job=Job(
            "9eb7bccf-4448-4578-9c29-552658b5a2ca",
            "Sample_Cube - 19700101000000_20150101000000 - BUILD - GMT+08:00 2017-03-31 18:36:08",
            None,
            "ADMIN",
        ),
        run_id="9eb7bccf-4448-4578-9c29-552658b5a2ca",
        state=State.SUCCEEDED,
        vendor_state="FINISHED",
        started_ms=1490956581743,
        ended_ms=1490957518131,
        progress=1.0,
        detail={"target_subject": "Sample_Cube"},
        scope="4",
    )
    assert not page.bad
    assert page.complete is None


def test_the_documented_job_of_kylin_4_is_read() -> None:
    job_id = "c143e0e4-ac5f-434d-acf3-46b0d15e3dc6"
    request = VENDOR.settle(ALL, known(job_id, scope="4"))
    assert request is not None
    [seen] = parse(request, answer(fixture("kylin/k3k4_doc_resume_or_get_job.json"))).runs
    assert (seen.run_id, seen.state, seen.progress) == (job_id, State.QUEUED, 0.0)
    assert (seen.queued_ms, seen.started_ms, seen.ended_ms) == (None, None, None)
    assert seen.detail == {"target_subject": "test_kylin_cube_with_slr_empty"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_documented_errors_are_refusals_of_what_was_asked(number: int) -> None:
    body = fixture(f"kylin/k5_doc_error_999_{number}.json")
    for status in (200, 400, 500):
        with pytest.raises(Invalid, match=r"KE-01000[12]0[02]2\(") as raised:
            parse(question(), answer(body, status))
        assert "org.apache.kylin.common.exception" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    [
        "k5_doc_job_api_2",
        "k5_doc_authentication_1",
        "k5_doc_job_callback_1",
        "k3k4_doc_job_overview",
        "k3k4_doc_job_step_output",
        "k3k4_doc_rollback",
    ],
)
def test_answers_to_other_questions_are_no_list(name: str) -> None:
    with pytest.raises(Invalid):
        parse(question(), answer(fixture(f"kylin/{name}.json")))


# What is asked


def test_both_kylins_are_asked_in_one_question() -> None:
    request = question(replace(LATER, marks=JUST_SWEPT))
    assert request.target == (
        "/api/jobs?time_filter=0&page_offset=0&page_size=200&sort_by=last_modified&reverse=true"
        "&timeFilter=2&offset=0&limit=200&jobSearchMode=ALL"
    )
    assert dict(request.headers) == {
        "Accept": "application/vnd.apache.kylin-v4-public+json, application/json;q=0.5",
        "Accept-Language": "en",
    }
    assert not request.by_id


def test_each_project_has_its_own_list() -> None:
    requests = VENDOR.start(Options(projects=("ssb", "a & b")), LATER)
    asked = [dict(request.query) for request in requests]
    assert [(query["project"], query["projectName"]) for query in asked] == [
        ("ssb", "ssb"),
        ("a & b", "a & b"),
    ]


@pytest.mark.parametrize(
    ("age_ms", "window", "window4"),
    [
        (None, "4", "5"),
        (60_000, "0", "2"),
        (20 * HOUR - 1, "0", "2"),
        (20 * HOUR, "1", "3"),
        (6 * DAY - 1, "1", "3"),
        (6 * DAY, "2", "4"),
        (27 * DAY - 1, "2", "4"),
        (27 * DAY, "4", "5"),
    ],
)
def test_the_list_reaches_back_to_the_last_good_poll(
    age_ms: int | None, window: str, window4: str
) -> None:
    last_good_ms = None if age_ms is None else NOW - age_ms
    query = dict(question(replace(LATER, last_good_ms=last_good_ms, marks=JUST_SWEPT)).query)
    assert (query["time_filter"], query["timeFilter"]) == (window, window4)


@pytest.mark.parametrize(
    ("marks", "window"),
    [
        ({}, "1"),
        ({"swept:": str(NOW - 600_000)}, "1"),
        ({"swept:": str(NOW - 599_999)}, "0"),
        ({"swept:": str(NOW + 1)}, "1"),
        ({"swept:ssb": str(NOW)}, "1"),
    ],
)
def test_a_week_is_swept_once_per_resync(marks: dict[str, str], window: str) -> None:
    assert dict(question(replace(LATER, marks=marks)).query)["time_filter"] == window


# Paging


def test_a_whole_list_is_read_to_its_end_and_its_front_again() -> None:
    rows = [row(f"job-{number}") for number in range(2 * PAGE_SIZE + 1)]
    asked = []

    def server(request: Request) -> Response:
        asked.append(asked_page(request))
        first = int(dict(request.query)["page_offset"]) * PAGE_SIZE
        return listing(*rows[first : first + PAGE_SIZE], total=len(rows))

    pages = read(VENDOR, ALL, replace(LATER, whole=False, marks=JUST_SWEPT), server)
    assert asked == [("0", "0"), ("1", "200"), ("2", "400"), ("0", "0")]
    assert len(runs(pages[:3])) == len(rows)
    assert all(not page.marks for page in pages), "a day is no sweep"


def test_a_sweep_that_was_read_to_its_end_is_noted() -> None:
    [page] = read(VENDOR, ALL, LATER, lambda _: listing(row()))
    assert page.marks == {"swept:": str(NOW)}
    full = [row4(f"job-{number}") for number in range(PAGE_SIZE)]
    answers = iter([array(*full), array(row4()), array(*full)])
    options = Options(projects=("ssb",))
    pages = read(VENDOR, options, LATER, lambda _: next(answers))
    assert [page.marks for page in pages] == [{}, {}, {"swept:ssb": str(NOW)}]


def test_a_list_of_kylin_4_ends_with_a_page_that_is_not_full() -> None:
    full = [row4(f"job-{number}") for number in range(PAGE_SIZE)]
    [request] = parse(question(), array(None, *full[1:])).follow
    assert asked_page(request) == ("1", "200")
    [front] = parse(request, array(row4("last"))).follow
    assert asked_page(front) == ("0", "0")
    assert not parse(front, array(*full)).follow


def test_an_empty_page_ends_the_list_whatever_the_total_says() -> None:
    [request] = parse(question(), listing(row(), total=10_000)).follow
    [front] = parse(request, listing(total=10_000)).follow
    assert asked_page(front) == ("0", "0")


def test_a_list_without_end_is_left_with_a_note() -> None:
    request = question()
    request = msgspec.structs.replace(
        request, context=msgspec.structs.replace(request.context, page=999)
    )
    page = parse(request, listing(row(), total=10**9))
    assert [asked_page(follow) for follow in page.follow] == [("0", "0")]
    assert page.notes == ["jobs behind the 1000th page were not read"]


def finished(job_id: str, /, **fields: object) -> dict[str, Any]:
    return row(job_id, job_status="FINISHED", exec_end_time=NOW - DAY, **fields)


@pytest.mark.parametrize(
    ("rows", "further"),
    [
        ([finished("a"), row("b")], False),
        ([row("b"), finished("a")], False),
        ([row("new"), finished("a")], False),
        ([row("b", job_status="ERROR"), finished("a")], False),
        ([finished("a"), row("new")], True),
        ([finished("a"), row("b", job_status="ERROR")], True),
        ([row("b")], True),
        ([row("new")], True),
    ],
)
def test_a_poll_reads_on_until_finished_jobs_come_that_were_known(
    rows: list[dict[str, Any]], further: bool
) -> None:
    memory = replace(LATER, marks=JUST_SWEPT, index=index_of(listing(finished("a"), row("b"))))
    page = parse(question(memory), listing(*rows, total=10_000), memory)
    assert bool(page.follow) is further


@pytest.mark.parametrize("whole", [False, True])
def test_after_a_failure_or_a_start_the_list_is_read_whole(whole: bool) -> None:
    index = index_of(listing(finished("a")))
    memory = replace(LATER, whole=whole, marks=JUST_SWEPT, index=index)
    page = parse(question(memory), listing(finished("a"), total=10_000), memory)
    assert bool(page.follow) is not whole


def test_an_unchanged_row_is_only_shown() -> None:
    memory = replace(LATER, index=index_of(listing(row(step_ratio=0.1), finished("a"))))
    volatile = {"step_ratio": 0.9, "duration": 5, "wait_time": 7, "last_modified": NOW}
    page = parse(question(memory), listing(row(**volatile), finished("a")), memory)
    assert not page.runs
    assert page.shown == [memory.get("job-1", "job-1"), memory.get("a", "a")]


@pytest.mark.parametrize(
    "change",
    [
        {"job_status": "STOPPED"},
        {"scheduler_state": "PENDING"},
        {"create_time": NOW - 8},
        {"exec_start_time": NOW - 7},
        {"exec_end_time": NOW - 6},
    ],
)
def test_what_matters_makes_a_row_changed(change: dict[str, Any]) -> None:
    memory = replace(LATER, index=index_of(listing(row())))
    page = parse(question(memory), listing(row(**change)), memory)
    assert [seen.run_id for seen in page.runs] == ["job-1"]
    assert not page.shown


def test_a_vanished_run_that_is_back_is_seen() -> None:
    index = index_of(listing(row()))
    index.put(msgspec.structs.replace(index.runs["job-1"], vanished=True), NOW)
    page = parse(question(), listing(row()), replace(LATER, index=index))
    assert [seen.run_id for seen in page.runs] == ["job-1"]


def test_jobs_that_ended_long_ago_are_seen_so_that_a_restart_is_their_next_attempt() -> None:
    memory = replace(LATER, marks=JUST_SWEPT, since_ms=NOW - HOUR, index=index_of(listing(row())))
    page = parse(question(memory), listing(finished("old"), finished("job-1")), memory)
    assert [seen.run_id for seen in page.runs] == ["old", "job-1"]


def test_a_project_that_kylin_4_does_not_know_is_an_error_instead_of_all_projects() -> None:
    request = question(options=Options(projects=("nope",)))
    with pytest.raises(Invalid, match="there is no project 'nope'"):
        parse(request, array(row4()))


def test_a_project_is_known_in_any_case_and_where_rows_do_not_name_theirs() -> None:
    request = question(options=Options(projects=("SSB",)))
    rows = [row4(), row4("job-2", projectName=None)]
    assert len(parse(request, array(*rows)).runs) == 2


# Times, progress, identity


@pytest.mark.parametrize(
    ("raw", "ms"),
    [
        (1577764730069, 1577764730069),
        (1577764730069.9, 1577764730069),
        ("1577764730069", 1577764730069),
        ("2019-12-31T03:58:50.069Z", 1577764730069),
        (0, None),
        ("0", None),
        (-1, None),
        (None, None),
        ("", None),
        ("soon", None),
        (9223372036854775807, None),
    ],
    ids=repr,
)
def test_a_time_is_read_in_every_format(raw: object, ms: int | None) -> None:
    times = {"create_time": raw, "exec_start_time": raw, "exec_end_time": raw}
    seen = one(listing(row(job_status="FINISHED", **times)))
    assert (seen.queued_ms, seen.started_ms, seen.ended_ms) == (ms, ms, ms)
    assert seen.marker == (None if ms is None else str(ms))
    assert one(array(row4(job_status="FINISHED", **times))).started_ms == ms


@pytest.mark.parametrize("word", ["PENDING", "RUNNING", "STOPPED", "STOPPING", "HIBERNATING"])
def test_an_end_that_is_set_before_the_end_is_none(word: str) -> None:
    seen = one(listing(row(job_status=word, exec_start_time=NOW - 7, exec_end_time=NOW - 5)))
    assert (seen.started_ms, seen.ended_ms) == (NOW - 7, None)


def test_a_job_discarded_before_it_ran_has_no_start() -> None:
    times = {"exec_start_time": NOW - 5, "exec_end_time": NOW - 5}
    discarded = one(listing(row(job_status="DISCARDED", **times)))
    assert (discarded.started_ms, discarded.ended_ms) == (None, NOW - 5)
    assert one(listing(row(job_status="FINISHED", **times))).started_ms == NOW - 5
    later = one(listing(row(job_status="DISCARDED", **times | {"exec_end_time": NOW - 4})))
    assert later.started_ms == NOW - 5


@pytest.mark.parametrize(
    ("raw", "progress"),
    [(0, 0.0), (0.25, 0.25), (1, 1.0), ("NaN", None), (None, None), (-0.1, None), (1.1, None)],
)
def test_progress_is_the_step_ratio_and_never_out_of_bounds(
    raw: object, progress: float | None
) -> None:
    assert one(listing(row(step_ratio=raw, progress=0.0))).progress == progress
    percent = raw * 100 if isinstance(raw, int | float) else raw
    assert one(array(row4(progress=percent))).progress == progress


def test_a_bare_nan_spoils_nothing() -> None:
    body = listing(row(step_ratio="?")).body.replace(b'"?"', b"NaN")
    seen = one(answer(body))
    assert (seen.run_id, seen.progress) == ("job-1", None)


def test_a_restart_changes_the_marker_and_a_resume_does_not() -> None:
    before = one(listing(row(job_status="ERROR", exec_start_time=NOW - 7)))
    resumed = one(listing(row(exec_start_time=NOW - 7)))
    restarted = one(listing(row(create_time=NOW - 1, exec_start_time=0)))
    assert before.marker == resumed.marker == str(NOW - 9)
    assert restarted.marker == str(NOW - 1)
    assert one(array(row4())).marker is None


def test_a_tag_that_is_no_text_is_left_out() -> None:
    seen = one(listing(row(tag={"a": [1]}, target_subject="")))
    assert seen.detail == {}


# Bad rows


@pytest.mark.parametrize(
    ("bad", "at"),
    [
        ({"job_status": "RUNNING"}, ""),
        ({"id": "", "job_status": "RUNNING"}, ".id"),
        ({"id": 5, "job_status": "RUNNING"}, ".id"),
        ({"id": "x" * 1025, "job_status": "RUNNING"}, ".id"),
        ({"id": "x", "job_status": None}, ".job_status"),
        ({"id": "x", "job_status": "RUNNING", "job_name": "x" * 1025}, ".job_name"),
        ({"id": "x", "job_status": "RUNNING", "create_time": [1]}, ".create_time"),
        (None, ""),
        ("text", ""),
    ],
)
def test_a_bad_row_is_set_aside_and_the_others_are_read(bad: object, at: str) -> None:
    page = parse(question(), listing(row("a"), bad, row("b")))
    assert [seen.run_id for seen in page.runs] == ["a", "b"]
    assert [place.at for place in page.bad] == [f"$.data.value[1]{at}"]


def test_a_bad_row_of_kylin_4_is_set_aside_and_the_others_are_read() -> None:
    page = parse(question(), array(row4("a"), None, row4("b"), row4("")))
    assert [seen.run_id for seen in page.runs] == ["a", "b"]
    assert [place.at for place in page.bad] == ["$[1]", "$[3].uuid"]


# Why a job failed


FAILED_STEPS = [
    {"name": "Detect Resource", "step_status": "FINISHED", "info": None, "failed_msg": None},
    {
        "name": "Load Data To Index",
        "step_status": "ERROR",
        "info": {
            "yarn_application_id": "application_1_2",
            "yarn_application_tracking_url": "http://rm:8088/proxy/application_1_2",
            "node_info": "10.1.2.3:7070",
            "secret": "s",
        },
        "failed_step_name": "Build indexes by layer",
        "failed_code": "KE-030001004(Job out of memory error):",
        "failed_reason": "Building job exception: out of memory\n\tat org.apache.kylin.Job",
        "failed_msg": "container killed\nCaused by: java.lang.Error",
        "failed_stack": "java.lang.Error\n\tat org.apache.kylin.Job",
    },
]


def detail_of(seen: Seen) -> Request:
    request = VENDOR.ask(ALL, None, seen)
    assert request is not None
    return request


def test_a_failed_job_is_asked_for_its_steps() -> None:
    seen = one(listing(row("a/b", job_status="ERROR", project="x y")))
    request = detail_of(seen)
    assert request.target == "/api/jobs/a%2Fb/detail?project=x%20y"
    assert request.by_id


@pytest.mark.parametrize(
    "response",
    [
        listing(row()),
        listing(row(job_status="DISCARDED")),
        listing(row(job_status="ERROR", project=None)),
        array(row4(job_status="ERROR")),
    ],
)
def test_nothing_is_asked_where_there_is_nothing_to_learn(response: Response) -> None:
    assert VENDOR.ask(ALL, None, one(response)) is None


def test_the_failing_step_tells_why_without_stack_traces() -> None:
    seen = one(listing(row(job_status="ERROR", tag="t")))
    response = answer(json.dumps({"code": "000", "data": FAILED_STEPS, "msg": ""}))
    [told] = parse(detail_of(seen), response).runs
    wrapped = answer(json.dumps({"code": "000", "data": {"steps": FAILED_STEPS}, "msg": ""}))
    assert parse(detail_of(seen), wrapped).runs == [told]
    assert told.problem == Problem(
        "KE-030001004", "Building job exception: out of memory; container killed"
    )
    assert told.detail == {
        "tag": "t",
        "step": "Build indexes by layer",
        "node": "10.1.2.3:7070",
        "yarn_application": "application_1_2",
        "yarn_url": "http://rm:8088/proxy/application_1_2",
    }
    assert msgspec.structs.replace(told, problem=None, detail=seen.detail) == seen


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"name": "Load"}, Problem(None, "step Load failed")),
        ({"name": "Load", "failed_msg": "m", "failed_reason": "m"}, Problem(None, "m")),
        ({"failed_code": "oops", "failed_reason": " r \n"}, Problem("oops", "r")),
    ],
)
def test_a_step_that_tells_little_is_enough(step: dict[str, Any], problem: Problem) -> None:
    seen = one(listing(row(job_status="ERROR")))
    body = {"code": "000", "data": [{"step_status": "ERROR"} | step]}
    [told] = parse(detail_of(seen), answer(json.dumps(body))).runs
    assert told.problem == problem


def test_steps_of_which_none_failed_leave_the_run_as_it_was() -> None:
    seen = one(listing(row(job_status="ERROR")))
    body = {"code": "000", "data": [{"step_status": "STOPPED"}, {"step_status": None}]}
    assert parse(detail_of(seen), answer(json.dumps(body))).runs == [seen]


def test_steps_that_kylin_cannot_give_are_a_failed_question() -> None:
    seen = one(listing(row(job_status="ERROR")))
    with pytest.raises(Invalid, match="an envelope without data"):
        parse(detail_of(seen), answer('{"code": "000", "data": null, "msg": ""}'))
    with pytest.raises(Invalid, match="KE-010032219"):
        parse(detail_of(seen), fault(500, 'KE-010032219: Can\'t find job "x".', "KE-010032219"))


def test_the_list_of_kylin_4_tells_which_step_failed() -> None:
    steps = [
        {"name": "Sample", "step_status": "FINISHED"},
        {"name": "Cube", "step_status": "ERROR"},
    ]
    seen = one(array(row4(job_status="ERROR", steps=steps)))
    assert seen.problem == Problem(None, "step Cube failed")
    assert seen.detail == {"step": "Cube"}
    assert one(array(row4(job_status="FINISHED", steps=steps))).problem is None


# Jobs that the list does not show


def settle(run: Known) -> Request:
    request = VENDOR.settle(ALL, run)
    assert request is not None
    assert request.by_id
    return request


def test_a_job_of_kylin_5_is_searched_for() -> None:
    request = settle(known("a b"))
    assert request.target == "/api/jobs?time_filter=4&key=a%20b&page_offset=0&page_size=200"
    page = parse(request, listing(row("xa b"), row("a b", job_status="FINISHED"), total=500))
    assert [(seen.run_id, seen.state) for seen in page.runs] == [("a b", State.SUCCEEDED)]
    assert not page.gone
    assert not page.follow


def test_a_job_that_the_search_does_not_find_is_gone() -> None:
    page = parse(settle(known()), listing(row("job-11")))
    assert (page.runs, page.gone) == ([], [("job-1", "job-1")])


@pytest.mark.parametrize(
    "response", [listing(row("job-11"), total=201), listing({"id": "job-1", "job_status": 1})]
)
def test_a_search_that_does_not_show_everything_cannot_tell(response: Response) -> None:
    page = parse(settle(known()), response)
    assert (page.runs, page.gone) == ([], [])


def test_a_job_of_kylin_4_is_asked_for_by_its_id() -> None:
    request = settle(known("a/b", scope="4"))
    assert request.target == "/api/jobs/a%2Fb"
    [seen] = parse(request, answer(json.dumps(row4("a/b", job_status="STOPPED")))).runs
    assert (seen.run_id, seen.state) == ("a/b", State.SUSPENDED)


@pytest.mark.parametrize("body", ["", " \n"])
def test_an_empty_answer_of_kylin_4_says_that_there_is_no_such_job(body: str) -> None:
    page = parse(settle(known(scope="4")), answer(body))
    assert (page.runs, page.gone) == ([], [("job-1", "job-1")])


@pytest.mark.parametrize(
    "response",
    [
        fault(500, "org.apache.kylin.rest.exception.InternalErrorException"),
        answer("", 406),
        answer(json.dumps(row4("another"))),
    ],
)
def test_kylin_4_cannot_tell_when_something_went_wrong(response: Response) -> None:
    page = parse(settle(known(scope="4")), response)
    assert not page.runs
    assert not page.gone


@pytest.mark.parametrize("scope", ["4", "5"])
def test_refused_credentials_say_nothing_of_a_job(scope: str) -> None:
    with pytest.raises(Rejected):
        parse(settle(known(scope=scope)), answer("<html>", 401))


# Errors


@pytest.mark.parametrize(
    ("response", "error", "message"),
    [
        (fault(401, "Can't authenticate.", "KE-010003207"), Rejected, "KE-010003207"),
        (fault(401, "KE-010003208: Invalid username or password."), Rejected, "KE-010003208"),
        (fault(400, "KE-010003005(User Locked):For security concern"), Rejected, "KE-010003005"),
        (fault(400, "KE-010024001(No access):", "KE-010024001"), Rejected, "KE-010024001"),
        (fault(200, "KE-010024002(Permission Denied):"), Rejected, "KE-010024002"),
        (fault(400, "account ADMIN has been locked. Please try again"), Rejected, "locked"),
        (fault(500, "AccessDeniedException: Access is denied"), Rejected, "Access is denied"),
        (answer("<html>Unauthorized</html>", 401), Rejected, "401"),
        (answer("<html>Forbidden</html>", 403), Rejected, "403"),
        (fault(403, "ForbiddenException: not yours"), Rejected, "HTTP 403: .*not yours"),
        (fault(500, "KE-010001201: no project", "KE-010001201"), Invalid, "KE-010001201"),
        (fault(500, "KE-010032212: bad status", "KE-010032212"), Invalid, "HTTP 500: KE-"),
        (fault(500, "KE-010043201: empty argument", "KE-010043201"), Invalid, "KE-010043201"),
        (fault(400, "KE-010000003(Invalid Parameter):x"), Invalid, "Invalid Parameter"),
        (fault(400, "KE-010022216: segment is LOCKED"), Invalid, "LOCKED"),
        (fault(200, "KE-010001201: no project"), Invalid, "HTTP 200: KE-010001201"),
        (fault(200, "whatever"), Invalid, "HTTP 200: whatever"),
        (fault(500, "KE-000000001(Unexpected) NullPointerException"), Unreachable, "NullPointer"),
        (fault(500, "KE-010019002(Failed to connect catalog):"), Unreachable, "catalog"),
        (fault(500, "KE-010021006(User data source connection exc"), Unreachable, "data source"),
        (fault(500, "hbase is away"), Unreachable, "HTTP 500: hbase is away"),
        (fault(500, "user " * 1_000_000), Unreachable, "HTTP 500: user"),
        (fault(400, "KE-010003005(User Locked):" + "x" * 1_000_000), Rejected, "KE-010003005"),
        (answer("<html>oops</html>", 500), Unreachable, "500"),
        (answer("", 502), Unreachable, "502"),
        (answer("", 503), Unreachable, "503"),
        (answer("", 503, retry_after="7"), Limited, "503"),
        (fault(429, "Too many requests"), Limited, "429"),
        (answer("", 406), Invalid, "406"),
        (answer('{"status": 404}', 404), Invalid, "404"),
        (answer("<html>login</html>"), Invalid, "HTML"),
        (answer(""), Invalid, "empty"),
        (answer('{"code": "000", "data": {"value": ['), Invalid, "JSON"),
        (answer('{"code": "000", "data": null}'), Invalid, "without data"),
        (answer('{"code": "000", "data": {"value": []}}'), Invalid, "total_size"),
        (answer('{"code": "000", "data": {"jobs": [], "size": 0}}'), Invalid, "value"),
        (answer("{}"), Invalid, "code"),
    ],
)
def test_an_error_is_named_by_what_to_do_about_it(
    response: Response, error: type[VendorError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        parse(question(), response)
    assert type(raised.value) is error
    assert "org.apache.kylin.Secret" not in str(raised.value)


@pytest.mark.parametrize("word", ["code", "msg"])
def test_the_length_of_a_message_is_bounded(word: str) -> None:
    with pytest.raises(Invalid) as raised:
        parse(question(), answer(json.dumps({"code": "1", "msg": ""} | {word: "x" * 9999})))
    assert len(str(raised.value)) < 400


# Hostile bytes

QUESTIONS = [
    question(),
    question(replace(LATER, marks=JUST_SWEPT)),
    question(options=Options(projects=("ssb",))),
    settle(known()),
    settle(known(scope="4")),
    detail_of(one(listing(row(job_status="ERROR")))),
]
STATUSES = st.sampled_from([200, 200, 200, 204, 400, 401, 404, 406, 429, 500, 503])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "code",
                        "data",
                        "msg",
                        "value",
                        "total_size",
                        "id",
                        "uuid",
                        "job_status",
                        "steps",
                    ),
                    *("tag", "step_ratio", "progress", "create_time", "exec_end_time", "info", "x"),
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("request_", QUESTIONS, ids=lambda request: request.target)
@given(status=STATUSES, body=st.binary(max_size=64))
def test_random_bytes_are_at_worst_a_vendor_error(
    request_: Request, status: int, body: bytes
) -> None:
    expect_page_or_vendor_error(request_, answer(body.decode("latin-1"), status))
    expect_page_or_vendor_error(request_, Response(status=status, body=body))


@pytest.mark.parametrize("request_", QUESTIONS, ids=lambda request: request.target)
@given(status=STATUSES, value=JSON)
def test_random_json_is_at_worst_a_vendor_error(
    request_: Request, status: int, value: object
) -> None:
    for shape in (value, [value], {"code": "000", "data": value}, {"code": "999", "msg": value}):
        expect_page_or_vendor_error(request_, answer(json.dumps(shape), status))
    rows = {"code": "000", "data": {"value": [value, row(tag=value)], "total_size": 2}}
    expect_page_or_vendor_error(request_, answer(json.dumps(rows), status))


def expect_page_or_vendor_error(request: Request, response: Response) -> None:
    try:
        page = parse(request, response)
    except VendorError:
        return
    assert all(seen.run_id and isinstance(seen.state, State) for seen in page.runs)


# The simulator


def world_of(seed: int = 3) -> World:
    return World(kinds=VENDOR.kinds, seed=seed, jobs=6, now_ms=NOW)


def as_kylin_4(world: World) -> Answer:
    """A server that knows nothing of the parameters of Kylin 5."""
    new = {"time_filter", "page_offset", "page_size", "sort_by", "reverse", "project", "key"}

    def server(request: Request) -> Response:
        query = tuple(pair for pair in request.query if pair[0] not in new)
        return VENDOR.render(world, msgspec.structs.replace(request, query=query))

    return server


def poll(
    world: World, server: Answer, index: Index, marks: dict[str, str], first: bool
) -> list[Page]:
    memory = Memory(
        now_ms=world.now_ms,
        contact_ms=NOW,
        last_good_ms=None if first else world.now_ms - 500,
        whole=not first,
        marks=marks,
        index=index,
    )
    pages = read(VENDOR, ALL, memory, server)
    for page in pages:
        marks.update(page.marks)
        for seen in page.runs:
            remember(index, seen, at_ms=world.now_ms)
    return pages


def expect_known_as_it_is(run: Known, attempt: Attempt, *, old: bool) -> None:
    assert run.state is attempt.state
    assert run.started_ms == attempt.started_ms
    assert run.ended_ms == attempt.ended_ms
    assert run.queued_ms == (None if old else attempt.queued_ms)
    assert run.marker == (None if old else str(attempt.queued_ms))


@pytest.mark.parametrize("old", [False, True], ids=["kylin5", "kylin4"])
def test_what_is_read_is_what_the_world_holds(old: bool) -> None:
    world, index, marks = world_of(), Index(), dict[str, str]()
    server = as_kylin_4(world) if old else serve(VENDOR, world)
    states, reopened, shown = set(), 0, 0
    for step in range(400):
        world.advance(NOW + step * 500)
        pages = poll(world, server, index, marks, first=step == 0)
        shown += sum(len(page.shown) for page in pages)
        for run in world.runs.values():
            expect_known_as_it_is(index.runs[run.uuid], run.now, old=old)
            states.add(run.now.state)
            reopened += len(run.attempts) > 1
        assert not any(page.bad for page in pages)
        assert set(index.runs) == {run.uuid for run in world.runs.values()}
    assert states == VENDOR.kinds[0].states
    assert reopened
    assert shown


def test_a_failed_job_of_the_world_tells_why() -> None:
    world = world_of()
    told = 0
    for step in range(200):
        world.advance(NOW + step * 500)
        for seen in runs(read(VENDOR, ALL, LATER, serve(VENDOR, world))):
            request = VENDOR.ask(ALL, None, seen)
            if request is not None:
                [full] = parse(request, VENDOR.render(world, request)).runs
                [run] = [run for run in world.runs.values() if run.uuid == seen.run_id]
                assert full.problem is not None
                assert full.problem.code == "KE-030001000"
                assert run.now.problem is not None
                assert run.now.problem in full.problem.message
                told += 1
    assert told


@pytest.mark.parametrize("old", [False, True], ids=["kylin5", "kylin4"])
def test_a_job_of_the_world_is_found_by_its_id_and_a_deleted_one_is_gone(old: bool) -> None:
    world = world_of()
    world.advance(NOW + 60_000)
    run = next(iter(world.runs.values()))
    request = settle(known(run.uuid, scope="4" if old else "5"))
    [seen] = parse(request, VENDOR.render(world, request)).runs
    assert (seen.run_id, seen.state) == (run.uuid, run.now.state)
    world.delete(run)
    assert parse(request, VENDOR.render(world, request)).gone == [(run.uuid, run.uuid)]


@pytest.mark.parametrize("old", [False, True], ids=["kylin5", "kylin4"])
def test_more_jobs_than_fit_a_page_are_read_page_by_page(old: bool) -> None:
    world = World(kinds=VENDOR.kinds, jobs=1, now_ms=NOW)
    for _ in range(2 * PAGE_SIZE + 30):
        world.start(world.definitions[0])
    pages = read(VENDOR, ALL, LATER, as_kylin_4(world) if old else serve(VENDOR, world))
    assert [len(page.runs) for page in pages] == [PAGE_SIZE, PAGE_SIZE, 30, PAGE_SIZE]
    assert {seen.run_id for seen in runs(pages)} == {run.uuid for run in world.runs.values()}


def test_the_simulated_list_is_filtered_by_project_and_time_and_sorted_by_change() -> None:
    world = world_of()
    world.advance(NOW + 30_000)
    group = world.definitions[0].group
    expected = [run for run in world.runs.values() if run.definition.group == group]
    expected.sort(key=lambda run: -run.now.changed_ms)
    assert 0 < len(expected) < len(world.runs)
    options = Options(projects=(group,))
    for server in (serve(VENDOR, world), as_kylin_4(world)):
        seen = runs(read(VENDOR, options, LATER, server))
        assert [one.run_id for one in seen] == [run.uuid for run in expected]
    world.now_ms += 40 * DAY
    assert runs(read(VENDOR, ALL, LATER, serve(VENDOR, world))) == []


@pytest.mark.parametrize(
    ("path", "query", "status", "text"),
    [
        ("/api/jobs", {}, 400, b"KE-010000003"),
        ("/api/jobs", {"time_filter": "x"}, 400, b"KE-010000003"),
        ("/api/jobs", {"time_filter": "0", "project": "no"}, 500, b"KE-010001201"),
        ("/api/jobs/no/detail", {"project": "no"}, 500, b"KE-010001201"),
        ("/api/jobs/no/detail", {}, 500, b"KE-010001201"),
        ("/api/jobs/no", {}, 200, b""),
        ("/api/jobs/no/steps", {}, 404, b"Not Found"),
        ("/api/projects", {}, 404, b"Not Found"),
    ],
)
def test_the_simulator_refuses_as_the_server_does(
    path: str, query: dict[str, str], status: int, text: bytes
) -> None:
    response = VENDOR.render(world_of(), Request(path=path, query=tuple(query.items())))
    assert response.status == status
    assert text in response.body


def test_the_simulator_knows_no_steps_of_a_job_that_is_not_there() -> None:
    world = world_of()
    query = (("project", world.definitions[0].group),)
    response = VENDOR.render(world, Request(path="/api/jobs/no/detail", query=query))
    assert (response.status, b"KE-010032219" in response.body) == (500, True)


def test_the_simulated_kylin_4_takes_an_unknown_project_for_all() -> None:
    world = world_of()
    world.advance(NOW + 60_000)
    with pytest.raises(Invalid, match="there is no project"):
        read(VENDOR, Options(projects=("no",)), LATER, as_kylin_4(world))


def test_the_simulated_page_is_ten_jobs_long_unless_asked_otherwise() -> None:
    world = World(kinds=VENDOR.kinds, jobs=1, now_ms=NOW)
    for _ in range(40):
        world.start(world.definitions[0])
    for name, length in (("time_filter", 10), ("timeFilter", 30)):
        response = VENDOR.render(world, Request(path="/api/jobs", query=((name, "2"),)))
        assert len(parse(question(), response).runs) == length


def test_every_state_of_the_simulator_is_terminal_or_active() -> None:
    [kind] = VENDOR.kinds
    assert kind.reopens
    assert kind.states > TERMINAL
