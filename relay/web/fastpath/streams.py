"""Requests for streams that the fast path hands over to the hub."""

from __future__ import annotations

from relay.environment import Environment
from relay.evaluation.client import EvalClient
from relay.registry import Grant
from relay.streams.deltas import STREAM as DELTAS
from relay.telemetry.traffic import RequestMetrics, StreamCounts
from relay.web.bases import Bases, is_cacheable
from relay.web.cache import ANY_PAYLOAD, CacheEntry
from relay.web.cors import cors_lines, with_cors
from relay.web.endpoints.streams import (
    PING_STREAM,
    ClientStream,
    client_stream,
    server_stream,
    stream_headers,
)
from relay.web.fastpath.heads import RequestHead
from relay.web.responses import Headers, PreparedResponse
from relay.web.routes import Endpoint

REQUEST_SIZE = 1024
"""Bytes that a stream request takes besides its head."""


class StreamRequest(CacheEntry, eq=False):
    """Request for a stream, ready for the hub; cacheable unless it is for one context."""

    grant: Grant[Environment]
    """Opens the environment; the stream ends with it."""
    name: str
    """Name of the format or channel."""
    head: bytes
    """Status line and headers of the response, each with its CRLF, without `Date`."""
    counts: StreamCounts
    """Count the stream."""
    client: EvalClient | str | None = None
    """See `ClientStream`."""
    _date: bytes = b""
    _assembled: bytes = b""

    def to_wire(self, date: bytes) -> bytes:
        """Return the head of the response; assembled once a second.

        Args:
            date: the `Date` header and the blank line that ends a head.
        """
        if self._date is not date:
            self._date, self._assembled = date, self.head + date
        return self._assembled


def stream_request(
    traffic: RequestMetrics, head: RequestHead, bases: Bases
) -> StreamRequest | None:
    """Return the request for a stream; None to leave it to the application."""
    access, route = head.access, head.access.route
    stream: ClientStream | PreparedResponse
    if route.endpoint is Endpoint.STREAM:
        stream = server_stream(access, head.headers, head.query, bases)
    elif route.endpoint is Endpoint.PINGS:
        stream = PING_STREAM
    else:
        stream = client_stream(access, head.segment, head.query, head.headers)
    if isinstance(stream, PreparedResponse):
        return None
    environment = access.environment
    headers = stream_headers(environment, closes=head.closes)
    if route.for_browsers:
        origin = head.headers.get(b"origin", b"")
        headers = with_cors(headers, cors_lines(environment.spec, origin, route))
    counts = traffic.stream_counts(access.labels(traffic, "GET", head.headers))
    grant, client = access.grant, stream.client
    cacheable = not head.segment and (stream.name != DELTAS or is_cacheable(head.headers))
    size = REQUEST_SIZE if cacheable else 0
    start = _response_head(headers)
    return StreamRequest(
        environment, ANY_PAYLOAD, grant, stream.name, start, counts, client, size=size
    )


def _response_head(headers: Headers) -> bytes:
    lines = (b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 200 OK\r\n" + b"".join(lines) + b"transfer-encoding: chunked\r\n"
