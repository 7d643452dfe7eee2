"""Secrets with telling beginnings are planted everywhere; nothing that comes out has one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import re
import signal
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from aiohttp import web
from redis.asyncio import Redis as RedisClient

from poller import brokers
from poller.brokers import Broker
from poller.errors import PollerError
from poller.vendors import load
from poller.wire import Request
from poller.world import World
from tests import certificates
from tests.daemon import OWN_KEYS, Daemon, get, now_ms, output, running, stream, until
from tests.guarded import mosquitto_user
from tests.support import fixture

ROOT = Path(__file__).parents[2]

ODD = "/\"'\\<&>+%2F~"
"""What is written differently in JSON, HTML, URLs and Python."""

BY_FILE = {
    "basic": f"Zqbasic1Ge{ODD}ä作",
    "token": f"Zqtoken2Hf{ODD}",
    "sk": f"Zqsecret3Ig{ODD}",
    "redis": f"Zqredis4Jh{ODD}ß",
    "passphrase": f"Zqphrase5Ki{ODD}",
}
BY_ENV = {
    "BEARER": f"Zqbearer6Lj{ODD}",
    "IAM": f"Zqiampw7Mk{ODD}é",
    "AK": "Zqaccess8Nl",
    "STS": f"Zqstscred9Om{ODD}",
    "MQTT": f"Zqmqttpw1Pn{ODD}ö",
    "HTTP": f"Zqhttptok2Qo{ODD}",
}
ISSUED = "Zqissued3Rp" + "0123456789abcdef" * 200
SECRETS = {**BY_FILE, **BY_ENV, "issued": ISSUED}
MARK = "as-you-said"
API = ("/api/v1/sources", "/api/v1/runs", "/api/v1/stats", "/openapi.json")


def needles(secret: str) -> Iterator[bytes]:
    """What even the beginning of a secret looks like, as it is, in hex, and in base64."""
    start = secret[:10].encode()
    yield start.lower()
    yield start.hex().encode()
    for shift in range(3):
        yield base64.b64encode(b" " * shift + start)[4 * bool(shift) : -4]


class Hay:
    """Everything that the program has let out, by where."""

    def __init__(self) -> None:
        self.places: dict[str, bytes] = {}

    def add(self, place: str, content: str | bytes) -> None:
        self.places[place] = content.encode() if isinstance(content, str) else content

    async def command(self, *words: str, env: dict[str, str]) -> tuple[int, str]:
        """Run a command; gives its exit code and output."""
        code, out, err = await output(*words, env=env)
        self.add(f"poller {' '.join(words)} [{code}] #{len(self.places)}", out + err)
        return code, out + err

    def leaks(self) -> list[str]:
        """Where which secret is, with what is around it."""
        return [
            f"{kind} in {place}: …{content[max(0, at - 60) : at + 40]!r}"
            for place, content in self.places.items()
            for kind, at in found(content)
        ]


def found(content: bytes) -> Iterator[tuple[str, int]]:
    lower = content.lower()
    for kind, secret in SECRETS.items():
        places = (place.find(needle) for needle in needles(secret) for place in (content, lower))
        if (at := max(places)) >= 0:
            yield kind, at


class Gossip:
    """A vendor that answers as it should, or repeats all that it was told and knows.

    `mode` is "well", or one of `MODES`.
    """

    def __init__(self, vendor: str) -> None:
        self.mode = "well"
        self._vendor = load(vendor)
        self._world = World(kinds=self._vendor.kinds, seed=1, jobs=3, now_ms=now_ms(), pace=0.3)

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        body = await request.read()
        if self.mode == "well":
            return await self._answer(request, body)
        told = self._told(request, body)
        if request.path == "/again":
            return web.Response(status=404, text=told)
        return MODES[self.mode](told)

    async def _answer(self, request: web.BaseRequest, body: bytes) -> web.Response:
        if request.path == "/v3/auth/tokens":
            issued = fixture("iam/v3_auth_tokens_response_3.json")
            return web.Response(status=201, headers={"X-Subject-Token": ISSUED}, body=issued)
        self._world.advance(now_ms())
        asked = Request(
            path=request.rel_url.raw_path,
            query=tuple(request.query.items()),
            headers=tuple((name.lower(), value) for name, value in request.headers.items()),
            body=body,
        )
        answer = self._vendor.render(self._world, asked)
        fields = {k: v for k, v in answer.headers.items() if k != "content-length"}
        return web.Response(status=answer.status, headers=fields, body=answer.body)

    def _told(self, request: web.BaseRequest, body: bytes) -> str:
        """What it repeats: what it was sent, and what it makes of that."""
        fields = [f"{name}: {value}" for name, value in request.headers.items()]
        scheme, _, word = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic":
            fields.append(base64.b64decode(word).decode())
        if body:
            fields.append(body.decode())
            fields.append(json.loads(body)["auth"]["identity"]["password"]["user"]["password"])
        return f"{MARK}\n" + "\n".join(fields)


def envelope(told: str) -> dict[str, Any]:
    """An error as each of the vendors words it."""
    texts = ("msg", "error_msg", "externalMessage", "detail", "message", "reason")
    codes = {"code": "999", "error_code": "X.1", "errCode": "X.1", "status": "failure"}
    said = {"message": told, "code": 401, "title": "Unauthorized"}
    return {**dict.fromkeys(texts, told), **codes, "error": said}


def leaked_host(told: str) -> str:
    """The one secret that can be in a host's name."""
    return BY_ENV["AK"] if BY_ENV["AK"] in told else "elsewhere"


MODES: dict[str, Callable[[str], web.Response]] = {
    "refuses": lambda told: web.Response(status=401, text=told),
    "refuses in JSON": lambda told: web.json_response(envelope(told), status=403),
    "breaks": lambda told: web.Response(
        status=500, text=f"<pre>Traceback: {html.escape(told)}</pre>", content_type="text/html"
    ),
    "breaks in JSON": lambda told: web.json_response(envelope(told), status=500),
    "complains": lambda told: web.json_response(envelope(told), status=400),
    "complains with 200": lambda told: web.json_response(envelope(told)),
    "shows a page": lambda told: web.Response(text=f"<p>{told}", content_type="text/html"),
    "is torn": lambda told: web.Response(
        text=json.dumps({"message": told}).replace("/", "\\/")[:-2]
    ),
    "escapes": lambda told: web.Response(text=f"{MARK} {quote(told, safe='')}"),
    "leads away": lambda told: web.Response(
        status=302, headers={"Location": f"https://{leaked_host(told)}.example.com/{quote(told)}"}
    ),
    "leads on": lambda told: web.Response(
        status=302, headers={"Location": f"/again?{quote(told)}"}
    ),
}


@asynccontextmanager
async def serving(gossip: Gossip, tls: Any = None) -> AsyncIterator[str]:
    server = web.Server(gossip)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await server.shutdown(0)


AUTH = {
    "kylin": 'type = "basic"\nusername = "poller"\npassword = "file:{folder}/basic"',
    "scale": 'type = "token"\ntoken = "file:{folder}/token"',
    "datameer": 'type = "bearer"\ntoken = "env:BEARER"',
    "cdm": 'type = "huawei-aksk"\naccess_key = "env:AK"\nsecret_key = "file:{folder}/sk"\n'
    'security_token = "env:STS"',
    "dataarts": 'type = "huawei-token"\niam_url = "{url}"\nusername = "u"\n'
    'password = "env:IAM"\ndomain = "d"',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds the secrets that are files."""
    for name, secret in BY_FILE.items():
        (tmp_path / name).write_text(secret + "\n", encoding="utf-8")
        (tmp_path / name).chmod(0o600)
    return tmp_path


@pytest.fixture
def redis_guarded(tmp_path: Path) -> Iterator[Broker]:
    """A Redis that wants the planted password."""
    known = hashlib.sha256(BY_FILE["redis"].encode()).hexdigest()
    users = tmp_path / "users.acl"
    users.write_text(f"user default off\nuser poller on #{known} ~* &* +@all\n")
    yield from started(brokers.redis_server(tmp_path, config=("--aclfile", str(users))))


@pytest.fixture
def mqtt_guarded(tmp_path: Path) -> Iterator[Broker]:
    """A mosquitto that wants the planted password."""
    passwords = tmp_path / "passwords"
    passwords.write_text(mosquitto_user("poller", BY_ENV["MQTT"]))
    passwords.chmod(0o600)
    config = ("allow_anonymous false", f"password_file {passwords}")
    try:
        broker = brokers.mosquitto(tmp_path, config=config)
    except PollerError as error:
        pytest.skip(f"amqtt takes anybody: {error}")
    yield from started(broker)


def started(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def written(folder: Path, urls: Mapping[str, str], redis: str, mqtt: str, extra: str = "") -> Path:
    """Settings with a secret wherever there can be one."""
    identity = f'client_cert = "{folder}/client.pem"\nclient_key = "{folder}/client.key"\n'
    tables = [
        f'[poller]\njournal = "{folder}/state/journal.db"\ndrain = "2s"',
        f'[redis]\nurl = "{redis}"\nusername = "poller"\npassword = "file:{folder}/redis"',
        f'[mqtt]\nurl = "{mqtt}"\nusername = "poller"\npassword = "env:MQTT"',
        '[http]\nlisten = "127.0.0.1:0"\ntoken = "env:HTTP"',
        '[defaults]\ninterval = "150ms"\nidle_interval = "150ms"\nrate = "200/s"\n'
        f'retry_refused = "100ms"\ndown_after = 1\nverify_tls = "{folder}/ca.pem"\n'
        f'{identity}client_key_password = "file:{folder}/passphrase"',
        *(
            f'[sources.{name}]\nvendor = "{name}"\nurl = "{url}"\n{OWN_KEYS.get(name, "")}\n'
            f"[sources.{name}.auth]\n{AUTH[name].format(folder=folder, url=url)}"
            for name, url in urls.items()
        ),
        extra,
    ]
    path = folder / "settings.toml"
    path.write_text("\n\n".join(tables), encoding="utf-8")
    return path


def everybody(daemon: Daemon, event: str, count: int) -> bool:
    """Whether every source has had an event of its own so often in the log."""
    sources = Counter(line["source"] for line in daemon.lines if line["event"] == event)
    return all(sources[name] >= count for name in AUTH)


async def set_all(vendors: Iterable[Gossip], mode: str, daemon: Daemon) -> None:
    """Let vendors behave, and have them asked at once."""
    for vendor in vendors:
        vendor.mode = mode
    daemon.process.send_signal(signal.SIGHUP)


async def test_no_vendor_gets_a_secret_out_of_the_daemon_however_it_repeats_it(
    folder: Path, redis_guarded: Broker, mqtt_guarded: Broker, listen: Any
) -> None:
    hay = Hay()
    authority = trustme.CA()
    certificates.bundle(authority, folder)
    certificates.client(authority, folder, password=BY_FILE["passphrase"])
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.configure_trust(tls)
    tls.verify_mode = ssl.CERT_REQUIRED
    vendors = {name: Gossip(name) for name in AUTH}
    admin = f"redis://poller:{quote(BY_FILE['redis'], safe='')}@127.0.0.1:{redis_guarded.port}/0"
    async with AsyncExitStack() as stack:
        urls = {
            name: await stack.enter_async_context(serving(vendor, tls if name == "kylin" else None))
            for name, vendor in vendors.items()
        }
        config = str(written(folder, urls, redis_guarded.url, mqtt_guarded.url))
        credentials = {"username": "poller", "password": BY_ENV["MQTT"]}
        inbox = await stack.enter_async_context(listen(mqtt_guarded, "#", **credentials))
        code, out = await hay.command("check", "-c", config, env=BY_ENV)
        assert code == 0, out
        daemon = await stack.enter_async_context(running(Path(config), BY_ENV))
        url = await daemon.url()

        async def enough() -> bool:
            return all([await stream(admin, name) for name in AUTH])

        await until(enough, "events of every vendor")

        for count, mode in enumerate(MODES, 1):
            await set_all(vendors.values(), mode, daemon)
            await until(partial(everybody, daemon, "source.down", count), f"a vendor that {mode}")
            if mode == "refuses in JSON":
                code, out = await hay.command("check", "-c", config, env=BY_ENV)
                assert code == 1, out
            await set_all(vendors.values(), "well", daemon)
            await until(partial(everybody, daemon, "source.up", count), f"the end of {mode}")

        allowed = {"Authorization": f"Bearer {BY_ENV['HTTP']}"}
        for path in ("/readyz", "/metrics", "/nowhere", "/", *API):
            hay.add(path, (await get(url + path, **allowed))[1])
            hay.add(f"{path} without token", (await get(url + path))[1])
        hay.add("argv", Path(f"/proc/{daemon.process.pid}/cmdline").read_bytes())
        commands = ("runs --all", "tail --no-follow --since 1h", "schema settings")
        ends = await asyncio.gather(
            *(hay.command(*words.split(), "-c", config, env=BY_ENV) for words in commands)
        )
        assert [code for code, _ in ends] == [0, 0, 0]
        async with RedisClient.from_url(admin) as client:
            hay.add("redis discovery", repr(await client.smembers("poller:sources")))
            for name in AUTH:
                hay.add(f"redis {name}", repr(await client.xrange(f"poller:{{{name}}}:events")))
                hay.add(f"cursor {name}", repr(await client.hgetall(f"poller:{{{name}}}:cursor")))
        hay.add("journal", b"".join(file.read_bytes() for file in (folder / "state").iterdir()))
        assert await daemon.end() == 0
        hay.add("mqtt", b"".join(inbox.bodies()))
        hay.add("standard error", daemon.text)
    assert hay.leaks() == []
    for place in ("journal", "mqtt", "standard error"):
        assert MARK.encode() in hay.places[place], place
    exposed = [line["file"] for line in daemon.lines if line["event"] == "secret.exposed"]
    assert exposed == [str(folder / "client.key")]


async def test_no_broker_and_no_mistake_in_the_settings_gets_a_secret_out_of_the_daemon(
    folder: Path, redis_guarded: Broker, mqtt_guarded: Broker
) -> None:
    hay = Hay()
    certificates.bundle(trustme.CA(), folder)
    certificates.client(trustme.CA(), folder, password="another")
    for broker, file in ((redis_guarded, "users.acl"), (mqtt_guarded, "passwords")):
        (folder / file).write_text("")
        broker.restart()
    redis, mqtt = f"redis://poller@127.0.0.1:{redis_guarded.port}", mqtt_guarded.url
    vendor = Gossip("scale")
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(vendor))
        config = written(folder, {"scale": url}, redis, mqtt)
        right = re.sub("client_.*", "", config.read_text(encoding="utf-8"))
        config.write_text(right, encoding="utf-8")
        daemon = await stack.enter_async_context(running(config, BY_ENV))
        http = await daemon.url()
        allowed = {"Authorization": f"Bearer {BY_ENV['HTTP']}"}

        async def refused() -> bool:
            _, body = await get(f"{http}/readyz", **allowed)
            hay.add("/readyz", body)
            return "redis.password" in body and "mqtt.password" in body

        await until(refused, "both brokers refuse")
        wrong = written(folder, {"scale": url}, redis, mqtt, extra=MISTAKES)
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.said("settings.rejected")
        code, out = await hay.command("check", "--offline", "-c", str(wrong), env=BY_ENV)
        assert (code, len(out.splitlines())) == (2, 9), out
        assert await daemon.end() == 0
        hay.add("standard error", daemon.text)
    assert hay.leaks() == []


MISTAKES = f"""
[sources.one]
vendor = "scale"
url = "https://u:{BY_ENV["AK"]}@127.0.0.1"
auth = {{ type = "bearer", token = "{BY_ENV["AK"]}" }}
concurrency = "{BY_ENV["AK"]}"
verify_tls = "{BY_ENV["AK"]}"
client_cert = "{BY_ENV["AK"]}"

[sources.two]
vendor = "{BY_ENV["AK"]}"
url = "https://127.0.0.1"
auth = {{ type = "basic", username = "u", password = "env:{BY_ENV["AK"]}-" }}
first_contact = "env:STS"
"""
"""A secret wherever somebody may have put it; besides, the passphrase does not open the key."""


PLUGIN = """
import os
from dataclasses import replace
from pathlib import Path

from poller.settings import Secret
from poller.vendors.scale import VENDOR as SCALE
from poller.wire import Options


class Own(Options):
    extra: Secret


def start(options, memory):
    if Path(os.environ["CRASH"]).exists():
        raise RuntimeError(f"a bug in {options!r}")
    return SCALE.start(options, memory)


def parse(options, request, response, memory):
    said = response.body.decode()
    raise KeyError(said[-300:])


VENDOR = replace(SCALE, name="acme", options=Own, start=start, parse=parse)
"""
"""A vendor with two bugs: it cannot read, and in the end it cannot ask."""


async def test_no_bug_gets_a_secret_out_of_the_daemon(folder: Path) -> None:
    hay = Hay()
    info = folder / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[poller.vendors]\nacme = acme:VENDOR\n")
    (folder / "acme.py").write_text(PLUGIN)
    vendor = Gossip("scale")
    vendor.mode = "shows a page"
    async with serving(vendor) as url:
        config = folder / "settings.toml"
        config.write_text(
            f'[poller]\njournal = "{folder}/state/journal.db"\n[http]\nlisten = ""\n'
            f'[sources.a]\nvendor = "acme"\nurl = "{url}"\nextra = "env:STS"\n'
            f"[sources.a.auth]\n{AUTH['cdm'].format(folder=folder)}\n"
        )
        crash = folder / "crash"
        env = {**BY_ENV, "PYTHONPATH": f"{folder}:{ROOT}", "CRASH": str(crash)}
        async with running(config, env) as daemon:
            assert "***" in (await daemon.said("parse.bug"))["exception"]
            assert "***" in (await daemon.said("poll.failed"))["message"]
            crash.touch()
            daemon.process.send_signal(signal.SIGHUP)
            assert await daemon.process.wait() == 1
            await daemon.end()
            hay.add("standard error", daemon.text)
        hay.add("journal", b"".join(file.read_bytes() for file in (folder / "state").iterdir()))
    assert "RuntimeError: a bug in Own(extra=SecretStr('**********'))" in daemon.text
    assert hay.leaks() == []
