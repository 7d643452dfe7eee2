"""CDM: the list of jobs, their last runs, their histories, and what goes wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.known import Index, Known, Memory
from poller.runs import TERMINAL, Job, Ms, Problem, Seen, State
from poller.vendors.cdm import VENDOR, Options
from poller.vendors.cdm.rows import WORDS
from poller.wire import Page, Request, Response
from poller.world import World
from tests.support import Answer, answer, fixture, read, remember, runs, serve

NOW = 1_700_000_000_000
BASE = "/v1.1/p1/clusters/c1/cdm"
COUNTERS = "org.apache.sqoop.submission.counter.SqoopCounters"
OPTIONS = Options(project_id="p1", cluster_id="c1")
NAMED = Options(project_id="p1", cluster_id="c1", jobs=("etl",))
NO_SUCH_JOB = {"errCode": "Cdm.0100", "externalMessage": "Job[etl] doesn't exist."}


def memory(
    index: Index | None = None,
    *,
    now_ms: Ms = NOW,
    last_good_ms: Ms | None = NOW - 1000,
    marks: Mapping[str, str] = {},
) -> Memory:
    """A view of a source, after first contact if there was a good poll."""
    return Memory(
        now_ms=now_ms,
        contact_ms=NOW - 10_000,
        last_good_ms=last_good_ms,
        marks=marks,
        index=index if index is not None else Index(),
    )


FIRST_VIEW = memory(last_good_ms=None)


def run(number: int, status: str, **more: object) -> dict[str, Any]:
    """A submission of the job `etl` that was created `number` seconds after NOW."""
    row = {
        "job-name": "etl",
        "submission-id": number,
        "status": status,
        "creation-date": NOW + 1000 * number,
        "execute-date": NOW + 1000 * number + 100,
        "last-update-date": NOW + 1000 * number + 500,
    }
    return {k: v for k, v in (row | {k.replace("_", "-"): v for k, v in more.items()}).items() if v}


def row(number: int, status: str, name: str = "etl") -> dict[str, Any]:
    """The row of a job whose last run is that one."""
    begun = NOW + 1000 * number
    return {
        "name": name,
        "status": status,
        "execute_create_date": begun,
        "execute_start_date": begun + 100,
        "execute_update_date": begun + 500,
    }


def submissions(*rows: object) -> Response:
    return answer(json.dumps({"submissions": rows}))


def listing(*rows: object, **more: object) -> Response:
    size = max(100, len(rows))
    return answer(json.dumps({"jobs": rows, "total": len(rows), "page_size": size} | more))


def server(
    jobs: list[Any] | None = None, last: object = None, history: list[Any] | Response | None = None
) -> Answer:
    """Serves one page of NORMAL_JOBs, and the same last run and history for each job."""

    def ask(request: Request) -> Response:
        if request.path.endswith("/job/all"):
            return (
                listing(*(jobs or [])) if ("jobType", "NORMAL_JOB") in request.query else listing()
            )
        if request.path.endswith("/status"):
            return last if isinstance(last, Response) else submissions(last)
        assert request.path.endswith("/submissions")
        return history if isinstance(history, Response) else submissions(*(history or []))

    return ask


def marks(pages: list[Page], before: Mapping[str, str] = {}) -> dict[str, str]:
    found = dict(before)
    for page in pages:
        found |= page.marks
    return {key: text for key, text in found.items() if text}


def asked(pages: list[Page]) -> list[str]:
    """What followed: paths below the base."""
    return [request.target.removeprefix(BASE) for page in pages for request in page.follow]


def status_request(name: str = "etl", options: Options = OPTIONS) -> Request:
    """The question for the last run of a listed job."""
    start = VENDOR.start(options, memory())[0]
    return VENDOR.parse(options, start, listing(row(1, "RUNNING", name)), memory()).follow[0]


def told(seen: Seen) -> tuple[str, State]:
    return seen.run_id, seen.state


def see(submission: dict[str, Any], view: Memory | None = None) -> Page:
    """What the answer for a job's last run shows."""
    return VENDOR.parse(OPTIONS, status_request(), submissions(submission), view or FIRST_VIEW)


class Poller:
    """Polls again and again, and remembers as the loop does."""

    def __init__(
        self, options: Options = OPTIONS, *, publish_all: bool = False, rate_per_s: float = 2.0
    ) -> None:
        self.options, self.publish_all, self.rate_per_s = options, publish_all, rate_per_s
        self.index = Index()
        self.marks: dict[str, str] = {}
        self.now: Ms = NOW
        self.last_good: Ms | None = None

    def poll(self, serve: Answer, after_s: int = 15) -> list[Page]:
        self.now += 1000 * after_s
        view = Memory(
            now_ms=self.now,
            contact_ms=NOW,
            last_good_ms=self.last_good,
            publish_all=self.publish_all,
            rate_per_s=self.rate_per_s,
            marks=self.marks,
            index=self.index,
        )
        pages = read(VENDOR, self.options, view, serve)
        for page in pages:
            for known in page.shown:
                self.index.shown([known], self.now)
            for seen in page.runs:
                remember(self.index, seen, at_ms=self.now)
        self.marks, self.last_good = marks(pages, self.marks), self.now
        return pages

    def unseen(self) -> list[str]:
        """Runs that seem to have left the list of NORMAL_JOBs."""
        return [known.run_id for known in self.index.unseen("NORMAL_JOB", self.now)]


# --- words


@pytest.mark.parametrize(
    ("word", "state", "substate", "unmapped"),
    [
        ("PENDING", State.QUEUED, None, False),
        ("BOOTING", State.STARTING, None, False),
        ("RUNNING", State.RUNNING, None, False),
        ("SUCCEEDED", State.SUCCEEDED, None, False),
        ("FAILED", State.FAILED, None, False),
        ("FAILURE_ON_SUBMIT", State.FAILED, "never_started", False),
        ("UNKNOWN", State.UNKNOWN, None, False),
        ("STOPPED", State.CANCELED, None, False),
        ("stopped", State.CANCELED, None, False),
        (" Succeeded\n", State.SUCCEEDED, None, False),
        ("HIBERNATING", State.UNKNOWN, None, True),
    ],
)
def test_every_word_has_its_meaning(
    word: str, state: State, substate: str | None, unmapped: bool
) -> None:
    (seen,) = see(run(7, word)).runs
    assert (seen.state, seen.substate, seen.unmapped) == (state, substate, unmapped)
    assert seen.vendor_state == word


@pytest.mark.parametrize("word", ["NEW", "NEVER_EXECUTED", " new ", "Never_Executed"])
def test_a_job_that_never_ran_has_no_run(word: str) -> None:
    page = see(run(7, word))
    assert (page.runs, page.shown, page.bad, page.follow) == ([], [], [], ())


def test_the_words_are_all_that_the_table_above_lists() -> None:
    assert len(WORDS) == 8


# --- recorded answers


@pytest.mark.parametrize(
    ("name", "run_id", "fields"),
    [
        (
            "huawei_start_job_full.json",
            "1",
            {
                "state": State.STARTING,
                "queued_ms": 1588129202631,
                "started_ms": 1588129202662,
                "ended_ms": None,
                "progress": 0.0,
                "detail": {},
            },
        ),
        (
            "otc_query_job_status_1.json",
            "1536905778725",
            {"state": State.STARTING, "progress": 0.01},
        ),
        ("otc_start_job_1.json", "1536905778725", {"queued_ms": 1536905778725, "started_ms": None}),
        ("otc_submissions_history_1.json", "1536905778725", {"vendor_state": "BOOTING"}),
        ("seed_status_1.json", "1536905778725", {"state": State.STARTING, "progress": None}),
        (
            "seed_status_2.json",
            "1536906582997",
            {
                "state": State.SUCCEEDED,
                "queued_ms": 1536906582997,
                "started_ms": None,
                "ended_ms": 1536916580005,
                "problem": None,
                "detail": {
                    "rows_read": 80,
                    "rows_written": 80,
                    "external_id": "job_local1127970451_0009",
                },
            },
        ),
    ],
)
def test_a_recorded_run_is_read(name: str, run_id: str, fields: dict[str, Any]) -> None:
    body = fixture(f"cdm/{name}")
    job = json.loads(body)["submissions"][0]["job-name"]
    page = VENDOR.parse(OPTIONS, status_request(job), answer(body), FIRST_VIEW)
    (seen,) = page.runs
    assert (seen.run_id, seen.job.id, seen.job.name) == (run_id, job, job)
    assert seen.job.owner in {"cdm", "op_svc_cdm"}
    assert {field: getattr(seen, field) for field in fields} == fields
    assert not page.bad


def test_the_recorded_list_without_states_has_every_job_asked() -> None:
    start = VENDOR.start(OPTIONS, memory())[0]
    page = VENDOR.parse(OPTIONS, start, answer(fixture("cdm/otc_query_jobs_all_1.json")), memory())
    (request,) = page.follow
    assert request.path == f"{BASE}/job/es_css/status"
    assert (request.by_id, request.spread) == (True, False)
    assert (page.complete, page.bad) == ("NORMAL_JOB", [])


def test_a_recorded_run_cut_before_its_status_is_set_aside() -> None:
    body = fixture("cdm/huawei_submissions_history_partial.json")
    page = VENDOR.parse(OPTIONS, status_request("TEST"), answer(body), memory())
    (bad,) = page.bad
    assert bad.at == "$.submissions[0]"
    assert "status" in bad.why
    assert (page.runs, page.marks) == ([], {})


@pytest.mark.parametrize(
    ("name", "status"), [("otc_error_1.json", 400), ("otc_delete_job_error500_1.json", 500)]
)
def test_the_recorded_errors_say_that_there_is_no_such_job(name: str, status: int) -> None:
    index = Index()
    seen = see(run(7, "RUNNING")).runs[0]
    remember(index, seen)
    page = VENDOR.parse(
        OPTIONS, status_request(), answer(fixture(f"cdm/{name}"), status), memory(index)
    )
    assert page.gone == [("etl", "7")]


# --- a run's fields


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (1536905778725, 1536905778725),
        (" 1536905778725", 1536905778725),
        (1536905778725.5, 1536905778725),
        ("2018-09-14T06:16:18.725Z", 1536905778725),
        (0, None),
        (-1, None),
        ("", None),
        (None, None),
        ("soon", None),
    ],
)
def test_a_time_comes_in_many_forms(value: object, ms: int | None) -> None:
    submission = {"status": "FAILED", "submission-id": 7, "creation-date": value}
    submission |= {"execute-date": value, "last-update-date": value}
    (seen,) = see(submission).runs
    assert (seen.queued_ms, seen.started_ms, seen.ended_ms) == (ms, ms, ms)


@pytest.mark.parametrize("word", ["PENDING", "BOOTING", "RUNNING", "UNKNOWN", "HIBERNATING"])
def test_the_last_update_is_an_end_only_once_the_run_has_ended(word: str) -> None:
    assert see(run(7, word)).runs[0].ended_ms is None


def test_a_run_that_failed_to_be_submitted_never_started() -> None:
    (seen,) = see(run(7, "FAILURE_ON_SUBMIT")).runs
    assert (seen.started_ms, seen.ended_ms) == (None, NOW + 7500)


@pytest.mark.parametrize(
    ("value", "progress"),
    [
        (0, 0.0),
        (45.5, 0.455),
        (100, 1.0),
        (250, 1.0),
        (-1, None),
        (-1.0, None),
        ("45", None),
        (None, None),
        (10**400, 1.0),
    ],
)
def test_progress_is_per_cent(value: object, progress: float | None) -> None:
    assert see(run(7, "RUNNING") | {"progress": value}).runs[0].progress == progress


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"error-summary": "no space", "error-details": "java.io…"}, Problem(None, "no space")),
        ({"error-details": "java.io…"}, Problem(None, "java.io…")),
        ({"error-summary": "", "error-details": ""}, None),
        ({"error-summary": {"a": 1}}, None),
        ({}, None),
    ],
)
def test_a_failed_run_says_why(fields: dict[str, Any], problem: Problem | None) -> None:
    assert see(run(7, "FAILED") | fields).runs[0].problem == problem


def test_only_a_failed_run_has_a_problem() -> None:
    assert see(run(7, "STOPPED", error_summary="stopped by user")).runs[0].problem is None


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        (
            {
                "counters": {
                    COUNTERS: {"ROWS_READ": 5, "ROWS_WRITTEN": "4", "BYTES_READ": -1, "X": 1},
                    "another.group": {"BYTES_READ": 3},
                }
            },
            {"rows_read": 5, "rows_written": 4},
        ),
        (
            {"write_rows": 3, "update_rows": 0, "delete_rows": "2"},
            {"write_rows": 3, "delete_rows": 2},
        ),
        ({"external-id": "job_1"}, {"external_id": "job_1"}),
        ({"external-id": ""}, {}),
        ({"counters": [], "write_rows": True}, {}),
        ({"counters": {COUNTERS: "none"}, "write_rows": 2**70}, {}),
        ({"counters": {COUNTERS: {"ROWS_READ": "many", "FILES_READ": "9" * 30}}}, {}),
        ({"inputs": "secret", "error-details": "long"}, {}),
    ],
)
def test_the_counters_worth_having_are_kept(fields: dict[str, Any], detail: dict[str, Any]) -> None:
    assert see(run(7, "SUCCEEDED") | fields).runs[0].detail == detail


def test_a_run_belongs_to_the_job_and_the_group_that_the_list_shows() -> None:
    pages = Poller().poll(server([row(1, "RUNNING") | {"group_name": "g"}], run(1, "RUNNING")))
    (seen,) = runs(pages)
    assert seen.job == Job(id="etl", name="etl", group="g", owner=None)
    assert seen.scope == "NORMAL_JOB"


# --- questions


def test_all_three_sorts_of_jobs_are_listed() -> None:
    requests = VENDOR.start(OPTIONS, memory())
    assert [request.target for request in requests] == [
        f"{BASE}/job/all?jobType={kind}&page_no=1&page_size=100"
        for kind in ("NORMAL_JOB", "BATCH_JOB", "SCENARIO_JOB")
    ]
    assert all(("Content-Type", "application/json") in request.headers for request in requests)
    assert not any(request.by_id for request in requests)


def test_names_are_encoded_as_one_segment() -> None:
    options = Options(project_id="p/1", cluster_id="c 1")
    request = status_request("a/b ü?.", options)
    assert request.path == "/v1.1/p%2F1/clusters/c%201/cdm/job/a%2Fb%20%C3%BC%3F./status"


def test_the_options_take_a_list_and_no_empty_name() -> None:
    assert Options.model_validate({"project_id": "p", "cluster_id": "c", "jobs": ["a"]}).jobs == (
        "a",
    )
    for wrong in ({"jobs": [""]}, {"jobs": "a"}, {"jobs": [1]}, {"cluster_id": ""}, {"x": 1}):
        with pytest.raises(pydantic.ValidationError):
            Options.model_validate({"project_id": "p", "cluster_id": "c"} | wrong)


def test_nothing_is_asked_before_a_change_is_told() -> None:
    assert VENDOR.ask(OPTIONS, None, see(run(7, "RUNNING")).runs[0]) is None


# --- the list


def paged(
    jobs: list[Any], size: int = 100, *, total: bool = True, deaf: bool = False
) -> tuple[Answer, list[int]]:
    """Serves these jobs in pages, and notes which pages were asked for."""
    pages = []

    def ask(request: Request) -> Response:
        query = dict(request.query)
        if query["jobType"] != "NORMAL_JOB":
            return listing()
        number = 1 if deaf else int(query["page_no"])
        pages.append(int(query["page_no"]))
        part = jobs[(number - 1) * size : number * size]
        more = (
            {"total": len(jobs), "page_size": size} if total else {"total": None, "page_size": None}
        )
        return listing(*part, **more)

    return ask, pages


@pytest.mark.parametrize(
    ("count", "how", "numbers"),
    [
        (0, {}, [1]),
        (1, {}, [1]),
        (100, {}, [1]),
        (101, {}, [1, 2]),
        (250, {}, [1, 2, 3]),
        (25, {"size": 10}, [1, 2, 3]),
        (150, {"total": False}, [1, 2, 3]),
        (100, {"total": False}, [1, 2]),
        (150, {"deaf": True}, [1, 2]),
        (150, {"deaf": True, "total": False}, [1, 2]),
    ],
)
def test_the_pages_of_the_list_are_read_to_the_end(
    count: int, how: dict[str, Any], numbers: list[int]
) -> None:
    ask, pages = paged([row(1, "NEW", f"job{number}") for number in range(count)], **how)
    seen_marks = {f"job{number}": "" for number in range(count)}
    view = memory(marks=seen_marks)
    everything = [page for page in read(VENDOR, OPTIONS, view, _never(ask)) if page.complete]
    assert pages == numbers
    assert Counter(page.complete for page in everything) == {
        "NORMAL_JOB": len(numbers),
        "BATCH_JOB": 1,
        "SCENARIO_JOB": 1,
    }


def test_more_jobs_than_a_cluster_has_are_refused() -> None:
    rows = [row(1, "NEW", f"job{number}") for number in range(100_001)]
    request = VENDOR.start(OPTIONS, memory())[0]
    page = VENDOR.parse(OPTIONS, request, listing(*rows[:60_000], total=None), memory())
    with pytest.raises(Invalid, match="more than 100000 jobs of type NORMAL_JOB"):
        VENDOR.parse(OPTIONS, page.follow[-1], listing(*rows[60_000:], total=None), memory())


def _never(ask: Answer) -> Answer:
    """No job has ever run."""
    return lambda request: (
        submissions({"status": "NEVER_EXECUTED", "creation-date": NOW})
        if request.by_id
        else ask(request)
    )


def test_jobs_are_asked_after_the_last_page_in_an_order_that_changes() -> None:
    ask, _ = paged([row(1, "RUNNING", f"job{number}") for number in range(150)])
    orders = set()
    for now_ms in (NOW, NOW + 15_000):
        request = VENDOR.start(OPTIONS, memory())[0]
        first = VENDOR.parse(OPTIONS, request, ask(request), memory(now_ms=now_ms))
        (request,) = first.follow
        assert not request.by_id
        last = VENDOR.parse(OPTIONS, request, ask(request), memory(now_ms=now_ms))
        orders.add(tuple(asked([last])))
    assert len({frozenset(order) for order in orders}) == 1
    assert {len(order) for order in orders} == {150}
    assert len(orders) == 2


def test_during_first_contact_each_job_is_asked_once() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    poller.last_good = None
    assert asked(poller.poll(server([row(1, "SUCCEEDED")]))) == []
    pages = poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    assert [told(seen) for seen in runs(pages)] == [("1", State.SUCCEEDED)]


def test_an_unchanged_job_is_not_asked_and_its_run_is_shown() -> None:
    poller = Poller()
    ask = server([row(1, "RUNNING")], run(1, "RUNNING"))
    poller.poll(ask)
    later = server([row(1, "RUNNING") | {"execute_update_date": NOW + 9999, "bytes_read": 5}])
    pages = poller.poll(later)
    assert asked(pages) == []
    assert [known.run_id for page in pages for known in page.shown] == ["1"]
    assert (runs(pages), poller.unseen(), [page.marks for page in pages]) == ([], [], [{}, {}, {}])


@pytest.mark.parametrize(
    "change",
    [
        {"status": "SUCCEEDED"},
        {"execute_start_date": NOW + 2000},
        {"execute_create_date": NOW + 2000},
        {"external_id": "job_local_2"},
    ],
)
def test_a_job_is_asked_when_its_row_changes(change: dict[str, Any]) -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    pages = poller.poll(server([row(1, "RUNNING") | change], run(1, "SUCCEEDED")))
    assert asked(pages) == ["/job/etl/status"]
    assert [told(seen) for seen in runs(pages)] == [("1", State.SUCCEEDED)]
    (request,) = pages[0].follow
    assert (request.by_id, request.spread) == (True, False)


def test_the_update_of_an_ended_run_is_a_change() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    again = server([row(1, "SUCCEEDED") | {"execute_update_date": NOW + 9999}], run(1, "SUCCEEDED"))
    pages = poller.poll(again)
    assert asked(pages) == ["/job/etl/status"]
    assert [known.run_id for known in pages[-1].shown] == ["1"]


def test_a_run_whose_job_is_asked_has_not_left_the_list() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    start = VENDOR.start(OPTIONS, memory())[0]
    view = memory(poller.index, marks=poller.marks)
    page = VENDOR.parse(OPTIONS, start, listing(row(1, "SUCCEEDED")), view)
    assert [known.run_id for known in page.shown] == ["1"]


def test_a_failed_question_is_asked_again_at_the_next_poll() -> None:
    poller = Poller()
    start = VENDOR.start(OPTIONS, memory())[0]
    page = VENDOR.parse(OPTIONS, start, listing(row(1, "RUNNING")), memory(marks=poller.marks))
    assert page.marks == {}
    assert asked(poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))) == ["/job/etl/status"]


def test_a_job_that_never_ran_is_not_asked() -> None:
    poller = Poller()
    pages = poller.poll(server([{"name": "etl", "status": "NEW"}]))
    assert (asked(pages), set(poller.marks)) == ([], {"etl"})
    assert asked(poller.poll(server([{"name": "etl", "status": "NEW"}]))) == []


def test_a_job_is_asked_until_its_last_run_ends_as_the_list_says() -> None:
    poller = Poller()
    lagging = server([row(1, "SUCCEEDED")], run(1, "RUNNING"))
    poller.poll(lagging)
    assert asked(poller.poll(lagging)) == ["/job/etl/status"]
    done = server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED"))
    assert [told(seen) for seen in runs(poller.poll(done))] == [("1", State.SUCCEEDED)]
    assert asked(poller.poll(done)) == []


def test_a_vanished_run_that_is_listed_again_is_asked_for() -> None:
    poller = Poller()
    ask = server([row(1, "RUNNING")], run(1, "RUNNING"))
    poller.poll(ask)
    known = poller.index.runs["etl", "1"]
    poller.index.put(msgspec.structs.replace(known, vanished=True), NOW)
    pages = poller.poll(ask)
    assert [told(seen) for seen in runs(pages)] == [("1", State.RUNNING)]
    assert [page.shown for page in pages] == [[], [], [], []]


def test_finished_jobs_are_spread_at_first_contact_and_running_ones_come_first() -> None:
    start = VENDOR.start(OPTIONS, FIRST_VIEW)[0]
    page = VENDOR.parse(
        OPTIONS, start, listing(row(1, "RUNNING", "a"), row(1, "FAILED", "b")), FIRST_VIEW
    )
    assert [request.spread for request in page.follow] == [False, True]


def test_the_mark_of_a_job_that_is_gone_is_removed() -> None:
    poller = Poller()
    both = [row(1, "RUNNING", "a"), row(1, "SUCCEEDED", "b")]
    poller.poll(server(both, run(1, "SUCCEEDED", job_name=None)))
    assert set(poller.marks) == {"a", "b"}
    poller.poll(server(both[:1], run(1, "SUCCEEDED", job_name=None)))
    assert set(poller.marks) == {"a"}
    poller.poll(server([]))
    assert set(poller.marks) == {"a"}


# --- runs between two polls


def test_a_whole_run_between_two_polls_is_read_from_the_history() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    history = [run(3, "RUNNING"), run(2, "FAILED"), run(1, "SUCCEEDED")]
    pages = poller.poll(server([row(3, "RUNNING")], run(3, "RUNNING"), history))
    assert asked(pages) == ["/job/etl/status", "/submissions?jname=etl"]
    assert [told(seen) for seen in runs(pages)] == [("2", State.FAILED), ("3", State.RUNNING)]
    assert runs(pages)[0].scope == "NORMAL_JOB"
    assert asked(poller.poll(server([row(3, "RUNNING")]))) == []


def test_the_end_of_the_run_before_is_told_before_the_next_run() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    history = [run(2, "RUNNING"), run(1, "FAILED")]
    pages = poller.poll(server([row(2, "RUNNING")], run(2, "RUNNING"), history))
    assert [told(seen) for seen in runs(pages)] == [("1", State.FAILED), ("2", State.RUNNING)]
    assert [list(page.notes) for page in pages] == [[]] * len(pages)


def test_the_end_of_a_vanished_run_is_still_told_by_the_history() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    lost = msgspec.structs.replace(
        poller.index.runs["etl", "1"], state=State.UNKNOWN, vanished=True
    )
    poller.index.put(lost, NOW)
    history = [run(2, "RUNNING"), run(1, "FAILED")]
    pages = poller.poll(server([row(2, "RUNNING")], run(2, "RUNNING"), history))
    assert [told(seen) for seen in runs(pages)] == [("1", State.FAILED), ("2", State.RUNNING)]


def test_the_next_run_after_an_ended_one_needs_no_history() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    pages = poller.poll(server([row(2, "RUNNING")], run(2, "RUNNING")))
    assert asked(pages) == ["/job/etl/status"]
    assert [told(seen) for seen in runs(pages)] == [("2", State.RUNNING)]


def test_runs_older_than_the_last_one_told_are_no_news() -> None:
    poller = Poller()
    poller.poll(server([row(5, "SUCCEEDED")], run(5, "SUCCEEDED")))
    history = [run(7, "RUNNING"), run(6, "FAILED"), run(5, "SUCCEEDED"), run(4, "FAILED")]
    pages = poller.poll(server([row(7, "RUNNING")], run(7, "RUNNING"), history))
    assert [seen.run_id for seen in runs(pages)] == ["6", "7"]


def test_a_history_that_does_not_show_the_last_run_yet_does_not_hide_it() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    pages = poller.poll(server([row(2, "BOOTING")], run(2, "BOOTING"), [run(1, "SUCCEEDED")]))
    assert [told(seen) for seen in runs(pages)] == [("1", State.SUCCEEDED), ("2", State.STARTING)]


def test_a_history_that_is_newer_than_the_last_run_is_believed() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    history = [run(3, "FAILED"), run(2, "SUCCEEDED"), run(1, "SUCCEEDED")]
    pages = poller.poll(server([row(2, "RUNNING")], run(2, "RUNNING"), history))
    assert [told(seen) for seen in runs(pages)] == [
        ("1", State.SUCCEEDED),
        ("2", State.SUCCEEDED),
        ("3", State.FAILED),
    ]
    pages = poller.poll(server([row(4, "RUNNING")], run(4, "RUNNING")))
    assert asked(pages) == ["/job/etl/status"]


def test_a_history_too_short_for_what_happened_is_noted() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    history = [run(number, "SUCCEEDED") for number in range(30, 20, -1)]
    pages = poller.poll(server([row(30, "SUCCEEDED")], run(30, "SUCCEEDED"), history))
    assert [seen.run_id for seen in runs(pages)] == [str(number) for number in range(21, 31)]
    (note,) = [note for page in pages for note in page.notes]
    assert "'etl'" in note
    assert "missed" in note


@pytest.mark.parametrize("reaches", [range(10, 0, -1), range(30, 27, -1)])
def test_a_history_that_reaches_back_or_is_not_full_is_not_noted(reaches: range) -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    history = [run(number, "SUCCEEDED") for number in reaches]
    pages = poller.poll(server([row(9, "FAILED")], run(reaches[0], "SUCCEEDED"), history))
    assert [note for page in pages for note in page.notes] == []


def test_a_history_that_was_not_read_is_asked_for_before_anything_else() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    view = memory(poller.index, marks=poller.marks)
    start = VENDOR.start(OPTIONS, view)[0]
    (request,) = VENDOR.parse(OPTIONS, start, listing(row(2, "RUNNING")), view).follow
    held = VENDOR.parse(OPTIONS, request, submissions(run(2, "RUNNING")), view)
    assert (held.runs, asked([held])) == ([], ["/submissions?jname=etl"])

    poller.marks = marks([held], poller.marks)
    jobs = [row(1, "RUNNING", "another"), row(2, "RUNNING")]
    history = [run(2, "RUNNING"), run(1, "FAILED")]
    pages = poller.poll(server(jobs, {"status": "NEW"}, history))
    assert asked(pages) == ["/submissions?jname=etl", "/job/another/status"]
    assert [told(seen) for seen in runs(pages)] == [("1", State.FAILED), ("2", State.RUNNING)]
    assert asked(poller.poll(server(jobs))) == []


@pytest.mark.parametrize("history", [[], [run(1, "SUCCEEDED")]])
def test_a_history_that_lags_behind_the_list_is_asked_for_again(history: list[Any]) -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    poller.marks["etl"] = '["NORMAL_JOB","1",1,""]'
    for _ in range(2):
        pages = poller.poll(server([row(2, "RUNNING")], history=history))
        assert asked(pages) == ["/submissions?jname=etl"]
        assert "2" not in [seen.run_id for seen in runs(pages)]
    pages = poller.poll(server([row(2, "RUNNING")], history=[run(2, "RUNNING"), *history]))
    assert runs(pages)[-1].run_id == "2"


def test_a_run_is_told_without_its_history_once_that_was_refused_five_times() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    view = memory(poller.index, marks=poller.marks)
    questions = []
    for _ in range(7):
        start = VENDOR.start(OPTIONS, view)[0]
        pages = [VENDOR.parse(OPTIONS, start, listing(row(2, "RUNNING")), view)]
        for request in pages[0].follow:
            if request.path.endswith("/status"):
                pages += [VENDOR.parse(OPTIONS, request, submissions(run(2, "RUNNING")), view)]
        view = memory(poller.index, marks=marks(pages, view.marks))
        questions.append([target.split("/")[-1] for target in asked(pages)])
    refused = ["submissions?jname=etl"]
    assert questions == [["status", *refused], refused, refused, refused, refused, ["status"], []]


def test_a_run_told_without_its_history_is_noted() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    poller.marks["etl"] = '["NORMAL_JOB","1",5,""]'
    pages = poller.poll(server([row(2, "RUNNING")], run(2, "RUNNING")))
    assert [told(seen) for seen in runs(pages)] == [("2", State.RUNNING)]
    (note,) = [note for page in pages for note in page.notes]
    assert "told late" in note


def test_a_history_that_is_owed_is_read_once_it_can_be_and_all_in_it_is_told() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    poller.marks["etl"] = '["NORMAL_JOB","1",5,""]'
    poller.poll(server([row(3, "RUNNING")], run(3, "RUNNING")))
    history = [run(3, "RUNNING"), run(2, "FAILED"), run(1, "SUCCEEDED")]
    pages = []
    for _ in range(20):
        pages += poller.poll(server([row(3, "RUNNING")], run(3, "RUNNING"), history), after_s=60)
    assert [told(seen) for seen in runs(pages)] == [("1", State.SUCCEEDED), ("2", State.FAILED)]
    assert len(asked(pages)) == 1


def test_first_contact_reads_no_history() -> None:
    pages = Poller().poll(server([row(7, "FAILED")], run(7, "FAILED")))
    assert asked(pages) == ["/job/etl/status"]
    assert [told(seen) for seen in runs(pages)] == [("7", State.FAILED)]


def test_first_contact_reads_the_history_where_finished_runs_are_published() -> None:
    history = [run(7, "FAILED"), run(6, "SUCCEEDED"), run(2, "SUCCEEDED")]
    poller = Poller(publish_all=True)
    pages = poller.poll(server([row(7, "FAILED")], run(7, "FAILED"), history))
    assert [seen.run_id for seen in runs(pages)] == ["2", "6", "7"]


def test_a_full_history_at_first_contact_has_missed_nothing() -> None:
    history = [run(number, "SUCCEEDED") for number in range(30, 20, -1)]
    poller = Poller(publish_all=True)
    pages = poller.poll(server([row(30, "SUCCEEDED")], run(30, "SUCCEEDED"), history))
    assert len(runs(pages)) == 10
    assert [note for page in pages for note in page.notes] == []


def test_a_last_run_without_a_date_is_told_with_its_history() -> None:
    poller = Poller(publish_all=True)
    last = run(2, "RUNNING") | {"creation-date": None}
    pages = poller.poll(server([row(2, "RUNNING")], last, [last, run(1, "FAILED")]))
    assert [seen.run_id for seen in runs(pages)] == ["1", "2"]


def test_the_first_runs_of_a_job_are_read_from_the_history() -> None:
    poller = Poller()
    poller.poll(server([{"name": "etl", "status": "NEW"}]))
    before_contact = run(2, "SUCCEEDED") | {"creation-date": NOW - 1}
    history = [run(40, "RUNNING"), run(38, "FAILED"), before_contact]
    pages = poller.poll(server([row(40, "RUNNING")], run(40, "RUNNING"), history))
    assert [told(seen) for seen in runs(pages)] == [("38", State.FAILED), ("40", State.RUNNING)]


def test_a_job_never_asked_before_tells_all_its_runs_since_first_contact() -> None:
    poller = Poller()
    poller.poll(server([]))
    history = [run(3, "RUNNING"), run(2, "SUCCEEDED"), run(1, "FAILED") | {"creation-date": NOW}]
    poller.last_good = NOW + 86_400_000
    pages = poller.poll(server([row(3, "RUNNING")], run(3, "RUNNING"), history))
    assert [told(seen) for seen in runs(pages)] == [("2", State.SUCCEEDED), ("3", State.RUNNING)]


def test_an_old_run_of_a_job_listed_for_the_first_time_has_no_history() -> None:
    poller = Poller()
    poller.poll(server([]))
    pages = poller.poll(server([row(-100, "RUNNING")], run(9, "RUNNING") | {"creation-date": NOW}))
    assert asked(pages) == ["/job/etl/status"]
    assert [told(seen) for seen in runs(pages)] == [("9", State.RUNNING)]


def test_a_mark_that_lags_behind_what_is_known_is_harmless() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    before = dict(poller.marks)
    poller.poll(server([row(2, "RUNNING")], run(2, "RUNNING")))
    poller.marks = before
    history = [run(3, "BOOTING"), run(2, "FAILED"), run(1, "SUCCEEDED")]
    pages = poller.poll(server([row(3, "BOOTING")], run(3, "BOOTING"), history))
    assert [told(seen) for seen in runs(pages)] == [("2", State.FAILED), ("3", State.STARTING)]


def test_a_job_made_anew_gives_up_its_old_run() -> None:
    poller = Poller()
    poller.poll(server([row(5, "RUNNING")], run(5, "RUNNING")))
    anew = server([{"name": "etl", "status": "NEW"}])
    poller.poll(anew)
    poller.poll(anew)
    assert poller.unseen() == ["5"]
    lower = server([row(40, "RUNNING")], run(3, "RUNNING") | {"creation-date": 1})
    assert [told(seen) for seen in runs(poller.poll(lower))] == [("3", State.RUNNING)]


def test_a_lower_number_than_before_is_taken_as_it_is() -> None:
    poller = Poller()
    poller.poll(server([row(5, "SUCCEEDED")], run(5, "SUCCEEDED")))
    pages = poller.poll(server([row(6, "RUNNING")], run(2, "RUNNING")))
    assert [told(seen) for seen in runs(pages)] == [("2", State.RUNNING)]
    assert asked(poller.poll(server([row(6, "RUNNING")]))) == []


# --- clusters without submission-ids, without states


def dated(number: int, status: str, **more: object) -> dict[str, Any]:
    return {k: v for k, v in run(number, status, **more).items() if k != "submission-id"}


def test_a_run_without_a_number_is_known_by_its_creation_date() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], dated(1, "SUCCEEDED", external_id="job_1")))
    history = [dated(3, "RUNNING"), dated(2, "FAILED"), dated(1, "SUCCEEDED")]
    pages = poller.poll(server([row(3, "RUNNING")], dated(3, "RUNNING"), history))
    assert [told(seen) for seen in runs(pages)] == [
        (str(NOW + 2000), State.FAILED),
        (str(NOW + 3000), State.RUNNING),
    ]


def test_a_job_keeps_to_creation_dates_when_numbers_appear() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], dated(1, "RUNNING")))
    pages = poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    assert [told(seen) for seen in runs(pages)] == [(str(NOW + 1000), State.SUCCEEDED)]


def test_a_history_is_read_by_the_sort_of_id_that_the_last_run_has() -> None:
    poller = Poller(publish_all=True)
    history = [run(2, "RUNNING"), run(1, "FAILED")]
    pages = poller.poll(server([row(2, "RUNNING")], dated(2, "RUNNING"), history))
    assert [seen.run_id for seen in runs(pages)] == [str(NOW + 1000), str(NOW + 2000)]


def test_a_run_without_a_number_among_numbered_ones_is_set_aside() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    pages = poller.poll(server([row(1, "SUCCEEDED")], dated(1, "SUCCEEDED")))
    assert runs(pages) == []
    assert [bad.at for page in pages for bad in page.bad] == ["$.submissions[*].submission-id"]
    assert len(asked(poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED"))))) == 1


def bare(*names: str) -> list[Any]:
    return [{"name": name} for name in names]


def each(statuses: Mapping[str, str], **fields: object) -> Answer:
    """A cluster whose list has no states, and whose jobs have one run each."""

    def ask(request: Request) -> Response:
        if request.by_id:
            name = request.path.split("/")[-2]
            return submissions(run(1, statuses[name], job_name=name))
        rows = [{"name": name, **fields} for name in statuses]
        return listing(*rows) if ("jobType", "NORMAL_JOB") in request.query else listing()

    return ask


@pytest.mark.parametrize("fields", [{}, {"execute_start_date": 1}, {"status": "RUNNING"}])
def test_where_the_list_does_not_tell_a_running_job_is_asked_at_every_poll(
    fields: dict[str, Any],
) -> None:
    statuses = {f"job{number}": "FAILED" for number in range(600)} | {"etl": "RUNNING"}
    poller = Poller()
    poller.poll(each(statuses, **fields))
    for status in ("RUNNING", "RUNNING", "SUCCEEDED"):
        pages = poller.poll(each(statuses | {"etl": status}, **fields))
        assert "/job/etl/status" in asked(pages)
        assert len(asked(pages)) < 40
    assert poller.index.runs["etl", "1"].state is State.SUCCEEDED


def test_where_the_list_does_not_tell_more_running_jobs_than_the_rate_allows_take_turns() -> None:
    poller = Poller(rate_per_s=1.0)
    ask = each({f"job{number}": "RUNNING" for number in range(200)})
    poller.poll(ask)
    turns: Counter[str] = Counter()
    for _ in range(50):
        turns.update(asked(poller.poll(ask, after_s=10)))
    assert (len(turns), set(turns.values())) == (200, {1})


def test_a_state_without_dates_does_not_tell_of_every_run() -> None:
    poller = Poller(rate_per_s=1000.0)
    poller.poll(server([{"name": "etl", "status": "SUCCEEDED"}], run(1, "SUCCEEDED")))
    pages = poller.poll(server([{"name": "etl", "status": "SUCCEEDED"}], run(2, "SUCCEEDED")))
    assert [told(seen) for seen in runs(pages)] == [("2", State.SUCCEEDED)]


def test_where_the_list_has_no_states_the_jobs_take_turns_within_the_rate() -> None:
    names = [f"job{number}" for number in range(200)]
    poller = Poller(rate_per_s=1.0)
    ask = server(bare(*names), run(1, "SUCCEEDED", job_name=None))
    assert len(asked(poller.poll(ask))) == 200
    turns: Counter[str] = Counter()
    sizes = []
    for _ in range(100):
        pages = poller.poll(ask, after_s=10)
        turns.update(asked(pages))
        sizes.append(len(asked(pages)))
        assert all(request.spread for page in pages for request in page.follow)
    assert set(turns.values()) == {2}
    assert len(turns) == 200
    assert max(sizes) < 20


def test_a_job_is_asked_once_during_first_contact() -> None:
    poller = Poller()
    ask = server(bare("etl"), run(1, "SUCCEEDED"))
    assert [page.follow[0].spread for page in poller.poll(ask)[:1]] == [False]
    poller.last_good = None
    assert asked(poller.poll(ask)) == []


# --- named jobs


def test_named_jobs_are_asked_instead_of_the_list() -> None:
    options = Options(project_id="p1", cluster_id="c1", jobs=("b", "a", "b"))
    requests = VENDOR.start(options, memory())
    assert [request.path for request in requests] == [f"{BASE}/job/{n}/status" for n in ("b", "a")]
    assert [(request.by_id, request.spread) for request in requests] == [(False, False)] * 2


def test_many_named_jobs_are_spread() -> None:
    options = Options(project_id="p1", cluster_id="c1", jobs=tuple("abcde"))
    assert all(request.spread for request in VENDOR.start(options, memory()))


def test_a_named_job_tells_its_runs_one_after_the_other() -> None:
    poller = Poller(NAMED)
    pages = poller.poll(server(last=run(1, "RUNNING")))
    assert [(told(seen), seen.scope) for seen in runs(pages)] == [(("1", State.RUNNING), "")]
    assert [page.complete for page in pages] == [None]
    pages = poller.poll(server(last=run(1, "RUNNING", progress=50)))
    assert ([known.run_id for known in pages[0].shown], runs(pages)) == (["1"], [])
    assert pages[0].marks == {}
    history = [run(2, "BOOTING"), run(1, "SUCCEEDED")]
    pages = poller.poll(server(last=run(2, "BOOTING"), history=history))
    assert [told(seen) for seen in runs(pages)] == [("1", State.SUCCEEDED), ("2", State.STARTING)]
    assert pages[0].follow[0].by_id


def test_a_named_job_that_does_not_exist_is_noted_once() -> None:
    poller = Poller(NAMED)
    missing = server(last=answer(json.dumps(NO_SUCH_JOB), 400))
    assert [list(page.notes) for page in poller.poll(missing)] == [["there is no job 'etl'"]]
    assert [list(page.notes) for page in poller.poll(missing)] == [[]]
    pages = poller.poll(server(last=run(-100, "RUNNING", submission_id=1)))
    assert [told(seen) for seen in runs(pages)] == [("1", State.RUNNING)]


def test_the_run_of_a_named_job_that_was_deleted_is_gone() -> None:
    poller = Poller(NAMED)
    poller.poll(server(last=run(1, "RUNNING")))
    pages = poller.poll(server(last=answer(json.dumps(NO_SUCH_JOB), 400)))
    assert [list(page.gone) for page in pages] == [[("etl", "1")]]


def test_a_listed_job_that_does_not_exist_any_more_is_not_noted() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    pages = poller.poll(server([row(1, "FAILED")], answer(json.dumps(NO_SUCH_JOB), 400)))
    assert [gone for page in pages for gone in page.gone] == [("etl", "1")]
    assert [note for page in pages for note in page.notes] == []


def test_the_run_of_another_job_is_not_gone_with_it() -> None:
    poller = Poller(Options(project_id="p1", cluster_id="c1", jobs=("other",)))
    poller.poll(server(last=run(1, "RUNNING", job_name="other")))
    poller.options = NAMED
    pages = poller.poll(server(last=answer(json.dumps(NO_SUCH_JOB), 400)))
    assert [list(page.gone) for page in pages] == [[]]


def test_a_job_that_deletes_itself_after_its_run_leaves_its_end() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    refusal = answer(json.dumps(NO_SUCH_JOB), 400)
    pages = poller.poll(server([row(2, "SUCCEEDED")], run(2, "SUCCEEDED"), refusal))
    assert [told(seen) for seen in runs(pages)] == [("2", State.SUCCEEDED)]
    assert [gone for page in pages for gone in page.gone] == [("etl", "1")]
    assert poller.marks == {}


def test_a_run_that_has_just_been_told_is_not_gone_with_its_job() -> None:
    poller = Poller()
    poller.poll(server([row(1, "SUCCEEDED")], run(1, "SUCCEEDED")))
    remember(poller.index, see(run(3, "RUNNING")).runs[0])
    refusal = answer(json.dumps(NO_SUCH_JOB), 400)
    pages = poller.poll(server([row(3, "SUCCEEDED")], run(3, "SUCCEEDED"), refusal))
    assert [told(seen) for seen in runs(pages)] == [("3", State.SUCCEEDED)]
    assert [gone for page in pages for gone in page.gone] == []


# --- runs that left the list


def settled(known_row: dict[str, Any], response: Response) -> Page:
    """What one answer tells of what became of a run."""
    index = Index()
    request = VENDOR.settle(OPTIONS, remember(index, see(known_row).runs[0]))
    assert request is not None
    assert (request.target, request.by_id) == (f"{BASE}/submissions?jname=etl", True)
    return VENDOR.parse(OPTIONS, request, response, memory(index))


def test_a_run_that_left_the_list_is_found_in_the_history() -> None:
    page = settled(run(1, "RUNNING"), submissions(run(2, "RUNNING"), run(1, "FAILED")))
    assert [(told(seen), seen.scope) for seen in page.runs] == [(("1", State.FAILED), "NORMAL_JOB")]
    assert page.marks == {}


def test_a_run_known_by_its_date_is_found_though_it_has_a_number_now() -> None:
    page = settled(dated(1, "RUNNING"), submissions(run(2, "RUNNING"), run(1, "FAILED")))
    assert [told(seen) for seen in page.runs] == [(str(NOW + 1000), State.FAILED)]


def test_a_settled_run_keeps_its_jobs_group_and_owner() -> None:
    job = Job(id="etl", name="etl", group="g", owner="o")
    known = Known(job=job, run_id="1", state=State.RUNNING)
    for options in (OPTIONS, NAMED):
        request = VENDOR.settle(options, known)
        assert request is not None
        assert request.by_id
        page = VENDOR.parse(options, request, submissions(run(1, "FAILED")), memory())
        assert page.runs[0].job == job


def test_a_run_as_it_was_is_shown() -> None:
    page = settled(run(1, "RUNNING"), submissions(run(1, "RUNNING")))
    assert [known.run_id for known in page.shown] == ["1"]


@pytest.mark.parametrize("history", [[run(2, "RUNNING")], [], [{"status": "NEVER_EXECUTED"}]])
def test_nobody_can_tell_of_a_run_that_is_in_no_history(history: list[Any]) -> None:
    page = settled(run(1, "RUNNING"), submissions(*history))
    assert (page.runs, page.shown, page.gone, page.follow, page.marks) == ([], [], (), (), {})


@pytest.mark.parametrize(
    ("status", "code"), [(400, "Cdm.0100"), (400, "Cdm.0054"), (404, "Cdm.0100"), (500, "CDM.0054")]
)
def test_a_run_is_gone_with_its_job(status: int, code: str) -> None:
    page = settled(run(1, "RUNNING"), answer(json.dumps({"errCode": code}), status))
    assert page.gone == [("etl", "1")]


# --- errors


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (
            400,
            {"errCode": "Cdm.0202", "externalMessage": "Unknown status"},
            Invalid,
            "Cdm.0202: Unk",
        ),
        (400, {"errCode": "Cdm.0001"}, Invalid, "Cdm.0001"),
        (404, {"error_code": "APIG.0101", "error_msg": "no API"}, Invalid, "APIG.0101: no API"),
        (400, {"errCode": "Cdm.0000", "externalMessage": "x"}, Unreachable, "Cdm.0000: x"),
        (400, {"errCode": " cdm.0036 "}, Unreachable, "cdm.0036"),
        (
            400,
            {"errCode": "Cdm.0032", "externalMessage": "no permission"},
            Rejected,
            "no permission",
        ),
        (401, {"error_code": "APIG.0301", "error_msg": "wrong token"}, Rejected, "wrong token"),
        (401, {"error_code": "APIGW.0307", "error_msg": "old token"}, Rejected, "old token"),
        (403, {"error_code": "APIG.0302", "error_msg": "no"}, Rejected, "APIG.0302"),
        (401, {"error_code": "APIG.0303", "error_msg": "no"}, Rejected, "APIG.0303"),
        (401, {"error_code": "APIG.9999"}, Rejected, "401"),
        (403, {"error_code": "APIG.9999"}, Rejected, "403"),
        (429, {"error_code": "APIG.9999"}, Limited, "429"),
        (400, {"errCode": "Cdm.1", "externalMessage": "x" * 999}, Invalid, "^Cdm.1: x{256}$"),
        (403, b"<html>", Rejected, "403"),
        (429, {"error_code": "APIG.0308", "error_msg": "slow"}, Limited, "often"),
        (400, {"error_code": "APIGW.0308", "error_msg": "slow"}, Limited, "often"),
        (429, b"", Limited, "often"),
        (500, {"error_code": "APIG.0201"}, Unreachable, "500"),
        (500, {"errCode": "Cdm.0010"}, Unreachable, "500"),
        (502, b"<html>", Unreachable, "502"),
        (503, b"<html>", Limited, "503"),
        (404, b"<html>", Invalid, "404"),
        (302, b"", Invalid, "302"),
        (400, {"errCode": 7, "externalMessage": ["x"]}, Invalid, "7"),
        (400, ["a", "list"], Invalid, "400"),
        (200, b"<html><form>login</form>", Invalid, "HTML"),
        (200, b"", Invalid, "empty"),
        (200, b'{"jobs": [', Invalid, "JSON"),
        (200, {"errCode": "Cdm.0202"}, Invalid, "missing required field"),
        (200, {"jobs": None, "submissions": None}, Invalid, "shape"),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_an_error_is_named_by_what_to_do_about_it(
    status: int, body: object, kind: type[VendorError], says: str, listed: bool
) -> None:
    request = VENDOR.start(OPTIONS, memory())[0] if listed else status_request()
    content = body if isinstance(body, bytes) else json.dumps(body)
    with pytest.raises(kind, match=says) as caught:
        VENDOR.parse(OPTIONS, request, answer(content, status, retry_after="30"), memory())
    assert type(caught.value) is kind
    if isinstance(caught.value, Limited):
        assert caught.value.retry_after_s == 30


@pytest.mark.parametrize("code", ["Cdm.0100", "Cdm.0054"])
def test_a_list_that_does_not_exist_is_an_error(code: str) -> None:
    request = VENDOR.start(OPTIONS, memory())[0]
    with pytest.raises(Invalid, match=code):
        VENDOR.parse(OPTIONS, request, answer(json.dumps({"errCode": code}), 400), memory())


def test_a_missing_page_is_no_missing_job() -> None:
    with pytest.raises(Invalid):
        VENDOR.parse(OPTIONS, status_request(), answer(b"<html>Not Found", 404), memory())


# --- bad rows


def test_bad_jobs_are_set_aside_with_their_place() -> None:
    rows = [
        row(1, "RUNNING", "good"),
        {"status": "NEW"},
        row(1, "RUNNING", ""),
        row(1, "RUNNING", "x" * 1025),
        7,
        row(1, "RUNNING") | {"execute_start_date": True},
        row(1, "RUNNING") | {"status": "x" * 1025},
        row(1, "RUNNING") | {"status": None, "from-config-values": "whatever"},
    ]
    start = VENDOR.start(OPTIONS, memory())[0]
    page = VENDOR.parse(OPTIONS, start, listing(*rows), memory())
    assert {request.path for request in page.follow} == {
        f"{BASE}/job/good/status",
        f"{BASE}/job/etl/status",
    }
    assert [bad.at for bad in page.bad] == [
        "$.jobs[1]",
        "$.jobs[2].name",
        "$.jobs[3].name",
        "$.jobs[4]",
        "$.jobs[5].execute_start_date",
        "$.jobs[6].status",
    ]


@pytest.mark.parametrize(
    ("bad", "at"),
    [
        ({"submission-id": 7}, "$.submissions[0]"),
        (run(7, "") | {"status": ""}, "$.submissions[0].status"),
        (run(7, "RUNNING", job_name="other"), "$.submissions[*].job-name"),
        ({"status": "RUNNING"}, "$.submissions[*].creation-date"),
        ({"status": "RUNNING", "creation-date": "9" * 65}, "$.submissions[0].creation-date"),
        (run(7, "RUNNING") | {"submission-id": {}}, "$.submissions[0].submission-id"),
        (run(7, "RUNNING") | {"creation-user": "x" * 1025}, "$.submissions[0].creation-user"),
    ],
)
def test_a_bad_run_is_set_aside_and_asked_for_again(bad: dict[str, Any], at: str) -> None:
    page = see(bad)
    assert [row.at for row in page.bad] == [at]
    assert (page.runs, page.marks) == ([], {})


def test_a_bad_run_in_a_history_does_not_hide_the_others() -> None:
    poller = Poller()
    poller.poll(server([row(1, "RUNNING")], run(1, "RUNNING")))
    history = [run(3, "RUNNING"), {"submission-id": 2}, run(1, "SUCCEEDED")]
    pages = poller.poll(server([row(3, "RUNNING")], run(3, "RUNNING"), history))
    assert [seen.run_id for seen in runs(pages)] == ["1", "3"]
    assert [bad.at for page in pages for bad in page.bad] == ["$.submissions[1]"]


def test_an_unquoted_nan_is_no_reason_to_drop_a_run() -> None:
    body = b'{"submissions": [{"status": "RUNNING", "submission-id": 7, "progress": NaN}]}'
    (seen,) = VENDOR.parse(OPTIONS, status_request(), answer(body), FIRST_VIEW).runs
    assert (seen.run_id, seen.progress) == ("7", None)


# --- hostile bytes

_KEYS = st.sampled_from(
    f"submissions jobs total page_size name status submission-id job-name creation-date {COUNTERS} "
    "execute_start_date external_id counters ROWS_READ errCode error_code progress error-summary "
    "last-update-date".split()
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["RUNNING", "NEW", "Cdm.0100", "1536905778725", "SUCCEEDED", 10**400]),
)
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner) | st.dictionaries(_KEYS, inner), max_leaves=20
)


def _every_question() -> list[Request]:
    last = see(run(7, "RUNNING")).runs[0]
    known = remember(Index(), last)
    history = see(run(9, "RUNNING"), memory(marks={"etl": '["NORMAL_JOB","7",0,"x"]'})).follow[0]
    settle = VENDOR.settle(OPTIONS, known)
    assert settle is not None
    return [*VENDOR.start(OPTIONS, memory())[:1], status_request(), history, settle]


@given(
    body=st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode()),
    status=st.sampled_from([200, 200, 200, 400, 404, 429, 500]),
)
def test_hostile_bytes_raise_nothing_but_vendor_errors(body: bytes, status: int) -> None:
    for request in _every_question():
        try:
            page = VENDOR.parse(OPTIONS, request, answer(body, status), memory())
        except VendorError:
            continue
        assert all(seen.run_id and seen.job.id for seen in page.runs)


@given(row_=st.dictionaries(_KEYS, _JSON), key=st.sampled_from(["submissions", "jobs"]))
def test_hostile_rows_raise_nothing_but_vendor_errors(row_: dict[str, Any], key: str) -> None:
    body = json.dumps({key: [{"name": "etl", "status": "RUNNING", "submission-id": 9} | row_]})
    for request in _every_question():
        try:
            VENDOR.parse(OPTIONS, request, answer(body), memory())
        except VendorError:
            continue


@pytest.mark.parametrize(
    "body",
    [b"[" * 100_000, b'{"submissions":[{"status":"X","submission-id":' + b"9" * 5000 + b"}]}"],
)
def test_deep_and_long_bodies_raise_nothing_but_vendor_errors(body: bytes) -> None:
    for request in _every_question():
        try:
            page = VENDOR.parse(OPTIONS, request, answer(body), memory())
        except Invalid:
            continue
        assert page.bad


# --- the other side


def account(world: World) -> dict[str, tuple[State, int, int | None, int | None]]:
    """What the world holds: run id → state and times."""
    return {
        str(number): (
            one.now.state,
            one.now.queued_ms,
            one.now.started_ms,
            one.now.ended_ms,
        )
        for number, one in world.runs.items()
    }


def known_of(index: Index) -> dict[str, tuple[State, int | None, int | None, int | None]]:
    return {
        known.run_id: (known.state, known.queued_ms, known.started_ms, known.ended_ms)
        for known in index.runs.values()
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step_ms", [500, 3000, 20_000])
def test_what_is_read_is_what_the_world_holds(seed: int, step_ms: int) -> None:
    world = World(kinds=VENDOR.kinds, seed=seed, jobs=30, now_ms=NOW, keep_ms=10**9)
    poller = Poller()
    poller.poll(serve(VENDOR, world), after_s=0)
    for _ in range(25):
        world.advance(world.now_ms + step_ms)
        poller.now = world.now_ms
        pages = poller.poll(serve(VENDOR, world), after_s=0)
        assert [(page.bad, page.notes) for page in pages if page.bad or page.notes] == []
        assert known_of(poller.index) == account(world)
        assert not any(poller.index.unseen(scope, poller.now) for scope in poller.index.watched)
    states = {known.state for known in poller.index.runs.values()}
    assert states == {State.SUCCEEDED, State.FAILED, State.CANCELED, State.RUNNING} | (
        states & {State.QUEUED, State.STARTING}
    )


def test_a_quiet_world_costs_one_question_for_each_sort_of_job() -> None:
    world = World(kinds=VENDOR.kinds, jobs=40, now_ms=NOW)
    poller = Poller()
    for _ in range(10):
        world.advance(world.now_ms + 2000)
        poller.now = world.now_ms
        poller.poll(serve(VENDOR, world), after_s=0)
    assert len(poller.poll(serve(VENDOR, world), after_s=0)) == 3


def test_the_job_and_the_problem_of_a_failed_run_are_those_of_the_world() -> None:
    world = World(kinds=VENDOR.kinds, jobs=30, now_ms=NOW)
    world.advance(NOW + 60_000)
    pages = read(
        VENDOR, OPTIONS, memory(now_ms=world.now_ms, last_good_ms=None), serve(VENDOR, world)
    )
    failed = [seen for seen in runs(pages) if seen.state is State.FAILED]
    assert failed
    for seen in failed:
        one = world.runs[int(seen.run_id)]
        assert seen.problem == Problem(None, one.now.problem or "")
        assert (seen.job.name, seen.job.group, seen.job.owner) == (
            one.definition.name,
            one.definition.group,
            one.definition.owner,
        )
        assert seen.progress is None


def test_no_password_of_a_jobs_settings_gets_into_what_is_read() -> None:
    world = World(kinds=VENDOR.kinds, jobs=10, now_ms=NOW)
    world.advance(NOW + 60_000)
    view = memory(now_ms=world.now_ms, last_good_ms=None)
    start = VENDOR.start(OPTIONS, view)[0]
    assert b"a-password" in VENDOR.render(world, start).body
    pages = read(VENDOR, OPTIONS, view, serve(VENDOR, world))
    assert runs(pages)
    assert "a-password" not in repr(pages)


def test_a_deleted_job_is_unknown_to_the_other_side() -> None:
    world = World(kinds=VENDOR.kinds, jobs=4, now_ms=NOW)
    known = Known(job=Job(id="gone"), run_id="7", state=State.RUNNING)
    index = Index([known])
    request = VENDOR.settle(OPTIONS, known)
    assert request is not None
    page = VENDOR.parse(OPTIONS, request, VENDOR.render(world, request), memory(index))
    assert page.gone == [("gone", "7")]


def test_an_unknown_path_is_refused_by_the_gateway() -> None:
    world = World(kinds=VENDOR.kinds, now_ms=NOW)
    for path in ("/", "/v1.1/p/clusters/c/cdm/link/all", "/v1.1/p/clusters/c/cdm/job/x/start"):
        response = VENDOR.render(world, Request(path=path))
        assert (response.status, json.loads(response.body)["error_code"]) == (404, "APIG.0101")


def test_the_other_side_lists_ten_ordinary_jobs_unless_told_otherwise() -> None:
    world = World(kinds=VENDOR.kinds, jobs=50, now_ms=NOW)
    page = json.loads(VENDOR.render(world, Request(path=f"{BASE}/job/all")).body)
    assert (page["total"], page["page_no"], page["page_size"], len(page["jobs"])) == (25, 1, 10, 10)
    assert {job["job_type"] for job in page["jobs"]} == {"NORMAL_JOB"}


def test_the_other_side_shows_one_job_with_a_total_of_none() -> None:
    world = World(kinds=VENDOR.kinds, jobs=2, now_ms=NOW)
    request = Request(path=f"{BASE}/job/{world.definitions[0].name}")
    before = json.loads(VENDOR.render(world, request).body)
    assert (before["total"], before["jobs"][0]["status"]) == (0, "NEW")
    world.advance(NOW + 60_000)
    after = json.loads(VENDOR.render(world, request).body)
    assert after["jobs"][0]["name"] == world.definitions[0].name
    assert after["jobs"][0]["execute_create_date"] > NOW


def test_the_other_side_keeps_ten_runs_newest_first() -> None:
    world = World(kinds=VENDOR.kinds, jobs=1, now_ms=NOW)
    world.advance(NOW + 600_000)
    request = Request(path=f"{BASE}/submissions", query=(("jname", world.definitions[0].name),))
    body = json.loads(VENDOR.render(world, request).body)
    numbers = [one["submission-id"] for one in body["submissions"]]
    assert body["total"] == len(world.runs) > 10
    assert numbers == sorted(world.runs, reverse=True)[:10]
    ended = [one for one in body["submissions"] if one["status"] == "SUCCEEDED"]
    assert all(isinstance(one["counters"][COUNTERS]["ROWS_READ"], int) for one in ended)
    assert {type(one["creation-date"]) for one in body["submissions"]} == {int, str}


def test_every_state_of_the_world_ends_as_the_words_say() -> None:
    assert {state for state, _ in WORDS.values()} - {State.UNKNOWN} == VENDOR.kinds[0].states
    assert VENDOR.kinds[0].states > TERMINAL
