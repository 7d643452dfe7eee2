from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable
from typing import Any

import msgspec
import orjson
import pytest
from pydantic import SecretStr
from yarl import URL

from poller.auth import (
    Call,
    Tokens,
    authorized,
    canonical_request,
    sign,
    sign_in_body,
    string_to_sign,
    token_refused,
)
from poller.errors import Invalid, Rejected, Unreachable, VendorError
from poller.settings import Auth, Basic, Bearer, HuaweiAkSk, HuaweiToken, NoAuth, Token
from poller.wire import Response
from tests.support import fixture

VECTORS: list[dict[str, Any]] = orjson.loads(fixture("huawei_signing/sdk_hmac_sha256_vectors.json"))
HOUR_MS = 3_600_000
PASSWORD = "IAMPassword"
IAM = HuaweiToken(
    iam_url="https://iam.example.com",
    username="IAMUser",
    password=SecretStr(PASSWORD),
    domain="IAMDomain",
)


@pytest.fixture(params=VECTORS, ids=lambda vector: vector["name"])
def vector(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def query_of(vector: dict[str, Any]) -> str:
    return str(vector["uri_out"]).partition("?")[2]


def signed_of(vector: dict[str, Any]) -> dict[str, str]:
    headers = {name.lower(): value for name, value in vector["headers_out"].items()}
    return {name: headers[name] for name in vector["signed_headers"]}


def test_the_canonical_request_is_spelled_as_the_reference_spells_it(
    vector: dict[str, Any],
) -> None:
    request = canonical_request(
        vector["method"],
        vector["path"],
        query_of(vector),
        signed_of(vector),
        vector["body"].encode(),
    )

    assert request == vector["canonical_request"]


def test_the_string_to_sign_is_the_reference_s(vector: dict[str, Any]) -> None:
    text = string_to_sign(vector["headers_in"]["X-Sdk-Date"], vector["canonical_request"])

    assert text == vector["string_to_sign"]


def test_the_signed_headers_are_the_reference_s(vector: dict[str, Any]) -> None:
    headers = sign(
        method=vector["method"],
        host=vector["host"],
        path=vector["path"],
        query=query_of(vector),
        headers=vector["headers_in"],
        body=vector["body"].encode(),
        access_key=vector["ak"],
        secret_key=vector["sk"],
    )

    assert headers == vector["headers_out"]


@pytest.mark.parametrize(
    ("path", "spelled"),
    [
        ("", "/"),
        ("/", "/"),
        ("/a", "/a/"),
        ("/a/", "/a/"),
        ("/a%2Fb", "/a/b/"),
        ("/%E4%BD%9C%20~+", "/%E4%BD%9C%20~%2B/"),
        ("/%7e%2a", "/~%2A/"),
    ],
)
def test_a_path_is_spelled_anew_and_ends_with_a_slash(path: str, spelled: str) -> None:
    assert canonical_request("get", path, "", {}, b"").split("\n")[:2] == ["GET", spelled]


@pytest.mark.parametrize(
    ("query", "spelled"),
    [
        ("b=1&a=2", "a=2&b=1"),
        ("a=2&a=1", "a=1&a=2"),
        ("a=&b", "a=&b="),
        ("a=x%2fy", "a=x%2Fy"),
        ("a=x%20y", "a=x%20y"),
    ],
)
def test_a_query_is_sorted_and_spelled_anew(query: str, spelled: str) -> None:
    assert canonical_request("GET", "/", query, {}, b"").split("\n")[2] == spelled


def key_call(url: str = "https://cdm.example.com/jobs", **headers: str) -> Call:
    return Call("GET", URL(url, encoded=True), headers)


def key_auth(security_token: str | None = None) -> HuaweiAkSk:
    return HuaweiAkSk(
        access_key=SecretStr("AK"),
        secret_key=SecretStr("SK"),
        security_token=None if security_token is None else SecretStr(security_token),
    )


def signed_names(call: Call) -> list[str]:
    return call.headers["Authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")


def test_headers_of_the_request_are_signed_but_not_those_with_an_underscore() -> None:
    call = authorized(key_call(workspace="w1", odd_one="x"), key_auth(), project_id=None, now_ms=0)

    assert signed_names(call) == ["host", "workspace", "x-sdk-date"]
    assert call.headers["odd_one"] == "x"


def test_a_signature_carries_the_time_the_project_and_the_security_token() -> None:
    now_ms = int(datetime.datetime(2024, 4, 29, 8, tzinfo=datetime.UTC).timestamp() * 1000)

    call = authorized(key_call(), key_auth("TEMP=="), project_id="p1", now_ms=now_ms + 999)

    assert call.headers["X-Sdk-Date"] == "20240429T080000Z"
    assert call.headers["X-Project-Id"] == "p1"
    assert call.headers["X-Security-Token"] == "TEMP=="
    assert signed_names(call) == ["host", "x-project-id", "x-sdk-date", "x-security-token"]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://cdm.example.com/jobs", "cdm.example.com"),
        ("https://cdm.example.com:443/jobs", "cdm.example.com"),
        ("https://cdm.example.com:8443/jobs", "cdm.example.com:8443"),
        ("http://[::1]:8080/jobs", "[::1]:8080"),
    ],
)
def test_the_signed_host_has_a_port_only_where_it_is_not_the_scheme_s_own(
    url: str, host: str
) -> None:
    call = authorized(key_call(url), key_auth(), project_id=None, now_ms=0)

    assert call.headers["Host"] == host


@pytest.mark.parametrize(
    ("auth", "added"),
    [
        (NoAuth(), {}),
        (IAM, {}),
        (
            Basic(username="Aladdin", password=SecretStr("open sesame")),
            {"Authorization": "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="},
        ),
        (
            Basic(username="test", password=SecretStr("123£")),
            {"Authorization": "Basic dGVzdDoxMjPCow=="},
        ),
        (Bearer(token=SecretStr("t1")), {"Authorization": "Bearer t1"}),
        (Token(token=SecretStr("t1")), {"Authorization": "Token t1"}),
    ],
)
def test_credentials_are_added_to_the_headers(auth: Auth, added: dict[str, str]) -> None:
    call = authorized(key_call(Accept="application/json"), auth, project_id="p1", now_ms=0)

    assert call == key_call(Accept="application/json", **added)


def test_a_sign_in_is_scoped_to_the_domain_without_a_project() -> None:
    assert orjson.loads(sign_in_body(IAM, None)) == orjson.loads(
        fixture("iam/v3_auth_tokens_request_2.json")
    )


def test_a_sign_in_is_scoped_to_the_project() -> None:
    documented = orjson.loads(fixture("iam/v3_auth_tokens_request_1.json"))
    documented["auth"]["scope"]["project"] = {"id": "p1"}

    assert orjson.loads(sign_in_body(IAM, "p1")) == documented


class Iam:
    """An IAM in memory: gives the tokens t1, t2, … unless told to answer otherwise."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000_000
        self.calls: list[Call] = []
        self.answers: list[Response | VendorError] = []
        self.held: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.life: Callable[[], dict[str, Any]] = lambda: life(0, 24 * HOUR_MS)
        self.tokens = Tokens(IAM, "p1", self.exchange, lambda: self.now_ms)

    async def exchange(self, call: Call) -> Response:
        self.calls.append(call)
        self.asked.set()
        if self.held is not None:
            await self.held.wait()
        answer = self.answers.pop(0) if self.answers else self.issue()
        if isinstance(answer, VendorError):
            raise answer
        return answer

    def issue(self) -> Response:
        headers = {"x-subject-token": f"t{len(self.calls)}"}
        return Response(status=201, headers=headers, body=orjson.dumps({"token": self.life()}))


def life(issued_ms: int, expires_ms: int) -> dict[str, Any]:
    """IAM's words for when a token begins and ends, by a clock that need not be ours."""
    start = datetime.datetime(2020, 1, 3, 9, 5, 22, 701000, tzinfo=datetime.UTC)

    def at(ms: int) -> str:
        instant = start + datetime.timedelta(milliseconds=ms)
        return instant.strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    return {"issued_at": at(issued_ms), "expires_at": at(expires_ms)}


def refusal(status: int, body: bytes = b"") -> Response:
    return Response(status=status, body=body)


async def test_a_token_is_signed_for_when_it_is_needed_and_kept() -> None:
    iam = Iam()
    assert iam.calls == []

    assert await iam.tokens.get() == "t1"
    assert await iam.tokens.get() == "t1"

    (call,) = iam.calls
    assert call.method == "POST"
    assert str(call.url) == "https://iam.example.com/v3/auth/tokens?nocatalog=true"
    assert call.headers["Content-Type"] == "application/json"
    assert orjson.loads(call.body) == orjson.loads(sign_in_body(IAM, "p1"))


@pytest.mark.parametrize(
    ("life_ms", "kept_ms"),
    [
        (24 * HOUR_MS, 24 * HOUR_MS - HOUR_MS // 2),
        (5 * HOUR_MS, 5 * HOUR_MS - HOUR_MS // 2),
        (HOUR_MS, HOUR_MS - HOUR_MS // 10),
    ],
)
async def test_a_token_is_renewed_half_an_hour_or_a_tenth_of_its_life_before_its_end(
    life_ms: int, kept_ms: int
) -> None:
    iam = Iam()
    iam.life = lambda: life(0, life_ms)
    assert await iam.tokens.get() == "t1"

    iam.now_ms += kept_ms - 1
    assert await iam.tokens.get() == "t1"
    iam.now_ms += 1
    assert await iam.tokens.get() == "t2"


async def test_a_token_without_issued_at_lives_from_now() -> None:
    iam = Iam()
    iam.now_ms = 1_578_042_322_701  # 2020-01-03T09:05:22.701Z
    iam.life = lambda: {"expires_at": "2020-01-04T09:05:22.701000Z"}
    assert await iam.tokens.get() == "t1"

    iam.now_ms += 23 * HOUR_MS
    assert await iam.tokens.get() == "t1"
    iam.now_ms += HOUR_MS
    assert await iam.tokens.get() == "t2"


async def test_the_documented_answer_gives_a_token() -> None:
    iam = Iam()
    iam.answers = [
        Response(
            status=201,
            headers={"x-subject-token": "MIIC"},
            body=fixture("iam/v3_auth_tokens_response_3.json"),
        )
    ]

    assert await iam.tokens.get() == "MIIC"


async def test_whoever_waits_shares_the_one_sign_in() -> None:
    iam = Iam()
    iam.held = asyncio.Event()

    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(iam.tokens.get()) for _ in range(8)]
        await iam.asked.wait()
        iam.held.set()

    assert [task.result() for task in waiting] == ["t1"] * 8
    assert len(iam.calls) == 1


async def test_whoever_waits_for_a_refused_sign_in_is_refused_without_another() -> None:
    iam = Iam()
    iam.held = asyncio.Event()
    iam.answers = [refusal(401)]
    waiting = [asyncio.create_task(iam.tokens.get()) for _ in range(8)]
    await iam.asked.wait()
    iam.held.set()

    outcomes = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [Rejected] * 8
    assert len(iam.calls) == 1
    assert await iam.tokens.get() == "t2"


async def test_the_next_one_signs_in_where_the_first_was_cancelled() -> None:
    iam = Iam()
    iam.held = asyncio.Event()
    first = asyncio.create_task(iam.tokens.get())
    await iam.asked.wait()
    second = asyncio.create_task(iam.tokens.get())
    iam.held.set()
    first.cancel()

    assert await second == "t2"
    assert first.cancelled()


async def test_a_refused_token_is_replaced_once_for_all_who_were_refused() -> None:
    iam = Iam()
    old = await iam.tokens.get()

    fresh = await asyncio.gather(*(iam.tokens.get(refused=old) for _ in range(8)))

    assert fresh == ["t2"] * 8
    assert await iam.tokens.get(refused=old) == "t2"
    assert len(iam.calls) == 2


async def test_an_early_renewal_that_fails_leaves_the_token_in_use_for_a_minute() -> None:
    iam = Iam()
    await iam.tokens.get()
    iam.now_ms += 24 * HOUR_MS - HOUR_MS // 2
    iam.answers = [Unreachable("down"), Unreachable("down")]

    assert await iam.tokens.get() == "t1"
    iam.now_ms += 59_999
    assert await iam.tokens.get() == "t1"
    assert len(iam.calls) == 2
    iam.now_ms += 1
    assert await iam.tokens.get() == "t1"
    assert len(iam.calls) == 3


@pytest.mark.parametrize(
    ("passed_ms", "refused", "failure"),
    [
        (24 * HOUR_MS, None, Unreachable),
        (0, "t1", Unreachable),
        (24 * HOUR_MS - 60_000, None, Rejected),
    ],
)
async def test_a_renewal_that_fails_is_told_where_the_old_token_is_no_more_good(
    passed_ms: int, refused: str | None, failure: type[VendorError]
) -> None:
    iam = Iam()
    await iam.tokens.get()
    iam.now_ms += passed_ms
    iam.answers = [failure("no")]

    with pytest.raises(failure, match=r"^no$"):
        await iam.tokens.get(refused)


@pytest.mark.parametrize(
    ("answer", "failure", "message"),
    [
        (
            refusal(401, fixture("iam/v3_auth_tokens_error_6.json")),
            Rejected,
            "sign-in: HTTP 401: The username or password is wrong.",
        ),
        (refusal(403), Rejected, "sign-in: HTTP 403"),
        (
            refusal(400, fixture("iam/v3_auth_tokens_error_5.json")),
            Rejected,
            "sign-in: HTTP 400: The request body is invalid",
        ),
        (refusal(429, b'{"error":{}}'), Unreachable, "sign-in: HTTP 429"),
        (refusal(503, b"<html>"), Unreachable, "sign-in: HTTP 503"),
        (refusal(404), Invalid, "sign-in: HTTP 404; is iam_url right?"),
        (refusal(302), Invalid, "sign-in: HTTP 302; is iam_url right?"),
        (refusal(200), Invalid, "sign-in: HTTP 200; is iam_url right?"),
        (refusal(201), Invalid, "sign-in: no usable X-Subject-Token in IAM's answer"),
        (
            refusal(401, b'{"error":{"message":"two\\n  lines, ' + b"x" * 300 + b'"}}'),
            Rejected,
            "sign-in: HTTP 401: two lines, " + "x" * 189,
        ),
        (
            refusal(401, b'{"error":{"message":"IAMPassword is wrong"}}'),
            Rejected,
            "sign-in: HTTP 401: *** is wrong",
        ),
    ],
)
async def test_a_failed_sign_in_is_told_by_what_to_do_about_it(
    answer: Response, failure: type[VendorError], message: str
) -> None:
    iam = Iam()
    iam.answers = [answer]

    with pytest.raises(failure) as told:
        await iam.tokens.get()

    assert str(told.value) == message
    assert PASSWORD not in repr(told.value) + repr(told.value.__cause__)


@pytest.mark.parametrize("token", ["", "é", "a\x7fb", "\udcff"])
async def test_a_token_that_no_header_can_carry_is_invalid(token: str) -> None:
    iam = Iam()
    iam.answers = [msgspec.structs.replace(iam.issue(), headers={"x-subject-token": token})]

    with pytest.raises(Invalid, match="no usable X-Subject-Token"):
        await iam.tokens.get()


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"<html>", b'{"token":{}}', b'{"token":{"expires_at":"soon"}}']
)
async def test_a_token_without_an_end_is_invalid(body: bytes) -> None:
    iam = Iam()
    iam.answers = [msgspec.structs.replace(iam.issue(), body=body)]

    with pytest.raises(Invalid):
        await iam.tokens.get()


async def test_a_held_token_is_not_shown() -> None:
    iam = Iam()
    iam.answers = [msgspec.structs.replace(iam.issue(), headers={"x-subject-token": "s3cret"})]
    await iam.tokens.get()

    assert "s3cret" not in repr(vars(iam.tokens))


@pytest.mark.parametrize(
    ("status", "body", "refused"),
    [
        (200, b'{"error_code":"APIG.0301"}', False),
        (400, b"", False),
        (401, b"", True),
        (403, b"", False),
        (403, b'{"error_code":"APIG.0302"}', False),
        (403, b'{"error_code":"APIG.0301"}', True),
        (400, b'{"error_code":"APIGW.0301"}', True),
        (403, b'{"error_code" : "APIG.0307"}', True),
        (403, b'{"error_code":"APIGW.0307"}', True),
        (429, b'{"error_code":"APIG.0308"}', False),
    ],
)
def test_the_gateway_s_words_for_a_bad_token_are_known(
    status: int, body: bytes, refused: bool
) -> None:
    assert token_refused(Response(status=status, body=body)) is refused
