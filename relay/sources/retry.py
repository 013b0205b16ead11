"""When to try again: a decision without a clock, a loop or chance of its own."""

from __future__ import annotations

from dataclasses import dataclass

JITTER = 0.5
"""The greatest share of a delay that is taken off, so that those who wait do not return all at
once."""


@dataclass(frozen=True, slots=True)
class Times:
    """All waiting times of a source, in seconds (streams 2.4, 2.5)."""

    first_delay: float = 1.0
    longest_delay: float = 30.0
    good: float = 60.0
    """A connection that lasted this long makes the next failure a first one."""
    refused_delay: float = 300.0
    """After a refusal: a mended key is noticed, and upstream is not asked in vain all day."""
    longest_refused_delay: float = 3600.0
    read_timeout: float = 300.0
    """Silence after which a stream is dead; upstream sends a comment every three minutes."""
    confirm_every: float = 10.0
    """The least time between two `Current` of a quiet source."""
    poll_interval: float = 30.0
    poll_timeout: float = 60.0
    """For one whole poll."""
    file_interval: float = 1.0
    """Between two looks at a file; looking costs microseconds, and people wait for it."""


class Schedule:
    """Decides the next delay from what happened so far. Times are seconds of one clock."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._base = times.first_delay
        self._failures = 0
        self._refusals = 0
        self._good_since: float | None = None

    def succeeded(self, now: float) -> None:
        """Note that upstream delivered what was asked for; the first time of a row counts."""
        self._refusals = 0
        if self._good_since is None:
            self._good_since = now

    def failed(self, now: float, chance: float, *, refused: bool = False) -> float:
        """Return the seconds to wait after a failure.

        Args:
            now: the time of the failure.
            chance: a random number in [0, 1).
            refused: upstream refused the key.
        """
        if self._good_since is not None and now - self._good_since >= self._times.good:
            self._failures = 0
        self._good_since = None
        delay = self._after_refusal() if refused else self._after_failure()
        return delay * (1 - JITTER * chance)

    def asked_for(self, milliseconds: int | None) -> None:
        """Take a stream's `retry:` as the first delay, within our own bounds."""
        if milliseconds is None:
            return
        base = min(max(milliseconds / 1000, self._times.first_delay), self._times.longest_delay)
        if base != self._base:
            self._base, self._failures = base, 0

    def _after_failure(self) -> float:
        delay = _doubled(self._base, self._failures, self._times.longest_delay)
        self._failures += 1
        return delay

    def _after_refusal(self) -> float:
        times = self._times
        delay = _doubled(times.refused_delay, self._refusals, times.longest_refused_delay)
        self._refusals += 1
        return delay


def _doubled(base: float, times: int, longest: float) -> float:
    """Doubling 64 times is beyond any bound, and floats have one, too."""
    return float(min(longest, base * 2 ** min(times, 64)))
