"""The list of environments in Redis, as ld-relay stores it."""

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
from relay.stores.redis.connect import connect
from relay.stores.redis.layout import CHUNK
from relay.stores.redis.list import RedisList
from tests.support.environments import description, payload_filter

KEY = "rel-5ca1ab1e-0001"
LIST = EnvironmentList(
    {"id-alpha": describe(description())}, {"f": FilterDescription(1, "proj", "north")}, 5.0
)


@asynccontextmanager
async def stored(server, owner: str = KEY, secret: str = "", **options) -> AsyncIterator[RedisList]:
    place = RedisList(
        connect(server.options(**options)), "cache", AutoConfigKey(owner), Secret(secret)
    )
    try:
        yield place
    finally:
        await place.aclose()


async def load(server, *args: str, **options) -> EnvironmentList | None:
    async with stored(server, *args, **options) as place:
        return await place.load()


async def save(server, content: EnvironmentList, *args: str) -> None:
    async with stored(server, *args) as place:
        await place.save(content)


@pytest.mark.parametrize("secret", ["", "a-long-random-text"])
async def test_the_list_survives(server, secret):
    """Each write replaces everything."""
    assert await load(server, KEY, secret) is None
    await save(server, LIST, KEY, secret)
    assert await load(server, KEY, secret) == LIST
    assert sorted(server.hash("cache")) == ["env:id-alpha", "filter:f"]
    assert all(b"alpha" not in value for value in server.hash("cache").values())
    beta = EnvironmentList({"id-beta": describe(description("beta"))}, {})
    await save(server, beta, KEY, secret)
    assert await load(server, KEY, secret) == beta
    await save(server, EnvironmentList({}, {}), KEY, secret)
    assert await load(server, KEY, secret) is None


@pytest.mark.parametrize("secret", ["", "a-long-random-text"])
async def test_what_ld_relay_has_stored_is_used(server, secret):
    """The list of a relay that this one replaces."""
    key = hashlib.sha256((secret or KEY).encode()).digest()
    contents = {
        "env:id-alpha": {"kind": "environment", "modelVersion": 2, "data": description()},
        "filter:f": {"kind": "filter", "modelVersion": 2, "data": payload_filter("north")},
    }
    for name, content in contents.items():
        nonce = os.urandom(12)
        sealed = nonce + AESGCM(key).encrypt(nonce, json.dumps(content).encode(), None)
        server.do("HSET", "cache", name, sealed)
    read = await load(server, KEY, secret)
    assert (read.environments, read.filters) == (LIST.environments, LIST.filters)
    assert read.confirmed is None


@pytest.mark.parametrize(
    ("owner", "secret", "reason"),
    [
        (KEY, "another", "another key, or has been altered"),
        ("rel-other", "", "another key, or has been altered"),
        ("rel-other", "text", "belongs to another automatic configuration key"),
    ],
)
async def test_a_list_of_others_is_not_used(server, owner, secret, reason):
    """The next write replaces it."""
    before = "text" if secret == "text" else ""
    await save(server, LIST, KEY, before)
    with pytest.raises(InvalidData, match=reason):
        await load(server, owner, secret)
    await save(server, LIST, owner, secret)
    assert await load(server, owner, secret) == LIST


async def test_a_long_list_is_written_in_pieces(server):
    """In one transaction all the same."""
    many = {f"e{n}": describe(description(envID=f"e{n}", envName="x" * 900)) for n in range(500)}
    await save(server, EnvironmentList(many, {}))
    assert sum(map(len, server.hash("cache").values())) > CHUNK
    assert (await load(server)).environments == many


@pytest.mark.parametrize("fault", ["full", "of another type", "down"])
async def test_a_database_that_fails_is_told(server, fault):
    """In the server's words, and what was stored stays."""
    if fault == "full":
        await save(server, LIST)
        server.do("CONFIG", "SET", "maxmemory", "1")
        try:
            with pytest.raises(StoreUnavailable, match="command not allowed when used memory"):
                await save(server, EnvironmentList({}, LIST.filters))
        finally:
            server.do("CONFIG", "SET", "maxmemory", "0")
        assert await load(server) == LIST
    elif fault == "of another type":
        server.do("SET", "cache", "text")
        with pytest.raises(StoreUnavailable, match="WRONGTYPE"):
            await load(server)
    else:
        with pytest.raises(StoreUnavailable, match="refused"):
            await load(server, url="redis://127.0.0.1:1")


def test_no_password_is_shown(server):
    """In the place that log lines name."""
    options = server.options(url="redis://:pass-word@127.0.0.1:1")
    place = RedisList(connect(options), "cache", AutoConfigKey(KEY), Secret("se-cret"))
    assert place.label == 'key "cache" of Redis at redis://:xxxxx@127.0.0.1:1'
    assert "se-cret" not in repr(place)
