"""The application: the complete route table, and the responses to errors (endpoints 1.1).

The fast path takes the hot requests before they get here. The application has every route, and its
responses are byte for byte those of the fast path.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from relay.environment import Environment
from relay.relay import Relay
from relay.telemetry.traffic import RequestMetrics, Series
from relay.web.access_log import AccessLogMiddleware
from relay.web.endpoints import metrics, status
from relay.web.endpoints.evaluation import EvaluationHandler
from relay.web.endpoints.events import EventsHandler
from relay.web.endpoints.goals import GoalsHandler
from relay.web.endpoints.polling import PollingHandler
from relay.web.endpoints.streams import STREAMS, ClientStreams, StreamResponse
from relay.web.endpoints.webhooks import PATH as WEBHOOK
from relay.web.endpoints.webhooks import WebhooksHandler
from relay.web.fastpath.events import BROWSERS, ROUTES
from relay.web.middleware import PathNormalizationMiddleware, ServerErrorMiddleware
from relay.web.responses import (
    FDV1_INSTEAD,
    NO_DATA,
    NOT_FOUND,
    PreparedResponse,
)
from relay.web.routing import (
    BROWSER,
    FDV2_CLIENT,
    MOBILE,
    SERVER,
    AuthenticatedRoute,
    Handler,
    RouteAuth,
    header,
    user_agent,
)

GET, REPORT, POST = ("GET",), ("REPORT",), ("POST",)
GET_, REPORT_ = ("GET", "OPTIONS"), ("REPORT", "OPTIONS")
POST_REPORT_ = ("POST", "REPORT", "OPTIONS")
REPORT_POST, REPORT_POST_ = ("REPORT", "POST"), ("REPORT", "POST", "OPTIONS")

Row = tuple[str, Sequence[str], RouteAuth, Handler]


def _table(
    poll: Handler,
    stream: Handler,
    *,
    streams: ClientStreams,
    events: EventsHandler,
    evaluation: EvaluationHandler,
    goals: GoalsHandler,
) -> Sequence[Row]:
    """Return the authenticated routes; the first match wins.

    Routes are tried in order, so the busy events routes come first.
    """
    in_path = {auth: evaluation.in_path(auth.sdk_kind) for auth in (SERVER, MOBILE, BROWSER)}
    in_body = {auth: evaluation.in_body(auth.sdk_kind) for auth in (SERVER, MOBILE, BROWSER)}
    fdv1 = _always(FDV1_INSTEAD)
    return (
        *(
            (
                route.template,
                BROWSERS if route.auth is BROWSER else POST,
                route.auth,
                events.handler(route.endpoint),
            )
            for route in ROUTES.values()
        ),
        ("/a/{envId}.gif", GET_, BROWSER, events.image),
        ("/all", GET, SERVER, stream),
        ("/flags", GET, SERVER, stream),
        ("/sdk/flags", GET, SERVER, poll),
        ("/sdk/flags/{key}", GET, SERVER, poll),
        ("/sdk/segments/{key}", GET, SERVER, poll),
        ("/sdk/latest-all", GET, SERVER, poll),
        ("/sdk/stream", GET, SERVER, fdv1),
        ("/sdk/poll", GET, SERVER, fdv1),
        ("/sdk/stream/eval", POST_REPORT_, FDV2_CLIENT, fdv1),
        ("/sdk/stream/eval/{context}", GET_, FDV2_CLIENT, fdv1),
        ("/sdk/poll/eval", POST_REPORT_, FDV2_CLIENT, fdv1),
        ("/sdk/poll/eval/{context}", GET_, FDV2_CLIENT, fdv1),
        ("/sdk/goals/{envId}", GET_, BROWSER, goals.respond),
        ("/sdk/evalx/{envId}/contexts/{context}", GET_, BROWSER, in_path[BROWSER]),
        ("/sdk/evalx/{envId}/contexts", REPORT_POST_, BROWSER, in_body[BROWSER]),
        ("/sdk/evalx/{envId}/context", REPORT_POST_, BROWSER, in_body[BROWSER]),
        ("/sdk/evalx/{envId}/users/{context}", GET_, BROWSER, in_path[BROWSER]),
        ("/sdk/evalx/{envId}/users", REPORT_POST_, BROWSER, in_body[BROWSER]),
        ("/sdk/evalx/{envId}/user", REPORT_POST_, BROWSER, in_body[BROWSER]),
        ("/sdk/evalx/contexts/{context}", GET, SERVER, in_path[SERVER]),
        ("/sdk/evalx/contexts", REPORT_POST, SERVER, in_body[SERVER]),
        ("/sdk/evalx/context", REPORT_POST, SERVER, in_body[SERVER]),
        ("/sdk/evalx/users/{context}", GET, SERVER, in_path[SERVER]),
        ("/sdk/evalx/users", REPORT_POST, SERVER, in_body[SERVER]),
        ("/sdk/evalx/user", REPORT_POST, SERVER, in_body[SERVER]),
        ("/msdk/evalx/contexts/{context}", GET, MOBILE, in_path[MOBILE]),
        ("/msdk/evalx/contexts", REPORT_POST, MOBILE, in_body[MOBILE]),
        ("/msdk/evalx/context", REPORT_POST, MOBILE, in_body[MOBILE]),
        ("/msdk/evalx/users/{context}", GET, MOBILE, in_path[MOBILE]),
        ("/msdk/evalx/users", REPORT_POST, MOBILE, in_body[MOBILE]),
        ("/msdk/evalx/user", REPORT_POST, MOBILE, in_body[MOBILE]),
        ("/meval/{context}", GET, MOBILE, streams.in_path(MOBILE)),
        ("/meval", REPORT, MOBILE, streams.in_body(MOBILE)),
        ("/mping", GET, MOBILE, streams.pings(MOBILE)),
        ("/ping/{envId}", GET_, BROWSER, streams.pings(BROWSER)),
        ("/eval/{envId}/{context}", GET_, BROWSER, streams.in_path(BROWSER)),
        ("/eval/{envId}", REPORT_, BROWSER, streams.in_body(BROWSER)),
    )


def make_app(
    relay: Relay,
    polling: PollingHandler,
    traffic: RequestMetrics,
    events: EventsHandler | None = None,
    webhooks: WebhooksHandler | None = None,
    *,
    evaluation: EvaluationHandler | None = None,
    goals: GoalsHandler | None = None,
) -> ASGIApp:
    """Return the application.

    Args:
        relay: to serve.
        polling: handles polls; shared with the fast path.
        traffic: counts requests; shared with the fast path.
        events: handles events; None if they are disabled.
        webhooks: handles webhooks; None if they are disabled.
        evaluation: handles evaluations; shared with the fast path.
        goals: serves goals; None to serve an empty list.
    """
    evaluation = evaluation or EvaluationHandler()
    table = _table(
        _poll(polling),
        _stream(traffic),
        streams=ClientStreams(traffic, evaluation.budget),
        events=events or EventsHandler(),
        evaluation=evaluation,
        goals=goals or GoalsHandler(),
    )
    pages = (
        ("/status", lambda _: status.overview(relay, traffic)),
        ("/status/{environment}", lambda name: status.one(relay, traffic, name)),
        ("/livez", lambda _: status.live()),
        ("/startupz", lambda _: status.started(relay)),
        ("/readyz", lambda _: status.ready(relay)),
        ("/readyz/{environment}", lambda name: status.environment_ready(relay, name)),
        ("/metrics", lambda _: metrics.page(relay, traffic)),
    )
    endpoints = [
        (path, methods, AuthenticatedRoute(relay, traffic, path, methods, auth, handler))
        for path, methods, auth, handler in table
    ]
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=methods) for path, methods, endpoint in endpoints),
            *(Route(path, _page(render), methods=GET) for path, render in pages),
            *([Route(WEBHOOK, webhooks, methods=POST)] if webhooks else []),
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
        routes=[Route("/metrics", page, methods=GET)],
        middleware=[Middleware(ServerErrorMiddleware)],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )


async def _not_found(_request: Request, _error: Exception) -> Response:
    return NOT_FOUND.to_starlette()


async def _not_allowed(_request: Request, error: Exception) -> Response:
    methods = error.headers["Allow"] if isinstance(error, HTTPException) and error.headers else ""
    allow = ", ".join(sorted(methods.split(", ")))
    return PreparedResponse(405, ((b"allow", allow.encode()),)).to_starlette()


def _page(render: Callable[[str], PreparedResponse]) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return render(request.path_params.get("environment", "")).to_starlette()

    return page


def _always(response: PreparedResponse) -> Handler:
    async def respond(_request: Request, _environment: Environment) -> Response:
        return response.to_starlette()

    return respond


def _poll(polling: PollingHandler) -> Handler:
    async def respond(request: Request, environment: Environment) -> Response:
        none_match, encoding = header(request, "if-none-match"), header(request, "accept-encoding")
        response = await polling.complete(environment, request.scope["path"], none_match, encoding)
        return (response or NO_DATA).to_starlette()

    return respond


def _stream(traffic: RequestMetrics) -> Handler:
    async def respond(request: Request, environment: Environment) -> Response:
        path = request.scope["path"]
        agent = user_agent(traffic, request)
        series = Series(environment.spec.name, path, "GET", SERVER.platform, agent)
        if request.method == "GET":
            traffic.new_streams[series].value += 1
        count = traffic.streams[series]
        return StreamResponse(environment, STREAMS[path.encode()], count, request.scope)

    return respond
