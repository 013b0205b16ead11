"""Redis or Valkey data store, in the layout that SDKs in daemon mode read (datastore 4.1, 4.3).

Only commands that ld-relay sends are used (WATCH, MULTI, HGET …; no HMGET, no scripts), so that a
database user whose permissions fit ld-relay suffices. redis-py's exceptions are translated here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from relay.aio import run_in_slices
from relay.config.schema import Redis as RedisOptions
from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores import Stored, Versions
from relay.stores.fingerprint import Fingerprint
from relay.stores.redis.connect import connection_pool, masked_address, reason_of
from relay.stores.redis.layout import (
    Hashes,
    Layout,
    chunks,
    parse_items,
    parse_versions,
    version_of,
)

BATCH = 256
"""Stored items that are read and compared at a time: about a millisecond for the event loop."""

FINGERPRINT = "fingerprint"
"""Field of the relays' own hash."""

Execute = Callable[[Sequence[Sequence[str | bytes]]], Awaitable[list[Any]]]
"""Sends commands, and returns their replies."""

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
        self._pool = connection_pool(options)
        self._may_note = True
        """False once the server has refused access to the relays' own hash."""
        self._connect_timeout = options.connect_timeout
        self._read_timeout = options.read_timeout

    def __repr__(self) -> str:
        return f"<RedisStore {self.server} {self.prefix!r}>"

    async def load(self) -> Stored | None:
        """Return everything stored; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        stored = await self._read()
        return None if stored is None else await run_in_slices(parse_items(stored))

    async def versions(self) -> Versions | None:
        """Return the versions of all stored items; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        stored = await self._read()
        return None if stored is None else await run_in_slices(parse_versions(stored))

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and set the marker, in one transaction.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        async with self._connection() as connection:
            await self._execute(connection, "MULTI")
            for kind in (Kind.SEGMENT, Kind.FLAG):
                await self._execute(connection, "DEL", self._layout.hash(kind))
                await self._write_items(connection, kind, payload.all(kind).values())
            await self._execute(connection, "SET", self._layout.marker, b"")
            _raise_failure(await self._execute(connection, "EXEC"))

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions.

        Returns:
            True if the store was initialised; otherwise nothing is written.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        watched = (self._layout.marker, *map(self._layout.hash, Kind))
        async with self._connection() as connection:
            for _ in range(MAX_RACES):
                await self._execute(connection, "WATCH", *watched)
                if not await self._execute(connection, "EXISTS", self._layout.marker):
                    await self._execute(connection, "UNWATCH")
                    return False
                if await self._write_newer(connection, items):
                    return True
        raise StoreUnavailable("other writers leave no room")

    async def _write_newer(self, connection: AbstractConnection, items: Sequence[Item]) -> bool:
        """Write newer items; return False if another writer has changed a watched key."""
        by_kind = {kind: [item for item in items if item.kind is kind] for kind in Kind}
        kinds = [kind for kind in Kind if by_kind[kind]]
        newer = {kind: await self._newer(connection, kind, by_kind[kind]) for kind in kinds}
        if not any(newer.values()):
            await self._execute(connection, "UNWATCH")
            return True
        await self._execute(connection, "MULTI")
        for kind in kinds:
            await self._write_items(connection, kind, newer[kind])
        done = await self._execute(connection, "EXEC")
        if done is None:
            return False
        _raise_failure(done)
        return True

    async def _newer(
        self, connection: AbstractConnection, kind: Kind, items: Sequence[Item]
    ) -> list[Item]:
        """Return the items of one kind that are newer than the stored ones."""
        name, newer = self._layout.hash(kind), []
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            stored = await self._execute_all(
                connection, [("HGET", name, item.key) for item in batch]
            )
            newer += [
                item
                for item, json in zip(batch, stored, strict=True)
                if json is None or item.version > version_of(json).number
            ]
        return newer

    async def _write_items(
        self, connection: AbstractConnection, kind: Kind, items: Iterable[Item]
    ) -> None:
        for chunk in chunks(items):
            await self._execute(connection, "HSET", self._layout.hash(kind), *chunk)

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
            async with self._connection() as connection:
                return await self._execute_all(connection, commands)
        except StoreUnavailable as e:
            if not self._may_note or not isinstance(e.__cause__, NoPermissionError):
                raise
            self._may_note = False
            return [None] * len(commands)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()

    async def _read(self) -> Hashes | None:
        """Return both hashes, read in one transaction; None if the store is not initialised."""
        async with self._connection() as connection:
            await self._execute(connection, "MULTI")
            await self._execute(connection, "EXISTS", self._layout.marker)
            for kind in Kind:
                await self._execute(connection, "HGETALL", self._layout.hash(kind))
            replies = await self._execute(connection, "EXEC")
            if any(map(_is_wrong_type, replies)):
                return None  # another program has replaced a hash
            marked, *hashes = _raise_failure(replies)
        if not marked:
            return None
        return {
            kind: dict(zip(pairs[::2], pairs[1::2], strict=True))
            for kind, pairs in zip(Kind, hashes, strict=True)
        }

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Execute]:
        """Yield a function that sends commands in one batch and returns their replies.

        All go over one connection, which nobody else uses meanwhile.

        Raises:
            StoreUnavailable: the database cannot be reached, or refuses a command.
        """
        async with self._connection() as connection:
            yield partial(self._execute_all, connection)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AbstractConnection]:
        """Acquire a connection for exclusive use; close all idle connections after a failure.

        Closing a connection discards its unfinished transaction. After a failover, new connections
        resolve the server's name again.
        """
        try:
            async with asyncio.timeout(self._connect_timeout + self._read_timeout):
                connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                yield connection
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            finally:
                await self._pool.release(connection)
        except (RedisError, OSError, TimeoutError) as e:
            await self._pool.disconnect(inuse_connections=False)
            raise StoreUnavailable(reason_of(e)) from e

    async def _execute(self, connection: AbstractConnection, *command: str | bytes) -> Any:
        """Send one command; return its reply."""
        [reply] = await self._execute_all(connection, [command])
        return reply

    async def _execute_all(
        self, connection: AbstractConnection, commands: Sequence[Sequence[str | bytes]]
    ) -> list[Any]:
        """Send commands in one batch, within one timeout; return their replies.

        The library's own timeout is not used: on Python 3.11 it can swallow a cancellation.
        """
        async with asyncio.timeout(self._read_timeout):
            await connection.send_packed_command(_packed(commands))
            return [await connection.read_response() for _ in commands]


def _packed(commands: Sequence[Sequence[str | bytes]]) -> bytes:
    """Return commands as sent; redis-py's own packing takes four times as long for small ones."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            value = argument.encode() if isinstance(argument, str) else argument
            parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")


def _raise_failure(replies: list[Any]) -> list[Any]:
    """Return the replies of a transaction; raise the error of a failed command."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
