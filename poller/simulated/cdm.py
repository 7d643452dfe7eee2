"""CDM from the other side: the list of jobs, their last runs and their histories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from urllib.parse import unquote

import orjson

from poller.runs import State
from poller.wire import Request, Response
from poller.world import Definition, Kind, SimRun, World

_SAID = {
    State.QUEUED: "PENDING",
    State.STARTING: "BOOTING",
    State.RUNNING: "RUNNING",
    State.SUCCEEDED: "SUCCEEDED",
    State.FAILED: "FAILED",
    State.CANCELED: "STOPPED",
}

KINDS = tuple(Kind(name=name, states=frozenset(_SAID)) for name in ("NORMAL_JOB", "BATCH_JOB"))

_Told: TypeAlias = Callable[[World, Definition, Sequence[SimRun]], dict[str, Any]]


def render(world: World, request: Request) -> Response:
    """Answer as a cluster that lists the states of its jobs."""
    query = dict(request.query)
    match [unquote(part) for part in request.path.split("/")]:
        case ["", "v1.1", _, "clusters", _, "cdm", "job", "all"]:
            return _jobs(world, query)
        case ["", "v1.1", _, "clusters", _, "cdm", "job", name]:
            return _about(world, name, _details)
        case ["", "v1.1", _, "clusters", _, "cdm", "job", name, "status"]:
            return _about(world, name, _status)
        case ["", "v1.1", _, "clusters", _, "cdm", "submissions"]:
            return _about(world, query.get("jname", ""), _history)
        case _:
            return _json({"error_code": "APIG.0101", "error_msg": "The API does not exist"}, 404)


def _jobs(world: World, query: dict[str, str]) -> Response:
    kind = query.get("jobType", "NORMAL_JOB")
    number, size = int(query.get("page_no", "1")), int(query.get("page_size", "10"))
    last = {run.definition.number: run for run in world.runs.values()}
    jobs = [job for job in world.definitions if job.kind.name == kind]
    part = jobs[(number - 1) * size : number * size]
    rows = [_job(world, job, last.get(job.number)) for job in part]
    return _json({"total": len(jobs), "jobs": rows, "page_no": number, "page_size": size})


def _about(world: World, name: str, told: _Told) -> Response:
    """What is told of a job and its runs, newest first."""
    for job in world.definitions:
        if job.name == name:
            runs = [run for run in reversed(world.runs.values()) if run.definition is job]
            return _json(told(world, job, runs))
    return _json({"errCode": "Cdm.0100", "externalMessage": f"Job[{name}] doesn't exist."}, 400)


def _details(world: World, job: Definition, runs: Sequence[SimRun]) -> dict[str, Any]:
    row = _job(world, job, runs[0] if runs else None)
    return {"total": 0, "jobs": [row], "page_no": 1, "page_size": 10}


def _status(world: World, job: Definition, runs: Sequence[SimRun]) -> dict[str, Any]:
    never = {"job-name": job.name, "status": "NEVER_EXECUTED", "creation-date": world.now_ms}
    return {"submissions": [_run(world, runs[0]) if runs else never]}


def _history(world: World, job: Definition, runs: Sequence[SimRun]) -> dict[str, Any]:
    rows = [_run(world, run) for run in runs[:10]]
    return {"submissions": rows, "total": len(runs), "page_no": 1, "page_size": 10}


def _job(world: World, job: Definition, last: SimRun | None) -> dict[str, Any]:
    password = {"name": "toJobConfig.password", "value": "a-password"}
    row: dict[str, Any] = {
        "name": job.name,
        "job_type": job.kind.name,
        "group_name": job.group,
        "to-config-values": {"configs": [{"name": "toJobConfig", "inputs": [password]}]},
        "driver-config-values": {"configs": [{"name": "jarConfig", "inputs": {}}]},
        "status": "NEW",
    }
    if last is not None:
        row["status"] = _SAID[last.now.state]
        row["execute_create_date"] = last.now.queued_ms
        row["execute_update_date"] = last.now.ended_ms or world.now_ms
        if last.now.started_ms is not None:
            row["execute_start_date"] = last.now.started_ms
            row["external_id"] = f"job_local_{last.number:04}"
    return row


def _run(world: World, run: SimRun) -> dict[str, Any]:
    now, percent = run.now, 100 * run.progress(world.now_ms)
    row: dict[str, Any] = {
        "job-name": run.definition.name,
        "submission-id": run.number,
        "status": _SAID[now.state],
        "creation-user": run.definition.owner,
        "creation-date": str(now.queued_ms) if run.number % 2 else now.queued_ms,
        "last-update-date": now.changed_ms,
        "last-udpate-user": run.definition.owner,  # the vendor's spelling
        "isStopingIncrement": "",
        "progress": -1 if now.state is State.FAILED else percent,
    }
    if now.started_ms is not None:
        row |= {"execute-date": now.started_ms, "external-id": f"job_local_{run.number:04}"}
    if now.problem is not None:
        row |= {"error-summary": now.problem, "error-details": f"{now.problem}\n\tat Task.run"}
    if now.state is State.SUCCEEDED:
        rows = 10 * run.number
        counted = {"ROWS_READ": rows, "ROWS_WRITTEN": rows}
        counted |= dict.fromkeys(("BYTES_READ", "BYTES_WRITTEN", "FILES_READ", "FILES_WRITTEN"), -1)
        row["counters"] = {"org.apache.sqoop.submission.counter.SqoopCounters": counted}
    return row


def _json(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"content-type": "application/json"}
    return Response(status=status, headers=headers, body=orjson.dumps(content))
