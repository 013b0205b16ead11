"""The database as its operators and the SDKs in daemon mode meet it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.data import all_data, flag, segment
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.sdk import PythonSDK, Setup, sees
from tests.support.serving import SDK_KEY
from tests.support.upstream import ScriptedUpstream

WHOLE_WITHIN = 30.0
"""Seconds after which a database that can be reached is whole again."""


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with two flags and a segment."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), flag("gone"), segment()))
        yield upstream


async def eventually(holds: Callable[[], bool], seconds: float = WHOLE_WITHIN) -> None:
    """Wait for what is seen in the database only."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def stored(redis: RedisServer, key: str, prefix: str = "launchdarkly") -> dict:
    """A flag as the database has it; empty if it has none."""
    return json.loads(redis.hash(f"{prefix}:features").get(key, b"{}"))


async def test_a_user_with_the_rights_that_ld_relay_needed_is_served_fully(
    upstream, tmp_path, redis
):
    """First data, changes, deletions, healing, one-shot runs, and SDKs: no command is denied."""
    redis.add_user_of_ld_relay("few", "geheim", "golden")
    url = f"redis://few:geheim@127.0.0.1:{redis.port}"
    given = {
        "LD_ENV_main": SDK_KEY,
        "LD_PREFIX_main": "golden",
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_REDIS": "true",
        "REDIS_URL": url,
        "INIT_TIMEOUT": "20s",
    }
    async with RelayProcess(tmp_path, **given) as relay:
        await eventually(lambda: redis.do("EXISTS", "golden:$inited") == 1)
        assert redis.hash("golden:features").keys() == {"lamp", "gone"}
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await eventually(lambda: stored(redis, "lamp", "golden")["version"] == 2)
        await upstream.delete(SDK_KEY, "/flags/gone", 2)
        await eventually(lambda: stored(redis, "gone", "golden").get("deleted", False))
        redis.do("FLUSHALL")
        await eventually(lambda: stored(redis, "lamp", "golden").get("version") == 2)
        redis.do("HSET", "golden:features", "lamp", '{"key":"lamp","version":1}')
        await eventually(lambda: stored(redis, "lamp", "golden")["version"] == 2)
        assert "is unavailable" not in relay.log

    upstream.serve(SDK_KEY, all_data(flag(value="three", version=3), segment()))
    once = RelayProcess(tmp_path, "sync", "--from-env", **given, DATA_SOURCE="polling")
    await once.spawn()
    assert await once.ended() == 0, once.log
    assert "1 updated" in once.log
    assert redis.denied() == []

    async with PythonSDK(Setup(SDK_KEY, redis=url, prefix="golden")) as sdk:
        await sdk.ready()
        await sees(sdk, "lamp", "three")
