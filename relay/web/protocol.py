"""Extension of uvicorn's HTTP protocol by HTTP/1.0 and targets that are absolute URLs."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.streams.transport import decode_chunks

_CONNECTION = "relay.connection"
_CHUNKED = b"\r\ntransfer-encoding: chunked\r\n"
_WITHOUT_PATH = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*://[^/?#]+)(\?.*)?", re.DOTALL)


class HTTPProtocol(HttpToolsProtocol):
    """One connection whose requests are all served by the application."""

    def on_message_begin(self) -> None:
        """Begin a request; streams have to know how much of them their clients have read."""
        super().on_message_begin()
        self.scope["extensions"] = {_CONNECTION: {"transport": self.transport}}

    def on_headers_complete(self) -> None:
        """Pass a request, whose head has been read, to the application."""
        self.url = with_path(self.url)
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.transport = cast("asyncio.Transport", BareTransport(self.transport))
            self.cycle.waiting_for_100_continue = False


def connection_of(scope: Scope) -> asyncio.Transport | None:
    """Return the connection of a request; None if another server than ours received it."""
    found = scope.get("extensions", {}).get(_CONNECTION, {}).get("transport")
    return cast("asyncio.Transport | None", found)  # uvloop's are of no class of asyncio's


class BareTransport:
    """Transport for a response to an HTTP/1.0 request; removes the chunked encoding.

    HTTP/1.0 clients, such as nginx by default, take chunk headers for data. For them a body of
    unknown length ends with the connection (RFC 9112, 6.1 and 9.3), which uvicorn closes after
    each of their requests.

    Args:
        transport: of the connection.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._has_head = False
        self._chunked = False

    def write(self, data: bytes) -> None:
        """Write the head first, then the body: whole chunks, or any part of an unchunked body."""
        if not self._has_head:
            self._has_head = True
            self._chunked = _CHUNKED in data
            data = data.replace(_CHUNKED, b"\r\n")
        elif self._chunked:
            data = b"".join(decode_chunks(data))
        self._transport.write(data)

    def is_closing(self) -> bool:
        """Return whether the connection is closing or closed."""
        return self._transport.is_closing()

    def close(self) -> None:
        """Close the connection once everything has been sent."""
        self._transport.close()


def with_path(target: bytes) -> bytes:
    """Return the target of a request, with the path `/` if it is a URL without a path.

    Both are equivalent (RFC 9110, 4.2.3), but the URL parser would find no path.
    """
    match = _WITHOUT_PATH.fullmatch(target)
    return target if match is None else match[1] + b"/" + (match[2] or b"")
