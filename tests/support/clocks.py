"""The system's clocks, moved on or corrected by a test."""

from __future__ import annotations

import time
from typing import Self

from relay import clock


class SystemClock:
    """The system's clocks while the context lasts."""

    def __init__(self) -> None:
        self._corrected = self._skipped = 0.0

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        clock.use()

    def correct(self, seconds: float) -> None:
        """Set the Unix time on or back; durations are not affected."""
        self._corrected += seconds

    def skip(self, seconds: float) -> None:
        """Let some time pass at once."""
        self._skipped += seconds

    def restart(self) -> None:
        """Begin to measure as a new process does."""
        clock.use(
            lambda: time.monotonic() + self._skipped,
            lambda: time.time() + self._corrected + self._skipped,
        )
