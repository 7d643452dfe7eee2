"""What measured figures mean for an installation: computed, and put into the notes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

SOURCES = 100
JOBS_A_DAY = 1_000_000
EVENTS_A_JOB = 3
"""Queued, running and an end."""
INTERVAL_S = 15
RETENTION_DAYS = 30
_DAY_S = 86_400


def filled(notes: str, facts: Mapping[str, float]) -> str:
    """The notes with every `{name}` replaced by its figure, or by a dash if it was not measured."""
    derived = _derived(defaultdict(lambda: math.nan, facts))
    return notes.format_map(
        defaultdict(lambda: "–", {name: _text(value) for name, value in derived.items()})
    )


def _derived(facts: Mapping[str, float]) -> dict[str, float]:
    """The facts, and a million jobs a day over a hundred sources."""
    requests = SOURCES * _DAY_S / INTERVAL_S
    events = JOBS_A_DAY * EVENTS_A_JOB
    quiet_us, changing_us = facts["poll_us"], facts["changing_us"]
    busy = min(requests, events)
    cpu_s = (requests - busy) * quiet_us / 1e6 + busy * changing_us / 1e6
    cpu_s += events / facts["redis_per_core_s"] + events / facts["mqtt_per_core_s"]
    disk = events * facts["event_bytes"] + JOBS_A_DAY * facts["journal_bytes_per_run"]
    return {
        **facts,
        "polls_per_core_s": 1e6 / quiet_us,
        "changing_per_core_s": 1e6 / changing_us,
        "requests_a_day": requests,
        "events_a_day": events,
        "events_a_poll": events / requests,
        "cpu_hours": cpu_s / 3600,
        "cores": cpu_s / _DAY_S,
        "disk_mb_a_day": disk / 1e6,
        "disk_gb_kept": disk * RETENTION_DAYS / 1e9,
        "memory_gb_kept": JOBS_A_DAY * RETENTION_DAYS * facts["memory_per_run"] / 1e9,
        "redis_gb_a_day": events * facts["event_bytes"] / 1e9,
        "memory_kb_per_source": facts["memory_per_source"] / 1e3,
    }


def _text(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"
