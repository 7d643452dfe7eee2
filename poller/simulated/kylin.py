"""Kylin from the other side: the list of Kylin 5, and that of Kylin 4 if asked in its terms."""

from __future__ import annotations

from typing import Any

import orjson

from poller.runs import State
from poller.wire import Request, Response
from poller.world import Kind, SimRun, World

_SAID = {
    State.QUEUED: ("PENDING", "READY"),
    State.RUNNING: ("RUNNING", "RUNNING"),
    State.SUSPENDED: ("STOPPED", "PAUSED"),
    State.SUCCEEDED: ("FINISHED", "SUCCEED"),
    State.FAILED: ("ERROR", "ERROR"),
    State.CANCELED: ("DISCARDED", "DISCARDED"),
}

KINDS = (Kind(states=frozenset(_SAID), reopens=True),)

_DAYS = (1, 7, 31, 366, 36_500)
_DEFAULTS = {"page_offset": "0", "page_size": "10", "offset": "0", "limit": "30"}


def render(world: World, request: Request) -> Response:
    """Answer as Kylin 5; as Kylin 4 what only that knows: `timeFilter` alone, a job by its path."""
    query, segments = dict(request.query), request.path.split("/")
    if segments == ["", "api", "jobs"]:
        return _list(world, query, old="time_filter" not in query and "timeFilter" in query)
    if segments[:3] != ["", "api", "jobs"] or segments[4:] not in ([], ["detail"]):
        return _json({"status": 404, "error": "Not Found", "path": request.path}, 404)
    found = next((run for run in world.runs.values() if run.uuid == segments[3]), None)
    if len(segments) == 4:
        return _json(_row4(world, found)) if found else Response(status=200)
    if query.get("project", "") not in _groups(world):
        return _fault(500, "KE-010001201", f'Can\'t find project "{query.get("project")}".')
    if found is None:
        return _fault(500, "KE-010032219", f'Can\'t find job "{segments[3]}".')
    return _json({"code": "000", "data": _steps(found), "msg": ""})


def _list(world: World, query: dict[str, str], *, old: bool) -> Response:
    names = ["time_filter", "page_offset", "page_size", "project"]
    if old:
        names = ["timeFilter", "offset", "limit", "projectName"]
    *numbers, project = ((_DEFAULTS | query).get(name, "") for name in names)
    if not all(number.isdecimal() for number in numbers):
        return _fault(400, "KE-010000003", f"Invalid Parameter: {', '.join(names)}")
    if project not in ("", *_groups(world)):
        if not old:
            return _fault(500, "KE-010001201", f'Can\'t find project "{project}".')
        project = ""
    window, first, size = map(int, numbers)
    # Kylin 4 counts rows, and windows from 1; Kylin 5 counts pages, and windows from 0.
    window, first = (window - 1, first) if old else (window, first * size)
    since_ms = world.now_ms - 86_400_000 * _DAYS[min(max(window, 0), 4)]
    runs = [
        run
        for run in sorted(world.runs.values(), key=lambda run: (-run.now.changed_ms, run.number))
        if run.now.changed_ms >= since_ms
        and project in ("", run.definition.group)
        and query.get("key", "") in run.uuid
    ]
    page = runs[first : first + size]
    if old:
        return _json([_row4(world, run) for run in page])
    data = {"value": [_row5(world, run) for run in page], "total_size": len(runs)}
    return _json({"code": "000", "data": data, "msg": ""})


def _groups(world: World) -> set[str]:
    return {definition.group for definition in world.definitions}


def _row5(world: World, run: SimRun) -> dict[str, Any]:
    word, finer = _SAID[run.now.state]
    return {
        "id": run.uuid,
        "job_status": word,
        "scheduler_state": finer,
        "job_name": "INDEX_BUILD",
        "project": run.definition.group,
        "submitter": run.definition.owner,
        "target_subject": run.definition.name,
        "step_ratio": run.progress(world.now_ms),
        "create_time": run.now.queued_ms,
        "steps": None,
        "tag": None,
        **_times(run),
    }


def _row4(world: World, run: SimRun) -> dict[str, Any]:
    return {
        "uuid": run.uuid,
        "job_status": _SAID[run.now.state][0],
        "name": f"{run.definition.name} - BUILD",
        "projectName": run.definition.group,
        "submitter": run.definition.owner,
        "related_cube": run.definition.name,
        "progress": 100 * run.progress(world.now_ms),
        "steps": _steps(run),
        **_times(run),
    }


def _times(run: SimRun) -> dict[str, int]:
    """The end is set whenever a job stops, the start with it if a job is discarded before that."""
    now = run.now
    ended_ms = now.changed_ms if now.state is State.SUSPENDED else now.ended_ms or 0
    started_ms = now.started_ms or (ended_ms if now.state is State.CANCELED else 0)
    return {"exec_start_time": started_ms, "exec_end_time": ended_ms}


def _steps(run: SimRun) -> list[dict[str, Any]]:
    word, problem = _SAID[run.now.state][0], run.now.problem
    begun = "FINISHED" if run.now.started_ms else word
    load = {
        "name": "Load Data To Index",
        "step_status": word,
        "info": {"node_info": "10.1.2.3:7070"},
    }
    if problem is not None:
        load |= {
            "failed_step_name": "Build indexes by layer",
            "failed_code": "KE-030001000(Job building error):",
            "failed_reason": f"Building job exception: {problem}",
        }
    return [{"name": "Detect Resource", "step_status": begun}, load]


def _fault(status: int, code: str, text: str) -> Response:
    fault = {"code": "999", "data": None, "msg": f"{code}: {text}", "error_code": code}
    return _json(fault, status)


def _json(content: object, status: int = 200) -> Response:
    headers = {"content-type": "application/json;charset=UTF-8"}
    return Response(status=status, headers=headers, body=orjson.dumps(content))
