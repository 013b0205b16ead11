"""Listening sockets and their options."""

from __future__ import annotations

import logging
import socket
import sys

from msgspec import Struct

from relay.announcement import announce
from relay.errors import RelayError
from relay.reasons import describe
from relay.server.options import ServerOptions

_log = logging.getLogger("relay.server")


BACKLOG = 16 * 1024
"""Maximum number of connections that wait to be accepted: thousands of SDKs reconnect at once after
an outage. The kernel caps it at its own limit."""


UNSENT_LIMIT = 512 * 1024
"""Maximum number of unsent bytes that the kernel buffers per socket. On the same machine, a usual
payload fits at once: each wake-up to continue writing costs more than the write itself. It also
bounds the cost of a client that does not read. Over a network the kernel buffers less anyway, and
unlike a capped send buffer this does not slow down long distances."""


DEAD_AFTER_MS = 60_000
"""Milliseconds without acknowledgement of sent data after which a connection is dropped."""


PROBE_AFTER, PROBE_EACH, PROBES = 60, 15, 4
"""TCP keep-alive: seconds before the first probe, seconds between probes, number of probes."""


class CannotListen(RelayError):
    """A port cannot be opened."""


def listen(port: int) -> socket.socket:
    """Return a socket that listens on all interfaces, IPv6 and IPv4.

    Raises:
        CannotListen: the port is in use, or not permitted.
    """
    return _listen(port, f"Error starting http listener on port: {port} ")


def listen_for_workers(port: int, number: int) -> list[socket.socket]:
    """Return a socket for each worker; the kernel shares connections out evenly.

    Where it cannot, all workers have one socket.

    Raises:
        CannotListen: the port is in use, or not permitted.
    """
    first = listen(port)
    if sys.platform != "linux":
        return [first] * number
    # Opened alone at first: another relay on the port would take a share without an error.
    port = first.getsockname()[1]
    first.close()
    text = f"Error starting http listener on port: {port} "
    return [_listen(port, text, shared=True) for _ in range(number)]


def listen_for_exporter(port: int) -> socket.socket:
    """Return a socket that listens on the port of `[Prometheus]`.

    Raises:
        CannotListen: the port is in use, or not permitted.
    """
    return _listen(port, "Error registering Prometheus metrics exporter:")


def _listen(port: int, error_prefix: str, *, shared: bool = False) -> socket.socket:
    try:
        return _open_socket(port, shared=shared)
    except OSError as e:
        raise CannotListen(f"{error_prefix} listen tcp :{port}: {describe(e)}") from e


def _open_socket(port: int, *, shared: bool = False) -> socket.socket:
    family = socket.AF_INET6 if _has_ipv6() else socket.AF_INET
    # asyncio disables Nagle's algorithm only on sockets with an explicit protocol number.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        _bound_client_cost(listener)
        listener.bind(("", port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("", 0))
    except OSError:
        return False
    return True


def _bound_client_cost(listener: socket.socket) -> None:
    """Set the options that bound the cost of silent clients; accepted sockets inherit them."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER),
        ("TCP_KEEPINTVL", PROBE_EACH),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", DEAD_AFTER_MS),
        ("TCP_NOTSENT_LOWAT", UNSENT_LIMIT),
    ):
        if hasattr(socket, name):  # some exist on Linux only
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Listeners(Struct, frozen=True):
    """Listening sockets of the process, and their announcement."""

    main: socket.socket
    exporter: socket.socket | None = None
    announcement: socket.socket | None = None
    """Socket whose name tells `relay health` the port of `main`."""

    @classmethod
    def of(cls, options: ServerOptions) -> Listeners:
        """Listen on the configured ports, and log them.

        Raises:
            CannotListen: a port is in use, or not permitted.
        """
        main = listen(options.port)
        port = main.getsockname()[1]
        _log.info("Starting server listening on port %d", port)
        announcement = announce(port, tls=options.tls is not None)
        if options.exporter_port is None:
            return cls(main, None, announcement)
        try:
            exporter = listen_for_exporter(options.exporter_port)
        except CannotListen:
            cls(main, None, announcement).close()
            raise
        port = exporter.getsockname()[1]
        _log.info("Successfully registered Prometheus metrics exporter on port %d", port)
        return cls(main, exporter, announcement)

    def close(self) -> None:
        """Close the sockets; connections not yet accepted are reset."""
        for each in (self.main, self.exporter, self.announcement):
            if each:
                each.close()
