"""Metric values of the relay's own work: cheap to update, read only on demand."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of the buckets in seconds: from one turn of the event loop to longer than
anyone should wait."""


@dataclass(slots=True)
class MetricValue:
    """A counter. Its user keeps a reference to it, so that counting is a mere addition."""

    value: int = 0


@dataclass(slots=True)
class Histogram:
    """Distribution of durations."""

    total: float = 0.0
    """Sum of all durations in seconds."""
    _counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self.total += seconds
        self._counts[bisect_left(BOUNDS, seconds)] += 1

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of durations in each bucket, and in that beyond all bounds."""
        return tuple(self._counts)

    def merge(self, total: float, counts: Sequence[int]) -> None:
        """Add durations that were counted elsewhere.

        Args:
            total: their sum in seconds.
            counts: their number in each bucket, as `counts`.
        """
        self.total += total
        for bucket, count in enumerate(counts):
            self._counts[bucket] += count

    def __len__(self) -> int:
        """Return the number of durations."""
        return sum(self._counts)

    def cumulated(self) -> Iterator[tuple[float, int]]:
        """Yield each bound with the number of durations up to it; the last bound is infinity."""
        total_count = 0
        for bound, count in zip((*BOUNDS, float("inf")), self._counts, strict=True):
            total_count += count
            yield bound, total_count
