"""The list of environments in Redis, as ld-relay stores it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from relay.errors import StoreUnavailable
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.redis.connect import connect
from relay.stores.redis.layout import CHUNK
from relay.stores.redis.list import RedisList
from tests.stores.list_contract import KEY, LIST, Database, StoredListContract
from tests.support.environments import description

SHAPES = ["server", "cluster", "sentinels"]


class RedisWithList(Database):
    """Redis in any shape.

    Args:
        servers: with options, and commands that find their keys.
    """

    def __init__(self, servers) -> None:
        self.servers = servers

    @asynccontextmanager
    async def stored(
        self, owner: str = KEY, secret: str = "", **options
    ) -> AsyncIterator[RedisList]:
        client = connect(self.servers.options(**options))
        place = RedisList(client, "cache", AutoConfigKey(owner), Secret(secret))
        try:
            yield place
        finally:
            await place.aclose()

    def content(self) -> Mapping[str, bytes]:
        return self.servers.hash("cache")

    def put(self, name: str, content: bytes) -> None:
        self.servers.do("HSET", "cache", name, content)


class TestContract(StoredListContract):
    """Every shape keeps the contract of stored lists."""

    @pytest.fixture(params=SHAPES)
    def database(self, request):
        return RedisWithList(request.getfixturevalue(request.param))


@pytest.fixture
def database(server):
    return RedisWithList(server)


async def test_a_long_list_is_written_in_pieces(database):
    """In one transaction all the same."""
    many = {f"e{n}": describe(description(envID=f"e{n}", envName="x" * 900)) for n in range(500)}
    database.servers.do("CONFIG", "RESETSTAT")
    await database.save(EnvironmentList(many, {}))
    assert sum(map(len, database.content().values())) > CHUNK
    assert database.servers.calls()["exec"] == 1


@pytest.mark.parametrize("fault", ["full", "of another type", "down"])
async def test_a_database_that_fails_is_told(server, database, fault):
    """In the server's words, and what was stored stays."""
    if fault == "full":
        await database.save(LIST)
        server.do("CONFIG", "SET", "maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailable, match="command not allowed when used memory"):
                await database.save(EnvironmentList({}, LIST.filters))
        finally:
            server.do("CONFIG", "SET", "maxmemory", "0")
        assert await database.load() == LIST
    elif fault == "of another type":
        server.do("SET", "cache", "text")
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            await database.load()
    else:
        with pytest.raises(StoreUnavailable, match="refused"):
            async with database.stored(url="redis://127.0.0.1:1") as place:
                await place.load()


def test_no_password_is_shown(server):
    """In the place that log lines name."""
    options = server.options(url="redis://:pass-word@127.0.0.1:1")
    place = RedisList(connect(options), "cache", AutoConfigKey(KEY), Secret("se-cret"))
    assert place.label == 'key "cache" of Redis at redis://:xxxxx@127.0.0.1:1'
    assert "se-cret" not in repr(place)
