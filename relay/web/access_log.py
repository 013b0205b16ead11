"""Access log, at level debug; its lines contain no keys, contexts or queries."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.streams.transport import StreamTransport, find_chunks
from relay.telemetry.redaction import mask_credential, redact_url
from relay.telemetry.traffic import RequestMetrics

_log = logging.getLogger("relay.traffic")

_EVENT_STREAM = b"text/event-stream"
_METHOD_NOT_ALLOWED = 405


def request_line(method: str, url: str, authorization: str, status: int, size: int | None) -> str:
    """Return the log line of a request.

    Args:
        method: of the request.
        url: redacted by `redact_url`.
        authorization: the header; empty without one.
        status: of the response.
        size: bytes of the response body; None for a stream, which is logged when it opens.
    """
    end = "(streaming)" if size is None else f"bytes={size}"
    auth = mask_credential(authorization) if authorization else "n/a"
    return f"Request: method={method} url={url} auth={auth} status={status} {end}"


def closed_line(url: str, authorization: str, size: int) -> str:
    """Return the log line of a closed stream; arguments as in `request_line`."""
    auth = mask_credential(authorization) if authorization else "n/a"
    return f"Stream closed: url={url} auth={auth} bytes={size}"


def log_request(line: str) -> None:
    """Log a line made by `request_line` or `closed_line`."""
    _log.debug("%s", line)


class AccessLogMiddleware:
    """Middleware that logs every routed request, while `RequestMetrics.logs`."""

    def __init__(self, app: ASGIApp, traffic: RequestMetrics) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request through, and log it."""
        if not self._traffic.logs:
            await self._app(scope, receive, send)
            return
        entry = _LogEntry(scope)

        async def observe_and_send(message: Message) -> None:
            entry.observe(message)
            await send(message)

        try:
            await self._app(scope, receive, observe_and_send)
        finally:
            entry.end()


class _LogEntry:
    """Log entry of one request to the application."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._status = 0
        self._size = 0
        self._streams = False

    def observe(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            content_type = dict(message["headers"]).get(b"content-type", b"")
            self._streams = content_type.startswith(_EVENT_STREAM)
            if self._streams:
                self._log_request(None)
        elif self._scope["method"] != "HEAD":
            self._size += len(message.get("body", b""))

    def end(self) -> None:
        if self._streams:
            log_request(closed_line(self._url, self._authorization, self._size))
        elif self._status and self._found_route:
            self._log_request(self._size)

    def _log_request(self, size: int | None) -> None:
        method = self._scope["method"]
        log_request(request_line(method, self._url, self._authorization, self._status, size))

    @property
    def _found_route(self) -> bool:
        return "endpoint" in self._scope and self._status != _METHOD_NOT_ALLOWED

    @property
    def _url(self) -> str:
        path, separator = self._scope["raw_path"], b"?" if self._scope["query_string"] else b""
        has_context = "context" in self._scope.get("path_params", {})
        return redact_url((path + separator).decode("latin-1"), has_context=has_context)

    @property
    def _authorization(self) -> str:
        values = (value for name, value in self._scope["headers"] if name == b"authorization")
        header: bytes = next(values, b"")
        return header.decode("latin-1")


class LoggedTransport(asyncio.Protocol):
    """Proxy between a transport and the subscription that owns it; logs the end of the stream.

    Args:
        transport: of the client; the head of the response has been written.
        url: redacted by `redact_url`.
        authorization: the header.
    """

    def __init__(self, transport: StreamTransport, url: str, authorization: str) -> None:
        self._transport = transport
        self._url = url
        self._authorization = authorization
        self._size = 0
        self._owner: asyncio.BaseProtocol = asyncio.Protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol, /) -> None:
        """Forward the callbacks of the transport to a new owner."""
        self._owner = protocol
        self._transport.set_protocol(self)

    def write(self, data: bytes, /) -> None:
        """Write chunks, and count the bytes of their data."""
        self._size += sum(end - begin for begin, end in find_chunks(data))
        self._transport.write(data)

    def writelines(self, parts: Iterable[bytes], /) -> None:
        """Write chunks, and count the bytes of their data."""
        for part in parts:
            self.write(part)

    def close(self) -> None:
        """Close once everything has been sent."""
        self._transport.close()

    def abort(self) -> None:
        """Close at once, dropping what has not been sent."""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        """Return the number of unsent bytes."""
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, /) -> Any:
        """Return what asyncio knows of the connection."""
        return self._transport.get_extra_info(name)

    def pause_writing(self) -> None:
        """Forward that the buffer is full."""
        self._owner.pause_writing()

    def resume_writing(self) -> None:
        """Forward that the buffer has drained."""
        self._owner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forward the end of the connection, and log it."""
        self._owner.connection_lost(exc)
        log_request(closed_line(self._url, self._authorization, self._size))
