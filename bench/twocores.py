"""Two workers on two cores: beside one process, and beside a peer that may use two threads.

Clients take part of these cores. So streams' clients do not read meanwhile (the kernel notes when
bytes arrive), and what others cost shows in figures per CPU-second of the server.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from bench import evaluations, measures
from bench.crowd import Crowd
from bench.machine import cpu_seconds
from bench.measures import LOAD_SECONDS, PATCHES, WARM_SECONDS, Measured, upstream_of, whole
from bench.polls import Load, load, quantile_ms
from bench.servers import HEADERS, SDK_KEY, Certificate, Server, Session
from bench.table import OURS
from bench.workers import on_cores, serving

STREAMS = 15_000
UNREAD_SECONDS = 1.0
"""Time after a patch in which clients do not read."""
CHURN = 0.003
"""Share of the clients that come anew each second."""
CHURN_PATCHES = 20
WARM_REQUESTS = 5000
BOTH = "2 workers on 2 cores"
PATCH = f"{BOTH}, one patch to {STREAMS:,} streams"
CHURNED = f"{BOTH}, {STREAMS:,} streams, 0.3 % of them new each second"
EVALUATED = f"{BOTH}, evaluate 1000 flags, new contexts"
POLLED = f"{BOTH}, poll 2 KB"
POSTED = f"{BOTH}, posts of 43 events"
OF_ONE = "in that of one process"


def fan_out(server: Server, _: Certificate) -> Measured:
    """Send patches to clients that do not read."""
    last, cpu, busiest = {}, {}, {}
    for number in (1, 2) if server.name == OURS else (2,):
        with (
            serving(server, "2k", number) as session,
            Crowd(session.port, SDK_KEY, STREAMS, stamped=True) as crowd,
        ):
            crowd.connect()
            last[number], cpu[number], busiest[number] = _patch(session, crowd)
    return {
        f"{PATCH}: last write": last[2] * 1e3,
        f"{PATCH}: CPU per message": cpu[2] * 1e6,
        **_of_one(f"{PATCH}: last write", last),
        **_of_one(f"{PATCH}: CPU per message", cpu),
        **_of_one(f"{PATCH}: CPU of the busiest process", busiest),
    }


def _patch(session: Session, crowd: Crowd) -> tuple[float, float, float]:
    """Return the seconds until the last write, and CPU seconds per message: all, and the most."""
    processes = [session.process.pid, *session.process.children()]
    times = []
    used = dict.fromkeys(processes, 0.0)
    for version in range(2, 2 + PATCHES):
        marker = f"marker-{version}-end"
        before = {pid: cpu_seconds(pid) for pid in processes}
        sent = upstream_of(session).patch(SDK_KEY, version, marker)
        time.sleep(UNREAD_SECONDS)
        for pid in processes:
            used[pid] += cpu_seconds(pid) - before[pid]
        times.append(max(crowd.arrivals(marker, sent)) - sent)
    each = PATCHES * STREAMS
    return median(times), sum(used.values()) / each, max(used.values()) / each


def churn(server: Server, _: Certificate) -> Measured:
    """Send patches while clients go and come."""
    times = []
    with (
        serving(server, "2k", 2) as session,
        Crowd(session.port, SDK_KEY, STREAMS, stamped=True) as crowd,
    ):
        crowd.connect()
        for version in range(2, 2 + CHURN_PATCHES):
            marker = f"marker-{version}-end"
            _replace(crowd, UNREAD_SECONDS / 2)
            sent = upstream_of(session).patch(SDK_KEY, version, marker)
            _replace(crowd, UNREAD_SECONDS / 2)
            times += [each - sent for each in crowd.arrivals(marker, sent)]
    return {
        f"{CHURNED}: p99 of a patch": quantile_ms(times, 0.99),
        f"{CHURNED}: worst of a patch": max(times) * 1e3,
    }


def _replace(crowd: Crowd, seconds: float) -> None:
    """Let clients go and come at their pace."""
    due = start = time.monotonic()
    while due < start + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        crowd.replace()
        due += 1 / (CHURN * STREAMS)


def evaluate(server: Server, _: Certificate) -> Measured:
    """Evaluate all flags for contexts that never come twice."""

    def ask(session: Session, first: int, seconds: float) -> Load:
        return evaluations.ask(session, "eval-1000", evaluations.NEW, first, seconds)

    def measure(number: int) -> tuple[float, float]:
        client_side = {"LD_CLIENT_SIDE_ID_main": evaluations.ENVIRONMENT_ID}
        with serving(server, "eval-1000", number, **client_side) as session:
            session.await_status(evaluations.poll_path(0))
            return _rates(session, partial(ask, session))

    return _compared(EVALUATED, server, measure)


def polls(server: Server, _: Certificate) -> Measured:
    """Poll as fast as it goes."""

    def ask(session: Session, _: int, seconds: float) -> Load:
        return load(session.url(), HEADERS, seconds)

    def measure(number: int) -> tuple[float, float]:
        with serving(server, "2k", number) as session:
            session.await_status(size=whole("2k"))
            return _rates(session, partial(ask, session))

    return _compared(POLLED, server, measure)


def post_events(capacity: int, server: Server, certificate: Certificate) -> Measured:
    """Post as fast as it goes; upstream takes all."""

    def measure(number: int) -> Measured:
        return measures.post_events(POSTED, capacity, on_cores(server, number), certificate)

    measured = measure(2)
    if server.name == OURS:
        measured |= _of_one(POSTED, {1: measure(1)[POSTED], 2: measured[POSTED]})
    return measured


def _compared(
    figure: str, server: Server, measure: Callable[[int], tuple[float, float]]
) -> Measured:
    """Measure with one process, if it is ours, and with two workers."""
    rates, walls = {}, {}
    for number in (1, 2) if server.name == OURS else (2,):
        rates[number], walls[number] = measure(number)
    return {
        figure: rates[2],
        f"{figure}: wall": walls[2],
        **_of_one(figure, rates),
        **_of_one(f"{figure}: wall", walls),
    }


def _rates(session: Session, ask: Callable[[int, float], Load]) -> tuple[float, float]:
    """Return requests per CPU-second of the server, and by the wall."""
    warm = 0
    while warm < WARM_REQUESTS:  # each worker compiles flags, and learns what contexts share
        warm += ask(evaluations.NEW // 4 + warm, WARM_SECONDS).requests
    cpu = session.process.cpu_seconds()
    result = ask(evaluations.NEW // 2, LOAD_SECONDS)
    cpu = session.process.cpu_seconds() - cpu
    return result.requests / cpu, result.requests / result.seconds


def _of_one(figure: str, figures: dict[int, float]) -> Measured:
    return {f"{figure}, {OF_ONE}": figures[2] / figures[1]} if 1 in figures else {}
