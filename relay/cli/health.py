"""`relay health [URL]`: asks a relay whether it is ready; the exit code says so.

Docker and Kubernetes start this every few seconds beside the relay, so it imports next to nothing:
one request over a plain socket, of which only the status line is read.

Where the relay of this host is, its server says by a name in the kernel's table of Unix sockets:
port and TLS may stand in a file, an option or a variable. Such a name needs no place on a disk,
every user may read it, and it goes when the server goes, however that ends.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence

from relay.announcement import Announced, announced, namespace

TIME_LIMIT = 2.5
"""Seconds for the whole check; the limit that the image gives it is longer."""

LONGEST_STATUS_LINE = 1024
"""Bytes that are read at most: more is no relay."""

DEFAULT_PORT = "8030"


_OK = 200
_TRUE = ("true", "yes", "1")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Return 0 if the relay is ready and 1 if not, after one line that says why not.

    Args:
        arguments: the URL to ask; none for the relay of this container or host.
        environ: the environment variables.
    """
    try:
        status = ask(arguments[0]) if arguments else ask_own(own_url(environ, announced()))
    except (OSError, ValueError) as e:
        return _not_ready(str(e))
    return 0 if status == _OK else _not_ready(f"status {status}")


def _not_ready(reason: str) -> int:
    sys.stderr.write(f"not ready: {reason}\n")
    return 1


def own_url(environ: Mapping[str, str], servers: Sequence[Announced]) -> str:
    """Return where the relay of this container or host is asked.

    Args:
        environ: where there may be several relays, `PORT` says which one is meant. Of one that is
            not announced, `TLS_ENABLED` says how it is asked.
        servers: those that are announced.
    """
    here, wanted = namespace(), environ.get("PORT", "").strip()
    own = [each for each in servers if each[0] == here]
    found = (
        # The container's own command, which need not have read the variables of its image.
        [each for each in own if each[1] == "1"]
        or [each for each in servers if each[3] == (wanted or DEFAULT_PORT)]
        or ([] if wanted or len(own) > 1 else own)
    )
    if found:
        _, _, scheme, port = found[0]
    else:
        tls = environ.get("TLS_ENABLED", "").strip().lower() in _TRUE
        scheme, port = "https" if tls else "http", wanted or DEFAULT_PORT
    return f"{scheme}://127.0.0.1:{port}/readyz"


def ask_own(url: str) -> int:
    """Return the status with which `url` is answered, be it with TLS or without.

    Raises:
        OSError: nobody answers, or not in time.
        ValueError: the answer is not HTTP.
    """
    try:
        return ask(url)
    except (ConnectionResetError, ValueError):
        if not url.startswith("http://"):
            raise
    return ask(url.replace("http", "https", 1))


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
