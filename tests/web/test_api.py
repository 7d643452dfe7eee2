"""The API: what is asked for is told, and what is asked wrongly is told in a sentence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from poller.errors import JournalError
from poller.known import Commit
from poller.runs import Job, State
from poller.web.answers import Latency, Sink
from tests.served import NOW_MS, Patient, Served, draft, known, serving, source_status

HOUR_MS = 3_600_000


@pytest.fixture
def patient() -> Patient:
    return Patient()


@pytest.fixture
async def here(tmp_path: Path, patient: Patient) -> AsyncIterator[Served]:
    async with serving(tmp_path, patient) as here:
        yield here


# Sources and sinks


async def test_sources_and_sinks_tell_how_they_are(here: Served, patient: Patient) -> None:
    latency = Latency(last_s=0.5, median_s=0.4, longest_s=2.0, polls=20)
    patient.statuses[1] = source_status(
        "b", condition="down", reason="rejected", message="HTTP 401", failures=4, latency=latency
    )
    await here.tell(known("1"), known("2"), at_ms=NOW_MS - 2500)
    await here.tell(known("3"), at_ms=NOW_MS - 500)
    patient.relays = [Sink("redis", None, 3), Sink("mqtt", "nothing listens there", 1)]
    status = await here.get("/api/v1/sources")
    assert status["now"] == "2027-01-15T08:00:00.000Z"
    assert (status["instance"], status["offset"], status["journal"]) == ("test", 3, None)
    assert [source["condition"] for source in status["sources"]] == ["up", "down"]
    assert status["sources"][0]["runs"] == dict.fromkeys(State, 0)
    assert status["sources"][1]["message"] == "HTTP 401"
    assert status["sources"][1]["latency"]["median_s"] == 0.4
    assert status["sinks"] == [
        {"sink": "redis", "trouble": None, "lag_events": 0, "lag_s": 0.0},
        {"sink": "mqtt", "trouble": "nothing listens there", "lag_events": 2, "lag_s": 2.5},
    ]


async def test_a_journal_that_does_not_write_is_told(
    here: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise JournalError("journal.db: database or disk is full")

    monkeypatch.setattr(here.journal, "check", full)
    status = await here.get("/api/v1/sources")
    assert status["journal"] == "journal.db: database or disk is full"


# Runs


async def test_a_run_is_told_with_all_that_is_known(here: Served, patient: Patient) -> None:
    job = Job("j", "a job", "a group", "alice", "http://vendor/j")
    run = known(
        "1",
        job=job,
        attempt=2,
        vendor_state="RUNNING",
        substate="overload",
        queued_ms=NOW_MS - 90_000,
        started_ms=NOW_MS - 60_000,
    )
    patient.usual["a", "1"] = 45_500
    patient.done["a", "1"] = 0.25
    told = draft(run, progress=0.05)
    await here.journal.commit(Commit(source="a", runs=[run], events=[told]))
    assert await here.get("/api/v1/runs") == {
        "runs": [
            {
                "source": "a",
                "job": {
                    "id": "j",
                    "name": "a job",
                    "group": "a group",
                    "owner": "alice",
                    "url": "http://vendor/j",
                },
                "run": {
                    "id": "1",
                    "attempt": 2,
                    "queued_at": "2027-01-15T07:58:30.000Z",
                    "started_at": "2027-01-15T07:59:00.000Z",
                    "ended_at": None,
                    "progress": 0.25,
                },
                "state": "running",
                "substate": "overload",
                "vendor_state": "RUNNING",
                "since": "2027-01-15T07:59:00.000Z",
                "watched": True,
                "terminal": False,
                "error": None,
                "usual_s": 45.5,
            }
        ],
        "next": None,
    }


async def test_a_failed_run_comes_with_the_reason(here: Served) -> None:
    await here.tell(known("1", State.FAILED))
    [run] = (await here.get("/api/v1/runs?state=failed"))["runs"]
    assert run["error"] == {"code": "E1", "message": "1 broke"}
    assert run["terminal"]
    assert not run["watched"]


async def test_an_event_of_an_earlier_state_says_nothing_of_the_present_one(here: Served) -> None:
    await here.tell(known("1", State.FAILED))
    await here.remember(known("1", State.RUNNING, attempt=2))
    [run] = (await here.get("/api/v1/runs"))["runs"]
    assert (run["state"], run["error"]) == ("running", None)


async def ids(here: Served, query: str) -> list[str]:
    return [run["run"]["id"] for run in (await here.get(f"/api/v1/runs?{query}"))["runs"]]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", ["4", "3", "2", "1"]),
        ("source=&state=&job=&q=&limit=&cursor=", ["4", "3", "2", "1"]),
        ("source=a", ["3", "2", "1"]),
        ("source=a&source=b", ["4", "3", "2", "1"]),
        ("source=a&source=a", ["3", "2", "1"]),
        ("source=gone", ["5"]),
        ("state=failed", ["2"]),
        ("state=failed&state=queued&state=queued", ["4", "2"]),
        ("job=loads", ["3"]),
        ("job=l%2F1", ["3"]),
        ("q=LOAD", ["3"]),
        ("q=%F0%9F%98%80", ["1"]),
        ("limit=2", ["4", "3"]),
    ],
)
async def test_runs_are_chosen_by_every_parameter(
    here: Served, query: str, found: list[str]
) -> None:
    await here.remember(
        known("1", last_ms=1, job=Job("😀")),
        known("2", State.FAILED, last_ms=2),
        known("3", last_ms=3, job=Job("l/1", "loads")),
    )
    await here.remember(known("4", State.QUEUED, last_ms=4), source="b")
    await here.remember(known("5", last_ms=5), source="gone")
    assert await ids(here, query) == found


async def test_runs_are_walked_through_by_cursor(here: Served) -> None:
    await here.remember(*(known(str(number), last_ms=number) for number in range(25)))
    found, cursor = [], ""
    while cursor is not None:
        page = await here.get(f"/api/v1/runs?limit=10&cursor={cursor}")
        found.append([int(run["run"]["id"]) for run in page["runs"]])
        cursor = page["next"]
    assert found == [[*range(24, 14, -1)], [*range(14, 4, -1)], [*range(4, -1, -1)]]


# One run


async def test_a_run_is_told_with_its_events(here: Served) -> None:
    for state in (State.QUEUED, State.RUNNING, State.FAILED):
        await here.tell(known("1", state))
        await here.tell(known("2", state))
    detail = await here.get("/api/v1/runs/a/j/1")
    assert detail["run"]["state"] == "failed"
    assert detail["run"]["error"]["message"] == "1 broke"
    assert [event["data"]["state"] for event in detail["events"]] == ["queued", "running", "failed"]
    assert [event["subject"] for event in detail["events"]] == ["1", "1", "1"]
    assert detail["more"] is False


async def test_what_was_told_under_a_provisional_id_belongs_to_the_run(here: Served) -> None:
    await here.tell(known("j@1", State.QUEUED))
    run = known("7", State.RUNNING)
    told = draft(run, sequence=2, detail={"provisional_id": "j@1"})
    await here.journal.commit(Commit(source="a", runs=[run], events=[told], dropped=[("j", "j@1")]))
    await here.tell(known("7", State.SUCCEEDED))
    detail = await here.get("/api/v1/runs/a/j/7")
    assert [event["subject"] for event in detail["events"]] == ["j@1", "7", "7"]


async def test_of_very_many_events_the_newest_are_told(here: Served) -> None:
    run = known("1")
    drafts = [draft(run, sequence=number) for number in range(1, 503)]
    await here.journal.commit(Commit(source="a", runs=[run], events=drafts))
    detail = await here.get("/api/v1/runs/a/j/1")
    assert detail["more"] is True
    assert [int(event["sequence"]) for event in detail["events"]] == [*range(3, 503)]


@pytest.mark.parametrize(
    ("job_id", "run_id"),
    [
        ("j", "j"),
        ("a/b", "1/2/3"),
        ("//", "/"),
        ("%2F", "%25"),
        ("a b+c", "?x=1&y=#z"),
        ("<script>alert(1)</script>", "'\"\\"),
        ("Łódź\u2028", "😀\n\t\x00"),
        ("", ""),
    ],
)
async def test_ids_may_hold_anything(here: Served, job_id: str, run_id: str) -> None:
    await here.tell(known(run_id, job=Job(job_id)))
    detail = await here.get(f"/api/v1/runs/a/{quote(job_id, safe='')}/{quote(run_id, safe='')}")
    assert (detail["run"]["job"]["id"], detail["run"]["run"]["id"]) == (job_id, run_id)
    assert len(detail["events"]) == 1


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/a/j/9", 404, "source a has no run 9 of job j"),
        ("/a/j", 404, "wanted /api/v1/runs/<source>/<job>/<run>, each percent-encoded, / as %2F"),
        ("/", 404, "wanted /api/v1/runs/<source>/<job>/<run>, each percent-encoded, / as %2F"),
        (
            "/a/b/c/d",
            404,
            "wanted /api/v1/runs/<source>/<job>/<run>, each percent-encoded, / as %2F",
        ),
        ("/a/j/%FF", 400, "the ids are not UTF-8, percent-encoded"),
    ],
)
async def test_a_run_that_is_not_there_is_told_so(
    here: Served, path: str, status: int, detail: str
) -> None:
    answer = await here.get(f"/api/v1/runs{path}", status=status)
    assert answer["detail"] == detail


# Counts


async def test_a_day_is_counted_by_quarters_of_an_hour(here: Served) -> None:
    quarter_ms = HOUR_MS // 4
    await here.tell(known("old"), at_ms=NOW_MS - 24 * HOUR_MS)
    await here.tell(known("1"), known("2", State.FAILED), at_ms=NOW_MS - 23 * HOUR_MS)
    await here.tell(known("3", State.FAILED), at_ms=NOW_MS - 1)
    await here.tell(known("4"), source="b", at_ms=NOW_MS)
    await here.tell(known("5"), source="b", at_ms=NOW_MS + 2 * quarter_ms)
    stats = await here.get("/api/v1/stats")
    assert (stats["slot_s"], len(stats["slots"])) == (900, 96)
    assert stats["slots"][0]["at"] == "2027-01-14T08:15:00.000Z"
    counts = {
        slot["at"]: (slot["transitions"], slot["failures"])
        for slot in stats["slots"]
        if slot["transitions"]
    }
    assert counts == {
        "2027-01-14T09:00:00.000Z": (2, 1),
        "2027-01-15T07:45:00.000Z": (1, 1),
        "2027-01-15T08:00:00.000Z": (1, 0),
    }
    only_b = await here.get("/api/v1/stats?source=b")
    assert sum(slot["transitions"] for slot in only_b["slots"]) == 1


# What is wrong


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/api/v1/runs?limit=0", "limit: must be a whole number from 1 to 500"),
        ("/api/v1/runs?limit=501", "limit: must be a whole number from 1 to 500"),
        ("/api/v1/runs?limit=-1", "limit: must be a whole number from 1 to 500"),
        ("/api/v1/runs?limit=1e2", "limit: must be a whole number from 1 to 500"),
        ("/api/v1/runs?limit=%D9%A1", "limit: must be a whole number from 1 to 500"),
        ("/api/v1/runs?limit=1&limit=2", "limit: given 2 times, wanted once"),
        ("/api/v1/runs?source=A", "source: no name of a source, which has only a-z 0-9 _ -"),
        ("/api/v1/runs?source=a%0A", "source: no name of a source, which has only a-z 0-9 _ -"),
        ("/api/v1/runs?cursor=x", "cursor: is none of ours; begin again without it"),
        ("/api/v1/runs?cursor=%F0%9F%98%80", "cursor: is none of ours; begin again without it"),
        ("/api/v1/runs?cursor=WzEsMl0", "cursor: is none of ours; begin again without it"),
        (
            "/api/v1/runs?cursor=Wzk5OTk5OTk5OTk5OTk5OTk5OTksIiIsIiIsIiJd",
            "cursor: is none of ours; begin again without it",
        ),
        ("/api/v1/runs?stat=failed", "stat: unknown parameter; did you mean state?"),
        (
            "/api/v1/runs?xyz=1",
            "xyz: unknown parameter; there are cursor, job, limit, q, source, state",
        ),
        (
            "/api/v1/runs?state=broken&limit=x",
            "state: there are queued, starting, running, suspended, stopping, succeeded, failed,"
            " canceled, unknown; limit: must be a whole number from 1 to 500",
        ),
        ("/api/v1/stats?since=1h", "since: unknown parameter; there are source"),
        ("/api/v1/sources?x=1", "x: unknown parameter; there are none"),
        ("/api/v1/runs/a/j/1?x=1", "x: unknown parameter; there are none"),
        (
            "/api/v1/events?since=yesterday",
            "since: must be a span like 10m or 2h, or a time like 2026-01-31T12:00:00Z",
        ),
        (
            "/api/v1/events?since=2026-01-31T12:00:00",
            "since: must be a span like 10m or 2h, or a time like 2026-01-31T12:00:00Z",
        ),
        (
            "/api/v1/events?type=faild",
            "type: no such event; give a state, down, up, job.<state>, source.down or a whole"
            " type such as dev.poller.job.failed",
        ),
    ],
)
async def test_wrong_parameters_are_told_all_at_once(here: Served, path: str, detail: str) -> None:
    answer = await here.get(path, status=400)
    assert answer == {
        "type": "about:blank",
        "title": "Bad Request",
        "status": 400,
        "detail": detail,
    }


async def test_problems_have_their_own_content_type(here: Served) -> None:
    async with here.client.get(f"{here.url}/api/v1/nothing") as response:
        assert response.status == 404
        assert response.content_type == "application/problem+json"
        problem = await response.json()
    assert problem["detail"] == "there is nothing at /api/v1/nothing; see /openapi.json"


@pytest.mark.parametrize("path", ["/api/v1/runs", "/api/v1/events", "/api/v1/runs/a/b/c", "/"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_nothing_but_reading_is_allowed(here: Served, path: str, method: str) -> None:
    async with here.client.request(method, here.url + path) as response:
        assert response.status == 405
        assert "GET" in response.headers["Allow"]
        assert (await response.json(content_type=None))["status"] == 405


@pytest.mark.parametrize("path", ["/api/v1/sources", "/api/v1/runs", "/api/v1/stats", "/metrics"])
async def test_a_journal_that_cannot_be_read_is_a_503(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = Patient()
    error = patient.error = JournalError("journal.db: disk I/O error")

    def broken(*_: object) -> Any:
        raise error

    monkeypatch.setattr(patient, "source_status", broken)
    async with serving(tmp_path, patient) as here:
        problem = await here.get(path, status=503)
    assert problem["detail"] == "journal.db: disk I/O error"


# Headers


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/api/v1/runs", "/api/v1/nothing", "/metrics", "/openapi.json"]
)
async def test_answers_are_neither_kept_nor_guessed_nor_framed(here: Served, path: str) -> None:
    async with here.client.get(here.url + path) as response:
        fields = response.headers
    assert fields["Cache-Control"] == "no-store"
    assert fields["X-Content-Type-Options"] == "nosniff"
    assert fields["Referrer-Policy"] == "no-referrer"
    assert fields["Cross-Origin-Resource-Policy"] == "same-origin"
    policy = fields["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


async def test_head_is_get_without_a_body(here: Served) -> None:
    for path in ("/", "/api/v1/runs", "/api/v1/sources"):
        async with here.client.head(here.url + path) as response:
            assert (response.status, await response.read()) == (200, b"")
