"""The composition root: opens what the settings name, runs the loops, and ends them in order."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

import structlog

from poller import __version__, fetch, web
from poller.errors import JournalError
from poller.events import rfc3339
from poller.journal import Journal, open_journal
from poller.journal.pages import open_pages
from poller.known import Known
from poller.ledger import Ledger, open_ledger
from poller.liveness import Liveness, Living, Pulse
from poller.notify import notify, watchdog_s
from poller.poll import Plan, Watch
from poller.relay import Relay
from poller.runs import Ms
from poller.schedule import Pace
from poller.settings import Settings, Source, restart_needed
from poller.sinks import Sink
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink
from poller.status import source_status
from poller.telemetry import Metrics
from poller.web import answers
from poller.wire import Options, Vendor

log = structlog.get_logger()

_MAINTENANCE_S = 60.0
_TICK_S = 0.5
_STEP_S = 30.0
"""No step of maintenance or of a reload takes longer."""
_LOOK_S = 2.0
"""Who asks how the daemon is waits no longer for the journal."""
_FRESH_POLLS = 4


def now_ms() -> Ms:
    """The wall clock."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class Signals:
    """How the outside speaks to the daemon.

    Attributes:
        stop: set it to end: polls stop, relays drain.
        hurry: set it to drain no longer.
        reload: put settings here to change the sources.
        started: set once everything has been started; `url` is where HTTP is served, if it is.
    """

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Queue[Settings] = field(default_factory=asyncio.Queue)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    url: str | None = None


@dataclass(slots=True)
class Running:
    """A source being polled."""

    settings: Source
    task: asyncio.Task[None] = field(init=False)
    ledger: Ledger | None = None
    watch: Watch | None = None

    @property
    def due_s(self) -> float:
        """When the next sign of life is due, by the loop's clock."""
        return self.watch.due_s if self.watch is not None else math.inf


class Daemon:
    """Everything that runs, and how it is."""

    def __init__(
        self, settings: Settings, vendors: Mapping[str, Vendor], journal: Journal, random: Random
    ) -> None:
        self.metrics = Metrics()
        self.instance = settings.poller.instance
        self._settings = settings
        self._vendors = vendors
        self._journal = journal
        self._random = random
        self._live = Liveness(self.metrics)
        self._maintenance, self._lag, self._reloading = Pulse(), Pulse(), Pulse()
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
            if self._settings.http.listen:
                signals.url = await self._serve(stack)
            for name, thread in self._journal.threads.items():
                self._live.add(name, thread)
            others = [
                self._spawn(outer, f"relay[{relay.name}]", relay.run, relay)
                for relay in self.relays
            ]
            others.append(self._spawn(outer, "maintenance", self._maintain, self._maintenance))
            others.append(self._spawn(outer, "loop lag", self._feel, self._lag))
            await self._poll(signals)
            await self._drain(signals)
            for task in others:
                task.cancel()

    def _spawn(
        self,
        group: asyncio.TaskGroup,
        name: str,
        loop: Callable[[], Awaitable[None]],
        living: Living,
    ) -> asyncio.Task[None]:
        return group.create_task(self._live.run(name, loop, living), name=name)

    async def _serve(self, stack: AsyncExitStack) -> str:
        """Serve HTTP as long as the stack lasts; gives the URL."""
        http = self._settings.http
        pages = stack.enter_context(open_pages(self._journal.path))
        served = web.serve(
            http.listen,
            http.token.get_secret_value() if http.token else None,
            self,
            journal=self._journal,
            pages=pages,
            now_ms=now_ms,
        )
        return await stack.enter_async_context(served)

    async def _poll(self, signals: Signals) -> None:
        async with asyncio.TaskGroup() as polls:
            reloading = self._spawn(
                polls, "reload", lambda: self._reload(signals, polls), self._reloading
            )
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
        self.metrics.expect(source.name, [relay.name for relay in self.relays])
        running = self._running[source.name] = Running(source)
        running.task = self._spawn(
            polls, f"poll[{source.name}]", lambda: self._watch(running), running
        )

    async def _watch(self, running: Running) -> None:
        """Poll one source for as long as the task lives."""
        source, vendor = running.settings, self._vendors[running.settings.vendor]
        ledger = await open_ledger(
            self._journal,
            self.metrics,
            source=source.name,
            vendor=vendor.name,
            first_contact=source.first_contact,
            down_after=source.down_after,
            retention_s=self._settings.poller.retention_s,
            now_ms=now_ms(),
            forecasts=pace(source) if source.schedule == "forecast" else None,
        )
        by_code = cache(lambda code: self.metrics.requests.labels(source.name, code))

        def counted(code: str) -> None:
            by_code(code).inc()
            if running.watch is not None:
                running.watch.alive()

        async with fetch.connect(endpoint(source), counted=counted, now_ms=now_ms) as ask:
            running.ledger = ledger
            running.watch = Watch(
                plan(source, vendor),
                ledger,
                ask,
                self.metrics,
                now_ms=now_ms,
                random=self._random,
            )
            await running.watch.run()

    async def _reload(self, signals: Signals, polls: asyncio.TaskGroup) -> None:
        """Change the sources to those of new settings; the others go on, unless refused."""
        while True:
            self._reloading.expect(math.inf)
            settings = await signals.reload.get()
            self._reloading.expect(_STEP_S)
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
        retention_s = self._settings.poller.retention_s
        try:
            async with asyncio.timeout(_LOOK_S):
                for relay in self.relays:
                    complaint = await relay.complaint(retention_s, excused=blocked is not None)
                    troubles += [complaint] if complaint else []
        except TimeoutError:
            troubles.append("journal: it does not tell how many events wait")
        stuck = self._live.overdue() if blocked is None else {}
        return troubles + [
            f"{name}: the loop is stuck, {late_s:.0f} s overdue" for name, late_s in stuck.items()
        ]

    async def refresh_metrics(self) -> None:
        """Count what is only counted when somebody looks."""
        for running in self._running.values():
            if running.ledger is not None:
                running.ledger.count_states()
        with suppress(TimeoutError):  # a stuck journal is to be seen in the other metrics
            async with asyncio.timeout(_LOOK_S):
                await self._measure_lags()

    async def _measure_lags(self) -> None:
        for relay in self.relays:
            lags = await relay.lag_by_source()
            for source in self._running:
                events, age_s = lags.get(source, (0, 0.0))
                self.metrics.relay_lag_events.labels(relay.name, source).set(events)
                self.metrics.relay_lag_seconds.labels(relay.name, source).set(age_s)

    def source_status(self) -> list[answers.SourceStatus]:
        """How it stands with every configured source."""
        running = self._running.values()
        return [source_status(one.settings, one.ledger, one.watch) for one in running]

    def sinks(self) -> list[answers.Sink]:
        """Every configured sink."""
        return [answers.Sink(relay.name, relay.trouble, relay.cursor) for relay in self.relays]

    def usual_ms(self, source: str, run: Known) -> Ms | None:
        """How long a run like this usually takes, if that is known."""
        running = self._running.get(source)
        return running.ledger.usual_ms(run) if running and running.ledger else None

    def progress(self, source: str, run: Known) -> float | None:
        """How far a run is, from 0 to 1, if one of the last polls has shown it."""
        running = self._running.get(source)
        if running is None or running.ledger is None:
            return None
        share, shown_ms = running.ledger.progress.get(run.key, (None, 0))
        fresh_ms = int(_FRESH_POLLS * running.settings.interval_s * 1000)
        return share if now_ms() - shown_ms <= fresh_ms else None

    async def _maintain(self) -> None:
        """Prune delivered events past retention, a few at a time; say where that is held up."""
        retention_s = self._settings.poller.retention_s
        while True:
            self._maintenance.expect(_STEP_S)
            before_ms = now_ms() - int(retention_s * 1000)
            cursors = [await self._journal.cursor(relay.name) for relay in self.relays]
            delivered = min(cursors, default=self._journal.last_offset)
            pruned = await self._journal.prune(before_ms, delivered)
            if not pruned:
                for relay in self.relays:
                    await relay.look_back(retention_s)
            wait_s = 0.05 if pruned else _MAINTENANCE_S
            self._maintenance.expect(wait_s)
            await asyncio.sleep(wait_s)

    async def _feel(self) -> None:
        """Measure how late the event loop wakes; feed the watchdog while every loop goes on."""
        loop = asyncio.get_running_loop()
        tick_s = min(_TICK_S, (watchdog_s() or 60.0) / 3)
        while True:
            due_s = loop.time() + tick_s
            self._lag.expect(tick_s)
            await asyncio.sleep(tick_s)
            self.metrics.loop_lag.observe(max(0.0, loop.time() - due_s))
            # Where the journal tells why all wait for it, a restart would help nobody.
            fine = self._blocked() is not None or self._live.look()
            if fine and watchdog_s():
                notify("WATCHDOG=1")

    def _blocked(self) -> str | None:
        """Why the journal does not write at present, which makes every loop wait for it."""
        try:
            self._journal.check()
        except JournalError as error:
            return str(error)
        return None


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


def pace(source: Source) -> Pace:
    """How often a source is polled."""
    return Pace(
        interval_s=source.interval_s,
        idle_interval_s=source.idle_interval_s,
        retry_refused_s=source.retry_refused_s,
        max_interval_s=source.max_interval_s,
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
        pace=pace(source),
        concurrency=source.concurrency,
        rate_per_s=source.rate_per_s,
        resync_s=source.resync_s,
        vanish_after=source.vanish_after,
        timeout_s=source.timeout_s,
    )
