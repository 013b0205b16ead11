"""Several processes: what a worker costs, and who notices that one dies."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

from bench.crowd import Crowd
from bench.machine import CORES, pinned
from bench.measures import MB, Measured, as_relay, upstream_of, with_variables
from bench.servers import POLL, SDK_KEY, START_SECONDS, Certificate, Server, Session
from bench.table import OURS

STREAMS = 3000
NEW_CONNECTIONS = 400
"""New connections a second while a worker or the feeder dies."""
BUSY_SECONDS = 0.3
"""For so long a worker does nothing before it is killed."""
AFTER_SECONDS = 2.0
PATCHES = 30
DATASETS = {"2k": "2 KB", "2m": "2 MB"}


def workers(server: Server, _: Certificate) -> Measured:
    """Share streams out, kill a worker, then the feeder, under new connections."""
    if server.name != OURS:
        return {}
    figures: dict[str, float] = {}
    with _serving(server, "2k", 4) as session:
        with Crowd(session.port, SDK_KEY, STREAMS) as crowd:
            crowd.connect()
            time.sleep(AFTER_SECONDS)
            shares = [each["streams"] for each in _status(session)["workers"]]
            figures[f"{STREAMS} streams on 4 workers: most by fewest"] = max(shares) / min(shares)
        victim = _status(session)["workers"][0]["pid"]
        figures |= _watched(session, "a worker dies", lambda: _kill_worker(session, victim))
        figures |= _watched(session, "the feeder dies", lambda: _kill_feeder(session))
    return figures


def memory(server: Server, _: Certificate) -> Measured:
    """Private memory of relays with one process, two workers and four."""
    if server.name != OURS:
        return {}
    figures: dict[str, float] = {}
    for dataset, label in DATASETS.items():
        sizes = {}
        for number in (1, 2, 4):
            with _serving(server, dataset, number) as session:
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
        with _serving(server, "2k", number) as session, Crowd(session.port, SDK_KEY, 1) as crowd:
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


@contextmanager
def _serving(server: Server, dataset: str, number: int) -> Iterator[Session]:
    relay = with_variables(as_relay(server), WORKERS=str(number))
    with pinned(*CORES), relay.serve(dataset) as session:
        session.await_status()
        if number > 1:
            _await(session, lambda status: len(status.get("workers", ())) == number)
        yield session


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
    status = _await(session, lambda status: status["workers"][0]["restarts"] == 1)
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


def _watched(session: Session, label: str, kill: Callable[[], float]) -> Measured:
    """Return what new connections notice while something dies."""
    visitor = _Visitor(session)
    time.sleep(AFTER_SECONDS / 2)
    seconds = kill()
    time.sleep(AFTER_SECONDS)
    visitor.stop()
    return {
        f"{label}: until it is replaced": seconds * 1e3,
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
