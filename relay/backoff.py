"""When to try again: a decision without a clock, a loop or chance of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

JITTER = 0.5
"""The greatest share of a delay that is taken off, so that those who wait do not return all at
once."""

REFUSED_DELAY = 5.0
"""Seconds after which a refused key is tried again, for the first time. Services have refused keys
by mistake for minutes, and people mend keys: nobody should wait for long afterwards."""

LONGEST_REFUSED_DELAY = 300.0
"""Seconds up to which that delay doubles: upstream is not asked in vain all day."""


@dataclass(frozen=True, slots=True)
class SourceTimings:
    """All waiting times of a source, in seconds (streams 2.4, 2.5)."""

    first_delay: float = 1.0
    longest_delay: float = 30.0
    growth: float = 1.25
    """From one delay to the next. The reference doubles them and so sleeps for as long again as
    upstream has been away; a third of that lets the relay catch up within 4 s of an outage of 10 s,
    for 14 attempts in the first minute instead of 6."""
    half_life: float = 10.0
    """Of the memory of connections that ended: when one stays for as long, half is forgotten."""
    refused_delay: float = REFUSED_DELAY
    longest_refused_delay: float = LONGEST_REFUSED_DELAY
    read_timeout: float = 300.0
    """Silence after which a stream is dead; upstream sends a comment every three minutes."""
    confirm_every: float = 10.0
    """The least time between two `Current` of a quiet source."""
    poll_interval: float = 30.0
    poll_timeout: float = 60.0
    """For one whole poll."""
    file_interval: float = 1.0
    """Between two looks at a file; looking costs microseconds, and people wait for it."""


class Backoff:
    """Decides the next delay from what happened so far. Times are seconds of one clock.

    Delays grow from failure to failure, and begin anew once upstream has delivered. How often it
    has delivered and was lost at once stays in memory, and fades while a connection lasts: an
    upstream that breaks down now and then is back at once, one that closes whatever is opened is
    asked ever less often.
    """

    def __init__(self, times: SourceTimings) -> None:
        self._times = times
        self._base = times.first_delay
        self._step = 0.0
        """By how many growths the next delay is longer than the first one."""
        self._lost = 0.0
        """Deliveries that ended, as far as they are remembered: the step at which to begin."""
        self._refusals = 0
        self._good_since: float | None = None
        """When upstream delivered; None since a failure."""

    def succeeded(self, now: float) -> None:
        """Note that upstream delivered all that was asked for; the first time of a row counts."""
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
        if self._good_since is not None:
            self._begin_anew(now - self._good_since)
        delay = self._after_refusal() if refused else self._after_failure()
        return delay * (1 - JITTER * chance)

    def asked_for(self, milliseconds: int | None) -> None:
        """Take a stream's `retry:` as the first delay, within our own bounds."""
        if milliseconds is None:
            return
        base = min(max(milliseconds / 1000, self._times.first_delay), self._times.longest_delay)
        if base != self._base:
            self._base, self._step, self._lost = base, 0.0, 0.0

    def _begin_anew(self, lasted: float) -> None:
        """Begin with the first delay, or further on if upstream was lost soon and often."""
        self._good_since = None
        self._step = self._lost * 0.5 ** (max(lasted, 0.0) / self._times.half_life)
        # No more than what leads to the longest delay, so that it fades in bounded time.
        self._lost = min(self._step + 1, self._last_step)

    @property
    def _last_step(self) -> int:
        """The step from which on delays are the longest."""
        ratio = max(self._times.longest_delay / self._base, 1.0)
        return math.ceil(math.log(ratio, self._times.growth))

    def _after_failure(self) -> float:
        delay = self._base * math.pow(self._times.growth, self._step)
        self._step = min(self._step + 1, self._last_step)
        return min(self._times.longest_delay, delay)

    def _after_refusal(self) -> float:
        delay = self._times.refused_delay * 2.0 ** min(self._refusals, 64)  # floats have an end
        self._refusals += 1
        return min(self._times.longest_refused_delay, delay)
