"""A fleet of relays over one Valkey: who listens to upstream, and what clients notice of losses."""

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from statistics import median
from threading import Event, Thread
from typing import Any

from bench.data import flag
from bench.databases import Valkey
from bench.machine import CORES, Closing
from bench.measures import Measured, as_relay, whole
from bench.polls import quantile_ms
from bench.replicas import FLAG, Replica, Replicas
from bench.servers import SDK_KEY, START_SECONDS, Certificate, Relay, Server, Session, free_port
from bench.table import OURS
from bench.upstream import Upstream

CHANGE_EVERY = 0.05
CHANGE_BYTES = 1000
CHANGES = 300
"""Changes in a row of which each is timed."""
LOOKED_SECONDS = 1.5
"""After so long every member has looked who leads."""
FAILOVER_MEMBERS = 4
FAILOVERS = 4
"""Leaders that are killed, and that are stopped."""
LOST_SECONDS = 6.0
"""For so long Redis is away."""
BACK_SECONDS = 8.0
"""For so long changes are watched after it is back."""
PATIENCE = 20.0
"""Seconds after which a change is not waited for any more."""
CHAOS_SECONDS = 60
STARTS = 5
"""Starts of a follower; their median counts."""
STARTED = ("2k", "2m")
KILLED, STOPPED = "leader killed", "leader stopped"
REDIS_STOPPED, REDIS_KILLED, REDIS_EMPTIED = "Redis stopped", "Redis killed", "Redis emptied"
CHAOS = f"chaos for {CHAOS_SECONDS} s"
FOLLOWER = "follower with 2 MB, exec → served"
FIGURES = (
    *(f"relay_fleet_{each}" for each in ("role", "term", "role_changes_total")),
    "relay_fleet_behind_publications",
    'relay_fleet_publications_total{environment="main",outcome="fenced"}',
    'relay_fleet_publications_total{environment="main",outcome="moved"}',
    "relay_fleet_snapshots_total",
    "relay_fleet_leaderless_seconds",
)
"""Figures that the page of metrics of a leader must have."""


class Fleet(Closing):
    """Relays of one fleet with one environment, each on all cores.

    Args:
        relay: what all of them are.
        members: their number.
        dataset: of the environment.
    """

    def __init__(self, relay: Relay, members: int, dataset: str = "2k") -> None:
        self._relay = replace(relay, cores=CORES)
        self._dataset = dataset
        self._end = ExitStack()
        self.database = self._end.enter_context(Valkey())
        self.upstream = self._end.enter_context(Upstream({SDK_KEY: dataset}))
        self.sessions = [self._start(free_port()) for _ in range(members)]
        for session in self.sessions:
            session.await_status(size=whole(dataset))

    def _start(self, port: int) -> Session:
        which = {"LD_ENV_main": SDK_KEY, "FLEET": "true", **self.database.variables}
        return self._end.enter_context(self._relay.follow(self.upstream, which, port=port))

    def add(self) -> Session:
        """Start one more."""
        self.sessions.append(self._start(free_port()))
        return self.sessions[-1]

    def restart(self, number: int) -> None:
        """Start the relay with this number again, on the port that it had."""
        self.sessions[number].process.stop()
        self.sessions[number] = self._start(self.sessions[number].port)
        self.sessions[number].await_status(size=whole(self._dataset))

    def role(self, number: int) -> Mapping[str, Any]:
        """Return the part that a relay says it has; nothing if it does not answer."""
        client = self.sessions[number].client()
        try:
            status = json.loads(client.get("/status").body)
        except (OSError, ValueError):
            return {}
        finally:
            client.close()
        part: Mapping[str, Any] = status["environments"]["main"].get("fleet", {})
        return part

    def leader(self, members: Sequence[int] | None = None) -> int:
        """Wait until one of these members, or of all, leads and the others follow; return it."""
        members = range(len(self.sessions)) if members is None else members
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            roles = [self.role(number).get("role") for number in members]
            if sorted(map(str, roles)) == ["follower"] * (len(roles) - 1) + ["leader"]:
                return members[roles.index("leader")]
            time.sleep(0.02)
        raise RuntimeError(f"nobody leads: {roles}")

    def signal(self, number: int, which: signal.Signals) -> None:
        """Send a signal to all processes of a relay."""
        os.killpg(self.sessions[number].process.pid, which)

    def others(self, number: int) -> list[int]:
        """Return the numbers of all others."""
        return [each for each in range(len(self.sessions)) if each != number]

    def close(self) -> None:
        for session in self.sessions:
            with suppress(ProcessLookupError):
                os.killpg(session.process.pid, signal.SIGCONT)
        self._end.close()


class Changes(Closing):
    """Changes a flag at a steady pace, each time to the next version."""

    def __init__(self, fleet: Fleet) -> None:
        self.sent: dict[int, float] = {}
        """CLOCK_MONOTONIC time at which upstream has sent each version."""
        self._upstream = fleet.upstream
        self._version = 1
        self._stopped = Event()
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            due = max(due + CHANGE_EVERY, time.monotonic() - 1)
            version = self._version + 1
            body = flag(FLAG, version, CHANGE_BYTES)
            self.sent[version] = self._upstream.change(SDK_KEY, body)
            self._version = version

    def next_after(self, when: float) -> int:
        """Wait for the first version that is sent after a time; return it."""
        while not self.sent or self.sent[self._version] <= when:
            time.sleep(0.005)
        return next(version for version, sent in self.sent.copy().items() if sent > when)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()


@contextmanager
def watched(fleet: Fleet) -> Iterator[tuple[Changes, list[Replica]]]:
    """Change the flag, with a client at each relay."""
    with Replicas([session.port for session in fleet.sessions]) as replicas:
        until = time.monotonic() + PATIENCE
        while not all(client.versions for client in replicas.clients):
            if time.monotonic() > until:
                raise RuntimeError("not every relay serves streams")
            time.sleep(0.01)
        with Changes(fleet) as changes:
            time.sleep(1)
            yield changes, replicas.clients


def connections(members: int, server: Server, _: Certificate) -> Measured:
    """Count connections upstream while leaders end, are killed and stopped; time changes."""
    if server.name != OURS:
        return {}
    label = f"fleet of {members}"
    with Fleet(as_relay(server), members) as fleet:
        fleet.leader()
        settled = fleet.upstream.connections(SDK_KEY)[-1][1]
        with watched(fleet) as (changes, clients):
            time.sleep(CHANGES * CHANGE_EVERY)
            last = time.monotonic()
        sent = {version: when for version, when in changes.sent.items() if when < last - 1}
        behind = [max(client.has_at(each) for client in clients) - sent[each] for each in sent]
        for end in (signal.SIGTERM, signal.SIGKILL):
            leader = fleet.leader()
            fleet.signal(leader, end)
            fleet.leader(fleet.others(leader))
            fleet.restart(leader)
        leader = fleet.leader()
        stopped = time.monotonic()
        fleet.signal(leader, signal.SIGSTOP)
        fleet.leader(fleet.others(leader))
        fleet.signal(leader, signal.SIGCONT)
        continued = time.monotonic()
        fleet.leader()
        time.sleep(1)
        log = fleet.upstream.connections(SDK_KEY)
    # A process that is stopped cannot close what it holds: such time does not count.
    before = [span for span in _several(log) if span[0] < stopped]
    after = [(max(begin, continued), end) for begin, end in _several(log) if end > continued]
    return {
        f"{label}: connections upstream": settled,
        f"{label}: more of them at a change of leader": max(
            (end - begin for begin, end in (*before, *after)), default=0.0
        )
        * 1e3,
        f"{label}: last replica behind upstream, p50": quantile_ms(behind, 0.5),
        f"{label}: last replica behind upstream, p99": quantile_ms(behind, 0.99),
        f"{label}: last replica behind upstream, worst": max(behind) * 1e3,
    }


def _several(log: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    """Return the times in which more than one connection was open, each with its end."""
    spans = []
    begin = None
    for when, number in log:
        if number > 1 and begin is None:
            begin = when
        elif number <= 1 and begin is not None:
            spans.append((begin, when))
            begin = None
    return spans if begin is None else [*spans, (begin, time.monotonic())]


def failover(server: Server, _: Certificate) -> Measured:
    """Kill leaders and stop them; time the next change at all others. Look at the figures."""
    if server.name != OURS:
        return {}
    times: dict[str, list[float]] = {KILLED: [], STOPPED: []}
    with Fleet(as_relay(server), FAILOVER_MEMBERS) as fleet:
        fleet.leader()
        with watched(fleet) as (changes, clients):
            for _ in range(FAILOVERS):
                for fault, which in ((KILLED, signal.SIGKILL), (STOPPED, signal.SIGSTOP)):
                    leader = fleet.leader()
                    fleet.signal(leader, which)
                    seconds = _until_everywhere(changes, clients, fleet.others(leader))
                    times[fault].append(seconds)
                    if which is signal.SIGKILL:
                        fleet.restart(leader)
                    else:
                        fleet.signal(leader, signal.SIGCONT)
        missing = missing_figures(fleet, fleet.leader())
        back = sum(client.back for client in clients)
    measured: Measured = {"figures of a fleet that are missing": missing}
    for fault, each in times.items():
        measured[f"{fault}: next change everywhere, median"] = median(each)
        measured[f"{fault}: next change everywhere, worst"] = max(each)
    return measured | {"leaders killed and stopped: clients that went back": back}


def _until_everywhere(
    changes: Changes, clients: Sequence[Replica], members: Sequence[int]
) -> float:
    """Return the seconds until these have a change that is sent from now on."""
    began = time.monotonic()
    version = changes.next_after(began)
    while time.monotonic() < began + PATIENCE:
        times = [clients[number].has_at(version) for number in members]
        if max(times) < float("inf"):
            return max(times) - began
        time.sleep(0.01)
    return PATIENCE


def missing_figures(fleet: Fleet, leader: int) -> int:
    """Count what the leader's metrics lack, and who does not name the leader in its status."""
    time.sleep(LOOKED_SECONDS)
    client = fleet.sessions[leader].client()
    page = client.get("/metrics").body.decode()
    client.close()
    missing = [each for each in FIGURES if f"\n{each}" not in page]
    parts = [fleet.role(number) for number in range(len(fleet.sessions))]
    nameless = [part for part in parts if part.get("leader") != parts[leader].get("leader")]
    return len(missing) + len(nameless) + ("term" not in parts[leader])


def redis(server: Server, _: Certificate) -> Measured:
    """Stop Redis, kill it, empty it; time the change that takes longest."""
    if server.name != OURS:
        return {}
    measured: Measured = {}
    with Fleet(as_relay(server), FAILOVER_MEMBERS) as fleet:
        database = fleet.database
        fleet.leader()
        with watched(fleet) as (changes, clients):
            losses: list[tuple[str, Callable[[], None], Callable[[], None]]] = [
                (REDIS_STOPPED, database.pause, database.go_on),
                (REDIS_KILLED, database.kill, database.start),
            ]
            backs = {}
            for fault, lose, bring_back in losses:
                leader = fleet.leader()
                lost = time.monotonic()
                lose()
                time.sleep(LOST_SECONDS)
                backs[fault] = back = time.monotonic()
                bring_back()
                time.sleep(BACK_SECONDS)
                waits = _waits(changes, clients, lost, back)
                measured[f"{fault}: a change at the leader's clients"] = waits.pop(leader)
                measured[f"{fault}: a change at those of others"] = max(waits)
                waits = _waits(changes, clients, back)
                measured[f"{fault}, then back: a change"] = max(waits)
            fleet.leader()
            emptied = time.monotonic()
            database.client.flushall()
            time.sleep(BACK_SECONDS / 2)
            measured[f"{REDIS_EMPTIED}: a change"] = max(_waits(changes, clients, emptied))
        log = fleet.upstream.connections(SDK_KEY)
    for fault, back in backs.items():
        ends = [end for begin, end in _several(log) if begin < back < end]
        measured[f"{fault}, then back: until one connection upstream"] = max(
            (end - back for end in ends), default=0.0
        )
    back_in_version = sum(client.back for client in clients)
    return measured | {"Redis lost: clients that went back": back_in_version}


def _waits(
    changes: Changes, clients: Sequence[Replica], since: float, until: float = float("inf")
) -> list[float]:
    """Return for each client the longest time that a change took which was sent in a time."""
    sent = changes.sent.copy()
    return [client.longest_wait(sent, since, until) for client in clients]


def chaos(server: Server, _: Certificate) -> Measured:
    """Kill and stop relays, and Redis, as chance will have it, while the flag changes."""
    if server.name != OURS:
        return {}
    faults = 0
    with Fleet(as_relay(server), FAILOVER_MEMBERS) as fleet:
        fleet.leader()
        with watched(fleet) as (changes, clients):
            until = time.monotonic() + CHAOS_SECONDS
            while time.monotonic() < until:
                _disturb(fleet, faults)
                faults += 1
            fleet.leader()
            version = changes.next_after(time.monotonic())
            everywhere = time.monotonic() + PATIENCE
            while time.monotonic() < everywhere and not _have(clients, version):
                time.sleep(0.01)
            late = sum(each.has_at(version) == float("inf") for each in clients)
        broken, terms = check_feed(fleet.database)
    return {
        f"{CHAOS}: breaks in the feed": broken,
        f"{CHAOS}: clients that went back": sum(client.back for client in clients),
        f"{CHAOS}: connections that began with older data": sum(
            client.began_older for client in clients
        ),
        f"{CHAOS}: relays that are not current": late,
        f"{CHAOS}: faults": faults,
        f"{CHAOS}: terms": terms,
    }


def _have(clients: Sequence[Replica], version: int) -> bool:
    return all(each.has_at(version) < float("inf") for each in clients)


def _disturb(fleet: Fleet, seed: int) -> None:
    chance = random.Random(seed)
    victim = chance.randrange(len(fleet.sessions))
    match seed % 3:
        case 0:
            fleet.signal(victim, signal.SIGKILL)
            time.sleep(chance.uniform(0, 4))
            fleet.restart(victim)
        case 1:
            fleet.signal(victim, signal.SIGSTOP)
            time.sleep(chance.uniform(0.2, 5))
            fleet.signal(victim, signal.SIGCONT)
        case _:
            fleet.database.pause()
            time.sleep(chance.uniform(0.2, 5))
            fleet.database.go_on()
    time.sleep(chance.uniform(0, 1))


def check_feed(database: Valkey) -> tuple[int, int]:
    """Return how often the feed is no chain or goes back in terms, and the number of terms."""
    from relay.protocol.feed import FEED, entry_of  # noqa: PLC0415 - other axes do not need it

    entries: Any = database.client.xrange(FEED)
    links = [each for each in (entry_of(fields) for _, fields in entries) if not each.resigned]
    broken = sum(
        entry.number != former.number + 1
        or entry.before != former.after
        or entry.term.number < former.term.number
        for former, entry in itertools.pairwise(links)
    )
    return broken, len({entry.term for entry in links})


def follower(server: Server, _: Certificate) -> Measured:
    """Start followers with little data and with much."""
    if server.name != OURS:
        return {}
    seconds, cpu = {}, {}
    for dataset in STARTED:
        times, used = [], []
        with Fleet(as_relay(server), 1, dataset) as fleet:
            fleet.leader()
            for _ in range(STARTS):
                session = fleet.add()
                served = session.await_status(pause=0.002, size=whole(dataset))
                times.append(served - session.started)
                used.append(session.process.own_cpu_seconds())
                session.process.stop()
                fleet.sessions.pop()
        seconds[dataset], cpu[dataset] = median(times), median(used)
    return {
        FOLLOWER: seconds["2m"] * 1e3,
        f"{FOLLOWER}, beyond 2 KB": (seconds["2m"] - seconds["2k"]) * 1e3,
        f"{FOLLOWER}, beyond 2 KB: CPU": (cpu["2m"] - cpu["2k"]) * 1e3,
    }
