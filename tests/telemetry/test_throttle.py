"""Reports about what happens all the time."""

from __future__ import annotations

import pytest

from relay import clock
from relay.telemetry.throttle import Throttle


@pytest.fixture
def at():
    """Set the time in seconds."""
    yield lambda seconds: clock.use(lambda: seconds)
    clock.use()


@pytest.mark.parametrize(
    ("reports", "counts", "expected"),
    [
        (1, [(0, 1), (59, 2), (60, 3), (61, 4)], [1, 0, 5, 0]),
        (1, [(0, 1), (10, 1), (500, 1)], [1, 0, 2]),
        (2, [(0, 1), (1, 1), (2, 1), (3, 1), (61, 1), (62, 1), (63, 1)], [1, 1, 0, 0, 3, 1, 0]),
        (1, [(0, 0), (1, 2)], [0, 2]),  # nothing to report begins no period
        (1, [(0, 1), (1, 5), (60, -5), (61, 3)], [1, 0, 0, 3]),
        (1, [(0, -2), (1, 3)], [0, 1]),
    ],
)
def test_reports_are_limited_and_leave_nothing_out(at, reports, counts, expected):
    """Each report tells all that has been counted since the one before."""
    throttle, actual = Throttle(60, reports), []
    for seconds, number in counts:
        at(seconds)
        actual.append(throttle.count(number))
    assert actual == expected


def test_the_rest_can_be_taken_for_a_last_report(at):
    """Once."""
    at(0)
    throttle = Throttle(60)
    throttle.count(1)
    throttle.count(4)
    assert [throttle.take(), throttle.take()] == [4, 0]
    throttle.count(-1)
    assert throttle.take() == 0


def test_it_tells_that_no_more_is_reported(at):
    """So that the last line can say so."""
    at(0)
    throttle = Throttle(60, reports=2)
    told = []
    for _ in range(2):
        throttle.count()
        told.append(throttle.exhausted)
    assert told == [False, True]
    assert repr(throttle) == "<Throttle: 0 reports left, 0 unreported>"
