"""Errors, named by what the catcher does about them."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*(?:"(\s*:)?|\\?$)', re.DOTALL)
"""With the colon after it if it is a key; the last may be cut off."""

Reason: TypeAlias = Literal["unreachable", "rejected", "invalid", "limited"]


class PollerError(Exception):
    """Everything that this package raises on purpose."""


class SettingsError(PollerError):
    """The settings are wrong; nothing was started. Nobody catches it: exit code 2.

    Attributes:
        problems: one line each, `key.path: what is wrong`, all of them at once.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class JournalError(PollerError):
    """The journal cannot be read or written. Nobody catches it: exit 1, the supervisor restarts."""


class VendorError(PollerError):
    """A vendor did not answer as documented; what is known of its runs stays untouched.

    The message ends after 1024 characters: some of it are the vendor's own words.
    """

    reason: Reason = "invalid"

    def __init__(self, message: str) -> None:
        super().__init__(message[:1024])


class Unreachable(VendorError):
    """Network trouble, a timeout, or a 5xx: ask again after a backoff."""

    reason: Reason = "unreachable"


class Limited(VendorError):
    """The vendor asks for fewer questions (429, or 503 with a delay).

    Attributes:
        retry_after_s: seconds that the vendor asked to be left alone, or None if it did not say.
    """

    reason: Reason = "limited"

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rejected(VendorError):
    """Credentials refused (401, 403, a locked user): the slowest backoff; some lock accounts."""

    reason: Reason = "rejected"


class Invalid(VendorError):
    """The answer has not the documented shape.

    Attributes:
        body: the first 256 characters of the answer, for the log; of JSON its shape and numbers,
            since texts in it may be other people's passwords.
    """

    reason: Reason = "invalid"

    def __init__(self, message: str, body: bytes = b"") -> None:
        super().__init__(message)
        text = body[:256].decode("utf-8", "replace")
        is_json = text.lstrip("\ufeff \t\r\n").startswith(("{", "["))
        self.body = _JSON_TEXT.sub(_hidden, text) if is_json else text


class SinkError(PollerError):
    """An event could not be handed over; the relay decides by the kind."""


class SinkUnavailable(SinkError):
    """The broker is away or refuses for now: try again later, the cursor stays.

    Attributes:
        delivered: how many events from the batch's start are delivered for sure.
    """

    def __init__(self, message: str, delivered: int = 0) -> None:
        super().__init__(message)
        self.delivered = delivered


class EventRejected(SinkError):
    """This event can never go there: it is set aside with the reason, the cursor moves.

    Attributes:
        delivered: how many events from the batch's start are delivered for sure; the one after
            them is the rejected one.
    """

    def __init__(self, message: str, delivered: int = 0) -> None:
        super().__init__(message)
        self.delivered = delivered


def _hidden(found: re.Match[str]) -> str:
    return found[0] if found[1] else '"…"'
