"""Programs that are not of this project's Python, and what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def program(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped, but not where changes are judged."""
    path = shutil.which(name, path=f"{os.environ['PATH']}:{Path(sys.executable).parent}")
    if path is None:
        message = f"no {name} on this machine: install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


def said(*command: str | Path, given: str | None = None) -> str:
    """All that a checker says; fails with it unless the checker is content."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    return told


def promtool(*arguments: str | Path, given: str | None = None) -> str:
    """All that promtool says; fails with it unless promtool is content."""
    return said(program("promtool", "Debian's prometheus"), *arguments, given=given)


def metrics_in(expression: str) -> set[str]:
    """The series of poller that a PromQL expression names."""
    return set(re.findall(r"\bpoller_\w+", re.sub(r'"[^"]*"', "", expression)))


def texts(value: object, key: str) -> Iterator[str]:
    """Every text that stands under this key, anywhere in parsed JSON or YAML."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                yield inner
            yield from texts(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, key)
