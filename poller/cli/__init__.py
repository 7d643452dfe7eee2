"""The command line: run, demo, check, tail, runs, replay, simulate, schema."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from poller import __version__
from poller.cli import daemon, reading, tools
from poller.cli.common import err, out
from poller.errors import PollerError, SettingsError
from poller.terminal import plain

cli = typer.Typer(
    name="poller",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(
    *, show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """Poll job systems that cannot call back; publish every transition to Redis and MQTT."""
    if show:
        out.print(__version__)
        raise typer.Exit


cli.callback(invoke_without_command=True)(version)
for command in (
    daemon.run,
    daemon.demo,
    daemon.check,
    reading.tail,
    reading.runs,
    reading.replay,
    tools.simulate,
    tools.schema,
):
    cli.command()(command)


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 settings or usage wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that its encoding does not have
    try:
        cli()
    except SettingsError as error:
        for problem in error.problems:
            err.print(plain(problem), markup=False)
        sys.exit(2)
    except PollerError as error:
        err.print(plain(str(error)), markup=False)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read us has gone; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
