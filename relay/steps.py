"""Work in steps, so that whoever does it can pause between them. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")

Steps = Generator[None, None, T]
"""Generator that pauses after each step and returns the result."""


class Work(Generic[T]):
    """Steps, some of which are done.

    Args:
        steps: generator of the steps, not started yet.
    """

    result: T
    """Result of the last step, once `run` has returned True."""

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps

    def run(self, until: float = math.inf, now: Callable[[], float] = lambda: 0.0) -> bool:
        """Do steps until the work is done or a time is over; return whether it is done.

        Args:
            until: time after which to pause.
            now: returns the time; called after each step.
        """
        steps = self._steps
        try:
            while True:
                next(steps)
                if now() > until:
                    return False
        except StopIteration as end:
            self.result = end.value
            return True


def finish(steps: Steps[T]) -> T:
    """Do all steps without a pause; return the result."""
    work = Work(steps)
    work.run()
    return work.result
