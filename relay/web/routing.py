"""Authenticated routes: credential, CORS and request counts around the handler of each route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.access import Access, resolve
from relay.web.cors import cors_lines, with_cors
from relay.web.requests import first_values
from relay.web.responses import PreparedResponse, environment_headers
from relay.web.routes import Route

Handler = Callable[[Request, Access], Awaitable[Response | PreparedResponse]]
"""Return the response to an authenticated request."""


class AuthenticatedRoute(Struct, frozen=True, eq=False):
    """ASGI application of one route.

    Args:
        relay: to serve.
        traffic: counts requests.
        route: from the table.
        handler: handles authenticated requests.
    """

    relay: Relay
    traffic: RequestMetrics
    route: Route
    handler: Handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate a request, count it and send the response."""
        request = Request(scope, receive)
        headers = first_values(request)
        environment_id = request.path_params.get("envId", "")
        query = scope["query_string"]
        resolved = resolve(self.relay, self.route, headers, environment_id, query)
        response = await self._respond(request, headers, resolved)
        if isinstance(response, PreparedResponse):
            response = response.to_starlette()
        spec = resolved.environment.spec if isinstance(resolved, Access) else None
        lines = tuple(response.raw_headers)
        if spec and b"x-ld-envid" not in dict(lines):
            lines += environment_headers(spec)
        if self.route.for_browsers:
            origin = headers.get(b"origin", b"")
            lines = with_cors(lines, cors_lines(spec, origin, self.route))
        response.raw_headers = list(lines)
        await response(scope, receive, send)

    async def _respond(
        self,
        request: Request,
        headers: Mapping[bytes, bytes],
        resolved: Access | PreparedResponse,
    ) -> Response | PreparedResponse:
        accepted = isinstance(resolved, Access)
        if request.method == "OPTIONS" and (self.route.auth.open_preflight or accepted):
            return Response()
        if isinstance(resolved, PreparedResponse):
            return resolved
        labels = resolved.labels(self.traffic, request.method, headers)
        self.traffic.requests[labels].value += 1
        return await self.handler(request, resolved)
