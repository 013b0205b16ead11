"""The hashes that SDKs read, where a cluster has them in other slots than the fleet's keys.

No transaction holds the head and a hash. So the leader publishes in the fleet's slot first, where
the data are once more, and writes what SDKs read behind that, each hash by one rule:

    watch the hash, then prove the headship, then write.

Why no hash ever goes back: a write succeeds only if nobody else has written the hash since it was
watched, and in between the term was the writer's. Of two writes the later one has watched the hash
after the earlier one, so its proof is later, too; its term is the same or a later one, and a leader
begins with all that was published before. A write that a stopped leader sends when it goes on finds
the hash touched, for the first write of each term touches it in any case.

What a leader has left half done, the next one finishes: it compares everything at its beginning.
If the fleet's slot has lost publications that were written here, as in a failover, the next leader
finds them here, by the note beside each hash.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any

from msgspec import Struct
from redis.exceptions import ResponseError

from relay.aio import run_in_slices, wait_for
from relay.errors import RelayError, StoreUnavailable
from relay.fleet import Command, Connection
from relay.fleet.feed import Feed, Keys, Outcome
from relay.fleet.lease import Leadership
from relay.fleet.timings import FleetTimings
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.protocol.feed import Head
from relay.steps import Steps
from relay.stores import Key
from relay.stores.items import parse_items, stored_json
from relay.stores.redis.connections import raise_failure
from relay.stores.redis.layout import Layout, chunks, entries, fields, pairs_of
from relay.stores.redis.store import IN_ORDER, is_wrong_type
from relay.telemetry.log import Log
from relay.telemetry.outage import OutageLog

HEAD = "head"
"""Field of the note beside each hash: number and term of the publication that was written last, and
whose it is."""

MAX_RACES = 20
"""Attempts of a write that others interrupt, before it counts as failed."""

MAX_GATHERED = 1000
"""Changed items that wait to be written; beyond, all are compared."""

BATCH = 256
"""Fields that are removed at a time."""


class _Due(Struct, frozen=True):
    """A publication that is to be written.

    Args:
        head: its number and address.
        payload: all data after it.
        items: that may differ from what was written last; None if any may.
    """

    head: Head
    payload: Payload
    items: Mapping[Key, Item] | None


class _Written(Struct, frozen=True):
    """Content of the hashes.

    Args:
        due: publication that was written last.
        notes: beside each hash.
    """

    due: _Due
    notes: Mapping[Kind, bytes]


class _Result(Enum):
    """Result of an attempt to write one key."""

    WRITTEN = "written"
    RACE = "race"
    """Somebody else has written it."""
    MOVED = "moved"
    """The fleet's slot does not have the publication, or the lease is uncertain."""
    FENCED = "fenced"
    """Another has been elected."""


class Refused(RelayError):
    """This relay must not write."""

    def __init__(self, result: _Result) -> None:
        self.result = result


Commands = Callable[[Connection], Awaitable[list[Command] | None]]
"""Reads what is needed, and returns what writes; None if the content is not as expected."""


class DividedHashes:
    """Writes the hashes that SDKs read, behind the publications of a leader.

    Args:
        keys: of an environment whose keys are divided.
        visible: those that SDKs read.
        feed: the fleet's database.
        timings: delays.
        log: a logger that names the environment.
    """

    def __init__(
        self, keys: Keys, visible: Layout, feed: Feed, timings: FleetTimings, log: Log
    ) -> None:
        self._keys = keys
        self._visible = visible
        self._feed = feed
        self._timings = timings
        self._outage = OutageLog(log)
        self._due: _Due | None = None
        self._written: _Written | None = None
        """None if unknown."""
        self._wakeup = asyncio.Event()
        self.flushed = asyncio.Event()
        """Set while everything that was published is written."""

    def __repr__(self) -> str:
        return f"<DividedHashes {self._keys.prefix!r}>"

    async def load(self) -> Payload | None:
        """Return what the hashes have; None if they are not marked as complete.

        Raises:
            StoreUnavailable: a server does not answer.
        """
        if not await self._execute("EXISTS", self._visible.marker):
            return None
        hashes = {
            kind: pairs_of(await self._execute("HGETALL", self._visible.hash(kind)))
            for kind in reversed(IN_ORDER)
        }
        stored = await run_in_slices(parse_items(entries(hashes)))
        return stored.payload

    async def are_ahead_of(self, head: Head | None) -> bool:
        """Return whether the fleet's slot has lost publications that were written already.

        Raises:
            StoreUnavailable: a server does not answer.
        """
        number = head.number if head else 0
        if self._written is not None:
            return self._written.due.head.number > number
        notes = [
            await self._execute("HGET", self._visible.notes_beside(kind), HEAD) for kind in Kind
        ]
        return max(_number_in(note, self._keys.identity) for note in notes) > number

    def update(self, head: Head, payload: Payload, items: Iterable[Item] | None) -> None:
        """Schedule that a publication is written.

        Args:
            head: the publication.
            payload: all data after it.
            items: that it has changed; None to compare all.
        """
        gathered = self._due.items if self._due else {}
        if items is not None and gathered is not None:
            gathered = {**gathered, **{(item.kind, item.key): item for item in items}}
        if items is None or (gathered and len(gathered) > MAX_GATHERED):
            gathered = None
        self._due = _Due(head, payload, gathered)
        self.flushed.clear()
        self._wakeup.set()

    def begin(self) -> None:
        """Forget what was scheduled and written: a term begins."""
        self._due = self._written = None
        self.flushed.clear()

    async def run(self, leadership: Leadership) -> None:
        """Write what is scheduled, until another relay is seen to lead."""
        failures = 0
        while True:
            is_probe = not self._wakeup.is_set()
            self._wakeup.clear()
            try:
                if is_probe and self._due is None:
                    await self._probe()
                await self.write(leadership)
            except (StoreUnavailable, Refused) as e:
                if isinstance(e, StoreUnavailable):
                    text = "The hashes that SDKs read cannot be written: %s; the fleet goes on"
                    self._outage.begin(str(e), text, e)
                elif e.result is _Result.FENCED:
                    return
                self._compare()
                await asyncio.sleep(self._timings.retry.delay(failures))
                failures += 1
            else:
                failures = 0
                self._outage.end("The hashes that SDKs read can be written again")
                await wait_for(self._wakeup, self._timings.probe)

    async def write(self, leadership: Leadership, *, at_end: bool = False) -> None:
        """Write what is scheduled.

        Args:
            leadership: of this relay.
            at_end: True if the lease may be given up already: the proof decides.

        Raises:
            StoreUnavailable: a server does not answer; maybe a part was written.
            Refused: this relay must not write.
        """
        while (due := self._due) is not None:
            before, self._written = self._written, None
            writer = _Writer(self._keys, self._visible, self._feed, leadership, due, at_end=at_end)
            notes = None
            if before is not None and due.items is not None:
                notes = await writer.write_items(due.items, before.notes)
            if notes is None:
                notes = await writer.write_all()
            self._written = _Written(due, notes)
            if self._due is due:
                self._due = None
        self.flushed.set()

    async def _probe(self) -> None:
        """Find out at little cost whether a server has lost what was written; write it again."""
        written = self._written
        if written is None:
            return
        is_whole = bool(await self._execute("EXISTS", self._visible.marker))
        for kind in Kind:
            beside = self._visible.notes_beside(kind)
            note = await self._execute("HGET", beside, HEAD)
            count = await self._execute("HLEN", self._visible.hash(kind))
            expected = written.notes[kind], len(written.due.payload.all(kind))
            is_whole &= (note, count) == expected
        if not is_whole:
            self._compare()

    def _compare(self) -> None:
        """Let everything be compared that was written last, or should have been."""
        due = self._due or (self._written.due if self._written else None)
        if due is not None:
            self.update(due.head, due.payload, None)

    async def _execute(self, *command: str) -> Any:
        [reply] = await self._feed.run(command[1], lambda lent: lent.execute_all([command]))
        return reply


class _Writer:
    """Writes one publication.

    Args:
        keys: of the environment.
        visible: those that SDKs read.
        feed: the fleet's database.
        leadership: of this relay.
        due: the publication.
        at_end: True to let the proof alone decide.
    """

    def __init__(
        self,
        keys: Keys,
        visible: Layout,
        feed: Feed,
        leadership: Leadership,
        due: _Due,
        *,
        at_end: bool,
    ) -> None:
        self._keys = keys
        self._visible = visible
        self._feed = feed
        self._leadership = leadership
        self._due = due
        self._at_end = at_end
        self._note = f"{due.head.number}:{keys.identity}:{leadership.term}".encode()

    async def write_items(
        self, items: Mapping[Key, Item], notes: Mapping[Kind, bytes]
    ) -> Mapping[Kind, bytes] | None:
        """Write some items; return the notes, or None if a hash is not as it was left."""
        notes = dict(notes)
        for kind in IN_ORDER:
            those = [item for item in items.values() if item.kind is kind]
            if those:
                adding = partial(self._adding, kind, those, notes[kind])
                if not await self._write(kind, adding, attempts=1):
                    return None
                notes[kind] = self._note
        return notes

    async def write_all(self) -> Mapping[Kind, bytes]:
        """Write whatever differs; at no moment may a flag lack its segments."""
        for kind, removes in ((Kind.SEGMENT, False), (Kind.FLAG, True), (Kind.SEGMENT, True)):
            await self._write(kind, partial(self._repairing, kind, removes))
        await self._write(None, self._marking)
        return dict.fromkeys(Kind, self._note)

    async def _write(
        self, kind: Kind | None, commands: Commands, attempts: int = MAX_RACES
    ) -> bool:
        """Write a hash, or the marker; return False if others have been faster each time.

        Raises:
            StoreUnavailable: the server does not answer, or others leave no room.
            Refused: this relay must not write.
        """
        watched: tuple[str, ...] = (self._visible.marker,)
        if kind is not None:
            watched = self._visible.hash(kind), self._visible.notes_beside(kind)
        for _ in range(attempts):
            attempt = partial(self._attempt, watched, commands)
            match await self._feed.run(watched[0], attempt):
                case _Result.WRITTEN:
                    return True
                case _Result.MOVED | _Result.FENCED as result:
                    raise Refused(result)
        if attempts == 1:
            return False
        raise StoreUnavailable("other writers leave no room")

    async def _attempt(
        self, watched: Sequence[str], commands: Commands, connection: Connection
    ) -> _Result:
        """Watch, prove, write."""
        await connection.execute_all([watch(watched)])
        batch = await commands(connection)
        refusal = await self._refusal() if batch is not None else _Result.RACE
        if batch is None or refusal is not None:
            await connection.execute_all([("UNWATCH",)])
            return refusal or _Result.RACE
        replies = await connection.transaction(batch)
        if replies is None:
            return _Result.RACE
        raise_failure(replies)
        return _Result.WRITTEN

    async def _refusal(self) -> _Result | None:
        outcome = await self._feed.prove(self._keys, self._leadership.term, self._due.head)
        if outcome is not None:
            return _Result.FENCED if outcome is Outcome.FENCED else _Result.MOVED
        return None if self._at_end or self._leadership.is_valid else _Result.MOVED

    async def _adding(
        self, kind: Kind, items: Sequence[Item], note: bytes, connection: Connection
    ) -> list[Command] | None:
        beside = self._visible.notes_beside(kind)
        if await connection.execute_all([("HGET", beside, HEAD)]) != [note]:
            return None
        key = self._visible.hash(kind)
        adding = [("HSET", key, *chunk) for chunk in chunks(fields(items))]
        return [*adding, self._noting(kind)]

    async def _repairing(self, kind: Kind, removes: bool, connection: Connection) -> list[Command]:
        key, commands = self._visible.hash(kind), list[Command]()
        try:
            [flat] = await connection.execute_all([("HGETALL", key)])
        except ResponseError as e:
            if not is_wrong_type(e):
                raise
            flat, commands = [], [("DEL", key)]  # another program has replaced it
        stored, items = pairs_of(flat), self._due.payload.all(kind)
        different = await run_in_slices(_different(items.values(), stored))
        commands += [("HSET", key, *chunk) for chunk in chunks(fields(different))]
        if removes:
            gone = [field for field in stored if field.decode(errors="replace") not in items]
            parts = (gone[start : start + BATCH] for start in range(0, len(gone), BATCH))
            commands += [("HDEL", key, *part) for part in parts]
        return [*commands, self._noting(kind)]

    def _noting(self, kind: Kind) -> Command:
        return "HSET", self._visible.notes_beside(kind), HEAD, self._note

    async def _marking(self, _: Connection) -> list[Command]:
        return [("SET", self._visible.marker, b"")]


def watch(keys: Sequence[str]) -> Command:
    """Return the command after which a transaction fails if somebody else writes the keys."""
    return "WATCH", *keys


def _different(items: Iterable[Item], stored: Mapping[bytes, bytes]) -> Steps[list[Item]]:
    """Return the items that are not stored as they are, with a step for each."""
    different = []
    for item in items:
        if stored.get(item.key.encode()) != stored_json(item):
            different.append(item)
        yield
    return different


def _number_in(note: bytes | None, identity: str) -> int:
    """Return the number of the publication that a note names; 0 if it is not this environment's."""
    number, _, rest = (note or b"").decode(errors="replace").partition(":")
    return int(number) if number.isdecimal() and rest.startswith(f"{identity}:") else 0
