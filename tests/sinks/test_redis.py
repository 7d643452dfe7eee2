"""Redis: exactly once whatever happens, the keys of the contract, and every way to a server."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from poller import brokers
from poller.brokers import Broker
from poller.errors import PollerError, SettingsError, SinkUnavailable
from poller.events import Recorded
from poller.sinks.redis import CALL_EVENTS, RedisSink, cursor_key, stream_key
from poller.sinks.redis.address import parse
from tests import daemon
from tests.soak.proxy import Proxy

EXPIRED = {
    "not_before": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
    "not_after": datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC),
}
DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def server(redis_broker: Broker) -> Iterator[redis.Redis]:
    """A second eye on the same Redis."""
    with redis.Redis(port=redis_broker.port) as client:
        yield client


@pytest.fixture
def sink(redis_broker: Broker) -> RedisSink:
    return RedisSink(redis_broker.url, journal="journal-1")


def entries(server: redis.Redis, source: str = "s") -> list[bytes]:
    found: Any = server.xrange(stream_key(source))
    return [fields[b"event"] for _, fields in found]


def bodies(events: Sequence[Recorded], source: str = "s") -> list[bytes]:
    return [event.body for event in events if event.source == source]


async def read(sink: RedisSink, source: str = "s") -> list[bytes]:
    async with sink.client() as client:
        found: Any = await client.xrange(stream_key(source))
    return [fields[b"event"] for _, fields in found]


async def deliver(sink: RedisSink, events: Sequence[Recorded]) -> None:
    async with sink.connect() as connection:
        await connection.send(events)


async def refused(sink: RedisSink, events: Sequence[Recorded] = ()) -> str:
    with pytest.raises(SinkUnavailable) as failure:
        await deliver(sink, events)
    return str(failure.value)


async def test_the_keys_and_fields_are_those_of_the_contract(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    event = recorded(7, "kylin-prod", type="dev.poller.job.failed")
    await deliver(sink, [event])
    stream: Any = server.xrange("poller:{kylin-prod}:events")
    [(_, fields)] = stream
    assert fields == {b"type": b"dev.poller.job.failed", b"event": event.body}
    assert server.hgetall("poller:{kylin-prod}:cursor") == {
        b"journal": b"journal-1",
        b"offset": b"7",
    }
    assert server.smembers("poller:sources") == {b"kylin-prod"}
    assert len(server.keys()) == 3


def test_the_keys_of_a_source_share_a_cluster_slot() -> None:
    assert key_slot(stream_key("a").encode()) == key_slot(cursor_key("a").encode())
    assert key_slot(stream_key("a").encode()) == key_slot(b"a")


async def test_a_connection_learns_by_itself_what_redis_has(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 11)]
    await deliver(sink, events[:6])
    await deliver(sink, events)
    assert entries(server) == bodies(events)


async def test_cursors_are_those_of_this_journal(
    sink: RedisSink, redis_broker: Broker, recorded: Any
) -> None:
    await deliver(sink, [recorded(3, "a"), recorded(5, "b")])
    async with sink.connect() as connection:
        assert await connection.cursors(["a", "b", "c"]) == {"a": 3, "b": 5, "c": 0}
        assert await connection.cursors([]) == {}
    async with RedisSink(redis_broker.url, journal="journal-2").connect() as connection:
        assert await connection.cursors(["a", "b"]) == {"a": 0, "b": 0}


async def test_a_long_batch_is_cut_into_calls(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    small = [recorded(offset) for offset in range(1, 2 * CALL_EVENTS + 2)]
    large = [recorded(offset, "large", body=b"x" * 65_000) for offset in range(1000, 1040)]
    async with sink.connect() as connection:
        await connection.cursors(["s", "large"])
        server.config_resetstat()
        await connection.send([*small, *large])
    stats: Any = server.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 3 + 3
    assert entries(server) == bodies(small)
    assert entries(server, "large") == bodies(large, "large")


async def test_a_server_that_forgot_the_script_is_given_it_again(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 601)]
    async with sink.connect() as connection:
        await connection.send(events[:1])
        server.script_flush()
        await connection.send(events)
    assert entries(server) == bodies(events)


async def test_lost_data_is_noticed_before_anything_is_appended_and_filled_again(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 21)]
    async with sink.connect() as connection:
        await connection.send(events[:10])
        server.flushall()
        with pytest.raises(SinkUnavailable, match="lost data of source s") as failure:
            await connection.send(events[10:])
    assert failure.value.delivered == 0
    assert server.keys(stream_key("s")) == []
    async with sink.connect() as connection:
        assert await connection.cursors(["s"]) == {"s": 0}
        await connection.send(events)
    assert entries(server) == bodies(events)
    assert server.smembers("poller:sources") == {b"s"}


async def test_a_failover_that_lost_the_newest_writes_is_filled_without_repeats(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 21)]
    async with sink.connect() as connection:
        await connection.send(events[:6])
        kept: Any = server.dump(stream_key("s"))
        await connection.send(events[6:12])
        server.restore(stream_key("s"), 0, kept, replace=True)
        server.hset(cursor_key("s"), "offset", 6)
        with pytest.raises(SinkUnavailable, match="lost data"):
            await connection.send(events[12:])
    async with sink.connect() as connection:
        assert await connection.cursors(["s"]) == {"s": 6}
        await connection.send(events)
    assert entries(server) == bodies(events)


async def test_another_poller_with_the_same_source_is_called_so(
    sink: RedisSink, redis_broker: Broker, recorded: Any
) -> None:
    async with sink.connect() as connection:
        await connection.send([recorded(1)])
        await deliver(RedisSink(redis_broker.url, journal="journal-2"), [recorded(1)])
        with pytest.raises(SinkUnavailable, match="another poller writes source s here"):
            await connection.send([recorded(2)])


async def test_events_older_than_the_retention_are_passed_over_told_and_count_as_delivered(
    redis_broker: Broker, server: redis.Redis, recorded: Any
) -> None:
    sink = RedisSink(redis_broker.url, journal="journal-1", retention_s=3600)
    now_ms = time.time_ns() // 1_000_000
    old = [recorded(offset, at_ms=now_ms - 3_700_000) for offset in (1, 2)]
    young = [recorded(offset, at_ms=now_ms - 3_500_000) for offset in (3, 4)]
    async with sink.connect() as connection:
        assert await connection.send(old[:1]) == 1
        assert connection.expired == old[:1]
        assert await connection.cursors(["s"]) == {"s": 1}
        assert await connection.send(old + young) == 4
        assert connection.expired == old[1:]
        assert await connection.send(old + young) == 4
        assert connection.expired == []
    assert entries(server) == bodies(young)


async def test_what_is_passed_over_is_told_though_the_rest_of_the_batch_fails(
    redis_broker: Broker, server: redis.Redis, recorded: Any
) -> None:
    sink = RedisSink(redis_broker.url, journal="journal-1", retention_s=3600)
    old = recorded(1, at_ms=time.time_ns() // 1_000_000 - 3_700_000)
    async with sink.connect() as connection:
        server.set(stream_key("b"), "no stream")
        with pytest.raises(SinkUnavailable):
            await connection.send([old, recorded(2, "b")])
        assert connection.expired == [old]


async def test_entries_older_than_the_retention_are_trimmed(
    redis_broker: Broker, server: redis.Redis, recorded: Any
) -> None:
    sink = RedisSink(redis_broker.url, journal="journal-1", retention_s=3600)
    hours_ago_ms = time.time_ns() // 1_000_000 - 2 * 3_600_000
    for number in range(1000):
        server.xadd(stream_key("s"), {"type": "t", "event": "old"}, id=f"{hours_ago_ms}-{number}")
    await deliver(sink, [recorded(1)])
    assert entries(server).count(b"old") < 200
    assert entries(server)[-1] == recorded(1).body


async def test_never_more_than_max_events_are_kept(
    redis_broker: Broker, server: redis.Redis, recorded: Any
) -> None:
    sink = RedisSink(redis_broker.url, journal="journal-1", max_events=150)
    events = [recorded(offset) for offset in range(1, 501)]
    await deliver(sink, events)
    assert entries(server) == bodies(events)[-150:]


async def test_appending_again_adds_copies_and_leaves_the_cursor(
    redis_broker: Broker, server: redis.Redis, recorded: Any
) -> None:
    sink = RedisSink(redis_broker.url, journal="journal-1", max_events=300)
    events = [recorded(offset) for offset in range(1, 251)]
    async with sink.connect() as connection:
        await connection.send(events)
        assert await connection.append_again(events[:210]) == 210
        assert await connection.cursors(["s"]) == {"s": 250}
    assert entries(server) == [*bodies(events), *bodies(events[:210])][-300:]


async def test_appending_again_tells_how_far_it_came(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset, "ab"[offset > CALL_EVENTS]) for offset in range(1, 301)]
    server.set(stream_key("b"), "not a stream")
    async with sink.connect() as connection:
        with pytest.raises(SinkUnavailable, match="use another database") as failure:
            await connection.append_again(events)
    assert failure.value.delivered == CALL_EVENTS


async def test_a_source_that_fails_does_not_count_and_others_are_not_repeated(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset, "abc"[offset % 3]) for offset in range(3, 30)]
    server.set(stream_key("b"), "not a stream")
    async with sink.connect() as connection:
        with pytest.raises(SinkUnavailable, match="use another database") as failure:
            await connection.send(events)
    assert failure.value.delivered == 1
    server.delete(stream_key("b"))
    await deliver(sink, events[failure.value.delivered :])
    for source in "abc":
        assert entries(server, source) == bodies(events, source)


async def test_a_full_memory_is_called_so_and_loses_nothing(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 11)]
    async with sink.connect() as connection:
        await connection.send(events[:5])
        server.config_set("maxmemory", 1)
        try:
            with pytest.raises(SinkUnavailable, match="its memory is full: raise maxmemory"):
                await connection.send(events)
        finally:
            server.config_set("maxmemory", 0)
    await deliver(sink, events)
    assert entries(server) == bodies(events)


async def test_a_master_that_became_a_replica_is_called_so(
    sink: RedisSink, server: redis.Redis, recorded: Any
) -> None:
    async with sink.connect() as connection:
        await connection.send([recorded(1)])
        server.replicaof("127.0.0.1", brokers.free_port())
        try:
            with pytest.raises(SinkUnavailable, match="it has become a replica"):
                await connection.send([recorded(2)])
            assert "it is a read-only replica" in await refused(sink)
        finally:
            server.replicaof("no", "one")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Broker]:
    """A Redis with the users of deploy/redis.acl."""
    users = tmp_path / "users.acl"
    users.write_text((DEPLOY / "redis.acl").read_text() + "user admin on >admin ~* &* +@all\n")
    yield from running(brokers.redis_server(tmp_path, config=("--aclfile", str(users))))


def running(broker: Broker) -> Iterator[Broker]:
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()


def as_poller(broker: Broker, **options: Any) -> RedisSink:
    given: dict[str, Any] = {"url": broker.url, "journal": "journal-1", "username": "poller"}
    return RedisSink(**(given | {"password": "change-me"} | options))


async def test_the_deployed_user_may_do_what_is_needed_and_no_more(
    guarded: Broker, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 11)]
    sink = as_poller(guarded)
    async with sink.connect() as connection:
        await connection.cursors(["s"])
        await connection.send(events)
        await connection.send([])
        await connection.append_again(events)
    assert await read(sink) == bodies(events) * 2
    async with sink.client() as client:
        assert await client.smembers("poller:sources") == {b"s"}


NOBODY_MAY = (
    "ACL LIST",
    "BGSAVE",
    "CLIENT LIST",
    "CLUSTER RESET",
    "CONFIG GET *",
    "COPY poller:sources poller:others",
    "DEL {stream}",
    "DUMP {stream}",
    "EVAL return(redis.call('DEL',KEYS[1])) 1 {stream}",
    "EVAL return(redis.call('GET',KEYS[1])) 1 other",
    "EXPIRE {stream} 1",
    "FLUSHALL",
    "FLUSHDB",
    "FUNCTION LIST",
    "GET other",
    "HSET other a b",
    "KEYS *",
    "MIGRATE 127.0.0.1 1 {stream} 0 1",
    "MODULE LIST",
    "PUBLISH channel message",
    "RENAME {stream} other",
    "REPLICAOF NO ONE",
    "SADD other a",
    "SAVE",
    "SCAN 0",
    "SCRIPT FLUSH",
    "SET poller:other a",
    "SHUTDOWN NOSAVE",
    "SMEMBERS other",
    "UNLINK {stream}",
    "XADD other * a b",
    "XDEL {stream} 0-1",
    "XGROUP DESTROY {stream} readers",
    "XRANGE other - +",
)
WRITES = (
    "HSET {cursor} a b",
    "SADD poller:sources a",
    "XADD {stream} * a b",
    "XTRIM {stream} MAXLEN 0",
)


def allowed(broker: Broker, user: str, password: str, commands: Sequence[str]) -> list[str]:
    """Which of these commands a user may run."""
    found = []
    with redis.Redis(port=broker.port, username=user, password=password) as client:
        for command in commands:
            words = command.format(stream=stream_key("s"), cursor=cursor_key("s")).split()
            try:
                client.execute_command(*words)
            except redis.exceptions.NoPermissionError:
                continue
            except redis.exceptions.ResponseError as error:
                if "ACL failure" in str(error) or "can't run this command" in str(error):
                    continue
            found.append(command)
    return found


def test_the_deployed_users_may_nothing_else(guarded: Broker) -> None:
    assert allowed(guarded, "poller", "change-me", NOBODY_MAY) == []
    assert allowed(guarded, "poller", "change-me", WRITES) == list(WRITES)
    assert allowed(guarded, "subscriber", "change-me-too", [*NOBODY_MAY, *WRITES, "INFO"]) == []
    at_once = Retry(NoBackoff(), 0)
    with (
        redis.Redis(port=guarded.port, protocol=2, retry=at_once) as nobody,
        pytest.raises(redis.AuthenticationError),
    ):
        nobody.ping()


def rules() -> list[str]:
    """What deploy/redis.acl says of the daemon's user."""
    lines = (DEPLOY / "redis.acl").read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith("user poller ")]
    return line.split()[2:]


OF_CLUSTER = {"+asking", "+cluster|slots", "+command"}
ALONE = sorted(rule.removeprefix("+") for rule in {*rules()} - OF_CLUSTER if rule[0] == "+")


@pytest.mark.parametrize("right", ALONE)
async def test_the_deployed_user_may_nothing_that_it_does_not_need(
    right: str, guarded: Broker, recorded: Any
) -> None:
    sink = as_poller(guarded, url=f"{guarded.url}/1")
    events = [recorded(offset) for offset in range(1, 4)]

    async def all_that_it_does() -> None:
        async with sink.connect() as connection:
            await connection.cursors(["s"])
            await connection.send(events)
            await connection.send([])
            await connection.append_again(events)
            admin.hset(cursor_key("s"), "journal", "journal-2")
            with pytest.raises(SinkUnavailable, match="another poller writes source s here, too"):
                await connection.send([recorded(4)])
        async with sink.client() as client:
            await client.smembers("poller:sources")
            await client.xrange(stream_key("s"))
            await client.xrevrange(stream_key("s"))

    with redis.Redis(port=guarded.port, db=1, username="admin", password="admin") as admin:
        await all_that_it_does()
        admin.flushdb()
        admin.script_flush()
        admin.execute_command("ACL", "SETUSER", "poller", f"-{right}")
        with pytest.raises((SinkUnavailable, redis.exceptions.RedisError, AssertionError)):
            await all_that_it_does()


def test_the_deployed_subscriber_may_read_only(guarded: Broker) -> None:
    with redis.Redis(
        port=guarded.port, username="subscriber", password="change-me-too"
    ) as subscriber:
        key = stream_key("s")
        assert subscriber.smembers("poller:sources") == set()
        assert subscriber.xread({key: "0"}) in ([], {})
        assert subscriber.xgroup_create(key, "readers", id="0", mkstream=True)
        assert subscriber.xreadgroup("readers", "one", {key: ">"}) in ([], {})
        with pytest.raises(redis.exceptions.NoPermissionError):
            subscriber.xadd(key, {"type": "t"})


@pytest.mark.parametrize(
    "command", ["info", "evalsha", "hmget", "hset", "time", "xtrim", "xadd", "sadd"]
)
async def test_a_missing_permission_is_called_so_and_leaves_nothing_half_done(
    command: str, guarded: Broker, recorded: Any
) -> None:
    events = [recorded(offset) for offset in range(1, 11)]
    with redis.Redis(port=guarded.port, username="admin", password="admin") as admin:
        await deliver(as_poller(guarded), events[:5])
        admin.execute_command("ACL", "SETUSER", "poller", f"-{command}")
        sentence = await refused(as_poller(guarded), events)
        assert "allow the user what deploy/redis.acl lists" in sentence
        admin.execute_command("ACL", "SETUSER", "poller", f"+{command}")
        await deliver(as_poller(guarded), events)
        assert entries(admin) == bodies(events)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"password": "wrong-secret"}, "it refuses redis.username or redis.password"),
        ({"username": None, "password": None}, "it wants redis.username and redis.password"),
    ],
)
async def test_a_wrong_or_missing_password_is_called_so_and_not_shown(
    options: dict[str, Any], sentence: str, guarded: Broker
) -> None:
    answer = await refused(as_poller(guarded, **options))
    assert sentence in answer
    assert "wrong-secret" not in answer


@pytest.mark.parametrize("padding", [0, 100])
@pytest.mark.parametrize("in_url", [True, False])
async def test_a_server_that_repeats_the_password_does_not_bring_it_into_the_message(
    in_url: bool, padding: int
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = (await reader.readuntil(b"secret\r\n")).replace(b"\r\n", b" ")
        writer.write(b"-ERR unknown command %b %b\r\n" % (b"." * padding, said))
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        url = f"redis://u:wrong-secret@{at}" if in_url else f"redis://{at}"
        sink = RedisSink(url, journal="j", password=None if in_url else "wrong-secret")
        sentence = await refused(sink)
    assert "unknown command" in sentence
    assert "wrong" not in sentence


async def test_credentials_of_the_url_count_first(guarded: Broker, recorded: Any) -> None:
    url = guarded.url.replace("://", "://poller:change-me@")
    await deliver(RedisSink(url, journal="j", username="x", password="y"), [recorded(1)])


@pytest.mark.parametrize(
    ("info", "sentence"),
    [
        ("redis_version:5.0.14", "version 5.0.14 is too old: Redis 6.2 or Valkey 7.2"),
        ("redis_version:6.0.20", "version 6.0.20 is too old"),
        ("redis_version:6.2.0\r\nredis_mode:sentinel", "it is a Sentinel: write redis\\+sentinel"),
        ("redis_version:7.2.4\r\nredis_mode:cluster", "it is a Cluster: write redis\\+cluster"),
        ("redis_version:7.2.4\r\nrole:slave", "it is a read-only replica"),
        (None, "it is still loading its data"),
    ],
)
async def test_a_server_that_will_not_do_is_told_apart(info: str | None, sentence: str) -> None:
    answer = "-LOADING Redis is loading the dataset in memory\r\n"
    if info is not None:
        answer = f"${len(info)}\r\n{info}\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"INFO\r\n")
        writer.write(answer.encode())
        await reader.read()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(SinkUnavailable, match=sentence):
            await deliver(RedisSink(f"redis://127.0.0.1:{port}", journal="j"), [])


def bulk(text: bytes) -> bytes:
    """A reply that is a text."""
    return b"$%d\r\n%b\r\n" % (len(text), text)


GARBLED = {
    "not a number": b",nan\r\n",
    "null": b"$-1\r\n",
    "empty list": b"*0\r\n",
    "list of numbers": b"*1\r\n:1\r\n",
    "no utf-8": bulk(b"\xff"),
    "no version": bulk(b"redis_version:x.y\r\n"),
    "no info": bulk(b"redis_version\r\n:\r\na:b=,\r\n"),
    "redirection to nowhere": b"-MOVED\r\n",
    "empty error": b"-\r\n",
    "controls": b"-ERR \x1b[2J\xff\r\n",
    "long error": b"-%b\r\n" % (b"x" * 100_000),
    "no end": b"*1\r\n" * 2000,
    "other protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("reply", GARBLED.values(), ids=GARBLED)
@pytest.mark.parametrize("place", ["greeting", "sentinel", "cluster", "cursor"])
async def test_a_server_that_answers_what_no_redis_does_is_unavailable(
    reply: bytes, place: str, recorded: Any
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while asked := await reader.read(65536):
            good = place == "cursor" and b"INFO" in asked
            writer.write(bulk(b"redis_version:7.2.0\r\n") if good else reply)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        topology = {"sentinel": f"redis+sentinel://{address}/m/0"}
        topology["cluster"] = f"redis+cluster://{address}"
        url = topology.get(place, f"redis://{address}")
        with pytest.raises(SinkUnavailable, match=f"^Redis at {address}: .") as failure:
            await deliver(RedisSink(url, journal="j", timeout_s=0.3), [recorded(1)])
        assert len(str(failure.value)) < 500


async def test_a_name_that_does_not_exist_is_called_so() -> None:
    sink = RedisSink("redis://nowhere.invalid", journal="j")
    assert "nowhere.invalid:6379: the host name is not found" in await refused(sink)


async def test_a_database_and_a_unix_socket_are_ways_too(tmp_path: Path, recorded: Any) -> None:
    path = tmp_path / "redis.sock"
    for broker in running(brokers.redis_server(tmp_path, config=("--unixsocket", str(path)))):
        await deliver(RedisSink(f"unix://{path}?db=3", journal="j"), [recorded(1)])
        await deliver(RedisSink(f"{broker.url}/3", journal="j"), [recorded(1), recorded(2)])
        with redis.Redis(port=broker.port, db=3) as server:
            assert entries(server) == [recorded(1).body, recorded(2).body]
        missing = RedisSink(f"unix://{tmp_path}/missing.sock", journal="j")
        assert "missing.sock: the connection failed (No such file" in await refused(missing)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", ("", False, (("h", 6379),), "", 0, None, None)),
        ("redis://h:1/2", ("", False, (("h", 1),), "", 2, None, None)),
        ("rediss://u:p%40@h:1", ("", True, (("h", 1),), "", 0, "u", "p@")),
        ("redis://:p@[::1]:1", ("", False, (("::1", 1),), "", 0, None, "p")),
        ("redis://", ("", False, (("localhost", 6379),), "", 0, None, None)),
        ("redis+cluster://a:1,b", ("cluster", False, (("a", 1), ("b", 6379)), "", 0, None, None)),
        (
            "redis+sentinel://a,b:1/main",
            ("sentinel", False, (("a", 26379), ("b", 1)), "main", 0, None, None),
        ),
        (
            "rediss+sentinel://u:p@a/main/3",
            ("sentinel", True, (("a", 26379),), "main", 3, "u", "p"),
        ),
        ("unix:///run/redis.sock?db=4", ("", False, (), "", 4, None, None)),
    ],
)
def test_an_address_says_where_redis_is(url: str, expected: tuple[Any, ...]) -> None:
    found = parse(url)
    assert (
        found.topology,
        found.tls,
        found.nodes,
        found.service,
        found.db,
        found.username,
        found.password,
    ) == expected


@pytest.mark.parametrize("url", ["redis://u:secret@h:port", "redis://h/secret", "redis://[secret"])
def test_an_address_that_is_not_understood_is_not_quoted(url: str) -> None:
    with pytest.raises(SettingsError, match=r"redis\.url: not understood") as failure:
        RedisSink(url, journal="j")
    assert "secret" not in str(failure.value)
    assert failure.value.__suppress_context__


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


Secure = Callable[..., Broker]


@pytest.fixture
def secure(authority: trustme.CA, tmp_path: Path) -> Iterator[Secure]:
    """Starts a Redis with a certificate; its port is the one with TLS."""
    started: list[Broker] = []

    def start(identity: str = "127.0.0.1", **dates: Any) -> Broker:
        certificate = authority.issue_cert(identity, **dates)
        certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
        authority.cert_pem.write_to_path(tmp_path / "ca.pem")
        tls_port = brokers.free_port()
        config = ["--tls-port", str(tls_port), "--tls-auth-clients", "no"]
        for option, name in (("cert-file", "cert"), ("key-file", "key"), ("ca-cert-file", "ca")):
            config += [f"--tls-{option}", str(tmp_path / f"{name}.pem")]
        broker = brokers.redis_server(tmp_path, config=config)
        try:
            broker.start()
        except PollerError as error:
            pytest.skip(f"this Redis was built without TLS: {error}")
        broker.port = tls_port
        started.append(broker)
        return broker

    yield start
    for broker in started:
        broker.stop()


def tls_sink(broker: Broker, **options: Any) -> RedisSink:
    url = broker.url.replace("redis://", "rediss://")
    return RedisSink(url, journal="j", **options)


async def test_tls_with_a_trusted_certificate(
    secure: Secure, tmp_path: Path, recorded: Any
) -> None:
    broker = secure()
    await deliver(tls_sink(broker, verify_tls=tmp_path / "ca.pem"), [recorded(1)])
    await deliver(tls_sink(broker, verify_tls=False), [recorded(1)])


@pytest.mark.parametrize(
    ("trusted", "issued", "detail"),
    [
        (False, {}, "self.signed certificate|unable to get local issuer"),
        (True, {"identity": "other.example"}, "IP address mismatch"),
        (True, EXPIRED, "certificate has expired"),
    ],
)
async def test_tls_with_a_bad_certificate_is_refused(
    trusted: bool, issued: dict[str, Any], detail: str, secure: Secure, tmp_path: Path
) -> None:
    sink = tls_sink(secure(**issued), verify_tls=tmp_path / "ca.pem" if trusted else True)
    with pytest.raises(SinkUnavailable, match=rf"certificate is not accepted.*({detail})"):
        await deliver(sink, [])


async def test_tls_where_none_is_spoken_is_called_so(redis_broker: Broker) -> None:
    assert "is TLS wanted or not" in await refused(tls_sink(redis_broker, timeout_s=0.3))


async def test_no_tls_where_it_is_wanted_is_called_so(secure: Secure) -> None:
    broker = secure()
    assert "is TLS wanted or not" in await refused(RedisSink(broker.url, journal="j"))


def test_a_ca_bundle_that_is_none_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    with pytest.raises(SettingsError, match=r"^redis\.verify_tls: .*ca\.pem: no CA certificate"):
        RedisSink("rediss://h", journal="j", verify_tls=tmp_path / "ca.pem")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Broker]]:
    """Two masters, each with half of the slots, which know the user of deploy/redis.acl, too."""
    nodes: list[Broker] = []
    buses = [brokers.free_port(), brokers.free_port()]
    try:
        for number, slots in enumerate([range(8192), range(8192, 16384)]):
            folder = tmp_path / str(number)
            folder.mkdir()
            config = ("--cluster-enabled", "yes", "--cluster-port", str(buses[number]))
            nodes.append(brokers.redis_server(folder, config=config))
            nodes[-1].start()
            told(nodes[-1], "CLUSTER ADDSLOTS", *slots)
            told(nodes[-1], "CLUSTER SET-CONFIG-EPOCH", number + 1)
            told(nodes[-1], "ACL SETUSER", "poller", *rules())
        told(nodes[0], "CLUSTER MEET", "127.0.0.1", nodes[1].port, buses[1])
        until_whole(nodes)
        yield nodes
    finally:
        for node in nodes:
            node.stop()


def told(broker: Broker, command: str, *words: Any) -> Any:
    with redis.Redis(port=broker.port) as client:
        return client.execute_command(*command.split(), *words)


def until_whole(nodes: list[Broker]) -> None:
    until(lambda: all(b"cluster_state:ok" in told(node, "CLUSTER INFO") for node in nodes))
    until(lambda: all(len(told(node, "CLUSTER SLOTS")) == len(nodes) for node in nodes))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_a_cluster_gets_everything_once_also_after_it_lost_a_node(
    cluster: list[Broker], recorded: Any
) -> None:
    names = [f"source-{number}" for number in range(10)]
    events = [recorded(offset, names[offset % 10]) for offset in range(1, 501)]
    url = ",".join(node.url.removeprefix("redis://") for node in cluster)
    sink = as_poller(cluster[0], url=f"redis+cluster://{url}", timeout_s=2)
    async with sink.connect() as connection:
        await connection.cursors(names)
        assert await connection.send(events[:300]) == 300
        assert await connection.send([]) == 0
        cluster[1].kill()
        with pytest.raises(SinkUnavailable):
            await connection.send(events[300:])
    cluster[1].restart()
    told(cluster[1], "ACL SETUSER", "poller", *rules())
    until_whole(cluster)
    async with sink.connect() as connection:
        cursors = await connection.cursors(names)
        assert set(cursors.values()) > {0}
        await connection.send(events)
        found = {name: await read(sink, name) for name in names}
    assert found == {name: bodies(events, name) for name in names}


async def test_one_server_is_no_cluster(redis_broker: Broker) -> None:
    url = redis_broker.url.replace("redis://", "redis+cluster://")
    assert "Cluster mode is not enabled" in await refused(RedisSink(url, journal="j"))


async def test_a_node_of_a_cluster_wants_to_be_called_a_cluster(cluster: list[Broker]) -> None:
    assert "it is a Cluster" in await refused(RedisSink(cluster[0].url, journal="j"))


@pytest.fixture
def guarded_master(tmp_path: Path) -> Iterator[tuple[Broker, Broker]]:
    """A master with a replica, and the Sentinel that watches it."""
    folders = [tmp_path / name for name in ("master", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    master = brokers.redis_server(folders[0], config=("--repl-diskless-sync-delay", "0"))
    started = [master]
    try:
        master.start()
        of_master = ("--replicaof", f"127.0.0.1 {master.port}")
        replica = brokers.redis_server(folders[1], config=of_master)
        started.append(replica)
        replica.start()
        until(lambda: told(replica, "INFO")["master_link_status"] == "up")
        config = folders[2] / "sentinel.conf"
        config.write_text(
            f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds main 200\nsentinel failover-timeout main 5000\n"
        )
        program = brokers.redis_program()
        sentinel = Broker(
            "sentinel",
            lambda port: (program, str(config), "--sentinel", "--port", str(port)),
            folder=folders[2],
            scheme="redis",
            port=None,
        )
        started.append(sentinel)
        sentinel.start()
        until(lambda: len(told(sentinel, "SENTINEL REPLICAS", "main")) == 1)
        yield master, sentinel
    finally:
        for broker in started:
            broker.stop()


async def test_behind_sentinels_the_new_master_gets_the_rest_after_a_failover(
    guarded_master: tuple[Broker, Broker], recorded: Any
) -> None:
    master, sentinel = guarded_master
    events = [recorded(offset) for offset in range(1, 21)]
    dead = f"127.0.0.1:{brokers.free_port()}"
    url = f"redis+sentinel://{dead},127.0.0.1:{sentinel.port}/main/0"
    sink = RedisSink(url, journal="j")
    async with sink.connect() as connection:
        await connection.send(events[:10])
        told(master, "WAIT", 1, 10_000)
        master.kill()
        with pytest.raises(SinkUnavailable):
            await connection.send(events[10:])
    async with asyncio.timeout(30):
        await send_in_the_end(sink, events)
    assert await read(sink) == bodies(events)


async def send_in_the_end(sink: RedisSink, events: Sequence[Recorded]) -> None:
    while True:
        try:
            await deliver(sink, events)
        except SinkUnavailable:
            await asyncio.sleep(0.05)
        else:
            return


async def test_a_name_that_no_sentinel_knows_is_called_so(
    guarded_master: tuple[Broker, Broker], redis_broker: Broker
) -> None:
    _, sentinel = guarded_master
    at = sentinel.url.removeprefix("redis://")
    unknown = RedisSink(f"redis+sentinel://{at}/other", journal="j")
    assert "no Sentinel knows a working master of that name" in await refused(unknown)
    assert "it is a Sentinel" in await refused(RedisSink(sentinel.url, journal="j"))
    at = redis_broker.url.removeprefix("redis://")
    none = RedisSink(f"redis+sentinel://{at}/main", journal="j")
    assert "what answers there is no Sentinel" in await refused(none)


def test_a_connection_that_was_reset_is_called_so_on_a_faster_loop_too(
    redis_broker: Broker, recorded: Any
) -> None:
    async def deliver() -> None:
        async with Proxy("redis", redis_broker.port).serve() as proxy:
            sink = RedisSink(f"redis://127.0.0.1:{proxy.port}", journal="j")
            async with sink.connect() as connection:
                await connection.send([recorded(1)])
                proxy.reset()
                await daemon.until(lambda: not proxy.links, "the end of the connection")
                with pytest.raises(SinkUnavailable):
                    await connection.send([recorded(2)])

    uvloop = pytest.importorskip("uvloop")
    for _ in range(5):
        uvloop.run(deliver())
