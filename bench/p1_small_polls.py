"""P1: polls of a small status document that does not change."""

from __future__ import annotations

from pathlib import Path

from bench import pages
from bench.bare import getting
from bench.measure import Cost, Report, interleaved, median
from bench.product import polling
from bench.serving import serving
from poller.journal import open_journal

IN_FLIGHT = 32
POLLS = 3_000


async def measure(folder: Path) -> Report:
    """Datameer's list of what runs, one job, 32 sources that poll without a pause."""
    with serving({"/list-running": [pages.datameer_running()], "/rest": ["[]"]}) as url:
        async with (
            open_journal(folder / "journal.db") as journal,
            polling(journal, "datameer", url, sources=IN_FLIGHT) as polls,
            getting(f"{url}/rest/jobs/list-running", IN_FLIGHT) as get,
        ):
            pairs = await interleaved(lambda: get(POLLS), lambda: polls.cost(POLLS))
    what = "poll of a small status document, unchanged"
    return Report(
        results=[
            pairs.result(
                "P1", what, "µs CPU", _cpu_us, "≤ 1.3 × a bare GET", lambda _, ratio: ratio <= 1.3
            )
        ],
        facts={"poll_us": median(pairs.product, _cpu_us)},
    )


def _cpu_us(cost: Cost) -> float:
    return cost.cpu_us
