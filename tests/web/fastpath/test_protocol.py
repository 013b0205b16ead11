"""The front door answers what is plainly hot, passes on what is not, and bears hostile clients."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from email.utils import parsedate_to_datetime

import pytest
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from relay.protocol import fdv1
from relay.streams.hub import StreamLimits
from relay.web.fastpath import scheduler
from relay.web.fastpath.protocol import USED_OF_UVICORN
from relay.web.fastpath.shared import ConnectionLimits
from relay.web.responses import PreparedResponse
from tests.support.serving import SDK_KEY, Served, Stream, serving, stalled_socket, until

POLL = f"GET /sdk/flags HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n".encode()


async def application(scope, receive, send):
    """Tells that the application was asked, and with what body."""
    await Response(b"app:" + await Request(scope, receive).body())(scope, receive, send)


class Polls:
    """Answers `/sdk/flags` and counts how often it had to."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, environment, path, if_none_match, accept_encoding):
        if path != "/sdk/flags" or environment.payload is None:
            return None
        self.asked += 1
        body = fdv1.all_flags(environment.payload)
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


def test_uvicorn_has_what_we_use():
    """A new uvicorn that lacks an attribute which we rely on is noticed here."""

    async def app(scope, receive, send): ...

    async def look() -> list[str]:
        config = Config(app, lifespan="off", ws="none", log_config=None)
        protocol = HttpToolsProtocol(config, ServerState(), {})
        protocol.on_message_begin()
        return [name for name in USED_OF_UVICORN if not hasattr(protocol, name)]

    assert asyncio.run(look()) == []


async def test_a_poll_is_prepared_once_for_each_change():
    """The same request is answered from memory until the payload changes."""
    served, polls = Served(), Polls()
    async with serving(served, poll=polls) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        for _ in range(3):
            writer.write(POLL)
            head, body = await answer(reader)
            assert json.loads(body)["a"]["version"] == 1
            assert b"\r\ndate: " in head
        assert polls.asked == 1
        await give(served, 2)
        writer.write(POLL)
        assert json.loads((await answer(reader))[1])["a"]["version"] == 2
        assert polls.asked == 2
        writer.close()


@pytest.mark.parametrize("path", [b"/sdk/flags", b"/all", b"/whatever"])
async def test_after_a_silence_the_date_is_that_of_the_answer(path):
    """Polls, streams and the application's answers: none tells when somebody was here last."""
    async with serving(Served()) as address:
        for _ in range(2):
            begin = int(time.time())
            reader, writer = await address.connect()
            writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nAuthorization: " % path)
            writer.write(SDK_KEY.encode() + b"\r\n\r\n")
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            writer.close()
            await writer.wait_closed()
            date = head.partition("\r\ndate: ")[2].partition("\r\n")[0]
            said = parsedate_to_datetime(date).timestamp()
            assert begin <= said <= time.time()
            await until(lambda said=said: time.time() >= said + 2)


@pytest.mark.parametrize("name", [b"X-LaunchDarkly-Instance-Id", b"x-launchdarkly-instance-id"])
async def test_instances_of_a_function_share_what_was_prepared(name):
    """What tells them apart is left out of account: each new one gets its flags at once."""
    served, polls = Served(), Polls()
    async with serving(served, poll=polls) as address:
        await give(served, 1)
        for number in range(3):
            reader, writer = await address.connect()
            tail = b"\r\n%b: 5f252577-%d\r\nAccept: x\r\n\r\n" % (name, number)
            writer.write(POLL.removesuffix(b"\r\n\r\n") + tail)
            _, body = await answer(reader)
            assert json.loads(body)["a"]["version"] == 1
            writer.close()
        assert polls.asked == 1
        reader, writer = await address.connect()
        writer.write(POLL.removesuffix(b"\r\n\r\n") + tail.replace(b"Accept: x", b"Accept: y"))
        await answer(reader)
        assert polls.asked == 2
        writer.close()


async def test_streams_of_a_kind_are_prepared_once():
    """Each is a stream of its own, of the environment whose key it has, and counted."""
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


async def test_a_client_that_wants_the_connection_to_end_is_not_sent_elsewhere():
    """Its poll is prepared like any other; it is told, and the connection ends with the answer."""
    served, polls = Served(), Polls()
    async with serving(served, poll=polls, app=application) as address:
        await give(served, 1)
        for _ in range(2):
            reader, writer = await address.connect()
            writer.write(POLL.replace(b"Host: x", b"Host: x\r\nConnection: close"))
            head, body = await answer(reader)
            assert b"\r\nconnection: close\r\n" in head
            assert json.loads(body)["a"]["version"] == 1
            assert await reader.read() == b""
            writer.close()
        assert polls.asked == 1


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
async def test_what_is_not_plain_goes_to_the_application(request_):
    """Bodies, repeated headers, unknown keys and paths are the application's business."""
    served = Served()
    async with serving(served, poll=Polls(), app=application) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        writer.write(request_)
        assert (await answer(reader))[1] == b"app:"
        writer.close()


async def test_a_request_in_pieces_is_answered():
    """The borders of packets do not matter."""
    served = Served()
    async with serving(served, poll=Polls()) as address:
        await give(served, 1)
        reader, writer = await address.connect()
        for at in range(0, len(POLL), 7):
            writer.write(POLL[at : at + 7])
            await writer.drain()
            await asyncio.sleep(0)
        assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
        writer.close()


async def test_pipelined_requests_are_answered_in_order():
    """Requests that come together get their answers in their order, hot or not."""
    served = Served()
    other = POLL.replace(b"/sdk/flags", b"/other")
    async with serving(served, poll=Polls(), app=application) as address:
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
    """What two servers could read differently is a 400 and the end of the connection."""
    served = Served()
    async with serving(served, poll=Polls()) as address:
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
    """Beyond the limit a request head is refused, in one piece or in many."""
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
    """A head that does not become complete in time ends the connection; others are served."""
    served = Served()
    async with serving(served, poll=Polls(), limits=ConnectionLimits(head_timeout=0.5)) as address:
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


async def test_a_resting_connection_is_closed():
    """A connection without requests is closed after the keep-alive time, without an answer."""
    served = Served()
    async with serving(served, poll=Polls(), limits=ConnectionLimits(keep_alive=0.5)) as address:
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
    """A relay that evaluates one context in each turn of the loop, and those that it has had."""
    monkeypatch.setattr(scheduler, "MAX_SLICE", 0)
    served, asked = Served(), []
    find = served.evaluation.find

    def slowly(environment, audience, segment, query):
        time.sleep(0.002)
        asked.append(segment)
        return find(environment, audience, segment, query)

    monkeypatch.setattr(served.evaluation, "find", slowly)
    return served, asked


def question(number: int) -> bytes:
    context = base64.urlsafe_b64encode(b'{"kind":"user","key":"%d"}' % number).rstrip(b"=")
    return b"GET /sdk/evalx/env-1/contexts/%b HTTP/1.1\r\nHost: x\r\n\r\n" % context


async def test_a_poll_need_not_wait_for_all_contexts(slow):
    """Contexts that ask at the same time are evaluated in turns, in the order of their coming."""
    served, asked = slow
    async with serving(served) as address:
        await give(served, 1)
        pollster, poll = await address.connect()
        clients = [await address.connect() for _ in range(20)]
        for number, (_, writer) in enumerate(clients):
            writer.write(question(number))
        poll.write(POLL)
        await answer(pollster)
        assert len(asked) < 15
        for reader, writer in clients:
            assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
            writer.close()
        assert len(set(asked)) == 20
        poll.close()


async def test_what_comes_while_a_context_waits_is_answered_after_it(slow):
    """Requests on the same connection keep their order, whatever they are."""
    served, asked = slow
    async with serving(served) as address:
        await give(served, 1)
        clients = [await address.connect() for _ in range(5)]
        for number, (_, writer) in enumerate(clients):
            writer.write(question(number))
        await until(lambda: len(asked) > 0)
        for _, writer in clients:
            writer.write(POLL)
            writer.write(question(100) + question(101))
        for reader, writer in clients:
            heads = [(await answer(reader))[0] for _ in range(4)]
            assert [b"etag: relay-" in head for head in heads] == [False, True, False, False]
            writer.close()


async def test_a_context_that_waits_is_answered_before_the_end(slow):
    """A relay that stops answers all that it has read."""
    served, asked = slow
    async with serving(served) as address:
        await give(served, 1)
        clients = [await address.connect() for _ in range(20)]
        for number, (_, writer) in enumerate(clients):
            writer.write(question(number))
        await until(lambda: len(asked) > 0)
        clients.pop()[1].transport.abort()
    for reader, writer in clients:
        assert (await answer(reader))[0].startswith(b"HTTP/1.1 200")
        writer.close()
