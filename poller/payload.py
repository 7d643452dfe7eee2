"""Reads untrusted payloads: typed rows of which bad ones are set aside, loose instants."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from poller.errors import Invalid
from poller.runs import Ms

E = TypeVar("E")
R = TypeVar("R")

_LAST_MS = 253_402_300_799_999  # 9999-12-31T23:59:59.999Z
MOST_ROWS = 100_000
"""In one answer; vendors' own pages have 1,000 at most, and lists without pages seldom 10,000."""
_MOST_VALUES = 2_000_000
"""In one answer; what takes two bytes there may take a hundred here."""
_REPAIRABLE = re.compile(rb"[:\[,]\s*-?(?:NaN|Infinity)\b|\\u[dD][89a-fA-F]")


def decode(body: bytes, shape: type[R]) -> R:
    """Decode one JSON document into a type.

    Raises:
        Invalid: not JSON, HTML instead, or another shape; the message names the place.
    """
    return _decode(body, msgspec.json.Decoder(shape))


def _decode(body: bytes, decoder: msgspec.json.Decoder[R]) -> R:
    _check_values(body)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Invalid(f"not the documented shape: {error}", body) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(body, error) from error


def _check_values(body: bytes) -> None:
    """Refuse a body of more values than fit into memory; each follows one of these."""
    if len(body) > _MOST_VALUES and sum(map(body.count, b",[{")) > _MOST_VALUES:
        raise Invalid(f"more than {_MOST_VALUES} values in one answer", body)


def _not_json(body: bytes, error: Exception) -> Invalid:
    start = body[:256].lstrip()
    if not start:
        return Invalid("an empty answer instead of JSON")
    if start.startswith(b"<"):
        return Invalid("an HTML page instead of JSON (a login page? a wrong url?)", body)
    return Invalid(f"not JSON: {error}", body)


class Table(Generic[E, R]):
    """Reads a document that holds rows; a row that does not fit is set aside, the others are read.

    Args:
        envelope: type of the document with typed rows, e.g. `Listing[Row]`.
        loose: the same with rows left raw, e.g. `Listing[msgspec.Raw]`.
        row: type of one row.
        rows: takes the list of rows out of either.
        at: JSON path of the list, for messages, e.g. `$.results`.
    """

    def __init__(
        self,
        envelope: type[E],
        loose: type[Any],
        row: type[R],
        rows: Callable[[Any], list[Any]],
        at: str,
    ) -> None:
        self._envelope = msgspec.json.Decoder(envelope)
        self._loose = msgspec.json.Decoder(loose)
        self._row = msgspec.json.Decoder(row)
        self._rows = rows
        self._at = at

    def read(self, body: bytes) -> tuple[E, list[R], list[tuple[str, str]]]:
        """Envelope, good rows, and (JSON path, what is wrong) of each bad one.

        The envelope's own rows are not to be used: where a row was bad, they are raw.

        Raises:
            Invalid: the document itself is not as documented, or too long.
        """
        _check_values(body)
        try:
            envelope = self._envelope.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._salvage(body)
        return envelope, self._counted(envelope, body), []

    def _counted(self, envelope: Any, body: bytes) -> list[Any]:
        rows = self._rows(envelope)
        if len(rows) > MOST_ROWS:
            raise Invalid(f"more than {MOST_ROWS} rows at {self._at}", body)
        return rows

    def _salvage(self, body: bytes) -> tuple[E, list[R], list[tuple[str, str]]]:
        try:
            envelope = _decode(body, self._loose)
        except Invalid as invalid:
            envelope = _decode(_repaired(body, invalid), self._loose)
        good: list[R] = []
        bad: list[tuple[str, str]] = []
        for number, raw in enumerate(self._counted(envelope, body)):
            try:
                good.append(self._row.decode(raw))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                place, _, rest = str(error).rpartition(" - at `$")
                why, at = (place, rest.rstrip("`")) if place else (str(error), "")
                bad.append((f"{self._at}[{number}]{at}", why))
        return envelope, good, bad


def _repaired(body: bytes, invalid: Invalid) -> bytes:
    """The document without what lax servers write: NaN becomes null, half a surrogate pair `?`."""
    if not _REPAIRABLE.search(body):
        raise invalid
    try:
        document = json.loads(body, parse_constant=lambda _: None)
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
    except (ValueError, RecursionError):
        raise invalid from None


def epoch_ms(value: object) -> Ms | None:
    """Epoch milliseconds (a number, or digits in a string) or ISO 8601 text; None for unset.

    0, negative numbers, empty strings, and instants past the year 9999 are unset.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return int(value) if 1 <= value <= _LAST_MS else None
    if isinstance(value, str):
        text = value.strip()
        if text.isascii() and text.isdigit():
            return epoch_ms(int(text[:20]))
        return iso_ms(text)
    return None


def iso_ms(text: str | None) -> Ms | None:
    """An ISO 8601 instant (without zone: UTC) in ms, cut not rounded; None if it is not one."""
    if not text:
        return None
    try:
        instant = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return instant_ms(instant)


def instant_ms(instant: datetime.datetime) -> Ms | None:
    """A datetime (without zone: UTC) in epoch milliseconds, cut not rounded.

    None up to 1970 and past the year 9999.
    """
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=datetime.UTC)
    since = instant - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    ms = since // datetime.timedelta(milliseconds=1)
    return ms if 0 < ms <= _LAST_MS else None


def text_of(value: object) -> str | None:
    """A non-empty text or number as text; None otherwise."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None
