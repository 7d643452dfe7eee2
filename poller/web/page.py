"""The board: one HTML file, and the policy that lets nothing run or load but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from aiohttp import web

NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
"""The policy of every other answer."""

_BOARD = (files("poller.web") / "board.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """Sources for a policy: the hash of each element of that name."""
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", _BOARD, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


_POLICY = (
    f"{NOTHING}; script-src {_hashes('script')}; style-src {_hashes('style')};"
    " connect-src 'self'; img-src data:; require-trusted-types-for 'script'"
)


async def board(_request: web.Request) -> web.Response:
    """The board; it asks the API for all that it shows."""
    return answer()


def answer(status: int = 200) -> web.Response:
    """The page. It holds nothing but itself, so it may come with 401, and ask for the token."""
    headers = {"Content-Security-Policy": _POLICY}
    return web.Response(status=status, text=_BOARD, content_type="text/html", headers=headers)
