"""Polling clients: a crowd of busy ones (wrk, or our own), and one that watches the clock."""

import http.client
import re
import select
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from bench.machine import LOAD_CORE, pinned

CONNECTIONS = 32
UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


class Load(NamedTuple):
    """Requests of a crowd of polling clients, and the times that they took."""

    requests: int
    seconds: float
    p99_ms: float
    p50_ms: float


class Response(NamedTuple):
    """One answer, and the time that it took in seconds."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float


class Client:
    """One polling client on a kept-alive connection."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme == "https":
            trust = trusting_context()
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=30, context=trust
            )
        else:
            self._connection = http.client.HTTPConnection(
                parts.hostname or "", parts.port, timeout=30
            )
        self._headers = dict(headers)

    def get(self, path: str) -> Response:
        """Ask, and read the whole answer.

        Raises:
            OSError: The server is not there, or hung up.
        """
        start = time.monotonic()
        try:
            self._connection.request("GET", path, headers=self._headers)
            answer = self._connection.getresponse()
            body = answer.read()
        except (http.client.HTTPException, OSError) as error:
            self._connection.close()
            raise OSError(str(error)) from error
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Response(answer.status, headers, body, time.monotonic() - start)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def trusting_context() -> ssl.SSLContext:
    """TLS without checking who the server is: it is one that we started."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def load(url: str, headers: Mapping[str, str], seconds: float) -> Load:
    """Poll `url` on all connections for a while, as fast as the server answers."""
    if shutil.which("wrk"):
        given = (each for name, value in headers.items() for each in ("-H", f"{name}: {value}"))
        return wrk(url, seconds, *given)
    return _own_load(url, headers, seconds)


def wrk(url: str, seconds: float, *options: str) -> Load:
    """Ask on all connections for a while, in the way that wrk's options say."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s", "--latency", "--timeout=20s"]
    with pinned(LOAD_CORE):
        done = subprocess.run([*command, *options, url], capture_output=True, text=True, check=True)
    text = done.stdout
    total = re.search(r"(\d+) requests in ([\d.]+)(us|ms|s|m)\b", text)
    if total is None or "Non-2xx" in text:
        raise RuntimeError(f"wrk failed on {url}:\n{text}")
    p50, p99 = (re.search(rf"{n}%\s+([\d.]+)(us|ms|s|m)\b", text) for n in (50, 99))
    return Load(
        requests=int(total[1]),
        seconds=float(total[2]) * UNITS[total[3]] / 1e3,
        p99_ms=float(p99[1]) * UNITS[p99[2]] if p99 else float("nan"),
        p50_ms=float(p50[1]) * UNITS[p50[2]] if p50 else float("nan"),
    )


def _own_load(url: str, headers: Mapping[str, str], seconds: float) -> Load:
    """Like wrk, with less speed; every answer is as long as the first one."""
    parts = urlsplit(url)
    lines = [f"GET {parts.path} HTTP/1.1", f"Host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    request = ("\r\n".join(lines) + "\r\n\r\n").encode()
    address = (parts.hostname or "", parts.port or 80)
    clients: dict[int, socket.socket] = {}
    poll = select.epoll()
    for _ in range(CONNECTIONS):
        client = socket.create_connection(address, timeout=30)
        if parts.scheme == "https":
            client = trusting_context().wrap_socket(client)
        clients[client.fileno()] = client
        poll.register(client, select.EPOLLIN)
    length = _answer_length(next(iter(clients.values())), request)
    buffer = bytearray(256 * 1024)
    missing = dict.fromkeys(clients, length)
    asked = dict.fromkeys(clients, time.monotonic())
    times: list[float] = []
    start = time.monotonic()
    for client in clients.values():
        client.sendall(request)
    while (now := time.monotonic()) < start + seconds:
        for number, _ in poll.poll(1):
            missing[number] -= clients[number].recv_into(buffer)
            if missing[number] <= 0:
                times.append(now - asked[number])
                missing[number], asked[number] = length, now
                clients[number].sendall(request)
    for client in clients.values():
        client.close()
    poll.close()
    return Load(len(times), now - start, quantile_ms(times, 0.99), quantile_ms(times, 0.5))


def quantile_ms(times: Sequence[float], share: float) -> float:
    """The time in milliseconds that a share of `times`, in seconds, stays below."""
    return sorted(times)[int(len(times) * share)] * 1e3 if times else float("nan")


def _answer_length(client: socket.socket, request: bytes) -> int:
    """Head and body of one answer, in bytes."""
    client.sendall(request)
    answer = b""
    while True:
        received = client.recv(256 * 1024)
        if not received:
            raise ConnectionError("the server hung up")
        answer += received
        head, ended, body = answer.partition(b"\r\n\r\n")
        told = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        bodiless = head.startswith(b"HTTP/1.1 304")
        if ended and (bodiless or (told and len(body) >= int(told[1]))):
            return len(answer)
        if ended and not told and body.endswith(b"0\r\n\r\n"):
            return len(answer)
