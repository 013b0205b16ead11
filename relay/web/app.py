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
from relay.web import expectations
from relay.web.access import Access
from relay.web.access_log import AccessLogMiddleware
from relay.web.endpoints import metrics, status
from relay.web.endpoints.streams import StreamsHandler
from relay.web.endpoints.webhooks import PATH as WEBHOOK
from relay.web.handlers import Handlers
from relay.web.middleware import PathNormalizationMiddleware, ServerErrorMiddleware
from relay.web.responses import FDV1_INSTEAD, NOT_FOUND, PreparedResponse
from relay.web.routes import ROUTES, Endpoint
from relay.web.routing import AuthenticatedRoute, Handler

_GET, _POST = ("GET",), ("POST",)


def make_app(handlers: Handlers) -> ASGIApp:
    """Return the application.

    Args:
        handlers: of the endpoints, shared with the fast path.
    """
    relay, traffic, webhooks = handlers.relay, handlers.traffic, handlers.webhooks
    events, evaluation = handlers.events, handlers.evaluation
    streams = StreamsHandler(traffic, evaluation.budget)
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
        Endpoint.FDV2: _use_fdv1,
    }
    pages = (
        ("/livez", lambda _: status.live()),
        ("/startupz", lambda _: status.started(relay)),
        ("/readyz", lambda _: status.ready(relay)),
        ("/readyz/{environment:path}", lambda name: status.environment_ready(relay, name)),
        ("/metrics", lambda _: metrics.page(relay, traffic)),
    )
    status_pages = (
        ("/status", lambda _: status.overview(relay, traffic), expectations.OVERVIEW),
        (
            "/status/{environment:path}",
            lambda name: status.one(relay, traffic, name),
            expectations.ENVIRONMENT,
        ),
    )
    routes = [
        (route, AuthenticatedRoute(relay, traffic, route, by_endpoint[route.endpoint]))
        for route in ROUTES
    ]
    app = Starlette(
        routes=[
            *(Route(route.template, app, methods=route.methods) for route, app in routes),
            *(Route(path, _page(render), methods=_GET) for path, render in pages),
            *(
                Route(path, _page(render, schema), methods=_GET)
                for path, render, schema in status_pages
            ),
            *([Route(WEBHOOK, webhooks, methods=_POST)] if webhooks else []),
        ],
        middleware=[
            *([Middleware(AccessLogMiddleware)] if traffic.logs else []),
            Middleware(ServerErrorMiddleware),
            Middleware(PathNormalizationMiddleware),
        ],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )
    app.router.redirect_slashes = False
    return app


def make_exporter(relay: Relay, traffic: RequestMetrics, prefix: str) -> ASGIApp:
    """Return the application on the port of `[Prometheus]`: ld-relay's metrics, then our own."""
    page = _page(lambda _: metrics.exporter_page(relay, traffic, prefix))
    return Starlette(
        routes=[Route("/metrics", page, methods=_GET)],
        middleware=[Middleware(ServerErrorMiddleware)],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )


async def _not_found(_request: Request, _error: Exception) -> Response:
    return NOT_FOUND.to_starlette()


async def _not_allowed(_request: Request, error: Exception) -> Response:
    methods = error.headers["Allow"] if isinstance(error, HTTPException) and error.headers else ""
    allow = ", ".join(sorted(methods.split(", ")))
    return PreparedResponse(405, ((b"allow", allow.encode()),)).to_starlette()


def _page(
    render: Callable[[str], PreparedResponse], schema: expectations.Schema | None = None
) -> Callable[[Request], Awaitable[Response]]:
    """Return a page; one with a schema answers expectations."""

    async def page(request: Request) -> Response:
        name = request.path_params.get("environment")
        if name == "":  # `/status/` is no page
            return NOT_FOUND.to_starlette()
        response = render(name or "")
        if schema is not None:
            response = expectations.check(response, request.scope["query_string"], schema)
        return response.to_starlette()

    return page


async def _use_fdv1(_request: Request, _access: Access) -> PreparedResponse:
    return FDV1_INSTEAD
