"""Those who start beside a function: they ask as its SDK does, and only count what they get.

A hundred real SDKs would need a hundred cores to be as fast as functions are; what one of them
gets from a server that has a hundred to serve can be measured with two.
"""

import re
import select
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from urllib.parse import urlsplit

from bench.cold_start.burst import Setup, standing_ready

TRIALS = 5
"""SDKs that are overheard."""
SPREAD = 0.02
"""Seconds within which all ask; the SDK itself in the middle."""
QUIET = 0.5
"""Seconds after which an answer that is not continued is whole."""
LIMIT = 60
"""Seconds that one answer may take."""
READ_BYTES = 4 * 1024 * 1024
_INSTANCE = re.compile(rb"(?i)(\r\nx-launchdarkly-instance-id: )[^\r]*")


@dataclass(frozen=True)
class Overheard:
    """First request of an SDK, and its delay in seconds after the SDK's construction."""

    request: bytes
    delay: float


def overhear(sdk: str, setup: Setup) -> Overheard:
    """Let an SDK ask somebody who never answers."""
    requests, delays = [], []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        deaf = replace(setup, flags_url=url, events_url=url, redis="", limit=1)
        with standing_ready(sdk, deaf, TRIALS) as standing:
            for _ in range(TRIALS):
                start = time.monotonic()
                standing.let_one_go()
                client, _ = listener.accept()
                with client:
                    requests.append(_head(client))
                    delays.append(time.monotonic() - start)
    return Overheard(requests[-1], median(delays))


def _head(client: socket.socket) -> bytes:
    client.settimeout(LIMIT)
    head = b""
    while b"\r\n\r\n" not in head:
        received = client.recv(65536)
        if not received:
            raise ConnectionError("the SDK hung up")
        head += received
    return head


class Companions:
    """So many of them, of one server.

    Args:
        url: of the server.
        overheard: what they ask, and when.
        count: of them.
    """

    def __init__(self, url: str, overheard: Overheard, count: int) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._request = overheard.request
        first = max(0.0, overheard.delay - SPREAD / 2)
        self._times = [first + SPREAD * number / max(1, count - 1) for number in range(count)]
        self._buffer = bytearray(READ_BYTES)
        self.size = self._size_of_an_answer() if count else 0
        """Bytes after which one of them has what he asked for."""

    def ask(self) -> None:
        """Ask, each at his time from now on; return when all have their answers.

        Raises:
            TimeoutError: they have not.
        """
        start = time.monotonic()
        with select.epoll() as poll:
            clients: dict[int, socket.socket] = {}
            missing: dict[int, int] = {}
            waiting = iter(self._times)
            due = next(waiting, None)
            try:
                while due is not None or missing:
                    now = time.monotonic() - start
                    if due is not None and now >= due:
                        client = self._connected()
                        clients[client.fileno()] = client
                        missing[client.fileno()] = self.size
                        poll.register(client, select.EPOLLIN)
                        due = next(waiting, None)
                    elif now > LIMIT:
                        raise TimeoutError(f"{len(missing)} companions have no whole answer")
                    else:
                        left = 1.0 if due is None else due - now
                        self._read(poll.poll(left, 64), clients, missing)
            finally:
                for client in clients.values():
                    client.close()

    def _read(
        self,
        ready: Sequence[tuple[int, int]],
        clients: dict[int, socket.socket],
        missing: dict[int, int],
    ) -> None:
        for number, _ in ready:
            received = self._discard(clients[number])
            if not received:
                raise ConnectionError("the server hung up on a companion")
            missing[number] -= received
            if missing[number] <= 0:
                clients.pop(number).close()
                del missing[number]

    def _discard(self, client: socket.socket) -> int:
        """Take what has come, without copying it (see tcp(7))."""
        return client.recv_into(self._buffer, READ_BYTES, socket.MSG_TRUNC)

    def _connected(self) -> socket.socket:
        client = socket.create_connection(self._address, timeout=LIMIT)
        instance = str(uuid.uuid4()).encode()
        client.sendall(_INSTANCE.sub(lambda name: name[1] + instance, self._request))
        return client

    def _size_of_an_answer(self) -> int:
        """Ask alone; a few bytes less, as no two answers need have the same chunks."""
        with self._connected() as client:
            size = self._discard(client)
            client.settimeout(QUIET)
            try:
                while received := self._discard(client):
                    size += received
            except TimeoutError:
                pass
        return size - size // 100
