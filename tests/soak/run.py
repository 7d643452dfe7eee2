"""One run of the soak: set the stage, let things go wrong, let it heal, and judge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from tests.soak.faults import SHARES, Injector, plan
from tests.soak.stage import Stage
from tests.soak.verdict import Verdict, judge

HEAL_S = 90.0
"""So long the daemon may take to find out and to deliver everything, once nothing goes wrong."""

KINDS = ("lost", "repeated", "out of order", "untrue", "falsely ended")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one run did, and what came of it.

    Attributes:
        points: how often a process was ended or stopped, or a connection cut.
        deaths: how often the daemon ended by itself, and what it said.
        flaws: how much is wrong, by kind; `what` has the first of each in full.
    """

    seed: int
    seconds: float
    points: int
    faults: dict[str, int]
    lives: int
    deaths: list[str]
    transitions: int
    events: int
    messages: int
    repeats: int
    flaws: dict[str, int]
    what: list[str]

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.flaws.values()) and not self.deaths


async def soak(
    folder: Path,
    *,
    seed: int,
    for_s: float,
    per_s: float,
    shares: Mapping[str, int] = SHARES,
    planted: str = "plain",
    progress: Callable[[str], None] = lambda _: None,
    heal_s: float = HEAL_S,
) -> Report:
    """Run it.

    Args:
        folder: for the brokers' and the daemon's files; it must exist.
        seed: decides what the jobs do, and what goes wrong when.
        for_s: for how long things go wrong.
        per_s: how many faults there are in a second.
        shares: how many of them are of each kind.
        planted: a bug out of `tests.crashing` in the daemon, to see whether it is noticed.
        progress: told every few seconds how it goes.
        heal_s: for how long the daemon may catch up in the end.
    """
    began_s = time.monotonic()
    stage = Stage(folder, seed, planted)
    injector = Injector(stage)
    told_s = 0.0

    def tell(at_s: float) -> None:
        nonlocal told_s
        if at_s - told_s >= 5:
            told_s = at_s
            progress(f"seed {seed}: {at_s:4.0f} of {for_s:.0f} s, {injector.points} points")

    async with stage.open():
        progress(f"seed {seed}: first contact is over, things go wrong from now on")
        await injector.run(plan(seed, for_s, per_s, shares), tell)
        stage.heal()
        progress(f"seed {seed}: nothing goes wrong any more, the daemon catches up")
        verdict = await _caught_up(stage, heal_s)
        code = await stage.stop()
        if code:
            stage.deaths.append(f"exit {code} at SIGTERM")
        if not verdict.flaws:
            verdict = await judge(stage)
    return Report(
        seed=seed,
        seconds=time.monotonic() - began_s,
        points=injector.points,
        faults=dict(sorted(injector.done.items())),
        lives=stage.lives,
        deaths=stage.deaths,
        transitions=verdict.transitions,
        events=verdict.events,
        messages=verdict.messages,
        repeats=verdict.repeats,
        flaws={kind: verdict.counts[kind] for kind in KINDS},
        what=_examples(verdict),
    )


async def _caught_up(stage: Stage, heal_s: float) -> Verdict:
    """The verdict, once nothing is missing any more; the last, if that does not come about."""
    deadline_s = time.monotonic() + heal_s
    while True:
        verdict = await judge(stage)
        # What is only late is lost or falsely ended until it comes; nothing else can mend itself.
        late = {"lost", "falsely ended"} >= set(verdict.counts)
        if not verdict.flaws or not late or time.monotonic() > deadline_s:
            return verdict
        await asyncio.sleep(1)


def _examples(verdict: Verdict) -> list[str]:
    """A few flaws in full, those of the rarest kind first."""
    rarest = sorted(verdict.flaws, key=lambda flaw: verdict.counts[flaw.kind])
    return [f"{flaw.kind}: {flaw.what}" for flaw in rarest[:10]]
