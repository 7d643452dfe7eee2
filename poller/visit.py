"""One poll of a source: questions → pages → ledger.

First the listings, all pages of them. Then questions by id: for what a change needs to be told
whole (a held row), for runs that a listing shows no more, and what the vendor wants swept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import structlog

from poller.asking import Asker, Plan, Silenced
from poller.errors import Invalid, Limited, Rejected, VendorError
from poller.known import Key, Known, Memory, key_of
from poller.ledger import Ledger, Sighting
from poller.runs import Ms, Seen
from poller.schedule import delays_s
from poller.telemetry import Metrics
from poller.wire import Page, Request

log = structlog.get_logger()

_MOST_REQUESTS = 20_000
"""A vendor whose pages lead on for ever is stopped here."""
_MOST_QUESTIONS = 200_000
"""By id, to be asked in one poll."""
_MOST_HELD = 10_000
"""Rows beyond are told at once, as they are."""
_BAD_ROWS_LOGGED = 5


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

    @property
    def finished(self) -> bool:
        """Whether all has been asked but what is swept, which has other turns."""
        return all(request.spread for request in self.questions)


class Visitor:
    """Polls one source, and remembers what one poll leaves to the next."""

    def __init__(
        self,
        plan: Plan,
        ledger: Ledger,
        asker: Asker,
        metrics: Metrics,
        now_ms: Callable[[], Ms],
    ) -> None:
        self._plan = plan
        self._ledger = ledger
        self._asker = asker
        self._metrics = metrics
        self._now_ms = now_ms
        self._held: dict[Key, Held] = {}
        self._misses: dict[Key, int] = {}
        self._whole = False
        self._began_ms = 0

    @property
    def holds(self) -> bool:
        """Whether any row waits for an answer before it is told."""
        return bool(self._held)

    @property
    def expects(self) -> bool:
        """Whether any run's next state is waited for."""
        return bool(self._held) or any(self._ledger.index.watched.values())

    async def poll(self) -> None:
        """Ask what the vendor's plan asks, and tell what has changed.

        Raises:
            VendorError: a listing was not read whole; what was read of it has been taken.
            JournalError: what was found could not be written; also as an ExceptionGroup.
        """
        plan, ledger = self._plan, self._ledger
        visit = self._begin()
        first = plan.vendor.start(plan.options, visit.memory)
        visit.questions += [request for request in first if request.by_id]
        await self._read_listings(visit, [request for request in first if not request.by_id])
        if not visit.errors:
            await ledger.good(visit.began_ms, self._now_ms(), contact_done=visit.finished)
        if _may_go_on(visit):
            await self._ask_by_id(visit)
        if visit.errors:
            raise min(visit.errors, key=_weight)
        if visit.finished and not ledger.condition.contact_done:
            await ledger.good(visit.began_ms, self._now_ms(), contact_done=True)
        if visit.finished and not self._held:
            await ledger.save_marks()
        self._whole = True

    def _begin(self) -> Visit:
        plan, ledger, began_ms = self._plan, self._ledger, self._now_ms()
        if began_ms <= self._began_ms:
            ledger.set_back(began_ms)
        whole, self._whole, self._began_ms = self._whole, False, began_ms
        self._asker.begin()
        return Visit(
            began_ms=began_ms,
            began_s=asyncio.get_running_loop().time(),
            memory=ledger.memory(
                began_ms, whole=whole, resync_s=plan.resync_s, rate_per_s=plan.rate_per_s
            ),
            sighting=ledger.sighting(began_ms),
            budget=max(plan.concurrency, int(plan.rate_per_s * plan.pace.interval_s)),
        )

    async def _read_listings(self, visit: Visit, requests: Sequence[Request]) -> None:
        async with asyncio.TaskGroup() as group:
            for root, (request, delay_s) in enumerate(self._paced(requests)):
                reading = self._read_listing(visit, group, root, request, delay_s)
                if root == 0:
                    await reading  # alone: a wrong password sent eight times locks the account
                else:
                    group.create_task(reading)

    async def _read_listing(
        self,
        visit: Visit,
        group: asyncio.TaskGroup,
        root: int,
        request: Request,
        delay_s: float = 0.0,
    ) -> None:
        await self._asker.until(visit.began_s + delay_s)
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
        visit.sent += 1
        if visit.sent > _MOST_REQUESTS:
            raise Invalid(
                f"more than {_MOST_REQUESTS} requests in one poll: pages lead on for ever"
            )
        page = await self._asker.ask(request, visit.memory)
        if len(visit.questions) + len(page.follow) > _MOST_QUESTIONS:
            raise Invalid(f"more than {_MOST_QUESTIONS} questions by id in one poll")
        if page.bad:
            self._metrics.invalid_records.labels(self._plan.source).inc(len(page.bad))
            for row in page.bad[:_BAD_ROWS_LOGGED]:
                log.warning("row.invalid", source=self._plan.source, at=row.at, why=row.why)
        for note in page.notes:
            log.warning("vendor.note", source=self._plan.source, note=note)
        return page

    async def _take(self, visit: Visit, page: Page) -> None:
        """Tell what a page changes; rows that need a question first are held."""
        ledger, at_ms = self._ledger, self._now_ms()
        sighting = msgspec.structs.replace(visit.sighting, at_ms=at_ms)
        ready: list[Seen] = []
        for seen in page.runs:
            await self._release_if_other(seen)
            request = self._question_before(seen, sighting)
            if request is None or len(self._held) >= _MOST_HELD:
                self._held.pop(key_of(seen.job.id, seen.run_id), None)
                ready.append(seen)
            else:
                self._hold(seen, sighting, request)
        if ready:
            await ledger.take(ready, sighting)
        ledger.shown(page.shown, at_ms, page.progress)
        ledger.note(page.marks)
        for job_id, run_id in page.gone:
            known = ledger.index.runs.get(key_of(job_id, run_id))
            if known is not None and known.watched:
                await ledger.vanished(known, sighting)

    def _question_before(self, seen: Seen, sighting: Sighting) -> Request | None:
        """What must be asked before this row is told; nothing if it changes nothing."""
        transitions, known, then = self._ledger.changes(seen, sighting)
        if not transitions:
            return None
        # At first contact nothing that led to the present state is told, so nothing is asked of it.
        compared = then if sighting.contact and known is None else known
        return self._plan.vendor.ask(self._plan.options, compared, seen)

    def _hold(self, seen: Seen, sighting: Sighting, request: Request) -> None:
        key = key_of(seen.job.id, seen.run_id)
        held = self._held.setdefault(key, Held(seen=seen, sighting=sighting, request=request))
        held.seen, held.request = seen, request

    async def _release_if_other(self, seen: Seen) -> None:
        """A held row is overtaken by another state of the run: tell it as it is, in its turn."""
        key = key_of(seen.job.id, seen.run_id)
        held = self._held.get(key)
        if held is not None and (held.seen.state, held.seen.marker) != (seen.state, seen.marker):
            del self._held[key]
            await self._ledger.take([held.seen], held.sighting)

    async def _ask_by_id(self, visit: Visit) -> None:
        plan = self._plan
        missing = self._missing(visit)
        if not (missing or visit.questions or self._held or self._misses):
            return
        settling = [(run, plan.vendor.settle(plan.options, run)) for run in missing]
        visit.questions = [request for _, request in settling if request] + visit.questions
        tried: set[Key] = set()
        while visit.budget > 0 and not self._asker.hushed:
            held = sorted(self._held.items(), key=lambda each: each[1].tries)
            held = [each for each in held if each[0] not in tried][: visit.budget]
            tried.update(key for key, _ in held)
            visit.budget -= len(held)
            batch = visit.questions[: visit.budget]
            visit.questions = visit.questions[visit.budget :]
            visit.budget -= len(batch)
            if not held and not batch:
                break
            async with asyncio.TaskGroup() as group:
                for key, row in held:
                    group.create_task(self._complete(visit, key, row))
                for request, delay_s in self._paced(batch):
                    group.create_task(self._answer(visit, request, delay_s))
        self._forget_misses(visit)
        unasked = {id(request) for request in visit.questions}
        for run, question in settling:
            if not visit.errors and (question is None or id(question) not in unasked):
                await self._count_miss(visit, run)

    def _missing(self, visit: Visit) -> list[Known]:
        """Watched runs that a listing read whole did not show, or a feed not for long.

        Those asked for in vain come last, so that they do not keep others from being asked for.
        """
        index = self._ledger.index
        missing: list[Known] = []
        for scope in list(index.watched):
            if scope in visit.complete:
                if visit.complete[scope] in visit.failed:
                    continue
                before_ms = visit.began_ms
            else:
                before_ms = visit.began_ms - int(self._plan.resync_s * 1000)
            missing += index.unseen(scope, before_ms)
        missing.sort(key=lambda run: self._misses.get(run.key, 0))
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
                visit.budget -= len(page.follow)
                self._ledger.note(page.marks)
        except Silenced:
            return
        except VendorError:
            held.tries += 1
            if held.tries < self._plan.vanish_after:
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
        await self._ledger.take(rows, sighting)

    async def _answer(self, visit: Visit, request: Request, delay_s: float) -> None:
        """A question by id whose failure is nobody's fault: it is asked again at another poll."""
        await self._asker.until(visit.began_s + delay_s)
        try:
            page = await self._ask(visit, request)
        except Silenced:
            visit.questions.append(request)
        except VendorError as error:
            log.debug("question.failed", source=self._plan.source, message=str(error))
        else:
            await self._take(visit, page)
            visit.questions += page.follow

    def _paced(self, requests: Sequence[Request]) -> Iterable[tuple[Request, float]]:
        """Each request with its delay: those to be spread fill the interval evenly."""
        flags = [request.spread for request in requests]
        return zip(requests, delays_s(flags, self._plan.pace.interval_s), strict=True)

    async def _count_miss(self, visit: Visit, run: Known) -> None:
        """Count good polls in which a missing run stayed a riddle; in the end it has vanished."""
        if not self._is_missing(visit, run.key):
            return
        misses = self._misses.get(run.key, 0) + 1
        self._misses[run.key] = misses
        if misses >= self._plan.vanish_after:
            del self._misses[run.key]
            sighting = msgspec.structs.replace(visit.sighting, at_ms=self._now_ms())
            await self._ledger.vanished(run, sighting)
            self._asker.alive()  # there may be thousands of them

    def _forget_misses(self, visit: Visit) -> None:
        """Runs that have been shown again, or have ended, are no riddles any more."""
        self._misses = {k: n for k, n in self._misses.items() if self._is_missing(visit, k)}

    def _is_missing(self, visit: Visit, key: Key) -> bool:
        """Whether a run is waited for, and this poll has not shown it."""
        index = self._ledger.index
        run = index.runs.get(key)
        if run is None or key in self._held:
            return False
        return index.watched[run.scope].get(key, visit.began_ms) < visit.began_ms


def _may_go_on(visit: Visit) -> bool:
    """Whether questions by id make sense now: the vendor answers, and lets us ask."""
    if any(isinstance(error, Limited | Rejected) for error in visit.errors):
        return False
    return visit.sent > len(visit.errors) or not visit.errors


def _weight(error: VendorError) -> int:
    """Which of several errors is the poll's: the first is what asks for the longest silence."""
    return {Rejected: 0, Limited: 1, Silenced: 3}.get(type(error), 2)
