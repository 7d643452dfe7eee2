"""The words: states, jobs, and what a vendor's answer shows of a run."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import msgspec

Ms: TypeAlias = int
"""Milliseconds since 1970-01-01T00:00:00Z."""

Scalar: TypeAlias = str | int | float | bool | None


class State(StrEnum):
    """The nine states, the same for every vendor."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    UNKNOWN = "unknown"


TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELED})
ACTIVE = frozenset(
    {State.QUEUED, State.STARTING, State.RUNNING, State.SUSPENDED, State.STOPPING},
)


class Job(msgspec.Struct, frozen=True, gc=False):
    """What the vendor lets people name and start."""

    id: str
    name: str | None = None
    group: str | None = None
    owner: str | None = None
    url: str | None = None


class Problem(msgspec.Struct, frozen=True, gc=False):
    """Why a run failed, in the vendor's words."""

    code: str | None
    message: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One run as one answer shows it.

    Attributes:
        job: the job it belongs to.
        run_id: the vendor's own run id, as a string.
        state: the state it is in.
        vendor_state: the vendor's own word for that state, untouched.
        substate: a finer word, or None.
        marker: whatever changes when a new attempt begins (an ordinal or an instant, in digits);
            None where the vendor has none, or has not set it yet.
        ordinal: the vendor's own number of this attempt, from 1; None where it does not count.
        queued_ms: when it was queued, by the vendor's clock; likewise started_ms and ended_ms.
            A vendor that sets one of these to mean something else must leave it out here.
        state_ms: when it entered the present state, for states without a timestamp of their own.
        progress: 0 to 1.
        problem: why it failed.
        detail: a few scalars worth having; never credentials, never raw objects.
        scope: which listing of active runs shows it, where a vendor has several.
        was: the provisional id under which it was known before.
        unmapped: its word is not in the vendor's table.
        past: told by the vendor's history of earlier attempts, not seen as it happened.
        fingerprint: hash of the fields that matter, so that an unchanged row costs next to nothing;
            0 where the vendor does not use it.
    """

    job: Job
    run_id: str
    state: State
    vendor_state: str | None
    substate: str | None = None
    marker: str | None = None
    ordinal: int | None = None
    queued_ms: Ms | None = None
    started_ms: Ms | None = None
    ended_ms: Ms | None = None
    state_ms: Ms | None = None
    progress: float | None = None
    problem: Problem | None = None
    detail: dict[str, Scalar] = {}
    scope: str = ""
    was: str | None = None
    past: bool = False
    unmapped: bool = False
    fingerprint: int = 0
