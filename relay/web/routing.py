"""Authenticated routes: credential, CORS and request counts around the handler of each route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay.environment import Environment
from relay.evaluation.sdkkind import SDKKind
from relay.registry import Grant
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics, Series
from relay.web import access
from relay.web.cors import cors_headers
from relay.web.responses import PreparedResponse, environment_headers

Resolve = Callable[[Relay, Request], Grant[Environment] | PreparedResponse]
"""Return the environment of a request, or the refusal."""

GRANT = "relay.grant"
"""Key in a request's scope of the grant that has opened its environment."""

Handler = Callable[[Request, Environment], Awaitable[Response]]
"""Return the response to an authenticated request."""


def parameter(request: Request, name: str) -> str:
    """Return the first value of a query parameter of a request; empty without one."""
    return parameter_in(request.scope["query_string"], name)


def parameter_in(query: bytes, name: str) -> str:
    """Return the first value of a parameter in a query; empty without one."""
    if not query:
        return ""
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
    return next((value for key, value in pairs if key == name), "")


def header(request: Request, name: str) -> bytes:
    """Return the first value of a header; empty without one.

    Args:
        request: to read.
        name: in lower case.
    """
    wanted = name.encode()
    for field, value in request.scope["headers"]:
        if field == wanted:
            return bytes(value)
    return b""


def user_agent(traffic: RequestMetrics, request: Request) -> str:
    """Return the metric label of the client that sent a request."""
    sdk_agent, agent = header(request, "x-launchdarkly-user-agent"), header(request, "user-agent")
    return traffic.user_agent(sdk_agent, agent)


def _sdk_key(relay: Relay, request: Request) -> Grant[Environment] | PreparedResponse:
    return access.for_sdk_key(relay, header(request, "authorization"), parameter(request, "filter"))


def _mobile_key(relay: Relay, request: Request) -> Grant[Environment] | PreparedResponse:
    credential = header(request, "authorization")
    return access.for_mobile_key(relay, credential, parameter(request, "filter"))


def _environment_id(relay: Relay, request: Request) -> Grant[Environment] | PreparedResponse:
    credential = request.path_params["envId"]
    return access.for_environment_id(relay, credential, parameter(request, "filter"))


def _mobile_key_or_environment_id(
    relay: Relay, request: Request
) -> Grant[Environment] | PreparedResponse:
    credential = parameter(request, "auth").encode("latin-1", "replace")
    credential = credential or header(request, "authorization")
    return access.for_client(relay, credential, parameter(request, "filter"))


@dataclass(frozen=True, slots=True, eq=False)
class RouteAuth:
    """Authentication of a route.

    Args:
        sdk_kind: decides which flags are visible.
        resolve: finds the environment of the credential.
        exposed_headers: response headers that scripts in browsers may read; empty if the route is
            not for browsers.
        open_preflight: whether a preflight needs no credential.
    """

    sdk_kind: SDKKind
    resolve: Resolve
    exposed_headers: tuple[str, ...] = ()
    open_preflight: bool = False

    @property
    def platform(self) -> str:
        """Metric label of the kind of SDK."""
        return self.sdk_kind.value


SERVER = RouteAuth(SDKKind.SERVER, _sdk_key)
MOBILE = RouteAuth(SDKKind.MOBILE, _mobile_key)
BROWSER = RouteAuth(SDKKind.BROWSER, _environment_id, ("Date",))
FDV2_CLIENT = RouteAuth(
    SDKKind.BROWSER,
    _mobile_key_or_environment_id,
    ("Date", "X-LD-FD-Fallback"),
    open_preflight=True,
)


@dataclass(frozen=True, slots=True, eq=False)
class AuthenticatedRoute:
    """ASGI application of one route.

    Args:
        relay: to serve.
        traffic: counts requests.
        route: template of the path.
        methods: of the route; those for browsers include OPTIONS.
        auth: decides who may use it.
        handler: handles authenticated requests.
    """

    relay: Relay
    traffic: RequestMetrics
    route: str
    methods: Sequence[str]
    auth: RouteAuth
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate a request, count it and send the response."""
        request = Request(scope, receive)
        resolved: Environment | PreparedResponse
        access = self.auth.resolve(self.relay, request)
        if isinstance(access, Grant):
            resolved, scope[GRANT] = access.environment, access
        else:
            resolved = access
        response = await self._response(request, resolved)
        environment = resolved if isinstance(resolved, Environment) else None
        if environment and b"x-ld-envid" not in dict(response.raw_headers):
            response.raw_headers.extend(environment_headers(environment.spec))
        if self.auth.exposed_headers:
            self._allow_browsers(request, response, environment)
        await response(scope, receive, send)

    async def _response(
        self, request: Request, resolved: Environment | PreparedResponse
    ) -> Response:
        preflight = request.method == "OPTIONS"
        if preflight and (self.auth.open_preflight or isinstance(resolved, Environment)):
            return Response()
        if isinstance(resolved, PreparedResponse):
            return resolved.to_starlette()
        agent = user_agent(self.traffic, request)
        name, platform = resolved.spec.name, self.auth.platform
        self.traffic.requests[Series(name, self.route, request.method, platform, agent)].value += 1
        return await self.handler(request, resolved)

    def _allow_browsers(
        self, request: Request, response: Response, environment: Environment | None
    ) -> None:
        spec = environment.spec if environment else None
        origin = request.headers.get("origin", "")
        headers = MutableHeaders(raw=response.raw_headers)
        headers.update(cors_headers(spec, origin, self.methods, self.auth.exposed_headers))
        headers.append("vary", "Origin")
