"""Who takes the loop's time for long takes turns, so that quick requests come in between."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Protocol

MAX_SLICE = 0.002
"""Seconds in which contexts are evaluated one after the other; who has not been answered by then
has to wait for the next turn of the event loop, so that polls come in between."""

BURST_GAP = 0.001
"""Seconds after which a question is no longer one of a series."""


class DeferredRequest(Protocol):
    """A connection with a question."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Its event loop."""

    def resume(self) -> None:
        """Answer the question that has waited."""


class EvaluationScheduler:
    """The questions of all connections of a server, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: deque[DeferredRequest] = deque()
        self._began = 0.0
        """When this turn began."""
        self._last = 0.0
        """When the last question was answered."""

    def defer(self, connection: DeferredRequest) -> bool:
        """Whether a question has to wait for the next turn of the loop; if so, it will get it."""
        if not self._waiting:
            now = time.monotonic()
            if now - self._last > BURST_GAP:
                self._began = now
            self._last = now
            if now - self._began < MAX_SLICE:
                return False
            connection.loop.call_soon(self._take, connection.loop)
        self._waiting.append(connection)
        return True

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer those who wait, as long as a turn may last."""
        began = now = time.monotonic()
        while self._waiting:
            self._waiting.popleft().resume()
            now = time.monotonic()
            if now - began > MAX_SLICE:
                break
        self._began = self._last = now
        if self._waiting:
            loop.call_soon(self._take, loop)
