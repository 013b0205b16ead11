"""The list of environments in DynamoDB, as ld-relay stores it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from relay.errors import StoreUnavailable
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.dynamodb.connect import connect
from relay.stores.dynamodb.layout import MAX_BATCH
from relay.stores.dynamodb.list import DynamoDBList
from tests.stores.list_contract import KEY, LIST, NAMES, Database, StoredListContract
from tests.support.dynamodb import VARIABLES, Table, failure
from tests.support.environments import description


class TableWithList(Database):
    """A table."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @asynccontextmanager
    async def stored(
        self, owner: str = KEY, secret: str = "", url: str = ""
    ) -> AsyncIterator[DynamoDBList]:
        share = connect(url or self.table.server.url, VARIABLES).share()
        place = DynamoDBList(share, self.table.name, "cache", AutoConfigKey(owner), Secret(secret))
        try:
            yield place
        finally:
            await place.aclose()

    def content(self) -> Mapping[str, bytes]:
        items = (item for item in self.table.items() if item["namespace"]["S"] == "cache")
        return {item["key"]["S"]: item.get("item", {}).get("B", b"") for item in items}

    def put(self, name: str, content: bytes) -> None:
        item = {"namespace": {"S": "cache"}, "key": {"S": name}, "item": {"B": content}}
        self.table.server.client.put_item(TableName=self.table.name, Item=item)


@pytest.fixture
def database(table):
    return TableWithList(table)


class TestContract(StoredListContract):
    """DynamoDB keeps the contract of stored lists."""


async def test_entries_have_no_other_attributes(table, database):
    """Items of ld-relay's form and no others in its namespace."""
    await database.save(LIST)
    assert sorted(database.content()) == NAMES
    for name in NAMES:
        item = table.get("cache", name)
        assert item is not None
        assert item.keys() == {"namespace", "key", "item"}


async def test_only_what_differs_is_written(table, database, proxy):
    """A list that stays the same costs one write: the time at which it was confirmed."""
    many = {f"e{n}": describe(description(envID=f"e{n}")) for n in range(2 * MAX_BATCH + 1)}
    async with database.stored(url=proxy.url) as place:
        await place.save(EnvironmentList(many, {}, 5.0))
        assert proxy.operations.count("BatchWriteItem") == 3
        proxy.asked.clear()
        await place.save(EnvironmentList(many, {}, 6.0))
        assert proxy.operations == ["Query", "PutItem"]
        assert await place.load() == EnvironmentList(many, {}, 6.0)
        changed = {**many, "e7": describe(description(envID="e7", version=2))}
        del changed["e8"]
        proxy.asked.clear()
        await place.save(EnvironmentList(changed, {}, 7.0))
        assert proxy.operations == ["Query", "BatchWriteItem", "BatchWriteItem", "PutItem"]
        assert [len(a.body["RequestItems"][table.name]) for a in proxy.asked[1:3]] == [1, 1]
        assert await place.load() == EnvironmentList(changed, {}, 7.0)


async def test_what_is_altered_is_not_used_and_written_again(table, database):
    """Another item, none, or a time of another list: the rest is used."""
    both = EnvironmentList({**LIST.environments, "e": describe(description(envID="e"))}, {}, 5.0)
    await database.save(both)
    database.put("env:e", b"x" * 100)
    table.put("cache:relayConfirmed", "confirmed", item="6000")
    table.put("cache", "something", item="of others")
    read = await database.load()
    assert list(read.environments) == ["id-alpha"]
    assert list(read.unusable) == ["env:e"]
    assert read.confirmed is None
    await database.save(both)
    assert await database.load() == both
    assert "something" in database.content()


@pytest.mark.parametrize("after", range(4))
async def test_a_write_that_breaks_off_leaves_whole_entries(table, database, proxy, after):
    """Each is the former or the new one, and the age is never less than it was."""
    old = {f"e{n}": describe(description(envID=f"e{n}")) for n in range(2 * MAX_BATCH)}
    new = {
        f"e{n}": describe(description(envID=f"e{n}", version=2)) for n in range(5, 3 * MAX_BATCH)
    }
    await database.save(EnvironmentList(old, {}, 5.0))

    def refuse(operation: str, _body: object):
        done = proxy.operations.count("BatchWriteItem")
        return failure("AccessDeniedException") if operation != "Query" and done > after else None

    proxy.misbehave = refuse
    async with database.stored(url=proxy.url) as place:
        with pytest.raises(StoreUnavailable, match="AccessDenied"):
            await place.save(EnvironmentList(new, {}, 9.0))
    read = await database.load()
    assert read.confirmed == 5.0
    assert not read.unusable
    for name, environment in read.environments.items():
        assert environment in (old.get(name), new.get(name))
    assert after == 3 or old.keys() <= read.environments.keys(), "what is gone is removed last"
    await database.save(EnvironmentList(new, {}, 9.0))
    assert await database.load() == EnvironmentList(new, {}, 9.0)


@pytest.mark.parametrize("fault", ["no table", "down"])
async def test_a_service_that_fails_is_told(table, database, fault):
    """In words that say what to do."""
    url = "http://127.0.0.1:1" if fault == "down" else ""
    if fault == "no table":
        table.drop()
    reason = f'there is no table "{table.name}"' if fault == "no table" else "connect"
    async with database.stored(url=url) as place:
        with pytest.raises(StoreUnavailable, match=f"(?i){reason}"):
            await place.load()
        with pytest.raises(StoreUnavailable, match=f"(?i){reason}"):
            await place.save(LIST)


async def test_a_throttled_request_is_sent_again(table, database, proxy):
    """The service may refuse each for a moment."""
    refusals = iter([failure("ProvisionedThroughputExceededException")] * 2)
    proxy.misbehave = lambda operation, _: next(refusals, None)
    async with database.stored(url=proxy.url) as place:
        await place.save(LIST)
    assert await database.load() == LIST


def test_no_key_is_shown(server):
    """In the place that log lines name."""
    share = connect(server.url, VARIABLES).share()
    place = DynamoDBList(share, "table", "cache", AutoConfigKey(KEY), Secret("se-cret"))
    assert place.label == 'key "cache" of table "table" in DynamoDB'
    assert "se-cret" not in repr(place)
    assert KEY not in repr(place)
