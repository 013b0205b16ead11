"""Full puts to more clients than read them: memory, and who has to wait."""

import multiprocessing
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.crowd import Crowd
from bench.machine import LOAD_CORE, pinned
from bench.measures import MB, Measured, upstream_of, whole
from bench.polls import trusting_context
from bench.servers import POLL, SDK_KEY, SMALL_SDK_KEY, Certificate, Server, Session

READERS = 20
"""Streams of clients that read, opened after those of clients that do not."""
LONGEST_SECONDS = 90.0
"""After so long a client is told to have got nothing."""
STATUS = "/status"
PAGES = POLL, STATUS
REQUEST = f"Host: localhost\r\nAuthorization: {SDK_KEY}\r\nAccept: text/event-stream\r\n\r\n"


def unread(
    figure: str,
    dataset: str,
    clients: int,
    server: Server,
    certificate: Certificate,
    *,
    encrypted: bool = False,
) -> Measured:
    """Open streams whose clients do not read, then a few whose clients do; then send a put.

    Args:
        figure: what it is called.
        dataset: of the environment.
        clients: that do not read.
        server: a relay.
        certificate: for TLS.
        encrypted: whether TLS is used.
    """
    trust = trusting_context() if encrypted else None
    with server.serve(dataset, certificate if encrypted else None) as session, ExitStack() as stack:
        session.await_status(size=whole(dataset))
        pages, kernel = _watching(_watch_pages, session), _watching(_watch_kernel, session.port)
        with pages as waits, kernel as unread_bytes:
            for _ in range(clients):
                stack.enter_context(_silent_stream(session.port, trust))
            with Crowd(session.port, SDK_KEY, READERS, trust) as crowd, pinned(LOAD_CORE):
                last = _seconds_of_readers(crowd)
            time.sleep(1)
            upstream_of(session).put(SDK_KEY, dataset, 2)
            time.sleep(4)
        (worst,) = waits
        return {
            f"{figure}: last client that reads": last,
            f"{figure}: peak memory": session.process.peak_bytes() / MB,
            f"{figure}: unread in the kernel": max(unread_bytes) / MB,
            f"{figure}: worst poll": worst[POLL] * 1e3,
            f"{figure}: worst /status": worst[STATUS] * 1e3,
        }


def _seconds_of_readers(crowd: Crowd) -> float:
    try:
        return crowd.connect(timeout=LONGEST_SECONDS)
    except (TimeoutError, ConnectionError):
        return LONGEST_SECONDS


@contextmanager
def _silent_stream(port: int, trust: ssl.SSLContext | None) -> Iterator[None]:
    """Ask for a stream and read no byte of it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(60)
    with suppress(OSError):
        client.connect(("127.0.0.1", port))
        if trust is not None:
            client = trust.wrap_socket(client)
        client.sendall(f"GET /all HTTP/1.1\r\n{REQUEST}".encode())
    try:
        yield
    finally:
        client.close()


@contextmanager
def _watching(watch: Callable[..., None], *arguments: object) -> Iterator[list[Any]]:
    """Run a watcher in a process of its own; give what it has seen at the end, as the only item."""
    seen: list[Any] = []
    ours, theirs = multiprocessing.Pipe()
    watcher = multiprocessing.Process(target=watch, args=(*arguments, theirs), daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ours.send(None)
        seen.append(ours.recv())
        watcher.join()


def _watch_pages(session: Session, pipe: Connection) -> None:
    """Ask for small pages all the time; send the seconds that each took at worst."""
    worst = dict.fromkeys(PAGES, 0.0)
    client = session.client(SMALL_SDK_KEY)
    while not pipe.poll(0.002):
        for page in PAGES:
            start = time.monotonic()
            with suppress(OSError):
                client.get(page)
            worst[page] = max(worst[page], time.monotonic() - start)
    pipe.send(worst)


def _watch_kernel(port: int, pipe: Connection) -> None:
    """Look how many bytes the kernel keeps for the clients of a port; send the most."""
    most, suffix = 0, f":{port:04X}"
    while not pipe.poll(0.3):
        queued = 0
        for name in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1].endswith(suffix):
                    queued += int(fields[4].partition(":")[0], 16)
        most = max(most, queued)
    pipe.send(most)
