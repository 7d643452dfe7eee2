"""`run`, `demo` and `check`: the daemon itself, and whether it would work."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.markup import escape
from rich.table import Table

from poller import app, checks, fetch, settings, telemetry
from poller import demo as demonstration
from poller.cli.common import (
    COLOURS,
    DEFAULT,
    Config,
    err,
    load_settings,
    loop,
    out,
    settings_for,
)
from poller.errors import SettingsError
from poller.settings import Settings
from poller.terminal import plain
from poller.wire import Vendor

log = structlog.get_logger()

_FAREWELL_S = 15.0
"""So much is left for goodbyes after draining; the systemd unit kills 20 s after `drain`."""


def run(config: Config = DEFAULT) -> None:
    """Run the daemon.

    SIGTERM or Ctrl-C: polls stop, what was found is delivered (at most `poller.drain`), exit 0.
    Sent again, it delivers no more: what is left is delivered after the next start.
    SIGHUP: reads the settings again and changes the sources; a bad file is reported, not used.
    """
    vendors, loaded = load_settings(config)
    telemetry.configure_logs()
    loop(_daemon(loaded, vendors, config))


async def _daemon(loaded: Settings, vendors: Mapping[str, Vendor], config: Path) -> None:
    signals = app.Signals()
    running = asyncio.get_running_loop()

    def reload() -> None:
        try:
            signals.reload.put_nowait(settings_for(vendors, config))
        except SettingsError as error:
            log.error("settings.rejected", problems=error.problems)  # noqa: TRY400 - no bug of ours

    def stop() -> None:
        drain_s = loaded.poller.drain_s
        if signals.stop.is_set():
            signals.hurry.set()
            drain_s = 0.0
        signals.stop.set()
        end = threading.Timer(drain_s + _FAREWELL_S, _give_up)
        end.daemon = True
        end.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, stop)
    running.add_signal_handler(signal.SIGHUP, reload)
    await app.run(loaded, vendors, signals)


def _give_up() -> None:
    """End though something does not, as a thread that waits for a name server or a dead disk.

    Like a crash it loses nothing that was committed.
    """
    threads = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    log.error("poller.gave_up", threads=threads)
    os._exit(0)


def demo(
    seconds: Annotated[
        float | None, typer.Option(help="Stop by itself after so many seconds.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same jobs.")] = 1,
    config: Config = DEFAULT,
) -> None:
    """Show it all: five simulated vendors, the daemon, a Redis and an MQTT broker of its own.

    Prints every event as a subscriber reads it back from both brokers. Leaves nothing behind, and
    takes its settings from nowhere: -c is accepted as everywhere, and not read.
    """
    loop(demonstration.run(seconds=seconds, seed=seed, colours=COLOURS))


def check(
    config: Config = DEFAULT,
    *,
    offline: Annotated[bool, typer.Option("--offline", help="Validate the settings only.")] = False,
) -> None:
    """Validate the settings; sign in and list once at every source; connect to every sink.

    Writes nothing anywhere. Exit code 1 if something would not work, 2 if the settings are wrong.
    """
    vendors, loaded = load_settings(config)
    for file in loaded.exposed:
        err.print(f"{file}: others may read this secret; chmod 600 {file}", markup=False)
    if offline:
        out.print(f"{config}: fine ({len(loaded.sources)} sources)", markup=False)
        return
    findings = [
        replace(finding, what=plain(finding.what), advice=plain(finding.advice))
        for finding in loop(_check(loaded, vendors))
    ]
    if not sys.stdout.isatty():
        for finding in findings:
            mark, advice = ("ok", "") if finding.ok else ("FAIL", finding.advice)
            out.print(
                f"{mark:4} {finding.place}: {finding.what}" + (f"; {advice}" if advice else ""),
                markup=False,
            )
    else:
        table = Table("", "where", "what", "what to do", box=None)
        for finding in findings:
            mark = "[green]ok" if finding.ok else "[bold red]FAIL"
            table.add_row(mark, finding.place, escape(finding.what), escape(finding.advice))
        out.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


async def _check(loaded: Settings, vendors: Mapping[str, Vendor]) -> list[checks.Finding]:
    async def one(source: settings.Source) -> checks.Finding:
        place, vendor = f"sources.{source.name}", vendors[source.vendor]
        plan = app.plan(source, vendor)
        async with fetch.connect(app.endpoint(source), now_ms=app.now_ms) as ask:
            return await checks.check_source(place, vendor, plan.options, ask, app.now_ms)

    sinks = [
        checks.check_sink(sink.name, sink) for sink in app.sinks(loaded, "check", visitor=True)
    ]
    return await asyncio.gather(*(one(source) for source in loaded.sources.values()), *sinks)
