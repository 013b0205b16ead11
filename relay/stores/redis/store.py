"""Redis or Valkey data store, in the layout that SDKs in daemon mode read (datastore 4.1, 4.3).

Only commands that ld-relay sends are used (WATCH, MULTI, HGET …; no HMGET, no scripts), so that a
database user whose permissions fit ld-relay suffices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from relay.aio import run_in_slices
from relay.config.schema import Redis as RedisOptions
from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores import Stored, Versions
from relay.stores.fingerprint import Fingerprint
from relay.stores.items import parse_items, parse_versions, version_of
from relay.stores.redis.client import RedisClient, RedisConnection, raise_failure
from relay.stores.redis.connect import masked_address
from relay.stores.redis.layout import Hashes, Layout, chunks, entries, fields

BATCH = 256
"""Stored items that are read and compared at a time: about a millisecond for the event loop."""

FINGERPRINT = "fingerprint"
"""Field of the relays' own hash."""

MAX_RACES = 100
"""Attempts of a write that other writers interrupt, before it fails."""


class RedisStore:
    """Data store for one environment in Redis.

    Args:
        options: connection options with a complete URL.
        prefix: prefix of the keys; empty for `launchdarkly`.

    Raises:
        ConfigError: the URL or a TLS file is unusable.
    """

    def __init__(self, options: RedisOptions, prefix: str = "") -> None:
        self._layout = Layout(prefix)
        self.prefix = self._layout.prefix
        self.server = masked_address(options.url)
        self._client = RedisClient(options)
        self._may_note = True
        """False once the server has refused access to the relays' own hash."""

    def __repr__(self) -> str:
        return f"<RedisStore {self.server} {self.prefix!r}>"

    async def load(self) -> Stored | None:
        """Return everything stored; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        stored = await self._read()
        return None if stored is None else await run_in_slices(parse_items(entries(stored)))

    async def versions(self) -> Versions | None:
        """Return the versions of all stored items; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        stored = await self._read()
        return None if stored is None else await run_in_slices(parse_versions(entries(stored)))

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and set the marker, in one transaction.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        async with self._client.connection() as connection:
            await connection.execute("MULTI")
            for kind in (Kind.SEGMENT, Kind.FLAG):
                await connection.execute("DEL", self._layout.hash(kind))
                await self._write_items(connection, kind, payload.all(kind).values())
            await connection.execute("SET", self._layout.marker, b"")
            raise_failure(await connection.execute("EXEC"))

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions.

        Returns:
            True if the store was initialised; otherwise nothing is written.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        watched = (self._layout.marker, *map(self._layout.hash, Kind))
        async with self._client.connection() as connection:
            for _ in range(MAX_RACES):
                await connection.execute("WATCH", *watched)
                if not await connection.execute("EXISTS", self._layout.marker):
                    await connection.execute("UNWATCH")
                    return False
                if await self._write_newer(connection, items):
                    return True
        raise StoreUnavailable("other writers leave no room")

    async def _write_newer(self, connection: RedisConnection, items: Sequence[Item]) -> bool:
        """Write newer items; return False if another writer has changed a watched key."""
        by_kind = {kind: [item for item in items if item.kind is kind] for kind in Kind}
        kinds = [kind for kind in Kind if by_kind[kind]]
        newer = {kind: await self._newer(connection, kind, by_kind[kind]) for kind in kinds}
        if not any(newer.values()):
            await connection.execute("UNWATCH")
            return True
        await connection.execute("MULTI")
        for kind in kinds:
            await self._write_items(connection, kind, newer[kind])
        done = await connection.execute("EXEC")
        if done is None:
            return False
        raise_failure(done)
        return True

    async def _newer(
        self, connection: RedisConnection, kind: Kind, items: Sequence[Item]
    ) -> list[Item]:
        """Return the items of one kind that are newer than the stored ones."""
        name, newer = self._layout.hash(kind), []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            stored = await connection.execute_all([("HGET", name, item.key) for item in batch])
            newer += [
                item
                for item, json in zip(batch, stored, strict=True)
                if json is None or item.version > version_of(json).number
            ]
        return newer

    async def _write_items(
        self, connection: RedisConnection, kind: Kind, items: Iterable[Item]
    ) -> None:
        for chunk in chunks(fields(items)):
            await connection.execute("HSET", self._layout.hash(kind), *chunk)

    def problem_with(self, item: Item) -> str | None:  # noqa: ARG002 - the contract's
        """Return None: Redis holds items of any size that upstream sends."""
        return None

    async def mark(self, fingerprint: Fingerprint) -> None:
        """Write the fingerprint of the stored items, if the user may.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        if self._may_note:
            await self._run(("HSET", self._layout.notes, FINGERPRINT, str(fingerprint)))

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether marker, hashes and fingerprint are there.

        The hashes are looked at because a server that runs out of memory evicts keys one by one.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        kinds = [kind for kind in Kind if fingerprint.counts[kind]]
        keys = [self._layout.marker, *map(self._layout.hash, kinds)]
        exist = [("EXISTS", key) for key in keys]
        if not self._may_note:
            await self._run(*exist)
            return False
        found, *exist = await self._run(("HGET", self._layout.notes, FINGERPRINT), *exist)
        return found == str(fingerprint).encode() and all(exist)

    async def _run(self, *commands: Sequence[str]) -> list[Any]:
        """Run commands that may name the relays' own hash; return their replies.

        A database user may be restricted to the keys that SDKs read. Then it is never named again.
        """
        try:
            async with self._client.connection() as connection:
                return await connection.execute_all(commands)
        except StoreUnavailable as e:
            if not self._may_note or not isinstance(e.__cause__, NoPermissionError):
                raise
            self._may_note = False
            return [None] * len(commands)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _read(self) -> Hashes | None:
        """Return both hashes, read in one transaction; None if the store is not initialised."""
        async with self._client.connection() as connection:
            await connection.execute("MULTI")
            await connection.execute("EXISTS", self._layout.marker)
            for kind in Kind:
                await connection.execute("HGETALL", self._layout.hash(kind))
            replies = await connection.execute("EXEC")
            if any(map(_is_wrong_type, replies)):
                return None  # another program has replaced a hash
            marked, *hashes = raise_failure(replies)
        if not marked:
            return None
        return {
            kind: dict(zip(pairs[::2], pairs[1::2], strict=True))
            for kind, pairs in zip(Kind, hashes, strict=True)
        }


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")
