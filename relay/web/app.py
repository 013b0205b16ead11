"""The application: the whole route table, and how errors become answers (endpoints 1.1).

Behind the front door, which takes the hot GETs; this has all routes, and the same bytes.
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
from relay.model.event import Endpoint as Target
from relay.relay import Relay
from relay.web import metrics, status
from relay.web.answers import (
    FDV1_INSTEAD,
    NO_DATA,
    NO_EVALUATION_YET,
    NO_GOALS_YET,
    NO_PINGS_YET,
    NOT_FOUND,
    Answer,
)
from relay.web.endpoint import (
    BROWSER,
    FDV2_CLIENT,
    MOBILE,
    SERVER,
    Access,
    Endpoint,
    Respond,
    header,
    user_agent,
)
from relay.web.events import Events
from relay.web.middleware import CanonicalPaths, Defects, Shortcut
from relay.web.polling import Polling
from relay.web.streams import STREAMS, StreamResponse
from relay.web.traffic import RequestLog, Series, Traffic
from relay.web.webhooks import PATH as WEBHOOK
from relay.web.webhooks import Webhooks

GET, REPORT, POST = ("GET",), ("REPORT",), ("POST",)
GET_, REPORT_, POST_ = ("GET", "OPTIONS"), ("REPORT", "OPTIONS"), ("POST", "OPTIONS")
POST_REPORT_ = ("POST", "REPORT", "OPTIONS")

Row = tuple[str, Sequence[str], Access, Respond]


def _table(poll: Respond, stream: Respond, events: Events) -> Sequence[Row]:
    """Return the authenticated routes; the first that matches counts.

    Routes are tried in turn, so those of events, which are busy, come first.
    """
    evaluate, pings, goals = (
        _always(NO_EVALUATION_YET),
        _always(NO_PINGS_YET),
        _always(NO_GOALS_YET),
    )
    fdv1 = _always(FDV1_INSTEAD)
    return (
        ("/bulk", POST, SERVER, events.posts(Target.BULK)),
        ("/diagnostic", POST, SERVER, events.posts(Target.BULK_DIAGNOSTIC)),
        ("/mobile", POST, MOBILE, events.posts(Target.MOBILE)),
        ("/mobile/events", POST, MOBILE, events.posts(Target.MOBILE)),
        ("/mobile/events/bulk", POST, MOBILE, events.posts(Target.MOBILE)),
        ("/mobile/events/diagnostic", POST, MOBILE, events.posts(Target.MOBILE_DIAGNOSTIC)),
        ("/events/bulk/{envId}", POST_, BROWSER, events.posts(Target.CLIENT_SIDE)),
        ("/events/diagnostic/{envId}", POST_, BROWSER, events.posts(Target.CLIENT_SIDE_DIAGNOSTIC)),
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
        ("/sdk/goals/{envId}", GET_, BROWSER, goals),
        ("/sdk/evalx/{envId}/contexts/{context}", GET_, BROWSER, evaluate),
        ("/sdk/evalx/{envId}/contexts", REPORT_, BROWSER, evaluate),
        ("/sdk/evalx/{envId}/context", REPORT_, BROWSER, evaluate),
        ("/sdk/evalx/{envId}/users/{context}", GET_, BROWSER, evaluate),
        ("/sdk/evalx/{envId}/users", REPORT_, BROWSER, evaluate),
        ("/sdk/evalx/{envId}/user", REPORT_, BROWSER, evaluate),
        ("/sdk/evalx/contexts/{context}", GET, SERVER, evaluate),
        ("/sdk/evalx/contexts", REPORT, SERVER, evaluate),
        ("/sdk/evalx/context", REPORT, SERVER, evaluate),
        ("/sdk/evalx/users/{context}", GET, SERVER, evaluate),
        ("/sdk/evalx/users", REPORT, SERVER, evaluate),
        ("/sdk/evalx/user", REPORT, SERVER, evaluate),
        ("/msdk/evalx/contexts/{context}", GET, MOBILE, evaluate),
        ("/msdk/evalx/contexts", REPORT, MOBILE, evaluate),
        ("/msdk/evalx/context", REPORT, MOBILE, evaluate),
        ("/msdk/evalx/users/{context}", GET, MOBILE, evaluate),
        ("/msdk/evalx/users", REPORT, MOBILE, evaluate),
        ("/msdk/evalx/user", REPORT, MOBILE, evaluate),
        ("/meval/{context}", GET, MOBILE, pings),
        ("/meval", REPORT, MOBILE, pings),
        ("/mping", GET, MOBILE, pings),
        ("/ping/{envId}", GET_, BROWSER, pings),
        ("/eval/{envId}/{context}", GET_, BROWSER, pings),
        ("/eval/{envId}", REPORT_, BROWSER, pings),
    )


def make_app(
    relay: Relay,
    polling: Polling,
    traffic: Traffic,
    events: Events | None = None,
    webhooks: Webhooks | None = None,
) -> ASGIApp:
    """Return the application.

    Args:
        relay: what is served.
        polling: answers polls; the front door has the same.
        traffic: counts requests; the front door has the same.
        events: takes events; None if they are off.
        webhooks: takes webhooks; None if they are off.
    """
    table = _table(_poll(polling), _stream(traffic), events or Events())
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
        (path, methods, Endpoint(relay, traffic, path, methods, access, respond))
        for path, methods, access, respond in table
    ]
    app = Starlette(
        routes=[
            *(Route(path, endpoint, methods=methods) for path, methods, endpoint in endpoints),
            *(Route(path, _page(answer), methods=GET) for path, answer in pages),
            *([Route(WEBHOOK, webhooks, methods=POST)] if webhooks else []),
        ],
        middleware=[
            *([Middleware(RequestLog)] if traffic.logs else []),
            Middleware(Defects),
            Middleware(CanonicalPaths),
        ],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )
    app.router.redirect_slashes = False
    if traffic.logs:
        return app
    posts = {path: Defects(e) for path, methods, e in endpoints if methods == POST}
    return Shortcut(app, posts)


def make_exporter(relay: Relay, traffic: Traffic, prefix: str) -> ASGIApp:
    """Return what is served on the port of `[Prometheus]`: the reference's figures, then ours."""
    page = _page(lambda _: metrics.exporter_page(relay, traffic, prefix))
    return Starlette(
        routes=[Route("/metrics", page, methods=GET)],
        middleware=[Middleware(Defects)],
        exception_handlers={404: _not_found, 405: _not_allowed},
    )


async def _not_found(_request: Request, _error: Exception) -> Response:
    return NOT_FOUND.as_response()


async def _not_allowed(_request: Request, error: Exception) -> Response:
    methods = error.headers["Allow"] if isinstance(error, HTTPException) and error.headers else ""
    allow = ", ".join(sorted(methods.split(", ")))
    return Answer(405, ((b"allow", allow.encode()),)).as_response()


def _page(answer: Callable[[str], Answer]) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return answer(request.path_params.get("environment", "")).as_response()

    return page


def _always(answer: Answer) -> Respond:
    async def respond(_request: Request, _environment: Environment) -> Response:
        return answer.as_response()

    return respond


def _poll(polling: Polling) -> Respond:
    async def respond(request: Request, environment: Environment) -> Response:
        none_match, encoding = header(request, "if-none-match"), header(request, "accept-encoding")
        answer = await polling.complete(environment, request.scope["path"], none_match, encoding)
        return (answer or NO_DATA).as_response()

    return respond


def _stream(traffic: Traffic) -> Respond:
    async def respond(request: Request, environment: Environment) -> Response:
        path = request.scope["path"]
        agent = user_agent(traffic, request)
        series = Series(environment.spec.name, path, "GET", SERVER.platform, agent)
        if request.method == "GET":
            traffic.new_streams[series].value += 1
        return StreamResponse(environment, STREAMS[path.encode()], traffic.streams[series])

    return respond
