"""The forwarder: accepted once, delivered once, in order, and no failure delays anything else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from relay.backoff import Backoff
from relay.events.forwarder import Forwarder
from relay.events.policy import ForwarderTimings, Step, headers, next_step, target
from relay.events.spool import Spool
from relay.events.store import MAX_BATCH, Limits
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.upstream import USER_AGENT, Upstream
from tests.support import upstream as answers
from tests.support.upstream import PATIENCE, ScriptedUpstream

pytestmark = pytest.mark.timing

ROOT = Path(__file__).parent.parent.parent
ROUNDS = int(os.environ.get("KILL_ROUNDS", "3"))
"""Number of times that a relay is killed; more in the nightly run."""
KEY, MOBILE = "sdk-prod", "mob-prod"
SPEC = EnvironmentSpec("prod", SDKKey(KEY), MobileKey(MOBILE), EnvironmentID("id-prod"))
BARE = EnvironmentSpec("bare", SDKKey("sdk-bare"))
PARTITION = Partition("prod", EventsEndpoint.BULK, 4)
LIMITS = Limits(memory=16 << 20)
FAST = ForwarderTimings(
    flush_interval=0.02,
    between=0.0,
    timeout=0.2,
    drain=0.5,
    backoff=Backoff(first=0.01, longest=0.05),
    refused=Backoff(first=0.02, longest=0.04),
)
LAZY = ForwarderTimings(
    flush_interval=3600.0, drain=1.0, backoff=FAST.backoff, refused=FAST.refused
)


def payload(number=0, partition=PARTITION, payload_id=None):
    own_id = f"id-{number}" if payload_id is None else payload_id
    return EventPayload(partition, own_id, b"[%d]" % number, time.time())


@contextlib.asynccontextmanager
async def forwarding(url, *, timings=FAST, specs=(SPEC, BARE), directory=None):
    """A running forwarder; it drains and ends with the block."""
    known = {spec.name: spec for spec in specs}
    spool = Spool(directory, LIMITS, 0.01)
    async with Upstream() as upstream:
        forwarder = Forwarder(spool, upstream, url, known.get, timings)
        running = asyncio.create_task(forwarder.run())
        await asyncio.sleep(0)  # so that it has begun
        try:
            yield forwarder
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def upstream():
    async with ScriptedUpstream() as scripted:
        yield scripted


async def settled(forwarder, environment="prod"):
    """Wait until nothing of an environment waits any more."""
    async with asyncio.timeout(PATIENCE):
        while forwarder.counts(environment).waiting or forwarder.oldest(environment) is not None:
            await forwarder.spool._do(lambda _: None)
            await asyncio.sleep(0)


def events(posts):
    return [event for each in posts for event in each.events]


# Pure decisions


@pytest.mark.parametrize(
    ("status", "payloads", "failures", "step"),
    [
        *((status, 3, 0, Step.DONE) for status in (200, 202, 204)),
        *((status, 3, 0, Step.RETRY) for status in (None, 301, 307, 407, 408, 429, 500, 503, 599)),
        *((status, 3, 0, Step.REFUSED) for status in (401, 402, 403, 404, 405, 410, 418)),
        *((413, payloads, failures, Step.SPLIT) for payloads in (1, 3) for failures in (0, 1)),
        *((400, payloads, 0, Step.RETRY) for payloads in (1, 3)),
        (400, 3, 1, Step.SPLIT),
        (400, 1, 1, Step.REJECT),
    ],
)
def test_the_next_step_after_a_response(status, payloads, failures, step):
    """Transient failures are retried; only a payload that is proven bad is quarantined."""
    assert next_step(status, payloads, failures) is step


@pytest.mark.parametrize(
    ("endpoint", "path", "key"),
    [
        (EventsEndpoint.BULK, "/bulk", KEY),
        (EventsEndpoint.MOBILE, "/mobile", MOBILE),
        (EventsEndpoint.CLIENT_SIDE, "/events/bulk/id-prod", None),
        (EventsEndpoint.BULK_DIAGNOSTIC, "/diagnostic", KEY),
        (EventsEndpoint.MOBILE_DIAGNOSTIC, "/mobile/events/diagnostic", MOBILE),
        (EventsEndpoint.CLIENT_SIDE_DIAGNOSTIC, "/events/diagnostic/id-prod", None),
    ],
)
def test_paths_and_keys_of_payloads(endpoint, path, key):
    """Each kind of credential has its path; the client-side ID is no key."""
    said = {} if key is None else {"Authorization": key}
    assert target(Partition("prod", endpoint), SPEC) == (path, said)
    assert target(Partition("prod", endpoint), None) is None
    server = endpoint in (EventsEndpoint.BULK, EventsEndpoint.BULK_DIAGNOSTIC)
    assert (target(Partition("bare", endpoint), BARE) is not None) is server


def test_only_known_headers_are_sent():
    """Schema and id of analytics; tags and wrapper where an SDK gave them; of diagnostics none."""
    usual = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert headers(Partition("e", EventsEndpoint.MOBILE, 3), "i") == usual | {
        "X-LaunchDarkly-Event-Schema": "3",
        "X-LaunchDarkly-Payload-ID": "i",
    }
    full = headers(Partition("e", EventsEndpoint.BULK, 4, "a/b", "w/1"), "i")
    assert (full["X-LaunchDarkly-Tags"], full["X-LaunchDarkly-Wrapper"]) == ("a/b", "w/1")
    assert headers(Partition("e", EventsEndpoint.BULK_DIAGNOSTIC), "i") == usual


def test_delays_grow_to_five_minutes():
    """From a second, or after refusals from five seconds."""
    timings = ForwarderTimings()
    assert [timings.backoff.delay(n) for n in (0, 1, 2, 14, 15)] == [1, 1.5, 2.25, 1.5**14, 300]
    assert [timings.refused.delay(n) for n in range(8)] == [5, 10, 20, 40, 80, 160, 300, 300]


# Delivery


async def test_payloads_of_a_partition_arrive_together_and_in_order(upstream):
    """Payloads that gather share one request: compressed, with its length, without SDK headers."""
    async with forwarding(upstream.url) as forwarder:
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(50)))
        await upstream.took(50)
        await settled(forwarder)
        assert forwarder.oldest("prod") is None
        counts = forwarder.counts("prod")
    (only,) = upstream.posts
    assert only.events == list(range(50))
    assert only.path == "/bulk"
    sent = dict(only.headers)
    assert sent.pop("Content-Length").isdigit()
    assert len(sent.pop("X-LaunchDarkly-Payload-ID")) == 36
    assert sent == {
        "Host": upstream.url.removeprefix("http://"),
        "User-Agent": USER_AGENT,
        "Accept-Encoding": "gzip",
        "Content-Type": "application/json",
        "Content-Encoding": "gzip",
        "X-LaunchDarkly-Event-Schema": "4",
        "Authorization": KEY,
    }
    assert (counts.received, counts.forwarded, counts.waiting) == (50, 50, 0)


async def test_a_payload_alone_is_forwarded_as_it_came(upstream):
    """It keeps the SDK's id and its very bytes."""
    body = b' [ {"f": 1.0, "big": 12345678901234567890, "s": "<&>\\u2028"} ] '
    async with forwarding(upstream.url) as forwarder:
        await forwarder.accept(EventPayload(PARTITION, "the-id", body, time.time()))
        await upstream.took()
    assert upstream.posts[0].body == body
    assert upstream.posts[0].payload_id == "the-id"


async def test_partitions_are_never_mixed(upstream):
    """Endpoint, schema, tags and wrapper each make a partition of their own."""
    partitions = [
        *(
            PARTITION,
            PARTITION._replace(schema=3),
            PARTITION._replace(tags="a/b"),
            PARTITION._replace(wrapper="w"),
        ),
        *(
            PARTITION._replace(endpoint=EventsEndpoint.MOBILE),
            PARTITION._replace(endpoint=EventsEndpoint.CLIENT_SIDE),
        ),
    ]
    async with forwarding(upstream.url) as forwarder:
        for n in range(3):
            for place, partition in enumerate(partitions):
                await forwarder.accept(payload(10 * place + n, partition))
        await upstream.took(18)
        await settled(forwarder)
    for place, _ in enumerate(partitions):
        own = [e for e in events(upstream.accepted) if e // 10 == place]
        assert own == [10 * place + n for n in range(3)]
    for each in upstream.posts:
        assert len({event // 10 for event in each.events}) == 1
    client_side = [p for p in upstream.posts if p.path == "/events/bulk/id-prod"]
    assert client_side
    assert not any("Authorization" in p.headers for p in client_side)


async def test_diagnostics_go_one_by_one_and_verbatim(upstream):
    """Any body is accepted; it need not be JSON."""
    partition = Partition("prod", EventsEndpoint.MOBILE_DIAGNOSTIC)
    async with forwarding(upstream.url) as forwarder:
        for text in (b'{"kind": "diagnostic-init"}', b"hello"):
            await forwarder.accept(EventPayload(partition, "", text, time.time()))
        await upstream.posted(2)
    assert [p.body for p in upstream.posts] == [b'{"kind": "diagnostic-init"}', b"hello"]
    assert {(p.path, p.headers["Authorization"]) for p in upstream.posts} == {
        ("/mobile/events/diagnostic", MOBILE)
    }
    assert not any("X-LaunchDarkly-Payload-ID" in p.headers for p in upstream.posts)


async def test_an_sdks_retry_is_counted_once(upstream):
    """The same payload id again is accepted and not passed on."""
    async with forwarding(upstream.url) as forwarder:
        assert await forwarder.accept(payload(1)) is True
        assert await forwarder.accept(payload(1)) is False
        await settled(forwarder)
        assert await forwarder.accept(payload(1)) is False
        await forwarder.accept(payload(2))
        await upstream.took(2)
        counts = forwarder.counts("prod")
        assert (counts.received, counts.duplicates) == (4, 2)
    assert events(upstream.posts) == [1, 2]


async def test_a_full_partition_does_not_wait(upstream):
    """A batch is sent as soon as it is full."""
    half = b'["' + b"x" * (MAX_BATCH // 2) + b'"]'
    async with forwarding(upstream.url, timings=LAZY) as forwarder:
        await forwarder.accept(EventPayload(PARTITION, "1", half, time.time()))
        await forwarder.accept(EventPayload(PARTITION, "2", half, time.time()))
        await upstream.posted()


async def test_steady_traffic_goes_in_batches(upstream):
    """The interval is kept between batches, too: few requests for many payloads."""
    timings = ForwarderTimings(flush_interval=0.1, between=0.0, drain=0.5)
    async with forwarding(upstream.url, timings=timings) as forwarder:
        until = time.monotonic() + 0.55
        n = 0
        while time.monotonic() < until:
            await forwarder.accept(payload(n))
            n += 1
            await asyncio.sleep(0.001)
    assert events(upstream.posts) == list(range(n))
    assert 2 <= len(upstream.posts) <= 8


async def test_a_cancelled_request_leaves_its_payload(upstream):
    """A payload is delivered even if its request is cancelled while it becomes safe."""
    async with forwarding(upstream.url) as forwarder:
        waiting = asyncio.ensure_future(forwarder.accept(payload(1)))
        waiting.cancel()
        await upstream.took(1)
    assert events(upstream.posts) == [1]


async def test_upstreams_clock_is_known(upstream):
    """Debug events end by it."""
    async with forwarding(upstream.url) as forwarder:
        assert forwarder.server_time("prod") == 0.0
        await forwarder.accept(payload(1))
        await settled(forwarder)
        assert abs(forwarder.server_time("prod") - time.time()) < 5


async def test_events_go_through_the_proxy_too(upstream):
    """Like all other requests to upstream."""
    async with Upstream(proxy=upstream.url) as proxied:
        forwarder = Forwarder(
            Spool(None, LIMITS), proxied, "http://events.example/base/", lambda _: SPEC, FAST
        )
        running = asyncio.create_task(forwarder.run())
        await forwarder.accept(payload(1))
        await upstream.took(1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert upstream.posts[0].path == "/base/bulk"
    assert upstream.posts[0].headers["Host"] == "events.example"


async def test_the_age_of_the_oldest_payload_is_known(upstream):
    """Even if others arrive during the request of a batch."""
    gate = asyncio.Event()

    async def when_released(_):
        await gate.wait()
        return answers.web.Response(status=202)

    upstream.script(KEY, when_released)
    timings = ForwarderTimings(flush_interval=0.05, drain=0.5)
    async with forwarding(upstream.url, timings=timings) as forwarder:
        first, second = payload(1), payload(2)
        await forwarder.accept(first)
        assert forwarder.oldest("prod") == first.received
        await upstream.posted(1)
        await forwarder.accept(second)
        assert forwarder.oldest("prod") == first.received
        gate.set()
        async with asyncio.timeout(PATIENCE):
            while forwarder.counts("prod").waiting == 2:
                await forwarder.spool._do(lambda _: None)
                await asyncio.sleep(0)
        assert forwarder.oldest("prod") == second.received
        await settled(forwarder)


# Failures


@pytest.mark.parametrize(
    "failure",
    [
        *(answers.status(code) for code in (400, 401, 403, 404, 408, 429, 500, 503)),
        answers.redirect("/elsewhere"),
        *(answers.stall, answers.hang_up, answers.slowly(1)),
    ],
    ids=["400", "401", "403", "404", "408", "429", "500", "503", "307", "stall", "reset", "slow"],
)
async def test_a_failed_batch_is_tried_again_unchanged(upstream, failure, caplog):
    """The same members under the same id, though others have come; logged once at start and end."""
    with caplog.at_level(logging.INFO, "relay"):
        async with forwarding(upstream.url) as forwarder:
            upstream.script(KEY, failure)
            await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(3)))
            await upstream.posted(1)
            await forwarder.accept(payload(3))
            await upstream.took(4)
            await settled(forwarder)
            assert forwarder.counts("prod").retried == 1
    first, again, *rest = upstream.posts
    assert (again.body, again.payload_id) == (first.body, first.payload_id)
    assert events([again, *rest]) == [0, 1, 2, 3]
    said = [r.getMessage() for r in caplog.records if r.name == "relay.env.prod"]
    if first.status == 400:
        assert said == [], "a rejected batch is logged when the bad payload is known"
    else:
        assert said[0].startswith("Events for /bulk cannot be delivered: ")
        assert said[1:] == ["Events for /bulk are delivered again"]
    assert KEY not in caplog.text


async def test_a_refused_key_is_never_given_up(upstream, caplog):
    """It is tried again for ever, and logged once."""
    upstream.always(KEY, answers.status(401))
    async with forwarding(upstream.url) as forwarder:
        await forwarder.accept(payload(1))
        await upstream.posted(6)
        upstream.always(KEY, None)
        await upstream.took(1)
    assert caplog.text.count("HTTP error 401") == 1
    assert len({p.payload_id for p in upstream.posts}) == 1


@pytest.mark.parametrize(
    ("retry_after", "obeyed"),
    [
        *(("3600", True), ("Fri, 01 Jan 2100 00:00:00 GMT", True), ("1" * 30, False)),
        *(("soon", False), ("Fri, 01 Jan 2010 00:00:00 GMT", False), ("-5", False)),
    ],
)
async def test_upstream_may_ask_for_a_delay(upstream, retry_after, obeyed):
    """Retry-After counts, as seconds and as a date, within our own bounds."""
    timings = ForwarderTimings(0.01, backoff=Backoff(first=0.01, longest=0.3))
    async with forwarding(upstream.url, timings=timings) as forwarder:
        upstream.script(KEY, answers.status(429, **{"Retry-After": retry_after}))
        await forwarder.accept(payload(1))
        await upstream.posted(1)
        began = time.monotonic()
        await upstream.took(1)
    waited = time.monotonic() - began
    assert (waited > 0.28) is obeyed
    assert waited < 2


@pytest.mark.parametrize("poison", range(7))
async def test_a_poisonous_payload_is_found_and_blocks_nobody(upstream, poison, caplog):
    """Only it goes to quarantine; the others arrive once and in order."""
    upstream.always(KEY, answers.rejecting(b"%d" % (100 + poison)))
    async with forwarding(upstream.url) as forwarder:
        await asyncio.gather(*(forwarder.accept(payload(100 + n)) for n in range(7)))
        await settled(forwarder)
        counts = forwarder.counts("prod")
        assert (counts.forwarded, counts.quarantined, counts.waiting) == (6, 1, 0)
        kept = [(each.body, each.reason) for each in forwarder.spool.memory.rejected]
    assert kept == [(b"[%d]" % (100 + poison), "HTTP error 400")]
    assert events(upstream.accepted) == [100 + n for n in range(7) if n != poison]
    assert "1 posts of events were set aside" in caplog.text


@pytest.mark.parametrize("code", [400, 413])
@pytest.mark.parametrize("durable", [True, False], ids=["disk", "memory"])
async def test_an_upstream_that_rejects_everything_for_a_while_costs_no_event(
    upstream, code, durable, tmp_path
):
    """All payloads accepted before, during and after it arrive, each once; none is quarantined."""
    async with forwarding(upstream.url, directory=tmp_path if durable else None) as forwarder:
        for turn in range(3):
            first = 100 * turn
            await asyncio.gather(*(forwarder.accept(payload(first + n)) for n in range(50)))
            upstream.always(KEY, answers.status(code))
            seen = len(upstream.posts)
            for n in range(50, 100):
                await forwarder.accept(payload(first + n))
                await asyncio.sleep(0.002)
            await upstream.posted(seen + 20)
            upstream.always(KEY, None)
            await upstream.took(len(upstream.accepted) + 1)
        await settled(forwarder)
        counts = forwarder.counts("prod")
    assert (counts.forwarded, counts.quarantined, counts.evicted) == (300, 0, 0)
    assert sorted(events(upstream.accepted)) == list(range(300))


async def test_a_payload_that_is_rejected_with_nothing_to_compare_is_kept(upstream, caplog):
    """It is logged and retried for ever; once others are accepted and it is not, it is quarantined."""
    upstream.always(KEY, answers.rejecting(b"666"))
    async with forwarding(upstream.url) as forwarder:
        await forwarder.accept(payload(666))
        await upstream.posted(8)
        counts = forwarder.counts("prod")
        assert (counts.waiting, counts.quarantined) == (1, 0)
        assert forwarder.oldest("prod") is not None
        assert caplog.text.count("Events for /bulk cannot be delivered: HTTP error 400") == 1
        await forwarder.accept(payload(1))
        await settled(forwarder)
        assert (counts.forwarded, counts.quarantined) == (1, 1)
        assert caplog.text.count("cannot be delivered") == 1


async def test_a_suspect_does_not_delay_later_payloads(upstream):
    """However long the delay until the suspect's next attempt."""
    upstream.always(KEY, answers.rejecting(b"666", 413))
    timings = ForwarderTimings(
        0.02, 0.0, 0.2, drain=0.5, backoff=Backoff(first=3600.0, longest=3600.0)
    )
    async with forwarding(upstream.url, timings=timings) as forwarder:
        await forwarder.accept(payload(666))
        await upstream.posted(1)  # now it waits for an hour
        for number in range(3):
            await forwarder.accept(payload(number))
            await upstream.took(number + 1)
        await settled(forwarder)
        assert forwarder.counts("prod").quarantined == 1


async def test_another_partition_of_the_same_kind_is_evidence_another_kind_is_none(upstream):
    """Upstream may take server-side events and reject the mobile ones, all of them."""
    mobile = PARTITION._replace(endpoint=EventsEndpoint.MOBILE)
    upstream.always(KEY, answers.rejecting(b"666"))
    upstream.always(MOBILE, answers.status(400))
    async with forwarding(upstream.url) as forwarder:
        await forwarder.accept(payload(666))
        await forwarder.accept(payload(777, mobile))
        counts = forwarder.counts("prod")
        async with asyncio.timeout(PATIENCE):
            while counts.quarantined == 0:
                await forwarder.accept(payload(1, PARTITION._replace(tags="other"), payload_id=""))
                await asyncio.sleep(0.02)
        await upstream.posted(len(upstream.posts) + 5)
        kept = [each.body for each in forwarder.spool.memory.rejected]
        assert kept == [b"[666]"]
        upstream.always(MOBILE, None)
        await settled(forwarder)
    assert 777 in events(upstream.accepted)


async def test_many_bad_payloads_in_a_row_are_found_while_others_are_taken(upstream):
    """They delay the good ones of their partition only while nothing else is delivered."""
    upstream.always(KEY, answers.rejecting(b"666"))
    other = PARTITION._replace(tags="other")
    async with forwarding(upstream.url) as forwarder:
        await asyncio.gather(
            *(forwarder.accept(payload(6660 + n % 10, payload_id="")) for n in range(20))
        )
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(5)))
        counts, number = forwarder.counts("prod"), 0
        async with asyncio.timeout(PATIENCE):
            while counts.quarantined < 20:
                number += 1
                await forwarder.accept(payload(1000 + number, other))
                await asyncio.sleep(0.02)
        await settled(forwarder)
        assert (counts.quarantined, counts.forwarded) == (20, 5 + number)


async def test_a_suspect_survives_a_restart(upstream, tmp_path):
    """It waits on disk like the others, and is delivered when upstream works again."""
    upstream.always(KEY, answers.status(400))
    async with forwarding(upstream.url, directory=tmp_path) as forwarder:
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(6)))
        await upstream.posted(12)
    async with forwarding(upstream.url, directory=tmp_path) as forwarder:
        await upstream.posted(len(upstream.posts) + 3)
        upstream.always(KEY, None)
        await settled(forwarder)
        assert forwarder.counts("prod").forwarded == 6
    assert sorted(events(upstream.accepted)) == list(range(6))


MALFORMED = [
    *(b'[{"kind":"custom","key":"x"]', b"[NaN]", b"[1,]", b"[1],[2]", b'["\x00"]', b'["\xff"]'),
    *(b'["\xed\xa0\x80"]', b'["a]', b'[b"]', b"[1]]", b"[01]", b"[1 2]", b'["\t"]'),
]


@pytest.mark.parametrize("durable", [True, False], ids=["disk", "memory"])
async def test_a_malformed_payload_spoils_no_batch(upstream, durable, tmp_path, caplog):
    """The well-formed payloads of a batch arrive; upstream never sees the malformed ones."""
    async with forwarding(upstream.url, directory=tmp_path if durable else None) as forwarder:
        for number, body in enumerate(MALFORMED):
            forwarder.accept(payload(number))
            forwarder.accept(EventPayload(PARTITION, f"bad-{number}", body, time.time()))
        await forwarder.accept(payload(100))
        await settled(forwarder)
        counts = forwarder.counts("prod")
        assert counts.received == 2 * len(MALFORMED) + 1
        assert counts.quarantined == len(MALFORMED)
        assert counts.forwarded == len(MALFORMED) + 1
    assert events(upstream.posts) == [*range(len(MALFORMED)), 100]
    assert caplog.text.count("posts of events were set aside, as they are no well-formed JSON") == 1


async def test_a_body_nested_too_deeply_to_check_goes_alone(upstream):
    """Upstream decides on it, and on nothing else in the same request."""
    deep = b"[" * 200_000 + b"]" * 200_000
    async with forwarding(upstream.url) as forwarder:
        for each in (payload(1), EventPayload(PARTITION, "deep", deep, time.time()), payload(2)):
            await forwarder.accept(each)
        await settled(forwarder)
        assert forwarder.counts("prod").forwarded == 3
    assert [each.body for each in upstream.accepted] == [b"[1]", deep, b"[2]"]


async def test_a_batch_that_is_too_large_is_halved(upstream):
    """By payloads, then by elements; an element too large alone is quarantined, all else arrives."""
    upstream.always(KEY, answers.at_most(40))
    elements = [f'"{n:010}"' for n in range(10)]
    big = EventPayload(PARTITION, "big", f"[{','.join(elements)}]".encode(), time.time())
    monster = EventPayload(PARTITION, "monster", b'["' + b"m" * 100 + b'"]', time.time())
    async with forwarding(upstream.url) as forwarder:
        await asyncio.gather(*map(forwarder.accept, [payload(1), big, monster, payload(2)]))
        await settled(forwarder)
        counts = forwarder.counts("prod")
        assert (counts.forwarded, counts.quarantined) == (3, 1)
    assert events(upstream.accepted) == [1, *(f"{n:010}" for n in range(10)), 2]
    ids = [p.payload_id for p in upstream.accepted]
    assert len(ids) == len(set(ids))


async def test_a_rejected_diagnostic_is_quarantined(upstream):
    """It blocks no others of its partition."""
    partition = Partition("prod", EventsEndpoint.BULK_DIAGNOSTIC)
    upstream.always(KEY, answers.rejecting(b"bad", 413))
    async with forwarding(upstream.url) as forwarder:
        await forwarder.accept(EventPayload(partition, "", b'["bad","bad"]', time.time()))
        await forwarder.accept(EventPayload(partition, "", b"{}", time.time()))
        await settled(forwarder)
        assert forwarder.counts("prod").quarantined == 1
    assert [p.body for p in upstream.accepted] == [b"{}"]


async def test_without_a_credential_events_wait(upstream, caplog):
    """They are kept until a key is configured; others are not delayed."""
    specs = [BARE, SPEC]
    async with forwarding(upstream.url, specs=specs) as forwarder:
        forwarder._spec_of = lambda name: next((s for s in specs if s.name == name), None)
        await forwarder.accept(payload(1, Partition("bare", EventsEndpoint.MOBILE, 4)))
        await forwarder.accept(payload(2))
        await upstream.took(1)
        assert events(upstream.posts) == [2]
        specs[0] = EnvironmentSpec("bare", SDKKey("sdk-bare"), MobileKey("mob-new"))
        await upstream.took(2)
    assert upstream.posts[1].headers["Authorization"] == "mob-new"
    assert "no credential for them: set mobileKey (LD_MOBILE_KEY_bare)" in caplog.text


async def test_waiting_payloads_are_sent_with_the_rotated_key(upstream):
    """The key is the current one at the time of sending."""
    specs = {"prod": SPEC}
    async with forwarding(upstream.url, specs=()) as forwarder:
        forwarder._spec_of = specs.get
        upstream.script(KEY, answers.status(401))
        await forwarder.accept(payload(1))
        await upstream.posted(1)
        specs["prod"] = EnvironmentSpec("prod", SDKKey("sdk-next"))
        await upstream.took(1)
    assert [p.headers["Authorization"] for p in upstream.posts] == [KEY, "sdk-next"]


@pytest.mark.parametrize("failure", [answers.stall, answers.status(503), answers.status(401)])
async def test_one_failing_environment_delays_no_other(upstream, failure):
    """One of 100 environments fails with many partitions; the events of the others are not late."""
    specs = [EnvironmentSpec(f"e{n}", SDKKey(f"sdk-{n}")) for n in range(100)]
    upstream.always("sdk-0", failure)
    timings = ForwarderTimings(
        flush_interval=0.05, timeout=30.0, drain=0.1, backoff=FAST.backoff, refused=FAST.refused
    )
    async with forwarding(upstream.url, specs=specs, timings=timings) as forwarder:
        for tag in range(50):
            await forwarder.accept(
                payload(tag, Partition("e0", EventsEndpoint.BULK, 4, f"tag/{tag}"))
            )
        await upstream.posted(1)
        began = time.monotonic()
        await asyncio.gather(
            *(
                forwarder.accept(payload(n, Partition(f"e{n}", EventsEndpoint.BULK, 4)))
                for n in range(1, 100)
            )
        )
        await upstream.took(99)
        assert time.monotonic() - began < 2
        stuck = [p for p in upstream.posts if p.headers["Authorization"] == "sdk-0"]
        assert failure is not answers.stall or len(stuck) <= 4
        assert forwarder.counts("e0").waiting == 50
        assert forwarder.oldest("e0") is not None
        await settled(forwarder, "e1")


async def test_an_unexpected_error_does_not_end_a_partition(upstream, monkeypatch, caplog):
    """It is logged, and the partition is served again."""
    monkeypatch.setattr("relay.events.forwarder.RESTART_DELAY", 0.01)
    async with forwarding(upstream.url) as forwarder:
        take, calls = forwarder.spool.take, []

        async def defective(partition):
            calls.append(partition)
            if len(calls) == 1:
                raise ZeroDivisionError
            return await take(partition)

        monkeypatch.setattr(forwarder.spool, "take", defective)
        await forwarder.accept(payload(1))
        await upstream.took(1)
    assert "ZeroDivisionError" in caplog.text


async def test_losses_are_counted_and_logged(upstream, caplog):
    """Full memory evicts the oldest payloads; counts and log tell how many."""
    upstream.always(KEY, answers.status(503))
    async with forwarding(upstream.url) as forwarder:
        forwarder.spool.memory.capacity = 3000
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(100)))
        counts = forwarder.counts("prod")
        assert counts.evicted + counts.waiting == 100
        assert 0 < counts.waiting < 15
        upstream.always(KEY, None)
        await settled(forwarder)
    assert events(upstream.accepted)[-1] == 99
    assert "posts of events were given up" in caplog.text


async def test_a_delivered_payload_is_not_counted_as_lost(upstream):
    """Even if it was evicted during its request."""
    gate = asyncio.Event()

    async def when_released(_):
        await gate.wait()
        return answers.web.Response(status=202)

    upstream.script(KEY, when_released)
    async with forwarding(upstream.url, timings=ForwarderTimings(0.01, drain=0.5)) as forwarder:
        await forwarder.accept(payload(1))
        await upstream.posted(1)
        forwarder.spool.memory.capacity = 300
        await forwarder.accept(payload(2))
        assert forwarder.counts("prod").evicted == 1
        gate.set()
        await settled(forwarder)
        counts = forwarder.counts("prod")
    assert (counts.forwarded, counts.evicted, counts.waiting) == (2, 0, 0)
    assert events(upstream.accepted) == [1, 2]


async def test_a_debugger_shows_the_backlog():
    """Waiting payloads, their partitions, and endpoints with an outage."""
    async with forwarding("http://127.0.0.1:1", timings=LAZY) as forwarder:
        await forwarder.accept(payload(1))
        await forwarder.accept(payload(2))
        assert repr(forwarder) == (
            "<Forwarder: 2 payloads waiting in 1 partitions, 0 endpoints failing>"
        )


# Shutdown and restart


async def test_waiting_payloads_are_sent_at_shutdown(upstream):
    """A shutdown drains the partitions without waiting for the interval."""
    async with forwarding(upstream.url, timings=LAZY) as forwarder:
        for n in range(5):
            await forwarder.accept(payload(n))
        assert not upstream.posts
    assert events(upstream.accepted) == list(range(5))


@pytest.mark.parametrize("failure", [answers.stall, answers.status(503), answers.hang_up])
async def test_payloads_that_cannot_be_sent_at_shutdown_are_sent_by_the_next_process(
    upstream, failure, tmp_path
):
    """The shutdown does not wait for upstream; the next process sends the same batch."""
    upstream.always(KEY, failure)
    async with forwarding(upstream.url, directory=tmp_path) as forwarder:
        for n in range(5):
            await forwarder.accept(payload(n))
        await upstream.posted(1)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    upstream.always(KEY, None)
    async with forwarding(upstream.url, directory=tmp_path) as forwarder:
        await upstream.took(5)
        await settled(forwarder)
        assert forwarder.counts("prod").forwarded == 5
        assert await forwarder.accept(payload(3)) is False
    assert events(upstream.accepted) == list(range(5))
    assert upstream.accepted[0].payload_id == upstream.posts[0].payload_id


async def test_a_disk_that_works_again_is_served_again(upstream, tmp_path):
    """Its content from before the outage is delivered without a restart."""
    upstream.always(KEY, answers.status(503))
    async with forwarding(upstream.url, directory=tmp_path) as forwarder:
        await forwarder.accept(payload(1))
        await upstream.posted(1)
        spool = forwarder.spool
        spool._retry = 3600
        spool._disk._db.execute("PRAGMA max_page_count=1")
        text = os.urandom(50_000).hex()
        big = EventPayload(PARTITION, "big", f'["{text}"]'.encode(), time.time())
        await forwarder.accept(big)
        assert not spool.durable
        upstream.always(KEY, None)
        await upstream.took(1)
        spool._try_at = 0.0
        await forwarder.accept(payload(2))
        await upstream.took(3)
        await settled(forwarder)
        assert spool.durable
    assert sorted(map(str, events(upstream.accepted))) == sorted(["1", "2", text])


CHILD = """
import asyncio, sys, time
from pathlib import Path
from relay.events.forwarder import Forwarder
from relay.backoff import Backoff
from relay.events.policy import ForwarderTimings
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.events.store import Limits
from relay.events.spool import Spool
from relay.upstream import Upstream

async def main():
    folder, url, name = sys.argv[1:]
    spec = EnvironmentSpec("prod", SDKKey("sdk-prod"))
    timings = ForwarderTimings(0.02, 0.0, 0.2, backoff=Backoff(first=0.01, longest=0.05))
    async with Upstream() as upstream:
        spool = Spool(Path(folder), Limits())
        forwarder = Forwarder(spool, upstream, url, lambda _: spec, timings)
        running = asyncio.create_task(forwarder.run())
        await asyncio.sleep(0)
        async def sdk(client):
            partition = Partition("prod", EventsEndpoint.BULK, 4, f"tag/{client % 2}")
            for n in range(10**6):
                text = f"{name}-{client}-{n}"
                body = b'["%s"]' % text.encode()
                await forwarder.accept(EventPayload(partition, text, body, time.time()))
                print(text, flush=True)
                await asyncio.sleep(0.001)
        await asyncio.gather(running, *(sdk(client) for client in range(8)))

asyncio.run(main())
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rejects", [False, True])
async def test_kill_9_loses_and_repeats_nothing(upstream, tmp_path, rejects):
    """Killed repeatedly while upstream is unreliable: every accepted event arrives, under one id.

    While upstream also rejects everything now and then, a batch whose answer was lost may be split,
    and its events come under another id as well; none is lost then, either.
    """
    chance = random.Random(4)

    began = time.monotonic()

    async def unreliable(request):
        if rejects and int((time.monotonic() - began) * 4) % 4 == 3:  # a quarter of each second
            return await answers.status(400)(request)
        if len(await request.read()) > 300:
            return await answers.status(413)(request)
        which = chance.choice(
            [answers.status(202)] * 5
            + [answers.status(503), answers.hang_up, answers.slowly(0.1), answers.slowly(0.3)]
        )
        return await which(request)

    upstream.always(KEY, unreliable)
    accepted = set()
    for round_ in range(ROUNDS):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CHILD, tmp_path / "spool", upstream.url, str(round_)),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        seen = 0
        limit = chance.randrange(50, 400)
        while seen < limit:
            line = await process.stdout.readline()
            assert line, "the child has ended"
            accepted.add(line.decode().strip())
            seen += 1
        process.send_signal(signal.SIGKILL)
        rest, _ = await process.communicate()
        accepted.update(rest.decode().rpartition("\n")[0].split())
    upstream.always(KEY, None)
    async with forwarding(upstream.url, directory=tmp_path / "spool") as forwarder:
        await asyncio.wait_for(forwarder.spool._do(lambda _: None), PATIENCE)
        await settled(forwarder)
    ids = defaultdict(Counter)
    for each in upstream.accepted:
        for event in each.events:
            ids[event][each.payload_id] += 1
    assert len(accepted) > 30 * ROUNDS
    assert accepted <= set(ids), "an accepted event is lost"
    assert rejects or {len(found) for found in ids.values()} == {1}, "an event came under two ids"
    assert any(p.status == 413 for p in upstream.posts)


# Back-pressure while memory fills up


def large(number, partition=PARTITION):
    """Return a payload of 10 KB."""
    return EventPayload(
        partition, f"id-{number}", b'["%s"]' % (b"%05d" % number * 2000), time.time()
    )


@contextlib.asynccontextmanager
async def tight(url, *, specs=(SPEC, BARE), timings=FAST):
    """A forwarder with memory for ten large payloads."""
    async with forwarding(url, timings=timings, specs=specs) as forwarder:
        forwarder.spool.memory.capacity = 10 * 10_300
        yield forwarder


async def test_a_client_that_sends_too_fast_waits_for_upstream(upstream):
    """More than fits into memory arrives complete: acknowledgements keep pace with upstream."""
    async with tight(upstream.url) as forwarder:

        async def client(name):
            for n in range(20):
                await forwarder.accept(large(100 * name + n))

        await asyncio.gather(*map(client, range(4)))
        await settled(forwarder)
        assert forwarder.counts("prod").evicted == 0
    assert len(events(upstream.posts)) == 80


async def test_an_acknowledgement_is_delayed_until_a_batch_is_done(upstream):
    """Then they follow at once, in the order of the payloads."""
    gate = asyncio.Event()

    async def when_released(_):
        await gate.wait()
        return answers.web.Response(status=202)

    upstream.script(KEY, when_released)
    timings = ForwarderTimings(flush_interval=3600.0, timeout=10.0, drain=0.5)
    async with tight(upstream.url, timings=timings) as forwarder:
        early = [forwarder.accept(large(n)) for n in range(5)]
        assert all(each.done() for each in early)
        delayed = [forwarder.accept(large(n)) for n in range(5, 7)]
        await upstream.posted(1)  # the flush interval is skipped, too
        assert not any(each.done() for each in delayed)
        gate.set()
        assert await asyncio.gather(*delayed) == [True, True]
        assert forwarder.counts("prod").evicted == 0


async def test_an_acknowledgement_is_delayed_for_a_bounded_time(upstream, monkeypatch):
    """An upstream that stalls costs a client no more than that; then the oldest are evicted."""
    monkeypatch.setattr("relay.events.forwarder.MAX_ACK_DELAY", 0.05)
    upstream.always(KEY, answers.stall)
    timings = ForwarderTimings(flush_interval=0.01, timeout=60.0, drain=0.1)
    async with tight(upstream.url, timings=timings) as forwarder:
        for n in range(20):
            began = time.monotonic()
            assert await forwarder.accept(large(n))
            waited = time.monotonic() - began
            assert n >= 10 or (waited > 0.04) is (n >= 5)
            assert waited < 1
            assert forwarder.spool.memory.size <= forwarder.spool.memory.capacity
        counts = forwarder.counts("prod")
        assert counts.evicted + counts.waiting == 20


async def test_no_client_waits_during_an_outage(upstream):
    """Nor in another environment: payloads that cannot be delivered are evicted."""
    upstream.always(KEY, answers.status(503))
    async with tight(upstream.url) as forwarder:
        for n in range(5):
            forwarder.accept(large(n))
        delayed = forwarder.accept(large(5))
        assert not delayed.done()
        assert await asyncio.wait_for(delayed, 0.9), "the failure releases it"
        for n in range(6, 30):
            assert forwarder.accept(large(n)).done()
        assert forwarder.counts("prod").evicted >= 20
        other = Partition("bare", EventsEndpoint.BULK, 4)
        assert forwarder.accept(large(100, other)).done()
        await upstream.took(1)
        upstream.always(KEY, None)
        await settled(forwarder)
        assert forwarder.accept(large(200)).done()


async def test_batches_follow_without_a_pause_while_a_client_waits(upstream, monkeypatch):
    """A slow upstream gets a pause between batches, but not while acknowledgements are delayed."""
    monkeypatch.setattr("relay.events.store.MAX_BATCH", 15_000)  # one payload
    upstream.script(KEY, answers.slowly(0.8))
    timings = ForwarderTimings(flush_interval=0.01, between=3600.0, timeout=10.0, drain=0.5)
    async with tight(upstream.url, timings=timings) as forwarder:
        for n in range(4):
            assert forwarder.accept(large(n)).done()
        await upstream.took(1)
        await forwarder.accept(large(4))
        assert len(upstream.posts) == 1, "the pause is as long as the answer has taken"
        began = time.monotonic()
        await asyncio.gather(*(forwarder.accept(large(n)) for n in (5, 6)))
        assert time.monotonic() - began < 0.4


async def test_a_shutdown_releases_delayed_acknowledgements(upstream):
    """And delays no further ones."""
    upstream.always(KEY, answers.stall)
    timings = ForwarderTimings(flush_interval=0.01, timeout=60.0, drain=0.1)
    async with tight(upstream.url, timings=timings) as forwarder:
        delayed = [forwarder.accept(large(n)) for n in range(9)][-1]
        assert not delayed.done()
        forwarder.flush()
        assert delayed.done()
        assert forwarder.accept(large(10)).done()
