"""How it stands with a source, put together from what its loop and its ledger remember."""

from __future__ import annotations

from statistics import median
from typing import Literal

from poller.events import rfc3339
from poller.known import Condition
from poller.ledger import Ledger
from poller.poll import Watch
from poller.runs import State
from poller.settings import Source
from poller.web.answers import Latency, SourceStatus, instant


def source_status(source: Source, ledger: Ledger | None, watch: Watch | None) -> SourceStatus:
    """The status of a source; without a ledger and a watch it is only about to be polled."""
    condition = ledger.condition if ledger else None
    word = _word(condition)
    return SourceStatus(
        source=source.name,
        vendor=source.vendor,
        condition=word,
        since=rfc3339(condition.since_ms) if condition and condition.since_ms else None,
        reason=condition.reason if condition else None,
        message=condition.message if condition else None,
        failures=condition.failures if condition else 0,
        contacted=condition.contact_done if condition else False,
        polling=watch is not None and watch.began_ms is not None and watch.next_ms is None,
        last_poll=instant(watch.began_ms) if watch else None,
        last_good=instant(condition.last_good_ms) if condition else None,
        next_poll=instant(watch.next_ms) if watch else None,
        latency=_latency(watch),
        interval_s=source.interval_s,
        idle_interval_s=source.idle_interval_s,
        rate_per_s=source.rate_per_s,
        budget_used=round(watch.budget_used, 4) if watch else 0.0,
        runs=dict(ledger.states) if ledger else dict.fromkeys(State, 0),
    )


def _word(condition: Condition | None) -> Literal["new", "up", "failing", "down"]:
    if condition is None:
        return "new"
    if condition.up is False:
        return "down"
    if condition.failures:
        return "failing"
    return "up" if condition.up else "new"


def _latency(watch: Watch | None) -> Latency | None:
    took_s = list(watch.took_s) if watch else []
    if not took_s:
        return None
    last_s, median_s, longest_s = (round(s, 3) for s in (took_s[-1], median(took_s), max(took_s)))
    return Latency(last_s=last_s, median_s=median_s, longest_s=longest_s, polls=len(took_s))
