"""A running forwarder for tests, and its payloads."""

from __future__ import annotations

import asyncio
import contextlib
import time

from relay.backoff import Backoff
from relay.events.forwarder import Forwarder
from relay.events.policy import ForwarderTimings
from relay.events.spool import DiskSpool, MemorySpool
from relay.events.store import Limits
from relay.model.credential import EnvironmentID, MobileKey, SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.upstream import Upstream
from tests.support.upstream import PATIENCE

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
async def forwarding(
    url, *, timings=FAST, specs=(SPEC, BARE), directory=None, limits=LIMITS, retry=0.01
):
    """A running forwarder; it drains and ends with the block. `specs` may be a changing dict."""
    known = specs if isinstance(specs, dict) else {spec.name: spec for spec in specs}
    spool = DiskSpool(directory, limits, retry) if directory else MemorySpool(limits)
    async with Upstream() as upstream:
        forwarder = Forwarder(spool, upstream, url, known.get, timings)
        running = asyncio.create_task(forwarder.run())
        await asyncio.sleep(0)  # so that it has begun
        try:
            yield forwarder
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def settled(forwarder, environment="prod"):
    """Wait until nothing of an environment waits any more."""
    async with asyncio.timeout(PATIENCE):
        while forwarder.counts(environment).waiting or forwarder.oldest(environment) is not None:
            await forwarder.spool.do(lambda _: None)
            await asyncio.sleep(0)


def events(posts):
    return [event for each in posts for event in each.events]
