"""Big segments in DynamoDB: through a relay, in daemon mode, and ld-relay's scenes with them."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest
from ldclient import Context, LDClient
from ldclient.config import BigSegmentsConfig, Config
from ldclient.feature_store import CacheConfig
from ldclient.integrations import DynamoDB

from relay import clock
from relay.stores.dynamodb.bigsegments import LEASE
from tests.contract.test_big_segments import DATA, MOBILE_KEY, V1, evaluated, eventually, user
from tests.contract.test_big_segments import SDK_KEY as KEY
from tests.contract.test_golden_big_segments import CONTEXTS, POLL, SCENES, SDK_KEY, Scene
from tests.support.dynamodb import (
    VARIABLES,
    Table,
    aws_credentials,
    dynamodb,
    failure,
    proxy,
    table,
)
from tests.support.process import RelayProcess
from tests.support.sdk import Setup, make, sees
from tests.support.serving import ask
from tests.support.upstream import BIG_SEGMENTS, ScriptedUpstream, body, segment_patch

__all__ = ["aws_credentials", "dynamodb", "proxy", "table"]

METADATA = "p:big_segments_metadata"


def stored_items(table: Table) -> list[dict[str, Any]]:
    """Items of big segments in a table, but for the relays' own lease."""
    items = [each for each in table.items() if "big_segments_" in each["namespace"]["S"]]
    for item in items:
        if "synchronizedOn" in item:
            item["synchronizedOn"] = {"N": "<ms>"}
    return [
        {name: sorted(each["SS"]) if "SS" in each else each for name, each in item.items()}
        for item in items
    ]


def given(upstream: ScriptedUpstream, url: str, table: str, **more: str) -> dict[str, str]:
    """The relay's variables for these servers."""
    return {
        **VARIABLES,
        "LD_ENV_main": KEY,
        "LD_MOBILE_KEY_main": MOBILE_KEY,
        "LD_PREFIX_main": "p",
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_DYNAMODB": "true",
        "DYNAMODB_URL": url,
        "DYNAMODB_TABLE": table,
        **more,
    }


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        upstream.serve(KEY, DATA)
        upstream.patches[KEY] = [V1]
        yield upstream


def cursor(table: Table) -> str | None:
    stored = table.get(METADATA, METADATA)
    return stored["lastVersion"]["S"] if stored and "lastVersion" in stored else None


async def until(holds) -> None:
    """Wait until something is seen in the database."""
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def sdk_of(server_url: str, table: str, prefix: str, key: str = KEY) -> LDClient:
    """LaunchDarkly's SDK for Python in daemon mode, with its big segment store."""
    options = {"endpoint_url": server_url}
    store = DynamoDB.new_feature_store(table, prefix, options, caching=CacheConfig.disabled())
    members = BigSegmentsConfig(DynamoDB.new_big_segment_store(table, prefix, options))
    config = Config(key, feature_store=store, big_segments=members, use_ldd=True, send_events=False)
    return LDClient(config)


async def test_members_are_found(upstream, server, table, tmp_path):
    """Client-side evaluation, `/status` and metrics, as with Redis; a change is seen at once."""
    async with RelayProcess(tmp_path, **given(upstream, server.url, table.name)) as relay:
        await relay.said("Initialized LaunchDarkly client")
        await until(lambda: cursor(table) == "v1")
        await eventually(relay, "ann", "yes")
        flags = await evaluated(relay, user("ben"))
        assert (flags["member"]["value"], flags["org-member"]["value"]) == ("no", "no")
        await upstream.send_patches(KEY, segment_patch("team.g2", "v2", "v1", include=["ben"]))
        await eventually(relay, "ben", "yes")
        status = json.loads((await ask(relay.address, "/status")).body)["environments"]["main"]
        assert status["bigSegmentStatus"]["available"]
        assert status["bigSegmentStatus"]["lastSynchronizedOn"] > 0
        text = (await ask(relay.address, "/metrics")).body.decode()
        assert 'relay_big_segments_patches_total{environment="main"} 2' in text
        assert 'relay_big_segments_synchronizing{environment="main"} 1' in text


async def test_an_sdk_in_daemon_mode_finds_members(upstream, server, table, tmp_path):
    """LaunchDarkly's own big segment store reads what the relay has written."""
    async with RelayProcess(tmp_path, **given(upstream, server.url, table.name)) as relay:
        await relay.said("Initialized LaunchDarkly client")
        await until(lambda: "synchronizedOn" in (table.get(METADATA, METADATA) or {}))
        await until(lambda: table.get("p:$inited", "p:$inited"))
        sdk = await asyncio.to_thread(sdk_of, server.url, table.name, "p")
        try:
            for key, value in (("ann", "yes"), ("ben", "no")):
                detail = await asyncio.to_thread(
                    sdk.variation_detail, "member", Context.create(key), "?"
                )
                assert detail.value == value
                assert detail.reason["bigSegmentsStatus"] == "HEALTHY"
        finally:
            await asyncio.to_thread(sdk.close)


@pytest.mark.sdk
@pytest.mark.usefixtures("packages")
async def test_nodes_sdk_in_daemon_mode_finds_members(upstream, server, table, tmp_path):
    """That of the older line, whose big segment store is at hand."""
    async with RelayProcess(tmp_path, **given(upstream, server.url, table.name)) as relay:
        await relay.said("Initialized LaunchDarkly client")
        await until(lambda: "synchronizedOn" in (table.get(METADATA, METADATA) or {}))
        await until(lambda: table.get("p:$inited", "p:$inited"))
        setup = Setup(KEY, dynamodb=server.url, table=table.name, prefix="p")
        async with make("node7", setup) as sdk:
            await sees(sdk, "member", "yes", user("ann"))
            assert await sdk.value("member", user("ben"), "?") == "no"


async def test_a_database_that_throttles_is_waited_for(upstream, proxy, table, tmp_path):
    """Flags are evaluated without members meanwhile, and with them afterwards."""
    refused = failure("ProvisionedThroughputExceededException")
    async with RelayProcess(tmp_path, **given(upstream, proxy.url, table.name)) as relay:
        await relay.said("Initialized LaunchDarkly client")
        await eventually(relay, "ann", "yes")
        proxy.misbehave = lambda _operation, _body: refused
        await eventually(relay, "new", "no", "STORE_ERROR")
        proxy.misbehave = lambda _operation, _body: None
        await eventually(relay, "ann", "yes")
        await upstream.send_patches(KEY, segment_patch("team.g2", "v2", "v1", include=["ben"]))
        await eventually(relay, "ben", "yes")
        assert "Traceback" not in relay.log


@pytest.mark.timing
async def test_another_relay_takes_over(upstream, server, table, tmp_path):
    """One of two synchronises; when it ends the other one does, and loses nothing."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    variables = given(upstream, server.url, table.name)
    async with RelayProcess(folders[0], **variables) as one:
        await until(lambda: cursor(table) == "v1")
        await upstream.connected(BIG_SEGMENTS + KEY)
        async with RelayProcess(folders[1], **variables) as two:
            await two.said("another relay synchronizes; this one waits")
            one.signal(signal.SIGTERM)
            start = clock.monotonic()
            upstream.patches[KEY].append(segment_patch("team.g2", "v2", "v1", include=["ben"]))
            await until(lambda: cursor(table) == "v2")
            assert clock.monotonic() - start < LEASE / 2
            await eventually(two, "ben", "yes")
        await one.ended()


# Recordings


@pytest.mark.parametrize("name", [name for name in SCENES if name.startswith("DynamoDB")])
async def test_scenes_go_as_recorded(name, server, table, tmp_path):
    """Items, evaluations, status, and what an SDK reads, are those of ld-relay after each step."""
    scene = SCENES[name]
    prefix = scene["environment variables"].get("LD_PREFIX_alpha", "")
    first = scene["steps"][0]
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, flags_put(first, f"{prefix}:" if prefix else ""))
        play = Scene(upstream, lambda: stored_items(table))
        play.know(first)
        if not play.patches[0]["version"]:  # the first poll is told from the others by its turn
            answer = json.dumps(upstream.patches.pop(SDK_KEY)).encode()
            upstream.script_path(POLL, body(answer, "application/json"))
        own = {
            "DYNAMODB_URL": server.url,
            "DYNAMODB_TABLE": table.name,
            "STREAM_URI": upstream.url,
            "BASE_URI": upstream.url,
        }
        variables = {**VARIABLES, **scene["environment variables"], **own}
        async with RelayProcess(tmp_path, **variables) as relay:
            await relay.said("Initialized LaunchDarkly client", 0)
            for step in scene["steps"]:
                play.know(step)
                if sent := step.get("sent"):
                    await upstream.raw(BIG_SEGMENTS + SDK_KEY, sent["text"].encode())
                await play.compare(relay, step)
                if recorded := step.get("python SDK"):
                    await compare_sdk(recorded["evaluations"], server.url, table.name)


async def compare_sdk(recorded: dict[str, Any], url: str, table: str) -> None:
    """See that LaunchDarkly's SDK evaluates as it did with what ld-relay had written."""
    sdk = await asyncio.to_thread(sdk_of, url, table, "big")
    compared = 0
    for name, flags in recorded.items():
        if context := CONTEXTS.get(name):
            for flag, expected in flags.items():
                detail = await asyncio.to_thread(
                    sdk.variation_detail, flag, Context.from_dict(context), "?"
                )
                found = detail.value, detail.variation_index, detail.reason
                assert found == tuple(expected.values()), (name, flag)
                compared += 1
    assert compared >= 24
    await asyncio.to_thread(sdk.close)


def flags_put(step: dict[str, Any], start: str) -> str:
    """The data set of a scene, as ld-relay wrote it."""
    [items] = step["dynamodb"].values()
    kinds = {f"{start}features": "flags", f"{start}segments": "segments"}
    data: dict[str, dict[str, Any]] = {"flags": {}, "segments": {}}
    for each in items:
        if kind := kinds.get(each["namespace"]["S"]):
            data[kind][each["key"]["S"]] = json.loads(each["item"]["S"])
    return json.dumps(data)
