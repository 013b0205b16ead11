"""Unix time that ignores corrections of the system's clock."""

from __future__ import annotations

import time

_BEGINNING = time.time() - time.monotonic()


def now() -> float:
    """Return the Unix time of this process's start plus the seconds that have passed since.

    Use it for ages and intervals. Times that people or LaunchDarkly read are the system's, which
    may have been corrected meanwhile.
    """
    return _BEGINNING + time.monotonic()
