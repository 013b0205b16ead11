"""The fast path answers hot requests, passes on all others, and withstands hostile clients."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from dataclasses import replace
from email.utils import parsedate_to_datetime
from unittest.mock import Mock

import pytest
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.server import ServerState

from relay import clock
from relay.model.credential import SDKKey
from relay.model.metrics import MetricValue
from relay.model.payload import EMPTY
from relay.protocol import fdv1
from relay.registry import Grant
from relay.streams.hub import StreamLimits
from relay.web.access import Access
from relay.web.endpoints.polling import PollingHandler
from relay.web.fastpath import scheduler
from relay.web.fastpath.cache import HeadCache, WireResponse
from relay.web.fastpath.events import EventUpload
from relay.web.fastpath.protocol import protocol_factory
from relay.web.fastpath.shared import ConnectionLimits
from relay.web.responses import PreparedResponse
from relay.web.routes import ROUTES
from tests.support.clocks import SystemClock
from tests.support.serving import SDK_KEY, Served, Stream, serving, stalled_socket, until

POLL = f"GET /sdk/flags HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n".encode()


async def application(scope, receive, send):
    """Echo the body, marked as coming from the application."""
    await Response(b"app:" + await Request(scope, receive).body())(scope, receive, send)


class PollHandler(PollingHandler):
    """Handler of `/sdk/flags` that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def respond(self, access, key, if_none_match, accept_encoding):
        if access.environment.payload is None:
            return None
        self.calls += 1
        body = fdv1.all_flags(access.environment.payload)
        return PreparedResponse(200, (), body)


def put(version: int, size: int = 0) -> bytes:
    flag = {"key": "a", "version": version, "pad": "x" * size}
    return json.dumps({"path": "/", "data": {"flags": {"a": flag}}}).encode()


async def give(served: Served, version: int, size: int = 0) -> None:
    changes = fdv1.parse("put", put(version, size))
    assert changes is not None
    await served.source.give(changes)


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read one response with a Content-Length."""
    async with asyncio.timeout(5):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        return head, await reader.readexactly(length)


async def test_a_poll_is_prepared_once_for_each_change():
    """The same request is answered from the cache until the payload changes."""
    served, poll = Served(), PollHandler()
    served.use(polling=poll)
    async with serving(served) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        for _ in range(3):
            writer.write(POLL)
            head, body = await answer(reader)
            assert json.loads(body)["a"]["version"] == 1
            assert b"\r\ndate: " in head
        assert poll.calls == 1
        await give(served, 2)
        writer.write(POLL)
        assert json.loads((await answer(reader))[1])["a"]["version"] == 2
        assert poll.calls == 2
        writer.close()


@pytest.fixture
def system():
    with SystemClock() as system:
        yield system


@pytest.mark.parametrize("path", [b"/sdk/flags", b"/all", b"/whatever"])
async def test_after_a_silence_the_date_is_that_of_the_answer(path, system):
    """For polls, streams and the application's responses: none repeats that of the last request."""
    async with serving(Served()) as address:
        for silence in (0, 2):
            system.skip(silence)
            begin = int(clock.unix())
            reader, writer = await address.connect()
            writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nAuthorization: " % path)
            writer.write(SDK_KEY.encode() + b"\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            writer.close()
            await writer.wait_closed()
            date = head.partition("\r\ndate: ")[2].partition("\r\n")[0]
            date_time = parsedate_to_datetime(date).timestamp()
            assert begin <= date_time <= clock.unix()


@pytest.mark.parametrize("name", [b"X-LaunchDarkly-Instance-Id", b"x-launchdarkly-instance-id"])
async def test_instances_of_a_function_share_cached_responses(name):
    """The instance id is not part of the key: each new instance gets its flags at once."""
    served, poll = Served(), PollHandler()
    served.use(polling=poll)
    async with serving(served) as address:
        await give(served, 1)
        for number in range(3):
            reader, writer = await address.connect()
            tail = b"\r\n%b: 5f252577-%d\r\nAccept: x\r\n\r\n" % (name, number)
            writer.write(POLL.removesuffix(b"\r\n\r\n") + tail)
            _, body = await answer(reader)
            assert json.loads(body)["a"]["version"] == 1
            writer.close()
        assert poll.calls == 1
        reader, writer = await address.connect()
        writer.write(POLL.removesuffix(b"\r\n\r\n") + tail.replace(b"Accept: x", b"Accept: y"))
        await answer(reader)
        assert poll.calls == 2
        writer.close()


async def test_stream_requests_are_cached():
    """Each is a counted stream of its own, in the environment of its key."""
    served = Served()
    async with serving(served) as address:
        await give(served, 1)
        streams = [await Stream.open(address, "/flags") for _ in range(3)]
        for stream in streams:
            assert b'"version": 1' in await stream.until(b"\n\n")
        assert len(served.hub) == 3
        unknown = await Stream.open(address, "/flags", key="sdk-unknown")
        assert unknown.status == 401
        for stream in (*streams, unknown):
            stream.close()
        await until(lambda: len(served.hub) == 0)
        [opened] = [count.value for count in served.traffic.new_streams.values()]
        assert opened == 3


async def test_streams_of_one_kind_of_client_share_a_head():
    """It is made anew for another origin, and when the settings of the environment change."""
    served = Served()

    async def head(origin: str, agent: str) -> bytes:
        """The head of a client-side stream."""
        reader, writer = await address.connect()
        request = f"GET /ping/env-1 HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nUser-Agent: {agent}"
        writer.write(f"{request}\r\n\r\n".encode())
        try:
            return await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()

    async with serving(served) as address:
        await give(served, 1)
        for origin, agent in (("https://a", "A/1"), ("https://b", "A/1"), ("https://b", "B/1")) * 2:
            allowed = b"access-control-allow-origin: %b\r\n" % origin.encode()
            assert allowed in await head(origin, agent)
        opened = {each.user_agent: count for each, count in served.traffic.new_streams.items()}
        assert {agent: count.value for agent, count in opened.items()} == {"A/1": 4, "B/1": 2}
        spec = replace(served.environment.spec, allowed_origins=("https://a",))
        served.relay.change(served.environment, spec)
        assert b"access-control-allow-origin: https://a\r\n" in await head("https://b", "B/1")


async def test_polls_with_connection_close_are_cached():
    """The response has the header, and the connection is closed after it."""
    served, poll = Served(), PollHandler()
    served.use(polling=poll)
    async with serving(served, app=application) as address:
        await give(served, 1)
        for _ in range(2):
            reader, writer = await address.connect()
            writer.write(POLL.replace(b"Host: x", b"Host: x\r\nConnection: close"))
            head, body = await answer(reader)
            assert b"\r\nconnection: close\r\n" in head
            assert json.loads(body)["a"]["version"] == 1
            assert await reader.read() == b""
            writer.close()
        assert poll.calls == 1


@pytest.mark.parametrize(
    "request_",
    [
        POLL.replace(b"Host: x", b"Host: x\r\nContent-Length: 0"),
        POLL.replace(b"Host: x", b"Host: x\r\nAuthorization: other"),
        POLL.replace(b"Host: x", b"Host: x\r\nUpgrade: h2c"),
        POLL.replace(b"/sdk/flags", b"/other"),
        POLL.replace(b"sdk-", b"sdk-unknown-"),
        POLL.replace(b"GET", b"POST"),
    ],
)
async def test_unusual_requests_go_to_the_application(request_):
    """Bodies, repeated headers, unknown keys and paths are left to the application."""
    served = Served()
    served.use(polling=PollHandler())
    async with serving(served, app=application) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        writer.write(request_)
        assert (await answer(reader))[1] == b"app:"
        writer.close()


async def test_a_request_in_pieces_is_answered():
    """Packet boundaries do not matter."""
    served = Served()
    served.use(polling=PollHandler())
    async with serving(served) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        for at in range(0, len(POLL), 7):
            writer.write(POLL[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0)
        assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
        writer.close()


async def test_pipelined_requests_are_answered_in_order():
    """Pipelined requests get their responses in order, hot or not."""
    served = Served()
    other = POLL.replace(b"/sdk/flags", b"/other")
    served.use(polling=PollHandler())
    async with serving(served, app=application) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        writer.write(POLL)
        await answer(reader)
        writer.write(POLL.replace(b"/sdk/flags", b"/first"))
        writer.write(other + other)
        bodies = [(await answer(reader))[1] for _ in range(3)]
        assert bodies == [b"app:"] * 3
        writer.write(POLL)
        assert json.loads((await answer(reader))[1])
        writer.close()


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03garbage\r\n\r\n",
        b"GET /sdk/flags\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"GET / HTTP/1.1\r\nHost: x\r\nA: b\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
    ],
)
async def test_smuggling_and_garbage_are_refused(hostile):
    """Requests that two servers could read differently get a 400, and the connection is closed."""
    served = Served()
    served.use(polling=PollHandler())
    async with serving(served) as address:
        await give(served, 1)
        async with asyncio.timeout(5):
            received = await address.ask(hostile)
        assert received.split()[1] in {b"400", b"505"}
        assert b"GET /sdk/flags" not in received
        reader, writer = await address.connect()
        writer.write(POLL)
        assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize(
    ("hostile", "status"),
    [
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 9000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", b"414"),
    ],
)
async def test_a_huge_head_is_refused(hostile, status, pieces):
    """A request head beyond the limit is refused, in one piece or in many."""
    async with serving(Served(), limits=ConnectionLimits(max_head_size=8000)) as address:
        reader, writer = await address.connect()
        size = len(hostile) // pieces
        for at in range(0, len(hostile), size):
            if not writer.is_closing():
                writer.write(hostile[at : at + size])
                await asyncio.sleep(0)
        try:
            async with asyncio.timeout(5):
                assert (await reader.readline()).split()[1] == status
        except ConnectionResetError:
            assert pieces > 1, "a client that goes on writing may be reset before it reads"
        writer.close()


async def test_slowloris_is_timed_out():
    """A connection whose head is not complete in time is closed; others are served."""
    served = Served()
    served.use(polling=PollHandler())
    async with serving(served, limits=ConnectionLimits(head_timeout=0.5)) as address:
        await give(served, 1)
        slow = [await address.connect() for _ in range(50)]
        for _, writer in slow:
            writer.write(POLL[:30])
        reader, writer = await address.connect()
        writer.write(POLL)
        await answer(reader)
        writer.close()
        async with asyncio.timeout(5):
            for slow_reader, slow_writer in slow:
                assert (await slow_reader.read()).startswith(b"HTTP/1.1 408")
                slow_writer.close()


async def test_an_idle_connection_is_closed():
    """A connection without requests is closed after the keep-alive time, without a response."""
    served = Served()
    served.use(polling=PollHandler())
    async with serving(served, limits=ConnectionLimits(keep_alive=0.5)) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        writer.write(POLL)
        await answer(reader)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_stalled_streams_cost_little_and_harm_nobody():
    """Clients that never read share one opening and are dropped; others get changes."""
    served = Served(StreamLimits(stall_timeout=1))
    async with serving(served) as address:
        await give(served, 1, size=3_000_000)
        loop = asyncio.get_running_loop()
        stalled = [
            await loop.run_in_executor(None, stalled_socket, address.port) for _ in range(50)
        ]
        await until(lambda: len(served.hub) == 50)
        stream = await Stream.open(address)
        await stream.until(b"\n\n")
        await served.source.give(
            fdv1.parse("patch", b'{"path":"/flags/b","data":{"key":"b","version":1}}')
        )
        assert (await stream.chunk()).startswith(b"event: patch")
        await until(lambda: len(served.hub) == 1, 10)
        for client in stalled:
            client.close()
        stream.close()


@pytest.fixture
def slow(monkeypatch) -> tuple[Served, list[bytes]]:
    """A relay that evaluates one context in each turn of the loop, and the contexts so far."""
    monkeypatch.setattr(scheduler, "MAX_SLICE", 0)
    served, contexts = Served(), []
    evaluate = served.evaluation.evaluate

    def slow_evaluate(environment, sdk_kind, segment, query, **more):
        time.sleep(0.002)
        contexts.append(segment)
        return evaluate(environment, sdk_kind, segment, query, **more)

    monkeypatch.setattr(served.evaluation, "evaluate", slow_evaluate)
    return served, contexts


def evaluation_request(number: int) -> bytes:
    context = base64.urlsafe_b64encode(b'{"kind":"user","key":"%d"}' % number).rstrip(b"=")
    return b"GET /sdk/evalx/env-1/contexts/%b HTTP/1.1\r\nHost: x\r\n\r\n" % context


async def test_a_poll_does_not_wait_for_all_evaluations(slow):
    """Simultaneous evaluation requests are answered in slices, in the order of arrival."""
    served, contexts = slow
    async with serving(served) as address:
        await give(served, 1)
        poll_reader, poll_writer = await address.connect()
        clients = [await address.connect() for _ in range(20)]
        for number, (_, writer) in enumerate(clients):
            writer.write(evaluation_request(number))
        poll_writer.write(POLL)
        await answer(poll_reader)
        assert len(contexts) < 15
        for reader, writer in clients:
            assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
            writer.close()
        assert len(set(contexts)) == 20
        poll_writer.close()


async def test_requests_after_a_deferred_one_are_answered_after_it(slow):
    """Requests on one connection keep their order, whatever they are."""
    served, contexts = slow
    async with serving(served) as address:
        await give(served, 1)
        clients = [await address.connect() for _ in range(5)]
        for number, (_, writer) in enumerate(clients):
            writer.write(evaluation_request(number))
        await until(lambda: len(contexts) > 0)
        for _, writer in clients:
            writer.write(POLL)
            writer.write(evaluation_request(100) + evaluation_request(101))
        for reader, writer in clients:
            heads = [(await answer(reader))[0] for _ in range(4)]
            assert [b"etag: relay-" in head for head in heads] == [False, True, False, False]
            writer.close()


async def test_a_deferred_request_is_answered_before_the_end(slow):
    """A relay that stops answers all requests that it has read."""
    served, contexts = slow
    async with serving(served) as address:
        await give(served, 1)
        clients = [await address.connect() for _ in range(20)]
        for number, (_, writer) in enumerate(clients):
            writer.write(evaluation_request(number))
        await until(lambda: len(contexts) > 0)
        clients.pop()[1].transport.abort()
    for reader, writer in clients:
        assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_connection_states_its_condition():
    """The state of the request, as a debugger shows it; none of what the client has sent."""
    config = Config(application, lifespan="off", ws="none", log_config=None)
    shared = Served().site().fast_path
    loop, server_state = asyncio.get_running_loop(), ServerState()
    make_protocol = protocol_factory(shared)
    connection = make_protocol(config=config, server_state=server_state, app_state={}, _loop=loop)
    assert repr(connection) == "<FastHTTPProtocol [closed]>"
    connection.connection_made(Mock(is_closing=lambda: False))
    assert repr(connection) == "<FastHTTPProtocol [ready]>"
    connection.data_received(POLL[:40])
    assert repr(connection) == "<FastHTTPProtocol [application] <ApplicationProtocol [in head]>>"
    connection.connection_lost(None)


async def test_caches_state_their_contents():
    """Sizes and freshness, as a debugger shows them."""
    served = Served()
    cache = HeadCache(served.relay.registry)
    prepared = WireResponse(served.environment, None, b"", (b"ab",), MetricValue(), size=2)
    cache.keep(b"1", prepared)
    assert repr(prepared) == "<WireResponse [fresh, 3 bytes]>"
    assert repr(cache) == "<HeadCache [1 entries, 3 bytes]>"
    assert repr(scheduler.EvaluationScheduler()) == "<EvaluationScheduler [0 deferred]>"
    served.environment.payload = EMPTY
    assert repr(prepared) == "<WireResponse [stale, 3 bytes]>"
    access = Access(ROUTES[0], Grant(served.environment, SDKKey(SDK_KEY)))
    upload = EventUpload(access, {}, served.events.budget)
    assert repr(upload) == "<EventUpload /bulk [0 bytes reserved]>"
