"""The ways in which a function can get its flags, each with what serves it."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from bench import data
from bench.cold_start.burst import Setup
from bench.machine import SERVER_CORE, Process, pinned
from bench.measures import whole
from bench.servers import SDK_KEY, Relay, Session
from bench.upstream import Upstream
from tests.support.redis import RedisServer

LATENCY = 0.05
"""Seconds of a round trip to LaunchDarkly: another continent's, or a bad day in one's own."""
PREFIX = "launchdarkly"
DATASETS = {10: "6k", 1000: "570k"}
"""The data set with so many flags."""


@dataclass(frozen=True)
class Place:
    """Servers of a burst, and the setup that leads SDKs to them."""

    setup: Setup
    upstream: Upstream
    """The stand-in for LaunchDarkly: near the relay's other end, or asked directly."""
    relay: Process | None = None


@dataclass(frozen=True)
class Way:
    """A name, and how to make its place for a data set."""

    name: str
    open: Callable[[str], AbstractContextManager[Place]]


DIRECT_STREAM, DIRECT_POLL = "direct, streaming", "direct, polling"
RELAY_STREAM, RELAY_POLL = "Relay, streaming", "Relay, polling"
DAEMON = "daemon mode"
PEER_STREAM = "reference, streaming"


def ways(own: str, peer: str) -> list[Way]:
    """All of them; `own` and `peer` are command lines of relays, a peer is optional.

    The peer streams only: the reference relay has no path on which servers' SDKs poll.
    """
    found = [
        Way(DIRECT_STREAM, partial(_direct, stream=True)),
        Way(DIRECT_POLL, partial(_direct, stream=False)),
        Way(RELAY_STREAM, partial(_relay, Relay(RELAY_STREAM, own), stream=True)),
        Way(RELAY_POLL, partial(_relay, Relay(RELAY_POLL, own), stream=False)),
        Way(DAEMON, _daemon),
    ]
    if peer:
        found.append(Way(PEER_STREAM, partial(_relay, Relay(PEER_STREAM, peer), stream=True)))
    return found


@contextmanager
def _direct(dataset: str, *, stream: bool) -> Iterator[Place]:
    with _launchdarkly(dataset) as upstream:
        yield Place(Setup(SDK_KEY, upstream.url, upstream.events_url, stream), upstream)


@contextmanager
def _relay(relay: Relay, dataset: str, *, stream: bool) -> Iterator[Place]:
    with relay.serve(dataset, events=True, latency=LATENCY) as session:
        session.await_status(size=whole(dataset))
        upstream = _upstream(session)
        upstream.open_mailbox(keep=True)
        url = session.url("")
        yield Place(Setup(SDK_KEY, url, url, stream), upstream, session.process)


@contextmanager
def _daemon(dataset: str) -> Iterator[Place]:
    """A filled Redis; events go to LaunchDarkly directly, there being nobody else."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        _launchdarkly(dataset) as upstream,
        _on_server_core(RedisServer(Path(folder))) as redis,
    ):
        flags = data.flags(dataset)
        values = {key: data.compact(flag) for key, flag in flags.items()}
        redis.do("HSET", f"{PREFIX}:features", *chain.from_iterable(values.items()))
        redis.do("SET", f"{PREFIX}:$inited", "")
        setup = Setup(SDK_KEY, upstream.url, upstream.events_url, stream=True, redis=redis.url)
        yield Place(setup, upstream)


@contextmanager
def _launchdarkly(dataset: str) -> Iterator[Upstream]:
    """The stand-in as the server that is compared: far away, on a core without SDKs."""
    with Upstream({SDK_KEY: dataset}, LATENCY, SERVER_CORE) as upstream:
        upstream.open_mailbox(keep=True)
        yield upstream


@contextmanager
def _on_server_core(server: RedisServer) -> Iterator[RedisServer]:
    with pinned(SERVER_CORE):
        server.start()
    try:
        yield server
    finally:
        server.kill()


def _upstream(session: Session) -> Upstream:
    if session.upstream is None:
        raise TypeError("this server has no upstream")
    return session.upstream


def await_events(upstream: Upstream, count: int, silence: float) -> int:
    """Wait until so many events have arrived, or none came for a while; return their number."""
    arrived, changed = 0, time.monotonic()
    while True:
        now = upstream.arrived(events=True).events
        if now >= count or (now == arrived and time.monotonic() > changed + silence):
            return now
        if now != arrived:
            arrived, changed = now, time.monotonic()
        time.sleep(0.1)
