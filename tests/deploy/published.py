"""What CONTRACT promises of `/metrics`: each family's type and labels."""

from __future__ import annotations

from collections.abc import Mapping

FAMILIES: Mapping[str, tuple[str, frozenset[str]]] = {
    f"poller_{name}": (kind, frozenset(labels.split()))
    for name, kind, labels in (
        ("polls_total", "counter", "source"),
        ("poll_failures_total", "counter", "source reason"),
        ("poll_duration_seconds", "histogram", "source"),
        ("requests_total", "counter", "source code"),
        ("source_up", "gauge", "source"),
        ("source_last_success_timestamp_seconds", "gauge", "source"),
        ("runs", "gauge", "source state"),
        ("events_total", "counter", "source type"),
        ("detection_bound_seconds", "histogram", "source"),
        ("invalid_records_total", "counter", "source"),
        ("relay_lag_events", "gauge", "sink source"),
        ("relay_lag_seconds", "gauge", "sink source"),
        ("relay_failures_total", "counter", "sink"),
        ("relay_expired_events_total", "counter", "sink source"),
        ("loop_lag_seconds", "histogram", ""),
        ("stuck_loops", "gauge", ""),
        ("build_info", "gauge", "version"),
    )
}

SERIES = {
    f"{name}{suffix}"
    for name, (kind, _) in FAMILIES.items()
    for suffix in (("_bucket", "_count", "_sum") if kind == "histogram" else ("",))
}
"""Every name that PromQL may ask for."""
