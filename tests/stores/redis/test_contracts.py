"""A cluster, with and without a hash tag, and Sentinels keep the contracts of all databases."""

from __future__ import annotations

import pytest

from relay.stores.redis.bigsegments import RedisBigSegmentStore
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import DividedRedisStore, data_store
from relay.stores.redis.divided_bigsegments import DividedBigSegmentStore, big_segment_store
from relay.stores.redis.store import RedisStore
from tests.stores.bigsegments_contract import BigSegmentStoreContract
from tests.stores.contract import StoreContract

SHAPES = {
    "divided": ("cluster", "shop"),
    "one slot": ("cluster", "{shop}"),
    "sentinels": ("sentinels", "shop"),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    """Options of the servers, and a prefix."""
    servers, prefix = request.param
    return request.getfixturevalue(servers).options(), prefix


class TestDataStore(StoreContract):
    """Every shape keeps the contract of data stores."""

    @pytest.fixture
    async def store(self, shape):
        options, prefix = shape
        store = data_store(connect(options), prefix)
        yield store
        await store.aclose()


class TestBigSegments(BigSegmentStoreContract):
    """Every shape keeps the contract of big segments."""

    @pytest.fixture
    async def store(self, shape):
        options, prefix = shape
        store = big_segment_store(connect(options), prefix)
        yield store
        await store.aclose()

    @pytest.fixture
    async def another_store(self, shape):
        options, prefix = shape
        store = big_segment_store(connect(options), prefix)
        yield store
        await store.aclose()


def test_a_hash_tag_keeps_an_environment_together(cluster):
    """Then one transaction holds its keys, as on a single server; else they are divided."""
    client = connect(cluster.options())
    for prefix in ("{shop}", "eu:{shop}", "{shop}:eu"):
        assert type(data_store(client, prefix)) is RedisStore
        assert type(big_segment_store(client, prefix)) is RedisBigSegmentStore
    for prefix in ("", "shop", "{}shop", "}shop{"):
        assert type(data_store(client, prefix)) is DividedRedisStore
        assert type(big_segment_store(client, prefix)) is DividedBigSegmentStore
