"""The soak's short version, and whether the soak would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crashing import BUGS
from tests.soak.faults import DELIVERY
from tests.soak.run import soak


@pytest.mark.timeout(180)
async def test_whatever_goes_wrong_nothing_is_lost_repeated_or_made_up(tmp_path: Path) -> None:
    report = await soak(tmp_path, seed=1, for_s=20, per_s=6)
    assert report.is_good, report
    assert report.points > 50
    assert report.events > 100


@pytest.mark.parametrize(
    ("planted", "kind"),
    [("skip-commit", "lost"), ("no-cursor-check", "repeated"), ("ack-before-send", "lost")],
)
async def test_a_planted_bug_is_noticed(tmp_path: Path, planted: str, kind: str) -> None:
    assert planted in BUGS
    report = await soak(
        tmp_path, seed=1, for_s=8, per_s=3, shares=DELIVERY, planted=planted, heal_s=3
    )
    assert report.flaws[kind], report
