"""DataArts Factory: every word, timestamp and trap of its API, and a world read back through it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.known import Index, Known, Memory
from poller.runs import TERMINAL, Job, Ms, Problem, Seen, State
from poller.vendors.dataarts import VENDOR
from poller.wire import Page, Request, Response
from poller.world import SimRun, World
from tests.support import answer, fixture, read, remember, runs, serve

OPTIONS = VENDOR.options.model_validate({"project_id": "p1"})
NOW_MS = 1_700_000_000_000
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
GOOD_MS = NOW_MS - 15_000
T1, T2, T3, T4 = (NOW_MS - seconds * 1000 for seconds in (400, 300, 200, 100))


def memory(
    marks: dict[str, str] | None = None,
    index: Index | None = None,
    *,
    contact: bool = False,
    since_ms: Ms = 0,
    now_ms: Ms = NOW_MS,
) -> Memory:
    return Memory(
        now_ms=now_ms,
        contact_ms=1,
        last_good_ms=None if contact else now_ms - 15_000,
        since_ms=since_ms,
        marks={"swept": str(now_ms - 15_000)} | (marks or {}),
        index=index or Index(),
    )


def only(kind: str, **changes: Any) -> Any:
    return VENDOR.options(**{"project_id": "p1", "kinds": [kind], **changes})


STREAMS, BATCH = only("real_time"), only("batch")


def first(options: Any, of: Memory | None = None) -> Request:
    (request,) = VENDOR.start(options, of or memory())
    return request


def jobs_question(instances: Response | None = None, of: Memory | None = None) -> Request:
    """The question for the list of batch jobs, which follows the sweep."""
    (request,) = sweep(instances or instance_list(), of).follow
    return request


def job_question(last: str = "success", name: str = "load") -> Request:
    page = parse(jobs_question(), job_list({"name": name, "lastInstanceStatus": last}))
    (request,) = page.follow
    return request


def about(run: Known | Seen) -> Request:
    if isinstance(run, Seen):
        request = VENDOR.ask(OPTIONS, None, run)
    else:
        request = VENDOR.settle(OPTIONS, run)
    assert request is not None
    return request


def parse(request: Request, response: Response, of: Memory | None = None, **options: Any) -> Page:
    return VENDOR.parse(only("batch", **options), request, response, of or memory())


def sweep(response: Response, of: Memory | None = None) -> Page:
    return parse(first(BATCH, of), response, of)


def list_streams(*rows: dict[str, Any], of: Memory | None = None, **options: Any) -> Page:
    return parse(first(STREAMS), job_list(*rows), of, **options)


def list_instances(*rows: dict[str, Any], of: Memory | None = None) -> Page:
    return sweep(instance_list(*rows), of)


def job_list(*rows: dict[str, Any], total: int | None = None) -> Response:
    jobs = [{"status": "SCHEDULING", **row} for row in rows]
    return answer(json.dumps({"total": len(rows) if total is None else total, "jobs": jobs}))


def instance_list(*rows: dict[str, Any], total: int | None = None) -> Response:
    total = len(rows) if total is None else total
    return answer(json.dumps({"total": total, "instances": rows}))


def stream_row(**changes: Any) -> dict[str, Any]:
    return {"name": "clicks", "status": "NORMAL", "startTime": T1} | changes


def instance_row(**changes: Any) -> dict[str, Any]:
    row = {"jobName": "load", "instanceId": 7, "status": "running", "planTime": T1}
    return row | {"submitTime": T2, "startTime": T3} | changes


def stream(**changes: Any) -> Seen:
    (seen,) = list_streams(stream_row(**changes)).runs
    return seen


def instance(**changes: Any) -> Seen:
    (seen,) = list_instances(instance_row(**changes)).runs
    return seen


def known_of(seen: Seen, at_ms: Ms = 1) -> Known:
    return remember(Index(), seen, at_ms=at_ms)


def query(request: Request) -> dict[str, str]:
    return dict(request.query)


def windows(request: Request) -> list[tuple[int, int]]:
    """Every window of a sweep, as it is asked for when each answer is empty."""
    asked = []
    follow = [request]
    while follow and "minPlanTime" in query(follow[0]):
        asked.append((int(query(follow[0])["minPlanTime"]), int(query(follow[0])["maxPlanTime"])))
        follow = list(parse(follow[0], instance_list()).follow)
    return asked


# Settings


def test_both_kinds_are_followed_and_a_stopped_stream_is_canceled_by_default() -> None:
    options: Any = OPTIONS
    assert (options.kinds, options.stopped) == (("real_time", "batch"), "canceled")
    assert [query(request).get("jobType") for request in VENDOR.start(OPTIONS, memory())] == [
        "REAL_TIME",
        None,
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"project_id": ""},
        {"kinds": []},
        {"kinds": ["stream"]},
        {"workspace": ""},
        {"stopped": "failed"},
        {"jobs": ["a"]},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        VENDOR.options(**{"project_id": "p1", **wrong})


def test_every_question_names_the_workspace() -> None:
    options = only("batch", workspace="w1")
    seen = instance(status="fail")
    questions = [
        *VENDOR.start(only("real_time", workspace="w1"), memory()),
        *VENDOR.parse(options, first(options), instance_list(), memory()).follow,
        VENDOR.ask(options, None, seen),
        VENDOR.settle(options, known_of(seen)),
        VENDOR.settle(options, known_of(stream())),
    ]
    for request in questions:
        assert request is not None
        assert ("workspace", "w1") in request.headers
    assert "workspace" not in dict(first(BATCH).headers)


def test_names_and_ids_are_percent_encoded_in_paths() -> None:
    known = Known(job=Job(id="a/b 作业"), run_id="a/b 作业", state=State.RUNNING, scope="real_time")
    assert about(known).path == "/v1/p1/jobs/a%2Fb%20%E4%BD%9C%E4%B8%9A/status"
    known = Known(job=Job(id="a/b?"), run_id="7/8", state=State.RUNNING, scope="batch")
    assert about(known).path == "/v1/p1/jobs/a%2Fb%3F/instances/7%2F8"
    assert first(only("batch", project_id="p/1")).path == "/v1/p%2F1/jobs/instances/detail"


# Words


@pytest.mark.parametrize(
    ("word", "state", "substate"),
    [
        ("STARTING", State.STARTING, None),
        ("INIT", State.STARTING, None),
        ("NORMAL", State.RUNNING, None),
        ("OVERLOAD", State.RUNNING, "overload"),
        ("EXCEPTION", State.FAILED, None),
        ("ABNORMAL", State.FAILED, None),
        ("PAUSE", State.SUSPENDED, None),
        ("DISABLE", State.SUSPENDED, None),
        ("STOPPING", State.STOPPING, None),
        ("STOPPED", State.CANCELED, None),
        (" normal\n", State.RUNNING, None),
        ("Exception", State.FAILED, None),
    ],
)
def test_each_word_of_a_real_time_job_has_its_state(
    word: str, state: State, substate: str | None
) -> None:
    seen = stream(status=word)
    assert (seen.state, seen.substate, seen.vendor_state) == (state, substate, word)
    assert not seen.unmapped


@pytest.mark.parametrize(
    ("word", "state", "substate"),
    [
        ("waiting", State.QUEUED, None),
        ("waiting-confirm", State.QUEUED, None),
        ("running", State.RUNNING, None),
        ("running-exception", State.RUNNING, "exception"),
        ("pause", State.SUSPENDED, None),
        ("freeze", State.SUSPENDED, None),
        ("success", State.SUCCEEDED, None),
        ("forceSuccess", State.SUCCEEDED, "forced"),
        ("ignoreSuccess", State.SUCCEEDED, "failure_ignored"),
        ("skip-by-depend", State.CANCELED, "skipped"),
        ("fail", State.FAILED, None),
        ("manual-stop", State.CANCELED, None),
        (" FAIL ", State.FAILED, None),
        ("Running", State.RUNNING, None),
    ],
)
def test_each_word_of_a_batch_instance_has_its_state(
    word: str, state: State, substate: str | None
) -> None:
    seen = instance(status=word)
    assert (seen.state, seen.substate, seen.vendor_state) == (state, substate, word)
    assert not seen.unmapped


@pytest.mark.parametrize("shown", [stream(status="DANCING"), instance(status="DANCING")])
def test_a_word_that_is_not_in_the_table_is_unknown_and_kept(shown: Seen) -> None:
    assert (shown.state, shown.vendor_state, shown.unmapped) == (State.UNKNOWN, "DANCING", True)


def test_a_source_may_count_its_stopped_streams_as_succeeded() -> None:
    (seen,) = list_streams(stream_row(status="STOPPED"), stopped="succeeded").runs
    assert (seen.state, seen.substate) == (State.SUCCEEDED, None)
    response = instance_list(instance_row(status="manual-stop"))
    (seen,) = parse(first(BATCH), response, stopped="succeeded").runs
    assert seen.state is State.CANCELED


@pytest.mark.parametrize(
    ("flags", "status", "substate"),
    [
        ({"forceSuccess": True, "ignoreSuccess": False}, "success", "forced"),
        ({"forceSuccess": False, "ignoreSuccess": True}, "success", "failure_ignored"),
        ({"forceSuccess": False, "ignoreSuccess": False}, "success", None),
        ({"forceSuccess": True}, "running", None),
        ({"ignoreSuccess": True}, "fail", None),
    ],
)
def test_the_flags_of_an_instance_qualify_its_success_alone(
    flags: dict[str, bool], status: str, substate: str | None
) -> None:
    assert instance(status=status, **flags).substate == substate


# Recorded answers


def test_the_documented_list_of_instances_is_read_whole() -> None:
    page = sweep(answer(fixture("dataarts/otc_instance_list_1.json")))
    assert page.bad == []
    one, two = page.runs
    assert one == Seen(
        job=Job(id="job_batch", name="job_batch"),
        run_id="34765",
        state=State.SUCCEEDED,
        vendor_state="success",
        queued_ms=1550910278706,
        started_ms=1551671580000,
        ended_ms=1551671598000,
        detail={"instance_type": 2, "plan_time": "2019-03-04T03:53:00.000Z"},
        scope="batch",
        fingerprint=one.fingerprint,
    )
    assert (two.run_id, two.started_ms, two.detail["instance_type"]) == ("34764", 1551671521000, 5)


def test_the_documented_page_of_an_instance_settles_it() -> None:
    known = known_of(instance(instanceId=34765, jobName="job_batch"))
    page = parse(about(known), answer(fixture("dataarts/otc_instance_details_1.json")))
    (seen,) = page.runs
    assert (seen.job.id, seen.run_id, seen.state) == ("job_batch", "34765", State.FAILED)
    assert (seen.started_ms, seen.ended_ms) == (1551425327000, 1551425387000)
    assert seen.problem is None  # all its nodes say success
    assert seen.detail == {
        "plan_time": "2019-03-01T07:28:46.540Z",
        "node.Dummy_8556": "success",
        "node.error": "success",
        "log_path": "obs://dlf-test-log/job_batch/2019-03-04 11_53_00.000/error/error.job",
    }


def test_the_documented_status_shows_the_nodes_by_their_last_instance() -> None:
    seen = stream(name="job_sms")
    page = parse(about(seen), answer(fixture("dataarts/otc_realtime_status_1.json")))
    (whole,) = page.runs
    assert whole == msgspec.structs.replace(seen, detail={"node.MRS_Flink_Job_8635": "waiting"})


def test_a_status_that_leaves_out_the_status_adds_its_nodes_to_the_row() -> None:
    response = answer(fixture("dataarts/huawei_realtime_status_2023_partial.json"))
    seen = stream(name="job_sms", status="OVERLOAD")
    (whole,) = parse(about(seen), response).runs
    assert whole == msgspec.structs.replace(seen, detail={"node.CREATE_GES_DIR": "NORMAL"})
    page = parse(about(known_of(seen)), response)
    assert (page.runs, page.gone) == ((), ())  # it cannot tell


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("otc_realtime_status_2", known_of(stream())),
        ("otc_run_immediate_3", known_of(stream())),
        ("otc_instance_details_2", known_of(instance())),
        ("otc_run_immediate_3", known_of(instance())),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 200])
def test_a_run_that_does_not_exist_is_gone_by_the_code_of_the_error(
    name: str, known: Known, status: int
) -> None:
    page = parse(about(known), answer(fixture(f"dataarts/{name}.json"), status))
    assert page.gone == [(known.job.id, known.run_id)]


@pytest.mark.parametrize("row", [stream(), instance(status="fail")])
def test_a_row_whose_job_was_deleted_before_the_question_is_told_as_it_is(row: Seen) -> None:
    page = parse(about(row), answer(fixture("dataarts/otc_run_immediate_3.json"), 400))
    assert (page.runs, page.gone) == ([row], ())


def test_the_documented_list_of_jobs_is_noted_at_first_contact() -> None:
    contact = memory(contact=True)
    request = list(windows_and_after(contact))[-1]
    assert query(request) == {"jobType": "BATCH", "offset": "0", "limit": "100"}
    page = parse(request, answer(fixture("dataarts/otc_job_list_1.json")), contact)
    assert page.marks == {"last:myJob": "success 1682519407000"}
    assert (page.runs, page.follow, page.complete) == ((), [], None)


def windows_and_after(of: Memory) -> Iterator[Request]:
    request = first(BATCH, of)
    yield request
    while "minPlanTime" in query(request):
        (request,) = parse(request, instance_list(), of).follow
        yield request


@pytest.mark.parametrize("question", [first(STREAMS), first(BATCH), jobs_question()])
@pytest.mark.parametrize(
    "name", ["otc_job_list_2", "otc_run_immediate_1", "otc_run_immediate_2", "otc_run_immediate_3"]
)
def test_other_documented_answers_are_no_listings(question: Request, name: str) -> None:
    with pytest.raises(Invalid):
        parse(question, answer(fixture(f"dataarts/{name}.json")))


# Real-time jobs: listing, identity, attempts


def test_a_real_time_job_is_its_own_run_and_its_start_time_marks_the_attempt() -> None:
    (seen,) = list_streams(stream_row(owner="etl", path="/sales", endTime=T2)).runs
    assert seen == Seen(
        job=Job(id="clicks", name="clicks", group="/sales", owner="etl"),
        run_id="clicks",
        state=State.RUNNING,
        vendor_state="NORMAL",
        marker=str(T1),
        started_ms=T1,
        scope="real_time",
        fingerprint=seen.fingerprint,
    )
    assert stream(startTime=None, starttime=str(T2)).marker == str(T2)


def test_streams_are_listed_page_by_page_and_complete_at_the_last() -> None:
    rows = [stream_row(name=f"job_{number}") for number in range(203)]
    request, pages = first(STREAMS), []
    for offset in (0, 100, 200):
        page = parse(request, job_list(*rows[offset : offset + 100], total=203))
        pages.append(page)
        if page.follow:
            (request,) = page.follow
    assert query(request) == {"jobType": "REAL_TIME", "offset": "2", "limit": "100"}
    assert [page.complete for page in pages] == [None, None, "real_time"]
    assert [seen.job.id for seen in runs(pages)] == [row["name"] for row in rows]


def test_a_server_that_repeats_itself_is_not_asked_for_ever_and_nothing_counts_as_complete() -> (
    None
):
    rows = [stream_row(name=f"job_{number}") for number in range(100)]
    page = parse(first(STREAMS), job_list(*rows, total=203))
    page = parse(page.follow[0], job_list(*rows, total=203))
    assert (page.follow, page.complete) == ([], None)


def test_a_server_that_serves_shorter_pages_than_asked_is_read_to_the_end() -> None:
    page = parse(first(STREAMS), job_list(stream_row(name="a"), total=2))
    assert page.complete is None
    page = parse(page.follow[0], job_list(stream_row(name="b"), total=2))
    assert (page.follow, page.complete) == ([], "real_time")


def test_an_empty_list_is_complete() -> None:
    assert list_streams().complete == "real_time"


def test_an_unchanged_row_is_shown_and_a_changed_one_told() -> None:
    index = Index()
    known = remember(index, stream())
    volatile = stream_row(lastUpdateTime=NOW_MS, speed=3)
    page = list_streams(volatile, of=memory(index=index))
    assert (page.runs, page.shown) == ([], [known])
    for change in ({"status": "PAUSE"}, {"startTime": T2}, {"endTime": T3}, {"starttime": T3}):
        page = list_streams(stream_row(**change), of=memory(index=index))
        assert (len(page.runs), page.shown) == (1, [])


def test_a_vanished_run_that_is_listed_again_is_told() -> None:
    index = Index()
    for seen in (stream(), instance()):
        index.put(msgspec.structs.replace(known_of(seen), vanished=True), 1)
    of = memory(index=index)
    assert [seen.run_id for seen in list_streams(stream_row(), of=of).runs] == ["clicks"]
    assert [seen.run_id for seen in list_instances(instance_row(), of=of).runs] == ["7"]


def test_a_stopped_job_that_never_started_is_no_run() -> None:
    never = stream_row(status="STOPPED", startTime=None)
    page = list_streams(never)
    assert (page.runs, page.shown, page.complete) == ([], [], "real_time")
    index = Index()
    remember(index, stream(startTime=None))
    (seen,) = list_streams(never, of=memory(index=index)).runs
    assert seen.state is State.CANCELED
    (failed,) = list_streams(stream_row(status="EXCEPTION", startTime=None)).runs
    assert (failed.state, failed.marker) == (State.FAILED, None)


@pytest.mark.parametrize(
    ("status", "end", "ended_ms"),
    [("STOPPED", T2, T2), ("EXCEPTION", T2, T2), ("STOPPED", T1 - 1, None), ("NORMAL", T2, None)],
)
def test_an_end_time_counts_for_an_ended_stream_if_it_is_not_of_the_attempt_before(
    status: str, end: Ms, ended_ms: Ms | None
) -> None:
    assert stream(status=status, endTime=end).ended_ms == ended_ms


@pytest.mark.parametrize("status", ["STARTING", "INIT"])
def test_a_starting_stream_that_still_shows_its_last_start_has_no_marker_yet(status: str) -> None:
    index = Index()
    remember(index, stream(status="STOPPED", endTime=T2), at_ms=T2)
    (old,) = list_streams(stream_row(status=status), of=memory(index=index)).runs
    assert (old.marker, old.started_ms) == (None, None)
    (new,) = list_streams(stream_row(status=status, startTime=T3), of=memory(index=index)).runs
    assert (new.marker, new.started_ms) == (str(T3), T3)
    assert stream(status=status).marker == str(T1)


# Batch instances: listing, identity, attempts


def test_an_instance_is_a_run_of_the_job_that_it_names() -> None:
    seen = instance(status="fail", endTime=T4, errorMessage="no table", instanceType=0)
    assert seen == Seen(
        job=Job(id="load", name="load"),
        run_id="7",
        state=State.FAILED,
        vendor_state="fail",
        queued_ms=T2,
        started_ms=T3,
        ended_ms=T4,
        problem=Problem(None, "no table"),
        detail={"instance_type": 0, "plan_time": "2023-11-14T22:06:40.000Z"},
        scope="batch",
        fingerprint=seen.fingerprint,
    )


@pytest.mark.parametrize(
    "ids", [{"instanceId": 7}, {"instanceId": "7"}, {"instanceId": None, "instancesId": "7"}]
)
def test_an_instance_id_may_be_a_number_or_text_under_either_name(ids: dict[str, Any]) -> None:
    assert instance(**ids).run_id == "7"


def test_what_has_not_ended_has_no_end_and_no_problem() -> None:
    seen = instance(status="waiting", endTime=T4, errorMessage="of the try before")
    assert (seen.ended_ms, seen.problem) == (None, None)


def test_an_instance_restarted_and_ended_between_two_polls_is_the_next_attempt() -> None:
    index = Index()
    remember(index, instance(status="fail", endTime=T4), attempt=2)
    again = {"status": "fail", "startTime": T4 + 1, "endTime": T4 + 2}
    (seen,) = list_instances(instance_row(**again), of=memory(index=index)).runs
    assert (seen.ordinal, seen.started_ms) == (3, T4 + 1)
    for same in ({"status": "success"}, {"status": "fail", "startTime": T4}):
        row = instance_row(**{"endTime": T4 + 2, **same})
        assert list_instances(row, of=memory(index=index)).runs[0].ordinal is None
    details = answer('{"status": "fail"}')
    (whole,) = parse(about(seen), details, memory(index=index)).runs
    assert whole == seen
    (seen,) = list_instances(instance_row(startTime=T4 + 1), of=memory(index=index)).runs
    assert (seen.state, seen.ordinal) == (State.RUNNING, None)


def test_an_unchanged_instance_is_shown_and_a_changed_one_told() -> None:
    index = Index()
    known = remember(index, instance())
    volatile = instance_row(executeTime=0.3, retryTimes=1)
    page = list_instances(volatile, of=memory(index=index))
    assert (page.runs, page.shown) == ([], [known])
    for change in ({"status": "success"}, {"startTime": T4}, {"forceSuccess": True}):
        page = list_instances(instance_row(**change), of=memory(index=index))
        assert (len(page.runs), page.shown) == (1, [])


def test_what_ended_past_retention_and_was_forgotten_is_not_news_again() -> None:
    ended = instance_row(status="success", endTime=T3)
    skipped = {"jobName": "load", "instanceId": 8, "status": "skip-by-depend", "planTime": T1}
    timeless = {"jobName": "load", "instanceId": 9, "status": "skip-by-depend"}
    running = instance_row(instanceId=10)
    rows = (ended, skipped, timeless, running)
    assert ids(list_instances(*rows, of=memory(since_ms=T2))) == ["7", "9", "10"]
    assert ids(list_instances(*rows, of=memory(since_ms=T4))) == ["9", "10"]
    index = Index()
    remember(index, instance())
    assert ids(list_instances(ended, of=memory(since_ms=T4, index=index))) == ["7"]


def ids(page: Page) -> list[str]:
    return [seen.run_id for seen in page.runs]


# Batch instances: which plan times are asked for


def test_first_contact_sweeps_the_past_week_newest_first_in_spans_of_three_days() -> None:
    low = NOW_MS - 7 * DAY
    high = NOW_MS + 10 * MINUTE
    assert windows(first(BATCH, memory(contact=True))) == [
        (low + 6 * DAY, high),
        (low + 3 * DAY, low + 6 * DAY - 1),
        (low, low + 3 * DAY - 1),
    ]


def test_a_poll_asks_once_for_what_is_planned_about_now() -> None:
    request = first(BATCH)
    assert (request.path, request.by_id) == ("/v1/p1/jobs/instances/detail", False)
    assert query(request) == {
        "minPlanTime": str(GOOD_MS - 10 * MINUTE),
        "maxPlanTime": str(NOW_MS + 10 * MINUTE),
        "offset": "0",
        "limit": "1000",
    }
    assert len(windows(request)) == 1


def test_the_whole_week_is_swept_again_after_each_resync() -> None:
    of = memory({"swept": str(NOW_MS - 599_999)})
    assert len(windows(first(BATCH, of))) == 1
    for due in ({"swept": str(NOW_MS - 600_000)}, {"swept": "0"}):
        assert len(windows(first(BATCH, memory(due)))) == 3


def test_that_a_sweep_was_whole_is_noted_at_its_end_only() -> None:
    of = memory(contact=True)
    request, noted = first(BATCH, of), []
    while "minPlanTime" in query(request):
        page = parse(request, instance_list(), of)
        noted.append(page.marks.get("swept"))
        (request,) = page.follow
    assert noted == [None, None, str(NOW_MS)]
    assert "swept" not in sweep(instance_list()).marks


@pytest.mark.parametrize(
    ("unfinished", "expected"),
    [
        ("", [(GOOD_MS - 10 * MINUTE, NOW_MS + 10 * MINUTE)]),
        (
            f"{NOW_MS - 2 * HOUR}-{NOW_MS - HOUR}",
            [(NOW_MS - 2 * HOUR, NOW_MS + 10 * MINUTE)],
        ),
        (
            f"{NOW_MS - 5 * DAY}-{NOW_MS - 5 * DAY + 7}",
            [
                (GOOD_MS - 10 * MINUTE, NOW_MS + 10 * MINUTE),
                (NOW_MS - 5 * DAY, NOW_MS - 5 * DAY + 7),
            ],
        ),
        (
            f"{NOW_MS - 9 * DAY}-{NOW_MS - 8 * DAY} {NOW_MS - 7 * DAY - 5}-{NOW_MS - 7 * DAY + 5}",
            [
                (GOOD_MS - 10 * MINUTE, NOW_MS + 10 * MINUTE),
                (NOW_MS - 7 * DAY, NOW_MS - 7 * DAY + 5),
            ],
        ),
    ],
    ids=["none", "near", "far", "out of reach"],
)
def test_the_plan_times_of_unfinished_instances_are_asked_for_too(
    unfinished: str, expected: list[tuple[int, int]]
) -> None:
    assert windows(first(BATCH, memory({"unfinished": unfinished}))) == expected


def test_a_source_that_was_away_for_long_is_asked_for_no_more_than_a_week() -> None:
    of = Memory(
        now_ms=NOW_MS, contact_ms=1, last_good_ms=NOW_MS - 30 * DAY, marks={"swept": str(NOW_MS)}
    )
    assert windows(first(BATCH, of))[-1][0] == NOW_MS - 7 * DAY


@pytest.mark.parametrize("ahead_ms", [11 * MINUTE, HOUR, 300 * DAY])
def test_a_clock_that_was_set_back_asks_for_what_is_planned_about_now(ahead_ms: Ms) -> None:
    """After a boot with a wrong clock, say: the last good poll, and the last sweep, lie ahead."""
    of = Memory(
        now_ms=NOW_MS, contact_ms=1, last_good_ms=NOW_MS + ahead_ms, marks={"swept": str(NOW_MS)}
    )
    assert windows(first(BATCH, of)) == [(NOW_MS - 10 * MINUTE, NOW_MS + 10 * MINUTE)]
    of = Memory(
        now_ms=NOW_MS,
        contact_ms=1,
        last_good_ms=NOW_MS + ahead_ms,
        marks={"swept": str(NOW_MS + ahead_ms)},
    )
    assert windows(first(BATCH, of))[-1][0] == NOW_MS - 7 * DAY


def test_plan_times_that_cannot_be_asked_for_are_not_noted() -> None:
    plans = [1, NOW_MS - 8 * DAY, NOW_MS + 20 * MINUTE, 253_402_300_799_999]
    rows = [instance_row(instanceId=number, planTime=plan) for number, plan in enumerate(plans, 1)]
    assert list_instances(*rows).marks == {"unfinished": ""}


def test_a_sweep_notes_the_plan_times_of_what_is_unfinished_and_forgets_the_others() -> None:
    rows = [
        instance_row(instanceId=1, planTime=T1),
        instance_row(instanceId=2, planTime=T1 - DAY, status="waiting"),
        instance_row(instanceId=3, planTime=T1 - 2 * DAY, status="success"),
        instance_row(instanceId=4, planTime=T1 - HOUR, status="DANCING"),
        instance_row(instanceId=5, planTime=None),
    ]
    page = list_instances(*rows, of=memory({"unfinished": "1-2"}))
    early, late = T1 - DAY, T1 - HOUR
    assert page.marks == {"unfinished": f"{early}-{early} {late}-{T1}"}
    assert list_instances(rows[2]).marks == {"unfinished": ""}


def test_a_sweep_of_several_windows_notes_the_unfinished_of_all() -> None:
    of = memory({"unfinished": f"{T1 - 3 * DAY}-{T1 - 3 * DAY}"})
    page = sweep(instance_list(instance_row(instanceId=1)), of)
    assert page.marks == {}
    old = instance_row(instanceId=2, planTime=T1 - 3 * DAY)
    page = parse(page.follow[0], instance_list(old), of)
    assert page.marks == {"unfinished": f"{T1 - 3 * DAY}-{T1 - 3 * DAY} {T1}-{T1}"}


def test_a_settled_instance_that_goes_on_is_swept_from_then_on() -> None:
    plan_ms = T1 - DAY
    details = answer(json.dumps({"status": "running", "planTime": plan_ms, "startTime": T2}))
    of = memory({"unfinished": f"{T1}-{T1}"})
    page = parse(about(known_of(instance())), details, of)
    assert page.runs[0].state is State.RUNNING
    assert page.marks == {"unfinished": f"{plan_ms}-{plan_ms} {T1}-{T1}"}


def test_more_rows_than_a_workspace_has_are_refused() -> None:
    rows = [{"name": f"j{number}"} for number in range(60_000)]
    (following,) = parse(jobs_question(), job_list(*rows, total=10**9)).follow[-1:]
    rows = [{"name": f"k{number}"} for number in range(60_000)]
    with pytest.raises(Invalid, match="more than 100000 rows in one list"):
        parse(following, job_list(*rows, total=10**9))


def test_more_instances_than_a_week_has_are_refused() -> None:
    (question,) = sweep(instance_list(instance_row(), total=2)).follow
    asked = msgspec.structs.replace(
        question.context, instances=question.context.instances * 500_000
    )
    question = msgspec.structs.replace(question, context=asked)
    with pytest.raises(Invalid, match="more than 500000 instances within a week"):
        parse(question, instance_list(instance_row(instanceId=8)))


# Batch instances: windows that hold more than a page


def full_page(total: int) -> Response:
    return instance_list(*(instance_row(instanceId=n) for n in range(1, 1001)), total=total)


def test_a_window_with_more_than_a_page_is_halved_and_its_rows_wait_for_the_halves() -> None:
    request = first(BATCH)
    page = parse(request, full_page(1001))
    assert (page.runs, page.shown, page.marks) == ((), (), {})
    low, high = GOOD_MS - 10 * MINUTE, NOW_MS + 10 * MINUTE
    middle = (low + high) // 2
    assert windows(page.follow[0]) == [(middle + 1, high), (low, middle)]


def test_a_full_page_that_is_all_there_is_needs_no_second_question() -> None:
    page = parse(first(BATCH), full_page(1000))
    assert len(page.runs) == 1000
    assert [query(request).get("jobType") for request in page.follow] == ["BATCH"]


def narrowest() -> Request:
    request = first(BATCH)
    while query(request)["minPlanTime"] != query(request)["maxPlanTime"]:
        (request,) = parse(request, full_page(1001)).follow
    return request


def test_a_window_of_one_millisecond_is_read_by_pages() -> None:
    page = parse(narrowest(), full_page(1001))
    (request,) = page.follow
    assert len(page.runs) == 1000
    assert (query(request)["offset"], query(request)["limit"]) == ("1", "1000")
    page = parse(request, instance_list(instance_row(instanceId=2000), total=1001))
    assert (ids(page), page.notes) == (["2000"], [])
    assert query(page.follow[0])["offset"] == "0"  # of the next window


def test_a_server_that_serves_shorter_pages_of_instances_is_read_by_pages() -> None:
    page = sweep(instance_list(instance_row(instanceId=1), total=2))
    assert query(page.follow[0])["offset"] == "1"
    page = parse(page.follow[0], instance_list(instance_row(instanceId=2), total=2))
    assert (ids(page), page.notes) == (["2"], [])


@pytest.mark.parametrize("rows", [[], [instance_row(instanceId=1)]])
def test_instances_that_are_counted_but_not_shown_are_reported(rows: list[dict[str, Any]]) -> None:
    request = first(BATCH)
    if rows:
        (request,) = parse(request, instance_list(*rows, total=3)).follow
    page = parse(request, instance_list(*rows, total=3))
    (note,) = page.notes
    assert note.startswith(f"{3 - len(rows)} instances planned since 2023-11-14T22:03:05.000Z")
    assert query(page.follow[0])["jobType"] == "BATCH"


# Batch jobs whose last instance moved


def batch_job(**changes: Any) -> dict[str, Any]:
    row = {"name": "load", "status": "SCHEDULING", "lastInstanceStatus": "success"}
    return row | {"lastInstanceEndTime": T4} | changes


def test_a_job_whose_last_instance_is_in_the_sweep_needs_no_question() -> None:
    ended = instance_row(status="SUCCESS", endTime=str(T4))
    page = parse(jobs_question(instance_list(ended)), job_list(batch_job()))
    assert (page.follow, page.marks) == ([], {"last:load": f"success {T4}"})


def test_a_job_as_it_was_noted_needs_no_question() -> None:
    of = memory({"last:load": f"success {T4}"})
    page = parse(jobs_question(), job_list(batch_job(), {"name": "never ran"}), of)
    assert (page.follow, page.marks) == ([], {})


def test_a_job_without_a_last_instance_any_more_is_forgotten() -> None:
    page = parse(jobs_question(), job_list({"name": "load"}), memory({"last:load": "success 1"}))
    assert (page.follow, page.marks) == ([], {"last:load": ""})


@pytest.mark.parametrize(
    "swept",
    [
        [],
        [instance_row(status="running")],
        [instance_row(status="success", endTime=T3)],
        [instance_row(status="success", endTime=T4, jobName="other")],
    ],
)
def test_a_job_whose_last_instance_is_not_in_the_sweep_is_asked_for_its_week(
    swept: list[dict[str, Any]],
) -> None:
    page = parse(jobs_question(instance_list(*swept)), job_list(batch_job()))
    assert page.marks == {}
    (request,) = page.follow
    asked = query(request)
    assert (asked["jobName"], asked["preciseQuery"], request.by_id) == ("load", "true", True)
    low, high = NOW_MS - 7 * DAY, NOW_MS + 10 * MINUTE
    assert windows(request) == [
        (low + 6 * DAY, high),
        (low + 3 * DAY, low + 6 * DAY - 1),
        (low, low + 3 * DAY - 1),
    ]


def test_what_the_job_list_says_is_noted_with_the_last_answer_about_the_job() -> None:
    of = memory({"unfinished": f"{T1}-{T1}"})
    request = job_question("running")
    plan_ms = NOW_MS - 6 * DAY
    page = parse(request, instance_list(), of)
    assert (page.marks, page.follow[0].by_id) == ({}, True)
    page = parse(page.follow[0], instance_list(), of)
    backfilled = instance_row(instanceType=5, planTime=plan_ms)
    page = parse(page.follow[0], instance_list(backfilled), of)
    assert (ids(page), page.follow) == (["7"], [])
    assert page.marks == {
        "last:load": "running",
        "unfinished": f"{plan_ms}-{plan_ms} {T1}-{T1}",
    }


def test_the_list_of_batch_jobs_is_read_page_by_page() -> None:
    rows = [batch_job(name=f"job_{number}", lastInstanceStatus=None) for number in range(101)]
    page = parse(jobs_question(), job_list(*rows[:100], total=101))
    more = [request for request in page.follow if "jobType" in query(request)]
    assert [query(request)["offset"] for request in more] == ["1"]
    page = parse(more[0], job_list(rows[100], total=101))
    assert (page.complete, [query(request)["jobName"] for request in page.follow]) == (
        None,
        ["job_100"],
    )


# Questions about one run


@pytest.mark.parametrize("word", ["NORMAL", "STARTING", "EXCEPTION", "STOPPED", "PAUSE"])
def test_any_news_of_a_stream_is_told_with_its_nodes(word: str) -> None:
    request = VENDOR.ask(OPTIONS, None, stream(status=word))
    assert request is not None
    assert (request.path, request.by_id) == ("/v1/p1/jobs/clicks/status", True)


def test_a_failed_instance_is_told_with_its_nodes_and_no_other() -> None:
    request = VENDOR.ask(OPTIONS, None, instance(status="fail"))
    assert request is not None
    assert (request.path, request.by_id) == ("/v1/p1/jobs/load/instances/7", True)
    for word in ("running", "success", "manual-stop"):
        assert VENDOR.ask(OPTIONS, None, instance(status=word)) is None


def test_a_run_that_its_own_page_told_is_not_asked_for_again() -> None:
    for known in (known_of(stream()), known_of(instance())):
        (seen,) = parse(about(known), answer('{"name": "x", "status": "fail"}')).runs
        assert seen.state is State.FAILED
        assert VENDOR.ask(OPTIONS, known, seen) is None


def status(word: str | None = "EXCEPTION", *nodes: dict[str, Any], **more: Any) -> Response:
    return answer(json.dumps({"name": "clicks", "status": word, "nodes": nodes, **more}))


def test_a_failed_stream_names_its_failed_nodes_and_where_their_log_is() -> None:
    nodes = [
        {"name": "source", "status": "NORMAL", "logPath": "obs://log/source"},
        {"name": "sink", "status": "EXCEPTION", "logPath": "obs://log/sink"},
        {"name": "join", "lastInstanceStatus": "fail"},
        {"name": "idle"},
    ]
    seen = stream(status="EXCEPTION")
    (whole,) = parse(about(seen), status("EXCEPTION", *nodes)).runs
    assert whole.problem == Problem(None, "node sink: EXCEPTION; node join: fail")
    assert whole.detail == {
        "node.sink": "EXCEPTION",
        "node.join": "fail",
        "node.source": "NORMAL",
        "node.idle": None,
        "log_path": "obs://log/sink",
    }


def test_a_running_stream_shows_its_nodes_without_a_problem() -> None:
    node = {"name": "sink", "status": "ABNORMAL", "logPath": "obs://log/sink"}
    (whole,) = parse(about(stream()), status("NORMAL", node)).runs
    assert (whole.problem, whole.detail) == (None, {"node.sink": "ABNORMAL"})


def test_of_many_nodes_twenty_are_shown_and_the_failed_ones_first() -> None:
    nodes = [{"name": f"n{number}", "status": "NORMAL"} for number in range(30)]
    nodes.append({"name": "last", "status": "EXCEPTION"})
    (whole,) = parse(about(stream(status="EXCEPTION")), status("EXCEPTION", *nodes)).runs
    assert len(whole.detail) == 20
    assert next(iter(whole.detail)) == "node.last"


def test_a_failed_instance_tells_its_own_error_and_that_of_its_nodes() -> None:
    nodes = [
        {"nodeName": "a", "status": "fail", "errorMessage": "no table", "logPath": "obs://log/a"},
        {"nodeName": "b", "status": "skip"},
    ]
    details = {"status": "fail", "endTime": T4, "errorMessage": "job failed", "nodes": nodes}
    seen = instance(status="fail", endTime=T4)
    (whole,) = parse(about(seen), answer(json.dumps(details))).runs
    assert whole.problem == Problem(None, "job failed; node a: no table")
    assert whole.detail == {
        **seen.detail,
        "node.a": "fail",
        "node.b": "skip",
        "log_path": "obs://log/a",
    }
    assert (whole.queued_ms, whole.started_ms, whole.ended_ms) == (T2, T3, T4)
    assert whole.fingerprint == seen.fingerprint


def test_a_page_without_nodes_tells_the_row() -> None:
    seen = stream()
    assert parse(about(seen), answer('{"name": "clicks", "nodes": null}')).runs == [seen]


def test_a_start_time_that_only_the_status_gives_is_taken() -> None:
    seen = stream(startTime=None)
    (whole,) = parse(about(seen), status("NORMAL", starttime=str(T2))).runs
    assert (whole.started_ms, whole.marker) == (T2, str(T2))


@pytest.mark.parametrize(
    ("row", "response", "state"),
    [
        (stream(status="EXCEPTION"), status("NORMAL", startTime=T2), State.RUNNING),
        (instance(status="fail"), answer('{"status": "waiting"}'), State.QUEUED),
    ],
)
def test_a_run_that_has_moved_on_since_it_was_listed_is_told_in_two_steps(
    row: Seen, response: Response, state: State
) -> None:
    one, two = parse(about(row), response).runs
    assert one is row
    assert (two.state, two.fingerprint) == (state, 0)  # so that no later row looks unchanged


def test_a_stream_that_left_the_list_is_settled_by_its_status() -> None:
    known = known_of(stream(owner="etl"))
    page = parse(about(known), status("STOPPED", startTime=T1, endTime=T3))
    (seen,) = page.runs
    assert (seen.job, seen.state, seen.marker) == (known.job, State.CANCELED, str(T1))
    assert (seen.started_ms, seen.ended_ms, page.gone) == (T1, T3, ())


@pytest.mark.parametrize("known", [known_of(stream()), known_of(instance())])
@pytest.mark.parametrize("body", ["{}", '{"name": "x", "status": null}', '{"status": ""}'])
def test_a_page_without_a_status_cannot_tell(known: Known, body: str) -> None:
    page = parse(about(known), answer(body))
    assert (page.runs, page.gone, page.marks) == ((), (), {})


# Timestamps


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (T3, T3),
        (str(T3), T3),
        (f" {T3} ", T3),
        (float(T3), T3),
        ("2023-11-14T22:10:00Z", 1699999800000),
        ("2023-11-15T06:10:00.123+08:00", 1699999800123),
        ("2023-11-14 22:10:00", 1699999800000),
        (0, None),
        ("0", None),
        (-1, None),
        ("", None),
        ("soon", None),
        (None, None),
        (10**30, None),
    ],
    ids=repr,
)
def test_every_form_of_a_timestamp_is_read(value: object, expected: Ms | None) -> None:
    assert stream(startTime=value).started_ms == expected
    seen = instance(submitTime=value, startTime=value, endTime=value, status="success")
    assert (seen.queued_ms, seen.started_ms, seen.ended_ms) == (expected, expected, expected)


# Errors


ERRORS = [
    (400, "DLF.6888", Rejected),
    (400, "DLF.3051", Invalid),
    (400, "DLF.0136", Invalid),
    (200, "DLF.3051", Invalid),
    (200, "DLF.6888", Rejected),
    (500, "DLF.0001", Unreachable),
    (401, "APIG.0301", Rejected),
    (401, "APIGW.0301", Rejected),
    (403, "APIG.0302", Rejected),
    (401, "APIG.0303", Rejected),
    (401, "APIGW.0307", Rejected),
    (200, "APIG.0307", Rejected),
    (429, "APIG.0308", Limited),
    (429, "APIGW.0308", Limited),
    (400, "APIG.0308", Limited),
    (504, "APIG.0201", Unreachable),
    (400, "APIGW.0201", Unreachable),
    (404, "APIG.0101", Invalid),
    (401, "DLF.9999", Rejected),
    (403, "", Rejected),
    (429, "", Limited),
    (503, "", Unreachable),
    (502, "DLF.3051", Unreachable),
    (404, "", Invalid),
    (302, "", Invalid),
]
QUESTIONS = {
    "streams": first(STREAMS),
    "instances": first(BATCH),
    "batch jobs": jobs_question(),
    "one job": job_question(),
    "ask stream": about(stream()),
    "ask instance": about(instance(status="fail")),
    "settle stream": about(known_of(stream())),
    "settle instance": about(known_of(instance())),
}
each_question = pytest.mark.parametrize("question", QUESTIONS.values(), ids=list(QUESTIONS))
each_listing = pytest.mark.parametrize(
    "question", list(QUESTIONS.values())[:3], ids=list(QUESTIONS)[:3]
)


@pytest.mark.parametrize(("status", "code", "kind"), ERRORS)
@each_question
def test_an_error_is_what_its_code_says_or_else_its_status(
    question: Request, status: int, code: str, kind: type[VendorError]
) -> None:
    body = json.dumps({"error_code": code, "error_msg": "as it is", "request_id": "r"})
    with pytest.raises(VendorError) as caught:
        parse(question, answer(body if code else "<html>", status))
    assert type(caught.value) is kind
    if code and status < 500:
        assert status in (401, 403, 429) or "as it is" in str(caught.value)


@each_listing
@pytest.mark.parametrize("code", ["DLF.0100", "DLF.0137"])
def test_a_missing_job_is_no_answer_to_a_listing(question: Request, code: str) -> None:
    with pytest.raises(Invalid, match=code):
        parse(question, answer(json.dumps({"error_code": code}), 400))


def test_a_throttled_question_waits_as_long_as_the_gateway_asks() -> None:
    body = '{"error_code": "APIG.0308", "error_msg": "The throttling threshold has been reached"}'
    for code in (body, ""):
        with pytest.raises(Limited) as caught:
            parse(first(BATCH), answer(code, 429, retry_after="7"))
        assert caught.value.retry_after_s == 7


@each_question
@pytest.mark.parametrize("body", ["", "<html>Log in</html>", '{"total": 1, "jo', "[]", "null", "7"])
def test_what_is_not_the_documented_document_is_invalid(question: Request, body: str) -> None:
    with pytest.raises(Invalid):
        parse(question, answer(body))


@pytest.mark.parametrize("body", ["{}", '{"total": 0}', '{"jobs": []}', '{"total": 1, "jobs": {}}'])
def test_a_listing_must_have_a_total_and_rows(body: str) -> None:
    for question in (first(STREAMS), first(BATCH), jobs_question()):
        with pytest.raises(Invalid):
            parse(question, answer(body))


def test_an_error_code_that_is_no_text_does_no_harm() -> None:
    with pytest.raises(Invalid):
        parse(first(BATCH), answer('{"error_code": {"a": 1}, "error_msg": null}'))


# Bad rows


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({"name": ""}, "$.jobs[1].name"),
        ({"name": "x" * 1025}, "$.jobs[1].name"),
        ({"name": 5}, "$.jobs[1].name"),
        ({"status": None}, "$.jobs[1].status"),
        ({"status": ""}, "$.jobs[1].status"),
        ({"startTime": {}}, "$.jobs[1].startTime"),
        ({"owner": "x" * 1025}, "$.jobs[1].owner"),
    ],
)
def test_a_bad_row_of_the_job_list_is_set_aside_and_the_rest_is_read(
    change: dict[str, Any], at: str
) -> None:
    rows = [stream_row(name="a"), stream_row(**change), stream_row(name="c")]
    page = list_streams(*rows)
    assert [bad.at for bad in page.bad] == [at]
    assert (ids(page), page.complete) == (["a", "c"], "real_time")


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({"instanceId": None}, "$.instances[1]"),
        ({"instanceId": 0}, "$.instances[1].instanceId"),
        ({"instanceId": ""}, "$.instances[1].instanceId"),
        ({"instanceId": "7" * 1025}, "$.instances[1].instanceId"),
        ({"instanceId": 1.5}, "$.instances[1].instanceId"),
        ({"jobName": ""}, "$.instances[1].jobName"),
        ({"jobName": "x" * 1025}, "$.instances[1].jobName"),
        ({"status": None}, "$.instances[1].status"),
        ({"planTime": []}, "$.instances[1].planTime"),
    ],
)
def test_a_bad_instance_is_set_aside_and_the_rest_is_read(change: dict[str, Any], at: str) -> None:
    rows = [instance_row(instanceId=1), instance_row(**change), instance_row(instanceId=3)]
    page = list_instances(*rows)
    assert [bad.at for bad in page.bad] == [at]
    assert ids(page) == ["1", "3"]


def test_a_bad_batch_job_is_set_aside_and_the_others_are_noted() -> None:
    rows = [batch_job(name=""), batch_job(lastInstanceEndTime=[], name="b"), batch_job(name="c")]
    page = parse(jobs_question(), job_list(*rows), memory(contact=True))
    assert [bad.at for bad in page.bad] == ["$.jobs[0].name", "$.jobs[1].lastInstanceEndTime"]
    assert page.marks == {"last:c": f"success {T4}"}


def test_a_bad_node_is_set_aside_and_the_run_is_told() -> None:
    node = {"name": "sink", "status": "EXCEPTION"}
    seen = stream(status="EXCEPTION")
    page = parse(about(seen), status("EXCEPTION", {"name": 7}, node))
    assert [bad.at for bad in page.bad] == ["$.nodes[0].name"]
    assert page.runs[0].detail == {"node.sink": "EXCEPTION"}
    page = parse(about(known_of(seen)), status(None, {"name": 7}))
    assert (len(page.bad), page.runs) == (1, ())


def test_pages_that_hold_bad_rows_only_end_like_others() -> None:
    page = parse(first(STREAMS), job_list({"name": ""}, {"name": ""}, total=4))
    page = parse(page.follow[0], job_list({"name": ""}, {"name": ""}, total=4))
    assert (page.follow, page.complete) == ([], "real_time")


# Hostile bytes

FIELDS = ["total", "jobs", "instances", "nodes", "name", "jobName", "instanceId", "status"]
FIELDS += ["startTime", "planTime", "endTime", "error_code", "error_msg", "logPath"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=200), status=st.sampled_from([200, 400, 401, 429, 503]))
def test_whatever_bytes_come_only_a_vendor_error_is_raised(body: bytes, status: int) -> None:
    for question in QUESTIONS.values():
        survives(question, answer(body, status))


@settings(max_examples=150, deadline=None)
@given(value=values, status=st.sampled_from([200, 200, 400]))
def test_whatever_json_comes_only_a_vendor_error_is_raised(value: object, status: int) -> None:
    bodies = [value, {"total": 3, "jobs": [value], "instances": [value], "nodes": [value]}]
    for question in QUESTIONS.values():
        for body in bodies:
            survives(question, answer(json.dumps(body), status))


def survives(question: Request, response: Response) -> None:
    try:
        page = parse(question, response)
    except VendorError:
        return
    for seen in page.runs:
        assert seen.run_id
        assert seen.job.id
    for request in page.follow:
        assert request.target


# The world, read back


def world(seed: int = 1, jobs: int = 8) -> World:
    return World(kinds=VENDOR.kinds, seed=seed, jobs=jobs, now_ms=NOW_MS)


class Watch:
    """Polls a world step by step and remembers what it was told."""

    def __init__(self, of: World) -> None:
        self.world = of
        self.index = Index()
        self.marks: dict[str, str] = {}
        self.good_ms: Ms | None = None

    def poll(self) -> list[Page]:
        asked = Memory(
            now_ms=self.world.now_ms,
            contact_ms=NOW_MS,
            last_good_ms=self.good_ms,
            marks=self.marks,
            index=self.index,
        )
        pages = read(VENDOR, OPTIONS, asked, serve(VENDOR, self.world))
        for page in pages:
            assert not page.bad
            assert not page.notes
            self.marks.update(page.marks)
            for seen in page.runs:
                remember(self.index, seen, at_ms=self.world.now_ms)
        self.good_ms = self.world.now_ms
        return pages

    def known(self, run: SimRun) -> Known:
        name = run.definition.name
        run_id = name if run.definition.kind.stream else str(run.number)
        found = self.index.runs[name if run_id == name else (name, run_id)]
        assert isinstance(found, Known)
        return found


@pytest.mark.parametrize("seed", range(5))
def test_what_is_read_is_what_the_world_holds(seed: int) -> None:
    watch = Watch(world(seed))
    states = set()
    for _ in range(60):
        watch.world.advance(watch.world.now_ms + 1_500)
        watch.poll()
        for run in watch.world.runs.values():
            known, now, is_stream = watch.known(run), run.now, run.definition.kind.stream
            assert known.state is now.state
            assert (known.started_ms, known.ended_ms) == (now.started_ms, now.ended_ms)
            assert known.queued_ms == (None if is_stream else now.queued_ms)
            if is_stream:
                assert known.marker == (str(now.started_ms) if now.started_ms else None)
                assert (known.job.owner, known.scope) == (run.definition.owner, "real_time")
            states.add((is_stream, now.state))
    assert {state for streaming, state in states if streaming} >= {State.STARTING, State.RUNNING}
    assert {state for streaming, state in states if not streaming} >= TERMINAL - {State.CANCELED}


@pytest.mark.parametrize("seed", range(3))
def test_a_page_about_a_run_says_the_same_as_the_list(seed: int) -> None:
    watch = Watch(world(seed))
    asked = 0
    for _ in range(40):
        watch.world.advance(watch.world.now_ms + 1_500)
        for seen in runs(watch.poll()):
            request = VENDOR.ask(OPTIONS, None, seen)
            settled = VENDOR.settle(OPTIONS, known_of(seen))
            assert settled is not None
            (told,) = parse(settled, VENDOR.render(watch.world, settled)).runs
            assert (told.state, told.substate, told.ended_ms) == (
                seen.state,
                seen.substate,
                seen.ended_ms,
            )
            if request is not None:
                (whole,) = parse(request, VENDOR.render(watch.world, request)).runs
                assert len(whole.detail) > len(seen.detail)
                assert (whole.problem is None) == (seen.state is not State.FAILED)
                asked += 1
    assert asked


def test_a_quiet_poll_shows_everything_as_it_was() -> None:
    watch = Watch(world())
    watch.world.advance(NOW_MS + 20_000)
    watch.poll()
    pages = watch.poll()
    assert runs(pages) == []
    assert len([known for page in pages for known in page.shown]) == len(watch.world.runs)


def test_a_restarted_instance_goes_back_to_waiting_under_its_id() -> None:
    watch = Watch(world())
    (batch, *_) = [job for job in watch.world.definitions if job.kind.name == "batch"]
    run = watch.world.start(batch)
    watch.world.move(run, State.RUNNING)
    watch.world.move(run, State.FAILED, "no table")
    watch.poll()
    watch.world.now_ms = NOW_MS + 5 * DAY
    watch.good_ms = watch.world.now_ms - 15_000
    watch.marks["swept"] = str(watch.good_ms)
    assert runs(watch.poll()) == []
    watch.world.reopen(run)
    watch.poll()  # only the list of jobs can betray it
    known = watch.known(run)
    assert (known.state, known.queued_ms) == (State.QUEUED, run.now.queued_ms)


def test_more_instances_than_a_page_are_all_read() -> None:
    crowded = world(jobs=1)
    (job,) = crowded.definitions
    job = msgspec.structs.replace(job, kind=VENDOR.kinds[1])
    for number in range(2_500):
        crowded.now_ms = NOW_MS + number // 1_200
        crowded.start(job)
    watch = Watch(crowded)
    pages = watch.poll()
    assert len({seen.run_id for seen in runs(pages)}) == 2_500


def test_more_streams_than_a_page_are_all_read() -> None:
    crowded = world(jobs=500)
    crowded.advance(NOW_MS + 10_000)
    watch = Watch(crowded)
    pages = watch.poll()
    streams = {seen.run_id for seen in runs(pages) if seen.scope == "real_time"}
    assert streams == {run.definition.name for run in crowded.of("real_time")}
    assert [page.complete for page in pages].count("real_time") == 1


def get(of: World, path: str, **named: str) -> tuple[int, dict[str, Any]]:
    response = VENDOR.render(of, Request(path=f"/v1/p1/jobs{path}", query=tuple(named.items())))
    found: dict[str, Any] = json.loads(response.body)
    return response.status, found


def test_the_simulated_list_of_jobs_has_the_defaults_of_the_real_one() -> None:
    simulated = world(jobs=50)
    _, found = get(simulated, "")
    assert (found["total"], len(found["jobs"])) == (25, 10)
    assert {row["jobType"] for row in found["jobs"]} == {"BATCH"}
    _, second = get(simulated, "", offset="2")
    assert len(second["jobs"]) == 5
    name = found["jobs"][0]["name"]
    _, named = get(simulated, "", jobName=name[:-1], limit="100")
    assert name in [row["name"] for row in named["jobs"]]


def test_the_simulated_list_of_instances_begins_today_and_lists_the_newest_first() -> None:
    simulated = world()
    simulated.advance(NOW_MS + 20_000)
    _, found = get(simulated, "/instances/detail", limit="1000")
    plans = [row["planTime"] for row in found["instances"]]
    assert plans == sorted(plans, reverse=True)
    assert found["total"] == len(simulated.of("batch"))
    name = found["instances"][0]["jobName"]
    _, fuzzy = get(simulated, "/instances/detail", jobName=name[:3])
    assert fuzzy["total"] >= 1
    _, exact = get(simulated, "/instances/detail", jobName=name[:3], preciseQuery="true")
    assert exact["total"] == 0
    simulated.now_ms = NOW_MS - NOW_MS % DAY + DAY
    assert get(simulated, "/instances/detail")[1]["total"] == 0


@pytest.mark.parametrize(
    ("path", "named", "status", "code"),
    [
        ("", {"limit": "101"}, 400, "DLF.3051"),
        ("", {"limit": "0"}, 400, "DLF.3051"),
        ("", {"offset": "-1"}, 400, "DLF.3051"),
        ("", {"offset": "x"}, 400, "DLF.3051"),
        ("/instances/detail", {"limit": "1001"}, 400, "DLF.3051"),
        (
            "/instances/detail",
            {"minPlanTime": str(NOW_MS - 7 * DAY - 1), "maxPlanTime": str(NOW_MS)},
            400,
            "DLF.3051",
        ),
        ("/nothing/status", {}, 400, "DLF.0100"),
        ("/nothing/instances/1", {}, 400, "DLF.0100"),
        ("/BATCH/status", {}, 400, "DLF.0100"),
        ("/BATCH/instances/999", {}, 400, "DLF.0137"),
        ("/nothing", {}, 404, "APIG.0101"),
    ],
)
def test_the_simulated_errors_are_those_of_the_real_one(
    path: str, named: dict[str, str], status: int, code: str
) -> None:
    simulated = world()
    batch = next(job.name for job in simulated.definitions if job.kind.name == "batch")
    found_status, found = get(simulated, path.replace("BATCH", batch), **named)
    assert (found_status, found["error_code"]) == (status, code)


def test_a_simulated_stream_that_never_ran_is_stopped() -> None:
    simulated = world()
    name = next(job.name for job in simulated.definitions if job.kind.name == "real_time")
    _, found = get(simulated, f"/{name}/status")
    assert (found["status"], "starttime" in found) == ("STOPPED", False)
    assert runs(Watch(simulated).poll()) == []
