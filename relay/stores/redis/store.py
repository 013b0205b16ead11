"""Redis or Valkey in the layout that SDKs in daemon mode read (datastore 4.1, 4.3).

Only commands that ld-relay was seen to send are used (WATCH, MULTI, HGET …; no HMGET, no scripts),
so that a user of the database with rights to no others stays sufficient. redis-py's exceptions end
here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from redis.asyncio.connection import (
    AbstractConnection,
)
from redis.exceptions import RedisError, ResponseError

from relay.config.schema import Redis as RedisOptions
from relay.errors import InvalidData, StoreUnavailable
from relay.model.item import InvalidItem, Item, Kind, parse
from relay.model.payload import Payload
from relay.model.text import one_line
from relay.stores import UNREADABLE, Stored, Version, Versions
from relay.stores.redis.connect import _masked, _pool, _reason

DEFAULT_PREFIX = "launchdarkly"

CHUNK = 256 * 1024
"""Bytes of items in one command: half a millisecond of packing, then others have a turn."""

SLICE = 256
"""Stored items that are read in one turn of the loop: about a millisecond."""

MAX_RACES = 100
"""Times that another writer may be quicker before a write counts as failed."""

_NAMES = {Kind.FLAG: "features", Kind.SEGMENT: "segments"}

_FLAG_TOMBSTONE = (
    b'{"key":"$deleted","on":false,"prerequisites":[],"targets":[],"contextTargets":[],"rules":[],'
    b'"fallthrough":{},"offVariation":null,"variations":[],"clientSide":false,"salt":"",'
    b'"trackEvents":false,"trackEventsFallthrough":false,"debugEventsUntilDate":null,'
    b'"version":%d,"deleted":true}'
)
_SEGMENT_TOMBSTONE = (
    b'{"key":"$deleted","included":[],"excluded":[],"includedContexts":[],"excludedContexts":[],'
    b'"salt":"","rules":[],"version":%d,"generation":null,"deleted":true}'
)


class _Versioned(msgspec.Struct, frozen=True):
    version: int | float = 0
    deleted: bool = False


_VERSIONED = msgspec.json.Decoder(_Versioned)


class RedisStore:
    """The data of one environment in a Redis.

    Args:
        options: where it is; the URL is complete.
        prefix: of the keys; empty for `launchdarkly`.

    Raises:
        ConfigError: the URL, or a file for TLS, cannot be used.
    """

    def __init__(self, options: RedisOptions, prefix: str = "") -> None:
        self.prefix = one_line(prefix or DEFAULT_PREFIX)
        self.server = _masked(options.url)
        self._pool = _pool(options)
        self._connect_timeout = options.connect_timeout
        self._read_timeout = options.read_timeout
        self._marker = f"{self.prefix}:$inited"

    async def load(self) -> Stored | None:
        """Return everything that is stored; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        stored = await self._read()
        if stored is None:
            return None
        items: list[Item] = []
        invalid: list[InvalidItem] = []
        async for kind, key, json in _sliced(stored):
            try:
                items.append(parse(kind, key, json))
            except InvalidData as e:
                invalid.append(InvalidItem(kind, key, e.reason))
        return Stored(Payload.of(items), tuple(invalid))

    async def versions(self) -> Versions | None:
        """Return the version of each stored item; None if the store was never initialised.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        stored = await self._read()
        if stored is None:
            return None
        return {(kind, key): _version(json) async for kind, key, json in _sliced(stored)}

    async def init(self, payload: Payload) -> None:
        """Replace everything by `payload` and mark the store as initialised, in one transaction.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        async with self._connection() as connection:
            await self._ask(connection, "MULTI")
            for kind in (Kind.SEGMENT, Kind.FLAG):
                await self._ask(connection, "DEL", self._hash(kind))
                await self._set(connection, kind, payload.all(kind).values())
            await self._ask(connection, "SET", self._marker, b"")
            _see_success(await self._ask(connection, "EXEC"))

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write each item unless the store holds the same or a greater version of it.

        Returns:
            Whether the store was initialised; if not, nothing is written.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        async with self._connection() as connection:
            for _ in range(MAX_RACES):
                await self._ask(connection, "WATCH", self._marker, *map(self._hash, Kind))
                if not await self._ask(connection, "EXISTS", self._marker):
                    await self._ask(connection, "UNWATCH")
                    return False
                if await self._written(connection, items):
                    return True
        raise StoreUnavailable("other writers leave no room")

    async def _written(self, connection: AbstractConnection, items: Sequence[Item]) -> bool:
        """Write what is newer; return whether nobody else wrote since the keys are watched."""
        by_kind = {kind: [item for item in items if item.kind is kind] for kind in Kind}
        kinds = [kind for kind in Kind if by_kind[kind]]
        newer = {kind: await self._newer(connection, kind, by_kind[kind]) for kind in kinds}
        if not any(newer.values()):
            await self._ask(connection, "UNWATCH")
            return True
        await self._ask(connection, "MULTI")
        for kind in kinds:
            await self._set(connection, kind, newer[kind])
        done = await self._ask(connection, "EXEC")
        if done is None:
            return False
        _see_success(done)
        return True

    async def _newer(
        self, connection: AbstractConnection, kind: Kind, items: Sequence[Item]
    ) -> list[Item]:
        """Return the items of a kind whose version is above the stored one."""
        name, newer = self._hash(kind), []
        for start in range(0, len(items), SLICE):
            part = items[start : start + SLICE]
            stored = await self._ask_each(connection, [("HGET", name, item.key) for item in part])
            newer += [
                item
                for item, json in zip(part, stored, strict=True)
                if json is None or item.version > _version(json).number
            ]
        return newer

    async def _set(self, connection: AbstractConnection, kind: Kind, items: Iterable[Item]) -> None:
        for chunk in _chunks(items):
            await self._ask(connection, "HSET", self._hash(kind), *chunk)

    async def aclose(self) -> None:
        """Give connections back."""
        await self._pool.aclose()

    async def _read(self) -> dict[Kind, dict[bytes, bytes]] | None:
        """Return both hashes as they were at one moment."""
        async with self._connection() as connection:
            await self._ask(connection, "MULTI")
            await self._ask(connection, "EXISTS", self._marker)
            for kind in Kind:
                await self._ask(connection, "HGETALL", self._hash(kind))
            replies = await self._ask(connection, "EXEC")
            if any(map(_is_wrong_type, replies)):
                return None  # somebody has put something else in the place of a hash
            marked, *hashes = _see_success(replies)
        if not marked:
            return None
        return {
            kind: dict(zip(pairs[::2], pairs[1::2], strict=True))
            for kind, pairs in zip(Kind, hashes, strict=True)
        }

    def _hash(self, kind: Kind) -> str:
        return f"{self.prefix}:{_NAMES[kind]}"

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AbstractConnection]:
        """Lend a connection that nobody else uses; after a failure all are closed.

        A half made transaction ends with its connection, and after a failover the name of the
        server is looked up anew.
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
            raise StoreUnavailable(_reason(e)) from e

    async def _ask(self, connection: AbstractConnection, *command: str | bytes) -> Any:
        """Send a command and return its reply."""
        [reply] = await self._ask_each(connection, [command])
        return reply

    async def _ask_each(
        self, connection: AbstractConnection, commands: Sequence[Sequence[str | bytes]]
    ) -> list[Any]:
        """Send commands together and return their replies, in time for one.

        The library's own time limit on sending would, on Python 3.11, swallow a cancellation.
        """
        async with asyncio.timeout(self._read_timeout):
            await connection.send_packed_command(connection.pack_commands(commands))
            return [await connection.read_response() for _ in commands]


def _version(json: bytes) -> Version:
    """Return the version of a stored item; one that cannot be read is below all others."""
    try:
        stored = _VERSIONED.decode(json)
        return Version(int(stored.version), live=not stored.deleted)
    except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError, RecursionError):
        return UNREADABLE


def _json(item: Item) -> bytes:
    """Return what is stored for an item; a tombstone is an object that old SDKs can read."""
    if item.json is not None:
        return item.json
    tombstone = _FLAG_TOMBSTONE if item.kind is Kind.FLAG else _SEGMENT_TOMBSTONE
    return tombstone % item.version


def _chunks(items: Iterable[Item]) -> Iterator[list[str | bytes]]:
    """Yield keys and values in turn, so many at a time as one command shall hold."""
    chunk: list[str | bytes] = []
    size = 0
    for item in items:
        json = _json(item)
        chunk += (item.key, json)
        size += len(json)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


async def _sliced(
    stored: dict[Kind, dict[bytes, bytes]],
) -> AsyncIterator[tuple[Kind, str, bytes]]:
    """Yield all stored items, with a turn of the loop for others now and then."""
    count = 0
    for kind, pairs in stored.items():
        for key, json in pairs.items():
            count += 1
            if count % SLICE == 0:
                await asyncio.sleep(0)
            yield kind, key.decode(errors="replace"), json


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")


def _see_success(replies: list[Any]) -> list[Any]:
    """Return the replies of a transaction unless one of its commands failed."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies
