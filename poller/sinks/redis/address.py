"""Where a Redis is, and how to reach it: one server, behind Sentinels, or a Cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from ssl import SSLContext
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelManagedConnection
from redis.exceptions import RedisError

from poller.errors import SettingsError

OLDEST: Final = (6, 2)  # XTRIM MINID; every Valkey calls itself Redis 7.2 or newer

Client: TypeAlias = Redis | RedisCluster


class Address(NamedTuple):
    """What a Redis URL says.

    Attributes:
        topology: "" for one server, "sentinel" or "cluster".
        nodes: host and port of each; none for a Unix socket.
        path: of a Unix socket.
        service: the name that Sentinels know the master by.
    """

    topology: str
    tls: bool
    nodes: tuple[tuple[str, int], ...]
    path: str
    service: str
    db: int
    username: str | None
    password: str | None

    @property
    def where(self) -> str:
        """For messages."""
        return ",".join(f"{host}:{port}" for host, port in self.nodes) or self.path

    async def open(
        self,
        stack: AsyncExitStack,
        options: Mapping[str, Any],
        tls: SSLContext | None,
        timeout_s: float,
    ) -> Client:
        """A client that is closed with the stack.

        Each Sentinel has the timeout to answer, and is asked without credentials.

        Raises:
            RedisError: there is no way to it, or it will not do.
            RedisClusterException: likewise.
        """
        client: Client
        options = {**options, "ssl": tls is not None}
        if self.topology == "cluster":
            nodes = [ClusterNode(host, port) for host, port in self.nodes]
            client = RedisCluster(startup_nodes=nodes, **options)
            if tls is not None:
                client.connection_kwargs |= {"connection_class": _Secure, "tls": tls}
                _secure(client.startup_nodes, tls)
        elif self.topology == "sentinel":
            anonymous = {k: v for k, v in options.items() if k not in ("username", "password")}
            of_sentinel = anonymous | {"socket_timeout": timeout_s}
            sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis has no types there
                self.nodes, sentinel_kwargs=of_sentinel, **options
            )
            stack.push_async_callback(_close, sentinel)
            client = master = sentinel.master_for(self.service, db=self.db)
            if tls is not None:
                _secure([each.connection_pool for each in (*sentinel.sentinels, master)], tls)
        elif self.nodes:
            [(host, port)] = self.nodes
            client = Redis(host=host, port=port, db=self.db, **options)
            if tls is not None:
                _secure([client.connection_pool], tls)
        else:
            client = Redis(unix_socket_path=self.path, db=self.db, **options)
        stack.push_async_callback(_close, client)
        await client.initialize()
        self._check(await client.info())
        return client

    def _check(self, info: Mapping[str, Any]) -> None:
        version = str(info.get("redis_version", "0"))
        mode = info.get("redis_mode") or info.get("server_mode")  # Redis or Valkey
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            raise RedisError(f"version {version} is too old: Redis 6.2 or Valkey 7.2 at least")
        if mode == "sentinel":
            raise RedisError("it is a Sentinel: write redis+sentinel://host:port/service/database")
        if mode == "cluster" and self.topology != "cluster":
            raise RedisError("it is a Cluster: write redis+cluster://host:port,host:port")
        if info.get("role") == "slave" and not self.topology:
            raise RedisError("it is a read-only replica: write its master's address")


def parse(url: str) -> Address:
    """What a URL says.

    Raises:
        SettingsError: it is none that Redis has.
    """
    try:
        parts = urlsplit(url)
        kind, _, topology = parts.scheme.partition("+")
        user, _, hosts = parts.netloc.rpartition("@")
        username, _, password = user.partition(":")
        service, db = "", parts.path.strip("/")
        if topology == "sentinel":
            service, _, db = db.partition("/")
        elif kind == "unix":
            db = parse_qs(parts.query).get("db", [""])[0]
        port = 26379 if topology == "sentinel" else 6379
        return Address(
            topology,
            tls=kind == "rediss",
            nodes=tuple(_node(host, port) for host in hosts.split(",") if kind != "unix"),
            path=parts.path,
            service=service,
            db=int(db or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
        )
    except ValueError:
        # Neither the message nor a cause may quote the URL: it may hold a password.
        raise SettingsError(["redis.url: not understood: is it …://host:port/database?"]) from None


class _Secure(SSLConnection):
    """A connection in a context of ours: redis-py's trusts the system's authorities besides.

    It could not open the key of a Cluster's client certificate either.
    """

    def __init__(self, *, tls: SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self.ssl_context.context = tls


class _SecureMaster(SentinelManagedConnection, _Secure):
    """The same to a master that Sentinels name."""


def _secure(pools: Iterable[Any], tls: SSLContext) -> None:
    """Let pools that have not been used yet make connections in this context."""
    for pool in pools:
        managed = issubclass(pool.connection_class, SentinelManagedConnection)
        pool.connection_class = _SecureMaster if managed else _Secure
        pool.connection_kwargs["tls"] = tls


def _node(text: str, port: int) -> tuple[str, int]:
    node = urlsplit(f"//{text}")
    return node.hostname or "localhost", node.port or port


async def _close(client: Client | Sentinel) -> None:
    with suppress(RedisError, OSError):
        await client.aclose()
