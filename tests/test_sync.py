"""Reports of one synchronisation about its database."""

from __future__ import annotations

import pytest

from relay.model.item import InvalidItem, Kind
from relay.model.payload import Payload
from relay.stores import Stored
from relay.sync import SyncChanges
from tests.stores.contract import flag, segment

UPSTREAM = Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)])


def stored(*items, bad: str = "") -> Stored:
    """A database with these items in place of upstream's."""
    invalid = (InvalidItem(Kind.FLAG, bad, "no JSON"),) if bad else ()
    readable = [item for item in (*UPSTREAM, *items) if item.key != bad]
    return Stored(Payload.of(readable), invalid)


@pytest.mark.parametrize(
    ("database", "expected"),
    [
        (stored(), {}),
        (stored(flag("lamp", 2)), {"updated": "lamp"}),
        (stored(flag("lamp", 2, None)), {"added": "lamp"}),  # a deleted flag that is back
        (stored(bad="lamp"), {"updated": "lamp"}),
        (stored(flag("gone", 3)), {"deleted": "gone"}),
        (stored(flag("gone", 3, None)), {"unseen": 1}),
        (stored(bad="gone"), {"deleted": "gone"}),
        (stored(flag("old", 1)), {"deleted": "old"}),
        (stored(flag("old", 1, None)), {}),
        (stored(bad="old"), {"deleted": "old"}),
        (stored(flag("lamp", 9)), {"kept": "lamp"}),
        (stored(flag("lamp", 9), flag("new", 1)), {"kept": "lamp new"}),  # upstream is behind
        (stored(flag("lamp", 9), segment("crowd", 1)), {"kept": "lamp", "updated": "crowd"}),
    ],
)
def test_changes_are_told_by_what_readers_of_the_database_see(database, expected):
    """A tombstone in place of another one, or of nothing, is no visible change."""
    changes = SyncChanges.between(database.versions, UPSTREAM)
    told = {
        kind: " ".join(key for _, key in getattr(changes, kind))
        for kind in ("added", "updated", "deleted", "kept")
    }
    told |= {"unseen": changes.unseen}
    assert {kind: value for kind, value in told.items() if value} == expected
    assert bool(changes) is bool(expected.keys() - {"kept"})


def test_a_database_that_was_never_filled_gets_everything():
    """Even if there is nothing upstream, as it gets its marker."""
    changes = SyncChanges.between(None, UPSTREAM)
    assert changes.counts() == {"added": 2, "updated": 0, "deleted": 0, "kept": 0}
    assert (changes.unseen, changes.whole) == (1, True)
    assert SyncChanges.between(None, Payload.of([]))
