"""The data of an environment at one point in time, and the changes that lead to the next.

A payload is immutable and shares structure with its predecessor (a hash array mapped trie), so the
cost of a change is proportional to the change, not to the environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from immutables import Map
from msgspec import Struct
from msgspec.structs import replace

from relay.model.item import InvalidItem, Item, Kind

Items = Map[str, Item]

SMALL_PAYLOAD = 64 * 1024
"""Bytes up to which a new full data set is sent to clients whole: cheap, and what they expect."""

SMALL_SHARE = 4
"""Divisor: a larger data set is sent as patches if they are at most a quarter of the payload."""


class Selector(Struct, frozen=True):
    """Name of one content, as its clients get it (fdv2 13.2.5).

    Args:
        state: what a client sends back as its basis; empty if there is none.
        id: of the payload.
        version: of the payload.
        verbatim: False if something that upstream sent is left out or held back here, so that its
            name must not stand for the data that clients of this relay get.
    """

    state: str = ""
    id: str = ""
    version: int = 1
    verbatim: bool = True


_STATE = re.compile(r"\(p:([^():]+):([0-9]{1,20})\)")
"""State with the ID of a payload, and a number that grows with its changes (fdv2 13.2.5)."""


def distance(before: str, after: str) -> int | None:
    """Return by how much a state is newer than another; negative if it is older.

    Args:
        before: name of the other content.
        after: name of the one content.

    Returns:
        None if the names do not tell, as those of different payloads. Addresses of contents never
        do, because the content is in the ID of their payload.
    """
    first, second = _STATE.fullmatch(before), _STATE.fullmatch(after)
    if first is None or second is None or first[1] != second[1]:
        return None
    return int(second[2]) - int(first[2])


class ChangeSet(Struct, frozen=True):
    """Items received from a source, to be applied to a payload.

    Args:
        items: the new or changed items.
        full: True if these are all items, which replace the payload regardless of versions
            (streams 2.6).
        invalid: items that were received but are unusable; their previous versions are kept.
        selector: name of the data after it; None if upstream gives no names (FDv1). If it does,
            each item replaces the one before whatever its version, and the versions of tombstones
            mean nothing (fdv2 13.2.2); else an item is applied if its version is greater.
        since: name of the data before it; empty if upstream does not tell.
        evaluations: version of what is evaluated with them, if another process has chosen it, so
            that clients see the same one everywhere; 0 to choose one.
        exact: True if they come from another relay that has applied them already: each replaces the
            one before as it is, tombstones included, and the selector stands for all data.
    """

    items: tuple[Item, ...]
    full: bool = False
    invalid: tuple[InvalidItem, ...] = ()
    selector: Selector | None = None
    since: str = ""
    evaluations: int = 0
    exact: bool = False


class Change(Struct, frozen=True):
    """The actual difference between two payloads.

    Args:
        items: the items that differ, tombstones included; a store has to write all of them.
        visible: those that clients can notice: all but tombstones of unknown keys.
        replace: clients and stores need the whole payload, because items vanished or went back
            in version, which patches cannot express, or because patches would not be cheaper.
        vanished: items of the former payload that the new one does not have, tombstones included.
    """

    items: tuple[Item, ...]
    visible: tuple[Item, ...]
    replace: bool = False
    vanished: tuple[Item, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of JSON of the items that differ."""
        return sum(map(_size, self.items))


class Payload(Struct, frozen=True, eq=False):
    """All items of an environment, tombstones included."""

    flags: Items
    segments: Items
    size: int
    """Bytes of JSON of the live items."""
    newest: int
    """Greatest version of all items; 0 if there are none."""

    def __repr__(self) -> str:
        flags, segments = len(self.flags), len(self.segments)
        return f"<Payload of {flags} flags and {segments} segments, newest version {self.newest}>"

    @classmethod
    def of(cls, items: Iterable[Item]) -> Payload:
        """Return the payload with exactly these items; the last one of a key wins."""
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
        """Return a live item; None if it does not exist or is deleted."""
        item = self.all(kind).get(key)
        return None if item is None or item.deleted else item

    def __len__(self) -> int:
        """Return the number of items, tombstones included."""
        return len(self.flags) + len(self.segments)

    def __iter__(self) -> Iterator[Item]:
        """Yield all items, tombstones included; segments first, the order of writes to a store."""
        yield from self.segments.values()
        yield from self.flags.values()

    def apply(self, changes: ChangeSet) -> tuple[Payload, Change | None]:
        """Return the next payload and the actual change; None if nothing changed."""
        if changes.full:
            return self._replace_all(changes)
        if changes.exact:
            return self._replace_some(changes.items)
        if changes.selector is not None:
            return self._replace_some(map(self._numbered, _latest(changes.items)))
        newer = [item for item in _newest(changes.items) if self._is_newer(item)]
        if not newer:
            return self, None
        return self.with_items(newer), Change(tuple(newer), tuple(filter(self._is_visible, newer)))

    def is_newer_than(self, other: Payload) -> bool:
        """Return whether more items are newer than in `other`, by version, than older."""
        return self._count_newer(other) > other._count_newer(self)

    def _count_newer(self, other: Payload) -> int:
        return sum(map(other._is_newer, self))

    def _is_visible(self, item: Item) -> bool:
        return not item.deleted or self.get(item.kind, item.key) is not None

    def _is_newer(self, item: Item) -> bool:
        known = self.all(item.kind).get(item.key)
        return known is None or item.version > known.version

    def with_items(self, items: Iterable[Item]) -> Payload:
        """Return the payload with these items in place of those of their keys, newer or not."""
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

    def _replace_some(self, items: Iterable[Item]) -> tuple[Payload, Change | None]:
        different = [item for item in items if self.all(item.kind).get(item.key) != item]
        if not different:
            return self, None
        visible = tuple(filter(self._is_visible, different))
        change = Change(tuple(different), visible, replace=not all(map(self._is_newer, different)))
        return self.with_items(different), change

    def _numbered(self, item: Item) -> Item:
        """Return an item; a tombstone with the version after its item's (fdv2 13.8.4)."""
        if not item.deleted:
            return item
        known = self.all(item.kind).get(item.key)
        if known is None:
            return Item(item.kind, item.key, 0, None)
        return known if known.deleted else Item(item.kind, item.key, known.version + 1, None)

    def _replace_all(self, changes: ChangeSet) -> tuple[Payload, Change | None]:
        retained = (self.all(invalid.kind).get(invalid.key) for invalid in changes.invalid)
        after = Payload.of([*(item for item in retained if item), *changes.items])
        different: list[Item] = []
        visible: list[Item] = []
        added, are_newer = 0, True
        # One pass over both, because a put of many items holds the event loop.
        for before, items in ((self.segments, after.segments), (self.flags, after.flags)):
            for key, item in items.items():
                known = before.get(key)
                if known is None:
                    added += 1
                elif known == item:
                    continue
                elif item.version <= known.version:
                    are_newer = False
                different.append(item)
                if item.json is not None or (known is not None and known.json is not None):
                    visible.append(item)
        vanished: tuple[Item, ...] = ()
        if len(after) - added < len(self):
            vanished = tuple(item for item in self if item.key not in after.all(item.kind))
        has_lost = not all(item.deleted for item in vanished)
        if not different and not has_lost:
            return self, None
        change = Change(tuple(different), tuple(visible), replace=True, vanished=vanished)
        large = after.size > SMALL_PAYLOAD
        if not has_lost and are_newer and large and change.size * SMALL_SHARE <= after.size:
            change = replace(change, replace=False)
        return after, change


EMPTY = Payload(Map(), Map(), 0, 0)


def _latest(items: Iterable[Item]) -> Iterable[Item]:
    """Return only the last value of each item."""
    return {(item.kind, item.key): item for item in items}.values()


def _newest(items: Sequence[Item]) -> Iterable[Item]:
    """Return only the newest version of each item."""
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
