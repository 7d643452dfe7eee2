"""P2: polls of a page of 100 jobs of which one has changed, journal and Redis included."""

from __future__ import annotations

from pathlib import Path

import msgspec

from bench import pages
from bench.bare import getting
from bench.measure import Cost, Report, interleaved, on_servers_cores
from bench.product import polling
from bench.serving import serving
from poller.brokers import redis_server
from poller.journal import open_journal
from poller.sinks.redis import RedisSink

IN_FLIGHT = 32
POLLS = 1_500


class _Job(msgspec.Struct, gc=False):
    id: str
    job_status: str
    create_time: int
    exec_start_time: int
    exec_end_time: int
    job_name: str | None = None
    project: str | None = None
    submitter: str | None = None


class _Jobs(msgspec.Struct):
    value: list[_Job]


class _Answer(msgspec.Struct):
    data: _Jobs


async def measure(folder: Path) -> Report:
    """Kylin's list, 32 sources that poll without a pause."""
    floor = msgspec.json.Decoder(_Answer).decode
    with on_servers_cores():
        broker = redis_server(folder)
        broker.start()
    try:
        with serving({"/api/jobs": pages.kylin_turning(100, 1)}) as url:
            async with open_journal(folder / "journal.db") as journal:
                sink = RedisSink(broker.url, journal=journal.uuid)
                async with (
                    polling(journal, "kylin", url, sources=IN_FLIGHT, sink=sink) as polls,
                    getting(f"{url}/api/jobs", IN_FLIGHT, floor) as get,
                ):
                    before = journal.last_offset
                    pairs = await interleaved(lambda: get(POLLS), lambda: polls.cost(POLLS))
                    events = journal.last_offset - before
    finally:
        broker.stop()
    polled = POLLS * (len(pairs.product) + 1)
    if not 0.9 * polled < events <= polled:
        raise RuntimeError(f"{polled} polls found {events} changes: this is not what it measures")
    what = "poll of 100 jobs, one changed, journal and Redis included"
    result = pairs.result(
        "P2", what, "µs CPU", _cpu_us, "≤ 1.5 × GET + decode", lambda _, ratio: ratio <= 1.5
    )
    return Report(results=[result], facts={"changing_us": result.figure})


def _cpu_us(cost: Cost) -> float:
    return cost.cpu_us
