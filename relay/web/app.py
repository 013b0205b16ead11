"""The application: a handler for every route, and the responses to errors (endpoints 1.1).

The fast path takes the hot requests before they get here. The application has every route, and its
responses are byte for byte those of the fast path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics
from relay.web.access_log import AccessLogMiddleware
from relay.web.endpoints import metrics
from relay.web.endpoints.streams import StreamsHandler
from relay.web.endpoints.webhooks import PATH as WEBHOOK
from relay.web.handlers import Handlers
from relay.web.middleware import PathNormalizationMiddleware, ServerErrorMiddleware
from relay.web.pages import Page, Pages, respond
from relay.web.responses import NOT_FOUND, PreparedResponse
from relay.web.routes import ROUTES, Endpoint
from relay.web.routing import AuthenticatedRoute, Handler

_GET, _POST = ("GET",), ("POST",)


Ask = Callable[[str, bytes], Awaitable[PreparedResponse | None]]
"""Ask for a page about all workers, by path and query; None if there is no answer."""


def make_app(handlers: Handlers, ask: Ask | None = None) -> ASGIApp:
    """Return the application.

    Args:
        handlers: of the endpoints, shared with the fast path.
        ask: asks the feeder, if this is a worker.
    """
    relay, traffic, webhooks = handlers.relay, handlers.traffic, handlers.webhooks
    events, evaluation = handlers.events, handlers.evaluation
    streams = StreamsHandler(traffic, evaluation.budget, handlers.polling.bases)
    by_endpoint: Mapping[Endpoint, Handler] = {
        Endpoint.POLL: handlers.polling.handle,
        Endpoint.STREAM: streams.shared,
        Endpoint.PINGS: streams.pings,
        Endpoint.EVALUATED_STREAM: streams.in_path,
        Endpoint.EVALUATED_STREAM_REPORT: streams.in_body,
        Endpoint.EVALUATION: evaluation.in_path,
        Endpoint.EVALUATION_REPORT: evaluation.in_body,
        Endpoint.EVENTS: events.handle,
        Endpoint.EVENTS_IMAGE: events.image,
        Endpoint.GOALS: handlers.goals.handle,
    }
    routes = [
        (route, AuthenticatedRoute(relay, traffic, route, by_endpoint[route.endpoint]))
        for route in ROUTES
    ]
    app = Starlette(
        routes=[
            *(Route(route.template, app, methods=route.methods) for route, app in routes),
            *(_page_route(page, ask) for page in Pages(relay, traffic).all),
            *([Route(WEBHOOK, webhooks, methods=_POST)] if webhooks else []),
        ],
        middleware=[
            Middleware(AccessLogMiddleware, traffic=traffic),
            Middleware(ServerErrorMiddleware),
            Middleware(PathNormalizationMiddleware),
        ],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )
    app.router.redirect_slashes = False
    return app


def make_exporter(relay: Relay, traffic: RequestMetrics, prefix: str) -> ASGIApp:
    """Return the application on the port of `[Prometheus]`: ld-relay's metrics, then our own."""
    page = Page("/metrics", lambda _: metrics.exporter_page(relay, traffic, prefix))
    return Starlette(
        routes=[_page_route(page)],
        middleware=[Middleware(ServerErrorMiddleware)],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )


async def _not_found(_request: Request, _error: Exception) -> Response:
    return NOT_FOUND.to_starlette()


async def _not_allowed(_request: Request, error: Exception) -> Response:
    methods = error.headers["Allow"] if isinstance(error, HTTPException) and error.headers else ""
    allow = ", ".join(sorted(methods.split(", ")))
    return PreparedResponse(405, ((b"allow", allow.encode()),)).to_starlette()


def _page_route(page: Page, ask: Ask | None = None) -> Route:
    """Return the route of a page.

    Args:
        page: the page.
        ask: asks the feeder for a common page, if this is a worker; what the worker knows by itself
            is the answer if it gets none.
    """

    async def handle(request: Request) -> Response:
        query = request.scope["query_string"]
        response = None
        if ask is not None and page.is_common:
            response = await ask(request.url.path, query)
        if response is None:
            response = respond(page, request.path_params.get("environment", ""), query)
        return response.to_starlette()

    template = page.path + "{environment:path}" if page.path.endswith("/") else page.path
    return Route(template, handle, methods=_GET)
