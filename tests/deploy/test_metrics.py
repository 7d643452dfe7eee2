"""What Prometheus gets from a daemon: its exposition, and a real Prometheus that scrapes it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from poller.brokers import Broker
from tests.daemon import Event, get, running, settings, simulated, stream, until
from tests.deploy.programs import DEPLOY, ROOT, program, promtool
from tests.deploy.published import FAMILIES, SERIES
from tests.deploy.shipped import queries

SOURCE = "scraped"
TOKEN = "a-scrape-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@dataclass(frozen=True)
class Scrape:
    """What a daemon showed, and the events that it had published until then."""

    text: str
    content_type: str
    events: list[Event]


@asynccontextmanager
async def daemon(folder: Path, redis: Broker, mqtt: Broker) -> AsyncIterator[str]:
    """One that polls Kylin, has published something, and wants a token; gives its URL."""
    async with AsyncExitStack() as stack:
        _, _, kylin = await simulated(stack, "kylin", pace=0.05)
        config = settings(
            folder,
            {SOURCE: ("kylin", kylin)},
            instance=SOURCE,  # the broker retains what is told, and other tests see it
            redis=f"{redis.url}/0",
            mqtt=mqtt.url,
            protocol="3.1.1" if mqtt.name == "amqtt" else "auto",
        )
        env = {"POLLER_HTTP__TOKEN": "env:SCRAPE_TOKEN", "SCRAPE_TOKEN": TOKEN}
        process = await stack.enter_async_context(running(config, env))
        url = await process.url()

        async def ended() -> bool:
            events = await stream(f"{redis.url}/0", SOURCE)
            return any(event["data"]["terminal"] for event in events)

        await until(ended, "a finished run in Redis")
        yield url


@pytest.fixture
async def scrape(tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker) -> Scrape:
    async with (
        daemon(tmp_path, redis_broker, mqtt_broker) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url}/metrics", headers=BEARER) as response,
    ):
        return Scrape(
            text=await response.text(),
            content_type=response.headers["Content-Type"],
            events=await stream(f"{redis_broker.url}/0", SOURCE),
        )


async def test_a_daemon_shows_the_metrics_of_the_contract_and_no_others(scrape: Scrape) -> None:
    families = list(text_string_to_metric_families(scrape.text))
    shown = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            frozenset(name for sample in family.samples for name in sample.labels if name != "le"),
        )
        for family in families
    }
    assert shown == FAMILIES
    assert {sample.name for family in families for sample in family.samples} == SERIES
    assert all(family.documentation for family in families)
    assert scrape.content_type == "text/plain; version=1.0.0; charset=utf-8"
    labels = {
        value
        for family in families
        for sample in family.samples
        for value in sample.labels.values()
    }
    jobs = [event["data"] for event in scrape.events if "job" in event["data"]]
    assert jobs
    assert not labels & {job[kind]["id"] for job in jobs for kind in ("job", "run")}
    # Prometheus' own linter: units, suffixes, help texts, label names
    assert promtool("check", "metrics", given=scrape.text) == ""


async def test_a_daemon_that_waits_for_its_disk_shows_what_the_alert_asks_for(
    tmp_path: Path,
) -> None:
    """PollerStalled: polls stand still, while the last one was good, and a scrape is answered."""
    full = tmp_path / "full"
    async with AsyncExitStack() as stack:
        _, _, kylin = await simulated(stack, "kylin", pace=0.05)
        config = settings(tmp_path, {SOURCE: ("kylin", kylin)})
        process = await stack.enter_async_context(running(config, planted=f"full:{full}"))
        url = await process.url()
        counts: list[float] = []

        async def shown(name: str) -> float:
            _, text = await get(f"{url}/metrics")
            [found] = re.findall(rf"^{name}{{.*}} (.*)$", text, re.MULTILINE)
            return float(found)

        async def polled() -> bool:
            return await shown("poller_polls_total") > 2

        async def stands_still() -> bool:
            counts.append(await shown("poller_polls_total"))
            return len(counts) > 20 and counts[-1] == counts[-20]

        await until(polled, "polls")
        full.touch()
        await process.said("journal.stalled")
        await until(stands_still, "no further poll")
        assert await shown("poller_source_up") == 1


def test_the_metrics_of_the_handbook_are_those_of_the_contract() -> None:
    handbook = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    chapter = handbook.split("## Metrics, and what to alert on")[1].split("\n## ")[0]
    rows = [line for line in chapter.splitlines() if line.startswith("| `poller_")]
    told = {
        name: frozenset(filter(None, labels.split(",")))
        for row in rows
        for name, labels in re.findall(r"`(poller_\w+)(?:\{([^}]*)\})?`", row.split(" | ")[0])
    }
    assert told == {name: labels for name, (_, labels) in FAMILIES.items()}


@asynccontextmanager
async def prometheus(config: Path) -> AsyncIterator[str]:
    """A Prometheus on a free port of loopback; gives its URL."""
    process = await asyncio.create_subprocess_exec(
        program("prometheus", "Debian's prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={config.parent}/tsdb",
        "--web.listen-address=127.0.0.1:0",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    log = ""
    try:
        while (found := re.search(r'"?Listening on"? address=(\S+)', log)) is None:
            line = await process.stderr.readline()
            assert line, log
            log += line.decode()
        reading = asyncio.create_task(process.stderr.read())  # lest it wait for a full pipe
        yield f"http://{found[1]}"
        process.terminate()
        await reading
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answer(base: str, path: str, **parameters: str) -> Any:
    """What Prometheus' API answers; None while it does not yet."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{base}/api/v1/{path}", params=parameters) as response,
    ):
        return (await response.json())["data"] if response.status == 200 else None


async def test_a_prometheus_with_the_shipped_configuration_sees_the_sources(
    tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8"))
    folder = tmp_path / "prometheus"
    folder.mkdir()
    (folder / "token").write_text(TOKEN, encoding="utf-8")
    [rules], [job] = config["rule_files"], config["scrape_configs"]
    async with daemon(tmp_path, redis_broker, mqtt_broker) as url:
        config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / rules)]
        job["authorization"]["credentials_file"] = str(folder / "token")
        job["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
        path = folder / "prometheus.yml"
        path.write_text(json.dumps(config), encoding="utf-8")
        async with prometheus(path) as base:
            found: list[Any] = []

            async def scraped() -> bool:
                data = await answer(base, "query", query="poller_source_up")
                found[:] = data["result"] if data else []
                return bool(found)

            await until(scraped, "poller_source_up in Prometheus")
            [series] = found
            labels = {key: series["metric"][key] for key in ("job", "source")}
            assert (labels, series["value"][1]) == ({"job": "poller", "source": SOURCE}, "1")

            async def judged() -> bool:
                data = await answer(base, "rules", type="alert")
                found[:] = [rule for group in data["groups"] for rule in group["rules"]]
                return all(rule["health"] != "unknown" for rule in found)

            await until(judged, "every rule evaluated")
            wrong = {rule["name"]: rule["lastError"] for rule in found if rule["health"] != "ok"}
            assert (wrong, len(found) > 5) == ({}, True)

            # rates want two scrapes; the dashboard shows something in every panel
            async def empty() -> list[str]:
                answers = {query: await answer(base, "query", query=query) for query in queries()}
                return [query for query, data in answers.items() if not (data and data["result"])]

            async def filled() -> bool:
                found[:] = await empty()
                return not found

            await until(filled, found)
