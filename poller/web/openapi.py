"""The API described in OpenAPI 3.1, its schemas made of the types that are encoded."""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
from aiohttp import web

from poller import __version__
from poller.events import TYPES, JobEvent, SourceEvent
from poller.runs import State
from poller.web.answers import ProblemDetails, RunDetail, RunPage, Stats, Status
from poller.web.api import DEFAULT_LIMIT, answer
from poller.web.parameters import MAX_LIMIT, SOURCE_NAME

Node: TypeAlias = dict[str, Any]


def document() -> Node:
    """The whole document."""
    kinds = (Status, RunPage, RunDetail, Stats, ProblemDetails, JobEvent, SourceEvent)
    refs, schemas = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    schema = dict(zip(kinds, refs, strict=True))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "poller",
            "version": __version__,
            "description": "What is polled, what runs, what has happened; nothing can be changed"
            " here. A parameter that is empty counts as not given.",
        },
        "paths": {
            "/api/v1/sources": _get("How it stands with sources and sinks", schema[Status]),
            "/api/v1/runs": _get(
                "Runs, the newest change first, page by page", schema[RunPage], _RUNS, (400,)
            ),
            "/api/v1/runs/{source}/{job}/{run}": _get(
                "One run and its events", schema[RunDetail], _RUN, (400, 404)
            ),
            "/api/v1/stats": _get(
                "Transitions and failures of the last day", schema[Stats], [_SOURCE], (400,)
            ),
            "/api/v1/events": _stream([schema[JobEvent], schema[SourceEvent]]),
        },
        "components": {
            "schemas": schemas,
            "responses": {
                name: {
                    "description": text,
                    "content": {"application/problem+json": {"schema": schema[ProblemDetails]}},
                }
                for name, text in _PROBLEMS.items()
            },
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "`http.token`, if set"}
            },
        },
        "security": [{}, {"token": []}],
    }


async def serve(_request: web.Request) -> web.Response:
    """The document as JSON."""
    return answer(_DOCUMENT)


def _get(
    summary: str,
    schema: Node,
    parameters: list[Node] | None = None,
    problems: tuple[int, ...] = (400,),
) -> Node:
    responses: Node = {
        "200": {"description": summary, "content": {"application/json": {"schema": schema}}}
    }
    return {
        "get": {
            "summary": summary,
            "parameters": parameters or [],
            "responses": responses | _refused(*problems, 401, 503),
        }
    }


def _stream(events: list[Node]) -> Node:
    text = (
        "Server-sent events of all sources in journal order; `data` is a CloudEvent, `id` its"
        " offset. Begins with what comes next, or where `since` or Last-Event-ID say. A heartbeat"
        " every 15 s moves `id` on past what the filters left out."
    )
    schema = {"type": "string", "contentSchema": {"oneOf": events}}
    return {
        "get": {
            "summary": "Events as they come",
            "description": text,
            "parameters": _EVENTS,
            "responses": {
                "200": {"description": text, "content": {"text/event-stream": {"schema": schema}}}
            }
            | _refused(400, 401, 503),
        }
    }


def _refused(*statuses: int) -> Node:
    return {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}


def _query(name: str, text: str, schema: Node) -> Node:
    return {"name": name, "in": "query", "description": text, "schema": schema}


def _many(name: str, text: str, schema: Node) -> Node:
    return _query(name, f"{text}; may be repeated", {"type": "array", "items": schema})


_PROBLEMS = {
    "400": "A parameter is wrong: `detail` says which and how",
    "401": "The token is missing or wrong",
    "404": "There is no such thing",
    "503": "It cannot be told now",
}
_SOURCE = _many(
    "source",
    "Only of this source; without it of every configured one",
    {"type": "string", "pattern": SOURCE_NAME},
)
_RUNS = [
    _SOURCE,
    _many("state", "Only in this state", {"enum": [state.value for state in State]}),
    _query("job", "Only of the job with this id or name", {"type": "string"}),
    _query("q", "Searched in ids, names, groups and owners, in any case", {"type": "string"}),
    _query(
        "limit",
        "At most so many",
        {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT},
    ),
    _query("cursor", "`next` of the page before", {"type": "string", "format": "cursor"}),
]
_RUN = [
    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name in ("source", "job", "run")
]
_EVENTS = [
    _SOURCE,
    _many(
        "type",
        "Only of this type, whole or its last words: `failed`, `job.failed`, `source.down`",
        {"type": "string", "examples": list(TYPES)},
    ),
    _query("since", "From then on: a time, or a span back from now", {"type": "string"}),
    {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "The last `id` that was received",
        "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
    },
]
_DOCUMENT = document()
