"""SDKs of the newer protocol: what a basis spares, beside the same without one."""

import json
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from statistics import median
from time import monotonic, sleep

from bench.crowd import TAIL_BYTES, Crowd
from bench.measures import (
    LOAD_SECONDS,
    MB,
    PATCHES,
    WARM_SECONDS,
    Measured,
    as_relay,
    send_patches,
    upstream_of,
    whole,
    with_variables,
)
from bench.polls import load
from bench.servers import HEADERS, POLL, SDK_KEY, SMALL_SDK_KEY, Certificate, Server, Session
from bench.table import PEER

DATASET = "570k"
RECONNECTING = 3000
STREAMS = 15_000
LATEST, TRANSFER, STREAM = "/sdk/latest-all", "/sdk/poll", "/sdk/stream"
END = b"event: payload-transferred"
"""In the last message of a transfer."""
COMPRESSED = {**HEADERS, "Accept-Encoding": "gzip"}
"""Headers of SDKs, all of which want polls compressed."""
UNJOURNALED = f"{sys.executable} -m bench.unjournaled --from-env"
"""Ours without the journal."""
SETTLE_SECONDS = 1.0
BURST = 3000
"""Patches at once, of which the cost of one is derived."""

LATENCY = 0.02
"""Seconds of a round trip to upstream, for restarts."""
SNAPSHOT_SECONDS = 3.0
"""After which a change is surely in the snapshot."""
SETTLED_SECONDS = 0.5
"""After which upstream has sent what a start asks for, to the second environment as well."""
RESTARTS = 5
"""Restarts of each kind, of which the median counts."""

RESTART = "restart with one flag of 1000 changed"
BACK = f"{RECONNECTING} streams come back one change of 1000 flags behind"
POLLED = "poll of FDv2"
FAN_OUT = f"one patch to {STREAMS:,} streams of FDv2"
JOURNAL = "journal of 10,000 flags"


def reconnect(server: Server, _: Certificate) -> Measured:
    """Let all come back with the basis before the last change, then let all come without one."""
    if server.name == PEER:
        return {}  # nobody else sends deltas
    with server.serve(DATASET) as session:
        basis = _basis_behind(session)
        figures = []
        for query in ("", f"?basis={basis}"):
            sleep(SETTLE_SECONDS)  # the end of the streams before is not theirs
            cpu = session.process.own_cpu_seconds()
            path = STREAM + query
            with Crowd(
                session.port, SDK_KEY, RECONNECTING, path=lambda _, path=path: path
            ) as crowd:
                seconds = crowd.connect(marker=END, keep=TAIL_BYTES)
                cpu = session.process.own_cpu_seconds() - cpu
                figures.append((seconds, cpu, crowd.received))
        (all_of_it, delta) = figures
    ratios = [part / whole_ for part, whole_ in zip(delta, all_of_it, strict=True)]
    return {
        f"{BACK}: last client, in full transfers": ratios[0],
        f"{BACK}: CPU, in full transfers": ratios[1],
        f"{BACK}: bytes, in full transfers": ratios[2],
        f"{BACK}: last client": delta[0],
        f"{BACK}: CPU": delta[1],
        f"{BACK}: bytes": delta[2] / MB,
    }


def polls(server: Server, _: Certificate) -> Measured:
    """Poll up to date, one change behind, and without a basis; beside what FDv1 has for that."""
    if server.name == PEER:
        return {}
    with server.serve(DATASET) as session:
        behind = _basis_behind(session)
        client = session.client()
        known = {**HEADERS, "If-None-Match": client.get(POLL).headers["etag"]}
        client.close()
        rates = {
            "none": _rate(session, f"{TRANSFER}?basis={_basis(session)}", HEADERS),
            "304": _rate(session, POLL, known),
            "delta": _rate(session, f"{TRANSFER}?basis={behind}", HEADERS),
            "2 KB": _rate(session, POLL, {"Authorization": SMALL_SDK_KEY}),
            "full": _rate(session, TRANSFER, COMPRESSED),
            "latest": _rate(session, LATEST, COMPRESSED),
            "plain full": _rate(session, TRANSFER, HEADERS),
            "plain latest": _rate(session, LATEST, HEADERS),
        }
    return {
        f"{POLLED}, up to date, in 304s": rates["none"] / rates["304"],
        f"{POLLED}, one change behind, in polls of 2 KB": rates["delta"] / rates["2 KB"],
        f"{POLLED}, without basis, in polls of {LATEST}": rates["full"] / rates["latest"],
        f"{POLLED}, without basis, not compressed, in polls of {LATEST}": rates["plain full"]
        / rates["plain latest"],
        f"{POLLED}, up to date": rates["none"],
        f"{POLLED}, one change behind": rates["delta"],
        f"{POLLED}, without basis": rates["full"],
    }


def fan_out(server: Server, _: Certificate) -> Measured:
    """Send patches to streams of either protocol: one, the other, the other, the one."""
    if server.name == PEER:
        return {}
    delays: dict[str, list[float]] = {"/all": [], STREAM: []}
    cpus: dict[str, list[float]] = {"/all": [], STREAM: []}
    memory = 0.0
    for path in ("/all", STREAM, STREAM, "/all"):
        with server.serve("2k") as session:
            session.await_status(size=whole("2k"))
            before = session.process.private_bytes()
            with Crowd(session.port, SDK_KEY, STREAMS, path=lambda _, path=path: path) as crowd:
                crowd.connect(marker=END if path == STREAM else b"", keep=TAIL_BYTES)
                sleep(1)
                if path == STREAM:
                    memory = (session.process.private_bytes() - before) / STREAMS / 1000
                cpu = session.process.cpu_seconds()
                delays[path].append(median(send_patches(session, crowd, PATCHES, 1)))
                cpus[path].append(session.process.cpu_seconds() - cpu)
    return {
        f"{FAN_OUT}: last client, in those of FDv1": sum(delays[STREAM]) / sum(delays["/all"]),
        f"{FAN_OUT}: CPU, in those of FDv1": sum(cpus[STREAM]) / sum(cpus["/all"]),
        f"{FAN_OUT}: last client": median(delays[STREAM]) * 1e3,
        "idle stream of FDv2": memory,
    }


def journal(server: Server, _: Certificate) -> Measured:
    """Send many patches to a relay with the journal and to one without; one stream is open."""
    if server.name == PEER:
        return {}
    ours = as_relay(server)
    costs: dict[bool, list[float]] = {True: [], False: []}
    memory: dict[bool, float] = {}
    for journaled in (True, False, False, True):
        relay = ours if journaled else replace(ours, command=UNJOURNALED)
        with relay.serve("5m") as session:
            session.await_status(size=whole("5m"))
            with Crowd(session.port, SDK_KEY, 1) as crowd:
                crowd.connect()
                sleep(1)
                cpu = session.process.cpu_seconds()
                send_patches(session, crowd, 2, BURST)
                cpu = session.process.cpu_seconds() - cpu
            costs[journaled].append(cpu / 2 / BURST)
            memory[journaled] = session.process.private_bytes() / MB
    with_, without = (sum(costs[journaled]) / 2 for journaled in (True, False))
    return {
        f"{JOURNAL}: cost of a patch, in those without": with_ / without,
        f"{JOURNAL}: cost of a patch": with_ * 1e6,
        f"{JOURNAL}: memory": memory[True] - memory[False],
    }


def restarts(server: Server, _: Certificate) -> Measured:
    """Kill a relay with a snapshot, change a flag, start it again: what does upstream send?

    By FDv2 with the basis in the snapshot, by FDv2 without one, and by FDv1.
    """
    if server.name == PEER:
        return {}
    kinds = {
        "basis": {"DATA_SYSTEM": "fdv2"},
        "full": {"DATA_SYSTEM": "fdv2"},
        "FDv1": {"DATA_SYSTEM": "fdv1"},
    }
    figures = {}
    for kind, variables in kinds.items():
        given = {"SNAPSHOT_DIR": "snapshots", "DISCONNECTED_STATUS_TIME": "0s", **variables}
        relay = with_variables(as_relay(server), **given)
        with relay.serve(DATASET, latency=LATENCY) as session:
            runs = [_restart(session, 2 + n, keeps=kind != "full") for n in range(RESTARTS)]
        figures[kind] = [median(each) for each in zip(*runs, strict=True)]
    ratios = {
        f"{RESTART}: {what}, in those of {other}": figures["basis"][place] / figures[of][place]
        for of, other in (("full", "FDv2 without basis"), ("FDv1", "FDv1"))
        for place, what in enumerate(("bytes from upstream", "exec → current", "CPU"))
    }
    size, seconds, cpu = figures["basis"]
    return ratios | {
        f"{RESTART}: bytes from upstream": size / 1000,
        f"{RESTART}: exec → current": seconds * 1e3,
        f"{RESTART}: CPU": cpu * 1e3,
    }


def _restart(session: Session, version: int, *, keeps: bool) -> tuple[float, float, float]:
    """Return bytes from upstream, seconds until the change is served, and CPU seconds until then.

    Args:
        session: of a relay that runs.
        version: of the flag that changes meanwhile.
        keeps: False if the snapshot is lost.
    """
    upstream, process = upstream_of(session), session.process
    session.await_status(size=whole(DATASET) - 1)
    sleep(SNAPSHOT_SECONDS)
    process.stop()
    if not keeps:
        shutil.rmtree(process.folder / "snapshots")
    upstream.alter(SDK_KEY, version)
    before = upstream.transferred()
    started = process.start_again()
    wanted = b'"version":%d' % version
    client = session.client()
    while True:
        with suppress(OSError):
            if wanted in client.get(f"{POLL}").body:
                break
        sleep(0.005)
    seconds, cpu = monotonic() - started, process.cpu_seconds()
    client.close()
    sleep(SETTLED_SECONDS)
    return upstream.transferred() - before, seconds, cpu


def _rate(session: Session, path: str, headers: dict[str, str]) -> float:
    load(session.url(path), headers, WARM_SECONDS)
    cpu = session.process.cpu_seconds()
    result = load(session.url(path), headers, LOAD_SECONDS)
    return result.requests / (session.process.cpu_seconds() - cpu)


def _basis_behind(session: Session) -> str:
    """Change a flag; return the basis of the data before."""
    session.await_status(size=whole(DATASET))
    before = _basis(session)
    upstream_of(session).patch(SDK_KEY, 2, "salt")  # another salt would be another flag
    while _basis(session) == before:
        sleep(0.01)
    return before


def _basis(session: Session) -> str:
    client = session.client()
    events = json.loads(client.get(TRANSFER).body)["events"]
    client.close()
    state: str = events[-1]["data"]["state"]
    if not re.fullmatch(r"[\w():.~-]+", state):
        raise RuntimeError(f"a state that needs escapes: {state}")
    return state
