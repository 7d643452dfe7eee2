"""Real-time jobs: each is its own run, a new start time is a new attempt."""

from __future__ import annotations

from msgspec.structs import replace

from poller.known import Known, Memory
from poller.runs import Job, Seen, State
from poller.vendors.dataarts import api, rows
from poller.vendors.dataarts.api import JobList, Options
from poller.wire import Page, Response

SORT = "real_time"


def read_jobs(options: Options, asked: JobList, response: Response, memory: Memory) -> Page:
    """Read a page of the list, which shows the state of every job.

    Raises:
        VendorError: it is no page of jobs.
    """
    jobs, bad, follow, whole = api.read_jobs(options, asked, response)
    news, shown = rows.sift(jobs, memory)
    seen = [
        see(options, rows.job_of(job), job, known)
        for job, known in news
        if known is not None or not _never_ran(job)
    ]
    return Page(
        runs=seen,
        shown=shown,
        follow=follow,
        complete=SORT if whole else None,
        bad=bad,
        lasting=True,
    )


def see(options: Options, job: Job, row: rows.Row, known: Known | None) -> Seen:
    """What a row, or the job's own page, shows of the job."""
    seen = rows.see(SORT, job, job.id, row, known)
    state = State(options.stopped) if seen.state is State.CANCELED else seen.state
    marker = None if seen.started_ms is None else str(seen.started_ms)
    return replace(seen, state=state, marker=marker)


def _never_ran(job: rows.JobRow) -> bool:
    return job.state is State.CANCELED and job.started_ms is None
