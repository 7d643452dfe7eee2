"""Answers of a vendor that are whole, and yet not what they should be."""

from __future__ import annotations

from random import Random
from typing import Any

import orjson

from poller.wire import Request, Response, Vendor
from poller.world import World

_HISTORIES = ("submissions", "job-history", "executions")
"""What these leave out once has never been, for whoever reads them: they are believed."""

MANGLES = ("reordered rows", "repeated rows", "missing rows")


class Mangle:
    """Spoils the rows of listings while `kind` is set.

    Attributes:
        kind: one of MANGLES, or empty.
        hits: how many answers were changed.
    """

    def __init__(self, vendor: Vendor, random: Random) -> None:
        self.kind = ""
        self.hits = 0
        self._vendor = vendor
        self._random = random

    def render(self, world: World, request: Request) -> Response:
        """The vendor's answer, or a spoiled one."""
        answer = self._vendor.render(world, request)
        if not self.kind or answer.status != 200:
            return answer
        document = orjson.loads(answer.body or b"null")
        rows = _rows(document)
        if len(rows) < 2:
            return answer
        self.hits += 1
        if self.kind == "reordered rows":
            self._random.shuffle(rows)
        elif self.kind == "repeated rows":
            rows += self._random.sample(rows, len(rows) // 2)
        elif not any(word in request.path for word in _HISTORIES):
            rows[:] = [row for row in rows if self._random.random() < 0.5]
        return Response(status=200, headers=answer.headers, body=orjson.dumps(document))


def _rows(document: Any) -> list[dict[str, Any]]:
    """The longest list of objects in it, to be changed in place."""
    if isinstance(document, dict):
        return max(map(_rows, document.values()), key=len, default=[])
    is_listing = isinstance(document, list) and all(isinstance(row, dict) for row in document)
    return document if is_listing else []
