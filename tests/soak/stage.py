"""What is put under strain: five vendors, two brokers, the daemon, and proxies between them all."""

from __future__ import annotations

import asyncio
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import aiomqtt

from poller import brokers, sim, vendors
from poller.brokers import Broker
from poller.errors import JournalError, PollerError
from poller.journal import read_journal
from poller.runs import Ms
from poller.world import Definition, SimRun, World
from tests.daemon import Daemon, now_ms, settings, until
from tests.soak.launch import SIZE, write_offset
from tests.soak.mangle import Mangle
from tests.soak.proxy import Proxy

_DEFAULTS = """\
timeout = "1s"
retry_refused = "1s"
vanish_after = 40
resync = "2s"
"""
_KEEP_MS = 120_000

# CDM tells of a job's ten newest runs only: they must not come faster than outages last.
_PACES = {"cdm": 1.0}
_PACE = 0.25


@dataclass(slots=True, kw_only=True)
class Remembering(World):
    """A world that keeps all runs that ever were in `ever`."""

    ever: dict[int, SimRun] = field(default_factory=dict)

    def start(self, definition: Definition) -> SimRun:
        """Start a run of this definition now."""
        run = World.start(self, definition)
        self.ever[run.number] = run
        return run


@dataclass(slots=True, kw_only=True)
class Site:
    """One vendor's simulated API, and what goes wrong with its answers.

    Attributes:
        faults: share of the answers that each fault of `poller.sim` spoils, changed at will.
    """

    name: str
    world: Remembering
    mangle: Mangle
    proxy: Proxy
    faults: dict[str, float] = field(default_factory=dict)


class Subscriber:
    """An MQTT subscriber that comes back whenever its broker does.

    Attributes:
        received: topic and payload of all that came, in order.
        listens: set while it is subscribed.
    """

    def __init__(self, broker: Broker, topic: str) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.listens = asyncio.Event()
        self._broker = broker
        self._topic = topic

    async def run(self) -> None:
        """Listen for ever."""
        while True:
            with suppress(aiomqtt.MqttError):
                async with aiomqtt.Client("127.0.0.1", self._broker.port, timeout=2) as client:
                    await client.subscribe(self._topic, qos=0)  # see _mqtt
                    self.listens.set()
                    async for message in client.messages:
                        self.received.append((str(message.topic), bytes(message.payload)))
            self.listens.clear()
            await asyncio.sleep(0.02)


class Stage:
    """All of it, running.

    Attributes:
        deaths: what the daemon said when it ended although nobody ended it.
        lives: how often it was started.
        contact_ms: when first contact with all vendors was over.
    """

    def __init__(self, folder: Path, seed: int, planted: str) -> None:
        self.sites: dict[str, Site] = {}
        self.deaths: list[str] = []
        self.lives = 0
        self.contact_ms: Ms = 0
        self.journal = folder / "journal.db"
        self.redis = brokers.redis_server(folder / "redis", appendonly=True)
        self.mqtt = _mqtt(folder / "mqtt")
        self.proxies: dict[str, Proxy] = {}
        self.subscriber = Subscriber(self.mqtt, "jobs/#")
        self._folder = folder
        self._seed = seed
        self._planted = planted
        self._clock = folder / "clock"
        self._config = folder / "settings.toml"
        self._stopped_ms: Ms | None = None
        self._daemon: Daemon | None = None
        self._guard: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Start everything, and wait until first contact with every vendor is over."""
        self._clock.write_bytes(bytes(SIZE))
        async with AsyncExitStack() as stack:
            for broker, name in ((self.redis, "redis"), (self.mqtt, "mqtt")):
                (self._folder / name).mkdir()
                await stack.enter_async_context(brokers.running(broker))
                proxy = Proxy(name, broker.port)
                self.proxies[name] = await stack.enter_async_context(proxy.serve())
            for name in vendors.BUILT_IN:
                await self._open_site(stack, name)
            listening = asyncio.create_task(self.subscriber.run())
            stack.callback(listening.cancel)
            await self.subscriber.listens.wait()
            self._write_settings()
            stack.push_async_callback(self.end, signal.SIGKILL)
            await self.start()
            await until(self._met, "first contact with all vendors", 60)
            self.contact_ms = now_ms()
            yield

    async def _open_site(self, stack: AsyncExitStack, name: str) -> None:
        vendor = vendors.load(name)
        mangle = Mangle(vendor, Random(self._seed))
        world = Remembering(
            kinds=vendor.kinds,
            seed=self._seed,
            jobs=4,
            now_ms=now_ms(),
            pace=_PACES.get(name, _PACE),
            keep_ms=_KEEP_MS,
        )
        faults: dict[str, float] = {}
        mangled = replace(vendor, render=mangle.render)
        served = sim.serve(mangled, world, now_ms=self._now_ms, faults=faults, seed=self._seed)
        url = await stack.enter_async_context(served)
        proxy = Proxy(name, int(url.rpartition(":")[2]))
        await stack.enter_async_context(proxy.serve())
        self.proxies[name] = proxy
        self.sites[name] = Site(name=name, world=world, mangle=mangle, proxy=proxy, faults=faults)

    def _now_ms(self) -> Ms:
        return now_ms() if self._stopped_ms is None else self._stopped_ms

    def _write_settings(self) -> None:
        urls = {n: (n, f"http://127.0.0.1:{site.proxy.port}") for n, site in self.sites.items()}
        settings(
            self._folder,
            urls,
            redis=f"redis://127.0.0.1:{self.proxies['redis'].port}/0",
            mqtt=f"mqtt://127.0.0.1:{self.proxies['mqtt'].port}",
            protocol="3.1.1" if self.mqtt.name == "amqtt" else "auto",
            defaults=_DEFAULTS,
        )

    async def _met(self) -> bool:
        with suppress(JournalError):  # it is being made
            async with read_journal(self.journal) as journal:
                conditions = [await journal.condition(name) for name in self.sites]
            return all(condition and condition.contact_done for condition in conditions)
        return False

    async def start(self) -> None:
        """Start the daemon, and keep it alive from now on, as a supervisor would."""
        async with self._changing:
            if self._daemon is None:
                await self._spawn()

    async def stop(self) -> int | None:
        """End the daemon as an operator does, once it has come up; gives its exit code."""
        if self._daemon is not None:
            await self._daemon.said("poller.started")
        return await self.end(signal.SIGTERM)

    async def end(self, number: signal.Signals) -> int | None:
        """End the daemon; gives its exit code, None if it does not run."""
        async with self._changing:
            if self._daemon is None:
                return None
            daemon, self._daemon = self._daemon, None
            return await daemon.end(number)

    async def _spawn(self) -> None:
        self.lives += 1
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.soak.launch",
            str(self._clock),
            self._planted,
            "run",
            "-c",
            str(self._config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        self._daemon = Daemon(process)
        self._guard = asyncio.create_task(self._keep(self._daemon))

    async def _keep(self, daemon: Daemon) -> None:
        code = await daemon.process.wait()
        with (self._folder / "daemon.log").open("a", encoding="utf-8") as log:
            log.write(daemon.text)
        async with self._changing:
            if self._daemon is daemon:  # nobody ended it
                # It cannot start on a full disk, and says so; once started, it waits for room.
                if "poller.started" in daemon.text or "no room" not in daemon.text:
                    self.deaths.append(f"exit {code}: {daemon.text[-2000:]}")
                await self._spawn()

    def freeze(self) -> None:
        """Stop the daemon where it is."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._daemon is not None:
            with suppress(ProcessLookupError):
                self._daemon.process.send_signal(number)

    def fill_disk(self, *, full: bool) -> None:
        """Let the daemon's files grow no more, or grow again."""
        if self._daemon is not None:
            limit = 1 if full else resource.RLIM_INFINITY
            with suppress(ProcessLookupError):
                resource.prlimit(  # type: ignore[attr-defined,unused-ignore]  # Linux only
                    self._daemon.process.pid,
                    resource.RLIMIT_FSIZE,
                    (limit, resource.RLIM_INFINITY),
                )

    def step_clock(self, offset_ms: Ms) -> None:
        """Let the daemon's clock be wrong by this."""
        write_offset(self._clock, offset_ms)

    async def crash_broker(self, name: str, for_s: float) -> None:
        """Kill a broker, and start it again; its subscriber is back before the daemon is."""
        broker, proxy = (self.redis if name == "redis" else self.mqtt), self.proxies[name]
        proxy.is_open = False
        if name == "mqtt":
            self.subscriber.listens.clear()
        await asyncio.to_thread(broker.kill)
        await asyncio.sleep(for_s)
        await asyncio.to_thread(broker.start)
        if name == "mqtt":
            await self.subscriber.listens.wait()
        proxy.is_open = True

    def heal(self) -> None:
        """Let nothing go wrong any more, and nothing happen any more."""
        self._stopped_ms = now_ms()
        self.step_clock(0)
        self.fill_disk(full=False)
        self.thaw()
        for proxy in self.proxies.values():
            proxy.heal()
        for site in self.sites.values():
            site.faults.clear()
            site.mangle.kind = ""


def _mqtt(folder: Path) -> Broker:
    """A broker that passes on at once what it acknowledges: what it queues dies with it.

    It is subscribed to with QoS 0: to acknowledge to a broker that has died ends the connection
    before all was read that it had sent.
    """
    try:
        brokers.mosquitto_program()
    except PollerError:
        return brokers.amqtt(folder)
    return brokers.mosquitto(folder, config=("allow_anonymous true", "max_inflight_messages 0"))
