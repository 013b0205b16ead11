"""`relay health [URL]`: check whether a relay is ready, and report it by the exit code.

Docker and Kubernetes run this every few seconds beside the relay, so it imports next to nothing: it
sends one request over a plain socket and reads only the status line.

Port and TLS of this host's relay may be set in a file, a flag or a variable, so the server
announces them by a name in the kernel's table of Unix sockets. Such a name needs no disk, every
user may read it, and it disappears with the server, however that ends.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence

from relay.announcement import Announced, announced, namespace

TIME_LIMIT = 2.5
"""Seconds for the whole check; the image's own limit is longer."""

MAX_STATUS_LINE = 1024
"""Maximum number of bytes to read: a relay's status line is shorter."""

DEFAULT_PORT = "8030"

USAGE = """Usage: relay health [URL]

Exit with 0 if a relay is ready, otherwise with 1 and the reason. Without a URL, the relay of this
container or host is checked.
"""

_OK = 200
_TRUE = ("true", "yes", "1")


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Return 0 if the relay is ready; otherwise print the reason on one line and return 1.

    Args:
        arguments: the URL to check; if empty, the relay of this container or host is checked.
        environ: environment variables.
    """
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write(USAGE)
        return 0
    try:
        status = ask(arguments[0]) if arguments else ask_own(own_url(environ, announced()))
    except (OSError, ValueError) as e:
        return _not_ready(str(e))
    return 0 if status == _OK else _not_ready(f"status {status}")


def _not_ready(reason: str) -> int:
    sys.stderr.write(f"not ready: {reason}\n")
    return 1


def own_url(environ: Mapping[str, str], servers: Sequence[Announced]) -> str:
    """Return the URL of the relay of this container or host.

    Args:
        environ: `PORT` selects one of several relays; `TLS_ENABLED` gives the scheme of a relay
            that is not announced.
        servers: the announced servers.
    """
    here, port_variable = namespace(), environ.get("PORT", "").strip()
    own = [each for each in servers if each[0] == here]
    candidates = (
        # Process 1 is the container's own command, which need not have read the image's variables.
        [each for each in own if each[1] == "1"]
        or [each for each in servers if each[3] == (port_variable or DEFAULT_PORT)]
        or ([] if port_variable or len(own) > 1 else own)
    )
    if candidates:
        _, _, scheme, port = candidates[0]
    else:
        tls = environ.get("TLS_ENABLED", "").strip().lower() in _TRUE
        scheme, port = "https" if tls else "http", port_variable or DEFAULT_PORT
    return f"{scheme}://127.0.0.1:{port}/readyz"


def ask_own(url: str) -> int:
    """Return the status code of a GET request to `url`; retry plain HTTP with TLS.

    Raises:
        OSError: no response, or not in time.
        ValueError: the response is not HTTP.
    """
    try:
        return ask(url)
    except (ConnectionResetError, ValueError):
        if not url.startswith("http://"):
            raise
    return ask(url.replace("http", "https", 1))


def ask(url: str) -> int:
    """Return the status code of a GET request to `url`; the default path is `/readyz`.

    Raises:
        OSError: no response, or not in time.
        ValueError: `url` is invalid, or the response is not HTTP.
    """
    scheme, host, port, authority, path = split(url)
    deadline = time.monotonic() + TIME_LIMIT
    with socket.create_connection((host, port), TIME_LIMIT) as plain:
        connection = _wrap_tls(plain, host) if scheme == "https" else plain
        with connection:
            request = f"GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n"
            connection.sendall(request.encode("ascii"))
            return _read_status(connection, deadline)


def split(url: str) -> tuple[str, str, int, str, str]:
    """Return scheme, host, port, authority and path of an HTTP URL.

    Raises:
        ValueError: `url` is not an HTTP URL.
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


def _wrap_tls(plain: socket.socket, host: str) -> socket.socket:
    import ssl  # noqa: PLC0415 - costs more than the rest of the check

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The certificate names the public host; this connection stays on the machine, without secrets.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(plain, server_hostname=host)


def _read_status(connection: socket.socket, deadline: float) -> int:
    data = b""
    while b"\r\n" not in data and len(data) < MAX_STATUS_LINE:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(MAX_STATUS_LINE)
        if not part:
            break
        data += part
    version, _, rest = data.partition(b" ")
    if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
        raise ValueError("the answer is not HTTP")
    return int(rest[:3])
