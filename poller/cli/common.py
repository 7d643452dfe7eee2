"""What the commands share: consoles, options, loading of settings, running a loop to its end."""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import sys
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from poller import settings
from poller.runs import Ms
from poller.settings import Settings
from poller.terminal import plain, plain_json
from poller.vendors import load, names
from poller.wire import Options, Vendor

out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

Config = Annotated[
    Path, typer.Option("-c", "--config", help="The settings file.", show_default=True)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object a line; the default when piped.")
]
DEFAULT = Path("settings.toml")

COLOURS: Mapping[str, str] = {
    "queued": "cyan", "starting": "cyan", "running": "blue", "suspended": "yellow",
    "stopping": "yellow", "succeeded": "green", "failed": "bold red", "canceled": "magenta",
    "unknown": "yellow", "down": "bold red", "up": "green",
}  # fmt: skip


def loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end; Ctrl-C ends quietly; a failed loop's own error comes out of its groups."""
    factory: Any = None
    with suppress(ImportError):
        import uvloop  # noqa: PLC0415 - an extra, which a platform may lack

        factory = uvloop.new_event_loop
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(coroutine)
    except KeyboardInterrupt:
        raise typer.Exit from None
    except ExceptionGroup as group:
        raise _first(group) from group


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def all_vendors() -> dict[str, Vendor]:
    """Every vendor by name."""
    return {name: load(name) for name in names()}


def options_of(vendors: Mapping[str, Vendor]) -> dict[str, type[Options]]:
    """The models of the vendors' own settings."""
    return {name: vendor.options for name, vendor in vendors.items()}


def load_settings(config: Path) -> tuple[dict[str, Vendor], Settings]:
    """Every vendor, and the settings of a file and the environment.

    Raises:
        SettingsError: with everything that is wrong with them.
    """
    vendors = all_vendors()
    return vendors, settings_for(vendors, config)


def settings_for(vendors: Mapping[str, Vendor], config: Path) -> Settings:
    """The settings of a file and the environment, read again."""
    return settings.load(config, options_of(vendors), os.environ)


def usage(sentence: str) -> NoReturn:
    """Say what is wrong with the arguments, and exit with 2."""
    err.print(plain(sentence), markup=False)
    sys.exit(2)


def print_json(document: bytes) -> None:
    """Print JSON on a line of its own: these very bytes, unless a terminal might obey them."""
    if sys.stdout.isatty():
        document = plain_json(document.decode()).encode()
    sys.stdout.buffer.write(document + b"\n")
    sys.stdout.buffer.flush()


def instant(text: str) -> Ms:
    """A time given as a span back from now, or as RFC 3339."""
    span = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text.strip())
    if span:
        unit = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[span[2]]
        return time.time_ns() // 1_000_000 - int(float(span[1]) * unit)
    try:
        instant = datetime.datetime.fromisoformat(text)
    except ValueError:
        usage(f"--since: {text!r} is neither a span like 10m or 2h nor an RFC 3339 time")
    if instant.tzinfo is None:
        instant = instant.astimezone()
    return int(instant.timestamp() * 1000)
