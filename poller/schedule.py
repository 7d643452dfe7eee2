"""When to ask: interval, jitter, backoff, and the budget of requests. Pure: time comes in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from poller.errors import Limited, Rejected, VendorError

JITTER = 0.1
BACKOFF_CAP_S = 60.0
REFUSED_CAP_S = 3600.0
_LATELY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often a source may be polled; all in seconds.

    Attributes:
        interval_s: from the start of one poll to the start of the next.
        idle_interval_s: the same while no run is active.
        retry_refused_s: after refused credentials, doubling up to an hour.
        max_interval_s: by a forecast, where no change is due.
    """

    interval_s: float
    idle_interval_s: float
    retry_refused_s: float
    max_interval_s: float = 60.0

    def after_good(self, *, active: bool, random: Random, due_s: float | None = None) -> float:
        """Seconds from the start of a good poll to the next.

        Args:
            active: whether a run is.
            random: for jitter.
            due_s: what a forecast says, if one is asked.
        """
        if due_s is not None:
            interval_s = min(max(self.interval_s, self.max_interval_s), due_s)
            interval_s = max(self.interval_s, interval_s)
        elif active:
            interval_s = self.interval_s
        else:
            interval_s = max(self.interval_s, self.idle_interval_s)
        return interval_s * random.uniform(1 - JITTER, 1 + JITTER)

    def after_failed(self, error: VendorError, failures: int, random: Random) -> float:
        """Seconds from the end of a failed poll to the next: never less than the vendor asked for.

        Args:
            error: what went wrong.
            failures: failed polls in a row, this one included; for refused credentials, refusals.
            random: for full jitter over the part that grows, so that sources do not march in step.
        """
        doublings = min(failures, 32)
        if isinstance(error, Rejected):
            wait_s = min(REFUSED_CAP_S, self.retry_refused_s * 2.0 ** (doublings - 1))
            return wait_s * random.uniform(1.0, 1 + JITTER)
        growing_s = min(BACKOFF_CAP_S, self.interval_s * (2**doublings - 1))
        wait_s = self.interval_s + random.uniform(0.0, growing_s)
        if isinstance(error, Limited) and error.retry_after_s is not None:
            return max(wait_s, error.retry_after_s)
        return wait_s


@dataclass(slots=True)
class Bucket:
    """A token bucket: `rate_per_s` on average, a burst of `burst` at most."""

    rate_per_s: float
    burst: int
    _tokens: float = field(init=False)
    _at_s: float | None = field(init=False, default=None)
    _taken: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._tokens = float(self.burst)

    def take(self, now_s: float) -> float:
        """Take one token; gives the seconds to wait until it is there."""
        if self._at_s is not None:
            gained = max(0.0, now_s - self._at_s) * self.rate_per_s
            self._tokens = min(float(self.burst), self._tokens + gained)
        self._taken = self._lately(now_s) + 1.0
        self._at_s = now_s
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self.rate_per_s)

    def used(self, now_s: float) -> float:
        """Which share of the rate was used of late: a moving average over about a minute."""
        return self._lately(now_s) / (self.rate_per_s * _LATELY_S)

    def _lately(self, now_s: float) -> float:
        """How many tokens were taken of late, each fading away with time."""
        past_s = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s)
        return self._taken * math.exp(-past_s / _LATELY_S)


def delays_s(spread: Sequence[bool], interval_s: float) -> list[float]:
    """How many seconds each question waits: those to be spread fill the interval evenly."""
    gap_s = interval_s / max(1, sum(spread))
    return [
        gap_s * sum(spread[:place]) if is_spread else 0.0 for place, is_spread in enumerate(spread)
    ]
