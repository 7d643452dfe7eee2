"""Scale v6: every word, timestamp and trap of its API, and a world read back through it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.known import Index, Known, Memory
from poller.payload import iso_ms
from poller.runs import TERMINAL, Job, Ms, Problem, Seen, State
from poller.vendors.scale import MARK, MOST_PAGES, OVERLAP_MS, PAGE_SIZE, VENDOR
from poller.wire import Page, Request, Response
from poller.world import SimRun, World
from tests.support import answer, fixture, read, remember, runs, serve

OPTIONS = VENDOR.options()
NOW_MS = 1_600_000_000_000
SINCE_MS = 1_400_000_000_000
T0, T1, T2, T3, T4 = (f"2018-01-16T15:00:0{second}Z" for second in range(5))


def memory(marks: dict[str, str] | None = None, index: Index | None = None) -> Memory:
    return Memory(
        now_ms=NOW_MS,
        contact_ms=NOW_MS,
        since_ms=SINCE_MS,
        marks=marks or {},
        index=index or Index(),
    )


def row(**changes: object) -> dict[str, Any]:
    return {
        "id": 3,
        "status": "RUNNING",
        "job_type": {"id": 1, "name": "scale-ingest", "version": "1.0.0"},
        "num_exes": 1,
        "node": None,
        "error": None,
        "created": T0,
        "queued": T1,
        "started": T2,
        "ended": None,
        "last_status_change": T2,
        "last_modified": T3,
    } | changes


def listing(*rows: object, following: str | None = None) -> Response:
    document = {"count": len(rows), "next": following, "previous": None, "results": rows}
    return answer(msgspec.json.encode(document))


def active_question() -> Request:
    return VENDOR.start(OPTIONS, memory())[0]


def feed_question(mark_ms: Ms = SINCE_MS + OVERLAP_MS) -> Request:
    return VENDOR.start(OPTIONS, memory({MARK: str(mark_ms)}))[0]


def details_question(job_id: str = "3") -> Request:
    known = Known(job=Job(id=job_id), run_id=job_id, state=State.RUNNING)
    request = VENDOR.settle(OPTIONS, known)
    assert request is not None
    return request


def history_question(present: Seen, known: Known | None = None) -> Request:
    request = VENDOR.ask(OPTIONS, known, present)
    assert request is not None
    return request


def parse(request: Request, response: Response, of: Memory | None = None) -> Page:
    return VENDOR.parse(OPTIONS, request, response, of or memory())


def seen(**changes: object) -> Seen:
    (found,) = parse(feed_question(), listing(row(**changes))).runs
    return found


def known_of(shown: Seen) -> Known:
    return remember(Index(), shown)


def query(request: Request) -> dict[str, list[str]]:
    asked: dict[str, list[str]] = {}
    for name, value in request.query:
        asked.setdefault(name, []).append(value)
    return asked


# Words


@pytest.mark.parametrize(
    ("word", "state", "substate"),
    [
        ("PENDING", State.QUEUED, None),
        ("BLOCKED", State.SUSPENDED, "blocked"),
        ("QUEUED", State.QUEUED, None),
        ("RUNNING", State.RUNNING, None),
        ("FAILED", State.FAILED, None),
        ("COMPLETED", State.SUCCEEDED, None),
        ("CANCELED", State.CANCELED, None),
        ("completed", State.SUCCEEDED, None),
        (" Running\n", State.RUNNING, None),
    ],
)
def test_each_word_has_its_state_however_it_is_spelled(
    word: str, state: State, substate: str | None
) -> None:
    found = seen(status=word)
    assert (found.state, found.substate, found.vendor_state) == (state, substate, word)
    assert not found.unmapped


@pytest.mark.parametrize("word", ["HIBERNATING", ""])
def test_a_word_that_the_table_lacks_is_unknown_and_unmapped(word: str) -> None:
    found = seen(status=word, ended=T3)
    assert (found.state, found.vendor_state, found.unmapped) == (State.UNKNOWN, word, True)
    assert found.ended_ms is None


# Recorded answers


def test_the_documented_list_is_read() -> None:
    page = parse(feed_question(), answer(fixture("scale/doc_job_list.json")))
    (found,) = page.runs
    assert page.bad == []
    marks = {MARK: str(iso_ms("2015-08-28T17:58:46.001Z"))}
    assert dataclasses.replace(page, runs=()) == Page(shown=[], bad=[], marks=marks, lasting=True)
    assert msgspec.structs.replace(found, fingerprint=0) == Seen(
        job=Job(id="3", name="scale-ingest"),
        run_id="3",
        state=State.SUCCEEDED,
        vendor_state="COMPLETED",
        marker="1",
        ordinal=1,
        queued_ms=iso_ms("2015-08-28T17:56:41.005Z"),
        started_ms=iso_ms("2015-08-28T17:57:41.005Z"),
        ended_ms=iso_ms("2015-08-28T17:58:41.005Z"),
        detail={
            "num_exes": 1,
            "node": "my-host.example.domain",
            "job_type_version": "1.0.0",
            "recipe": 1,
            "batch": 1,
        },
    )


def test_the_list_of_the_user_interface_is_read_though_its_count_is_wrong() -> None:
    page = parse(feed_question(), answer(fixture("scale/ui_jobs.json")))
    assert [(found.run_id, found.state.value, found.ordinal) for found in page.runs] == [
        ("1", "succeeded", 94),
        ("2", "queued", 56),
        ("3", "canceled", 72),
        ("4", "queued", 80),
        ("5", "canceled", 73),
        ("6", "queued", 98),
        ("7", "succeeded", 91),
        ("8", "succeeded", 32),
        ("9", "queued", 71),
        ("10", "failed", 43),
        ("11", "succeeded", 43),
        ("12", "succeeded", 43),
        ("13", "running", 94),
    ]
    by_id = {found.run_id: found for found in page.runs}
    assert by_id["2"].ended_ms is None
    assert by_id["2"].started_ms == iso_ms("2018-01-16T21:42:05Z")
    assert by_id["3"].ended_ms == iso_ms("2018-01-16T15:03:38Z")
    assert by_id["1"].detail["max_tries"] == 2
    assert by_id["1"].job.name == "landsat8-parse"
    assert page.bad == []
    (following,) = page.follow
    assert query(following)["started"] == ["2018-01-16T15:56:11.000Z"]
    assert page.marks == {}


@pytest.mark.parametrize(
    ("name", "job_id", "job_name", "state", "ended"),
    [
        ("ui_job-details1", "1", "landsat8-parse", State.SUCCEEDED, "2015-08-28T17:58:41.005Z"),
        ("ui_job-details2", "2", "sam", State.SUCCEEDED, "2016-05-15T17:58:41.005Z"),
        ("ui_job-details3", "3", "scm", State.SUCCEEDED, "2016-05-15T17:58:41.005Z"),
        ("ui_job-details4", "4", "cem", State.SUCCEEDED, "2016-05-15T17:58:41.005Z"),
        ("ui_job-details9", "9", "wv2-ortho", State.SUCCEEDED, "2016-05-15T17:58:41.005Z"),
        ("ui_job-details14", "13", "optional-json", State.SUCCEEDED, "2015-08-28T17:58:41.005Z"),
        ("doc_queue_new_job_201", "1", "test-job", State.QUEUED, None),
    ],
)
def test_recorded_details_are_read(
    name: str, job_id: str, job_name: str, state: State, ended: str | None
) -> None:
    page = parse(details_question(job_id), answer(fixture(f"scale/{name}.json")))
    (found,) = page.runs
    assert (found.run_id, found.job.name, found.state) == (job_id, job_name, state)
    assert found.ended_ms == iso_ms(ended)
    assert page.complete is None


def test_microseconds_of_a_recorded_job_are_cut_to_milliseconds() -> None:
    page = parse(details_question("1"), answer(fixture("scale/doc_queue_new_job_201.json")))
    (found,) = page.runs
    assert found.queued_ms == iso_ms("2018-11-01T13:30:22.593Z")
    assert (found.started_ms, found.marker) == (None, "1")


def test_the_documented_executions_tell_the_end_of_an_earlier_attempt() -> None:
    present = seen(num_exes=2, status="QUEUED")
    page = parse(history_question(present), answer(fixture("scale/doc_job_executions_list.json")))
    past, again = page.runs
    assert again == present
    assert past == Seen(
        job=present.job,
        run_id="3",
        state=State.SUCCEEDED,
        vendor_state="COMPLETED",
        marker="1",
        ordinal=1,
        queued_ms=iso_ms("2015-08-28T17:57:41.010Z"),
        started_ms=iso_ms("2015-08-28T17:57:44.494Z"),
        ended_ms=iso_ms("2015-08-28T17:57:45.906Z"),
        detail={"num_exes": 1, "node": "machine.com", "job_type_version": "1.0.0"},
        past=True,
    )


def test_a_recorded_execution_of_older_versions_has_no_number_and_proves_nothing() -> None:
    execution = msgspec.json.decode(fixture("scale/ui_job-execution.json"))
    present = seen(num_exes=2)
    assert parse(history_question(present), listing(execution)).runs == [present]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ui_job-type-names", 15),
        ("ui_job-type-status", 15),
        ("ui_queueStatus", 12),
        ("ui_running-jobs", 103),
    ],
)
def test_a_recorded_list_of_something_else_is_set_aside_row_by_row(name: str, count: int) -> None:
    page = parse(feed_question(), answer(fixture(f"scale/{name}.json")))
    assert (len(page.bad), page.runs) == (count, [])
    assert page.bad[0].at.startswith("$.results[0]")


# What a row means


def test_timestamps_of_a_queued_job_are_those_of_the_present_attempt() -> None:
    found = seen(status="QUEUED", num_exes=2, started=None)
    assert (found.queued_ms, found.started_ms, found.ended_ms) == (iso_ms(T1), None, None)
    assert found.state_ms is None


def test_a_job_that_was_never_on_the_queue_counts_from_its_creation_and_has_no_attempt() -> None:
    found = seen(status="PENDING", num_exes=0, queued=None, started=None)
    assert (found.queued_ms, found.marker, found.ordinal) == (iso_ms(T0), None, None)
    assert "num_exes" not in found.detail


def test_a_blocked_job_is_suspended_since_its_last_status_change() -> None:
    found = seen(status="BLOCKED", last_status_change=T4)
    assert (found.state_ms, found.ended_ms) == (iso_ms(T4), None)


@pytest.mark.parametrize("status", ["FAILED", "COMPLETED", "CANCELED"])
def test_an_ended_job_ended_at_its_end_or_else_at_its_last_status_change(status: str) -> None:
    assert seen(status=status, ended=T3, last_status_change=T4).ended_ms == iso_ms(T3)
    assert seen(status=status, ended=None, last_status_change=T4).ended_ms == iso_ms(T4)


@pytest.mark.parametrize("status", ["PENDING", "BLOCKED", "QUEUED", "RUNNING"])
def test_an_active_job_has_no_end_even_if_the_row_shows_one(status: str) -> None:
    assert seen(status=status, ended=T3).ended_ms is None


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("2018-01-16T15:00:01Z", 1_516_114_801_000),
        ("2018-01-16T15:00:01.123Z", 1_516_114_801_123),
        ("2018-01-16T15:00:01.123999Z", 1_516_114_801_123),
        ("2018-01-16T16:00:01+01:00", 1_516_114_801_000),
        (None, None),
        ("", None),
        ("yesterday", None),
    ],
)
def test_timestamps_have_no_three_or_six_digits_of_fraction(
    text: str | None, ms: int | None
) -> None:
    assert seen(started=text).started_ms == ms


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            {"id": 1, "name": "mem", "title": "Memory", "description": "Out of memory."},
            Problem("mem", "Out of memory."),
        ),
        ({"name": "mem", "title": "Memory", "description": ""}, Problem("mem", "Memory")),
        ({"name": "mem", "title": None}, Problem("mem", "mem")),
        ({"id": 7}, Problem(None, "error 7")),
        (7, Problem(None, "error 7")),
        ({}, None),
        (None, None),
    ],
)
def test_the_error_of_a_failed_job_is_told_in_the_best_words_there_are(
    error: object, problem: Problem | None
) -> None:
    assert seen(status="FAILED", error=error).problem == problem
    assert seen(status="RUNNING", error=error).problem is None


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"node": {"id": 4, "hostname": "host-4"}}, {"node": "host-4"}),
        ({"node": {"id": 4}}, {"node": 4}),
        ({"node": 4}, {"node": 4}),
        ({"recipe": {"id": 5, "recipe_type": {"id": 6}}, "batch": 8}, {"recipe": 5, "batch": 8}),
        ({"max_tries": 3}, {"max_tries": 3}),
    ],
)
def test_detail_has_what_is_given_as_an_object_or_an_id(
    changes: dict[str, Any], detail: dict[str, Any]
) -> None:
    assert seen(**changes).detail == {"num_exes": 1, "job_type_version": "1.0.0"} | detail


@pytest.mark.parametrize("job_type", [None, 5, {}, {"name": ""}])
def test_a_job_without_a_named_type_has_no_name(job_type: object) -> None:
    assert seen(job_type=job_type).job == Job(id="3")


def test_a_row_of_an_older_version_may_lack_all_but_id_and_status() -> None:
    page = parse(feed_question(), listing({"id": 3, "status": "COMPLETED"}))
    (found,) = page.runs
    assert (found.state, found.marker, found.detail) == (State.SUCCEEDED, None, {})
    assert (found.queued_ms, found.started_ms, found.ended_ms) == (None, None, None)


# Unchanged rows


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"last_modified": T4}, True),
        ({"is_superseded": True, "input_file_size": 9.0}, True),
        ({"status": "COMPLETED"}, False),
        ({"num_exes": 2}, False),
        ({"queued": T3}, False),
        ({"started": T3}, False),
        ({"ended": T3}, False),
        ({"last_status_change": T3}, False),
    ],
)
def test_a_row_is_read_again_only_if_something_that_matters_changed(
    changes: dict[str, Any], same: bool
) -> None:
    index = Index()
    known = remember(index, seen())
    page = parse(feed_question(), listing(row(**changes)), memory(index=index))
    assert list(page.shown) == ([known] if same else [])
    assert len(page.runs) == (0 if same else 1)


def test_a_vanished_run_that_is_back_unchanged_is_read_again() -> None:
    index = Index()
    index.put(msgspec.structs.replace(remember(index, seen()), vanished=True), 1)
    page = parse(feed_question(), listing(row()), memory(index=index))
    assert (len(page.runs), page.shown) == (1, [])


# Asking for the list


def test_first_contact_asks_for_active_jobs_and_then_for_the_feed() -> None:
    (first,) = VENDOR.start(OPTIONS, memory())
    assert first.path == "/v6/jobs/"
    assert query(first) == {
        "status": ["PENDING", "BLOCKED", "QUEUED", "RUNNING"],
        "order": ["id"],
        "page": ["1"],
        "page_size": ["1000"],
    }
    page = parse(first, listing(row()))
    assert (page.marks, page.complete) == ({}, None)
    (feed,) = page.follow
    assert query(feed) == {
        "started": ["2014-05-13T16:53:20.000Z"],
        "order": ["last_modified", "id"],
        "page": ["1"],
        "page_size": ["1000"],
    }
    assert ("Accept", "application/json") in first.headers


def test_a_poll_asks_for_what_changed_since_the_mark_with_an_overlap() -> None:
    (request,) = VENDOR.start(OPTIONS, memory({MARK: str(iso_ms("2018-01-16T15:00:00.123Z"))}))
    assert query(request)["started"] == ["2018-01-16T14:59:00.123Z"]
    assert not request.by_id


def test_the_feed_asks_for_no_time_before_1970() -> None:
    (request,) = VENDOR.start(OPTIONS, memory({MARK: "0"}))
    assert query(request)["started"] == ["1970-01-01T00:00:00.001Z"]


def test_the_mark_is_the_last_change_that_was_read() -> None:
    page = parse(feed_question(), listing(row(last_modified=T1), row(last_modified=T2)))
    assert page.marks == {MARK: str(iso_ms(T2))}
    assert (page.follow, page.complete) == ((), None)


@pytest.mark.parametrize(
    "response",
    [listing(), listing(row(last_modified=T1)), listing(row(last_modified=None))],
    ids=["nothing new", "only the overlap", "no instant"],
)
def test_the_mark_never_goes_back(response: Response) -> None:
    marks = {MARK: str(iso_ms(T4))}
    request = VENDOR.start(OPTIONS, memory(marks))[0]
    assert parse(request, response, memory(marks)).marks == marks


@pytest.mark.parametrize("ahead", ["2030-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_a_clock_that_runs_ahead_does_not_carry_the_mark_past_our_own(ahead: str) -> None:
    page = parse(feed_question(), listing(row(last_modified=ahead)))
    assert page.marks == {MARK: str(NOW_MS)}
    page = parse(feed_question(), listing(row(last_modified=ahead), following="more"))
    assert query(page.follow[0])["started"] == ["2020-09-13T12:26:40.000Z"]


def test_after_a_full_page_the_feed_goes_on_from_its_last_row() -> None:
    page = parse(feed_question(), listing(row(last_modified=T1), following="https://x/?page=2"))
    (following,) = page.follow
    assert query(following) == {
        "started": ["2018-01-16T15:00:01.000Z"],
        "order": ["last_modified", "id"],
        "page": ["1"],
        "page_size": ["1000"],
    }
    assert page.marks == {}


def test_a_full_page_is_never_the_last_whatever_it_says() -> None:
    rows = [row(id=number, last_modified=T1) for number in range(1, PAGE_SIZE + 1)]
    page = parse(feed_question(), listing(*rows))
    assert len(page.follow) == 1
    assert len(parse(feed_question(), listing(*rows[:-1], {})).follow) == 1
    assert parse(feed_question(), listing(*rows[:-1])).follow == ()


def test_more_rows_of_one_instant_than_fit_a_page_are_read_by_number() -> None:
    first = parse(feed_question(), listing(row(last_modified=T1), following="more")).follow[0]
    second = parse(first, listing(row(last_modified=T1), following="more")).follow[0]
    third = parse(second, listing(row(last_modified=T1), following="more")).follow[0]
    assert [query(request)["page"] for request in (first, second, third)] == [["1"], ["2"], ["3"]]
    assert query(third)["started"] == query(first)["started"]
    last = parse(third, listing(row(last_modified=T2), following="more")).follow[0]
    assert (query(last)["page"], query(last)["started"]) == (["1"], ["2018-01-16T15:00:02.000Z"])


def test_a_list_that_became_shorter_while_it_was_read_has_ended() -> None:
    request = parse(feed_question(), listing(following="more")).follow[0]
    assert query(request)["page"] == ["2"]
    page = parse(request, answer('{"detail": "Invalid page."}', 404))
    assert (page.runs, page.follow, page.marks) == ([], (), {MARK: str(SINCE_MS)})
    request = parse(active_question(), listing(row(), following="more")).follow[0]
    page = parse(request, answer('{"detail": "Invalid page."}', 404))
    assert "started" in query(page.follow[0])


def test_the_active_jobs_are_read_by_page_number() -> None:
    request = parse(active_question(), listing(row(), following="more")).follow[0]
    assert query(request)["page"] == ["2"]
    assert query(request)["status"] == ["PENDING", "BLOCKED", "QUEUED", "RUNNING"]


@pytest.mark.parametrize("question", [active_question(), feed_question()])
def test_a_list_that_never_ends_is_given_up(question: Request) -> None:
    endless = listing(row(), following="more")
    while int(query(question)["page"][0]) < MOST_PAGES:
        (question,) = parse(question, endless).follow
    with pytest.raises(Invalid, match="does not end"):
        parse(question, endless)


def test_a_server_that_ignores_the_time_asked_for_is_read_to_its_end() -> None:
    instants = [T1, T2, T3, T4]

    def stubborn(request: Request) -> Response:
        number = int(query(request)["page"][0])
        following = "more" if number < len(instants) else None
        return listing(row(id=number, last_modified=instants[number - 1]), following=following)

    pages = read(VENDOR, OPTIONS, memory({MARK: "1"}), stubborn)
    assert {found.run_id for found in runs(pages)} == {"1", "2", "3", "4"}
    assert pages[-1].marks == {MARK: str(iso_ms(T4))}


# What the feed does not show


def test_a_job_is_asked_for_by_its_id() -> None:
    request = details_question("17")
    assert (request.path, request.by_id) == ("/v6/jobs/17/", True)


def test_a_job_that_was_purged_is_gone() -> None:
    page = parse(details_question("17"), answer('{"detail": "Not found."}', 404))
    assert page.gone == [("17", "17")]
    assert page.runs == ()


@pytest.mark.parametrize(
    "body",
    [
        "<h1>Not Found</h1>",
        '{"detail": "Invalid version in URL path."}',
        '{"detail": null}',
        "[]",
        "",
    ],
)
def test_a_404_that_is_not_about_the_job_says_nothing_of_it(body: str) -> None:
    with pytest.raises(Invalid, match="HTTP 404"):
        parse(details_question(), answer(body, 404))


def test_details_of_an_unchanged_job_show_it_as_it_was() -> None:
    index = Index()
    known = remember(index, seen())
    page = parse(
        details_question(), answer(msgspec.json.encode(row(execution=None))), memory(index=index)
    )
    assert (page.shown, page.runs) == ([known], [])


# Attempts


def told(state: State, num_exes: int) -> Known:
    return known_of(msgspec.structs.replace(seen(num_exes=num_exes), state=state))


@pytest.mark.parametrize(
    ("known", "num_exes", "first"),
    [
        (None, 0, None),
        (None, 1, None),
        (None, 2, 1),
        (told(State.QUEUED, 0), 1, None),
        (told(State.QUEUED, 0), 3, 1),
        (told(State.CANCELED, 0), 1, None),
        (told(State.RUNNING, 1), 1, None),
        (told(State.RUNNING, 1), 2, 1),
        (told(State.UNKNOWN, 1), 2, 1),
        (told(State.RUNNING, 2), 5, 2),
        (told(State.FAILED, 1), 1, None),
        (told(State.FAILED, 1), 2, None),
        (told(State.FAILED, 1), 3, 2),
        (told(State.RUNNING, 3), 2, None),
    ],
)
def test_executions_are_asked_for_where_ends_were_missed(
    known: Known | None, num_exes: int, first: int | None
) -> None:
    present = seen(num_exes=num_exes)
    request = VENDOR.ask(OPTIONS, known, present)
    if first is None:
        assert request is None
        return
    assert request is not None
    assert (request.path, request.by_id) == ("/v6/jobs/3/executions/", True)
    assert query(request) == {"page": ["1"], "page_size": ["1000"]}
    executions = [execution(number) for number in range(num_exes, 0, -1)]
    shown = parse(request, listing(*executions)).runs
    assert [found.ordinal for found in shown] == [*range(first, num_exes), num_exes]
    assert [found.past for found in shown] == [True] * (num_exes - first) + [False]


def test_no_more_than_a_thousand_attempts_are_told_at_once() -> None:
    request = VENDOR.ask(OPTIONS, None, seen(num_exes=2**31 - 1))
    assert request is not None
    shown = listing(*(execution(2**31 - 1 - number) for number in range(3)), following="more")
    (request,) = parse(request, shown).follow
    last = parse(request, listing(execution(2**31 - 1001), execution(2**31 - 1002)))
    ordinals = [found.ordinal for found in last.runs]
    assert ordinals == [2**31 - 1 - number for number in (1000, 2, 1, 0)]


def execution(number: int, status: str = "FAILED", **changes: object) -> dict[str, Any]:
    return {
        "id": 900 + number,
        "status": status,
        "exe_num": number,
        "queued": T1,
        "started": T2,
        "ended": T3,
        "job": {"id": 3},
        "error": {"name": "mem", "description": "Out of memory."},
    } | changes


def test_earlier_attempts_are_told_oldest_first_with_how_they_ended() -> None:
    present = seen(num_exes=4, status="QUEUED")
    page = parse(
        history_question(present),
        listing(
            execution(4, "RUNNING", ended=None, error=None),
            execution(3, "CANCELED", error=None, queued=None, created=T0),
            execution(2, "FAILED"),
            execution(1, "COMPLETED", error=None),
        ),
    )
    assert [(found.state, found.vendor_state, found.marker) for found in page.runs] == [
        (State.SUCCEEDED, "COMPLETED", "1"),
        (State.FAILED, "FAILED", "2"),
        (State.CANCELED, "CANCELED", "3"),
        (State.QUEUED, "QUEUED", "4"),
    ]
    assert page.runs[1].problem == Problem("mem", "Out of memory.")
    assert page.runs[2].queued_ms == iso_ms(T0)
    assert page.runs[3] == present
    assert {found.job for found in page.runs} == {present.job}


def test_an_attempt_whose_execution_has_no_end_or_is_lost_is_left_out() -> None:
    present = seen(num_exes=4)
    page = parse(
        history_question(present),
        listing(execution(3, "RUNNING", ended=None), execution(1), execution(0)),
    )
    assert [found.ordinal for found in page.runs] == [1, 4]


def test_executions_are_read_page_by_page_until_the_one_that_is_known() -> None:
    present = seen(num_exes=6)
    request = history_question(present, told(State.RUNNING, 2))
    first = parse(request, listing(execution(6), execution(5), following="more"))
    assert first.runs == ()
    (request,) = first.follow
    assert query(request)["page"] == ["2"]
    # A seventh execution has begun, so the fifth is shown again.
    second = parse(request, listing(execution(5), execution(4), following="more"))
    (request,) = second.follow
    third = parse(request, listing(execution(3), execution(2), following="more"))
    assert third.follow == ()
    assert [found.ordinal for found in third.runs] == [2, 3, 4, 5, 6]


def test_executions_that_never_end_are_given_up() -> None:
    request = history_question(seen(num_exes=6))
    endless = listing(execution(6), following="more")
    while int(query(request)["page"][0]) < MOST_PAGES:
        (request,) = parse(request, endless).follow
    with pytest.raises(Invalid, match="does not end"):
        parse(request, endless)


def test_a_bad_execution_is_set_aside() -> None:
    present = seen(num_exes=3)
    page = parse(history_question(present), listing(execution(2, exe_num="two"), execution(1)))
    assert [found.ordinal for found in page.runs] == [1, 3]
    assert [bad.at for bad in page.bad] == ["$.results[0].exe_num"]
    page = parse(
        history_question(present),
        listing({"id": 0}, execution(2), following="more"),
    )
    assert [bad.at for bad in page.bad] == ["$.results[0].id"]
    assert len(page.follow) == 1


# Refusals and bad rows

QUESTIONS = {
    "active": active_question(),
    "feed": feed_question(),
    "details": details_question(),
    "history": history_question(seen(num_exes=3)),
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (403, '{"detail": "Authentication credentials were not provided."}', Rejected),
        (403, '{"detail": "Invalid token."}', Rejected),
        (401, "", Rejected),
        (400, '{"detail": "Invalid ISO timestamp format for parameter: started"}', Invalid),
        (404, "<h1>Not Found</h1>", Invalid),
        (405, '{"detail": "Method \\"GET\\" not allowed."}', Invalid),
        (429, "", Limited),
        (500, "<h1>Server Error (500)</h1>", Unreachable),
        (502, "<html>Bad Gateway</html>", Unreachable),
        (503, '{"detail": "Service temporarily unavailable, try again later."}', Unreachable),
        (200, "<html><form>Log in</form></html>", Invalid),
        (200, '{"count": 1, "results": [{"id"', Invalid),
        (200, "", Invalid),
        (200, "[]", Invalid),
        (200, '{"detail": "Not found."}', Invalid),
        (200, '{"results": null}', Invalid),
        (200, "[" * 100_000, Invalid),
    ],
)
def test_every_refusal_has_its_kind(
    question: Request, status: int, body: str, error: type[VendorError]
) -> None:
    with pytest.raises(error):
        parse(question, answer(body, status))


@pytest.mark.parametrize("name", ["active", "feed", "details"])
def test_a_bad_parameter_is_told_in_the_words_of_the_vendor(name: str) -> None:
    body = msgspec.json.encode({"detail": "Invalid ISO timestamp " + "x" * 9999})
    with pytest.raises(Invalid, match=r"^HTTP 400: Invalid ISO timestamp x+$") as caught:
        parse(QUESTIONS[name], answer(body, 400))
    assert len(str(caught.value)) < 300


def test_a_server_that_asks_to_wait_is_heard() -> None:
    with pytest.raises(Limited) as caught:
        parse(feed_question(), answer("", 503, retry_after="30"))
    assert caught.value.retry_after_s == 30


@pytest.mark.parametrize(
    ("bad", "at"),
    [
        ({"status": "RUNNING"}, "$.results[1]"),
        (row(id=None), "$.results[1].id"),
        (row(id="3"), "$.results[1].id"),
        (row(id=0), "$.results[1].id"),
        (row(id=True), "$.results[1].id"),
        (row(id=2**63), "$.results[1].id"),
        (row(status=None), "$.results[1].status"),
        (row(status="x" * 1025), "$.results[1].status"),
        (row(job_type={"name": "x" * 1025}), "$.results[1].job_type.name"),
        (row(num_exes=-1), "$.results[1].num_exes"),
        (row(num_exes=2**31), "$.results[1].num_exes"),
        (row(error={"name": 5}), "$.results[1].error.name"),
        (row(node="host"), "$.results[1].node"),
        (row(started=1516114801), "$.results[1].started"),
        ("text", "$.results[1]"),
        (None, "$.results[1]"),
    ],
)
def test_a_bad_row_is_set_aside_with_its_place_and_the_rest_is_read(bad: object, at: str) -> None:
    page = parse(feed_question(), listing(row(id=1), bad, row(id=2, last_modified=T4)))
    assert [found.run_id for found in page.runs] == ["1", "2"]
    assert [found.at for found in page.bad] == [at]
    assert page.bad[0].why
    assert page.marks == {MARK: str(iso_ms(T4))}


def test_bad_details_are_no_answer() -> None:
    with pytest.raises(Invalid, match="id"):
        parse(details_question(), answer(msgspec.json.encode(row(id="x"))))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from([*row(), "exe_num", "max_tries", "recipe", "batch"])
DOCUMENTS = JSON | st.fixed_dictionaries(
    {"results": st.lists(st.dictionaries(FIELDS, JSON) | st.builds(row, id=JSON), max_size=4)},
    optional={"next": JSON, "detail": JSON},
)


def _bodies() -> st.SearchStrategy[bytes]:
    encodable = DOCUMENTS.filter(_encodes)
    return st.binary() | encodable.map(msgspec.json.encode)


def _encodes(document: object) -> bool:
    try:
        msgspec.json.encode(document)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
@given(status=st.sampled_from([200, 200, 200, 400, 403, 404, 500]), body=_bodies())
@settings(max_examples=200, deadline=None)
def test_whatever_a_server_answers_only_vendor_errors_are_raised(
    question: Request, status: int, body: bytes
) -> None:
    try:
        page = parse(question, answer(body, status))
    except VendorError:
        return
    for found in page.runs:
        assert found.job.id == found.run_id != ""
    for request in page.follow:
        assert request.target


# The simulated server


def crowd(count: int, step_ms: Ms = 1) -> World:
    """A world of running jobs, each changed so much later than the one before."""
    world = World(kinds=VENDOR.kinds, jobs=1, now_ms=NOW_MS - 3_600_000, pace=1000.0)
    for _ in range(count):
        run = world.start(world.definitions[0])
        world.now_ms += step_ms
        world.move(run, State.RUNNING)
    return world


def ask_server(world: World, path: str, *pairs: tuple[str, str]) -> tuple[int, Any]:
    response = VENDOR.render(world, Request(path=path, query=pairs))
    if response.headers.get("content-type") != "application/json":
        return response.status, response.body
    return response.status, msgspec.json.decode(response.body)


def ids_of(world: World, *pairs: tuple[str, str]) -> list[int]:
    status, document = ask_server(world, "/v6/jobs/", *pairs)
    assert status == 200
    return [found["id"] for found in document["results"]]


def test_the_server_pages_with_absolute_links_and_at_most_a_thousand_rows() -> None:
    world = crowd(1001)
    status, document = ask_server(world, "/v6/jobs/", ("status", "RUNNING"), ("page_size", "5000"))
    assert (status, document["count"], len(document["results"])) == (200, 1001, 1000)
    assert document["previous"] is None
    link = urlsplit(document["next"])
    assert (link.scheme, link.path) == ("http", "/api/v6/jobs/")
    assert parse_qs(link.query) == {"status": ["RUNNING"], "page_size": ["5000"], "page": ["2"]}
    assert len(ids_of(world)) == 100
    assert len(ids_of(world, ("page_size", "none"))) == 100
    _, document = ask_server(world, "/v6/jobs/", ("page", "11"))
    assert (len(document["results"]), document["next"]) == (1, None)
    assert document["previous"].endswith("page=10")


@pytest.mark.parametrize("page", ["2", "0", "x"])
def test_the_server_has_no_page_past_the_end(page: str) -> None:
    answered = ask_server(crowd(3), "/v6/jobs/", ("page", page))
    assert answered == (404, {"detail": "Invalid page."})


def test_an_empty_list_has_one_page() -> None:
    status, document = ask_server(crowd(0), "/v6/jobs/", ("page", "1"))
    assert (status, document) == (200, {"count": 0, "next": None, "previous": None, "results": []})


@pytest.mark.parametrize(
    ("pairs", "detail"),
    [
        (
            [("started", "2018-01-16T15:00:00")],
            "Invalid ISO timestamp format for parameter: started",
        ),
        ([("ended", "soon Z")], "Invalid ISO timestamp format for parameter: ended"),
        ([("started", T1), ("ended", T1)], "Start and end values must be different"),
        ([("job_id", "x")], 'Parameter must be a valid integer: "job_id"'),
    ],
)
def test_the_server_refuses_bad_parameters(pairs: list[tuple[str, str]], detail: str) -> None:
    assert ask_server(crowd(1), "/v6/jobs/", *pairs) == (400, {"detail": detail})


def test_the_server_breaks_at_an_order_it_does_not_know() -> None:
    answered = ask_server(crowd(1), "/v6/jobs/", ("order", "colour"))
    assert answered == (500, b"<h1>Server Error (500)</h1>")


@pytest.mark.parametrize("path", ["/v6/jobs", "/v5/jobs/", "/v6/jobs/x/", "/v6/queue/"])
def test_the_server_knows_no_other_paths(path: str) -> None:
    assert ask_server(crowd(1), path) == (404, b"<h1>Not Found</h1>")


def test_the_server_knows_no_other_jobs() -> None:
    world = crowd(1)
    assert ask_server(world, "/v6/jobs/2/") == (404, {"detail": "Not found."})
    assert ask_server(world, "/v6/jobs/2/executions/")[1]["results"] == []
    assert ask_server(world, "/v7/jobs/1/")[1]["id"] == 1


def test_the_server_filters_by_last_change_inclusively_by_status_and_by_id() -> None:
    world = crowd(4)
    instants = [run.now.changed_ms for run in world.runs.values()]
    middle = [_iso(instants[1]), _iso(instants[2])]
    assert ids_of(world, ("started", middle[0]), ("ended", middle[1])) == [2, 3]
    assert ids_of(world, ("started", middle[1])) == [3, 4]
    assert ids_of(world, ("job_id", "4"), ("job_id", "1")) == [1, 4]
    world.move(world.runs[2], State.FAILED)
    assert ids_of(world, ("status", "FAILED"), ("status", "CANCELED")) == [2]
    assert ids_of(world, ("status", "NONSENSE")) == []


def test_the_server_orders_by_last_change_or_by_any_fields_nulls_last() -> None:
    world = crowd(4)
    world.now_ms += 10_001
    world.move(world.runs[2], State.FAILED)
    world.now_ms += 10_000
    world.move(world.runs[1], State.FAILED)
    assert ids_of(world) == [3, 4, 2, 1]
    assert ids_of(world, ("order", "-id")) == [4, 3, 2, 1]
    assert ids_of(world, ("order", "status"), ("order", "-id")) == [2, 1, 4, 3]
    assert ids_of(world, ("order", "ended"), ("order", "id")) == [2, 1, 3, 4]


def test_the_server_writes_fractions_of_no_three_or_six_digits() -> None:
    world = crowd(1)
    run = world.runs[1]
    texts = []
    for changed_ms in (1_516_114_801_000, 1_516_114_801_123, 1_516_114_801_124):
        run.now.changed_ms = changed_ms
        texts.append(ask_server(world, "/v6/jobs/1/")[1]["last_modified"])
    assert texts == [
        "2018-01-16T15:00:01Z",
        "2018-01-16T15:00:01.123Z",
        "2018-01-16T15:00:01.124000Z",
    ]


def _iso(ms: Ms) -> str:
    (request,) = VENDOR.start(OPTIONS, memory({MARK: str(ms + OVERLAP_MS)}))
    return query(request)["started"][0]


# A world read back


@pytest.mark.parametrize(
    ("step_ms", "count"), [(1, 3), (0, 4)], ids=["one by one", "all at one instant"]
)
def test_a_crowd_is_read_whole_over_several_pages(step_ms: Ms, count: int) -> None:
    world = crowd(2500, step_ms)
    marks = {MARK: str(NOW_MS - 3_600_000)}
    pages = read(VENDOR, OPTIONS, memory(marks), serve(VENDOR, world))
    assert {found.run_id for found in runs(pages)} == {str(number) for number in world.runs}
    newest = max(run.now.changed_ms for run in world.runs.values())
    assert [page.marks for page in pages] == [{}] * (count - 1) + [{MARK: str(newest)}]


def test_a_job_that_changes_while_the_feed_is_read_hides_no_other() -> None:
    world = crowd(1500)
    asked = 0

    def restless(request: Request) -> Response:
        nonlocal asked
        response = VENDOR.render(world, request)
        asked += 1
        if asked == 1:
            world.now_ms += 1000
            world.move(world.runs[1], State.SUCCEEDED)
        return response

    pages = read(VENDOR, OPTIONS, memory({MARK: str(NOW_MS - 3_600_000)}), restless)
    found = runs(pages)
    assert {shown.run_id for shown in found} == {str(number) for number in world.runs}
    assert found[-1].run_id == "1"
    assert found[-1].state is State.SUCCEEDED


def test_a_world_is_read_as_it_is_at_every_step() -> None:
    world = World(kinds=VENDOR.kinds, seed=7, jobs=12, now_ms=NOW_MS)
    server = serve(VENDOR, world)
    index, marks = Index(), dict[str, str]()
    retold = 0
    shown_states = set()
    for step in range(1, 120):
        world.advance(NOW_MS + 4000 * step)
        first = not marks
        view = dataclasses.replace(
            memory(marks, index), now_ms=world.now_ms, since_ms=NOW_MS - 1000
        )
        for page in read(VENDOR, OPTIONS, view, server):
            assert page.bad == []
            marks.update(page.marks)
            for found in page.runs:
                shown_states.add(found.vendor_state)
                known = view.get(found.job.id, found.run_id)
                request = None if first else VENDOR.ask(OPTIONS, known, found)
                if request is not None:
                    retold += 1
                    told_now = parse(request, server(request), view)
                    _same_history(world.runs[int(found.run_id)], list(told_now.runs), known)
                remember(index, found)
        for run in world.runs.values():
            _same(run, index.runs[str(run.number)])
    assert retold > 3
    assert shown_states == {
        "PENDING",
        "BLOCKED",
        "QUEUED",
        "RUNNING",
        "FAILED",
        "COMPLETED",
        "CANCELED",
    }
    _deleted_ones_are_gone(world, index, server)


def _same(run: SimRun, known: Known) -> None:
    now = run.now
    assert known.state is now.state
    assert known.job.name == run.definition.name
    assert known.queued_ms == now.queued_ms
    assert known.started_ms == now.started_ms
    assert known.ended_ms == now.ended_ms
    assert known.marker in (str(now.number), None)
    assert known.marker is not None or (now.number == 1 and now.started_ms is None)


def _same_history(run: SimRun, told: list[Seen], known: Known | None) -> None:
    *past, present = told
    ended = known is not None and known.state in TERMINAL
    first = int(known.marker or 1) + ended if known is not None else 1
    earlier = run.attempts[first - 1 : -1]
    assert [found.ordinal for found in told] == [
        attempt.number for attempt in run.attempts[first - 1 :]
    ]
    for found, attempt in zip(past, earlier, strict=True):
        assert found.past
        assert (found.state, found.queued_ms) == (attempt.state, attempt.queued_ms)
        assert (found.started_ms, found.ended_ms) == (attempt.started_ms, attempt.ended_ms)
        message = found.problem.message if found.problem is not None else None
        assert message == attempt.problem
    assert not present.past


def _deleted_ones_are_gone(
    world: World, index: Index, server: Callable[[Request], Response]
) -> None:
    lost = [known for known in index.active() if int(known.run_id) not in world.runs]
    assert lost
    for known in index.active():
        request = VENDOR.settle(OPTIONS, known)
        assert request is not None
        page = parse(request, server(request), memory(index=index))
        assert page.gone == ([(known.job.id, known.run_id)] if known in lost else ())
        assert page.shown == (() if known in lost else [known])
