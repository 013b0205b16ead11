"""The streams of server-side SDKs, `/all` and `/flags`, as the application serves them.

The front door serves nearly all of them, with shared bytes and without a task; this is for what it
leaves: HTTP/1.0, odd headers, another ASGI server. The bytes are the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay.environment import Environment
from relay.hub import LAST_CHUNK, unframed
from relay.model.count import Count
from relay.web.answers import Headers, environment_headers

STREAMS: Mapping[bytes, str] = {b"/all": "all", b"/flags": "flags"}
"""Path to stream format, for server-side SDKs (endpoints 1.1, rows 18 and 19)."""

PIPE_LIMIT = 64 * 1024
"""Bytes that wait for the server to take them before the client counts as slow; as a transport."""

_HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-store, must-revalidate"),
    (b"connection", b"keep-alive"),
    (b"access-control-allow-origin", b"*"),
    (b"x-accel-buffering", b"no"),
)


def stream_headers(environment: Environment) -> Headers:
    """Return the response headers of a stream (endpoints 1.7), the same at both doors."""
    return (*_HEADERS, *environment_headers(environment.spec))


class StreamResponse(Response):
    """A stream of one environment; it lasts until the client goes or the hub ends it.

    Args:
        environment: whose hub to listen to.
        stream: the name of the format.
        count: of open streams.
    """

    def __init__(self, environment: Environment, stream: str, count: Count) -> None:
        super().__init__()
        self._count = count
        self.raw_headers = list(stream_headers(environment))
        self._environment = environment
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head at once, then whatever the hub writes."""
        await send(
            {"type": "http.response.start", "status": 200, "headers": self.raw_headers},
        )
        if scope["method"] != "HEAD":
            await self._send_stream(receive, send)
        await send({"type": "http.response.body", "body": b""})

    async def _send_stream(self, receive: Receive, send: Send) -> None:
        pipe = _Pipe()
        self._environment.hub.subscribe(self._stream, pipe, b"", self._count)
        leaving = asyncio.create_task(_disconnected(receive))
        leaving.add_done_callback(lambda _: pipe.abort())
        try:
            async for data in pipe:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            leaving.cancel()
            pipe.lost()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Pipe:
    """What looks like a transport to the hub; the other end is an async iterator of messages."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._news = asyncio.Event()
        self._ended = False
        self._paused = False
        self._protocol: asyncio.BaseProtocol | None = None

    def lost(self) -> None:
        """Tell the hub that the client is gone."""
        if isinstance(self._protocol, asyncio.Protocol):
            self._protocol.connection_lost(None)

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        self._protocol = protocol

    def write(self, data: bytes, /) -> None:
        self._chunks.append(data)
        self._size += len(data)
        self._news.set()
        if self._protocol and self._size > PIPE_LIMIT and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def close(self) -> None:
        self._ended = True
        self._news.set()

    def abort(self) -> None:
        self._chunks.clear()
        self.close()

    def get_write_buffer_size(self) -> int:
        return self._size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._chunks:
                chunk = self._take()
                if chunk is not LAST_CHUNK:
                    for data in unframed(chunk):
                        yield data
            if self._ended:
                return
            self._news.clear()
            await self._news.wait()

    def _take(self) -> bytes:
        chunk = self._chunks.popleft()
        self._size -= len(chunk)
        if self._protocol and self._paused and not self._chunks:
            self._paused = False
            self._protocol.resume_writing()
        return chunk
