"""Clients of HTTP/1.0, such as nginx is by default, and other forms of a request, at both doors."""

from __future__ import annotations

import asyncio
import json

import h11
import pytest

from relay.model.credential import MobileKey
from tests.contract.test_client_side_streams import ANNA, begin, encoded, give, visible
from tests.support import data
from tests.support.serving import SDK_KEY, Address, Served, serving

CONTEXT = json.dumps(ANNA).encode()
STREAMS = [
    pytest.param("GET /all", SDK_KEY, b"", b'event: put\ndata: {"path":"/",', id="all"),
    pytest.param("GET /flags", SDK_KEY, b"", b'event: put\ndata: {"lamp":', id="flags"),
    pytest.param("GET /mping", "mob-1", b"", b"event: ping\n", id="mping"),
    pytest.param("GET /ping/env-1", "", b"", b"event: ping\n", id="ping"),
    pytest.param(f"GET /meval/{encoded(ANNA)}", "mob-1", b"", b'event: put\ndata: {"lamp"', id="m"),
    pytest.param(f"GET /eval/env-1/{encoded(ANNA)}", "", b"", b"event: put\n", id="eval"),
    pytest.param("REPORT /meval", "mob-1", CONTEXT, b"event: put\n", id="REPORT"),
]


def request(line: str, key: str, *headers: str, body: bytes = b"", version: str = "1.0") -> bytes:
    """A request as it goes over the wire."""
    given = [*headers, *([f"Authorization: {key}"] if key else [])]
    if body:
        given += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    return "\r\n".join([f"{line} HTTP/{version}", "Host: x", *given, "", ""]).encode() + body


def judged(received: bytes, method: str = "GET") -> tuple[h11.Response, bytes, list[bytes]]:
    """Parse all that a server has sent, up to the end, with h11: head, body, `Connection`s."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(received)
    client.receive_data(b"")
    head = client.next_event()
    assert isinstance(head, h11.Response)
    body = b""
    while isinstance(event := client.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage)
    return head, body, [value for name, value in head.headers if name == b"connection"]


async def exchange(address: Address, sent: bytes) -> bytes:
    async with asyncio.timeout(5):
        return await address.ask(sent)


@pytest.mark.parametrize(("line", "key", "body", "beginning"), STREAMS)
async def test_a_stream_of_http_1_0_has_no_chunks(door, line, key, body, beginning):
    """Its bytes are the messages, as they come, and its end is that of the connection."""
    served = Served(mobile_key=MobileKey("mob-1"), eval_streams=True)
    async with serving(served, **door) as address:
        await begin(served, visible())
        reader, writer = await address.connect()
        writer.write(request(line, key, "Connection: keep-alive", body=body))
        async with asyncio.timeout(5):
            received = await reader.readuntil(b"\n\n")
            await give(served, data.patch(visible("lamp", 2, False)))
            received += await reader.readuntil(b"\n\n")
            (subscription,) = next(
                channel.subscriptions
                for channel in served.hub._channels.values()
                if channel.has_clients
            )
            subscription.end()
            received += await reader.read()
        writer.close()
    head, messages, connection = judged(received, line.split()[0])
    assert head.status_code == 200
    assert connection == [b"close"]
    assert b"transfer-encoding" not in dict(head.headers)
    assert messages.startswith(beginning)
    assert messages.endswith(b"\n\n")
    assert messages.count(b"event: ") == 2
    assert received.endswith(b"\r\n\r\n" + messages)


@pytest.mark.parametrize(("line", "key", "body", "beginning"), STREAMS)
async def test_a_stream_says_once_what_becomes_of_the_connection(door, line, key, body, beginning):
    """A client that asks it to end with the stream is told so; nginx without keep-alive does."""
    served = Served(mobile_key=MobileKey("mob-1"), eval_streams=True)
    async with serving(served, **door) as address:
        await begin(served, visible())
        for given, told in ((), b"keep-alive"), (("Connection: Close",), b"close"):
            for _ in range(2):  # the second time, the front door knows the request
                reader, writer = await address.connect()
                writer.write(request(line, key, *given, body=body, version="1.1"))
                async with asyncio.timeout(5):
                    head = await reader.readuntil(b"\r\n\r\n")
                    size = int(await reader.readuntil(b"\r\n"), 16)
                    chunk = await reader.readexactly(size)
                writer.close()
                assert chunk.startswith(beginning)
                _, _, connection = judged(head + b"0\r\n\r\n", line.split()[0])
                assert connection == [told]


ANSWERS = [
    ("GET /sdk/latest-all", SDK_KEY, (), b"", 200),
    ("GET /sdk/flags", SDK_KEY, ("Accept-Encoding: gzip",), b"", 200),
    ("GET /sdk/flags", SDK_KEY, ("If-None-Match: *",), b"", 304),
    (f"GET /msdk/evalx/contexts/{encoded(ANNA)}", "mob-1", (), b"", 200),
    ("REPORT /msdk/evalx/context", "mob-1", ("Expect: 100-continue",), CONTEXT, 200),
    ("OPTIONS /eval/env-1/x", "", (), b"", 200),
    ("HEAD /all", SDK_KEY, (), b"", 200),
    ("GET /all", "sdk-unknown", (), b"", 401),
    ("GET /nothing%", "", (), b"", 400),
    ("GET /status", "", (), b"", 200),
    ("GET /sdk//flags", SDK_KEY, (), b"", 301),
]


async def test_an_answer_to_http_1_0_ends_with_the_connection(door):
    """Also to those who offer to keep it; it has the same bytes as that to HTTP/1.1."""
    served = Served(mobile_key=MobileKey("mob-1"))
    async with serving(served, **door) as address:
        await begin(served, visible())
        for line, key, headers, body, status in ANSWERS:
            method, answers = line.split()[0], []
            for version, keep in (("1.0", "keep-alive"), ("1.0", "close"), ("1.1", "close")):
                given = *headers, f"Connection: {keep}"
                sent = request(line, key, *given, body=body, version=version)
                received = await exchange(address, sent)
                if version == "1.1":
                    received = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
                head, answer, connection = judged(received, method)
                assert head.status_code == status, line
                assert connection == [b"close"], line
                answers.append(answer)
            assert answers[0] == answers[1] == answers[2], line


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_target_may_be_a_whole_url(door, version):
    """As proxies send it; without a path it is that of the path `/`."""
    async with serving(Served(), **door) as address:
        for target, path, status in (
            ("http://relay:8030", "/", 404),
            ("http://relay:8030?x=1", "/", 404),
            ("HTTP://relay/", "/", 404),
            ("http://relay:8030/livez", "/livez", 200),
            ("http://relay:8030/livez?x=1", "/livez", 200),
        ):
            whole, usual = [
                judged(
                    await exchange(
                        address, request(f"GET {each}", "", "Connection: close", version=version)
                    )
                )
                for each in (target, path)
            ]
            assert whole[0].status_code == usual[0].status_code == status, target
            assert whole[1:] == usual[1:]
