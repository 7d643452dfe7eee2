"""The API: how it stands with sources and sinks, runs page by page, one run, counts of a day."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote

import msgspec
from aiohttp import web

from poller import __version__
from poller.errors import JournalError
from poller.events import JobEvent, decode, rfc3339
from poller.journal import Journal
from poller.journal.pages import Pages, Wanted
from poller.known import Known
from poller.runs import Ms
from poller.web.answers import (
    SLOT_S,
    SLOTS,
    Facts,
    RunPage,
    RunStatus,
    SinkStatus,
    Slot,
    Stats,
    Status,
    run_status,
)
from poller.web.parameters import Parameters, cursor
from poller.web.problems import RequestProblem

DEFAULT_LIMIT = 100
MAX_EVENTS = 500
_SLOT_MS = SLOT_S * 1000


class Api:
    """The handlers of everything under `/api/v1` but the stream."""

    def __init__(
        self, facts: Facts, journal: Journal, pages: Pages, now_ms: Callable[[], Ms]
    ) -> None:
        self._facts = facts
        self._journal = journal
        self._pages = pages
        self._now_ms = now_ms

    async def sources(self, request: web.Request) -> web.Response:
        """How it stands with every source and sink."""
        Parameters(request.query, ()).check()
        now_ms, offset = self._now_ms(), self._journal.last_offset
        sinks = []
        for sink in self._facts.sinks():
            behind = max(0, offset - sink.cursor)
            oldest_ms = await self._pages.oldest(sink.cursor) if behind else None
            lag_s = 0.0 if oldest_ms is None else max(0, now_ms - oldest_ms) / 1000
            sinks.append(
                SinkStatus(sink=sink.name, trouble=sink.trouble, lag_events=behind, lag_s=lag_s)
            )
        return answer(
            Status(
                now=rfc3339(now_ms),
                instance=self._facts.instance,
                version=__version__,
                offset=offset,
                journal=_trouble(self._journal),
                sources=self._facts.source_status(),
                sinks=sinks,
            )
        )

    async def runs(self, request: web.Request) -> web.Response:
        """A page of runs, the newest change first."""
        given = Parameters(request.query, ("source", "state", "job", "q", "limit", "cursor"))
        wanted = Wanted(
            sources=given.sources() or self._configured(),
            states=given.states(),
            job=given.one("job") or None,
            text=given.one("q"),
            after=given.cursor(),
            limit=given.limit(DEFAULT_LIMIT),
        )
        given.check()
        found, place = await self._pages.runs(wanted)
        told = await self._pages.newest([(source, run.job.id, run.run_id) for source, run in found])
        runs = [
            self._status(source, run, body) for (source, run), body in zip(found, told, strict=True)
        ]
        return answer(RunPage(runs=runs, next=cursor(place) if place else None))

    async def run(self, request: web.Request) -> web.Response:
        """One run and its events."""
        Parameters(request.query, ()).check()
        source, job_id, run_id = _ids(request)
        run = await self._pages.run(source, job_id, run_id)
        if run is None:
            raise RequestProblem(404, f"source {source} has no run {run_id} of job {job_id}")
        bodies = await self._pages.events_of(source, job_id, run_id, MAX_EVENTS + 1)
        if bodies and (provisional_id := _provisional_id(bodies[-1])):
            left = MAX_EVENTS + 1 - len(bodies)
            bodies += await self._pages.events_of(source, job_id, provisional_id, left)
        detail = {
            "run": self._status(source, run, bodies[0] if bodies else None),
            "events": [msgspec.Raw(body) for body in reversed(bodies[:MAX_EVENTS])],
            "more": len(bodies) > MAX_EVENTS,
        }
        return answer(detail)

    async def stats(self, request: web.Request) -> web.Response:
        """Transitions and failures of the last day by quarters of an hour."""
        given = Parameters(request.query, ("source",))
        sources = given.sources() or self._configured()
        given.check()
        first = self._now_ms() // _SLOT_MS - SLOTS + 1
        counts = [[0, 0] for _ in range(SLOTS)]
        for source in sources:
            for slot, transitions, failures in await self._pages.tally(
                source, first * _SLOT_MS, _SLOT_MS
            ):
                if 0 <= slot - first < SLOTS:
                    counts[slot - first][0] += transitions
                    counts[slot - first][1] += failures
        slots = [
            Slot(at=rfc3339((first + place) * _SLOT_MS), transitions=all_, failures=failed)
            for place, (all_, failed) in enumerate(counts)
        ]
        return answer(Stats(slot_s=SLOT_S, slots=slots))

    def _configured(self) -> list[str]:
        return [status.source for status in self._facts.source_status()]

    def _status(self, source: str, run: Known, told: bytes | None) -> RunStatus:
        return run_status(source, run, told, self._facts)


def answer(value: object) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _ids(request: web.Request) -> list[str]:
    """Source, job id and run id out of the path, whatever is in them."""
    parts = request.rel_url.raw_path.split("/")[4:]
    try:
        ids = [unquote(part, errors="strict") for part in parts]
    except UnicodeDecodeError as error:
        raise RequestProblem(400, "the ids are not UTF-8, percent-encoded") from error
    if len(ids) != 3:
        raise RequestProblem(
            404, "wanted /api/v1/runs/<source>/<job>/<run>, each percent-encoded, / as %2F"
        )
    return ids


def _provisional_id(body: bytes) -> str | None:
    """Under which id the run was told before this event, if it had another."""
    event = decode(body)
    found = event.data.detail.get("provisional_id") if isinstance(event, JobEvent) else None
    return found if isinstance(found, str) else None


def _trouble(journal: Journal) -> str | None:
    try:
        journal.check()
    except JournalError as error:
        return str(error)
    return None
