"""The list of automatically configured environments survives whatever happens to the relay."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import environments
from tests.support import upstream as answers
from tests.support.data import all_data, flag
from tests.support.dynamodb import VARIABLES, Table, aws_credentials, dynamodb, table
from tests.support.environments import description, environment_list, payload_filter
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import ask, until
from tests.support.upstream import ScriptedUpstream, filtered

__all__ = ["aws_credentials", "dynamodb", "table"]

KEY = "rel-5ca1ab1e-0001-4000-8000-00000000c001"
OTHER_KEY = "rel-5ca1ab1e-0002-4000-8000-00000000c002"
SECRET = "a-long-random-text"
NAMES = ("alpha", "beta")
KILLS = int(os.environ.get("KILL_ROUNDS", "6"))
CONTEXT = base64.urlsafe_b64encode(b'{"kind":"user","key":"anna"}').decode()
WAITING = b"Relay Proxy is not yet fully initialized, does not have list of environments yet"


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        for key in (KEY, OTHER_KEY):
            upstream.serve(key, environment_list(description(), description("beta")))
        for key in ("sdk-alpha-1", "sdk-alpha-2", "sdk-beta-1"):
            upstream.serve(key, all_data(flag("lamp", value=key)))
        yield upstream


def relay(folder: Path, upstream: ScriptedUpstream, **variables: str) -> RelayProcess:
    """A relay that stores in files, unless a database is named."""
    in_database = "AUTO_CONFIG_CACHE_KEY" in variables
    places = {} if in_database else {"SNAPSHOT_DIR": str(folder / "stored")}
    settings = {"AUTO_CONFIG_KEY": KEY, "STREAM_URI": upstream.url, **places}
    return RelayProcess(folder, **settings | variables)


def in_redis(redis: RedisServer, **variables: str) -> dict[str, str]:
    """Settings with which a relay stores in a database."""
    given = {"USE_REDIS": "1", "REDIS_URL": redis.url, "ENV_DATASTORE_PREFIX": "ac-$CID"}
    return given | {"AUTO_CONFIG_CACHE_KEY": "the-list"} | variables


def in_dynamodb(table: Table, **variables: str) -> dict[str, str]:
    """Settings with which a relay stores in a table."""
    address = {"USE_DYNAMODB": "1", "DYNAMODB_URL": table.server.url, "DYNAMODB_TABLE": table.name}
    given = {**VARIABLES, **address, "ENV_DATASTORE_PREFIX": "ac-$CID"}
    return given | {"AUTO_CONFIG_CACHE_KEY": "the-list"} | variables


async def fill(
    process: RelayProcess, folder: Path, database: RedisServer | Table | None = None
) -> None:
    """Let a relay store what LaunchDarkly has, flags included; then kill it."""
    async with process:
        await process.said("Initialized LaunchDarkly client for", 2)
        if database is None:
            for pattern, count in (("*.snapshot", 2), ("environments-*.sealed", 1)):
                await process.until(lambda p=pattern, n=count: len([*folder.rglob(p)]) == n)
        else:
            hashes = [f"ac-id-{name}:features" for name in NAMES]
            await process.until(lambda: all("lamp" in names_in(database, each) for each in hashes))
            await process.until(lambda: len(names_in(database, "the-list")) == len(NAMES))
            if isinstance(database, Table):  # the time comes last
                await process.until(lambda: names_in(database, "the-list:relayConfirmed"))
        await process.kill()


def names_in(database: RedisServer | Table, key: str) -> list[str]:
    """The names of what a database has under a key."""
    if isinstance(database, RedisServer):
        return list(database.hash(key))
    return [each["key"]["S"] for each in database.items() if each["namespace"]["S"] == key]


@dataclass(frozen=True)
class Place:
    """Where a relay stores the list and the flags; without a database, in files."""

    settings: dict[str, str] = field(default_factory=dict)
    database: RedisServer | Table | None = None


@pytest.fixture
def place(request) -> Place:
    """One of the places."""
    if request.param == "redis":
        redis = request.getfixturevalue("redis")
        return Place(in_redis(redis), redis)
    if request.param == "dynamodb":
        table = request.getfixturevalue("table")
        return Place(in_dynamodb(table), table)
    return Place()


EVERYWHERE = pytest.mark.parametrize("place", ["file", "redis", "dynamodb"], indirect=True)


async def status(process: RelayProcess, key: str, path: str = "/sdk/latest-all") -> int:
    return (await ask(process.address, path, [("Authorization", key)])).status


async def page(process: RelayProcess, path: str = "/status") -> dict:
    return json.loads((await ask(process.address, path)).body)


async def served(process: RelayProcess, *keys: str, path: str = "/sdk/latest-all") -> None:
    """Wait until all these keys are answered with data."""
    async with asyncio.timeout(10):
        for key in keys:
            while await status(process, key, path) != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


def lines(process: RelayProcess, *texts: str) -> list[str]:
    return [line for line in process.log.splitlines() if all(text in line for text in texts)]


@pytest.mark.timing
@EVERYWHERE
async def test_a_start_without_launchdarkly(tmp_path, upstream, place):
    """All environments known before are served within a second; the rest is not known.

    The libraries for DynamoDB alone take half a second.
    """
    await fill(relay(tmp_path, upstream, **place.settings), tmp_path, place.database)
    await upstream.stop()
    begin = time.monotonic()
    async with relay(tmp_path, upstream, **place.settings) as process:
        await served(process, "sdk-alpha-1", "sdk-beta-1")
        await served(process, "mob-beta-key", path=f"/msdk/evalx/contexts/{CONTEXT}")
        assert time.monotonic() - begin < (3.0 if isinstance(place.database, Table) else 1.0)
        for key, path in (
            ("sdk-unknown", "/sdk/latest-all"),
            ("sdk-alpha-1", "/sdk/latest-all?filter=north"),
            ("sdk-unknown", "/all"),
            ("", "/sdk/goals/unknown"),
        ):
            reply = await ask(process.address, path, [("Authorization", key)])
            assert (reply.status, reply.body) == (503, WAITING), path
        shown = await page(process)
        assert sorted(shown["environments"]) == ["id-alpha", "id-beta"]
        assert shown["status"] == "degraded"
        state = shown["autoConfigStatus"]
        assert (state["state"], state["stored"]) == ("INITIALIZING", True)
        assert state["dataAge"] < 60
        assert time.time() * 1000 - state["lastConfirmed"] < 60_000
        assert (await ask(process.address, "/readyz")).status == 200
        assert (await page(process, "/status/id-beta"))["envId"] == "id-beta"
        assert (await ask(process.address, "/status/id-gamma")).status == 503
        assert len(lines(process, "Serving the stored list of 2 environment(s)")) == 1
        metrics = (await ask(process.address, "/metrics")).body.decode()
        assert "relay_autoconfig_age_seconds " in metrics
        assert 'relay_autoconfig_state{state="INITIALIZING"} 1' in metrics
        await upstream.start()
        await process.said("Finished processing auto-configuration data")
        assert await status(process, "sdk-unknown") == 401
        assert (await page(process, "/status"))["autoConfigStatus"].get("stored") is None
        await process.said("Initialized LaunchDarkly client for", 2)
        assert (await page(process))["status"] == "healthy"
        for secret in (KEY, "sdk-alpha", "mob-alpha"):
            assert secret not in process.log
        assert not lines(process, "Properties have changed")


async def test_the_first_list_replaces_the_stored_one(tmp_path, upstream):
    """Environments that are gone end, keys that were replaced meanwhile open nothing."""
    await fill(relay(tmp_path, upstream), tmp_path)
    await upstream.stop()
    async with relay(tmp_path, upstream) as process:
        await served(process, "sdk-alpha-1", "sdk-beta-1")
        upstream.serve(KEY, environment_list(description("alpha", 2, 2)))
        await upstream.start()
        await process.said("Removed environment id-beta")
        await process.said("New primary SDK key is ...ha-2")
        await process.said("Finished processing auto-configuration data")
        assert await status(process, "sdk-beta-1") == 401
        assert await status(process, "sdk-alpha-1") == 401
        assert await status(process, "sdk-alpha-2") == 200
        await process.said("The new SDK key is used upstream")
        await process.stop()
    await upstream.stop()
    async with relay(tmp_path, upstream) as process:
        await served(process, "sdk-alpha-2")
        assert await status(process, "sdk-alpha-1") == 503
        assert list((await page(process))["environments"]) == ["id-alpha"]


async def test_a_refused_key_leaves_the_stored_list(tmp_path, upstream):
    """By mistake, perhaps: the environments are served, and the log says what is wrong."""
    await fill(relay(tmp_path, upstream), tmp_path)
    upstream.always(KEY, answers.status(401))
    async with relay(tmp_path, upstream) as process:
        await process.said("Invalid auto-configuration key")
        await served(process, "sdk-alpha-1", "sdk-beta-1")
        assert await status(process, "sdk-unknown") == 503
        state = (await page(process))["autoConfigStatus"]
        assert (state["state"], state["stored"]) == ("OFF", True)


async def test_expiring_keys_and_filters_are_part_of_the_list(tmp_path, upstream):
    """A key that has expired meanwhile opens nothing; a variant has its own data."""
    now = time.time()
    keys = [
        {"value": "sdk-alpha-1"},
        {"value": "sdk-alpha-8", "expiry": int((now + 3) * 1000)},
        {"value": "sdk-alpha-9", "expiry": int((now + 3600) * 1000)},
    ]
    north = {"f": payload_filter("north")}
    upstream.serve(KEY, environment_list(description(sdkKeys=keys), filters=north))
    upstream.serve(filtered("sdk-alpha-1", "north"), all_data(flag("lamp", value="north")))
    await fill(relay(tmp_path, upstream), tmp_path)
    await upstream.stop()
    await asyncio.sleep(max(0.0, now + 3.1 - time.time()))
    async with relay(tmp_path, upstream) as process:
        await served(process, "sdk-alpha-1", "sdk-alpha-9")
        assert await status(process, "sdk-alpha-8") == 503
        path = "/sdk/latest-all?filter=north"
        await served(process, "sdk-alpha-9", path=path)
        assert (
            b"north" in (await ask(process.address, path, [("Authorization", "sdk-alpha-9")])).body
        )


@EVERYWHERE
async def test_a_relay_is_killed_while_it_stores(tmp_path, upstream, place):
    """Whenever that happens, the next one finds a whole list, no older than the one before."""
    settings = place.settings
    await fill(relay(tmp_path, upstream, **settings), tmp_path, place.database)
    chance, version, last, change = random.Random(7), 1, 1, description("beta")
    for _ in range(KILLS):
        async with relay(tmp_path, upstream, **settings) as process:
            await process.said("Finished processing auto-configuration data")
            end = time.monotonic() + 0.3 * chance.random()
            while time.monotonic() < end:
                version += 1
                change = description("beta", version, envName=f"v{version}-" + "x" * 5000)
                await upstream.raw(KEY, environments.patch(change))
                await asyncio.sleep(0.002)
            await process.kill()
        await upstream.stop()
        async with relay(tmp_path, upstream, **settings) as process:
            await served(process, "sdk-alpha-1", "sdk-beta-1")
            assert not lines(process, "is not used"), process.log
            name = (await page(process))["environments"]["id-beta"].get("envName", "Beta")
            found = 1 if name == "Beta" else int(name[1:].partition("-")[0])
            assert last <= found <= version
            last = found
            assert not list(tmp_path.glob("stored/environments-*.tmp"))
        latest = description("beta", version, envName=f"v{version}-" + "x" * 5000)
        upstream.serve(
            KEY, environment_list(description(), latest if version > 1 else description("beta"))
        )
        await upstream.start()


async def test_another_key_finds_another_list(tmp_path, upstream):
    """The list is bound to its automatic configuration key, which the file does not tell."""
    await fill(relay(tmp_path, upstream), tmp_path)
    [file] = (tmp_path / "stored").glob("environments-*")
    for word in (b"alpha", KEY.encode(), b"sdk-", b"Project"):
        assert word not in file.read_bytes() + file.name.encode()
    await upstream.stop()
    async with relay(tmp_path, upstream, AUTO_CONFIG_KEY=OTHER_KEY) as process:
        await process.said("Error in auto-configuration stream")
        assert await status(process, "sdk-alpha-1") == 503
        assert (await page(process))["environments"] == {}
        await upstream.start()
        await process.said("Initialized LaunchDarkly client for", 2)
        await process.until(lambda: len(list((tmp_path / "stored").glob("environments-*"))) == 2)
        assert not lines(process, "WARN", "stored list")


@pytest.mark.parametrize("harm", ["altered", "cut off", "empty", "of another place"])
async def test_a_spoilt_file_is_told_and_replaced(tmp_path, upstream, harm):
    """In one line; nothing of it is used."""
    await fill(relay(tmp_path, upstream), tmp_path)
    [file] = (tmp_path / "stored").glob("environments-*")
    content = file.read_bytes()
    spoilt = {
        "altered": content[:100] + bytes([content[100] ^ 1]) + content[101:],
        "cut off": content[:-20],
        "empty": b"",
        "of another place": content[:21] + os.urandom(len(content) - 21),
    }[harm]
    file.write_bytes(spoilt)
    await upstream.stop()
    async with relay(tmp_path, upstream) as process:
        await process.said(f"The stored list of environments (file {file}) is not used: ")
        assert await status(process, "sdk-alpha-1") == 503
        await upstream.start()
        await process.said("Initialized LaunchDarkly client for", 2)
        await process.until(lambda: file.read_bytes() != spoilt)
        assert len(lines(process, "stored list")) == 1
        await process.kill()
    await upstream.stop()
    async with relay(tmp_path, upstream) as process:
        await served(process, "sdk-alpha-1", "sdk-beta-1")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"AUTO_CONFIG_CACHE_ENCRYPTION_KEY": SECRET}),
        ({"AUTO_CONFIG_CACHE_ENCRYPTION_KEY": SECRET}, {}),
        ({}, {"AUTO_CONFIG_KEY": OTHER_KEY}),
        (
            {"AUTO_CONFIG_CACHE_ENCRYPTION_KEY": SECRET},
            {"AUTO_CONFIG_CACHE_ENCRYPTION_KEY": SECRET, "AUTO_CONFIG_KEY": OTHER_KEY},
        ),
    ],
)
async def test_a_wrong_key_for_the_database(tmp_path, upstream, redis, before, after):
    """One line says so; the next list of LaunchDarkly replaces what is stored."""
    await fill(relay(tmp_path, upstream, **in_redis(redis, **before)), tmp_path, redis)
    was = redis.hash("the-list")
    await upstream.stop()
    async with relay(tmp_path, upstream, **in_redis(redis, **after)) as process:
        await process.said("The stored list of environments (key")
        same_secret = before.keys() <= after.keys() and before
        reason = "belongs to another automatic" if same_secret else "encrypted with another key"
        assert len(lines(process, "is not used: it", reason)) == 1, process.log
        assert await status(process, "sdk-alpha-1") == 503
        assert redis.hash("the-list") == was
        await upstream.start()
        await process.said("Initialized LaunchDarkly client for", 2)
        await process.until(lambda: redis.hash("the-list") != was)
        assert SECRET not in process.log + json.dumps(await page(process))
        await process.kill()
    await upstream.stop()
    async with relay(tmp_path, upstream, **in_redis(redis, **after)) as process:
        await served(process, "sdk-alpha-1", "sdk-beta-1")


async def test_a_wrong_key_for_a_table(tmp_path, upstream, table):
    """One line says so; the next list of LaunchDarkly replaces what is stored."""
    await fill(relay(tmp_path, upstream, **in_dynamodb(table)), tmp_path, table)
    other = in_dynamodb(table, AUTO_CONFIG_CACHE_ENCRYPTION_KEY=SECRET)
    was = table.get("the-list", "env:id-alpha")
    await upstream.stop()
    async with relay(tmp_path, upstream, **other) as process:
        where = f'key "the-list" of table "{table.name}" in DynamoDB'
        await process.said(f"The stored list of environments ({where}) is not used: it was enc")
        assert await status(process, "sdk-alpha-1") == 503
        assert table.get("the-list", "env:id-alpha") == was
        await upstream.start()
        await process.said("Initialized LaunchDarkly client for", 2)
        await process.until(lambda: table.get("the-list", "env:id-alpha") != was)
        assert SECRET not in process.log + json.dumps(await page(process))
        await process.kill()
    await upstream.stop()
    async with relay(tmp_path, upstream, **other) as process:
        await served(process, "sdk-alpha-1", "sdk-beta-1")


async def test_a_table_that_is_missing_is_told_once(tmp_path, upstream, table):
    """LaunchDarkly's list is served meanwhile, and stored as soon as there is one."""
    settings = in_dynamodb(table)
    table.drop()
    async with relay(tmp_path, upstream, **settings) as process:
        await process.said("Initialized LaunchDarkly client for", 2)
        await process.said(f'in DynamoDB) cannot be read: there is no table "{table.name}"')
        assert await status(process, "sdk-beta-1") == 200
        table.create()
        await process.said("in DynamoDB) can be used again")
        assert sorted(names_in(table, "the-list")) == ["env:id-alpha", "env:id-beta"]
        assert len(lines(process, "stored list", "cannot be")) == 1


async def test_a_full_disk_is_told_once_and_heals(tmp_path, upstream):
    """The file before stays whole, and everything is served meanwhile."""
    await fill(relay(tmp_path, upstream), tmp_path)
    [file] = (tmp_path / "stored").glob("environments-*")
    async with relay(tmp_path, upstream) as process:
        await process.said("Initialized LaunchDarkly client for", 2)
        no_limit = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (64 * 1024, no_limit[1]))
        change = description("beta", 2, envKey="x" * 100_000)  # no line shows it
        await upstream.raw(KEY, environments.patch(change))
        await process.said(f"(file {file}) cannot be written: File too large; trying again")
        assert file.stat().st_size < 64 * 1024
        assert await status(process, "sdk-beta-1") == 200
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, no_limit)
        await process.said(f"(file {file}) can be used again")
        assert file.stat().st_size > 100_000
        assert len(lines(process, "stored list", "cannot be")) == 1
        assert await process.stop() == 0
    assert not list((tmp_path / "stored").glob("*.tmp"))


async def test_a_database_that_comes_back_gives_the_list(tmp_path, upstream, redis):
    """A relay that starts without either waits for both."""
    settings = in_redis(redis)
    await fill(relay(tmp_path, upstream, **settings), tmp_path, redis)
    await upstream.stop()
    redis.pause()
    async with relay(tmp_path, upstream, REDIS_READ_TIMEOUT="300ms", **settings) as process:
        await process.said("cannot be read: no answer in time; trying again")
        assert await status(process, "sdk-alpha-1") == 503
        redis.go_on()
        await served(process, "sdk-alpha-1", "sdk-beta-1")
        assert len(lines(process, "stored list", "cannot be read")) == 1
        assert len(lines(process, "stored list", "can be used again")) == 1


async def test_one_shot_mode_waits_for_launchdarkly(tmp_path, upstream, redis):
    """A stored list is not what a database is to be filled from."""
    settings = in_redis(redis, SNAPSHOT_DIR=str(tmp_path / "stored"))
    process = relay(tmp_path, upstream, **settings)
    await fill(process, tmp_path, redis)
    await until(lambda: bool(list(tmp_path.glob("stored/environments-*"))))
    await upstream.stop()
    process = relay(tmp_path, upstream, EXIT_ALWAYS="1", INIT_TIMEOUT="1s", **settings)
    await process.spawn()
    assert await process.ended() == 1
    assert lines(process, "The list of environments did not come in time")
