"""Sentinels name the master: failover while writing, Sentinels that are away, refuse or are wrong."""

from __future__ import annotations

import asyncio

import pytest

from relay.errors import StoreUnavailable
from relay.model.payload import Payload
from relay.stores import StoreState
from relay.stores.redis.connect import connect
from relay.stores.redis.store import RedisStore
from tests.stores.contract import flag
from tests.stores.redis.changing import PATIENCE, changing, logged
from tests.support.authorities import Authority
from tests.support.peers import peer
from tests.support.redis import RedisServer, pump, secret
from tests.support.rediscluster import MASTER, SentinelServers
from tests.support.serving import until

ONE = Payload.of([flag("lamp", 1)])


async def reason_of(options) -> str:
    store = RedisStore(connect(options))
    with pytest.raises(StoreUnavailable) as caught:
        await store.load()
    await store.aclose()
    return str(caught.value)


async def test_a_failover_while_writing_loses_nothing(tmp_path, caplog):
    """The mirror goes on at the new master, with one line each for begin and end."""
    with SentinelServers(tmp_path) as servers:
        async with changing(servers.options(), "shop") as upstream:
            master = await asyncio.to_thread(lambda: servers.master)
            upstream.writes.clear()
            await upstream.mirror.flushed()
            assert await asyncio.to_thread(master.do, "WAIT", 1, 5000) == 1
            master.kill()
            upstream.writes.set()
            await until(lambda: upstream.mirror.status.state is StoreState.INTERRUPTED, 10)
            await until(lambda: upstream.mirror.status.state is StoreState.VALID, PATIENCE)
            assert await asyncio.to_thread(lambda: servers.master) is not master
            master.start()
    texts = logged(caplog)
    assert 1 <= len([text for text in texts if "is unavailable" in text]) <= 4
    assert len([text for text in texts if "available again" in text]) == 1
    label = f"redis-sentinel://{','.join(f'127.0.0.1:{port}' for port in servers.ports)}/{MASTER}"
    assert all(f"Redis data store {label} " in text for text in texts)


async def test_a_master_that_becomes_a_replica_is_left(tmp_path):
    """Also if it still runs: a planned failover."""
    with SentinelServers(tmp_path) as servers:
        async with changing(servers.options(), "shop") as upstream:
            former = await asyncio.to_thread(lambda: servers.master)
            await asyncio.to_thread(servers.fail_over)
            await asyncio.to_thread(servers.await_master_other_than, former)
            await until(lambda: upstream.mirror.status.state is StoreState.VALID, PATIENCE)


async def test_sentinels_that_do_not_answer_are_passed_over(sentinels):
    """One that knows the master is enough."""
    port = sentinels.ports[0]
    store = RedisStore(connect(sentinels.options(sentinels=("127.0.0.1:1", f"127.0.0.1:{port}"))))
    await store.init(ONE)
    await store.aclose()
    assert sentinels.do("EXISTS", "launchdarkly:$inited") == 1


async def test_a_number_selects_a_database(sentinels):
    """As in the URL of a single server."""
    store = RedisStore(connect(sentinels.options(database=3)))
    await store.init(ONE)
    await store.aclose()
    with sentinels.master.client(db=3) as client:
        assert client.exists("launchdarkly:$inited") == 1
    assert sentinels.do("EXISTS", "launchdarkly:$inited") == 0


async def test_a_user_without_the_right_to_ask_for_the_role_can_write(sentinels):
    """A server that is no master refuses the write itself."""
    rights = ["~*", "+@all", "-role"]
    sentinels.do("ACL", "SETUSER", "few", "reset", "on", ">geheim", *rights)
    user = {"username": "few", "password": secret("geheim")}
    store = RedisStore(connect(sentinels.options(**user)))
    await store.init(ONE)
    await store.aclose()


async def test_the_reason_names_what_is_wrong(sentinels):
    """The name of the master, or the Sentinels."""
    assert await reason_of(sentinels.options(sentinel_master="other")) == (
        'no Sentinel knows a master "other" (check REDIS_SENTINEL_MASTER)'
    )
    nobody = sentinels.options(sentinels=("127.0.0.1:1", "127.0.0.1:2"))
    assert await reason_of(nobody) == "no Sentinel answers: Connection refused"
    server = sentinels.servers[0]
    plain = sentinels.options(sentinels=(f"127.0.0.1:{server.port}",))
    assert "no Sentinel answers: the server answers: ERR unknown command" in await reason_of(plain)


async def test_servers_and_sentinels_have_passwords(tmp_path):
    """Of their own; without them the reason says which is missing."""
    with SentinelServers(tmp_path, sentinels=1, password="geheim") as servers:
        both = {"password": secret("geheim"), "sentinel_password": secret("geheim")}
        store = RedisStore(connect(servers.options(**both)))
        await store.init(ONE)
        await store.aclose()
        reason = await reason_of(servers.options(password=secret("geheim")))
        assert reason.startswith("no Sentinel answers: the server refuses user or password: NOAUTH")
        assert "REDIS_SENTINEL_PASSWORD" in reason
        reason = await reason_of(servers.options(sentinel_password=secret("geheim")))
        assert reason.startswith("the server refuses user or password: NOAUTH")


async def test_sentinels_with_tls(sentinels, tmp_path):
    """With the authority, or client certificate, of the configuration; the server may have none."""
    authority = Authority(tmp_path)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner = await asyncio.open_connection("127.0.0.1", sentinels.ports[0])
        await asyncio.gather(pump(reader, inner), pump(inner_reader, writer))

    tls = authority.server("localhost")
    async with await asyncio.start_server(forward, "localhost", 0, ssl=tls) as front:
        address = f"localhost:{front.sockets[0].getsockname()[1]}"
        named = {"sentinels": (address,), "ca_file": str(authority.file)}
        store = RedisStore(connect(sentinels.options(**named, sentinel_tls=True)))
        await store.init(ONE)
        await store.aclose()
        plain = await reason_of(sentinels.options(**named))
    assert plain.startswith("no Sentinel answers: ")


async def test_a_replica_that_a_sentinel_names_is_not_written_to(tmp_path):
    """A Sentinel that was away may name a former master; the relay asks again."""
    with RedisServer(tmp_path) as replica:
        replica.do("REPLICAOF", "127.0.0.1", "1")
        port = str(replica.port).encode()
        answer = b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%b\r\n" % (len(port), port)
        with peer(answer, listens=True) as sentinel:
            options = replica.options(
                url="", sentinels=(f"127.0.0.1:{sentinel}",), sentinel_master="m"
            )
            reason = await reason_of(options)
    assert "READONLY the Sentinels still name a server that is a replica" in reason
