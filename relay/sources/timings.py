"""Timings of data sources, and their delays after failures; pure, without a clock of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from relay.backoff import REFUSED_KEY, Backoff


@dataclass(frozen=True, slots=True)
class SourceTimings:
    """Delays and timeouts of a source, in seconds (streams 2.4, 2.5)."""

    retry: Backoff = Backoff(first=1.0, longest=30.0, growth=1.25)
    """Delays after failures. ld-relay doubles its delays, so it may sleep for as long again as an
    outage lasted. A smaller factor lets Relay recover within 4 s of an outage of 10 s, at the cost
    of 14 attempts in the first minute instead of 6."""
    half_life: float = 10.0
    """Duration of a healthy connection that halves the memory of earlier lost connections."""
    refused: Backoff = REFUSED_KEY
    """Delays while upstream refuses the key."""
    read_timeout: float = 300.0
    """Silence after which a stream counts as dead; upstream sends a comment every three minutes."""
    confirm_every: float = 10.0
    """Minimum time between two `UpToDate` of a quiet source."""
    first_event: float = 30.0
    """Time within which a stream of FDv2 says something. Proxies that keep back what they pass on
    are noticed by it."""
    polls_after: float = 60.0
    """Time for which a stream of FDv2 may fail until polls take its place, as in SDKs (fdv2
    13.4.3). It is tried again before each of them."""
    poll_interval: float = 30.0
    poll_timeout: float = 60.0
    """Timeout for a complete poll."""
    file_interval: float = 1.0
    """Time between two checks of a file: short, since checks are cheap and people wait for them."""


class SourceBackoff:
    """Computes retry delays from past successes and failures. Times are seconds of one clock.

    Delays grow with each failure and are reset once upstream has delivered. Connections that were
    lost soon after delivery are remembered, and forgotten while a connection lasts: after a rare
    outage the first retry is quick, but an upstream that closes every connection is contacted less
    and less often.
    """

    def __init__(self, timings: SourceTimings) -> None:
        self._timings = timings
        self._retry = timings.retry
        self._step = 0.0
        """Number of failures that the next delay counts."""
        self._remembered = 0.0
        """Remembered number of lost connections: the step to start from after the next one."""
        self._refusals = 0
        self._healthy_since: float | None = None
        """Time of the first delivery of this connection; None since the last failure."""

    def __repr__(self) -> str:
        return f"<SourceBackoff step={self._step:g} refusals={self._refusals}>"

    def succeeded(self, now: float) -> None:
        """Record a delivery of all data; only the first one of a connection counts."""
        self._refusals = 0
        if self._healthy_since is None:
            self._healthy_since = now

    def failed(self, now: float, chance: float, *, refused: bool = False) -> float:
        """Record a failure; return the seconds until the next attempt.

        Args:
            now: time of the failure.
            chance: random number in [0, 1) for the jitter.
            refused: True if upstream refused the key.
        """
        if self._healthy_since is not None:
            self._forget_failures(now - self._healthy_since)
        if refused:
            self._refusals += 1
            return self._timings.refused.delay(self._refusals - 1, chance)
        delay = self._retry.delay(self._step, chance)
        self._step = min(self._step + 1, self._max_step)
        return delay

    def set_first_delay(self, milliseconds: int | None) -> None:
        """Set the first delay to a stream's `retry:` value, within the configured bounds."""
        if milliseconds is None:
            return
        configured = self._timings.retry
        first = min(max(milliseconds / 1000, configured.first), configured.longest)
        if first != self._retry.first:
            self._retry = replace(configured, first=first)
            self._step, self._remembered = 0.0, 0.0

    def _forget_failures(self, duration: float) -> None:
        """Reset the step, but keep a part of it if connections are lost soon and often."""
        self._healthy_since = None
        self._step = self._remembered * 0.5 ** (max(duration, 0.0) / self._timings.half_life)
        # Bounded by the step of the longest delay, so that it is forgotten in bounded time.
        self._remembered = min(self._step + 1, self._max_step)

    @property
    def _max_step(self) -> int:
        """First step with the longest delay."""
        ratio = max(self._retry.longest / self._retry.first, 1.0)
        return math.ceil(math.log(ratio, self._retry.growth))
