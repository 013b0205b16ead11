"""Members of big segments in Redis or Valkey, in the layout that SDKs read (datastore 4.9)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from relay.aio import run_in_slices
from relay.protocol.bigsegments import Patch
from relay.steps import Steps
from relay.stores import label_of
from relay.stores.bigsegments import Metadata
from relay.stores.redis.client import RedisClient
from relay.stores.redis.connections import Command, RedisConnection, commit, raise_failure
from relay.stores.redis.layout import Layout

LEASE = 6.0
"""Seconds of the lease: renewed every two, and taken over within eight."""

MemberCommand = tuple[str, str, str]
"""Command, key and reference of a segment."""


class RedisBigSegmentStore:
    """Big segments of one environment in Redis, where one transaction holds all keys.

    That is one server, or a cluster if the prefix has a hash tag; see also
    `DividedBigSegmentStore`.

    Args:
        client: access to the servers.
        prefix: prefix of the keys; empty for `launchdarkly`.
    """

    lease_lifetime = LEASE

    def __init__(self, client: RedisClient, prefix: str = "") -> None:
        self._client = client
        self._prefix = prefix = Layout(prefix).prefix
        self.label = label_of("redis", client.label)
        self._include = f"{prefix}:big_segment_include:"
        self._exclude = f"{prefix}:big_segment_exclude:"
        self._cursor = f"{prefix}:big_segments_cursor"
        self._synchronized = f"{prefix}:big_segments_synchronized_on"
        self._lock = f"{prefix}:big_segments_lock"
        self._lease = f"{prefix}:$relay:big_segments"
        client.join(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label} {self._prefix!r}>"

    async def metadata(self) -> Metadata:
        """Return the state of what is stored."""
        cursor, synchronized = await self._client.execute_all(
            [("GET", self._cursor), ("GET", self._synchronized)]
        )
        is_time = (
            synchronized is not None and re.fullmatch(rb"[0-9]{1,18}", synchronized) is not None
        )
        return Metadata(
            None if cursor is None else cursor.decode(errors="replace"),
            int(synchronized) / 1000 if is_time else None,
            is_readable=is_time or synchronized is None,
        )

    async def apply(self, patch: Patch, cursor: str | None) -> frozenset[str] | None:
        """Apply a patch in one transaction; it fails if another relay writes at the same time."""
        return await self._client.run(self._cursor, partial(self._apply, patch, cursor))

    async def _apply(
        self, patch: Patch, cursor: str | None, connection: RedisConnection
    ) -> frozenset[str] | None:
        _, stored = await connection.execute_all(
            [("WATCH", self._lock, self._cursor), ("GET", self._cursor)]
        )
        if not is_at(stored, cursor):
            await connection.execute("UNWATCH")
            return None
        moving: list[Command] = [("SET", self._lock, ""), ("SET", self._cursor, patch.version)]
        members = (command for _, command in self._commands(patch))
        replies = await connection.transaction(chain(moving, members))
        if replies is None:
            return None
        hashes = (each for each, _ in self._commands(patch))
        return await run_in_slices(_changed(hashes, replies, len(moving)))

    def _commands(self, patch: Patch) -> Iterator[tuple[str, MemberCommand]]:
        """Yield the commands of a patch, each with the hash that it is about."""
        for command, key, hashes in (
            ("SADD", self._include, patch.included.add),
            ("SREM", self._include, patch.included.remove),
            ("SADD", self._exclude, patch.excluded.add),
            ("SREM", self._exclude, patch.excluded.remove),
        ):
            for each in hashes or ():
                yield each, (command, key + each, patch.segment_id)

    async def mark_synchronized(self, at: float) -> None:
        """Write the time at which all patches were known to be stored."""
        await self._client.execute("SET", self._synchronized, str(int(at * 1000)))

    async def memberships(self, hashes: Sequence[str]) -> list[Mapping[str, bool]]:
        """Return the memberships of context keys, in one round trip."""
        keys = [key + each for each in hashes for key in (self._include, self._exclude)]
        sets = await self._client.execute_all([("SMEMBERS", key) for key in keys])
        return [
            {
                **dict.fromkeys(map(_text, excluded), False),
                **dict.fromkeys(map(_text, included), True),
            }
            for included, excluded in zip(sets[::2], sets[1::2], strict=True)
        ]

    async def claim(self, owner: str) -> bool:
        """Take the lease if it is free, or keep it; Redis ends it."""
        taking = ("SET", self._lease, owner, "PX", str(int(LEASE * 1000)))
        return await self._swap(self._lease, [None, owner.encode()], taking)

    async def release(self, owner: str) -> None:
        """Give the lease up, if the owner has it."""
        await self._swap(self._lease, [owner.encode()], ("DEL", self._lease))

    async def _swap(self, key: str, accepted: Collection[bytes | None], command: Command) -> bool:
        """Run a command if the value of its key is one of those that are accepted."""
        return await self._client.run(key, partial(_swap, key, accepted, command))

    async def aclose(self) -> None:
        """Close all connections, unless other stores use them."""
        await self._client.leave(self)


async def _swap(
    key: str, accepted: Collection[bytes | None], command: Command, connection: RedisConnection
) -> bool:
    _, value = await connection.execute_all([("WATCH", key), ("GET", key)])
    if value not in accepted:
        await connection.execute("UNWATCH")
        return False
    return await commit(connection, [command])


def is_at(stored: bytes | None, cursor: str | None) -> bool:
    """Return whether a stored cursor is as given."""
    return stored == (None if cursor is None else cursor.encode())


def _text(reference: bytes) -> str:
    return reference.decode(errors="replace")


def _changed(hashes: Iterable[str], replies: list[Any], others: int) -> Steps[frozenset[str]]:
    """Return the hashes whose sets have changed; raise the error of a failed command.

    Args:
        hashes: of the commands.
        replies: to them, after those to others.
        others: number of other commands.
    """
    raise_failure(replies[:others])
    changed = set()
    for each, reply in zip(hashes, islice(replies, others, None), strict=True):
        if isinstance(reply, Exception):
            raise reply
        if reply:
            changed.add(each)
        yield
    return frozenset(changed)
