"""Promises of `/all` and `/flags`, at both doors, with and without TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

import pytest

from relay.errors import InvalidData
from relay.protocol import fdv1
from relay.streams.hub import StreamLimits
from tests.support.serving import Served, Stream, serving, stalled_socket, until

GOLDEN = Path(__file__).parent.parent / "golden" / "streams.jsonl"


def flag(key: str, version: int, **more) -> dict:
    return {"key": key, "version": version, "on": True, **more}


def put(*flags: dict) -> bytes:
    data = {"flags": {each["key"]: each for each in flags}, "segments": {}}
    return json.dumps({"path": "/", "data": data}).encode()


def patch(given: dict) -> bytes:
    return json.dumps({"path": f"/flags/{given['key']}", "data": given}).encode()


async def deliver(served: Served, name: str, data: bytes) -> None:
    changes = fdv1.parse(name, data)
    if changes is not None:
        await served.source.give(changes)


async def test_a_stream_begins_with_everything(door):
    """A new client gets the head of the reference and a put with all items."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, "put", put(flag("a", 1)))
        stream = await Stream.open(address)
        assert stream.status == 200
        headers = stream.headers
        assert headers.pop("date")
        assert headers == {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache, no-store, must-revalidate",
            "connection": "keep-alive",
            "access-control-allow-origin": "*",
            "x-accel-buffering": "no",
            "x-ld-envid": "env-1",
            "transfer-encoding": "chunked",
        }
        opening = await stream.until(b"\n\n")
        assert opening.startswith(b'event: put\ndata: {"path":"/","data":{"flags":{"a":{')
        stream.close()


async def test_a_stream_waits_for_data(door):
    """A client that comes before the data gets the head at once, and the put when there is one."""
    served = Served()
    async with serving(served, **door) as address:
        stream = await Stream.open(address, "/flags")
        await deliver(served, "put", put(flag("a", 1)))
        assert await stream.until(b"\n\n") == b'event: put\ndata: {"a":%b}\n\n' % (
            json.dumps(flag("a", 1)).encode()
        )
        stream.close()


async def test_changes_reach_everybody(door):
    """Patches and deletes come in order, each once."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, "put", put(flag("a", 1)))
        streams = [await Stream.open(address) for _ in range(5)]
        for stream in streams:
            await stream.until(b"\n\n")
        await deliver(served, "patch", patch(flag("a", 2)))
        await deliver(served, "patch", patch(flag("a", 2, equal=True)))
        await deliver(served, "delete", b'{"path":"/flags/a","version":3}')
        for stream in streams:
            received = await stream.until(b'"version":3}\n\n')
            assert received.count(b"event: patch\n") == 1
            assert received.endswith(b'event: delete\ndata: {"path":"/flags/a","version":3}\n\n')
            stream.close()


async def test_heartbeats_are_comments(door):
    """Silence is interrupted by `:` and LF, exactly."""
    served = Served(StreamLimits(heartbeat_interval=0.05))
    async with serving(served, **door) as address:
        stream = await Stream.open(address)
        assert await stream.chunk() == b":\n"
        assert await stream.chunk() == b":\n"
        stream.close()


async def test_a_stream_ends_properly_when_its_time_is_over(door):
    """The maximum connection time ends in a complete chunked body."""
    served = Served(StreamLimits(max_connection_time=0.2))
    async with serving(served, **door) as address:
        await deliver(served, "put", put(flag("a", 1)))
        stream = await Stream.open(address)
        assert (await stream.rest()).startswith(b"event: put\n")
        await until(lambda: [c.value for c in served.traffic.streams.values()] == [0])
        stream.close()


async def test_a_client_that_goes_is_forgotten(door):
    """Nothing is kept of a client that closed its connection."""
    served = Served()
    async with serving(served, **door) as address:
        stream = await Stream.open(address)
        assert len(served.hub) == 1
        stream.close()
        await until(lambda: len(served.hub) == 0)


@pytest.mark.parametrize("front", [True, False])
async def test_a_slow_client_that_began_anew_is_forgotten_as_well(front):
    """Nor of one that had missed so much that it was given everything once more."""
    served, loop = Served(), asyncio.get_running_loop()
    async with serving(served, front=front) as address:
        client = await loop.run_in_executor(None, stalled_socket, address.port)
        await until(lambda: len(served.hub) == 1)
        subscriptions = served.hub._channels["all"].subscriptions
        (first,) = subscriptions
        version = 0
        # Under load it may have been replaced before this looks.
        while first in subscriptions and not (first.pending and first.pending.overflowed):
            version += 1
            await deliver(served, "put", put(flag("a", version, pad="x" * 1_000_000)))
            await asyncio.sleep(0)
        while first in subscriptions:
            await loop.run_in_executor(None, client.recv, 1 << 20)
        assert len(served.hub) == 1
        client.close()
        await until(lambda: len(served.hub) == 0)
        assert {count.value for count in served.traffic.streams.values()} == {0}


async def test_the_end_of_the_server_ends_streams_properly(door):
    """At shutdown each stream gets the end of its chunked body."""
    served = Served()
    async with serving(served, **door) as address:
        await deliver(served, "put", put(flag("a", 1)))
        streams = [await Stream.open(address) for _ in range(20)]
    for stream in streams:
        assert (await stream.rest()).startswith(b"event: put\n")
        stream.close()


async def test_unknown_keys_get_no_stream(door):
    """A key that opens no environment is refused."""
    async with serving(Served(), **door) as address:
        stream = await Stream.open(address, key="sdk-unknown")
        assert stream.status == 401
        stream.close()


def recording(setup: str, path: str) -> list[dict]:
    """The steps of one recording of the reference relay."""
    lines = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()]
    (steps,) = (x["steps"] for x in lines if x["name"] == f"{setup}: {path}")
    return steps


Message = tuple[str, str, object]

ISOLATED: Message = ("put", "/", {("flags", "beta"): 91})
"""One item of this put is malformed: the reference discards the whole, we only that item."""


def messages(text: str) -> list[Message]:
    """Name, path and versions of each message; what is inside items differs on purpose (row 4)."""
    found = []
    for message in text.replace(":\n:\n", "").split("\n\n"):
        lines = message.removeprefix(":\n").split("\n")
        if len(lines) == 2:
            data = json.loads(lines[1].removeprefix("data: "))
            found.append((lines[0].removeprefix("event: "), *essence(data)))
    return found


def essence(data: dict) -> tuple[str, object]:
    if isinstance(data.get("path"), str):
        inner = data.get("data", data)
        return data["path"], inner["version"] if "version" in inner else versions(inner)
    return "/", versions({"flags": data})


def versions(data: dict) -> dict[tuple[str, str], int]:
    """Versions by kind and key, without deleted items."""
    return {
        (kind, key): item["version"]
        for kind, items in data.items()
        for key, item in items.items()
        if item is not None
    }


def upstream_messages(text: str | None) -> list[tuple[str, bytes]]:
    lines = (message.split("\n", 1) for message in (text or "").split("\n\n"))
    return [
        (line[0].removeprefix("event: "), line[1].removeprefix("data: ").encode())
        for line in lines
        if len(line) == 2
    ]


async def replay(served: Served, text: str | None) -> None:
    for name, data in upstream_messages(text):
        with contextlib.suppress(InvalidData):
            await deliver(served, name, data)


@pytest.mark.parametrize("path", ["/all", "/flags"])
async def test_recorded_opening(door, path):
    """A fresh client gets the same data as from the reference, whatever the order of members."""
    (step, *_) = recording("streams-full", path)
    ((name, sent),) = upstream_messages(step["client_bytes"])
    served = Served()
    async with serving(served, **door) as address:
        whole = upstream_messages(recording("streams-full", "/all")[0]["client_bytes"])[0][1]
        await deliver(served, "put", whole)
        stream = await Stream.open(address, path)
        received = await stream.until(b"\n\n")
        head, data = received.split(b"\ndata: ")
        assert head == f"event: {name}".encode()
        assert json.loads(data) == json.loads(sent)
        stream.close()


@pytest.mark.parametrize("path", ["/all", "/flags"])
@pytest.mark.parametrize("setup", ["streams-steps", "streams-late-data"])
async def test_recorded_changes(door, setup, path):
    """A client gets what the reference sends, but for old versions and malformed messages."""
    served = Served()
    async with serving(served, **door) as address:
        stream = await Stream.open(address, path)
        reference: list[Message] = []
        for step in recording(setup, path):
            await replay(served, step.get("upstream"))
            reference += messages(step.get("client_bytes") or "")
        last = patch(flag("the-end", 1))
        await deliver(served, "patch", last)
        *received, _ = messages((await stream.until(b'"on": true}}\n\n')).decode())
        assert received
        assert [m for m in received if m not in [*reference, ISOLATED]] == []
        fresh = await Stream.open(address, path)
        ((_, _, now),) = messages((await fresh.until(b"\n\n")).decode())
        assert now == folded(received) | {("flags", "the-end"): 1}
        fresh.close()
        stream.close()


def folded(received: list[Message]) -> dict[tuple[str, str], object]:
    """Items that a client holds once it got these messages."""
    held: dict[tuple[str, str], object] = {}
    for name, path, news in received:
        if isinstance(news, dict):
            held = dict(news)
            continue
        kind, _, key = path[1:].rpartition("/")
        held[kind or "flags", key] = news
        if name == "delete":
            del held[kind or "flags", key]
    return held
