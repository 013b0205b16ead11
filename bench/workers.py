"""Several processes: what a worker costs, and who notices that one dies or is restarted."""

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from bench import posts
from bench.crowd import Crowd
from bench.data import numbered_event
from bench.machine import CORES, Closing
from bench.measures import (
    DISK,
    MB,
    SILENCE_SECONDS,
    Measured,
    as_relay,
    upstream_of,
    with_variables,
)
from bench.polls import Load
from bench.servers import (
    HEADERS,
    POLL,
    SDK_KEY,
    START_SECONDS,
    Certificate,
    Relay,
    Server,
    Session,
)
from bench.table import OURS

STREAMS = 3000
NEW_CONNECTIONS = 400
"""New connections a second while a worker or the feeder dies."""
BUSY_SECONDS = 0.3
"""For so long a worker does nothing before it is killed."""
AFTER_SECONDS = 2.0
PATCHES = 30
POSTS, POST_SECONDS = 200, 5
"""Posts of events a second while the feeder dies, and for how long."""
COUNTERS_EVERY = 0.02
DATASETS = {"2k": "2 KB", "2m": "2 MB"}


def workers(server: Server, _: Certificate) -> Measured:
    """Share streams out, then kill a worker under new connections."""
    if server.name != OURS:
        return {}
    start = _start_seconds(server)
    with serving(server, "2k", 4) as session:
        with Crowd(session.port, SDK_KEY, STREAMS) as crowd:
            crowd.connect()
            time.sleep(AFTER_SECONDS)
            shares = [each["streams"] for each in _status(session)["workers"]]
        opened = upstream_of(session).connections(SDK_KEY)
        victim = _status(session)["workers"][0]["pid"]
        figures = _watched(session, "a worker dies", lambda: _kill_worker(session, victim))
    replaced = figures["a worker dies: until it is replaced"]
    return {
        "4 workers: connections upstream": max(number for _, number in opened),
        f"{STREAMS} streams on 4 workers: most by fewest": max(shares) / min(shares),
        **figures,
        "a worker dies: until it is replaced, in a start of a relay": replaced / 1e3 / start,
    }


def rolling(server: Server, _: Certificate) -> Measured:
    """Let all workers end in an orderly way, one after the other, under new connections."""
    if server.name != OURS:
        return {}
    with serving(server, "2k", 4) as session, Crowd(session.port, SDK_KEY, 400) as crowd:
        crowd.connect()

        def restart() -> float:
            began = time.monotonic()
            for number, worker in enumerate(_status(session)["workers"]):
                os.kill(worker["pid"], signal.SIGTERM)
                _await(session, partial(_has_restarted, number))
            return time.monotonic() - began

        return _watched(session, "4 workers end, one by one", restart, "all are replaced")


def feeder(server: Server, _: Certificate) -> Measured:
    """Kill the feeder under streams, new connections, polls of counters, and posts of events."""
    if server.name != OURS:
        return {}
    label, made = "the feeder dies", POSTS * POST_SECONDS
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as folder, ExitStack() as end:
        relay = with_variables(on_cores(server, 2), EVENTS_SPOOL_DIR=f"{folder}/spool")
        session = end.enter_context(relay.serve("2k", events=True))
        session.await_status()
        _await_workers(session, 2)
        upstream_of(session).open_mailbox(keep=True)
        crowd = end.enter_context(Crowd(session.port, SDK_KEY, 1000))
        crowd.connect()
        counters = end.enter_context(_Counters(session))
        pool = end.enter_context(ThreadPoolExecutor(1))
        posting = pool.submit(_post, session)
        figures = _watched(session, label, lambda: _kill_feeder(session))
        taken = posting.result()
        until = time.monotonic() + SILENCE_SECONDS
        while (arrived := upstream_of(session).arrived(events=True)).events < made:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        return {
            **figures,
            f"{label}: streams that end": crowd.ended(),
            f"{label}: posts lost": taken.requests - arrived.events,
            f"{label}: posts delivered twice": arrived.repeated,
            f"{label}: counters that go back": counters.stop(),
        }


def _post(session: Session) -> Load:
    """Post distinct events at a steady pace; each must be accepted."""
    url = session.url("/bulk")
    return posts.post(
        url, HEADERS, lambda n: numbered_event(n, 500), seconds=POST_SECONDS, rate=POSTS
    )


def _start_seconds(server: Server) -> float:
    """The time that a relay of one process takes from exec to its first 200."""
    with on_cores(server, 1).serve("2k") as session:
        return session.await_status(pause=0.002) - session.started


def memory(server: Server, _: Certificate) -> Measured:
    """Private memory of relays with one process, two workers and four."""
    if server.name != OURS:
        return {}
    figures: dict[str, float] = {}
    for dataset, label in DATASETS.items():
        sizes = {}
        for number in (1, 2, 4):
            with serving(server, dataset, number) as session:
                time.sleep(AFTER_SECONDS)
                sizes[number] = session.process.proportional_bytes() / MB
        figures[f"one worker more, {label}: memory"] = (sizes[4] - sizes[2]) / 2
        figures[f"4 workers, {label}: memory, in that of 4 relays"] = sizes[4] / 4 / sizes[1]
    return figures


def patch(server: Server, _: Certificate) -> Measured:
    """Time from upstream to a stream, with one process and through feeder and worker."""
    if server.name != OURS:
        return {}
    times = {}
    for number in (1, 2):
        with serving(server, "2k", number) as session, Crowd(session.port, SDK_KEY, 1) as crowd:
            crowd.connect()
            each = []
            for version in range(PATCHES):
                marker = f"patch-{number}-{version}-"
                sent = upstream_of(session).patch(SDK_KEY, 10 + version, marker)
                each.append(crowd.expect(marker)[0] - sent)
                time.sleep(0.01)
            times[number] = median(each) * 1e3
    return {
        "patch through feeder and worker, beyond one process": times[2] - times[1],
        "patch through feeder and worker": times[2],
    }


def on_cores(server: Server, number: int) -> Relay:
    """Return the relay with so many workers, or threads in Go, on all cores."""
    relay = with_variables(as_relay(server), WORKERS=str(number), GOMAXPROCS=str(number))
    return replace(relay, cores=CORES)


@contextmanager
def serving(server: Server, dataset: str, number: int, **variables: str) -> Iterator[Session]:
    """Run it with so many workers until all of them serve."""
    relay = with_variables(on_cores(server, number), **variables)
    with relay.serve(dataset) as session:
        session.await_status()
        if number > 1 and server.name == OURS:
            _await_workers(session, number)
        yield session


def _await_workers(session: Session, number: int) -> None:
    _await(session, lambda status: len(status.get("workers", ())) == number)


def _has_restarted(number: int, status: Mapping[str, Any]) -> bool:
    return bool(status["workers"][number]["restarts"] == 1)


def _status(session: Session) -> Mapping[str, Any]:
    client = session.client()
    try:
        status: Mapping[str, Any] = json.loads(client.get("/status").body)
    finally:
        client.close()
    return status


def _await(session: Session, holds: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        status = _status(session)
        if status["status"] == "healthy" and holds(status):
            return status
        time.sleep(0.005)
    raise RuntimeError(f"{session.url('/status')}: {status}")


def _kill_worker(session: Session, victim: int) -> float:
    """Kill a worker that has been busy; return the seconds until another one serves."""
    os.kill(victim, signal.SIGSTOP)
    time.sleep(BUSY_SECONDS)
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    status = _await(session, partial(_has_restarted, 0))
    return float(status["workers"][0]["since"]) / 1000 - killed


def _kill_feeder(session: Session) -> float:
    """Kill the feeder; return the seconds until another one has confirmed data."""
    workers = {each["pid"] for each in _status(session)["workers"]}
    (feeder,) = set(session.process.children()) - workers
    killed = time.time()
    os.kill(feeder, signal.SIGKILL)

    def is_confirmed(status: Mapping[str, Any]) -> bool:
        connection = status["environments"]["main"]["connectionStatus"]
        return bool(connection["state"] == "VALID" and connection["stateSince"] / 1000 > killed)

    _await(session, is_confirmed)
    return time.time() - killed


def _watched(
    session: Session, label: str, kill: Callable[[], float], until: str = "it is replaced"
) -> Measured:
    """Return what new connections notice while something dies."""
    visitor = _Visitor(session)
    time.sleep(AFTER_SECONDS / 2)
    seconds = kill()
    time.sleep(AFTER_SECONDS)
    visitor.stop()
    return {
        f"{label}: until {until}": seconds * 1e3,
        f"{label}: failed new connections": visitor.failed,
        f"{label}: worst answer": visitor.worst * 1e3,
    }


class _Visitor:
    """Opens connections at a steady pace, each for one poll."""

    def __init__(self, session: Session) -> None:
        self.failed = 0
        self.worst = 0.0
        self._session = session
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(8)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            due += len(self._threads) / NEW_CONNECTIONS
            client = self._session.client(SDK_KEY)
            began = time.monotonic()
            try:
                self.failed += client.get(POLL).status != 200
            except OSError:
                self.failed += 1
            self.worst = max(self.worst, time.monotonic() - began)
            client.close()

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()


class _Counters(Closing):
    """Asks for metrics again and again, and counts how often a counter is less than before."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._stopped = threading.Event()
        self._fell = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        known: dict[str, float] = {}
        while not self._stopped.wait(COUNTERS_EVERY):
            client = self._session.client()  # each time of any worker
            for line in client.get("/metrics").body.decode().splitlines():
                name, _, value = line.rpartition(" ")
                if "_total{" in name and not name.startswith("#"):
                    self._fell += float(value) < known.get(name, 0.0)
                    known[name] = float(value)
            client.close()

    def stop(self) -> int:
        """End it; return how often a counter fell."""
        self.close()
        return self._fell

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
