"""P8: many sources, each polled once a minute, and nothing changes."""

from __future__ import annotations

import asyncio
import resource
from contextlib import ExitStack
from pathlib import Path

from bench import daemon, pages
from bench.measure import Curve, Report, Result, cpu_of, rss_of
from bench.serving import requests_since, serving

SIZES = (1_000, 3_000, 10_000)
WINDOW_S = 60.0
GOAL = 0.25
_START_S = 240.0
_SPARE_FILES = 1_000


async def measure(folder: Path) -> Report:
    """Kylin's list, one job; daemons of each size as subprocesses, all at the same time."""
    sizes = _within_limits(SIZES)
    sources = [_Daemon(folder / str(size), size) for size in sizes]
    with ExitStack() as stack:
        for each in sources:
            each.start(stack)
        for each in sources:
            await each.settled()
        for each in sources:
            await each.begin()
        await asyncio.sleep(WINDOW_S)
        figures = {each.size: await each.end() for each in sources}
    most = sizes[-1]
    cores, memory, poll_us = figures[most]
    return Report(
        results=[
            Result(
                target="P8",
                what=f"{most:,} sources polled each minute, nothing changing",
                figure=cores,
                unit="cores",
                goal=f"≤ {GOAL} core",
                holds=cores <= GOAL * most / SIZES[-1],
            ),
            Result(target="P8", what="CPU of each of these polls", figure=poll_us, unit="µs CPU"),
            Result(target="P8", what="memory of the daemon", figure=memory / 1e6, unit="MB"),
        ],
        curves=[
            Curve(
                name="p8-sources",
                title="CPU of the daemon, each source polled once a minute",
                x="sources",
                y="cores",
                points=[(size, figure[0]) for size, figure in figures.items()],
            )
        ],
        facts={"idle_poll_us": poll_us, "memory_per_source": memory / most},
    )


def _within_limits(sizes: tuple[int, ...]) -> list[int]:
    """The sizes for which this process may have files enough open: a connection each."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return [size for size in sizes if size + _SPARE_FILES <= most]


class _Daemon:
    """A daemon of so many sources, and a vendor of its own."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self._folder = folder
        self._url = ""
        self._pid = 0
        self._cpu_s = 0.0

    def start(self, stack: ExitStack) -> None:
        self._folder.mkdir()
        page = pages.kylin([0], lambda _: False)
        self._url = stack.enter_context(serving({"/api/jobs": [page]}))
        sources = (daemon.source(f"source-{n}", "kylin", self._url) for n in range(self.size))
        config = daemon.settings(self._folder, "\n".join(sources), interval="60s")
        self._pid = stack.enter_context(daemon.running(config))

    async def settled(self) -> None:
        """Every source has been asked once, and what that brought is dealt with."""
        asked = 0
        async with asyncio.timeout(_START_S):
            while asked < self.size:
                await asyncio.sleep(0.5)
                asked += sum(await requests_since(self._url))
        await asyncio.sleep(3)

    async def begin(self) -> None:
        await requests_since(self._url)
        self._cpu_s = cpu_of(self._pid)

    async def end(self) -> tuple[float, float, float]:
        """Cores as if polled exactly once a minute, bytes of memory, CPU µs of a poll."""
        cpu_s = cpu_of(self._pid) - self._cpu_s
        polls = sum(await requests_since(self._url))
        return cpu_s / polls * self.size / 60.0, rss_of(self._pid), cpu_s / polls * 1e6
