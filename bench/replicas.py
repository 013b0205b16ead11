"""A client of each relay of a fleet, which notes what version of a flag it has, and when."""

import re
import select
import socket
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Event, Thread

from bench.data import flag_key
from bench.machine import Closing
from bench.servers import SDK_KEY

FLAG = flag_key(0)
"""The flag that is changed."""
RECONNECT_SECONDS = 0.02
READ_BYTES = 256 * 1024
REQUEST = (
    "GET /all HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\n"
    "Accept: text/event-stream\r\n\r\n"
)
_VERSION = re.compile(rb'"key":"%b".*?"version":(\d+)' % FLAG.encode(), re.DOTALL)
END_OF_EVENT = b"\n\n"


class Replica:
    """One client: the versions that it was sent, with their CLOCK_MONOTONIC times."""

    def __init__(self, port: int, poll: select.epoll) -> None:
        self.port = port
        self._poll = poll
        self.times: list[float] = []
        self.versions: list[int] = []
        self.back = 0
        """Number of times that it was sent an older version than before on the same connection."""
        self.began_older = 0
        """Number of times that a connection began with an older version than one before had: FDv1
        has no way to tell a relay what one has, and a leader may die before it has published."""
        self._newest = 0
        """Version that it has got on this connection."""
        self._socket: socket.socket | None = None
        self._received = b""
        self._due = 0.0

    def has_at(self, version: int) -> float:
        """Return since when it has a version or a newer one; infinity if it has none."""
        position = bisect_left(self.versions, version)
        return self.times[position] if position < len(self.versions) else float("inf")

    def longest_wait(self, sent: Mapping[int, float], since: float, until: float) -> float:
        """Return the longest time that a version took which was sent in a time."""
        now = time.monotonic()
        within = {version: when for version, when in sent.items() if since <= when <= until}
        return max(min(self.has_at(version), now) - when for version, when in within.items())

    def connect(self) -> int | None:
        """Connect if it is time to; return the number of the socket, None if there is none."""
        if self._socket is not None or time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + RECONNECT_SECONDS
        try:
            self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=1)
            self._poll.register(self._socket, select.EPOLLIN)
            self._socket.sendall(REQUEST.format(key=SDK_KEY).encode())
        except OSError:
            self.close()
            return None
        self._socket.setblocking(False)
        self._received, self._newest = b"", 0
        return self._socket.fileno()

    def read(self) -> None:
        """Take what has come."""
        assert self._socket
        try:
            more = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self.close()
            return
        events, ended, rest = (self._received + more).rpartition(END_OF_EVENT)
        self._received = rest
        now = time.monotonic()
        for version in map(int, _VERSION.findall(events) if ended else ()):
            newest = self.versions[-1] if self.versions else 0
            self.back += version < self._newest
            self.began_older += version < newest and not self._newest
            self._newest = version
            if version > newest:
                self.times.append(now)
                self.versions.append(version)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            with suppress(OSError):  # a process that is just started may still hold it open
                self._poll.unregister(self._socket)
            self._socket.close()
            self._socket = None


class Replicas(Closing):
    """Clients of all relays, read by one thread; who is cut off connects again."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._poll = select.epoll()
        self.clients = [Replica(port, self._poll) for port in ports]
        self._stopped = Event()
        self._thread = Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        by_number: dict[int, Replica] = {}
        while not self._stopped.is_set():
            for client in self.clients:
                number = client.connect()
                if number is not None:
                    by_number[number] = client
            for number, _ in self._poll.poll(RECONNECT_SECONDS):
                by_number[number].read()

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        for client in self.clients:
            client.close()
        self._poll.close()
