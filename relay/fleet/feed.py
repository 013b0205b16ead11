"""The steps of a fleet against Redis: lease, publication, snapshot, look, feed.

They need WATCH, MULTI and EXEC, but no scripts, so that a database user needs few rights.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum
from typing import Any

from msgspec import Struct
from redis.exceptions import ResponseError

from relay import clock
from relay.aio import run_in_slices
from relay.errors import InvalidData, StoreUnavailable
from relay.fleet import Command, Connection, Database
from relay.fleet.contents import Contents
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.protocol.feed import FEED, Entry, Head, Term, entry_of, fields_of
from relay.stores.items import parse_items
from relay.stores.redis.connections import raise_failure
from relay.stores.redis.layout import CHUNK, Layout, chunks, entries, fields

MAX_ENTRIES = 10_000
"""Entries of the feed, about; who has missed more reads all data."""

READ_COUNT = 256
"""Entries that are read at a time."""

CONFIRMED, EVALUATED = "confirmed", "evaluated"
"""Fields of the relays' own hash: as in the last entry."""


class Keys(Layout):
    """Keys of one environment, and who it is.

    Args:
        prefix: prefix of the keys; empty for `launchdarkly`.
        identity: of the environment, without secrets.
    """

    def __init__(self, prefix: str, identity: str) -> None:
        super().__init__(prefix)
        self.identity = identity
        self.lease, self.term, self.head = (
            f"{self.notes}:{name}" for name in ("lease", "term", "head")
        )


class Outcome(Enum):
    """Outcome of a publication."""

    PUBLISHED = "published"
    FENCED = "fenced"
    """Another has been elected."""
    MOVED = "moved"
    """The head is not the one that the publication follows on."""


class Publication(Struct, frozen=True):
    """A change of the data in Redis, and the entry that announces it.

    Args:
        head: the last publication before it; None if there must be none.
        entry: what followers get; its items are written.
        rewrite: all data, to replace those in Redis; None to write the entry's items.
    """

    head: Head | None
    entry: Entry
    rewrite: Payload | None = None


class Snapshot(Struct, frozen=True):
    """Head, data and place in the feed of one moment.

    Args:
        head: the last publication; None if there was none.
        contents: the data; None if they are those that the caller named, or were never published.
        place: of the last entry of the feed.
        confirmed: True if the leader's upstream was healthy.
        evaluated: version of the data for client-side SDKs.
    """

    head: Head | None
    contents: Contents | None
    place: str
    confirmed: bool
    evaluated: int

    @property
    def is_intact(self) -> bool:
        """True if the data are those that were published last."""
        same = self.contents is None or (
            self.head is not None and self.contents.selector == self.head.selector
        )
        return self.head is not None and same


class Look(Struct, frozen=True):
    """Lease and head of an environment.

    Args:
        sent: monotonic time before it was asked for.
        lease: owner; None if nobody has it.
        head: last publication; None if there is none.
    """

    sent: float
    lease: str | None
    head: Head | None


class Feed:
    """The database of a fleet.

    Args:
        quick: for small commands, which must not take long.
        large: for data.
        waiting: for the feed, whose entries are waited for.
    """

    def __init__(self, quick: Database, large: Database, waiting: Database) -> None:
        self._quick = quick
        self._large = large
        self._waiting = waiting
        for database in (quick, large, waiting):
            database.join(self)

    async def aclose(self) -> None:
        """Close all connections."""
        for database in (self._quick, self._large, self._waiting):
            await database.leave(self)

    async def problem_with(self, keys: Keys) -> str | None:
        """Return why the database user cannot take part; None if it can. Nothing is written."""
        entry = Entry(keys.prefix, Term(0, ""), 0, "", "", resigned=True)
        commands: list[Command] = [
            ("WATCH", keys.lease, *guarded(keys)),
            ("MULTI",),
            ("MGET", keys.lease, keys.head),
            ("SET", keys.lease, "", "PX", "1"),
            ("PEXPIRE", keys.lease, "1"),
            ("DEL", keys.lease),
            ("HSET", keys.notes, *_notes(entry)),
            ("HGETALL", keys.notes),
            ("SET", keys.head, ""),
            ("SET", keys.term, ""),
            _addition(entry),
            ("XREVRANGE", FEED, "+", "-", "COUNT", "1"),
            ("XREAD", "COUNT", "1", "STREAMS", FEED, "0-0"),
            ("DISCARD",),
        ]
        try:
            await self._quick.run(keys.lease, lambda lent: lent.execute_all(commands))
        except StoreUnavailable as e:
            if isinstance(e.__cause__, ResponseError):
                return str(e)
            raise
        return None

    async def acquire(self, keys: Keys, owner: str, ttl: float) -> Term | None:
        """Take the lease if it is free, and begin a term; return None if another has it."""

        async def work(connection: Connection) -> Term | None:
            _, lease, term = await connection.execute_all(
                [("WATCH", keys.lease, keys.term), ("GET", keys.lease), ("GET", keys.term)]
            )
            if lease is not None and lease != owner.encode():
                await connection.execute_all([("UNWATCH",)])
                return None
            mine = Term(Term.parse(term).number + 1, owner)
            done = await _transaction(
                connection,
                ("SET", keys.lease, owner, "PX", _milliseconds(ttl)),
                ("SET", keys.term, str(mine)),
            )
            return None if done is None else mine

        return await self._quick.run(keys.lease, work)

    async def renew(self, keys: Keys, owner: str, ttl: float) -> bool:
        """Prolong the lease; return False if it is not the owner's any more."""

        async def work(connection: Connection) -> bool:
            if not await _holds(connection, keys, owner):
                return False
            done = await _transaction(connection, ("PEXPIRE", keys.lease, _milliseconds(ttl)))
            return done is not None

        return await self._quick.run(keys.lease, work)

    async def release(self, keys: Keys, owner: str, resignation: Entry) -> None:
        """Give the lease up, if it is the owner's, and tell the others."""

        async def work(connection: Connection) -> None:
            if await _holds(connection, keys, owner):
                await _transaction(connection, ("DEL", keys.lease), _addition(resignation))

        await self._quick.run(keys.lease, work)

    async def publish(self, keys: Keys, publication: Publication) -> Outcome:
        """Write data, head and entry, if nobody else was elected or has written."""

        async def work(connection: Connection) -> Outcome:
            _, term, head = await connection.execute_all(
                [("WATCH", *guarded(keys)), ("GET", keys.term), ("GET", keys.head)]
            )
            if refusal := refused(publication, Term.parse(term), Head.parse(head)):
                await connection.execute_all([("UNWATCH",)])
                return refusal
            entry = publication.entry
            head = Head(entry.number, entry.after, keys.identity)
            done = await _transaction(
                connection,
                *_writes(keys, publication),
                ("SET", keys.marker, b""),
                ("HSET", keys.notes, *_notes(entry)),
                ("SET", keys.head, str(head)),
                _addition(entry),
            )
            return Outcome.MOVED if done is None else Outcome.PUBLISHED

        return await self._large.run(keys.head, work)

    async def snapshot(self, keys: Keys, selector: str = "") -> Snapshot:
        """Return data and place of one moment.

        Args:
            keys: of the environment.
            selector: address of the caller's own data, which are not read again.
        """
        place = ("XREVRANGE", FEED, "+", "-", "COUNT", "1")
        small: list[Command] = [("GET", keys.head), place, ("HGETALL", keys.notes)]
        hashes: list[Command] = [("HGETALL", keys.hash(kind)) for kind in Kind]

        async def work(connection: Connection) -> list[Any]:
            if selector:
                replies = await _transaction(connection, *small) or []
                if (head := Head.parse(replies[0])) and head.selector == selector:
                    return replies
            return await _transaction(connection, *small, *hashes) or []

        return await _snapshot(*await self._large.run(keys.head, work))

    async def is_whole(self, keys: Keys, head: Head, payload: Payload) -> bool:
        """Return whether head, marker and hashes are there, at little cost.

        The hashes are looked at because a server that runs out of memory evicts keys one by one.
        """
        exist = [keys.marker, *(keys.hash(kind) for kind in Kind if payload.all(kind))]
        commands: list[Command] = [("GET", keys.head), *(("EXISTS", key) for key in exist)]
        found, *others = await self._quick.run(keys.head, lambda lent: lent.execute_all(commands))
        return found == str(head).encode() and all(others)

    async def look(self, all_keys: Sequence[Keys]) -> list[Look]:
        """Return leases and heads of environments."""
        sent = clock.monotonic()
        names = [name for keys in all_keys for name in (keys.lease, keys.head)]
        command: Command = ("MGET", *names)
        [found] = await self._quick.run(FEED, lambda lent: lent.execute_all([command]))
        return [
            Look(sent, None if lease is None else lease.decode(errors="replace"), Head.parse(head))
            for lease, head in zip(found[::2], found[1::2], strict=True)
        ]

    async def follow(self, work: Callable[[Reader], Awaitable[None]]) -> None:
        """Do work with a reader of the feed, which has a connection of its own."""
        await self._waiting.run(FEED, lambda connection: work(Reader(connection)))


class Reader:
    """Reads the feed of all environments."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def last_place(self) -> str:
        """Return the place of the last entry."""
        [found] = await self._connection.execute_all([("XREVRANGE", FEED, "+", "-", "COUNT", "1")])
        return _place_of(found)

    async def read(self, place: str, wait: float) -> list[tuple[str, Entry | None]]:
        """Return the entries after a place, each with its own; unreadable ones as None.

        Args:
            place: of the entry before.
            wait: seconds to wait for the next one, if there is none.
        """
        command = ("XREAD", "COUNT", str(READ_COUNT), "BLOCK", _milliseconds(wait))
        [found] = await self._connection.execute_all([(*command, "STREAMS", FEED, place)])
        return [(name.decode(), _readable(pairs)) for name, pairs in (found[0][1] if found else ())]


def guarded(keys: Keys) -> tuple[str, ...]:
    """Return the keys that must not change while a publication is made."""
    return keys.term, keys.head


def refused(publication: Publication, term: Term, head: Head | None) -> Outcome | None:
    """Return why a publication must not be made; None if it may."""
    if term != publication.entry.term:
        return Outcome.FENCED
    return None if head == publication.head else Outcome.MOVED


def place_order(place: str) -> tuple[int, int]:
    """Return what orders places of the feed."""
    first, _, second = place.partition("-")
    return int(first), int(second or 0)


async def _holds(connection: Connection, keys: Keys, owner: str) -> bool:
    """Watch the lease; return whether it is the owner's, else watch no more."""
    _, lease = await connection.execute_all([("WATCH", keys.lease), ("GET", keys.lease)])
    if lease == owner.encode():
        return True
    await connection.execute_all([("UNWATCH",)])
    return False


async def _transaction(connection: Connection, *commands: Command) -> list[Any] | None:
    """Execute commands in one transaction; return None if a watched key has changed."""
    batch: list[Command] = [("MULTI",)]
    size = 0
    for command in commands:
        batch.append(command)
        size += sum(map(len, command))
        if size >= CHUNK:  # the event loop has other work, too
            await connection.execute_all(batch)
            batch, size = [], 0
    *_, done = await connection.execute_all([*batch, ("EXEC",)])
    return None if done is None else raise_failure(done)


def _addition(entry: Entry) -> Command:
    return ("XADD", FEED, "MAXLEN", "~", str(MAX_ENTRIES), "*", *fields_of(entry))


def _notes(entry: Entry) -> tuple[str, ...]:
    return CONFIRMED, str(int(entry.confirmed)), EVALUATED, str(entry.evaluated)


def _writes(keys: Keys, publication: Publication) -> Iterable[Command]:
    rewrite = publication.rewrite
    for kind in (Kind.SEGMENT, Kind.FLAG):
        items: Iterable[Item]
        if rewrite is None:
            items = [item for item in publication.entry.items or () if item.kind is kind]
        else:
            yield "DEL", keys.hash(kind)
            items = rewrite.all(kind).values()
        for chunk in chunks(fields(items)):
            yield "HSET", keys.hash(kind), *chunk


async def _snapshot(
    head: bytes | None, last: list[Any], notes: list[bytes], *hashes: list[bytes]
) -> Snapshot:
    noted = _pairs(notes)
    contents = None
    if hashes:
        by_kind = {kind: _pairs(pairs) for kind, pairs in zip(Kind, hashes, strict=True)}
        stored = await run_in_slices(parse_items(entries(by_kind)))
        contents = await run_in_slices(Contents.of(stored.payload))
    evaluated = noted.get(EVALUATED.encode(), b"")
    return Snapshot(
        Head.parse(head),
        contents,
        _place_of(last),
        confirmed=noted.get(CONFIRMED.encode()) == b"1",
        evaluated=int(evaluated) if evaluated.isdigit() else 0,
    )


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _place_of(found: list[Any]) -> str:
    return found[0][0].decode() if found else "0-0"


def _readable(pairs: list[bytes]) -> Entry | None:
    try:
        return entry_of(_pairs(pairs))
    except InvalidData:
        return None


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
