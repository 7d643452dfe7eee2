"""The composition root: opens what the settings name, runs the loops, and ends them in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random, SystemRandom

from typing import Any
import structlog

from poller import __version__, fetch, web
from poller.errors import JournalError
from poller.events import rfc3339
from poller.journal import Journal, open_journal
from poller.ledger import Ledger, open_ledger
from poller.notify import notify, watchdog_s
from poller.poll import Plan, Watch
from poller.relay import Relay
from poller.runs import Ms
from poller.schedule import Pace
from poller.settings import Settings, Source, restart_needed
from poller.sinks import Sink
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink
from poller.telemetry import Metrics
from poller.wire import Options, Vendor

log = structlog.get_logger()

_GRACE_S = 10.0
"""How late a sign of life may be before a loop counts as stuck."""
_SILENT_S = 4.5
_MAINTENANCE_S = 60.0
_TICK_S = 0.5


def now_ms() -> Ms:
    """The wall clock."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Signals:
    """How the outside speaks to the daemon.

    Attributes:
        stop: set it to end: polls stop, relays drain.
        reload: put settings here to change the sources.
        started: set once everything has been started; `url` is where HTTP is served, if it is.
    """
        hurry: set it to drain no longer.

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Queue[Settings] = field(default_factory=asyncio.Queue)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    url: str | None = None
    hurry: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Running:
    """A source being polled."""

    settings: Source
    task: asyncio.Task[None]
    ledger: Ledger | None = None
    watch: Watch | None = None


class Daemon:
    """Everything that runs, and how it is."""

    def __init__(
        self, settings: Settings, vendors: Mapping[str, Vendor], journal: Journal, random: Random
    ) -> None:
        self.metrics = Metrics()
        self._settings = settings
        self._vendors = vendors
        self._journal = journal
        self._random = random
        self._running: dict[str, Running] = {}
        self._exposed: set[Path] = set()
        self.relays = [
            Relay(sink, journal, self.metrics, now_ms=now_ms, random=random)
            for sink in sinks(settings, journal.uuid)
        ]

    async def run(self, signals: Signals) -> None:
        """Run until told to stop, then end the polls, then drain the relays.

        Raises:
            ExceptionGroup: of what made it end early: a JournalError, or a bug.
        """
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as outer:
            http = self._settings.http
            if http.listen:
                token = http.token.get_secret_value() if http.token else None
                signals.url = await stack.enter_async_context(web.serve(http.listen, token, self))
            others = [
                outer.create_task(relay.run(), name=f"relay[{relay.name}]") for relay in self.relays
            ]
            others.append(outer.create_task(self._maintain(), name="maintenance"))
            others.append(outer.create_task(self._feel(), name="loop lag"))
            await self._poll(signals)
            await self._drain(signals)
            for task in others:
                task.cancel()

    async def _poll(self, signals: Signals) -> None:
        async with asyncio.TaskGroup() as polls:
            reloading = polls.create_task(self._reload(signals, polls), name="reload")
            for source in self._settings.sources.values():
                self._start(source, polls)
            log.info(
                "poller.started",
                version=__version__,
                sources=len(self._running),
                sinks=[relay.name for relay in self.relays],
                http=signals.url,
            )
            self._warn_of_exposed(self._settings)
            signals.started.set()
            notify("READY=1")
            try:
                await signals.stop.wait()
            finally:
                self._journal.hurry()
            notify("STOPPING=1")
            log.info("poller.stopping")
            reloading.cancel()
            for running in self._running.values():
                running.task.cancel()

    async def _drain(self, signals: Signals) -> None:
        """Wait until everything is delivered, for no longer than the settings or a signal allow."""
        drained = asyncio.create_task(self._drained(), name="drain")
        hurried = asyncio.create_task(signals.hurry.wait(), name="hurry")
        waits: list[asyncio.Task[Any]] = [drained, hurried]
        try:
            ended, _ = await asyncio.wait(
                waits,
                timeout=self._settings.poller.drain_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for wait in waits:
                wait.cancel()
        if drained in ended:
            drained.result()
            log.info("poller.drained")
        else:
            lags = {relay.name: (await relay.lag())[0] for relay in self.relays}
            log.warning("poller.not_drained", undelivered=lags)

    async def _drained(self) -> None:
        await self._journal.settled()  # what a poll was writing when it was ended
        for relay in self.relays:
            await relay.drained()

    def _start(self, source: Source, polls: asyncio.TaskGroup) -> None:
        task = polls.create_task(self._watch(source), name=f"poll[{source.name}]")
        self._running[source.name] = Running(source, task)

    async def _watch(self, source: Source) -> None:
        """Poll one source for as long as the task lives."""
        vendor = self._vendors[source.vendor]
        ledger = await open_ledger(
            self._journal,
            self.metrics,
            source=source.name,
            vendor=vendor.name,
            first_contact=source.first_contact,
            down_after=source.down_after,
            retention_s=self._settings.poller.retention_s,
            now_ms=now_ms(),
        )
        requests = self.metrics.requests
        async with fetch.connect(
            endpoint(source),
            counted=lambda code: requests.labels(source.name, code).inc(),
            now_ms=now_ms,
        ) as ask:
            watch = Watch(
                plan(source, vendor),
                ledger,
                ask,
                self.metrics,
                now_ms=now_ms,
                random=self._random,
            )
            running = self._running[source.name]
            running.ledger, running.watch = ledger, watch
            await watch.run()

    async def _reload(self, signals: Signals, polls: asyncio.TaskGroup) -> None:
        """Change the sources to those of new settings; the others go on, unless refused."""
        while True:
            settings = await signals.reload.get()
            self._warn_of_exposed(settings)
            if keys := restart_needed(self._settings, settings):
                log.warning("settings.restart_needed", keys=keys)
            changed = [
                name
                for name, running in self._running.items()
                if settings.sources.get(name) != running.settings
            ]
            await self._stop(changed)
            for running in self._running.values():
                if running.watch is not None:
                    running.watch.retry_refused()
            for name, source in settings.sources.items():
                if name not in self._running:
                    self._start(source, polls)
            for name in set(changed) - set(settings.sources):
                self.metrics.forget(name)
            log.info("poller.reloaded", sources=len(self._running), changed=changed)

    def _warn_of_exposed(self, settings: Settings) -> None:
        for file in settings.exposed:
            if file not in self._exposed:
                log.warning("secret.exposed", file=str(file), advice=f"chmod 600 {file}")
        self._exposed.update(settings.exposed)

    async def _stop(self, names: Sequence[str]) -> None:
        """Stop polling these sources; returns once their loops have ended."""
        tasks = [self._running[name].task for name in names]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for name in names:
            del self._running[name]

    async def troubles(self) -> list[str]:
        """Why the daemon is not ready, a sentence each; empty if it is."""
        blocked = self._blocked()
        troubles = [] if blocked is None else [f"journal: {blocked}"]
        now_s = asyncio.get_running_loop().time()
        for relay in self.relays:
            trouble = relay.trouble
            if trouble is None and blocked is None and now_s - relay.alive_s > _SILENT_S:
                trouble = f"no answer for {now_s - relay.alive_s:.0f} s"
            if trouble is not None:
                count, age_s = await relay.lag()
                troubles.append(f"{relay.name}: {trouble} ({count} events wait, {age_s:.0f} s)")
        return troubles + self._stuck()

    async def refresh_metrics(self) -> None:
        """Count what is only counted when somebody looks."""
        for running in self._running.values():
            if running.ledger is not None:
                running.ledger.count_states()
        for relay in self.relays:
            lags = await relay.lag_by_source()
            for source in self._running:
                events, age_s = lags.get(source, (0, 0.0))
                self.metrics.relay_lag_events.labels(relay.name, source).set(events)
                self.metrics.relay_lag_seconds.labels(relay.name, source).set(age_s)

    async def _maintain(self) -> None:
        """Prune delivered events past retention, a few at a time."""
        pruned = 0
        while True:
            await asyncio.sleep(0.05 if pruned else _MAINTENANCE_S)
            before_ms = now_ms() - int(self._settings.poller.retention_s * 1000)
            cursors = [await self._journal.cursor(relay.name) for relay in self.relays]
            delivered = min(cursors, default=self._journal.last_offset)
            pruned = await self._journal.prune(before_ms, delivered)

    async def _feel(self) -> None:
        """Measure how late the event loop wakes; feed the watchdog while every loop goes on."""
        loop = asyncio.get_running_loop()
        tick_s = min(_TICK_S, (watchdog_s() or 60.0) / 3)
        while True:
            due_s = loop.time() + tick_s
            await asyncio.sleep(tick_s)
            self.metrics.loop_lag.observe(max(0.0, loop.time() - due_s))
            if watchdog_s() and not self._stuck():
                notify("WATCHDOG=1")

    def _blocked(self) -> str | None:
        """Why the journal does not write at present, which makes every loop wait for it."""
        try:
            self._journal.check()
        except JournalError as error:
            return str(error)
        return None

    def _stuck(self) -> list[str]:
        """Sources whose loop gives no sign of life, a sentence each; not if the journal tells why.

        To be restarted by a watchdog would help nobody then.
        """
        if self._blocked() is not None:
            return []
        now_s = asyncio.get_running_loop().time()
        return [
            f"source {name}: the loop is stuck, {now_s - running.watch.due_s:.0f} s overdue"
            for name, running in self._running.items()
            if running.watch is not None and now_s > running.watch.due_s + _GRACE_S
        ]


async def run(settings: Settings, vendors: Mapping[str, Vendor], signals: Signals) -> None:
    """The daemon, from opening the journal to the last delivery.

    Raises:
        JournalError: the journal cannot be opened.
        ExceptionGroup: of what made it end early.
    """
    async with open_journal(settings.poller.journal) as journal:
        daemon = Daemon(settings, vendors, journal, SystemRandom())
        await daemon.run(signals)


def sinks(settings: Settings, journal: str, *, visitor: bool = False) -> Sequence[Sink]:
    """The sinks that the settings name; a visitor's leave no trace of their own there."""
    found: list[Sink] = []
    redis, mqtt = settings.redis, settings.mqtt
    if redis is not None:
        found.append(
            RedisSink(
                redis.url.get_secret_value(),
                journal=journal,
                retention_s=redis.retention_s,
                max_events=redis.max_events,
                verify_tls=redis.verify_tls,
                identity=redis.identity,
                username=redis.username,
                password=redis.password.get_secret_value() if redis.password else None,
            )
        )
    if mqtt is not None:
        found.append(
            MqttSink(
                mqtt.url,
                instance=None if visitor else settings.poller.instance,
                version=__version__,
                since=rfc3339(now_ms()),
                topic_prefix=mqtt.topic_prefix,
                username=mqtt.username,
                password=mqtt.password.get_secret_value() if mqtt.password else None,
                state_expiry_s=mqtt.state_expiry_s,
                protocol=mqtt.protocol,
                verify_tls=mqtt.verify_tls,
                identity=mqtt.identity,
            )
        )
    return found


def endpoint(source: Source) -> fetch.Endpoint:
    """Where and how a source is asked."""
    return fetch.Endpoint(
        url=source.url,
        auth=source.auth,
        timeout_s=source.timeout_s,
        max_body=source.max_body,
        concurrency=source.concurrency,
        verify_tls=source.verify_tls,
        identity=source.identity,
        project_id=getattr(source.options, "project_id", None),
    )


def plan(source: Source, vendor: Vendor) -> Plan:
    """What is polled of a source, and how often."""
    options = source.options
    if not isinstance(options, Options):
        raise TypeError(f"{source.name}: options of {vendor.name} are no wire.Options")
    return Plan(
        source=source.name,
        vendor=vendor,
        options=options,
        pace=Pace(
            interval_s=source.interval_s,
            idle_interval_s=source.idle_interval_s,
            retry_refused_s=source.retry_refused_s,
        ),
        concurrency=source.concurrency,
        rate_per_s=source.rate_per_s,
        resync_s=source.resync_s,
        vanish_after=source.vanish_after,
        timeout_s=source.timeout_s,
    )
