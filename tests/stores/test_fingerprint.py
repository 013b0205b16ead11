"""Fingerprints change with any version, and only with versions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.steps import finish
from relay.stores.fingerprint import Fingerprint
from tests.stores.contract import flag, segment

ITEMS = st.builds(
    Item,
    st.sampled_from(Kind),
    st.sampled_from(["a", "b", "c", "d"]),
    st.integers(0, 5),
    st.sampled_from([b"{}", None]),
)


def fingerprint(*items: Item) -> Fingerprint:
    return finish(Fingerprint.of(Payload.of(items)))


@given(st.lists(st.lists(ITEMS, max_size=4), max_size=6))
def test_a_fingerprint_follows_changes(change_sets):
    """It costs the change only, and equals that of the whole payload."""
    payload, followed = EMPTY, fingerprint()
    for items in change_sets:
        before = payload
        payload, change = before.apply(ChangeSet(tuple(items)))
        followed = followed.after(before, change.items if change else ())
        assert followed == fingerprint(*payload)


def test_order_and_bytes_make_no_difference():
    """Other programs serialise the same item differently."""
    assert fingerprint(flag("a", 1), flag("b", 2)) == fingerprint(
        flag("b", 2, b'{"version":2,"other":1}'), flag("a", 1)
    )


def test_everything_else_does():
    """Kind, key, version and deletion."""
    different = [
        fingerprint(*items)
        for items in (
            [],
            [flag("a", 1)],
            [flag("a", 2)],
            [flag("b", 1)],
            [flag("a", 1, None)],
            [segment("a", 1)],
            [flag("a", 1), segment("a", 1)],
            [flag("a", 2), flag("b", 1)],
            [flag("a", 1), flag("b", 2)],
        )
    ]
    assert len(set(map(str, different))) == len(different)
