"""Checks upstream after a change notice until the announced versions are here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from relay.aio import wait_for
from relay.environment import Environment
from relay.model.item import Kind
from relay.protocol.webhook import ChangedResource

RECHECK_AFTER = (2.0, 5.0, 15.0)
"""Seconds after a webhook at which an environment that has not seen the change looks again."""


BURST = 0.2
"""Seconds between two looks that webhooks cause at once: of many, those within it share one, and
none waits longer than people would notice."""


MAX_EXPECTED = 1000
"""Flags of one environment whose announced version is waited for; of more, any change will do."""


class RefreshTracker:
    """What one environment has been told of and has not seen yet.

    Args:
        environment: it.
        recheck_after: seconds after a webhook, in rising order, at which it looks once more.
        burst: seconds between two looks at once.
    """

    def __init__(
        self,
        environment: Environment,
        recheck_after: Sequence[float] = RECHECK_AFTER,
        burst: float = BURST,
    ) -> None:
        self._environment = environment
        self._recheck_after = tuple(recheck_after)
        self._burst = burst
        self._expected: dict[str, int] = {}
        """The announced versions of flags."""
        self._changes: int | None = None
        """How many changes there had been at the last webhook that named no version."""
        self._checked = -float("inf")
        self._announced = asyncio.Event()

    def announce(self, places: Sequence[ChangedResource]) -> bool:
        """Note what has changed; return whether there is anything to look for.

        Args:
            places: none for "anything".
        """
        unseen = {
            p.flag: p.version for p in places if p.version and not self._has(p.flag, p.version)
        }
        vague = not places or any(place.version is None for place in places)
        if not unseen and not vague:
            return False
        for flag, version in unseen.items():
            self._expected[flag] = max(version, self._expected.get(flag, 0))
        if len(self._expected) > MAX_EXPECTED:
            self._expected.clear()
            vague = True
        if vague:
            self._changes = self._environment.changes
        self._announced.set()
        return True

    async def run(self) -> None:
        """Look whenever there is something to look for, until cancelled."""
        while True:
            await self._announced.wait()
            await self._check_until_seen()
            self._expected.clear()
            self._changes = None

    async def _check_until_seen(self) -> None:
        due: list[float] = []
        while due or self._announced.is_set():
            now = time.monotonic()
            if self._announced.is_set():
                self._announced.clear()
                due = [
                    max(now, self._checked + self._burst),
                    *(now + t for t in self._recheck_after),
                ]
            if now < due[0]:
                await wait_for(self._announced, due[0] - now)
                continue
            if self._is_seen():
                return
            self._checked = now
            del due[0]
            # A stream is worth opening anew only for what it is known to lack.
            self._environment.check(reconnect=not due and bool(self._expected))

    def _is_seen(self) -> bool:
        if self._changes is not None and self._environment.changes <= self._changes:
            return False
        return all(self._has(flag, version) for flag, version in self._expected.items())

    def _has(self, flag: str, version: int) -> bool:
        """Whether the environment has at least this version of a flag, or knows it as deleted."""
        payload = self._environment.payload
        item = payload.all(Kind.FLAG).get(flag) if payload else None
        return item is not None and item.version >= version
