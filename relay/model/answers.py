"""Counts of the answers to clients that name the state of their data."""

from __future__ import annotations

from collections import defaultdict

from msgspec import Struct

from relay.model.metrics import MetricValue

UP_TO_DATE = "none", "up-to-date"
"""Kind and reason of the answer to a client that has everything."""


class AnswerCounter(Struct, frozen=True, eq=False):
    """Counts one answer, each time that it is given.

    Args:
        number: of such answers.
        saved: bytes of flags and segments that it does not have to contain.
        total: of the bytes saved.
    """

    number: MetricValue
    saved: int
    total: MetricValue

    def add(self) -> None:
        """Count the answer once more."""
        self.number.value += 1
        self.total.value += self.saved


class AnswerCounts:
    """Answers since the start."""

    def __init__(self) -> None:
        self.numbers: defaultdict[tuple[str, str], MetricValue] = defaultdict(MetricValue)
        """By kind, which is `full`, `delta` or `none`, and by reason."""
        self.saved = MetricValue()
        """Bytes of flags and segments that clients had already."""

    def __repr__(self) -> str:
        return f"<AnswerCounts [{sum(count.value for count in self.numbers.values())} answers]>"

    def counter(self, kind: str, reason: str, saved: int) -> AnswerCounter:
        """Return the counter of an answer.

        Args:
            kind: of the answer.
            reason: of the answer.
            saved: bytes of flags and segments that it does not have to contain.
        """
        return AnswerCounter(self.numbers[kind, reason], saved, self.saved)
