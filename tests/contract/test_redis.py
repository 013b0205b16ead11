"""The database as its operators and the SDKs in daemon mode meet it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from relay.environment import Environment
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.protocol.fdv1 import AllFormat
from relay.sources.polling import PollingSource
from relay.sources.streaming import StreamingSource
from relay.stores.conflicts import ConflictTimings
from relay.stores.mirror import DatabaseMirror, MirrorTimings
from relay.stores.redis.connect import connect
from relay.stores.redis.store import RedisStore
from relay.streams.hub import Hub
from relay.upstream import Upstream
from tests.support.authorities import Authority
from tests.support.aws import ContainerCredentials
from tests.support.data import all_data, flag, segment
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer, encrypted
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
        await eventually(lambda: stored(redis, "lamp", "golden").get("version") == 2)
        await upstream.delete(SDK_KEY, "/flags/gone", 2)
        await eventually(lambda: stored(redis, "gone", "golden").get("deleted", False))
        redis.do("FLUSHALL")
        await eventually(lambda: stored(redis, "lamp", "golden").get("version") == 2)
        redis.do("DEL", "golden:features")
        await eventually(lambda: stored(redis, "lamp", "golden").get("version") == 2)
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


# What is newer in the database than upstream


QUICK = MirrorTimings(
    probe=0.1,
    compare=0.1,
    conflicts=ConflictTimings(second_look=0.05, refresh=0.2, newer=0.3, extra=0.3),
)


@asynccontextmanager
async def keeping(
    upstream: ScriptedUpstream, redis: RedisServer, name: str = "main", *, polls: bool = False
) -> AsyncGenerator[None, None]:
    """Keep the database as a relay does, with short times; its log has a name."""
    log = logging.getLogger(name)
    spec = EnvironmentSpec("main", SDKKey(SDK_KEY))
    async with Upstream() as session:
        source = (
            PollingSource(session, upstream.url, spec.sdk_key)
            if polls
            else StreamingSource(session, upstream.url, spec.sdk_key, log)
        )
        store = RedisStore(connect(redis.options(read_timeout=10.0)))
        mirror = DatabaseMirror(store, "redis", source.resync, log, QUICK)
        environment = Environment(spec, source, Hub({"all": AllFormat()}), log, [mirror])
        running = asyncio.create_task(environment.run())
        yield
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


async def test_a_run_that_ends_removes_what_vanished_and_leaves_what_is_newer(
    upstream, tmp_path, redis
):
    """It does not know what the run before it did, so it could fight for ever; `EXIT_ALWAYS`."""
    redis.do("SET", "launchdarkly:$inited", "")
    for item in (flag(version=99), flag("vanished"), flag("gone", version=0)):
        redis.do("HSET", "launchdarkly:features", item["key"], json.dumps(item))
    variables = {"USE_REDIS": "true", "REDIS_URL": redis.url, "EXIT_ALWAYS": "true"}
    relay = RelayProcess(tmp_path, LD_ENV_main=SDK_KEY, STREAM_URI=upstream.url, **variables)
    await relay.spawn()
    assert await relay.ended() == 0, relay.log
    assert redis.hash("launchdarkly:features").keys() == {"lamp", "gone"}
    assert [stored(redis, key)["version"] for key in ("lamp", "gone")] == [99, 1]


@pytest.mark.parametrize("polls", [False, True], ids=["streaming", "polling"])
async def test_what_another_project_left_is_replaced(upstream, redis, caplog, polls):
    """Upstream is asked for everything twice; the log says what was wrong, and SDKs read it no more."""
    redis.do("SET", "launchdarkly:$inited", "")
    for item in (flag(value="stale", version=99), flag("stray", value="stale", version=2)):
        redis.do("HSET", "launchdarkly:features", item["key"], json.dumps(item))
    async with PythonSDK(Setup(SDK_KEY, redis=redis.url)) as sdk:
        await sdk.ready()
        await sees(sdk, "lamp", "stale")
        async with keeping(upstream, redis, polls=polls):
            await sees(sdk, "lamp", "one")
            await sees(sdk, "stray", "(none)")
    [line] = [text for text in caplog.messages if "have replaced it" in text]
    assert (
        'held what upstream does not have, though it was asked for everything twice (flag "lamp" in'
        ' version 99, upstream has 1; flag "stray" in version 2, upstream has none)'
    ) in line
    assert len(upstream.requests) == 3
    assert not any("If-None-Match" in request.headers for request in upstream.requests)


async def test_what_upstream_has_in_a_form_that_is_not_understood_is_nobodys_mistake(
    upstream, redis, caplog
):
    """Another relay may understand it: what that one stored stays, and upstream is left in peace."""
    async with keeping(upstream, redis):
        await eventually(lambda: stored(redis, "lamp").get("version") == 1)
        odd = {**flag(version=2), "on": "yes"}
        await upstream.put(SDK_KEY, all_data(odd, {**odd, "key": "odd"}, segment()))
        for key in ("lamp", "odd", "stray"):
            redis.do("HSET", "launchdarkly:features", key, json.dumps(flag(key, 2)))
        await eventually(lambda: not stored(redis, "stray"))
        assert [stored(redis, key).get("version") for key in ("lamp", "odd", "gone")] == [
            2,
            2,
            None,
        ]
    assert len(upstream.requests) == 3
    [line] = [text for text in caplog.messages if "have replaced it" in text]
    assert '(flag "stray" in version 2, upstream has none)' in line


async def test_a_relay_that_stays_behind_interferes_ever_more_seldom(upstream, redis, caplog):
    """It waits twice as long each time; what is newer is back at once, and stays in the end."""
    newest = all_data(flag(value="two", version=2), flag("new"), segment())
    upstream.serve(SDK_KEY, newest)
    waits = [0.6, 1.2, 2.4]

    def told() -> list[logging.LogRecord]:
        return [each for each in caplog.records if "something else writes to it" in each.msg]

    async with ScriptedUpstream() as late:
        late.serve(SDK_KEY, all_data(flag(value="one"), segment()))
        async with keeping(upstream, redis, "quick"):
            await eventually(lambda: stored(redis, "lamp").get("version") == 2)
            async with keeping(late, redis, "late"):
                await eventually(lambda: len(told()) == len(waits))
                await late.put(SDK_KEY, newest)
                await eventually(lambda: stored(redis, "lamp").get("version") == 2)
                assert stored(redis, "new")["version"] == 1
                asked = len(late.requests)
                compared = redis.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"]
                await eventually(
                    lambda: (
                        redis.do("INFO", "commandstats")["cmdstat_hgetall"]["calls"] > compared + 40
                    )
                )
                assert stored(redis, "lamp")["version"] == 2
                assert len(late.requests) == asked
    assert [(each.name, each.args[-1]) for each in told()] == [("late", wait) for wait in waits]


async def test_a_relay_shows_tokens_of_its_role(upstream, tmp_path, redis):
    """Those of AWS, to a server that first knows none; no token and no secret is in the log."""
    authority = Authority(tmp_path)
    redis.do("ACL", "SETUSER", "relay", "reset", "on", "allkeys", "+@all")
    async with (
        ContainerCredentials(lifetime=3600) as container,
        encrypted(redis, authority.server("localhost")) as url,
    ):
        variables = {
            "LD_ENV_main": SDK_KEY,
            "STREAM_URI": upstream.url,
            "USE_REDIS": "true",
            "REDIS_URL": url,
            "REDIS_CA_FILE": str(authority.file),
            "REDIS_IDENTITY": "aws",
            "REDIS_IAM_CACHE": "flags",
            "REDIS_USERNAME": "relay",
            "AWS_REGION": "eu-central-1",
            **container.variables,
        }
        async with RelayProcess(tmp_path, **variables) as relay:
            await relay.said("the server refuses user or password")
            redis.do("ACL", "SETUSER", "relay", "nopass")
            await relay.said("is available again")
            await eventually(lambda: stored(redis, "lamp").get("version") == 1)
            await upstream.patch(SDK_KEY, flag(value="two", version=2))
            await eventually(lambda: stored(redis, "lamp").get("version") == 2)
            for secret in ("X-Amz", "secret-of-a-container", container.given[0]):
                assert secret not in relay.log
    assert container.given
