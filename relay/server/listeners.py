"""Listening sockets and their options."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass

from relay.announcement import announce
from relay.errors import RelayError
from relay.reasons import describe
from relay.server.options import ServerOptions

_log = logging.getLogger("relay.server")


BACKLOG = 16 * 1024
"""Connections that may wait to be accepted: thousands of SDKs come back at once after an outage.
The kernel lowers it to its own limit."""


UNSENT_LIMIT = 512 * 1024
"""Bytes that the kernel takes from us beyond what is on its way: on the same machine a usual
payload at once, for each time that we are told to go on costs more than writing does; and all that
a client that does not read costs there. Over a network the kernel takes less by itself, and unlike
a capped send buffer this does not hurt long distances."""


DEAD_AFTER_MS = 60_000
"""Milliseconds after which a connection whose data nobody acknowledges is given up."""


PROBE_AFTER, PROBE_EACH, PROBES = 60, 15, 4
"""Seconds of silence before the kernel probes, seconds between probes, and their number."""


class CannotListen(RelayError):
    """The port cannot be listened on."""


def listen(port: int) -> socket.socket:
    """Return a socket that listens on all interfaces, IPv6 and IPv4.

    Raises:
        CannotListen: the port is taken, or not allowed.
    """
    return _listen(port, f"Error starting http listener on port: {port} ")


def listen_for_exporter(port: int) -> socket.socket:
    """Return a socket for the port of `[Prometheus]`.

    Raises:
        CannotListen: the port is taken, or not allowed.
    """
    return _listen(port, "Error registering Prometheus metrics exporter:")


def _listen(port: int, trouble: str) -> socket.socket:
    try:
        return _listening(port)
    except OSError as e:
        raise CannotListen(f"{trouble} listen tcp :{port}: {describe(e)}") from e


def _listening(port: int) -> socket.socket:
    family = socket.AF_INET6 if _has_ipv6() else socket.AF_INET
    # Without its protocol number asyncio would not switch off Nagle's algorithm.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        _guard(listener)
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


def _guard(listener: socket.socket) -> None:
    """Bound what a silent client costs; accepted sockets inherit these options."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_AFTER),
        ("TCP_KEEPINTVL", PROBE_EACH),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", DEAD_AFTER_MS),
        ("TCP_NOTSENT_LOWAT", UNSENT_LIMIT),
    ):
        if hasattr(socket, name):  # some are Linux's only
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Listening sockets, and what tells of them."""

    main: socket.socket
    exporter: socket.socket | None = None
    announcement: socket.socket | None = None
    """Tells `relay health` where the main one is."""

    @classmethod
    def of(cls, options: ServerOptions) -> Listeners:
        """Listen on the ports that the options name; say so.

        Raises:
            CannotListen: a port is taken, or not allowed.
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
        """Refuse those who wait."""
        for each in (self.main, self.exporter, self.announcement):
            if each:
                each.close()
