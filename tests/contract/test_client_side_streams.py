"""Promises of client-side streams, at both doors, with and without TLS: pings, evaluated flags."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import tracemalloc
from pathlib import Path

import pytest

from relay.evaluation.client import EvalClient
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import parse_context
from relay.model.credential import MobileKey
from relay.protocol.clientside import PING
from relay.streams.hub import StreamLimits
from tests.contract.test_server_side_streams import replay
from tests.support import data
from tests.support.data import flag, segment
from tests.support.serving import (
    SDK_KEY,
    Address,
    Served,
    Stream,
    ask,
    serving,
    stalled_socket,
    until,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "streams.jsonl"
ORIGIN = "https://shop.example.com"
ANNA = {"kind": "user", "key": "anna"}
BEN = {"kind": "user", "key": "ben"}
OPEN = {"clientSideAvailability": {"usingMobileKey": True, "usingEnvironmentId": True}}
CROWD = [{"attribute": "", "op": "segmentMatch", "values": ["crowd"]}]


def served(**more) -> Served:
    return Served(mobile_key=MobileKey("mob-1"), **more)


def encoded(context: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(context).encode()).decode().rstrip("=")


def visible(key: str = "lamp", version: int = 1, value: object = True, **members) -> dict:
    return flag(key, version, value, **OPEN, **members)


def for_crowd(version: int = 1, **members) -> dict:
    """A flag that is `in` for a segment and `out` for everybody else."""
    rules = [{"id": "r", "variation": 0, "clauses": CROWD}]
    more = {"variations": ["in", "out"], "fallthrough": {"variation": 1}, "rules": rules}
    return visible("for-crowd", version) | more | members


async def give(served: Served, *messages: bytes) -> None:
    """Let upstream's messages take effect."""
    for message in messages:
        await replay(served, message.decode())


async def begin(served: Served, *items: dict) -> None:
    await give(served, data.put(data.all_data(*items)))


async def evaluating(
    address: Address, context: dict, path: str = "/meval/", query: str = ""
) -> Messages:
    """Open an evaluating stream."""
    return Messages(await Stream.open(address, f"{path}{encoded(context)}{query}", key="mob-1"))


class Messages:
    """The messages of a stream, one by one."""

    def __init__(self, stream: Stream) -> None:
        assert stream.status == 200, stream.head
        self.stream = stream
        self._left: list[tuple[str, dict]] = []
        self.version = 0

    async def next(self) -> tuple[str, dict]:
        """The next message; of changes, versions are greater than in all chunks before."""
        if not self._left:
            for message in (await self.stream.until(b"\n\n")).decode().split("\n\n")[:-1]:
                name, text = message.split("\n")
                self._left.append((name[7:], json.loads(text[6:])))
            changes = [content["version"] for name, content in self._left if name != "put"]
            assert all(version > self.version for version in changes)
            self.version = max([self.version, *changes])
        return self._left.pop(0)

    async def put(self) -> dict:
        """The next message, which gives everything: value by key."""
        name, content = await self.next()
        assert name == "put"
        return {key: entry["value"] for key, entry in content.items()}

    async def patch(self) -> tuple[str, object]:
        """The next message, which gives a flag: its key and value."""
        name, content = await self.next()
        assert name == "patch", (name, content)
        return content["key"], content["value"]

    def close(self) -> None:
        self.stream.close()


def ping_recordings(*setups: str) -> list:
    lines = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()]
    return [
        pytest.param(line, id=line["name"])
        for line in lines
        if line["setup"] in setups and not line["name"].endswith(("/all", "/flags"))
    ]


async def recorded_stream(address: Address, line: dict) -> Stream:
    """Ask as in a recording, with our own credentials."""
    asked = line["request"]
    path = asked["path"].replace("5ca1ab1e00000000000c0001", "env-1")
    body = asked.get("body", "")
    headers = [f"{n}: {v}" for n, v in asked["headers"] if n != "Authorization"]
    headers += [f"Content-Length: {len(body)}"] if body else []
    return await Stream.open(
        address, path, headers, "mob-1", method=asked["method"], body=body.encode()
    )


@pytest.mark.parametrize("line", ping_recordings("streams-full", "streams-late-data"))
async def test_recorded_beginning(door, line):
    """Each path and method gives the recorded head, and a ping as soon as there are data."""
    relay = served()
    async with serving(relay, **door) as address:
        if line["setup"] == "streams-full":
            await begin(relay, visible())
        stream = await recorded_stream(address, line)
        reference = {name.lower(): value for name, value in line["response"]["headers"]}
        headers = stream.headers
        assert headers.pop("date")
        assert headers.pop("x-ld-envid") == "env-1"
        if "access-control-allow-methods" in reference:
            methods = headers.pop("access-control-allow-methods").split(",")
            assert set(reference.pop("access-control-allow-methods").split(",")) <= set(methods)
            assert headers.pop("vary") == "Origin"
        reference.pop("date")
        assert headers == reference
        await begin(relay, visible(version=2))
        received = await stream.until(PING)
        assert received.replace(PING, b"") == b""
        stream.close()


def live(served: Served) -> set:
    """Items that are served, as far as anybody can see them."""
    return {item for item in served.environment.payload or () if not item.deleted}


@pytest.mark.parametrize("line", ping_recordings("streams-steps"))
async def test_recorded_pings(door, line):
    """A ping for each step that changed something, and none where the reference has none."""
    relay = served()
    async with serving(relay, **door) as address:
        first, *steps = line["steps"]
        await replay(relay, first["upstream"])
        stream = await recorded_stream(address, line)
        assert await stream.until(PING) == PING
        for step in steps:
            before = live(relay)
            await replay(relay, step.get("upstream"))
            changed = live(relay) != before
            assert step["client_bytes"] or not changed
            if changed:
                assert await stream.until(PING) == PING, step["step"]
        await give(relay, data.patch(visible("the-end")))
        assert await stream.until(PING) == PING
        stream.close()


async def test_only_configured_origins_may_read_a_stream(door):
    """Streams of an environment with configured origins name one of them, as other answers do."""
    relay = served(allowed_origins=("https://first.example", ORIGIN))
    async with serving(relay, **door) as address:
        for path in ("/ping/env-1", f"/eval/env-1/{encoded(ANNA)}"):
            for origin, allowed in ((ORIGIN, ORIGIN), ("https://x", "https://first.example")):
                stream = await Stream.open(address, path, [f"Origin: {origin}"])
                assert stream.headers["access-control-allow-origin"] == allowed
                assert stream.headers["vary"] == "Origin"
                stream.close()


@pytest.mark.parametrize("eval_streams", [False, True])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/eval/env-1/%21", "context part of URL path did not decode as valid base64"),
        (
            "/eval/env-1/e30",
            "context part of URL path did not decode to valid evaluation context as JSON",
        ),
        (
            f"/eval/env-1/{encoded(ANNA)}?h=wrong",
            "Environment is in secure mode, and context hash does not match.",
        ),
    ],
)
async def test_invalid_contexts_get_no_stream(door, path, message, eval_streams):
    """The refusal is that of evaluation, and browsers can read it."""
    relay = served(secure_mode=True, eval_streams=eval_streams)
    async with serving(relay, **door) as address:
        reply = await ask(address, path, [("Origin", ORIGIN)])
        assert (reply.status, json.loads(reply.body)) == (400, {"message": message})
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert len(relay.hub) == 0


async def test_secure_mode_lets_those_in_whose_context_is_signed(door):
    """The right hash opens the stream; `/ping` needs none."""
    relay = served(secure_mode=True, eval_streams=True)
    async with serving(relay, **door) as address:
        await begin(relay, visible())
        proof = hmac.new(SDK_KEY.encode(), b"anna", hashlib.sha256).hexdigest()
        stream = await evaluating(address, ANNA, "/eval/env-1/", f"?h={proof}")
        assert await stream.put() == {"lamp": True}
        stream.close()
        ping = await Stream.open(address, "/ping/env-1")
        assert await ping.until(PING) == PING
        ping.close()


async def test_a_user_without_a_key_gets_pings_only(door):
    """As in evaluation: nothing can be evaluated for the key "", though the context is valid."""
    for eval_streams, status in ((False, 200), (True, 400)):
        relay = served(eval_streams=eval_streams)
        async with serving(relay, **door) as address:
            await begin(relay, visible())
            reply = await ask(address, f"/eval/env-1/{encoded({'key': ''})}")
            assert reply.status == status


async def test_an_evaluating_stream_is_the_answer_to_a_poll_then_changes(door):
    """The put equals the body of an evalx answer, for the same context and reasons."""
    relay = served(eval_streams=True)
    hidden = flag(
        "hidden", clientSideAvailability={"usingMobileKey": False, "usingEnvironmentId": True}
    )
    async with serving(relay, **door) as address:
        await begin(relay, for_crowd(), visible(), hidden, segment(included=["anna"]))
        for query in ("", "?withReasons=true"):
            stream = await evaluating(address, ANNA, query=query)
            name, put = await stream.next()
            polled = await ask(
                address,
                f"/msdk/evalx/contexts/{encoded(ANNA)}{query}",
                [("Authorization", "mob-1")],
            )
            assert (name, put) == ("put", json.loads(polled.body))
            assert "hidden" not in put
            assert ("reason" in put["lamp"]) == bool(query)
            stream.close()


async def test_a_context_in_a_body_is_evaluated_as_well(door):
    """REPORT, for SDKs that do not want contexts in paths."""
    relay = served(eval_streams=True)
    async with serving(relay, **door) as address:
        await begin(relay, for_crowd(), segment(included=["anna"]))
        for path in ("/eval/env-1", "/meval"):
            body = json.dumps(ANNA).encode()
            headers = ["Content-Type: application/json", f"Content-Length: {len(body)}"]
            stream = Messages(
                await Stream.open(address, path, headers, "mob-1", method="REPORT", body=body)
            )
            assert await stream.put() == {"for-crowd": "in"}
            await give(relay, data.patch(for_crowd(relay.environment.changes + 5, on=False)))
            assert await stream.patch() == ("for-crowd", "out")
            await give(relay, data.patch(for_crowd(relay.environment.changes + 5)))
            assert await stream.patch() == ("for-crowd", "in")
            stream.close()


async def test_only_those_whose_result_changed_are_told(door):
    """Flag, segment, prerequisite, visibility, delete; and what changes nothing is silent."""
    relay = served(eval_streams=True)
    needs = visible("needs", prerequisites=[{"key": "for-crowd", "variation": 0}], value="yes")
    async with serving(relay, **door) as address:
        await begin(relay, for_crowd(), needs, segment(included=["anna"]))
        anna, ben = await evaluating(address, ANNA), await evaluating(address, BEN)
        assert await anna.put() == {"for-crowd": "in", "needs": "yes"}
        assert await ben.put() == {"for-crowd": "out", "needs": None}

        await give(relay, data.patch(segment(version=2, included=["anna", "ben"])))
        assert {await ben.patch(), await ben.patch()} == {("for-crowd", "in"), ("needs", "yes")}
        await give(relay, data.patch(segment(version=3, included=["anna", "ben", "carl"])))
        await give(relay, data.patch(segment(version=4, included=["ben"])))
        assert {await anna.patch(), await anna.patch()} == {("for-crowd", "out"), ("needs", None)}

        await give(relay, data.patch(for_crowd(2, on=False, offVariation=1)))
        told = {await ben.patch(), await ben.patch()}
        assert told == {("for-crowd", "out"), ("needs", None)}
        assert await anna.patch() == ("for-crowd", "out")

        await give(relay, data.patch(visible("needs", 2, "yes", prerequisites=[])))
        assert await anna.patch() == await ben.patch() == ("needs", "yes")
        unseen = {"usingMobileKey": False, "usingEnvironmentId": True}
        await give(relay, data.patch(flag("needs", 3, clientSideAvailability=unseen)))
        await give(relay, data.delete("/flags/for-crowd", 9))
        for client in (anna, ben):
            for key in ("needs", "for-crowd"):
                name, content = await client.next()
                assert (name, content["key"]) == ("delete", key)
        await give(relay, data.patch(for_crowd(10)))
        assert await anna.patch() == ("for-crowd", "out")
        assert await ben.patch() == ("for-crowd", "in")
        anna.close(), ben.close()


async def test_versions_grow_over_those_of_flags(door):
    """A flag whose own version is greater than any time is still patched by its segment."""
    relay = served(eval_streams=True)
    huge = 10**13
    async with serving(relay, **door) as address:
        await begin(relay, for_crowd(huge), segment())
        stream = await evaluating(address, ANNA)
        await stream.put()
        for version in range(2, 6):
            await give(
                relay, data.patch(segment(version=version, included=["anna"] * ((version + 1) % 2)))
            )
            name, content = await stream.next()
            assert (name, content["flagVersion"]) == ("patch", huge)
            assert content["version"] > huge
        stream.close()


async def test_a_whole_new_data_set_comes_as_changes(door):
    """Even one whose versions are lower: versions of the data grow all the same."""
    relay = served(eval_streams=True)
    async with serving(relay, **door) as address:
        await begin(relay, visible("a", 9), visible("b", 9))
        stream = await evaluating(address, ANNA)
        await stream.put()
        await begin(relay, visible("a", 3, False))
        assert await stream.patch() == ("a", False)
        name, content = await stream.next()
        assert (name, content["key"]) == ("delete", "b")
        stream.close()


async def test_streams_that_came_before_the_data_begin_with_them(door):
    """The stream is open and silent; then comes the put."""
    relay = served(eval_streams=True)
    async with serving(relay, **door) as address:
        stream = await evaluating(address, ANNA)
        await begin(relay, visible())
        assert await stream.put() == {"lamp": True}
        stream.close()


async def test_a_large_new_data_set_is_compiled_beside(door):
    """Clients keep what they have until it is ready, and get every change."""
    relay = served(eval_streams=True)
    async with serving(relay, **door) as address:
        await begin(relay, visible("f0"))
        stream = await evaluating(address, ANNA)
        await stream.put()
        await begin(relay, *(visible(f"f{n}", 2, n) for n in range(3000)), segment())
        late = await evaluating(address, BEN)
        for client in (stream, late):
            held = await client.put()
            if len(held) == 1:  # it came before the program was ready
                held = await client.put()
            assert held == {f"f{n}": n for n in range(3000)}
        stream.close(), late.close()


async def test_heartbeats_and_ends_are_those_of_all_streams(door):
    """Comments in silence, and a proper end after the maximum connection time."""
    relay = served(
        eval_streams=True, limits=StreamLimits(heartbeat_interval=0.05, max_connection_time=0.5)
    )
    async with serving(relay, **door) as address:
        await begin(relay, visible())
        stream = await evaluating(address, ANNA)
        received = await stream.stream.rest()
        put, heartbeats = received.split(b"\n\n")
        assert put.startswith(b"event: put\n")
        assert heartbeats.count(b":\n") * 2 == len(heartbeats) > 4
        assert len(relay.hub) == 0
        stream.close()


@pytest.mark.parametrize("front", [True, False])
async def test_a_slow_client_begins_anew_with_a_put(front):
    """One that has missed too much gets everything once more, and goes on from there."""
    relay, loop = served(eval_streams=True), asyncio.get_running_loop()
    async with serving(relay, front=front) as address:
        await begin(relay, visible())
        path = f"/eval/env-1/{encoded(ANNA)}"
        client = await loop.run_in_executor(None, stalled_socket, address.port, path)
        await until(lambda: len(relay.hub) == 1)
        subscriptions = relay.hub._channels["eval-browser"].subscriptions
        (first,) = subscriptions
        version = 1
        # Under load it may have been replaced before this looks.
        while first in subscriptions and not (first.pending and first.pending.overflowed):
            version += 1
            await give(relay, data.patch(visible(version=version, value="x" * 1_000_000)))
            await asyncio.sleep(0)
        received = b""
        while first in subscriptions:
            received = (received + await loop.run_in_executor(None, client.recv, 1 << 20))[-100:]
        await until(lambda: not relay.hub._channels["eval-browser"]._is_pending)
        await give(relay, data.patch(visible(version=version + 1, value="the end")))
        while b"the end" not in received:
            received = received[-2_000_000:] + await loop.run_in_executor(
                None, client.recv, 1 << 20
            )
        assert received.count(b"event: put") == 1
        client.close()
        await until(lambda: len(relay.hub) == 0)


async def test_streams_are_counted():
    """In the figures by path, and as open streams by kind."""
    relay = served(eval_streams=True)
    async with serving(relay) as address:
        await begin(relay, visible())
        streams = [
            await Stream.open(address, "/ping/env-1"),
            await Stream.open(address, "/mping", key="mob-1"),
            await Stream.open(address, f"/eval/env-1/{encoded(ANNA)}"),
            await Stream.open(address, f"/meval/{encoded(ANNA)}", key="mob-1"),
        ]
        new = {series.route: count.value for series, count in relay.traffic.new_streams.items()}
        assert new == dict.fromkeys(
            ["/ping/{envId}", "/mping", "/eval/{envId}/{context}", "/meval/{context}"], 1
        )
        assert sum(count.value for count in relay.traffic.streams.values()) == 4
        wanted = {"all": 0, "flags": 0, "sdk/stream": 0}
        wanted |= {"ping": 2, "eval-mobile": 1, "eval-browser": 1}
        wanted |= {"sdk/stream/eval-mobile": 0, "sdk/stream/eval-browser": 0}
        assert relay.hub.streams == wanted
        for stream in streams:
            stream.close()
        await until(lambda: len(relay.hub) == 0)
        assert sum(count.value for count in relay.traffic.streams.values()) == 0


class Quiet(asyncio.Transport):
    """A connection of which nothing is kept but that it is there."""

    def write(self, data: bytes) -> None:
        """Send it at once."""

    def set_protocol(self, protocol) -> None:
        """Nobody says anything."""


@pytest.mark.parametrize(("eval_streams", "limit"), [(False, 1024), (True, 3 * 1024)])
async def test_an_idle_client_costs_little(eval_streams, limit):
    """The hub keeps little for each client, beside its connection; all contexts are different."""
    relay = served(eval_streams=eval_streams)
    async with serving(relay):
        await begin(relay, *(visible(f"f{n}") for n in range(100)))
        count = 2000
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for n in range(count):
                who = None
                if eval_streams:
                    context = {"kind": "user", "key": f"user-{n}", "name": f"Number {n}"}
                    context |= {"email": f"{n}@example.com", "country": "de", "plan": "pro"}
                    raw = json.dumps(context).encode()
                    who = EvalClient(raw, parse_context(raw), SDKKind.MOBILE)
                stream = "eval-mobile" if eval_streams else "ping"
                relay.hub.subscribe(stream, Quiet(), b"", None, who)
            for _ in range(50):
                await asyncio.sleep(0)
            each = (tracemalloc.get_traced_memory()[0] - before) / count
        finally:
            tracemalloc.stop()
        assert each < limit
        for channel in relay.hub._channels.values():
            for subscription in list(channel.subscriptions):
                subscription.connection_lost(None)


async def test_versions_grow_over_a_restart(monkeypatch):
    """A relay that is started anew goes on from the time of day."""
    monkeypatch.setattr("relay.clock.unix", lambda: 1_800_000_000.9)
    relay = served(eval_streams=True)
    async with serving(relay) as address:
        await begin(relay, visible())
        stream = await evaluating(address, ANNA)
        await stream.put()
        await give(relay, data.patch(visible(version=2, value=2)))
        _, content = await stream.next()
        assert content["version"] == 1_800_000_001
        stream.close()
