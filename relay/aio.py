"""How sources wait: until the next attempt, poll or look at a file, and in the midst of work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from typing import TypeVar

SLICE = 0.001
"""Seconds for which a large payload is worked on before others have their turn."""

T = TypeVar("T")


async def wait_for(again: asyncio.Event, delay: float) -> None:
    """Wait for `delay` seconds, or until `again` is set."""
    try:
        async with asyncio.timeout(delay):
            await again.wait()
    except TimeoutError:
        return


async def run_in_slices(steps: Generator[None, None, T]) -> T:
    """Return the result of work in steps; each time a slice is over, others have their turn."""
    until = time.perf_counter() + SLICE
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if time.perf_counter() > until:
            await asyncio.sleep(0)
            until = time.perf_counter() + SLICE
