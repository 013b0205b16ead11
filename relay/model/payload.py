"""The data of an environment at one moment, and how changes make the next moment.

A payload is immutable and shares structure with its predecessor (a hash array mapped trie), so a
change costs work in proportion to the change, not to the environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from immutables import Map

from relay.model.item import InvalidItem, Item, Kind

Items = Map[str, Item]

SMALL_PAYLOAD = 64 * 1024
"""Up to this many bytes a new full data set goes to clients whole: cheap, and what they expect."""

SMALL_SHARE = 4
"""Above that, it goes out as patches if these are at most a quarter of the payload."""


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """Items to apply: the only currency between source, environment, hub and store.

    Args:
        items: what is new.
        full: whether these are all items (replacing everything, whatever the versions: streams
            2.6), or some that changed (each applied if its version is greater).
        invalid: items that were received but cannot be used; they keep their previous version.
    """

    items: tuple[Item, ...]
    full: bool = False
    invalid: tuple[InvalidItem, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """What really changed between two payloads.

    Args:
        items: the items that differ now, tombstones included: what a store must write.
        visible: those that a client can notice; the tombstone of an unknown key is not among them.
        replace: clients and stores need the whole payload; patches would not lead them there,
            because items vanished or went back in version, or would not be worth it.
    """

    items: tuple[Item, ...]
    visible: tuple[Item, ...]
    replace: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Payload:
    """All items of an environment, tombstones included."""

    flags: Items
    segments: Items
    size: int
    """Bytes of JSON of the live items."""
    newest: int
    """No item has a greater version."""

    @classmethod
    def of(cls, items: Iterable[Item]) -> Payload:
        """Return the payload that holds just these items; the last of a key counts."""
        by_kind: dict[Kind, dict[str, Item]] = {Kind.FLAG: {}, Kind.SEGMENT: {}}
        for item in items:
            by_kind[item.kind][item.key] = item
        flags, segments = by_kind[Kind.FLAG], by_kind[Kind.SEGMENT]
        size = sum(map(_size, flags.values())) + sum(map(_size, segments.values()))
        versions = (item.version for items in by_kind.values() for item in items.values())
        return cls(Map(flags), Map(segments), size, max(versions, default=0))

    def all(self, kind: Kind) -> Items:
        """Return all items of a kind by key, tombstones included."""
        return self.flags if kind is Kind.FLAG else self.segments

    def live(self, kind: Kind) -> Iterator[Item]:
        """Yield the items of a kind that are not deleted, in no particular order."""
        return (item for item in self.all(kind).values() if item.json is not None)

    def get(self, kind: Kind, key: str) -> Item | None:
        """Return a live item, or None."""
        item = self.all(kind).get(key)
        return None if item is None or item.deleted else item

    def __len__(self) -> int:
        """Return the number of items, tombstones included."""
        return len(self.flags) + len(self.segments)

    def __iter__(self) -> Iterator[Item]:
        """Yield all items, tombstones included; segments first, as stores write them."""
        yield from self.segments.values()
        yield from self.flags.values()

    def apply(self, changes: ChangeSet) -> tuple[Payload, Change | None]:
        """Return the next payload and what really changed; None if nothing did."""
        if changes.full:
            return self._replaced(changes)
        newer = [item for item in _newest(changes.items) if self._is_news(item)]
        if not newer:
            return self, None
        return self._updated(newer), Change(tuple(newer), tuple(filter(self._shows, newer)))

    def is_newer_than(self, other: Payload) -> bool:
        """Whether more items are ahead of `other`, by version, than behind it."""
        return self._ahead_of(other) > other._ahead_of(self)

    def _ahead_of(self, other: Payload) -> int:
        return sum(map(other._is_news, self))

    def _shows(self, item: Item) -> bool:
        return not item.deleted or self.get(item.kind, item.key) is not None

    def _is_news(self, item: Item) -> bool:
        known = self.all(item.kind).get(item.key)
        return known is None or item.version > known.version

    def _updated(self, items: Sequence[Item]) -> Payload:
        after = self
        for item in items:
            before = after.all(item.kind).get(item.key)
            size = after.size + _size(item) - (_size(before) if before else 0)
            changed = after.all(item.kind).set(item.key, item)
            is_flag = item.kind is Kind.FLAG
            after = Payload(
                flags=changed if is_flag else after.flags,
                segments=after.segments if is_flag else changed,
                size=size,
                newest=max(after.newest, item.version),
            )
        return after

    def _replaced(self, changes: ChangeSet) -> tuple[Payload, Change | None]:
        kept = (self.all(bad.kind).get(bad.key) for bad in changes.invalid)
        after = Payload.of([*(item for item in kept if item), *changes.items])
        different = tuple(item for item in after if self.all(item.kind).get(item.key) != item)
        vanished = any(not item.deleted and item.key not in after.all(item.kind) for item in self)
        if not different and not vanished:
            return self, None
        patches_suffice = not vanished and all(map(self._is_news, different))
        large = after.size > SMALL_PAYLOAD
        cheap = large and sum(map(_size, different)) * SMALL_SHARE <= after.size
        visible = tuple(filter(self._shows, different))
        return after, Change(different, visible, replace=not (patches_suffice and cheap))


EMPTY = Payload(Map(), Map(), 0, 0)


def _newest(items: Sequence[Item]) -> Iterable[Item]:
    """Return the newest version of each item, should several be among them."""
    if len(items) == 1:
        return items
    newest: dict[tuple[Kind, str], Item] = {}
    for item in items:
        known = newest.setdefault((item.kind, item.key), item)
        if item.version > known.version:
            newest[item.kind, item.key] = item
    return newest.values()


def _size(item: Item) -> int:
    return len(item.json) if item.json is not None else 0
