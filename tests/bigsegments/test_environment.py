"""Memberships of one environment: what is read, for how long it holds, and who hears of changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tracemalloc
from contextlib import asynccontextmanager

from relay import clock
from relay.bigsegments.environment import MAX_CHANGED, MAX_KNOWN, BigSegments, BigSegmentTimings
from relay.errors import StoreUnavailable
from relay.evaluation.results import BigSegmentsStatus as Status
from relay.protocol.bigsegments import context_hash
from relay.stores.bigsegments import Metadata
from tests.support import virtual

LOG = logging.getLogger("relay.env.test")


class Store:
    """A database in memory."""

    label = "a test's store"

    def __init__(self) -> None:
        self.members: dict[str, dict[str, bool]] = {}
        self.now: float | None = None
        self.cursor = "v1"
        self.readable = True
        self.away = False
        self.hangs = False
        self.reads: list[int] = []
        self.closed = False

    async def _answer(self) -> None:
        await asyncio.sleep(3600 if self.hangs else 0.001)
        if self.away:
            raise StoreUnavailable("it is away")

    async def metadata(self) -> Metadata:
        await self._answer()
        at = clock.unix() if self.now is None else self.now
        return Metadata(self.cursor, at if self.readable else None, is_readable=self.readable)

    async def memberships(self, hashes):
        self.reads.append(len(hashes))
        found = [dict(self.members.get(each, {})) for each in hashes]
        await self._answer()
        return found

    async def aclose(self) -> None:
        self.closed = True

    def include(self, key: str, *, member: bool = True) -> frozenset[str]:
        """Change a membership behind everybody's back; return the hash."""
        hashed = context_hash(key)
        self.members[hashed] = {"team.g1": True} if member else {}
        return frozenset({hashed})


class Site:
    """Big segments that are in use, and what clients were told."""

    def __init__(self) -> None:
        self.store = Store()
        self.big_segments = BigSegments(self.store, LOG, BigSegmentTimings())
        self.notices: list[frozenset[str] | None] = []
        self.big_segments.on_change = self.notices.append

    async def status(self, key: str) -> Status:
        found = await self.big_segments.memberships([key])
        return found.by_key[key].status

    async def is_member(self, key: str) -> bool | None:
        found = await self.big_segments.memberships([key])
        return found.by_key[key].segments.get("team.g1")


@asynccontextmanager
async def in_use():
    site = Site()
    site.big_segments.start(synchronise=False)
    running = asyncio.create_task(site.big_segments.run())
    await asyncio.sleep(0.1)
    yield site
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert site.store.closed


def timed(test):
    """Run a test in virtual time."""

    def run() -> None:
        virtual.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@timed
async def test_a_membership_holds_for_five_seconds():
    """It is read once; after its time it is read again, and only then a change is seen."""
    async with in_use() as site:
        site.store.include("ann")
        assert await site.is_member("ann")
        site.store.include("ann", member=False)
        await asyncio.sleep(4.9)
        assert await site.is_member("ann")
        assert site.store.reads == [1]
        await asyncio.sleep(0.2)
        assert await site.is_member("ann") is None
        assert site.store.reads == [1, 1]


@timed
async def test_what_was_cached_with_a_membership_lives_on_if_it_is_the_same():
    """Results hold as long as the membership, and again when it was read again."""
    async with in_use() as site:
        site.store.include("ann")
        before = await site.big_segments.memberships(["ann"])
        assert before.is_current
        await asyncio.sleep(5.1)
        assert not before.is_current
        await site.big_segments.memberships(["ann"])
        assert before.is_current
        site.big_segments.changed(site.store.include("ann", member=False))
        assert not before.is_current
        assert await site.is_member("ann") is None
        assert not before.is_current


@timed
async def test_keys_that_are_wanted_together_are_read_together():
    """Those that come while a read is on its way share the next one."""
    async with in_use() as site:
        keys = [f"user-{number}" for number in range(100)]
        await asyncio.gather(*(site.is_member(key) for key in keys * 3))
        assert sum(site.store.reads) == 100
        assert len(site.store.reads) <= 2
        assert site.big_segments.known(keys) is not None


@timed
async def test_a_thousand_keys_are_remembered():
    """Those that were used least recently are forgotten."""
    async with in_use() as site:
        keys = [f"user-{number}" for number in range(MAX_KNOWN + 1)]
        await asyncio.gather(*(site.is_member(key) for key in keys))
        assert site.big_segments.known(keys[:1]) is None
        assert site.big_segments.known(keys[1:]) is not None


@timed
async def test_only_what_has_changed_is_forgotten():
    """A change names its context keys; without names everything is read again."""
    async with in_use() as site:
        await site.big_segments.memberships(["ann", "ben"])
        site.big_segments.changed(site.store.include("ann"))
        assert site.big_segments.known(["ben"]) is not None
        assert site.big_segments.known(["ann"]) is None
        site.big_segments.changed(None)
        assert site.big_segments.known(["ben"]) is None


@timed
async def test_a_change_during_a_read_is_not_overlooked():
    """Memberships read before the change go to the one who waits, and are not remembered."""
    async with in_use() as site:
        reading = asyncio.create_task(site.is_member("ann"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        site.big_segments.changed(site.store.include("ann"))
        await reading
        assert await site.is_member("ann")


@timed
async def test_notices_come_at_most_once_a_second():
    """The first comes at once; those after it are gathered."""
    async with in_use() as site:
        everybody = frozenset().union(*(site.store.include(f"u{n}") for n in range(50)))
        for number in range(50):
            site.big_segments.changed(site.store.include(f"u{number}"))
            await asyncio.sleep(0.01)
        assert len(site.notices) == 1
        await asyncio.sleep(1.0)
        assert len(site.notices) == 2
        assert site.notices[0] | site.notices[1] == everybody
        site.big_segments.changed(site.store.include("ann"))
        site.big_segments.changed(None)
        await asyncio.sleep(1.5)
        assert site.notices[2] is None


@timed
async def test_foreign_changes_are_noticed():
    """A cursor that somebody else has moved means that anything may have changed."""
    async with in_use() as site:
        await asyncio.sleep(11)
        assert site.notices == []
        site.store.cursor = "v2"
        await asyncio.sleep(5.1)
        assert site.notices == [None]


@timed
async def test_staleness_is_the_present_one():
    """From two minutes on memberships are stale, and healthy again after a synchronisation."""
    async with in_use() as site:
        assert await site.status("ann") is Status.HEALTHY
        site.store.now = clock.unix()
        await asyncio.sleep(110)
        assert await site.status("ann") is Status.HEALTHY
        await asyncio.sleep(15)
        assert await site.status("ann") is Status.STALE
        status = site.big_segments.status
        assert (status.available, status.potentially_stale) == (True, False)
        await asyncio.sleep(200)
        assert site.big_segments.status.potentially_stale
        site.store.now = None
        site.big_segments.look()
        await asyncio.sleep(0.1)
        assert await site.status("ann") is Status.HEALTHY


@timed
async def test_an_outage_delays_one_read_only():
    """The first waits for a second at most, all others not at all; afterwards clients are told."""
    async with in_use() as site:
        site.store.include("ann")
        assert await site.is_member("ann")
        for how in ("hangs", "away"):
            setattr(site.store, how, True)
            await asyncio.sleep(5.1)
            start = clock.monotonic()
            assert await site.status("ann") is Status.STORE_ERROR
            assert clock.monotonic() - start <= 1.0
            for number in range(100):
                assert await site.status(f"user-{number}") is Status.STORE_ERROR
            assert clock.monotonic() - start <= 1.0
            assert site.big_segments.known(["new"]) is not None
            assert not site.big_segments.status.available
            site.notices.clear()
            setattr(site.store, how, False)
            await asyncio.sleep(2.5)
            assert await site.is_member("ann")
            assert site.notices == [None]


@timed
async def test_changes_that_nobody_asks_for_take_no_memory():
    """Millions of members may come after a read, and before the next one."""
    async with in_use() as site:
        await site.is_member("ann")
        tracemalloc.start()
        for start in range(0, 100_000, 1000):
            site.big_segments.changed(frozenset(map(str, range(start, start + 1000))))
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown < 4_000_000
        assert not await site.is_member("ann")


@timed
async def test_one_patch_with_very_many_members_counts_as_all():
    """No notice names more than `MAX_CHANGED`, however they came."""
    async with in_use() as site:
        most = frozenset(map(str, range(MAX_CHANGED)))
        site.big_segments.changed(most)
        await asyncio.sleep(1.1)
        site.big_segments.changed(most | {"one more"})
        await asyncio.sleep(1.1)
        assert site.notices == [most, None]


@timed
async def test_who_is_told_of_changes_looks_at_no_cursor():
    """Its status is looked at all the same, and whoever wants to know hears when it changes."""
    async with in_use() as site:
        statuses = []
        site.big_segments.on_status = lambda: statuses.append(site.big_segments.age)
        site.big_segments.watches_cursor = False
        site.store.include("ann")
        assert await site.is_member("ann")
        site.store.cursor, site.store.now = "v2", clock.unix() - 200
        await asyncio.sleep(5.1)
        assert site.notices == []
        assert await site.status("ann") is Status.STALE
        assert len(statuses) == 1


@timed
async def test_an_odd_time_counts_as_none():
    """As in ld-relay, `/status` says that nothing is available, and members are found."""
    async with in_use() as site:
        site.store.include("ann")
        site.store.readable = False
        site.big_segments.look()
        await asyncio.sleep(0.1)
        assert await site.status("ann") is Status.STALE
        assert await site.is_member("ann")
        assert not site.big_segments.status.available
        site.store.readable = True
        await asyncio.sleep(5.1)
        assert await site.status("ann") is Status.HEALTHY


@timed
async def test_nothing_is_read_before_it_is_needed():
    """Without a big segment the database is left alone, and `/status` is silent."""
    site = Site()
    running = asyncio.create_task(site.big_segments.run())
    await asyncio.sleep(60)
    assert site.big_segments.status is None
    assert site.store.reads == []
    running.cancel()
    await asyncio.wait([running])


@timed
async def test_they_move_to_another_database():
    """Reads go there at once, and clients hear of it; the former one is closed a little later."""
    async with in_use() as site:
        site.store.include("ann")
        assert await site.is_member("ann")
        former, site.store = site.store, Store()
        site.store.include("bob")
        site.big_segments.move(site.store, None)
        assert not await site.is_member("ann")
        assert await site.is_member("bob")
        assert await site.status("ann") is Status.HEALTHY
        assert not former.closed
        await asyncio.sleep(1.1)
        assert former.closed
        assert not site.store.closed
        assert site.notices == [None]


@timed
async def test_a_read_from_a_former_database_is_made_anew():
    """That the former one is away concerns nobody any more."""
    async with in_use() as site:
        former, site.store = site.store, Store()
        former.hangs = True
        site.store.include("ann")
        reading = asyncio.create_task(site.is_member("ann"))
        await asyncio.sleep(0.1)
        site.big_segments.move(site.store, None)
        assert await reading
        assert await site.status("ann") is Status.HEALTHY


@timed
async def test_they_move_before_they_are_in_use():
    """Nothing is read of either before that."""
    site = Site()
    running = asyncio.create_task(site.big_segments.run())
    await asyncio.sleep(0.1)
    former, site.store = site.store, Store()
    site.big_segments.move(site.store, None)
    await asyncio.sleep(1.1)
    assert former.closed
    site.big_segments.start(synchronise=False)
    site.store.include("ann")
    assert await site.is_member("ann")
    assert former.reads == []
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert site.store.closed
