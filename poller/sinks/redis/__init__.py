"""Redis and Valkey: one stream per source, appended to exactly once.

A script appends a run of events and moves the cursor in one atomic step, and only if the cursor
stands where this connection saw it last. So a resend finds the cursor moved and does nothing, and
a Redis that has lost its newest writes in a failover is noticed before anything is appended.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisClusterException, RedisError

from poller.errors import SinkUnavailable
from poller.events import Recorded
from poller.redaction import Redaction
from poller.sinks import tls_context, trouble
from poller.sinks.redis.address import Client, parse
from poller.tls import Identity

SOURCES: Final = "poller:sources"

CALL_EVENTS: Final = 200  # a script of 1,000 would keep Redis from others for 5 ms
CALL_BYTES: Final = 1 << 20

_NOWHERE: Final = -1

Asking: TypeAlias = Callable[..., AbstractAsyncContextManager[None]]
"""Bounds an exchange; takes how many events of a batch are delivered before it."""

# KEYS: stream, cursor. ARGV: journal, offset that the cursor must have, offset that it gets,
# retention in ms, most entries; then type and event of each entry. Returns the cursor's offset.
# The first HSET changes nothing: it fails before anything is appended where writing is refused.
_SCRIPT: Final = """
local cursor = redis.call('HMGET', KEYS[2], 'journal', 'offset')
local offset = cursor[1] == ARGV[1] and tonumber(cursor[2]) or 0
if offset ~= tonumber(ARGV[2]) then return offset end
redis.call('HSET', KEYS[2], 'journal', ARGV[1], 'offset', ARGV[2])
local oldest = math.max(0, redis.call('TIME')[1] * 1000 - ARGV[4])
redis.call('XTRIM', KEYS[1], 'MINID', '~', string.format('%.0f', oldest))
for i = 6, #ARGV, 2 do
  redis.call('XADD', KEYS[1], '*', 'type', ARGV[i], 'event', ARGV[i + 1])
end
redis.call('XTRIM', KEYS[1], 'MAXLEN', ARGV[5])
redis.call('HSET', KEYS[2], 'offset', ARGV[3])
return tonumber(ARGV[3])
"""
_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


def stream_key(source: str) -> str:
    """The stream of a source's events; the braces keep all its keys in one Cluster slot."""
    return f"poller:{{{source}}}:events"


def cursor_key(source: str) -> str:
    """The hash that says what has been appended of a source: `journal`, `offset`."""
    return f"poller:{{{source}}}:cursor"


class RedisSink:
    """Appends events to Redis streams.

    Args:
        url: `redis://`, `rediss://` (TLS) or `unix://`; with several nodes
            `redis+sentinel://host:port,host:port/service/db` and
            `redis+cluster://host:port,host:port`, likewise `rediss+…`.
        journal: identity of the journal that the offsets belong to.
        retention_s: older entries are trimmed, older events not appended.
        max_events: most entries of one stream.
        username: of an ACL user, if the URL names none.
        password: likewise. Sentinels are asked without either.
        verify_tls: True, False, or a CA bundle.
        identity: our own certificate, for servers that want one.
        timeout_s: for connecting and for each answer.

    Raises:
        SettingsError: the URL, the CA bundle or the client certificate cannot be used.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        journal: str,
        retention_s: float = 604_800,
        max_events: int = 1_000_000,
        username: str | None = None,
        password: str | None = None,
        verify_tls: bool | Path = True,
        identity: Identity | None = None,
        timeout_s: float = 4.0,
    ) -> None:
        self._address = parse(url)
        self._journal = journal
        self._retention_ms = int(retention_s * 1000)
        self._max_events = max_events
        self._timeout_s = timeout_s
        password = self._address.password or password
        self._secrets = Redaction(password or "")
        self._options: dict[str, Any] = {
            "username": self._address.username or username,
            "password": password,
            "socket_connect_timeout": timeout_s,
            "socket_timeout": None,  # its way to keep it may swallow a cancel before Python 3.12
            "retry": Retry(NoBackoff(), 0),  # the relay retries
            "protocol": 2,
            "driver_info": None,
        }
        self._tls = tls_context(self.name, verify_tls, identity) if self._address.tls else None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[RedisConnection]:
        """Connect, sign in, and look whether this server will do.

        Raises:
            SinkUnavailable: it is away, refuses, is too old, or is something else.
        """
        async with self.client() as client:
            yield RedisConnection(
                client,
                asking=partial(_asking, self._address.where, self._secrets, self._timeout_s),
                journal=self._journal,
                retention_ms=self._retention_ms,
                max_events=self._max_events,
            )

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """The connected client itself, for reading streams; its errors are redis-py's own.

        Raises:
            SinkUnavailable: as `connect`.
        """
        address = self._address
        tries = len(address.nodes) + 1 if address.topology else 1
        async with AsyncExitStack() as stack:
            async with _asking(address.where, self._secrets, self._timeout_s * tries):
                client = await address.open(stack, self._options, self._tls, self._timeout_s)
            yield client


class RedisConnection:
    """An open way to Redis; what it remembers itself is the truth about what it has.

    Attributes:
        expired: events of the last batch that are older than the retention.
    """

    def __init__(
        self,
        client: Client,
        *,
        asking: Asking,
        journal: str,
        retention_ms: int,
        max_events: int,
    ) -> None:
        self._client = client
        self._asking = asking
        self._journal = journal
        self._retention_ms = retention_ms
        self._max_events = max_events
        self.expired: list[Recorded] = []
        self._seen: dict[str, int] = {}
        self._listed: set[str] = set()

    async def cursors(self, sources: Sequence[str]) -> Mapping[str, int]:
        """The journal offset up to which each source's events have been appended; 0 for none.

        Raises:
            SinkUnavailable: Redis is away or refuses.
        """
        calls = [_Call(source, 0, _NOWHERE, _NOWHERE) for source in sources]
        async with self._asking():
            for call, reply in zip(calls, await self._run(calls), strict=True):
                if isinstance(reply, Exception):
                    raise reply
                self._seen[call.source] = int(reply)
        return {source: self._seen[source] for source in sources}

    async def send(self, batch: Sequence[Recorded]) -> int:
        """Append what Redis does not have yet; an empty batch asks for a sign of life.

        Events older than the retention are not appended, and count as delivered: see `expired`.

        Returns:
            The length of the batch.

        Raises:
            SinkUnavailable: Redis is away, refuses, or has lost what it had.
        """
        self.expired = []
        if not batch:
            async with self._asking():
                await self._client.execute_command("PING")
            return 0
        await self._meet({event.source for event in batch})
        calls = self._calls(batch)
        async with self._asking():
            replies = await self._run(calls)
        failed = [
            (call, reply) for call, reply in zip(calls, replies, strict=True) if reply != call.last
        ]
        if failed:
            call, reply = failed[0]
            async with self._asking(call.first):
                raise reply if isinstance(reply, Exception) else await self._lost(call)
        self._seen.update((call.source, call.last) for call in calls)
        return len(batch)

    async def append_again(self, events: Sequence[Recorded]) -> int:
        """Append copies of events, whatever the cursor says, and leave it alone.

        Returns:
            How many: all.

        Raises:
            SinkUnavailable: Redis is away or refuses; `delivered` have been appended for sure.
        """
        await self._meet({event.source for event in events})
        for start in range(0, len(events), CALL_EVENTS):
            async with self._asking(start):
                pipeline = self._client.pipeline(transaction=False)
                for event in events[start : start + CALL_EVENTS]:
                    limit = ("MAXLEN", self._max_events, "*")
                    entry = ("type", event.type, "event", event.body)
                    pipeline.execute_command("XADD", stream_key(event.source), *limit, *entry)
                await pipeline.execute()
        return len(events)

    async def _meet(self, sources: set[str]) -> None:
        """List sources for discovery, and learn where their cursors stand, once per connection."""
        if new := sources - self._listed:
            async with self._asking():
                await self._client.sadd(SOURCES, *new)
            self._listed |= new
        if unknown := sources - self._seen.keys():
            await self.cursors(list(unknown))

    def _calls(self, batch: Sequence[Recorded]) -> list[_Call]:
        """What Redis does not have of a batch: by source, in order, in parts that one call takes.

        A source's calls chain by their offsets, so that none is appended after one that failed.
        """
        oldest_ms = time.time_ns() // 1_000_000 - self._retention_ms
        calls: list[_Call] = []
        open_calls: dict[str, _Call] = {}
        for place, event in enumerate(batch):
            call = open_calls.get(event.source)
            seen = self._seen[event.source] if call is None else call.last
            if event.offset <= seen:
                continue
            if call is None or call.is_full:
                call = open_calls[event.source] = _Call(event.source, place, seen, seen)
                calls.append(call)
            call.last = event.offset
            if event.at_ms >= oldest_ms:
                call.entries += (event.type, event.body)
                call.bytes += len(event.body)
            else:
                self.expired.append(event)
        return calls

    async def _run(self, calls: Sequence[_Call]) -> list[Any]:
        """Run the script for each call, in one round trip; the server's errors are in the list."""
        replies = await self._run_as("EVALSHA", _SHA, calls)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            return await self._run_as("EVAL", _SCRIPT, calls)
        return replies

    async def _run_as(self, command: str, script: str, calls: Sequence[_Call]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for call in calls:
            keys = (stream_key(call.source), cursor_key(call.source))
            offsets = (self._journal, call.expected, call.last)
            limits = (self._retention_ms, self._max_events)
            pipeline.execute_command(command, script, 2, *keys, *offsets, *limits, *call.entries)
        return await pipeline.execute(raise_on_error=False)

    async def _lost(self, call: _Call) -> RedisError:
        """Why the cursor stands elsewhere than this connection left it."""
        journal = await self._client.hget(cursor_key(call.source), "journal")
        if journal not in (None, self._journal.encode()):
            return RedisError(f"another poller writes source {call.source} here, too")
        return RedisError(f"it has lost data of source {call.source}; it is filled again")


@dataclass(slots=True)
class _Call:
    """One call of the script: a run of events of one source.

    Attributes:
        first: place in the batch of its first event.
        expected: offset that the cursor must have.
        last: offset that it gets.
        entries: type and event, in turn.
        bytes: length of the events.
    """

    source: str
    first: int
    expected: int
    last: int
    entries: list[str | bytes] = field(default_factory=list)
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.entries) >= 2 * CALL_EVENTS or self.bytes >= CALL_BYTES


@asynccontextmanager
async def _asking(
    where: str, secrets: Redaction, timeout_s: float, delivered: int = 0
) -> AsyncIterator[None]:
    """Bound the time of an exchange, and turn what the client raises into one sentence."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except (RedisError, RedisClusterException, OSError) as error:
        sentence = _sentence(error, secrets)
        raise SinkUnavailable(f"Redis at {where}: {sentence}", delivered) from error
    except RuntimeError as error:
        if "handler is closed" not in str(error):  # uvloop's words for a connection that was reset
            raise
        raise SinkUnavailable(f"Redis at {where}: the connection was reset", delivered) from error
    except _GARBLED as error:
        why = "it answers what no Redis does: is the port right?"
        raise SinkUnavailable(f"Redis at {where}: {why}", delivered) from error


def _sentence(error: Exception, secrets: Redaction) -> str:
    known = trouble(error)
    if known is not None:
        return known
    # A server that does not know AUTH says with which words it was called.
    text = secrets.text(f"{getattr(error, 'status_code', None) or ''} {error}".strip())
    advice = next((advice for word, advice in _ADVICE.items() if word in text), None)
    return f"{advice} ({text[:160]})" if advice else text[:160] or "it refuses, and says not why"


_GARBLED: Final = (ValueError, TypeError, LookupError, AttributeError)
"""What the client raises where a reply has another shape than its command's."""

_ADVICE: Final = {
    "closed by server": "it closed the connection: is it a Redis, is TLS wanted or not, "
    "or a client certificate (redis.client_cert)?",
    "Protocol error": "what answers there is no Redis: is the port right?",
    "No master found": "no Sentinel knows a working master of that name",
    "SENTINEL": "what answers there is no Sentinel: write redis://…",
    "NOAUTH": "it wants redis.username and redis.password",
    "WRONGPASS": "it refuses redis.username or redis.password",
    "NOPERM": "allow the user what deploy/redis.acl lists",
    "can't run this command": "allow the user what deploy/redis.acl lists",  # Redis, in a script
    "ACL failure in script": "allow the user what deploy/redis.acl lists",  # Valkey
    "OOM": "its memory is full: raise maxmemory, or lower redis.retention or redis.max_events",
    "READONLY": "it has become a replica",
    "MISCONF": "it does not write, since it cannot save to its disk",
    "LOADING": "it is still loading its data",
    "WRONGTYPE": "a key that begins with poller: holds something else: use another database",
    "CLUSTERDOWN": "the Cluster does not serve all its slots",
}
