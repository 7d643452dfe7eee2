"""Logs and metrics: structlog and prometheus set-up."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO, get_args

import orjson
import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

from poller import __version__
from poller.errors import Reason
from poller.terminal import plain, plain_json


def configure_logs(stream: TextIO = sys.stderr, level: int = logging.INFO) -> None:
    """Log keys, not sentences: pretty on a terminal, one JSON object a line otherwise.

    What libraries log comes as lines of ours. Whatever vendors say, it forges no line, and a
    terminal obeys none of it.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if stream.isatty():
        shared.append(_plain)
        shared.append(structlog.dev.ConsoleRenderer(exception_formatter=_plain_traceback))
    else:
        shared.append(structlog.processors.format_exc_info)
        shared.append(structlog.processors.JSONRenderer(serializer=_json))
    root = logging.getLogger()
    if not any(isinstance(handler, _Libraries) for handler in root.handlers):
        root.addHandler(_Libraries())
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )


class _Libraries(logging.Handler):
    """What libraries log, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            "library.said",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def _json(entry: Mapping[str, Any], **_: object) -> str:
    """A log entry as JSON; one that JSON cannot hold must not end the daemon."""
    try:
        text = orjson.dumps(entry, default=repr).decode()
    except orjson.JSONEncodeError:
        text = orjson.dumps({key: repr(value) for key, value in entry.items()}).decode()
    return plain_json(text)


def _plain(_logger: object, _level: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log entry whose texts do nothing to a terminal; it shows other values by their repr."""
    return {
        plain(key): plain(value) if isinstance(value, str) else value
        for key, value in entry.items()
    }


def _plain_traceback(stream: TextIO, error: structlog.typing.ExcInfo) -> None:
    """A traceback, indented, so that no line of it looks like a line of the log.

    structlog's default shows local variables, and so secrets.
    """
    text = io.StringIO()
    structlog.dev.plain_traceback(text, error)
    lines = text.getvalue().strip("\n").split("\n")
    stream.write("".join(f"\n    {plain(line)}" for line in lines))


class Metrics:
    """The daemon's metrics, in a registry of their own; labels never hold run or job ids."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client lacks the type
        registry = self.registry = CollectorRegistry()
        by_source = ["source"]
        self.polls = Counter("poller_polls", "Polls begun", by_source, registry=registry)
        self.poll_failures = Counter(
            "poller_poll_failures", "Polls that failed", ["source", "reason"], registry=registry
        )
        self.poll_duration = Histogram(
            "poller_poll_duration_seconds",
            "Duration of a poll",
            by_source,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            registry=registry,
        )
        self.requests = Counter(
            "poller_requests",
            "Requests sent to vendors, by HTTP status, or 'error'",
            ["source", "code"],
            registry=registry,
        )
        self.source_up = Gauge(
            "poller_source_up", "1 if the last poll was good", by_source, registry=registry
        )
        self.last_success = Gauge(
            "poller_source_last_success_timestamp_seconds",
            "When the last good poll began",
            by_source,
            registry=registry,
        )
        self.runs = Gauge(
            "poller_runs", "Known runs by state", ["source", "state"], registry=registry
        )
        self.events = Counter(
            "poller_events", "Events published", ["source", "type"], registry=registry
        )
        self.detection_bound = Histogram(
            "poller_detection_bound_seconds",
            "observed_at - observed_after of events: how late they can be at most",
            by_source,
            buckets=(0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 3600),
            registry=registry,
        )
        self.invalid_records = Counter(
            "poller_invalid_records", "Rows set aside", by_source, registry=registry
        )
        self.relay_lag_events = Gauge(
            "poller_relay_lag_events",
            "Events not delivered yet",
            ["sink", "source"],
            registry=registry,
        )
        self.relay_lag_seconds = Gauge(
            "poller_relay_lag_seconds",
            "Age of the oldest event not delivered yet",
            ["sink", "source"],
            registry=registry,
        )
        self.relay_failures = Counter(
            "poller_relay_failures", "Failed deliveries", ["sink"], registry=registry
        )
        self.loop_lag = Histogram(
            "poller_loop_lag_seconds",
            "How late the event loop wakes",
            buckets=(0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
            registry=registry,
        )
        self.relay_expired = Counter(
            "poller_relay_expired_events",
            "Events never delivered, since they got older than the sink keeps any",
            ["sink", "source"],
            registry=registry,
        )
        self.stuck_loops = Gauge(
            "poller_stuck_loops", "Loops and threads that give no sign of life", registry=registry
        )
        self._of_sources = (
            self.polls,
            self.poll_failures,
            self.poll_duration,
            self.requests,
            self.source_up,
            self.last_success,
            self.runs,
            self.events,
            self.detection_bound,
            self.invalid_records,
            self.relay_lag_events,
            self.relay_lag_seconds,
            self.relay_expired,
        )
        Gauge("poller_build_info", "Version of this daemon", ["version"], registry=registry).labels(
            __version__
        ).set(1)

    def expect(self, source: str, sinks: Iterable[str]) -> None:
        """Show what is counted of a source at 0: an alert sees no increase to a first value."""
        self.polls.labels(source)
        self.invalid_records.labels(source)
        for sink in sinks:
            self.relay_expired.labels(sink, source)
        for reason in get_args(Reason):
            self.poll_failures.labels(source, reason)

    def forget(self, source: str) -> None:
        """Drop what is labelled with a source that is configured no more."""
        for metric in self._of_sources:
            metric.remove_by_labels({"source": source})
