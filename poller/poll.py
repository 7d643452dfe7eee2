"""The polling loop of one source: questions → pages → ledger → sleep.

A poll first reads the listings, all pages of them. Then it asks by id: for what a change needs to
be told whole (a held row), for runs that a listing shows no more, and what the vendor wants swept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec
import structlog

from poller.errors import Invalid, Limited, Rejected, VendorError
from poller.fetch import Fetch
from poller.known import Key, Known, Memory, key_of
from poller.ledger import Ledger, Sighting
from poller.runs import Ms, Seen
from poller.schedule import Bucket, Pace
from poller.telemetry import Metrics
from poller.wire import Options, Page, Request, Vendor, retry_after_s

log = structlog.get_logger()

_MOST_REQUESTS = 20_000
"""A vendor whose pages lead on for ever is stopped here."""
_BAD_ROWS_LOGGED = 5
_PRUNE_EVERY_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is polled, and how: values out of the settings."""

    source: str
    vendor: Vendor
    options: Options
    pace: Pace
    concurrency: int
    rate_per_s: float
    resync_s: float
    vanish_after: int
    timeout_s: float


@dataclass(slots=True, kw_only=True)
class Held:
    """A row that is told only after a question about it was answered, or given up."""

    seen: Seen
    sighting: Sighting
    request: Request
    tries: int = 0


@dataclass(slots=True, kw_only=True)
class Visit:
    """One poll under way.

    Attributes:
        sighting: the circumstances at its beginning; they hold for all of it.
        complete: scopes of which a listing claims to show every active run → its first question.
        failed: first questions whose listing was not read whole.
        questions: by id, still to be asked.
        budget: how many of them may be asked in this poll.
    """

    began_ms: Ms
    began_s: float
    memory: Memory
    sighting: Sighting
    budget: int
    complete: dict[str, int] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    errors: list[VendorError] = field(default_factory=list)
    questions: list[Request] = field(default_factory=list)
    sent: int = 0


class Watch:
    """One source under watch: what the loop remembers from poll to poll."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        fetch: Fetch,
        metrics: Metrics,
        *,
        now_ms: Callable[[], Ms],
        random: Random,
    ) -> None:
        self.plan = plan
        self.ledger = ledger
        self.poke = asyncio.Event()
        """Set it to poll at once."""
        self.due_s = 0.0
        """When the next sign of life is due, by the loop's clock."""
        self._fetch = fetch
        self._metrics = metrics
        self._now_ms = now_ms
        self._random = random
        self._bucket = Bucket(plan.rate_per_s, plan.concurrency)
        self._held: dict[Key, Held] = {}
        self._misses: dict[Key, int] = {}
        self._whole = False
        self._quiet_until_s = 0.0
        self._pruned_s: float | None = None

    async def run(self) -> None:
        """Poll for ever.

        Raises:
            JournalError: what was found could not be written.
        """
        try:
            while True:
                await self._sleep(await self._step())
        finally:
            await self.ledger.save()

    async def _step(self) -> float:
        """One poll, whatever comes of it; gives the seconds until the next."""
        loop, pace, ledger = asyncio.get_running_loop(), self.plan.pace, self.ledger
        began_s = loop.time()
        self._metrics.polls.labels(self.plan.source).inc()
        try:
            await self.poll()
        except VendorError as error:
            if not ledger.condition.failures:
                self._log_failure(error)
            await ledger.failed(error, self._now_ms())
            wait_s = pace.after_failed(error, ledger.condition.failures, self._random)
        else:
            active = bool(self._held) or any(ledger.index.watched.values())
            wait_s = pace.after_good(active=active, random=self._random)
            wait_s -= loop.time() - began_s
            await self._prune(loop.time())
        self._metrics.poll_duration.labels(self.plan.source).observe(loop.time() - began_s)
        return max(wait_s, self._quiet_until_s - loop.time(), 0.0)

    async def _sleep(self, wait_s: float) -> None:
        self.due_s = asyncio.get_running_loop().time() + wait_s
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self.poke.wait()
        self.poke.clear()

    async def poll(self) -> None:
        """Ask what the vendor's plan asks, and tell what has changed.

        Raises:
            VendorError: a listing was not read whole; what was read of it has been taken.
            JournalError: what was found could not be written.
        """
        plan, ledger = self.plan, self.ledger
        began_ms = self._now_ms()
        memory = ledger.memory(
            began_ms, whole=self._whole, resync_s=plan.resync_s, rate_per_s=plan.rate_per_s
        )
        visit = Visit(
            began_ms=began_ms,
            began_s=asyncio.get_running_loop().time(),
            memory=memory,
            sighting=ledger.sighting(began_ms),
            budget=max(plan.concurrency, int(plan.rate_per_s * plan.pace.interval_s)),
        )
        self._whole = False
        first = list(plan.vendor.start(plan.options, memory))
        visit.questions += [request for request in first if request.by_id]
        await self._read_listings(visit, [request for request in first if not request.by_id])
        if not visit.errors:
            done = not any(not request.spread for request in visit.questions)
            await ledger.good(began_ms, self._now_ms(), contact_done=done)
        if _may_go_on(visit):
            await self._ask_by_id(visit)
        if visit.errors:
            raise min(visit.errors, key=_weight)
        finished = not any(not request.spread for request in visit.questions)
        if finished and not ledger.condition.contact_done:
            await ledger.good(began_ms, self._now_ms(), contact_done=True)
        if finished and not self._held:
            await ledger.save_marks()
        self._whole = True

    async def _read_listings(self, visit: Visit, requests: Sequence[Request]) -> None:
        async with asyncio.TaskGroup() as group:
            for root, (request, delay_s) in enumerate(self._paced(requests)):
                group.create_task(self._read_listing(visit, group, root, request, delay_s))

    async def _read_listing(
        self,
        visit: Visit,
        group: asyncio.TaskGroup,
        root: int,
        request: Request,
        delay_s: float = 0.0,
    ) -> None:
        await _until(visit.began_s + delay_s)
        try:
            page = await self._ask(visit, request)
        except VendorError as error:
            visit.errors.append(error)
            visit.failed.add(root)
            return
        if page.complete is not None:
            visit.complete[page.complete] = root
        await self._take(visit, page)
        for follow in page.follow:
            if follow.by_id:
                visit.questions.append(follow)
            else:
                group.create_task(self._read_listing(visit, group, root, follow))

    async def _ask(self, visit: Visit, request: Request) -> Page:
        """Put one question, within the rate; gives what the answer says.

        Raises:
            VendorError: it was not answered as documented.
        """
        visit.sent += 1
        if visit.sent > _MOST_REQUESTS:
            raise Invalid(
                f"more than {_MOST_REQUESTS} requests in one poll: pages lead on for ever"
            )
        now_s = asyncio.get_running_loop().time()
        send_s = now_s + self._bucket.take(now_s)
        self.due_s = max(self.due_s, send_s + self.plan.timeout_s)
        await _until(send_s)
        response = await self._fetch(request)
        try:
            return self.plan.vendor.parse(self.plan.options, request, response, visit.memory)
        except Limited as error:
            if error.retry_after_s is None:
                error.retry_after_s = retry_after_s(response, self._now_ms())
            raise
        except VendorError:
            raise
        except Exception as error:
            log.exception("parse.bug", source=self.plan.source, path=request.path)
            raise Invalid(f"the answer could not be read: {error!r}", response.body) from error

    async def _take(self, visit: Visit, page: Page) -> None:
        """Tell what a page changes; rows that need a question first are held."""
        at_ms = self._now_ms()
        sighting = msgspec.structs.replace(visit.sighting, at_ms=at_ms)
        ready: list[Seen] = []
        for seen in page.runs:
            await self._release_if_other(seen)
            request = self._question_before(seen, sighting)
            if request is None:
                ready.append(seen)
            else:
                self._hold(seen, sighting, request)
        if ready:
            await self.ledger.take(ready, sighting)
        self.ledger.shown(page.shown, at_ms)
        self.ledger.note(page.marks)
        for job_id, run_id in page.gone:
            known = self.ledger.index.runs.get(key_of(job_id, run_id))
            if known is not None and known.watched:
                await self.ledger.vanished(known, at_ms)
        self._report(page)

    def _question_before(self, seen: Seen, sighting: Sighting) -> Request | None:
        """What must be asked before this row is told; nothing if it changes nothing."""
        transitions, known, then = self.ledger.changes(seen, sighting)
        if not transitions:
            return None
        # At first contact nothing that led to the present state is told, so nothing is asked of it.
        compared = then if sighting.contact and known is None else known
        return self.plan.vendor.ask(self.plan.options, compared, seen)

    def _hold(self, seen: Seen, sighting: Sighting, request: Request) -> None:
        held = self._held.get(key_of(seen.job.id, seen.run_id))
        if held is None:
            held = Held(seen=seen, sighting=sighting, request=request)
            self._held[key_of(seen.job.id, seen.run_id)] = held
        held.seen, held.request = seen, request

    async def _release_if_other(self, seen: Seen) -> None:
        """A held row is overtaken by another state of the run: tell it as it is, in its turn."""
        key = key_of(seen.job.id, seen.run_id)
        held = self._held.get(key)
        if held is not None and (held.seen.state, held.seen.marker) != (seen.state, seen.marker):
            del self._held[key]
            await self.ledger.take([held.seen], held.sighting)

    async def _ask_by_id(self, visit: Visit) -> None:
        missing = self._missing(visit)
        settling = [(run, self.plan.vendor.settle(self.plan.options, run)) for run in missing]
        visit.questions = [request for _, request in settling if request] + visit.questions
        untried = dict(self._held)
        while untried or visit.questions:
            batch, visit.questions = (
                visit.questions[: visit.budget],
                visit.questions[visit.budget :],
            )
            visit.budget -= len(batch)
            async with asyncio.TaskGroup() as group:
                for key, held in untried.items():
                    group.create_task(self._complete(visit, key, held))
                for request, delay_s in self._paced(batch):
                    group.create_task(self._answer(visit, request, delay_s))
            tried = untried
            untried = {key: held for key, held in self._held.items() if key not in tried}
            if self._is_quiet() or (not untried and visit.budget <= 0):
                break
        asked = {request.target for request in visit.questions}
        for run, question in settling:
            if question is None or question.target not in asked:
                await self._count_miss(visit, run)

    def _missing(self, visit: Visit) -> list[Known]:
        """Watched runs that a listing read whole did not show, or a feed not for long."""
        index = self.ledger.index
        missing: list[Known] = []
        for scope in list(index.watched):
            if scope in visit.complete:
                if visit.complete[scope] in visit.failed:
                    continue
                before_ms = visit.began_ms
            else:
                before_ms = visit.began_ms - int(self.plan.resync_s * 1000)
            missing += index.unseen(scope, before_ms)
        return [run for run in missing if run.key not in self._held]

    async def _complete(self, visit: Visit, key: Key, held: Held) -> None:
        """Ask what a held row waits for, and tell it; as it is, if nobody can answer in time."""
        rows: list[Seen] = []
        work = [held.request]
        try:
            while work:
                page = await self._ask(visit, work.pop(0))
                rows += page.runs
                work += page.follow
                self.ledger.note(page.marks)
                self._report(page)
        except VendorError as error:
            self._note_quiet(error)
            held.tries += 1
            if held.tries < self.plan.vanish_after:
                return
            rows = []
        if self._held.get(key) is not held:
            return
        del self._held[key]
        if not any(key_of(row.job.id, row.run_id) == key and not row.past for row in rows):
            rows.append(held.seen)
        sighting = msgspec.structs.replace(held.sighting, at_ms=self._now_ms())
        if sighting.contact:
            rows = [row for row in rows if not row.past]
        await self.ledger.take(rows, sighting)

    async def _answer(self, visit: Visit, request: Request, delay_s: float) -> None:
        """A question by id whose failure is nobody's fault: it is asked again at another poll."""
        self.due_s = max(self.due_s, visit.began_s + delay_s)
        await _until(visit.began_s + delay_s)
        try:
            page = await self._ask(visit, request)
        except VendorError as error:
            self._note_quiet(error)
            log.debug("question.failed", source=self.plan.source, message=str(error))
            return
        await self._take(visit, page)
        visit.questions += page.follow

    async def _count_miss(self, visit: Visit, run: Known) -> None:
        """Count good polls in which a missing run stayed a riddle; in the end it has vanished."""
        key = run.key
        scope = self.ledger.index.watched.get(run.scope, {})
        if key in self._held or scope.get(key, visit.began_ms) >= visit.began_ms:
            self._misses.pop(key, None)
            return
        if visit.errors:
            return
        misses = self._misses.get(key, 0) + 1
        self._misses[key] = misses
        if misses >= self.plan.vanish_after:
            del self._misses[key]
            await self.ledger.vanished(run, self._now_ms())

    def _paced(self, requests: Iterable[Request]) -> list[tuple[Request, float]]:
        """Each request with its delay: those to be spread fill the interval evenly."""
        requests = list(requests)
        spread = sum(request.spread for request in requests)
        gap_s = self.plan.pace.interval_s / max(1, spread)
        paced, number = [], 0
        for request in requests:
            paced.append((request, number * gap_s if request.spread else 0.0))
            number += request.spread
        return paced

    def _note_quiet(self, error: VendorError) -> None:
        if isinstance(error, Limited):
            wait_s = error.retry_after_s or self.plan.pace.interval_s
            quiet_until_s = asyncio.get_running_loop().time() + wait_s
            self._quiet_until_s = max(self._quiet_until_s, quiet_until_s)

    def _is_quiet(self) -> bool:
        return self._quiet_until_s > asyncio.get_running_loop().time()

    async def _prune(self, now_s: float) -> None:
        if self._pruned_s is None or now_s - self._pruned_s >= _PRUNE_EVERY_S:
            self._pruned_s = now_s
            await self.ledger.prune(self._now_ms())

    def _report(self, page: Page) -> None:
        if page.bad:
            self._metrics.invalid_records.labels(self.plan.source).inc(len(page.bad))
            for row in page.bad[:_BAD_ROWS_LOGGED]:
                log.warning("row.invalid", source=self.plan.source, at=row.at, why=row.why)
        for note in page.notes:
            log.warning("vendor.note", source=self.plan.source, note=note)

    def _log_failure(self, error: VendorError) -> None:
        body: dict[str, Any] = {"body": error.body} if isinstance(error, Invalid) else {}
        log.warning(
            "poll.failed", source=self.plan.source, reason=error.reason, message=str(error), **body
        )


def _may_go_on(visit: Visit) -> bool:
    """Whether questions by id make sense now: the vendor answers, and lets us ask."""
    if any(isinstance(error, Limited | Rejected) for error in visit.errors):
        return False
    return visit.sent > len(visit.errors) or not visit.errors


def _weight(error: VendorError) -> int:
    """Which of several errors is the poll's: what asks for the longest silence."""
    if isinstance(error, Rejected):
        return 0
    return 1 if isinstance(error, Limited) else 2


async def _until(at_s: float) -> None:
    delay_s = at_s - asyncio.get_running_loop().time()
    if delay_s > 0:
        await asyncio.sleep(delay_s)
