"""Keeps a stored list of environments equal to the one that LaunchDarkly names, in the background.

A relay that starts while LaunchDarkly cannot be reached begins with what is stored. Whatever the
store does, the list in memory is served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from relay import randomness
from relay.aio import wait_for
from relay.backoff import Backoff
from relay.errors import InvalidData, StoreUnavailable
from relay.protocol.environmentlist import EnvironmentList
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog


class ListStore(Protocol):
    """Contract of a place where one list is stored, encrypted."""

    @property
    def label(self) -> str:
        """The place for log lines, such as `file /data/environments-0123.sealed`."""

    async def load(self) -> EnvironmentList | None:
        """Return what is stored; None if there is nothing.

        Raises:
            InvalidData: nothing of it is usable.
            StoreUnavailable: it cannot be read.
        """

    async def save(self, environments: EnvironmentList) -> None:
        """Replace what is stored, each entry at once.

        Raises:
            StoreUnavailable: it cannot be written; each entry is the former or the new one.
        """

    async def aclose(self) -> None:
        """Close connections, if there are any."""


@dataclass(frozen=True, slots=True)
class ListTimings:
    """Delays and limits, in seconds.

    Args:
        gather: time within which changes are written together.
        retry: delays after consecutive failures.
        finish: time limit for the last write when the relay ends.
    """

    gather: float = 0.1
    retry: Backoff = Backoff(first=1.0, longest=30.0)
    finish: float = 2.0


class ListMirror:
    """Mirror of the list of environments in one store.

    Args:
        store: where the list is kept.
        log: receives a line when an outage of the store begins, and when it ends.
        timings: delays and limits.
    """

    def __init__(self, store: ListStore, log: Log, timings: ListTimings = ListTimings()) -> None:
        self._store = store
        self._log = log
        self._timings = timings
        self._outage = OutageLog(log)
        self._changed = asyncio.Event()
        """Set while a change waits to be written."""

    def __repr__(self) -> str:
        return f"<ListMirror {self._store.label}>"

    async def load(self, unless: asyncio.Event) -> EnvironmentList | None:
        """Return the stored list; None if there is none, or an unusable one (logged).

        Args:
            unless: once set, the list is not needed any more; until then reading is tried again.
        """
        failures = 0
        while not unless.is_set():
            try:
                stored = await self._store.load()
            except StoreUnavailable as e:
                self._begin_outage("read", e)
                await wait_for(unless, self._delay(failures))
                failures += 1
                continue
            except InvalidData as e:
                text = "The stored list of environments (%s) is not used: %s"
                self._log.warning(text, self._store.label, e.reason)
                return None
            self._end_outage()
            if stored is not None and stored.unusable:
                self._report_unusable(stored)
            return stored
        return None

    def update(self) -> None:
        """Schedule a write: the list has changed, or LaunchDarkly has confirmed it."""
        self._changed.set()

    async def run(self, content: Callable[[], EnvironmentList]) -> None:
        """Write updates until cancelled; then write the last one, within a time limit.

        Args:
            content: returns the list to write.
        """
        failures = 0
        try:
            while True:
                await self._changed.wait()
                await asyncio.sleep(self._timings.gather)
                try:
                    await self._save(content())
                except StoreUnavailable as e:
                    self._begin_outage("written", e)
                    await asyncio.sleep(self._delay(failures))
                    failures += 1
                else:
                    self._end_outage()
                    failures = 0
        finally:
            if self._changed.is_set() and self._outage.reason is None:
                with suppress(StoreUnavailable, TimeoutError):
                    async with asyncio.timeout(self._timings.finish):
                        await self._save(content())
            await self._store.aclose()

    async def _save(self, environments: EnvironmentList) -> None:
        self._changed.clear()
        try:
            await self._store.save(environments)
        except BaseException:
            self._changed.set()
            raise

    def _delay(self, failures: int) -> float:
        return self._timings.retry.delay(failures, randomness.fraction())

    def _begin_outage(self, operation: str, error: StoreUnavailable) -> None:
        text = "The stored list of environments (%s) cannot be %s: %s; trying again"
        self._outage.begin(str(error), text, self._store.label, operation, error)

    def _end_outage(self) -> None:
        text = "The stored list of environments (%s) can be used again"
        self._outage.end(text, self._store.label)

    def _report_unusable(self, stored: EnvironmentList) -> None:
        name, reason = next(iter(stored.unusable.items()))
        text = "The stored list of environments (%s): %d of its entries are not used; %s: %s"
        self._log.warning(text, self._store.label, len(stored.unusable), name, reason)
