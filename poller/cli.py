"""The command line: run, demo, check, tail, runs, replay, simulate, schema."""

from __future__ import annotations

import asyncio
import datetime
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NoReturn

import orjson
import structlog
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from poller import __version__, app, checks, demo, events, fetch, settings, sim, tails, telemetry
from poller.errors import PollerError, SettingsError, SinkUnavailable
from poller.journal import read_journal
from poller.known import Condition, Known
from poller.runs import TERMINAL, Ms, State
from poller.settings import Settings
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink
from poller.vendors import load, names
from poller.wire import Options, Vendor
from poller.world import World

log = structlog.get_logger()
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)

cli = typer.Typer(
    name="poller",
    help="Polls job systems that cannot call back; publishes every transition to Redis and MQTT.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


class SinkName(StrEnum):
    """A sink to replay to."""

    REDIS = "redis"
    MQTT = "mqtt"


class SchemaName(StrEnum):
    """What there is a schema of."""

    EVENT = "event"
    SETTINGS = "settings"


@cli.callback(invoke_without_command=True)
def version(
    *, show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False
) -> None:
    """Poll job systems that cannot call back; publish every transition to Redis and MQTT."""
    if show:
        out.print(__version__)
        raise typer.Exit


@cli.command()
def run(config: Config = DEFAULT) -> None:
    """Run the daemon.

    SIGTERM or Ctrl-C: polls stop, what was found is delivered (at most `poller.drain`), exit 0.
    SIGHUP: reads the settings again and changes the sources; a bad file is reported, not used.
    """
    vendors, loaded = _load(config)
    telemetry.configure_logs()
    _loop(_daemon(loaded, vendors, config))


async def _daemon(loaded: Settings, vendors: Mapping[str, Vendor], config: Path) -> None:
    signals = app.Signals()
    loop = asyncio.get_running_loop()

    def reload() -> None:
        try:
            signals.reload.put_nowait(_load_for(vendors, config))
        except SettingsError as error:
            log.error("settings.rejected", problems=error.problems)  # noqa: TRY400 - no bug of ours

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload)
    await app.run(loaded, vendors, signals)


@cli.command("demo")
def demo_command(
    seconds: Annotated[
        float | None, typer.Option(help="Stop by itself after so many seconds.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same jobs.")] = 1,
) -> None:
    """Show it all: five simulated vendors, the daemon, a Redis and an MQTT broker of its own.

    Prints every event as a subscriber reads it back from both brokers. Leaves nothing behind.
    """
    _loop(demo.run(seconds=seconds, seed=seed, colours=COLOURS))


@cli.command()
def check(
    config: Config = DEFAULT,
    *,
    offline: Annotated[bool, typer.Option("--offline", help="Validate the settings only.")] = False,
) -> None:
    """Validate the settings; sign in and list once at every source; connect to every sink.

    Writes nothing anywhere. Exit code 1 if something would not work, 2 if the settings are wrong.
    """
    vendors, loaded = _load(config)
    if offline:
        out.print(f"{config}: fine ({len(loaded.sources)} sources)")
        return
    findings = _loop(_check(loaded, vendors))
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


@cli.command()
def tail(
    config: Config = DEFAULT,
    *,
    source: Annotated[
        list[str] | None, typer.Option(help="Only of this source; repeatable.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", help="Only of this type, e.g. failed, source.*, dev.poller.job.failed."
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="From then on: 10m, 2h, 7d, or 2026-01-31T12:00:00Z.")
    ] = None,
    lines: Annotated[
        int, typer.Option("-n", help="How many past events without --since.", min=0)
    ] = 10,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Wait for more.")] = True,
    as_json: AsJson = False,
) -> None:
    """Print events: from the Redis streams if the settings name a Redis, else from the journal."""
    _, loaded = _load(config)
    since_ms = _instant(since) if since else None
    pretty = sys.stdout.isatty() and not as_json
    wanted = _wanted(source or [], kind)
    _loop(_tail(loaded, source or [], since_ms, lines, wanted, follow=follow, pretty=pretty))


async def _tail(
    loaded: Settings,
    sources: list[str],
    since_ms: Ms | None,
    last: int,
    wanted: Callable[[events.Event], bool],
    *,
    follow: bool,
    pretty: bool,
) -> None:
    async with _events(loaded, sources, since_ms, last, follow=follow) as stream:
        async for body, event in stream:
            if wanted(event):
                if pretty:
                    out.print(demo.line(event, COLOURS))
                else:
                    sys.stdout.buffer.write(body + b"\n")
                    sys.stdout.buffer.flush()


@asynccontextmanager
async def _events(
    loaded: Settings, sources: list[str], since_ms: Ms | None, last: int, *, follow: bool
) -> AsyncIterator[AsyncIterator[tuple[bytes, events.Event]]]:
    for sink in app.sinks(loaded, "tail", visitor=True):
        if isinstance(sink, RedisSink):
            yield tails.from_redis(sink, sources, since_ms=since_ms, last=last, follow=follow)
            return
    async with read_journal(loaded.poller.journal) as journal:
        yield tails.from_journal(journal, since_ms=since_ms, last=last, follow=follow)


@cli.command()
def runs(
    config: Config = DEFAULT,
    *,
    source: Annotated[
        list[str] | None, typer.Option(help="Only of this source; repeatable.")
    ] = None,
    state: Annotated[
        list[State] | None, typer.Option(help="Only in this state; repeatable.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="The finished runs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what is known now: the active runs, with --all the finished too."""
    _, loaded = _load(config)
    found = _loop(_runs(loaded, source or []))
    table = Table("source", "job", "run", "attempt", "state", "since", box=None)
    pretty = sys.stdout.isatty() and not as_json
    for name, condition, run in found:
        if (run.state not in state) if state else (not everything and run.state in TERMINAL):
            continue
        if pretty:
            colour = COLOURS[run.state]
            since = events.rfc3339(run.last_ms or run.changed_ms)
            job = run.job.name or run.job.id
            table.add_row(
                name,
                escape(job),
                escape(run.run_id),
                str(run.attempt),
                f"[{colour}]{run.state}",
                since,
            )
        else:
            _print_json(_run_facts(name, condition, run))
    if pretty:
        out.print(table if table.row_count else "no such runs")


def _run_facts(source: str, condition: Condition | None, run: Known) -> dict[str, object]:
    def instant(ms: Ms | None) -> str | None:
        return None if ms is None else events.rfc3339(ms)

    return {
        "source": source,
        "job": {
            "id": run.job.id,
            "name": run.job.name,
            "group": run.job.group,
            "owner": run.job.owner,
        },
        "run": {
            "id": run.run_id,
            "attempt": run.attempt,
            "queued_at": instant(run.queued_ms),
            "started_at": instant(run.started_ms),
            "ended_at": instant(run.ended_ms),
        },
        "state": run.state,
        "substate": run.substate,
        "vendor_state": run.vendor_state,
        "since": instant(run.last_ms or run.changed_ms),
        "source_up": condition.up if condition else None,
    }


async def _runs(loaded: Settings, sources: list[str]) -> list[tuple[str, Condition | None, Known]]:
    async with read_journal(loaded.poller.journal) as journal:
        found = []
        for name in await journal.sources():
            if not sources or name in sources:
                condition = await journal.condition(name)
                found += [(name, condition, run) for run in await journal.runs(name)]
    return found


@cli.command()
def replay(
    config: Config = DEFAULT,
    *,
    sink: Annotated[SinkName, typer.Option(help="Where to.")],
    since: Annotated[
        str | None, typer.Option(help="Events since then: 10m, 2h, or an RFC 3339 time.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Only of this source.")] = None,
    from_seq: Annotated[
        int | None, typer.Option(help="From this sequence of --source on.", min=1)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Send events of the journal to a sink again, with the same ids.

    Into a Redis stream this appends copies, so it asks first.
    """
    _, loaded = _load(config)
    if (since is None) == (from_seq is None):
        _usage("replay: give --since T, or --source S --from-seq N")
    if from_seq is not None and source is None:
        _usage("replay: --from-seq counts within one source: name it with --source")
    if sink is SinkName.REDIS and not yes:
        if not sys.stdin.isatty():
            _usage("replay: copies would be appended to the Redis streams; confirm with --yes")
        typer.confirm("Append copies of these events to the Redis streams?", abort=True)
    since_ms = _instant(since) if since else None
    count = _loop(_replay(loaded, sink, since_ms, source, from_seq))
    err.print(f"{count} events sent to {sink}")


async def _replay(
    loaded: Settings, name: SinkName, since_ms: Ms | None, source: str | None, from_seq: int | None
) -> int:
    count = 0
    async with read_journal(loaded.poller.journal) as journal:
        found = [
            sink for sink in app.sinks(loaded, journal.uuid, visitor=True) if sink.name == name
        ]
        if not found:
            raise PollerError(f"the settings have no [{name}] table")
        if since_ms is not None:
            offset: int | None = await journal.offset_at(since_ms)
        else:
            first = await journal.offset_of(source or "", from_seq or 1)
            offset = None if first is None else first - 1
        if offset is None:
            return 0
        sink = found[0]
        async with sink.connect() as connection:
            while batch := await journal.read(offset, 500, source=source):
                if isinstance(sink, MqttSink):
                    await connection.send(batch)
                else:
                    await connection.append_again(batch)  # type: ignore[attr-defined]  # Redis has it
                offset = batch[-1].offset
                count += len(batch)
    return count


@cli.command()
def simulate(
    vendor: Annotated[str, typer.Argument(help="datameer, scale, kylin, cdm or dataarts.")],
    port: Annotated[
        int, typer.Option(help="On 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same jobs.")] = 1,
    jobs: Annotated[int, typer.Option(help="How many jobs there are.", min=1)] = 5,
    pace: Annotated[
        float, typer.Option(help="10 makes everything ten times slower.", min=0.001)
    ] = 1.0,
    faults: Annotated[
        str, typer.Option(help="What goes wrong, with its probability: 503=0.1,torn=0.05.")
    ] = "",
    config: Config = DEFAULT,
) -> None:
    """Serve one vendor's API on loopback, with living fake jobs, until Ctrl-C.

    Faults: 500, 503, 429, 401, html, torn, empty, hang, drop.
    """
    _loop(_simulate(_vendor(vendor), port, seed, jobs, pace, faults))


async def _simulate(
    vendor: Vendor, port: int, seed: int, jobs: int, pace: float, faults: str
) -> None:
    world = World(kinds=vendor.kinds, seed=seed, jobs=jobs, now_ms=app.now_ms(), pace=pace)
    served = sim.serve(
        vendor, world, port=port, faults=sim.parse_faults(faults), seed=seed, now_ms=app.now_ms
    )
    async with served as url:
        print(url, flush=True)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()


@cli.command()
def schema(
    what: Annotated[SchemaName, typer.Argument(help="event or settings.")],
    config: Config = DEFAULT,
) -> None:
    """Print a JSON Schema (draft 2020-12)."""
    document = (
        events.schema() if what is SchemaName.EVENT else settings.schema(_options(_all_vendors()))
    )
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 settings or usage wrong."""
    try:
        cli()
    except SettingsError as error:
        for problem in error.problems:
            err.print(problem, markup=False)
        sys.exit(2)
    except (PollerError, SinkUnavailable) as error:
        err.print(str(error), markup=False)
        sys.exit(1)
    except BrokenPipeError:
        # Whoever read us has gone; Python must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
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


def _all_vendors() -> dict[str, Vendor]:
    return {name: load(name) for name in names()}


def _options(vendors: Mapping[str, Vendor]) -> dict[str, type[Options]]:
    return {name: vendor.options for name, vendor in vendors.items()}


def _vendor(name: str) -> Vendor:
    if name not in names():
        _usage(f"simulate: {name!r} is none of {', '.join(names())}")
    return load(name)


def _load(config: Path) -> tuple[dict[str, Vendor], Settings]:
    vendors = _all_vendors()
    return vendors, _load_for(vendors, config)


def _load_for(vendors: Mapping[str, Vendor], config: Path) -> Settings:
    return settings.load(config, _options(vendors), os.environ)


def _usage(sentence: str) -> NoReturn:
    err.print(sentence, markup=False)
    sys.exit(2)


def _wanted(sources: list[str], kind: str | None) -> Callable[[events.Event], bool]:
    """Which events are asked for; a type may be short, and have wildcards."""

    def wanted(event: events.Event) -> bool:
        if sources and event.data.source not in sources:
            return False
        short = event.type.removeprefix("dev.poller.")
        spellings = (event.type, short, short.removeprefix("job."))
        return kind is None or any(fnmatchcase(spelling, kind) for spelling in spellings)

    return wanted


def _instant(text: str) -> Ms:
    """A time given as a span back from now, or as RFC 3339."""
    span = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text.strip())
    if span:
        unit = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[span[2]]
        return time.time_ns() // 1_000_000 - int(float(span[1]) * unit)
    try:
        instant = datetime.datetime.fromisoformat(text)
    except ValueError:
        _usage(f"--since: {text!r} is neither a span like 10m or 2h nor an RFC 3339 time")
    if instant.tzinfo is None:
        instant = instant.astimezone()
    return int(instant.timestamp() * 1000)


def _print_json(value: object) -> None:
    sys.stdout.buffer.write(orjson.dumps(value) + b"\n")
