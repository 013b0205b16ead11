"""Traces of removed environments are forgotten, but not while they are needed."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from contextlib import closing

import pytest

from relay.environment import Environment
from relay.events.forwarder import Forwarder
from relay.events.policy import ForwarderTimings
from relay.events.spool import MemorySpool
from relay.events.store import Limits
from relay.housekeeping import Housekeeping
from relay.model.credential import SDKKey
from relay.model.environment import EnvironmentSpec
from relay.model.event import EventPayload, EventsEndpoint, Partition
from relay.registry import Registry
from relay.relay import Relay
from relay.streams.hub import Hub
from relay.telemetry import log
from relay.telemetry.traffic import RequestLabels, RequestMetrics
from relay.upstream import Upstream
from tests.support import upstream as answers
from tests.support.contracts import ScriptedSource
from tests.support.serving import until
from tests.support.upstream import ScriptedUpstream

KEY = "sdk-gone-4711"


def environment(name: str = "gone", key: str = KEY) -> Environment:
    spec = EnvironmentSpec(name, SDKKey(key))
    return Environment(spec, ScriptedSource(), Hub({}), logging.getLogger("relay.env.test"))


class Site:
    """A relay with counts."""

    def __init__(self) -> None:
        self.environment = environment()
        self.relay = Relay([self.environment], 0)
        self.traffic = RequestMetrics()
        self.forgotten: list[str] = []
        keepers = (self.traffic.forget, self.forgotten.append)
        self.housekeeping = Housekeeping(self.relay, keepers, interval=0.01)


def test_a_removed_environment_is_kept_for_a_round() -> None:
    """So that the last counts are read; then every keeper is told once."""
    site = Site()
    gone = RequestLabels("gone", "/all", "GET", "server", "Go/1")
    stays = RequestLabels("stays", "/all", "GET", "server", "Go/1")
    for counts in (site.traffic.requests, site.traffic.new_streams, site.traffic.streams):
        counts[gone].value += 1
        counts[stays].value += 1
    site.traffic.unusable["gone"] += 1
    site.traffic.discarded["gone"] += 1
    site.housekeeping.tidy()
    site.relay.remove(site.environment)
    site.housekeeping.tidy()
    assert site.forgotten == []
    assert site.relay.registry.spec_of("gone") is site.environment.spec
    assert gone in site.traffic.requests
    for _ in range(3):
        site.housekeeping.tidy()
    assert site.forgotten == ["gone"]
    assert site.relay.registry.spec_of("gone") is None
    for counts in (site.traffic.requests, site.traffic.new_streams, site.traffic.streams):
        assert list(counts) == [stays]
    assert not site.traffic.unusable
    assert not site.traffic.discarded


def test_a_name_that_is_used_again_is_not_forgotten() -> None:
    """Neither is one that was former at one round and is at the next, but not between."""
    site = Site()
    site.relay.remove(site.environment)
    site.housekeeping.tidy()
    site.relay.put(site.environment)
    for _ in range(3):
        site.housekeeping.tidy()
    assert site.forgotten == []


async def test_it_goes_round_by_itself() -> None:
    """Until it is cancelled."""
    site = Site()
    site.relay.remove(site.environment)
    running = asyncio.create_task(site.housekeeping.run())
    await until(lambda: site.forgotten == ["gone"])
    running.cancel()
    await asyncio.wait([running])


def test_garbage_of_removed_environments_is_collected() -> None:
    """Those of the start were exempt from that."""
    gc.freeze()
    site = Site()
    site.relay.remove(site.environment)
    site.housekeeping.tidy()
    assert gc.get_freeze_count()
    site.housekeeping.tidy()
    assert not gc.get_freeze_count()


def test_a_revoked_key_is_masked_a_little_longer() -> None:
    """Lines about its end are still to come. One that was put later is masked as well."""
    read, write = os.pipe()
    root, line = logging.getLogger(), logging.makeLogRecord({"msg": KEY, "levelno": logging.INFO})
    before = root.handlers[:]
    with closing(log.LogHandler(stdout=write, stderr=write)) as handler:
        root.handlers[:] = [handler]
        try:
            site = Site()
            handler.emit(line)
            site.relay.remove(site.environment)
            site.housekeeping.tidy()
            handler.emit(line)
            site.housekeeping.tidy()
            handler.emit(line)
        finally:
            root.handlers[:] = before
    os.close(write)
    lines = os.read(read, 65536).decode().splitlines()
    os.close(read)
    assert [line.rpartition(" ")[2] for line in lines] == ["...4711", "...4711", KEY]


@pytest.fixture(name="upstream")
async def scripted_upstream():
    async with ScriptedUpstream() as upstream:
        yield upstream


async def test_waiting_events_of_a_removed_environment_are_delivered(upstream) -> None:
    """With its last key, however long that takes; its name is kept until the last has gone."""
    registry: Registry[Environment] = Registry()
    timings = ForwarderTimings(flush_interval=0.01, drain=0.1)
    session = Upstream()
    async with session:
        forwarder = Forwarder(
            MemorySpool(Limits()), session, upstream.url, registry.spec_of, timings
        )
        stage = environment(key="sdk-first")
        relay = Relay([stage], 0, events=forwarder, registry=registry)
        housekeeping = Housekeeping(relay, ())
        delivering = asyncio.create_task(forwarder.run())
        upstream.script(KEY, answers.status(503))
        partition = Partition("gone", EventsEndpoint.BULK, 4)
        relay.change(stage, EnvironmentSpec("gone", SDKKey(KEY)))
        await forwarder.accept(EventPayload(partition, "one", b"[1]", 0.0))
        relay.remove(stage)
        await upstream.posted(1)
        for _ in range(3):
            housekeeping.tidy()
        assert registry.spec_of("gone") is not None
        assert forwarder.counts("gone").waiting == 1
        await upstream.took(1)
        await until(lambda: forwarder.counts("gone").waiting == 0)
        await until(lambda: (housekeeping.tidy(), registry.spec_of("gone"))[1] is None)
        assert forwarder.counts("gone").received == 0
        delivering.cancel()
        await asyncio.wait([delivering])
    assert {post.headers["Authorization"] for post in upstream.posts} == {KEY}
