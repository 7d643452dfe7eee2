"""The commands, as an operator meets them: real processes, their output and exit codes."""

from __future__ import annotations

import asyncio
import datetime
import json
import signal
import ssl
import urllib.request
from contextlib import AsyncExitStack
from pathlib import Path

import jsonschema
import pytest
import trustme
from aiohttp import web
from redis.asyncio import Redis

from poller.brokers import Broker, free_port
from poller.vendors import BUILT_IN
from tests.daemon import (
    command,
    now_ms,
    output,
    running,
    settings,
    simulated,
    stream,
    subscribed,
    until,
)

ROOT = Path(__file__).parents[2]


async def test_check_says_that_all_is_well(
    tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> None:
    async with AsyncExitStack() as stack:
        urls = {name: (name, (await simulated(stack, name))[2]) for name in BUILT_IN}
        brokers = {"redis": redis_broker.url, "mqtt": mqtt_broker.url}
        config = settings(tmp_path, urls, **brokers, instance="only-checked")
        presence = "jobs/_poller/only-checked"
        received = await stack.enter_async_context(subscribed(mqtt_broker.url, presence))
        code, out, _ = await output("check", "-c", str(config))
        assert code == 0, out
        assert len(out.splitlines()) == 7
        assert all(line.startswith("ok ") for line in out.splitlines()), out
        async with Redis.from_url(redis_broker.url) as client:
            assert await client.keys("*") == []
        assert received == []
        assert not (tmp_path / "journal.db").exists()


@pytest.mark.parametrize(
    ("faults", "path", "says"),
    [
        ({"401": 1.0}, "", "credentials refused; check sources.s.auth"),
        ({}, "/nowhere", "check sources.s.url"),
        ({"html": 1.0}, "", "an HTML page instead of JSON"),
        ({"429": 1.0}, "", "lower sources.s.rate"),
        ({"500": 1.0}, "", "check sources.s.url and that the server is up"),
        ({"torn": 1.0}, "", "not JSON"),
    ],
)
@pytest.mark.parametrize("vendor", BUILT_IN)
async def test_check_says_in_one_line_what_is_wrong_with_a_source(
    vendor: str, faults: dict[str, float], path: str, says: str, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        _, _, url = await simulated(stack, vendor, faults=faults)
        config = settings(tmp_path, {"s": (vendor, url + path)})
        code, out, _ = await output("check", "-c", str(config))
        assert code == 1
        [line] = out.splitlines()
        assert line.startswith("FAIL sources.s: ")
        assert says in line


async def test_check_says_that_nobody_listens(tmp_path: Path) -> None:
    port = free_port()
    config = settings(
        tmp_path,
        {"s": ("scale", f"http://127.0.0.1:{port}")},
        redis=f"redis://127.0.0.1:{port}",
        mqtt=f"mqtt://127.0.0.1:{port}",
    )
    code, out, _ = await output("check", "-c", str(config))
    assert code == 1
    source, redis, mqtt = out.splitlines()
    assert source.startswith("FAIL sources.s: ")
    assert "refused" in source
    assert redis.startswith("FAIL redis: ")
    assert "nothing listens there" in redis
    assert mqtt.startswith("FAIL mqtt: ")
    assert "nothing listens there" in mqtt


async def test_check_names_an_expired_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = authority.issue_cert("127.0.0.1", not_after=past)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    runner = web.AppRunner(web.Application())
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        trust = f'verify_tls = "{bundle}"'
        config = settings(tmp_path, {"s": ("kylin", url)}, defaults=trust)
        code, out, _ = await output("check", "-c", str(config))
    finally:
        await runner.cleanup()
    assert code == 1
    [line] = out.splitlines()
    assert "expired" in line


async def test_settings_that_come_with_poller_are_fine_as_they_stand() -> None:
    code, out, err = await output("check", "--offline", "-c", str(ROOT / "settings.toml"))
    assert (code, err) == (0, "")
    assert "5 sources" in out


async def test_what_the_output_has_no_characters_for_is_escaped(tmp_path: Path) -> None:
    config = settings(tmp_path, {"s": ("scale", "http://127.0.0.1:1")})
    config = config.rename(tmp_path / "[red]😀.toml")
    env = {"PYTHONIOENCODING": "ascii"}
    code, out, err = await output("check", "--offline", "-c", str(config), env=env)
    assert (code, err) == (0, "")
    assert out == f"{tmp_path}/[red]\\U0001f600.toml: fine (1 sources)\n"


async def test_bad_settings_name_every_problem_and_exit_2(tmp_path: Path) -> None:
    config = tmp_path / "bad.toml"
    config.write_text('[poller]\ndrain = "soon"\n[sources.a]\nvendor = "hal"\nurl = "x"\n')
    for arguments in (["run"], ["check"], ["tail"], ["runs"]):
        code, out, err = await output(*arguments, "-c", str(config))
        assert (code, out) == (2, "")
        assert [line.partition(":")[0] for line in err.splitlines()] == [
            "poller.drain",
            "sources.a.url",
            "sources.a.vendor",
        ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "hal"], "none of cdm, dataarts, datameer, kylin, scale"),
        (["tail", "--since", "yesterday"], "--since"),
        (["replay", "--sink", "redis"], "give --since T"),
        (["replay", "--sink", "mqtt", "--from-seq", "3"], "--source"),
        (["replay", "--sink", "redis", "--since", "1h"], "--yes"),
        (["replay", "--sink", "carrier-pigeon"], "carrier-pigeon"),
        (["nonsense"], "nonsense"),
        (["schema", "nonsense"], "nonsense"),
    ],
)
async def test_wrong_usage_exits_2_and_says_what_to_do(arguments: list[str], says: str) -> None:
    config = (
        []
        if arguments[0] in ("simulate", "nonsense", "schema")
        else ["-c", str(ROOT / "settings.toml")]
    )
    code, out, err = await output(*arguments, *config)
    assert (code, out) == (2, "")
    assert says in err


async def test_faults_of_a_simulator_are_checked() -> None:
    code, _, err = await output("simulate", "scale", "--faults", "flood=0.5")
    assert code == 1
    assert "'flood=0.5' is not NAME=PROBABILITY" in err


async def test_schemas_are_printed_and_fit() -> None:
    for name in ("event", "settings"):
        code, out, _ = await output("schema", name)
        assert code == 0
        jsonschema.Draft202012Validator.check_schema(json.loads(out))


async def test_a_simulator_serves_until_it_is_told_to_stop() -> None:
    process = await command("simulate", "kylin", "--seed", "3")
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().strip()
    answer = await asyncio.to_thread(
        urllib.request.urlopen, f"{url}/api/jobs?time_filter=4&page_offset=0&page_size=10"
    )
    with answer:
        assert json.load(answer)["code"] == "000"
    process.send_signal(signal.SIGINT)
    await process.communicate()
    assert process.returncode == 0


async def test_tail_runs_and_replay(
    tmp_path: Path, redis_broker: Broker, mqtt_broker: Broker
) -> None:
    async with AsyncExitStack() as stack:
        redis, mqtt = f"{redis_broker.url}/0", mqtt_broker.url
        urls = {n: (n, (await simulated(stack, n, pace=0.2))[2]) for n in ("scale", "dataarts")}
        config = settings(tmp_path, urls, redis=redis, mqtt=mqtt)
        with_config = ["-c", str(config)]
        daemon = await stack.enter_async_context(running(config))
        await daemon.said("poller.started")
        began_ms = now_ms()

        async def enough() -> bool:
            return all([len(await stream(redis, name)) > 10 for name in urls])

        await until(enough, "events in Redis", 40)
        following = await command("tail", *with_config, "--since", "1h")
        assert following.stdout is not None
        first = json.loads(await following.stdout.readline())
        assert first["specversion"] == "1.0"
        following.send_signal(signal.SIGINT)
        await following.communicate()
        assert following.returncode == 0
        assert await daemon.end() == 0

        events = {name: await stream(redis, name) for name in urls}
        everything = [event for one in events.values() for event in one]
        code, out, _ = await output("tail", *with_config, "--no-follow", "--since", "1h")
        told = [json.loads(line) for line in out.splitlines()]
        assert code == 0
        assert sorted(e["id"] for e in told) == sorted(e["id"] for e in everything)
        _, out, _ = await output("tail", *with_config, "--no-follow", "-n", "3")
        assert len(out.splitlines()) == 3
        picky = ["--source", "scale", "--type", "running", "--since", "1h", "--no-follow"]
        _, out, _ = await output("tail", *with_config, *picky)
        running_ids = [e["id"] for e in events["scale"] if e["data"].get("state") == "running"]
        assert [json.loads(line)["id"] for line in out.splitlines()] == running_ids

        code, out, _ = await output("runs", *with_config, "--all")
        known = [json.loads(line) for line in out.splitlines()]
        newest = {
            (e["data"]["source"], e["data"]["job"]["id"], e["data"]["run"]["id"]): e["data"][
                "state"
            ]
            for e in everything
            if "run" in e["data"]
        }
        states = {(r["source"], r["job"]["id"], r["run"]["id"]): r["state"] for r in known}
        assert newest.items() <= states.items()
        _, out, _ = await output("runs", *with_config, "--state", "succeeded")
        assert {json.loads(line)["state"] for line in out.splitlines()} <= {"succeeded"}

        copies = ["--sink", "redis", "--source", "scale", "--from-seq", "3", "--yes"]
        code, _, err = await output("replay", *with_config, *copies)
        assert (code, err.strip()) == (0, f"{len(events['scale']) - 2} events sent to redis")
        assert await stream(redis, "scale") == [*events["scale"], *events["scale"][2:]]

        received = await stack.enter_async_context(subscribed(mqtt, "jobs/scale/+/events/+"))
        since = (began_ms - 1000) / 1000
        text = datetime.datetime.fromtimestamp(since, datetime.UTC).isoformat()
        again = ["--sink", "mqtt", "--source", "scale", "--since", text]
        code, _, err = await output("replay", *with_config, *again)
        assert code == 0, err
        jobs = [e for e in events["scale"] if "run" in e["data"]]
        await until(lambda: len(received) >= len(jobs), "events over MQTT again")
        assert [event for _, event in received] == jobs


async def test_without_a_journal_runs_says_what_to_do(tmp_path: Path) -> None:
    config = settings(tmp_path, {"s": ("scale", "http://127.0.0.1:1")})
    code, _, err = await output("runs", "-c", str(config))
    assert code == 1
    assert "has the daemon run with these settings?" in err


async def test_a_second_daemon_on_the_same_journal_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, {"s": ("scale", "http://127.0.0.1:1")})
    async with running(config) as daemon:
        await daemon.said("poller.started")
        code, _, err = await output("run", "-c", str(config))
        assert code == 1
        assert "another daemon is using this journal" in err


async def test_help_teaches_every_command() -> None:
    code, out, _ = await output("--help")
    assert code == 0
    for name in ("run", "demo", "check", "tail", "runs", "replay", "simulate", "schema"):
        assert f" {name} " in out
        code, text, _ = await output(name, "--help")
        assert (code, "Usage" in text) == (0, True)
