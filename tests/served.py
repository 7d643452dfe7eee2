"""The HTTP side over a real journal, with a daemon that is as a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from poller import web
from poller.events import Draft, Transition, encode, job_event
from poller.journal import Journal, open_journal
from poller.journal.pages import open_pages
from poller.known import Commit, Known
from poller.runs import Job, Ms, Problem, State
from poller.telemetry import Metrics
from poller.web.answers import Sink, SourceStatus

NOW_MS = 1_800_000_000_000


class Patient:
    """A daemon that is as the test says."""

    def __init__(self, *troubles: str, sources: Iterable[str] = ("a", "b")) -> None:
        self.metrics = Metrics()
        self.instance = "test"
        self.refreshed = 0
        self.error: Exception | None = None
        self.statuses = [source_status(name) for name in sources]
        self.relays: list[Sink] = []
        self.usual: dict[tuple[str, str], Ms] = {}
        self.done: dict[tuple[str, str], float] = {}
        self._troubles = troubles

    def progress(self, source: str, run: Known) -> float | None:
        return self.done.get((source, run.run_id))

    async def troubles(self) -> list[str]:
        if self.error is not None:
            raise self.error
        return list(self._troubles)

    async def refresh_metrics(self) -> None:
        if self.error is not None:
            raise self.error
        self.refreshed += 1
        self.metrics.runs.labels("a", "running").set(self.refreshed)

    def source_status(self) -> list[SourceStatus]:
        return self.statuses

    def sinks(self) -> Sequence[Sink]:
        return self.relays

    def usual_ms(self, source: str, run: Known) -> Ms | None:
        return self.usual.get((source, run.run_id))


def source_status(name: str, **fields: Any) -> SourceStatus:
    status = SourceStatus(
        source=name,
        vendor="toy",
        condition="up",
        since="2027-01-15T07:00:00.000Z",
        reason=None,
        message=None,
        failures=0,
        contacted=True,
        polling=False,
        last_poll="2027-01-15T07:59:55.000Z",
        last_good="2027-01-15T07:59:55.000Z",
        next_poll="2027-01-15T08:00:10.000Z",
        latency=None,
        interval_s=15,
        idle_interval_s=60,
        rate_per_s=2,
        budget_used=0.25,
        runs=dict.fromkeys(State, 0),
    )
    return msgspec.structs.replace(status, **fields)


class Served:
    """The HTTP side as a client sees it, and the journal that it reads."""

    def __init__(self, client: aiohttp.ClientSession, journal: Journal, url: str) -> None:
        self.client = client
        self.journal = journal
        self.url = url
        self._sequences: dict[str, int] = {}

    async def get(self, path: str, status: int = 200, **headers: str) -> Any:
        """The JSON at a path; the path goes over the wire as it is written."""
        async with self.client.get(URL(self.url + path, encoded=True), headers=headers) as response:
            assert response.status == status, await response.text()
            return await response.json(content_type=None)

    async def tell(self, *runs: Known, source: str = "a", at_ms: Ms | None = None) -> None:
        """Commit these runs with an event each."""
        drafts = []
        for run in runs:
            sequence = self._sequences[source] = self._sequences.get(source, 0) + 1
            drafts.append(draft(run, source=source, sequence=sequence, at_ms=at_ms))
        await self.journal.commit(Commit(source=source, runs=runs, events=drafts))

    async def remember(self, *runs: Known, source: str = "a") -> None:
        """Commit these runs without events."""
        await self.journal.commit(Commit(source=source, runs=runs))


def known(run_id: str, state: State = State.RUNNING, **fields: Any) -> Known:
    """A run of job `j`, since a while."""
    run = Known(job=Job("j", "a job"), run_id=run_id, state=state, last_ms=NOW_MS - 60_000)
    return msgspec.structs.replace(run, **fields)


def draft(
    run: Known,
    *,
    source: str = "a",
    sequence: int = 1,
    at_ms: Ms | None = None,
    problem: Problem | None = None,
    **fields: Any,
) -> Draft:
    """The event that told what is known of a run; a failed one has a problem."""
    at_ms = run.since_ms if at_ms is None else at_ms
    if run.state is State.FAILED and problem is None:
        problem = Problem("E1", f"{run.run_id} broke")
    transition = Transition(
        job=run.job,
        run_id=run.run_id,
        attempt=run.attempt,
        state=run.state,
        vendor_state=run.vendor_state,
        time_ms=run.since_ms,
        by_vendor=True,
        previous=None,
        problem=problem,
        **fields,
    )
    event = job_event(
        transition,
        source=source,
        vendor="toy",
        sequence=sequence,
        observed_after_ms=None,
        observed_at_ms=at_ms,
    )
    return Draft(sequence, event.type, run.job.id, at_ms, encode(event), run.run_id)


@asynccontextmanager
async def serving(
    folder: Path,
    facts: Patient | None = None,
    *,
    token: str | None = None,
    listen: str = "127.0.0.1:0",
    now_ms: Callable[[], Ms] = lambda: NOW_MS,
) -> AsyncIterator[Served]:
    """Serve a journal in a folder; leaving ends the server first, then the client."""
    async with AsyncExitStack() as stack:
        journal = await stack.enter_async_context(open_journal(folder / "journal.db"))
        pages = stack.enter_context(open_pages(journal.path))
        client = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        facts = facts or Patient()
        base = await stack.enter_async_context(
            web.serve(listen, token, facts, journal=journal, pages=pages, now_ms=now_ms)
        )
        yield Served(client, journal, base)
