"""`tail`, `runs` and `replay`: what was published and what is known."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated

import orjson
import typer
from rich.markup import escape
from rich.table import Table

from poller import app, events, tails
from poller.cli.common import (
    COLOURS,
    DEFAULT,
    AsJson,
    Config,
    err,
    instant,
    load_settings,
    loop,
    out,
    print_json,
    usage,
)
from poller.demo import line
from poller.errors import PollerError
from poller.journal import read_journal
from poller.known import Condition, Known
from poller.runs import Ms, State
from poller.settings import Settings
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink
from poller.terminal import plain


class SinkName(StrEnum):
    """A sink to replay to."""

    REDIS = "redis"
    MQTT = "mqtt"


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
    _, loaded = load_settings(config)
    since_ms = instant(since) if since else None
    pretty = sys.stdout.isatty() and not as_json
    wanted = _wanted(source or [], kind)
    loop(_tail(loaded, source or [], since_ms, lines, wanted, follow=follow, pretty=pretty))


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
    # Set by a signal instead of cancelling, which a Redis client may swallow.
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    until = stop if follow else None
    async with _events(loaded, sources, since_ms, last, until=until) as stream:
        async for body, event in stream:
            if wanted(event):
                if pretty:
                    out.print(line(event, COLOURS))
                else:
                    print_json(body)


@asynccontextmanager
async def _events(
    loaded: Settings,
    sources: list[str],
    since_ms: Ms | None,
    last: int,
    *,
    until: asyncio.Event | None,
) -> AsyncIterator[AsyncIterator[tuple[bytes, events.Event]]]:
    for sink in app.sinks(loaded, "tail", visitor=True):
        if isinstance(sink, RedisSink):
            yield tails.from_redis(sink, sources, since_ms=since_ms, last=last, until=until)
            return
    async with read_journal(loaded.poller.journal) as journal:
        yield tails.from_journal(journal, since_ms=since_ms, last=last, until=until)


def _wanted(sources: list[str], kind: str | None) -> Callable[[events.Event], bool]:
    """Which events are asked for; a type may be short, and have wildcards."""

    def wanted(event: events.Event) -> bool:
        if sources and event.data.source not in sources:
            return False
        short = event.type.removeprefix("dev.poller.")
        spellings = (event.type, short, short.removeprefix("job."))
        return kind is None or any(fnmatchcase(spelling, kind) for spelling in spellings)

    return wanted


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
    _, loaded = load_settings(config)
    found = loop(_runs(loaded, source or []))
    table = Table("source", "job", "run", "attempt", "state", "since", box=None)
    pretty = sys.stdout.isatty() and not as_json
    for name, condition, run in found:
        if (run.state not in state) if state else (not (everything or run.watched)):
            continue
        if pretty:
            colour = COLOURS[run.state]
            since = events.rfc3339(run.since_ms)
            job = run.job.name or run.job.id
            table.add_row(
                name,
                escape(plain(job)),
                escape(plain(run.run_id)),
                str(run.attempt),
                f"[{colour}]{run.state}",
                since,
            )
        else:
            print_json(orjson.dumps(_run_facts(name, condition, run)))
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
        "since": instant(run.since_ms),
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
    _, loaded = load_settings(config)
    if (since is None) == (from_seq is None):
        usage("replay: give --since T, or --source S --from-seq N")
    if from_seq is not None and source is None:
        usage("replay: --from-seq counts within one source: name it with --source")
    if sink is SinkName.REDIS and not yes:
        if not sys.stdin.isatty():
            usage("replay: copies would be appended to the Redis streams; confirm with --yes")
        typer.confirm("Append copies of these events to the Redis streams?", abort=True)
    since_ms = instant(since) if since else None
    count = loop(_replay(loaded, sink, since_ms, source, from_seq))
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
                    sent = await connection.send(batch)
                else:
                    sent = await connection.append_again(batch)  # type: ignore[attr-defined]  # Redis has it
                offset = batch[sent - 1].offset
                count += sent
    return count
