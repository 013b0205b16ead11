"""Events endpoints: responses, accepted payloads, and bounds on memory."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import re
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest

from relay.environment import Environment
from relay.errors import StoreUnavailable
from relay.events.intake import MAX_ORIGINS, SUMMARISED_AT_ONCE
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.model.item import Kind, parse
from relay.model.payload import Payload
from relay.protocol.events import join_arrays
from relay.relay import Relay
from relay.streams.hub import Hub
from relay.telemetry.log import environment_log
from relay.web.bodies import MAX_DISCARDED, MAX_SIZE, MemoryBudget
from relay.web.cors import ALLOWED_HEADERS
from relay.web.endpoints.events import EventsHandler
from relay.web.fastpath import protocol
from relay.web.fastpath.events import PLAIN_SIZE
from relay.web.fastpath.heads import read_head
from relay.web.fastpath.shared import ConnectionLimits
from tests.support.contracts import ScriptedSource
from tests.support.serving import Served, ask, serving, until

GOLDEN = Path(__file__).parent.parent.parent / "golden"
KEY, MOBILE_KEY = (
    "sdk-5ca1ab1e-0001-4000-8000-00000000a001",
    "mob-5ca1ab1e-0001-4000-8000-00000000b001",
)
ID = "5ca1ab1e00000000000c0001"
SDK = ("Authorization", KEY)
GZIP = ("Content-Encoding", "gzip")
SCHEMA_4 = ("X-LaunchDarkly-Event-Schema", "4")
SOME = b'[{"kind":"custom","key":"k"}]'
GIF = base64.b64decode("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7")
PARTITION_4 = Partition("main", EventsEndpoint.BULK, 4)
TAGGED, MOBILE_4 = (
    PARTITION_4._replace(tags="a/b"),
    PARTITION_4._replace(endpoint=EventsEndpoint.MOBILE),
)
DIAGNOSTIC = Partition("main", EventsEndpoint.BULK_DIAGNOSTIC)
OFF = "Event proxy is not enabled for this environment"
UNREADABLE = b'{"message":"unable to read request body"}'


@dataclass
class RecordingAcceptor:
    """Acceptor that records payloads in place of a forwarder."""

    payloads: list[EventPayload] = field(default_factory=list)
    full: bool = False
    safe: asyncio.Event = field(default_factory=asyncio.Event)
    time: float = 0.0

    def __post_init__(self) -> None:
        self.safe.set()

    def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
        if self.full:
            raise StoreUnavailable("full")
        self.payloads.append(payload)
        if not self.safe.is_set():
            return asyncio.ensure_future(self.safe.wait())
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        done.set_result(True)
        return done

    def server_time(self, environment: str) -> float:
        return self.time

    @property
    def bodies(self) -> list[bytes]:
        return [payload.body for payload in self.payloads]


def environment(name: str, number: str) -> Environment:
    """Return an environment of the recordings."""
    key, mobile = (f"{kind}-5ca1ab1e-00{number}-4000-8000-00000000{letter}0{number}" for kind, letter in (("sdk", "a"), ("mob", "b")))  # fmt: skip
    client = f"5ca1ab1e00000000000c00{number}"
    spec = EnvironmentSpec(name, SDKKey(key), MobileKey(mobile), EnvironmentID(client))
    return Environment(spec, ScriptedSource(), Hub({}), environment_log(name, spec.sdk_key.masked))


def served_by(acceptor: RecordingAcceptor | None, max_size: int = 0) -> Served:
    """Return a relay with the environments of the recordings; `main` has its flags."""
    served = Served()
    main = environment("main", "01")
    served.source = main._source
    data = json.loads((GOLDEN / "environment.json").read_text("utf-8"))["flags"]
    main.payload = Payload.of(
        parse(Kind.FLAG, k, json.dumps(item).encode()) for k, item in data.items()
    )
    others = [environment(f"e{n}", f"{n:02}") for n in (2, *range(4, 16))]
    served.serve(Relay([main, *others], 0))
    served.use(events=EventsHandler(acceptor, max_size))
    return served


@pytest.fixture
def acceptor():
    return RecordingAcceptor()


@pytest.fixture(params=[True, False], ids=["door", "app"])
def front(request):
    """True to serve through the fast path; the application must behave the same."""
    return request.param


@pytest.fixture
async def address(acceptor, front):
    """A relay with events enabled."""
    async with serving(served_by(acceptor), front=front) as address:
        yield address


async def post(address, body, *headers, path="/bulk"):
    return await ask(address, path, [SDK, *headers], method="POST", body=body)


# The recordings.


def lines(file):
    return [json.loads(line) for line in (GOLDEN / file).read_text("utf-8").split("\n") if line]


def content(sent) -> bytes:
    if "body_base64" in sent:
        return base64.b64decode(sent["body_base64"])
    return sent.get("body", "").encode()


def target(path: str, headers: dict[str, str]) -> tuple[str, ...]:
    """Return path, key, schema and tags of a request upstream."""
    key = headers.get("authorization", "").removeprefix("api_key ")
    schema = "" if "diagnostic" in path else headers.get("x-launchdarkly-event-schema", "")
    tags = "" if "diagnostic" in path else headers.get("x-launchdarkly-tags", "")
    return path, key, schema, tags


def sent_upstream(recording) -> dict[tuple[str, ...], list]:
    """Return the events that ld-relay sent, by target; repeated diagnostics count once."""
    sent_by_target: dict[tuple[str, ...], list] = defaultdict(list)
    for sent in recording["upstream"]:
        headers = {name.lower(): value for name, value in sent["headers"]}
        where = target(sent["path"], headers)
        if "diagnostic" not in sent["path"]:
            sent_by_target[where] += json.loads(sent["body"])
        elif sent["body"] not in sent_by_target[where]:
            sent_by_target[where].append(sent["body"])
    return without_order(sent_by_target)


def accepted(payloads: list[EventPayload], relay: Relay) -> dict[tuple[str, ...], list]:
    """Return the events that were accepted, by target."""
    bodies_by_target: dict[tuple[str, ...], list[bytes]] = defaultdict(list)
    for p in payloads:
        spec = relay.environments[p.partition.environment].spec
        endpoint = p.partition.endpoint
        key = spec.mobile_key if endpoint.mobile else spec.sdk_key
        name = "" if endpoint.client_side else key.value
        schema = "" if endpoint.diagnostic else str(p.partition.schema)
        path = endpoint.path(spec.environment_id.value)
        bodies_by_target[path, name, schema, p.partition.tags].append(p.body)
    events = {
        where: [b.decode() for b in bodies] if "diagnostic" in where[0] else json.loads(join_arrays(bodies))
        for where, bodies in bodies_by_target.items()
    }  # fmt: skip
    return without_order(events)


def without_order(events_by_target):
    for events in events_by_target.values():
        for event in events:
            for counted in event.get("features", {}).values() if isinstance(event, dict) else ():
                counted["counters"].sort(key=lambda c: json.dumps(c, sort_keys=True))
                counted.get("contextKinds", []).sort()
    return dict(events_by_target)


CLIENT_SIDE = (f"/events/bulk/{ID}", "", "3", "")
CONTEXT = {"kind": "user", "key": "c1"}


def custom(key, **more):
    return {"kind": "custom", "creationDate": 1000, "key": key, "context": CONTEXT, **more}


LAMP = {"variation": 0, "version": 7, "value": True, "count": 1}
SUMMARY = {"kind": "summary", "startDate": 1000, "endDate": 1000}
COUNTED = {"lamp": {"default": False, "counters": [LAMP], "contextKinds": ["user"]}}

EXPECTED = {
    # Row 5: both alphabets, with or without padding.
    "image beacon, base64 without padding": {CLIENT_SIDE: [custom("gif-nopad1")]},
    "image beacon, url-safe alphabet with - or _": {
        CLIENT_SIDE: [custom("gif-url", data="¿ûÿ~~~???")]
    },
    # Row 30: events with only a user's key count.
    "summarised, schema 2: userKey only (inlined users off)": {
        ("/bulk", KEY, "4", ""): [{**SUMMARY, "features": COUNTED}]
    },
}
"""Events that are accepted although ld-relay loses them, by the name of the recording."""


async def test_accepted_events_of_the_recordings(acceptor, front):
    """The recorded payloads leave the relay as they left ld-relay."""
    served = served_by(acceptor)
    async with serving(served, front=front) as address:
        for recording in lines("events.jsonl"):
            name = recording["name"]
            acceptor.payloads.clear()
            for sent in recording["sent"]:
                headers = [(n, v) for n, v in sent["headers"]]
                method, body = sent["method"], content(sent)
                reply = await ask(address, sent["path"], headers, method=method, body=body)
                assert reply.status == sent["status"], name
                assert reply.body == (GIF if sent["response"] == "<gif>" else b""), name
            got, expected = accepted(acceptor.payloads, served.relay), sent_upstream(recording)
            if "capacity" in name:  # row 26: no event is lost
                for where, events in expected.items():
                    assert got[where][: len(events)] == events, name
                    sent_events = sum(len(json.loads(s["body"])) for s in recording["sent"])
                    assert len(got[where]) == sent_events + ("summarised" in name), name
            else:
                assert got == EXPECTED.get(name, expected), name


HEADERS = ("content-type", "x-content-type-options", "allow")


def expected_reply(recording) -> tuple[int, dict[str, str], object]:
    """Return the response of ld-relay, with the intended differences."""
    status = recording["response"]["status"]
    headers = {name.lower(): value for name, value in recording["response"]["headers"]}
    body = content(recording["response"])
    path = recording["request"]["path"]
    if "trailing garbage" in recording["name"]:  # row 29
        status, headers, body = 202, {}, b""
    compared = {n: v for n, v in headers.items() if n in HEADERS or n.startswith("access-control-")}
    if status == 503:  # it says which setting is missing, too
        body = json.dumps({"message": f"{OFF}: set [Events] sendEvents (USE_EVENTS=true)"})
        body = body.replace('": "', '":"').encode()
    if body.startswith(b"{"):  # row 12
        compared["content-type"] = "application/json"
    if status == 405:  # row 11
        compared["allow"] = "POST"
    if path.startswith("/events/diagnostic/"):  # row 7
        compared["access-control-allow-methods"] = "POST,OPTIONS"
    if status == 404:  # row 9
        allowed = ",".join(ALLOWED_HEADERS)
        compared |= {
            "access-control-allow-origin": "https://app.example",
            "access-control-max-age": "300",
        }
        compared |= {
            "access-control-allow-credentials": "false",
            "access-control-allow-headers": allowed,
        }
        compared |= {"access-control-expose-headers": "Date"}
    return status, compared, body


@pytest.mark.parametrize("setup", ["ready", "events-limit", "events-off"])
async def test_responses_of_the_recordings(setup, front):
    """Status, text and headers are those of ld-relay, but for the intended differences."""
    acceptor = None if setup == "events-off" else RecordingAcceptor()
    served = served_by(acceptor, 100 if setup == "events-limit" else 0)
    requested = [line for line in lines("events-http.jsonl") if line["setup"] == setup]
    assert len(requested) >= 5
    async with serving(served, front=front) as address:
        for recording in requested:
            sent = recording["request"]
            headers = [(n, v) for n, v in sent["headers"]]
            body = content(sent)
            if "Expect" in recording["name"]:
                continue
            if sent.get("chunked"):
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                reply = await raw(address, sent["method"], sent["path"], headers, body)
            else:
                reply = await ask(address, sent["path"], headers, method=sent["method"], body=body)
            own_headers = {
                n: v for n, v in reply.headers.items() if n in HEADERS or n.startswith("access-control-")
            }  # fmt: skip
            got = reply.status, own_headers, reply.body
            assert got == expected_reply(recording), recording["name"]


async def raw(address, method, path, headers, chunked):
    """Send a request with a body that is chunked already."""

    @dataclass
    class Sent:
        address: object

        async def connect(self):
            reader, writer = await self.address.connect()
            write = writer.write
            writer.write = lambda head: write(head + chunked)
            return reader, writer

    headers = [*headers, ("Transfer-Encoding", "chunked")]
    return await ask(Sent(address), path, headers, method=method)


# Accepted payloads.

LAYOUT = [
    ("/bulk", EventsEndpoint.BULK, ("Authorization", KEY)),
    ("/mobile", EventsEndpoint.MOBILE, ("Authorization", MOBILE_KEY)),
    ("/mobile/events", EventsEndpoint.MOBILE, ("Authorization", MOBILE_KEY)),
    ("/mobile/events/bulk", EventsEndpoint.MOBILE, ("Authorization", MOBILE_KEY)),
    (f"/events/bulk/{ID}", EventsEndpoint.CLIENT_SIDE, ("X-Nothing", "x")),
    ("/diagnostic", EventsEndpoint.BULK_DIAGNOSTIC, ("Authorization", KEY)),
    ("/mobile/events/diagnostic", EventsEndpoint.MOBILE_DIAGNOSTIC, ("Authorization", MOBILE_KEY)),
    (f"/events/diagnostic/{ID}", EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC, ("X-Nothing", "x")),
]


@pytest.mark.parametrize(("path", "endpoint", "credential"), LAYOUT)
async def test_a_complete_payload(address, acceptor, path, endpoint, credential):
    """Only schema, tags, wrapper and payload ID matter; of diagnostics only the ID."""
    payload_id = "11111111-2222-4333-8444-555555555555"
    more = [("x-launchdarkly-tags", "application-id/shop"), ("X-LaunchDarkly-Wrapper", "w/1")]
    more += [("X-LaunchDarkly-Payload-ID", payload_id), ("Cookie", "a=b"), ("X-LaunchDarkly-Event-Schema", "5")]  # fmt: skip
    reply = await ask(address, path, [credential, *more], method="POST", body=SOME)
    assert (reply.status, reply.body, reply.headers["content-length"]) == (202, b"", "0")
    partition = Partition("main", endpoint)
    if not endpoint.diagnostic:
        partition = Partition("main", endpoint, 5, "application-id/shop", "w/1")
    (got,) = acceptor.payloads
    assert got == EventPayload(partition, payload_id, SOME, got.received)


async def test_schemas(address, acceptor):
    """A schema that is no positive integer means 1; events of old schemas are converted."""
    body = SOME[:-2] + b',"userKey":"u"}]'
    for named, schema in (("3", 3), ("4", 4), ("+4", 4), ("004", 4), ("99", 99)):
        await post(address, body, ("X-LaunchDarkly-Event-Schema", named))
        got = acceptor.payloads.pop()
        assert (got.partition.schema, got.body) == (schema, body)
    for named in ("2", "1", "0", "-4", "4.0", "4_0", "9" * 30, "", "x"):
        await post(address, body, ("X-LaunchDarkly-Event-Schema", named))
        got = acceptor.payloads.pop()
        assert got.partition.schema == 4
        assert json.loads(got.body)[0]["contextKeys"] == {"user": "u"}


async def test_partitions_by_origin_are_bounded(address, acceptor, caplog):
    """Each origin has a partition; tags of those beyond the bound are dropped, with one warning."""
    for number in range(MAX_ORIGINS + 2):
        await post(address, SOME, SCHEMA_4, ("X-LaunchDarkly-Tags", f"application-id/{number}"))
    tags = [each.partition.tags for each in acceptor.payloads]
    assert len(set(tags)) == MAX_ORIGINS + 1
    assert tags[-2:] == ["", ""]
    assert caplog.text.count("tags of others are left out") == 1
    await post(address, SOME, SCHEMA_4, ("X-LaunchDarkly-Tags", "application-id/0"))
    assert acceptor.payloads[-1].partition.tags == "application-id/0"


@pytest.mark.parametrize("payload_id", ["", " ", "a b", "x" * 101, "\xe4"])
async def test_payload_ids_that_no_sdk_makes(address, acceptor, payload_id):
    """They are ignored, and no others are made up."""
    await post(address, SOME, SCHEMA_4, ("X-LaunchDarkly-Payload-ID", payload_id))
    await post(address, SOME, SCHEMA_4)
    assert [p.payload_id for p in acceptor.payloads] == ["", ""]


async def test_the_response_waits_until_the_payload_is_safe(address, acceptor):
    """The response is sent as soon as the payload is safe, and no earlier."""
    acceptor.safe.clear()
    for request in (post(address, SOME, SCHEMA_4), post(address, b"hello", path="/diagnostic")):
        requested = asyncio.create_task(request)
        await until(lambda: acceptor.payloads)
        await asyncio.sleep(0)
        assert not requested.done()
        acceptor.safe.set()
        assert (await requested).status == 202
        acceptor.safe.clear()
        acceptor.payloads.clear()


async def test_a_payload_that_cannot_be_stored_is_refused(address, acceptor):
    """The SDK is told to retry, and contexts of the lost payload are introduced again."""
    old = [{"kind": "custom", "key": "k", "user": {"key": "u"}}]
    acceptor.full = True
    for path, body in (("/bulk", SOME), ("/bulk", json.dumps(old).encode()), ("/diagnostic", b"x")):
        schema = SCHEMA_4 if body is SOME else ("X-LaunchDarkly-Event-Schema", "2")
        reply = await post(address, body, schema, path=path)
        assert (reply.status, reply.headers["content-type"]) == (503, "application/json")
    image = f"/a/{ID}.gif?d={base64.b64encode(SOME).decode()}"
    assert (await ask(address, image)).status == 503
    acceptor.full = False
    await post(address, json.dumps(old).encode(), ("X-LaunchDarkly-Event-Schema", "2"))
    (got,) = acceptor.bodies
    assert [event["kind"] for event in json.loads(got)] == ["index", "custom"]


async def test_unusable_payloads_are_counted_and_logged_once(address, acceptor, caplog):
    """The SDK gets its 202; the first one is logged, without secrets."""
    for body in (b"{}", b"hello", b"null", b'[{"kind":5}]'):
        assert (await post(address, body, ("X-LaunchDarkly-Event-Schema", "2"))).status == 202
    assert acceptor.payloads == []
    warnings = [r for r in caplog.records if "cannot be used" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].environment == "main"
    assert KEY not in caplog.text


async def test_large_payloads_of_old_schemas_are_summarised_like_small_ones(address, acceptor):
    """They are summarised in a thread, with the same result."""
    event = {
        "kind": "feature",
        "key": "lamp",
        "user": {"key": "u"},
        "version": 1,
        "creationDate": 5,
    }
    number = SUMMARISED_AT_ONCE // 60
    body = json.dumps([event] * number).encode()
    assert len(body) > SUMMARISED_AT_ONCE
    await asyncio.gather(*(post(address, body) for _ in range(3)))
    events = [json.loads(got) for got in acceptor.bodies]
    assert sum(len(e) for e in events) == 4  # one index, three summaries
    counts = [e[-1]["features"]["lamp"]["counters"][0]["count"] for e in events]
    assert counts == [number] * 3


async def test_debugging_ends_by_the_clock_of_upstream(address, acceptor):
    """The clock comes from the forwarder."""
    far = 32_503_680_000_000
    event = {
        "kind": "feature",
        "key": "x",
        "version": 1,
        "userKey": "u",
        "debugEventsUntilDate": far,
    }
    for acceptor.time in (0.0, far / 1000 + 1):
        await post(address, json.dumps([event]).encode())
    assert [b'"debug"' in body for body in acceptor.bodies] == [True, False]


# Bodies.


@pytest.mark.parametrize("named", ["gzip", "GZIP", "Gzip, identity", "x-gzip"])
async def test_compressed(address, acceptor, named):
    """The encoding is recognised in any letter case; data after the stream is ignored (row 29)."""
    trailers = [b"", b"\0" * 9, b"\x1f", b"\x1f\x8b", b"garbage", gzip.compress(b"")]
    for trailer in trailers:
        body = gzip.compress(SOME) + trailer
        assert (await post(address, body, SCHEMA_4, ("Content-Encoding", named))).status == 202
    assert acceptor.bodies == [SOME] * len(trailers)


async def test_compressed_in_pieces(address, acceptor):
    """Chunks may end anywhere, even in a gzip header; several streams make one body."""
    body = gzip.compress(SOME[:9]) + gzip.compress(b"") + gzip.compress(SOME[9:]) + b"\x1f?"
    for size in (1, 2, 3, 7, 10, 11, 1000):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        reply = await raw(address, "POST", "/bulk", [SDK, GZIP, SCHEMA_4], chunked)
        assert reply.status == 202
    assert acceptor.bodies == [SOME] * 7


async def test_large_bodies_arrive_whole(address, acceptor):
    """Large bodies arrive whole, whether they compress well or not."""
    for text in (b" " * 3_000_000, b"".join(b"%d," % (n * 7919) for n in range(200_000))):
        body = b"[" + text + b"1]"
        for sent in (body, gzip.compress(body, 1), gzip.compress(body, 0)):
            headers = [SCHEMA_4] if sent is body else [SCHEMA_4, GZIP]
            assert (await post(address, sent, *headers)).status == 202
            assert acceptor.payloads.pop().body == body


@pytest.mark.parametrize("cut", [11, 20, -9, -8, -1])
async def test_cut_or_corrupt(address, acceptor, cut):
    """Incomplete streams and wrong checksums are refused, even in the second of two streams."""
    whole = gzip.compress(SOME)
    wrong = whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:]
    for body in (whole[:cut], wrong, whole + wrong, whole + whole[:cut]):
        reply = await post(address, body, SCHEMA_4, GZIP)
        assert (reply.status, reply.body) == (400, UNREADABLE)
    assert acceptor.payloads == []


async def test_a_bomb_costs_little(front):
    """A gigabyte compressed to a megabyte is inflated up to the limit, no further."""
    bomb = gzip.compress(b" " * 2**20) * 1024
    async with serving(served_by(acceptor := RecordingAcceptor(), 2**20), front=front) as address:
        tracemalloc.start()
        try:
            reply = await post(address, bomb, GZIP, SCHEMA_4)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (reply.status, reply.body) == (400, UNREADABLE)
        assert peak < 2**23
    assert acceptor.payloads == []


async def test_a_bomb_of_nothing(front):
    """Streams without content are bounded by their compressed size."""
    nothing = gzip.compress(b"") * 10_000
    async with serving(served_by(RecordingAcceptor(), 1000), front=front) as address:
        reply = await post(address, nothing, GZIP, SCHEMA_4)
        assert (reply.status, reply.body) == (400, UNREADABLE)


async def test_the_bound_without_a_limit(address, acceptor):
    """Without a configured limit the default applies."""
    for more, status in ((0, 202), (1, 400)):
        body = b"[" + b" " * (MAX_SIZE - 3) + b"1]" + b" " * more
        assert (await post(address, gzip.compress(body, 1), SCHEMA_4, GZIP)).status == status
    assert [len(body) for body in acceptor.bodies] == [MAX_SIZE]


async def test_the_memory_of_all_bodies_is_bounded(acceptor, front):
    """Bodies that are received or stored share a budget, which is returned afterwards."""
    served = served_by(acceptor)
    served.events.budget = MemoryBudget(1000, 1500)
    acceptor.safe.clear()
    async with serving(served, front=front) as address:
        body = b"[" + b" " * 898 + b"1]"
        first = asyncio.create_task(post(address, body, SCHEMA_4))
        await until(lambda: acceptor.payloads)
        refused = await post(address, body, SCHEMA_4)
        assert (refused.status, refused.headers["content-type"]) == (503, "application/json")
        acceptor.safe.set()
        assert (await first).status == 202
        for _ in range(3):
            assert (await post(address, body, SCHEMA_4)).status == 202
        assert (await post(address, b" " * 1001, SCHEMA_4)).status == 400
        assert served.events.budget._left == 1500


async def test_a_client_that_leaves(address, acceptor, caplog):
    """An incomplete upload is dropped without an error or leftovers."""
    reader, writer = await address.connect()
    head = f"POST /bulk HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nContent-Length: 100\r\n\r\n"
    writer.write(head.encode() + SOME)
    await writer.drain()
    assert (await post(address, SOME, SCHEMA_4)).status == 202
    writer.close()
    assert await reader.read() == b""
    assert (await post(address, SOME, SCHEMA_4)).status == 202
    assert len(acceptor.payloads) == 2
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(("size", "closes"), [(2000, False), (MAX_DISCARDED * 2, True)])
async def test_refused_bodies(size, closes, front):
    """A small rest of a refused body is read to keep the connection; a large one closes it."""
    async with serving(served_by(RecordingAcceptor(), 1000), front=front) as address:
        reader, writer = await address.connect()
        head = f"POST /bulk HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nContent-Length: {size}\r\n\r\n"
        writer.write(head.encode())
        writer.write(b" " * min(size, MAX_DISCARDED + 70_000))
        async with asyncio.timeout(5):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert (b"connection: close" in answer) == closes
            assert await reader.readexactly(len(UNREADABLE)) == UNREADABLE
            if closes:
                assert await reader.read() == b""
            else:
                writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_slow_bodies(acceptor):
    """The timeout for request heads does not apply to bodies."""
    limits = ConnectionLimits(head_timeout=0.1)
    async with serving(served_by(acceptor), limits=limits) as address:
        reader, writer = await address.connect()
        head = f"POST /bulk HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nContent-Length: {len(SOME)}\r\nX-LaunchDarkly-Event-Schema: 4\r\n\r\n"
        writer.write(head.encode())
        await writer.drain()
        await asyncio.sleep(0.1)  # so that the rest arrives separately
        writer.write(SOME[:9])
        await asyncio.sleep(0.4)  # longer than the timeout and the interval of its checks
        writer.write(SOME[9:])
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
        writer.close()
    assert acceptor.bodies == [SOME]


async def test_a_client_that_asks_first(address, acceptor):
    """`Expect: 100-continue` is answered before the body arrives."""
    reader, writer = await address.connect()
    head = f"POST /bulk HTTP/1.1\r\nHost: x\r\nAuthorization: {KEY}\r\nContent-Length: {len(SOME)}\r\nX-LaunchDarkly-Event-Schema: 4\r\nExpect: 100-continue\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        writer.write(SOME)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 202 ")
    writer.close()
    assert acceptor.bodies == [SOME]


# Images.

TEXT = '[{"kind":"custom","key":"ÿ~~>>??","x":1}]'


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize(("padded", "escaped"), [(True, True), (True, False), (False, False)])
async def test_images(address, acceptor, encode, padded, escaped):
    """Both alphabets, padded or not, `+` escaped or not (row 5)."""
    headers = [("X-LaunchDarkly-Tags", "t"), ("X-LaunchDarkly-Payload-ID", "p"), SCHEMA_4]
    for text in (TEXT, TEXT + " ", TEXT + "  "):
        data = encode(text.encode()).decode()
        data = data if padded else data.rstrip("=")
        data = data.replace("+", "%2B").replace("/", "%2F") if escaped else data
        reply = await ask(address, f"/a/{ID}.gif?x=1&d={data}", headers)
        assert (reply.status, reply.headers["content-type"], reply.body) == (200, "image/gif", GIF)
        got = acceptor.payloads.pop()
        assert got == EventPayload(
            Partition("main", EventsEndpoint.CLIENT_SIDE, 3), "", text.encode(), got.received
        )


async def test_images_without_events(address, acceptor):
    """The image is served whatever its URL contains."""
    for data in ("", "?d", "?d=", "?d=!!!", "?d=%00", "?d=W", "?d=e30=", "?d=W10=", "?d=%C3%A4"):
        reply = await ask(address, f"/a/{ID}.gif{data}")
        assert (reply.status, reply.body) == (200, GIF)
    assert acceptor.payloads == []


async def test_asking_about_an_image_is_not_loading_it(address, acceptor):
    """Events in the URL of a HEAD or a preflight are ignored."""
    for method in ("HEAD", "OPTIONS"):
        data = base64.b64encode(SOME).decode()
        reply = await ask(address, f"/a/{ID}.gif?d={data}", method=method)
        assert reply.status == 200
    assert acceptor.payloads == []


async def test_without_events(front):
    """All routes say that events are disabled; invalid gzip is refused first, as by ld-relay."""
    async with serving(served_by(None), front=front) as address:
        for path, _, credential in LAYOUT:
            reply = await ask(address, path, [credential], method="POST", body=SOME)
            assert (reply.status, reply.headers["content-type"]) == (503, "application/json")
            reply = await ask(address, path, [credential, GZIP], method="POST", body=SOME)
            assert (reply.status, reply.body) == (400, b"gzip: invalid header\n")
        assert (await ask(address, f"/a/{ID}.gif?d=W10=")).status == 503
        assert (await ask(address, f"/a/{ID}.gif", method="OPTIONS")).status == 200


async def test_an_unexpected_error(caplog, front):
    """The response is an empty 500, logged once; SDKs retry after it."""

    class Broken(RecordingAcceptor):
        def accept(self, payload: EventPayload) -> asyncio.Future[bool]:
            raise RuntimeError("unexpected")

    served = served_by(Broken())
    async with serving(served, front=front) as address:
        for path, _, credential in (LAYOUT[0], LAYOUT[4]):
            caplog.clear()
            reply = await ask(address, path, [credential, SCHEMA_4], method="POST", body=SOME)
            assert (reply.status, reply.body) == (500, b"")
            assert len([record for record in caplog.records if record.exc_info]) == 1
    assert served.events.budget._left == MemoryBudget()._left


# On the fast path only.


async def unreachable_app(scope, receive, send):
    """Fails instead of serving, where the application must not be reached."""
    raise AssertionError(scope["path"])


def request_of(path, credential, *headers, body=SOME):
    """Return the bytes of a POST."""
    own_headers = [credential, SCHEMA_4, *headers, ("Content-Length", str(len(body)))]
    lines = [f"POST {path} HTTP/1.1", "Host: x", *(f"{n}: {v}" for n, v in own_headers), "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize(("path", "endpoint", "credential"), LAYOUT)
@pytest.mark.parametrize("compressed", [True, False])
async def test_plain_payloads_need_no_application(acceptor, path, endpoint, credential, compressed):
    """The fast path serves every endpoint, compressed or in a chunk, as the application does."""
    body = gzip.compress(SOME) if compressed else SOME
    headers = [credential, SCHEMA_4, ("Origin", "https://app.example"), *([GZIP] * compressed)]
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    served = served_by(acceptor)
    async with serving(served, app=unreachable_app) as address:
        whole = await ask(address, path, headers, method="POST", body=body)
        assert await raw(address, "POST", path, headers, chunked) == whole
    assert [(p.partition.endpoint, p.body) for p in acceptor.payloads] == [(endpoint, SOME)] * 2
    async with serving(served_by(acceptor), front=False) as address:
        assert await ask(address, path, headers, method="POST", body=body) == whole
    assert sum(count.value for count in served.traffic.requests.values()) == 2


def chunks(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


@pytest.mark.parametrize(
    "chunked",
    [
        chunks(SOME),
        chunks(SOME[:5], SOME[5:]),
        chunks(SOME, end=b"0\r\nTrailer: x\r\n\r\n"),
        chunks(SOME, end=b"0;extension\r\n\r\n"),
        b"2;x\r\n[{\r\n" + chunks(SOME[2:]),
        b"0000%x\r\n%b\r\n0\r\n\r\n" % (len(SOME), SOME),
    ],
    ids=["one", "two", "trailer", "extension", "size with extension", "zeros"],
)
async def test_chunks_may_come_in_any_pieces(acceptor, chunked):
    """Wherever the network cuts them; after known heads as after new ones."""
    head = request_of("/bulk", SDK).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    async with serving(served_by(acceptor)) as address:
        for cut in range(0, len(chunked), 3):
            acceptor.payloads.clear()
            reader, writer = await address.connect()
            for piece in (head + chunked[:cut], chunked[cut : cut + 2], chunked[cut + 2 :]):
                writer.write(piece)
                await asyncio.sleep(0.001)  # so that the pieces arrive apart
            (status,), _ = await statuses(reader, 1)
            assert status == 202
            writer.close()
            assert acceptor.bodies == [SOME]


async def test_an_invalid_chunk_is_refused(acceptor):
    """As the application does, and the connection ends."""
    head = request_of("/bulk", SDK).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    async with serving(served_by(acceptor)) as address:
        reader, writer = await address.connect()
        writer.write(head + b"x" + chunks(SOME))
        (status,), _ = await statuses(reader, 1)
        assert status == 400
        await reader.read()
        writer.close()
        assert acceptor.bodies == []


async def test_pipelined_posts_are_answered_in_order(acceptor):
    """A request waits for those before it on its connection, whether it is a POST or not."""
    acceptor.safe.clear()
    async with serving(served_by(acceptor)) as address:
        reader, writer = await address.connect()
        one = request_of("/bulk", SDK)
        writer.write(one + one + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + one)
        await until(lambda: acceptor.payloads)
        assert len(acceptor.payloads) == 1
        acceptor.safe.set()
        async with asyncio.timeout(5):
            for status in (b"202", b"202", b"200", b"202"):
                assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == status
                if status == b"200":
                    await reader.readexactly(len((await ask(address, "/livez")).body))
        writer.write(one)
        assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"202"
        writer.close()
    assert len(acceptor.payloads) == 4


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("complete", [True, False])
async def test_a_client_that_leaves_frees_its_memory(acceptor, complete, known):
    """Memory is freed during an upload and after it; a complete payload is stored all the same."""
    served = served_by(acceptor)
    whole = served.events.budget._left
    async with serving(served) as address:
        reader, writer = await address.connect()
        if known:  # the head, from an earlier request
            writer.write(request_of("/bulk", SDK))
            await statuses(reader, 1)
            acceptor.payloads.clear()
        acceptor.safe.clear()
        writer.write(request_of("/bulk", SDK)[: None if complete else -5])
        await until(lambda: served.events.budget._left < whole)
        writer.close()
        await until(lambda: served.events.budget._left == whole)
        acceptor.safe.set()
        assert (await post(address, SOME, SCHEMA_4)).status == 202
        assert served.events.budget._left == whole
    assert len(acceptor.payloads) == 1 + complete


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("complete", [True, False])
async def test_an_upload_in_progress_at_shutdown_is_answered(acceptor, complete, known):
    """A shutdown waits for it, and its connection is closed after the response."""
    served = served_by(acceptor)
    whole = served.events.budget._left
    async with serving(served) as address:
        reader, writer = await address.connect()
        if known:
            writer.write(request_of("/bulk", SDK))
            await statuses(reader, 1)
        acceptor.safe.clear()
        sent = request_of("/bulk", SDK)
        writer.write(sent[: None if complete else -5])
        await until(lambda: served.events.budget._left < whole)
        loop = asyncio.get_running_loop()
        if not complete:
            loop.call_later(0.1, writer.write, sent[-5:])
        loop.call_later(0.2, acceptor.safe.set)
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 202 ")
        assert b"connection: close" in head
        assert await reader.read() == b""
    writer.close()


# Known heads.


def with_id(number, path="/bulk", credential=SDK, *headers, body=SOME):
    """Return the bytes of a POST with a payload ID."""
    own = ("X-LaunchDarkly-Payload-ID", f"id-{number}")
    return request_of(path, credential, *headers, own, body=body)


async def statuses(reader, number):
    """Read a number of responses without bodies; return their status codes and heads."""
    async with asyncio.timeout(5):
        heads = [await reader.readuntil(b"\r\n\r\n") for _ in range(number)]
    return [int(head.split()[1]) for head in heads], heads


def in_one_chunk(request):
    """Return the same POST with a body of one chunk, as Node sends it."""
    head, _, body = request.partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    return b"%b\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (head, len(body), body)


async def send_whole(writer, request):
    writer.write(request)


async def send_head_first(writer, request):
    """Send the head before the body, as Python's HTTP client does."""
    head, end, body = request.partition(b"\r\n\r\n")
    for piece in (head + end, body[:3], body[3:]):
        writer.write(piece)
        await asyncio.sleep(0.01)


async def send_in_one_chunk(writer, request):
    writer.write(in_one_chunk(request))


@pytest.mark.parametrize("layout", LAYOUT)
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("sent", [send_whole, send_head_first, send_in_one_chunk])
async def test_a_head_is_parsed_once(acceptor, monkeypatch, layout, compressed, sent):
    """Later POSTs of any instance reuse the parsed head; ID, length and body are their own."""
    path, endpoint, credential = layout
    parsed = []
    monkeypatch.setattr(
        protocol, "read_head", lambda relay, raw: parsed.append(raw) or read_head(relay, raw)
    )
    bodies = [b'[{"kind":"custom","n":%d}]' % 10**n for n in range(12)]
    headers = [("Origin", "https://app.example"), *([GZIP] * compressed)]
    served = served_by(acceptor)
    async with serving(served, app=unreachable_app) as address:
        heads = []
        for number, body in enumerate(bodies):
            if number % 4 == 0:
                reader, writer = await address.connect()
                instance = ("X-LaunchDarkly-Instance-Id", f"5f252577-{number}")
            whole = gzip.compress(body) if compressed else body
            request = with_id(number, path, credential, *headers, instance, body=whole)
            await sent(writer, request)
            (status,), (head,) = await statuses(reader, 1)
            assert status == 202
            heads.append(re.sub(rb"date: [^\r]*", b"", head))
            if number % 4 == 3:
                writer.close()
    assert len(parsed) == 1
    assert len(set(heads)) == 1, "later responses are those of the first"
    assert acceptor.bodies == bodies
    assert [p.payload_id for p in acceptor.payloads] == [f"id-{n}" for n in range(len(bodies))]
    assert {p.partition for p in acceptor.payloads} == {acceptor.payloads[0].partition}
    assert acceptor.payloads[0].partition.endpoint is endpoint
    assert sum(count.value for count in served.traffic.requests.values()) == len(bodies)


async def test_known_heads_with_unusual_bodies(address, acceptor):
    """Split, multiple and invalid chunks are handled as after an unknown head."""
    head, _, body = in_one_chunk(with_id(1)).partition(b"\r\n\r\n")
    size = b"%x\r\n" % len(SOME)
    half = len(SOME) // 2
    halves = (SOME[:half], SOME[half:])
    two = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in halves) + b"0\r\n\r\n"
    bodies = [
        *((body, 202), (body, 202), (two, 202), (body.replace(size, size.upper()), 202)),
        (body.replace(b"\r\n", b";x=y\r\n", 1), 202),
        (body.replace(size, b"0x" + size, 1), 400),
        (body.replace(size, b"-" + size, 1), 400),
        (body.replace(size, b"%x\r\n" % (len(SOME) - 1), 1), 400),
    ]
    for sent, expected in bodies:
        for pieces in ([head + b"\r\n\r\n" + sent], [head + b"\r\n\r\n", sent[:9], sent[9:]]):
            acceptor.payloads.clear()
            reader, writer = await address.connect()
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
            assert (await statuses(reader, 1))[0] == [expected], (pieces, sent)
            assert acceptor.bodies == ([SOME] if expected == 202 else []), sent
            writer.close()


async def test_a_request_that_differs_from_the_last_is_read_anew(address, acceptor):
    """Other headers, bodies and pieces after a known head are handled as without it."""
    chunked = b"".join(
        (
            *(b"POST /bulk HTTP/1.1\r\nHost: x\r\nAuthorization: ", KEY.encode()),
            *(
                b"\r\nX-LaunchDarkly-Event-Schema: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"%x\r\n",
            ),
            *(SOME, b"\r\n0\r\n\r\n"),
        )
    )
    chunked = chunked.replace(b"%x", b"%x" % len(SOME))
    known = with_id(1)
    requests = [
        *((known, 202, PARTITION_4, "id-1"), (with_id(2), 202, PARTITION_4, "id-2")),
        (with_id(3, "/bulk", SDK, ("X-LaunchDarkly-Tags", "a/b")), 202, TAGGED, "id-3"),
        (with_id(4), 202, PARTITION_4, "id-4"),
        (known.replace(b"Schema: 4", b"Schema: 3"), 202, PARTITION_4._replace(schema=3), "id-1"),
        (known.replace(b"id-1", b"two words"), 202, PARTITION_4, ""),
        (known.replace(b"id-1", b""), 202, PARTITION_4, ""),
        (known.replace(b"id-1", b"i" * 100), 202, PARTITION_4, "i" * 100),
        (known.replace(b"id-1", b"i" * 101), 202, PARTITION_4, ""),
        (known.replace(b"Length: ", b"Length: 00"), 202, PARTITION_4, "id-1"),
        (chunked, 202, PARTITION_4, ""),
        (with_id(5, body=b"no array"), 202, None, ""),
        (with_id(6, body=b" [ ] "), 202, None, ""),
        (with_id(7, "/diagnostic", body=b"hello"), 202, DIAGNOSTIC, "id-7"),
        (with_id(8, "/mobile", ("Authorization", MOBILE_KEY)), 202, MOBILE_4, "id-8"),
        (with_id(9), 202, PARTITION_4, "id-9"),
    ]
    reader, writer = await address.connect()
    for sent, expected, partition, payload_id in requests:
        acceptor.payloads.clear()
        half = len(sent) // 2
        for pieces in ([sent], [sent[:half], sent[half:]]):
            acceptor.payloads.clear()
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.01)
            assert (await statuses(reader, 1))[0] == [expected]
            got = [(p.partition, p.payload_id) for p in acceptor.payloads]
            assert got == ([] if partition is None else [(partition, payload_id)]), sent
    acceptor.payloads.clear()
    writer.write(with_id(10) + with_id(11) + with_id(12)[:-3])
    await statuses(reader, 2)
    writer.write(with_id(12)[-3:])
    await statuses(reader, 1)
    assert [p.payload_id for p in acceptor.payloads] == ["id-10", "id-11", "id-12"]
    acceptor.full = True
    writer.write(with_id(13))
    assert (await statuses(reader, 1))[0] == [503]
    writer.close()


async def test_a_known_head_follows_changes_of_its_key(acceptor):
    """A key that is moved to another environment or revoked takes effect with the next POST."""
    served = served_by(acceptor)
    relay = served.relay
    async with serving(served) as address:
        reader, writer = await address.connect()
        for number in range(2):
            writer.write(with_id(number))
            (status,), (head,) = await statuses(reader, 1)
            assert status == 202
            assert f"x-ld-envid: {ID}".encode() in head
        main, other = relay.environments["main"], relay.environments["e2"]
        specs = main.spec, other.spec
        relay.change(other, replace(other.spec, sdk_key=SDKKey(KEY)))
        for number in range(2, 4):
            writer.write(with_id(number))
            _, (head,) = await statuses(reader, 1)
            assert other.spec.environment_id.value.encode() in head
        relay.change(other, replace(other.spec, environment_id=EnvironmentID("renamed")))
        writer.write(with_id(4))
        assert b"x-ld-envid: renamed" in (await statuses(reader, 1))[1][0]
        relay.change(other, specs[1])
        writer.write(with_id(5))
        reply, _ = await statuses(reader, 1)
        assert reply == [401]
        writer.close()
        relay.change(main, replace(specs[0], project_key="new"))
        assert (await post(address, SOME, SCHEMA_4)).status == 202
    assert [p.partition.environment for p in acceptor.payloads] == ["main"] * 2 + ["e2"] * 3 + [
        "main"
    ]


async def test_a_head_is_not_remembered_after_its_key_was_revoked(acceptor):
    """A POST that began before is accepted, and none after it."""
    served = served_by(acceptor)
    relay = served.relay
    main = relay.environments["main"]
    relay.change(main, main.spec.with_credential(SDKKey("sdk-second")))
    async with serving(served) as address:
        reader, writer = await address.connect()
        sent = with_id(1, "/bulk", ("Authorization", "sdk-second"))
        budget = repr(served.events.budget)
        writer.write(sent[:-5])
        await until(lambda: repr(served.events.budget) != budget)  # the beginning has arrived
        relay.change(main, main.spec.without_credential(SDKKey("sdk-second")))
        writer.write(sent[-5:])
        assert (await statuses(reader, 1))[0] == [202]
        writer.write(sent)
        assert (await statuses(reader, 1))[0] == [401]
        writer.close()
    assert acceptor.bodies == [SOME]


@pytest.mark.parametrize("seed", range(20))
async def test_pieces_of_any_size(acceptor, seed):
    """POSTs with known and unknown heads, cut anywhere, arrive whole, once and in order."""
    chance = random.Random(seed)
    lengths = [chance.choice((1, 100, 10_000)) for _ in range(8)]
    bodies = [b'[{"n":"%s"}]' % (b"x" * length) for length in lengths]
    async with serving(served_by(acceptor)) as address:
        reader, writer = await address.connect()
        for number, body in enumerate(bodies):
            tags = [("X-LaunchDarkly-Tags", "a/b")] * (chance.random() < 0.3)
            sent = with_id(number, "/bulk", SDK, *tags, body=body)
            cuts = sorted(chance.choices(range(len(sent)), k=chance.randrange(4)))
            for start, stop in pairwise([0, *cuts, len(sent)]):
                writer.write(sent[start:stop])
                await asyncio.sleep(0.002)
            if chance.random() < 0.7:  # otherwise the next one follows at once
                await until(lambda number=number: len(acceptor.payloads) == number + 1)
        assert (await statuses(reader, len(bodies)))[0] == [202] * len(bodies)
        writer.close()
    assert acceptor.bodies == bodies
    assert [p.payload_id for p in acceptor.payloads] == [f"id-{n}" for n in range(len(bodies))]


async def test_a_known_head_does_not_exceed_the_memory_budget(acceptor):
    """A known head does not exempt a POST in pieces from the budget."""
    served = served_by(acceptor)
    served.events.budget = MemoryBudget(1000, 500)
    async with serving(served) as address:
        reader, writer = await address.connect()
        for _ in range(2):
            writer.write(with_id(1))
            assert (await statuses(reader, 1))[0] == [202]
        sent = with_id(2, body=b"[" + b" " * 700 + b"1]")
        writer.write(sent[:-600])
        await until(lambda: served.events.budget._left < 500)
        writer.write(sent[-600:])
        assert (await statuses(reader, 1))[0] == [503]
        await until(lambda: served.events.budget._left == 500)
        writer.close()
    assert acceptor.bodies == [SOME] * 2


async def test_heads_remembered_by_a_connection_are_bounded(acceptor, monkeypatch):
    """A client with ever new heads does not evict those of other connections."""
    monkeypatch.setattr("relay.web.fastpath.protocol.MAX_HEADS_REMEMBERED", 3)
    served = served_by(acceptor)
    async with serving(served, app=unreachable_app) as address:
        reader, writer = await address.connect()
        for number in range(9):
            writer.write(with_id(1, "/bulk", SDK, ("Traceparent", f"{number}")))
            assert (await statuses(reader, 1))[0] == [202]
        writer.close()
    assert len(served.fast_path.events.heads) == 3


async def test_a_known_head_does_not_make_a_large_body_plain(acceptor):
    """Large bodies go to the application even after a known head."""
    served = served_by(acceptor)
    async with serving(served, app=unreachable_app) as address:
        reader, writer = await address.connect()
        writer.write(with_id(1))
        await statuses(reader, 1)
        writer.close()
    head = with_id(2).removesuffix(SOME)
    _, payload_id, length = served.fast_path.events.find_head(head)
    assert (payload_id, length) == ("id-2", len(SOME))
    for size, plain in ((PLAIN_SIZE, True), (PLAIN_SIZE + 1, False), (10**30, False)):
        longer = head.replace(b"Length: %d" % len(SOME), b"Length: %d" % size)
        assert (served.fast_path.events.find_head(longer) is not None) == plain


async def test_connections_share_known_heads(acceptor, monkeypatch):
    """Known heads are shared by connections, up to a bound."""
    monkeypatch.setattr("relay.web.fastpath.events.MAX_HEADS", 10_000)
    served = served_by(acceptor)
    async with serving(served, app=unreachable_app) as address:
        for _ in range(3):
            reader, writer = await address.connect()
            for number in range(2):
                writer.write(with_id(number))
                assert (await statuses(reader, 1))[0] == [202]
            writer.close()
        assert len(served.fast_path.events.heads) == 1
        for tag in range(9):
            await post(address, SOME, SCHEMA_4, ("X-LaunchDarkly-Tags", f"tag/{tag}"))
            assert len(served.fast_path.events.heads) <= 2
    assert len(acceptor.payloads) == 15


def test_a_debugger_shows_whether_events_are_enabled(acceptor):
    """The handler states whether it accepts events, and how many were unusable."""
    handler = EventsHandler(acceptor, unusable=Counter(main=2))
    assert repr(handler) == "<EventsHandler: <EventIntake [enabled, 2 unusable]>>"
    assert repr(EventsHandler()) == "<EventsHandler: <EventIntake [disabled, 0 unusable]>>"
