"""Evaluation for client-side SDKs, and goals: bad input, caching, secure mode, and the SDKs themselves."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from relay.build.relay import build
from relay.config.load import load
from relay.server.options import ServerOptions
from relay.server.site import build_site
from relay.web.endpoints.goals import GoalsHandler
from relay.web.fastpath.shared import ConnectionLimits
from relay.web.handlers import Handlers
from tests.support import data
from tests.support.clients import client
from tests.support.sdk import ANNA, SOMEBODY, SDKFailed, sees
from tests.support.serving import SDK_KEY, Address, Reply, ask, serving_site, site_of, until
from tests.support.upstream import ScriptedUpstream, hang_up, status

STRICT_KEY = "sdk-5ca1ab1e-0002-4000-8000-00000000a002"
VARIABLES = {
    "LD_ENV_main": SDK_KEY,
    "LD_MOBILE_KEY_main": "mob-main",
    "LD_CLIENT_SIDE_ID_main": "id-main",
    "LD_TTL_main": "5m",
    "LD_ENV_strict": STRICT_KEY,
    "LD_CLIENT_SIDE_ID_strict": "id-strict",
    "LD_MOBILE_KEY_strict": "mob-strict",
    "LD_SECURE_MODE_strict": "true",
    "MAX_CLIENT_REQUEST_BODY_SIZE": "1MiB",
    "USE_EVENTS": "true",
    "EVENTS_FLUSH_INTERVAL": "50ms",
}
OPEN = {"clientSideAvailability": {"usingEnvironmentId": True, "usingMobileKey": True}}
HIDDEN = {"clientSideAvailability": {"usingEnvironmentId": False, "usingMobileKey": False}}
FOR_ANNA = {"variations": ["anna", "others"], "fallthrough": {"variation": 1}}
FLAGS = [
    data.flag("lamp", value="on", **OPEN),
    data.flag("who", **(OPEN | FOR_ANNA), targets=[{"variation": 0, "values": ["anna"]}]),
    data.flag("hidden", value="unseen", **HIDDEN),
]
JSON = (("Content-Type", "application/json"),)
BROWSER, MOBILE, SERVER = "/sdk/evalx/id-main", "/msdk/evalx", "/sdk/evalx"
KEYS = {
    BROWSER: (),
    MOBILE: (("Authorization", "mob-main"),),
    SERVER: (("Authorization", SDK_KEY),),
}


@asynccontextmanager
async def serving(
    upstream: ScriptedUpstream, *, front: bool = True, items: list[dict] = FLAGS, **more: str
) -> AsyncGenerator[Address, None]:
    """A relay with two environments, one of them in secure mode, that have these items."""
    text = data.all_data(*items)
    upstream.serve(SDK_KEY, text)
    upstream.serve(STRICT_KEY, text)
    here = dict.fromkeys(("STREAM_URI", "CLIENT_SIDE_BASE_URI", "EVENTS_HOST"), upstream.url)
    config = load("", True, False, {**VARIABLES, **here, **more})
    site = build_site(config, ConnectionLimits())
    relay = site.relay
    assert relay.events
    async with serving_site(site, ServerOptions(0, drain=2), front=front) as port:
        delivering = asyncio.create_task(relay.events.run())
        await until(lambda: all(e.payload is not None for e in relay.environments.values()))
        yield Address(port)
        delivering.cancel()
        await asyncio.wait([delivering])


@pytest.fixture
async def upstream():
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture(params=[True, False], ids=["front", "app"])
async def relay(request, upstream):
    async with serving(upstream, front=request.param) as address:
        yield address


def encoded(context: object) -> str:
    text = context if isinstance(context, bytes) else json.dumps(context).encode()
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def values(reply: Reply) -> dict:
    assert reply.status == 200, reply
    body = reply.body
    if reply.headers.get("content-encoding") == "gzip":
        body = gzip.decompress(body)
    return {key: result["value"] for key, result in json.loads(body).items()}


def message(reply: Reply) -> str:
    assert reply.headers["content-type"] == "application/json"
    return json.loads(reply.body)["message"]


@pytest.mark.parametrize("method", ["GET", "REPORT", "POST"])
@pytest.mark.parametrize("name", ["contexts", "users", "context", "user"])
@pytest.mark.parametrize("routes", KEYS)
async def test_each_way_to_ask_gives_the_flags_of_the_audience(relay, routes, name, method):
    """Singular and plural names, path and body, for browsers, mobile SDKs and servers."""
    if method == "GET" and not name.endswith("s"):
        return  # such a route never was
    if method == "GET":
        reply = await ask(relay, f"{routes}/{name}/{encoded(ANNA)}", KEYS[routes])
    else:
        headers = (*KEYS[routes], ("Content-Type", "Application/JSON; charset=utf-8"))
        body = json.dumps(ANNA).encode()
        chunked = method == "REPORT"  # as Node does
        reply = await ask(
            relay, f"{routes}/{name}", headers, method=method, body=body, chunked=chunked
        )
    hidden = {"hidden": "unseen"} if routes == SERVER else {}
    assert values(reply) == {"lamp": "on", "who": "anna", **hidden}
    assert reply.headers["x-ld-envid"] == "id-main"
    assert ("access-control-allow-origin" in reply.headers) == (routes == BROWSER)


PERSON = "secret-person"
BAD_BASE64 = "context part of URL path did not decode as valid base64"
BAD_CONTEXT = "context part of URL path did not decode to valid evaluation context as JSON"
DEEP = b'{"kind":"user","key":"%b","x":%b1%b}'
BAD_SEGMENTS = {
    "!!!!": BAD_BASE64,
    "e": BAD_BASE64,
    "%20" + encoded(ANNA): BAD_BASE64,
    "=" * 6 + encoded(ANNA): BAD_BASE64,
    "%C3%BC": BAD_BASE64,
    "====": BAD_CONTEXT,
    encoded(b"[1]"): BAD_CONTEXT,
    encoded(b"null"): BAD_CONTEXT,
    encoded(b'{"key":"%b"' % PERSON.encode()): BAD_CONTEXT,
    encoded({"kind": "user", "key": ["secret-person"]}): BAD_CONTEXT,
    encoded({"kind": "multi"}): BAD_CONTEXT,
    encoded({"kind": PERSON + "!", "key": "a"}): BAD_CONTEXT,
    encoded({"kind": "multi", "user": {"key": PERSON}, "org": PERSON}): BAD_CONTEXT,
    encoded(DEEP % (PERSON.encode(), b"[" * 10_000, b"]" * 10_000)): BAD_CONTEXT,
    encoded({"key": ""}): "User must have a 'key' attribute",
}


@pytest.mark.parametrize("segment", BAD_SEGMENTS, ids=lambda text: text[:12])
async def test_bad_contexts_in_a_path_are_refused(relay, segment):
    """With the documented text, and readable for pages of any origin."""
    reply = await ask(relay, f"{BROWSER}/contexts/{segment}")
    assert (reply.status, message(reply)) == (400, BAD_SEGMENTS[segment])
    assert reply.headers["access-control-allow-origin"] == "*"


NOT_CONTEXTS = [
    b"",
    b"secret-person",
    b'{"key":"secret-person"',
    b'{"key":"secret-person"} secret-person',
    b'{"kind":"user","key":{"secret-person":1}}',
    b'{"kind":"secret-person?","key":"a"}',
    b'{"key":"secret-person","custom":["secret-person"]}',
    b'{"key":"secret-person","name":5}',
    b'{"kind":"multi","secret-person":{"key":""}}',
    DEEP % (b"secret-person", b"[" * 100_000, b"]" * 100_000),
    DEEP % (b"secret-person", b'{"a":' * 100_000, b"}" * 100_000),
    b"[" * 500_000,
]


@pytest.mark.parametrize("body", NOT_CONTEXTS, ids=lambda body: body[:24])
async def test_bad_contexts_in_a_body_are_refused(relay, body):
    """At once, whatever they hold, and nothing of it comes back."""
    start = time.monotonic()
    reply = await ask(
        relay, f"{MOBILE}/context", (*KEYS[MOBILE], *JSON), method="REPORT", body=body
    )
    assert reply.status == 400
    assert PERSON not in message(reply)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/vnd.api+json", "json", "application/json5"]
)
async def test_a_body_that_is_not_declared_as_json_is_refused(relay, content_type):
    """415 in plain text, as ever."""
    headers = (("Content-Type", content_type),) if content_type else ()
    reply = await ask(relay, f"{BROWSER}/context", headers, method="REPORT", body=b'{"key":"a"}')
    assert (reply.status, reply.body) == (415, b"Content-Type must be application/json.")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_is_refused(relay, chunked):
    """413 beyond `maxClientRequestBodySize`, to the byte, and not before."""

    async def report(size: int) -> Reply:
        body = b'{"key":"a","custom":{"x":"%b"}}'
        body %= b"x" * (size - len(body) + 2)
        return await ask(
            *(relay, f"{BROWSER}/context", JSON), method="REPORT", body=body, chunked=chunked
        )

    assert (await report(1024 * 1024)).status == 200
    refused = await report(1024 * 1024 + 1)
    assert (refused.status, message(refused)) == (413, "Request body exceeds maximum allowed size.")


async def test_a_compressed_body_is_inflated_no_further_than_its_limit(relay):
    """A gzip bomb is refused like any other large body; an honest one is read."""
    headers = (*JSON, ("Content-Encoding", "gzip"))
    honest = gzip.compress(json.dumps(ANNA).encode())
    bomb = gzip.compress(b'{"key":"%b"}' % (b"a" * 20_000_000))
    replies = [
        await ask(relay, f"{BROWSER}/context", headers, method="REPORT", body=body)
        for body in (honest, bomb)
    ]
    assert [reply.status for reply in replies] == [200, 413]


@pytest.mark.parametrize("front", [True, False], ids=["front", "app"])
async def test_nothing_of_a_context_is_logged(upstream, caplog, front):
    """Neither of good nor of bad ones, at any level, with every request logged."""
    caplog.set_level(logging.DEBUG)
    person = {"kind": "user", "key": PERSON, "email": PERSON}
    bad = {"kind": "user", "key": PERSON, "name": [PERSON]}
    async with serving(upstream, front=front) as relay:
        for context in (person, bad):
            await ask(relay, f"{BROWSER}/contexts/{encoded(context)}?h={PERSON}")
            body = json.dumps(context).encode()
            await ask(relay, f"{BROWSER}/context", JSON, method="REPORT", body=body)
            await ask(relay, f"/sdk/evalx/id-strict/contexts/{encoded(context)}?h=0123")
            for kind in ("poll", "stream"):
                path = f"/sdk/{kind}/eval"
                await ask(relay, f"{path}/{encoded(context)}?auth=mob-main&basis={PERSON}")
                await ask(relay, f"{path}?auth=mob-main", JSON, method="POST", body=body)
    assert "/sdk/evalx/" in caplog.text
    assert "/sdk/poll/eval/" in caplog.text
    for secret in (PERSON, encoded(person)[-40:], encoded(bad)[-40:], "mob-main"):
        assert secret not in caplog.text


async def test_equal_answers_have_equal_etags(upstream, relay):
    """However the context is written; 304 to who has it; a new one only when the answer changes."""
    path = f"{BROWSER}/contexts/{encoded(ANNA)}"
    first = await ask(relay, path)
    etag = first.headers["etag"]
    body = json.dumps(ANNA, indent=1).encode()
    same = await ask(relay, f"{BROWSER}/context", JSON, method="REPORT", body=body)
    assert (same.headers["etag"], etag[0], etag[-1]) == (etag, '"', '"')
    assert (await ask(relay, f"{BROWSER}/contexts/{encoded(SOMEBODY)}")).headers["etag"] != etag
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        reply = await ask(relay, path, (("If-None-Match", known),))
        assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", etag)
        assert reply.headers["access-control-allow-origin"] == "*"

    await upstream.patch(SDK_KEY, FLAGS[2] | {"version": 7})
    await until_seen(relay, f"{SERVER}/contexts/{encoded(ANNA)}", "hidden", 7)
    assert (await ask(relay, path, (("If-None-Match", etag),))).status == 304
    await upstream.patch(SDK_KEY, FLAGS[0] | {"version": 8, "variations": ["off", None]})
    await until_seen(relay, f"{SERVER}/contexts/{encoded(ANNA)}", "lamp", 8)
    changed = await ask(relay, path, (("If-None-Match", etag),))
    assert values(changed)["lamp"] == "off"
    assert changed.headers["etag"] != etag


async def until_seen(relay: Address, path: str, key: str, version: int) -> None:
    async with asyncio.timeout(5):
        while True:
            results = json.loads((await ask(relay, path, KEYS[SERVER])).body)
            if results[key]["version"] == version:
                return
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("front", [True, False], ids=["front", "app"])
async def test_answers_are_compressed_for_who_asks_for_it(upstream, front):
    """And for nobody else: the Node client cannot read gzip. A very large one is no exception."""
    for size in (2000, 300_000):
        items = [data.flag("lamp", value="x" * size, **OPEN)]
        async with serving(upstream, front=front, items=items) as relay:
            path = f"{BROWSER}/contexts/{encoded(ANNA)}"
            plain = await ask(relay, path)
            packed = await ask(relay, path, (("Accept-Encoding", "gzip, deflate"),))
        assert "content-encoding" not in plain.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert len(packed.body) < len(plain.body) / 4
        assert values(packed) == values(plain) == {"lamp": "x" * size}
        assert plain.headers["vary"] == packed.headers["vary"] == "Accept-Encoding, Origin"


async def test_only_servers_may_keep_an_answer_for_its_ttl(relay):
    """An SDK that is pinged asks for its flags, and must not get them from its own cache."""
    server = await ask(relay, f"{SERVER}/contexts/{encoded(ANNA)}", KEYS[SERVER])
    assert {"expires", "vary"} <= server.headers.keys()
    for routes in (BROWSER, MOBILE):
        reply = await ask(relay, f"{routes}/contexts/{encoded(ANNA)}", KEYS[routes])
        assert "expires" not in reply.headers


async def test_reasons_are_given_only_to_who_asks_in_the_known_words(relay):
    """`withReasons=true`, exactly."""
    path = f"{BROWSER}/contexts/{encoded(ANNA)}"
    for query, given in (("withReasons=true", True), ("withReasons=True", False), ("", False)):
        results = json.loads((await ask(relay, f"{path}?{query}")).body)
        assert ("reason" in results["who"]) == given


def proof(key: str) -> str:
    return hmac.new(STRICT_KEY.encode(), key.encode(), hashlib.sha256).hexdigest()


WRONG = "Environment is in secure mode, and context hash does not match."


@pytest.mark.parametrize(
    ("context", "signed"),
    [
        (ANNA, "anna"),
        ({"key": "anna", "custom": {}}, "anna"),
        ({"kind": "org", "key": "a:b%c"}, "org:a%3Ab%25c"),
        ({"kind": "multi", "user": {"key": "ü"}, "org": {"key": "x"}}, "org:x:user:ü"),
        ({"kind": "multi", "user": {"key": "anna"}}, "anna"),
    ],
    ids=["user", "legacy", "org", "multi", "multi of one"],
)
async def test_secure_mode_wants_the_proof_of_just_this_context(relay, context, signed):
    """Also after the same context has been answered; the mobile key is proof enough."""
    body, path = json.dumps(context).encode(), f"/sdk/evalx/id-strict/contexts/{encoded(context)}"
    right = proof(signed)
    wrong = ["", "x", right.upper(), right[:-1], proof("other"), "%C3%A9", right + "%00"]
    for h in (*wrong, right, *wrong):
        for reply in (
            await ask(relay, f"{path}?h={h}"),
            await ask(
                *(relay, f"/sdk/evalx/id-strict/user?h={h}", JSON),
                method="REPORT",
                body=body,
            ),
        ):
            if h == right:
                assert values(reply)["lamp"] == "on"
            else:
                assert (reply.status, message(reply)) == (400, WRONG)
    key = (("Authorization", "mob-strict"),)
    assert (await ask(relay, f"{MOBILE}/contexts/{encoded(context)}", key)).status == 200


async def test_without_data_everybody_is_told_to_wait(upstream):
    """503 once the question as such is right, in the known words."""
    async with serving(upstream) as relay:
        pass
    upstream.always(SDK_KEY, status(503))
    here = dict.fromkeys(("STREAM_URI", "CLIENT_SIDE_BASE_URI"), upstream.url)
    app_relay = build(load("", True, False, {**VARIABLES, **here}))
    site = site_of(Handlers.of(app_relay))
    async with serving_site(site, ServerOptions(0, drain=2)) as port:
        relay = Address(port)
        waiting = await ask(relay, f"{BROWSER}/contexts/{encoded(ANNA)}")
        bad = await ask(relay, f"{BROWSER}/contexts/{encoded(b'1')}")
    assert (waiting.status, message(waiting)) == (503, "Service not initialized")
    assert bad.status == 400


# Goals.

GOALS = b'[{"key":"seen","kind":"pageview","urls":[{"kind":"substring","substring":"localhost"}]}]'


class GoalsUpstream:
    """LaunchDarkly's service of goals: gives them an ETag, and counts what it is asked."""

    def __init__(self, cache_control: str = "max-age=60") -> None:
        self.cache_control = cache_control
        self.body = GOALS
        self.asked: list[web.Request] = []
        self.confirmed = 0
        self.free = asyncio.Event()
        self.free.set()

    async def __call__(self, request: web.Request) -> web.Response:
        self.asked.append(request)
        await self.free.wait()
        etag = f'"{len(self.body)}"'
        headers = {"ETag": etag, "Cache-Control": self.cache_control, "Set-Cookie": "a=b"}
        headers |= {"Access-Control-Allow-Origin": "https://elsewhere.example"}
        if request.headers.get("If-None-Match") == etag:
            self.confirmed += 1
            return web.Response(status=304, headers=headers)
        return web.Response(body=self.body, content_type="application/json", headers=headers)


PATH = "/sdk/goals/id-main"


async def test_goals_are_asked_for_once_while_they_are_good(upstream, relay):
    """By many at the same time, too; only what matters goes either way; our own CORS."""
    goals = GoalsUpstream()
    goals.free.clear()
    upstream.always("", goals)
    told = (
        ("Origin", "https://app.example"),
        ("Cookie", "secret=1"),
        ("X-LaunchDarkly-User-Agent", "JSClient/3.0.0"),
    )
    many = [asyncio.create_task(ask(relay, f"{PATH}?x={n}", told)) for n in range(10)]
    await until(lambda: len(goals.asked) == 1)
    goals.free.set()
    replies = [*await asyncio.gather(*many), await ask(relay, PATH, told)]
    assert len(goals.asked) == 1
    (asked,) = goals.asked
    assert (asked.path_qs, asked.headers["X-LaunchDarkly-User-Agent"]) == (PATH, "JSClient/3.0.0")
    assert not {"Cookie", "Origin", "Authorization", "X-Forwarded-For"} & set(asked.headers)
    assert {(reply.status, reply.body) for reply in replies} == {(200, GOALS)}
    for reply in replies:
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert reply.headers["content-type"].startswith("application/json")
        assert "set-cookie" not in reply.headers
    assert (replies[-1].headers["x-from-cache"], replies[-1].headers["age"]) == ("1", "0")
    known = await ask(relay, PATH, (*told, ("If-None-Match", replies[0].headers["etag"])))
    assert (known.status, known.body) == (304, b"")


async def test_goals_that_are_old_are_confirmed(upstream, relay):
    """By their ETag; changed ones come through; `no-store` is obeyed."""
    goals = GoalsUpstream("max-age=0")
    upstream.always("", goals)
    assert [(await ask(relay, PATH)).body for _ in range(3)] == [GOALS] * 3
    assert (len(goals.asked), goals.confirmed) == (3, 2)
    goals.body = b"[]"
    assert (await ask(relay, PATH)).body == b"[]"
    goals.cache_control = "no-store"
    goals.body = b"[1]"
    assert (await ask(relay, PATH)).body == b"[1]"
    upstream.always("", hang_up)
    assert (await ask(relay, PATH)).status == 502


@pytest.mark.parametrize("failure", [status(503), status(302), status(429), hang_up])
async def test_goals_outlast_a_failure(upstream, relay, failure, caplog):
    """A relay that had them goes on giving them, asks LaunchDarkly rarely, and logs it once."""
    upstream.always("", GoalsUpstream("max-age=0"))
    await ask(relay, PATH)
    requests = len(upstream.requests)
    upstream.always("", failure)
    replies = [await ask(relay, PATH) for _ in range(5)]
    assert {(reply.status, reply.body) for reply in replies} == {(200, GOALS)}
    assert len(upstream.requests) <= requests + 2  # a request on a dead connection is repeated
    assert caplog.text.count("LaunchDarkly gives no goals") == 1


async def test_without_goals_a_failure_is_told(upstream, relay):
    """502 if LaunchDarkly cannot be reached; otherwise what it says."""
    upstream.always("", hang_up)
    unreachable = await ask(relay, PATH)
    upstream.always("", status(404))
    refused = await ask(relay, "/sdk/goals/id-strict")
    assert (unreachable.status, unreachable.body) == (502, b"")
    assert refused.status == 404
    assert unreachable.headers["access-control-allow-origin"] == "*"


async def test_goals_larger_than_any_are_not_read(upstream, relay):
    """A broken service cannot fill the memory."""
    goals = GoalsUpstream()
    goals.body = b"[" + b" " * 2_000_000 + b"]"
    upstream.always("", goals)
    assert (await ask(relay, PATH)).status == 502


async def test_a_flags_file_has_no_goals(tmp_path):
    """An empty list, from no network."""
    file = tmp_path / "flags.json"
    file.write_text('{"flagValues":{"lamp":"on"}}')
    relay = build(load("", True, False, {"FLAGS_FILE": str(file)}))
    site = site_of(Handlers.of(relay, goals=GoalsHandler(relay.fetch)))
    async with serving_site(site, ServerOptions(0, drain=2)) as port:
        reply = await ask(Address(port), "/sdk/goals/demo-client-side-id")
    assert (reply.status, reply.body) == (200, b"[]")


# LaunchDarkly's own SDKs. None of these streams; those that do are tested beside the streams.


def polled(**more: object) -> dict:
    return {"streaming": False, **more}


SDKS = ["client", "v3", "v4"]
sdk = pytest.mark.sdk


@sdk
@pytest.mark.parametrize("report", [False, True], ids=["GET", "REPORT"])
@pytest.mark.parametrize("name", SDKS)
async def test_sdks_get_their_flags(name, report, upstream, packages, tmp_path: Path):
    """At the start, and for the next context; browsers from another origin."""
    async with serving(upstream) as relay:
        url = f"http://localhost:{relay.port}"
        options = polled(useReport=report)
        async with client(name, "id-main", url, ANNA, tmp_path, **options) as sdk:
            await sdk.ready()
            await sees(sdk, "who", "anna")
            assert await sdk.value("lamp", fallback="(none)") == "on"
            assert await sdk.value("hidden", fallback="(none)") == "(none)"
            await sdk.identify(SOMEBODY)
            await sees(sdk, "who", "others")


@sdk
@pytest.mark.parametrize("report", [False, True], ids=["GET", "REPORT"])
@pytest.mark.parametrize("name", SDKS)
async def test_sdks_prove_their_context(name, report, upstream, packages, tmp_path: Path):
    """In secure mode: with the right hash they get flags, with a wrong one they fail at once."""
    async with serving(upstream) as relay:
        url = f"http://localhost:{relay.port}"
        for folder, signed in (("right", "anna"), ("wrong", "somebody")):
            (tmp_path / folder).mkdir()
            options = polled(useReport=report)
            async with client(
                *(name, "id-strict", url, ANNA, tmp_path / folder), proof=proof(signed), **options
            ) as sdk:
                if folder == "right":
                    await sdk.ready()
                    await sees(sdk, "who", "anna")
                else:
                    with pytest.raises(SDKFailed):
                        await sdk.ready()
                    assert await sdk.value("who", fallback="(none)") == "(none)"


@sdk
@pytest.mark.parametrize("name", ["v3", "v4"])
async def test_browsers_reach_their_goals(name, upstream, packages, tmp_path: Path):
    """A goal comes from LaunchDarkly through the relay, and its event goes back the same way."""
    upstream.always("", GoalsUpstream())
    async with serving(upstream) as relay:
        url = f"http://localhost:{relay.port}"
        options = polled(
            fetchGoals=True, sendEvents=True, flushInterval=2000 if name == "v3" else 2
        )
        async with client(name, "id-main", url, ANNA, tmp_path, **options) as sdk:
            await sdk.ready()

            def reached() -> bool:
                events = [event for post in upstream.accepted for event in post.events]
                return any((e["kind"], e.get("key")) == ("pageview", "seen") for e in events)

            await until(reached, 20)


@sdk
async def test_the_node_client_tells_whom_it_identifies(upstream, packages, tmp_path: Path):
    """It fetches the flags of the next context, then sends the event."""
    async with serving(upstream) as relay:
        url = f"http://localhost:{relay.port}"
        options = polled(sendEvents=True)
        async with client("client", "id-main", url, ANNA, tmp_path, **options) as sdk:
            await sdk.ready()
            await sdk.identify(SOMEBODY)
            await sees(sdk, "who", "others")
        await until(lambda: identified(upstream) == [ANNA["key"], SOMEBODY["key"]], 10)


def identified(upstream: ScriptedUpstream) -> list[str]:
    events = [event for post in upstream.accepted for event in post.events]
    return [event["context"]["key"] for event in events if event["kind"] == "identify"]
