"""Upstream of one environment in a fleet: followed or not, and replaced when the SDK key is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from relay import clock
from relay.fleet.doubts import Doubts
from relay.model.payload import ChangeSet, Payload, distance
from relay.sources import DataSource, Interrupted, Update, UpToDate
from relay.telemetry.log import Log


def has_delivered(update: Update) -> bool:
    """Return whether an update says what upstream's data are."""
    return isinstance(update, ChangeSet) or (isinstance(update, UpToDate) and bool(update.since))


Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

SHORTEST_RECHECK = 1.0
"""Seconds between two questions for everything, at least."""


class Upstream:
    """Upstream, if this relay listens to it.

    Where upstream names its data, the invariant is that the held data have a name only if they are
    exactly what upstream has given that name to. So it can be the basis of the next connection, of
    this member or another.

    Args:
        source: data source to follow.
        deliver: takes each update with its source, and sets the event when it has been handled.
        spawn: starts a task.
        doubt: seconds between two answers before upstream takes items back.
        named: returns upstream's name of the held data; empty for none.
        log: a logger that names the environment.
    """

    def __init__(
        self,
        source: DataSource,
        deliver: Callable[[DataSource, Update, asyncio.Event], None],
        spawn: Spawn,
        doubt: float,
        named: Callable[[], str],
        *,
        log: Log,
    ) -> None:
        self.is_confirmed: bool | None = None
        """True if upstream is healthy, False if it is lost; None before and without it."""
        self.lost_since: float | None = None
        """Monotonic time since which upstream is followed in vain; None if it works."""
        self._source = source
        self._successor: DataSource | None = None
        """Takes the place of the source once it has delivered all data."""
        self._deliver = deliver
        self._spawn = spawn
        self._patience = doubt
        self._doubts = Doubts(doubt)
        self._older_since: float | None = None
        """Monotonic time since which upstream's answers are older than the held data, as their
        names tell; None if they are not."""
        self._named = named
        self._log = log
        self._tasks: dict[DataSource, asyncio.Task[None]] = {}
        self._recheck: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Upstream {'followed' if self.is_followed else 'not followed'}>"

    @property
    def is_followed(self) -> bool:
        """True while this relay listens to upstream."""
        return bool(self._tasks)

    @property
    def protocol(self) -> str:
        """Protocol by which upstream is followed, or would be."""
        return self._source.protocol

    def follow(self) -> None:
        """Listen, if this relay does not already; continue from the held data, if they are named.

        A source that has been followed before goes on. What it tells fits the held data, or else it
        is asked for everything.
        """
        if not self.is_followed:
            self._doubts.forget()
            self._older_since = None
            self.lost_since = clock.monotonic()
            self._start(self._source, self._named())

    def leave(self) -> None:
        """Listen no more."""
        for task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        if self._recheck is not None:
            self._recheck.cancel()
            self._recheck = None
        if self._successor is not None:
            self._source, self._successor = self._successor, None
        self.is_confirmed = self.lost_since = None

    def change(self, source: DataSource) -> None:
        """Follow another source; the present one until that has delivered all data."""
        if not self.is_followed:
            self._source = source
            return
        if self._successor is not None:
            self._stop(self._successor)
        self._successor = source
        self._start(source, "")  # another key may see other data

    def resync(self) -> None:
        """Ask for all data again."""
        self._source.resync()

    def check(self, *, reconnect: bool = False) -> None:
        """Look for changes soon."""
        self._source.check(reconnect=reconnect)

    def interpret(self, source: DataSource, update: Update, known: Payload | None) -> Update | None:
        """Return what to make of an update.

        Args:
            source: that has yielded it.
            update: as it has come.
            known: data that clients may have seen and that must not be taken back at once.

        Returns:
            None if it is not to be used.
        """
        if source not in self._tasks:
            return None  # it was left
        if source is not self._source and not self._takes_over(source, update):
            return None
        if isinstance(update, Interrupted):
            self.is_confirmed = False
            self.lost_since = self.lost_since or clock.monotonic()
            return update
        used = self._placed(update, known)
        if used is None:
            source.resync()  # it is about other data
            return None
        self.is_confirmed, self.lost_since = True, None
        if self._recheck is None and self._recheck_at is not None:
            self._recheck = self._spawn(self._ask_again())
        return used

    def _placed(self, update: ChangeSet | UpToDate, known: Payload | None) -> Update | None:
        """Return what an update means for the held data; None if everything is needed for that."""
        if isinstance(update, ChangeSet) and update.full:
            return update if known is None else self._complete(known, update)
        held = self._named()
        if isinstance(update, ChangeSet):
            self._doubts.settle(update.items)
            if update.selector is not None and (not held or update.since != held):
                return None if known is None else self._later(update, held)
            self._older_since = None
            return None if known and _may_be_older(known, update) else update
        if update.since in ("", held):
            if update.since:
                self._older_since = None
            return update
        steps = distance(update.since, held)
        is_older = steps is not None and steps > 0
        return UpToDate() if is_older or self._recheck_at is not None else None

    def _later(self, changes: ChangeSet, held: str) -> ChangeSet | UpToDate | None:
        """Return what changes mean that do not begin with the held data.

        They were made for older data. If they lead beyond the held ones, they are right for these,
        too: each item touched since then gets its present value (fdv2 13.8.1).
        """
        selector = changes.selector
        ahead = distance(held, selector.state) if selector else None
        behind = distance(changes.since, held)
        if ahead is None or behind is None or behind < 0:
            return None
        if ahead < 0:
            return UpToDate()
        self._older_since = None
        return replace(changes, since="") if ahead else UpToDate()

    def _complete(self, known: Payload, answer: ChangeSet) -> ChangeSet | UpToDate:
        """Return what to make of a complete answer, where clients may have seen other data."""
        now, selector = clock.monotonic(), answer.selector
        steps = distance(self._named(), selector.state) if selector else None
        if steps is None:
            self._older_since = None
            resolved = self._doubts.resolve(known, answer, now)
            # Data with doubted items are not those that upstream has given a name to.
            return resolved if self._doubts.recheck_at is None else replace(resolved, selector=None)
        if steps >= 0:
            self._older_since = None
        else:
            self._older_since = self._older_since or now
            if now - self._older_since < self._patience:
                return UpToDate()
            self._log.warning("Upstream has gone back to older data, which are taken")
            self._older_since = None
        return self._doubts.accept(known, answer)

    def _takes_over(self, source: DataSource, update: Update) -> bool:
        """Let a new source take over with its first complete data; return False before."""
        if not (isinstance(update, ChangeSet) and update.full):
            return False
        self._stop(self._source)
        self._source, self._successor = source, None
        self._older_since = None
        self._log.info("The new SDK key is used upstream")
        return True

    def _start(self, source: DataSource, basis: str) -> None:
        self._tasks[source] = self._spawn(self._pump(source, basis))

    def _stop(self, source: DataSource) -> None:
        if task := self._tasks.pop(source, None):
            task.cancel()

    async def _pump(self, source: DataSource, basis: str) -> None:
        async with aclosing(source.updates(basis)) as updates:
            async for update in updates:
                handled = asyncio.Event()
                self._deliver(source, update, handled)
                await handled.wait()

    @property
    def _recheck_at(self) -> float | None:
        """Monotonic time at which to ask for everything again; None if nothing is doubted."""
        if self._older_since is not None:
            return self._older_since + self._patience
        return self._doubts.recheck_at

    async def _ask_again(self) -> None:
        """Ask for everything once more, until all doubts are settled."""
        while (at := self._recheck_at) is not None:
            await asyncio.sleep(max(SHORTEST_RECHECK, at - clock.monotonic()))
            self._source.resync()
        self._recheck = None


def _may_be_older(known: Payload, changes: ChangeSet) -> bool:
    """Return whether changes take an item back, and nothing tells that they are newer.

    An address of the content may recur, and a server that lags may be at its former occurrence.
    """
    selector = changes.selector
    if selector is None or distance(changes.since, selector.state) is not None:
        return False  # versions decide, or names
    items = ((known.all(item.kind).get(item.key), item) for item in changes.items)
    return any(held and not item.deleted and item.version < held.version for held, item in items)
