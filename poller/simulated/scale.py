"""Scale from the other side: the list of jobs, one job, and its executions."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlencode

import orjson

from poller.payload import iso_ms
from poller.runs import Ms, State
from poller.wire import Request, Response
from poller.world import Attempt, Kind, SimRun, World

_SAID = {
    State.QUEUED: "QUEUED",
    State.RUNNING: "RUNNING",
    State.SUSPENDED: "BLOCKED",
    State.SUCCEEDED: "COMPLETED",
    State.FAILED: "FAILED",
    State.CANCELED: "CANCELED",
}

KINDS = (Kind(states=frozenset(_SAID), reopens=True, vanishes=True),)

_TIMES = {"created", "queued", "started", "ended", "last_status_change", "last_modified"}


def render(world: World, request: Request) -> Response:
    """Answer as the server of the sources that the vendor follows."""
    path = re.fullmatch(r"/v[67]/jobs/(?:(\d{1,18})/(executions/)?)?", request.path)
    if path is None:
        return Response(status=404, body=b"<h1>Not Found</h1>")
    asked = parse_qs(urlencode(request.query))
    if path[1] is None:
        return _list(world, request.path, asked)
    run = world.runs.get(int(path[1]))
    if path[2]:
        rows = [] if run is None else [_attempt(run, attempt) for attempt in run.attempts]
        return _page(request.path, asked, rows[::-1])
    return _answer(404, detail="Not found.") if run is None else _answer(200, **_job(run))


def _list(world: World, path: str, asked: dict[str, list[str]]) -> Response:
    if complaint := _complaint(asked):
        return _answer(400, detail=complaint)
    started, ended = (iso_ms(asked.get(name, [""])[-1]) for name in ("started", "ended"))
    ids, statuses = asked.get("job_id"), asked.get("status")
    rows = [
        row
        for row in map(_job, world.runs.values())
        if (started or 0) <= (iso_ms(row["last_modified"]) or 0) <= (ended or world.now_ms)
        and (ids is None or str(row["id"]) in ids)
        and (statuses is None or row["status"] in statuses)
    ]
    for order in reversed(asked.get("order", ["last_modified"])):
        name = order.removeprefix("-")
        if name not in {"id", "status", "num_exes", "max_tries", *_TIMES}:
            return Response(status=500, body=b"<h1>Server Error (500)</h1>")
        rows.sort(key=_nulls_last(name), reverse=order != name)
    return _page(path, asked, rows)


def _complaint(asked: dict[str, list[str]]) -> str | None:
    for name in ("started", "ended"):
        for text in asked.get(name, []):
            if iso_ms(text) is None or not {"Z", "+"} & set(text):
                return f"Invalid ISO timestamp format for parameter: {name}"
    if "started" in asked and asked["started"] == asked.get("ended"):
        return "Start and end values must be different"
    if not all(text.isdecimal() for text in asked.get("job_id", [])):
        return 'Parameter must be a valid integer: "job_id"'
    return None


def _nulls_last(name: str) -> Callable[[dict[str, Any]], tuple[bool, Any]]:
    read = iso_ms if name in _TIMES else lambda value: value
    return lambda row: (row[name] is None, read(row[name]))


def _page(path: str, asked: dict[str, list[str]], rows: list[dict[str, Any]]) -> Response:
    """One page; its links are made of the server's own name, which may be of no use outside."""
    size = min(_number(asked, "page_size") or 100, 1000)
    page = _number(asked, "page") if "page" in asked else 1
    last = max(1, -(-len(rows) // size))
    if not 1 <= page <= last:
        return _answer(404, detail="Invalid page.")
    links = {}
    for name, number in (("next", page + 1), ("previous", page - 1)):
        query = urlencode(asked | {"page": [str(number)]}, doseq=True)
        links[name] = f"http://scale/api{path}?{query}" if 1 <= number <= last else None
    return _answer(200, count=len(rows), **links, results=rows[(page - 1) * size : page * size])


def _number(asked: dict[str, list[str]], name: str) -> int:
    text = asked.get(name, [""])[-1]
    return int(text) if text.isdecimal() and len(text) < 10 else 0


def _job(run: SimRun) -> dict[str, Any]:
    now = run.now
    row = _attempt(run, now)
    del row["exe_num"], row["job"]
    row |= {
        "id": run.number,
        "status": _SAID[now.state],
        "num_exes": now.number,
        "max_tries": 3,
        "recipe": None,
        "batch": {"id": 1, "title": run.definition.group},
        "is_superseded": False,
        "created": _text(run.created_ms),
        "last_status_change": _text(now.changed_ms),
        "last_modified": _text(now.changed_ms),
    }
    if now.state is State.CANCELED:
        row |= {"node": None, "ended": None}
    if run.number % 2 == 0 and now.number == 1 and now.started_ms is None:
        # Every other job waits for its input, and was never on the queue until it runs.
        row |= {"num_exes": 0, "queued": None}
        row["status"] = "PENDING" if now.state is State.QUEUED else row["status"]
    return row


def _attempt(run: SimRun, attempt: Attempt) -> dict[str, Any]:
    definition = run.definition
    error = {"id": 7, "name": "algorithm", "title": "Failure", "description": attempt.problem}
    return {
        "id": run.number * 1000 + attempt.number,
        "status": _SAID[attempt.state] if attempt.terminal else "RUNNING",
        "exe_num": attempt.number,
        "job": {"id": run.number},
        "job_type": {"id": definition.number, "name": definition.name, "version": "1.0.0"},
        "node": {"id": 1, "hostname": "node-1"} if attempt.started_ms is not None else None,
        "error": error if attempt.problem is not None else None,
        "created": _text(attempt.queued_ms),
        "queued": _text(attempt.queued_ms),
        "started": _text(attempt.started_ms),
        "ended": _text(attempt.ended_ms),
    }


def _text(ms: Ms | None) -> str | None:
    """With six digits of fraction, or three, or none if they are zero."""
    if ms is None:
        return None
    second = datetime.datetime.fromtimestamp(ms // 1000, datetime.UTC)
    instant = second.replace(microsecond=1000 * (ms % 1000))
    text = instant.isoformat(timespec="milliseconds" if ms % 2 else "auto")
    return text.replace("+00:00", "Z")


def _answer(status: int, /, **document: object) -> Response:
    headers = {"content-type": "application/json"}
    return Response(status=status, headers=headers, body=orjson.dumps(document))
