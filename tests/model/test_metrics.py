"""Metric values of the relay's own work."""

from relay.model.metrics import BOUNDS, Histogram


def test_durations_are_cumulated():
    """Each bound has the number of durations up to it, itself included; the last has all."""
    durations = Histogram()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] + 1e-9, 11.0):
        durations.add(seconds)
    numbers = dict(durations.cumulated())
    assert list(numbers) == [*BOUNDS, float("inf")]
    assert [numbers[b] for b in (*BOUNDS[:2], BOUNDS[-1], float("inf"))] == [2, 3, 3, 4]
    assert (len(durations), round(durations.total, 3)) == (4, 11.002)


def test_durations_of_other_processes_are_added():
    """Buckets are those of all; the sum is exact."""
    durations, other = Histogram(), Histogram()
    durations.add(0.0)
    for seconds in (BOUNDS[0], 11.0):
        other.add(seconds)
    durations.merge(other.total, other.counts)
    numbers = dict(durations.cumulated())
    assert (numbers[BOUNDS[0]], numbers[float("inf")]) == (2, 3)
    assert durations.total == BOUNDS[0] + 11.0
