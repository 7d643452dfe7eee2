"""Huawei DataArts Factory (DLF, DGC), API v1: real-time jobs, and the instances of batch jobs.

The list of jobs shows the state of the real-time ones, and betrays batch instances that moved; the
list of instances shows those of batch jobs. A run's own page tells the condition of its nodes.

Follows opentelekomcloud-docs/data-arts-studio (job development APIs, error codes) and the models
of the vendor's SDK, huaweicloudsdkdgc 3.1.219.
"""

from __future__ import annotations

from msgspec.structs import replace

from poller.known import Known, Memory
from poller.runs import Seen, State
from poller.simulated.dataarts import KINDS, render
from poller.vendors.dataarts import batch, real_time
from poller.vendors.dataarts.api import (
    NO_INSTANCE,
    NO_JOB,
    JobList,
    Options,
    ask_jobs,
    fault,
    get,
    read,
    refuse,
)
from poller.vendors.dataarts.rows import RUN, WORDS, with_nodes
from poller.wire import Page, Request, Response, Vendor


def start(options: Options, memory: Memory) -> list[Request]:
    """The first page of each list."""
    requests = []
    if real_time.SORT in options.kinds:
        requests.append(ask_jobs(options, JobList(real_time.SORT)))
    if batch.SORT in options.kinds:
        requests.append(batch.sweep(options, memory))
    return requests


def settle(options: Options, run: Known | Seen) -> Request:
    """The run's own page."""
    if run.scope == real_time.SORT:
        return get(options, run, run.run_id, "status", by_id=True)
    return get(options, run, run.job.id, "instances", run.run_id, by_id=True)


def ask(options: Options, known: Known | None, seen: Seen) -> Request | None:
    """The condition of the nodes, for any news of a stream and for a failed instance."""
    is_row = seen.fingerprint != 0
    if is_row and (seen.scope == real_time.SORT or seen.state is State.FAILED):
        return settle(options, seen)
    return None


def parse(options: Options, request: Request, response: Response, memory: Memory) -> Page:
    """Read a page of a list, or a run's own page.

    Raises:
        VendorError: it is not as documented, or an error, which may come with status 200.
    """
    match request.context:
        case batch.InstanceList() as asked:
            return batch.read_instances(options, asked, response, memory)
        case JobList(sort=real_time.SORT) as asked:
            return real_time.read_jobs(options, asked, response, memory)
        case JobList() as asked:
            return batch.read_jobs(options, asked, response, memory)
        case run:
            return _read_run(options, run, response, memory)


def _read_run(options: Options, run: Known | Seen, response: Response, memory: Memory) -> Page:
    """Reads the page of a known run, or of a row that is about to be told."""
    row = run if isinstance(run, Seen) else None
    code, _ = fault(response)
    if code in (NO_JOB, NO_INSTANCE):
        return Page(runs=[row]) if row else Page(gone=[(run.job.id, run.run_id)])
    if code:
        refuse(response)
    page, nodes, bad = read(RUN, response)
    page = replace(page, status=page.status or (row and row.vendor_state))
    if not page.status:  # it is optional: the answer cannot tell
        return Page(bad=bad)
    known = memory.get(run.job.id, run.run_id)
    if run.scope == real_time.SORT:
        seen = real_time.see(options, run.job, page, known)
        marks = {}
    else:
        seen = batch.see(run.job, run.run_id, page, known)
        marks = {} if row else batch.note_unfinished([page], memory)
    seen = with_nodes(seen, nodes)
    return Page(runs=_joined(row, seen) if row else [seen], marks=marks, bad=bad)


def _joined(row: Seen, newer: Seen) -> list[Seen]:
    """The row with what its own page adds; both if it has moved on in between."""
    if newer.state is not row.state:
        return [row, newer]
    names = ("marker", "ordinal", "queued_ms", "started_ms", "ended_ms", "fingerprint")
    kept = {name: getattr(row, name) or getattr(newer, name) for name in names}
    return [replace(newer, **kept, detail={**row.detail, **newer.detail})]


VENDOR = Vendor(
    name="dataarts",
    options=Options,
    words=WORDS,
    start=start,
    parse=parse,
    settle=settle,
    ask=ask,
    render=render,
    kinds=KINDS,
)
