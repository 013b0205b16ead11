"""The time, from one place, so that tests and simulations can run the program on virtual time.

Measure durations and deadlines with `monotonic`. Use `unix` for times that people or LaunchDarkly
read, and `now` for times that are stored or compared with stored ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_monotonic: Callable[[], float] = time.monotonic
_unix: Callable[[], float] = time.time
_start = _unix() - _monotonic()


def monotonic() -> float:
    """Return seconds of a clock that nobody corrects."""
    return _monotonic()


def unix() -> float:
    """Return the system's Unix time in seconds, which may be corrected at any moment."""
    return _unix()


def now() -> float:
    """Return the Unix time of this process's start plus the seconds that have passed since."""
    return _start + _monotonic()


def use(
    monotonic: Callable[[], float] = time.monotonic, unix: Callable[[], float] = time.time
) -> None:
    """Replace the sources of time for the whole process; without arguments, restore the system's.

    Args:
        monotonic: returns seconds that never decrease.
        unix: returns the Unix time in seconds.
    """
    global _monotonic, _unix, _start  # noqa: PLW0603 - a call costs least this way
    _monotonic, _unix = monotonic, unix
    _start = unix() - monotonic()
