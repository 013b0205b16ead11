"""Transports of streams, and the chunks of HTTP/1.1 that are written to them."""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import struct
import sys
import termios
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from relay.protocol.clientside import PING

PIECE = 64 * 1024
"""Bytes that are passed on together where they are copied for each client."""

_QUEUED = getattr(termios, "TIOCOUTQ", None) if sys.platform == "linux" else None
"""Asks a socket for the bytes that its peer has not acknowledged, `SIOCOUTQ`."""


class StreamTransport(Protocol):
    """The part of an asyncio transport that a subscription uses."""

    def write(self, data: bytes, /) -> None:
        """Buffer bytes to send; never blocks."""

    def writelines(self, parts: Iterable[bytes], /) -> None:
        """Buffer bytes to send together."""

    def close(self) -> None:
        """Close after everything has been sent."""

    def abort(self) -> None:
        """Close now."""

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes not yet sent."""

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        """Set the protocol that is called for a full buffer and a lost connection."""

    def get_extra_info(self, name: str, /) -> Any:
        """Return what asyncio knows of the connection, such as its `socket`; None if unknown."""


class Unread(NamedTuple):
    """Bytes written to a stream that the client's machine has not received."""

    all: int
    held: int
    """Those that take memory for this client alone."""


def unread_of(transport: StreamTransport) -> Unread:
    """Return the unread bytes; those in the kernel count only where it tells their number."""
    buffered, queued = transport.get_write_buffer_size(), array.array("i", [0])
    connection = transport.get_extra_info("socket")
    if connection is not None and _QUEUED is not None:
        with suppress(OSError, ValueError):  # it has just been closed
            fcntl.ioctl(connection.fileno(), _QUEUED, queued)
    # The rest of the buffer is shared with other clients, or not yet encrypted.
    return Unread(buffered + queued[0], min(buffered, PIECE) + queued[0])


def limit_unsent(transport: StreamTransport, size: int) -> None:
    """Let the kernel keep about so many unsent bytes for a client, where it can be told."""
    connection = transport.get_extra_info("socket")
    if connection is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)


def reset(transport: StreamTransport) -> None:
    """Close the connection to a client that does not read.

    A close alone would leave to the kernel what is unsent, for as long as it tries to send it.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class TLSTransport(asyncio.Protocol):
    """Proxy between a TLS transport and the protocol that owns it; bounds the cost of a client.

    Encrypted bytes are nobody else's. A TLS transport encrypts all that is written to it at once;
    here what the client does not take yet stays as it is, shared with others.

    Args:
        transport: of the client, over TLS.
    """

    __slots__ = ("_closing", "_is_full", "_owner", "_rest", "_size", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        transport.set_write_buffer_limits(PIECE)
        self._transport = transport
        self._owner: asyncio.BaseProtocol = asyncio.Protocol()
        self._rest: deque[memoryview] = deque()
        """Bytes that are to be written; there are none unless the buffer is full."""
        self._size = 0
        self._is_full = False
        self._closing = False

    def __repr__(self) -> str:
        return f"<TLSTransport [{self._size} bytes left]>"

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        """Forward the callbacks of the transport to a new owner."""
        self._owner = protocol
        self._transport.set_protocol(self)

    def write(self, data: bytes, /) -> None:
        """Buffer bytes to send."""
        if len(data) <= PIECE and not self._rest:
            self._transport.write(data)
        else:
            self._rest.append(memoryview(data))
            self._size += len(data)
            self._fill()

    def writelines(self, parts: Iterable[bytes], /) -> None:
        """Buffer bytes to send together."""
        parts = list(parts)
        if sum(map(len, parts)) <= PIECE and not self._rest:
            self._transport.writelines(parts)
        else:
            for part in parts:
                self.write(part)

    def close(self) -> None:
        """Close after everything has been sent."""
        self._closing = True
        self._fill()

    def abort(self) -> None:
        """Close now."""
        self._drop()
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes not yet sent."""
        return self._size + self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, /) -> Any:
        """Return what asyncio knows of the connection."""
        return self._transport.get_extra_info(name)

    def data_received(self, data: bytes) -> None:
        """Forward bytes of the client."""
        if isinstance(self._owner, asyncio.Protocol):
            self._owner.data_received(data)

    def pause_writing(self) -> None:
        """Note that the buffer is full, and let the owner know."""
        self._is_full = True
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Go on writing; let the owner know once nothing is left."""
        self._is_full = False
        self._fill()
        if not self._is_full:
            self._owner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forward the end of the connection."""
        self._drop()
        self._owner.connection_lost(exc)

    def _fill(self) -> None:
        """Write until the buffer is full."""
        while self._rest and not self._is_full:
            data = self._rest.popleft()
            if len(data) > PIECE:
                self._rest.appendleft(data[PIECE:])
            self._size -= len(data[:PIECE])
            self._transport.write(data[:PIECE])
        if self._closing and not self._rest:
            self._transport.close()

    def _drop(self) -> None:
        self._rest.clear()
        self._size = 0


def encode_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk of an HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def find_chunks(chunks: bytes) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the data of each chunk made by `encode_chunk`."""
    at = 0
    while at < len(chunks):
        begin = chunks.index(b"\r\n", at) + 2
        end = begin + int(chunks[at : begin - 2], 16)
        yield begin, end
        at = end + 2


def decode_chunks(chunks: bytes) -> Iterator[bytes]:
    """Yield the data of chunks made by `encode_chunk`, for a server that does its own framing."""
    for begin, end in find_chunks(chunks):
        yield chunks[begin:end]


HEARTBEAT = encode_chunk(b":\n")


PING_CHUNK = encode_chunk(PING)


LAST_CHUNK = b"0\r\n\r\n"
