"""Evaluation requests: results, their cache, and the fast path."""

from __future__ import annotations

import base64
import json
import re
import threading

import pytest

from relay.environment import Environment
from relay.evaluation.sdkkind import SDKKind
from relay.model.context import Context
from relay.model.item import Kind, parse
from relay.model.payload import ChangeSet
from relay.registry import Registry
from relay.web.endpoints import evaluation
from relay.web.endpoints.evaluation import (
    EvaluationHandler,
    EvaluationResult,
    resource_for,
    with_expiry,
)
from relay.web.responses import PreparedResponse
from tests.support import data
from tests.support.serving import SDK_KEY, Served, ask, serving

OPEN = {"clientSideAvailability": {"usingEnvironmentId": True, "usingMobileKey": True}}
ITEMS = [data.flag("lamp", value="x" * 2000, **OPEN), data.flag("hidden")]
FOR_BROWSERS = ("access-control-", "content-length", "vary")


def segment(context: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(context).encode()).rstrip(b"=")


ANNA = segment({"kind": "user", "key": "anna"})


def set_flags(environment: Environment, *items: dict) -> None:
    parsed = [parse(Kind.FLAG, item["key"], json.dumps(item).encode()) for item in items]
    environment._apply(ChangeSet(tuple(parsed), full=True))


async def response_to(
    handler: EvaluationHandler,
    environment: Environment,
    context: bytes = ANNA,
    query: bytes = b"",
    sdk_kind: SDKKind = SDKKind.BROWSER,
    *,
    if_none_match: bytes = b"",
    accept_encoding: bytes = b"",
) -> PreparedResponse | None:
    """Return the response to a GET; None if it is left to the application."""
    await environment.programs.ready(sdk_kind)
    result = handler.evaluate(environment, sdk_kind, context, query)
    if not isinstance(result, EvaluationResult):
        return result
    resource = resource_for(result.body, environment)
    return with_expiry(resource.variant(if_none_match, accept_encoding), environment, sdk_kind)


def cached_body(
    handler: EvaluationHandler, environment: Environment, context: bytes = ANNA
) -> object:
    """Return the cached body for a context; None if it is not cached."""
    result = handler.evaluate(environment, SDKKind.BROWSER, context, b"")
    assert isinstance(result, EvaluationResult)
    return result.body if result.size else None


@pytest.fixture
def environment():
    environment = Served().environment
    set_flags(environment, *ITEMS)
    return environment


@pytest.mark.parametrize(
    ("context", "query", "headers"),
    [
        (ANNA, b"", {}),
        (ANNA, b"withReasons=true", {}),
        (ANNA, b"", {"accept_encoding": b"gzip"}),
        (ANNA, b"", {"if_none_match": b"*"}),
        (b"e30", b"", {}),
        (b"!", b"", {}),
        (segment({"key": ""}), b"", {}),
    ],
)
async def test_the_response_is_that_of_the_application(context, query, headers):
    """The handler and the application agree in all but the CORS headers, which need the origin."""
    served = Served()
    set_flags(served.environment, *ITEMS)
    path = f"/sdk/evalx/env-1/contexts/{context.decode()}?{query.decode()}"
    request_headers = [(name.replace("_", "-"), value.decode()) for name, value in headers.items()]
    async with serving(served, front=False) as address:
        reply = await ask(address, path, request_headers)
        response = await response_to(
            EvaluationHandler(Registry()), served.environment, context, query, **headers
        )
    assert response is not None
    assert (response.status, response.body) == (reply.status, reply.body)
    own_headers = {name.decode(): value.decode() for name, value in response.headers}
    for fields in (own_headers, reply.headers):
        for name in [name for name in fields if name.startswith(FOR_BROWSERS)]:
            del fields[name]
    assert own_headers == reply.headers


async def test_repeated_requests_are_not_evaluated_again(environment):
    """A result is cached from the second request until the data changes.

    Results with and without reasons, and those for different kinds of SDKs, are separate.
    """
    handler = EvaluationHandler(Registry())
    first = await response_to(handler, environment)
    assert first is not None
    assert not len(handler.results)
    body = cached_body(handler, environment)
    assert body is not None
    assert cached_body(handler, environment) is body
    reasons = await response_to(handler, environment, query=b"withReasons=true")
    server = await response_to(handler, environment, sdk_kind=SDKKind.SERVER)
    assert reasons is not None
    assert server is not None
    assert len({first.body, reasons.body, server.body}) == 3
    set_flags(environment, ITEMS[0] | {"version": 2})
    changed = await response_to(handler, environment)
    assert changed is not None
    assert json.loads(changed.body)["lamp"]["version"] == 2


async def test_the_cache_is_bounded(environment, monkeypatch):
    """The cache is bounded in bytes; contexts that are requested again stay in it."""
    monkeypatch.setattr(evaluation, "MAX_CACHED", 64 * 1024)
    handler = EvaluationHandler(Registry())
    await response_to(handler, environment)
    first = cached_body(handler, environment)
    assert first is not None
    for n in range(100):
        for _ in range(2):
            await response_to(handler, environment, segment({"key": f"user-{n}"}))
        assert cached_body(handler, environment) is first
        assert handler.results.size <= 64 * 1024
    assert 3 < len(handler.results) < 20


async def test_two_relays_keep_their_results_apart():
    """Environments of the same name do not share results."""
    handler = EvaluationHandler(Registry())
    values = []
    for value in ("one", "two"):
        environment = Served().environment
        set_flags(environment, data.flag("lamp", value=value, **OPEN))
        response = await response_to(handler, environment)
        assert response is not None
        values.append(json.loads(response.body)["lamp"]["value"])
    assert values == ["one", "two"]


async def test_without_data_the_response_is_503():
    """The handler refuses without waiting for data."""
    response = await response_to(EvaluationHandler(Registry()), Served().environment)
    assert response is not None
    assert (response.status, response.body) == (503, b'{"message":"Service not initialized"}')
    assert SDK_KEY.encode() not in response.head


async def test_the_memory_of_recent_requests_is_bounded(environment, monkeypatch):
    """Recent requests are recognised; earlier ones are forgotten."""
    monkeypatch.setattr(evaluation, "MAX_RECENT", 10)
    handler = EvaluationHandler(Registry())
    contexts = [segment({"key": f"{n}"}) for n in range(30)]
    await environment.programs.ready(SDKKind.BROWSER)
    for context in contexts:
        assert cached_body(handler, environment, context) is None
        assert cached_body(handler, environment, context) is not None
    assert cached_body(handler, environment, contexts[25]) is not None
    assert cached_body(handler, environment, contexts[5]) is None


async def test_the_same_request_is_answered_from_memory_until_the_data_change():
    """The fast path repeats its response byte for byte, but for the date."""
    served = Served()
    set_flags(served.environment, *ITEMS)
    calls = []
    find = served.evaluation.evaluate
    served.evaluation.evaluate = lambda *args, **more: calls.append(args) or find(*args, **more)
    await served.environment.programs.ready(SDKKind.BROWSER)
    async with serving(served) as address:
        reader, writer = await address.connect()

        async def get(context: bytes) -> bytes:
            path = b"/sdk/evalx/env-1/contexts/" + context
            writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\nOrigin: a\r\n\r\n" % path)
            head = await reader.readuntil(b"\r\n\r\n")
            size = re.search(rb"content-length: (\d+)", head)
            assert size is not None
            date = re.compile(rb"date: .*\r\n")
            return date.sub(b"", head) + await reader.readexactly(int(size[1]))

        answers = [await get(ANNA) for _ in range(5)]
        assert len(calls) == 2
        assert len(set(answers)) == 1
        set_flags(served.environment, ITEMS[0] | {"version": 2})
        calls.clear()
        changed = await get(ANNA)
        assert len(calls) == 1
        assert json.loads(changed.partition(b"\r\n\r\n")[2])["lamp"]["version"] == 2
        writer.close()


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/sdk/evalx/env-1/contexts/{}", {}),
        ("/sdk/evalx/env-1/users/{}", {"origin": "https://a.example"}),
        ("/sdk/evalx/env-1/contexts/{}?withReasons=true", {"accept-encoding": "gzip"}),
        ("/sdk/evalx/contexts/{}", {"authorization": SDK_KEY}),
        ("/sdk/evalx/env-1/contexts/{}", {"if-none-match": "*"}),
    ],
)
async def test_requests_that_differ_only_in_their_contexts(path, headers):
    """Only the first of them is parsed; all responses are those of the application."""
    contexts = [{"kind": "user", "key": f"{n}"} for n in range(3)]
    contexts += [{"key": ""}, {"kind": "user"}]
    served, request_headers = Served(), list(headers.items())
    rule = {"variation": 1, "clauses": [{"attribute": "key", "op": "in", "values": ["1"]}]}
    set_flags(served.environment, *ITEMS, data.flag("door", rules=[rule], **OPEN))
    paths = [path.format(segment(context).decode()) for context in contexts]
    async with serving(served, front=False) as address:
        expected = [await ask(address, each, request_headers) for each in paths]
    async with serving(served) as address:
        replies = [await ask(address, each, request_headers) for each in paths]
    for reply, expected_reply in zip(replies, expected, strict=True):
        assert (reply.status, reply.body) == (expected_reply.status, expected_reply.body)
        assert reply.headers == expected_reply.headers
    unchanged = "if-none-match" in headers
    assert len({reply.body for reply in replies}) == (3 if unchanged else 4)
    assert len(served.fast_path.evaluation.profiles) == (0 if unchanged else 1)
    assert sum(count.value for count in served.traffic.requests.values()) == 2 * len(contexts)


@pytest.mark.parametrize(
    "target",
    [
        *("{} x", "{}\n", "{}\r", "{}\0", "{}\x7f", "{}!", "{}%3D", "", "a/{}", "?{}", "{}#x"),
        *(
            "{}?h=a b",
            "{}?h=\n",
            "{}?\0",
            "{}?h=%41",
            "{}?filter=x",
            "{}?h=a/b",
            "{}\xe9",
            "{}?\xe9",
        ),
    ],
)
async def test_an_unusual_request_after_a_plain_one_is_handled_as_the_first_would_be(target):
    """The response does not depend on earlier requests: the parser and the application decide."""
    served = Served()
    set_flags(served.environment, *ITEMS)
    await served.environment.programs.ready(SDKKind.BROWSER)

    def request(segment: str, *more: str) -> bytes:
        lines = [f"GET /sdk/evalx/env-1/contexts/{segment} HTTP/1.1", "Host: x", *more, "", ""]
        return "\r\n".join(lines).encode("latin-1")

    odd, plain = target.format(ANNA.decode()), ANNA.decode()
    async with serving(served) as address:
        before = undated(await address.ask(request(odd, "Connection: close")))
        assert (await address.ask(request(plain, "Connection: close"))).startswith(b"HTTP/1.1 200")
        assert undated(await address.ask(request(odd, "Connection: close"))) == before


def undated(reply: bytes) -> bytes:
    return re.sub(rb"date: [^\r]*", b"", reply)


@pytest.mark.parametrize("path", ["/sdk/evalx/env-1/context", "/sdk/evalx/context"])
async def test_a_large_context_does_not_block_the_loop(path, monkeypatch):
    """It is parsed and evaluated in a thread, with the same results and refusals."""
    parse_body, threads = evaluation.context_in_body, []

    def recording_reader(body: bytes) -> Context:
        threads.append(threading.current_thread())
        return parse_body(body)

    monkeypatch.setattr(evaluation, "context_in_body", recording_reader)
    served = Served()
    request_headers = [("authorization", SDK_KEY), ("content-type", "application/json")]
    rule = {"variation": 1, "clauses": [{"attribute": "tags", "op": "in", "values": ["last"]}]}
    set_flags(served.environment, data.flag("door", rules=[rule], **OPEN))
    for sdk_kind in SDKKind:  # otherwise a small context may wait for it, and be parsed twice
        await served.environment.programs.ready(sdk_kind)
    tags = [f"tag-{n}" for n in range(2000)]
    values, statuses = [], []
    async with serving(served) as address:
        for more, key in (([], "anna"), (tags, "anna"), ([*tags, "last"], "anna"), (tags, 5)):
            body = json.dumps({"kind": "user", "key": key, "tags": more}).encode()
            reply = await ask(address, path, request_headers, method="REPORT", body=body)
            statuses.append(reply.status)
            values.append(json.loads(reply.body).get("door", {}).get("variation"))
    assert statuses == [200, 200, 200, 400]
    assert values == [0, 0, 1, None]
    loop_thread = threading.current_thread()
    assert [thread is loop_thread for thread in threads] == [True, False, False, False]


async def test_a_debugger_shows_the_size_of_the_cache(environment):
    """The handler states how many results it has cached, and their size."""
    handler = EvaluationHandler(Registry())
    assert repr(handler) == "<EvaluationHandler [0 results, 0 bytes]>"
    for _ in range(2):
        await response_to(handler, environment)
    size = handler.results.size
    assert repr(handler) == f"<EvaluationHandler [1 results, {size} bytes]>"
