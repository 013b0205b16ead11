"""Helpers for asyncio: interruptible waits, and work that pauses for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import TypeVar

from relay import clock

SLICE = 0.001
"""Seconds of work before other tasks of the event loop can run."""

T = TypeVar("T")


async def wait_for(event: asyncio.Event, delay: float) -> None:
    """Wait for `delay` seconds, or until `event` is set."""
    try:
        async with asyncio.timeout(delay):
            await event.wait()
    except TimeoutError:
        return


async def run_in_slices(steps: Generator[None, None, T]) -> T:
    """Return the result of a generator; yield to the event loop after each slice."""
    deadline = clock.monotonic() + SLICE
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if clock.monotonic() > deadline:
            await asyncio.sleep(0)
            deadline = clock.monotonic() + SLICE
