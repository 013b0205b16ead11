"""What the front door is given at once, and what of it is kept."""

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
from relay.model.metrics import MetricValue
from relay.model.payload import ChangeSet
from relay.web.endpoints import evaluation
from relay.web.endpoints.evaluation import (
    EvaluationHandler,
    EvaluationResult,
    resource_for,
    with_expiry,
)
from relay.web.fastpath import cache
from relay.web.fastpath.cache import CachedResponse, ResponseCache
from relay.web.responses import PreparedResponse
from tests.support import data
from tests.support.serving import SDK_KEY, Served, ask, serving

OPEN = {"clientSideAvailability": {"usingEnvironmentId": True, "usingMobileKey": True}}
ITEMS = [data.flag("lamp", value="x" * 2000, **OPEN), data.flag("hidden")]
FOR_BROWSERS = ("access-control-", "content-length", "vary")


def segment(context: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(context).encode()).rstrip(b"=")


ANNA = segment({"kind": "user", "key": "anna"})


def give(environment: Environment, *items: dict) -> None:
    parsed = [parse(Kind.FLAG, item["key"], json.dumps(item).encode()) for item in items]
    environment._apply(ChangeSet(tuple(parsed), full=True))


async def answer_to(
    made: EvaluationHandler,
    environment: Environment,
    context: bytes = ANNA,
    query: bytes = b"",
    audience: SDKKind = SDKKind.BROWSER,
    *,
    if_none_match: bytes = b"",
    accept_encoding: bytes = b"",
) -> PreparedResponse | None:
    """What a GET gets; None if it is for the application."""
    await environment.programs.ready(audience)
    found = made.find(environment, audience, context, query)
    if not isinstance(found, EvaluationResult):
        return found
    resource = resource_for(found.body, environment)
    return with_expiry(resource.variant(if_none_match, accept_encoding), environment, audience)


def kept(made: EvaluationHandler, environment: Environment, context: bytes = ANNA) -> object:
    """What is found for a context that asks when everything is compiled; None if it is not kept."""
    found = made.find(environment, SDKKind.BROWSER, context, b"")
    assert isinstance(found, EvaluationResult)
    return found.body if found.cacheable else None


@pytest.fixture
def environment():
    environment = Served().environment
    give(environment, *ITEMS)
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
async def test_the_answer_is_that_of_the_application(context, query, headers):
    """All but what browsers are told: that depends on the origin."""
    served = Served()
    give(served.environment, *ITEMS)
    path = f"/sdk/evalx/env-1/contexts/{context.decode()}?{query.decode()}"
    told = [(name.replace("_", "-"), value.decode()) for name, value in headers.items()]
    async with serving(served, front=False) as address:
        reply = await ask(address, path, told)
        answer = await answer_to(EvaluationHandler(), served.environment, context, query, **headers)
    assert answer is not None
    assert (answer.status, answer.body) == (reply.status, reply.body)
    ours = {name.decode(): value.decode() for name, value in answer.headers}
    for headers_of in (ours, reply.headers):
        for name in [name for name in headers_of if name.startswith(FOR_BROWSERS)]:
            del headers_of[name]
    assert ours == reply.headers


@pytest.mark.parametrize(
    ("context", "query"),
    [
        (ANNA + b"%3D%3D", b""),
        (b"", b""),
        (b".", b""),
        (b"..", b""),
        (ANNA, b"filter=x"),
        (ANNA, b"f%69lter=x"),
    ],
)
async def test_what_is_not_plain_is_for_the_application(environment, context, query):
    """It knows escapes, filters and paths that are not canonical."""
    assert await answer_to(EvaluationHandler(), environment, context, query) is None


async def test_a_context_that_asks_again_is_not_evaluated_again(environment):
    """Until the data change; its answers with and without reasons, for each audience, are apart.

    Nothing is kept for a context that has asked only once.
    """
    made = EvaluationHandler()
    first = await answer_to(made, environment)
    assert first is not None
    assert not made._cache.entries
    body = kept(made, environment)
    assert body is not None
    assert kept(made, environment) is body
    reasons = await answer_to(made, environment, query=b"withReasons=true")
    server = await answer_to(made, environment, audience=SDKKind.SERVER)
    assert reasons is not None
    assert server is not None
    assert len({first.body, reasons.body, server.body}) == 3
    give(environment, ITEMS[0] | {"version": 2})
    changed = await answer_to(made, environment)
    assert changed is not None
    assert json.loads(changed.body)["lamp"]["version"] == 2


async def test_what_is_kept_is_bounded(environment, monkeypatch):
    """In bytes; those that ask again stay, the others go."""
    monkeypatch.setattr(evaluation, "MAX_CACHED", 64 * 1024)
    made = EvaluationHandler()
    await answer_to(made, environment)
    first = kept(made, environment)
    assert first is not None
    for n in range(100):
        for _ in range(2):
            await answer_to(made, environment, segment({"key": f"user-{n}"}))
        assert kept(made, environment) is first
        assert made._cache.size == sum(known.size for known in made._cache.entries.values())
        assert made._cache.size <= 64 * 1024
    assert 3 < len(made._cache.entries) < 20


async def test_two_relays_keep_their_answers_apart():
    """Although their environments have the same name."""
    made = EvaluationHandler()
    values = []
    for value in ("one", "two"):
        environment = Served().environment
        give(environment, data.flag("lamp", value=value, **OPEN))
        answer = await answer_to(made, environment)
        assert answer is not None
        values.append(json.loads(answer.body)["lamp"]["value"])
    assert values == ["one", "two"]


async def test_without_data_the_answer_is_503():
    """At once, too."""
    answer = await answer_to(EvaluationHandler(), Served().environment)
    assert answer is not None
    assert (answer.status, answer.body) == (503, b'{"message":"Service not initialized"}')
    assert SDK_KEY.encode() not in answer.head


async def test_the_number_of_contexts_that_are_known_to_have_asked_is_bounded(monkeypatch):
    """The last ones are known; those long ago are as if they had never asked."""
    monkeypatch.setattr(evaluation, "MAX_RECENT", 10)
    kept = EvaluationHandler()._cache
    for n in range(100):
        assert not kept.is_repeated((n,))
        assert kept.is_repeated((n,))
        assert len(kept._recent) + len(kept._recent_before) <= 20
    assert kept.is_repeated((90,))
    assert not kept.is_repeated((70,))


async def test_the_same_request_is_answered_from_memory_until_the_data_change():
    """At the front door, byte for byte but for the date."""
    served = Served()
    give(served.environment, *ITEMS)
    asked = []
    find = served.evaluation.find
    served.evaluation.find = lambda *given: asked.append(given) or find(*given)
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
        assert len(asked) == 2
        assert len(set(answers)) == 1
        give(served.environment, ITEMS[0] | {"version": 2})
        asked.clear()
        changed = await get(ANNA)
        assert len(asked) == 1
        assert json.loads(changed.partition(b"\r\n\r\n")[2])["lamp"]["version"] == 2
        writer.close()


async def test_what_is_remembered_at_the_front_door_is_bounded(monkeypatch):
    """In bytes; the oldest go first."""
    monkeypatch.setattr(cache, "MAX_EVALUATED", 64 * 1024)
    served = Served()
    give(served.environment, *ITEMS)
    given = ResponseCache()
    await served.environment.programs.ready(SDKKind.BROWSER)
    heads = [b"GET /%d" % n for n in range(100)]
    for head in heads:
        told = CachedResponse(
            served.environment, b"HTTP/1.1 200 OK\r\n", (b"x" * 2000,), MetricValue()
        )
        given.put_evaluated(head, told)
        assert given.get_evaluated(head) is told
        assert given._evaluated_size <= 64 * 1024
    assert given.get_evaluated(heads[0]) is None
    assert 10 < sum(given.get_evaluated(head) is not None for head in heads) < 30
    give(served.environment, ITEMS[0] | {"version": 2})
    assert not any(given.get_evaluated(head) for head in heads)
    assert given._evaluated_size == 0


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
async def test_requests_that_differ_in_their_contexts_only_are_answered_alike(path, headers):
    """The first of their kind is parsed, the others are not: the answers are the application's."""
    contexts = [{"kind": "user", "key": f"{n}"} for n in range(3)]
    contexts += [{"key": ""}, {"kind": "user"}]
    served, told = Served(), list(headers.items())
    rule = {"variation": 1, "clauses": [{"attribute": "key", "op": "in", "values": ["1"]}]}
    give(served.environment, *ITEMS, data.flag("door", rules=[rule], **OPEN))
    paths = [path.format(segment(context).decode()) for context in contexts]
    async with serving(served, front=False) as address:
        expected = [await ask(address, each, told) for each in paths]
    async with serving(served) as address:
        replies = [await ask(address, each, told) for each in paths]
    for reply, wanted in zip(replies, expected, strict=True):
        assert (reply.status, reply.body) == (wanted.status, wanted.body)
        assert reply.headers == wanted.headers
    unchanged = "if-none-match" in headers
    assert len({reply.body for reply in replies}) == (3 if unchanged else 4)
    assert len(served.questions._profiles) == (0 if unchanged else 1)
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
async def test_what_is_odd_after_a_plain_one_is_looked_at_as_if_it_were_the_first(target):
    """The parser and the application decide; no connection is answered otherwise than a new one."""
    served = Served()
    give(served.environment, *ITEMS)
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


@pytest.mark.parametrize("audience_path", ["/sdk/evalx/env-1/context", "/sdk/evalx/context"])
async def test_a_large_context_does_not_hold_the_loop(audience_path, monkeypatch):
    """It is read and evaluated in a thread, with the result and the refusals of a small one."""
    read, threads = evaluation.context_in_body, []

    def noting(body: bytes) -> Context:
        threads.append(threading.current_thread())
        return read(body)

    monkeypatch.setattr(evaluation, "context_in_body", noting)
    served, told = Served(), [("authorization", SDK_KEY), ("content-type", "application/json")]
    rule = {"variation": 1, "clauses": [{"attribute": "tags", "op": "in", "values": ["last"]}]}
    give(served.environment, data.flag("door", rules=[rule], **OPEN))
    for audience in SDKKind:  # else what is small may have to wait, and is read twice
        await served.environment.programs.ready(audience)
    tags = [f"tag-{n}" for n in range(2000)]
    values, statuses = [], []
    async with serving(served) as address:
        for more, key in (([], "anna"), (tags, "anna"), ([*tags, "last"], "anna"), (tags, 5)):
            body = json.dumps({"kind": "user", "key": key, "tags": more}).encode()
            reply = await ask(address, audience_path, told, method="REPORT", body=body)
            statuses.append(reply.status)
            values.append(json.loads(reply.body).get("door", {}).get("variation"))
    assert statuses == [200, 200, 200, 400]
    assert values == [0, 0, 1, None]
    mine = threading.current_thread()
    assert [thread is mine for thread in threads] == [True, False, False, False]
