"""DynamoDB as its operators and the SDKs in daemon mode meet it, and ld-relay's scenes with it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from relay.environment import Environment
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.protocol.fdv1 import AllFormat
from relay.sources.streaming import StreamingSource
from relay.stores.conflicts import ConflictTimings
from relay.stores.dynamodb.layout import FINGERPRINT
from relay.stores.mirror import TIMINGS, DatabaseMirror, MirrorTimings
from relay.streams.hub import Hub
from relay.upstream import Upstream
from tests.support.data import all_data, flag, segment
from tests.support.dynamodb import (
    aws_credentials,
    content,
    dynamodb,
    eventually,
    failure,
    given,
    proxy,
    store_in,
    table,
    version_of,
)
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.sdk import EVERYTHING, Setup, evaluates_everything, make, sees
from tests.support.serving import SDK_KEY, Stream, ask
from tests.support.upstream import ScriptedUpstream, status

__all__ = ["aws_credentials", "dynamodb", "proxy", "table"]

GOLDEN = Path(__file__).parents[1] / "golden"
SCRIPTS = json.loads((GOLDEN / "dynamodb.json").read_text())["recordings"]
SCENES = {
    scene["name"]: scene
    for scene in map(json.loads, (GOLDEN / "dynamodb-limits.jsonl").read_text().splitlines())
}
ASKED = [("Authorization", SDK_KEY)]
QUICK = MirrorTimings(
    probe=0.05,
    compare=0.5,
    conflicts=ConflictTimings(second_look=0.05, refresh=0.2, newer=0.3, extra=0.3),
)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """LaunchDarkly, with two flags and a segment."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag(value="one"), flag("gone"), segment()))
        yield upstream


@asynccontextmanager
async def keeping(
    upstream: ScriptedUpstream, url: str, table: str, timings: MirrorTimings = QUICK
) -> AsyncGenerator[DatabaseMirror, None]:
    """Keep the database as a relay does, with short times."""
    log = logging.getLogger("main")
    spec = EnvironmentSpec("main", SDKKey(SDK_KEY))
    async with Upstream() as session:
        source = StreamingSource(session, upstream.url, spec.sdk_key, log)
        store = store_in(url, table)
        mirror = DatabaseMirror(store, "dynamodb", source.resync, log, timings, table=table)
        environment = Environment(spec, source, Hub({"all": AllFormat()}), log, [mirror])
        running = asyncio.create_task(environment.run())
        yield mirror
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()


@pytest.mark.sdk
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["python", "node7"])
async def test_an_sdk_in_daemon_mode_reads_what_the_relay_writes(
    upstream, server, table, tmp_path, name
):
    """LaunchDarkly's SDKs, unmodified: all that is easily damaged, a change, a deletion."""
    upstream.serve(SDK_KEY, all_data(*EVERYTHING))
    async with RelayProcess(tmp_path, **given(upstream, server.url, table.name)):
        await eventually(lambda: table.get("p:$inited", "p:$inited"))
        setup = Setup(SDK_KEY, dynamodb=server.url, table=table.name, prefix="p")
        async with make(name, setup) as sdk:
            await sdk.ready()
            await evaluates_everything(sdk)
            await upstream.patch(SDK_KEY, flag(value="two", version=2))
            await sees(sdk, "lamp", "two")
            await upstream.delete(SDK_KEY, "/flags/text", 2)
            await sees(sdk, "text", "(none)")


# Recordings


@pytest.mark.parametrize("script", SCRIPTS)
async def test_the_same_messages_lead_to_the_same_items(script, upstream, server, table, tmp_path):
    """Every item that ld-relay writes, and no other; the marker has our own attribute."""
    prefix = script.partition("prefix ")[2]
    start = f"{prefix}:" if prefix else ""
    first, *others = SCRIPTS[script]
    table.put(f"{start}features", "stale", version="1", item='{"key":"stale","version":1}')
    foreign = []
    for each in first["items"]:
        namespace = each["namespace"]["S"]
        if namespace not in (f"{start}features", f"{start}segments", f"{start}$inited"):
            server.client.put_item(TableName=table.name, Item=each)
            foreign.append(each)
    data = json.loads(re.search(r"data: (.*)", first["upstream"])[1])["data"]
    upstream.serve(SDK_KEY, json.dumps(data))
    variables = given(upstream, server.url, table.name, LD_PREFIX_main=prefix)
    async with RelayProcess(tmp_path, **variables):
        for step in (first, *others[:-2]):
            if step is not first:
                await upstream.raw(SDK_KEY, step["upstream"].encode())
            expected = content(step["items"])
            await eventually(lambda expected=expected: content(table.items()) == expected)
    assert foreign
    assert all(each in table.items() for each in foreign)


async def test_an_item_over_the_limit_stays_as_it_was(upstream, server, table, tmp_path):
    """ld-relay removes it from the table; here the relay serves it, and says so."""
    scene = SCENES["items over the size limit"]
    assert "GET /sdk/flags/grown" in {a["ask"] for a in scene["steps"][0]["answers"]}
    old = flag("grown")
    table.put("p:features", "grown", version="1", item=json.dumps(old))
    table.put("p:$inited", "p:$inited")
    upstream.serve(SDK_KEY, all_data(flag(), flag("grown", value="x" * 450_000, version=2)))
    async with RelayProcess(tmp_path, **given(upstream, server.url, table.name)) as relay:
        await relay.said('cannot hold a flag "grown": it has about 45')
        await eventually(lambda: version_of(table, "lamp") == "1")
        assert version_of(table, "grown") == "1"
        answer = await ask(relay.address, "/sdk/flags/grown", ASKED)
        assert json.loads(answer.body)["version"] == 2
        await upstream.patch(SDK_KEY, flag("grown", version=3))
        await eventually(lambda: version_of(table, "grown") == "3")


async def test_a_table_that_is_created_later(upstream, server, proxy, tmp_path):
    """Flags are served meanwhile, unlike by ld-relay; the status is that of the recording."""
    recorded = SCENES["no such table"]["steps"][1]["status"]["environments"]["alpha"]
    variables = given(upstream, server.url, "created-later")
    async with RelayProcess(tmp_path, **variables) as relay:
        await relay.said(
            'data store created-later is unavailable: there is no table "created-later"'
        )
        assert (await ask(relay.address, "/sdk/flags/lamp", ASKED)).status == 200
        table = server.new_table("created-later")
        await eventually(lambda: version_of(table, "lamp") == "1")
        await relay.said("is available again")
        body = json.loads((await ask(relay.address, "/status")).body)
        store = body["environments"]["main"]["dataStoreStatus"]
        assert store.keys() == recorded["dataStoreStatus"].keys()
        assert store["dbTable"] == "created-later"
        assert store["dbServer"] == server.url


async def test_stored_oddities_are_served_while_upstream_is_down(upstream, server, table, tmp_path):
    """One unreadable item does not hide the others, as it does with ld-relay."""
    for step in SCENES["what is there when upstream is down"]["steps"]:
        for each in step["dynamodb"]["t-lim"]:
            server.client.put_item(TableName=table.name, Item=each)
    upstream.always(SDK_KEY, status(503))
    variables = given(upstream, server.url, table.name, LD_PREFIX_main="pre")
    async with RelayProcess(tmp_path, **variables) as relay:
        await relay.said('holds an unreadable flag "garbage"')
        await relay.said('holds an unreadable flag "noitem"')
        answer = await ask(relay.address, "/sdk/flags", ASKED)
        versions = {key: each["version"] for key, each in json.loads(answer.body).items()}
        assert versions == {"good": 3, "noversion": 4}


async def test_each_environment_may_have_a_table(upstream, server, table, tmp_path):
    """As recorded: without a prefix in one of its own, with one in the common table."""
    own = server.new_table()
    upstream.serve("sdk-beta", all_data(flag("other")))
    more = {"LD_ENV_beta": "sdk-beta", "LD_TABLE_NAME_beta": own.name}
    async with RelayProcess(tmp_path, **given(upstream, server.url, table.name, **more)):
        await eventually(lambda: own.get("$inited", "$inited") and version_of(table, "lamp"))
    assert own.get("features", "other")
    assert not table.get("features", "other")


# Faults


async def test_what_is_lost_is_written_again(upstream, server, table, caplog):
    """Everything, the marker alone, or the items under an older backup's marker."""
    async with keeping(upstream, server.url, table.name):
        whole = {("p:$inited", "p:$inited"), ("p:features", "lamp"), ("p:features", "gone"),
                 ("p:segments", "crowd")}  # fmt: skip
        await eventually(lambda: content(table.items()).keys() == whole)
        await asyncio.to_thread(table.empty)
        await eventually(lambda: content(table.items()).keys() == whole)
        backup = table.items()
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await eventually(lambda: version_of(table, "lamp") == "2")
        for each in backup:
            server.client.put_item(TableName=table.name, Item=each)
        await eventually(lambda: version_of(table, "lamp") == "2")
    assert sum("has lost its data" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(
    "code", ["ExpiredTokenException", "AccessDeniedException", "UnrecognizedClientException"]
)
async def test_an_outage_is_said_once_and_ends(upstream, proxy, table, caplog, code):
    """Changes meanwhile are written when it is over."""
    async with keeping(upstream, proxy.url, table.name) as mirror:
        await eventually(lambda: version_of(table, "lamp") == "1")
        proxy.misbehave = lambda _operation, _body: failure(code)
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await eventually(lambda: mirror.status.state.value == "INTERRUPTED")
        proxy.misbehave = lambda _operation, _body: None
        await eventually(lambda: version_of(table, "lamp") == "2")
        await eventually(lambda: mirror.status.state.value == "VALID")
    [line] = [text for text in caplog.messages if "is unavailable" in text]
    assert line.startswith(f"DynamoDB data store {table.name} is unavailable: the service answers")
    assert code in line


# Faults of a whole relay


async def served(relay: RelayProcess, key: str) -> int:
    """The version of a flag that the relay serves."""
    answer = await ask(relay.address, f"/sdk/flags/{key}", ASKED)
    return int(json.loads(answer.body)["version"])


async def test_a_slow_database_delays_no_client(upstream, proxy, table, tmp_path):
    """Streams and polls have a change before its first request is answered; then it is written."""
    async with RelayProcess(tmp_path, **given(upstream, proxy.url, table.name)) as relay:
        await eventually(lambda: FINGERPRINT in (table.get("p:$inited", "p:$inited") or {}))
        proxy.delay = 1.0
        stream = await Stream.open(relay.address)
        await stream.until(b"\n\n")
        asked = len(proxy.asked)
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        assert b'"two"' in await stream.until(b"\n\n")
        assert await served(relay, "lamp") == 2
        assert len(proxy.asked) == asked
        stream.writer.close()
        await eventually(lambda: version_of(table, "lamp") == "2")
        assert "is unavailable" not in relay.log


async def test_a_throttled_database_gets_everything(upstream, proxy, table, tmp_path):
    """Refused and half-done requests are sent again until all is written; that is no outage."""
    throttled: set[str] = set()
    flags = [flag(f"f{n}") for n in range(60)]
    upstream.serve(SDK_KEY, all_data(*flags))

    def refuse_once(operation: str, body: dict[str, Any]) -> Any:
        request = json.dumps([operation, body])
        if request in throttled:
            return None
        throttled.add(request)
        if operation == "BatchWriteItem":
            return 200, {"UnprocessedItems": body["RequestItems"]}
        return failure("ProvisionedThroughputExceededException")

    proxy.misbehave = refuse_once
    async with RelayProcess(tmp_path, **given(upstream, proxy.url, table.name)) as relay:
        await eventually(lambda: len(table.items()) == 60 + 1)
        await upstream.patch(SDK_KEY, flag("f7", version=2))
        await eventually(lambda: version_of(table, "f7") == "2")
        assert await served(relay, "f7") == 2
        assert "is unavailable" not in relay.log


async def test_credentials_in_a_file_expire_and_are_replaced(upstream, proxy, table, tmp_path):
    """As by a program that renews them; a relay goes on with the new ones, without a restart."""
    file = tmp_path / "credentials"

    def write(key_id: str) -> None:
        secret = "a-secret-of-a-file"
        file.write_text(
            f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {secret}\n"
        )

    def expired(_operation: str, _body: dict[str, Any]) -> Any:
        return failure("ExpiredTokenException") if proxy.key_id == "AKIAOLD" else None

    write("AKIAOLD")
    variables = given(upstream, proxy.url, table.name)
    variables |= {"AWS_SHARED_CREDENTIALS_FILE": str(file)}
    del variables["AWS_ACCESS_KEY_ID"], variables["AWS_SECRET_ACCESS_KEY"]
    async with RelayProcess(tmp_path, **variables) as relay:
        await eventually(lambda: version_of(table, "lamp") == "1")
        proxy.misbehave = expired
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await relay.said("is unavailable: the service answers ExpiredTokenException")
        assert await served(relay, "lamp") == 2
        write("AKIANEW")
        await relay.said("is available again")
        await eventually(lambda: version_of(table, "lamp") == "2")
        assert relay.log.count("is unavailable") == 1
        assert "a-secret-of-a-file" not in relay.log


async def test_an_older_backup_is_brought_up_to_date_by_the_next_relay(
    upstream, server, table, tmp_path
):
    """It was restored while no relay ran: the marker stands, versions are old, items are missing."""
    variables = given(upstream, server.url, table.name)
    async with RelayProcess(tmp_path, **variables) as relay:
        await eventually(lambda: version_of(table, "lamp") == "1")
        await eventually(lambda: FINGERPRINT in (table.get("p:$inited", "p:$inited") or {}))
        backup = table.items()
        changed = all_data(flag(value="two", version=2), flag("gone"), segment(), flag("added"))
        await upstream.put(SDK_KEY, changed)
        await eventually(lambda: version_of(table, "added") == "1")
        assert await relay.stop() == 0
        table.empty()
        for each in backup:
            server.client.put_item(TableName=table.name, Item=each)
        await relay.start()
        await eventually(lambda: version_of(table, "lamp") == "2" and version_of(table, "added"))


# Cost


async def test_requests_for_a_change_and_while_idle(upstream, proxy, table):
    """The table in the documentation: per change, and per probe; nothing is scanned."""
    often = MirrorTimings(probe=0.05)
    async with keeping(upstream, proxy.url, table.name, often):
        await eventually(lambda: FINGERPRINT in (table.get("p:$inited", "p:$inited") or {}))
        proxy.asked.clear()
        await eventually(lambda: len(proxy.asked) >= 10)
        assert set(proxy.operations) == {"GetItem"}
        assert all(each.body["Key"]["key"] == {"S": "p:$inited"} for each in proxy.asked)
    assert 3600 / TIMINGS["dynamodb"].probe <= 120
    async with keeping(upstream, proxy.url, table.name, MirrorTimings(probe=60)) as mirror:
        await eventually(lambda: mirror._marked is not None)
        proxy.asked.clear()
        proxy.busiest = 0
        for version in range(2, 7):
            await upstream.patch(SDK_KEY, flag(value="two", version=version))
            await eventually(lambda v=version: version_of(table, "lamp") == str(v))
        await eventually(lambda: len(proxy.asked) >= 11)
        assert sorted(proxy.operations[:10]) == ["GetItem"] * 5 + ["PutItem"] * 5
        assert proxy.operations[10:] == ["PutItem"]  # the note, behind the last one
        assert proxy.busiest == 2  # the marker is looked at meanwhile


async def test_requests_for_a_full_set_of_data(upstream, proxy, table):
    """The table in the documentation: 25 items in a write, 100 in an answer, equal ones stay."""
    upstream.serve(SDK_KEY, all_data(*(flag(f"f{n}") for n in range(250))))
    async with keeping(upstream, proxy.url, table.name, MirrorTimings(probe=60)) as mirror:
        await eventually(lambda: mirror._marked is not None)
    looks, queries = ["GetItem"] * 2, ["Query"] * 2
    marks = ["PutItem"] * 2  # the marker, and the note beside it
    assert proxy.operations == looks + queries + ["BatchWriteItem"] * 10 + marks
    proxy.asked.clear()
    async with keeping(upstream, proxy.url, table.name, MirrorTimings(probe=60)) as mirror:
        await eventually(lambda: mirror._marked is not None)
    everything = ["GetItem", *["Query"] * 4]  # segments, and flags in three answers
    assert sorted(proxy.operations) == sorted([*everything * 2, "PutItem"])
    assert TIMINGS["dynamodb"].compare == 3600


# Several databases, and runs that end


async def test_several_databases_heal_on_their_own(upstream, server, table, tmp_path):
    """One that is away does not delay another, and `/status` shows both."""
    variables = given(
        upstream, server.url, table.name, USE_REDIS="1", REDIS_URL="redis://localhost:1"
    )
    async with RelayProcess(tmp_path, **variables) as relay:
        await eventually(lambda: version_of(table, "lamp") == "1")
        await upstream.patch(SDK_KEY, flag(value="two", version=2))
        await eventually(lambda: version_of(table, "lamp") == "2")
        body = json.loads((await ask(relay.address, "/status")).body)
        environment = body["environments"]["main"]
        assert environment["dataStoreStatus"]["database"] == "redis"
        assert [
            (each["database"], each["state"]) for each in environment["dataStores"]
        ] == [("redis", "INTERRUPTED"), ("dynamodb", "VALID")]  # fmt: skip
        metrics = (await ask(relay.address, "/metrics")).body.decode()
        assert re.search(r'database="dynamodb".*\} 1', metrics)
        assert 'database="redis"' in metrics


async def test_relay_sync_brings_all_databases_up_to_date(upstream, server, table, tmp_path):
    """First all, then nothing."""
    with RedisServer(tmp_path) as redis:
        variables = given(
            upstream,
            server.url,
            table.name,
            USE_REDIS="1",
            REDIS_URL=f"redis://localhost:{redis.port}",
        )
        for expected in ("3 added, 0 updated, 0 deleted (3 items upstream)", "is up to date"):
            sync = RelayProcess(tmp_path, "sync", "--from-env", **variables)
            await sync.spawn()
            assert await sync.ended() == 0, sync.log
            assert sync.log.count(expected) == 2, sync.log
        assert redis.do("EXISTS", "p:$inited")
    assert version_of(table, "lamp") == "1"


async def test_a_one_shot_run_fills_the_table_or_fails(upstream, server, table, tmp_path):
    """`EXIT_ALWAYS`, as functions and jobs use it."""
    variables = given(upstream, server.url, table.name, EXIT_ALWAYS="true", INIT_TIMEOUT="2s")
    relay = RelayProcess(tmp_path, **variables)
    await relay.spawn()
    assert await relay.ended() == 0, relay.log
    assert version_of(table, "lamp") == "1"
    table.drop()
    await relay.spawn()
    assert await relay.ended() == 1, relay.log
