"""Admission at sizes that tests can fill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from relay.streams import admission, channel, evaluated
from relay.streams.admission import Admission

LARGE = 300
"""Bytes of a message from which on it has to be admitted here."""


@contextmanager
def small_sizes(interval: float = 0.001) -> Iterator[None]:
    """Let messages of some hundred bytes be large, and two of them fill a turn of the loop.

    Args:
        interval: seconds between two looks at clients that do not read.
    """
    small = {"SETTLED": 0, "SHARE": 3000, "SMALL_SHARE": 2000, "TURN": 2 * LARGE}
    with ExitStack() as stack:
        for module in (channel, evaluated):
            stack.enter_context(patch.object(module, "LARGE", LARGE))
        for name, value in {**small, "INTERVAL": interval}.items():
            stack.enter_context(patch.object(admission, name, value))
        yield


def patient(limit: int) -> Admission:
    """Return an admission that waits for whoever does not read."""
    return Admission(limit, patience=math.inf)
