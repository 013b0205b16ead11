"""A Redis Cluster as data store: the layout, the order of writes, and the cluster's own troubles."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.crc import key_slot

from relay.errors import StoreUnavailable
from relay.model.item import Item, Kind
from relay.model.payload import Payload
from relay.steps import finish
from relay.stores import StoreState
from relay.stores.fingerprint import Fingerprint
from relay.stores.redis.client import MAX_REDIRECTS
from relay.stores.redis.cluster import SlotMap
from relay.stores.redis.connect import connect
from relay.stores.redis.divided import data_store
from tests.stores.contract import flag, segment
from tests.stores.redis.changing import PATIENCE, START, changing, logged
from tests.support.process import free_port
from tests.support.redis import RedisServer
from tests.support.rediscluster import Cluster
from tests.support.serving import until

PREFIXES = {"divided": "shop", "one slot": "{shop}"}


@pytest.fixture(params=PREFIXES.values(), ids=PREFIXES.keys())
def prefix(request):
    return request.param


@asynccontextmanager
async def stored_in(cluster: Cluster, prefix: str, **options) -> AsyncIterator:
    store = data_store(connect(cluster.options(**options)), prefix)
    try:
        yield store
    finally:
        await store.aclose()


async def in_thread(work, *args):
    return await asyncio.to_thread(work, *args)


async def test_the_layout_is_that_of_a_single_server(cluster, prefix):
    """SDKs read the same keys; what relays note lies in the slots of what it is about."""
    async with stored_in(cluster, prefix) as store:
        await store.init(Payload.of([flag("lamp", 3), flag("gone", 4, None), segment("crowd", 5)]))
        sdk_keys = {f"{prefix}:features", f"{prefix}:segments", f"{prefix}:$inited"}
        assert cluster.keys() == sdk_keys
        assert cluster.do("GET", f"{prefix}:$inited") == b""
        assert cluster.hash(f"{prefix}:segments") == {"crowd": b'{"key":"crowd","version":5}'}
        assert json.loads(cluster.hash(f"{prefix}:features")["gone"])["deleted"]
        await store.mark(finish(Fingerprint.of(START)))
        notes = cluster.keys() - sdk_keys
        slots = {key_slot(each.encode()) for each in notes}
        assert slots <= {key_slot(each.encode()) for each in sdk_keys}
        assert len(notes) == (1 if prefix == "{shop}" else 2)


def referring(key: str, version: int, to: str) -> Item:
    json = b'{"key":"%b","version":%d,"needs":"%b"}' % (key.encode(), version, to.encode())
    return Item(Kind.FLAG, key, version, json)


async def test_readers_in_between_miss_nothing(cluster, prefix):
    """Items that both states have are always there, and so is the segment that a flag needs."""
    common = [flag(f"f{n}", 1) for n in range(30)]
    states = [
        Payload.of([*common, segment(name, 1), segment("both", 1), referring("r", 1, name)])
        for name in ("one", "two")
    ]
    shared = {item.key for item in states[0]} & {item.key for item in states[1]}
    client = connect(cluster.options())
    async with stored_in(cluster, prefix) as store, stored_in(cluster, prefix) as reader:
        client.join(client)
        await store.init(states[0])
        reads = 0
        for number in range(60):
            writing = asyncio.create_task(store.init(states[number % 2]))
            while not writing.done():
                before = await client.execute("HKEYS", f"{prefix}:segments")
                needs = json.loads(await client.execute("HGET", f"{prefix}:features", "r"))["needs"]
                after = await client.execute("HKEYS", f"{prefix}:segments")
                assert needs.encode() in {*before, *after}
                assert shared <= {item.key for item in (await reader.load()).payload}
                reads += 1
            await writing
        await client.leave(client)
        assert reads >= 60
        assert set((await store.load()).payload) == set(states[1])


async def test_writers_never_take_a_version_back(cluster, prefix):
    """Several relays write to one cluster; the newest version is there in the end."""
    stores = [data_store(connect(cluster.options()), prefix) for _ in range(3)]
    await stores[0].init(Payload.of([]))
    items = [(make(f"k{n % 3}", n), n % 3) for n in range(1, 91) for make in (flag, segment)]
    random.Random(1).shuffle(items)

    async def write(number: int) -> None:
        for item, owner in items:
            if owner == number:
                await stores[number].upsert([item])

    await asyncio.gather(*map(write, range(3)))
    versions = await stores[0].versions()
    newest = {(kind, f"k{n % 3}"): n for n in range(88, 91) for kind in Kind}
    assert {key: version.number for key, version in versions.items()} == newest
    for store in stores:
        await store.aclose()


async def test_nothing_fails_while_slots_move(cluster, prefix, caplog):
    """Neither writes nor reads: they follow the keys, also between two servers."""
    async with changing(cluster.options(), prefix) as upstream:
        for number in range(12):
            for key in (f"{prefix}:features", f"{prefix}:segments", f"{prefix}:$inited"):
                source = await in_thread(cluster.master_of, key)
                target = cluster.servers[(cluster.servers.index(source) + 1 + number % 2) % 3]
                slot = await in_thread(cluster.begin_move, key, target)
                await in_thread(cluster.end_move, slot, source, target)
        assert upstream.mirror.status.state is StoreState.VALID
    assert logged(caplog) == []


async def test_a_slot_half_moved_is_waited_for(cluster):
    """While the keys of a transaction are on two servers it waits, and fails if that lasts."""
    prefix = "{half}"
    async with stored_in(cluster, prefix) as store:
        await store.init(START)
        source = cluster.master_of(f"{prefix}:features")
        target = next(server for server in cluster.servers if server is not source)
        slot = cluster.begin_move(f"{prefix}:features", target)
        cluster.move_key(f"{prefix}:features", source, target)
        writing = asyncio.create_task(store.upsert([flag("lamp", 2)]))
        await asyncio.wait([writing], timeout=0.3)
        assert not writing.done()
        await in_thread(cluster.end_move, slot, source, target)
        assert await writing
        assert (await store.load()).payload.get(Kind.FLAG, "lamp") == flag("lamp", 2)


async def test_keys_that_are_sent_in_circles_are_given_up(cluster, monkeypatch):
    """Servers that never agree are an outage, not an endless loop."""
    monkeypatch.setattr("relay.stores.redis.cluster.MOVING_DELAY", 0.001)
    prefix = "{circle}"
    async with stored_in(cluster, prefix) as store:
        await store.init(START)
        source = cluster.master_of(f"{prefix}:features")
        target = next(server for server in cluster.servers if server is not source)
        slot = cluster.begin_move(f"{prefix}:features", target)
        cluster.move_key(f"{prefix}:features", source, target)
        before = source.rejected("watch")
        with pytest.raises(StoreUnavailable, match="keep sending a key on"):
            await store.upsert([flag("lamp", 2)])
        assert source.rejected("watch") - before == MAX_REDIRECTS
        cluster.end_move(slot, source, target)
        assert await store.upsert([flag("lamp", 2)])


async def test_a_failover_under_writes_loses_nothing(tmp_path, prefix, caplog):
    """A replica takes over; the mirror goes on there, with one line each for begin and end."""
    with Cluster(tmp_path, replicas=1) as cluster:
        async with changing(cluster.options(), prefix) as upstream:
            key = f"{prefix}:features"
            master = await in_thread(cluster.master_of, key)
            upstream.writes.clear()
            await upstream.mirror.flushed()
            assert await in_thread(master.do, "WAIT", 1, 5000) == 1
            master.kill()
            upstream.writes.set()
            await until(lambda: upstream.mirror.status.state is StoreState.INTERRUPTED, 10)
            await until(lambda: upstream.mirror.status.state is StoreState.VALID, PATIENCE)
            assert await in_thread(cluster.master_of, key) is not master
            master.start()
            await in_thread(cluster.await_health)
    reasons = [text for text in logged(caplog) if "unavailable" in text]
    assert 1 <= len(reasons) <= 4  # another line for each new reason
    assert len([text for text in logged(caplog) if "available again" in text]) == 1


async def test_a_master_that_is_away_comes_back_empty(tmp_path, prefix, caplog):
    """Its data are written again, though the marker may stand at another server."""
    with Cluster(tmp_path) as cluster:
        async with changing(cluster.options(), prefix) as upstream:
            master = await in_thread(cluster.master_of, f"{prefix}:features")
            master.kill()
            await until(lambda: upstream.mirror.status.state is StoreState.INTERRUPTED, 10)
            master.start()
            await until(lambda: upstream.mirror.status.state is StoreState.VALID, PATIENCE)
    texts = logged(caplog)
    assert 1 <= len([text for text in texts if "unavailable" in text]) <= 4
    assert len([text for text in texts if "available again" in text]) == 1


async def test_environments_at_other_masters_go_on(tmp_path):
    """Where the cluster serves what it has, a master that is away disturbs nobody else."""
    with Cluster(tmp_path, cluster_require_full_coverage="no") as cluster:
        client = connect(cluster.options())
        prefixes = {cluster.master_of(f"{{p{n}}}:features"): f"{{p{n}}}" for n in range(9)}
        (away, lost), (_, kept), *_ = prefixes.items()
        gone, there = data_store(client, lost), data_store(client, kept)
        await gone.init(START)
        await there.init(START)
        away.kill()
        for version in range(2, 22):
            with pytest.raises(StoreUnavailable):
                await gone.upsert([flag("lamp", version)])
            assert await there.upsert([flag("lamp", version)])
        assert (await there.load()).payload.get(Kind.FLAG, "lamp") == flag("lamp", 21)
        await gone.aclose()
        await there.aclose()


async def test_data_that_one_master_loses_are_found_by_a_probe(cluster, prefix):
    """Also if a change has come since, so that the hash is there again."""
    async with stored_in(cluster, prefix) as store:
        payload = Payload.of([*(flag(f"f{n}", 1) for n in range(5)), segment("crowd", 1)])
        fingerprint = finish(Fingerprint.of(payload))
        await store.init(payload)
        await store.mark(fingerprint)
        assert await store.holds(fingerprint)
        cluster.do("DEL", f"{prefix}:features")
        assert not await store.holds(fingerprint)
        await store.upsert([flag("f0", 1)])
        if prefix == "shop":
            assert not await store.holds(fingerprint)


async def test_a_failover_that_loses_writes_is_found_by_a_probe(cluster):
    """The note lies with the hash: an older hash comes with an older note."""
    async with stored_in(cluster, "shop") as store:
        await store.init(START)
        before = finish(Fingerprint.of(START))
        await store.mark(before)
        old = {key: cluster.do("DUMP", key) for key in ("shop:features", "{shop:features}:$relay")}
        after = Payload.of([flag("lamp", 2), segment("crowd", 1)])
        await store.upsert([flag("lamp", 2)])
        await store.mark(finish(Fingerprint.of(after)))
        for key, dump in old.items():
            cluster.do("RESTORE", key, 0, dump, "REPLACE")
        assert not await store.holds(finish(Fingerprint.of(after)))


async def test_any_server_of_the_list_will_do(cluster):
    """Those that do not answer are passed over."""
    for url in (f"redis://127.0.0.1:1,{cluster.servers[2].url}", cluster.servers[1].url):
        async with stored_in(cluster, "shop", url=url) as store:
            await store.init(START)
    with pytest.raises(StoreUnavailable, match="Connection refused"):
        async with stored_in(cluster, "shop", url="redis://127.0.0.1:1,127.0.0.1:2") as store:
            await store.load()


async def test_a_server_that_has_left_the_cluster_is_not_believed(cluster, tmp_path):
    """It knows no slots; others do."""
    with RedisServer(tmp_path, cluster_enabled="yes", cluster_port=str(free_port())) as lonely:
        url = f"{lonely.url},{cluster.servers[2].url}"
        async with stored_in(cluster, "shop", url=url) as store:
            await store.init(START)
        with pytest.raises(StoreUnavailable, match="no server of the cluster has slot"):
            async with stored_in(cluster, "shop", url=lonely.url) as store:
                await store.load()


def clients_of(server: RedisServer) -> int:
    """Return the number of clients, but for the test itself and servers that have moved keys."""
    clients = server.do("CLIENT LIST")
    return len([each for each in clients if not each["cmd"].startswith(("client", "restore"))])


async def test_stores_share_their_connections(cluster):
    """A hundred environments need two connections to a master at most, and ask for the map once.

    The marker is looked at while a hash is written that may be on the same server.
    """
    client = connect(cluster.options())
    stores = [data_store(client, f"p{n}") for n in range(100)]
    before = cluster.calls().get("cluster|slots", 0)
    for store in stores:
        await store.init(START)
        assert await store.upsert([flag("lamp", 2)])
    assert cluster.calls()["cluster|slots"] == before + 1
    assert all(1 <= clients_of(server) <= 2 for server in cluster.servers)
    for store in stores:
        await store.aclose()
    await until(lambda: [clients_of(server) for server in cluster.servers] == [0, 0, 0])


async def test_an_idle_probe_costs_five_commands(cluster):
    """Two thousand an hour, every ten seconds, with the comparisons."""
    async with stored_in(cluster, "shop") as store:
        fingerprint = finish(Fingerprint.of(START))
        await store.init(START)
        await store.mark(fingerprint)
        commands = ("exists", "hget", "hlen", "hgetall", "cluster|slots")
        before = [cluster.calls().get(each, 0) for each in commands]
        assert await store.holds(fingerprint)
        after = [cluster.calls().get(each, 0) for each in commands]
        assert [one - other for one, other in zip(after, before, strict=True)] == [1, 2, 2, 0, 0]


@pytest.mark.parametrize("host", [b"", None, b"?"])
def test_a_server_without_a_name_is_the_one_that_was_asked(host):
    """Clusters behind a load balancer do not tell their addresses."""
    slots = finish(SlotMap.parse([[0, 16383, [host, 7000, b"id"]]], ("balancer", 6379)))
    assert slots.master_of(12) == ("balancer", 7000)


def test_a_map_knows_the_master_of_each_slot():
    """Slots without a master have none; the order of the ranges does not matter."""
    reply = [
        [10, 19, [b"b", 2, b"x"], [b"replica", 9, b"y"]],
        [0, 4, [b"a", 1, b"x"]],
        [30, 30, [b"c", 3, b"x"]],
    ]
    slots = finish(SlotMap.parse(reply, ("a", 1)))
    owners = {0: "a", 4: "a", 5: None, 9: None, 10: "b", 19: "b", 20: None, 30: "c", 31: None}
    assert {slot: (slots.master_of(slot) or (None,))[0] for slot in owners} == owners
    assert slots.masters == {("a", 1), ("b", 2), ("c", 3)}
    assert slots.size == 16


async def test_the_marker_is_looked_at_while_items_are(tmp_path):
    """A change waits for two round trips, as on a single server; without a marker it is not made."""
    with Cluster(tmp_path) as cluster:
        store = data_store(connect(cluster.options(read_timeout=10.0)), "shop")
        assert not await store.upsert([flag("lamp", 1)])
        assert cluster.hash("shop:features") == {}
        await store.init(Payload.of([flag("lamp", 1)]))
        master, other = cluster.master_of("shop:features"), cluster.master_of("shop:$inited")
        assert master is not other
        before = master.calls()["watch"]
        other.pause()
        writing = asyncio.create_task(store.upsert([flag("lamp", 2)]))
        await until(lambda: master.calls()["watch"] == before + 1)
        other.go_on()
        assert await writing
        assert json.loads(cluster.hash("shop:features")["lamp"])["version"] == 2
        await store.aclose()
