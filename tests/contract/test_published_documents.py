"""Environments as documents: who reads them, who keeps them, and what happens when things break."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import AsyncIterator

import pytest
from ldclient import Context, LDClient
from ldclient.config import Config
from ldclient.integrations import Files

from relay.protocol import document
from tests.support.data import all_data, flag, segment
from tests.support.keyvalue import TOKEN, KeyValueServer
from tests.support.process import RelayProcess
from tests.support.sdk import (
    ANNA,
    EDGE_SDKS,
    EVERYTHING,
    SOMEBODY,
    PythonSDK,
    Setup,
    evaluated_at_the_edge,
    evaluates_everything,
)
from tests.support.serving import SDK_KEY, ask
from tests.support.upstream import ScriptedUpstream, status

ID = "5ca1ab1e0000000000000001"
NAME = f"LD-Env-{ID}"
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), segment()))
        yield upstream


@pytest.fixture
async def values() -> AsyncIterator[KeyValueServer]:
    async with KeyValueServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "published"


@pytest.fixture
def bucket(s3_server):
    """A new bucket."""
    return s3_server.new_bucket()


class Relay(RelayProcess):
    """A relay of one environment."""

    def __init__(self, tmp_path, upstream_url: str, *arguments: str, **variables: str) -> None:
        given = {
            "LD_ENV_main": SDK_KEY,
            "LD_CLIENT_SIDE_ID_main": ID,
            "STREAM_URI": upstream_url,
            "BASE_URI": upstream_url,
            "INIT_TIMEOUT": "6s",
        }
        super().__init__(tmp_path, *arguments, **{**given, **variables})

    async def polled(self) -> bytes:
        reply = await ask(self.address, "/sdk/latest-all", [("Authorization", SDK_KEY)])
        assert reply.status == 200
        return reply.body

    async def status(self) -> dict:
        return json.loads((await ask(self.address, "/status")).body)["environments"]["main"]


def version(content: bytes | None, key: str = "lamp") -> int:
    return json.loads(content)["flags"][key]["version"] if content else 0


def read(folder) -> bytes | None:
    path = folder / NAME
    return path.read_bytes() if path.exists() else None


async def test_several_places_get_the_document_and_every_change(
    tmp_path, upstream, values, bucket, folder
):
    """The same bytes everywhere: those of a poll."""
    urls = [f"file://{folder}", bucket.url, values.url]
    variables = {"PUBLISH_TO": ",".join(urls), "PUBLISH_TOKEN": TOKEN, **bucket.server.variables}

    def published() -> list[bytes | None]:
        return [read(folder), bucket.get(NAME), values.values.get(NAME)]

    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await relay.until(lambda: all(version(each) == 1 for each in published()))
        assert json.loads(published()[0]) == json.loads(await relay.polled())
        await upstream.patch(SDK_KEY, flag(version=2, value="two"))
        await relay.until(lambda: all(version(each) == 2 for each in published()))
        assert len(set(published())) == 1
        compressed = [(folder / f"{NAME}.gz").read_bytes(), bucket.get(f"{NAME}.gz")]
        assert [gzip.decompress(each) for each in compressed] == published()[:2]
        states = (await relay.status())["published"]
        assert [(each["state"], each["url"]) for each in states] == [("VALID", u) for u in urls]
        assert {each["document"] for each in states} == {NAME}
        assert (await relay.status())["dataStoreStatus"]["state"] == "VALID"
        metrics = (await ask(relay.address, "/metrics")).body.decode()
        row = f'relay_publication_state{{environment="main",url="{urls[0]}",state="VALID"}} 1'
        assert row in metrics
        assert await relay.stop() == 0
        assert TOKEN not in relay.log
        assert bucket.server.variables["AWS_SECRET_ACCESS_KEY"] not in relay.log
    head = bucket.head(f"{NAME}.gz")
    assert (head["ContentEncoding"], head["ContentType"]) == ("gzip", "application/json")


@pytest.mark.sdk
@pytest.mark.parametrize("sdk", EDGE_SDKS)
async def test_edge_sdks_read_the_document(tmp_path, upstream, values, edge_packages, sdk):
    """Unmodified, with all that their evaluation needs; deleted flags are gone."""
    upstream.serve(SDK_KEY, all_data(*EVERYTHING, flag("gone")))
    variables = {"PUBLISH_TO": values.url, "PUBLISH_TOKEN": TOKEN}
    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await upstream.connected(SDK_KEY)
        await upstream.delete(SDK_KEY, "/flags/gone", 2)
        await relay.until(lambda: b'"deleted"' in values.values.get(NAME, b""))
    evaluations = [
        *((item["key"], SOMEBODY) for item in EVERYTHING[:5]),
        ("for-crowd", ANNA),
        ("for-crowd", SOMEBODY),
        ("needs-lamp", SOMEBODY),
        ("needs-none", SOMEBODY),
        ("gone", SOMEBODY),
    ]
    texts = {key: content.decode() for key, content in values.values.items()}
    results = await evaluated_at_the_edge(sdk, ID, texts, evaluations)
    expected = [item["variations"][0] for item in EVERYTHING[:5]]
    if sdk == "cloudflare":
        expected[4] = {"a": [1, {}], "c": ""}  # it drops nulls, whoever publishes
    assert results[:5] == expected
    assert results[5:] == ["crowd", "others", "lit", "off", "(none)"]


async def test_an_sdk_reads_the_document_as_a_file(tmp_path, upstream, folder):
    """In the SDKs' own file-data format, and sees changes of it."""
    upstream.serve(SDK_KEY, all_data(flag(value="one"), flag("gone"), segment()))
    async with Relay(tmp_path, upstream.url, PUBLISH_TO=f"file://{folder}") as relay:
        await relay.until(lambda: version(read(folder)) == 1)
        source = Files.new_data_source(
            paths=[str(folder / NAME)], auto_update=True, poll_interval=0.05, force_polling=True
        )
        config = Config(SDK_KEY, update_processor_class=source, send_events=False)
        client = await asyncio.to_thread(LDClient, config)
        somebody = Context.create("somebody")
        try:
            assert client.variation("lamp", somebody, "(none)") == "one"
            await upstream.delete(SDK_KEY, "/flags/gone", 2)
            await upstream.patch(SDK_KEY, flag(version=2, value="two"))
            await relay.until(lambda: client.variation("lamp", somebody, "(none)") == "two")
            assert client.variation("gone", somebody, "(none)") == "(none)"
        finally:
            await asyncio.to_thread(client.close)


async def test_a_relay_serves_the_document_as_a_flags_file(tmp_path, upstream, folder):
    """Also one with versions of deleted flags."""
    upstream.serve(SDK_KEY, all_data(flag(value="one"), flag("gone")))
    async with Relay(tmp_path, upstream.url, PUBLISH_TO=f"file://{folder}") as relay:
        await upstream.connected(SDK_KEY)
        await upstream.delete(SDK_KEY, "/flags/gone", 2)
        await relay.until(lambda: b'"deleted"' in (read(folder) or b""))
    async with RelayProcess(tmp_path, "--flags", str(folder / NAME)) as relay:
        await relay.said("data are current")
        reply = await ask(relay.address, "/sdk/latest-all", [("Authorization", "sdk-demo")])
        assert json.loads(reply.body)["flags"].keys() == {"lamp"}


@pytest.mark.parametrize("kind", ["file", "s3", "s3 in gzip", "http", "presigned"])
async def test_a_relay_starts_from_a_document_with_everything_else_away(
    tmp_path, values, bucket, kind
):
    """LaunchDarkly does not answer, and there is neither database nor snapshot."""
    content = json.dumps(json.loads(all_data(*EVERYTHING))).encode()
    (tmp_path / NAME).write_bytes(content)
    values.values[NAME] = content
    bucket.put(NAME, content)
    bucket.put(f"{NAME}.gz", document.compressed(content))
    url = {
        "file": f"file://{tmp_path}",
        "s3": bucket.url,
        "s3 in gzip": f"{bucket.url}/{{key}}.gz",
        "http": values.url,
        "presigned": bucket.presigned(NAME),
    }[kind]
    variables = {"BOOTSTRAP_FROM": url, "USE_REDIS": "true", "REDIS_URL": "redis://127.0.0.1:9"}
    variables |= {"BOOTSTRAP_TOKEN": TOKEN} if kind == "http" else {}
    variables |= {} if kind == "presigned" else bucket.server.variables
    async with Relay(tmp_path, NOWHERE, **variables) as relay:
        await relay.said("Serving stored data (9 items)")
        setup = Setup(SDK_KEY, relay.url)
        async with PythonSDK(setup) as sdk:
            await sdk.ready()
            await evaluates_everything(sdk)
        assert (await ask(relay.address, "/readyz")).status == 200
        assert "Signature=" not in relay.log.replace("Signature=********", "")


async def test_upstream_outranks_the_document(tmp_path, upstream, folder):
    """Whatever its versions are; the document is only read."""
    folder.mkdir()
    content = all_data(flag(version=9, value="document")).encode()
    (folder / NAME).write_bytes(content)
    async with Relay(tmp_path, upstream.url, BOOTSTRAP_FROM=f"file://{folder}") as relay:
        await relay.said("data are current")
        assert json.loads(await relay.polled())["flags"]["lamp"]["variations"][0] == "one"
    assert read(folder) == content
    assert not (folder / f"{NAME}.gz").exists()


@pytest.mark.parametrize("newer", ["document", "snapshot"])
async def test_the_newer_of_document_and_snapshot_is_served(tmp_path, upstream, folder, newer):
    """By their versions."""
    snapshots = {"SNAPSHOT_DIR": str(tmp_path / "snapshots")}
    upstream.serve(SDK_KEY, all_data(flag(version=5, value="snapshot")))
    async with Relay(tmp_path, upstream.url, **snapshots) as relay:
        await relay.said("data are current")
        assert await relay.stop() == 0
    folder.mkdir()
    content = all_data(flag(version=9 if newer == "document" else 1, value="document"))
    (folder / NAME).write_text(content)
    variables = {"BOOTSTRAP_FROM": f"file://{folder}", **snapshots}
    async with Relay(tmp_path, NOWHERE, **variables) as relay:
        await relay.said("Serving stored data")
        await asyncio.sleep(0.3)  # both have been read
        assert json.loads(await relay.polled())["flags"]["lamp"]["variations"][0] == newer


async def test_a_relay_that_is_behind_does_not_make_the_document_older(tmp_path, values):
    """It asks upstream for everything first; the other one goes on."""
    async with ScriptedUpstream() as ahead, ScriptedUpstream() as behind:
        ahead.serve(SDK_KEY, all_data(flag(version=5), flag("new")))
        behind.serve(SDK_KEY, all_data(flag(version=4), flag("b", version=2)))
        variables = {"PUBLISH_TO": values.url, "PUBLISH_TOKEN": TOKEN}
        versions: list[int] = []

        def seen() -> None:
            versions.append(version(values.values.get(NAME)))

        values.before_put = seen
        async with (
            Relay(tmp_path, ahead.url, **variables) as first,
            Relay(tmp_path, behind.url, **variables) as second,
        ):
            await second.said("holds other data than this relay")
            for number in range(6, 10):
                await ahead.patch(SDK_KEY, flag(version=number))
                await behind.patch(SDK_KEY, flag(version=number - 2))
                await asyncio.sleep(0.2)
            await first.until(lambda: version(values.values.get(NAME)) == 9)
            assert "new" in json.loads(values.values[NAME])["flags"]
            assert second.log.count("ERROR") == 0
        assert versions == sorted(versions)


async def test_changes_of_a_second_are_published_together(tmp_path, upstream, values):
    """However many there are."""
    variables = {"PUBLISH_TO": values.url, "PUBLISH_TOKEN": TOKEN}
    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await relay.until(lambda: version(values.values.get(NAME)) == 1)
        began, number = time.monotonic(), 1
        while time.monotonic() < began + 2.5:
            number += 1
            await upstream.patch(SDK_KEY, flag(version=number))
            await asyncio.sleep(0.02)
        await relay.until(lambda: version(values.values.get(NAME)) == number)
        assert values.count("PUT") <= 1 + (time.monotonic() - began) + 1
        await upstream.patch(SDK_KEY, flag(version=number + 1))
        assert await relay.stop() == 0  # what has been gathered is not lost
        assert version(values.values[NAME]) == number + 1


async def test_nothing_is_published_while_upstream_is_away(tmp_path, upstream, values):
    """The data at hand may be outdated, so a document that vanishes stays away until then."""
    variables = {"PUBLISH_TO": values.url, "PUBLISH_TOKEN": TOKEN}
    values.status = 503
    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await relay.said("is unavailable: HTTP status 503")
        upstream.always(SDK_KEY, status(503))
        upstream.close_streams()
        await relay.said("will retry")
        values.status = 0
        await asyncio.sleep(2)
        assert values.values == {}
        assert (await relay.status())["published"][0]["state"] in ("VALID", "INTERRUPTED")
        upstream.always(SDK_KEY, None)
        await relay.until(lambda: version(values.values.get(NAME)) == 1)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (401, "the token is missing, wrong, or not permitted"),
        (403, "the token is missing, wrong, or not permitted"),
        (429, "too many requests"),
        (500, "HTTP status 500"),
    ],
)
async def test_refusals_are_logged_once_and_outlived(tmp_path, upstream, values, code, reason):
    """SDKs notice nothing, and each change is there afterwards."""
    variables = {"PUBLISH_TO": values.url, "PUBLISH_TOKEN": TOKEN}
    values.status = code
    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await relay.said(reason)
        assert version(await relay.polled()) == 1
        await relay.until(lambda: len(values.requests) >= 2)
        assert (await relay.status())["published"][0]["state"] == "INTERRUPTED"
        await upstream.patch(SDK_KEY, flag(version=2))
        values.status = 0
        await relay.said("is available again")
        await relay.until(lambda: version(values.values.get(NAME)) == 2)
        assert relay.log.count(f"Published document {values.url.format(key=NAME)}") == 2
        assert TOKEN not in relay.log


async def test_a_place_that_is_away_at_the_start_is_found_later(tmp_path, upstream, values):
    """Nothing waits for it, the other place least of all."""
    await values.stop()
    folder = tmp_path / "published"
    variables = {"PUBLISH_TO": f"{values.url},file://{folder}", "PUBLISH_TOKEN": TOKEN}
    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await relay.until(lambda: version(read(folder)) == 1)
        await relay.said("is unavailable: cannot connect")
        assert version(await relay.polled()) == 1
        await values.start()
        await relay.until(lambda: version(values.values.get(NAME)) == 1)


async def test_a_slow_place_delays_nobody(tmp_path, upstream, values):
    """Neither SDKs nor the other place nor the end of the relay."""
    values.delay = 30
    folder = tmp_path / "published"
    variables = {"PUBLISH_TO": f"{values.url},file://{folder}", "PUBLISH_TOKEN": TOKEN}
    async with Relay(tmp_path, upstream.url, **variables) as relay:
        await relay.until(lambda: version(read(folder)) == 1)
        for number in range(2, 5):
            await upstream.patch(SDK_KEY, flag(version=number))
        await relay.until(lambda: version(read(folder)) == 4)
        assert version(await relay.polled()) == 4
        began = time.monotonic()
        assert await relay.stop() == 0
        assert time.monotonic() - began < 8


async def test_a_document_without_a_client_side_id_has_no_name(tmp_path, upstream):
    """The relay does not start, and says why."""
    variables = {"LD_CLIENT_SIDE_ID_main": "", "PUBLISH_TO": f"file://{tmp_path}"}
    relay = Relay(tmp_path, upstream.url, **variables)
    await relay.spawn()
    assert await relay.ended() == 1
    assert 'environment "main" has no client-side ID (envId), which names its document' in relay.log


@pytest.mark.parametrize("kind", ["file", "s3", "http"])
async def test_relay_sync_publishes_once(tmp_path, upstream, values, bucket, kind):
    """Without any database; a second run finds nothing to do."""
    folder = tmp_path / "published"
    url, content = {
        "file": (f"file://{folder}", lambda: read(folder)),
        "s3": (bucket.url, lambda: bucket.get(NAME)),
        "http": (values.url, lambda: values.values.get(NAME)),
    }[kind]
    variables = {"PUBLISH_TOKEN": TOKEN} if kind == "http" else {}
    arguments = ("sync", "--from-env", "--to", url)

    async def sync(*more: str) -> tuple[int, str]:
        run = Relay(
            tmp_path, upstream.url, *arguments, *more, **variables, **bucket.server.variables
        )
        await run.spawn()
        return await run.ended(), run.log

    code, said = await sync("--dry-run")
    assert (code, content()) == (0, None), said
    assert "would change: 2 added" in said
    code, said = await sync()
    assert code == 0, said
    assert "main, Published document" in said
    assert "brought up to date: 2 added, 0 updated, 0 deleted (2 items upstream)" in said
    assert version(content()) == 1
    code, said = await sync()
    assert code == 0
    assert "is up to date (2 items upstream)" in said
    upstream.serve(SDK_KEY, all_data(flag(version=2)))
    code, said = await sync()
    assert code == 0, said
    assert "0 added, 1 updated, 1 deleted" in said
    assert json.loads(content()).keys() >= {"flags", "segments"}
    assert json.loads(content())["segments"] == {}


async def test_relay_sync_fails_with_a_reason(tmp_path, upstream, values):
    """If the place refuses, if the URL is wrong, or the document has no name."""
    arguments = ("sync", "--from-env", "--to")
    refused = Relay(tmp_path, upstream.url, *arguments, values.url)
    await refused.spawn()
    assert await refused.ended() == 1
    assert "the token is missing, wrong, or not permitted" in refused.log
    wrong = Relay(tmp_path, upstream.url, *arguments, "ftp://somewhere")
    await wrong.spawn()
    assert await wrong.ended() == 2
    assert "must be a URL of the form file:///FOLDER" in wrong.log
    variables = {"LD_CLIENT_SIDE_ID_main": ""}
    nameless = Relay(tmp_path, upstream.url, *arguments, "s3://b", **variables)
    await nameless.spawn()
    assert await nameless.ended() == 2
    assert "has no client-side ID (envId), which names its document" in nameless.log


async def test_relay_sync_brings_all_that_is_configured_up_to_date(
    tmp_path, upstream, redis, folder
):
    """The database and the documents; the exit code is that of the worst."""
    variables = {
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
        "PUBLISH_TO": f"file://{folder}",
    }
    run = Relay(tmp_path, upstream.url, "sync", "--from-env", **variables)
    await run.spawn()
    assert await run.ended() == 0, run.log
    assert run.log.count("brought up to date: 2 added") == 2
    assert redis.hash("launchdarkly:features")
    assert version(read(folder)) == 1
    folder.chmod(0o500)
    variables["PUBLISH_TO"] = f"file://{redis.folder}/dump.rdb/x"
    (redis.folder / "dump.rdb").touch()
    run = Relay(tmp_path, upstream.url, "sync", "--from-env", **variables)
    await run.spawn()
    assert await run.ended() == 1, run.log
    assert "Not a directory" in run.log
    with contextlib.suppress(OSError):
        folder.chmod(0o700)


async def test_one_shot_mode_publishes_too(tmp_path, upstream, folder):
    """`EXIT_ALWAYS` ends when the document is there."""
    variables = {"PUBLISH_TO": f"file://{folder}", "EXIT_ALWAYS": "true"}
    relay = Relay(tmp_path, upstream.url, **variables)
    await relay.spawn()
    assert await relay.ended() == 0, relay.log
    assert version(read(folder)) == 1


async def test_a_refused_key_publishes_nothing(tmp_path, upstream, folder):
    """The document of yesterday stays, and is served."""
    folder.mkdir()
    (folder / NAME).write_text(all_data(flag(version=3, value="yesterday")))
    upstream.always(SDK_KEY, status(401))
    async with Relay(tmp_path, upstream.url, PUBLISH_TO=f"file://{folder}") as relay:
        await relay.said("Serving stored data (1 items)")
        assert version(await relay.polled()) == 3
    assert version(read(folder)) == 3
