"""The tables of settings.toml, as the file may hold them and as the rest of the package reads them.

Where an attribute carries a unit, its key in the file does not: `interval_s` is `interval`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import pydantic
from pydantic import AfterValidator, Field
from pydantic.json_schema import models_json_schema

from poller.settings.peer import Peer, Table
from poller.settings.values import (
    Bytes,
    Count,
    HeaderSecret,
    Name,
    PerSecond,
    RedisUrl,
    Seconds,
    Secret,
    address,
    at_least,
    file_path,
    key,
    level,
    per_second,
    seconds,
    size,
    topic,
    url,
)

SOURCE_NAME = "[a-z0-9][a-z0-9_-]*"

_Interval: TypeAlias = Annotated[Seconds, at_least("100ms")]


class Daemon(Table):
    """`[poller]`: the process itself.

    Attributes:
        instance: its name, one level of an MQTT topic; the host's name if not set.
        journal: path of the database file.
        drain_s: how long relays may go on delivering after a signal to stop.
        retention_s: how long finished runs and delivered events stay in the journal.
    """

    instance: Annotated[str, AfterValidator(level)] = Field(default_factory=socket.gethostname)
    journal: Annotated[Path, AfterValidator(file_path)] = Path(".poller/journal.db")
    drain_s: Seconds = key("drain", "10s", seconds)
    retention_s: Seconds = key("retention", "30d", seconds)


class Redis(Peer):
    """`[redis]`: the Redis or Valkey that events are appended to.

    Attributes:
        url: redis, rediss, redis+sentinel, redis+cluster (these two also with rediss) or unix.
        username: of the ACL user, if the url does not name it.
        password: if the url does not hold it.
        retention_s: how long events stay in a stream.
        max_events: how many events of a source stay at most.
    """

    url: RedisUrl
    username: Name | None = Field(default=None, repr=False)
    password: Secret | None = None
    retention_s: Seconds = key("retention", "7d", seconds)
    max_events: Count = 1_000_000


class Mqtt(Peer):
    """`[mqtt]`: the broker that events are published to.

    Attributes:
        url: mqtt or mqtts, a host, perhaps a port.
        topic_prefix: first level or levels of every topic.
        username: if the broker wants one.
        password: if the broker wants one.
        state_expiry_s: how long the broker keeps a job's retained state; at least 1.
        protocol: the version of MQTT; auto is 5, or 3.1.1 where the broker refuses that.
    """

    url: Annotated[str, url("mqtt", "mqtts")]
    topic_prefix: Annotated[str, AfterValidator(topic)] = "jobs"
    username: Name | None = Field(default=None, repr=False)
    password: Secret | None = None
    state_expiry_s: Annotated[Seconds, at_least("1s")] = key("state_expiry", "7d", seconds)
    protocol: Literal["auto", "5", "3.1.1"] = "auto"


class Http(Table):
    """`[http]`: health and metrics.

    Attributes:
        token: what clients must show; without it `listen` is loopback.
        listen: host:port, IPv6 in brackets; empty turns it off.
    """

    token: Secret | None = None
    listen: Annotated[str, AfterValidator(address)] = "127.0.0.1:8787"


class NoAuth(Table):
    """Requests carry no credentials."""

    type: Literal["none"] = "none"


class Basic(Table):
    """HTTP Basic."""

    type: Literal["basic"] = "basic"
    username: Name = Field(repr=False)
    password: Secret


class Bearer(Table):
    """`Authorization: Bearer …`."""

    type: Literal["bearer"] = "bearer"
    token: HeaderSecret


class Token(Table):
    """`Authorization: Token …`."""

    type: Literal["token"] = "token"
    token: HeaderSecret


class HuaweiToken(Table):
    """An IAM token, signed in for at `{iam_url}/v3/auth/tokens`.

    Attributes:
        iam_url: origin of the IAM service.
        username: of the IAM user.
        password: of the IAM user.
        domain: the account that the user belongs to.
    """

    type: Literal["huawei-token"] = "huawei-token"
    iam_url: Annotated[str, url("http", "https")]
    username: Name = Field(repr=False)
    password: Secret
    domain: Name = Field(repr=False)


class HuaweiAkSk(Table):
    """Every request is signed with an access key.

    Attributes:
        access_key: the key's id.
        secret_key: what requests are signed with.
        security_token: goes with temporary keys.
    """

    type: Literal["huawei-aksk"] = "huawei-aksk"
    access_key: HeaderSecret
    secret_key: Secret
    security_token: HeaderSecret | None = None


Auth: TypeAlias = NoAuth | Basic | Bearer | Token | HuaweiToken | HuaweiAkSk


class NoOptions(Table):
    """The options of a vendor that has no keys of its own."""


class Defaults(Peer):
    """`[defaults]`: what every source has and may override.

    Attributes:
        interval_s: time between polls, before jitter; at least 0.1.
        idle_interval_s: the same while nothing is active.
        schedule: by these two, or by a forecast of what is due.
        max_interval_s: by a forecast, time between polls where nothing is due.
        resync_s: how often to look again at what a feed of changes does not show.
        timeout_s: for one whole exchange, body included.
        concurrency: requests in flight.
        rate_per_s: requests per second on average, in bursts of at most `concurrency`.
        max_body: bytes of one answer, unpacked.
        retry_refused_s: first wait after refused credentials.
        down_after: failed polls in a row until the source is down.
        vanish_after: good polls without a run until it is taken as vanished.
        first_contact: which runs are published when a source is first seen.
    """

    interval_s: _Interval = key("interval", "15s", seconds)
    idle_interval_s: _Interval = key("idle_interval", "60s", seconds)
    schedule: Literal["fixed", "forecast"] = "fixed"
    max_interval_s: _Interval = key("max_interval", "60s", seconds)
    resync_s: Seconds = key("resync", "10m", seconds)
    timeout_s: Seconds = key("timeout", "10s", seconds)
    concurrency: Count = 8
    rate_per_s: PerSecond = key("rate", "120/m", per_second)
    max_body: Bytes = key("max_body", "32MiB", size)
    retry_refused_s: Seconds = key("retry_refused", "5m", seconds)
    down_after: Count = 3
    vanish_after: Count = 3
    first_contact: Literal["active", "all", "none"] = "active"


class Source(Defaults):
    """`[sources.<name>]`: one account at one endpoint of a vendor.

    Attributes:
        name: as in settings.
        vendor: name of the vendor.
        url: http or https, without a slash at the end.
        auth: how requests are authorised.
        options: the vendor's own keys.
    """

    name: str
    vendor: str
    url: Annotated[str, url("http", "https", path=True)]
    auth: Annotated[Auth, Field(discriminator="type")] = NoAuth()
    options: pydantic.BaseModel = NoOptions()


class Settings(Table):
    """Everything that was configured, complete and consistent.

    Attributes:
        poller: the process itself.
        redis: None if there is none.
        mqtt: None if there is none.
        http: health and metrics.
        sources: name → source, in the order of the file.
        exposed: files with secrets that others on this machine may read.
    """

    poller: Daemon = Field(default_factory=Daemon)
    redis: Redis | None = None
    mqtt: Mqtt | None = None
    http: Http = Http()
    sources: dict[str, Source]
    exposed: tuple[Path, ...] = ()


TABLES: Mapping[str, type[Table]] = {
    "poller": Daemon,
    "redis": Redis,
    "mqtt": Mqtt,
    "http": Http,
    "defaults": Defaults,
}
"""The tables of a fixed name; `sources` is the one beside them."""


def keys(model: type[pydantic.BaseModel]) -> list[str]:
    """The keys that a table of this model may hold."""
    fields = model.model_fields.items()
    return [str(field.validation_alias or name) for name, field in fields]


SOURCE_KEYS = [name for name in keys(Source) if name not in ("name", "options")]
"""The keys of a source that do not depend on its vendor."""


def schema(vendors: Mapping[str, type[pydantic.BaseModel]]) -> dict[str, Any]:
    """JSON Schema (2020-12) of settings.toml, with each vendor's own keys.

    Args:
        vendors: name → model of the vendor's own keys in a source.
    """
    models: list[type[pydantic.BaseModel]] = [*TABLES.values(), Source, *vendors.values()]
    places, generated = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/$defs/{model}"
    )
    shapes = generated["$defs"]
    refs = {model: places[model, "validation"]["$ref"] for model in models}
    common = {key: {"$ref": f"{refs[Source]}/properties/{key}"} for key in SOURCE_KEYS}

    def only(name: str, model: type[pydantic.BaseModel]) -> dict[str, Any]:
        own = shapes[refs[model].removeprefix("#/$defs/")]
        then = {
            "properties": {**common, **own.get("properties", {})},
            "required": own.get("required", []),
            "additionalProperties": False,
        }
        return {"if": {"properties": {"vendor": {"const": name}}}, "then": then}

    source = {
        "type": "object",
        "properties": {"vendor": {"enum": sorted(vendors)}},
        "required": ["vendor", "url"],
        "allOf": [only(name, model) for name, model in vendors.items()],
    }
    sources = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{SOURCE_NAME}$"},
        "additionalProperties": source,
    }
    tables = {name: {"$ref": refs[model]} for name, model in TABLES.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "settings.toml",
        "type": "object",
        "properties": {**tables, "sources": sources},
        "additionalProperties": False,
        "$defs": shapes,
    }
