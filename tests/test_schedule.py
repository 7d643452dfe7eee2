"""When to ask: pure, with every draw of chance at its bounds."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poller.errors import Invalid, Limited, Rejected, Unreachable, VendorError
from poller.schedule import BACKOFF_CAP_S, REFUSED_CAP_S, Bucket, Pace, delays_s

PACE = Pace(interval_s=10, idle_interval_s=60, retry_refused_s=300)


class Least(Random):
    def uniform(self, a: float, b: float) -> float:
        return min(a, b)


class Most(Random):
    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


LEAST, MOST = Least(), Most()


@pytest.mark.parametrize(
    ("active", "random", "expected_s"),
    [(True, LEAST, 9), (True, MOST, 11), (False, LEAST, 54), (False, MOST, 66)],
)
def test_good_polls_are_an_interval_apart_within_ten_per_cent(
    active: bool, random: Random, expected_s: float
) -> None:
    assert PACE.after_good(active=active, random=random) == pytest.approx(expected_s)


def test_an_idle_interval_shorter_than_the_interval_makes_nothing_faster() -> None:
    pace = Pace(interval_s=10, idle_interval_s=1, retry_refused_s=300)
    assert pace.after_good(active=False, random=LEAST) == pytest.approx(9)


@pytest.mark.parametrize("error", [Unreachable("x"), Invalid("x"), Limited("x")])
@pytest.mark.parametrize(
    ("failures", "least_s", "most_s"),
    [(1, 10, 20), (2, 10, 40), (3, 10, 70), (4, 10, 70), (1000, 10, 70)],
)
def test_backoff_doubles_from_the_interval_up_to_a_cap_with_full_jitter_over_what_grows(
    error: VendorError, failures: int, least_s: float, most_s: float
) -> None:
    assert PACE.after_failed(error, failures, LEAST) == least_s
    assert PACE.after_failed(error, failures, MOST) == most_s
    assert most_s <= PACE.interval_s + BACKOFF_CAP_S


@pytest.mark.parametrize(
    ("refusals", "expected_s"), [(1, 300), (2, 600), (3, 1200), (4, 2400), (5, 3600), (99, 3600)]
)
def test_refused_credentials_are_tried_again_ever_later_up_to_an_hour(
    refusals: int, expected_s: float
) -> None:
    error = Rejected("x")
    assert PACE.after_failed(error, refusals, LEAST) == expected_s
    assert PACE.after_failed(error, refusals, MOST) == pytest.approx(expected_s * 1.1)
    assert expected_s <= REFUSED_CAP_S


@pytest.mark.parametrize(("asked_s", "expected_s"), [(0.0, 10), (9.0, 10), (120.0, 120)])
def test_retry_after_is_never_undercut_and_shortens_nothing(
    asked_s: float, expected_s: float
) -> None:
    assert PACE.after_failed(Limited("x", asked_s), 1, LEAST) == expected_s


@given(st.integers(1, 10_000), st.integers(), st.floats(0, 1e6))
def test_no_failed_poll_is_followed_by_one_sooner_than_the_interval_or_than_asked(
    failures: int, seed: int, asked_s: float
) -> None:
    random = Random(seed)
    for error in (Unreachable("x"), Invalid("x"), Rejected("x")):
        assert PACE.after_failed(error, failures, random) >= PACE.interval_s
    assert PACE.after_failed(Limited("x", asked_s), failures, random) >= max(10, asked_s)


def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    bucket = Bucket(rate_per_s=2, burst=3)
    assert [bucket.take(100) for _ in range(6)] == [0, 0, 0, 0.5, 1, 1.5]


def test_a_bucket_fills_while_nobody_takes_up_to_its_burst() -> None:
    bucket = Bucket(rate_per_s=2, burst=2)
    assert [bucket.take(0) for _ in range(2)] == [0, 0]
    assert [bucket.take(0.5) for _ in range(2)] == [0, 0.5]
    assert [bucket.take(1000) for _ in range(3)] == [0, 0, 0.5]


def test_a_bucket_gives_nothing_for_time_that_runs_backwards() -> None:
    bucket = Bucket(rate_per_s=2, burst=1)
    assert bucket.take(100) == 0
    assert bucket.take(50) == 0.5
    assert bucket.take(50.5) == 0.5


@given(
    st.floats(0.1, 100),
    st.integers(1, 10),
    st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
def test_a_bucket_never_gives_more_than_its_burst_and_its_rate(
    rate_per_s: float, burst: int, pauses_s: list[float]
) -> None:
    bucket = Bucket(rate_per_s=rate_per_s, burst=burst)
    now_s, sent_s = 0.0, []
    for pause_s in pauses_s:
        now_s += pause_s
        sent_s.append(now_s + bucket.take(now_s))
    for first, from_s in enumerate(sent_s):
        for last in range(first, len(sent_s)):
            allowed = burst + rate_per_s * (sent_s[last] - from_s)
            assert last - first + 1 <= allowed + 1e-6


@pytest.mark.parametrize(
    ("spread", "expected_s"),
    [
        ([], []),
        ([False, False], [0, 0]),
        ([True], [0]),
        ([True, True, True, True], [0, 2.5, 5, 7.5]),
        ([True, False, True], [0, 0, 5]),
    ],
)
def test_questions_to_be_spread_fill_the_interval_evenly_and_the_others_do_not_wait(
    spread: list[bool], expected_s: list[float]
) -> None:
    assert delays_s(spread, 10) == expected_s


def test_the_budget_used_fades_within_minutes() -> None:
    bucket = Bucket(rate_per_s=2, burst=3)
    assert bucket.used(0) == 0
    for _ in range(12):
        bucket.take(100)
    assert bucket.used(100) == pytest.approx(0.1)
    assert bucket.used(160) == pytest.approx(0.1 / math.e)
    assert bucket.used(1000) < 0.001
    assert bucket.used(50) == pytest.approx(0.1)  # a clock that is behind takes nothing away


def test_a_source_asked_as_often_as_it_may_be_uses_all_of_its_budget() -> None:
    bucket = Bucket(rate_per_s=2, burst=3)
    for half_seconds in range(2000):
        bucket.take(half_seconds / 2)
    assert bucket.used(999.5) == pytest.approx(1, rel=0.02)
