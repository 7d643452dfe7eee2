"""Asks a source's questions: within its rate, and not while the vendor wants to be left alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from poller.errors import Invalid, Limited, Rejected, VendorError
from poller.fetch import Fetch
from poller.known import Memory, key_of
from poller.runs import Ms
from poller.schedule import Bucket, Pace
from poller.wire import Options, Page, Request, Response, Vendor, read, retry_after_s

log = structlog.get_logger()

_MOST_RUNS = 2_000_000
_MOST_MARKS = 200_000
"""What one source may make us remember; far more than any has, and it still fits into memory."""
_MOST_KEPT = 4
_MOST_BYTES = 1 << 20
"""So many answers of a source, each so large at most, are kept to recognise them."""


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


class Silenced(VendorError):
    """Not sent: earlier in this poll the vendor wanted silence, or refused the credentials."""


class _Kept(NamedTuple):
    """An answer that told nothing new, and what was known then."""

    request: Request
    response: Response
    changes: int
    page: Page

    def is_repeated(self, request: Request, response: Response, changes: int) -> bool:
        return (
            self.changes == changes
            and self.response.status == response.status
            and self.response.body == response.body
            and self.request == request
        )


class Asker:
    """Puts a source's questions, and remembers when the vendor wants none.

    Attributes:
        due_s: when the next sign of life is due, by the loop's clock.
        hushed: nothing more is sent in this poll.
        quiet_until_s: how long the vendor asked to be left alone, by the loop's clock.
    """

    def __init__(self, plan: Plan, fetch: Fetch, now_ms: Callable[[], Ms]) -> None:
        self.due_s = 0.0
        self.hushed = False
        self.quiet_until_s = 0.0
        self._plan = plan
        self._fetch = fetch
        self._now_ms = now_ms
        self._bucket = Bucket(plan.rate_per_s, plan.concurrency)
        self._kept: dict[tuple[object, ...], _Kept] = {}

    @property
    def budget_used(self) -> float:
        """Which share of the source's rate was used in about the last minute."""
        return self._bucket.used(asyncio.get_running_loop().time())

    def begin(self) -> None:
        """A poll begins."""
        self.hushed = False
        self.due_s = asyncio.get_running_loop().time() + self._plan.timeout_s

    def alive(self) -> None:
        """Something went on just now."""
        now_s = asyncio.get_running_loop().time()
        self.due_s = max(self.due_s, now_s + self._plan.timeout_s)

    async def until(self, at_s: float) -> None:
        """Wait for a time of the loop's clock, and for an answer after it."""
        self.due_s = max(self.due_s, at_s + self._plan.timeout_s)
        delay_s = at_s - asyncio.get_running_loop().time()
        if delay_s > 0:
            await asyncio.sleep(delay_s)

    async def ask(self, request: Request, memory: Memory) -> Page:
        """Put one question, within the rate; gives what the answer says.

        Raises:
            Silenced: it was not sent.
            VendorError: it was not answered as documented.
        """
        loop = asyncio.get_running_loop()
        if not self.hushed:
            await self.until(loop.time() + self._bucket.take(loop.time()))
        if self.hushed:
            raise Silenced("not sent: the vendor wants no more questions in this poll")
        try:
            response = await self._fetch(request)
            self.alive()  # it may have waited behind slow ones: the others have no less time
            return self._understood(request, response, memory)
        except Limited as error:
            self.hushed = True
            until_s = loop.time() + (error.retry_after_s or 0.0)
            self.quiet_until_s = max(self.quiet_until_s, until_s)
            raise
        except Rejected:
            # By id it may be about one job only; anything else is about the account.
            if not request.by_id:
                self.hushed = True
            raise

    def _understood(self, request: Request, response: Response, memory: Memory) -> Page:
        """What an answer says; not read again if it is the one of the poll before.

        It is compared whole: a hash of it would cost more, and could err.
        """
        question, changes = (request.path, request.query), memory.index.changes
        kept = self._kept.get(question)
        if kept is not None and kept.is_repeated(request, response, changes):
            return kept.page
        page = self._read(request, response, memory)
        self._kept.pop(question, None)
        if page.lasting and _tells_nothing(page, memory) and len(response.body) <= _MOST_BYTES:
            self._kept[question] = _Kept(request, response, changes, page)
            if len(self._kept) > _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return page

    def _read(self, request: Request, response: Response, memory: Memory) -> Page:
        plan = self._plan
        try:
            page = read(plan.vendor, plan.options, request, response, memory)
        except Limited as error:
            if error.retry_after_s is None:
                error.retry_after_s = retry_after_s(response, self._now_ms())
            raise
        except VendorError:
            raise
        except Exception as error:
            log.exception("parse.bug", source=plan.source, path=request.path)
            body = response.secrets.body(response.body)
            raise Invalid(f"the answer could not be read: {error!r}", body) from error
        _check_growth(page, memory)
        return page


def _check_growth(page: Page, memory: Memory) -> None:
    """Refuse a page that would make us remember more than there can be."""
    runs, marks = memory.index.runs, memory.marks
    # New ones are looked for only where it matters.
    if len(runs) + len(page.runs) > _MOST_RUNS:
        keys = {key_of(seen.job.id, seen.run_id) for seen in page.runs}
        if len(runs) + sum(key not in runs for key in keys) > _MOST_RUNS:
            raise Invalid(f"more than {_MOST_RUNS} runs of one source; lower poller.retention")
    if len(marks) + len(page.marks) > _MOST_MARKS < len({**marks, **page.marks}):
        raise Invalid(f"more than {_MOST_MARKS} jobs of one source to take note of")


def _tells_nothing(page: Page, memory: Memory) -> bool:
    """Whether a page says only that known runs are as they were, once first contact is over."""
    if page.runs or page.follow or page.gone or page.bad or page.notes:
        return False
    return memory.last_good_ms is not None and page.marks.items() <= memory.marks.items()
