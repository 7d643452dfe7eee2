"""Settings: what is right, what is wrong and how that is said, the environment, secrets."""

from __future__ import annotations

import os
import re
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
import trustme

from poller.errors import SettingsError
from poller.settings import (
    Auth,
    Basic,
    Bearer,
    Defaults,
    HuaweiAkSk,
    HuaweiToken,
    NoAuth,
    Redis,
    Seconds,
    Secret,
    Settings,
    Source,
    Token,
    load,
    schema,
)
from poller.wire import Options
from tests import certificates

ROOT = Path(__file__).parents[1]
BAD = sorted((Path(__file__).parent / "settings").glob("bad-*.toml"))

SOURCE = '[sources.kylin-prod]\nvendor = "kylin"\nurl = "https://kylin.example.com/kylin"\n'


class Datameer(Options):
    timezone: str = "UTC"
    jobs: tuple[int, ...] = ()
    sweep_interval_s: Seconds = pydantic.Field(60.0, alias="sweep_interval")

    @pydantic.field_validator("timezone")
    @classmethod
    def _has_a_slash(cls, name: str) -> str:
        if name != "UTC" and "/" not in name:
            raise ValueError(f"no such time zone:\n{name}")
        return name


class Kylin(Options):
    projects: tuple[str, ...] = ()
    paged: bool = True
    extra_token: Secret | None = None


class Cdm(Options):
    project_id: str
    cluster_id: str
    jobs: tuple[str, ...] = ()


class Dataarts(Options):
    project_id: str
    workspace: str | None = None
    kinds: tuple[Literal["real_time", "batch"], ...] = ("real_time", "batch")


VENDORS: dict[str, type[pydantic.BaseModel]] = {
    "datameer": Datameer,
    "scale": Options,
    "kylin": Kylin,
    "cdm": Cdm,
    "dataarts": Dataarts,
}

ENVIRON = {
    "EMPTY": "",
    "TWO_LINES": "one\ntwo",
    "WRONG_URL": "https://:URL-hunter2@127.0.0.1",
    "KYLIN_PASSWORD": "KYLIN-hunter2",
    "KYLIN_TOKEN": "KYLIN-hunter2",
    "HW_AK": "AK-hunter2",
    "HW_PASSWORD": "HW-hunter2",
}

FULL = """
[poller]
instance = "one"
journal = "journal.db"
drain = "1s"
retention = "1d"

[redis]
url = "rediss://127.0.0.1/0"
username = "env:USERNAME"
password = "env:PASSWORD"
retention = "1d"
max_events = 10
verify_tls = false
client_cert = "client.pem"
client_key = "client.key"
client_key_password = "env:PASSWORD"

[mqtt]
url = "mqtts://127.0.0.1"
topic_prefix = "jobs"
username = "file:username"
password = "file:password"
state_expiry = "1d"
protocol = "5"
verify_tls = false
client_cert = "client.pem"
client_key = "client.key"
client_key_password = "file:password"

[http]
listen = "0.0.0.0:8787"
token = "env:PASSWORD"

[defaults]
interval = "1s"
idle_interval = "1s"
schedule = "forecast"
max_interval = "1s"
resync = "1s"
timeout = "1s"
concurrency = 1
rate = "1/s"
max_body = "1KB"
retry_refused = "1s"
down_after = 1
vanish_after = 1
first_contact = "all"
verify_tls = false
client_cert = "client.pem"
client_key = "client.key"
client_key_password = "env:PASSWORD"

[sources.basic]
vendor = "kylin"
url = "http://127.0.0.1"
auth = { type = "basic", username = "env:USERNAME", password = "env:PASSWORD" }
projects = ["ssb"]
extra_token = "env:PASSWORD"

[sources.bearer]
vendor = "scale"
url = "https://127.0.0.1"
auth = { type = "bearer", token = "env:PASSWORD" }
verify_tls = true
client_cert = "client.pem"
client_key = "client.key"
client_key_password = "file:password"

[sources.token]
vendor = "scale"
url = "http://127.0.0.1"
auth = { type = "token", token = "file:password" }

[sources.aksk]
vendor = "cdm"
url = "http://127.0.0.1"
project_id = "p"
cluster_id = "c"

[sources.aksk.auth]
type = "huawei-aksk"
access_key = "env:PASSWORD"
secret_key = "env:PASSWORD"
security_token = "env:PASSWORD"

[sources.iam]
vendor = "dataarts"
url = "http://127.0.0.1"
project_id = "p"
kinds = ["batch"]

[sources.iam.auth]
type = "huawei-token"
iam_url = "http://127.0.0.1"
username = "env:USERNAME"
password = "env:PASSWORD"
domain = "env:USERNAME"
"""
"""Every key of every table, with secrets by environment and file."""

SECRETS = {"USERNAME": "user-hunter2", "PASSWORD": "secret-hunter2"}

Read = Callable[..., Settings]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Loads a text as settings, with variables as keywords."""

    def read(text: str, **environ: str) -> Settings:
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        return load(path, VENDORS, environ)

    return read


def problems(read: Read, text: str, **environ: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(text, **environ)
    return caught.value.problems


def head(path: Path, word: str) -> list[str]:
    """What the comments at the head of a bad file say after a word."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.partition(f"# {word}: ")[2] for line in lines if line.startswith(f"# {word}: ")]


def a_source(read: Read, keys: str = "", **environ: str) -> Source:
    return read(SOURCE + keys, **environ).sources["kylin-prod"]


# What is wrong, and how that is said


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_bad_settings_are_told_at_once_in_the_words_at_the_head_of_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    overrides = dict(line.split("=", 1) for line in head(path, "env"))
    with pytest.raises(SettingsError) as caught:
        load(Path(path.name), VENDORS, ENVIRON | overrides)
    assert caught.value.problems == head(path, "expect")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_file_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: No such file or directory; name another"):
        load(tmp_path / "none.toml", VENDORS, {})


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Is a directory"):
        load(tmp_path, VENDORS, {})


@pytest.mark.parametrize(
    ("value", "why"), [("9" * 5000, "Exceeds the limit"), ("[" * 5000, "recursion")]
)
def test_a_value_of_absurd_size_is_told_like_any_other(read: Read, value: str, why: str) -> None:
    (problem,) = problems(read, f"{SOURCE}concurrency = {value}")
    assert why in problem


@pytest.mark.parametrize(
    ("text", "environ"),
    [
        ("a." * 3000 + "b = 1\n" + SOURCE, {}),
        (SOURCE, {"POLLER_SOURCES__KYLIN_PROD__PROJECTS": "[" * 100_000}),
        (SOURCE, {"POLLER_SOURCES__KYLIN_PROD__AUTH": "{a=" * 3000}),
        (SOURCE, {"POLLER_REDIS" + "__A" * 3000: "1"}),
    ],
    ids=["dotted keys", "JSON of a variable", "TOML of a variable", "name of a variable"],
)
def test_what_is_too_deep_is_told(read: Read, text: str, environ: dict[str, str]) -> None:
    (problem,) = problems(read, text, **environ)
    assert "too many tables or lists in each other" in problem


def test_a_file_too_large_for_settings_is_not_read_to_its_end() -> None:
    assert problems(lambda path: load(Path(path), VENDORS, {}), "/dev/zero") == [
        "/dev/zero: larger than 1 MiB; is it the settings file?"
    ]


def test_a_ca_bundle_that_cannot_be_looked_for_is_told(read: Read) -> None:
    (problem,) = problems(read, f'{SOURCE}verify_tls = "{"m" * 5000}"')
    assert problem.endswith("or the path of an existing file of CA certificates")


def test_text_from_the_environment_that_is_no_unicode_is_told(read: Read) -> None:
    assert problems(read, SOURCE, POLLER_POLLER__INSTANCE="\udc80") == [
        "poller: holds text that is not UTF-8 (see POLLER_POLLER__INSTANCE)"
    ]


# What is right


def test_the_least_settings_have_the_defaults_of_the_contract(read: Read) -> None:
    settings = read(SOURCE)
    assert settings.poller.instance
    assert settings.poller.journal == Path(".poller/journal.db")
    assert (settings.poller.drain_s, settings.poller.retention_s) == (10, 30 * 86400)
    assert (settings.redis, settings.mqtt) == (None, None)
    assert (settings.http.listen, settings.http.token) == ("127.0.0.1:8787", None)
    assert settings.sources == {
        "kylin-prod": Source(
            name="kylin-prod",
            vendor="kylin",
            url="https://kylin.example.com/kylin",
            auth=NoAuth(),
            interval_s=15,
            idle_interval_s=60,
            schedule="fixed",
            max_interval_s=60,
            resync_s=600,
            timeout_s=10,
            concurrency=8,
            rate_per_s=2,
            max_body=32 * 1024 * 1024,
            retry_refused_s=300,
            down_after=3,
            vanish_after=3,
            first_contact="active",
            verify_tls=True,
            options=Kylin(),
        )
    }


def test_sinks_have_the_defaults_of_the_contract(read: Read) -> None:
    settings = read(f'[redis]\nurl = "redis://r"\n[mqtt]\nurl = "mqtt://m/"\n{SOURCE}')
    redis, mqtt = settings.redis, settings.mqtt
    assert redis is not None
    assert redis.url.get_secret_value() == "redis://r"
    assert (redis.retention_s, redis.max_events) == (7 * 86400, 1_000_000)
    assert (redis.username, redis.password, redis.verify_tls) == (None, None, True)
    assert mqtt is not None
    assert (mqtt.url, mqtt.topic_prefix, mqtt.protocol) == ("mqtt://m", "jobs", "auto")
    assert (mqtt.username, mqtt.password, mqtt.verify_tls) == (None, None, True)
    assert mqtt.state_expiry_s == 7 * 86400


def test_the_file_that_comes_with_poller_works_as_it_stands() -> None:
    settings = load(ROOT / "settings.toml", VENDORS, {})
    assert {name: source.vendor for name, source in settings.sources.items()} == {
        name: name for name in VENDORS
    }
    assert all(source.auth == NoAuth() for source in settings.sources.values())
    assert [source.url for source in settings.sources.values()] == [
        f"http://127.0.0.1:{port}" for port in range(9001, 9006)
    ]


def test_the_file_that_comes_with_poller_states_the_defaults(read: Read) -> None:
    written = load(ROOT / "settings.toml", VENDORS, {})
    least = read(
        f'[redis]\nurl = "redis://127.0.0.1:6379/0"\n[mqtt]\nurl = "mqtt://127.0.0.1:1883"\n{SOURCE}'
    )
    assert written.model_copy(update={"sources": least.sources}) == least
    for source in written.sources.values():
        assert {name: getattr(source, name) for name in Defaults.model_fields} == dict(Defaults())


def test_what_is_commented_out_in_the_file_that_comes_with_poller_works_too(
    read: Read, tmp_path: Path
) -> None:
    table, lines = "", dict[str, dict[str, str]]()
    for line in (ROOT / "settings.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = line
        elif found := re.match(r"(?:# )?([a-z_.]+) = .*", line):
            lines.setdefault(table, {})[found[1]] = line.removeprefix("# ")
    text = "\n".join(row for table, keys in lines.items() for row in (table, *keys.values()))
    (tmp_path / "secret").write_text("x")
    identity = certificates.client(trustme.CA(), tmp_path, password="x")
    text = re.sub(r"/run/secrets/\w+", str(tmp_path / "secret"), text)
    text = re.sub(r"/etc/ssl/[\w.-]+\.key", str(identity.key), text)
    text = re.sub(r"/etc/ssl/[\w.-]+\.pem", str(identity.cert), text)
    names = re.findall("env:([A-Z_]+)", text)
    environ = dict.fromkeys(names, "x") | {
        "REDIS_URL": "rediss://:x@redis.example.com/0",
        "POLLER_MQTT__URL": "mqtts://mqtt.example.com",
    }
    settings = read(text, **environ)
    assert settings.http.listen == "0.0.0.0:8787"
    assert {type(source.auth) for source in settings.sources.values()} == {
        Basic,
        Token,
        HuaweiAkSk,
        HuaweiToken,
    }


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("100ms", 0.1),
        ("500ms", 0.5),
        ("10s", 10),
        ("1.5s", 1.5),
        ("5m", 300),
        ("2h", 7200),
        ("7d", 604_800),
        ("1h30m", 5400),
        ("3650d", 315_360_000),
    ],
)
def test_a_duration_is_read_as_seconds(read: Read, text: str, seconds: float) -> None:
    assert a_source(read, f'interval = "{text}"').interval_s == seconds


@pytest.mark.parametrize(
    ("text", "rate"), [("2/s", 2), ("120/m", 2), ("3600/h", 1), ("0.5/s", 0.5), ("1/h", 1 / 3600)]
)
def test_a_rate_is_read_per_second(read: Read, text: str, rate: float) -> None:
    assert a_source(read, f'rate = "{text}"').rate_per_s == rate


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512B", 512),
        ("1KB", 1000),
        ("2MB", 2_000_000),
        ("1KiB", 1024),
        ("32MiB", 33_554_432),
        ("1GiB", 1_073_741_824),
    ],
)
def test_a_size_is_read_as_bytes(read: Read, text: str, size: int) -> None:
    assert a_source(read, f'max_body = "{text}"').max_body == size


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://127.0.0.1:9003", "http://127.0.0.1:9003"),
        ("https://kylin.example.com/kylin/", "https://kylin.example.com/kylin"),
        ("https://[::1]:7070/a%20b", "https://[::1]:7070/a%20b"),
    ],
)
def test_a_source_url_loses_its_last_slash_and_nothing_else(
    read: Read, text: str, url: str
) -> None:
    settings = read(f'[sources.a]\nvendor = "scale"\nurl = "{text}"')
    assert settings.sources["a"].url == url


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1",
        "redis://127.0.0.1:6379/0",
        "redis://poller@127.0.0.1:6379/0",
        "rediss://redis.example.com:6380/1",
        "unix:///run/redis/redis.sock?db=1",
        "redis+sentinel://s1:26379,s2:26379,[::1]:26379/mymaster/0",
        "rediss+sentinel://s1/mymaster",
        "redis+cluster://n1:7000,n2:7001",
        "rediss+cluster://n1:7000",
    ],
)
def test_a_redis_url_may_have_any_scheme_that_redis_has(read: Read, url: str) -> None:
    redis = read(f'[redis]\nurl = "{url}"\n{SOURCE}').redis
    assert redis is not None
    assert redis.url.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@r",
        "unix://poller:hunter2@/run/redis.sock",
        "redis://r?password=hunter2",
        "redis+sentinel://s1,s2/mymaster?sentinel_password=hunter2",
        "redis+cluster://poller:hunter2@n1:7000,n2:7001",
    ],
)
def test_a_password_in_a_redis_url_must_not_be_in_the_file_but_may_be_in_a_secret(
    read: Read, url: str
) -> None:
    (problem,) = problems(read, f'[redis]\nurl = "{url}"\n{SOURCE}')
    assert problem.startswith("redis.url: holds a password; ")
    redis = read(f'[redis]\nurl = "env:URL"\n{SOURCE}', URL=url).redis
    assert redis is not None
    assert redis.url.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "redis://r:6379 /0",
        "redis://r:99999",
        "redis://r:0",
        "redis://[::1",
        "redis+sentinel:///mymaster",
        "redis+tcp://r",
        "valkey://r",
        "",
    ],
)
def test_a_redis_url_that_no_client_would_take_is_refused(read: Read, url: str) -> None:
    assert problems(read, f'[redis]\nurl = "{url}"\n{SOURCE}')[0].startswith("redis.url: must be")


@pytest.mark.parametrize(
    "listen", ["", "127.0.0.1:0", "127.9.9.9:80", "[::1]:8787", "localhost:8787"]
)
def test_loopback_needs_no_token(read: Read, listen: str) -> None:
    assert read(f'[http]\nlisten = "{listen}"\n{SOURCE}').http.listen == listen


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:80", "[::]:80", "10.0.0.1:80", "poller.example.com:80"]
)
def test_anything_but_loopback_needs_a_token(read: Read, listen: str) -> None:
    text = f'[http]\nlisten = "{listen}"\n'
    assert problems(read, text + SOURCE) == [
        "http.listen: is not loopback; set http.token, or listen on 127.0.0.1"
    ]
    assert read(f'{text}token = "env:T"\n{SOURCE}', T="x").http.listen == listen


@pytest.mark.parametrize(
    ("written", "auth"),
    [
        ('{ type = "none" }', NoAuth()),
        (
            '{ type = "basic", username = "ADMIN", password = "env:A" }',
            Basic(username="ADMIN", password=pydantic.SecretStr("a")),
        ),
        ('{ type = "bearer", token = "env:A" }', Bearer(token=pydantic.SecretStr("a"))),
        ('{ type = "token", token = "env:A" }', Token(token=pydantic.SecretStr("a"))),
        (
            '{ type = "huawei-token", iam_url = "https://iam.example.com/", username = "u", '
            'password = "env:A", domain = "d" }',
            HuaweiToken(
                iam_url="https://iam.example.com",
                username="u",
                password=pydantic.SecretStr("a"),
                domain="d",
            ),
        ),
        (
            '{ type = "huawei-aksk", access_key = "env:A", secret_key = "env:B" }',
            HuaweiAkSk(access_key=pydantic.SecretStr("a"), secret_key=pydantic.SecretStr("b")),
        ),
    ],
)
def test_every_kind_of_auth_is_read(read: Read, written: str, auth: Auth) -> None:
    assert a_source(read, f"auth = {written}", A="a", B="b").auth == auth


def test_a_source_overrides_the_defaults_and_the_others_keep_them(read: Read) -> None:
    text = f'[defaults]\ninterval = "1s"\ndown_after = 9\n{SOURCE}interval = "2s"\n'
    settings = read(f'{text}[sources.b]\nvendor = "scale"\nurl = "http://b"')
    one, two = settings.sources["kylin-prod"], settings.sources["b"]
    assert (one.interval_s, one.down_after) == (2, 9)
    assert (two.interval_s, two.down_after) == (1, 9)


def test_sources_keep_the_order_of_the_file(read: Read) -> None:
    text = "".join(f'[sources.{name}]\nvendor = "scale"\nurl = "http://x"\n' for name in "cab")
    assert list(read(text).sources) == ["c", "a", "b"]


def test_a_vendor_gets_its_own_keys(read: Read) -> None:
    text = '[sources.d]\nvendor = "datameer"\nurl = "http://d"\njobs = [17, 20]\n'
    source = read(f'{text}timezone = "Europe/Berlin"\nsweep_interval = "2m"').sources["d"]
    assert source.options == Datameer(timezone="Europe/Berlin", jobs=(17, 20), sweep_interval=120)


def test_a_file_of_ca_certificates_may_stand_for_verify_tls(
    read: Read, authority: trustme.CA, tmp_path: Path
) -> None:
    ca = certificates.bundle(authority, tmp_path)
    assert a_source(read, f'verify_tls = "{ca}"').verify_tls == ca
    assert a_source(read, "verify_tls = false").verify_tls is False


def test_a_certificate_of_ours_is_read_with_its_key_and_password(
    read: Read, authority: trustme.CA, tmp_path: Path
) -> None:
    identity = certificates.client(authority, tmp_path, password="hunter2")
    keys = (
        f'client_cert = "{identity.cert}"\nclient_key = "{identity.key}"\n'
        'client_key_password = "env:PASSPHRASE"\n'
    )
    settings = read(
        f'[redis]\nurl = "rediss+cluster://r"\n{keys}[mqtt]\nurl = "mqtts://m"\n{keys}'
        f"[defaults]\n{keys}{SOURCE}",
        PASSPHRASE="hunter2",
    )
    assert settings.redis is not None
    assert settings.mqtt is not None
    source = settings.sources["kylin-prod"]
    assert settings.redis.identity == settings.mqtt.identity == source.identity == identity
    assert "hunter2" not in f"{settings!r}"


def test_a_key_that_does_not_fit_is_told_at_its_place(
    read: Read, authority: trustme.CA, tmp_path: Path
) -> None:
    one = certificates.client(authority, tmp_path / "one")
    two = certificates.client(authority, tmp_path / "two", password="hunter2")
    pair = f'client_cert = "{one.cert}"\nclient_key = "{two.key}"\n'
    encrypted = f'client_cert = "{two.cert}"\nclient_key = "{two.key}"\n'
    text = (
        f'[redis]\nurl = "rediss://r"\n{encrypted}'
        f'[mqtt]\nurl = "mqtts://m"\n{encrypted}client_key_password = "env:WRONG"\n'
        f'{SOURCE}{pair}client_key_password = "env:RIGHT"\n'
    )
    assert problems(read, text, WRONG="hunter3", RIGHT="hunter2") == [
        f"mqtt.client_key_password: does not open the key in {two.key}",
        f"redis.client_key_password: missing: encrypted is the key in {two.key}",
        f"sources.kylin-prod.client_key: {two.key}: the key does not belong to the certificate in "
        f"{one.cert}",
    ]


def test_a_source_with_a_certificate_of_its_own_takes_no_part_of_the_defaults_one(
    read: Read, authority: trustme.CA, tmp_path: Path
) -> None:
    common = certificates.client(authority, tmp_path / "common")
    own = certificates.client(authority, tmp_path / "own", together=True)
    settings = read(
        f'[defaults]\nclient_cert = "{common.cert}"\nclient_key = "{common.key}"\n{SOURCE}'
        f'[sources.own]\nvendor = "scale"\nurl = "https://o"\nclient_cert = "{own.cert}"\n'
        '[sources.plain]\nvendor = "scale"\nurl = "http://127.0.0.1"\n'
    )
    assert {name: source.identity for name, source in settings.sources.items()} == {
        "kylin-prod": common,
        "own": own,
        "plain": None,
    }


def test_a_certificate_that_was_renewed_in_its_place_makes_it_another_source(
    read: Read, authority: trustme.CA, tmp_path: Path
) -> None:
    keys = f'client_cert = "{certificates.client(authority, tmp_path, together=True).cert}"'
    before = a_source(read, keys)
    assert a_source(read, keys) == before
    certificates.client(authority, tmp_path, together=True)
    assert a_source(read, keys) != before


def test_settings_cannot_be_changed(read: Read) -> None:
    source = a_source(read)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        source.interval_s = 1


def test_a_byte_order_mark_does_no_harm(read: Read) -> None:
    assert read("\ufeff" + SOURCE).sources


# The environment


@pytest.mark.parametrize(
    ("variable", "value", "attribute", "expected"),
    [
        ("INTERVAL", "2s", "interval_s", 2),
        ("CONCURRENCY", "2", "concurrency", 2),
        ("VERIFY_TLS", "false", "verify_tls", False),
        ("FIRST_CONTACT", "all", "first_contact", "all"),
        ("URL", "http://127.0.0.1:9003", "url", "http://127.0.0.1:9003"),
        ("PROJECTS", '["a", "b"]', "options", Kylin(projects=("a", "b"))),
        ("PROJECTS", "['a', 'b']", "options", Kylin(projects=("a", "b"))),
        ("PAGED", "false", "options", Kylin(paged=False)),
        ("EXTRA_TOKEN", "env:T", "options", Kylin(extra_token=pydantic.SecretStr("t"))),
        (
            "AUTH",
            '{"type": "token", "token": "env:T"}',
            "auth",
            Token(token=pydantic.SecretStr("t")),
        ),
        (
            "AUTH",
            "{ type = 'token', token = 'env:T' }",
            "auth",
            Token(token=pydantic.SecretStr("t")),
        ),
    ],
)
def test_a_variable_wins_over_the_file_in_the_type_that_its_key_has(
    read: Read, variable: str, value: str, attribute: str, expected: object
) -> None:
    keys = 'interval = "9s"\nconcurrency = 9\nfirst_contact = "none"\n'
    environ = {f"POLLER_SOURCES__KYLIN_PROD__{variable}": value, "T": "t"}
    assert getattr(a_source(read, keys, **environ), attribute) == expected


@pytest.mark.parametrize("value", ["42", "true", "1_000", "2020-01-01", "nan", "null", "a = b"])
def test_what_looks_like_a_number_stays_text_where_text_is_wanted(read: Read, value: str) -> None:
    settings = read(SOURCE, POLLER_POLLER__INSTANCE=value)
    assert settings.poller.instance == value


def test_a_variable_for_the_defaults_is_for_every_source(read: Read) -> None:
    assert a_source(read, POLLER_DEFAULTS__CONCURRENCY="3").concurrency == 3


def test_a_table_set_whole_is_refined_by_variables_for_its_keys(read: Read) -> None:
    redis = read(
        f'[redis]\nurl = "redis://file"\nmax_events = 1\n{SOURCE}',
        POLLER_REDIS='{"url": "redis://whole", "retention": "2d"}',
        POLLER_REDIS__URL="redis://key",
    ).redis
    assert redis is not None
    assert redis.url.get_secret_value() == "redis://key"
    assert (redis.retention_s, redis.max_events) == (2 * 86400, 1_000_000)


def test_variables_alone_can_make_a_table_and_a_source(read: Read) -> None:
    settings = read(
        "",
        POLLER_MQTT__URL="mqtts://broker.example.com",
        POLLER_SOURCES__SCALE_TEST__VENDOR="scale",
        POLLER_SOURCES__SCALE_TEST__URL="https://scale.example.com/api",
        POLLER_SOURCES__SCALE_TEST__AUTH__TYPE="token",
        POLLER_SOURCES__SCALE_TEST__AUTH__TOKEN="env:T",
        T="t",
    )
    assert settings.mqtt is not None
    assert settings.mqtt.url == "mqtts://broker.example.com"
    assert settings.sources["scale_test"].auth == Token(token=pydantic.SecretStr("t"))


def test_a_table_from_a_variable_takes_the_place_of_what_is_no_table(read: Read) -> None:
    source = a_source(read, 'auth = "basic"', POLLER_SOURCES__KYLIN_PROD__AUTH__TYPE="none")
    assert source.auth == NoAuth()


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("kylin-prod", "KYLIN_PROD"),
        ("a--b", "A__B"),
        ("a-", "A_"),
        ("a__b-c", "A__B_C"),
    ],
)
def test_a_source_is_found_by_its_name_in_capitals(read: Read, name: str, variable: str) -> None:
    settings = read(
        f'{SOURCE.replace("kylin-prod", name)}[sources.a]\nvendor = "scale"\nurl = "http://x"',
        **{f"POLLER_SOURCES__{variable}__INTERVAL": "2s"},
    )
    assert {name: source.interval_s for name, source in settings.sources.items()} == {
        name: 2,
        "a": 15,
    }


def test_a_source_can_be_replaced_whole(read: Read) -> None:
    whole = '{"vendor": "scale", "url": "http://x"}'
    assert a_source(read, POLLER_SOURCES__KYLIN_PROD=whole).vendor == "scale"


@pytest.mark.parametrize(
    "variable",
    [
        "POLLER_SERVICE_HOST",
        "POLLER_SERVICE_PORT",
        "POLLER_SERVICE_PORT_HTTP",
        "POLLER_PORT",
        "POLLER_PORT_8787_TCP",
        "POLLER_PORT_8787_TCP_ADDR",
        "POLLER_BOARD_SERVICE_HOST",
    ],
)
def test_what_kubernetes_sets_for_a_service_called_poller_is_left_alone(
    read: Read, variable: str
) -> None:
    assert read(SOURCE, **{variable: "tcp://10.0.0.1:8787"}) == read(SOURCE)


def test_a_variable_that_some_value_refers_to_is_no_override(read: Read) -> None:
    settings = read(
        f'[http]\ntoken = "env:POLLER_HTTP__TOKEN"\n{SOURCE}',
        POLLER_HTTP__TOKEN="a",
        POLLER_SOURCES__KYLIN_PROD__EXTRA_TOKEN="env:POLLER_TOKEN",
        POLLER_TOKEN="b",
    )
    assert settings.http.token == pydantic.SecretStr("a")
    assert settings.sources["kylin-prod"].options == Kylin(extra_token=pydantic.SecretStr("b"))


def test_variables_of_others_are_left_alone(read: Read) -> None:
    assert read(SOURCE, POLLERX="1", MY_POLLER_REDIS__URL="2", poller_x="3") == read(SOURCE)


# Secrets


@pytest.mark.parametrize(
    ("content", "secret"),
    [(b"s3cret", "s3cret"), (b"s3cret\n", "s3cret"), (b"s3cret\r\n", "s3cret"), (b" s \n", " s ")],
)
def test_a_secret_from_a_file_loses_one_line_break(
    read: Read, tmp_path: Path, content: bytes, secret: str
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    auth = a_source(read, f'auth = {{ type = "token", token = "file:{file}" }}').auth
    assert auth == Token(token=pydantic.SecretStr(secret))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"hunter2\n\n", "holds a line break or another control character"),
        (b"hunter2\xff", "is not UTF-8 text"),
        (b"hunter2" * 10_000, "is larger than 64 KiB, too large for a secret"),
    ],
)
def test_a_file_that_holds_no_secret_is_told(
    read: Read, tmp_path: Path, content: bytes, why: str
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    text = f'auth = {{ type = "token", token = "file:{file}" }}'
    assert problems(read, SOURCE + text) == [
        f"sources.kylin-prod.auth.token: file {file} {why}",
    ]


def test_names_of_users_may_be_secrets_too(read: Read) -> None:
    auth = a_source(
        read, 'auth = { type = "basic", username = "env:U", password = "env:P" }', U="u", P="p"
    ).auth
    assert auth == Basic(username="u", password=pydantic.SecretStr("p"))


@pytest.fixture
def full(
    read: Read, authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Read:
    """Reads settings beside which the files lie that `FULL` refers to."""
    monkeypatch.chdir(tmp_path)
    certificates.client(authority, tmp_path, password="secret-hunter2")
    (tmp_path / "username").write_text("user-hunter2")
    (tmp_path / "password").write_text("secret-hunter2")
    return read


def test_settings_never_show_a_secret(full: Read) -> None:
    settings = full(FULL, **SECRETS)
    assert settings.sources["iam"].auth == HuaweiToken(
        iam_url="http://127.0.0.1",
        username="user-hunter2",
        password=pydantic.SecretStr("secret-hunter2"),
        domain="user-hunter2",
    )
    assert "hunter2" not in f"{settings!r} {settings} {settings.sources}"
    assert "secret-hunter2" not in f"{settings.model_dump()} {settings.model_dump_json()}"


ANY_TEXT = {"instance", "journal", "topic_prefix", "username", "domain", "project_id", "cluster_id"}


def leaves(table: dict[str, Any], *place: str) -> Iterator[tuple[str, ...]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, *place, key)
        else:
            yield (*place, key)


@pytest.mark.parametrize(
    "planted",
    ["hunter2", "env:hunter-2\thunter2", "redis://u:hunter2@h", "mqtt://u:hunter2@h", "[hunter2"],
)
@pytest.mark.parametrize(
    "place",
    [place for place in leaves(tomllib.loads(FULL)) if place[-1] not in ANY_TEXT],
    ids=".".join,
)
def test_no_problem_shows_a_secret_that_was_put_in_the_wrong_place(
    full: Read, place: tuple[str, ...], planted: str
) -> None:
    variable = "POLLER_" + "__".join(place).upper()
    with pytest.raises(SettingsError) as caught:
        full(FULL, **SECRETS, **{variable: planted})
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert variable in str(caught.value)


@pytest.mark.parametrize("line", ["password = hunter2", 'password = "hunter2', "hunter2"])
def test_no_syntax_error_shows_a_secret(read: Read, line: str) -> None:
    (problem,) = problems(read, f"[redis]\n{line}\n")
    assert re.search(r"at line \d+, column \d+", problem)
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("mode", "owner", "exposed"),
    [
        (0o600, None, False),
        (0o400, None, False),
        (0o644, None, True),
        (0o604, None, True),
        (0o640, 1, True),
        (0o640, 0, False),
        (0o644, 0, True),
    ],
)
def test_files_with_secrets_that_others_may_read_are_known_and_used(
    *, read: Read, tmp_path: Path, mode: int, owner: int | None, exposed: bool
) -> None:
    file, link = tmp_path / "secret", tmp_path / "link"
    file.write_text("hunter2")
    link.symlink_to(file)
    file.chmod(mode)
    if owner is not None:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(file, owner, 0)
    settings = read(
        f'[mqtt]\nurl = "mqtt://m"\nusername = "file:{file}"\n'
        f'{SOURCE}auth = {{ type = "token", token = "file:{link}" }}'
    )
    assert settings.sources["kylin-prod"].auth == Token(token=pydantic.SecretStr("hunter2"))
    assert settings.exposed == ((link, file) if exposed else ())


@pytest.mark.parametrize("together", [True, False])
def test_a_private_key_that_others_may_read_is_exposed_and_a_certificate_is_not(
    read: Read, authority: trustme.CA, tmp_path: Path, together: bool
) -> None:
    identity = certificates.client(authority, tmp_path, together=together)
    holder = identity.key or identity.cert
    keys = f'client_cert = "{identity.cert}"\n'
    if identity.key:
        keys += f'client_key = "{identity.key}"\n'
    identity.cert.chmod(0o644)
    holder.chmod(0o600)
    assert read(SOURCE + keys).exposed == ()
    holder.chmod(0o644)
    assert read(SOURCE + keys).exposed == (holder,)


# Reload, building by code, schema


def test_settings_are_read_anew_every_time(read: Read) -> None:
    first = read(SOURCE, POLLER_DEFAULTS__INTERVAL="1s")
    second = read(SOURCE, POLLER_DEFAULTS__INTERVAL="2s")
    problems(read, SOURCE, POLLER_DEFAULTS__INTERVAL="3")
    assert first.sources["kylin-prod"].interval_s == 1
    assert second.sources["kylin-prod"].interval_s == 2
    assert read(SOURCE, POLLER_DEFAULTS__INTERVAL="1s") == first


def test_code_builds_values_by_the_names_of_attributes_and_is_checked_too() -> None:
    source = Source(name="a", vendor="scale", url="http://a/", interval_s=0.5, max_body=10)
    assert (source.url, source.interval_s, source.max_body) == ("http://a", 0.5, 10)
    url = pydantic.SecretStr("redis://:p@redis.example.com")
    assert Redis(url=url, retention_s=1).url == url
    with pytest.raises(pydantic.ValidationError, match="at least 100ms"):
        Source(name="a", vendor="scale", url="http://a", interval_s=0.01)
    with pytest.raises(pydantic.ValidationError, match="never as the secret itself") as caught:
        Token.model_validate({"token": "hunter2"})
    assert "hunter2" not in str(caught.value)


SCHEMA = schema(VENDORS)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "text", [(ROOT / "settings.toml").read_text(encoding="utf-8"), FULL], ids=["comes", "full"]
)
def test_the_schema_accepts_what_is_right(text: str) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(tomllib.loads(text))


@pytest.mark.parametrize(
    "name",
    [
        "auth-type",
        "counts",
        "defaults-once",
        "durations",
        "missing",
        "no-sources-in-table",
        "not-tables",
        "rates",
        "secret-literal",
        "sizes",
        "source-names",
        "unknown-keys",
        "unknown-table",
        "vendor",
        "vendor-options",
        "words",
    ],
)
def test_the_schema_refuses_what_is_wrong_by_its_shape(name: str) -> None:
    path = Path(__file__).parent / "settings" / f"bad-{name}.toml"
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(written)


def test_the_schema_states_defaults_as_they_are_written() -> None:
    keys = SCHEMA["$defs"]["Defaults"]["properties"]
    assert {key: keys[key]["default"] for key in ("interval", "rate", "max_body")} == {
        "interval": "15s",
        "rate": "120/m",
        "max_body": "32MiB",
    }
