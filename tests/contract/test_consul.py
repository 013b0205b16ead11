"""Consul as its operators and the SDKs in daemon mode meet it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import pytest
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.feature_store import CacheConfig
from ldclient.impl.integrations.consul import consul_feature_store
from ldclient.integrations import Consul

from relay.environment import Environment
from relay.model.credential import SDKKey, Secret
from relay.model.environment import EnvironmentSpec
from relay.protocol.fdv1 import AllFormat
from relay.sources.streaming import StreamingSource
from relay.stores.conflicts import ConflictTimings
from relay.stores.mirror import DatabaseMirror, MirrorTimings
from relay.streams.hub import Hub
from relay.upstream import Upstream
from tests.support.consul import ConsulServer, store_in
from tests.support.data import all_data, flag, segment
from tests.support.process import PATIENCE, RelayProcess
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream

WHOLE = {"launchdarkly/$inited", "launchdarkly/$relay", "launchdarkly/features/lamp",
         "launchdarkly/features/gone", "launchdarkly/segments/crowd"}  # fmt: skip
LAMP = "launchdarkly/features/lamp"

QUICK = MirrorTimings(
    probe=0.05,
    compare=0.1,
    conflicts=ConflictTimings(second_look=0.05, refresh=0.2, newer=0.3, extra=0.3),
)


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with two flags and a segment."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), flag("gone"), segment()))
        yield upstream


@pytest.fixture
async def consul() -> AsyncIterator[ConsulServer]:
    async with ConsulServer() as server:
        yield server


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what is seen in the database only."""
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def variables(upstream: ScriptedUpstream, consul: ConsulServer, **more: str) -> dict[str, str]:
    """The relay's variables for these servers."""
    given = {
        "LD_ENV_main": SDK_KEY,
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_CONSUL": "true",
        "CONSUL_HOST": consul.address,
        "INIT_TIMEOUT": "10s",
    }
    return {**given, **more}


@asynccontextmanager
async def keeping(
    upstream: ScriptedUpstream, consul: ConsulServer, **options: Any
) -> AsyncGenerator[DatabaseMirror, None]:
    """Keep the database as a relay does, with short times."""
    log = logging.getLogger("main")
    spec = EnvironmentSpec("main", SDKKey(SDK_KEY))
    async with Upstream() as session:
        source = StreamingSource(session, upstream.url, spec.sdk_key, log)
        store = store_in(consul.address, "", **options)
        mirror = DatabaseMirror(store, "consul", source.resync, log, QUICK)
        environment = Environment(spec, source, Hub({"all": AllFormat()}), log, [mirror])
        running = asyncio.create_task(environment.run())
        yield mirror
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


class SmallestClient:
    """The part of the unmaintained package `python-consul` that LaunchDarkly's SDK needs."""

    def __init__(self, host: str, port: int) -> None:
        self.kv = self
        self._url = f"http://{host}:{port}/v1/kv/"

    def get(self, key: str, recurse: bool = False) -> tuple[str | None, Any]:
        url = self._url + urllib.parse.quote(key) + ("?recurse=1" if recurse else "")
        try:
            with urllib.request.urlopen(url) as answer:
                pairs = json.load(answer)
        except urllib.error.HTTPError as e:
            if e.code != HTTPStatus.NOT_FOUND:
                raise
            return None, None
        for pair in pairs:
            pair["Value"] = base64.b64decode(pair["Value"]) if pair["Value"] else None
        return None, pairs if recurse else pairs[0]


async def test_an_sdk_in_daemon_mode_reads_what_the_relay_writes(
    upstream, consul, tmp_path, monkeypatch
):
    """LaunchDarkly's SDK for Python: first data, a change, a deletion."""
    monkeypatch.setattr(consul_feature_store, "have_consul", True)
    client = type("consul", (), {"Consul": SmallestClient})
    monkeypatch.setattr(consul_feature_store, "consul", client, raising=False)
    anna = Context.create("anna")

    def values(sdk: LDClient) -> tuple[Any, Any]:
        return sdk.variation("lamp", anna, None), sdk.variation("gone", anna, None)

    async def sees(sdk: LDClient, expected: tuple[Any, Any]) -> None:
        async with asyncio.timeout(PATIENCE):
            while await asyncio.to_thread(values, sdk) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async with RelayProcess(tmp_path, **variables(upstream, consul)):
        await eventually(lambda: "launchdarkly/$inited" in consul.values)
        store = Consul.new_feature_store("localhost", consul.port, caching=CacheConfig.disabled())
        config = Config(SDK_KEY, feature_store=store, use_ldd=True, send_events=False)
        sdk = await asyncio.to_thread(LDClient, config)
        await sees(sdk, ("one", True))
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await sees(sdk, ("two", True))
        await upstream.delete(SDK_KEY, "/flags/gone", 2)
        await sees(sdk, ("two", None))
        await asyncio.to_thread(sdk.close)


# Faults


async def test_what_is_lost_is_written_again(upstream, consul, caplog):
    """All keys, the marker alone, or all items."""
    async with keeping(upstream, consul):
        await eventually(lambda: consul.values.keys() == WHOLE)
        for lost in (WHOLE, {"launchdarkly/$inited"}, {key for key in WHOLE if "$" not in key}):
            for key in lost:
                del consul.values[key]
            await eventually(lambda: consul.values.keys() == WHOLE)
    assert sum("has lost its data" in text for text in caplog.messages) == 2


async def test_an_older_backup_is_brought_up_to_date(upstream, consul):
    """Versions of the backup that are older, items that it lacks, and the note in it."""
    async with keeping(upstream, consul):
        await eventually(lambda: consul.values.keys() == WHOLE)
        backup = dict(consul.values)
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await upstream.patch(SDK_KEY, flag("new"))
        await eventually(lambda: "launchdarkly/features/new" in consul.values)
        await eventually(lambda: consul.item(LAMP)["version"] == 2)
        consul.values = backup
        await eventually(lambda: consul.values.keys() == {*WHOLE, "launchdarkly/features/new"})
        await eventually(lambda: consul.item(LAMP)["version"] == 2)


async def test_what_another_project_left_is_replaced(upstream, consul, caplog):
    """After upstream was asked for everything twice."""
    items = {"features/lamp": flag(version=99), "features/stray": flag("stray")}
    consul.values |= {f"launchdarkly/{k}": json.dumps(v).encode() for k, v in items.items()}
    consul.values |= {"launchdarkly/$inited": b""}
    async with keeping(upstream, consul):
        await eventually(lambda: consul.values.keys() == WHOLE)
        await eventually(lambda: consul.item(LAMP)["version"] == 1)
    assert any("have replaced it" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        (("refuse", "admit"), "ACL not found (Consul does not know the token"),
        (("leaderless", "led"), "500: No cluster leader (Consul's servers cannot elect a leader"),
        (("down", "up"), "cannot connect to localhost"),
        (("silent", "answering"), "no answer in time"),
    ],
)
async def test_an_outage_is_said_once_and_ends(  # noqa: PLR0917
    upstream, consul, caplog, monkeypatch, states, reason
):
    """Changes meanwhile are written when it is over; nothing else is lost."""
    monkeypatch.setattr("relay.stores.consul.client.READ_TIMEOUT", 0.2)
    consul.policies = {"geheim": ("launchdarkly/",)}

    async def switch(state: str) -> None:
        consul.policies = {"other" if state == "refuse" else "geheim": ("launchdarkly/",)}
        consul.failure = (500, "No cluster leader") if state == "leaderless" else None
        match state:
            case "down":
                await consul.stop()
            case "up":
                await consul.start()
            case "silent":
                consul.pause()
            case _:
                consul.go_on()

    async with keeping(upstream, consul, token=Secret("geheim")) as mirror:
        await eventually(lambda: consul.values.keys() == WHOLE)
        await switch(states[0])
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await eventually(lambda: mirror.status.state.value == "INTERRUPTED")
        await switch(states[1])
        await eventually(lambda: consul.item(LAMP)["version"] == 2)
        await eventually(lambda: mirror.status.state.value == "VALID")
    [line] = [text for text in caplog.messages if "is unavailable" in text]
    assert f"Consul data store {consul.address} is unavailable: " in line
    assert reason in line
    assert "geheim" not in caplog.text


async def test_consul_away_at_the_start(upstream, consul, tmp_path):
    """The relay serves; the database is filled when it is there."""
    await consul.stop()
    async with RelayProcess(tmp_path, **variables(upstream, consul)) as relay:
        await relay.said("is unavailable: cannot connect")
        headers = [("Authorization", SDK_KEY)]
        assert (await ask(relay.address, "/sdk/flags/lamp", headers)).status == 200
        await consul.start()
        await eventually(lambda: consul.values.keys() == WHOLE)


async def test_an_item_over_the_limit_is_served_and_reported(upstream, consul, tmp_path):
    """All others are stored, and once it is small enough it is stored, too."""
    big = flag("big", value="x" * 600_000)
    upstream.serve(SDK_KEY, all_data(flag(), big))
    async with RelayProcess(tmp_path, **variables(upstream, consul)) as relay:
        await relay.said('cannot hold a flag "big": it has 600')
        await eventually(lambda: "launchdarkly/$inited" in consul.values)
        assert LAMP in consul.values
        assert "launchdarkly/features/big" not in consul.values
        headers = [("Authorization", SDK_KEY)]
        assert (await ask(relay.address, "/sdk/flags/big", headers)).status == 200
        await upstream.patch(SDK_KEY, flag("big", version=2))
        await eventually(lambda: "launchdarkly/features/big" in consul.values)
        assert "is unavailable" not in relay.log


# Runs that end


async def test_relay_sync_brings_consul_up_to_date(upstream, consul, tmp_path):
    """First all, then nothing; without a database the message names it."""
    given = variables(upstream, consul)
    for expected in ("3 added, 0 updated, 0 deleted (3 items upstream)", "main: is up to date"):
        sync = RelayProcess(tmp_path, "sync", "--from-env", **given)
        await sync.spawn()
        assert await sync.ended() == 0, sync.log
        assert expected in sync.log
    assert consul.values.keys() >= WHOLE - {"launchdarkly/$relay"}
    del given["USE_CONSUL"]
    sync = RelayProcess(tmp_path, "sync", "--from-env", **given)
    await sync.spawn()
    assert await sync.ended() == 2
    assert "USE_REDIS, USE_CONSUL or USE_DYNAMODB names one" in sync.log


async def test_a_one_shot_run_fills_consul_or_fails(upstream, consul, tmp_path):
    """`EXIT_ALWAYS`, as functions and jobs use it."""
    given = variables(upstream, consul, EXIT_ALWAYS="true", INIT_TIMEOUT="2s")
    relay = RelayProcess(tmp_path, **given)
    await relay.spawn()
    assert await relay.ended() == 0, relay.log
    assert consul.values.keys() >= WHOLE - {"launchdarkly/$relay"}
    consul.failure = 403, "ACL not found"
    await relay.spawn()
    assert await relay.ended() == 1, relay.log
