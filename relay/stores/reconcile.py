"""Decides how to make a database equal to a payload, from the versions of its items; pure.

Missing and older items are written. An item that is *newer* in the database, or only there, may
mean that this relay is behind and another relay has written it. To keep relays from overwriting
each other, such items stay untouched until `conflicts` decides that upstream has disowned them.
Items of equal version are not compared: other programs serialise the same item differently.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from relay.model.item import Item
from relay.model.payload import EMPTY, Payload
from relay.stores import Key, Version, Versions
from relay.stores.conflicts import NEVER, Conflicts, ConflictTimings, Verdict


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference between a database and a payload.

    Args:
        outdated: items that are missing, older or unreadable in the database.
        ahead: keys of items that are newer in the database.
        extra: keys of live or unreadable items that only the database has.
    """

    outdated: tuple[Item, ...] = ()
    ahead: tuple[Key, ...] = ()
    extra: tuple[Key, ...] = ()

    @classmethod
    def between(cls, versions: Versions, payload: Payload) -> Difference:
        """Compare the versions of all items."""
        outdated: list[Item] = []
        ahead: list[Key] = []
        for item in payload:
            key = item.kind, item.key
            stored = versions.get(key)
            if stored is None or stored.number < item.version:
                outdated.append(item)
            elif stored.number > item.version:
                ahead.append(key)
        extra = (
            (kind, key)
            for (kind, key), stored in versions.items()
            if key not in payload.all(kind) and (stored.live or stored.number < 0)
        )
        return cls(tuple(outdated), tuple(ahead), tuple(extra))


@dataclass(frozen=True, slots=True)
class Repair:
    """Actions that make a database equal to a payload.

    Args:
        outdated: items that are missing or older in the database.
        surplus: keys of items of the database to replace or remove.
        kept: keys of items that stay as they are in the database.
        fill: True if the database is not marked as initialised.
        lost: True if it was before, so its data are lost.
        verdict: decision about items of other writers; `surplus` has those to replace.
    """

    outdated: tuple[Item, ...]
    surplus: frozenset[Key]
    kept: frozenset[Key]
    fill: bool
    lost: bool
    verdict: Verdict

    @property
    def replaces(self) -> bool:
        """True if everything must be written: upserts make no item older, and remove none."""
        return self.fill or bool(self.surplus)

    @property
    def changed(self) -> frozenset[Key]:
        """Keys of the items that are written, replaced or removed."""
        return self.surplus.union((item.kind, item.key) for item in self.outdated)


class Reconciler:
    """Decides about one database. All times are seconds of one clock.

    Args:
        timings: delays before items that another writer may have written are replaced.
    """

    def __init__(self, timings: ConflictTimings = ConflictTimings()) -> None:
        self._conflicts = Conflicts(timings)
        self._known = EMPTY
        """Content of the database after the last successful write or comparison."""
        self.settled = True
        """True if no conflict is open, or the open ones are final."""

    def __repr__(self) -> str:
        return f"<Reconciler of {len(self._known)} items, {self._conflicts!r}>"

    @property
    def has_conflicts(self) -> bool:
        """True if any conflict is open."""
        return bool(self._conflicts)

    def decide(
        self,
        now: float,
        versions: Versions | None,
        payload: Payload,
        unusable: Collection[Key] = (),
        last_full_at: float = -NEVER,
    ) -> Repair:
        """Compare a database with upstream's data.

        Args:
            now: time at which the versions were read.
            versions: versions of the stored items; None if the database was never initialised.
            payload: upstream's data, at the latest those of `last_full_at`.
            unusable: keys of items whose upstream version is unknown.
            last_full_at: time at which upstream last sent all data.
        """
        stored = versions or {}
        difference = Difference.between(stored, payload)
        conflicting = frozenset((*difference.ahead, *difference.extra))
        foreign = {
            key: stored[key]
            for key in conflicting.difference(unusable)
            if not self._is_own(key, stored[key])
        }
        verdict = self._conflicts.judge(now, foreign, difference.extra, last_full_at)
        self.settled = verdict.settled
        kept = conflicting.intersection(unusable) | (foreign.keys() - verdict.replace)
        return Repair(
            outdated=difference.outdated,
            surplus=conflicting - kept,
            kept=kept,
            fill=versions is None,
            lost=versions is None and len(self._known) > 0,
            verdict=verdict,
        )

    def record(self, payload: Payload, repair: Repair | None = None) -> None:
        """Record a successful write: of a repair, or of changes alone."""
        self._known = payload
        if repair is not None and repair.verdict.replace:
            self._conflicts.replaced(repair.verdict.replace)

    def _is_own(self, key: Key, stored: Version) -> bool:
        """Return whether this relay wrote the stored version, so upstream itself has gone back."""
        kind, item_key = key
        known = self._known.all(kind).get(item_key)
        return known is not None and known.version == stored.number
