"""Checks of upstream after a change notice, until the announced versions have arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from relay import clock
from relay.aio import wait_for
from relay.environment import Environment
from relay.model.item import Kind
from relay.protocol.webhook import ChangedResource

RECHECK_AFTER = (2.0, 5.0, 15.0)
"""Seconds after a webhook at which upstream is checked again if the change has not arrived."""


BURST = 0.2
"""Minimum seconds between two immediate checks: webhooks within it share one check, and no delay is
long enough to be noticed."""


MAX_EXPECTED = 1000
"""Maximum number of flags whose announced versions are awaited; beyond it any change counts."""


class RefreshTracker:
    """Tracks announced changes that one environment has not received yet.

    Args:
        environment: environment to check.
        recheck_after: seconds after a webhook, ascending, at which to check again.
        burst: minimum seconds between two immediate checks.
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
        """Announced versions by flag key."""
        self._changes: int | None = None
        """Number of changes at the last webhook without a version; None without such a webhook."""
        self._checked = -float("inf")
        """Time of the last check, by `clock.monotonic`."""
        self._announced = asyncio.Event()

    def announce(self, resources: Sequence[ChangedResource]) -> bool:
        """Record a change notice; return whether there is anything to check for.

        Args:
            resources: changed resources; empty if anything may have changed.
        """
        unseen = {
            r.flag: r.version for r in resources if r.version and not self._has(r.flag, r.version)
        }
        vague = not resources or any(resource.version is None for resource in resources)
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
        """Check upstream until the announced changes have arrived, or the last check was made.

        Notices that come meanwhile are waited for as well.
        """
        due: list[float] = []
        while due or self._announced.is_set():
            now = clock.monotonic()
            if self._announced.is_set():
                self._announced.clear()
                due = [
                    max(now, self._checked + self._burst),
                    *(now + t for t in self._recheck_after),
                ]
            if now < due[0]:
                await wait_for(self._announced, due[0] - now)
                continue
            if self._has_arrived():
                return
            self._checked = now
            del due[0]
            # Only a version that is known to be missing justifies replacing a stream, at last.
            self._environment.check(reconnect=not due and bool(self._expected))

    def _has_arrived(self) -> bool:
        if self._changes is not None and self._environment.changes <= self._changes:
            return False
        return all(self._has(flag, version) for flag, version in self._expected.items())

    def _has(self, flag: str, version: int) -> bool:
        """Return whether the environment has at least this version of a flag, even if deleted."""
        payload = self._environment.payload
        item = payload.all(Kind.FLAG).get(flag) if payload else None
        return item is not None and item.version >= version
