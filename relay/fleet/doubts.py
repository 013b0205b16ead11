"""Items that upstream seems to have taken back; pure.

LaunchDarkly's servers may lag behind the one that a former leader listened to. So a complete
answer that has an older version of an item than the fleet, or lacks it, is doubted until a second
one, some time later, says the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from relay.model.item import Item
from relay.model.payload import ChangeSet, Payload
from relay.stores import Key


class Doubts:
    """Doubted items of one environment.

    Args:
        patience: seconds between two answers that settle a doubt.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[Key, float] = {}
        """Time of the first answer that took each item back."""

    def __repr__(self) -> str:
        return f"<Doubts about {len(self._since)} items>"

    @property
    def recheck_at(self) -> float | None:
        """Time at which upstream should be asked for everything again; None without doubts."""
        return min(self._since.values()) + self._patience if self._since else None

    def forget(self) -> None:
        """Drop all doubts: another answers from now on."""
        self._since.clear()

    def settle(self, items: Iterable[Item]) -> None:
        """Drop the doubts about items of which upstream has just sent a change."""
        for item in items:
            self._since.pop((item.kind, item.key), None)

    def accept(self, held: Payload, changes: ChangeSet) -> ChangeSet:
        """Return what to make of a complete answer that is known to be newer: it is not doubted.

        Items that it does not list leave tombstones, as in `resolve`.
        """
        self._since.clear()
        return self._resolve(held, changes, 0.0, patience=0.0)

    def resolve(self, held: Payload, changes: ChangeSet, now: float) -> ChangeSet:
        """Return what to make of a complete answer: doubted items stay as they are held.

        An item that upstream has ceased to list leaves a tombstone, so that versions tell everybody
        which data are newer.
        """
        return self._resolve(held, changes, now, self._patience)

    def _resolve(self, held: Payload, changes: ChangeSet, now: float, patience: float) -> ChangeSet:
        answer = Payload.of(changes.items)
        unusable = {(bad.kind, bad.key) for bad in changes.invalid}
        since: dict[Key, float] = {}
        items = {(item.kind, item.key): item for item in changes.items}
        for item in self._taken_back(held, answer):
            key = item.kind, item.key
            if key in unusable:
                continue
            first = since[key] = self._since.get(key, now)
            if now - first < patience:
                items[key] = item
            elif key not in items:
                items[key] = Item(item.kind, item.key, item.version + 1, None)
                del since[key]
            else:
                del since[key]
        for item in held:
            if item.deleted and (item.kind, item.key) not in unusable:
                items.setdefault((item.kind, item.key), item)
        self._since = since
        return replace(changes, items=tuple(items.values()))

    def _taken_back(self, held: Payload, answer: Payload) -> Iterator[Item]:
        for item in held:
            known = answer.all(item.kind).get(item.key)
            if known is None and item.deleted:
                continue
            if known is None or known.version < item.version:
                yield item
