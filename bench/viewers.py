"""Client-side SDKs that stream: they get what changed, or a ping, after which they poll."""

import re
import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from bench.machine import Closing

READ_BYTES = 256 * 1024
UNANSWERED = 1000
"""Clients that start at once: below every server's listen backlog."""
TAIL_BYTES = 2048
"""The end of what came, kept to recognise what goes on; more than a patch is long."""
END_OF_EVENT = b"\n\n"
END_OF_HEAD = b"\r\n\r\n"

_PING = re.compile(rb"event: ?ping\n")
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


@dataclass(slots=True)
class _Viewer:
    """One client: its stream, its kept-alive connection for polls, and what came last on each."""

    stream: socket.socket
    polls: socket.socket
    poll: bytes
    """The request."""
    told: bytes = b""
    answer: bytes = b""
    """The end of the answer that is coming."""
    missing: int | None = None
    """Bytes of the answer that are still to come; None before its head, -1 if it is in chunks."""
    seen: bool = False
    """True if the marker was in the answer."""
    complete: bool = False
    """True once the answer was read whole."""
    greeted: bool = False
    """True once the stream has begun."""


class Viewers(Closing):
    """Clients of one environment, each with a context of its own, read as one core can.

    Args:
        port: of the relay.
        clients: how many.
        stream: the path of a client's stream, by its number.
        poll: the path of its polls.
    """

    def __init__(
        self, port: int, clients: int, stream: Callable[[int], str], poll: Callable[[int], str]
    ) -> None:
        self._address = ("127.0.0.1", port)
        self._count = clients
        self._stream, self._poll_path = stream, poll
        self._streams: dict[int, _Viewer] = {}
        self._pollers: dict[int, _Viewer] = {}
        self._epoll = select.epoll()
        self._end = ExitStack()

    def connect(self, timeout: float = 180) -> None:
        """Start all: each polls once, as SDKs do, and waits for the first event of its stream."""
        start = time.monotonic()
        done = 0
        while done < self._count:
            for number in range(len(self._streams), min(done + UNANSWERED, self._count)):
                self._ask(self._open(number))
            for viewer, is_stream in self._read():
                had = viewer.greeted and viewer.complete
                if is_stream:
                    viewer.greeted |= END_OF_EVENT in viewer.told
                else:
                    self._take(viewer, b"")
                done += not had and viewer.greeted and viewer.complete
            self._check(start, timeout, done)
        for viewer in self._streams.values():
            viewer.told = b""

    def expect(self, marker: str, timeout: float = 120) -> float:
        """Read until each has the marker, in its stream or in the poll that a ping leads to.

        Returns:
            The CLOCK_MONOTONIC time at which the last had it.

        Raises:
            RuntimeError: A poll after a ping gave data from before.
        """
        start, sought = time.monotonic(), marker.encode()
        waiting = set(self._streams)
        while waiting:
            for viewer, is_stream in self._read():
                if is_stream:
                    end = viewer.told.rfind(END_OF_EVENT)
                    if end >= 0 and viewer.told.find(sought, 0, end) >= 0:
                        waiting.discard(viewer.stream.fileno())
                    elif viewer.complete and end >= 0 and _PING.search(viewer.told, 0, end):
                        viewer.told = b""
                        self._ask(viewer)
                    continue
                self._take(viewer, sought)
                if viewer.complete:
                    if not viewer.seen:
                        raise RuntimeError("a poll after a ping gave data from before")
                    waiting.discard(viewer.stream.fileno())
            self._check(start, timeout, self._count - len(waiting))
        return time.monotonic()

    def _open(self, number: int) -> _Viewer:
        stream, polls = (self._end.enter_context(self._connected()) for _ in range(2))
        get = "GET {} HTTP/1.1\r\nHost: localhost\r\nAccept: {}\r\n\r\n"
        stream.sendall(get.format(self._stream(number), "text/event-stream").encode())
        poll = get.format(self._poll_path(number), "*/*").encode()
        viewer = _Viewer(stream, polls, poll)
        self._streams[stream.fileno()] = self._pollers[polls.fileno()] = viewer
        for client in (stream, polls):
            client.setblocking(False)
            self._epoll.register(client, select.EPOLLIN)
        return viewer

    def _connected(self) -> socket.socket:
        client = socket.create_connection(self._address, timeout=30)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def _ask(self, viewer: _Viewer) -> None:
        viewer.answer, viewer.missing, viewer.seen, viewer.complete = b"", None, False, False
        viewer.polls.sendall(viewer.poll)

    def _read(self) -> list[tuple[_Viewer, bool]]:
        """Read who has something; return each and whether it was its stream."""
        found = []
        for number, _ in self._epoll.poll(1, 256):
            viewer = self._streams.get(number)
            if viewer is not None:
                viewer.told = (viewer.told + _received(viewer.stream))[-TAIL_BYTES:]
                found.append((viewer, True))
            else:
                found.append((self._pollers[number], False))
        return found

    def _take(self, viewer: _Viewer, sought: bytes) -> None:
        """Take a piece of a poll's answer."""
        piece = _received(viewer.polls)
        if viewer.missing is None:
            head, ended, body = (viewer.answer + piece).partition(END_OF_HEAD)
            if not ended:
                viewer.answer = head
                return
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"a poll got {head!r}")
            told = _LENGTH.search(head)
            viewer.missing = int(told[1]) if told else -1
            viewer.answer, piece = b"", body
        recent = viewer.answer + piece
        viewer.seen |= sought in recent
        viewer.answer = recent[-TAIL_BYTES:]
        if viewer.missing < 0:
            viewer.complete = recent.endswith(b"0" + END_OF_HEAD)
        else:
            viewer.missing -= len(piece)
            viewer.complete = viewer.missing == 0

    def _check(self, start: float, timeout: float, done: int) -> None:
        if time.monotonic() - start > timeout:
            raise TimeoutError(f"{done} of {self._count} clients had it in {timeout} s")

    def close(self) -> None:
        """End what it has begun."""
        self._end.close()
        self._epoll.close()


def _received(client: socket.socket) -> bytes:
    received = client.recv(READ_BYTES)
    if not received:
        raise ConnectionError("the server hung up")
    return received
