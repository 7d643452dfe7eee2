"""The daemon as a subprocess, simulated vendors in this process, and what subscribers read."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import aiomqtt
from redis.asyncio import Redis

from poller import sim
from poller.vendors import load
from poller.wire import Vendor
from poller.world import World

Event = dict[str, Any]

OWN_KEYS: Mapping[str, str] = {
    "cdm": 'project_id = "p"\ncluster_id = "c"',
    "dataarts": 'project_id = "p"',
    "datameer": 'sweep_interval = "1s"',
}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def until(
    condition: Callable[[], Awaitable[bool] | bool], what: object, within_s: float = 20.0
) -> None:
    """Wait for a condition, looking often; fails with a sentence if it does not come about."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not within {within_s} s: {what}")


def settings(
    folder: Path,
    sources: Mapping[str, tuple[str, str]],
    *,
    redis: str | None = None,
    mqtt: str | None = None,
    protocol: str = "auto",
    defaults: str = "",
    instance: str = "test",
    extra: str = "",
) -> Path:
    """A settings file; `sources` maps names to (vendor, url)."""
    tables = [
        f'[poller]\ninstance = "{instance}"\njournal = "{folder}/journal.db"\ndrain = "5s"',
        f'[redis]\nurl = "{redis}"' if redis else "",
        f'[mqtt]\nurl = "{mqtt}"\nprotocol = "{protocol}"' if mqtt else "",
        '[http]\nlisten = "127.0.0.1:0"',
        f'[defaults]\ninterval = "150ms"\nidle_interval = "150ms"\nrate = "200/s"\n{defaults}',
        *(
            f'[sources.{name}]\nvendor = "{vendor}"\nurl = "{url}"\n{OWN_KEYS.get(vendor, "")}'
            for name, (vendor, url) in sources.items()
        ),
        extra,
    ]
    path = folder / "settings.toml"
    path.write_text("\n\n".join(tables), encoding="utf-8")
    return path


class Daemon:
    """`poller run` as a subprocess; its log lines are kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[Event] = []
        self.text = ""
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.text += line.decode()
            if line.startswith(b"{"):
                self.lines.append(json.loads(line))

    async def said(self, event: str, within_s: float = 20.0) -> Event:
        """The first log line of this event."""
        await until(
            lambda: (
                any(line["event"] == event for line in self.lines)
                or self.process.returncode is not None
            ),
            f"{event} in the log",
            within_s,
        )
        found = [line for line in self.lines if line["event"] == event]
        assert found, self.text
        return found[0]

    async def url(self) -> str:
        """Where it serves HTTP."""
        url: str = (await self.said("poller.started"))["http"]
        return url

    async def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; gives the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), 20)
        await self._reading
        return code


@asynccontextmanager
async def running(
    config: Path,
    env: Mapping[str, str] | None = None,
    *,
    planted: str | None = None,
    hampered: str | None = None,
) -> AsyncIterator[Daemon]:
    """The daemon, started; ended whatever happens.

    With this planted by tests/crashing.py, or hampered by tests/hampered.py.
    """
    launcher = ["poller"]
    if planted is not None:
        launcher = ["tests.crashing", planted]
    elif hampered is not None:
        launcher = ["tests.hampered", hampered]
    daemon = Daemon(await command("run", "-c", str(config), env=env, launcher=launcher))
    try:
        yield daemon
    finally:
        await daemon.end(signal.SIGKILL)


async def command(
    *arguments: str, env: Mapping[str, str] | None = None, launcher: Sequence[str] = ("poller",)
) -> asyncio.subprocess.Process:
    """Start a `poller` command with its output captured."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *launcher,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )


async def output(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a `poller` command to its end: exit code, standard output, standard error."""
    process = await command(*arguments, env=env)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def simulated(
    stack: AsyncExitStack,
    name: str,
    *,
    seed: int = 1,
    jobs: int = 4,
    pace: float = 0.3,
    faults: Mapping[str, float] | None = None,
) -> tuple[Vendor, World, str]:
    """A vendor's simulated API in this process: the vendor, its world, its URL.

    Change `faults` while it runs to let things go wrong.
    """
    vendor = load(name)
    world = World(kinds=vendor.kinds, seed=seed, jobs=jobs, now_ms=now_ms(), pace=pace)
    url = await stack.enter_async_context(sim.serve(vendor, world, now_ms=now_ms, faults=faults))
    return vendor, world, url


async def stream(redis: str, source: str) -> list[Event]:
    """Every event in a source's Redis stream."""
    async with Redis.from_url(redis) as client:
        entries: Any = await client.xrange(f"poller:{{{source}}}:events")
    return [json.loads(fields[b"event"]) for _, fields in entries]


@asynccontextmanager
async def subscribed(mqtt: str, topic: str) -> AsyncIterator[list[tuple[str, Event]]]:
    """What an MQTT subscriber receives, as it comes: topic and payload."""
    host, _, port = mqtt.removeprefix("mqtt://").partition(":")
    received: list[tuple[str, Event]] = []
    async with aiomqtt.Client(host, int(port)) as client:
        await client.subscribe(topic, qos=1)

        async def read() -> None:
            async for message in client.messages:
                event = json.loads(bytes(message.payload))
                received.append((str(message.topic), event))

        reading = asyncio.create_task(read())
        try:
            yield received
        finally:
            reading.cancel()


async def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and body of a GET."""
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as response:
        return response.status, await response.text()
