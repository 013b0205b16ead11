"""Items are read from databases whoever has written them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model.item import Item
from relay.steps import finish
from relay.stores import UNREADABLE, Version
from relay.stores.items import in_order, in_waves, version_of
from tests.stores.contract import flag, segment


@pytest.mark.parametrize(
    ("stored", "version"),
    [
        (b'{"version":7,"on":true}', Version(7, live=True)),
        (b'{"version":7,"deleted":true}', Version(7, live=False)),
        (b'{"version":7.0}', Version(7, live=True)),  # other programs may write it so
        (b'{"key":"x"}', Version(0, live=True)),
        (b'{"version":"7"}', UNREADABLE),
        (b'{"version":1e999}', UNREADABLE),
        (b"nonsense", UNREADABLE),
        (b"\xff", UNREADABLE),
        (b"[" * 100_000, UNREADABLE),
    ],
)
def test_versions_are_read_of_whatever_is_stored(stored, version):
    """An item that cannot be read is older than any other."""
    assert version_of(stored) == version


def needing(key: str, *needs: str) -> Item:
    """A flag with prerequisites."""
    wanted = [{"key": need, "variation": 0} for need in needs]
    return flag(key, 1, json.dumps({"key": key, "version": 1, "prerequisites": wanted}).encode())


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.sets(st.sampled_from("abcdefghxy"))))
def test_flags_come_after_their_prerequisites(needs):
    """Segments come first; each item once, also in circles and beside unknown keys.

    In waves, they come in an earlier one.
    """
    items = [needing(key, *others) for key, others in needs.items()] + [segment("s", 1)]
    ordered = finish(in_order(items))
    assert sorted(ordered, key=items.index) == items
    assert ordered[0] == segment("s", 1)
    waves = finish(in_waves(items))
    assert waves[0] == [segment("s", 1)]
    assert sorted((item for wave in waves for item in wave), key=items.index) == items
    place = {item.key: n for n, item in enumerate(ordered)}
    wave_of = {item.key: n for n, wave in enumerate(waves) for item in wave}

    def reaches(start: str, end: str, seen: frozenset[str] = frozenset()) -> bool:
        nexts = needs.get(start, set()) - seen
        return end in nexts or any(reaches(key, end, seen | nexts) for key in nexts)

    for key, others in needs.items():
        for other in others & needs.keys():
            assert place[other] < place[key] or reaches(other, key)
            assert wave_of[other] < wave_of[key] or reaches(other, key)


def test_flags_without_readable_prerequisites_have_their_place():
    """Tombstones, and what another program has written."""
    items = [flag("gone", 2, None), flag("odd", 1, b'{"prerequisites":7}'), flag("lamp", 1)]
    assert finish(in_order(items)) == items


def test_a_long_chain_of_prerequisites_is_no_problem():
    """Nothing recurses."""
    items = [needing(f"f{n}", f"f{n + 1}") for n in range(5_000)] + [flag("f5000", 1)]
    assert finish(in_order(items)) == items[::-1]
    assert finish(in_waves(items)) == [[item] for item in items[::-1]]
