"""Requests for streams that the fast path hands over to the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.relay import Relay
from relay.streams.evaluated import EvalClient
from relay.telemetry.traffic import RequestMetrics, Series, client_label
from relay.web.access import by_plain_key
from relay.web.endpoints.streams import PING_STREAM, client_stream, client_stream_headers
from relay.web.responses import Headers, PreparedResponse
from relay.web.routing import BROWSER, MOBILE, RouteAuth


class StreamRequest(NamedTuple):
    """A stream that the front door is about to give to the hub."""

    environment: Environment
    name: str
    """Of the format or channel."""
    headers: Headers
    """Of the response."""
    series: Series
    """Under which it is counted."""
    client: EvalClient | None = None
    """For whom it is evaluated; None for shared streams."""


def client_stream_request(
    relay: Relay,
    traffic: RequestMetrics,
    url: bytes,
    headers: Mapping[bytes, bytes],
    *,
    closes: bool,
) -> StreamRequest | None:
    """Return the client-side stream that a plain GET asks for; None if it is the application's.

    Args:
        relay: whose environments are served.
        traffic: counts streams.
        url: as on the wire.
        headers: of the request, each once.
        closes: whether the client wants the connection to end with the stream.
    """
    path, _, query = url.partition(b"?")
    match = _CLIENT_PATHS.fullmatch(path)
    if match is None or b"%" in query or b"filter" in query:
        return None
    identity, segment = match["ping"] or match["id"], match["mobile"] or match["context"]
    access = BROWSER if identity else MOBILE
    if identity:
        environment = relay.by_environment_id.get(identity.decode())
    else:
        environment = by_plain_key(relay.by_mobile_key, headers)
    if environment is None:
        return None
    stream = client_stream(environment, access, segment, query) if segment else PING_STREAM
    if isinstance(stream, PreparedResponse):
        return None
    route = _CLIENT_ROUTES[access, bool(segment)]
    agent = client_label(traffic, headers)
    series = Series(environment.spec.name, route, "GET", access.platform, agent)
    origin = headers.get(b"origin", b"")
    given = client_stream_headers(environment, access, origin, closes=closes)
    return StreamRequest(environment, stream.name, given, series, stream.client)


_CLIENT_PATHS = re.compile(
    rb"/(?:mping|meval/(?P<mobile>[\w=-]+)|ping/(?P<ping>[\w-]+)"
    rb"|eval/(?P<id>[\w-]+)/(?P<context>[\w=-]+))"
)
"""Of GETs that need no decoding."""


_CLIENT_ROUTES: Mapping[tuple[RouteAuth, bool], str] = {
    (MOBILE, False): "/mping",
    (MOBILE, True): "/meval/{context}",
    (BROWSER, False): "/ping/{envId}",
    (BROWSER, True): "/eval/{envId}/{context}",
}
"""By whether there is a context."""
