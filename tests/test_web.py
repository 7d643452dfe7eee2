"""Health and metrics over HTTP."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import aiohttp.web
import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families

from poller.errors import JournalError, PollerError
from poller.web.hosts import only_own
from tests import served
from tests.served import Patient

TOKEN = "Pl4nted-T0ken-ü"


class Stuck(Patient):
    """A daemon that does not tell how it is."""

    async def troubles(self) -> list[str]:
        await asyncio.Event().wait()
        return []


@asynccontextmanager
async def serving(
    folder: Path, facts: Patient | None = None, token: str | None = None
) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        served.serving(folder, facts, token=token) as here,
        aiohttp.ClientSession(here.url) as session,
    ):
        yield session


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {token}"}


# Health


async def test_healthz_says_that_the_process_runs_whatever_ails_it(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, Patient("redis: away")) as client,
        client.get("/healthz") as response,
    ):
        assert (response.status, await response.text()) == (200, "ok\n")


async def test_readyz_is_200_if_nothing_is_wrong(tmp_path: Path) -> None:
    async with serving(tmp_path, Patient()) as client, client.get("/readyz") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert await response.json() == {"ready": True, "reasons": []}


async def test_readyz_is_503_with_every_reason(tmp_path: Path) -> None:
    reasons = ["redis: nothing listens there", "source kylin-prod: the loop is stuck"]
    async with serving(tmp_path, Patient(*reasons)) as client, client.get("/readyz") as response:
        assert response.status == 503
        assert await response.json() == {"ready": False, "reasons": reasons}


async def test_readyz_is_503_if_even_asking_fails(tmp_path: Path) -> None:
    patient = Patient()
    patient.error = JournalError("journal.db: disk I/O error")
    async with serving(tmp_path, patient) as client, client.get("/readyz") as response:
        assert response.status == 503
        assert (await response.json())["reasons"] == ["journal.db: disk I/O error"]


@pytest.mark.looptime
async def test_readyz_is_503_within_five_seconds_if_the_daemon_is_stuck(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with serving(tmp_path, Stuck()) as client:
        began_s = loop.time()
        async with client.get("/readyz") as response:
            assert response.status == 503
            assert "within 4 s" in (await response.json())["reasons"][0]
        assert 4 <= loop.time() - began_s <= 5


# Metrics


async def test_metrics_are_brought_up_to_date_and_in_the_format_that_they_claim(
    tmp_path: Path,
) -> None:
    patient = Patient()
    async with serving(tmp_path, patient) as client:
        for number in (1, 2):
            async with client.get("/metrics") as response:
                assert response.status == 200
                assert response.headers["Content-Type"].startswith("text/plain; version=")
                assert response.charset == "utf-8"
                families = text_string_to_metric_families(await response.text())
                [runs] = [family for family in families if family.name == "poller_runs"]
                assert runs.samples[0].value == number


# The token

PATHS = [
    "/readyz",
    "/metrics",
    "/",
    "/openapi.json",
    "/api/v1/sources",
    "/api/v1/runs",
    "/api/v1/runs/a/b/c",
    "/api/v1/stats",
    "/api/v1/events",
    "/healthz/",
    "/nowhere",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("wrong"),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer(TOKEN, "Basic"),
        bearer(TOKEN, "Token"),
        {"Authorization": TOKEN},
        {"Authorization": "Bearer"},
    ],
    ids=range(9),
)
async def test_every_path_but_healthz_wants_the_token(
    tmp_path: Path, path: str, headers: dict[str, str]
) -> None:
    async with (
        serving(tmp_path, Patient(), TOKEN) as client,
        client.get(path, headers=headers) as response,
    ):
        assert response.status == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        if path == "/":
            assert response.content_type == "text/html"
            assert "token" in await response.text()
        else:
            assert response.content_type == "application/problem+json"
            assert await response.json() == {
                "type": "about:blank",
                "title": "Unauthorized",
                "status": 401,
                "detail": "the token is missing or wrong",
            }


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize(("path", "status"), [("/readyz", 200), ("/metrics", 200), ("/x", 404)])
async def test_the_right_token_opens_every_path(
    tmp_path: Path, path: str, status: int, scheme: str
) -> None:
    async with (
        serving(tmp_path, Patient(), TOKEN) as client,
        client.get(path, headers=bearer(TOKEN, scheme)) as response,
    ):
        assert response.status == status


async def test_healthz_wants_no_token(tmp_path: Path) -> None:
    async with serving(tmp_path, Patient(), TOKEN) as client, client.get("/healthz") as response:
        assert response.status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_nothing_can_be_changed(tmp_path: Path, method: str) -> None:
    async with (
        serving(tmp_path, Patient()) as client,
        client.request(method, "/readyz") as response,
    ):
        assert response.status == 405


# The name


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8787", 200),
        ("127.1.2.3:1", 200),
        ("localhost", 200),
        ("LocalHost:8787", 200),
        ("[::1]:8787", 200),
        ("evil.example.com", 421),
        ("evil.example.com:8787", 421),
        ("127.0.0.1.evil.example.com", 421),
        ("localhost.evil.example.com", 421),
        ("127.0.0.1@evil.example.com", 421),
        ("10.0.0.1", 421),
        ("[::ffff:10.0.0.1]", 421),
        ("[", 421),
        ("", 421),
    ],
)
@pytest.mark.parametrize("path", ["/readyz", "/metrics"])
async def test_without_a_token_only_calls_by_a_name_of_loopback_are_answered(
    tmp_path: Path, path: str, host: str, status: int
) -> None:
    async with (
        serving(tmp_path, Patient()) as client,
        client.get(path, headers={"Host": host}) as response,
    ):
        assert response.status == status
        assert ("set http.token" in await response.text()) is (status == 421)


@pytest.mark.parametrize(("name", "status"), [("box.lan:8787", 200), ("other.lan:8787", 421)])
async def test_the_host_that_is_listened_on_is_a_name_of_ours(name: str, status: int) -> None:
    async def handle(_request: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response()

    request = make_mocked_request("GET", "/readyz", headers={"Host": name})
    assert (await only_own("Box.lan")(request, handle)).status == status


async def test_a_request_without_a_name_comes_from_no_browser(tmp_path: Path) -> None:
    async with served.serving(tmp_path) as here:
        port = int(here.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        writer.close()


async def test_healthz_is_answered_by_every_name(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, Patient()) as client,
        client.get("/healthz", headers={"Host": "evil.example.com"}) as response,
    ):
        assert response.status == 200


async def test_who_has_the_token_may_call_by_any_name(tmp_path: Path) -> None:
    headers = {"Host": "poller.example.com", **bearer(TOKEN)}
    async with (
        serving(tmp_path, Patient(), TOKEN) as client,
        client.get("/readyz", headers=headers) as response,
    ):
        assert response.status == 200


# The address


async def test_an_address_that_is_taken_is_told_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PollerError) as caught:
            async with served.serving(tmp_path, listen=listen):
                pass
    assert str(caught.value).startswith(f"http.listen: cannot listen on {listen}: ")
    assert str(caught.value).endswith("address already in use")


async def test_a_host_that_is_none_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PollerError, match=r"^http\.listen: cannot listen on 192\.0\.2\.1:0: \w+"):
        async with served.serving(tmp_path, listen="192.0.2.1:0"):
            pass


async def test_it_listens_on_ipv6(tmp_path: Path) -> None:
    async with served.serving(tmp_path, listen="[::1]:0") as here:
        assert here.url.startswith("http://[::1]:")
        async with here.client.get(f"{here.url}/healthz") as response:
            assert response.status == 200


async def test_without_a_host_it_listens_everywhere(tmp_path: Path) -> None:
    async with served.serving(tmp_path, token=TOKEN, listen=":0") as here:
        assert here.url.startswith("http://localhost:")


async def test_the_port_is_free_again_when_the_context_ends(tmp_path: Path) -> None:
    async with served.serving(tmp_path) as here:
        listen = here.url.removeprefix("http://")
    async with served.serving(tmp_path, listen=listen) as again:
        assert again.url == here.url


async def test_an_idle_client_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with (
        asyncio.timeout(10),
        aiohttp.ClientSession() as client,
        served.serving(tmp_path) as here,
        client.get(f"{here.url}/healthz") as response,
    ):
        assert response.status == 200
