"""`poller check`, one finding at a time, against mocked HTTP."""

from __future__ import annotations

import re

import aiohttp
import pytest
from aioresponses import aioresponses

from poller.checks import check_source
from poller.fetch import Endpoint, connect
from poller.settings import NoAuth
from poller.vendors import load

URL = "http://kylin.test/kylin"
_ANY_LISTING = re.compile(r"^http://kylin\.test/kylin/api/jobs\?.*$")
EMPTY = {
    "code": "000",
    "data": {"value": [], "total_size": 0, "offset": 0, "limit": 200},
    "msg": "",
}
BAD_ROW = {"code": "000", "data": {"value": [{"id": 7}], "total_size": 1}, "msg": ""}
LOCKED = {"code": "999", "data": None, "msg": "KE-010003209: the user is locked"}


@pytest.mark.parametrize(
    ("answer", "ok", "what", "advice"),
    [
        ({"payload": EMPTY}, True, "answers; 0 runs on the first page", ""),
        ({"payload": BAD_ROW}, False, "1 rows cannot be read, e.g. $.data.value[0]", "the others"),
        ({"status": 401}, False, "refused", "check sources.k.auth"),
        ({"status": 400, "payload": LOCKED}, False, "lock", "check sources.k.auth"),
        ({"status": 404}, False, "HTTP 404", "check sources.k.url"),
        ({"body": "<html>"}, False, "an HTML page", "not to a page for people"),
        ({"status": 429}, False, "asked too often", "lower sources.k.rate"),
        ({"status": 502}, False, "HTTP 502", "that the server is up"),
        ({"exception": aiohttp.ServerDisconnectedError()}, False, "", "that the server is up"),
    ],
)
async def test_a_finding_says_what_is_wrong_and_what_to_do(
    answer: dict[str, object], ok: bool, what: str, advice: str
) -> None:
    vendor = load("kylin")
    with aioresponses() as mocked:
        mocked.get(_ANY_LISTING, repeat=True, **answer)
        async with connect(Endpoint(url=URL, auth=NoAuth()), now_ms=lambda: 1) as ask:
            finding = await check_source("sources.k", vendor, vendor.options(), ask, lambda: 10**12)
    assert finding.ok is ok
    assert what in finding.what
    assert advice in finding.advice
