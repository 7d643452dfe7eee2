"""Whether every loop goes on: each says when its next sign of life is due, and none may end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog

from poller.telemetry import Metrics

log = structlog.get_logger()

SILENT_S = 4.5
"""How late a sign of life may be, so that `/readyz` tells within 5 s."""


class Living(Protocol):
    """What gives signs of life: a loop, or a thread that loops wait for."""

    @property
    def due_s(self) -> float:
        """When the next one is due, by the loop's clock; infinity if none is expected."""


class Pulse:
    """The signs of life of a loop that has no others.

    Attributes:
        due_s: as in `Living`.
    """

    def __init__(self) -> None:
        self.due_s = math.inf

    def expect(self, within_s: float) -> None:
        """The next one comes within so many seconds; infinity: nobody knows when."""
        self.due_s = asyncio.get_running_loop().time() + within_s


class Liveness:
    """Runs the loops, and looks after them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._living: dict[str, Living] = {}
        self._stuck: set[str] = set()

    def add(self, name: str, living: Living) -> None:
        """Look after this from now on."""
        self._living[name] = living

    async def run(self, name: str, loop: Callable[[], Awaitable[None]], living: Living) -> None:
        """Run a loop, which is to end by being cancelled or by an error of its own only.

        Raises:
            RuntimeError: it has ended otherwise; a task group would not notice.
        """
        task = asyncio.current_task()
        self._living[name] = living
        try:
            await loop()
        except asyncio.CancelledError:
            if task is None or task.cancelling():
                raise  # somebody has asked for it; else a library leaked its own
        finally:
            del self._living[name]
        log.error("loop.ended", loop=name)
        raise RuntimeError(f"{name} has ended, and nobody asked for it")

    def overdue(self) -> dict[str, float]:
        """What is stuck, and by how many seconds its sign of life is overdue."""
        now_s = asyncio.get_running_loop().time()
        late = {name: now_s - living.due_s for name, living in self._living.items()}
        return {name: late_s for name, late_s in late.items() if late_s > SILENT_S}

    def look(self) -> bool:
        """Whether everything goes on; logs what is stuck now, and what is no more."""
        overdue = self.overdue()
        for name in overdue.keys() - self._stuck:
            log.error("loop.stuck", loop=name, overdue_s=round(overdue[name], 1))
        for name in self._stuck - overdue.keys():
            log.info("loop.recovered", loop=name)
        self._stuck = set(overdue)
        self._metrics.stuck_loops.set(len(overdue))
        return not overdue
