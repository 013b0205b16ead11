"""Delivery: retried unchanged, divided if that is safe, and no failure delays anything else."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from relay.backoff import Backoff
from relay.events.policy import ForwarderTimings
from relay.events.store import Limits
from relay.model.credential import MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from tests.events.forwarding import (
    BARE,
    FAST,
    KEY,
    LAZY,
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


@pytest.mark.parametrize("code", [400, 413])
@pytest.mark.parametrize("durable", [True, False], ids=["disk", "memory"])
@pytest.mark.parametrize("lost", [answers.hang_up, answers.status(502)], ids=["hang-up", "502"])
async def test_a_batch_whose_answer_was_lost_keeps_its_id_while_upstream_rejects_everything(
    upstream, code, durable, lost, tmp_path
):
    """Upstream may have it already, so it is not split, however often upstream rejects it."""
    async with forwarding(upstream.url, directory=tmp_path if durable else None) as forwarder:
        upstream.script(KEY, lost)
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(3)))
        await upstream.posted(1)
        upstream.always(KEY, answers.status(code))
        await upstream.posted(4)
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(3, 6)))
        await upstream.posted(len(upstream.posts) + 6)
        upstream.always(KEY, None)
        await settled(forwarder)
        counts = forwarder.counts("prod")
    assert (counts.forwarded, counts.quarantined) == (6, 0)
    assert {p.payload_id for p in upstream.posts if 0 in p.events} == {upstream.posts[0].payload_id}
    assert sorted(events(upstream.accepted)) == list(range(6))


@pytest.mark.parametrize("code", [400, 413])
async def test_a_batch_of_an_earlier_process_keeps_its_id_while_upstream_rejects_everything(
    upstream, code, tmp_path
):
    """The earlier process may have ended during an attempt."""
    upstream.always(KEY, answers.stall)
    async with forwarding(upstream.url, directory=tmp_path, timings=LAZY) as forwarder:
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in range(3)))
        forwarder.flush()
        await upstream.posted(1)
    upstream.always(KEY, answers.status(code))
    async with forwarding(upstream.url, directory=tmp_path) as forwarder:
        await upstream.posted(8)
        upstream.always(KEY, None)
        await settled(forwarder)
    assert len({p.payload_id for p in upstream.posts}) == 1
    assert events(upstream.accepted) == [0, 1, 2]


@pytest.mark.parametrize("code", [400, 413])
async def test_a_bad_batch_whose_answer_was_lost_is_split_in_the_end(upstream, code):
    """Once upstream has accepted several others, and rejected it in between; nothing else waits."""
    upstream.script(KEY, answers.hang_up)
    async with forwarding(upstream.url) as forwarder:
        await asyncio.gather(*(forwarder.accept(payload(n)) for n in (1, 666, 2)))
        await upstream.posted(1)
        upstream.always(KEY, answers.rejecting(b"666", code))
        counts, number = forwarder.counts("prod"), 10
        async with asyncio.timeout(PATIENCE):
            while counts.quarantined == 0:
                number += 1
                await forwarder.accept(payload(number))
                await asyncio.sleep(0.02)
        await settled(forwarder)
        assert (counts.quarantined, counts.forwarded) == (1, 2 + number - 10)
    assert sorted(events(upstream.accepted)) == [1, 2, *range(11, number + 1)]


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
    specs = {"bare": BARE, "prod": SPEC}
    async with forwarding(upstream.url, specs=specs) as forwarder:
        await forwarder.accept(payload(1, Partition("bare", EventsEndpoint.MOBILE, 4)))
        await forwarder.accept(payload(2))
        await upstream.took(1)
        assert events(upstream.posts) == [2]
        specs["bare"] = EnvironmentSpec("bare", SDKKey("sdk-bare"), MobileKey("mob-new"))
        await upstream.took(2)
    assert upstream.posts[1].headers["Authorization"] == "mob-new"
    assert "no credential for them: set mobileKey (LD_MOBILE_KEY_bare)" in caplog.text


async def test_waiting_payloads_are_sent_with_the_rotated_key(upstream):
    """The key is the current one at the time of sending."""
    specs = {"prod": SPEC}
    async with forwarding(upstream.url, specs=specs) as forwarder:
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
    monkeypatch.setattr("relay.events.delivery.RESTART_DELAY", 0.01)
    async with forwarding(upstream.url) as forwarder:
        do, calls = forwarder.spool.do, []

        def defective(work):
            calls.append(work)
            if len(calls) == 1:
                raise ZeroDivisionError
            return do(work)

        monkeypatch.setattr(forwarder.spool, "do", defective)
        await forwarder.accept(payload(1))
        await upstream.took(1)
    assert "ZeroDivisionError" in caplog.text


async def test_losses_are_counted_and_logged(upstream, caplog):
    """Full memory evicts the oldest payloads; counts and log tell how many."""
    upstream.always(KEY, answers.status(503))
    async with forwarding(upstream.url, limits=Limits(memory=3000)) as forwarder:
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
