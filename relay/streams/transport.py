"""Transports of streams, and the chunks of HTTP/1.1 that are written to them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Protocol

from relay.protocol.clientside import PING


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


def encode_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk of an HTTP/1.1 body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def decode_chunks(chunks: bytes) -> Iterator[bytes]:
    """Yield the data of chunks made by `encode_chunk`, for a server that does its own framing."""
    at = 0
    while at < len(chunks):
        begin = chunks.index(b"\r\n", at) + 2
        end = begin + int(chunks[at : begin - 2], 16)
        yield chunks[begin:end]
        at = end + 2


HEARTBEAT = encode_chunk(b":\n")


PING_CHUNK = encode_chunk(PING)


LAST_CHUNK = b"0\r\n\r\n"
