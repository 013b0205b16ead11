"""Measurements of big segments with a relay and a Valkey: each function measures one round."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from bench import data
from bench.databases import Valkey
from bench.evaluations import LOAD_SECONDS, WARM_SECONDS, ask, serve
from bench.measures import MB, Measured, as_relay, upstream_of, with_variables
from bench.polls import quantile_ms
from bench.servers import POLL, SDK_KEY, SMALL_SDK_KEY, Certificate, Relay, Server, Session
from bench.table import PEER

PREFIX = "bench-main"
CURSOR, SYNCHRONIZED = f"{PREFIX}:big_segments_cursor", f"{PREFIX}:big_segments_synchronized_on"
PATIENCE = 300
"""Seconds until a million members are there."""
CONTROL_SECONDS = 5.0
"""For polls before the members come: what the machine itself makes wait."""
LOOK = 0.02
"""Seconds between two looks at the database; each disturbs what is measured."""


def evaluate(figure: str, contexts: int, server: Server, _: Certificate) -> Measured:
    """Ask for flags of which some need big segments, and for the same with listed members."""
    listed = _evaluations("eval-listed", contexts, server)
    big = _evaluations("eval-big", contexts, server)
    return {figure: big, f"{figure}, in those with listed members": big / listed}


def _evaluations(dataset: str, contexts: int, server: Server) -> float:
    with Valkey() as valkey, serve(_with(valkey, server), dataset) as session:
        if dataset == "eval-big":
            _until_synchronised(valkey.client)
        ask(session, dataset, contexts, 0, WARM_SECONDS)
        cpu = session.process.cpu_seconds()
        result = ask(session, dataset, contexts, contexts // 2, LOAD_SECONDS)
        return result.requests / (session.process.cpu_seconds() - cpu)


def million(server: Server, _: Certificate) -> Measured:
    """Let a big segment with a million members come in patches, and watch polls meanwhile."""
    if server.name == PEER:
        return {}  # a first answer that takes longer than three seconds never gets through
    with Valkey() as valkey, _with(valkey, server).serve("2k") as session:
        database = valkey.client
        session.await_status()
        with _watched(session) as slowest_before:
            time.sleep(CONTROL_SECONDS)
        before, cpu = session.process.resident_bytes(), session.process.cpu_seconds()
        with _watched(session) as slowest:
            start = upstream_of(session).put(SDK_KEY, "million", 2)
            _until_synchronised(database)
            took = time.monotonic() - start
        last = data.member_version(data.MILLION_PATCHES).encode()
        if database.get(CURSOR) != last:
            raise RuntimeError(f"the last patch is not stored: {database.get(CURSOR)!r}")
        return {
            "a million members: time": took,
            "a million members: CPU": session.process.cpu_seconds() - cpu,
            "a million members: memory growth": (session.process.peak_bytes() - before) / MB,
            "a million members: worst small poll": max(slowest) * 1e3,
            "a million members: worst small poll before": max(slowest_before) * 1e3,
            "a million members: p99.9 of small polls": quantile_ms(sorted(slowest), 0.999),
        }


def _with(valkey: Valkey, server: Server) -> Relay:
    given = {"LD_PREFIX_main": PREFIX, "LD_PREFIX_small": "bench-small", **valkey.variables}
    return with_variables(as_relay(server), **given)


def _until_synchronised(database: redis.Redis) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if database.get(SYNCHRONIZED):
            return
        time.sleep(LOOK)
    raise RuntimeError("the big segments are never synchronised")


@contextmanager
def _watched(session: Session) -> Iterator[list[float]]:
    """Poll another environment without a pause; yields the seconds of all polls."""
    times: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        watcher = session.client(SMALL_SDK_KEY)
        while not ended.is_set():
            times.append(watcher.get(POLL).seconds)
            time.sleep(0.001)
        watcher.close()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield times
    finally:
        ended.set()
        thread.join()
