"""Fuzzes the reading of settings: `python -m tests.fuzz.settings`, with libFuzzer's options."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["poller", "tomllib", "durationpy"]):
    from poller.errors import SettingsError
    from poller.settings import load
    from poller.vendors import BUILT_IN
    from poller.vendors import load as vendor
    from tests import hostile

    OPTIONS = {name: vendor(name).options for name in BUILT_IN}

from tests.fuzz.dice import Dice


def one(config: Path, data: bytes) -> None:
    """Roll a file and an environment; or take the rest of the bytes as the file."""
    dice = Dice(data)
    text, environ = hostile.settings(dice) if dice.getrandbits(8) & 3 else (dice.rest(), {})
    config.write_bytes(text)
    try:
        load(config, OPTIONS, environ)
    except SettingsError as error:
        if not error.problems or not all(map(str.isprintable, error.problems)):
            raise AssertionError(error.problems) from error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.toml"
        atheris.Setup(sys.argv, lambda data: one(path, data))
        atheris.Fuzz()
