"""Servers of a few words: blocking sockets in a thread, so that OpenSSL's alerts get out."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PATIENCE = 5.0
"""Seconds that a client may be silent."""


@contextmanager
def peer(words: bytes, *, listens: bool = True, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Say the same to every client, and close; yields the port.

    Args:
        words: what is said.
        listens: whether it waits for the client to say something first.
        tls: for a handshake before that; None for plain TCP.
    """
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                connection.settimeout(PATIENCE)
                with (
                    connection
                    if tls is None
                    else tls.wrap_socket(connection, server_side=True) as c
                ):
                    if listens:
                        c.recv(65536)
                    c.sendall(words)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            thread.join()
