"""`relay sync`: a database brought up to date once, from LaunchDarkly or from a relay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from tests.support.data import all_data, flag, segment
from tests.support.process import PATIENCE, RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream, body, filtered, stall

OTHER_KEY = "sdk-5ca1ab1e-0001-4000-8000-00000000a002"
FEATURES = "launchdarkly:features"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), segment()))
        yield upstream


class Sync(RelayProcess):
    """One run of the command."""

    def __init__(
        self, upstream: ScriptedUpstream, redis: RedisServer, *arguments: str, **variables: str
    ) -> None:
        given = {
            "LD_ENV_main": SDK_KEY,
            "DATA_SOURCE": "polling",
            "BASE_URI": upstream.url,
            "STREAM_URI": upstream.url,
            "USE_REDIS": "true",
            "REDIS_URL": redis.url,
            "INIT_TIMEOUT": "6s",
        }
        super().__init__(redis.folder, "sync", "--from-env", *arguments, **{**given, **variables})

    async def run(self) -> tuple[int, str]:
        """Return exit code and output."""
        await self.spawn()
        return await self.ended(), self.log


def lamp(redis: RedisServer, key: str = "lamp", prefix: str = "launchdarkly") -> dict | None:
    """A flag as it is stored."""
    stored = redis.hash(f"{prefix}:features").get(key)
    return stored and json.loads(stored)


@pytest.mark.parametrize("source", ["polling", "streaming"])
async def test_an_empty_database_is_filled(upstream, redis, source):
    """With marker, flags and segments, and a line that says so."""
    code, said = await Sync(upstream, redis, DATA_SOURCE=source).run()
    assert code == 0, said
    assert "main: brought up to date: 2 added, 0 updated, 0 deleted (2 items upstream)" in said
    assert lamp(redis)["variations"][0] == "one"
    assert redis.hash("launchdarkly:segments").keys() == {"crowd"}
    assert redis.do("EXISTS", "launchdarkly:$inited") == 1


async def test_filtered_variants_are_brought_up_to_date_too(upstream, redis):
    """Each with its part of the data; one alone if it is named."""
    upstream.serve(filtered(SDK_KEY, "north"), all_data(flag(value="north")))
    filters = {"LD_PROJ_KEY_main": "shop", "LD_FILTER_KEYS_shop": "north"}
    code, said = await Sync(upstream, redis, "--environment", "main/north", **filters).run()
    assert code == 0, said
    assert "main/north: brought up to date: 1 added" in said
    assert lamp(redis) is None
    assert lamp(redis, prefix="launchdarkly/north")["variations"][0] == "north"
    code, said = await Sync(upstream, redis, **filters).run()
    assert code == 0, said
    assert "main/north: is up to date (1 items upstream)" in said
    assert lamp(redis)["variations"][0] == "one"


async def test_a_second_run_finds_nothing_to_do(upstream, redis):
    """And says that all is well."""
    await Sync(upstream, redis).run()
    code, said = await Sync(upstream, redis).run()
    assert code == 0
    assert "main: is up to date (2 items upstream)" in said


async def test_updates_additions_and_deletions_arrive(upstream, redis):
    """An item that only the database has is looked at twice before it goes."""
    upstream.serve(SDK_KEY, all_data(flag(), flag("gone"), segment()))
    await Sync(upstream, redis).run()
    upstream.serve(SDK_KEY, all_data(flag(version=2), flag("new"), segment()))
    code, said = await Sync(upstream, redis).run()
    assert code == 0, said
    assert "main: brought up to date: 1 added, 1 updated, 1 deleted" in said
    assert redis.hash(FEATURES).keys() == {"lamp", "new"}
    assert lamp(redis)["version"] == 2


async def test_a_dry_run_names_what_would_change_and_writes_nothing(upstream, redis):
    """Up to a number of names."""
    upstream.serve(SDK_KEY, all_data(flag(), flag("gone")))
    await Sync(upstream, redis).run()
    before = redis.hash(FEATURES)
    many = [flag(f"new-{i:02}") for i in range(25)]
    upstream.serve(SDK_KEY, all_data(flag(version=2), *many))
    code, said = await Sync(upstream, redis, "--dry-run").run()
    assert code == 0
    assert "main: would change: 25 added, 1 updated, 1 deleted" in said
    for line in ("updated: flag 'lamp'", "deleted: flag 'gone'", "added: 5 more"):
        assert f"  {line}\n" in said
    assert said.count("  added: flag 'new-") == 20
    assert redis.hash(FEATURES) == before


async def test_older_data_never_replace_newer_ones(upstream, redis):
    """Neither what is newer, nor what may be new because upstream is behind."""
    upstream.serve(SDK_KEY, all_data(flag(value="new", version=5), flag("added"), flag("b")))
    await Sync(upstream, redis).run()
    upstream.serve(SDK_KEY, all_data(flag(value="old", version=4), flag("b", version=2)))
    code, said = await Sync(upstream, redis).run()
    assert code == 0, said
    assert "0 added, 1 updated, 0 deleted; 2 newer than upstream left as they are" in said
    assert lamp(redis)["variations"][0] == "new"
    assert lamp(redis, "added")
    assert lamp(redis, "b")["version"] == 2


async def test_what_another_writer_does_meanwhile_stays(upstream, redis):
    """A newer item that appears between reading and writing is not lost."""
    await Sync(upstream, redis).run()
    upstream.serve(SDK_KEY, all_data(flag(version=2), flag("b"), segment()))

    async def race():
        for version in range(10, 60):
            redis.do("HSET", FEATURES, "lamp", json.dumps(flag(version=version)))
            await asyncio.sleep(0.01)

    racing = asyncio.create_task(race())
    while not racing.done():
        await Sync(upstream, redis).run()
    await racing
    assert lamp(redis)["version"] == 59
    assert lamp(redis, "b")


async def test_an_unusable_item_keeps_its_previous_version(upstream, redis):
    """One bad flag of upstream's removes nothing."""
    await Sync(upstream, redis).run()
    upstream.serve(SDK_KEY, all_data({**flag(version=2), "on": "yes"}, flag("b"), segment()))
    code, _ = await Sync(upstream, redis).run()
    assert code == 0
    assert lamp(redis)["version"] == 1
    assert lamp(redis, "b")


async def test_one_environment_can_be_chosen(upstream, redis):
    """The others are not touched, nor asked for."""
    both = {"LD_ENV_other": OTHER_KEY, "LD_PREFIX_main": "m", "LD_PREFIX_other": "o"}
    code, said = await Sync(upstream, redis, "--environment", "main", **both).run()
    assert code == 0, said
    assert lamp(redis, prefix="m")
    assert {r.headers["Authorization"] for r in upstream.requests} == {SDK_KEY}


async def test_one_failure_does_not_keep_the_others_back(upstream, redis):
    """The exit code is 1, and a refused key is not waited for."""
    both = {"LD_ENV_other": OTHER_KEY, "LD_PREFIX_main": "m", "LD_PREFIX_other": "o"}
    code, said = await Sync(upstream, redis, INIT_TIMEOUT="1h", **both).run()
    assert code == 1
    assert "main: brought up to date" in said
    assert (
        "other: failed: Upstream refuses the key: HTTP error 401 (invalid SDK key) (0 items" in said
    )
    assert lamp(redis, prefix="m")


async def test_data_come_from_a_running_relay(upstream, redis, tmp_path):
    """The command opens no new connection to LaunchDarkly."""
    variables = {"LD_ENV_main": SDK_KEY, "STREAM_URI": upstream.url}
    async with RelayProcess(tmp_path, **variables) as relay:
        await upstream.connected(SDK_KEY)
        async with asyncio.timeout(PATIENCE):
            while (await ask(relay.address, "/readyz")).status != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        code, said = await Sync(upstream, redis, "--from", relay.url).run()
    assert code == 0, said
    assert lamp(redis)["variations"][0] == "one"
    assert len(upstream.requests) == 1


async def test_upstream_that_does_not_answer_is_a_failure_in_time(upstream, redis):
    """Nothing is written."""
    upstream.always(SDK_KEY, stall)
    code, said = await Sync(upstream, redis, INIT_TIMEOUT="500ms").run()
    assert code == 1
    assert "main: failed: no answer from upstream in time" in said
    assert redis.do("DBSIZE") == 0


async def test_nonsense_of_upstream_is_said(upstream, redis):
    """And nothing is written."""
    upstream.always(SDK_KEY, body(b"no json", "application/json"))
    code, said = await Sync(upstream, redis, INIT_TIMEOUT="500ms").run()
    assert code == 1
    assert "main: failed: Error in poll" in said
    assert redis.do("DBSIZE") == 0


async def test_a_database_that_is_away_is_a_failure(upstream, redis):
    """Said with its address, without its password."""
    redis.kill()
    url = redis.url.replace("redis://", "redis://:hidden-password@")
    code, said = await Sync(upstream, redis, REDIS_URL=url).run()
    assert code == 1
    assert "main: failed: redis://:xxxxx@127.0.0.1" in said
    assert "hidden-password" not in said


@pytest.mark.parametrize(
    ("arguments", "variables", "wanted"),
    [
        (["--environment", "nope"], {}, 'there is no environment "nope"'),
        ([], {"USE_REDIS": "false"}, "there is no database to bring up to date"),
        (["--from", "ftp://relay"], {}, "must be a URL that begins with http:// or https://"),
        (["main"], {}, "unknown argument main"),
        (["--nope"], {}, "unknown argument --nope"),
        ([], {"POLL_INTERVAL": "soon"}, "POLL_INTERVAL"),
    ],
)
async def test_a_wrong_configuration_has_an_exit_code_of_its_own(
    upstream, redis, arguments, variables, wanted
):
    """Nothing is asked for, and nothing written."""
    code, said = await Sync(upstream, redis, *arguments, **variables).run()
    assert code == 2
    assert wanted in said
    assert not upstream.requests
