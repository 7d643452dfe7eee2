"""Errors of the API as problem details (RFC 9457), whoever raises them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TypeAlias

import msgspec
from aiohttp import hdrs, web

from poller.errors import JournalError, PollerError
from poller.web.answers import ProblemDetails

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RequestProblem(PollerError):
    """The request cannot be answered as it is.

    Attributes:
        status: of the answer.
        headers: more of the answer's header fields.
    """

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}


@web.middleware
async def told(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors into problem details."""
    try:
        return await handler(request)
    except RequestProblem as error:
        return problem(error.status, str(error), error.headers)
    except JournalError as error:
        return problem(503, str(error))
    except web.HTTPMethodNotAllowed as error:
        allow = ", ".join(sorted(error.allowed_methods))
        detail = f"{request.method} is not done here, only {allow}"
        return problem(405, detail, {hdrs.ALLOW: allow})
    except web.HTTPNotFound:
        return problem(404, f"there is nothing at {request.path}; see /openapi.json")


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> web.Response:
    """An answer that tells what is wrong."""
    details = ProblemDetails(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return web.Response(
        status=status,
        body=msgspec.json.encode(details),
        content_type="application/problem+json",
        headers=headers,
    )
