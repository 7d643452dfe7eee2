"""Subscribers in a process of their own, cheap enough not to be what is measured.

It tells, a line each, when the last of so many events came, by the clock all processes share; and,
if asked, how long after their observation the events came, in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

from redis import Redis

from bench.measure import on_servers_cores

_OBSERVED = re.compile(rb'"observed_at":"([^"]+)"')
_CONNECT = bytes([0x10, 15]) + b"\x00\x04MQTT\x04\x02\x00\x00\x00\x03sub"


class Subscriber:
    """What reads events, and tells how it went."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def got(self, events: int) -> float:
        """Wait for so many since the last call; gives when the last of them came, monotonic."""
        return float(await self._ask(f"got {events}"))

    async def delays_ms(self) -> list[float]:
        """How late each event came since the beginning."""
        delays: list[float] = json.loads(await self._ask("delays"))
        return delays

    async def _ask(self, question: str) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question.encode() + b"\n")
        self._process.stdin.flush()
        return await asyncio.to_thread(self._process.stdout.readline)


@contextmanager
def subscriber(broker: str, port: int) -> Iterator[Subscriber]:
    """Start one at `mqtt` or `redis`; it has subscribed when this is entered."""
    with on_servers_cores():
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.subscribing", broker, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield Subscriber(process)
    finally:
        process.kill()
        process.wait()


def _mqtt(port: int) -> Iterator[list[bytes]]:
    """Payloads of all events, at most once each: MQTT 3.1.1, QoS 0, parsed by hand."""
    topic = b"jobs/+/+/events/#"
    subscribe = bytes([0x82, len(topic) + 5, 0, 1, 0, len(topic)]) + topic + b"\x00"
    with socket.create_connection(("127.0.0.1", port)) as link:
        link.sendall(_CONNECT + subscribe)
        rest = b""
        while data := link.recv(1 << 18):
            payloads, rest = _packets(rest + data)
            yield payloads


def _packets(data: bytes) -> tuple[list[bytes], bytes]:
    """The payloads of the publish packets that are whole, and what remains."""
    payloads: list[bytes] = []
    at = 0
    while True:
        length, shift, head = 0, 0, at + 1
        while head < len(data):
            byte = data[head]
            length |= (byte & 0x7F) << shift
            shift, head = shift + 7, head + 1
            if byte < 0x80:
                break
        else:
            return payloads, data[at:]
        if head + length > len(data):
            return payloads, data[at:]
        if data[at] >> 4 == 3:
            topic = int.from_bytes(data[head : head + 2])
            payloads.append(data[head + 2 + topic : head + length])
        at = head + length


def _redis(port: int) -> Iterator[list[bytes]]:
    """Events of all streams of the sources `source-0` … `source-9`."""
    with Redis(port=port) as client:
        ids = {f"poller:{{source-{number}}}:events": "0" for number in range(10)}
        yield []
        while True:
            found = client.xread(ids, block=5000)
            for key, entries in found:
                ids[key.decode()] = entries[-1][0]
                yield [fields[b"event"] for _, fields in entries]


def _delay_ms(body: bytes, now_s: float) -> float:
    found = _OBSERVED.search(body)
    assert found is not None
    observed = datetime.fromisoformat(found[1].decode())
    return (now_s - observed.timestamp()) * 1000


def _main() -> None:
    read = {"mqtt": _mqtt, "redis": _redis}[sys.argv[1]](int(sys.argv[2]))
    state = _State()
    next(read)
    print("ready", flush=True)
    threading.Thread(target=state.answer, daemon=True).start()
    with suppress(BrokenPipeError):
        for bodies in read:
            state.take(bodies)


class _State:
    def __init__(self) -> None:
        self.bodies: list[tuple[float, bytes]] = []
        self.told = 0
        self.arrived_s = 0.0

    def take(self, bodies: list[bytes]) -> None:
        now_s = time.time()
        self.bodies += [(now_s, body) for body in bodies]
        self.arrived_s = time.monotonic()

    def answer(self) -> None:
        for line in sys.stdin:
            question, _, count = line.partition(" ")
            if question == "got":
                self.told += int(count)
                while len(self.bodies) < self.told:
                    time.sleep(0.002)
                print(self.arrived_s, flush=True)
            else:
                print(json.dumps([_delay_ms(body, at) for at, body in self.bodies]), flush=True)


if __name__ == "__main__":
    _main()
