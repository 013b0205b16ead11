"""Redis Cluster as data store where the keys of an environment are on several servers.

No transaction holds them all, but each hash is changed by one. Their order keeps what a reader may
count on: items come first, segments before the flags that refer to them, then what is no longer
there goes, then the marker is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from redis.exceptions import ResponseError

from relay.aio import meanwhile
from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores.fingerprint import Fingerprint
from relay.stores.redis.client import RedisClient
from relay.stores.redis.connections import Command, RedisConnection, commit
from relay.stores.redis.layout import Hashes, Layout, pairs_of
from relay.stores.redis.store import (
    BATCH,
    FINGERPRINT,
    IN_ORDER,
    RedisStore,
    is_wrong_type,
)


def data_store(client: RedisClient, prefix: str = "") -> RedisStore:
    """Return the data store of an environment: divided if its keys may be on several servers."""
    is_divided = client.divides(Layout(prefix).keys)
    return DividedRedisStore(client, prefix) if is_divided else RedisStore(client, prefix)


class DividedRedisStore(RedisStore):
    """Data store for one environment whose keys are in different slots of a cluster."""

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and set the marker.

        Raises:
            StoreUnavailable: maybe a part was written.
        """
        segments = self._layout.hash(Kind.SEGMENT)
        surplus = await self._client.run(segments, partial(self._merge, payload))
        await self._client.run(
            self._layout.hash(Kind.FLAG),
            lambda connection: commit(connection, self._replacing(Kind.FLAG, payload)),
        )
        if surplus:
            removing: list[Command] = [
                ("HDEL", segments, *surplus[start : start + BATCH])
                for start in range(0, len(surplus), BATCH)
            ]
            await self._client.run(segments, lambda connection: commit(connection, removing))
        await self._client.execute("SET", self._layout.marker, b"")

    async def _merge(self, payload: Payload, connection: RedisConnection) -> list[bytes]:
        """Write all segments; return the stored ones that are no longer there."""
        name, segments = self._layout.hash(Kind.SEGMENT), payload.all(Kind.SEGMENT)
        try:
            stored = await connection.execute("HKEYS", name)
        except ResponseError as e:
            if not is_wrong_type(e):
                raise
            stored = []
            await connection.execute("DEL", name)  # another program has replaced it
        if segments:
            await commit(connection, self._adding(segments.values()))
        return [key for key in stored if key.decode(errors="replace") not in segments]

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions, segments first.

        Returns:
            True if the store was initialised; otherwise nothing is written.

        Raises:
            StoreUnavailable: maybe a part was written.
        """
        with meanwhile(self._is_initialised()) as is_initialised:
            for kind in IN_ORDER:
                those = [item for item in items if item.kind is kind]
                if those:
                    work = partial(self._write_newer, those, is_initialised)
                    if not await self._client.run(self._layout.hash(kind), work):
                        return False
            return await is_initialised

    async def _is_initialised(self) -> bool:
        return bool(await self._client.execute("EXISTS", self._layout.marker))

    def _marking(self, fingerprint: Fingerprint) -> list[Command]:
        return [
            ("HSET", self._layout.notes_beside(kind), FINGERPRINT, str(fingerprint))
            for kind in Kind
        ]

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether marker, fingerprint and as many items are there.

        A server may have lost its data while the marker stands at another one; changes may have
        filled a hash again since.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        exist: list[Command] = [("EXISTS", self._layout.marker)]
        sizes: list[Command] = [("HLEN", self._layout.hash(kind)) for kind in Kind]
        notes: list[Command] = []
        if self._may_note:
            notes = [("HGET", self._layout.notes_beside(kind), FINGERPRINT) for kind in Kind]
        marked, *replies = await self._run([*exist, *sizes, *notes])
        if not self._may_note:
            return False
        counts, found = replies[: len(sizes)], replies[len(sizes) :]
        are_whole = all(
            count >= fingerprint.counts[kind] for kind, count in zip(Kind, counts, strict=True)
        )
        return bool(marked) and are_whole and set(found) == {str(fingerprint).encode()}

    async def _read(self) -> Hashes | None:
        """Return both hashes; None if the store is not initialised.

        They are read against the order in which they are written: a new flag finds its segments.
        """
        if not await self._client.execute("EXISTS", self._layout.marker):
            return None
        hashes: Hashes = {}
        for kind in reversed(IN_ORDER):
            try:
                reply = await self._client.execute("HGETALL", self._layout.hash(kind))
            except StoreUnavailable as e:
                if is_wrong_type(e.__cause__):
                    return None  # another program has replaced it
                raise
            hashes[kind] = pairs_of(reply)
        return hashes
