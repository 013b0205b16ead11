"""Conflicts about one database: a table of decisions, and two relays with hours in milliseconds."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.model.item import Item, Kind
from relay.model.payload import EMPTY, ChangeSet, Payload
from relay.stores import Key, Stored, Version, Versions
from relay.stores.conflicts import NEVER, Conflicts, ConflictTimes
from relay.stores.mirror import DatabaseMirror, MirrorTimings
from tests.stores.contract import flag
from tests.support import virtual

LOG = logging.getLogger("relay.env.test")
TIMES = ConflictTimes()
LAMP, LONE = (Kind.FLAG, "lamp"), (Kind.FLAG, "lone")
V9 = Version(9, live=True)


@dataclass
class Book:
    """Conflicts, and an upstream that answers half a second after it was asked."""

    conflicts: Conflicts = field(default_factory=Conflicts)
    answered: float = -1.0
    asked: list[float] = field(default_factory=list)
    answers: bool = True

    def replaced_at(self, start: float, stored: dict[Key, Version], end: float = 9000.0) -> float:
        """Look whenever it is due; return when it is decided to replace all; `NEVER` if not."""
        now = start
        while now < end:
            verdict = self.conflicts.judge(now, stored, {LONE}, self.answered)
            if verdict.replace:
                assert verdict.replace == stored.keys()
                self.conflicts.replaced(verdict.replace)
                return now
            if verdict.ask:
                self.asked.append(now)
                if self.answers:
                    self.answered = now + 0.5
                    now += 0.5
                    continue
            assert verdict.look_at > now or verdict.ask
            now = min(now + 10, verdict.look_at)
        return NEVER


@pytest.mark.parametrize("key", [LAMP, LONE])
def test_two_answers_fifteen_seconds_apart_decide(key):
    """After a second look; upstream is asked for them, and not more often."""
    book = Book()
    assert book.replaced_at(100, {key: V9}) == 117
    assert book.asked == [101, 116.5]


def test_an_answer_from_before_does_not_count():
    """What was stored after it may be unknown to it."""
    conflicts = Conflicts()
    for now in range(100, 160, 10):
        assert not conflicts.judge(now, {LAMP: V9}, (), answered=100).replace


def test_an_upstream_that_does_not_answer_disowns_nothing():
    """It is asked again, once a minute."""
    book = Book(answers=False)
    assert book.replaced_at(100, {LAMP: V9}, end=300) == NEVER
    assert book.asked == [101, 161, 221, 281]


def test_what_becomes_newer_still_is_somebody_elses():
    """Answers from before that do not count; upstream is asked once a minute all the same."""
    conflicts, asked = Conflicts(), []
    for n in range(300):
        version = Version(9 + n, live=True)
        verdict = conflicts.judge(n, {LAMP: version}, (), answered=n - 0.5)
        assert not verdict.replace
        asked += [n] * bool(verdict.ask)
    assert asked == [1, 61, 121, 181, 241]


def test_what_returns_is_left_alone_for_twice_as_long_each_time():
    """Up to an hour; that it has returned is said once."""
    book, now, waits = Book(), 0.0, []
    for n in range(11):
        verdict = book.conflicts.judge(now, {LAMP: V9}, (), book.answered)
        assert verdict.returned == ({LAMP} if n else frozenset())
        assert not book.conflicts.judge(now, {LAMP: V9}, (), book.answered).returned
        waits.append(verdict.wait)
        start, now = now, book.replaced_at(now, {LAMP: V9}, end=now + 9000)
        assert now - start > verdict.wait
        now += 10
    assert waits == [0, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_what_is_found_beside_waits_as_long():
    """Whoever wrote it may be the one that wrote what was replaced."""
    book = Book()
    end = book.replaced_at(0, {LAMP: V9})
    assert book.replaced_at(end + 10, {LONE: V9}) - end > 30


def test_after_two_hours_without_conflicts_waits_begin_anew():
    """An old backup of the night is none of the day's concern."""
    book = Book()
    end = book.replaced_at(0, {LAMP: V9})
    assert book.conflicts.judge(end, {}, (), book.answered).settled
    later = end + TIMES.forget
    assert book.replaced_at(later, {LAMP: V9}, later + 99) == later + 17


def test_what_is_never_replaced_is_settled_by_the_first_answer():
    """And upstream is not asked again."""
    conflicts = Conflicts(ConflictTimes(newer=NEVER))
    assert conflicts.judge(1, {LAMP: V9}, (), 0).ask == frozenset()
    assert conflicts.judge(2, {LAMP: V9}, (), 0).ask == {LAMP}
    verdict = conflicts.judge(3, {LAMP: V9}, (), 2.5)
    assert (verdict.settled, verdict.ask, verdict.look_at) == (True, frozenset(), NEVER)


# Two relays on one database


class Database:
    """All that both see, and the times at which one took something back."""

    def __init__(self) -> None:
        self.items: dict[Key, Item] | None = None
        self.taken_back: dict[str, list[float]] = {"quick": [], "slow": []}

    def content(self) -> set[Item]:
        return set((self.items or {}).values())


class Store:
    """One relay's way to the database, which takes a moment."""

    server, prefix = "memory", "p"

    def __init__(self, database: Database, owner: str) -> None:
        self._database = database
        self._owner = owner

    async def load(self) -> Stored | None:
        await asyncio.sleep(0.001)
        items = self._database.items
        return None if items is None else Stored(Payload.of(items.values()))

    async def versions(self) -> Versions | None:
        stored = await self.load()
        if stored is None:
            return None
        return {
            (item.kind, item.key): Version(item.version, live=not item.deleted)
            for item in stored.payload
        }

    async def init(self, payload: Payload) -> None:
        await asyncio.sleep(0.001)
        before = self._database.items or {}
        after = {(item.kind, item.key): item for item in payload}
        if any(
            item.version > after[key].version if key in after else not item.deleted
            for key, item in before.items()
        ):
            now = asyncio.get_running_loop().time()
            self._database.taken_back[self._owner].append(now)
        self._database.items = after

    async def upsert(self, items: Sequence[Item]) -> bool:
        await asyncio.sleep(0.001)
        stored = self._database.items
        if stored is None:
            return False
        for item in items:
            known = stored.get((item.kind, item.key))
            if known is None or item.version > known.version:
                stored[item.kind, item.key] = item
        return True

    async def aclose(self) -> None:
        pass


Change = tuple[float, Item]


def history(steps: Iterable[tuple[float, str, bool]]) -> list[Change]:
    """Changes of flags, some seconds after each other; each version is one more than the last."""
    now, version, changes = 0.0, 0, []
    for after, key, deleted in steps:
        now, version = now + after, version + 1
        changes.append((now, flag(key, version, None if deleted else b"")))
    return changes


class Relay:
    """A mirror, and upstream as this relay sees it: all changes, some time late."""

    def __init__(self, database: Database, name: str, changes: list[Change], lag: float) -> None:
        self._changes = changes
        self._lag = lag
        self._payload = EMPTY
        self._mirror = DatabaseMirror(Store(database, name), "fake", self._refresh, LOG, VIRTUAL)

    def _refresh(self) -> None:
        asyncio.get_running_loop().call_later(0.05, self._tell_all)

    def _tell_all(self) -> None:
        seen = asyncio.get_running_loop().time() - self._lag
        everything = ChangeSet(tuple(i for at, i in self._changes if at <= seen))
        payload, _ = EMPTY.apply(everything)
        self._payload, change = self._payload.apply(ChangeSet(tuple(payload), full=True))
        self._mirror.update(self._payload, change, full=True)

    async def run(self, start: float) -> None:
        await asyncio.sleep(start)
        loop = asyncio.get_running_loop()
        running = loop.create_task(self._mirror.run())
        try:
            self._tell_all()
            for at, item in self._changes:
                await asyncio.sleep(max(0.0, at + self._lag - loop.time()))
                self._payload, change = self._payload.apply(ChangeSet((item,)))
                if change is not None:
                    self._mirror.update(self._payload, change)
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])


VIRTUAL = MirrorTimings(conflicts=ConflictTimes(longest=240, forget=1e9))
KEYS = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.tuples(st.floats(0, 120), KEYS, st.booleans()),
    max_size=12,
)
STRAY = st.tuples(st.floats(1, 1200), st.sampled_from(["a", "stray"]), st.just(99))


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    start=st.floats(1, 60),  # at the same time, both might fill it
    lag=st.floats(0, 900),
    strays=st.lists(STRAY, max_size=2),
)
def test_two_relays_write_ever_more_seldom_against_each_other(steps, start, lag, strays):
    """Whenever things happen, and however far one is behind; once both agree, all is upstream's."""
    changes = history(steps)
    database = Database()

    async def stray(at: float, key: str, version: int) -> None:
        await asyncio.sleep(at)
        if database.items is not None:
            database.items[Kind.FLAG, key] = flag(key, version)

    async def both() -> None:
        tasks = [
            asyncio.create_task(Relay(database, "quick", changes, 0.0).run(0.0)),
            asyncio.create_task(Relay(database, "slow", changes, lag).run(start)),
            *(asyncio.create_task(stray(*each)) for each in strays),
        ]
        agreed = max([at for at, _ in changes], default=0.0) + lag
        disturbed = max([at for at, _, _ in strays], default=0.0)
        await asyncio.sleep(max(agreed, disturbed, start) + 1000)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    virtual.run(both())
    upstream, _ = EMPTY.apply(ChangeSet(tuple(item for _, item in changes)))
    assert database.content() == set(upstream)
    for times in database.taken_back.values():
        for n, (one, other) in enumerate(itertools.pairwise(times), 1):
            assert other - one > min(15 * 2**n, 240)
