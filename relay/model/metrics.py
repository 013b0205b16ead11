"""What is counted of the relay's own work: cheap to write, read only when somebody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds up to which durations are told apart: from one loop turn to what nobody should wait."""


@dataclass(slots=True)
class MetricValue:
    """A number that whoever changes it holds on to, so that counting is an addition."""

    value: int = 0


@dataclass(slots=True)
class Histogram:
    """How long something took, each time."""

    total: float = 0.0
    """Seconds of all together."""
    _counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        """Note one duration."""
        self.total += seconds
        self._counts[bisect_left(BOUNDS, seconds)] += 1

    def __len__(self) -> int:
        """Return the number of durations."""
        return sum(self._counts)

    def cumulated(self) -> Iterator[tuple[float, int]]:
        """Yield each bound with the number of durations up to it; infinity is the last."""
        number = 0
        for bound, count in zip((*BOUNDS, float("inf")), self._counts, strict=True):
            number += count
            yield bound, number
