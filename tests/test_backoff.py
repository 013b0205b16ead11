"""When a source tries again."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.backoff import Backoff, SourceTimings

SECONDS = st.floats(0, 1000, allow_nan=False)
CHANCE = st.floats(0, 1, exclude_max=True)


def test_delays_grow_up_to_a_bound():
    """1 s to 30 s, each a quarter longer than the one before."""
    schedule = Backoff(SourceTimings())
    delays = [schedule.failed(0, 0) for _ in range(20)]
    assert delays[:4] == [1, 1.25, 1.5625, 1.953125]
    growths = [later / earlier for earlier, later in pairwise(delays[:16])]
    assert growths == [pytest.approx(1.25)] * 15
    assert set(delays[16:]) == {30}


@given(CHANCE)
def test_jitter_takes_at_most_half(chance):
    """So relays do not return all at once."""
    assert 0.5 <= Backoff(SourceTimings()).failed(0, chance) <= 1


def test_what_ends_after_data_is_a_first_failure():
    """However long upstream had been away before, and however short the connection was."""
    schedule = Backoff(SourceTimings())
    assert [schedule.failed(0, 0) for _ in range(30)][-1] == 30
    schedule.succeeded(100)
    assert schedule.failed(100.1, 0) == 1
    assert schedule.failed(101, 0) == 1.25


@pytest.mark.parametrize(
    ("lasts", "delays"),
    [
        (0, [1, 1.25, 1.5625, 1.953125]),  # as if it had never been there
        (10, [1, 1.118, 1.182, 1.216]),  # half is forgotten each time
        (60, [1, 1.0035, 1.0035, 1.0035]),
    ],
)
def test_what_ends_again_and_again_is_remembered_for_a_while(lasts, delays):
    """Each delay after a connection that delivered and lasted for so many seconds."""
    schedule, now, found = Backoff(SourceTimings()), 0.0, []
    for _ in delays:
        schedule.succeeded(now)
        now += lasts
        found.append(schedule.failed(now, 0))
        now += found[-1]
    assert found == pytest.approx(delays, rel=1e-3)


def test_the_first_delivery_of_a_connection_counts():
    """A connection is well from its first data on, however often it brings more."""
    schedule = Backoff(SourceTimings())
    schedule.succeeded(0)
    schedule.failed(0, 0)
    schedule.succeeded(0)
    schedule.succeeded(599)
    assert schedule.failed(600, 0) == pytest.approx(1)


def test_a_refused_key_is_tried_after_seconds_and_later_minutes():
    """5 s, doubling to 5 min; a success begins anew, a broken connection does not."""
    schedule = Backoff(SourceTimings())
    delays = [schedule.failed(0, 0, refused=True) for _ in range(8)]
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300]
    assert schedule.failed(0, 0) == 1
    assert schedule.failed(0, 0, refused=True) == 300
    schedule.succeeded(0)
    assert schedule.failed(0, 0, refused=True) == 5
    assert 5 < schedule.failed(0, 0.9, refused=True) < 10


def test_upstream_may_ask_for_a_delay_within_bounds():
    """The counter begins anew only when it asks for something new."""
    schedule = Backoff(SourceTimings())
    schedule.asked_for(5000)
    assert schedule.failed(0, 0) == 5
    schedule.asked_for(5000)
    assert schedule.failed(0, 0) == 6.25
    schedule.asked_for(0)
    assert schedule.failed(0, 0) == 1
    schedule.asked_for(10**9)
    assert schedule.failed(0, 0) == 30


EVENTS = st.lists(
    st.tuples(st.sampled_from(["succeeded", "failed", "refused", "asked"]), SECONDS, CHANCE),
    max_size=60,
)


def after(events, times=None):
    """A schedule to which all this happened, the time at its end, and the delays that it gave."""
    schedule, now, delays = Backoff(times or SourceTimings()), 0.0, []
    for what, seconds, chance in events:
        now += seconds
        if what == "succeeded":
            schedule.succeeded(now)
        elif what == "asked":
            schedule.asked_for(int(seconds * 1000))
        else:
            delays.append(schedule.failed(now, chance, refused=what == "refused"))
    return schedule, now, delays


@given(EVENTS)
def test_delays_have_bounds_whatever_happens(events):
    """No less than half a second, no more than 30 s, or 5 min after refusals; and no chance."""
    _, _, delays = after(events)
    assert all(0.5 <= delay <= 300 for delay in delays)
    _, _, unrefused = after([event for event in events if event[0] != "refused"])
    assert all(delay <= 30 for delay in unrefused)
    assert after(events)[2] == delays


@given(EVENTS)
def test_two_good_minutes_make_up_for_any_past(events):
    """What is remembered of bad times is bounded, so they are forgotten in a known time."""
    events = [event for event in events if event[0] != "asked"]
    schedule, now, _ = after(events)
    schedule.failed(now, 0)
    schedule.succeeded(now)
    assert schedule.failed(now + 120, 0) == pytest.approx(1, rel=1e-2)


@given(EVENTS, st.integers(2, 30))
def test_without_data_delays_never_shrink(events, failures):
    """Apart from jitter."""
    schedule, now, _ = after(events)
    schedule.failed(now, 0)
    delays = [schedule.failed(now, 0) for _ in range(failures)]
    assert delays == sorted(delays)


# The world, simulated: no clock, and chance that is the same each time.

LATENCY = 0.2
"""Seconds from an attempt until all data are there, at most."""


def returns(outages, chance, schedule=None):
    """The seconds from upstream's return until data were current, for each outage that was noticed.

    Args:
        outages: pairs of the times at which upstream is lost and is back.
        chance: random numbers.
        schedule: decides when to try.
    """
    schedule = schedule or Backoff(SourceTimings())
    schedule.succeeded(0)
    now, found = 0.0, []
    for lost, back in outages:
        if back <= now:
            continue  # it came and went while the relay was still waiting
        now = max(now, lost)
        while True:
            now += schedule.failed(now, chance.random())
            if now >= back:
                break
        now += LATENCY * chance.random()
        schedule.succeeded(now)
        found.append(now - back)
    return found


def outages(chance, number, lasting, apart):
    """So many outages, the first one after a good minute; bounds of their seconds."""
    now, found = 60.0, []
    for _ in range(number):
        back = now + chance.uniform(*lasting)
        found.append((now, back))
        now = back + chance.uniform(*apart)
    return found


@pytest.mark.parametrize(
    ("number", "lasting", "apart"),
    [
        *((1, (2, 3), (0, 0)), (3, (2, 3), (3, 6)), (3, (2, 3), (10, 20)), (10, (2, 3), (3, 6))),
        *((3, (0.1, 1), (1, 5)), (10, (0.1, 2), (2, 5)), (5, (0.5, 10), (5, 20))),
        *((1, (5, 5), (0, 0)), (3, (5, 5), (5, 10)), (3, (8, 8), (5, 10)), (3, (9, 9), (20, 60))),
        *((1, (10, 10), (0, 0)), (3, (10, 10), (5, 10)), (3, (10, 10), (20, 60))),
    ],
)
def test_short_outages_are_over_within_four_seconds(number, lasting, apart):
    """Of upstream's return, in nine of ten: of the first outage and of the last one of a series."""
    chance = random.Random(4711)
    runs = [returns(outages(chance, number, lasting, apart), chance) for _ in range(2000)]
    for found in ([run[0] for run in runs], [run[-1] for run in runs], list(chain(*runs))):
        assert sum(seconds <= 4 for seconds in found) >= 0.9 * len(found)


@pytest.mark.parametrize("minutes", [0.5, 1, 2, 10, 600])
def test_long_outages_are_over_within_half_their_time_and_half_a_minute(minutes):
    """In nine of ten within three tenths of it."""
    chance = random.Random(4711)
    lasting = minutes * 60
    found = sorted(returns([(60, 60 + lasting)], chance)[0] for _ in range(1000))
    assert found[-1] <= min(30, lasting / 2) + LATENCY
    assert found[900] <= min(27, lasting * 0.3) + LATENCY


@pytest.mark.parametrize("lasts", [0.0, 0.1, 1.0])
def test_an_upstream_that_delivers_and_closes_is_asked_less_and_less(lasts):
    """Data do not make up for an end that follows at once, again and again."""
    chance, schedule, now, attempts = random.Random(4711), Backoff(SourceTimings()), 0.0, []
    while now < 3600:
        attempts.append(now)
        schedule.succeeded(now)
        now += lasts
        now += schedule.failed(now, chance.random())
    in_minute = Counter(int(at // 60) for at in attempts)
    assert in_minute[0] <= 25
    assert in_minute[0] > in_minute[1] > 0
    assert all(in_minute[minute] <= 6 for minute in range(5, 60))


@pytest.mark.parametrize(
    ("lasting", "share"), [(0.1, 0.25), (1, 0.2), (3, 0.1), (10, 0.06), (60, 0.03), (600, 0.02)]
)
def test_a_fleet_does_not_return_all_at_once(lasting, share):
    """The greatest share of thousands of relays, lost together, that come in a tenth of a second."""
    chance = random.Random(4711)
    found = [returns([(60, 60 + lasting)], chance)[0] for _ in range(4000)]
    arrivals = Counter(int(seconds * 10) for seconds in found)
    assert max(arrivals.values()) <= share * len(found)
