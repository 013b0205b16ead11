"""The list of environments in DynamoDB, as ld-relay stores it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from relay.errors import InvalidData, StoreUnavailable
from relay.model.credential import AutoConfigKey, Secret
from relay.protocol.autoconfig import FilterDescription
from relay.protocol.environmentlist import EnvironmentList
from relay.protocol.environments import describe
from relay.stores.dynamodb.connect import connect
from relay.stores.dynamodb.layout import MAX_BATCH
from relay.stores.dynamodb.list import DynamoDBList
from tests.support.dynamodb import VARIABLES, Table, failure
from tests.support.environments import description, payload_filter

KEY = "rel-5ca1ab1e-0001"
LIST = EnvironmentList(
    {"id-alpha": describe(description())}, {"f": FilterDescription(1, "proj", "north")}, 5.0
)


@asynccontextmanager
async def stored(
    table: Table, owner: str = KEY, secret: str = "", url: str = ""
) -> AsyncIterator[DynamoDBList]:
    share = connect(url or table.server.url, VARIABLES).share()
    place = DynamoDBList(share, table.name, "cache", AutoConfigKey(owner), Secret(secret))
    try:
        yield place
    finally:
        await place.aclose()


async def load(table: Table, *args: str) -> EnvironmentList | None:
    async with stored(table, *args) as place:
        return await place.load()


async def save(table: Table, content: EnvironmentList, *args: str) -> None:
    async with stored(table, *args) as place:
        await place.save(content)


def names(table: Table) -> list[str]:
    """The sort keys of the list's items."""
    return [item["key"]["S"] for item in table.items() if item["namespace"]["S"] == "cache"]


def seal(secret: str, content: object) -> bytes:
    nonce, key = os.urandom(12), hashlib.sha256(secret.encode()).digest()
    return nonce + AESGCM(key).encrypt(nonce, json.dumps(content).encode(), None)


def put(table: Table, name: str, content: bytes) -> None:
    item = {"namespace": {"S": "cache"}, "key": {"S": name}, "item": {"B": content}}
    table.server.client.put_item(TableName=table.name, Item=item)


@pytest.mark.parametrize("secret", ["", "a-long-random-text"])
async def test_the_list_survives(table, secret):
    """Each write leaves nothing of the one before."""
    assert await load(table, KEY, secret) is None
    await save(table, LIST, KEY, secret)
    assert await load(table, KEY, secret) == LIST
    assert names(table) == ["env:id-alpha", "filter:f"]
    assert all(b"alpha" not in each["item"]["B"] for each in table.items())
    beta = EnvironmentList({"id-beta": describe(description("beta"))}, {}, 6.0)
    await save(table, beta, KEY, secret)
    assert await load(table, KEY, secret) == beta
    await save(table, EnvironmentList({}, {}), KEY, secret)
    assert await load(table, KEY, secret) is None


@pytest.mark.parametrize("secret", ["", "a-long-random-text"])
async def test_what_ld_relay_has_stored_is_used(table, secret):
    """The list of a relay that this one replaces, or that stands beside it."""
    environment = {"kind": "environment", "modelVersion": 2, "data": description()}
    north = {"kind": "filter", "modelVersion": 2, "data": payload_filter("north")}
    put(table, "env:id-alpha", seal(secret or KEY, environment))
    put(table, "filter:f", seal(secret or KEY, north))
    read = await load(table, KEY, secret)
    assert (read.environments, read.filters) == (LIST.environments, LIST.filters)
    assert read.confirmed is None


async def test_ld_relay_reads_what_is_stored(table):
    """Items of its form and no others in its namespace."""
    await save(table, LIST)
    for name, kind in (("env:id-alpha", "environment"), ("filter:f", "filter")):
        item = table.get("cache", name)
        assert item is not None
        assert item.keys() == {"namespace", "key", "item"}
        sealed = item["item"]["B"]
        key = hashlib.sha256(KEY.encode()).digest()
        content = json.loads(AESGCM(key).decrypt(sealed[:12], sealed[12:], None))
        assert (content["kind"], content["modelVersion"]) == (kind, 2)
    assert names(table) == ["env:id-alpha", "filter:f"]


@pytest.mark.parametrize(
    ("owner", "secret", "reason"),
    [
        (KEY, "another", "another key, or has been altered"),
        ("rel-other", "", "another key, or has been altered"),
        ("rel-other", "text", "belongs to another automatic configuration key"),
    ],
)
async def test_a_list_of_others_is_not_used(table, owner, secret, reason):
    """The next write replaces it."""
    before = "text" if secret == "text" else ""
    await save(table, LIST, KEY, before)
    with pytest.raises(InvalidData, match=reason):
        await load(table, owner, secret)
    await save(table, LIST, owner, secret)
    assert await load(table, owner, secret) == LIST


async def test_only_what_differs_is_written(table, proxy):
    """A list that stays the same costs one write: the time at which it was confirmed."""
    many = {f"e{n}": describe(description(envID=f"e{n}")) for n in range(2 * MAX_BATCH + 1)}
    async with stored(table, url=proxy.url) as place:
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


async def test_what_is_altered_is_not_used_and_written_again(table):
    """Another item, none, or a time of another list: the rest is used."""
    both = EnvironmentList({**LIST.environments, "e": describe(description(envID="e"))}, {}, 5.0)
    await save(table, both)
    put(table, "env:e", b"x" * 100)
    table.put("cache:relayConfirmed", "confirmed", item="6000")
    table.put("cache", "something", item="of others")
    read = await load(table)
    assert list(read.environments) == ["id-alpha"]
    assert list(read.unusable) == ["env:e"]
    assert read.confirmed is None
    await save(table, both)
    assert await load(table) == both
    assert "something" in names(table)


@pytest.mark.parametrize("after", range(4))
async def test_a_write_that_breaks_off_leaves_whole_entries(table, proxy, after):
    """Each is the former or the new one, and the age is never less than it was."""
    old = {f"e{n}": describe(description(envID=f"e{n}")) for n in range(2 * MAX_BATCH)}
    new = {
        f"e{n}": describe(description(envID=f"e{n}", version=2)) for n in range(5, 3 * MAX_BATCH)
    }
    await save(table, EnvironmentList(old, {}, 5.0))

    def refuse(operation: str, _body: object):
        done = proxy.operations.count("BatchWriteItem")
        return failure("AccessDeniedException") if operation != "Query" and done > after else None

    proxy.misbehave = refuse
    async with stored(table, url=proxy.url) as place:
        with pytest.raises(StoreUnavailable, match="AccessDenied"):
            await place.save(EnvironmentList(new, {}, 9.0))
    read = await load(table)
    assert read.confirmed == 5.0
    assert not read.unusable
    for name, environment in read.environments.items():
        assert environment in (old.get(name), new.get(name))
    assert after == 3 or old.keys() <= read.environments.keys(), "what is gone is removed last"
    await save(table, EnvironmentList(new, {}, 9.0))
    assert await load(table) == EnvironmentList(new, {}, 9.0)


@pytest.mark.parametrize("fault", ["no table", "down"])
async def test_a_service_that_fails_is_told(table, fault):
    """In words that say what to do."""
    url = "http://127.0.0.1:1" if fault == "down" else ""
    if fault == "no table":
        table.drop()
    reason = f'there is no table "{table.name}"' if fault == "no table" else "connect"
    async with stored(table, url=url) as place:
        with pytest.raises(StoreUnavailable, match=f"(?i){reason}"):
            await place.load()
        with pytest.raises(StoreUnavailable, match=f"(?i){reason}"):
            await place.save(LIST)


async def test_a_throttled_request_is_sent_again(table, proxy):
    """The service may refuse each for a moment."""
    refusals = iter([failure("ProvisionedThroughputExceededException")] * 2)
    proxy.misbehave = lambda operation, _: next(refusals, None)
    async with stored(table, url=proxy.url) as place:
        await place.save(LIST)
    assert await load(table) == LIST


def test_no_key_is_shown(server):
    """In the place that log lines name."""
    share = connect(server.url, VARIABLES).share()
    place = DynamoDBList(share, "table", "cache", AutoConfigKey(KEY), Secret("se-cret"))
    assert place.label == 'key "cache" of table "table" in DynamoDB'
    assert "se-cret" not in repr(place)
    assert KEY not in repr(place)
