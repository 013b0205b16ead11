"""The application: routes, methods, paths, CORS, and the fallback of FDv2 SDKs."""

from __future__ import annotations

import asyncio
import logging

import pytest

from relay.environment import Environment
from relay.model.credential import MobileKey
from relay.relay import Relay
from relay.streams.hub import Hub
from relay.web.endpoints.polling import PollingHandler
from relay.web.middleware import canonical
from tests.support.contracts import ScriptedSource
from tests.support.serving import SDK_KEY, Served, ask, serving

SDK = (("Authorization", SDK_KEY),)
MOBILE = (("Authorization", "mob-1"),)
CONTEXT = "eyJrZXkiOiJhIn0"
ROUTES = [
    ("GET", f"/sdk/evalx/env-1/contexts/{CONTEXT}", ()),
    ("REPORT", "/sdk/evalx/env-1/context", ()),
    ("REPORT", "/sdk/evalx/env-1/contexts", ()),
    ("GET", f"/sdk/evalx/env-1/users/{CONTEXT}", ()),
    ("REPORT", "/sdk/evalx/env-1/user", ()),
    ("REPORT", "/sdk/evalx/env-1/users", ()),
    ("GET", f"/sdk/evalx/contexts/{CONTEXT}", SDK),
    ("REPORT", "/sdk/evalx/context", SDK),
    ("GET", f"/sdk/evalx/users/{CONTEXT}", SDK),
    ("REPORT", "/sdk/evalx/user", SDK),
    ("GET", f"/msdk/evalx/contexts/{CONTEXT}", MOBILE),
    ("REPORT", "/msdk/evalx/context", MOBILE),
    ("GET", f"/msdk/evalx/users/{CONTEXT}", MOBILE),
    ("REPORT", "/msdk/evalx/user", MOBILE),
    ("GET", "/sdk/goals/env-1", ()),
    ("GET", f"/meval/{CONTEXT}", MOBILE),
    ("REPORT", "/meval", MOBILE),
    ("GET", "/mping", MOBILE),
    ("GET", "/ping/env-1", ()),
    ("GET", f"/eval/env-1/{CONTEXT}", ()),
    ("REPORT", "/eval/env-1", ()),
    ("POST", "/bulk", SDK),
    ("POST", "/diagnostic", SDK),
    ("POST", "/mobile", MOBILE),
    ("POST", "/mobile/events", MOBILE),
    ("POST", "/mobile/events/bulk", MOBILE),
    ("POST", "/mobile/events/diagnostic", MOBILE),
    ("POST", "/events/bulk/env-1", ()),
    ("POST", "/events/diagnostic/env-1", ()),
    ("GET", "/a/env-1.gif?d=W10=", ()),
]
"""Routes for client-side SDKs and for events: method, path, credential."""
STREAMS = ("/meval", "/mping", "/ping/", "/eval/")
JSON = ("Content-Type", "application/json")


@pytest.fixture
async def address():
    """A relay with an environment that has every kind of credential, and no data."""
    async with serving(with_all_credentials()) as address:
        yield address


def with_all_credentials(**more) -> Served:
    return Served(mobile_key=MobileKey("mob-1"), **more)


async def test_without_data_or_events_routes_are_503_not_404(address):
    """They refuse unknown credentials, and respond to others with 503 in JSON; goals are empty."""
    for method, path, credential in ROUTES:
        stranger = path.replace("env-1", "env-2")
        reply = await ask(
            address, stranger, [("Authorization", "sdk-x")], method=method, body=b"{}"
        )
        assert reply.status == (404 if "env-2" in stranger else 401), path
        if path.startswith(STREAMS):
            continue  # streams wait for data
        reply = await ask(address, path, [*credential, JSON], method=method, body=b'{"key":"a"}')
        assert reply.status == (200 if "goals" in path else 503), path
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-ld-envid"] == "env-1"


async def test_browsers_may_read_every_response(address):
    """Routes for browsers answer preflights, and put CORS headers on errors, too."""
    for method, path, credential in ROUTES:
        if credential:
            continue
        origin = [("Origin", "https://app.example")]
        preflight = await ask(address, path, origin, method="OPTIONS")
        assert (preflight.status, preflight.body) == (200, b"")
        posts = method == "REPORT" and not path.startswith(STREAMS)
        methods = "REPORT,POST,OPTIONS" if posts else f"{method},OPTIONS"
        assert preflight.headers["access-control-allow-methods"] == methods
        unknown = path.replace("env-1", "env-2")
        for target in [unknown] if path.startswith(STREAMS) else [path, unknown]:
            reply = await ask(address, target, origin, method=method, body=b"{}")
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
            assert reply.headers["vary"] == "Origin"
        assert (await ask(address, unknown, origin, method="OPTIONS")).status == 404


async def test_configured_origins():
    """Only configured origins are allowed; configured headers are added to the default ones."""
    more = {"allowed_origins": ("https://a", "https://b"), "allowed_headers": ("X-Extra",)}
    async with serving(with_all_credentials(**more)) as address:
        for origin, allowed in (("https://b", "https://b"), ("https://c", "https://a")):
            reply = await ask(address, "/sdk/goals/env-1", [("Origin", origin)])
            assert reply.headers["access-control-allow-origin"] == allowed
            assert reply.headers["access-control-allow-headers"].endswith("-Tags,X-Extra")


FDV2_REQUESTS = [
    ("GET", f"/{CONTEXT}?auth=env-1", ()),
    ("GET", f"/{CONTEXT}?withReasons=true&auth=mob-1", ()),
    ("POST", "?auth=env-1", ()),
    ("REPORT", "", MOBILE),
    ("GET", f"/{CONTEXT}", [("Authorization", "env-1")]),
]


@pytest.mark.parametrize("path", ["/sdk/stream/eval", "/sdk/poll/eval"])
async def test_fdv2_client_side_sdks_need_a_credential(address, path):
    """Preflights need none, for browsers send none with them."""
    for method, target, _ in FDV2_REQUESTS:
        preflight = await ask(address, path + target.partition("?")[0], method="OPTIONS")
        assert preflight.status == 200
        assert method in preflight.headers["access-control-allow-methods"].split(",")
    for auth in ("", "?auth=sdk-x", f"?auth={SDK_KEY}"):
        reply = await ask(address, f"{path}/{CONTEXT}{auth}")
        assert reply.status == 401
        assert reply.body.startswith(b"Relay Proxy does not recognize the client credential")


@pytest.mark.parametrize("front", [True, False], ids=["front", "app"])
async def test_fdv2_can_be_switched_off(front):
    """All SDKs that speak it are led to FDv1 then, by headers that scripts can read, too."""
    served = with_all_credentials()
    served.relay.fdv1_fallback = True
    key = [("Authorization", SDK_KEY)]
    requests = [("GET", "/sdk/poll", key), ("GET", "/sdk/stream", key)]
    for path in ("/sdk/stream/eval", "/sdk/poll/eval"):
        requests += [(method, path + target, key) for method, target, key in FDV2_REQUESTS]
    async with serving(served, front=front) as address:
        for method, target, credential in requests:
            reply = await ask(address, target, credential, method=method, body=b"{}")
            assert (reply.status, reply.headers["x-ld-fd-fallback"]) == (503, "true")
            assert reply.headers["x-ld-fd-fallback-ttl"] == "3600"
            if "/eval" in target:
                exposed = reply.headers["access-control-expose-headers"].split(",")
                assert {"X-LD-FD-Fallback", "X-LD-FD-Fallback-TTL", "X-LD-EnvID"} <= {*exposed}
                assert reply.headers["access-control-allow-origin"] == "*"
        assert (await ask(address, "/sdk/poll", [("Authorization", "sdk-x")])).status == 401
        assert (await ask(address, "/sdk/latest-all", key)).headers.get("x-ld-fd-fallback") is None


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/all", "GET, HEAD"),
        ("OPTIONS", "/sdk/flags", "GET, HEAD"),
        ("GET", "/bulk", "POST"),
        ("DELETE", "/sdk/goals/nobody", "GET, HEAD, OPTIONS"),
        ("PUT", "/status", "GET, HEAD"),
        ("POST", "/readyz", "GET, HEAD"),
    ],
)
async def test_methods(address, method, path, allow):
    """An unsupported method is a 405 that lists the allowed ones, without authentication."""
    reply = await ask(address, path, method=method)
    assert (reply.status, reply.headers["allow"], reply.body) == (405, allow, b"")


@pytest.mark.parametrize(
    ("path", "canonical_path"),
    [
        ("/", "/"), ("//", "/"), ("/a/", "/a/"), ("/a//", "/a/"), ("//evil.example/x", "/evil.example/x"),
        ("/a/./b", "/a/b"), ("/a/../b", "/b"), ("/../../b", "/b"), ("/a/..", "/"), ("///..//", "/"), ("a", "/a"),
    ],
)  # fmt: skip
def test_canonical(path, canonical_path):
    """Canonical paths begin with one slash, so that a redirect never leads to another host."""
    assert canonical(path) == canonical_path


async def test_paths(address):
    """Paths that are not canonical are redirected with their query; broken escapes are refused."""
    reply = await ask(address, "//evil.example/%0d%0aX:%20y?a=b%zz", method="POST")
    assert (reply.status, reply.body) == (301, b"")
    assert reply.headers["location"] == "/evil.example/%0D%0AX:%20y?a=b%zz"
    reply = await ask(address, "/sdk/flags/%zz", SDK)
    assert (reply.status, reply.body, reply.headers["connection"]) == (
        400,
        b"400 Bad Request",
        "close",
    )
    assert (await ask(address, "*", method="OPTIONS")).status == 200
    assert (await ask(address, "/livez?a=%zz")).status == 200
    assert (await ask(address, "http://any.example/livez")).status == 200
    assert (await ask(address, "/livez#x")).status == 404
    assert (await ask(address, "/livez/")).status == 404


async def test_the_first_value_counts(address):
    """The first of several query parameters or headers of one name is used."""
    assert (await ask(address, "/sdk/poll?filter=&filter=x", SDK)).status == 503
    assert (await ask(address, "/sdk/latest-all?filter=x&filter=", SDK)).status == 404
    stranger = ("Authorization", "sdk-x")
    assert (await ask(address, "/sdk/poll", [*SDK, stranger])).status == 503
    assert (await ask(address, "/sdk/poll", [stranger, *SDK])).status == 401


def tracebacks(caplog) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.exc_info]


class BrokenPolling(PollingHandler):
    """Raises an unexpected error."""

    async def handle(self, *_: object) -> None:
        raise RuntimeError("unexpected")

    def respond(self, *_: object) -> None:
        return None


async def test_an_unexpected_error_is_an_empty_500(caplog):
    """An unexpected error is logged once, with its traceback, and hidden from the client."""
    served = Served()
    served.use(polling=BrokenPolling())
    async with serving(served) as address:
        reply = await ask(address, "/sdk/flags", SDK)
        assert (reply.status, reply.body) == (500, b"")
        assert (await ask(address, "/livez")).status == 200
    assert len(tracebacks(caplog)) == 1
    assert SDK_KEY not in caplog.text


async def test_an_error_in_a_stream_closes_the_connection(caplog):
    """An unexpected error after the head has been sent is logged once, too."""

    class BrokenHub(Hub):
        def subscribe(self, *_: object) -> None:
            raise RuntimeError("unexpected")

    served = Served()
    environment = Environment(
        served.environment.spec, ScriptedSource(), BrokenHub({}), logging.getLogger("main")
    )
    served.serve(Relay([environment], 0))
    served.source = environment._source
    async with serving(served, front=False) as address:
        received = b""
        reader, writer = await address.connect()
        writer.write(f"GET /all HTTP/1.1\r\nHost: x\r\nAuthorization: {SDK_KEY}\r\n\r\n".encode())
        async with asyncio.timeout(5):
            received = await reader.read()
        writer.close()
        assert received.startswith(b"HTTP/1.1 200 ")
        assert not received.endswith(b"0\r\n\r\n")
    assert len(tracebacks(caplog)) == 1
