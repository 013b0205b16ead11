"""Relays that share a Redis: real processes, which are killed and stopped, and a real server."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.protocol.feed import FEED, entry_of
from tests.support.data import all_data, flag
from tests.support.fleet import PATIENCE, WITHIN, Fleet, eventually, fleet_of, stored, variables
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.rediscluster import SentinelServers
from tests.support.sdk import PythonSDK, Setup, sees
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

ROOT = Path(__file__).parent.parent.parent

OTHER_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a002"

FAULTS = int(os.environ.get("FLEET_FAULTS", "4"))
"""Faults in a row; at night more: FLEET_FAULTS=100."""


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with one flag."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(version=1)))
        yield upstream


async def test_three_relays_listen_to_upstream_once(upstream, tmp_path, redis):
    """One is elected; its changes are everywhere, in Redis too, and `/status` names it."""
    async with fleet_of(3, upstream, tmp_path, redis.url) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        for _ in range(20):
            await fleet.everywhere(await fleet.change(), WITHIN)
        await eventually(lambda: stored(redis) == 21)
        roles = [await fleet.role(relay) for relay in fleet.relays]
        assert len({role["leader"] for role in roles}) == 1
        assert [role.get("term") for role in roles if role["role"] == "leader"] == [1]
        assert leader.log.count("This relay leads the fleet") == 1
        assert await fleet.settled() is leader
        metrics = await fleet._session.get(f"{leader.url}/metrics")
        text = await metrics.text()
        assert 'relay_fleet_role{environment="main",role="leader"} 1' in text
        assert 'relay_fleet_publications_total{environment="main",outcome="published"}' in text


@pytest.mark.timing
async def test_a_killed_leader_is_replaced(upstream, tmp_path, redis):
    """Kill -9 of whoever leads, twice: the next change is everywhere within five seconds."""
    async with fleet_of(3, upstream, tmp_path, redis.url) as fleet:
        for _ in range(2):
            leader = await fleet.settled()
            await fleet.everywhere(await fleet.change(), WITHIN)
            await leader.kill()
            fleet.relays.remove(leader)
            await fleet.everywhere(await fleet.change(), WITHIN)
            await fleet.settled()


@pytest.mark.timing
async def test_a_stopped_leader_is_replaced_and_then_follows(upstream, tmp_path, redis):
    """It does not write over what is newer when it goes on, and serves what the others do."""
    async with fleet_of(3, upstream, tmp_path, redis.url) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        leader.signal(signal.SIGSTOP)
        others = [relay for relay in fleet.relays if relay is not leader]
        await fleet.everywhere(await fleet.change(), WITHIN, others)
        version = await fleet.change()
        await fleet.everywhere(version, WITHIN, others)
        leader.signal(signal.SIGCONT)
        await fleet.everywhere(version, WITHIN)
        await fleet.everywhere(await fleet.change(), WITHIN)
        assert await fleet.settled() is not leader
        assert stored(redis) == version + 1


@pytest.mark.timing
async def test_a_leader_that_ends_hands_over(upstream, tmp_path, redis):
    """An orderly end gives the lease up, so nobody waits until it expires."""
    async with fleet_of(2, upstream, tmp_path, redis.url) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(await fleet.change(), WITHIN)
        assert await leader.stop() == 0, leader.log
        fleet.relays.remove(leader)
        await fleet.everywhere(await fleet.change(), 2.0)
        await fleet.settled()


@pytest.mark.timing
async def test_redis_may_hang(upstream, tmp_path, redis):
    """Each relay is on its own then; afterwards one of them leads again."""
    async with fleet_of(3, upstream, tmp_path, redis.url) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        redis.pause()
        await fleet.everywhere(await fleet.change(), 1.0, [leader])
        await fleet.everywhere(await fleet.change(), WITHIN)
        redis.go_on()
        await fleet.settled()
        version = await fleet.change()
        await fleet.everywhere(version, WITHIN)
        await eventually(lambda: stored(redis) == version)
        assert all("listens to upstream itself" in relay.log for relay in fleet.relays)


@pytest.mark.timing
async def test_redis_may_come_back_empty(upstream, tmp_path, redis):
    """Everything is written again, and nobody notices."""
    async with fleet_of(2, upstream, tmp_path, redis.url) as fleet:
        await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        redis.kill()
        await fleet.everywhere(await fleet.change(), WITHIN)
        redis.start()
        await eventually(lambda: stored(redis) == 2)
        await fleet.settled()
        redis.do("FLUSHALL")
        version = await fleet.change()
        await fleet.everywhere(version, WITHIN)
        await eventually(lambda: stored(redis) == version)
        await fleet.settled()


async def test_another_environment_under_the_prefix_is_refused(upstream, tmp_path, redis):
    """Staging and production with one prefix by mistake: who comes later writes nothing."""
    upstream.serve(OTHER_KEY, all_data(flag(version=99)))
    other = variables(upstream, redis.url) | {"LD_ENV_main": OTHER_KEY}
    async with fleet_of(1, upstream, tmp_path, redis.url) as fleet:
        await fleet.settled()
        await eventually(lambda: stored(redis) == 1)
        async with RelayProcess(tmp_path, **other) as stranger:
            await stranger.said("Another environment is in the fleet's Redis under prefix")
            await upstream.connected(OTHER_KEY)
            await fleet.everywhere(await fleet.change(), WITHIN)
            await eventually(lambda: stored(redis) == 2)
            assert (await fleet.role(stranger))["role"] == "alone"


async def test_a_user_without_the_rights_is_served_without_a_fleet(upstream, tmp_path, redis):
    """The rights that ld-relay needed suffice for all but the fleet, and the log says so."""
    redis.add_user_of_ld_relay("few", "geheim", "launchdarkly")
    url = f"redis://few:geheim@127.0.0.1:{redis.port}"
    async with fleet_of(2, upstream, tmp_path, url) as fleet:
        for relay in fleet.relays:
            await relay.said("Redis does not let this relay take part in the fleet")
        await upstream.connected(SDK_KEY, 2)
        version = await fleet.change()
        await fleet.everywhere(version, WITHIN)
        await eventually(lambda: stored(redis) == version)
        await upstream.stop()
        for relay in fleet.relays:
            await relay.kill()
            await relay.start()
        await fleet.everywhere(version, WITHIN)


async def test_a_fleet_starts_without_upstream(upstream, tmp_path, redis):
    """Published data are served, and change again as soon as upstream is back."""
    async with fleet_of(2, upstream, tmp_path, redis.url) as fleet:
        await fleet.everywhere(await fleet.change(), WITHIN)
        await eventually(lambda: stored(redis) == 2)
        await upstream.stop()
        for relay in fleet.relays:
            await relay.kill()
        for relay in fleet.relays:
            await relay.start()
        await fleet.everywhere(2, WITHIN + 3)  # a lease of the dead expires first
        await upstream.start()
        version = await fleet.change()
        await fleet.everywhere(version, 3 * WITHIN)
        await fleet.settled()


async def test_an_sdk_gets_changes_across_a_failover(upstream, tmp_path, redis):
    """A stream at a follower goes on without an end when the leader is killed."""
    async with fleet_of(3, upstream, tmp_path, redis.url) as fleet:
        leader = await fleet.settled()
        follower = next(relay for relay in fleet.relays if relay is not leader)
        await fleet.everywhere(1, WITHIN)
        async with PythonSDK(Setup(SDK_KEY, follower.url)) as sdk:
            await sees(sdk, "lamp", True)
            await leader.kill()
            fleet.relays.remove(leader)
            changed = flag(version=2, value=False)
            upstream.serve(SDK_KEY, all_data(changed))
            await upstream.patch(SDK_KEY, changed)
            await sees(sdk, "lamp", False)
        await fleet.settled()


async def test_the_documented_rights_suffice(upstream, tmp_path, redis):
    """A user with them leads, follows, hands over and writes; nothing is denied."""
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    keys, commands = re.findall("`(~launchdarkly[^`]*|[+]del[^`]*)`", page)
    rights = (*keys.split(), "-@all", *commands.split())
    redis.do("ACL", "SETUSER", "some", "reset", "on", ">geheim", "resetchannels", *rights)
    url = f"redis://some:geheim@127.0.0.1:{redis.port}"
    async with fleet_of(2, upstream, tmp_path, url) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(await fleet.change(), WITHIN)
        await leader.stop()
        fleet.relays.remove(leader)
        await fleet.everywhere(await fleet.change(), WITHIN)
        await fleet.settled()
        await eventually(lambda: stored(redis) == 3)
        assert redis.denied() == []


async def test_a_server_that_may_evict_the_fleets_keys_is_named(upstream, tmp_path):
    """Once in the log of each relay, and by `relay check`; no server that is not full evicts any."""
    (tmp_path / "full").mkdir()
    with RedisServer(tmp_path / "full", maxmemory="100mb", maxmemory_policy="allkeys-lru") as full:
        text = "may evict keys that the fleet stands on (maxmemory-policy allkeys-lru)"
        async with fleet_of(1, upstream, tmp_path, full.url) as fleet:
            await fleet.settled()
            assert fleet.relays[0].log.count(text) == 1
        given = variables(upstream, full.url)
        assert text in await checked(tmp_path, given)
        full.do("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
        assert text not in await checked(tmp_path, given)
        full.do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "0")
        assert "may evict" not in await checked(tmp_path, given)
        full.pause()
        assert "may evict" not in await checked(tmp_path, given)


async def checked(folder: Path, given: dict[str, str]) -> str:
    """Return the output of `relay check`, which finds no problem."""
    check = RelayProcess(folder, "check", "--from-env", **given)
    await check.spawn()
    assert await check.ended() == 0, check.log
    return check.log


async def test_large_data_and_large_changes_are_followed(upstream, tmp_path, redis):
    """Data that do not fit into the feed are read from where SDKs in daemon mode read them."""
    many = [flag(f"flag-{number}", note="x" * 2000) for number in range(1000)]
    upstream.serve(SDK_KEY, all_data(flag(version=1), *many))
    async with fleet_of(2, upstream, tmp_path, redis.url) as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        changed = [each | {"version": 2} for each in many]
        upstream.serve(SDK_KEY, all_data(flag(version=2), *changed))
        await upstream.put(SDK_KEY, all_data(flag(version=2), *changed))
        await fleet.everywhere(2, WITHIN)
        for relay in fleet.relays:
            found = (await fleet.get(relay, "/sdk/latest-all"))["flags"]
            assert {each["version"] for each in found.values()} == {2}
            assert len(found) == 1001
        await upstream.patch(SDK_KEY, flag(version=3))
        await fleet.everywhere(3, WITHIN)
        assert await fleet.settled() is leader


class Observer:
    """Reads what each relay, and Redis, serves, again and again; nothing may ever go back.

    Args:
        fleet: whose relays are asked.
        redis: asked as SDKs in daemon mode do.
    """

    def __init__(self, fleet: Fleet, redis: RedisServer) -> None:
        self._fleet = fleet
        self._redis = redis
        self._seen: dict[object, int] = {}

    async def run(self) -> None:
        while True:
            for relay in self._fleet.relays:
                self.note((relay, relay.pid), await self._fleet.version(relay))
            self.note(self._redis, await asyncio.to_thread(self._stored))
            await asyncio.sleep(0.01)

    def note(self, who: object, version: int) -> None:
        before = self._seen.get(who, 0)
        assert version >= before or not version, f"{who} went back from {before} to {version}"
        self._seen[who] = max(before, version)

    def _stored(self) -> int:
        return stored(self._redis)


def check_feed(redis: RedisServer) -> int:
    """Check that the feed is a chain, each link once, in terms that grow; return its length."""
    entries = [entry_of(pairs) for _, pairs in redis.client().xrange(FEED)]
    links = [entry for entry in entries if not entry.resigned]
    for former, entry in itertools.pairwise(links):
        assert entry.number == former.number + 1
        assert entry.before == former.after
        assert entry.term.number >= former.term.number
        assert entry.term.number > former.term.number or entry.term == former.term
    return len(links)


@pytest.mark.timing
@pytest.mark.timeout(3600)
async def test_a_history_of_faults_breaks_nothing(upstream, tmp_path, redis):
    """Leaders and followers are killed and stopped, and Redis hangs, while flags change."""
    chance = random.Random(FAULTS)
    async with fleet_of(3, upstream, tmp_path, redis.url) as fleet:
        await fleet.settled()
        await fleet.everywhere(1, WITHIN)

        async def change() -> None:
            while True:
                await fleet.change()
                await asyncio.sleep(0.05)

        async def disturb() -> None:
            for number in range(FAULTS):
                leader = await fleet.leader()
                victim = leader if chance.random() < 0.6 else chance.choice(fleet.relays)
                match number % 3:
                    case 0:
                        await victim.kill()
                        await asyncio.sleep(chance.uniform(0, 4))
                        await victim.start()
                    case 1:
                        victim.signal(signal.SIGSTOP)
                        await asyncio.sleep(chance.uniform(0.2, 5))
                        victim.signal(signal.SIGCONT)
                    case _:
                        redis.pause()
                        await asyncio.sleep(chance.uniform(0.2, 5))
                        redis.go_on()
                await asyncio.sleep(chance.uniform(0, 3))

        observing = asyncio.create_task(Observer(fleet, redis).run())
        changing = asyncio.create_task(change())
        disturbing = asyncio.create_task(disturb())
        everything = (observing, changing, disturbing)
        await asyncio.wait(everything, return_when="FIRST_COMPLETED")
        assert not observing.done(), observing.exception()
        changing.cancel()
        await disturbing
        await fleet.settled()
        version = await fleet.change()
        await fleet.everywhere(version, PATIENCE)
        await eventually(lambda: stored(redis) == version)
        observing.cancel()
        assert check_feed(redis) > FAULTS


async def test_a_relay_of_a_fleet_may_have_workers(upstream, tmp_path, redis):
    """Its feeder takes part; its workers serve what it leads to, and name the leader."""
    async with fleet_of(2, upstream, tmp_path, redis.url, WORKERS="2") as fleet:
        leader = await fleet.settled()
        await fleet.everywhere(1, WITHIN)
        for _ in range(5):
            await fleet.everywhere(await fleet.change(), WITHIN)
        await leader.kill()
        fleet.relays.remove(leader)
        await fleet.everywhere(await fleet.change(), WITHIN + 1)
        await fleet.settled()


@pytest.mark.timing
async def test_sentinels_may_name_another_master(upstream, tmp_path):
    """The master is killed while relays are elected: the fleet goes on at the new one."""
    (tmp_path / "servers").mkdir()
    with SentinelServers(tmp_path / "servers") as servers:
        options = servers.options()
        given = {
            "REDIS_URL": "",
            "REDIS_SENTINELS": ",".join(options.sentinels),
            "REDIS_SENTINEL_MASTER": options.sentinel_master,
        }
        async with fleet_of(3, upstream, tmp_path, "", **given) as fleet:
            leader = await fleet.settled()
            await fleet.everywhere(await fleet.change(), WITHIN)
            master = await asyncio.to_thread(lambda: servers.master)
            await leader.kill()
            fleet.relays.remove(leader)
            await asyncio.to_thread(master.kill)
            await fleet.everywhere(await fleet.change(), WITHIN + 1)
            await asyncio.to_thread(servers.await_master_other_than, master)
            await fleet.settled()
            version = await fleet.change()
            await fleet.everywhere(version, WITHIN)
            new = await asyncio.to_thread(lambda: servers.master)
            await eventually(lambda: stored(new) == version)
            master.start()
