"""Upstream of one environment in a fleet: followed or not, and replaced when the SDK key is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from relay import clock
from relay.fleet.doubts import Doubts
from relay.model.payload import ChangeSet, Payload
from relay.sources import DataSource, Interrupted, Update
from relay.telemetry.log import Log

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

SHORTEST_RECHECK = 1.0
"""Seconds between two questions for everything, at least."""


class Upstream:
    """Upstream, if this relay listens to it.

    Args:
        source: data source to follow.
        deliver: takes each update with its source, and sets the event when it has been handled.
        spawn: starts a task.
        doubt: seconds between two answers before upstream takes items back.
        log: a logger that names the environment.
    """

    def __init__(
        self,
        source: DataSource,
        deliver: Callable[[DataSource, Update, asyncio.Event], None],
        spawn: Spawn,
        doubt: float,
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
        self._doubts = Doubts(doubt)
        self._log = log
        self._tasks: dict[DataSource, asyncio.Task[None]] = {}
        self._recheck: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Upstream {'followed' if self.is_followed else 'not followed'}>"

    @property
    def is_followed(self) -> bool:
        """True while this relay listens to upstream."""
        return bool(self._tasks)

    def follow(self) -> None:
        """Listen, if this relay does not already."""
        if not self.is_followed:
            self._doubts.forget()
            self.lost_since = clock.monotonic()
            self._start(self._source)

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
        self._start(source)

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
        self.is_confirmed = not isinstance(update, Interrupted)
        if isinstance(update, Interrupted):
            self.lost_since = self.lost_since or clock.monotonic()
            return update
        self.lost_since = None
        if isinstance(update, ChangeSet) and not update.full:
            self._doubts.settle(update.items)
        elif isinstance(update, ChangeSet) and known is not None:
            update = self._doubts.resolve(known, update, clock.monotonic())
            if self._recheck is None and self._doubts.recheck_at is not None:
                self._recheck = self._spawn(self._ask_again())
        return update

    def _takes_over(self, source: DataSource, update: Update) -> bool:
        """Let a new source take over with its first complete data; return False before."""
        if not (isinstance(update, ChangeSet) and update.full):
            return False
        self._stop(self._source)
        self._source, self._successor = source, None
        self._log.info("The new SDK key is used upstream")
        return True

    def _start(self, source: DataSource) -> None:
        self._tasks[source] = self._spawn(self._pump(source))

    def _stop(self, source: DataSource) -> None:
        if task := self._tasks.pop(source, None):
            task.cancel()

    async def _pump(self, source: DataSource) -> None:
        async with aclosing(source.updates()) as updates:
            async for update in updates:
                handled = asyncio.Event()
                self._deliver(source, update, handled)
                await handled.wait()

    async def _ask_again(self) -> None:
        """Ask for everything once more, until all doubts are settled."""
        while (at := self._doubts.recheck_at) is not None:
            await asyncio.sleep(max(SHORTEST_RECHECK, at - clock.monotonic()))
            self._source.resync()
        self._recheck = None
