"""`relay health [URL]`: asks a relay whether it is ready; the exit code says so.

Docker and Kubernetes start this every few seconds beside the relay, so it imports next to nothing:
one request over a plain socket, of which only the status line is read.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence

TIME_LIMIT = 5.0
"""Seconds for the whole check; Docker's own limit is longer."""

LONGEST_STATUS_LINE = 1024
"""Bytes that are read at most: more is no relay."""

DEFAULT_PORT = "8030"
_OK = 200
_TRUE = ("true", "yes", "1")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Return 0 if the relay is ready and 1 if not, after one line that says why not."""
    url = arguments[0] if arguments else own_url(environ)
    try:
        status = ask(url)
    except (OSError, ValueError) as e:
        return _not_ready(str(e))
    return 0 if status == _OK else _not_ready(f"status {status}")


def _not_ready(reason: str) -> int:
    sys.stderr.write(f"not ready: {reason}\n")
    return 1


def own_url(environ: Mapping[str, str]) -> str:
    """Return where the relay of this host is asked, by the variables that it was started with."""
    scheme = "https" if environ.get("TLS_ENABLED", "").strip().lower() in _TRUE else "http"
    return f"{scheme}://127.0.0.1:{environ.get('PORT', '').strip() or DEFAULT_PORT}/readyz"


def ask(url: str) -> int:
    """Return the status with which `url` is answered; without a path, `/readyz` is asked.

    Raises:
        OSError: nobody answers, or not in time.
        ValueError: `url` is not one, or the answer is not HTTP.
    """
    scheme, host, port, authority, path = split(url)
    deadline = time.monotonic() + TIME_LIMIT
    with socket.create_connection((host, port), TIME_LIMIT) as plain:
        connection = _encrypted(plain, host) if scheme == "https" else plain
        with connection:
            request = f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode("ascii"))
            return _status(connection, deadline)


def split(url: str) -> tuple[str, str, int, str, str]:
    """Return scheme, host, port, authority and path of an HTTP URL.

    Raises:
        ValueError: it is not an HTTP URL.
    """
    scheme, separator, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    host, colon, port = authority.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = authority, "443" if scheme == "https" else "80"
    printable = url.isascii() and url.isprintable() and " " not in url
    valid = separator and scheme in {"http", "https"} and host and port.isdecimal() and printable
    if not valid or "@" in authority:
        raise ValueError("the address must be of the form http://host:port/path")
    return scheme, host.strip("[]"), int(port), authority, f"/{path or 'readyz'}"


def _encrypted(plain: socket.socket, host: str) -> socket.socket:
    import ssl  # noqa: PLC0415 - costs more than the rest of the check

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate names the public host; this asks the same machine, and sends no secret.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(plain, server_hostname=host)


def _status(connection: socket.socket, deadline: float) -> int:
    answer = b""
    while b"\r\n" not in answer and len(answer) < LONGEST_STATUS_LINE:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(LONGEST_STATUS_LINE)
        if not part:
            break
        answer += part
    version, _, rest = answer.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise ValueError("the answer is not HTTP")
    return int(rest[:3])
