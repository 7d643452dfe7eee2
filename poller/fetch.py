"""Asks a source over HTTP: `wire.Request` → `wire.Response` over one session, whatever happens."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote, urljoin

import aiohttp
import msgspec
from aiohttp.http_exceptions import ContentEncodingError
from yarl import URL

from poller import __version__, tls
from poller.auth import (
    Call,
    Exchange,
    Headers,
    Tokens,
    authorized,
    redaction,
    token_refused,
)
from poller.errors import Invalid, SettingsError, Unreachable, VendorError
from poller.redaction import Redaction
from poller.runs import Ms
from poller.settings import Auth, HuaweiToken
from poller.wire import Request, Response

Fetch: TypeAlias = Callable[[Request], Awaitable[Response]]
"""Request → answer of any HTTP status; raises Unreachable, Invalid, or Rejected by a sign-in."""

_Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
"""Target and headers of a request: what makes two questions the same."""

_KEEP_ALIVE_S = 300.0  # outlives every usual interval: a new TLS connection costs ten polls
_DNS_S = 60
_MAX_HEADER = 1 << 16  # Huawei's tokens alone are longer than aiohttp's 8 KiB
_MAX_REDIRECTS = 5
_MAX_REMEMBERED = 32
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SURE_S = 60  # a Last-Modified younger than this may hide a second change (RFC 9110 §8.8.2.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a source answers, and how it may be asked.

    Attributes:
        url: an http or https origin, perhaps with a path prefix.
        auth: its credentials.
        timeout_s: seconds for one whole exchange, body included.
        max_body: bytes of one unpacked answer, and of all that are remembered.
        concurrency: exchanges at the same time.
        verify_tls: whether the server's certificate is checked, or the CA bundle to check it by.
        identity: our own certificate, for a server that wants one.
        project_id: Huawei's project, for `X-Project-Id` and a token's scope.
    """

    url: str
    auth: Auth
    timeout_s: float = 10
    max_body: int = 32 << 20
    concurrency: int = 8
    verify_tls: bool | Path = True
    identity: tls.Identity | None = None
    project_id: str | None = None


@asynccontextmanager
async def connect(
    endpoint: Endpoint,
    *,
    counted: Callable[[str], None] = lambda _: None,
    now_ms: Callable[[], Ms],
) -> AsyncIterator[Fetch]:
    """A source to ask, for as long as the context lasts.

    Args:
        endpoint: where and how.
        counted: gets the status of every HTTP exchange as text, sign-ins and redirects included,
            or "error" where there was no whole answer.
        now_ms: the wall clock, for signatures and for the life of tokens.

    Raises:
        SettingsError: the CA bundle or the client certificate cannot be loaded.
    """
    connector = aiohttp.TCPConnector(
        ssl=_context(endpoint),
        limit=endpoint.concurrency,
        keepalive_timeout=_KEEP_ALIVE_S,
        ttl_dns_cache=_DNS_S,
    )
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": f"job-poller/{__version__}"},
        timeout=aiohttp.ClientTimeout(),
        max_field_size=_MAX_HEADER,
    ) as session:
        line = _Line(session, endpoint, counted)
        yield _Source(endpoint, line.exchange, now_ms).fetch


def _context(endpoint: Endpoint) -> ssl.SSLContext | bool:
    if endpoint.identity is None and isinstance(endpoint.verify_tls, bool):
        return endpoint.verify_tls  # aiohttp has these two ready
    try:
        return tls.context(endpoint.verify_tls, endpoint.identity)
    except tls.Unusable as error:
        raise SettingsError([f"{error.key}: {error}"]) from error


class _Line:
    """One exchange at a time per slot: bounded in time and size, every mishap in our own words."""

    def __init__(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, counted: Callable[[str], None]
    ) -> None:
        self._session = session
        self._timeout_s = endpoint.timeout_s
        self._max_body = endpoint.max_body
        self._counted = counted
        anonymous = endpoint.identity is None and endpoint.url.startswith("https:")
        self._hint = "; does it want a client certificate (client_cert)?" * anonymous
        # The clock of an exchange starts here and not in the connector's own queue.
        self._slots = asyncio.Semaphore(endpoint.concurrency)

    async def exchange(self, call: Call) -> Response:
        """Send one request, read one whole answer.

        Raises:
            Unreachable: no whole answer in time.
            Invalid: the answer is too large, or not HTTP.
        """
        async with self._slots:
            try:
                response = await self._exchange(call)
            except VendorError:
                self._counted("error")
                raise
        self._counted(str(response.status))
        return response

    async def _exchange(self, call: Call) -> Response:
        method, url, headers, body = call
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.request(
                    method, url, headers=headers, data=body or None, allow_redirects=False
                ) as answer,
            ):
                fields = {name.lower(): value for name, value in answer.headers.items()}
                self._hint = ""
                unpacked = await self._read(answer.content)
                return Response(status=answer.status, headers=fields, body=unpacked)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            failure = _mishap(error, url, self._timeout_s, self._hint)
            # Some show our own request with its credentials: of these only the cause is chained.
            telling = isinstance(error, aiohttp.ClientResponseError | ValueError)
            cause = error.__cause__ if telling else error
        raise failure from cause

    async def _read(self, content: aiohttp.StreamReader) -> bytes:
        chunks = []
        size = 0
        while chunk := await content.readany():
            size += len(chunk)
            if size > self._max_body:
                raise Invalid(f"the answer is larger than max_body ({self._max_body} bytes)")
            chunks.append(chunk)
        return b"".join(chunks)


class _Source:
    """A source's questions: conditional, signed in, led on by redirects."""

    def __init__(self, endpoint: Endpoint, exchange: Exchange, now_ms: Callable[[], Ms]) -> None:
        self._auth = endpoint.auth
        self._secrets = redaction(endpoint.auth)
        self._project_id = endpoint.project_id
        self._url = URL(endpoint.url)
        self._base = str(self._url).rstrip("/")
        self._exchange = exchange
        self._now_ms = now_ms
        self._remembered = _Remembered(endpoint.max_body)
        self._tokens = (
            Tokens(endpoint.auth, endpoint.project_id, exchange, now_ms)
            if isinstance(endpoint.auth, HuaweiToken)
            else None
        )

    async def fetch(self, request: Request) -> Response:
        """The answer to a request, of whatever status but 304.

        Raises:
            Unreachable: no whole answer in time.
            Invalid: it is too large, or not HTTP, or leads elsewhere.
            Rejected: the sign-in for a token was refused.
        """
        key = target, headers = request.target, request.headers
        old = self._remembered.get(key) if request.method == "GET" else None
        condition = old.condition if old is not None else {}
        url = URL(self._base + target, encoded=True)
        call = Call(request.method, url, {**dict(headers), **condition}, request.body)
        response = await self._signed_in(call)
        if response.status == 304:
            response = _confirmed(old, response)
        if response.status == 200 and request.method == "GET":
            self._remembered.put(key, response)
        return response

    async def _signed_in(self, call: Call) -> Response:
        if self._tokens is None:
            return await self._follow(call, self._secrets)
        token = await self._tokens.get()
        response = await self._with(token, call)
        if token_refused(response):
            token = await self._tokens.get(refused=token)
            response = await self._with(token, call)
        return response

    async def _with(self, token: str, call: Call) -> Response:
        call = call.adding({"X-Auth-Token": token})
        return await self._follow(call, self._secrets.knowing(token))

    async def _follow(self, call: Call, secrets: Redaction) -> Response:
        for _ in range(_MAX_REDIRECTS + 1):
            # Anew for every step: a signature is of one path.
            response = await self._exchange(
                authorized(call, self._auth, project_id=self._project_id, now_ms=self._now_ms())
            )
            response = msgspec.structs.replace(response, secrets=secrets)
            if response.status not in _REDIRECTS:
                return response
            call = call._replace(url=self._led_to(call, response))
        raise Invalid(f"more than {_MAX_REDIRECTS} redirects")

    def _led_to(self, call: Call, response: Response) -> URL:
        location = response.headers.get("location", "").strip()
        if not location or call.method not in ("GET", "HEAD"):
            raise Invalid(f"HTTP {response.status} to {call.method}: redirects where none can go")
        try:
            # Escapes stay as they are; only what may not stand in a URL is escaped.
            location = quote(location, safe="%/:?#[]@!$&'()*+,;=~")
            led_to = urljoin(str(call.url), location)
            origin = URL(led_to).origin()
        except ValueError as error:
            raise Invalid(f"HTTP {response.status}: redirects to no url") from error
        if str(origin) != str(self._url.origin()):
            shown = response.secrets.text(str(origin))
            raise Invalid(
                f"redirects to another origin: {shown}; credentials stay here; "
                f"set url to {shown}{self._url.raw_path.rstrip('/')} if that is right"
            )
        return URL(f"{origin}{URL(led_to, encoded=True).raw_path_qs}", encoded=True)


class _Confirmable(msgspec.Struct, frozen=True):
    """A 200 and the condition under which the server need not send it again."""

    response: Response
    condition: Headers


class _Remembered:
    """Answers that the server lets us ask for again by condition; the longest unused go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._answers: dict[_Key, _Confirmable] = {}

    def get(self, key: _Key) -> _Confirmable | None:
        return self._answers.get(key)

    def put(self, key: _Key, response: Response) -> None:
        self._drop(key)
        condition = _condition(response.headers)
        if not condition:
            return
        self._answers[key] = _Confirmable(response, condition)
        self._bytes += len(response.body)
        while len(self._answers) > _MAX_REMEMBERED or self._bytes > self._max_bytes:
            self._drop(next(iter(self._answers)))

    def _drop(self, key: _Key) -> None:
        old = self._answers.pop(key, None)
        if old is not None:
            self._bytes -= len(old.response.body)


def _condition(fields: Mapping[str, str]) -> Headers:
    """What to send so that the same body need not come again; nothing if that is not safe."""
    etag = fields.get("etag")
    if etag and _sendable(etag):
        return {"If-None-Match": etag}
    changed = fields.get("last-modified")
    if not changed or not _sendable(changed):
        return {}
    try:
        sent = parsedate_to_datetime(fields.get("date", "")).timestamp()
        sure = sent - parsedate_to_datetime(changed).timestamp() >= _SURE_S
    except (ValueError, OverflowError):
        return {}
    return {"If-Modified-Since": changed} if sure else {}


def _sendable(value: str) -> bool:
    return value.isascii() and value.isprintable()


def _confirmed(old: _Confirmable | None, response: Response) -> Response:
    if old is None:
        raise Invalid("HTTP 304 to a question without a condition")
    fields = {**old.response.headers, **response.headers}
    return msgspec.structs.replace(old.response, headers=fields, unchanged=True)


_CERTIFICATE = {
    9: "is not valid yet; check the clocks",
    10: "has expired; renew it, or set verify_tls to false until it is",
    18: "is not trusted; set verify_tls to the path of its CA bundle",
    19: "is not trusted; set verify_tls to the path of its CA bundle",
    20: "is not trusted; set verify_tls to the path of its CA bundle",
    21: "is not trusted; set verify_tls to the path of its CA bundle",
    62: "is for another host name; correct url, or have the name put into it",
    64: "is for another address; correct url, or have the address put into it",
}
"""OpenSSL's X509_V_ERR_* codes, for the operator."""


def _mishap(error: Exception, url: URL, timeout_s: float, hint: str) -> VendorError:
    """What went wrong on the line, as a sentence that names the host and nothing secret.

    `hint` is for a connection that the server ended before there was any answer.
    """
    where = url.host_port_subcomponent
    ended = isinstance(error.__cause__ or error, ConnectionResetError)
    if what := _of_tls(error):
        return Unreachable(f"{where}: {what}")
    match error:
        case aiohttp.ClientConnectorDNSError():
            what = f"name not found ({error.strerror})"
        case aiohttp.ClientConnectorError():
            what = f"cannot connect: {_system(error)}{hint * ended}"
        case TimeoutError():
            what = f"no whole answer within {timeout_s:g} s"
        case aiohttp.ServerDisconnectedError():
            what = f"the connection was closed without an answer{hint}"
        case aiohttp.ClientPayloadError() if not isinstance(error.__cause__, ContentEncodingError):
            what = "the answer broke off"
        case OSError():
            what = f"the connection broke: {_system(error)}{hint * ended}"
        case ValueError():
            return Invalid(f"{where}: no host name, or a header that HTTP cannot carry")
        case _:
            return Invalid(f"{where}: the answer is not HTTP, or packed wrongly")
    return Unreachable(f"{where}: {what}")


def _of_tls(error: Exception) -> str | None:
    """What is wrong with one of the two certificates, or with TLS as such; None if nothing is."""
    refused = tls.refusal(error) or tls.refusal(error.__cause__)
    if refused is not None:
        return f"no TLS connection: {refused}"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        code = getattr(error.certificate_error, "verify_code", 0)
        return f"the certificate {_CERTIFICATE.get(code, 'is not accepted')}"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return f"no TLS connection ({error.strerror}); does this port speak https?"
    return None


def _system(error: OSError) -> str:
    return os.strerror(error.errno).lower() if error.errno else type(error).__name__
