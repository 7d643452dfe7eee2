"""P6: how late an event is readable, and how long the event loop is held up, at 1,000 a second."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from bench import daemon, pages
from bench.measure import Report, Result, on_servers_cores, percentile
from bench.serving import serving
from bench.subscribing import subscriber
from poller import app
from poller import settings as reading
from poller.brokers import mosquitto, redis_server
from poller.cli.common import all_vendors, options_of

SOURCES = 10
CHANGES = 10
INTERVAL = "100ms"
SECONDS = 12.0
_TICK_S = 0.002
_GOALS: Mapping[str, float] = {"redis": 10.0, "mqtt": 15.0}


async def measure(folder: Path) -> Report:
    """Ten sources, polled every 100 ms, each poll with 10 changes; the whole daemon in here."""
    with ExitStack() as stack:
        with on_servers_cores():
            redis, mqtt = redis_server(folder), mosquitto(folder)
            for broker in (redis, mqtt):
                broker.start()
                stack.callback(broker.stop)
        url = stack.enter_context(serving({"/api/jobs": pages.kylin_turning(100, CHANGES)}))
        sources = (daemon.source(f"source-{n}", "kylin", url) for n in range(SOURCES))
        config = daemon.settings(
            folder, "\n".join(sources), interval=INTERVAL, redis=redis.url, mqtt=mqtt.url
        )
        readers = {
            "redis": stack.enter_context(subscriber("redis", redis.port)),
            "mqtt": stack.enter_context(subscriber("mqtt", mqtt.port)),
        }
        held_up_ms = await _daemon_for(config, SECONDS)
        delays = {name: await reader.delays_ms() for name, reader in readers.items()}
    floor_ms = _fsyncs_ms(folder)
    results = []
    for name, found in delays.items():
        steady = found[len(found) // 5 :]  # what first contact finds comes at once
        p99 = percentile(steady, 0.99)
        where = "readable in Redis" if name == "redis" else "at an MQTT subscriber"
        results.append(
            Result(
                target="P6",
                what=f"detection → {where}, {len(found) / SECONDS:,.0f} events/s: p99",
                figure=p99,
                unit="ms",
                floor=percentile(floor_ms, 0.99),
                goal=f"≤ {_GOALS[name]:g} ms (floor: an fsync)",
                holds=p99 <= _GOALS[name],
            )
        )
        results.append(
            Result(
                target="P6",
                what="the same: median",
                figure=percentile(steady, 0.5),
                unit="ms",
                floor=percentile(floor_ms, 0.5),
            )
        )
    longest = max(held_up_ms)
    results.append(
        Result(
            target="P6",
            what="longest time that the event loop was held up",
            figure=longest,
            unit="ms",
            goal="≤ 20 ms",
            holds=longest <= 20,
        )
    )
    return Report(results=results)


async def _daemon_for(config: Path, seconds: float) -> list[float]:
    """Run the daemon; gives how late this loop woke each time, in ms, after it has settled."""
    vendors = all_vendors()
    loaded = reading.load(config, options_of(vendors), os.environ)
    signals = app.Signals()
    running = asyncio.create_task(app.run(loaded, vendors, signals))
    await signals.started.wait()
    late_ms = []
    began_s = time.monotonic()
    while (now_s := time.monotonic()) < began_s + seconds:
        await asyncio.sleep(_TICK_S)
        if now_s > began_s + seconds / 5:
            late_ms.append((time.monotonic() - now_s - _TICK_S) * 1000)
    signals.stop.set()
    await running
    return late_ms


def _fsyncs_ms(folder: Path) -> list[float]:
    """How long the disk takes for a small durable write: before that nothing may be told."""
    took_ms = []
    with (folder / "fsync").open("wb", buffering=0) as file:
        for _ in range(300):
            began_s = time.monotonic()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            took_ms.append((time.monotonic() - began_s) * 1000)
    return took_ms
