"""Where a relay's posts of events arrive: the scripted upstream's second port.

Until it is opened it refuses connections. It costs little: a body is counted by the length that
gzip writes at its end, and is only looked into when it was kept and somebody asks.
"""

import gzip
import re
import socket
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from bench import data

ACCEPTED = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
BACKLOG = 1024
"""Connections that may wait to be accepted: more than ever come at once."""
READ_BYTES = 256 * 1024
END = b"\r\n\r\n"
GZIP = b"\x1f\x8b"

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_CHUNKED = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked")
_PAYLOAD_ID = re.compile(rb"(?i)\r\nx-launchdarkly-payload-id: *([^\r]+)")
_NUMBER = re.compile(data.EVENT_KEY.encode() + rb"(\d+)")


class Arrived(NamedTuple):
    """Counts of the bodies and events that have come in so far."""

    size: int
    """Bytes of all bodies, uncompressed."""
    events: int
    """Distinct numbered events, among the bodies that were kept."""
    last: float
    """CLOCK_MONOTONIC time at which the last of them came that had not come before."""
    repeated: int
    """Numbered events that came again under another payload id: upstream would count them twice."""


class Mailbox:
    """Takes every post. The port is held from the start, and listens once it is opened.

    Args:
        latency: seconds of each round trip, of which setting up a connection is one.
    """

    def __init__(self, latency: float = 0.0) -> None:
        self._latency = latency
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._lock = threading.Lock()
        self._keep = False
        self._size = 0
        self._kept: list[tuple[float, bytes, bytes]] = []

    def open(self, *, keep: bool) -> float:
        """Accept connections from now on; return the time.

        Args:
            keep: keep the bodies, so that numbered events can be counted.
        """
        self._keep = keep
        self._socket.listen(BACKLOG)
        threading.Thread(target=self._accept, daemon=True).start()
        return time.monotonic()

    def arrived(self, *, events: bool) -> Arrived:
        """Count what has arrived, numbered events only if they are asked for: that takes time."""
        with self._lock:
            size, kept = self._size, self._kept[:] if events else []
        seen: set[bytes] = set()
        payloads: set[bytes] = set()
        last, repeated = 0.0, 0
        for when, payload, body in kept:
            if payload and payload in payloads:
                continue
            payloads.add(payload)
            found = _NUMBER.findall(gzip.decompress(body) if _is_gzip(body) else body)
            new = set(found) - seen
            repeated += len(found) - len(new)
            if new:
                seen |= new
                last = when
        return Arrived(size, len(seen), last, repeated)

    def _accept(self) -> None:
        while True:
            client, _ = self._socket.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(ConnectionError):  # a function that ends does not always hang up in form
            self._take(client)

    def _take(self, client: socket.socket) -> None:
        """Take post after post of one connection."""
        received = b""
        trips = 2
        with client:
            while True:
                while (end := received.find(END)) < 0:
                    more = client.recv(READ_BYTES)
                    if not more:
                        return
                    received += more
                told = _LENGTH.search(received, 0, end + 2)
                if told:
                    whole = _read_length(client, received[end + 4 :], int(told[1]))
                elif _CHUNKED.search(received, 0, end + 2):
                    whole = _read_chunks(client, received[end + 4 :])
                else:
                    raise ValueError(f"a post without a length: {received[:end]!r}")
                if whole is None:
                    return
                payload = _PAYLOAD_ID.search(received, 0, end + 2)
                body, received = whole
                self._note(payload[1] if payload else b"", body)
                time.sleep(trips * self._latency)
                trips = 1
                client.sendall(ACCEPTED)

    def _note(self, payload: bytes, body: bytes) -> None:
        size = int.from_bytes(body[-4:], "little") if _is_gzip(body) else len(body)
        with self._lock:
            self._size += size
            if self._keep:
                self._kept.append((time.monotonic(), payload, body))


def _read_length(client: socket.socket, received: bytes, size: int) -> tuple[bytes, bytes] | None:
    """Read a body of known size; return it and what follows, None if the client hung up."""
    parts = [received]
    missing = size - len(received)
    while missing > 0:
        more = client.recv(READ_BYTES)
        if not more:
            return None
        parts.append(more)
        missing -= len(more)
    whole = b"".join(parts)
    return whole[:size], whole[size:]


def _read_chunks(client: socket.socket, received: bytes) -> tuple[bytes, bytes] | None:
    """The same for a body in chunks, which Node SDKs send; they send no more before the answer."""
    while not received.endswith(b"0" + END):
        more = client.recv(READ_BYTES)
        if not more:
            return None
        received += more
    body = b""
    while received != b"0" + END:
        size, _, rest = received.partition(b"\r\n")
        length = int(size, 16)
        body, received = body + rest[:length], rest[length + 2 :]
    return body, b""


def _is_gzip(body: bytes) -> bool:
    return body.startswith(GZIP)
