"""The window of payload ids: an SDK's retry is recognised, for a time and within its endpoint."""

from __future__ import annotations

import pytest

from relay.events import dedup
from relay.events.dedup import REMEMBERED, DedupWindow, dedup_key
from relay.model.event import EventsEndpoint
from tests.events.stores import OTHER, PARTITION, payload


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (PARTITION, True),
        (PARTITION._replace(tags="a/b", schema=3), True),
        (PARTITION._replace(endpoint=EventsEndpoint.MOBILE), False),
        (OTHER, False),
    ],
)
def test_an_id_is_known_in_its_environment_and_endpoint(other, same):
    """Whatever the rest of the partition; elsewhere it is another id."""
    key = dedup_key(payload(1))
    assert (dedup_key(payload(1, other)) == key) is same
    assert dedup_key(payload(2)) != key
    assert 0 < key < 2**56


def test_a_payload_without_an_id_is_always_new():
    """Its key is 0, which is never kept."""
    window = DedupWindow()
    assert dedup_key(payload(payload_id="")) == 0
    assert [window.add(0, 1.0) for _ in range(2)] == [True, True]
    assert not window.seen


def test_a_key_is_forgotten_after_its_time():
    """The younger ones are still known."""
    window = DedupWindow()
    assert [window.add(key, key) for key in (1, 2, 3, 2)] == [True, True, True, False]
    window.expire(REMEMBERED + 2)
    assert [window.add(key, 1000.0) for key in (1, 2, 3)] == [True, False, False]


def test_keys_can_be_taken_back():
    """Those of a transaction that has failed; unknown ones are no error."""
    window = DedupWindow()
    window.add(1, 1.0)
    window.forget([1, 2])
    assert window.add(1, 1.0)


def test_the_oldest_keys_make_room(monkeypatch):
    """Some at a time."""
    monkeypatch.setattr(dedup, "MAX_REMEMBERED", 32)
    window = DedupWindow()
    for key in range(1, 34):
        window.add(key, key)
    assert list(window.seen) == list(range(4, 34))
    assert repr(window) == "<DedupWindow: 30 keys>"
