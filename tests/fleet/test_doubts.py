"""Items that upstream seems to have taken back."""

from __future__ import annotations

from relay.fleet.doubts import Doubts
from relay.model.item import InvalidItem, Item, Kind
from relay.model.payload import ChangeSet, Payload


def item(key: str, version: int, *, deleted: bool = False) -> Item:
    return Item(Kind.FLAG, key, version, None if deleted else b"{}")


def full(*items: Item, invalid: tuple[InvalidItem, ...] = ()) -> ChangeSet:
    return ChangeSet(items, full=True, invalid=invalid)


HELD = Payload.of([item("a", 5), item("b", 2), item("gone", 3, deleted=True)])


def resolved(doubts: Doubts, changes: ChangeSet, now: float) -> dict[str, tuple[int, bool]]:
    result = doubts.resolve(HELD, changes, now)
    assert result.full
    return {each.key: (each.version, each.deleted) for each in result.items}


def test_the_first_answer_takes_nothing_back() -> None:
    """A server that lags behind must not undo what clients have seen."""
    doubts = Doubts(15.0)
    found = resolved(doubts, full(item("a", 4), item("c", 1)), 100.0)
    assert found == {"a": (5, False), "b": (2, False), "c": (1, False), "gone": (3, True)}
    assert doubts.recheck_at == 115.0


def test_a_newer_answer_is_not_doubted() -> None:
    """Where names tell the order, versions of items may go back: an item was created anew."""
    doubts = Doubts(15.0)
    doubts.resolve(HELD, full(item("b", 1)), 100.0)
    result = doubts.accept(HELD, full(item("a", 1)))
    found = {each.key: (each.version, each.deleted) for each in result.items}
    assert found == {"a": (1, False), "b": (3, True), "gone": (3, True)}
    assert doubts.recheck_at is None


def test_a_second_answer_later_does() -> None:
    """An answer that upstream gives twice is true; a vanished item leaves a tombstone."""
    doubts = Doubts(15.0)
    resolved(doubts, full(item("a", 4)), 100.0)
    assert resolved(doubts, full(item("a", 4)), 114.0)["a"] == (5, False)
    found = resolved(doubts, full(item("a", 4)), 115.0)
    assert found == {"a": (4, False), "b": (3, True), "gone": (3, True)}
    assert doubts.recheck_at is None


def test_a_current_answer_ends_doubts() -> None:
    """Only answers that agree count, not two that happen to be wrong at long intervals."""
    doubts = Doubts(15.0)
    resolved(doubts, full(item("a", 4), item("b", 2)), 100.0)
    resolved(doubts, full(item("a", 5), item("b", 2)), 105.0)
    assert resolved(doubts, full(item("a", 4), item("b", 2)), 116.0)["a"] == (5, False)


def test_a_change_ends_doubts_about_its_item() -> None:
    """A server that has caught up may lag again later."""
    doubts = Doubts(15.0)
    resolved(doubts, full(item("a", 4), item("b", 2)), 100.0)
    doubts.settle([item("a", 6)])
    assert doubts.recheck_at is None


def test_a_deleted_item_may_come_back_with_a_smaller_version() -> None:
    """A flag that was made anew begins at 1; it is doubted, then served."""
    doubts, answer = Doubts(15.0), full(item("a", 5), item("b", 2), item("gone", 1))
    assert resolved(doubts, answer, 100.0)["gone"] == (3, True)
    assert resolved(doubts, answer, 116.0)["gone"] == (1, False)


def test_unusable_items_are_left_to_the_environment() -> None:
    """It keeps their previous versions anyway."""
    doubts = Doubts(15.0)
    bad = InvalidItem(Kind.FLAG, "a", "broken")
    assert "a" not in resolved(doubts, full(item("b", 2), invalid=(bad,)), 100.0)
    assert doubts.recheck_at is None
