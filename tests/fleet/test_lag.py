"""For how long the feed is waited for."""

from __future__ import annotations

from relay.fleet.lag import LIMIT, Lag
from relay.model.item import Item, Kind
from relay.model.payload import Payload

PATIENCE = 10.0


def item(key: str, version: int) -> Item:
    return Item(Kind.FLAG, key, version, b"{}")


def is_over(lag: Lag, at: float, *held: Item, feed: tuple[Item, ...] = ()) -> bool:
    return lag.is_over(held, Payload.of(feed), at)


def test_an_item_is_waited_for():
    """Only for so long, from when it was first missed."""
    lag = Lag(PATIENCE)
    assert not lag
    assert not is_over(lag, 100.0, item("a", 2))
    assert lag
    assert not is_over(lag, 109.9, item("a", 2))
    assert is_over(lag, 110.0, item("a", 2))


def test_an_item_that_has_come_meanwhile_has_its_own_time():
    """The first one has arrived; the second is not to be taken back for its sake."""
    lag = Lag(PATIENCE)
    assert not is_over(lag, 100.0, item("a", 2))
    assert not is_over(lag, 108.0, item("a", 2), item("b", 2))
    assert not is_over(lag, 110.0, item("b", 2))
    assert is_over(lag, 118.0, item("b", 2))


def test_an_item_that_moves_on_is_waited_for_again():
    """The feed has reached what it had to, and the member is further by then."""
    lag = Lag(PATIENCE)
    assert not is_over(lag, 100.0, item("a", 2))
    assert not is_over(lag, 109.0, item("a", 3), feed=(item("a", 2),))
    assert not is_over(lag, 118.0, item("a", 3), feed=(item("a", 2),))
    assert is_over(lag, 119.0, item("a", 3), feed=(item("a", 2),))


def test_a_feed_that_always_lags_is_not_waited_for_without_end():
    """One item stays behind, another one does again and again."""
    lag = Lag(PATIENCE)
    for second in range(int(LIMIT * PATIENCE)):
        busy, stored = item("busy", second + 2), item("busy", second + 1)
        assert not is_over(lag, 100.0 + second, item("a", 2), busy, feed=(stored,))
    assert is_over(lag, 100.0 + LIMIT * PATIENCE, item("a", 2), item("busy", 99))


def test_nothing_is_remembered_of_a_lag_that_has_ended():
    """A member that falls behind again begins again."""
    lag = Lag(PATIENCE)
    assert not is_over(lag, 100.0, item("a", 2))
    lag.end()
    assert not lag
    assert not is_over(lag, 111.0, item("a", 2))


def test_a_name_is_waited_for_as_items_are():
    """Again if the feed has reached the one that was missed first, or names count anew."""
    lag = Lag(PATIENCE)
    assert not lag.is_over_in_name("(p:x:5)", "(p:x:3)", 100.0)
    assert lag
    assert not lag.is_over_in_name("(p:x:7)", "(p:x:4)", 109.9)
    assert lag.is_over_in_name("(p:x:7)", "(p:x:4)", 110.0)
    assert not lag.is_over_in_name("(p:x:7)", "(p:x:5)", 111.0)
    assert not lag.is_over_in_name("(p:y:9)", "(p:y:8)", 120.0)
    assert not lag.is_over_in_name("(p:y:9)", "(p:y:8)", 129.9)
    assert lag.is_over_in_name("(p:y:9)", "(p:y:8)", 130.0)
    lag.end()
    assert not lag
    assert not lag.is_over_in_name("(p:y:9)", "(p:y:8)", 130.0)
