"""Limit of log lines about what happens all the time."""

from __future__ import annotations

from relay import clock


class Throttle:
    """Sums up what happens, so that it can be reported a few times in so many seconds.

    Args:
        seconds: length of a period, which begins with a report.
        reports: maximum number of reports in a period.
    """

    def __init__(self, seconds: float, reports: int = 1) -> None:
        self._seconds = seconds
        self._reports = reports
        self._left = 0
        self._period_ends = -float("inf")
        self._unreported = 0

    def __repr__(self) -> str:
        return f"<Throttle: {self._left} reports left, {self._unreported} unreported>"

    @property
    def exhausted(self) -> bool:
        """True if nothing more is reported in this period."""
        return self._left == 0

    def count(self, number: int = 1) -> int:
        """Count what has happened; return the number to report now, 0 if there must be no report.

        Args:
            number: how often it has happened; negative to take back what was counted before.
        """
        self._unreported += number
        now = clock.monotonic()
        if now >= self._period_ends and self._unreported > 0:
            self._left, self._period_ends = self._reports, now + self._seconds
        if not self._left or self._unreported <= 0:
            return 0
        self._left -= 1
        return self.take()

    def take(self) -> int:
        """Return the number that is not reported yet, for a last report; count from 0 again."""
        unreported, self._unreported = max(0, self._unreported), 0
        return unreported
