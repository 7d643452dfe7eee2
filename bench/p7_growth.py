"""P7: the same poll with ever more known runs; their memory; starting from the journal."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from random import Random

from bench import daemon, pages
from bench.measure import Cost, Curve, Report, Result, in_turn, median, rss_of
from bench.product import Polling, polling
from bench.serving import serving
from poller.app import now_ms
from poller.journal import open_journal
from poller.known import Commit, Condition, Known
from poller.runs import Job, State

SIZES = (10_000, 100_000, 1_000_000)
POLLS = 400
_PAGES = 40
_AT_ONCE = 20_000


async def measure(folder: Path) -> Report:
    """Kylin's list, 100 jobs a page, 40 pages of jobs from all over what is known, in turn."""
    known = {size: await _journal(folder / f"{size}", size) for size in SIZES}
    starts = {size: await _start(path) for size, path in {0: _empty(folder), **known}.items()}
    costs = await _polls(known)
    cpu = {size: median(costs[size], lambda cost: cost.cpu_us) for size in SIZES}
    growth = cpu[SIZES[-1]] / cpu[SIZES[0]]
    seconds = {size: took_s - starts[0][0] for size, (took_s, _) in starts.items()}
    memory = {size: (rss - starts[0][1]) / size for size, (_, rss) in starts.items() if size}
    most = SIZES[-1]
    disk = known[most].stat().st_size / most
    return Report(
        results=[
            Result(
                target="P7",
                what="poll of 100 jobs, one changed, with 1M known runs (floor: with 10k)",
                figure=cpu[most],
                unit="µs CPU",
                floor=cpu[SIZES[0]],
                ratio=growth,
                goal="≤ 1.6 × with 10k",
                holds=growth <= 1.6,
            ),
            Result(
                target="P7",
                what="memory per live run, of 1M",
                figure=memory[most],
                unit="B",
                goal="≤ 700 B",
                holds=memory[most] <= 700,
            ),
            Result(
                target="P7",
                what="start of the daemon from a journal of 1M (floor: an empty one)",
                figure=starts[most][0],
                unit="s",
                floor=starts[0][0],
                goal="≤ 12 s, linear",
                holds=starts[most][0] <= 12 and seconds[most] <= 13 * max(0.2, seconds[100_000]),
            ),
        ],
        curves=[
            Curve(
                name="p7-poll",
                title="CPU of the same poll",
                x="known runs",
                y="µs",
                points=[(size, cpu[size]) for size in SIZES],
            ),
            Curve(
                name="p7-start",
                title="Start from the journal",
                x="known runs",
                y="s",
                points=[(size, starts[size][0]) for size in SIZES],
            ),
        ],
        facts={
            "memory_per_run": memory[most],
            "journal_bytes_per_run": disk,
            "start_s": starts[most][0],
        },
    )


def _known(number: int, at_ms: int) -> Known:
    created_ms = pages.CREATED_MS + number
    run_id = pages.kylin_id(number)
    return Known(
        job=Job(id=run_id, name="INDEX_BUILD", group="ssb", owner="ADMIN"),
        run_id=run_id,
        state=State.RUNNING,
        vendor_state="RUNNING",
        scope="5",
        marker=str(created_ms),
        told=7,
        last_ms=created_ms + 1_500,
        changed_ms=at_ms,
        queued_ms=created_ms,
        started_ms=created_ms + 1_500,
    )


async def _journal(folder: Path, size: int) -> Path:
    """A journal that knows so many running jobs of one source."""
    folder.mkdir()
    at_ms = now_ms()
    condition = Condition(
        contact_ms=at_ms - 1, contact_done=True, last_good_ms=at_ms, up=True, since_ms=at_ms
    )
    path = folder / "journal.db"
    async with open_journal(path) as journal:
        for start in range(0, size, _AT_ONCE):
            runs = [_known(number, at_ms) for number in range(start, min(size, start + _AT_ONCE))]
            await journal.commit(Commit(source="source-0", runs=runs, condition=condition))
    return path


def _empty(folder: Path) -> Path:
    (folder / "0").mkdir()
    return folder / "0" / "journal.db"


async def _start(journal: Path) -> tuple[float, int]:
    """Seconds from starting the daemon to its first question, and the memory it holds then."""
    asked = asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        source = daemon.source("source-0", "kylin", url)
        config = daemon.settings(journal.parent, source, interval="60s")
        began_s = time.monotonic()
        with daemon.running(config) as pid:
            async with asyncio.timeout(120):
                await asked.wait()
            return time.monotonic() - began_s, rss_of(pid)


async def _polls(known: dict[int, Path]) -> dict[int, list[Cost]]:
    async with AsyncExitStack() as stack:
        sources: dict[int, Polling] = {}
        for size, path in known.items():
            url = stack.enter_context(serving({"/api/jobs": _bodies(size)}))
            journal = await stack.enter_async_context(open_journal(path))
            polls = polling(journal, "kylin", url, sources=1)
            sources[size] = await stack.enter_async_context(polls)
            await sources[size].let(3 * _PAGES)
        gc.collect()
        return await in_turn({size: partial(of.cost, POLLS) for size, of in sources.items()})


def _bodies(size: int) -> list[str]:
    """Pages of 100 running jobs from all over; each time round one job of each page has changed."""
    random = Random(size)
    numbers = [random.sample(range(size), 100) for _ in range(_PAGES)]
    return [
        pages.kylin(page, {page[0]}.__contains__ if stopped else {-1}.__contains__)
        for stopped in (True, False)
        for page in numbers
    ]
