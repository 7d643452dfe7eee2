"""Logs for people or machines, and the metrics of the contract."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import orjson
import pytest
import structlog
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from poller import __version__
from poller.telemetry import Metrics, configure_logs

FAMILIES = {
    "polls": ("counter", {"source"}),
    "poll_failures": ("counter", {"source", "reason"}),
    "poll_duration_seconds": ("histogram", {"source"}),
    "requests": ("counter", {"source", "code"}),
    "source_up": ("gauge", {"source"}),
    "source_last_success_timestamp_seconds": ("gauge", {"source"}),
    "runs": ("gauge", {"source", "state"}),
    "events": ("counter", {"source", "type"}),
    "detection_bound_seconds": ("histogram", {"source"}),
    "invalid_records": ("counter", {"source"}),
    "relay_lag_events": ("gauge", {"sink", "source"}),
    "relay_lag_seconds": ("gauge", {"sink", "source"}),
    "relay_failures": ("counter", {"sink"}),
    "relay_expired_events": ("counter", {"sink", "source"}),
    "loop_lag_seconds": ("histogram", set()),
    "stuck_loops": ("gauge", set()),
    "build_info": ("gauge", {"version"}),
}


class Terminal(io.StringIO):
    """A stream that people read."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers
    structlog.reset_defaults()


def used() -> Metrics:
    """Metrics in which every one has been counted for two sources and a sink."""
    metrics = Metrics()
    for source in ("a", "b"):
        metrics.polls.labels(source).inc()
        metrics.poll_failures.labels(source, "invalid").inc()
        metrics.poll_duration.labels(source).observe(0.1)
        metrics.requests.labels(source, "200").inc()
        metrics.source_up.labels(source).set(1)
        metrics.last_success.labels(source).set(1_714_377_600)
        metrics.runs.labels(source, "running").set(2)
        metrics.events.labels(source, "dev.poller.job.failed").inc()
        metrics.detection_bound.labels(source).observe(15)
        metrics.invalid_records.labels(source).inc()
        metrics.relay_lag_events.labels("redis", source).set(3)
        metrics.relay_lag_seconds.labels("redis", source).set(0.5)
        metrics.relay_expired.labels("redis", source).inc()
    metrics.relay_failures.labels("redis").inc()
    metrics.loop_lag.observe(0.002)
    return metrics


def series(metrics: Metrics) -> list[str]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


# Logs


def test_a_log_line_is_one_json_object_where_nobody_watches() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    structlog.get_logger().info("poll.failed", source="kylin-prod", note="zwei\nZeilen")
    [line] = stream.getvalue().splitlines()
    entry = orjson.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", entry.pop("timestamp"))
    assert entry == {
        "event": "poll.failed",
        "level": "info",
        "source": "kylin-prod",
        "note": "zwei\nZeilen",
    }


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({1, 2}, "{1, 2}"),
        (2**80, str(2**80)),
        ("half a \ud800 pair", "'half a \\ud800 pair'"),
        ({1: "x"}, "{1: 'x'}"),
    ],
    ids=["set", "number", "text", "keys"],
)
def test_a_log_line_is_written_whatever_is_to_be_logged(value: object, told: str) -> None:
    stream = io.StringIO()
    configure_logs(stream)
    structlog.get_logger().warning("row.invalid", why=value)
    assert orjson.loads(stream.getvalue())["why"] == told


def test_an_exception_is_a_key_of_its_line() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    try:
        int("x")
    except ValueError:
        structlog.get_logger().exception("parse.bug")
    entry = orjson.loads(stream.getvalue())
    assert entry["exception"].endswith("ValueError: invalid literal for int() with base 10: 'x'")


def test_a_terminal_gets_no_json() -> None:
    stream = Terminal()
    configure_logs(stream)
    structlog.get_logger().info("poll.failed", source="kylin-prod")
    [line] = stream.getvalue().splitlines()
    plain = re.sub(r"\x1b\[\d*m", "", line)
    assert re.search(r"\[info +\] poll\.failed +source=kylin-prod$", plain)


HOSTILE = "x\n2026-01-01T00:00:00Z [error] forged\r\x1b[2J\x9b1m\x85\u2028\u202e\x7f"
"""What a vendor may say: it ends lines, clears the terminal, and turns the direction of writing."""


def test_nothing_that_a_vendor_says_forges_a_line_or_is_obeyed_by_a_terminal() -> None:
    for stream in (io.StringIO(), Terminal()):
        configure_logs(stream)
        log = structlog.get_logger()
        log.warning("state.unmapped", word=HOSTILE, **{HOSTILE: 1})
        log.warning("state.unmapped", word="\x1b[2J", all=[HOSTILE], by={HOSTILE: HOSTILE})
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("parse.bug")
        text = re.sub(r"\x1b\[\d+m", "", stream.getvalue())  # the renderer's own colours
        lines = text.split("\n")
        assert all(line.isprintable() for line in lines)
        assert not [line for line in lines if line.startswith("2026-01-01")]
        if not stream.isatty():
            first, second, third = map(orjson.loads, text.splitlines())
            assert (first["word"], second["all"]) == (HOSTILE, [HOSTILE])
            assert HOSTILE in third["exception"]


def test_what_a_library_logs_is_a_line_like_any_other() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    configure_logs(stream)
    logging.getLogger("asyncio").error("Future exception\nwas %s retrieved", "never")
    logging.getLogger("asyncio").debug("Using selector")
    entry = orjson.loads(stream.getvalue())
    assert entry.pop("timestamp")
    assert entry == {
        "event": "library.said",
        "level": "error",
        "logger": "asyncio",
        "message": "Future exception\nwas never retrieved",
    }


def test_no_log_shows_what_a_failing_function_held() -> None:
    secret = "Pl4nted-S3cret".upper()
    for stream in (io.StringIO(), Terminal()):
        configure_logs(stream)
        try:
            int(secret[:1])
        except ValueError:
            structlog.get_logger().exception("parse.bug")
        assert "ValueError" in stream.getvalue()
        assert secret not in stream.getvalue()


def test_what_is_below_the_level_is_not_written() -> None:
    stream = io.StringIO()
    configure_logs(stream)
    structlog.get_logger().debug("question.failed")
    assert stream.getvalue() == ""
    configure_logs(stream, logging.DEBUG)
    structlog.get_logger().debug("question.failed")
    assert "question.failed" in stream.getvalue()


# Metrics


def test_the_metrics_are_those_of_the_contract_and_two_more() -> None:
    text = generate_latest(used().registry).decode()
    families = list(text_string_to_metric_families(text))
    assert {
        family.name: (
            family.type,
            {label for sample in family.samples for label in sample.labels if label != "le"},
        )
        for family in families
    } == {f"poller_{name}": told for name, told in FAMILIES.items()}
    names = {sample.name for family in families for sample in family.samples}
    assert names == {
        f"poller_{name}{suffix}"
        for name, (kind, _) in FAMILIES.items()
        for suffix in {
            "counter": ["_total"],
            "histogram": ["_bucket", "_count", "_sum"],
            "gauge": [""],
        }[kind]
    }


def test_the_build_is_named() -> None:
    assert f'poller_build_info{{version="{__version__}"}} 1.0' in series(Metrics())


def test_every_metric_says_what_it_is() -> None:
    families = Metrics().registry.collect()
    assert all(family.documentation for family in families)


def test_two_daemons_in_one_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.polls.labels("a").inc()
    assert not any(line.startswith("poller_polls") for line in series(other))


def test_what_alerts_watch_the_increase_of_begins_at_zero() -> None:
    metrics = Metrics()
    metrics.expect("a", ["redis"])
    metrics.invalid_records.labels("a").inc(3)
    metrics.expect("a", ["redis"])  # started anew, by a reload
    assert [line for line in series(metrics) if 'source="a"' in line] == [
        'poller_polls_total{source="a"} 0.0',
        'poller_poll_failures_total{reason="unreachable",source="a"} 0.0',
        'poller_poll_failures_total{reason="rejected",source="a"} 0.0',
        'poller_poll_failures_total{reason="invalid",source="a"} 0.0',
        'poller_poll_failures_total{reason="limited",source="a"} 0.0',
        'poller_invalid_records_total{source="a"} 3.0',
        'poller_relay_expired_events_total{sink="redis",source="a"} 0.0',
    ]


def test_a_forgotten_source_is_in_no_metric_and_the_others_stay() -> None:
    metrics = used()
    before = series(metrics)
    metrics.forget("a")
    assert series(metrics) == [line for line in before if 'source="a"' not in line]
    assert any('source="b"' in line for line in before)
    metrics.forget("never known")


def test_a_forgotten_source_may_come_back() -> None:
    metrics = used()
    metrics.forget("a")
    metrics.polls.labels("a").inc()
    assert 'poller_polls_total{source="a"} 1.0' in series(metrics)
