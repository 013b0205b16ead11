"""Scenes of ld-relay with automatic configuration, played again with this relay."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.serving import ask
from tests.support.upstream import EVENT_STREAM, ScriptedUpstream

GOLDEN = Path(__file__).parents[1] / "golden" / "autoconfig.jsonl"
SCENES: dict[str, dict[str, Any]] = {
    scene["name"]: scene for scene in map(json.loads, GOLDEN.read_text().splitlines())
}
PLAYED = [
    "environments come and go",
    "properties change in place",
    "messages that do not fit are passed over",
    "rotation with a grace period",
    "rotation without a grace period",
    "rotation: the old key is already expired",
    "rotation: the expiring key is not the previous one",
    "rotation: the message repeats the old expiring key",
    "origins and headers of the auto-configured environments",
]
WANTED = {
    ("properties change in place", "patch, version 7: project key of an unknown project"),
    ("properties change in place", "patch, version 8: project key of another known project"),
    # An environment that is known is served, also from a stored list, which a patch changes; only
    # of the others nothing is known yet.
    ("messages that do not fit are passed over", "patch: alpha, before any put"),
    (
        "messages that do not fit are passed over",
        "patch: alpha version 2 (defaultTtl, name), still before any put",
    ),
    (
        "messages that do not fit are passed over",
        "put without data: taken as a put without environments, everything is removed",
    ),
    (
        "messages that do not fit are passed over",
        "patch with an empty ID: an environment with the empty ID is added",
    ),
    (
        "rotation: the old key is already expired",
        "patch, version 2: key sdk2, sdk1 expired one second ago",
    ),
    ("rotation: the old key is already expired", "one second later"),
    (
        "rotation: the expiring key is not the previous one",
        "patch, version 2: key sdk3, sdk2 (never seen) expires in 3 s",
    ),
    ("rotation: the expiring key is not the previous one", "until the expiry has passed"),
}
"""Steps in which this relay does not what ld-relay did; tests of their own say what it does."""

KEY = "rel-5ca1ab1e-0001-4000-8000-00000000c001"
NAMES = {"alpha": 1, "beta": 2, "gamma": 3, "delta": 4}
CONTEXT = base64.urlsafe_b64encode(b'{"kind":"user","key":"anna"}').decode()
COMPARED = (
    *("sdkKey", "envId", "envKey", "envName", "projKey", "projName"),
    *("mobileKey", "expiringSdkKey"),
)
PATIENCE = 12.0
"""Seconds until a step must have had its effect; the longest expiry is 9 s away."""


def credential(name: str) -> str:
    """The credential that a recording calls, for example, `alpha.sdk1`."""
    environment, kind = name.split(".")
    number = NAMES[environment]
    if kind == "id":
        return f"5ca1ab1e0000000000000c{number:02}"
    letter = "a" if kind.startswith("sdk") else "b"
    return f"{kind[:3]}-5ca1ab1e-0a{number:02}-4000-8000-0000000{number}{letter}00{kind[3:]}"


class Cloud:
    """The automatic-configuration stream of LaunchDarkly, on which a test says what is sent."""

    def __init__(self) -> None:
        self.streams: list[web.StreamResponse] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers=EVENT_STREAM)
        await stream.prepare(request)
        self.streams.append(stream)
        await asyncio.Event().wait()
        return stream

    async def send(self, text: str) -> None:
        now = int(time.time() * 1000)
        text = re.sub(r'"<now([+-]\d+)>"', lambda match: str(now + int(match[1])), text)
        await self.streams[-1].write(text.encode())


def request(asked: str) -> tuple[str, list[tuple[str, str]]]:
    """The path and headers of a recorded request."""
    name, _, what = asked.partition(": GET ")
    name = name.partition(" ")[0]
    path, _, proof = what.partition(" with ")
    if path.endswith("evalx"):
        if name.endswith(".id"):
            path += f"/{credential(name)}"
        path += f"/contexts/{CONTEXT}"
        if proof:
            key = credential("alpha.sdk1").encode()
            made = hmac.new(key, b"anna", hashlib.sha256).hexdigest()
            path += f"?h={made}"
    return path, [] if name.endswith(".id") else [("Authorization", credential(name))]


async def seen(relay: RelayProcess, scene: str, step: dict[str, Any]) -> tuple[Any, Any]:
    """Return this relay's status and answers, and ld-relay's, in the form that is compared."""
    ours: dict[str, object] = {}
    theirs: dict[str, object] = {}
    # An update before the first put is lost in ld-relay.
    lost = ("envName",) if scene == "messages that do not fit are passed over" else ()
    if "status" in step:
        status = json.loads((await ask(relay.address, "/status")).body)
        for side, page in ((ours, status), (theirs, step["status"])):
            side["environments"] = {
                name: {member: shown.get(member) for member in COMPARED if member not in lost}
                for name, shown in page["environments"].items()
            }
    for answer in step.get("answers", []):
        asked = answer["ask"]
        if "filter" in asked or not asked.startswith(tuple(NAMES)):
            continue
        reply = await ask(relay.address, *request(asked), patience=0.05)
        ours[asked] = (reply.status, reply.body.decode() if reply.status >= 400 else "")
        theirs[asked] = (answer["status"], answer["body"] if answer["status"] >= 400 else "")
        if answer["body"] == "client was not initialized":
            theirs[asked] = (200, "")  # a rotation has no gap
    return ours, theirs


@pytest.mark.parametrize("name", PLAYED)
async def test_a_scene_of_ld_relay(name, tmp_path):
    """After each message, `/status` and answers are the same, but for the wanted differences."""
    scene, cloud = SCENES[name], Cloud()
    variables = {k: v for k, v in scene["environment variables"].items() if k != "STREAM_URI"}
    async with ScriptedUpstream() as upstream:
        upstream.always(KEY, cloud.answer)
        for environment in NAMES:
            for number in range(1, 5):
                upstream.serve(credential(f"{environment}.sdk{number}"), all_data(flag("where")))
        relay = RelayProcess(tmp_path, STREAM_URI=upstream.url, **variables)
        async with relay:
            await relay.until(lambda: bool(cloud.streams))
            for number, step in enumerate(scene["steps"]):
                if "sent" in step and step["sent"]["on"] == "the auto-configuration stream":
                    streams = len(cloud.streams)
                    await cloud.send(step["sent"]["text"])
                    if "put without data" in step["step"]:
                        await relay.until(lambda: len(cloud.streams) > streams)  # noqa: B023
                        continue
                    # A message that this relay says something about, behind the recorded one.
                    marker = {"path": f"/filters/{number}", "data": {"key": f"marker-{number}-"}}
                    marker["data"] |= {"version": number + 1}
                    await cloud.send(f"event: patch\ndata: {json.dumps(marker)}\n\n")
                    await relay.said(f"marker-{number}-")
                if (name, step["step"]) in WANTED:
                    continue
                deadline = time.monotonic() + PATIENCE
                ours, theirs = await seen(relay, name, step)
                while ours != theirs and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)
                    ours, theirs = await seen(relay, name, step)
                assert ours == theirs, (step["step"], relay.log)
