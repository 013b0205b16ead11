"""The forwarder: accepted once, delivered once, in order, also when the process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from relay.events.forwarder import Forwarder
from relay.events.policy import ForwarderTimings
from relay.events.spool import MemorySpool, SpoolResult
from relay.events.store import MAX_BATCH, Limits
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.upstream import USER_AGENT, Upstream
from tests.events.forwarding import (
    BARE,
    FAST,
    KEY,
    LAZY,
    LIMITS,
    MOBILE,
    PARTITION,
    SPEC,
    events,
    forwarding,
    payload,
    settled,
)
from tests.support import upstream as answers
from tests.support.upstream import PATIENCE

pytestmark = pytest.mark.timing
ROOT = Path(__file__).parent.parent.parent
ROUNDS = int(os.environ.get("KILL_ROUNDS", "10"))
"""Number of times that a relay is killed; more in the nightly run."""


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
            MemorySpool(LIMITS), proxied, "http://events.example/base/", lambda _: SPEC, FAST
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
                await forwarder.spool.do(lambda _: None)
                await asyncio.sleep(0)
        assert forwarder.oldest("prod") == second.received
        await settled(forwarder)


async def test_an_unexpected_error_of_the_spool_ends_the_forwarder():
    """It is not hidden: without the spool nothing would be delivered any more."""

    class BrokenSpool(MemorySpool):
        async def results(self):
            yield SpoolResult()
            raise ZeroDivisionError

    async with Upstream() as upstream:
        forwarder = Forwarder(BrokenSpool(LIMITS), upstream, "http://127.0.0.1:1", lambda _: SPEC)
        with pytest.raises(ZeroDivisionError):
            await forwarder.run()


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


async def test_a_disk_that_works_again_is_served_again(upstream, tmp_path, connections):
    """Its content from before the outage is delivered without a restart."""
    upstream.always(KEY, answers.status(503))
    async with forwarding(upstream.url, directory=tmp_path, retry=3600) as forwarder:
        await forwarder.accept(payload(1))
        await upstream.posted(1)
        spool = forwarder.spool
        connections[-1].execute("PRAGMA max_page_count=1")
        text = os.urandom(50_000).hex()
        big = EventPayload(PARTITION, "big", f'["{text}"]'.encode(), time.time())
        await forwarder.accept(big)
        assert not spool.durable
        upstream.always(KEY, None)
        await upstream.took(1)
        await spool.do(lambda store: store.retry_now())
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
from relay.events.spool import DiskSpool
from relay.upstream import Upstream

async def main():
    folder, url, name = sys.argv[1:]
    spec = EnvironmentSpec("prod", SDKKey("sdk-prod"))
    timings = ForwarderTimings(0.02, 0.0, 0.2, backoff=Backoff(first=0.01, longest=0.05))
    async with Upstream() as upstream:
        spool = DiskSpool(Path(folder), Limits())
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

    So it is while upstream also rejects everything now and then.
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
        await asyncio.wait_for(forwarder.spool.do(lambda _: None), PATIENCE)
        await settled(forwarder)
    ids = defaultdict(Counter)
    for each in upstream.accepted:
        for event in each.events:
            ids[event][each.payload_id] += 1
    assert len(accepted) > 30 * ROUNDS
    assert accepted <= set(ids), "an accepted event is lost"
    assert {len(found) for found in ids.values()} == {1}, "an event came under two ids"
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
    limits = Limits(memory=10 * 10_300)
    async with forwarding(url, timings=timings, specs=specs, limits=limits) as forwarder:
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
    monkeypatch.setattr("relay.events.backpressure.MAX_ACK_DELAY", 0.05)
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
