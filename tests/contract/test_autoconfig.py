"""A relay as people run it, whose environments come from a scripted LaunchDarkly."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support import environments
from tests.support import upstream as answers
from tests.support.clients import client
from tests.support.data import all_data, flag
from tests.support.environments import description, environment_list, payload_filter
from tests.support.process import RelayProcess
from tests.support.sdk import SOMEBODY, Setup, make, sees
from tests.support.serving import Address, Stream, ask, until
from tests.support.upstream import ScriptedUpstream, filtered

KEY = "rel-5ca1ab1e-0001-4000-8000-00000000c001"
AUTH = ("Authorization", "sdk-alpha-1")
NO_LIST = b"Relay Proxy is not yet fully initialized, does not have list of environments yet"


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        upstream.serve(KEY, environment_list(description()))
        for number in (1, 2, 3):
            for name in ("alpha", "beta"):
                upstream.serve(f"sdk-{name}-{number}", all_data(flag("lamp", value=name)))
        yield upstream


def relay(folder: Path, upstream: ScriptedUpstream, **variables: str) -> RelayProcess:
    settings = {"AUTO_CONFIG_KEY": KEY, "STREAM_URI": upstream.url} | variables
    return RelayProcess(folder, **settings)


async def status(address: Address, key: str, path: str = "/sdk/latest-all") -> int:
    return (await ask(address, path, [("Authorization", key)])).status


async def page(address: Address, path: str = "/status") -> dict:
    return json.loads((await ask(address, path)).body)


def rotated(version: int, key: int, old: int, seconds: float) -> dict:
    """A description with a new SDK key; the old one lasts some seconds."""
    expiring = {"value": f"sdk-alpha-{old}", "timestamp": int((time.time() + seconds) * 1000)}
    new = {"value": f"sdk-alpha-{key}", "expiring": expiring}
    return description("alpha", version, sdkKey=new)


async def test_until_the_list_is_known_no_credential_is_unknown(tmp_path, upstream):
    """503 for all, as SDKs give up for good on 401; a refused key is tried again."""
    upstream.always(KEY, answers.status(401))
    async with relay(tmp_path, upstream) as process:
        await process.said("Invalid auto-configuration key; cannot get environments")
        for path in (
            "/sdk/latest-all",
            "/all",
            "/msdk/evalx/contexts/e30",
            "/bulk",
            "/sdk/goals/x",
        ):
            reply = await ask(process.address, path, [("Authorization", "sdk-alpha-1")])
            if path == "/bulk":
                assert reply.status == 405
                continue
            assert (reply.status, reply.body) == (503, NO_LIST), path
        reply = await ask(process.address, "/bulk", method="POST", body=b"[{}]")
        assert (reply.status, reply.body) == (503, NO_LIST)
        shown = await page(process.address)
        assert (shown["status"], shown["environments"]) == ("degraded", {})
        assert shown["autoConfigStatus"]["state"] == "OFF"
        assert shown["autoConfigStatus"]["lastError"]["statusCode"] == 401
        for path in ("/startupz", "/readyz", "/status/id-alpha"):
            assert (await ask(process.address, path)).status == 503
        upstream.always(KEY, None)
        await process.said("Finished processing auto-configuration data")
        await process.said("Initialized LaunchDarkly client for")
        assert await status(process.address, "sdk-alpha-1") == 200
        assert await status(process.address, "sdk-unknown") == 401
        assert (await ask(process.address, "/readyz")).status == 200
        assert (await page(process.address))["autoConfigStatus"]["state"] == "VALID"
        for name in ("id-alpha", "proj/alpha", "Project%20Alpha"):
            assert (await page(process.address, f"/status/{name}"))["envId"] == "id-alpha"
        assert (await ask(process.address, "/status/proj/beta")).status == 404
        assert KEY not in process.log


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "polling"])
@pytest.mark.parametrize("name", ["python", "node9"])
async def test_an_sdk_goes_through_a_rotation(tmp_path, upstream, name, stream):
    """An SDK with the old key sees changes until that expires; one with the new key sees all."""

    def setup(key: str, url: str) -> Setup:
        return Setup(key, url, stream=stream, poll_interval=0.1)

    async with relay(tmp_path, upstream) as process:
        await process.said("Initialized LaunchDarkly client for")
        async with make(name, setup("sdk-alpha-1", process.url)) as old:
            await old.ready()
            upstream.serve("sdk-alpha-2", all_data(flag("lamp", 2, value="second")))
            await upstream.raw(KEY, environments.patch(rotated(2, 2, 1, 4.0)))
            await sees(old, "lamp", "second")
            await upstream.left("sdk-alpha-1")
            async with make(name, setup("sdk-alpha-2", process.url)) as new:
                await new.ready()
                await upstream.patch("sdk-alpha-2", flag("lamp", 3, value="third"))
                for sdk in (old, new):
                    await sees(sdk, "lamp", "third")
                lines = (await ask(process.address, "/metrics")).body.decode().splitlines()
                assert 'relay_environments{state="VALID"} 1' in lines
                assert 'relay_autoconfig_state{state="VALID"} 1' in lines
                assert 'relay_autoconfig_changes_total{change="rotated"} 1' in lines
                label = 'relay_key_expires_in_seconds{environment="id-alpha",kind="SDK key"} '
                assert any(line.startswith(label) for line in lines)
                await process.said("has expired and is no longer valid for authentication")
                assert await status(process.address, "sdk-alpha-1") == 401
                await upstream.patch("sdk-alpha-2", flag("lamp", 4, value="fourth"))
                await sees(new, "lamp", "fourth")
                assert await old.value("lamp") == "third"
        assert (await page(process.address))["status"] == "healthy"


async def test_a_browser_does_not_notice_a_rotation(tmp_path, upstream):
    """Its client-side ID stays, and so does its stream, while two SDK keys come and go."""

    def lamp(version: int, value: str) -> dict:
        return {**flag("lamp", version, value=value), "clientSide": True}

    upstream.serve("sdk-alpha-1", all_data(lamp(1, "first")))
    async with relay(tmp_path, upstream, EVAL_STREAMS="true") as process:
        await process.said("Initialized LaunchDarkly client for")
        async with client("v4", "id-alpha", process.url, SOMEBODY, tmp_path) as browser:
            await browser.ready()
            await sees(browser, "lamp", "first")
            for key, value in ((2, "second"), (3, "third")):
                upstream.serve(f"sdk-alpha-{key}", all_data(lamp(key, value)))
                await upstream.raw(KEY, environments.patch(rotated(key, key, key - 1, 0.5)))
                await sees(browser, "lamp", value)
                await process.said("has expired and is no longer valid for authentication", key - 1)
            await upstream.patch("sdk-alpha-3", lamp(9, "ninth"))
            await sees(browser, "lamp", "ninth")
            shown = await page(process.address, "/status/id-alpha")
            assert (shown["streams"], shown["newStreams"]) == (1, 1)


async def test_a_rotation_under_load_has_no_error(tmp_path, upstream):
    """Polls with both keys get 200 throughout; streams with other credentials notice nothing."""
    async with relay(tmp_path, upstream) as process:
        await process.said("Initialized LaunchDarkly client for")
        statuses: Counter[int] = Counter()
        going = True

        async def poll(key: str) -> None:
            while going:
                statuses[await status(process.address, key)] += 1

        old = await Stream.open(process.address, key="sdk-alpha-1")
        mobile = await Stream.open(process.address, "/mping", key="mob-alpha-key")
        await old.until(b"\n\n")
        await mobile.until(b"\n\n")
        polls = [asyncio.create_task(poll("sdk-alpha-1"))]
        await upstream.raw(KEY, environments.patch(rotated(2, 2, 1, 60.0)))
        await process.said("New primary SDK key")
        polls.append(asyncio.create_task(poll("sdk-alpha-2")))
        await upstream.left("sdk-alpha-1")
        before = statuses[200]
        await until(lambda: statuses[200] > before + 100)
        going = False
        await asyncio.gather(*polls)
        assert set(statuses) == {200}
        await upstream.raw(KEY, environments.patch(description("alpha", 3, 3)))
        await process.said("SDK key ...ha-2 has been immediately revoked")
        await upstream.connected("sdk-alpha-3")
        await upstream.patch("sdk-alpha-3", flag("lamp", 9))
        for stream in (old, mobile):  # the grace period of the first key goes on
            assert await stream.until(b"\n\n")
            stream.close()


async def test_secure_mode_goes_through_a_rotation(tmp_path, upstream):
    """Contexts may be signed with the former key until it expires, and with the present one."""
    context = base64.urlsafe_b64encode(b'{"kind":"user","key":"anna"}').decode()

    async def signed(number: int) -> int:
        key = f"sdk-alpha-{number}".encode()
        proof = hmac.new(key, b"anna", hashlib.sha256).hexdigest()
        path = f"/sdk/evalx/id-alpha/contexts/{context}?h={proof}"
        return (await ask(process.address, path)).status

    upstream.serve(KEY, environment_list(description(secureMode=True)))
    async with relay(tmp_path, upstream) as process:
        await process.said("Initialized LaunchDarkly client for")
        assert [await signed(number) for number in (1, 2)] == [200, 400]
        change = {**rotated(2, 2, 1, 2.0), "secureMode": True}
        await upstream.raw(KEY, environments.patch(change))
        await process.said("New primary SDK key")
        assert [await signed(number) for number in (1, 2, 3)] == [200, 200, 400]
        await process.said("has expired and is no longer valid for authentication")
        assert [await signed(number) for number in (1, 2)] == [400, 200]


async def test_data_survive_rotation_and_restart(tmp_path, upstream):
    """They belong to the environment and not to its key, in the snapshot as well."""
    settings = {"SNAPSHOT_DIR": str(tmp_path / "snapshots")}
    async with relay(tmp_path, upstream, **settings) as process:
        await process.said("Initialized LaunchDarkly client for")
        await upstream.raw(KEY, environments.patch(description("alpha", 2, 2)))
        await process.said("The new SDK key is used upstream")
        await process.stop()
    upstream.serve(KEY, environment_list(description("alpha", 2, 2)))
    upstream.always("sdk-alpha-2", answers.status(503))
    async with relay(tmp_path, upstream, **settings) as process:
        await process.said("Serving stored data")
        assert await status(process.address, "sdk-alpha-2") == 200


async def test_each_environment_has_its_prefix(tmp_path, upstream, redis):
    """`$CID` stands for the ID; the data of a removed environment stay in the database."""
    upstream.serve(KEY, environment_list(description(), description("beta")))
    settings = {"USE_REDIS": "1", "REDIS_URL": redis.url, "ENV_DATASTORE_PREFIX": "ac-$CID"}
    async with relay(tmp_path, upstream, **settings) as process:
        for name in ("alpha", "beta"):
            key = f"ac-id-{name}:features"
            await process.until(lambda key=key: "lamp" in redis.hash(key))
        shown = await page(process.address)
        assert shown["environments"]["id-beta"]["dataStoreStatus"]["dbPrefix"] == "ac-id-beta"
        await upstream.raw(KEY, environments.delete("beta", 2))
        await process.said("Removed environment id-beta")
        assert await status(process.address, "sdk-beta-1") == 401
        assert "lamp" in redis.hash("ac-id-beta:features")


@pytest.mark.parametrize(("refused", "code"), [(False, 0), (True, 1)])
async def test_one_shot_mode(tmp_path, upstream, redis, refused, code):
    """It waits for the list and the data of its environments; a refused key is a failure."""
    if refused:
        upstream.always(KEY, answers.status(401))
    settings = {"USE_REDIS": "1", "REDIS_URL": redis.url, "ENV_DATASTORE_PREFIX": "ac-$CID"}
    settings |= {"EXIT_ALWAYS": "1", "INIT_TIMEOUT": "2s"}
    process = relay(tmp_path, upstream, **settings)
    await process.spawn()
    assert await process.ended() == code
    assert ("lamp" in redis.hash("ac-id-alpha:features")) is not refused


async def test_environments_outlive_the_stream(tmp_path, upstream):
    """Whatever becomes of the stream or the key, what is known is served, and a new list counts."""
    async with relay(tmp_path, upstream) as process:
        await process.said("Initialized LaunchDarkly client for")
        upstream.script(KEY, answers.half_a_put("{}"), answers.status(403))
        upstream.serve(KEY, environment_list(description("beta")))
        upstream.close_streams(KEY)
        await process.said("Invalid auto-configuration key")
        assert await status(process.address, "sdk-alpha-1") == 200
        assert (await page(process.address))["autoConfigStatus"]["state"] == "OFF"
        await process.said('Initialized LaunchDarkly client for "Project Beta"')
        assert await status(process.address, "sdk-alpha-1") == 401
        assert await status(process.address, "sdk-beta-1") == 200
        await upstream.raw(KEY, environments.put())
        await process.said("Removed environment id-beta")
        assert (await page(process.address))["status"] == "healthy"


async def test_a_hundred_environments_of_which_three_are_refused(tmp_path, upstream):
    """The others are served, and `/status` says which are not."""
    names = [f"e{n}" for n in range(100)]
    for name in names[3:]:
        upstream.serve(f"sdk-{name}-1", all_data(flag("lamp", value=name)))
    upstream.serve(KEY, environment_list(*map(description, names)))
    async with relay(tmp_path, upstream) as process:
        await process.said("Initialized LaunchDarkly client for", 97)
        assert {await status(process.address, f"sdk-{name}-1") for name in names[3:]} == {200}
        assert await status(process.address, "sdk-e0-1") == 503
        shown = await page(process.address)
        assert shown["status"] == "degraded"
        states = Counter(each["status"] for each in shown["environments"].values())
        assert states == {"connected": 97, "disconnected": 3}


async def test_filters_that_launchdarkly_names(tmp_path, upstream):
    """Each has its data, `/status` entry and snapshot, and is gone when LaunchDarkly takes it back."""
    upstream.serve(KEY, environment_list(description(), filters={"f": payload_filter("north")}))
    upstream.serve(filtered("sdk-alpha-1", "north"), all_data(flag("lamp", value="north")))
    settings = {"SNAPSHOT_DIR": str(tmp_path / "snapshots")}
    async with relay(tmp_path, upstream, **settings) as process:
        await process.said("Initialized LaunchDarkly client for", 2)
        stream = await Stream.open(process.address, "/all?filter=north", key="sdk-alpha-1")
        assert b"north" in await stream.until(b"\n\n")
        assert (await ask(process.address, "/sdk/latest-all", [AUTH])).body.count(b"north") == 0
        shown = await page(process.address)
        assert sorted(shown["environments"]) == ["id-alpha", "id-alpha/north"]
        variant = await page(process.address, "/status/proj/alpha/filters/north")
        assert variant["status"] == "connected"
        await upstream.raw(KEY, environments.delete_filter("f", 2))
        await process.said("Removed environment id-alpha/north (Project Alpha (north))")
        await stream.rest()
        stream.close()
        assert await status(process.address, "sdk-alpha-1", "/sdk/latest-all?filter=north") == 404
        assert await status(process.address, "sdk-alpha-1") == 200
        await process.stop()
    assert len([*(tmp_path / "snapshots").glob("environment-*.snapshot")]) == 2


async def test_sdks_read_the_variant_of_a_filter(tmp_path, upstream, redis):
    """LaunchDarkly's Python SDK, with a filter key through the relay and in daemon mode."""
    upstream.serve(KEY, environment_list(description(), filters={"f": payload_filter("north")}))
    upstream.serve(filtered("sdk-alpha-1", "north"), all_data(flag("lamp", value="north")))
    settings = {"USE_REDIS": "1", "REDIS_URL": redis.url, "ENV_DATASTORE_PREFIX": "ac-$CID"}
    async with relay(tmp_path, upstream, **settings) as process:
        await process.said("Initialized LaunchDarkly client for", 2)
        through = Setup("sdk-alpha-1", process.url, payload_filter="north")
        async with make("python", through) as sdk:
            await sdk.ready()
            await sees(sdk, "lamp", "north")
            await upstream.patch(filtered("sdk-alpha-1", "north"), flag("lamp", 2, value="cold"))
            await sees(sdk, "lamp", "cold")
        prefixes = {"alpha": "ac-id-alpha", "cold": "ac-id-alpha.north"}
        for value, prefix in prefixes.items():
            async with make("python", Setup("sdk-x", redis=redis.url, prefix=prefix)) as sdk:
                await sdk.ready()
                await sees(sdk, "lamp", value)
