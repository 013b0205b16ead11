"""The part of a connection that uvicorn reads and the application answers, within our limits."""

from __future__ import annotations

from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from relay.clock import monotonic
from relay.web.fastpath.shared import FastPath
from relay.web.protocol import HTTPProtocol

_VERSIONS = ("1.1", "1.0")


class ApplicationProtocol(HTTPProtocol):
    """Protocol behind `FastHTTPProtocol`; made when a connection has its first unusual request.

    Args:
        shared: state shared by all connections.
        config, server_state, app_state: as in uvicorn's protocol.
    """

    def __init__(
        self, shared: FastPath, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.last_response = 0.0
        """Monotonic time at which the last response was complete."""
        self._shared = shared
        self._head_size = 0
        """Bytes of an incomplete request head."""
        self._in_request = False
        """True from the first byte of a request to its last."""
        self._refused = False
        """True if the request that is being read does not go to the application."""

    def __repr__(self) -> str:
        if self._in_request:
            state = "in head" if self._head_size else "in body"
        else:
            state = "idle" if self.can_respond else "responding"
        return f"<ApplicationProtocol [{state}]>"

    @property
    def reads_head(self) -> bool:
        """True if a request head is incomplete."""
        return self._in_request and self._head_size > 0

    @property
    def reads_body(self) -> bool:
        """True if the head of a request is complete, and its body is not."""
        return self._in_request and not self._head_size

    @property
    def can_respond(self) -> bool:
        """True if a response can be written now, in order and to a client that reads."""
        cycle = self.cycle
        return (cycle is None or cycle.response_complete) and not (
            self.pipeline or self.flow.write_paused or self.transport.is_closing()
        )

    @property
    def is_idle(self) -> bool:
        """True between two requests: the fast path may take the next one."""
        return not self._in_request and self.can_respond

    def data_received(self, data: bytes) -> None:
        """Parse bytes, and refuse a request head that is too large."""
        if not self.reads_body:
            self._head_size += len(data)
        super().data_received(data)
        if self.reads_head and self._head_size > self._shared.limits.max_head_size:
            self._refuse_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._in_request, self._refused = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Pass a request, whose head has been read, to the application, or refuse it."""
        size, self._head_size = self._head_size, 0
        if self.transport.is_closing():
            self._refused = True
        elif self.parser.get_http_version() not in _VERSIONS:
            self.refuse(b"505 HTTP Version Not Supported")
        elif size > self._shared.limits.max_head_size and self._is_head_too_large():
            self._refuse_head()
        else:
            # uvicorn would cut off a fragment; in a target it is an ordinary part of the path.
            self.url = self.url.replace(b"#", b"%23")
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Feed the body to the application."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the request."""
        self._in_request = False
        if not self._refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Note the end of a response. The sweep, not a timer, closes idle connections."""
        super().on_response_complete()
        self._unset_keepalive_if_required()
        self.last_response = monotonic()

    def refuse(self, status: bytes) -> None:
        """Respond with an error status, and close the connection."""
        self._refused = True
        if self.can_respond:
            head = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n" % status
            self.transport.write(head + self._shared.date)
        self.transport.close()

    def _is_head_too_large(self) -> bool:
        """Return whether the head is too large without the bytes received together with it."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        return size > self._shared.limits.max_head_size

    def _refuse_head(self) -> None:
        if len(self.url) > self._shared.limits.max_head_size // 2:
            self.refuse(b"414 URI Too Long")
        else:
            self.refuse(b"431 Request Header Fields Too Large")
