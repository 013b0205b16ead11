"""Requests for streams that the fast path hands over to the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from relay.environment import Environment
from relay.model.credential import CredentialKind
from relay.registry import Grant
from relay.relay import Relay
from relay.streams.evaluated import EvalClient
from relay.telemetry.traffic import RequestMetrics, Series, client_label
from relay.web.access import by_plain_key
from relay.web.endpoints.streams import PING_STREAM, client_stream, client_stream_headers
from relay.web.responses import Headers, PreparedResponse
from relay.web.routing import BROWSER, MOBILE, RouteAuth


class StreamRequest(NamedTuple):
    """Request for a stream, ready for the hub."""

    environment: Environment
    name: str
    """Name of the format or channel."""
    headers: Headers
    """Headers of the response."""
    series: Series
    """Labels of the metrics that count the stream."""
    grant: Grant[Environment]
    """The permission with which it ends."""
    client: EvalClient | None = None
    """The client that flags are evaluated for; None for broadcast streams."""


def client_stream_request(
    relay: Relay,
    traffic: RequestMetrics,
    url: bytes,
    headers: Mapping[bytes, bytes],
    *,
    closes: bool,
) -> StreamRequest | None:
    """Return the request of a plain GET for a client-side stream.

    None leaves it to the application.

    Args:
        relay: provides the environments.
        traffic: request metrics.
        url: target of the request as it was received.
        headers: headers of the request, without repetitions.
        closes: True if the client wants the connection closed after the stream.
    """
    path, _, query = url.partition(b"?")
    match = _CLIENT_PATHS.fullmatch(path)
    if match is None or b"%" in query or b"filter" in query:
        return None
    environment_id, segment = match["ping"] or match["id"], match["mobile"] or match["context"]
    auth = BROWSER if environment_id else MOBILE
    if environment_id:
        grant = relay.registry.grant(CredentialKind.ENVIRONMENT_ID, environment_id.decode())
    else:
        grant = by_plain_key(relay, CredentialKind.MOBILE_KEY, headers)
    if grant is None:
        return None
    environment = grant.environment
    stream = client_stream(environment, auth, segment, query) if segment else PING_STREAM
    if isinstance(stream, PreparedResponse):
        return None
    route = _CLIENT_ROUTES[auth, bool(segment)]
    user_agent = client_label(traffic, headers)
    series = Series(environment.spec.name, route, "GET", auth.platform, user_agent)
    origin = headers.get(b"origin", b"")
    response_headers = client_stream_headers(environment, auth, origin, closes=closes)
    return StreamRequest(environment, stream.name, response_headers, series, grant, stream.client)


_CLIENT_PATHS = re.compile(
    rb"/(?:mping|meval/(?P<mobile>[\w=-]+)|ping/(?P<ping>[\w-]+)"
    rb"|eval/(?P<id>[\w-]+)/(?P<context>[\w=-]+))"
)
"""Paths of client-side streams that need no percent-decoding."""


_CLIENT_ROUTES: Mapping[tuple[RouteAuth, bool], str] = {
    (MOBILE, False): "/mping",
    (MOBILE, True): "/meval/{context}",
    (BROWSER, False): "/ping/{envId}",
    (BROWSER, True): "/eval/{envId}/{context}",
}
"""Route templates by kind of client, and by presence of a context."""
