"""The commands of fleets: the simulation's server behaves as a real one does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from relay.fleet import Connection, Database
from relay.stores.redis.connect import connect
from tests.support.fakeredis import FakeDatabase, FakeRedis, Link
from tests.support.redis import RedisServer


def fake() -> FakeDatabase:
    """A server of the simulation, on this loop and in real time."""
    loop = asyncio.get_running_loop()
    return FakeDatabase(FakeRedis(loop.call_later, time.monotonic, Random(1)), Link(), 2.0)


@pytest.fixture(params=["simulated", "real"])
async def database(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Database]:
    database = fake() if request.param == "simulated" else connect(server.options())
    yield database
    await database.leave(None)


async def run(database: Database, *commands: tuple[str, ...]) -> list[Any]:
    return await database.run("a", lambda connection: connection.execute_all(commands))


@asynccontextmanager
async def lent(database: Database) -> AsyncIterator[Connection]:
    """A connection, beside others."""
    lending: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    returned = asyncio.Event()

    async def work(connection: Connection) -> None:
        lending.set_result(connection)
        await returned.wait()

    task = asyncio.create_task(database.run("a", work))
    try:
        yield await lending
    except BaseException:
        task.cancel()
        await asyncio.wait([task])
        raise
    returned.set()
    await task


async def test_strings_expire(database: Database) -> None:
    """A lease vanishes after its time, and lasts longer when it is renewed."""
    await run(database, ("SET", "lease", "me", "PX", "60"), ("SET", "term", "1:me"))
    assert await run(database, ("MGET", "lease", "other", "term")) == [[b"me", None, b"1:me"]]
    await run(database, ("PEXPIRE", "lease", "150"))
    await asyncio.sleep(0.1)
    assert await run(database, ("GET", "lease"), ("EXISTS", "lease")) == [b"me", 1]
    await asyncio.sleep(0.1)
    assert await run(database, ("GET", "lease"), ("PEXPIRE", "lease", "9")) == [None, 0]


async def test_a_transaction_fails_if_a_watched_key_has_changed(database: Database) -> None:
    """Between WATCH and EXEC nobody else may write."""
    async with lent(database) as first:
        await first.execute_all([("WATCH", "a", "b"), ("GET", "a")])
        await run(database, ("SET", "b", "2"))
        replies = await first.execute_all([("MULTI",), ("SET", "a", "1"), ("EXEC",)])
        assert replies == [b"OK", b"QUEUED", None]
        replies = await first.execute_all([("MULTI",), ("SET", "a", "1"), ("EXEC",)])
        assert replies == [b"OK", b"QUEUED", [b"OK"]]
    assert await run(database, ("GET", "a")) == [b"1"]


@pytest.mark.parametrize("change", [("DEL", "a"), ("PEXPIRE", "a", "5000"), ("SET", "a", "1")])
async def test_whatever_touches_a_watched_key_counts(database: Database, change: Any) -> None:
    """Deletions, renewals and equal values are changes."""
    await run(database, ("SET", "a", "1"))
    async with lent(database) as connection:
        await connection.execute_all([("WATCH", "a")])
        await run(database, change)
        *_, done = await connection.execute_all([("MULTI",), ("GET", "a"), ("EXEC",)])
    assert done is None


async def test_unwatch_and_discard_forget(database: Database) -> None:
    """Changes of a key that is not watched any more do not matter."""
    for forget in ([("UNWATCH",)], [("MULTI",), ("SET", "b", "1"), ("DISCARD",)]):
        async with lent(database) as connection:
            await connection.execute_all([("WATCH", "a"), *forget])
            await run(database, ("SET", "a", "1"))
            *_, done = await connection.execute_all([("MULTI",), ("EXISTS", "b"), ("EXEC",)])
        assert done == [0]


async def test_a_closed_connection_executes_nothing(database: Database) -> None:
    """A transaction whose connection is given up before EXEC never happens."""

    async def fail(connection: Connection) -> None:
        await connection.execute_all([("MULTI",), ("SET", "a", "1")])
        raise KeyError

    with pytest.raises(KeyError):
        await database.run("a", fail)
    assert await run(database, ("GET", "a")) == [None]


async def test_hashes(database: Database) -> None:
    """Fields are set and read together."""
    await run(database, ("HSET", "h", "a", "1", "b", "2"), ("HSET", "h", "b", "3"))
    [flat] = await run(database, ("HGETALL", "h"))
    assert dict(zip(flat[::2], flat[1::2], strict=True)) == {b"a": b"1", b"b": b"3"}
    assert await run(database, ("DEL", "h", "i"), ("HGETALL", "h")) == [1, []]


async def test_fields_of_hashes(database: Database) -> None:
    """Single fields are read, counted and removed; the last one takes the hash along."""
    await run(database, ("HSET", "h", "a", "1", "b", "2"))
    assert await run(database, ("HGET", "h", "a"), ("HGET", "h", "c")) == [b"1", None]
    assert await run(database, ("HLEN", "h"), ("HDEL", "h", "a", "c")) == [2, 1]
    assert await run(database, ("HDEL", "h", "b"), ("EXISTS", "h"), ("HLEN", "h")) == [1, 0, 0]


@pytest.mark.parametrize(
    "change", [("HDEL", "h", "a"), ("HSET", "h", "a", "1"), ("HSET", "h", "b", "")]
)
async def test_changes_of_a_hash_count(database: Database, change: Any) -> None:
    """A field that is set to what it was is a change, too."""
    await run(database, ("HSET", "h", "a", "1"))
    async with lent(database) as connection:
        await connection.execute_all([("WATCH", "h")])
        await run(database, change)
        assert await connection.transaction([("HSET", "h", "a", "2")]) is None
        assert await connection.transaction([("HSET", "h", "a", "2"), ("HLEN", "h")]) is not None
    assert await run(database, ("HGET", "h", "a")) == [b"2"]


async def test_streams_are_read_from_a_place(database: Database) -> None:
    """A reader that names a place gets the entries that were added after it."""
    add = ("XADD", "s", "MAXLEN", "~", "10000", "*", "p", "x", "d")
    last = ("XREVRANGE", "s", "+", "-", "COUNT", "1")
    assert await run(database, last) == [[]]
    first, second = await run(database, (*add, "1"), (*add, "2"))
    assert await run(database, last) == [[[second, [b"p", b"x", b"d", b"2"]]]]
    read = ("XREAD", "COUNT", "10", "BLOCK", "1000", "STREAMS", "s")
    [[[name, entries]]] = await run(database, (*read, first.decode()))
    assert (name, entries) == (b"s", [[second, [b"p", b"x", b"d", b"2"]]])
    [[[_, entries]]] = await run(database, (*read, "0-0"))
    assert [place for place, _ in entries] == [first, second]


async def test_a_reader_waits_for_the_next_entry(database: Database) -> None:
    """XREAD answers as soon as there is an entry, or with nothing when its time is over."""
    read = ("XREAD", "COUNT", "10", "BLOCK", "900", "STREAMS", "s", "0-0")
    waiting = asyncio.ensure_future(run(database, read))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    async with lent(database) as connection:
        add = ("XADD", "s", "MAXLEN", "~", "9", "*", "d", "1")
        *_, [place] = await connection.execute_all([("MULTI",), add, ("EXEC",)])
    assert await waiting == [[[b"s", [[place, [b"d", b"1"]]]]]]
    read = ("XREAD", "COUNT", "10", "BLOCK", "50", "STREAMS", "s", place.decode())
    assert await run(database, read) == [None]
