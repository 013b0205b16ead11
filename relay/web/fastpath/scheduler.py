"""Schedule evaluations so that they never hold the event loop for much more than 2 ms."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from relay import clock

MAX_SLICE = 0.002
"""Seconds of evaluation in one turn of the event loop; further requests are deferred to the next
turn, so that polls come in between."""

BURST_GAP = 0.001
"""Seconds without an evaluation request that end a burst."""


class DeferredRequest(Protocol):
    """Connection with an evaluation request that can be deferred."""

    def resume(self) -> None:
        """Answer the deferred request."""


class EvaluationScheduler:
    """Queue of the deferred evaluation requests of all connections of a server."""

    def __init__(self) -> None:
        self._deferred: deque[DeferredRequest] = deque()
        self._slice_start = 0.0
        """Monotonic time at which the current slice started."""
        self._last_evaluation = 0.0
        """Monotonic time of the last request."""

    def __repr__(self) -> str:
        return f"<EvaluationScheduler [{len(self._deferred)} deferred]>"

    def defer(self, connection: DeferredRequest) -> bool:
        """Defer a request if the current slice is used up; return True if it was deferred."""
        if not self._deferred:
            now = clock.monotonic()
            if now - self._last_evaluation > BURST_GAP:
                self._slice_start = now
            self._last_evaluation = now
            if now - self._slice_start < MAX_SLICE:
                return False
            loop = asyncio.get_running_loop()
            loop.call_soon(self._run_slice, loop)
        self._deferred.append(connection)
        return True

    def _run_slice(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answer deferred requests for one slice."""
        start = now = clock.monotonic()
        while self._deferred:
            self._deferred.popleft().resume()
            now = clock.monotonic()
            if now - start > MAX_SLICE:
                break
        self._slice_start = self._last_evaluation = now
        if self._deferred:
            loop.call_soon(self._run_slice, loop)
