"""Which changes of the settings wait for a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from poller.settings import Settings, restart_needed
from tests import certificates

REDIS = {"redis": {"url": "redis://127.0.0.1", "password": None}}


def settings(tables: dict[str, Any]) -> Settings:
    return Settings.model_validate({"poller": {"instance": "i"}, "sources": {}} | tables)


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ({}, {}, []),
        (REDIS, REDIS, []),
        ({}, {"poller": {"instance": "i", "drain": 20}}, ["poller.drain"]),
        (
            {},
            {"poller": {"instance": "j", "retention": 5}},
            ["poller.instance", "poller.retention"],
        ),
        ({}, REDIS, ["redis"]),
        (REDIS, {}, ["redis"]),
        (
            REDIS,
            {"redis": {"url": "redis://10.0.0.1", "max_events": 7}},
            ["redis.url", "redis.max_events"],
        ),
        ({}, {"http": {"listen": ""}, "mqtt": {"url": "mqtt://h"}}, ["mqtt", "http.listen"]),
    ],
    ids=range(8),
)
def test_keys_outside_of_sources_are_named(
    old: dict[str, Any], new: dict[str, Any], keys: list[str]
) -> None:
    assert restart_needed(settings(old), settings(new)) == keys


def test_a_certificate_that_was_renewed_in_its_file_is_a_change_of_its_table(
    tmp_path: Path,
) -> None:
    def redis() -> dict[str, Any]:
        cert = certificates.client(trustme.CA(), tmp_path, together=True).cert
        return {"redis": {"url": "rediss://127.0.0.1", "client_cert": cert}}

    old, new = settings(redis()), settings(redis())
    assert restart_needed(old, new) == ["redis"]
    assert restart_needed(new, new) == []


def test_sources_need_no_restart() -> None:
    source = {"name": "s", "vendor": "scale", "url": "http://127.0.0.1"}
    assert restart_needed(settings({}), settings({"sources": {"s": source}})) == []
