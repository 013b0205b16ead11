"""The steps of a fleet against Redis: lease, publication, snapshot, look, feed.

They need WATCH, MULTI and EXEC, but no scripts, so that a database user needs few rights. All keys
of a step are in one slot; `divided` has what SDKs read where a cluster has it elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from typing import Any

from msgspec import Struct
from redis.crc import key_slot
from redis.exceptions import ResponseError

from relay import clock
from relay.aio import run_in_slices
from relay.errors import InvalidData, StoreUnavailable
from relay.fleet import Command, Connection, Database, T
from relay.fleet.contents import Contents
from relay.model.item import Item, Kind
from relay.model.payload import Payload, Selector
from relay.protocol.feed import FEED, Entry, Head, Term, entry_of, fields_of, name_of, note_of
from relay.stores.items import parse_items
from relay.stores.redis.connections import raise_failure
from relay.stores.redis.layout import Layout, chunks, entries, fields, pairs_of

MAX_ENTRIES = 10_000
"""Entries of the feed, about; who has missed more reads all data."""

READ_COUNT = 256
"""Entries that are read at a time."""

CONFIRMED, EVALUATED, NAME = "confirmed", "evaluated", "name"
"""Fields of the relays' own hash: as in the last entry."""


EVICTING = "allkeys-"
"""Beginning of the policies by which a server that is full evicts keys that do not expire."""


class Keys:
    """Keys of one environment, and who it is.

    In a cluster an environment has a feed of its own, for no transaction holds keys of two slots.
    If its prefix has no hash tag, the keys that SDKs read are in several slots. Then the fleet has
    the data once more, in its own slot.

    Args:
        prefix: prefix of the keys; empty for `launchdarkly`.
        identity: of the environment, without secrets.
        in_cluster: True if the database is a cluster.
    """

    def __init__(self, prefix: str, identity: str, *, in_cluster: bool = False) -> None:
        self.data = Layout(prefix)
        """Where the fleet has the data."""
        self.visible: Layout | None = None
        """Where SDKs read them, if that is elsewhere."""
        self.prefix = self.data.prefix
        self.identity = identity
        if in_cluster and len(_slots(self.data.keys)) > 1:
            self.visible, self.data = self.data, Layout(f"{{{self.prefix}:$relay}}")
        self.lease, self.term, self.head = (
            f"{self.data.notes}:{name}" for name in ("lease", "term", "head")
        )
        self.feed = f"{self.data.notes}:feed:1" if in_cluster else FEED
        self._in_cluster = in_cluster

    def __repr__(self) -> str:
        return f"<Keys of {self.prefix!r}{', divided' if self.visible else ''}>"

    @property
    def are_together(self) -> bool:
        """True if transactions can hold what they must; a brace may be in the way."""
        if not self._in_cluster:
            return True
        parts = [(self.lease, self.feed, *self.data.keys)]
        if self.visible is not None:
            parts += [(self.visible.hash(kind), self.visible.notes_beside(kind)) for kind in Kind]
        return all(len(_slots(keys)) == 1 for keys in parts)


def _slots(keys: Iterable[str]) -> set[int]:
    return {key_slot(key.encode()) for key in keys}


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
        noted: name that upstream gives to the published data; None if it gives none.
    """

    head: Head | None
    contents: Contents | None
    place: str
    confirmed: bool
    evaluated: int
    noted: Selector | None = None

    @property
    def is_intact(self) -> bool:
        """True if the data are those that were published last."""
        same = self.contents is None or (
            self.head is not None and self.contents.selector == self.head.selector
        )
        return self.head is not None and same

    @property
    def name(self) -> Selector | None:
        """Name that upstream gives to the data; None if it gives none, or if they are damaged."""
        return self.noted if self.is_intact else None

    @property
    def state(self) -> str:
        """State in that name; empty if there is none."""
        return self.name.state if self.name else ""


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
        in_cluster: True if they are a cluster.
    """

    def __init__(
        self, quick: Database, large: Database, waiting: Database, *, in_cluster: bool = False
    ) -> None:
        self._in_cluster = in_cluster
        self._quick = quick
        self._large = large
        self._waiting = waiting
        for database in (quick, large, waiting):
            database.join(self)

    async def aclose(self) -> None:
        """Close all connections."""
        for database in (self._quick, self._large, self._waiting):
            await database.leave(self)

    def keys(self, prefix: str, identity: str) -> Keys:
        """Return the keys of an environment in this database."""
        return Keys(prefix, identity, in_cluster=self._in_cluster)

    async def problem_with(self, keys: Keys) -> str | None:
        """Return why the database user cannot take part; None if it can. Nothing is written."""
        if not keys.are_together:
            return f'the prefix "{keys.prefix}" has a brace that keeps no keys together'
        entry = Entry(keys.prefix, Term(0, ""), 0, "", "", resigned=True)
        commands: list[Command] = [
            ("WATCH", keys.lease, *guarded(keys)),
            ("MULTI",),
            ("MGET", keys.lease, keys.head),
            ("SET", keys.lease, "", "PX", "1"),
            ("PEXPIRE", keys.lease, "1"),
            ("DEL", keys.lease),
            ("HSET", keys.data.notes, *_notes(entry)),
            ("HGETALL", keys.data.notes),
            ("SET", keys.head, ""),
            ("SET", keys.term, ""),
            _addition(keys, entry),
            ("XREVRANGE", keys.feed, "+", "-", "COUNT", "1"),
            ("XREAD", "COUNT", "1", "STREAMS", keys.feed, "0-0"),
            ("DISCARD",),
        ]
        steps = [commands, *_hash_steps(keys)]
        try:
            for step in steps:
                await self._quick.run(str(step[0][1]), partial(_try_out, step))
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

    async def renew(self, all_keys: Sequence[Keys], owner: str, ttl: float) -> list[bool]:
        """Prolong leases of one server together.

        Returns:
            For each, False if it is not the owner's any more.
        """
        leases = [keys.lease for keys in all_keys]

        async def work(connection: Connection) -> list[bool] | None:
            _, owners = await connection.execute_all([("WATCH", *leases), ("MGET", *leases)])
            mine = [each == owner.encode() for each in owners]
            if not any(mine):
                await connection.execute_all([("UNWATCH",)])
                return mine
            kept = (lease for lease, is_mine in zip(leases, mine, strict=True) if is_mine)
            renewals = [("PEXPIRE", lease, _milliseconds(ttl)) for lease in kept]
            return None if await _transaction(connection, *renewals) is None else mine

        renewed = await self._quick.run(leases[0], work)
        if renewed is not None:
            return renewed
        if len(leases) == 1:
            return [False]
        # One of them has changed, and the others need not suffer for it.
        return [(await self.renew([keys], owner, ttl))[0] for keys in all_keys]

    async def release(self, keys: Keys, owner: str, resignation: Entry) -> None:
        """Give the lease up, if it is the owner's, and tell the others."""

        async def work(connection: Connection) -> None:
            if await _holds(connection, keys, owner):
                await _transaction(connection, ("DEL", keys.lease), _addition(keys, resignation))

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
                ("SET", keys.data.marker, b""),
                ("HSET", keys.data.notes, *_notes(entry)),
                ("SET", keys.head, str(head)),
                _addition(keys, entry),
            )
            return Outcome.MOVED if done is None else Outcome.PUBLISHED

        return await self._large.run(keys.head, work)

    async def snapshot(self, keys: Keys, selector: str = "") -> Snapshot:
        """Return data and place of one moment.

        Args:
            keys: of the environment.
            selector: address of the caller's own data, which are not read again.
        """
        place = ("XREVRANGE", keys.feed, "+", "-", "COUNT", "1")
        small: list[Command] = [("GET", keys.head), place, ("HGETALL", keys.data.notes)]
        hashes: list[Command] = [("HGETALL", keys.data.hash(kind)) for kind in Kind]

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
        exist = [keys.data.marker, *(keys.data.hash(kind) for kind in Kind if payload.all(kind))]
        commands: list[Command] = [("GET", keys.head), *(("EXISTS", key) for key in exist)]
        found, *others = await self._quick.run(keys.head, lambda lent: lent.execute_all(commands))
        return found == str(head).encode() and all(others)

    async def look(self, all_keys: Sequence[Keys]) -> list[Look]:
        """Return leases and heads of environments with one feed."""
        sent = clock.monotonic()
        names = [name for keys in all_keys for name in (keys.lease, keys.head)]
        command: Command = ("MGET", *names)
        [found] = await self._quick.run(names[0], lambda lent: lent.execute_all([command]))
        return [
            Look(sent, None if lease is None else lease.decode(errors="replace"), Head.parse(head))
            for lease, head in zip(found[::2], found[1::2], strict=True)
        ]

    async def follow(self, feed: str, work: Callable[[Reader], Awaitable[None]]) -> None:
        """Do work with a reader of a feed, which has a connection of its own."""
        await self._waiting.run(feed, lambda connection: work(Reader(feed, connection)))

    async def run(self, key: str, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Return the result of work with data; see `Database`."""
        return await self._large.run(key, work)

    async def prove(self, keys: Keys, term: Term, head: Head) -> Outcome | None:
        """Return why data of a publication must not be written elsewhere; None if they may.

        They may while the term is that of their writer, and they were published.
        """
        commands = [("GET", keys.term), ("GET", keys.head)]
        found = await self._quick.run(keys.head, lambda lent: lent.execute_all(commands))
        if Term.parse(found[0]) != term:
            return Outcome.FENCED
        newest = Head.parse(found[1])
        return None if newest is not None and newest.number >= head.number else Outcome.MOVED

    async def evicting_policy(self, keys: Keys) -> str | None:
        """Return the policy by which the server may evict the fleet's keys; None if it may not.

        It is unknown, and None, if the user may not ask.
        """
        try:
            [info] = await self._quick.run(
                keys.head, lambda lent: lent.execute_all([("INFO", "memory")])
            )
        except StoreUnavailable as e:
            if isinstance(e.__cause__, ResponseError):
                return None
            raise
        return evicting_policy(info.decode(errors="replace"))


class Reader:
    """Reads a feed.

    Args:
        feed: its key.
        connection: for exclusive use.
    """

    def __init__(self, feed: str, connection: Connection) -> None:
        self._feed = feed
        self._connection = connection

    async def last_place(self) -> str:
        """Return the place of the last entry."""
        command = ("XREVRANGE", self._feed, "+", "-", "COUNT", "1")
        [found] = await self._connection.execute_all([command])
        return _place_of(found)

    async def read(self, place: str, wait: float) -> list[tuple[str, Entry | None]]:
        """Return the entries after a place, each with its own; unreadable ones as None.

        Args:
            place: of the entry before.
            wait: seconds to wait for the next one, if there is none.
        """
        command = ("XREAD", "COUNT", str(READ_COUNT), "BLOCK", _milliseconds(wait))
        [found] = await self._connection.execute_all([(*command, "STREAMS", self._feed, place)])
        return [(name.decode(), _readable(pairs)) for name, pairs in (found[0][1] if found else ())]


def _hash_steps(keys: Keys) -> Iterator[list[Command]]:
    """Yield what is done to hashes that SDKs read in other slots, to be discarded."""
    if (visible := keys.visible) is None:
        return
    for kind in Kind:
        key, note = visible.hash(kind), visible.notes_beside(kind)
        yield [
            ("WATCH", key, note),
            ("MULTI",),
            ("HSET", key, "", ""),
            ("HDEL", key, ""),
            ("HLEN", key),
            ("HGETALL", key),
            ("HSET", note, "", ""),
            ("HGET", note, ""),
            ("DISCARD",),
        ]


async def _try_out(commands: Sequence[Command], connection: Connection) -> None:
    await connection.execute_all(commands)


def guarded(keys: Keys) -> tuple[str, ...]:
    """Return the keys that must not change while a publication is made."""
    return keys.term, keys.head


def refused(publication: Publication, term: Term, head: Head | None) -> Outcome | None:
    """Return why a publication must not be made; None if it may."""
    if term != publication.entry.term:
        return Outcome.FENCED
    return None if head == publication.head else Outcome.MOVED


def evicting_policy(info: str) -> str | None:
    """Return the policy of a server that may evict the fleet's keys, of its INFO memory."""
    values = dict(line.partition(":")[::2] for line in info.splitlines())
    policy = values.get("maxmemory_policy", "")
    may_fill = values.get("maxmemory", "0") != "0"
    return policy if may_fill and policy.startswith(EVICTING) else None


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
    replies = await connection.transaction(commands)
    return None if replies is None else raise_failure(replies)


def _addition(keys: Keys, entry: Entry) -> Command:
    return ("XADD", keys.feed, "MAXLEN", "~", str(MAX_ENTRIES), "*", *fields_of(entry))


def _notes(entry: Entry) -> tuple[str | bytes, ...]:
    confirmed, evaluated = str(int(entry.confirmed)), str(entry.evaluated)
    return CONFIRMED, confirmed, EVALUATED, evaluated, NAME, note_of(entry)


def _writes(keys: Keys, publication: Publication) -> Iterable[Command]:
    rewrite = publication.rewrite
    for kind in (Kind.SEGMENT, Kind.FLAG):
        items: Iterable[Item]
        if rewrite is None:
            items = [item for item in publication.entry.items or () if item.kind is kind]
        else:
            yield "DEL", keys.data.hash(kind)
            items = rewrite.all(kind).values()
        for chunk in chunks(fields(items)):
            yield "HSET", keys.data.hash(kind), *chunk


async def _snapshot(
    head: bytes | None, last: list[Any], notes: list[bytes], *hashes: list[bytes]
) -> Snapshot:
    noted = pairs_of(notes)
    contents = None
    if hashes:
        by_kind = {kind: pairs_of(pairs) for kind, pairs in zip(Kind, hashes, strict=True)}
        stored = await run_in_slices(parse_items(entries(by_kind)))
        contents = await run_in_slices(Contents.of(stored.payload))
    evaluated = noted.get(EVALUATED.encode(), b"")
    parsed = Head.parse(head)
    return Snapshot(
        parsed,
        contents,
        _place_of(last),
        confirmed=noted.get(CONFIRMED.encode()) == b"1",
        evaluated=int(evaluated) if evaluated.isdigit() else 0,
        noted=name_of(noted.get(NAME.encode(), b""), parsed),
    )


def _place_of(found: list[Any]) -> str:
    return found[0][0].decode() if found else "0-0"


def _readable(pairs: list[bytes]) -> Entry | None:
    try:
        return entry_of(pairs_of(pairs))
    except InvalidData:
        return None


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))
