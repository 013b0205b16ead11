"""Conflict decisions, and two relays on one database in virtual time."""

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
from relay.stores.conflicts import NEVER, Conflicts, ConflictTimings
from relay.stores.fingerprint import Fingerprint
from relay.stores.mirror import DatabaseMirror, MirrorTimings
from tests.stores.contract import flag
from tests.support import virtual

LOG = logging.getLogger("relay.env.test")
TIMINGS = ConflictTimings()
LAMP, EXTRA = (Kind.FLAG, "lamp"), (Kind.FLAG, "lone")
V9 = Version(9, live=True)


@dataclass
class Simulation:
    """Conflicts, and an upstream that answers half a second after each question."""

    conflicts: Conflicts = field(default_factory=Conflicts)
    answered: float = -1.0
    asked: list[float] = field(default_factory=list)
    answers: bool = True

    def run_until_replaced(
        self, start: float, contested: dict[Key, Version], end: float = 9000.0
    ) -> float:
        """Judge whenever due; return the time at which all items are replaced, or `NEVER`."""
        now = start
        while now < end:
            verdict = self.conflicts.judge(now, contested, {EXTRA}, self.answered)
            if verdict.replace:
                assert verdict.replace == contested.keys()
                self.conflicts.replaced(verdict.replace)
                return now
            if verdict.ask:
                self.asked.append(now)
                if self.answers:
                    self.answered = now + 0.5
                    now += 0.5
                    continue
            assert verdict.recheck_at > now or verdict.ask
            now = min(now + 10, verdict.recheck_at)
        return NEVER


@pytest.mark.parametrize("key", [LAMP, EXTRA])
def test_two_answers_fifteen_seconds_apart_decide(key):
    """Upstream is asked twice, the first time after a second look, and not more often."""
    simulation = Simulation()
    assert simulation.run_until_replaced(100, {key: V9}) == 117
    assert simulation.asked == [101, 116.5]


def test_an_answer_from_before_does_not_count():
    """It may be older than the stored items."""
    conflicts = Conflicts()
    for now in range(100, 160, 10):
        assert not conflicts.judge(now, {LAMP: V9}, (), last_full_at=100).replace


def test_an_upstream_that_does_not_answer_disowns_nothing():
    """It is asked again once a minute."""
    simulation = Simulation(answers=False)
    assert simulation.run_until_replaced(100, {LAMP: V9}, end=300) == NEVER
    assert simulation.asked == [101, 161, 221, 281]


def test_an_item_that_becomes_even_newer_belongs_to_another_writer():
    """Earlier answers do not count; upstream is still asked only once a minute."""
    conflicts, asked = Conflicts(), []
    for n in range(300):
        version = Version(9 + n, live=True)
        verdict = conflicts.judge(n, {LAMP: version}, (), last_full_at=n - 0.5)
        assert not verdict.replace
        asked += [n] * bool(verdict.ask)
    assert asked == [1, 61, 121, 181, 241]


def test_delays_double_each_time_an_item_returns():
    """Up to one hour; each return is reported once."""
    simulation, now, waits = Simulation(), 0.0, []
    for n in range(11):
        verdict = simulation.conflicts.judge(now, {LAMP: V9}, (), simulation.answered)
        assert verdict.returned == ({LAMP} if n else frozenset())
        assert not simulation.conflicts.judge(now, {LAMP: V9}, (), simulation.answered).returned
        waits.append(verdict.wait)
        start, now = now, simulation.run_until_replaced(now, {LAMP: V9}, end=now + 9000)
        assert now - start > verdict.wait
        now += 10
    assert waits == [0, 30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_other_conflicts_have_the_same_delay():
    """The same writer may have written the items that were replaced."""
    simulation = Simulation()
    end = simulation.run_until_replaced(0, {LAMP: V9})
    assert simulation.run_until_replaced(end + 10, {EXTRA: V9}) - end > 30


def test_delays_are_reset_after_two_hours_without_conflicts():
    """A backup restored at night does not slow down repairs during the day."""
    simulation = Simulation()
    end = simulation.run_until_replaced(0, {LAMP: V9})
    assert simulation.conflicts.judge(end, {}, (), simulation.answered).settled
    later = end + TIMINGS.forget
    assert simulation.run_until_replaced(later, {LAMP: V9}, later + 99) == later + 17


def test_kept_items_are_settled_by_the_first_answer():
    """Upstream is not asked again."""
    conflicts = Conflicts(ConflictTimings(newer=NEVER))
    assert conflicts.judge(1, {LAMP: V9}, (), 0).ask == frozenset()
    assert conflicts.judge(2, {LAMP: V9}, (), 0).ask == {LAMP}
    verdict = conflicts.judge(3, {LAMP: V9}, (), 2.5)
    assert (verdict.settled, verdict.ask, verdict.recheck_at) == (True, frozenset(), NEVER)


def test_the_repr_states_open_conflicts():
    conflicts = Conflicts()
    conflicts.judge(1, {LAMP: V9}, (), 0)
    assert repr(conflicts) == "<Conflicts open=1 doublings=0>"


# Two relays on one database


class Database:
    """The shared content, and the times at which each relay made an item older."""

    def __init__(self) -> None:
        self.items: dict[Key, Item] | None = None
        self.fingerprint: Fingerprint | None = None
        self.regressions: dict[str, list[float]] = {"quick": [], "slow": []}

    def content(self) -> set[Item]:
        return set((self.items or {}).values())


class Store:
    """One relay's connection to the database, with some latency."""

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
            self._database.regressions[self._owner].append(now)
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

    def problem_with(self, item: Item) -> None:
        pass

    async def mark(self, fingerprint: Fingerprint) -> None:
        await asyncio.sleep(0.001)
        self._database.fingerprint = fingerprint

    async def holds(self, fingerprint: Fingerprint) -> bool:
        await asyncio.sleep(0.001)
        return self._database.items is not None and self._database.fingerprint == fingerprint

    async def aclose(self) -> None:
        pass


Change = tuple[float, Item]


def history(steps: Iterable[tuple[float, str, bool]]) -> list[Change]:
    """Return changes of flags with delays between them and increasing versions."""
    now, version, changes = 0.0, 0, []
    for after, key, deleted in steps:
        now, version = now + after, version + 1
        changes.append((now, flag(key, version, None if deleted else b"")))
    return changes


class Relay:
    """A mirror, and an upstream that sends all changes with a lag."""

    def __init__(self, database: Database, name: str, changes: list[Change], lag: float) -> None:
        self._changes = changes
        self._lag = lag
        self._payload = EMPTY
        self._mirror = DatabaseMirror(Store(database, name), "fake", self._resync, LOG, VIRTUAL)

    def _resync(self) -> None:
        asyncio.get_running_loop().call_later(0.05, self._send_all)

    def _send_all(self) -> None:
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
            self._send_all()
            for at, item in self._changes:
                await asyncio.sleep(max(0.0, at + self._lag - loop.time()))
                self._payload, change = self._payload.apply(ChangeSet((item,)))
                if change is not None:
                    self._mirror.update(self._payload, change)
            await running
        finally:
            running.cancel()
            await asyncio.wait([running])


VIRTUAL = MirrorTimings(conflicts=ConflictTimings(longest=240, forget=1e9))
KEYS = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.tuples(st.floats(0, 120), KEYS, st.booleans()),
    max_size=12,
)
FOREIGN_WRITES = st.tuples(st.floats(1, 1200), st.sampled_from(["a", "stray"]), st.just(99))


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    start=st.floats(1, 60),  # at the same time, both might fill it
    lag=st.floats(0, 900),
    foreign_writes=st.lists(FOREIGN_WRITES, max_size=2),
)
def test_two_relays_write_ever_more_seldom_against_each_other(steps, start, lag, foreign_writes):
    """In any order and with any lag; once both agree, the database equals upstream."""
    changes = history(steps)
    database = Database()

    async def write_foreign(at: float, key: str, version: int) -> None:
        await asyncio.sleep(at)
        if database.items is not None:
            database.items[Kind.FLAG, key] = flag(key, version)

    async def both() -> None:
        tasks = [
            asyncio.create_task(Relay(database, "quick", changes, 0.0).run(0.0)),
            asyncio.create_task(Relay(database, "slow", changes, lag).run(start)),
            *(asyncio.create_task(write_foreign(*each)) for each in foreign_writes),
        ]
        agreed = max([at for at, _ in changes], default=0.0) + lag
        disturbed = max([at for at, _, _ in foreign_writes], default=0.0)
        await asyncio.sleep(max(agreed, disturbed, start) + 1000)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    virtual.run(both())
    upstream, _ = EMPTY.apply(ChangeSet(tuple(item for _, item in changes)))
    assert database.content() == set(upstream)
    for times in database.regressions.values():
        for n, (one, other) in enumerate(itertools.pairwise(times), 1):
            assert other - one > min(15 * 2**n, 240)
