"""Counts of reloads."""

from __future__ import annotations

from collections import Counter
from enum import Enum

from relay import clock


class ReloadResult(Enum):
    """Outcome of a reload."""

    SUCCESS = "success"
    FAILURE = "failure"


class Reloads:
    """Number of reloads since the start, and when the configuration was last read without fault."""

    def __init__(self) -> None:
        self.results: Counter[ReloadResult] = Counter()
        self.last_success = clock.unix()
        """Unix time; at first that of the start."""

    def __repr__(self) -> str:
        numbers = ", ".join(f"{self.results[each]} {each.value}" for each in ReloadResult)
        return f"<Reloads: {numbers}>"

    def count(self, result: ReloadResult) -> None:
        """Count a reload that has just ended."""
        self.results[result] += 1
        if result is ReloadResult.SUCCESS:
            self.last_success = clock.unix()
