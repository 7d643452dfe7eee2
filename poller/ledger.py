"""One source's ledger: takes what answers show, detects what changed, writes it down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Literal

import msgspec
import structlog
from prometheus_client import Gauge

from poller.diff import Observation, diff, vanish
from poller.errors import Rejected, VendorError
from poller.events import (
    Draft,
    SourceData,
    Transition,
    encode,
    job_event,
    rfc3339,
    source_event,
)
from poller.forecast import MARK, Forecast
from poller.journal import Journal
from poller.known import Commit, Condition, Durations, Index, Key, Known, Memory, key_of, thrifty
from poller.runs import Ms, Seen, State
from poller.schedule import Pace
from poller.telemetry import Metrics

log = structlog.get_logger()

FirstContact = Literal["active", "all", "none"]

_CONDITION_EVERY_MS = 10_000
"""A good poll that changed nothing is written down at most so often: one fsync for many polls."""
_PRUNE_AT_ONCE = 500


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """Under which circumstances rows are taken.

    Attributes:
        after_ms: when the last good poll before began, which did not show them; None at first
            contact.
        contact: whether first contact still lasts.
    """

    at_ms: Ms
    after_ms: Ms | None
    contact: bool


class Ledger:
    """What is known of one source, in memory and in the journal, always in step.

    Made by `open_ledger`.

    Attributes:
        progress: how far watched runs are, from 0 to 1, and when that was shown; only in memory.
        forecast: learns from what is taken; None if nobody goes by it.
    """

    def __init__(
        self,
        journal: Journal,
        metrics: Metrics,
        *,
        source: str,
        vendor: str,
        first_contact: FirstContact,
        down_after: int,
        retention_s: float,
        index: Index,
        condition: Condition,
        marks: dict[str, str],
        forecast: Forecast | None,
    ) -> None:
        self.source = source
        self.index = index
        self.condition = condition
        self.marks = marks
        self.forecast = forecast
        self._journal = journal
        self._metrics = metrics
        self._vendor = vendor
        self._first_contact = first_contact
        self._down_after = down_after
        self._retention_ms = int(retention_s * 1000)
        self._unsaved_marks: dict[str, str] = {}
        self._saved_ms = condition.last_good_ms or 0
        self._states = Counter(run.state for run in index.runs.values())
        self._durations = Durations(index.runs.values())
        self.progress: dict[Key, tuple[float, Ms]] = {}
        self._unmapped: set[str] = set()

    def memory(self, now_ms: Ms, *, whole: bool, resync_s: float, rate_per_s: float) -> Memory:
        """The view of all this that a vendor gets for a poll beginning now."""
        condition = self.condition
        return Memory(
            now_ms=now_ms,
            contact_ms=condition.contact_ms,
            last_good_ms=condition.last_good_ms if condition.contact_done else None,
            since_ms=max(1, now_ms - self._retention_ms),
            whole=whole,
            publish_all=self._first_contact == "all",
            resync_s=resync_s,
            rate_per_s=rate_per_s,
            marks=self.marks,
            index=self.index,
        )

    def sighting(self, at_ms: Ms) -> Sighting:
        """The circumstances of what is seen now."""
        done = self.condition.contact_done
        after_ms = self.condition.last_good_ms if done else None
        return Sighting(at_ms=at_ms, after_ms=after_ms, contact=not done)

    def changes(
        self, seen: Seen, sighting: Sighting
    ) -> tuple[list[Transition], Known | None, Known]:
        """What taking this row would tell, what is known of the run now, and what would be then."""
        known = self.index.runs.get(key_of(seen.job.id, seen.run_id))
        if known is None and seen.was is not None:
            known = self.index.runs.get(key_of(seen.job.id, seen.was))
            if known is not None:
                known = msgspec.structs.replace(known, run_id=seen.run_id, was=seen.was)
        transitions, then = diff(known, seen, self._observation(sighting))
        return transitions, known, then

    async def take(self, rows: Iterable[Seen], sighting: Sighting) -> None:
        """Detect and tell what these rows change, in order, in one commit.

        Raises:
            JournalError: nothing was written.
        """
        runs: list[Known] = []
        dropped: list[tuple[str, str]] = []
        events: list[Draft] = []
        learned: dict[str, str] = {}
        for seen in rows:
            transitions, known, then = self.changes(seen, sighting)
            if self.forecast is not None:
                learned |= self.forecast.learn(
                    known, transitions, after_ms=sighting.after_ms, at_ms=sighting.at_ms
                )
            renamed = seen.was and self._renamed(seen.job.id, seen.was, seen.run_id)
            if seen.was and renamed:
                dropped.append((seen.job.id, seen.was))
            events += self._drafts(transitions, sighting)
            if then is not known or renamed:
                runs.append(then)
            if then.fingerprint != seen.fingerprint:
                then = msgspec.structs.replace(then, fingerprint=seen.fingerprint)
            self._put(then, sighting.at_ms)
            if then.watched and seen.progress is not None:
                self.progress[then.key] = seen.progress, sighting.at_ms
            if seen.unmapped:
                self._warn_of(seen)
        if runs or dropped or events:
            await self._commit(runs=runs, dropped=dropped, events=events, marks=learned)

    def shown(
        self, runs: Sequence[Known], at_ms: Ms, progress: Mapping[Key, float] | None = None
    ) -> None:
        """These runs are as they were, but for how far they are."""
        self.index.shown(runs, at_ms)
        for key, share in (progress or {}).items():
            known = self.index.runs.get(key)
            if known is not None and known.watched:
                self.progress[key] = share, at_ms

    async def vanished(self, run: Known, sighting: Sighting) -> None:
        """Nobody can tell what became of this run.

        Raises:
            JournalError: nothing was written.
        """
        transitions, then = vanish(run, self._observation(sighting))
        self._put(then, sighting.at_ms)
        await self._commit(runs=[then], events=self._drafts(transitions, sighting))

    def set_back(self, now_ms: Ms) -> None:
        """Our clock was set back: what has been shown until now was shown before now."""
        for scope in self.index.watched.values():
            for key, at_ms in scope.items():
                scope[key] = min(at_ms, now_ms - 1)

    def note(self, marks: Mapping[str, str]) -> None:
        """Take a vendor's marks; `save_marks` writes them."""
        for name, value in marks.items():
            if self.marks.get(name, "") != value:
                self._unsaved_marks[name] = value
                self.index.changes += 1
            if value:
                self.marks[name] = value
            else:
                self.marks.pop(name, None)

    async def good(self, began_ms: Ms, at_ms: Ms, *, contact_done: bool) -> None:
        """A poll that began then has read all listings.

        Raises:
            JournalError: it could not be written.
        """
        before = self.condition
        events: list[Draft] = []
        if before.up is False:
            events.append(self._source_draft(up=True, since_ms=at_ms, at_ms=at_ms, error=None))
            log.info("source.up", source=self.source)
        self.condition = msgspec.structs.replace(
            self.condition,
            last_good_ms=began_ms,
            contact_done=before.contact_done or contact_done,
            failures=0,
            reason=None,
            message=None,
            up=True,
            since_ms=before.since_ms if before.up and not before.failures else at_ms,
        )
        due = began_ms - self._saved_ms >= _CONDITION_EVERY_MS
        if events or due or before.failures or not before.contact_done or before.up is not True:
            await self._commit(events=events)
        self._up.set(1)
        self._last_success.set(began_ms / 1000)

    async def failed(self, error: VendorError, at_ms: Ms) -> None:
        """A poll failed; tells when the source is given up as blind.

        Raises:
            JournalError: it could not be written.
        """
        before = self.condition
        failures = before.failures + 1
        since_ms = before.since_ms if before.failures else at_ms
        self.condition = msgspec.structs.replace(
            before,
            failures=failures,
            since_ms=since_ms,
            reason=error.reason,
            message=str(error),
        )
        self._up.set(0)
        self._metrics.poll_failures.labels(self.source, error.reason).inc()
        events: list[Draft] = []
        enough = failures >= self._down_after or isinstance(error, Rejected)
        if before.up is not False and enough:
            events.append(self._source_draft(up=False, since_ms=since_ms, at_ms=at_ms, error=error))
            self.condition = msgspec.structs.replace(self.condition, up=False)
            log.warning("source.down", source=self.source, reason=error.reason, message=str(error))
        await self._commit(events=events)

    async def save(self) -> None:
        """Write the condition; not the marks, which may stand for rows that are not told yet."""
        if self._saved_ms != (self.condition.last_good_ms or 0):
            await self._commit()

    async def save_marks(self) -> None:
        """Write the vendor's marks, if there are new ones; all that they stand for must be told."""
        marks, self._unsaved_marks = self._unsaved_marks, {}
        if marks:
            await self._commit(marks=marks)

    async def prune(self, now_ms: Ms) -> None:
        """Forget finished runs past retention, in small steps."""
        horizon_ms = now_ms - self._retention_ms
        old = [
            run
            for run in self.index.runs.values()
            if not run.watched and _newest_ms(run) < horizon_ms
        ]
        for start in range(0, len(old), _PRUNE_AT_ONCE):
            step = old[start : start + _PRUNE_AT_ONCE]
            await self._commit(dropped=[(run.job.id, run.run_id) for run in step])
            for run in step:
                self._drop(run)

    @property
    def states(self) -> Mapping[State, int]:
        """How many known runs are in each state."""
        return {state: self._states[state] for state in State}

    def usual_ms(self, run: Known) -> Ms | None:
        """How long a run like this usually takes, if that is known."""
        return self._durations.usual_ms(run)

    def count_states(self) -> None:
        """Bring the metric of known runs by state up to date."""
        for state, count in self.states.items():
            self._metrics.runs.labels(self.source, state).set(count)

    @cached_property
    def _up(self) -> Gauge:  # not made before a poll has told
        return self._metrics.source_up.labels(self.source)

    @cached_property
    def _last_success(self) -> Gauge:
        return self._metrics.last_success.labels(self.source)

    def _observation(self, sighting: Sighting) -> Observation:
        return Observation(
            at_ms=sighting.at_ms,
            first_contact=self._first_contact if sighting.contact else None,
            contact_ms=self.condition.contact_ms,
            since_ms=sighting.at_ms - self._retention_ms,
        )

    def _renamed(self, job_id: str, provisional_id: str, run_id: str) -> bool:
        """Give a provisional run its real id in the index; whether there was one."""
        key = key_of(job_id, provisional_id)
        provisional = self.index.runs.get(key)
        if provisional is None:
            return False
        if key_of(job_id, run_id) in self.index.runs:
            self._drop(provisional)
        else:
            self.progress.pop(key, None)
            self.index.rename(job_id, provisional_id, run_id)
        return True

    def _put(self, run: Known, at_ms: Ms) -> None:
        old = self.index.runs.get(run.key)
        if old is None or old.state is not run.state:
            self._states[run.state] += 1
            if old is not None:
                self._states[old.state] -= 1
            self._durations.note(run)
            self.progress.pop(run.key, None)
        self.index.put(run if run is old else thrifty(run), at_ms)

    def _drop(self, run: Known) -> None:
        self._states[run.state] -= 1
        self.progress.pop(run.key, None)
        self.index.drop(run.key)

    def _drafts(self, transitions: Iterable[Transition], sighting: Sighting) -> list[Draft]:
        drafts = []
        for transition in transitions:
            sequence = self._next_sequence()
            event = job_event(
                transition,
                source=self.source,
                vendor=self._vendor,
                sequence=sequence,
                observed_after_ms=sighting.after_ms,
                observed_at_ms=sighting.at_ms,
            )
            drafts.append(
                Draft(
                    sequence,
                    event.type,
                    transition.job.id,
                    sighting.at_ms,
                    encode(event),
                    transition.run_id,
                )
            )
            if sighting.after_ms is not None:
                bound_s = (sighting.at_ms - sighting.after_ms) / 1000
                self._metrics.detection_bound.labels(self.source).observe(max(0.0, bound_s))
        return drafts

    def _source_draft(
        self, *, up: bool, since_ms: Ms, at_ms: Ms, error: VendorError | None
    ) -> Draft:
        data = SourceData(
            vendor=self._vendor,
            source=self.source,
            up=up,
            since=rfc3339(since_ms),
            reason=error.reason if error else None,
            message=str(error) if error else None,
        )
        event = source_event(data, sequence=self._next_sequence(), at_ms=at_ms)
        return Draft(int(event.sequence), event.type, "", at_ms, encode(event))

    def _next_sequence(self) -> int:
        sequence = self.condition.sequence + 1
        self.condition = msgspec.structs.replace(self.condition, sequence=sequence)
        return sequence

    async def _commit(
        self,
        *,
        runs: Sequence[Known] = (),
        dropped: Sequence[tuple[str, str]] = (),
        events: Sequence[Draft] = (),
        marks: Mapping[str, str] | None = None,
    ) -> None:
        self._saved_ms = self.condition.last_good_ms or 0
        await self._journal.commit(
            Commit(
                source=self.source,
                runs=runs,
                dropped=dropped,
                events=events,
                condition=self.condition,
                marks=marks or {},
            )
        )
        for event in events:
            self._metrics.events.labels(self.source, event.type).inc()

    def _warn_of(self, seen: Seen) -> None:
        word = seen.vendor_state or ""
        if word not in self._unmapped and len(self._unmapped) < 100:
            self._unmapped.add(word)
            log.warning("state.unmapped", source=self.source, word=word[:100], run=seen.run_id)


def _newest_ms(run: Known) -> Ms:
    """When the run last changed, by our clock or the vendor's, whichever is later.

    So what is forgotten is old by its own timestamps too, and no news if it is shown again.
    """
    return max(run.changed_ms, run.ended_ms or run.started_ms or run.queued_ms or 0)


async def open_ledger(
    journal: Journal,
    metrics: Metrics,
    *,
    source: str,
    vendor: str,
    first_contact: FirstContact,
    down_after: int,
    retention_s: float,
    now_ms: Ms,
    forecasts: Pace | None = None,
) -> Ledger:
    """The ledger of a source as the journal remembers it; a new one begins first contact now.

    With `forecasts`, the pace that they keep to, it learns from what it takes.
    """
    memories = await journal.load(source)
    learned = {name for name in memories.marks if name.startswith(MARK)}
    return Ledger(
        journal,
        metrics,
        source=source,
        vendor=vendor,
        first_contact=first_contact,
        down_after=down_after,
        retention_s=retention_s,
        index=Index(memories.runs, at_ms=now_ms - 1),  # not shown by a poll that begins now
        condition=memories.condition or Condition(contact_ms=now_ms),
        marks={name: value for name, value in memories.marks.items() if name not in learned},
        forecast=None if forecasts is None else Forecast(memories.marks, forecasts),
    )
