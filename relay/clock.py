"""Time that only passes: corrections of the system's clock do not move it."""

from __future__ import annotations

import time

_BEGINNING = time.time() - time.monotonic()


def now() -> float:
    """Return the Unix seconds of the start of this process, and what has passed since.

    Ages are differences of these. What people or LaunchDarkly read has the system's time instead,
    which may have been corrected meanwhile.
    """
    return _BEGINNING + time.monotonic()
