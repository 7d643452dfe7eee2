"""Hostile input, all the way: what vendors answer, from the wire to brokers, logs and terminals."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, redirect_stdout, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import jsonschema
import msgspec
import orjson
import pytest
import structlog
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from poller import fetch, vendors
from poller.asking import Asker
from poller.brokers import Broker
from poller.cli import daemon, reading
from poller.errors import SettingsError, VendorError
from poller.events import Recorded, schema
from poller.journal import Journal, open_journal
from poller.known import Commit, Known
from poller.ledger import FirstContact, Ledger
from poller.relay import Relay
from poller.runs import Job, Problem, Seen, State
from poller.schedule import Pace
from poller.settings import NoAuth, load
from poller.sinks.mqtt import MqttSink
from poller.sinks.redis import RedisSink
from poller.telemetry import Metrics, configure_logs
from poller.vendors import BUILT_IN
from poller.visit import Visitor
from poller.wire import Request, Response
from poller.world import World
from tests import daemon as operated
from tests import hostile, toy

VALIDATOR = jsonschema.Draft202012Validator(schema())
SEEDS = st.integers(0, 2**32).map(Random)
"""A test that fails names the seed; the same seed plays the same."""

each = pytest.mark.parametrize("name", BUILT_IN)


@pytest.fixture(autouse=True)
def logged() -> Iterator[io.StringIO]:
    """What is logged, as a machine reads it."""
    stream, root = io.StringIO(), logging.getLogger()
    handlers = list(root.handlers)
    configure_logs(stream)
    structlog.configure(cache_logger_on_first_use=False)  # or they would log there for ever
    yield stream
    root.handlers[:] = handlers
    structlog.reset_defaults()


# What `parse` makes of it


def reads(name: str, exchange: hostile.Exchange, response: Response) -> None:
    """What is read of an answer can be used; or it is refused, in few words of our own."""
    vendor = vendors.load(name)
    options = hostile.options_of(vendor)
    refusal = ""
    try:
        page = vendor.parse(options, exchange.request, response, exchange.memory)
    except VendorError as error:
        refusal = str(error)
    else:
        hostile.check_page(vendor, page, exchange.memory)
    assert len(refusal) <= 1024


@each
@settings(max_examples=100, deadline=None, derandomize=True)
@given(random=SEEDS)
def test_whatever_becomes_of_an_honest_answer_it_is_read_or_refused(
    name: str, random: Random
) -> None:
    exchange = random.choice(hostile.exchanges(name))
    reads(name, exchange, hostile.answer(random, name, exchange.response))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(hostile.TEXTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@each
@settings(max_examples=50, deadline=None, derandomize=True)
@given(random=SEEDS, body=st.binary(max_size=200) | JSON.map(msgspec.json.encode))
def test_whatever_else_comes_instead_is_read_or_refused(
    name: str, random: Random, body: bytes
) -> None:
    exchange = random.choice(hostile.exchanges(name))
    reads(name, exchange, hostile.wrapped(random, body))


LARGE = {
    "numbers": b"[" + b"1," * 1_000_000 + b"1]",
    "rows": b"[" + b'{"id":1},' * 300_000 + b"{}]",
    "rows within": b'{"code":"000","results":[%b1],"jobs":[],"data":{"value":[]}}'
    % (b"1," * 900_000),
    "error": b'{"code":"999","msg":"%b"}' % (b"user " * 400_000),
    "code": b'{"error_code":"%b","errCode":"%b"}' % (b"c" * 1_000_000, b"c" * 1_000_000),
    "brackets": b"[" * 2_000_000,
    "text": b'"%b"' % (b"m" * 2_000_000),
}


@each
@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
@pytest.mark.timeout(20)
def test_a_large_answer_is_read_or_refused_at_once(name: str, body: bytes, status: int) -> None:
    for exchange in {type(each.request.context): each for each in hostile.exchanges(name)}.values():
        reads(name, exchange, Response(status=status, body=body))


# From the wire to the brokers


class Source:
    """A source whose jobs have hostile names, and whose answers go wrong at times."""

    def __init__(self, name: str, seed: int) -> None:
        self.random = Random(f"{name} {seed}")
        self.vendor = vendors.load(name)
        self.now_ms = hostile.BEGAN_MS
        self.world = World(
            kinds=self.vendor.kinds, seed=seed, jobs=5, now_ms=self.now_ms - 30_000, pace=0.5
        )
        hostile.rename(self.random, self.world)
        pace = Pace(interval_s=1e-4, idle_interval_s=1e-4, retry_refused_s=1e-4)
        self.plan = replace(
            toy.PLAN,
            source=f"{name}-{seed}",
            vendor=self.vendor,
            options=hostile.options_of(self.vendor),
            pace=pace,
            rate_per_s=1e6,
            vanish_after=2,
        )

    async def fetch(self, request: Request) -> Response:
        """The answer, a hostile one in its place in every tenth case."""
        for run in self.world.runs.values():
            run.uuid = (
                run.uuid if "\0" in run.uuid else f"{run.uuid}/+/#\0{run.definition.name[:900]}"
            )
        honest = self.vendor.render(self.world, request)
        if self.random.random() < 0.9:
            return honest
        body = hostile.answer(self.random, self.vendor.name, honest).body[:100_000]
        return Response(status=200, body=body)

    async def poll(self, journal: Journal, times: int) -> Ledger:
        """Poll so often, as if the daemon had just been started."""
        first: FirstContact = self.random.choice(("active", "all", "none"))
        ledger = await toy.ledger_of(journal, self.plan, at_ms=self.now_ms, first_contact=first)
        asker = Asker(self.plan, self.fetch, lambda: self.now_ms)
        visitor = Visitor(self.plan, ledger, asker, Metrics(), lambda: self.now_ms)
        for _ in range(times):
            self.world.advance(self.world.now_ms + 4000)
            try:
                await visitor.poll()
            except VendorError as error:
                await ledger.failed(error, self.now_ms)
            self.now_ms += self.random.choice((1000, 5000, 15_000, 700_000, -2000, -7_200_000))
        await ledger.save()
        return ledger


async def delivered(journal: Journal, *sinks: RedisSink | MqttSink) -> None:
    """Take everything in the journal to these sinks."""
    for sink in sinks:
        relay = Relay(sink, journal, Metrics(), now_ms=operated.now_ms, random=Random(1))
        running = asyncio.create_task(relay.run())
        drained = asyncio.create_task(relay.drained())
        await asyncio.wait([running, drained], return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        await drained


def check_lines(text: str) -> None:
    """Each line is an entry of ours, whoever splits them."""
    lines = text.split("\n")
    assert lines.pop() == ""
    assert lines == text.splitlines()
    for line in lines:
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", orjson.loads(line)["event"])


@each
async def test_what_a_hostile_vendor_says_reaches_both_brokers_and_nothing_else(
    name: str,
    tmp_path: Path,
    redis_broker: Broker,
    mosquitto: Broker,
    listen: Any,
    logged: io.StringIO,
) -> None:
    sources = [Source(name, seed) for seed in range(4)]
    prefix = f"test-{uuid4()}"
    async with open_journal(tmp_path / "journal.db") as journal:
        for source in sources:
            await source.poll(journal, 10)
            ledger = await source.poll(journal, 10)
            memories = await journal.load(source.plan.source)
            assert {run.key for run in memories.runs} == ledger.index.runs.keys()
        events = await journal.read(0, 1_000_000, max_bytes=1 << 30)
        async with listen(mosquitto, "#") as inbox:
            redis = RedisSink(f"{redis_broker.url}/0", journal=journal.uuid, retention_s=1e9)
            mqtt = MqttSink(
                mosquitto.url, instance=None, version="1", since="", topic_prefix=prefix
            )
            await delivered(journal, redis, mqtt)
            published = [event for event in events if not unfit(event)]
            last = published[-1].body  # the state of its job comes after it, and is the last
            ends = 2 if published[-1].job_id else 1
            await inbox.until(lambda messages: sum(m.payload == last for m in messages) == ends)
    assert len(events) > 50
    of_source = defaultdict(list)
    for event in events:
        assert len(event.body) < 64 * 1024
        VALIDATOR.validate(orjson.loads(event.body))
        of_source[event.source].append(event)
    await check_redis(redis_broker, of_source)
    check_topics(prefix, [m for m in inbox.messages if m.topic.value.startswith(prefix)], published)
    check_lines(logged.getvalue())
    assert "parse.bug" not in logged.getvalue()


def unfit(event: Recorded) -> bool:
    """Whether MQTT has no topic for its job."""
    return "\uffff" in event.job_id


async def check_redis(broker: Broker, of_source: dict[str, list[Recorded]]) -> None:
    keys = {b"poller:sources"}
    async with Redis.from_url(broker.url) as client:
        for source, events in of_source.items():
            entries: Any = await client.xrange(f"poller:{{{source}}}:events")
            assert [fields[b"event"] for _, fields in entries] == [e.body for e in events]
            keys |= {f"poller:{{{source}}}:{key}".encode() for key in ("events", "cursor")}
        assert set(await client.keys("*")) == keys


def check_topics(prefix: str, messages: list[Any], published: list[Recorded]) -> None:
    """Every event is in the topic of its job, once; and in no other but the job's state."""
    news = []
    for message in messages:
        first, source, *levels = message.topic.value.split("/")
        data = orjson.loads(message.payload)["data"]
        assert (first, source) == (prefix, data["source"])
        if levels == ["status"]:
            news.append(message.payload)
            continue
        job, *kind = levels
        assert unquote(job) == data["job"]["id"]
        assert kind in (["state"], ["events", data["state"]])
        if kind[0] == "events":
            news.append(message.payload)
    assert news == [event.body for event in published]


async def test_ids_that_differ_only_behind_a_nul_are_different_runs(tmp_path: Path) -> None:
    runs = [
        Known(job=Job(name), run_id=name, state=State.RUNNING)
        for name in ("a", "a\0", "a\0b", "a\0c", "A", "a ", "\u0061\u0301", "\u00e1")
    ]
    async with open_journal(tmp_path / "journal.db") as journal:
        await journal.commit(Commit(source="s", runs=runs, marks={"m\0a": "1", "m\0b": "2"}))
        await journal.commit(Commit(source="s", dropped=[("a\0b", "a\0b")], marks={"m\0b": ""}))
    async with open_journal(tmp_path / "journal.db") as journal:
        memories = await journal.load("s")
    assert {run.run_id for run in memories.runs} == {run.run_id for run in runs} - {"a\0b"}
    assert memories.marks == {"m\0a": "1"}


# Over HTTP

_STARTS = [b"200 OK", b"200", b"204 N", b"302 F", b"304 N", b"429 \xff\x1b[31m", b"999 x", b"-1 x"]
_FIELDS = [
    b"Content-Length: 2", b"Content-Length: -1", b"Content-Length: 9" + b"9" * 30,
    b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Content-Encoding: br",
    b"Content-Encoding: \xff", b"Set-Cookie: \x1b[31m=1; =; ,", b"Set-Cookie: a\tb=c; path=\xff",
    b"Location: /x", b"Location: http://[::1", b"Location: //\xff\xfe/", b"Location: javascript:x",
    b"Location: http://\xe2\x84\x80.com:99999999/", b"Location: ?", b"Location: /\xe2\x80\xae\r",
    b"Etag: \"\xff\"", b"Etag: \"x\"", b"Retry-After: \xff", b"Date: ", b"X: " + b"y" * 70_000,
    b"X\0: y", b": y", b" folded", b"Content-Type: text/html; charset=\xff", b"X: y\r\n" * 200,
    b"Last-Modified: Mon, 01 Jan 2024 00:00:00 +99999999999999999999\r\nDate: x",
]  # fmt: skip
_BODIES = [
    b"", b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"fffffffffffffffff\r\n", b"-1\r\n", b"\x1f\x8b\x08\0\0",
    b"\0" * 10, b"x" * 100_000, b'2;ext="\x1b"\r\n{}\r\n0\r\nTrailer: x\r\n\r\n',
]  # fmt: skip


@asynccontextmanager
async def sending(answers: Iterator[bytes]) -> Any:
    """A server that sends these bytes, whatever it is asked; gives its port."""

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(next(answers))
            writer.close()

    async with await asyncio.start_server(send, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


def responses(random: Random) -> Iterator[bytes]:
    """HTTP, or nearly."""
    while True:
        fields = random.sample(_FIELDS, random.randint(0, 3))
        head = b"\r\n".join([b"HTTP/1.1 " + random.choice(_STARTS), *fields])
        yield head + b"\r\n\r\n" + random.choice(_BODIES)


async def test_whatever_bytes_a_server_sends_they_are_an_answer_or_an_error(
    logged: io.StringIO,
) -> None:
    outcomes = set()
    async with sending(responses(Random(1))) as port:
        endpoint = fetch.Endpoint(
            url=f"http://127.0.0.1:{port}", auth=NoAuth(), timeout_s=1, max_body=1 << 20
        )
        async with fetch.connect(endpoint, now_ms=operated.now_ms) as ask:
            for _ in range(400):
                try:
                    outcomes.add(str((await ask(Request(path="/x"))).status))
                except VendorError as error:
                    outcomes.add(error.reason)
    assert outcomes >= {"200", "invalid", "unreachable"}
    assert logged.getvalue() == ""


# On a terminal

CONTROLS = "a\nFORGED\x1b[2J\x9b1m\x85\u2028\u202e\x7f"


async def told(journal: Path) -> None:
    """A journal in which a vendor has said this wherever it may say something."""
    async with open_journal(journal) as opened:
        ledger = await toy.ledger_of(opened, at_ms=operated.now_ms())
        running = Seen(
            job=Job(CONTROLS, CONTROLS, CONTROLS, CONTROLS),
            run_id=CONTROLS,
            state=State.RUNNING,
            vendor_state=CONTROLS,
            detail={CONTROLS: CONTROLS},
        )
        problem = Problem(CONTROLS, CONTROLS)
        failed = msgspec.structs.replace(running, state=State.FAILED, problem=problem)
        await ledger.take([running, failed], ledger.sighting(operated.now_ms()))
        await ledger.failed(vendors_word(), operated.now_ms())


def vendors_word() -> VendorError:
    error = VendorError(CONTROLS)
    error.reason = "rejected"
    return error


@pytest.fixture
def refusing() -> Iterator[str]:
    """The URL of a server that refuses everything in the same words."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(json.dumps({"detail": CONTROLS}).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def shown(command: Callable[[], None]) -> str:
    """What a command writes to a terminal."""
    ours, theirs = os.openpty()
    with ThreadPoolExecutor(1) as reader:
        text = reader.submit(_read, ours)
        terminal = os.fdopen(theirs, "w", encoding="utf-8")
        with terminal, redirect_stdout(terminal), suppress(typer.Exit):
            command()
        return text.result()


def _read(terminal: int) -> str:
    text = b""
    with suppress(OSError):  # EIO: nobody writes there any more
        while part := os.read(terminal, 65536):
            text += part
    os.close(terminal)
    return text.decode()


COMMANDS: dict[str, Callable[[Path], None]] = {
    "tail": lambda config: reading.tail(config, follow=False),
    "tail --json": lambda config: reading.tail(config, follow=False, as_json=True),
    "runs": lambda config: reading.runs(config, everything=True),
    "runs --json": lambda config: reading.runs(config, everything=True, as_json=True),
    "check": daemon.check,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_terminal_obeys_nothing_that_a_vendor_says(
    command: str, tmp_path: Path, refusing: str
) -> None:
    asyncio.run(told(tmp_path / "journal.db"))
    config = operated.settings(tmp_path, {"s": ("scale", refusing)})
    text = shown(lambda: COMMANDS[command](config))
    assert "FORGED" in text
    lines = text.split("\r\n")
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith("FORGED")]
    if command == "runs --json":
        assert json.loads(text)["job"]["id"] == CONTROLS


def test_a_line_for_a_pipe_cannot_be_forged_either(
    tmp_path: Path, refusing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = operated.settings(tmp_path, {"s": ("scale", refusing)})
    with pytest.raises(typer.Exit):
        daemon.check(config)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL sources.s: HTTP 400: a\\nFORGED\\x1b[2J")


# Settings

OPTIONS = {name: vendors.load(name).options for name in BUILT_IN}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings") / "settings.toml"


def problems(config: Path, text: bytes, environ: dict[str, str]) -> list[str]:
    config.write_bytes(text)
    try:
        load(config, OPTIONS, environ)
    except SettingsError as error:
        return error.problems
    return []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(random=SEEDS)
def test_whatever_settings_hold_they_are_read_or_every_problem_is_a_line(
    config: Path, random: Random
) -> None:
    assert all(problem.isprintable() for problem in problems(config, *hostile.settings(random)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_bytes_that_are_no_settings_are_problems_of_a_line_each(config: Path, text: bytes) -> None:
    found = problems(config, text, {})
    assert found
    assert all(problem.isprintable() for problem in found)
