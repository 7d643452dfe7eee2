"""Secrets that others repeat do not get into messages."""

from __future__ import annotations

import base64
import html
import json
import re
from urllib.parse import quote, quote_plus

import pytest
from pydantic import SecretStr

from poller.auth import redaction
from poller.errors import VendorError
from poller.known import Memory
from poller.redaction import Redaction
from poller.settings import Auth, Basic, Bearer, HuaweiAkSk, HuaweiToken, NoAuth, Token
from poller.vendors import BUILT_IN, load
from poller.wire import Response, Vendor, read

SECRET = "Zq-s3cret/\"'\\<&>= +%2F~ä作"
NOW_MS = 1_790_000_000_000


def json_for_html(text: str, unsafe: str) -> str:
    """JSON with these characters escaped, too."""
    written = json.dumps(text, ensure_ascii=False)
    for character in unsafe:
        written = written.replace(character, f"\\u{ord(character):04x}")
    return written


SPELLINGS = {
    "plain": SECRET,
    "lower": SECRET.lower(),
    "python": repr(SECRET)[1:-1],
    "url": quote(SECRET, safe=""),
    "url, lower": re.sub("%..", lambda found: found[0].lower(), quote(SECRET, safe="")),
    "url path": quote(SECRET),
    "form": quote_plus(SECRET),
    "html": html.escape(SECRET, quote=False),
    "html attribute": html.escape(SECRET),
    "html, decimal": html.escape(SECRET).replace("&#x27;", "&#39;"),
    "json": json.dumps(SECRET)[1:-1],
    "json, upper": json.dumps(SECRET)[1:-1].replace("00e4", "00E4").replace("4f5c", "4F5C"),
    "json, utf-8": json.dumps(SECRET, ensure_ascii=False)[1:-1],
    "json of php": json.dumps(SECRET)[1:-1].replace("/", "\\/"),
    "json of go": json_for_html(SECRET, "<>&")[1:-1],
    "json of gson": json_for_html(SECRET, "<>&='+")[1:-1],
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_found_however_it_is_spelled(spelling: str) -> None:
    known = Redaction("other", SECRET)
    assert known.text(f"you said {spelling}, {spelling}!") == "you said ***, ***!"
    assert known.body(f"you said {spelling}!".encode()) == b"you said ***!"


def test_bytes_in_latin_1_are_searched_too() -> None:
    assert Redaction("geheimää").body("du bist geheimää".encode("latin-1")) == b"du bist ***"


def test_nothing_is_left_of_a_secret_that_begins_with_another() -> None:
    assert Redaction("secret", "secret-and-more").text("secret-and-more, secret") == "***, ***"


def test_what_is_too_short_to_be_told_from_a_word_is_left() -> None:
    known = Redaction("", "abc", "abcd")
    assert known.text("abcabcd") == "abc***"
    assert known.body(b"abcabcd") == b"abc***"


def test_one_that_knows_another_secret_knows_the_old_ones_too() -> None:
    assert Redaction("first").knowing("second").text("first second third") == "*** *** third"


def test_it_does_not_show_what_it_knows() -> None:
    assert SECRET not in f"{Redaction(SECRET)!r} {Response(status=200, secrets=Redaction(SECRET))}"


def test_errors_say_nothing_of_it_on_their_way_out() -> None:
    with pytest.raises(KeyError) as caught, Redaction("secret").kept():
        raise KeyError("my secret", 7)
    assert caught.value.args == ("my ***", 7)


# Credentials


@pytest.mark.parametrize(
    ("auth", "sent"),
    [
        (NoAuth(), []),
        (
            Basic(username="user", password=SecretStr("Zq-password")),
            ["Zq-password", base64.b64encode(b"user:Zq-password").decode()],
        ),
        (Bearer(token=SecretStr("Zq-token")), ["Zq-token"]),
        (Token(token=SecretStr("Zq-token")), ["Zq-token"]),
        (
            HuaweiToken(
                iam_url="http://h", username="user", password=SecretStr("Zq-pw"), domain="d"
            ),
            ["Zq-pw"],
        ),
        (
            HuaweiAkSk(
                access_key=SecretStr("Zq-ak"),
                secret_key=SecretStr("Zq-sk"),
                security_token=SecretStr("Zq-st"),
            ),
            ["Zq-ak", "Zq-sk", "Zq-st"],
        ),
    ],
)
def test_every_secret_of_the_credentials_is_known(auth: Auth, sent: list[str]) -> None:
    said = " and ".join(["user", *sent])
    assert redaction(auth).text(said).rstrip("=") == " and ".join(["user", *["***"] * len(sent)])


# Vendors

OWN = {"cdm": {"project_id": "p", "cluster_id": "c"}, "dataarts": {"project_id": "p"}}
MEMORY = Memory(now_ms=NOW_MS, contact_ms=NOW_MS, since_ms=NOW_MS - 1000)


CUT = [0, *(end - before for end in (200, 256, 300) for before in (5, 12, 19, 26))]
"""How far behind its beginning a vendor's code may cut a message within the secret."""


def repeated(padding: int, form: str) -> bytes:
    """An error of each vendor's form that holds the secret so far behind its beginning."""
    told = f"{'.' * padding}{SECRET}"
    if form == "text":
        return told.encode()
    texts = ("msg", "error_msg", "externalMessage", "detail", "message")
    codes = {"code": "999", "error_code": "X.1", "errCode": "X.1", "status": "failure"}
    document = {**dict.fromkeys(texts, told), **codes, "reason": told, "error": told}
    return json.dumps(document).encode()


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 429, 500, 503])
@pytest.mark.parametrize("vendor", [load(name) for name in BUILT_IN], ids=BUILT_IN)
def test_no_vendors_error_keeps_even_the_beginning_of_a_secret(
    vendor: Vendor, status: int, form: str
) -> None:
    options = vendor.options(**OWN.get(vendor.name, {}))
    request = next(iter(vendor.start(options, MEMORY)))
    for padding in CUT:
        response = Response(status=status, body=repeated(padding, form), secrets=Redaction(SECRET))
        with pytest.raises(VendorError) as caught:
            read(vendor, options, request, response, MEMORY)
        shown = f"{caught.value} {getattr(caught.value, 'body', '')}"
        assert "Zq" not in shown


def test_an_answer_that_can_be_read_is_left_as_it_is() -> None:
    vendor = load("datameer")
    body = b'[{"id": 1, "configuration": 2, "jobStatus": "RUNNING", "x": "secret"}]'
    options = vendor.options()
    request = next(iter(vendor.start(options, MEMORY)))
    response = Response(status=200, body=body)
    page = read(vendor, options, request, response, MEMORY)
    known = Response(status=200, body=body, secrets=Redaction("RUNNING", "secret"))
    assert read(vendor, options, request, known, MEMORY) == page
