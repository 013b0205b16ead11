"""Scenes of ld-relay with big segments in Redis, played again with this relay.

The recordings do not have the answers to polls; they follow from what ld-relay wrote.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.process import RelayProcess
from tests.support.redis import RedisServer
from tests.support.serving import Stream, ask
from tests.support.upstream import BIG_SEGMENTS, ScriptedUpstream, event

GOLDEN = Path(__file__).parents[1] / "golden" / "bigsegments.jsonl"
SCENES: dict[str, dict[str, Any]] = {
    scene["name"]: scene for scene in map(json.loads, GOLDEN.read_text().splitlines())
}
SDK_KEY = "sdk-5ca1ab1e-0a01-4000-8000-00000001a001"
MOBILE_KEY = "mob-5ca1ab1e-0a01-4000-8000-00000001b001"
PLAYED = [
    "Redis: first synchronisation and patches on the stream",
    "Redis: patches that do not fit, stream errors",
    "Redis: the stream is refused",
    "Redis: when the synchroniser starts",
    "Redis: filtered environments",
    "Redis: no cursor, the first patch has a previous version",
]
WANTED = {
    "the cursor vanishes; event with empty versions twice": "everything is fetched again instead",
    "event with a patch that changes nothing": "clients get no ping",
}
"""Steps in which this relay differs, and how."""

FOREIGN = re.compile(rb"\$relay$|features$|segments$|\$inited$")
"""Keys that are not of big segments."""


def patches_written(commands: list[dict[str, Any]], prefix: str = "big") -> list[dict[str, Any]]:
    """The patches of one environment that ld-relay has written, in order."""
    patches: list[dict[str, Any]] = []
    current: dict[str, Any] | None = None
    for command in (each["command"] for each in commands):
        name, key, *values = [*command, "", ""][:3]
        name = name.lower()
        if name == "set" and key == f"{prefix}:big_segments_cursor":
            previous = patches[-1]["version"] if patches else ""
            changes = {kind: {"add": [], "remove": []} for kind in ("included", "excluded")}
            current = {"version": values[0], "previousVersion": previous, "changes": changes}
            patches.append(current)
        elif name in {"sadd", "srem"} and key.startswith(f"{prefix}:big_segment_") and current:
            kind = "included" if ":big_segment_include:" in key else "excluded"
            current["segmentId"] = values[0]
            current["changes"][kind]["add" if name == "sadd" else "remove"].append(
                key.rpartition(":")[2]
            )
    return [{"segmentId": "none.g1", **each} for each in patches]


def expected_keys(recorded: dict[str, Any]) -> dict[str, Any]:
    """What ld-relay's database held of big segments."""
    return {
        key: sorted(each["value"]) if each["type"] == "set" else each["value"]
        for key, each in recorded.items()
        if not FOREIGN.search(key.encode())
    }


def stored_keys(redis: RedisServer) -> dict[str, Any]:
    """The same of this relay's database."""
    held: dict[str, Any] = {}
    for key in redis.do("KEYS", "*"):
        if FOREIGN.search(key):
            continue
        if redis.do("TYPE", key) == b"set":
            value: Any = sorted(each.decode() for each in redis.do("SMEMBERS", key))
        else:
            value = redis.do("GET", key).decode()
        held[key.decode()] = "<ms>" if key.endswith(b"synchronized_on") else value
    return held


def context_of(question: str) -> dict[str, Any] | None:
    """The context of a question, as it is told in words."""
    _, _, who = question.partition(": ")
    name, _, more = who.partition(", ")
    if name in {"ann", "ben", "both", "cleo"}:
        return {"kind": "user", "key": name, **({"group": "vip"} if more == "vip" else {})}
    return None


def flags_put(scene: dict[str, Any]) -> str:
    """The data set of a scene, as ld-relay sent it on to an SDK or wrote it."""
    stored = scene["steps"][0]["redis"]
    kinds = (("flags", "big:features"), ("segments", "big:segments"))
    return json.dumps(
        {
            kind: {key: json.loads(item) for key, item in stored[name]["value"].items()}
            for kind, name in kinds
        }
    )


def without_times(status: dict[str, Any]) -> dict[str, Any]:
    """The state of big segments of each environment."""
    states = {}
    for name, each in status["environments"].items():
        state = each.get("bigSegmentStatus")
        if state and state["lastSynchronizedOn"]:
            state = {**state, "lastSynchronizedOn": "<ms>"}
        states[name] = state
    return states


class Scene:
    """One scene on its way."""

    def __init__(
        self, scene: dict[str, Any], upstream: ScriptedUpstream, redis: RedisServer
    ) -> None:
        self.scene = scene
        self.upstream = upstream
        self.redis = redis
        self.patches: list[dict[str, Any]] = []

    def know(self, step: dict[str, Any]) -> None:
        """Let polls answer with what ld-relay wrote in a step."""
        new = patches_written(step["commands"])
        if new and self.patches:
            new[0]["previousVersion"] = self.patches[-1]["version"]
        self.patches += new
        self.upstream.patches[SDK_KEY] = list(self.patches)

    async def compare(self, relay: RelayProcess, step: dict[str, Any]) -> None:
        """Wait until database, answers and status are those of the recording."""
        expected: Any = None
        found: Any = None
        for _ in range(200):
            expected, found = await self._seen(relay, step)
            if expected == found:
                return
            await asyncio.sleep(0.05)
        assert found == expected, step["step"]

    async def _seen(self, relay: RelayProcess, step: dict[str, Any]) -> tuple[Any, Any]:
        expected: list[Any] = [expected_keys(step["redis"])]
        found: list[Any] = [stored_keys(self.redis)]
        page = await ask(relay.address, "/status")
        expected.append(without_times(step["status"]))
        found.append(without_times(json.loads(page.body)))
        for answer in step.get("answers", []):
            context = context_of(answer["ask"])
            if context is None or "vip" in answer["ask"]:
                continue
            segment = base64.urlsafe_b64encode(json.dumps(context).encode()).decode()
            reasons = "?withReasons=true" if "with reasons" in answer["ask"] else ""
            reply = await ask(
                relay.address,
                f"/msdk/evalx/contexts/{segment}{reasons}",
                headers=[("Authorization", MOBILE_KEY)],
            )
            expected.append((answer["ask"], json.loads(answer["body"])))
            found.append((answer["ask"], json.loads(reply.body)))
        return expected, found


@pytest.mark.parametrize("name", PLAYED)
async def test_scenes_go_as_recorded(name, tmp_path, redis):
    """Database, evaluations and status are those of ld-relay after each step."""
    scene = SCENES[name]
    first = scene["steps"][0]
    async with ScriptedUpstream() as upstream:
        for key in (SDK_KEY, f"{SDK_KEY}?filter=north"):
            upstream.serve(key, flags_put(scene))
        if name == "Redis: the stream is refused":
            answers = [each for step in scene["steps"] for each in step["upstream"]]
            from tests.support.upstream import status  # noqa: PLC0415

            codes = [e["answer"] for e in answers if e["request"] == "GET /big-segments"]
            upstream.script_path("/big-segments", *(status(c) for c in codes if c != 200))
        play = Scene(scene, upstream, redis)
        play.know(first)
        if name == "Redis: no cursor, the first patch has a previous version":
            upstream.patches[SDK_KEY][0]["previousVersion"] = "v8"
        given = {
            **scene["environment variables"],
            "REDIS_URL": redis.url,
            "STREAM_URI": upstream.url,
            "BASE_URI": upstream.url,
        }
        async with RelayProcess(tmp_path, **given) as relay:
            for step in scene["steps"]:
                if step["step"] in WANTED and step["step"].startswith("the cursor"):
                    continue
                if name == "Redis: the stream is refused" and step is not scene["steps"][-1]:
                    continue  # here it is over too soon to be seen
                await _do(play, upstream, step, is_first=step is first)
                await play.compare(relay, step)


async def _do(
    play: Scene, upstream: ScriptedUpstream, step: dict[str, Any], *, is_first: bool
) -> None:
    """Do what was done to ld-relay in a step."""
    if not is_first:
        play.know(step)
    if sent := step.get("sent"):
        stream = BIG_SEGMENTS + SDK_KEY if "big-segment" in sent["on"] else SDK_KEY
        await upstream.raw(stream, sent["text"].encode())
    polls = any(each["what"] == "poll" for each in step["upstream"])
    if not is_first and (step.get("did") == "closed" or (polls and not sent)):
        upstream.close_streams(BIG_SEGMENTS + SDK_KEY)


async def test_clients_get_a_ping_for_what_changed(tmp_path, redis):
    """As recorded, but none for a patch that changes nothing."""
    scene = SCENES["Redis: first synchronisation and patches on the stream"]
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, flags_put(scene))
        given = {
            **scene["environment variables"],
            "REDIS_URL": redis.url,
            "STREAM_URI": upstream.url,
            "BASE_URI": upstream.url,
        }
        play = Scene(scene, upstream, redis)
        play.know(scene["steps"][0])
        async with RelayProcess(tmp_path, **given) as relay:
            await play.compare(relay, scene["steps"][0])
            await asyncio.sleep(1.2)
            stream = await Stream.open(relay.address, "/mping", key=MOBILE_KEY)
            assert await stream.chunk() == b"event: ping\ndata:  \n\n"
            nothing = {
                "segmentId": "team.g2",
                "version": "v4",
                "previousVersion": "v3",
            }
            await upstream.raw(BIG_SEGMENTS + SDK_KEY, event(nothing))
            something = {
                **nothing,
                "version": "v5",
                "previousVersion": "v4",
                "changes": {"included": {"add": ["hash"]}},
            }
            await upstream.raw(BIG_SEGMENTS + SDK_KEY, event(something))
            assert await stream.chunk() == b"event: ping\ndata:  \n\n"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await stream.chunk()
            stream.close()
