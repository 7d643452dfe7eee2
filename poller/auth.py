"""What the credentials add to a request: a fixed header, Huawei's signature, or Huawei's token."""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias, assert_never
from urllib.parse import parse_qsl, quote, unquote

import msgspec
import orjson
from pydantic import SecretStr
from yarl import URL

from poller.errors import Invalid, Rejected, Unreachable, VendorError
from poller.payload import decode, iso_ms
from poller.redaction import Redaction
from poller.runs import Ms
from poller.settings import Auth, Basic, Bearer, HuaweiAkSk, HuaweiToken, NoAuth, Token
from poller.wire import Response

Headers: TypeAlias = dict[str, str]


class Call(NamedTuple):
    """One HTTP request as it goes over the wire; the URL is sent as it is."""

    method: str
    url: URL
    headers: Headers
    body: bytes = b""

    def adding(self, headers: Headers) -> Call:
        """The same call with these headers over its own."""
        return self._replace(headers={**self.headers, **headers})


Exchange: TypeAlias = Callable[[Call], Awaitable[Response]]
"""One HTTP exchange: call → answer of any status, or a VendorError."""

_ALGORITHM = "SDK-HMAC-SHA256"
_EARLY_MS = 30 * 60_000
_AGAIN_MS = 60_000
_REFUSED = re.compile(rb'"APIGW?\.030[17]"')


def redaction(auth: Auth) -> Redaction:
    """Knows every secret of these credentials, in each form in which one is sent."""
    fields = vars(auth).values()
    secrets = [field.get_secret_value() for field in fields if isinstance(field, SecretStr)]
    # Without its end, which some would escape.
    pairs = [_pair(auth).rstrip("=")] if isinstance(auth, Basic) else []
    return Redaction(*secrets, *pairs)


def _pair(auth: Basic) -> str:
    pair = f"{auth.username}:{auth.password.get_secret_value()}"
    return base64.b64encode(pair.encode()).decode()


def authorized(call: Call, auth: Auth, *, project_id: str | None, now_ms: Ms) -> Call:
    """The call with what its credentials add; a Huawei token is added by who holds `Tokens`."""
    match auth:
        case Basic():
            return call.adding({"Authorization": f"Basic {_pair(auth)}"})
        case Bearer():
            return call.adding({"Authorization": f"Bearer {auth.token.get_secret_value()}"})
        case Token():
            return call.adding({"Authorization": f"Token {auth.token.get_secret_value()}"})
        case HuaweiAkSk():
            return _signed(call, auth, project_id, now_ms)
        case NoAuth() | HuaweiToken():
            return call
        case _:
            assert_never(auth)


def _signed(call: Call, auth: HuaweiAkSk, project_id: str | None, now_ms: Ms) -> Call:
    at = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
    headers = {**call.headers, "X-Sdk-Date": at.strftime("%Y%m%dT%H%M%SZ")}
    if project_id is not None:
        headers["X-Project-Id"] = project_id
    if auth.security_token is not None:
        headers["X-Security-Token"] = auth.security_token.get_secret_value()
    headers = sign(
        method=call.method,
        host=call.url.host_port_subcomponent or "",
        path=call.url.raw_path,
        query=call.url.raw_query_string,
        headers=headers,
        body=call.body,
        access_key=auth.access_key.get_secret_value(),
        secret_key=auth.secret_key.get_secret_value(),
    )
    return call._replace(headers=headers)


def sign(
    *,
    method: str,
    host: str,
    path: str,
    query: str,
    headers: Mapping[str, str],
    body: bytes,
    access_key: str,
    secret_key: str,
) -> Headers:
    """Sign a request with SDK-HMAC-SHA256, Huawei's scheme for access and secret keys.

    Args:
        method: GET, POST, …
        host: as the Host header says it, with the port if it is not the scheme's own.
        path: as it is sent, percent-encoded.
        query: as it is sent, percent-encoded, without the question mark.
        headers: to be sent, `X-Sdk-Date` (`20240429T080000Z`) among them; all but those with `_`
            in their name are signed.
        body: to be sent.
        access_key: names the secret key.
        secret_key: the key of the HMAC, used as it is.

    Returns:
        The headers with `Host` and `Authorization`.
    """
    headers = {**headers, "Host": host}
    fields = ((name.lower(), value.strip()) for name, value in headers.items() if "_" not in name)
    signed = dict(sorted(fields))
    text = string_to_sign(
        signed["x-sdk-date"], canonical_request(method, path, query, signed, body)
    )
    signature = hmac.new(secret_key.encode(), text.encode(), hashlib.sha256).hexdigest()
    parts = (f"Access={access_key}", f"SignedHeaders={';'.join(signed)}", f"Signature={signature}")
    return {**headers, "Authorization": f"{_ALGORITHM} {', '.join(parts)}"}


def canonical_request(
    method: str, path: str, query: str, signed: Mapping[str, str], body: bytes
) -> str:
    """The one spelling of a request that is signed.

    The path is spelled anew segment by segment and ends with `/` even where the one sent does
    not; an encoded `/` counts as a separator. `signed` are headers by lower-case name, sorted.
    """
    segments = [quote(segment, safe="~") for segment in unquote(path).split("/")]
    spelled = "/".join(segments)
    pairs = sorted(parse_qsl(query, keep_blank_values=True))
    return "\n".join(
        [
            method.upper(),
            spelled if spelled.endswith("/") else f"{spelled}/",
            "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in pairs),
            *(f"{name}:{value}" for name, value in signed.items()),
            "",
            ";".join(signed),
            hashlib.sha256(body).hexdigest(),
        ]
    )


def string_to_sign(date: str, request: str) -> str:
    """Algorithm, date and hash of a canonical request: what the HMAC is taken of."""
    return f"{_ALGORITHM}\n{date}\n{hashlib.sha256(request.encode()).hexdigest()}"


@dataclass(frozen=True, slots=True)
class _Issued:
    value: str = field(repr=False)
    renew_ms: Ms
    end_ms: Ms


class Tokens:
    """Huawei IAM tokens of one source, renewed before they end.

    There is one sign-in at a time, and whoever waits for it shares its outcome: a wrong password
    is sent once, not once per question, because IAM locks accounts.
    """

    def __init__(
        self,
        auth: HuaweiToken,
        project_id: str | None,
        exchange: Exchange,
        now_ms: Callable[[], Ms],
    ) -> None:
        self._auth = auth
        self._project_id = project_id
        self._exchange = exchange
        self._now_ms = now_ms
        self._secrets = redaction(auth)
        self._turn = asyncio.Lock()
        self._tries = 0
        self._held: _Issued | VendorError = Rejected("not signed in")

    async def get(self, refused: str | None = None) -> str:
        """A token that is good for a while; `refused` is one that the vendor has just refused.

        Raises:
            Rejected: IAM refuses the credentials, or calls the sign-in malformed.
            Unreachable: IAM does not answer, or asks to be left alone.
            Invalid: this is not IAM's documented answer.
        """
        held = self._held
        if isinstance(held, _Issued) and held.value == refused:
            held = self._held = Rejected("the vendor refused a new token")
        if isinstance(held, _Issued) and self._now_ms() < held.renew_ms:
            return held.value
        tries = self._tries
        async with self._turn:
            await self._renew(tries)
        held = self._held
        if isinstance(held, VendorError):
            raise type(held)(str(held)) from held
        return held.value

    async def _renew(self, tries: int) -> None:
        if self._tries != tries:
            return  # another question has just signed in, or was refused
        now_ms = self._now_ms()
        try:
            self._held = await self._sign_in(now_ms)
        except VendorError as error:
            self._held = self._kept(error, now_ms)
        self._tries += 1

    def _kept(self, error: VendorError, now_ms: Ms) -> _Issued | VendorError:
        """The old token for a while, if it is good and IAM is only away; else the error."""
        held = self._held
        if isinstance(error, Unreachable) and isinstance(held, _Issued) and now_ms < held.end_ms:
            return replace(held, renew_ms=now_ms + _AGAIN_MS)
        return error

    async def _sign_in(self, now_ms: Ms) -> _Issued:
        url = URL(f"{self._auth.iam_url.rstrip('/')}/v3/auth/tokens?nocatalog=true")
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        body = sign_in_body(self._auth, self._project_id)
        response = await self._exchange(Call("POST", url, headers, body))
        response = msgspec.structs.replace(response, body=self._secrets.body(response.body))
        if response.status != 201:
            raise _no_token(response, self._secrets)
        return _issued(response, now_ms)


def sign_in_body(auth: HuaweiToken, project_id: str | None) -> bytes:
    """IAM's password request, scoped to the project, or to the whole domain without one."""
    domain = {"name": auth.domain}
    password = auth.password.get_secret_value()
    user = {"name": auth.username, "password": password, "domain": domain}
    scope: dict[str, Any] = {"project": {"id": project_id}} if project_id else {"domain": domain}
    identity = {"methods": ["password"], "password": {"user": user}}
    return orjson.dumps({"auth": {"identity": identity, "scope": scope}})


class _Lifetime(msgspec.Struct):
    expires_at: str
    issued_at: str | None = None


class _SignIn(msgspec.Struct):
    token: _Lifetime


class _Said(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: _Said = msgspec.field(default_factory=_Said)


def _issued(response: Response, now_ms: Ms) -> _Issued:
    """The token of a 201. Its life is taken by IAM's clock and counted from ours."""
    value = response.headers.get("x-subject-token", "")
    if not (value and value.isascii() and value.isprintable()):
        raise Invalid("sign-in: no usable X-Subject-Token in IAM's answer")
    token = decode(response.body, _SignIn).token
    end_ms = iso_ms(token.expires_at)
    if end_ms is None:
        raise Invalid("sign-in: no readable expires_at in IAM's answer")
    life_ms = max(0, end_ms - (iso_ms(token.issued_at) or now_ms))
    early_ms = min(life_ms // 10, _EARLY_MS)
    return _Issued(value, now_ms + life_ms - early_ms, now_ms + life_ms)


def _no_token(response: Response, secrets: Redaction) -> VendorError:
    status = response.status
    # Again, for what JSON may spell as it likes.
    said = " ".join(secrets.text(_iam_message(response.body)).split())[:200]
    text = f"sign-in: HTTP {status}" + (f": {said}" if said else "")
    if status in (400, 401, 403):
        return Rejected(text)
    if status == 429 or status >= 500:
        return Unreachable(text)
    return Invalid(f"{text}; is iam_url right?")


def _iam_message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Refusal).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def token_refused(response: Response) -> bool:
    """Whether the gateway wants another token: 401, APIG.0301 (wrong) or APIG.0307 (to renew)."""
    if response.status == 401:
        return True
    return response.status >= 400 and _REFUSED.search(response.body[:4096]) is not None
