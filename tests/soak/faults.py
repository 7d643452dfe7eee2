"""What goes wrong, and when: a plan that a seed decides, and its execution."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

from poller import sim, vendors
from tests.soak.mangle import MANGLES
from tests.soak.proxy import CUTS
from tests.soak.stage import Stage

SHARES: Mapping[str, int] = {
    "cut to vendor": 38,
    "cut to broker": 30,
    "daemon killed": 8,
    "daemon stopped": 2,
    "daemon frozen": 2,
    "redis killed": 3,
    "mqtt killed": 3,
    "vendor fault": 8,
    "vendor mangled": 4,
    "disk full": 1,
    "clock stepped": 1,
}
"""Of a hundred faults, how many are of each kind."""

DELIVERY: Mapping[str, int] = {"cut to broker": 1, "reply of redis lost": 2, "mqtt killed": 1}
"""Only what endangers delivery."""

MOST_STEP_MS = 5_000
"""By so much the daemon's clock is wrong at most."""


class Fault(NamedTuple):
    """What goes wrong: when, after the beginning, what, where, how, and for how long."""

    at_s: float
    kind: str
    place: str
    how: str
    for_s: float


def plan(seed: int, for_s: float, per_s: float, shares: Mapping[str, int] = SHARES) -> list[Fault]:
    """The faults of a run, in order of time; the same seed gives the same plan."""
    random = Random(seed)
    faults = []
    at_s = 0.0
    while (at_s := at_s + random.expovariate(per_s)) < for_s:
        kind = random.choices(list(shares), list(shares.values()))[0]
        place = random.choice(vendors.BUILT_IN)
        how = ""
        if kind.startswith("cut"):
            place = place if kind == "cut to vendor" else random.choice(["redis", "mqtt"])
            how = random.choice(CUTS)
        elif kind == "vendor fault":
            how = random.choice(list(sim.FAULTS))
        elif kind == "vendor mangled":
            how = random.choice(MANGLES)
        elif kind == "clock stepped":
            how = str(random.randint(-MOST_STEP_MS, MOST_STEP_MS))
        faults.append(Fault(at_s, kind, place, how, random.uniform(0.05, 1.5)))
    return faults


class Injector:
    """Carries out a plan.

    Attributes:
        done: how many faults of each kind there truly were.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._counted: Counter[str] = Counter()
        self._busy = asyncio.Lock()

    @property
    def done(self) -> Counter[str]:
        """Faults by kind; cuts count where they hit a connection."""
        stage, counted = self._stage, self._counted.copy()
        for proxy in stage.proxies.values():
            where = proxy.name if proxy.name in ("redis", "mqtt") else "vendor"
            for kind, times in proxy.hits.items():
                counted[f"connection to {where}: {kind}"] += times
        return counted

    @property
    def points(self) -> int:
        """How often something was ended, stopped or cut."""
        gentle = ("vendor", "clock")
        return sum(n for kind, n in self.done.items() if not kind.startswith(gentle))

    async def run(self, faults: Sequence[Fault], progress: Callable[[float], None]) -> None:
        """Let it all happen, each at its time."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with asyncio.TaskGroup() as group:
            for fault in faults:
                await asyncio.sleep(began_s + fault.at_s - loop.time())
                group.create_task(self._happen(fault))
                progress(fault.at_s)

    async def _happen(self, fault: Fault) -> None:
        stage, for_s = self._stage, fault.for_s
        match fault.kind:
            case "reply of redis lost":
                stage.proxies["redis"].cut("lost reply", for_s, b"EVALSHA")
            case "cut to vendor" | "cut to broker":
                stage.proxies[fault.place].cut(fault.how, for_s)
            case "redis killed" | "mqtt killed":
                async with self._busy:
                    self._counted[fault.kind] += 1
                    await stage.crash_broker(fault.kind.split()[0], for_s)
            case "vendor fault":
                self._counted[f"vendor answers {fault.how}"] += 1
                faults = stage.sites[fault.place].faults
                faults.clear()
                faults[fault.how] = 0.5
                await asyncio.sleep(for_s)
                faults.pop(fault.how, None)
            case "vendor mangled":
                self._counted[f"vendor has {fault.how}"] += 1
                mangle = stage.sites[fault.place].mangle
                mangle.kind = fault.how
                await asyncio.sleep(for_s)
                mangle.kind = ""
            case "clock stepped":
                self._counted[fault.kind] += 1
                stage.step_clock(int(fault.how))
            case _:
                async with self._busy:
                    self._counted[fault.kind] += 1
                    await self._harm_daemon(fault)

    async def _harm_daemon(self, fault: Fault) -> None:
        stage = self._stage
        if fault.kind == "daemon frozen":
            stage.freeze()
            await asyncio.sleep(fault.for_s)
            stage.thaw()
        elif fault.kind == "disk full":
            stage.fill_disk(full=True)
            await asyncio.sleep(fault.for_s)
            stage.fill_disk(full=False)
        else:
            killed = fault.kind == "daemon killed"
            await stage.end(signal.SIGKILL if killed else signal.SIGTERM)
            await stage.start()
            # Often it is hit again while it starts, and mostly while it works.
            await asyncio.sleep(2 * fault.for_s)
