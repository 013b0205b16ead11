"""Flags with big segments in a relay with workers: each reads, and the feeder tells of changes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.bigsegments.environment import MAX_CHANGED
from tests.contract.test_big_segments import DATA, MOBILE_KEY, V1, eventually, user
from tests.contract.test_workers import WorkersRelay, all_connected
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY, Stream
from tests.support.upstream import ScriptedUpstream, context_hash, segment_patch

STREAMS = 8
"""Streams of a context: both workers have some of them, but for one case in 128."""

LOOK = 5.5
"""Seconds after which each process has looked at the state of the database."""


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, DATA)
        upstream.patches[SDK_KEY] = [V1]
        yield upstream


@asynccontextmanager
async def relaying(
    folder: Path, upstream: ScriptedUpstream, redis: RedisServer, **more: str
) -> AsyncIterator[WorkersRelay]:
    """A relay with two workers that has synchronised."""
    given = {"LD_MOBILE_KEY_main": MOBILE_KEY, "USE_REDIS": "true", "REDIS_URL": redis.url}
    async with WorkersRelay(folder, upstream, **given, **more) as relay:
        await relay.until(lambda: redis.do("GET", "launchdarkly:big_segments_synchronized_on"))
        yield relay


async def everywhere(
    relay: WorkersRelay, key: str, value: str, status: str = "HEALTHY", within: float = 2.0
) -> None:
    """Wait until a user has a value in all workers; each request may go to any of them."""
    async with asyncio.timeout(within):
        for _ in range(2 * STREAMS):
            await eventually(relay, key, value, status)


async def watching(relay: WorkersRelay, stack: AsyncExitStack, key: str) -> list[Stream]:
    """Open evaluating streams of a user, and read their puts."""
    text = base64.urlsafe_b64encode(json.dumps(user(key)).encode()).decode()
    streams = []
    for _ in range(STREAMS):
        stream = await Stream.open(relay.address, f"/meval/{text}", key=MOBILE_KEY)
        stack.callback(stream.close)
        await stream.until(b"\n\n")
        streams.append(stream)
    return streams


async def get(streams: list[Stream], value: str, within: float) -> None:
    """Read the next message of all streams: a value of `member`."""
    messages = await asyncio.gather(*(each.until(b"\n\n", within) for each in streams))
    for message in messages:
        sent = json.loads(message.partition(b"data: ")[2])
        assert (sent["key"], sent["value"]) == ("member", value)


async def big_segments_status(
    relay: WorkersRelay, holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Wait until `/status` says something of big segments."""

    def of(status: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = status["environments"]["main"].get("bigSegmentStatus", {})
        return found

    return of(await relay.until_status(lambda status: holds(of(status))))


async def test_members_are_found_in_all_workers(tmp_path, upstream, redis):
    """As soon as they are synchronised; `/status` and metrics tell of it whoever answers."""
    start = time.time()
    async with relaying(tmp_path, upstream, redis) as relay:
        await everywhere(relay, "ann", "yes")
        await everywhere(relay, "ben", "no")
        for _ in range(STREAMS):
            status = await big_segments_status(relay, bool)
            assert start <= status.pop("lastSynchronizedOn") / 1000 <= time.time()
            assert status == {"available": True, "potentiallyStale": False}
        assert upstream.asked("/sdk/big-segments/revisions") == 3
        reads = 'relay_big_segments_reads_total{environment="main"}'
        async with asyncio.timeout(5):
            while (await relay.counters())[reads] < 4:  # two users, two workers
                pass
        assert (await relay.counters())['relay_big_segments_patches_total{environment="main"}'] == 1


async def test_a_change_reaches_streams_in_all_workers_and_costs_others_nothing(
    tmp_path, upstream, redis
):
    """Nobody's memberships are read again but those that have changed, in neither worker."""
    async with relaying(tmp_path, upstream, redis) as relay, AsyncExitStack() as stack:
        await everywhere(relay, "ann", "yes")
        ann, ben = [await watching(relay, stack, key) for key in ("ann", "ben")]
        await asyncio.sleep(LOOK)
        redis.do("CONFIG", "RESETSTAT")
        before = "v1"
        for number, value in enumerate(["yes", "no", "yes"], 2):
            moved = {"include": ["ben"]} if value == "yes" else {"no_longer": ["ben"]}
            await upstream.send_patches(
                SDK_KEY, segment_patch("team.g2", f"v{number}", before, **moved)
            )
            await get(ben, value, 2.5)
            before = f"v{number}"
        await asyncio.sleep(LOOK)
        assert redis.calls()["smembers"] <= 3 * 2 * 2  # patches, workers, sets
        await upstream.send_patches(
            SDK_KEY, segment_patch("team.g2", "v5", "v4", no_longer=["ann"])
        )
        await get(ann, "no", 2.5)  # which have had nothing before


async def test_a_patch_with_more_members_than_are_named_reaches_streams(tmp_path, upstream, redis):
    """Then the memberships of all clients are read again."""
    async with relaying(tmp_path, upstream, redis) as relay, AsyncExitStack() as stack:
        await everywhere(relay, "ann", "yes")
        ben = await watching(relay, stack, "ben")
        many = [f"user-{number}" for number in range(MAX_CHANGED)]
        patch = segment_patch("team.g2", "v2", "v1", include=["ben", *many])
        await upstream.send_patches(SDK_KEY, patch)
        await get(ben, "yes", 10)


async def test_changes_of_another_relay_reach_streams(tmp_path, upstream, redis):
    """The feeder sees that the cursor has moved, and tells all workers."""
    async with relaying(tmp_path, upstream, redis) as relay, AsyncExitStack() as stack:
        await everywhere(relay, "ann", "yes")
        zoe = await watching(relay, stack, "zoe")
        change_behind_its_back(redis)
        await get(zoe, "yes", LOOK + 2)


async def test_changes_while_there_is_no_feeder_reach_streams(tmp_path, upstream, redis):
    """One that was killed may have written a patch, and told nobody."""
    async with relaying(tmp_path, upstream, redis) as relay, AsyncExitStack() as stack:
        await everywhere(relay, "ann", "yes")
        zoe = await watching(relay, stack, "zoe")
        feeder = relay.feeder()
        os.kill(feeder, signal.SIGSTOP)
        change_behind_its_back(redis)
        os.kill(feeder, signal.SIGKILL)
        await get(zoe, "yes", LOOK)
        await relay.until_status(all_connected)


def change_behind_its_back(redis: RedisServer) -> None:
    redis.do("SADD", f"launchdarkly:big_segment_include:{context_hash('zoe')}", "team.g2")
    redis.do("SET", "launchdarkly:big_segments_cursor", "v1b")


async def test_old_memberships_are_said_to_be_stale_in_all_workers(tmp_path, upstream, redis):
    """After two minutes in evaluations, after the configured time in `/status`."""
    key = "launchdarkly:big_segments_synchronized_on"
    async with relaying(tmp_path, upstream, redis, BIG_SEGMENTS_STALE_THRESHOLD="10m") as relay:
        await everywhere(relay, "ann", "yes")
        redis.do("SET", key, str(int((time.time() - 125) * 1000)))
        await everywhere(relay, "ann", "yes", "STALE", within=LOOK)
        await big_segments_status(relay, lambda status: not status["potentiallyStale"])
        redis.do("SET", key, str(int((time.time() - 700) * 1000)))
        await big_segments_status(relay, lambda status: status["potentiallyStale"])
        redis.do("SET", key, str(int(time.time() * 1000)))
        await everywhere(relay, "ann", "yes", within=LOOK)
        await big_segments_status(relay, lambda status: not status["potentiallyStale"])


async def test_workers_hear_at_once_that_all_is_synchronised(tmp_path, upstream, redis):
    """They look at the database each 5 s by themselves."""
    redis.do("SET", "launchdarkly:big_segments_cursor", "v1")
    redis.do("SET", "launchdarkly:big_segments_synchronized_on", "1")
    redis.do("SADD", f"launchdarkly:big_segment_include:{context_hash('ann')}", "team.g2")
    given = {"LD_MOBILE_KEY_main": MOBILE_KEY, "USE_REDIS": "true", "REDIS_URL": redis.url}
    may_answer = asyncio.Event()
    original = upstream._answer

    async def late(request):
        await may_answer.wait()
        return await original(request)

    upstream.script_path("/sdk/big-segments/revisions", late)
    async with WorkersRelay(tmp_path, upstream, **given) as relay:
        await everywhere(relay, "ann", "yes", "STALE")
        may_answer.set()
        await everywhere(relay, "ann", "yes", within=2.0)


async def test_a_database_that_is_away_delays_nobody(tmp_path, upstream, redis):
    """Both workers evaluate without memberships at once, and with them when it is back."""
    async with relaying(tmp_path, upstream, redis, REDIS_READ_TIMEOUT="1s") as relay:
        await everywhere(relay, "ann", "yes")
        redis.pause()
        await everywhere(relay, "new", "no", "STORE_ERROR", within=10)
        status = await big_segments_status(relay, lambda status: not status["available"])
        assert status["lastSynchronizedOn"] == 0
        redis.go_on()
        await everywhere(relay, "ann", "yes", within=10)
        await big_segments_status(relay, lambda status: status["available"])
