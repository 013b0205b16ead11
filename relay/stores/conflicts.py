"""Decides when upstream's data may replace items that are newer, or only exist, in the database.

Such an item may mean that this relay is behind and another relay has written it. Or it is a left-
over of another project, an old backup or a mistake, which SDKs in daemon mode would read forever.
The cases cannot be distinguished at once, so upstream is asked for all data. If two complete
responses, some time apart, still lack the item, it is replaced. If another relay restores it, the
delays double each time, so that two relays never fight.

This module only decides: it has no clock, event loop or database of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from relay.backoff import Backoff
from relay.stores import Key, Version

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class ConflictTimings:
    """Delays in seconds, all greater than 0.

    Args:
        second_look: delay before upstream is asked, so that a change which is on its way to this
            relay, too, can arrive.
        refresh: minimum delay between two requests for all data.
        newer: time between the two responses after which items that are newer in the database are
            replaced; `NEVER` keeps them.
        extra: the same for items that only the database has.
        longest: limit up to which `newer` and `extra` double with each replacement.
        forget: time without conflicts after which `newer` and `extra` are reset.
    """

    second_look: float = 1.0
    refresh: float = 60.0
    newer: float = 15.0
    extra: float = 15.0
    longest: float = 3600.0
    forget: float = 7200.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Decision about all conflicts.

    Args:
        replace: items to replace, because upstream has disowned them.
        ask: items about which to ask upstream now.
        returned: items that were replaced and have come back.
        wait: minimum seconds before the returned items may be replaced again.
        settled: True if the remaining conflicts are final.
        recheck_at: time of the next judgement, if nothing happens before.
    """

    replace: frozenset[Key] = frozenset()
    ask: frozenset[Key] = frozenset()
    returned: frozenset[Key] = frozenset()
    wait: float = 0.0
    settled: bool = True
    recheck_at: float = NEVER


@dataclass(slots=True)
class _Conflict:
    """One item in conflict.

    Args:
        version: version in the database.
        extra: True if upstream has no such item.
        first_seen: time at which the key was first in conflict.
        since: time at which this version was first in conflict.
        answered_at: time of the first complete response after `since`; None before.
    """

    version: Version
    extra: bool
    first_seen: float
    since: float
    answered_at: float | None = None


class Conflicts:
    """Open conflicts of one database. All times are seconds of one clock.

    Args:
        timings: delays.
    """

    def __init__(self, timings: ConflictTimings = ConflictTimings()) -> None:
        self._timings = timings
        self._open: dict[Key, _Conflict] = {}
        self._doublings = 0
        self._replaced: frozenset[Key] = frozenset()
        """Items of the last replacement that have not come back."""
        self._asked_at = -NEVER
        self._quiet_since: float | None = None

    def __repr__(self) -> str:
        return f"<Conflicts open={len(self._open)} doublings={self._doublings}>"

    def __bool__(self) -> bool:
        """Return whether any conflict is open."""
        return bool(self._open)

    def judge(
        self,
        now: float,
        contested: Mapping[Key, Version],
        extra: Collection[Key],
        last_full_at: float,
    ) -> Verdict:
        """Decide about the items of the database that upstream does not have.

        Args:
            now: time at which the database was read.
            contested: items that are newer in the database, or only there.
            extra: keys of items that upstream does not have.
            last_full_at: time of the last complete response that is known to lack these items.
        """
        returned = self._update_open(now, contested, extra)
        for conflict in self._open.values():
            if conflict.answered_at is None and last_full_at > conflict.since:
                conflict.answered_at = last_full_at
        wait = max((self._replace_delay(self._open[key]) for key in returned), default=0.0)
        replace = frozenset(
            key for key, conflict in self._open.items() if self._is_disowned(conflict, last_full_at)
        )
        if replace:
            self._reopen_rest(now, replace)
        ask = self._due_to_ask(now)
        return Verdict(
            replace=replace,
            ask=ask,
            returned=returned,
            wait=wait,
            settled=all(map(self._is_settled, self._open.values())),
            recheck_at=min(map(self._asks_at, self._open.values()), default=NEVER),
        )

    def replaced(self, keys: Iterable[Key]) -> None:
        """Record that upstream's data has replaced these items."""
        self._replaced = frozenset(keys)

    def _update_open(
        self, now: float, contested: Mapping[Key, Version], extra: Collection[Key]
    ) -> frozenset[Key]:
        """Update the open conflicts; return items that were replaced and have come back."""
        if not contested:
            self._open = {}
            self._quiet_since = now if self._quiet_since is None else self._quiet_since
            return frozenset()
        if self._quiet_since is not None and now - self._quiet_since >= self._timings.forget:
            self._doublings, self._replaced = 0, frozenset()
        self._quiet_since = None
        before, self._open = self._open, {}
        for key, version in contested.items():
            conflict = before.get(key) or _Conflict(
                version, key in extra, first_seen=now, since=now
            )
            conflict.extra = key in extra
            if conflict.version != version:
                conflict.version, conflict.since, conflict.answered_at = version, now, None
            self._open[key] = conflict
        returned = self._replaced & self._open.keys()
        self._replaced -= returned
        return returned

    def _reopen_rest(self, now: float, replace: frozenset[Key]) -> None:
        """Restart the remaining conflicts with longer delays.

        A failed replacement counts, too: the database may have carried it out all the same.
        """
        self._doublings += 1
        self._open = {
            key: _Conflict(conflict.version, conflict.extra, first_seen=now, since=now)
            for key, conflict in self._open.items()
            if key not in replace
        }

    def _due_to_ask(self, now: float) -> frozenset[Key]:
        due = frozenset(
            key for key, conflict in self._open.items() if self._asks_at(conflict) <= now
        )
        if due:
            self._asked_at = now
        return due

    def _replace_delay(self, conflict: _Conflict) -> float:
        """Return the required seconds between the two deciding responses."""
        base = self._timings.extra if conflict.extra else self._timings.newer
        return max(base, Backoff(base, self._timings.longest).delay(self._doublings))

    def _is_disowned(self, conflict: _Conflict, last_full_at: float) -> bool:
        return (
            conflict.answered_at is not None
            and last_full_at - conflict.answered_at >= self._replace_delay(conflict)
        )

    def _is_settled(self, conflict: _Conflict) -> bool:
        return conflict.answered_at is not None and self._replace_delay(conflict) == NEVER

    def _asks_at(self, conflict: _Conflict) -> float:
        """Return the time at which to ask upstream about this conflict."""
        timings = self._timings
        if conflict.answered_at is None:
            # `first_seen`, not `since`: a relay behind a busy writer never sees the same version
            # twice.
            return max(conflict.first_seen + timings.second_look, self._asked_at + timings.refresh)
        wait = self._replace_delay(conflict)
        return max(conflict.answered_at + wait, self._asked_at + min(wait, timings.refresh))
