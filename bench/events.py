"""Rows and events as detection makes them."""

from __future__ import annotations

from bench.pages import CREATED_MS
from poller.app import now_ms
from poller.events import Draft, Previous, Transition, encode, job_event
from poller.runs import Job, Seen, State


def drafts(source: str, first: int, count: int) -> list[Draft]:
    """Events of as many runs, about 900 bytes each."""
    return [_draft(source, number) for number in range(first, first + count)]


def _draft(source: str, number: int) -> Draft:
    row = seen(number, State.RUNNING)
    transition = Transition(
        job=row.job,
        run_id=row.run_id,
        attempt=1,
        state=row.state,
        vendor_state=row.vendor_state,
        time_ms=CREATED_MS,
        by_vendor=True,
        previous=Previous(State.QUEUED, "PENDING", 1),
        queued_ms=row.queued_ms,
        started_ms=row.started_ms,
        detail=row.detail,
    )
    at_ms = now_ms()
    event = job_event(
        transition,
        source=source,
        vendor="kylin",
        sequence=number + 1,
        observed_after_ms=at_ms - 15_000,
        observed_at_ms=at_ms,
    )
    return Draft(number + 1, event.type, row.job.id, at_ms, encode(event))


def seen(number: int, state: State) -> Seen:
    """A row of a job that is its own run."""
    run_id = f"232bf69f-6cdf-4dcc-a3aa-{number:012}"
    return Seen(
        job=Job(id=run_id, name="INDEX_BUILD", group="ssb", owner="ADMIN"),
        run_id=run_id,
        state=state,
        vendor_state=state.upper(),
        queued_ms=CREATED_MS,
        started_ms=CREATED_MS + 1500,
        progress=0.33,
        detail={"target_subject": "model_of_sales"},
        scope="5",
    )
