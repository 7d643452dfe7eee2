"""By which names we may be called where no token is wanted.

A page of another site can have its own name lead to 127.0.0.1 (DNS rebinding); its reader's browser
then takes us for that site, and lets the page read what we answer.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from poller.web.problems import problem


def only_own(host: str) -> Middleware:
    """Answer requests for loopback, and for the host that is listened on, and no others.

    `/healthz`, which tells nothing, is answered by every name.
    """
    own = {"localhost", host.strip("[]").lower()}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        name = _name(request.headers.get(hdrs.HOST, "localhost"))
        if request.path == "/healthz" or name in own or _is_loopback(name):
            return await handler(request)
        text = "this name is not mine: call me by the address of http.listen, or set http.token"
        return problem(421, text)

    return guard


def _name(field: str) -> str:
    """The host in a Host field, without port and brackets; empty if there is none."""
    try:
        return urlsplit(f"//{field}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
