"""Redis or Valkey data store, in the layout that SDKs in daemon mode read (datastore 4.1, 4.3).

Only commands that ld-relay sends are used (WATCH, MULTI, HGET …; no HMGET, no scripts), so that a
database user whose permissions fit ld-relay suffices.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from relay.aio import run_in_slices
from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.stores import Stored, Versions
from relay.stores.fingerprint import Fingerprint
from relay.stores.items import parse_items, parse_versions, version_of
from relay.stores.redis.client import RedisClient
from relay.stores.redis.connections import Command, RedisConnection, commit, raise_failure
from relay.stores.redis.layout import Hashes, Layout, chunks, entries, fields, pairs_of

BATCH = 256
"""Stored items that are read and compared at a time: about a millisecond for the event loop."""

FINGERPRINT = "fingerprint"
"""Field of the relays' own hash."""

MAX_RACES = 100
"""Attempts of a write that other writers interrupt, before it fails."""

IN_ORDER = (Kind.SEGMENT, Kind.FLAG)
"""Kinds in the order in which they are written: flags refer to segments."""


class RedisStore:
    """Data store for one environment in Redis, where one transaction holds all its keys.

    That is one server, or a cluster if the prefix has a hash tag; see also `DividedRedisStore`.

    Args:
        client: access to the servers.
        prefix: prefix of the keys; empty for `launchdarkly`.
    """

    def __init__(self, client: RedisClient, prefix: str = "") -> None:
        self._layout = Layout(prefix)
        self.prefix = self._layout.prefix
        self.server = client.label
        self._client = client
        self._may_note = True
        """False once the server has refused access to the relays' own hash."""
        client.join(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server} {self.prefix!r}>"

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

        def commands() -> Iterator[Command]:
            for kind in IN_ORDER:
                yield from self._replacing(kind, payload)
            yield ("SET", self._layout.marker, b"")

        await self._client.run(
            self._layout.marker, lambda connection: commit(connection, commands())
        )

    async def upsert(self, items: Sequence[Item]) -> bool:
        """Write the items that are newer than the stored versions.

        Returns:
            True if the store was initialised; otherwise nothing is written.

        Raises:
            StoreUnavailable: nothing was changed.
        """
        return await self._client.run(
            self._layout.marker, partial(self._write_newer, items, self._layout.marker)
        )

    async def _write_newer(
        self, items: Sequence[Item], marker: str | Awaitable[bool], connection: RedisConnection
    ) -> bool:
        """Write newer items in one transaction; return False if the marker is missing.

        Args:
            items: of all kinds whose hashes are at this server.
            marker: key of the marker; if it is at another server, whether it stands there.
            connection: to the server.
        """
        here = [marker] if isinstance(marker, str) else []
        watched = [self._layout.hash(kind) for kind in Kind if here or kind is items[0].kind]
        checks: list[Command] = [("EXISTS", *here)] if here else []
        watch: Command = ("WATCH", *here, *watched)
        for _ in range(MAX_RACES):
            head = [watch, *checks]
            newer: list[Item] = []
            for start in range(0, max(1, len(items)), BATCH):
                batch = items[start : start + BATCH]
                reads = [("HGET", self._layout.hash(item.kind), item.key) for item in batch]
                replies = await connection.execute_all([*head, *reads])
                if checks and head and not replies[1]:
                    await connection.execute("UNWATCH")
                    return False
                stored, head = replies[len(head) :], []
                newer += [
                    item
                    for item, json in zip(batch, stored, strict=True)
                    if json is None or item.version > version_of(json).number
                ]
            stands = isinstance(marker, str) or await marker
            if not newer or not stands:
                await connection.execute("UNWATCH")
                return stands
            if await commit(connection, self._adding(newer)):
                return True
        raise StoreUnavailable("other writers leave no room")

    def _adding(self, items: Iterable[Item]) -> Iterator[Command]:
        """Yield the commands that write items."""
        items = list(items)
        for kind in IN_ORDER:
            for chunk in chunks(fields(item for item in items if item.kind is kind)):
                yield ("HSET", self._layout.hash(kind), *chunk)

    def _replacing(self, kind: Kind, payload: Payload) -> Iterator[Command]:
        """Yield the commands that replace all items of a kind."""
        yield ("DEL", self._layout.hash(kind))
        yield from self._adding(payload.all(kind).values())

    def problem_with(self, item: Item) -> str | None:  # noqa: ARG002 - the contract's
        """Return None: Redis holds items of any size that upstream sends."""
        return None

    async def mark(self, fingerprint: Fingerprint) -> None:
        """Write the fingerprint of the stored items, if the user may.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        if self._may_note:
            await self._run(self._marking(fingerprint))

    def _marking(self, fingerprint: Fingerprint) -> list[Command]:
        """Return the commands that write a fingerprint."""
        return [("HSET", self._layout.notes, FINGERPRINT, str(fingerprint))]

    async def holds(self, fingerprint: Fingerprint) -> bool:
        """Return whether marker, hashes and fingerprint are there.

        The hashes are looked at because a server that runs out of memory evicts keys one by one.

        Raises:
            StoreUnavailable: the database does not answer.
        """
        kinds = [kind for kind in Kind if fingerprint.counts[kind]]
        keys = [self._layout.marker, *map(self._layout.hash, kinds)]
        exist = ("EXISTS", *keys)
        if not self._may_note:
            await self._run([exist])
            return False
        found, count = await self._run([("HGET", self._layout.notes, FINGERPRINT), exist])
        return bool(found == str(fingerprint).encode() and count == len(keys))

    async def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Run commands that may name the relays' own hash; return their replies.

        A database user may be restricted to the keys that SDKs read. Then it is never named again.
        """
        try:
            return await self._client.execute_all(commands)
        except StoreUnavailable as e:
            if not self._may_note or not isinstance(e.__cause__, NoPermissionError):
                raise
            self._may_note = False
            return [None] * len(commands)

    async def aclose(self) -> None:
        """Close all connections, unless other stores use them."""
        await self._client.leave(self)

    async def _read(self) -> Hashes | None:
        """Return both hashes, read in one transaction; None if the store is not initialised."""
        hashes = [("HGETALL", self._layout.hash(kind)) for kind in Kind]
        commands = [("EXISTS", self._layout.marker), *hashes]
        replies = await self._client.run(
            self._layout.marker, lambda connection: _read_at_once(connection, commands)
        )
        if replies is None or not replies[0]:
            return None
        return {kind: pairs_of(reply) for kind, reply in zip(Kind, replies[1:], strict=True)}


async def _read_at_once(
    connection: RedisConnection, commands: Sequence[Command]
) -> list[Any] | None:
    """Return the replies of a transaction; None if another program has replaced a hash."""
    replies = await connection.transaction(commands) or []
    return None if any(map(is_wrong_type, replies)) else raise_failure(replies)


def is_wrong_type(reply: Any) -> bool:
    """Return whether a reply says that a key is no hash."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")
