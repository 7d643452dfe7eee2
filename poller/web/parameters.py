"""Query parameters: every one read, every mistake told at once."""

from __future__ import annotations

import base64
import binascii
import datetime
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec

from poller.events import TYPES
from poller.journal.pages import Place
from poller.runs import Ms, State
from poller.settings.values import seconds
from poller.web.problems import RequestProblem

SOURCE_NAME = "^[a-z0-9][a-z0-9_-]*$"
MAX_LIMIT = 500
_MAX_MS = 1 << 53


class Query(Protocol):
    """Names and values, in which a name may come more than once."""

    def __iter__(self) -> Iterator[str]:
        """The names."""

    def getall(self, key: str, default: list[str], /) -> list[str]:
        """The values of a name."""


class Parameters:
    """The parameters of one request; empty ones count as not given.

    Attributes:
        problems: what is wrong with them, a sentence each.
    """

    def __init__(self, query: Query, known: Iterable[str]) -> None:
        self.problems: list[str] = []
        self._query = query
        known = sorted(known)
        for name in sorted(set(query)):
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = (
                    f"did you mean {near[0]}?"
                    if near
                    else f"there are {', '.join(known) or 'none'}"
                )
                self.problems.append(f"{name}: unknown parameter; {hint}")

    def check(self) -> None:
        """Refuse the request if anything is wrong.

        Raises:
            RequestProblem: so it is.
        """
        if self.problems:
            raise RequestProblem(400, "; ".join(self.problems))

    def many(self, name: str) -> list[str]:
        """All values of a parameter that may be repeated."""
        return [value for value in self._query.getall(name, []) if value]

    def one(self, name: str) -> str:
        """The value of a parameter, "" without it."""
        values = self.many(name)
        if len(values) > 1:
            self.problems.append(f"{name}: given {len(values)} times, wanted once")
        return values[0] if values else ""

    def sources(self) -> list[str]:
        """The names of sources."""
        names = list(dict.fromkeys(self.many("source")))
        if not all(re.fullmatch(SOURCE_NAME, name) for name in names):
            self.problems.append("source: no name of a source, which has only a-z 0-9 _ -")
        return names

    def states(self) -> Sequence[State]:
        """The states; all of them if none is named."""
        names = dict.fromkeys(self.many("state"))
        if not names.keys() <= _STATES.keys():
            self.problems.append(f"state: there are {', '.join(_STATES)}")
            return ()
        return [_STATES[name] for name in names] or tuple(State)

    def types(self) -> list[str]:
        """The types of events that the given words stand for; none if none is given."""
        found = []
        for word in self.many("type"):
            like = [kind for kind in TYPES if kind == word or kind.endswith(f".{word}")]
            if not like:
                self.problems.append(
                    "type: no such event; give a state, down, up, job.<state>, source.down or a"
                    " whole type such as dev.poller.job.failed"
                )
            found += like
        return found

    def limit(self, default: int) -> int:
        """How many are wanted."""
        text = self.one("limit")
        if not text:
            return default
        if re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= MAX_LIMIT:
            return int(text)
        self.problems.append(f"limit: must be a whole number from 1 to {MAX_LIMIT}")
        return default

    def cursor(self) -> Place | None:
        """Where a page before has ended."""
        text = self.one("cursor")
        try:
            return _place(text) if text else None
        except ValueError:
            self.problems.append("cursor: is none of ours; begin again without it")
            return None

    def since(self, now_ms: Ms) -> Ms | None:
        """A time, given as one or as a span back from now."""
        text = self.one("since")
        try:
            return _instant(text, now_ms) if text else None
        except (ValueError, OverflowError):
            self.problems.append(
                "since: must be a span like 10m or 2h, or a time like 2026-01-31T12:00:00Z"
            )
            return None


def cursor(place: Place) -> str:
    """A place as the API gives it out."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def _place(text: str) -> Place:
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        place = _PLACE.decode(data)
    except (binascii.Error, msgspec.DecodeError) as error:
        raise ValueError from error
    if not 0 <= place[0] < _MAX_MS:
        raise ValueError
    return place


def _instant(text: str, now_ms: Ms) -> Ms:
    if re.match("[0-9.]+[a-z]", text):
        return now_ms - int(seconds(text) * 1000)
    # A "+" that nobody has encoded reads as a space.
    instant = datetime.datetime.fromisoformat(text.replace(" ", "+"))
    if instant.tzinfo is None:
        raise ValueError
    return max(0, int(instant.timestamp() * 1000))


_PLACE: msgspec.json.Decoder[Place] = msgspec.json.Decoder(Place)
_STATES = {state.value: state for state in State}
