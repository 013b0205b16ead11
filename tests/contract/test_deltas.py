"""Server-side SDKs that name the state of their data get what they miss (fdv2 13.8)."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import quote

import pytest

from relay.model.credential import SDKKey
from relay.model.item import Item, Kind
from relay.model.payload import ChangeSet
from relay.protocol import sse
from relay.stores import Stored
from relay.streams import deltas
from relay.streams.hub import StreamLimits
from relay.web import bases
from tests.support.serving import SDK_KEY, Served, Stream, ask, serving, until

SDK = [("Authorization", SDK_KEY)]
NODE = "User-Agent: NodeJSClient/9.13.7"
INSTANCE = "X-LaunchDarkly-Instance-Id: 1"
NODE_HEADERS = [("User-Agent", "NodeJSClient/9.13.7"), ("X-LaunchDarkly-Instance-Id", "1")]
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


async def test_clients_that_waited_get_what_they_miss(site):
    """As after a restart, when many are there before the data."""
    served, address = site
    before = Served()
    old = change(before, LARGE, flag("a", 1), full=True)
    new = change(before, flag("a", 2))
    journal, payload = before.environment.journal, before.environment.payload
    bases = ["", old, new, "(p:other:1)"] * 40
    streams = [await opened(address, basis) for basis in bases]
    served.environment._serve_stored(Stored(payload, journal=journal.saved(payload)))
    got = [transfer(await stream.chunk())[:2] for stream in streams]
    everything = "xfer-full", ["put-object a 2", "put-object large 1"]
    expected = [everything, ("xfer-changes", ["put-object a 2"]), ("none", []), everything]
    assert got == expected * 40
    state = change(served, LARGE, flag("a", 3), full=True)
    assert transfer(await streams[-1].chunk()) == ("xfer-changes", ["put-object a 3"], state)
    for stream in streams:
        stream.close()


async def test_a_client_with_a_stale_state_gets_everything(site):
    """Node's server SDK names the state of its first connection, and compares versions."""
    served, address = site
    state = change(served, LARGE, full=True)
    assert (await first(address, state, NODE))[0] == "xfer-full"
    assert (await first(address, state, NODE, INSTANCE))[0] == "xfer-full"
    assert (await first(address, state, "User-Agent: PythonClient/9.20.0"))[0] == "none"


async def test_the_first_stream_after_a_poll_is_fresh(site, monkeypatch):
    """Node's SDK polls, then opens a stream; reconnecting, it names the same state once more."""
    monkeypatch.setattr(bases, "FRESH", 10.0)
    served, address = site
    state = change(served, LARGE, flag("a", 1), full=True)
    for _ in range(2):
        assert intent((await poll(address, "", *NODE_HEADERS)).body) == "xfer-full"
        assert (await first(address, state, NODE, INSTANCE))[0] == "none"
        assert (await first(address, state, NODE, INSTANCE))[0] == "xfer-full"
    await poll(address, "", *NODE_HEADERS)
    change(served, flag("a", 2))
    assert (await first(address, state, NODE, INSTANCE))[1] == ["put-object a 2"]


async def test_only_what_a_poll_has_just_handed_out_is_fresh(site, monkeypatch):
    """Not to another instance, not another state, not after a stream of its own, not later."""
    monkeypatch.setattr(bases, "FRESH", 10.0)
    served, address = site
    old = change(served, LARGE, flag("a", 1), full=True)
    state = change(served, flag("a", 2))
    await poll(address, "", *NODE_HEADERS)
    other = "X-LaunchDarkly-Instance-Id: 2"
    assert (await first(address, state, NODE, other))[0] == "xfer-full"
    assert (await first(address, old, NODE, INSTANCE))[0] == "xfer-full"
    await poll(address, "", *NODE_HEADERS)
    assert (await first(address, "", NODE, INSTANCE))[0] == "xfer-full"
    assert (await first(address, state, NODE, INSTANCE))[0] == "xfer-full"
    known = ("If-None-Match", f'"{state}"')
    assert (await poll(address, "", *NODE_HEADERS, known)).status == 304
    assert (await first(address, state, NODE, INSTANCE))[0] == "xfer-full"
    await poll(address, "", *NODE_HEADERS)
    monkeypatch.setattr(bases, "FRESH", -1.0)
    assert (await first(address, state, NODE, INSTANCE))[0] == "xfer-full"


async def test_an_sdk_that_compares_versions_polls_for_everything_or_nothing(site):
    """It may remember deletions that only another replica has seen."""
    served, address = site
    old = change(served, LARGE, flag("a", 1), full=True)
    new = change(served, flag("a", 2))
    for basis, code in ((new, "none"), (old, "xfer-full"), ("", "xfer-full")):
        assert intent((await poll(address, basis, *NODE_HEADERS)).body) == code
    assert intent((await poll(address, old)).body) == "xfer-changes"


def ahead(*changes: list[Item]) -> str:
    """Return the state of another replica, which has seen more."""
    other = Served()
    change(other, LARGE, flag("a", 1), full=True)
    return [change(other, *items) for items in changes][-1]


async def test_a_client_of_a_replica_that_is_ahead_waits(site):
    """Until the change is here, too: then it needs nothing, or only what came after it."""
    served, address = site
    change(served, LARGE, flag("a", 1), full=True)
    waiting = await opened(address, ahead([flag("a", 2)]))
    before, further = (
        await opened(address),
        await opened(address, ahead([flag("a", 2), flag("b", 1)])),
    )
    await before.chunk()
    state = change(served, flag("a", 2))
    assert transfer(await waiting.chunk()) == ("none", [], None)
    assert transfer(await before.chunk()) == ("xfer-changes", ["put-object a 2"], state)
    state = change(served, flag("b", 1), flag("c", 1))
    changed = ("xfer-changes", ["put-object b 1", "put-object c 1"], state)
    assert transfer(await waiting.chunk()) == transfer(await before.chunk()) == changed
    code, items, _ = transfer(await further.chunk())  # which it would not have got before
    assert (code, items[-1]) == ("xfer-full", "put-object large 1")
    assert "put-object c 1" in items
    for stream in (waiting, before, further):
        stream.close()


async def test_a_client_does_not_wait_for_ever(site, monkeypatch):
    """It gets everything if the change does not come."""
    monkeypatch.setattr(deltas, "MAX_WAIT", 0.05)
    monkeypatch.setattr(bases, "MAX_WAIT", 0.05)
    served, address = site
    state = change(served, LARGE, flag("a", 1), full=True)
    other = ahead([flag("a", 2)])
    assert await first(address, other) == (
        "xfer-full",
        ["put-object a 1", "put-object large 1"],
        state,
    )
    assert intent((await poll(address, other)).body) == "xfer-full"


async def test_data_that_come_late_may_be_behind_as_well(site, monkeypatch):
    """A client that has waited for them waits for the change, but not for ever."""
    monkeypatch.setattr(deltas, "MAX_WAIT", 0.05)
    served, address = site
    stream = await opened(address, ahead([flag("a", 2)]))
    change(served, LARGE, flag("a", 1), full=True)
    assert transfer(await stream.chunk())[0] == "xfer-full"
    stream.close()


async def test_a_poll_waits_for_a_change_that_the_client_has_already(site):
    served, address = site
    change(served, LARGE, flag("a", 1), full=True)
    asked = asyncio.create_task(poll(address, ahead([flag("a", 2)])))
    await asyncio.sleep(0.05)
    assert not asked.done()
    change(served, flag("a", 2))
    assert intent((await asked).body) == "none"


async def test_waiting_streams_are_alive_and_end():
    """They get heartbeats, and their proper end."""
    served = Served(StreamLimits(heartbeat_interval=0.05))
    async with serving(served) as address:
        change(served, LARGE, flag("a", 1), full=True)
        stream = await opened(address, ahead([flag("a", 2)]))
        assert await stream.chunk() == b":\n"
        assert len(served.hub) == 1
    rest = await stream.rest()
    assert rest == b":\n" * (len(rest) // 2)
    stream.close()


async def test_a_client_that_leaves_while_it_waits_is_forgotten(site):
    served, address = site
    change(served, LARGE, flag("a", 1), full=True)
    stream = await opened(address, ahead([flag("a", 2)]))
    await until(lambda: len(served.hub) == 1)
    stream.close()
    await until(lambda: len(served.hub) == 0)
    change(served, flag("a", 2))


async def test_streams_that_wait_for_data_then_get_what_they_miss(site):
    """Such as stored data, whose state their clients have already."""
    served, address = site
    other = Served()
    state = change(other, LARGE, full=True)
    streams = [await opened(address, basis) for basis in (state, "", "(p:x:1)")]
    change(served, LARGE, full=True)
    codes = [transfer(await stream.chunk())[0] for stream in streams]
    assert codes == ["none", "xfer-full", "xfer-full"]
    for stream in streams:
        stream.close()


async def test_answers_are_counted(site):
    """By kind and reason, each time that one is given, with the bytes that it spares."""
    served, address = site
    old = change(served, LARGE, flag("a", 1), full=True)
    assert "fdv2" not in (await status(address))
    new = change(served, flag("a", 2))
    size, changed = served.environment.payload.size, len(flag("a", 2).json)
    for basis in ("", old, old, old, new, new, "(p:x:1)"):
        await poll(address, basis)
    await poll(address, "", ("If-None-Match", f'"{new}"'))
    for basis in ("", old, new, "?"):
        await first(address, basis)
    await first(address, new, NODE)
    change(served, LARGE, flag("a", 1), full=True)
    await poll(address, new)
    assert (await status(address))["fdv2"] == {
        "answers": {
            "delta": {"stale": 4},
            "full": {"no-state": 2, "old-state": 1, "unknown-state": 1, "unreliable-state": 2},
            "none": {"up-to-date": 4},
        },
        "bytesSaved": 8 * size - 4 * changed,
        "states": 2,  # the first one again
        "barriers": 1,
    }
    metrics = (await ask(address, "/metrics")).body.decode()
    labels = 'environment="main",side="server",answer="delta",reason="stale"'
    assert f"relay_transfers_total{{{labels}}} 4\n" in metrics
    saved = 8 * size - 4 * changed
    assert (
        f'relay_transfers_saved_bytes_total{{environment="main",side="server"}} {saved}\n'
        in metrics
    )
    assert 'relay_journal_states{environment="main"} 2\n' in metrics
    assert 'relay_journal_barriers_total{environment="main"} 1\n' in metrics


async def status(address):
    page = json.loads((await ask(address, "/status")).body)
    return page["environments"]["main"]


async def test_an_unknown_filter_means_all_data(site):
    """As for LaunchDarkly; SDKs would give up for good on a refusal (fdv2 13.4.2)."""
    served, address = site
    change(served, LARGE, full=True)
    assert (await ask(address, "/sdk/poll?filter=x", SDK)).status == 200
    stream = await Stream.open(address, "/sdk/stream?filter=x")
    assert transfer(await stream.chunk())[1] == ["put-object large 1"]
    stream.close()
    assert (await ask(address, "/sdk/latest-all?filter=x", SDK)).status == 404


HOSTILE = [
    "%00",
    "%ff%fe",
    "x" * 5000,
    "%25" * 2000,
    "(p:%0d%0aX: y:1)",
    "?",
    "-",
    "(p:" + "9" * 4000 + ")",
    "\u00fc",
]


@pytest.mark.parametrize("basis", HOSTILE)
@pytest.mark.parametrize("more", ["", "&basis=%s", "&a=b" * 1000, "&unknown=%00&&="])
async def test_hostile_bases_get_everything(site, basis, more):
    """Whatever it is; it is kept nowhere, and unknown parameters mean nothing."""
    served, address = site
    state = change(served, LARGE, full=True)
    query = f"?basis={quote(basis, safe='%')}{more.replace('%s', state)}"
    reply = await ask(address, f"/sdk/poll{query}", SDK)
    assert (reply.status, intent(reply.body)) == (200, "xfer-full")
    stream = await Stream.open(address, f"/sdk/stream{query}")
    assert transfer(await stream.chunk()) == ("xfer-full", ["put-object large 1"], state)
    stream.close()


async def test_a_number_of_any_size_is_no_state(site, monkeypatch):
    """Also if it seems to be of this environment's data."""
    monkeypatch.setattr(deltas, "MAX_WAIT", 0.02)
    monkeypatch.setattr(bases, "MAX_WAIT", 0.02)
    served, address = site
    change(served, LARGE, full=True)
    id_ = served.environment.journal.id
    for number in ("0", "-1", "9" * 20, "9" * 200, "1e9", "%D9%A3", ""):
        query = f"?basis=(p:{id_}-x:{number})"
        assert intent((await ask(address, f"/sdk/poll{query}", SDK)).body) == "xfer-full"
        stream = await Stream.open(address, f"/sdk/stream{query}")
        assert transfer(await stream.chunk())[0] == "xfer-full"
        stream.close()


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
