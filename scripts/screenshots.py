"""Pictures of the board for the documentation, taken of a living demo: `make screenshots`."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright

DOCS = Path(__file__).parent.parent / "docs"
LIVES_S = 100
"""How long the demo runs before it is a picture worth taking."""
WIDE = {"width": 1440, "height": 1080}
PHONE = {"width": 390, "height": 844}


async def main() -> None:
    """Run the demo, look at it in every way, end it."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium is installed; `apt-get install chromium` brings one")
    demo = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "poller", "demo", stdout=asyncio.subprocess.PIPE
    )
    try:
        url = await _board_of(demo)
        drained = asyncio.create_task(demo.communicate())
        await asyncio.sleep(LIVES_S)
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox"]
            )
            await _take(browser, url)
            await browser.close()
    finally:
        demo.terminate()
    await drained


async def _board_of(demo: asyncio.subprocess.Process) -> str:
    """The board's address, which the demo prints."""
    if demo.stdout is None:
        raise RuntimeError("the demo has no output")
    async for line in demo.stdout:
        found = re.match(rb"\s+board\s+(\S+)", line)
        if found:
            return found[1].decode()
    raise RuntimeError("the demo has not told where its board is")


async def _take(browser: Browser, url: str) -> None:
    page = await _open(browser, url, "light", WIDE)
    await page.screenshot(path=DOCS / "board-light.png")
    reason = page.locator(".rows .why").first
    await reason.click()
    await page.locator("tbody tr").first.wait_for()
    await page.screenshot(path=DOCS / "board-run.png")
    page = await _open(browser, url, "dark", WIDE)
    await page.screenshot(path=DOCS / "board-dark.png")
    page = await _open(browser, url, "light", PHONE)
    await page.screenshot(path=DOCS / "board-phone.png")


async def _open(browser: Browser, url: str, scheme: str, size: dict[str, int]) -> Page:
    page = await browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    await page.goto(url)
    await page.locator(".rows li").first.wait_for()
    await page.locator("#feed li time").first.wait_for()
    await page.locator("#chart svg").wait_for()
    return page


if __name__ == "__main__":
    asyncio.run(main())
