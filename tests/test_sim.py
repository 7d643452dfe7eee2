"""Simulated vendors over HTTP, and what goes wrong with them on demand."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
from yarl import URL

from poller import sim
from poller.errors import PollerError
from poller.known import Memory
from poller.vendors import BUILT_IN, load
from poller.wire import Options, Request, Response, Vendor
from poller.world import Kind, World
from tests.daemon import until

BEGAN_MS = 1_790_000_000_000
OWN = {"cdm": {"project_id": "p", "cluster_id": "c"}, "dataarts": {"project_id": "p"}}
BODY = b'{"jobs": [1, 2, 3]}'


def world_of(*kinds: Kind) -> World:
    world = World(kinds=kinds or (Kind(),), seed=3, jobs=12, now_ms=BEGAN_MS)
    world.advance(BEGAN_MS + 20_000)
    return world


def nothing(*_: Any) -> Any:
    raise NotImplementedError


def answering(render: Any) -> Vendor:
    """A vendor of which only the other side matters."""
    return Vendor(
        name="test",
        options=Options,
        words={},
        start=nothing,
        parse=nothing,
        settle=nothing,
        ask=nothing,
        render=render,
        kinds=(Kind(),),
    )


def fixed(_world: World, _request: Request) -> Response:
    return Response(status=200, headers={"content-type": "application/json"}, body=BODY)


def echo(_world: World, request: Request) -> Response:
    return Response(status=207, headers={"x-echo": "1"}, body=msgspec.json.encode(request))


@asynccontextmanager
async def serving(
    vendor: Vendor, faults: Mapping[str, float] | None = None, *, seed: int = 0
) -> AsyncIterator[aiohttp.ClientSession]:
    world = world_of(*vendor.kinds)
    served = sim.serve(vendor, world, faults=faults, seed=seed, now_ms=lambda: world.now_ms)
    async with served as url, aiohttp.ClientSession(url) as session:
        yield session


async def outcome(client: aiohttp.ClientSession) -> str:
    """What one question comes to, in a word or two."""
    try:
        async with client.get("/", timeout=aiohttp.ClientTimeout(1)) as response:
            body = await response.read()
    except TimeoutError:
        return "hang"
    except aiohttp.ClientError:
        return "drop"
    if response.status == 200 and body == BODY:
        return "fine"
    return f"{response.status} {response.content_type} {len(body)}"


# The API


@pytest.mark.parametrize("name", BUILT_IN)
async def test_it_answers_over_http_what_the_vendor_renders(name: str) -> None:
    vendor = load(name)
    world = world_of(*vendor.kinds)
    options = vendor.options(**OWN.get(name, {}))
    memory = Memory(now_ms=world.now_ms, contact_ms=BEGAN_MS)
    work = list(vendor.start(options, memory))
    rows = 0
    async with (
        sim.serve(vendor, world, now_ms=lambda: world.now_ms) as url,
        aiohttp.ClientSession() as client,
    ):
        while work:
            request = work.pop()
            async with client.request(
                request.method,
                URL(url + request.target, encoded=True),
                headers=request.headers,
                data=request.body,
            ) as got:
                headers = {field.lower(): value for field, value in got.headers.items()}
                response = Response(status=got.status, headers=headers, body=await got.read())
            rendered = vendor.render(world, request)
            assert (response.status, response.body) == (rendered.status, rendered.body)
            page = vendor.parse(options, request, response, memory)
            rows += len(page.runs)
            work += page.follow
    assert rows


async def test_the_vendor_sees_the_request_as_it_was_sent() -> None:
    async with serving(answering(echo)) as client:
        url = URL("/a%2Fb/%E4%BD%9C?x=1&y=a+b%26&x=2", encoded=True)
        headers = {"X-Auth-Token": "t"}
        async with client.post(url, data=b"\x00\xff", headers=headers) as response:
            assert response.status == 207
            assert response.headers["x-echo"] == "1"
            seen = msgspec.json.decode(await response.read())
    assert (seen["method"], seen["path"]) == ("POST", "/a%2Fb/%E4%BD%9C")
    assert seen["query"] == [["x", "1"], ["y", "a b&"], ["x", "2"]]
    assert seen["body"] == "AP8="
    assert ["x-auth-token", "t"] in seen["headers"]


async def test_the_world_moves_to_the_present_before_every_answer() -> None:
    world = World(kinds=(Kind(),), jobs=5, now_ms=BEGAN_MS)
    clock = iter([BEGAN_MS, BEGAN_MS + 60_000])

    def count(world: World, _request: Request) -> Response:
        return Response(status=200, body=str(len(world.runs)).encode())

    counts = []
    async with (
        sim.serve(answering(count), world, now_ms=lambda: next(clock)) as url,
        aiohttp.ClientSession() as client,
    ):
        for _ in range(2):
            async with client.get(url) as response:
                counts.append(int(await response.text()))
    assert counts[0] == 0
    assert counts[1] >= 5


async def test_a_port_that_is_taken_is_told_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PollerError) as caught:
            async with sim.serve(answering(fixed), world_of(), port=port, now_ms=lambda: 0):
                pass
    assert str(caught.value).startswith(f"port {port} cannot be used: ")
    assert str(caught.value).endswith("address already in use")


# Faults


OUTCOMES = {
    "500": "500 text/html 21",
    "503": "503 application/octet-stream 0",
    "429": "429 application/octet-stream 0",
    "401": "401 text/html 21",
    "html": "200 text/html 63",
    "torn": f"200 application/json {len(BODY) // 2}",
    "empty": "200 application/json 0",
    "hang": "hang",
    "drop": "drop",
}


@pytest.mark.parametrize(("fault", "told"), OUTCOMES.items(), ids=OUTCOMES)
async def test_a_fault_does_what_its_name_says(fault: str, told: str) -> None:
    async with serving(answering(fixed), {fault: 1.0}) as client:
        assert await outcome(client) == told


def test_every_fault_is_tested() -> None:
    assert OUTCOMES.keys() == sim.FAULTS.keys()


@pytest.mark.parametrize("fault", ["503", "429"])
async def test_a_limit_says_how_long(fault: str) -> None:
    async with serving(answering(fixed), {fault: 1.0}) as client, client.get("/") as response:
        assert response.headers["Retry-After"] == "1"


async def test_a_dropped_answer_breaks_off_in_the_middle_of_its_body() -> None:
    async with serving(answering(fixed), {"drop": 1.0}) as client, client.get("/") as response:
        assert response.status == 200
        assert response.content_length == len(BODY) + 1
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_without_faults_nothing_goes_wrong() -> None:
    async with serving(answering(fixed)) as client:
        assert {await outcome(client) for _ in range(50)} == {"fine"}


async def outcomes(seed: int) -> list[str]:
    async with serving(answering(fixed), {"500": 0.25, "empty": 0.25}, seed=seed) as client:
        return [await outcome(client) for _ in range(200)]


async def test_faults_come_as_often_as_told_and_the_same_with_the_same_seed() -> None:
    told = await outcomes(1)
    assert told == await outcomes(1)
    assert told != await outcomes(2)
    assert 30 <= told.count("500 text/html 21") <= 70
    assert 30 <= told.count("200 application/json 0") <= 70
    assert 70 <= told.count("fine") <= 130


async def test_an_answer_that_hangs_does_not_hold_up_the_end() -> None:
    world = world_of()
    async with asyncio.timeout(10), aiohttp.ClientSession() as client:
        served = sim.serve(answering(fixed), world, faults={"hang": 1.0}, now_ms=lambda: 0)
        async with served as url:
            asking = asyncio.ensure_future(client.post(url))
            await until(lambda: len(asyncio.all_tasks()) > 2, "the server has the question")
        with pytest.raises(aiohttp.ClientError):
            await asking


async def test_nothing_is_left_of_an_answer_that_nobody_waits_for() -> None:
    async with serving(answering(fixed), {"hang": 1.0}) as client:
        assert await outcome(client) == "hang"
        await until(lambda: len(asyncio.all_tasks()) == 1, "the answering tasks are gone")


# The option


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", {}),
        ("503=0.1,torn=0.05", {"503": 0.1, "torn": 0.05}),
        (" 503=0.1 , torn=0.05 ,", {"503": 0.1, "torn": 0.05}),
        ("hang", {"hang": 0.1}),
        ("drop=1", {"drop": 1.0}),
        ("drop=0", {"drop": 0.0}),
        ("500=0.5,401=0.5", {"500": 0.5, "401": 0.5}),
    ],
)
def test_faults_are_names_with_probabilities(text: str, faults: dict[str, float]) -> None:
    assert sim.parse_faults(text) == faults


@pytest.mark.parametrize(
    "part",
    ["404=0.1", "503=often", "503=1.5", "503=-0.1", "503=nan", "503=inf", "=0.1", " ", "503:0.1"],
)
def test_a_fault_that_is_written_wrongly_is_refused_with_what_is_right(part: str) -> None:
    with pytest.raises(PollerError) as caught:
        sim.parse_faults(f"torn=0.1,{part}")
    assert str(caught.value) == (
        f"--faults: {part!r} is not NAME=PROBABILITY with NAME one of"
        " 500, 503, 429, 401, html, torn, empty, hang, drop"
    )


def test_more_than_every_answer_cannot_go_wrong() -> None:
    with pytest.raises(PollerError, match="add up to more than 1"):
        sim.parse_faults("503=0.6,torn=0.6")
