"""The systemd unit: systemd understands all of it, and finds little to attack."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.deploy.programs import DEPLOY, program, said


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that exists here."""
    text = (DEPLOY / "poller.service").read_text(encoding="utf-8")
    path = tmp_path / "poller.service"
    installed = "/opt/poller/bin/poller"
    assert installed in text
    path.write_text(text.replace(installed, str(shutil.which(sys.executable))), encoding="utf-8")
    return path


def analyze(*arguments: str | Path) -> str:
    return said(program("systemd-analyze", "systemd"), *arguments)


def test_systemd_understands_every_line(unit: Path) -> None:
    assert str(unit.name) not in analyze("verify", "--man=no", unit)


def test_systemd_finds_little_to_attack(unit: Path) -> None:
    told = analyze("security", "--offline=true", "--threshold=20", "--no-pager", unit)  # 2.0 of 10
    assert "Overall exposure level" in told
