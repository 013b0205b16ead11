"""uvicorn's HTTP protocol, with what it lacks: HTTP/1.0, and targets that are whole URLs."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.streams.transport import decode_chunks

_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
_WITHOUT_PATH = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*://[^/?#]+)(\?.*)?", re.DOTALL)


class HTTPProtocol(HttpToolsProtocol):
    """One connection, all of whose requests are the application's."""

    def on_headers_complete(self) -> None:
        """Give a request, whose head has been read, to the application."""
        self.url = with_path(self.url)
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.transport = cast("asyncio.Transport", BareTransport(self.transport))
            self.cycle.waiting_for_100_continue = False


class BareTransport:
    """What the answer to a request of HTTP/1.0 is written to: takes the chunks away.

    Such clients, as nginx is by default, take chunks for data; to them a body of unknown length
    ends with the connection (RFC 9112, 6.1 and 9.3), which uvicorn closes after each of them.

    Args:
        transport: of the connection.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._has_head = False
        self._chunked = False

    def write(self, data: bytes) -> None:
        """Take the head, then the body: as many whole chunks as there are, or a part of it."""
        if not self._has_head:
            self._has_head = True
            self._chunked = _CHUNKED in data
            data = data.replace(_CHUNKED, b"\r\n")
        elif self._chunked:
            data = b"".join(decode_chunks(data))
        self._transport.write(data)

    def is_closing(self) -> bool:
        """Whether the connection ends, or has ended."""
        return self._transport.is_closing()

    def close(self) -> None:
        """End the connection after everything has been sent."""
        self._transport.close()


def with_path(target: bytes) -> bytes:
    """Return the target of a request, with the path `/` if it is a URL without any.

    To a server both are the same (RFC 9110, 4.2.3); the parser of URLs would find no path.
    """
    match = _WITHOUT_PATH.fullmatch(target)
    return target if match is None else match[1] + b"/" + (match[2] or b"")
