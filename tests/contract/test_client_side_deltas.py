"""Client-side SDKs that speak FDv2 get evaluated flags, and what they miss (fdv2 13.3, 13.8.7)."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hmac
import json
from dataclasses import replace
from urllib.parse import quote

import pytest

from relay.evaluation.compiled.program import Program
from relay.model.credential import MobileKey
from relay.model.item import Item, Kind, parse
from relay.model.payload import ChangeSet
from relay.protocol import sse
from relay.streams import evaluated
from relay.web import bases
from tests.contract.test_client_side_evaluation import BAD_SEGMENTS, NOT_CONTEXTS, PERSON
from tests.contract.test_deltas import HOSTILE
from tests.support import data
from tests.support.serving import SDK_KEY, Address, Reply, Served, Stream, ask, serving, until

ANNA = {"kind": "user", "key": "anna"}
BEN = {"kind": "user", "key": "ben"}
OPEN = {"clientSideAvailability": {"usingEnvironmentId": True, "usingMobileKey": True}}
MOBILE_ONLY = {"clientSideAvailability": {"usingEnvironmentId": False, "usingMobileKey": True}}
HIDDEN = {"clientSideAvailability": {"usingEnvironmentId": False, "usingMobileKey": False}}
FOR_ANNA = {"targets": [{"variation": 1, "values": ["anna"]}], "variations": ["off", "on"]}
JSON = ("Content-Type", "application/json")
BY_CROWD = {"attribute": "", "op": "segmentMatch", "values": ["crowd"]}


def flag(key: str, version: int = 1, value: object = "on", **members: object) -> Item:
    text = json.dumps(data.flag(key, version, value, **(OPEN | members)))
    return parse(Kind.FLAG, key, text.encode())


def segment(key: str, version: int, **members: object) -> Item:
    return parse(Kind.SEGMENT, key, json.dumps(data.segment(key, version, **members)).encode())


def gone(key: str, version: int) -> Item:
    return Item(Kind.FLAG, key, version, None)


FILLERS = [flag(f"filler-{n}", value="x" * 200) for n in range(8)]
LAMP, ONLY = flag("lamp"), flag("only-mobile", **MOBILE_ONLY)


def environment(**more: object) -> Served:
    return Served(mobile_key=MobileKey("mob-1"), **({"eval_streams": True} | more))


@pytest.fixture(params=[True, False], ids=["fast path", "application"])
async def site(request):
    served = environment()
    async with serving(served, front=request.param) as address:
        yield served, address


def change(served: Served, *items: Item, full: bool = False) -> None:
    """Let upstream send items."""
    served.environment._handle(ChangeSet(items, full=full))


def begin(served: Served) -> None:
    change(served, *FILLERS, LAMP, ONLY, flag("hidden", **HIDDEN), full=True)


def encoded(context: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(context).encode()).decode().rstrip("=")


class Transfer:
    """Content of one transfer: intent, state, and items put or deleted."""

    def __init__(self, events: list[tuple[str, dict]]) -> None:
        (name, first), *rest = events
        assert name == "server-intent"
        (payload,) = first["payloads"]
        assert all(payload[member] for member in ("id", "target", "intentCode", "reason"))
        self.code, self.reason = payload["intentCode"], payload["reason"]
        self.state = None
        if rest:
            name, last = rest.pop()
            assert name == "payload-transferred"
            assert (last["version"], last["id"]) == (payload["target"], payload["id"])
            self.state = last["state"]
        self.put = {d["key"]: d for name, d in rest if name == "put-object"}
        self.gone = {d["key"] for name, d in rest if name == "delete-object"}
        assert len(rest) == len(self.put) + len(self.gone)
        assert all(d["kind"] == "flag-eval" for _, d in rest)

    @property
    def values(self) -> dict[str, object]:
        return {key: each["object"]["value"] for key, each in self.put.items()}


def of_poll(reply: Reply) -> Transfer:
    assert reply.status == 200, reply
    body = reply.body
    if reply.headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    return Transfer([(each["event"], each["data"]) for each in json.loads(body)["events"]])


def of_stream(message: bytes) -> Transfer:
    return Transfer([(e.name, json.loads(e.data)) for e in sse.Decoder().feed(message)])


def query(basis: str = "", **parameters: str) -> str:
    named = {"auth": "env-1", **parameters} | ({"basis": basis} if basis else {})
    return "&".join(f"{name}={quote(value)}" for name, value in named.items() if value)


async def poll(
    address: Address,
    basis: str = "",
    context: dict = ANNA,
    headers: tuple[tuple[str, str], ...] = (),
    **parameters: str,
) -> Reply:
    path = f"/sdk/poll/eval/{encoded(context)}?{query(basis, **parameters)}"
    return await ask(address, path, headers)


async def opened(
    address: Address, basis: str = "", context: dict = ANNA, **parameters: str
) -> Stream:
    path = f"/sdk/stream/eval/{encoded(context)}?{query(basis, **parameters)}"
    return await Stream.open(address, path)


async def first(address: Address, basis: str = "", context: dict = ANNA, **parameters: str):
    """The first transfer of a stream."""
    stream = await opened(address, basis, context, **parameters)
    try:
        return of_stream(await stream.chunk())
    finally:
        stream.close()


async def polled(address: Address, basis: str = "", context: dict = ANNA, **parameters: str):
    """The transfer of a poll."""
    return of_poll(await poll(address, basis, context, **parameters))


BOTH = pytest.mark.parametrize("ask_for", [polled, first], ids=["poll", "stream"])


@BOTH
async def test_a_client_gets_everything_or_what_it_misses_or_nothing(site, ask_for):
    """Each in the form of FDv2, with the version of the flag in all places where SDKs look."""
    served, address = site
    begin(served)
    everything = await ask_for(address)
    assert (everything.code, everything.reason) == ("xfer-full", "payload-missing")
    assert everything.put.keys() == {"lamp", *(item.key for item in FILLERS)}
    assert everything.put["lamp"] == {
        "version": 1,
        "kind": "flag-eval",
        "key": "lamp",
        "object": {"value": "on", "variation": 0, "version": 1, "flagVersion": 1},
    }
    basis = everything.state
    assert (await ask_for(address, basis)).code == "none"
    change(served, flag("lamp", 2, "new"))
    missed = await ask_for(address, basis)
    assert (missed.code, missed.reason, missed.values) == ("xfer-changes", "stale", {"lamp": "new"})
    change(served, gone("lamp", 3), flag("filler-0", 2, **HIDDEN))
    missed = await ask_for(address, missed.state)
    assert (missed.code, missed.put, missed.gone) == ("xfer-changes", {}, {"lamp", "filler-0"})
    change(served, *FILLERS, flag("lamp", 1, "again"), full=True)
    missed = await ask_for(address, missed.state)
    assert missed.values["lamp"] == "again"
    assert (await ask_for(address, missed.state)).code == "none"


async def test_polls_and_streams_name_the_same_states(site):
    """A stream begins where a poll has ended, and the other way round; by any method."""
    served, address = site
    begin(served)
    state = (await polled(address)).state
    assert (await first(address, state)).code == "none"
    for method in ("POST", "REPORT"):
        body = json.dumps(ANNA).encode()
        headers = [JSON, ("Authorization", "env-1")]
        path = f"/sdk/poll/eval?basis={quote(state)}"
        reply = await ask(address, path, headers, method=method, body=body)
        assert of_poll(reply).code == "none"
        more = ("Content-Type: application/json", f"Content-Length: {len(body)}")
        path = f"/sdk/stream/eval?{query(state)}"
        stream = await Stream.open(address, path, more, method=method, body=body)
        assert of_stream(await stream.chunk()).code == "none"
        change(served, flag("lamp", 7 if method == "POST" else 8))
        state = of_stream(await stream.chunk()).state
        stream.close()


@BOTH
async def test_the_credential_decides_what_a_client_sees(site, ask_for):
    """A mobile key shows what is for mobiles; in the header or the query."""
    served, address = site
    begin(served)
    mobile, browser = await ask_for(address, auth="mob-1"), await ask_for(address)
    assert mobile.put.keys() - browser.put.keys() == {"only-mobile"}
    path = f"/sdk/poll/eval/{encoded(ANNA)}"
    reply = await ask(address, path, [("Authorization", "mob-1")])
    assert of_poll(reply).put.keys() == mobile.put.keys()
    assert (await ask_for(address, mobile.state)).reason == "cant-catchup"
    assert (await ask_for(address, browser.state, auth="mob-1")).reason == "cant-catchup"
    change(served, flag("only-mobile", 2, **MOBILE_ONLY), flag("hidden", 2, **HIDDEN))
    missed = await ask_for(address, mobile.state, auth="mob-1")
    assert missed.values == {"only-mobile": "on"}
    missed = await ask_for(address, browser.state)
    assert (missed.code, missed.put, missed.gone) == ("xfer-changes", {}, set())


@pytest.mark.parametrize(
    "basis",
    ["x", "~", "(p:x:1)", "(p:x:1)~abc", "x" * 3000, "%00\udcff", "é" * 400, "~" * 100, ". ."],
    ids=lambda basis: ascii(basis[:8]),
)
async def test_a_state_that_is_unknown_means_everything(site, basis):
    """Whatever it is; never an error."""
    served, address = site
    begin(served)
    parameter = quote(basis, errors="surrogateescape")
    path = f"/sdk/poll/eval/{encoded(ANNA)}?auth=env-1&basis={parameter}"
    assert of_poll(await ask(address, path)).reason == "cant-catchup"
    stream = await Stream.open(address, path.replace("poll", "stream"))
    assert of_stream(await stream.chunk()).reason == "cant-catchup"
    stream.close()


@BOTH
async def test_a_state_of_another_environment_or_context_means_everything(site, ask_for):
    """Also that of the same context with reasons, and the state of a server-side SDK."""
    served, address = site
    begin(served)
    own = (await ask_for(address)).state
    server_side = served.environment.journal.state
    assert own.startswith(server_side)
    foreign = own.replace("(p:r", "(p:s")
    others = [(await ask_for(address, context=BEN)).state]
    others += [(await ask_for(address, withReasons="true")).state, server_side, foreign]
    for basis in others:
        assert (await ask_for(address, basis)).code == "xfer-full"
    assert (await ask_for(address, own)).code == "none"


async def test_a_stream_of_a_client_with_a_stale_state_begins_with_everything(site):
    """Node's client-side SDK names the state of its first connection."""
    served, address = site
    begin(served)
    state = (await polled(address)).state
    path = f"/sdk/stream/eval/{encoded(ANNA)}?{query(state)}"
    for agent, code in (("NodeClient/4.0.2", "xfer-full"), ("JSClient/4.10.3", "none")):
        stream = await Stream.open(address, path, [f"User-Agent: {agent}"])
        assert of_stream(await stream.chunk()).code == code
        stream.close()


@BOTH
async def test_reasons_come_with_flags_if_asked_for(site, ask_for):
    """In full transfers and in deltas."""
    served, address = site
    begin(served)
    for basis in ("", (await ask_for(address, withReasons="true")).state):
        change(served, flag("lamp", 2 + bool(basis)))
        transfer = await ask_for(address, basis, withReasons="true")
        assert transfer.put["lamp"]["object"]["reason"] == {"kind": "FALLTHROUGH"}


@BOTH
async def test_without_data_a_poll_fails_and_a_stream_waits(site, ask_for):
    """Never a transfer of nothing."""
    served, address = site
    for basis in ("", "(p:x:1)~y"):
        reply = await poll(address, basis)
        assert reply.status == 503
        assert reply.headers["access-control-allow-origin"] == "*"
        stream = await opened(address, basis)
        assert stream.status == 200
        begin(served)
        assert of_stream(await stream.chunk()).code == "xfer-full"
        stream.close()
        served.environment.payload = None


async def test_changes_follow_as_they_come(site):
    """Only those that change a result of the client, each with the state after it."""
    served, address = site
    begin(served)
    change(served, flag("for-anna", **FOR_ANNA))
    anna, ben = await opened(address), await opened(address, context=BEN)
    for stream in (anna, ben):
        await stream.chunk()
    anonymous = {"variations": ["off", "other"], "targets": [{"variation": 1, "values": ["anna"]}]}
    change(served, flag("for-anna", 2, **(FOR_ANNA | {"targets": []})), flag("hidden", 2, **HIDDEN))
    moved, same = of_stream(await anna.chunk()), of_stream(await ben.chunk())
    assert (moved.code, moved.values) == ("xfer-changes", {"for-anna": "off"})
    assert same.put["for-anna"]["version"] == 2
    change(served, flag("for-anna", 3, **anonymous))
    change(served, gone("lamp", 2))
    deleted = of_stream(await anna.chunk())
    assert (deleted.values, deleted.gone) == ({"for-anna": "other"}, {"lamp"})
    for stream in (anna, ben):
        stream.close()
    assert (await first(address, deleted.state)).code == "none"


async def test_a_change_of_most_flags_comes_as_everything(site):
    """As at the start; who has the same results gets nothing."""
    served, address = site
    many = [flag(f"many-{n}", **FOR_ANNA) for n in range(250)]
    change(served, *many, full=True)
    stream = await opened(address)
    await stream.chunk()
    change(served, *(flag(f"many-{n}", 2, **FOR_ANNA) for n in range(250)))
    transfer = of_stream(await stream.chunk())
    assert (transfer.code, len(transfer.put)) == ("xfer-full", 250)
    assert (await first(address, transfer.state)).code == "none"
    stream.close()


@BOTH
async def test_a_change_of_a_segment_alone_is_a_change(site, ask_for):
    """Of the flags that look it up."""
    served, address = site
    begin(served)
    rules = [{"variation": 1, "clauses": [BY_CROWD]}]
    change(served, flag("ruled", variations=["out", "in"], rules=rules), segment("crowd", 1))
    before = await ask_for(address)
    assert before.values["ruled"] == "out"
    change(served, segment("crowd", 2, included=["anna"]))
    missed = await ask_for(address, before.state)
    assert (missed.code, missed.values) == ("xfer-changes", {"ruled": "in"})


async def test_only_answers_to_polls_without_a_state_may_be_cached(site):
    """Their tag stays as long as the client's results do, and is no other client's."""
    served, address = site
    begin(served)
    full = await poll(address)
    tag = full.headers["etag"]
    change(served, flag("hidden", 2, **HIDDEN))
    assert (await poll(address, headers=(("If-None-Match", tag),))).status == 304
    assert (await poll(address, context=BEN)).headers["etag"] != tag
    state = of_poll(full).state
    for basis in (state, "(p:x:1)", state + "x"):
        reply = await poll(address, basis, headers=(("If-None-Match", tag),))
        assert (reply.status, reply.headers.get("cache-control")) == (200, "no-store")
        assert "etag" not in reply.headers
    change(served, flag("lamp", 2))
    reply = await poll(address, headers=(("If-None-Match", tag),))
    assert (reply.status, reply.headers["etag"] != tag) == (200, True)


async def test_answers_are_compressed_if_the_client_takes_that(site):
    """Whole ones and small ones alike, repeated or not."""
    served, address = site
    begin(served)
    zipped = (("Accept-Encoding", "gzip"),)
    plain = (await poll(address)).body
    for _ in range(3):
        reply = await poll(address, headers=zipped)
        assert reply.headers["content-encoding"] == "gzip"
        assert gzip.decompress(reply.body) == plain
    state = of_poll(reply).state
    change(served, flag("filler-0", 2, "y" * 3000))
    for _ in range(3):
        assert of_poll(await poll(address, state, headers=zipped)).put.keys() == {"filler-0"}


async def test_repeated_polls_get_the_same_answer(site):
    """Also after others with other states, credentials and options have asked on the same paths."""
    served, address = site
    begin(served)
    old = (await polled(address)).state
    change(served, flag("lamp", 2))
    asked = [("", {}), (old, {}), ("", {"withReasons": "true"}), (old, {"auth": "mob-1"})]
    asked += [("(p:x:1)~y", {}), ("", {"auth": "mob-1"})]
    answers = [(await poll(address, basis, **more)).body for basis, more in asked]
    for _ in range(3):
        for (basis, more), answer in zip(asked, answers, strict=True):
            assert (await poll(address, basis, **more)).body == answer
    change(served, flag("lamp", 3))
    assert [(await poll(address, basis, **more)).body for basis, more in asked] != answers


async def test_bad_credentials_are_refused(site):
    """Whatever form the request has."""
    served, address = site
    begin(served)
    for auth in ("", "env-2", "mob-2", SDK_KEY):
        path = f"/{encoded(ANNA)}" + (f"?auth={auth}" if auth else "")
        for kind in ("poll", "stream"):
            reply = await ask(address, f"/sdk/{kind}/eval{path}")
            assert reply.status == 401
            assert reply.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("segment_", BAD_SEGMENTS, ids=lambda text: text[:12])
async def test_bad_contexts_in_a_path_are_refused(site, segment_):
    """As by the endpoints of FDv1."""
    served, address = site
    begin(served)
    for kind in ("poll", "stream"):
        reply = await ask(address, f"/sdk/{kind}/eval/{segment_}?auth=env-1&basis=x")
        assert reply.status == 400
        assert json.loads(reply.body)["message"] == BAD_SEGMENTS[segment_]
        assert reply.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("body", NOT_CONTEXTS, ids=lambda body: body[:24])
async def test_bad_contexts_in_a_body_are_refused(site, body):
    """And nothing of them comes back; so are those that are not declared as JSON."""
    served, address = site
    begin(served)
    for kind in ("poll", "stream"):
        path = f"/sdk/{kind}/eval?auth=env-1"
        reply = await ask(address, path, [JSON], method="REPORT", body=body)
        assert reply.status == 400
        assert PERSON.encode() not in reply.body
        reply = await ask(address, path, method="POST", body=json.dumps(ANNA).encode())
        assert reply.status == 415


async def test_a_long_context_is_evaluated(site):
    """Beside the event loop; it gets deltas as well."""
    served, address = site
    begin(served)
    body = json.dumps({**ANNA, "text": "x" * 100_000}).encode()

    async def report(basis: str = "") -> Transfer:
        path = f"/sdk/poll/eval?{query(basis)}"
        return of_poll(await ask(address, path, [JSON], method="POST", body=body))

    state = (await report()).state
    change(served, flag("lamp", 2))
    missed = await report(state)
    assert missed.values == {"lamp": "on"}
    assert (await report(missed.state)).code == "none"


async def test_secure_mode_asks_for_the_hash(site):
    """Browsers only; a mobile key is a secret of its own."""
    served, address = site
    begin(served)
    served.environment.change(replace(served.environment.spec, secure_mode=True))
    proof = hmac.digest(SDK_KEY.encode(), b"anna", "sha256").hex()
    for ask_for in (polled, first):
        state = (await ask_for(address, h=proof)).state
        assert (await ask_for(address, state, h=proof)).code == "none"
        assert (await ask_for(address, auth="mob-1")).code == "xfer-full"
    for wrong in ("", "0" * 64):
        for kind in ("poll", "stream"):
            path = f"/sdk/{kind}/eval/{encoded(ANNA)}?{query(h=wrong)}"
            reply = await ask(address, path)
            assert reply.status == 400
            assert b"secure mode" in reply.body


async def test_pings_can_be_had_instead(site):
    """Each is followed by a poll with the state that the client has, which then tells the news."""
    served, address = site
    begin(served)
    served.environment.spec = replace(served.environment.spec, eval_streams=False)
    state = (await polled(address)).state
    stream = await opened(address, state)
    (ping,) = sse.Decoder().feed(await stream.chunk())
    assert ping.name == "ping"
    change(served, flag("lamp", 2))
    (ping,) = sse.Decoder().feed(await stream.chunk())
    assert ping.name == "ping"
    assert (await polled(address, state)).values == {"lamp": "on"}
    stream.close()


async def test_pages_of_other_origins_may_read_what_sdks_need(site):
    """Headers of answers included (fdv2 13.1.4)."""
    served, address = site
    begin(served)
    origin = ("Origin", "https://app.example")
    exposed = {"Date", "X-LD-EnvID", "X-LD-FD-Fallback", "X-LD-FD-Fallback-TTL"}
    reply = await poll(address, headers=(origin,))
    stream = await Stream.open(
        address, f"/sdk/stream/eval/{encoded(ANNA)}?auth=env-1", (": ".join(origin),)
    )
    for headers in (reply.headers, stream.headers):
        assert headers["access-control-allow-origin"] == "https://app.example"
        assert {*headers["access-control-expose-headers"].split(",")} == exposed
        assert headers["x-ld-envid"] == "env-1"
        assert "x-ld-fd-fallback" not in headers
    stream.close()


async def test_equal_contexts_are_evaluated_once_for_a_change(monkeypatch):
    """However many streams they have, and whatever these have begun with."""
    served = environment()
    async with serving(served) as address:
        begin(served)
        state = (await polled(address)).state
        streams = [await opened(address, basis) for basis in ("", state, state, "x", state)]
        streams.append(await opened(address, context=BEN))
        for stream in streams:
            await stream.chunk()
        evaluated = []
        results = Program.results

        def count(self, context, *more):
            evaluated.append(context.get("user").key)
            return results(self, context, *more)

        monkeypatch.setattr(Program, "results", count)
        change(served, flag("lamp", 2))
        for stream in streams:
            assert of_stream(await stream.chunk()).values == {"lamp": "on"}
            stream.close()
        # Before and after the change.
        assert sorted(evaluated) == ["anna", "anna", "ben", "ben"]


async def test_clients_that_come_before_the_newest_flags_are_compiled_wait_for_them(site):
    """With a state that polls have given, a stream must not begin with older flags."""
    served, address = site
    begin(served)
    watcher = await opened(address)
    await watcher.chunk()
    change(served, flag("lamp", 2, "new"))
    state = (await polled(address)).state
    assert (await first(address, state)).code == "none"
    assert of_stream(await watcher.chunk()).values == {"lamp": "new"}
    watcher.close()


async def test_a_slow_client_is_started_over(site, monkeypatch):
    """With everything: what it has taken is unknown."""
    served, address = site
    monkeypatch.setattr("relay.streams.channel.MAX_PENDING", 1000)
    begin(served)
    state = (await polled(address)).state
    stream = await opened(address, state)
    assert of_stream(await stream.chunk()).code == "none"
    (channel,) = [c for c in served.hub._channels.values() if c.subscriptions]
    (subscription,) = channel.subscriptions
    subscription.pause_writing()
    for version in range(2, 12):
        change(served, flag("lamp", version, "x" * 500))
        await until(lambda: not channel._is_pending and not channel._fan_outs)
    subscription.resume_writing()
    transfer = of_stream(await stream.chunk())
    assert (transfer.code, transfer.put["lamp"]["version"]) == ("xfer-full", 11)
    stream.close()


async def test_after_a_restart_clients_go_on(site):
    """A relay that has the same data names them alike."""
    served, address = site
    begin(served)
    state = (await polled(address)).state
    again = environment()
    async with serving(again) as other:
        begin(again)
        assert (await polled(other, state)).code == "none"
        assert (await first(other, state)).code == "none"


async def test_answers_are_counted(site):
    """By kind and reason, each time that one is given, known ones too, with the bytes it spares."""
    served, address = site
    begin(served)
    change(served, flag("one", rules=[{"variation": 0, "clauses": [BY_CROWD]}]))
    assert "fdv2" not in await status(address)
    everything = await poll(address)
    old, tag = of_poll(everything).state, everything.headers["etag"]
    change(served, flag("lamp", 2, value="off"))
    bodies = [(await poll(address, old)).body for _ in range(4)]  # the last ones are remembered
    new = of_poll_body(bodies[-1]).state
    bodies += [(await poll(address, new)).body for _ in range(3)]
    for _ in range(3):
        everything = await poll(address)
    assert everything.headers["etag"] != tag
    known = (("If-None-Match", everything.headers["etag"]),)
    for _ in range(3):
        assert (await poll(address, headers=known)).status == 304
    await poll(address, new, BEN)
    await poll(address, "(p:x:1)")
    large = {**ANNA, "text": "x" * 20_000}
    body = json.dumps(large).encode()
    await ask(address, f"/sdk/poll/eval?{query()}", [JSON], method="POST", body=body)
    assert (await status(address))["fdv2"]["clientSide"]["answers"] == {
        "delta": {"stale": 4},
        "full": {"no-state": 5, "unknown-state": 2},
        "none": {"up-to-date": 6},
    }
    saved = (await status(address))["fdv2"]["clientSide"]["bytesSaved"]
    size = len(everything.body)
    assert saved == pytest.approx(10 * size - sum(map(len, bodies)), rel=0.05)
    page = (await ask(address, "/metrics")).body.decode()
    labels = 'environment="main",side="client",answer="delta",reason="stale"'
    assert f"relay_transfers_total{{{labels}}} 4\n" in page
    labels = 'environment="main",side="client"'
    assert f"relay_transfers_saved_bytes_total{{{labels}}} {saved}\n" in page


async def test_answers_of_streams_are_counted(site):
    """Also to those who wait together for data; what follows is not an answer."""
    served, address = site
    waiting = [await opened(address, basis) for basis in ("", "", "(p:x:1)~y")]
    begin(served)
    transfers = [of_stream(await stream.chunk()) for stream in waiting]
    state = transfers[0].state
    assert (await first(address, state)).code == "none"
    change(served, flag("lamp", 2, value="off"))
    assert of_stream(await waiting[0].chunk()).code == "xfer-changes"
    assert (await first(address, state)).code == "xfer-changes"
    client = (await status(address))["fdv2"]["clientSide"]
    assert client["answers"] == {
        "delta": {"stale": 1},
        "full": {"no-state": 2, "unknown-state": 1},
        "none": {"up-to-date": 1},
    }
    assert client["bytesSaved"] > 2000
    for stream in waiting:
        stream.close()


@pytest.mark.parametrize("basis", HOSTILE)
@pytest.mark.parametrize("more", ["", "&basis=%s", "&a=b" * 1000, "&unknown=%00&&="])
async def test_hostile_bases_get_everything(site, basis, more):
    """Whatever it is, twice, by each method; the first one of several counts."""
    served, address = site
    begin(served)
    state = (await polled(address)).state
    asked = f"auth=env-1&basis={quote(basis, safe='%')}{more.replace('%s', quote(state))}"
    everything = {"lamp", *(item.key for item in FILLERS)}
    body = json.dumps(ANNA).encode()
    for _ in range(2):
        replies = [await ask(address, f"/sdk/poll/eval/{encoded(ANNA)}?{asked}")]
        for method in ("POST", "REPORT"):
            path = f"/sdk/poll/eval?{asked}"
            replies.append(await ask(address, path, [JSON], method=method, body=body))
        stream = await Stream.open(address, f"/sdk/stream/eval/{encoded(ANNA)}?{asked}")
        transfers = [*map(of_poll, replies), of_stream(await stream.chunk())]
        stream.close()
        for transfer in transfers:
            assert (transfer.code, transfer.reason) == ("xfer-full", "cant-catchup")
            assert transfer.put.keys() == everything


@BOTH
async def test_states_of_others_mean_nothing(site, ask_for, monkeypatch):
    """Another environment's, a server's, another context's, and parts of the client's own."""
    monkeypatch.setattr(bases, "MAX_WAIT", 0.02)
    monkeypatch.setattr(evaluated, "MAX_WAIT", 0.02)
    served, address = site
    begin(served)
    state = (await polled(address)).state
    data_state, _, client = state.partition("~")
    others = (await polled(address, context=BEN)).state
    number = data_state.rpartition(":")[2]
    elsewhere = f"(p:rXXXXXXXX-{'A' * 22}:{number}"
    wrong = [
        f"{elsewhere}~{client}",
        data_state,
        others,
        f"~{client}",
        f"{data_state}~",
        f"{data_state}~{client[:-1]}",
        f"{data_state}~{client}x",
        state + state,
        f"{data_state[:-1]}0)~{client}",
    ]
    for basis in wrong:
        assert (await ask_for(address, basis)).code == "xfer-full", basis
    assert (await ask_for(address, state)).code == "none"


def ahead(*items: Item) -> str:
    """State of another replica, which has more."""
    other = environment()
    begin(other)
    change(other, *items)
    return other.environment.journal.state


async def state_of(address: Address, data_state: str) -> str:
    """State that Anna would have with other data."""
    return f"{data_state}~{(await polled(address)).state.partition('~')[2]}"


@BOTH
async def test_a_client_of_a_replica_that_is_ahead_waits(site, ask_for):
    """It never goes back to older values, and then needs nothing, or only what came after it."""
    served, address = site
    begin(served)
    lamp, other = flag("lamp", 2, value="off"), flag("only-mobile", 2, value="x", **MOBILE_ONLY)
    near = asyncio.create_task(ask_for(address, await state_of(address, ahead(lamp))))
    far = asyncio.create_task(ask_for(address, await state_of(address, ahead(lamp, other))))
    await asyncio.sleep(0.1)
    assert not near.done()
    change(served, lamp)
    assert (await near).code == "none"
    assert not far.done()
    change(served, other)
    assert (await far).code == "none"


@BOTH
async def test_it_does_not_wait_for_ever(site, ask_for, monkeypatch):
    """Nor for what is no state; a stream goes on after it."""
    monkeypatch.setattr(bases, "MAX_WAIT", 0.1)
    monkeypatch.setattr(evaluated, "MAX_WAIT", 0.1)
    served, address = site
    begin(served)
    state = await state_of(address, ahead(flag("lamp", 2, value="off")))
    for _ in range(2):
        transfer = await ask_for(address, state)
        assert (transfer.code, transfer.values["lamp"]) == ("xfer-full", "on")


async def test_streams_that_wait_are_let_go_one_by_one(site, monkeypatch):
    """Each after its own time; one that leaves meanwhile is forgotten."""
    monkeypatch.setattr(evaluated, "MAX_WAIT", 0.3)
    served, address = site
    begin(served)
    state = await state_of(address, ahead(flag("lamp", 2, value="off")))
    streams = []
    for _ in range(4):
        streams.append(await opened(address, state))
        await asyncio.sleep(0.05)
    streams.pop().close()
    for stream in streams:
        assert of_stream(await stream.chunk()).code == "xfer-full"
    change(served, flag("lamp", 3, value="new"))
    for stream in streams:
        assert of_stream(await stream.chunk()).values == {"lamp": "new"}
        stream.close()
    await until(lambda: len(served.hub) == 0)


async def test_what_is_spared_is_known_without_a_transfer_of_everything():
    """As after a restart, when all come back with what they have."""
    before, served = environment(), environment()
    begin(before)
    async with serving(before) as address:
        state = (await polled(address)).state
    begin(served)
    async with serving(served) as address:
        assert (await polled(address, state)).code == "none"
        assert (await status(address))["fdv2"]["clientSide"]["bytesSaved"] > 1600


async def status(address: Address) -> dict:
    page = json.loads((await ask(address, "/status")).body)
    return page["environments"]["main"]


def of_poll_body(body: bytes) -> Transfer:
    return Transfer([(each["event"], each["data"]) for each in json.loads(body)["events"]])
