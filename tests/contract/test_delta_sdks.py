"""Strict checks of FDv2's SDKs, and their deviations, harm nobody (fdv2 13.2.4).

The model SDKs fail on whatever any real one fails on; see `tests/support/fdv2.py`. Here they talk to
a real server, over both paths.
"""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest

from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
from relay.protocol import fdv1
from tests.support.fdv2 import Client, Keeper, NodeClient
from tests.support.serving import SDK_KEY, Served, Stream, ask, serving

PADDING = "x" * 2000


def flag(key: str, version: int, **more: object) -> dict[str, object]:
    return {"key": key, "version": version, "salt": "s", "on": True, **more}


LARGE = flag("large", 1, text=PADDING)


@pytest.fixture(params=[True, False], ids=["fast path", "application"])
async def site(request):
    served = Served()
    async with serving(served, front=request.param) as address:
        yield served, address


def put(served: Served, *flags: dict[str, object], segments: object = None) -> None:
    """Let upstream send everything."""
    data = {"flags": {each["key"]: each for each in flags}, "segments": segments or {}}
    hear(served, "put", {"path": "/", "data": data})


def patch(served: Served, value: dict[str, object]) -> None:
    hear(served, "patch", {"path": f"/flags/{value['key']}", "data": value})


def delete(served: Served, key: str, version: int) -> None:
    hear(served, "delete", {"path": f"/flags/{key}", "version": version})


def hear(served: Served, name: str, message: object) -> None:
    changes = fdv1.parse(name, json.dumps(message).encode())
    assert changes is not None
    served.environment._handle(changes)


def content(served: Served) -> dict[tuple[str, str], object]:
    payload = served.environment.payload
    return {(k.noun, i.key): json.loads(i.json) for k in Kind for i in payload.live(k)}


class Connection:
    """A model SDK with a stream."""

    def __init__(self, client: Client, stream: Stream) -> None:
        self.client = client
        self.stream = stream

    @classmethod
    async def open(cls, address, client: Client) -> Connection:
        basis = client.stream_basis()
        path = f"/sdk/stream?basis={basis}" if basis else "/sdk/stream"
        headers = [f"{name.decode()}: {value.decode()}" for name, value in client.headers.items()]
        return cls(client, await Stream.open(address, path, headers))

    async def follow(self, served: Served) -> None:
        """Read until the data are those of the relay."""
        while self.client.items != content(served):
            self.client.feed(await self.stream.chunk())

    async def next(self) -> str:
        """Read one transfer; return its kind."""
        self.client.feed(await self.stream.chunk())
        return self.client.transfers[-1]


async def poll(address, client: Client) -> str:
    basis = client.poll_basis()
    path = f"/sdk/poll?basis={basis}" if basis else "/sdk/poll"
    headers = [(name.decode(), value.decode()) for name, value in client.headers.items()]
    reply = await ask(address, path, [("Authorization", SDK_KEY), *headers])
    assert reply.status == 200
    client.feed_poll(reply.body)
    return client.transfers[-1]


@pytest.mark.parametrize("kind", [Client, NodeClient, Keeper])
async def test_strict_sdks_take_whatever_comes(site, kind):
    """Java, Ruby, C++, Rust, Python, .NET and Flutter: members, numbers, order, single payloads."""
    served, address = site
    put(served, LARGE, flag('a "b" \u00fc', 1), segments={"s": {"key": "s", "version": 3}})
    connection = await Connection.open(address, kind())
    polling = kind()
    await connection.follow(served)
    history = [
        lambda: patch(served, flag("a", 2**31 - 2**20)),
        lambda: patch(served, flag("b", 2**31 - 2**20)),
        lambda: delete(served, "a", 2**31 - 2**20 + 1),
        lambda: put(served, LARGE, flag("c", 1)),
        lambda: put(served, LARGE, flag("a", 1)),
        lambda: hear(served, "delete", {"path": "/segments/unknown", "version": 0}),
        lambda: patch(served, flag("a", 2)),
        lambda: put(served, LARGE),
    ]
    for change in history:
        change()
        await connection.follow(served)
        await poll(address, polling)
        assert polling.items == content(served)
    connection.stream.close()


async def test_no_item_goes_out_that_sdks_would_drop_a_payload_for(site):
    """Go's and Python's lose all of it without a word, and never get it again."""
    served, address = site
    bad = {"key": "bad", "version": 1, "on": "notbool"}
    put(served, LARGE, bad, flag("a", 1))
    connection, polling = await Connection.open(address, Client()), Client()
    await connection.follow(served)
    patch(served, {**bad, "version": 2})
    patch(served, {**flag("a", 2), "rules": 5})
    patch(served, flag("negative", -1))
    patch(served, flag("a", 3))
    await connection.follow(served)
    await poll(address, polling)
    assert connection.client.items == polling.items == content(served)
    assert {key for _, key in polling.items} == {"large", "a"}
    assert polling.items["flag", "a"]["version"] == 3
    connection.stream.close()


async def test_an_item_that_comes_back_with_a_lower_version_is_seen(site):
    """Node's SDK ignores it in a transfer of changes, so that everything comes."""
    served, address = site
    put(served, LARGE, flag("a", 12))
    connections = [await Connection.open(address, kind()) for kind in (NodeClient, Client)]
    for change in (
        lambda: delete(served, "a", 463),
        lambda: put(served, LARGE, flag("a", 12, salt="new")),
        lambda: put(served, LARGE, flag("a", 12, salt="new", text="restored")),
        lambda: put(served, LARGE, flag("a", 3, salt="new")),
    ):
        for connection in connections:
            await connection.follow(served)
        change()
    for connection in connections:
        await connection.follow(served)
        connection.stream.close()


async def test_nodes_stale_state_over_three_reconnects(site):
    """It names the first one each time, and gets what it needs."""
    served, address = site
    put(served, LARGE, flag("a", 1))
    client = NodeClient()
    await poll(address, client)
    for version in range(2, 5):
        connection = await Connection.open(address, client)
        assert connection.client.named == client.stream_basis() != ""
        await connection.follow(served)
        patch(served, flag("a", version))
        patch(served, flag(f"b{version}", 1))
        delete(served, f"b{version - 1}", 2)
        if version % 2:
            await connection.follow(served)
        connection.stream.close()
    connection = await Connection.open(address, client)
    await connection.follow(served)
    connection.stream.close()


async def test_a_transfer_cut_at_any_byte_is_not_seen(site):
    """The next connection brings what is missing, and only that."""
    served, address = site
    put(served, LARGE, flag("a", 1))
    client = Client()
    await poll(address, client)
    before = dict(client.items)
    patch(served, flag("a", 2))
    delete(served, "c", 1)
    whole = None
    for cut in range(0, 400, 7):
        connection = await Connection.open(address, client)
        message = await connection.stream.chunk()
        whole = whole or message
        assert message == whole
        assert len(message) < len(PADDING)
        client.feed(message[: min(cut, len(message) - 1)])
        assert client.items == before
        connection.stream.close()
    connection = await Connection.open(address, client)
    assert await connection.next() == "xfer-changes"
    assert client.items == content(served)
    connection.stream.close()


@pytest.mark.timing
async def test_polls_are_whole_within_the_time_of_impatient_sdks():
    """.NET's gives 2 s to all of a poll, while upstream sends everything and many streams open."""
    served = Served()
    async with serving(served) as address:
        text = random.Random(1).randbytes(4000).hex()
        put(served, *(flag(f"f{n}", 1, text=text) for n in range(250)))  # 2 MB
        took = []

        async def ask_once() -> None:
            started = time.monotonic()
            reply = await ask(
                address, "/sdk/poll", [("Authorization", SDK_KEY), ("Accept-Encoding", "gzip")]
            )
            assert reply.status == 200
            took.append(time.monotonic() - started)

        asked = [asyncio.create_task(ask_once()) for _ in range(5)]
        streams = [await Stream.open(address, "/sdk/stream") for _ in range(50)]
        put(served, *(flag(f"f{n}", 2, text=text) for n in range(250)))
        asked += [asyncio.create_task(ask_once()) for _ in range(5)]
        await asyncio.gather(*asked)
        assert max(took) < 2, took
        for stream in streams:
            stream.close()


async def test_a_client_without_data_is_never_told_that_nothing_is_new(site):
    """In a browser that would be no flags at all; Node would never start."""
    served, address = site
    client = Client()
    connection = await Connection.open(address, client)
    served.environment._handle(ChangeSet((Item(Kind.FLAG, "a", 1, b'{"version":1}'),)))
    put(served)
    assert await connection.next() == "xfer-full"
    assert client.basis
    assert await poll(address, client) == "none"
    assert await poll(address, Client()) == "xfer-full"
    connection.stream.close()
