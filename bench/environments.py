"""Environments by the hundred, which a relay is told by automatic configuration."""

import time
from statistics import median

from bench.data import SIZES, environment, flag_key
from bench.measures import (
    LOAD_SECONDS,
    MB,
    WARM_SECONDS,
    Measured,
    as_relay,
    upstream_of,
    whole,
)
from bench.polls import load
from bench.servers import HEADERS, POLL, START_SECONDS, Certificate, Server, Session, sdk_keys

ENVIRONMENTS = 500
DATASET = "28k"
LAST_FLAG = f"{POLL}/{flag_key(SIZES[DATASET].flags - 1)}"
SETTLING_SECONDS = 3
IDLE_SECONDS = 20
MINUTE = 60
ADDED = 20
"""Environments added one by one in a round; their median is the round's figure."""
MANY = f"{ENVIRONMENTS} environments"


def many(server: Server, _: Certificate) -> Measured:
    """Start with all of them, then leave the relay in peace."""
    with as_relay(server).serve(DATASET, automatic=ENVIRONMENTS) as session:
        served = await_all(session)
        starting = session.process.cpu_seconds()
        time.sleep(SETTLING_SECONDS)
        memory, cpu = session.process.private_bytes(), session.process.own_cpu_seconds()
        time.sleep(IDLE_SECONDS)
        cpu = session.process.own_cpu_seconds() - cpu
        return {
            f"{MANY}: exec → all served": served - session.started,
            f"{MANY}: exec → all served, CPU": starting,
            f"{MANY}: memory": memory / MB,
            f"{MANY}: peak memory": session.process.peak_bytes() / MB,
            f"{MANY}: idle CPU": cpu * 1e3 * MINUTE / IDLE_SECONDS,
        }


def added(server: Server, _: Certificate) -> Measured:
    """Add one after the other, each when the one before is served."""
    times, slowest = [], 0.0
    with as_relay(server).serve(DATASET, automatic=ENVIRONMENTS) as session:
        await_all(session)
        time.sleep(SETTLING_SECONDS)
        watcher = session.client()
        for number in range(ADDED):
            key = f"sdk-bench-added-{number}"
            client = session.client(key)
            status, size = 0, 0
            sent = upstream_of(session).environment(DATASET, environment(key, key))
            while (status, size >= whole(DATASET)) != (200, True):
                slowest = max(slowest, watcher.get(LAST_FLAG).seconds)
                response = client.get(POLL)
                status, size = response.status, len(response.body)
            times.append(time.monotonic() - sent)
            client.close()
        watcher.close()
    return {
        f"one more than {MANY}: sent → served": median(times) * 1e3,
        f"one more than {MANY}: worst poll of another meanwhile": slowest * 1e3,
    }


def beside(server: Server, _: Certificate) -> Measured:
    """Poll an environment that is alone, and one that is not: after each other, then again."""
    rates: dict[int, list[float]] = {1: [], ENVIRONMENTS: []}
    for environments in (1, ENVIRONMENTS, ENVIRONMENTS, 1):
        with as_relay(server).serve(DATASET, automatic=environments) as session:
            await_all(session, environments)
            time.sleep(SETTLING_SECONDS)
            load(session.url(), HEADERS, WARM_SECONDS)
            cpu = session.process.cpu_seconds()
            result = load(session.url(), HEADERS, LOAD_SECONDS)
            cpu = session.process.cpu_seconds() - cpu
            rates[environments].append(result.requests / cpu)
    alone, among = (sum(rates[environments]) / 2 for environments in (1, ENVIRONMENTS))
    return {
        f"poll among {MANY}, in polls of one alone": among / alone,
        f"poll among {MANY}": among,
    }


def await_all(session: Session, environments: int = ENVIRONMENTS) -> float:
    """Wait until every environment serves its flags; return that time."""
    until = time.monotonic() + START_SECONDS
    session.await_status(LAST_FLAG)
    for key in sdk_keys(environments):
        client = session.client(key)
        while client.get(LAST_FLAG).status != 200:
            if time.monotonic() > until:
                raise RuntimeError(f"{key} is not served")
            time.sleep(0.005)
        client.close()
    return time.monotonic()
