"""The table of routes: plain paths are matched as the application matches them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.routing import Match
from starlette.routing import Route as StarletteRoute

from relay.model.event import EventsEndpoint
from relay.model.payload import EMPTY
from relay.registry import Grant
from relay.web.access import Access
from relay.web.endpoints.polling import PollingHandler
from relay.web.middleware import canonical
from relay.web.routes import BROWSER, FDV2_CLIENT, POLLS, ROUTES, Endpoint, match
from tests.support.serving import Served


@pytest.mark.parametrize(
    ("method", "path", "template", "parameters"),
    [
        ("GET", "/sdk/flags", "/sdk/flags", ("", "")),
        ("GET", "/sdk/flags/a.b-c", "/sdk/flags/{key}", ("", "a.b-c")),
        ("GET", "/sdk/segments/flags", "/sdk/segments/{key}", ("", "flags")),
        ("GET", "/sdk/evalx/contexts/e30=", "/sdk/evalx/contexts/{context}", ("", "e30=")),
        (
            "GET",
            "/sdk/evalx/users/contexts/x",
            "/sdk/evalx/{envId}/contexts/{context}",
            ("users", "x"),
        ),
        ("POST", "/sdk/evalx/contexts/contexts", "/sdk/evalx/{envId}/contexts", ("contexts", "")),
        ("GET", "/sdk/evalx/id/users/x", "/sdk/evalx/{envId}/users/{context}", ("id", "x")),
        ("POST", "/events/bulk/id", "/events/bulk/{envId}", ("id", "")),
        ("GET", "/a/id.gif", "/a/{envId}.gif", ("id", "")),
        ("GET", "/eval/id/x", "/eval/{envId}/{context}", ("id", "x")),
        ("REPORT", "/eval/id", "/eval/{envId}", ("id", "")),
        ("GET", "/eval/id", None, None),
        ("HEAD", "/all", None, None),
        ("POST", "/all", None, None),
        ("GET", "/status", None, None),
        ("GET", "http://host/all", None, None),
        ("GET", "", None, None),
        ("GET", "*", None, None),
    ],
)
def test_match(method, path, template, parameters):
    """A route has the method and the template; parameters are taken from the path."""
    found = match(method.encode(), path.encode())
    assert (found and found.route.template) == template
    if found:
        assert (found.environment_id, found.segment.decode()) == parameters


@pytest.mark.parametrize(
    "key", ["", ".", "..", "a/b", "/", "a%20b", "a#b", "a b", "\xe9", "a\n", "a?b", "\x7f"]
)
def test_paths_that_have_to_be_decoded_or_redirected_match_nothing(key):
    """Escapes, odd characters and segments that are not canonical are the application's."""
    for prefix in ("/sdk/flags/", "/meval/", "/eval/id/", "/ping/"):
        assert match(b"GET", f"{prefix}{key}".encode("latin-1")) is None


SEGMENTS = {part for route in ROUTES for part in route.template.split("/") if part}


@given(
    st.sampled_from(("GET", "POST", "REPORT")),
    st.lists(st.sampled_from([*sorted(SEGMENTS), "x", "..", "%41", "e30="]), max_size=6),
)
@example("GET", ["sdk", "evalx", "contexts", "contexts"])
def test_the_application_finds_the_same_route(method, parts):
    """Whatever is matched is also what Starlette's router chooses, with the same parameters."""
    path = "/" + "/".join(parts)
    found = match(method.encode(), path.encode())
    if found is None:
        return
    assert canonical(path) == path
    scope = {"type": "http", "method": method, "path": path, "path_params": {}}
    for route in ROUTES:
        starlette = StarletteRoute(route.template, lambda: None, methods=route.methods)
        matched, child = starlette.matches(scope)
        if matched is Match.FULL:
            break
    assert route is found.route
    parameters = child["path_params"]
    assert parameters.pop("envId", "") == found.environment_id
    assert next(iter(parameters.values()), "") == found.segment.decode()


def test_what_the_table_says_of_a_route_is_consistent():
    """Browsers' routes have preflights, no other has; events routes have an endpoint upstream."""
    assert len({(route.template, method) for route in ROUTES for method in route.methods}) == sum(
        len(route.methods) for route in ROUTES
    )
    for route in ROUTES:
        assert route.for_browsers == (route.auth in (BROWSER, FDV2_CLIENT))
        assert ("OPTIONS" in route.methods) == route.for_browsers
        assert ("{envId}" in route.template) == (route.auth is BROWSER)
        assert (route.events is not None) == (route.endpoint is Endpoint.EVENTS)
    assert {route.events for route in ROUTES} == {*EventsEndpoint, None}
    assert len(POLLS) == 5


def test_every_poll_of_the_table_is_served():
    """A route of polls that the handler does not know is found here, not by a client."""
    environment = Served().environment
    environment.payload = EMPTY
    polling = PollingHandler()
    for route in ROUTES:
        if route.endpoint is Endpoint.POLL:
            access = Access(route, Grant(environment, environment.spec.sdk_key))
            response = polling.respond(access, "a" if "{key}" in route.template else "", b"", b"")
            assert response is not None
            assert response.status == (404 if "{key}" in route.template else 200)


def test_only_events_routes_have_an_events_endpoint():
    """A handler of events cannot be put on another route unnoticed."""
    poll = next(route for route in ROUTES if route.endpoint is Endpoint.POLL)
    with pytest.raises(ValueError, match="/sdk/flags"):
        _ = poll.events_endpoint
