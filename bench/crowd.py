"""Thousands of streaming clients in one process."""

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable

from bench.machine import Closing

READ_BYTES = 256 * 1024
# Below every server's listen backlog: a dropped SYN would cost a second that is not the server's.
UNANSWERED = 2000
# The end of what a client received, kept to recognise an event; more than a patch is long.
TAIL_BYTES = 2048
# A `put` is recognised by its end alone.
PUT_TAIL_BYTES = 16
END_OF_EVENT = b"\n\n"
LAST_CHUNK = b"0\r\n\r\n"
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("qq")
"""Lets the kernel note when bytes arrive, and the form in which it tells."""


class Crowd(Closing):
    """Clients of one stream, read as fast as one core can; `path` may tell one from the other.

    A client "has" an event when its bytes are in, up to the empty line that ends it.
    If `stamped`, the kernel notes when bytes arrive, so that `arrivals` needs no core meanwhile.
    """

    def __init__(
        self,
        port: int,
        sdk_key: str,
        clients: int,
        tls: ssl.SSLContext | None = None,
        path: Callable[[int], str] = lambda _: "/all",
        *,
        stamped: bool = False,
    ) -> None:
        self._address = ("127.0.0.1", port)
        self._path = path
        self._headers = (
            f"Host: localhost\r\nAuthorization: {sdk_key}\r\n"
            "Accept: text/event-stream\r\nCache-Control: no-cache\r\n\r\n"
        )
        self.received = 0
        """Bytes that the clients have read."""
        self._clients = clients
        self._tls = tls
        self._stamped = stamped
        self._opened: dict[int, float] = {}
        """The CLOCK_MONOTONIC time of each."""
        self._sockets: dict[int, socket.socket] = {}
        self._over: set[int] = set()
        self._tails: dict[int, bytes] = {}
        self._ends: dict[int, bytes] = {}
        self._poll = select.epoll()
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._read = self._read_once if tls is None else self._read_all

    def connect(
        self, timeout: float = 120, marker: bytes = b"", keep: int = PUT_TAIL_BYTES
    ) -> float:
        """Open all streams at once; return the seconds until the last has its first `put`.

        Args:
            timeout: in seconds.
            marker: what the last event of the opening has, if it has several.
            keep: bytes of the end of what comes that are kept; see `ends`.
        """
        start = time.monotonic()
        waiting: set[int] = set()
        done = 0
        while done < self._clients:
            opened = len(self._sockets)
            # A client is answered when the first bytes are in: it has a tail then.
            answered = len(self._tails) + done
            for _ in range(min(UNANSWERED + answered, self._clients) - opened):
                waiting.add(self._open())
            done += self._read_ready(waiting, marker, keep)
            self._check(start, timeout, done)
        return time.monotonic() - start

    def ends(self) -> list[bytes]:
        """Return the ends of the openings, in the order in which the clients were opened."""
        return [self._ends[number] for number in self._sockets]

    def expect(self, marker: str, timeout: float = 60) -> list[float]:
        """Read until every client has the event with `marker`.

        Returns:
            The CLOCK_MONOTONIC time at which each client had it, in that order.
        """
        start = time.monotonic()
        waiting = set(self._sockets)
        times: list[float] = []
        while waiting:
            done = self._read_ready(waiting, marker.encode(), TAIL_BYTES)
            times += [time.monotonic()] * done
            self._check(start, timeout, len(times))
        return times

    def arrivals(self, marker: str, sent: float, timeout: float = 60) -> list[float]:
        """Tell when an event came to clients that were open when it was sent.

        Returns:
            The CLOCK_MONOTONIC time at which the event with `marker` arrived at each of them, even
            if it is read only now.
        """
        start, times = time.monotonic(), []
        waiting = {number for number, opened in self._opened.items() if opened < sent}
        since = time.monotonic() - time.time()
        while waiting:
            for number in tuple(waiting):
                tail, stamp = self._read_stamped(self._sockets[number])
                tail = self._tails.pop(number, b"") + tail
                if marker.encode() in tail:
                    waiting.discard(number)
                    times.append(stamp + since)
                elif tail:
                    self._tails[number] = tail[-TAIL_BYTES:]
            self._check(start, timeout, len(times))
        return times

    def replace(self) -> None:
        """Hang up with the client that is open for longest, and open another one."""
        number = min(self._opened, key=self._opened.__getitem__)
        self._poll.unregister(number)
        self._tails.pop(number, None)
        del self._opened[number]
        self._sockets.pop(number).close()
        self._open()

    def ended(self) -> int:
        """Read what has come; return how many streams the server has ended."""
        streams = self._sockets.items()
        open_ones = [(number, client) for number, client in streams if number not in self._over]
        self._over.update(number for number, client in open_ones if self._has_ended(client))
        return len(self._over)

    def _has_ended(self, client: socket.socket) -> bool:
        """Tell by the end of the connection, or by the last chunk where that is kept alive."""
        tail = b""
        try:
            while size := client.recv_into(self._buffer):
                tail = (tail + bytes(self._view[:size]))[-len(LAST_CHUNK) :]
        except BlockingIOError:
            return tail == LAST_CHUNK
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        """Hang up."""
        for client in self._sockets.values():
            client.close()
        self._poll.close()

    def _open(self) -> int:
        path = self._path(len(self._sockets))
        # Without a look-up of the address, which takes longer than the server needs to accept.
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        client.settimeout(30)
        client.connect(self._address)
        if self._stamped:
            client.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        if self._tls is not None:
            client = self._tls.wrap_socket(client)
        client.sendall(f"GET {path} HTTP/1.1\r\n{self._headers}".encode())
        client.setblocking(False)
        number = client.fileno()
        self._sockets[number] = client
        self._opened[number] = time.monotonic()
        self._poll.register(number, select.EPOLLIN)
        return number

    def _read_ready(self, waiting: set[int], marker: bytes, keep: int) -> int:
        """Read who has something; return how many of `waiting` have what they wait for now."""
        done = 0
        tails, view = self._tails, self._view
        for number, _ in self._poll.poll(1, 256):
            size = self._read(self._sockets[number])
            self.received += size
            if number not in waiting:
                continue
            if size >= keep:
                tail = bytes(view[size - keep : size])
            else:
                tail = (tails.get(number, b"") + view[:size])[-keep:]
            end = tail.rfind(END_OF_EVENT)
            if end >= 0 and tail.find(marker, 0, end) >= 0:
                tails.pop(number, None)
                if keep > PUT_TAIL_BYTES:
                    self._ends[number] = tail
                waiting.discard(number)
                done += 1
            else:
                tails[number] = tail
        return done

    def _read_once(self, client: socket.socket) -> int:
        size = client.recv_into(self._buffer)
        if not size:
            raise ConnectionError("the server closed a stream")
        return size

    def _read_stamped(self, client: socket.socket) -> tuple[bytes, float]:
        """Return the end of what has come, and the Unix time at which the last of it came."""
        tail, stamp = b"", 0.0
        while True:
            try:
                size, ancillary, _, _ = client.recvmsg_into([self._buffer], 64)
            except BlockingIOError:
                return tail, stamp
            if not size:
                raise ConnectionError("the server closed a stream")
            tail = (tail + bytes(self._view[:size]))[-TAIL_BYTES:]
            for _, _, data in ancillary:
                seconds, nanoseconds = TIMESPEC.unpack(data)
                stamp = seconds + nanoseconds / 1e9

    def _read_all(self, client: socket.socket) -> int:
        """Read until TLS has nothing left: what it holds back would wake nobody."""
        size = 0
        while size < READ_BYTES:
            try:
                got = client.recv_into(self._view[size:])
            except ssl.SSLWantReadError:
                break
            if not got:
                raise ConnectionError("the server closed a stream")
            size += got
        return size

    def _check(self, start: float, timeout: float, done: int) -> None:
        if time.monotonic() - start > timeout:
            raise TimeoutError(f"{done} of {self._clients} streams were served in {timeout} s")
