"""A small vendor whose server lives in memory, a journal in memory, and a source watched there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import msgspec

from poller.errors import Invalid, VendorError
from poller.events import Event, JobEvent, decode
from poller.fetch import Fetch
from poller.journal import Journal
from poller.known import Commit, Condition, Key, Known, Memories, Memory, key_of
from poller.ledger import FirstContact, Ledger, open_ledger
from poller.poll import Plan, Watch
from poller.runs import Job, Ms, Problem, Seen, State
from poller.schedule import Pace
from poller.telemetry import Metrics
from poller.wire import BadRow, Options, Page, Request, Response, Vendor, refuse
from poller.world import World

EPOCH_MS = 1_700_000_000_000
"""The wall clock's time where the loop's clock starts."""

Row = dict[str, Any]


def now_ms() -> Ms:
    """The wall clock, in step with the loop's."""
    return EPOCH_MS + round(asyncio.get_running_loop().time() * 1000)


class ToyOptions(Options):
    """What a toy source is like.

    Attributes:
        lists: names of its listings; each is a scope.
        feed: they show changes only, never everything.
        spread: their first pages are spread over the interval.
        sweeps: how many questions by id every poll begins with, to be spread.
        asks: failed rows lack the reason, which has to be asked for.
        settles: it can be asked for a run by id.
    """

    lists: tuple[str, ...] = ("",)
    feed: bool = False
    spread: bool = False
    sweeps: int = 0
    asks: bool = False
    settles: bool = True


def _start(options: ToyOptions, memory: Memory) -> list[Request]:
    lists = [Request(path=f"/list/{name}", spread=options.spread) for name in options.lists]
    sweeps = [_by_id(f"/sweep/{number}", spread=True) for number in range(options.sweeps)]
    return [*lists, *sweeps]


def _by_id(path: str, *, spread: bool = False) -> Request:
    return Request(path=path, by_id=True, spread=spread)


def _parse(options: ToyOptions, request: Request, response: Response, memory: Memory) -> Page:
    _, kind, name, *_ = request.path.split("/")
    if kind == "run" and response.status == 404:
        return Page(gone=[(name, name)])
    refuse(response)
    try:
        body = json.loads(response.body)
    except ValueError as error:
        raise Invalid("torn", response.body) from error
    runs, shown, bad = [], [], []
    for number, row in enumerate(body.get("rows", ())):
        if "state" not in row:
            bad.append(BadRow(f"$.rows[{number}]", "no state"))
            continue
        seen = _seen(row, name if kind == "list" else "")
        known = memory.get(seen.job.id, seen.run_id)
        if known is not None and known.fingerprint == seen.fingerprint != 0:
            shown.append(known)
        else:
            runs.append(seen)
    follow = [Request(path=path) for path in body.get("follow", ())]
    follow += [_by_id(path) for path in body.get("questions", ())]
    return Page(
        runs=runs,
        shown=shown,
        follow=follow,
        complete=name if kind == "list" and not options.feed else None,
        gone=[(run, run) for run in body.get("gone", ())],
        marks=body.get("marks", {}),
        bad=bad,
        notes=body.get("notes", ()),
    )


def _seen(row: Row, scope: str) -> Seen:
    fields = {"run_id": row["id"], "vendor_state": row["state"].upper(), "scope": scope} | row
    run_id, why = fields.pop("id"), fields.pop("why", None)
    job = Job(fields.pop("job", run_id))
    return Seen(
        **fields | {"state": State(row["state"])},
        job=job,
        problem=None if why is None else Problem(None, why),
    )


def _settle(options: ToyOptions, known: Known) -> Request | None:
    return _by_id(f"/run/{known.run_id}") if options.settles else None


def _ask(options: ToyOptions, known: Known | None, seen: Seen) -> Request | None:
    if options.asks and seen.state is State.FAILED and seen.problem is None:
        return _by_id(f"/why/{seen.run_id}")
    return None


def _render(world: World, request: Request) -> Response:
    return Response(status=404)


VENDOR = Vendor(
    name="toy",
    options=ToyOptions,
    words={state.value: (state, None) for state in State},
    start=_start,
    parse=_parse,
    settle=_settle,
    ask=_ask,
    render=_render,
    kinds=(),
)

Answer = Row | Response | VendorError


@dataclass(slots=True)
class Server:
    """Answers by path; a list of answers is used up from the front, its last one stays.

    Attributes:
        answers: a document, a whole response, or an error of the line; a path that has none is
            404, and a listing that has none is empty.
        asked: every question's path, with the loop's time.
        takes_s: how long an answer takes.
    """

    answers: dict[str, Answer | list[Answer]] = field(default_factory=dict)
    asked: list[tuple[float, str]] = field(default_factory=list)
    takes_s: float = 0.0

    def lists(self, *rows: Row, name: str = "", **more: Any) -> None:
        """From now on, a listing is this."""
        self.answers[f"/list/{name}"] = {"rows": list(rows), **more}

    def times(self, start: str = "/") -> list[float]:
        """When paths that start like this were asked for."""
        return [at_s for at_s, path in self.asked if path.startswith(start)]

    def paths(self, start: str = "/") -> list[str]:
        """The paths that start like this and were asked for, in order."""
        return [path for _, path in self.asked if path.startswith(start)]

    async def fetch(self, request: Request) -> Response:
        """As `fetch.connect` gives it."""
        self.asked.append((asyncio.get_running_loop().time(), request.path))
        await asyncio.sleep(self.takes_s)
        answer: Any = self.answers.get(request.path)
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, VendorError):
            raise answer
        if isinstance(answer, Response):
            return answer
        if answer is None and not request.path.startswith("/list/"):
            return Response(status=404)
        return Response(status=200, body=json.dumps(answer or {}).encode())


class MemoryJournal:
    """What a source's ledger needs of a journal, without a file and a thread."""

    def __init__(self) -> None:
        self.commits: list[Commit] = []
        self.marks: dict[str, str] = {}
        self._condition: bytes | None = None
        self._runs: dict[Key, bytes] = {}

    async def commit(self, commit: Commit) -> None:
        """Keep what survives a restart; as bytes, so that nothing else does."""
        self.commits.append(commit)
        for dropped in commit.dropped:
            self._runs.pop(key_of(*dropped), None)
        for run in commit.runs:
            self._runs[run.key] = msgspec.json.encode(msgspec.structs.replace(run, fingerprint=0))
        if commit.condition is not None:
            self._condition = msgspec.json.encode(commit.condition)
        for name, value in commit.marks.items():
            self.marks[name] = value
            if not value:
                del self.marks[name]

    async def load(self, _source: str) -> Memories:
        """What a restart finds."""
        condition = self._condition
        return Memories(
            runs=[msgspec.json.decode(run, type=Known) for run in self._runs.values()],
            condition=None if condition is None else msgspec.json.decode(condition, type=Condition),
            marks=dict(self.marks),
        )

    def events(self) -> list[Event]:
        """Every event, decoded, in order."""
        return [decode(draft.body) for commit in self.commits for draft in commit.events]

    def told(self) -> list[tuple[str, str]]:
        """Run and state of every event; of a source's, "" and up or down."""
        return [
            (event.subject, event.data.state.value)
            if isinstance(event, JobEvent)
            else ("", "up" if event.data.up else "down")
            for event in self.events()
        ]

    def of(self, run_id: str) -> list[JobEvent]:
        """The events of one run."""
        events = self.events()
        return [e for e in events if isinstance(e, JobEvent) and e.subject == run_id]


class Middle(Random):
    """No chance at all: always the middle."""

    def uniform(self, a: float, b: float) -> float:
        """The mean of both."""
        return (a + b) / 2


PLAN = Plan(
    source="s",
    vendor=VENDOR,
    options=ToyOptions(),
    pace=Pace(interval_s=10.0, idle_interval_s=10.0, retry_refused_s=300.0),
    concurrency=8,
    rate_per_s=100.0,
    resync_s=600.0,
    vanish_after=3,
    timeout_s=5.0,
)


async def ledger_of(
    journal: MemoryJournal | Journal,
    plan: Plan = PLAN,
    metrics: Metrics | None = None,
    *,
    first_contact: FirstContact = "active",
    down_after: int = 3,
    retention_s: float = 86_400.0,
    at_ms: Ms | None = None,
    forecasts: Pace | None = None,
) -> Ledger:
    """The ledger that a start finds in the journal."""
    return await open_ledger(
        cast("Journal", journal),
        metrics or Metrics(),
        source=plan.source,
        vendor=plan.vendor.name,
        first_contact=first_contact,
        down_after=down_after,
        retention_s=retention_s,
        now_ms=now_ms() if at_ms is None else at_ms,
        forecasts=forecasts,
    )


@asynccontextmanager
async def watched(
    fetch: Fetch,
    journal: MemoryJournal | Journal,
    plan: Plan = PLAN,
    *,
    random: Random | None = None,
    metrics: Metrics | None = None,
    now_ms: Callable[[], Ms] = now_ms,
    **more: Any,
) -> AsyncIterator[Watch]:
    """A source under watch from now on; leaving stops it, as a restart would.

    What else is given goes to its ledger.
    """
    metrics = metrics or Metrics()
    ledger = await ledger_of(journal, plan, metrics, at_ms=now_ms(), **more)
    watch = Watch(plan, ledger, fetch, metrics, now_ms=now_ms, random=random or Middle())
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def row(run_id: str, state: str, **fields: Any) -> Row:
    """A row of a listing."""
    return {"id": run_id, "state": state, **fields}


def why(run_id: str, text: str, **fields: Any) -> Row:
    """The answer that tells why a run failed."""
    return {"rows": [row(run_id, "failed", why=text, **fields)]}
