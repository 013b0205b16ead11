"""Flags with big segments, as clients and SDKs see them: through a relay, and in daemon mode."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import time
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest

from relay.protocol import sse
from tests.support.data import all_data, flag, segment
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.sdk import SDKS, Setup, make, sees
from tests.support.serving import SDK_KEY, Stream, ask
from tests.support.upstream import BIG_SEGMENTS, ScriptedUpstream, context_hash, segment_patch

MOBILE_KEY = "mob-4711"
IN_TEAM = {
    "clauses": [{"attribute": "", "op": "segmentMatch", "values": ["team"]}],
    "variation": 1,
    "id": "r",
}
IN_ORGS = {
    "clauses": [{"attribute": "", "op": "segmentMatch", "values": ["orgs"]}],
    "variation": 1,
}
DATA = all_data(
    flag("lamp"),
    flag("member", variations=["no", "yes"], rules=[IN_TEAM]),
    flag("org-member", variations=["no", "yes"], rules=[IN_ORGS]),
    segment("team", unbounded=True, generation=2),
    segment("orgs", unbounded=True, generation=1, unboundedContextKind="org"),
)
V1 = segment_patch("team.g2", "v1", "", include=["ann"])


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, DATA)
        upstream.patches[SDK_KEY] = [V1]
        yield upstream


@asynccontextmanager
async def relaying(tmp_path, upstream, redis: RedisServer, **more: str):
    """A relay that has synchronised."""
    given = {
        "LD_ENV_main": SDK_KEY,
        "LD_MOBILE_KEY_main": MOBILE_KEY,
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
        **more,
    }
    async with RelayProcess(tmp_path, **given) as relay:
        await relay.until(lambda: redis.do("GET", "launchdarkly:big_segments_synchronized_on"))
        yield relay


def user(key: str, **attributes: Any) -> dict[str, Any]:
    return {"kind": "user", "key": key, **attributes}


async def evaluated(
    relay: RelayProcess, context: dict[str, Any], *, reasons: bool = True, method: str = "GET"
) -> dict[str, Any]:
    """All flags for a context."""
    headers = [("Authorization", MOBILE_KEY)]
    query = "?withReasons=true" if reasons else ""
    text = json.dumps(context).encode()
    if method == "REPORT":
        headers.append(("Content-Type", "application/json"))
        reply = await ask(
            relay.address, f"/msdk/evalx/context{query}", headers, method=method, body=text
        )
    else:
        segment_ = base64.urlsafe_b64encode(text).decode()
        reply = await ask(relay.address, f"/msdk/evalx/contexts/{segment_}{query}", headers)
    assert reply.status == 200, reply
    flags: dict[str, Any] = json.loads(reply.body)
    return flags


async def eventually(relay: RelayProcess, key: str, value: str, status: str = "HEALTHY") -> None:
    """Wait until a user has a value."""
    async with asyncio.timeout(10):
        while True:
            found = (await evaluated(relay, user(key)))["member"]
            if (found["value"], found["reason"].get("bigSegmentsStatus")) == (value, status):
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("method", ["GET", "REPORT"])
async def test_members_are_found(tmp_path, upstream, redis, method):
    """By both doors, with and without reasons; other kinds of context are not looked up."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        for reasons in (True, False, True):
            flags = await evaluated(relay, user("ann"), reasons=reasons, method=method)
            assert flags["member"]["value"] == "yes"
            assert ("reason" in flags["member"]) is reasons
            flags = await evaluated(relay, user("ben"), reasons=reasons, method=method)
            assert flags["member"]["value"] == "no"
        large = user("ann", text="x" * 20_000)
        assert (await evaluated(relay, large, method=method))["member"]["value"] == "yes"
        both = {"kind": "multi", "user": {"key": "ann"}, "org": {"key": "acme"}}
        flags = await evaluated(relay, both, method=method)
        assert (flags["member"]["value"], flags["org-member"]["value"]) == ("yes", "no")
        redis.do("CONFIG", "RESETSTAT")
        flags = await evaluated(relay, {"kind": "device", "key": "d"}, method=method)
        assert "bigSegmentsStatus" not in flags["member"]["reason"]
        assert "smembers" not in redis.calls()


async def test_one_read_for_all_flags_and_none_for_a_while(tmp_path, upstream, redis):
    """A context key is read once, whatever asks for it, and many keys go in one request."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        redis.do("CONFIG", "RESETSTAT")
        contexts = [user(f"user-{n}") for n in range(50) for _ in range(4)]
        await asyncio.gather(*(evaluated(relay, context) for context in contexts))
        assert redis.calls()["smembers"] == 100


async def test_a_change_is_seen_at_once(tmp_path, upstream, redis):
    """Cached answers die with the membership of which they were made, and no others."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        await eventually(relay, "ben", "no")
        before = "v1"
        for number in range(2, 8):
            value = "yes" if number % 2 == 0 else "no"
            moved = {"include": ["ben"]} if value == "yes" else {"no_longer": ["ben"]}
            patch = segment_patch("team.g2", f"v{number}", before, **moved)
            await upstream.send_patches(SDK_KEY, patch)
            start = time.monotonic()
            await eventually(relay, "ben", value)
            assert time.monotonic() - start < 2.0
            assert (await evaluated(relay, user("ann")))["member"]["value"] == "yes"
            before = f"v{number}"


async def test_streams_get_what_changed_for_their_context(tmp_path, upstream, redis):
    """One client gets a patch with its flag, another one nothing; those with pings get a ping."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        await asyncio.sleep(1.1)  # notices come at most once a second
        streams = {}
        for key in ("ann", "ben"):
            text = base64.urlsafe_b64encode(json.dumps(user(key)).encode()).decode()
            path = f"/meval/{text}?withReasons=true"
            streams[key] = await Stream.open(relay.address, path, key=MOBILE_KEY)
            opening = await streams[key].until(b"\n\n")
            value = b"yes" if key == "ann" else b"no"
            assert b'"member":{"value":"%b"' % value in opening
        ping = await Stream.open(relay.address, "/mping", key=MOBILE_KEY)
        await ping.until(b"\n\n")
        patch = segment_patch("team.g2", "v2", "v1", include=["ben"])
        await upstream.send_patches(SDK_KEY, patch)
        message = await streams["ben"].until(b"\n\n")
        assert message.startswith(b"event: patch\n")
        assert message.count(b"event:") == 1
        assert b'"key":"member","value":"yes"' in message
        version = json.loads(message.partition(b"data: ")[2])["version"]
        assert await ping.until(b"\n\n") == b"event: ping\ndata:  \n\n"
        await upstream.send_patches(
            SDK_KEY, segment_patch("team.g2", "v3", "v2", no_longer=["ann", "ben"])
        )
        again = json.loads((await streams["ben"].until(b"\n\n")).partition(b"data: ")[2])
        assert (again["value"], again["version"] > version) == ("no", True)
        # The other client has got nothing before this.
        other = json.loads((await streams["ann"].until(b"\n\n")).partition(b"data: ")[2])
        assert (other["key"], other["value"]) == ("member", "no")
        for stream in (*streams.values(), ping):
            stream.close()


async def test_clients_that_speak_fdv2_get_what_changed(tmp_path, upstream, redis):
    """A poll and a stream with the state of before bring the flag; other clients are up to date."""

    def path(kind: str, key: str, basis: str = "") -> str:
        text = base64.urlsafe_b64encode(json.dumps(user(key)).encode()).decode().rstrip("=")
        query = f"&basis={quote(basis)}" if basis else ""
        return f"/sdk/{kind}/eval/{text}?auth={MOBILE_KEY}{query}"

    async def poll(key: str, basis: str = "") -> tuple[str, dict[str, Any], str]:
        """Code, values and state of the transfer in a poll."""
        reply = await ask(relay.address, path("poll", key, basis))
        return transfer(json.loads(reply.body)["events"])

    def transfer(events: list[dict[str, Any]]) -> tuple[str, dict[str, Any], str]:
        (payload,) = events[0]["data"]["payloads"]
        puts = [e["data"] for e in events if e["event"] == "put-object"]
        values = {each["key"]: each["object"]["value"] for each in puts}
        return payload["intentCode"], values, events[-1]["data"].get("state", "")

    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        await eventually(relay, "ben", "no")
        states = {key: (await poll(key))[2] for key in ("ann", "ben")}
        for key, state in states.items():
            assert (await poll(key, state))[0] == "none"
        stream = await Stream.open(relay.address, path("stream", "ben", states["ben"]))
        assert b'"none"' in await stream.until(b"\n\n")
        patch = segment_patch("team.g2", "v2", "v1", include=["ben"])
        await upstream.send_patches(SDK_KEY, patch)
        message = await stream.until(b"\n\n")
        events = [
            {"event": e.name, "data": json.loads(e.data)} for e in sse.Decoder().feed(message)
        ]
        code, values, state = transfer(events)
        assert (code, values) == ("xfer-changes", {"member": "yes"})
        assert await poll("ben", state) == ("none", {}, "")
        code, values, _ = await poll("ben", states["ben"])
        assert (code, values["member"]) == ("xfer-changes", "yes")
        assert values.keys() <= {"member", "org-member"}
        assert (await poll("ann", states["ann"]))[0] == "none"
        stream.close()


async def test_changes_of_another_relay_are_noticed(tmp_path, upstream, redis):
    """Changes by another writer reach clients within seconds."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        await asyncio.sleep(1.1)
        ping = await Stream.open(relay.address, "/mping", key=MOBILE_KEY)
        await ping.until(b"\n\n")
        redis.do("SADD", f"launchdarkly:big_segment_include:{context_hash('zoe')}", "team.g2")
        redis.do("SET", "launchdarkly:big_segments_cursor", "v1b")
        async with asyncio.timeout(8):
            await ping.reader.readuntil(b"\n\n")
        await eventually(relay, "zoe", "yes")
        ping.close()


async def test_a_database_that_is_away_delays_nobody(tmp_path, upstream, redis):
    """Flags are evaluated without memberships at once, and with them when it is back."""
    async with relaying(tmp_path, upstream, redis, REDIS_READ_TIMEOUT="1s") as relay:
        await eventually(relay, "ann", "yes")
        redis.pause()
        await eventually(relay, "new", "no", "STORE_ERROR")
        start = time.monotonic()
        for number in range(100):
            found = (await evaluated(relay, user(f"n{number}")))["member"]
            assert found["reason"]["bigSegmentsStatus"] == "STORE_ERROR"
        assert time.monotonic() - start < 2.0
        status = json.loads((await ask(relay.address, "/status")).body)["environments"]["main"]
        assert status["bigSegmentStatus"] == {
            "available": False,
            "potentiallyStale": False,
            "lastSynchronizedOn": 0,
        }
        redis.go_on()
        await eventually(relay, "ann", "yes")
    assert relay.log.count("Big segments cannot be read") == 1
    assert relay.log.count("Big segments can be read") == 1


async def test_old_memberships_are_said_to_be_stale(tmp_path, upstream, redis):
    """After two minutes without synchronisation, with and without one that has ever been."""
    async with relaying(
        tmp_path,
        upstream,
        redis,
        BIG_SEGMENTS_STALE_AS_DEGRADED="true",
        BIG_SEGMENTS_STALE_THRESHOLD="10m",
    ) as relay:
        await eventually(relay, "ann", "yes")
        key = "launchdarkly:big_segments_synchronized_on"
        redis.do("SET", key, str(int((time.time() - 125) * 1000)))
        await eventually(relay, "ann", "yes", "STALE")
        status = json.loads((await ask(relay.address, "/status")).body)
        assert status["status"] == "healthy"
        redis.do("SET", key, str(int((time.time() - 700) * 1000)))

        page = {"status": "healthy"}
        async with asyncio.timeout(10):
            while page["status"] == "healthy":
                await asyncio.sleep(0.1)
                page = json.loads((await ask(relay.address, "/status")).body)
        assert page["status"] == "degraded"


async def test_metrics_tell_of_big_segments(tmp_path, upstream, redis):
    """Patches, reads, age and availability."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        text = (await ask(relay.address, "/metrics")).body.decode()
    assert 'relay_big_segments_available{environment="main"} 1' in text
    assert 'relay_big_segments_patches_total{environment="main"} 1' in text
    assert 'relay_big_segments_reads_total{environment="main"} 1' in text
    assert 'relay_big_segments_age_seconds{environment="main"}' in text


async def test_without_big_segments_nothing_is_asked(tmp_path, upstream, redis):
    """Neither upstream nor the database hear of them, and `/status` is silent."""
    upstream.serve(SDK_KEY, all_data(flag("lamp"), segment("small")))
    given = {"USE_REDIS": "true", "REDIS_URL": redis.url, "STREAM_URI": upstream.url}
    async with RelayProcess(
        tmp_path, LD_ENV_main=SDK_KEY, LD_MOBILE_KEY_main=MOBILE_KEY, **given
    ) as relay:
        await relay.until(lambda: redis.do("EXISTS", "launchdarkly:$inited"))
        await evaluated(relay, user("ann"))
        status = json.loads((await ask(relay.address, "/status")).body)["environments"]["main"]
        assert "bigSegmentStatus" not in status
        assert {each.path for each in upstream.requests} == {"/all"}
        assert not redis.calls().keys() & {"get", "smembers"}


@pytest.mark.sdk
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", SDKS)
async def test_sdks_in_daemon_mode_find_members(tmp_path, upstream, redis, name):
    """LaunchDarkly's own big segment stores read what the relay has written."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        await relay.until(lambda: redis.do("EXISTS", "launchdarkly:$inited"))
        async with make(name, Setup(SDK_KEY, redis=redis.url)) as sdk:
            await sees(sdk, "member", "yes", user("ann"))
            assert await sdk.value("member", user("ben"), "?") == "no"
            assert await sdk.value("org-member", user("ann"), "?") == "no"


async def test_evaluated_streams_keep_what_they_have_in_an_outage(tmp_path, upstream, redis):
    """A change of a flag meanwhile reaches them, and their memberships stay."""
    async with relaying(tmp_path, upstream, redis, REDIS_READ_TIMEOUT="1s") as relay:
        await eventually(relay, "ann", "yes")
        text = base64.urlsafe_b64encode(json.dumps(user("ann")).encode()).decode()
        stream = await Stream.open(relay.address, f"/meval/{text}", key=MOBILE_KEY)
        await stream.until(b"\n\n")
        redis.pause()
        await eventually(relay, "new", "no", "STORE_ERROR")
        await upstream.patch(SDK_KEY, {**flag("lamp"), "version": 9, "on": False})
        message = await stream.until(b"\n\n")
        assert message.startswith(b"event: patch\n")
        assert b'"key":"lamp"' in message
        redis.go_on()
        stream.close()


async def test_few_rights_in_the_database_suffice(tmp_path, upstream, redis):
    """Those that the documentation names: no command is denied."""
    few = ["get", "sadd", "srem", "smembers"]
    redis.add_user_of_ld_relay("few", "geheim", "launchdarkly")
    redis.do("ACL", "SETUSER", "few", *(f"+{command}" for command in few))
    url = f"redis://few:geheim@127.0.0.1:{redis.port}"
    async with relaying(tmp_path, upstream, redis, REDIS_URL=url) as relay:
        await eventually(relay, "ann", "yes")
        await upstream.send_patches(
            SDK_KEY, segment_patch("team.g2", "v2", "v1", exclude=["ben"], no_longer=["ann"])
        )
        await eventually(relay, "ann", "no")
    assert redis.denied() == []


async def test_a_rotated_key_is_used(tmp_path, upstream, redis):
    """When the old key ends, patches are fetched with the new one."""
    new_key = "sdk-4711-new"
    listed = {"sdkKey": {"value": SDK_KEY}, "mobKey": MOBILE_KEY, "envID": "e1", "version": 1}
    described = {"envKey": "k", "envName": "n", "projKey": "p", "projName": "p", **listed}
    body = {"path": "/", "data": {"environments": {"e1": described}}}
    upstream.serve("rel-1", "{}")
    stream_start = b"event: put\ndata: " + json.dumps(body).encode() + b"\n\n"

    async def list_of_environments(request):
        return await upstream._stream(request, "rel-1", stream_start)

    upstream.always("rel-1", list_of_environments)
    given = {
        "AUTO_CONFIG_KEY": "rel-1",
        "ENV_DATASTORE_PREFIX": "p-$CID",
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
    }
    async with RelayProcess(tmp_path, **given) as relay:
        await relay.until(lambda: redis.do("GET", "p-e1:big_segments_cursor") == b"v1")
        upstream.serve(new_key, DATA)
        upstream.patches[new_key] = [V1, segment_patch("team.g2", "v2", "v1", include=["ben"])]
        rotated = {**described, "sdkKey": {"value": new_key}, "version": 2}
        patch = {"path": "/environments/e1", "data": rotated}
        await upstream.raw("rel-1", b"event: patch\ndata: " + json.dumps(patch).encode() + b"\n\n")
        await upstream.connected(new_key)
        upstream.close_streams(BIG_SEGMENTS + SDK_KEY)
        await relay.until(lambda: redis.do("GET", "p-e1:big_segments_cursor") == b"v2")


async def test_streams_begin_when_memberships_are_there(tmp_path, upstream, redis):
    """Many evaluating streams at a time each begin with a put for their own context."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        names = [f"user-{number}" for number in range(40)] + ["ann"]
        segments = [
            base64.urlsafe_b64encode(json.dumps(user(name)).encode()).decode() for name in names
        ]
        streams = await asyncio.gather(
            *(Stream.open(relay.address, f"/meval/{each}", key=MOBILE_KEY) for each in segments)
        )
        for name, stream in zip(names, streams, strict=True):
            opening = await stream.until(b"\n\n")
            assert opening.startswith(b"event: put\n")
            value = b"yes" if name == "ann" else b"no"
            assert b'"member":{"value":"%b"' % value in opening
            stream.close()


async def test_an_archive_reads_members_and_fetches_nothing(tmp_path, upstream, redis):
    """In offline mode flags are evaluated with what the database holds."""
    hashed = context_hash("ann")
    redis.do("SADD", f"big-e1:big_segment_include:{hashed}", "team.g2")
    redis.do("SET", "big-e1:big_segments_synchronized_on", str(int(time.time() * 1000)))
    archive = tmp_path / "archive.tar.gz"
    given = {"LD_ENV_main": SDK_KEY, "LD_CLIENT_SIDE_ID_main": "e1", "STREAM_URI": upstream.url}
    given |= {"BASE_URI": upstream.url, "LD_MOBILE_KEY_main": MOBILE_KEY}
    made = RelayProcess(tmp_path, "archive", "--output", str(archive), "--from-env", **given)
    await made.spawn()
    assert await made.ended() == 0, made.log
    upstream.requests.clear()
    offline = {
        "FILE_DATA_SOURCE": str(archive),
        "USE_REDIS": "true",
        "REDIS_URL": redis.url,
        "ENV_DATASTORE_PREFIX": "big-$CID",
        "STREAM_URI": upstream.url,
        "BASE_URI": upstream.url,
    }
    async with RelayProcess(tmp_path, **offline) as relay:
        while (await ask(relay.address, "/startupz")).status != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await eventually(relay, "ann", "yes")
        assert upstream.requests == []


def request_for(key: str, **headers: str) -> bytes:
    """An evaluation request, as bytes."""
    text = base64.urlsafe_b64encode(json.dumps(user(key)).encode()).decode()
    lines = [
        f"GET /msdk/evalx/contexts/{text} HTTP/1.1",
        "Host: x",
        f"Authorization: {MOBILE_KEY}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


async def response_from(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The flags of the next response on a connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    size = int(head.lower().partition(b"content-length: ")[2].split()[0])
    flags: dict[str, Any] = json.loads(await reader.readexactly(size))
    return flags


async def test_requests_that_come_while_one_waits_are_answered_in_order(tmp_path, upstream, redis):
    """The database hangs for the first; the others follow on the same connection."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        reader, writer = await relay.address.connect()
        for keys in (["n1", "ann", "n2"], ["n3", "ann", "n4"]):  # a head unknown, then known
            redis.pause()
            writer.write(request_for(keys[0]))
            await asyncio.sleep(0.1)
            writer.write(request_for(keys[1]))
            await asyncio.sleep(0.1)
            writer.write(request_for(keys[2]))
            await asyncio.sleep(0.1)
            redis.go_on()
            async with asyncio.timeout(5):
                values = [(await response_from(reader))["member"]["value"] for _ in keys]
            assert values == ["no", "yes", "no"]
        writer.close()


async def test_a_client_that_leaves_while_it_waits_harms_nobody(tmp_path, upstream, redis):
    """Its answer is not sent, and others are served."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        redis.pause()
        for number in range(20):
            _, writer = await relay.address.connect()
            writer.write(request_for(f"gone-{number}"))
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.transport.abort()
        redis.go_on()
        await eventually(relay, "ben", "no")
        assert "Traceback" not in relay.log


async def test_a_request_that_waits_at_the_end_is_answered(tmp_path, upstream, redis):
    """SIGTERM while the database hangs: the response comes before the connection closes."""
    async with relaying(tmp_path, upstream, redis) as relay:
        await eventually(relay, "ann", "yes")
        reader, writer = await relay.address.connect()
        redis.pause()
        writer.write(request_for("late"))
        await asyncio.sleep(0.2)
        relay.signal(signal.SIGTERM)
        async with asyncio.timeout(5):
            assert (await response_from(reader))["member"]["value"] == "no"
        redis.go_on()
        writer.close()
        assert await relay.ended() == 0
        assert "Traceback" not in relay.log


async def test_they_move_with_a_reload(tmp_path, upstream, redis):
    """Another prefix is filled from LaunchDarkly and read; the former one is left as it is."""
    file = tmp_path / "relay.conf"

    def write(prefix: str) -> None:
        file.write_text(
            f"[Main]\nstreamUri = {upstream.url}\nbaseUri = {upstream.url}\n"
            f"[Redis]\nurl = {redis.url}\n"
            f'[Environment "main"]\nsdkKey = {SDK_KEY}\nmobileKey = {MOBILE_KEY}\n{prefix}\n'
        )

    write("prefix = one")
    async with RelayProcess(tmp_path, "--config", str(file), "--from-env") as relay:
        await relay.said("Initialized LaunchDarkly client")
        await eventually(relay, "ann", "yes")
        write("prefix = two")
        relay.signal(signal.SIGHUP)
        await relay.said("Configuration reloaded")
        await relay.until(lambda: redis.do("GET", "two:big_segments_synchronized_on"))
        await eventually(relay, "ann", "yes")
        redis.do("SADD", f"two:big_segment_include:{context_hash('zoe')}", "team.g2")
        await eventually(relay, "zoe", "yes")
        assert "Traceback" not in relay.log
