"""A wait that can be cut short: between two attempts, polls, or looks at a file."""

from __future__ import annotations

import asyncio


async def pause(again: asyncio.Event, delay: float) -> None:
    """Wait for `delay` seconds, or until `again` is set."""
    try:
        async with asyncio.timeout(delay):
            await again.wait()
    except TimeoutError:
        return
