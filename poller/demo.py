"""`poller demo`: five simulated vendors, the daemon, its own brokers; what subscribers see."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiomqtt
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from poller import app, brokers, settings, sim, tails, telemetry
from poller.events import Event, JobEvent, decode
from poller.sinks.redis import RedisSink
from poller.terminal import plain
from poller.vendors import BUILT_IN, load
from poller.world import World


@dataclass(slots=True)
class Board:
    """What subscribers have read so far."""

    colours: Mapping[str, str]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    states: dict[str, Counter[str]] = field(default_factory=dict)
    runs: dict[tuple[str, str, str], str] = field(default_factory=dict)
    read_by: dict[str, set[str]] = field(default_factory=dict)

    def read(self, event: Event, broker: str) -> bool:
        """An event was read at a broker; whether both have shown it now."""
        brokers = self.read_by.setdefault(event.id, set())
        if broker in brokers:
            return False
        brokers.add(broker)
        self.counts[event.data.source, broker] += 1
        if len(brokers) == 1:
            self._know(event)
        return len(brokers) == 2

    def _know(self, event: Event) -> None:
        if not isinstance(event, JobEvent):
            return
        data = event.data
        states = self.states.setdefault(data.source, Counter())
        key = (data.source, data.job.id, data.run.id)
        if key in self.runs:
            states[self.runs[key]] -= 1
        self.runs[key] = data.state
        states[data.state] += 1

    def table(self, url: str) -> Group:
        """The live table, below the events that scroll by."""
        table = Table(box=None, header_style="dim")
        for title in ("source", "active", "succeeded", "failed", "canceled", "redis", "mqtt"):
            table.add_column(title, justify="left" if title == "source" else "right")
        for name in BUILT_IN:
            states = self.states.get(name, Counter())
            ended = {state: states[state] for state in ("succeeded", "failed", "canceled")}
            active = sum(states.values()) - sum(ended.values()) - states["unknown"]
            read = [str(self.counts[name, broker]) for broker in ("redis", "mqtt")]
            table.add_row(name, str(active), *map(str, ended.values()), *read)
        return Group(Text(), table, Text(f" board: {url}   Ctrl-C ends", style="dim"))


def line(event: Event, colours: Mapping[str, str]) -> Text:
    """One event on one line, for people."""
    word = event.type.rpartition(".")[2]
    text = Text(f"{event.time[11:19]}  ")
    if isinstance(event, JobEvent):
        data = event.data
        text.append(f"{data.source:10} ", style="bold")
        text.append(f"{word:10}", style=colours[word])
        job, run_id = plain(data.job.name or data.job.id), plain(data.run.id)
        text.append(f" {job[:32]:32} run {run_id[:24]}")
        if data.run.attempt > 1:
            text.append(f"  attempt {data.run.attempt}")
        marks = [name for name in ("snapshot", "inferred") if getattr(data, name)]
        if marks:
            text.append(f"  {' '.join(marks)}", style="dim")
        if data.error:
            why = data.error.message.partition("\n")[0]
            text.append(f"  {plain(why)[:60]}", style="red")
    else:
        text.append(f"{event.data.source:10} ", style="bold")
        text.append(f"{word:10}", style=colours[word])
        text.append(f" {plain(event.data.message or '')}")
    return text


async def run(*, seconds: float | None, seed: int, colours: Mapping[str, str]) -> None:
    """Run the demo until Ctrl-C, or for some seconds; everything that it started ends with it.

    Raises:
        PollerError: no broker can be started here; the message says what to install.
    """
    console = Console(highlight=False, soft_wrap=True)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poller-demo-")))
        redis = await stack.enter_async_context(brokers.running(brokers.redis_server(folder)))
        mqtt = await stack.enter_async_context(brokers.running(brokers.mqtt_broker(folder)))
        urls = {name: await _simulated(stack, name, seed + i) for i, name in enumerate(BUILT_IN)}
        log = stack.enter_context((folder / "poller.log").open("w", encoding="utf-8"))
        telemetry.configure_logs(log)
        config = folder / "settings.toml"
        config.write_text(_settings(redis.url, mqtt, folder, urls), encoding="utf-8")
        board = Board(colours)
        async with _daemon(config) as url:
            _introduce(console, redis, mqtt, url)
            await _show(console, board, redis.url, mqtt.url, url, seconds)
        _conclude(console, board)


async def _simulated(stack: AsyncExitStack, name: str, seed: int) -> str:
    vendor = load(name)
    world = World(kinds=vendor.kinds, seed=seed, jobs=4, now_ms=app.now_ms())
    return await stack.enter_async_context(sim.serve(vendor, world, now_ms=app.now_ms))


def _settings(redis: str, mqtt: brokers.Broker, folder: Path, urls: Mapping[str, str]) -> str:
    """The settings of the demo: what an operator would write, but for the short intervals."""
    protocol = "3.1.1" if mqtt.name == "amqtt" else "auto"  # amqtt leaves MQTT 5 unanswered
    own = {
        "cdm": 'project_id = "demo"\ncluster_id = "demo"',
        "dataarts": 'project_id = "demo"',
        "datameer": 'sweep_interval = "2s"',
    }
    sources = "\n".join(
        f'[sources.{name}]\nvendor = "{name}"\nurl = "{url}"\n{own.get(name, "")}\n'
        for name, url in urls.items()
    )
    return f"""
[poller]
instance = "demo"
journal = "{folder / "journal.db"}"
drain = "2s"
[redis]
url = "{redis}/0"
[mqtt]
url = "{mqtt.url}"
protocol = "{protocol}"
[http]
listen = "127.0.0.1:0"
[defaults]
interval = "500ms"
idle_interval = "500ms"
rate = "100/s"
{sources}"""


@asynccontextmanager
async def _daemon(config: Path) -> AsyncIterator[str]:
    """The daemon itself, in this process, with settings read from a file like any others."""
    vendors = {name: load(name) for name in BUILT_IN}
    options = {name: vendor.options for name, vendor in vendors.items()}
    loaded = settings.load(config, options, {})
    signals = app.Signals()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(app.run(loaded, vendors, signals), name="daemon")
        await signals.started.wait()
        yield signals.url or ""
        signals.stop.set()
        await running


async def _show(
    console: Console, board: Board, redis: str, mqtt: str, url: str, seconds: float | None
) -> None:
    """Print what subscribers read, until it is enough."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    live = Live(console=console, refresh_per_second=4, transient=True)
    async with asyncio.TaskGroup() as group:
        readers = [
            group.create_task(_read_redis(console, board, redis, stop)),
            group.create_task(_read_mqtt(console, board, mqtt)),
        ]
        if console.is_terminal:
            live.start()
            readers.append(group.create_task(_refresh(live, board, url)))
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stop.wait()
        stop.set()
        for reader in readers:
            reader.cancel()
        live.stop()


async def _read_redis(console: Console, board: Board, url: str, stop: asyncio.Event) -> None:
    sink = RedisSink(url, journal="demo")
    async for _, event in tails.from_redis(sink, [], since_ms=0, last=0, until=stop):
        _tell(console, board, event, "redis")


async def _read_mqtt(console: Console, board: Board, url: str) -> None:
    host, _, port = url.removeprefix("mqtt://").partition(":")
    async with aiomqtt.Client(host, int(port)) as client:
        await client.subscribe("jobs/+/+/events/+", qos=1)
        await client.subscribe("jobs/+/status", qos=1)
        async for message in client.messages:
            _tell(console, board, decode(bytes(message.payload)), "mqtt")


def _tell(console: Console, board: Board, event: Event, broker: str) -> None:
    if board.read(event, broker):
        console.print(line(event, board.colours))


async def _refresh(live: Live, board: Board, url: str) -> None:
    while True:
        live.update(board.table(url))
        await asyncio.sleep(0.25)


def _introduce(console: Console, redis: brokers.Broker, mqtt: brokers.Broker, url: str) -> None:
    console.print(f"five simulated vendors are polled every 500 ms (process {os.getpid()})")
    console.print(f"  redis   {redis.url}  ({redis.name})  streams poller:{{<source>}}:events")
    console.print(f"  mqtt    {mqtt.url}  ({mqtt.name})  topics jobs/<source>/<job>/events/<state>")
    console.print(f"  board   {url}")
    console.print(f"  http    {url}/readyz  {url}/metrics  {url}/openapi.json")
    console.print("each event below was read back from both brokers:\n")


def _conclude(console: Console, board: Board) -> None:
    both = sum(len(brokers) == 2 for brokers in board.read_by.values())
    redis, mqtt = (
        sum(board.counts[name, broker] for name in BUILT_IN) for broker in ("redis", "mqtt")
    )
    console.print(f"\n{redis} events read from Redis, {mqtt} from MQTT, {both} from both")
