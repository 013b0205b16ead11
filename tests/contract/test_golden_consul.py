"""Scenes of ld-relay with Consul, played again with this relay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from relay.config.load import load
from relay.config.types import consul_url
from relay.errors import ConfigError
from relay.stores.consul.connect import connect
from relay.stores.consul.store import ConsulStore
from tests.support.consul import ConsulServer, recordings
from tests.support.process import PATIENCE, RelayProcess
from tests.support.serving import ask
from tests.support.upstream import ScriptedUpstream, status

SCENES = recordings()
SCRIPTS = ["with prefix golden", "without prefix"]
CLIENT = "LD_CLIENT_SIDE_ID_alpha"


@pytest.fixture
async def consul() -> AsyncIterator[ConsulServer]:
    async with ConsulServer() as server:
        yield server


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


def steps_of(scene: str) -> dict[str, dict[str, Any]]:
    """The steps of a scene, by name."""
    return {step["step"]: step for step in SCENES[scene]["steps"]}


def relay_of(
    scene: str, upstream: ScriptedUpstream, consul: ConsulServer, folder: Any
) -> RelayProcess:
    """The relay of a scene, with these servers in the place of those that were recorded."""
    given = SCENES[scene]["environment variables"]
    servers = {"CONSUL_HOST": consul.address, "STREAM_URI": upstream.url}
    return RelayProcess(folder, **{**given, **servers})


def key_of(scene: str) -> str:
    key: str = SCENES[scene]["environment variables"]["LD_ENV_alpha"]
    return key


def put_of(keys: dict[str, str]) -> str:
    """A put of what is in a database."""
    data: dict[str, dict[str, Any]] = {"features": {}, "segments": {}}
    for key, text in keys.items():
        match key.split("/"):
            case [_, ("features" | "segments") as kind, name]:
                data[kind][name] = json.loads(text)
    return json.dumps({"flags": data["features"], "segments": data["segments"]})


def content(keys: dict[str, bytes] | dict[str, str]) -> dict[str, Any]:
    """Keys with what matters of their values, but for the relay's own note."""
    result: dict[str, Any] = {}
    for key, text in keys.items():
        if key.endswith("/$relay"):
            continue
        value = json.loads(text) if text else ""
        deleted = isinstance(value, dict) and value.get("deleted")
        on = value.get("on") if isinstance(value, dict) else value
        result[key] = (value["version"], deleted) if deleted else on
        if isinstance(value, dict) and not deleted:
            result[key] = (value["version"], value.get("on"), value.get("variations"))
    return result


async def eventually(consul: ConsulServer, holds: Callable[[], bool]) -> None:
    """Wait for what is seen in the database only."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(content(consul.values)) from None


@pytest.mark.parametrize("scene", SCRIPTS)
async def test_the_same_messages_lead_to_the_same_keys(scene, upstream, consul, tmp_path):
    """But for the keys of another prefix, which ld-relay deletes; and for their order."""
    prefix = scene.partition("prefix ")[2] or "launchdarkly"
    foreign = {f"{prefix}-eu/features/foreign": b'{"key":"foreign","version":1}'}
    consul.values |= {f"{prefix}/features/stale": b'{"key":"stale","version":1}', "unrelated": b"1"}
    consul.values |= foreign
    first, *others = SCENES[scene]["steps"]
    upstream.serve(key_of(scene), put_of(first["keys"]))
    async with relay_of(scene, upstream, consul, tmp_path) as relay:
        await eventually(
            consul, lambda: content(consul.values) == content({**first["keys"], **foreign})
        )
        for step in others[:-1]:
            if "sent" in step:
                await upstream.raw(key_of(scene), step["sent"]["text"].encode())
            expected = content({**step["keys"], **foreign})
            await eventually(consul, lambda expected=expected: content(consul.values) == expected)
        assert await relay.stop() == 0
        upstream.always(key_of(scene), status(503))
        await relay.start()
        asked = [("Authorization", key_of(scene))]
        async with asyncio.timeout(PATIENCE):
            while (answer := await ask(relay.address, "/sdk/flags", headers=asked)).status == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # it has not read the database yet
        [recorded] = [a for a in others[-1]["answers"] if a["ask"] == "GET /sdk/flags"]
        assert answer.status == recorded["status"]
        ours, theirs = json.loads(answer.body), json.loads(recorded["body"])
        assert {k: v["version"] for k, v in ours.items()} == {
            k: v["version"] for k, v in theirs.items()
        }


async def test_another_writer_in_between(upstream, consul, tmp_path):
    """The newer version stays, whichever it is."""
    scene = "another writer in between"
    first, *others = SCENES[scene]["steps"]
    upstream.serve(key_of(scene), put_of(first["keys"]))
    async with relay_of(scene, upstream, consul, tmp_path):
        await eventually(consul, lambda: content(consul.values) == content(first["keys"]))
        for step, version in zip(others, (30, 60), strict=True):
            theirs = json.dumps({"key": "beta", "version": version, "on": True}).encode()
            consul.before_write = lambda theirs=theirs: consul.values.update(
                {"golden/features/beta": theirs}
            )
            await upstream.raw(key_of(scene), step["sent"]["text"].encode())
            expected = json.loads(step["keys"]["golden/features/beta"])["version"]
            await eventually(
                consul,
                lambda expected=expected: (
                    consul.before_write is None
                    and consul.item("golden/features/beta").get("version") == expected
                ),
            )


async def test_more_than_one_transaction_holds(upstream, consul, tmp_path):
    """Data that ld-relay never gets in, 900 KB in 30 flags, are stored as well."""
    scene = "more than 64 operations, more than 512 KiB"
    first, second = SCENES[scene]["steps"]
    flags = {f"f{n:03}": {"key": f"f{n:03}", "version": 1, "variations": ["x"]} for n in range(100)}
    flags["where"] = json.loads(first["keys"]["golden/features/where"])
    upstream.serve(key_of(scene), json.dumps({"flags": flags, "segments": {}}))
    async with relay_of(scene, upstream, consul, tmp_path) as relay:
        await eventually(consul, lambda: "golden/$inited" in consul.values)
        assert {key for key in consul.values if "/features/" in key} == {
            f"golden/features/{key}" for key in flags
        }
        large = {
            f"g{n:03}": {"key": f"g{n:03}", "version": 1, "variations": ["x" * 30_000]}
            for n in range(30)
        }
        await upstream.put(key_of(scene), json.dumps({"flags": large, "segments": {}}))
        await eventually(
            consul,
            lambda: (
                {key for key in consul.values if "/features/" in key}
                == {f"golden/features/{key}" for key in large}
            ),
        )
        assert "is unavailable" not in relay.log
    assert any(each["status"] == 413 for each in second["requests to the database"])
    assert not any(each.status == 413 for each in consul.asked)
    assert len(upstream.requests) == 1


async def test_down_and_up_again(upstream, consul, tmp_path):
    """Meanwhile flags are served from memory, and upstream's stream stays."""
    scene = "down and up again"
    steps = SCENES[scene]["steps"]
    upstream.serve(key_of(scene), put_of(steps[1]["keys"]))
    consul.failure = 500, "No cluster leader"
    asked = [("Authorization", key_of(scene))]

    async def served(relay: RelayProcess) -> int:
        answer = await ask(relay.address, "/sdk/flags/where", headers=asked)
        version: int = json.loads(answer.body)["version"]
        return version

    async with relay_of(scene, upstream, consul, tmp_path) as relay:
        await relay.said("is unavailable: the server answers 500: No cluster leader")
        assert await served(relay) == 1
        consul.failure = None
        await eventually(consul, lambda: content(consul.values) == content(steps[1]["keys"]))
        await relay.said("is available again")
        await consul.stop()
        await upstream.raw(key_of(scene), steps[2]["sent"]["text"].encode())
        await relay.said("is unavailable: cannot connect to")
        assert await served(relay) == 2
        body = json.loads((await ask(relay.address, "/status")).body)
        store = body["environments"]["alpha"]["dataStoreStatus"]
        recorded = steps[2]["status"]["environments"]["alpha"]["dataStoreStatus"]
        assert store["state"] == recorded["state"] == "INTERRUPTED"
        assert store["database"] == recorded["database"]
        assert store["dbPrefix"] == recorded["dbPrefix"]
        await consul.start()
        await eventually(consul, lambda: consul.item("golden/features/where")["version"] == 2)
        await relay.said("is available again", 2)
    assert len(upstream.requests) == 1


REFUSED = {"CONSUL_HOST ftp://host": "CONSUL_HOST", "CONSUL_TOKEN_FILE missing": "tokenFile"}
"""Starts that ld-relay survives, to answer 503 for ever; this relay names the option."""


@pytest.mark.parametrize("step", steps_of("address and token").values(), ids=lambda s: s["step"])
async def test_address_and_token(step, consul, tmp_path):
    """The same address and token are used; a host without a port means that of Consul."""
    token_file = tmp_path / "token"
    token_file.write_text("tok-file\n")
    asked = "http" if "CONSUL_HTTP_SSL" not in step["step"] else "https"
    path = "/path" if "/path" in step["step"] else ""
    async with ConsulServer(path=path, namespace="ns1" if "NAMESPACE" in step["step"] else "") as c:
        given = dict(pair.split("=", 1) for pair in step["did"].split(", "))
        variables = {"USE_CONSUL": "1", "LD_ENV_alpha": key_of("address and token")} | {
            name: value.replace("consul.example:8500", f"localhost:{c.port}").replace(
                "<dir>", str(tmp_path)
            )
            for name, value in given.items()
        }
        if step["step"] in REFUSED:
            with pytest.raises(ConfigError, match=REFUSED[step["step"]]):
                connect(load("", True, False, variables).consul, variables)
            return
        options = load("", True, False, variables).consul
        [environment] = step["status"]["environments"].values()
        store = environment["dataStoreStatus"]
        if "database" not in store:
            assert options is None
            return
        connection = connect(options, variables)
        assert connection.address.replace(str(c.port), "8500") == store["dbServer"].replace(
            "consul.example", "localhost"
        )
        assert connection.url.scheme == asked
        if not step["requests to the database"]:
            assert "port" not in step["step"] or consul_url(options.host).endswith(":8500")
            return
        database = ConsulStore(connection, "", options.max_value_size)
        assert await database.load() is None
        await database.aclose()
        [recorded], [ours] = step["requests to the database"], c.asked
        assert ours.token == recorded.get("X-Consul-Token", "")
        assert ours.path.partition("/v1")[0] == recorded["path"].partition("/v1")[0]
        assert ("ns=ns1" in ours.path) == ("ns=ns1" in recorded["path"])


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"CONSUL_HOST": "ftp://h"}, "CONSUL_HOST: must begin with http://, https:// or unix://"),
        ({"CONSUL_TOKEN_FILE": "/none"}, "[Consul] tokenFile: /none: No such file or directory"),
    ],
)
@pytest.mark.parametrize("listed", ["LD_ENV_main", "AUTO_CONFIG_KEY"])
async def test_what_cannot_be_used_keeps_the_relay_from_starting(
    tmp_path, variables, problem, listed
):
    """Also if LaunchDarkly lists the environments."""
    given = {"USE_CONSUL": "1", listed: "sdk-1", "ENV_DATASTORE_PREFIX": "p-$CID", **variables}
    if listed != "AUTO_CONFIG_KEY":
        del given["ENV_DATASTORE_PREFIX"]
    relay = RelayProcess(tmp_path, **given)
    await relay.spawn()
    assert await relay.ended() == 1
    assert problem in relay.log


async def test_big_segments_are_not_kept_in_consul(upstream, consul, tmp_path):
    """Their flags and segments are, as any others."""
    scene = "big segments are not kept in Consul"
    [step] = SCENES[scene]["steps"]
    upstream.serve(key_of(scene), put_of(step["keys"]))
    async with relay_of(scene, upstream, consul, tmp_path):
        await eventually(consul, lambda: content(consul.values) == content(step["keys"]))
