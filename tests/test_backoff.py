"""Delays that grow with consecutive failures."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.backoff import REFUSED_KEY, Backoff

DOUBLING = Backoff(first=0.5, longest=5.0)


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        (DOUBLING, [0.5, 1, 2, 4, 5, 5]),
        (Backoff(1.0, 3.0, growth=1.5), [1, 1.5, 2.25, 3, 3]),
        (Backoff(10.0, 10.0), [10, 10, 10]),
        (Backoff(0.0, 5.0), [0, 0]),
        (Backoff(math.inf, 7.0), [7, 7]),
        (REFUSED_KEY, [5, 10, 20, 40, 80, 160, 300, 300]),
    ],
)
def test_each_delay_is_longer_by_the_growth_up_to_the_longest(backoff, delays):
    """The first failure counts as none before it."""
    assert [backoff.delay(failures) for failures in range(len(delays))] == delays


@pytest.mark.parametrize(("chance", "delay"), [(0.0, 4.0), (0.5, 3.0), (0.999, 2.002)])
def test_chance_takes_up_to_half_of_a_delay(chance, delay):
    """So that relays do not retry all at once."""
    assert DOUBLING.delay(3, chance) == pytest.approx(delay)


def test_a_fraction_of_a_failure_counts_in_part():
    """Sources forget their failures step by step."""
    assert DOUBLING.delay(0.5) == pytest.approx(0.5 * math.sqrt(2))


@given(st.integers(0, sys.maxsize), st.floats(0, 1, exclude_max=True))
def test_any_number_of_failures_has_a_delay_within_the_bounds(failures, chance):
    """An outage of years does not overflow."""
    assert 0.25 <= DOUBLING.delay(failures, chance) <= 5.0
