"""Streams of SDKs, as the application serves them (endpoints 1.7).

The fast path serves nearly all streams, with shared bytes and without a task for each. The
application serves the rest, with the same bytes: HTTP/1.0, unusual headers, contexts in bodies,
other ASGI servers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay.environment import Environment
from relay.evaluation.client import EvalClient
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.model.metrics import MetricValue
from relay.registry import Grant
from relay.streams.deltas import STREAM as DELTAS
from relay.streams.evaluated import EVALUATING, EVALUATING_FDV2, PINGS
from relay.streams.transport import LAST_CHUNK, PIECE, find_chunks
from relay.telemetry.traffic import RequestMetrics
from relay.web.access import Access
from relay.web.bases import Bases, client_side_basis
from relay.web.bodies import MemoryBudget, RequestRejected
from relay.web.contexts import (
    NO_KEY,
    EvaluationQuery,
    check_secure_mode_hash,
    context_in_body,
    context_in_path,
    json_in_path,
    read_context_body,
)
from relay.web.protocol import connection_of
from relay.web.requests import first_values
from relay.web.responses import Headers, PreparedResponse, environment_headers

PIPE_LIMIT = 64 * 1024
"""Bytes that may wait for the ASGI server before the client counts as slow, as in a transport."""

_UNBUFFERED = (b"x-accel-buffering", b"no")


def _headers(connection: bytes) -> Headers:
    return (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache, no-store, must-revalidate"),
        (b"connection", connection),
        (b"access-control-allow-origin", b"*"),
        _UNBUFFERED,
    )


_HEADERS, _CLOSING_HEADERS = _headers(b"keep-alive"), _headers(b"close")


def stream_headers(environment: Environment, *, closes: bool) -> Headers:
    """Return the response headers of a stream (endpoints 1.7), for both paths.

    Args:
        environment: of the stream.
        closes: whether the connection ends with the stream.
    """
    headers = _CLOSING_HEADERS if closes else _HEADERS
    return (*headers, *environment_headers(environment.spec))


class ClientStream(Struct, frozen=True):
    """Stream that an SDK gets.

    Args:
        name: of the channel.
        client: to evaluate for, or the state of the client's data; None for a stream that is the
            same for all clients.
    """

    name: str
    client: EvalClient | str | None = None


PING_STREAM = ClientStream(PINGS)
"""The stream of `/ping/{envId}` and `/mping`."""


def client_stream(
    access: Access, segment: bytes, query: bytes, headers: Mapping[bytes, bytes]
) -> ClientStream | PreparedResponse:
    """Return the stream for a context in the path, or the refusal.

    Args:
        access: environment to evaluate for, and the route.
        segment: of the path, with the context, without percent escapes.
        query: as received.
        headers: of the request, by name in lower case.
    """
    try:
        context = context_in_path(segment)
        return _stream_for(access, json_in_path(segment), context, query, headers)
    except RequestRejected as e:
        return e.response.with_headers(_UNBUFFERED)


def _stream_for(
    access: Access,
    json: bytes,
    context: Context,
    query: bytes,
    headers: Mapping[bytes, bytes],
) -> ClientStream:
    """Return the stream for a context; one that gets pings needs no key.

    Raises:
        RequestRejected: the secure mode hash is wrong, or the context has no key to evaluate for.
    """
    spec, sdk_kind = access.environment.spec, access.sdk_kind
    parameters = EvaluationQuery.parse(query)
    if sdk_kind is SDKKind.BROWSER:
        proof = parameters.secure_mode_hash
        check_secure_mode_hash(spec, context.fully_qualified_key, proof)
    if not spec.eval_streams:
        return PING_STREAM
    if context.has_empty_key:
        raise RequestRejected(NO_KEY)
    fdv2, reasons = access.route.evaluates_fdv2, parameters.with_reasons
    basis = client_side_basis(headers, query) if fdv2 else ""
    client = EvalClient(json, context, sdk_kind, with_reasons=reasons, basis=basis)
    return ClientStream((EVALUATING_FDV2 if fdv2 else EVALUATING)[sdk_kind], client)


def server_stream(
    access: Access, headers: Mapping[bytes, bytes], query: bytes, bases: Bases
) -> ClientStream:
    """Return the stream of `/all`, `/flags` or `/sdk/stream`.

    Args:
        access: environment of the stream, and the route.
        headers: of the request, by name in lower case.
        query: as received.
        bases: reads the state that the client names.
    """
    name = access.route.template.removeprefix("/")
    if name != DELTAS:
        return ClientStream(name)
    return ClientStream(name, bases.of_stream(access.environment, headers, query))


class StreamsHandler:
    """Handler of streams.

    Args:
        traffic: counts streams.
        budget: memory for contexts in bodies.
        bases: reads the states that clients name.
    """

    def __init__(self, traffic: RequestMetrics, budget: MemoryBudget, bases: Bases) -> None:
        self._traffic = traffic
        self._budget = budget
        self._bases = bases

    async def shared(self, request: Request, access: Access) -> Response:
        """Open a stream of a server-side SDK."""
        headers, query = first_values(request), request.scope["query_string"]
        stream = server_stream(access, headers, query, self._bases)
        return self._open(request, access, stream)

    async def pings(self, request: Request, access: Access) -> Response:
        """Open a stream of pings, whose path has no context."""
        return self._open(request, access, PING_STREAM)

    async def in_path(self, request: Request, access: Access) -> Response | PreparedResponse:
        """Open a stream by a GET whose path ends in the context."""
        segment = request.path_params["context"].encode(errors="replace")
        query = request.scope["query_string"]
        stream = client_stream(access, segment, query, first_values(request))
        return (
            stream if isinstance(stream, PreparedResponse) else self._open(request, access, stream)
        )

    async def in_body(self, request: Request, access: Access) -> Response | PreparedResponse:
        """Open a stream by a request whose body is the context."""
        try:
            body = await read_context_body(request, self._budget)
            context, query = context_in_body(body), request.scope["query_string"]
            stream = _stream_for(access, body, context, query, first_values(request))
        except RequestRejected as e:
            return e.response.with_headers(_UNBUFFERED)
        return self._open(request, access, stream)

    def _open(self, request: Request, access: Access, stream: ClientStream) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        labels = access.labels(self._traffic, method, first_values(request))
        if request.method != "HEAD":
            self._traffic.new_streams[labels].value += 1
        count = self._traffic.streams[labels]
        return StreamResponse(access.grant, stream, count, request.scope)


class StreamResponse(Response):
    """Stream of one environment; it lasts until the client disconnects or the hub ends it.

    Args:
        grant: opens the environment; the stream ends with it.
        stream: to subscribe to.
        count: of open streams.
        scope: of the request.
    """

    def __init__(
        self, grant: Grant[Environment], stream: ClientStream, count: MetricValue, scope: Scope
    ) -> None:
        super().__init__()
        self._count = count
        self._connection = connection_of(scope)
        self.raw_headers = list(stream_headers(grant.environment, closes=_closes(scope)))
        self._grant = grant
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the head at once, then the messages of the hub."""
        # Imported here, for few streams come this way and every start would pay for it.
        from sse_starlette import EventSourceResponse  # noqa: PLC0415

        response = EventSourceResponse(self._messages(), ping=0)  # the hub sends heartbeats
        response.raw_headers = self.raw_headers
        await response(scope, receive, send)

    async def _messages(self) -> AsyncGenerator[bytes, None]:
        pipe = _Pipe(self._connection)
        hub, stream = self._grant.environment.hub, self._stream
        hub.subscribe(stream.name, pipe, b"", self._count, stream.client, grant=self._grant)
        try:
            async for data in pipe:
                yield data
        finally:
            pipe.notify_lost()


def _closes(scope: Scope) -> bool:
    """Return whether the connection ends with the response (RFC 9112, 9.3)."""
    if scope["http_version"] == "1.0":
        return True
    values = [value for name, value in scope["headers"] if name == b"connection"]
    return any(option.strip().lower() == b"close" for option in b",".join(values).split(b","))


class _Pipe:
    """Transport for the hub, whose other end is an async iterator of messages.

    Args:
        connection: to which the server writes them; None if it does not tell.
    """

    def __init__(self, connection: asyncio.Transport | None) -> None:
        self._connection = connection
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._ended = False
        self._paused = False
        self._protocol: asyncio.BaseProtocol | None = None

    def notify_lost(self) -> None:
        """Tell the hub that the client has disconnected."""
        if isinstance(self._protocol, asyncio.Protocol):
            self._protocol.connection_lost(None)

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        self._protocol = protocol

    def write(self, data: bytes, /) -> None:
        self._chunks.append(data)
        self._size += len(data)
        self._changed.set()
        if self._protocol and self._size > PIPE_LIMIT and not self._paused:
            self._paused = True
            self._protocol.pause_writing()

    def writelines(self, parts: Iterable[bytes], /) -> None:
        for part in parts:
            self.write(part)

    def close(self) -> None:
        self._ended = True
        self._changed.set()

    def abort(self) -> None:
        self._chunks.clear()
        self._size = 0
        self.close()
        if self._connection is not None:  # the server may be waiting for the client
            self._connection.abort()

    def get_write_buffer_size(self) -> int:
        unsent = 0 if self._connection is None else self._connection.get_write_buffer_size()
        return self._size + unsent

    def get_extra_info(self, name: str, /) -> Any:
        return None if self._connection is None else self._connection.get_extra_info(name)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._chunks:
                chunk = self._chunks[0]
                left = len(chunk)
                for piece in () if chunk is LAST_CHUNK else _pieces(chunk):
                    yield piece
                    if not self._chunks:
                        return  # aborted
                    self._size -= len(piece)
                    left -= len(piece)
                self._chunks.popleft()
                self._size -= left
                if self._protocol and self._paused and not self._chunks:
                    self._paused = False
                    self._protocol.resume_writing()
            if self._ended:
                return
            self._changed.clear()
            await self._changed.wait()


def _pieces(chunk: bytes) -> Iterator[bytes]:
    """Yield the data of chunks in pieces.

    The server copies what it is given, and asks for no more while the client does not read.
    """
    for begin, end in find_chunks(chunk):
        for at in range(begin, end, PIECE):
            yield chunk[at : min(at + PIECE, end)]
