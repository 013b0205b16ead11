"""Histories of a fleet whose database fails over: recorded, and checked as a whole at the end.

That of one server without a successor is in `test_fleet`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from redis.exceptions import RedisError

from relay.fleet.feed import Keys
from relay.protocol.feed import entry_of
from tests.support.data import all_data, flag
from tests.support.fleet import PATIENCE, WITHIN, Fleet, fleet_of
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.rediscluster import Cluster, SentinelServers
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

FAULTS = int(os.environ.get("FLEET_FAULTS", "2"))
"""Faults in a row; at night more: FLEET_FAULTS=100."""

PREFIX = "main"


class Place(Protocol):
    """A database that fails over."""

    variables: dict[str, str]
    keys: Keys

    def server_of(self, key: str) -> RedisServer:
        """Return the master that has a key."""

    def await_health(self) -> None:
        """Wait until each master has a replica that is in sync."""

    def await_successor(self, former: RedisServer, key: str) -> None:
        """Wait until another server is the master of a key."""


class BehindSentinels:
    """A master and a replica."""

    def __init__(self, servers: SentinelServers) -> None:
        self._servers = servers
        options = servers.options()
        self.keys = Keys(PREFIX, "")
        self.variables = {
            "REDIS_URL": "",
            "REDIS_SENTINELS": ",".join(options.sentinels),
            "REDIS_SENTINEL_MASTER": options.sentinel_master,
        }

    def server_of(self, key: str) -> RedisServer:
        return self._servers.master

    def await_health(self) -> None:
        self._servers.await_replica()

    def await_successor(self, former: RedisServer, key: str) -> None:
        self._servers.await_master_other_than(former)


class InCluster:
    """A cluster that divides the keys of the environment."""

    def __init__(self, servers: Cluster) -> None:
        self._servers = servers
        self.keys = Keys(PREFIX, "", in_cluster=True)
        self.variables = {"REDIS_URL": servers.url, "REDIS_CLUSTER": "true"}

    def server_of(self, key: str) -> RedisServer:
        return self._servers.master_of(key)

    def await_health(self) -> None:
        self._servers.await_health()

    def await_successor(self, former: RedisServer, key: str) -> None:
        del former
        self._servers.master_of(key)


@contextmanager
def place_of(kind: str, folder: Path) -> Iterator[Place]:
    folder.mkdir()
    with SentinelServers(folder) if kind == "sentinels" else Cluster(folder, replicas=1) as servers:
        yield InCluster(servers) if isinstance(servers, Cluster) else BehindSentinels(servers)


class History:
    """The versions that each client has seen, in their order.

    A client is a relay's process, or an SDK in daemon mode. A failover may lose what was written
    last, so it begins a new one of the latter; a busy machine may have some that nobody asked for.
    """

    def __init__(self, fleet: Fleet, place: Place) -> None:
        self.seen: dict[object, list[int]] = defaultdict(list)
        self._fleet = fleet
        self._place = place

    async def record(self) -> None:
        while True:
            for relay in self._fleet.relays:
                if relay.is_running:
                    self._note((relay.port, relay.pid), await self._fleet.version(relay))
            promotion, version = await asyncio.to_thread(read, self._place)
            self._note(f"SDKs in daemon mode at {promotion}", version)
            await asyncio.sleep(0.01)

    def _note(self, who: object, version: int) -> None:
        if version:
            self.seen[who].append(version)

    def check(self) -> None:
        assert len(self.seen) >= len(self._fleet.relays) + 1
        back = [
            f"{who} went back from {former} to {version}"
            for who, seen in self.seen.items()
            for former, version in itertools.pairwise(seen)
            if version < former
        ]
        assert not back


def stored(place: Place) -> int:
    """The version of the flag that SDKs read; 0 while they can read none."""
    return read(place)[1]


def read(place: Place) -> tuple[str, int]:
    """The ID that a master has from its promotion on, and the version of the flag that it has."""
    key = f"{PREFIX}:features"
    try:
        server = place.server_of(key)
        promotion = str(server.do("INFO", "replication")["master_replid"])
        json_ = server.hash(key).get("lamp")
    except RedisError:
        return "", 0
    return promotion, json.loads(json_)["version"] if json_ else 0


def check_feed(place: Place) -> None:
    """Check that the feed is a chain, each link once, whatever a failover has lost."""
    keys = place.keys
    found = place.server_of(keys.feed).client().xrange(keys.feed)
    links = [entry for entry in (entry_of(pairs) for _, pairs in found) if not entry.resigned]
    assert len(links) > FAULTS
    for former, entry in itertools.pairwise(links):
        assert (entry.number, entry.before) == (former.number + 1, former.after)


async def disturb(fleet: Fleet, place: Place, chance: random.Random) -> None:
    """Kill and stop relays, and the masters of what they write."""
    for number in range(FAULTS):
        leader = await fleet.leader()
        victim = leader if chance.random() < 0.6 else chance.choice(fleet.relays)
        match number % 3:
            case 0:
                await fail_over(place, chance.choice((place.keys.head, f"{PREFIX}:features")))
            case 1:
                await stop_and_continue(victim, chance.uniform(0.2, 5))
            case _:
                await victim.kill()
                await asyncio.sleep(chance.uniform(0, 4))
                await victim.start()
        await asyncio.sleep(chance.uniform(0, 3))


async def stop_and_continue(relay: RelayProcess, seconds: float) -> None:
    relay.signal(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    relay.signal(signal.SIGCONT)


async def fail_over(place: Place, key: str) -> None:
    """Kill the master of a key; its replica follows, and it comes back as a replica."""
    await asyncio.to_thread(place.await_health)
    master = await asyncio.to_thread(place.server_of, key)
    await asyncio.to_thread(master.kill)
    await asyncio.to_thread(place.await_successor, master, key)
    await asyncio.to_thread(master.start)
    await asyncio.to_thread(place.await_health)


async def change_often(fleet: Fleet) -> None:
    while True:
        await fleet.change()
        await asyncio.sleep(0.05)


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(version=1)))
        yield upstream


@pytest.mark.timing
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
async def test_a_history_with_failovers_breaks_nothing(upstream, tmp_path, kind):
    """No break in the feed, nobody back in version, and what SDKs read is never older."""
    chance = random.Random(FAULTS)
    async with AsyncExitStack() as stack:
        place = stack.enter_context(place_of(kind, tmp_path / "servers"))
        more = {**place.variables, "LD_PREFIX_main": PREFIX}
        fleet = await stack.enter_async_context(fleet_of(3, upstream, tmp_path, "", **more))
        await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        history = History(fleet, place)
        recording = asyncio.create_task(history.record())
        changing = asyncio.create_task(change_often(fleet))
        await disturb(fleet, place, chance)
        changing.cancel()
        async with asyncio.timeout(2 * PATIENCE):
            await fleet.settled()
        version = await fleet.change()
        await fleet.everywhere(version, PATIENCE)
        async with asyncio.timeout(PATIENCE):
            while await asyncio.to_thread(stored, place) != version:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not recording.done(), recording.exception()
        recording.cancel()
        history.check()
        check_feed(place)
