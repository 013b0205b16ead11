"""Lines about requests, at level debug; they hold neither keys nor contexts nor queries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.streams.transport import StreamTransport, decode_chunks
from relay.telemetry.redaction import _masked, redact_url

_log = logging.getLogger("relay.traffic")


_EVENT_STREAM = b"text/event-stream"


_METHOD_NOT_ALLOWED = 405


def request_line(method: str, url: str, authorization: str, status: int, size: int | None) -> str:
    """Return the line of a request.

    Args:
        method: of the request.
        url: as `redact_url` gives it.
        authorization: the header; empty if there is none.
        status: of the answer.
        size: bytes of its body; None for a stream, whose line comes at its beginning.
    """
    end = "(streaming)" if size is None else f"bytes={size}"
    auth = _masked(authorization) if authorization else "n/a"
    return f"Request: method={method} url={url} auth={auth} status={status} {end}"


def closed_line(url: str, authorization: str, size: int) -> str:
    """Return the line of a stream that has ended; the arguments are those of `request_line`."""
    auth = _masked(authorization) if authorization else "n/a"
    return f"Stream closed: url={url} auth={auth} bytes={size}"


def log_request(line: str) -> None:
    """Write a line."""
    _log.debug("%s", line)


class AccessLogMiddleware:
    """Middleware that logs each request which found a route; used only if `RequestMetrics.logs`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything through, and log."""
        entry = _Entry(scope)

        async def noting(message: Message) -> None:
            entry.see(message)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            entry.end()


class _Entry:
    """What a line says of one request to the application."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._status = 0
        self._size = 0
        self._streams = False

    def see(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._streams = content_type.startswith(_EVENT_STREAM)
            if self._streams:
                self._note_request(None)
        elif self._scope["method"] != "HEAD":
            self._size += len(message.get("body", b""))

    def end(self) -> None:
        if self._streams:
            log_request(closed_line(self._url, self._authorization, self._size))
        elif self._status and self._found_route:
            self._note_request(self._size)

    def _note_request(self, size: int | None) -> None:
        method = self._scope["method"]
        log_request(request_line(method, self._url, self._authorization, self._status, size))

    @property
    def _found_route(self) -> bool:
        return "endpoint" in self._scope and self._status != _METHOD_NOT_ALLOWED

    @property
    def _url(self) -> str:
        path, mark = self._scope["raw_path"], b"?" if self._scope["query_string"] else b""
        has_context = "context" in self._scope.get("path_params", {})
        return redact_url((path + mark).decode("latin-1"), has_context=has_context)

    @property
    def _authorization(self) -> str:
        values = (value for name, value in self._scope["headers"] if name == b"authorization")
        header: bytes = next(values, b"")
        return header.decode("latin-1")


class LoggedTransport(asyncio.Protocol):
    """Stands between a transport and the subscription that owns it, to log the end of the stream.

    Args:
        transport: of the client; the head of the response has been written.
        url: as `redact_url` gives it.
        authorization: the header.
    """

    def __init__(self, transport: StreamTransport, url: str, authorization: str) -> None:
        self._transport = transport
        self._url = url
        self._authorization = authorization
        self._size = 0
        self._owner: asyncio.BaseProtocol = asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        """Tell the owner what the transport says."""
        self._owner = protocol
        self._transport.set_protocol(self)

    def write(self, data: bytes, /) -> None:
        """Write chunks, and count what they hold."""
        self._size += sum(map(len, decode_chunks(data)))
        self._transport.write(data)

    def writelines(self, parts: Iterable[bytes], /) -> None:
        """Write chunks, and count what they hold."""
        for part in parts:
            self.write(part)

    def close(self) -> None:
        """Close after everything has been sent."""
        self._transport.close()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes not yet sent."""
        return self._transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        """Pass on that the buffer is full."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the buffer has emptied."""
        self._owner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass on that the client is gone, and log it."""
        self._owner.connection_lost(exc)
        log_request(closed_line(self._url, self._authorization, self._size))
