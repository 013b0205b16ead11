"""Credentials: accepted forms, and refusals in ld-relay's words."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from relay.model.credential import MobileKey, SDKKey
from relay.relay import Directory
from relay.telemetry.traffic import RequestMetrics
from relay.web import responses
from relay.web.access import Access, resolve
from relay.web.routes import ROUTES, Route
from tests.support.serving import SDK_KEY, Served


def route_of(template: str) -> Route:
    return next(route for route in ROUTES if route.template == template)


POLL, MOBILE_PING, PING, FDV2 = map(
    route_of, ("/sdk/flags", "/mping", "/ping/{envId}", "/sdk/poll/eval")
)


def served() -> Served:
    return Served(mobile_key=MobileKey("mob-1"))


@pytest.mark.parametrize(
    ("header", "status"),
    [(b"", 401), (b"api_key  %b ", 0), (b"%b", 0), (b"  %b\t", 0), (b"api_key api_key %b", 401),
     (b"Bearer %b", 401), (b"other", 401), (b"mob-1", 401)],
)  # fmt: skip
def test_credentials(header, status):
    """A key is accepted alone or with the prefix `api_key`, and in place of no other kind."""
    relay = served().relay
    headers = {b"authorization": header.replace(b"%b", SDK_KEY.encode())}
    resolved = resolve(relay, POLL, headers)
    if status:
        assert isinstance(resolved, responses.PreparedResponse)
        assert resolved.status == status
    else:
        assert isinstance(resolved, Access)
        assert resolved.environment is relay.environments["main"]
        assert resolved.grant.credential == SDKKey(SDK_KEY)
    other = resolve(relay, MOBILE_PING, headers)
    assert isinstance(other, Access) == (header == b"mob-1")


@pytest.mark.parametrize(
    ("route", "headers", "environment_id", "query", "refusal"),
    [
        (POLL, {b"authorization": SDK_KEY.encode()}, "", b"filter=f", responses.UNKNOWN_FILTER),
        (POLL, {b"authorization": SDK_KEY.encode()}, "", b"a=b&filter=", None),
        (POLL, {b"authorization": b"sdk-x"}, "", b"filter=f", responses.UNKNOWN_CREDENTIAL),
        (POLL, {}, "", b"", responses.MALFORMED_CREDENTIAL),
        (PING, {}, "x", b"", responses.UNKNOWN_ENVIRONMENT_ID),
        (PING, {}, "", b"", responses.UNKNOWN_ENVIRONMENT_ID),
        (PING, {}, "env-1", b"filter=f", responses.UNKNOWN_FILTER),
        (PING, {}, "env-1", b"", None),
        (FDV2, {}, "", b"auth=env-1", None),
        (FDV2, {}, "", b"auth=mob-1", None),
        (FDV2, {b"authorization": b" mob-1"}, "", b"", None),
        (FDV2, {b"authorization": b"mob-1"}, "", b"auth=x", responses.UNKNOWN_CREDENTIAL),
        (FDV2, {}, "", b"auth=" + SDK_KEY.encode(), responses.UNKNOWN_CREDENTIAL),
        (FDV2, {}, "", b"", responses.UNKNOWN_CREDENTIAL),
        (FDV2, {}, "", b"auth=env-1&filter=f", None),
    ],
)
def test_refusals(route, headers, environment_id, query, refusal):
    """Unknown credentials, IDs and filters are refused in ld-relay's words."""
    resolved = resolve(served().relay, route, headers, environment_id, query)
    assert resolved is refusal if refusal else isinstance(resolved, Access)


@pytest.mark.parametrize(
    ("route", "headers", "environment_id", "query", "opens"),
    [
        (POLL, {b"authorization": SDK_KEY.encode()}, "", b"", True),
        (PING, {}, "env-1", b"", True),
        (POLL, {b"authorization": SDK_KEY.encode()}, "", b"filter=f", False),
        (POLL, {b"authorization": b"sdk-x"}, "", b"", False),
        (POLL, {}, "", b"", False),
        (PING, {}, "x", b"", False),
    ],
)
def test_until_the_list_is_known_no_credential_is_unknown(
    route, headers, environment_id, query, opens
):
    """A credential that is known opens all the same: it may be of a stored list."""
    relay = served().relay
    relay.directory = cast("Directory", SimpleNamespace(known=asyncio.Event()))
    resolved = resolve(relay, route, headers, environment_id, query)
    assert isinstance(resolved, Access) if opens else resolved is responses.NO_ENVIRONMENTS


def test_a_request_has_the_labels_of_its_route():
    """Metrics count by environment, template, method, kind of SDK and user agent."""
    headers = {b"authorization": b"mob-1", b"user-agent": b"Plain/1"}
    access = resolve(served().relay, MOBILE_PING, headers)
    assert isinstance(access, Access)
    traffic = RequestMetrics()
    labels = ("main", "/mping", "GET", "mobile", "Plain/1")
    assert access.labels(traffic, "GET", headers) == labels
    headers[b"x-launchdarkly-user-agent"] = b"SDK/2"
    assert access.labels(traffic, "GET", headers)[4] == "SDK/2"


def test_a_debugger_shows_no_credential():
    """An access states its route and environment."""
    headers = {b"authorization": SDK_KEY.encode()}
    access = resolve(served().relay, POLL, headers)
    assert repr(access) == "<Access /sdk/flags 'main'>"
