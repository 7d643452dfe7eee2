"""How single values are written in settings, as types for pydantic models.

Every message is a sentence about the value that never quotes it: it may be a secret in the wrong
place. Checks that need the environment find it in the validation context; without a context the
value comes from code, which may give numbers as numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, TypeAlias, TypeGuard, TypeVar
from urllib.parse import parse_qs, urlsplit

import durationpy
from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    SecretStr,
    ValidationInfo,
    WrapValidator,
)
from pydantic.json_schema import WithJsonSchema

from poller import tls

N = TypeVar("N", int, float)

_DURATION = r"([0-9]{1,9}(\.[0-9]{1,9})?(ms|s|m|h|d))+"
_RATE = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)/([smh])"
_SIZE = r"([0-9]{1,9})(B|KB|MB|KiB|MiB|GiB)"

_LONGEST_S = 3650 * 86400
_SECRET_BYTES = 64 * 1024
_UNIT_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_UNIT_S = {"s": 1, "m": 60, "h": 3600}
_REDIS_SCHEMES = tuple(
    f"redis{tls}{kind}" for kind in ("", "+sentinel", "+cluster") for tls in ("", "s")
)


def seconds(text: str) -> float:
    """`"500ms"`, `"10s"`, `"5m"`, `"2h"`, `"7d"`, `"1h30m"` in seconds; ValueError otherwise."""
    # durationpy alone skips what it does not know between two parts, and takes "1mm" for a month.
    if not re.fullmatch(_DURATION, text):
        raise ValueError('must be a duration such as "500ms", "10s", "5m", "2h" or "7d"')
    number = float(durationpy.from_str(text).total_seconds())
    if not 0 < number <= _LONGEST_S:
        raise ValueError("must be longer than nothing and at most 3650d")
    return number


def per_second(text: str) -> float:
    """`"2/s"`, `"120/m"`, `"3600/h"` as a number per second; ValueError otherwise."""
    found = re.fullmatch(_RATE, text)
    if not found or not float(found[1]):
        raise ValueError('must be a rate such as "2/s", "120/m" or "3600/h", more than nothing')
    return float(found[1]) / _UNIT_S[found[2]]


def size(text: str) -> int:
    """`"32MiB"`, `"500KB"`, … in bytes; ValueError otherwise."""
    found = re.fullmatch(_SIZE, text)
    if not found or not int(found[1]):
        raise ValueError('must be a size such as "512KiB", "32MiB" or "1GiB", more than nothing')
    return int(found[1]) * _UNIT_BYTES[found[2]]


def at_least(text: str) -> AfterValidator:
    """Refuse durations shorter than this one."""
    least = seconds(text)

    def check(number: float) -> float:
        if number < least:
            raise ValueError(f"must be at least {text}")
        return number

    return AfterValidator(check)


def url(*schemes: str, path: bool = False) -> AfterValidator:
    """Take nothing but scheme, host, port and perhaps a path; drop a slash at the end."""
    shape = f"{' or '.join(f'{scheme}://' for scheme in schemes)}host[:port]{'[/path]' * path}"

    def check(text: str) -> str:
        try:
            parts = urlsplit(text)
            fits = bool(parts.hostname) and parts.scheme in schemes and parts.port != 0
        except ValueError:
            raise ValueError(f"must be {shape} and nothing more") from None
        if "@" in parts.netloc:
            raise ValueError("must not hold credentials; they have keys of their own")
        plain = text.isprintable() and not re.search(r"[?#\s]", text)
        if not fits or not plain or not (path or parts.path in ("", "/")):
            raise ValueError(f"must be {shape} and nothing more")
        return text.rstrip("/")

    return AfterValidator(check)


def has_tls(url: str | SecretStr) -> bool:
    """Whether a url of any kind that settings know asks for TLS."""
    text = url if isinstance(url, str) else url.get_secret_value()
    return re.match("https|rediss|mqtts", text) is not None


def topic(text: str) -> str:
    """The text, if MQTT topics may begin with it; ValueError otherwise."""
    if re.search(r"[+#\x00-\x1f\x7f-\x9f]", text) or text.startswith("$"):
        raise ValueError("must hold no + # or control characters, and not start with $")
    if "" in text.split("/"):
        raise ValueError("must hold no empty level: nothing, / at an end, or //")
    return text


def level(text: str) -> str:
    """The text, if it can be one level of an MQTT topic; ValueError otherwise."""
    if "/" in text:
        raise ValueError("must hold no /: it becomes one level of an MQTT topic")
    return topic(text)


def file_path(path: Path) -> Path:
    """The path, if it can be a file's; ValueError otherwise."""
    if not path.name:
        raise ValueError("must be the path of a file")
    return path


def address(text: str, info: ValidationInfo) -> str:
    """`host:port`, `[IPv6]:port` or nothing; not loopback only if the field `token` is set."""
    found = re.fullmatch(r"(?:\[([^\[\]\s]+)\]|([^:\[\]\s]+)):([0-9]{1,5})", text)
    if text and (not found or int(found[3]) > 65535):
        raise ValueError('must be "host:port" or "[IPv6]:port", or "" to turn it off')
    # A token that was refused is not in `data`, and has its own line.
    if found and info.data.get("token", ...) is None and not _loopback(found[1] or found[2]):
        raise ValueError("is not loopback; set http.token, or listen on 127.0.0.1")
    return text


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key(name: str, text: str, read: Callable[[str], N]) -> N:
    """A field that settings know under this name, with this default as settings write it."""
    field: N = Field(read(text), validation_alias=name, json_schema_extra={"default": text})
    return field


def _number(read: Callable[[str], float]) -> PlainValidator:
    def take(value: object, info: ValidationInfo) -> float:
        if info.context is None and isinstance(value, int | float):
            return value
        return read(value if isinstance(value, str) else "")

    return PlainValidator(take)


def _refers(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("env:", "file:"))


def _resolve(reference: str, info: ValidationInfo) -> str:
    kind, _, name = reference.partition(":")
    # What is no variable's name may be the secret itself.
    if not name or (kind == "env" and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)):
        raise ValueError('must be written "env:NAME" or "file:/path"')
    environ: Mapping[str, str] = info.context or {}
    place = f"environment variable {name}" if kind == "env" else f"file {name}"
    text = environ.get(name, "") if kind == "env" else _content(Path(name))
    if not text:
        raise ValueError(f"{place} is {'not set or ' * (kind == 'env')}empty")
    if not text.isprintable():
        raise ValueError(f"{place} holds a line break or another control character")
    return text


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_SECRET_BYTES + 1)
        if len(content) > _SECRET_BYTES:
            raise ValueError(f"file {path} is larger than 64 KiB, too large for a secret")
        return content.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise ValueError(f"file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"file {path} is not UTF-8 text") from None


# Secrets wrap pydantic's own reading instead of replacing it, so that they are dumped as stars.
def _secret(value: object, _: object, info: ValidationInfo) -> SecretStr:
    if isinstance(value, SecretStr):
        return value
    if not isinstance(value, str) or not _refers(value):
        raise ValueError('must be written "env:NAME" or "file:/path", never as the secret itself')
    return SecretStr(_resolve(value, info))


def _header_secret(value: object, other: object, info: ValidationInfo) -> SecretStr:
    secret = _secret(value, other, info)
    if not secret.get_secret_value().isascii():
        raise ValueError("holds characters that are not ASCII, which HTTP headers cannot carry")
    return secret


def _name(value: str, info: ValidationInfo) -> str:
    text = _resolve(value, info) if _refers(value) else value
    if not text:
        raise ValueError("must not be empty")
    return text


def _trust(value: object) -> bool | Path:
    if isinstance(value, bool):
        return value
    if not _is_file(value):
        raise ValueError("must be true, false, or the path of an existing file of CA certificates")
    try:
        tls.context(Path(value))
    except tls.Unusable as error:
        raise ValueError(str(error)) from error
    return Path(value)


def _pem(value: object) -> Path:
    # What is no file is not named: it may be a key itself.
    if _is_file(value):
        return Path(value)
    raise ValueError("must be the path of an existing PEM file")


def _is_file(value: object) -> TypeGuard[str | Path]:
    with suppress(OSError):  # a folder that may not be entered, a name too long
        return isinstance(value, str | Path) and Path(value).is_file()
    return False


def _redis_url(value: object, _: object, info: ValidationInfo) -> SecretStr:
    if isinstance(value, SecretStr):
        return value
    written = value if isinstance(value, str) else ""
    text = _resolve(written, info) if _refers(written) else written
    try:
        fits = _fits_redis(text)
    except ValueError:
        # Never urlsplit's own message: it may quote a password.
        fits = False
    if not fits:
        raise ValueError(
            "must be redis://host:port/database, or the like with rediss, redis+sentinel, "
            "redis+cluster or unix"
        )
    if not _refers(written) and _holds_password(text):
        raise ValueError('holds a password; write the url, or the key password, as "env:NAME"')
    return SecretStr(text)


def _fits_redis(text: str) -> bool:
    parts = urlsplit(text)
    if " " in text or not text.isprintable():
        return False
    if parts.scheme == "unix":
        return len(parts.path) > 1
    # Sentinel and Cluster may list several hosts, which is no host and port to urlsplit.
    host = "+" in parts.scheme or (parts.hostname and parts.port != 0)
    return parts.scheme in _REDIS_SCHEMES and bool(parts.netloc and host)


def _holds_password(text: str) -> bool:
    parts = urlsplit(text)
    user, _, _ = parts.netloc.rpartition("@")
    return ":" in user or any("password" in name for name in parse_qs(parts.query))


Seconds: TypeAlias = Annotated[
    float, _number(seconds), WithJsonSchema({"type": "string", "pattern": f"^{_DURATION}$"})
]
"""A duration, written `"500ms"`, `"10s"`, `"5m"`, `"2h"` or `"7d"`; never zero."""

PerSecond: TypeAlias = Annotated[
    float, _number(per_second), WithJsonSchema({"type": "string", "pattern": f"^{_RATE}$"})
]
"""A rate, written `"2/s"`, `"120/m"` or `"3600/h"`; never zero."""

Bytes: TypeAlias = Annotated[
    int, _number(size), WithJsonSchema({"type": "string", "pattern": f"^{_SIZE}$"})
]
"""A size, written `"512KiB"` or `"32MiB"`; never zero."""

Count: TypeAlias = Annotated[int, Field(ge=1, le=10**9)]

_Reference = WithJsonSchema({"type": "string", "pattern": "^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$"})

Secret: TypeAlias = Annotated[SecretStr, WrapValidator(_secret), _Reference]
"""A secret, written `"env:NAME"` or `"file:/path"` and resolved while settings are read."""

HeaderSecret: TypeAlias = Annotated[SecretStr, WrapValidator(_header_secret), _Reference]
"""The same for one that is sent as it is in an HTTP header."""

Name: TypeAlias = Annotated[str, AfterValidator(_name)]
"""A text that may be written like a secret too; keep it out of `repr`."""

Trust: TypeAlias = Annotated[
    bool | Path, PlainValidator(_trust), WithJsonSchema({"type": ["boolean", "string"]})
]
"""Whether to verify a server's certificate, or the file of CA certificates to verify it by."""

Pem: TypeAlias = Annotated[Path, PlainValidator(_pem), WithJsonSchema({"type": "string"})]
"""A file with a certificate or a private key; whether they fit is for the table to say."""

RedisUrl: TypeAlias = Annotated[
    SecretStr, WrapValidator(_redis_url), WithJsonSchema({"type": "string"})
]
"""A url with any of Redis' schemes, with a password in it only if it is written like a secret."""
