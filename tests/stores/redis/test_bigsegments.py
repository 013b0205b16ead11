"""Big segments in a real Redis server."""

from __future__ import annotations

import asyncio
import json
from itertools import chain

import pytest

from relay.errors import StoreUnavailable
from relay.protocol.bigsegments import PatchReader
from relay.stores.bigsegments import Metadata
from relay.stores.redis.bigsegments import RedisBigSegmentStore
from relay.stores.redis.connect import connect
from tests.stores.bigsegments_contract import ANN, BEN, CLEO, BigSegmentStoreContract, patch
from tests.support.holding import holding
from tests.support.redis import RedisServer
from tests.support.upstream import segment_patch


@pytest.fixture
async def store(server):
    store = RedisBigSegmentStore(connect(server.options()), "big")
    yield store
    await store.aclose()


@pytest.fixture
async def another_store(server):
    store = RedisBigSegmentStore(connect(server.options()), "big")
    yield store
    await store.aclose()


class TestContract(BigSegmentStoreContract):
    """Redis keeps the contract."""


async def test_the_layout_is_that_of_sdks(server, store):
    """Keys, types and members are as recorded; empty sets vanish."""
    await store.apply(patch("v1", include=[ANN, CLEO], exclude=[BEN]), None)
    await store.apply(patch("v2", no_longer=[CLEO]), "v1")
    await store.mark_synchronized(1_700_000_000.5)
    assert server.do("SMEMBERS", f"big:big_segment_include:{ANN}") == {b"team.g2"}
    assert server.do("SMEMBERS", f"big:big_segment_exclude:{BEN}") == {b"team.g2"}
    assert server.do("GET", "big:big_segments_cursor") == b"v2"
    assert server.do("GET", "big:big_segments_synchronized_on") == b"1700000000500"
    assert server.do("GET", "big:big_segments_lock") == b""
    assert server.do("DBSIZE") == 5


async def test_only_real_changes_are_reported(store):
    """Members that are there already, or are not there, have not changed."""
    await store.apply(patch("v1", include=[ANN]), None)
    changed = await store.apply(patch("v2", include=[ANN, BEN], no_longer_excluded=[CLEO]), "v1")
    assert changed == {BEN}


async def test_an_odd_time_is_none(server, store):
    """A time that is no number is reported, and does not hide the version."""
    await store.apply(patch("v1"), None)
    server.do("SET", "big:big_segments_synchronized_on", "soon")
    assert await store.metadata() == Metadata("v1", None, is_readable=False)


async def test_foreign_types_are_an_error(server, store):
    """A key of another type is reported as the server says it."""
    server.do("HSET", f"big:big_segment_include:{ANN}", "a", "b")
    with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
        await store.memberships([ANN])


async def test_a_server_that_is_away_is_reported(tmp_path):
    """Every method raises the same error, and works again afterwards."""
    with RedisServer(tmp_path) as server:
        store = RedisBigSegmentStore(connect(server.options()), "big")
        await store.apply(patch("v1", include=[ANN]), None)
        server.kill()
        for attempt in (
            store.metadata(),
            store.memberships([ANN]),
            store.mark_synchronized(1.0),
            store.apply(patch("v2"), "v1"),
        ):
            with pytest.raises(StoreUnavailable):
                await attempt
        server.start()
        assert (await store.metadata()).cursor is None
        await store.aclose()


@pytest.mark.timing
async def test_a_large_patch_never_holds_the_event_loop(server):
    """Not for 15 ms, from its bytes to the database, though it has a hundred thousand members."""
    store = RedisBigSegmentStore(connect(server.options(read_timeout=10.0)), "big")
    await store.metadata()  # which connects
    members = [f"user-{number}" for number in range(100_000)]
    text = json.dumps([segment_patch("team.g2", "v1", "", include=members)]).encode()
    reader = PatchReader()
    with holding() as longest:
        pieces = (text[start : start + 2**18] for start in range(0, len(text), 2**18))
        read = (each for piece in pieces for each in reader.feed(piece))
        for each in chain(read, reader.finish()):
            if each is None:
                await asyncio.sleep(0)
            else:
                changed = await store.apply(each, None)
    await store.aclose()
    assert len(changed) == 100_000
    assert longest.seconds < 0.015
