"""A real relay with a Redis Cluster, or with a master that Sentinels name."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from tests.support.data import all_data, flag, segment
from tests.support.environments import description, environment_list
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.rediscluster import MASTER, Cluster, SentinelServers
from tests.support.sdk import PythonSDK, Setup, sees
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream

AUTO_KEY = "rel-5ca1ab1e-0001-4000-8000-00000000c001"
PATIENCE = 30.0
"""Seconds after which a database is whole again, whatever has happened to it."""


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), flag("gone"), segment()))
        yield upstream


def variables(servers: Cluster | SentinelServers | RedisServer) -> dict[str, str]:
    """Return the relay's variables for a database."""
    match servers:
        case Cluster():
            given = {"REDIS_URL": servers.url, "REDIS_CLUSTER": "true"}
        case SentinelServers():
            addresses = ",".join(f"127.0.0.1:{port}" for port in servers.ports)
            given = {"REDIS_SENTINELS": addresses, "REDIS_SENTINEL_MASTER": MASTER}
        case _:
            given = {"REDIS_URL": servers.url}
    return {"USE_REDIS": "true", **given}


def settings(upstream: ScriptedUpstream, servers, prefix: str, **more: str) -> dict[str, str]:
    return {
        "LD_ENV_main": SDK_KEY,
        "LD_PREFIX_main": prefix,
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "INIT_TIMEOUT": "20s",
        **variables(servers),
        **more,
    }


def made(shape: str, folder: Path) -> Cluster | SentinelServers:
    folder.mkdir()
    return Cluster(folder, replicas=1) if shape == "cluster" else SentinelServers(folder)


def version(servers, prefix: str, key: str = "lamp") -> int:
    """Return the version of a stored flag; 0 if it is not there, or nobody can be asked."""
    try:
        item = servers.hash(f"{prefix}:features").get(key)
    except RedisError:
        return 0
    return json.loads(item)["version"] if item else 0


async def eventually(holds, seconds: float = PATIENCE) -> None:
    """Wait for what is seen in the database only."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("shape", "prefix"), [("cluster", "shop"), ("cluster", "{shop}"), ("sentinels", "shop")]
)
async def test_a_relay_follows_a_failover(upstream, tmp_path, shape, prefix):
    """Clients are served meanwhile, what changed is written, and SDKs in daemon mode read it."""
    key = f"{prefix}:features"
    with made(shape, tmp_path / "servers") as servers:

        def master() -> RedisServer:
            return servers.master_of(key) if shape == "cluster" else servers.master

        async with RelayProcess(tmp_path, **settings(upstream, servers, prefix)) as relay:
            await eventually(lambda: version(servers, prefix) == 1)
            await upstream.patch(SDK_KEY, flag(value="two", version=2))
            await eventually(lambda: version(servers, prefix) == 2)
            former = await asyncio.to_thread(master)
            await asyncio.to_thread(former.do, "WAIT", 1, 5000)
            former.kill()
            await upstream.patch(SDK_KEY, flag(value="three", version=3))
            await upstream.delete(SDK_KEY, "/flags/gone", 2)
            await relay.said("is unavailable: ")
            reply = await ask(relay.address, "/sdk/flags/lamp", [("Authorization", SDK_KEY)])
            assert json.loads(reply.body)["version"] == 3
            await eventually(lambda: version(servers, prefix) == 3)
            await eventually(lambda: version(servers, prefix, "gone") == 2)
            await relay.said("is available again")
        if prefix == "{shop}" or shape == "sentinels":
            url = (await asyncio.to_thread(master)).url
            async with PythonSDK(Setup(SDK_KEY, redis=url, prefix=prefix)) as sdk:
                await sdk.ready()
                await sees(sdk, "lamp", "three")


@pytest.mark.parametrize("shape", ["cluster", "sentinels"])
async def test_commands_know_every_shape(upstream, tmp_path, shape, request):
    """`relay check` accepts it, and `relay sync` brings it up to date."""
    servers = request.getfixturevalue(shape)
    given = settings(upstream, servers, "shop", DATA_SOURCE="polling")
    check = RelayProcess(tmp_path, "check", "--from-env", **given)
    await check.spawn()
    assert await check.ended() == 0, check.log
    for expected in ("3 added", "is up to date"):
        sync = RelayProcess(tmp_path, "sync", "--from-env", **given)
        await sync.spawn()
        assert await sync.ended() == 0, sync.log
        assert expected in sync.log
    assert version(servers, "shop") == 1


async def test_a_cluster_without_the_option_is_recognised(upstream, tmp_path, cluster):
    """The log line says which option is missing; clients are served from memory."""
    given = settings(upstream, cluster, "shop", REDIS_CLUSTER="", REDIS_URL=cluster.servers[0].url)
    async with RelayProcess(tmp_path, **given) as relay:
        await relay.said("this is a Redis Cluster: set REDIS_CLUSTER=true")
        reply = await ask(relay.address, "/sdk/flags/lamp", [("Authorization", SDK_KEY)])
        assert reply.status == 200


@pytest.mark.parametrize("shape", ["cluster", "sentinels"])
async def test_the_list_of_environments_is_stored(tmp_path, shape, request):
    """A relay starts with it while LaunchDarkly is away, and with the flags."""
    servers = request.getfixturevalue(shape)
    async with ScriptedUpstream() as upstream:
        upstream.serve(AUTO_KEY, environment_list(description()))
        upstream.serve("sdk-alpha-1", all_data(flag("lamp", value="stored")))
        given = {
            "AUTO_CONFIG_KEY": AUTO_KEY,
            "STREAM_URI": upstream.url,
            "ENV_DATASTORE_PREFIX": "ac-$CID",
            "AUTO_CONFIG_CACHE_KEY": "the-list",
            **variables(servers),
        }
        async with RelayProcess(tmp_path, **given) as relay:
            await eventually(lambda: version(servers, "ac-id-alpha") > 0)
            await eventually(lambda: len(servers.hash("the-list")) == 1)
            await relay.kill()
    async with RelayProcess(tmp_path, **given) as relay:
        await relay.said("Serving stored data")
        reply = await ask(relay.address, "/sdk/flags", [("Authorization", "sdk-alpha-1")])
        assert b"stored" in reply.body


async def test_a_reload_moves_from_a_server_to_a_cluster(upstream, tmp_path, redis, cluster):
    """The options are like all others of a database: streams notice nothing."""
    file = tmp_path / "relay.conf"

    def write(section: str) -> None:
        file.write_text(
            f"[Main]\nstreamUri = {upstream.url}\n"
            f'[Environment "main"]\nsdkKey = {SDK_KEY}\nprefix = shop\n[Redis]\n{section}\n'
        )

    write(f"url = {redis.url}")
    async with RelayProcess(tmp_path, "--config", str(file), "--from-env") as relay:
        await eventually(lambda: version(redis, "shop") == 1)
        write(f"url = {cluster.url}\ncluster = true")
        relay.signal(signal.SIGHUP)
        await eventually(lambda: version(cluster, "shop") == 1)
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await eventually(lambda: version(cluster, "shop") == 2)
        assert version(redis, "shop") == 1
