"""Makes hostile answers and settings out of real ones, and follows what comes of them.

All chance comes out of one `Random`, so that whoever holds it can play the same again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from yarl import URL

from poller.diff import Observation, diff, vanish
from poller.events import JobEvent, Transition, decode, encode, job_event
from poller.known import Index, Memory
from poller.payload import MOST_ROWS
from poller.runs import Ms, Seen
from poller.vendors import load
from poller.wire import Options, Page, Request, Response, Vendor
from poller.world import World
from tests.support import FIXTURES, remember

BEGAN_MS = 1_790_000_000_000
OWN: dict[str, dict[str, Any]] = {
    "cdm": {"project_id": "p", "cluster_id": "c"},
    "dataarts": {"project_id": "p", "workspace": "w"},
}

# What stands in an answer

NAMES = [
    "a/b/+/#/$SYS", "$SYS/broker", "+", "#", "..", "../../etc/passwd", "100%25", "%2F",
    "job-1/events/failed", "a|b|c", "a\0b", "a\0c", "a\nb\r\nc", "a b", " ", "0", "-1", "null",
    "\x1b[2J\x1b]0;owned\a", "\x9b31m", "\x85next\u2028line\u2029paragraph", "\u202egnp.exe",
    "\ufeffbom", "\U0001f600\U0001f469\u200d\U0001f680", "\uffff\ufdd0", "{braces}", "*", "?x=1&y",
    "[bold red]markup[/]", "'; DROP TABLE runs; --", "17@0", "\u00b2", "\u0661\u0662", "\\", '"',
    "i" * 1024, "\0" * 1024, "\U0001f600" * 1024, '"\\' * 512, "/" * 1024,
]  # fmt: skip
"""Texts that somewhere on their way mean something, if they are not taken as they are."""

TEXTS = [
    *NAMES, "", "i" * 1025, "i" * 10_000, "1e400", "NaN", "0001-01-01T00:00:00Z",
    "0000-00-00T00:00:00Z", "9999-12-31T23:59:59.999999-23:59", "1969-12-31T23:59:59Z",
    "2026-09-21T14:13:20.000000Z", "Dec 31, 9999 11:59:59 PM", "Jan 1, 0001 12:00:00 AM",
]  # fmt: skip
_NUMBERS = [
    "0", "-0", "-1", "1", "2", "1.5", "-0.0", "1e-400", "1e400", "-1e400", "1E308", "0.1e1",
    "2147483648", "9007199254740993", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "18446744073709551616", "1" + "0" * 4000, "1" + "0" * 5000,
    "1790000000", "1790000000000", "1790000005000", "1790000000000000", "1790000000000.5",
    "253402300799999", "253402300800000", "1000000000000000000", "-62135596800000",
]  # fmt: skip
_TOKENS = [
    "null", "true", "false", "[]", "{}", "[null]", '{"":null}', "NaN", "Infinity", "-Infinity",
    r'"\ud800"', r'"\udc00\ud800"', '"\\u00e9"', "01", "+1", ".5", "'x'", "nul", "",
    '{"id":1,"id":2}', '{"a":1,"a":{"a":[]}}',
]  # fmt: skip
_VALUES = [
    *(json.dumps(text).encode() for text in TEXTS),
    *(json.dumps(text, ensure_ascii=False).encode() for text in TEXTS),
    *(text.encode() for text in _NUMBERS + _TOKENS),
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b'"\x1b[31m\x00"',
]
"""JSON, or nearly, as it stands on the wire."""

_LONG = [b'"%b"' % (b"m" * 1_000_000), b'"%b"' % (b"user " * 40_000), b"[%b1]" % (b"1," * 50_000)]
_DEPTHS = (3, 40, 900, 2000, 100_000)
_MAX_BODY = 4 << 20
_STATUSES = (200,) * 12 + (201, 204, 304, 400, 401, 403, 404, 406, 429, 500, 502, 503)
_HEADERS: dict[str, list[str]] = {
    "retry-after": [
        "", "0", "7", "-1", "1e9", "9" * 400, "\u0661", "x", "\udcff", ",", ":", " ",
        "Mon, 01 Jan 2024 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -2359",
        "Mon, 01 Jan 0001 00:00:00 +2359", "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
        "Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Sun Nov  6 08:49:37 1994",
    ],
    "date": [
        "", "x", "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 0001 00:00:00 +2359", "\udcff",
        "Mon, 01 Jan 2024 00:00:00 -99999999999999999999",
    ],
}  # fmt: skip


class _Pairs(list[tuple[str, Any]]):
    """An object with its keys in order, twice if they are."""


class _Token(bytes):
    """A value as it is to stand on the wire."""


_Place: TypeAlias = tuple[list[Any], int]
"""A list or an object, and the number of one of its items."""


def spoil(random: Random, body: bytes, *, most: int = 4) -> bytes:
    """A JSON document with up to that many things changed; torn or recoded, now and then."""
    try:
        root: list[Any] = [json.loads(body, object_pairs_hook=_Pairs)]
    except (ValueError, RecursionError):
        return _torn(random, body)
    for _ in range(random.randint(1, most)):
        random.choice(_CHANGES)(random, _places(root))
    body = b"".join(_written(root[0]))[:_MAX_BODY]
    return _torn(random, body) if random.random() < 0.1 else body


def _replace(random: Random, places: list[_Place]) -> None:
    _put(random.choice(places), _Token(random.choice(_VALUES)))


def _lengthen(random: Random, places: list[_Place]) -> None:
    _put(random.choice(places), _Token(random.choice(_LONG)))


def _copy(random: Random, places: list[_Place]) -> None:
    copied = b"".join(_written(_get(random.choice(places))))
    _put(random.choice(places), _Token(copied))


def _drop(random: Random, places: list[_Place]) -> None:
    within, at = random.choice(places[1:] or [([0], 0)])
    del within[at]


def _repeat(random: Random, places: list[_Place]) -> None:
    within, at = random.choice(places[1:] or [([0], 0)])
    within[at:at] = [within[at]] * random.choice((1, 1, 2, 30, 300))


def _reorder(random: Random, places: list[_Place]) -> None:
    random.shuffle(random.choice(places)[0])


def _wrap(random: Random, places: list[_Place]) -> None:
    place = random.choice(places)
    value = _get(place)
    text = b"".join(_written(value)).decode("utf-8", "replace")
    _put(place, random.choice(([value], _Pairs([("x", value)]), text)))


def _deepen(random: Random, places: list[_Place]) -> None:
    place, depth = random.choice(places), random.choice(_DEPTHS)
    _put(place, _Token(b"[" * depth + b"".join(_written(_get(place))) + b"]" * depth))


def _rename(random: Random, places: list[_Place]) -> None:
    keys = [(within, at) for within, at in places if isinstance(within, _Pairs)]
    if keys:
        (within, at), (other, there) = random.choice(keys), random.choice(keys)
        name = random.choice((other[there][0], random.choice(TEXTS)))
        within[at] = (name, within[at][1])


_CHANGES: list[Callable[[Random, list[_Place]], None]] = [
    *[_replace] * 5, _lengthen, _copy, _drop, _repeat, _reorder, _wrap, _deepen, _rename,
]  # fmt: skip


def _places(within: list[Any]) -> list[_Place]:
    found: list[_Place] = []
    for at in range(len(within)):
        found.append((within, at))
        value = _get((within, at))
        if isinstance(value, list):
            found += _places(value)
    return found


def _get(place: _Place) -> Any:
    within, at = place
    return within[at][1] if isinstance(within, _Pairs) else within[at]


def _put(place: _Place, value: object) -> None:
    within, at = place
    within[at] = (within[at][0], value) if isinstance(within, _Pairs) else value


def _written(value: object) -> list[bytes]:
    if isinstance(value, _Token):
        return [value]
    parts: list[bytes] = []
    if isinstance(value, _Pairs):
        for key, inner in value:
            parts += [b",", json.dumps(key).encode(), b":", *_written(inner)]
        return [b"{", *parts[1:], b"}"]
    if isinstance(value, list):
        for inner in value:
            parts += [b",", *_written(inner)]
        return [b"[", *parts[1:], b"]"]
    return [json.dumps(value).encode()]


def _torn(random: Random, body: bytes) -> bytes:
    """What is no JSON any more, or in no encoding that is."""
    at = random.randint(0, len(body))
    noise = random.randbytes(random.randint(1, 8))
    recoded = body.decode("utf-8", "replace").encode("utf-16")
    return random.choice(
        (
            body[:at],
            body[:at] + noise + body[at:],
            body + body[at:],
            b"\xef\xbb\xbf" + body,
            b"<html>" + body,
            recoded,
            random.choice(_VALUES),
        )
    )


# What a vendor is asked, and what it answers


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question as it is asked, its honest answer, and what is known then."""

    request: Request
    response: Response
    memory: Memory


def options_of(vendor: Vendor) -> Options:
    """Options with which everything is asked."""
    return vendor.options(**OWN.get(vendor.name, {}))


@cache
def exchanges(name: str) -> list[Exchange]:
    """Every kind of question to a vendor, at first contact and later."""
    vendor = load(name)
    world = World(kinds=vendor.kinds, seed=3, jobs=6, now_ms=BEGAN_MS - 60_000)
    index, marks = Index(), dict[str, str]()
    found: dict[object, Exchange] = {}
    last_good_ms = None
    for second in (0, 5, 9, 700):
        world.advance(BEGAN_MS + second * 1000)
        for publish_all in (False, True):
            memory = Memory(
                now_ms=world.now_ms,
                contact_ms=BEGAN_MS - 30_000,
                last_good_ms=last_good_ms,
                since_ms=BEGAN_MS - 86_400_000,
                whole=second == 9,
                publish_all=publish_all,
                rate_per_s=100.0,
                marks=dict(marks),
                index=Index(index.runs.values(), at_ms=world.now_ms - 1),
            )
            for exchange, page in _poll(vendor, world, memory):
                request = exchange.request
                kind = (second, publish_all, type(request.context), request.path[:16])
                found.setdefault((*kind, bool(page.runs)), exchange)
                marks |= page.marks
                for seen in page.runs:
                    remember(index, seen, at_ms=world.now_ms)
        last_good_ms = world.now_ms
    return list(found.values())


def _poll(vendor: Vendor, world: World, memory: Memory) -> list[tuple[Exchange, Page]]:
    """Everything that a poll may ask, with what is read of the answers."""
    options, found = options_of(vendor), []
    work = list(vendor.start(options, memory))
    work += [asked for run in memory.active() if (asked := vendor.settle(options, run))]
    before: list[Request] = []
    while work or before:
        listed = bool(work)
        request = (work or before).pop(0)
        response = vendor.render(world, request)
        page = vendor.parse(options, request, response, memory)
        found.append((Exchange(request, response, memory), page))
        work += page.follow
        for seen in page.runs if listed else ():
            asked = vendor.ask(options, memory.get(seen.job.id, seen.run_id), seen)
            before += [asked] if asked else []
    return found


@cache
def recorded(name: str) -> list[bytes]:
    """The vendor's recorded and documented answers."""
    return [path.read_bytes() for path in sorted((FIXTURES / name).glob("*.json"))]


def answer(random: Random, name: str, honest: Response) -> Response:
    """A hostile answer in place of an honest one."""
    body = honest.body if random.random() < 0.8 else random.choice(recorded(name))
    return wrapped(random, spoil(random, body))


def wrapped(random: Random, body: bytes) -> Response:
    """A body with any status, and any values of the headers that are read."""
    headers = {k: random.choice(v) for k, v in _HEADERS.items() if random.random() < 0.3}
    return Response(status=random.choice(_STATUSES), headers=headers, body=body)


def rename(random: Random, world: World) -> None:
    """Give the jobs of a world, and the runs that have one, a hostile name each."""
    world.definitions = [
        type(job)(job.number, name, random.choice(TEXTS), random.choice(TEXTS), job.kind)
        for job, name in zip(
            world.definitions, random.sample(NAMES, len(world.definitions)), strict=True
        )
    ]


# What becomes of it


def check_page(vendor: Vendor, page: Page, memory: Memory) -> None:
    """Whatever `parse` accepts can be told, published, noted and asked further."""
    options = options_of(vendor)
    questions: list[Request | None] = [*page.follow]
    assert len(page.runs) + len(page.bad) <= 2 * MOST_ROWS
    for seen in page.runs:
        check_seen(seen)
        for known in (None, memory.get(seen.job.id, seen.run_id)):
            at = Observation(at_ms=memory.now_ms, contact_ms=memory.contact_ms)
            transitions, then = diff(known, seen, at)
            gone, _ = vanish(then, at)
            for transition in [*transitions, *gone]:
                check_event(vendor, transition, memory)
            questions += [vendor.ask(options, known, seen), vendor.settle(options, then)]
    assert all(0 <= share <= 1 for share in page.progress.values())
    for name, value in page.marks.items():
        assert len(name) <= 1100
        assert len(value) <= 8192
    for later_ms in (15_000, -3_600_000):
        questions += vendor.start(options, _later(memory, page, memory.now_ms + later_ms))
    for question in filter(None, questions):
        check_request(question)


def _later(memory: Memory, page: Page, now_ms: Ms) -> Memory:
    marks = {name: value for name, value in {**memory.marks, **page.marks}.items() if value}
    return Memory(
        now_ms=now_ms,
        contact_ms=memory.contact_ms,
        last_good_ms=memory.now_ms,
        since_ms=memory.since_ms,
        marks=marks,
        index=memory.index,
    )


def check_request(request: Request) -> None:
    """It can be sent, to where it belongs."""
    text = str(URL(f"http://127.0.0.1:1/base{request.target}", encoded=True))
    assert text.startswith("http://127.0.0.1:1/base/")
    assert text.isascii()
    assert text.isprintable()
    assert " " not in text
    assert len(text) < 1 << 15


def check_seen(seen: Seen) -> None:
    """Ids are there, and nothing that is kept is long."""
    job = seen.job
    assert job.id
    assert seen.run_id
    texts = (job.id, seen.run_id, job.name, job.group, job.owner, job.url, seen.marker)
    for text in (*texts, seen.vendor_state):
        assert text is None or len(text) <= 1024
    for value in seen.detail.values():
        assert not isinstance(value, int) or abs(value) < 1 << 64


def check_event(vendor: Vendor, transition: Transition, memory: Memory) -> None:
    """Its event is small, on one line, and says what it should."""
    event = job_event(
        transition,
        source="s",
        vendor=vendor.name,
        sequence=1,
        observed_after_ms=memory.last_good_ms,
        observed_at_ms=memory.now_ms,
    )
    body = encode(event)
    assert len(body) < 64 * 1024
    assert b"\n" not in body
    told = decode(body)
    assert isinstance(told, JobEvent)
    assert (told.data.job.id, told.subject) == (transition.job.id, transition.run_id)
    assert told.data.error is None or len(told.data.error.message.encode()) <= 4096


# Settings

_WRITTEN = [
    b"1979-05-27T07:32:00Z", b"07:32:00", b"inf", b"nan", b"-0", b"0xffffffffffffffffffff", b"1_0",
    b"1" * 5000, b"1e400", b'"""\n"""', b"'\x1b[31m'", b'"\\u0000"', b'"\\uD800"', b'"\\u202e"',
    b"[]", b"{}", b"[[]]", b"[{}]", b"{a.b.c=1}", b"true", b'""', b'"env:X"', b'"env:HOSTILE"',
    b'"file:/dev/zero"', b'"file:/"', b'"\xf0\x9f\x98\x80"', b'"\xff"', b"[" * 5000, b"{a=" * 3000,
    b"a." * 3000 + b"a=1\n", b'"%b"' % (b"m" * 100_000), b'"http://[::1"', b'"mqtt://h:99999"',
    b'"http://\xe2\x84\x80"', b'"redis://:@:"', b'"10m10m10m10m"',
]  # fmt: skip
_VARIABLES = [
    "POLLER_", "POLLER___", "POLLER_A__B__C", "POLLER_DEFAULTS__INTERVAL", "POLLER_HTTP__LISTEN",
    "POLLER_MQTT__URL", "POLLER_POLLER", "POLLER_POLLER__INSTANCE", "POLLER_POLLER__JOURNAL",
    "POLLER_REDIS", "POLLER_REDIS__URL", "POLLER_SOURCES", "POLLER_SOURCES__", "POLLER_SOURCES__X",
    "POLLER_SOURCES__X__AUTH", "POLLER_SOURCES__X__AUTH__TYPE", "POLLER_SOURCES__X__JOBS",
    "POLLER_SOURCES__X__URL__A", "POLLER_SOURCES__X__VENDOR", "POLLER_REDIS" + "__A" * 1100,
]  # fmt: skip


@cache
def _files() -> list[bytes]:
    root = Path(__file__).parent
    paths = [root.parent / "settings.toml", *sorted((root / "settings").glob("*.toml"))]
    return [path.read_bytes() for path in paths]


def settings(random: Random) -> tuple[bytes, dict[str, str]]:
    """A settings file and an environment, neither of them as it should be."""
    text = random.choice(_files())
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(text))
        places = [found.span() for found in re.finditer(rb"= *([^\n]*)", text)]
        start, end = random.choice(places or [(at, at)])
        text = random.choice(
            (
                text[:start] + b"= " + random.choice(_WRITTEN) + text[end:],
                text[:start] + b"= " + random.choice(_WRITTEN) + text[end:],
                text[:at] + random.choice(_WRITTEN) + text[at:],
                text[:at] + random.choice(_files())[at:],
            )
        )
    environ = {"HOSTILE": random.choice(["", "x", "\x1b", "a\nb", "\udcff", "m" * 200_000])}
    for name in _VARIABLES:
        if random.random() > 0.9:
            environ[name] = random.choice(_WRITTEN).decode("utf-8", "surrogateescape")
    return text, environ
