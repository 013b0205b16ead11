"""Scenes of ld-relay with big segments, played again with this relay: those in Redis.

The recordings do not have the answers to polls; they follow from what ld-relay wrote.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from relay.bigsegments import synchroniser
from tests.bigsegments.test_synchroniser import synchronising
from tests.support.process import RelayProcess
from tests.support.redis import RedisServer, empty_redis, shared_redis
from tests.support.serving import Stream, ask, until
from tests.support.upstream import BIG_SEGMENTS, ScriptedUpstream, body, event, status

__all__ = ["empty_redis", "shared_redis"]

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
    "not a number; 6 seconds later": "an unknown age is stale, not healthy",
    "synchronised a moment ago": "healthy at once, not five seconds later",
    "event with one patch on both streams": "one stream for both, and the clients of both hear of it",
    "cloud closes the big-segment stream and refuses sdk1 from now on (answers 401)": (
        "the present key is used instead of the first one for ever"
    ),
}
"""Steps in which this relay differs, and how."""

POLL, STREAM = "/sdk/big-segments/revisions", "/big-segments"

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


def patches_in_table(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of a table of DynamoDB."""
    patches: list[dict[str, Any]] = []
    changes: dict[str, Any] = {}
    reference = "none.g1"
    for each in requests:
        if each["operation"] == "TransactWriteItems" and each["status"] == HTTPStatus.OK:
            for update in (item["Update"] for item in each["request"]["TransactItems"][1:]):
                [name], [values] = (
                    update["ExpressionAttributeNames"].values(),
                    update["ExpressionAttributeValues"].values(),
                )
                [reference] = values["SS"]
                verb = "add" if update["UpdateExpression"].startswith("ADD") else "remove"
                change = changes.setdefault(name, {"add": [], "remove": []})
                change[verb].append(update["Key"]["key"]["S"])
        elif each["operation"] == "UpdateItem":
            values = each["request"]["ExpressionAttributeValues"]
            if ":1" in values:  # the cursor, and not the time
                versions = {"version": values[":1"]["S"], "previousVersion": values[":0"]["S"]}
                patches.append({"segmentId": reference, **versions, "changes": changes})
                changes, reference = {}, "none.g1"
    return patches


def expected_items(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Items of big segments in ld-relay's table."""
    [items] = tables.values()
    return [
        {name: sorted(each["SS"]) if "SS" in each else each for name, each in item.items()}
        for item in items
        if "big_segments_" in item["namespace"]["S"]
    ]


def expected_keys(recorded: dict[str, Any]) -> dict[str, Any]:
    """Keys of big segments in ld-relay's database, with their values."""
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


USERS = ("ann", "ben", "both", "cleo")
CONTEXTS: dict[str, dict[str, Any]] = {
    **{name: {"kind": "user", "key": name} for name in USERS},
    **{f"{name}, vip": {"kind": "user", "key": name, "vip": True} for name in USERS},
    "listed in the segment itself": {"kind": "user", "key": "listed"},
    "user acme": {"kind": "user", "key": "acme"},
    "org acme": {"kind": "org", "key": "acme"},
    "multi: user ann, org acme": {"kind": "multi", "user": {"key": "ann"}, "org": {"key": "acme"}},
}
"""Contexts by the words of the recordings."""


def context_of(question: str) -> dict[str, Any] | None:
    """The context of a question, as it is told in words."""
    return CONTEXTS.get(question.partition(": ")[2])


def flags_put(scene: dict[str, Any], prefix: str = "big") -> str:
    """The data set of a scene, as ld-relay sent it on to an SDK or wrote it."""
    stored = scene["steps"][0]["redis"]
    kinds = (("flags", f"{prefix}:features"), ("segments", f"{prefix}:segments"))
    return json.dumps(
        {
            kind: {key: json.loads(item) for key, item in stored[name]["value"].items()}
            for kind, name in kinds
        }
    )


def variables(
    scene: dict[str, Any], upstream: ScriptedUpstream, redis: RedisServer
) -> dict[str, str]:
    """The variables of a scene, with this test's servers."""
    own = {"REDIS_URL": redis.url, "STREAM_URI": upstream.url, "BASE_URI": upstream.url}
    return {**scene["environment variables"], **own}


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
    """One scene on its way.

    Args:
        upstream: it answers polls as LaunchDarkly did.
        stored: returns what this relay's database holds of big segments.
    """

    def __init__(self, upstream: ScriptedUpstream, stored: Callable[[], Any]) -> None:
        self.upstream = upstream
        self.patches: list[dict[str, Any]] = []
        self._stored = stored

    def know(self, step: dict[str, Any]) -> None:
        """Let polls answer with what ld-relay wrote in a step."""
        if "commands" in step:
            new = patches_written(step["commands"])
        else:
            new = patches_in_table(step["requests to the database"])
        if new and self.patches:
            new[0]["previousVersion"] = self.patches[-1]["version"]
        self.patches += new
        self.upstream.patches[SDK_KEY] = list(self.patches)

    async def compare(self, relay: RelayProcess, step: dict[str, Any], *, status: str = "") -> None:
        """Wait until database, answers and status are those of the recording.

        Args:
            status: status of big segments that answers have instead of the recorded one.
        """
        expected: Any = None
        found: Any = None
        for _ in range(200):
            expected, found = await self._seen(relay, step, status)
            if expected == found:
                return
            await asyncio.sleep(0.05)
        assert found == expected, step["step"]

    async def _seen(
        self, relay: RelayProcess, step: dict[str, Any], status: str
    ) -> tuple[Any, Any]:
        recorded = step.get("redis"), step.get("dynamodb")
        expected: list[Any] = []
        found: list[Any] = []
        if recorded != (None, None):
            keys, tables = recorded
            expected.append(expected_items(tables) if keys is None else expected_keys(keys))
            found.append(self._stored())
        page = await ask(relay.address, "/status")
        expected.append(without_times(step["status"]))
        found.append(without_times(json.loads(page.body)))
        for answer in step.get("answers", []):
            context = context_of(answer["ask"])
            if context is None:
                continue
            segment = base64.urlsafe_b64encode(json.dumps(context).encode()).decode()
            reasons = "?withReasons=true" if "with reasons" in answer["ask"] else ""
            reply = await ask(
                relay.address,
                f"/msdk/evalx/contexts/{segment}{reasons}",
                headers=[("Authorization", MOBILE_KEY)],
            )
            body = re.sub('(?<=Status":")(HEALTHY|STALE)', status or r"\1", answer["body"])
            expected.append((answer["ask"], json.loads(body)))
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
            codes = [e["answer"] for e in answers if e["request"] == f"GET {STREAM}"]
            upstream.script_path(STREAM, *(status(c) for c in codes if c != 200))
        play = Scene(upstream, lambda: stored_keys(redis))
        play.know(first)
        if name == "Redis: no cursor, the first patch has a previous version":
            upstream.patches[SDK_KEY][0]["previousVersion"] = "v8"
        async with RelayProcess(tmp_path, **variables(scene, upstream, redis)) as relay:
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
        play = Scene(upstream, lambda: stored_keys(redis))
        play.know(scene["steps"][0])
        async with RelayProcess(tmp_path, **variables(scene, upstream, redis)) as relay:
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


async def test_errors_of_polls_are_waited_out(server, monkeypatch):
    """After the same answers the database holds the same; with short delays instead of long ones."""
    [step] = SCENES["Redis: poll errors"]["steps"]
    codes = [e["answer"] for e in step["upstream"] if e["what"] == "poll"][:4]
    monkeypatch.setattr("tests.bigsegments.test_synchroniser.KEY", SDK_KEY)
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, "{}")
        upstream.patches[SDK_KEY] = patches_written(step["commands"])
        no_json = body(b"nonsense", "application/json")
        upstream.script_path(POLL, *map(status, codes), no_json)
        async with synchronising(upstream, server, [SDK_KEY]) as run:
            await run.cursor("v1")
            expected = expected_keys(step["redis"])
            await until(lambda: stored_keys(server) == expected, 10)
        paths = [each.path for each in upstream.requests]
        assert paths[len(codes) + 1 :] == [
            POLL,
            f"{POLL}?after=v1",
            STREAM,
            f"{POLL}?after=v1",
        ]


async def test_the_age_of_members_is_told_as_recorded(tmp_path, redis):
    """Old, very old, unknown and unreadable times of the last synchronisation; no database."""
    scene = SCENES["Redis: stale, missing, unavailable"]
    synchronised, *aged, stopped = scene["steps"]
    key = "big:big_segments_synchronized_on"
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, flags_put(scene))
        play = Scene(upstream, lambda: stored_keys(redis))
        play.know(synchronised)
        async with RelayProcess(tmp_path, **variables(scene, upstream, redis)) as relay:
            await play.compare(relay, synchronised)
            for step in aged:
                if ago := re.search(r"set to (\d+) s ago", step["step"]):
                    redis.do("SET", key, str(int((time.time() - int(ago[1])) * 1000)))
                elif step["step"].startswith("not a number"):
                    redis.do("SET", key, "not a number")
                else:
                    redis.do("DEL", key)
                wanted = "STALE" if step["step"] in WANTED else ""
                await play.compare(relay, step, status=wanted)
            redis.kill()
            await play.compare(relay, {**stopped, "redis": None})


async def test_evaluations_before_the_first_synchronisation(tmp_path, redis):
    """Without members at first, then with them, and healthy at once."""
    scene = SCENES["Redis: evaluated before the first synchronisation"]
    before, just_synchronised, later = scene["steps"]
    may_answer = asyncio.Event()
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, flags_put(scene))
        play = Scene(upstream, lambda: stored_keys(redis))
        play.know(just_synchronised)
        original = upstream._answer

        async def late(request):
            await may_answer.wait()
            return await original(request)

        upstream.script_path(POLL, late)
        async with RelayProcess(tmp_path, **variables(scene, upstream, redis)) as relay:
            await relay.said("Initialized LaunchDarkly client")
            await play.compare(relay, before)
            may_answer.set()
            assert just_synchronised["step"] in WANTED
            await play.compare(relay, just_synchronised, status="HEALTHY")
            await play.compare(relay, later)


async def test_silence_is_confirmed(server, monkeypatch):
    """After half a minute of silence one command says that all is well, and nothing else is said."""
    _, silent = SCENES["Redis: 30 seconds of silence on the stream"]["steps"]
    [command] = (each["command"] for each in silent["commands"])
    assert command == ["set", "big:big_segments_synchronized_on", "<ms>"]
    assert silent["synchronized_on moved by s"] == synchroniser.CONFIRM_EVERY
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, "{}")
        monkeypatch.setattr("tests.bigsegments.test_synchroniser.KEY", SDK_KEY)
        async with synchronising(upstream, server, [SDK_KEY]) as run:
            await run.cursor(None)
            before = server.do("GET", command[1])
            await run.synchroniser.confirm()
            assert server.do("GET", command[1]) == before
            monkeypatch.setattr(synchroniser, "CONFIRM_EVERY", 0.05)
            await asyncio.sleep(0.1)
            server.do("CONFIG", "RESETSTAT")
            await run.synchroniser.confirm()
            assert server.do("GET", command[1]) > before
            assert server.calls()["set"] == 1


async def test_two_relays_on_one_database(tmp_path, redis):
    """The database is that of the recording after each step; the clients of both hear of changes."""
    scene = SCENES["Redis: two relays on one database"]
    started, patched, later = scene["steps"]
    assert [each["bytes"] for each in patched["streams"].values()].count("") == 1
    assert patched["step"] in WANTED
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, flags_put(scene))
        play = Scene(upstream, lambda: stored_keys(redis))
        play.know(started)
        given = variables(scene, upstream, redis)
        async with (
            RelayProcess(folders[0], **given) as one,
            RelayProcess(folders[1], **given) as two,
        ):
            for relay in (one, two):
                await relay.said("Initialized LaunchDarkly client")
                await play.compare(relay, started)
            await asyncio.sleep(1.2)  # notices come at most once a second
            streams = [await Stream.open(r.address, "/mping", key=MOBILE_KEY) for r in (one, two)]
            for stream in streams:
                await stream.until(b"\n\n")
            play.know(patched)
            await upstream.raw(BIG_SEGMENTS + SDK_KEY, patched["sent"]["text"].encode())
            for stream in streams:
                assert await stream.until(b"\n\n") == b"event: ping\ndata:  \n\n"
                stream.close()
            for relay in (one, two):
                await play.compare(relay, patched)
                await play.compare(relay, later)
        assert upstream.asked(STREAM) == 1


async def test_a_key_is_rotated(tmp_path, redis):
    """The database is that of the recording; the new key is used when the old one ends."""
    scene = SCENES["Redis: key rotation by automatic configuration"]
    first, rotated, refused = scene["steps"]
    assert refused["step"] in WANTED
    new_key, list_key = (
        SDK_KEY.removesuffix("1") + "2",
        scene["environment variables"]["AUTO_CONFIG_KEY"],
    )
    prefix = "big-5ca1ab1e0000000000000c01"
    async with ScriptedUpstream() as upstream:
        data = flags_put(scene, prefix)
        upstream.serve(SDK_KEY, data)
        upstream.serve(new_key, data)
        start = first["sent"]["text"].encode()
        upstream.serve(list_key, "{}")

        async def list_of_environments(request):
            return await upstream._stream(request, list_key, start)

        upstream.always(list_key, list_of_environments)
        patches = patches_written(first["commands"], prefix)
        upstream.patches[SDK_KEY] = upstream.patches[new_key] = patches
        play = Scene(upstream, lambda: stored_keys(redis))
        async with RelayProcess(tmp_path, **variables(scene, upstream, redis)) as relay:
            await play.compare(relay, first)
            await upstream.raw(list_key, rotated["sent"]["text"].encode())
            await upstream.connected(new_key)
            await play.compare(relay, rotated)
            upstream.requests.clear()
            upstream.always(SDK_KEY, status(401))
            upstream.close_streams(BIG_SEGMENTS + SDK_KEY)
            await upstream.connected(BIG_SEGMENTS + new_key)
            await play.compare(relay, refused)
        keys = {e.headers["Authorization"] for e in upstream.requests if "big-seg" in e.path}
        assert keys == {new_key}
