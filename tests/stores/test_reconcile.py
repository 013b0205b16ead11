"""Decisions that make a database equal to a payload: tables, without a database."""

from __future__ import annotations

import pytest

from relay.model.item import Kind
from relay.model.payload import EMPTY, Payload
from relay.stores import UNREADABLE, Version
from relay.stores.conflicts import NEVER, ConflictTimings
from relay.stores.reconcile import Difference, Reconciler, Repair
from tests.stores.contract import flag, segment

LAMP, GONE, CROWD = (Kind.FLAG, "lamp"), (Kind.FLAG, "gone"), (Kind.SEGMENT, "crowd")
EXTRA, OTHER = (Kind.FLAG, "extra"), (Kind.SEGMENT, "lamp")
PAYLOAD = Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)])
EQUAL = {LAMP: Version(3, True), GONE: Version(4, False), CROWD: Version(5, True)}


def live(number: int) -> Version:
    return Version(number, live=True)


@pytest.mark.parametrize(
    ("stored", "outdated", "ahead", "extra"),
    [
        ({}, "crowd gone lamp", [], []),
        (EQUAL, "", [], []),
        (EQUAL | {LAMP: live(2)}, "lamp", [], []),
        (EQUAL | {LAMP: Version(2, live=False)}, "lamp", [], []),
        (EQUAL | {LAMP: UNREADABLE}, "lamp", [], []),
        (EQUAL | {LAMP: live(9)}, "", [LAMP], []),
        (EQUAL | {GONE: live(9)}, "", [GONE], []),
        (EQUAL | {GONE: live(4)}, "", [], []),  # other programs may serialise an item otherwise
        (EQUAL | {EXTRA: live(1)}, "", [], [EXTRA]),
        (EQUAL | {OTHER: live(1)}, "", [], [OTHER]),  # a key of another kind is another item
        (EQUAL | {EXTRA: Version(1, live=False)}, "", [], []),  # nobody sees a tombstone
        (EQUAL | {EXTRA: UNREADABLE}, "", [], [EXTRA]),
        ({EXTRA: live(1), LAMP: live(9)}, "crowd gone", [LAMP], [EXTRA]),
    ],
)
def test_a_difference_is_found_by_versions(stored, outdated, ahead, extra):
    """Missing, older and unreadable items are outdated; newer and surplus ones are named."""
    difference = Difference.between(stored, PAYLOAD)
    assert " ".join(sorted(item.key for item in difference.outdated)) == outdated
    assert (list(difference.ahead), list(difference.extra)) == (ahead, extra)


class Upstream:
    """A reconciler whose upstream sends all data half a second after each question."""

    def __init__(self, timings: ConflictTimings = ConflictTimings()) -> None:
        self.reconciler = Reconciler(timings)
        self.last_full_at = 0.0

    def decide(self, now, stored, payload=PAYLOAD, unusable=()) -> Repair:
        repair = self.reconciler.decide(now, stored, payload, unusable, self.last_full_at)
        if repair.verdict.ask:
            self.last_full_at = now + 0.5
        return repair


@pytest.mark.parametrize(
    ("stored", "unusable", "outdated", "surplus", "kept"),
    [
        (EQUAL, (), 0, (), ()),
        (EQUAL | {LAMP: live(2)}, (), 1, (), ()),
        (EQUAL | {LAMP: live(9)}, (), 0, (), (LAMP,)),
        (EQUAL | {EXTRA: live(1)}, (), 0, (), (EXTRA,)),
        (EQUAL | {EXTRA: live(1)}, (EXTRA,), 0, (), (EXTRA,)),
        (EQUAL | {LAMP: live(9), CROWD: live(1)}, (), 1, (), (LAMP,)),
    ],
)
def test_at_first_sight_only_outdated_items_are_written(stored, unusable, outdated, surplus, kept):
    """Items of which another writer may know more stay."""
    repair = Upstream().decide(1.0, stored, unusable=unusable)
    assert len(repair.outdated) == outdated
    assert (repair.surplus, repair.kept) == (frozenset(surplus), frozenset(kept))
    assert (repair.replaces, repair.fill, len(repair.changed)) == (False, False, outdated)


@pytest.mark.parametrize("known", [EMPTY, PAYLOAD])
def test_a_database_without_marker_is_filled(known):
    """It has lost its data only if this relay has filled it before."""
    reconciler = Reconciler()
    reconciler.record(known)
    repair = reconciler.decide(1.0, None, PAYLOAD)
    assert (repair.fill, repair.replaces, repair.lost) == (True, True, known is PAYLOAD)
    assert not repair.surplus


@pytest.mark.parametrize("stored", [EQUAL | {LAMP: live(9)}, EQUAL | {EXTRA: live(7)}])
def test_what_this_relay_wrote_goes_back_with_upstream(stored):
    """At once, as nobody else can have written it."""
    reconciler = Reconciler()
    reconciler.record(Payload.of([flag("lamp", 9), flag("extra", 7), segment("crowd", 5)]))
    repair = reconciler.decide(1.0, stored, PAYLOAD)
    assert repair.surplus == stored.keys() - {k for k, v in stored.items() if EQUAL.get(k) == v}
    assert repair.replaces
    assert reconciler.settled


@pytest.mark.parametrize("contested", [{LAMP: live(9)}, {EXTRA: live(7)}, {EXTRA: UNREADABLE}])
def test_what_upstream_disowns_twice_is_replaced(contested):
    """Upstream is asked twice, at least 15 s apart; the replacement is known when it comes back."""
    upstream, stored = Upstream(), EQUAL | contested
    (key,) = contested
    first = upstream.decide(1.0, stored)
    assert (first.verdict.ask, first.kept) == (frozenset(), {key})
    assert not upstream.reconciler.settled
    assert upstream.reconciler.has_conflicts
    assert upstream.decide(2.0, stored).verdict.ask == {key}
    assert upstream.decide(17.4, stored).surplus == frozenset()
    assert upstream.decide(17.5, stored).verdict.ask == {key}
    final = upstream.decide(18.0, stored)
    assert (final.surplus, final.kept, final.verdict.replace) == ({key}, frozenset(), {key})
    upstream.reconciler.record(PAYLOAD, final)
    assert upstream.decide(19.0, EQUAL).surplus == frozenset()
    assert not upstream.reconciler.has_conflicts
    again = upstream.decide(30.0, stored)
    assert (again.verdict.returned, again.verdict.wait) == ({key}, 30.0)


def test_items_that_are_unusable_upstream_are_never_replaced():
    """Nobody knows which version upstream has."""
    upstream, stored = Upstream(), EQUAL | {LAMP: live(9), EXTRA: live(1)}
    replaced: set[object] = set()
    for second in range(1, 200):
        repair = upstream.decide(float(second), stored, unusable=(LAMP,))
        assert LAMP in repair.kept
        replaced |= repair.surplus
    assert replaced == {EXTRA}


def test_a_run_that_never_replaces_newer_items_is_settled():
    """Once upstream has answered: it does not wait for what will not happen."""
    upstream = Upstream(ConflictTimings(second_look=0.1, refresh=1.0, newer=NEVER))
    stored = EQUAL | {LAMP: live(9)}
    upstream.decide(1.0, stored)
    upstream.decide(1.1, stored)
    repair = upstream.decide(2.0, stored)
    assert (repair.kept, upstream.reconciler.settled) == ({LAMP}, True)


def test_the_repr_states_what_is_known():
    assert repr(Reconciler()) == "<Reconciler of 0 items, <Conflicts open=0 doublings=0>>"
