"""Measurements of a running server: each function measures one round."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench import posts
from bench.crowd import Crowd
from bench.data import SIZES, events, flag_key, numbered_event
from bench.polls import load, quantile_ms, trusting_context
from bench.servers import (
    HEADERS,
    POLL,
    SDK_KEY,
    SMALL_SDK_KEY,
    Certificate,
    Relay,
    Server,
    Session,
)
from bench.upstream import Upstream

MB = 1e6
LOAD_SECONDS = 3
WARM_SECONDS = 1
ENDED = {"Connection": "close"}
"""The header of whoever asks once only, as a short-lived function does."""
PATCHES = 5
"""Single patches sent in one round; their median is the round's figure."""
WATCHED_SECONDS = 1.0
"""Time that polls are watched after a patch was sent."""

DISK = Path("/var/tmp")
"""Where the spool is: unlike `/tmp`, this is on a disk everywhere."""
BULK = "/bulk"
SILENCE_SECONDS = 8
"""Without anything new for so long, no more events are expected: posts gather for 5 s."""
OUTAGE_SILENCE_SECONDS = 20
"""The same after an outage: longer than any relay's pause between two attempts then."""
OUTAGE_SECONDS = 30
OUTAGE_RATE = 2000
OUTAGE_BYTES = 1000
OUTAGE_CAPACITY = 100_000
"""Events that may wait: more than come, so that no relay loses one for want of room."""

Measured = dict[str, float]


def gzip_headers(_: Session) -> dict[str, str]:
    return {"Accept-Encoding": "gzip"}


def unchanged_headers(session: Session) -> dict[str, str]:
    client = session.client()
    etag = client.get(POLL).headers["etag"]
    client.close()
    return {"If-None-Match": etag}


def polls(
    figure: str,
    dataset: str,
    headers: Callable[[Session], dict[str, str]],
    server: Server,
    certificate: Certificate,
    *,
    tls: bool = False,
) -> Measured:
    with server.serve(dataset, certificate if tls else None) as session:
        session.await_status(size=whole(dataset))
        sent = {**HEADERS, **headers(session)}
        load(session.url(), sent, WARM_SECONDS)
        cpu = session.process.cpu_seconds()
        result = load(session.url(), sent, LOAD_SECONDS)
        cpu = session.process.cpu_seconds() - cpu
        return {
            figure: result.requests / cpu,
            f"{figure}: wall": result.requests / result.seconds,
            f"{figure}: p99": result.p99_ms,
        }


def whole(dataset: str) -> int:
    """No answer that is shorter holds all of the data set's flags."""
    return SIZES[dataset].flags * 400


def idle(server: Server, _: Certificate) -> Measured:
    clients = 15_000
    with server.serve("2k") as session:
        session.await_status(size=whole("2k"))
        before, cpu = session.process.private_bytes(), session.process.cpu_seconds()
        with Crowd(session.port, SDK_KEY, clients) as crowd:
            crowd.connect()
            cpu = session.process.cpu_seconds() - cpu
            time.sleep(1)
            after = session.process.private_bytes()
        return {
            "idle stream": (after - before) / clients / 1000,
            "process with 15,000 idle streams": after / MB,
            "accepting 15,000 streams": cpu,
        }


def storm(figure: str, dataset: str, clients: int, server: Server, _: Certificate) -> Measured:
    with server.serve(dataset) as session:
        session.await_status(size=whole(dataset))
        with Crowd(session.port, SDK_KEY, clients) as crowd:
            seconds = crowd.connect()
        return {
            f"{figure}: last client": seconds,
            f"{figure}: peak memory": session.process.peak_bytes() / MB,
        }


def fan_out(server: Server, _: Certificate) -> Measured:
    clients = 15_000
    with server.serve("2k") as session:
        session.await_status(size=whole("2k"))
        with Crowd(session.port, SDK_KEY, clients) as crowd:
            crowd.connect()
            cpu = session.process.cpu_seconds()
            last = send_patches(session, crowd, PATCHES, 1)
            cpu = session.process.cpu_seconds() - cpu
        return {
            "one patch to 15,000 streams: last client": median(last) * 1e3,
            "one patch to 15,000 streams: CPU per message": cpu / clients / PATCHES * 1e6,
        }


def burst(server: Server, _: Certificate) -> Measured:
    with server.serve("2k") as session:
        session.await_status(size=whole("2k"))
        with Crowd(session.port, SDK_KEY, 3000) as crowd:
            crowd.connect()
            last = send_patches(session, crowd, 3, 50)
        return {"50 patches at once × 3000 streams: last client": median(last) * 1e3}


def send_patches(session: Session, crowd: Crowd, times: int, count: int) -> list[float]:
    """Send `count` patches at once, several `times`.

    Returns:
        For each time the seconds from sending until the last client had the last patch.
    """
    seconds = []
    for version in range(2, 2 + times):
        marker = f"marker-{version}-end"
        sent = upstream_of(session).patch(SDK_KEY, version, marker, count)
        seconds.append(crowd.expect(marker)[-1] - sent)
    return seconds


def worst_poll(server: Server, _: Certificate) -> Measured:
    """Poll one environment while another one's patch goes out.

    The streams' clients do not read meanwhile (a patch fits their buffers), so that nothing but
    the server can make a poll wait.
    """
    worst = []
    with server.serve("2k") as session:
        session.await_status(size=whole("2k"))
        watcher = session.client(SMALL_SDK_KEY)
        with Crowd(session.port, SDK_KEY, 10_000) as crowd:
            crowd.connect()
            watcher.get(POLL)
            for version in range(2, 2 + PATCHES):
                marker = f"marker-{version}-end"
                upstream_of(session).start_patch(SDK_KEY, version, marker)
                until = time.monotonic() + WATCHED_SECONDS
                slowest = 0.0
                while time.monotonic() < until:
                    slowest = max(slowest, watcher.get(POLL).seconds)
                worst.append(slowest)
                upstream_of(session).sent()
                crowd.expect(marker)
        watcher.close()
    return {"worst small poll during a patch to 10,000 streams": median(worst) * 1e3}


def tls_streams(server: Server, certificate: Certificate) -> Measured:
    clients = 3000
    with server.serve("2k", certificate) as session:
        session.await_status(size=whole("2k"))
        before = session.process.private_bytes()
        with Crowd(session.port, SDK_KEY, clients, trusting_context()) as crowd:
            crowd.connect()
            time.sleep(1)
            after = session.process.private_bytes()
            cpu = session.process.cpu_seconds()
            last = send_patches(session, crowd, PATCHES, 1)
            cpu = session.process.cpu_seconds() - cpu
        return {
            "TLS idle stream": (after - before) / clients / 1000,
            "TLS one patch to 3000 streams: last client": median(last) * 1e3,
            "TLS one patch to 3000 streams: CPU per message": cpu / clients / PATCHES * 1e6,
        }


def start(server: Server, _: Certificate) -> Measured:
    with server.serve("570k") as session:
        first = session.await_status("/status", pause=0.001)
        cpu = session.process.own_cpu_seconds()
        served = session.await_status(pause=0.001, size=whole("570k"))
        return {
            "exec → first 200": (first - session.started) * 1e3,
            "exec → first 200: CPU": cpu * 1e3,
            "exec → 570 KB served": (served - session.started) * 1e3,
        }


def put(server: Server, _: Certificate) -> Measured:
    """Time from the first byte sent by upstream until a poll has the whole new body.

    One flag is asked for until it is new, then everything: whole polls from the start would
    compete with the server's own work.
    """
    times = []
    path = f"{POLL}/{flag_key(0)}"
    with server.serve("seed") as session:
        session.await_status(path)
        client = session.client()
        for version in range(2, 2 + PATCHES):
            new = f'"version":{version},'.encode()
            sent = upstream_of(session).put(SDK_KEY, "2m", version)
            while new not in client.get(path).body.replace(b" ", b""):
                pass
            body = client.get(POLL).body
            times.append(time.monotonic() - sent)
            if len(body) < whole("2m"):
                raise RuntimeError(f"a poll after the put gave {len(body)} bytes")
        client.close()
    return {"put of 2 MB → served": median(times) * 1e3}


def post_events(
    figure: str, capacity: int, server: Server, _: Certificate, *, ended: bool = False
) -> Measured:
    """Post events of 7 KB, where `capacity` of them may wait in memory.

    Args:
        figure: what it is called.
        capacity: of the relay's memory, in its unit.
        server: a relay.
        ended: whether each post has a connection of its own.
    """
    headers = HEADERS | ENDED if ended else HEADERS
    relay = with_variables(as_relay(server), EVENTS_CAPACITY=str(capacity))
    with relay.serve("2k", events=True) as session:
        session.await_status(size=whole("2k"))
        upstream_of(session).open_mailbox()
        cpu = session.process.cpu_seconds()
        measured, made = _post_load(figure, session, headers)
        peak = session.process.peak_bytes()
        _await_events(session, made * len(events()), SILENCE_SECONDS)
        cpu = session.process.cpu_seconds() - cpu
        arrived = upstream_of(session).arrived().size / len(events())
        return {
            **measured,
            f"{figure}: peak memory": peak / MB,
            f"{figure}: arrived": arrived / made * 100,
            f"{figure}: with delivery": arrived / cpu,
        }


def post_events_to_disk(figure: str, server: Server, _: Certificate) -> Measured:
    """The same with a spool on disk; a relay that has none ignores that."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as folder:
        syncs = _sync_seconds(Path(folder))
        relay = with_variables(as_relay(server), EVENTS_SPOOL_DIR=f"{folder}/spool")
        with relay.serve("2k", events=True) as session:
            session.await_status(size=whole("2k"))
            upstream_of(session).open_mailbox()
            url, body = session.url(BULK), events()
            alone = posts.post(url, HEADERS, lambda _: body, seconds=LOAD_SECONDS, connections=1)
            measured, _ = _post_load(figure, session, HEADERS)
            return {
                **measured,
                f"{figure}: peak memory": session.process.peak_bytes() / MB,
                f"{figure}: one client, p50": alone.p50_ms,
                f"{figure}: one client, p99": alone.p99_ms,
                "7 KB written and synchronised: p50": quantile_ms(syncs, 0.5),
                "7 KB written and synchronised: p99": quantile_ms(syncs, 0.99),
            }


def _post_load(figure: str, session: Session, headers: Mapping[str, str]) -> tuple[Measured, int]:
    """Return the figures, and how many posts were made in all."""
    warm = posts.load(session.url(BULK), headers, events(), WARM_SECONDS)
    cpu = session.process.cpu_seconds()
    result = posts.load(session.url(BULK), headers, events(), LOAD_SECONDS)
    cpu = session.process.cpu_seconds() - cpu
    measured = {
        figure: result.requests / cpu,
        f"{figure}: wall": result.requests / result.seconds,
        f"{figure}: p50": result.p50_ms,
        f"{figure}: p99": result.p99_ms,
    }
    return measured, warm.requests + result.requests


def _sync_seconds(folder: Path) -> list[float]:
    """Times that it takes, again and again, to append a post to a file and to make it safe."""
    body, times = events(), []
    with (folder / "bare").open("wb", buffering=0) as file:
        for _ in range(300):
            start = time.monotonic()
            file.write(body)
            os.fdatasync(file)
            times.append(time.monotonic() - start)
    return times


def events_outage(server: Server, _: Certificate) -> Measured:
    """Post distinct events while upstream refuses connections; then let it take them."""
    made = OUTAGE_SECONDS * OUTAGE_RATE
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as folder:
        relay = with_variables(
            as_relay(server),
            EVENTS_SPOOL_DIR=f"{folder}/spool",
            EVENTS_CAPACITY=str(OUTAGE_CAPACITY),
        )
        with relay.serve("2k", events=True) as session:
            session.await_status(size=whole("2k"))
            before = session.process.resident_bytes()
            result = posts.post(
                session.url(BULK),
                HEADERS,
                lambda number: numbered_event(number, OUTAGE_BYTES),
                seconds=OUTAGE_SECONDS,
                rate=OUTAGE_RATE,
            )
            opened = upstream_of(session).open_mailbox(keep=True)
            _await_events(session, made * OUTAGE_BYTES, OUTAGE_SILENCE_SECONDS)
            arrived = upstream_of(session).arrived(events=True)
            return {
                "outage: posts lost": made - arrived.events,
                "outage: memory growth": (session.process.peak_bytes() - before) / MB,
                "outage: upstream back → all there": arrived.last - opened,
                "outage: posts taken": result.requests / result.seconds,
                "outage: time to 202, p99": result.p99_ms,
            }


def _await_events(session: Session, size: int, silence: float) -> None:
    """Wait until so many bytes have arrived, or nothing has come for `silence` seconds."""
    last, changed = 0, time.monotonic()
    while last < size and time.monotonic() < changed + silence:
        time.sleep(0.2)
        arrived = upstream_of(session).arrived().size
        if arrived != last:
            last, changed = arrived, time.monotonic()


def as_relay(server: Server) -> Relay:
    if not isinstance(server, Relay):
        raise TypeError("this server takes no events")
    return server


def with_variables(relay: Relay, **variables: str) -> Relay:
    return replace(relay, variables={**relay.variables, **variables})


def upstream_of(session: Session) -> Upstream:
    if session.upstream is None:
        raise TypeError("this server has no upstream")
    return session.upstream
