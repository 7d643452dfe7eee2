"""The whole chain: simulated vendors → the daemon as a subprocess → real brokers → subscribers."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest
from redis.asyncio import Redis

from poller.brokers import Broker, redis_server
from poller.vendors import BUILT_IN
from tests.daemon import (
    Daemon,
    get,
    now_ms,
    output,
    running,
    settings,
    simulated,
    stream,
    subscribed,
    until,
)
from tests.delivered import ended, in_order, untold


@pytest.fixture
async def redis_url(redis_broker: Broker) -> str:
    url = f"{redis_broker.url}/0"
    async with Redis.from_url(url) as client:
        await client.flushall()
    return url


async def test_all_five_vendors_reach_both_brokers_in_order(
    tmp_path: Path, redis_url: str, mqtt_broker: Broker
) -> None:
    async with AsyncExitStack() as stack:
        urls = {name: (name, (await simulated(stack, name))[2]) for name in BUILT_IN}
        received = await stack.enter_async_context(subscribed(mqtt_broker.url, "jobs/#"))
        protocol = "3.1.1" if mqtt_broker.name == "amqtt" else "auto"
        brokers = {"redis": redis_url, "mqtt": mqtt_broker.url, "protocol": protocol}
        config = settings(tmp_path, urls, **brokers)
        daemon = await stack.enter_async_context(running(config))
        base = await daemon.url()

        async def enough() -> bool:
            streams = [await stream(redis_url, name) for name in BUILT_IN]
            return all(sum(event["data"]["terminal"] for event in one) >= 2 for one in streams)

        await until(enough, "two finished runs of every vendor in Redis", 60)
        assert (await get(f"{base}/healthz"))[0] == 200
        assert json.loads((await get(f"{base}/readyz"))[1]) == {"ready": True, "reasons": []}
        metrics = (await get(f"{base}/metrics"))[1]
        assert 'poller_source_up{source="kylin"} 1.0' in metrics
        assert await daemon.end() == 0

        for name in BUILT_IN:
            events = await stream(redis_url, name)
            in_order(events)
            topics = [(t, e) for t, e in received if t.startswith(f"jobs/{name}/")]
            assert [e for t, e in topics if "/events/" in t] == events
            newest = {t: e for t, e in topics if t.endswith("/state")}
            for topic, event in newest.items():
                job = topic.split("/")[2]
                of_job = [e for e in events if e["data"]["job"]["id"] == job]
                assert event == of_job[-1]
        async with Redis.from_url(redis_url) as client:
            assert await client.smembers("poller:sources") == {n.encode() for n in BUILT_IN}
        online = [event["online"] for topic, event in received if topic == "jobs/_poller/test"]
        assert online == [True, False]


@pytest.mark.parametrize("name", BUILT_IN)
async def test_kill_9_at_any_time_repeats_nothing_and_loses_nothing(
    name: str, tmp_path: Path, redis_url: str
) -> None:
    random = Random(name)
    async with AsyncExitStack() as stack:
        _, world, url = await simulated(stack, name, seed=7, jobs=3, pace=0.15)
        config = settings(tmp_path, {name: (name, url)}, redis=redis_url)
        async with running(config) as daemon:
            await until(lambda: polled(daemon, name), "first contact")
        began_ms = now_ms()
        kills = 0
        while kills < 5 or ended(world, began_ms) < 3:
            kills += 1
            assert kills < 60, "nothing ever ends in this world"
            async with running(config) as daemon:
                await daemon.said("poller.started")
                await asyncio.sleep(random.uniform(0.05, 0.8))
                await daemon.end(signal.SIGKILL)
        seen_until_ms = now_ms()
        async with running(config) as daemon:
            await daemon.said("poller.started")

            missing = ["not looked yet"]

            async def caught_up() -> bool:
                events = await stream(redis_url, name)
                missing[:] = untold(world, events, began_ms, seen_until_ms)
                return not missing

            await until(caught_up, missing, 30)
            assert await daemon.end() == 0
        in_order(await stream(redis_url, name))


async def test_sources_are_changed_by_sighup_and_a_bad_file_is_refused(
    tmp_path: Path, redis_url: str
) -> None:
    async with AsyncExitStack() as stack:
        urls = {n: (n, (await simulated(stack, n))[2]) for n in ("scale", "kylin", "datameer")}
        first = {name: urls[name] for name in ("scale", "kylin")}
        second = {name: urls[name] for name in ("kylin", "datameer")}
        config = settings(tmp_path, first, redis=redis_url)
        daemon = await stack.enter_async_context(running(config))
        base = await daemon.url()
        await until(lambda: stream_has(redis_url, "scale"), "events of scale")

        config.write_text("[poller]\nintance = 1\n", encoding="utf-8")
        daemon.process.send_signal(signal.SIGHUP)
        refused = await daemon.said("settings.rejected")
        assert any("intance" in problem for problem in refused["problems"])

        settings(tmp_path, second, redis=redis_url)
        daemon.process.send_signal(signal.SIGHUP)
        reloaded = await daemon.said("poller.reloaded")
        assert reloaded["changed"] == ["scale"]
        await until(lambda: stream_has(redis_url, "datameer"), "events of datameer")
        metrics = (await get(f"{base}/metrics"))[1]
        assert 'source="scale"' not in metrics
        assert 'poller_polls_total{source="kylin"}' in metrics
        assert await daemon.end() == 0


async def polled(daemon: Daemon, source: str) -> bool:
    """Whether first contact with the source is over: some polls, the last of them good."""
    metrics = (await get(f"{await daemon.url()}/metrics"))[1]
    counted = f'poller_polls_total{{source="{source}"}} '
    polls = [float(line.removeprefix(counted)) for line in metrics.splitlines() if counted in line]
    return f'poller_source_up{{source="{source}"}} 1.0' in metrics and polls[0] > 3


async def stream_has(redis: str, source: str) -> bool:
    return bool(await stream(redis, source))


async def test_a_dead_redis_shows_in_readyz_and_loses_nothing(tmp_path: Path) -> None:
    broker = redis_server(tmp_path / "redis", appendonly=True)
    (tmp_path / "redis").mkdir()
    async with AsyncExitStack() as stack:
        await asyncio.to_thread(broker.start)
        stack.push_async_callback(asyncio.to_thread, broker.stop)
        redis = f"{broker.url}/0"
        _, _, url = await simulated(stack, "scale", pace=0.2)
        config = settings(tmp_path, {"scale": ("scale", url)}, redis=redis)
        daemon = await stack.enter_async_context(running(config))
        base = await daemon.url()
        await until(lambda: stream_has(redis, "scale"), "events")
        await asyncio.to_thread(broker.kill)

        async def unready() -> bool:
            status, body = await get(f"{base}/readyz")
            return status == 503 and "redis" in body

        await until(unready, "503 within 5 s", 5)
        await asyncio.sleep(1)
        await asyncio.to_thread(broker.restart)

        async def ready() -> bool:
            return (await get(f"{base}/readyz"))[0] == 200

        await until(ready, "ready again", 30)
        assert await daemon.end() == 0
        in_order(await stream(redis, "scale"))


@pytest.mark.parametrize("name", BUILT_IN)
async def test_a_vendors_outage_ends_no_run(name: str, tmp_path: Path, redis_url: str) -> None:
    faults: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        _, world, url = await simulated(stack, name, pace=3, faults=faults)
        defaults = "timeout = '1s'\nvanish_after = 1"
        config = settings(tmp_path, {name: (name, url)}, redis=redis_url, defaults=defaults)
        daemon = await stack.enter_async_context(running(config))
        await until(lambda: stream_has(redis_url, name), "events")
        faults.update({"html": 0.3, "500": 0.3, "torn": 0.2, "drop": 0.2})
        await daemon.said("source.down")
        faults.clear()
        await daemon.said("source.up")
        assert await daemon.end() == 0
        events = await stream(redis_url, name)
        in_order(events)
        assert [e["type"] for e in events if ".source." in e["type"]] == [
            "dev.poller.source.down",
            "dev.poller.source.up",
        ]
        told = {e["data"]["state"] for e in events if "run" in e["data"]}
        assert told <= {step.state for step in world.account}


async def test_the_demo_shows_events_of_all_five_from_both_brokers() -> None:
    code, out, err = await output("demo", "--seconds", "12")
    assert code == 0, err
    assert "  board   http://127.0.0.1:" in out
    for name in BUILT_IN:
        assert f" {name} " in out, out
    last = out.strip().splitlines()[-1].split()
    assert int(last[0]) == int(last[5]) == int(last[8]) > 20


async def test_readyz_and_metrics_want_the_token(tmp_path: Path, redis_url: str) -> None:
    async with AsyncExitStack() as stack:
        _, _, url = await simulated(stack, "scale")
        config = settings(tmp_path, {"scale": ("scale", url)}, redis=redis_url)
        text = config.read_text(encoding="utf-8")
        text = text.replace('listen = "127.0.0.1:0"', 'listen = "127.0.0.1:0"\ntoken = "env:WORD"')
        config.write_text(text, encoding="utf-8")
        env = {"WORD": "planted-secret-4711"}
        daemon = await stack.enter_async_context(running(config, env))
        base = await daemon.url()
        assert (await get(f"{base}/healthz"))[0] == 200
        assert (await get(f"{base}/metrics"))[0] == 401
        allowed = {"Authorization": "Bearer planted-secret-4711"}
        status, body = await get(f"{base}/metrics", **allowed)
        assert status == 200
        assert await daemon.end() == 0
        for place in (body, daemon.text, str(await stream(redis_url, "scale"))):
            assert "planted-secret-4711" not in place
