"""Members of big segments in Redis or Valkey, in the layout that SDKs read (datastore 4.9)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from relay.config.schema import Redis as RedisOptions
from relay.protocol.bigsegments import Patch
from relay.stores import label_of
from relay.stores.bigsegments import Metadata
from relay.stores.redis.client import RedisClient, raise_failure
from relay.stores.redis.connect import masked_address
from relay.stores.redis.layout import Layout

BATCH = 64
"""Commands in one batch: about a millisecond before the event loop can run other tasks."""

LEASE = 6.0
"""Seconds of the lease: renewed every two, and taken over within eight."""

Command = tuple[str, ...]


class RedisBigSegmentStore:
    """Big segments of one environment in Redis.

    Args:
        options: connection options with a complete URL.
        prefix: prefix of the keys; empty for `launchdarkly`.

    Raises:
        ConfigError: the URL or a TLS file is unusable.
    """

    lease_lifetime = LEASE

    def __init__(self, options: RedisOptions, prefix: str = "") -> None:
        self._client = RedisClient(options)
        self._prefix = prefix = Layout(prefix).prefix
        self.label = label_of("redis", masked_address(options.url))
        self._include = f"{prefix}:big_segment_include:"
        self._exclude = f"{prefix}:big_segment_exclude:"
        self._cursor = f"{prefix}:big_segments_cursor"
        self._synchronized = f"{prefix}:big_segments_synchronized_on"
        self._lock = f"{prefix}:big_segments_lock"
        self._lease = f"{prefix}:$relay:big_segments"

    def __repr__(self) -> str:
        return f"<RedisBigSegmentStore {self.label} {self._prefix!r}>"

    async def metadata(self) -> Metadata:
        """Return the state of what is stored."""
        async with self._client.connection() as connection:
            cursor, synchronized = await connection.execute_all(
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
        commands = list(self._commands(patch))
        async with self._client.connection() as connection:
            _, stored = await connection.execute_all(
                [("WATCH", self._lock, self._cursor), ("GET", self._cursor)]
            )
            if stored != (None if cursor is None else cursor.encode()):
                await connection.execute_all([("UNWATCH",)])
                return None
            head: list[Command] = [
                ("MULTI",),
                ("SET", self._lock, ""),
                ("SET", self._cursor, patch.version),
            ]
            await connection.execute_all(head)
            for start in range(0, len(commands), BATCH):
                await connection.execute_all(
                    [command for _, command in commands[start : start + BATCH]]
                )
                await asyncio.sleep(0)
            [replies] = await connection.execute_all([("EXEC",)])
        return None if replies is None else _changed(commands, replies[2:])

    def _commands(self, patch: Patch) -> Iterator[tuple[str, Command]]:
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
        async with self._client.connection() as connection:
            await connection.execute_all([("SET", self._synchronized, str(int(at * 1000)))])

    async def memberships(self, hashes: Sequence[str]) -> list[Mapping[str, bool]]:
        """Return the memberships of context keys, in one round trip."""
        keys = [key + each for each in hashes for key in (self._include, self._exclude)]
        async with self._client.connection() as connection:
            sets = await connection.execute_all([("SMEMBERS", key) for key in keys])
        return [
            {
                **dict.fromkeys(map(_text, excluded), False),
                **dict.fromkeys(map(_text, included), True),
            }
            for included, excluded in zip(sets[::2], sets[1::2], strict=True)
        ]

    async def claim(self, owner: str) -> bool:
        """Take the lease if it is free, or keep it; Redis ends it."""
        lifetime = str(int(LEASE * 1000))
        return await self._change_lease({None, owner.encode()}, "SET", owner, "PX", lifetime)

    async def release(self, owner: str) -> None:
        """Give the lease up, if the owner has it."""
        await self._change_lease({owner.encode()}, "DEL")

    async def _change_lease(
        self, allowed: Collection[bytes | None], command: str, *arguments: str
    ) -> bool:
        """Run a command on the lease if its owner is one of those allowed."""
        async with self._client.connection() as connection:
            _, holder = await connection.execute_all([("WATCH", self._lease), ("GET", self._lease)])
            if holder not in allowed:
                await connection.execute("UNWATCH")
                return False
            *_, replies = await connection.execute_all(
                [("MULTI",), (command, self._lease, *arguments), ("EXEC",)]
            )
        return replies is not None and bool(raise_failure(replies))

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def _text(reference: bytes) -> str:
    return reference.decode(errors="replace")


def _changed(commands: Sequence[tuple[str, Command]], replies: list[Any]) -> frozenset[str]:
    """Return the hashes whose sets have changed; raise the error of a failed command."""
    raise_failure(replies)
    return frozenset(each for (each, _), reply in zip(commands, replies, strict=True) if reply)
