"""Big segments on several servers: one relay applies a patch, and an interrupted one is repeated."""

from __future__ import annotations

import asyncio

import pytest

from relay.errors import StoreUnavailable
from relay.stores.redis import divided_bigsegments
from relay.stores.redis.connect import connect
from relay.stores.redis.divided_bigsegments import big_segment_store
from tests.stores.bigsegments_contract import ANN, BEN, CLEO, patch
from tests.support.rediscluster import Cluster
from tests.support.serving import until

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
    assert len(cluster.keys()) == 5


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
