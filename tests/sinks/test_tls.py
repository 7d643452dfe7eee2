"""Brokers that want to see a certificate of ours, and whom we trust."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from poller import brokers
from poller.brokers import Broker
from poller.errors import PollerError, SettingsError, SinkUnavailable
from poller.sinks import Sink
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink
from poller.tls import Identity
from tests import certificates
from tests.daemon import until

PASSPHRASE = "p4ss-phr4se"

Make = Callable[..., Sink]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def folder(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `ca.pem`, and `server.pem` and `server.key`."""
    folder = tmp_path_factory.mktemp("tls")
    certificates.bundle(authority, folder)
    certificates.server_files(authority, folder)
    return folder


def redis_config(folder: Path, port: int) -> list[str]:
    return [
        *("--tls-port", str(port), "--tls-auth-clients", "yes"),
        *("--tls-cert-file", str(folder / "server.pem")),
        *("--tls-key-file", str(folder / "server.key")),
        *("--tls-ca-cert-file", str(folder / "ca.pem")),
    ]


@contextmanager
def running(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


@pytest.fixture(scope="module")
def redis_port(folder: Path) -> Iterator[int]:
    """A Redis that takes TLS with a certificate on this port."""
    port = brokers.free_port()
    try:
        with running(brokers.redis_server(folder, config=redis_config(folder, port))):
            yield port
    except PollerError as error:
        pytest.skip(f"this Redis was built without TLS: {error}")


@pytest.fixture(scope="module")
def mqtt_port(folder: Path) -> Iterator[int]:
    """A mosquitto that takes TLS with a certificate on this port."""
    port = brokers.free_port()
    config = (
        "allow_anonymous true",
        f"listener {port} 127.0.0.1",
        f"certfile {folder}/server.pem",
        f"keyfile {folder}/server.key",
        f"cafile {folder}/ca.pem",
        "require_certificate true",
    )
    try:
        broker = brokers.mosquitto(folder, config=config)
    except PollerError as error:
        pytest.skip(f"amqtt asks for no certificates: {error}")
    with running(broker):
        yield port


@pytest.fixture(params=["redis", "mqtt"])
def make(request: pytest.FixtureRequest, folder: Path) -> Make:
    """Makes a sink for the broker of its kind, which trusts our authority."""
    port = request.getfixturevalue(f"{request.param}_port")

    def make(**options: Any) -> Sink:
        given: dict[str, Any] = {"verify_tls": folder / "ca.pem", "timeout_s": 2.0} | options
        if request.param == "redis":
            return RedisSink(f"rediss://127.0.0.1:{port}", journal="j", **given)
        url = f"mqtts://127.0.0.1:{port}"
        return MqttSink(url, instance=None, version="1", since="", **given)

    return make


async def sent(sink: Sink, event: Any) -> int:
    async with sink.connect() as connection:
        return await connection.send([event])


async def refused(sink: Sink) -> str:
    with pytest.raises(SinkUnavailable) as caught:
        async with sink.connect():
            pass
    return str(caught.value)


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("together", [True, False])
async def test_a_broker_that_wants_our_certificate_is_shown_it(
    *,
    make: Make,
    authority: trustme.CA,
    tmp_path: Path,
    recorded: Any,
    together: bool,
    verified: bool,
) -> None:
    identity = certificates.client(authority, tmp_path, together=together, password=PASSPHRASE)
    options: dict[str, Any] = {"identity": identity} | ({} if verified else {"verify_tls": False})
    assert await sent(make(**options), recorded(1)) == 1


async def test_without_a_certificate_it_is_told_what_to_do(make: Make) -> None:
    assert "client_cert" in await refused(make())


@pytest.mark.parametrize("dates", [{}, certificates.EXPIRED], ids=["unknown", "expired"])
async def test_a_certificate_that_is_refused_is_told(
    make: Make, authority: trustme.CA, tmp_path: Path, dates: dict[str, Any]
) -> None:
    issuer = authority if dates else trustme.CA()
    identity = certificates.client(issuer, tmp_path, **dates)
    assert "client_cert" in await refused(make(identity=identity))


async def test_a_file_that_cannot_be_used_is_a_wrong_setting(
    make: Make, authority: trustme.CA, tmp_path: Path
) -> None:
    identity = certificates.client(authority, tmp_path, password=PASSPHRASE)
    with pytest.raises(SettingsError, match=r"^(redis|mqtt)\.client_key_password: does not open"):
        make(identity=replace(identity, password="wrong"))


async def test_a_bundle_takes_the_place_of_the_system_s_authorities(
    make: Make, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.bundle(authority, tmp_path)))
    identity = certificates.client(authority, tmp_path)
    async with make(identity=identity, verify_tls=True).connect():
        pass
    other = certificates.bundle(trustme.CA(), tmp_path, "other.pem")
    assert "see verify_tls" in await refused(make(identity=identity, verify_tls=other))


@pytest.fixture
def identity(authority: trustme.CA, tmp_path: Path) -> Identity:
    return certificates.client(authority, tmp_path, password=PASSPHRASE)


async def test_a_cluster_is_shown_our_certificate_too(
    folder: Path, identity: Identity, tmp_path: Path, recorded: Any
) -> None:
    port = brokers.free_port()
    bus = ("--cluster-enabled", "yes", "--cluster-port", str(brokers.free_port()))
    config = (*redis_config(folder, port), *bus, "--tls-cluster", "yes")
    with running(brokers.redis_server(tmp_path, config=config)) as node:
        with redis.Redis(port=node.port) as client:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await until(
                lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"),
                "a whole cluster",
            )
        sink = RedisSink(
            f"rediss+cluster://127.0.0.1:{port}",
            journal="j",
            verify_tls=folder / "ca.pem",
            identity=identity,
        )
        assert await sent(sink, recorded(1)) == 1


async def test_sentinels_and_their_master_are_shown_our_certificate_too(
    folder: Path, redis_port: int, identity: Identity, tmp_path: Path, recorded: Any
) -> None:
    port = brokers.free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"tls-replication yes\nsentinel monitor main 127.0.0.1 {redis_port} 1\n")
    program = brokers.redis_program()
    words = (program, str(config), "--sentinel", *redis_config(folder, port))
    sentinel = Broker(
        "sentinel",
        lambda plain: (*words, "--port", str(plain)),
        folder=tmp_path,
        scheme="redis",
        port=None,
    )
    with running(sentinel):
        sink = RedisSink(
            f"rediss+sentinel://127.0.0.1:{port}/main",
            journal="j",
            verify_tls=folder / "ca.pem",
            identity=identity,
        )
        assert await sent(sink, recorded(1)) == 1
