"""The synchroniser between a real upstream and a real database."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import web

from relay import clock
from relay.backoff import Backoff
from relay.bigsegments.lease import StoreLease
from relay.bigsegments.synchroniser import Synchroniser
from relay.model.credential import SDKKey
from relay.protocol.bigsegments import context_hash
from relay.sources.bigsegments import BigSegmentSource
from relay.sources.timings import SourceTimings
from relay.stores.redis import bigsegments as module
from relay.stores.redis.bigsegments import RedisBigSegmentStore
from relay.stores.redis.connect import connect
from relay.upstream import Upstream
from tests.support import upstream as answers
from tests.support.redis import RedisServer
from tests.support.serving import until
from tests.support.upstream import BIG_SEGMENTS, ScriptedUpstream, event, segment_patch

KEY = "sdk-secret-4711"
POLL, STREAM = "/sdk/big-segments/revisions", "/big-segments"
LOG = logging.getLogger("relay.env.test")
FAST = SourceTimings(retry=Backoff(0.02, 0.05), refused=Backoff(0.02, 0.05))
ANN, BEN, CLEO = map(context_hash, ("ann", "ben", "cleo"))
V1 = segment_patch("team.g2", "v1", "", include=["ann"])
V2 = segment_patch("team.g2", "v2", "v1", include=["ben"], exclude=["cleo"])
V3 = segment_patch("team.g2", "v3", "v2", no_longer=["ann"])
V4 = segment_patch("team.g2", "v4", "v3", include=["ann"])
GAP = segment_patch("team.g2", "v9", "v8", include=["gap"])


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        upstream.serve(KEY, "{}")
        upstream.patches[KEY] = [V1, V2]
        yield upstream


class Run:
    """A synchroniser at work, and what it has said."""

    def __init__(self, store, source, lease_store):
        self.store = store
        self.changes: list[frozenset[str] | None] = []
        self.times = 0
        self.looks = 0
        lease = StoreLease(lease_store, self._look, LOG)
        self.synchroniser = Synchroniser(
            source, store, self.changes.append, self._count, lease=lease, log=LOG, timings=FAST
        )
        self.key = KEY

    def _count(self):
        self.times += 1

    def _look(self):
        self.looks += 1

    async def cursor(self, expected: str | None) -> None:
        """Wait until this version is stored and the stream is followed."""
        async with asyncio.timeout(10):
            while (await self.store.metadata()).cursor != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await until(lambda: self.synchroniser.connected, 10)


@asynccontextmanager
async def synchronising(upstream, redis, keys=None, lease="big"):
    """Run a synchroniser with a connection of its own, and the lease of a prefix."""
    store = RedisBigSegmentStore(connect(redis.options()), "big")
    lease_store = RedisBigSegmentStore(connect(redis.options()), lease)
    keys = keys or [KEY]
    async with Upstream() as session:
        source = BigSegmentSource(
            session, upstream.url, upstream.url + "/", lambda: SDKKey(keys[-1])
        )
        run = Run(store, source, lease_store)
        task = asyncio.create_task(run.synchroniser.run())
        try:
            yield run
        finally:
            if task.done():
                await task
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await store.aclose()
            await lease_store.aclose()


async def test_patches_are_fetched_until_there_are_none(upstream, server):
    """Polls until an answer is empty, opens the stream, and polls once more."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        paths = [each.path for each in upstream.requests]
        assert paths == [POLL, POLL + "?after=v2", STREAM, POLL + "?after=v2"]
        assert {each.headers["Authorization"] for each in upstream.requests} == {KEY}
        assert await run.store.memberships([ANN, BEN, CLEO]) == [
            {"team.g2": True},
            {"team.g2": True},
            {"team.g2": False},
        ]
        assert (await run.store.metadata()).synchronized_at is not None
        assert frozenset().union(*run.changes) == {ANN, BEN, CLEO}


async def test_events_are_applied_as_they_come(upstream, server):
    """Each event is stored, reported, and confirmed by a new time; empty ones, too."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        run.changes.clear()
        await upstream.send_patches(KEY, V3, V4)
        await run.cursor("v4")
        assert run.changes == [{ANN}, {ANN}]
        times = run.times
        await upstream.raw(BIG_SEGMENTS + KEY, event())
        await until(lambda: run.times > times)
        assert len(upstream.requests) == 4


async def test_it_goes_on_where_it_stopped(upstream, server):
    """A new process asks for what comes after the stored version."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
    upstream.patches[KEY] += [V3]
    upstream.requests.clear()
    async with synchronising(upstream, server) as run:
        await run.cursor("v3")
        assert upstream.requests[0].path == POLL + "?after=v2"
        assert run.synchroniser.applied == 1


async def test_what_comes_while_the_stream_opens_is_not_lost(upstream, server):
    """A patch between the last poll and the stream is found by another poll."""

    async def late(request: web.Request) -> web.StreamResponse:
        upstream.patches[KEY] += [V3]
        return await upstream._stream(request, BIG_SEGMENTS + KEY, b": \n\n")

    upstream.script_path(STREAM, late)
    async with synchronising(upstream, server) as run:
        await run.cursor("v3")
        assert upstream.asked(STREAM) == 2


async def test_a_gap_in_the_stream_starts_over(upstream, server):
    """Patches before one that does not fit stay, it is not applied, and polls fetch the rest."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        upstream.requests.clear()
        await upstream.raw(BIG_SEGMENTS + KEY, event(V3, GAP, V4))
        await upstream.until_asked(POLL, 1)
        upstream.patches[KEY] += [V3, V4]
        await run.cursor("v4")
        assert upstream.requests[0].path == POLL + "?after=v3"
        assert await run.store.memberships([context_hash("gap")]) == [{}]


async def test_a_poll_that_does_not_fit_is_repeated_with_pauses(upstream, server):
    """It is asked again and again, but ever less often, and works as soon as it fits."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
    upstream.patches[KEY] = [V1, V2, GAP]
    upstream.requests.clear()
    async with synchronising(upstream, server) as run:
        await asyncio.sleep(0.5)
        assert 3 <= upstream.asked(POLL) <= 25
        assert upstream.asked(STREAM) == 0
        upstream.patches[KEY] = [V1, V2, V3]
        await run.cursor("v3")


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        (POLL, answers.status(401)),
        (POLL, answers.status(403)),
        (POLL, answers.status(404)),
        (POLL, answers.status(500)),
        (POLL, answers.body(b"{}", "application/json")),
        (POLL, answers.body(b"[{", "application/json")),
        (POLL, answers.body(b"[{", "application/json", then="abort")),
        (STREAM, answers.status(401)),
        (STREAM, answers.status(503)),
        (STREAM, answers.body(b"data: nonsense\n\n", then="stall")),
        (STREAM, answers.body(b": hello\n\n", then="end")),
    ],
)
async def test_errors_are_waited_out(upstream, server, path, answer, caplog):
    """After any failure it tries again; the log says when it begins and when it ends."""
    caplog.set_level(logging.INFO, LOG.name)
    upstream.script_path(path, answer, answer)
    async with synchronising(upstream, server) as run:
        await upstream.until_asked(STREAM, 1 + 2 * (path == STREAM))
        await until(lambda: "Re-established connection" in caplog.text, 10)
        await run.cursor("v2")
    failures = caplog.text.count("Synchronization failed")
    assert failures == caplog.text.count("Re-established connection") <= 2
    assert KEY not in caplog.text


async def test_a_lost_stream_is_opened_again(upstream, server):
    """Patches that were made meanwhile are polled."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        upstream.close_streams()
        upstream.patches[KEY] += [V3]
        await run.cursor("v3")


async def test_the_current_key_is_used(upstream, server):
    """After a rotation the next request has the new key."""
    keys = [KEY]
    async with synchronising(upstream, server, keys) as run:
        await run.cursor("v2")
        upstream.serve("sdk-new", "{}")
        upstream.patches["sdk-new"] = [V1, V2, V3]
        keys.append("sdk-new")
        upstream.close_streams()
        await run.cursor("v3")


async def test_a_patch_before_the_failure_is_kept(upstream, server):
    """Patches before a broken answer's end are stored, and the next poll asks for the rest."""
    text = b"[" + event(V1).partition(b": [")[2].strip()[:-1]
    upstream.script_path(POLL, answers.body(b"[" + text[1:] + b",{", "application/json"))
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        assert [each.path for each in upstream.requests][1] == POLL + "?after=v1"
        assert run.synchroniser.applied == 2


async def test_two_that_both_have_a_lease_apply_each_patch_once(upstream, server):
    """As beside ld-relay, both follow the stream; each patch is applied once, and both report it."""
    async with (
        synchronising(upstream, server, lease="one") as one,
        synchronising(upstream, server, lease="other") as other,
    ):
        await one.cursor("v2")
        await other.cursor("v2")
        before = "v2"
        for number in range(3, 40):
            version = f"v{number}"
            one.changes.clear()
            other.changes.clear()
            key = f"user-{number}"
            await upstream.send_patches(
                KEY, segment_patch("team.g2", version, before, include=[key])
            )
            await one.cursor(version)
            await other.cursor(version)
            for run in (one, other):
                await until(lambda run=run: bool(run.changes))
            before = version
        assert one.synchroniser.applied + other.synchroniser.applied == 39
        assert upstream.asked(STREAM) == 2


async def test_a_wiped_database_is_filled_again(upstream, server):
    """A patch is never applied to nothing: all are fetched from the beginning."""
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        server.do("FLUSHALL")
        await upstream.send_patches(KEY, V3)
        await run.cursor("v3")
        assert await run.store.memberships([ANN, BEN]) == [{}, {"team.g2": True}]


async def test_a_database_that_is_away_is_waited_for(upstream, tmp_path):
    """Nothing is lost while it is away, and nothing is applied twice."""
    with RedisServer(tmp_path, appendonly="yes", appendfsync="always") as redis:
        async with synchronising(upstream, redis) as run:
            await run.cursor("v2")
            redis.kill()
            await upstream.send_patches(KEY, V3)
            await asyncio.sleep(0.1)
            redis.start()
            await run.cursor("v3")
            assert run.synchroniser.applied == 3


# The lease


@pytest.fixture
def brief_lease(monkeypatch):
    """A lease that is over soon."""
    monkeypatch.setattr(module, "LEASE", 0.6)
    monkeypatch.setattr(RedisBigSegmentStore, "lease_lifetime", 0.6)


@pytest.mark.timing
async def test_one_of_several_relays_synchronises(upstream, server, brief_lease):
    """The others ask nothing of upstream, and look at the database again and again."""
    async with (
        synchronising(upstream, server) as one,
        synchronising(upstream, server) as other,
        synchronising(upstream, server) as third,
    ):
        runs = [one, other, third]
        await until(lambda: any(run.synchroniser.connected for run in runs), 10)
        await upstream.send_patches(KEY, V3)
        [holder] = [run for run in runs if run.synchroniser.has_lease]
        await holder.cursor("v3")
        waiting = [run for run in runs if run is not holder]
        for run in waiting:
            looks = run.looks
            await until(lambda run=run, looks=looks: run.looks > looks + 8, 10)
        assert [run for run in runs if run.synchroniser.has_lease] == [holder]
        assert upstream.asked(STREAM) == 1
        assert not any(run.synchroniser.applied or run.changes for run in waiting)


@pytest.mark.timing
async def test_the_next_relay_goes_on_when_one_ends(upstream, server):
    """At once when it ends in order; its clients hear that anything may have changed."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(synchronising(upstream, server))
        await first.cursor("v2")
        async with synchronising(upstream, server) as following:
            await until(lambda: following.looks > 0)
            await stack.aclose()
            start = clock.monotonic()
            await following.cursor("v2")
            assert clock.monotonic() - start < module.LEASE / 2
            assert following.changes == [None]


async def test_a_relay_without_upstream_leaves_the_lease_to_others(upstream, server, brief_lease):
    """It cannot reach LaunchDarkly; within moments another one synchronises."""
    async with ScriptedUpstream() as broken:
        broken.script_path(POLL, *[answers.status(503)] * 1000)
        async with synchronising(broken, server) as blind:
            await broken.until_asked(POLL, 3)
            async with synchronising(upstream, server) as seeing:
                await seeing.cursor("v2")
                asked = broken.asked(POLL)
                looks = blind.looks
                await until(lambda: blind.looks > looks + 5, 10)
                assert broken.asked(POLL) <= asked + 1


@pytest.mark.timing
async def test_a_lease_that_another_takes_ends_the_work(upstream, server, brief_lease, caplog):
    """The stream is closed, and opened again when the lease is free."""
    caplog.set_level(logging.INFO, LOG.name)
    async with synchronising(upstream, server) as run:
        await run.cursor("v2")
        server.do("SET", "big:$relay:big_segments", "somebody-else", "PX", 1500)
        await until(lambda: not run.synchroniser.connected)
        assert not run.synchroniser.has_lease
        upstream.patches[KEY] += [V3]
        await run.cursor("v3")
        assert None in run.changes
    for line in ("has lost its lease", "another relay synchronizes", "from now on"):
        assert caplog.text.count(line) == 1


async def test_a_lease_that_cannot_be_renewed_ends_the_work(upstream, tmp_path, brief_lease):
    """With the database away this relay cannot know whether another one has begun."""
    with RedisServer(tmp_path, appendonly="yes", appendfsync="always") as redis:
        async with synchronising(upstream, redis) as run:
            await run.cursor("v2")
            redis.pause()
            await until(lambda: not run.synchroniser.has_lease, 5)
            redis.go_on()
            await run.cursor("v2")
