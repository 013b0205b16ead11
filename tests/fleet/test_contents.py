"""Addresses of data, and their order."""

from __future__ import annotations

import pytest

from relay.fleet.contents import (
    NOTHING,
    Contents,
    different_items,
    is_at_least_as_new,
    newer_items,
)
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import finish


def item(key: str, version: int, json: bytes | None = b"{}", kind: Kind = Kind.FLAG) -> Item:
    return Item(kind, key, version, json)


def of(*items: Item) -> Contents:
    return finish(Contents.of(Payload.of(items)))


def test_the_address_is_that_of_the_content() -> None:
    """However the data came about, equal data have equal addresses."""
    one = of(item("a", 1), item("b", 2))
    other = NOTHING.with_items([item("b", 1)]).with_items([item("b", 2), item("a", 1)])
    assert one.selector == other.selector
    assert len(one.selector) == 32


@pytest.mark.parametrize(
    "other",
    [item("a", 2), item("a", 1, b"{ }"), item("a", 1, None), item("a", 1, kind=Kind.SEGMENT)],
)
def test_whatever_differs_changes_the_address(other: Item) -> None:
    """Version, bytes, deletion and kind all count."""
    assert of(item("a", 1)).selector != of(other).selector


def test_newer_data_have_all_in_no_smaller_version() -> None:
    """Data that have some newer and some older items are not newer."""
    held = of(item("a", 2), item("b", 2)).payload
    assert is_at_least_as_new(held, held)
    assert is_at_least_as_new(of(item("a", 3), item("b", 2), item("c", 1)).payload, held)
    assert not is_at_least_as_new(of(item("a", 3)).payload, held)
    assert not is_at_least_as_new(of(item("a", 3), item("b", 1)).payload, held)
    assert is_at_least_as_new(of(item("a", 2), item("b", 3, None)).payload, held)


def test_newer_data_may_lack_what_is_gone() -> None:
    """Whoever comes back with stored data has items that nobody lists any more."""
    held = of(item("a", 2), item("gone", 2)).payload
    assert is_at_least_as_new(of(item("a", 2)).payload, held, lacking=True)
    assert not is_at_least_as_new(of(item("a", 1)).payload, held, lacking=True)


def test_versions_of_tombstones_have_no_order() -> None:
    """Those of items that ceased to be listed are guessed by each relay."""
    assert is_at_least_as_new(of(item("a", 1, None)).payload, of(item("a", 2, None)).payload)
    assert not is_at_least_as_new(of(item("a", 1, None)).payload, of(item("a", 2)).payload)


def test_differences() -> None:
    """Items that differ are written; those that are newer are adopted."""
    held, other = Payload.of([item("a", 2), item("b", 2)]), Payload.of([item("a", 1), item("c", 1)])
    different = finish(different_items(held, other))
    assert {each.key: each.version for each in different} == {"a": 1, "c": 1}
    among = {(Kind.FLAG, "a"), (Kind.FLAG, "b"), (Kind.FLAG, "none")}
    assert finish(different_items(held, other, among)) == [item("a", 1)]
    assert newer_items(other, held) == [item("c", 1)]
