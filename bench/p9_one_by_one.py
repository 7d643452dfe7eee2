"""P9: 100,000 jobs polled one by one, since the vendor has no list that shows them."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path

from bench import daemon, pages
from bench.measure import Report, Result, cpu_of
from bench.serving import BIN_S, requests_since, serving

JOBS = 100_000
PER_S = 2_000
WINDOW_S = 20.0
_START_S = 120.0


async def measure(folder: Path) -> Report:
    """Datameer's histories, one request a job, swept within the rate; the daemon as a subprocess.

    Evenness is judged where the machine has room: at a rate below what one core can do.
    """
    history = '[{"id": 4711, "jobStatus": "COMPLETED"}]'
    bodies = {"/job-history/": [history], "/list-running": [pages.datameer_running()]}
    with serving(bodies) as url:
        jobs = f"jobs = {list(range(1, JOBS + 1))}\nconcurrency = 64"
        every = f'sweep_interval = "{JOBS // PER_S}s"'
        config = daemon.settings(
            folder,
            daemon.source("source-0", "datameer", url, f"{jobs}\n{every}"),
            interval="1s",
            rate=f"{2 * PER_S}/s",
        )
        with daemon.running(config) as pid:
            await _under_way(url)
            await requests_since(url)
            cpu_s = cpu_of(pid)
            await asyncio.sleep(WINDOW_S)
            cpu_s = cpu_of(pid) - cpu_s
            bins = (await requests_since(url))[1:-1]
    mean, most = statistics.fmean(bins), _burst(bins)
    per_core = sum(bins) / cpu_s
    return Report(
        results=[
            Result(
                target="P9",
                what=f"polls one by one per second of CPU, {JOBS:,} jobs",
                figure=per_core,
                unit="polls/s",
                goal="≥ 10,000 per core",
                holds=per_core >= 10_000,
            ),
            Result(
                target="P9",
                what=f"most requests in {BIN_S:g} s (floor: the mean), at {mean / BIN_S:,.0f}/s",
                figure=most,
                unit="requests",
                floor=mean,
                ratio=most / mean,
                goal="≤ 1.2 × the mean",
                holds=most <= 1.2 * mean,
            ),
        ],
        facts={"one_by_one_per_core_s": per_core},
    )


def _burst(bins: list[int]) -> float:
    return float(max(bins))


async def _under_way(url: str) -> None:
    """First contact reads every history once; the sweeps that follow are what is measured."""
    asked = 0
    async with asyncio.timeout(_START_S):
        while asked < JOBS:
            await asyncio.sleep(0.5)
            asked += sum(await requests_since(url))
