"""Big segments in a Redis Cluster that has the keys of an environment on several servers.

No transaction holds the members and the cursor. The members are written first, by one relay at a
time, then the cursor: a patch that was interrupted is applied again, to the same end.

The lock ends by itself, so a relay that was stopped in the middle may go on when others have
applied this patch and more. Then nothing that it still writes may have an effect:

* The lock gives each owner a number, in one transaction. It is a new one unless the owner before
  has said that nothing of its own is under way.
* Each script that writes is stopped by a fence in its slot that has a higher number.
* Who has a new number leaves it at the fence of the cursor before it writes, if the cursor is still
  as it expects, and then at those of all slots of its patch. Whoever has a lower number can
  therefore write nothing of this patch any more when the cursor moves; and the patch is the same,
  as both have found the same cursor.
* So whoever moves the cursor is the last one who has written anything of the patch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice

from msgspec import Struct

from relay import clock, randomness
from relay.aio import run_in_slices
from relay.errors import StoreUnavailable
from relay.protocol.bigsegments import Patch
from relay.steps import Steps
from relay.stores.redis.bigsegments import MemberCommand, RedisBigSegmentStore, is_at
from relay.stores.redis.client import RedisClient
from relay.stores.redis.connections import Command, RedisConnection, raise_failure
from relay.stores.redis.fences import Fences
from relay.stores.redis.layout import Layout

LOCK_TIME = 30.0
"""Seconds after which the lock of a relay ends that was killed."""

RENEWAL = 5.0
"""Seconds after which the lock is looked at again before more is written, and renewed."""

WAIT = 0.05
"""Seconds between two attempts to get the lock."""

PATIENCE = 60.0
"""Seconds after which they have failed."""

BATCH = 1000
"""Members that are written at a time."""

_FREE = b""
"""Value of the lock if nothing is under way; ld-relay's has no other."""

_INTERRUPTED = b"interrupted"
"""Value of the lock if a patch was not finished: some of its commands may still be under way."""


class _Turn(Struct, frozen=True):
    """A relay's time with the lock.

    Args:
        token: value of the lock.
        number: of the owner.
        follows_interruption: True if something of a former owner may still be under way.
    """

    token: bytes
    number: int
    follows_interruption: bool


def big_segment_store(client: RedisClient, prefix: str = "") -> RedisBigSegmentStore:
    """Return the big segments of an environment: divided if keys may be on several servers."""
    is_divided = client.divides(Layout(prefix).keys)
    return (DividedBigSegmentStore if is_divided else RedisBigSegmentStore)(client, prefix)


class DividedBigSegmentStore(RedisBigSegmentStore):
    """Big segments of one environment whose keys are in different slots of a cluster."""

    def __init__(self, client: RedisClient, prefix: str = "") -> None:
        super().__init__(client, prefix)
        self._fences = Fences(self._prefix)

    async def apply(self, patch: Patch, cursor: str | None) -> frozenset[str] | None:
        """Apply a patch while no other relay does; it fails if another one has.

        All members of the patch count as changed: an earlier attempt may have changed some.
        """
        turn = await self._acquire(cursor)
        if turn is None:
            return None
        leaves = _INTERRUPTED if turn.follows_interruption else _FREE
        try:
            if not await self._begins(turn, cursor):
                return None  # another relay was faster, before it gave the lock away
            leaves = _INTERRUPTED
            members = (command for _, command in self._commands(patch))
            if not await self._write(turn, members):
                return None
            if not await self._move(turn, cursor, patch.version):
                return None
            leaves = _FREE
            return await run_in_slices(_hashes(each for each, _ in self._commands(patch)))
        finally:
            with contextlib.suppress(StoreUnavailable):  # it ends by itself
                await self._swap(self._lock, [turn.token], self._release_lock(leaves))

    def _release_lock(self, value: bytes) -> Command:
        ends = ("PX", _milliseconds(LOCK_TIME)) if value else ()
        return ("SET", self._lock, value, *ends)

    async def _acquire(self, cursor: str | None) -> _Turn | None:
        """Wait for the lock; return None if the stored cursor is another one.

        The key is that of ld-relay's lock.
        """
        deadline = clock.monotonic() + PATIENCE
        while is_at(await self._client.execute("GET", self._cursor), cursor):
            turn = await self._client.run(self._lock, self._take)
            if turn is not None:
                return turn
            if clock.monotonic() >= deadline:
                raise StoreUnavailable(f"other relays hold {self._lock} all the time")
            await asyncio.sleep(WAIT)
        return None

    async def _take(self, connection: RedisConnection) -> _Turn | None:
        """Take the lock if it is free; the fence in its slot always has the latest number."""
        fence, token = self._fences.beside(self._lock), randomness.new_id().encode()
        _, value, number = await connection.execute_all(
            [("WATCH", self._lock), ("GET", self._lock), ("GET", fence)]
        )
        if value not in (None, _FREE, _INTERRUPTED):
            await connection.execute("UNWATCH")
            return None
        is_new = value != _FREE or number is None
        count: Command = ("INCR" if is_new else "GET", fence)
        taking: Command = ("SET", self._lock, token, "PX", _milliseconds(LOCK_TIME))
        replies = await connection.transaction([taking, count])
        if replies is None:
            return None
        _, given = raise_failure(replies)
        # Before the first number there was nobody.
        return _Turn(token, int(given), value != _FREE and number is not None)

    async def _begins(self, turn: _Turn, cursor: str | None) -> bool:
        """Return whether the cursor is as given, and nobody later has begun."""
        mark = turn.follows_interruption
        begin = self._fences.move(turn.number, self._cursor, cursor, None, mark=mark)
        return bool(await self._client.execute(*begin))

    async def _write(self, turn: _Turn, commands: Iterator[MemberCommand]) -> bool:
        """Write the members; return False if somebody later has begun, or the lock is lost."""
        renewal = ("PEXPIRE", self._lock, _milliseconds(LOCK_TIME))
        renewed_at = clock.monotonic()
        while batch := list(islice(commands, BATCH)):
            if clock.monotonic() - renewed_at >= RENEWAL:
                if not await self._swap(self._lock, [turn.token], renewal):
                    return False
                renewed_at = clock.monotonic()
            mark = turn.follows_interruption
            scripts = await run_in_slices(self._fences.writes(turn.number, batch, mark=mark))
            if not all(await self._client.execute_all(scripts)):
                return False
        return True

    async def _move(self, turn: _Turn, before: str | None, after: str) -> bool:
        """Move the cursor if it is still as given, and nobody later has begun."""
        move = self._fences.move(turn.number, self._cursor, before, after, mark=False)
        return bool(await self._client.execute(*move))


def _hashes(hashes: Iterable[str]) -> Steps[frozenset[str]]:
    """Return hashes as a set."""
    found = set()
    for each in hashes:
        found.add(each)
        yield
    return frozenset(found)


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
