"""The board in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright, expect

from poller.known import Commit, Known
from poller.runs import Job, Problem, State
from poller.web.answers import Sink
from tests.served import NOW_MS, Patient, Served, draft, known, serving, source_status

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
SCRIPT = "<script>alert(1)</script>"
TOKEN = "Pl4nted-T0ken"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),  # one browser for all
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ,
        reason="no chromium is installed; `apt-get install chromium` brings one",
    ),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    assert CHROMIUM, "no chromium is installed"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        await browser.close()


Open = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture(loop_scope="module")
async def open_(browser: Browser) -> AsyncIterator[Open]:
    """Opens an address in a new window; at the end nothing may have gone wrong in any of them."""
    faults: list[str] = []
    hosts: set[str | None] = set()

    async def opening(url: str, **options: Any) -> Page:
        context = await browser.new_context(**options)
        page = await context.new_page()
        await page.add_init_script(
            "addEventListener('securitypolicyviolation',"
            " (event) => console.error('policy', event.violatedDirective, event.blockedURI))"
        )
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.on(
            "console",
            lambda line: (
                faults.append(line.text)
                if line.type == "error" and "Failed to load resource" not in line.text
                else None
            ),
        )
        page.set_default_timeout(20_000)
        await page.goto(url)
        return page

    yield opening
    for context in browser.contexts:
        await context.close()
    assert faults == []
    assert hosts <= {"127.0.0.1", None}


@pytest.fixture
def patient() -> Patient:
    patient = Patient()
    patient.statuses[1] = source_status(
        "b",
        condition="down",
        since="2027-01-15T07:55:00.000Z",
        reason="rejected",
        message="HTTP 401: credentials refused",
        failures=3,
    )
    return patient


@pytest_asyncio.fixture(loop_scope="module")
async def here(tmp_path: Path, patient: Patient) -> AsyncIterator[Served]:
    async with serving(tmp_path, patient) as here:
        await here.tell(
            known("1", State.FAILED, job=Job("j1", "load orders", "sales", "alice")),
            known("2", job=Job("j2", "clean ledger"), started_ms=NOW_MS - 90_000),
        )
        await here.tell(known("3", State.SUCCEEDED, job=Job("j3", "export tiles")), source="b")
        patient.usual["a", "2"] = 120_000
        patient.relays = [Sink("redis", None, 3), Sink("mqtt", "nothing listens there", 1)]
        yield here


def section(page: Page, name: str) -> Any:
    return page.get_by_role("region", name=name)


async def test_the_board_tells_what_runs_what_failed_who_is_blind_and_who_is_behind(
    here: Served, open_: Open
) -> None:
    page = await open_(here.url)
    failed = section(page, "Failed runs").get_by_role("listitem")
    await expect(failed).to_have_count(1)
    await expect(failed).to_contain_text("load orders")
    await expect(failed).to_contain_text("1 broke")
    live = section(page, "Live runs").get_by_role("listitem")
    await expect(live).to_contain_text("clean ledger")
    await expect(live).to_contain_text("1 m 30 s of usually 2 m 0 s")
    await expect(section(page, "Finished runs")).to_contain_text("export tiles")
    await expect(page.locator("#tile-sources")).to_contain_text("1 blind")
    await expect(page.locator("#sources")).to_contain_text("HTTP 401: credentials refused")
    await expect(page.locator("#tile-sinks")).to_contain_text("1 behind")
    await expect(page.locator("#sinks")).to_contain_text("2 events wait")
    await expect(page.locator("#tile-failed strong")).to_have_text("1")
    await expect(page.get_by_role("status")).to_have_text("live")
    await expect(page).to_have_title("1 blind, 1 failed · poller test")


async def test_instants_are_told_exactly_on_hover(here: Served, open_: Open) -> None:
    page = await open_(here.url)
    time = section(page, "Failed runs").locator("time")
    await expect(time).to_have_text("1 m ago")
    await expect(time).to_have_attribute("datetime", "2027-01-15T07:59:00.000Z")
    await expect(time).to_have_attribute("title", re.compile(r"^2027-01-15T07:59:00\.000Z\n"))


async def test_an_event_appears_without_a_reload(here: Served, open_: Open) -> None:
    page = await open_(here.url)
    await expect(page.get_by_role("status")).to_have_text("live")
    await here.tell(known("9", State.FAILED, job=Job("j9", "fresh failure"), last_ms=NOW_MS))
    await expect(page.locator("#feed li").first).to_contain_text("fresh failure")
    first = section(page, "Failed runs").get_by_role("listitem").first
    await expect(first).to_contain_text("fresh failure")


async def test_filters_work_and_make_links(here: Served, open_: Open) -> None:
    page = await open_(here.url)
    await page.get_by_label("Source", exact=True).select_option("b")
    await expect(section(page, "Failed runs")).to_contain_text("No run fits")
    await expect(section(page, "Finished runs")).to_contain_text("export tiles")
    assert page.url == f"{here.url}/?source=b"
    await page.get_by_label("State").select_option("failed")
    assert page.url == f"{here.url}/?source=b&state=failed"
    await page.get_by_role("button", name="Clear").click()
    await page.get_by_role("searchbox").fill("ORDERS")
    await expect(section(page, "Failed runs")).to_contain_text("load orders")
    await expect(section(page, "Live runs")).to_contain_text("No run fits")
    await expect(page).to_have_url(f"{here.url}/?q=ORDERS")

    linked = await open_(f"{here.url}/?q=ORDERS&state=failed&source=a")
    await expect(linked.get_by_role("searchbox")).to_have_value("ORDERS")
    await expect(linked.get_by_label("Source", exact=True)).to_have_value("a")
    await expect(section(linked, "Failed runs").get_by_role("listitem")).to_have_count(1)
    await expect(section(linked, "Live runs")).to_have_count(0)


async def test_more_runs_come_page_by_page(here: Served, open_: Open) -> None:
    await here.remember(*(known(f"n{number}", State.SUCCEEDED) for number in range(100)))
    page = await open_(here.url)
    rows = section(page, "Finished runs").get_by_role("listitem")
    await expect(rows).to_have_count(6)
    await section(page, "Finished runs").get_by_role("button", name="Show more").click()
    await expect(rows).to_have_count(56)
    await section(page, "Finished runs").get_by_role("button", name="Show more").click()
    await expect(rows).to_have_count(101)
    await expect(section(page, "Finished runs").get_by_role("button")).to_have_count(0)


async def test_a_runs_page_tells_its_story(here: Served, open_: Open) -> None:
    job = Job("j/4", "build index", url="https://vendor.example/j4")
    story: list[tuple[Known, dict[str, Any]]] = [
        (known("4", State.QUEUED, job=job, last_ms=NOW_MS - 90_000), {"inferred": True}),
        (known("4", State.RUNNING, job=job, last_ms=NOW_MS - 80_000), {"snapshot": True}),
        (
            known("4", State.FAILED, job=job, last_ms=NOW_MS - 20_000, vendor_state="ERROR"),
            {"problem": Problem("E7", "source table not found\nat step 3"), "detail": {"node": 7}},
        ),
    ]
    drafts = [
        draft(run, sequence=10 + number, **fields) for number, (run, fields) in enumerate(story)
    ]
    await here.journal.commit(Commit(source="a", runs=[story[-1][0]], events=drafts))
    page = await open_(here.url)
    await page.get_by_role("link", name=re.compile("build index")).first.click()
    assert page.url == f"{here.url}/?run=a%2Fj%25252F4%2F4".replace("%2525", "%25")
    await expect(page.get_by_role("heading", level=1, name="build index")).to_be_visible()
    await expect(section(page, "Why it failed")).to_contain_text(
        "source table not found\nat step 3"
    )
    timeline = section(page, "Timeline")
    await expect(timeline.get_by_role("img")).to_have_attribute(
        "aria-label", "queued, then running, then failed"
    )
    await expect(timeline).to_contain_text("queued10 srunning1 m 0 sfailed")
    rows = section(page, "Events").locator("tbody tr")
    await expect(rows.nth(0)).to_contain_text("ERROR")
    await expect(rows.nth(0)).to_contain_text("node: 7")
    await expect(rows.nth(1)).to_contain_text("snapshot")
    await expect(rows.nth(2)).to_contain_text("inferred")
    link = page.get_by_role("link", name="vendor.example")
    await expect(link).to_have_attribute("href", "https://vendor.example/j4")
    await page.get_by_role("link", name="Board").click()
    await expect(section(page, "Failed runs")).to_be_visible()


async def test_a_runs_page_follows_its_run(here: Served, open_: Open) -> None:
    page = await open_(f"{here.url}/?run=a%2Fj2%2F2")
    await expect(page.locator(".title")).to_contain_text("running")
    await here.tell(known("2", State.SUCCEEDED, job=Job("j2", "clean ledger"), last_ms=NOW_MS))
    await expect(page.locator(".title")).to_contain_text("succeeded")


@pytest.mark.parametrize("path", ["?run=a%2Fj%2F99", "?run=nonsense", "?run=%25"])
async def test_a_run_that_is_not_there_is_told_so(here: Served, open_: Open, path: str) -> None:
    page = await open_(f"{here.url}/{path}")
    await expect(page.get_by_text("This run is not known, or not any more")).to_be_visible()


async def test_an_empty_board_says_what_to_do(tmp_path: Path, open_: Open) -> None:
    async with serving(tmp_path) as here:
        page = await open_(here.url)
        await expect(section(page, "Live runs")).to_contain_text("is its source blind")
        await expect(section(page, "Failed runs")).to_contain_text("No failed run is known")
        await expect(page.locator("#sinks")).to_contain_text("Add [redis] or [mqtt]")
        await page.context.close()


async def test_markup_in_what_vendors_say_is_text(here: Served, open_: Open) -> None:
    job = Job(SCRIPT, SCRIPT, '"><img src=x onerror=alert(1)>', SCRIPT, "javascript:alert(1)")
    run = known(SCRIPT, State.FAILED, job=job, last_ms=NOW_MS, vendor_state=SCRIPT)
    await here.tell(run)
    page = await open_(here.url)
    link = section(page, "Failed runs").get_by_role("link").first
    await expect(link).to_contain_text(SCRIPT)
    await expect(page.locator("#feed li").first).to_contain_text(SCRIPT)
    await link.click()
    await expect(page.get_by_role("heading", level=1, name=SCRIPT)).to_be_visible()
    await expect(section(page, "Facts")).to_contain_text("javascript:alert(1)")
    assert await page.locator("script").count() == 1
    assert await page.locator("img:not([role])").count() == 0
    assert await page.locator("a[href^=javascript]").count() == 0


async def test_the_policy_lets_nothing_run_that_is_not_the_boards(
    here: Served, browser: Browser
) -> None:
    page = await browser.new_page()
    await page.goto(here.url)
    ran = await page.evaluate(
        """async () => {
            const script = document.createElement("script");
            try { script.textContent = "window.ran = 1"; document.body.append(script); } catch {}
            try { document.body.innerHTML += "<img src=x onerror='window.ran = 2'>"; } catch {}
            try { await fetch("https://elsewhere.invalid/"); window.ran = 3; } catch {}
            return window.ran;
        }"""
    )
    assert ran is None


async def test_a_restart_of_the_daemon_heals_the_stream_without_a_gap(
    tmp_path: Path, open_: Open
) -> None:
    async with AsyncExitStack() as stack:
        here = await stack.enter_async_context(serving(tmp_path))
        listen = here.url.removeprefix("http://")
        page = await open_(here.url)
        await expect(page.get_by_role("status")).to_have_text("live")
        await here.tell(known("before"))
        await expect(page.locator("#feed li")).to_have_count(1)
        await stack.aclose()
        await expect(page.get_by_role("status")).to_contain_text("connection lost")
        # What the next daemon finds before anybody can ask it.
        async with serving(tmp_path) as elsewhere:
            await elsewhere.tell(known("meanwhile", job=Job("m", "meanwhile")))
        here = await stack.enter_async_context(serving(tmp_path, listen=listen))
        await expect(page.get_by_role("status")).to_have_text("live")
        await here.tell(known("after", job=Job("n", "afterwards")))
        await expect(page.locator("#feed li")).to_have_count(3)
        await expect(page.locator("#feed li").nth(0)).to_contain_text("afterwards")
        await expect(page.locator("#feed li").nth(1)).to_contain_text("meanwhile")
        await expect(section(page, "Live runs")).to_contain_text("afterwards")
        await page.context.close()


async def test_with_a_token_the_board_asks_for_it_and_keeps_it_in_the_tab(
    tmp_path: Path, open_: Open
) -> None:
    async with serving(tmp_path, token=TOKEN) as here:
        page = await open_(here.url)
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        await page.get_by_label("Token").fill("wrong")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("That token was refused.")
        await page.get_by_label("Token").fill(TOKEN)
        await page.get_by_role("button", name="Show the board").click()
        await expect(page.get_by_role("status")).to_have_text("live")
        await page.reload()
        await expect(page.get_by_role("status")).to_have_text("live")
        assert TOKEN not in page.url
        assert await page.context.cookies() == []
        assert await page.evaluate("localStorage.length") == 0
        await page.get_by_role("button", name="Forget the token").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        await page.context.close()


async def test_the_board_is_used_by_keyboard(here: Served, open_: Open) -> None:
    page = await open_(here.url)
    await expect(section(page, "Failed runs").get_by_role("listitem")).to_have_count(1)
    await page.keyboard.press("/")
    await expect(page.get_by_role("searchbox")).to_be_focused()
    await page.keyboard.type("orders")
    await expect(page).to_have_url(f"{here.url}/?q=orders")
    row = section(page, "Failed runs").get_by_role("link")
    for _ in range(12):
        await page.keyboard.press("Tab")
        if await row.evaluate("element => element === document.activeElement"):
            break
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1, name="load orders")).to_be_visible()
    await page.go_back()
    await expect(page.get_by_role("searchbox")).to_have_value("orders")


async def test_nothing_sticks_out_on_a_phone(here: Served, open_: Open) -> None:
    long = known("x" * 200, State.FAILED, job=Job("y" * 200, "z" * 200), last_ms=NOW_MS)
    await here.tell(long)
    page = await open_(here.url, viewport={"width": 360, "height": 740})
    await expect(section(page, "Failed runs").get_by_role("listitem")).to_have_count(2)
    width = "document.scrollingElement.scrollWidth"
    assert await page.evaluate(width) <= 360
    await section(page, "Failed runs").get_by_role("link").first.click()
    await expect(section(page, "Events").locator("tbody tr")).to_have_count(1)
    assert await page.evaluate(width) <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_nobody_is_shut_out(tmp_path: Path, here: Served, open_: Open, scheme: str) -> None:
    """No serious finding of axe, on any page."""
    every = [Known(job=Job(s, s), run_id=s, state=s, last_ms=NOW_MS) for s in State]
    await here.tell(*every)
    page = await open_(here.url, color_scheme=scheme)
    await expect(page.locator("#feed li")).to_have_count(3 + len(every))
    await check(page)
    await section(page, "Failed runs").get_by_role("link").first.click()
    await expect(section(page, "Events").locator("tbody tr")).to_have_count(1)
    await check(page)
    async with serving(tmp_path / "guarded", token=TOKEN) as guarded:
        page = await open_(guarded.url, color_scheme=scheme)
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        await check(page)
        await page.context.close()


async def check(page: Page) -> None:
    await page.emulate_media(reduced_motion="reduce")
    found = (await Axe().run(page)).response["violations"]
    serious = [
        (finding["id"], finding["impact"], [node["html"] for node in finding["nodes"]])
        for finding in found
        if finding["impact"] in ("serious", "critical")
    ]
    assert serious == []
