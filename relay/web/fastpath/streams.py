"""Requests for streams that the fast path hands over to the hub."""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

from msgspec import Struct

from relay.environment import Environment
from relay.evaluation.client import EvalClient
from relay.registry import Grant, Registry
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


MAX_PROFILES = 256
"""Stream profiles of an environment: far more than it has kinds of clients."""

MAX_PROFILED = 512
"""Bytes of the headers on which a profile depends, if it is kept."""


class StreamProfile(Struct, eq=False):
    """Properties that all streams of one kind of client have in common."""

    head: bytes
    """Status line and headers of the response, each with its CRLF, without `Date`."""
    counts: StreamCounts
    """Count the streams."""
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


class StreamRequest(CacheEntry, eq=False):
    """Request for a stream, ready for the hub; cacheable unless it is for one context."""

    grant: Grant[Environment]
    """Opens the environment; the stream ends with it."""
    name: str
    """Name of the format or channel."""
    profile: StreamProfile
    client: EvalClient | str | None = None
    """See `ClientStream`."""


class StreamsFastPath:
    """Makes stream requests of heads that are seen for the first time.

    Args:
        registry: any change of it may change profiles.
        traffic: counts streams.
        bases: reads the states that clients name.
    """

    def __init__(
        self, registry: Registry[Environment], traffic: RequestMetrics, bases: Bases
    ) -> None:
        self._traffic = traffic
        self._bases = bases
        self._registry = registry
        self._generation = registry.generation
        """Of the registry, when the profiles were made."""
        self._profiles: WeakKeyDictionary[Environment, dict[Hashable, StreamProfile]] = (
            WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        return f"<StreamsFastPath [{sum(map(len, self._profiles.values()))} profiles]>"

    def request(self, head: RequestHead) -> StreamRequest | None:
        """Return the request for a stream; None to leave it to the application."""
        access, route = head.access, head.access.route
        stream: ClientStream | PreparedResponse
        if route.endpoint is Endpoint.STREAM:
            stream = server_stream(access, head.headers, head.query, self._bases)
        elif route.endpoint is Endpoint.PINGS:
            stream = PING_STREAM
        else:
            stream = client_stream(access, head.segment, head.query, head.headers)
        if isinstance(stream, PreparedResponse):
            return None
        environment, grant, profile = access.environment, access.grant, self._profile(head)
        cacheable = not head.segment and (stream.name != DELTAS or is_cacheable(head.headers))
        size = REQUEST_SIZE if cacheable else 0
        return StreamRequest(
            environment, ANY_PAYLOAD, grant, stream.name, profile, stream.client, size=size
        )

    def _profile(self, head: RequestHead) -> StreamProfile:
        if self._registry.generation != self._generation:
            self._generation = self._registry.generation
            self._profiles.clear()
        environment, values = head.access.environment, tuple(map(head.headers.get, _PROFILED))
        profiles = self._profiles.get(environment)
        if profiles is None:
            profiles = self._profiles[environment] = {}
        key = head.access.route.template, head.closes, values
        profile = profiles.get(key)
        if profile is None:
            profile = self._make_profile(head)
            if sum(len(value or b"") for value in values) <= MAX_PROFILED:
                if len(profiles) >= MAX_PROFILES:
                    profiles.clear()
                profiles[key] = profile
        return profile

    def _make_profile(self, head: RequestHead) -> StreamProfile:
        access, headers = head.access, head.headers
        environment, route = access.environment, access.route
        lines = stream_headers(environment, closes=head.closes)
        if route.for_browsers:
            origin = headers.get(b"origin", b"")
            lines = with_cors(lines, cors_lines(environment.spec, origin, route))
        counts = self._traffic.stream_counts(access.labels(self._traffic, "GET", headers))
        return StreamProfile(_response_head(lines), counts)


_PROFILED = b"origin", b"user-agent", b"x-launchdarkly-user-agent"
"""Headers of a request on which its profile depends."""


def _response_head(headers: Headers) -> bytes:
    lines = (b"%b: %b\r\n" % header for header in headers)
    return b"HTTP/1.1 200 OK\r\n" + b"".join(lines) + b"transfer-encoding: chunked\r\n"
