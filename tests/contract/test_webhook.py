"""Webhooks of LaunchDarkly to a relay as a process, which polls and keeps a Redis current."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.model.credential import Secret
from relay.protocol.webhook import MAX_BODY, sign
from tests.support.data import all_data, flag, segment
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY, ask, until
from tests.support.upstream import ScriptedUpstream, body, status

PATH = "/webhooks/launchdarkly"
SECRET = "a-long-random-text"
OTHER_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a002"
LAMP = "proj/shop:env/production:flag/lamp"
_ids = itertools.count(1)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one")))
        upstream.serve(OTHER_KEY, all_data(flag(value="one")))
        yield upstream


def relay_of(upstream: ScriptedUpstream, folder: Path, **variables: str) -> RelayProcess:
    """A relay that polls once an hour, unless it is told."""
    given = {
        "LD_ENV_main": SDK_KEY,
        "LD_PROJ_KEY_main": "shop",
        "LD_ENV_KEY_main": "production",
        "DATA_SOURCE": "polling",
        "POLL_INTERVAL": "1h",
        "BASE_URI": upstream.url,
        "STREAM_URI": upstream.url,
        "WEBHOOK_SECRET": f"former-secret, {SECRET}",
    }
    return RelayProcess(folder, **{**given, **variables})


def entry(resource: str = LAMP, version: int | None = None, **members: object) -> bytes:
    """An audit log entry, with an id of its own."""
    value = {"_id": f"id-{next(_ids)}", "kind": "flag", "accesses": [{"resource": resource}]}
    if version:
        environments = {"production": {"version": version}}
        value["currentVersion"] = {"key": "lamp", "environments": environments}
    return json.dumps({**value, **members}).encode()


async def post(relay: RelayProcess, content: bytes, signature: str | None = None) -> int:
    """Send a webhook; return the status."""
    signature = sign(content, Secret(SECRET)) if signature is None else signature
    headers = [("X-LD-Signature", signature)] if signature else []
    return (await ask(relay.address, PATH, headers, method="POST", body=content)).status


async def value(relay: RelayProcess, key: str = SDK_KEY) -> str:
    """The value of the lamp."""
    reply = await ask(relay.address, "/sdk/flags", [("Authorization", key)])
    return json.loads(reply.body)["lamp"]["variations"][0] if reply.status == 200 else ""


async def shows(relay: RelayProcess, wanted: str) -> None:
    async with asyncio.timeout(20):
        while await value(relay) != wanted:  # noqa: ASYNC110 - a relay has no event for it
            await asyncio.sleep(0.01)


def polls(upstream: ScriptedUpstream, key: str = SDK_KEY) -> int:
    return sum(request.headers.get("Authorization") == key for request in upstream.requests)


async def test_a_webhook_brings_the_change_into_redis_at_once(upstream, tmp_path):
    """Answer, then poll, then database: within 300 ms when upstream is current."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with RedisServer(folder) as redis:
        relay = relay_of(upstream, tmp_path, USE_REDIS="true", REDIS_URL=redis.url)
        async with relay:
            await until(lambda: b"one" in redis.hash("launchdarkly:features").get("lamp", b""))
            upstream.serve(SDK_KEY, all_data(flag(value="two", version=2)))
            before, began = polls(upstream), time.monotonic()
            assert await post(relay, entry(version=2)) == 202
            await upstream.requested(before + 1)
            await until(lambda: b"two" in redis.hash("launchdarkly:features")["lamp"])
            assert time.monotonic() - began < 0.3
            assert polls(upstream) == before + 1


async def test_a_lagging_cache_is_asked_again_until_it_has_what_was_announced(upstream, tmp_path):
    """After two seconds, and not after five when it was there."""
    async with relay_of(upstream, tmp_path) as relay:
        await shows(relay, "one")
        before, began = polls(upstream), time.monotonic()
        assert await post(relay, entry(version=2)) == 202
        await until(lambda: polls(upstream) == before + 1)
        upstream.serve(SDK_KEY, all_data(flag(value="two", version=2)))
        await shows(relay, "two")
        assert 1.9 < time.monotonic() - began < 3
        assert polls(upstream) == before + 2


async def test_an_old_answer_never_replaces_a_newer_one(upstream, tmp_path):
    """Edges of a cache differ: an old one that is met on a hint changes nothing."""
    async with relay_of(upstream, tmp_path) as relay:
        await shows(relay, "one")
        upstream.serve(SDK_KEY, all_data(flag(value="two", version=2), segment()))
        await post(relay, entry(version=2))
        await shows(relay, "two")
        old = all_data(flag(value="one")).encode()
        upstream.script(SDK_KEY, body(old, "application/json"))
        before = polls(upstream)
        await post(relay, entry(version=3))
        upstream.serve(SDK_KEY, all_data(flag(value="three", version=3), segment()))
        await until(lambda: polls(upstream) == before + 1)
        seen = set()
        async with asyncio.timeout(10):
            while "three" not in seen:
                seen.add(await value(relay))
                await asyncio.sleep(0.01)
        assert seen == {"two", "three"}


async def test_a_burst_is_one_or_two_polls(upstream, tmp_path):
    """However many webhooks there are."""
    async with relay_of(upstream, tmp_path) as relay:
        await shows(relay, "one")
        before = polls(upstream)
        upstream.serve(SDK_KEY, all_data(flag(value="two", version=50)))
        codes = await asyncio.gather(*(post(relay, entry(version=i)) for i in range(2, 51)))
        assert set(codes) == {202}
        await shows(relay, "two")
        assert polls(upstream) - before <= 2


async def test_only_the_environment_that_is_named_is_polled(upstream, tmp_path):
    """And all of them for what belongs to none."""
    other = {"LD_ENV_other": OTHER_KEY, "LD_PROJ_KEY_other": "shop", "LD_ENV_KEY_other": "test"}
    async with relay_of(upstream, tmp_path, **other) as relay:
        await until(lambda: polls(upstream) == 1 and polls(upstream, OTHER_KEY) == 1)
        upstream.serve(SDK_KEY, all_data(flag(value="two", version=2)))
        await post(relay, entry(version=2))
        await shows(relay, "two")
        assert polls(upstream, OTHER_KEY) == 1
        await post(relay, entry("member/1"))
        await until(lambda: polls(upstream, OTHER_KEY) == 2)


async def test_what_is_refused_has_a_status_and_a_line_and_causes_no_work(upstream, tmp_path):
    """Strangers learn nothing and cost nothing."""
    signed = entry()
    long = b'{"_id":"' + b"x" * MAX_BODY + b'"}'
    refused = [
        (signed, "", 401),
        (signed, "0" * 64, 401),
        (signed, sign(signed, Secret("another")), 401),
        (b"no json", None, 400),
        (b"[]", None, 400),
        (long, None, 413),
    ]
    async with relay_of(upstream, tmp_path) as relay:
        await shows(relay, "one")
        for number, (content, signature, code) in enumerate(refused, 1):
            assert await post(relay, content, signature) == code
            await relay.said("A webhook is refused", number)
        assert (await ask(relay.address, PATH)).status == 405
        upstream.serve(SDK_KEY, all_data(flag(value="two", version=2)))
        assert await post(relay, entry(version=2)) == 202
        await shows(relay, "two")
        assert polls(upstream) == 2
        assert relay.log.count("A webhook is refused") == len(refused)
        assert SECRET not in relay.log


async def test_a_flood_of_refusals_does_not_fill_the_log(upstream, tmp_path):
    """After some lines it is told that more are not."""
    async with relay_of(upstream, tmp_path) as relay:
        for _ in range(30):
            assert await post(relay, b"{}", "0" * 64) == 401
        await relay.said("more are not logged for a while")
        assert relay.log.count("A webhook is refused") == 20


async def test_a_replay_is_known(upstream, tmp_path):
    """It is answered like the first, said, and causes no poll."""
    async with relay_of(upstream, tmp_path) as relay:
        await shows(relay, "one")
        upstream.serve(SDK_KEY, all_data(flag(value="two", version=2)))
        content = entry(version=None)
        assert await post(relay, content) == 202
        await shows(relay, "two")
        upstream.serve(SDK_KEY, all_data(flag(value="three", version=3)))
        assert await post(relay, content) == 202
        await relay.said("A webhook came again")
        assert polls(upstream) == 2
        assert await value(relay) == "two"


async def test_without_a_secret_there_is_no_such_route(upstream, tmp_path):
    """Nobody could be believed."""
    async with relay_of(upstream, tmp_path, WEBHOOK_SECRET="") as relay:
        await shows(relay, "one")
        content = entry()
        for signature in ("", sign(content, Secret(""))):
            assert await post(relay, content, signature) == 404


async def test_the_former_secret_is_good_as_long_as_it_is_configured(upstream, tmp_path):
    """Several webhooks may point at one relay."""
    async with relay_of(upstream, tmp_path) as relay:
        content = entry()
        assert await post(relay, content, sign(content, Secret("former-secret"))) == 202


async def test_with_streaming_a_healthy_stream_is_left_alone(upstream, tmp_path):
    """Changes that it has brought need no look, and news come by themselves."""
    async with relay_of(upstream, tmp_path, DATA_SOURCE="streaming") as relay:
        await upstream.connected(SDK_KEY)
        await shows(relay, "one")
        await post(relay, entry(version=2))
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await shows(relay, "two")
        assert polls(upstream) == 1


async def test_with_streaming_a_waiting_stream_is_opened_at_once(upstream, tmp_path):
    """A back-off need not be waited for when LaunchDarkly has just called."""
    upstream.script(SDK_KEY, status(401))
    async with relay_of(upstream, tmp_path, DATA_SOURCE="streaming") as relay:
        await relay.said("Upstream refuses the key")
        async with asyncio.timeout(2):  # by itself it would wait for 2.5 s at least
            assert await post(relay, entry(version=1)) == 202
            await shows(relay, "one")
