"""The lease that lets one relay of many synchronise the big segments of an environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from relay import clock, randomness
from relay.errors import StoreUnavailable
from relay.stores.bigsegments import BigSegmentStore
from relay.telemetry.log import Log

RENEWALS = 3
"""Claims in the lifetime of a lease: two may fail before it is lost."""

LOOKS = 6
"""Claims of those who wait, in the lifetime of a lease."""

MARGIN = 0.1
"""Part of the lifetime by which a relay stops early, as clocks of machines differ in speed."""


class Lease:
    """The lease of one environment, as one relay sees it.

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
        return f"<Lease {'held' if self.is_held else 'not held'}>"

    async def acquire(self) -> bool:
        """Wait until the lease is free, and take it; return whether another relay had it.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        has_waited = False
        while not await self._claim():
            if not has_waited:
                self._log.info("BigSegmentSynchronizer: another relay synchronizes; this one waits")
                has_waited = True
            self._waited()
            await asyncio.sleep(self._lifetime / LOOKS * (1 + randomness.fraction() / 4))
        if has_waited:
            self._log.info("BigSegmentSynchronizer: this relay synchronizes from now on")
        self.is_held = True
        return has_waited

    async def use(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work until it ends or the lease is lost, and give the lease up.

        Raises:
            Exception: what the work raises.
        """
        working, keeping = asyncio.ensure_future(work), asyncio.ensure_future(self._keep())
        try:
            ended, _ = await asyncio.wait((working, keeping), return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                task.result()
        finally:
            for task in (working, keeping):
                task.cancel()
            await asyncio.wait((working, keeping))
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
                self._log.info("BigSegmentSynchronizer: this relay has lost its lease")
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
