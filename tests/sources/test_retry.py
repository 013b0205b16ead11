"""When a source tries again."""

from hypothesis import given
from hypothesis import strategies as st

from relay.sources.retry import Schedule, Times


def test_delays_double_up_to_a_bound():
    """1 s to 30 s."""
    schedule = Schedule(Times())
    assert [schedule.failed(0, 0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


@given(st.floats(0, 1, exclude_max=True))
def test_jitter_takes_at_most_half(chance):
    """So relays do not return all at once."""
    assert 0.5 <= Schedule(Times()).failed(0, chance) <= 1


def test_a_good_minute_makes_the_next_failure_a_first_one():
    """A connection that fails at once does not."""
    schedule = Schedule(Times())
    schedule.failed(0, 0)
    schedule.succeeded(10)
    assert schedule.failed(69, 0) == 2
    schedule.succeeded(100)
    schedule.succeeded(150)
    assert schedule.failed(160, 0) == 1
    assert schedule.failed(1000, 0) == 2


def test_a_refused_key_is_tried_after_minutes_and_later_hours():
    """A success begins anew."""
    schedule = Schedule(Times())
    delays = [schedule.failed(0, 0, refused=True) for _ in range(5)]
    assert delays == [300, 600, 1200, 2400, 3600]
    schedule.succeeded(0)
    assert schedule.failed(0, 0, refused=True) == 300


def test_upstream_may_ask_for_a_delay_within_bounds():
    """The counter begins anew only when it asks for something new."""
    schedule = Schedule(Times())
    schedule.asked_for(5000)
    assert schedule.failed(0, 0) == 5
    schedule.asked_for(5000)
    assert schedule.failed(0, 0) == 10
    schedule.asked_for(0)
    assert schedule.failed(0, 0) == 1
    schedule.asked_for(10**9)
    assert schedule.failed(0, 0) == 30
