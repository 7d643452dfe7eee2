"""Whether loops go on, in simulated time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable

import pytest
from structlog.testing import capture_logs

from poller.liveness import SILENT_S, Liveness, Pulse
from poller.telemetry import Metrics

pytestmark = pytest.mark.looptime


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def live(metrics: Metrics) -> Liveness:
    return Liveness(metrics)


async def for_ever() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    """Returns."""


async def leaking() -> None:
    """As a library does that lets out a cancel of its own."""
    raise asyncio.CancelledError


@pytest.mark.parametrize("loop", [at_once, leaking])
async def test_a_loop_that_nobody_has_ended_fails_by_its_name(
    live: Liveness, loop: Callable[[], Awaitable[None]]
) -> None:
    with capture_logs() as logs, pytest.raises(RuntimeError) as failure:
        await live.run("relay[redis]", loop, Pulse())
    assert str(failure.value) == "relay[redis] has ended, and nobody asked for it"
    assert [(log["event"], log["loop"]) for log in logs] == [("loop.ended", "relay[redis]")]


async def test_a_loop_that_is_cancelled_ends_quietly(live: Liveness) -> None:
    task = asyncio.create_task(live.run("a", for_ever, Pulse()))
    await asyncio.sleep(0)
    with capture_logs() as logs:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert logs == []


async def test_a_loops_own_error_is_left_as_it_is(live: Liveness) -> None:
    async def fails() -> None:
        raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        await live.run("a", fails, Pulse())


async def test_what_is_overdue_is_stuck_after_a_while_and_not_before(live: Liveness) -> None:
    pulse = Pulse()
    live.add("a", pulse)
    live.add("b", Pulse())
    assert pulse.due_s == math.inf
    pulse.expect(10)
    await asyncio.sleep(10 + SILENT_S)
    assert live.overdue() == {}
    assert live.look()
    await asyncio.sleep(0.5)
    assert live.overdue() == {"a": pytest.approx(SILENT_S + 0.5)}
    assert not live.look()
    pulse.expect(10)
    assert live.overdue() == {}
    assert live.look()


async def test_what_gets_stuck_is_logged_once_and_once_when_it_goes_on(
    live: Liveness, metrics: Metrics
) -> None:
    def stuck() -> float | None:
        return metrics.registry.get_sample_value("poller_stuck_loops")

    one, other = Pulse(), Pulse()
    live.add("one", one)
    live.add("other", other)
    one.expect(0)
    other.expect(10)
    with capture_logs() as logs:
        for _ in range(20):
            live.look()
            await asyncio.sleep(1)
        assert stuck() == 2
        one.expect(1000)
        for _ in range(20):
            live.look()
            await asyncio.sleep(1)
        assert stuck() == 1
        other.expect(1000)
        live.look()
        assert stuck() == 0
    assert [(log["event"], log["loop"], log.get("overdue_s")) for log in logs] == [
        ("loop.stuck", "one", 5),
        ("loop.stuck", "other", 5),
        ("loop.recovered", "one", None),
        ("loop.recovered", "other", None),
    ]


async def test_a_loop_that_has_ended_is_not_stuck(live: Liveness) -> None:
    pulse = Pulse()
    pulse.expect(1)
    task = asyncio.create_task(live.run("a", for_ever, pulse))
    await asyncio.sleep(10)
    assert [*live.overdue()] == ["a"]
    task.cancel()
    await asyncio.wait([task])
    assert live.overdue() == {}
