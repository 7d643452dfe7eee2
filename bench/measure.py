"""What every row of the benchmark needs: cores, CPU time, interleaving, and what comes of it."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

ROUNDS = 5
"""Floor and product take turns so often; figures are medians."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.

    Attributes:
        target: its row in the list of targets, e.g. `P1`.
        what: what was measured.
        figure: of the product.
        unit: of figure and floor.
        floor: the same of the bare loop in the same run; None where there is none.
        ratio: figure to floor, the median over the rounds.
        goal: what is to be reached, in words.
        holds: whether it is; None for a figure without a goal.
    """

    target: str
    what: str
    figure: float
    unit: str
    floor: float | None = None
    ratio: float | None = None
    goal: str = ""
    holds: bool | None = None


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """How a cost grows: points (x, y), x on a logarithmic axis."""

    name: str
    title: str
    x: str
    y: str
    points: list[tuple[float, float]]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one row gives; `facts` are figures that the notes on scale are computed from."""

    results: list[Result]
    curves: list[Curve] = []
    facts: dict[str, float] = {}


@dataclass(slots=True)
class Cost:
    """What some operations took; `wall_s` may be set by who knows better when they were done."""

    operations: int
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @property
    def cpu_us(self) -> float:
        """CPU of this process per operation, in microseconds, all threads together."""
        return self.cpu_s * 1e6 / self.operations

    @property
    def per_s(self) -> float:
        """Operations per second."""
        return self.operations / self.wall_s

    @property
    def per_core_s(self) -> float:
        """Operations per second of CPU of this process."""
        return self.operations / self.cpu_s


@contextmanager
def costing(operations: int) -> Iterator[Cost]:
    """Measure what happens inside."""
    cost = Cost(operations)
    cpu_s, wall_s = _cpu_s(), time.monotonic()
    yield cost
    cost.cpu_s = _cpu_s() - cpu_s
    cost.wall_s = cost.wall_s or time.monotonic() - wall_s


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_of(pid: int) -> float:
    """CPU seconds that another process has used, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_of(pid: int) -> int:
    """Bytes of memory that a process holds."""
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Pairs:
    """Costs of the floor and of the product, round by round."""

    floor: list[Cost] = field(default_factory=list)
    product: list[Cost] = field(default_factory=list)

    def ratio(self, of: Callable[[Cost], float]) -> float:
        """Median over the rounds of product to floor; what both suffer at the same time cancels."""
        pairs = zip(self.product, self.floor, strict=True)
        return statistics.median(of(product) / of(floor) for product, floor in pairs)

    def result(
        self,
        target: str,
        what: str,
        unit: str,
        of: Callable[[Cost], float],
        goal: str = "",
        holds: Callable[[float, float], bool] | None = None,
    ) -> Result:
        """A line of the table; `holds` gets figure and ratio."""
        figure, ratio = median(self.product, of), self.ratio(of)
        return Result(
            target=target,
            what=what,
            figure=figure,
            unit=unit,
            floor=median(self.floor, of),
            ratio=ratio,
            goal=goal,
            holds=None if holds is None else holds(figure, ratio),
        )


def median(costs: Sequence[Cost], of: Callable[[Cost], float]) -> float:
    """The median of one figure."""
    return statistics.median(map(of, costs))


async def interleaved(
    floor: Callable[[], Awaitable[Cost]], product: Callable[[], Awaitable[Cost]]
) -> Pairs:
    """Floor and product in turn; the first turn of each warms up and does not count."""
    pairs = Pairs()
    for number in range(ROUNDS + 1):
        costs = await floor(), await product()
        if number:
            pairs.floor.append(costs[0])
            pairs.product.append(costs[1])
    return pairs


async def in_turn(
    blocks: Mapping[int, Callable[[], Awaitable[Cost]]], rounds: int = ROUNDS
) -> dict[int, list[Cost]]:
    """Several blocks in turn, likewise."""
    costs: dict[int, list[Cost]] = {size: [] for size in blocks}
    for number in range(rounds + 1):
        for size, block in blocks.items():
            cost = await block()
            if number:
                costs[size].append(cost)
    return costs


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else [0]


def pin() -> None:
    """Keep this process, which is what is measured, on a core of its own."""
    if len(_CORES) > 1:
        os.sched_setaffinity(0, _CORES[-1:])


@contextmanager
def on_servers_cores() -> Iterator[None]:
    """Processes that are started inside run on the other cores."""
    if len(_CORES) == 1:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _CORES[:-1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
