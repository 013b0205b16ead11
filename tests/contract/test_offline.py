"""Offline mode: ld-relay's recorded scenes, at a real server, with the differences that are wanted."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import json
import os
import re
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from relay.build.relay import build
from relay.config.load import load
from relay.environment import ConnectionState
from relay.errors import ConfigError
from relay.protocol import archive
from relay.protocol.archive import Entry
from relay.relay import Relay
from relay.server.options import ServerOptions
from relay.server.site import build_site
from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.sdk import PythonSDK, Setup, sees
from tests.support.serving import SDK_KEY, Address, Reply, Stream, ask, serving_site, until

GOLDEN = Path(__file__).parent.parent / "golden"
ARCHIVES = GOLDEN / "archives"
SCENES = {
    scene["name"]: scene
    for scene in map(json.loads, (GOLDEN / "offline.jsonl").read_text("utf-8").splitlines())
}
CONTEXT, CONTEXT_KEY = "eyJrZXkiOiJhbm4ifQ", "ann"
NUMBERS = {"alpha": "01", "beta": "02", "gamma": "03"}
NAMES = ("sdkKey", "envId", "envKey", "envName", "projKey", "projName", "mobileKey")

UNKNOWN = (401, "Relay Proxy does not recognize the client credential")


def credential(name: str) -> str:
    """The text of a credential that the recordings name, such as `alpha.sdk1`."""
    environment, kind = name.split(".")
    e = NUMBERS[environment]
    if kind == "id":
        return f"5ca1ab1e0000000000000c{e}"
    letter = {"sdk": "a", "mob": "b"}[kind[:3]]
    return f"{kind[:3]}-5ca1ab1e-0a{e}-4000-8000-0000000{int(e)}{letter}00{kind[3:]}"


class Offline:
    """A relay in offline mode."""

    def __init__(self, path: Path, relay: Relay, port: int, said: Callable[[], str]) -> None:
        self.path = path
        self.relay = relay
        self.address = Address(port)
        self.said = said

    async def put(self, content: bytes | Path) -> None:
        """Replace the archive, and wait until the relay has dealt with it."""
        fresh = self.path.with_suffix(".new")
        if isinstance(content, Path):
            shutil.copy(content, fresh)
        else:
            fresh.write_bytes(content)
        before = self.looks
        fresh.replace(self.path)
        await until(lambda: self.looks > before)
        await asyncio.sleep(0)

    @property
    def looks(self) -> int:
        """Number of the states of the file that were dealt with."""
        texts = ("Reloaded data from", "reload failed", "stat failed")
        return sum(self.said().count(text) for text in texts)

    async def status(self) -> dict[str, Any]:
        return json.loads((await ask(self.address, "/status")).body)

    async def flag(self, key: str) -> Reply:
        return await ask(self.address, "/sdk/flags/where", [("Authorization", key)])


@asynccontextmanager
async def offline(
    path: Path, caplog: pytest.LogCaptureFixture, **variables: str
) -> AsyncGenerator[Offline, None]:
    """Serve an archive."""
    caplog.set_level("INFO")
    variables = {
        "FILE_DATA_SOURCE": str(path),
        "FILE_DATA_SOURCE_MONITORING_INTERVAL": "100ms",
        **variables,
    }
    config = load("", True, False, variables)
    options = ServerOptions(0, None, 2.0)
    site = build_site(config, options.limits)
    async with serving_site(site, options) as port:
        await until(lambda: all(e.payload is not None for e in site.relay.environments.values()))
        yield Offline(path, site.relay, port, lambda: caplog.text)


async def answer(served: Offline, asked: str) -> Reply:
    """Ask what a recording asked."""
    who, _, rest = asked.partition(": GET ")
    name, _, payload_filter = who.partition(" ")
    path, _, signer = rest.partition(", hash of ")
    key = credential(name)
    query = f"?{payload_filter}" if payload_filter else ""
    if signer:
        signer = credential(f"alpha.{signer}")
        digest = hmac.new(signer.encode(), CONTEXT_KEY.encode(), hashlib.sha256)
        query = f"?h={digest.hexdigest()}"
    if path == "/sdk/evalx":
        path = f"/sdk/evalx/{key}/contexts/{CONTEXT}"
    elif path == "/msdk/evalx":
        path = f"/msdk/evalx/contexts/{CONTEXT}"
    return await ask(served.address, path + query, [("Authorization", key)])


def same(body: bytes, recorded: str) -> bool:
    """True if a body agrees with the recorded one; ld-relay adds members to flags."""
    try:
        ours, theirs = json.loads(body), json.loads(recorded)
    except ValueError:
        return body.decode() == recorded
    return _within(ours, theirs)


def _within(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(k in theirs and _within(v, theirs[k]) for k, v in ours.items())
    return bool(ours == theirs)


Wanted = Mapping[str, tuple[int, str]]
"""Status, and beginning of the body, by what is asked."""


async def check(served: Offline, step: dict, wanted: Wanted = MappingProxyType({})) -> None:
    """Compare answers with those of a step, but for the ones that are `wanted` otherwise."""
    for recorded in step.get("answers", []):
        asked = recorded["ask"]
        if asked.endswith("/all"):
            continue
        reply = await answer(served, asked)
        if asked in wanted:
            status, beginning = wanted[asked]
            assert (reply.status, reply.body.decode()[: len(beginning)]) == (status, beginning)
            continue
        assert reply.status == recorded["status"], asked
        assert same(reply.body, recorded["body"]), asked
        assert ("expires" in reply.headers) == ("Expires" in recorded), asked


async def check_status(served: Offline, step: dict) -> None:
    recorded, status = step["status"], await served.status()
    assert status["status"] == recorded["status"]
    assert {
        name: {k: v for k, v in each.items() if k in (*NAMES, "expiringSdkKey", "status")}
        for name, each in status["environments"].items()
    } == {
        name: {k: v for k, v in each.items() if k in (*NAMES, "expiringSdkKey", "status")}
        for name, each in recorded["environments"].items()
    }


def archive_of(step: dict) -> str:
    return step["did"].removeprefix("archive: ").split(";")[0]


STARTS = [
    name
    for name, scene in SCENES.items()
    if name.startswith("start: ") and (scene["steps"][0].get("did") or "").startswith("archive: ")
]
OTHERWISE = {
    # 46, 61: an environment that cannot be loaded is listed, and `/status` is degraded; that of
    # another name is refused.
    "start: metadata of one environment is no JSON": {},
    "start: version is a string in one environment": {},
    "start: envID differs from the member name": {},
    # 46: its keys are known, so its SDKs are asked for patience.
    "start: data of one environment are no JSON": {
        "alpha.sdk1: GET /sdk/flags/where": (503, ""),
        "alpha.mob1: GET /msdk/evalx": (503, ""),
        "alpha.id: GET /sdk/evalx": (503, ""),
    },
    # 24: an unusable item spoils nothing else.
    "start: one flag of one environment has a wrong type": {
        "alpha.sdk1: GET /sdk/flags/where": (404, ""),
        "alpha.mob1: GET /msdk/evalx": (200, "{}"),
        "alpha.id: GET /sdk/evalx": (200, "{}"),
    },
}
NAMED = {  # 60: the cause of an unusable archive is named
    "start: members lie in a folder": "the archive contains a file in a folder",
}


@pytest.mark.parametrize("name", STARTS)
async def test_starts(name, tmp_path, caplog):
    """Each archive is served, or ends the start in ld-relay's words."""
    (step,) = SCENES[name]["steps"]
    path = tmp_path / "archive"
    shutil.copy(ARCHIVES / archive_of(step), path)
    errors = [line for line in step["log"] if "Unable to create relay: " in line]
    if errors:
        text = errors[0].partition("Unable to create relay: ")[2]
        text = NAMED.get(name, re.sub(r"<dir>/ld-relay-<n>/", "", text))
        with pytest.raises(ConfigError) as caught:
            build(load("", True, False, {"FILE_DATA_SOURCE": str(path)}))
        assert str(caught.value).startswith(text)
        return
    wanted = OTHERWISE.get(name)
    if wanted is None:
        async with offline(path, caplog) as served:
            await check(served, step)
            await check_status(served, step)
        said = {line.partition(": ")[2] for line in step["log"] if "[FileDataSource]" in line}
        assert {re.sub(r"<dir>.*", "", line) for line in said if "Monitoring" not in line} <= {
            record.getMessage() for record in caplog.records
        }
        return
    caplog.set_level("INFO")
    async with _degraded(path, caplog) as served:
        await check(served, step, wanted)
        status = await served.status()
        alpha = status["environments"][credential("alpha.id")]
        isolated = "wrong type" in name
        assert status["status"] == ("healthy" if isolated else "degraded")
        assert alpha["status"] == ("connected" if isolated else "disconnected")
        if isolated:
            assert alpha["invalidItemCount"] == 1
        else:
            text = f"Found invalid data for environment {credential('alpha.id')}; skipping"
            assert text in caplog.text


@asynccontextmanager
async def _degraded(path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Offline]:
    """Serve an archive of which only beta is usable."""
    variables = {"FILE_DATA_SOURCE": str(path), "INIT_TIMEOUT": "1ms"}
    options = ServerOptions(0, None, 2.0)
    site = build_site(load("", True, False, variables), options.limits)
    beta = site.relay.environments[credential("beta.id")]
    async with serving_site(site, options) as port:
        await until(lambda: beta.payload is not None)
        yield Offline(path, site.relay, port, lambda: caplog.text)


@pytest.mark.parametrize("name", ["start: no such file", "start: the path is a folder"])
def test_starts_without_a_file(name, tmp_path):
    (step,) = SCENES[name]["steps"]
    path = tmp_path / "archive"
    if "folder" in name:
        path.mkdir()
    (line,) = [line for line in step["log"] if "Unable" in line]
    text = line.partition("Unable to create relay: ")[2].replace("<dir>", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        build(load("", True, False, {"FILE_DATA_SOURCE": str(path)}))
    assert str(caught.value) == text


class Watched:
    """A stream whose bytes are collected."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.received = b""
        self.ended = False
        self._task = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        while True:
            try:
                chunk = await self._stream.chunk()
            except TimeoutError:
                continue
            if not chunk:
                self.ended = True
                return
            self.received += chunk

    def taken(self) -> list[str]:
        """The events since the last time."""
        events = re.findall(r"^event: (\w+)$", self.received.decode(), re.MULTILINE)
        self.received = b""
        return events

    def close(self) -> None:
        self._task.cancel()
        self._stream.close()


async def watch(served: Offline, name: str) -> Watched:
    """Open a stream that a recording names, such as `alpha.sdk1 /all`."""
    who, path = name.split()
    key = credential(who)
    if path == "/ping":
        path = f"/ping/{key}"
    stream = await Stream.open(served.address, path, key=key)
    assert stream.status == 200
    return Watched(stream)


def with_alpha(given: dict) -> bytes:
    """The good archive, with other metadata of alpha."""
    entries = archive.read((ARCHIVES / "good.tar.gz").read_bytes())
    metadata = json.loads(entries[0].raw_metadata)
    metadata["env"].update(given)
    alpha = Entry(entries[0].name, json.dumps(metadata).encode(), entries[0].raw_data)
    return archive.write((alpha, *entries[1:]))


CHANGES: dict[str, Callable[[], dict]] = {
    "alpha, version 3: key sdk2, sdk1 expires in 3 s": lambda: {
        "version": 3,
        "secureMode": True,
        "defaultTtl": 0,
        "sdkKey": {
            "value": credential("alpha.sdk2"),
            "expiring": {
                "value": credential("alpha.sdk1"),
                "timestamp": int(time.time() * 1000) + 1500,
            },
        },
    },
    "alpha, version 4: mobile key mob2, secure mode off": lambda: {
        "version": 4,
        "sdkKey": {"value": credential("alpha.sdk2")},
        "mobKey": credential("alpha.mob2"),
    },
    "alpha, version 5: key sdk3 without a grace period": lambda: {
        "version": 5,
        "sdkKey": {"value": credential("alpha.sdk3")},
        "mobKey": credential("alpha.mob2"),
    },
}
SIGNED_BY_SDK1, SIGNED_BY_SDK2 = (f"alpha.id: GET /sdk/evalx, hash of sdk{i}" for i in (1, 2))
WRONG_HASH = (400, '{"message":"Environment is in secure mode')
FINE = (200, '{"where"')
SIGNATURES = {  # 55: secure mode is checked with the keys that are valid, not with the first one
    "alpha, version 3: key sdk2, sdk1 expires in 3 s": {SIGNED_BY_SDK1: FINE, SIGNED_BY_SDK2: FINE},
    "until the expiry has passed": {SIGNED_BY_SDK1: WRONG_HASH, SIGNED_BY_SDK2: FINE},
    "alpha, version 3 again: nothing changes, as the version and dataId are equal": {
        SIGNED_BY_SDK1: WRONG_HASH,
        SIGNED_BY_SDK2: FINE,
    },
}


@pytest.mark.parametrize(
    "name", ["reload", "reload: unusable archives", "credentials in the archive"]
)
async def test_scenes(name, tmp_path, caplog):
    """Answers, streams and `/status` in each step; streams see a change only if there is one."""
    first, *steps = SCENES[name]["steps"]
    path = tmp_path / "archive"
    shutil.copy(ARCHIVES / archive_of(first), path)
    watched: dict[str, Watched] = {}
    async with offline(path, caplog) as served:
        await check(served, first)
        for step in steps:
            await _do(served, step)
            for stream, recorded in step.get("streams", {}).items():
                if stream not in watched:
                    watched[stream] = await watch(served, stream)
                    await until(lambda s=stream: b"\n\n" in watched[s].received)
                    watched[stream].taken()
                elif "closed_after_s" in recorded:
                    await until(lambda s=stream: watched[s].ended)
                    watched.pop(stream).close()
                else:
                    events = re.findall(r"(?m)^event: (\w+)$", recorded["bytes"])
                    await until(
                        lambda s=stream, e=events: watched[s].received.count(b"\n\n") >= len(e)
                    )
                    assert watched[stream].taken() == events, (step["step"], stream)
            await check(served, step, SIGNATURES.get(step["step"], {}))
            await check_status(served, step)
        for each in watched.values():
            each.close()


async def _do(served: Offline, step: dict) -> None:
    did = step.get("did") or ""
    if step["step"] in CHANGES:
        await served.put(with_alpha(CHANGES[step["step"]]()))
    elif did == "archive: removed":
        served.path.unlink()
        await until(lambda: "stat failed" in served.said())
    elif step["step"].startswith("written in place"):
        content = (ARCHIVES / archive_of(step)).read_bytes()
        before = served.looks
        served.path.write_bytes(content[: len(content) // 2])
        await until(lambda: served.looks > before)
        with served.path.open("ab") as file:
            file.write(content[len(content) // 2 :])
        await until(lambda: served.looks > before + 1)
    elif step["step"] == "until the expiry has passed":
        await until(lambda: "has expired and is no longer valid" in served.said())
    elif did.startswith("archive: "):
        await served.put(ARCHIVES / archive_of(step))


def of(*entries: Entry) -> bytes:
    """A plain archive, whose size depends on the length of its members only."""
    return gzip.decompress(archive.write(entries))


def entry(
    name: str = "env-1",
    lamp: str = "one",
    *,
    version: int = 1,
    data_id: str | None = None,
    **members: Any,
) -> Entry:
    """An environment with one flag."""
    environment = {"envID": name, "version": version, "sdkKey": {"value": SDK_KEY}, **members}
    metadata = {"env": environment, "dataId": lamp if data_id is None else data_id}
    data = all_data(flag(value=lamp))
    return Entry(name, json.dumps(metadata).encode(), data.encode())


async def lamp(served: Offline, key: str = SDK_KEY) -> str:
    """The value of the flag."""
    reply = await ask(served.address, "/sdk/flags/lamp", [("Authorization", key)])
    assert reply.status == 200
    return json.loads(reply.body)["variations"][0]


async def test_another_file_of_the_same_size_and_time_is_noticed(tmp_path, caplog):
    """ld-relay notices it only once the time changes; both then accept an older time."""
    path = tmp_path / "archive"
    path.write_bytes(of(entry(lamp="AAAA")))
    os.utime(path, (1000, 1000))
    async with offline(path, caplog) as served:
        fresh = tmp_path / "fresh"
        fresh.write_bytes(of(entry(lamp="BBBB")))
        os.utime(fresh, (1000, 1000))
        assert fresh.stat().st_size == path.stat().st_size
        fresh.replace(path)
        await until(lambda: served.looks == 1)
        assert await lamp(served) == "BBBB"
        os.utime(path, (500, 500))
        await until(lambda: served.looks == 2)


async def test_a_link_may_lead_to_another_archive(tmp_path, caplog):
    """As Kubernetes replaces what a volume shows: a link to a folder is swapped."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "archive").write_bytes(of(entry(lamp=name)))
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "archive").symlink_to("data/archive")
    async with offline(tmp_path / "archive", caplog) as served:
        assert await lamp(served) == "one"
        (tmp_path / "fresh").symlink_to("two")
        (tmp_path / "fresh").replace(tmp_path / "data")
        await until(lambda: served.looks == 1)
        assert await lamp(served) == "two"


async def test_an_unusable_archive_is_read_once_for_each_state(tmp_path, caplog):
    """And its environments stay healthy, as their data are the last that were good."""
    path = tmp_path / "archive"
    path.write_bytes(of(entry()))
    async with offline(path, caplog) as served:
        await served.put(b"spoilt")
        fresh = path.stat().st_mtime_ns
        await asyncio.sleep(0.35)  # three more checks
        assert served.looks == 1
        os.utime(path, ns=(fresh + 1, fresh + 1))
        await until(lambda: served.looks == 2)
        status = await served.status()
        assert status["status"] == "healthy"
        assert status["archiveStatus"]["unusable"]
        metrics = (await ask(served.address, "/metrics")).body
        assert b"\nrelay_archive_unusable 1\n" in metrics
        await served.put(of(entry()))
        assert await lamp(served) == "one"
        await until(lambda: served.relay.unusable_archive is None)
        assert "archiveStatus" not in await served.status()


@pytest.mark.parametrize(
    "spoilt",
    [Entry("env-1", b"{", b"{}"), Entry("env-1", entry(version=2, data_id="2").raw_metadata, b"{")],
)
async def test_an_environment_that_becomes_unusable_keeps_its_state(spoilt, tmp_path, caplog):
    """Metadata or data (56); its streams stay, `/status` tells, and it is healed by what it was."""
    other = entry("env-2", "other", sdkKey={"value": "sdk-2"})
    path = tmp_path / "archive"
    path.write_bytes(of(entry(), other))
    async with offline(path, caplog) as served:
        stream = await Stream.open(served.address, "/all", key=SDK_KEY)
        assert b"one" in await stream.until(b"\n\n")
        await served.put(of(spoilt, entry("env-2", "news", sdkKey={"value": "sdk-2"})))
        assert [await lamp(served), await lamp(served, "sdk-2")] == ["one", "news"]
        environment = served.relay.environments["env-1"]
        await until(lambda: environment.connection.state is ConnectionState.INTERRUPTED)
        members = (await served.status())["environments"]["env-1"]
        assert members["connectionStatus"]["lastError"]["kind"] == "INVALID_DATA"
        await served.put(of(entry(), other))
        await until(lambda: environment.connection.state is ConnectionState.VALID)
        await served.put(of(entry(lamp="two"), other))
        assert b"two" in await stream.until(b"\n\n")
        stream.close()


async def test_an_environment_that_was_unusable_at_the_start_comes_with_the_next_archive(
    tmp_path, caplog
):
    """Until then it is listed, and the relay is degraded."""
    path = tmp_path / "archive"
    path.write_bytes(of(Entry("env-1", b"{", b"{}")))
    async with offline(path, caplog) as served:
        status = await served.status()
        assert status["status"] == "degraded"
        assert status["environments"]["env-1"]["status"] == "disconnected"
        assert "unusable" in status["environments"]["env-1"]
        await served.put(of(entry()))
        await until(lambda: served.relay.environments["env-1"].payload is not None)
        assert (await served.status())["status"] == "healthy"
        assert await lamp(served) == "one"


async def test_the_age_of_the_data_grows_while_the_archive_is_unusable(
    tmp_path, monkeypatch, caplog
):
    """Otherwise its environments are confirmed now and then."""
    monkeypatch.setattr("relay.offline.CONFIRM_EVERY", 0.0)
    path = tmp_path / "archive"
    path.write_bytes(of(entry()))
    async with offline(path, caplog) as served:
        connection = served.relay.environments["env-1"].connection
        first = connection.last_confirmed
        await until(lambda: connection.last_confirmed > first)
        path.unlink()
        await until(lambda: "stat failed" in caplog.text)
        last = connection.last_confirmed
        await asyncio.sleep(0.25)  # two more checks
        assert connection.last_confirmed == last


async def test_nothing_goes_out(tmp_path, caplog):
    """Events are accepted, dropped and counted; there are no goals, and nobody is asked for them."""
    path = tmp_path / "archive"
    path.write_bytes(of(entry()))
    async with offline(path, caplog, USE_EVENTS="1") as served:
        key = [("Authorization", SDK_KEY)]
        body = b'[{"kind":"custom","key":"a","context":{"kind":"user","key":"b"}}]'
        post = await ask(served.address, "/bulk", key, method="POST", body=body)
        assert post.status == 202
        image = await ask(served.address, "/a/env-1.gif?d=W10=")
        assert (image.status, image.headers["content-type"]) == (200, "image/gif")
        goals = await ask(served.address, "/sdk/goals/env-1")
        assert (goals.status, goals.body) == (200, b"[]")
        members = (await served.status())["environments"]["env-1"]
        assert members["events"]["discarded"] == 2
    assert "Events will be accepted, but will be discarded, since offline mode" in caplog.text
    assert served.relay.events is None


async def test_the_settings_of_all_environments(tmp_path, caplog):
    path = tmp_path / "archive"
    path.write_bytes(of(entry(projName="Shop", envName="Live", defaultTtl=2)))
    origin, header = "https://shop.example", "X-One"
    async with offline(
        path, caplog, ENV_ALLOWED_ORIGIN=origin, ENV_ALLOWED_HEADER=header, EVAL_STREAMS="0"
    ) as served:
        spec = served.relay.environments["env-1"].spec
        assert (spec.allowed_origins, spec.allowed_headers) == ((origin,), (header,))
        assert (spec.ttl, spec.eval_streams, spec.title) == (120, False, "Shop Live")
        await served.put(of(entry(version=2, projName="Shop", envName="Test")))
        spec = served.relay.environments["env-1"].spec
        assert (spec.allowed_origins, spec.ttl, spec.title) == ((origin,), 0, "Shop Test")
    assert 'Initialized LaunchDarkly client for "Shop Live"' in caplog.text


async def test_a_database_follows_the_archive(tmp_path, redis, caplog):
    """The recorded scene, but for 62: a kind that is absent from an archive is empty."""
    first, *steps = SCENES["with Redis"]["steps"]
    prefix = f"off-{credential('alpha.id')}"
    redis.do("HSET", f"{prefix}:features", "stale", '{"key":"stale","version":9}')
    path = tmp_path / "archive"
    shutil.copy(ARCHIVES / archive_of(first), path)
    variables = {"ENV_DATASTORE_PREFIX": "off-$CID", "USE_REDIS": "1", "REDIS_URL": redis.url}
    async with offline(path, caplog, **variables) as served:
        for step in (first, *steps):
            if step is not first:
                await _do(served, step)
            for key, recorded in step["redis"].items():
                if not key.endswith(":features"):
                    await until(lambda k=key: redis.do("EXISTS", k), 30)
                    continue
                emptied = credential("beta.id") in key and step in steps[1:]
                flags = set() if emptied else set(recorded["value"])
                await until(lambda k=key, f=flags: set(redis.hash(k)) == f, 30)
            beta = {"beta.sdk1: GET /sdk/flags/where": (404, "")}
            await check(served, step, beta if "without the kind" in step["step"] else {})


async def test_a_database_that_cannot_be_reached_at_the_start_is_filled_later(
    tmp_path, redis, caplog
):
    """The relay serves meanwhile (57)."""
    path = tmp_path / "archive"
    path.write_bytes(of(entry()))
    redis.kill()
    variables = {"ENV_DATASTORE_PREFIX": "$CID", "USE_REDIS": "1", "REDIS_URL": redis.url}
    async with offline(path, caplog, **variables) as served:
        assert await lamp(served) == "one"
        redis.start()
        await until(lambda: "lamp" in redis.hash("env-1:features"), 20)


async def test_a_python_sdk_through_changes_and_a_rotation(tmp_path, caplog):
    """It sees each change, keeps its stream while its key is valid, and is served by the new key."""
    path = tmp_path / "archive"
    path.write_bytes(of(entry()))
    async with offline(path, caplog) as served:
        url = f"http://127.0.0.1:{served.address.port}"
        async with PythonSDK(Setup(SDK_KEY, url)) as sdk:
            await sdk.ready()
            await sees(sdk, "lamp", "one")
            await served.put(of(entry(lamp="two", data_id="2", version=2)))
            expiring = {"value": SDK_KEY, "timestamp": int(time.time() * 1000) + 60_000}
            keys = {"value": "sdk-new", "expiring": expiring}
            await served.put(of(entry(lamp="two", data_id="2", version=3, sdkKey=keys)))
            async with PythonSDK(Setup("sdk-new", url)) as successor:
                await successor.ready()
                newest = all_data(flag(value="three", version=3))
                changed = entry(lamp="three", version=4, sdkKey=keys)
                await served.put(of(Entry("env-1", changed.raw_metadata, newest.encode())))
                await sees(sdk, "lamp", "three")
                await sees(successor, "lamp", "three")


async def test_the_process_ends_with_an_unusable_archive(tmp_path):
    path = tmp_path / "archive"
    relay = RelayProcess(tmp_path, FILE_DATA_SOURCE=str(path))
    await relay.spawn()
    assert await relay.ended() == 1
    text = f"unable to read file data source {path}: stat {path}: no such file or directory"
    assert f"ERROR: Unable to create relay: {text}" in relay.log


@pytest.mark.parametrize(
    ("content", "code"),
    [((entry(),), 0), ((), 0), ((entry(), Entry("env-2", b"{", b"{}")), 1)],
)
async def test_one_shot_mode_ends(content, code, tmp_path):
    """When all environments are there, or could not be used (63)."""
    path = tmp_path / "archive"
    path.write_bytes(of(*content))
    relay = RelayProcess(tmp_path, FILE_DATA_SOURCE=str(path), EXIT_ALWAYS="1")
    await relay.spawn()
    assert await relay.ended() == code


async def test_a_check_names_what_is_wrong_with_the_archive(tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(b"no archive" * 100)
    check = RelayProcess(tmp_path, "check", "--from-env", FILE_DATA_SOURCE=str(path))
    await check.spawn()
    assert await check.ended() == 1
    assert "archive/tar: invalid tar header" in check.log
    assert f"fileDataSource = {path}" in check.log
