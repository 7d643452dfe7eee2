"""What is shipped for compose, run: the secrets, the brokers with their rights, the settings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiomqtt
import pytest
from redis.asyncio import Redis

from poller.brokers import Broker, redis_server
from tests.daemon import get, output, running, simulated, until
from tests.deploy.programs import DEPLOY, program, said
from tests.deploy.shipped import documents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of deploy/compose in which the secrets have been made."""
    program("mosquitto_passwd", "mosquitto")
    for name in ("redis.acl", "mosquitto.acl", "mosquitto.conf"):
        shutil.copy(DEPLOY / name, tmp_path)
    copy = tmp_path / "compose"
    shutil.copytree(DEPLOY / "compose", copy, ignore=shutil.ignore_patterns("secrets"))
    said(copy / "secrets.sh")
    return copy


def secret(folder: Path, name: str) -> str:
    return (folder / "secrets" / name).read_text(encoding="utf-8").strip()


@pytest.fixture
def redis(folder: Path) -> Iterator[Broker]:
    """As in compose.yml, except for the port."""
    users = folder / "secrets/redis_users"
    broker = redis_server(folder, appendonly=True, config=("--aclfile", str(users)))
    yield from started(broker)


@pytest.fixture
def mqtt(folder: Path, make_mosquitto: Callable[..., Broker]) -> Iterator[Broker]:
    """With the shipped configuration, except for port and paths."""
    paths = {
        "/mosquitto/config/passwords": f"{folder}/secrets/mosquitto_passwords",
        "/mosquitto/config/mosquitto.acl": f"{folder.parent}/mosquitto.acl",
        "/mosquitto/data/": f"{folder}/",
    }
    text = (folder.parent / "mosquitto.conf").read_text(encoding="utf-8")
    for shipped, here in paths.items():
        assert shipped in text
        text = text.replace(shipped, here)
    # the fixture gives these two itself, each of which may be given once
    own = ("listener ", "set_tcp_nodelay ", "max_queued_messages ")
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", *own))]
    yield from started(make_mosquitto(folder, config=lines))


def started(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def here(folder: Path, **changes: str) -> Path:
    """The shipped settings with addresses and paths of this machine."""
    path = folder / "settings.toml"
    text = path.read_text(encoding="utf-8")
    shipped = {"file:/run/secrets/": f"file:{folder}/secrets/", **changes}
    for there, now in shipped.items():
        assert there in text
        text = text.replace(there, now)
    path.write_text(text, encoding="utf-8")
    return path


def readiness(url: str, folder: Path) -> list[str]:
    """The readiness probe of the StatefulSet, for a daemon on this machine."""
    [stateful] = documents("kubernetes/statefulset.yaml")
    [container] = stateful["spec"]["template"]["spec"]["containers"]
    words: list[str] = container["readinessProbe"]["exec"]["command"]
    changes = {
        "/run/secrets/poller/poller_token": f"{folder}/secrets/poller_token",
        "8787": url.rpartition(":")[2],
    }
    for there, now in changes.items():
        assert there in words[-1]
        words[-1] = words[-1].replace(there, now)
    return words


def health(url: str) -> list[str]:
    """The image's own check, for a daemon on this machine."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    [found] = re.findall(r"^HEALTHCHECK [^[]*(\[.*\])$", text.replace("\\\n", ""), re.MULTILINE)
    assert "8787" in found
    words: list[str] = json.loads(found.replace("8787", url.rpartition(":")[2]))
    return words


async def test_the_compose_files_work_together(folder: Path, redis: Broker, mqtt: Broker) -> None:
    async with AsyncExitStack() as stack:
        _, _, kylin = await simulated(stack, "kylin", pace=0.05)
        settings = here(
            folder,
            **{
                "redis://redis:6379/0": f"{redis.url}/0",
                "mqtt://mosquitto:1883": mqtt.url,
                "https://kylin.example.com/kylin": kylin,
                "0.0.0.0:8787": "127.0.0.1:0",
            },
        )
        env = {
            "POLLER_POLLER__JOURNAL": f"{folder}/journal.db",
            "POLLER_SOURCES__KYLIN__INTERVAL": "150ms",
            "POLLER_SOURCES__KYLIN__IDLE_INTERVAL": "150ms",
            "POLLER_SOURCES__KYLIN__RATE": "200/s",
        }
        inbox = aiomqtt.Client(
            "127.0.0.1",
            mqtt.port,
            username="subscriber",
            password=secret(folder, "subscriber_password"),
        )
        subscriber = await stack.enter_async_context(inbox)
        await subscriber.subscribe("jobs/kylin/+/state", qos=1)
        daemon = await stack.enter_async_context(running(settings, env))
        url = await daemon.url()
        await anext(aiter(subscriber.messages))
        reader = Redis.from_url(
            redis.url, username="subscriber", password=secret(folder, "subscriber_password")
        )
        await stack.enter_async_context(reader)

        async def streamed() -> bool:
            return bool(await reader.xlen("poller:{kylin}:events"))

        await until(streamed, "an event in Redis")
        assert (await get(f"{url}/readyz"))[0] == 401
        token = {"Authorization": f"Bearer {secret(folder, 'poller_token')}"}
        assert json.loads((await get(f"{url}/readyz", **token))[1])["reasons"] == []
        said(*readiness(url, folder))
        said(*health(url))

        redis.kill()

        async def unready() -> bool:
            return (await get(f"{url}/readyz", **token))[0] == 503

        await until(unready, "Redis missed")
        with pytest.raises(AssertionError, match="nothing listens there"):
            said(*readiness(url, folder))
        said(*health(url))


@pytest.mark.parametrize("place", ["compose", "kubernetes"])
async def test_the_shipped_settings_are_valid(place: str, tmp_path: Path) -> None:
    text = (DEPLOY / place / "settings.toml").read_text(encoding="utf-8")
    secrets = dict(re.findall(r'"file:(/run/secrets/\S*?(\w+))"', text))
    for path, name in secrets.items():
        (tmp_path / name).write_text("a-long-enough-secret", encoding="utf-8")
        text = text.replace(f"file:{path}", f"file:{tmp_path}/{name}")
    settings = tmp_path / "settings.toml"
    settings.write_text(text, encoding="utf-8")
    code, _, told = await output("check", "--offline", "-c", str(settings))
    assert code == 0, told
