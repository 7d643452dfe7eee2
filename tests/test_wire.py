"""What passes between the loop and a vendor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.known import Memory
from poller.redaction import Redaction
from poller.runs import State
from poller.vendors import load
from poller.wire import (
    Meaning,
    Options,
    Page,
    Request,
    Response,
    Words,
    look_up,
    read,
    refuse,
    retry_after_s,
)

NOW_MS = 784_111_777_000  # Sun, 06 Nov 1994 08:49:37 GMT
NOW = "Sun, 06 Nov 1994 08:49:37 GMT"
WORDS: Words = {"running": (State.RUNNING, None), "done": (State.SUCCEEDED, "warnings")}


# Reading


def test_an_answer_that_can_be_read_only_without_our_credentials_is_invalid() -> None:
    def parse(_options: object, _request: object, response: Response, _memory: object) -> Page:
        if b"secret" in response.body:
            raise Invalid("no", response.body)
        return Page()

    vendor = replace(load("scale"), parse=parse)
    response = Response(status=200, body=b"my secret", secrets=Redaction("secret"))
    with pytest.raises(Invalid, match="only without the credentials") as caught:
        read(vendor, Options(), Request(path="/"), response, Memory(now_ms=1, contact_ms=1))
    assert caught.value.body == "my ***"
    assert caught.value.__context__ is None


# Requests


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ((), "/api/jobs"),
        ((("limit", "10"),), "/api/jobs?limit=10"),
        ((("limit", "10"), ("limit", "20")), "/api/jobs?limit=10&limit=20"),
        ((("b", "1"), ("a", "2")), "/api/jobs?b=1&a=2"),
        ((("q", "a b&c=d/e?f#g%h+i"),), "/api/jobs?q=a%20b%26c%3Dd%2Fe%3Ff%23g%25h%2Bi"),
        ((("q", "作业"),), "/api/jobs?q=%E4%BD%9C%E4%B8%9A"),
        ((("q", ""),), "/api/jobs?q="),
        (
            (("from", "2024-04-29T08:00:00+02:00"),),
            "/api/jobs?from=2024-04-29T08%3A00%3A00%2B02%3A00",
        ),
    ],
    ids=lambda value: value[10:] if isinstance(value, str) else "",
)
def test_a_target_is_the_path_and_the_encoded_query(
    query: tuple[tuple[str, str], ...], target: str
) -> None:
    assert Request(path="/api/jobs", query=query).target == target


def test_a_path_that_a_vendor_has_encoded_is_not_encoded_again() -> None:
    request = Request(path="/jobs/a%2Fb", query=(("x", "1"),))
    assert request.target == "/jobs/a%2Fb?x=1"


def test_a_request_asks_for_json_and_for_no_one_run() -> None:
    request = Request(path="/")
    assert request.headers == (("Accept", "application/json"),)
    assert (request.method, request.body, request.by_id, request.spread) == (
        "GET",
        b"",
        False,
        False,
    )


# Words


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("running", Meaning(State.RUNNING)),
        ("RUNNING", Meaning(State.RUNNING)),
        (" Running\n", Meaning(State.RUNNING)),
        ("done", Meaning(State.SUCCEEDED, "warnings")),
        ("run ning", Meaning(State.UNKNOWN, None, unmapped=True)),
        ("", Meaning(State.UNKNOWN, None, unmapped=True)),
    ],
    ids=repr,
)
def test_a_word_is_found_however_it_is_spelled_and_else_unmapped(
    word: str, meaning: Meaning
) -> None:
    assert look_up(WORDS, word) == meaning


# Statuses

OTHERS = [100, 201, 204, 206, 301, 302, 304, 400, 402, 404, 405, 408, 409, 410, 418]


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (401, {}, Rejected),
        (403, {}, Rejected),
        (429, {}, Limited),
        (429, {"retry-after": "7"}, Limited),
        (503, {"retry-after": "7"}, Limited),
        (503, {}, Unreachable),
        (500, {"retry-after": "7"}, Unreachable),
        (502, {}, Unreachable),
        (504, {}, Unreachable),
        (599, {}, Unreachable),
        *((status, {}, Invalid) for status in OTHERS),
    ],
)
def test_a_status_but_200_is_refused_as_what_it_means_for_the_next_poll(
    status: int, headers: dict[str, str], error: type[VendorError]
) -> None:
    with pytest.raises(VendorError) as caught:
        refuse(Response(status=status, headers=headers, body=b"why"))
    assert type(caught.value) is error
    assert f"HTTP {status}" in str(caught.value)


def test_200_is_not_refused() -> None:
    refuse(Response(status=200, headers={"retry-after": "7"}))


def test_a_limit_tells_how_long_to_wait_and_an_invalid_answer_how_it_begins() -> None:
    with pytest.raises(Limited) as limited:
        refuse(Response(status=429, headers={"retry-after": "7"}))
    assert limited.value.retry_after_s == 7
    with pytest.raises(Limited) as silent:
        refuse(Response(status=429))
    assert silent.value.retry_after_s is None
    with pytest.raises(Invalid) as invalid:
        refuse(Response(status=404, body=b"x" * 1000))
    assert invalid.value.body == "x" * 256


# Retry-After


def asked(text: str, date: str | None = None) -> Response:
    headers = {"retry-after": text} | ({} if date is None else {"date": date})
    return Response(status=429, headers=headers)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("7", 7),
        (" 120 ", 120),
        ("007", 7),
        ("9" * 5000, 999_999_999),
        ("", None),
        ("-7", None),
        ("7.5", None),
        ("1e3", None),
        ("7 s", None),
        ("²", None),
        ("soon", None),
        ("Sun, 06 Nov 1994", None),
        ("Sun, 06 Foo 1994 08:49:37 GMT", None),
        ("Sun, 99 Nov 1994 99:99:99 GMT", None),
        ("Sun, 06 Nov 99999 08:49:37 GMT", None),
        (f"Sun, 06 Nov {'9' * 20} 08:49:37 GMT", None),
        (f"Sun, 06 Nov 1994 08:49:37 +{'9' * 20}", None),
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Sun, 06 Nov 1994 08:48:37 GMT", 0),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60),
        ("Sun Nov  6 08:50:37 1994", 60),
        ("Mon, 07 Nov 1994 08:49:37 GMT", 86_400),
        ("Sun, 06 Nov 2094 08:49:37 GMT", 3_155_760_000),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_retry_after_is_seconds_or_a_date_or_nothing(text: str, seconds: float | None) -> None:
    assert retry_after_s(asked(text), NOW_MS) == seconds


def test_a_date_counts_from_the_date_that_the_answer_bears_not_from_our_clock() -> None:
    assert retry_after_s(asked("Sun, 06 Nov 1994 08:50:37 GMT", NOW), 5 * NOW_MS) == 60


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine is 14 hours ahead of Greenwich."""
    with monkeypatch.context() as there:
        there.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    "date", [NOW, "Sun Nov  6 08:49:37 1994", "Sun, 06 Nov 1994 09:49:37 +0100"]
)
@pytest.mark.usefixtures("far_east")
def test_every_form_of_a_date_means_the_same_instant(date: str) -> None:
    assert retry_after_s(asked("Sun, 06 Nov 1994 08:50:37 GMT", date)) == 60


def test_a_date_without_a_clock_to_hold_it_against_says_nothing() -> None:
    assert retry_after_s(asked("Sun, 06 Nov 1994 08:50:37 GMT")) is None
    assert retry_after_s(asked("Sun, 06 Nov 1994 08:50:37 GMT", "now"), NOW_MS) is None
    far = f"Sun, 06 Nov 1994 08:49:37 -{'9' * 20}"
    assert retry_after_s(asked("Sun, 06 Nov 1994 08:50:37 GMT", far), NOW_MS) is None


def test_seconds_need_no_clock() -> None:
    assert retry_after_s(asked("7", "now")) == 7


def test_no_header_asks_for_nothing() -> None:
    assert retry_after_s(Response(status=429), NOW_MS) is None


@given(st.text(), st.none() | st.text())
def test_whatever_the_headers_say_it_is_a_time_to_wait_or_nothing(
    text: str, date: str | None
) -> None:
    seconds = retry_after_s(asked(text, date), NOW_MS)
    assert seconds is None or seconds >= 0


DATES = st.lists(
    st.sampled_from(
        ["Sun,", "06", "Nov", "1994", "94", "08:49:37", "8:9", "GMT", "+0100", "-0000", ","]
    )
    | st.integers(-99999, 99999).map(str),
    max_size=8,
).map(" ".join)


@given(DATES, DATES)
def test_scrambled_dates_are_a_time_to_wait_or_nothing(text: str, date: str) -> None:
    seconds = retry_after_s(asked(text, date))
    assert seconds is None or seconds >= 0


# Values


@pytest.mark.parametrize("value", [Request(path="/"), Response(status=200)])
def test_what_is_passed_on_cannot_be_changed(value: msgspec.Struct) -> None:
    with pytest.raises(AttributeError):
        value.body = b"x"  # type: ignore[attr-defined]  # that is what fails
