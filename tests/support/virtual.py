"""An event loop whose time passes at once: hours of waiting take no longer than what is done.

The program's clocks and its chance follow the loop, so that every run is the same.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from relay import clock, randomness

T = TypeVar("T")

START = 1_800_000_000.0
"""Unix time at which virtual time begins."""


class _Selector(selectors.SelectSelector):
    """Waits for nothing; the time for which it would have waited is over."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and nothing will ever happen"
        self.now += max(0.0, timeout)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for time only."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        loop = runner.get_loop()
        clock.use(loop.time, lambda: START + loop.time())
        randomness.seed(4711)
        try:
            return runner.run(main)
        finally:
            clock.use()
            randomness.seed()
