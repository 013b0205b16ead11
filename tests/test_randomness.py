"""Random numbers and IDs."""

from __future__ import annotations

import os
from collections import Counter
from uuid import UUID

import pytest

from relay import randomness


@pytest.fixture(autouse=True)
def unpredictable_afterwards():
    yield
    randomness.seed()


def some_values():
    return [randomness.fraction(), randomness.choice("abcdef"), randomness.new_id()]


def test_a_seed_makes_all_that_follows_repeatable():
    """Numbers, choices and IDs alike."""
    randomness.seed(1)
    first = some_values() + some_values()
    randomness.seed(1)
    assert some_values() + some_values() == first
    randomness.seed(2)
    assert some_values() != first[:3]


def test_without_a_seed_nothing_repeats():
    """A seed can be taken back."""
    randomness.seed(1)
    first = some_values()
    randomness.seed()
    assert some_values() != first


def test_a_forked_process_makes_ids_of_its_own():
    """LaunchDarkly would take a second payload with the same ID for a repetition, and drop it."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, randomness.new_id().encode())
        os._exit(0)
    os.wait()
    own = randomness.new_id()
    assert UUID(os.read(reader, 100).decode()) != UUID(own)
    os.close(reader)
    os.close(writer)


def test_ids_are_uuids_of_version_4():
    """As SDKs make them."""
    assert all(UUID(randomness.new_id()).version == 4 for _ in range(100))


def test_choices_are_equally_likely():
    """Fractions, too, within what 8000 of them can show."""
    randomness.seed(1)
    chosen = Counter(randomness.choice(range(8)) for _ in range(8000))
    tenths = Counter(int(randomness.fraction() * 8) for _ in range(8000))
    for counts in (chosen, tenths):
        assert set(counts) == set(range(8))
        assert all(850 < count < 1150 for count in counts.values())
