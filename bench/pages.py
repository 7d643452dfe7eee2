"""Bodies as vendors send them, made beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

CREATED_MS = 1_700_000_000_000


def datameer_running(job: int = 17) -> str:
    """A small status document: one running execution."""
    return json.dumps(
        {
            "dapJobConfigurationId": job,
            "jobExecutionId": 4711,
            "jobStatus": "RUNNING",
            "progress": 37,
            "startTime": "2026-11-20 11:38:07.0",
            "estimateTime": "11 sec",
            "artifactName": "customers per region, joined with what they bought this month",
            "owner": "admin",
            "recordsProcessed": 1_203_441,
            "bytesProcessed": 88_031_220_102,
        }
    )


def kylin(numbers: Sequence[int], is_stopped: Callable[[int], bool]) -> str:
    """A page of Kylin 5's list, about 570 bytes a job."""
    jobs = [_kylin_job(number, stopped=is_stopped(number)) for number in numbers]
    data = {"value": jobs, "offset": 0, "limit": 200, "total_size": len(jobs)}
    return json.dumps({"code": "000", "data": data, "msg": ""})


def kylin_turning(jobs: int, changes: int, first: int = 0) -> list[str]:
    """Pages of the same jobs for ever in turn, each with so many that differ from the page before.

    The jobs stop one after the other, then they run again.
    """
    steps = jobs // changes
    numbers = range(first, first + jobs)
    stopping = [_turned(numbers, step * changes, stopped=True) for step in range(steps)]
    return stopping + [_turned(numbers, step * changes, stopped=False) for step in range(steps)]


def _turned(numbers: Sequence[int], turned: int, *, stopped: bool) -> str:
    return kylin(numbers, lambda number: (number - numbers[0] < turned) is stopped)


def kylin_id(number: int) -> str:
    """Id of a job."""
    return f"232bf69f-6cdf-4dcc-a3aa-{number:012}"


def _kylin_job(number: int, *, stopped: bool) -> dict[str, object]:
    at_ms = CREATED_MS + number
    return {
        "id": kylin_id(number),
        "last_modified": at_ms + 3_000,
        "project": "ssb",
        "target_model": "9a3b6c1e-93a6-4bd0-8a5c-63e2f1e0c11b",
        "target_segments": ["0b5b6f1a-aa9c-4fa1-a5ff-1d3f0a8e1f55"],
        "job_name": "INDEX_BUILD",
        "job_status": "STOPPED" if stopped else "RUNNING",
        "scheduler_state": "PAUSED" if stopped else "RUNNING",
        "step_ratio": 0.33,
        "create_time": at_ms,
        "exec_start_time": at_ms + 1_500,
        "exec_end_time": 0,
        "duration": 412_332,
        "wait_time": 1_502,
        "target_subject": "model_of_sales",
        "submitter": "ADMIN",
        "steps": None,
        "tag": None,
        "total_duration": 413_834,
    }
