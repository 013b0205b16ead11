"""Time that a piece of work holds the event loop, whatever else the machine does."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Longest:
    """The longest time in seconds for which the event loop was held."""

    seconds = 0.0


@contextmanager
def holding() -> Iterator[Longest]:
    """Measure the processor time of each callback of asyncio's own event loop.

    Nothing is collected meanwhile: a test process has many more objects than a relay.
    """
    longest = Longest()
    handles: Any = asyncio.Handle  # as written in Python, which uvloop's are not
    run = handles._run

    def measured(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        if not gc.isenabled():
            longest.seconds = max(longest.seconds, time.thread_time() - begin)

    handles._run = measured
    gc.collect()
    gc.disable()
    try:
        yield longest
    finally:
        gc.enable()
        handles._run = run
