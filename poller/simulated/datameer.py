"""Datameer from the other side: what runs, artifacts, histories, and details of executions."""

from __future__ import annotations

import datetime
from typing import Any

import orjson

from poller.runs import Ms, State
from poller.wire import Request, Response
from poller.world import Kind, SimRun, World

_SAID = {
    State.QUEUED: "QUEUED",
    State.RUNNING: "RUNNING",
    State.STOPPING: "ABORTING",
    State.SUCCEEDED: "COMPLETED",
    State.FAILED: "ERROR",
    State.CANCELED: "CANCELED",
}

KINDS = (Kind(states=frozenset(_SAID)),)

_SORTS = ("import-job", "workbook", "export-job")
_UNNAMED_MS = 300
"""For how long the list shows a running execution without its id."""


def render(world: World, request: Request) -> Response:
    """Answer as Datameer; with an odd seed as a newer one, which writes times the American way."""
    jobs = {job.number for job in world.definitions}
    match request.path.split("/"):
        case ["", "rest", "jobs", "list-running"]:
            return _answer([_active(world, run) for run in world.active()])
        case ["", "rest", sort] if sort in _SORTS:
            return _answer(_artifacts(world, _SORTS.index(sort)))
        case ["", "rest", "job-configuration", "job-history", number] if _whole(number) in jobs:
            return _answer(_history(world, int(number), dict(request.query)))
        case ["", "rest", "job-execution", "job-details", number] if _whole(number) in world.runs:
            return _answer(_details(world, world.runs[int(number)]))
        case _:
            return Response(
                status=404, headers={"content-type": "text/html"}, body=b"<html></html>"
            )


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _answer(document: list[dict[str, Any]] | dict[str, Any]) -> Response:
    """A list of one comes as that one, without its brackets."""
    if isinstance(document, list) and len(document) == 1:
        document = document[0]
    headers = {"content-type": "application/json"}
    return Response(status=200, headers=headers, body=orjson.dumps(document))


def _artifacts(world: World, sort: int) -> list[dict[str, Any]]:
    jobs = (job for job in world.definitions if job.number % len(_SORTS) == sort)
    return [{"id": job.number, "name": job.name, "description": ""} for job in jobs]


def _active(world: World, run: SimRun) -> dict[str, Any]:
    row = {
        "dapJobConfigurationId": run.definition.number,
        "jobStatus": _SAID[run.now.state],
        "progress": int(100 * run.progress(world.now_ms)),
    }
    begun_ms = run.now.started_ms
    if begun_ms is None or world.now_ms - begun_ms >= _UNNAMED_MS:
        row["jobExecutionId"] = run.number
    if begun_ms is not None:
        row |= {"startTime": _clock(world, begun_ms), "estimateTime": "11 sec"}
    return row


def _history(world: World, job: int, query: dict[str, str]) -> list[dict[str, Any]]:
    runs = [run for run in reversed(world.runs.values()) if run.definition.number == job]
    first, length = int(query.get("start", 0)), int(query.get("length", 10))
    return [{"id": run.number, "jobStatus": _word(run)} for run in runs[first : first + length]]


def _details(world: World, run: SimRun) -> dict[str, Any]:
    attempt, records = run.now, int(1000 * run.progress(world.now_ms))
    times = {"startTime": attempt.started_ms, "stopTime": attempt.ended_ms}
    return {
        **{name: _clock(world, at_ms) for name, at_ms in times.items() if at_ms is not None},
        "jobStatus": _word(run),
        "jobConfigurationId": run.definition.number,
        "file": {"id": run.definition.number + 2, "uuid": run.uuid},
        "successCount": records,
        "failureCount": int(attempt.state is State.FAILED),
        "counters": {"IMPORT_RECORDS": records, "IMPORT_DROPPED_RECORDS": int(attempt.warnings)},
    }


def _word(run: SimRun) -> str:
    if run.now.state is State.SUCCEEDED and run.now.warnings:
        return "COMPLETED_WITH_Warnings"
    return _SAID[run.now.state]


def _clock(world: World, at_ms: Ms) -> str:
    at = datetime.datetime.fromtimestamp(at_ms // 1000, datetime.UTC)
    if world.seed % 2:
        hour = at.hour % 12 or 12
        return f"{at:%b} {at.day}, {at.year}, {hour}:{at:%M:%S}\u202f{at:%p}"
    fraction = f"{at_ms % 1000:03}".rstrip("0") or "0"
    return f"{at:%Y-%m-%d %H:%M:%S}.{fraction}"
