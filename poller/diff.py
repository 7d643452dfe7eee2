"""Detection: what is known of a run, what an answer shows of it → the transitions to tell. Pure.

`Known.told` remembers by bits which steps of the attempt need no telling any more.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from poller.events import Previous, Transition
from poller.known import Known
from poller.runs import ACTIVE, TERMINAL, Ms, Seen, State

QUEUED = 1
RUNNING = 2
BEGUN = 4
"""Some state other than `unknown` was told."""
STOPPING = 8
ENDED = 16

_TOLD = {
    State.QUEUED: QUEUED | BEGUN,
    State.STARTING: BEGUN,
    State.RUNNING: RUNNING | BEGUN,
    State.SUSPENDED: BEGUN,
    State.STOPPING: STOPPING | BEGUN,
    State.SUCCEEDED: ENDED | BEGUN,
    State.FAILED: ENDED | BEGUN,
    State.CANCELED: ENDED | BEGUN,
    State.UNKNOWN: 0,
}
_AFTER_RUNNING = frozenset({State.SUSPENDED, State.STOPPING, *TERMINAL})


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances under which something was seen.

    Attributes:
        at_ms: when.
        first_contact: what first contact publishes, while it lasts; None once it is over.
        contact_ms: when first contact began; what ended before is no news.
        since_ms: what ended before is past retention, and may have been known and forgotten.
    """

    at_ms: Ms
    first_contact: Literal["active", "all", "none"] | None = None
    contact_ms: Ms = 0
    since_ms: Ms = 0


def diff(known: Known | None, seen: Seen, at: Observation) -> tuple[list[Transition], Known]:
    """Transitions to tell, in order, and what is known then: `known` itself if nothing changed."""
    if known is None:
        return _meet(seen, at)
    if _is_stale(known, seen):
        return [], known
    if _opens_attempt(known, seen):
        floor_ms = known.last_ms  # a closing at the new marker's time does not disprove the marker
        closing, known = _closed(known, seen, at)
        told, known = _tell(_next_attempt(known, seen, floor_ms), seen, at, _previous(known))
        return closing + told, known
    if seen.state is known.state and not known.vanished:
        return [], _refreshed(known, seen)
    return _tell(known, seen, at, _previous(known))


def vanish(known: Known, at: Observation) -> tuple[list[Transition], Known]:
    """The run is gone and nobody can tell what became of it."""
    transition = _unknown(known, "vanished", at.at_ms, by_vendor=False)
    known = msgspec.structs.replace(
        known,
        state=State.UNKNOWN,
        vendor_state=None,
        substate=None,
        vanished=True,
        last_ms=transition.time_ms,
        changed_ms=at.at_ms,
        was=None,
    )
    return [transition], known


def _meet(seen: Seen, at: Observation) -> tuple[list[Transition], Known]:
    """A run that was not known before."""
    fresh = Known(job=seen.job, run_id=seen.run_id, state=State.UNKNOWN, attempt=seen.ordinal or 1)
    ended = seen.state in TERMINAL
    if at.first_contact is not None:
        if at.first_contact == "all" or (at.first_contact == "active" and not ended):
            return _snapshot(fresh, seen, at)
        return [], _snapshot(fresh, seen, at)[1]
    if ended and _is_old(seen, max(at.contact_ms, at.since_ms)):
        return [], _snapshot(fresh, seen, at)[1]
    return _tell(fresh, seen, at, None)


def _is_old(seen: Seen, horizon_ms: Ms) -> bool:
    """Whether a run ended before the horizon; one without an end time, if all we know is older."""
    stamps = (seen.ended_ms, seen.started_ms, seen.queued_ms)
    newest_ms = next((stamp for stamp in stamps if stamp is not None), None)
    return newest_ms is not None and newest_ms <= horizon_ms


def _snapshot(fresh: Known, seen: Seen, at: Observation) -> tuple[list[Transition], Known]:
    """The present state, and everything that led to it taken as told."""
    time_ms, by_vendor = _time(_own_time(seen), None, at)
    transition = _transition(fresh, seen, time_ms, by_vendor=by_vendor, snapshot=True)
    told = _TOLD[seen.state]
    if seen.state not in (State.QUEUED, State.STARTING) and seen.started_ms is not None:
        told |= RUNNING
    if seen.queued_ms is not None or seen.state is not State.UNKNOWN:
        told |= BEGUN
    return [transition], _now_known(fresh, seen, told, time_ms, at)


def _is_stale(known: Known, seen: Seen) -> bool:
    """Whether the answer is of an earlier attempt, or history that was told already."""
    if seen.past and known.told & ENDED and seen.marker == known.marker:
        return True
    return (
        seen.ordinal is not None and known.marker is not None and seen.ordinal < int(known.marker)
    )


def _opens_attempt(known: Known, seen: Seen) -> bool:
    if known.told & ENDED and seen.state in ACTIVE:
        return True
    if seen.marker is not None and known.marker is not None:
        return seen.marker != known.marker
    return known.marker is None and seen.ordinal is not None and seen.ordinal > known.attempt


def _closed(known: Known, seen: Seen, at: Observation) -> tuple[list[Transition], Known]:
    """Close an attempt whose end nobody saw, at the time of the next one's marker."""
    if known.told & ENDED or known.state is State.UNKNOWN:
        return [], known
    marker_ms = seen.started_ms if seen.queued_ms is None else seen.queued_ms
    time_ms, by_vendor = _time(marker_ms, known.last_ms, at)
    transition = _unknown(known, "superseded", time_ms, by_vendor=by_vendor)
    known = msgspec.structs.replace(
        known, state=State.UNKNOWN, vendor_state=None, substate=None, last_ms=time_ms, was=None
    )
    return [transition], known


def _next_attempt(known: Known, seen: Seen, floor_ms: Ms | None) -> Known:
    return msgspec.structs.replace(
        known,
        attempt=max(seen.ordinal or 0, known.attempt + 1),
        marker=seen.marker,
        told=0,
        floor_ms=floor_ms,
        queued_ms=None,
        started_ms=None,
        ended_ms=None,
    )


def _refreshed(known: Known, seen: Seen) -> Known:
    """The same state: nothing to tell, though a marker may have been set for the first time."""
    if seen.marker is None or known.marker is not None:
        return known
    return msgspec.structs.replace(known, marker=seen.marker)


def _tell(
    known: Known, seen: Seen, at: Observation, previous: Previous | None
) -> tuple[list[Transition], Known]:
    """The steps that timestamps prove, then the state that was seen."""
    transitions: list[Transition] = []
    told, last_ms = known.told, known.last_ms
    for state in _skipped(known, seen):
        time_ms, by_vendor = _time(_time_of(state, seen), last_ms, at)
        transitions.append(
            Transition(
                job=seen.job,
                run_id=seen.run_id,
                attempt=known.attempt,
                state=state,
                time_ms=time_ms,
                by_vendor=by_vendor,
                previous=previous,
                inferred=True,
                queued_ms=seen.queued_ms,
                started_ms=seen.started_ms if state is State.RUNNING else None,
            )
        )
        told, last_ms = told | _TOLD[state], time_ms
        previous = Previous(state, None, known.attempt)
    time_ms, by_vendor = _time(_own_time(seen), last_ms, at)
    present = _transition(known, seen, time_ms, by_vendor=by_vendor, previous=previous)
    transitions.append(present)
    return transitions, _now_known(known, seen, told | _TOLD[seen.state], time_ms, at)


def _skipped(known: Known, seen: Seen) -> list[State]:
    """`queued` and `running`, where passed unseen and proved by the vendor's timestamps."""
    if known.told & ENDED or seen.state is State.UNKNOWN:
        return []
    skipped = []
    floor_ms = known.floor_ms or 0
    if (
        seen.state is not State.QUEUED
        and not known.told & BEGUN
        and seen.queued_ms is not None
        and seen.queued_ms > floor_ms
    ):
        skipped.append(State.QUEUED)
    if (
        seen.state in _AFTER_RUNNING
        and not known.told & (RUNNING | STOPPING)
        and seen.started_ms is not None
        and seen.started_ms > floor_ms
    ):
        skipped.append(State.RUNNING)
    return skipped


def _time_of(state: State, seen: Seen) -> Ms | None:
    """The vendor's own timestamp of entering a state, if it has one."""
    if state is State.QUEUED:
        return seen.queued_ms
    if state is State.RUNNING:
        return seen.started_ms
    if state in TERMINAL:
        return seen.ended_ms
    return seen.state_ms


def _own_time(seen: Seen) -> Ms | None:
    return _time_of(seen.state, seen)


def _time(vendor_ms: Ms | None, last_ms: Ms | None, at: Observation) -> tuple[Ms, bool]:
    """The vendor's timestamp if it lies between the run's last event and now, else now; and which.

    If our own clock was set back, time goes on from the last event.
    """
    floor_ms = last_ms or 0
    if vendor_ms is not None and floor_ms <= vendor_ms <= at.at_ms:
        return vendor_ms, True
    return (at.at_ms if at.at_ms >= floor_ms else floor_ms + 1), False


def _previous(known: Known) -> Previous:
    return Previous(known.state, known.vendor_state, known.attempt)


def _transition(
    known: Known,
    seen: Seen,
    time_ms: Ms,
    *,
    by_vendor: bool,
    previous: Previous | None = None,
    snapshot: bool = False,
) -> Transition:
    detail = seen.detail if known.was is None else seen.detail | {"provisional_id": known.was}
    return Transition(
        job=seen.job,
        run_id=seen.run_id,
        attempt=known.attempt,
        state=seen.state,
        substate=seen.substate,
        vendor_state=seen.vendor_state,
        time_ms=time_ms,
        by_vendor=by_vendor,
        previous=previous,
        reason="unmapped" if seen.unmapped else None,
        snapshot=snapshot,
        inferred=seen.past,
        queued_ms=seen.queued_ms,
        started_ms=seen.started_ms,
        ended_ms=seen.ended_ms,
        progress=seen.progress,
        problem=seen.problem,
        detail=detail,
    )


def _unknown(
    known: Known, reason: Literal["vanished", "superseded"], time_ms: Ms, *, by_vendor: bool
) -> Transition:
    time_ms = max(time_ms, known.last_ms or 0)
    return Transition(
        job=known.job,
        run_id=known.run_id,
        attempt=known.attempt,
        state=State.UNKNOWN,
        time_ms=time_ms,
        by_vendor=by_vendor,
        previous=_previous(known),
        reason=reason,
        queued_ms=known.queued_ms,
        started_ms=known.started_ms,
        ended_ms=known.ended_ms,
        detail={} if known.was is None else {"provisional_id": known.was},
    )


def _now_known(known: Known, seen: Seen, told: int, time_ms: Ms, at: Observation) -> Known:
    return Known(
        job=seen.job,
        run_id=seen.run_id,
        state=seen.state,
        vendor_state=seen.vendor_state,
        substate=seen.substate,
        scope=seen.scope,
        attempt=known.attempt,
        marker=seen.marker if seen.marker is not None else known.marker,
        told=told,
        floor_ms=known.floor_ms,
        last_ms=time_ms,
        changed_ms=at.at_ms,
        queued_ms=seen.queued_ms,
        started_ms=seen.started_ms,
        ended_ms=seen.ended_ms,
        fingerprint=seen.fingerprint,
    )
