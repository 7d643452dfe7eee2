"""Takes credentials out of what others say: some repeat in an error what they were sent."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Final
from urllib.parse import quote, quote_plus

STARS: Final = "***"

_SHORTEST: Final = 4
"""What is shorter is in many a word; stars there would tell more than they hide."""

_UNSAFE: Final = ("(?!)", "[<>&]", "[<>&='+]")
"""What writers of JSON escape besides what they must: nothing, as Go does, as Gson does."""


class Redaction:
    """Knows secrets, and takes them out of texts, in whichever of the usual spellings.

    Args:
        secrets: as they were sent.
    """

    def __init__(self, *secrets: str) -> None:
        self._secrets = secrets

    def knowing(self, secret: str) -> Redaction:
        """One that knows this secret too."""
        return Redaction(*self._secrets, secret)

    def text(self, text: str) -> str:
        """A text without them."""
        for spelling in self._spellings:
            text = text.replace(spelling, STARS)
        return text

    def body(self, body: bytes) -> bytes:
        """The same of bytes in UTF-8 or Latin-1."""
        for spelling in self._spellings:
            for encoding in ("utf-8", "latin-1"):
                body = body.replace(spelling.encode(encoding, "backslashreplace"), STARS.encode())
        return body

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Take them out of what errors say on their way out."""
        try:
            yield
        except Exception as error:
            error.args = tuple(
                self.text(said) if isinstance(said, str) else said for said in error.args
            )
            raise

    @cached_property
    def _spellings(self) -> list[str]:
        """Longest first, so that nothing is left of one that begins with another."""
        secrets = (secret for secret in self._secrets if len(secret) >= _SHORTEST)
        known = {spelling for secret in secrets for spelling in _spellings(secret)}
        return sorted(known, key=lambda spelling: (-len(spelling), spelling))


def _spellings(secret: str) -> Iterator[str]:
    """How programs, URLs, HTML and JSON write a text."""
    yield from (secret, secret.lower(), repr(secret)[1:-1])
    for quoted in (quote(secret), quote(secret, safe=""), quote_plus(secret)):
        yield quoted
        yield re.sub("%..", lambda found: found[0].lower(), quoted)
    for escaped in (html.escape(secret, quote=False), html.escape(secret)):
        yield escaped
        yield escaped.replace("&#x27;", "&#39;")
    for ascii_only in (True, False):
        plain = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        for unsafe in _UNSAFE:
            written = re.sub(unsafe, lambda found: f"\\u{ord(found[0]):04x}", plain)
            yield written
            yield re.sub(r"(?<=\\u)....", lambda found: found[0].upper(), written)
        yield plain.replace("/", r"\/")
