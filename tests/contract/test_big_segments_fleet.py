"""Several relays on one database: one of them synchronises big segments, and others take over."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import asynccontextmanager

import pytest

from relay import clock
from relay.stores.redis.bigsegments import LEASE
from tests.contract.test_big_segments import DATA, MOBILE_KEY, V1, eventually
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY, Stream, ask
from tests.support.upstream import BIG_SEGMENTS, ScriptedUpstream, segment_patch, status

CURSOR = "launchdarkly:big_segments_cursor"
HOLDER = "launchdarkly:$relay:big_segments"
TAKEOVER = LEASE + 3.0
"""Seconds after which another relay synchronises: the lease, a look, and what a busy machine takes."""


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, DATA)
        upstream.patches[SDK_KEY] = [V1]
        yield upstream


class Fleet:
    """Two relays on a database, and LaunchDarkly's patches, which lead from each version to the next."""

    def __init__(self, first: RelayProcess, second: RelayProcess, upstream, redis) -> None:
        self.relays = [first, second]
        self.upstream = upstream
        self.redis = redis
        self.version = 1

    async def holder(self) -> RelayProcess:
        """The relay that synchronises."""
        async with asyncio.timeout(20):
            while True:
                for relay in self.relays:
                    if await metric(relay, "relay_big_segments_synchronizing") == 1:
                        return relay
                await asyncio.sleep(0.05)

    def other(self, relay: RelayProcess) -> RelayProcess:
        """The other relay."""
        [other] = (each for each in self.relays if each is not relay)
        return other

    def next_patch(self, *, member: str, leaves: bool = False) -> dict:
        """A patch that takes a member in, or lets one go."""
        before, self.version = f"v{self.version}", self.version + 1
        change = {"no_longer": [member]} if leaves else {"include": [member]}
        return segment_patch("team.g2", f"v{self.version}", before, **change)

    @property
    def stored(self) -> bytes:
        return self.redis.do("GET", CURSOR)


async def metric(relay: RelayProcess, name: str) -> float | None:
    text = (await ask(relay.address, "/metrics")).body.decode()
    values = [line.split()[-1] for line in text.splitlines() if line.startswith(name + "{")]
    return float(values[0]) if values else None


@pytest.fixture(params=["lease", "fleet"])
def shape(request) -> dict[str, str]:
    """Variables: relays that only share a database, or those of a fleet, whose leader synchronises."""
    return {"FLEET": "true"} if request.param == "fleet" else {}


@asynccontextmanager
async def fleet(tmp_path, upstream, redis: RedisServer, shape: dict[str, str]):
    given = {
        "LD_ENV_main": SDK_KEY,
        "LD_MOBILE_KEY_main": MOBILE_KEY,
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
        **shape,
    }
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with RelayProcess(folders[0], **given) as one, RelayProcess(folders[1], **given) as two:
        relays = Fleet(one, two, upstream, redis)
        for relay in relays.relays:
            await relay.said("Initialized LaunchDarkly client")
        await relays.holder()
        await one.until(lambda: relays.stored == b"v1")
        await upstream.connected(BIG_SEGMENTS + SDK_KEY)
        yield relays


@pytest.mark.timing
async def test_one_of_two_relays_follows_the_stream(tmp_path, upstream, redis, shape):
    """LaunchDarkly sees one; the clients of both hear of changes, and see them."""
    async with fleet(tmp_path, upstream, redis, shape) as relays:
        for relay in relays.relays:
            await eventually(relay, "ann", "yes")
        await asyncio.sleep(1.1)  # notices come at most once a second
        pings = [await Stream.open(r.address, "/mping", key=MOBILE_KEY) for r in relays.relays]
        for ping in pings:
            await ping.until(b"\n\n")
        await upstream.send_patches(SDK_KEY, relays.next_patch(member="ben"))
        start = clock.monotonic()
        for relay, ping in zip(relays.relays, pings, strict=True):
            assert await ping.until(b"\n\n") == b"event: ping\ndata:  \n\n"
            await eventually(relay, "ben", "yes")
        assert clock.monotonic() - start < 5.0
        assert upstream.asked("/big-segments") == 1
        holder = await relays.holder()
        assert await metric(holder, "relay_big_segments_patches_total") == 2
        assert await metric(relays.other(holder), "relay_big_segments_patches_total") == 0
        assert relays.other(holder).log.count("another relay synchronizes; this one waits") == 1
        pages = [json.loads((await ask(r.address, "/status")).body) for r in relays.relays]
        for page in pages:
            assert page["environments"]["main"]["bigSegmentStatus"]["available"]
        assert bool(redis.do("EXISTS", HOLDER)) is not bool(shape)  # a fleet needs no second lease
        for ping in pings:
            ping.close()


@pytest.mark.timing
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_another_relay_takes_over(tmp_path, upstream, redis, end, shape):
    """After a kill when the lease is over, after an orderly end at once; nothing is lost."""
    async with fleet(tmp_path, upstream, redis, shape) as relays:
        holder = await relays.holder()
        other = relays.other(holder)
        relays.relays.remove(holder)
        holder.signal(end)
        missed = relays.next_patch(member="ben")
        upstream.patches[SDK_KEY].append(missed)
        start = clock.monotonic()
        await other.until(lambda: relays.stored == b"v2")
        taken = clock.monotonic() - start
        assert taken < (TAKEOVER if end == signal.SIGKILL else LEASE / 2)
        await eventually(other, "ben", "yes")
        await upstream.send_patches(SDK_KEY, relays.next_patch(member="cleo"))
        await eventually(other, "cleo", "yes")
        assert await metric(other, "relay_big_segments_patches_total") == 2
        assert "Traceback" not in other.log
        await holder.ended()


async def test_a_relay_that_was_stopped_applies_nothing_twice(tmp_path, upstream, redis, shape):
    """It goes on when the other has taken over, with patches in its buffers that are old by then."""
    async with fleet(tmp_path, upstream, redis, shape) as relays:
        stopped = await relays.holder()
        other = relays.other(stopped)
        stopped.signal(signal.SIGSTOP)
        # Both are in the stopped relay's socket: in, and out again.
        old = [relays.next_patch(member="ben"), relays.next_patch(member="ben", leaves=True)]
        await upstream.send_patches(SDK_KEY, *old)
        await other.until(lambda: relays.stored == b"v3")
        newer = [relays.next_patch(member="ben"), relays.next_patch(member="ann", leaves=True)]
        await upstream.send_patches(SDK_KEY, *newer)
        await other.until(lambda: relays.stored == b"v5")
        redis.do("CONFIG", "RESETSTAT")
        stopped.signal(signal.SIGCONT)
        await stopped.said("another relay synchronizes; this one waits")
        assert relays.stored == b"v5"
        assert not redis.calls().keys() & {"sadd", "srem"}
        for relay in relays.relays:
            await eventually(relay, "ben", "yes")
            await eventually(relay, "ann", "no")
        assert await metric(other, "relay_big_segments_patches_total") == 4
        assert await metric(stopped, "relay_big_segments_patches_total") == 1
        await upstream.send_patches(SDK_KEY, relays.next_patch(member="cleo"))
        for relay in relays.relays:
            await eventually(relay, "cleo", "yes")
        assert await relays.holder() is other


async def test_a_relay_without_launchdarkly_leaves_it_to_another(tmp_path, upstream, redis):
    """Its polls fail while the other's work: that one synchronises within moments."""
    async with ScriptedUpstream() as broken:
        broken.serve(SDK_KEY, DATA)
        broken.script_path("/sdk/big-segments/revisions", *[status(503)] * 1000)
        given = {
            "LD_ENV_main": SDK_KEY,
            "LD_MOBILE_KEY_main": MOBILE_KEY,
            "STREAM_URI": broken.url,
            "BASE_URI": broken.url,
            "USE_REDIS": "true",
            "REDIS_URL": redis.url,
        }
        folder = tmp_path / "blind"
        folder.mkdir()
        async with RelayProcess(folder, **given) as blind:
            await broken.until_asked("/sdk/big-segments/revisions", 2)
            given |= {"STREAM_URI": upstream.url, "BASE_URI": upstream.url}
            async with RelayProcess(tmp_path, **given) as seeing:
                await seeing.until(lambda: redis.do("GET", CURSOR) == b"v1")
                await eventually(blind, "ann", "yes")
                await eventually(seeing, "ann", "yes")
                page = json.loads((await ask(blind.address, "/status")).body)
                state = page["environments"]["main"]["bigSegmentStatus"]
                assert (state["available"], state["potentiallyStale"]) == (True, False)
