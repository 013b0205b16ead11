"""Data with their address, and in which order two data are; pure.

The address covers tombstones, too: a member that lacks one could be made to take an item back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from hashlib import blake2b
from typing import Self

from msgspec import Struct

from relay.model.item import Item
from relay.model.payload import EMPTY, Payload
from relay.steps import Steps
from relay.stores import Key

_SIZE = 16
_MODULUS = 1 << 8 * _SIZE


class Contents(Struct, frozen=True, eq=False):
    """Data and the sum of the digests of all items, so that a change costs what it changes."""

    payload: Payload
    total: int

    def __repr__(self) -> str:
        return f"<Contents {self.selector[:8]}, {len(self.payload)} items>"

    @property
    def selector(self) -> str:
        """Address of the data: equal for equal items, on all members."""
        return f"{self.total:0{2 * _SIZE}x}"

    @classmethod
    def of(cls, payload: Payload) -> Steps[Self]:
        """Return a payload with its address, with a step for each item."""
        total = 0
        for item in payload:
            total += _digest(item)
            yield
        return cls(payload, total % _MODULUS)

    def with_items(self, items: Iterable[Item]) -> Contents:
        """Return the data after some items have got new values, newer or not."""
        total, payload = self.total, self.payload
        items = tuple(items)
        for item in items:
            before = payload.all(item.kind).get(item.key)
            total += _digest(item) - (_digest(before) if before is not None else 0)
        return Contents(payload.with_items(items), total % _MODULUS)


NOTHING = Contents(EMPTY, 0)


def _digest(item: Item) -> int:
    head = f"{item.kind.value}\0{item.key}\0{item.version}\0".encode()
    digest = blake2b(head, digest_size=_SIZE)
    if item.json is not None:
        digest.update(b"\1")
        digest.update(item.json)
    return int.from_bytes(digest.digest(), "big")


def is_at_least_as_new(payload: Payload, other: Payload, *, lacking: bool = False) -> bool:
    """Return whether a payload has every item of another, in the same or a greater version.

    Args:
        payload: maybe the newer one.
        other: maybe the older one.
        lacking: True if the payload may lack items of the other.
    """
    return next(items_behind(payload, other, lacking=lacking), None) is None


def items_behind(payload: Payload, other: Payload, *, lacking: bool = False) -> Iterator[Item]:
    """Yield the items of another payload that a payload has not, or in a smaller version.

    The versions of tombstones are not compared: those of items that upstream has ceased to list are
    guessed, each by who has seen that.

    Args:
        payload: maybe the older one.
        other: maybe the newer one.
        lacking: True if the payload may lack items of the other.
    """
    for item in other:
        known = payload.all(item.kind).get(item.key)
        if known is None:
            if not lacking:
                yield item
        elif known.version < item.version and not (known.deleted and item.deleted):
            yield item


def has_equal_items(payload: Payload, other: Payload) -> bool:
    """Return whether two payloads have the same items."""
    return len(payload) == len(other) and all(
        other.all(item.kind).get(item.key) == item for item in payload
    )


def newer_items(payload: Payload, held: Payload) -> list[Item]:
    """Return the items that are newer in a payload, or only there."""
    return [
        item
        for item in payload
        if (known := held.all(item.kind).get(item.key)) is None or known.version < item.version
    ]


def different_items(
    before: Payload, after: Payload, among: Collection[Key] | None = None
) -> Steps[list[Item]]:
    """Return the items of a payload that differ from those before, with a step for each item.

    Args:
        before: the earlier data.
        after: the later data.
        among: items that may differ; None for all.
    """
    candidates: Iterable[Item | None] = after
    if among is not None:
        candidates = (after.all(kind).get(key) for kind, key in among)
    different = []
    for item in candidates:
        if item is None:
            continue
        known = before.all(item.kind).get(item.key)
        if known is not item and known != item:
            different.append(item)
        yield
    return different
