"""Big segments in a Redis Cluster that has the keys of an environment on several servers.

No transaction holds the members and the cursor. The members are written first, by one relay at a
time, then the cursor: a patch that was interrupted is applied again, to the same end.
"""

from __future__ import annotations

import asyncio
import contextlib

from relay import clock, randomness
from relay.errors import StoreUnavailable
from relay.protocol.bigsegments import Patch
from relay.stores.redis.bigsegments import RedisBigSegmentStore, is_at
from relay.stores.redis.client import RedisClient
from relay.stores.redis.layout import Layout

LOCK_TIME = 30.0
"""Seconds after which the lock of a relay ends that was killed."""

RENEWAL = 5.0
"""Seconds after which the lock is looked at again before more is written, and renewed."""

WAIT = 0.05
"""Seconds between two attempts to get the lock."""

BATCH = 1000
"""Members that are written at a time."""


def big_segment_store(client: RedisClient, prefix: str = "") -> RedisBigSegmentStore:
    """Return the big segments of an environment: divided if keys may be on several servers."""
    is_divided = client.divides(Layout(prefix).keys)
    return (DividedBigSegmentStore if is_divided else RedisBigSegmentStore)(client, prefix)


class DividedBigSegmentStore(RedisBigSegmentStore):
    """Big segments of one environment whose keys are in different slots of a cluster."""

    async def apply(self, patch: Patch, cursor: str | None) -> frozenset[str] | None:
        """Apply a patch while no other relay does; it fails if another one has.

        All members of the patch count as changed: an earlier attempt may have changed some.
        """
        token = randomness.new_id().encode()
        if not await self._acquire(token, cursor):
            return None
        try:
            if not await self._is_at(cursor):
                return None  # another relay was faster, before it gave the lock away
            return await self._write(patch, cursor, token)
        finally:
            with contextlib.suppress(StoreUnavailable):  # it ends by itself
                await self._swap(self._lock, [token], ("SET", self._lock, ""))

    async def _acquire(self, token: bytes, cursor: str | None) -> bool:
        """Wait for the lock; return False if the stored cursor is another one.

        The key is that of ld-relay's lock, which is empty and says nothing.
        """
        deadline = clock.monotonic() + 2 * LOCK_TIME
        lock = ("SET", self._lock, token, "PX", _milliseconds(LOCK_TIME))
        while await self._is_at(cursor):
            if await self._swap(self._lock, [None, b""], lock):
                return True
            if clock.monotonic() >= deadline:
                raise StoreUnavailable(f"other relays hold {self._lock} all the time")
            await asyncio.sleep(WAIT)
        return False

    async def _is_at(self, cursor: str | None) -> bool:
        return is_at(await self._client.execute("GET", self._cursor), cursor)

    async def _write(self, patch: Patch, cursor: str | None, token: bytes) -> frozenset[str] | None:
        """Write the members, then the cursor if it is still as given, as long as the lock holds."""
        commands = list(self._commands(patch))
        renewal = ("PEXPIRE", self._lock, _milliseconds(LOCK_TIME))
        renewed_at = clock.monotonic()
        for start in range(0, len(commands), BATCH):
            if clock.monotonic() - renewed_at >= RENEWAL:
                if not await self._swap(self._lock, [token], renewal):
                    return None
                renewed_at = clock.monotonic()
            batch = [command for _, command in commands[start : start + BATCH]]
            await self._client.execute_all(batch)
        before = None if cursor is None else cursor.encode()
        if not await self._swap(self._cursor, [before], ("SET", self._cursor, patch.version)):
            return None
        return frozenset(each for each, _ in commands)


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
