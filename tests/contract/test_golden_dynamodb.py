"""Scenes of ld-relay with DynamoDB, played again with this relay. Others are in `test_dynamodb`."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from relay.errors import ConfigError, StoreUnavailable
from relay.stores.dynamodb.connect import connect
from relay.stores.dynamodb.store import DynamoDBStore
from tests.contract.test_golden_autoconfig import KEY as AUTO_CONFIG_KEY
from tests.contract.test_golden_autoconfig import Cloud, credential
from tests.support.aws import without_credentials
from tests.support.dynamodb import (
    VARIABLES,
    aws_credentials,
    content,
    dynamodb,
    eventually,
    proxy,
    table,
)
from tests.support.process import RelayProcess
from tests.support.serving import Stream, ask
from tests.support.upstream import ScriptedUpstream, status

__all__ = ["aws_credentials", "dynamodb", "proxy", "table"]

GOLDEN = Path(__file__).parents[1] / "golden" / "dynamodb-limits.jsonl"
SCENES: dict[str, dict[str, Any]] = {
    scene["name"]: scene for scene in map(json.loads, GOLDEN.read_text().splitlines())
}
ALPHA, BETA = credential("alpha.sdk1"), credential("beta.sdk1")
SOURCES = SCENES["where region and credentials come from"]["steps"]


@pytest.fixture(name="upstream")
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


def variables(scene: str, upstream: ScriptedUpstream, url: str, **more: str) -> dict[str, str]:
    """The variables of a scene, with the servers at hand."""
    recorded = SCENES[scene]["environment variables"]
    here = {"STREAM_URI": upstream.url, "BASE_URI": upstream.url, "DYNAMODB_URL": url}
    return recorded | VARIABLES | here | more


def flags_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The flags that a table holds, as upstream sends them."""
    flags = [json.loads(each["item"]["S"]) for each in items if "item" in each]
    return {"flags": {each["key"]: each for each in flags}, "segments": {}}


async def store_status(relay: RelayProcess, name: str = "alpha") -> dict[str, Any]:
    """The status of the store, without what differs from run to run."""
    page = json.loads((await ask(relay.address, "/status")).body)
    return comparable(page["environments"][name]["dataStoreStatus"])


def comparable(status: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in status.items() if name not in ("stateSince", "dbServer")}


def recorded_status(step: dict[str, Any], name: str = "alpha") -> dict[str, Any]:
    return comparable(step["status"]["environments"][name]["dataStoreStatus"])


async def test_more_items_than_one_request_holds(upstream, server, proxy, tmp_path):
    """41 flags come and 30 segments go, as recorded: 25 in a request, the marker alone."""
    name = "more items than one batch"
    [step] = SCENES[name]["steps"]
    [(_, items)] = step["dynamodb"].items()
    table = server.new_table()
    for number in range(30):
        table.put("pre:segments", f"old{number}", version="1", item='{"version":1}')
    upstream.serve(ALPHA, json.dumps(flags_of(items)))
    given = variables(name, upstream, proxy.url, DYNAMODB_TABLE=table.name)
    async with RelayProcess(tmp_path, **given) as relay:
        await eventually(lambda: content(table.items()) == content(items))
        recorded = recorded_status(step) | {"dbTable": table.name}
        assert await store_status(relay) == recorded
    writes = [each.body for each in proxy.asked if each.operation == "BatchWriteItem"]
    assert [len(each["RequestItems"][table.name]) for each in writes] == [25, 16, 25, 5]


async def test_the_database_goes_and_comes_back(upstream, server, proxy, tmp_path):
    """The statuses are as recorded. Clients get flags all the while, unlike from ld-relay.

    ld-relay answers 500 to polls, and nothing to new streams, and asks upstream for everything
    again when the database is back.
    """
    name = "down and up again"
    started, gone, back = SCENES[name]["steps"]
    table = server.new_table()
    [(_, items)] = started["dynamodb"].items()
    upstream.serve(ALPHA, json.dumps(flags_of(items)))
    headers = [("Authorization", ALPHA)]
    here = {"dbTable": table.name}
    given = variables(name, upstream, proxy.url, DYNAMODB_TABLE=table.name)
    async with RelayProcess(tmp_path, **given) as relay:
        await eventually(lambda: content(table.items()) == content(items))
        assert await store_status(relay) == recorded_status(started) | here
        await proxy.stop()
        await upstream.raw(ALPHA, gone["sent"]["text"].encode())
        await relay.said("is unavailable")
        assert await store_status(relay) == recorded_status(gone) | here
        answer = await ask(relay.address, "/sdk/flags/where", headers)
        assert json.loads(answer.body)["version"] == 2
        assert gone["answers"][0]["status"] == 500
        stream = await Stream.open(relay.address, "/all", key=ALPHA)
        put = await stream.until(b"\n\n")
        stream.writer.close()
        data = json.loads(put.partition(b"data: ")[2])["data"]
        assert data["flags"]["where"]["version"] == 2
        [(_, items)] = gone["dynamodb"].items()
        assert content(table.items()) == content(items)
        await proxy.start()
        [(_, items)] = back["dynamodb"].items()
        await eventually(lambda: content(table.items()) == content(items))
        await relay.said("is available again")
        assert await store_status(relay) == recorded_status(back) | here
    assert upstream.asked("/all") == 1
    assert [each["what"] for each in back["upstream"]] == ["closed by the relay", "open"]


async def test_each_environment_has_its_table_and_prefix(upstream, server, tmp_path):
    """One has a table of its own and no prefix, the other the common table and a prefix."""
    name = "per-environment tables and no prefix"
    [step] = SCENES[name]["steps"]
    tables = {recorded: server.new_table() for recorded in step["dynamodb"]}
    for key, recorded in ((ALPHA, "t-alpha"), (BETA, "t-lim")):
        upstream.serve(key, json.dumps(flags_of(step["dynamodb"][recorded])))
    own = {
        "DYNAMODB_TABLE": tables["t-lim"].name,
        "LD_TABLE_NAME_alpha": tables["t-alpha"].name,
    }
    given = variables(name, upstream, server.url, **own)
    async with RelayProcess(tmp_path, **given) as relay:
        for recorded, table in tables.items():
            items = step["dynamodb"][recorded]
            await eventually(lambda t=table, i=items: content(t.items()) == content(i))
        for environment in ("alpha", "beta"):
            expected = recorded_status(step, environment)
            expected["dbTable"] = tables[expected["dbTable"]].name
            assert await store_status(relay, environment) == expected


async def test_each_environment_that_is_listed_has_its_table(upstream, server, tmp_path):
    """`ac-$CID`; a table that is missing keeps nobody from their flags, unlike in ld-relay.

    The data of an environment that is deleted stay.
    """
    name = "automatic configuration: a table per environment"
    listed, deleted = SCENES[name]["steps"]
    ids = {key: credential(f"{key}.id") for key in ("alpha", "beta")}
    [(own, items)] = listed["dynamodb"].items()
    assert own == f"ac-{ids['alpha']}"
    table = server.new_table(own)
    for key in (ALPHA, BETA):
        upstream.serve(key, json.dumps(flags_of(items)))
    cloud = Cloud()
    upstream.always(AUTO_CONFIG_KEY, cloud.answer)
    async with RelayProcess(tmp_path, **variables(name, upstream, server.url)) as relay:
        await eventually(lambda: cloud.streams)
        await cloud.send(listed["sent"]["text"])
        await eventually(lambda: content(table.items()) == content(items))
        await relay.said(f'there is no table "ac-{ids["beta"]}"')
        for environment in ids.values():
            expected = recorded_status(listed, environment)
            if expected["state"] == "INITIALIZING":
                expected["state"] = "INTERRUPTED"  # of a table that is missing
            assert await store_status(relay, environment) == expected
        for key in (ALPHA, BETA):
            headers = [("Authorization", key)]
            assert (await ask(relay.address, "/sdk/flags/where", headers)).status == 200
        await cloud.send(deleted["sent"]["text"])
        await upstream.left(ALPHA)
        for answer in deleted["answers"]:
            if answer["ask"].startswith("alpha"):
                path = answer["ask"].partition("GET ")[2]
                reply = await ask(relay.address, path, [("Authorization", ALPHA)])
                assert reply.status == answer["status"] == 401
        assert content(table.items()) == content(deleted["dynamodb"][own])
    table.drop()


async def test_collections_of_several_pages_are_served(upstream, server, table, tmp_path):
    """Four flags of 380,000 bytes each, from the database, while upstream is down."""
    name = "collections of several pages"
    [step] = SCENES[name]["steps"]
    [answer] = step["answers"]
    expected = json.loads(re.sub("<([0-9]+) x>", lambda match: "x" * int(match[1]), answer["body"]))
    for key, each in expected.items():
        table.put("pre:features", key, version=str(each["version"]), item=json.dumps(each))
    table.put("pre:$inited", "pre:$inited")
    upstream.always(ALPHA, status(503))
    given = variables(name, upstream, server.url, DYNAMODB_TABLE=table.name)
    async with RelayProcess(tmp_path, **given) as relay:
        headers = [("Authorization", ALPHA)]

        async def served() -> int:
            return (await ask(relay.address, "/sdk/flags", headers)).status

        async with asyncio.timeout(10):
            while await served() != answer["status"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        body = (await ask(relay.address, "/sdk/flags", headers)).body
        assert json.loads(body) == expected


# Region and credentials


class Sources:
    """Where credentials come from: the files of a home folder, a container's endpoint, STS.

    Args:
        folder: the home folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.asked: list[list[str | None]] = []
        files = {
            ".aws/credentials": (
                "[default]\naws_access_key_id = AKIAFILE\naws_secret_access_key = s\n"
                "[other]\naws_access_key_id = AKIAOTHER\naws_secret_access_key = s\n"
                "aws_session_token = tok-file\n"
            ),
            ".aws/config": (
                "[default]\nregion = eu-west-3\n[profile other]\nregion = ap-south-1\n"
            ),
            "token": "container-auth",
        }
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    async def handle(self, request: web.Request) -> web.Response:
        """Answer as the endpoint of a container, or as STS."""
        self.asked.append([request.path, request.headers.get("Authorization")])
        key = {"SecretAccessKey": "s", "Expiration": "2099-01-01T00:00:00Z"}
        if request.path == "/creds":
            return web.json_response(
                key | {"AccessKeyId": "AKIACONTAINER", "Token": "tok-container"}
            )
        form = await request.post()
        assert form["Action"] == "AssumeRoleWithWebIdentity"
        assert form["WebIdentityToken"] == "container-auth"
        members = key | {"AccessKeyId": "AKIAWEB", "SessionToken": "tok-web"}
        text = "".join(f"<{name}>{value}</{name}>" for name, value in members.items())
        result = f"<Credentials>{text}</Credentials>"
        action = "AssumeRoleWithWebIdentity"
        body = f"<{action}Response><{action}Result>{result}</{action}Result></{action}Response>"
        return web.Response(text=body, content_type="text/xml")


@pytest.fixture
async def sources(tmp_path) -> AsyncIterator[tuple[Sources, str]]:
    """They, and the URL of their server."""
    sources = Sources(tmp_path)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", sources.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield sources, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.mark.parametrize("step", SOURCES, ids=[step["step"] for step in SOURCES])
async def test_where_region_and_credentials_come_from(step, proxy, sources, monkeypatch, tmp_path):
    """Each of the usual places, as recorded. A path in the URL is put before the request's."""
    without_credentials(monkeypatch, str(tmp_path / "elsewhere"))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    places, url = sources
    for setting in step["did"].split(", "):
        name, _, value = setting.partition("=")
        value = value.replace("<dir>", str(tmp_path)).replace("http://relay.example", url)
        monkeypatch.setenv(name, value.replace("http://dynamodb.example", proxy.url))
    proxy.misbehave = lambda _operation, _body: (200, {})
    endpoint = os.environ.get("DYNAMODB_URL", proxy.url)
    if step.get("exit"):
        with pytest.raises(ConfigError, match="missing"):
            connect(endpoint, os.environ)
        return
    store = DynamoDBStore(connect(endpoint, os.environ).share(), "t", "pre")
    try:
        if not step["requests to the database"]:
            with pytest.raises(StoreUnavailable, match="there are no AWS credentials"):
                await store.load()
        else:
            assert await store.load() is None
    finally:
        await store.aclose()
    signed = [(each.key_id, each.region, each.token) for each in proxy.asked]
    # Without a region this relay signs with one: some local servers insist on it.
    recorded = [
        (
            each["signed"]["key"],
            each["signed"]["region"] or "us-east-1",
            each["signed"].get("token"),
        )
        for each in step["requests to the database"][:1]
    ]
    assert signed == recorded
    assert places.asked[:1] == step["requests for credentials"]
