"""Retry delays of data sources."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.sources.timings import SourceBackoff, SourceTimings

SECONDS = st.floats(0, 1000, allow_nan=False)
CHANCE = st.floats(0, 1, exclude_max=True)


def test_delays_grow_up_to_a_bound():
    """From 1 s to 30 s, each a quarter longer than the one before."""
    backoff = SourceBackoff(SourceTimings())
    delays = [backoff.failed(0, 0) for _ in range(20)]
    assert delays[:4] == [1, 1.25, 1.5625, 1.953125]
    growths = [later / earlier for earlier, later in pairwise(delays[:16])]
    assert growths == [pytest.approx(1.25)] * 15
    assert set(delays[16:]) == {30}


@given(CHANCE)
def test_jitter_takes_at_most_half(chance):
    """So that relays do not retry all at once."""
    assert 0.5 <= SourceBackoff(SourceTimings()).failed(0, chance) <= 1


def test_delivered_data_resets_the_delay():
    """However long the outage was, and however short the connection."""
    backoff = SourceBackoff(SourceTimings())
    assert [backoff.failed(0, 0) for _ in range(30)][-1] == 30
    backoff.succeeded(100)
    assert backoff.failed(100.1, 0) == 1
    assert backoff.failed(101, 0) == 1.25


@pytest.mark.parametrize(
    ("duration", "delays"),
    [
        (0, [1, 1.25, 1.5625, 1.953125]),  # as if it had never been there
        (10, [1, 1.118, 1.182, 1.216]),  # half is forgotten each time
        (60, [1, 1.0035, 1.0035, 1.0035]),
    ],
)
def test_lost_connections_are_remembered_for_a_while(duration, delays):
    """Delays between connections that deliver and last for some seconds."""
    backoff, now, actual = SourceBackoff(SourceTimings()), 0.0, []
    for _ in delays:
        backoff.succeeded(now)
        now += duration
        actual.append(backoff.failed(now, 0))
        now += actual[-1]
    assert actual == pytest.approx(delays, rel=1e-3)


def test_the_first_delivery_of_a_connection_counts():
    """A connection is healthy from its first delivery on; later ones change nothing."""
    backoff = SourceBackoff(SourceTimings())
    backoff.succeeded(0)
    backoff.failed(0, 0)
    backoff.succeeded(0)
    backoff.succeeded(599)
    assert backoff.failed(600, 0) == pytest.approx(1)


def test_a_refused_key_is_retried_after_seconds_and_later_minutes():
    """From 5 s, doubling to 5 min; reset by a success, not by a lost connection."""
    backoff = SourceBackoff(SourceTimings())
    delays = [backoff.failed(0, 0, refused=True) for _ in range(8)]
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300]
    assert backoff.failed(0, 0) == 1
    assert backoff.failed(0, 0, refused=True) == 300
    backoff.succeeded(0)
    assert backoff.failed(0, 0, refused=True) == 5
    assert 5 < backoff.failed(0, 0.9, refused=True) < 10


def test_upstream_may_ask_for_a_delay_within_bounds():
    """The step is reset only if the value has changed."""
    backoff = SourceBackoff(SourceTimings())
    backoff.set_first_delay(5000)
    assert backoff.failed(0, 0) == 5
    backoff.set_first_delay(5000)
    assert backoff.failed(0, 0) == 6.25
    backoff.set_first_delay(0)
    assert backoff.failed(0, 0) == 1
    backoff.set_first_delay(10**9)
    assert backoff.failed(0, 0) == 30


def test_the_repr_states_failures_so_far():
    backoff = SourceBackoff(SourceTimings())
    backoff.failed(0, 0)
    backoff.failed(0, 0, refused=True)
    assert repr(backoff) == "<SourceBackoff step=1 refusals=1>"


EVENTS = st.lists(
    st.tuples(st.sampled_from(["succeeded", "failed", "refused", "asked"]), SECONDS, CHANCE),
    max_size=60,
)


def after(events, timings=None):
    """Apply events to a backoff; return it with the time at the end and all delays."""
    backoff, now, delays = SourceBackoff(timings or SourceTimings()), 0.0, []
    for event, seconds, chance in events:
        now += seconds
        if event == "succeeded":
            backoff.succeeded(now)
        elif event == "asked":
            backoff.set_first_delay(int(seconds * 1000))
        else:
            delays.append(backoff.failed(now, chance, refused=event == "refused"))
    return backoff, now, delays


@given(EVENTS)
def test_delays_have_bounds_whatever_happens(events):
    """Between 0.5 s and 30 s, or 5 min after refusals; and deterministic."""
    _, _, delays = after(events)
    assert all(0.5 <= delay <= 300 for delay in delays)
    _, _, unrefused = after([event for event in events if event[0] != "refused"])
    assert all(delay <= 30 for delay in unrefused)
    assert after(events)[2] == delays


@given(EVENTS)
def test_two_healthy_minutes_reset_any_past(events):
    """The memory of failures is bounded, so it fades in a known time."""
    events = [event for event in events if event[0] != "asked"]
    backoff, now, _ = after(events)
    backoff.failed(now, 0)
    backoff.succeeded(now)
    assert backoff.failed(now + 120, 0) == pytest.approx(1, rel=1e-2)


@given(EVENTS, st.integers(2, 30))
def test_without_data_delays_never_shrink(events, failures):
    """Apart from jitter."""
    backoff, now, _ = after(events)
    backoff.failed(now, 0)
    delays = [backoff.failed(now, 0) for _ in range(failures)]
    assert delays == sorted(delays)


# Simulations with virtual time and fixed random seeds.

LATENCY = 0.2
"""Maximum seconds from an attempt until all data has arrived."""


def recovery_times(outages, chance, backoff=None):
    """Return the recovery time in seconds of each outage that the relay noticed.

    Args:
        outages: pairs of the times at which upstream is lost and is back.
        chance: random number generator.
        backoff: computes the delays.
    """
    backoff = backoff or SourceBackoff(SourceTimings())
    backoff.succeeded(0)
    now, recoveries = 0.0, []
    for lost, back in outages:
        if back <= now:
            continue  # it came and went while the relay was still waiting
        now = max(now, lost)
        while True:
            now += backoff.failed(now, chance.random())
            if now >= back:
                break
        now += LATENCY * chance.random()
        backoff.succeeded(now)
        recoveries.append(now - back)
    return recoveries


def outages(chance, number, duration, gap):
    """Return random outages, the first after one healthy minute; `duration` and `gap` are ranges."""
    now, result = 60.0, []
    for _ in range(number):
        back = now + chance.uniform(*duration)
        result.append((now, back))
        now = back + chance.uniform(*gap)
    return result


@pytest.mark.parametrize(
    ("number", "duration", "gap"),
    [
        *((1, (2, 3), (0, 0)), (3, (2, 3), (3, 6)), (3, (2, 3), (10, 20)), (10, (2, 3), (3, 6))),
        *((3, (0.1, 1), (1, 5)), (10, (0.1, 2), (2, 5)), (5, (0.5, 10), (5, 20))),
        *((1, (5, 5), (0, 0)), (3, (5, 5), (5, 10)), (3, (8, 8), (5, 10)), (3, (9, 9), (20, 60))),
        *((1, (10, 10), (0, 0)), (3, (10, 10), (5, 10)), (3, (10, 10), (20, 60))),
    ],
)
def test_short_outages_are_over_within_four_seconds(number, duration, gap):
    """In 90 % of the cases, for the first and the last outage of a series and for all."""
    chance = random.Random(4711)
    runs = [recovery_times(outages(chance, number, duration, gap), chance) for _ in range(2000)]
    for recoveries in ([run[0] for run in runs], [run[-1] for run in runs], list(chain(*runs))):
        assert sum(seconds <= 4 for seconds in recoveries) >= 0.9 * len(recoveries)


@pytest.mark.parametrize("minutes", [0.5, 1, 2, 10, 600])
def test_long_outages_are_over_within_half_their_time_and_half_a_minute(minutes):
    """In 90 % of the cases within 30 % of the duration."""
    chance = random.Random(4711)
    duration = minutes * 60
    recoveries = sorted(recovery_times([(60, 60 + duration)], chance)[0] for _ in range(1000))
    assert recoveries[-1] <= min(30, duration / 2) + LATENCY
    assert recoveries[900] <= min(27, duration * 0.3) + LATENCY


@pytest.mark.parametrize("duration", [0.0, 0.1, 1.0])
def test_an_upstream_that_delivers_and_closes_is_contacted_less_and_less(duration):
    """Delivered data does not reset delays if connections end at once all the time."""
    chance, backoff, now, attempts = random.Random(4711), SourceBackoff(SourceTimings()), 0.0, []
    while now < 3600:
        attempts.append(now)
        backoff.succeeded(now)
        now += duration
        now += backoff.failed(now, chance.random())
    in_minute = Counter(int(at // 60) for at in attempts)
    assert in_minute[0] <= 25
    assert in_minute[0] > in_minute[1] > 0
    assert all(in_minute[minute] <= 6 for minute in range(5, 60))


@pytest.mark.parametrize(
    ("duration", "share"), [(0.1, 0.25), (1, 0.2), (3, 0.1), (10, 0.06), (60, 0.03), (600, 0.02)]
)
def test_a_fleet_does_not_return_all_at_once(duration, share):
    """Of thousands of relays with the same outage, few return within the same 0.1 s."""
    chance = random.Random(4711)
    recoveries = [recovery_times([(60, 60 + duration)], chance)[0] for _ in range(4000)]
    arrivals = Counter(int(seconds * 10) for seconds in recoveries)
    assert max(arrivals.values()) <= share * len(recoveries)
