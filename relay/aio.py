"""Helpers for asyncio: interruptible waits, and work that pauses for the event loop."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from relay import clock
from relay.steps import Steps, Work

SLICE = 0.001
"""Seconds of work before other tasks of the event loop can run. The current step is finished first;
polls in between should wait no more than twice this time."""

T = TypeVar("T")


async def wait_for(event: asyncio.Event, delay: float) -> None:
    """Wait for `delay` seconds, or until `event` is set."""
    try:
        async with asyncio.timeout(delay):
            await event.wait()
    except TimeoutError:
        return


def run_for(seconds: float, work: Work[Any]) -> bool:
    """Do a part of some work that takes this time; return whether all is done."""
    return work.run(clock.monotonic() + seconds, clock.monotonic)


async def run_in_slices(steps: Steps[T]) -> T:
    """Return the result of work in steps; let other tasks run after each slice of it."""
    work = Work(steps)
    while True:
        if run_for(SLICE, work):
            return work.result
        await asyncio.sleep(0)
