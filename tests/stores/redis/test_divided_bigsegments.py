"""Big segments on several servers: one relay applies a patch, and an interrupted one is repeated."""

from __future__ import annotations

import asyncio
import signal
import sys

import pytest

from relay import clock
from relay.errors import StoreUnavailable
from relay.stores.redis import divided_bigsegments
from relay.stores.redis.connect import connect
from relay.stores.redis.divided_bigsegments import big_segment_store
from tests.stores.bigsegments_contract import ANN, BEN, CLEO, patch
from tests.support.rediscluster import Cluster
from tests.support.serving import until
from tests.support.upstream import context_hash

CURSOR, LOCK = "shop:big_segments_cursor", "shop:big_segments_lock"


@pytest.fixture
async def store(cluster):
    store = big_segment_store(connect(cluster.options()), "shop")
    yield store
    await store.aclose()


async def test_the_layout_is_that_of_sdks(cluster, store):
    """Keys, types and members are as on a single server."""
    await store.apply(patch("v1", include=[ANN, CLEO], exclude=[BEN]), None)
    await store.apply(patch("v2", no_longer=[CLEO]), "v1")
    await store.mark_synchronized(1_700_000_000.5)
    assert cluster.do("SMEMBERS", f"shop:big_segment_include:{ANN}") == {b"team.g2"}
    assert cluster.do("SMEMBERS", f"shop:big_segment_exclude:{BEN}") == {b"team.g2"}
    assert cluster.do("GET", CURSOR) == b"v2"
    assert cluster.do("GET", LOCK) == b""
    assert cluster.do("TTL", LOCK) == -1
    assert len(cluster.keys() - fences(cluster)) == 5
    assert len(fences(cluster)) == 1


def fences(cluster: Cluster) -> set[str]:
    """The keys of all fences."""
    keys = cluster.keys()
    return {key for key in keys if key.startswith("shop:$relay:fence:")}


async def test_a_patch_waits_for_another_relay(cluster, store):
    """While that one applies a patch, members are not mixed; a killed one's lock ends by itself."""
    await store.apply(patch("v1", include=[ANN]), None)
    cluster.do("SET", LOCK, "of-another-relay", "PX", "300")
    applying = asyncio.create_task(store.apply(patch("v2", include=[BEN]), "v1"))
    await asyncio.wait([applying], timeout=0.15)
    assert not applying.done()
    assert await store.memberships([BEN]) == [{}]
    assert await applying == {BEN}


async def test_a_patch_that_another_relay_applies_meanwhile_is_left(cluster, store):
    """It is found as soon as the version moves."""
    await store.apply(patch("v1", include=[ANN]), None)
    cluster.do("SET", LOCK, "of-another-relay", "PX", "10000")
    applying = asyncio.create_task(store.apply(patch("v2", include=[BEN]), "v1"))
    await asyncio.wait([applying], timeout=0.1)
    cluster.do("SET", CURSOR, "v2")
    assert await applying is None
    assert cluster.do("GET", LOCK) == b"of-another-relay"


async def test_an_interrupted_patch_is_applied_again(cluster, store):
    """Its version is written last; all its members count as changed."""
    await store.apply(patch("v1", include=[ANN]), None)
    cluster.do("HSET", f"shop:big_segment_include:{BEN}", "not", "a set")
    following = patch("v2", include=[CLEO, BEN], no_longer=[ANN])
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.apply(following, "v1")
    assert (await store.metadata()).cursor == "v1"
    cluster.do("DEL", f"shop:big_segment_include:{BEN}")
    assert await store.apply(following, "v1") == {ANN, BEN, CLEO}
    assert await store.memberships([ANN, BEN, CLEO]) == [{}, {"team.g2": True}, {"team.g2": True}]


async def test_a_relay_that_has_lost_the_lock_stops(cluster, store, monkeypatch):
    """It was held up for too long, and another one may be at work."""
    monkeypatch.setattr(divided_bigsegments, "RENEWAL", 0.0)
    monkeypatch.setattr(divided_bigsegments, "BATCH", 1)
    many = [ANN, BEN, CLEO] * 50
    applying = asyncio.create_task(store.apply(patch("v1", include=many), None))
    await until(lambda: cluster.do("EXISTS", LOCK) == 1)
    cluster.do("SET", LOCK, "of-another-relay", "PX", "10000")
    assert await applying is None
    assert (await store.metadata()).cursor is None
    assert cluster.do("GET", LOCK) == b"of-another-relay"


class Held:
    """A relay that is held up in the middle of a patch, with half of a batch sent.

    Args:
        cluster: the servers.
        point: number of the request before which it is held up.
    """

    def __init__(self, cluster: Cluster, point: int) -> None:
        client = connect(cluster.options())
        self._execute_all, self._run = client.execute_all, client.run
        client.execute_all, client.run = self._hold_all, self._hold_run
        self._left = point
        self.waits, self.go_on = asyncio.Event(), asyncio.Event()
        self.store = big_segment_store(client, "shop")

    async def _hold(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.waits.set()
            await self.go_on.wait()

    async def _hold_all(self, commands):
        half = len(commands) // 2
        first = await self._execute_all(commands[:half]) if half else []
        await self._hold()
        return [*first, *await self._execute_all(commands[half:])]

    async def _hold_run(self, *given):
        await self._hold()
        return await self._run(*given)


MEMBERS = [context_hash(f"user-{number}") for number in range(200)]


@pytest.mark.parametrize("interruptions", [1, 2])
@pytest.mark.parametrize("point", range(1, 8))
async def test_a_relay_that_was_stopped_changes_nothing_afterwards(
    cluster, store, monkeypatch, point, interruptions
):
    """Wherever it was, others have applied its patch and more meanwhile: theirs stays."""
    monkeypatch.setattr(divided_bigsegments, "LOCK_TIME", 0.1)
    monkeypatch.setattr(divided_bigsegments, "BATCH", 80)
    await store.apply(patch("v1", exclude=[ANN]), None)
    second = patch("v2", include=MEMBERS)
    async with asyncio.TaskGroup() as tasks:
        late = []
        for _ in range(interruptions):
            held = Held(cluster, point)
            late.append((held, tasks.create_task(held.store.apply(second, "v1"))))
            await held.waits.wait()
            await asyncio.sleep(0.15)
        assert await store.apply(second, "v1") == set(MEMBERS)
        await store.apply(patch("v3", no_longer=MEMBERS[:100]), "v2")
        await store.apply(patch("v4", no_longer=MEMBERS[100:]), "v3")
        for held, _ in late:
            held.go_on.set()
    assert [applying.result() for _, applying in late] == [None] * interruptions
    assert (await store.metadata()).cursor == "v4"
    assert await store.memberships(MEMBERS) == [{}] * 200
    await store.apply(patch("v5", include=MEMBERS), "v4")
    assert await store.memberships(MEMBERS) == [{"team.g2": True}] * 200
    for held, _ in late:
        await held.store.aclose()


async def test_who_is_overtaken_does_not_move_the_version(cluster, store, monkeypatch):
    """It was held up before that, and another relay is in the middle of the same patch."""
    monkeypatch.setattr(divided_bigsegments, "LOCK_TIME", 0.1)
    await store.apply(patch("v1", exclude=[ANN]), None)
    second = patch("v2", include=MEMBERS)
    async with asyncio.TaskGroup() as tasks:
        first = Held(cluster, 5)  # all is written but the version
        firsts = tasks.create_task(first.store.apply(second, "v1"))
        await first.waits.wait()
        await asyncio.sleep(0.15)
        other = Held(cluster, 4)  # half of it is written
        others = tasks.create_task(other.store.apply(second, "v1"))
        await other.waits.wait()
        first.go_on.set()
        assert await firsts is None
        assert (await store.metadata()).cursor == "v1"
        other.go_on.set()
        assert await others == set(MEMBERS)
    for held in (first, other):
        await held.store.aclose()


async def test_what_a_failed_attempt_has_sent_may_arrive_late(cluster, store):
    """A server that hung takes it when others have gone on, who did not wait for the lock to end."""
    await store.apply(patch("v1", exclude=[ANN]), None)
    client = connect(cluster.options())
    execute_all, sent = client.execute_all, []

    async def fail(commands):
        if len(commands) == 1:
            return await execute_all(commands)
        sent.extend(commands)
        raise StoreUnavailable("no answer in time")

    client.execute_all = fail
    failing = big_segment_store(client, "shop")
    with pytest.raises(StoreUnavailable):
        await failing.apply(patch("v2", include=MEMBERS), "v1")
    start = clock.monotonic()
    await store.apply(patch("v2", include=MEMBERS), "v1")
    await store.apply(patch("v3", no_longer=MEMBERS), "v2")
    assert clock.monotonic() - start < divided_bigsegments.LOCK_TIME / 2
    assert not any(await execute_all(sent))
    assert await store.memberships(MEMBERS) == [{}] * 200
    await failing.aclose()


async def test_fences_stay_away_as_long_as_nobody_is_interrupted(cluster, store):
    """Patches that follow each other leave one number, at the lock."""
    before = None
    for number in range(5):
        await store.apply(patch(f"v{number}", include=MEMBERS[number * 40 :]), before)
        before = f"v{number}"
    assert len(fences(cluster)) == 1


APPLY = """
import asyncio, sys
from relay.stores.redis import divided_bigsegments
from relay.stores.redis.connect import RedisOptions, connect
from tests.stores.bigsegments_contract import patch
from tests.stores.redis.test_divided_bigsegments import MEMBERS
divided_bigsegments.LOCK_TIME, divided_bigsegments.BATCH = 0.5, 2

async def main():
    options = RedisOptions(url=sys.argv[1], cluster=True)
    store = divided_bigsegments.big_segment_store(connect(options), "shop")
    await store.apply(patch("v2", include=MEMBERS * 20), "v1")
asyncio.run(main())
"""


async def test_a_process_that_was_stopped_changes_nothing_afterwards(cluster, store, monkeypatch):
    """The same with SIGSTOP, in the middle of its writes, wherever that is."""
    monkeypatch.setattr(divided_bigsegments, "LOCK_TIME", 0.5)
    await store.apply(patch("v1", exclude=[ANN]), None)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPLY, cluster.options().url
    )
    key = f"shop:big_segment_include:{MEMBERS[9]}"
    await until(lambda: cluster.do("EXISTS", key) == 1, 30)
    process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(0.6)
    assert await store.apply(patch("v2", include=MEMBERS), "v1") == set(MEMBERS)
    await store.apply(patch("v3", no_longer=MEMBERS), "v2")
    process.send_signal(signal.SIGCONT)
    assert await process.wait() == 0
    assert await store.memberships(MEMBERS) == [{}] * 200


async def test_memberships_are_read_while_slots_move(cluster, store):
    """The keys of contexts are on all servers; they are followed."""
    await store.apply(patch("v1", include=[ANN, BEN], exclude=[CLEO]), None)
    expected = [{"team.g2": True}, {"team.g2": True}, {"team.g2": False}]
    for each in (ANN, BEN):
        key = f"shop:big_segment_include:{each}"
        source = cluster.master_of(key)
        target = next(server for server in cluster.servers if server is not source)
        slot = cluster.begin_move(key, target)
        cluster.move_key(key, source, target)
        assert await store.memberships([ANN, BEN, CLEO]) == expected
        cluster.end_move(slot, source, target)
        assert await store.memberships([ANN, BEN, CLEO]) == expected


async def test_a_failover_loses_no_patch(tmp_path):
    """While a master is away every method raises the same error, and then goes on."""
    with Cluster(tmp_path, replicas=1) as cluster:
        store = big_segment_store(connect(cluster.options()), "shop")
        await store.apply(patch("v1", include=[ANN, BEN, CLEO]), None)
        master = cluster.master_of(CURSOR)
        master.do("WAIT", 1, 5000)
        master.kill()
        async with asyncio.timeout(30):
            while True:
                try:
                    cursor = (await store.metadata()).cursor
                    if cursor == "v2" or await store.apply(patch("v2", exclude=[ANN]), cursor):
                        break
                except StoreUnavailable:
                    await asyncio.sleep(0.05)
        assert (await store.metadata()).cursor == "v2"
        assert await store.memberships([ANN, BEN]) == [{"team.g2": True}] * 2
        await store.aclose()
