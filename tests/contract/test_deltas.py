"""Server-side SDKs that name the state of their data get what they miss (fdv2 13.8)."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest

from relay.model.credential import SDKKey
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
from relay.protocol import sse
from tests.support.serving import SDK_KEY, Served, Stream, ask, serving

SDK = [("Authorization", SDK_KEY)]
PADDING = "x" * 2000


def flag(key: str, version: int, **more: object) -> Item:
    json_ = json.dumps({"key": key, "version": version, **more}).encode()
    return Item(Kind.FLAG, key, version, json_)


LARGE = flag("large", 1, text=PADDING)


@pytest.fixture(params=[True, False], ids=["fast path", "application"])
async def site(request):
    served = Served()
    async with serving(served, front=request.param) as address:
        yield served, address


def change(served: Served, *items: Item, full: bool = False) -> str:
    """Let upstream send items; return the state after them."""
    served.environment._handle(ChangeSet(items, full=full))
    return served.environment.journal.state


def transfer(message: bytes) -> tuple[str, list[str], str | None]:
    """Return the intent of one transfer, the items in it, and the state after it."""
    names, events = [], sse.Decoder().feed(message)
    assert events[0].name == "server-intent"
    code = json.loads(events[0].data)["payloads"][0]["intentCode"]
    state = None
    for event in events[1:]:
        data = json.loads(event.data)
        if event.name == "payload-transferred":
            state = data["state"]
        else:
            names.append(f"{event.name} {data['key']} {data['version']}")
    return code, sorted(names), state


async def opened(address, basis: str = "", *headers: str) -> Stream:
    path = f"/sdk/stream?basis={quote(basis)}" if basis else "/sdk/stream"
    return await Stream.open(address, path, headers)


async def first(address, basis: str = "", *headers: str):
    """Return the first transfer of a stream."""
    stream = await opened(address, basis, *headers)
    try:
        return transfer(await stream.chunk())
    finally:
        stream.close()


async def test_a_stream_begins_with_what_the_client_misses(site):
    """Everything, what was touched since, or nothing."""
    served, address = site
    old = change(served, LARGE, flag("a", 1), full=True)
    new = change(served, flag("a", 2), flag("b", 1))
    assert await first(address) == (
        "xfer-full",
        ["put-object a 2", "put-object b 1", "put-object large 1"],
        new,
    )
    assert await first(address, old) == (
        "xfer-changes",
        ["put-object a 2", "put-object b 1"],
        new,
    )
    assert await first(address, new) == ("none", [], None)
    assert (await first(address, "(p:other:1)"))[0] == "xfer-full"


async def test_changes_follow_as_they_come(site):
    """Each is a transfer with the state after it, also if upstream sent everything again."""
    served, address = site
    change(served, LARGE, flag("a", 1), full=True)
    stream = await opened(address)
    await stream.chunk()
    state = change(served, flag("a", 2))
    assert transfer(await stream.chunk()) == ("xfer-changes", ["put-object a 2"], state)
    state = change(served, LARGE, full=True)
    assert transfer(await stream.chunk()) == ("xfer-changes", ["delete-object a 3"], state)
    state = change(served, LARGE, flag("a", 1), full=True)
    code, items, after = transfer(await stream.chunk())
    assert (code, items) == ("xfer-full", ["put-object a 1", "put-object large 1"])
    assert after == state
    stream.close()


async def test_a_stream_waits_for_data(site):
    """It is silent, and never answers that there is nothing new."""
    served, address = site
    stream = await opened(address, "(p:old:1)")
    assert stream.status == 200
    state = change(served, LARGE, full=True)
    assert transfer(await stream.chunk()) == ("xfer-full", ["put-object large 1"], state)
    stream.close()
    served.environment.payload = None


async def test_a_client_with_a_stale_state_gets_everything(site):
    """Node's server SDK names the state of its first connection, and compares versions."""
    served, address = site
    state = change(served, LARGE, full=True)
    agent = "User-Agent: NodeJSClient/9.13.7"
    assert (await first(address, state, agent))[0] == "xfer-full"
    assert (await first(address, state, "User-Agent: PythonClient/9.20.0"))[0] == "none"


async def poll(address, basis: str = "", *headers: tuple[str, str]):
    path = f"/sdk/poll?basis={quote(basis)}" if basis else "/sdk/poll"
    return await ask(address, path, [*SDK, *headers])


def intent(body: bytes) -> str:
    return json.loads(body)["events"][0]["data"]["payloads"][0]["intentCode"]


async def test_polls_say_the_same(site):
    """The answer without a state has an ETag; the others must not be cached (fdv2 13.8.8)."""
    served, address = site
    assert (await poll(address)).status == 503
    old = change(served, LARGE, flag("a", 1), full=True)
    new = change(served, flag("a", 2))
    everything = await poll(address)
    assert everything.headers["etag"] == f'"{new}"'
    assert intent(everything.body) == "xfer-full"
    assert everything.headers["x-ld-envid"] == "env-1"
    known = await poll(address, "", ("If-None-Match", everything.headers["etag"]))
    assert known.status == 304
    for basis, code in ((old, "xfer-changes"), (new, "none"), ("(p:x:1)", "xfer-full")):
        answer = await poll(address, basis, ("If-None-Match", everything.headers["etag"]))
        assert (answer.status, intent(answer.body)) == (200, code)
        assert "etag" not in answer.headers
        assert answer.headers["cache-control"] == "no-store"
    change(served, flag("a", 3))
    assert intent((await poll(address, new)).body) == "xfer-changes"


async def test_polls_name_no_time_until_which_they_may_be_cached(site):
    """Some SDKs would take the cached answer for "no changes" (fdv2 13.5)."""
    served, address = site
    change(served, LARGE, full=True)
    served.environment.spec = served.environment.spec.__class__("main", SDKKey(SDK_KEY), ttl=60.0)
    assert "expires" not in (await poll(address)).headers


async def test_one_change_of_a_large_environment_costs_one_item(site):
    """Clients that come back after it get a thousandth."""
    served, address = site
    before = change(served, *(flag(f"f{n}", 1, text="x" * 500) for n in range(1000)), full=True)
    everything = await poll(address)
    change(served, flag("f7", 2, text="x" * 500))
    delta = await poll(address, before)
    assert len(everything.body) > 500_000
    assert len(delta.body) < 1_500


async def test_both_paths_give_the_same_bytes():
    """For any state, on streams and polls."""
    served = Served()
    async with serving(served) as fast:
        old = change(served, LARGE, flag("a", 1), full=True)
        new = change(served, flag("a", 2))
        for basis in ("", old, new, "(p:x:1)", "%00", "ü", "x" * 5000):
            plain = await poll(fast, basis)
            # A header that the fast path leaves to the application.
            other = await poll(fast, basis, ("Expect", "x"), ("Connection", "keep-alive, x"))
            assert (plain.status, plain.body) == (other.status, other.body)
