"""Configuration as Secrets, YAML blocks and clusters make it, and what may go out because of it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from urllib.parse import quote

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from relay.build.relay import build
from relay.config.load import load
from relay.errors import ConfigError
from relay.model.credential import EnvironmentID, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.reply import Reply
from relay.registry import Grant
from relay.stores.redis.connect import connect
from relay.stores.redis.store import RedisStore
from relay.telemetry.log import JSONFormatter, TextFormatter
from relay.web.access import Access
from relay.web.cors import cors_lines, with_cors
from relay.web.endpoints.goals import GoalsHandler
from relay.web.middleware import PathNormalizationMiddleware
from relay.web.responses import PreparedResponse, environment_headers
from relay.web.routes import ROUTES, Endpoint
from tests.support.data import all_data, flag
from tests.support.process import RelayProcess
from tests.support.serving import SDK_KEY, Served, ask, until
from tests.support.upstream import ScriptedUpstream, body

USER, PASSWORD = "me", "pässword:of-mine"
BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(name="upstream")
async def scripted_upstream():
    """It has one flag for `SDK_KEY`."""
    async with ScriptedUpstream() as upstream:
        upstream.serve(SDK_KEY, all_data(flag("lamp", value="on")))
        yield upstream


async def test_secrets_in_files(upstream, tmp_path):
    """The relay serves with a mounted key, and says where it came from but not what it is."""
    key, url = tmp_path / "key", tmp_path / "url"
    key.write_text(f"{SDK_KEY}\n")
    url.write_text(f"{upstream.url}\n")
    variables = {"LD_ENV_main_FILE": str(key), "STREAM_URI_FILE": str(url), "LOG_LEVEL": "debug"}
    async with RelayProcess(tmp_path, **variables) as relay:
        await relay.said('Initialized LaunchDarkly client for "main"')
        reply = await ask(relay.address, "/sdk/flags/lamp", [("authorization", SDK_KEY)])
        assert reply.status == 200
        assert SDK_KEY not in relay.log
        assert await relay.stop() == 0
    key.unlink()
    relay = RelayProcess(tmp_path, **variables)
    await relay.spawn()
    assert await relay.ended() == 1
    assert f"LD_ENV_main_FILE={key}: No such file or directory" in relay.log


async def test_values_that_are_not_clean_work(upstream, tmp_path):
    """Line ends, blanks, quotation marks, byte order marks, and variables of services."""
    async with RelayProcess(
        tmp_path,
        STREAM_URI=f'"{upstream.url}"\r\n',
        LD_ENV_main=f"\ufeff{SDK_KEY}\r\n",
        LD_CLIENT_SIDE_ID_main='"id-main"\n',
        LD_MOBILE_KEY_main=" mob-main\u00a0",
        LD_ALLOWED_ORIGIN_main="https://A.example/, https://b.example\n",
        LD_ALLOWED_HEADER_main="X-One,\n X-Two\n",
        USE_PROMETHEUS="false\n",
        PROMETHEUS_PORT="tcp://10.0.0.1:9090",
        REDIS_PORT="tcp://10.0.0.1:6379",
    ) as relay:
        await relay.said("Initialized")
        for path in ("/sdk/latest-all", "/sdk/flags/lamp"):
            reply = await ask(relay.address, path, [("Authorization", SDK_KEY)])
            assert (reply.status, reply.headers["x-ld-envid"]) == (200, "id-main")
        browser = [("Origin", "https://b.example")]
        for path in ("/sdk/evalx/id-main/contexts/eyJrZXkiOiJhIn0", "/sdk/goals/id-main"):
            reply = await ask(relay.address, path, browser)
            assert reply.headers["access-control-allow-origin"] == "https://b.example"
            assert reply.headers["access-control-allow-headers"].endswith(",X-One,X-Two")
        mobile = [("Authorization", "mob-main")]
        path = "/msdk/evalx/contexts/eyJrZXkiOiJhIn0"
        assert (await ask(relay.address, path, mobile)).status == 200


@pytest.mark.parametrize("source", ["streaming", "polling"])
async def test_user_and_password_in_addresses(source, upstream, tmp_path):
    """The key goes where there is one, and they go where there is none, as with the reference."""
    upstream.always(BASIC, body(b'[{"kind":"click"}]', "application/json"))
    address = upstream.url.replace("://", f"://{USER}:{quote(PASSWORD)}@")
    async with RelayProcess(
        tmp_path,
        STREAM_URI=address,
        BASE_URI=address,
        EVENTS_HOST=address,
        DATA_SOURCE=source,
        LOG_LEVEL="debug",
        USE_EVENTS="true",
        EVENTS_FLUSH_INTERVAL="10ms",
        LD_ENV_main=SDK_KEY,
        LD_CLIENT_SIDE_ID_main="id-main",
    ) as relay:
        await relay.said("Initialized")
        reply = await ask(relay.address, "/sdk/goals/id-main")
        assert (reply.status, reply.body) == (200, b'[{"kind":"click"}]')
        key = [("Authorization", SDK_KEY)]
        for path, headers in (
            ("/bulk", key),
            ("/diagnostic", key),
            ("/events/bulk/id-main", []),
            ("/events/diagnostic/id-main", []),
        ):
            event = b'{"kind":"x"}' if "diagnostic" in path else b'[{"kind":"custom","key":"x"}]'
            sent = [*headers, ("X-LaunchDarkly-Event-Schema", "4")]
            reply = await ask(relay.address, path, sent, method="POST", body=event)
            assert reply.status == 202
        await until(lambda: len(upstream.accepted) >= 4)
        shown = (await ask(relay.address, "/status")).body.decode()
    credentials = {post.path: post.headers.get("Authorization") for post in upstream.accepted}
    assert credentials == {
        "/bulk": SDK_KEY,
        "/diagnostic": SDK_KEY,
        "/events/bulk/id-main": BASIC,
        "/events/diagnostic/id-main": BASIC,
    }
    asked = {
        each.path.partition("?")[0]: each.headers["Authorization"] for each in upstream.requests
    }
    assert asked["/all" if source == "streaming" else "/sdk/latest-all"] == SDK_KEY
    assert asked["/sdk/goals/id-main"] == BASIC
    for secret in (PASSWORD, quote(PASSWORD), BASIC):
        assert secret not in relay.log + shown
    assert f"{USER}:********@" in relay.log


async def test_a_name_that_is_not_utf_8_ends_the_start(tmp_path):
    """By its name, instead of failing for all who ask for the state of the relay."""
    relay = RelayProcess(tmp_path, **{"LD_ENV_caf\udce9": SDK_KEY})
    await relay.spawn()
    assert await relay.ended() == 1
    assert r"LD_ENV_caf\xe9: the variable's name is not UTF-8" in relay.log


# Whatever the text


odd = st.text(st.characters() | st.sampled_from("\r\n\0\t \ufeff\u00a0\u2028\udc80\"',;/:*"))
"""Texts of all characters, and often of those that make trouble."""
likely = st.sampled_from(["sdk-1", "id-1", "https://a.example", "X-A", "p"])
texts = st.tuples(odd, likely, odd).map("".join) | odd


def head_of(block: bytes) -> h11.Response:
    """The head of a response as h11 reads it, which judges."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(block + b"\r\n")
    response = client.next_event()
    assert isinstance(response, h11.Response), response
    return response


def see_heads(spec: EnvironmentSpec, origin: bytes) -> None:
    """Parse the heads that both doors make for an environment."""
    route = next(route for route in ROUTES if route.for_browsers)
    lines = with_cors(environment_headers(spec), cors_lines(spec, origin, route))
    head = head_of(PreparedResponse(200, lines).head)
    assert [name for name, _ in head.headers] == [*(n for n, _ in lines), b"content-length"]


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["ENV", "CLIENT_SIDE_ID", "MOBILE_KEY", "PREFIX", "ALLOWED_ORIGIN",
                         "ALLOWED_HEADER"]), texts),
    st.text(max_size=3),
)  # fmt: skip
def test_no_text_of_the_configuration_ends_a_header_a_line_or_a_key(given_texts, name):
    """It is refused, or everything that is made of it is in one piece."""
    variables = {f"LD_{option}_{name}": text for option, text in given_texts.items()}
    variables |= {"USE_REDIS": "true", "LOG_LEVEL": "none"}
    variables.setdefault(f"LD_ENV_{name}", "sdk-1")
    try:
        config = load("", True, False, variables)
    except ConfigError as e:
        for problem in e.problems:
            lines_of(problem)
        return
    relay = build(config)
    for environment in relay.environments.values():
        spec = environment.spec
        assert spec.sdk_key.value.isascii()
        see_heads(spec, b"https://a.example")
        assert config.redis
        prefix = RedisStore(connect(config.redis), spec.prefix).prefix
        assert prefix == (spec.prefix or "launchdarkly")
        assert not set(prefix) & set("\r\n\0")
        lines_of(f"{spec.name} {prefix}")


@given(texts, texts, texts, st.binary())
def test_no_text_from_elsewhere_ends_a_header(environment_id, allowed, header, origin):
    """An ID, origins and headers that upstream may say one day, and the origin of a request."""
    spec = EnvironmentSpec(
        "x",
        SDKKey("sdk-1"),
        environment_id=EnvironmentID(environment_id),
        allowed_origins=(allowed,),
        allowed_headers=(header,),
    )
    see_heads(spec, origin)
    see_heads(EnvironmentSpec("x", SDKKey("sdk-1")), origin)


@given(st.binary(), st.binary())
def test_no_target_of_a_request_ends_a_redirection(path, query):
    """The location holds what the client sent."""
    messages = []

    async def send(message):
        messages.append(message)

    raw = b"//" + path
    scope = {
        "type": "http",
        "method": "GET",
        "path": raw.decode("utf-8", "replace"),
        "raw_path": raw,
        "query_string": query,
        "headers": [],
    }
    asyncio.run(PathNormalizationMiddleware(None)(scope, None, send))
    start = messages[0]
    lines = b"".join(b"%b: %b\r\n" % header for header in start["headers"])
    head_of(b"HTTP/1.1 %d x\r\n%b" % (start["status"], lines))


said = st.binary().map(lambda value: value.decode("utf-8", "surrogateescape"))
"""As the HTTP client gives the bytes of a header."""


@given(
    st.dictionaries(
        st.sampled_from(["content-type", "cache-control", "etag", "expires", "last-modified"]), said
    ),
    st.sampled_from([200, 304, 404, 500]),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_header_of_launchdarkly_ends_ours(headers, status):
    """Goals pass some of them on."""

    async def fetch(*_args, **_kwargs):
        return Reply(status, headers, b"[]")

    goals = GoalsHandler(fetch, "http://h")
    served = Served()
    route = next(route for route in ROUTES if route.endpoint is Endpoint.GOALS)
    access = Access(route, Grant(served.environment, EnvironmentID("env-1")))
    request = Request({"type": "http", "headers": []})
    response = asyncio.run(goals.handle(request, access))
    head_of(response.head)


def lines_of(text: str) -> str:
    """The one line that a text becomes in the log, of each format."""
    record = logging.LogRecord("relay", logging.INFO, "x", 1, "%s", (text,), None)
    record.masked_key = f"...{text[-4:]}"
    for formatter in (TextFormatter(), JSONFormatter()):
        line = formatter.format(record)
        assert len(line.splitlines()) == 1
        line.encode()
    json.loads(line)
    record.exc_info = ValueError, ValueError(text), None
    _, *rest = TextFormatter().format(record).splitlines()
    assert rest
    assert all(part.startswith("    ") for part in rest)
    return line


@given(odd)
def test_no_text_makes_two_lines_of_one(text):
    """Names, keys of items, reasons of failures, and the text of an exception below its line."""
    lines_of(text)
