"""A fleet over a real cluster: its own keys in one slot, and what SDKs read maybe in others."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.crc import key_slot
from redis.exceptions import RedisError

from relay.build.fleet import make_member
from relay.config.load import load
from relay.fleet.feed import Keys
from relay.protocol.feed import Entry, Term, entry_of, fields_of
from relay.stores.redis.connections import MAX_CONNECTIONS
from tests.support.data import all_data, flag, segment
from tests.support.fleet import PATIENCE, WITHIN, Fleet, eventually, fleet_of
from tests.support.rediscluster import Cluster
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

ROOT = Path(__file__).parent.parent.parent
TEAM = segment("team", version=1)

TAGGED, DIVIDED = "{main}", "main"


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with one flag and one segment."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(version=1), TEAM))
        yield upstream


def variables(cluster: Cluster, prefix: str) -> dict[str, str]:
    return {"REDIS_URL": cluster.url, "REDIS_CLUSTER": "true", "LD_PREFIX_main": prefix}


@asynccontextmanager
async def fleet_at(
    cluster: Cluster, prefix: str, upstream: ScriptedUpstream, tmp_path: Path, count: int = 3
) -> AsyncIterator[Fleet]:
    async with fleet_of(count, upstream, tmp_path, "", **variables(cluster, prefix)) as fleet:
        fleet.others = (TEAM,)
        yield fleet


def stored(cluster: Cluster, prefix: str) -> int:
    """The version of the flag that SDKs read; 0 while they can read none."""
    try:
        json_ = cluster.hash(f"{prefix}:features").get("lamp")
    except RedisError:
        return 0
    return json.loads(json_)["version"] if json_ else 0


async def is_stored(cluster: Cluster, prefix: str, version: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while await asyncio.to_thread(stored, cluster, prefix) != version:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def keys_of(prefix: str) -> Keys:
    return Keys(prefix, "", in_cluster=True)


def check_feed(cluster: Cluster, prefix: str) -> None:
    """Check that the feed is a chain, each link once."""
    feed = keys_of(prefix).feed
    entries = [entry_of(pairs) for _, pairs in cluster.master_of(feed).client().xrange(feed)]
    links = [entry for entry in entries if not entry.resigned]
    assert links
    for former, entry in itertools.pairwise(links):
        assert (entry.number, entry.before) == (former.number + 1, former.after)


class Observer:
    """Reads what SDKs read, again and again; it may never go back."""

    def __init__(self, cluster: Cluster, prefix: str) -> None:
        self.seen = 0
        self._cluster, self._prefix = cluster, prefix

    async def run(self) -> None:
        while True:
            found = await asyncio.to_thread(stored, self._cluster, self._prefix)
            assert found >= self.seen or not found, f"SDKs see {found} after {self.seen}"
            self.seen = max(found, self.seen)
            await asyncio.sleep(0.01)


@asynccontextmanager
async def observed(cluster: Cluster, prefix: str) -> AsyncIterator[Observer]:
    observer = Observer(cluster, prefix)
    task = asyncio.create_task(observer.run())
    try:
        yield observer
        assert not task.done(), task.exception()
        assert observer.seen
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.timing
@pytest.mark.parametrize("prefix", [TAGGED, DIVIDED])
async def test_a_fleet_over_a_cluster(upstream, tmp_path, cluster, prefix):
    """One listens to upstream, all serve the same, SDKs read it; whoever is killed is replaced."""
    async with fleet_at(cluster, prefix, upstream, tmp_path) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        await is_stored(cluster, prefix, 1)
        async with observed(cluster, prefix):
            for _ in range(10):
                await fleet.everywhere(await fleet.change(), WITHIN)
            await leader.kill()
            fleet.relays.remove(leader)
            version = await fleet.change()
            await fleet.everywhere(version, WITHIN)
            await is_stored(cluster, prefix, version)
            await fleet.settled()
        assert json.loads(cluster.hash(f"{prefix}:segments")["team"])["version"] == 1
        assert cluster.do("GET", f"{prefix}:$inited") == b""
        check_feed(cluster, prefix)
        keys = keys_of(prefix)
        slot = key_slot(keys.head.encode())
        own = (keys.lease, keys.term, keys.head, keys.feed, *keys.data.keys)
        assert {key_slot(key.encode()) for key in own} == {slot}
        is_divided = key_slot(f"{prefix}:features".encode()) != slot
        assert is_divided is (prefix == DIVIDED)


@pytest.mark.timing
@pytest.mark.parametrize("prefix", [TAGGED, DIVIDED])
async def test_a_stopped_leader_does_not_overwrite_what_sdks_read(
    upstream, tmp_path, cluster, prefix
):
    """It goes on, follows, and what SDKs read is never older."""
    async with fleet_at(cluster, prefix, upstream, tmp_path) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        await is_stored(cluster, prefix, 1)
        async with observed(cluster, prefix):
            changing = asyncio.create_task(change_often(fleet))
            for _ in range(2):
                leader = await fleet.leader()
                leader.signal(signal.SIGSTOP)
                await asyncio.sleep(4.5)
                leader.signal(signal.SIGCONT)
                await asyncio.sleep(0.5)
            changing.cancel()
            await fleet.settled()
            version = await fleet.change()
            await fleet.everywhere(version, WITHIN)
            await is_stored(cluster, prefix, version)
        check_feed(cluster, prefix)


async def change_often(fleet: Fleet) -> None:
    while True:
        await fleet.change()
        await asyncio.sleep(0.05)


@pytest.mark.timing
@pytest.mark.parametrize("prefix", [TAGGED, DIVIDED])
async def test_a_master_fails_during_an_election(upstream, tmp_path, prefix):
    """The leader and the master of the fleet's slot are killed: the replica has the next term."""
    (tmp_path / "servers").mkdir()
    with Cluster(tmp_path / "servers", replicas=1) as servers:
        async with fleet_at(servers, prefix, upstream, tmp_path) as fleet:
            leader = await fleet.settled()
            await fleet.everywhere(await fleet.change(), WITHIN)
            await is_stored(servers, prefix, 2)
            master = await asyncio.to_thread(servers.master_of, keys_of(prefix).head)
            await leader.kill()
            fleet.relays.remove(leader)
            await asyncio.to_thread(master.kill)
            await fleet.everywhere(await fleet.change(), WITHIN + 1)
            await asyncio.to_thread(servers.await_health)
            await fleet.settled()
            version = await fleet.change()
            await fleet.everywhere(version, WITHIN)
            await is_stored(servers, prefix, version)


@pytest.mark.timing
@pytest.mark.parametrize("prefix", [TAGGED, DIVIDED])
async def test_the_slot_of_the_fleet_moves(upstream, tmp_path, prefix):
    """Key by key it goes to another master while flags change: nobody goes back, one leads."""
    (tmp_path / "servers").mkdir()
    with Cluster(tmp_path / "servers") as servers:
        async with fleet_at(servers, prefix, upstream, tmp_path) as fleet:
            await fleet.settled()
            await fleet.everywhere(1, WITHIN)
            await is_stored(servers, prefix, 1)
            keys = keys_of(prefix)
            async with observed(servers, prefix):
                changing = asyncio.create_task(change_often(fleet))
                await asyncio.sleep(0.5)
                await asyncio.to_thread(move_slowly, servers, keys)
                await asyncio.sleep(1.0)
                changing.cancel()
                await fleet.settled()
                version = await fleet.change()
                await fleet.everywhere(version, WITHIN)
                await is_stored(servers, prefix, version)
            check_feed(servers, prefix)


def move_slowly(servers: Cluster, keys: Keys) -> None:
    """Move the slot of the fleet's keys, the head first."""
    source = servers.master_of(keys.head)
    target = next(each for each in servers.masters if each is not source)
    slot = servers.begin_move(keys.head, target)
    servers.move_key(keys.head, source, target)
    servers.move_key(keys.feed, source, target)
    servers.end_move(slot, source, target)


@pytest.mark.timing
async def test_a_server_of_what_sdks_read_may_lose_it(upstream, tmp_path):
    """The fleet goes on without it, and writes everything again as soon as it is back."""
    (tmp_path / "servers").mkdir()
    with Cluster(tmp_path / "servers", cluster_require_full_coverage="no") as servers:
        prefix = next(each for each in ("main", "other", "third") if is_apart(servers, each))
        async with fleet_at(servers, prefix, upstream, tmp_path, 2) as fleet:
            leader = await fleet.settled()
            await fleet.everywhere(1, WITHIN)
            await is_stored(servers, prefix, 1)
            server = await asyncio.to_thread(servers.master_of, f"{prefix}:features")
            server.kill()
            version = 1
            for _ in range(3):
                version = await fleet.change()
                await fleet.everywhere(version, WITHIN)
            await leader.said("The hashes that SDKs read cannot be written")
            server.start()
            await eventually(lambda: stored(servers, prefix) == version)
            await leader.said("The hashes that SDKs read can be written again")
            server.do("FLUSHALL")
            await eventually(lambda: stored(servers, prefix) == version)
            assert await fleet.settled() is leader


@pytest.mark.timing
async def test_the_documented_rights_suffice(upstream, tmp_path):
    """A user with those of daemon mode in a cluster and those of a fleet leads and writes."""
    pages = [
        (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
        for name in ("daemon-mode", "scaling")
    ]
    lists = re.findall("`([+](?:asking|del)[^`]*)`", "".join(pages))
    [keys] = re.findall("keys `(~launchdarkly:[*] ~{launchdarkly:[*])`", pages[0])
    rights = (*keys.split(), "-@all", *(right for each in lists for right in each.split()))
    (tmp_path / "servers").mkdir()
    with Cluster(tmp_path / "servers") as servers:
        for server in servers.servers:
            server.do("ACL", "SETUSER", "some", "reset", "on", ">geheim", "resetchannels", *rights)
        user = {"REDIS_USERNAME": "some", "REDIS_PASSWORD": "geheim"}
        more = variables(servers, "launchdarkly") | user
        async with fleet_of(2, upstream, tmp_path, "", **more) as fleet:
            fleet.others = (TEAM,)
            leader = await fleet.settled()
            await fleet.everywhere(await fleet.change(), WITHIN)
            await leader.stop()
            fleet.relays.remove(leader)
            version = await fleet.change()
            await fleet.everywhere(version, WITHIN)
            await is_stored(servers, "launchdarkly", version)
            assert [server.denied() for server in servers.servers] == [[], [], []]


def is_apart(servers: Cluster, prefix: str) -> bool:
    """Return whether flags are at another server than the fleet's keys."""
    return servers.master_of(f"{prefix}:features") is not servers.master_of(keys_of(prefix).head)


class Reads:
    """Takes what happens to one environment."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.has_looked = asyncio.Event()
        self.has_read = asyncio.Event()

    def looked(self, _: object) -> None:
        self.has_looked.set()

    def read(self, _: str, entry: Entry) -> None:
        assert entry.prefix == self.keys.prefix
        self.has_read.set()

    def fell_silent(self) -> None:
        """Nothing to do."""

    def denied(self, reason: str) -> None:
        raise AssertionError(reason)


@pytest.mark.timing
async def test_a_relay_follows_hundreds_of_environments(cluster):
    """Each has a connection of its own for its feed; none waits for another's."""
    given = {"USE_REDIS": "true", "FLEET": "true", "LD_ENV_main": SDK_KEY}
    member = make_member(load("", True, False, given | variables(cluster, "main")))
    assert member is not None
    observers = [Reads(member.feed.keys(f"many-{number}", "")) for number in range(300)]
    running = asyncio.create_task(member.run())
    try:
        for observer in observers:
            member.join(observer)
        async with asyncio.timeout(60):
            for observer in observers:
                await observer.has_looked.wait()
        places = Counter(cluster.master_of(observer.keys.feed).port for observer in observers)
        assert min(places.values()) > MAX_CONNECTIONS
        for observer in observers:
            entry = Entry(observer.keys.prefix, Term(1, "me"), 1, "", "")
            cluster.do("XADD", observer.keys.feed, "*", *fields_of(entry))
        async with asyncio.timeout(60):
            for observer in observers:
                await observer.has_read.wait()
        for observer in observers:
            member.leave(observer)
    finally:
        running.cancel()
        await asyncio.wait([running])
