"""The table of authenticated routes (endpoints 1.1).

Application, fast path, CORS, request metrics and usage reports read this one table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from msgspec import Struct

from relay.evaluation.sdkkind import SDKKind
from relay.model.credential import CredentialKind
from relay.model.event import EventsEndpoint


class Endpoint(Enum):
    """Purpose of a route, which chooses its handler."""

    POLL = auto()
    STREAM = auto()
    """Stream that is the same for all server-side SDKs."""
    PINGS = auto()
    """Stream of pings; no context is sent."""
    EVALUATED_STREAM = auto()
    """Stream for the context in the path."""
    EVALUATED_STREAM_REPORT = auto()
    """Stream for the context in the body."""
    EVALUATION = auto()
    """Flags for the context in the path."""
    EVALUATION_REPORT = auto()
    """Flags for the context in the body."""
    EVENTS = auto()
    EVENTS_IMAGE = auto()
    GOALS = auto()

    __hash__ = object.__hash__  # Enum's own costs as much as several dict lookups


class CredentialSource(Enum):
    """Place of the credential in a request."""

    HEADER = auto()
    """`Authorization`."""
    PATH = auto()
    """Parameter `{envId}`."""
    QUERY = auto()
    """Parameter `auth`; without it, `Authorization`."""


class RouteAuth(Struct, frozen=True, eq=False):
    """Authentication of a route.

    Args:
        sdk_kind: decides which flags are visible, unless the credential does.
        source: place of the credential.
        accepted: kinds of credentials, tried in order.
        exposed_headers: response headers that scripts in browsers may read; empty if the route is
            not for browsers.
        open_preflight: whether a preflight needs no credential.
    """

    sdk_kind: SDKKind
    source: CredentialSource
    accepted: tuple[CredentialKind, ...]
    exposed_headers: tuple[str, ...] = ()
    open_preflight: bool = False


SERVER = RouteAuth(SDKKind.SERVER, CredentialSource.HEADER, (CredentialKind.SDK_KEY,))
MOBILE = RouteAuth(SDKKind.MOBILE, CredentialSource.HEADER, (CredentialKind.MOBILE_KEY,))
BROWSER = RouteAuth(
    SDKKind.BROWSER, CredentialSource.PATH, (CredentialKind.ENVIRONMENT_ID,), ("Date",)
)
FDV2_CLIENT = RouteAuth(  # fdv2 13.1
    SDKKind.BROWSER,
    CredentialSource.QUERY,
    (CredentialKind.MOBILE_KEY, CredentialKind.ENVIRONMENT_ID),
    ("Date", "X-LD-EnvID", "X-LD-FD-Fallback", "X-LD-FD-Fallback-TTL"),
    open_preflight=True,
)

# A segment that has no escapes and is canonical: it means the same as received and decoded.
_PLAIN_SEGMENT = rb'(?!\.{1,2}(?:/|\Z))[!-"$&-.0->@-~]+'
_PARAMETER = re.compile(rb"\\\{(\w+)\\\}")


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One route.

    Args:
        template: of the path; also the label of its metrics. Parameters are `{envId}`, a
            client-side ID, and `{context}` or `{key}`.
        methods: allowed methods; routes for browsers include OPTIONS.
        auth: decides who may use it.
        endpoint: purpose of the route.
        events: endpoint of LaunchDarkly to which payloads of an events route go.
    """

    template: str
    methods: tuple[str, ...]
    auth: RouteAuth
    endpoint: Endpoint
    events: EventsEndpoint | None = None
    _pattern: re.Pattern[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pattern = _PARAMETER.sub(
            lambda name: b"(?P<%b>%b)" % (name[1], _PLAIN_SEGMENT),
            re.escape(self.template.encode()),
        )
        object.__setattr__(self, "_pattern", re.compile(pattern))

    @property
    def events_endpoint(self) -> EventsEndpoint:
        """Endpoint of LaunchDarkly to which payloads go.

        Raises:
            ValueError: it is no events route.
        """
        if self.events is None:
            raise ValueError(self.template)
        return self.events

    @property
    def sdk_kind(self) -> SDKKind:
        """Kind of the SDKs that use it; see also `relay.web.access.Access.sdk_kind`."""
        return self.auth.sdk_kind

    @property
    def evaluates_fdv2(self) -> bool:
        """True if client-side SDKs use it that speak FDv2."""
        return self.auth is FDV2_CLIENT

    @property
    def is_fdv2(self) -> bool:
        """True if SDKs use it that speak FDv2."""
        return self.evaluates_fdv2 or self.template in ("/sdk/stream", "/sdk/poll")

    @property
    def for_browsers(self) -> bool:
        """True if scripts in browsers use it, so that its responses need CORS headers."""
        return bool(self.auth.exposed_headers)

    def match(self, path: bytes) -> RouteMatch | None:
        """Return the parameters of a plain path, which has no escapes; None for any other path."""
        found = self._pattern.fullmatch(path)
        if found is None:
            return None
        parameters = found.groupdict()
        environment_id = parameters.pop("envId", b"").decode()
        return RouteMatch(self, environment_id, next(iter(parameters.values()), b""))


class RouteMatch(NamedTuple):
    """Route of a path, and the parameters in the path."""

    route: Route
    environment_id: str
    """Client-side ID; empty without one."""
    segment: bytes
    """Context or key of an item; empty without one."""


def _events(template: str, auth: RouteAuth, endpoint: EventsEndpoint) -> Route:
    methods = ("POST", "OPTIONS") if auth is BROWSER else ("POST",)
    return Route(template, methods, auth, Endpoint.EVENTS, endpoint)


def _evaluations(prefix: str, auth: RouteAuth) -> Sequence[Route]:
    options = ("OPTIONS",) if auth is BROWSER else ()
    get, report = ("GET", *options), ("REPORT", "POST", *options)
    return (
        Route(f"{prefix}/contexts/{{context}}", get, auth, Endpoint.EVALUATION),
        Route(f"{prefix}/contexts", report, auth, Endpoint.EVALUATION_REPORT),
        Route(f"{prefix}/context", report, auth, Endpoint.EVALUATION_REPORT),
        Route(f"{prefix}/users/{{context}}", get, auth, Endpoint.EVALUATION),
        Route(f"{prefix}/users", report, auth, Endpoint.EVALUATION_REPORT),
        Route(f"{prefix}/user", report, auth, Endpoint.EVALUATION_REPORT),
    )


_GET, _REPORT = ("GET",), ("REPORT",)
_GET_OPTIONS, _REPORT_OPTIONS = ("GET", "OPTIONS"), ("REPORT", "OPTIONS")
_POST_REPORT_OPTIONS = ("POST", "REPORT", "OPTIONS")

# The first match wins. The application tries routes in order, so busy ones come first.
ROUTES: Sequence[Route] = (
    _events("/bulk", SERVER, EventsEndpoint.BULK),
    _events("/diagnostic", SERVER, EventsEndpoint.BULK_DIAGNOSTIC),
    _events("/mobile", MOBILE, EventsEndpoint.MOBILE),
    _events("/mobile/events", MOBILE, EventsEndpoint.MOBILE),
    _events("/mobile/events/bulk", MOBILE, EventsEndpoint.MOBILE),
    _events("/mobile/events/diagnostic", MOBILE, EventsEndpoint.MOBILE_DIAGNOSTIC),
    _events("/events/bulk/{envId}", BROWSER, EventsEndpoint.CLIENT_SIDE),
    _events("/events/diagnostic/{envId}", BROWSER, EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC),
    Route("/a/{envId}.gif", _GET_OPTIONS, BROWSER, Endpoint.EVENTS_IMAGE),
    Route("/all", _GET, SERVER, Endpoint.STREAM),
    Route("/flags", _GET, SERVER, Endpoint.STREAM),
    Route("/sdk/flags", _GET, SERVER, Endpoint.POLL),
    Route("/sdk/flags/{key}", _GET, SERVER, Endpoint.POLL),
    Route("/sdk/segments/{key}", _GET, SERVER, Endpoint.POLL),
    Route("/sdk/latest-all", _GET, SERVER, Endpoint.POLL),
    Route("/sdk/stream", _GET, SERVER, Endpoint.STREAM),
    Route("/sdk/poll", _GET, SERVER, Endpoint.POLL),
    Route("/sdk/stream/eval", _POST_REPORT_OPTIONS, FDV2_CLIENT, Endpoint.EVALUATED_STREAM_REPORT),
    Route("/sdk/stream/eval/{context}", _GET_OPTIONS, FDV2_CLIENT, Endpoint.EVALUATED_STREAM),
    Route("/sdk/poll/eval", _POST_REPORT_OPTIONS, FDV2_CLIENT, Endpoint.EVALUATION_REPORT),
    Route("/sdk/poll/eval/{context}", _GET_OPTIONS, FDV2_CLIENT, Endpoint.EVALUATION),
    Route("/sdk/goals/{envId}", _GET_OPTIONS, BROWSER, Endpoint.GOALS),
    *_evaluations("/sdk/evalx/{envId}", BROWSER),
    *_evaluations("/sdk/evalx", SERVER),
    *_evaluations("/msdk/evalx", MOBILE),
    Route("/meval/{context}", _GET, MOBILE, Endpoint.EVALUATED_STREAM),
    Route("/meval", _REPORT, MOBILE, Endpoint.EVALUATED_STREAM_REPORT),
    Route("/mping", _GET, MOBILE, Endpoint.PINGS),
    Route("/ping/{envId}", _GET_OPTIONS, BROWSER, Endpoint.PINGS),
    Route("/eval/{envId}/{context}", _GET_OPTIONS, BROWSER, Endpoint.EVALUATED_STREAM),
    Route("/eval/{envId}", _REPORT_OPTIONS, BROWSER, Endpoint.EVALUATED_STREAM_REPORT),
)

POLLS = frozenset(route.template for route in ROUTES if route.endpoint is Endpoint.POLL)
"""Templates of polls, which usage reports count."""


def _by_start(routes: Sequence[Route]) -> Mapping[tuple[bytes, bytes], Sequence[Route]]:
    groups: dict[tuple[bytes, bytes], list[Route]] = {}
    for route in routes:
        start = route.template.split("/")[1].encode()
        for method in route.methods:
            groups.setdefault((method.encode(), start), []).append(route)
    return groups


_BY_START = _by_start(ROUTES)
"""Routes by method and first segment of the path."""


def has_routes(method: bytes, segment: bytes) -> bool:
    """Return whether any route has this method and first segment of the path."""
    return (method, segment) in _BY_START


def match(method: bytes, path: bytes) -> RouteMatch | None:
    """Return the route of a request with a plain path, which has no escapes; None for any other.

    Args:
        method: of the request.
        path: as received, without the query.
    """
    start = path[1:].partition(b"/")[0]
    for route in _BY_START.get((method, start), ()):
        found = route.match(path)
        if found is not None:
            return found
    return None
