"""Redis or Valkey in the layout that SDKs in daemon mode read (datastore 4.1, 4.3).

Only commands of the reference are used (WATCH, MULTI, HSET …, no scripts), so that a user of the
database with few rights stays sufficient. redis-py's exceptions end here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from relay.config.schema import Redis as RedisOptions
from relay.errors import InvalidData, StoreUnavailable
from relay.model.item import InvalidItem, Item, Kind, parse
from relay.model.payload import Payload
from relay.stores import UNREADABLE, Stored, Version, Versions

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
        ValueError: the URL cannot be used.
    """

    def __init__(self, options: RedisOptions, prefix: str = "") -> None:
        self.prefix = prefix or DEFAULT_PREFIX
        self.server = _masked(options.url)
        self._pool = ConnectionPool.from_url(options.url, **_connection_options(options))
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
        keys = [item.key for item in items]
        stored = await self._ask(connection, "HMGET", self._hash(kind), *keys)
        return [
            item
            for item, json in zip(items, stored, strict=True)
            if json is None or item.version > _version(json).number
        ]

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
            marked, *hashes = _see_success(await self._ask(connection, "EXEC"))
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
        """Send a command and return its reply.

        The library's own time limit on sending would, on Python 3.11, swallow a cancellation.
        """
        async with asyncio.timeout(self._read_timeout):
            await connection.send_command(*command)
            return await connection.read_response()


def _connection_options(options: RedisOptions) -> dict[str, Any]:
    given: dict[str, Any] = {
        "socket_connect_timeout": options.connect_timeout,
        "socket_timeout": None,  # see `_ask`
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),  # the mirror tries again, and tells
        "protocol": 2,  # older servers and proxies know no other
    }
    if options.url.startswith("unix:"):
        del given["socket_keepalive"]
    if options.username:
        given["username"] = options.username
    if options.password:
        given["password"] = options.password.reveal()
    if options.url.startswith("rediss:"):
        given |= {
            "ssl_cert_reqs": "required",
            "ssl_ca_certs": options.ca_file or None,
            "ssl_certfile": options.client_certificate_file or None,
            "ssl_keyfile": options.client_key_file or None,
        }
    return given


def _masked(url: str) -> str:
    """Return a URL as `/status` shows it: the password is `xxxxx` (status 8.1)."""
    parts = urlsplit(url)
    user, has_user, address = parts.netloc.rpartition("@")
    name, has_password, _ = user.partition(":")
    shown = f"{name}:xxxxx" if has_password else name
    return urlunsplit((parts.scheme, f"{shown}{has_user}{address}", parts.path, "", ""))


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


def _see_success(replies: list[Any]) -> list[Any]:
    """Return the replies of a transaction unless one of its commands failed."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _reason(error: Exception) -> str:
    match error:
        case AuthenticationError():
            return "the server refuses user or password"
        case ResponseError():
            return f"the server answers: {str(error)[:200]}"
        case RedisTimeout() | TimeoutError():
            return "no answer in time"
        case ssl.SSLError():
            return f"TLS failed: {error.reason}"
    return str(error)[:200] or type(error).__name__
