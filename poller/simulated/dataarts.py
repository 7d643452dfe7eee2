"""DataArts Factory from the other side: jobs of both sorts, batch instances, and their nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

import orjson

from poller.runs import State
from poller.wire import Request, Response
from poller.world import Definition, Kind, SimRun, World

_STREAM_SAID = {
    State.STARTING: "STARTING",
    State.RUNNING: "NORMAL",
    State.SUSPENDED: "PAUSE",
    State.STOPPING: "STOPPING",
    State.FAILED: "EXCEPTION",
    State.CANCELED: "STOPPED",
}
_BATCH_SAID = {
    State.QUEUED: "waiting",
    State.RUNNING: "running",
    State.SUSPENDED: "pause",
    State.SUCCEEDED: "success",
    State.FAILED: "fail",
    State.CANCELED: "manual-stop",
}

KINDS = (
    Kind(name="real_time", states=frozenset(_STREAM_SAID), stream=True),
    Kind(name="batch", states=frozenset(_BATCH_SAID), reopens=True),
)

_DAY = 86_400_000

R = TypeVar("R")


def render(world: World, request: Request) -> Response:
    """Answer as the one project whose jobs these are."""
    try:
        return _answer(world, request.path, dict(request.query))
    except ValueError:
        return _fault("DLF.3051", "The request parameter is invalid.")


def _answer(world: World, path: str, query: dict[str, str]) -> Response:
    sorts = {job.name: job.kind.name for job in world.definitions}
    match [unquote(part) for part in path.split("/")]:
        case ["", "v1", _, "jobs"]:
            return _jobs(world, query)
        case ["", "v1", _, "jobs", "instances", "detail"]:
            return _instances(world, query)
        case ["", "v1", _, "jobs", name, "status"] if sorts.get(name) == "real_time":
            return _status(world, name)
        case ["", "v1", _, "jobs", name, "instances", number] if sorts.get(name) == "batch":
            return _details(world, name, number)
        case ["", "v1", _, "jobs", _, "status"] | ["", "v1", _, "jobs", _, "instances", _]:
            return _fault("DLF.0100", "The job does not exists.")
        case _:
            return _fault("APIG.0101", "The API does not exist.", 404)


def _jobs(world: World, query: dict[str, str]) -> Response:
    kind, part = query.get("jobType", "BATCH").lower(), query.get("jobName", "")
    last = {run.definition.number: run for run in world.of(kind)}
    jobs = [job for job in world.definitions if job.kind.name == kind and part in job.name]
    rows = [_job(job, last.get(job.number)) for job in _page_of(jobs, query, 100)]
    return _json({"total": len(jobs), "jobs": rows})


def _instances(world: World, query: dict[str, str]) -> Response:
    """Newest plan first; without bounds what was planned since midnight."""
    low = int(query.get("minPlanTime", world.now_ms - world.now_ms % _DAY))
    high = int(query.get("maxPlanTime", world.now_ms))
    if high - low > 7 * _DAY:
        raise ValueError("too long a window")
    part, exact = query.get("jobName", ""), "preciseQuery" in query
    runs = [
        run
        for run in reversed(world.of("batch"))
        if low <= run.created_ms <= high and part in run.definition.name
        if not exact or part == run.definition.name
    ]
    rows = [_instance(run) for run in _page_of(runs, query, 1000)]
    return _json({"total": len(runs), "instances": rows})


def _page_of(rows: Sequence[R], query: dict[str, str], most: int) -> Sequence[R]:
    """One page; `offset` counts pages."""
    offset, limit = int(query.get("offset", 0)), int(query.get("limit", 10))
    if offset < 0 or not 1 <= limit <= most:
        raise ValueError("no such page")
    return rows[offset * limit : (offset + 1) * limit]


def _job(job: Definition, last: SimRun | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": job.name, "jobType": job.kind.name.upper(), "owner": job.owner}
    row["path"] = f"/{job.group}"
    if job.kind.stream:
        return row | (_times(last, "startTime") if last else {"status": "STOPPED"})
    row["status"] = "SCHEDULING"
    if last is not None:
        row["lastInstanceStatus"] = _word(last)
        row["lastInstanceEndTime"] = last.now.ended_ms
    return row


def _word(run: SimRun) -> str:
    now, is_stream = run.now, run.definition.kind.stream
    if now.warnings and now.state is State.RUNNING:
        return "OVERLOAD" if is_stream else "running-exception"
    return (_STREAM_SAID if is_stream else _BATCH_SAID)[now.state]


def _times(run: SimRun, start: str) -> dict[str, Any]:
    """State and times; what is not set is left out."""
    row = {"status": _word(run), start: run.now.started_ms, "endTime": run.now.ended_ms}
    return {name: value for name, value in row.items() if value is not None}


def _instance(run: SimRun) -> dict[str, Any]:
    name = run.definition.name
    return {
        "jobName": name,
        "jobInstanceName": name,
        "instanceId": run.number,
        "instanceType": 0,
        "planTime": run.created_ms,
        "submitTime": run.now.queued_ms,
        "executeTime": run.now.length_ms / 60_000,
        "forceSuccess": run.now.warnings and run.now.state is State.SUCCEEDED,
        "ignoreSuccess": False,
        "version": 1,
        **_times(run, "startTime"),
    }


def _status(world: World, name: str) -> Response:
    run = next((run for run in world.of("real_time") if run.definition.name == name), None)
    told = _times(run, "starttime") if run else {"status": "STOPPED"}
    source = {"name": "source", "LastInstanceStatus": "success", "jobInstanceId": 0}
    sink = {"name": "sink", "status": told["status"], "logPath": f"obs://dlf-log/{name}/sink.log"}
    return _json({"name": name, "nodes": [source, sink], **told})


def _details(world: World, name: str, number: str) -> Response:
    runs = (run for run in world.of("batch") if run.definition.name == name)
    run = next((run for run in runs if str(run.number) == number), None)
    if run is None:
        return _fault("DLF.0137", "Job instance does not exist.")
    row = _instance(run)
    del row["submitTime"]
    node = {"nodeName": "load", "status": row["status"], "errorMessage": run.now.problem}
    node["logPath"] = f"obs://dlf-log/{name}/load.job"
    return _json({**row, "total": 1, "nodes": [node]})


def _fault(code: str, message: str, status: int = 400) -> Response:
    return _json({"error_code": code, "error_msg": message}, status)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"content-type": "application/json"}
    return Response(status=status, headers=headers, body=orjson.dumps(content))
