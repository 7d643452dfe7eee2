"""Drives a vendor without loop, network or clock, question by question."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from poller.known import Index, Known, Memory
from poller.runs import Seen
from poller.wire import Page, Request, Response, Vendor
from poller.world import World

FIXTURES = Path(__file__).parent / "fixtures"

Answer = Callable[[Request], Response]


def fixture(name: str) -> bytes:
    """A recorded answer, e.g. `kylin/k5_doc_job_api_1.json`."""
    return (FIXTURES / name).read_bytes()


def answer(body: bytes | str, status: int = 200, **headers: str) -> Response:
    """A JSON answer."""
    fields = {
        "content-type": "application/json",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    return Response(
        status=status, headers=fields, body=body.encode() if isinstance(body, str) else body
    )


def serve(vendor: Vendor, world: World) -> Answer:
    """The simulated API of a world, as a function."""
    return lambda request: vendor.render(world, request)


def read(
    vendor: Vendor, options: Any, memory: Memory, serve: Answer, *, limit: int = 1000
) -> list[Page]:
    """One poll's pages: what `start` asks and all that follows, marks given on as they come."""
    marks = dict(memory.marks)
    memory = Memory(
        now_ms=memory.now_ms,
        contact_ms=memory.contact_ms,
        last_good_ms=memory.last_good_ms,
        since_ms=memory.since_ms,
        whole=memory.whole,
        publish_all=memory.publish_all,
        resync_s=memory.resync_s,
        rate_per_s=memory.rate_per_s,
        marks=marks,
        index=memory.index,
    )
    work = list(vendor.start(options, memory))
    pages: list[Page] = []
    while work:
        assert len(pages) < limit, "the vendor never stops asking"
        request = work.pop(0)
        page = vendor.parse(options, request, serve(request), memory)
        marks.update(page.marks)
        work.extend(page.follow)
        pages.append(page)
    return pages


def runs(pages: list[Page]) -> list[Seen]:
    """Every row of these pages, in order."""
    return [seen for page in pages for seen in page.runs]


def remember(index: Index, seen: Seen, *, attempt: int = 1, at_ms: int = 1) -> Known:
    """Put a row into the index as if it had been told, and give back what is known then."""
    known = Known(
        job=seen.job,
        run_id=seen.run_id,
        state=seen.state,
        vendor_state=seen.vendor_state,
        substate=seen.substate,
        scope=seen.scope,
        attempt=attempt,
        marker=seen.marker,
        last_ms=at_ms,
        changed_ms=at_ms,
        queued_ms=seen.queued_ms,
        started_ms=seen.started_ms,
        ended_ms=seen.ended_ms,
        fingerprint=seen.fingerprint,
    )
    index.put(known, at_ms)
    return known
