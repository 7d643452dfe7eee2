"""Untrusted payloads: what is good is read, what is bad is named."""

from __future__ import annotations

import datetime
import json
import math
import time
from contextlib import suppress
from typing import Any, Generic, TypeVar
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.errors import Invalid
from poller.payload import MOST_ROWS, Table, decode, epoch_ms, instant_ms, iso_ms, text_of

R = TypeVar("R")


class Row(msgspec.Struct):
    id: int
    name: str = ""
    share: float | None = None


class Listing(msgspec.Struct, Generic[R]):
    total: int
    rows: list[R]


TABLE = Table(Listing[Row], Listing[msgspec.Raw], Row, lambda page: page.rows, "$.rows")


def listing(*rows: str) -> bytes:
    return f'{{"total": {len(rows)}, "rows": [{", ".join(rows)}]}}'.encode()


# Tables


def test_every_good_row_is_read() -> None:
    envelope, rows, bad = TABLE.read(listing('{"id": 1, "name": "a"}', '{"id": 2}'))
    assert envelope.total == 2
    assert rows == [Row(1, "a"), Row(2)]
    assert bad == []


def test_bad_rows_are_set_aside_with_their_places_and_the_others_are_read() -> None:
    envelope, rows, bad = TABLE.read(
        listing('{"id": 1}', '{"id": "two"}', '{"name": "x"}', "null", '{"id": 5}', '{"id": 6.5}')
    )
    assert envelope.total == 6
    assert rows == [Row(1), Row(5)]
    assert bad == [
        ("$.rows[1].id", "Expected `int`, got `str`"),
        ("$.rows[2]", "Object missing required field `id`"),
        ("$.rows[3]", "Expected `object`, got `null`"),
        ("$.rows[5].id", "Expected `int`, got `float`"),
    ]


def test_a_row_that_is_no_utf_8_costs_no_other_row() -> None:
    body = listing('{"id": 1}', '{"id": 2, "name": "?"}', '{"id": 3}').replace(b"?", b"\xff")
    _, rows, bad = TABLE.read(body)
    assert rows == [Row(1), Row(3)]
    assert [at for at, _ in bad] == ["$.rows[1]"]


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_has_not_is_read_as_null(token: str) -> None:
    _, rows, bad = TABLE.read(listing(f'{{"id": 1, "share": {token}}}', '{"id": 2, "share": 0.5}'))
    assert [row.share for row in rows] == [None, 0.5]
    assert bad == []


def test_bad_rows_and_tokens_that_json_has_not_may_come_together() -> None:
    _, rows, bad = TABLE.read(listing('{"id": "one"}', '{"id": 2, "share":NaN}'))
    assert rows == [Row(2)]
    assert [at for at, _ in bad] == ["$.rows[0].id"]


def test_a_text_that_speaks_of_nan_is_left_alone() -> None:
    _, rows, _ = TABLE.read(listing('{"id": 1, "name": "x, NaN", "share": NaN}'))
    assert rows == [Row(1, "x, NaN")]


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "\\ud83d\\ud83d"])
def test_half_a_surrogate_pair_spoils_one_text_and_no_page(half: str) -> None:
    _, rows, bad = TABLE.read(listing(f'{{"id": 1, "name": "a{half}b"}}', '{"id": 2}'))
    name = rows[0].name
    assert (name[0], name[-1], set(name[1:-1])) == ("a", "b", {"?"})
    assert rows[1] == Row(2)
    assert bad == []


def test_whole_surrogate_pairs_are_read_as_one_character() -> None:
    _, rows, _ = TABLE.read(listing('{"id": 1, "name": "\\ud83d\\ude00"}'))
    assert rows[0].name == "😀"


@pytest.mark.parametrize("digits", [19, 20, 30, 300])
def test_a_huge_number_is_read_or_set_aside_but_fails_nothing(digits: int) -> None:
    number = int("9" * digits)
    _, rows, bad = TABLE.read(listing(f'{{"id": {number}}}', '{"id": 2}'))
    assert rows in ([Row(number), Row(2)], [Row(2)])
    assert len(rows) + len(bad) == 2


def test_a_number_of_five_thousand_digits_is_a_bad_row() -> None:
    _, rows, bad = TABLE.read(listing(f'{{"id": {"9" * 5000}}}', '{"id": 2}'))
    assert rows == [Row(2)]
    assert [at for at, _ in bad] == ["$.rows[0].id"]


def test_more_rows_than_any_vendor_has_are_refused_before_they_are_read() -> None:
    rows = ['{"id": 1}'] * MOST_ROWS
    assert len(TABLE.read(listing(*rows))[1]) == MOST_ROWS
    for row in ('{"id": 1}', '{"id": "x"}'):  # a bad one takes another way
        with pytest.raises(Invalid, match=r"more than 100000 rows at \$\.rows"):
            TABLE.read(listing(*rows, row))


@pytest.mark.parametrize("value", [b"1,", b"[],", b"[[[[]]]],", b"{},"])
def test_more_values_than_fit_into_memory_are_refused_before_they_are_read(value: bytes) -> None:
    values = value * (
        2_000_000 // len(value.replace(b"]", b"").replace(b"}", b"").replace(b"1", b""))
    )
    body = b"[" + values + value + b"0]"
    with pytest.raises(Invalid, match="more than 2000000 values in one answer"):
        decode(body, list[Any])
    with pytest.raises(Invalid, match="more than 2000000 values in one answer"):
        TABLE.read(body)


def test_a_long_text_is_one_value() -> None:
    assert decode(b'["%b"]' % (b"m" * 4_000_000), list[str]) == ["m" * 4_000_000]


BROKEN = {
    "nothing": (b"", "an empty answer instead of JSON"),
    "white space": (b" \r\n\t", "an empty answer instead of JSON"),
    "a page": (b"\n <!DOCTYPE html><html>, NaN", "an HTML page instead of JSON"),
    "xml": (b"<?xml version='1.0'?>", "an HTML page instead of JSON"),
    "a word": (b"OK", "not JSON: "),
    "half a listing": (listing('{"id": 1}')[:-3], "not JSON: "),
    "half a listing with NaN": (b'{"total": 1, "rows": [{"id": 1, "share": NaN}', "not JSON: "),
    "two listings": (listing() + listing(), "not JSON: "),
    "another shape": (b'{"error": "no"}', "Object missing required field `total`"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "null": (b"null", "Expected `object`, got `null`"),
    "another type": (b'{"total": "x", "rows": []}', "Expected `int`, got `str` - at `$.total`"),
    "rows of another type": (b'{"total": 1, "rows": {}}', "Expected `array`, got `object`"),
    "no utf-8": (b'\xff{"total": 1, "rows": []}', "not JSON: "),
    "utf-16": ('{"total": 1}'.encode("utf-16"), "not JSON: "),
    "brackets": (b"[" * 100_000, ""),
    "brackets in a row": (listing('{"id": 1, "x": ' + "[" * 100_000), ""),
    "closed brackets": (listing("[" * 100_000 + "]" * 100_000), ""),
    "braces and NaN": (b'{"a":NaN,"a":' * 100_000, ""),
}


@pytest.mark.parametrize(("body", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_not_the_documented_document_is_refused_with_the_reason(
    body: bytes, message: str
) -> None:
    began = time.monotonic()
    with pytest.raises(Invalid) as caught:
        TABLE.read(body)
    assert time.monotonic() - began < 5
    assert message in str(caught.value)
    assert caught.value.body == Invalid("", body).body.rstrip() or not body.strip()


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_being_refused(body: bytes) -> None:
    with suppress(Invalid):
        TABLE.read(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_every_row_is_good_or_bad_whatever_stands_in_it(value: Any) -> None:
    body = json.dumps({"total": 2, "rows": [{"id": 1}, value]}).encode()
    _, rows, bad = TABLE.read(body)
    assert rows[0] == Row(1)
    assert len(rows) + len(bad) == 2


# Documents


def test_a_document_is_decoded_into_its_type() -> None:
    assert decode(b'{"id": 7, "more": [{}]}', Row) == Row(7)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"id": {}}', "not the documented shape: Expected `int`, got `object` - at `$.id`"),
        (b"<html>", "an HTML page instead of JSON (a login page? a wrong url?)"),
        (b"", "an empty answer instead of JSON"),
        (b'{"id": 7', "not JSON: Input data was truncated"),
        (b'{"id": NaN}', "not JSON: JSON is malformed: invalid character (byte 7)"),
    ],
)
def test_a_document_of_another_shape_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        decode(body, Row)
    assert str(caught.value) == message


def test_a_deep_document_is_refused() -> None:
    with pytest.raises(Invalid):
        decode(b'{"id": 7, "x": ' + b"[" * 100_000, Row)


def test_the_log_gets_no_more_than_the_beginning_of_an_answer() -> None:
    with pytest.raises(Invalid) as caught:
        decode(b"<" + b"\xff" * 10_000, Row)
    assert caught.value.body == "<" + "\ufffd" * 255


# Instants

DAY = "2024-04-29T08:00:00"
DAY_MS = 1_714_377_600_000
LAST_MS = 253_402_300_799_999


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (DAY_MS, DAY_MS),
        (1, 1),
        (0, None),
        (-1, None),
        (LAST_MS, LAST_MS),
        (LAST_MS + 1, None),
        (10**30, None),
        (1714377600000.9, DAY_MS),
        (1.0, 1),
        (0.5, None),
        (0.0, None),
        (-0.5, None),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (1e300, None),
        ("1714377600000", DAY_MS),
        (" 1714377600000\n", DAY_MS),
        ("1", 1),
        ("0", None),
        ("-1714377600000", None),
        ("9" * 20, None),
        ("9" * 5000, None),
        ("١٢٣", None),
        ("²", None),
        ("", None),
        (" ", None),
        ("null", None),
        ("1714377600000.0", None),
        (DAY + "Z", DAY_MS),
        (None, None),
        (True, None),
        (False, None),
        ([], None),
        ({}, None),
        (b"1714377600000", None),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:30]!r}",
)
def test_loose_instants_are_epoch_milliseconds_or_unset(value: object, ms: int | None) -> None:
    assert epoch_ms(value) == ms


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        (DAY, DAY_MS),
        (DAY + "Z", DAY_MS),
        (f"  {DAY}Z\n", DAY_MS),
        ("2024-04-29 08:00:00", DAY_MS),
        (DAY + "+00:00", DAY_MS),
        (DAY + "-00:00", DAY_MS),
        (DAY + "+0000", DAY_MS),
        (DAY + "+02:00", DAY_MS - 7_200_000),
        (DAY + "-05:30", DAY_MS + 19_800_000),
        (DAY + ".1Z", DAY_MS + 100),
        (DAY + ".123", DAY_MS + 123),
        (DAY + ".123Z", DAY_MS + 123),
        (DAY + ".123999Z", DAY_MS + 123),
        (DAY + ".999999Z", DAY_MS + 999),
        (DAY + ".999999999Z", DAY_MS + 999),
        (DAY + ".000000001Z", DAY_MS),
        ("2024-04-29", DAY_MS - 8 * 3_600_000),
        ("20240429T080000Z", DAY_MS),
        ("1970-01-01T00:00:00Z", None),
        ("1970-01-01T00:00:00.001Z", 1),
        ("1969-12-31T23:59:59.999Z", None),
        ("1970-01-01T00:30:00+01:00", None),
        ("0001-01-01T00:00:00+14:00", None),
        ("9999-12-31T23:59:59.999999Z", LAST_MS),
        ("9999-12-31T23:59:59.999999-14:00", None),
        ("10000-01-01T00:00:00Z", None),
        ("2024-02-30T00:00:00Z", None),
        ("2024-04-29T25:00:00Z", None),
        ("yesterday", None),
        ("", None),
        ("\ud800", None),
        ("2" * 100_000, None),
        (None, None),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_iso_instants_are_cut_to_milliseconds_and_utc_unless_they_say(
    text: str | None, ms: int | None
) -> None:
    assert iso_ms(text) == ms


def test_an_instant_may_be_in_a_zone_with_summer_time() -> None:
    summer = datetime.datetime(2024, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    assert instant_ms(summer) == iso_ms("2024-07-01T10:00:00Z")


@given(st.datetimes(timezones=st.none() | st.timezones()))
def test_an_instant_is_unset_or_one_that_can_be_written(instant: datetime.datetime) -> None:
    ms = instant_ms(instant)
    assert ms is None or 0 < ms <= LAST_MS


@given(st.integers(1, LAST_MS))
def test_an_instant_comes_back_as_it_was_written(ms: int) -> None:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    instant = epoch + datetime.timedelta(milliseconds=ms)
    assert iso_ms(instant.isoformat(timespec="milliseconds")) == ms


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        (" ", " "),
        ("", None),
        (0, "0"),
        (17, "17"),
        (2.5, "2.5"),
        (True, None),
        (None, None),
        ({}, None),
    ],
    ids=repr,
)
def test_a_text_or_a_number_is_text_and_nothing_else_is(value: object, text: str | None) -> None:
    assert text_of(value) == text
