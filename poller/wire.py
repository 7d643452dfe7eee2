"""What passes between the poll loop and a vendor, and the vendor itself, all as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import quote, urlencode

import msgspec
import pydantic

from poller.errors import Invalid, Limited, Rejected, Unreachable
from poller.known import Key, Known, Memory
from poller.redaction import Redaction
from poller.runs import Ms, Seen, State
from poller.world import Kind, World


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question to a vendor.

    Attributes:
        path: below the source's `url`, starting with `/`, percent-encoded as the vendor wants it;
            sent verbatim.
        query: names and values, in order, not encoded.
        headers: beside those of the source's auth.
        by_id: asks for one run or one job: its failure is no failed poll.
        spread: one of many alike; they are spread over the interval instead of sent in a burst.
        context: what `parse` needs to know of the question; never sent.
    """

    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = (("Accept", "application/json"),)
    method: str = "GET"
    body: bytes = b""
    by_id: bool = False
    spread: bool = False
    context: Any = None

    @property
    def target(self) -> str:
        """Path and encoded query, as they go over the wire; also what tells two questions apart."""
        return f"{self.path}?{_encoded(self.query)}" if self.query else self.path


@lru_cache(1024)  # most polls ask what the poll before has asked
def _encoded(query: tuple[tuple[str, str], ...]) -> str:
    return urlencode(query, quote_via=quote)


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: status, headers with lower-case names, the whole unpacked body.

    Attributes:
        unchanged: the server confirmed (304) that the body is the one of the answer before.
        secrets: knows what it was asked with, and what must not be repeated of it.
    """

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""
    unchanged: bool = False
    secrets: Redaction = Redaction()


class BadRow(msgspec.Struct, frozen=True):
    """A row that was set aside: its JSON path and what is wrong with it."""

    at: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What one answer says.

    Attributes:
        runs: rows in the order to be taken; earlier attempts (`past`) before the present one.
        shown: known runs that this answer shows to be exactly as they were.
        progress: how far runs of this answer are, from 0 to 1, by their key; no news, for people.
        follow: further questions it calls for.
        complete: the scope whose active runs are all listed once this page, and all that the same
            first question led to, have been read; None for a feed of changes and for answers
            about one run.
        gone: (job id, run id) of runs that the vendor says do not exist.
        marks: notes to give back in `Memory.marks` from now on; an empty value removes one.
        bad: rows set aside.
        notes: sentences for the operator's log, such as a limit that may have hidden something.
        lasting: at any later time the same body says the same, as long as the question, what is
            known and the marks are the same; so it need not be read again.
    """

    runs: Sequence[Seen] = ()
    shown: Sequence[Known] = ()
    progress: Mapping[Key, float] = field(default_factory=dict)
    follow: Sequence[Request] = ()
    complete: str | None = None
    gone: Sequence[tuple[str, str]] = ()
    marks: Mapping[str, str] = field(default_factory=dict)
    bad: Sequence[BadRow] = ()
    notes: Sequence[str] = ()
    lasting: bool = False


Words: TypeAlias = Mapping[str, tuple[State, str | None]]
"""A vendor's table of states: its word, trimmed and in lower case → state and substate."""


class Meaning(NamedTuple):
    """What a vendor's word means; `unmapped` where its table lacks it."""

    state: State
    substate: str | None = None
    unmapped: bool = False


def look_up(words: Words, word: str) -> Meaning:
    """What a vendor's word means, however it is spelled; `unknown` if its table lacks it."""
    found = words.get(word.strip().lower())
    return Meaning(*found) if found else Meaning(State.UNKNOWN, None, unmapped=True)


class Options(pydantic.BaseModel):
    """A vendor's own keys in `[sources.<name>]`; most vendors have a subclass."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """All that is known of one vendor, as a value; its functions are pure.

    Attributes:
        name: as in settings, and as its file is called.
        options: the model of its own settings; every function gets an instance of it first.
        words: its table of states.
        start: what to ask first in a poll.
        parse: reads an answer of any HTTP status; raises a VendorError if it is not as documented.
        settle: how to learn what became of a run that the listing shows no more; None if there
            is no way.
        ask: what to ask before a change of a run is told, so that it is told whole (an error's
            text, earlier attempts); the answer's `runs` replace the row. None if nothing. Gets
            the options, what is known of the run (or None), and the row.
        render: the same API from the other side, for the simulator.
        kinds: what lives in its simulated world.
    """

    name: str
    options: type[Options]
    words: Words
    start: Callable[[Any, Memory], Sequence[Request]]
    parse: Callable[[Any, Request, Response, Memory], Page]
    settle: Callable[[Any, Known], Request | None]
    ask: Callable[[Any, Known | None, Seen], Request | None]
    render: Callable[[World, Request], Response]
    kinds: tuple[Kind, ...]


def read(
    vendor: Vendor, options: Options, request: Request, response: Response, memory: Memory
) -> Page:
    """What an answer says, by the vendor; what is wrong with it is told without our credentials.

    A body that can be read is left as it is: a password may be the name of a job, too.

    Raises:
        VendorError: it is not as documented.
    """
    with response.secrets.kept():
        try:
            return vendor.parse(options, request, response, memory)
        except Exception:
            body = response.secrets.body(response.body)
            if body == response.body:
                raise
        # Once more, because messages are cut and would keep the beginning of a secret.
        vendor.parse(options, request, msgspec.structs.replace(response, body=body), memory)
        raise Invalid("the answer can be read only without the credentials that it repeats", body)


def refuse(response: Response) -> None:
    """Raise what an HTTP status means for every vendor; returns for 200.

    Raises:
        Rejected: 401, 403.
        Limited: 429, and 503 with a Retry-After.
        Unreachable: other 5xx.
        Invalid: anything else but 200.
    """
    status = response.status
    if status == 200:
        return
    if status in (401, 403):
        raise Rejected(f"HTTP {status}: credentials refused")
    if status == 429 or (status == 503 and "retry-after" in response.headers):
        raise Limited(f"HTTP {status}: asked too often", retry_after_s(response))
    if status >= 500:
        raise Unreachable(f"HTTP {status}")
    raise Invalid(f"HTTP {status}", response.body)


def retry_after_s(response: Response, now_ms: Ms | None = None) -> float | None:
    """Seconds that the Retry-After header asks for (RFC 9110 §10.2.3: seconds or a date), or None.

    A date is taken against the answer's own Date header, so that the vendor's clock need not be
    ours; against `now_ms` if that is missing.
    """
    text = response.headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        until_s = _http_date_s(text)
        if "date" in response.headers:
            now_s = _http_date_s(response.headers["date"])
        elif now_ms is not None:
            now_s = now_ms / 1000
        else:
            return None
    except (ValueError, OverflowError):
        return None
    return max(0.0, until_s - now_s)


def _http_date_s(text: str) -> float:
    """An HTTP date in epoch seconds; the obsolete asctime form names no zone, and means GMT."""
    date = parsedate_to_datetime(text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
