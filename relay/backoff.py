"""Delays between attempts that fail; pure, without a clock, event loop or chance of its own."""

from __future__ import annotations

from dataclasses import dataclass

MAX_JITTER = 0.5
"""Maximum share of a delay subtracted at random, so that relays do not retry all at once."""

MAX_EXPONENT = 100
"""Exponent from which on delays stay the same: far beyond any longest delay, and floats do not
overflow."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delays that grow with consecutive failures.

    Args:
        first: seconds after the first failure.
        longest: upper bound in seconds.
        growth: factor from one delay to the next.
    """

    first: float
    longest: float
    growth: float = 2.0

    def delay(self, failures: float, chance: float = 0.0) -> float:
        """Return the seconds until the next attempt.

        Args:
            failures: number of consecutive failures before this one; may be a fraction.
            chance: random number in [0, 1) for the jitter; 0 for none.
        """
        full: float = self.first * self.growth ** min(failures, MAX_EXPONENT)
        return min(self.longest, full) * (1 - MAX_JITTER * chance)


REFUSED_KEY = Backoff(first=5.0, longest=300.0)
"""Delays for a refused key. Services have refused keys by mistake for minutes, and operators fix
keys, so recovery should not take long afterwards, and requests in vain should not last all day."""
