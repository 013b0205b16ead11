"""Decides when upstream's data may replace what a database has newer than upstream, or has alone.

Such an item may mean that this relay is behind, and that another one has written it. Or it is left
from another project, an old backup, a mistake; then SDKs in daemon mode would read it for ever. The
two cannot be told apart at once, so upstream is asked for everything. If two complete answers, some
time apart, still do not know the item, it is replaced. Should another relay put it back, the waits
double with each time, so that two relays never fight.

There is only the decision here, without a clock, a loop or a database of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from relay.stores import Key, Version

NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class ConflictTimes:
    """Waiting times in seconds, all above 0.

    Args:
        second_look: before upstream is asked: a change that is on its way to us as well has arrived
            by then.
        refresh: between two requests for everything, at least.
        newer: between the two answers after which what is newer in the database is replaced;
            `NEVER` leaves it as it is.
        extra: the same for what only the database has.
        longest: up to which `newer` and `extra` double with each replacement.
        forget: without conflicts, after which they begin anew.
    """

    second_look: float = 1.0
    refresh: float = 60.0
    newer: float = 15.0
    extra: float = 15.0
    longest: float = 3600.0
    forget: float = 7200.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do about all conflicts.

    Args:
        replace: items of the database that upstream has disowned.
        ask: those about which upstream is to be asked now.
        returned: those that were replaced, and are there again.
        wait: seconds for which the returned ones are left alone, at least.
        settled: whether nothing more will be done about what is left.
        look_at: the time at which to judge again, if nothing happens before.
    """

    replace: frozenset[Key] = frozenset()
    ask: frozenset[Key] = frozenset()
    returned: frozenset[Key] = frozenset()
    wait: float = 0.0
    settled: bool = True
    look_at: float = NEVER


@dataclass(slots=True)
class _Conflict:
    """One item, and the times of what is known of it.

    Args:
        version: as the database has it.
        extra: whether upstream has no such item.
        found: when its key was first in conflict.
        seen: when it was first so in this version.
        answer: of the first complete answer since `seen`; None before.
    """

    version: Version
    extra: bool
    found: float
    seen: float
    answer: float | None = None


class Conflicts:
    """All that is known of the conflicts of one database. Times are seconds of one clock.

    Args:
        times: waiting times.
    """

    def __init__(self, times: ConflictTimes = ConflictTimes()) -> None:
        self._times = times
        self._open: dict[Key, _Conflict] = {}
        self._doublings = 0
        self._replaced: frozenset[Key] = frozenset()
        """Items that were replaced last, and are not known to be there again."""
        self._asked_at = -NEVER
        self._quiet_since: float | None = None

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._open)

    def judge(
        self, now: float, stored: Mapping[Key, Version], extra: Collection[Key], answered: float
    ) -> Verdict:
        """Decide about what the database holds and upstream does not.

        Args:
            now: the time at which the database was looked at.
            stored: what it holds newer, or alone.
            extra: keys that upstream does not have.
            answered: the time of the last complete answer of upstream of which is known that it
                does not have what is stored.
        """
        returned = self._note(now, stored, extra)
        for conflict in self._open.values():
            if conflict.answer is None and answered > conflict.seen:
                conflict.answer = answered
        wait = max((self._wait(self._open[key]) for key in returned), default=0.0)
        replace = frozenset(
            key for key, each in self._open.items() if self._is_over(each, answered)
        )
        if replace:
            self._count(now, replace)
        ask = self._due(now)
        return Verdict(
            replace=replace,
            ask=ask,
            returned=returned,
            wait=wait,
            settled=all(map(self._is_settled, self._open.values())),
            look_at=min(map(self._asks_at, self._open.values()), default=NEVER),
        )

    def replaced(self, keys: Iterable[Key]) -> None:
        """Note that upstream's data have taken the place of these items."""
        self._replaced = frozenset(keys)

    def _note(
        self, now: float, stored: Mapping[Key, Version], extra: Collection[Key]
    ) -> frozenset[Key]:
        """Take over what there is now; return what has been replaced and is there again."""
        if not stored:
            self._open = {}
            self._quiet_since = now if self._quiet_since is None else self._quiet_since
            return frozenset()
        if self._quiet_since is not None and now - self._quiet_since >= self._times.forget:
            self._doublings, self._replaced = 0, frozenset()
        self._quiet_since = None
        before, self._open = self._open, {}
        for key, version in stored.items():
            known = before.get(key) or _Conflict(version, key in extra, found=now, seen=now)
            known.extra = key in extra
            if known.version != version:
                known.version, known.seen, known.answer = version, now, None
            self._open[key] = known
        returned = self._replaced & self._open.keys()
        self._replaced -= returned
        return returned

    def _count(self, now: float, replace: frozenset[Key]) -> None:
        """Begin anew with what is left, with longer waits.

        An attempt counts as well as a success: it may have been carried out all the same.
        """
        self._doublings += 1
        self._open = {
            key: _Conflict(each.version, each.extra, found=now, seen=now)
            for key, each in self._open.items()
            if key not in replace
        }

    def _due(self, now: float) -> frozenset[Key]:
        due = frozenset(key for key, each in self._open.items() if self._asks_at(each) <= now)
        if due:
            self._asked_at = now
        return due

    def _wait(self, conflict: _Conflict) -> float:
        """Return the seconds between the two answers that decide."""
        first = self._times.extra if conflict.extra else self._times.newer
        return max(first, min(first * 2.0 ** min(self._doublings, 64), self._times.longest))

    def _is_over(self, conflict: _Conflict, answered: float) -> bool:
        return conflict.answer is not None and answered - conflict.answer >= self._wait(conflict)

    def _is_settled(self, conflict: _Conflict) -> bool:
        return conflict.answer is not None and self._wait(conflict) == NEVER

    def _asks_at(self, conflict: _Conflict) -> float:
        """Return the time at which upstream is to be asked about it."""
        times = self._times
        if conflict.answer is None:
            # Also if it has become newer still: who is behind a busy writer never sees it twice
            # alike.
            return max(conflict.found + times.second_look, self._asked_at + times.refresh)
        wait = self._wait(conflict)
        return max(conflict.answer + wait, self._asked_at + min(wait, times.refresh))
