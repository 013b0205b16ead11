"""Offline mode: ld-relay's recorded scenes, at a real server, with the differences that are wanted."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import shutil
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from relay.build import build
from relay.config.load import load
from relay.errors import ConfigError
from relay.protocol import archive
from relay.protocol.archive import Entry
from relay.relay import Relay
from relay.server.options import ServerOptions
from relay.server.site import build_site
from tests.support.serving import Address, Reply, Stream, ask, serving_site, until

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
    """Whether a body says what was recorded; ld-relay adds members to flags."""
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
