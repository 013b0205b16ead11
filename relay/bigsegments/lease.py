"""The lease that lets one relay of many synchronise the big segments of an environment.

Relays that only share a database take it there. In a fleet the leader of the environment has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from relay import clock, randomness
from relay.aio import wait_for
from relay.errors import StoreUnavailable
from relay.stores.bigsegments import BigSegmentStore
from relay.telemetry.log import Log

if TYPE_CHECKING:
    from relay.fleet.lease import Leadership
    from relay.fleet.source import FleetSource

RENEWALS = 3
"""Claims in the lifetime of a lease: two may fail before it is lost."""

LOOKS = 6
"""Claims of those who wait, in the lifetime of a lease."""

MARGIN = 0.1
"""Part of the lifetime by which a relay stops early, as clocks of machines differ in speed."""


FOLLOWER_LOOK = 1.0
"""Seconds between two looks of a fleet's follower at the cursor, so that its clients hear soon."""

_WAITS = "BigSegmentSynchronizer: another relay synchronizes; this one waits"
_TAKES_OVER = "BigSegmentSynchronizer: this relay synchronizes from now on"
_HAS_LOST = "BigSegmentSynchronizer: this relay has lost its lease"


class Lease(Protocol):
    """Contract: says when this relay is the one that synchronises an environment."""

    @property
    def is_held(self) -> bool:
        """True while this relay has the lease, as far as it knows."""

    async def acquire(self) -> bool:
        """Wait for the lease; return whether another relay had it.

        Raises:
            StoreUnavailable: the database does not answer.
        """

    async def use(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work until it ends or the lease is lost.

        Raises:
            Exception: what the work raises.
        """


class StoreLease:
    """The lease of one environment in the database, as one relay sees it.

    Several relays share a database. One of them synchronises; the others wait until the lease is
    free, and are so the next ones when that one ends, or cannot reach LaunchDarkly.

    Args:
        store: the database, which keeps the lease.
        waited: called after each look at the lease of another relay.
        log: a logger that names the environment.
    """

    def __init__(self, store: BigSegmentStore, waited: Callable[[], None], log: Log) -> None:
        self.is_held = False
        """True while this relay has the lease, as far as it knows."""
        self._store = store
        self._owner = randomness.new_id()
        self._waited = waited
        self._log = log
        self._lifetime = store.lease_lifetime
        self._until = 0.0
        """Monotonic time until which this relay surely has the lease."""

    def __repr__(self) -> str:
        return f"<StoreLease {'held' if self.is_held else 'not held'}>"

    async def acquire(self) -> bool:
        """Wait until the lease is free, and take it; return whether another relay had it.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        has_waited = False
        while not await self._claim():
            if not has_waited:
                self._log.info(_WAITS)
                has_waited = True
            self._waited()
            await asyncio.sleep(self._lifetime / LOOKS * (1 + randomness.fraction() / 4))
        if has_waited:
            self._log.info(_TAKES_OVER)
        self.is_held = True
        return has_waited

    async def use(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work until it ends or the lease is lost, and give the lease up.

        Raises:
            Exception: what the work raises.
        """
        try:
            await _until_either(work, self._keep())
        finally:
            self.is_held = False
            await self._release()

    async def _keep(self) -> None:
        """Claim the lease again and again; end when it is lost."""
        while True:
            await asyncio.sleep(self._lifetime / RENEWALS)
            try:
                async with asyncio.timeout(max(self._until - clock.monotonic(), 0.0)):
                    is_kept = await self._claim()
            except (StoreUnavailable, TimeoutError):
                is_kept = clock.monotonic() < self._until
            if not is_kept:
                self._log.info(_HAS_LOST)
                return

    async def _claim(self) -> bool:
        # Counted from before the request: the database may grant it at once and answer late.
        until = clock.monotonic() + self._lifetime * (1 - MARGIN)
        is_granted = await self._store.claim(self._owner)
        if is_granted:
            self._until = until
        return is_granted

    async def _release(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._store.release(self._owner)
        except (StoreUnavailable, TimeoutError):
            return  # it ends by itself


class LeaderLease:
    """The lease of one environment in a fleet: its leader has it, and nothing else is asked for it.

    A follower looks at the cursor meanwhile. A relay that may not take part in the fleet takes the
    lease in the database, as without one.

    Args:
        source: says whether this relay leads.
        otherwise: lease in the database.
        waited: called while another relay leads, again and again.
        log: a logger that names the environment.
    """

    def __init__(
        self, source: FleetSource, otherwise: StoreLease, waited: Callable[[], None], log: Log
    ) -> None:
        self._source = source
        self._otherwise = otherwise
        self._waited = waited
        self._log = log
        self._leadership: Leadership | None = None

    def __repr__(self) -> str:
        return f"<LeaderLease {'held' if self.is_held else 'not held'}>"

    @property
    def is_held(self) -> bool:
        """True while this relay leads and synchronises, as far as it knows."""
        return self._leadership is not None or self._otherwise.is_held

    async def acquire(self) -> bool:
        """Wait until this relay leads; return whether another one did.

        Raises:
            StoreUnavailable: there is no fleet, and the database does not answer.
        """
        has_waited = False
        while not self._source.leads.is_set():
            if not has_waited and self._source.leader is not None:
                self._log.info(_WAITS)
                has_waited = True
            self._waited()
            await wait_for(self._source.leads, FOLLOWER_LOOK)
        if self._source.is_denied:
            return await self._otherwise.acquire()
        if has_waited:
            self._log.info(_TAKES_OVER)
        self._leadership = self._source.leadership
        return has_waited

    async def use(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work until it ends or this relay leads no more.

        Raises:
            Exception: what the work raises.
        """
        leadership = self._leadership
        if leadership is None:
            await self._otherwise.use(work)
            return
        try:
            await _until_either(work, self._end_of(leadership))
        finally:
            self._leadership = None

    async def _end_of(self, leadership: Leadership) -> None:
        await leadership.ended.wait()
        self._log.info(_HAS_LOST)


async def _until_either(work: Coroutine[Any, Any, None], end: Coroutine[Any, Any, None]) -> None:
    """Do both until one of them ends; raise what it raises."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(end)
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
