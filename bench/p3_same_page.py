"""P3: polls of a page of 100 jobs whose body is the one of the poll before."""

from __future__ import annotations

from pathlib import Path

from bench import pages
from bench.bare import getting
from bench.measure import Cost, Report, interleaved
from bench.product import polling
from bench.serving import serving
from poller.journal import open_journal

IN_FLIGHT = 32
POLLS = 3_000


async def measure(folder: Path) -> Report:
    """Kylin's list, 57 KB, 32 sources that poll without a pause."""
    page = pages.kylin(range(100), lambda _: False)
    with serving({"/api/jobs": [page]}) as url:
        async with (
            open_journal(folder / "journal.db") as journal,
            polling(journal, "kylin", url, sources=IN_FLIGHT) as polls,
            getting(f"{url}/api/jobs", IN_FLIGHT) as get,
        ):
            pairs = await interleaved(lambda: get(POLLS), lambda: polls.cost(POLLS))
    what = f"poll of a page whose body did not change ({len(page) // 1000} KB)"
    result = pairs.result(
        "P3", what, "µs CPU", _cpu_us, "≤ 1.15 × a bare GET", lambda _, ratio: ratio <= 1.15
    )
    return Report(results=[result], facts={"same_us": result.figure})


def _cpu_us(cost: Cost) -> float:
    return cost.cpu_us
