"""Payloads: versions decide, and the cost of a change is proportional to it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.model.item import InvalidItem, Item, Kind
from relay.model.payload import (
    EMPTY,
    SMALL_PAYLOAD,
    Change,
    ChangeSet,
    Payload,
    Selector,
    distance,
)


def flag(key, version, json=b"{}"):
    return Item(Kind.FLAG, key, version, json)


def tombstone(key, version):
    return Item(Kind.FLAG, key, version, None)


items = st.builds(
    Item,
    kind=st.sampled_from(Kind),
    key=st.sampled_from("abcd"),
    version=st.integers(0, 5),
    json=st.one_of(st.none(), st.sampled_from([b"{}", b'{"x":1}'])),
)
consistent = st.lists(items, max_size=12).map(
    lambda drawn: list({(i.kind, i.key, i.version): i for i in drawn}.values())
)
"""Items of which no two have the same key and version but different content."""


def contents(payload):
    return {(item.kind, item.key): item for item in payload}


def test_a_greater_version_wins():
    """An equal or older version changes nothing; a greater one does."""
    payload, _ = EMPTY.apply(ChangeSet((flag("a", 2),)))
    assert payload.apply(ChangeSet((flag("a", 2, b'{"other":1}'), flag("a", 1)))) == (payload, None)
    after, change = payload.apply(ChangeSet((flag("a", 3),)))
    assert after.get(Kind.FLAG, "a") == flag("a", 3)
    assert change is not None
    assert change.visible == (flag("a", 3),)
    assert payload.get(Kind.FLAG, "a") == flag("a", 2)


def test_a_deletion_leaves_a_tombstone():
    """A later item must have a greater version than the deletion."""
    payload, _ = EMPTY.apply(ChangeSet((flag("a", 1),)))
    payload, change = payload.apply(ChangeSet((tombstone("a", 2),)))
    assert payload.get(Kind.FLAG, "a") is None
    assert change is not None
    assert change.visible == (tombstone("a", 2),)
    assert payload.apply(ChangeSet((flag("a", 2),)))[1] is None


def test_the_deletion_of_an_unknown_item_is_stored_but_not_visible():
    """Stores need the tombstone; clients never had the item."""
    payload, change = Payload.of([flag("a", 1)]).apply(ChangeSet((tombstone("b", 7),)))
    assert change is not None
    assert change.items == (tombstone("b", 7),)
    assert change.visible == ()
    assert len(payload) == 2


def test_a_full_change_set_replaces_everything_whatever_the_versions():
    """Items vanish, tombstones are forgotten, versions go back."""
    before = Payload.of([flag("a", 5), flag("b", 5), tombstone("c", 9)])
    after, change = before.apply(ChangeSet((flag("a", 1),), full=True))
    assert contents(after) == {(Kind.FLAG, "a"): flag("a", 1)}
    assert change is not None
    assert change.replace


def test_an_identical_full_change_set_is_no_change():
    """A reconnection that brings the same data is silent."""
    before = Payload.of([flag("a", 5), tombstone("c", 9)])
    assert before.apply(ChangeSet((flag("a", 5),), full=True)) == (before, None)


def test_a_small_difference_in_a_large_environment_goes_out_as_patches():
    """After a reconnection, clients do not download everything again for one flag."""
    big = [flag(f"k{n}", 1, b"x" * 1000) for n in range(SMALL_PAYLOAD // 500)]
    newer = [flag("k0", 2, b"y"), *big[1:]]
    _, change = Payload.of(big).apply(ChangeSet(tuple(newer), full=True))
    assert change is not None
    assert not change.replace
    assert change.visible == (newer[0],)
    _, change = Payload.of(big).apply(ChangeSet(tuple(big[1:]), full=True))
    assert change is not None
    assert change.replace, "a vanished item has no version that a delete could carry"


def test_an_invalid_item_keeps_its_previous_version():
    """One bad item in a put does not take the flag away."""
    before = Payload.of([flag("a", 1), flag("b", 1)])
    bad = InvalidItem(Kind.FLAG, "a", "why")
    after, _ = before.apply(ChangeSet((flag("b", 2),), full=True, invalid=(bad,)))
    assert after.get(Kind.FLAG, "a") == flag("a", 1)
    assert after.get(Kind.FLAG, "b") == flag("b", 2)


@given(consistent, st.randoms())
def test_the_order_of_partial_change_sets_does_not_matter(changes, random):
    """Versions decide, so any order and any grouping lead to the same payload."""
    one, _ = EMPTY.apply(ChangeSet(tuple(changes)))
    shuffled = list(changes)
    random.shuffle(shuffled)
    other = EMPTY
    for item in shuffled:
        other, _ = other.apply(ChangeSet((item,)))
    assert contents(one) == contents(other)
    assert one.size == other.size == Payload.of(one).size
    assert one.apply(ChangeSet(tuple(changes)))[1] is None


@given(consistent, consistent)
def test_the_visible_changes_lead_a_client_to_the_payload(first, second):
    """A client that applies the visible changes by version ends up like a new one."""
    before = Payload.of(first)
    after, change = before.apply(ChangeSet(tuple(second)))
    visible = () if change is None else change.visible
    client, _ = Payload.of(i for i in before if not i.deleted).apply(ChangeSet(visible))
    for kind in Kind:
        assert {i.key: i for i in client.live(kind)} == {i.key: i for i in after.live(kind)}


@given(consistent, consistent)
def test_a_full_change_says_what_differs_and_what_is_gone(first, second):
    """Tombstones included; visible is what clients can notice."""
    before = Payload.of(first)
    after, change = before.apply(ChangeSet(tuple(second), full=True))
    if change is None:
        assert {i for i in before if not i.deleted} == {i for i in after if not i.deleted}
        return
    known = {(i.kind, i.key): i for i in before}
    kept = {(i.kind, i.key) for i in after}
    assert set(change.items) == {i for i in after if known.get((i.kind, i.key)) != i}
    assert set(change.vanished) == {i for k, i in known.items() if k not in kept}
    live = {key for key, item in known.items() if not item.deleted}
    assert set(change.visible) == {
        i for i in change.items if not i.deleted or (i.kind, i.key) in live
    }
    assert change.replace, "the payload is small"


@given(consistent, consistent)
def test_of_two_payloads_at_most_one_is_newer(one, other):
    """The comparison that chooses between stored payloads at start is antisymmetric."""
    a, b = Payload.of(one), Payload.of(other)
    assert not (a.is_newer_than(b) and b.is_newer_than(a))
    assert not a.is_newer_than(a)


def test_a_payload_prints_its_size_and_not_its_content():
    """In a debugger or a log, thousands of items would hide everything else."""
    assert repr(EMPTY) == "<Payload of 0 flags and 0 segments, newest version 0>"
    payload, _ = EMPTY.apply(ChangeSet((Item(Kind.FLAG, "lamp", 3, None),)))
    assert repr(payload) == "<Payload of 1 flags and 0 segments, newest version 3>"


NAMED = Selector("(p:UP:2)", "UP", 2)


def named(*changes):
    return ChangeSet(changes, selector=NAMED)


def test_where_upstream_names_its_data_no_versions_are_compared():
    """A lower one replaces a higher; clients that compare versions need everything then."""
    before = Payload.of([flag("a", 5), flag("b", 1)])
    after, change = before.apply(named(flag("a", 3)))
    assert after.get(Kind.FLAG, "a") == flag("a", 3)
    assert change == Change((flag("a", 3),), (flag("a", 3),), replace=True)
    after, change = before.apply(named(flag("a", 6), flag("c", 1)))
    assert change == Change((flag("a", 6), flag("c", 1)), (flag("a", 6), flag("c", 1)))
    assert before.apply(named(flag("a", 5))) == (before, None)
    assert before.apply(named()) == (before, None)
    assert before.apply(named(flag("a", 6), flag("a", 5))) == (before, None)  # the last one counts


def test_where_upstream_names_its_data_tombstones_get_versions_of_their_items():
    """The next one: what upstream says is the version of its payload."""
    before = Payload.of([flag("a", 5), tombstone("gone", 7)])
    after, change = before.apply(
        named(tombstone("a", 0), tombstone("gone", 0), tombstone("new", 0))
    )
    assert change == Change((tombstone("a", 6), tombstone("new", 0)), (tombstone("a", 6),))
    assert after.apply(named(tombstone("a", 0), tombstone("new", 0))) == (after, None)
    _, change = after.apply(named(flag("new", 1)))
    assert not change.replace
    _, change = after.apply(named(flag("a", 6)))  # created anew
    assert change.replace


@pytest.mark.parametrize(
    ("before", "after", "steps"),
    [
        ("(p:P:7)", "(p:P:9)", 2),
        ("(p:P:9)", "(p:P:7)", -2),
        ("(p:P:7)", "(p:P:7)", 0),
        ("(p:P:7)", "(p:Q:9)", None),
        ("(p:rx-aa:7)", "(p:rx-bb:9)", None),
        ("", "(p:P:7)", None),
        ("(p:P:7)", "elsewhere", None),
        ("(p:P:x)", "(p:P:7)", None),
    ],
)
def test_names_of_one_payload_have_an_order(before, after, steps):
    """Addresses of contents have none, whatever their numbers are."""
    assert distance(before, after) == steps


@given(st.lists(items, max_size=8), consistent)
def test_exact_items_are_taken_as_they_are(before, drawn):
    """Tombstones too: another relay has numbered them already."""
    latest = {(item.kind, item.key): item for item in drawn}
    held = Payload.of(before)
    for selector in (None, Selector("(p:P:1)", "P", 1)):
        changes = ChangeSet(tuple(latest.values()), selector=selector, exact=True)
        after, change = held.apply(changes)
        assert contents(after) == contents(held) | latest
        different = [
            item for item in latest.values() if contents(held).get((item.kind, item.key)) != item
        ]
        assert (change.items if change else ()) == tuple(different)
