from __future__ import annotations

import asyncio
import base64
import datetime
import gzip
import json
import socket
import ssl
import struct
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from poller.auth import sign
from poller.errors import Invalid, Rejected, SettingsError, Unreachable, VendorError
from poller.fetch import Endpoint, Fetch, connect
from poller.settings import Auth, Basic, Bearer, HuaweiAkSk, HuaweiToken, NoAuth, Token
from poller.tls import Identity
from poller.wire import Request, Response
from tests import certificates
from tests.support import fixture

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

NOW_MS = 1_714_377_600_000  # 2024-04-29T08:00:00Z
SECRET = "Pl4nted-S3cret"
ASK = Request(path="/jobs")


@asynccontextmanager
async def serving(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on a free loopback port; gives its origin."""
    server = web.Server(handler, handler_cancellation=True)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        listener.close()
        await server.shutdown(0)


@asynccontextmanager
async def sending(
    *parts: bytes, then: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[str]:
    """A server that answers every connection's first request with these bytes, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
            if then is not None:
                await then()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield f"http://127.0.0.1:{port}"


def asking(
    url: str,
    auth: Auth | None = None,
    *,
    counted: Callable[[str], None] = lambda _: None,
    now_ms: Callable[[], int] = lambda: NOW_MS,
    timeout_s: float = 10,
    max_body: int = 1 << 20,
    concurrency: int = 8,
    verify_tls: bool | Path = True,
    identity: Identity | None = None,
    project_id: str | None = None,
) -> AbstractAsyncContextManager[Fetch]:
    endpoint = Endpoint(
        url=url,
        auth=auth or NoAuth(),
        timeout_s=timeout_s,
        max_body=max_body,
        concurrency=concurrency,
        verify_tls=verify_tls,
        identity=identity,
        project_id=project_id,
    )
    return connect(endpoint, counted=counted, now_ms=now_ms)


def told(error: BaseException | None) -> Iterator[str]:
    """All that an error and what it is chained to would show."""
    if error is not None:
        yield f"{error} {error!r} {error.args!r} {vars(error)!r}"
        yield from told(error.__cause__)
        yield from told(error.__context__)


def ok(body: bytes = b"{}", **headers: str) -> web.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return web.Response(body=body, headers=fields)


async def greet(request: web.BaseRequest) -> web.Response:
    return ok(b"hello", X_Greeting="Hi")


# What is sent


async def test_an_answer_has_status_lower_case_headers_and_body() -> None:
    async with serving(greet) as url, asking(url) as fetch:
        response = await fetch(ASK)

    assert response.status == 200
    assert response.headers["x-greeting"] == "Hi"
    assert response.body == b"hello"
    assert not response.unchanged


@pytest.mark.parametrize("prefix", ["", "/", "/kylin", "/kylin/"])
@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/api/jobs", ()),
        ("/a%2Fb/%E4%BD%9C%E4%B8%9A%201/x", ()),
        ("/%7e/%2e%2e/../a//b", ()),
        ("/jobs", (("q", "a b+c/d~&=作业"), ("limit", "10"))),
        ("/jobs;v=1", (("started", "2024-04-29T08:00:00+00:00"),)),
    ],
)
async def test_path_and_query_go_over_the_wire_as_they_are(
    prefix: str, path: str, query: tuple[tuple[str, str], ...]
) -> None:
    seen = []

    async def note(request: web.BaseRequest) -> web.Response:
        seen.append(request.raw_path)
        return ok()

    request = Request(path=path, query=query)
    async with serving(note) as url, asking(url + prefix) as fetch:
        await fetch(request)

    assert seen == [prefix.rstrip("/") + request.target]


async def test_method_headers_and_body_are_sent() -> None:
    seen = []

    async def note(request: web.BaseRequest) -> web.Response:
        seen.append((request.method, request.headers["X-A"], await request.read()))
        return ok()

    request = Request(path="/", method="POST", headers=(("X-A", "b"),), body=b"payload")
    async with serving(note) as url, asking(url) as fetch:
        await fetch(request)

    assert seen == [("POST", "b", b"payload")]


@pytest.mark.parametrize(
    ("auth", "sent"),
    [
        (NoAuth(), None),
        (Basic(username="u", password=SecretStr("p")), "Basic dTpw"),
        (Bearer(token=SecretStr("t")), "Bearer t"),
        (Token(token=SecretStr("t")), "Token t"),
    ],
)
async def test_every_request_carries_the_credentials(auth: Auth, sent: str | None) -> None:
    seen = []

    async def note(request: web.BaseRequest) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return ok()

    async with serving(note) as url, asking(url, auth) as fetch:
        await fetch(ASK)
        await fetch(ASK)

    assert seen == [sent, sent]


async def test_cookies_are_not_kept() -> None:
    seen = []

    async def note(request: web.BaseRequest) -> web.Response:
        seen.append(request.headers.get("Cookie"))
        return ok(Set_Cookie="session=1; Path=/")

    async with serving(note) as url, asking(url) as fetch:
        await fetch(ASK)
        await fetch(ASK)

    assert seen == [None, None]


async def test_the_environment_s_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)

    async with serving(greet) as url, asking(url) as fetch:
        assert (await fetch(ASK)).status == 200


async def test_a_connection_outlives_minutes_of_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = set()
    passed_s = 0.0

    async def note(request: web.BaseRequest) -> web.Response:
        lines.add(request.transport)
        return ok()

    monkeypatch.setattr("aiohttp.connector.monotonic", lambda: time.monotonic() + passed_s)
    async with serving(note) as url, asking(url) as fetch:
        await fetch(ASK)
        passed_s = 240
        await fetch(ASK)

    assert len(lines) == 1


async def test_a_connection_that_the_server_has_closed_is_opened_anew() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with sending(answer) as url, asking(url) as fetch:
        assert [(await fetch(ASK)).status for _ in range(3)] == [200] * 3


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_no_more_than_concurrency_exchanges_run_at_a_time(concurrency: int) -> None:
    together = asyncio.Barrier(concurrency)
    now = peak = 0

    async def meet(request: web.BaseRequest) -> web.Response:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await together.wait()
        now -= 1
        return ok()

    async with serving(meet) as url, asking(url, concurrency=concurrency) as fetch:
        await asyncio.gather(*(fetch(ASK) for _ in range(4 * concurrency)))

    assert peak == concurrency


# What may come back


@pytest.mark.parametrize("status", [204, 400, 401, 404, 429, 500, 503])
async def test_an_answer_of_any_status_is_given_back(status: int) -> None:
    async def refuse(request: web.BaseRequest) -> web.Response:
        return web.Response(status=status, headers={"Retry-After": "7"})

    async with serving(refuse) as url, asking(url) as fetch:
        response = await fetch(ASK)

    assert (response.status, response.headers["retry-after"]) == (status, "7")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_packed_body_is_unpacked(coding: str) -> None:
    body = b"0123456789" * 1000
    packed = gzip.compress(body) if coding == "gzip" else zlib.compress(body)

    async def pack(request: web.BaseRequest) -> web.Response:
        assert coding in request.headers["Accept-Encoding"]
        return ok(packed, Content_Encoding=coding)

    async with serving(pack) as url, asking(url, max_body=len(body)) as fetch:
        assert (await fetch(ASK)).body == body


@pytest.mark.parametrize("coding", ["identity", "gzip", "deflate"])
async def test_a_body_that_unpacks_to_more_than_max_body_is_invalid(coding: str) -> None:
    body = b"0123456789" * 1000
    packed = {"identity": body, "gzip": gzip.compress(body), "deflate": zlib.compress(body)}

    async def pack(request: web.BaseRequest) -> web.Response:
        return ok(packed[coding], Content_Encoding=coding)

    async with serving(pack) as url, asking(url, max_body=len(body) - 1) as fetch:
        with pytest.raises(Invalid, match="the answer is larger than max_body"):
            await fetch(ASK)


def bomb(mebibytes: int) -> bytes:
    """Zeros that gzip packs a thousandfold."""
    packer = zlib.compressobj(wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(mebibytes)) + packer.flush()


async def test_a_bomb_is_left_unpacked_past_max_body() -> None:
    packed = bomb(64)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"

    async with sending(head % len(packed), packed) as url, asking(url) as fetch:
        tracemalloc.start()
        try:
            with pytest.raises(Invalid, match="max_body"):
                await fetch(ASK)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert peak < 16 << 20


async def test_an_endless_body_is_cut_off() -> None:
    async def pour(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    async with serving(pour) as url, asking(url) as fetch:
        with pytest.raises(Invalid, match="max_body"):
            await fetch(ASK)


@pytest.mark.parametrize(
    "start", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n12345"]
)
async def test_an_answer_that_stops_midway_is_waited_for_no_longer_than_timeout(
    start: bytes,
) -> None:
    forever = asyncio.Event()

    async with sending(start, then=forever.wait) as url, asking(url, timeout_s=0.1) as fetch:
        with pytest.raises(Unreachable, match=r"no whole answer within 0\.1 s"):
            await fetch(ASK)


async def test_an_answer_that_only_trickles_is_waited_for_no_longer_than_timeout() -> None:
    async def trickle(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0)

    async with serving(trickle) as url, asking(url, timeout_s=0.1) as fetch:
        with pytest.raises(Unreachable, match="no whole answer"):
            await fetch(ASK)


async def test_waiting_for_a_free_connection_is_not_counted_as_the_vendor_s_time() -> None:
    async def hold_the_slow(request: web.BaseRequest) -> web.Response:
        if request.path == "/slow":
            await asyncio.Event().wait()
        return ok()

    slow = Request(path="/slow")
    async with (
        serving(hold_the_slow) as url,
        asking(url, concurrency=1, timeout_s=0.1) as fetch,
    ):
        first, second, third = await asyncio.gather(
            fetch(slow), fetch(slow), fetch(ASK), return_exceptions=True
        )

    assert isinstance(first, Unreachable)
    assert isinstance(second, Unreachable)
    assert isinstance(third, Response)


async def test_a_cancelled_question_ends_as_cancelled() -> None:
    asked = asyncio.Event()
    codes: list[str] = []

    async def hold(request: web.BaseRequest) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        return ok()

    async with serving(hold) as url, asking(url, counted=codes.append) as fetch:
        question = asyncio.ensure_future(fetch(ASK))
        await asked.wait()
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question

    assert codes == []


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "failure", "message"),
    [
        (b"", Unreachable, "the connection was closed without an answer"),
        (HEAD + b"Content-Le", Unreachable, "the connection was closed without an answer"),
        (HEAD + b"Content-Length: 100\r\n\r\nabc", Unreachable, "the answer broke off"),
        (CHUNKED + b"5\r\nab", Unreachable, "the answer broke off"),
        (CHUNKED + b"zz\r\nab\r\n0\r\n\r\n", Invalid, "the answer is not HTTP"),
        (CHUNKED + b"2\r\nab\r\nzz\r\n", Invalid, "the answer is not HTTP"),
        (b"\x00\x01garbage\r\n\r\n", Invalid, "the answer is not HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", Invalid, "the answer is not HTTP"),
        (HEAD + b"Content-Length: -3\r\n\r\nabc", Invalid, "the answer is not HTTP"),
        (HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n", Invalid, "the answer is not HTTP"),
        (
            HEAD + b"Content-Encoding: gzip\r\nContent-Length: 10\r\n\r\n0123456789",
            Invalid,
            "packed wrongly",
        ),
        (
            HEAD + b"Content-Encoding: br\r\nContent-Length: 10\r\n\r\n0123456789",
            Invalid,
            "packed wrongly",
        ),
    ],
)
async def test_a_broken_answer_is_told_in_one_sentence_that_names_the_host(
    sent: bytes, failure: type[VendorError], message: str
) -> None:
    codes: list[str] = []
    auth = Bearer(token=SecretStr(SECRET))
    async with sending(sent) as url, asking(url, auth, counted=codes.append) as fetch:
        with pytest.raises(failure, match=message) as caught:
            await fetch(ASK)

    assert str(caught.value).startswith(url.removeprefix("http://") + ": ")
    assert caught.value.__cause__ is not None
    assert SECRET not in "".join(told(caught.value))
    assert codes == ["error"]


@settings(max_examples=60, deadline=None)
@given(
    head=st.sampled_from([b"", b"HTTP/1.1 ", HEAD, CHUNKED, HEAD + b"Content-Encoding: gzip\r\n"]),
    rest=st.binary(max_size=60),
)
def test_whatever_comes_back_is_an_answer_or_a_vendor_error(head: bytes, rest: bytes) -> None:
    async def ask() -> Response | VendorError:
        async with sending(head + rest) as url, asking(url) as fetch:
            try:
                return await fetch(ASK)
            except VendorError as error:
                return error

    assert isinstance(asyncio.run(ask()), Response | VendorError)


async def test_a_reset_connection_is_unreachable() -> None:
    async def reset(request: web.BaseRequest) -> web.Response:
        assert isinstance(request.transport, asyncio.Transport)
        line = request.transport.get_extra_info("socket")
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
        return ok()

    async with serving(reset) as url, asking(url) as fetch:
        with pytest.raises(Unreachable, match="the connection broke: connection reset by peer"):
            await fetch(ASK)


async def test_a_port_that_nobody_listens_on_refuses_the_connection(
    unused_tcp_port: int,
) -> None:
    codes: list[str] = []
    where = f"127.0.0.1:{unused_tcp_port}"
    async with asking(f"http://{where}", counted=codes.append) as fetch:
        with pytest.raises(Unreachable, match=f"^{where}: cannot connect: connection refused$"):
            await fetch(ASK)

    assert codes == ["error"]


async def test_a_name_that_is_not_known_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with asking("http://no-such-host.invalid") as fetch:
        with pytest.raises(Unreachable, match=r"^no-such-host\.invalid: name not found \(Name"):
            await fetch(ASK)


@pytest.mark.parametrize("url", [f"http://{'a' * 70}.invalid", "http://a..invalid"])
async def test_a_host_that_can_be_no_name_is_told(url: str) -> None:
    async with asking(url) as fetch:
        with pytest.raises(Invalid, match="no host name, or a header that HTTP cannot carry"):
            await fetch(ASK)


async def test_a_header_that_http_cannot_carry_is_told_without_it() -> None:
    auth = Bearer(token=SecretStr(f"{SECRET}\r\nX: y"))
    async with serving(greet) as url, asking(url, auth) as fetch:
        with pytest.raises(Invalid, match="a header that HTTP cannot carry") as caught:
            await fetch(ASK)

    assert SECRET not in "".join(told(caught.value))


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def bundle(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


def tls_of(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


async def test_a_certificate_of_the_bundle_s_authority_is_trusted(
    authority: trustme.CA, bundle: Path
) -> None:
    tls = tls_of(authority.issue_cert("127.0.0.1"))
    async with serving(greet, tls) as url, asking(url, verify_tls=bundle) as fetch:
        assert (await fetch(ASK)).body == b"hello"


async def test_any_certificate_is_taken_where_verify_tls_is_false(authority: trustme.CA) -> None:
    tls = tls_of(authority.issue_cert("other.example.com"))
    async with serving(greet, tls) as url, asking(url, verify_tls=False) as fetch:
        assert (await fetch(ASK)).body == b"hello"


async def test_a_certificate_of_an_unknown_authority_is_not_trusted(
    authority: trustme.CA,
) -> None:
    tls = tls_of(authority.issue_cert("127.0.0.1"))
    async with serving(greet, tls) as url, asking(url) as fetch:
        with pytest.raises(Unreachable, match="the certificate is not trusted; set verify_tls"):
            await fetch(ASK)


PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
FUTURE = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("host", "name", "valid", "message"),
    [
        ("127.0.0.1", "127.0.0.1", (None, PAST), "has expired; renew it"),
        ("127.0.0.1", "127.0.0.1", (FUTURE, None), "is not valid yet"),
        ("127.0.0.1", "127.0.0.2", (None, None), "is for another address"),
        ("localhost", "other.example.com", (None, None), "is for another host name"),
    ],
)
async def test_a_bad_certificate_is_told_with_what_to_do(
    *,
    authority: trustme.CA,
    bundle: Path,
    host: str,
    name: str,
    valid: tuple[datetime.datetime | None, datetime.datetime | None],
    message: str,
) -> None:
    certificate = authority.issue_cert(name, not_before=valid[0], not_after=valid[1])
    async with (
        serving(greet, tls_of(certificate)) as url,
        asking(url.replace("127.0.0.1", host), verify_tls=bundle) as fetch,
    ):
        with pytest.raises(Unreachable, match=f"the certificate {message}"):
            await fetch(ASK)


async def test_a_port_that_speaks_no_tls_is_told() -> None:
    async with serving(greet) as url, asking(url.replace("http:", "https:")) as fetch:
        with pytest.raises(Unreachable, match=r"no TLS connection \(.*speak https"):
            await fetch(ASK)


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "No such file or directory"), ("", "no CA certificate in it")]
)
async def test_a_ca_bundle_that_cannot_be_loaded_is_a_mistake_in_the_settings(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)

    with pytest.raises(SettingsError, match=f"^verify_tls: {path}: {problem}$"):
        async with asking("https://127.0.0.1", verify_tls=path):
            pass


# Our own certificate

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
EACH_VERSION = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)


def demanding(authority: trustme.CA, version: ssl.TLSVersion) -> ssl.SSLContext:
    """A server's side that wants a certificate of this authority."""
    context = tls_of(authority.issue_cert("127.0.0.1"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = version
    authority.configure_trust(context)
    return context


@asynccontextmanager
async def alerting(context: ssl.SSLContext) -> AsyncIterator[str]:
    """A server that says by an alert why it ends a handshake, which asyncio's own does not."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True, do_handshake_on_connect=False) as secure:
            with pytest.raises(ssl.SSLError):
                secure.do_handshake()
            with suppress(OSError):
                while socket.socket.recv(secure, 4096):  # an earlier end would overtake the alert
                    pass

    def serve() -> None:
        with suppress(OSError):  # the end
            while True:
                refuse(listener.accept()[0])

    with listener:
        serving = asyncio.create_task(asyncio.to_thread(serve))
        yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        await serving


@EACH_VERSION
@pytest.mark.parametrize("verified", [True, False])
async def test_our_certificate_is_shown_to_a_server_that_wants_one(
    authority: trustme.CA, bundle: Path, tmp_path: Path, version: ssl.TLSVersion, verified: bool
) -> None:
    shown = []

    async def look(request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        shown.append(request.transport.get_extra_info("peercert")["subjectAltName"])
        return ok()

    identity = certificates.client(authority, tmp_path, password=SECRET)
    trust = bundle if verified else False
    async with (
        serving(look, demanding(authority, version)) as url,
        asking(url, verify_tls=trust, identity=identity) as fetch,
    ):
        assert (await fetch(ASK)).status == 200

    assert "poller" in str(shown)


@EACH_VERSION
async def test_a_server_that_hangs_up_on_who_shows_no_certificate_is_told_with_what_to_do(
    authority: trustme.CA, bundle: Path, version: ssl.TLSVersion
) -> None:
    async with (
        serving(greet, demanding(authority, version)) as url,
        asking(url, verify_tls=bundle) as fetch,
    ):
        with pytest.raises(Unreachable, match=r"; does it want a client certificate \(client_cert"):
            await fetch(ASK)


async def test_a_server_that_has_answered_before_wants_no_certificate(
    authority: trustme.CA, bundle: Path
) -> None:
    async def vanish(request: web.BaseRequest) -> web.Response:
        if request.path == "/jobs":
            assert request.transport is not None
            request.transport.close()
        return ok()

    tls = tls_of(authority.issue_cert("127.0.0.1"))
    async with serving(vanish, tls) as url, asking(url, verify_tls=bundle) as fetch:
        await fetch(Request(path="/"))
        with pytest.raises(Unreachable, match=r"without an answer$"):
            await fetch(ASK)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (VERSIONS[0], "it ends the handshake: does it want a client certificate (client_cert)?"),
        (VERSIONS[1], "it wants a client certificate: set client_cert"),
    ],
)
async def test_a_server_that_says_that_it_wants_a_certificate_is_told_with_what_to_do(
    authority: trustme.CA, bundle: Path, version: ssl.TLSVersion, message: str
) -> None:
    async with (
        alerting(demanding(authority, version)) as url,
        asking(url, verify_tls=bundle) as fetch,
    ):
        with pytest.raises(Unreachable) as caught:
            await fetch(ASK)

    assert str(caught.value).endswith(f": no TLS connection: {message}")


@EACH_VERSION
@pytest.mark.parametrize(
    ("known", "dates", "message"),
    [
        (False, {}, "it does not trust the authority of client_cert"),
        (True, certificates.EXPIRED, "client_cert has expired: renew it"),
    ],
)
async def test_a_certificate_of_ours_that_is_refused_is_told_with_what_to_do(
    *,
    authority: trustme.CA,
    bundle: Path,
    tmp_path: Path,
    known: bool,
    dates: dict[str, Any],
    message: str,
    version: ssl.TLSVersion,
) -> None:
    identity = certificates.client(authority if known else trustme.CA(), tmp_path, **dates)
    async with (
        alerting(demanding(authority, version)) as url,
        asking(url, verify_tls=bundle, identity=identity) as fetch,
    ):
        with pytest.raises(Unreachable, match=message):
            await fetch(ASK)


async def test_a_certificate_of_ours_that_cannot_be_loaded_is_a_mistake_in_the_settings(
    authority: trustme.CA, tmp_path: Path
) -> None:
    identity = certificates.client(authority, tmp_path, password=SECRET)
    with pytest.raises(SettingsError, match=r"^client_key_password: missing") as caught:
        async with asking(
            "https://127.0.0.1", identity=Identity(cert=identity.cert, key=identity.key)
        ):
            pass
    assert SECRET not in "".join(told(caught.value))


# Redirects


def redirecting(to: Callable[[web.BaseRequest], str | None], status: int = 302) -> Handler:
    async def answer(request: web.BaseRequest) -> web.Response:
        location = to(request)
        if location is None:
            return ok(request.raw_path.encode())
        return web.Response(status=status, headers={"Location": location} if location else {})

    return answer


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "reached"),
    [
        ("/new/a%2Fb%7e?x=%20+", "/new/a%2Fb%7e?x=%20+"),
        ("new", "/kylin/new"),
        ("?page=2", "/kylin/jobs?page=2"),
        ("/with space/作业", "/with%20space/%E4%BD%9C%E4%B8%9A"),
        ("{origin}/absolute#part", "/absolute"),
        ("{user}/as-another", "/as-another"),
    ],
)
async def test_a_redirect_on_the_same_origin_is_followed(
    status: int, location: str, reached: str
) -> None:
    origins: dict[str, str] = {}
    seen = []

    def to(request: web.BaseRequest) -> str | None:
        seen.append(request.headers.get("Authorization"))
        return location.format(**origins) if request.raw_path == "/kylin/jobs" else None

    auth = Bearer(token=SecretStr("t"))
    async with serving(redirecting(to, status)) as url, asking(f"{url}/kylin", auth) as fetch:
        origins |= {"origin": url.upper(), "user": url.replace("//", "//me:pw@")}
        response = await fetch(ASK)

    assert response.body == reached.encode()
    assert seen == ["Bearer t", "Bearer t"]


@pytest.mark.parametrize(
    "location",
    [
        "{other}/kylin/jobs?session=1",
        "//{other_host}/kylin/jobs",
        "{other_user}/kylin/jobs",
        "{https}/kylin/jobs",
        "ftp://127.0.0.1/kylin/jobs",
    ],
)
async def test_a_redirect_to_another_origin_is_refused_and_nothing_is_sent_there(
    location: str,
) -> None:
    reached = []

    async def trap(request: web.BaseRequest) -> web.Response:
        reached.append(request.raw_path)
        return ok()

    names: dict[str, str] = {}
    auth = Bearer(token=SecretStr(SECRET))
    codes: list[str] = []
    leads = redirecting(lambda _: location.format(**names))
    async with serving(trap) as other, serving(leads) as url:
        names |= {
            "other": other,
            "other_host": other.removeprefix("http://"),
            "other_user": other.replace("//", f"//me:{SECRET}@"),
            "https": url.replace("http:", "https:"),
        }
        async with asking(f"{url}/kylin", auth, counted=codes.append) as fetch:
            with pytest.raises(Invalid) as caught:
                await fetch(ASK)

    assert str(caught.value).startswith("redirects to another origin: ")
    assert "credentials stay here; set url to " in str(caught.value)
    assert "session" not in str(caught.value)
    assert SECRET not in "".join(told(caught.value))
    assert reached == []
    assert codes == ["302"]


CREDENTIALS: dict[str, Auth] = {
    "basic": Basic(username="u", password=SecretStr(SECRET)),
    "bearer": Bearer(token=SecretStr(SECRET)),
    "token": Token(token=SecretStr(SECRET)),
    "huawei-aksk": HuaweiAkSk(
        access_key=SecretStr(f"{SECRET}-id"),
        secret_key=SecretStr(SECRET),
        security_token=SecretStr(f"{SECRET}-t"),
    ),
}


@asynccontextmanager
async def trapping() -> AsyncIterator[tuple[str, list[str]]]:
    """A server that nobody should speak to, and what it hears nevertheless."""
    reached: list[str] = []

    async def hear(request: web.BaseRequest) -> web.Response:
        reached.append(f"{request.method} {request.raw_path} {dict(request.headers)}")
        return web.Response(status=201, headers={"X-Subject-Token": "t"})

    async with serving(hear) as url:
        yield url, reached


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", [*CREDENTIALS, "huawei-token"])
async def test_credentials_of_no_kind_and_no_cookies_go_to_another_origin(
    kind: str, status: int
) -> None:
    async def lead(request: web.BaseRequest) -> web.Response:
        if request.path == "/v3/auth/tokens":
            issued = fixture("iam/v3_auth_tokens_response_3.json")
            return web.Response(status=201, headers={"X-Subject-Token": "t"}, body=issued)
        to = {"Location": f"{other}/jobs", "Set-Cookie": f"session={SECRET}; Domain=127.0.0.1"}
        return web.Response(status=status, headers=to)

    async with trapping() as (other, reached), serving(lead) as url:
        auth = CREDENTIALS.get(kind) or iam_auth(url)
        async with asking(url, auth, project_id="p1") as fetch:
            for path in ("/jobs", "/others"):
                with pytest.raises(Invalid, match="redirects to another origin"):
                    await fetch(Request(path=path))
    assert reached == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_sign_in_is_led_nowhere(status: int) -> None:
    async with trapping() as (other, reached):
        leads = redirecting(lambda _: f"{other}/v3/auth/tokens", status)
        async with serving(leads) as url, asking(url, iam_auth(url)) as fetch:
            with pytest.raises(Invalid, match=f"sign-in: HTTP {status}; is iam_url right"):
                await fetch(ASK)
    assert reached == []


async def test_the_message_of_a_refused_redirect_names_the_url_to_set() -> None:
    leads = redirecting(lambda _: "https://kylin.example.com:443/kylin/jobs")
    async with serving(leads) as url, asking(f"{url}/kylin") as fetch:
        with pytest.raises(Invalid, match=r"set url to https://kylin\.example\.com/kylin if"):
            await fetch(ASK)


async def test_a_redirect_from_https_to_http_is_refused(
    authority: trustme.CA, bundle: Path
) -> None:
    names: dict[str, str] = {}
    leads = redirecting(lambda _: names["http"])
    tls = tls_of(authority.issue_cert("127.0.0.1"))
    async with serving(leads, tls) as url, asking(url, verify_tls=bundle) as fetch:
        names["http"] = url.replace("https:", "http:")
        with pytest.raises(Invalid, match="redirects to another origin: http://"):
            await fetch(ASK)


@pytest.mark.parametrize(("hops", "followed"), [(5, True), (6, False)])
async def test_no_more_than_five_redirects_are_followed(hops: int, followed: bool) -> None:
    def to(request: web.BaseRequest) -> str | None:
        hop = int(request.path.removeprefix("/"))
        return f"/{hop + 1}" if hop < hops else None

    async with serving(redirecting(to)) as url, asking(url) as fetch:
        if followed:
            assert (await fetch(Request(path="/0"))).body == f"/{hops}".encode()
        else:
            with pytest.raises(Invalid, match="more than 5 redirects"):
                await fetch(Request(path="/0"))


@pytest.mark.parametrize(
    ("method", "location", "message"),
    [
        ("POST", "/new", "HTTP 302 to POST: redirects where none can go"),
        ("GET", "", "HTTP 302 to GET: redirects where none can go"),
        ("GET", "http://[", "HTTP 302: redirects to no url"),
        ("GET", "mailto:me", "HTTP 302: redirects to no url"),
    ],
)
async def test_a_redirect_that_cannot_be_followed_is_invalid(
    method: str, location: str, message: str
) -> None:
    async with serving(redirecting(lambda _: location)) as url, asking(url) as fetch:
        with pytest.raises(Invalid, match=f"^{message}$"):
            await fetch(Request(path="/", method=method))


async def test_a_redirect_in_no_known_encoding_is_invalid() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: /\xe9\r\nContent-Length: 0\r\n\r\n"
    async with sending(answer) as url, asking(url) as fetch:
        with pytest.raises(Invalid, match="HTTP 302: redirects to no url"):
            await fetch(ASK)


async def test_a_head_request_stays_one_over_a_redirect() -> None:
    seen = []

    def to(request: web.BaseRequest) -> str | None:
        seen.append(request.method)
        return "/new" if request.path == "/old" else None

    async with serving(redirecting(to, 303)) as url, asking(url) as fetch:
        response = await fetch(Request(path="/old", method="HEAD"))

    assert (response.status, response.body, seen) == (200, b"", ["HEAD", "HEAD"])


# Conditional requests

OLD = "Mon, 29 Apr 2024 08:00:00 GMT"
YOUNG = "Mon, 29 Apr 2024 08:59:01 GMT"
SENT = "Mon, 29 Apr 2024 09:00:00 GMT"


class Cached:
    """A server that knows conditions; counts what it was asked under which."""

    def __init__(self, **headers: str) -> None:
        self.headers = headers
        self.body = b"one"
        self.asked: list[str | None] = []
        self.confirms = True

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        condition = request.headers.get("If-None-Match", request.headers.get("If-Modified-Since"))
        self.asked.append(condition)
        if condition is not None and self.confirms:
            return web.Response(status=304, headers={"X-Now": "2"})
        return ok(self.body, Date=SENT, X_Now="1", **self.headers)


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"v1"'}, '"v1"'),
        ({"ETag": 'W/"v1"', "Last_Modified": OLD}, 'W/"v1"'),
        ({"Last_Modified": OLD}, OLD),
    ],
)
async def test_an_unchanged_body_is_asked_for_only_once(
    headers: dict[str, str], condition: str
) -> None:
    server = Cached(**headers)
    codes: list[str] = []
    async with serving(server) as url, asking(url, counted=codes.append) as fetch:
        first, *later = [await fetch(ASK) for _ in range(3)]

    assert server.asked == [None, condition, condition]
    assert codes == ["200", "304", "304"]
    assert not first.unchanged
    for response in later:
        assert (response.status, response.body, response.unchanged) == (200, b"one", True)
        assert response.headers["x-now"] == "2"
        assert response.headers["content-type"] == first.headers["content-type"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Last_Modified": YOUNG},
        {"Last_Modified": "yesterday"},
        {"Last_Modified": "Mon, 29 Apr 2024 08:00:00 GMT é"},
        {"ETag": ""},
        {"ETag": '"é"'},
    ],
)
async def test_no_condition_is_sent_where_it_would_be_unsafe(headers: dict[str, str]) -> None:
    server = Cached(**headers)
    async with serving(server) as url, asking(url) as fetch:
        await fetch(ASK)
        await fetch(ASK)

    assert server.asked == [None, None]


async def test_a_changed_body_takes_the_place_of_the_remembered_one() -> None:
    server = Cached(ETag='"v1"')
    async with serving(server) as url, asking(url) as fetch:
        await fetch(ASK)
        server.confirms, server.body, server.headers = False, b"two", {"ETag": '"v2"'}
        changed = await fetch(ASK)
        server.confirms = True
        unchanged = await fetch(ASK)

    assert server.asked == [None, '"v1"', '"v2"']
    assert (changed.body, changed.unchanged) == (b"two", False)
    assert (unchanged.body, unchanged.unchanged) == (b"two", True)


async def test_other_headers_and_methods_are_other_questions() -> None:
    server = Cached(ETag='"v1"')
    async with serving(server) as url, asking(url) as fetch:
        await fetch(ASK)
        await fetch(Request(path="/jobs", headers=(("workspace", "w1"),)))
        await fetch(Request(path="/jobs", method="HEAD"))
        await fetch(Request(path="/jobs", method="POST"))

    assert server.asked == [None] * 4


@pytest.mark.parametrize(("targets", "condition"), [(32, '"v1"'), (33, None)])
async def test_the_last_32_answers_are_remembered(targets: int, condition: str | None) -> None:
    server = Cached(ETag='"v1"')
    async with serving(server) as url, asking(url) as fetch:
        for number in range(targets):
            await fetch(Request(path=f"/{number}"))
        server.asked.clear()
        await fetch(Request(path="/0"))

    assert server.asked == [condition]


@pytest.mark.parametrize(("max_body", "condition"), [(6, '"v1"'), (5, None)])
async def test_what_is_remembered_fits_into_max_body(max_body: int, condition: str | None) -> None:
    server = Cached(ETag='"v1"')
    async with serving(server) as url, asking(url, max_body=max_body) as fetch:
        for path in ("/a", "/a", "/a", "/b", "/a"):
            await fetch(Request(path=path))

    assert server.asked == [None, '"v1"', '"v1"', None, condition]


async def test_a_confirmation_that_was_not_asked_for_is_invalid() -> None:
    async def confirm(request: web.BaseRequest) -> web.Response:
        return web.Response(status=304)

    async with serving(confirm) as url, asking(url) as fetch:
        with pytest.raises(Invalid, match="HTTP 304 to a question without a condition"):
            await fetch(ASK)


# Huawei


def iam_auth(url: str) -> HuaweiToken:
    return HuaweiToken(
        iam_url=url, username="IAMUser", password=SecretStr(SECRET), domain="IAMDomain"
    )


class Huawei:
    """IAM and a gateway in one: gives the tokens t1, t2, … and takes those in `good`."""

    def __init__(self) -> None:
        self.issued = 0
        self.good = {"t1", "t2", "t3"}
        self.refusal = web.HTTPUnauthorized
        self.targets: list[str] = []
        self.tokens: list[str] = []

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        self.targets.append(f"{request.method} {request.raw_path}")
        if request.path == "/v3/auth/tokens":
            self.issued += 1
            return web.Response(
                status=201,
                headers={"X-Subject-Token": f"t{self.issued}"},
                body=fixture("iam/v3_auth_tokens_response_3.json"),
            )
        self.tokens.append(request.headers["X-Auth-Token"])
        if self.tokens[-1] not in self.good:
            return web.Response(status=401)
        return ok()


async def test_one_sign_in_serves_all_questions() -> None:
    huawei = Huawei()
    codes: list[str] = []
    async with serving(huawei) as url, asking(url, iam_auth(url), counted=codes.append) as fetch:
        assert huawei.targets == []
        await asyncio.gather(*(fetch(ASK) for _ in range(8)))

    assert huawei.targets == ["POST /v3/auth/tokens?nocatalog=true"] + ["GET /jobs"] * 8
    assert huawei.tokens == ["t1"] * 8
    assert codes == ["201"] + ["200"] * 8


async def test_a_refused_token_is_replaced_and_the_question_asked_again() -> None:
    huawei = Huawei()
    huawei.good = {"t2"}
    async with serving(huawei) as url, asking(url, iam_auth(url)) as fetch:
        response = await fetch(ASK)

    assert response.status == 200
    assert huawei.tokens == ["t1", "t2"]


async def test_a_question_is_asked_again_only_once() -> None:
    huawei = Huawei()
    huawei.good = set()
    async with serving(huawei) as url, asking(url, iam_auth(url)) as fetch:
        response = await fetch(ASK)

    assert response.status == 401
    assert huawei.tokens == ["t1", "t2"]


async def test_many_refused_questions_need_one_new_token() -> None:
    huawei = Huawei()
    async with serving(huawei) as url, asking(url, iam_auth(url)) as fetch:
        await fetch(ASK)
        huawei.good = {"t2"}
        responses = await asyncio.gather(*(fetch(ASK) for _ in range(8)))

    assert {response.status for response in responses} == {200}
    assert huawei.issued == 2


async def test_a_refused_sign_in_is_told_in_iam_s_words_and_not_repeated() -> None:
    signed_in = []

    async def refuse(request: web.BaseRequest) -> web.Response:
        signed_in.append(request.raw_path)
        return web.Response(status=401, body=fixture("iam/v3_auth_tokens_error_6.json"))

    async with serving(refuse) as url, asking(url, iam_auth(url)) as fetch:
        with pytest.raises(Rejected, match="The username or password is wrong") as caught:
            await fetch(ASK)

    assert len(signed_in) == 1
    assert SECRET not in "".join(told(caught.value))


async def test_a_sign_in_follows_no_redirect() -> None:
    targets = []

    def to(request: web.BaseRequest) -> str:
        targets.append(request.raw_path)
        return "/elsewhere"

    async with serving(redirecting(to)) as url, asking(url, iam_auth(url)) as fetch:
        with pytest.raises(Invalid, match="sign-in: HTTP 302"):
            await fetch(ASK)

    assert targets == ["/v3/auth/tokens?nocatalog=true"]


async def test_an_iam_that_is_away_is_unreachable(unused_tcp_port: int) -> None:
    iam = f"http://127.0.0.1:{unused_tcp_port}"
    async with serving(greet) as url, asking(url, iam_auth(iam)) as fetch:
        with pytest.raises(Unreachable, match="connection refused") as caught:
            await fetch(ASK)

    assert SECRET not in "".join(told(caught.value))


async def test_a_token_longer_than_usual_headers_is_taken() -> None:
    long = "M" * 20_000
    seen = []

    async def issue(request: web.BaseRequest) -> web.Response:
        seen.append(request.raw_path)
        return web.Response(
            status=201,
            headers={"X-Subject-Token": long},
            body=fixture("iam/v3_auth_tokens_response_3.json"),
        )

    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    async with (
        serving(issue) as iam,
        sending(answer) as url,
        asking(url, iam_auth(iam)) as fetch,
    ):
        assert (await fetch(ASK)).body == b"ok"

    assert len(seen) == 1


async def test_every_step_is_signed_as_it_is_received() -> None:
    auth = HuaweiAkSk(
        access_key=SecretStr("AK"), secret_key=SecretStr(SECRET), security_token=SecretStr("T==")
    )
    request = Request(
        path="/jobs",
        query=(("z", "a b+c/d~"), ("a", "作业")),
        headers=(("workspace", "w1"),),
    )
    targets = []
    shown = []
    expected = []

    async def verify(received: web.BaseRequest) -> web.Response:
        path, _, query = received.raw_path.partition("?")
        headers = {
            "Host": received.headers["Host"],
            "X-Sdk-Date": "20240429T080000Z",
            "X-Project-Id": "p1",
            "X-Security-Token": "T==",
            "workspace": "w1",
        }
        signed = sign(
            method="GET",
            host=received.headers["Host"],
            path=path,
            query=query,
            headers=headers,
            body=b"",
            access_key="AK",
            secret_key=SECRET,
        )
        targets.append(received.raw_path)
        shown.append({name: received.headers.get(name) for name in signed})
        expected.append(signed)
        to = "/v2/%E4%BD%9C?a=1"
        return web.Response(status=307, headers={"Location": to}) if path == "/jobs" else ok()

    async with serving(verify) as url, asking(url, auth, project_id="p1") as fetch:
        await fetch(request)

    assert targets == [request.target, "/v2/%E4%BD%9C?a=1"]
    assert shown == expected
    assert {headers["Host"] for headers in shown} == {url.removeprefix("http://")}


# Secrets


async def test_an_answer_knows_what_it_was_asked_with_also_if_it_is_a_remembered_one() -> None:
    server = Cached(ETag='"v1"')
    auth = Basic(username="u", password=SecretStr(SECRET))
    async with serving(server) as url, asking(url, auth) as fetch:
        for unchanged in (False, True):
            response = await fetch(ASK)
            assert response.unchanged is unchanged
            assert response.secrets.text(f"not {SECRET}") == "not ***"


async def test_an_answer_knows_the_token_that_it_was_asked_with() -> None:
    token = "issued-" + "x" * 100

    async def answer(request: web.BaseRequest) -> web.Response:
        if request.method == "GET":
            return ok()
        issued = fixture("iam/v3_auth_tokens_response_3.json")
        return web.Response(status=201, headers={"X-Subject-Token": token}, body=issued)

    async with serving(answer) as url, asking(url, iam_auth(url)) as fetch:
        response = await fetch(ASK)
    assert response.secrets.text(f"neither {token} nor {SECRET}") == "neither *** nor ***"


@pytest.mark.parametrize("status", [201, 401])
async def test_a_sign_in_that_repeats_the_password_does_not_bring_it_into_the_message(
    status: int,
) -> None:
    async def repeat(request: web.BaseRequest) -> web.Response:
        said = (await request.read()).decode()
        body = json.dumps({"error": {"message": f"{'.' * 190}{said[said.index(SECRET) :]}"}})
        return web.Response(status=status, headers={"X-Subject-Token": "t"}, text=body)

    async with serving(repeat) as url, asking(url, iam_auth(url)) as fetch:
        with pytest.raises(VendorError) as caught:
            await fetch(ASK)
    assert SECRET[:4] not in "".join(told(caught.value))


async def test_a_redirect_to_a_host_named_like_a_secret_is_refused_without_it() -> None:
    auth = HuaweiAkSk(access_key=SecretStr("AccessKey"), secret_key=SecretStr(SECRET))
    leads = redirecting(lambda _: "https://AccessKey.example.com/")
    async with serving(leads) as url, asking(url, auth) as fetch:
        with pytest.raises(Invalid, match=r"origin: https://\*\*\*\.example\.com;"):
            await fetch(ASK)


@pytest.mark.parametrize("auth", CREDENTIALS.values(), ids=CREDENTIALS)
@pytest.mark.parametrize(
    "sent", [b"", b"no http\r\n\r\n", HEAD + b"Content-Length: 9\r\n\r\n1", CHUNKED + b"zz\r\n"]
)
async def test_no_error_shows_a_secret(auth: Auth, sent: bytes) -> None:
    async with sending(sent) as url, asking(url, auth) as fetch:
        with pytest.raises(VendorError) as caught:
            await fetch(ASK)

    shown = "".join(told(caught.value))
    assert SECRET not in shown
    assert base64.b64encode(f"u:{SECRET}".encode()).decode() not in shown
    assert SECRET not in repr(Endpoint(url="http://h", auth=auth))
