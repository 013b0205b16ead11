"""Clients that post events: a crowd of busy ones (wrk, or our own), and one at a given pace."""

import json
import select
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from bench.polls import CONNECTIONS, Load, quantile_ms, wrk

HEADERS = {"Content-Type": "application/json", "X-LaunchDarkly-Event-Schema": "4"}
ACCEPTED = b"HTTP/1.1 202 "
END_OF_HEAD = b"\r\n\r\n"
READ_BYTES = 64 * 1024
LAST_SECONDS = 30
"""Time that posts may take beyond their own."""

SCRIPT = """
local number, head, body = 0, {head}, {body}
function request()
  number = number + 1
  return head .. string.format("{run}-%012x\\r\\n\\r\\n", number) .. body
end
"""
"""For wrk."""


def load(url: str, headers: Mapping[str, str], body: bytes, seconds: float) -> Load:
    """Post `body` on all connections for a while, each time under a payload id of its own."""
    if not shutil.which("wrk"):
        return post(url, headers, lambda _: body, seconds=seconds)
    head, text = json.dumps(_head(url, headers, body)), json.dumps(body.decode())  # as Lua has it
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(SCRIPT.format(head=head, body=text, run=_run()))
        file.flush()
        return wrk(url, seconds, "-s", file.name)


def post(
    url: str,
    headers: Mapping[str, str],
    body: Callable[[int], bytes],
    *,
    seconds: float,
    rate: float = float("inf"),
    connections: int = CONNECTIONS,
) -> Load:
    """Post `body(number)` for a while, `rate` times a second if the server answers fast enough.

    With a rate, all posts that belong into this time are made, however long it takes.

    Raises:
        RuntimeError: A post was not accepted, or not in time.
        ConnectionError: The server hung up.
    """
    clients = _connect(url, connections)
    poll = select.epoll()
    for client in clients.values():
        poll.register(client, select.EPOLLIN)
    run, idle, answers = _run(), list(clients), dict.fromkeys(clients, b"")
    asked: dict[int, float] = {}
    times: list[float] = []
    total = rate * seconds  # all of them are made, however long it takes; without a rate, no end
    made, start = 0, time.monotonic()
    while (now := time.monotonic()) < start + seconds or asked or made < total < float("inf"):
        if now > start + seconds + LAST_SECONDS:
            raise RuntimeError(f"{made} posts were made, {len(asked)} of them have no answer")
        due = min(total, (now - start) * rate) if now > start else 0
        if now >= start + seconds and total == float("inf"):
            due = 0
        while idle and made < due:
            number, content = idle.pop(), body(made)
            head = f"{_head(url, headers, content)}{run}-{made:012x}\r\n\r\n"
            asked[number] = time.monotonic()
            clients[number].sendall(head.encode() + content)
            made += 1
        for number, _ in poll.poll(0.0005 if idle else 1):
            answers[number] += _received(clients[number])
            if not _is_accepted(answers[number]):
                continue
            answers[number] = b""
            times.append(time.monotonic() - asked.pop(number))
            idle.append(number)
    for client in clients.values():
        client.close()
    poll.close()
    return Load(len(times), now - start, quantile_ms(times, 0.99), quantile_ms(times, 0.5))


def _received(client: socket.socket) -> bytes:
    received = client.recv(READ_BYTES)
    if not received:
        raise ConnectionError("the server hung up")
    return received


def _is_accepted(answer: bytes) -> bool:
    """True if an answer is complete; one that does not accept the post is an error."""
    if END_OF_HEAD in answer and not answer.startswith(ACCEPTED):
        raise RuntimeError(f"a post was not accepted: {answer!r}")
    return END_OF_HEAD in answer


def _connect(url: str, connections: int) -> dict[int, socket.socket]:
    parts = urlsplit(url)
    made = [
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=30)
        for _ in range(connections)
    ]
    for client in made:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {client.fileno(): client for client in made}


def _head(url: str, headers: Mapping[str, str], body: bytes) -> str:
    """A request up to its payload id."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in {**HEADERS, **headers}.items()]
    lines += [f"Content-Length: {len(body)}", "X-LaunchDarkly-Payload-ID: "]
    return "\r\n".join(lines)


def _run() -> str:
    """The part of payload ids that tells one run from the next."""
    return str(uuid.uuid4())[:23]
